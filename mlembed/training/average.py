"""Moving averages of the weights, which are scored and exported instead of the last step's.

With weights w_t after step t = 0, 1, .. and the run's decay d (optim.ema), a_0 = w_0 and

    a_t = a_(t-1) + (1 - min(d, (1 + t) / (10 + t))) (w_t - a_(t-1))

so that the first weights do not stay in a short run's average. The averages are part of the
optimiser's state, so checkpoints have them, and shards average their own numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .engine import local

KEY = "average"


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, decay: float, step: int, found_inf: Tensor) -> None:
    """Add the weights after a step to the averages, unless `found_inf` is 1.

    The host waits for nothing.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    for parameter, state in optimizer.state.items():
        if KEY in state:
            weight = (share * (1 - found_inf)).to(parameter.device, parameter.dtype)
            local(state[KEY]).lerp_(local(parameter), weight)
        else:
            state[KEY] = parameter.detach().clone()


@contextmanager
def swapped(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let weights that have averages be these inside, and the last step's again after it."""
    _swap(optimizer)
    try:
        yield
    finally:
        _swap(optimizer)


@torch.no_grad()
def take(optimizer: torch.optim.Optimizer) -> bool:
    """Set weights to their averages for good; return whether there are any."""
    averaged = [(p, state[KEY]) for p, state in optimizer.state.items() if KEY in state]
    for parameter, average in averaged:
        local(parameter).copy_(local(average))
    return bool(averaged)


@torch.no_grad()
def _swap(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        if KEY in state:
            one, other = local(parameter), local(state[KEY])
            last = one.clone()
            one.copy_(other)
            other.copy_(last)
