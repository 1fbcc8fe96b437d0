"""The nested embedding in Triton, as one node that torch.compile and CUDA graphs can carry.

    project  rows times a matrix; each row of the product is written to where it belongs: forward a
             token's row of U to all its occurrences, backward its sum of dx to its row of dU. A
             library's product would need a matrix [n, r] and two more passes over it
    sum      sums of dx over each part's occurrences, in fp32 and in their order: no atomics
    total    sums of the parts of a token that has several
    gather   rows of U in the dtype of the products; torch computes those of dW

Forward, parts with many occurrences write much and compute few products. Tiles start in turn from
both ends of the list, which is sorted by occurrences, so that one writes while another computes.
Backward, most of what is written are zeros in all other rows of dU: programs that have finished
their tile each write a share of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from .._dispatch import INTERPRETED, Configs, options_of
from .token_index import TokenIndex

# From this number of programs on, they write dU's zeros: two on each of Hopper's multiprocessors.
FILLERS = 264
WORKSPACE = 64 << 20  # Bytes of all temporaries together, for any T, n, D and r.
# Launch options by kernel, for half precision and for fp32, whose products are three tf32 ones.
# "masters": fp32 factors, rounded as they are read. "odd": rows that do not begin on 16 bytes, read
# one number at a time. All are unrun: compiled for sm_90a without spills. With 128 registers two
# programs of `project` share a multiprocessor: while one writes, the other computes products.
CONFIGS: Configs = {
    "project": {
        "BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128,
    },
    "project_masters": {
        "BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128,
    },
    "project_odd": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 1},
    "sum": {"BM": 16, "BN": 256, "AHEAD": 4, "num_warps": 4, "num_stages": 1},
    "total": {"BP": 32, "BN": 128, "num_warps": 4, "num_stages": 1},
    "gather": {"BM": 16, "BN": 256, "num_warps": 4, "num_stages": 1},
}  # fmt: skip
CONFIGS_FP32: Configs = {
    "project": {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
    "project_odd": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    "sum": {"BM": 16, "BN": 128, "AHEAD": 4, "num_warps": 4, "num_stages": 1},
    "total": {"BP": 32, "BN": 128, "num_warps": 4, "num_stages": 1},
    "gather": {"BM": 16, "BN": 128, "num_warps": 4, "num_stages": 1},
}


def config(name: str, dtype: torch.dtype, dots: bool = False) -> dict[str, Any]:
    # The interpreter does not run out of registers: there fp32 takes half precision's tiles.
    return options_of(CONFIGS, CONFIGS if INTERPRETED else CONFIGS_FP32, name, dtype, dots)


@triton.jit
def _fill(OUT, SEEN, V, R, N, first, last, out_row, FR: tl.constexpr, FC: tl.constexpr):
    """Write zeros to rows first..last of OUT [V, R], except the first N columns of SEEN rows."""
    last = tl.minimum(last, V)
    for at in range(first, last, FR):
        row = at + tl.arange(0, FR)
        seen = tl.load(SEEN + row, mask=row < last, other=0) != 0
        out = OUT + row.to(tl.int64)[:, None] * out_row
        for c in range(0, R, FC):
            col = c + tl.arange(0, FC)
            mask = (row < last)[:, None] & (col < R)[None, :]
            mask = mask & ((col >= N)[None, :] | (seen == 0)[:, None])
            tl.store(out + col[None, :], tl.zeros([FR, FC], OUT.dtype.element_ty), mask=mask)


# Lists of a batch are slices that begin anywhere: Triton compiles nothing twice for lists that do
# not begin on 16 bytes.
@triton.jit(
    do_not_specialize=["rows", "share", "V"],
    do_not_specialize_on_alignment=["IDS", "FIRST", "COUNT", "ORDER", "SEEN"],
)
def _project_kernel(
    X, W, OUT, IDS, FIRST, COUNT, ORDER, SEEN, rows, K, N, V, R, share,
    x_row, x_col, w_k, w_n, out_row,
    SPREAD: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write each row of X[IDS] W to OUT[ORDER[FIRST + 0..COUNT)] if SPREAD, else X W to OUT[IDS].

    FILL: also write zeros to the rest of OUT [V, R], `share` rows a program.
    """
    tiles = tl.cdiv(rows, BM)
    slot = tl.program_id(0) // tl.cdiv(N, BN)
    tile = tl.where(slot % 2 == 0, slot // 2, tiles - 1 - slot // 2)
    row = tile * BM + tl.arange(0, BM)
    valid = row < rows
    col = tl.program_id(0) % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    ids = tl.load(IDS + row, mask=valid, other=0).to(tl.int64)
    x_rows = ids if SPREAD else row.to(tl.int64)
    x_tile = X + x_rows[:, None] * x_row + k[None, :] * x_col
    w_tile = W + k[:, None] * w_k + col[None, :] * w_n
    acc = tl.zeros([BM, BN], tl.float32)
    for at in tl.range(0, K, BK):
        x_mask = valid[:, None] & (at + k < K)[None, :]
        w_mask = (at + k < K)[:, None] & (col < N)[None, :]
        x = tl.load(x_tile + tl.cast(at, tl.int64) * x_col, mask=x_mask, other=0.0)
        w = tl.load(w_tile + tl.cast(at, tl.int64) * w_k, mask=w_mask, other=0.0)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    y = acc.to(OUT.dtype.element_ty)
    if SPREAD:
        first = tl.load(FIRST + row, mask=valid, other=0)
        count = tl.load(COUNT + row, mask=valid, other=0)
        for c in range(0, tl.max(count)):
            to = tl.load(ORDER + first + c, mask=c < count, other=0).to(tl.int64)
            mask = (c < count)[:, None] & (col < N)[None, :]
            tl.store(OUT + to[:, None] * out_row + col[None, :], y, mask=mask)
    else:
        mask = valid[:, None] & (col < N)[None, :]
        tl.store(OUT + ids[:, None] * out_row + col[None, :], y, mask=mask)
    if FILL:
        begin = tl.program_id(0) * share
        _fill(OUT, SEEN, V, R, N, begin, begin + share, out_row, 16, BN)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["ORDER", "FIRST", "COUNT"])
