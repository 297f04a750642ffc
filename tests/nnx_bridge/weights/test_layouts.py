"""Layouts are pairs of inverse functions, on arrays of every kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnx_bridge.weights import Absent, Concatenate, Copy, Custom, Reshape, Row, Stacked, Transpose
from nnx_bridge.weights._layout_json import layout_from_json, layout_to_json
from tests.helpers import assert_trees_equal


def rolled(by: int) -> Any:
    return lambda arrays: [jnp.roll(array, by, 0) for array in arrays]


ROLL = Custom("roll", rolled(1), rolled(-1))
LAYOUTS = [
    (Copy(), [(3, 4)]),
    (Transpose((2, 0, 1)), [(2, 3, 4)]),
    (Reshape((2, 3, 4), (2, 12)), [(2, 3, 4)]),
    (Concatenate((2, 3, 1)), [(4, 2), (4, 3), (4, 1)]),
    (Concatenate((2, 3), axis=0), [(2, 4), (3, 4)]),
    (ROLL, [(3, 2)]),
    (Stacked(Transpose(), 3, linen_axis=1), [(2, 3, 4)]),
    (Stacked(Copy(), 3, linen_axis=1, nnx_axis=0), [(2, 3, 4)]),
    (Stacked(Stacked(Concatenate((2, 1)), 2, nnx_axis=-1), 2, nnx_axis=0), [(4, 2), (4, 1)] * 4),
    (Stacked(Reshape((2, 3), (6,)), 2), [(2, 3)] * 2),
]
ids = [str(layout) or "copy" for layout, _ in LAYOUTS]


def arrays(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    return [np.arange(np.prod(s), dtype=np.float32).reshape(s) + i for i, s in enumerate(shapes)]


@pytest.mark.parametrize(("layout", "shapes"), LAYOUTS, ids=ids)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_the_way_back_is_the_inverse(layout: Any, shapes: Any, kind: Any) -> None:
    values = [kind(x) for x in arrays(shapes)]
    assert_trees_equal(layout.to_linen(layout.to_nnx(values)), values)


@pytest.mark.parametrize(("layout", "shapes"), LAYOUTS, ids=ids)
def test_what_is_described_is_described_as_it_is_computed(layout: Any, shapes: Any) -> None:
    values = arrays(shapes)
    described = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in values]
    computed = layout.to_nnx(values)
    assert [(x.shape, x.dtype) for x in layout.to_nnx(described)] == [
        (x.shape, x.dtype) for x in computed
    ]


@pytest.mark.parametrize(("layout", "shapes"), LAYOUTS, ids=ids)
@given(count=st.integers(1, 3), linen=st.booleans(), axis=st.integers(0, 2))
def test_rows_of_stacks_are_inverses_too(
    layout: Any, shapes: Any, count: int, linen: bool, axis: int
) -> None:
    axis = min(axis, len(shapes[0]))
    layers = [[x + 10 * i for x in arrays(shapes)] for i in range(count)]
    results = [layout.to_nnx(layer) for layer in layers]
    width = len(results[0])
    linen_paths = [("params", str(i)) for i in range(len(shapes) * (1 if linen else count))]
    nnx_paths = [(str(i),) for i in range(width * (count if linen else 1))]
    axes = {"linen_axis": axis} if linen else {"nnx_axis": min(axis, results[0][0].ndim)}
    row = Row(tuple(linen_paths), tuple(nnx_paths), Stacked(layout, count, **axes))
    if linen:
        values = [np.stack(same, axis) for same in zip(*layers, strict=True)]
        expected = [x for result in results for x in result]
    else:
        values = [x for layer in layers for x in layer]
        expected = [np.stack(same, axes["nnx_axis"]) for same in zip(*results, strict=True)]
    converted = row.to_nnx(values)
    for got, want in zip(converted, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(row.to_linen(converted), values, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("layout", "shapes"), LAYOUTS, ids=ids)
def test_layouts_are_plain_data(layout: Any, shapes: Any) -> None:
    assert layout_from_json(layout_to_json(layout)) == layout


def test_a_custom_layout_that_was_not_made_is_named() -> None:
    with pytest.raises(ValueError, match=r"uses the layout 'rol'; make it first.*'roll'"):
        layout_from_json({"kind": "custom", "name": "rol"})


def test_an_unknown_kind_of_layout_is_named() -> None:
    with pytest.raises(ValueError, match="unknown kind of layout 'transposed'; did you mean 'tran"):
        layout_from_json({"kind": "transposed"})


def test_shapes_of_different_sizes_are_no_reshape() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(5,\) have different sizes"):
        Reshape((2, 3), (5,))


@pytest.mark.parametrize(
    ("axis", "shapes", "message"),
    [
        (0, [(6, 2)], r"a stack of 3 along axis 0, got \(6, 2\)"),
        (2, [(3, 2)], r"a stack of 3 along axis 2, got \(3, 2\)"),
        (None, [(2,)] * 4, "4 arrays are not those of 3 equal layers"),
    ],
)
def test_another_number_of_layers_is_an_error(axis: Any, shapes: Any, message: str) -> None:
    arrays = [np.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        Stacked(count=3, linen_axis=axis).to_nnx(arrays)
    with pytest.raises(ValueError, match=message):
        Stacked(count=3, nnx_axis=axis).to_linen(arrays)


def test_a_fused_array_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected length 5 along axis -1.*got float32\[3,4\]"):
        Concatenate((2, 3)).to_linen([np.ones((3, 4), np.float32)])


def test_what_is_absent_must_be_zero_and_comes_back_as_zeros() -> None:
    absent = Absent((2,), "bfloat16", "there is no place for it")
    assert absent.to_nnx([jnp.zeros(2, jnp.bfloat16)]) == []
    assert absent.to_linen([])[0].dtype == jnp.bfloat16
    for bad in (1.0, np.nan):
        with pytest.raises(ValueError, match="expected zeros, .* there is no place for it"):
            absent.to_nnx([jnp.full(2, bad)])


def test_the_places_of_masked_arrays_stay_masked() -> None:
    import optax

    row = Row((("params", "a"), ("params", "b")), (("c",),), Concatenate((2, 3)))
    masked = optax.MaskedNode()
    assert row.to_nnx([masked, masked]) == [masked]
    assert row.to_linen([masked]) == [masked, masked]
    with pytest.raises(ValueError, match="or none of them an array, got MaskedNode"):
        row.to_nnx([masked, np.ones(3)])
