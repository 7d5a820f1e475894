"""Pods of a real kubelet that a real agent restores into: what answers in them was dumped in another pod. And tenants who mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import gpumem_pb2

from gpumem.client.control import Control
from restore_agent.snapshots.keyring import Keyring
from tests.e2e.api import Api, ApiError, Object, condition
from tests.e2e.cluster.control import enter
from tests.e2e.cluster.layout import NODE
from tests.e2e.node_agent import IMAGE, PORT, Agent, answer, captured_or_not, events, pod, run_in, wanted_bytes
from tests.worlds.pool import Pool
from tests.worlds.published import BYTES, FOLDER, publishing

pytestmark = pytest.mark.own_cluster("runs an agent of its own on the node")
# What the engine changes in its container's file system on the way: a file that comes, and one that goes.
SERVER = "echo written >/etc/zerowake-test && rm /etc/debian_version && exec python3 -u /server.py $(WORDS)"
WAITS = "echo started cold; exec sleep 1000"
# What io_uring_setup, the system call 425, is answered.
IO_URING = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.syscall(425, 1, None); print(ctypes.get_errno())"


def restored(agent: Agent, name: str, **spec: Any) -> Object:
    return pod(agent, name, {"zerowake.dev/snapshot": "small"}, ["sh", "-c", SERVER], **spec)


async def capture(api: Api, agent: Agent, namespace: str, command: str = SERVER, name: str = "small") -> dict[str, str]:
    """The annotations of the capture pod when it has ended."""
    await api.apply(pod(agent, f"capture-{name}", {"zerowake.dev/capture": name}, ["sh", "-c", command]), namespace=namespace)
    return await captured_or_not(api, namespace, name)


async def started_cold(api: Api, namespace: str, name: str) -> None:
    """Its own command has spoken, and nothing else."""
    log = ""
    async with asyncio.timeout(30):
        while not log:
            await asyncio.sleep(0.1)  # the event may come before the command's first word
            with contextlib.suppress(ApiError):  # and before the kubelet has seen that the container runs
                log = await api.log_of(namespace, name)
    assert log == "started cold\n", name


async def watch(agent: Agent) -> AsyncIterator[pb.Replica]:
    async with agent.stub() as stub:
        async for update in stub.Watch(pb.WatchRequest()):
            if update.HasField("replica"):
                yield update.replica


def manifest(agent: Agent, namespace: str) -> Any:
    return json.loads((agent.state / f"names/{namespace}/small").resolve().joinpath("manifest.json").read_text())


async def test_what_answers_in_the_pod_was_dumped_in_another(api: Api, namespace: str, running: Agent) -> None:
    annotations = await capture(api, running, namespace)
    assert annotations.get("zerowake.dev/captured"), annotations
    heard = watch(running)
    begin = time.monotonic()
    await api.apply(restored(running, "one"), namespace=namespace)
    async with asyncio.timeout(60):
        replica = await anext(heard)
    told = time.monotonic() - begin
    assert replica.origin == pb.ORIGIN_RESTORED
    assert (replica.snapshot.namespace, replica.snapshot.name) == (namespace, "small")
    known = manifest(running, namespace)
    assert await answer(replica.endpoint.host) == json.loads(known["canary"]["answer"])
    ready = await api.until("Pod", namespace, "one", lambda one: condition(one, "Ready"))
    print(f"the agent's word came {told:.2f} s after the pod was made, the kubelet's {time.monotonic() - begin:.2f} s")
    assert ready
    assert ready["status"]["podIP"] == replica.endpoint.host
    assert replica.endpoint.netns == ""
    assert await answer(replica.endpoint.host, "/outside") in ({"ended": each} for each in ("ConnectionResetError", "read b''"))
    said = dict(await events(api, namespace, "one", "Restored"))["Restored"]
    assert known["namespace"] in said
    shown = await run_in(namespace, "one", "cat /etc/zerowake-test; ls /etc/debian_version")
    assert shown.startswith("written\n")
    groups = await run_in(namespace, "one", f"cat /proc/1/cgroup; echo; cat /proc/{known['root_pid']}/cgroup")
    first, engine = (each.strip() for each in groups.split("\n\n"))
    # With cgroup v2 a container sees its own group as the root, and whoever is outside of it beside that.
    assert first == "0::/" or f"/pod{ready['metadata']['uid']}/" in first, "in the kubelet's cgroup for this pod"
    assert engine == first
    assert "No such file" in shown, "what the engine removed is gone here too"
    filtered = await run_in(namespace, "one", f"grep -h Seccomp: /proc/1/status /proc/{known['root_pid']}/status; python3 -c '{IO_URING}'")
    assert filtered.split() == ["Seccomp:", "2"] * 2 + ["38"], "no profile lies on the node, and the runtime put the agent's on: ENOSYS"
    # A pod that is being deleted is gone for the gateway before its process is.
    await api.delete("Pod", namespace, "one")
    async with asyncio.timeout(30):
        gone = await anext(heard)
    assert gone.state == pb.REPLICA_RETIRING
    async with asyncio.timeout(60):
        assert (await anext(heard)).state == pb.REPLICA_GONE
    assert "deleted" in gone.detail
    await heard.aclose()


HOSTILE: dict[str, tuple[dict[str, Any], str, str]] = {
    "hostnetwork": ({"hostNetwork": True}, "SnapshotRefused", "hostNetwork"),
    "hostpid": ({"hostPID": True}, "SnapshotRefused", "hostPID"),
    "hostipc": ({"hostIPC": True}, "SnapshotRefused", "hostIPC"),
    "hostpath": ({"volumes": [{"name": "node", "hostPath": {"path": "/"}}]}, "SnapshotRefused", "a folder of the node"),
    "ours": ({"volumes": [{"name": "node", "hostPath": {"path": "/run/zerowake/placeholder"}}]}, "SnapshotRefused", "a folder of the node"),
    "privileged": ({"container": {"securityContext": {"privileged": True}}}, "RestoreFailed", "rights over the node"),
    "caps": ({"container": {"securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}}}}, "RestoreFailed", "rights over the node"),
}


async def test_pods_that_reach_for_the_node_are_refused_and_start_cold(api: Api, namespace: str, running: Agent) -> None:
    assert (await capture(api, running, namespace)).get("zerowake.dev/captured")
    for name, (spec, _, _) in HOSTILE.items():
        await api.apply(pod(running, name, {"zerowake.dev/snapshot": "small"}, ["sh", "-c", WAITS], **dict(spec)), namespace=namespace)
    for name, (_, reason, words) in HOSTILE.items():
        found = await events(api, namespace, name, reason, "ColdStarted")
        assert words in dict(found)[reason], (name, found)
        await started_cold(api, namespace, name)


async def test_names_that_belong_to_others_or_to_nobody(api: Api, namespace: str, running: Agent) -> None:
    """Another namespace's snapshot, a name with path tricks, a digest that is not there."""
    assert (await capture(api, running, namespace)).get("zerowake.dev/captured")
    stranger = f"{namespace[:50]}-x"
    await api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": stranger}})
    try:
        await api.until("ServiceAccount", stranger, "default", lambda one: one)
        cold = ["sh", "-c", WAITS]
        await api.apply(pod(running, "thief", {"zerowake.dev/snapshot": "small"}, cold), namespace=stranger)
        await api.apply(pod(running, "path", {"zerowake.dev/snapshot": "a..b"}, cold), namespace=namespace)
        forged = pod(running, "digest", {"zerowake.dev/snapshot": "small"}, cold)
        forged["metadata"]["annotations"]["zerowake.dev/digest"] = "ab" * 32
        await api.apply(forged, namespace=namespace)
        for where, name, reason, words in (
            (stranger, "thief", "RestoreFailed", f"no snapshot {stranger}/small"),
            (namespace, "path", "SnapshotRefused", "is not allowed"),
            (namespace, "digest", "RestoreFailed", "not abababab"),
        ):
            found = dict(await events(api, where, name, reason, "ColdStarted"))
            assert words in found[reason], found
            await started_cold(api, where, name)
    finally:
        await api.delete("Pod", stranger, "thief", grace_seconds=0)
        await api.delete("Namespace", "", stranger)


