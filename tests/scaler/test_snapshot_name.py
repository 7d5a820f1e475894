"""How people write a snapshot's name."""

import pytest

from scaler.books.snapshot_name import SnapshotName


@pytest.mark.parametrize(
    ("written", "namespace", "name"), [("chat", "default", "chat"), ("team/chat", "team", "chat"), ("/chat", "default", "chat")]
)
def test_a_name_without_a_namespace_is_of_the_default_one(written: str, namespace: str, name: str) -> None:
    assert SnapshotName.parse(written) == SnapshotName(namespace, name)
    assert str(SnapshotName.parse(written)) == f"{namespace}/{name}"
