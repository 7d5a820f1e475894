"""Before zerowake is uninstalled: every ModelSnapshot goes, and the artifacts with them (a hook of the chart, removal.yaml).

The controller still runs and does the work; this asks for it and waits. What cannot be finished in time (a node whose agent is dead, a
controller that is) loses its finalizer: an uninstall must end, and the API server could not delete the CRD before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys

from scaler.kubernetes.resources import FINALIZER, MODEL_SNAPSHOTS, REPORTER, Meta
from zerowake_shared.kubernetes.cluster import Cluster
from zerowake_shared.kubernetes.errors import ClusterError, NotFound
from zerowake_shared.kubernetes.informer import Informer
from zerowake_shared.log import configure

log = logging.getLogger(__name__)

_FORCED_SECONDS = 30.0


async def remove_all(cluster: Cluster, patience: float) -> bool:
    """Deletes all ModelSnapshots. Returns whether every artifact was removed from its nodes.

    Raises:
        ClusterError: the API server refuses, or one does not go even without our finalizer.
    """
    async with cluster.follow(MODEL_SNAPSHOTS, Meta) as snapshots:
        async with asyncio.timeout(patience):
            await snapshots.synced.wait()
        for each in list(snapshots):
            log.info("deleting %s/%s", each.metadata.namespace, each.metadata.name)
            await cluster.delete(MODEL_SNAPSHOTS, each.metadata.namespace, each.metadata.name)
        if await _gone(snapshots, patience):
            return True
        for each in list(snapshots):
            metadata = each.metadata
            log.warning("%s/%s is still on some nodes after %.0f s; it is given up", metadata.namespace, metadata.name, patience)
            rest = [name for name in metadata.finalizers if name != FINALIZER]
            with contextlib.suppress(NotFound):
                await cluster.patch(MODEL_SNAPSHOTS, metadata.namespace, metadata.name, {"metadata": {"finalizers": rest}})
        if not await _gone(snapshots, _FORCED_SECONDS):
            left = ", ".join(f"{each.metadata.namespace}/{each.metadata.name}" for each in snapshots)
            raise ClusterError(0, "ModelSnapshots cannot be removed", f"{left}: look for finalizers of others on them")
        return False


async def _gone(snapshots: Informer[Meta], seconds: float) -> bool:
    changed = asyncio.Event()
    snapshots.on_change(lambda _old, _new: changed.set())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while len(snapshots):
                changed.clear()
                await changed.wait()
    return not len(snapshots)


async def _main(patience: float) -> None:
    async with Cluster.connect(reporter=REPORTER, instance="removal") as cluster:
        if await remove_all(cluster, patience):
            log.info("no ModelSnapshot is left, on no node")


if __name__ == "__main__":
    configure()
    parser = argparse.ArgumentParser(description="Deletes every ModelSnapshot of the cluster.")
    parser.add_argument("--patience", type=float, required=True, help="seconds that the nodes have to remove the artifacts")
    try:
        asyncio.run(_main(parser.parse_args().patience))
    except (ClusterError, TimeoutError) as error:
        log.error("%s", error or "the API server did not answer in time")
        sys.exit(1)
