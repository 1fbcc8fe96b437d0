"""The optimiser of a run, AdamW for bf16 weights that are rounded stochastically, and the rates."""

import math
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from mlembed_kernels import stochastic_adamw

from .. import config
from .muon import MuonWithAdamW


def to_weights(model: nn.Module, cfg: config.Optim) -> None:
    """Cast matrices to bf16 in place if `weights` is bf16; norms stay fp32."""
    if cfg.weights == "bf16":
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()


def optimizer_of(model: nn.Module, cfg: config.Optim, seed: int = 0) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, for bf16 weights StochasticAdamW, or MuonWithAdamW.

    Norms have no weight decay. A group's `share` is the factor of its rate, see `rate_share`, and
    `muon` tells the matrices of layers if `cfg.name` is muon.
    """
    named = list(model.named_parameters())
    depth = sum(name.startswith("layers.") for name in {layer_of(name) for name, _ in named})
    by_kind: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, p in named:
        layer = layer_of(name)
        muon = cfg.name == "muon" and p.ndim == 2 and layer.startswith("layers.")
        share = rate_share(layer, depth, cfg.layer_decay)
        by_kind.setdefault((muon, p.ndim > 1, share), []).append(p)
    groups: list[dict[str, Any]] = [
        {
            "params": some,
            "muon": muon,
            "weight_decay": cfg.weight_decay if matrices else 0.0,
            "share": share,
            "lr": share * cfg.lr,
        }
        for (muon, matrices, share), some in sorted(
            by_kind.items(), key=lambda item: item[0][:2], reverse=True
        )
    ]
    if cfg.name == "muon":
        return MuonWithAdamW(groups, cfg)
    if cfg.weights == "bf16":
        return StochasticAdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, seed=seed)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def layer_of(name: str) -> str:
    """Return `layers.3` of `layers.3.mlp.up_proj.weight`, `embed_tokens` of `embed_tokens.U`."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "layers" else 1])


def rate_share(layer: str, depth: int, decay: float) -> float:
    """Return decay to the power of how far a layer is from the last one, tokens and places below.

    All that is neither a layer nor an embedding has 1.
    """
    if layer.startswith("embed_"):
        return decay**depth
    name, _, place = layer.partition(".")
    return float(decay ** (depth - 1 - int(place))) if name == "layers" else 1.0


def prepare(
    optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float, found_inf: Tensor
) -> None:
    """Let the optimiser's next step clip gradients and, where `found_inf` is 1, change nothing.

    The step reads both on the device of its weights and clips as it reads the gradients, like
    torch.nn.utils.clip_grads_with_norm_. The host waits only for weights in host memory (FSDP's
    `cpu_offload`), which it updates itself.

    Args:
        norm: 0-dim, norm of all gradients. found_inf: fp32 0-dim, 0 or 1.
    """
    device = optimizer.param_groups[0]["params"][0].device
    scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    vars(optimizer)["grad_scale"] = scale.to(device, torch.float32)
    vars(optimizer)["found_inf"] = found_inf.to(device)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bf16 parameters without fp32 masters: `stochastic_adamw` of the kernels.

    fp32 parameters are updated by torch's fused AdamW. The state has torch's names and is on the
    parameters' device. Like torch's, `step` reads `grad_scale` and `found_inf` if they are set. The
    rounding draws from `seed` and the parameter's place among all, so replicas stay equal. Restore
    the state with checkpoint.restore: load_state_dict would cast moments to the weights' dtype.

    Raises:
        ValueError: parameters that are neither fp32 nor bf16.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(params, defaults)
        self.seed = seed
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
        numbers = count()
        for group in self.param_groups:
            numbered = [(p, number) for p, number in zip(group["params"], numbers, strict=False)]
            for dtype in (torch.bfloat16, torch.float32):
                some = [(p, i) for p, i in numbered if p.grad is not None and p.dtype is dtype]
                if some:
                    self._update([p for p, _ in some], [i for _, i in some], group)
        return loss

    def _update(self, parameters: list[Tensor], numbers: list[int], group: dict[str, Any]) -> None:
        """Step some parameters of one dtype."""
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        firsts, seconds, steps = (
            [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        options = {key: group[key] for key in ("lr", "eps", "weight_decay")}
        options |= {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
        if parameters[0].dtype == torch.bfloat16:
            stochastic_adamw(
                parameters, grads, firsts, seconds, steps,
                betas=group["betas"], seed=self.seed, numbers=numbers, **options,
            )  # fmt: skip
        else:
            beta1, beta2 = group["betas"]
            fused_adamw(
                parameters, grads, firsts, seconds, [], steps,
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **options,
            )  # fmt: skip


def learning_rate(step: int, run: config.Run) -> float:
    """Return the rate of step 0..steps-1: linear warm-up, then the schedule to the minimum."""
    cfg = run.optim
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * run.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    begin = warmup
    if cfg.schedule == "wsd":
        begin = max(warmup, run.steps - 1 - max(1, round(cfg.decay_ratio * run.steps)))
    done = max(0, step - begin) / max(1, run.steps - 1 - begin)
    left = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "wsd": 1 - math.sqrt(done),
        "constant": 1.0,
    }[cfg.schedule]
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left)


def set_rates(optimizer: torch.optim.Optimizer, step: int, run: config.Run) -> None:
    """Give every group its share of the rate of a step."""
    for group in optimizer.param_groups:
        group["lr"] = group["share"] * learning_rate(step, run)
