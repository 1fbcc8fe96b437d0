"""Operations of a model, counted by hand and by torch's counter, and peak rates of devices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import odd_shape, random_model, tiny_shape
from torch.utils.flop_counter import FlopCounterMode

from mlembed.data.packing import pack
from mlembed.modeling import flops
from mlembed.modeling.flops import Flops, layer_weights, training_flops

TEXTS = [np.array([1, 2, 2]), np.array([1, 5])]
SHAPE = tiny_shape(exits=(1, 2))
# 2 query heads and 2 of keys and values of width 16, of 32; three matrices of 32 x 48.
WEIGHTS = 32 * (6 * 16 + 3 * 48)
# Scores, and sums of values: two heads of width 16 for every pair.
PAIR = 2 * 2 * (2 * 16)


def test_matrices():
    assert layer_weights(SHAPE) == WEIGHTS == 7680
    bert = odd_shape("bert")
    assert layer_weights(bert) == 4 * 24 * 24 + 2 * 24 * 37


def test_texts_that_exit_early_count_until_their_exit():
    """3 + 2 tokens with 6 + 3 pairs in the first layer, 3 tokens with 6 pairs in the second."""
    got = training_flops(SHAPE, pack(TEXTS, np.array([2, 1])), None)
    forward = 2 * WEIGHTS * (5 + 3) + PAIR * (9 + 6)
    # The backward of attention computes its scores again.
    assert got == Flops(forward, 2 * forward, PAIR / 2 * 15)
    deep = training_flops(SHAPE, pack(TEXTS), None)
    assert deep.forward == 2 * (2 * WEIGHTS * 5 + PAIR * 9)
    both = training_flops(replace(SHAPE, causal=False), pack(TEXTS), None)
    assert both.forward - deep.forward == 2 * PAIR * (9 + 4 - 9)


def test_last_layers_count_at_every_exit():
    """The first of three layers runs 5 tokens, the second 3, and the last 5 and then 3."""
    shape = replace(SHAPE, num_hidden_layers=3, exits=(2, 3), last_layers=1)
    batch = pack(TEXTS, np.array([3, 2]))
    got = training_flops(shape, batch, None)
    first, second = (2 * WEIGHTS * tokens + PAIR * pairs for tokens, pairs in ((5, 9), (3, 6)))
    assert got == Flops(2 * (first + second), 4 * (first + second), PAIR / 2 * 30)
    again = training_flops(shape, batch, None, recompute=2).recomputed - got.recomputed
    assert again == first + second
    alone = training_flops(shape, pack(TEXTS, np.array([2, 2])), None)
    assert alone.forward == 2 * first


def test_skipped_layers_count_only_the_texts_that_run_them():
    runs_LN = np.array([[True, True], [False, True]])
    got = training_flops(SHAPE, pack(TEXTS, np.array([2, 2]), runs_LN), None)
    assert got.forward == 2 * WEIGHTS * (5 + 2) + PAIR * (9 + 3)


def test_vocabulary_counts_distinct_tokens_at_its_rank():
    plain, nested = SHAPE, replace(SHAPE, ranks=(4, 8))
    batch = pack(TEXTS)
    without = training_flops(plain, batch, None)
    for rank, stored in ((4, 4), (None, 8)):
        got = training_flops(nested, batch, rank)
        assert got.forward - without.forward == 2 * 3 * stored * 32
        assert got.backward == 2 * got.forward and got.recomputed == without.recomputed


def test_recomputed_operations_are_apart():
    batch = pack(TEXTS, np.array([2, 1]))
    plain = training_flops(SHAPE, batch, None)
    first = 2 * WEIGHTS * 5 + PAIR * 9
    one = training_flops(SHAPE, batch, None, recompute=1)
    again = training_flops(SHAPE, batch, None, keeps=False, recompute=1)
    assert one == replace(plain, recomputed=plain.recomputed + first)
    assert again == replace(plain, recomputed=plain.recomputed + first + plain.forward)
    assert plain + one == Flops(2 * plain.forward, 2 * plain.backward, 2 * plain.recomputed + first)


@pytest.mark.parametrize("style", ["qwen3", "bert"])
@pytest.mark.parametrize("last", [0, 1])
def test_products_are_those_of_torch_s_counter(style, last):
    """The counter sees products of the forward and backward, and not our attention."""
    ranks = {} if style == "bert" else {"ranks": (3, 11)}
    shape = odd_shape(style, exits=(1 + last, 3), last_layers=last, **ranks)
    batch = pack(TEXTS)
    model = random_model(shape).train()
    with FlopCounterMode(display=False) as counter:
        out = model(batch, rank=3 if ranks else None)
    counts = counter.get_flop_counts()["Global"]
    products = sum(
        count for op, count in counts.items() if str(op).startswith(("aten.mm", "aten.addmm"))
    )
    got = training_flops(shape, batch, 3 if ranks else None)
    heads = shape.num_attention_heads * shape.head_dim
    pairs = 9 if shape.causal else 13
    runs = 3 + last  # The last layer runs at both exits.
    # The reference looks every token up, not every distinct one.
    lookups = 2 * (5 - 3) * 3 * 24 if ranks else 0
    assert products == got.forward - runs * 4 * heads * pairs + lookups
    assert isinstance(out, torch.Tensor)


@pytest.mark.parametrize("style", ["qwen3", "bert"])
def test_frozen_layers_have_no_gradients_of_matrices(style):
    shape = odd_shape(style, pooling="mean", exits=(3,))
    model = random_model(shape).train()
    model.layers.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(pack(TEXTS)).sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    products = sum(count for op, count in counts if str(op).startswith(("aten.mm", "aten.addmm")))
    got = training_flops(shape, pack(TEXTS), None, frozen=True)
    attention = 3 * 4 * shape.num_attention_heads * shape.head_dim * (9 if shape.causal else 13)
    assert products == got.forward - attention + got.backward - 2 * attention


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 3060", None),
        ("cpu, 4 threads", None),
    ],
)
def test_peaks(name, tflops):
    assert flops.peak(name) == tflops
