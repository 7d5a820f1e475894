"""Every command's help is as the golden file has it: a change of what users read is seen in a diff, and meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "help.txt"
RENEW = f"python -m tests.worlds.help_texts > {GOLDEN.relative_to(Path.cwd()) if GOLDEN.is_relative_to(Path.cwd()) else GOLDEN}"


def test_help_texts_are_as_they_were() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ZEROWAKE_", "GPUMEM_", "NODE_"))}
    shown = subprocess.run([sys.executable, "-m", "tests.worlds.help_texts"], capture_output=True, text=True, check=False, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == GOLDEN.read_text(), f"if this is meant: {RENEW}"


def test_every_command_says_what_it_does() -> None:
    for text in GOLDEN.read_text().split("\n$ "):
        command, _, rest = text.partition("\n")
        described = rest.partition("\n\n")[2].strip()
        assert described and not described.startswith("╭"), command