async def test_an_edited_manifest_and_a_foreign_signature_are_found(api: Api, namespace: str, running: Agent, tmp_path: Path) -> None:
    assert (await capture(api, running, namespace)).get("zerowake.dev/captured")
    folder = (running.state / f"names/{namespace}/small").resolve()
    manifest, whole = folder / "manifest.json", (folder / "manifest.json").read_bytes()
    foreign = Keyring(tmp_path / "foreign")
    foreign.make()

    def edit() -> None:
        manifest.write_bytes(whole.replace(b'"port":8000', b'"port":8001'))

    def sign() -> None:
        manifest.write_bytes(whole)
        (folder / "signature.json").write_bytes(foreign.sign(whole).encode())

    for name, spoil, words in (
        ("edited", edit, "changed after it was published"),
        ("foreign", sign, f"it is signed by key {foreign.signing}, which is not trusted here"),
    ):
        spoil()
        await api.apply(pod(running, name, {"zerowake.dev/snapshot": "small"}, ["sh", "-c", WAITS]), namespace=namespace)
        found = dict(await events(api, namespace, name, "RestoreFailed", "ColdStarted"))
        assert words in found["RestoreFailed"], found


async def test_a_cold_pod_serves_and_is_known(api: Api, namespace: str, running: Agent) -> None:
    heard = watch(running)
    cold = restored(running, "one")
    await api.apply(cold, namespace=namespace)
    async with asyncio.timeout(60):
        replica = await anext(heard)
    assert replica.origin == pb.ORIGIN_COLD
    assert (replica.snapshot.namespace, replica.snapshot.name, replica.model) == (namespace, "", "small")
    assert "no snapshot" in replica.detail
    await answer(replica.endpoint.host)
    await heard.aclose()


