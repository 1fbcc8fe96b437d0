"""Cases of attention over packed sequences, with their FLOPs and bytes.

Letters: T tokens of all sequences, n_i those of one, Hq query heads, Hkv key/value heads, K their
width. A pair is a query and a key that it sees: n_i^2 of a sequence, n_i (n_i + 1) / 2 if causal.

LOG.md has the arithmetic. TFLOP/s count 4 Hq K for each pair forward and 2.5 times that backward
for every provider, also if it computes more (whole tiles for a triangle or a few tokens). Bytes
are those of q, k, v, o and their gradients in bf16; a program that holds a whole sequence does not
need o again. The larger of the two times is the floor: bytes up to a few hundred tokens, FLOPs
beyond. Exponentials run on another unit, whose ceiling is not measured, so no floor here contains
them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import harness
from ..harness import BACKWARD, FORWARD, TRAIN
from . import peers
from .peers import Packed

FACTORS = {FORWARD: 1.0, BACKWARD: 2.5, TRAIN: 3.5}


def lognormal(n: int, median: float, sigma: float, low: int, high: int) -> Iterator[int]:
    """Yield lengths of texts; every call continues the generator."""
    normal = torch.randn(n, generator=GENERATOR)
    yield from torch.exp(normal * sigma + math.log(median)).round().clamp(low, high).long().tolist()


GENERATOR = torch.Generator().manual_seed(0)  # the lengths that were measured on 2026-11-20
MIXES = {
    "short": tuple(lognormal(2048, 20, 0.6, 5, 128)),  # queries
    "mid": tuple(lognormal(512, 110, 0.7, 8, 512)),  # passages
    "long": (2048,) * 32,
    "very_long": (32768,) * 2,
}
TOYS = {"short": (5, 1, 20, 33, 40), "mid": (3, 70, 12, 9), "long": (100,), "very_long": (97,)}


@dataclass(frozen=True, kw_only=True)
class Case(harness.Case):
    """Sequences of one layer. gone: the share of them, at the end, that left at this layer."""

    lengths: tuple[int, ...]
    mix: str
    Hq: int = 16
    Hkv: int = 8
    K: int = 128
    causal: bool = True
    gone: float = 0.0
    modes: tuple[str, ...] = (FORWARD, BACKWARD)

    @property
    def alive(self) -> int:
        """Return the number of sequences that are left."""
        return len(self.lengths) - round(self.gone * len(self.lengths))

    @property
    def tokens(self) -> int:
        """Return T of the sequences that are left."""
        return sum(self.lengths[: self.alive])

    @property
    def pairs(self) -> int:
        if self.causal:
            return sum(n * (n + 1) // 2 for n in self.lengths[: self.alive])
        return sum(n * n for n in self.lengths[: self.alive])

    @property
    def about(self) -> str:
        lengths = sorted(self.lengths[: self.alive])
        skipped = f" (of {len(self.lengths)})" if self.gone else ""
        return (
            f"{len(lengths)} sequences{skipped} of {lengths[0]}..{lengths[-1]} tokens, median "
            f"{lengths[len(lengths) // 2]}, T = {self.tokens}, {self.Hq}/{self.Hkv} heads of "
            f"{self.K}, {'causal' if self.causal else 'bidirectional'}"
        )

    def toy(self) -> "Case":
        """Return the case in seconds, on any device."""
        Hq, Hkv = (2, 2) if self.Hq == self.Hkv else (2, 1)
        return replace(self, lengths=TOYS[self.mix], Hq=Hq, Hkv=Hkv, K=16)

    def inputs(self, device: torch.device, seed: int) -> Packed:
        """Return normal inputs of all sequences, also of those that left."""
        generator = torch.Generator(device).manual_seed(seed)
        T, heads = sum(self.lengths), (self.Hq, self.Hkv, self.Hkv, self.Hq)
        options: dict[str, Any] = {"device": device, "dtype": harness.dtype_on(device)}
        return Packed(*(torch.randn(T, H, self.K, generator=generator, **options) for H in heads))

    def flops(self, mode: str) -> float:
        """Return 4 Hq K for each pair forward, 2.5 times that backward."""
        return FACTORS[mode] * 4 * self.Hq * self.K * self.pairs

    def nbytes(self, mode: str) -> float:
        """Return (2 Hq + 2 Hkv) K T elements forward, (3 Hq + 4 Hkv) K T backward."""
        forward, backward = 2 * self.Hq + 2 * self.Hkv, 3 * self.Hq + 4 * self.Hkv
        heads = {FORWARD: forward, BACKWARD: backward, TRAIN: forward + backward}[mode]
        return 2.0 * heads * self.K * self.tokens

    def exponentials(self) -> float:
        """Return Hq for each pair, those of one pass."""
        return float(self.Hq * self.pairs)


SKIPPING = "ours", "alone", "active", "whole"
FIRST = tuple(name for name in peers.PEERS if name != "rope_qk_norm")
# flex is compiled again for each case, 20 to 40 s, so that one case has it.
GROUPED = tuple(name for name in FIRST if name != "flex")
PEERS = tuple(name for name in GROUPED if name != "varlen_gqa")
FEW = "ours", "varlen", "varlen_gqa", "fa3"
BERT: dict[str, Any] = {"Hq": 12, "Hkv": 12, "K": 64, "causal": False}


def case(name: str, mix: str, *providers: str, **options: Any) -> Case:
    return Case(name=name, mix=mix, lengths=MIXES[mix], providers=providers, **options)


# The most telling first, as the last ones are skipped when time runs out.
CASES = {
    case.name: case
    for case in (
        case("short", "short", "ours", *FIRST, "rope_qk_norm", modes=(FORWARD, BACKWARD, TRAIN)),
        case("mid", "mid", "ours", *GROUPED),
        case("long", "long", "ours", *GROUPED, "rope_qk_norm"),
        case("skip", "mid", *SKIPPING, gone=0.4),
        case("short_bert", "short", "ours", *PEERS, **BERT),
        case("mid_bert", "mid", "ours", *PEERS, **BERT),
        case("long_bert", "long", "ours", *PEERS, **BERT),
        case("short_full", "short", *FEW, causal=False),
        case("mid_full", "mid", *FEW, causal=False),
        case("long_full", "long", *FEW, causal=False),
        case("skip_short", "short", *SKIPPING, gone=0.4),
        case("very_long", "very_long", "ours", "varlen", "varlen_gqa", "fa3"),
    )
}
