"""A linear layer with DropConnect.

`DropConnectLinear` holds the very Variables of the layer it was made from and differs from it in
one expression: the kernel it multiplies with is `drop_weight(kernel, key, rate)`.
"""

import inspect
from collections.abc import Callable
from typing import Any, Self

import jax
from flax import nnx

from layers._base import DropConnectModule
from layers._drop import drop_weight
from layers._generators import Generator
from layers._keys import RngSource
from layers._pallas import fused_product
from layers._per_example import per_example_dot

_SETTINGS = (
    "in_features",
    "out_features",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "kernel_init",
    "bias_init",
    "dot_general",
    "promote_dtype",
    "preferred_element_type",
)
# `nnx.Linear` forgets its initialisers; the documented attributes then hold its defaults.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(nnx.Linear.__init__).parameters.items()
}


class DropConnectLinear(DropConnectModule):
    """Linear layer whose weights, not activations, are dropped in training.

    When to use: in place of `nnx.Linear`, to regularise it or, with masks left on at prediction,
    to measure its uncertainty.  Weights are dropped with probability `rate` and the others scaled
    by the reciprocal of the keep probability, so that the expected output is that of the base
    layer.  The bias is never dropped.

    Args:
      base_layer: the `nnx.Linear` (or `DropConnectLinear`) to wrap; its `kernel` and `bias`
        Variables are shared, not copied.
      rate: probability of dropping a weight, in [0, 1).
      rng_collection: the stream to ask for a key.
      rngs: `nnx.Rngs`, `nnx.RngStream` or a key; a stream forked from it is held.
      generator: where the bits of the mask come from; see `drop_weight`.
      per_example: if True, each example (index of the leading axis of the inputs) has a mask of
        its own, the training rule of the paper, without a batch of kernels in memory.
      fused: if True, use the Pallas kernel of `fused_product` on GPU and TPU; the generator must
        be `'fast'` and the base layer's product the plain one.

    Attributes:
      kernel: `nnx.Param` of shape (in_features, out_features).
      bias: `nnx.Param` of shape (out_features,), or None.
      in_features, out_features, use_bias, dtype, param_dtype, precision, kernel_init, bias_init,
        dot_general, promote_dtype, preferred_element_type: as in `nnx.Linear`.
      rate, deterministic, rng_collection, rngs, generator, per_example, fused: as above;
        `deterministic`
        starts as False and is what `train`, `eval`, `set_attributes` and `nnx.view` change.

    Raises:
      TypeError: if `base_layer` is not a linear layer, or an argument has the wrong type.
      ValueError: if `rate` is NaN or outside [0, 1), or `rngs` lacks the stream.

    Source: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of Neural Networks using
    DropConnect", ICML 2013; for uncertainty, Mobiny et al., "DropConnect is effective in modeling
    uncertainty of Bayesian deep networks", Scientific Reports 11, 2021.

    Example::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from layers import DropConnectLinear
      >>> base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> layer = DropConnectLinear(base, rate=0.5, rngs=nnx.Rngs(1))
      >>> layer.kernel is base.kernel
      True
      >>> x = jnp.ones((2, 4))
      >>> bool((layer(x) == layer(x)).all())  # a new mask each call
      False
      >>> layer.eval()
      >>> bool((layer(x) == base(x)).all())
      True
    """

    kernel: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array] | None
    in_features: int
    out_features: int
    use_bias: bool
    dtype: Any
    param_dtype: Any
    precision: Any
    kernel_init: Callable[..., jax.Array]
    bias_init: Callable[..., jax.Array]
    dot_general: Callable[..., jax.Array]
    promote_dtype: Callable[..., Any]
    preferred_element_type: Any

    def __init__(
        self,
        base_layer: nnx.Linear | Self,
        rate: float = 0.25,
        *,
        rng_collection: str = "dropconnect",
        rngs: RngSource | None = None,
        generator: Generator = "default",
        per_example: bool = False,
        fused: bool = False,
    ):
        if not isinstance(base_layer, nnx.Linear | DropConnectLinear):
            raise TypeError(
                f"base_layer must be an nnx.Linear, got {type(base_layer).__name__}; "
                "wrap other layers in layers.WeightDrop."
            )
        for name, value in (("per_example", per_example), ("fused", fused)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}.")
        super().__init__(rate, generator, rng_collection, rngs)
        if fused:
            _check_fused(base_layer, generator, per_example)
        self.per_example = per_example
        self.fused = fused
        self.kernel = base_layer.kernel
        self.bias = base_layer.bias if base_layer.bias is not None else nnx.data(None)
        for name in _SETTINGS:
            setattr(self, name, getattr(base_layer, name, _DEFAULTS.get(name)))

    @classmethod
    def create(
        cls,
        in_features: int,
        out_features: int,
        rate: float = 0.25,
        *,
        rngs: nnx.Rngs,
        rng_collection: str = "dropconnect",
        generator: Generator = "default",
        per_example: bool = False,
        fused: bool = False,
        **linear_options: Any,
    ) -> Self:
        """Builds the layer without a base layer at hand.

        Args:
          in_features: number of input features.
          out_features: number of output features.
          rate: probability of dropping a weight, in [0, 1).
          rngs: initialises the weights from its stream `params`; its stream `rng_collection` is
            forked and held.
          rng_collection: the stream to ask for a key.
          generator: where the bits of the mask come from.
          per_example: whether each example has a mask of its own.
          fused: whether to use the Pallas kernel on GPU and TPU.
          **linear_options: any other option of `nnx.Linear`.

        Returns:
          A new layer.

        Raises:
          TypeError, ValueError: as the class, and as `nnx.Linear`.

        Example::

          >>> from flax import nnx
          >>> from layers import DropConnectLinear
          >>> DropConnectLinear.create(2, 3, rate=0.1, rngs=nnx.Rngs(0)).kernel.shape
          (2, 3)
        """
        base = nnx.Linear(in_features, out_features, rngs=rngs, **linear_options)
        layer = cls(
            base,
            rate,
            rng_collection=rng_collection,
            rngs=rngs,
            generator=generator,
            per_example=per_example,
            fused=fused,
        )
        for name in ("kernel_init", "bias_init"):
            setattr(layer, name, linear_options.get(name, getattr(layer, name)))
        return layer

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: RngSource | None = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Applies the layer, with a new mask unless deterministic.

        Args:
          inputs: array of shape (..., in_features).
          deterministic: if True no mask is applied, if False one is; None means the attribute.
          rngs: `nnx.Rngs`, `nnx.RngStream` or a key, used in place of the held stream.
          out_sharding: as in `nnx.Linear`.

        Returns:
          Array of shape (..., out_features).

        Raises:
          ValueError: if a mask is to be drawn and there is no key.
          TypeError: if `rngs` is not a source of keys.
        """
        key = self.mask_key(deterministic, rngs)
        kernel = self.kernel[...]
        if key is None:
            return self._product(inputs, kernel, self.dot_general, out_sharding)
        if not (self.per_example or self.fused):
            kernel = drop_weight(kernel, key, self.rate, generator=self.generator)
            return self._product(inputs, kernel, self.dot_general, out_sharding)
        if self.fused:
            if out_sharding is not None:
                raise ValueError(
                    "out_sharding cannot be given with fused=True; constrain the sharding of the "
                    "result instead."
                )
            return self._product(
                inputs, kernel, lambda x, w, *_, **__: fused_product(x, w, key, self.rate)
            )
        dot = per_example_dot(self.dot_general, key, self.rate, self.generator)
        return self._product(inputs, kernel, dot, out_sharding)

    def to_linear(self) -> nnx.Linear:
        """The plain layer, sharing `kernel` and `bias`: the inverse of the constructor.

        Example::

          >>> from flax import nnx
          >>> from layers import DropConnectLinear
          >>> layer = DropConnectLinear.create(2, 3, rngs=nnx.Rngs(0))
          >>> layer.to_linear().kernel is layer.kernel
          True
        """
        options = {name: getattr(self, name) for name in _SETTINGS}
        linear = nnx.eval_shape(lambda: nnx.Linear(**options, rngs=nnx.Rngs(0)))
        linear.kernel = self.kernel
        linear.bias = self.bias if self.bias is not None else nnx.data(None)
        return linear

    def _product(
        self,
        inputs: jax.Array,
        kernel: jax.Array,
        dot_general: Callable[..., jax.Array],
        out_sharding: Any = None,
    ) -> jax.Array:
        """The plain layer with another kernel, or another product."""
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        # Left out unless set: a custom dot_general need not know the newer arguments.
        options = {
            name: value
            for name, value in (
                ("preferred_element_type", self.preferred_element_type),
                ("out_sharding", out_sharding),
            )
            if value is not None
        }
        contract = (((inputs.ndim - 1,), (0,)), ((), ()))
        outputs = dot_general(inputs, kernel, contract, precision=self.precision, **options)
        if bias is None:
            return outputs
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))


def _check_fused(base_layer: Any, generator: str, per_example: bool) -> None:
    """Raises ValueError where the Pallas kernel would not be what the layer asks for."""
    if generator != "fast" or per_example:
        raise ValueError(
            "fused=True needs generator='fast', which the kernel computes in registers, and "
            f"per_example=False; got generator={generator!r}, per_example={per_example}."
        )
    for name in ("dot_general", "precision", "preferred_element_type"):
        value = getattr(base_layer, name)
        if value is not _DEFAULTS[name]:
            raise ValueError(f"fused=True takes the place of {name}, but it is set to {value!r}.")
