"""What the READMEs name is there: links, files and folders, and the files on the way of a request, a capture, a restore and a fill."""

import re
from pathlib import Path

import pytest

from tests.worlds.readme_commands import section

ROOT = Path(__file__).parent.parent
ROOMS = ("scaler", "restore_agent", "gpumem")
READMES = [ROOT / "README.md", *(page for room in (*ROOMS, "proto", "deploy", "tests") for page in (ROOT / room).rglob("README.md"))]
WAYS = [("scaler", "One request"), ("restore_agent", "One capture"), ("restore_agent", "One restore"), ("gpumem", "One fill")]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_are_there(page: Path) -> None:
    places = (page.parent, ROOT, ROOT / "proto", ROOT / "scaler")
    for path in re.findall(r"`(\.?[\w.-]+/[\w./-]*\.(?:py|c|sh|yaml|proto|json))`", page.read_text()):
        assert "NAME" in path or any((place / path).exists() for place in places), path


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_names_its_folders_and_no_others(room: str) -> None:
    rows = re.findall(r"^\| (`.*?) \|", section(f"{room}/README.md", "Folders"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)/`", row)}
    assert named == {folder.parent.name for folder in (ROOT / room).glob("*/__init__.py")}


@pytest.mark.parametrize(("room", "title"), WAYS)
def test_each_step_of_a_way_names_a_file(room: str, title: str) -> None:
    steps = re.findall(r"^\d+\. (.*)$", section(f"{room}/README.md", title), re.MULTILINE)
    assert len(steps) > 5
    for step in steps:
        files = re.findall(r"`([\w/]+\.(?:py|c))`", step)
        assert files or step.startswith(("KEDA", "One machine")), step
        for file in files:
            folder = next((found for found in (ROOT / room).rglob(Path(file).name) if str(found).endswith(file)), None)
            assert folder is not None, file
