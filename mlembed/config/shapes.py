"""Shapes of published models, by name."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .model import Model


def _qwen3(width: int, layers: int, ffn: int, heads: int = 16, ranks: Sequence[int] = ()) -> Model:
    """Return a shape of Qwen3: causal, pooled at EOS."""
    return Model(
        vocab_size=151_936,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=ffn,
        rope_theta=1e6,
        max_position_embeddings=40_960,
        ranks=tuple(ranks),
    )


def _bert(vocabulary: int, width: int, layers: int, heads: int, pooling: Any) -> Model:
    """Return a shape of BERT with an MLP of four times its width, 512 positions, two segments."""
    return Model(
        style="bert",
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        intermediate_size=4 * width,
        max_position_embeddings=512,
        causal=False,
        pooling=pooling,
    )


# ML-Embed and F2LLM-v2 (arXiv 2605.15081, 2603.19223): 80m and 160m are the only whole numbers of
# layers and MLP widths that give the published totals with Qwen3-0.6B's heads. The shape behind
# ML-Embed's 140M is not published: ml-embed-140m is ours, the 160m at rank 512. LEALLA
# (arXiv 2302.08387), its teacher LaBSE (2007.01852), and GTE (2308.03281), which pools by mean.
SHAPES: dict[str, Model] = {
    "ml-embed-80m": _qwen3(320, 8, 2048),
    "ml-embed-140m": _qwen3(640, 9, 1536, ranks=(64, 128, 256, 512)),
    "ml-embed-160m": _qwen3(640, 9, 1536),
    "ml-embed-330m": _qwen3(896, 16, 2560),
    "ml-embed-0.6b": _qwen3(1024, 28, 3072),
    "ml-embed-1.7b": _qwen3(2048, 28, 6144),
    "ml-embed-4b": _qwen3(2560, 36, 9728, heads=32),
    "ml-embed-8b": _qwen3(4096, 36, 12_288, heads=32),
    "lealla-small": _bert(501_153, 128, 24, 8, "pooler"),
    "lealla-base": _bert(501_153, 192, 24, 12, "pooler"),
    "lealla-large": _bert(501_153, 256, 24, 8, "pooler"),
    "labse": _bert(501_153, 768, 12, 12, "pooler"),
    "multilingual-e5-small": _bert(250_037, 384, 12, 12, "mean"),
    "gte-small": _bert(30_522, 384, 12, 12, "mean"),
    "gte-base": _bert(30_522, 768, 12, 12, "mean"),
    "gte-large": _bert(30_522, 1024, 24, 16, "mean"),
}


def nested(source: Model) -> Model:
    """Return the shape of a trained model, nested to make it elastic; all numbers are ours.

    Exits at each quarter of the depth, which end with the last sixth of the layers; prefixes of an
    eighth, a quarter, a half and all of the width; ranks of a sixth, a third and two thirds of it,
    if the vocabulary has more than a quarter of the parameters.
    """
    D, L, heads = source.hidden_size, source.num_hidden_layers, source.num_attention_heads
    exits = tuple(sorted({-(-L * k // 4) for k in (1, 2, 3, 4)}))
    products = 3 if source.style == "qwen3" else 2
    attention = 2 * (heads + source.num_key_value_heads) * source.head_dim
    layers = L * D * (attention + products * source.intermediate_size)
    vocabulary = source.vocab_size * D
    large = vocabulary > (vocabulary + layers) / 4
    # The kernels' tiles are multiples of 8.
    ranks = sorted({max(1, D * k // 6 // 8 * 8) for k in (1, 2, 4)}) if large else ()
    return replace(
        source,
        exits=exits,
        last_layers=min(round(L / 6), exits[0] - 1),
        matryoshka_dims=tuple(sorted({max(1, D // k) for k in (8, 4, 2, 1)})),
        ranks=tuple(ranks),
    )
