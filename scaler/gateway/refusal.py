"""What the gateway says when it cannot pass a request on: an HTTP status and an error in the shape of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping

from aiohttp import web

from scaler.gateway.cors import READABLE

RETRY_SECONDS = 5


class Refusal(Exception):
    """A request ends here. `reason` is a short fixed word for metrics and for the error's `code`; `message` is for a person.

    param: the member or header that is to blame; retry: the same request may go better later; headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        param: str | None = None,
        retry: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self._headers = headers or {}
        self.status = status
        self.reason = reason
        self.param = param
        self.retry = retry

    @property
    def headers(self) -> dict[str, str]:
        retry = {"Retry-After": str(RETRY_SECONDS)} if self.retry else {}
        return {**READABLE, **retry, **self._headers}

    @property
    def response(self) -> web.Response:
        """The answer to a client that has got none of it yet."""
        return self.after({})

    def after(self, wait: Mapping[str, str]) -> web.Response:
        """The same to one that has waited. wait: the headers that say so."""
        return web.Response(status=self.status, body=self.body, content_type="application/json", headers={**self.headers, **wait})

    @property
    def body(self) -> bytes:
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.reason}
        return json.dumps({"error": error}).encode()
