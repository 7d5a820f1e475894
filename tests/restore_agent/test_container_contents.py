"""What an engine finds in another container: what it wrote itself, nothing that goes with a pod, and an environment that is right there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from restore_agent.places import overlay
from restore_agent.places.container import Container
from restore_agent.places.container_error import ContainerError
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from tests.worlds.agent import PORT
from tests.worlds.captured import ADDRESS, IMAGE, answer_of, nothing, request
from tests.worlds.containers import Callers, container
from tests.worlds.image import MAPPED, PYTHON, SERVER

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")

POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
ASKED = {
    "env": [POD_IP, {"name": "URL", "value": "http://$(POD_IP)"}, {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
}


def variables(address: str, key: str = "one", **more: str) -> list[str]:
    every = {"HOSTNAME": f"pod-of-{address}", "POD_IP": address, "URL": f"http://{address}", "KEY": key, **more}
    return [f"{name}={value}" for name, value in every.items()]


async def test_an_engine_keeps_no_stale_environment_unless_that_is_allowed(node: Node, callers: Callers, tmp_path: Path) -> None:
    """What it may keep is told, and the right values lie where an engine can ask for them."""
    words = [str(PYTHON), str(SERVER), str(PORT), "1", str(MAPPED)]
    async with container(tmp_path / "two", callers.folder, env=variables("10.0.0.1")):
        place = Container(await callers.next(), IMAGE, [ADDRESS], asked=ASKED)
        captured = await node.capture(dataclasses.replace(request(words), name="other"), nothing, Phases(), place.open)
        await place.close()
    b = variables("10.0.0.2", DATABASE_SERVICE_HOST="10.9.9.9")
    for given, allowed, words in (
        (b, False, [r"POD_IP \(status.podIP\), URL \(status.podIP\); spec.staleEnvironment: allowed"]),
        (variables("10.0.0.2", key="two"), True, ["other values in this pod: KEY$"]),
        (b, True, []),
        (variables("10.0.0.1"), False, []),
    ):
        async with container(tmp_path / "three", callers.folder, env=given) as three:
            place = Container(await callers.next(), IMAGE, [ADDRESS], asked=ASKED, stale_allowed=allowed)
            if words:
                with pytest.raises(RestoreFailed, match=words[0]) as refused:
                    await node.restore_into(place, "other", captured.snapshot, Phases())
                assert refused.value.reason == "incompatible"
                continue
            await node.restore_into(place, "other", captured.snapshot, Phases())
            assert place.contents.stale == (["DATABASE_SERVICE_HOST", "HOSTNAME", "POD_IP", "URL"] if allowed else [])
            told = json.loads(three.execute("cat", "/run/zerowake/control/environment.json"))
            assert {f"{name}={value}" for name, value in told.items()} >= set(given)


# It keeps a file open, another one in reach, a folder to stand in and a file that it maps, all of it in /var/cache.
IN_VOLUME = f"cp {MAPPED} /var/cache/map && mkdir /var/cache/work && cd /var/cache/work && echo kept >../kept && ln -s kept ../link && "


async def test_an_empty_dir_that_only_the_engine_has_is_carried(node: Node, callers: Callers, tmp_path: Path) -> None:
    server = f"{IN_VOLUME} exec {PYTHON} {SERVER} {PORT} 8 /var/cache/map 3>>/var/cache/log"
    plain = dataclasses.replace(request(["/bin/sh", "-c", server]), name="other")
    async with container(tmp_path / "two", callers.folder, read_only=True, empty_dirs=["/var/cache"]):
        place = Container(await callers.next(), IMAGE, [ADDRESS], ["/var/cache"])
        captured = await node.capture(plain, nothing, Phases(), place.open)
        await place.close()
    async with container(tmp_path / "three", callers.folder, read_only=True, empty_dirs=["/var/cache"]) as three:
        three.execute("sh", "-c", "echo new >/var/cache/kept")
        place = Container(await callers.next(), IMAGE, [ADDRESS], ["/var/cache"])
        replica = await node.restore_into(place, "other", captured.snapshot, Phases())
        assert captured.snapshot.manifest.canary
        assert await answer_of(replica.engine) == json.loads(captured.snapshot.manifest.canary.answer)
        assert three.execute("cat", "/var/cache/link") == "new\n", "what another has put there stays"


async def test_a_volume_that_is_too_large_is_not_carried(
    node: Node, callers: Callers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said where an engine does not need it, and refused where it does."""
    monkeypatch.setattr(overlay, "MAX_BYTES", 1 << 21)
    server = f"cat {MAPPED} {MAPPED} >/var/cache/much; exec {PYTHON} {SERVER} {PORT} 8"
    for name, words, mapped in (("other", "", MAPPED), ("third", r"uses /var/cache/much in an emptyDir.* more than", "/var/cache/much")):
        async with container(tmp_path / name, callers.folder, empty_dirs=["/var/cache"]):
            place = Container(await callers.next(), IMAGE, [ADDRESS], ["/var/cache"])
            taking = node.capture(
                dataclasses.replace(request(["/bin/sh", "-c", f"{server} {mapped}"]), name=name), nothing, Phases(), place.open
            )
            if words:
                with pytest.raises(ContainerError, match=words):
                    await taking
            else:
                await taking
                assert place.contents.left_behind == ["/var/cache"]


async def test_files_of_a_volume_that_others_fill_are_not_there_in_the_next_pod(node: Node, callers: Callers, tmp_path: Path) -> None:
    """Whatever else it uses: what lies in /tmp would be carried."""
    async with container(tmp_path / "two", callers.folder):
        place = Container(await callers.next(), IMAGE, [ADDRESS], ["/tmp", "/var/cache"], ["/var/cache"])
        server = f"cp {MAPPED} /var/cache/map && exec {PYTHON} {SERVER} {PORT} 8 /var/cache/map 3>>/tmp/log"
        with pytest.raises(ContainerError, match=r"uses /var/cache/map in an emptyDir \(/var/cache\), which other containers"):
            await node.capture(dataclasses.replace(request(["/bin/sh", "-c", server]), name="other"), nothing, Phases(), place.open)
