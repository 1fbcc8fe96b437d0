"""The gate of the contrastive loss: errors against float64, next to those of eager PyTorch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import infonce

from ..harness import TRAIN, Leaves, judged, poison, reason
from .cases import BOTH, NESTED, Case, dtype_on

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