def _sum_kernel(
    X, OUT, ORDER, FIRST, COUNT, rows, N, x_row, x_col,
    AHEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute OUT [rows, N], sums of X[ORDER[FIRST + 0..COUNT)], loaded AHEAD at a time."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = row < rows
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.load(FIRST + row, mask=valid, other=0)
    count = tl.load(COUNT + row, mask=valid, other=0)
    columns = col.to(tl.int64)[None, :] * x_col
    acc = tl.zeros([BM, BN], tl.float32)
    for c in range(0, tl.max(count), AHEAD):
        for i in tl.static_range(AHEAD):
            some = c + i < count
            at = tl.load(ORDER + first + c + i, mask=some, other=0).to(tl.int64)
            mask = some[:, None] & (col < N)[None, :]
            x = tl.load(X + at[:, None] * x_row + columns, mask=mask, other=0.0)
            acc += x.to(tl.float32)
    out = OUT + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=valid[:, None] & (col < N)[None, :])


@triton.jit(do_not_specialize=["part0"], do_not_specialize_on_alignment=["FIRST", "PARTS"])
def _total_kernel(X, OUT, FIRST, PARTS, part0, N, out_row, BP: tl.constexpr, BN: tl.constexpr):
    """Compute OUT [tokens, N], sums of the PARTS rows of X [.., N] from FIRST - part0."""
    token = tl.program_id(0).to(tl.int64)
    first, parts = tl.load(FIRST + token) - part0, tl.load(PARTS + token)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    p = tl.arange(0, BP)
    acc = tl.zeros([BP, BN], tl.float32)
    for at in range(0, parts, BP):
        mask = (at + p < parts)[:, None] & (col < N)[None, :]
        part = (first + at + p).to(tl.int64)
        acc += tl.load(X + part[:, None] * N + col[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0).to(OUT.dtype.element_ty)
    tl.store(OUT + token * out_row + col, total, mask=col < N)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["IDS"])
