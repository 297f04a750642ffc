"""DropConnect for Flax.

Layers, a wrapper for any module, whole-model replacement, inference and Monte-Carlo prediction, all
over one mechanism (`drop_weight`).  `layers.linen` holds the Linen twins.
"""

from layers import linen
from layers._base import DropConnectModule
from layers._drop import drop_weight, keep_mask, keep_probability
from layers._gaussian import gaussian_moments, gaussian_predict
from layers._linear import DropConnectLinear
from layers._monte_carlo import Prediction, mc_predict
from layers._pallas import fused_product
from layers._per_example import map_examples
from layers._replace import (
    DropConnectSummary,
    Replacement,
    dropconnect,
    remove_dropconnect,
)
from layers._select import hidden_to_hidden, is_weight
from layers._weight_drop import WeightDrop, drop_weights

__all__ = [
    "DropConnectLinear",
    "DropConnectModule",
    "DropConnectSummary",
    "Prediction",
    "Replacement",
    "WeightDrop",
    "drop_weight",
    "drop_weights",
    "dropconnect",
    "fused_product",
    "gaussian_moments",
    "gaussian_predict",
    "hidden_to_hidden",
    "is_weight",
    "keep_mask",
    "keep_probability",
    "linen",
    "map_examples",
    "mc_predict",
    "remove_dropconnect",
]
