"""Published Linen models, at a small size.

    flaxlift check examples.published_models:resnet examples.published_models:bert

The models are those of Hugging Face transformers, built from a configuration with random weights:
nothing is downloaded. The first two run on real input: the images are handwritten digits that
scikit-learn ships, the text is the description that comes with them. `MODELS` names all of them.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

# Before transformers is imported: no hub is asked for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import transformers
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


def albert() -> nnx_bridge.Case:
    """An encoder whose layers share their parameters."""
    return _encoder("albert", "Albert", embedding_size=16)


def roberta() -> nnx_bridge.Case:
    """An encoder."""
    return _encoder("roberta", "Roberta", head_mask=None)


def electra() -> nnx_bridge.Case:
    """An encoder whose embeddings are narrower than its layers."""
    return _encoder("electra", "Electra", embedding_size=16)


def big_bird() -> nnx_bridge.Case:
    """An encoder."""
    return _encoder("big_bird", "BigBird", head_mask=None, attention_type="original_full")


def distilbert() -> nnx_bridge.Case:
    """An encoder of its own make."""
    config = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    inputs = {"input_ids": _tokens(), "attention_mask": _mask()}
    return _case("distilbert", "DistilBert", config, inputs)


def gpt2() -> nnx_bridge.Case:
    """A decoder."""
    return _decoder("gpt2", "GPT2", n_embd=32, n_layer=2, n_head=2, n_positions=32)


def gpt_neo() -> nnx_bridge.Case:
    """A decoder with local and global attention."""
    attention = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    return _decoder("gpt_neo", "GPTNeo", num_layers=2, num_heads=2, hidden_size=32, **attention)


def gptj() -> nnx_bridge.Case:
    """A decoder with rotary positions."""
    return _decoder("gptj", "GPTJ", n_embd=32, n_layer=2, n_head=2, n_positions=32, rotary_dim=8)


def bloom() -> nnx_bridge.Case:
    """A decoder with positions in its attention."""
    config = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    return _case("bloom", "Bloom", config, {"input_ids": _tokens(), "attention_mask": _mask()})


def llama() -> nnx_bridge.Case:
    """A decoder with rotary positions and gated layers."""
    return _decoder("llama", "Llama", **_GATED)


def mistral() -> nnx_bridge.Case:
    """A decoder whose queries share keys and values."""
    return _decoder("mistral", "Mistral", num_key_value_heads=1, sliding_window=4, **_GATED)


def gemma() -> nnx_bridge.Case:
    """A decoder with scaled embeddings."""
    return _decoder("gemma", "Gemma", num_key_value_heads=1, head_dim=16, **_GATED)


def opt() -> nnx_bridge.Case:
    """A decoder with learned positions."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    return _decoder("opt", "OPT", **sizes, **layers)


def bart() -> nnx_bridge.Case:
    """An encoder and a decoder with one embedding."""
    return _translator("bart", "Bart")


def mbart() -> nnx_bridge.Case:
    """An encoder and a decoder, normalised before each layer."""
    return _translator("mbart", "MBart")


def marian() -> nnx_bridge.Case:
    """A translator with fixed positions."""
    return _translator("marian", "Marian", pad_token_id=0, decoder_start_token_id=0)


def t5() -> nnx_bridge.Case:
    """An encoder and a decoder with relative positions."""
    return _case("t5", "T5", _T5, _pair())


def longt5() -> nnx_bridge.Case:
    """T5 with attention to blocks."""
    local = {"local_radius": 4, "global_block_size": 4, "encoder_attention_type": "local"}
    return _case("longt5", "LongT5", {**_T5, **local}, _pair())


def vit() -> nnx_bridge.Case:
    """A transformer of image patches."""
    return _image("vit", "ViT")


def beit() -> nnx_bridge.Case:
    """A transformer of image patches with relative positions."""
    return _image("beit", "Beit", use_relative_position_bias=True)


def dinov2() -> nnx_bridge.Case:
    """A transformer of image patches with scaled layers."""
    return _image("dinov2", "Dinov2", mlp_ratio=2)


def regnet() -> nnx_bridge.Case:
    """A convolutional network with grouped convolutions, whose batch statistics move."""
    config = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
    return _case("regnet", "RegNet", {**config, "groups_width": 8}, {"pixel_values": _images()})


