"""The nested contrastive loss: its cases, its two numbers, its gate.

Letters: E exits, B queries, N candidates (B = N here), D width, M prefixes.

FLOPs. A product of all pairs, S = q c', is 2BND an exit; the prefixes are sums within it and cost
nothing more. The loss needs S, its gradients dq = G c and dc = G' q. Useful: 2BNDE forward, three
times that with backward. TFLOP/s count these, whatever a provider does (one GEMM per prefix is
sum(dims) / D = 2 times S). Who keeps no S forms it again in the backward: "four-GEMM" = S forward,
S backward, dq, dc = 4 x 2BNDE, the floor of that design.

Bytes. Forward reads q and c once, 2 (B + N) D E in bf16. Backward reads them again and writes their
gradients: three times that. Norms, sums and losses are E M (B + N) numbers, less than 1 % of it.

Exponentials. Each pass takes one for every pair and prefix, E M B N. They share no unit with the
matrix products and no ceiling is measured for them, so they are in no floor here; see LOG.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import infonce

from . import baselines
from .harness import FORWARD, TRAIN, Leaves, Step, judged, poison, reason

BOTH = "query_to_doc", "doc_to_query"
NESTED = 8, 16, 32, 64, 128, 256, 512, 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    E: int
    B: int
    D: int = 1024
    dims: tuple[int, ...] = NESTED
    directions: tuple[str, ...] = ("query_to_doc",)
    providers: tuple[str, ...]
    modes: tuple[str, ...] = (TRAIN, FORWARD)
    temperature: float = 0.05

    @property
    def both(self) -> bool:
        return len(self.directions) > 1


TESTS = "infonce", "partition", "cosine"  # tests/kernels/test_<name>*.py: it is made of these
STEPS, PAIRS = tuple(baselines.STEPS), tuple(baselines.PAIRS)
# The most telling first: what time is left for shrinks from the end.
CASES = {
    case.name: case
    for case in (
        Case(name="reference", E=7, B=16384, providers=("ours", *STEPS, *PAIRS)),
        Case(name="both", E=7, B=16384, directions=BOTH, providers=("ours", *STEPS[:-1])),
        Case(name="small", E=1, B=4096, providers=("ours", *STEPS[:-1], *PAIRS)),
        Case(name="labse", E=7, B=16384, D=256, dims=NESTED[:6], providers=("ours", *STEPS[:-1])),
        Case(name="e1", E=1, B=16384, providers=("ours", *STEPS[:-1])),
        Case(name="huge", E=1, B=131072, providers=("ours",)),
    )
}
BREAKDOWN = ("reference",)  # where ours is split into its kernels
BASELINES = "eager", "compile"  # speed-ups are printed against these
SWEEP_CASE = "e1"  # where launch configurations are compared


def toy(case: Case) -> Case:
    """The same lines of code in seconds, on any device; the first with a wide prefix too."""
    first = case.name in BREAKDOWN
    dims, modes = ((8, 144), case.modes) if first else ((8, 16), (TRAIN,))
    E, B = 2 if case.both else 1, 40 if case.name == "huge" else 24
    return replace(case, E=E, B=B, D=dims[-1], dims=dims, modes=modes)


def flops(case: Case, mode: str, gemms: int | None = None) -> float:
    """2 B N D E for each product of all pairs: 1 forward, 3 with backward, or `gemms` of them."""
    if gemms is None:
        gemms = 3 if mode == TRAIN else 1
    return gemms * 2.0 * case.B * case.B * case.D * case.E


def nbytes(case: Case, mode: str) -> float:
    """2 (B + N) D E forward; with backward as much to read again, and to write."""
    return (3 if mode == TRAIN else 1) * 2.0 * 2 * case.B * case.D * case.E


def exponentials(case: Case) -> float:
    """E M B N in each pass."""
    return float(case.E * len(case.dims) * case.B * case.B)


def floors(case: Case, mode: str, tflops: float, gbs: float) -> dict[str, float]:
    """Milliseconds that no run can go under, at these ceilings."""
    again = 4 if mode == TRAIN else 1
    return {
        "gemms": flops(case, mode) / tflops / 1e9,
        "recomputing": flops(case, mode, again) / tflops / 1e9,
        "bytes": nbytes(case, mode) / gbs / 1e6,
    }


def about(case: Case) -> str:
    way = "both directions" if case.both else "one direction"
    prefixes = f"{case.dims[0]}..{case.dims[-1]} (M = {len(case.dims)})"
    return f"E = {case.E}, B = N = {case.B}, D = {case.D}, prefixes {prefixes}, {way}"


def dtype_on(device: torch.device) -> torch.dtype:
    """bf16; Triton's interpreter, which stands in on CPUs, has no right bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def inputs(case: Case, device: torch.device, seed: int) -> Leaves:
    """Raw vectors; positives as near as their query's own length away, the others at random."""
    generator = torch.Generator(device).manual_seed(seed)
    q, c = (
        torch.randn(
            case.E, case.B, case.D, generator=generator, device=device, dtype=dtype_on(device)
        )
        for _ in "qc"
    )
    return Leaves(q, c.add_(q))


