"""A plugin of pytest: the C parts that are tried are the sanitized ones."""

import zerowake_native

assert "sanitized" in zerowake_native.__file__, f"the sanitized package is not found first, but {zerowake_native.__file__}"
