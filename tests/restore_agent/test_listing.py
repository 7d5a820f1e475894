"""What a node has, listed for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from restore_agent.programs.listing import print_keys, print_snapshots
from restore_agent.snapshots.catalog import Catalog, Corrupt, Unreadable
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from tests.worlds.snapshots import publish
from tests.worlds.travelling import node
from zerowake_shared.output import Format


def test_what_cannot_be_used_says_why_among_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with node(tmp_path) as store:
        whole = publish(store, b"x" * 8192, "whole")
    found = [*Catalog(tmp_path).list(), Unreadable("team", "torn", Corrupt("its manifest is torn"))]
    print_snapshots(found, Format.TEXT)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAMESPACE", "NAME", "DIGEST", "MODEL", "PAGES", "CRIU", "TAKEN"]
    assert [first.split()[1], first.split()[2]] == ["whole", whole.digest[:12]]
    assert second.split() == ["team", "torn", "unusable", *["its", "manifest", "is", "torn"]]
    print_snapshots(found, Format.JSON)
    one, other = json.loads(capsys.readouterr().out)
    assert (one["digest"], one["page_bytes"], one["unusable"]) == (whole.digest, whole.manifest.page_bytes, None)
    assert other == {"namespace": "team", "name": "torn", "unusable": "its manifest is torn"}


def test_a_node_without_keys_has_none_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_keys(Keyring(tmp_path), EncryptionKeys(tmp_path), Format.JSON)
    assert json.loads(capsys.readouterr().out) == []
