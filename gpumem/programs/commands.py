"""`gpumem serve`, and what an operator asks a running one; `zerowake gpumem …` is the same."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.message import Message
from rich.console import Console
from zerowake_proto import gpumem_pb2 as pb

from gpumem.checkpoint.safetensors import InvalidCheckpoint, read_checkpoint
from gpumem.client.control import Control
from gpumem.hardware.devices import devices
from gpumem.hardware.memory import MemoryFailed
from gpumem.programs.main import run
from gpumem.server.regions import identify
from gpumem.wire.blocking_connection import DEFAULT_SOCKET
from gpumem.wire.errors import GpumemError, NotFound, WrongDevice
from zerowake_shared import bars, log, tables
from zerowake_shared.one_line import errors_in_one_line
from zerowake_shared.output import Format, Output, printed

app = typer.Typer(
    name="gpumem", help="Holds GPU memory ahead of need, fills it with weights, and lends it.", no_args_is_help=True, add_completion=False
)
zerowake = typer.Typer()
zerowake.add_typer(app, name="gpumem")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)

Socket = Annotated[Path, typer.Option("--socket", help="The server's socket.", envvar="GPUMEM_SOCKET")]
DeviceName = Annotated[str, typer.Option("--device", help="GPU by UUID, or `host`; not needed where the server has one.")]
RegionName = Annotated[str, typer.Argument(help="The region's id, or the beginning of it.", metavar="REGION")]


def parse_size(text: str) -> int:
    """`80GiB`, `512M` or `4096` in bytes; units are powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size, such as 80GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_reserve(text: str) -> Callable[[int], int]:
    """A size, or a fraction of what a device has, such as 0.8."""
    if re.fullmatch(r"0?\.\d+|1\.0+", text):
        return lambda total: int(float(text) * total)
    size = parse_size(text)
    return lambda total: size


