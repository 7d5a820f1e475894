"""The file that `zerowake up` reads: one YAML, checked whole before anything is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scaler.books.hpa import ScalingRules
from scaler.books.limits import ModelLimits
from scaler.books.model_name import check_model_name
from scaler.books.snapshot_name import SnapshotName
from scaler.local.yaml_file import BadFile, lines_of, read_yaml
from scaler.plan.rungs import Rung
from scaler.plan.world import Model
from scaler.sources.declared import Declared
from zerowake_shared import address
from zerowake_shared.command_limits import flaw_of_command, flaw_of_environment
from zerowake_shared.store_url import StoreUrl
from zerowake_shared.tls import TlsFiles

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")


class BadConfig(Exception):
    """The file cannot be used; the message names the file and the field."""


def _address(value: str) -> str:
    address.Address.to_listen(value)
    return value


def _store(value: str) -> str:
    StoreUrl.parse(value)
    return value


def _words(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(f"a command is a list of words, such as [python, chat.py], not the text {value[:80]!r}")
    return value


def _command(value: tuple[str, ...]) -> tuple[str, ...]:
    if why := flaw_of_command(value):
        raise ValueError(why)
    return value


Command = Annotated[tuple[str, ...], BeforeValidator(_words), AfterValidator(_command)]
ModelName = Annotated[str, AfterValidator(check_model_name)]
Address = Annotated[str, AfterValidator(_address)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Goal = Literal["mean", "p99"]  # what snapshots that move ahead of need are to better: plan/worth.py, OBJECTIVES
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of the file: what it does not know is refused, and nothing changes once it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class TlsSection(Section):
    """Certificates of KEDA's port. With `client_ca` a client without one of its certificates is refused."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.certificate, self.key, self.client_ca)


class KedaSection(Section):
    """Where KEDA's operator reaches the scaler, for those who point one at this machine."""

    listen: Address
    tls: TlsSection | None = None


class PushSection(Section):
    """Who may tell of demand by POST /demand at the metrics' address: whoever has the token in this file."""

    token_file: Path


class ModelSection(Section):
    """One model: where it comes from, how it waits, and how it is scaled."""

    names: tuple[ModelName, ...] = ()  # what else its server answers to: LoRA adapters, above all
    snapshot: str = ""  # NAME or NAMESPACE/NAME
    command: Command = ()  # started where there is no snapshot, or where it cannot be restored
    port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    health: str = "/health"
    canary: str = ""  # PATH or PATH=JSON of the request that proves a snapshot; found by itself for OpenAI-compatible servers
    env: dict[str, str] = {}
    directory: Path = Path()
    shared: tuple[Path, ...] = ()  # folders that stay the machine's own; what is written elsewhere is each replica's
    ready_seconds: Seconds = 600.0
    stage: Literal["disk", "memory", "standby", "parked"] = "memory"  # the rung on which the snapshot waits for the first request
    pin: Literal["disk", "memory"] | None = None  # from this rung, and those below it, no budget takes the snapshot
    parked_seconds: Annotated[float, Field(ge=0)] = 0.0  # an idle replica is kept parked for so long, and then
    standby_seconds: Annotated[float, Field(ge=0)] = 0.0  # as a standby for so long before it is dropped
    max_stage_seconds: Annotated[float, Field(ge=0)] | None = None
    concurrency: Count = 8
    max_requests: Count = 10_000
    max_bytes: Count = 256 << 20
    max_wait_seconds: Seconds = 300.0
    min_replicas: Annotated[int, Field(ge=0)] = 0
    max_replicas: Count = 1
    idle_replicas: int | None = None
    cooldown_seconds: Annotated[float, Field(ge=0)] = 300.0
    polling_seconds: Seconds = 30.0
    stabilisation_seconds: Annotated[float, Field(ge=0)] = 300.0
    sources: tuple[Declared, ...] = ()  # what is asked of it past the gateway
    max_drain_seconds: Annotated[float, Field(ge=0)] | None = None  # a surplus replica's answers have this long; None: no limit

    @model_validator(mode="after")
    def _startable(self) -> ModelSection:
        if not self.snapshot and not self.command:
            raise ValueError("give a snapshot, a command, or both")
        if self.standby_seconds and self.stage in ("standby", "parked"):
            raise ValueError(
                f"standby_seconds is for stage: disk or memory; with stage: {self.stage} an idle replica is kept for as long as it takes"
            )
        if self.parked_seconds and self.stage == "parked":
            raise ValueError(
                "parked_seconds is for stage: disk, memory or standby; with stage: parked an idle replica is parked for as long as it takes"
            )
        if (self.parked_seconds or self.stage == "parked") and not self.snapshot:
            what = "parked_seconds" if self.parked_seconds else "stage: parked"
            raise ValueError(f"{what} goes with a snapshot: an engine that was started without one cannot be parked")
        if self.pin and not self.snapshot:
            raise ValueError("pin goes with a snapshot: it says from where that is never taken")
        if self.command and self.port is None:
            raise ValueError("port is missing: the one that the command listens on")
        if self.shared and not self.command:
            raise ValueError("shared goes with command; a snapshot has the folders that `zerowake snapshot create --shared` named")
        if why := flaw_of_environment(self.engine_env, self.command):
            raise ValueError(f"env: {why}")
        _ = self.rules, self.limits
        return self

    @property
    def snapshot_name(self) -> SnapshotName | None:
        return SnapshotName.parse(self.snapshot) if self.snapshot else None

    def model(self, name: str) -> Model:
        """What the plan is told of it."""
        return Model(
            name,
            snapshot=self.snapshot_name,
            stage=Rung[self.stage.upper()],
            parked_seconds=0.0 if self.stage == "parked" else self.parked_seconds or None,
            standby_seconds=0.0 if self.stage in ("standby", "parked") else self.standby_seconds or None,
            replicas=self.min_replicas,
            pin=Rung[(self.pin or "absent").upper()],
        )

    @property
    def rules(self) -> ScalingRules:
        return ScalingRules(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            idle_replicas=self.idle_replicas,
            cooldown_seconds=self.cooldown_seconds,
            polling_seconds=self.polling_seconds,
            stabilisation_seconds=self.stabilisation_seconds,
        )

    @property
    def limits(self) -> ModelLimits:
        return ModelLimits(
            max_requests=self.max_requests,
            max_bytes=self.max_bytes,
            max_wait_seconds=self.max_wait_seconds,
            concurrency=self.concurrency,
        )

    def trigger(self, model: str) -> dict[str, str]:
        """The metadata that a ScaledObject of this model would have."""
        metadata = {"model": model, "targetPending": str(self.concurrency)}
        if self.max_stage_seconds is not None:
            metadata["maxStageSeconds"] = str(self.max_stage_seconds)
        return metadata

    @property
    def engine_env(self) -> dict[str, str]:
        """What the engine's process sees: its own variables over a few of ours."""
        return {key: os.environ[key] for key in _PASSED_ON if key in os.environ} | self.env


