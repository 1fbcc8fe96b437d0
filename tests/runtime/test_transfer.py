"""One buffer of a value's tensors, and values that travel in it."""

import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import DEVICE, fake_device
from torch import Tensor

from mlembed.data.collate import collate
from mlembed.data.packing import pack
from mlembed.runtime import transfer
from tests.data.samples import equal

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Nested:
    """A value of every kind of part."""

    one: Tensor
    parts: tuple[Any, ...]
    named: dict[str, Any]
    text: str = "text"


def nested():
    numbers = torch.arange(5), torch.rand(3, 2), torch.tensor([True, False, True])
    others = torch.empty(0, 7), torch.tensor(2.5, dtype=torch.bfloat16), torch.rand(4, 6).T
    return Nested(torch.arange(3, dtype=torch.int32), (*numbers, "a", None), {"b": (others, 4)})


def leaves(value):
    found = []
    transfer._replaced(value, Tensor, found.append)
    return found


def batch(**options):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 50, n) for n in rng.integers(1, 30, 24)]
    groups = [[i, i + 1, i + 2] for i in range(0, 24, 3)]
    depths = np.array([2, 1] * 4)
    runs = rng.random((2, 24)) < 0.7
    scores = rng.random(8)
    options = dict(max_tokens=60, task="sts", scores=scores) | options
    return collate(groups, texts.__getitem__, np.arange(24) // 2, depths, runs, **options)


@pytest.mark.parametrize("make", [nested, batch], ids=["nested", "batch"])
def test_one_buffer(make):
    value = make()
    buffer, layout = transfer.flattened(value)
    assert buffer.dtype == torch.uint8 and not leaves(layout)
    again = transfer.restored(buffer, layout)
    assert equal(again, value)
    begins = [x.storage_offset() * x.itemsize for x in leaves(again)]
    assert all(begin % transfer.ALIGN == 0 for begin in begins)
    sizes = [x.nbytes for x in leaves(again)]
    ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
    assert ends[-1] <= len(buffer) < sum(sizes) + transfer.ALIGN * len(sizes)
    # A second time nothing is copied.
    shared, _ = transfer.flattened(again)
    assert shared.data_ptr() == buffer.data_ptr() and len(shared) == len(buffer)


def test_a_cpu_copies_nothing():
    value = batch()
    assert transfer.moved(value, CPU) is value and value.to(CPU) is value
    assert value.host is value and value.packs[0].to(CPU) is value.packs[0]


def test_a_device_gets_one_copy():
    value = batch()
    with fake_device() as device:
        got = value.to(DEVICE)
        assert device.copies == 1
        pack([np.arange(9)]).to(DEVICE)
    assert device.copies == 2 and not device.waits
    assert got.host is value and got.tokens == value.tokens
    wanted, moved = leaves(value), leaves(got)[: len(leaves(value))]
    for want, x in zip(wanted, moved, strict=True):
        assert (x.device, x.dtype, x.shape) == (DEVICE, want.dtype, want.shape)


def test_a_pinned_value_is_not_pinned_again():
    with fake_device():
        value = batch().pin_memory()
        assert all(x.is_pinned() for x in leaves(value) if x.numel()) and equal(value, batch())
        again, _ = transfer.flattened(value, pin=True)
        assert again.data_ptr() == value.packs[0].ids_T.untyped_storage().data_ptr()
        # What a worker sent is in one buffer already, which is pinned as a whole.
        received = transfer.restored(*transfer.flattened(batch()))
        shared = transfer.flattened(received)[0]
        pinned, _ = transfer.flattened(received, pin=True)
        assert pinned.is_pinned() and torch.equal(pinned, shared) and not shared.is_pinned()


def test_a_batch_travels_in_one_file():
    """A worker opens a file for each tensor that it sends."""
    value = batch(task="retrieval", scores=None)
    sent, reduced = [], torch.multiprocessing.reductions.reduce_tensor

    def counted(x):
        sent.append(x.nbytes)
        return reduced(x)

    ForkingPickler.register(Tensor, counted)
    try:
        data = ForkingPickler.dumps(value)
    finally:
        ForkingPickler.register(Tensor, reduced)
    assert len(sent) == 1
    assert equal(pickle.loads(data), value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory():
    value = batch().pin_memory()
    assert all(x.is_pinned() for x in leaves(value)) and equal(value, batch())
    assert equal(transfer.pinned(value), value)
    got = value.to(torch.device("cuda", 0))
    assert all(x.is_cuda for x in leaves(got.packs))
    assert equal(got.place.cpu(), value.place)
