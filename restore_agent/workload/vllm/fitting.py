"""Whether the vLLM beside us is one that the adapter fits: found in its sources, before anything of it is imported.

vLLM's extension points move between its releases. An import that fails in a worker is two processes' tracebacks, with the reason far
above the end. So the plugin, which vLLM asks before all else, compares what worker.py and platform.py import and override with what vLLM's
files define, and ends the engine with one line. tests/engines/ asks the same, and more, of every released version (`make engines`).

Rejected: a list of versions, which is wrong about the next one and about forks; `inspect`, which imports half of vLLM into a process that
needs none of it. Names are followed as Python does, through re-exports and base classes; what leads out of the package is not judged.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

Read = Callable[[str], str | None]  # a file of a package, by its path from where packages lie; None: there is none
Function = ast.FunctionDef | ast.AsyncFunctionDef
_HARMLESS = {"object", "ABC", "Generic", "Protocol"}  # bases that have no attributes of interest
_FOLDER = Path(__file__).parent
OURS = ("worker.py", "platform.py")


@dataclass(frozen=True)
class Imported:
    """A name that a module has from another: all of it where `name` is None."""

    module: str
    name: str | None


@dataclass(frozen=True)
class Definition:
    """Where a name ends: what defines it; None: all of the module."""

    module: Module
    node: ast.AST | None


class Outside:
    """A name that leads out of the package, or is made at run time."""


class Module:
    """What one file defines at its top level, whatever the condition."""

    def __init__(self, name: str, text: str, is_package: bool) -> None:
        self.name = name
        self.tree = ast.parse(text)
        self.names: dict[str, ast.AST | Imported] = {}
        self.stars: list[str] = []
        self._package = name if is_package else name.rpartition(".")[0]
        self._take(self.tree.body)

    def _take(self, body: list[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.Import() | ast.ImportFrom():
                    self._import(node)
                case ast.If() | ast.Try() | ast.With():
                    for inner in ("body", "orelse", "finalbody"):
                        self._take(getattr(node, inner, []))
                    for handler in getattr(node, "handlers", []):
                        self._take(handler.body)
                case _:
                    self.names.update(_defined(node))

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                first = alias.name.partition(".")[0]
                self.names[alias.asname or first] = Imported(alias.name if alias.asname else first, None)
            elif alias.name == "*":
                self.stars.append(self._origin(node))
            else:
                self.names.setdefault(alias.asname or alias.name, Imported(self._origin(node), alias.name))

    def _origin(self, node: ast.ImportFrom) -> str:
        package = self._package.split(".")
        above = package[: len(package) - node.level + 1] if node.level else []
        return ".".join([*above, *([node.module] if node.module else [])])


@dataclass
class Sources:
    """The modules of one package, read when they are asked for."""

    read: Read
    package: str = "vllm"
    _modules: dict[str, Module | None] = field(default_factory=dict)

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = name.replace(".", "/")
            text, is_package = self.read(f"{path}/__init__.py"), True
            if text is None:
                text, is_package = self.read(f"{path}.py"), False
            self._modules[name] = None if text is None else Module(name, text, is_package)
        return self._modules[name]

    def find(self, module: str, name: str | None) -> Definition | Outside | None:
        """What a module's name stands for. None: there is no such module, or it has no such name."""
        if module.partition(".")[0] != self.package:
            return Outside()
        if (there := self.module(module)) is None:
            return None
        if name is None:
            return Definition(there, None)
        match there.names.get(name):
            case Imported() as origin:
                return self.find(origin.module, origin.name)
            case None:
                inside = (self.find(star, name) for star in there.stars)
                found = next((each for each in inside if each is not None), None) or self.find(f"{module}.{name}", None)
                return found or (Outside() if "__getattr__" in there.names else None)
            case node:
                return Definition(there, node)

    def evaluate(self, module: Module, expression: ast.AST) -> Definition | Outside | None:
        """What a name of a module's, with dots or without, stands for."""
        match expression:
            case ast.Name(id=name):
                return Outside() if (found := self.find(module.name, name)) is None and name in vars(builtins) else found
            case ast.Attribute(value=value, attr=name):
                match self.evaluate(module, value):
                    case Definition(module=there, node=None):
                        return self.find(there.name, name)
                    case None:
                        return None
            case ast.Subscript(value=value):
                return self.evaluate(module, value)
        return Outside()

    def classes(self, found: Definition | Outside | None) -> list[Class]:
        """The classes that a name may stand for: several where a condition decides."""
        match found:
            case Definition(module=module, node=ast.ClassDef() as node):
                return [Class(self, module, node)]
            case Definition(module=module, node=ast.IfExp(body=body, orelse=other)):
                return [each for branch in (body, other) for each in self.classes(self.evaluate(module, branch))]
            case Definition(module=module, node=(ast.Name() | ast.Attribute()) as node):
                return self.classes(self.evaluate(module, node))
        return []