class Config(Section):
    """The whole file."""

    state: Path = Path("/var/lib/zerowake")
    store: Annotated[str, AfterValidator(_store)] | None = None  # where snapshots are fetched from, and put once they are taken
    listen: Address = "127.0.0.1:8080"
    metrics: Address | None = None
    page: bool = True  # at the address of metrics
    agent_metrics: Address | None = None
    objective: Goal = "mean"
    keda: KedaSection | None = None
    push: PushSection | None = None
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    models: dict[ModelName, ModelSection] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_model_a_name(self) -> Config:
        taken = dict.fromkeys(self.models, "is a model itself")
        for model, section in self.models.items():
            for name in section.names:
                if name in taken:
                    raise ValueError(f"models.{model}.names: {name!r} {taken[name]}")
                taken[name] = f"is a name of {model!r} already"
        return self

    @model_validator(mode="after")
    def _something_to_store(self) -> Config:
        if self.store is not None and not any(section.snapshot for section in self.models.values()):
            raise ValueError("store goes with models that have a snapshot: name one (snapshot: NAME), or leave store out")
        return self

    @model_validator(mode="after")
    def _a_door_for_what_is_pushed(self) -> Config:
        told = any(source.type == "push" for section in self.models.values() for source in section.sources)
        if bool(self.push) != told:
            raise ValueError("push, with its token_file, goes with models that have a source of type push: give both, or neither")
        if self.push and self.metrics is None:
            raise ValueError("metrics is missing: the address that demand is posted to")
        return self

    @model_validator(mode="after")
    def _each_its_own_address(self) -> Config:
        seen: dict[address.Address, str] = {}
        for who, text in self.addresses:
            where = address.Address.to_listen(text)
            if where.port and where in seen:
                raise ValueError(f"{seen[where]} and {who} cannot both listen on {text}")
            seen[where] = who
        return self

    @property
    def addresses(self) -> list[tuple[str, str]]:
        """Who listens, and where."""
        found: list[tuple[str, str | None]] = [
            ("the gateway (listen)", self.listen),
            ("the metrics' server (metrics)", self.metrics),
            ("the agent's metrics' server (agent_metrics)", self.agent_metrics),
            ("the external scaler (keda.listen)", self.keda.listen if self.keda else None),
        ]
        return [(who, where) for who, where in found if where is not None]


def load(path: Path) -> Config:
    """Reads the file; its relative paths count from its own folder.

    Raises:
        BadConfig: it cannot be read, is no YAML, or a field is unknown or of no use.
    """
    config = read(path, Config)
    here = path.resolve().parent
    models = {
        name: model.model_copy(
            update={
                "directory": here / model.directory,
                "shared": tuple((here / folder.expanduser()).resolve() for folder in model.shared),
                "sources": tuple(source.beside(here) for source in model.sources),
            }
        )
        for name, model in config.models.items()
    }
    update: dict[str, Any] = {"state": (here / config.state).resolve(), "models": models}
    if config.push:
        update["push"] = PushSection(token_file=here / config.push.token_file)
    if config.keda and (tls := config.keda.tls):
        files = {name: here / file for name, file in tls if file is not None}
        update["keda"] = config.keda.model_copy(update={"tls": tls.model_copy(update=files)})
    return config.model_copy(update=update)


def read(path: Path, kind: type[S]) -> S:
    """Raises: BadConfig: the file cannot be read, is no YAML, or a field is unknown or of no use."""
    try:
        found = read_yaml(path)
        return kind.model_validate({} if found is None else found)
    except BadFile as error:
        raise BadConfig(str(error)) from None
    except ValidationError as error:
        wrong = error.errors()
        lines = lines_of(path, [each["loc"] for each in wrong])
        problems = [
            f"{_where(each['loc'])}: {each['msg'].removeprefix('Value error, ')}{f' (line {line})' if line else ''}"
            for each, line in zip(wrong, lines, strict=True)
        ]
        raise BadConfig(" ".join(f"{path}: {'; '.join(problems)}".split())) from None


def _where(loc: tuple[int | str, ...]) -> str:
    """The field as it stands in the file; of a mapping's key that is wrong, the message speaks."""
    return ".".join(str(each) for each in loc if each != "[key]") or "the file"
