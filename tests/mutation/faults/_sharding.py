"""Faults of where arrays are."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "the gradients at perturbed values are gathered, or summed over devices",
        "nnx_bridge/captures/_derivatives.py",
        "jnp.zeros_like(zero) for zero in zeros",
        "jnp.zeros(zero.shape, zero.dtype) for zero in zeros",
        "tests/sharding/test_migration.py::test_captures[data-shard_map-NNX-grad]",
    ),
    Fault(
        "a tangent that is left out is on no mesh",
        "lifted/_inputs.py",
        "jnp.zeros_like(jax.eval_shape(lambda x: x, x), x.dtype)",
        "jnp.zeros(x.shape, x.dtype)",
        "tests/sharding/test_derivatives.py::test_a_transform[data-explicit-NNX-linearize]",
    ),
    Fault(
        "what a loop writes alike is on no mesh",
        "nnx_bridge/transforms/_loop.py",
        "jnp.zeros_like(shape)",
        "jnp.zeros(shape.shape, shape.dtype)",
        "tests/sharding/test_transforms.py"
        "::test_a_transform_of_linen_on_nnx[data-explicit-scan that writes]",
    ),
    Fault(
        "the reference in float64 leaves jax.shard_map",
        "nnx_bridge/equivalence/_exact.py",
        'if primitive.name == "shard_map":',
        'if primitive.name == "shard map":',
        "tests/sharding/test_weights.py::test_the_reference_in_float64_has_the_axes_of_a_shard_map",
    ),
    Fault(
        "loops of the reference in float64 lose shardings",
        "nnx_bridge/equivalence/_exact.py",
        "lambda *arguments: tuple(map(promote, arguments)), *(v.aval for v in value.jaxpr.invars)",
        "lambda *xs: tuple(map(promote, xs)),\n"
        "            *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)"
        " for v in value.jaxpr.invars),",
        "tests/sharding/test_weights.py"
        "::test_loops_of_the_reference_in_float64_keep_their_shardings",
    ),
]
