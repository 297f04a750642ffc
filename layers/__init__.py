"""DropConnect for Flax.

Layers, a wrapper for any module, whole-model replacement, inference and Monte-Carlo prediction, all
over one mechanism (`drop_weight`).  `layers.linen` holds the Linen twins.
"""

from layers import linen as linen
from layers._base import DropConnectModule as DropConnectModule
from layers._drop import drop_weight as drop_weight
from layers._drop import keep_mask as keep_mask
from layers._drop import keep_probability as keep_probability
from layers._gaussian import gaussian_moments as gaussian_moments
from layers._gaussian import gaussian_predict as gaussian_predict
from layers._linear import DropConnectLinear as DropConnectLinear
from layers._monte_carlo import Prediction as Prediction
from layers._monte_carlo import mc_predict as mc_predict
from layers._pallas import fused_product as fused_product
from layers._per_example import map_examples as map_examples
from layers._replace import DropConnectSummary as DropConnectSummary
from layers._replace import Replacement as Replacement
from layers._replace import dropconnect as dropconnect
from layers._replace import remove_dropconnect as remove_dropconnect
from layers._select import hidden_to_hidden as hidden_to_hidden
from layers._select import is_weight as is_weight
from layers._weight_drop import WeightDrop as WeightDrop
from layers._weight_drop import drop_weights as drop_weights
