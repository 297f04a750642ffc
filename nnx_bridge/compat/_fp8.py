"""Linen's products of 8-bit floating-point numbers.

Each operand has a scale and a history of its largest values. Both are Variables of the collection
`_overwrite_with_gradient`: the gradient of one is its next value, which takes its place.

What rounds and multiplies is Linen's own: it is made of parts that neither Flax nor JAX documents.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, TypeAlias, TypedDict, Unpack

import jax
from flax import linen as nn
from flax import nnx

from nnx_bridge._collections import to_flat_state, to_variables
from nnx_bridge.compat._layer import set_fields

Array: TypeAlias = jax.Array


class Fp8Fields(TypedDict, total=False):
    """Settings of the products."""

    amax_history_length: int
    e4m3_dtype: Any
    e5m2_dtype: Any


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Linen advises other products than some of these; the one asked for is the one to port."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Fp8DotGeneralOp is deprecated", DeprecationWarning)
        yield


class _Fp8Product(nnx.Module):
    linen: ClassVar[type[nn.Module]]

    amax_history_length: int

    def __init__(self, **fields: Unpack[Fp8Fields]) -> None:
        with _without_advice():
            self._twin: Any = self.linen(**fields)
            set_fields(self, self._twin)
            variables = self._twin.init(jax.random.key(0), method=lambda twin: twin.input_scale)
        for (name,), variable in to_flat_state(variables):
            setattr(self, name, variable)

    def _product(self, *args: Any, **kwargs: Any) -> Array:
        with _without_advice():
            return self._twin.apply(to_variables(nnx.state(self)), *args, **kwargs)


class Fp8DotGeneralOp(_Fp8Product):
    """`flax.linen.Fp8DotGeneralOp`: operands are rounded to 8 bits, and multiplied as they were.

    Args:
      **fields: The fields of `flax.linen.Fp8DotGeneralOp`, with its defaults.

    Example:
        >>> product = Fp8DotGeneralOp(amax_history_length=16)
        >>> dense = nnx.Linear(2, 3, dot_general=product, rngs=nnx.Rngs(0))
        >>> dense(jax.numpy.ones((1, 2))).shape, product.input_scale.shape
        ((1, 3), (1,))
    """

    linen: ClassVar[type[nn.Module]] = nn.Fp8DotGeneralOp

    def __call__(self, x: Array, k: Array, dimension_numbers: Any, **_: Any) -> Array:
        """As `jax.lax.dot_general`, whose other arguments have no effect in Linen either."""
        return self._product(x, k, dimension_numbers)


class NANOOFp8DotGeneralOp(Fp8DotGeneralOp):
    """`flax.linen.NANOOFp8DotGeneralOp`: `Fp8DotGeneralOp` in the 8-bit formats of other devices.

    Example:
        >>> NANOOFp8DotGeneralOp().e4m3_dtype.__name__
        'float8_e4m3fnuz'
    """

    linen = nn.NANOOFp8DotGeneralOp


class Fp8DirectDotGeneralOp(Fp8DotGeneralOp):
    """`flax.linen.Fp8DirectDotGeneralOp`: operands are multiplied in 8 bits.

    Example:
        >>> product = Fp8DirectDotGeneralOp()
        >>> nnx.Linear(2, 3, dot_general=product, rngs=nnx.Rngs(0))(jax.numpy.ones((1, 2))).shape
        (1, 3)
    """

    linen: ClassVar[type[nn.Module]] = nn.Fp8DirectDotGeneralOp


class Fp8DotGeneral(Fp8DirectDotGeneralOp):
    """`flax.linen.Fp8DotGeneral`, the other name of `Fp8DirectDotGeneralOp`.

    Example:
        >>> Fp8DotGeneral().input_scale.shape
        (1,)
    """


class Fp8Einsum(_Fp8Product):
    """`flax.linen.Fp8Einsum`, `jax.numpy.einsum` of 8-bit numbers.

    Args:
      **fields: The fields of `flax.linen.Fp8Einsum`, with its defaults.

    Example:
        >>> ones = jax.numpy.ones
        >>> Fp8Einsum()("ab,bc->ac", ones((1, 2)), ones((2, 3))).shape
        (1, 3)
    """

    linen = nn.Fp8Einsum

    def __call__(self, eqn: str, lhs: Array, rhs: Array, **kwargs: Any) -> Array:
        """As `jax.numpy.einsum` of two operands, with `precision`, `preferred_element_type`."""
        return self._product(eqn, lhs, rhs, **kwargs)
