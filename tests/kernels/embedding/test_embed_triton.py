"""The nested embedding in Triton against float64; determinism, layouts, memory."""

import pytest
import torch
from embed_truth import (
    DEVICE,
    DTYPES,
    EPS32,
    HALF,
    IDS,
    NAMES,
    RANKS,
    SHORT,
    D,
    R,
    V,
    as_exact,
    cotangent,
    factors,
    module,
    run,
    same_bits,
    summable,
)
from live_memory import Live, without_kernels
from pairwise import all_pairs
from torch import Tensor

from mlembed_kernels import TokenIndex, embed
from mlembed_kernels.embedding.token_index import PART

pytest.importorskip("triton")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")


# ---- values ----


@pytest.mark.parametrize(("name", "rank", "dtype"), all_pairs(IDS, RANKS, DTYPES))
def test_as_exact_as_eager(name, rank, dtype):
    U, W = factors(dtype)
    ids = IDS[name]
    got = as_exact(ids, U, W, rank, cotangent(ids, D, dtype))
    unseen = sorted(set(range(V)) - set(ids))
    assert (got["dU"][unseen] == 0).all() and (got["dU"][:, rank:] == 0).all()
    assert (got["dW"][rank:] == 0).all()


# A column, around a tile's 128 columns, beyond the 256 of a sum's.
@dtypes
@pytest.mark.parametrize("D", [1, 16, 64, 65, 127, 128, 129, 300])
def test_widths(D, dtype):
    U, W = factors(dtype, D=D)
    ids = IDS["parts"]
    as_exact(ids, U, W, 17, cotangent(ids, D, dtype))


@dtypes
def test_a_table_of_one_row_and_one_column(dtype):
    U, W = factors(dtype, V=1, R=1)
    as_exact([0] * 5, U, W, 1, cotangent([0] * 5, D, dtype))


@pytest.mark.parametrize("rank", [5, R])
@pytest.mark.parametrize("name", ["stream", "same", "one"])
def test_fp32_factors_under_autocast(name, rank):
    U, W = factors(torch.float32)
    ids = IDS[name]
    with torch.autocast(DEVICE, HALF):
        got = as_exact(ids, U, W, rank, cotangent(ids, D, HALF))
    assert [got[name].dtype for name in NAMES] == [HALF, torch.float32, torch.float32]
    rounded = run(ids, U.to(HALF), W.to(HALF), rank, cotangent(ids, D, HALF))
    # Rounded as they are read; from fp32 steps are shorter, and sums in another order.
    size = rounded["x"].abs().max()
    assert (got["x"] - rounded["x"]).abs().max() <= torch.finfo(HALF).eps * size
    for n in ("dU", "dW"):  # and not rounded when they are done
        assert not torch.equal(got[n], got[n].to(HALF).float()), n
        assert torch.equal(got[n].to(HALF), rounded[n]), n


def test_autocast_of_backward_is_ignored():
    U, W = factors(torch.float32)
    ids, dx = IDS[SHORT], cotangent(IDS[SHORT], D, torch.float32)
    want = run(ids, U, W, 65, dx)
    U, W = U.requires_grad_(), W.requires_grad_()
    x = embed(torch.tensor(ids, device=DEVICE), U, W, 65, impl="triton")
    with torch.autocast(DEVICE, HALF):
        dU, dW = torch.autograd.grad(x, (U, W), dx)
    same_bits({"x": x, "dU": dU, "dW": dW}, want)


@dtypes
@pytest.mark.parametrize("rank", [1, 64, 65])
def test_ranks_nest(rank, dtype):
    """Columns beyond the rank are not read: NaN there changes nothing."""
    U, W = factors(dtype)
    ids, dx = IDS[SHORT], cotangent(IDS[SHORT], D, dtype)
    want = run(ids, U, W, rank, dx)
    U[:, rank:], W[rank:] = torch.nan, torch.nan
    same_bits(run(ids, U, W, rank, dx), want)


def test_other_tokens_are_not_read():
    U, W = factors(torch.float32)
    ids, dx = IDS["prime"], cotangent(IDS["prime"], D, torch.float32)
    want = run(ids, U, W, R, dx)
    U[sorted(set(range(V)) - set(ids))] = torch.nan
    same_bits(run(ids, U, W, R, dx), want)


def test_nan_stays_with_its_token():
    U, W = factors(torch.float32)
    ids = torch.tensor(IDS["stream"])
    token = ids[5]
    U[token, 3] = torch.nan
    dx = cotangent(ids, D, torch.float32)
    got = run(ids, U, W, 64, dx)
    assert torch.equal(got["x"].isnan().any(1).cpu(), ids == token)
    assert not got["dU"].isnan().any()
    dx[5, 1] = torch.nan
    got = run(ids, U, W, 64, dx)
    assert got["dU"].isnan().any(1).nonzero().tolist() == [[int(token)]]


