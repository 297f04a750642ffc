"""`cond` and `switch`: one of several functions of a module."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from lifted._engine import unbound
from lifted._errors import describe
from nnx_bridge.transforms._inputs import Inputs, Taken
from nnx_bridge.transforms._lifting import Form, Key, Lifting
from nnx_bridge.transforms._plan import Plan
from nnx_bridge.transforms._targets import check_output, with_targets


def cond(
    pred: Any,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    mdl: Any,
    *operands: Any,
    variables: Any = True,
    rngs: Any = True,
) -> Any:
    """`flax.linen.cond` on NNX: calls one of two functions of a module.

    Both must return values of one structure, and leave the module with one structure; each may
    write other Variables.

    Args:
      pred: which one is called; a scalar.
      true_fun: ``(mdl, *operands) -> result``, called where ``pred`` is true.
      false_fun: the same, called where it is false.
      mdl: an NNX module, or a pytree of them.
      *operands: arguments of both.
      variables: filter of the collections that are visible inside.
      rngs: filter of the RNG streams that are visible inside.

    Returns:
      What the function that is called returns.

    Raises:
      TypeError: a function is none, or the results differ in structure.
      ValueError: one creates or reshapes a Variable, or records a value, and the other does not.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 3))
      >>> y = nn.cond(False, lambda mdl, x: mdl(x), lambda mdl, x: x, norm, x)
      >>> norm.mean.tolist()
      [0.0, 0.0, 0.0]

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    call = _Branches("cond", (true_fun, false_fun), mdl, operands, variables, rngs)
    return call.run(lambda branches: jax.lax.cond(pred, *branches, *call.operands))


def switch(
    index: Any,
    branches: Sequence[Callable[..., Any]],
    mdl: Any,
    *operands: Any,
    variables: Any = True,
    rngs: Any = True,
) -> Any:
    """`flax.linen.switch` on NNX: calls one of several functions of a module.

    Args:
      index: which one is called; an integer scalar.
      branches: functions ``(mdl, *operands) -> result``; see `cond`.
      mdl: an NNX module, or a pytree of them.
      *operands: arguments of all.
      variables: filter of the collections that are visible inside.
      rngs: filter of the RNG streams that are visible inside.

    Returns:
      What the function that is called returns.

    Raises:
      TypeError: see `cond`.
      ValueError: see `cond`.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> heads = nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(i)) for i in range(3)])
      >>> calls = [lambda mdl, x, i=i: mdl[i](x) for i in range(3)]
      >>> nn.switch(1, calls, heads, jnp.ones(3)).shape
      (2,)

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    call = _Branches("switch", tuple(branches), mdl, operands, variables, rngs)
    return call.run(lambda branches: jax.lax.switch(index, branches, *call.operands))


class _Branches:
    """One call.

    What one branch has written, all have to return. Each returns all Variables but parameters,
    written or not; JAX takes those out again that no branch has written. Parameters are many, and
    hardly ever written in a branch: where some are, the branches are traced once more.
    """

    def __init__(
        self,
        name: str,
        fns: Sequence[Callable[..., Any]],
        mdl: Any,
        operands: tuple[Any, ...],
        variables: Any,
        rngs: Any,
    ) -> None:
        if not fns:
            raise ValueError(f"{name}: branches is empty; pass at least one function.")
        lifted = [with_targets(unbound(name, fn, mdl), mdl, operands) for fn in fns]
        _, mdl, self.operands = lifted[0]
        self._fns = [fn for fn, _, _ in lifted]
        self._lifting = Lifting(Plan.whole(name, variables, rngs), mdl, {})
        self._inputs = Inputs(self._lifting, None)
        both = zip(self._lifting.leaves, self._lifting.numbers, strict=True)
        self._returned: dict[Key, None] = {
            number: None
            for (_, leaf), numbers in both
            if not issubclass(type(leaf), nnx.Param)
            for number in numbers
        }
        self._start()

    def _start(self) -> None:
        self._written: dict[Key, None] = {}
        self._forms: dict[int, tuple[Form, list[Key]]] = {}
        self._left: dict[int, dict[str, Any]] = {}

    def run(self, choose: Callable[[list[Callable[..., Any]]], Any]) -> Any:
        """Writes what the branches have written; returns the result of the one that was called.

        Args:
          choose: calls one of the branches that it is given.
        """
        result = choose(self._branches())
        if self._written.keys() - self._returned.keys():
            self._returned |= self._written
            self._start()
            result = choose(self._branches())
        y, parts, extras = result
        form, keys = self._forms[max(self._forms)]
        kept: dict[Key, Any] = dict(enumerate(self._lifting.parts))
        kept |= dict(zip(self._returned, parts, strict=True))
        kept |= dict(zip(keys, extras, strict=True))
        updates = self._lifting.updates(form, {}, kept)
        changed = {}
        for path, _ in self._lifting.leaves:
            _, numbers, treedef = self._inputs.places[path]
            if any(number in self._written for number in numbers):
                changed[path] = treedef.unflatten([kept[number] for number in numbers])
        self._lifting.functional.publish([updates.replaced(changed)])
        return y

    def _branches(self) -> list[Callable[..., Any]]:
        """New functions, as JAX remembers what it has traced."""
        return [functools.partial(self._call, i, fn) for i, fn in enumerate(self._fns)]

    def _call(self, number: int, fn: Callable[..., Any], *operands: Any) -> Any:
        lifting = self._lifting
        step = self._inputs.step({}, ())
        try:
            with step.opened() as (mdl, take):
                y = fn(mdl, *operands)
                taken = take()
        except AttributeError as error:
            raise lifting.explain(error) from error
        check_output(lifting.plan.name, y)
        found = {key: taken.kept.pop(key) for key in list(taken.kept) if isinstance(key, int)}
        self._written |= {i: None for i, part in found.items() if part is not lifting.parts[i]}
        parts = [found.get(i, lifting.parts[i]) for i in self._returned]
        self._forms[number] = taken.form, list(taken.kept)
        self._check_alike(number, taken)
        return y, parts, list(taken.kept.values())

    def _check_alike(self, number: int, taken: Taken) -> None:
        """Checks that a branch leaves the module with the structure that the others do.

        Raises:
          ValueError: it does not.
        """
        left = {key[0]: describe(x) for key, x in taken.kept.items() if isinstance(key, tuple)}
        if taken.form.regraphed:
            left["its attributes"] = "changed"
        first = self._left.setdefault(min(self._left, default=number), left)
        for path in sorted(first.keys() | left.keys(), reverse=True):
            if first.get(path) != left.get(path):
                raise ValueError(
                    f"{self._lifting.plan.name}: one branch leaves the module with {path} "
                    f"({left.get(path) or first.get(path)}), and another one does not. "
                    "Variables must be created, and values recorded, in all branches or in none; "
                    "create them before."
                )
