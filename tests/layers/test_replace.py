"""`dropconnect` and `remove_dropconnect` on whole models."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers import DropConnectLinear, WeightDrop, dropconnect, remove_dropconnect

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


class Pair(NamedTuple):
    layer: nnx.Linear
    number: int


class Model(nnx.Module):
    """Attributes whose order of assignment is not that of their names; every container."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.heads = nnx.Dict({"a": nnx.Linear(4, 2, rngs=rngs)})
        self.tail = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.relu)
        self.plain = nnx.data([nnx.Linear(2, 2, rngs=rngs)])
        self.named = nnx.data({"x": (nnx.Linear(2, 2, rngs=rngs), 3)})
        self.pair = nnx.data(Pair(nnx.Linear(2, 2, rngs=rngs), 4))
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.again = self.blocks[0]

    def __call__(self, x):
        for layer in (self.stem, *self.blocks, self.again, self.heads["a"], self.tail):
            x = layer(x)
        return self.norm(self.pair.layer(self.named["x"][0](self.plain[0](x))))


def paths(model, kind):
    return {"/".join(map(str, path)) for path, m in nnx.iter_modules(model) if type(m) is kind}


def test_every_linear_layer_but_the_first_is_replaced_in_every_container():
    model, summary = dropconnect(Model(nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))
    assert type(model.stem) is nnx.Linear and not paths(model, nnx.Linear) - {"stem"}
    assert isinstance(model.named["x"][0], DropConnectLinear) and model.named["x"][1] == 3
    assert isinstance(model.pair.layer, DropConnectLinear) and model.pair.number == 4
    assert summary.kept == (("stem",),) and len(summary.replaced) == 7
    assert model(X).shape == (2, 2)


def test_the_original_is_left_alone():
    model = Model(nnx.Rngs(0))
    before = nnx.graphdef(model)
    dropconnect(model, 0.5)
    assert nnx.graphdef(model) == before


def test_a_layer_that_occurs_twice_is_replaced_by_one_object():
    model, _ = dropconnect(Model(nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))
    assert model.again is model.blocks[0]


def test_a_model_that_holds_itself_is_searched_once():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    model.itself = model
    dropped, summary = dropconnect(model)
    assert dropped.itself is dropped and len(summary.rows) == 2


def test_sharing_trains_both_and_copying_one():
    model = Model(nnx.Rngs(0))
    shared, _ = dropconnect(model)
    copied, _ = dropconnect(model, share=False)
    assert shared.blocks[0].kernel is model.blocks[0].kernel
    assert copied.blocks[0].kernel is not model.blocks[0].kernel
    np.testing.assert_array_equal(copied.blocks[0].kernel[...], model.blocks[0].kernel[...])


def test_it_is_the_same_function_when_deterministic():
    model = Model(nnx.Rngs(0))
    dropped, _ = dropconnect(model, 0.5)
    dropped.eval()
    model.eval()
    np.testing.assert_array_equal(dropped(X), model(X))


def test_the_inverse_gives_back_the_model():
    model = Model(nnx.Rngs(0))
    back = remove_dropconnect(dropconnect(model, 0.5, rngs=nnx.Rngs(1))[0])
    assert nnx.graphdef(back) == nnx.graphdef(nnx.clone(model))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *map(nnx.state, (back, model))))
    assert back.blocks[0].kernel is model.blocks[0].kernel and back.again is back.blocks[0]


def test_the_inverse_unwraps_what_was_wrapped_by_hand():
    conv = nnx.Conv(2, 2, (3,), rngs=nnx.Rngs(0))
    nested = nnx.Sequential(WeightDrop(nnx.Sequential(conv, nnx.relu), 0.5), nnx.relu)
    back = remove_dropconnect(nested)
    assert type(back.layers[0]) is nnx.Sequential
    assert back.layers[0].layers[0].kernel is conv.kernel


def test_the_inverse_can_copy():
    layer = DropConnectLinear.create(2, 2, rngs=nnx.Rngs(0))
    assert remove_dropconnect(layer, share=False).kernel is not layer.kernel


@pytest.mark.parametrize(
    "only, expected",
    [
        ("blocks/*", {"blocks/0", "blocks/1"}),
        (("heads/*", "stem"), {"heads/a", "stem"}),
        (
            lambda path, module: path[:1] == ("tail",) and isinstance(module, nnx.Linear),
            {"tail/layers/0"},
        ),
    ],
)
def test_layers_are_chosen_by_path_or_predicate(only, expected):
    model, summary = dropconnect(Model(nnx.Rngs(0)), only=only, keep_first=False)
    assert {"/".join(map(str, path)) for path in summary.replaced} == expected


