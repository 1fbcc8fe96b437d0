"""Columns that are split between programs, as on a GPU whose multiprocessors rows alone do not
fill; on a CPU the number of splits is forced.
"""

from functools import partial

import pytest
import torch
from loss_truth import DEVICE, assert_as_exact, results, rounded, vectors

from mlembed_kernels.similarity.distill import distill
from mlembed_kernels.similarity.pairwise_lse import pairwise_lse, pairwise_lse_ref

pytest.importorskip("triton")
from mlembed_kernels.similarity import _lse_forward, _tiles  # noqa: E402
from mlembed_kernels.similarity._bands import bands_of  # noqa: E402
from mlembed_kernels.similarity._mask import PairMask  # noqa: E402
from mlembed_kernels.similarity._tiles import TileMask  # noqa: E402

# In fp32 these columns are 12 tiles of the narrow kernel and 6 of the wide one: of 4 splits the
# last has no wide tile, of 5 the last two, and of 7 the last has no narrow one either.
ROWS, COLUMNS, DIMS = 40, 700, (8, 144)
TILES = 12, 6
WORKSPACE = 1 << 29


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def forced(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    monkeypatch.setattr(_lse_forward, "splits_of", lambda programs, tiles, warps, x: splits)


def check(**options) -> None:
    """Sums, and every gradient, against float64."""
    x, y = vectors(1, ROWS, DIMS[-1], seed=1), vectors(1, COLUMNS, DIMS[-1], seed=2)
    scale = torch.tensor([[20.0, 13.0]], dtype=torch.float64)
    given = rounded({"x": x, "y": y, "dims": DIMS, "scale": scale, **options}, torch.float32)
    got = results(partial(pairwise_lse, impl="triton"), given, torch.float32, DEVICE)
    allowed, want = (results(pairwise_lse_ref, given, t) for t in (torch.float32, torch.float64))
    assert_as_exact(got, allowed, want, temperature=0.05)


def masks() -> dict:
    """Keys that some pairs share, and a positive for each row."""
    keys = {"row_keys": [torch.arange(ROWS) % 37], "col_keys": [torch.arange(COLUMNS) % 41]}
    return {**keys, "positive": torch.arange(ROWS) * 5}


# One split is what every other test on a CPU has.
@pytest.mark.parametrize("splits", [slow(1), 4, 5, slow(7)])
def test_splits_add_up(splits, monkeypatch):
    """Forward and every gradient, whose saved sums come from the splits."""
    forced(monkeypatch, splits)
    check(**masks(), columns=True)


@pytest.mark.parametrize("splits", [slow(4), 5])
def test_splits_add_up_where_near_pairs_are_dropped(splits, monkeypatch):
    forced(monkeypatch, splits)
    check(**masks(), ceiling=torch.full((1, ROWS), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [slow("mse"), "kl"])
def test_splits_against_a_teacher(kind, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    q, c, teacher_q, teacher_c = (
        torch.randn(*shape, generator=generator).to(DEVICE)
        for shape in ((1, ROWS, 144), (1, COLUMNS, 144), (ROWS, 24), (COLUMNS, 24))
    )

    def results(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, c)]
        teachers = teacher_q.to(dtype), teacher_c.to(dtype)
        loss_EM = distill(*leaves, *teachers, dims=DIMS, kind=kind, impl=impl)
        return [loss_EM.detach(), *torch.autograd.grad(loss_EM.sum(), leaves)]

    forced(monkeypatch, 4)
    truth = results("reference", torch.float64)
    for got, want in zip(results("triton", torch.float32), truth, strict=True):
        most = 1e-5 * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=most)


class Guarded:
    """A tensor's copy with memory behind it that no program may read."""

    def __init__(self, x: torch.Tensor, behind: int = 1 << 20) -> None:
        buffer = torch.empty(x.numel() + behind, dtype=x.dtype)
        self.x = buffer[: x.numel()].view(x.shape)
        self.x.copy_(x)
        self.first = self.x.data_ptr() + x.nbytes
        self.last = buffer.data_ptr() + buffer.nbytes


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's loads are watched")
@pytest.mark.parametrize("case", ["keys", "near"])
def test_a_split_without_columns_reads_no_further(case, monkeypatch):
    """Programs begin a tile before they know whether there is one."""
    from triton.runtime.interpreter import InterpreterBuilder

    guards: list[Guarded] = []
    behind: list[int] = []
    load = InterpreterBuilder.create_masked_load

    def watched(self, ptrs, mask, *rest):
        places = ptrs.data[mask.data]
        for guard in guards:
            behind.append(int(((places >= guard.first) & (places < guard.last)).sum()))
        return load(self, ptrs, mask, *rest)

    def guard(x: torch.Tensor) -> torch.Tensor:
        guards.append(Guarded(x))
        return guards[-1].x

    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1, n, DIMS[-1], generator=generator) for n in (128, 768))
    mask = PairMask(col_counts=torch.tensor([700]))
    if case == "keys":
        rows, cols = torch.zeros(1, 128, dtype=torch.int32), torch.ones(1, 768, dtype=torch.int32)
        keys = TileMask(row_keys=rows, col_keys=guard(cols))
        monkeypatch.setattr(TileMask, "of", lambda *_: keys)
    else:
        mask = mask._replace(ceiling=torch.full((1, 128), 0.2))
        near_mask = _tiles.near_mask
        monkeypatch.setattr(_tiles, "near_mask", lambda *args: guard(near_mask(*args)))
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    scale = torch.full((1, 2), 20.0)
    for splits in (4, 5, 7):
        forced(monkeypatch, splits)
        guards[1:], behind[:] = [], []
        _lse_forward.forward(x, y, bands_of(DIMS), scale, mask, False, WORKSPACE)
        assert behind and not sum(behind)


