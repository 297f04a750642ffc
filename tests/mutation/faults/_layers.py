"""Faults of the layers."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "kept weights are scaled by the rate that was asked for",
        "layers/_drop.py",
        "scale = 1.0 / bits.probability(rate)",
        "scale = 1.0",
        "tests/layers/test_drop.py::test_values_are_the_mask_times_the_scale",
    ),
    Fault(
        "out_sharding is ignored",
        "layers/_linear.py",
        '("out_sharding", out_sharding),',
        '("out_sharding", None),',
        "tests/layers/test_sharding.py::test_out_sharding_is_that_of_nnx_linear",
    ),
    Fault(
        "the argument does not override the attribute deterministic",
        "layers/_base.py",
        "        if deterministic is None:\n            deterministic = self.deterministic\n",
        "        deterministic = self.deterministic\n",
        "tests/layers/test_linear.py::test_it_computes_as_nnx_linear_with_the_masked_kernel",
    ),
    Fault(
        "the two words of a block are one",
        "layers/_generators.py",
        "pair = pair | ((odd < threshold)",
        "pair = pair | ((even < threshold)",
        "tests/layers/test_generators.py::test_the_masks_of_a_key_do_not_change_between_releases",
    ),
    Fault(
        "bernoulli keeps by 24 bits",
        "layers/_generators.py",
        "((high ^ low) >> jnp.uint32(9))",
        "((high ^ low) >> jnp.uint32(8))",
        "tests/layers/test_generators.py::test_bernoulli_has_exactly_jaxs_bits",
    ),
    Fault(
        "blocks of rows begin at the first row",
        "layers/_per_example.py",
        "first_rows = (jnp.arange(together) * count + index) * size",
        "first_rows = (jnp.arange(together) * count) * size",
        "tests/layers/test_per_example.py::test_each_example_has_the_mask_of_its_index",
    ),
    Fault(
        "examples that are taken together share a mask",
        "layers/_per_example.py",
        "indices = jnp.arange(count)\n",
        "indices = jnp.arange(count) // together\n",
        "tests/layers/test_per_example.py"
        "::test_examples_that_are_taken_together_have_the_masks_of_their_indices",
    ),
    Fault(
        "a sharded batch is taken example by example",
        "layers/_per_example.py",
        "together = math.gcd(count, devices) or 1",
        "together = 1",
        "tests/layers/test_sharding.py::test_masks_per_example_move_what_a_plain_layer_moves",
    ),
    Fault(
        "a sharded kernel is taken block by block",
        "layers/_per_example.py",
        "together = math.gcd(rows // ROWS, devices)",
        "together = 1",
        "tests/layers/test_sharding.py::test_masks_per_example_move_what_a_plain_layer_moves",
    ),
    Fault(
        "half precision is summed in half precision",
        "layers/_per_example.py",
        "total = jnp.zeros_like(like, dtype=wide_dtype(like.dtype))",
        "total = jnp.zeros_like(like, dtype=like.dtype)",
        "tests/layers/test_per_example.py::test_blocks_of_half_precision_are_rounded_once",
    ),
    Fault(
        "the variance of the moments is without the scale",
        "layers/_gaussian.py",
        "(1.0 - keep) / keep * squares",
        "(1.0 - keep) * squares",
        "tests/layers/test_inference.py::test_the_moments_are_those_of_all_masks",
    ),
    Fault(
        "a Gaussian draw is repeated",
        "layers/_gaussian.py",
        "jax.random.fold_in(key, index), mean.shape",
        "key, mean.shape",
        "tests/layers/test_inference.py::test_the_expected_relu_is_that_of_the_gaussian",
    ),
    Fault(
        "samples beyond the last count",
        "layers/_monte_carlo.py",
        "indices < num_samples)",
        "indices >= 0)",
        "tests/layers/test_inference.py::test_samples_do_not_depend_on_the_batch_size",
    ),
    Fault(
        "the variance of chunks leaves out that of their means",
        "layers/_monte_carlo.py",
        " + jnp.abs(delta) ** 2 * weight",
        "",
        "tests/layers/test_inference.py::test_samples_do_not_depend_on_the_batch_size",
    ),
    Fault(
        "the model of the caller is switched on",
        "layers/_monte_carlo.py",
        "    model = nnx.clone(model)\n",
        "",
        "tests/layers/test_inference.py::test_the_model_is_not_touched",
    ),
    Fault(
        "the first layer is replaced too",
        "layers/_replace.py",
        "kept = keep_first and not rows",
        "kept = False",
        "tests/layers/test_replace.py"
        "::test_every_linear_layer_but_the_first_is_replaced_in_every_container",
    ),
    Fault(
        "a layer that occurs twice is replaced by two",
        "layers/_replace.py",
        "        if id(node) in done:\n            return done[id(node)]\n",
        "",
        "tests/layers/test_replace.py::test_a_layer_that_occurs_twice_is_replaced_by_one_object",
    ),
    Fault(
        "the original is written",
        "layers/_replace.py",
        "new_model = _rebuild(nnx.clone(model, variables=not share), model, replace, modules)",
        "new_model = _rebuild(model, model, replace, modules)",
        "tests/layers/test_replace.py::test_the_original_is_left_alone",
    ),
    Fault(
        "weights of one shape share a mask",
        "layers/_select.py",
        "jax.random.fold_in(key, zlib.crc32(_spelled(path)))",
        "key",
        "tests/layers/test_weight_drop.py::test_weights_of_one_shape_have_masks_of_their_own",
    ),
    Fault(
        "biases are dropped too",
        "layers/_select.py",
        "and path[-1] not in _NOT_WEIGHTS",
        "",
        "tests/layers/test_weight_drop.py::test_every_layer_computes_with_its_masked_weights",
    ),
    Fault(
        "what a wrapped layer writes is lost",
        "layers/_weight_drop.py",
        "                    setattr(original, name, value)\n",
        "                    pass\n",
        "tests/layers/test_weight_drop.py"
        "::test_attributes_that_a_call_creates_reach_the_base_layer",
    ),
    Fault(
        "masks of a layer move the stream of the caller",
        "layers/_keys.py",
        "return stream_of(rngs, collection).fork()",
        "return stream_of(rngs, collection)",
        "tests/layers/test_keys.py::test_a_stream_is_forked_not_shared",
    ),
    Fault(
        "the derivative of the inputs is left out in the kernel",
        "layers/_pallas.py",
        "return outputs, t_outputs + inputs @",
        "return outputs, inputs @",
        "tests/layers/test_pallas.py::test_first_and_second_derivatives_equal_the_plain_form",
    ),
    Fault(
        "half precision is scaled in half precision",
        "layers/_drop.py",
        "return (kept.astype(wide_dtype(weight.dtype)) * scale).astype(weight.dtype)",
        "return kept * jnp.asarray(scale, weight.dtype)",
        "tests/layers/test_drop.py::test_half_precision_is_scaled_without_a_common_bias",
    ),
]
