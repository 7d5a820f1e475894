"""What a test needs of the machine that it runs on, in words for whoever reads why it was skipped."""

from __future__ import annotations

import os

from restore_agent.drivers.criu import Criu, CriuError


def missing_for_criu() -> str:
    """Why nothing can be restored here; empty: it can."""
    try:
        Criu.find()
    except CriuError as error:
        return f"needs CRIU: {error}"
    return "" if os.geteuid() == 0 else "needs root, for CRIU and namespaces"
