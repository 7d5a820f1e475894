"""Brings a Go for machines without one, or with one too old to bring its own: `python -m tests.e2e.cluster.toolchain FOLDER`.

Go's module proxies serve Go itself as a module. What comes is checked against the pinned sum, the one that go.sum files and Go's checksum
database use: over every file's name and hash, so it does not matter who served it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

MODULE = "golang.org/toolchain"
VERSION = "v0.0.1-go1.26.8.linux-amd64"
SUM = "h1:ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM="
DEFAULT_PROXY = "https://proxy.golang.org"  # Go's own default


def main(folder: Path) -> None:
    if platform.machine() != "x86_64":
        raise SystemExit(f"Only Go for x86_64 is pinned here, and this machine is {platform.machine()}: install Go 1.26 or later.")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = Path(scratch, "go.zip")
        fetch(archive)
        with zipfile.ZipFile(archive) as files:
            found = module_sum(files)
            if found != SUM:
                raise SystemExit(f"{MODULE}@{VERSION} came with the sum {found} instead of {SUM}: it was altered on its way.")
            files.extractall(scratch)
        root = Path(scratch, f"{MODULE}@{VERSION}")
        # A module's zip knows no modes, and leaves out folders that have a go.mod of their own: Go packs those files under another name.
        for path in [*root.glob("bin/*"), *root.glob("pkg/tool/*/*")]:
            path.chmod(0o755)
        for path in root.rglob("_go.mod"):
            path.rename(path.with_name("go.mod"))
        shutil.rmtree(folder, ignore_errors=True)
        root.rename(folder)


def fetch(archive: Path) -> None:
    """From the first proxy of GOPROXY that has it."""
    proxies = [proxy for proxy in os.environ.get("GOPROXY", DEFAULT_PROXY).replace("|", ",").split(",") if proxy.startswith("http")]
    refused = []
    for proxy in proxies:
        url = f"{proxy.rstrip('/')}/{MODULE}/@v/{VERSION}.zip"
        print(f"trying {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, archive.open("wb") as file:
                shutil.copyfileobj(answer, file)
                return
        except OSError as error:
            refused.append(f"{proxy}: {error}")
    raise SystemExit(f"No module proxy gave Go: {'; '.join(refused) or 'GOPROXY names none'}. Install Go 1.21 or later, or set GOPROXY.")


def module_sum(files: zipfile.ZipFile) -> str:
    lines = []
    for name in sorted(files.namelist()):
        lines.append(f"{hashlib.sha256(files.read(name)).hexdigest()}  {name}\n")
    return "h1:" + base64.b64encode(hashlib.sha256("".join(lines).encode()).digest()).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
