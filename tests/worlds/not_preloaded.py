"""A plugin of pytest: what is loaded before all others into this process is not loaded into what it starts."""

import os

import zerowake_native

os.environ.pop("LD_PRELOAD", None)
assert "sanitized" in zerowake_native.__file__, f"the sanitized package is not found first, but {zerowake_native.__file__}"
