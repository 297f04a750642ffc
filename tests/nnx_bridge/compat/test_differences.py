"""The table of differences says what the installed flax does: every row is executed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import compat
from nnx_bridge.compat import DIFFERENCES, Difference, difference
from nnx_bridge.compat._markdown import markdown
from tests.helpers import KEY, assert_trees_equal, initialized, normal

BF16 = jnp.bfloat16
ROWS = [row for row in DIFFERENCES if row.holds_for(flax.__version__)]
LAYERS = {row.linen: row for row in ROWS if row.kind == "layer"}
X, X4 = normal(2, 3), normal(2, 4, 4, 6)


# --- The table is complete.


def public_classes() -> list[str]:
    layers = {n for n, x in vars(nn).items() if inspect.isclass(x) and issubclass(x, nn.Module)}
    return sorted({*layers, "BatchApply"})


@pytest.mark.parametrize("name", public_classes())
def test_every_layer_of_linen_has_one_row(name: str) -> None:
    assert [row.linen for row in ROWS].count(name) == 1


def test_every_function_of_linen_that_nnx_does_not_have_has_a_row() -> None:
    functions = {
        name
        for name, x in vars(nn).items()
        if not name.startswith("_") and callable(x) and not inspect.isclass(x)
    }
    covered = {row.linen for row in ROWS}
    assert functions - covered - set(vars(nnx)) == set()


@pytest.mark.parametrize("name", [n for n in vars(nn.Module) if not n.startswith("_")])
def test_every_method_of_linen_modules_has_a_row(name: str) -> None:
    assert difference(f"Module.{name}").linen == f"Module.{name}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.linen)
def test_the_names_of_a_row_exist(row: Difference) -> None:
    resolve("flax.linen", row.linen)
    if row.nnx is None:
        assert row.verdict == "missing"
        assert row.kind == "api" or not hasattr(nnx, row.linen)
    else:
        assert row.verdict != "missing"
        resolve("flax.nnx", row.nnx)
    if row.compat is not None:
        module, _, name = row.compat.rpartition(".")
        assert resolve(module, name).__doc__
    assert (row.route == "compat") <= (row.compat is not None)


def resolve(module: str, dotted: str) -> Any:
    found = __import__(module, fromlist=["_"])
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


# --- Layers that are equal: the same outputs with copied parameters.


def copied(layer: nnx.Module, variables: Any, renames: dict[str, str] | None = None) -> nnx.Module:
    """The layer with Linen's variables at the same paths, up to renamed parts."""
    for path, variable in nnx.to_flat_state(nnx.state(layer, (nnx.Param, nnx.BatchStat))):
        name = "/".join(map(str, path))
        for part, linen in (renames or {}).items():
            name = name.replace(part, linen)
        value = variables["batch_stats" if isinstance(variable, nnx.BatchStat) else "params"]
        for part in name.split("/"):
            value = value[part]
        variable.set_value(value)
    return layer