ZEROED = all_pairs(["one", "distinct", "ends", "stream"], RANKS, DTYPES)


@pytest.mark.parametrize(("name", "rank", "dtype"), ZEROED)
def test_zeros_by_programs(name, rank, dtype, monkeypatch):
    """Many programs write the same zeros, of every row and column, as a call in advance."""
    U, W = factors(dtype)
    ids, dx = IDS[name], cotangent(IDS[name], D, dtype)
    want = run(ids, U, W, rank, dx)
    monkeypatch.setattr(module(), "FILLERS", 1)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda _: pytest.fail("in advance"))
    same_bits(run(ids, U, W, rank, dx), want)


# ---- the order of sums, and of anything else ----


@dtypes
def test_two_calls_same_bits(dtype):
    U, W = factors(dtype)
    ids, dx = IDS[SHORT], cotangent(IDS[SHORT], D, dtype)
    want = run(ids, U, W, 65, dx)
    same_bits(run(ids, U, W, 65, dx), want)
    given = TokenIndex.of(torch.tensor(ids)).to(DEVICE)
    same_bits(run(ids, U, W, 65, dx, token_index=given), want)
    same_bits(run(torch.tensor(ids, dtype=torch.int32), U, W, 65, dx), want)


def test_order_of_sums():
    """Large numbers that cancel: another order is another sum."""
    ids = torch.tensor(IDS["stream"])
    o = TokenIndex.of(ids).to(DEVICE)
    dx = cotangent(ids, D, torch.float32) * 10.0 ** (torch.arange(len(ids), device=DEVICE) % 7)[
        :, None
    ].to(torch.float32)
    ((tokens, parts),) = o.chunks(1 << 20)
    got = module()._sums(dx, o, tokens, parts).cpu()
    dx, seen = dx.cpu(), 0
    for i, token in enumerate(o.ids_n.tolist()):
        rows = dx[ids == token]
        if len(rows) <= PART:
            want, seen = torch.zeros(D), seen + 1
            for row in rows:
                want += row
            assert torch.equal(got[i], want)
        else:
            exact = rows.double().sum(0)
            assert (got[i] - exact).abs().max() <= 8 * EPS32 * rows.abs().double().sum(0).max()
    assert 0 < o.several < seen


def test_tokens_in_another_order():
    ids = torch.tensor(IDS["stream"])
    U, W, dx = summable(*factors(torch.float32), cotangent(ids, D, torch.float32))
    other = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))
    want, got = run(ids, U, W, 65, dx), run(ids[other], U, W, 65, dx[other])
    assert torch.equal(got["x"], want["x"][other])
    for n in ("dU", "dW"):  # sums in the order of the tokens
        size = want[n].abs().max()
        assert (got[n] - want[n]).abs().max() <= 64 * EPS32 * size


# ---- layouts ----


def strided(name: str) -> tuple[Tensor, Tensor]:
    U, W = factors(torch.float32)
    wide, long = (torch.full(n, torch.nan, device=DEVICE) for n in ((V, 2 * R), (2 * V, R)))
    if name == "columns_first":
        return U.T.contiguous().T, W.T.contiguous().T
    places = {"slice": wide[:, 3 : 3 + R], "columns": wide[:, ::2], "rows": long[1::2]}
    return places[name].copy_(U), W


@pytest.mark.parametrize("name", ["slice", "columns", "rows", "columns_first"])
def test_layouts_of_the_factors(name):
    ids, dx = IDS[SHORT], cotangent(IDS[SHORT], D, torch.float32)
    want = run(ids, *factors(torch.float32), 65, dx)
    got = run(ids, *strided(name), 65, dx)
    for n in NAMES:  # where rows are read one number at a time the tiles are others
        size = want[n].abs().max()
        assert (got[n] - want[n]).abs().max() <= 64 * EPS32 * size
        assert got[n].is_contiguous()


def test_layouts_of_the_cotangent():
    U, W = factors(torch.float32)
    ids = IDS[SHORT]
    dx = cotangent(ids, D, torch.float32)
    stripes = torch.zeros(len(ids), 2 * D, device=DEVICE)[:, :D]
    for odd in (
        torch.ones((), device=DEVICE).expand_as(dx),  # of x.sum()
        dx[:1].expand_as(dx),
        dx[:, :1].expand_as(dx),
        dx.T.contiguous().T,
        stripes.copy_(dx),
    ):
        same_bits(run(ids, U, W, 65, odd), run(ids, U, W, 65, odd.contiguous()))


# ---- memory ----


