"""Cases, inputs, times, memory and errors, taken the same way by every bench.

Times are medians of CUDA events. Inputs rotate, so that more than twice the L2 lies between two
uses of one set: in training the vectors come from memory too.
"""

import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD, TRAIN = "fwd", "bwd", "fwd+bwd"  # modes
CPU = torch.device("cpu")
EPS32 = torch.finfo(torch.float32).eps
Tensors = tuple[Tensor, ...]
Step = Callable[[Any, bool], Any]  # (inputs, backward) -> a loss or tensors
Call = Callable[[int], Any]  # takes the number of the set of inputs
Trial = tuple[dict[str, str], Callable[[], dict[str, Any]]]  # a check's labels, its verdict


class Missing(Exception):
    """A library is not installed. The bench reports the provider as absent, not as failed."""


def imported(module: str, package: str) -> Any:
    """Return a library's module. Raises Missing if the package is not installed."""
    parts = module.split(".")
    for i in range(len(parts)):
        if importlib.util.find_spec(".".join(parts[: i + 1])) is None:
            raise Missing(f"{package} is not installed")
    return importlib.import_module(module)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A workload: the providers that run it, and the modes in which they are timed.

    A bench's own class adds `about` (a line of text), `toy()` (the same code in seconds, on any
    device) and `inputs(device, seed)`.
    """

    name: str
    providers: tuple[str, ...] = ("ours",)
    modes: tuple[str, ...] = (TRAIN, FORWARD)
    device: str = ""  # the kind of device that its times need, if the bench has several

    def flops(self, mode: str) -> float:
        raise NotImplementedError

    def nbytes(self, mode: str) -> float:
        raise NotImplementedError

    def floors(self, mode: str, tflops: float, gbs: float) -> dict[str, float]:
        """Return the lower bounds of a run, in milliseconds, at these ceilings."""
        products, size = self.flops(mode) / tflops / 1e9, self.nbytes(mode) / gbs / 1e6
        return {"products": products, "bytes": size}


def dtype_on(device: torch.device, on_cpu: torch.dtype = torch.float16) -> torch.dtype:
    """Return bf16 for GPUs; Triton's interpreter, used on CPUs, multiplies bf16 wrongly."""
    return torch.bfloat16 if device.type == "cuda" else on_cpu


class Leaves:
    """One set of inputs. `views` are leaves over the same memory, one per exit."""

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
    """A step that is a function of tensors, so its backward can be timed without its forward.

    function: leaves -> a tensor or several.
    prepare: inputs -> leaves and gradients of the outputs; runs once for each set, not timed.
    spot: checks the first result in each mode; RuntimeError if it is not near the truth.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        prepare: Callable[[Any], tuple[Tensors, Tensors]],
        spot: Callable[[Any, str, Tensors], dict[str, Any]] | None = None,
    ) -> None:
        self.function, self.prepare, self.spot = function, prepare, spot
        self.prepared: dict[int, tuple[Tensors, Tensors]] = {}
        self.checked = set[str]()

    def of(self, inputs: Any) -> tuple[Tensors, Tensors]:
        if id(inputs) not in self.prepared:
            self.prepared[id(inputs)] = self.prepare(inputs)
        return self.prepared[id(inputs)]

    def outs(self, leaves: Tensors) -> Tensors:
        outs = self.function(*leaves)
        return (outs,) if isinstance(outs, Tensor) else tuple(outs)

    def check(self, inputs: Any, mode: str, got: Tensors) -> Tensors:
        if self.spot is not None and mode not in self.checked:
            self.checked.add(mode)
            verdict = self.spot(inputs, mode, got)
            if not verdict["near"]:
                raise RuntimeError(f"computes something else, relative errors {verdict['rms']}")
        return got

    def __call__(self, inputs: Any, backward: bool) -> Tensors:
        """Return the outputs and, with backward, the gradients of the leaves."""
        leaves, grads = self.of(inputs)
        outs = self.outs(leaves)
        if not backward:
            return self.check(inputs, FORWARD, outs)
        got = *(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, grads)
        return self.check(inputs, TRAIN, got)

    def backward(self, inputs: Any) -> Callable[[], Tensors]:
        """Run the forward; return a function that runs the backward."""
        leaves, grads = self.of(inputs)
        with torch.enable_grad():
            outs = self.outs(leaves)
        again = partial(torch.autograd.grad, outs, leaves, grads, retain_graph=True)
        if self.spot is not None and BACKWARD not in self.checked:
            self.check(inputs, BACKWARD, again())
        return again


# ---- times ----


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the range of the middle three fifths."""

    ms: float
    p20: float
    p80: float
    repeats: int


