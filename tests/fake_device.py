"""A CUDA device without memory, which lists the operations that would make the host wait for it.

Its tensors are torch's meta tensors: they have shapes but no numbers. Tensors of the host are real.
Triton's launches do nothing, and the bodies of our operators run, so that what they do is seen.
"""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
# Shapes or numbers of their results depend on numbers of the device.
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def body(name: str) -> Callable[..., Any] | None:
    """Return what one of our operators does."""
    ours = name.startswith("mlembed::")
    return torch._library.custom_ops.OPDEFS[name]._init_fn if ours else None


def is_product(file: str) -> bool:
    """Return whether a file is of what we ship, imported by either name of kernels/."""
    inside = Path(file).is_relative_to(ROOT) or "mlembed_kernels" in file
    return inside and not Path(file).is_relative_to(ROOT / "tests")


class FakeDevice(TorchDispatchMode):
    """Lists operations that would make the host wait.

    waits: (the function of ours that calls it, operation and reason), in order. operators: those
    of ours that ran. copies: the number of copies to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.operators: set[str] = set()
        self.copies = 0
        self._pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if (function := body(name)) is not None:
            self.operators.add(name)
            with self:
                return function(*args, **kwargs)
        if (answer := self._pinning(func, args, kwargs)) is not None:
            return answer
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in COPIES:
            return self._copy(func, args, kwargs)
        if any(x.is_meta for x in tensors) and (reason := self._reason(func, args, tensors)):
            self._wait(func.name(), reason)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **kwargs)

    def _wait(self, operation: str, reason: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if is_product(frame.filename)]
        where = f"{Path(ours[-1].filename).name}: {ours[-1].name}" if ours else "a test"
        self.waits.append((where, f"{operation} {reason}"))

    def _pinning(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do what there is no CUDA for: pin memory, and tell whether it is pinned."""
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        # In inference mode the outer operation arrives.
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        return None

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned.add(x.untyped_storage().data_ptr())
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return not x.is_meta and x.untyped_storage().data_ptr() in self._pinned

    def _reason(self, func: Any, args: Any, tensors: list[Tensor]) -> str:
        """Return why an operation makes the host wait, "" if it does not."""
        # A number of the host is an argument of a kernel.
        if host := [x for x in tensors if not x.is_meta and x.ndim]:
            return f"copies a tensor of the host, {list(host[0].shape)} {host[0].dtype}"
        if func.overloadpacket.__name__ in INDEXING:
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            return "counts the rows of a mask" if masks else ""
        return "reads numbers of the device" if TAGS & set(func.tags) else ""

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Copy; numbers that come from the device are zeros."""
        new = func is aten._to_copy.default
        source = args[0] if new else args[1]
        target = torch.device(kwargs.get("device") or source.device) if new else args[0].device
        if (source.device == DEVICE) == (target == DEVICE):
            return func(*args, **kwargs)
        self.copies += target == DEVICE
        later = kwargs.get("non_blocking", False) or (not new and len(args) > 2 and args[2])
        # torch pins the memory of a new tensor if the copy to it is not to wait.
        host = source if target == DEVICE else None if new else args[0]
        if not later or not (host is None or self._is_pinned(host)):
            self._wait(func.name(), f"copies from {source.device} to {target}")
        if target == DEVICE:
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype") or source.dtype
        return self._pin(torch.zeros(source.shape, dtype=dtype)) if new else args[0].zero_()


class _Calls(TorchFunctionMode):
    """Lists calls that copy numbers of Python to the device: torch does it inside of them."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if made and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            self.device._wait(func.__name__, "copies numbers to the device")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self.device._wait(func.__name__, "copies a list to the device")
        return func(*args, **kwargs)


class _Event:
    """An event of the device, for which the host may wait."""

    device: FakeDevice

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.device._wait("Event.synchronize", "waits for the work before it")


class _Card:
    multi_processor_count = 132  # of an H100 or H200


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Pretend inside that there is a CUDA device, and list the waits for it."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    device = FakeDevice()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", nothing)
        patch.setattr(Tensor, "is_cuda", property(lambda x: x.is_meta))
        patch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *args: False)
        optimizer = sys.modules["torch.optim.optimizer"]
        names = "_get_fused_kernels_supported_devices"
        patch.setattr(optimizer, names, lambda: ["cpu", "cuda", "meta"])
        patch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda device: _Card)
        patch.setattr(torch.cuda, "Event", type("Event", (_Event,), {"device": device}))
        synchronize = partial(device._wait, "synchronize", "waits for all work")
        patch.setattr(torch.cuda, "synchronize", lambda *args: synchronize())
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        # Another thread would not see these modes.
        with torch.autograd.set_multithreading_enabled(False), device, _Calls(device):
            yield device
