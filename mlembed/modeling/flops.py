"""Floating-point operations of training a model, by formula, and the peak rates of devices.

Forward, of the tokens T_l and the pairs P_l of a token and one it sees that run through layer l,
summed over exits for the last layers that all exits end with:

    products    2 T_l (2 (Hq + Hkv) K D + 3 D I), 2 D I instead of 3 D I in a BERT
    attention   4 Hq K P_l: scores, and sums of values
    vocabulary  2 n r D for n distinct tokens at rank r; a plain table has no products
    pooler      2 D^2 a text at each of its exits

The backward has twice as many, without gradients of frozen matrices as many products. Recomputed
are the scores in attention's backward, 2 Hq K P_l, and forwards that memory is saved by. Norms,
rotations, adapters and the loss count nothing. A layer of transformers counts the weights of the
last layer, and local layers the whole text.
"""

from dataclasses import dataclass

from .. import config
from ..data.packing import PackedBatch
from .automodel import architecture

# TFLOP/s of dense bf16 products, as the maker states them. A device has the first row whose words
# its name contains.
PEAKS = {
    "B200": 2250.0, "H200": 989.5, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.5,
    "A100": 312.0, "L40S": 362.0, "L4": 121.0,
}  # fmt: skip


def peak(device: str) -> float | None:
    """Return the TFLOP/s of bf16 products of a device, by its name, or None if unknown."""
    words = device.replace("-", " ").split()
    for name, tflops in PEAKS.items():
        if set(name.split()) <= set(words):
            return tflops
    return None


@dataclass(frozen=True)
class Flops:
    """Operations of some packs: forward and backward, each once, and those computed again."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )


def layer_weights(m: config.Model) -> int:
    """Return the weights of a layer's matrices, each of which multiplies every token."""
    if m.style == "transformers":
        return architecture.numbers(m)[2]
    heads = 2 * m.num_attention_heads + 2 * m.num_key_value_heads
    ups = 2 if m.style == "bert" else 3
    return m.hidden_size * (heads * m.head_dim + ups * m.intermediate_size)


def training_flops(
    m: config.Model,
    pack: PackedBatch,
    rank: int | None,
    *,
    keeps: bool = True,
    recompute: int = 0,
    frozen: bool = False,
) -> Flops:
    """Return the operations of a pack's forward and backward.

    Args:
        pack: in host memory. rank: vocabulary rank, None for the stored one.
        keeps: whether the pack keeps its graph, or is encoded again for it. recompute: number of
            first layers that the backward computes again. frozen: whether the matrices of the
            layers have no gradients.
    """
    scores, products, layers = 0.0, 0.0, []
    plans: dict[int, tuple[int, float]] = {}
    for layer in range(1, m.num_hidden_layers + 1):
        layers.append(0.0)
        for depth in m.depths_of(layer):
            skip, plan = pack.skip_layers.get(depth), pack.plan_at(depth)
            plan = skip.plan if skip else plan
            if plan is None:
                break
            if id(plan) not in plans:
                plans[id(plan)] = plan.tokens, _pairs(plan.cu_seqlens.tolist(), m.causal)
            tokens, pairs = plans[id(plan)]
            score = 2.0 * m.num_attention_heads * m.head_dim * pairs
            scores += score
            product = 2.0 * tokens * layer_weights(m)
            products += product
            layers[-1] += product + 2 * score
    forward = sum(layers) + _outside(m, pack, rank)
    again = scores + sum(layers[:recompute]) + (0.0 if keeps else forward)
    return Flops(forward, 2 * forward - frozen * products, again)


def _pairs(bounds: list[int], causal: bool) -> float:
    lengths = [end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    return float(sum(n * (n + 1) / 2 if causal else n * n for n in lengths))


def _outside(m: config.Model, pack: PackedBatch, rank: int | None) -> float:
    """Return the operations of vocabulary and pooler."""
    vocabulary = 2.0 * pack.token_index.distinct * (rank or m.ranks[-1]) if m.ranks else 0.0
    plans = [pack.plan_at(exit) for exit in m.exits]
    pooled = sum(plan.sequences for plan in plans if plan is not None)
    pooler = 2.0 * pooled * m.hidden_size if m.pooling == "pooler" else 0.0
    return (vocabulary + pooler) * m.hidden_size
