"""Whether the engine beside us is one that an adapter fits: found in its sources, before anything of it is imported.

An engine's extension points move between its releases. An import that fails in a worker is two processes' tracebacks, with the reason far
above the end. So each adapter's plugin, which its engine asks before all else, compares what the adapter's files import, override and hook
with what the engine's files define, and ends the engine with one line. tests/engines/ asks the same, and more, of every released version
(`make engines`).

Rejected: a list of versions, which is wrong about the next one and about forks; `inspect`, which imports half of an engine into a process
that needs none of it. Names are followed as Python does, through re-exports and base classes; what leads out of the package is not judged.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

Read = Callable[[str], str | None]  # a file of a package, by its path from where packages lie; None: there is none
Function = ast.FunctionDef | ast.AsyncFunctionDef
_HARMLESS = {"object", "ABC", "Generic", "Protocol"}  # bases that have no attributes of interest


@dataclass(frozen=True)
class Hook:
    """A function of ours that the engine calls with, or in place of, one of its own.

    `target`: the engine's, with dots. `kind`: "BEFORE" is passed what the engine's is, "AFTER" what it has returned before that,
    "REPLACE" is called in its place. `function`: ours, in `file`.
    """

    target: str
    kind: str
    file: str
    function: str


@dataclass(frozen=True)
class Adapter:
    """What is looked at for one engine. `told`: methods of ours that we call by name, which must not be the engine's."""

    engine: str  # as people write it
    package: str
    folder: Path
    files: tuple[str, ...]
    told: frozenset[str] = frozenset()
    hooks: tuple[Hook, ...] = ()

    def module(self, file: str) -> Module:
        return Module(f"ours.{Path(file).stem}", (self.folder / file).read_text(encoding="utf-8"), is_package=False)


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
    package: str
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
        if (there := self.module(module)) is None:  # or a folder without a file of its own
            return self.find(f"{module}.{name}", None) if name else None
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


def misfits(sources: Sources, adapter: Adapter) -> list[str]:
    """What the adapter's files import, override and hook that is not there, or is something else there; a line each."""
    found: list[str] = []
    for file in adapter.files:
        module = adapter.module(file)
        found += _imports(sources, module)
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    for above in sources.classes(_ours(sources, module, base)):
                        found += _overrides(node, above, adapter)
    return [*found, *(why for hook in adapter.hooks if (why := _hooked(sources, hook, adapter)))]


def hooked(sources: Sources, target: str) -> tuple[Module, Function] | None:
    """The engine's function that a hook's target names. None: there is none."""
    owner, _, name = target.rpartition(".")
    match sources.find(owner, name):
        case Definition(module=module, node=(ast.FunctionDef() | ast.AsyncFunctionDef()) as node):
            return module, node
    module_name, _, class_name = owner.rpartition(".")
    for each in sources.classes(sources.find(module_name, class_name)):
        match each.member(name):
            case (found, (ast.FunctionDef() | ast.AsyncFunctionDef()) as node):
                return found.module, node
    return None


def difference(passed: ast.arguments, taken: ast.arguments, engine: str) -> str:
    """Why a method that takes the one cannot be called as its base class's, which takes the other; empty: it can."""
    given, own = [each.arg for each in (*passed.posonlyargs, *passed.args)], [each.arg for each in (*taken.posonlyargs, *taken.args)]
    if taken.vararg is None and own[: len(given)] != given:
        return f"{engine} passes ({', '.join(given)}), and it takes ({', '.join(own)})"
    if len(own) - len(taken.defaults) > len(given) - len(passed.defaults):
        return f"{engine} may leave out what it wants of ({', '.join(own)})"
    by_name = {each.arg for each in passed.kwonlyargs} - {each.arg for each in taken.kwonlyargs} - set(own)
    if by_name and taken.kwarg is None:
        return f"{engine} passes {', '.join(sorted(by_name))} by name, which it does not take"
    if (passed.vararg and not taken.vararg) or (passed.kwarg and not taken.kwarg):
        return f"{engine} passes more than it names, and it takes no more than it names"
    return ""


def installed(adapter: Adapter) -> tuple[str, list[str]]:
    """The engine's version, and what does not fit; nothing where there is no such engine, or none whose sources can be read."""
    try:
        spec, number = find_spec(adapter.package), version(adapter.package)
    except (ImportError, ValueError, PackageNotFoundError):
        return "", []
    places = [Path(place).parent for place in (spec.submodule_search_locations or [] if spec else [])]

    def read(path: str) -> str | None:
        return next((file.read_text(encoding="utf-8") for place in places if (file := place / path).is_file()), None)

    is_there = any((place / adapter.package / "__init__.py").is_file() for place in places)
    return number, misfits(Sources(read, adapter.package), adapter) if is_there else []


def refusal(adapter: Adapter, otherwise: str) -> str:
    """One line for an engine that the adapter does not fit; empty: it fits. `otherwise`: what else the user can do."""
    number, found = installed(adapter)
    if not found:
        return ""
    more = f" (and {len(found) - 1} more)" if found[1:] else ""
    return (
        f"zerowake's adapter does not fit {adapter.engine} {number}: {found[0]}{more}. Use one that it fits "
        f"(restore_agent/README.md names them), or {otherwise}."
    )


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


def _overrides(node: ast.ClassDef, above: Class, adapter: Adapter) -> list[str]:
    found, ours = [], {each.name: each for each in node.body if isinstance(each, Function)}
    for name, method in ours.items():
        there = above.member(name)
        if name in adapter.told or (name.startswith("_") and not name.startswith("__")):
            if there is not None:
                found.append(f"{above.name} has a {name} of its own, which ours would replace")
        elif there is None:
            if above.is_known and not name.startswith("__"):
                found.append(f"{above.name} has no {name}, which ours is to replace")
        elif not isinstance(there[1], Function):
            found.append(f"{above.name}.{name} is no method")
        elif isinstance(there[1], ast.AsyncFunctionDef) != isinstance(method, ast.AsyncFunctionDef):
            found.append(f"{above.name}.{name} is {'' if isinstance(there[1], ast.AsyncFunctionDef) else 'not '}asynchronous")
        elif why := difference(there[1].args, method.args, adapter.engine):
            found.append(f"{above.name}.{name}: {why}")
    return [*found, *(f"{above.name} wants a {name}, which ours does not have" for name in sorted(above.abstract() - ours.keys()))]


def _hooked(sources: Sources, hook: Hook, adapter: Adapter) -> str:
    """Why a hook does not fit; empty: it does."""
    if (theirs := hooked(sources, hook.target)) is None:
        return f"there is no {hook.target}, which ours is to hook"
    ours = adapter.module(hook.file).names[hook.function]
    assert isinstance(ours, ast.FunctionDef), f"{hook.function} of {hook.file} is no function"
    if isinstance(theirs[1], ast.AsyncFunctionDef):
        return f"{hook.target} is asynchronous"
    passed, taken = (ast.arguments(**dict(ast.iter_fields(each.args))) for each in (theirs[1], ours))
    if hook.kind == "AFTER":  # the first is what was returned
        taken.args = taken.args[1:]
    if [each.arg for each in passed.args[:1]] == ["self"]:  # ours may name it otherwise
        passed.args, taken.args = passed.args[1:], taken.args[1:]
    why = difference(passed, taken, adapter.engine)
    return f"{hook.target}: {why}" if why else ""


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
