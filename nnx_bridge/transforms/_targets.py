"""What is lifted: a function of modules gives such a function, a module class gives a class.

The class that comes out inherits from the one that goes in. Its methods are lifted, and where the
transform adds an axis to Variables so is ``__init__``, which makes them with that axis; so the
Variables are where they are in the class that went in.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

import lifted
from lifted._errors import Path, describe, suggestion
from lifted._group import group_of, is_target, is_value, leaves
from nnx_bridge import _flax_private
from nnx_bridge.functional import NNXGroup

Fn = Callable[..., Any]
# Makes a lifted function of a function, by the options of the transform.
Lift = Callable[..., Fn]


def lift_target(
    name: str,
    target: Any,
    lift: Lift,
    options: Mapping[str, Any],
    methods: Any = None,
    construct: Lift | None = None,
) -> Any:
    """The lifted class or function.

    Args:
      name: of the transform.
      target: a module class, a `functools.partial` of one, or a function of a module.
      lift: ``lift(fn, **options)`` is the lifted function.
      options: of the transform.
      methods: names of the methods to lift, or a dict with options for each; as in Linen.
      construct: ``construct(fn, **options)`` is the lifted ``__init__``, for those options that it
        takes.

    Raises:
      TypeError: the target is none of these, or ``methods`` are none.
      ValueError: the class has no such method, or methods disagree on how its Variables are made.
    """
    if isinstance(target, functools.partial) and _is_class(target.func):
        made = lift_target(name, target.func, lift, options, methods, construct)
        return functools.partial(made, *target.args, **target.keywords)
    if _is_class(target):
        return _lift_class(name, target, lift, _per_method(name, methods, options), construct)
    if inspect.ismethod(target) and is_target(target.__self__):
        method = f"{type(target.__self__).__name__}.{target.__name__}"
        raise TypeError(
            f"{name}: expected a function of a module, got a method of one that exists. Lift the "
            f"function {method}, and give the module first: {name}({method}, ...)(mdl, ...)."
        )
    if isinstance(target, type) or is_target(target) or not callable(target):
        if isinstance(target, type):
            got = f"the class {target.__name__}"
        else:
            got = type(target).__name__ if is_target(target) else describe(target)
        raise TypeError(
            f"{name}: expected a class of NNX modules or a function of a module, got {got}. For a "
            f"module that exists lift a function of it: {name}(lambda mdl, x: mdl(x), ...)."
        )
    return lift(target, **options)


def _is_class(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, nnx.Module)


def _per_method(
    name: str, methods: Any, options: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    if methods is None:
        return {"__call__": options}
    if isinstance(methods, Mapping):
        for method, given in methods.items():
            for option in given:
                if option not in options:
                    raise TypeError(
                        f"{name}: methods: {method!r} has the unknown option {option!r}; "
                        f"{suggestion(option, options)}."
                    )
        return dict(methods)
    if isinstance(methods, Sequence) and not isinstance(methods, str):
        return dict.fromkeys(methods, options)
    raise TypeError(
        f"{name}: methods: expected names of methods, or a dict with the options of each, got "
        f"{methods!r}."
    )


def _lift_class(
    name: str,
    base: type[nnx.Module],
    lift: Lift,
    methods: Mapping[str, Mapping[str, Any]],
    construct: Lift | None,
) -> type[nnx.Module]:
    for method in methods:
        if not callable(getattr(base, method, None)):
            raise ValueError(f"{name}: methods: {base.__name__} has no method {method!r}.")
    body: dict[str, Any] = {
        method: lift(_as_base(base, getattr(base, method)), **options)
        for method, options in methods.items()
    }
    if construct is not None and methods:
        agreed = _agreed(name, construct, methods)
        body["__init__"] = construct(_as_base(base, base.__init__), **agreed)
    body |= {"__module__": base.__module__, "__doc__": base.__doc__}
    metaclass: Any = type(base)
    made: type[nnx.Module] = metaclass(f"{name.capitalize()}{base.__name__}", (base,), body)
    return made


def _agreed(name: str, construct: Lift, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options that ``construct`` takes, on which all methods that have them must agree.

    Raises:
      ValueError: they do not.
    """
    parameters = inspect.signature(construct).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found: dict[str, tuple[str, Any]] = {}
    for method, options in methods.items():
        for option, value in options.items():
            if not takes_all and option not in parameters:
                continue
            other, expected = found.setdefault(option, (method, value))
            if value != expected:
                raise ValueError(
                    f"{name}: methods: {other!r} has {option}={expected!r} and {method!r} has "
                    f"{option}={value!r}, but the class makes its Variables once, for both. Give "
                    "them the same."
                )
    return {option: value for option, (_, value) in found.items()}


