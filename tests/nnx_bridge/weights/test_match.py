"""What `match` proposes, and where it says that it does not know."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from nnx_bridge import Host, Plan, match, register_layout, to_state
from nnx_bridge.weights import Certainty, Concatenate, Copy, Part, Transpose
from tests.helpers import KEY, assert_trees_equal, normal
from tests.nnx_bridge.weights.builders import Holder, Linear, dense, partners, variables
from tests.strategies import linen_variables


def test_shapes_decide_where_names_say_nothing() -> None:
    linen = variables({"params/Dense_0/kernel": (3, 4), "params/Dense_1/kernel": (4, 5)})
    model = Holder(zeta=dense(3, 4, use_bias=False), alpha=dense(4, 5, use_bias=False))
    assert partners(match(linen, model)) == {
        "params/Dense_0/kernel": "zeta/kernel",
        "params/Dense_1/kernel": "alpha/kernel",
    }


def test_the_arrays_of_a_module_stay_together() -> None:
    # Both biases have one shape; the kernel and the scale say whose they are.
    linen = variables(
        {
            "params/A/kernel": (3, 4),
            "params/A/bias": (4,),
            "params/B/scale": (4,),
            "params/B/bias": (4,),
        }
    )
    model = Holder(one=nnx.LayerNorm(4, rngs=nnx.Rngs(0)), two=dense(3, 4))
    found = partners(match(linen, model))
    assert found["params/A/bias"] == "two/bias"
    assert found["params/B/bias"] == "one/bias"


def test_the_name_of_a_class_speaks_for_its_instances() -> None:
    linen = variables(
        {
            "params/LayerNorm_0/scale": (4,),
            "params/LayerNorm_0/bias": (4,),
            "params/GroupNorm_0/scale": (4,),
            "params/GroupNorm_0/bias": (4,),
        }
    )
    rngs = nnx.Rngs(0)
    model = Holder(first=nnx.GroupNorm(4, 2, rngs=rngs), second=nnx.LayerNorm(4, rngs=rngs))
    found = partners(match(linen, model))
    assert found["params/LayerNorm_0/scale"] == "second/scale"
    assert found["params/GroupNorm_0/scale"] == "first/scale"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("query key value out", "q_proj k_proj v_proj out_proj"),
        ("LayerNorm_0 Conv_0", "ln conv"),
        ("Dense_0 Dense_1 Dense_2", "fc1 fc2 fc3"),
        ("attention intermediate", "attn inter"),
    ],
)
def test_names_that_people_use_are_recognised(ours: str, theirs: str) -> None:
    linen = variables({f"params/{name}/w": (4, 4) for name in ours.split()})
    model = Holder(**{name: Holder(w=nnx.Param(jnp.zeros((4, 4)))) for name in theirs.split()})
    plan = match(linen, model)
    assert not plan.problems
    assert partners(plan) == {
        f"params/{a}/w": f"{b}/w" for a, b in zip(ours.split(), theirs.split(), strict=True)
    }


def test_lists_correspond_by_number_though_sorted_as_text() -> None:
    linen = variables({f"params/Block_{i}/kernel": (4, 4) for i in range(12)})
    linen["params"] = dict(sorted(linen["params"].items()))
    model = Holder(blocks=nnx.List([dense(4, 4, use_bias=False) for _ in range(12)]))
    found = partners(match(linen, model))
    assert found == {f"params/Block_{i}/kernel": f"blocks/{i}/kernel" for i in range(12)}


def test_numbers_of_an_nnx_dict_are_those_of_linen_names() -> None:
    linen = variables({f"params/layers_{i}/kernel": (4, 4) for i in (0, 3)})
    model = Holder(layers=nnx.Dict({"0": dense(4, 4, use_bias=False), "3": dense(4, 4)}))
    assert partners(match(linen, model, allow_missing=["layers/3/bias"])) == {
        "params/layers_0/kernel": "layers/0/kernel",
        "params/layers_3/kernel": "layers/3/kernel",
    }


def test_layers_that_nobody_can_tell_apart_are_an_error_with_the_candidates() -> None:
    linen = variables({"params/Dense_0/kernel": (4, 4), "params/Dense_1/kernel": (4, 4)})
    model = Holder(up=dense(4, 4, use_bias=False), down=dense(4, 4, use_bias=False))
    (problem,) = match(linen, model).problems
    assert problem.text.startswith(
        "params/Dense_0/kernel, params/Dense_1/kernel: the candidates in NNX are down/kernel, "
        "up/kernel; equally good for all that is known: write a rule, or pass calls="
    )


def test_one_rule_decides_for_the_other_too() -> None:
    linen = variables({"params/Dense_0/kernel": (4, 4), "params/Dense_1/kernel": (4, 4)})
    model = Holder(up=dense(4, 4, use_bias=False), down=dense(4, 4, use_bias=False))
    plan = match(linen, model, [("Dense_1", "up")])
    assert partners(plan) == {
        "params/Dense_0/kernel": "down/kernel",
        "params/Dense_1/kernel": "up/kernel",
    }


class Crossed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(4)(x))
        x = (
            x
            * nn.scan(
                lambda mdl, c, _: (nn.Dense(4)(c), None),
                variable_broadcast="params",
                split_rngs={"params": False},
                length=2,
            )(self, x, None)[0]
        )
        return nn.Dense(4)(x)


class CrossedNative(nnx.Module):
    def __init__(self) -> None:
        # In another order than they are used in.
        self.c, self.a, self.b = dense(4, 4), dense(4, 4), dense(4, 4)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.a(x))
        x = x * jax.lax.fori_loop(0, 2, lambda _, y: self.b(y), x)
        return self.c(x)


def test_the_order_of_use_decides_where_names_do_not() -> None:
    x = normal(2, 4)
    linen, model = Crossed(), CrossedNative()
    weights = linen.init(KEY, x)
    plan = match(weights, model, calls=(lambda v: linen.apply(v, x), lambda m: m(x)))
    assert not plan.problems
    found = partners(plan)
    assert [found[f"params/Dense_{i}/kernel"] for i in range(3)] == [
        "a/kernel",
        "b/kernel",
        "c/kernel",
    ]


def test_a_kernel_that_lies_transposed_in_a_layer_of_the_user_is_turned() -> None:
    linen = variables({"params/Dense_0/kernel": (3, 4), "params/Dense_0/bias": (4,)})
    plan = match(linen, Holder(fc=Linear(3, 4)))
    assert partners(plan)["params/Dense_0/kernel"] == "fc/kernel (transpose (1, 0))"
    assert_trees_equal(plan.to_nnx(linen)["fc"]["kernel"], linen["params"]["Dense_0"]["kernel"].T)


def test_a_square_kernel_beside_transposed_ones_is_not_taken_silently() -> None:
    shapes = {"params/Dense_0/kernel": (3, 4), "params/Dense_0/bias": (4,)}
    linen = variables({**shapes, "params/Dense_1/kernel": (4, 4), "params/Dense_1/bias": (4,)})
    model = Holder(fc1=Linear(3, 4), fc2=Linear(4, 4))
    (problem,) = match(linen, model).problems
    assert "params/Dense_1/kernel" in problem.text
    assert "write a rule with the layout Transpose() or Copy()" in problem.text
    for layout in (Transpose(), Copy()):
        assert not match(linen, model, [("Dense_1/kernel", "fc2/kernel", layout)]).problems


def test_kernels_that_lie_transposed_do_not_go_where_others_have_their_shape() -> None:
    # An autoencoder: the first kernel has the shape of the second one transposed.
    shapes = {"params/Dense_0/kernel": (3, 4), "params/Dense_0/bias": (4,)}
    linen = variables({**shapes, "params/Dense_1/kernel": (4, 3), "params/Dense_1/bias": (3,)})
    assert partners(match(linen, Holder(out=Linear(4, 3), into=Linear(3, 4)))) == {
        "params/Dense_0/kernel": "into/kernel (transpose (1, 0))",
        "params/Dense_0/bias": "into/bias",
        "params/Dense_1/kernel": "out/kernel (transpose (1, 0))",
        "params/Dense_1/bias": "out/bias",
    }


def test_arrays_that_tie_modules_together_crosswise_are_not_taken() -> None:
    shapes = {"params/A/kernel": (3, 4), "params/A/bias": (4,)}
    linen = variables({**shapes, "params/B/kernel": (4, 5), "params/B/bias": (5,)})
    one = Holder(kernel=nnx.Param(jnp.zeros((4, 5))), bias=nnx.Param(jnp.zeros(4)))
    other = Holder(kernel=nnx.Param(jnp.zeros((3, 4))), bias=nnx.Param(jnp.zeros(5)))
    problems = match(linen, Holder(one=one, other=other)).problems
    assert problems
    assert all("by those beside them not: write a rule" in p.text for p in problems)


def test_a_variable_type_derived_from_that_of_the_collection_belongs_to_it() -> None:
    class Weight(nnx.Param[Any]):
        pass

    linen = variables({"params/w": (3,)})
    assert not match(linen, Holder(w=Weight(jnp.zeros(3)))).problems


def test_a_layer_of_flax_is_never_transposed() -> None:
    linen = variables({"params/fc/kernel": (4, 3)})
    (problem,) = match(linen, Holder(fc=dense(3, 4, use_bias=False))).problems
    assert problem.text == (
        "params/fc/kernel -> fc/kernel: expected float32[3,4], came float32[4,3]; a rule with the "
        "layout Transpose() turns it around"
    )


@pytest.mark.parametrize(
    "model",
    [
        nnx.state(dense(3, 4, use_bias=False)),
        Host(nn.Dense(4, use_bias=False), {"params": {"kernel": jnp.zeros((3, 4))}}),
    ],
    ids=["state", "host"],
)
def test_what_lies_as_in_linen_or_nobody_knows_how_is_never_transposed(model: Any) -> None:
    (problem,) = match(variables({"params/kernel": (4, 3)}), model).problems
    assert "expected float32[3,4], came float32[4,3]" in problem.text


def test_a_key_with_slashes_is_not_taken_for_a_path() -> None:
    # `nn.WeightNorm` makes such keys, beside the tree of the layer that it is about.
    linen = {"params": {"a/w": jnp.zeros(3), "a": {"w": jnp.ones(3)}}}
    plan = match(linen, to_state(linen))
    assert not plan.problems
    assert_trees_equal(plan.to_linen(plan.to_nnx(linen)), linen)


def test_heads_are_merged_and_taken_apart() -> None:
    x = normal(2, 5, 6)
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=4)
    weights = attention.init(KEY, x)
    model = Holder(query=dense(6, 4), key=dense(6, 4), value=dense(6, 4), out=dense(4, 6))
    plan = match(weights, model)
    assert not plan.problems
    assert partners(plan)["params/query/kernel"] == "query/kernel (reshape (6, 2, 2) to (6, 4))"
    assert_trees_equal(plan.to_linen(plan.to_nnx(weights)), weights)


def test_arrays_with_other_standard_names_are_no_candidates() -> None:
    linen = variables({"params/n/scale": (4,)})
    model = Holder(n=nnx.LayerNorm(4, use_scale=False, rngs=nnx.Rngs(0)))
    assert [p.kind.value for p in match(linen, model).problems] == ["missing", "extra"]


def test_arrays_of_the_same_shape_and_quite_other_names_are_no_candidates() -> None:
    linen = variables({"params/position": (1, 4)})
    model = Holder(token=nnx.Param(jnp.zeros((1, 4))))
    missing, extra = match(linen, model).problems
    assert missing.text.startswith(
        "token: expected float32[1,4], nothing in Linen was found for it (of this shape, "
        "without a partner: params/position float32[1,4])"
    )
    assert extra.text.endswith("allow_extra=['params/position'] leaves it behind")


def test_collections_do_not_mix() -> None:
    linen = variables({"params/n/mean": (4,), "batch_stats/n/mean": (4,)})
    model = Holder(n=Holder(mean=nnx.BatchStat(jnp.zeros(4))))
    (problem,) = match(linen, model).problems
    assert problem.paths == (("params", "n", "mean"),)


@given(linen_variables())
def test_hosted_variables_have_the_paths_of_linen(tree: dict[str, Any]) -> None:
    not_weights = ("intermediates", "perturbations")
    weights = {name: branch for name, branch in tree.items() if name not in not_weights}
    plan = match(weights, to_state(weights))
    assert not plan.problems
    assert {row.certainty for row in plan.rows} <= {Certainty.EQUAL}
    assert_trees_equal(plan.to_linen(plan.to_nnx(weights)), weights)


def test_a_host_is_matched_with_the_variables_that_it_runs() -> None:
    x = normal(2, 4)
    weights = nn.BatchNorm(use_running_average=False).init(KEY, x)
    plan = match(weights, Host(nn.BatchNorm(use_running_average=False), weights))
    assert not plan.problems
    assert_trees_equal(plan.to_linen(plan.to_nnx(weights)), weights)


def test_what_a_model_draws_from_or_records_is_not_required() -> None:
    model = nnx.Sequential(dense(3, 3), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    model.sown = nnx.Intermediate(jnp.ones(3))
    weights = variables({"params/layers_0/kernel": (3, 3), "params/layers_0/bias": (3,)})
    assert not match(weights, model).problems
    assert not match({**weights, "intermediates": {"y": (jnp.ones(3),)}}, model).problems


def test_a_cache_is_required_where_linen_has_one() -> None:
    model = Holder(index=nnx.Cache(jnp.zeros(())))
    assert not match({"params": {}}, model).problems
    assert match(variables({"cache/other/x": (2,)}), model).problems


class Halves(nn.Module):
    pass


class Whole(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.zeros((3, 4)))


def test_a_pair_of_classes_can_be_taught() -> None:
    def parts(shapes: Any) -> Any:
        width = shapes[("kernel",)].shape[-1] // 2
        halves = Concatenate((width, width))
        yield Part((("left", "w"), ("right", "w")), (("kernel",),), halves)

    register_layout(Halves, Whole, parts)
    linen = variables({"params/Halves_0/left/w": (3, 2), "params/Halves_0/right/w": (3, 2)})
    plan = match(linen, Holder(mine=Whole()))
    assert not plan.problems
    halves = linen["params"]["Halves_0"]
    expected = np.concatenate([halves["left"]["w"], halves["right"]["w"]], axis=1)
    assert_trees_equal(plan.to_nnx(linen)["mine"]["kernel"], jnp.asarray(expected))


def test_a_gate_that_is_missing_is_named() -> None:
    cell = nn.OptimizedLSTMCell(4)
    weights = cell.init(KEY, cell.initialize_carry(KEY, (2, 3)), normal(2, 3))
    del weights["params"]["if"]
    problems = match(weights, nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))).problems
    assert any("of the 4 arrays" in p.text and "if/kernel are missing" in p.text for p in problems)


def test_the_model_may_be_abstract() -> None:
    model = nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    linen = jax.eval_shape(lambda: nn.Dense(4).init(KEY, jnp.ones((1, 3))))
    plan = match(linen, model)
    assert isinstance(plan, Plan)
    assert plan.to_nnx(linen)["kernel"] == jax.ShapeDtypeStruct((3, 4), jnp.float32)


def test_no_nnx_model_is_an_error() -> None:
    with pytest.raises(TypeError, match="expected an NNX module or its state, got dict"):
        match({"params": {}}, {})


def test_one_pattern_instead_of_a_list_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"write allow_missing=\['head'\]"):
        match({"params": {}}, Holder(), allow_missing="head")


@given(st.permutations(range(6)))
def test_the_order_of_attributes_does_not_matter(order: list[int]) -> None:
    linen = variables({f"params/Dense_{i}/kernel": (4, 4) for i in range(6)})
    model = Holder(**{f"fc{i}": dense(4, 4, use_bias=False) for i in order})
    found = partners(match(linen, model))
    assert found == {f"params/Dense_{i}/kernel": f"fc{i}/kernel" for i in range(6)}
