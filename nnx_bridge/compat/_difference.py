"""What a row of the table of differences says, and how it is looked up."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import flax
import jax.numpy as jnp
from flax import linen as nn

Kind: TypeAlias = Literal["layer", "transform", "api"]
Verdict: TypeAlias = Literal["equal", "differs", "missing"]
Route: TypeAlias = Literal["native", "compat", "host only", "by hand"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one name of `flax.linen` compares with its twin in `flax.nnx`.

    Attributes:
      linen: The name in `flax.linen`; a method of modules is written `Module.sow`.
      nnx: The name in `flax.nnx`, None where there is none.
      verdict: `equal`: the same numbers with the same parameters. `differs`: other numbers, or
        another behaviour, at some setting at least. `missing`: NNX has nothing of the kind.
      what: What differs, or, for `equal`, what has another name, in one sentence.
      route: What to move to: the `native` layer of NNX, ours in `compat`, `host only` (it runs in
        an `nnx_bridge.Host`, and nowhere else), or `by hand`.
      compat: Where ours is found, as a dotted path; None where there is none.
      kind: A layer, a lifted transform, or another part of the API.
      equal_where: For a layer that differs at some settings only: the values of its fields at
        which the two are equal. Fields that are not named make no difference. Empty: they differ
        everywhere.
      since: The first version of flax that the row is about; None for every older one.
      until: The first version that it is not about any more; None for every newer one.
      source: Where the difference is discussed, such as `google/flax#5594`.
    """

    linen: str
    nnx: str | None
    verdict: Verdict
    what: str
    route: Route
    _: dataclasses.KW_ONLY
    compat: str | None = None
    kind: Kind = "layer"
    equal_where: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict, hash=False)
    since: str | None = None
    until: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "equal_where", MappingProxyType(dict(self.equal_where)))

    def holds_for(self, version: str) -> bool:
        """Whether the row is about this version of flax.

        Example:
            >>> row = Difference("Dense", "Linear", "equal", "", "native", since="0.12.12")
            >>> row.holds_for("0.12.8"), row.holds_for("0.13.0")
            (False, True)
        """
        found = _numbers(version)
        return not (
            (self.since is not None and found < _numbers(self.since))
            or (self.until is not None and found >= _numbers(self.until))
        )

    def matters(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """The fields of a layer whose values make the native layer differ from Linen's.

        Args:
          fields: The fields and their values; one that is absent has its default, at which no
            difference is known.

        Returns:
          Their names; `("every setting",)` for a layer that always differs; nothing where the
          native layer is equal.

        Example:
            >>> from nnx_bridge.compat import difference
            >>> difference("LayerNorm").matters({"dtype": jnp.bfloat16, "epsilon": 1e-5})
            ('dtype',)
            >>> difference("GRUCell").matters({})
            ('every setting',)
        """
        if self.verdict == "equal":
            return ()
        if not self.equal_where:
            return ("every setting",)
        return tuple(
            name
            for name, values in self.equal_where.items()
            if name in fields and not any(_same(fields[name], value) for value in values)
        )

    def route_for(self, fields: Mapping[str, Any]) -> Route:
        """The route of a layer with these fields: native where the difference does not matter.

        Example:
            >>> from nnx_bridge.compat import difference
            >>> difference("LayerNorm").route_for({"dtype": jnp.float32})
            'native'
        """
        native = self.verdict == "differs" and not self.matters(fields)
        return "native" if native else self.route


def find(rows: Iterable[Difference], linen: str | type) -> Difference | None:
    """The row for a name or class among ``rows``, for the installed version of flax.

    A class that is none of `flax.linen` has the row of the nearest one that it derives from.
    """
    known = {row.linen: row for row in rows if row.holds_for(flax.__version__)}
    if isinstance(linen, str):
        return known.get(linen)
    if not isinstance(linen, type):
        raise TypeError(
            f"expected a name of flax.linen or a class, got an instance of {type(linen).__name__}"
        )
    for base in linen.__mro__:
        name = base.__name__
        if base is not nn.Module and getattr(nn, name, None) is base and name in known:
            return known[name]
    return None


def unknown(linen: str | type, known: Iterable[str]) -> KeyError:
    """The error for a name that no row is about."""
    name = linen if isinstance(linen, str) else linen.__name__
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return KeyError(f"the table of differences has no row for {name!r}{hint}")


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    try:
        return jnp.dtype(value) == jnp.dtype(other)
    except TypeError:
        pass
    try:
        return bool(value == other)
    except (TypeError, ValueError):  # An array, or a function of somebody else.
        return False


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3])
