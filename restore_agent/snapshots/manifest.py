"""The manifest of a snapshot: what it is, what it is made of, and what it fits on. Canonical JSON, versioned; its BLAKE3 is the digest.

Nothing in it is true of one node only, so that it can be signed once and taken to others: files are known by their content, and by where
an engine has them. What a node finds out of its own disk, it keeps for itself (file_hashes.py).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots.compile_caches import is_cache
from zerowake_shared.json_text import parsed

VERSION = 4
CHANGES_FILE = "changes.tar"  # a snapshot whose engine has changed its place's file system has it
CONTAINER_FILE = "container.json"  # a snapshot that was taken in a container has it: what it must find again there
_HASH = "^[0-9a-f]{64}$"  # it is a part of paths
_REGION = re.compile(r"[0-9A-Za-z]+")
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_MOST = 1 << 50  # bytes; sums of a manifest's own fit into the protocols' numbers, and its offsets into the kernel's


class InvalidName(AgentError, ValueError):
    """A namespace or name that cannot be a part of a path or of a Kubernetes object's name."""

    kind = ErrorKind.INVALID
    reason = "invalid"


class InvalidManifest(AgentError):
    """A manifest is torn, was edited, or is of another version."""

    reason = "corrupt"


def check_name(kind: str, name: str) -> str:
    """Raises InvalidName unless `name` is 1 to 63 of a-z 0-9 . _ - with a letter or digit at both ends and no '..'."""
    if not is_name(name):
        raise InvalidName(
            f"{kind} {name!r} is not allowed: 1 to 63 of a-z, 0-9, '.', '_', '-', beginning and ending with a letter or digit"
        )
    return name


def is_name(text: str) -> bool:
    """Whether it can be a namespace or a name."""
    return bool(_NAME.fullmatch(text)) and ".." not in text


class _Record(BaseModel):
    """A value of the manifest: it does not change, and a field that this version does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Bytes = Annotated[int, Field(ge=0, le=_MOST)]
Pid = Annotated[int, Field(gt=0, lt=1 << 31)]


class EngineRecord(_Record):
    """How an engine is started, and how it says that it serves."""

    command: tuple[str, ...] = Field(min_length=1)
    env: dict[str, str] = {}
    directory: str = "/"
    port: int = Field(gt=0, lt=65536)
    health_path: str = "/health"
    ready_timeout_seconds: float = Field(default=600.0, gt=0)
    shared: tuple[str, ...] = ()  # folders of the machine's own, where it is not in a container


class CanaryRecord(_Record):
    """A request that a restored replica is asked, and the answer that it must give."""

    path: str
    body: str = ""  # JSON, sent with POST; empty: GET
    answer: str  # the body of the 200


class AdapterRecord(CanaryRecord):
    """The same for one LoRA adapter, which the server has beside its model."""

    name: str


class ProcessRecord(_Record):
    """One process of the image."""

    pid: Pid
    command: str
    gpu: bool = False  # it has CUDA state, suspended into its memory


class FileRecord(_Record):
    """A small file of the snapshot: its bytes and their BLAKE3, hex."""

    size: Bytes
    hash: str = Field(pattern=_HASH)


class ChunkRecord(_Record):
    """A chunk of pages: BLAKE3, hex, and bytes."""

    hash: str = Field(pattern=_HASH)
    size: int = Field(gt=0, le=_MOST)


class PartRecord(_Record):
    """Chunks that lie one behind the other in a file, which is named within the region's folder."""

    path: str
    offset: Bytes
    first_chunk: int = Field(ge=0, le=_MOST)
    chunks: int = Field(ge=0, le=_MOST)


class WeightsRecord(_Record):
    """A region of gpumem: its id (BLAKE3 of the layout, hex), its bytes, the files that hold its chunks, the GPU that it was lent on.

    `folder` is where those files are, as the engine has them; empty: they are the snapshot's own. A node that has them elsewhere
    looks there first (`Catalog.regions`). Whoever reads a chunk compares it with its hash, wherever it was found.
    """

    region: str
    size: Bytes
    parts: tuple[PartRecord, ...]
    gpu: str = ""  # UUID; empty: the one that the processes use most
    folder: str = ""

    @field_validator("region")
    @classmethod
    def _identified(cls, region: str) -> str:
        if not _REGION.fullmatch(region):
            raise ValueError(f"region {region!r} is none")
        return region

    @field_validator("parts")
    @classmethod
    def _inside(cls, parts: tuple[PartRecord, ...]) -> tuple[PartRecord, ...]:
        for part in parts:
            _check_inside(part.path)
        return parts


