"""The plugin of the container runtime: what it changes in which containers, and that it never stands in the way of one.

The runtime here speaks the protocol as containerd does; that containerd itself takes it is shown by tests/e2e.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from zerowake_proto import nri_pb2, ttrpc_pb2

from restore_agent.kubernetes.engine_packages import EnginePackages
from restore_agent.kubernetes.injection import injected
from restore_agent.kubernetes.nri import NriError, plugged
from restore_agent.kubernetes.seccomp import policy

PLUGIN, RUNTIME = 1, 2
REQUEST, RESPONSE = 1, 2
COMMAND = ["/bin/server", "--port", "8000"]


class Runtime:
    """A container runtime's side. Its messages are cut into frames as the network likes: here byte by byte, where `pieces` says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.stream = 1
        self.version = "v2.2.0"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.connections.put((reader, writer))

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._connected, self.path)
        try:
            yield
        finally:
            server.close()
            self.path.unlink(missing_ok=True)

    async def takes(self, code: int = 0) -> None:
        """The next connection, registered and configured."""
        self.reader, self.writer = await asyncio.wait_for(self.connections.get(), 10)
        kind, number, stream, payload = await self.read()
        assert (kind, number) == (REQUEST, RUNTIME)
        request = ttrpc_pb2.Request.FromString(payload)
        assert (request.service, request.method) == ("nri.pkg.api.v1alpha1.Runtime", "RegisterPlugin")
        plugin = nri_pb2.RegisterPluginRequest.FromString(request.payload)
        assert plugin.plugin_name == "zerowake" and len(plugin.plugin_idx) == 2
        status = ttrpc_pb2.Status(code=code, message="no room")
        self.send(RUNTIME, stream, RESPONSE, ttrpc_pb2.Response(status=status).SerializeToString())
        if code:
            return
        answer = await self.call(
            "Configure", nri_pb2.ConfigureRequest(runtime_name="containerd", runtime_version=self.version).SerializeToString()
        )
        assert nri_pb2.ConfigureResponse.FromString(answer.payload).events == 0b1000, "containers that are made, and nothing else"
        for more in (True, False):
            answer = await self.call("Synchronize", nri_pb2.SynchronizeRequest(more=more).SerializeToString())
            assert nri_pb2.SynchronizeResponse.FromString(answer.payload).more is more

    async def call(self, method: str, payload: bytes, pieces: bool = False) -> ttrpc_pb2.Response:
        self.stream += 2
        request = ttrpc_pb2.Request(service="nri.pkg.api.v1alpha1.Plugin", method=method, payload=payload)
        self.send(PLUGIN, self.stream, REQUEST, request.SerializeToString(), pieces)
        kind, number, stream, answer = await self.read()
        assert (kind, number, stream) == (RESPONSE, PLUGIN, self.stream)
        return ttrpc_pb2.Response.FromString(answer)

    async def create(
        self,
        labels: dict[str, str],
        annotations: dict[str, str],
        pieces: bool = False,
        env: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
    ) -> nri_pb2.CreateContainerResponse:
        pod = nri_pb2.PodSandbox(name="one", namespace="tenant", uid="u", labels=labels, annotations=annotations)
        request = nri_pb2.CreateContainerRequest(pod=pod, container=nri_pb2.Container(id="c", name="engine", args=command, env=env))
        answer = await self.call("CreateContainer", request.SerializeToString(), pieces)
        assert not answer.status.code
        return nri_pb2.CreateContainerResponse.FromString(answer.payload)

    def send(self, number: int, stream: int, kind: int, payload: bytes, pieces: bool = False) -> None:
        message = struct.pack(">IIBB", len(payload), stream, kind, 0) + payload
        for part in (message[i : i + 1] for i in range(len(message))) if pieces else (message,):
            self.writer.write(struct.pack(">II", number, len(part)) + part)

    async def read(self) -> tuple[int, int, int, bytes]:
        message = b""
        while len(message) < 10 or len(message) < 10 + int.from_bytes(message[:4]):
            number, size = struct.unpack(">II", await asyncio.wait_for(self.reader.readexactly(8), 10))
            assert size <= 4096, "containerd reads frames into a buffer of that size"
            message += await self.reader.readexactly(size)
        length, stream, kind, _ = struct.unpack_from(">IIBB", message)
        assert len(message) == 10 + length
        return kind, number, stream, message[10:]


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    runtime = Runtime(tmp_path / "nri.sock")
    async with runtime.listening():
        yield runtime


