"""Parsers of the scaler: what clients, engines, KEDA, the API server, other gateways and users' files send it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
from aiohttp import web
from pydantic import ValidationError

from scaler.books.trigger import BadTrigger, parse_trigger
from scaler.gateway import asked, coding, headers
from scaler.gateway.answer_parser import BOUND, AnswerParser, BadAnswer
from scaler.gateway.body import kind
from scaler.gateway.client_connection import ClientServer
from scaler.gateway.client_gone import ClientWatch
from scaler.gateway.client_room import ClientRoom
from scaler.gateway.exchange import _as_error
from scaler.gateway.form import BadForm, FormReader
from scaler.gateway.refusal import Refusal
from scaler.gateway.routing import outside
from scaler.gateway.target import read_target
from scaler.kubernetes.pod_patch import NodeSetup
from scaler.kubernetes.resources import ModelSnapshot
from scaler.kubernetes.webhook import Webhook
from scaler.local.config import BadConfig, load
from scaler.plan.world import Node
from scaler.sources.engine_metrics import _requests
from scaler.sources.prometheus import PrometheusQuery
from scaler.sources.push import Pushes, _Told
from scaler.sources.source import SourceError
from scaler.view.traces import _FIELDS, _PROPAGATOR
from tests.fuzz.parser import Parser
from zerowake_shared.address import Address
from zerowake_shared.kubernetes.informer import Informer

_LOOP = asyncio.new_event_loop()

# --- the gateway


async def _handle(request: web.BaseRequest) -> web.StreamResponse:
    """What the gateway looks at of a request, whatever it is for."""
    try:
        target = read_target(request.raw_path if hasattr(request, "raw_path") else request.path, lambda name: name == "chat")
        outside(request.headers, target)
        headers.priority(request.headers)
        headers.heartbeat(request.headers)
        headers.tenant(request.headers)
        kind(request.headers)
        _PROPAGATOR.extract(request.headers, getter=_FIELDS)  # type: ignore[arg-type]
        await request.read()
    except Refusal as refusal:
        return refusal.response
    except (web.RequestPayloadError, ConnectionError):
        return web.Response(status=400)
    return web.Response(text="well")


async def _talk(data: bytes) -> None:
    watch = ClientWatch()
    server = ClientServer(_handle, watch, ClientRoom(100), access_log=None, auto_decompress=False)
    ours, theirs = socket.socketpair()
    said: list[dict[str, object]] = []
    _LOOP.set_exception_handler(lambda _, context: said.append(context))
    try:
        await _LOOP.connect_accepted_socket(server, ours)
        theirs.setblocking(False)
        await _LOOP.sock_sendall(theirs, data)
        theirs.shutdown(socket.SHUT_WR)
        answers = b""
        async with asyncio.timeout(5):
            while piece := await _LOOP.sock_recv(theirs, 1 << 16):
                answers += piece
    except (ConnectionError, BrokenPipeError):
        pass
    finally:
        theirs.close()
        await server.shutdown(0)
        watch.close()
    assert not said, said
    assert b"HTTP/1.1 500" not in answers, "the gateway failed"
    assert answers == b"" or answers.startswith(b"HTTP/"), answers[:100]


def _body(data: bytes) -> None:
    """Both readers, which may differ only in what they take."""
    strict = asked.strictly(data)
    try:
        lenient = asked.leniently(data)
    except asked.BadJson:
        assert strict is None, "what is JSON by the strictest rules was refused"
        return
    assert strict is None or strict[:2] == lenient[:2], (strict, lenient)


def _form(data: bytes) -> None:
    about, _, body = data.partition(b"\n")
    reader = FormReader(about.decode("latin-1"))
    for at in range(0, len(body), 100):
        if reader.feed(body[at : at + 100]):
            break
    assert reader.model is None or len(reader.model) < 1 << 12


def _unpack(data: bytes) -> None:
    about, _, body = data.partition(b"\n")
    decoder = coding.decoder(about.decode("latin-1"))
    if decoder is None:
        return
    size = 0
    for piece in decoder.pieces(body):
        size += len(piece)
        assert len(piece) <= 1 << 20, "it gives more at once than it may"
        if size > 32 << 20:
            return
    decoder.end()


def _answer(data: bytes) -> None:
    """An engine's, to a request of the method that its first byte says, in pieces."""
    method = (b"GET", b"HEAD", b"POST")[data[0] % 3] if data else b"GET"
    parser = AnswerParser()
    parser.expect(method, upgrades=bool(data) and data[0] > 127)
    for at in range(1, len(data), 50):
        parser.feed(data[at : at + 50])
        if parser.head is not None:
            for name, value in parser.head.fields:
                assert not {*name, *value} & {10, 13, 0}, "a line end would end the client's head"
        assert sum(map(len, parser.pieces)) <= len(data)
    parser.feed_end()
    assert len(data) <= BOUND or parser.done
    _as_error(500, b"".join(parser.pieces))


# --- KEDA, Kubernetes


def _trigger(data: bytes) -> None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(found, dict):
        trigger = parse_trigger({str(key): str(value) for key, value in found.items()})
        assert trigger.target_pending > 0


def _webhook() -> Webhook:
    found = {
        "metadata": {"namespace": "tenant", "name": "chat", "uid": "u"},
        "spec": {"template": {"spec": {"containers": [_ENGINE]}}, "model": "smol", "port": 8001},
        "status": {"phase": "Ready", "digest": "ab" * 32, "conditions": [{"type": "Ready", "status": "True"}]},
    }
    found["status"]["templateHash"] = msgspec.convert(found, ModelSnapshot).template_hash  # type: ignore[index]
    informer: Informer[ModelSnapshot] = Informer(None, None, ModelSnapshot, "", {})  # type: ignore[arg-type]
    informer._objects["tenant", "chat"] = msgspec.convert(found, ModelSnapshot)
    informer.synced.set()
    return Webhook(informer, (Node("a"),), NodeSetup())


