"""What commands ask of a scaler that runs: on one machine by its state folder, on Kubernetes in its pod."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaler.view.state import SCALER_SOCKET, socket_of
from zerowake_shared.one_line import described

_DEFAULT_STATE = Path("/var/lib/zerowake")
_ANSWER_SECONDS = 10.0
State = Annotated[
    Path | None,
    typer.Option(
        help="State folder of `zerowake up`. Unless given: /var/lib/zerowake, or the scaler of this pod.",
        envvar="ZEROWAKE_STATE",
        resolve_path=True,
    ),
]


async def ask(state: Path | None, what: str, hint: str = "") -> bytes:
    """What the scaler answers to GET /`what`, as JSON. state: its folder; None: the usual one, or else the scaler of this pod.

    Raises: typer.Exit: none answers, which was said, with the hint.
    """
    import aiohttp  # noqa: PLC0415  # not above: each agent is a `zerowake`, too, and asks nobody

    if state is None and not socket_of(_DEFAULT_STATE).exists():
        try:
            return await _fetch(SCALER_SOCKET, what)
        except (aiohttp.ClientError, OSError, ValueError):
            pass  # there is none; what is said is of the usual folder
    path = socket_of(state or _DEFAULT_STATE)
    try:
        return await _fetch(str(path), what)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = described(getattr(error, "os_error", error))
        said = f"zerowake: nothing answers on {path} ({why}); is `zerowake up` running with this --state?{hint}"
        typer.secho(said, err=True, fg="red")
        raise typer.Exit(1) from None


async def _fetch(path: str, what: str) -> bytes:
    import aiohttp  # noqa: PLC0415

    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(path), timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS)) as session,
        session.get(f"http://zerowake/{what}") as response,
    ):
        if response.content_type != "application/json":
            raise ValueError(f"it does not know /{what}: it is of another version; restart it")
        return await response.read()
