"""AdamW with fp32 weights, or with bf16 weights rounded stochastically, and its schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import config

CHUNK = 2**24  # elements updated at once, whose three fp32 copies take 192 MiB


def to_weights(model: nn.Module, cfg: config.Optim) -> None:
    """Cast matrices to bf16 in place if `weights` is bf16; norms stay fp32."""
    if cfg.weights == "bf16":
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()


def adamw(model: nn.Module, cfg: config.Optim) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, for bf16 weights StochasticAdamW; norms have no weight decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    if cfg.weights == "bf16":
        return StochasticAdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) as torch computes it, for bf16 parameters without fp32 masters.

    Moments and update are fp32, and the new bf16 weight is rounded stochastically: a bf16 step is
    at least 2^-8 of a weight, and rounding to nearest would lose every update below half of that.
    fp32 parameters are updated like torch.optim.AdamW's.

    The state has torch's names; `step` stays on the host, so that reading it never waits. Rounding
    draws from the device's default generator, so replicas with equal seeds stay equal. Restore the
    state with checkpoint.restore: load_state_dict would cast moments to the weights' dtype.

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
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        if others := sorted(map(str, dtypes - {torch.float32, torch.bfloat16})):
            raise ValueError(f"weights: expected fp32 or bf16 parameters, got {', '.join(others)}")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Step every parameter that has a gradient, and return the closure's loss."""
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
        # load_state_dict may put it on the device.
        state["step"] = state["step"].cpu() + 1
        step = state["step"].item()
        # A gradient may be strided.
        weights, grads = parameter.view(-1), parameter.grad.reshape(-1)
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
    """Update a piece [n] of a parameter in place, with torch's operations in torch's order."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    # An fp32 weight is not copied.
    wide, grad = weight.float(), grad.float()
    wide.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    wide.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    # Rounding needs their memory.
    del grad, denominator
    if wide is not weight:
        weight.copy_(rounded(wide))


def rounded(x: Tensor) -> Tensor:
    """Round fp32 to one of the two neighbouring bf16, drawn so that the expectation is x.

    A bf16 is the upper half of an fp32. Adding 16 random bits to the lower half carries into the
    upper half with probability (lower half) / 2^16, the position of x between its neighbours, for
    both signs and for subnormals. Beyond the largest finite bf16, infinities and NaN included, it
    rounds to nearest.
    """
    noise = torch.randint_like(x, 1 << 16, dtype=torch.int32)
    drawn = noise.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
    # The comparison is false for NaN.
    inside = x.abs() <= torch.finfo(torch.bfloat16).max
    return torch.where(inside, drawn, x).bfloat16()


def learning_rate(step: int, run: config.Run) -> float:
    """Return the rate of step 0..steps-1: linear warm-up, then cosine or linear to the minimum."""
    cfg = run.optim
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * run.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, run.steps - 1 - warmup)
    floor = cfg.min_lr_ratio
    left = 1 - done if cfg.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return cfg.lr * (floor + (1 - floor) * left)
