"""What an engine's bytes mean to a proxy, in whatever pieces they come."""

import pytest

from scaler.gateway.answer_parser import BOUND, AnswerParser, BadAnswer

WHOLE = [  # method, bytes, body, whether the connection can go on
    (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
    (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    (b"GET", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", b"hello", False),
    (b"GET", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", False),
    (b"GET", b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
    (b"GET", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", b"hello", True),
    (b"GET", b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
    (b"GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nhe\r\n3;c\r\nllo\r\n0;last\r\n\r\n", b"hello", True),
    (b"GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n5 \r\nhello\r\n0\r\nX-End: 1\r\n\r\n", b"hello", True),
    (b"GET", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No\r\n\r\n", b"", True),
    (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", b"", True),
    (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n", b"", True),
    (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b"", False),
    (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"", False),
    (b"HEAD", b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    (b"GET", b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
]


@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
@pytest.mark.parametrize(("method", "data", "body", "keeps"), WHOLE)
def test_an_answer_that_tells_its_end(method: bytes, data: bytes, body: bytes, keeps: bool, step: int) -> None:
    parser = AnswerParser()
    for _ in range(2 if keeps else 1):  # one after the other
        parser.expect(method)
        assert not parser.done
        for start in range(0, len(data), step):
            assert not parser.done
            parser.feed(data[start : start + step])
        assert (parser.done, parser.keeps, parser.excess) == (True, keeps, False)
        assert b"".join(parser.pieces) == body
        parser.pieces.clear()


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nhello", True),
        (b"HTTP/1.0 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nhello", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Le", False),
        (b"", False),
    ],
)
def test_an_end_of_the_connection_ends_an_answer_only_where_nothing_else_does(data: bytes, whole: bool) -> None:
    parser = AnswerParser()
    parser.expect(b"GET")
    parser.feed(data)
    assert not parser.done
    assert parser.feed_end() is whole
    assert not (whole and parser.keeps)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"hello\r\n", "Expected HTTP/"),
        (b"HTTP/1.1 99 Odd\r\n\r\n", "Invalid status code"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "'gzip, chunked'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n", "'gzip, chunked'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: deflate\r\n\r\n", "'deflate'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "chunk size"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", "another protocol"),
        (b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n", "NUL"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * BOUND + b"\r\n\r\n", "have more than"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Many: 1\r\n" * (BOUND // 8) + b"\r\n", "have more than"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"y" * 2 * BOUND, "have more than"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"y" * 2 * BOUND, "more than"),
    ],
)
def test_says_why_an_answer_cannot_be_passed_on(data: bytes, why: str) -> None:
    parser = AnswerParser()
    parser.expect(b"GET")
    with pytest.raises(BadAnswer, match="(?i)" + why):
        for start in range(0, len(data), 2**16):
            parser.feed(data[start : start + 2**16])


def test_fields_stay_as_they_are_but_for_those_of_the_connection() -> None:
    parser = AnswerParser()
    parser.expect(b"GET")
    parser.feed(
        b"HTTP/1.1 200 caf\xe9\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\n"
        b"Connection: X-Mine, close\r\nX-Mine: 1\r\nKeep-Alive: 5\r\nX-Odd: caf\xe9 \xff\r\nContent-Length: 0\r\nX-Fold: a\r\n b\r\n\r\n"
    )
    assert parser.head is not None
    assert parser.head.reason == b"caf\xe9"
    assert parser.head.fields == [
        (b"Set-Cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"X-Odd", b"caf\xe9 \xff"),
        (b"Content-Length", b"0"),
        (b"X-Fold", b"a b"),
    ]


def test_bytes_that_nobody_asked_for_are_seen() -> None:
    for more in (b"HTTP/1.1 200 OK\r\n", b"H", b"\x00", b"hello"):
        parser = AnswerParser()
        parser.expect(b"GET")
        parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello" + more)
        assert (parser.done, parser.excess) == (True, True)
        assert parser.pieces == [b"hello"]


def test_an_upgrade_passes_everything_on_from_its_head_on() -> None:
    parser = AnswerParser()
    parser.expect(b"GET", upgrades=True)
    parser.feed(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x01a")
    parser.feed(b"\r\n\r\n")
    assert parser.head is not None
    assert (parser.head.upgrade, parser.raw, parser.done, parser.pieces) == (b"websocket", True, False, [b"\x81\x01a", b"\r\n\r\n"])
    assert parser.feed_end()
