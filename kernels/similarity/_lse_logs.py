"""Logarithms of the sums of exponentials: parts added up in a fixed order, underflow repaired.

Programs of the forward kernels sum some columns of some rows each, as 2^(z - shift). A row whose
terms may have underflowed has a sum so small that it tells, and is computed again with a running
maximum.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Configs, options_of
from ._bands import ROWS, Bands, Packed
from ._tiles import GONE, LN2, TileMask, _start

# As in _lse_forward.py.
CONFIGS: Configs = {"exact": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1}}
CONFIGS_FP32 = CONFIGS
Parts = tuple[Tensor, Tensor]  # fp32 [parts, E, prefixes, rows] of narrow and of wide prefixes


@triton.jit
def _shift(scale, bits):
    """Return what is subtracted from exponents: a sum of 2^(126 + bits) terms does not overflow."""
    return tl.maximum(tl.abs(scale) + bits, 0.0)


@triton.jit
def _added(at, stride, parts):
    """Return the sum of `parts` vectors, `stride` numbers apart, in a fixed order."""
    k = tl.arange(0, 16)
    total = tl.zeros(at.shape, tl.float32)
    for part in range(0, parts, 16):
        each = at[None, :] + (part + k)[:, None] * stride
        total += tl.sum(tl.load(each, mask=(part + k < parts)[:, None], other=0.0), 0)
    return total


@triton.jit(
    do_not_specialize=["R", "narrow_parts", "wide_parts"],
    do_not_specialize_on_alignment=["SCALE", "OUT"],
)
def _merge_kernel(
    NARROW, WIDE, BEFORE, SCALE, OUT, bits, row0, n, R, narrow_parts, wide_parts,
    MN: tl.constexpr, LOG: tl.constexpr, CHUNKED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Add up the parts of sums of n rows from row0: OUT fp32 [E, M, R] is their sum or its log.

    NARROW fp32 [narrow_parts, E, MN, n] and WIDE [wide_parts, E, M - MN, n] are what programs
    summed. With CHUNKED, BEFORE [E, M, n] has earlier chunks' sums, and gets all.
    """
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    m, e = tl.program_id(1), tl.program_id(2).to(tl.int64)
    M, E = tl.num_programs(1), tl.num_programs(2).to(tl.int64)
    if m < MN:
        total = _added(NARROW + (e * MN + m) * n + local, E * MN * n, narrow_parts)
    else:
        total = _added(WIDE + (e * (M - MN) + m - MN) * n + local, E * (M - MN) * n, wide_parts)
    if CHUNKED:
        before = BEFORE + (e * M + m) * n + local
        total += tl.load(before)
        tl.store(before, total)
    if LOG:
        total = (tl.log2(total) + _shift(tl.load(SCALE + e * M + m), bits)) * LN2
    rows = row0 + local
    tl.store(OUT + (e * M + m) * R + rows, total, mask=rows < R)


