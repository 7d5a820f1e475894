"""What goes into a bug report. Each room brings its parts, as it brings its commands and checks: entry point group `zerowake.parts`.

A part that hangs or fails leaves a line of why, and takes nothing of the others away.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import os
import tarfile
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zerowake_shared.checkup import Subject, beside
from zerowake_shared.one_line import described
from zerowake_shared.secrets_left_out import Scrubber

GROUP = "zerowake.parts"
MOST = 4 << 20  # bytes of a text that is taken: of a longer one its end
_SECONDS = 30.0

Content = object  # a text, or a value as of JSON
Parts = Mapping[str, Content]


@dataclass(frozen=True, slots=True)
class Part:
    """`gather` may block, or be a coroutine function: files by their names, a text each or a value that becomes JSON."""

    name: str
    gather: Callable[[Subject], Parts | Awaitable[Parts]]
    seconds: float = _SECONDS
    of_cluster: bool = False


async def gathered(parts: Iterable[Part], subject: Subject) -> tuple[dict[str, Content], list[str]]:
    """All files, and a line for each part that could not be had."""
    each = list(parts)
    found: dict[str, Content] = {}
    missing = []
    for part, got in zip(each, await asyncio.gather(*(_gathered(part, subject) for part in each)), strict=True):
        if isinstance(got, str):
            missing.append(f"{part.name}: {got}")
        else:
            found |= got
    return found, missing


async def _gathered(part: Part, subject: Subject) -> Parts | str:
    try:
        async with asyncio.timeout(part.seconds):
            if inspect.iscoroutinefunction(part.gather):
                got: Parts = await part.gather(subject)
                return got
            return await beside(lambda: part.gather(subject), f"part {part.name}")  # type: ignore[arg-type, return-value]
    except TimeoutError:
        return f"no answer within {part.seconds:.0f} s"
    except Exception as error:  # whatever it is: the rest of the report is worth having
        return described(error)


def write(path: Path, found: Mapping[str, Content], scrubber: Scrubber) -> list[tuple[str, int]]:
    """Writes the files as one .tar.gz that is its owner's alone, without what is secret in them; returns their names and sizes in bytes.

    Raises OSError: it cannot be written, or is there already.
    """
    for content in found.values():
        scrubber.value(content)  # only after this is all that is secret known, and it may stand in any of them
    texts = {name: _shown(content, scrubber) for name, content in sorted(found.items())}
    written = []
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "wb") as out, tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in texts.items():
            data = text.encode(errors="replace")
            about = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            about.size, about.mode = len(data), 0o600
            archive.addfile(about, io.BytesIO(data))
            written.append((name, len(data)))
    return written


def _shown(content: Content, scrubber: Scrubber) -> str:
    if isinstance(content, str):
        return scrubber.text(content)
    return scrubber.known_out(json.dumps(scrubber.value(content), indent=2, default=str, ensure_ascii=False)) + "\n"


def end_of(file: Path, most: int = MOST) -> str:
    """The end of a text on disk. Raises OSError."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - most))
        return opened.read(most).decode(errors="replace")
