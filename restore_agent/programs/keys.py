"""`zerowake key …`: by which keys snapshots are signed and encrypted, and whose signatures count. An agent that runs follows at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restore_agent.programs import listing
from restore_agent.programs.command_line import Keys, State, failures_told
from restore_agent.programs.main import DEFAULT_STATE, CannotRun
from restore_agent.snapshots.catalog import keys_of
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from zerowake_shared.output import Format, Output

app = typer.Typer(no_args_is_help=True, help="Makes, lists, trusts and revokes the keys that snapshots are signed and encrypted by.")


@app.command()
def make(
    encryption: Annotated[
        bool, typer.Option("--encryption", help="A key to encrypt by what is put into stores, instead of a pair.")
    ] = False,
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Makes a pair of keys to sign snapshots with from now on. The key that signed before stays trusted until it is revoked."""
    with failures_told():
        if encryption:
            _make_encryption(EncryptionKeys(keys_of(state, keys)))
            return
        keyring = _keyring(state, keys)
        before = keyring.signing
        fresh = keyring.make()
        typer.echo(f"key {fresh} signs from now on; other nodes take its snapshots by `zerowake key trust {keyring.public_file(fresh)}`")
        if before:
            typer.echo(f"key {before}, which signed before, stays trusted until `zerowake key revoke {before}`")


@app.command("list")
def list_keys(state: State = DEFAULT_STATE, keys: Keys = None, output: Output = Format.TEXT) -> None:
    """Lists the keys whose signatures count, those that were revoked, and those that stores are encrypted by."""
    with failures_told():
        keyring = _keyring(state, keys)
        listing.print_keys(keyring, EncryptionKeys(keyring.folder), output)


@app.command()
def trust(
    file: Annotated[Path, typer.Argument(help="The other node's public key, in PEM.", metavar="FILE")],
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Takes another node's public key: from now on its snapshots count here."""
    with failures_told():
        try:
            pem = file.read_bytes()
        except OSError as error:
            raise CannotRun(f"{file} cannot be read: {error.strerror}") from None
        typer.echo(f"key {_keyring(state, keys).trust(pem)} is trusted")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="ID of the key, as `zerowake key list` has it.", metavar="KEY")],
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Takes the trust in a key back: what it has signed is restored no more. `zerowake snapshot sign` signs by another."""
    with failures_told():
        _keyring(state, keys).revoke(key)
        typer.echo(f"key {key} is revoked")


def _make_encryption(keys: EncryptionKeys) -> None:
    before = next((each for each, (_, path) in keys.all().items() if path == keys.writes_by), None)
    typer.echo(
        f"key {keys.make()} encrypts what this node puts into stores from now on; every other node that is to use those needs "
        f"{keys.writes_by}, and without it nobody reads them again: keep a copy"
    )
    if before:
        typer.echo(
            f"key {before}, which encrypted before, still decrypts; once everything that is to stay was pushed again, remove "
            f"{keys.folder / 'encryption' / f'{before}.key'} here and elsewhere"
        )


def _keyring(state: Path, keys: Path | None) -> Keyring:
    return Keyring(keys_of(state, keys))
