"""Whether an engine is one that its adapter fits, by its sources alone: one that does, and others that each lack something."""

import ast
from pathlib import Path

import pytest

from restore_agent.workload.fitting import Definition, Outside, Sources, difference, installed, misfits, refusal
from restore_agent.workload.sglang import plugin as sglang_plugin
from restore_agent.workload.vllm import plugin as vllm_plugin
from tests.worlds import sglang_sources
from tests.worlds.vllm_sources import CHANGES, FILES, VERSION, changed, install

VLLM = vllm_plugin.adapter()
SGLANG = sglang_plugin.adapter()


def test_one_that_fits() -> None:
    assert misfits(Sources(FILES.get, "vllm"), VLLM) == []
    assert misfits(Sources(sglang_sources.FILES.get, "sglang"), SGLANG) == []


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(change: str) -> None:
    found = misfits(Sources(changed(change).get, "vllm"), VLLM)
    assert CHANGES[change][3] in "\n".join(found)


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("entrypoints/http_server.py", "def launch_server(", "def serve(", "there is no sglang.srt.entrypoints.http_server.launch_server"),
        (
            "model_loader/loader.py",
            "def get_model_loader(load_config",
            "def get_model_loader(config, load_config",
            "SGLang passes (config, load_config",
        ),
        (
            "utils/torch_memory_saver_adapter.py",
            "def create(enable: bool",
            "def create(enable: bool, tag: str",
            "create: SGLang passes (enable, tag)",
        ),
        (
            "utils/torch_memory_saver_adapter.py",
            "    def pause(self, tag: str)",
            "    def pause(self, tags: list)",
            "pause: SGLang passes (self, tags)",
        ),
        (
            "model_executor/model_runner.py",
            "def init_attention_backends(self)",
            "async def init_attention_backends(self)",
            "is asynchronous",
        ),
        ("managers/io_struct.py", "class ReleaseMemoryOccupationReqInput", "class Release", "has no ReleaseMemoryOccupationReqInput"),
    ],
)
def test_what_has_changed_of_what_is_hooked_is_named(file: str, before: str, after: str, said: str) -> None:
    text = sglang_sources.FILES[f"sglang/srt/{file}"]
    assert before in text
    files = sglang_sources.FILES | {f"sglang/srt/{file}": text.replace(before, after)}
    assert said in "\n".join(misfits(Sources(files.get, "sglang"), SGLANG))


def test_what_is_installed_is_read_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One that is imported would end the test.
    install(tmp_path, FILES | {"vllm/__init__.py": "from .version import __version__\nraise SystemExit"})
    monkeypatch.syspath_prepend(tmp_path)
    assert installed(VLLM) == (VERSION, [])
    assert refusal(VLLM, "do without") == ""


def test_where_there_is_none_nothing_is_wrong() -> None:
    assert installed(VLLM) == ("", [])


def test_names_are_followed_as_python_does() -> None:
    sources = Sources(
        {
            "a/__init__.py": "from .b import *\nimport a.c as other\ndef __getattr__(name): ...",
            "a/b.py": "from .c import deep as shown\nif True:\n    here = 1\nelse:\n    from json import loads as there",
            "a/c.py": "def deep(): ...",
        }.get,
        package="a",
    )
    for name in ("shown", "here", "other", "c"):
        assert isinstance(sources.find("a", name), Definition)
    assert isinstance(sources.find("a", "there"), Outside), "it is defined in another package"
    assert isinstance(sources.find("a", "made_up"), Outside), "the module makes names at run time"
    assert sources.find("a.c", "shallow") is None


@pytest.mark.parametrize(
    ("passed", "taken", "why"),
    [
        ("self, a, b=1", "self, a, b=1", ""),
        ("self, a, b=1", "self, a, b=1, c=2", ""),
        ("self, a, *, b", "self, a, **more", ""),
        ("self, a, b", "self, *many", ""),
        ("self, a, b", "self, a", "passes (self, a, b)"),
        ("self, a, b", "self, b, a", "passes (self, a, b)"),
        ("self, a, b=1", "self, a, b", "may leave out"),
        ("self, *, b", "self", "passes b by name"),
        ("self, **more", "self", "more than it names"),
    ],
)
def test_a_replaced_method_takes_what_is_passed(passed: str, taken: str, why: str) -> None:
    arguments = [ast.parse(f"def f({each}): ...").body[0].args for each in (passed, taken)]
    assert why in difference(*arguments, "it") and bool(why) == bool(difference(*arguments, "it"))
