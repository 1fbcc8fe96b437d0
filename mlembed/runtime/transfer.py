"""Values with tensors, moved to a device by one copy that the host does not wait for.

A copy from memory that is not pinned waits for the device's stream, and so for all work before it.
So the tensors of a value lie end to end in one pinned buffer. A freed pinned buffer goes back to
torch's allocator, which reuses it only once the copies from it have ended.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

ALIGN = 64  # bytes: where each tensor begins, for the kernels that read 16 bytes at a time
T = TypeVar("T")


class Place(NamedTuple):
    """A tensor's first byte in a buffer, its dtype and shape."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def moved(value: T, device: torch.device) -> T:
    """Return a value whose CPU tensors are on a device, by one copy; on a CPU the value itself."""
    if device.type == "cpu":
        return value
    buffer, layout = flattened(value, pin=True)
    return restored(buffer.to(device, non_blocking=True), layout)


def pinned(value: T) -> T:
    """Return a value whose CPU tensors are views of one pinned buffer."""
    return restored(*flattened(value, pin=True))


def flattened(value: T, pin: bool = False) -> tuple[Tensor, T]:
    """Return one buffer, uint8, and the value with a Place instead of each CPU tensor.

    Tensors that share a buffer already, pinned if asked for, are not copied. Values are
    dataclasses, tuples and dictionaries, of tensors and of anything else, which stays as it is.
    """
    tensors: list[Tensor] = []
    _replaced(value, Tensor, lambda x: tensors.append(x))
    if (shared := _shared(tensors)) is not None:
        return shared.pin_memory() if pin else shared, _replaced(value, Tensor, _place)
    size = sum(_padded(x) for x in tensors)
    buffer, end = torch.empty(size, dtype=torch.uint8, pin_memory=pin), 0

    def copied(x: Tensor) -> Place:
        nonlocal end
        place = Place(end, x.dtype, tuple(x.shape))
        _view(buffer, place).copy_(x)
        end += _padded(x)
        return place

    return buffer, _replaced(value, Tensor, copied)


def restored(buffer: Tensor, layout: T) -> T:
    """Return the value that `flattened` gave as `layout`, its tensors as views of the buffer."""
    return _replaced(layout, Place, lambda place: _view(buffer, place))


def _shared(tensors: list[Tensor]) -> Tensor | None:
    """Return the memory that all tensors are contiguous views of, uint8, if there is one."""
    storages = {x.untyped_storage().data_ptr() for x in tensors}
    if len(storages) != 1 or not all(x.is_contiguous() for x in tensors):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage())


def _place(x: Tensor) -> Place:
    return Place(int(x.storage_offset()) * x.itemsize, x.dtype, tuple(x.shape))


def _padded(x: Tensor) -> int:
    return -(-x.nbytes // ALIGN) * ALIGN


def _view(buffer: Tensor, place: Place) -> Tensor:
    begin, dtype, shape = place
    size = torch.Size(shape).numel() * dtype.itemsize
    return buffer[begin : begin + size].view(dtype).view(shape)


def _replaced(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return a value with function(x) instead of each x of a kind in it."""
    if isinstance(value, kind):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _replaced(getattr(value, f.name), kind, function) for f in fields(value)}
        return replace(value, **parts)
    if isinstance(value, dict):
        return {key: _replaced(part, kind, function) for key, part in value.items()}
    if type(value) is tuple:
        return tuple([_replaced(part, kind, function) for part in value])
    return value