_ENGINE = {"name": "engine", "image": "engine:1", "command": ["serve"], "args": ["$(PORT)"], "env": [{"name": "PORT", "value": "80"}]}
_WEBHOOK = _webhook()


def _review(data: bytes) -> None:
    answer = json.loads(_WEBHOOK.review(data))
    assert answer["response"]["allowed"] is True, "no pod is ever refused"


# --- sources, files


def _told(data: bytes) -> None:
    try:
        told = _Told.model_validate_json(data)
    except ValidationError as error:
        Pushes(_Nobody(), None)._complain(data, str(error), lambda model: True)  # type: ignore[arg-type]
        return
    assert 0 <= told.pending <= 1e9


class _Nobody:
    """Hears of what was told."""

    def misled(self, model: str, declared: object, why: str) -> None:
        assert model is not None


def _metrics(data: bytes) -> None:
    assert _requests(200, data) >= 0


def _prometheus(data: bytes) -> None:
    assert PrometheusQuery("http://localhost", "up", None)._number(200, data) >= 0


def _config(data: bytes) -> None:
    path = Path(f"/dev/shm/fuzz-{os.getpid()}.yaml")
    path.write_bytes(data)
    try:
        load(path)
    finally:
        path.unlink()


def _address(data: bytes) -> None:
    where = Address.to_listen(data.decode("utf-8", "replace"))
    assert 0 <= where.port < 65536
    assert Address.to_listen(str(where)) == where


def parsers() -> Iterator[Parser]:
    heads = (
        b"POST /models/chat/v1/chat/completions?a=b HTTP/1.1\r\nHost: a\r\nX-Zerowake-Priority: high\r\nX-Zerowake-Heartbeat: 5\r\n"
        b"X-Zerowake-Tenant: t\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\ntracestate: a=b\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nX-Zerowake-Model: chat\r\n\r\n"
        b"4\r\nwell\r\n0\r\nX: y\r\n\r\nGET / HTTP/1.0\r\n\r\n",
        b"GET http://a/b?model=chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nExpect: 100-continue\r\n\r\n",
    )
    yield Parser("gateway-heads", heads, lambda data: _LOOP.run_until_complete(_talk(data)), ())
    bodies = (
        b'{"model": "chat", "stream": true, "messages": [{"role": "user", "content": "a \\u00e9 \\ud83d\\ude00"}], "n": 1.5e3}',
        b'\xef\xbb\xbf{"model": NaN, "a": [[[]], {}]}',
        '{"model": "chat"}'.encode("utf-16"),
    )
    yield Parser("gateway-bodies", bodies, _body, ())
    form = (
        b'multipart/form-data; boundary="x"\n--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n'
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n--x--\r\n'
    )
    yield Parser("gateway-forms", (form,), _form, (BadForm,))
    yield Parser("gateway-codings", tuple(_packed()), _unpack, (Refusal,))
    answers = (
        b'\0HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{"error": "none"}',
        b"\2HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: a\r\n\r\n4\r\nwell\r\n0\r\na: b\r\n\r\n",
        b"\xffHTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade, x\r\nX: y\r\n\r\nraw",
        b"\1HTTP/1.1 200 OK\r\nContent-Length: 99\r\nConnection: keep-alive\r\n\r\n",
    )
    yield Parser("engine-answers", answers, _answer, (BadAnswer,))
    yield Parser(
        "keda-metadata",
        (b'{"model": "chat", "targetPending": "8", "maxStageSecondsFromEnv": "3", "scalerAddress": "a:1"}',),
        _trigger,
        (BadTrigger,),
    )
    pod = {"metadata": {"labels": {"zerowake.dev/snapshot": "chat"}}, "spec": {"containers": [_ENGINE]}}
    review = {"request": {"uid": "u", "namespace": "tenant", "operation": "CREATE", "object": pod}}
    yield Parser("admission", (json.dumps(review).encode(),), _review, (msgspec.MsgspecError,))
    yield Parser("pushed-demand", (b'{"model": "chat", "pending": 7, "by": "x", "ttl_seconds": 60}',), _told, ())
    page = (
        b'# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{model_name="a"} 3\nvllm:num_requests_running{tp_rank="0"} 1.0\n'
    )
    yield Parser("engine-metrics", (page,), _metrics, (SourceError,))
    answer = b'{"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "value": [1.5, "3"]}]}}'
    yield Parser(
        "prometheus", (answer, b'{"status": "success", "data": {"resultType": "scalar", "result": [1, "2"]}}'), _prometheus, (SourceError,)
    )
    demo = Path("deploy/demo/demo.yaml").read_bytes()
    small = b"models:\n  chat: &a {snapshot: chat, command: [a, b], port: 80}\n"
    small += b"  b: {<<: *a, env: {A: 'b'}, sources: [{type: engine}]}\nlisten: 127.0.0.1:8080\n"
    yield Parser("config", (demo, small), _config, (BadConfig,))
    yield Parser("addresses", (b"127.0.0.1:80", b"[::1]:8080", b":9"), _address, (ValueError,))


def _packed() -> Iterator[bytes]:
    import gzip  # noqa: PLC0415
    import zlib  # noqa: PLC0415

    text = b'{"model": "chat"}' * 20
    yield b"gzip\n" + gzip.compress(text)
    yield b"deflate\n" + zlib.compress(text)
    yield b"gzip\n" + gzip.compress(bytes(1 << 24))
    for name, module in (("br", "brotli"), ("zstd", "backports.zstd")):
        if found := coding._installed(module):
            yield name.encode() + b"\n" + found.compress(text)
