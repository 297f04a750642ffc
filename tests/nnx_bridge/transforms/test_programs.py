"""The lifted programs are the raw programs: jaxprs, compiled code and its memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import nnx_bridge as nn
from tests.helpers import assert_same_program, normal

X = normal(2, 3)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return jnp.tanh(self.dense(x)), None


SCANNED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def _raw(graphdef: Any) -> Callable[[Any, jax.Array], Any]:
    def call(state: Any, x: jax.Array) -> Any:
        return nnx.merge(graphdef, state)(x, None)

    return call


def _parts(lifted_class: type[Any]) -> tuple[Any, Any, Any]:
    """The lifted module as a function of its state, the same by hand over one layer, the state."""
    graphdef, state = nnx.split(lifted_class(nnx.Rngs(0)))
    one, _ = nnx.split(Layer(nnx.Rngs(0)))
    return _raw(graphdef), _raw(one), state


def test_scanned_layers() -> None:
    ours, layer, state = _parts(nn.scan(Layer, length=4, **SCANNED))

    def raw(state: Any, x: jax.Array) -> Any:
        return jax.lax.scan(lambda x, params: layer(params, x), x, state)

    assert_same_program(ours, raw, state, X)
    programs = [jax.jit(fn).lower(state, X).compile().as_text() for fn in (ours, raw)]
    assert _equations(programs[0]) == _equations(programs[1])


def test_the_gradient_of_scanned_layers() -> None:
    ours, layer, state = _parts(nn.scan(Layer, length=4, **SCANNED))

    def raw(state: Any, x: jax.Array) -> Any:
        return jax.lax.scan(lambda x, params: layer(params, x), x, state)

    assert_same_program(
        *(jax.grad(lambda state, x, fn=fn: fn(state, x)[0].sum()) for fn in (ours, raw)), state, X
    )


def test_mapped_layers() -> None:
    ours, layer, state = _parts(nn.vmap(Layer, axis_size=2, **SCANNED))
    raw = jax.vmap(layer)
    assert_same_program(lambda s, x: ours(s, x)[0], lambda s, x: raw(s, x)[0], state, X)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
def test_mapped_layers_on_an_axis_of_a_mesh() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, whole)

    class Placed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.scale = nnx.Param(place(rngs.params.normal(3)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return place(x)

    mdl = nn.vmap(Placed, axis_size=2, spmd_axis_name="d", **SCANNED)(nnx.Rngs(0))
    along_d = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    assert mdl.scale[...].sharding.is_equivalent_to(along_d, 2)
    assert_same_program(mdl, jax.vmap(place, spmd_axis_name="d"), X)


@pytest.mark.parametrize(
    "policy", [None, "everything_saveable", "nothing_saveable", "dots_saveable"]
)
def test_the_memory_of_remat(policy: str | None) -> None:
    chosen = policy and getattr(jax.checkpoint_policies, policy)
    ours, layer, state = _parts(nn.scan(nn.remat(Layer, policy=chosen), length=4, **SCANNED))
    rematted = jax.checkpoint(layer, policy=chosen)

    def raw(state: Any, x: jax.Array) -> Any:
        return jax.lax.scan(lambda x, params: rematted(params, x), x, state)

    sizes = []
    for fn in (ours, raw):
        gradient = jax.grad(lambda state, x, fn=fn: fn(state, x)[0].sum())
        analysis = jax.jit(gradient).lower(state, X).compile().memory_analysis()
        sizes.append((analysis.temp_size_in_bytes, analysis.output_size_in_bytes))
    assert sizes[0] == sizes[1]


def test_a_branch_returns_only_what_a_branch_has_written() -> None:
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(norm)

    def call(state: Any, pred: jax.Array, x: jax.Array) -> Any:
        mdl = nnx.merge(graphdef, state)
        return nn.cond(pred, lambda mdl, x: mdl(x), lambda mdl, x: x, mdl, x)

    (equation,) = [
        e for e in jax.make_jaxpr(call)(state, True, X).eqns if e.primitive.name == "cond"
    ]
    assert [v.aval.shape for v in equation.outvars] == [(2, 3), (3,), (3,)]


def test_a_compiled_method_is_traced_once_for_equal_structures() -> None:
    traces = []

    class Traced(Layer):
        def __call__(self, x: jax.Array, _: Any = None) -> Any:
            traces.append(1)
            return super().__call__(x)

    compiled = nn.jit(Traced)
    first, second = compiled(nnx.Rngs(0)), compiled(nnx.Rngs(1))
    for mdl in (first, first, second):
        assert jnp.allclose(mdl(X)[0], Layer.__call__(mdl, X)[0])
    assert len(traces) == 1


def _equations(hlo: str) -> list[str]:
    """The instructions, without where in Python they come from."""
    without_source = re.sub(r", metadata=\{[^}]*\}|, backend_config=\{.*?\}(?=\s|$)", "", hlo)
    lines = without_source.splitlines()[1:]
    return [line for line in lines if "=" in line and not re.match(r"^\d+ ", line)]
