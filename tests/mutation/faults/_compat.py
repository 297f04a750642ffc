"""Faults of Linen's layers."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "new statistics count as the old ones",
        "nnx_bridge/compat/_normalization.py",
        "self.momentum * held[...] + (1 - self.momentum) * new",
        "(1 - self.momentum) * held[...] + self.momentum * new",
        "tests/nnx_bridge/compat/test_behaviour.py"
        "::test_batch_norm_keeps_the_statistics_of_linen_over_several_steps",
    ),
    Fault(
        "statistics are not updated",
        "nnx_bridge/compat/_normalization.py",
        "held.set_value(self.momentum * held[...] + (1 - self.momentum) * new)",
        "pass",
        "tests/nnx_bridge/compat/test_behaviour.py"
        "::test_batch_norm_keeps_the_statistics_of_linen_over_several_steps",
    ),
    Fault(
        "statistics over a named axis are those of one device",
        "nnx_bridge/compat/_norm.py",
        "if self.axis_name is None:",
        "if True:",
        "tests/nnx_bridge/compat/test_behaviour.py"
        "::test_statistics_over_a_named_axis_are_those_of_linen",
    ),
    Fault(
        "epsilon is left out",
        "nnx_bridge/compat/_norm.py",
        "factor = lax.rsqrt(var + self.epsilon)",
        "factor = lax.rsqrt(var)",
        "tests/nnx_bridge/compat/test_twins.py"
        "::test_outputs_updates_and_gradients_have_the_program_of_linen[LayerNorm]",
    ),
    Fault(
        "the gates of an LSTM are in another order",
        "nnx_bridge/compat/_recurrent.py",
        "new_c = f * c + i * g",
        "new_c = i * c + f * g",
        "tests/nnx_bridge/compat/test_twins.py"
        "::test_outputs_updates_and_gradients_have_the_program_of_linen[LSTMCell]",
    ),
    Fault(
        "the bias of the hidden state is left out",
        "nnx_bridge/compat/_recurrent.py",
        'layers = {"ir": True, "iz": True, "in": True, "hr": False, "hz": False, "hn": True}',
        'layers = {"ir": True, "iz": True, "in": True, "hr": False, "hz": False, "hn": False}',
        "tests/nnx_bridge/compat/test_twins.py"
        "::test_outputs_updates_and_gradients_have_the_program_of_linen[GRUCell]",
    ),
    Fault(
        "the forget gate of a convolutional LSTM has no bias of one",
        "nnx_bridge/compat/_conv.py",
        "nn.sigmoid(f + 1)",
        "nn.sigmoid(f)",
        "tests/nnx_bridge/compat/test_twins.py"
        "::test_outputs_updates_and_gradients_have_the_program_of_linen[ConvLSTMCell]",
    ),
    Fault(
        "a causal convolution is padded behind",
        "nnx_bridge/compat/_conv.py",
        "(reach[0], 0)",
        "(0, reach[0])",
        "tests/nnx_bridge/compat/test_twins.py"
        "::test_outputs_updates_and_gradients_have_the_program_of_linen[ConvLocal, causal]",
    ),
    Fault(
        "the cache does not move on",
        "nnx_bridge/compat/_attention.py",
        "        self.cache_index.set_value(index + 1)\n",
        "",
        "tests/nnx_bridge/compat/test_behaviour.py"
        "::test_decoding_step_by_step_writes_the_cache_of_linen",
    ),
    Fault(
        "steps that are not written yet are attended to",
        "nnx_bridge/compat/_attention.py",
        "jnp.arange(length) <= index",
        "jnp.arange(length) >= 0",
        "tests/nnx_bridge/compat/test_behaviour.py"
        "::test_decoding_step_by_step_writes_the_cache_of_linen",
    ),
    Fault(
        "weights are normalised over the features",
        "nnx_bridge/compat/_reparametrized.py",
        "reduced = tuple(axis for axis in range(weight.ndim) if axis not in features)",
        "reduced = features",
        "tests/nnx_bridge/compat/test_twins.py"
        "::test_outputs_updates_and_gradients_have_the_program_of_linen[WeightNorm]",
    ),
    Fault(
        "what a layer inside writes is lost",
        "nnx_bridge/compat/_reparametrized.py",
        "        functional.publish(updates)\n",
        "",
        "tests/nnx_bridge/compat/test_behaviour.py::test_what_the_layer_inside_writes_is_kept",
    ),
    Fault(
        "estimates are kept though they are not asked for",
        "nnx_bridge/compat/_reparametrized.py",
        "        if update_stats:\n",
        "        if True:\n",
        "tests/nnx_bridge/compat/test_twins.py"
        "::test_outputs_updates_and_gradients_have_the_program_of_linen[SpectralNorm, no "
        "update]",
    ),
    Fault(
        "a setting that makes a difference is passed over",
        "nnx_bridge/compat/_difference.py",
        "if name in fields and not any(_same(fields[name], value) for value in values)",
        "if False",
        "tests/nnx_bridge/compat/test_differences.py"
        "::test_the_route_of_a_layer_is_native_where_its_settings_do_no_harm",
    ),
]
