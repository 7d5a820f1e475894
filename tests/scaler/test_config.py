"""The file of `zerowake up`: what is wrong with it is said by name."""

from pathlib import Path

import pytest
import yaml

from scaler.local.config import BadConfig, load
from scaler.plan.rungs import Rung


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("models: {}", "models"),
        ("models: {a: {}}", "give a snapshot, a command, or both"),
        ("models: {a: {command: [x]}}", "port is missing"),
        ("models: {a: {snapshot: s, replicas: 3}}", "models.a.replicas"),
        ("models: {a: {snapshot: s, max_replicas: 0}}", "models.a.max_replicas"),
        ("models: {a: {snapshot: s, min_replicas: 3}}", "max_replicas is 1"),
        ("listen: nowhere\nmodels: {a: {snapshot: s}}", "is not HOST:PORT"),
        ("models: [", "is no YAML"),
        ("objective: median\nmodels: {a: {snapshot: s}}", "objective: Input should be 'mean' or 'p99'"),
        ("", "models: Field required"),
        ("models: {a: {snapshot: s, snapshot: t}}", "line 1: the key 'snapshot' stands here and in line 1 already"),
        ("models:\n  a: {snapshot: s}\n  a: {snapshot: t}", "line 3: the key 'a' stands here and in line 2 already"),
        ("models: {no: {snapshot: s}}", "line 1: the key 'no' is no text for YAML"),
        ("models: {' a ': {snapshot: s}}", "the name begins or ends with a space"),
        ("models: {'': {snapshot: s}}", "the name is empty"),
        ("models: {a: {command: python x.py, port: 1}}", "models.a.command: a command is a list of words"),
        ("models: {a: {command: [''], port: 1}}", "models.a.command: the program's name is empty"),
        ("models: {a: {snapshot: s, env: {A: 1}}}", "models.a.env.A: Input should be a valid string"),
        ("models: {a: {snapshot: s, env: {'A=': b}}}", "models.a: env: 'A=' cannot be the name of a variable"),
        ('models: {a: {snapshot: s, env: {A: "x\\0"}}}', "models.a.env.A: there is a NUL character"),
        ('state: "x\\0"\nmodels: {a: {snapshot: s}}', "state: there is a NUL character"),
        (
            "models: {a: {snapshot: s, env: {A: " + "x" * 1_100_000 + "}}}",
            "models.a: env: A has 1100002 bytes, and the kernel takes 131071",
        ),
        ("models: {a: {snapshot: s, cooldown_seconds: .inf}}", "models.a.cooldown_seconds"),
        ("models: {a: {snapshot: s, max_stage_seconds: .nan}}", "models.a.max_stage_seconds"),
        ("models: {a: {snapshot: s, stage: gpu}}", "models.a.stage: Input should be 'disk', 'memory', 'standby' or 'parked'"),
        (
            "models: {a: {snapshot: s, stage: standby, standby_seconds: 9}}",
            "a: standby_seconds is for stage: disk or memory; with stage",
        ),
        ("models: {a: {snapshot: s, stage: parked, standby_seconds: 9}}", "models.a: standby_seconds is .* with stage: parked an idle"),
        ("models: {a: {snapshot: s, stage: parked, parked_seconds: 9}}", "a: parked_seconds is for stage: disk, memory or standby; "),
        ("models: {a: {snapshot: s, parked_seconds: -1}}", "models.a.parked_seconds"),
        ("models: {a: {command: [x], port: 1, stage: parked}}", "models.a: stage: parked goes with a snapshot"),
        ("models: {a: {command: [x], port: 1, parked_seconds: 9}}", "models.a: parked_seconds goes with a snapshot"),
        (
            "models: {a: {snapshot: s, sources: [{url: 'http://p'}]}}",
            "models.a.sources.0: Unable to extract tag using discriminator 'type'",
        ),
        (
            "models: {a: {snapshot: s, sources: [{type: kafka}]}}",
            "models.a.sources.0: Input tag 'kafka' .* expected tags: 'cron', 'engine'",
        ),
        ("models: {a: {snapshot: s, sources: [{type: redis, url: 'redis://r'}]}}", "models.a.sources.0.redis: give either list or stream"),
        (
            "models: {a: {snapshot: s, sources: [{type: prometheus, url: 'http://p'}]}}",
            "models.a.sources.0.prometheus.query: Field required",
        ),
        (
            "models: {a: {snapshot: s, sources: [{type: push}]}}",
            "push, with its token_file, goes with models that have a source of type push",
        ),
        ("push: {token_file: t}\nmodels: {a: {snapshot: s}}", "goes with models that have a source of type push: give both, or neither"),
        (
            "push: {token_file: t}\nmodels: {a: {snapshot: s, sources: [{type: push}]}}",
            "metrics is missing: the address that demand is posted",
        ),
        ("store: models\nmodels: {a: {snapshot: s}}", "store: 'models' is no URL of a store: file:///a/folder, s3://bucket"),
        ("store: s3://key:secret@b\nmodels: {a: {snapshot: s}}", "store: s3://…@b: a URL of a store has no credentials"),
        ("store: s3://b\nmodels: {a: {command: [x], port: 1}}", "store goes with models that have a snapshot"),
        ("listen: 8080\nmodels: {a: {snapshot: s}}", "listen: "),
        ("listen: http://localhost:8080\nmodels: {a: {snapshot: s}}", "listen: 'http://localhost:8080' is not HOST:PORT"),
        ("metrics: '*:9090'\nmodels: {a: {snapshot: s}}", "metrics: '[*]:9090' is not HOST:PORT"),
        (
            "listen: ':80'\nmetrics: ':80'\nmodels: {a: {snapshot: s}}",
            r"\(listen\) and the metrics' server \(metrics\) cannot both listen on :80",
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "up.yaml"
    file.write_text(content)
    with pytest.raises(BadConfig, match=word) as refused:
        load(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("written", "stage", "parked", "standby"),
    [
        ("", Rung.MEMORY, None, None),
        ("standby_seconds: 9", Rung.MEMORY, None, 9.0),
        ("stage: standby", Rung.STANDBY, None, 0.0),
        ("parked_seconds: 5", Rung.MEMORY, 5.0, None),
        ("parked_seconds: 5, standby_seconds: 9", Rung.MEMORY, 5.0, 9.0),
        ("stage: standby, parked_seconds: 5", Rung.STANDBY, 5.0, 0.0),
        ("stage: parked", Rung.PARKED, 0.0, 0.0),
    ],
)
def test_how_a_model_waits(tmp_path: Path, written: str, stage: Rung, parked: float | None, standby: float | None) -> None:
    """None: an idle replica is not kept so; 0: until it is used."""
    file = tmp_path / "up.yaml"
    file.write_text(f"models: {{a: {{snapshot: s, {written}}}}}")
    model = load(file).models["a"].model("a")
    assert (model.stage, model.parked_seconds, model.standby_seconds) == (stage, parked, standby)


@pytest.mark.parametrize("address", ["[::1]:8080", ":8080", "localhost:8080", "0.0.0.0:0"])
def test_every_spelling_of_an_address(tmp_path: Path, address: str) -> None:
    file = tmp_path / "up.yaml"
    fields = {field: address for field in ("listen", "metrics", "agent_metrics")} if address.endswith(":0") else {"metrics": address}
    file.write_text(yaml.safe_dump({**fields, "keda": {"listen": "[::]:9443"}, "models": {"a": {"snapshot": "s"}}}))
    assert [where for _, where in load(file).addresses][-2:] == [address, "[::]:9443"]


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "up.yaml"
    file.write_text(
        "state: s\nkeda: {listen: ':1', tls: {certificate: c, key: k, client_ca: /ca}}\nmodels: {a: {snapshot: s, directory: d}}\n"
    )
    found = load(file)
    assert found.keda and found.keda.tls
    assert (found.state, found.models["a"].directory) == (tmp_path / "s", tmp_path / "d")
    assert (found.keda.tls.certificate, found.keda.tls.key, found.keda.tls.client_ca) == (tmp_path / "c", tmp_path / "k", Path("/ca"))


@pytest.mark.parametrize(("written", "rung"), [("", Rung.ABSENT), ("pin: disk", Rung.DISK), ("pin: memory", Rung.MEMORY)])
def test_what_is_pinned(tmp_path: Path, written: str, rung: Rung) -> None:
    file = tmp_path / "up.yaml"
    file.write_text(f"models: {{a: {{snapshot: s, {written}}}}}")
    assert load(file).models["a"].model("a").pin is rung


def test_what_cannot_be_pinned(tmp_path: Path) -> None:
    file = tmp_path / "up.yaml"
    file.write_text("models: {a: {snapshot: s, pin: standby}}")
    with pytest.raises(BadConfig, match=r"models\.a\.pin: Input should be 'disk' or 'memory'"):
        load(file)
    file.write_text("models: {a: {command: [serve], port: 1, pin: disk}}")
    with pytest.raises(BadConfig, match="pin goes with a snapshot"):
        load(file)