@dataclass(frozen=True)
class Class:
    """A class of the package, with what it inherits."""

    sources: Sources
    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return f"{self.module.name}.{self.node.name}"

    @cached_property
    def _lineage(self) -> tuple[list[Class], bool]:
        found, known = [self], True
        for base in self.node.bases:
            above = self.sources.classes(self.sources.evaluate(self.module, base))
            name = base.value if isinstance(base, ast.Subscript) else base
            known = known and (bool(above) or ast.unparse(name).split(".")[-1] in _HARMLESS)
            for each in above:
                found += each._lineage[0]
                known = known and each._lineage[1]
        return found, known

    @property
    def lineage(self) -> list[Class]:
        """Itself, and what it inherits of."""
        return self._lineage[0]

    @property
    def is_known(self) -> bool:
        """Whether every base is in the package, so that what is not found is not there."""
        return self._lineage[1]

    def member(self, name: str) -> tuple[Class, ast.AST] | None:
        """A method, or what a field is declared by or assigned from, and whose it is."""
        for each in self._lineage[0]:
            for node in each.node.body:
                match node:
                    case ast.FunctionDef() | ast.AsyncFunctionDef() if node.name == name:
                        return each, node
                    case ast.AnnAssign(target=ast.Name(id=declared)) if declared == name:
                        return each, node
                    case ast.Assign(targets=targets) if name in {target.id for target in targets if isinstance(target, ast.Name)}:
                        return each, node.value
        for each in self._lineage[0]:
            for inner in ast.walk(each.node):
                match inner:
                    case ast.AnnAssign(target=ast.Attribute(value=ast.Name(id="self"), attr=assigned)) if assigned == name:
                        return each, inner
                    case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=assigned)], value=value) if assigned == name:
                        return each, value
        return None

    def abstract(self) -> set[str]:
        methods = {node.name: each for each in reversed(self._lineage[0]) for node in each.node.body if isinstance(node, Function)}
        return {name for name, each in methods.items() if "abstractmethod" in _decorators(each.member(name))}


def misfits(sources: Sources, ours: tuple[str, ...] = OURS) -> list[str]:
    """What the adapter's files import and override that is not there, or is something else there; a line each."""
    found: list[str] = []
    for file in ours:
        module = Module(f"restore_agent.workload.vllm.{Path(file).stem}", (_FOLDER / file).read_text(encoding="utf-8"), is_package=False)
        found += _imports(sources, module)
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    for above in sources.classes(_ours(sources, module, base)):
                        found += _overrides(node, above)
    return found


