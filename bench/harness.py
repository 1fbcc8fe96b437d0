"""How a time, a peak and an error are obtained, whatever the kernel.

Times are medians of CUDA events over inputs that rotate, so that more than twice the L2 lies
between two uses of one set: in training the vectors come from memory too.
"""

import hashlib
import math
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from . import ROOT

FORWARD, BACKWARD, TRAIN = "fwd", "bwd", "fwd+bwd"  # modes: what is timed
Step = Callable[[Any, bool], Any]  # inputs, with backward? -> what came out: a loss, or tensors
Call = Callable[[int], Any]  # on the set of this number


# Others' code whose versions a result is read with, where it is there.
PACKAGES = (
    *("flash-attn", "flash-attn-3", "flash-attn-4", "xformers"),
    *("sentence-transformers", "transformers", "cut-cross-entropy", "inf-cl", "liger-kernel"),
)


class Missing(Exception):
    """A library that is not installed: no failure of the bench."""


class Leaves:
    """One set of inputs. `views` are leaves over the same memory, for who wants them apart."""

    def __init__(self, *stacked: Tensor) -> None:
        self.stacked = tuple(x.requires_grad_() for x in stacked)
        parts = [[part.requires_grad_() for part in x.detach()] for x in stacked]
        self.views = list(zip(*parts, strict=True))

    def clear(self) -> None:
        for leaf in self.all():
            leaf.grad = None

    def all(self) -> list[Tensor]:
        return [*self.stacked, *(part for view in self.views for part in view)]

    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.stacked)

    def gradient_bytes(self) -> int:
        return sum(x.grad.nbytes for x in self.all() if x.grad is not None)


