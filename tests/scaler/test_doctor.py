"""`zerowake doctor` as a user types it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaler.programs import doctor as doctor_module
from scaler.programs.doctor import is_cluster, subject_of

FILE = {"state": "state", "listen": "127.0.0.1:0", "models": {"m": {"command": ["sh"], "port": 8000}}}


async def doctor(*arguments: str, **environment: str) -> tuple[int | None, str]:
    command = [sys.executable, "-m", "scaler.programs.cli", "doctor", "--machine", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=os.environ | environment)
    out, _ = await process.communicate()
    return process.returncode, out.decode()


def lines(found: Any) -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = {}
    for each in found["checks"]:
        by_name.setdefault(each["check"], []).append(each["outcome"])
    return by_name


async def test_every_room_brings_its_checks_and_all_formats_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text(yaml.safe_dump(FILE))
    code, shown = await doctor(str(file))
    as_json, as_yaml = [await doctor(str(file), "-o", form) for form in ("json", "yaml")]
    assert code == ("fails " in shown)
    for (code, text), read in ((as_json, json.loads), (as_yaml, yaml.safe_load)):
        found = read(text)
        assert {"version", "zerowake.yaml", "command", "port", "CRIU", "rights", "gpumem", "state folder"} <= lines(found).keys()
        assert code == (not found["ok"]) == ("fails" in [each["outcome"] for each in found["checks"]])
        for each in found["checks"]:  # others change from one look to the next
            assert each["check"] in shown
            assert each["found"] in shown or each["check"] not in {"version", "zerowake.yaml", "command", "port", "CRIU", "rights"}
    assert shown.splitlines()[-1].endswith(" fail")
    assert not (tmp_path / "state").exists()


async def test_what_fails_is_told_with_its_remedy_and_by_the_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text(yaml.safe_dump({**FILE, "models": {"m": {"command": ["there-is-none"], "port": 8000}}}))
    code, shown = await doctor(str(file))
    assert code == 1
    said = shown.splitlines()
    at = next(number for number, line in enumerate(said) if "no program there-is-none" in line)
    assert said[at].split()[:3] == ["fails", "command:", "m"]
    assert said[at + 1].split()[:3] == ["→", "install", "it,"]


async def test_a_room_that_cannot_be_loaded_is_a_line(tmp_path: Path) -> None:
    described = tmp_path / "broken-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[zerowake.checks]\nbroken = not_there.checks:CHECKS\n")
    code, shown = await doctor("-o", "json", "--state", str(tmp_path / "state"), PYTHONPATH=str(tmp_path))
    assert code == 1
    last = json.loads(shown)["checks"][-1]
    assert (last["check"], last["outcome"]) == ("broken", "fails")
    assert "not_there" in last["found"]


def test_what_was_not_said_is_as_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text(yaml.safe_dump({**FILE, "store": "file:///stores/a", "models": {"m": {"snapshot": "m"}}}))
    subject = subject_of(file, None, Path("g"), None, "zerowake")
    assert (subject.state, subject.store) == (tmp_path / "state", "file:///stores/a")
    assert subject_of(file, tmp_path / "other", Path("g"), None, "zerowake").state == tmp_path / "other"
    file.write_text("models: [")
    assert subject_of(file, None, Path("g"), None, "zerowake").state == Path("/var/lib/zerowake")


def test_in_a_pod_the_cluster_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_POD_NAMESPACE", tmp_path / "namespace")
    assert subject_of(None, None, Path("g"), None, "").namespace == "zerowake"
    (tmp_path / "namespace").write_text("models-serving\n")
    assert [subject_of(None, None, Path("g"), None, each).namespace for each in ("", "other")] == ["models-serving", "other"]
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert [is_cluster(None), is_cluster(True)] == [False, True]
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert [is_cluster(None), is_cluster(False)] == [True, False]
