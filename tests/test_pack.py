"""Token lists to one row and back, and packs within a token budget."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mlembed.pack import budgeted, pack
from mlembed_kernels import Work

# One token, a prime, equal neighbours, a long one: boundaries off by one show in each.
LENGTHS = (3, 1, 7, 1, 1, 64, 2)


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1000, n).astype(np.int32) for n in LENGTHS]


def test_pack_gives_every_text_back(texts):
    batch = pack(texts)
    assert len(batch) == len(texts)
    bounds = batch.cu_seqlens.tolist()
    assert bounds == [0, 3, 4, 11, 12, 13, 77, 79]
    for text, begin, end in zip(texts, bounds[:-1], bounds[1:], strict=True):
        assert batch.ids_T[begin:end].tolist() == text.tolist()
        assert batch.pos_T[begin:end].tolist() == list(range(len(text)))
    assert batch.work.max_seqlen == 64 and type(batch.work.max_seqlen) is int


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_dtypes_are_fixed_whatever_came_in(dtype):
    batch = pack([np.array([5, 6], dtype=dtype), np.array([7], dtype=dtype)])
    assert batch.ids_T.dtype == batch.pos_T.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.ids_T.tolist() == [5, 6, 7]


def test_pack_copies(texts):
    batch = pack(texts[:1])
    before = batch.ids_T.tolist()
    texts[0][:] = 0
    assert batch.ids_T.tolist() == before


def test_to_moves_everything(texts):
    batch = pack(texts).to(torch.device("meta"))
    tensors = (batch.ids_T, batch.pos_T, batch.cu_seqlens, batch.work.buffer)
    assert {t.device.type for t in tensors} == {"meta"}
    assert len(batch) == len(texts) and batch.work.max_seqlen == 64


def test_the_work_of_attention_is_listed_once(texts):
    batch = pack(texts)
    assert batch.work.tokens == len(batch.ids_T) and batch.work.sequences == len(texts)
    assert batch.cu_seqlens.data_ptr() == batch.work.buffer.data_ptr()  # no second copy of it
    assert torch.equal(batch.work.buffer, Work.of(batch.cu_seqlens).buffer)


def test_worker_processes_hand_it_over(texts):
    loader = DataLoader([pack(texts), pack(texts[:1])], batch_size=None, num_workers=1)
    for got, want in zip(loader, (pack(texts), pack(texts[:1])), strict=True):
        assert len(got) == len(want) and got.work.max_seqlen == want.work.max_seqlen
        assert torch.equal(got.ids_T, want.ids_T) and torch.equal(got.pos_T, want.pos_T)
        assert torch.equal(got.work.buffer, want.work.buffer)
        assert got.work.counts == want.work.counts


def test_nothing_to_pool_is_an_error():
    with pytest.raises(ValueError, match="expected one or more"):
        pack([])
    with pytest.raises(ValueError, match=r"one or more tokens, got lengths \[2 0\]"):
        pack([np.array([1, 2]), np.array([], dtype=np.int64)])


@pytest.mark.parametrize("budget", [1, 2, 5, 64, 100, 10_000])
@pytest.mark.parametrize("kind", ["random", "equal", "one", "rising"])
def test_budgeted(budget, kind):
    lengths = {
        "random": np.random.default_rng(1).integers(1, 80, 97),
        "equal": np.full(13, 5),
        "one": np.array([7]),
        "rising": np.arange(1, 30),
    }[kind]
    packs = budgeted(lengths, budget)
    rows = np.concatenate(packs)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[rows]) >= 0).all()
    for one in packs:
        assert len(one) == 1 or lengths[one].sum() <= budget
    for one, following in zip(packs[:-1], packs[1:], strict=True):
        assert lengths[one].sum() + lengths[following[0]] > budget  # no pack closed early


def test_budgeted_keeps_the_order_of_equal_lengths():
    assert [p.tolist() for p in budgeted(np.array([2, 1, 2, 1]), 4)] == [[1, 3, 0], [2]]


def test_budgeted_of_nothing():
    assert budgeted(np.array([], dtype=np.int64), 10) == []