class Apart:
    """A step that is a function of tensors: its backward can be timed without its forward."""

    def __init__(
        self,
        function: Callable[..., Any],
        prepare: Callable[[Any], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    ) -> None:
        """function: leaves -> a tensor, or several. prepare: inputs -> the leaves, and the
        gradients of what the function gives; once for each set, outside of every time."""
        self.function, self.prepare = function, prepare
        self.prepared: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def of(self, inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if id(inputs) not in self.prepared:
            self.prepared[id(inputs)] = self.prepare(inputs)
        return self.prepared[id(inputs)]

    def outs(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = self.function(*leaves)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def __call__(self, inputs: Any, backward: bool) -> tuple[Tensor, ...]:
        """What the function gives and, with backward, the gradients of the leaves."""
        leaves, behind = self.of(inputs)
        outs = self.outs(leaves)
        if not backward:
            return outs
        return *(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, behind)

    def backward(self, inputs: Any) -> Callable[[], tuple[Tensor, ...]]:
        """The forward now; the gradients whenever the result is called."""
        leaves, behind = self.of(inputs)
        with torch.enable_grad():
            outs = self.outs(leaves)
        return lambda: torch.autograd.grad(outs, leaves, behind, retain_graph=True)


# ---- times ----


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the range of the middle three fifths."""

    ms: float
    p20: float
    p80: float
    repeats: int


def percentile(values: list[float], share: float) -> float:
    """Linear between neighbours, as numpy's default."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summary(times: list[float]) -> Timing:
    p20, p50, p80 = (percentile(times, share) for share in (0.2, 0.5, 0.8))
    return Timing(p50, p20, p80, len(times))


def sets_needed(set_bytes: int, l2_bytes: int) -> int:
    """So many sets that more than 2x L2 is touched between two uses of one."""
    if set_bytes > 2 * l2_bytes:
        return 1
    return 2 + 2 * l2_bytes // set_bytes


def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each call; on a GPU the device's own, the host may run ahead."""
    times = []
    if device.type != "cuda":
        for i in range(repeats):
            start = time.perf_counter()
            call(i)
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    # The device waits (clocks) until the host is ahead: else what is short times Python's launches.
    torch.cuda._sleep(int(min(repeats * 5e-4, 0.1) * 1.8e9))
    for i, (start_event, end_event) in enumerate(events):
        start_event.record()
        call(i)
        end_event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in events]


def measure(call: Call, device: torch.device, budget_ms: float, least: int = 5) -> Timing:
    """Warm up, then repeat for the budget, at least so often. `call` has run: it is compiled."""
    once = max(timed(call, 1, device)[0], 1e-3)
    timed(call, min(int(budget_ms / 3 / once), 50), device)
    return summary(timed(call, min(max(int(budget_ms / once), least), 200), device))


def rotating(step: Step, sets: list[Any], mode: str) -> Call:
    """Call i works on set i, from no gradients, with autograd only where it is measured.

    For the backward alone every set's forward is done here: what it saves rotates too.
    """
    if mode == BACKWARD:
        if not isinstance(step, Apart):
            raise TypeError(f"{mode}: expected a step whose backward stands alone, got {step}")
        calls = [step.backward(inputs) for inputs in sets]
        return lambda i: calls[i % len(calls)]()
    backward = mode != FORWARD

    def call(i: int) -> Any:
        inputs = sets[i % len(sets)]
        inputs.clear()
        with torch.set_grad_enabled(backward):
            return step(inputs, backward)

    return call


def size_of(result: Any) -> float:
    """A loss as it is; of tensors the length of all their numbers."""
    if isinstance(result, Tensor) and result.ndim == 0:
        return float(result)
    tensors = [result] if isinstance(result, Tensor) else result
    return torch.stack([x.detach().float().norm() for x in tensors]).norm().item()


def peak_bytes(call: Call, sets: list[Any], device: torch.device) -> int | None:
    """Most memory at any time beyond all inputs, and what is left at the end: outputs and
    gradients."""
    if device.type != "cuda":
        return None
    for inputs in sets:
        inputs.clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call(0)
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device)
    outputs = sum(x.nbytes for x in result) if isinstance(result, tuple) else 0
    return max(most - before - outputs - sets[0].gradient_bytes(), 0)


def ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """What this card gives: bf16 matmul in TFLOP/s, copy within it in GB/s (read + written)."""
    n, size = (64, 1 << 16) if smoke else (8192, 1 << 31)
    budget_ms = 0.0 if smoke else 300.0
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    out = a @ b
    matmul = measure(lambda _: torch.mm(a, b, out=out), device, budget_ms)
    x = torch.ones(size, device=device, dtype=torch.uint8)
    y = x.clone()
    copy = measure(lambda _: y.copy_(x), device, budget_ms)
    return {"tflops": 2 * n**3 / matmul.ms / 1e9, "gbs": 2 * size / copy.ms / 1e6}


def annotates(event: Any, name: str) -> bool:
    """Is it a span around kernels, of an optimiser or a compiled graph, and no kernel itself?"""
    known = "## Call", "Torch-Compiled", "Optimizer.", "ProfilerStep"
    return getattr(event, "is_user_annotation", False) or name.startswith(known)


def kernel_times(call: Call, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Device kernels of one call, slowest first: ms and launches a call (on CPUs operators)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(repeats):
            call(i)
        synchronize(device)
    found = []
    for event in profiler.key_averages():
        on_device = event.device_type.name == "CUDA" and not annotates(event, event.key)
        if device.type == "cuda" and not on_device:
            continue
        micro = getattr(event, f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total")
        row = {"ms": micro / 1e3 / repeats, "launches": event.count / repeats}
        found.append({"kernel": event.key[:90], **row})
    if not found:
        raise RuntimeError("the profiler recorded no kernel")
    return sorted(found, key=lambda row: -row["ms"])


# ---- errors ----


def poison(device: torch.device) -> None:
    """What torch.empty hands out next holds NaN: an element that nobody wrote is found."""
    if device.type == "cuda":
        blocks = [torch.full((1 << 28,), math.nan, device=device)]
        blocks += [torch.full((1 << 16,), math.nan, device=device) for _ in range(256)]
        del blocks


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference, in float64."""
    difference = (got.double() - truth).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def judged(got: Tensor, eager: Tensor, truth: Tensor, floor: float) -> dict[str, Any]:
    """Is `got` as near the truth as eager, up to `floor` of the truth's size? In both norms."""
    part: dict[str, Any] = {"ok": True, "floor": floor}
    size = truth.abs().max().item(), truth.square().mean().sqrt().item()
    names = "max", "rms"
    for name, ours, theirs, scale in zip(
        names, errors(got, truth), errors(eager, truth), size, strict=True
    ):
        scale = scale or 1.0
        part[name], part[f"eager_{name}"] = ours / scale, theirs / scale
        part["ok"] &= ours <= theirs + floor * scale  # NaN never passes
    return part


# ---- where it ran ----


def environment(device: torch.device) -> dict[str, Any]:
    """What a number must be read with; never a path or a host's name."""
    import mlembed_kernels

    sources = hashlib.sha256()
    for path in [*sorted(ROOT.glob("kernels/*.py")), *sorted(ROOT.glob("mlembed/*.py"))]:
        sources.update(path.name.encode() + path.read_bytes())
    known = {
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "kernels": mlembed_kernels.__version__,
        "sources": sources.hexdigest()[:12],
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        fields = "driver_version,power.limit,clocks.max.sm"
        told = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
        known |= {
            "gpu": card.name,
            "multiprocessors": card.multi_processor_count,
            "l2_mib": l2_bytes(device) / 2**20,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "driver, power limit, top SM clock": told,
        }
    return known


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line that a command prints, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def reason(error: BaseException) -> str:
    """One line of an error; of a file only its name, where it lies is this machine's affair."""
    words = re.sub(r"(?<![\w.])(/[\w.+@-]+)+/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words}"[:300]
