"""Two published Linen models, at a small size and on real input.

    flaxlift check examples.published_models:resnet examples.published_models:bert

The models are those of Hugging Face transformers, built from a configuration with random weights:
nothing is downloaded. The images are handwritten digits that scikit-learn ships, the text is the
description that comes with them.
"""

import os

# Before transformers is imported: no hub is asked for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from sklearn.datasets import load_digits
from transformers import BertConfig, ResNetConfig
from transformers.models.bert.modeling_flax_bert import FlaxBertModule
from transformers.models.resnet.modeling_flax_resnet import FlaxResNetModule

import nnx_bridge


def resnet() -> nnx_bridge.Case:
    """A residual network in training mode, whose batch statistics move, on digits."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[2, 2, 2],
        layer_type="basic",
    )
    images = load_digits().images[:16].astype(np.float32) / 16
    # 8 x 8 pixels are few for a network that halves the image five times.
    pixel_values = np.kron(images, np.ones((4, 4), np.float32))[..., None]
    return nnx_bridge.Case(
        FlaxResNetModule(config), (pixel_values,), {"deterministic": False}, name="ResNet"
    )


def bert() -> nnx_bridge.Case:
    """An encoder in training mode, with dropout, on text in bytes."""
    config = BertConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    text = load_digits().DESCR.encode()
    tokens = np.frombuffer(text[: 8 * 64], np.uint8).reshape(8, 64).astype(np.int32)
    # The sentences end at different places.
    attention_mask = (np.arange(64) < np.linspace(24, 64, 8)[:, None]).astype(np.int32)
    position_ids = np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape)
    return nnx_bridge.Case(
        FlaxBertModule(config),
        (tokens, attention_mask, np.zeros_like(tokens), position_ids, None),
        {"deterministic": False},
        name="BERT",
    )
