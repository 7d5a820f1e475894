"""Folders of no more use, also where they cannot be removed at once."""

from pathlib import Path

from tests.worlds.exhausted import descriptors_left
from zerowake_shared.discard import discard


def made(folder: Path) -> Path:
    (folder / "below").mkdir(parents=True)
    (folder / "below/file").write_bytes(b"content")
    return folder


def test_all_of_it_goes(tmp_path: Path) -> None:
    discard(made(tmp_path / "one"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    discard(tmp_path / "one")


def test_what_could_not_go_for_want_of_descriptors_goes_with_the_next(tmp_path: Path) -> None:
    one, two, three = (made(tmp_path / name) for name in ("one", "two", "three"))
    with descriptors_left(0):
        discard(one)
        discard(two)
    assert one.exists() and two.exists()
    discard(three)
    assert list(tmp_path.iterdir()) == []
