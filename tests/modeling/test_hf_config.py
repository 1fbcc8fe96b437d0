"""Numbers of parameters of the named shapes, against published ones and counts of models."""

from dataclasses import replace

import pytest
import torch

from mlembed.config.shapes import SHAPES
from mlembed.modeling.transformer import Transformer, num_parameters
from mlembed_kernels.attention.attention import WIDTHS

# Published totals.
TOTALS = {
    "ml-embed-80m": 80_084_288,
    "ml-embed-160m": 159_185_024,
    "ml-embed-330m": 334_349_184,
    "ml-embed-0.6b": 596_049_920,
    "ml-embed-1.7b": 1_720_574_976,
    "ml-embed-4b": 4_022_468_096,
    "ml-embed-8b": 7_568_405_504,
    "lealla-small": 68_988_672,
    "lealla-base": 107_034_240,
    "lealla-large": 147_447_296,
    "labse": 470_926_848,
}
# Millions, with a vocabulary of rank r instead of the table.
NESTED = [
    ("lealla-small", 64, 36.9),
    ("lealla-small", 32, 20.9),
    ("lealla-base", 96, 58.9),
    ("lealla-base", 64, 42.9),
    ("lealla-large", 128, 83.3),
    ("lealla-large", 64, 51.2),
]
# (exit, rank) of 0.6b -> millions.
GRID = {(1, None): 171.3, (1, 512): 94.0, (8, 256): 165.0, (16, 128): 271.3, (28, 64): 450.3}


def counted(model) -> int:
    """Return the number of parameters of a model without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(model).parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_formula_equals_count(name):
    assert counted(SHAPES[name]) == num_parameters(SHAPES[name])


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name):
    assert num_parameters(SHAPES[name]) == TOTALS[name]


def test_fields_without_parameters():
    """Fields from the config.json of Qwen3-0.6B and of LaBSE."""
    qwen3, labse = SHAPES["ml-embed-0.6b"], SHAPES["labse"]
    assert (qwen3.rope_theta, qwen3.max_position_embeddings, qwen3.causal) == (1e6, 40_960, True)
    heads = [(s.num_attention_heads, s.num_key_value_heads, s.head_dim) for s in (qwen3, labse)]
    assert heads == [(16, 8, 128), (12, 12, 64)]
    assert (labse.max_position_embeddings, labse.causal, labse.pooling) == (512, False, "pooler")


@pytest.mark.parametrize(
    ("name", "millions"), [("gte-small", 33.4), ("gte-base", 109.5), ("gte-large", 335.1)]
)
def test_gte_has_no_pooler(name, millions):
    """Its totals are BERT's: 33.4 million by BERT's formula for the small one, published as 30; the
    others are bert-base and bert-large, published as 110 and 330.
    """
    model, D = SHAPES[name], SHAPES[name].hidden_size
    with_pooler = replace(model, pooling="pooler")
    assert round(num_parameters(with_pooler) / 1e6, 1) == millions
    assert num_parameters(with_pooler) - num_parameters(model) == D * D + D
    assert counted(with_pooler) == num_parameters(with_pooler)


@pytest.mark.parametrize(("name", "rank", "millions"), NESTED)
def test_lealla_with_a_nested_vocabulary(name, rank, millions):
    model = replace(SHAPES[name], ranks=(rank,))
    assert round(num_parameters(model) / 1e6, 1) == millions
    assert counted(model) == num_parameters(model)


def test_grid_of_exits_and_ranks():
    model = SHAPES["ml-embed-0.6b"]
    for (exit, rank), millions in GRID.items():
        nested = model if rank is None else replace(model, ranks=(rank,))
        assert round(num_parameters(nested, exit) / 1e6, 1) == millions
    deep = replace(model, ranks=(64, 512))
    assert num_parameters(deep, 8, 64) == num_parameters(replace(model, ranks=(64,)), 8)


def test_140_million_parameters():
    """The 160m with rank 512: (V + D) R instead of V D."""
    model, table = SHAPES["ml-embed-140m"], SHAPES["ml-embed-160m"]
    assert model == replace(table, ranks=(64, 128, 256, 512))
    without = num_parameters(table) - 151_936 * 640
    assert num_parameters(model) == without + (151_936 + 640) * 512 == 140_064_896


def test_kernel_supports_every_head_width():
    """Attention "auto" is Triton on CUDA for all named shapes; it is sdpa for other widths."""
    assert {model.head_dim for model in SHAPES.values()} <= set(WIDTHS)
    assert SHAPES["lealla-small"].head_dim == SHAPES["lealla-base"].head_dim == 16
    assert SHAPES["lealla-large"].head_dim == 32