@cache
def told() -> set[str]:
    """The methods of our worker that our middleware calls by name, which are vLLM's nowhere."""
    calls = (node for node in ast.walk(ast.parse((_FOLDER / "middleware.py").read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return {
        str(call.args[0].value)
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "collective_rpc" and isinstance(call.args[0], ast.Constant)
    }


def difference(passed: ast.arguments, taken: ast.arguments) -> str:
    """Why a method that takes the one cannot be called as its base class's, which takes the other; empty: it can."""
    given, own = [each.arg for each in (*passed.posonlyargs, *passed.args)], [each.arg for each in (*taken.posonlyargs, *taken.args)]
    if taken.vararg is None and own[: len(given)] != given:
        return f"vLLM passes ({', '.join(given)}), and it takes ({', '.join(own)})"
    if len(own) - len(taken.defaults) > len(given) - len(passed.defaults):
        return f"vLLM may leave out what it wants of ({', '.join(own)})"
    by_name = {each.arg for each in passed.kwonlyargs} - {each.arg for each in taken.kwonlyargs} - set(own)
    if by_name and taken.kwarg is None:
        return f"vLLM passes {', '.join(sorted(by_name))} by name, which it does not take"
    if (passed.vararg and not taken.vararg) or (passed.kwarg and not taken.kwarg):
        return "vLLM passes more than it names, and it takes no more than it names"
    return ""


@cache
def installed() -> tuple[str, list[str]]:
    """vLLM's version, and what does not fit; nothing where there is no vLLM, or none whose sources can be read."""
    try:
        spec, number = find_spec("vllm"), version("vllm")
    except (ImportError, ValueError, PackageNotFoundError):
        return "", []
    places = [Path(place).parent for place in (spec.submodule_search_locations or [] if spec else [])]

    def read(path: str) -> str | None:
        return next((file.read_text(encoding="utf-8") for place in places if (file := place / path).is_file()), None)

    return number, misfits(Sources(read)) if any((place / "vllm/__init__.py").is_file() for place in places) else []


def _imports(sources: Sources, module: Module) -> list[str]:
    wanted = [(each.module, each.name) for each in module.names.values() if isinstance(each, Imported)]
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                match _ours(sources, module, node.value):
                    case Definition(module=there, node=None) if name in module.names:
                        wanted.append((there.name, attribute))
    missing = [(where, what) for where, what in wanted if sources.find(where, what) is None]
    return [f"there is no {where}" if sources.module(where) is None else f"{where} has no {what}" for where, what in missing]


def _ours(sources: Sources, module: Module, expression: ast.AST) -> Definition | Outside | None:
    """What a name of ours stands for in the package."""
    match expression:
        case ast.Name(id=name) if isinstance(origin := module.names.get(name), Imported):
            return sources.find(origin.module, origin.name)
        case ast.Attribute(value=value, attr=name):
            match _ours(sources, module, value):
                case Definition(module=there, node=None):
                    return sources.find(there.name, name)
    return Outside()


def _overrides(node: ast.ClassDef, above: Class) -> list[str]:
    found, ours = [], {each.name: each for each in node.body if isinstance(each, Function)}
    for name, method in ours.items():
        there = above.member(name)
        if name in told() or (name.startswith("_") and not name.startswith("__")):
            if there is not None:
                found.append(f"{above.name} has a {name} of its own, which ours would replace")
        elif there is None:
            if above.is_known and not name.startswith("__"):
                found.append(f"{above.name} has no {name}, which ours is to replace")
        elif not isinstance(there[1], Function):
            found.append(f"{above.name}.{name} is no method")
        elif isinstance(there[1], ast.AsyncFunctionDef) != isinstance(method, ast.AsyncFunctionDef):
            found.append(f"{above.name}.{name} is {'' if isinstance(there[1], ast.AsyncFunctionDef) else 'not '}asynchronous")
        elif why := difference(there[1].args, method.args):
            found.append(f"{above.name}.{name}: {why}")
    return [*found, *(f"{above.name} wants a {name}, which ours does not have" for name in sorted(above.abstract() - ours.keys()))]


def _defined(node: ast.stmt) -> dict[str, ast.AST]:
    """The names that a statement gives something, and what."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return {name: node}
        case ast.Assign(targets=targets, value=value):
            return {each.id: value for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name: node}
    return {}


def _decorators(member: tuple[Class, ast.AST] | None) -> Iterator[str]:
    if member is not None and isinstance(member[1], Function):
        yield from (ast.unparse(each).split(".")[-1] for each in member[1].decorator_list)
