"""Where a process's cgroups lie, read from mountinfo and /proc/PID/cgroup as kernels write them."""

from pathlib import Path

import pytest

from restore_agent.places import cgroups
from restore_agent.places.cgroups import OutOfSight, _hierarchy, cgroup_files, node_process


def test_this_process_is_in_what_is_found() -> None:
    found = cgroup_files(1)
    assert all(path.name == "cgroup.procs" and path.parts[-1] == "cgroup.procs" for path in found)
    assert all(path.is_file() for path in found)


def test_controllers_have_one_name_in_whatever_order() -> None:
    assert _hierarchy(["cpuacct", "cpu"]) == _hierarchy(["rw", "cpu", "cpuacct", "xattr"]) == "cpu,cpuacct"
    assert _hierarchy(["name=systemd"]) == _hierarchy(["rw", "name=systemd"]) == "name=systemd"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node whose pid 1 mounts only the part /pods of each hierarchy."""
    lines = []
    for line in Path("/proc/1/cgroup").read_text().splitlines():
        controllers = line.split(":", 2)[1]
        kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw,nsdelegate"
        lines.append(f"30 24 0:26 /pods /sys/fs/cgroup rw,nosuid shared:9 - {kind}\n")
    (tmp_path / "mountinfo").write_text("".join(lines))
    monkeypatch.setattr(cgroups, "node_process", lambda: str(tmp_path))
    return tmp_path


def test_a_part_that_the_node_does_not_see_is_an_error(node: Path) -> None:
    with pytest.raises(OutOfSight, match="out of sight; run the agent in the node's cgroup namespace"):
        cgroup_files(1)


def test_the_node_is_seen_by_its_first_process() -> None:
    assert Path(node_process(), "mountinfo").exists()
