"""The gate of the contrastive loss: errors against float64, next to those of eager PyTorch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import infonce

from .. import harness
from ..harness import EPS32, TRAIN, Leaves
from .cases import BOTH, NESTED, Case


@dataclass(frozen=True)
class Check:
    """A difficult shape: primes, one row, more candidates than a tile, prefixes inside a step."""

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
        """Return a width that exceeds the widest prefix."""
        return self.dims[-1] + 3

    @property
    def about(self) -> str:
        return f"E {self.E}, {self.Q} x {self.C}, D {self.D}, {len(self.dims)} prefixes"

    def toy(self) -> "Check":
        dims = (8, 144) if self.dims == NESTED else (8, 21)
        return replace(self, E=1, Q=min(self.Q, 9), C=min(self.C, 11), dims=dims)


def checks() -> Iterator[Check]:
    """Yield checks of few sets of prefixes, as each set and dtype is compiled again."""
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
    """Return positives in random columns, every seventh query without one, and repeated texts."""
    if not check.masks:
        return {}
    generator = torch.Generator().manual_seed(5)
    target = torch.randperm(check.C, generator=generator)[: check.Q]
    target[::7] = -1
    cand_ids = torch.randint(0, max(check.C // 4, 2), (check.C,), generator=generator)
    query_ids = cand_ids[target.clamp(min=0)]
    masks = {"target": target, "query_ids": query_ids, "cand_ids": cand_ids}
    return {name: x.to(device) for name, x in masks.items()}


def eager_table(q: Tensor, c: Tensor, check: Check, masks: dict[str, Tensor]) -> Tensor:
    """Return loss_EM by normalise, matmul and cross entropy in the dtype of the inputs."""
    Q = q.shape[1]
    target = masks.get("target", torch.arange(Q, device=q.device))
    positive = target >= 0
    own = target.clamp(min=0)
    rows = torch.arange(Q, device=q.device)
    same = torch.zeros(Q, c.shape[1], dtype=torch.bool, device=q.device)
    if "query_ids" in masks:
        same = masks["query_ids"][:, None] == masks["cand_ids"]
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
            means = [F.cross_entropy(logits[positive], at[positive]) for logits, at in losses]
            table.append(torch.stack(means).mean())
    return torch.stack(table).view(len(q), -1)


def gradients(loss_EM: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Return loss, dq and dc, with a different weight for each exit and prefix."""
    weights = torch.arange(1.0, loss_EM.numel() + 1, device=q.device).view_as(loss_EM)
    total = (loss_EM * weights.to(loss_EM.dtype)).sum()
    return loss_EM.detach(), *torch.autograd.grad(total, (q, c))


def verdict(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compare loss and gradients with float64 on the same bits.

    Floor, of the truth's size: a logit near 1 / temperature is known to one step of fp32 there,
    eps / temperature, and a gradient is rounded to its dtype, eps / 2.
    """
    random: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(17)}
    sizes = check.Q, check.C
    q, c = (torch.randn(check.E, n, check.D, device=device, **random) for n in sizes)
    given = masks(check, device)
    own = given.get("target", torch.arange(check.Q, device=device)).clamp(min=0)
    c[:, own] += q
    lengths = torch.logspace(-1, 1, check.Q, device=device)[:, None]
    q, c = (x.to(dtype).requires_grad_() for x in (q * lengths, c))
    options: dict[str, Any] = {"dims": check.dims, "temperature": check.temperature, **given}
    options |= {"directions": check.directions, "partition_mode": check.partition_mode}
    wide_q, wide_c = (x.detach().double().requires_grad_() for x in (q, c))
    truth = gradients(infonce(wide_q, wide_c, **options, impl="reference"), wide_q, wide_c)
    eager = gradients(eager_table(q, c, check, given), q, c)
    harness.poison(device)
    got, again = (gradients(infonce(q, c, **options, impl="triton"), q, c) for _ in "ab")
    step, rounding = EPS32 / check.temperature, torch.finfo(dtype).eps / 2
    floors = step, step + rounding, step + rounding
    return harness.verdict(("loss", "dq", "dc"), floors, got, again, eager, truth)


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    half = harness.dtype_on(device, torch.float32)
    return harness.gate(harness.trials(checks(), verdict, half, device, smoke))


def spot(case: Case, inputs: Leaves, mode: str, got: Any) -> dict[str, Any] | None:
    """Compare dq of the first, middle and last rows, at full size, with float64.

    With one direction a row's gradient depends on that row's softmax alone, so float64 is
    affordable; an offset beyond 2^31 would show here alone. None for other cases and modes.
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

    floor = EPS32 / case.temperature + torch.finfo(q.dtype).eps / 2
    return harness.judged(q.grad[:, rows], by_rows(q.dtype), by_rows(torch.float64), floor)
