"""`train()` and `eval()` of a host reach what the Linen model uses for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_equal, normal
from tests.nnx_bridge.host.models import KEYS, Block, Net, X


class Field(nn.Module):
    """Has the mode in a field."""

    is_training: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.5)(x, deterministic=not self.is_training)


class Two(nn.Module):
    """Has two arguments that could be the mode."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, inference: bool = False) -> jax.Array:
        return nn.Dropout(0.5)(x, deterministic=not train or inference)


def test_an_argument() -> None:
    model = Host.init(Net(), KEYS, X)
    module, variables = nnx_bridge.unhost(model)
    assert model.training_arguments == {"train": True}
    model.train()
    expected, _ = module.apply(variables, X, True, rngs=KEYS, mutable=["batch_stats"])
    assert_trees_equal(model(X, rngs=KEYS), expected)
    model.eval()
    assert_trees_equal(model(X), module.apply(nnx_bridge.unhost(model)[1], X, False))


def test_before_either_is_called_the_defaults_are_linens() -> None:
    model = Host.init(nn.Dropout(0.5), KEYS, X, deterministic=True)
    with pytest.raises(ValueError, match="deterministic"):
        model(X)
    model.train()
    assert not jnp.array_equal(model(X), X)


def test_an_explicit_argument_wins() -> None:
    model = Host.init(Net(), KEYS, X)
    before = nnx_bridge.unhost(model)[1]
    model.train()
    model(X, False)
    model(X, train=False)
    assert_trees_equal(nnx_bridge.unhost(model)[1], before)


def test_a_field() -> None:
    model = Host.init(Field(is_training=False), KEYS, X)
    assert model.training_arguments == {"is_training": True}
    model.train()
    assert not jnp.array_equal(model(X), X)
    model.eval()
    assert_trees_equal(model(X), X)


def test_a_name_that_is_argument_and_field() -> None:
    model = Host.init(nn.BatchNorm(), KEYS, X, use_running_average=True)
    model.train()
    model(X)
    assert model.mean.get_value().any()
    fixed = Host.init(nn.BatchNorm(use_running_average=True), KEYS, X)
    fixed.train()
    fixed(X)
    assert fixed.mean.get_value().any()


def test_several_names_are_an_error_until_one_is_chosen() -> None:
    model = Host.init(Two(), KEYS, X)
    model.train()
    with pytest.raises(ValueError, match=r"argument 'train', argument 'inference'.*training=\{"):
        model(X)
    model(X, train=True)
    chosen = Host.init(Two(), KEYS, X, training={"train": True})
    chosen.train()
    assert not jnp.array_equal(chosen(X), X)


def test_methods_and_nodes_have_their_own() -> None:
    model = Host.init(Net(), KEYS, X)
    module, variables = nnx_bridge.unhost(model)
    model.train()
    expected = module.apply(variables, X, True, rngs=KEYS, method="encode")
    assert_trees_equal(model.encode(X, rngs=KEYS), expected)
    assert_trees_equal(model.encoder(X, rngs=KEYS), expected)
    assert model.encoder.training_arguments == {"train": True}


def test_the_modes_of_nnx_reach_hosts_and_replacements() -> None:
    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.host = Host.init(Net(), KEYS, X)

    outer = Outer()
    outer.host.layers_0 = Block(nnx.Rngs(0))
    outer.eval()
    assert outer.host.deterministic and outer.host.layers_0.drop.deterministic
    view = nnx.view(outer, deterministic=False, use_running_average=False)
    assert view.host.deterministic is False and view.host.layers_0.drop.deterministic is False
    assert outer.host.deterministic is True
    outer.host.set_attributes(deterministic=False)
    assert outer.host.encoder.deterministic is False


def test_a_model_without_a_mode_is_left_alone() -> None:
    model = Host.init(nn.Dense(3), KEYS, X)
    model.train()
    assert model.training_arguments == {}
    assert model(X).shape == (2, 3)


class Backbone(nn.Module):
    """Statistics and noise."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Tuned(nn.Module):
    """A backbone and a head that is one, too."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return Backbone(name="head")(Backbone(name="backbone")(x, train), train=train)


def test_a_node_keeps_its_own_mode_when_its_parent_runs() -> None:
    model = Host.init(Tuned(), KEYS, X)
    model.train()
    model.backbone.eval()
    before = nnx_bridge.unhost(model)[1]["batch_stats"]
    y = model(X, rngs=KEYS)
    after = nnx_bridge.unhost(model)[1]["batch_stats"]
    assert_trees_equal(after["backbone"], before["backbone"])
    assert not jnp.array_equal(after["head"]["norm"]["mean"], before["head"]["norm"]["mean"])
    assert (y == 0).any() and not (model.backbone(X) == 0).any()


def test_a_node_in_training_below_a_model_in_evaluation() -> None:
    model = Host.init(Tuned(), KEYS, X)
    model.eval()
    model.head.train()
    assert (nnx.jit(lambda model: model(X, rngs=KEYS))(model) == 0).any()
    model.eval()
    assert not (nnx.jit(lambda model: model(X, rngs=KEYS))(model) == 0).any()


def test_a_layer_keeps_its_own_mode_in_a_field() -> None:
    model = Host.init(Tuned(), KEYS, X)
    model.train()
    model.head.norm.eval()
    before = nnx_bridge.unhost(model)[1]["batch_stats"]
    model(X, rngs=KEYS)
    assert_trees_equal(nnx_bridge.unhost(model)[1]["batch_stats"]["head"], before["head"])


class Reader(nn.Module):
    """Reads a field of its layer when the layer has run."""

    def setup(self) -> None:
        self.drop = nn.Dropout(0.5, deterministic=True)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, bool | None]:
        return self.drop(x), self.drop.deterministic


def test_a_field_is_as_it_was_when_the_layer_has_run() -> None:
    model = Host.init(Reader(), KEYS, X)
    model.drop.train()
    y, deterministic = model(X, rngs=KEYS)
    assert (y == 0).any() and deterministic


def test_a_model_without_a_mode_sets_that_of_its_layers() -> None:
    model = Host.init(nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=False)]), KEYS, X)
    assert (model(X, rngs=KEYS) == 0).any()
    model.eval()
    assert not (model(X, rngs=KEYS) == 0).any()
    model.train()
    assert (model(X, rngs=KEYS) == 0).any()


class Recurrent(nn.Module):
    """Has no mode itself, and a cell that `nn.RNN` calls in a function of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.RNN(nn.SimpleCell(3))(x)
        return nn.Dropout(0.5, deterministic=True)(x)


def test_functions_that_transforms_run_on_a_module_have_no_mode() -> None:
    x = normal(2, 3, 4)
    model = Host.init(Recurrent(), KEYS, x)
    model.eval()
    settled = model(x)
    model.train()
    dropped = model(x)
    assert_trees_equal(jnp.where(dropped == 0, 0, dropped), jnp.where(dropped == 0, 0, 2 * settled))
    assert (dropped == 0).any()


class Trains(nn.Module):
    """Its argument has the name of one of ours."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        return nn.BatchNorm()(x, use_running_average=not training)


def test_sample_inputs_may_hold_an_argument_called_training() -> None:
    model = Host.init(Trains(), KEYS, X, training=False)
    assert model.training_arguments == {"training": True}
    chosen = Host.init(Trains(), KEYS, X, training=True)
    assert_trees_equal(model(X, training=True), chosen(X, True))


def test_an_argument_called_training_is_no_choice_of_the_mode() -> None:
    variables = Trains().init(KEYS, X, False)
    model = Host(Trains(), variables, X, training=False)
    assert model.training_arguments == {"training": True}