def summary(times: list[float]) -> Timing:
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(shares).tolist()
    return Timing(p50, p20, p80, len(times))


def sets_needed(set_bytes: int, l2_bytes: int) -> int:
    """Return how many sets of inputs lie more than 2x L2 between two uses of one."""
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
    """Return the milliseconds of each call; on a GPU by the device's clock."""
    times = []
    if device.type != "cuda":
        for i in range(repeats):
            start = time.perf_counter()
            call(i)
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    # The device sleeps (in clocks) until the host is ahead. Without it, short kernels would be as
    # slow as Python launches them.
    torch.cuda._sleep(int(min(repeats * 5e-4, 0.1) * 1.8e9))
    for i, (start_event, end_event) in enumerate(events):
        start_event.record()
        call(i)
        end_event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in events]


def measure(call: Call, device: torch.device, budget_ms: float, least: int = 5) -> Timing:
    """Warm up, then repeat for the budget, at least `least` times. `call` is compiled already."""
    once = max(timed(call, 1, device)[0], 1e-3)
    timed(call, min(int(budget_ms / 3 / once), 50), device)
    return summary(timed(call, min(max(int(budget_ms / once), least), 200), device))


def rotating(step: Step, sets: list[Any], mode: str) -> Call:
    """Return a call that clears the gradients of set i and runs the step on it.

    For the backward alone, the forward of every set runs here, so its saved tensors rotate too.
    Autograd is off in the forward mode. Raises TypeError if the step has no backward of its own.
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
    """Return a loss as it is, and the norm of all numbers of tensors."""
    if isinstance(result, Tensor) and result.ndim == 0:
        return float(result)
    tensors = [result] if isinstance(result, Tensor) else result
    return torch.stack([x.detach().float().norm() for x in tensors]).norm().item()


def peak_bytes(call: Call, sets: list[Any], device: torch.device) -> int | None:
    """Return the peak of memory beyond inputs, outputs and gradients, None on a CPU."""
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
    """Measure this device: bf16 matmul in TFLOP/s, copy in GB/s (read + written)."""
    n, size = (8192, 1 << 31) if device.type == "cuda" else (2048, 1 << 28)
    n, size = (64, 1 << 16) if smoke else (n, size)
    budget_ms = 0.0 if smoke else 300.0
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    out = a @ b
    matmul = measure(lambda _: torch.mm(a, b, out=out), device, budget_ms)
    x = torch.ones(size, device=device, dtype=torch.uint8)
    y = x.clone()
    copy = measure(lambda _: y.copy_(x), device, budget_ms)
    return {"tflops": 2 * n**3 / matmul.ms / 1e9, "gbs": 2 * size / copy.ms / 1e6}


def annotates(event: Any, name: str) -> bool:
    """Tell spans around kernels (of an optimiser, a compiled graph) from kernels."""
    known = "## Call", "Torch-Compiled", "Optimizer.", "ProfilerStep"
    return getattr(event, "is_user_annotation", False) or name.startswith(known)


def kernel_times(call: Call, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """List the kernels of one call, slowest first, with ms and launches (on CPUs: operators).

    Raises RuntimeError if the profiler saw none.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(repeats):
            call(i)
        synchronize(device)
    kernels = []
    for event in profiler.key_averages():
        on_device = event.device_type.name == "CUDA" and not annotates(event, event.key)
        if device.type == "cuda" and not on_device:
            continue
        micro = getattr(event, f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total")
        row = {"ms": micro / 1e3 / repeats, "launches": event.count / repeats}
        kernels.append({"kernel": event.key[:90], **row})
    if not kernels:
        raise RuntimeError("the profiler recorded no kernel")
    return sorted(kernels, key=lambda row: -row["ms"])


# ---- right or not ----


def poison(device: torch.device) -> None:
    """Fill freed memory with NaN, so that an element of torch.empty that nobody wrote shows."""
    if device.type == "cuda":
        blocks = [torch.full((1 << 28,), math.nan, device=device)]
        blocks += [torch.full((1 << 16,), math.nan, device=device) for _ in range(256)]
        del blocks


def differentiated(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor
) -> Tensors:
    """Return the value of a function and the gradients of its leaves."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    with torch.enable_grad():
        out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the largest and the root mean square difference, in float64."""
    difference = (got.double() - truth).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def judged(got: Tensor, eager: Tensor, truth: Tensor, floor: float) -> dict[str, Any]:
    """Return `ok` and the errors, relative to the truth's size, in two norms.

    An error is ok up to that of eager PyTorch plus `floor`.
    """
    part: dict[str, Any] = {"ok": True, "floor": floor}
    size = truth.abs().max().item(), truth.square().mean().sqrt().item()
    both = zip(("max", "rms"), errors(got, truth), errors(eager, truth), size, strict=True)
    for name, ours, theirs, scale in both:
        scale = scale or 1.0
        part[name], part[f"eager_{name}"] = ours / scale, theirs / scale
        part["ok"] &= ours <= theirs + floor * scale  # NaN never passes
    return part


def verdict(
    names: Sequence[str],
    floors: Sequence[float],
    got: Tensors,
    again: Tensors,
    eager: Tensors,
    truth: Tensors,
) -> dict[str, Any]:
    """Judge every output of a kernel that ran twice, which has to give the same bits."""
    columns = zip(names, got, eager, truth, floors, strict=True)
    parts = {name: judged(x, e, t, floor) for name, x, e, t, floor in columns}
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    ok = same and all(part["ok"] for part in parts.values())
    return {"ok": ok, "same_bits": same, **parts}


def spot_check(
    parts: dict[str, tuple[Tensor, Tensor, Tensor]], floor: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Judge parts (got, eager, truth) of a result at full size.

    `ok` is for ours, as in the gate. `near` is for peers, which may round more: an error above
    four steps of the dtype is not rounding.
    """
    limit = max(4 * torch.finfo(dtype).eps, 64 * EPS32)
    verdict: dict[str, Any] = {"ok": True, "near": True, "rms": {}}
    for name, columns in parts.items():
        part = judged(*columns, floor)
        verdict[name], verdict["rms"][name] = part, round(part["rms"], 7)
        verdict["ok"] &= part["ok"]
        verdict["near"] &= part["rms"] <= limit
    return verdict


def trials(
    checks: Iterable[Any],
    verdict: Callable[..., dict[str, Any]],
    half: torch.dtype,
    device: torch.device,
    smoke: bool,
) -> Iterator[Trial]:
    """Yield every check in `half` and, where it asks for it, in fp32."""
    for check in checks:
        for dtype in dict.fromkeys((half, torch.float32)[: 1 + check.fp32]):
            at = {"check": check.name, "shape": check.about, "dtype": dtype_name(dtype)}
            yield at, partial(verdict, check.toy() if smoke else check, dtype, device)


def gate(trials: Iterable[Trial]) -> Iterator[dict[str, Any]]:
    """Yield the verdict of every trial. An exception is a verdict too: not ok."""
    for at, verdict in trials:
        try:
            yield {**at, **verdict()}
        except Missing:
            continue
        except Exception as error:
            yield {"dtype": "-", **at, "ok": False, "error": reason(error)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reason(error: BaseException) -> str:
    """Return an error as one line; of paths only the file name stays."""
    words = re.sub(r"(?<![\w.])(/[\w.+@-]+)+/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words}"[:300]