def _gather_kernel(X, OUT, IDS, rows, N, x_row, x_col, BM: tl.constexpr, BN: tl.constexpr):
    """Compute OUT [rows, N] = X[IDS], in OUT's dtype."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row < rows)[:, None] & (col < N)[None, :]
    ids = tl.load(IDS + row, mask=row < rows, other=0).to(tl.int64)
    x = tl.load(X + ids[:, None] * x_row + col.to(tl.int64)[None, :] * x_col, mask=mask)
    out = OUT + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(out, x.to(OUT.dtype.element_ty), mask=mask)


def _project(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    ids: Tensor,
    spread: tuple[Tensor, Tensor, Tensor] | None = None,
    seen: Tensor | None = None,
) -> None:
    """Launch `_project_kernel`.

    spread: first, count and order of the parts whose tokens are `ids`. seen: int8 [V], which rows
    some call writes; the call that has it also writes zeros to the other rows.
    """
    rows, (K, N) = len(ids), w.shape
    name = "project"
    if any(step % 16 for step in (x.stride(0), max(w.stride()), out.stride(0))):
        name = "project_odd"
    elif x.dtype != w.dtype:
        name = "project_masters"
    options = config(name, w.dtype, dots=True)
    if N <= 64:
        options |= {"BN": 64}
    if options["BK"] >= K:  # A single step needs no stages.
        options |= {"num_stages": 1}
    programs = triton.cdiv(rows, options["BM"]) * triton.cdiv(N, options["BN"])
    if seen is not None and programs < FILLERS:
        out.zero_()
        seen = None
    first, count, order = spread or (ids, ids, ids)
    _project_kernel[(programs,)](
        x, w, out, ids, first, count, order, ids if seen is None else seen, rows, K, N,
        *out.shape, triton.cdiv(len(out), programs), *x.stride(), *w.stride(), out.stride(0),
        SPREAD=spread is not None, FILL=seen is not None, **options,
    )  # fmt: skip


def _sum(x: Tensor, out: Tensor, order: Tensor, first: Tensor, count: Tensor) -> None:
    rows, N = out.shape
    if not rows:
        return
    options = config("sum", x.dtype)
    grid = (triton.cdiv(rows, options["BM"]), triton.cdiv(N, options["BN"]))
    _sum_kernel[grid](x, out, order, first, count, rows, N, *x.stride(), **options)


def _sums(dx: Tensor, token_index: TokenIndex, tokens: slice, parts: slice) -> Tensor:
    """Return sums of dx over the occurrences of some distinct tokens, [tokens, D] in its dtype."""
    o, D = token_index, dx.shape[1]
    out = torch.empty(tokens.stop - tokens.start, D, dtype=dx.dtype, device=dx.device)
    several = max(min(tokens.stop, o.several) - tokens.start, 0)
    # The other tokens have one part each.
    single = slice(*(o.bounds[-1] + max(x - o.several, 0) for x in (tokens.start, tokens.stop)))
    _sum(dx, out[several:], o.order_T, o.first_P[single], o.count_P[single])
    if not several:
        return out
    options = config("total", dx.dtype)
    n, at = parts.stop - parts.start, slice(tokens.start, tokens.start + several)
    width = max(WORKSPACE // 8 // (4 * n) // 16 * 16, 16)
    for c in range(0, D, width):
        some = slice(c, min(c + width, D))
        partial = torch.empty(n, some.stop - c, dtype=torch.float32, device=dx.device)
        _sum(dx[:, some], partial, o.order_T, o.first_P[parts], o.count_P[parts])
        _total_kernel[(several, triton.cdiv(some.stop - c, options["BN"]))](
            partial, out[:, some], o.first_part_m[at], o.parts_m[at], parts.start,
            some.stop - c, D, **options,
        )  # fmt: skip
        del partial  # The next one takes its memory.
    return out


def _rows(x: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(ids), x.shape[1], dtype=dtype, device=x.device)
    options = config("gather", dtype)
    grid = (triton.cdiv(len(ids), options["BM"]), triton.cdiv(x.shape[1], options["BN"]))
    _gather_kernel[grid](x, out, ids, len(ids), x.shape[1], *x.stride(), **options)
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a' b in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.float().T @ b.float()


def forward(U: Tensor, W: Tensor, token_index: TokenIndex, rank: int, dtype: torch.dtype) -> Tensor:
    o = token_index
    out = torch.empty(o.tokens, W.shape[1], dtype=dtype, device=U.device)
    spread = o.first_P, o.count_P, o.order_T
    _project(U, W[:rank].to(dtype).contiguous(), out, o.ids_P, spread)
    return out


def backward(
    dx: Tensor, U: Tensor, W: Tensor, token_index: TokenIndex, rank: int, of: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return dU and dW, empty if not asked for, by chunks of distinct tokens."""
    o, dtype, D = token_index, dx.dtype, dx.shape[1]
    dU = torch.empty(U.shape if of[0] else 0, dtype=U.dtype, device=U.device)
    seen = torch.zeros(len(dU), dtype=torch.int8, device=U.device)
    if of[0]:
        seen.index_fill_(0, o.ids_n.long(), 1)
    dW = torch.zeros(W.shape if of[1] else 0, dtype=W.dtype, device=W.device)
    w, whole = W[:rank].to(dtype).contiguous(), None
    for tokens, parts in o.chunks(WORKSPACE // 4 * 3 // (D * dx.element_size())):
        s, ids = _sums(dx, o, tokens, parts), o.ids_n[tokens]
        if of[0]:
            _project(s, w.T, dU, ids, seen=seen if tokens.start == 0 else None)
        size = max(WORKSPACE // 8 // (rank * dx.element_size()), 64)
        for a in range(0, len(ids) if of[1] else 0, size):
            some = slice(a, a + size)
            part = _rows(U[:, :rank], ids[some], dtype), s[some]
            whole = _product(*part) if whole is None else whole.add_(_product(*part))
            del part
        del s
    if whole is not None:
        dW[:rank] = whole
    return dU, dW


def run(U: Tensor, W: Tensor, rank: int, dtype: torch.dtype, token_index: TokenIndex) -> Tensor:
    """Return x [T, D]."""
    o = token_index
    return embed_op(U, W, o.buffer, list(o.counts), list(o.bounds), rank, dtype)


def _index(buffer: Tensor, counts: list[int], bounds: list[int]) -> TokenIndex:
    tokens, distinct, lowest, highest, parts, several = counts
    return TokenIndex(buffer, tokens, distinct, lowest, highest, parts, several, tuple(bounds))


@library.custom_op("mlembed::embed", mutates_args=())
def embed_op(
    U: Tensor,
    W: Tensor,
    buffer: Tensor,
    counts: list[int],
    bounds: list[int],
    rank: int,
    dtype: torch.dtype,
) -> Tensor:
    with torch.cuda.device_of(U):  # Triton launches on the current device.
        return forward(U, W, _index(buffer, counts, bounds), rank, dtype)


@embed_op.register_fake
def _(U, W, buffer, counts, bounds, rank, dtype):  # type: ignore[no-untyped-def]
    return W.new_empty(counts[0], W.shape[1], dtype=dtype)


@library.custom_op("mlembed::embed_backward", mutates_args=())
def _backward_op(
    dx: Tensor,
    U: Tensor,
    W: Tensor,
    buffer: Tensor,
    counts: list[int],
    bounds: list[int],
    rank: int,
    of: list[bool],
) -> tuple[Tensor, Tensor]:
    # Products have the dtype of dx, not of autocast in the backward.
    with torch.cuda.device_of(U), torch.autocast(U.device.type, enabled=False):
        return backward(dx, U, W, _index(buffer, counts, bounds), rank, (of[0], of[1]))


@_backward_op.register_fake
def _(dx, U, W, buffer, counts, bounds, rank, of):  # type: ignore[no-untyped-def]
    return U.new_empty(U.shape if of[0] else 0), W.new_empty(W.shape if of[1] else 0)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    U, W, buffer, ctx.counts, ctx.bounds, ctx.rank, _ = inputs
    ctx.save_for_backward(U, W, buffer)
    ctx.set_materialize_grads(False)


def _grads(ctx, dx):  # type: ignore[no-untyped-def]
    of = [bool(wanted) for wanted in ctx.needs_input_grad[:2]]
    if dx is None or not any(of):
        return (None,) * 7
    dU, dW = _backward_op(dx, *ctx.saved_tensors, ctx.counts, ctx.bounds, ctx.rank, of)
    return dU if of[0] else None, dW if of[1] else None, *(None,) * 5


embed_op.register_autograd(_grads, setup_context=_setup)
