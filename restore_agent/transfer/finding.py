"""What stores have under a name: the newest record of it, and the manifest of a digest, both verified before they are believed.

Every source is asked. One that lies, refuses or is away does not hide what another has; where none has it, what is told is first what
somebody can mend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from restore_agent.snapshots.catalog import Corrupt, NotFound
from restore_agent.snapshots.chunks import CHUNK
from restore_agent.snapshots.keyring import Keyring, Signature, Untrusted
from restore_agent.snapshots.manifest import InvalidManifest, Manifest, digest_of, is_name
from restore_agent.snapshots.names import NameRecord, SeenNames, says_withdrawn
from restore_agent.transfer.fetch import gravest
from restore_agent.transfer.layout import LIMIT, NAMES, manifest_key, name_key, signature_key
from restore_agent.transfer.source import Absent, Altered, Listed, Source, TransferError, read_whole
from restore_agent.transfer.streams import STREAMS, Room, in_streams


class NotElsewhere(NotFound):
    """No store has it."""

    reason = "not-in-store"


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for in a store. `unfit`: why this node could not restore it; empty: it could."""

    digest: str
    manifest: Manifest
    unfit: str = ""


def _nobody(source: Source, error: Exception) -> None:
    """Hears of a source that did not give something."""


async def newest_record(
    sources: Sequence[Source], keyring: Keyring, namespace: str, name: str, left: Callable[[Source, Exception], None] = _nobody
) -> NameRecord:
    """The newest that the sources have of the name. Whether one that is newer was seen before is the caller's to look at. `left`: hears of
    each source that did not give it, and why.

    Raises:
        NotElsewhere: none has the name. Denied, Unreachable, Altered: what the gravest did. Untrusted: what they have does not count here.
    """
    found: list[NameRecord] = []
    refused: Untrusted | None = None
    failures: dict[str, TransferError] = {}
    for source in sources:
        try:
            found.append((await _record(source, keyring, namespace, name))[0])
        except TransferError as error:
            failures[str(source)] = error
            left(source, error)
        except Untrusted as error:
            refused = error
            left(source, error)
    if found:
        return max(found, key=lambda record: record.sequence)
    if refused:
        raise refused
    raise _nowhere(f"{namespace}/{name}", failures)


async def record_of(source: Source, keyring: Keyring, namespace: str, name: str) -> tuple[NameRecord, bytes]:
    """That of one source, and its bytes. Raises what `newest_record` does."""
    try:
        return await _record(source, keyring, namespace, name)
    except Absent as error:
        raise _nowhere(f"{namespace}/{name}", {str(source): error}) from None


async def stands_for(record: NameRecord, seen: SeenNames) -> str:
    """The digest of a record that was found. It is remembered first, also where it says that the name was withdrawn.

    Raises Replayed; NotElsewhere: it was withdrawn; Untrusted: what was seen can no longer be read.
    """
    await asyncio.to_thread(seen.accept, record)
    if not record.digest:
        raise NotElsewhere(f"no snapshot {record.namespace}/{record.name}: the name was withdrawn from its store ({record.published})")
    return record.digest


async def manifest_of(
    sources: Sequence[Source],
    keyring: Keyring,
    namespace: str,
    name: str,
    digest: str,
    left: Callable[[Source, Exception], None] = _nobody,
) -> tuple[bytes, Signature, Manifest]:
    """From the first source whose copy is what it should be. `left`: as of `newest_record`.

    Raises what `newest_record` does, of the manifest; Untrusted: also where it is another name's; Corrupt: no agent makes such a one.
    """
    refused: Untrusted | None = None
    failures: dict[str, TransferError] = {}
    for source in sources:
        try:
            data, signature = await _signed(source, keyring, digest)
        except TransferError as error:
            failures[str(source)] = error
            left(source, error)
        except Untrusted as error:
            refused = Untrusted(f"{source}: snapshot {digest[:12]}: {error}")
            left(source, refused)
        else:
            manifest = _decoded(data, digest)
            if (manifest.namespace, manifest.name) != (namespace, name):
                raise Untrusted(
                    f"the snapshot {digest[:12]} that the stores have as {namespace}/{name} is {manifest.namespace}/{manifest.name}: "
                    "somebody has moved the name; publish it again"
                )
            return data, signature, manifest
    if refused:
        raise refused
    raise _nowhere(digest[:12], failures)


async def any_manifest(source: Source, keyring: Keyring, digest: str) -> Manifest:
    """Whosever name it had. Raises Absent, Denied, Unreachable, Altered, Untrusted, Corrupt."""
    data, _ = await _signed(source, keyring, digest)
    return _decoded(data, digest)


async def names_in(store: Listed, namespace: str) -> list[str]:
    """Whatever is there as a name of the namespace and does not say that it was withdrawn, in order; none of it is verified.

    Raises Denied, Unreachable.
    """
    folder = f"{NAMES}/{namespace}"
    try:
        keys = [stored.key async for stored in store.objects(folder)]
    except Absent:
        return []
    names = (key.removeprefix(f"{folder}/").removesuffix(".json") for key in keys if key.endswith(".json"))
    found: list[str] = []

    async def look(name: str, room: Room) -> None:
        try:
            if says_withdrawn(await read_whole(store, name_key(namespace, name), LIMIT)):
                return
        except Absent:
            return  # it went as it was listed
        except Altered:
            pass  # who asks for it is told
        found.append(name)

    await in_streams((name for name in names if is_name(name)), STREAMS, look)
    return sorted(found)


async def _record(source: Source, keyring: Keyring, namespace: str, name: str) -> tuple[NameRecord, bytes]:
    data = await read_whole(source, name_key(namespace, name), LIMIT)
    try:
        return await asyncio.to_thread(NameRecord.decode_signed, data, keyring, namespace, name), data
    except Untrusted as error:
        raise Untrusted(f"{source}: {error}") from None


async def _signature(source: Source, digest: str) -> Signature:
    try:
        return Signature.decode(await read_whole(source, signature_key(digest), LIMIT))
    except Absent:
        return Signature.decode(None)


async def _signed(source: Source, keyring: Keyring, digest: str) -> tuple[bytes, Signature]:
    data = await read_whole(source, manifest_key(digest), LIMIT)
    if digest_of(data) != digest:
        raise Altered(f"{source} has another manifest under {digest[:12]}: publish the snapshot again")
    signature = await _signature(source, digest)
    await asyncio.to_thread(keyring.verify, data, signature)
    return data, signature


def _decoded(data: bytes, digest: str) -> Manifest:
    try:
        manifest = Manifest.decode(data)
    except InvalidManifest as error:
        raise Corrupt(f"snapshot {digest[:12]}: {error}") from None
    if any(chunk.size > CHUNK for chunk in manifest.chunks):  # each stream has that much memory
        raise Corrupt(f"snapshot {digest[:12]}: it names a chunk of more than {CHUNK} bytes, which no agent makes; take it again")
    return manifest


def _nowhere(what: str, failures: dict[str, TransferError]) -> TransferError | NotFound:
    error = gravest(failures.values(), f"{what} is on no store")
    return NotElsewhere(f"no snapshot {what} on {', '.join(failures) or 'any store'}") if isinstance(error, Absent) else error
