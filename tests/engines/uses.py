"""What an adapter does with its engine, read from its own source, and compared with what a release of the engine defines.

The adapter's code is walked as it would run, with types in the place of values: imports and annotations of the engine's say what a name is,
the base class's method says what its override is passed, what is hooked says what the hook is passed, and a call of a function of ours says
what that is passed. So every attribute that is read or set on something of the engine's must be there, every call must fit what is called,
and what is awaited must be asynchronous; a new use is looked at without anybody listing it. What the engine's source does not say (`Any`,
what torch and transformers define) is not judged. What nothing says at all is given: `known`, the types of attributes of ours, as
"Class.attribute", and `hooks`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from restore_agent.workload.fitting import Class, Definition, Function, Hook, Imported, Module, Sources, hooked

_COPIES = {"copy", "deepcopy"}
_WRAPPERS = {"Optional", "Final", "ClassVar", "Annotated", "Awaitable"}
_LISTS = {"list", "List", "Sequence", "Iterable", "tuple", "set", "frozenset"}


@dataclass(frozen=True)
class Of:
    """An instance of a class of the engine's."""

    type: Class


@dataclass(frozen=True)
class Many:
    """Something to iterate over."""

    each: object


@dataclass(frozen=True)
class Method:
    """A function of the engine's; bound: it gets its first argument by itself."""

    name: str
    module: Module
    node: Function
    bound: bool


@dataclass(frozen=True)
class Self:
    """An instance of a class of ours."""

    node: ast.ClassDef


@dataclass(frozen=True)
class Given:
    """What a parameter that only takes certain words takes."""

    words: frozenset[object]


