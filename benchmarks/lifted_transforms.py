"""What Linen's lifted transforms on NNX cost while the program is traced.

Each transform is applied to a transformer encoder of 12 layers, or to its layers in a loop. The
baseline is raw JAX over the hand-written pure function: ``nnx.split`` and ``nnx.merge``. The claim:
at most 1.05 times raw JAX. Beside it stand Flax's own: `flax.nnx` on the same modules, where it has
the transform, and `flax.linen` on the same layers in Linen. What is timed is the processor time of
the process, as in `benchmarks.tracing`.

The forward pass of the loop alone is the hardest of these: one small layer is traced in a few
milliseconds, of which what a lifted call does before and after is not a small part.

A module in which nothing is shared, as here, is taken apart and copied as a JAX pytree, which is
faster than ``nnx.split`` and ``nnx.merge``. That pays for what raw JAX need not do: the condition
of `while_loop` gets a module; `jit` compares the structure of the module with those that were
compiled; `map_variables` shows the user's function nested dicts by collection.

No claim is made where it may not pay for all: in `cond` and `switch` a branch that does not use the
module gets one all the same.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import linen, nnx

import lifted
import nnx_bridge as nn
from benchmarks._measure import interleaved
from benchmarks._models import LAYERS, LinenBlock, LinenEncoder, NNXBlock, NNXEncoder, sample
from benchmarks._results import Table
from benchmarks.tracing import NNX_CLAIM, traced

BASELINE, OURS = "raw JAX, NNX", "nnx_bridge"
STACKED: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
STEPS = 3
Call = Callable[[Any, jax.Array], Any]


@dataclass(frozen=True)
class _Case:
    """How each package writes one transform.

    Attributes:
      raw: ``(call, state, x) -> y`` in raw JAX, where ``call(state, x)`` is the pure function of
        the module.
      ours: ``(mdl, x) -> y``.
      in_linen: makes a Linen module of the same layers; anew for each trace, as some remember what
        they have traced.
      in_nnx: the same as ``ours`` in `flax.nnx`; None where it has no such transform.
      kind: of the NNX module.
      axes: in front of its parameters.
      gradient: whether it is the gradient that is traced.
      claimed: whether the claim is made.
    """

    raw: Callable[[Call, Any, jax.Array], Any]
    ours: Call
    in_linen: Callable[[], linen.Module]
    in_nnx: Call | None = None
    kind: type[nnx.Module] = NNXEncoder
    axes: tuple[int, ...] = ()
    gradient: bool = False
    claimed: bool = True


def _step(mdl: Any, x: jax.Array) -> tuple[jax.Array, None]:
    return mdl(x), None


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


def _skip(mdl: Any, x: jax.Array) -> jax.Array:
    return x


def _on_negative(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(-x)


def _on_double(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(2 * x)


def _doubled(variables: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, variables)


def _goes_on(_: Any, carry: Any) -> Any:
    return carry[0] < STEPS


def _body(mdl: Any, carry: Any) -> Any:
    return carry[0] + 1, mdl(carry[1])


def _with_backward(package: Any, vjp: Any) -> Call:
    def forward(mdl: Any, x: jax.Array) -> Any:
        return vjp(_call, mdl, x)

    call: Call = package.custom_vjp(_call, forward, lambda bwd, t_y: bwd(t_y))
    return call


def _raw_with_backward(call: Call, state: Any, x: jax.Array) -> Any:
    differentiable = jax.custom_vjp(call)
    differentiable.defvjp(lambda *args: jax.vjp(call, *args), lambda bwd, t_y: bwd(t_y))
    return differentiable(state, x)


def _raw_while(call: Call, state: Any, x: jax.Array) -> Any:
    start = (0, x)
    return jax.lax.while_loop(
        lambda carry: carry[0] < STEPS, lambda carry: (carry[0] + 1, call(state, carry[1])), start
    )[1]


def _raw_scan(call: Call, state: Any, x: jax.Array) -> Any:
    return jax.lax.scan(lambda x, state: (call(state, x), None), x, state)[0]


def _raw_remat_scan(call: Call, state: Any, x: jax.Array) -> Any:
    inner = jax.checkpoint(lambda state, x: _raw_scan(call, state, x), prevent_cse=False)
    return _raw_scan(inner, state, x)


class _LinenStep(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        return LinenBlock()(x), None


class _LinenCarry(linen.Module):
    """The layers in a loop."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y: jax.Array = linen.scan(_LinenStep, length=LAYERS, **STACKED)()(x)[0]
        return y


class _LinenWith(linen.Module):
    """Calls a transform of functions of a module."""

    use: Callable[[linen.Module, jax.Array], Any]

    @linen.compact
    def __call__(self, x: jax.Array) -> Any:
        encoder = LinenEncoder()
        # A transform of functions makes no variables.
        return encoder(x) if self.is_initializing() else self.use(encoder, x)


def _linen_with(use: Callable[[linen.Module, jax.Array], Any]) -> Callable[[], linen.Module]:
    return lambda: _LinenWith(use)


