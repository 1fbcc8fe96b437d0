"""What blocks keep for their backward, and how many to compute again so that it fits a budget.

A block that is recomputed keeps its input alone. All of a step's packs are alive at once.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from . import config
from .data.packing import PackedBatch, pack
from .modeling.transformer import Transformer, mode

SIZES = 256, 512  # tokens of the probe: two points of a line


@dataclass(frozen=True)
class Kept:
    """Bytes that a block keeps for a pack of T tokens: fixed + T per_token; recomputed, T input."""

    fixed: float  # weights in another dtype
    per_token: float
    input: float

    @staticmethod
    def by(model: Transformer, bf16: bool) -> "Kept":
        """Measured: what autograd saves of one block, as this machine, dtype and compiler have it.

        Args:
            bf16: under bf16 autocast.
        """
        small, large = (_saved(model, tokens, bf16) for tokens in SIZES)
        per_token = (large - small) / (SIZES[1] - SIZES[0])
        width = 2 if bf16 else model.dtype.itemsize
        return Kept(small - SIZES[0] * per_token, per_token, width * model.cfg.hidden_size)

    def blocks(self, packs: Sequence[PackedBatch], layers: int, budget: float) -> int:
        """How many layers, from the first on, to recompute for all packs to keep `budget` bytes.

        All of them where even that is too much.
        """
        whole, light = [], []
        for depth in range(1, layers + 1):
            works = [work for one in packs if (work := one.work_at(depth)) is not None]
            tokens = sum(work.tokens for work in works)
            whole.append(len(works) * self.fixed + tokens * self.per_token)
            light.append(tokens * self.input)
        kept = sum(whole)
        for recompute in range(layers):
            if kept <= budget:
                return recompute
            kept += light[recompute] - whole[recompute]
        return layers


def recomputed(
    run: config.Run, kept: Kept | None, packs: Sequence[PackedBatch], budget: float
) -> int:
    """The layers to recompute in a step of these packs, as configured, for `budget` bytes."""
    layers = run.model.num_hidden_layers
    if run.activation_checkpointing != "selective":
        return layers if run.activation_checkpointing == "block" else 0
    assert kept is not None
    return kept.blocks(packs, layers, budget)


def _saved(model: Transformer, tokens: int, bf16: bool) -> int:
    """Bytes of all memory that a block of the model saves, its weights aside."""
    batch = pack([np.zeros(32, dtype=np.int64)] * (tokens // 32)).to(model.device)
    dtype = torch.bfloat16 if bf16 else model.dtype
    x_TD = torch.ones(tokens, model.cfg.hidden_size, device=model.device, dtype=dtype)
    tables = model.rotation(batch.pos_T)
    shared = [*model.parameters(), *tables, batch.work.buffer]  # not a block's own
    known = {x.untyped_storage().data_ptr() for x in shared}
    found: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    autocast = torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()
    keeping = saved_tensors_hooks(note, lambda x: x)
    with mode(model, training=True), torch.enable_grad(), autocast, keeping:
        out = model.block(model.layers[0], x_TD.requires_grad_(), tables, batch.work)
    total = sum(found.values())
    del out  # only now: memory of what is kept is nobody else's
    return total
