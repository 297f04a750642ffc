"""Bad input: the error names collection, path and remedy, and the caller's module stays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import nnx_bridge as nn
from tests.helpers import assert_trees_equal, normal
from tests.nnx_bridge import models
from tests.nnx_bridge.transforms.twins import LinenBlock, NNXBlock

X = normal(4, 3)
SPLIT = {"params": True}
BOTH = {"params": 0, "batch_stats": 0}


def stacked(size: int = 3, kind: Any = NNXBlock) -> Any:
    return nnx.split_rngs(splits=size)(nnx.vmap(kind))(nnx.Rngs(0))


def step(mdl: Any, x: jax.Array, *args: Any) -> Any:
    return mdl(x, *args)


def test_a_collection_that_is_named_twice() -> None:
    with pytest.raises(ValueError, match=r"dense/bias.*'params' is named by variable_broadcast"):
        nn.scan(step, variable_axes=BOTH, variable_broadcast="params")(stacked(), X)


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (nn.vmap(step, {"params": 0, ("params", "other"): 1}), r"variable_axes=\{'params': 0\}"),
        (
            nn.scan(step, {"batch_stats": 0}, "params", "batch_stats"),
            "variable_carry='batch_stats'",
        ),
        (
            lambda mdl, x: nn.while_loop(step, step, mdl, x, "params", ["params", "batch_stats"]),
            "carry_variables='params'",
        ),
    ],
    ids=["vmap", "scan", "while_loop"],
)
def test_filters_that_conflict(run: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"is named by {named} and by .*Name it once"):
        run(stacked(), X)


def test_the_rest_may_overlap() -> None:
    mdl = stacked(3)
    nnx.update(mdl, {"mean": nnx.BatchStat(jnp.zeros(3))})
    run = nn.scan(step, variable_axes={True: 0}, variable_carry="batch_stats", split_rngs=SPLIT)
    run(mdl, X)
    assert mdl.mean.shape == (3,)


@pytest.mark.parametrize(
    ("transform", "remedy"),
    [("scan", "variable_carry='batch_stats'"), ("vmap", r"variable_axes=\{'batch_stats': 0\}")],
)
def test_a_collection_that_is_used_and_not_named(transform: str, remedy: str) -> None:
    run = getattr(nn, transform)(step, variable_axes={"params": 0})
    with pytest.raises(ValueError, match=rf"mean is used.*'batch_stats'.*{remedy}"):
        run(stacked(4), X)


def test_a_collection_that_is_written_and_comes_in_only() -> None:
    run = nn.vmap(step, variable_axes={"params": 0, "batch_stats": nn.In(0)})
    mdl = stacked(4)
    before = nnx.state(nnx.clone(mdl))
    with pytest.raises(ValueError, match="mean is written, but vmap does not map"):
        run(mdl, X)
    assert_trees_equal(nnx.state(mdl), before)


def test_a_class_that_makes_what_is_not_named() -> None:
    lifted_class = nn.scan(NNXBlock, variable_axes={"params": 0}, split_rngs=SPLIT, length=2)
    with pytest.raises(ValueError, match="mean is written.*'batch_stats'"):
        lifted_class(nnx.Rngs(0))


@pytest.mark.parametrize(("transform", "argument"), [("scan", "length"), ("vmap", "axis_size")])
def test_a_class_without_a_size(transform: str, argument: str) -> None:
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=rf"dense/bias with the axis 0.*Pass {argument}="):
        getattr(nn, transform)(NNXBlock, variable_axes=BOTH, split_rngs=SPLIT)(rngs)
    assert int(rngs.default.count[...]) == 0


def test_sizes_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"length has 2, dense/bias has 3"):
        nn.scan(step, variable_axes=BOTH, length=2)(stacked(3), X)
    with pytest.raises(ValueError, match=r"argument\[0\] has 4, dense/bias has 3"):
        nn.vmap(step, variable_axes=BOTH)(stacked(3), X)


def test_a_module_without_the_axis_that_is_given_to_a_class() -> None:
    class Wrapping(nnx.Module):
        def __init__(self, inner: nnx.Linear, rngs: nnx.Rngs) -> None:
            self.inner, self.own = inner, nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> Any:
            return self.own(self.inner(x)), None

    lifted_class = nn.scan(Wrapping, {"params": 0}, split_rngs=SPLIT, length=2)
    with pytest.raises(ValueError, match=r"scan: sizes.*length has 2, bias has 3"):
        lifted_class(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Rngs(1))


@pytest.mark.parametrize("lengths", [3, (), (2, -1)])
def test_lengths_that_are_none(lengths: Any) -> None:
    with pytest.raises(ValueError, match=r"remat_scan: lengths: expected .* such as \(3, 4\)"):
        nn.remat_scan(nnx.Linear, lengths=lengths)


@pytest.mark.parametrize(
    ("length", "error", "message"), [(-1, ValueError, "0 or more, got -1"), (2.0, TypeError, "int")]
)
def test_a_length_that_is_none(length: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"scan: length: expected .*{message}"):
        nn.scan(step, variable_broadcast=True, length=length)(NNXBlock(nnx.Rngs(0)), X, None)


def test_no_size() -> None:
    with pytest.raises(ValueError, match="length is needed"):
        nn.scan(step, variable_broadcast=True)(NNXBlock(nnx.Rngs(0)), X)


def test_an_axis_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"dense/bias has no axis 2: it is float32\[3,3\]"):
        nn.scan(step, variable_axes={"params": 2, "batch_stats": 0})(stacked(), X)


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_a_broadcast_variable_that_is_written_differently(transform: str) -> None:
    options: Any = {"variable_axes": {"params": 0}, "variable_broadcast": "batch_stats"}
    if transform == "vmap":
        options = {"variable_axes": {"params": 0, "batch_stats": None}}
    mdl = stacked(4)
    mdl.mean = nnx.BatchStat(jnp.zeros(3))
    before = nnx.state(nnx.clone(mdl))
    with pytest.raises(ValueError, match=r"mean is the same for all steps.*'batch_stats'") as error:
        getattr(nn, transform)(step, **options)(mdl, X)
    assert_trees_equal(nnx.state(mdl), before)
    assert "variable_broadcast" not in str(error.value)  # What it is already is no remedy.
    assert "None" not in str(error.value)


def test_an_output_that_is_broadcast_and_differs() -> None:
    run = nn.scan(step, variable_axes=BOTH, out_axes=nn.broadcast)
    with pytest.raises(ValueError, match=r"leaf 0 of the output depends on the step"):
        run(stacked(), X)


def test_an_axis_that_an_output_cannot_get() -> None:
    run = nn.scan(step, variable_axes=BOTH, out_axes=2)
    with pytest.raises(ValueError, match=r"out_axes=2: leaf 0 of the output is float32\[\]"):
        run(stacked(), X)


@pytest.mark.parametrize(
    ("transform", "axes", "remedy"),
    [
        (nn.vmap, 0, "None"),
        (nn.vmap, (0, 0), "None"),
        (nn.scan, (0,), "broadcast"),
    ],
)
def test_a_variable_among_the_arguments_with_another_axis(
    transform: Any, axes: Any, remedy: str
) -> None:
    def add(mdl: Any, x: jax.Array, variable: Any) -> Any:
        return mdl(x) + variable[...], None

    rules = {"vmap": {"variable_axes": {"params": None}}, "scan": {"variable_broadcast": "params"}}
    run = transform(add, **rules[transform.__name__], in_axes=axes)
    with pytest.raises(ValueError, match=rf"axis 0 to a Variable .*Param.*\[...\].*axis {remedy}"):
        run(models.make(models.MLP), X, nnx.Param(X))
    with pytest.raises(ValueError, match="an argument is given.*collection 'cache'"):
        run(models.make(models.MLP), X, nnx.Cache(X))


def test_a_variable_among_the_arguments_follows_its_collection() -> None:
    def add(mdl: Any, x: jax.Array, variable: Any) -> Any:
        return x + variable[...]

    mdl = models.make(models.MLP)
    y = nn.vmap(add, variable_axes={"params": None}, in_axes=(0, None))(mdl, X, nnx.Param(X[0]))
    assert_trees_equal(y, X + X[0])
    axes = {"params": None, "cache": 0}
    assert_trees_equal(nn.vmap(add, variable_axes=axes)(mdl, X, nnx.Cache(X)), X + X)


@pytest.mark.parametrize(
    ("carry", "message"),
    [(nnx.Param(X), r"a Variable, a Param; pass its value"), (nnx.Rngs(0), "a module, a Rngs")],
)
def test_a_carry_that_is_no_array(carry: Any, message: str) -> None:
    mdl = models.make(models.MLP)
    with pytest.raises(TypeError, match=f"scan: the carry holds {message}"):
        nn.scan(step, variable_broadcast=True, length=2)(mdl, (X, carry))
    with pytest.raises(TypeError, match=f"while_loop: the carry holds {message}"):
        nn.while_loop(lambda mdl, x: False, step, mdl, carry)


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_a_stream_that_is_not_named(transform: str) -> None:
    mdl = models.make(models.Noisy)
    options = (
        {"variable_axes": {"params": None}}
        if transform == "vmap"
        else {"variable_broadcast": "params", "length": 2}
    )
    with pytest.raises(ValueError, match=r"stream 'params'.*Pass split_rngs=\{'params': True\}"):
        getattr(nn, transform)(step, **options)(mdl, X)


def test_the_stream_that_is_used_is_named() -> None:
    rngs = nnx.Rngs(params=0, dropout=1, noise=2)
    run = nn.vmap(lambda rngs, x: x + rngs.noise(), split_rngs={"params": True})
    with pytest.raises(ValueError, match=r"stream 'noise'"):
        run(rngs, X)


def test_a_stream_with_several_keys_that_is_not_split() -> None:
    mdl = stacked(2, models.Noisy)
    with pytest.raises(ValueError, match="holds several keys.*Pass split_rngs"):
        nn.vmap(step, variable_axes={"params": 0}, split_rngs={"params": False}, in_axes=None)(
            mdl, X
        )


def test_a_carried_variable_that_changes() -> None:
    def grow(mdl: Any, carry: Any) -> Any:
        mdl.mean.set_value(jnp.concatenate([mdl.mean[...]] * 2))
        return carry, None

    mdl = NNXBlock(nnx.Rngs(0))
    run = nn.scan(grow, variable_broadcast="params", variable_carry="batch_stats", length=2)
    message = r"mean of the collection 'batch_stats' is.*float32\[3\].*float32\[6\].*astype"
    with pytest.raises(ValueError, match=message):
        run(mdl, 0.0)


def _scanned(change: Any, carry: Any) -> Any:
    run = nn.scan(lambda mdl, carry: (change(carry), None), variable_broadcast=True, length=2)
    return run(models.make(models.MLP), carry)


def _looped(change: Any, carry: Any) -> Any:
    mdl = models.make(models.MLP)
    return nn.while_loop(lambda mdl, carry: True, lambda mdl, carry: change(carry), mdl, carry)


@pytest.mark.parametrize("run", [_scanned, _looped])
def test_a_carry_that_changes(run: Any) -> None:
    carry = {"n": jnp.array(0), "h": jnp.ones(3)}
    with pytest.raises(TypeError, match=r"carry\['h'\].*float32\[3\].*bfloat16\[3\].*astype"):
        run(lambda carry: {**carry, "h": carry["h"].astype(jnp.bfloat16)}, carry)
    with pytest.raises(TypeError, match=r"carry\['n'\] comes.*int32\[\] and.*int32\[2\]"):
        run(lambda carry: {**carry, "n": jnp.array([0, 1])}, carry)
    with pytest.raises(TypeError, match=r"the carry comes.*with the structure .*'h'"):
        run(lambda carry: {"n": carry["n"]}, carry)


@pytest.mark.parametrize("run", [_scanned, _looped])
def test_an_error_of_the_function_itself_stays(run: Any) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        run(lambda carry: carry["h"] + "no number", {"h": jnp.ones(3)})


def test_a_variable_that_is_created_in_one_branch() -> None:
    def create(mdl: Any, x: jax.Array) -> jax.Array:
        mdl.new = nnx.BatchStat(x)
        return x

    with pytest.raises(ValueError, match=r"with new \(float32.*in all branches or in none"):
        nn.cond(True, create, lambda mdl, x: x, NNXBlock(nnx.Rngs(0)), X)


def test_a_loop_writes_only_what_is_carried() -> None:
    with pytest.raises(ValueError, match=r"mean is written.*carry_variables='batch_stats'"):
        nn.while_loop(
            lambda mdl, x: x.sum() > 0, lambda mdl, x: mdl(x)[0], NNXBlock(nnx.Rngs(0)), X
        )


@pytest.mark.parametrize("option", ["trans_in_fn", "trans_out_fn"])
def test_mapped_variables_keep_their_paths(option: str) -> None:
    def packed(variables: Any) -> Any:
        return {"batch_stats": {"packed": jax.tree.leaves(variables)}}

    run = nn.map_variables(step, "batch_stats", **{option: packed}, mutable=True)
    message = rf"{option} has .*must return the Variables.*keep their paths.*To pack or rename"
    with pytest.raises(ValueError, match=message):
        run(NNXBlock(nnx.Rngs(0)), X)


def test_mapped_variables_are_read_only() -> None:
    run = nn.map_variables(step, "batch_stats")
    with pytest.raises(ValueError, match="mean is written.*mutable=True"):
        run(NNXBlock(nnx.Rngs(0)), X)


def test_a_map_that_changes_the_paths() -> None:
    run = nn.map_variables(step, "params", lambda v: {"params": {"dense": {"kernal": 1.0}}})
    with pytest.raises(ValueError, match=r"trans_in_fn has.*dense/"):
        run(NNXBlock(nnx.Rngs(0)), X)


@pytest.mark.parametrize("result", [None, 3.0])
def test_a_map_that_returns_no_dicts(result: Any) -> None:
    with pytest.raises(TypeError, match="trans_in_fn must return nested dicts by collection"):
        nn.map_variables(step, "params", lambda v: result)(NNXBlock(nnx.Rngs(0)), X)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, "got int"),
        (int, "got the class int"),
        (linen.Dense, "got the class Dense"),
        (nnx.Rngs(0), "got Rngs"),
    ],
)
def test_what_cannot_be_lifted(target: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"scan: expected a class of NNX modules.*{message}"):
        nn.scan(target)


def test_a_module_that_is_lifted_itself() -> None:
    with pytest.raises(TypeError, match="For a module that exists lift a function of it"):
        nn.vmap(NNXBlock(nnx.Rngs(0)))


def test_a_method_of_a_module_that_exists() -> None:
    with pytest.raises(TypeError, match=r"Lift the function NNXBlock.__call__, and"):
        nn.remat(NNXBlock(nnx.Rngs(0)).__call__)


def test_a_linen_module() -> None:
    module = LinenBlock()
    bound = module.bind(module.init(jax.random.key(0), X))
    with pytest.raises(TypeError, match="there is flax.linen.vmap"):
        nn.vmap(step, variable_axes={"params": None})(bound, X)


@pytest.mark.parametrize("methods", [["absent"], "call"])
def test_methods_that_are_none(methods: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="methods: "):
        nn.remat(NNXBlock, methods=methods)


def test_methods_that_disagree_on_how_variables_are_made() -> None:
    methods = {"step": {"variable_axes": {"params": 0}}, "__call__": {"variable_axes": {}}}
    with pytest.raises(ValueError, match=r"'step' has variable_axes=\{'params': 0\} and '__ca"):
        nn.vmap(Stepping, methods=methods)


def test_a_misspelt_option_of_a_method() -> None:
    with pytest.raises(TypeError, match="'step' has the unknown .*did you mean 'variable_axes'"):
        nn.vmap(Stepping, methods={"step": {"variable_axs": {"params": 0}}})


def test_a_misspelt_static_argument() -> None:
    def call(mdl: Any, x: jax.Array, train: bool) -> Any:
        return mdl(x)

    with pytest.raises(ValueError, match="static_argnames: call .*'trian'; did you mean 'train'"):
        nn.jit(call, static_argnames="trian")


class Stepping(NNXBlock):
    def step(self, x: jax.Array) -> Any:
        return self(x)


def test_options_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"variable_axes=\{'params': None\}.*variable_broadcast"):
        nn.scan(step, variable_axes={"params": None})
    with pytest.raises(TypeError, match="split_rngs: expected a dict"):
        nn.vmap(step, split_rngs="params")
    with pytest.raises(ValueError, match="'x' is no axis"):
        nn.scan(step, variable_axes=BOTH, in_axes="x")(stacked(), X, X)
    with pytest.raises(NotImplementedError, match="static_argnums"):
        nn.remat(step, concrete=True)


def test_a_function_that_returns_its_module() -> None:
    with pytest.raises(TypeError, match="returned a module"):
        nn.remat(lambda mdl: mdl)(NNXBlock(nnx.Rngs(0)))
