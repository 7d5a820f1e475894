"""`sitecustomize` of each Python that may load a sanitized library, agents and command lines that tests start, too.

The sanitizer's own library has to be there before all others, and in none of the programs that Python starts: some have it within them.
"""

import os
import sys

_FIRST = os.environ["ZEROWAKE_TEST_SANITIZER"]

if _FIRST in os.environ.get("LD_PRELOAD", "").split(":"):
    del os.environ["LD_PRELOAD"]
else:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"LD_PRELOAD": _FIRST})
