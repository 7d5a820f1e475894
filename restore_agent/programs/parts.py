"""What `zerowake bundle` takes of the agent's: manifests, and what CRIU said where it failed. Keys never."""

from __future__ import annotations

from typing import Any

from restore_agent.drivers.meminfo import available_memory, total_memory
from restore_agent.snapshots.catalog import Catalog, Unreadable
from zerowake_shared.bundle import Part, Parts, end_of
from zerowake_shared.checkup import Subject

_LEFT_OUT: Any = {"chunks": True, "canary": {"body", "answer"}, "adapters": {"__all__": {"body", "answer"}}}  # long, or what users ask


def manifests(subject: Subject) -> Parts:
    """Of each snapshot on the disk, without what a replica is asked and answers; of one that cannot be read, why."""
    if not subject.state.is_dir():
        return {}
    found: dict[str, object] = {}
    for each in Catalog(subject.state, subject.keys).list():
        if isinstance(each, Unreadable):
            found[f"snapshots/{each.namespace}-{each.name}.json"] = {"unreadable": str(each.why)}
        else:
            manifest = each.manifest.model_dump(mode="json", exclude=_LEFT_OUT)
            found[f"snapshots/{each.manifest.namespace}-{each.manifest.name}.json"] = {"digest": each.digest, **manifest}
    return found


def criu_log(subject: Subject) -> Parts:
    """The file that the agent keeps of CRIU's failures."""
    log = subject.state / "criu.log"
    return {"logs/criu.log": end_of(log)} if log.exists() else {}


def memory(_: Subject) -> Parts:
    """The node's."""
    return {"memory.json": {"total_bytes": total_memory(), "available_bytes": available_memory()}}


PARTS = (Part("manifests of snapshots", manifests), Part("CRIU's log", criu_log), Part("memory", memory))
