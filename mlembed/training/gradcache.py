"""Batches beyond memory: the loss of all texts at once, the graphs of some at a time.

    exits_END = encode(packs)                            without a graph
    g_END = d loss(exits_END) / d exits_END              one loss, whatever the number of packs
    sum over packs of  encode(pack)^T' g                 encoded again, with a graph, one at a time

By the chain rule these are the gradients of one big batch (GradCache, arXiv 2101.06983). The second
forward is what it costs: (1 + 1 + 2) / (1 + 2) of a step's products. So packs whose graphs fit the
budget keep them and are encoded once; with all of them kept this is the ordinary step.

A pack's second forward has to be its first: the vocabulary's rank, the exits and the layers that a
text skips are drawn before either, and dropout is a function of a seed of the pack's own.

Letters: E exits, N texts, D width.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import config
from ..data.packing import PackedBatch, pack
from ..modeling.transformer import Transformer, mode
from .engine import Engine

Forward = Callable[[int, bool], Tensor]  # (number of the pack, sync) -> exits_END of it
SHARE = 0.8  # of what the probe finds free: the rest is for the loss, buckets and fragments


@dataclass(frozen=True)
class ActivationCost:
    """Bytes that a block keeps for a pack of T tokens: fixed + T per_token; recomputed, T input."""

    fixed: float  # weights in another dtype
    per_token: float
    input: float

    @staticmethod
    def by(model: Transformer, bf16: bool) -> "ActivationCost":
        """Measured: what autograd saves of one block, as this machine, dtype and compiler have it.

        Args:
            bf16: under bf16 autocast.
        """
        small, large = (_saved(model, tokens, bf16) for tokens in SIZES)
        per_token = (large - small) / (SIZES[1] - SIZES[0])
        width = 2 if bf16 else model.dtype.itemsize
        return ActivationCost(
            small - SIZES[0] * per_token, per_token, width * model.cfg.hidden_size
        )

    def blocks(self, packs: Sequence[PackedBatch], layers: int, budget: float) -> int:
        """How many layers, from the first on, to recompute for all packs to keep `budget` bytes.

        All of them where even that is too much.
        """
        whole, light = [], []
        for depth in range(1, layers + 1):
            works = [plan for one in packs if (plan := one.work_at(depth)) is not None]
            tokens = sum(plan.tokens for plan in works)
            whole.append(len(works) * self.fixed + tokens * self.per_token)
            light.append(tokens * self.input)
        kept = sum(whole)
        for recompute in range(layers):
            if kept <= budget:
                return recompute
            kept += light[recompute] - whole[recompute]
        return layers


def recomputed(
    run: config.Run, kept: ActivationCost | None, packs: Sequence[PackedBatch], budget: float
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
    shared = [*model.parameters(), *tables, batch.plan.buffer]  # not a block's own
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
        out = model.block(model.layers[0], x_TD.requires_grad_(), tables, batch.plan)
    total = sum(found.values())
    del out  # only now: memory of what is kept is nobody else's
    return total


def gradients(
    engine: Engine,
    forward: Forward,
    loss: Callable[[Tensor], Tensor],
    keeps: Sequence[bool],
    final: int,
    *,
    sync: bool,
) -> None:
    """Add the gradients of loss(exits of all packs, one after the other) to the parameters'.

    Args:
        forward: encodes a pack, to the same vectors each time. Its `sync` and `engine`'s: whether
            what follows is the last backward of the step, which reduces over processes.
        loss: exits_END fp32 -> scalar. It is called once, and may communicate.
        keeps: of each pack, whether its graph is kept; see `keeping`.
        final: the pack whose backward comes last; it has a text of full depth, so that its backward
            reaches every layer on every process, whatever else these keep.
        sync: whether this is the last pass of a step.
    """
    at_once = all(keeps)
    outputs = []
    for i, kept in enumerate(keeps):
        with torch.set_grad_enabled(kept):
            outputs.append(forward(i, sync and at_once))
    leaf_END = torch.cat([part.detach() for part in outputs], dim=1).requires_grad_()
    loss(leaf_END).backward()
    assert leaf_END.grad is not None
    grads = leaf_END.grad.split([part.shape[1] for part in outputs], dim=1)
    order = sorted(range(len(keeps)), key=lambda i: i == final)
    if held := [i for i in order if keeps[i]]:
        engine.backward([outputs[i] for i in held], [grads[i] for i in held], sync=sync and at_once)
    del outputs  # kept graphs are gone before the first of the others is made
    for i in order:
        if not keeps[i]:
            last = sync and i == final
            engine.backward([forward(i, last)], [grads[i]], sync=last)


def keeping(
    run: config.Run, kept: ActivationCost | None, packs: Sequence[PackedBatch], budget: float
) -> tuple[list[bool], list[int], int]:
    """Which packs keep their graphs, how many layers of each are recomputed, and the final pack.

    Without the gradient cache all are kept. With it the largest graphs that fit come first, as they
    save most work; the final pack's is kept only if all are, as something has to come last.

    Args:
        kept: bytes that blocks keep; needed with the gradient cache and selective checkpointing.
        budget: bytes for graphs. A graph that is made again has it for itself.
    """
    layers = run.model.num_hidden_layers
    deepest = [i for i, pack in enumerate(packs) if pack.work_at(layers) is not None]
    final = min(deepest, key=lambda i: packs[i].plan.tokens)
    if not run.gradient_cache:
        again = recomputed(run, kept, packs, budget)
        return [True] * len(packs), [again] * len(packs), final
    assert kept is not None
    each = [recomputed(run, kept, [pack], budget) for pack in packs]
    sizes = [graph_bytes(kept, *pair, layers) for pair in zip(packs, each, strict=True)]
    if sum(sizes) <= budget:
        return [True] * len(packs), each, final
    keeps, left = [False] * len(packs), budget
    for i in sorted(set(range(len(packs))) - {final}, key=lambda i: -sizes[i]):
        if sizes[i] <= left:
            keeps[i], left = True, left - sizes[i]
    return keeps, each, final


def graph_bytes(kept: ActivationCost, pack: PackedBatch, recompute: int, layers: int) -> float:
    """Bytes that a pack's graph holds when its first `recompute` layers are computed again."""
    total = 0.0
    for depth in range(1, layers + 1):
        if (plan := pack.work_at(depth)) is not None:
            light = depth <= recompute
            total += plan.tokens * (kept.input if light else kept.per_token)
            total += 0.0 if light else kept.fixed
    return total


