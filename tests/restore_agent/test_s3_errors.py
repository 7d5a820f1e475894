"""What servers say, as obstore hands it on, and the word that it becomes."""

from __future__ import annotations

import pytest

from restore_agent.transfer.s3_errors import word_for
from restore_agent.transfer.source import Absent, Denied, Full, TransferError, Unreachable


def _said(status: int, code: str) -> Exception:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>words</Message></Error>' if code else ""
    return Exception(f"Error performing GET https://s3.example/b/k in 1ms - Server returned non-2xx status code: {status} Words: {body}")


@pytest.mark.parametrize(
    ("status", "code", "word", "advice"),
    [
        (404, "NoSuchKey", Absent, "s3://b has no k"),
        (404, "", Unreachable, "status 404"),
        (404, "XAdminUserNotFound", Denied, "no such access key"),
        (404, "NoSuchBucket", Unreachable, "make it, or mend the URL"),
        (400, "ExpiredToken", Denied, "expired: renew"),
        (403, "RequestTimeTooSkewed", Denied, "clock"),
        (403, "AccessDenied", Denied, "no right to this"),
        (403, "", Denied, "status 403.*check the credentials"),
        (403, "QuotaExceeded", Full, "QuotaExceeded.*raise its quota"),
        (301, "PermanentRedirect", Denied, "another region"),
        (400, "AuthorizationHeaderMalformed", Denied, "set AWS_REGION"),
        (507, "", Full, "make room"),
        (507, "XMinioStorageFull", Full, "make room"),
        (503, "SlowDown", Unreachable, "SlowDown"),
        (500, "InternalError", Unreachable, "InternalError"),
    ],
)
def test_codes_decide_before_statuses(status: int, code: str, word: type[TransferError], advice: str) -> None:
    with pytest.raises(word, match=advice):
        raise word_for(_said(status, code), "k", "s3://b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'Generic S3 error: HTTP error\n\nDebug source: ConnectError("dns error", error: "Name or service not known")',
            "Name or service not known",
        ),
        ("Generic S3 error: HTTP error: error sending request\n\nDebug source: x", "HTTP error: error sending request; check the endpoint"),
    ],
)
def test_without_an_answer_the_innermost_words_are_told(text: str, said: str) -> None:
    with pytest.raises(Unreachable, match=said):
        raise word_for(Exception(text), "k", "s3://b")


def test_where_no_credentials_are_found_it_is_said_where_to_put_them() -> None:
    with pytest.raises(Denied, match="no credentials were found: set AWS_ACCESS_KEY_ID"):
        raise word_for(Exception("Error performing PUT http://169.254.169.254/latest/api/token in 1s - status code: 403"), "k", "s3://b")


def test_what_is_wrong_with_a_file_of_credentials_is_said_in_our_words() -> None:
    text = "The operation lacked valid authentication for path External AWS credential provider: Denied: /c has no key\n\nDebug source"
    with pytest.raises(Denied, match=r"s3://b: /c has no key$"):
        raise word_for(Exception(text), "k", "s3://b")
