"""Muon for the matrices of the layers, AdamW for all else: two optimisers of torch as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import config


class MuonWithAdamW(torch.optim.Optimizer):
    """Step groups whose `muon` is true by torch.optim.Muon, others by torch's fused AdamW.

    Muon's update is the orthogonalised momentum, scaled to the size of AdamW's, so that rates and
    weight decay of AdamW hold (`match_rms_adamw`; Keller Jordan's Muon, and arXiv 2502.16982). Both
    share this optimiser's groups and state. Like torch's fused AdamW, `step` reads `grad_scale` and
    `found_inf` if they are set, Muon's part on the host, which waits for the norm of the gradients.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], cfg: config.Optim) -> None:
        super().__init__(groups, {"lr": cfg.lr})
        matrices = [group for group in self.param_groups if group["muon"]]
        rest = [group for group in self.param_groups if not group["muon"]]
        self.matrices = torch.optim.Muon(
            matrices, lr=cfg.lr, momentum=cfg.momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.rest = torch.optim.AdamW(rest, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        self.matrices.state = self.rest.state = self.state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Step every parameter that has a gradient, and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        vars(self.rest).update(grad_scale=self.grad_scale, found_inf=self.found_inf)
        self.rest.step()
        given = [x for x in (self.grad_scale, self.found_inf) if x is not None]
        scale, found = torch.stack(given).tolist() if len(given) == 2 else (1.0, 0.0)
        if not found:
            for group in self.matrices.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
            self.matrices.step()
        return loss
