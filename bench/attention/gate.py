"""Is attention right? Small shapes that hurt before anything is timed, then some sequences of each
case at its own size, of ours and of the peers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlembed_kernels.attention.attention import attention, attention_ref

from ..harness import BACKWARD, FORWARD, TRAIN, judged, poison, reason
from .cases import EPS32, dtype_on
from .peers import Batch, Packed, Tensors

if TYPE_CHECKING:
    from .cases import Case


NAMES = "out", "dq", "dk", "dv"


@dataclass(frozen=True)
class Check:
    """A shape that hurts: one token, tiles' ends and one off them, many sequences in a tile."""

    name: str
    lengths: tuple[int, ...]
    Hq: int = 16
    Hkv: int = 8
    K: int = 128
    causal: bool = True
    fp32: bool = False
    skips: bool = False  # every third sequence is not there
    sharp: float = 1.0  # factor on the scale: softmaxes of nearly one key

    def toy(self) -> "Check":
        lengths = tuple(min(n, 67) for n in self.lengths[:7])
        group = self.Hq // self.Hkv
        return replace(self, lengths=lengths, Hq=group, Hkv=1, K=min(self.K, 48))


RAGGED = 1, 2, 63, 1, 64, 65, 127, 300, 20, 17, 31, 128, 129, 5, 257


def checks() -> Iterator[Check]:
    """Few sets of heads and widths, as each is compiled anew, and fp32 too."""
    yield Check("ragged", RAGGED, fp32=True)
    yield Check("of one token", (1,) * 3000)
    yield Check("one alone, sharp", (517,), sharp=8.0)
    yield Check("bidirectional", RAGGED, causal=False)
    yield Check("as BERT", RAGGED, Hq=12, Hkv=12, K=64, causal=False)
    yield Check("groups of three", RAGGED, Hq=6, Hkv=2, K=96)
    yield Check("narrow", RAGGED, Hq=8, Hkv=2, K=32, causal=False)
    yield Check("skipping", RAGGED, skips=True)


def differentiated(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> Tensors:
    """out, dq, dk, dv."""
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def verdict(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Output and gradients against float64 on the same bits; an error up to eager's is right.

    Floor, of the truth's size: they are rounded to their dtype, eps / 2, and are sums of what fp32
    holds; a score of some tens is known to as many of its steps.
    """
    generator = torch.Generator(device).manual_seed(17)
    T = sum(check.lengths)
    bits = [
        torch.randn(T, heads, check.K, generator=generator, device=device).to(dtype)
        for heads in (check.Hq, check.Hkv, check.Hkv, check.Hq)
    ]
    batch = Batch.of(check.lengths, check.causal, check.Hq // check.Hkv, device)
    options: dict[str, Any] = {
        "cu_seqlens": batch.cu,
        "causal": check.causal,
        "scale": check.sharp * check.K**-0.5,
    }
    if check.skips:
        options["active"] = torch.arange(len(check.lengths), device=device) % 3 != 1
    reference = partial(attention_ref, **options)
    kernel = partial(attention, **options, impl="triton", plan=batch.plan)
    truth = differentiated(reference, *(x.double() for x in bits))
    eager = differentiated(reference, *bits)
    poison(device)
    got = differentiated(kernel, *bits)
    again = differentiated(kernel, *bits)
    floor = torch.finfo(dtype).eps / 2 + 64 * EPS32
    parts = {
        name: judged(x, e, t, floor) for name, x, e, t in zip(NAMES, got, eager, truth, strict=True)
    }
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    ok = same and all(part["ok"] for part in parts.values())
    return {"ok": ok, "same_bits": same, "dtype": str(dtype).removeprefix("torch."), **parts}


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """One verdict for each check and dtype."""
    for check in checks():
        dtypes = [dtype_on(device)]
        if check.fp32 and torch.float32 not in dtypes:
            dtypes.append(torch.float32)
        for dtype in dtypes:
            at = {"check": check.name, "shape": about_check(check)}
            try:
                yield at | verdict(check.toy() if smoke else check, dtype, device)
            except Exception as error:  # whatever it is, it is not right
                failed = {"ok": False, "dtype": str(dtype).removeprefix("torch.")}
                yield at | failed | {"error": reason(error)}


def about_check(check: Check) -> str:
    heads = f"{check.Hq}/{check.Hkv} heads of {check.K}"
    way = "causal" if check.causal else "bidirectional"
    return f"{len(check.lengths)} sequences, T {sum(check.lengths)}, {heads}, {way}"


# ---- at the case's own size ----

MOST = 4096  # tokens of a sequence of which everything is formed in float64
ROWS = 64  # of a longer one
OTHER = 4  # steps of the dtype: a larger error is no rounding


def by_hand(
    rows: Tensor, causal: bool, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> dict[str, Tensor]:
    """One sequence alone: out and dq of some of its rows; dk and dv mean it where rows are all."""
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


def spot(case: "Case", inputs: Packed, mode: str, got: Tensors) -> dict[str, Any] | None:
    """Some sequences against each of them alone, in float64: first, last, longest, one between.

    `ok` is for ours, as in the gate. `near` is for peers, who may round more: no error but theirs
    shows in either. Heads of kv that were repeated are summed over.
    """
    names = {FORWARD: NAMES[:1], BACKWARD: NAMES[1:], TRAIN: NAMES}[mode]
    here = case.lengths[: case.alive]
    begins = [0, *torch.tensor(here).cumsum(0).tolist()]
    chosen = sorted({0, len(here) - 1, len(here) // 3, here.index(max(here))})
    parts: dict[str, list[Tensor]] = {}
    leaves = [x.detach() for x in (*inputs.stacked, inputs.dout)]
    for i in chosen:
        some = slice(begins[i], begins[i + 1])
        rows = torch.arange(here[i], device=inputs.dout.device)
        if here[i] > MOST:
            rows = rows[torch.linspace(0, here[i] - 1, ROWS).long().to(rows.device)]
        of_it = [x[some] for x in leaves]
        truth = by_hand(rows, case.causal, *(x.double() for x in of_it))
        eager = by_hand(rows, case.causal, *of_it)
        for name, x in zip(names, got, strict=True):
            mine = x.detach()[some]
            if name in ("dk", "dv"):
                if len(rows) < here[i]:
                    continue
                mine = mine.unflatten(1, (case.Hkv, -1)).sum(2)
            else:
                mine = mine[rows]
            columns = (mine, eager[name], truth[name])
            parts.setdefault(name, []).append(torch.stack([y.double().flatten() for y in columns]))
    floor = torch.finfo(inputs.dout.dtype).eps / 2 + 64 * EPS32
    limit = max(OTHER * torch.finfo(inputs.dout.dtype).eps, 64 * EPS32)
    found: dict[str, Any] = {"ok": True, "near": True, "rms": {}}
    for name, several in parts.items():
        mine, eager_, truth_ = torch.cat(several, 1)
        part = judged(mine, eager_, truth_, floor)
        found[name], found["rms"][name] = part, round(part["rms"], 7)
        found["ok"] &= part["ok"]
        found["near"] &= part["rms"] <= limit
    return found
