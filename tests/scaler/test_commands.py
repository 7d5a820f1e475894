"""`zerowake up`, `serve`, `agent`, `status` as processes: a mistake of the user's is one line and exit code 1, and touches nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaler.view.state import as_json, decoded, socket_of
from tests.worlds.waiting import until

ENGINE = {"command": [sys.executable, "-m", "http.server", "8000"], "port": 8000, "health": "/"}


async def run(*arguments: str, **environment: str) -> tuple[int, list[str]]:
    """The exit code, and what was said but for log lines, and for what is told of a machine whose root is an overlay."""
    command = [sys.executable, "-m", "scaler.programs.cli", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=os.environ | environment
    )
    try:
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    aside = ('{"time"', "the machine's root is an overlay")
    return process.returncode, [line for line in out.decode().splitlines() if line and not line.startswith(aside)]


async def refused(*arguments: str, **environment: str) -> str:
    """The one line that it ends with."""
    code, lines = await run(*arguments, **environment)
    assert code == 1, lines
    assert len(lines) == 1, lines
    return lines[0]


def write(file: Path, **changes: Any) -> str:
    config = {"state": "state", "listen": "127.0.0.1:0", "models": {"m": ENGINE}, **changes}
    file.write_text(yaml.safe_dump(config))
    return str(file)


@pytest.fixture
def taken() -> Iterator[str]:
    """An address on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@asynccontextmanager
async def running(file: str, state: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`zerowake up`, once its agent is there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scaler.programs.cli", "up", file, stderr=(state.parent / "log").open("ab")
    )
    try:
        await until(lambda: (state / "agent.sock").exists() and socket_of(state).exists() and (state / "scaler.sock").exists())
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 30)


# --- the state folder


async def test_a_second_one_on_the_same_folder_touches_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(write(tmp_path / "a.yaml"), state) as first:
        before = {path.name: path.stat().st_ino for path in state.iterdir()}
        by = rf"pid {first.pid} \(python.* up /.*\)"
        second = write(tmp_path / "b.yaml")
        assert re.search(f"the state folder {state} is in use by {by}; stop that", await refused("up", second))
        assert re.search(f"in use by {by}", await refused("agent", "--state", str(state)))
        assert {path.name: path.stat().st_ino for path in state.iterdir()} == before
        code, lines = await run("status", "--json", "--state", str(state))
        assert (code, json.loads("".join(lines))["models"][0]["name"]) == (0, "m")


async def test_one_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """Its agent ends with it; whoever comes next waits for that."""
    state = tmp_path / "state"
    async with running(write(tmp_path / "a.yaml"), state) as first:
        (agent,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        first.send_signal(signal.SIGKILL)
        await first.wait()
        for name in ("agent.sock", "status.sock", "scaler.sock"):
            assert not (state / name).exists() or (state / name).is_socket()
        async with running(write(tmp_path / "b.yaml"), state):
            await until(lambda: not Path(f"/proc/{agent}").exists())
            assert (await run("status", "--state", str(state)))[0] == 0


async def test_an_agent_that_was_started_by_hand_has_the_folder(tmp_path: Path) -> None:
    state = tmp_path / "state"
    agent = await asyncio.create_subprocess_exec(sys.executable, "-m", "scaler.programs.cli", "agent", "--state", str(state))
    try:
        await until((state / "agent.sock").exists)
        for arguments in (("up", write(tmp_path / "a.yaml")), ("agent", "--state", str(state))):
            assert re.search(rf"in use by .*pid {agent.pid} \(python.* agent ", await refused(*arguments))
        assert (state / "agent.sock").exists()
    finally:
        agent.terminate()
        await agent.wait()


async def test_it_ends_when_its_agent_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "names").touch()
    code, lines = await run("up", write(tmp_path / "a.yaml"))
    assert code == 1
    assert lines == [
        f"zerowake: {tmp_path}/state/names: File exists",
        "zerowake: the restore agent could not start (exit code 1), for the reason that it has given above",
    ]


