"""Every compat layer against the Linen layer of its name, with Linen's variables loaded.

The programs are compared, those of the gradients included: equal programs give equal bits, whatever
the variables are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import compat, to_state, to_variables
from tests.helpers import assert_trees_equal, program
from tests.nnx_bridge.compat.twins import AROUND_OTHERS, TWINS, WITH_KEYS, Twin

# Linen advises against two of its own layers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:SelfAttention will be", "ignore:The Fp8DotGeneralOp"
)

KEY = jax.random.key(5)


def gradients(call: Callable[..., Any], variables: Any, inputs: Any) -> Any:
    """What ``call(variables, *inputs)`` returns, and the gradients of its sum for all of both."""

    def total(floating: list[Any]) -> Any:
        rest = iter(floating)
        given, args = treedef.unflatten([next(rest) if f else x for f, x in leaves])
        outputs = call(given, *args)
        parts = [jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(outputs)]
        return sum(parts), outputs

    flat, treedef = jax.tree.flatten((variables, inputs))
    leaves = [(jnp.issubdtype(x.dtype, jnp.inexact), x) for x in flat]
    return jax.grad(total, has_aux=True)([x for floating, x in leaves if floating])


def calls(twin: Twin) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The call of the Linen layer and of its twin: the output and the variables afterwards."""
    layer = nnx.eval_shape(lambda: twin.make(nnx.Rngs(0)))
    graphdef, rng_state, _ = nnx.split(layer, nnx.RngState, ...)

    def linen(variables: Any, *inputs: Any) -> Any:
        mutable = [c for c in variables if c == "batch_stats"]
        y, updated = twin.linen.apply(
            variables, *twin.filled(inputs), **twin.kwargs, mutable=mutable
        )
        return y, {**variables, **updated}

    def ours(variables: Any, *inputs: Any) -> Any:
        copy = nnx.merge(graphdef, rng_state, to_state(variables))
        y = copy(*twin.filled(inputs), **twin.kwargs)
        return y, {**variables, **to_variables(nnx.state(copy, nnx.Not(nnx.RngState)))}

    return linen, ours


@pytest.mark.parametrize("name", TWINS)
def test_outputs_updates_and_gradients_have_the_program_of_linen(name: str) -> None:
    twin = TWINS[name]
    variables = jax.eval_shape(twin.variables, KEY)
    linen, ours = (
        program(lambda v, x, call=call: gradients(call, v, x), variables, twin.arrays)
        for call in calls(twin)
    )
    assert ours == linen


# In explicit sharding mode JAX asks these for a sharding that Linen has no argument for.
ASKED = {
    "Dropout": "select `which` must be scalar or have the same sharding as cases",
    "Fp8DirectDotGeneralOp": "Contracting dimensions are sharded and it is ambiguous",
    "Fp8Einsum": "Contracting dimensions are sharded and it is ambiguous",
}
LAST_OF_EACH = {type(twin.linen).__name__: twin for twin in TWINS.values()}


