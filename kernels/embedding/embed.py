"""Nested low-rank token embedding (Matryoshka Embedding Learning, ML-Embed, arXiv 2605.15081).

    E(r) = U[:, :r] W[:r, :]   in R^{V x D},      x_t = E(r)[ids_t] = U[ids_t, :r] W[:r]

Ranks nest: the first r columns of U with the first r rows of W are an embedding too. Above the rank
V D / (V + D) the factors have more numbers than the plain table.

Backward, with s_v the sum of dx over the occurrences of token v (0 for other tokens):

    dU[v, :r] = s_v W[:r]',      dW[:r] = sum_v U[v, :r]' s_v

so both passes need one row for each of n distinct tokens, not one for each of T tokens.
FLOPs: 2 n r D forward, 4 n r D backward; gathering first costs T / n times that (3.4 times for 73k
tokens of a Zipf stream), building the table, like the public ML-Embed code, V / n times (7).

Bytes, of elements: forward reads n r of U and r D of W and writes T D; backward reads T D of dx,
n r of U and r D of W, and writes V R of dU and R D of dW. dU is dense, as torch's optimisers need
it, and the largest matrix; no other matrix has V rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import check_impl, check_interpreted, use_triton
from .token_index import TokenIndex, check_ids


def embed_ref(ids: Tensor, U: Tensor, W: Tensor, rank: int) -> Tensor:
    """Compute the specification; arguments as in `embed`."""
    return F.embedding(ids, U[:, :rank]) @ W[:rank]


def embed(
    ids: Tensor,
    U: Tensor,
    W: Tensor,
    rank: int,
    impl: str = "auto",
    token_index: TokenIndex | None = None,
) -> Tensor:
    """Embed tokens at a nested rank: return [T, D] in the dtype of U, or of autocast if it is on.

    Under autocast fp32 factors are rounded as they are read; their gradients are fp32. "triton"
    gives the same bits every time, with temporaries of at most 64 MiB; dU is dense, zeros for other
    tokens.

    Args:
        ids: int32 or int64 [T], each in 0..V-1, T >= 1.
        U: [V, R]. W: [R, D]. One floating dtype; all three on one device.
        rank: columns of U and rows of W in use, 1..R.
        impl: "triton" (fp32, bf16, fp16), "reference", or "auto": triton on CUDA for those dtypes.
        token_index: `TokenIndex.of(ids)` on their device, for "triton", made once for a batch, in
            a loader's process. Without it the call makes one, and waits for ids on a device. The
            kernels follow the index: of ids on a device only T is compared with it.

    Raises:
        ValueError: shapes, dtypes, devices, a rank or an `impl` that are not as described; ids
            outside 0..V-1 (on a device they are read from `token_index` alone).
    """
    check_impl(impl)
    check_ids(ids)
    _check_factors(ids, U, W)
    if not 1 <= rank <= U.shape[1]:
        raise ValueError(f"rank: expected 1..{U.shape[1]} (the stored rank), got {rank}")
    triton = use_triton(impl, U)
    dtype = compute_dtype(U)
    if triton and not U.is_cuda:
        check_interpreted(dtype, "autocast's ")
    if triton and token_index is None:
        token_index = TokenIndex.of(ids).to(U.device)
    _check_range(ids, len(U), token_index)
    if not triton or token_index is None:
        return embed_ref(ids, U, W, rank)
    from . import _op  # imports triton, which not every platform has

    return _op.run(U, W, rank, dtype, token_index)


def compute_dtype(U: Tensor) -> torch.dtype:
    """Return the dtype of a product of U; autocast does not change float64."""
    kind = U.device.type
    if U.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return U.dtype


def _check_factors(ids: Tensor, U: Tensor, W: Tensor) -> None:
    if U.ndim != 2 or W.ndim != 2 or U.shape[1] != W.shape[0] or not (U.numel() and W.numel()):
        raise ValueError(f"U, W: expected [V, R] and [R, D], got {list(U.shape)}, {list(W.shape)}")
    if U.dtype != W.dtype or not U.is_floating_point():
        raise ValueError(f"U, W: expected one floating dtype, got {U.dtype} and {W.dtype}")
    if not (ids.device == U.device == W.device):
        raise ValueError(
            f"ids, U, W: expected one device, got {ids.device}, {U.device}, {W.device}"
        )


def _check_range(ids: Tensor, V: int, token_index: TokenIndex | None) -> None:
    # Reading a device tensor would wait for the device, and break a compiled graph.
    readable = ids.is_cpu and not torch.compiler.is_compiling()
    if token_index is not None:
        got, expected = (token_index.tokens, token_index.buffer.device), (len(ids), ids.device)
        if got != expected:
            raise ValueError(f"token_index: expected (T, device) {expected}, got {got}")
        lowest, highest = token_index.lowest, token_index.highest
        if readable:
            one_by_one = torch.repeat_interleave(token_index.ids_P, token_index.count_P)
            if (ids[token_index.order_T] != one_by_one).any():
                raise ValueError("token_index: expected that of ids, got that of other ids")
    elif readable:
        lowest, highest = int(ids.min()), int(ids.max())
    else:
        return
    if lowest < 0 or highest >= V:
        raise ValueError(f"ids: expected 0..{V - 1}, got {lowest}..{highest}")
