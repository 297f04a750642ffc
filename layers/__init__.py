"""DropConnect for Flax."""

from layers._base import DropConnectModule as DropConnectModule
from layers._drop import drop_weight as drop_weight
from layers._drop import keep_mask as keep_mask
from layers._drop import keep_probability as keep_probability
from layers._linear import DropConnectLinear as DropConnectLinear
from layers._per_example import map_examples as map_examples
from layers._select import hidden_to_hidden as hidden_to_hidden
from layers._select import is_weight as is_weight
from layers._weight_drop import WeightDrop as WeightDrop
from layers._weight_drop import drop_weights as drop_weights
