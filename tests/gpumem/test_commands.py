"""The command line, as an operator types it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
import typer
from blake3 import blake3

from gpumem.client import Client
from gpumem.hardware.host import HostMemory
from gpumem.programs.commands import parse_reserve, parse_size
from tests.worlds.gpumem_server import GPUMEM, MIB, Served, served


def gpumem(server: Served, *words: str | Path, status: int = 0) -> str:
    ran = subprocess.run([GPUMEM, *words, "--socket", server.socket], capture_output=True, text=True, check=False, env={"COLUMNS": "200"})
    assert ran.returncode == status, ran.stderr
    return ran.stdout if not status else ran.stderr


def write_checkpoint(folder: Path, size: int) -> bytes:
    header = json.dumps({"a.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    data = bytes(range(256)) * (size // 256)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return data


def test_a_checkpoint_is_imported_shown_pinned_and_evicted(server: Served, tmp_path: Path) -> None:
    data = write_checkpoint(tmp_path, 20 * MIB)
    layout = tmp_path / "layout"
    region = gpumem(server, "import", tmp_path, "--layout", layout, "--fill", "--pin").strip()
    assert blake3(layout.read_bytes()).hexdigest() == region
    with Client(server.socket) as client:
        found = client.attach(bytes.fromhex(region))
        tensor = found.layout.tensors[0]
        assert found.view()[tensor.offset : tensor.offset + len(data)] == data
        shown = gpumem(server, "status")
        for word in (region[:12], "ready, pinned", f"reads {region[:12]}", "192.0 MiB of 192.0 MiB"):
            assert word in shown
        told = json.loads(gpumem(server, "status", "-o", "json"))
        assert [(each["id"], each["pinned"], each["size"]) for each in told["regions"]] == [(region, True, found.layout.size)]
        assert [(each["region"], each["pid"]) for each in told["leases"]] == [(region, os.getpid())]
        assert "in use" in gpumem(server, "evict", region[:8], status=1)
    gpumem(server, "import", tmp_path, "--stage")
    gpumem(server, "pin", region[:8], "--off")
    gpumem(server, "evict", region[:8])
    assert region[:12] not in gpumem(server, "status")
    assert "no region begins" in gpumem(server, "evict", region[:8], status=1)


def test_memory_is_reserved_and_yielded(server: Served) -> None:
    assert "100.0 MiB held" in gpumem(server, "reserve", "100MiB")
    assert server.host.free_bytes == 100 * MIB
    assert "192.0 MiB held" in gpumem(server, "reserve", "192M")


def test_a_floor_stays_free(tmp_path: Path) -> None:
    """More than there is may be asked for: what is held then leaves the floor."""
    floor = HostMemory().free()[0] - 200 * MIB
    with served(tmp_path, reserve=2000 * MIB, floor=floor) as server:
        assert server.host.wanted_bytes == server.host.free_bytes < 1000 * MIB


def test_a_namespaces_socket(server: Served) -> None:
    path = gpumem(server, "tenant", "green", "--quota", "10M").strip()
    with Client(path) as client:
        assert client.scratch(2 * MIB).size == 2 * MIB
    assert "Kubernetes" in gpumem(server, "tenant", "No/Name", status=1)


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 << 30), ("512M", 512 << 20), ("4096", 4096), ("1.5k", 1536), ("2 TiB", 2 << 40)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == parse_reserve(text)(1) == size


def test_fractions() -> None:
    assert parse_reserve("0.8")(1000) == 800
    assert parse_reserve("1.0")(1000) == 1000
    with pytest.raises(typer.BadParameter):
        parse_size("much")


def test_every_line_of_its_log_is_json(tmp_path: Path) -> None:
    with served(tmp_path / 'with "quotes"', 8 * MIB) as server:
        pass
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert f"serving on {server.socket}" in [line["message"] for line in lines]