GATES = {"if_": "if"}
EQUAL: dict[str, tuple[nn.Module, Any, tuple[Any, ...], dict[str, str]]] = {
    "Dense": (nn.Dense(4), lambda r: nnx.Linear(3, 4, rngs=r), (X,), {}),
    "DenseGeneral": (
        nn.DenseGeneral((2, 2), axis=(-2, -1)),
        lambda r: nnx.LinearGeneral((4, 6), (2, 2), axis=(-2, -1), rngs=r),
        (X4,),
        {},
    ),
    "Einsum": (
        nn.Einsum((3, 4), "...a,ab->...b"),
        lambda r: nnx.Einsum("...a,ab->...b", (3, 4), (4,), rngs=r),
        (X,),
        {},
    ),
    "Conv": (
        nn.Conv(4, (3, 3), strides=2, padding="CIRCULAR", feature_group_count=2),
        lambda r: nnx.Conv(
            6, 4, (3, 3), strides=2, padding="CIRCULAR", feature_group_count=2, rngs=r
        ),
        (X4,),
        {},
    ),
    "ConvTranspose": (
        nn.ConvTranspose(4, (3, 3), strides=(2, 2)),
        lambda r: nnx.ConvTranspose(6, 4, (3, 3), strides=(2, 2), rngs=r),
        (X4,),
        {},
    ),
    "Embed": (
        nn.Embed(5, 3),
        lambda r: nnx.Embed(5, 3, rngs=r),
        (jnp.array([0, 4, 2]),),
        {},
    ),
    "PReLU": (nn.PReLU(), lambda r: nnx.PReLU(), (X,), {}),
    "LSTMCell": (
        nn.LSTMCell(4),
        lambda r: nnx.LSTMCell(3, 4, rngs=r),
        ((normal(2, 4), normal(2, 4, seed=2)), X),
        GATES,
    ),
    "RNN": (
        nn.RNN(nn.LSTMCell(4)),
        lambda r: nnx.RNN(nnx.LSTMCell(3, 4, rngs=r)),
        (normal(2, 5, 3),),
        GATES,
    ),
    "Bidirectional": (
        nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.LSTMCell(4))),
        lambda r: nnx.Bidirectional(
            *(nnx.RNN(nnx.LSTMCell(3, 4, rngs=r)) for _ in range(2)), rngs=False
        ),
        (normal(2, 5, 3),),
        GATES,
    ),
    "Sequential": (
        nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]),
        lambda r: nnx.Sequential(nnx.Linear(3, 4, rngs=r), nnx.relu, nnx.Linear(4, 2, rngs=r)),
        (X,),
        {"layers/0": "layers_0", "layers/2": "layers_2"},
    ),
}
BASE_CLASSES = {"Module", "RNNCellBase"}


def test_every_layer_that_is_equal_is_compared() -> None:
    equal = {name for name, row in LAYERS.items() if row.verdict == "equal"}
    assert equal == EQUAL.keys() | BASE_CLASSES


@pytest.mark.parametrize("name", EQUAL)
def test_a_layer_that_is_equal_gives_the_numbers_of_linen(name: str) -> None:
    linen, make, args, renames = EQUAL[name]
    variables = initialized(linen, *args)
    assert_trees_equal(
        copied(make(nnx.Rngs(0)), variables, renames)(*args), linen.apply(variables, *args)
    )


# --- Layers that differ: at which settings, and how.

_AXES: Any = {"feature_axes": (-2, -1), "reduction_axes": (-2, -1)}
NORMS: dict[str, Any] = {
    "BatchNorm": {"use_running_average": False},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 3},
    "InstanceNorm": {},
}


def both(name: str, x: jax.Array, **fields: Any) -> tuple[jax.Array, jax.Array]:
    """What the layer of NNX and that of Linen give with the same parameters."""
    fields = {**NORMS[name], **fields}
    linen = getattr(nn, name)(**fields)
    variables = initialized(linen, x)
    layer = copied(getattr(nnx, name)(x.shape[-1], **fields, rngs=nnx.Rngs(0)), variables)
    return layer(x), linen.apply(variables, x, mutable=["batch_stats"])[0]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_normalisation_is_equal_in_the_precision_of_the_input(name: str, dtype: Any) -> None:
    assert_trees_equal(*both(name, X4.astype(dtype)))


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_is_equal_where_the_table_says_so(name: str) -> None:
    assert not LAYERS[name].matters({"dtype": jnp.float32, "epsilon": 1e-3})
    assert_trees_equal(*both(name, X4.astype(BF16), dtype=jnp.float32, epsilon=1e-3))


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_rounds_first_in_mixed_precision(name: str) -> None:
    assert LAYERS[name].matters({"dtype": BF16}) == ("dtype",)
    native, linen = both(name, X4 + 1, dtype=BF16)
    assert native.dtype == linen.dtype
    assert not np.array_equal(native, linen)


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_has_no_half_precision_reductions(name: str) -> None:
    assert LAYERS[name].matters({"force_float32_reductions": False})
    with pytest.raises(TypeError, match="force_float32_reductions"):
        getattr(nnx, name)(6, force_float32_reductions=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "InstanceNorm"])
