"""Why CRIU failed: the cause first and alone, in words with the way out, whatever stands around it in its log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from restore_agent.drivers.criu_log import explain, keep

BEFORE = """\
Warn  (criu/kerndat.c:1290): Can't keep kdat cache on non-tempfs
Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
Warn  (compel/arch/x86/src/lib/infect.c:419): Will restore 1001 with interrupted system call
"""
AFTER = """\
Error (criu/cr-dump.c:1545): Dump files (pid: 1001) failed with -1
Error (criu/cr-dump.c:1975): Dumping FAILED.
"""
# As CRIU 4.2.1 logged them here.
CAUSES = {
    "inet: Unsupported proto 262 for socket 4e555e": r"^the engine has a socket of protocol 262, .* GODEBUG",
    "sockets: BUG! Unknown socket collected (family 40)": r"^the engine has a socket of family 40; have it use TCP",
    "Can't dump file 3 of that type [600] (anon anon_inode:[perf_event])": r"not carried: \[perf_event\]; have",
    "Can't dump file 3 of that type [20600] (chr 10:229)": r"not carried: chr 10:229; have it closed",
    "The packetized mode for pipes is not supported yet": r"^the engine has a pipe in packet mode",
    "Unknown shit 100600 (/secretmem (deleted))": r"^the engine maps something that is not carried: /secretmem",
    "Can't lookup mount=18 for fd=3 path=/memfd:x (deleted)": r"^the engine has memory of huge pages",
    "Can't lookup mount=65 for fd=3 path=/q": r"^the engine has /q open, on a mount .* as a message queue",
    "tun: Net namespace is required to dump tun link": r"/dev/net/tun",
    "Can't dump nested time namespace for 1001": r"has a time namespace of its own",
    "Unknown clock type 9 for 0": r"a timer that wakes the machine",
    "File srv/log has bad size 305 (expect 245)": r"^srv/log has 305 bytes and had 245 when the snapshot was taken",
    "tty: Found dangling tty with sid 1 pgid 1 (pts) on peer fd 0.": r"^the engine has a terminal",
}


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause[:40])
def test_the_cause_is_told_in_one_line_with_the_way_out(cause: str) -> None:
    told = explain([*BEFORE.splitlines(), f"Error (criu/file.c:137): {cause}", *AFTER.splitlines()], BEFORE.splitlines()[1])
    assert re.search(CAUSES[cause], told), told
    assert told.endswith(f"(CRIU: {cause})")
    assert "\n" not in told and "RLIMIT" not in told and "FAILED" not in told


def test_a_cause_that_nobody_knows_is_told_in_criu_s_words_without_those_around_it() -> None:
    cause = "Error (criu/new.c:1): something new is not supported"
    assert explain([*BEFORE.splitlines(), cause, *AFTER.splitlines()]) == "CRIU: something new is not supported"


def test_where_only_callers_speak_the_first_is_told_and_its_answer_before_them() -> None:
    assert explain(AFTER.splitlines()) == "CRIU: Dump files (pid: 1001) failed with -1"
    assert explain(BEFORE.splitlines(), "errno 5") == "CRIU: errno 5"
    assert explain([]) == "CRIU gave no reason"


def test_the_log_is_kept_and_begun_anew_when_it_is_long(tmp_path: Path) -> None:
    log = tmp_path / "criu.log"
    assert keep(log, ["one", "two"], "dump") == f"; its log: {log}"
    assert [line.partition(" ")[2] for line in log.read_text().splitlines()] == ["dump: one", "dump: two"]
    log.write_text("x" * (2 << 20))
    keep(log, ["three"], "restore")
    assert [line.partition(" ")[2] for line in log.read_text().splitlines()] == ["restore: three"]
    assert keep(tmp_path / "nowhere" / "criu.log", ["four"], "dump") == ""