def _as_base(base: type[nnx.Module], fn: Fn) -> Fn:
    """The method, in which the module is of the class that was lifted: a method that it calls is
    not lifted once more."""

    @functools.wraps(fn)
    def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        derived = type(self)
        # Not `self.__class__ =`, which an NNX module takes for an attribute of its own.
        object.__setattr__(self, "__class__", base)
        try:
            return fn(self, *args, **kwargs)
        finally:
            object.__setattr__(self, "__class__", derived)

    return method


def is_recorded(path: Path, leaf: Any) -> bool:
    """Whether ``leaf`` is what a module has recorded: in a capture context, or by `sow` outside of
    any, which makes an attribute of it."""
    if _flax_private.is_captured(path):
        return True
    sown = issubclass(type(leaf), nnx.Intermediate) and leaf.get_raw_value()
    return isinstance(sown, tuple)


def functionalized(name: str, mdl: Any, **filters: Any) -> lifted.Functional:
    """The functional of NNX targets.

    Raises:
      TypeError: ``mdl`` has a target of another kind.
    """
    if any(group_of(x) not in (NNXGroup, None) for x in leaves(mdl)):
        raise TypeError(
            f"{name}: the module is one of Linen, for which there is flax.linen.{name}; this one "
            "is for NNX modules, among them nnx_bridge.Host."
        )
    return lifted.functionalize(mdl, **filters)


def bare(functional: lifted.Functional) -> lifted.Functional:
    """The functional of NNX targets without their arrays, which are its input anyway; see
    `NNXGroup.bare`."""
    groups = [group.bare() for group in functional.groups if isinstance(group, NNXGroup)]
    return lifted.Functional(functional.structure, groups)


@jax.tree_util.register_static
class _Hole:
    """Stands in the arguments for the module that was there."""

    def __init__(self, number: int) -> None:
        self.number = number


def with_targets(fn: Fn, mdl: Any, args: Any) -> tuple[Fn, Any, Any]:
    """The function, its module and its arguments, with the modules among the arguments moved into
    the target, so that they are lifted too, as in Linen."""
    inner: list[Any] = []

    def taken(x: Any) -> Any:
        if not is_target(x):
            return x
        inner.append(x)
        return _Hole(len(inner) - 1)

    if not any(map(is_target, leaves(args))):
        return fn, mdl, args
    args = jax.tree.map(taken, args, is_leaf=lambda x: is_target(x) or is_value(x))

    def call(targets: Any, *args: Any, **kwargs: Any) -> Any:
        mdl, *inner = targets
        args, kwargs = jax.tree.map(
            lambda x: inner[x.number] if isinstance(x, _Hole) else x,
            (args, kwargs),
            is_leaf=lambda x: isinstance(x, _Hole),
        )
        return fn(mdl, *args, **kwargs)

    return call, (mdl, *inner), args


def check_carry(name: str, carry: Any) -> None:
    """Checks that a carry holds arrays only.

    Raises:
      TypeError: there is a module or a Variable in it.
    """
    for x in leaves(carry):
        if isinstance(x, nnx.Variable):
            raise TypeError(
                f"{name}: the carry holds a Variable, a {type(x).__name__}; pass its value, x[...]."
            )
        if is_target(x):
            raise TypeError(
                f"{name}: the carry holds a module, a {type(x).__name__}. Put it into mdl, which "
                "may be a pytree of modules; variable_carry or carry_variables is for what the "
                "steps write to it."
            )


def check_output(name: str, y: Any) -> None:
    """Checks that a function returned no module.

    Raises:
      TypeError: it did.
    """
    if any(is_target(x) and not is_value(x) for x in leaves(y)):
        raise TypeError(f"{name}: the function returned a module; return the arrays of it.")
