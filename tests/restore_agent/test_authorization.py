"""Who may call the agent: root on its own socket, and whoever has the scaler's certificate."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from restore_agent.service.authorization import OnlyTheScaler
from tests.worlds.certificates import Authority
from zerowake_shared.tls import TlsFiles, client_credentials, server_credentials


class Obedient(agent_pb2_grpc.AgentServicer):
    """Answers whoever gets through."""

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        return pb.ReleaseResponse()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.NodeUpdate]:
        yield pb.NodeUpdate()


@dataclass
class Fleet:
    """A served agent, and certificates from its own authority."""

    folder: Path
    authority: Authority
    port: int = 0

    def files(self, name: str) -> TlsFiles:
        (folder := self.folder / name).mkdir()
        self.authority.issue(name).write(folder, "tls")
        (folder / "ca.crt").write_bytes(self.authority.certificate)
        return TlsFiles.in_folder(folder)

    def channel(self, name: str) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(f"localhost:{self.port}", client_credentials(self.files(name)))


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    found = Fleet(tmp_path, Authority("zerowake test authority"))
    server = grpc.aio.server(interceptors=[OnlyTheScaler()])
    agent_pb2_grpc.add_AgentServicer_to_server(Obedient(), server)
    server.add_insecure_port(f"unix:{tmp_path / 'agent.sock'}")
    found.port = server.add_secure_port("127.0.0.1:0", server_credentials(found.files("zerowake-agent")))
    await server.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        yield found


async def both(channel: grpc.aio.Channel) -> None:
    """A call that answers once, and one that streams."""
    stub: Any = agent_pb2_grpc.AgentStub(channel)
    await stub.Release(pb.ReleaseRequest())
    assert [update async for update in stub.Watch(pb.WatchRequest())]


async def test_the_scaler_may(fleet: Fleet) -> None:
    async with fleet.channel("zerowake-scaler") as channel:
        await both(channel)


async def test_root_on_the_agents_own_socket_may(fleet: Fleet) -> None:
    async with grpc.aio.insecure_channel(f"unix:{fleet.folder / 'agent.sock'}") as channel:
        await both(channel)


@pytest.mark.parametrize("name", ["another-agent", "zerowake-scaler.evil", "not-zerowake-scaler"])
async def test_another_name_of_the_same_authority_may_not(fleet: Fleet, name: str) -> None:
    async with fleet.channel(name) as channel:
        stub: Any = agent_pb2_grpc.AgentStub(channel)
        for call in (stub.Release(pb.ReleaseRequest()), anext(aiter(stub.Watch(pb.WatchRequest())))):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert name in (error.value.details() or "")
