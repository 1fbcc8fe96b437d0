"""AdamW and its schedule."""

import math

import torch

from . import config
from .model import Transformer


def adamw(model: Transformer, cfg: config.Optim) -> torch.optim.AdamW:
    """Weight decay on matrices, none on norms; fused on every device."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def learning_rate(step: int, run: config.Run) -> float:
    """Rate of step 0..steps-1: linear warm-up, then a cosine from lr to lr * min_lr_ratio."""
    cfg, warmup = run.optim, round(run.optim.warmup_ratio * run.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, run.steps - 1 - warmup)
    floor = cfg.min_lr_ratio
    return cfg.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