@contextlib.asynccontextmanager
async def connected(runtime: Runtime, folder: Path) -> AsyncIterator[None]:
    taking = asyncio.create_task(runtime.takes())
    packages = EnginePackages(folder / "packages", "/run/zerowake/python/abc")
    async with plugged(runtime.path, injected(folder, packages, folder / "gpumem/gpumem.sock")):
        await taking
        yield


MARKED = {"zerowake.dev/container": "engine"}


async def test_a_marked_container_gets_a_placeholder_before_its_command(runtime: Runtime, tmp_path: Path) -> None:
    async with connected(runtime, tmp_path):
        for label in ("zerowake.dev/snapshot", "zerowake.dev/capture"):
            adjust = (await runtime.create({label: "chat"}, MARKED, pieces=True)).adjust
            assert list(adjust.args) == ["", "/run/zerowake/bin/zerowake-placeholder", "--", *COMMAND]
            assert environment(adjust) == {"SNAPSHOT_CONTROL_DIR": "/run/zerowake/control", "PYTHONPATH": "/run/zerowake/python/abc"}
            assert adjust.linux.seccomp_policy == policy()
            program, control, python = adjust.mounts
            assert (program.source, program.destination, "ro" in program.options) == (str(tmp_path), "/run/zerowake/bin", True)
            assert (control.type, control.destination) == ("tmpfs", "/run/zerowake/control")
            mounted = (python.source, python.destination, "ro" in python.options)
            assert mounted == (str(tmp_path / "packages"), "/run/zerowake/python", True), "all versions of them"


def environment(adjust: nri_pb2.ContainerAdjustment) -> dict[str, str]:
    return {each.key: each.value for each in adjust.env}


async def test_a_command_may_be_a_whole_program(runtime: Runtime, tmp_path: Path) -> None:
    program = ["python3", "-c", "x = 1\n" * 20000]
    async with connected(runtime, tmp_path):
        adjust = (await runtime.create({"zerowake.dev/snapshot": "chat"}, MARKED, command=program)).adjust
    assert list(adjust.args[3:]) == program


async def test_a_seccomp_profile_of_its_owner_s_is_kept(runtime: Runtime, tmp_path: Path) -> None:
    async with connected(runtime, tmp_path):
        adjust = (await runtime.create({"zerowake.dev/snapshot": "chat"}, {**MARKED, "zerowake.dev/seccomp": "own"})).adjust
    assert adjust.args and not adjust.linux.HasField("seccomp_policy")


async def test_what_its_owner_set_is_kept(runtime: Runtime, tmp_path: Path) -> None:
    own = ["PYTHONPATH=/opt/mine:/opt/more", "GPUMEM_SOCKET=/run/other.sock", "PATH=/bin"]
    async with connected(runtime, tmp_path):
        lent = {**MARKED, "zerowake.dev/gpumem": "true"}
        found = environment((await runtime.create({"zerowake.dev/snapshot": "chat"}, lent, env=own)).adjust)
    assert found == {
        "SNAPSHOT_CONTROL_DIR": "/run/zerowake/control",
        "PYTHONPATH": "/opt/mine:/opt/more:/run/zerowake/python/abc",
        "GPUMEM_SOCKET": "/run/other.sock",
    }


async def test_gpumem_is_the_namespace_s_own(runtime: Runtime, tmp_path: Path) -> None:
    async with connected(runtime, tmp_path):
        adjust = (await runtime.create({"zerowake.dev/snapshot": "chat"}, {**MARKED, "zerowake.dev/gpumem": "true"})).adjust
    mount = adjust.mounts[-1]
    assert (mount.source, mount.destination) == (str(tmp_path / "gpumem/tenants/tenant"), "/run/gpumem")
    assert Path(mount.source).is_dir(), "there when it is mounted"
    assert environment(adjust)["GPUMEM_SOCKET"] == "/run/gpumem/gpumem.sock"


@pytest.mark.parametrize(
    ("labels", "annotations"),
    [
        ({}, MARKED),
        ({"app": "x"}, {}),
        ({"zerowake.dev/snapshot": "chat"}, {}),
        ({"zerowake.dev/snapshot": "chat"}, {"zerowake.dev/container": "sidecar"}),
    ],
)
async def test_others_stay_as_they_are(runtime: Runtime, tmp_path: Path, labels: dict[str, str], annotations: dict[str, str]) -> None:
    async with connected(runtime, tmp_path):
        assert not (await runtime.create(labels, annotations)).HasField("adjust")