def test_normalisation_has_one_feature_axis(name: str) -> None:
    assert LAYERS[name].matters({"feature_axes": (-2, -1)})
    layer = getattr(nnx, name)(6, feature_axes=(-2, -1), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="cannot reshape"):
        layer(X4)


def test_group_norm_mixes_up_groups_where_places_are_kept_apart() -> None:
    assert LAYERS["GroupNorm"].matters({"reduction_axes": (-1,)})
    native, linen = both("GroupNorm", normal(2, 4, 4, 6), reduction_axes=(-1,))
    assert not jnp.allclose(native, linen, atol=0.1)


def test_batch_norm_promotes_with_its_statistics() -> None:
    assert LAYERS["BatchNorm"].matters({"param_dtype": BF16})
    native, linen = both("BatchNorm", X4.astype(BF16), param_dtype=BF16)
    assert (native.dtype, linen.dtype) == (jnp.float32, BF16)


def test_batch_norm_trains_unless_it_is_told_not_to() -> None:
    assert nnx.BatchNorm(6, rngs=nnx.Rngs(0)).use_running_average is False
    with pytest.raises(ValueError, match='"use_running_average" must be passed'):
        nn.BatchNorm().init(KEY, X)


def test_weight_norm_replaces_the_kernel_and_its_scales_depend_on_the_version() -> None:
    layer = nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    before = layer.layer_instance.kernel[...]
    layer.eval()
    layer(X)
    assert not jnp.allclose(layer.layer_instance.kernel[...], before)
    trained = "scales" in nnx.state(layer, nnx.Param)
    assert trained == ("no Params" not in difference("WeightNorm").what)


def test_spectral_norm_replaces_the_kernel_without_being_asked_to_update() -> None:
    layer = nnx.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    before = layer.layer_instance.kernel[...]
    layer(X, update_stats=False)
    assert not jnp.allclose(layer.layer_instance.kernel[...], before)


def test_attention_rounds_in_other_places() -> None:
    x = normal(2, 5, 8, dtype=BF16)
    linen = nn.MultiHeadDotProductAttention(2, param_dtype=BF16)
    variables = initialized(linen, x)
    layer = nnx.MultiHeadAttention(2, 8, param_dtype=BF16, decode=False, rngs=nnx.Rngs(0))
    native, expected = copied(layer, variables)(x), linen.apply(variables, x)
    assert not np.array_equal(native, expected)
    assert np.allclose(native, expected, atol=0.05)
    assert "force_fp32_for_softmax" not in inspect.signature(nnx.MultiHeadAttention).parameters


def test_dropout_drops_the_same_but_does_so_unless_it_is_told_not_to() -> None:
    linen = nn.Dropout(0.5, deterministic=False).apply({}, X, rng=KEY)
    assert_trees_equal(nnx.Dropout(0.5)(X, rngs=KEY), linen)
    with pytest.raises(ValueError, match='"deterministic" must be passed'):
        nn.Dropout(0.5).apply({}, X, rng=KEY)
    assert len(jax.tree.leaves(nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))) == 2


def orthogonal(kernel: jax.Array) -> bool:
    return bool(jnp.allclose(kernel.T @ kernel, jnp.eye(kernel.shape[-1]), atol=1e-4))


@pytest.mark.parametrize(("name", "gates"), [("GRUCell", 3), ("OptimizedLSTMCell", 4)])
def test_gates_are_initialised_as_one_matrix(name: str, gates: int) -> None:
    cell = getattr(nnx, name)(3, 8, rngs=nnx.Rngs(0))
    each = jnp.split(cell.dense_h.kernel[...], gates, axis=-1)
    linen = getattr(nn, name)(8)
    carry = linen.initialize_carry(KEY, (1, 3))
    params = linen.init(KEY, carry, jnp.ones((1, 3)))["params"]
    assert orthogonal(params["hr" if name == "GRUCell" else "hf"]["kernel"])
    assert not any(map(orthogonal, each))


