"""A name taken out of a store.

One object is written: the name's record, by one that says that the name stands for nothing, above every number before. Wherever this is
ended, the name stands for the whole snapshot or for none. Manifest and chunks stay: other names may need them, and who is fetching them
shall end well.

Rejected: removing the record (whoever can write to the store could bring it back, and nobody would know that it is older).
"""

from __future__ import annotations

import asyncio

from restore_agent.snapshots.catalog import Catalog
from restore_agent.snapshots.names import SeenNames
from restore_agent.transfer.layout import name_key
from restore_agent.transfer.publish import signed_above
from restore_agent.transfer.sending import Sending
from restore_agent.transfer.source import Absent, Destination
from zerowake_shared.clock import SYSTEM_CLOCK, Clock


async def withdraw(
    catalog: Catalog, seen: SeenNames, destination: Destination, namespace: str, name: str, clock: Clock = SYSTEM_CLOCK
) -> str:
    """The digest that the name stood for. Empty: its record does not count here; it is replaced as well, or nobody who revoked its key
    could be rid of it.

    Raises:
        Absent: the store has no such name, or it was withdrawn before. Denied, Unreachable, Altered, Full: the store; nothing has changed.
        NoSigningKey, Untrusted: this node signs nothing.
    """
    await asyncio.to_thread(catalog.keyring.check_signs)
    sending = Sending(destination)
    before, number = await sending.named(catalog.keyring, namespace, name)
    if before and not before.digest:
        raise Absent(f"{destination} has no snapshot {namespace}/{name}: the name was withdrawn already ({before.published})")
    if before is None:  # or it does not count here
        try:
            await destination.size(name_key(namespace, name))
        except Absent:
            raise Absent(f"{destination} has no snapshot {namespace}/{name}: there is nothing to withdraw") from None
    record, data = await signed_above(number, catalog, seen, namespace, name, "", clock)
    await sending.name(namespace, name, data)
    await asyncio.to_thread(seen.accept, record)
    return before.digest if before else ""
