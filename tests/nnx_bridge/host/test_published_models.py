"""Published models, hosted, are the programs that they are in Linen: initialisation and training.

Equal programs give equal bits, and take a hundredth of the time of running them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from tests.helpers import program

pytest.importorskip("transformers", reason="the models are those of the extra 'test'")
pytest.importorskip("sklearn", reason="the images are those of scikit-learn")

from examples.published_models import MODELS  # noqa: E402

KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


@pytest.mark.parametrize("name", MODELS)
def test_the_hosted_model_is_the_program_of_the_model(name: str) -> None:
    case = MODELS[name]()
    leaves, treedef = jax.tree.flatten((case.args, dict(case.kwargs)))
    arrays = [x for x in leaves if isinstance(x, np.ndarray)]

    def with_arrays(arrays: list[Any]) -> Any:
        given = iter(arrays)
        return treedef.unflatten([next(given) if isinstance(x, np.ndarray) else x for x in leaves])

    def of_linen(arrays: list[Any]) -> Any:
        args, kwargs = with_arrays(arrays)
        variables = case.module.init(KEYS, *args, **kwargs)
        mutable = [name for name in variables if name != "params"]
        output, updates = case.module.apply(variables, *args, rngs=KEYS, mutable=mutable, **kwargs)
        return jax.tree.leaves((output, {**variables, **updates}))

    def of_host(arrays: list[Any]) -> Any:
        args, kwargs = with_arrays(arrays)
        host = nnx_bridge.Host.init(case.module, KEYS, *args, **kwargs)
        output = host(*args, rngs=KEYS, **kwargs)
        return jax.tree.leaves((output, nnx_bridge.unhost(host)[1]))

    try:
        expected = program(of_linen, arrays)
    except TypeError as error:
        pytest.skip(f"{case.name} does not run in Linen with this JAX: {error}")
    assert program(of_host, arrays) == expected


@pytest.mark.parametrize("name", ["bert", "regnet", "bart", "clip"])
def test_every_node_shows_its_class_and_is_a_part_of_the_state(name: str) -> None:
    case = MODELS[name]()

    def make() -> nnx_bridge.Host:
        return nnx_bridge.Host.init(case.module, KEYS, *case.args, **case.kwargs)

    host = nnx.eval_shape(make)
    kinds = {type(m).__name__ for _, m in nnx.iter_modules(host) if isinstance(m, nnx_bridge.Node)}
    assert "Node" not in kinds
    assert {type(case.module).__name__, "Dense" if name != "regnet" else "Conv"} <= kinds
    assert host.training_arguments == {"deterministic": False}
    assert isinstance(case.module, nn.Module)
