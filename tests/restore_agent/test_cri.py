"""The container runtime, asked through its CRI socket: real gRPC, and a runtime of the test's own behind it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from zerowake_proto import cri_pb2

from restore_agent.kubernetes import cri
from restore_agent.kubernetes.cri import Cri, CriError, Described
from tests.worlds.container_runtime import ContainerRuntime

ID = "ab" * 32


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[ContainerRuntime]:
    runtime = ContainerRuntime()
    async with runtime.serve(tmp_path / "cri.sock"):
        yield runtime


@pytest.fixture
async def asked(runtime: ContainerRuntime, tmp_path: Path) -> AsyncIterator[Cri]:
    async with Cri.connected(tmp_path / "cri.sock") as asked:
        yield asked


async def test_a_container_is_described_as_kubelet_and_runtime_know_it(asked: Cri, runtime: ContainerRuntime) -> None:
    runtime.add(ID, 4711, "team", "chat-1", "uid-1")
    assert await asked.describe(ID) == Described(
        id=ID,
        name="engine",
        pid=4711,
        image="sha256:0123",
        pod="chat-1",
        pod_uid="uid-1",
        namespace="team",
        addresses=("10.1.2.3",),
        command=("server",),
        log="/var/log/pods/team_chat-1_uid-1/engine/0.log",
    )


@pytest.mark.parametrize("addresses", [["10.1.2.3", "fd00::3"], []])
async def test_a_pod_has_an_address_of_each_version_or_none_in_the_node_s_network(
    asked: Cri, runtime: ContainerRuntime, addresses: list[str]
) -> None:
    runtime.add(ID, 4711, "team", "chat-1", "uid-1")
    runtime.addresses = addresses
    assert (await asked.describe(ID)).addresses == tuple(addresses)


async def test_what_the_runtime_does_not_know_is_an_error_with_its_words(asked: Cri, tmp_path: Path) -> None:
    with pytest.raises(CriError, match=rf"runtime at {tmp_path}/cri\.sock cannot describe container {ID[:12]}: no container {ID[:12]}"):
        await asked.describe(ID)


@pytest.mark.parametrize("info", [{}, {"info": "no json"}, {"info": "[]"}, {"info": '{"sandboxID": "s"}'}, {"info": '{"pid": 1}'}])
async def test_an_answer_that_lacks_something_is_no_guess(asked: Cri, runtime: ContainerRuntime, info: dict[str, str]) -> None:
    runtime.add(ID, 1, "team", "chat-1", "uid-1")
    runtime.containers[ID] = cri_pb2.ContainerStatusResponse(status=runtime.containers[ID].status, info=info)
    with pytest.raises(CriError, match="is it too old"):
        await asked.describe(ID)


async def test_only_the_first_process_of_a_container_is_it(asked: Cri, runtime: ContainerRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cri, "container_id", lambda _pid: ID)
    runtime.add(ID, 4711, "team", "chat-1", "uid-1")
    assert (await asked.of_process(4711)).pod == "chat-1"
    with pytest.raises(CriError, match=f"process 4712 is not pid 1 of its container {ID[:12]}"):
        await asked.of_process(4712)
    monkeypatch.setattr(cri, "container_id", lambda _pid: "")
    with pytest.raises(CriError, match="process 4711 is in no container's cgroup"):
        await asked.of_process(4711)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"0::/kubepods/pod1/{ID}", ID),
        (f"0::/kubepods.slice/cri-containerd-{ID}.scope", ID),
        (f"0::/kubepods.slice/crio-{ID}.scope", ID),
        ("0::/system.slice/ssh.service", ""),
        (f"0::/kubepods/{ID}/of-its-own", ""),
    ],
)
def test_a_container_is_found_by_the_end_of_its_cgroup(monkeypatch: pytest.MonkeyPatch, line: str, found: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _path: f"{line}\n")
    assert cri.container_id(os.getpid()) == found


def test_a_process_that_has_ended_has_no_container() -> None:
    with pytest.raises(CriError, match="process 999999999 has ended"):
        cri.container_id(999999999)


async def test_a_runtime_that_does_not_answer_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CriError, match=r"runtime at .*/none\.sock cannot answer"):
        async with Cri.connected(tmp_path / "none.sock"):
            pass
    monkeypatch.setattr(cri, "SOCKETS", (tmp_path / "a.sock", tmp_path / "b.sock"))
    with pytest.raises(CriError, match=r"no container runtime listens on .*a\.sock or .*b\.sock; name its socket with --cri"):
        async with Cri.connected(None):
            pass
    server = grpc.aio.server()
    server.add_insecure_port(f"unix:{tmp_path}/b.sock")
    await server.start()
    with pytest.raises(CriError, match=r"runtime at .*b\.sock cannot answer: Method not found"):
        async with Cri.connected(None):
            pass
    await server.stop(None)