def clip() -> nnx_bridge.Case:
    """A transformer of images beside one of text."""
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {"vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 1}
    image = {"num_channels": 1, "image_size": 16, "patch_size": 8}
    config = {
        "text_config": {**layers, **text, "num_hidden_layers": 2},
        "vision_config": {**layers, **image, "num_hidden_layers": 2},
        "projection_dim": 16,
    }
    inputs = {"input_ids": _tokens(), "pixel_values": _images(), "attention_mask": _mask()}
    return _case("clip", "CLIP", config, {**inputs, "position_ids": _positions()})


def wav2vec2() -> nnx_bridge.Case:
    """A transformer of sound."""
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4)}
    config = {
        **_LAYERS,
        **convolutions,
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    }
    sound = np.sin(np.arange(2 * 400, dtype=np.float32)).reshape(2, 400)
    return _case("wav2vec2", "Wav2Vec2", config, {"input_values": sound})


def whisper() -> nnx_bridge.Case:
    """A transformer from sound to text."""
    config = {**_TRANSLATOR, "num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0}
    sound = np.cos(np.arange(2 * 8 * 32, dtype=np.float32)).reshape(2, 8, 32)
    inputs = {"input_features": sound, "decoder_input_ids": _tokens()}
    positions = {"decoder_attention_mask": _mask(), "decoder_position_ids": _positions()}
    config |= {"max_target_positions": 32, "decoder_start_token_id": 1}
    return _case("whisper", "Whisper", config, {**inputs, **positions})


MODELS: dict[str, Callable[[], nnx_bridge.Case]] = {
    factory.__name__: factory
    for factory in (
        *(resnet, bert, albert, roberta, electra, big_bird, distilbert, gpt2, gpt_neo, gptj),
        *(bloom, llama, mistral, gemma, opt, bart, mbart, marian, t5, longt5, vit, beit, dinov2),
        *(regnet, clip, wav2vec2, whisper),
    )
}

_LAYERS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
_GATED = {**_LAYERS, "max_position_embeddings": 32}
_TRANSLATOR = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}


def _case(
    package: str, name: str, config: dict[str, Any], inputs: dict[str, Any]
) -> nnx_bridge.Case:
    """A model of transformers in training mode."""
    models = importlib.import_module(f"transformers.models.{package}.modeling_flax_{package}")
    module = getattr(models, f"Flax{name}Module")
    settings = getattr(transformers, f"{name}Config")(**config)
    return nnx_bridge.Case(module(settings), (), {**inputs, "deterministic": False}, name=name)


def _encoder(package: str, name: str, **config: Any) -> nnx_bridge.Case:
    inputs = {"input_ids": _tokens(), "attention_mask": _mask(), "position_ids": _positions()}
    inputs["token_type_ids"] = np.zeros_like(_tokens())
    if "head_mask" in config:
        inputs["head_mask"] = config.pop("head_mask")
    return _case(package, name, {**_LAYERS, "max_position_embeddings": 32, **config}, inputs)


def _decoder(package: str, name: str, **config: Any) -> nnx_bridge.Case:
    inputs = {"input_ids": _tokens(), "attention_mask": _mask(), "position_ids": _positions()}
    return _case(package, name, {"vocab_size": 64, **config}, inputs)


def _translator(package: str, name: str, **config: Any) -> nnx_bridge.Case:
    positions = {"position_ids": _positions(), "decoder_position_ids": _positions()}
    sizes = {**_TRANSLATOR, "max_position_embeddings": 32}
    return _case(package, name, {**sizes, **config}, {**_pair(), **positions})


def _image(package: str, name: str, **config: Any) -> nnx_bridge.Case:
    sizes = {"image_size": 16, "patch_size": 8, "num_channels": 1}
    return _case(package, name, {**_LAYERS, **sizes, **config}, {"pixel_values": _images()})


def _pair() -> dict[str, Any]:
    inputs = {"input_ids": _tokens(), "attention_mask": _mask()}
    return {**inputs, "decoder_input_ids": _tokens(), "decoder_attention_mask": _mask()}


def _tokens() -> np.ndarray:
    return np.arange(2 * 12, dtype=np.int32).reshape(2, 12) * 7 % 61 + 2


def _mask() -> np.ndarray:
    return (np.arange(12) < np.array([[12], [9]])).astype(np.int32)


def _positions() -> np.ndarray:
    return np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))


def _images() -> np.ndarray:
    return np.sin(np.arange(2 * 16 * 16, dtype=np.float32)).reshape(2, 16, 16, 1)
