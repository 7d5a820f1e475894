"""What `zerowake doctor` finds of gpumem: whether it runs, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence

from gpumem.client.control import Control
from gpumem.wire.errors import GpumemError
from zerowake_shared.checkup import Check, Finding, Subject, ok, told, warning


async def gpumem(subject: Subject) -> Sequence[Finding]:
    """None that runs is fine: weights then travel in the image."""
    if not subject.gpumem.exists():
        return [ok(f"not running (no {subject.gpumem}): engines keep their weights themselves")]
    try:
        async with Control.connected(subject.gpumem, "doctor") as control:
            status = await control.status()
    except GpumemError as error:
        return [told(error)]
    found = []
    for device in status.devices:
        held = device.free_bytes + device.regions_bytes + device.scratch_bytes
        text = f"{held / 2**30:.1f} of {device.wanted_bytes / 2**30:.1f} GiB held, {device.free_bytes / 2**30:.1f} GiB of that free"
        if device.wanted_bytes and held < device.wanted_bytes:
            found.append(warning(text, "end what else takes this device's memory; gpumem takes the rest as it comes free", device.identity))
        else:
            found.append(ok(text, device.identity))
    used, arena = status.arena_used_bytes / 2**30, status.arena_bytes / 2**30
    return [*found, ok(f"{used:.1f} of {arena:.1f} GiB used, {len(status.regions)} regions", "arena")]


CHECKS = (Check("gpumem", gpumem),)