def _scan(gradient: bool) -> _Case:
    scanned = nn.scan(_step, **STACKED)
    return _Case(
        _raw_scan,
        lambda mdl, x: scanned(mdl, x)[0],
        _LinenCarry,
        lambda mdl, x: nnx.scan(lambda x, mdl: mdl(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, mdl
        ),
        kind=NNXBlock,
        axes=(LAYERS,),
        gradient=gradient,
    )


def _pure(branches: tuple[Call, ...], call: Call) -> list[Call]:
    """The branches in raw JAX. One that does not call the module does not merge it."""

    def pure(branch: Call) -> Call:
        return lambda state, x: branch(functools.partial(call, state), x)

    return [pure(branch) for branch in branches]


def _cond(*branches: Call) -> _Case:
    def pred(x: jax.Array) -> jax.Array:
        return x[0, 0] > 0

    return _Case(
        lambda call, state, x: jax.lax.cond(pred(x), *_pure(branches, call), state, x),
        lambda mdl, x: nn.cond(pred(x), *branches, mdl, x),
        _linen_with(lambda mdl, x: linen.cond(pred(x), *branches, mdl, x)),
        lambda mdl, x: nnx.cond(pred(x), *branches, mdl, x),
    )


def _switch(*branches: Call) -> _Case:
    def index(x: jax.Array) -> jax.Array:
        return (x[0, 0] > 0).astype(int)

    return _Case(
        lambda call, state, x: jax.lax.switch(index(x), _pure(branches, call), state, x),
        lambda mdl, x: nn.switch(index(x), branches, mdl, x),
        _linen_with(lambda mdl, x: linen.switch(index(x), branches, mdl, x)),
        lambda mdl, x: nnx.switch(index(x), branches, mdl, x),
    )


CASES: dict[str, _Case] = {
    "gradient of scan": _scan(gradient=True),
    "vmap": _Case(
        lambda call, state, x: jax.vmap(call, in_axes=(0, None))(state, x),
        nn.vmap(_call, in_axes=None, **STACKED),
        lambda: linen.vmap(LinenEncoder, in_axes=None, axis_size=4, **STACKED)(),
        lambda mdl, x: nnx.vmap(_call, in_axes=(0, None))(mdl, x),
        axes=(4,),
    ),
    "remat": _Case(
        lambda call, state, x: jax.checkpoint(call)(state, x),
        nn.remat(_call),
        lambda: linen.remat(LinenEncoder)(),
        lambda mdl, x: nnx.remat(_call)(mdl, x),
    ),
    "gradient of remat_scan": _Case(
        _raw_remat_scan,
        nn.remat_scan(_call, lengths=(3, 4)),
        lambda: linen.remat_scan(LinenBlock, lengths=(3, 4))(),
        kind=NNXBlock,
        axes=(3, 4),
        gradient=True,
    ),
    "jit": _Case(
        lambda call, state, x: jax.jit(call)(state, x),
        lambda mdl, x: nn.jit(_call)(mdl, x),
        lambda: linen.jit(LinenEncoder)(),
        lambda mdl, x: nnx.jit(lambda mdl, x: mdl(x))(mdl, x),
    ),
    "while_loop": _Case(
        _raw_while,
        lambda mdl, x: nn.while_loop(_goes_on, _body, mdl, (0, x))[1],
        _linen_with(lambda mdl, x: linen.while_loop(_goes_on, _body, mdl, (0, x))[1]),
        lambda mdl, x: nnx.while_loop(
            lambda carry: carry[0] < STEPS,
            lambda carry: (carry[0] + 1, carry[1], carry[1](carry[2])),
            (0, mdl, x),
        )[2],
    ),
    "cond": _cond(_call, _on_negative),
    "cond, one branch without the module": replace(_cond(_call, _skip), claimed=False),
    "switch": _switch(_call, _on_negative, _on_double),
    "switch, two of three branches without the module": replace(
        _switch(_call, _skip, _skip), claimed=False
    ),
    "gradient of custom_vjp": _Case(
        _raw_with_backward,
        _with_backward(nn, lifted.vjp),
        _linen_with(_with_backward(linen, linen.vjp)),
        gradient=True,
    ),
    "map_variables": _Case(
        lambda call, state, x: call(_doubled(state), x),
        nn.map_variables(_call, "params", _doubled),
        lambda: linen.map_variables(LinenEncoder, "params", _doubled, init=True)(),
    ),
    "scan": _scan(gradient=False),
}


def _contestants(case: _Case) -> dict[str, Callable[[], Any]]:
    x, rngs = sample(), nnx.Rngs(0)
    make: Callable[[nnx.Rngs], Any] = case.kind
    for size in reversed(case.axes):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make))
    graphdef, state = nnx.split(make(rngs))

    def program(call: Call, values: Any) -> Callable[[], Any]:
        if not case.gradient:
            return traced(call, values, x)
        return traced(jax.grad(lambda values, x: call(values, x).sum()), values, x)

    def raw(mdl: Any, x: jax.Array) -> Any:
        inner_graphdef, inner_state = nnx.split(mdl)
        return case.raw(lambda state, x: nnx.merge(inner_graphdef, state)(x), inner_state, x)

    contestants = {
        name: program(lambda state, x, call=call: call(nnx.merge(graphdef, state), x), state)
        for name, call in {BASELINE: raw, OURS: case.ours, "flax.nnx": case.in_nnx}.items()
        if call is not None
    }
    variables = case.in_linen().init(jax.random.key(0), x)
    contestants["flax.linen"] = program(lambda v, x: case.in_linen().apply(v, x), variables)
    return contestants


def run(rounds: int = 24) -> Table:
    """The table of trace times."""
    table = Table("lifted_transforms", "Tracing transformers with a lifted transform on NNX")
    for what, case in CASES.items():
        contestants = _contestants(case)
        ratios, seconds = interleaved(contestants, BASELINE, rounds, what, time.process_time)
        for name, ratio in ratios.items():
            claim = NNX_CLAIM if name == OURS and case.claimed else None
            table.add(what, name, BASELINE, ratio, seconds, claim)
    return table
