"""The undocumented parts of Flax NNX that `nnx_bridge` uses do what it relies on.

A failure here means that Flax changed; what else fails then is a consequence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nnx_bridge import _flax_private
from tests.nnx_bridge import models


def test_flatten_lists_the_variables_themselves_each_once() -> None:
    mdl = models.make(models.Shared)
    _, paths, leaves, _ = _flax_private.flatten(mdl)
    assert paths == sorted(paths)
    assert {id(leaf) for leaf in leaves} == {
        id(mdl.first.kernel),
        id(mdl.first.bias),
        id(mdl.tied.bias),
    }


def test_flatten_of_a_tuple_puts_the_place_first() -> None:
    shared = nnx.Param(jnp.ones(3))
    _, paths, leaves, _ = _flax_private.flatten((models.make(models.MLP), shared, shared))
    assert paths[-1] == (1,)
    assert leaves[-1] is shared
    assert {path[0] for path in paths} == {0, 1}


def test_flatten_takes_bare_arrays_and_cycles() -> None:
    mdl = models.make(models.Cyclic)
    mdl.buffer = nnx.data(jnp.ones(3))
    _, paths, leaves, _ = _flax_private.flatten(mdl)
    assert leaves[paths.index(("buffer",))] is mdl.buffer


def test_unflatten_uses_the_given_variables_in_new_modules() -> None:
    mdl = models.make(models.Cyclic)
    graphdef, _, leaves, _ = _flax_private.flatten(mdl)
    copy, nodes = _flax_private.unflatten(graphdef, leaves)
    assert copy.child.kernel is mdl.child.kernel
    assert copy.child is not mdl.child
    assert copy.child.parent is copy
    assert {id(copy), id(copy.child)} <= set(map(id, nodes.values()))


def test_the_nodes_of_unflatten_include_lists_and_dicts_of_nnx() -> None:
    graphdef, _, leaves, _ = _flax_private.flatten(models.make(models.Containers))
    copy, nodes = _flax_private.unflatten(graphdef, leaves)
    assert {id(copy.items), id(copy.named), id(copy.chain)} <= set(map(id, nodes.values()))


def test_a_changed_copy_brings_the_original_to_its_state() -> None:
    mdl = models.make(models.MLP)
    first, second, kernel = mdl.first, mdl.second, mdl.second.kernel
    graphdef, _, leaves, indices = _flax_private.flatten(mdl)
    originals = list(_flax_private.Nodes.from_refmap(indices).values())
    copy, nodes = _flax_private.unflatten(graphdef, jax.tree.map(lambda x: x, leaves))
    copy.first, copy.second = copy.second, copy.first
    copy.first.extra = nnx.Param(jnp.ones(3))
    copy.calls = 1
    del copy.second.bias
    _, _, after, _ = _flax_private.flatten(copy)
    definition = _flax_private.flatten_copy(copy, list(nodes.values()))
    _flax_private.update_graph(definition, after, originals, [])
    assert (mdl.first, mdl.second, mdl.calls) == (second, first, 1)
    assert mdl.first.kernel is kernel
    assert mdl.first.extra is copy.first.extra  # The leaves themselves are used.
    assert not hasattr(mdl.second, "bias")


def test_the_definition_of_a_graph_is_hashable_and_equal_for_equal_graphs() -> None:
    first, second = (_flax_private.flatten(models.make(models.MLP))[0] for _ in range(2))
    assert (first, hash(first)) == (second, hash(second))
    assert first != _flax_private.flatten(models.make(models.Norm))[0]


def test_nodes_of_the_graph_mode() -> None:
    class NoPytree(nnx.Module, pytree=False):
        pass

    for node in (NoPytree(), nnx.Param(1.0), jax.new_ref(jnp.ones(2))):
        assert _flax_private.is_graph_node(node)
    for leaf in (jnp.ones(2), 1.0, "name"):
        assert not _flax_private.is_graph_node(leaf)


def test_metadata_are_compared_as_nnx_gives_them_out() -> None:
    a, b, c = (nnx.Param(jnp.ones(2), unit=unit) for unit in ("m", "m", "s"))
    for other in (b, c):
        same = a.get_metadata() == other.get_metadata()
        assert _flax_private.same_metadata(a, other) == same
    assert not _flax_private.same_metadata(a, c)


def test_attributes_leave_out_the_books_of_nnx() -> None:
    assert set(_flax_private.attributes(vars(models.make(models.MLP)))) == {"first", "second"}
    mdl = models.make(models.Containers)
    assert _flax_private.attributes(vars(mdl.items))["0"] is mdl.items[0]
    assert _flax_private.attributes(vars(mdl.named))["a"] is mdl.named["a"]


def test_attributes_are_those_that_can_be_written() -> None:
    """`nnx_bridge.functional._hidden` takes attributes from `vars` and puts them back."""
    mdl = models.make(models.Containers)
    kernel = vars(mdl.items[0]).pop("kernel")
    assert not hasattr(mdl.items[0], "kernel")
    vars(mdl.items[0])["kernel"] = kernel
    assert mdl.items[0].kernel is kernel


def test_the_stream_of_rng_state() -> None:
    rngs = nnx.Rngs(0, noise=1)
    assert _flax_private.rng_stream(rngs.noise.key) == "noise"
    assert _flax_private.rng_stream(rngs.noise.count) == "noise"
    assert _flax_private.rng_stream(rngs.default.key) == "default"
    assert _flax_private.rng_stream(nnx.Param(1.0)) is None
    forked = rngs.fork()
    assert _flax_private.rng_stream(forked.noise.count) == "noise"


class Sower(nnx.Module):
    def __call__(self, x: Any) -> Any:
        self.sow(nnx.Intermediate, "x", x)
        return self.perturb("y", x)


def _context() -> tuple[nnx.Variable[Any], nnx.Variable[Any]]:
    return nnx.Intermediate({}), nnx.Perturbation({})


def test_sow_and_perturb_find_the_variables_of_a_context() -> None:
    mdl, (sown, perturbed) = Sower(), _context()
    with _flax_private.captures(mdl, (sown, perturbed)):
        mdl(3.0)
    assert sown.get_raw_value() == {"x": (3.0,)}
    assert set(perturbed.get_raw_value()) == {"y"}


def test_a_context_ends_when_it_raises() -> None:
    mdl = Sower()
    with pytest.raises(RuntimeError), _flax_private.captures(mdl, _context()):
        raise RuntimeError
    assert not _flax_private.attributes(vars(mdl))


def test_an_inner_context_leaves_other_types_to_the_outer_one() -> None:
    mdl, (sown, perturbed), inner = Sower(), _context(), nnx.Intermediate({})
    with _flax_private.captures(mdl, (sown, perturbed)):
        with _flax_private.captures(mdl, (inner,)):
            mdl(3.0)
        mdl(4.0)
    assert inner.get_raw_value() == {"x": (3.0,)}
    assert sown.get_raw_value() == {"x": (4.0,)}
    assert set(perturbed.get_raw_value()) == {"y"}


def test_a_context_is_that_of_flax() -> None:
    def inside(mdl: Sower) -> Any:
        return [type(v) for v in vars(mdl)["__captures__"]]

    mdl = Sower()
    types, _ = nnx.capture(inside, nnx.Intermediate)(mdl)
    assert types == [nnx.Intermediate]


def test_a_write_in_another_trace_is_an_error() -> None:
    """`publish` finds out before it writes anything, by writing what is there already."""
    variable = nnx.Param(jnp.ones(3))

    def write(x: jax.Array) -> jax.Array:
        variable.set_raw_value(variable.get_raw_value())
        return x

    with pytest.raises(Exception, match="different trace level"):
        jax.jit(write)(1.0)


def test_a_variable_takes_value_and_metadata_of_another() -> None:
    variable, other = nnx.Param(jnp.zeros(3)), nnx.Param(jnp.ones(3), unit="m")
    variable.update_from_state(other)
    assert variable.get_raw_value() is other.get_raw_value()
    assert variable.unit == "m"


def test_a_variable_that_jax_takes_apart_and_puts_together_is_a_new_one() -> None:
    variable = nnx.Param(jnp.ones(3), unit="m")
    copy = jax.tree.map(lambda x: x, variable)
    assert copy is not variable
    assert copy.get_raw_value() is variable.get_raw_value()
    assert copy.unit == "m"


def test_the_state_is_that_of_the_transform_in_progress() -> None:
    seen = [_flax_private.trace_state()]

    def fn(x: jax.Array) -> jax.Array:
        seen.append(_flax_private.trace_state())
        return 2 * x

    for transform in (jax.jit, jax.grad, jax.vmap):
        transform(fn)(jnp.ones(3) if transform is jax.vmap else 1.0)
    outside, *inside = seen
    assert outside == _flax_private.trace_state()
    assert all(state != outside for state in inside)


def test_captures_of_lists_stand_nowhere_but_among_the_items() -> None:
    """In Flax 0.12.8; where no longer, `captures_of_lists` has nothing to do."""

    def paths(mdl: Any) -> Any:
        return set(_flax_private.captures_of_lists(_flax_private.flatten(mdl)[1]))

    found, _ = nnx.capture(paths, nnx.Intermediate)(models.make(models.Encoder))
    assert {path[:2] for path in found} <= {("blocks", "__captures__")}
    assert not paths(models.make(models.Encoder))


def test_what_is_captured_is_told_from_other_variables_by_its_path() -> None:
    mdl = models.make(models.MLP)
    with _flax_private.captures(mdl.first, [nnx.Intermediate({"y": jnp.ones(2)})]):
        _, paths, leaves, _ = _flax_private.flatten(mdl)
    captured = [x for path, x in zip(paths, leaves, strict=True) if _flax_private.is_captured(path)]
    assert [type(x) for x in captured] == [nnx.Intermediate]


def test_what_is_captured_is_set_found_and_removed() -> None:
    mdl, kept = Sower(), _context()
    assert _flax_private.captured(mdl) is None
    _flax_private.set_captured(mdl, kept)
    assert _flax_private.captured(mdl) == kept
    mdl(3.0)
    assert kept[0].get_raw_value() == {"x": (3.0,)}
    _flax_private.set_captured(mdl, None)
    assert _flax_private.captured(mdl) is None
    _flax_private.set_captured(mdl, None)  # Nothing to remove is no error.


def test_an_attribute_is_shown_where_the_representation_yields_it() -> None:
    class Shown(nnx.Module):
        def __nnx_repr__(self) -> Any:
            shown = super().__nnx_repr__()
            next(shown)
            yield _flax_private.shown_class(nnx.Linear)
            yield _flax_private.shown_attribute("features", (3, "wide"))
            yield from shown

    mdl = Shown()
    mdl.width = 5
    text = repr(mdl)
    assert text.startswith("Linear(")
    assert text.index("features=(3, 'wide')") < text.index("width=5")


def test_nnx_keeps_its_books_in_the_vars_of_a_module() -> None:
    mdl = models.make(models.MLP)
    kept = {name for name in vars(mdl) if _flax_private.is_bookkeeping(name)}
    assert kept
    assert set(_flax_private.attributes(vars(mdl))) == set(vars(mdl)) - kept == {"first", "second"}