def ours(case: Case) -> Step:
    def step(inputs: Leaves, backward: bool) -> Tensor:
        q, c = inputs.stacked
        loss_EM = infonce(
            q,
            c,
            dims=case.dims,
            temperature=case.temperature,
            directions=case.directions,
            partition_mode="per_direction" if case.both else "joint",
            impl="triton",
        )
        loss = loss_EM.sum()
        if backward:
            loss.backward()
        return loss.detach()

    return step


def build(name: str, case: Case, like: Leaves, smoke: bool) -> tuple[Step, str | None]:
    """A provider's step, and what it leaves out of the case, if anything."""
    if name == "ours":
        return ours(case), None
    return baselines.build(name, case, like.stacked[0][0].detach(), smoke)


# ---- targets ----


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, where both of its numbers were obtained and are right."""
    got = {
        row["case"]: row
        for row in rows
        if (row["provider"], row["mode"]) == ("ours", TRAIN) and row.get("ms") and row["green"]
    }
    found = []
    if {"reference", "both"} <= got.keys():
        ratio = got["both"]["ms"] / got["reference"]["ms"]
        found.append(("both directions / one, fwd+bwd", ratio, "<= 1.3", ratio <= 1.3))
    if {"e1", "huge"} <= got.keys():
        ratio = got["huge"]["tflops"] / got["e1"]["tflops"]
        found.append(("TFLOP/s of huge / of e1, fwd+bwd", ratio, ">= 0.9", ratio >= 0.9))
    if "huge" in got:
        peak = got["huge"]["peak_mib"] / 1024
        found.append(("peak of huge, GiB", peak, "< 2", peak < 2))
    names = "target", "value", "limit", "met"
    return [dict(zip(names, values, strict=True)) for values in found]


# ---- the gate: is it right? ----


@dataclass(frozen=True)
class Check:
    """A shape that hurts: primes, one row, more candidates than a tile, prefixes inside a step."""

    name: str
    E: int
    Q: int
    C: int
    dims: tuple[int, ...]
    directions: tuple[str, ...] = ("query_to_doc",)
    partition_mode: str = "joint"
    temperature: float = 0.05
    masks: bool = False
    fp32: bool = False

    @property
    def D(self) -> int:
        """Some columns are of no prefix."""
        return self.dims[-1] + 3

    def toy(self) -> "Check":
        dims = (8, 144) if self.dims == NESTED else (8, 21)
        return replace(self, E=1, Q=min(self.Q, 9), C=min(self.C, 11), dims=dims)


def checks() -> Iterator[Check]:
    """Few sets of prefixes, as each is compiled anew, and fp32 too; bf16 as the cases need it."""
    odd, per_direction = (8, 24, 61, 200), "per_direction"
    yield Check("ragged", 3, 997, 1201, odd, fp32=True)
    yield Check("one query", 3, 1, 131, odd, fp32=True)
    yield Check("cold", 3, 509, 1021, odd, temperature=0.01, fp32=True)
    yield Check("ids, both, joint", 3, 331, 777, odd, BOTH, masks=True, fp32=True)
    yield Check("ids, both", 3, 331, 777, odd, BOTH, per_direction, masks=True, fp32=True)
    yield Check("nested", 2, 2048, 2048, NESTED)
    yield Check("nested, both", 2, 1031, 1151, NESTED, BOTH, per_direction)
    yield Check("labse", 2, 1031, 1151, NESTED[:6])


def masks(check: Check, device: torch.device) -> dict[str, Tensor]:
    """Positives anywhere, none for every seventh query, and texts that occur more than once."""
    if not check.masks:
        return {}
    generator = torch.Generator().manual_seed(5)
    target = torch.randperm(check.C, generator=generator)[: check.Q]
    target[::7] = -1
    cand_ids = torch.randint(0, max(check.C // 4, 2), (check.C,), generator=generator)
    query_ids = cand_ids[target.clamp(min=0)]
    found = {"target": target, "query_ids": query_ids, "cand_ids": cand_ids}
    return {name: x.to(device) for name, x in found.items()}


def eager_table(q: Tensor, c: Tensor, check: Check, given: dict[str, Tensor]) -> Tensor:
    """loss_EM by normalise, matmul and cross entropy in the dtype of the inputs, with masks."""
    Q = q.shape[1]
    target = given.get("target", torch.arange(Q, device=q.device))
    here = target >= 0
    own = target.clamp(min=0)
    rows = torch.arange(Q, device=q.device)
    same = torch.zeros(Q, c.shape[1], dtype=torch.bool, device=q.device)
    if "query_ids" in given:
        same = given["query_ids"][:, None] == given["cand_ids"]
    forward = same & (own[:, None] != torch.arange(c.shape[1], device=q.device))
    backward = (same[:, own].T | (target == own[:, None])) & (rows != rows[:, None])
    table = []
    for x, y in zip(q, c, strict=True):
        for d in check.dims:
            z = F.normalize(x[:, :d], dim=-1) @ F.normalize(y[:, :d], dim=-1).T / check.temperature
            docs = z.masked_fill(forward, -torch.inf)
            queries = z[:, own].T.masked_fill(backward, -torch.inf)
            if check.partition_mode == "per_direction":
                losses = [(docs, own), (queries, rows)]
            elif len(check.directions) > 1:
                others = queries.masked_fill(rows == rows[:, None], -torch.inf)
                losses = [(torch.cat([docs, others], 1), own)]
            else:
                losses = [(docs, own)]
            means = [F.cross_entropy(logits[here], at[here]) for logits, at in losses]
            table.append(torch.stack(means).mean())
    return torch.stack(table).view(len(q), -1)


def gradients(loss_EM: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Loss, dq, dc under unlike weights, so that no exit or prefix passes for another."""
    weights = torch.arange(1.0, loss_EM.numel() + 1, device=q.device).view_as(loss_EM)
    total = (loss_EM * weights.to(loss_EM.dtype)).sum()
    return loss_EM.detach(), *torch.autograd.grad(total, (q, c))


