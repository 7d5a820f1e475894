"""What `zerowake doctor` finds of a zerowake.yaml: what is wrong in it, whether its ports are free, and whether its commands are there."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Sequence

from scaler.kubernetes import checkup
from scaler.local.config import BadConfig, Config, ModelSection, load
from zerowake_shared.checkup import Check, Finding, Subject, fails, ok, told
from zerowake_shared.listening import CannotListen, check_free
from zerowake_shared.state_folder import OWNER_LOCK, STORE_LOCK, holder_of
from zerowake_shared.tls import BadCertificate, server_credentials


def versions(_: Subject) -> Sequence[Finding]:
    """Of zerowake, and of what runs it."""
    return [ok(f"zerowake {importlib.metadata.version('zerowake')} under Python {platform.python_version()}")]


def file(subject: Subject) -> Sequence[Finding]:
    """What is wrong in it."""
    if subject.file is None:
        return []
    try:
        config = load(subject.file)
    except BadConfig as error:
        said = str(error)
        return [fails(each, "scaler/README.md has every key, its kind and its default") for each in said.split("; ")]
    found = [ok(f"{subject.file}: {len(config.models)} models")]
    if config.keda and config.keda.tls:
        try:
            server_credentials(config.keda.tls.files)
        except BadCertificate as error:
            found.append(told(error, of="keda.tls"))
    if config.push and not config.push.token_file.is_file():
        found.append(fails(f"{config.push.token_file} is not there", "put the token there", "push.token_file"))
    return found


def ports(subject: Subject) -> Sequence[Finding]:
    """Of each address, whether each address can be listened on, or is listened on by the `zerowake up` that has this state folder."""
    found = []
    for who, address in config.addresses if (config := _config(subject)) else ():
        try:
            check_free(address, who)
        except CannotListen as error:
            ours = [holder for lock in (OWNER_LOCK, STORE_LOCK) if (holder := holder_of(subject.state / lock))]
            running = next((holder for holder in ours if holder in str(error)), "")
            found.append(ok(f"{address}: served by {running}", who) if running else told(error, of=who))
        else:
            found.append(ok(f"{address} is free", who))
    return found


def commands(subject: Subject) -> Sequence[Finding]:
    """Whether each model's program and folder are there."""
    found = []
    for name, section in config.models.items() if (config := _config(subject)) else ():
        if not section.command:
            found.append(ok(f"none: restored from {section.snapshot}, and never started cold", name))
        elif not section.directory.is_dir():
            found.append(fails(f"its folder {section.directory} is not there", "make it, or correct `directory`", name))
        elif program := _program(section):
            found.append(ok(program, name))
        else:
            remedy = "install it, give its whole path, or set PATH in `env`"
            found.append(fails(f"no program {section.command[0]} in {section.directory} or on PATH", remedy, name))
    return found


def _program(section: ModelSection) -> str:
    """Where it is; empty: nowhere."""
    word = section.command[0]
    return shutil.which(str(section.directory / word) if "/" in word else word, path=section.engine_env.get("PATH")) or ""


def _config(subject: Subject) -> Config | None:
    """None: there is none to look at; what is wrong in it is told once, by `file`."""
    try:
        return load(subject.file) if subject.file else None
    except BadConfig:
        return None


CHECKS = (
    *checkup.CHECKS,
    Check("version", versions, of_cluster=None),
    Check("zerowake.yaml", file),
    Check("port", ports),
    Check("command", commands),
)
