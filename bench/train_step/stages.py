"""The time of one step by stage: every kernel of a profiled step is assigned to a stage.

Kernels of embedding, loss and optimiser are recognised by the time at which they run: hooks on the
embedding and on the pooled exits put marks into the device's queue, forward and backward. Kernels
of the blocks are recognised by name, ours by the names in their modules. The rest is `other`.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import harness
from .cases import Texts, Trained

WHEN = "embedding", "loss", "optimiser"  # recognised by the time at which they run
STAGES = WHEN[0], "attention", "products", "point-wise", *WHEN[1:], "copies", "other"
MODULES = {
    "attention": ("attention._forward", "attention._backward"),
    "embedding": ("embedding._op",),
    "optimiser": ("optimiser._op",),
    "loss": tuple(
        f"similarity.{name}"
        for name in ("_lse_forward", "_lse_logs", "_lse_backward", "_cosine_op", "_bands", "_tiles")
    ),
}
# Parts of names, in lower case; the first that occurs decides. Names of flash attention contain
# CUTLASS, so attention comes before products. aten:: are operators, on CPUs.
PARTS = {
    "attention": ("flash", "fmha", "attention", "scaled_dot_product"),
    "products": (
        *("nvjet", "gemm", "gemv", "cutlass", "xmma", "cublas", "splitk", "triton_tem"),
        "triton_mm",
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
    ),
    "copies": (
        *("memcpy", "memset", "direct_copy", "catarray", "copy_kernel", "aten::copy_", "aten::cat"),
        *("aten::to", "aten::_to_copy", "aten::contiguous", "aten::clone"),
    ),
    "point-wise": (
        *("triton_poi", "triton_red", "triton_per", "triton_for", "elementwise", "reduce_kernel"),
        *("rms_norm", "rope", "swiglu", "layer_norm", "indexselect", "index_", "scatter_gather"),
        "aten::",
    ),
}
MARK = "spin_kernel"  # of torch.cuda._sleep


@dataclass(frozen=True)
class Kernel:
    name: str
    ms: float
    stage: str


@cache
def our_kernels() -> dict[str, str]:
    """Return the names of our Triton kernels -> stage."""
    if importlib.util.find_spec("triton") is None:
        return {}
    return {
        name: stage
        for stage, modules in MODULES.items()
        for module in modules
        for name in vars(importlib.import_module(f"mlembed_kernels.{module}"))
        if name.endswith("_kernel")
    }


def by_name(kernel: str) -> str:
    """Return the stage of a kernel that runs within the blocks."""
    for name, stage in our_kernels().items():
        if kernel == name or kernel.startswith(f"{name}_"):  # Triton may append constants
            return stage
    lower = kernel.lower()
    stages = (stage for stage, parts in PARTS.items() if any(part in lower for part in parts))
    return next(stages, "other")


# ---- one step, profiled ----


@contextmanager
def marked(step: Trained, mark: Callable[[str], None]) -> Iterator[None]:
    """Call `mark` with the name of each stage of WHEN, or "blocks", as it begins."""
    embedding = Embedding(step.model.embed_tokens, mark)

    def begun(stage: str) -> None:
        if stage != "backward":  # which begins in the stage that ends the forward, the loss
            mark("blocks" if stage == "end" else stage)

    before, step.mark = step.mark, begun
    try:
        yield
    finally:
        step.mark = before
        embedding.remove()


class Embedding:
    """Marks the begin and end of an embedding, forward and backward.

    In the backward it ends with the last node of a pack's graph, and after the last pack with the
    accumulation of the gradients, which sums over packs.
    """

    def __init__(self, vocabulary: Any, mark: Callable[[str], None]) -> None:
        self.mark, self.packs, self.left = mark, 0, 0
        parameters = list(vocabulary.parameters())
        self.parameters = len(parameters)
        self.hooks = [
            vocabulary.register_forward_pre_hook(self.begun),
            vocabulary.register_forward_hook(self.ended),
            *(p.register_post_accumulate_grad_hook(self.accumulated) for p in parameters),
        ]

    def begun(self, _: nn.Module, args: Any) -> None:
        self.mark("embedding")

    def ended(self, _: nn.Module, args: Any, x_TD: Tensor) -> None:
        self.mark("blocks")
        if x_TD.grad_fn is None:
            return
        self.packs += 1
        nodes = last_nodes(x_TD.grad_fn)
        running = [len(nodes)]

        def done(*_: Any) -> None:
            running[0] -= 1
            if running[0]:
                return
            self.packs -= 1
            if self.packs:
                self.mark("blocks")

        x_TD.register_hook(lambda grad: self.mark("embedding"))
        for node in nodes:
            node.register_hook(done)

    def accumulated(self, _: Tensor) -> None:
        self.left = (self.left or self.parameters) - 1
        if not self.left:
            self.mark("blocks")

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def last_nodes(root: Any) -> list[Any]:
    """Return the nodes of a graph that give parameters their gradients."""
    last, todo, seen = [], [root], {root}
    while todo:
        node = todo.pop()
        following = [other for other, _ in node.next_functions if other is not None]
        if any(not other.next_functions for other in following):
            last.append(node)
        for other in following:
            if other.next_functions and other not in seen:
                seen.add(other)
                todo.append(other)
    return last


def profiled(step: Trained, inputs: Texts) -> list[Kernel]:
    """Return the kernels of one step in their order (on CPUs: operators)."""
    device = inputs.device
    cuda = device.type == "cuda"
    marks: list[str] = []

    def mark(stage: str) -> None:
        marks.append(stage)
        if cuda:
            torch.cuda._sleep(1)
        else:
            with torch.profiler.record_function(MARK):
                pass

    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    harness.synchronize(device)
    with marked(step, mark), torch.profiler.profile(activities=activities) as profiler:
        step(inputs, True)
        harness.synchronize(device)
    return staged(kernels(profiler.events() or [], cuda), marks)


def kernels(events: Iterable[Any], cuda: bool) -> list[tuple[str, float]]:
    """Return name and ms of the device's kernels, by their begin, without annotations."""
    kind = "CUDA" if cuda else "CPU"
    ran = []
    for event in events:
        span = harness.annotates(event, event.name)
        if event.device_type.name != kind or (span and event.name != MARK):
            continue
        micro = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        ran.append((event.time_range.start, event.name, micro / 1e3))
    return [(name, ms) for _, name, ms in sorted(ran, key=lambda event: event[0])]


