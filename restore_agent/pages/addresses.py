"""Sockets at the address of an engine's pod, in CRIU's images: the pod that an engine is restored into has another one.

Engines have them without being told to: gloo listens at the address of the host's name, torch's store is connected to it from within the
process, a resolver's UDP socket was bound to it when it asked. CRIU binds each where it was, which no other pod can. So a restore into a
pod gets images of its own, linked to those that all restores share, in which such sockets have the pod's address; connections of the engine
to itself have it at both ends. What an engine remembers of the old address is its own: what it connects to that later leads nowhere.
One to somebody outside is restored as if its peer had forgotten it: it ends by a reset when it is used.

Rejected: giving the pod the old address as well. By then another pod may have it, which would not be reached any more.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from restore_agent.errors import AgentError
from restore_agent.pages.images import OPEN_FILES, open_files, write_open_files

_MAPPED = bytes(10) + b"\xff\xff"  # what an IPv4 address is led by where a socket of IPv6 has it
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class OtherAddresses(AgentError):
    """An engine has sockets at addresses that the pod has no like of; the text says which, and the way out."""

    reason = "incompatible"


def readdressed(images: Path, addresses: Sequence[str], folder: Path) -> Path:
    """A folder of images whose sockets are at these addresses of a pod: `images` itself where none is at another one, else `folder`, which
    is made beside it. Blocks.

    Raises:
        OtherAddresses, ImageError, OSError.
    """
    files = open_files(images)
    sockets = [file.isk for file in files if file.HasField("isk")]
    moved = _moved({_address(socket.src_addr) for socket in sockets}, [ipaddress.ip_address(each) for each in addresses])
    if not moved:
        return images
    for socket in sockets:
        for words in (socket.src_addr, socket.dst_addr):
            if new := moved.get(_address(words)):
                words[:] = _words(new, len(words))
    folder.mkdir()
    for path in images.iterdir():
        if path.name != OPEN_FILES:
            os.link(path, folder / path.name)
    write_open_files(folder, files)
    return folder


def _moved(used: set[_Address | None], given: Sequence[_Address]) -> dict[_Address | None, _Address]:
    """What becomes of which address. Raises OtherAddresses."""
    moved: dict[_Address | None, _Address] = {}
    own = [each for each in used if each and not (each.is_unspecified or each.is_loopback or each.is_link_local or each.is_multicast)]
    for version in (4, 6):
        before = sorted(str(each) for each in own if each.version == version)
        after = [each for each in given if each.version == version]
        if not before or before == [str(each) for each in after[:1]]:
            continue
        if not after or len(before) > 1:
            has = f"the address {after[0]}" if after else "none"
            raise OtherAddresses(
                f"the engine has sockets at {', '.join(before)}, and the pod that it is to be restored into has {has} of IPv{version}; "
                "have it listen on all addresses, and talk to itself by 127.0.0.1"
            )
        moved[ipaddress.ip_address(before[0])] = after[0]
    return moved


def _address(words: Sequence[int]) -> _Address | None:
    """None: of another family, or none at all."""
    data = struct.pack(f"={len(words)}I", *words)
    if len(data) == 16 and data.startswith(_MAPPED):
        data = data[len(_MAPPED) :]
    return ipaddress.ip_address(data) if len(data) in (4, 16) else None


def _words(address: _Address, count: int) -> tuple[int, ...]:
    data = address.packed if len(address.packed) == 4 * count else _MAPPED + address.packed
    return struct.unpack(f"={count}I", data)
