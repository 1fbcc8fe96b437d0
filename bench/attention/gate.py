"""The gate of attention: difficult small shapes, then a few sequences of each case at full size,
of ours and of the peers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlembed_kernels.attention.attention import attention, attention_ref

from .. import harness
from ..harness import BACKWARD, EPS32, FORWARD, TRAIN, Tensors, differentiated
from .cases import Case
from .peers import Batch, Packed

NAMES = "out", "dq", "dk", "dv"


@dataclass(frozen=True)
class Check:
    """A difficult shape: one token, lengths next to a tile's, many sequences in a tile.

    skips: every third sequence is inactive. sharp: factor on the scale, for softmaxes of nearly
    one key.
    """

    name: str
    lengths: tuple[int, ...]
    Hq: int = 16
    Hkv: int = 8
    K: int = 128
    causal: bool = True
    fp32: bool = False
    skips: bool = False
    sharp: float = 1.0

    @property
    def about(self) -> str:
        heads = f"{self.Hq}/{self.Hkv} heads of {self.K}"
        way = "causal" if self.causal else "bidirectional"
        return f"{len(self.lengths)} sequences, T {sum(self.lengths)}, {heads}, {way}"

    def toy(self) -> "Check":
        lengths = tuple(min(n, 67) for n in self.lengths[:7])
        group = self.Hq // self.Hkv
        return replace(self, lengths=lengths, Hq=group, Hkv=1, K=min(self.K, 48))


RAGGED = 1, 2, 63, 1, 64, 65, 127, 300, 20, 17, 31, 128, 129, 5, 257


def checks() -> Iterator[Check]:
    """Yield checks of few sets of heads and widths, as each set and dtype is compiled again."""
    yield Check("ragged", RAGGED, fp32=True)
    yield Check("one token each", (1,) * 3000)
    yield Check("one sequence, sharp", (517,), sharp=8.0)
    yield Check("bidirectional", RAGGED, causal=False)
    yield Check("heads of BERT", RAGGED, Hq=12, Hkv=12, K=64, causal=False)
    yield Check("groups of three", RAGGED, Hq=6, Hkv=2, K=96)
    yield Check("narrow", RAGGED, Hq=8, Hkv=2, K=32, causal=False)
    yield Check("skipping", RAGGED, skips=True)


def verdict(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compare output and gradients with float64 on the same bits.

    Floor, of the truth's size: results are rounded to their dtype, eps / 2, and are sums of fp32
    numbers; a score of some tens is known to as many of its steps.
    """
    generator = torch.Generator(device).manual_seed(17)
    T, heads = sum(check.lengths), (check.Hq, check.Hkv, check.Hkv, check.Hq)
    shapes = ((T, H, check.K) for H in heads)
    *qkv, dout = (torch.randn(x, generator=generator, device=device).to(dtype) for x in shapes)
    batch = Batch.of(check.lengths, check.causal, check.Hq // check.Hkv, device)
    options: dict[str, Any] = {"cu_seqlens": batch.cu, "causal": check.causal}
    options["scale"] = check.sharp * check.K**-0.5
    if check.skips:
        options["active"] = torch.arange(len(check.lengths), device=device) % 3 != 1
    reference = partial(attention_ref, **options)
    kernel = partial(attention, **options, impl="triton", plan=batch.plan)
    truth = differentiated(reference, [x.double() for x in qkv], dout.double())
    eager = differentiated(reference, qkv, dout)
    harness.poison(device)
    got, again = (differentiated(kernel, qkv, dout) for _ in "ab")
    floor = torch.finfo(dtype).eps / 2 + 64 * EPS32
    return harness.verdict(NAMES, [floor] * 4, got, again, eager, truth)


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    half = harness.dtype_on(device)
    return harness.gate(harness.trials(checks(), verdict, half, device, smoke))


# ---- at full size ----

MOST = 4096  # tokens: of longer sequences only ROWS rows are computed in float64
ROWS = 64


def by_hand(
    rows: Tensor, causal: bool, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> dict[str, Tensor]:
    """Return out and dq of some rows of a sequence; dk and dv are right if `rows` are all."""
    Hkv, scale = k.shape[1], q.shape[2] ** -0.5
    q, dout = q[rows].unflatten(1, (Hkv, -1)), dout[rows].unflatten(1, (Hkv, -1))
    scores = torch.einsum("rhgk,shk->hgrs", q, k) * scale
    if causal:
        future = torch.arange(len(k), device=k.device) > rows[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    p = scores.softmax(-1)
    dp = torch.einsum("rhgk,shk->hgrs", dout, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return {
        "out": torch.einsum("hgrs,shk->rhgk", p, v).flatten(1, 2),
        "dq": torch.einsum("hgrs,shk->rhgk", ds, k).flatten(1, 2),
        "dk": torch.einsum("hgrs,rhgk->shk", ds, q),
        "dv": torch.einsum("hgrs,rhgk->shk", p, dout),
    }


def spot(case: Case, inputs: Packed, mode: str, got: Tensors) -> dict[str, Any]:
    """Compare the first, the last, the longest and one more sequence with float64.

    A peer's heads of k and v may be repeated; their gradients are summed.
    """
    names = {FORWARD: NAMES[:1], BACKWARD: NAMES[1:], TRAIN: NAMES}[mode]
    lengths = case.lengths[: case.alive]
    begins = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    chosen = sorted({0, len(lengths) - 1, len(lengths) // 3, lengths.index(max(lengths))})
    columns: dict[str, list[Tensor]] = {}
    leaves = [x.detach() for x in (*inputs.stacked, inputs.dout)]
    for i in chosen:
        some = slice(begins[i], begins[i + 1])
        rows = torch.arange(lengths[i], device=inputs.dout.device)
        if lengths[i] > MOST:
            rows = rows[torch.linspace(0, lengths[i] - 1, ROWS).long().to(rows.device)]
        bits = [x[some] for x in leaves]
        truth = by_hand(rows, case.causal, *(x.double() for x in bits))
        eager = by_hand(rows, case.causal, *bits)
        for name, x in zip(names, got, strict=True):
            mine = x.detach()[some]
            if name in ("dk", "dv"):
                if len(rows) < lengths[i]:
                    continue
                mine = mine.unflatten(1, (case.Hkv, -1)).sum(2)
            else:
                mine = mine[rows]
            three = (mine, eager[name], truth[name])
            columns.setdefault(name, []).append(torch.stack([y.double().flatten() for y in three]))
    dtype = inputs.dout.dtype
    parts = {name: tuple(torch.cat(several, 1)) for name, several in columns.items()}
    return harness.spot_check(parts, torch.finfo(dtype).eps / 2 + 64 * EPS32, dtype)