@pytest.fixture
def small(monkeypatch):
    """Chunks of a few tokens, and some columns of their parts."""

    def shrink(workspace: int) -> None:
        monkeypatch.setattr(module(), "WORKSPACE", workspace)
        monkeypatch.setattr("mlembed_kernels.embedding.token_index.STEP", 2)

    return shrink


REPEATED = [*IDS["stream"], *IDS["same"]]


@pytest.mark.parametrize("fillers", [1, 1 << 30], ids=["filled", "zeroed"])
@dtypes
def test_in_chunks_as_at_once(dtype, fillers, small, monkeypatch):
    # Some tokens of several parts, one of many, and others.
    ids = [*IDS["same"][:150], *(t for t in range(12) for _ in range(PART + 2 + t)), *range(60)]
    D = 48
    U, W, dx = summable(*factors(dtype, D=D), cotangent(ids, D, dtype))
    want = run(ids, U, W, 65, dx)
    small(512 * dx.element_size())
    monkeypatch.setattr(module(), "FILLERS", fillers)
    o = TokenIndex.of(torch.tensor(ids)).to(DEVICE)
    chunks = o.chunks(module().WORKSPACE // 4 * 3 // (D * dx.element_size()))
    assert len(chunks) > 5 and sum(parts.stop > parts.start for _, parts in chunks) > 1
    got = as_exact(ids, U, W, 65, dx)
    same_bits({n: got[n] for n in ("x", "dU")}, {n: want[n] for n in ("x", "dU")})
    step = torch.finfo(dtype).eps + 64 * EPS32  # sums of chunks, rounded once
    assert (got["dW"] - want["dW"]).abs().max() <= step * want["dW"].abs().max()
    same_bits(run(ids, U, W, 65, dx, token_index=o), got)


@dtypes
def test_temporaries_fit_workspace(dtype, small, monkeypatch):
    """Outputs, and fp32 sums of dW as large as it, excepted."""
    without_kernels(monkeypatch)
    small(64 << 10)
    U, W = factors(dtype, V=5000)
    dx = cotangent(REPEATED, D, dtype)
    op, o, rank = module(), TokenIndex.of(torch.tensor(REPEATED)).to(DEVICE), 17
    with Live() as made:
        sums = op._sums(dx, o, *o.chunks(64)[0])
    assert sums.nbytes < made.most() <= sums.nbytes + op.WORKSPACE // 6  # of parts, some columns
    with Live() as made:
        x = op.forward(U, W, o, rank, dtype)
        assert made.most() == x.nbytes and made.shapes == [tuple(x.shape)]
        dU, dW = op.backward(dx, U, W, o, rank, (True, True))
    most = made.most() - x.nbytes - dU.nbytes - dW.nbytes
    # On a CPU halves are turned into fp32 for their product.
    turned = 0 if DEVICE == "cuda" or dtype == torch.float32 else 2 * op.WORKSPACE
    flags = len(U) + 8 * o.distinct  # of the rows that are there, a byte each
    assert op.WORKSPACE // 2 < most <= op.WORKSPACE + flags + 2 * 4 * rank * D + turned
    assert [shape for shape in made.shapes if shape[0] >= 5000] == [(5000, R), (5000,)]


def test_saved_memory():
    """The factors, which are there anyhow, and the lists."""
    U, W = (x.requires_grad_() for x in factors(torch.float32))
    ids, saved = torch.tensor(IDS["stream"], device=DEVICE), {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        x = embed(ids, U, W, 65, impl="triton")
    lists = TokenIndex.of(ids).buffer.nbytes
    assert sum(saved.values()) == U.nbytes + W.nbytes + lists
    assert torch.autograd.grad(x.sum(), (U, W))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor(frozen, monkeypatch):
    U, W = factors(torch.float32)
    ids = torch.tensor(IDS[SHORT], device=DEVICE)
    dx = cotangent(ids, D, torch.float32)
    want = run(ids, U, W, 65, dx)
    leaf = (U, W)[1 - frozen].requires_grad_()
    work = {0: "_project", 1: "_product"}[frozen]  # that of the gradient that nobody wants
    x = embed(ids, U, W, 65, impl="triton")
    monkeypatch.setattr(module(), work, lambda *_: pytest.fail("computed"))
    (got,) = torch.autograd.grad(x, leaf, dx)
    assert torch.equal(got, want[NAMES[2 - frozen]])
    with torch.no_grad():
        monkeypatch.undo()
        assert torch.equal(embed(ids, U, W, 65, impl="triton"), want["x"])


def test_no_second_derivative():
    U, W = (x.requires_grad_() for x in factors(torch.float32))
    x = embed(torch.tensor(IDS["prime"], device=DEVICE), U, W, 5, impl="triton")
    grads = torch.autograd.grad(x.square().sum(), (U, W), create_graph=True)
    with pytest.raises(RuntimeError):
        grads[0].sum().backward()
