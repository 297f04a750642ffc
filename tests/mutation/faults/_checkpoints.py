"""Faults of checkpoints."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "the step of the optimizer stays behind",
        "nnx_bridge/checkpoints/_mapping.py",
        'where[p] = (*optimizer, "step", VALUE)',
        "where[p] = None",
        "tests/nnx_bridge/checkpoints/test_convert.py"
        "::test_every_optimizers_state_restores_in_nnx_and_comes_back_to_the_letter[sgd]",
    ),
    Fault(
        "two leaves may have one place",
        "nnx_bridge/checkpoints/_mapping.py",
        "    _check_unique(where)\n",
        "",
        "tests/nnx_bridge/checkpoints/test_convert.py"
        "::test_two_fields_that_would_be_one_in_nnx_are_an_error",
    ),
    Fault(
        "statistics go among the parameters",
        "nnx_bridge/checkpoints/_mapping.py",
        'if path[-1] in ("mean", "var"):',
        "if False:",
        "tests/nnx_bridge/checkpoints/test_convert.py"
        "::test_a_run_that_began_in_nnx_restores_in_linen[a model]",
    ),
    Fault(
        "what NNX lacks is not named",
        "nnx_bridge/checkpoints/_mapping.py",
        "    if lacking or left:\n",
        "    if left:\n",
        "tests/nnx_bridge/checkpoints/test_convert.py"
        "::test_a_structure_that_does_not_fit_is_an_error_that_lists_what_differs[too much]",
    ),
    Fault(
        "the step comes back as NNX counts it",
        "nnx_bridge/checkpoints/_mapping.py",
        "result[linen.step] = as_step(loaded(result[linen.step]), structure[linen.step])",
        "pass",
        "tests/nnx_bridge/checkpoints/test_convert.py"
        "::test_every_optimizers_state_restores_in_nnx_and_comes_back_to_the_letter[sgd]",
    ),
    Fault(
        "a destination that exists is replaced without being asked",
        "nnx_bridge/checkpoints/_convert.py",
        "if os.path.lexists(destination) and not force:",
        "if False:",
        "tests/nnx_bridge/checkpoints/test_faults.py"
        "::test_a_destination_that_exists_is_not_touched_without_force",
    ),
    Fault(
        "the streams of a model are not put back",
        "nnx_bridge/checkpoints/_convert.py",
        "result.update({_in_model(p, made): leaf for p, leaf in source.apart.items()})",
        "pass",
        "tests/nnx_bridge/checkpoints/test_convert.py"
        "::test_streams_of_an_nnx_model_are_kept_apart_and_come_back",
    ),
    Fault(
        "keys of random numbers are left out",
        "nnx_bridge/checkpoints/_convert.py",
        "            write_orbax(place / RNGS, made.apart, None, advance)\n",
        "            pass\n",
        "tests/nnx_bridge/checkpoints/test_convert.py"
        "::test_keys_of_a_train_state_are_kept_apart_and_come_back",
    ),
    Fault(
        "another shape is filled into the model",
        "nnx_bridge/checkpoints/_places.py",
        "return [] if a == b else [",
        "return [] if True else [",
        "tests/nnx_bridge/checkpoints/test_live.py"
        "::test_what_is_wrong_is_named_and_the_model_stays_as_it_was",
    ),
    Fault(
        "what the model lacks is swallowed",
        "nnx_bridge/checkpoints/_places.py",
        "    if problems:\n        raise CheckpointError",
        "    if False:\n        raise CheckpointError",
        "tests/nnx_bridge/checkpoints/test_live.py"
        "::test_what_is_wrong_is_named_and_the_model_stays_as_it_was",
    ),
    Fault(
        "streams of the model are overwritten",
        "nnx_bridge/checkpoints/_places.py",
        "if not isinstance(variable, nnx.RngState):",
        "if True:",
        "tests/nnx_bridge/checkpoints/test_live.py::test_the_layers_own_streams_are_left_alone",
    ),
    Fault(
        "pieces of an array are put together in the wrong order",
        "nnx_bridge/checkpoints/_msgpack.py",
        'for i in range(len(tree["chunks"]))]',
        'for i in reversed(range(len(tree["chunks"])))]',
        "tests/nnx_bridge/checkpoints/test_files.py"
        "::test_arrays_that_flax_cuts_into_pieces_are_whole_again",
    ),
    Fault(
        "weights of another framework are taken",
        "nnx_bridge/checkpoints/_safetensors.py",
        'if metadata.get("format") in ("pt", "tf", "mlx"):',
        "if False:",
        "tests/nnx_bridge/checkpoints/test_files.py::test_weights_of_pytorch_are_named",
    ),
    Fault(
        "bytes behind the end of a file are passed over",
        "nnx_bridge/checkpoints/_msgpack.py",
        "if end != len(data):",
        "if False:",
        "tests/nnx_bridge/checkpoints/test_files.py"
        "::test_a_file_that_ends_early_is_named_wherever_it_ends",
    ),
]