async def test_a_pod_without_a_placeholder_serves_too(api: Api, namespace: str, running: Agent) -> None:
    """Opted out, or made while the webhook or the agent was away: it would be ready, and requests would wait for another."""
    heard = watch(running)
    engine = {"name": "engine", "image": IMAGE, "imagePullPolicy": "Never", "ports": [{"containerPort": PORT}]}
    metadata = {"name": "plain", "labels": {"zerowake.dev/snapshot": "small"}}
    await api.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"nodeName": running.node, "containers": [engine], "terminationGracePeriodSeconds": 1},
        },
        namespace=namespace,
    )
    async with asyncio.timeout(60):
        replica = await anext(heard)
    assert (replica.origin, replica.model, replica.snapshot.namespace) == (pb.ORIGIN_COLD, "small", namespace)
    await answer(replica.endpoint.host)
    await api.delete("Pod", namespace, "plain")
    async with asyncio.timeout(60):
        gone = await anext(heard)
    assert (gone.id, gone.state) == (replica.id, pb.REPLICA_RETIRING)
    await heard.aclose()


async def test_the_image_s_own_entrypoint(api: Api, namespace: str, running: Agent) -> None:
    """A pod that names no command: it is the image's, and the pod's arguments follow it."""
    plain = restored(running, "one", container={"command": None, "args": [str(PORT), "1", "/mapped"]})
    await api.apply(plain, namespace=namespace)
    assert await api.until("Pod", namespace, "one", lambda one: condition(one, "Ready"))
    shown = await run_in(namespace, "one", "tr '\\0' ' ' </proc/1/cmdline; env")
    assert shown.startswith(f"python3 -u /server.py {PORT} 1 /mapped ")