def test_gru_has_no_bias_of_hn() -> None:
    assert nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)).dense_h.bias is None
    assert compat.GRUCell(3, 4, rngs=nnx.Rngs(0)).hn.bias.shape == (4,)


def test_simple_cell_computes_in_float32() -> None:
    init = {"recurrent_kernel_init": nn.initializers.lecun_normal(), "param_dtype": BF16}
    h, x = normal(2, 4, dtype=BF16), X.astype(BF16)
    assert nnx.SimpleCell(3, 4, **init, rngs=nnx.Rngs(0))(h, x)[1].dtype == jnp.float32
    assert compat.SimpleCell(3, 4, **init, rngs=nnx.Rngs(0))(h, x)[1].dtype == BF16


# --- Transforms and the rest.


@pytest.mark.parametrize("name", ["jvp", "vjp"])
def test_forward_and_reverse_products_of_nnx_refuse_their_default_settings(name: str) -> None:
    tangents = ((X,), (X,)) if name == "jvp" else (X,)
    with pytest.raises(NotImplementedError):
        getattr(nnx, name)(jnp.sin, *tangents)


def test_derivatives_of_nnx_do_not_close_over_modules_that_write() -> None:
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError, match="different trace level"):
        nnx.grad(lambda x: layer(x).sum())(X)
    with pytest.raises(flax.errors.TraceContextError, match="different trace level"):
        nnx.value_and_grad(lambda x: layer(x).sum())(X)


@pytest.mark.parametrize("name", [r.linen for r in ROWS if r.kind == "transform" and r.nnx])
def test_transforms_that_differ_take_other_arguments(name: str) -> None:
    def arguments(fn: Any) -> list[str]:
        return list(inspect.signature(fn).parameters)

    assert arguments(getattr(nn, name)) != arguments(getattr(nnx, difference(name).nnx or ""))


def test_sow_takes_a_variable_type() -> None:
    assert next(iter(list(inspect.signature(nnx.Module.sow).parameters)[1:])) == "variable_type"


# --- Looking rows up.


def test_a_class_is_looked_up_and_so_is_one_that_derives_from_it() -> None:
    class Mine(nn.LayerNorm):
        pass

    assert difference(nn.LayerNorm) is difference("LayerNorm") is difference(Mine)


def test_what_is_not_known_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(KeyError, match="no row for 'LayerNrm'; did you mean 'LayerNorm'"):
        difference("LayerNrm")


def test_a_row_holds_from_one_version_to_another() -> None:
    old, new = [row for row in DIFFERENCES if row.linen == "WeightNorm"]
    assert [old.holds_for(v) for v in ("0.12.8", "0.12.12", "1.0.0")] == [True, False, False]
    assert [new.holds_for(v) for v in ("0.12.8", "0.12.12", "1.0.0")] == [False, True, True]


def test_the_route_of_a_layer_is_native_where_its_settings_do_no_harm() -> None:
    assert difference("LayerNorm").route_for({"dtype": "float32"}) == "native"
    assert difference("LayerNorm").route_for({"dtype": "bfloat16"}) == "compat"
    assert difference("GRUCell").route_for({}) == "compat"
    assert difference("Dense").route_for({"dtype": BF16}) == "native"


# --- The guide.


@pytest.mark.parametrize("kind", ["layer", "transform", "api"])
def test_the_guide_has_the_table(kind: Any) -> None:
    guide = Path(__file__).parents[3] / "docs" / "differences.md"
    # Write it anew with: python -m nnx_bridge.compat._markdown
    assert markdown(kind) in guide.read_text("utf-8")


def test_a_layer_instead_of_its_class_is_an_error() -> None:
    with pytest.raises(TypeError, match="a class, got an instance of GRUCell"):
        compat.difference(nn.GRUCell(3))  # type: ignore[arg-type]
