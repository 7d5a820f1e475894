"""What a fault run comes to: its table, and what is kept of it.

python -m tests.chaos.report SEED…     the table of all of them, kept in tests/bench/results/chaos.json
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.__main__ import specs
from tests.chaos import checker
from tests.chaos.journal import read
from tests.chaos.stack import ROOT

JOURNALS = "requests", "engines/journal", "faults", "stack", "leases", "captures", "seen", "told"
_KEPT = ROOT / "tests/bench/results/chaos.json"


def checked(folder: Path) -> list[checker.Violation]:
    """What was wrong in the run of this folder."""
    return checker.check(*(list(read(folder / f"{name}.jsonl")) for name in JOURNALS))


def figures(folders: Sequence[Path]) -> dict[str, Any]:
    """Of these runs together."""
    faults = [line for folder in folders for line in read(folder / "faults.jsonl")]
    done = [line for line in faults if line["what"] == "done"]
    asked = [line for folder in folders for line in read(folder / "requests.jsonl") if line["what"] == "done"]
    leases = [line for folder in folders for line in read(folder / "leases.jsonl") if line["what"] == "got"]
    captures = [line for folder in folders for line in read(folder / "captures.jsonl") if line["what"] == "done"]
    violations = [violation for folder in folders for violation in checked(folder)]
    return {
        "faults": len(done),
        "faults by kind": dict(Counter(f"{line['kind']} {line['victim']}".strip() for line in done).most_common()),
        "faults by moment": dict(Counter(line["moment"] for line in done).most_common()),
        "moments that did not come": len(faults) - len(done),
        "requests": len(asked),
        "requests by end": dict(Counter(_end(line) for line in asked).most_common()),
        "leases": len(leases),
        "captures": len(captures),
        "captures that were refused": sum(bool(line["error"]) for line in captures),
        "answers to KEDA": sum(1 for folder in folders for _ in read(folder / "told.jsonl")),
        "quiet moments": sum(1 for folder in folders for _ in read(folder / "seen.jsonl")),
        "violations": len(violations),
        "violations by kind": dict(Counter(violation.kind for violation in violations).most_common()),
    }


def planted(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each run with a bug in it: how many faults it took, and as what it was found."""
    found = {}
    for each in sorted(folder.glob("*-*")):
        faults = sum(line["what"] == "done" for line in read(each / "faults.jsonl"))
        kinds = Counter(violation.kind for violation in checked(each))
        found[each.name.partition("-")[2]] = {"faults": faults, "found as": dict(kinds.most_common())}
    return found


def said(folders: Sequence[Path]) -> str:
    """The table."""
    found = figures(folders)
    rows = [f"| {name} | {value} |" for name, value in found.items() if isinstance(value, int)]
    rows += [
        f"| {name} | {', '.join(f'{each} {count}' for each, count in value.items())} |"
        for name, value in found.items()
        if isinstance(value, dict)
    ]
    return "\n".join(("| figure | measured |", "| --- | --- |", *rows))


def _end(line: dict[str, Any]) -> str:
    if line["error"]:
        return "left" if line["kind"] == "leaver" else "broken by a fault"
    return "left" if not line["status"] else "answered" if line["status"] == 200 else f"refused with {line['status']}"


def main() -> None:
    folders = [ROOT / ".cache/chaos" / seed for seed in sys.argv[1:]]
    command = "make chaos SEED=… FAULTS=…, and python -m tests.chaos.report " + " ".join(sys.argv[1:])
    kept = {"command": command, "time": time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime()), "machine": specs(), "seeds": sys.argv[1:]}
    _KEPT.write_text(json.dumps(kept | figures(folders) | {"planted": planted(ROOT / ".cache/chaos")}, indent=1) + "\n")
    print(said(folders))


if __name__ == "__main__":
    main()
