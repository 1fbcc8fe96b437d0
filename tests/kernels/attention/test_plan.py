"""Work lists of packed attention: every token once, in the documented order."""

import random
from itertools import pairwise

import pytest
import torch
from attention_truth import bounds

from mlembed_kernels import AttentionPlan
from mlembed_kernels.attention.plan import PACKS, TILES

# Lengths that hurt: about a pack's and a tile's 16, 64 and 128; what fills a pack to the last token
# and what misses it by one; long ones first, last, side by side; many of one token.
MIXES = {
    "none": [],
    "one_token": [1],
    "a_full_pack": [64],
    "one_too_many": [65],
    "sixteen": [16, 17, 15, 1, 8, 8, 1, 33],
    "two_halves": [32, 32],
    "two_halves_and_one": [32, 33],
    "halves_one_token_apart": [63, 1, 64, 1, 63],
    "long_between_short": [3, 65, 4, 200, 5],
    "long_side_by_side": [65, 129, 128, 127],
    "long_at_both_ends": [300, 1, 2, 300],
    "alike": [70, 70, 70],
    "ones": [1] * 130,
}


def random_mix(seed: int) -> list[int]:
    """Up to 40 sequences; a few short ones, mostly short ones, or all sorts."""
    choose = random.Random(seed)
    longest = choose.choice([2, 16, 64, 66, 130, 500])
    return [choose.randint(1, longest) for _ in range(choose.randint(0, 40))]


ALL = [*MIXES.values(), *(random_mix(seed) for seed in range(150))]


def test_every_token_once():
    for lengths in ALL:
        plan = AttentionPlan.of(bounds(lengths))
        for size, most in TILES.items():  # what is longer than a pack holds is in the tiles
            times = [0] * sum(lengths)
            for first, n in plan.packs(most).tolist():
                for t in range(first, first + n):
                    times[t] += 1
            for first, _, end in plan.tiles(size).tolist():
                for t in range(first, min(first + size, end)):
                    times[t] += 1
            assert times == [1] * sum(lengths), (lengths, size)


@pytest.mark.parametrize("size", PACKS)
def test_packs_are_as_many_whole_short_sequences_as_fit(size):
    for lengths in ALL:
        cu = bounds(lengths).tolist()
        found = AttentionPlan.of(bounds(lengths)).packs(size).tolist()
        want = []
        for begin, end in pairwise(cu):
            n = end - begin
            if n > size:
                continue
            neighbours = want and sum(want[-1]) == begin  # no longer sequence is between them
            if neighbours and want[-1][1] + n <= size:
                want[-1][1] += n
            else:
                want.append([begin, n])
        assert found == want, lengths
        assert all(first in cu and first + n in cu and 0 < n <= size for first, n in found)


