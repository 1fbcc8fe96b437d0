"""Where the time of one step goes: every kernel of a profiled step to a stage.

Embedding, loss and optimiser are told by when they run. Marks in the device's own queue part them
from the blocks: hooks on the embedding and on the pooled exits set them, in the backward too, so a
product within the embedding is the embedding's. Kernels of the blocks are told by their names,
those of our attention as its modules have them. What is not known by name is `other`.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import harness

if TYPE_CHECKING:
    from .cases import Texts, Trained


STAGES = (
    *("embedding", "attention", "products", "point-wise", "loss", "optimiser"),
    *("copies", "other"),
)
WHEN = "embedding", "loss", "optimiser"  # told by when they run
MODULES = {
    "attention": ("attention._forward", "attention._backward"),
    "embedding": ("embedding._op",),
    "loss": tuple(
        f"similarity.{name}"
        for name in ("_lse_forward", "_lse_backward", "_cosine_op", "_bands", "_tiles")
    ),
}
# Parts of names, in lower case; the first that occurs decides. Flash attention's kernels are made
# of CUTLASS's and have its name in theirs, so attention comes before products. aten:: are operators
# on CPUs, where there are no kernels.
PARTS = {
    "attention": ("flash", "fmha", "attention", "scaled_dot_product"),
    "products": (
        *(
            "nvjet",
            "gemm",
            "gemv",
            "cutlass",
            "xmma",
            "cublas",
            "splitk",
            "triton_tem",
            "triton_mm",
        ),
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
MARK = "spin_kernel"  # what torch.cuda._sleep launches


@dataclass(frozen=True)
class Kernel:
    name: str
    ms: float
    stage: str


@cache
def our_kernels() -> dict[str, str]:
    """Names of our Triton kernels -> stage."""
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
    """The stage of a kernel that runs among the blocks'."""
    for name, stage in our_kernels().items():
        if kernel == name or kernel.startswith(f"{name}_"):  # Triton may append what is constant
            return stage
    lower = kernel.lower()
    found = (stage for stage, parts in PARTS.items() if any(part in lower for part in parts))
    return next(found, "other")


# ---- one step, profiled ----


@contextmanager
def marked(step: "Trained", mark: Callable[[str], None]) -> Iterator[None]:
    """Within it `mark` is told what begins: a stage of WHEN, or the blocks."""
    embedding = Embedding(step.model.embed_tokens, mark)

    def told(stage: str) -> None:
        """A backward begins with what the forward ended with: the loss."""
        if stage != "backward":
            mark("blocks" if stage == "end" else stage)

    before, step.mark = step.mark, told
    try:
        yield
    finally:
        step.mark = before
        embedding.remove()


class Embedding:
    """Tells when an embedding begins and ends, forward and backward, whatever it is made of.

    In the backward every pack's ends with its last node. What follows the last pack's is the sum
    over packs and the accumulation, which are the embedding's too: it ends with those.
    """

    def __init__(self, vocabulary: Any, mark: Callable[[str], None]) -> None:
        self.mark, self.packs, self.left = mark, 0, 0
        parameters = list(vocabulary.parameters())
        self.parameters = len(parameters)
        self.hooks = [
            vocabulary.register_forward_pre_hook(self.begun),
            vocabulary.register_forward_hook(self.ended),
            *(p.register_post_accumulate_grad_hook(self.grown) for p in parameters),
        ]

    def begun(self, _: nn.Module, given: Any) -> None:
        self.mark("embedding")

    def ended(self, _: nn.Module, given: Any, x_TD: Tensor) -> None:
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

    def grown(self, _: Tensor) -> None:
        self.left = (self.left or self.parameters) - 1
        if not self.left:
            self.mark("blocks")

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def last_nodes(root: Any) -> list[Any]:
    """Nodes of a graph that give parameters their gradients, each once."""
    found, todo, seen = [], [root], {root}
    while todo:
        node = todo.pop()
        following = [other for other, _ in node.next_functions if other is not None]
        if any(not other.next_functions for other in following):
            found.append(node)
        for other in following:
            if other.next_functions and other not in seen:
                seen.add(other)
                todo.append(other)
    return found


def profiled(step: "Trained", inputs: "Texts") -> list[Kernel]:
    """Kernels of one step in their order (on CPUs operators).

    Raises:
        RuntimeError: the profiler saw nothing, or not all marks.
    """
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
    return sorted_out(events(profiler.events() or [], cuda), marks)


def events(found: Iterable[Any], cuda: bool) -> list[tuple[str, float]]:
    """Name and ms of what ran on the device, by its begin; spans that annotate are left out."""
    kind = "CUDA" if cuda else "CPU"
    ran = []
    for event in found:
        span = harness.annotates(event, event.name)
        if event.device_type.name != kind or (span and event.name != MARK):
            continue
        micro = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        ran.append((event.time_range.start, event.name, micro / 1e3))
    return [(name, ms) for _, name, ms in sorted(ran, key=lambda event: event[0])]


def sorted_out(ran: list[tuple[str, float]], marks: list[str]) -> list[Kernel]:
    """Each to its stage: that of the last mark before it, or of its name. Marks cost nothing."""
    seen = sum(MARK in name for name, _ in ran)
    if seen != len(marks) or len(ran) == seen:
        raise RuntimeError(f"profiler: expected kernels and {len(marks)} marks, got {seen} of them")
    now, following, found = "blocks", iter(marks), []
    for name, ms in ran:
        if MARK in name:
            now = next(following)
        else:
            found.append(Kernel(name, ms, now if now in WHEN else by_name(name)))
    return found


def summed(kernels: list[Kernel], floors: dict[str, float]) -> dict[str, Any]:
    """ms of each stage that ran, its floor where it has one; the largest that nobody knows."""
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
