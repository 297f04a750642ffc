"""What every DropConnect module of this package shares: the switch, the rate and the key."""

from typing import Any

import jax
from flax import nnx

from layers._generators import Generator, check_generator
from layers._keys import RngSource, fork_stream, next_key
from layers._rates import check_rate


class DropConnectModule(nnx.Module):
    """Base of the modules that drop weights; of use as a filter.

    Example::

      >>> import layers
      >>> from flax import nnx
      >>> model = nnx.Sequential(
      ...     layers.DropConnectLinear(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), nnx.Dropout(0.5))
      >>> model.set_attributes(layers.DropConnectModule, deterministic=True)
      >>> model.layers[0].deterministic, model.layers[1].deterministic
      (True, False)

    Attributes:
      rate: probability of dropping a weight, in [0, 1).
      generator: where the bits of the mask come from.
      deterministic: if True, no mask is applied.
      rng_collection: name of the stream that is asked for a key.
      rngs: the stream this module holds, or None.
    """

    def __init__(
        self, rate: float, generator: Generator, rng_collection: str, rngs: RngSource | None
    ):
        if not isinstance(rng_collection, str):
            raise TypeError(
                f"rng_collection must be a str, got {rng_collection!r} of type "
                f"{type(rng_collection).__name__}."
            )
        self.rate = check_rate(rate)
        self.generator: Generator = check_generator(generator)
        self.deterministic: bool | None = False
        self.rng_collection = rng_collection
        self.rngs = fork_stream(rngs, rng_collection)

    def mask_key(
        self, deterministic: bool | None = None, rngs: RngSource | None = None
    ) -> jax.Array | None:
        """The key of this call's mask, or None where there is nothing to mask.

        When to use: in a subclass, once in each call.  No key is asked for when the module is
        deterministic or its rate is 0.

        Args:
          deterministic: overrides the attribute unless None.
          rngs: overrides the held stream unless None.

        Returns:
          One typed PRNG key, or None.

        Raises:
          ValueError: if a key is needed and there is none, or if neither the argument nor the
            attribute says whether the call is deterministic.
          TypeError: if `rngs` is not a source of keys.
        """
        owner = type(self).__name__
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(
                f"{owner} was told neither to drop nor to keep: deterministic is None as argument "
                "and as attribute. Pass deterministic=True or False, or call train() or eval()."
            )
        # Checked again because a rate may be assigned after construction.
        rate = check_rate(self.rate)
        if deterministic or rate == 0.0:
            return None
        return next_key(self.rngs if rngs is None else rngs, self.rng_collection, owner)

    def set_mode(self, deterministic: bool | None = None, **kwargs: Any) -> dict[str, Any]:
        """Sets the mode of this module, as `nnx.set_mode` asks of it.

        Args:
          deterministic: if True, disables dropconnect masking; None leaves it as it is.
          **kwargs: modes of other modules.

        Returns:
          The keyword arguments that this module does not use.
        """
        self.set_view(deterministic)
        return kwargs

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of this module, as `nnx.view` asks of it.

        Args:
          deterministic: if True, disables dropconnect masking; None leaves it as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic
