"""Gradient cache: one loss over all texts of a batch, with the graphs of some packs at a time.

    exits_END = encode(packs)                            without a graph
    g_END = d loss(exits_END) / d exits_END              one loss, for any number of packs
    sum over packs of  encode(pack)^T' g                 encode again with a graph, pack by pack

By the chain rule these are the gradients of one big batch (GradCache, arXiv 2101.06983). The second
forward costs (1 + 1 + 2) / (1 + 2) of a step's products. Packs whose graphs fit the budget keep
them and are encoded once; if all fit, this is the ordinary step.

A pack's second forward has to equal its first, so rank, exits and skipped layers are drawn before
either, and dropout is a function of a seed of the pack's own.

Letters: E exits, N texts, D width, T tokens.
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
from torch.utils._pytree import tree_leaves

from .. import config
from ..data.packing import PackedBatch, pack
from ..modeling.transformer import Transformer, mode
from ..runtime.profiling import span
from .engine import Engine

Forward = Callable[[int, bool], Tensor]  # (number of the pack, sync) -> exits_END
SHARE = 0.8  # of the free memory goes to graphs, the rest to the loss, buckets and fragments
SIZES = 256, 512  # tokens of the two packs that measure the bytes per token

# ---- gradients of a batch ----


def gradients(
    engine: Engine,
    forward: Forward,
    loss: Callable[[Tensor], Tensor],
    keeps: Sequence[bool],
    final: int,
    *,
    sync: bool,
) -> None:
    """Add the gradients of loss(exits_END of all packs, concatenated) to the parameters'.

    Args:
        forward: encodes a pack, to the same vectors each time. Its `sync`, like `engine`'s, tells
            that the backward that follows is the last of the step and reduces over processes.
        loss: exits_END fp32 -> scalar. It is called once and may communicate.
        keeps: whether each pack keeps its graph; see `choose_graphs`.
        final: the pack whose backward comes last. A text of it runs to full depth, so that its
            backward reaches every layer on every process, whichever graphs they keep.
        sync: this is the last pass of a step.
    """

    def backward(outputs: list[Tensor], grads: list[Tensor], sync: bool) -> None:
        with span("backward"):
            engine.backward(outputs, grads, sync=sync)

    at_once = all(keeps)
    outputs = []
    for i, keep in enumerate(keeps):
        with torch.set_grad_enabled(keep):
            outputs.append(forward(i, sync and at_once))
    leaf_END = torch.cat([part.detach() for part in outputs], dim=1).requires_grad_()
    value = loss(leaf_END)
    with span("backward"):
        value.backward()
    del value
    assert leaf_END.grad is not None
    grads = leaf_END.grad.split([part.shape[1] for part in outputs], dim=1)
    order = sorted(range(len(keeps)), key=lambda i: i == final)
    if kept := [i for i in order if keeps[i]]:
        backward([outputs[i] for i in kept], [grads[i] for i in kept], sync and at_once)
    # The kept graphs have to be freed before the first of the other packs builds its graph.
    del outputs
    for i in order:
        if not keeps[i]:
            last = sync and i == final
            backward([forward(i, last)], [grads[i]], last)


@contextmanager
def seeded_dropout(seed: Sequence[int], p: float, device: torch.device) -> Iterator[None]:
    """Draw random numbers inside as a function of `seed`, and leave the generators unchanged.

    p: dropout; with 0 nothing happens.
    """
    if not p:
        yield
        return
    state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(state[0]))
        yield


# ---- which graphs to keep ----


@dataclass(frozen=True)
class ActivationCost:
    """Bytes that a block saves for a pack of T tokens: fixed + T per_token; recomputed: T input."""

    fixed: float  # copies of weights in another dtype
    per_token: float
    input: float

    @staticmethod
    def measure(model: Transformer, bf16: bool) -> "ActivationCost":
        """Measure what autograd saves of one block on this machine. bf16: under bf16 autocast."""
        small, large = (_saved_bytes(model, tokens, bf16) for tokens in SIZES)
        per_token = (large - small) / (SIZES[1] - SIZES[0])
        itemsize = 2 if bf16 else model.dtype.itemsize
        return ActivationCost(
            small - SIZES[0] * per_token, per_token, itemsize * model.cfg.hidden_size
        )

    def of_layers(self, m: config.Model, packs: Sequence[PackedBatch]) -> list[tuple[float, float]]:
        """Return the bytes that each layer saves for the packs, and those if it is recomputed."""
        costs = []
        for layer in range(1, m.num_hidden_layers + 1):
            runs = [pack.plan_at(depth) for depth in m.depths_of(layer) for pack in packs]
            plans = [plan for plan in runs if plan is not None]
            tokens = sum(plan.tokens for plan in plans)
            saved = len(plans) * self.fixed + tokens * self.per_token
            costs.append((saved, tokens * self.input))
        return costs

    def blocks(self, m: config.Model, packs: Sequence[PackedBatch], budget: float) -> int:
        """Return how many layers, from the first on, to recompute to fit `budget`; at most all."""
        costs = self.of_layers(m, packs)
        total = sum(saved for saved, _ in costs)
        for recompute, (saved, light) in enumerate(costs):
            if total <= budget:
                return recompute
            total += light - saved
        return len(costs)


def _saved_bytes(model: Transformer, tokens: int, bf16: bool) -> int:
    """Return the bytes that a block of the model saves for `tokens` tokens, without its weights."""
    batch = pack([np.zeros(32, dtype=np.int64)] * (tokens // 32)).to(model.device)
    dtype = torch.bfloat16 if bf16 else model.dtype
    x_TD = torch.ones(tokens, model.cfg.hidden_size, device=model.device, dtype=dtype)
    tables = model.rotation(batch.pos_T)
    # All blocks share this memory.
    shared = [*model.parameters(), *tree_leaves(tables), batch.plan.buffer]
    known = {x.untyped_storage().data_ptr() for x in shared if isinstance(x, Tensor)}
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    autocast = torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()
    hooks = saved_tensors_hooks(note, lambda x: x)
    with mode(model, training=True), torch.enable_grad(), autocast, hooks:
        out = model.block(model.layers[0], x_TD.requires_grad_(), tables, batch.plan)
    total = sum(sizes.values())
    # `out` keeps the saved memory alive until here, so that no two tensors share an address.
    del out
    return total


def choose_graphs(
    run: config.Run, cost: ActivationCost | None, packs: Sequence[PackedBatch], budget: float
) -> tuple[list[bool], list[int], int]:
    """Choose which packs keep their graphs, how many layers each recomputes, and the final pack.

    Without the gradient cache all packs keep their graphs. With it the largest graphs that fit come
    first, as they save most work. The final pack keeps its graph only if all packs do, because its
    backward has to come last.

    Args:
        cost: bytes that blocks save; needed for the gradient cache and selective checkpointing.
        budget: bytes for graphs. A pack that is encoded again may use the whole budget.
    """
    depth = run.model.num_hidden_layers
    deepest = [i for i, pack in enumerate(packs) if pack.plan_at(depth) is not None]
    final = min(deepest, key=lambda i: packs[i].plan.tokens)
    if not run.gradient_cache:
        recompute = layers_to_recompute(run, cost, packs, budget)
        return [True] * len(packs), [recompute] * len(packs), final
    assert cost is not None
    each = [layers_to_recompute(run, cost, [pack], budget) for pack in packs]
    sizes = [graph_bytes(cost, run.model, *pair) for pair in zip(packs, each, strict=True)]
    if sum(sizes) <= budget:
        return [True] * len(packs), each, final
    keeps, left = [False] * len(packs), budget
    for i in sorted(set(range(len(packs))) - {final}, key=lambda i: -sizes[i]):
        if sizes[i] <= left:
            keeps[i], left = True, left - sizes[i]
    return keeps, each, final


def layers_to_recompute(
    run: config.Run, cost: ActivationCost | None, packs: Sequence[PackedBatch], budget: float
) -> int:
    """Return how many layers to recompute in a step of these packs: none, all, or by budget."""
    layers = run.model.num_hidden_layers
    if run.activation_checkpointing != "selective":
        return layers if run.activation_checkpointing == "block" else 0
    assert cost is not None
    return cost.blocks(run.model, packs, budget)


def graph_bytes(cost: ActivationCost, m: config.Model, pack: PackedBatch, recompute: int) -> float:
    """Return the bytes of a pack's graph whose first `recompute` layers are recomputed."""
    costs = enumerate(cost.of_layers(m, [pack]))
    return sum(light if i < recompute else saved for i, (saved, light) in costs)


# ---- how much memory there is ----


def budget_bytes(run: config.Run, model: Transformer, device: torch.device) -> float:
    """Return the configured budget, or SHARE of the free memory that training leaves for graphs.

    Call it before the first step, with the model on the device: gradients and two fp32 moments, as
    large as the trained parameters, are still to come (FSDP: moments in shards, a copy of the
    weights).

    Raises:
        ValueError: gradients and moments leave no memory.
    """
    if run.activation_gib:
        return run.activation_gib * 2**30
    copies = 4 * (run.engine == "fsdp")
    needs = sum(p.numel() * (12 if p.requires_grad else copies) for p in model.parameters())
    free = free_bytes(device)
    budget = SHARE * (free - needs)
    if budget <= 0:
        raise ValueError(
            f"activation_gib: expected memory beyond the {needs / 2**30:.1f} GiB of "
            f"gradients and moments, got {free / 2**30:.1f} GiB free on {device}"
        )
    return budget


def free_bytes(device: torch.device) -> float:
    """Return the free bytes of a GPU, or this process's part of those of the host."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 2**19
    free = float(pages * os.sysconf("SC_PAGE_SIZE"))
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            free = float(line.split()[1]) * 1024
    # A container may have less than its host.
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, float(most) - float(used.read_text()))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