@triton.jit(
    do_not_specialize=["tiles", "R"], do_not_specialize_on_alignment=["NX", "NY", "SCALE", "LSE"]
)
def _exact_kernel(
    X, Y, U, V, SCALE, NX, NY, LSE, POS, KX, KY, PAIR,
    bits, row0, pair_row, pair_stride, RP, SP, tiles, R,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute LSE [E, M, R] again where its sum is so small that terms may have been lost.

    A program without such rows returns at once, as nearly all do.
    """
    e = tl.program_id(1).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    i0 = row0 + tl.program_id(0) * BM
    rows = i0 + tl.arange(0, BM)
    nx = tl.load(NX + e)
    lost = tl.zeros([BM], tl.int32)
    for m in tl.static_range(M):
        lse = tl.load(LSE + (e * M + m) * R + rows, mask=rows < nx, other=0.0)
        # Sums above 2^-60 are exact to 2^-49.
        least = (_shift(tl.load(SCALE + e * M + m), bits) - 60) * LN2
        lost = tl.where((lse < least) & (rows < nx), 1, lost)
    if tl.max(lost) == 0:
        return
    k = tl.arange(0, 16)[None, :]
    x_rows = X + (e * RP + rows)[:, None] * DP + k
    tops, sums = (), ()
    for _ in tl.static_range(M):
        tops = tops + (tl.full([BM], GONE, tl.float32),)
        sums = sums + (tl.zeros([BM], tl.float32),)
    for j in range(tiles):
        j0 = j * BN
        cols = j0 + tl.arange(0, BN)
        y_rows = Y + (e * SP + cols)[:, None] * DP + k
        acc = _start(i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, SWAP, BM, BN)
        gone = acc < 0.5 * GONE
        new_tops, new_sums = (), ()
        for m in tl.static_range(M):
            for at in range(STARTS[m], STARTS[m] + WIDTHS[m], 16):
                x = tl.load(x_rows + at)
                acc = tl.dot(x, tl.load(y_rows + at).T, acc, input_precision=PRECISION)
            u = tl.load(U + (e * M + m) * RP + rows) * tl.load(SCALE + e * M + m)
            z = acc * u[:, None] * tl.load(V + (e * M + m) * SP + cols)[None, :]
            z = tl.where(gone, GONE, z)
            top = tl.maximum(tops[m], tl.max(z, 1))
            p = tl.where(gone, 0.0, tl.exp2(z - top[:, None]))
            new_sums = new_sums + (sums[m] * tl.exp2(tops[m] - top) + tl.sum(p, 1),)
            new_tops = new_tops + (top,)
        tops, sums = new_tops, new_sums
    for m in tl.static_range(M):
        out = LSE + (e * M + m) * R + rows
        least = (_shift(tl.load(SCALE + e * M + m), bits) - 60) * LN2
        redo = (rows < nx) & (tl.load(out, mask=rows < nx, other=0.0) < least)
        lse = tl.where(sums[m] == 0, -float("inf"), (tops[m] + tl.log2(sums[m])) * LN2)
        tl.store(out, lse, mask=redo)


def merge(
    parts: Parts,
    out: Tensor,
    scale2: Tensor | None,
    bits: float,
    row0: int = 0,
    before: Tensor | None = None,
) -> None:
    """Add up parts of sums, for the rows from row0 of out fp32 [E, M, R].

    scale2: log2(e) / t, fp32 [E, M], whose shift the logarithms contain; None for the sums alone.
    before: fp32 [E, M, rows], sums of earlier chunks, to which the parts are added.
    """
    (E, M, R), n = out.shape, parts[0].shape[3]
    _merge_kernel[(n // ROWS, M, E)](
        *parts, parts[0] if before is None else before, parts[0] if scale2 is None else scale2, out,
        bits, row0, n, R, len(parts[0]), len(parts[1]),
        MN=parts[0].shape[2], LOG=scale2 is not None, CHUNKED=before is not None, BR=ROWS,
        num_warps=4,
    )  # fmt: skip


def exact(
    lse: Tensor,
    sides: tuple[Packed, Packed],
    bands: Bands,
    mask: TileMask,
    scale2: Tensor,
    bits: float,
    rows: slice,
    swap: bool = False,
) -> None:
    """Compute LSEs [E, M, R] of rows (swapped: columns) again where their sums underflowed."""
    x, y = sides[::-1] if swap else sides
    (E, M, R), RP, SP = lse.shape, x.u.shape[2], y.u.shape[2]
    options = options_of(CONFIGS, CONFIGS_FP32, "exact", x.x.dtype)
    _exact_kernel[((rows.stop - rows.start) // options["BM"], E)](
        x.x, y.x, x.u, y.u, scale2, x.counts, y.counts, lse,
        **mask.arguments(swap, x.u), bits=bits, row0=rows.start, RP=RP, SP=SP,
        tiles=SP // options["BN"], R=R, STARTS=bands.starts, WIDTHS=bands.widths, DP=bands.width,
        M=M, SWAP=swap, **options,
    )  # fmt: skip
