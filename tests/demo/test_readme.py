"""README's "Serve your own models on one machine", every command of it as it stands there, in its order, with the demo's chat model.

They run on a network of their own, with a /var/lib of their own, so that ports and folders are the README's. What README leaves open
(NAME, URL) is filled in by `FILLED`; a bucket is a folder here, which README allows: what is put into real buckets is tested by
tests/restore_agent. Each line's alternatives are run apart. What takes away what others need comes last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worlds.readme_commands import ROOT, Command, alternatives, blocks, commands
from tests.worlds.waiting import blocking_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces")

SECTION = "Serve your own models on one machine"
FILLED = {
    "NAME --to s3://BUCKET/PREFIX …": "second --to file://{folder}/first --port 8000 -- python deploy/demo/chat.py --port 8000",
    "s3://BUCKET/PREFIX": "file://{folder}/first",
    "--from URL --to URL": "--from file://{folder}/first --to file://{folder}/copied",
    "URL": "file://{folder}/copied",
    "simulate FILE": "simulate {folder}/scenario.yaml",
    "trust FILE": "trust {folder}/other/trusted/{key}.pem",
    "KEY": "{key}",
    "ID": "{activation}",
    "NAME": "chat",
    "MODEL": "chat",
    "SECONDS": "60",
}
LAST = ("zerowake snapshot rm NAME", "zerowake key ")
SAYS = {
    "zerowake status": "chat",
    "zerowake plan --why MODEL": "chat",
    "zerowake trace": "restored",
    "zerowake trace -o yaml": "phases:",
    "zerowake snapshot list": "chat",
    "zerowake standby NAME": "standby",
    "zerowake simulate FILE": "zerowake",
    "zerowake key list": "signs",
}
# A machine may lack what is looked for: then the exit code is 1.
MAY_FIND_FAULTS = ("zerowake doctor", "zerowake bundle")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This one, seen from a folder that README's zerowake.yaml can be in."""
    folder = tmp_path_factory.mktemp("readme")
    for each in ("first", "copied"):
        (folder / each).mkdir()
    for each in ("deploy", ".venv"):
        (folder / each).symlink_to(ROOT / each)
    (yaml,) = [each.content for each in blocks("README.md") if each.content.startswith("# zerowake.yaml;")]
    (folder / "zerowake.yaml").write_text(yaml)
    (folder / "trace.csv").write_text("0,a,0\n1000,a,0\n")
    (folder / "scenario.yaml").write_text("models: {list: {a: 10GB}}\nscore: all\ntrace: {csv: trace.csv}\n")
    return folder


@pytest.fixture(scope="module")
def run(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a line of bash there and returns what it printed; `into`: a file for that, where something goes on."""
    own = tmp_path_factory.mktemp("varlib")
    prepare = f"ip link set lo up && mount --bind {own} /var/lib && echo ready && exec cat"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "KUBECONFIG": "/dev/null"}
    with subprocess.Popen(
        ["unshare", "--mount", "--net", "sh", "-c", prepare], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"

        def run(line: str, codes: tuple[int, ...] = (0,), into: Path = checkout / "printed") -> str:
            there = ["nsenter", "--target", str(holder.pid), "--mount", "--net", "bash", "-euc", f"cd {checkout}\n{line}"]
            with into.open("w") as printed:
                done = subprocess.run(there, stdout=printed, stderr=subprocess.STDOUT, env=environment, check=False)
            said = into.read_text()
            assert done.returncode in codes, f"{line}\n{said}"
            return said

        yield run
        assert holder.stdin is not None
        holder.stdin.close()


@pytest.fixture(scope="module")
def served(run: Run, checkout: Path) -> Iterator[str]:
    """The first block, run in one go as a user pastes it; what it printed at last."""
    first, *_ = [block for block in blocks("README.md") if block.section == SECTION]
    pid = checkout / "up.pid"
    block = first.content.replace("zerowake.yaml &\n", f"zerowake.yaml &\necho $! >{pid}\n")
    assert block != first.content
    try:
        said = run(block, into=checkout / "up.log")
        yield said
    finally:
        if pid.exists():
            run(f"! kill $(cat {pid}) || tail --pid=$(cat {pid}) -f /dev/null")


def listed() -> list[Command]:
    """All but the first block's, which are run at once."""
    every = [each for each in commands() if each.section == SECTION]
    assert [each.text.split()[0] for each in every[:3]] == ["zerowake", "zerowake", "curl"]
    return every[3:]


def test_a_snapshot_is_taken_served_and_asked(served: str) -> None:
    answer = json.loads(served[served.index('{"id"') :].splitlines()[0])
    assert answer["choices"][0]["message"]["content"]


def test_every_other_command(served: str, run: Run, checkout: Path) -> None:
    run("zerowake key make --keys other")
    (key,) = (checkout / "other/trusted").glob("*.pem")
    started = json.loads(run("zerowake trace -o json"))
    names = {"folder": checkout, "key": key.stem, "activation": started["id"]}
    every = [(line, each) for line in listed() for each in alternatives(line.text)]
    assert len(every) > 40
    for line, command in sorted(every, key=lambda each: each[1].startswith(LAST) and " --store" not in each[1]):
        concrete = command
        for open_, filled in FILLED.items():
            concrete = concrete.replace(open_, filled) if f"{open_} " in f"{command} " else concrete
        concrete = concrete.format(**names)
        print(f"{line.page}:{line.line}: {concrete}")
        if "--watch" in concrete:
            watch(run, concrete, checkout)
            continue
        said = run(concrete, (0, 1) if command.startswith(MAY_FIND_FAULTS) else (0,))
        assert SAYS.get(command, "") in said, said
        if "-o json" in command:
            assert json.loads(said)["model"] == "chat"


def watch(run: Run, command: str, checkout: Path) -> None:
    """It goes on until it is told to end; until then it shows the model."""
    shown = checkout / "watched"
    shown.touch()
    run(f"{command} >{shown} 2>&1 &\necho $! >{checkout}/watch.pid")
    try:
        blocking_until(lambda: "chat" in shown.read_text(), command)
    finally:
        run(f"kill $(cat {checkout}/watch.pid)")
