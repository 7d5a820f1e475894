"""deploy/prometheus/metrics.yaml, which names every metric, and what the code declares, read out of its syntax.

`python -m tests.worlds.metric_catalogue` writes what the code declares into the catalogue, and its table into the README beside it.
The code is read and not run: a collector's metrics are declared where it collects, which needs a node, a ledger, a forecast.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CATALOGUE = ROOT / "deploy/prometheus/metrics.yaml"
README = ROOT / "deploy/prometheus/README.md"
_BEGIN, _END = "<!-- the table of metrics.yaml -->", "<!-- its end -->"
# Which program shows what a folder's code counts; what both use, both show.
_PROCESSES = {"scaler": ("scaler",), "restore_agent": ("agent",), "proto/zerowake_shared": ("scaler", "agent")}
_TYPES = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}
_UNITS = ("seconds", "bytes", "bytes_per_second", "nats")
_ADDED = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@dataclass(frozen=True)
class Metric:
    """One metric. unit: empty: it counts things. processes: that show it: scaler, agent."""

    name: str
    type: str
    unit: str
    labels: tuple[str, ...]
    processes: tuple[str, ...]
    help: str

    @property
    def family(self) -> str:
        """Its name as its client library has it."""
        return self.name.removesuffix("_total")

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a query may ask for."""
        return tuple(self.family + each for each in _ADDED[self.type])

    def entry(self) -> dict[str, Any]:
        found = {"name": self.name, "type": self.type, "unit": self.unit, "labels": list(self.labels), "processes": list(self.processes)}
        return {key: value for key, value in found.items() if value} | {"help": self.help}


def listed() -> dict[str, Metric]:
    """The catalogue, by name."""
    found = [
        Metric(each["name"], each["type"], each.get("unit", ""), tuple(each.get("labels", ())), tuple(each["processes"]), each["help"])
        for each in yaml.safe_load(CATALOGUE.read_text())["metrics"]
    ]
    assert len({each.name for each in found}) == len(found), "a metric is listed twice"
    return {each.name: each for each in found}


def bounds() -> dict[str, str]:
    """What the values of each label are, and how many there can be."""
    found: dict[str, str] = yaml.safe_load(CATALOGUE.read_text())["labels"]
    return found


def declared() -> dict[str, Metric]:
    """What the code declares, by name."""
    found: dict[str, Metric] = {}
    for folder, processes in _PROCESSES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            for metric in _of(ast.parse(path.read_text()), processes):
                assert metric.name not in found, f"{metric.name} is declared twice, the second time in {path}"
                found[metric.name] = metric
    return found


def _of(module: ast.Module, processes: tuple[str, ...]) -> Iterator[Metric]:
    assigned = {
        target.id: node.value
        for node in ast.walk(module)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def value(node: ast.expr) -> Any:
        return ast.literal_eval(assigned[node.id] if isinstance(node, ast.Name) else node)

    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        kind = _TYPES.get(node.func.id.removesuffix("MetricFamily"))
        if kind is None or len(node.args) < 2 or not isinstance(node.args[0], ast.Constant):
            continue
        name = str(node.args[0].value)
        if kind == "counter":
            name = name.removesuffix("_total") + "_total"
        given = [*node.args[2:3], *(each.value for each in node.keywords if each.arg in ("labels", "labelnames"))]
        labels = tuple(value(given[0])) if given else ()
        yield Metric(name, kind, unit_of(name), labels, processes, value(node.args[1]).rstrip("."))


def unit_of(name: str) -> str:
    stem = name.removesuffix("_total")
    return max((unit for unit in _UNITS if stem.endswith(f"_{unit}")), key=len, default="")


def shown(text: str) -> dict[str, set[str]]:
    """Names of a page of metrics, each with the labels that it has there; Prometheus' client's own are left out."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(zerowake_\w+)(?:\{(.*?)\})? ", text, re.MULTILINE):
        if not name.endswith("_created"):
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def table() -> str:
    rows = ["| metric | type | labels | shown by | what it is |", "| --- | --- | --- | --- | --- |"]
    for each in listed().values():
        labels = ", ".join(f"`{label}`" for label in each.labels)
        text = each.help.replace("|", "\\|")
        rows.append(f"| `{each.name}` | {each.type} | {labels} | {', '.join(each.processes)} | {text} |")
    rows += ["", "| label | its values |", "| --- | --- |"]
    rows += [f"| `{label}` | {values} |" for label, values in bounds().items()]
    return "\n".join(rows)


def table_of_readme() -> str:
    return README.read_text().split(_BEGIN)[1].split(_END)[0].strip()


def _write() -> None:
    labels = bounds()
    metrics = [each.entry() for _, each in sorted(declared().items())]
    head = "".join(line for line in CATALOGUE.read_text().splitlines(keepends=True) if line.startswith("#"))
    dump = {"width": 130, "sort_keys": False, "default_flow_style": None, "allow_unicode": True}
    bounded = yaml.safe_dump({"labels": labels}, **(dump | {"default_flow_style": False}))
    CATALOGUE.write_text(head + bounded + yaml.safe_dump({"metrics": metrics}, **dump))
    before, rest = README.read_text().split(_BEGIN)
    README.write_text(f"{before}{_BEGIN}\n\n{table()}\n\n{_END}{rest.split(_END)[1]}")


if __name__ == "__main__":
    _write()