@pytest.mark.parametrize("size", TILES)
def test_tiles_are_of_one_long_sequence_and_no_more_than_it_has(size):
    for lengths in ALL:
        tiles = AttentionPlan.of(bounds(lengths)).tiles(size).tolist()
        sequences = {(b, e) for b, e in pairwise(bounds(lengths).tolist()) if e - b > TILES[size]}
        assert {(begin, end) for _, begin, end in tiles} == sequences
        assert len(tiles) == sum(-((b - e) // size) for b, e in sequences)  # an exact grid
        assert all(begin <= first < end for first, begin, end in tiles)
        assert all((first - begin) % size == 0 for first, begin, _ in tiles)


@pytest.mark.parametrize("size", TILES)
def test_long_tiles_and_others(size):
    """A sequence's own length decides, up to 512 tokens and beyond."""
    for lengths in (*ALL, [512, 513, 70, 600, 3]):
        plan = AttentionPlan.of(bounds(lengths))
        long, others = (plan.tiles(size, long=kind) for kind in (True, False))
        assert torch.equal(torch.cat([long, others]), plan.tiles(size))
        assert all(end - begin > 512 for _, begin, end in long.tolist())
        assert all(end - begin <= 512 for _, begin, end in others.tolist())


@pytest.mark.parametrize("size", TILES)
def test_longest_first_each_from_its_end(size):
    for lengths in ALL:
        tiles = AttentionPlan.of(bounds(lengths)).tiles(size).tolist()
        keys = [(begin - end, begin, -first) for first, begin, end in tiles]
        assert keys == sorted(keys), lengths


def test_numbers_of_the_batch():
    for lengths in ALL:
        cu = bounds(lengths)
        plan = AttentionPlan.of(cu)
        assert (plan.tokens, plan.sequences) == (sum(lengths), len(lengths))
        assert plan.max_seqlen == max(lengths, default=0)
        assert torch.equal(plan.cu_seqlens, cu)
        begins = [begin for begin, end in pairwise(cu.tolist()) for _ in range(begin, end)]
        ends = [end for begin, end in pairwise(cu.tolist()) for _ in range(begin, end)]
        assert (plan.begin_T.tolist(), plan.end_T.tolist()) == (begins, ends)
        bounds_T = plan.begin_T, plan.end_T
        lists = plan.cu_seqlens, *bounds_T, *map(plan.packs, PACKS), *map(plan.tiles, TILES)
        assert {x.dtype for x in lists} == {torch.int32}
        # Where Triton sees a pointer that 16 bytes divide, it compiles for that alone.
        assert all(x.storage_offset() % 4 == 0 for x in lists)
        longer = [plan.tiles(size, long=True) for size in TILES]
        assert plan.counts == tuple(len(x) for x in (*lists[3:], *longer))


def test_lists_of_a_prefix():
    """Layer-skip attention relies on it: nothing of sequences that left, the others unchanged."""
    for lengths in ALL[:60]:
        cu = bounds(lengths)
        whole = AttentionPlan.of(cu)
        for n in {0, 1, len(lengths) // 2, len(lengths)}:
            if n > len(lengths):
                continue
            part, T = AttentionPlan.of(cu[: n + 1]), sum(lengths[:n])
            assert (part.tokens, part.sequences) == (T, n)
            assert torch.equal(part.begin_T, whole.begin_T[:T])
            assert torch.equal(part.end_T, whole.end_T[:T])
            for size in TILES:
                want = [tile for tile in whole.tiles(size).tolist() if tile[2] <= T]
                assert part.tiles(size).tolist() == want
            for size in PACKS:
                packs = whole.packs(size).tolist()
                want = [[first, min(k, T - first)] for first, k in packs if first < T]
                assert part.packs(size).tolist() == want


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
def test_integers_of_any_size(dtype):
    lengths = MIXES["long_between_short"]
    want = AttentionPlan.of(bounds(lengths))
    assert torch.equal(AttentionPlan.of(bounds(lengths).to(dtype)).buffer, want.buffer)
    apart = bounds(lengths).to(dtype).repeat_interleave(2)[::2]
    assert torch.equal(AttentionPlan.of(apart).buffer, want.buffer)


WRONG = {
    "floats": (torch.tensor([0.0, 3.0]), r"expected integers \[N \+ 1\], got torch.float32"),
    "one_number": (torch.tensor(0), r"expected integers \[N \+ 1\]"),
    "two_axes": (torch.tensor([[0, 3]]), r"expected integers \[N \+ 1\]"),
    "nothing": (torch.tensor([], dtype=torch.int32), r"expected integers \[N \+ 1\]"),
    "not_from_0": (torch.tensor([1, 3, 5]), r"expected 0 = first, .* got \[1, 3\] at 0"),
    "from_below_0": (torch.tensor([-1, 3]), "expected 0 = first"),
    "falling": (torch.tensor([0, 2, 4, 3, 5]), r"rising .* got \[4, 3\] at 2"),
    "an_empty_sequence": (torch.tensor([0, 3, 3]), r"no sequence is empty.* got \[3, 3\] at 1"),
    "all_empty": (torch.tensor([0, 0]), "no sequence is empty"),
}


@pytest.mark.parametrize(("cu_seqlens", "message"), WRONG.values(), ids=WRONG)
def test_wrong_boundaries(cu_seqlens, message):
    with pytest.raises(ValueError, match="cu_seqlens: .*" + message):
        AttentionPlan.of(cu_seqlens)


@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES)
def test_on_another_device(lengths):
    plan = AttentionPlan.of(bounds(lengths))
    meta = plan.to("meta")
    assert meta.buffer.device.type == "meta"
    assert (meta.tokens, meta.counts) == (plan.tokens, plan.counts)
    for name in ("cu_seqlens", "begin_T", "end_T"):
        x, y = getattr(plan, name), getattr(meta, name)
        assert y.device.type == "meta" and x.shape == y.shape
    assert all(plan.packs(size).shape == meta.packs(size).shape for size in PACKS)
    assert all(plan.tiles(size).shape == meta.tiles(size).shape for size in TILES)


def test_tokens_of_active_sequences():
    lengths = [2, 1, 3]
    plan = AttentionPlan.of(bounds(lengths))
    flags = torch.tensor([True, False, True])
    assert plan.alive_T(flags).tolist() == [True, True, False, True, True, True]
    # A count beyond either end means none or all.
    for count, tokens in ((-1, 0), (0, 0), (1, 2), (2, 3), (3, 6), (4, 6)):
        for shape in ((), (1,)):
            for dtype in (torch.int32, torch.int64):
                got = plan.alive_T(torch.full(shape, count, dtype=dtype))
                assert got.dtype == torch.bool
                assert got.tolist() == [t < tokens for t in range(6)]


def test_tokens_of_no_sequences():
    plan = AttentionPlan.of(bounds([]))
    assert plan.alive_T(torch.zeros(0, dtype=torch.bool)).shape == (0,)
    assert plan.alive_T(torch.tensor(3)).shape == (0,)
