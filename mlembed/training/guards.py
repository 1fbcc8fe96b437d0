"""What goes wrong in a long run, said so that something can be done: numbers that are not finite,
and memory that is not there."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import config

GIB = 2**30


def bad_loss(table_EM: Tensor, exits: Sequence[int], dims: Sequence[int]) -> str | None:
    """The first entry of loss_EM [E, M] that is no finite number, by name."""
    bad = (~table_EM.isfinite()).nonzero().tolist()
    if not bad:
        return None
    e, m = bad[0]
    return f"loss of exit {exits[e]} at width {dims[m]} is {table_EM[e, m].item()}"


def bad_weight(model: nn.Module) -> str | None:
    """The first parameter with a number that is not finite (of a shard: this process's part)."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not local.isfinite().all():
            return f"weight {name}"
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether it is the device's or the host's allocator that gave up."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def oom_advice(
    error: Exception, run: config.Run, step: int, tokens: int, graphs: float, free: float
) -> str:
    """Which knob to turn after `out_of_memory`, and to what.

    Args:
        tokens: of the largest pack of the step.
        graphs: bytes that the step's graphs were allowed, or were held at least.
        free: bytes that were free when it happened.

    What is missing is the request that failed less what was free; a knob that scales the graphs has
    to take that, and a tenth more, from them.
    """
    asked = _asked(str(error))
    missing = max(asked - free, 0.1 * asked)
    if run.gradient_cache and graphs > 1.1 * missing:
        gib = max(graphs - 1.1 * missing, 2**20) / GIB
        knob = f"--activation-gib {gib:.3g} (it was {graphs / GIB:.3g}), which keeps fewer graphs"
    elif run.gradient_cache:
        knob = f"--pack-tokens {max(tokens // 2, 1)} (the largest pack had {tokens})"
    else:
        knob = (
            f"--gradient-cache, whose graphs take one pack of {tokens} tokens at a time, then "
            f"--pack-tokens {max(tokens // 2, 1)} to halve that"
        )
    return (
        f"memory: expected {asked / GIB:.3g} GiB more at step {step}, short by at least "
        f"{missing / GIB:.3g} GiB; try {knob}"
    )


def _asked(message: str) -> float:
    """Bytes of the request that failed, as torch's message has them."""
    found = re.search(r"allocate (?:memory: you tried to allocate )?([\d.]+) ?(\w+)", message)
    units = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
    return float(found[1]) * units.get(found[2], 1) if found else 0.0
