"""CRIU's memory images, read and rewritten: which pages are ours to carry, and a skeleton without them.

An image file is two magic words, then messages, each led by its length (little endian, 32 bits). `pages-N.img` has no frame: it is the
present pages of one process, in the order of its pagemap.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from zerowake_proto import criu_pb2

from restore_agent.errors import AgentError
from restore_agent.pages.native import zero_pages
from restore_agent.snapshots.page_runs import PAGE, Pages

_COMMON, _PAGEMAP, _MM, _CORE = 0x54564319, 0x56084025, 0x57492820, 0x55053847
_PSTREE, _SECCOMP = 0x50273030, 0x64413049
OPEN_FILES, FILES = "files.img", 0x56303138  # the image of all open files, and its second magic word
_TSYNC = 1  # flag of a seccomp filter: at a restore the kernel puts it on every thread of the process
_ABSOLUTE = 1  # how a timer was set: TFD_TIMER_ABSTIME, and nothing else
_CAP_SETGID, _CAP_SETUID = 6, 7
_PRESENT = 4  # flag of a pagemap entry
_PROT_WRITE = 2
# Kinds of mapping (`status` of a Vma).
_REGULAR, _FILE_PRIVATE, _ANONYMOUS = 1 << 0, 1 << 6, 1 << 9
_SPECIAL = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16 | 1 << 17  # vsyscall, vdso, vvar, aio ring, shadow stack, guard, uprobes
# Zeros shorter than 16 pages stay in: a gap costs the fill a piece of its own, and they are few (75 of the chat engine's 57,000 pages).
_ZERO_RUNS = re.compile(rb"\A\x01+|\x01{16,}|\x01+\Z")


_M = TypeVar("_M", bound=Message)


class ImageError(AgentError):
    """An image file is not what CRIU writes."""

    reason = "corrupt"


@dataclass(frozen=True)
class _Part:
    """Pages that follow each other in pages-N.img and are all ours, or all CRIU's."""

    address: int
    pages: int
    offset: int  # in pages-N.img, bytes
    ours: bool
    zeros_matter: bool  # a private file mapping: what is left out would show the file


def split(images: Path) -> Iterator[Pages]:
    """Takes the pages of private writable mappings out of the images, yielding them; CRIU is left with the rest, rewritten in place.

    Each run must be used before the next is asked for. Runs of zeros in anonymous memory are left out: absent pages read as zeros.

    Raises:
        ImageError: a file is torn or has another format.
        OSError: no space for the rewritten files.
    """
    for pagemap in sorted(images.glob("pagemap-[0-9]*.img")):
        pid = _number(pagemap)
        mm = images / f"mm-{pid}.img"
        if not mm.exists():
            continue
        vmas = [vma for vma in _only(criu_pb2.Mm, mm, _MM).vmas if _ours(vma)]
        head, pages, entries = _pagemap(pagemap)
        yield from _split_process(pid, vmas, pagemap, head, entries, pages)


@dataclass(frozen=True)
class Skeleton:
    """What CRIU is left with of one process, after `split`."""

    pid: int
    anonymous: list[tuple[int, int]]  # begin and end of mappings whose pages are ours, where an absent page is zeros
    kept: list[Pages]  # pages that CRIU restores


def skeletons(images: Path) -> Iterator[Skeleton]:
    """Every process of images that were split. Raises ImageError."""
    for pagemap in sorted(images.glob("pagemap-[0-9]*.img")):
        pid = _number(pagemap)
        vmas = list(_only(criu_pb2.Mm, images / f"mm-{pid}.img", _MM).vmas)
        special = [(vma.start, vma.end) for vma in vmas if vma.status & _SPECIAL]  # the kernel's own, made anew
        _, pages, entries = _pagemap(pagemap)
        data = memoryview(_content(pages))
        kept, offset = [], 0
        for entry in entries:
            if entry.flags & _PRESENT:
                length = (entry.nr_pages or entry.compat_nr_pages) * PAGE
                if offset + length > len(data):
                    raise ImageError(f"{pages.name} ends before the pages that {pagemap.name} names; take the dump again")
                if not any(start <= entry.vaddr < end for start, end in special):
                    kept.append(Pages(pid, entry.vaddr, data[offset : offset + length]))
                offset += length
        yield Skeleton(pid, [(vma.start, vma.end) for vma in vmas if _ours(vma) and vma.status & _ANONYMOUS], kept)


