"""What the source of Linen modules uses, read without running it."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from nnx_bridge.audit._definitions import Definition, Definitions, Source
from nnx_bridge.audit._findings import Finding, Kind, ModuleClass, of_linen, ordered
from nnx_bridge.compat import difference

# What every Linen module has, and what its rewrite therefore always changes.
EVERYWHERE = {"Module", "compact", "nowrap", "RNNCellBase"}

# Methods of modules that have a finding of another kind: the position of the name that it is about.
_NAMED: Mapping[str, tuple[Kind, int, str]] = {
    "param": ("parameter", 0, ""),
    "variable": ("collection", 0, ""),
    "make_rng": ("rng stream", 0, "params"),
    "sow": ("sow", 1, ""),
    "perturb": ("perturb", 0, ""),
}


def linen_classes(sources: list[Source]) -> dict[str, Definition]:
    """The classes in these files that derive from a module of Linen.

    They are called by their names, and those of one name in several files by file and name.
    """
    return _named_apart(_modules(Definitions(sources)))


def _modules(definitions: Definitions) -> list[Definition]:
    found: dict[Definition, bool] = {}

    def is_module(cls: Definition) -> bool:
        if cls not in found:
            found[cls] = False  # Of a circle of bases.
            found[cls] = any(
                _is_linen_module(base, cls.source)
                or ((known := definitions.of(base, cls.source)) is not None and is_module(known))
                for base in map(_bare, cls.node.bases)
            )
        return found[cls]

    return [cls for cls in definitions.all if is_module(cls)]


def _bare(base: ast.expr) -> ast.expr:
    """`Block` of `Block[T]`."""
    return base.value if isinstance(base, ast.Subscript) else base


def _is_linen_module(base: ast.expr, source: Source) -> bool:
    linen = getattr(nn, source.names.linen(base) or "", None)
    return isinstance(linen, type) and issubclass(linen, nn.Module)


def _named_apart(modules: list[Definition]) -> dict[str, Definition]:
    times = Counter(cls.node.name for cls in modules)
    return {cls.node.name if times[cls.node.name] == 1 else cls.full_name: cls for cls in modules}


def _uses(
    cls: Definition, classes: Mapping[str, Definition], definitions: Definitions
) -> tuple[str, ...]:
    """Those among `classes` that the source of a class names."""
    names = {other: name for name, other in classes.items()}
    nodes = (node for node in ast.walk(cls.node) if isinstance(node, ast.Name | ast.Attribute))
    found = {definitions.of(node, cls.source) for node in nodes} - {cls, None}
    return tuple(sorted(names[other] for other in found if other in names))


def audit_sources(
    sources: list[Source], only: set[str] | None = None
) -> tuple[tuple[Finding, ...], tuple[ModuleClass, ...]]:
    """The findings and the module classes in these files.

    Args:
      sources: The files.
      only: The names of the classes to look at; by default all, and what is outside of classes.
    """
    definitions = Definitions(sources)
    classes = _named_apart(_modules(definitions))
    if only is not None:
        classes = {name: cls for name, cls in classes.items() if cls.node.name in only}
    findings: list[Finding] = []
    described = {}
    inside = {id(cls.node) for cls in classes.values()}  # A class may be written inside another.
    for name, cls in classes.items():
        findings += _findings(cls.node, cls.source, name, inside)
        uses = _uses(cls, classes, definitions)
        described[name] = ModuleClass(name, cls.source.at(cls.node), uses)
    if only is None:
        for source in sources:
            findings += _findings(source.tree, source, "", inside)
    return tuple(findings), ordered(described)


def names_used(sources: list[Source], name: str) -> set[str]:
    """A class and every other module class that it names, directly or not."""
    definitions = Definitions(sources)
    classes = _named_apart(_modules(definitions))
    found: set[str] = set()
    new = {name}
    while new:
        found |= new
        known = [classes[n] for n in new & classes.keys()]
        new = {used for cls in known for used in _uses(cls, classes, definitions)} - found
    return found


def _findings(root: ast.AST, source: Source, module: str, skipped: set[int]) -> Iterator[Finding]:
    calls: dict[int, ast.Call] = {}
    for node in _code(root, skipped):
        if isinstance(node, ast.Call):
            calls[id(node.func)] = node
            yield from _of_method(node, source, module)
        name = source.names.linen(node)
        if name is None or name in EVERYWHERE or isinstance(getattr(node, "ctx", None), ast.Store):
            continue
        call = calls.get(id(node))
        try:
            difference(name)
        except KeyError:
            if not hasattr(nn, name) or hasattr(nnx, name):
                continue  # A function that both have, such as `relu`.
            yield Finding(
                "api", name, module, source.at(node), "by hand", "-", "NNX has no such name"
            )
            continue
        fields, unknown, settings = _fields(name, call, source)
        yield of_linen(
            name,
            module=module,
            where=source.at(node),
            fields=fields,
            unknown=unknown,
            settings=settings,
        )


def _of_method(call: ast.Call, source: Source, module: str) -> Iterator[Finding]:
    function = call.func
    if not (
        module
        and isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "self"
        and not function.attr.startswith("_")  # `self.__call__(x)` is Python's.
        and hasattr(nn.Module, function.attr)
    ):
        return
    row = difference(f"Module.{function.attr}")
    if function.attr not in _NAMED:
        if row.route != "native":
            yield of_linen(row.linen, module=module, where=source.at(call))
        return
    kind, position, default = _NAMED[function.attr]
    name = default
    if len(call.args) > position:
        argument = call.args[position]
        text = argument.value if isinstance(argument, ast.Constant) else ast.unparse(argument)
        name = str(text)
    use = f"nnx.{row.nnx}"
    if kind == "collection":
        use = variable_use(name)
    yield Finding(kind, name, module, source.at(call), row.route, use, row.what)


def variable_use(collection: str) -> str:
    """The Variable type of a collection, which is not made where there is none."""
    try:
        return f"nnx.{nnx.variable_type_from_name(collection).__name__}"
    except ValueError:
        return "a subclass of nnx.Variable"


def _code(root: ast.AST, skipped: set[int]) -> Iterator[ast.AST]:
    """The nodes of a class or a file that run, outermost first: no annotations and no imports."""
    for field, value in ast.iter_fields(root):
        if field in ("annotation", "returns"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and id(node) not in skipped:
                yield node
                yield from _code(node, skipped)


def _fields(
    name: str, call: ast.Call | None, source: Source
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The fields that a call gives: their values where they are known, the source of the others,
    and the source of all."""
    if call is None:
        return {}, {}, {}
    linen = getattr(nn, name, None)
    names: list[str] = []
    if dataclasses.is_dataclass(linen):
        names = [f.name for f in dataclasses.fields(linen) if f.name not in ("parent", "name")]
    given = {**dict(zip(names, call.args, strict=False))}
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    settings = {field: ast.unparse(node) for field, node in given.items() if field != "name"}
    fields, unknown = {}, {}
    for field, node in given.items():
        try:
            fields[field] = _value(node, source)
        except ValueError:
            unknown[field] = ast.unparse(node)
    if any(keyword.arg is None for keyword in call.keywords):
        unknown |= {field: "**" for field in names if field not in given}
    return fields, unknown, settings


def _value(node: ast.expr, source: Source) -> Any:
    """The value of a constant, or of a dtype such as `jnp.bfloat16`.

    Raises:
      ValueError: It is known only when the program runs.
    """
    dotted = source.names.dotted(node) or ""
    if dotted.startswith(("jax.numpy.", "numpy.")):
        try:
            return jnp.dtype(dotted.rpartition(".")[-1])
        except TypeError:
            raise ValueError(dotted) from None
    return ast.literal_eval(node)