async def test_an_agent_that_is_killed_loses_no_pod(api: Api, namespace: str, agent: Agent) -> None:
    with agent.running():
        await agent.ready()
        assert (await capture(api, agent, namespace)).get("zerowake.dev/captured")
        await api.apply(restored(agent, "one"), namespace=namespace)
        await api.apply(pod(agent, "cold", {"zerowake.dev/snapshot": "none"}, ["sh", "-c", SERVER]), namespace=namespace)
        pods = {name: await api.until("Pod", namespace, name, lambda one: condition(one, "Ready")) for name in ("one", "cold")}
        agent.signal(signal.SIGKILL)
    addresses = {name: one["status"]["podIP"] for name, one in pods.items() if one}
    expected = json.loads(manifest(agent, namespace)["canary"]["answer"])
    assert await answer(addresses["one"]) == expected, "nobody needs the agent to go on"
    # A pod that is made while there is none starts as it always did.
    await api.apply(restored(agent, "late"), namespace=namespace)
    assert await api.until("Pod", namespace, "late", lambda one: condition(one, "Ready"))
    with agent.running():
        found: dict[str, pb.Replica] = {}
        async with asyncio.timeout(60):
            async for replica in watch(agent):
                found[replica.endpoint.host] = replica
                if len(found) == 3:
                    break
        assert found[addresses["one"]].origin == pb.ORIGIN_RESTORED
        assert found[addresses["cold"]].origin == pb.ORIGIN_COLD
        late = await api.until("Pod", namespace, "late", lambda one: condition(one, "Ready"))
        assert late
        assert found[late["status"]["podIP"]].origin == pb.ORIGIN_COLD
        assert all(one["restartCount"] == 0 for one in late["status"]["containerStatuses"])


