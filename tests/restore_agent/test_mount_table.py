"""The table of mounts, as the kernel writes it, and what of it a path can lead to."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath

from restore_agent.places.mount_table import parse, read, visible

TABLE = """\
22 28 0:21 / /proc rw,nosuid - proc proc rw
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
29 28 8:1 / /home ro,nosuid,nodev master:2 - xfs /dev/sdb rw
30 28 8:2 / /data/deep rw - ext4 /dev/sdc rw
31 28 8:3 / /data rw - ext4 /dev/sdd ro
32 29 0:40 / /home/a\\040b rw - overlay overlay rw,lowerdir=/x,upperdir=/up\\054per\\040one,workdir=/w
33 29 0:41 / /home rw - tmpfs tmpfs rw
34 33 0:42 / /home/user rw - tmpfs tmpfs rw
"""


def test_what_a_line_says() -> None:
    mounts = {str(mount.point): mount for mount in parse(TABLE)}
    assert mounts["/home/a b"].kind == "overlay"
    assert mounts["/home/a b"].option("upperdir") == "/up,per one"
    assert mounts["/"].option("upperdir") is None
    assert mounts["/home"].flags == {"rw"}
    assert [mount.writable for mount in parse(TABLE)] == [True, True, False, True, False, True, True, True]


def test_what_lies_beneath_another_mount_is_not_seen() -> None:
    """/data/deep was mounted before /data, /home twice."""
    assert [(mount.id, str(mount.point)) for mount in visible(parse(TABLE))] == [
        (28, "/"),
        (31, "/data"),
        (33, "/home"),
        (34, "/home/user"),
        (22, "/proc"),
    ]


def test_the_machine_s_own() -> None:
    """Every mount that is said to be visible is what its path leads to, as the kernel says. Those of other tests come and go."""
    found = {mount.point: mount.id for mount in visible(read())}
    described = {
        point: subprocess.run(["findmnt", "-no", "ID", "-T", point], capture_output=True, text=True, check=False).stdout for point in found
    }
    stayed = {mount.point: mount.id for mount in visible(read())}.items() & found.items()
    assert PurePosixPath("/proc") in dict(stayed)
    for point, number in stayed:
        assert number in map(int, described[point].split()), point
    assert Path("/proc/self/mountinfo").read_text().count("\n") >= len(found)
