"""The memory that is alive while a function runs, also inside our operators."""

import weakref
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter launch nothing: how much memory the host asks for does not depend
    on what kernels write there.
    """
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *_, **__: None)


class Live(TorchDispatchMode):
    """Records every tensor with memory of its own, as it is made and as it is freed.

    A mode sees only the outputs of a custom operator, so this one runs the operator's function
    itself. Inputs do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, Shape]] = []  # bytes, negative where they are freed
        self.users: dict[int, int] = {}  # tensors that share the memory at an address
        self.first: dict[int, tuple[int, Shape]] = {}  # bytes and shape of the first of them

    @property
    def shapes(self) -> list[Shape]:
        return [shape for size, shape in self.events if size > 0]

    def most(self, counts: Callable[[Shape], bool] = lambda shape: True) -> int:
        """Return the most bytes that were alive at one time in tensors whose shape counts."""
        return max(accumulate(size for size, shape in self.events if counts(shape)), default=0)

    def _free(self, at: int) -> None:
        self.users[at] -= 1
        if not self.users[at]:
            size, shape = self.first[at]
            self.events.append((-size, shape))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = OPDEFS.get(func.name())
        if operator is not None:
            with self:
                return operator._init_fn(*args, **(kwargs or {}))
        storages = [x.untyped_storage() if isinstance(x, Tensor) else x for x in args]
        given = {x.data_ptr() for x in storages if isinstance(x, torch.UntypedStorage)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is None or not storage.nbytes():
                continue
            at = storage.data_ptr()
            if not self.users.get(at):
                if at in given:
                    continue
                self.first[at] = storage.nbytes(), tuple(t.shape)
                self.events.append(self.first[at])
            self.users[at] = self.users.get(at, 0) + 1
            weakref.finalize(t, self._free, at)
        return out
