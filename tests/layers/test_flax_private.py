"""What we know of Flax's private parts must still be so."""

from flax import nnx

from layers._flax_private import node_attributes


def test_bookkeeping_of_a_node_has_the_prefix_we_know():
    class Module(nnx.Module):
        def __init__(self):
            self.a, self._b = 1, 2

    module = Module()
    assert node_attributes(module) == {"a": 1, "_b": 2}
    assert set(vars(module)) - {"a", "_b"}, "Flax keeps no bookkeeping here any more: simplify"
