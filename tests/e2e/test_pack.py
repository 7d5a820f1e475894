"""A packed cluster: what an image's layers leave, and parts that arrive in several goes, one of them spoilt."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.cluster import pack
from tests.e2e.cluster.pack import HASHES, SCRIPTS, lay_out, packed, split


def tar(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def test_a_layer_takes_away_what_it_says(tmp_path: Path) -> None:
    layers = {
        "1": tar({"etc/kept": b"1", "etc/gone": b"1", "lists/old": b"1", "lists/deep/old": b"1"}),
        "2": tar({"etc/.wh.gone": b"", "lists/.wh..wh..opq": b"", "lists/new": b"2", "etc/kept": b"2"}),
    }
    archive = tmp_path / "image.tar"
    archive.write_bytes(tar({**layers, "manifest.json": json.dumps([{"Layers": ["1", "2"]}]).encode()}))
    lay_out(archive, tmp_path / "root")
    found = {str(path.relative_to(tmp_path / "root")): path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}
    assert found == {"etc/kept": b"2", "lists/new": b"2"}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two folders: `root-system`, in several parts, and `model`, in one."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(pack, "PART_BYTES", 40_000)
    made = []
    for name, content in (("root-system", os.urandom(100_000)), ("model", b"{}")):
        folder = tmp_path / "source" / name
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(content)
        made += split(packed(folder, tmp_path / f"{name}.tar.xz", pack.SYSTEM), f"{name}.tar.xz", out)
    assert len(made) == 4
    (out / HASHES).write_text("".join(f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in made))
    for script in SCRIPTS:
        shutil.copy(Path(pack.__file__).with_name(script), out)
    return out


def unpack(parts: Path, target: Path) -> tuple[int, str]:
    done = subprocess.run(["sh", str(parts / "unpack.sh"), str(parts), str(target)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_parts_come_in_several_goes(parts: Path, tmp_path: Path) -> None:
    whole = {part.name: part.read_bytes() for part in parts.glob("*.tar.xz.*")}
    last = "root-system.tar.xz.02"
    (parts / last).unlink()
    assert unpack(parts, tmp_path / "there") == (3, f"unpacked model.tar.xz into {tmp_path}/there/model\nstill missing: {last}\n")
    for part in parts.glob("*.tar.xz.*"):
        part.unlink()
    (parts / last).write_bytes(whole[last][:-1])  # it was cut on its way
    assert unpack(parts, tmp_path / "there")[0] == 3
    (parts / last).write_bytes(whole[last])
    code, said = unpack(parts, tmp_path / "there")
    assert (code, "unpacked root-system.tar.xz" in said) == (0, True)
    assert (tmp_path / "there/root/file").read_bytes() == (tmp_path / "source/root-system/file").read_bytes()
    assert (tmp_path / "there/model/file").read_bytes() == b"{}"
    assert unpack(parts, tmp_path / "there") == (0, ""), "what is there is not unpacked again"
    assert list((tmp_path / "there/parts").glob("*.tar.xz.[0-9]*")) == []
