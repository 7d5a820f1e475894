"""What `zerowake bundle` takes of gpumem: its status, where it runs."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict

from gpumem.client.control import Control
from zerowake_shared.bundle import Part, Parts
from zerowake_shared.checkup import Subject


async def status(subject: Subject) -> Parts:
    """Raises GpumemError: nobody answers at its socket."""
    if not subject.gpumem.exists():
        return {}
    async with Control.connected(subject.gpumem, "bundle") as control:
        return {"gpumem.json": MessageToDict(await control.status(), preserving_proto_field_name=True)}


PARTS = (Part("gpumem", status),)
