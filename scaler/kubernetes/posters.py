"""Who may post demand on Kubernetes: the ServiceAccounts of a model's own namespace.

A poster shows a token of its ServiceAccount that the kubelet has put into its pod for us alone (a projected volume with the audience
`zerowake`), and the API server says whose it is. So no secret has to be made, shared or changed, and what is stolen on its way is of no use
anywhere else. What the API server said of a token counts for a minute: a token that was taken back is believed for that long.
Rejected: one token for all, by which any tenant could keep up any other's models.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable

import msgspec

from scaler.kubernetes.resources import TOKEN_REVIEWS, TokenReview
from scaler.sources.push import Denied
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError

log = logging.getLogger(__name__)

AUDIENCE = "zerowake"
_BELIEVED_SECONDS = 60.0
_MOST_BELIEVED = 10_000
_AT_ONCE = 4  # reviews, whoever posts however much
_USER = "system:serviceaccount:"


class Posters:
    """A guard of what is posted. owner: whose namespace a model is."""

    def __init__(self, cluster: Cluster, owner: Callable[[str], str], clock: Clock = SYSTEM_CLOCK) -> None:
        self._cluster = cluster
        self._owner = owner
        self._now = clock.now
        self._believed: dict[bytes, tuple[str, float]] = {}  # by a token's hash: its namespace, and until when
        self._reviews = asyncio.Semaphore(_AT_ONCE)

    async def permitted(self, authorization: str) -> Callable[[str], bool]:
        scheme, _, token = authorization.partition(" ")
        if scheme != "Bearer" or token.count(".") != 2:
            raise Denied(401, f"the header Authorization has to be: Bearer TOKEN, of a ServiceAccount and for the audience {AUDIENCE}")
        key = hashlib.blake2b(token.encode("utf-8", "surrogateescape")).digest()
        namespace, until = self._believed.get(key, ("", 0.0))
        if until <= self._now():
            namespace = await self._namespace(token)
            if len(self._believed) >= _MOST_BELIEVED:
                self._believed.clear()
            self._believed[key] = namespace, self._now() + _BELIEVED_SECONDS
        return lambda model: bool(namespace) and self._owner(model) == namespace

    async def _namespace(self, token: str) -> str:
        """Of the ServiceAccount. Raises: Denied."""
        async with self._reviews:
            try:
                said = await self._cluster.create(TOKEN_REVIEWS, "", {"spec": {"token": token, "audiences": [AUDIENCE]}})
                status = msgspec.json.decode(said, type=TokenReview).status
            except (ClusterError, msgspec.MsgspecError, UnicodeError) as error:
                log.warning("nobody can tell of demand: the API server does not say whose a token is: %s", error)
                raise Denied(503, "the API server does not say whose the token is; the scaler's log says why") from None
        if not status.authenticated or AUDIENCE not in status.audiences or not status.user.username.startswith(_USER):
            why = status.error or f"it is no token of a ServiceAccount for the audience {AUDIENCE}"
            raise Denied(401, f"the token was not taken: {why}")
        return status.user.username.removeprefix(_USER).partition(":")[0]
