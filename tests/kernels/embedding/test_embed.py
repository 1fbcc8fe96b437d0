"""The nested vocabulary against lookups in the merged table, in numpy and float64."""

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor

from mlembed_kernels import TokenIndex, embed

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
def test_equals_merged_table(factors, rank, impl):
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
def test_ranks_nest(factors, rank):
    # What lies beyond the rank is not read: not-a-number there changes nothing.
    U, W = factors
    ids = torch.tensor(IDS)
    cut = embed(ids, U[:, :rank], W[:rank], rank)
    spoiled_U, spoiled_W = U.clone(), W.clone()
    spoiled_U[:, rank:] = torch.nan
    spoiled_W[rank:] = torch.nan
    torch.testing.assert_close(embed(ids, spoiled_U, spoiled_W, rank), cut, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_int32_and_int64_ids(factors, dtype):
    U, W = factors
    wide = embed(torch.tensor(IDS), U, W, R)
    torch.testing.assert_close(embed(torch.tensor(IDS, dtype=dtype), U, W, R), wide)


# ---- errors ----


META = torch.device("meta")
TOKENS = torch.tensor(IDS)
# Changes to good arguments, and the errors that they cause.
WRONG = {
    "no_rank": ({"rank": 0}, r"rank: expected 1\.\.11 \(the stored rank\), got 0"),
    "negative_rank": ({"rank": -1}, r"rank: expected 1\.\.11 .*got -1"),
    "rank_beyond": ({"rank": R + 1}, "rank: expected .* got 12"),
    "ranks_unlike": ({"W": torch.zeros(R - 1, D)}, "U, W: expected .*, got"),
    "U_flat": ({"U": torch.zeros(R)}, "U, W: expected"),
    "W_flat": ({"W": torch.zeros(R)}, "U, W: expected"),
    "no_rows": ({"U": torch.zeros(0, R)}, r"U, W: expected .*got \[0, 11\]"),
    "no_width": ({"W": torch.zeros(R, 0)}, "U, W: expected"),
    "dtypes": ({"W": torch.zeros(R, D).half()}, "one floating dtype, got .*float32 and .*float16"),
    "integers": ({"U": torch.ones(V, R).long(), "W": torch.ones(R, D).long()}, "one floating"),
    "devices": ({"W": torch.zeros(R, D, device=META)}, "one device, got cpu, cpu, meta"),
    "ids_elsewhere": ({"ids": TOKENS.to(META)}, "one device, got meta, cpu, cpu"),
    "none": ({"ids": TOKENS[:0]}, r"ids: expected .* at least one, got torch.int64 \[0\]"),
    "two_axes": ({"ids": TOKENS[None]}, r"ids: expected int32 or int64 \[T\].*\[1, 7\]"),
    "floats": ({"ids": TOKENS.float()}, "ids: expected int32 or int64 .*got torch.float32"),
    "flags": ({"ids": TOKENS > 2}, "ids: expected int32 or int64 .*got torch.bool"),
    "below": ({"ids": TOKENS - 1}, r"ids: expected 0\.\.52, got -1\.\.51"),
    "beyond": ({"ids": TOKENS + 1}, r"ids: expected 0\.\.52, got 1\.\.53"),
    "impl": ({"impl": "fastest"}, "impl: expected one of .*got 'fastest'"),
    "fewer": ({"token_index": TokenIndex.of(TOKENS[1:])}, r"token_index: expected .*got \(6, "),
    "others": ({"token_index": TokenIndex.of(TOKENS.flip(0))}, "token_index: .*that of other ids"),
    "elsewhere": ({"token_index": TokenIndex.of(TOKENS).to(META)}, "token_index: .*'meta'"),
}


@pytest.mark.parametrize("impl", ["reference", "triton", "auto"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, impl, monkeypatch):
    op = pytest.importorskip("mlembed_kernels.embedding._op") if impl == "triton" else None
    if op is not None:
        monkeypatch.setattr(op, "run", lambda *_: pytest.fail("launched"))
    module = importlib.import_module("mlembed_kernels.embedding.embed")
    monkeypatch.setattr("mlembed_kernels._dispatch.INTERPRETED", True)
    monkeypatch.setattr(module, "embed_ref", lambda *_: pytest.fail("computed"))
    change, message = WRONG[name]
    given = {"ids": TOKENS, "U": torch.zeros(V, R), "W": torch.zeros(R, D), "rank": 2}
    with pytest.raises(ValueError, match=message):
        embed(**{"impl": impl, **given, **change})


def test_triton_by_name_never_falls_back(monkeypatch):
    U, W = torch.zeros(V, R), torch.zeros(R, D)
    with pytest.raises(
        ValueError, match="impl: triton supports fp32, bf16 and fp16, got torch.float64"
    ):
        embed(TOKENS, U.double(), W.double(), 1, impl="triton")
    monkeypatch.setattr("mlembed_kernels._dispatch.INTERPRETED", True)
    with pytest.raises(
        ValueError, match="interpreter does not support bf16 products, got torch.bfloat16"
    ):
        embed(TOKENS, U.bfloat16(), W.bfloat16(), 1, impl="triton")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="bf16 products, got autocast's torch.bfloat16"),
    ):
        embed(TOKENS, U, W, 1, impl="triton")
    monkeypatch.setattr("mlembed_kernels._dispatch.INTERPRETED", False)
    with pytest.raises(ValueError, match="impl: triton needs CUDA .*got cpu"):
        embed(TOKENS, U, W, 1, impl="triton")


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_autocast_rounds_like_a_product(factors, impl):
    U, W = (x.float() for x in factors)
    with torch.autocast("cpu", torch.bfloat16):
        got = embed(TOKENS, U, W, 5, impl=impl)
        assert torch.equal(got, U[TOKENS, :5] @ W[:5]) and got.dtype == torch.bfloat16
        double = embed(TOKENS, *factors, 5, impl=impl)
    assert double.dtype == torch.float64


def test_token_index_with_every_impl(factors):
    U, W = factors
    index = TokenIndex.of(TOKENS)
    assert torch.equal(embed(TOKENS, U, W, 5, token_index=index), embed(TOKENS, U, W, 5))
