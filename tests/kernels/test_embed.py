"""The nested vocabulary against lookups in the merged table, in numpy and float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mlembed_kernels import embed, embed_ref

# Primes, so that no two axes can be exchanged unnoticed. Ranks: one column, the middle, all.
V, R, D = 53, 11, 17
RANKS = [1, 5, R]
# Duplicates (one token three times), the first and the last row of the table, one unseen token (1).
IDS = [0, V - 1, 7, 7, 2, 7, 0]


@pytest.fixture
def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(V, R, generator=generator, dtype=torch.float64),
        torch.randn(R, D, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_equals_the_merged_table(factors, rank, impl):
    U, W = factors
    table = U.numpy()[:, :rank] @ W.numpy()[:rank]
    got = embed(torch.tensor(IDS), U, W, rank, impl=impl)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), table[IDS], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rank", RANKS)
def test_gradients(factors, rank):
    # By hand: dU sums over a token's occurrences, dW = U[ids]^T dx; beyond the rank nothing.
    U, W = (x.requires_grad_() for x in factors)
    ids = torch.tensor(IDS)
    cotangent = np.random.default_rng(0).normal(size=(len(IDS), D))
    dU, dW = torch.autograd.grad(embed(ids, U, W, rank), (U, W), torch.from_numpy(cotangent))
    want_U, want_W = np.zeros((V, R)), np.zeros((R, D))
    for row, token in zip(cotangent, IDS, strict=True):
        want_U[token, :rank] += W.detach().numpy()[:rank] @ row
        want_W[:rank] += np.outer(U.detach().numpy()[token, :rank], row)
    np.testing.assert_allclose(dU.numpy(), want_U, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dW.numpy(), want_W, rtol=1e-12, atol=1e-12)
    assert (dU[:, rank:] == 0).all() and (dW[rank:] == 0).all()
    unseen = sorted(set(range(V)) - set(IDS))
    assert (dU[unseen] == 0).all() and dU[7, :rank].abs().min() > 0


@pytest.mark.parametrize("rank", RANKS)
def test_gradcheck(factors, rank):
    U, W = (x.requires_grad_() for x in factors)
    ids = torch.tensor(IDS)
    assert torch.autograd.gradcheck(lambda u, w: embed(ids, u, w, rank), (U, W))


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_nest(factors, rank):
    # What lies beyond the rank is not read: not-a-number there changes nothing.
    U, W = factors
    ids = torch.tensor(IDS)
    cut = embed(ids, U[:, :rank], W[:rank], rank)
    spoiled_U, spoiled_W = U.clone(), W.clone()
    spoiled_U[:, rank:] = torch.nan
    spoiled_W[rank:] = torch.nan
    torch.testing.assert_close(embed(ids, spoiled_U, spoiled_W, rank), cut, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_as_exact_as_eager(factors, rank, dtype):
    # Truth is float64 on the same bits; eager is the reference in the same dtype; the floor is two
    # units in the last place of the largest value.
    U, W = (x.to(dtype) for x in factors)
    ids = torch.tensor(IDS)
    truth = embed_ref(ids, U.double(), W.double(), rank)
    got, eager = embed(ids, U, W, rank), embed_ref(ids, U, W, rank)
    assert got.dtype == dtype
    error, allowed = ((x.double() - truth).abs().max().item() for x in (got, eager))
    assert error <= allowed + 2 * torch.finfo(dtype).eps * truth.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_both_widths(factors, dtype):
    U, W = factors
    wide = embed(torch.tensor(IDS), U, W, R)
    torch.testing.assert_close(embed(torch.tensor(IDS, dtype=dtype), U, W, R), wide)


def test_errors(factors):
    U, W = factors
    ids = torch.tensor(IDS)
    wrong = [
        ((ids, U, W, 0), {}, r"rank: expected 1\.\.11 \(the stored rank\), got 0"),
        ((ids, U, W, -1), {}, "rank: expected"),
        ((ids, U, W, R + 1), {}, "rank: expected .* got 12"),
        ((ids, U, W[:-1], 1), {}, "U, W: expected"),
        ((ids, U[0], W, 1), {}, "U, W: expected"),
        ((ids, U, W[0], 1), {}, "U, W: expected"),
        ((ids, U, W, 1), {"impl": "fastest"}, "impl: expected one of"),
        ((ids[:0], U, W, 1), {}, r"ids: expected .* at least one, got torch.int64 \[0\]"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            embed(*arguments, **options)