def _ours(vma: criu_pb2.Vma) -> bool:
    return bool(
        vma.status & _REGULAR and vma.status & (_FILE_PRIVATE | _ANONYMOUS) and not vma.status & _SPECIAL and vma.prot & _PROT_WRITE
    )


def _split_process(
    pid: int, vmas: list[criu_pb2.Vma], pagemap: Path, head: bytes, entries: list[criu_pb2.PagemapEntry], pages: Path
) -> Iterator[Pages]:
    if not pages.exists() or not pages.stat().st_size:
        return
    kept_pages, kept_pagemap = pages.with_suffix(".kept"), pagemap.with_suffix(".kept")
    kept: list[criu_pb2.PagemapEntry] = []
    with pages.open("rb") as source, kept_pages.open("wb") as rest:
        # Not closed by hand: the runs' views keep it, and go with it. Never written, but C takes only writable memory's address.
        data = memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY))
        offset = 0
        for entry in entries:
            count = entry.nr_pages or entry.compat_nr_pages
            if not entry.flags & _PRESENT:
                kept.append(entry)
                continue
            if offset + count * PAGE > len(data):
                raise ImageError(f"{pages.name} ends before the pages that {pagemap.name} names; the dump is torn, take it again")
            for part in _parts(entry.vaddr, count, offset, vmas):
                piece = data[part.offset : part.offset + part.pages * PAGE]
                if part.ours:
                    yield from _runs(pid, part, piece)
                else:
                    kept.append(_entry(entry, part))
                    rest.write(piece)
            offset += count * PAGE
    write_image(kept_pagemap, _PAGEMAP, [head, *(entry.SerializeToString() for entry in kept)])
    kept_pages.replace(pages)
    kept_pagemap.replace(pagemap)


