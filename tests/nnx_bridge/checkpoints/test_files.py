"""Files of flax.serialization and weights of Hugging Face, read, written, damaged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.flax import save_file

from nnx_bridge import CheckpointError, convert, load_checkpoint
from nnx_bridge.checkpoints import _msgpack, describe
from nnx_bridge.checkpoints._entries import loaded, nested
from nnx_bridge.checkpoints._msgpack import MsgpackReader
from tests.helpers import assert_trees_equal, normal
from tests.nnx_bridge.checkpoints.files import save
from tests.nnx_bridge.checkpoints.models import initial, native, nnx_optimizer

PARAMS = {"kernel": normal(2, 3), "bias": normal(3, dtype=jnp.bfloat16)}


class Tiny(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.zeros((2, 3)))
        self.bias = nnx.Param(jnp.zeros(3, jnp.bfloat16))


def test_a_train_state_in_msgpack_goes_to_nnx_and_back_to_the_letter(tmp_path: Path) -> None:
    state = initial().replace(dropout_key=jax.random.PRNGKey(5))
    file = tmp_path / "checkpoint_7"
    file.write_bytes(serialization.to_bytes(state))
    convert(file, tmp_path / "nnx")
    model = native()
    optimizer = nnx_optimizer(model)
    load_checkpoint(tmp_path / "nnx", model, optimizer)
    assert_trees_equal(model.Dense_0.kernel[...], state.params["Dense_0"]["kernel"])
    convert(tmp_path / "nnx", tmp_path / "back.msgpack")
    back = serialization.from_bytes(state, (tmp_path / "back.msgpack").read_bytes())
    assert_trees_equal(back, state)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_weights_of_hugging_face_are_found_in_their_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    if name.endswith(".msgpack"):
        (folder / name).write_bytes(serialization.to_bytes(PARAMS))
    else:
        save_file(PARAMS, folder / name, metadata={"format": "flax"})
    done = convert(folder, tmp_path / "nnx")
    assert (done.source_layout, done.arrays) == ("params", 2)
    model = Tiny()
    load_checkpoint(tmp_path / "nnx", model)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model)), PARAMS)
    convert(tmp_path / "nnx", tmp_path / name)
    back = tmp_path / name
    if name.endswith(".msgpack"):
        assert_trees_equal(serialization.msgpack_restore(back.read_bytes()), PARAMS)
    else:
        assert back.read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("optimized", [False, True])
def test_safetensors_that_would_leave_something_behind_are_not_written(
    optimized: bool, tmp_path: Path
) -> None:
    dense, norm = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    state: Any = nnx.state(nnx.Dict(dense=dense, norm=norm))
    if optimized:
        state = {"model": nnx.state(dense), "optimizer": nnx.state(nnx_optimizer(dense))}
    save(tmp_path / "nnx", state)
    left = "opt_state/1/0/count" if optimized else "batch_stats/norm/mean"
    with pytest.raises(CheckpointError, match=f"keeps parameters alone; there is also .*{left}"):
        convert(tmp_path / "nnx", tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()


def test_weights_in_several_files_are_put_together(tmp_path: Path) -> None:
    tree = {"layer": {"0": PARAMS, "1": {"kernel": normal(2, 2)}}}
    flat = flatten_dict(tree, sep="/")
    weights = {}
    for i, (key, value) in enumerate(flat.items()):
        name = f"flax_model-{i}.msgpack"
        shard = unflatten_dict({key: value}, sep="/")
        (tmp_path / name).write_bytes(serialization.to_bytes(shard))
        weights[key] = name
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    assert convert(tmp_path, tmp_path.with_name(f"{tmp_path.name}-nnx")).arrays == 3
    (tmp_path / "flax_model-1.msgpack").unlink()
    with pytest.raises(CheckpointError, match="names flax_model-1.msgpack, which is not beside it"):
        convert(tmp_path, tmp_path.with_name(f"{tmp_path.name}-2"))


def test_weights_of_pytorch_are_named(tmp_path: Path) -> None:
    save_file(PARAMS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="another framework.*'pt'.*from_pt=True"):
        convert(tmp_path / "model.safetensors", tmp_path / "nnx")


def test_arrays_that_flax_cuts_into_pieces_are_whole_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    tree = {"w": np.arange(30, dtype=np.float32).reshape(5, 6), "b": np.ones(2)}
    (tmp_path / "x").write_bytes(serialization.msgpack_serialize(tree))
    entries = MsgpackReader(tmp_path / "x").entries
    assert_trees_equal(nested({p: loaded(leaf) for p, leaf in entries.items()}), tree)


_leaves = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(max_size=40),
    st.builds(complex, st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from(["float32", "bfloat16", "int8", "uint32", "bool", "complex64"]).flatmap(
        lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(
            lambda shape: np.ones(shape, jnp.dtype(dtype))
        )
    ),
)
_trees = st.recursive(
    st.dictionaries(st.text(max_size=34), _leaves, max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=20),
)


@given(_trees)
def test_every_file_of_flax_reads_as_flax_reads_it(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    file = tmp_path_factory.mktemp("any") / "x"
    file.write_bytes(serialization.msgpack_serialize(tree))
    got = nested({p: loaded(leaf) for p, leaf in MsgpackReader(file).entries.items()})
    want = serialization.msgpack_restore(file.read_bytes())
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)
    copy = file.with_name("copy")
    _msgpack.write_msgpack(copy, MsgpackReader(file).entries, lambda *_: None)
    assert copy.read_bytes() == file.read_bytes() or not tree


def test_a_typed_key_is_written_as_its_integers(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.ones(2)}, "step": 1, "dropout_key": jax.random.key(7)}
    save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx")
    convert(tmp_path / "nnx", tmp_path / "back.msgpack")
    back = serialization.msgpack_restore((tmp_path / "back.msgpack").read_bytes())
    assert_trees_equal(back, {**state, "dropout_key": jax.random.key_data(jax.random.key(7))})


def test_a_file_that_ends_early_is_named_wherever_it_ends(tmp_path: Path) -> None:
    data = serialization.to_bytes(
        {"params": PARAMS, "opt_state": optax.sgd(0.1, 0.9).init(PARAMS), "step": 3}
    )
    file = tmp_path / "x"
    for end in range(len(data)):
        file.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=str(file)):
            MsgpackReader(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow its end"):
        MsgpackReader(file)


def test_a_flipped_byte_is_named_or_changes_one_array_alone(tmp_path: Path) -> None:
    # The format has no checksums: what is inside an array cannot be told from other numbers.
    tree = {"params": {"kernel": np.ones((2, 3), np.float32)}, "step": np.int32(1)}
    data = serialization.to_bytes(tree)
    file = tmp_path / "x"
    named = 0
    for i in range(len(data)):
        file.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            entries = MsgpackReader(file).entries
            for leaf in entries.values():
                loaded(leaf)
        except CheckpointError as error:
            assert str(file) in str(error)
            named += 1
    assert named > len(data) / 3


@pytest.mark.parametrize("end", [0, 4, 30, 100])
def test_a_damaged_safetensors_file_is_named(end: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(PARAMS, file)
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(CheckpointError, match="damaged"):
        convert(file, tmp_path / "nnx")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="notes.txt is neither .* begins with the byte 0x6e"):
        convert(file, tmp_path / "nnx")
    with pytest.raises(CheckpointError, match="is no checkpoint of Orbax or Flax; it holds notes"):
        convert(tmp_path, tmp_path.with_name(f"{tmp_path.name}-nnx"))
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "nnx")


def test_a_description_lists_arrays_and_numbers_without_reading_them(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(serialization.to_bytes({"params": PARAMS, "step": 3, "opt_state": {}}))
    found = describe(file)
    assert (found.where, found.format, found.layout) == (file, "msgpack", "train_state")
    arrays = {array.path: (array.shape, array.dtype, array.nbytes) for array in found.arrays}
    assert arrays == {
        ("params", "kernel"): ((2, 3), "float32", 24),
        ("params", "bias"): ((3,), "bfloat16", 6),
    }
    assert found.others == ((("step",), 3),) and found.nbytes == 30
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    shown = console.export_text()
    assert "params/bias" in shown and "bfloat16[3]" in shown and "train_state" in shown
    with pytest.raises(CheckpointError, match="does not exist"):
        describe(tmp_path / "nowhere")
