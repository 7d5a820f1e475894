"""What is secret in texts and values that leave a machine, taken out: for a bug report, which strangers read.

Two ways at once, since each alone misses some. What is known to be secret is looked for wherever it stands: values of environments, keys
and tokens, as they are met (`know`). And what looks like one goes by its form: credentials in URLs, headers, options of a command line,
members and variables with a telling name, tokens of a known make, private keys. Rather too much is taken out than too little: a name stays,
its value goes. Rejected: a list of what may stay, for the logs of engines are anybody's text.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LEFT_OUT = "(left out)"
_SHORTEST = 6  # characters of a value that is looked for elsewhere: shorter ones stand in innocent words
_WORD = re.compile(r"[a-z]+|.{0,7}|[\d.]+", re.DOTALL)  # of a variable whose name does not tell, this is taken for no secret
_TELLING = r"(?:secret|token(?!s\b|iz)|passw(?:or)?d|passphrase|credential|authorization|cookie|(?:api|access|private|auth)[-_]?key)"
_NAME = re.compile(_TELLING, re.IGNORECASE)
_HARMLESS = re.compile(r"(?:file|path|name|ref)$", re.IGNORECASE)  # which names where it is, and is none itself
_ENVIRONMENTS = frozenset({"env", "environment"})
_KEPT = frozenset({"PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH"})  # known to all; of the values, too
_DROPPED = frozenset({"managedFields", "kubectl.kubernetes.io/last-applied-configuration"})
_OPTION = re.compile(rf"^--?[\w-]*(?:{_TELLING}|[-_]key)[\w-]*(?P<value>=.*)?$", re.IGNORECASE | re.DOTALL)
_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_AROUND = r"[\w.-]{0,64}"
_NO_PLACE = rf"(?!{_AROUND}(?:file|path|name|ref)\b)"
_FORMS = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        (r"(?<=://)[^\s/@?#'\"]+@", f"{LEFT_OUT}@"),
        (rf"([?&]{_AROUND}(?:{_TELLING}|key|sig|signature){_AROUND}=)[^\s&#'\"]+", rf"\1{LEFT_OUT}"),
        (r"((?:authorization|cookie|x-api-key)\\?[\"']?\s*[:=]\s*)[^\n]+", rf"\1{LEFT_OUT}"),
        (r"\b(bearer\s+)[A-Za-z0-9+/=._~-]{6,}", rf"\1{LEFT_OUT}"),
        (r"\beyJ[\w-]{5,}\.[\w-]+\.[\w-]*", LEFT_OUT),
        (r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b", LEFT_OUT),
        (r"\b(?:hf|gh[pousr]|github_pat|xox[abprs]|glpat|nvapi|sk)[-_][A-Za-z0-9_-]{12,}", LEFT_OUT),
        (rf"(--?[\w-]{{0,64}}(?:{_TELLING}|[-_]key){_NO_PLACE}[\w-]{{0,64}}[ =])(?!-)\S+", rf"\1{LEFT_OUT}"),
        # `name: value` and `name=value`, as YAML, JSON (also within a text of JSON), variables and logs have them
        (
            rf"((?<![\w./-]){_AROUND}{_TELLING}{_NO_PLACE}{_AROUND}\\?[\"']?\s*[:=]\s*)(?!\()(?:\\?\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;}}\\]+)",
            rf"\1{LEFT_OUT}",
        ),
    )
)


class Scrubber:
    """Takes secrets out. What it has come to know as one, it finds in all texts that are given to it afterwards."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: of this process; values of those names that tell are secret."""
        self._known: set[str] = set()
        for name, value in (environment or {}).items():
            if _tells(name):
                self.know(value)

    def know(self, secret: str) -> None:
        """This text is one, wherever it stands."""
        for line in (secret, *secret.splitlines()):
            if len(line := line.strip()) >= _SHORTEST and line != LEFT_OUT and not (line.startswith("/") and Path(line[:200]).exists()):
                self._known |= {line, json.dumps(line)[1:-1]}

    def value(self, value: Any, name: str = "") -> Any:
        """A value as of JSON, under this name, without what is secret in it."""
        if isinstance(value, Mapping):
            if name.lower() in _ENVIRONMENTS:
                return {key: self._of_environment(str(key), each) for key, each in value.items()}
            return {key: self.value(each, str(key)) for key, each in value.items() if key not in _DROPPED}
        if isinstance(value, list | tuple):
            if name.lower() in _ENVIRONMENTS:
                return [self._variable(each) for each in value]
            return self._words([self.value(each, name) for each in value])
        if _tells(name) and value and not isinstance(value, bool):
            self.know(str(value))
            return LEFT_OUT
        return self.text(value) if isinstance(value, str) else value

    def known_out(self, text: str) -> str:
        """Without what is known to be secret: what only looks so may be part of a syntax."""
        for secret in sorted(self._known, key=len, reverse=True):
            text = text.replace(secret, LEFT_OUT)
        return text

    def text(self, text: str) -> str:
        """A text without what is secret in it."""
        return "\n".join(self._line(line) for line in self._formless(text).split("\n"))

    def _line(self, line: str) -> str:
        """One of a log may be an object of JSON, whose members say which of them is secret."""
        if line.startswith("{") and line.endswith("}"):
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(found := json.loads(line), dict):
                    return self.known_out(json.dumps(self.value(found), ensure_ascii=False))
        for form, instead in _FORMS:
            line = form.sub(instead, line)
        return line

    def _formless(self, text: str) -> str:
        """Without what is known, and what goes over several lines."""
        return _KEY.sub(LEFT_OUT, self.known_out(text))

    def _variable(self, each: Any) -> Any:
        """One of a container's, {name, value}."""
        if isinstance(each, Mapping) and "value" in each:
            return {**each, "value": self._of_environment(str(each.get("name", "")), each["value"])}
        return self.value(each)

    def _of_environment(self, name: str, value: Any) -> Any:
        if name in _KEPT:
            return value
        if _tells(name) or not _WORD.fullmatch(str(value)):
            self.know(str(value))
        return LEFT_OUT

    def _words(self, words: list[Any]) -> list[Any]:
        """Of a command line: what follows an option with a telling name is its value."""
        found, secret = [], False
        for word in words:
            option = _OPTION.match(word) if isinstance(word, str) else None
            if secret and isinstance(word, str) and not option:
                self.know(word)
                word = LEFT_OUT  # noqa: PLW2901
            elif option and option["value"]:
                self.know(option["value"][1:])
                word = word.partition("=")[0] + f"={LEFT_OUT}"  # noqa: PLW2901
            found.append(word)
            secret = bool(option and not option["value"])
        return found


def _tells(name: str) -> bool:
    return bool(_NAME.search(name)) and not _HARMLESS.search(name)
