"""Backward kernels: gradients of log-sum-exps.

With D = (dL/drows) / t and LSE the saved log-sum-exp of a row, and likewise for columns, prefix m
of a pair has

    P = dL/dcos = D_i exp(z - LSE_i)  [+ D_j exp(z - LSE_j)]          never above |D|
    dx_i = sum_j P u v y_j - u^2 (sum_j P cos) x_i                    in the prefix's columns

and so band b of the gradient needs G_b = sum over prefixes m >= b of P u v, summed from the widest
down in fp32 and rounded once. Dots grow the other way, from the narrowest up; they are computed
again for every prefix, which costs the sum of the prefixes (for 128 ... 1024 another 0.9 products
of R S D) and no memory.

    narrow   one tile holds all: a program computes dx of its rows, and the same kernel with sides
             swapped dy; it writes nothing but the result
    wide     G_b to a workspace, a rectangle of pairs at a time, then dx += G_b y, dy += G_b' x. The
             first wide G also goes to the narrow columns, which belong to all wide prefixes

Floor, per exit: 3 x 2 R S D FLOPs (dots again, dx, dy); here 1.9 of dots instead of 1.
Bytes: the workspace is written once and read twice, 2 bytes a pair and wide band.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Configs, options_of
from . import _tiles
from ._bands import Bands, Packed, Pairs, pack, padded, unpack
from ._mask import PairMask
from ._tiles import GONE, KL, LOG2E, MSE, TileMask, _pair, _quarters, _start

# As in _lse_forward.py. 128 x 128 with 8 warps is the shape of a throw-away version that was timed
# on an H200 (2026-11-20); it spilled, as it kept dots in registers instead of computing them again.
CONFIGS: Configs = {
    "narrow_backward": {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 2},
    "wide_backward": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "product": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}
CONFIGS_FP32: Configs = {
    "narrow_backward": {"BM": 128, "BN": 16, "num_warps": 8, "num_stages": 1},
    "wide_backward": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    "product": {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 2},
}
# Columns of a rectangle of pairs: enough that sums over row chunks cost little.
WIDTH = 16384


def config(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return options_of(CONFIGS, CONFIGS_FP32, name, dtype)


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros([M, N], tl.float32)


@triton.jit
def _slope(
    acc, u, v, lx, dx, ly, dy, i0, j0, matrix,
    MODE: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return dL/dcos [BM, BN]; u carries log2(e)/t, lx and ly are in base 2.

    Against a teacher u does not, and dL/dcos is that of (cos - t)^2 / 2 or of p cos.
    """
    z = acc * u[:, None] * v[None, :]
    if MODE == MSE or MODE == KL:
        p = _pair(i0, j0, matrix, SWAP, acc.shape[0], acc.shape[1])
        if MODE == MSE:
            p = z - p
        d = dx[:, None] if ROWS else dy[None, :]
        p = tl.where(acc > 0.5 * GONE, d * p, 0.0)
    elif ROWS:
        p = dx[:, None] * tl.exp2(z - lx[:, None])
        if COLUMNS:
            p += dy[None, :] * tl.exp2(z - ly[None, :])
    else:
        p = dy[None, :] * tl.exp2(z - ly[None, :])
    return p