class WeightsRegion(NamedTuple):
    """A region with its layout, as gpumem takes it: what is where in it (protobuf, serialized). `folder`: where its files are here."""

    record: WeightsRecord
    layout: bytes
    folder: Path

    def within(self, snapshot: Path) -> WeightsRegion:
        """The snapshot's own, where its files lie in the folder of one."""
        if not self.folder.is_relative_to(snapshot):
            return self
        inner = self.folder.relative_to(snapshot)
        parts = tuple(part.model_copy(update={"path": str(inner / part.path)}) for part in self.record.parts)
        return self._replace(record=self.record.model_copy(update={"parts": parts, "folder": ""}), folder=snapshot)

    def on(self, gpu: str) -> WeightsRegion:
        """Lent on that GPU when the snapshot was taken."""
        return self._replace(record=self.record.model_copy(update={"gpu": gpu}))


CHECKPOINTS = "checkpoints"  # folder of a snapshot: weights that no other file of the node holds


def _check_inside(path: str) -> None:
    """Each file has one name: neither the folder itself (`.`) nor another spelling (`a//b`, `./a`) is one."""
    if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts or not Path(path).parts or str(Path(path)) != path:
        raise ValueError(f"file {path!r} is not within the snapshot, or is not how a file in it is called")


def layout_file(record: WeightsRecord) -> str:
    """Where a snapshot keeps the region's layout."""
    return f"weights/{record.region}.layout"


def beside_weights(record: WeightsRecord, name: str) -> str:
    """Where a snapshot keeps a small file that an engine has put beside the weights that it published, and reads as it starts."""
    return f"weights/{record.region}/{name}"


def published(manifest: Manifest) -> list[WeightsRecord]:
    """The regions of its weights that its engine had published outside the snapshot, so that a cold start can map them."""
    prefixes = {record.region: beside_weights(record, "") for record in manifest.distinct_weights if record.folder}
    return [
        record
        for record in manifest.distinct_weights
        if record.region in prefixes and any(name.startswith(prefixes[record.region]) for name in manifest.files)
    ]


def is_second_best(name: str) -> bool:
    """Whether a snapshot's file of that name is for cold starts alone: no restore reads it."""
    return is_cache(name) or (name.startswith("weights/") and not name.endswith(".layout"))


class MappedFile(_Record):
    """A file outside the image that the processes map or hold open, at this path in their file system."""

    path: str
    size: Bytes
    hash: str


class GpuRecord(_Record):
    """The GPUs of a node, as a snapshot must find them again."""

    driver: str  # its version
    names: tuple[str, ...]  # of their models
    uuids: tuple[str, ...]  # "GPU-…", in the driver's order, as `names`
    links: tuple[tuple[str, ...], ...] = ()  # how each reaches each, in the same order: "NV18" (NVLinks), "PIX", "SYS", …

    def link(self, one: str, other: str) -> str:
        """How these two reach each other; empty: not known, or one of them is not here."""
        if not self.links or not {one, other} <= set(self.uuids):
            return ""
        return self.links[self.uuids.index(one)][self.uuids.index(other)]

    def only(self, uuids: Collection[str]) -> GpuRecord:
        """Those of them that are here."""
        kept = [at for at, identity in enumerate(self.uuids) if identity in uuids]
        return GpuRecord(
            driver=self.driver,
            names=tuple(self.names[at] for at in kept),
            uuids=tuple(self.uuids[at] for at in kept),
            links=tuple(tuple(self.links[at][other] for other in kept) for at in kept) if self.links else (),
        )


class Fits(_Record):
    """What the node must have."""

    architecture: str
    kernel: str
    cpu_features: tuple[str, ...]
    criu: str
    mapped_files: tuple[MappedFile, ...]
    gpus: GpuRecord | None = None  # None: no process holds one


class TemplateRecord(_Record):
    """Of the pod template that it was captured from, as the controller hashes it; and of the ConfigMaps and Secrets behind it, or empty.

    On one machine: of the engine's command (zerowake_shared/engine_identity.py).
    """

    hash: str
    contents: str = ""


