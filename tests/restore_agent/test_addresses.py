"""An engine with sockets at its pod's own address, restored into a pod that has another one."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest
from zerowake_proto import criu_pb2

from restore_agent.pages.addresses import OtherAddresses, readdressed
from restore_agent.pages.images import ImageError, open_files, write_open_files
from restore_agent.places.container import Container
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.phases import Phases
from tests.worlds.agent import PORT
from tests.worlds.captured import IMAGE, a_node, answer_of, nothing, request
from tests.worlds.containers import Callers, container
from tests.worlds.image import MAPPED, PYTHON, SERVER

OWN, OTHER = "10.1.2.3", "10.1.9.9"
OWN6, OTHER6 = "fd00::3", "fd00::9"


def socket(source: str, target: str = "0.0.0.0") -> criu_pb2.File:
    words = [
        [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
        for packed in (ipaddress.ip_address(each).packed for each in (source, target))
    ]
    return criu_pb2.File(isk=criu_pb2.InetSocket(src_addr=words[0], dst_addr=words[1]))


def images_of(folder: Path, *files: criu_pb2.File) -> Path:
    images = folder / "images"
    images.mkdir()
    write_open_files(images, files)
    (images / "core-1.img").write_bytes(b"core")
    return images


def ends(images: Path) -> list[tuple[str, str]]:
    """Of each socket."""
    found = [each.isk for each in open_files(images) if each.HasField("isk")]
    packed = [[b"".join(word.to_bytes(4, "little") for word in words) for words in (each.src_addr, each.dst_addr)] for each in found]
    return [(str(ipaddress.ip_address(source)), str(ipaddress.ip_address(target))) for source, target in packed]


def test_both_ends_of_what_is_the_engine_s_own_move_and_nothing_else(tmp_path: Path) -> None:
    sockets = [(OWN, "0.0.0.0"), (OWN, OWN), (OWN, "10.7.7.7"), ("0.0.0.0", "0.0.0.0"), ("127.0.0.1", "127.0.0.1"), (OWN6, "::")]
    mapped = (f"::ffff:{OWN}", f"::ffff:{OWN}")
    images = images_of(tmp_path, *(socket(*each) for each in [*sockets, mapped]), criu_pb2.File())
    before = (images / "files.img").read_bytes()
    found = readdressed(images, [OTHER, OTHER6], tmp_path / "moved")
    assert found == tmp_path / "moved"
    (source, target), *_ = ends(found)[len(sockets) :]
    assert ipaddress.IPv6Address(source).ipv4_mapped == ipaddress.IPv6Address(target).ipv4_mapped == ipaddress.ip_address(OTHER)
    assert ends(found)[: len(sockets)] == [
        (OTHER, "0.0.0.0"),
        (OTHER, OTHER),
        (OTHER, "10.7.7.7"),
        *sockets[3:5],
        (OTHER6, "::"),
    ]
    assert (found / "core-1.img").samefile(images / "core-1.img")
    assert (images / "files.img").read_bytes() == before


@pytest.mark.parametrize("given", [[OWN], [OWN, OTHER6], [f"{OWN}"]])
def test_where_nothing_moves_the_images_are_those_of_all(tmp_path: Path, given: list[str]) -> None:
    images = images_of(tmp_path, socket(OWN), socket("::1", "::1"), socket("0.0.0.0"))
    assert readdressed(images, given, tmp_path / "moved") == images
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize(
    ("sources", "given", "words"),
    [
        ([OWN6], [OTHER], rf"has sockets at {OWN6}, and the pod .* has none of IPv6; have it listen on all addresses"),
        ([OWN, "10.2.2.2"], [OTHER], rf"has sockets at {OWN}, 10\.2\.2\.2, and the pod .* has the address {OTHER} of IPv4"),
    ],
)
def test_addresses_that_have_no_like_are_named(tmp_path: Path, sources: list[str], given: list[str], words: str) -> None:
    with pytest.raises(OtherAddresses, match=words):
        readdressed(images_of(tmp_path, *map(socket, sources)), given, tmp_path / "moved")


def test_a_torn_image_is_named(tmp_path: Path) -> None:
    images = images_of(tmp_path, socket(OWN))
    (images / "files.img").write_bytes((images / "files.img").read_bytes()[:-1])
    with pytest.raises(ImageError, match=r"files\.img is torn"):
        readdressed(images, [OTHER], tmp_path / "moved")


@pytest.mark.usefixtures("needs_criu", "needs_runc")
@pytest.mark.parametrize(("own", "other"), [(OWN, OTHER), (OWN6, OTHER6)])
async def test_an_engine_talks_to_itself_in_a_pod_of_another_address(callers: Callers, tmp_path: Path, own: str, other: str) -> None:
    command = [str(PYTHON), str(SERVER), str(PORT), "8", str(MAPPED)]
    async with a_node(tmp_path) as node:
        async with container(tmp_path / "one", callers.folder, address=own):
            place = Container(await callers.next(), IMAGE, [own])
            snapshot = (await node.capture(request(command), nothing, Phases(), place.open)).snapshot
            await place.close()
        assert snapshot.manifest.canary
        async with container(tmp_path / "two", callers.folder, address=other):
            place = Container(await callers.next(), IMAGE, [other])
            replica = await node.restore_into(place, "small", snapshot, Phases())
            assert await answer_of(replica.engine) == json.loads(snapshot.manifest.canary.answer)
            with node.staging.hold(snapshot) as staged:
                assert {"images"} == {path.name for path in staged.directory.iterdir() if path.name.startswith("images")}
        async with container(tmp_path / "three", callers.folder):
            place = Container(await callers.next(), IMAGE, ["2001:db8::1" if own == OWN else "192.0.2.1"])
            with pytest.raises(RestoreFailed, match=rf"has sockets at {own}, and the pod .* has none"):
                await node.restore_into(place, "small", snapshot, Phases())