def _parts(address: int, pages: int, offset: int, vmas: list[criu_pb2.Vma]) -> Iterator[_Part]:
    """Cuts a run at the borders of the mappings that are ours."""
    end = address + pages * PAGE
    at = address
    for vma in vmas:
        start, stop = max(at, vma.start), min(end, vma.end)
        if start >= stop:
            continue
        if at < start:
            yield _Part(at, (start - at) // PAGE, offset + at - address, False, True)
        yield _Part(start, (stop - start) // PAGE, offset + start - address, True, not vma.status & _ANONYMOUS)
        at = stop
    if at < end:
        yield _Part(at, (end - at) // PAGE, offset + at - address, False, True)


def _runs(pid: int, part: _Part, data: memoryview) -> Iterator[Pages]:
    """A part without its long runs of zeros."""
    if part.zeros_matter:
        yield Pages(pid, part.address, data)
        return
    start = 0
    for zeros in _ZERO_RUNS.finditer(zero_pages(data)):
        if stop := zeros.start() * PAGE - start:
            yield Pages(pid, part.address + start, data[start : start + stop])
        start = zeros.end() * PAGE
    if start < len(data):
        yield Pages(pid, part.address + start, data[start:])


def _entry(entry: criu_pb2.PagemapEntry, part: _Part) -> criu_pb2.PagemapEntry:
    kept = criu_pb2.PagemapEntry()
    kept.CopyFrom(entry)
    kept.vaddr, kept.compat_nr_pages = part.address, part.pages
    if entry.HasField("nr_pages"):
        kept.nr_pages = part.pages
    return kept


def open_files(images: Path) -> list[criu_pb2.File]:
    """Every open file that the processes have. Raises ImageError."""
    return _all(criu_pb2.File, images / OPEN_FILES, FILES)


def write_open_files(images: Path, files: Iterable[criu_pb2.File]) -> None:
    """As `open_files` reads them. Raises OSError."""
    write_image(images / OPEN_FILES, FILES, [file.SerializeToString() for file in files])


def opened(images: Path) -> frozenset[str] | None:
    """Paths, without the leading slash, of all that CRIU opens by name; None: it watches others, too. Raises ImageError."""
    files = open_files(images)
    if any(file.HasField("ify") or file.HasField("ffy") for file in files):
        return None
    return frozenset(os.fsdecode(file.reg.name).lstrip("/") for file in files if file.HasField("reg"))


def mend_timers(images: Path) -> None:
    """Rewrites the timers (timerfd) that would not go on as they were.

    A periodic one that has expired, and that nobody has read since, stands still in the kernel until it is read: CRIU takes it for one that
    does not run, and it never expires again. It gets its period from the restore on. To one that was set to a moment CRIU adds the whole
    seconds of its clock alone, and starts it even where it did not run: what it has left is enough, and right.

    Raises:
        ImageError: the file is torn or has another format.
    """
    files = open_files(images)
    for timer in (file.tfd for file in files if file.HasField("tfd")):
        if timer.settime_flags == _ABSOLUTE:
            timer.settime_flags = 0
        if timer.ticks and not timer.vsec and not timer.vnsec:
            timer.vsec, timer.vnsec = timer.isec, timer.insec
    if any(file.HasField("tfd") for file in files):
        write_open_files(images, files)


@dataclass(frozen=True)
class Rights:
    """What processes may do, all of them taken together."""

    users: frozenset[int]
    groups: frozenset[int]
    capabilities: int  # that one has, or could get
    confined: bool  # none can gain rights by a program (no_new_privs)
    filtered: bool  # each has a seccomp filter

    def beyond(self, allowed: Rights) -> list[str]:
        """What of it the other does not have, in words."""
        found = []
        if more := self.capabilities & ~allowed.capabilities:
            found.append("capabilities " + ", ".join(str(number) for number in range(64) if more >> number & 1))
        if not allowed.capabilities >> _CAP_SETUID & 1 and (users := self.users - allowed.users):
            found.append("users " + ", ".join(map(str, sorted(users))))
        if not allowed.capabilities >> _CAP_SETGID & 1 and (groups := self.groups - allowed.groups):
            found.append("groups " + ", ".join(map(str, sorted(groups))))
        if allowed.confined and not self.confined:
            found.append("gaining rights (no no_new_privs)")
        if allowed.filtered and not self.filtered:
            found.append("every system call (no seccomp filter)")
        return found


def kernel_written(images: Path) -> list[range]:
    """Addresses that the kernel writes by itself, as soon as a thread is on a processor again. Raises ImageError."""
    areas = [thread.rseq_entry for thread in _threads(images).values() if thread.HasField("rseq_entry")]
    return [range(area.rseq_abi_pointer, area.rseq_abi_pointer + area.rseq_abi_size) for area in areas]


def process_ids(images: Path) -> set[int]:
    """Pids, as the processes know them, of all that were dumped. Raises ImageError."""
    return {process.pid for process in _processes(images)}


def rights(images: Path) -> Rights:
    """Of what would be restored. Raises ImageError."""
    threads = _threads(images)
    users: set[int] = set()
    groups: set[int] = set()
    capabilities = 0
    for each in (thread.creds for thread in threads.values()):
        users |= {each.uid, each.euid, each.suid, each.fsuid}
        groups |= {each.gid, each.egid, each.sgid, each.fsgid, *each.groups}
        for words in (each.cap_inh, each.cap_prm, each.cap_eff, each.cap_bnd, each.cap_amb):
            capabilities |= sum(word << 32 * i for i, word in enumerate(words))
    confined = all(thread.creds.no_new_privs for thread in threads.values())
    return Rights(frozenset(users), frozenset(groups), capabilities, confined, threads.keys() <= _filtered(images, threads))


def _filtered(images: Path, threads: dict[int, criu_pb2.Thread]) -> set[int]:
    """Those that will be under a seccomp filter. Where all threads of a process are under the same ones, CRIU writes them into the first
    thread alone, flagged to be given to all."""
    found = {number for number, thread in threads.items() if thread.seccomp_mode}
    filters = images / "seccomp.img"
    if not found or not filters.exists():
        return found
    every = _only(criu_pb2.SeccompFilters, filters, _SECCOMP).filters
    for process in _processes(images):
        first = threads.get(process.pid)
        if first and first.HasField("seccomp_filter") and first.seccomp_filter < len(every) and every[first.seccomp_filter].flags & _TSYNC:
            found.update(process.threads)
    return found


def _processes(images: Path) -> list[criu_pb2.Process]:
    return _all(criu_pb2.Process, images / "pstree.img", _PSTREE)


def _threads(images: Path) -> dict[int, criu_pb2.Thread]:
    """By their numbers; a process that had ended, and was not waited for, has none."""
    threads = {_number(path): _only(criu_pb2.Core, path, _CORE).thread for path in images.glob("core-[0-9]*.img")}
    return {number: thread for number, thread in threads.items() if thread.HasField("creds")}


def _number(path: Path) -> int:
    """Whose image it is, by the file's name."""
    number = path.stem.rpartition("-")[2]
    if not (number.isascii() and number.isdigit() and len(number) < 11):
        raise ImageError(f"{path.name} is the image of no process; take the dump again")
    return int(number)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path.name} is missing; take the dump again") from None


def _all(kind: type[_M], path: Path, magic: int) -> list[_M]:
    return [_message(kind, path, data) for data in read_image(path, magic)]


def _only(kind: type[_M], path: Path, magic: int) -> _M:
    """The first message of a file that has one of this kind."""
    found = read_image(path, magic)
    if not found:
        raise ImageError(f"{path.name} is empty; take the dump again")
    return _message(kind, path, found[0])


def _message(kind: type[_M], path: Path, data: bytes) -> _M:
    try:
        found = kind.FromString(data)
    except DecodeError as error:
        raise ImageError(f"{path.name} cannot be read ({error}); take the dump again") from None
    if not found.IsInitialized():  # which reading does not say of messages within a message
        raise ImageError(f"{path.name} lacks what every image of its kind has; take the dump again")
    return found


def _pagemap(path: Path) -> tuple[bytes, Path, list[criu_pb2.PagemapEntry]]:
    """Its head as it is, the file with the pages, and its entries."""
    found = read_image(path, _PAGEMAP)
    if not found:
        raise ImageError(f"{path.name} is empty; take the dump again")
    pages = path.with_name(f"pages-{_message(criu_pb2.PagemapHead, path, found[0]).pages_id}.img")
    return found[0], pages, [_message(criu_pb2.PagemapEntry, path, data) for data in found[1:]]


def read_image(path: Path, magic: int) -> list[bytes]:
    """The messages of an image file; `magic`: its second word. Raises ImageError."""
    data = _content(path)
    if len(data) < 8 or struct.unpack_from("<II", data) != (_COMMON, magic):
        raise ImageError(f"{path.name} does not begin as an image of its kind; is this CRIU newer than zerowake knows?")
    messages, at = [], 8
    while at < len(data):
        if at + 4 > len(data) or at + 4 + (size := int.from_bytes(data[at : at + 4], "little")) > len(data):
            raise ImageError(f"{path.name} is torn at byte {at}; take the dump again")
        messages.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return messages


def write_image(path: Path, magic: int, messages: list[bytes]) -> None:
    """As `read_image` reads it. Raises OSError."""
    with path.open("wb") as file:
        file.write(struct.pack("<II", _COMMON, magic))
        for message in messages:
            file.write(len(message).to_bytes(4, "little") + message)
        file.flush()
        os.fsync(file.fileno())
