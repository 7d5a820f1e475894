"""An engine that publishes its weights itself: the tests' server, after a program that writes them as a checkpoint into its container.

They lie there as in a Hugging Face cache: the file apart, and a link to it. They are made from a seed, here and there alike, and are hashed
here alone: an image need not have what hashes them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpumem.checkpoint.safetensors import keep_reading, read_checkpoint

BYTES = 96 << 20
FOLDER = "/var/tmp/weights"  # in the container
_WRITES = """
import json, pathlib, random, struct, sys
folder, size = pathlib.Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True)
header = json.dumps({"weights": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
header += b" " * (-len(header) % 8)
(folder / "blobs").mkdir()
(folder / "model.safetensors").symlink_to("blobs/0")
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + random.Random(5).randbytes(size))
if len(sys.argv) > 3:
    (folder / "reading.json").write_text(sys.argv[3])
"""


def publishing(python: str, server: Sequence[str], folder: Path) -> list[str]:
    """The container's command. It is told by OWN_WEIGHTS where they are. `folder`: to make the same weights in, for their hashes."""
    subprocess.run([sys.executable, "-c", _WRITES, str(folder), str(BYTES)], check=True)
    keep_reading(folder, read_checkpoint(folder))
    script = 'python=$1 writes=$2 read=$3; shift 3; "$python" -c "$writes" "$OWN_WEIGHTS" ' + f'{BYTES} "$read" && exec "$@"'
    return ["sh", "-c", script, "sh", python, _WRITES, (folder / "reading.json").read_text(), *server]
