"""What `zerowake doctor` finds of a zerowake.yaml, with its parts broken one by one."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaler.programs import checks
from zerowake_shared.checkup import Finding, Outcome, Subject
from zerowake_shared.state_folder import owned

OK, FAILS = Outcome.OK, Outcome.FAILS
ENGINE = {"command": [sys.executable, "-m", "http.server"], "port": 8000}


def written(folder: Path, **changes: Any) -> Subject:
    file = folder / "zerowake.yaml"
    file.write_text(yaml.safe_dump({"state": "state", "listen": "127.0.0.1:0", "models": {"m": ENGINE}, **changes}))
    return Subject(folder / "state", Path("/nowhere"), file=file)


def of(findings: Any) -> dict[str, Finding]:
    return {finding.of: finding for finding in findings}


def test_no_file_no_line() -> None:
    subject = Subject(Path("/nowhere"), Path("/nowhere"))
    assert [check(subject) for check in (checks.file, checks.ports, checks.commands)] == [[], [], []]
    assert checks.versions(subject)[0].found.startswith("zerowake ")


def test_a_file_that_is_right(tmp_path: Path) -> None:
    subject = written(tmp_path)
    assert checks.file(subject)[0].found == f"{subject.file}: 1 models"
    assert checks.commands(subject)[0].found == sys.executable


def test_each_mistake_of_a_file_is_a_line(tmp_path: Path) -> None:
    subject = written(tmp_path, lisen=":8080", models={"m": {"snapshot": "m", "stage": "ram"}})
    found = [finding.found for finding in checks.file(subject)]
    assert len(found) == 2
    assert "lisen" in " ".join(found) and "models.m.stage" in " ".join(found)
    assert checks.ports(subject) == checks.commands(subject) == [], "it is told once"
    assert subject.file
    subject.file.write_text("models: [")
    assert "is no YAML" in checks.file(subject)[0].found
    subject.file.unlink()
    assert "cannot be read" in checks.file(subject)[0].found


def test_what_a_file_names_has_to_be_there(tmp_path: Path) -> None:
    subject = written(
        tmp_path,
        metrics="127.0.0.1:0",
        push={"token_file": "token"},
        keda={"listen": "127.0.0.1:0", "tls": {"certificate": "tls.crt", "key": "tls.key"}},
        models={"m": {**ENGINE, "sources": [{"type": "push"}]}},
    )
    found = of(checks.file(subject))
    assert [found[each].outcome for each in ("keda.tls", "push.token_file")] == [FAILS, FAILS], found
    assert found["push.token_file"].found == f"{tmp_path / 'token'} is not there"


def test_a_port_that_is_taken_names_who_has_it(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        subject = written(tmp_path, listen=address, metrics="127.0.0.1:0")
        found = of(checks.ports(subject))
        taken = found["the gateway (listen)"]
        assert taken.outcome is FAILS
        assert f"cannot listen on {address}: the port is in use by pid {os.getpid()}" in taken.found
        assert found["the metrics' server (metrics)"].outcome is OK
        with owned(tmp_path / "state"):
            served = of(checks.ports(subject))["the gateway (listen)"]
        assert (served.outcome, f"{address}: served by pid {os.getpid()}" in served.found) == (OK, True)


@pytest.mark.parametrize(
    ("model", "outcome", "says"),
    [
        ({"command": ["there-is-none"], "port": 1}, FAILS, "no program there-is-none"),
        ({"command": ["./serve.sh"], "port": 1}, FAILS, "no program ./serve.sh"),
        ({"command": ["sh"], "port": 1, "env": {"PATH": "/nowhere"}}, FAILS, "no program sh"),
        ({"command": ["sh"], "port": 1, "directory": "gone"}, FAILS, "gone is not there"),
        ({"command": ["sh"], "port": 1}, OK, "/sh"),
        ({"command": ["./here.sh"], "port": 1}, OK, "here.sh"),
        ({"snapshot": "m"}, OK, "restored from m, and never started cold"),
    ],
)
def test_programs_that_are_there_and_not(model: dict[str, Any], outcome: Outcome, says: str, tmp_path: Path) -> None:
    (tmp_path / "here.sh").touch(0o755)
    (finding,) = checks.commands(written(tmp_path, models={"m": model}))
    assert (finding.of, finding.outcome, says in finding.found) == ("m", outcome, True), finding