@app.command()
def serve(
    reserve: Annotated[str, typer.Option(help="Memory to hold of each device: a size (80GiB) or a fraction (0.8).")],
    socket: Socket = DEFAULT_SOCKET,
    floor: Annotated[str, typer.Option(help="Memory of each device that stays free for others.")] = "2GiB",
    arena: Annotated[str, typer.Option(help="Host memory to stage weights in; a GPU is filled through it.")] = "0",
    device: Annotated[list[str], typer.Option(help="A device to hold memory of; all GPUs if not given, `host` where there are none.")] = [],  # noqa: B006
) -> None:
    """Holds memory and lends it, until told to stop."""
    log.configure()
    granule = 2 << 20
    with _errors():
        asyncio.run(run(socket, device or devices(), parse_reserve(reserve), parse_size(floor), -(-parse_size(arena) // granule) * granule))


@app.command()
def status(socket: Socket = DEFAULT_SOCKET, output: Output = Format.TEXT) -> None:
    """Shows what is held, what is in it, and who uses it."""
    found = _ask(socket, lambda control: control.status())
    if output is Format.TEXT:
        print_status(found, tables.console())
    else:
        printed(as_json(found), output)


@app.command("reserve")
def set_reserve(size: Annotated[str, typer.Argument()], socket: Socket = DEFAULT_SOCKET, device: DeviceName = "") -> None:
    """Holds more or less of a device from now on; what nobody uses is given back to it at once."""

    async def ask(control: Control) -> str:
        name = _one_device(control, device)
        total = next(found.device_total_bytes for found in (await control.status()).devices if found.identity == name)
        return f"{name}: {_human(await control.reserve(name, parse_reserve(size)(total)))} held"

    typer.echo(_ask(socket, ask))


@app.command("import")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A directory of safetensors, or one file.", exists=True)],
    layout: Annotated[Path | None, typer.Option(help="Write the layout here.")] = None,
    fill: Annotated[bool, typer.Option("--fill", help="Have the server fill a region with it.")] = False,
    stage: Annotated[bool, typer.Option("--stage", help="Have the server bring it into its arena.")] = False,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it there whatever else is wanted.")] = False,
    socket: Socket = DEFAULT_SOCKET,
    device: DeviceName = "",
) -> None:
    """Turns a checkpoint into chunks and a layout, which need no GPU; prints the region's id."""
    with _errors():
        found = read_checkpoint(checkpoint)
    serialized = found.layout.SerializeToString(deterministic=True)
    if layout is not None:
        layout.write_bytes(serialized)
    if fill or stage:

        async def ask(control: Control) -> pb.Filled:
            return await control.fill(serialized, found.parts, "" if stage and not fill else _one_device(control, device), pin)

        with bars.waiting(f"bringing {_human(found.layout.size)}"):
            filled = _ask(socket, ask)
        rate = found.layout.size / filled.seconds / 1e9 if filled.seconds else 0.0
        typer.echo(f"{_human(found.layout.size)} in {filled.seconds:.2f} s ({rate:.1f} GB/s)", err=True)
    typer.echo(identify(serialized).hex())


@app.command()
def evict(region: RegionName, socket: Socket = DEFAULT_SOCKET) -> None:
    """Takes a region that nobody uses off its device, and lets its chunks in the arena go."""
    _each(socket, region, lambda control, ref: control.evict(ref))


@app.command()
def pin(
    region: RegionName,
    socket: Socket = DEFAULT_SOCKET,
    off: Annotated[bool, typer.Option("--off", help="Let it be evicted again.")] = False,
) -> None:
    """Keeps a region whatever else is wanted."""
    _each(socket, region, lambda control, ref: control.pin(ref, not off))


@app.command()
def tenant(
    namespace: Annotated[str, typer.Argument()],
    socket: Socket = DEFAULT_SOCKET,
    quota: Annotated[str, typer.Option(help="What it may use of each device; 0: no limit.")] = "0",
) -> None:
    """Opens a socket for a namespace and prints its path; its folder is for the sandboxes of that namespace."""

    async def ask(control: Control) -> Path:
        path = await control.tenant(namespace)
        await control.quota(namespace, parse_size(quota))
        return path

    typer.echo(_ask(socket, ask))


def as_json(message: Message) -> dict[str, Any]:
    """A message in JSON's types, by the names of gpumem.proto; ids as hex digits."""
    found = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        found[field.name] = [_plain(each) for each in value] if field.is_repeated else _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return as_json(value)
    return value.hex() if isinstance(value, bytes) else value


def print_status(status: pb.Status, console: Console) -> None:
    """Writes a status as tables."""
    table = tables.table("DEVICE", "HELD", "FREE", "REGIONS", "SCRATCH", "OWED", "FREE OUTSIDE", "SLABS", "FILLER")
    for device in status.devices:
        held = device.free_bytes + device.regions_bytes + device.scratch_bytes
        sizes = (device.free_bytes, device.regions_bytes, device.scratch_bytes, device.owed_bytes, device.device_free_bytes)
        filler = f"pid {device.filler_pid}" if device.filler_pid else "starting"
        table.add_row(device.identity, f"{_human(held)} of {_human(device.wanted_bytes)}", *map(_human, sizes), str(device.slabs), filler)
    console.print(table)
    console.print(f"arena {_human(status.arena_used_bytes)} of {_human(status.arena_bytes)}, {status.connections} connections")
    if status.regions:
        table = tables.table("REGION", "NAMESPACE", "WHERE", "SIZE", "STATE", "LEASES", "IDLE")
        for region in status.regions:
            state = "ready" if region.sealed else f"{region.filled_bytes / max(1, region.size):.0%} filled"
            words = (state + (", pinned" if region.pinned else ""), str(region.leases), f"{region.idle_seconds:.0f} s")
            table.add_row(region.id.hex()[:12], region.namespace or "-", region.device or "arena", _human(region.size), *words)
        console.print(table)
    if status.leases:
        table = tables.table("PROCESS", "PID", "NAMESPACE", "DEVICE", "SIZE", "WHAT")
        for lease in status.leases:
            what = f"{'writes' if lease.writable else 'reads'} {lease.region.hex()[:12]}" if lease.region else "scratch"
            table.add_row(lease.label, str(lease.pid), lease.namespace or "-", lease.device, _human(lease.size), what)
        console.print(table)
    for fill in status.fills:
        rate = fill.bytes_per_second / 1e9
        console.print(f"filling {fill.region.hex()[:12]} on {fill.device or 'arena'}: {fill.filled_bytes / fill.size:.0%}, {rate:.1f} GB/s")


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _one_device(control: Control, device: str) -> str:
    names = [found.identity for found in control.welcome.devices]
    if device in names:
        return device
    if device or len(names) != 1:
        raise WrongDevice(
            f"{f'no device {device} there' if device else 'several devices there'}: name one with --device: {', '.join(names)}"
        )
    return names[0]


def _each(socket: Path, prefix: str, ask: Callable[[Control, pb.RegionRef], Coroutine[Any, Any, None]]) -> None:
    """Asks for every place where a region is."""

    async def find(control: Control) -> None:
        found = [region for region in (await control.status()).regions if region.id.hex().startswith(prefix)]
        if len({region.id for region in found}) != 1:
            raise NotFound(f"{'several regions begin' if found else 'no region begins'} with {prefix!r}: see `gpumem status`")
        for region in found:
            await ask(control, pb.RegionRef(device=region.device, id=region.id))

    _ask(socket, find)


def _ask(socket: Path, ask: Callable[[Control], Coroutine[Any, Any, Any]]) -> Any:
    async def asking() -> Any:
        async with Control.connected(socket, "gpumem") as control:
            return await ask(control)

    with _errors():
        return asyncio.run(asking())


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    with errors_in_one_line("gpumem", GpumemError, MemoryFailed, InvalidCheckpoint):
        yield


def main() -> None:
    """Runs `gpumem` with the arguments of this process."""
    app()
