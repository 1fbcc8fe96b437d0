"""Cases of attention, their FLOPs, bytes and floors; bench.py derives the formulas."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..harness import BACKWARD, FORWARD, TRAIN
from . import peers
from .peers import Packed


def lognormal(n: int, median: float, sigma: float, low: int, high: int) -> Iterator[int]:
    """Lengths of texts; every call goes on where the generator stands."""
    normal = torch.randn(n, generator=GENERATOR)
    yield from torch.exp(normal * sigma + math.log(median)).round().clamp(low, high).long().tolist()


GENERATOR = torch.Generator().manual_seed(0)  # the lengths that were measured on 2026-11-20
MIXES = {
    "short": tuple(lognormal(2048, 20, 0.6, 5, 128)),  # queries
    "mid": tuple(lognormal(512, 110, 0.7, 8, 512)),  # passages
    "long": (2048,) * 32,
    "very_long": (32768,) * 2,
}
TOYS = {
    "short": (5, 1, 20, 33, 40),
    "mid": (3, 70, 12, 9),
    "long": (100,),
    "very_long": (97,),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    mix: str
    Hq: int = 16
    Hkv: int = 8
    K: int = 128
    causal: bool = True
    gone: float = 0.0  # so many of the sequences, the last ones, have left at this layer
    providers: tuple[str, ...]
    modes: tuple[str, ...] = (FORWARD, BACKWARD)

    @property
    def alive(self) -> int:
        return len(self.lengths) - round(self.gone * len(self.lengths))

    @property
    def tokens(self) -> int:
        """T of those that are there."""
        return sum(self.lengths[: self.alive])

    @property
    def pairs(self) -> int:
        if self.causal:
            return sum(n * (n + 1) // 2 for n in self.lengths[: self.alive])
        return sum(n * n for n in self.lengths[: self.alive])


SKIPPING = "ours", "alone", "active", "whole"
GROUPED = tuple(name for name in peers.PEERS if name != "rope_qk_norm")
PEERS = tuple(name for name in GROUPED if name != "varlen_gqa")
FEW = "ours", "varlen", "varlen_gqa", "flex", "fa3"
BERT: dict[str, Any] = {"Hq": 12, "Hkv": 12, "K": 64, "causal": False}


def case(name: str, mix: str, *providers: str, **options: Any) -> Case:
    return Case(name=name, mix=mix, lengths=MIXES[mix], providers=providers, **options)


# The most telling first: what time is left for shrinks from the end.
CASES = {
    case.name: case
    for case in (
        case("short", "short", "ours", *GROUPED, "rope_qk_norm", modes=(FORWARD, BACKWARD, TRAIN)),
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


def toy(case: Case) -> Case:
    """The same lines of code in seconds, on any device."""
    Hq, Hkv = (2, 2) if case.Hq == case.Hkv else (2, 1)
    return replace(case, lengths=TOYS[case.mix], Hq=Hq, Hkv=Hkv, K=16)


# ---- the two numbers ----

FACTORS = {FORWARD: 1.0, BACKWARD: 2.5, TRAIN: 3.5}


def flops(case: Case, mode: str) -> float:
    """4 Hq K for each pair forward, 2.5 times that backward."""
    return FACTORS[mode] * 4 * case.Hq * case.K * case.pairs


def nbytes(case: Case, mode: str) -> float:
    """(2 Hq + 2 Hkv) K T elements forward, (3 Hq + 4 Hkv) K T backward."""
    forward, backward = 2 * case.Hq + 2 * case.Hkv, 3 * case.Hq + 4 * case.Hkv
    heads = {FORWARD: forward, BACKWARD: backward, TRAIN: forward + backward}[mode]
    return 2.0 * heads * case.K * case.tokens


def exponentials(case: Case) -> float:
    """Hq for each pair, in each pass."""
    return float(case.Hq * case.pairs)


def floors(case: Case, mode: str, tflops: float, gbs: float) -> dict[str, float]:
    """Milliseconds that no run can go under, at these ceilings."""
    return {
        "products": flops(case, mode) / tflops / 1e9,
        "bytes": nbytes(case, mode) / gbs / 1e6,
    }


def about(case: Case) -> str:
    here = case.lengths[: case.alive]
    median = sorted(here)[len(here) // 2]
    skipped = f" (of {len(case.lengths)})" if case.gone else ""
    return (
        f"{len(here)} sequences{skipped} of {min(here)}..{max(here)} tokens, median {median}, "
        f"T = {case.tokens}, {case.Hq}/{case.Hkv} heads of {case.K}, "
        f"{'causal' if case.causal else 'bidirectional'}"
    )


# ---- inputs and steps ----


def inputs(case: Case, device: torch.device, seed: int) -> Packed:
    """Standard normal, the whole buffer, also where only some sequences are there."""
    generator = torch.Generator(device).manual_seed(seed)
    T, Hq, Hkv = sum(case.lengths), case.Hq, case.Hkv
    options: dict[str, Any] = {"device": device, "dtype": dtype_on(device)}
    q, k, v, dout = (
        torch.randn(T, heads, case.K, generator=generator, **options)
        for heads in (Hq, Hkv, Hkv, Hq)
    )
    return Packed(q, k, v, dout)


EPS32 = torch.finfo(torch.float32).eps


def dtype_on(device: torch.device) -> torch.dtype:
    """bf16; Triton's interpreter, which stands in on CPUs, has no right bf16, but fp16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16
