"""AdamW, with fp32 weights or with bf16 ones rounded stochastically, and its schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import config

CHUNK = 2**24  # elements updated at once: three fp32 copies of so many take 192 MiB


def to_weights(model: nn.Module, cfg: config.Optim) -> None:
    """With `weights` bf16, cast matrices to it in place (norms stay fp32); else do nothing."""
    if cfg.weights == "bf16":
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()


def adamw(model: nn.Module, cfg: config.Optim) -> torch.optim.Optimizer:
    """Weight decay on matrices, none on norms. fp32 weights, shards of them (FSDP2) as well:
    torch's, fused on every device; bf16 ones (what `to_weights` made): StochasticAdamW."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if cfg.weights == "bf16":
        return StochasticAdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) as torch computes it, for bf16 parameters without fp32 masters.

    Moments are fp32, the update is computed in fp32 from the bf16 weight, and the new weight is
    rounded stochastically: a bf16 step is at least 2^-8 of a weight, and rounding to nearest would
    lose every update below half of it. fp32 parameters get what torch.optim.AdamW gives them.

    State as torch's: `exp_avg`, `exp_avg_sq` and `step`, which stays on the host, where reading it
    waits for nothing. Random numbers are those of the device's default generator: replicas of a
    distributed run stay equal as long as they draw alike from generators that were seeded alike.
    State goes on by checkpoint.restore; load_state_dict would cast moments to the weights' dtype.

    Raises:
        ValueError: parameters that are neither fp32 nor bf16.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        found = {p.dtype for group in self.param_groups for p in group["params"]}
        if odd := sorted(map(str, found - {torch.float32, torch.bfloat16})):
            raise ValueError(f"weights: expected fp32 or bf16 parameters, got {', '.join(odd)}")

    @torch.no_grad()
    def step(  # type: ignore[override]  # declared there as two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step for every parameter that has a gradient; -> what `closure` gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        assert state["exp_avg"].dtype == torch.float32, "expected fp32 moments: load_state_dict?"
        state["step"] = state["step"].cpu() + 1  # where load_state_dict may put it elsewhere
        step = state["step"].item()
        weights, grads = parameter.view(-1), parameter.grad.reshape(-1)  # which may be strided
        firsts, seconds = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for i in range(0, len(weights), CHUNK):
            piece = slice(i, i + CHUNK)
            _adamw(weights[piece], grads[piece], firsts[piece], seconds[piece], step, group)


def _adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    group: dict[str, Any],
) -> None:
    """One piece [n] of a parameter, in place, with torch's operations in torch's order."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    wide, grad = weight.float(), grad.float()  # an fp32 weight is `wide` itself
    wide.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    wide.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    del grad, denominator  # rounding needs as much again
    if wide is not weight:
        weight.copy_(rounded(wide))


def rounded(x: Tensor) -> Tensor:
    """fp32 -> bf16 of the same shape, one of the two neighbours of x, drawn so that E = x.

    A bf16 is the upper half of an fp32. Adding 16 random bits to the lower half carries into the
    upper one with probability (lower half) / 2^16, which is how far x is on the way to the next
    bf16, for either sign and for subnormals; then the lower half is cut. Beyond the largest finite
    bf16 (infinities and NaN too) it is rounding to nearest.
    """
    noise = torch.randint_like(x, 1 << 16, dtype=torch.int32)
    drawn = noise.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
    inside = x.abs() <= torch.finfo(torch.bfloat16).max  # no NaN is
    return torch.where(inside, drawn, x).bfloat16()


def learning_rate(step: int, run: config.Run) -> float:
    """Rate of step 0..steps-1: linear warm-up, then a cosine or a line, lr to lr * min_lr_ratio."""
    cfg = run.optim
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * run.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, run.steps - 1 - warmup)
    floor = cfg.min_lr_ratio
    left = 1 - done if cfg.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return cfg.lr * (floor + (1 - floor) * left)
