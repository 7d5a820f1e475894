"""Packs the test cluster for a machine that reaches no registry: `python -m tests.e2e.cluster.pack OUT [NAME=FOLDER | NAME=FILE.tar.xz]…`

OUT then has parts of PART_BYTES at most, their hashes, and two scripts. All that the machine must have is a kernel, root, and `sh`, `tar`,
`unshare`, `mount` and `pivot_root` (util-linux), and xz or Python. The parts may come there in any order and number at a time:

    sh unpack.sh FROM TARGET        takes the parts that are in the folder FROM; unpacks what is whole by now; says which are still missing
    sh enter.sh TARGET COMMAND…     runs a command in the packed root, where the machine's own file system is /machine

The root is the agent's image with what a cluster needs of a distribution, this checkout in /zerowake, and the cluster's cache in /cluster:
its programs, KEDA's manifests, zerowake's images. So nothing depends on what the machine has, nor on its Python. Folders that are named
come beside the root, as TARGET/NAME. Rejected: wrappers around single programs with their libraries, since each of a dozen has its own way
of finding more of them; and wheels for the machine's Python, of whatever version that is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.e2e.cluster.images import IMAGES, PACKED, REPOSITORY, ROOT_IMAGE, build, run
from tests.e2e.cluster.layout import ARCHIVES, BIN, KEDA_MANIFESTS
from tests.e2e.cluster.layout import CACHE as CLUSTER_CACHE

PART_BYTES = 59_900_000
CACHE = "cluster"  # in the root
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt", "var/cache")
SCRIPTS = ("unpack.sh", "enter.sh")
HASHES = "parts.sha256"
# Go's programs: calls hold the distance to what they call, which hides that they call the same.
PROGRAMS = ["--threads=0", "--x86", "--lzma2=preset=5,dict=64MiB"]
FOLDERS = ["--threads=0", "-5"]
# Images and root share most of their files, half a gigabyte apart.
SYSTEM = ["--threads=1", "--lzma2=preset=1,mf=hc4,dict=512MiB"]  # 4 GB of memory


def main(out: Path, folders: dict[str, Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    build(ROOT_IMAGE)
    with tempfile.TemporaryDirectory(dir=ARCHIVES) as work:
        parts = [*programs(Path(work), out), *system(Path(work), out)]
        for name, source in folders.items():
            parts += split(source if source.is_file() else packed(source, Path(work) / name, FOLDERS), f"{name}.tar.xz", out)
    for script in SCRIPTS:
        shutil.copy(Path(__file__).with_name(script), out)
    (out / HASHES).write_text("".join(f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts))
    print(f"  {len(parts)} parts, {sum(part.stat().st_size for part in parts) / 1e6:.0f} MB, in {out}")


def programs(work: Path, out: Path) -> list[Path]:
    """They are the same from one checkout to the next, and take minutes."""
    kept = CLUSTER_CACHE / "programs.tar.xz"
    sources = [*BIN.iterdir(), *KEDA_MANIFESTS.iterdir()]
    if not kept.exists() or any(source.stat().st_mtime > kept.stat().st_mtime for source in sources):
        folder = work / "programs"
        (folder / CACHE).mkdir(parents=True)
        (folder / CACHE / "bin").symlink_to(BIN)
        (folder / CACHE / "keda").symlink_to(KEDA_MANIFESTS)
        packed(folder, work / "programs.tar.xz", PROGRAMS, follow=True).rename(kept)
    return split(kept, "root-programs.tar.xz", out)


def system(work: Path, out: Path) -> list[Path]:
    root = work / "system"
    images = root / CACHE / "images"
    images.mkdir(parents=True)
    (root / CACHE / PACKED.name).touch()
    for archive in (ARCHIVES / "pause.tar", *(image.archive for image in IMAGES if image.name.startswith("docker.io/library/zerowake-"))):
        shutil.copy(archive, images)
    lay_out(ROOT_IMAGE.archive, root)
    for path in LEFT_OUT:
        shutil.rmtree(root / path, ignore_errors=True)
    checkout = root / "zerowake"
    checkout.mkdir()
    subprocess.run(["sh", "-ec", 'git archive HEAD | tar -C "$1" -xf -', "sh", str(checkout)], check=True, cwd=REPOSITORY)
    return split(packed(root, work / "system.tar.xz", SYSTEM), "root-system.tar.xz", out)


def lay_out(archive: Path, root: Path) -> None:
    """An image's files, of an archive in Docker's form: each layer over those before it, less what it takes away."""
    with tarfile.open(archive) as image:
        manifest = image.extractfile("manifest.json")
        assert manifest
        for name in json.load(manifest)[0]["Layers"]:
            with tarfile.open(fileobj=image.extractfile(name)) as layer:
                layer.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)  # Debian 12's Python has no other
                for member in layer:
                    path = Path(member.name)
                    if path.name == ".wh..wh..opq":
                        shutil.rmtree(root / path.parent)
                    elif path.name.startswith(".wh."):
                        remove(root / path.with_name(path.name.removeprefix(".wh.")))
                    else:
                        layer.extract(member, root)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def packed(folder: Path, archive: Path, options: list[str], follow: bool = False) -> Path:
    links = "--dereference" if follow else "--no-acls"
    script = """
        folder=$1 archive=$2 links=$3
        shift 3
        tar -C "$folder" "$links" --sort=name --exclude=__pycache__ -cf - . | xz "$@" >"$archive"
    """
    subprocess.run(["sh", "-ec", script, "sh", str(folder), str(archive), links, *options], check=True)
    return archive


def split(archive: Path, name: str, out: Path) -> list[Path]:
    run("split", "--numeric-suffixes", f"--bytes={PART_BYTES}", str(archive), str(out / f"{name}."))
    return sorted(out.glob(f"{name}.[0-9]*"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve(), {name: Path(path).resolve() for name, _, path in (word.partition("=") for word in sys.argv[2:])})