# As in _lse_forward.py.
SCALARS = ["NX", "NY", "SCALE"]


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SCALARS)
def _narrow_backward_kernel(
    X, Y, U, V, SCALE, NX, NY, LX, DX, LY, DY, GRAD, ALONG, POS, KX, KY, PAIR,
    row0, col0, pair_row, pair_stride, RP, SP, tiles,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr, SWAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add gradients to GRAD fp32 [E, RP, narrow width], sums of P cos to ALONG fp32 [E, M, RP]."""
    e = tl.program_id(1).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    i0 = row0 + tl.program_id(0) * BM
    rows = i0 + tl.arange(0, BM)
    row_at = (e * RP + rows)[:, None] * DP
    MN: tl.constexpr = len(STARTS)
    x, u, scale, lx, dx, grad, along = (), (), (), (), (), (), ()
    for m in tl.static_range(MN):
        row_m = (e * M + m) * RP + rows
        x = x + (tl.load(X + row_at + (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :]),)
        u = u + (tl.load(U + row_m),)
        scale = scale + (tl.load(SCALE + e * M + m),)
        lx = lx + (tl.load(LX + row_m),)
        dx = dx + (tl.load(DX + row_m),)
        grad = grad + (_zeros(BM, WIDTHS[m]),)
        along = along + (tl.zeros([BM], tl.float32),)
    for j in tl.range(tiles):
        j0 = col0 + j * BN
        cols = j0 + tl.arange(0, BN)
        y_rows = Y + (e * SP + cols)[:, None] * DP
        y = ()
        for m in tl.static_range(MN):
            y = y + (tl.load(y_rows + (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :]),)
        g = tl.zeros([BM, BN], tl.float32)
        new_grad, new_along = (), ()
        for m in tl.static_range(MN - 1, -1, -1):
            acc = _start(i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, SWAP, BM, BN)
            for b in tl.static_range(m + 1):
                acc = tl.dot(x[b], y[b].T, acc, input_precision=PRECISION)
            col_at = (e * M + m) * SP + cols
            v = tl.load(V + col_at)
            p = _slope(
                acc, u[m] * scale[m], v, lx[m], dx[m], tl.load(LY + col_at), tl.load(DY + col_at),
                i0, j0, matrix, MODE, SWAP, ROWS, COLUMNS,
            )  # fmt: skip
            p = p * v[None, :] * u[m][:, None]
            new_along = (along[m] + tl.sum(p * acc, 1),) + new_along
            g += p
            band = tl.dot(g.to(y[m].dtype), y[m], grad[m], input_precision=PRECISION)
            new_grad = (band,) + new_grad
        grad, along = new_grad, new_along
    for m in tl.static_range(MN):
        out = GRAD + (e * RP + rows)[:, None] * (STARTS[MN - 1] + WIDTHS[MN - 1])
        out += (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :]
        tl.store(out, tl.load(out) + grad[m])
        out = ALONG + (e * M + m) * RP + rows
        tl.store(out, tl.load(out) + along[m])


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"], do_not_specialize_on_alignment=SCALARS)
def _wide_backward_kernel(
    X, Y, U, V, SCALE, NX, NY, LX, DX, LY, DY, G, ALONG_X, ALONG_Y, POS, KX, KY, PAIR,
    row0, col0, pair_row, pair_stride, RP, SP, tiles_m, tiles_n,
    ENDS: tl.constexpr, FIRST: tl.constexpr, FROM: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of G [WIDE, E, rows, cols] for every wide band, and its sums of P cos.

    The sums are ALONG_X fp32 [E, WIDE, tiles_n, rows], ALONG_Y fp32 [E, WIDE, tiles_m, cols].
    """
    e = tl.program_id(1).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    # Eight row tiles share the columns that are in cache.
    pid = tl.program_id(0)
    band = pid // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - band, 8)
    im = band + pid % (8 * tiles_n) % height
    jn = pid % (8 * tiles_n) // height
    i0, j0 = row0 + im * BM, col0 + jn * BN
    local_m = im * BM + tl.arange(0, BM)
    rows = row0 + local_m
    k = tl.arange(0, BK)[None, :]
    x_tile, y_tile = X + (e * RP + i0) * DP + FROM, Y + (e * SP + j0) * DP + FROM
    x_at, y_at = tl.arange(0, BM)[:, None] * DP + k, tl.arange(0, BN)[:, None] * DP + k
    WIDE: tl.constexpr = len(ENDS)
    n_rows, n_cols = tiles_m * BM, tiles_n * BN
    acc = _start(i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
    sums = _quarters(tl.zeros([BM, BN], tl.float32))
    total = 0
    for i in tl.static_range(WIDE):
        total += ENDS[i] // BK
    for t in tl.range(0, total):
        # Prefixes from the widest down, each from its first column: t -> (prefix w, step).
        step = t
        w = WIDE - 1
        for back in tl.static_range(WIDE - 1):
            end = ENDS[WIDE - 1 - back] // BK
            passed = (w == WIDE - 1 - back) & (step >= end)
            step = tl.where(passed, step - end, step)
            w = tl.where(passed, w - 1, w)
        ends = False
        for i in tl.static_range(WIDE):
            ends = ends | ((w == i) & (step == ENDS[i] // BK - 1))
        x = tl.load(x_tile + step * BK + x_at)
        y = tl.load(y_tile + step * BK + y_at)
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
        if ends:
            at = e * M + FIRST + w
            u = tl.load(U + at * RP + rows)
            lx, dx = tl.load(LX + at * RP + rows), tl.load(DX + at * RP + rows)
            to = ((w * tl.num_programs(1) + e) * n_rows + local_m)[:, None] * n_cols
            part_x, part_y = (e * WIDE + w) * tiles_n + jn, (e * WIDE + w) * tiles_m + im
            dots, new = _quarters(acc), ()
            along = tl.zeros([BM], tl.float32)
            for h in tl.static_range(4):  # a quarter of the columns and registers at a time
                local_n = jn * BN + h * (BN // 4) + tl.arange(0, BN // 4)
                col_at = at * SP + col0 + local_n
                v = tl.load(V + col_at)
                p = _slope(
                    dots[h], u * tl.load(SCALE + at), v, lx, dx,
                    tl.load(LY + col_at), tl.load(DY + col_at), i0, j0 + h * (BN // 4),
                    matrix, MODE, False, ROWS, COLUMNS,
                )  # fmt: skip
                p = p * u[:, None] * v[None, :]
                g = sums[h] + p
                new = new + (g,)
                tl.store(G + to + local_n[None, :], g.to(G.dtype.element_ty))
                p = p * dots[h]
                along += tl.sum(p, 1)
                tl.store(ALONG_Y + part_y * n_cols + local_n, tl.sum(p, 0))
            sums = new
            tl.store(ALONG_X + part_x * n_rows + local_m, along)
            acc = _start(i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)


@triton.jit(do_not_specialize=["tiles_n"])
def _product_kernel(
    G, Y, GRAD, row0, col0, RP, SP, n_rows, n_cols, tiles_n,
    STARTS: tl.constexpr, ENDS: tl.constexpr, FROM: tl.constexpr, DP: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add G_b y (swapped: G_b' x) to band b's columns STARTS:ENDS of GRAD fp32 [E, RP, DP - FROM].

    G [bands, E, n_rows, n_cols]. Counting tiles tells the band of a column tile.
    """
    e = tl.program_id(1).to(tl.int64)
    im = tl.program_id(0) // tiles_n
    tile = tl.program_id(0) % tiles_n
    b = 0
    first = STARTS[0]
    end = ENDS[0]
    before = 0
    for i in tl.static_range(1, len(STARTS)):
        before += (ENDS[i - 1] - STARTS[i - 1] + BN - 1) // BN
        b = tl.where(tile >= before, i, b)
        first = tl.where(tile >= before, STARTS[i] - before * BN, first)
        end = tl.where(tile >= before, ENDS[i], end)
    col = first + tile * BN + tl.arange(0, BN)
    inside = (col < end)[None, :]
    local = im * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    g_base = G + (b * tl.num_programs(1) + e) * n_rows * n_cols
    if SWAP:  # rows here are the columns of G
        g_at = g_base + k.to(tl.int64)[:, None] * n_cols + local[None, :]
        depth = n_rows
    else:
        g_at = g_base + local.to(tl.int64)[:, None] * n_cols + k[None, :]
        depth = n_cols
    y_at = Y + (e * SP + col0 + k)[:, None] * DP + FROM + col[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in tl.range(0, depth, BK):
        y = tl.load(y_at, mask=inside, other=0.0)
        g = tl.load(g_at).T if SWAP else tl.load(g_at)
        acc = tl.dot(g, y, acc, input_precision=PRECISION)
        y_at += BK * DP
        g_at += BK * n_cols if SWAP else BK
    out = GRAD + (e * RP + row0 + local)[:, None] * (DP - FROM) + col[None, :]
    tl.store(out, tl.load(out, mask=inside, other=0.0) + acc, mask=inside)


@dataclass(frozen=True)
class Sides:
    """LSEs of one side and their slopes, padded: fp32 [E, M, RP], base 2."""

    lse: Tensor
    slope: Tensor  # dL/dLSE / t / factor

    @staticmethod
    def of(lse: Tensor, d: Tensor, scale: Tensor, factor: Tensor) -> "Sides":
        pad = 0, padded(lse.shape[2]) - lse.shape[2]
        # Where the sum is empty, exp2(z - inf) = 0 for any z.
        lse = (lse * LOG2E).masked_fill(lse == -torch.inf, torch.inf)
        slope = d * (scale / factor[:, None])[..., None]
        return Sides(F.pad(lse, pad, value=torch.inf), F.pad(slope, pad))


def backward(
    x: Tensor,
    y: Tensor,
    bands: Bands,
    scale: Tensor,
    mask: PairMask,
    rows: tuple[Tensor, Tensor],
    cols: tuple[Tensor, Tensor] | None,
    cos: tuple[Tensor, Tensor] | None,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [E, R, D], dy [E, S, D], dscale fp32 [E, M].

    rows, cols, cos: (saved output, its gradient) of `forward`.
    """
    (E, R, D), S, M = x.shape, y.shape[1], len(bands.starts)
    pairs, ceiling = TileMask.of(mask, R, S), mask.ceiling
    counts = _tiles.counts_of(mask.row_counts, x), _tiles.counts_of(mask.col_counts, y)
    RP, SP, wide = padded(R), padded(S), M - bands.narrow
    dx = torch.empty(E, R, D, dtype=x.dtype, device=x.device)
    dy = torch.empty(E, S, D, dtype=y.dtype, device=y.device)
    dscale = torch.empty(E, M, dtype=torch.float32, device=x.device)
    factor = largest(rows[1], cols[1] if cols is not None else None)
    pair_bytes = wide * x.element_size() + (ceiling is not None)
    whole = (RP + SP) * bands.width * (4 + x.element_size()) + pair_bytes * RP * SP
    for group in _tiles.groups(E, whole, workspace):
        px, py = (pack(v[group], bands, n[group]) for v, n in zip((x, y), counts, strict=True))
        sx = Sides.of(rows[0][group], rows[1][group], scale[group], factor[group])
        sy = None
        if cols is not None:
            sy = Sides.of(cols[0][group], cols[1][group], scale[group], factor[group])
        tiles = Tiles(px, py, bands, scale[group] * LOG2E, pairs, (sx, sy))
        by_row, by_col = _positives(cos, group, pairs.positive, SP) if cos else (None, None)
        f, width = factor[group], SP
        if ceiling is None:  # Matrices of near pairs have whole rows.
            width = min(SP, WIDTH)
            tiles.narrow(slice(0, RP))
        for r in _tiles.chunks(RP, width * pair_bytes * (group.stop - group.start), workspace):
            if ceiling is not None:
                near = _tiles.near_mask(x, y, bands, counts, ceiling, r)
                tiles.mask = replace(pairs, pair=near, pair_row=r.start, mode=_tiles.NEAR.value)
                tiles.narrow(r)
            of_x = tiles.dx, tiles.wide(r, width), tiles.along_x, f
            unpack(dx[group], of_x, px, py, bands, by_row, r.start)
        unpack(dy[group], (*tiles.dy, tiles.along_y, f), py, px, bands, by_col)
        dscale[group] = tiles.along_x.sum(-1) * f[:, None] / scale[group]
    return dx, dy, dscale


def largest(*slopes: Tensor | None) -> Tensor:
    """Return the divisors of slopes, fp32 [E]: coefficients of fp16 vectors must not underflow."""
    most = [s.abs().amax((1, 2)) for s in slopes if s is not None and s.numel()]
    given = next(s for s in slopes if s is not None)
    if not most:
        return torch.ones(len(given), dtype=torch.float32, device=given.device)
    top = torch.stack(most).amax(0).float()
    return top.masked_fill(top == 0, 1.0)


def _positives(
    saved: tuple[Tensor, Tensor], group: slice, positive: Tensor | None, SP: int
) -> tuple[Pairs, Pairs]:
    """Return the positive pairs by row, and by column: sorted, so that sums have one order."""
    assert positive is not None
    cos, dcos = (t[group].contiguous() for t in saved)
    each = torch.arange(len(positive) + 1, dtype=torch.int32, device=positive.device)
    at = positive.masked_fill((positive < 0) | (positive >= SP), SP)
    order = at.argsort(stable=True)
    first = torch.searchsorted(
        at[order], torch.arange(SP + 1, dtype=torch.int32, device=at.device), out_int32=True
    )
    by_row = Pairs(cos, dcos, each, at.masked_fill(at == SP, -1), each)
    return by_row, Pairs(cos, dcos, first, order.int(), order.int())


@dataclass
class Tiles:
    """Gradients of a group of exits, which grow as rows of pairs are added.

    x has those of narrow prefixes for all rows; those of wide prefixes are complete when a chunk's
    rows are done. y has all until the end.
    """

    x: Packed
    y: Packed
    bands: Bands
    scale2: Tensor  # log2(e) / t, fp32 [E, M]
    mask: TileMask
    sides: tuple[Sides, Sides | None]

    def __post_init__(self) -> None:
        bands, R, S = self.bands, self.x.x.shape[1], self.y.x.shape[1]
        self.dx = self._zeros(R, bands.narrow_width)
        wide = bands.width - bands.wide if bands.ends else 0
        self.dy = self._zeros(S, bands.narrow_width), self._zeros(S, wide)
        self.along_x, self.along_y = torch.zeros_like(self.x.u), torch.zeros_like(self.y.u)

    def _zeros(self, rows: int, width: int) -> Tensor:
        size = self.x.x.shape[0], rows, width
        return torch.zeros(size, dtype=torch.float32, device=self.x.x.device)

    def _shared(self, swap: bool) -> tuple[Tensor, ...]:
        x, y = (self.y, self.x) if swap else (self.x, self.y)
        sx, sy = self.sides[::-1] if swap else self.sides
        # Kernels read nothing from the placeholders.
        lx, dx = (sx.lse, sx.slope) if sx else (x.u, x.u)
        ly, dy = (sy.lse, sy.slope) if sy else (y.u, y.u)
        return x.x, y.x, x.u, y.u, self.scale2, x.counts, y.counts, lx, dx, ly, dy

    def narrow(self, rows: slice) -> None:
        """Add the narrow prefixes of these rows' pairs to both sides."""
        MN, bands = self.bands.narrow, self.bands
        if not MN:
            return
        options = config("narrow_backward", self.x.x.dtype)
        columns = slice(0, self.y.x.shape[1])
        for swap in (False, True):
            mine, other = (columns, rows) if swap else (rows, columns)
            side_x, side_y = self.sides[::-1] if swap else self.sides
            grad, along = (self.dy[0], self.along_y) if swap else (self.dx, self.along_x)
            E, RP, _ = grad.shape
            _narrow_backward_kernel[((mine.stop - mine.start) // options["BM"], E)](
                *self._shared(swap), grad, along,
                **self.mask.arguments(swap, self.x.u),
                row0=mine.start, col0=other.start, RP=RP,
                SP=(self.x if swap else self.y).x.shape[1],
                tiles=(other.stop - other.start) // options["BN"],
                STARTS=bands.starts[:MN], WIDTHS=bands.widths[:MN], DP=bands.width,
                M=len(bands.starts), SWAP=swap, ROWS=side_x is not None,
                COLUMNS=side_y is not None, **options,
            )  # fmt: skip

    def wide(self, rows: slice, width: int) -> Tensor:
        """Add the wide prefixes of these rows' pairs to y, `width` columns at a time.

        Return the rows' gradient, fp32 [E, rows, wide width].
        """
        _, SP, wide = self.dy[1].shape
        grad = self._zeros(rows.stop - rows.start, wide)
        for c in range(0, SP if wide else 0, width):
            self._rectangle(rows, slice(c, min(c + width, SP)), grad)
        return grad

    def _rectangle(self, rows: slice, cols: slice, grad: Tensor) -> None:
        bands, MN, M = self.bands, self.bands.narrow, len(self.bands.starts)
        x, y = self.x.x, self.y.x
        E, RP, SP = x.shape[0], x.shape[1], y.shape[1]
        n_rows, n_cols = rows.stop - rows.start, cols.stop - cols.start
        options = config("wide_backward", x.dtype)
        if sum(bands.ends) <= 2 * options["BK"]:  # Two steps are unrolled, and then spill.
            options["BK"] //= 2
        tiles = n_rows // options["BM"], n_cols // options["BN"]
        g = torch.empty(M - MN, E, n_rows, n_cols, dtype=x.dtype, device=x.device)
        along_x = torch.empty(E, M - MN, tiles[1], n_rows, device=x.device)
        along_y = torch.empty(E, M - MN, tiles[0], n_cols, device=x.device)
        _wide_backward_kernel[(tiles[0] * tiles[1], E)](
            *self._shared(False), g, along_x, along_y,
            **self.mask.arguments(False, self.x.u),
            row0=rows.start, col0=cols.start, RP=RP, SP=SP, tiles_m=tiles[0], tiles_n=tiles[1],
            ENDS=bands.ends, FIRST=MN, FROM=bands.wide, DP=bands.width, M=M, ROWS=True,
            COLUMNS=self.sides[1] is not None, **options,
        )  # fmt: skip
        self.along_x[:, MN:, rows] += along_x.sum(2)
        self.along_y[:, MN:, cols] += along_y.sum(2)
        options = config("product", x.dtype)
        starts = 0, *bands.ends[:-1]  # The first wide prefix has all narrow columns.
        tiles_n = sum(-(-(b - a) // options["BN"]) for a, b in zip(starts, bands.ends, strict=True))
        # The gradient of x has the chunk's rows alone, so it begins at 0.
        for swap, out, at, other_at, other in (
            (False, grad, 0, cols.start, y),
            (True, self.dy[1], cols.start, rows.start, x),
        ):
            n = n_cols if swap else n_rows
            _product_kernel[(n // options["BM"] * tiles_n, E)](
                g, other, out, at, other_at, out.shape[1], other.shape[1], n_rows, n_cols, tiles_n,
                STARTS=starts, ENDS=bands.ends, FROM=bands.wide, DP=bands.width, SWAP=swap,
                **options,
            )  # fmt: skip
