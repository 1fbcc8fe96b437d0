"""Name the first NaN or infinity of a step, and advise when memory runs out."""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import config
from ..modeling.transformer import Transformer
from ..runtime.distributed import World, any_process
from .engine import local

GIB = 2**30

# ---- NaN and infinity ----


def non_finite(model: Transformer, where: World, losses: Mapping[str, Tensor]) -> str:
    """Name the first tensor that is not finite, in the order weights, losses, gradients.

    All processes call it and agree on whether it is a weight. Each names the weight or the loss of
    its own, and all the same gradient. losses: loss_EM of each term.
    """
    exits, dims = model.cfg.exits, model.cfg.matryoshka_dims
    gradient, weight = bad_gradient(model), bad_weight(model)
    if any_process(weight is not None, where):
        return weight or "weight on another process"
    for name, loss_EM in losses.items():
        if bad := bad_loss(loss_EM, exits, dims):
            return f"{name} {bad}"
    return gradient or "gradient norm"


def bad_loss(loss_EM: Tensor, exits: Sequence[int], dims: Sequence[int]) -> str | None:
    """Name the first entry of loss_EM [E, M] that is not finite; None if all are."""
    bad = (~loss_EM.isfinite()).nonzero().tolist()
    if not bad:
        return None
    e, m = bad[0]
    return f"loss of exit {exits[e]} at width {dims[m]} ({loss_EM[e, m].item()})"


def bad_weight(model: nn.Module) -> str | None:
    """Name the first parameter that is not finite; of a sharded one this process sees its shard."""
    for name, parameter in model.named_parameters():
        if not local(parameter).isfinite().all():
            return f"weight {name}"
    return None


def bad_gradient(model: nn.Module) -> str | None:
    """Name the first parameter whose gradient is not finite on any process; all call it."""
    named = [(name, local(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
    bad = (i for i, (_, grad) in enumerate(named) if not grad.isfinite().all())
    first = torch.tensor(next(bad, len(named)))
    if dist.is_initialized():
        # NCCL reduces device memory only, and gradients may be in host memory.
        first = first.cuda() if dist.get_backend() == "nccl" else first
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return f"gradient of {named[int(first)][0]}" if first < len(named) else None


# ---- memory ----


def out_of_memory(error: Exception) -> bool:
    """Return whether the allocator of the device or of the host raised the error."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def oom_advice(
    error: Exception, run: config.Run, step: int, tokens: int, graphs: float, free: float
) -> str:
    """Return which option to lower after `out_of_memory`, and to which value.

    The step lacks the bytes of the failed request minus the free ones. A smaller budget for graphs
    has to give up that and a tenth more.

    Args:
        tokens: tokens of the largest pack of the step.
        graphs: budget of the step's graphs in bytes, inf without one.
        free: bytes that were free when the request failed.
    """
    request = _requested(str(error))
    missing = max(request - free, 0.1 * request)
    if run.gradient_cache and graphs > 1.1 * missing:
        gib = max(graphs - 1.1 * missing, 2**20) / GIB
        option = f"--activation-gib {gib:.3g} (was {graphs / GIB:.3g}), which keeps fewer graphs"
    elif run.gradient_cache:
        option = f"--pack-tokens {max(tokens // 2, 1)} (the largest pack had {tokens})"
    else:
        option = (
            f"--gradient-cache, whose graphs take one pack of {tokens} tokens at a time, then "
            f"--pack-tokens {max(tokens // 2, 1)} to halve that"
        )
    return (
        f"memory: out of memory at step {step}, which asked for {request / GIB:.3g} GiB and is "
        f"short by at least {missing / GIB:.3g} GiB; try {option}"
    )


def _requested(message: str) -> float:
    """Parse the bytes of the failed request from torch's message; 0 if it has none."""
    match = re.search(r"allocate (?:memory: you tried to allocate )?([\d.]+) ?(\w+)", message)
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
    return float(match[1]) * units.get(match[2], 1) if match else 0.0