async def test_an_engine_that_ends_soon_after_is_started_cold(api: Api, namespace: str, running: Agent) -> None:
    assert (await capture(api, running, namespace)).get("zerowake.dev/captured")
    await api.apply(restored(running, "one"), namespace=namespace)
    ready = await api.until("Pod", namespace, "one", lambda one: condition(one, "Ready"))
    assert ready
    with contextlib.suppress(aiohttp.ClientError):
        await answer(ready["status"]["podIP"], "/exit")
    again = await api.until("Pod", namespace, "one", lambda one: one and one["status"]["containerStatuses"][0]["restartCount"] == 1)
    assert again
    assert again["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 3, "the engine's own"
    found = [note for reason, note in await events(api, namespace, "one", "RestoreFailed") if reason == "RestoreFailed"]
    assert "within a minute" in found[0]
    assert await api.until("Pod", namespace, "one", lambda one: condition(one, "Ready"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo no; exit 5", "exit code 5. It printed: no"),
        ("cp /server.py /mnt/x; exec python3 -u /server.py 8000 1 /mnt/x", "emptyDir"),
        ("exec sleep 99", "/sum"),
    ],
)
async def test_a_capture_that_fails_says_why(api: Api, namespace: str, running: Agent, command: str, words: str) -> None:
    wanted = pod(
        running, "capture-small", {"zerowake.dev/capture": "small"}, ["sh", "-c", command], volumes=[{"name": "scratch", "emptyDir": {}}]
    )
    mount = [{"name": "scratch", "mountPath": "/mnt"}]
    wanted["spec"]["containers"][0]["volumeMounts"] = mount
    fills = {"name": "fills", "image": IMAGE, "imagePullPolicy": "Never", "command": ["true"], "volumeMounts": mount}
    wanted["spec"]["initContainers"] = [fills]  # what only the engine has is carried with it
    if words == "/sum":
        wanted["metadata"]["annotations"]["zerowake.dev/canary"] = json.dumps({"path": "no/slash"})
        words = "does not begin with /"
    if "cp" in command:
        wanted["spec"]["containers"][0]["command"][-1] = "cp /mapped /mnt/x; exec python3 -u /server.py 8000 1 /mnt/x"
    await api.apply(wanted, namespace=namespace)
    done = await api.until("Pod", namespace, "capture-small", lambda one: one and one["status"]["phase"] in ("Succeeded", "Failed"), 120)
    assert done
    assert words in done["metadata"]["annotations"]["zerowake.dev/capture-failed"]
    assert "zerowake.dev/captured" not in done["metadata"]["annotations"]
    assert words in dict(await events(api, namespace, "capture-small", "CaptureFailed"))["CaptureFailed"]


async def test_lent_weights(api: Api, namespace: str, running: Agent, tmp_path: Path) -> None:
    """An engine in an image without any of ours publishes its weights by what is put into its container; they are in no image, and two
    pods have one region. What its owner wrote into PYTHONPATH is still there."""
    server = publishing("python3", ["python3", "-u", "/server.py", str(PORT), "16", "/mapped"], tmp_path / "weights")
    shows = 'echo "modules: $PYTHONPATH"; exec "$@"'
    lends = {"name": "OWN_WEIGHTS", "value": FOLDER}
    own = {"name": "PYTHONPATH", "value": "/opt/mine"}
    container = {"command": ["sh", "-c", shows, "sh", *server], "env": [lends, own]}

    def lent(name: str, labels: dict[str, str]) -> Object:
        made = pod(running, name, labels, [], container=container)
        made["metadata"]["annotations"]["zerowake.dev/gpumem"] = "true"
        return made

    async with Pool(running.folder / "gpumem.sock") as pool:
        await api.apply(lent("capture-small", {"zerowake.dev/capture": "small"}), namespace=namespace)
        assert (await captured_or_not(api, namespace, "small")).get("zerowake.dev/captured")
        assert "modules: /opt/mine:/run/zerowake/python/" in await api.log_of(namespace, "capture-small")
        assert "101 MB of weights are lent" in dict(await events(api, namespace, "capture-small", "Captured"))["Captured"]
        kept = manifest(running, namespace)
        assert [record["size"] for record in kept["weights"]] == [BYTES]
        assert sum(chunk["size"] for chunk in kept["chunks"]) + sum(file["size"] for file in kept["files"].values()) < BYTES
        async with Control.connected(pool.socket) as control:
            for region in (await control.status()).regions:
                await control.evict(gpumem_pb2.RegionRef(device=region.device, id=region.id))
        for name in ("one", "two"):
            await api.apply(lent(name, {"zerowake.dev/snapshot": "small"}), namespace=namespace)
        for name in ("one", "two"):
            ready = await api.until("Pod", namespace, name, lambda one: one and condition(one, "Ready"))
            assert ready and await answer(ready["status"]["podIP"]) == json.loads(kept["canary"]["answer"])
            assert "Restored" in dict(await events(api, namespace, name, "Restored"))
        (region,) = (await pool.status()).regions
        assert (region.namespace, region.leases, region.sealed) == (namespace, 2, True)


async def test_a_gpu_that_another_pod_is_given_is_given_back(api: Api, namespace: str, running: Agent, tmp_path: Path) -> None:
    """gpumem on the host's memory, whose device is called `host`; the kubelet hands out a device of that name."""
    resource = f"zerowake.test/{secrets.token_hex(3)}"
    gpumem = [sys.executable, "-c", "from gpumem.programs.commands import app; app()"]
    plugin = [
        *enter(),
        sys.executable,
        str(Path(__file__).parent / "device_plugin.py"),
        "/var/lib/kubelet/device-plugins",
        resource,
        "host",
    ]
    with contextlib.ExitStack() as stack:

        def started(command: list[str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        started([*gpumem, "serve", "--reserve", "256M", "--device", "host", "--socket", str(running.folder / "gpumem.sock")])
        registered = started(plugin)
        assert registered.stdout
        assert await asyncio.to_thread(registered.stdout.readline) == "registered\n"
        await api.until("Node", "", NODE, lambda one: one and one["status"]["allocatable"].get(resource) == "1")
        assert await wanted_bytes(gpumem, running) == 256 << 20
        foreign = {
            "name": "job",
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "command": ["sleep", "1000"],
            "resources": {"limits": {resource: 1}},
        }
        begin = time.monotonic()
        await api.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "foreign"},
                "spec": {"containers": [foreign], "terminationGracePeriodSeconds": 0},
            },
            namespace=namespace,
        )
        while await wanted_bytes(gpumem, running):
            assert time.monotonic() - begin < 30
        print(f"given back {time.monotonic() - begin:.2f} s after the pod was made")
        await api.delete("Pod", namespace, "foreign", grace_seconds=0)
        begin = time.monotonic()
        while await wanted_bytes(gpumem, running) != 256 << 20:
            assert time.monotonic() - begin < 30


def test_nothing_of_the_agents_is_left(agent: Agent) -> None:
    shown = subprocess.run([*enter(), "ls", str(agent.placeholder)], capture_output=True, text=True, check=True).stdout.split()
    assert shown == ["zerowake-placeholder"], "the socket goes with the agent"
    assert os.listdir(agent.state / "tmp") == []  # noqa: PTH208