async def test_an_error_of_ours_leaves_the_container_as_it_is(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "gpumem").write_text("no folder")
    async with connected(runtime, tmp_path):
        assert not (await runtime.create({"zerowake.dev/snapshot": "chat"}, {**MARKED, "zerowake.dev/gpumem": "true"})).HasField("adjust")
        assert (await runtime.create({"zerowake.dev/snapshot": "chat"}, MARKED)).HasField("adjust")
        answer = await runtime.call("StopContainer", b"")
        assert answer.status.code, "a call of which it knows nothing is refused, and the next is answered"
        assert (await runtime.create({"zerowake.dev/snapshot": "chat"}, MARKED)).HasField("adjust")


@pytest.mark.parametrize(
    "ending",
    [
        lambda runtime: runtime.writer.close(),
        lambda runtime: runtime.writer.write(b"\xff" * 64),
        lambda runtime: runtime.send(PLUGIN, 99, REQUEST, b"\xff\xff\xff"),
        lambda runtime: runtime.writer.write(struct.pack(">II", PLUGIN, 10) + struct.pack(">IIBB", 1 << 31, 1, REQUEST, 0)),
    ],
    ids=["hung up", "a frame beyond measure", "no message", "a message beyond measure"],
)
async def test_it_connects_again(runtime: Runtime, tmp_path: Path, ending: Callable[[Runtime], None]) -> None:
    async with connected(runtime, tmp_path):
        ending(runtime)
        await runtime.takes()
        assert (await runtime.create({"zerowake.dev/snapshot": "chat"}, MARKED)).HasField("adjust")


async def test_it_comes_back_to_a_runtime_that_was_away(runtime: Runtime, tmp_path: Path) -> None:
    async with connected(runtime, tmp_path):
        path = runtime.path.rename(tmp_path / "away")
        runtime.writer.close()
        await asyncio.sleep(0.5)  # it has tried by then
        path.rename(runtime.path)
        await runtime.takes()


async def test_a_runtime_without_plugins_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NriError, match=r"takes no plugins at .*nri\.sock: No such file or directory; enable NRI"):
        async with plugged(tmp_path / "nri.sock", lambda _pod, _container: None):
            pass
    with socket.socket(socket.AF_UNIX) as listener:  # it listens and says nothing
        listener.bind(str(tmp_path / "silent.sock"))
        listener.listen()
        with pytest.raises(NriError, match="did not answer"):
            async with plugged(tmp_path / "silent.sock", lambda _pod, _container: None):
                pass


async def test_a_runtime_that_refuses(runtime: Runtime) -> None:
    taking = asyncio.create_task(runtime.takes(code=8))
    with pytest.raises(NriError, match="refuses this plugin: no room"):
        async with plugged(runtime.path, lambda _pod, _container: None):
            pass
    await taking


@pytest.mark.parametrize("version", ["v2.1.5", "1.7.27~ds1"])
async def test_a_runtime_that_knows_no_seccomp_policy_of_plugins_is_refused(runtime: Runtime, version: str) -> None:
    """It would skip the policy without a word, and engines be captured that no dump can carry."""
    runtime.version = version
    taking = asyncio.create_task(runtime.takes())
    with pytest.raises(NriError, match=rf"containerd {version} takes no seccomp policy of a plugin, .* have version 2\.2 or later"):
        async with plugged(runtime.path, lambda _pod, _container: None):
            pass
    await asyncio.gather(taking, return_exceptions=True)


@pytest.mark.parametrize("version", ["2.4.2+unknown", "v10.0.1", "of tomorrow"])
async def test_newer_runtimes_and_those_of_unknown_age_are_taken(runtime: Runtime, tmp_path: Path, version: str) -> None:
    runtime.version = version
    async with connected(runtime, tmp_path):
        assert (await runtime.create({"zerowake.dev/snapshot": "chat"}, MARKED)).HasField("adjust")


async def test_a_runtime_that_hangs_up_before_it_has_introduced_itself(runtime: Runtime) -> None:
    async def hangs_up() -> None:
        reader, writer = await runtime.connections.get()
        header = await reader.readexactly(18)
        runtime.writer = writer
        runtime.send(RUNTIME, struct.unpack_from(">I", header, 12)[0], RESPONSE, ttrpc_pb2.Response().SerializeToString())
        writer.close()

    taking = asyncio.create_task(hangs_up())
    with pytest.raises(NriError, match="the container runtime"):
        async with plugged(runtime.path, lambda _pod, _container: None):
            pass
    await taking
