"""Any Python program that `zerowake snapshot create --renew` starts: its `sitecustomize`, which has renewal.py listen.

Python imports the first `sitecustomize` on its path as it starts, and this is the first. The one that it would have found otherwise comes
after it, under its own name. Whatever is wrong here must not keep the program from starting.
"""

import importlib
import sys
import traceback
from pathlib import Path

_HERE = str(Path(__file__).parent)


def _run() -> None:
    try:
        import zerowake_renewal  # type: ignore[import-not-found]  # renewal.py, as it is laid out beside this file  # noqa: PLC0415

        zerowake_renewal.listen()
    except Exception:
        traceback.print_exc()
    before = sys.path[:]
    sys.path[:] = [path for path in before if path != _HERE]
    ours = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError:  # most have none
        if ours:
            sys.modules["sitecustomize"] = ours
    finally:
        sys.path[:] = before


if __name__ == "sitecustomize":
    _run()
