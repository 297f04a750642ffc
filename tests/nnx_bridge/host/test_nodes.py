"""Nodes of hosted models show their Linen modules and run them as the model would."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import treescope
from flax import errors, nnx
from flax import linen as nn

import lifted
import nnx_bridge
from nnx_bridge import Host
from tests.helpers import assert_trees_equal, strict
from tests.nnx_bridge.host.models import KEYS, Names, Net, Scanned, X


def hosted(module: nn.Module | None = None) -> Host:
    return Host.init(module or Net(), KEYS, X)


def test_each_level_shows_class_and_fields_of_its_module() -> None:
    model = hosted()
    shown = {path: type(node).__name__ for path, node in nnx.iter_modules(model)}
    assert shown[()] == "Net"
    assert shown[("encoder",)] == "Encoder"
    assert shown[("encoder", "Dense_0")] == shown[("layers_1",)] == shown[("named_a",)] == "Dense"
    assert model.encoder.width == 4 and model.encoder.Dense_0.use_bias is True
    assert "encoder=Encoder(" in repr(model) and "width=4" in repr(model)
    assert "embed=<the module embed>" in repr(model.encoder)


def test_treescope_shows_the_fields_of_each_level() -> None:
    model = hosted()
    model.layers_1 = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    shown = treescope.render_to_text(model)
    assert re.search(r"encoder=Encoder\(.*\n\s+embed=Reference\(path=.*\n\s+width=4,", shown)
    assert "layers_1=Linear(kernel=Param(" in shown
    assert vars(model.encoder).keys() & {"embed", "width"} == set()


def test_a_module_in_a_field_is_shown_once() -> None:
    class Holds(nn.Module):
        inner: nn.Module

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x)

    model = hosted(Holds(nn.Dense(4)))
    for shown in (repr(model), treescope.render_to_text(model)):
        assert shown.count("inner=") == 1 and "features=4" in shown


def test_without_inputs_the_modules_of_setup_are_known() -> None:
    module, variables = nnx_bridge.unhost(hosted())
    model = Host(module, variables)
    assert type(model.encoder).__name__ == "Encoder"
    assert_trees_equal(model.layers_0(X), hosted().layers_0(X))


def test_the_modules_of_compact_are_known_after_a_call() -> None:
    model = Host(*nnx_bridge.unhost(hosted()))
    with pytest.raises(ValueError, match="encoder/Dense_0: .* not known yet.* sample inputs"):
        model.encoder.Dense_0(X)
    assert "Dense_0=Node(" in repr(model.encoder)
    model(X)
    assert_trees_equal(model.encoder.Dense_0(X), hosted().encoder.Dense_0(X))
    assert model.encoder.Dense_0.features == 4
    assert "Dense_0=Dense(" in repr(model.encoder)
    assert "Dense_0=Dense(" in treescope.render_to_text(model.encoder)


def test_the_modules_of_compact_are_replaced_before_a_call() -> None:
    model, native = Host(*nnx_bridge.unhost(hosted())), nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model.encoder.Dense_0 = native
    assert_trees_equal(model.encode(X), native(model.embed(X)))
    assert model.encoder.Dense_0.kernel is native.kernel


@pytest.mark.parametrize("x", [X, jax.ShapeDtypeStruct(X.shape, X.dtype)])
def test_with_sample_inputs_all_modules_are_known(x: Any) -> None:
    module, variables = nnx_bridge.unhost(hosted())
    with strict():
        model = Host(module, variables, x, True, rngs=KEYS)
    assert nnx.graphdef(model) == nnx.graphdef(hosted())
    assert model.encoder.Dropout_0.rate == 0.5
    assert_trees_equal(model.encoder.Dense_0(X), hosted().encoder.Dense_0(X))
    other = Host(module, variables, x=x, method="encode", rngs=KEYS)
    assert type(other.encoder.Dense_0).__name__ == "Dense"


def test_sample_inputs_of_a_model_that_writes_its_parameters() -> None:
    class Doubles(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            w = self.variable("params", "w", jnp.ones, 4)
            w.value *= 2
            return x * w.value

    variables = {"params": {"w": jnp.ones(4)}}
    assert_trees_equal(Host(Doubles(), variables, X, mutable=True)(X), 2 * X)
    with pytest.raises(errors.ModifyScopeVariableError, match="params"):
        Host(Doubles(), variables, X)


def test_variables_that_do_not_fit_the_sample_inputs() -> None:
    module, variables = nnx_bridge.unhost(hosted())
    variables["params"]["encoder"].pop("Dense_0")
    with pytest.raises(errors.FlaxError, match="/encoder/Dense_0") as error:
        Host(module, variables, X)
    assert "missing: params/encoder/Dense_0/kernel" in "".join(error.value.__notes__)


@pytest.mark.parametrize("train", [False, True])
def test_a_node_draws_and_shares_as_inside_of_the_model(train: bool) -> None:
    model = hosted()
    module, variables = nnx_bridge.unhost(model)
    encode = lambda module, x: module.encoder(x, train)  # noqa: E731
    expected = module.apply(variables, X, method=encode, rngs=KEYS)
    with strict():
        assert_trees_equal(model.encoder(X, train, rngs=KEYS), expected)
    assert_trees_equal(model.encode(X, train, rngs=KEYS), expected)


def test_a_node_takes_keys_from_the_streams_of_its_host() -> None:
    model, same = hosted(), hosted()
    first = model.encoder(X, True)
    assert_trees_equal(first, same.encode(X, True))
    assert not jnp.array_equal(first, model.encoder(X, True))


def test_a_node_updates_its_statistics_in_its_host() -> None:
    model = hosted()
    model.norm(X, use_running_average=False)
    assert nnx_bridge.unhost(model)[1]["batch_stats"]["norm"]["mean"].any()


def test_any_method_of_a_node_is_called() -> None:
    class Tied(nn.Module):
        def setup(self) -> None:
            self.embed = nn.Embed(7, 4)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.embed.attend(self.embed(tokens))

    tokens = jnp.array([1, 2])
    model = Host.init(Tied(), KEYS, tokens)
    assert_trees_equal(model.embed.attend(model.embed(tokens)), model(tokens))


def test_a_node_without_its_host_says_what_it_lacks() -> None:
    encoder = nnx.clone(hosted().encoder)
    with pytest.raises(ValueError, match=r"encoder was given the module at embed.*model.encoder"):
        encoder(X)


def test_a_node_of_stacked_layers_says_why_it_cannot_be_called() -> None:
    with pytest.raises(errors.ScopeParamShapeError, match="/layers") as error:
        hosted(Scanned()).layers(X)
    assert "layers was called by itself" in "".join(error.value.__notes__)


def test_a_module_whose_fields_are_traced_says_which() -> None:
    class Scale(nn.Module):
        by: Any

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.by * self.param("w", nn.initializers.ones, ())

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Scale(x.mean())(x)

    with strict():
        model = nnx.jit(lambda: Host.init(Outer(), KEYS, X))()
    with pytest.raises(ValueError, match="Scale_0: Scale cannot be called by itself.* by are made"):
        model.Scale_0(X)
    assert_trees_equal(model(X), Outer().apply(nnx_bridge.unhost(model)[1], X))


def test_copies_are_equal_and_share_nothing() -> None:
    model = hosted()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        assert type(other) is type(model)
        assert nnx.graphdef(other) == nnx.graphdef(model)
        assert_trees_equal(other.encoder(X, True, rngs=KEYS), model.encoder(X, True, rngs=KEYS))
        other.embed.kernel[...] = jnp.zeros((4, 4))
    assert model.embed.kernel.get_value().any()


def test_two_hosts_of_one_model_share_a_compilation() -> None:
    traced = []

    @nnx.jit
    def run(model: Host) -> jax.Array:
        traced.append(1)
        return model.encoder(X)

    assert_trees_equal(run(hosted()), run(hosted()))
    assert len(traced) == 1


def test_names_of_nnx_are_reached_by_their_linen_names() -> None:
    model = hosted(Names())
    module, variables = nnx_bridge.unhost(model)
    assert_trees_equal(variables, Names().init(KEYS, X))
    assert_trees_equal(model(X), module.apply(variables, X))
    assert model["train"] is model.train_ and callable(type(model).train)
    assert_trees_equal(model["sow"](X), X @ variables["params"]["sow"]["kernel"])
    model.eval()
    assert model.split.features == 4


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    model = hosted()
    with pytest.raises(AttributeError, match="hosted Net has no .* 'encodr'; did you mean 'enc"):
        model.encodr  # noqa: B018
    with pytest.raises(KeyError, match="Net has no 'embd'; did you mean 'embed'"):
        model["embd"]
    with pytest.raises(AttributeError, match="'width' is a field of the Linen module encoder"):
        model.encoder.width = 8
    with pytest.raises(TypeError, match="a node of a hosted model, cannot be iterated over"):
        iter(model)


def test_a_scope_that_is_shared_has_one_node() -> None:
    class Low(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x) + self.param("low", nn.initializers.ones, (4,))

    class Shares(nn.Module):
        def setup(self) -> None:
            self.block = Low(nn.Dense(4))
            nn.share_scope(self, self.block)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.block(x)

    model = hosted(Shares())
    module, variables = nnx_bridge.unhost(model)
    assert set(variables["params"]) == {"inner", "low"}
    assert_trees_equal(model(X), module.apply(variables, X))
    assert_trees_equal(model.inner(X), X @ variables["params"]["inner"]["kernel"])


def test_user_interceptors_see_the_modules_of_a_host() -> None:
    seen = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(context.module.path)
        return call(*args, **kwargs)

    model = hosted()
    with nn.intercept_methods(note):
        model(X)
    assert ("encoder", "Dense_0") in seen


def test_nodes_inside_of_transforms() -> None:
    model = hosted()
    expected = jax.grad(lambda x: model.encoder(x).sum())(X)
    with strict():
        actual = lifted.grad(lambda model, x: model.encoder(x).sum(), model, X)[0]
        nnx.jit(lambda model, x: model.encoder(x, True))(model, X)
    assert_trees_equal(actual, expected)


def test_a_vmapped_host() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    models = nnx.vmap(lambda key: Host.init(Scanned(), key, X))(keys)
    outputs = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, X)
    assert outputs.shape == (3, 2, 4)
    assert models.layers.Dense_0.kernel.shape == (3, 3, 4, 4)
    assert models.layers.BatchNorm_0.mean.get_value().any()


def test_sharded_initialisation() -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("model",))
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = nn.Dense(16, kernel_init=init)
    abstract = nnx.eval_shape(lambda: Host.init(module, jax.random.key(0), X))
    assert abstract.kernel.get_value() == jax.ShapeDtypeStruct((4, 16), jnp.float32)
    specs = jax.tree.map(
        lambda v: jax.NamedSharding(mesh, jax.P(*(v.get_metadata().get("out_sharding") or ()))),
        nnx.state(abstract),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    graphdef = nnx.graphdef(abstract)
    make = jax.jit(lambda: nnx.state(Host.init(module, jax.random.key(0), X)), out_shardings=specs)
    model = nnx.merge(graphdef, make())
    kernel = model.kernel.get_value()
    assert kernel.sharding.spec == jax.P(None, "model")
    expected = module.init(jax.random.key(0), X)["params"]["kernel"].value
    assert_trees_equal(jax.device_get(kernel), jax.device_get(expected))


class Described(nn.Module):
    """Has properties: of its fields, of its variables, and of its submodules."""

    width: int = 4
    kind = "described"

    def setup(self) -> None:
        self.first, self.second = nn.Dense(self.width), nn.Dense(4)

    @property
    def double(self) -> int:
        return 2 * self.width

    @property
    def layers(self) -> list[nn.Module]:
        return [self.first, self.second]

    @property
    def norm(self) -> jax.Array:
        return jnp.linalg.norm(self.first.variables["params"]["kernel"])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Describes(nn.Module):
    def setup(self) -> None:
        self.inner = Described()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x)


def test_properties_and_constants_of_the_class_are_those_of_its_modules() -> None:
    node = hosted(Describes()).inner
    assert node.double == 8 and node.kind == "described"
    node.first.kernel[...] = 2 * node.first.kernel[...]
    assert_trees_equal(node.norm, jnp.linalg.norm(node.first.kernel[...]))


def test_modules_in_a_property_are_nodes() -> None:
    node = hosted(Describes()).inner
    first, second = node.layers
    assert first is node.first and second is node.second


class Applies(nn.Module):
    fn: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fn(nn.Dense(4)(x))


class GivesFunctions(nn.Module):
    """Gives a method of its own, and a function with a value of the call, to submodules."""

    def setup(self) -> None:
        self.dense = nn.Dense(4)
        self.of_method = Applies(self.twice)

    def twice(self, x: jax.Array) -> jax.Array:
        return 2 * self.dense(x)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scaled = functools.partial(jnp.multiply, x.mean())
        return Applies(scaled, name="of_partial")(self.of_method(x))


@pytest.mark.parametrize("name", ["of_method", "of_partial"])
def test_a_field_that_holds_a_part_of_the_call_is_not_used_in_another_call(name: str) -> None:
    module = GivesFunctions()
    model = Host(module, module.init(KEYS, X), X)
    assert_trees_equal(model(X), module.apply(nnx_bridge.unhost(model)[1], X))
    with pytest.raises(ValueError, match=f"{name}: Applies cannot be called by itself, .* fn are"):
        model[name](X)


class Decodes(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(1, decode=True, name="attention")(x)


def test_sample_inputs_may_be_those_of_init_where_a_call_takes_others() -> None:
    whole, module = jnp.ones((1, 3, 4)), Decodes()
    variables = module.init(KEYS, whole)
    model = Host(module, variables, whole)
    assert model.attention.decode and model.attention.query.features == (1, 4)
    step = whole[:, :1]
    assert_trees_equal(model(step), module.apply(variables, step, mutable=["cache"])[0])
