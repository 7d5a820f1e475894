"""What a model may be called, wherever it is declared."""

from pathlib import Path

import pytest

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.model_name import BadModelName, check_model_name
from scaler.books.trigger import BadTrigger, parse_trigger
from scaler.local.config import BadConfig, load

BAD = ["", " m", "m ", " ", "m\n", "a\tb", "a\x00b", "a\u00a0b", "a\u200bb", "\ufeffm", "\ud800", "m" * 513]


@pytest.mark.parametrize("name", ["m", "org/model:8b-q4_K", "/srv/models/Qwen3-8B", "a b", "模型", "m" * 512])
def test_good_names(name: str) -> None:
    assert check_model_name(name) == name
    assert parse_trigger({"model": name}).model == name
    Ledger().declare(name, ModelLimits())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_refused_wherever_it_is_declared(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadModelName):
        check_model_name(name)
    with pytest.raises(BadModelName):
        Ledger().declare(name, ModelLimits())
    with pytest.raises(BadTrigger, match="model"):
        parse_trigger({"model": name})


@pytest.mark.parametrize("name", ["", " m ", "a\\tb", "a\\0b", "\\u00a0m"])
@pytest.mark.parametrize(
    "shape", ['models: {{"{}": {{command: [x], port: 1}}}}', 'models: {{m: {{command: [x], port: 1, names: ["{}"]}}}}']
)
def test_a_bad_name_is_refused_in_the_file(name: str, shape: str, tmp_path: Path) -> None:
    file = tmp_path / "zerowake.yaml"
    file.write_text(shape.format(name))
    with pytest.raises(BadConfig, match=r"the name |NUL"):
        load(file)