def test_other_layers_are_chosen_by_type_and_wrapped():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.relu, nnx.Conv(4, 4, (3, 3), rngs=rngs)
    )
    dropped, summary = dropconnect(model, 0.5, only=nnx.Conv, rngs=rngs)
    assert type(dropped.layers[0]) is nnx.Conv and type(dropped.layers[2]) is WeightDrop
    assert summary.rows[1].after == "WeightDrop"
    assert dropped(jnp.ones((1, 8, 8, 1))).shape == (1, 8, 8, 4)


def test_attention_projections_are_replaced_in_place():
    model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    dropped, summary = dropconnect(
        model, 0.5, only=nnx.LinearGeneral, keep_first=False, rngs=nnx.Rngs(1)
    )
    assert len(summary.replaced) == 4
    assert dropped(jnp.ones((1, 3, 4))).shape == (1, 3, 4)


def test_a_subclass_of_linear_keeps_its_behaviour():
    class Doubled(nnx.Linear):
        def __call__(self, x, out_sharding=None):
            return 2 * super().__call__(x)

    model = Doubled(4, 4, rngs=nnx.Rngs(0))
    dropped, _ = dropconnect(model, 0.5, keep_first=False)
    np.testing.assert_array_equal(dropped(X, deterministic=True), model(X))


def test_a_recurrent_layer_can_be_chosen_with_its_hidden_weights():
    model = nnx.Sequential(nnx.RNN(nnx.LSTMCell(4, 3, rngs=nnx.Rngs(0))))
    dropped, _ = dropconnect(
        model,
        0.5,
        only=nnx.RNN,
        params=layers.hidden_to_hidden,
        keep_first=False,
        rngs=nnx.Rngs(1),
    )
    assert dropped(jnp.ones((1, 5, 4))).shape == (1, 5, 3)


def test_the_root_itself_may_be_replaced():
    dropped, _ = dropconnect(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), keep_first=False)
    assert isinstance(dropped, DropConnectLinear)


def test_replacing_again_changes_nothing_that_is_replaced():
    once, _ = dropconnect(Model(nnx.Rngs(0)), 0.5)
    twice, summary = dropconnect(once, 0.1, keep_first=False)
    assert summary.replaced == (("stem",),) and twice.blocks[0].rate == 0.5


def test_options_reach_the_new_layers():
    dropped, _ = dropconnect(
        Model(nnx.Rngs(0)),
        0.125,
        rngs=nnx.Rngs(noise=1),
        rng_collection="noise",
        generator="fast",
        per_example=True,
    )
    layer = dropped.blocks[1]
    assert (layer.rate, layer.generator, layer.rng_collection) == (0.125, "fast", "noise")
    assert layer.per_example and isinstance(layer.rngs, nnx.RngStream)


@pytest.mark.parametrize(
    "source",
    [
        lambda: nnx.Rngs(1),
        lambda: nnx.Rngs(1).default,
        lambda: jax.random.key(1),
        lambda: np.asarray(jax.random.PRNGKey(1)),
    ],
    ids=["Rngs", "RngStream", "key", "raw key"],
)
def test_each_new_layer_draws_masks_of_its_own(source):
    dropped, _ = dropconnect(Model(nnx.Rngs(0)), 0.5, rngs=source())
    a, b = (jax.random.key_data(dropped.blocks[i].rngs.key[...]) for i in (0, 1))
    assert (a != b).any()


def test_the_summary_prints_what_happened():
    _, summary = dropconnect(Model(nnx.Rngs(0)), 0.5)
    text = str(summary)
    assert "stem" in text and "kept" in text and "7 replaced at rate 0.5" in text


def test_selecting_nothing_lists_the_modules():
    with pytest.raises(ValueError, match="only='nowhere' selects nothing; there is: .*blocks/0"):
        dropconnect(Model(nnx.Rngs(0)), only="nowhere")


def test_a_model_without_layers_to_replace_names_itself():
    model = nnx.Conv(2, 2, (3,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"selects nothing; there is: \(model\)"):
        dropconnect(model)


def test_a_model_of_one_layer_says_that_it_was_kept():
    with pytest.raises(ValueError, match=r"selects one layer.*keep_first=False"):
        dropconnect(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))


def test_a_bad_rate_is_found_before_anything_is_built():
    with pytest.raises(ValueError, match="got 1.5"):
        dropconnect(Model(nnx.Rngs(0)), 1.5)


def test_the_new_model_trains_in_a_compiled_step():
    model, _ = dropconnect(Model(nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))
    grads = nnx.jit(lambda m: nnx.grad(lambda m: (m(X) ** 2).sum())(m))(model)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
