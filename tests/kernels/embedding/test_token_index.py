"""The lists of a batch's tokens against counting by hand; processes and devices."""

import pickle
from collections import Counter

import pytest
import torch

from mlembed_kernels import TokenIndex
from mlembed_kernels._lists import ALIGN
from mlembed_kernels.embedding.token_index import PART, STEP


def stream(T: int, V: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = 1 / torch.arange(1.0, V + 1)
    at = torch.multinomial(weight, T, replacement=True, generator=generator)
    return torch.randperm(V, generator=generator)[at]


# One; equal ones; all different, falling; around a part; ids far apart; more than STEP tokens of
# several parts; a stream.
IDS = {
    "one": torch.tensor([5]),
    "equal": torch.full((PART * 3 + 1,), 9),
    "different": torch.arange(77).flip(0),
    "parts": torch.arange(4).repeat_interleave(torch.tensor([PART, PART + 1, PART - 1, 2 * PART])),
    "far": torch.tensor([2**31 - 1, 0, 2**31 - 1, 7]),
    "many": torch.arange(STEP + 5).repeat(PART + 1),
    "stream": stream(3000, 1009),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", IDS)
def test_lists_equal_counting(name, dtype):
    ids = IDS[name].to(dtype)
    o, listed = TokenIndex.of(ids), ids.tolist()
    counted = Counter(listed)
    assert (o.tokens, o.distinct) == (len(listed), len(counted))
    assert (o.lowest, o.highest) == (min(listed), max(listed))
    # Most frequent first, equally frequent ones by id.
    tokens = sorted(counted, key=lambda token: (-counted[token], token))
    assert o.ids_n.tolist() == tokens
    places: dict[int, list[int]] = {token: [] for token in tokens}
    for t, token in enumerate(listed):
        places[token].append(t)
    assert o.order_T.tolist() == [t for token in tokens for t in places[token]]
    # Parts of one token side by side, full but the last.
    want = [
        (token, places[token][i : i + PART])
        for token in tokens
        for i in range(0, counted[token], PART)
    ]
    order, parts = o.order_T.tolist(), zip(o.first_P.tolist(), o.count_P.tolist(), strict=True)
    got = [order[first : first + count] for first, count in parts]
    assert list(zip(o.ids_P.tolist(), got, strict=True)) == want and o.parts == len(want)
    several = [token for token in tokens if counted[token] > PART]
    assert o.several == len(several) and o.ids_n.tolist()[: o.several] == several
    for token, first, n in zip(several, o.first_part_m.tolist(), o.parts_m.tolist(), strict=True):
        assert n == -(-counted[token] // PART)
        assert o.ids_P.tolist()[first : first + n] == [token] * n
    assert o.bounds[-1] == sum(o.parts_m.tolist())


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("rows", [1, STEP, 3 * STEP // 2, 2 * STEP, 1 << 30])
def test_chunks_cover_tokens_once(name, rows):
    o = TokenIndex.of(IDS[name])
    chunks = o.chunks(rows)
    tokens = [i for some, _ in chunks for i in range(some.start, some.stop)]
    assert tokens == list(range(o.distinct))
    assert all(some.stop - some.start <= max(rows, STEP) for some, _ in chunks)
    firsts, parts = o.first_part_m.tolist(), o.parts_m.tolist()
    for some, of_several in chunks:
        here = range(some.start, min(some.stop, o.several))
        want = [p for i in here for p in range(firsts[i], firsts[i] + parts[i])]
        assert list(range(of_several.start, of_several.stop)) == want


def test_lists_are_aligned():
    o = TokenIndex.of(IDS["stream"])
    lists = o.order_T, o.ids_P, o.first_P, o.count_P, o.ids_n, o.first_part_m, o.parts_m
    assert all(x.storage_offset() % ALIGN == 0 and x.dtype == torch.int32 for x in lists)
    assert sum(len(x) for x in lists) <= len(o.buffer) < sum(len(x) + ALIGN for x in lists)


def test_from_loader_process_to_device():
    batches = [IDS["stream"], IDS["one"]]
    made = torch.utils.data.DataLoader(
        Made(batches), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    for ids, got in zip(batches, made, strict=True):
        want = TokenIndex.of(ids)
        for x in (got, pickle.loads(pickle.dumps(want)), want.to("cpu")):
            assert torch.equal(x.buffer, want.buffer)
            assert (x.counts, x.bounds) == (want.counts, want.bounds)
    meta = want.to(torch.device("meta"))
    assert meta.buffer.device.type == "meta" and meta.counts == want.counts


class Made(torch.utils.data.Dataset):
    """Batches' lists, made where they are asked for."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return TokenIndex.of(self.batches[i])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), r"at least one, got torch.int64 \[0\]"),
        (torch.zeros(2, 3, dtype=torch.int64), r"\[T\], .*got torch.int64 \[2, 3\]"),
        (torch.tensor(3), r"got torch.int64 \[\]"),
        (torch.zeros(3), "got torch.float32"),
        (torch.zeros(3, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(3, dtype=torch.int16), "expected int32 or int64"),
    ],
    ids=["none", "two_axes", "no_axis", "floats", "flags", "short"],
)
def test_wrong_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        TokenIndex.of(ids)
