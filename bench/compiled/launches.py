"""Launches of the kernels, collected on tensors without memory.

The host code runs as on a card, on torch's fake tensors, which have shapes, strides and addresses
but no memory, so real sizes cost nothing. Each launch is recorded instead of compiled;
`Launch.compile` compiles it for Hopper (sm_90a).

A process that collects does nothing else: torch and Triton are patched for good, and Triton has to
be the compiler, so TRITON_INTERPRET must not be set.
"""

import contextlib
import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .. import ROOT
from ..harness import CPU

TARGET = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132  # of an H100 or H200: columns are split to fill them
OPS = {  # operator -> its module in kernels/
    "pairwise_lse": "similarity._lse_op",
    "cosine": "similarity._cosine_op",
    "distill": "similarity._distill_op",
    "embed": "embedding._op",
    "attention": "attention._op",
}
MODE = FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as Triton compiles it at its first launch.

    signature: argument -> type, "constexpr" also for an integer that is 1.
    constexprs, attrs: position -> value, position -> divisible by 16.
    """

    kernel: JITFunction
    case: str
    grid: tuple[int, ...]
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that are constants of this specialisation."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items()}

    def divisible(self) -> set[str]:
        """Return the names of the arguments that Triton takes to be divisible by 16."""
        names = list(self.signature)
        return {names[path[0]] for path, value in self.attrs.items() if value}

    def key(self, addresses: bool = True) -> str:
        """Return Triton's key of the specialisation, `addresses` with divisible pointers or not."""
        names = [
            name
            for name in sorted(self.divisible())
            if addresses or not self.signature[name].startswith("*")
        ]
        parts = self.signature, self.constexprs, names, self.options.__dict__
        return " ".join([self.name, *map(str, parts)])

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)

    def compile(self, arch: int = TARGET.arch) -> Any:
        options = self.options.__dict__
        if arch != TARGET.arch:  # The other options are defaults of the architecture.
            options = {name: options[name] for name in ("num_warps", "num_stages", "maxnreg")}
        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=options)


@dataclass(frozen=True)
class Run:
    """One launch of a case: what a model of the kernel's work needs beyond its specialisation.

    sizes: integer arguments. shapes: of tensors. lists: int32 tensors that came from the host.
    """

    case: str
    launch: Launch
    grid: tuple[int, ...]
    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    lists: dict[str, Tensor | None]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


# ---- collecting ----

LAUNCHES: dict[str, Launch] = {}  # by key, in the order of the first launch
RUNS: list[Run] = []  # every launch
COPIES: dict[int, tuple[Tensor, Tensor]] = {}  # storage on the card -> the tensors, there and here
# The case, the grid and the arguments of the launch under way.
running: tuple[str, tuple[int, ...], dict[str, Any]] = "", (), {}


class _Hopper:
    """A card for Triton's compiler, which asks its driver for one."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def get_device_interface(self) -> None:
        return None


class _Card:
    multi_processor_count = MULTIPROCESSORS


def prepare(multiprocessors: int = MULTIPROCESSORS) -> None:
    """Patch torch and Triton: fake tensors pass for tensors on a card, launches are recorded."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "expected the compiler, got the interpreter"
    triton.runtime.driver.set_active(_Hopper())
    _Card.multi_processor_count = multiprocessors
    run = JITFunction.run

    def specialise(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        global running
        running = running[0], tuple(grid), dict(zip(self.arg_names, args, strict=False)) | kwargs
        run(self, *args, grid=grid, warmup=True, **kwargs)

    def record(
        self: JITFunction, key: Any, signature: Any, device: Any, constexprs: Any, options: Any,
        attrs: Any, warmup: bool,
    ) -> None:  # fmt: skip
        case, grid, arguments = running
        launch = Launch(self, case, grid, signature, constexprs, attrs, options)
        launch = LAUNCHES.setdefault(launch.key(), launch)
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        sizes = {name: x for name, x in arguments.items() if type(x) is int}
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        lists = {name: _copied(x) for name, x in tensors.items() if x.dtype == torch.int32}
        RUNS.append(Run(case, launch, grid, sizes, shapes, lists))

    copy = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Copy to the card, as a fake tensor."""
        if args and isinstance(args[0], torch.device) and not isinstance(self, FakeTensor):
            fake = MODE.from_tensor(self)
            COPIES[fake.untyped_storage()._cdata] = fake, self
            return fake
        return copy(self, *args, **kwargs)

    for owner, name, value in (
        (JITFunction, "run", specialise),
        (JITFunction, "_do_compile", record),
        (FakeTensor, "is_cuda", property(lambda self: True)),
        (FakeTensor, "is_cpu", property(lambda self: False)),
        (FakeTensor, "data_ptr", lambda self: self.storage_offset() * self.itemsize),
        (Tensor, "to", to),
        (torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
        (torch.cuda, "get_device_properties", lambda device: _Card),
    ):
        setattr(owner, name, value)
    for name, path in OPS.items():
        # Fake operators compute shapes alone; these run all of their host code.
        module = importlib.import_module(f"mlembed_kernels.{path}")
        for suffix, op in (("", f"{name}_op"), ("_backward", "_backward_op")):
            body = partial(_on_card, getattr(module, op)._init_fn)
            torch.library.register_fake(f"mlembed::{name}{suffix}", body, allow_override=True)


def _copied(x: Tensor) -> Tensor | None:
    """Return the values of a tensor of integers that came from the host, None for others."""
    _, host = COPIES.get(x.untyped_storage()._cdata, (None, None))
    if host is None or host.is_floating_point():
        return None
    with unset_fake_temporarily():
        return host.as_strided(x.shape, x.stride(), x.storage_offset())


def _on_card(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with MODE:
        return body(*args, **kwargs)


def collect(cases: dict[str, Callable[[], None]]) -> list[Launch]:
    """Return every distinct launch of these cases, labelled with the first case that has it."""
    global running
    LAUNCHES.clear()
    RUNS.clear()
    COPIES.clear()
    for name, case in cases.items():
        running = name, (), {}
        case()
    return list(LAUNCHES.values())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor on the card."""
    with MODE:
        return torch.empty(*shape, dtype=dtype)


def train(function: Callable[..., Any], *leaves: Tensor) -> None:
    """Run a function that returns one or several tensors, forward and backward."""
    with MODE:
        outs = function(*(x.detach().requires_grad_() for x in leaves))
        outs = (outs,) if isinstance(outs, Tensor) else outs
        torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])


def keep_compiled() -> Path:
    """Cache compiled kernels below MLEMBED_TRITON_CACHE or in this checkout; return the folder.

    Triton's key hashes sources, options and the compiler, so a stale entry is never used.
    """
    folder = Path(os.environ.get("MLEMBED_TRITON_CACHE", ROOT / ".cache" / "triton"))
    folder /= triton.__version__
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    return folder