def sharded(layer: str) -> tuple[jax.sharding.Mesh, list[Callable[[], str]]]:
    """A mesh, and the programs of Linen and ours for a batch that has its sharding in its type."""
    twin = LAST_OF_EACH[layer]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))

    def placed(x: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def of_batch(x: jax.Array) -> jax.ShapeDtypeStruct:
        return placed(x, *["data"] * (x.shape[:1] == (2,)))

    inputs = jax.tree.map(of_batch, twin.arrays)
    variables = jax.tree.map(placed, jax.eval_shape(twin.variables, KEY))

    def traced(call: Callable[..., Any]) -> str:
        return program(lambda v, x: gradients(call, v, x), variables, inputs)

    return mesh, [functools.partial(traced, call) for call in calls(twin)]


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
@pytest.mark.parametrize("layer", [name for name in LAST_OF_EACH if name not in ASKED])
def test_the_program_is_that_of_linen_for_shardings_in_types(layer: str) -> None:
    mesh, (linen, ours) = sharded(layer)
    with jax.set_mesh(mesh):
        assert ours() == linen()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
@pytest.mark.parametrize("layer", ASKED)
def test_layers_of_linen_that_cannot_take_shardings_in_types(layer: str) -> None:
    mesh, (linen, _) = sharded(layer)
    with jax.set_mesh(mesh), pytest.raises(Exception, match=ASKED[layer]):
        linen()


# A device has a part of the batch: masks of the whole, which later settings have, do not fit it.
# The gradients of Linen's float8 layers have other types than what they are gradients of there.
OF_EACH_DEVICE = {
    name: twin
    for twin in reversed(TWINS.values())
    if "Fp8" not in (name := type(twin.linen).__name__)
}
OF_EACH_DEVICE["BatchNorm of the whole batch"] = dataclasses.replace(
    OF_EACH_DEVICE["BatchNorm"],
    linen=nn.BatchNorm(axis_name="data"),
    make=lambda rngs: compat.BatchNorm(6, axis_name="data", rngs=rngs),
)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
@pytest.mark.parametrize("layer", OF_EACH_DEVICE)
def test_the_program_is_that_of_linen_under_shard_map(layer: str) -> None:
    twin = OF_EACH_DEVICE[layer]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = lambda x: jax.P(*["data"] * (x.shape[:1] == (2,)))  # noqa: E731
    specs = {
        "in_specs": (jax.P(), jax.tree.map(split, twin.arrays)),
        "out_specs": jax.P("data"),
    }
    variables = jax.eval_shape(twin.variables, KEY)

    def traced(call: Callable[..., Any]) -> str:
        def of_device(variables: Any, inputs: Any) -> Any:
            return jax.tree.map(lambda x: x[None], gradients(call, variables, inputs))

        return program(jax.shard_map(of_device, mesh=mesh, **specs), variables, twin.arrays)

    linen, ours = map(traced, calls(twin))
    assert ours == linen


# One setting of each layer is enough: what the layers share makes the variables.
FIRST_OF_EACH = {type(twin.linen).__name__: name for name, twin in reversed(WITH_KEYS.items())}


@pytest.mark.parametrize("name", FIRST_OF_EACH.values())
def test_the_same_key_gives_the_variables_of_linen(name: str) -> None:
    twin = WITH_KEYS[name]
    layer = twin.make(nnx.Rngs(params=KEY))
    expected = twin.variables(nnx.Rngs(params=KEY).params())
    assert_trees_equal(to_variables(nnx.state(layer, nnx.Not(nnx.RngState))), expected)


@pytest.mark.parametrize("name", AROUND_OTHERS)
def test_the_variables_have_the_names_shapes_and_dtypes_of_linen(name: str) -> None:
    twin = AROUND_OTHERS[name]
    layer = nnx.eval_shape(lambda: twin.make(nnx.Rngs(0)))
    ours = to_variables(nnx.state(layer, nnx.Not(nnx.RngState)))
    assert ours == jax.eval_shape(twin.variables, KEY)


def test_custom_initialisers_draw_the_numbers_of_linen() -> None:
    normal = nn.initializers.normal()
    layer = compat.LayerNorm(3, scale_init=normal, bias_init=normal, rngs=nnx.Rngs(params=KEY))
    linen = nn.LayerNorm(scale_init=normal, bias_init=normal)
    expected = linen.init(nnx.Rngs(params=KEY).params(), jnp.ones((1, 3)))
    assert_trees_equal(to_variables(nnx.state(layer)), expected)


def test_half_precision_cells_exist_though_linen_cannot_draw_their_kernels() -> None:
    cell = compat.GRUCell(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    wide = compat.GRUCell(3, 4, rngs=nnx.Rngs(0))
    assert_trees_equal(cell.hn.kernel[...], wide.hn.kernel[...].astype(jnp.bfloat16))


def test_the_partitioning_of_an_initialiser_becomes_metadata() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    cell = compat.GRUCell(3, 4, kernel_init=init, rngs=nnx.Rngs(0))
    assert getattr(cell, "in").kernel.out_sharding == (None, "model")
    boxed = to_variables(nnx.state(cell))["params"]["in"]["kernel"]
    assert isinstance(boxed, nn.Partitioned)


def test_constructors_run_under_vmap() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> compat.GRUCell:
        return compat.GRUCell(3, 4, rngs=nnx.Rngs(params=key))

    cells = make(jax.random.split(KEY, 2))
    assert cells.hn.kernel.shape == (2, 4, 4)
    assert not jnp.allclose(cells.hn.kernel[0], cells.hn.kernel[1])


def test_equal_layers_have_equal_definitions_whatever_made_their_parameters() -> None:
    def make(scale: float) -> compat.GRUCell:
        init = nn.initializers.normal(scale)
        return compat.GRUCell(3, 4, kernel_init=init, rngs=nnx.Rngs(0))

    assert nnx.graphdef(make(1.0)) == nnx.graphdef(make(2.0))


def test_a_setting_that_linen_does_not_have_is_an_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'gates'"):
        compat.GRUCell(3, 4, gates=2, rngs=nnx.Rngs(0))


def test_a_key_in_place_of_rngs_is_an_error_that_shows_how_to_give_it() -> None:
    with pytest.raises(TypeError, match=r"nnx.Rngs\(params=key\)"):
        compat.GRUCell(3, 4, rngs=KEY)