@dataclass
class Uses:
    """One file of the adapter against one release. `found` is what does not fit, `seen` what was compared."""

    sources: Sources
    module: Module
    known: dict[str, tuple[str, str]] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()
    found: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    _attributes: dict[tuple[str, str], object] = field(default_factory=dict)
    _walked: set[tuple[object, ...]] = field(default_factory=set)

    def walk(self) -> Uses:
        classes = [node for node in self.module.tree.body if isinstance(node, ast.ClassDef)]
        self._block([node for node in self.module.tree.body if not isinstance(node, ast.ClassDef | Function)], {})
        for _ in range(2):  # what __init__ sets is known the second time, wherever it stands
            for node in classes:
                for decorator in node.decorator_list:
                    self._value(decorator, {})
                for method in node.body:
                    if isinstance(method, Function):
                        self._method(node, method)
        for hook in self.hooks:
            self._hook(hook)
        return self

    def _hook(self, hook: Hook) -> None:
        """A function of ours, with the types that the hooked one is passed and returns."""
        ours, theirs = self.module.names[hook.function], hooked(self.sources, hook.target)
        self._compare(theirs is not None, hook.target)
        if theirs is None or not isinstance(ours, Function):
            return
        module, node = theirs
        types = {each.arg: self._annotated(module, each.annotation) for each in node.args.args}
        owner, _, name = hook.target.rpartition(".")[0].rpartition(".")
        for each in self.sources.classes(self.sources.find(owner, name)):
            types["self"] = Of(each)
        passed = list(types.values())
        if hook.kind == "AFTER":
            passed.insert(0, self._annotated(module, node.returns))
        self._block(ours.body, dict(zip((each.arg for each in ours.args.args), passed, strict=False)))

    def _method(self, node: ast.ClassDef, method: Function) -> None:
        environment: dict[str, object] = {"self": Self(node), "cls": Self(node)}
        for above in self._bases(node):
            if (there := above.member(method.name)) and isinstance(there[1], Function):
                self.seen.add(f"{there[0].name}.{method.name}, replaced")
                for parameter in (*there[1].args.args[1:], *there[1].args.kwonlyargs):
                    environment[parameter.arg] = self._annotated(there[0].module, parameter.annotation)
        self._block(method.body, environment)

    def _bases(self, node: ast.ClassDef) -> list[Class]:
        found: list[Class] = []
        for base in node.bases:
            match self._value(base, {}):
                case Definition() as definition:
                    found += self.sources.classes(definition)
                case Class() as each:
                    found.append(each)
        return found

    # Statements

    def _block(self, body: list[ast.stmt], environment: dict[str, object]) -> None:
        for node in body:
            match node:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self._assign(target, value, self._value(value, environment), environment)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self._assign(target, value, self._value(value, environment), environment)
                case ast.For(target=target, iter=iterated) | ast.AsyncFor(target=target, iter=iterated):
                    self._iterate(target, iterated, environment)
                    self._block([*node.body, *node.orelse], environment)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self._block(node.body, dict(environment))
                case ast.If() | ast.While() | ast.With() | ast.AsyncWith() | ast.Try():
                    for child in ast.iter_child_nodes(node):
                        if isinstance(child, ast.withitem):
                            self._value(child.context_expr, environment)
                        elif isinstance(child, ast.ExceptHandler):
                            self._block(child.body, environment)
                        elif isinstance(child, ast.expr):
                            self._value(child, environment)
                    self._block([*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])], environment)
                case _:
                    self._children(node, environment)

    def _assign(self, target: ast.expr, value: ast.expr, type: object, environment: dict[str, object]) -> None:
        match target, value:
            case ast.Name(id=name), _:
                environment[name] = type
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                for each, one in zip(targets, values, strict=True):
                    self._assign(each, one, self._value(one, environment), environment)
            case ast.Attribute(value=owner, attr=name), _:
                match self._value(owner, environment):
                    case Self(node=node):
                        if type is not None:
                            self._attributes[node.name, name] = type
                    case _:
                        self._value(target, environment)

    def _iterate(self, target: ast.expr, iterated: ast.expr, environment: dict[str, object]) -> None:
        match self._value(iterated, environment):
            case Many(each=each):
                self._assign(target, iterated, each, environment)

    # Expressions: each has the type it is known to have, or None

    def _value(self, node: ast.AST, environment: dict[str, object]) -> object:
        match node:
            case ast.Name(id=name):
                return environment[name] if name in environment else self._named(name)
            case ast.Attribute(value=owner, attr=name):
                return self._attribute(self._value(owner, environment), name)
            case ast.Await(value=ast.Call() as call):
                return self._call(call, environment, awaited=True)
            case ast.Call():
                return self._call(node, environment, awaited=False)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                inner = dict(environment)
                for each in node.generators:
                    self._iterate(each.target, each.iter, inner)
                    self._children(each, inner)
                self._children(node, inner)
            case ast.NamedExpr(target=target, value=value):
                self._assign(target, value, type := self._value(value, environment), environment)
                return type
            case ast.Lambda():
                self._value(node.body, environment)
            case _:
                self._children(node, environment)
        return None

    def _children(self, node: ast.AST, environment: dict[str, object]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr | ast.keyword):
                self._value(child, environment)

    def _named(self, name: str) -> object:
        match self.module.names.get(name):
            case Imported(module=module, name=imported):
                return self._typed(self.sources.find(module, imported))
            case (ast.FunctionDef() | ast.AsyncFunctionDef()) as function:
                return function
        return None

    def _typed(self, found: object) -> object:
        match found:
            case Definition(module=module, node=(ast.FunctionDef() | ast.AsyncFunctionDef()) as node):
                return Method(f"{module.name}.{node.name}", module, node, bound=False)
            case Definition(node=None):
                return found
            case Definition():
                return next(iter(self.sources.classes(found)), None)
        return None

    def _attribute(self, owner: object, name: str) -> object:
        match owner:
            case Definition(module=module, node=None):
                found = self.sources.find(module.name, name)
                self._compare(found is not None, f"{module.name}.{name}")
                return self._typed(found)
            case Self(node=node):
                if f"{node.name}.{name}" in self.known:
                    (type,) = self.sources.classes(self.sources.find(*self.known[f"{node.name}.{name}"])) or (None,)
                    self._compare(type is not None, ".".join(self.known[f"{node.name}.{name}"]))
                    return Of(type) if type else None
                if (node.name, name) in self._attributes:
                    return self._attributes[node.name, name]
                own = {each.name for each in node.body if isinstance(each, Function)} | {
                    each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
                }
                return None if name in own or name.startswith("_") else self._inherited(self._bases(node), name)
            case Of(type=type):
                return self._inherited([type], name)
        return None

    def _inherited(self, classes: list[Class], name: str) -> object:
        for each in classes:
            match each.member(name):
                case (owner, (ast.FunctionDef() | ast.AsyncFunctionDef()) as method):
                    self._compare(True, f"{each.name}.{name}")
                    if any(ast.unparse(decorator).endswith("property") for decorator in method.decorator_list):
                        return self._annotated(owner.module, method.returns)
                    return Method(f"{each.name}.{name}", owner.module, method, bound=True)
                case (owner, node):
                    self._compare(True, f"{each.name}.{name}")
                    if isinstance(node, ast.AnnAssign):
                        return self._annotated(owner.module, node.annotation)
                    return self._assigned(owner, node)
                case None:
                    self._compare(not each.is_known, f"{each.name}.{name}")
        return None

    def _assigned(self, owner: Class, node: ast.AST) -> object:
        """What the engine gives an attribute in its __init__: of a parameter's, or of a parameter's attribute."""
        if (made := owner.member("__init__")) is None or not isinstance(made[1], Function):
            return None
        parameters = {each.arg: self._annotated(made[0].module, each.annotation) for each in made[1].args.args[1:]}
        match node:
            case ast.Name(id=name):
                return parameters.get(name)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in parameters:
                return self._attribute(parameters[name], attribute)
            case ast.Call(func=made_of) if found := self.sources.classes(self.sources.evaluate(owner.module, made_of)):
                return Of(found[0])
        return None

    # Calls

    def _call(self, call: ast.Call, environment: dict[str, object], *, awaited: bool) -> object:
        passed = [self._value(each, environment) for each in call.args]
        for keyword in call.keywords:
            self._value(keyword.value, environment)
        match call.func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                me = environment.get("self")
                called = self._inherited(self._bases(me.node), name) if isinstance(me, Self) else None
            case ast.Name(id=name) if name in _COPIES and passed:
                return passed[0]
            case _:
                called = self._value(call.func, environment)
        match called:
            case Method():
                self._fits(call, called, awaited)
                return self._annotated(called.module, called.node.returns)
            case Class() as type:
                return Of(type)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                given = dict(zip((each.arg for each in called.args.args), passed, strict=False))
                if (key := (called.name, *map(repr, given.values()))) not in self._walked:
                    self._walked.add(key)
                    self._block(called.body, given)
        return None

    def _fits(self, call: ast.Call, called: Method, awaited: bool) -> None:
        names = [each.arg for each in (*called.node.args.posonlyargs, *called.node.args.args)][called.bound :]
        needed = set(names[: len(names) - len(called.node.args.defaults)])
        by_name = {keyword.arg for keyword in call.keywords if keyword.arg}
        taken = {*names, *(each.arg for each in called.node.args.kwonlyargs)}
        shown = f"{called.name}({', '.join([ast.unparse(each) for each in call.args] + [ast.unparse(each) for each in call.keywords])})"
        there = f"takes ({ast.unparse(called.node.args)})"
        many = len(call.args) > len(names) and not called.node.args.vararg
        self._compare(not many and (by_name <= taken or bool(called.node.args.kwarg)), shown, there)
        self._compare(needed <= by_name | set(names[: len(call.args)]), shown, there)
        is_async = isinstance(called.node, ast.AsyncFunctionDef)
        self._compare(is_async == awaited, shown, f"is {'' if is_async else 'not '}asynchronous")
        annotations = {each.arg: each.annotation for each in (*called.node.args.args, *called.node.args.kwonlyargs)}
        given = {**dict(zip(names, call.args, strict=False)), **{each.arg: each.value for each in call.keywords if each.arg}}
        for name, value in given.items():
            type = self._annotated(called.module, annotations.get(name))
            if isinstance(value, ast.Constant) and isinstance(type, Given):
                self._compare(value.value in type.words, shown, f"takes {sorted(map(str, type.words))} as {name}")

    def _annotated(self, module: Module, annotation: ast.AST | None) -> object:  # noqa: PLR0911 - one return for each kind
        match annotation:
            case ast.Constant(value=str(text)):
                return self._annotated(module, ast.parse(text, mode="eval").body)
            case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                return self._annotated(module, left) or self._annotated(module, right)
            case ast.Subscript(value=ast.Name(id="Literal"), slice=words):
                return Given(frozenset(each.value for each in ast.walk(words) if isinstance(each, ast.Constant)))
            case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _WRAPPERS | _LISTS:
                first = self._annotated(module, inner.elts[0] if isinstance(inner, ast.Tuple) else inner)
                return first if name in _WRAPPERS else Many(first)
            case ast.AnnAssign(value=ast.AST() as alias):
                return self._annotated(module, alias)
            case ast.Name() | ast.Attribute():
                match self.sources.evaluate(module, annotation):
                    case Definition(module=there, node=ast.ClassDef() as node):
                        return Of(Class(self.sources, there, node))
                    case Definition(module=there, node=(ast.Subscript() | ast.BinOp() | ast.AnnAssign()) as alias):
                        return self._annotated(there, alias)
        return None

    def _compare(self, fits: bool, what: str, there: str = "is not there") -> None:
        self.seen.add(what)
        if not fits and (line := f"{what} {there}") not in self.found:
            self.found.append(line)


def uses(sources: Sources, path: Path, known: dict[str, tuple[str, str]] | None = None, hooks: tuple[Hook, ...] = ()) -> Uses:
    """What a file of ours does with a package. `hooks`: those of this file."""
    return Uses(sources, Module(f"ours.{path.stem}", path.read_text(), is_package=False), known or {}, hooks).walk()
