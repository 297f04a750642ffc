"""Rules of the user."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from nnx_bridge import Rule, WeightsError, match
from nnx_bridge.weights import Certainty, Concatenate, Copy, Transpose
from tests.helpers import assert_trees_equal
from tests.nnx_bridge.weights.builders import Holder, dense, partners, variables


def kernels(*names: str) -> dict[str, Any]:
    return variables({f"params/{name}/kernel": (4, 4) for name in names})


def model(*names: str) -> Holder:
    return Holder(**{name: dense(4, 4, use_bias=False) for name in names})


SWAPPED = {
    "params/Dense_0/kernel": "b/kernel",
    "params/Dense_1/kernel": "a/kernel",
}


@pytest.mark.parametrize(
    "rules",
    [
        [("params/Dense_0/kernel", "b/kernel"), ("params/Dense_1/kernel", "a/kernel")],
        [("Dense_0/kernel", "b/kernel")],
        [("Dense_0", "b"), ("Dense_1", "a")],
        [("*_0", "b")],
        [("Dense_1/*", "a/*")],
        [(re.compile(r"params/Dense_0/(\w+)"), r"b/\1")],
        [Rule("Dense_0", "b")],
        [lambda path: path.replace("params/Dense_0", "b") if "Dense_0" in path else None],
    ],
    ids=["exact", "leaf", "module", "glob", "two globs", "regex", "Rule", "function"],
)
def test_a_rule_wins_over_what_would_be_proposed(rules: Any) -> None:
    plan = match(kernels("Dense_0", "Dense_1"), model("a", "b"), rules)
    assert not plan.problems
    assert partners(plan) == SWAPPED
    assert Certainty.RULE in {row.certainty for row in plan.rows}


def test_a_rule_wins_over_equal_paths() -> None:
    plan = match(kernels("a", "b"), model("a", "b"), [("a", "b"), ("b", "a")])
    assert partners(plan) == {"params/a/kernel": "b/kernel", "params/b/kernel": "a/kernel"}


def test_the_first_rule_that_applies_counts() -> None:
    rules = [("Dense_0", "b"), ("Dense_*", "a")]
    assert partners(match(kernels("Dense_0", "Dense_1"), model("a", "b"), rules)) == SWAPPED


def test_wildcards_fill_those_of_the_target() -> None:
    linen = variables({f"params/enc/layer_{i}/out/kernel": (4, 4) for i in range(3)})
    target = Holder(blocks=nnx.List([Holder(o=dense(4, 4, use_bias=False)) for _ in range(3)]))
    plan = match(linen, target, [("enc/layer_*/out", "blocks/*/o")])
    assert partners(plan) == {
        f"params/enc/layer_{i}/out/kernel": f"blocks/{i}/o/kernel" for i in range(3)
    }
    assert {row.certainty for row in plan.rows} == {Certainty.RULE}


def test_two_stars_match_several_levels() -> None:
    linen = variables({"params/a/b/c/kernel": (4, 4)})
    target = Holder(b=Holder(c=dense(4, 4, use_bias=False)))
    assert not match(linen, target, [("a/**", "**")]).problems


def test_a_module_may_move_to_the_root() -> None:
    linen = variables({"params/model/fc/kernel": (4, 4)})
    plan = match(linen, model("fc"), [("model", "")])
    assert partners(plan) == {"params/model/fc/kernel": "fc/kernel"}


def test_what_is_known_of_layers_applies_below_a_rule() -> None:
    from flax import linen as nn

    from tests.helpers import KEY, normal

    cell = nn.OptimizedLSTMCell(4)
    weights = cell.init(KEY, cell.initialize_carry(KEY, (2, 3)), normal(2, 3))
    linen = {"params": {"one": weights["params"], "two": weights["params"]}}
    cells = {name: nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)) for name in ("x", "y")}
    plan = match(linen, Holder(**cells), [("one", "y")])
    assert not plan.problems
    assert partners(plan)[" + ".join(f"params/one/h{g}/bias" for g in "ifgo")].startswith("y/")


def test_the_array_of_a_rule_goes_nowhere_else() -> None:
    # Of another shape than the target: it must not be assigned to the free array of its own shape.
    linen = variables({"params/w": (4,), "params/v": (4,)})
    target = Holder(w=nnx.Param(jnp.zeros(5)), v=nnx.Param(jnp.zeros(4)))
    problems = match(linen, target, [("w", "w")]).problems
    assert [p.text for p in problems] == ["params/w -> w: expected float32[5], came float32[4]"]


def test_a_rule_may_say_how_the_array_lies() -> None:
    linen = kernels("fc")
    plan = match(linen, model("fc"), [("fc/kernel", "fc/kernel", Transpose())])
    assert_trees_equal(plan.to_nnx(linen)["fc"]["kernel"], linen["params"]["fc"]["kernel"].T)


def test_several_arrays_become_one_by_a_rule() -> None:
    paths = {f"params/h_{i}/{n}/kernel": (4, 2) for i in range(2) for n in "qkv"}
    linen = variables(paths)
    target = Holder(h=nnx.List([Holder(qkv=dense(4, 6, use_bias=False)) for _ in range(2)]))
    gates = ("h_*/q/kernel", "h_*/k/kernel", "h_*/v/kernel")
    plan = match(linen, target, [(gates, "h/*/qkv/kernel", Concatenate((2, 2, 2)))])
    assert not plan.problems
    layer = linen["params"]["h_1"]
    expected = jnp.concatenate([layer[n]["kernel"] for n in "qkv"], axis=-1)
    assert_trees_equal(plan.to_nnx(linen)["h"][1]["qkv"]["kernel"], expected)
    assert_trees_equal(plan.to_linen(plan.to_nnx(linen)), linen)


def test_keys_with_slashes_can_be_below_a_rule() -> None:
    from flax import linen as nn

    from tests.helpers import KEY, normal

    weights = nn.SpectralNorm(nn.Dense(4)).init(KEY, normal(2, 3), update_stats=True)
    linen = {name: {"inner": tree} for name, tree in weights.items()}
    layer = nnx.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    plan = match(linen, Holder(outer=layer), [("inner", "outer")])
    assert not plan.problems
    assert {row.certainty for row in plan.rows} == {Certainty.RULE}


def test_a_rule_to_a_path_that_does_not_exist_is_an_error_with_the_nearest() -> None:
    message = r"rule makes params/a/kernel frist/kernel, but the model has no frist; nearest: first"
    with pytest.raises(WeightsError, match=message):
        match(kernels("a"), model("first"), [("a", "frist")])


def test_a_rule_with_a_layout_to_a_path_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(WeightsError, match="no array there that is free"):
        match(kernels("a"), model("first"), [("a/kernel", "first", Copy())])


def test_a_joined_array_that_linen_does_not_have_is_an_error() -> None:
    rule = (("a/kernel", "x/kernel"), "first/kernel", Concatenate((4, 4)))
    with pytest.raises(WeightsError, match="Linen has no params/x/kernel that is free; nearest:"):
        match(kernels("a", "b"), model("first"), [rule])


def test_more_wildcards_than_there_are_texts_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'\*/\*' has 2 wildcards, its partner only 1"):
        match(kernels("a"), model("a"), [("*", "*/*")])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (3, r"a rule is a Rule, a tuple .* got 3"),
        (("a", "b", Copy(), 1), r"a rule is a Rule, a tuple"),
        (("a", None), r"a rule is a pattern of Linen with a path of NNX.*got str with None"),
        ((("a", "b"), "c"), r"the rule for a \+ b joins several arrays; say how"),
    ],
)
def test_what_is_no_rule_is_an_error(rule: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        match(kernels("a"), model("a"), [rule])
