"""Backward kernels: gradients of log-sum-exps.

With D = (dL/drows) / t and LSE the saved log-sum-exp of a row, and likewise for columns, prefix m
of a pair has

    P = dL/dcos = D_i exp(z - LSE_i)  [+ D_j exp(z - LSE_j)]          never above |D|
    dx_i = sum_j P u v y_j - u^2 (sum_j P cos) x_i                    in the prefix's columns

and so band b of the gradient needs G_b = sum over prefixes m >= b of P u v, which adds up from the
widest prefix down, while dots grow from the narrowest up.

    narrow   one tile holds all: a program computes dx of its rows, and the same kernel with sides
             swapped dy; it writes nothing but the result, and computes dots again for each prefix
    wide     P u v of each prefix goes to a workspace, a rectangle of pairs at a time; the program
             that wrote it then adds it up to G_b, in fp32. Then dx += G_b y, dy += G_b' x. The
             first wide G also goes to the narrow columns, which belong to all wide prefixes

Floor, per exit: 3 x 2 R S D FLOPs (dots again, dx, dy).
Bytes, a pair: 2 for each wide band are written, read and written again, and read by two products.
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

# As in _lse_forward.py: unrun. With 128 registers two programs of "wide_backward" share a
# multiprocessor. "wide_backward_more", for columns or a matrix, does not fit into 128 registers.
# 256 rows of "product" read a quarter less from the L2 cache than 128.
CONFIGS: Configs = {
    "narrow_backward": {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 3},
    "wide_backward": {
        "BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128,
    },
    "wide_backward_more": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "product": {"BM": 256, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}  # fmt: skip
CONFIGS_FP32: Configs = {
    "narrow_backward": {"BM": 128, "BN": 16, "num_warps": 8, "num_stages": 1},
    "wide_backward": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    "wide_backward_more": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    "product": {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 2},
}
# G in fp16. Slopes are at most SLOPE, and P at most twice that. _bands.py gives wide prefixes a
# length of 2^6 or more, so that their u and v are at most 2^-6. A narrow prefix may be short: its v
# is at most V_MOST if the prefix has 2^-14 of that length, and times SHRINK. So the sum over 16
# prefixes stays below 2^15. Prefixes beyond U_MOST or V_MOST have no length, or next to none.
SLOPE = 2.0**20
U_MOST, V_MOST, SHRINK = tl.constexpr(2.0**-5), tl.constexpr(2.0**8), tl.constexpr(2.0**-18)
# Columns of a rectangle of pairs: enough that sums over row chunks cost little.
WIDTH = 16384


def config(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return options_of(CONFIGS, CONFIGS_FP32, name, dtype)


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros([M, N], tl.float32)


@triton.jit
def _slope(
    acc, scaled, v, weight, lx, dx, ly, dy, i0, j0, matrix,
    MODE: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return q [BM, BN] and w [BM]; their product is P weight, as a row's factor can wait.

    scaled is u log2(e)/t; lx and ly are in base 2. Against a teacher scaled is u, and P is the
    slope of (cos - t)^2 / 2 or of p cos.
    """
    if not ROWS:
        weight *= dy
    z = acc * v[None, :] * scaled[:, None]
    if MODE == MSE or MODE == KL:
        q = _pair(i0, j0, matrix, SWAP, acc.shape[0], acc.shape[1])
        if MODE == MSE:
            q = z - q
        q = tl.where(acc > 0.5 * GONE, q, 0.0)
    elif ROWS:
        q = tl.exp2(z - lx[:, None])
        if COLUMNS:
            q = dx[:, None] * q + dy[None, :] * tl.exp2(z - ly[None, :])
    else:
        q = tl.exp2(z - ly[None, :])
    q *= weight[None, :]
    return q, (dx if ROWS and not COLUMNS else tl.full([acc.shape[0]], 1.0, tl.float32))


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
    HALF: tl.constexpr = X.dtype.element_ty == tl.float16
    x, u, scaled, lx, dx, grad, along = (), (), (), (), (), (), ()
    for m in tl.static_range(MN):
        row_m = (e * M + m) * RP + rows
        x = x + (tl.load(X + row_at + (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :]),)
        u = u + (tl.load(U + row_m),)
        scaled = scaled + (u[m] * tl.load(SCALE + e * M + m),)
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
            weight = v
            if HALF:
                weight = tl.minimum(v, V_MOST) * SHRINK
            q, w = _slope(
                acc, scaled[m], v, weight, lx[m], dx[m],
                tl.load(LY + col_at), tl.load(DY + col_at), i0, j0, matrix,
                MODE, SWAP, ROWS, COLUMNS,
            )  # fmt: skip
            new_along = (along[m] + tl.sum(q * acc, 1),) + new_along
            if HALF:  # G is in units of u, which has no bound.
                if m < MN - 1:
                    g *= (u[m + 1] / u[m])[:, None]
                g += q * w[:, None]
            else:
                g += q * (w * u[m])[:, None]
            band = tl.dot(g.to(y[m].dtype), y[m], grad[m], input_precision=PRECISION)
            new_grad = (band,) + new_grad
        grad, along = new_grad, new_along
    for m in tl.static_range(MN):
        weight = dx[m] * u[m] if ROWS and not COLUMNS else u[m]
        if HALF:
            weight *= 1 / SHRINK
            grad_m = grad[m] * (u[m] / SHRINK)[:, None]
        else:
            grad_m = grad[m]
        out = GRAD + (e * RP + rows)[:, None] * (STARTS[MN - 1] + WIDTHS[MN - 1])
        out += (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :]
        tl.store(out, tl.load(out) + grad_m)
        out = ALONG + (e * M + m) * RP + rows
        tl.store(out, tl.load(out) + along[m] * weight)


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
    G first holds each prefix's own P u v, which the program then sums from the widest down.
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
    i, j = tl.arange(0, BM), tl.arange(0, BN // 4)
    k = tl.arange(0, BK)[None, :]
    x_tile, y_tile = X + (e * RP + i0) * DP + FROM, Y + (e * SP + j0) * DP + FROM
    x_at, y_at = i[:, None] * DP + k, tl.arange(0, BN)[:, None] * DP + k
    WIDE: tl.constexpr = len(ENDS)
    HALF: tl.constexpr = X.dtype.element_ty == tl.float16
    n_rows, n_cols = tiles_m * BM, tiles_n * BN
    size = tl.num_programs(1) * n_rows.to(tl.int64) * n_cols
    g_tile = G + (e * n_rows + im * BM) * n_cols + jn * BN
    x_sums = ALONG_X + (e * WIDE * tiles_n + jn) * n_rows + im * BM
    y_sums = ALONG_Y + (e * WIDE * tiles_m + im) * n_cols + jn * BN
    acc = _start(i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
    for step in tl.range(0, (DP - FROM) // BK):
        x = tl.load(x_tile + x_at)
        y = tl.load(y_tile + y_at)
        x_tile += BK
        y_tile += BK
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
        w = -1
        for n in tl.static_range(WIDE):
            w = tl.where(step == ENDS[n] // BK - 1, n, w)
        if w >= 0:
            at = e * M + FIRST + w
            row_at, col_at = at * RP + i0, at * SP + j0
            u = tl.load(U + row_at + i)
            scaled = u * tl.load(SCALE + at)
            if HALF:
                u = tl.minimum(u, U_MOST)
            lx, dx = tl.load(LX + row_at + i), tl.load(DX + row_at + i)
            dots = _quarters(acc)
            along = tl.zeros([BM], tl.float32)
            for h in tl.static_range(4):  # a quarter of the columns and registers at a time
                first = h * (BN // 4)
                v = tl.load(V + col_at + first + j)
                weight = tl.minimum(v, U_MOST) if HALF else v
                q, factor = _slope(
                    dots[h], scaled, v, weight, lx, dx,
                    tl.load(LY + col_at + first + j), tl.load(DY + col_at + first + j),
                    i0, j0 + first, matrix, MODE, False, ROWS, COLUMNS,
                )  # fmt: skip
                p = q * (u * factor)[:, None]
                out = g_tile + w * size + first + (i[:, None] * n_cols + j[None, :])
                tl.store(out, p.to(G.dtype.element_ty))
                p *= dots[h]
                along += tl.sum(p, 1)
                tl.store(y_sums + w * tiles_m * n_cols + first + j, tl.sum(p, 0))
            tl.store(x_sums + w * tiles_n * n_rows + i, along)
    # Threads read what others have stored.
    tl.debug_barrier()
    for h in tl.static_range(4):
        to = (h * (BM // 4) + tl.arange(0, BM // 4))[:, None] * n_cols
        to = g_tile + (to + tl.arange(0, BN)[None, :])
        g = tl.load(to + (WIDE - 1) * size).to(tl.float32)
        for b in tl.static_range(WIDE - 2, -1, -1):
            g += tl.load(to + b * size).to(tl.float32)
            tl.store(to + b * size, g.to(G.dtype.element_ty))


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
    first += tile * BN
    j = tl.arange(0, BN)
    inside = (first + j < end)[None, :]
    # The last tile may begin among rows of the tile before it, which stores them.
    begin = tl.multiple_of(tl.minimum(im * BM, (n_cols if SWAP else n_rows) - BM), 128)
    i, k = tl.arange(0, BM), tl.arange(0, BK)
    g_tile = G + (b * tl.num_programs(1) + e) * n_rows * n_cols
    if SWAP:  # rows here are the columns of G
        g_tile += begin
        g_at = k[:, None] * n_cols + i[None, :]
        depth = n_rows
    else:
        g_tile += begin.to(tl.int64) * n_cols
        g_at = i[:, None] * n_cols + k[None, :]
        depth = n_cols
    y_tile = Y + (e * SP + col0) * DP + FROM + first
    y_at = k[:, None] * DP + j[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in tl.range(0, depth, BK):
        y = tl.load(y_tile + y_at, mask=inside, other=0.0)
        g = tl.load(g_tile + g_at).T if SWAP else tl.load(g_tile + g_at)
        acc = tl.dot(g, y, acc, input_precision=PRECISION)
        y_tile += BK * DP
        g_tile += BK * n_cols if SWAP else BK
    out = GRAD + (e * RP + row0 + begin) * (DP - FROM) + first
    parts = _quarters(acc)
    for h in tl.static_range(4):
        col = h * (BN // 4) + tl.arange(0, BN // 4)[None, :]
        mine = (begin + i >= im * BM)[:, None] & (first + col < end)
        at = out + (i[:, None] * (DP - FROM) + col)
        tl.store(at, tl.load(at, mask=mine, other=0.0) + parts[h], mask=mine)


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
    factor = largest(scale, rows[1], cols[1] if cols is not None else None)
    pair_bytes = wide * x.element_size() + (ceiling is not None)
    whole = (RP + SP) * bands.width * (4 + x.element_size()) + pair_bytes * RP * SP
    for group in _tiles.groups(E, whole, workspace):
        px, py = (pack(v[group], bands, n[group]) for v, n in zip((x, y), counts, strict=True))
        sx = Sides.of(rows[0][group], rows[1][group], scale[group], factor[group])
        sy = None
        if cols is not None:
            sy = Sides.of(cols[0][group], cols[1][group], scale[group], factor[group])
        tiles = Tiles(px, py, bands, scale[group] * LOG2E, pairs, (sx, sy))
        by_row, by_col = None, None
        if cos and pairs.positive is not None:
            by_row, by_col = Pairs.of(cos[0][group], cos[1][group], pairs.positive, SP)
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


def largest(scale: Tensor, *slopes: Tensor | None) -> Tensor:
    """Return fp32 [E], by which slopes are divided: coefficients of fp16 vectors must neither
    underflow nor overflow.
    """
    most = [(s.abs().amax(2) * scale.abs()).amax(1) for s in slopes if s is not None and s.numel()]
    if not most:
        return torch.ones(len(scale), dtype=torch.float32, device=scale.device)
    top = torch.stack(most).amax(0).float() / SLOPE
    return top.masked_fill(top == 0, 1.0)


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
        more = "" if self.sides[1] is None and not self.mask.mode else "_more"
        options = config("wide_backward" + more, x.dtype)
        if bands.ends[-1] <= 2 * options["BK"]:  # Two steps are unrolled, and then spill.
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
            options["BM"] = min(config("product", x.dtype)["BM"], n)
            _product_kernel[(triton.cdiv(n, options["BM"]) * tiles_n, E)](
                g, other, out, at, other_at, out.shape[1], other.shape[1], n_rows, n_cols, tiles_n,
                STARTS=starts, ENDS=bands.ends, FROM=bands.wide, DP=bands.width, SWAP=swap,
                **options,
            )  # fmt: skip
