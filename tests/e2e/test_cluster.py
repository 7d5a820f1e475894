"""The cluster under the tests: it leaves nothing behind, two live beside each other, and its programs can be stopped one by one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.api import Api, condition
from tests.e2e.cluster.archive import write_archive
from tests.e2e.cluster.layout import BIN, CACHE, NODE, SECOND_NODE, Addresses
from tests.e2e.cluster.toolchain import module_sum

REPOSITORY = Path(__file__).parents[2]


class Second:
    """A cluster of its own, with the first one's programs."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.state = cache / "state"
        for shared in ("bin", "images", "keda"):
            (cache / shared).symlink_to(CACHE / shared)

    async def do(self, *words: str) -> str:
        command = [sys.executable, "-m", "tests.e2e.cluster", *words]
        environment = {**os.environ, "ZEROWAKE_CLUSTER_CACHE": str(self.cache)}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()
        return said.decode()

    @property
    def addresses(self) -> Addresses:
        return Addresses(json.loads((self.state / "addresses.json").read_text())["number"])

    def traces(self, addresses: Addresses) -> list[str]:
        """What this machine has of it beyond its cache folder."""
        groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**{addresses.cgroup}")]
        routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout.splitlines()
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        processes = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.cache).encode() in path.read_bytes():
                    processes.append(str(path.parent))
            except OSError:
                continue  # it has just ended
        return [
            *groups,
            *(line for line in routes if f"dev {addresses.interface} " in f"{line} "),
            *(line for line in mounts if str(self.cache) in line),
            *processes,
        ]


@pytest.mark.own_cluster("starts another one beside it")
async def test_a_second_one_obeys_and_leaves_nothing_behind_however_it_ended(api: Api, addresses: Addresses, tmp_path: Path) -> None:
    sysctls = [Path("/proc/sys/kernel/panic"), Path("/proc/sys/vm/overcommit_memory"), Path("/proc/sys/net/ipv4/ip_forward")]
    before = [sysctl.read_text() for sysctl in sysctls]
    second = Second(tmp_path)
    try:
        await second.do("up")
        other = second.addresses
        assert other.node != addresses.node
        async with Api.connect(str(second.state / "admin.kubeconfig")) as there:
            assert [condition(await there.get("Node", "", name), "Ready") for name in (NODE, SECOND_NODE)] == [True, True]
            # Not the first one's: Kubernetes' own controllers look again after up to a minute when it is stopped time and again.
            await second.do("stop", "kube-apiserver")
            with pytest.raises(aiohttp.ClientError):
                await there.get("Node", "", NODE)
            await second.do("start", "kube-apiserver")
            assert await there.get("Node", "", NODE)
        assert second.traces(other)
        assert [sysctl.read_text() for sysctl in sysctls] == before
        assert "running already" in await second.do("up")

        os.kill(int((second.state / "nodes" / NODE / "pid").read_text()), signal.SIGKILL)
        await second.do("down")
        assert second.traces(other) == []
        assert not second.state.exists()
        assert await api.get("Node", "", NODE), "the first one is gone, too"
    finally:
        await second.do("down")


def test_the_same_folder_makes_the_same_archive(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/tool").write_bytes(b"\x7fELF")
    (root / "bin/link").symlink_to("tool")
    for name in ("first", "second"):
        write_archive(root, "zerowake.test/some:1", tmp_path / name, ["/bin/tool"])
        os.utime(root / "bin/tool", (1, 1))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_toolchain_that_was_altered_has_another_sum(tmp_path: Path) -> None:
    sums = set()
    for content in (b"go", b"gone"):
        path = tmp_path / "module.zip"
        with zipfile.ZipFile(path, "w") as files:
            files.writestr("golang.org/toolchain@v0/bin/go", content)
        with zipfile.ZipFile(path) as files:
            sums.add(module_sum(files))
    assert len(sums) == 2
    assert all(one.startswith("h1:") for one in sums)


@pytest.mark.own_cluster("looks at its programs")
def test_every_program_has_the_version_it_is_pinned_to() -> None:
    pins = (REPOSITORY / "tests/e2e/cluster/modules/kubernetes/go.mod").read_text()
    said = subprocess.run([BIN / "kube-apiserver", "--version"], capture_output=True, text=True, check=True).stdout.split()
    assert f"k8s.io/kubernetes {said[-1]}" in pins