@pytest.mark.parametrize("name", ["status.sock", "scaler.sock", "agent.sock"])
async def test_what_is_no_socket_stays(tmp_path: Path, name: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / name).write_text("mine")
    assert f"{state / name}: there is something else at its path; move it away" in await refused("up", write(tmp_path / "a.yaml"))
    assert (state / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("x", "--", "python", os.fsdecode(b"\xff")), "the server cannot be started: word 2 is no text in UTF-8"),
        (("x", "--env", os.fsdecode(b"A=\xff"), "--", "python"), "the server cannot be started: A is no text in UTF-8"),
        (("x", "--env", "=1", "--", "python"), "the server cannot be started: '' cannot be the name of a variable"),
        (("x", "--", " "), "the server cannot be started: the program's name is empty"),
        ((os.fsdecode(b"\xff"), "--", "python"), "surrogates not allowed"),
        (("x y", "--", "python"), "'x y' is not allowed"),
    ],
)
async def test_what_no_snapshot_can_be_taken_of(tmp_path: Path, arguments: tuple[str, ...], why: str) -> None:
    assert why in await refused("snapshot", "create", "--state", str(tmp_path / "s"), "--port", "8000", *arguments)


async def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for state in ("file", "file/state", "/proc/state"):
        said = f"the state folder {tmp_path / state} cannot be used: "
        assert said in await refused("up", write(tmp_path / "a.yaml", state=state))
        assert said in await refused("agent", "--state", str(tmp_path / state))
        assert said in await refused("snapshot", "create", "x", "--port", "8000", "--state", str(tmp_path / state), "--", "true")
    deep = "x" * 120
    assert "a socket's path has 107 bytes at most" in await refused("up", write(tmp_path / "a.yaml", state=deep))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
