"""Small shapes, models, tokenizers, encoders and runs that tests share."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer

from mlembed import config
from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.modeling.transformer import Transformer

WORDS = ["Wednesday, May 4, 2050", "mercredi 4 mai 2050", "বুধবার, ৪ মে, ২০৫০", "one two three"]


def tiny_shape(**changes: Any) -> config.Model:
    """Return a shape of two layers of width 32 for 300 tokens, with `changes`."""
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
    }
    return config.Model(**shape | changes)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give a model weights of a trained model's size, and return it in evaluation mode.

    At the initial 0.02 attention is uniform and every layer nearly the identity, and norms of
    weight 1 hide which norm is used.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise if "embed_tokens" in name else noise * weight.shape[1] ** -0.5)
    return model.eval()


def tiny_model(seed: int = 0, **changes: Any) -> Transformer:
    """Return a model of `tiny_shape(**changes)` with random weights, in evaluation mode."""
    return random_model(tiny_shape(**changes), seed)


def tiny_tokenizer(texts: Iterable[str] = WORDS, size: int = 300) -> Tokenizer:
    """Return a byte-level tokenizer that was trained on `texts`."""
    return tokenizer.train(texts, size)


def tiny_encoder(tokens: Tokenizer | None = None, max_length: int = 24, **changes: Any) -> Encoder:
    """Return an encoder with random weights, its table as large as its tokenizer needs."""
    tokens = tokens or tiny_tokenizer()
    shape = {"vocab_size": tokens.get_vocab_size()} | changes
    return Encoder(tiny_model(**shape), tokens, max_length)


def tiny_run(shape: dict[str, Any] | None = None, **changes: Any) -> config.Run:
    """Return a run of `tiny_shape(**shape)`, with `changes` to the run's own fields."""
    return config.Run(model=tiny_shape(**shape or {}), **changes)


def odd_shape(style: str = "qwen3", **changes: Any) -> config.Model:
    """Return a small shape in which no two sizes are equal, of either style, with `changes`.

    The vocabulary and the MLP's width are primes; Qwen3's heads together are wider than the model.
    """
    shape: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 37,
        "rope_theta": 700.0,
        "max_position_embeddings": 64,
    }
    if style == "bert":
        shape |= {"style": "bert", "num_key_value_heads": 4, "head_dim": 6, "causal": False}
        shape |= {"pooling": "pooler", "layer_norm_eps": 1e-3, "type_vocab_size": 3}
    return config.Model(**shape | changes)


def random_model(shape: config.Model, seed: int = 0) -> Transformer:
    """Return a model of `shape` with random weights, in evaluation mode."""
    model = randomise(Transformer(shape), seed)
    assert isinstance(model, Transformer)
    return model


def assert_same_model(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Compare the shapes of two models, if they are ours, and their weights bit for bit."""
    assert getattr(one, "cfg", None) == getattr(other, "cfg", None)
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
