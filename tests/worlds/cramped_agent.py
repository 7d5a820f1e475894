"""An agent with snapshots m0 and on, and room for a few replicas, in the place of `zerowake agent`:
`python -m tests.worlds.cramped_agent ROOM MODELS … --state STATE …`.

A restore takes a tenth of a second; a replica is an HTTP server of this process. `counts.json` in the state folder has what it was asked
and did.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from tests.worlds.fake_agent import Agent
from tests.worlds.json_answers import json_server

RESTORE_SECONDS = 0.1


class CrampedAgent(Agent):
    """room: replicas at once; port: of what answers for all of them."""

    def __init__(self, room: int, port: int, counts: Path) -> None:
        super().__init__("cramped")
        self._room = room
        self._port = port
        self._file = counts
        self._counts: Counter[str] = Counter()
        self._here: set[str] = set()

    async def Restore(self, request: agent_pb2.RestoreRequest, context: Any) -> agent_pb2.RestoreResponse:
        if len(self._here) >= self._room:
            self._count("refused")
            context.set_trailing_metadata((("zerowake-reason", "no-room"),))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the node has room for {self._room} replicas, and has them")
        name = f"r{self._counts['made']}"
        self._here.add(name)
        self._counts["most"] = max(self._counts["most"], len(self._here))
        self._count("made")
        await asyncio.sleep(RESTORE_SECONDS)
        replica = self.replicas[name] = agent_pb2.Replica(
            id=name,
            model=request.model,
            snapshot=request.snapshot,
            state=agent_pb2.REPLICA_READY,
            origin=agent_pb2.ORIGIN_RESTORED,
            endpoint=agent_pb2.Endpoint(host="127.0.0.1", port=self._port),
        )
        self.says(agent_pb2.NodeUpdate(replica=replica))
        return agent_pb2.RestoreResponse(replica=replica)

    async def Release(self, request: agent_pb2.ReleaseRequest, context: Any) -> agent_pb2.ReleaseResponse:
        self._here.discard(request.replica_id)
        self._count("released")
        if replica := self.replicas.pop(request.replica_id, None):
            replica.state = agent_pb2.REPLICA_ENDED
            self.says(agent_pb2.NodeUpdate(replica=replica))
        return agent_pb2.ReleaseResponse()

    def _count(self, what: str) -> None:
        self._counts[what] += 1
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self._counts))
        new.replace(self._file)


async def _serve(room: int, models: int, state: Path) -> None:
    engine = json_server(0, lambda path: (HTTPStatus.OK, {"path": path}))
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    agent = CrampedAgent(room, engine.server_address[1], state / "counts.json")
    for number in range(models):
        agent.has("default", f"m{number}", f"{number:064x}", size=1000)
    server = grpc.aio.server()
    agent_pb2_grpc.add_AgentServicer_to_server(agent, server)
    socket = state / "agent.sock"
    socket.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[sys.argv.index("--state") + 1])))