@contextmanager
def drawing(seed: Sequence[int], p: float, device: torch.device) -> Iterator[None]:
    """Random numbers inside are a function of `seed`; other draws are as if there were none.

    Args:
        seed: e.g. run's seed, step, pass, process, pack.
        p: the dropout; 0 leaves the generators alone.
    """
    if not p:
        yield
        return
    state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(state[0]))
        yield


# ---- how much memory there is ----


def budget_bytes(run: config.Run, model: Transformer, device: torch.device) -> float:
    """The configured budget, or SHARE of what is free, less what training has yet to allocate.

    Ask before the first step, with the whole model on the device: gradients and two moments in fp32
    are to come, as much as the parameters each (FSDP: gradients and a copy of the weights until the
    last backward, moments in shards).

    Raises:
        ValueError: nothing is left.
    """
    if run.activation_gib:
        return run.activation_gib * 2**30
    numbers = sum(p.numel() for p in model.parameters())
    free = free_bytes(device)
    budget = SHARE * (free - 12.0 * numbers)
    if budget <= 0:
        raise ValueError(
            f"activation_gib: expected memory beyond the {12 * numbers / 2**30:.1f} GiB of "
            f"gradients and moments, found {free / 2**30:.1f} GiB free on {device}"
        )
    return budget


def free_bytes(device: torch.device) -> float:
    """Bytes: of the device, or this process's part of what the host can give."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 2**19
    free = float(pages * os.sysconf("SC_PAGE_SIZE"))
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            free = float(line.split()[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":  # a container's
        free = min(free, float(most) - float(used.read_text()))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


SIZES = 256, 512  # tokens of the probe: two points of a line
