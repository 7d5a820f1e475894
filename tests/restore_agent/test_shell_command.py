"""What a script says is what the shell itself makes of it; what only the shell can know is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from restore_agent.engine.shell_command import ShellCommand, UnclearCommand, script_of

SHOWS = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('A', ''), os.getcwd()]))"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("vllm serve m", ["vllm", "serve", "m"]),
        ("exec vllm serve 'my model' --port=8000", ["exec", "vllm", "serve", "my model", "--port=8000"]),
        ('A=1 B="two 2" exec vllm serve m', ["exec", "vllm", "serve", "m"]),
        ("env A=1 vllm serve m", ["env", "A=1", "vllm", "serve", "m"]),
        ("cd /srv && ulimit -n 65536; exec vllm serve m\n", ["exec", "vllm", "serve", "m"]),
        ("vllm serve m \\\n  --port 8000 \\\n", ["vllm", "serve", "m", "--port", "8000"]),
        ("# a model\nvllm serve m # of ours", ["vllm", "serve", "m"]),
        ("""vllm serve m --extra '{"a": [1, 2]}' --x "\\"q\\" \\$5 \\n" a\\ b""", None),
        ("vllm serve m#1 a=b ''", ["vllm", "serve", "m#1", "a=b", ""]),
    ],
)
def test_the_words_of_a_script_are_those_that_a_shell_makes_of_it(script: str, words: list[str] | None, tmp_path: Path) -> None:
    read = ShellCommand.read(["sh", "-c", script])
    assert read
    if words:
        assert list(read.words) == words
    own = [word for word in read.words if word not in ("exec", "env", "A=1")]
    shown = script.replace("vllm", f'{sys.executable} -c "{SHOWS}" vllm').replace("/srv", str(tmp_path))
    told, variable, folder = json.loads(subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout)
    assert told == own
    again = ShellCommand.read(["sh", "-c", shown])
    assert again
    more = again.saying([*again.words, "--added", "it's {more}"])
    assert json.loads(subprocess.run(more, capture_output=True, text=True, check=True).stdout) == [
        [*own, "--added", "it's {more}"],
        variable,
        folder,
    ], "and what comes before them stays as it was"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("vllm serve $MODEL", r"a variable or a command to be looked up \(\$\)"),
        ('vllm serve "$MODEL"', r"to be looked up \(\$\)"),
        ("vllm serve `cat name`", r"a command to be looked up"),
        ("export A=$(cat name) && vllm serve m", r"to be looked up \(\$\)"),
        ("vllm serve /models/*", "names of files"),
        ("vllm serve ~/m", "home folder"),
        ("vllm serve m | tee log", "a pipe"),
        ("vllm serve m || sleep 9", "a pipe or `||`"),
        ("vllm serve m & wait", "in the background"),
        ("vllm serve m > log", "another output"),
        ("(vllm serve m)", "a group"),
        ("{ vllm serve m; }", "a group"),
        ("if true; then vllm serve m; fi", r"on a condition or again \(if\)"),
        ("while true\ndo vllm serve m\ndone", r"\(while\)"),
        ("vllm serve 'm", "a quote that does not end"),
    ],
)
def test_what_only_the_shell_can_know_is_refused(script: str, why: str) -> None:
    with pytest.raises(UnclearCommand, match=why):
        ShellCommand.read(["bash", "-c", script])


@pytest.mark.parametrize(
    ("command", "script"),
    [
        (["/bin/sh", "-c", "x"], "x"),
        (["bash", "-lc", "x"], "x"),
        (["bash", "-l", "-c", "x", "name"], "x"),
        (["bash", "--norc", "-ec", "x"], "x"),
        (["bash", "-euo", "pipefail", "-c", "x"], "x"),
        (["tini", "--", "/usr/bin/dash", "-c", "x"], "x"),
        (["busybox", "sh", "-c", "x"], "x"),
        (["bash", "start.sh", "-c", "x"], ""),
        (["bash"], ""),
        (["vllm", "serve", "-c", "x"], ""),
        (["sh", "-c"], ""),
    ],
)
def test_a_shell_s_script_is_the_word_after_its_options(command: list[str], script: str) -> None:
    assert script_of(command) == script
    assert bool(ShellCommand.read(command)) is bool(script)


def test_a_script_that_starts_nothing_has_no_words() -> None:
    assert ShellCommand.read(["sh", "-c", "A=1"]) is ShellCommand.read(["sh", "-c", " ;\n"]) is None


def test_what_the_shell_was_told_beside_stays() -> None:
    read = ShellCommand.read(["bash", "-lc", "A='1 2' exec vllm serve m;", "name"])
    assert read and read.saying(["exec", "x", "a b"]) == ["bash", "-lc", "A='1 2' exec x 'a b'", "name"]
