"""The images that tests run: zerowake's two, from deploy/images/Dockerfile, and the tests' engine; built by buildah, without a registry.

The Dockerfiles' base is made by debootstrap and carries this machine's settings for package sources. A build is kept as an archive under a
key of everything that went into it; `images` builds what is missing or changed, and gives the node all of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.e2e.cluster.layout import ARCHIVES, CACHE, OVERLAYFS_MAGIC

REPOSITORY = Path(__file__).resolve().parents[3]
STORE = CACHE / "buildah"
BASE = "localhost/zerowake-base:bookworm"
# debootstrap's own minbase, without what Debian's slim images leave out as well.
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
# What makes apt, pip and uv work on this machine. uv trusts its own list of authorities unless told otherwise.
SETTINGS = ("etc/apt/sources.list", "etc/apt/sources.list.d", "etc/apt/apt.conf.d", "etc/ssl/certs/ca-certificates.crt", "etc/pip.conf")
MOST_LAYERS = 60
UV_SETTINGS = "native-tls = true\n"


@dataclass(frozen=True)
class Image:
    name: str
    dockerfile: Path
    context: Path
    sources: tuple[str, ...]  # below the context: what a change of makes a new image
    target: str | None = None
    base: Image | None = None  # one of ours that it is made from

    @property
    def archive(self) -> Path:
        return ARCHIVES / f"{self.name.rpartition('/')[2].replace(':', '-')}.tar"

    @property
    def kept(self) -> Path:
        """The key that the archive was built under."""
        return self.archive.with_suffix(".key")

    def built(self) -> bool:
        return self.archive.exists() and self.kept.exists() and self.kept.read_text() == self.key()

    def key(self) -> str:
        files = [self.dockerfile, *(path for source in self.sources for path in files_below(self.context / source))]
        whole = hashlib.sha256((self.base.key() if self.base else base_key()).encode())
        for path in files:
            whole.update(f"{path.relative_to(REPOSITORY)}\0".encode())
            whole.update(path.read_bytes())
        return whole.hexdigest()[:16]


CHAT = REPOSITORY / "tests/e2e/images/chat"
ZEROWAKE_SOURCES = ("pyproject.toml", "requirements.lock", "deploy/build_hook.py", "proto", "gpumem", "restore_agent", "scaler")
IMAGES = (
    Image("docker.io/library/zerowake-scaler:0.1.0", REPOSITORY / "deploy/images/Dockerfile", REPOSITORY, ZEROWAKE_SOURCES, "scaler"),
    Image(
        "docker.io/library/zerowake-agent:0.1.0",
        REPOSITORY / "deploy/images/Dockerfile",
        REPOSITORY,
        (*ZEROWAKE_SOURCES, "deploy/steps.sh", "deploy/criu/install.sh"),
        "agent",
    ),
    Image("zerowake.test/engine:1", REPOSITORY / "tests/e2e/images/Dockerfile", REPOSITORY / "tests/worlds", ("hashing_engine.py",)),
    Image(
        "zerowake.test/embeddings:1",
        REPOSITORY / "tests/e2e/images/embeddings/Dockerfile",
        REPOSITORY,
        ("deploy/demo/sentence_model.py", "tests/e2e/images/embeddings/server.py"),
    ),
    # The one that the examples name.
    Image("registry.example/chat:1.0.0", CHAT / "Dockerfile", CHAT, ("server.py",)),
)
# Of a packed cluster (pack.py).
ROOT_IMAGE = Image(
    "zerowake.test/cluster:1", REPOSITORY / "tests/e2e/images/cluster/Dockerfile", REPOSITORY, ("requirements.lock",), base=IMAGES[1]
)
PACKED = CACHE / "packed"  # this cache came in a pack: its machine cannot build, and has the images that came with it


def files_below(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for inner in sorted(path.rglob("*")):
        if inner.is_file() and "__pycache__" not in inner.parts:
            yield inner


def build(*more: Image) -> list[Path]:
    """Every image's archive, built if it is not there or its sources have changed.

    In a process of its own: where the cache is on an overlay (this machine is itself a container), no overlay can be made on top of it, and
    buildah's store, which needs them, is then a memory file system that only that process sees and that ends with it.
    """
    if PACKED.exists():
        return [image.archive for image in IMAGES if image.archive.exists()]
    wanted = (*IMAGES, *more)
    with (CACHE / ".images").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # builds share a store
        if any(not image.built() for image in wanted):
            need_tools()
            STORE.mkdir(exist_ok=True)
            names = [image.name for image in wanted]
            overlaid = run("stat", "--file-system", "--format=%t", str(STORE)).strip() == OVERLAYFS_MAGIC
            private = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs zerowake-images "{STORE}" && exec "$@"', "sh"] if overlaid else []
            done = subprocess.run([*private, sys.executable, "-m", "tests.e2e.cluster.images", *names], check=False, cwd=REPOSITORY)
            if done.returncode:
                raise SystemExit("An image could not be built; the reason is above.")
    return [image.archive for image in wanted]


def build_missing(names: list[str]) -> None:
    make_base()
    for image in (*IMAGES, ROOT_IMAGE):
        if image.name in names and not image.built():
            if image.base and not buildah("images", "--quiet", image.base.name, check=False).strip():
                step(f"building {image.base.name}", partial(build_one, image.base))  # its archive outlived the store that it was made in
            key = image.key()
            step(f"building {image.name}", partial(build_one, image))
            image.kept.write_text(key)
    # Layers without a name are the cache that makes the next build short; every change of code adds some.
    if len(buildah("images", "--all", "--quiet").split()) > MOST_LAYERS:
        buildah("rmi", "--prune", check=False)


def build_one(image: Image) -> None:
    options = ["--isolation=chroot", "--pull=never", "--layers", f"--build-arg=BASE={BASE}", f"--tag={image.name}"]
    if image.target:
        options.append(f"--target={image.target}")
    ignore = image.dockerfile.with_suffix(".dockerignore")
    if ignore.exists():
        options.append(f"--ignorefile={ignore}")
    buildah("build", *options, f"--file={image.dockerfile}", str(image.context))
    fresh = image.archive.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    buildah("push", image.name, f"docker-archive:{fresh}:{image.name}")
    fresh.rename(image.archive)


def base_key() -> str:
    """The distribution's name, and the settings that are copied."""
    whole = hashlib.sha256(codename().encode() + UV_SETTINGS.encode())
    for setting in SETTINGS:
        for path in files_below(Path("/", setting)):
            whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def make_base() -> None:
    kept = STORE / "base.key"
    if kept.exists() and kept.read_text() == base_key() and buildah("images", "--quiet", BASE, check=False).strip():
        return
    root = CACHE / "base"
    step("making the base image", partial(debootstrap, root))
    container = buildah("from", "scratch").strip()
    buildah("copy", "--quiet", container, str(root), "/")
    buildah("config", "--cmd=/bin/bash", container)
    buildah("commit", "--quiet", container, BASE)
    buildah("rm", container)
    shutil.rmtree(root)
    kept.write_text(base_key())


