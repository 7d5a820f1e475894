"""`zerowake completion SHELL`: a script by which a shell completes commands, options, and values of which there are few.

The script holds the whole tree of commands as it is now, so that a shell answers at once. What typer brings was tried and not taken: it
starts `zerowake` at each press of the key, which imports for a second before it can say anything. shtab makes such scripts too, of argparse
alone.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from typer.main import get_command


class Shell(enum.Enum):
    """Those whose scripts there are."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@dataclass(frozen=True, slots=True)
class Command:
    """One command or group. `path`: its words after `zerowake`. options: of each its names, its help, and its values if they are few."""

    path: str
    help: str
    below: tuple[str, ...]
    options: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = ()
    values: tuple[str, ...] = field(default=())  # of its arguments, if they are few

    @property
    def words(self) -> str:
        """What can stand there but options: where it is empty, a shell completes files."""
        return " ".join([*self.below, *self.values])

    @property
    def flags(self) -> str:
        return " ".join(name for names, _, _ in self.options for name in names)


def add_to(app: typer.Typer) -> None:
    """`app`: the whole of `zerowake`, which by then has, or is given later, every room's commands."""

    @app.command()
    def completion(shell: Annotated[Shell, typer.Argument(help="bash, zsh or fish.")]) -> None:
        """Prints a script that completes commands and options in your shell: source <(zerowake completion bash)"""
        commands = list(commands_of(get_command(app)))
        typer.echo(_fish(commands) if shell is Shell.FISH else _bash(commands, is_zsh=shell is Shell.ZSH), nl=False)


def commands_of(command: Any, path: str = "") -> Iterator[Command]:
    """A command of typer's, and all below it."""
    below = {name: each for name, each in getattr(command, "commands", {}).items() if not each.hidden}
    options: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = []
    values: list[str] = []
    for each in command.params:
        kind: Any = each.type_descriptor.annotation
        choices = tuple(str(choice.value) for choice in kind) if isinstance(kind, type) and issubclass(kind, enum.Enum) else ()
        if each.opts[0].startswith("-"):
            if not each.hidden:
                options.append(((*each.opts, *each.secondary_opts), _line(each.help or ""), choices))
        else:
            values += choices
    options.append((("--help",), "Show this message and exit.", ()))
    yield Command(path, _line(command.help or ""), tuple(below), tuple(options), tuple(values))
    for name, each in below.items():
        yield from commands_of(each, f"{path} {name}".strip())


def _line(text: str) -> str:
    """The first sentence, without what would end a quotation of a shell's."""
    return text.strip().split("\n")[0].split(". ")[0].rstrip(".").replace("'", "").replace("`", "").replace("\\", "")


def _bash(commands: list[Command], *, is_zsh: bool) -> str:
    def quoted(*words: str) -> str:
        return f"'{' '.join(words).strip()}'"

    paths = "|".join(quoted(each.path) for each in commands if each.path)
    words = "".join(f"        {quoted(each.path)}) words='{each.words}' flags='{each.flags}' ;;\n" for each in commands)
    values = "".join(
        f"        {'|'.join(quoted(each.path, name) for name in names)}) words='{' '.join(choices)}' ;;\n"
        for each in commands
        for names, _, choices in each.options
        if choices
    )
    head = "autoload -U +X bashcompinit && bashcompinit\n" if is_zsh else ""
    return f"""{head}_zerowake() {{
    local path="" word words="" flags="" at=1 current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    while [ "$at" -lt "$COMP_CWORD" ]; do
        word="${{COMP_WORDS[at]}}"
        [ "$word" = "--" ] && return
        case "${{path:+$path }}$word" in {paths}) path="${{path:+$path }}$word" ;; esac
        at=$((at + 1))
    done
    case "$path" in
{words}    esac
    case "${{path:+$path }}$before" in
{values}    esac
    case "$current" in -*) words="$flags" ;; esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _zerowake zerowake
"""


def _fish(commands: list[Command]) -> str:
    paths = " ".join(f"'{each.path}'" for each in commands if each.path)
    lines = [
        "function __zerowake_at",
        "    set -l path ''",
        "    for word in (commandline -opc)[2..-1]",
        '        set -l longer (string trim -- "$path $word")',
        f'        contains -- "$longer" {paths}; and set path "$longer"',
        "    end",
        '    test "$path" = "$argv[1]"',
        "end",
    ]
    by_path = {each.path: each for each in commands}
    for command in commands:
        at = f"complete -c zerowake -n \"__zerowake_at '{command.path}'\""
        for name in command.below:
            lines.append(f"{at} -f -a '{name}' -d '{by_path[f'{command.path} {name}'.strip()].help}'")
        lines += [f"{at} -f -a '{value}'" for value in command.values]
        for names, what, choices in command.options:
            flags = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names)
            lines.append(f"{at} {flags} -d '{what}'" + (f" -x -a '{' '.join(choices)}'" if choices else ""))
    return "\n".join(lines) + "\n"
