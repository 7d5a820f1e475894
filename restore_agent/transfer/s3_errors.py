"""What a bucket's server said, in the words of source.py, with what to do about it.

obstore tells statuses and the server's XML in its errors' texts alone, so they are read out of those. The code in the XML decides where
there is one, for servers choose statuses freely: one answers an unknown access key by 404. So nothing is absent unless the server says that
very thing. Codes are of Amazon's list of error responses; those that begin with X are of MinIO and the Versity gateway.
"""

from __future__ import annotations

import re

from restore_agent.transfer.source import Absent, Denied, Full, TransferError, Unreachable

_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_DETAIL = re.compile(r'(?:error|message): "([^"]{1,200})"')  # the innermost words of a connection's error
_ABSENT = {"NoSuchKey"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientCapacity", "InsufficientStorage"}
_DENIED = {
    "RequestTimeTooSkewed": "this machine's clock differs too much from the server's: set it (timedatectl)",
    "ExpiredToken": "the credentials have expired: renew them",
    "TokenRefreshRequired": "the credentials have expired: renew them",
    "InvalidToken": "the session token is not one of the server's: renew the credentials, or remove AWS_SESSION_TOKEN",
    "InvalidAccessKeyId": "the server knows no such access key: set AWS_ACCESS_KEY_ID",
    "XAdminUserNotFound": "the server knows no such access key: set AWS_ACCESS_KEY_ID",
    "XMinioAdminNoSuchUser": "the server knows no such access key: set AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is not that of the access key: set AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the credentials have no right to this, or nothing of the name is there and they may not list: see the bucket's policy",
    "AllAccessDisabled": "the bucket was disabled by its owner",
    "AccountProblem": "the account cannot be used: ask its owner",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_REGION",
    "PermanentRedirect": "the bucket is in another region, or at another endpoint: set AWS_REGION, AWS_ENDPOINT_URL",
}
_LOOKS_FOR_CREDENTIALS = ("http://169.254.", "AWS credential provider", "sts.amazonaws.com", "security-credentials")
_NO_CREDENTIALS = (
    "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where the agent runs, write ~/.aws/credentials there, or "
    "give the machine a role"
)


def code_of(text: str) -> str:
    """The server's own word; empty: it said none."""
    found = _CODE.search(text)
    return found[1] if found else ""


def status_of(text: str) -> int:
    """Of HTTP; 0: there was no answer."""
    found = _STATUS.search(text)
    return int(found[1]) if found else 0


def word_for(error: Exception, what: str, store: str) -> TransferError:
    """`what` was asked of `store`. A 404 without a code (the answer to HEAD has none) says nothing: ask again by GET."""
    text = str(error)
    status = status_of(text)
    if any(place in text for place in _LOOKS_FOR_CREDENTIALS):
        return Denied(f"{store}: {_own_words(text) or _NO_CREDENTIALS}")
    if not status:
        detail = _DETAIL.findall(text)
        return Unreachable(f"{store} cannot be reached: {detail[-1] if detail else _first_line(text)}; check the endpoint and the network")
    return _answered(code_of(text), status, what, store)


def _answered(code: str, status: int, what: str, store: str) -> TransferError:
    said = code or f"status {status}"
    if code in _ABSENT:
        return Absent(f"{store} has no {what}")
    if code in _FULL or status == 507:
        return Full(f"{store} is full ({said}): make room there, raise its quota, or use another store")
    if code in _DENIED or status in (401, 403):
        return Denied(f"{store} does not let us ({said}): {_DENIED.get(code, 'check the credentials and what the bucket allows them')}")
    if code == "NoSuchBucket":
        return Unreachable(f"{store}: there is no such bucket; make it, or mend the URL")
    return Unreachable(f"{store} failed with {what}: {said}; see the server's log")


def _own_words(text: str) -> str:
    """What our own provider of credentials raised."""
    found = re.search(r"AWS credential provider: (?:\w+: )?(.+)", text)
    return found[1].strip() if found else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0].removeprefix("Generic S3 error: ")[:300]