class Manifest(_Record):
    """All that is known of a snapshot."""

    version: Literal[4] = 4
    namespace: str
    name: str
    model: str
    created: str  # ISO 8601, UTC; of its dump
    engine: EngineRecord
    canary: CanaryRecord | None  # None only in a draft: what is published has been proved
    adapters: tuple[AdapterRecord, ...] = ()  # in the order in which they are asked, after the canary
    processes: tuple[ProcessRecord, ...]
    root_pid: Pid
    stdio: tuple[str, str]  # CRIU's keys of stdout and stderr
    files: dict[str, FileRecord]  # by path within the snapshot
    chunks: tuple[ChunkRecord, ...]
    host_bytes: Bytes  # resident memory of the processes
    gpus: dict[str, Bytes] = {}  # UUID → bytes that resuming takes of that GPU, or of the one in its place
    wake_bytes: dict[str, Bytes] = {}  # UUID → bytes beside those of `gpus` that its engine takes as it wakes
    quiesces: bool = False  # the engine takes part in the control directory
    template: TemplateRecord | None = None  # None: who had it captured said nothing of it
    cold_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # what the engine took to be ready; 0: not known
    weights: tuple[WeightsRecord, ...] = ()
    fits: Fits

    @field_validator("namespace", "name")
    @classmethod
    def _named(cls, value: str) -> str:
        return check_name("name", value)

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for path in files:
            _check_inside(path)
        return files

    @property
    def dumped_at(self) -> float:
        """By the wall clock of the node where it was taken."""
        return datetime.datetime.fromisoformat(self.created).timestamp()

    @property
    def is_of_container(self) -> bool:
        """It was taken in a container, and is restored into containers only."""
        return CONTAINER_FILE in self.files

    @property
    def is_of_pod(self) -> bool:
        """It was taken in a pod that a cluster's controller had made for it."""
        return self.is_of_container and self.template is not None

    @property
    def tenant(self) -> str:
        """The namespace whose memory its weights are lent from; empty: they are the operator's."""
        return self.namespace if self.is_of_container else ""

    @property
    def gpu_pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.gpu]

    @property
    def page_bytes(self) -> int:
        return sum(chunk.size for chunk in self.chunks)

    @property
    def distinct_weights(self) -> list[WeightsRecord]:
        """Its regions, each once: several GPUs may be lent the same."""
        return list({record.region: record for record in self.weights}.values())

    @property
    def weights_bytes(self) -> int:
        """Of all regions, each once."""
        return sum(record.size for record in self.distinct_weights)

    @property
    def skeleton_bytes(self) -> int:
        return sum(file.size for name, file in self.files.items() if not is_second_best(name))

    @property
    def criu_bytes(self) -> int:
        """Of the skeleton, what CRIU reads."""
        return sum(file.size for name, file in self.files.items() if name.startswith("images/"))

    @property
    def written_bytes(self) -> int:
        """Of the skeleton, what its engine had written into its own file system."""
        return self.files[CHANGES_FILE].size if CHANGES_FILE in self.files else 0

    @property
    def image_bytes(self) -> int:
        return self.page_bytes + self.skeleton_bytes

    @property
    def gpus_awake(self) -> dict[str, int]:
        """UUID → bytes that it takes of that GPU, or of the one in its place, until its engine is awake."""
        return {gpu: size + self.wake_bytes.get(gpu, 0) for gpu, size in self.gpus.items()}

    def encode(self) -> bytes:
        unused = set() if self.wake_bytes else {"wake_bytes"}  # an older zerowake reads the rest
        return (json.dumps(self.model_dump(mode="json", exclude=unused), sort_keys=True, separators=(",", ":")) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Raises InvalidManifest: no JSON, another version, or fields that do not fit."""
        return _decoded(data)

    @classmethod
    def _read(cls, data: bytes) -> Manifest:
        try:
            version = parsed(data).get("version")
        except (ValueError, AttributeError) as error:
            raise InvalidManifest(f"the manifest is no JSON object: {error}") from None
        if version != VERSION:
            raise InvalidManifest(f"the manifest has version {version!r}; this zerowake reads {VERSION}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise InvalidManifest(f"the manifest's {field} is not known to this zerowake: it was taken by a newer one") from None
            raise InvalidManifest(f"the manifest's {field}: {first['msg']}") from None


@lru_cache(maxsize=64)
def _decoded(data: bytes) -> Manifest:
    """A large one takes milliseconds, and each wake of a parked engine begins with it. Manifests do not change."""
    return Manifest._read(data)


def digest_of(data: bytes) -> str:
    return blake3(data).hexdigest()