def debootstrap(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    targets = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages")
    mirror = next((line.split()[0] for line in targets.splitlines() if line.endswith(f" {codename()}")), None)
    if mirror is None:
        raise SystemExit(f"apt knows no archive of {codename()}: run `apt-get update`.")
    run("debootstrap", "--variant=minbase", "--include=ca-certificates", codename(), str(root), mirror)
    for path in LEFT_OUT:
        shutil.rmtree(root / path, ignore_errors=True)
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    (root / "etc/apt/sources.list").unlink(missing_ok=True)
    for setting in SETTINGS:
        source = Path("/", setting)
        if source.is_dir():
            shutil.copytree(source, root / setting, dirs_exist_ok=True)
        elif source.exists():
            (root / setting).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / setting)
    (root / "etc/uv").mkdir()
    (root / "etc/uv/uv.toml").write_text(UV_SETTINGS)


def codename() -> str:
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    if not release:
        raise SystemExit("/etc/os-release names no VERSION_CODENAME: the base image is made from a Debian or an Ubuntu.")
    return release[1]


def need_tools() -> None:
    missing = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
    if missing:
        step(f"installing {' and '.join(missing)}", partial(run, "apt-get", "install", "-y", "--no-install-recommends", *missing))


def buildah(*arguments: str, check: bool = True) -> str:
    """With its own store, in the cache: the machine's is left alone."""
    store = [f"--root={STORE}/storage", f"--runroot={STORE}/run", "--storage-driver=overlay"]
    return run("buildah", *store, *arguments, check=check)


def run(*command: str, check: bool = True) -> str:
    settings = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    if check and done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise SystemExit(f"`{' '.join(command)}` failed with status {done.returncode}. The end of what it said:\n{tail}")
    return done.stdout


def step(label: str, work: Callable[[], object]) -> None:
    print(f"  {label} …", flush=True)
    began = time.monotonic()
    work()
    print(f"  {label}: done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    build_missing(sys.argv[1:])