def verdict(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Loss and gradients against float64 on the same bits; an error up to eager's is right.

    Floor, of the truth's size: a logit near 1 / temperature is known to one step of fp32 there,
    eps / temperature, and a gradient is rounded to its dtype, eps / 2.
    """
    generator = torch.Generator(device).manual_seed(17)
    q, c = (
        torch.randn(check.E, n, check.D, generator=generator, device=device)
        for n in (check.Q, check.C)
    )
    given = masks(check, device)
    own = given.get("target", torch.arange(check.Q, device=device)).clamp(min=0)
    c[:, own] += q
    lengths = torch.logspace(-1, 1, check.Q, device=device)[:, None]
    q, c = (x.to(dtype).requires_grad_() for x in (q * lengths, c))
    options: dict[str, Any] = {
        "dims": check.dims,
        "temperature": check.temperature,
        "directions": check.directions,
        "partition_mode": check.partition_mode,
        **given,
    }
    wide_q, wide_c = (x.detach().double().requires_grad_() for x in (q, c))
    truth = gradients(infonce(wide_q, wide_c, **options, impl="reference"), wide_q, wide_c)
    eager = gradients(eager_table(q, c, check, given), q, c)
    poison(device)
    got = gradients(infonce(q, c, **options, impl="triton"), q, c)
    again = gradients(infonce(q, c, **options, impl="triton"), q, c)
    step = torch.finfo(torch.float32).eps / check.temperature
    rounding = torch.finfo(dtype).eps / 2
    parts = {
        name: judged(x, e, t, step if name == "loss" else step + rounding)
        for name, x, e, t in zip(("loss", "dq", "dc"), got, eager, truth, strict=True)
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
    return f"E {check.E}, {check.Q} x {check.C}, D {check.D}, {len(check.dims)} prefixes"


def spot(case: Case, inputs: Leaves, mode: str, got: Any) -> dict[str, Any] | None:
    """dq of the first, middle and last rows at the case's own size, against float64.

    A row's gradient needs no other row's partition where there is one direction; at this size
    nothing else can be had in float64, and an offset beyond 2^31 would show here alone.
    """
    if case.both or mode != TRAIN:
        return None
    q, c = inputs.stacked
    assert q.grad is not None
    B = case.B
    rows = torch.tensor(sorted({0, 1, B // 3, B // 2, B - 2, B - 1}), device=q.device)

    def by_rows(dtype: torch.dtype) -> Tensor:
        some = q.detach()[:, rows].to(dtype).requires_grad_()
        losses = []
        for e in range(case.E):
            for d in case.dims:
                unit = F.normalize(c.detach()[e, :, :d].to(dtype), dim=-1)
                logits = F.normalize(some[e, :, :d], dim=-1) @ unit.T / case.temperature
                losses.append(F.cross_entropy(logits, rows, reduction="sum") / B)
        return torch.autograd.grad(torch.stack(losses).sum(), some)[0]

    floor = torch.finfo(torch.float32).eps / case.temperature + torch.finfo(q.dtype).eps / 2
    return judged(q.grad[:, rows], by_rows(q.dtype), by_rows(torch.float64), floor)


# ---- launch configurations ----

SWEEP = {
    "similarity._lse_forward": FORWARD,
    "similarity._lse_backward": TRAIN,
}  # module of CONFIGS -> what is timed
# Beside the present entry, from which they take what they do not name. `--case both` reaches the
# kernels that sum columns too.
CANDIDATES: dict[str, list[dict[str, int | None]]] = {
    "narrow_forward": [
        {"num_stages": 2},
        {"num_stages": 4},
        {"maxnreg": 128},
        {"BM": 64, "BN": 64},
        {"BM": 64, "BN": 256, "num_warps": 8},
        {"BM": 128, "BN": 64},
        {"BM": 128, "BN": 128, "num_warps": 8},
        {"BM": 128, "BN": 128, "num_warps": 8, "maxnreg": 128},
    ],
    "wide_forward": [
        {"num_stages": 2},
        {"num_stages": 4},
        {"maxnreg": None},
        {"maxnreg": None, "num_stages": 4},
        {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3, "maxnreg": None},
        {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 4, "maxnreg": None},
        {"BM": 64, "BN": 256, "num_warps": 8, "num_stages": 3, "maxnreg": None},
        {"BM": 128, "BN": 256, "num_warps": 8, "num_stages": 3, "maxnreg": None},
        {"BK": 128, "num_stages": 2},
    ],
    "narrow_backward": [
        {"num_stages": 1},
        {"num_stages": 3},
        {"BM": 64, "BN": 32, "num_warps": 4},
        {"BM": 64, "BN": 64, "num_warps": 4},
        {"BM": 64, "BN": 64, "num_warps": 8},
        {"BM": 128, "BN": 64},
    ],
    "wide_backward": [
        {"num_stages": 2},
        {"num_stages": 4},
        {"maxnreg": 128},
        {"BM": 64, "BN": 128, "num_warps": 4},
        {"BM": 128, "BN": 64, "num_warps": 4},
        {"BM": 128, "BN": 128, "num_warps": 16},
    ],
    "product": [
        {"num_stages": 4},
        {"num_warps": 4},
        {"BM": 128, "BN": 256},
        {"BM": 128, "BN": 256, "num_stages": 4},
        {"BK": 32, "num_stages": 5},
        {"BK": 128, "num_stages": 2},
    ],
    "exact": [],  # has work to do only where temperatures are low
}