def test_splits_are_at_most_the_tiles_of_each_kernel(monkeypatch):
    asked: list[int] = []

    def most(programs: int, tiles: int, warps: int, x: torch.Tensor) -> int:
        asked.append(tiles)
        return tiles

    monkeypatch.setattr(_lse_forward, "splits_of", most)
    x, y = (vectors(1, n, 144, seed=n).float().to(DEVICE) for n in (5, COLUMNS))
    for dims in (DIMS, (8,)):
        given = {"dims": dims, "scale": torch.full((1, len(dims)), 20.0, device=DEVICE)}
        got = pairwise_lse(x, y, **given, impl="triton")[0]
        torch.testing.assert_close(got, pairwise_lse_ref(x, y, **given)[0])
    assert asked == [*TILES, TILES[0]]


class Card:
    multi_processor_count = 132


class OnCard:
    is_cuda, device = True, torch.device("cuda", 0)


def test_splits_fill_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    # Kernels of eight warps have one program a multiprocessor, those of four have three.
    assert _lse_forward.splits_of(32, 16, 8, OnCard()) == 4
    assert _lse_forward.splits_of(64, 32, 4, OnCard()) == 6
    assert _lse_forward.splits_of(1, 100, 8, OnCard()) == 100
    # Eight parts of the columns at least, each of eight tiles, share the rows in cache.
    assert all(8 <= _lse_forward.splits_of(n, 64, 8, OnCard()) <= 16 for n in (132, 133, 896))
    assert _lse_forward.splits_of(10_000, 24, 8, OnCard()) == 3


@pytest.mark.parametrize(("programs", "tiles"), [(128, 128), (100, 60), (896, 64), (7, 33)])
def test_few_multiprocessors_idle_at_the_end(programs, tiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    splits = _lse_forward.splits_of(programs, tiles, 8, OnCard())
    steps = -(-programs * splits // 132) * -(-tiles // splits)
    assert steps <= 1.1 * programs * tiles / 132 + 1