def staged(ran: list[tuple[str, float]], marks: list[str]) -> list[Kernel]:
    """Assign kernels to the stage of the last mark before them, or of their name.

    Raises RuntimeError if there are no kernels, or more or fewer marks than expected.
    """
    seen = sum(MARK in name for name, _ in ran)
    if seen != len(marks) or len(ran) == seen:
        raise RuntimeError(f"profiler: expected kernels and {len(marks)} marks, got {seen} of them")
    now, following, staged = "blocks", iter(marks), []
    for name, ms in ran:
        if MARK in name:
            now = next(following)
        else:
            staged.append(Kernel(name, ms, now if now in WHEN else by_name(name)))
    return staged


def summed(kernels: list[Kernel], floors: dict[str, float]) -> dict[str, Any]:
    """Return ms and floor of each stage, and the names of the largest kernels of `other`."""
    ms: dict[str, float] = {}
    unknown: dict[str, float] = {}
    for kernel in kernels:
        ms[kernel.stage] = ms.get(kernel.stage, 0.0) + kernel.ms
        if kernel.stage == "other":
            unknown[kernel.name] = unknown.get(kernel.name, 0.0) + kernel.ms
    largest = sorted(unknown, key=lambda name: -unknown[name])[:3]
    return {
        "stages": {stage: {"ms": ms.get(stage), "floor_ms": floors.get(stage)} for stage in STAGES},
        "other": [name[:90] for name in largest],
    }
