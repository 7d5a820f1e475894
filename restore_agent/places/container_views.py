"""What the agent holds open of a container's file system, and programs of the node's that it runs in the container.

Both go through the container's namespaces (join.c). Its files are reached through copies of its mounts, on which no symbolic link is
followed: a tenant's link leads nowhere. They keep its file system busy for as long as they are open.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from restore_agent.places import joining
from restore_agent.places.container_error import ContainerError
from restore_agent.places.place import CONTROL_DIRECTORY
from restore_agent.places.placeholder import Placeholder


class ContainerViews:
    """Of one container. `open` it before anything is looked at."""

    root: Path
    control_directory: Path

    def __init__(self, placeholder: Placeholder) -> None:
        self._placeholder = placeholder
        self._open: list[int] = []

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    async def open(self) -> None:
        """Its root and its control directory, anew where they are open. Raises ContainerError."""
        self.close()
        self.root = await self._view("/", "all")
        await self.open_control_directory()

    async def open_control_directory(self) -> None:
        """Raises ContainerError."""
        self.control_directory = await self._view(str(CONTROL_DIRECTORY), "one")

    def close(self, but: int = 0) -> None:
        """All `but` so many of the newest."""
        while len(self._open) > but:
            os.close(self._open.pop(0))

    async def _view(self, path: str, how: str) -> Path:
        said, fds = await self.join("view", [path, how], [], {})
        if not fds:
            raise ContainerError(f"cannot open {path} of the container: {said or 'it has ended'}")
        self._open += fds
        return Path(f"/proc/self/fd/{fds[0]}")

    async def join(self, what: str, words: Sequence[str], fds: Sequence[int], env: Mapping[str, str]) -> tuple[str, list[int]]:
        """See joining.join. Raises ContainerError."""
        if self._placeholder.pidfd < 0:
            raise ContainerError("the container has ended")
        try:
            return await joining.join(self._placeholder.pidfd, what, words, fds, env)
        except joining.JoinFailed as error:
            raise ContainerError(str(error)) from None