async def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    """In a mount namespace of its own."""
    (tmp_path / "state").mkdir()
    script = f"mount -t tmpfs -o ro none {tmp_path}/state && exec {sys.executable} -m scaler.programs.cli up {write(tmp_path / 'a.yaml')}"
    process = await asyncio.create_subprocess_exec(
        "unshare", "--mount", "sh", "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 1
    assert out.decode() == (
        f"zerowake: the state folder {tmp_path}/state cannot be used: Read-only file system; make it writable, or use another folder\n"
    )


# --- addresses and certificates


@pytest.mark.parametrize(
    ("field", "who"),
    [
        ("listen", "the gateway"),
        ("metrics", "the metrics' server"),
        ("agent_metrics", "the agent's metrics' server"),
        ("keda", "the external scaler"),
    ],
)
async def test_a_port_that_is_taken(tmp_path: Path, taken: str, field: str, who: str) -> None:
    said = await refused("up", write(tmp_path / "a.yaml", **{field: {"listen": taken} if field == "keda" else taken}))
    assert said.startswith(f"zerowake: {who} (")
    assert re.search(rf"cannot listen on {taken}: the port is in use by pid {os.getpid()} \(.*\); stop that, or choose another$", said)


@pytest.mark.parametrize(
    ("address", "why"),
    [("192.0.2.1:80", "this machine has no such address"), ("no.such.host.invalid:80", "there is no host 'no.such.host.invalid'")],
)
async def test_an_address_that_is_not_ours(tmp_path: Path, address: str, why: str) -> None:
    assert why in await refused("up", write(tmp_path / "a.yaml", listen=address))


async def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    tls = {"certificate": "no.crt", "key": "no.key"}
    keda = {"listen": "127.0.0.1:0", "tls": tls}
    assert f"zerowake: {tmp_path}/no.crt: No such file or directory" in await refused("up", write(tmp_path / "a.yaml", keda=keda))
    arguments = ("agent", "--state", str(tmp_path / "s"), "--listen", "127.0.0.1:0", "--tls", str(tmp_path))
    assert f"{tmp_path}/tls.crt: No such file or directory" in await refused(*arguments)


async def test_the_agents_own_addresses(tmp_path: Path, taken: str) -> None:
    agent = ("agent", "--state", str(tmp_path / "s"))
    assert "the agent's metrics' server cannot listen on" in await refused(*agent, "--metrics", taken)
    assert "--metrics 'nonsense' is not HOST:PORT" in await refused(*agent, "--metrics", "nonsense")
    assert "--listen and --tls belong together" in await refused(*agent, "--listen", taken)


async def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "none.yaml cannot be read: No such file or directory" in await refused("up", str(tmp_path / "none.yaml"))
    assert f"{tmp_path} cannot be read: Is a directory" in await refused("serve", str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
async def test_what_another_user_may_not(tmp_path: Path) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "scaler.programs.cli")
    tmp_path.chmod(0o700)
    with tempfile.TemporaryDirectory() as shared:
        folder = Path(shared)
        folder.chmod(0o777)
        files = {name: Path(write(folder / f"{name}.yaml", **changes)) for name, changes in USERS.items()}
        files["secret"].chmod(0o600)
        for name, why in (
            ("low", "cannot listen on 127.0.0.1:80: permission denied: low ports are root's; choose one above 1023"),
            ("state", "the state folder /root/zerowake-state cannot be used: Permission denied; make it writable"),
            ("secret", "secret.yaml cannot be read: Permission denied"),
        ):
            process = await asyncio.create_subprocess_exec(
                *nobody, "up", str(files[name]), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            out, _ = await process.communicate()
            assert (process.returncode, out.decode().count("\n")) == (1, 1), out
            assert why in out.decode()


USERS: dict[str, dict[str, Any]] = {"low": {"listen": "127.0.0.1:80"}, "state": {"state": "/root/zerowake-state"}, "secret": {}}


# --- on Kubernetes


def cluster_config(tmp_path: Path, **changes: Any) -> str:
    config = {
        "namespace": "z",
        "listen": "127.0.0.1:0",
        "metrics": "127.0.0.1:0",
        "keda": {"listen": "127.0.0.1:0"},
        "agents": {"addresses": ["127.0.0.1:1"]},
        **changes,
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "serve.yaml")


@pytest.mark.parametrize("content", ["{{{", "a: [", "- 1", "apiVersion: v1\nkind: Config\n", "current-context: a\ncontexts: 3\n", "\0"])
async def test_a_kubeconfig_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "kubeconfig").write_text(content)
    said = await refused("serve", cluster_config(tmp_path), KUBECONFIG=str(tmp_path / "kubeconfig"))
    assert "Kubernetes' API cannot be found" in said and "run in a pod, or set KUBECONFIG" in said


async def test_addresses_of_a_replica(tmp_path: Path, taken: str) -> None:
    webhook = {"listen": taken, "certificate": "a", "key": "b"}
    peers = {"listen": taken, "addresses": [taken]}
    for name, value in {"listen": taken, "metrics": taken, "keda": {"listen": taken}, "peers": peers, "webhook": webhook}.items():
        assert f"cannot listen on {taken}: the port is in use by pid" in await refused("serve", cluster_config(tmp_path, **{name: value}))
    for wrong in ("nonsense", ":80"):
        said = await refused("serve", cluster_config(tmp_path, agents={"addresses": [wrong]}))
        assert f"agents.addresses.0: '{wrong}' is not HOST:PORT" in said


async def test_status_where_nothing_runs(tmp_path: Path) -> None:
    said = await refused("status", "--state", str(tmp_path))
    assert said == (
        f"zerowake: nothing answers on {tmp_path}/status.sock (No such file or directory); is `zerowake up` running with this --state?"
    )


async def test_the_plan_of_what_runs_and_where_nothing_does(tmp_path: Path) -> None:
    state = tmp_path / "state"
    said = await refused("plan", "--state", str(state))
    assert said == (
        f"zerowake: nothing answers on {state}/status.sock (No such file or directory); is `zerowake up` running with this --state?"
        " On Kubernetes ask in a scaler's pod: kubectl exec -n NAMESPACE deploy/zerowake-scaler -- zerowake plan"
    )
    async with running(write(tmp_path / "a.yaml", models={"m": ENGINE, "team/n": ENGINE}), state):
        said = await refused("plan", "--why", "x", "--state", str(state))
        assert said == "zerowake: no model 'x' is declared; there are: m, team/n"
        code, lines = await run("plan", "--why", "team/n", "--json", "--state", str(state))
        assert (code, json.loads("".join(lines))["name"]) == (0, "team/n")
        code, lines = await run("plan", "--json", "--state", str(state))
        assert (code, [each["name"] for each in json.loads("".join(lines))["models"]]) == (0, ["m", "team/n"])
        code, lines = await run("plan", "--dry-run", "--why", "m", "--state", str(state))
        assert (code, lines) == (0, ["nothing would be done now", "nothing would be moved ahead of need"])
        code, lines = await run("plan", "--dry-run", "--json", "--state", str(state))
        assert (code, sorted(json.loads("".join(lines)))) == (0, ["missing", "would_do", "would_move_ahead"])


async def test_the_state_of_what_runs_as_text_json_and_yaml(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(write(tmp_path / "a.yaml"), state):
        code, lines = await run("status", "--state", str(state))
        assert code == 0
        assert ["m", "-", "-", "0", "0", "0", "0"] in [line.split() for line in lines]
        code, lines = await run("status", "-o", "json", "--state", str(state))
        found = decoded("\n".join(lines).encode())
        assert (code, [each.name for each in found.models], found.leads) == (0, ["m"], True)
        code, lines = await run("status", "-o", "yaml", "--state", str(state))
        told = yaml.safe_load("\n".join(lines))
        assert (code, list(told), told["models"][0]["name"]) == (0, list(as_json(found)), "m")
        code, lines = await run("plan", "-o", "yaml", "--state", str(state))
        assert (code, yaml.safe_load("\n".join(lines))["models"][0]["name"]) == (0, "m")
        code, lines = await run("status", "--watch", "-o", "json", "--state", str(state))
        assert code == 2 and any("--watch shows text" in line for line in lines)


async def test_changes_are_told_in_a_pipe_until_the_scaler_ends(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(write(tmp_path / "a.yaml"), state) as scaler:
        watching = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scaler.programs.cli", "status", "--watch", "--state", str(state)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert watching.stdout is not None
        first = await asyncio.wait_for(watching.stdout.readline(), 60)
        assert re.fullmatch(r"\d\d:\d\d:\d\d model m: 0 ready, 0 held, 0 in flight\n", first.decode())
        scaler.terminate()
        said, _ = await asyncio.wait_for(watching.communicate(), 60)
        assert said.decode().splitlines()[-1].startswith(f"zerowake: nothing answers on {state}/status.sock")
        assert watching.returncode == 1


async def test_a_simulation_prints_its_table_or_its_json(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("0,a,0\n1000,a,0\n")
    (tmp_path / "s.yaml").write_text("models: {list: {a: 10GB}}\nscore: all\ntrace: {csv: trace.csv}\n")
    code, table = await run("simulate", str(tmp_path / "s.yaml"), "--policy", "lru", "--policy", "cold")
    assert (code, [line.split()[2:5] for line in table]) == (
        0,
        [["POLICY", "IN", "MEMORY"], ["lru", "50.0%", "1.49"], ["cold", "0.0%", "2.36"]],
    )
    code, found = await run("simulate", str(tmp_path / "s.yaml"), "--policy", "lru", "--sweep", "10%,20GB", "--json")
    assert (code, [each["in_memory"] for each in json.loads("".join(found))]) == (0, [0.5, 0.5])
    code, same = await run("simulate", str(tmp_path / "s.yaml"), "--policy", "lru", "--sweep", "10%,20GB", "-o", "yaml")
    assert (code, yaml.safe_load("\n".join(same))) == (0, json.loads("".join(found)))


async def test_a_simulation_names_the_line_that_is_impossible(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("0,a,0\n1000,a,many\n")
    (tmp_path / "s.yaml").write_text("models: {list: {a: 10GB}}\ntrace: {csv: trace.csv}\n")
    said = f"zerowake: {tmp_path}/trace.csv, line 2: the number of tokens is 'many', which is no number"
    assert await run("simulate", str(tmp_path / "s.yaml")) == (1, [said])
