"""Forward kernels: sums of exponentials over tiles of pairs, for every prefix of every exit.

A tile [BM, BN] of dots grows over the packed columns; at each prefix's end

    e = 2^(dot u_i v_j log2(e)/t - shift)

is summed over rows and, with `columns`, over columns. A cosine is at most 1, so one shift serves
all pairs of a prefix: sums add over tiles, one exponential serves both directions, and nothing can
overflow. _lse_logs.py repairs rows whose sums underflow, which needs a temperature below 0.014.

Dropped pairs start at -1e30 instead of 0, once per tile: their exponentials are 0 at every prefix.

Floor, per exit: 2 R S D / matrix rate (here 1.08 D for D = 1024, prefixes 8 to 1024, because a
kernel of its own computes the narrow ones) and M R S / 16 exponentials per clock and
multiprocessor, which overlap at best. Bytes from the L2 cache weigh as much as the products: a tile
[BM, BN] reads 2 (1 / BM + 1 / BN) D bytes a pair in half precision.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Configs, options_of
from . import _tiles
from ._bands import Bands, Packed, pack, padded, positive_cosines
from ._lse_logs import Parts, _shift, exact, merge
from ._mask import PairMask
from ._tiles import GONE, KL, LOG2E, MSE, TileMask, _drop, _pair, _plain, _quarters, _special

# Launch options by kernel, for half precision and for fp32, whose products are three tf32 ones (as
# exact as fp32 to a few 1e-7) of operands twice as large. All are unrun: compiled for sm_90a
# without spills. The wide kernel's 128 x 256 tile has a multiprocessor for itself: with 128 x 128,
# two programs overlap products and exponentials, but the L2 cache feeds neither.
CONFIGS: Configs = {
    "narrow_forward": {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
    "narrow_forward_columns": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3},
    "narrow_forward_matrix": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "wide_forward": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4},
    "wide_forward_columns": {"BM": 256, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    "wide_forward_matrix": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3},
}  # fmt: skip
CONFIGS_FP32: Configs = {
    "narrow_forward": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "narrow_forward_columns": {"BM": 16, "BN": 64, "num_warps": 4, "num_stages": 2},
    "narrow_forward_matrix": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
    "wide_forward": {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
    "wide_forward_columns": {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
    "wide_forward_matrix": {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
}


SPLITS = 8  # of the columns, at least


def config(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return options_of(CONFIGS, CONFIGS_FP32, name, dtype)


@triton.jit
def _compare(dots, cos, teacher, MODE: tl.constexpr):
    """Return a pair's term: (cos - t)^2, or p cos of the cross-entropy; 0 for an absent text."""
    term = teacher * cos
    if MODE == MSE:
        term = (cos - teacher) * (cos - teacher)
    return tl.where(dots > 0.5 * GONE, term, 0.0)


# Kernels load single numbers from these: _bands.py says why their alignment compiles nothing twice.
SCALARS = ["NX", "NY", "SCALE"]


@triton.jit
def _fold(p):
    """Add up rows of a tile of 64 or more that one thread holds, [BM, BN] to [4, 8, BN].

    Of 64 rows of a product, four warps have 16 each, and a thread has two, eight apart.
    """
    parts = p.reshape(p.shape[0] // 64, 4, 2, 8, p.shape[1])
    return tl.sum(tl.sum(parts, 2), 0)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SCALARS)
def _narrow_forward_kernel(
    X, Y, U, V, SCALE, NX, NY, ROWS, COLS, POS, KX, KY, PAIR,
    bits, row0, pair_row, pair_stride, RP, SP, tiles,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the narrow prefixes: ROWS fp32 [splits, E, MN, rows], COLS fp32 [strips, E, MN, SP].

    With COLUMNS a tile is [BN, BM], y before x: then both sums stay within threads, those over y
    until the last tile.
    """
    split, strip = tl.program_id(0), tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    i0 = row0 + strip * BM
    rows = i0 + tl.arange(0, BM)
    x_rows = X + (e * RP + rows)[:, None] * DP
    MN: tl.constexpr = len(STARTS)
    x, u, shift, sums = (), (), (), ()
    for m in tl.static_range(MN):
        scale = tl.load(SCALE + e * M + m)
        x = x + (tl.load(x_rows + (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :]),)
        u = u + (tl.load(U + (e * M + m) * RP + rows) * scale,)
        shift = shift + (_shift(scale, bits),)
        sums = sums + (tl.zeros([4, 8, BM] if COLUMNS else [BM], tl.float32),)
    special = _special(i0, e, mask, HAS_POS, BM)
    per = tl.cdiv(tiles, tl.num_programs(0))
    for j in tl.range(split * per, tl.minimum(split * per + per, tiles)):
        j0 = j * BN
        cols = j0 + tl.arange(0, BN)
        y_rows = Y + (e * SP + cols)[:, None] * DP
        acc = tl.zeros([BN, BM] if COLUMNS else [BM, BN], tl.float32)
        if not _plain(j0, e, mask, special, N_KEYS, MODE, BN):
            if COLUMNS:
                swapped = (NY, NX, SP, RP, POS, KY, KX)
                acc = _drop(acc, j0, i0, e, swapped, matrix, HAS_POS, N_KEYS, MODE, True, BN, BM)
            else:
                acc = _drop(acc, i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
        new = ()
        for m in tl.static_range(MN):
            y = tl.load(y_rows + (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :])
            v = tl.load(V + (e * M + m) * SP + cols)
            if COLUMNS:
                acc = tl.dot(y, x[m].T, acc, input_precision=PRECISION)
                p = tl.exp2(acc * v[:, None] * u[m][None, :] - shift[m])
                out = ((strip * tl.num_programs(2) + e) * MN + m) * SP + cols
                tl.store(COLS + out, tl.sum(p, 1))
                new = new + (sums[m] + _fold(p),)
            else:
                acc = tl.dot(x[m], y.T, acc, input_precision=PRECISION)
                p = acc * u[m][:, None] * v[None, :]
                if MODE == MSE or MODE == KL:
                    teacher = _pair(i0, j0, matrix, False, BM, BN)
                    p = _compare(acc, p, teacher, MODE)
                else:
                    p = tl.exp2(p - shift[m])
                new = new + (sums[m] + tl.sum(p, 1),)
        sums = new
    for m in tl.static_range(MN):
        total = tl.sum(tl.sum(sums[m], 0), 0) if COLUMNS else sums[m]
        out = ((split * tl.num_programs(2) + e) * MN + m) * (tl.num_programs(1) * BM)
        tl.store(ROWS + out + strip * BM + tl.arange(0, BM), total)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SCALARS)
def _wide_forward_kernel(
    X, Y, U, V, SCALE, NX, NY, ROWS, COLS, POS, KX, KY, PAIR,
    bits, row0, pair_row, pair_stride, RP, SP, tiles,
    ENDS: tl.constexpr, FIRST: tl.constexpr, FROM: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr, COLUMNS: tl.constexpr,
    MP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the wide prefixes FIRST.., which end at FROM + ENDS: as above, of WIDE prefixes.

    One loop over (column tile, step) lets loads run ahead across tiles and prefixes.
    """
    split, strip = tl.program_id(0), tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    i0 = row0 + strip * BM
    rows = i0 + tl.arange(0, BM)
    k = tl.arange(0, BK)[None, :]
    x_tile = X + (e * RP + i0) * DP + FROM
    x_at, y_at = tl.arange(0, BM)[:, None] * DP + k, tl.arange(0, BN)[:, None] * DP + k
    STEPS: tl.constexpr = (DP - FROM) // BK
    WIDE: tl.constexpr = len(ENDS)
    per = tl.cdiv(tiles, tl.num_programs(0))
    first = split * per
    last = tl.minimum(first + per, tiles)
    special = _special(i0, e, mask, HAS_POS, BM)
    which = tl.arange(0, MP)[:, None]
    sums = tl.zeros([MP, BM], tl.float32)
    # The last splits may have no tile: they look at the last tile, within its buffers.
    j0 = tl.minimum(first, tiles - 1) * BN
    acc = tl.zeros([BM, BN], tl.float32)
    acc = _drop(acc, i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
    for t in tl.range(0, tl.maximum(last - first, 0) * STEPS):
        step = t % STEPS
        j0 = (first + t // STEPS) * BN
        x = tl.load(x_tile + step * BK + x_at)
        y = tl.load(Y + (e * SP + j0) * DP + FROM + step * BK + y_at)
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
        m = -1
        for w in tl.static_range(WIDE):
            m = tl.where(step == ENDS[w] // BK - 1, w, m)
        if m >= 0:
            at = e * M + FIRST + m
            scale = tl.load(SCALE + at)
            u, shift = tl.load(U + at * RP + rows) * scale, _shift(scale, bits)
            dots = _quarters(acc)
            total = tl.zeros([BM], tl.float32)
            for h in tl.static_range(4):  # a quarter of the columns and registers at a time
                quarter = j0 + h * (BN // 4) + tl.arange(0, BN // 4)
                v = tl.load(V + at * SP + quarter)
                p = dots[h] * u[:, None] * v[None, :]
                if MODE == MSE or MODE == KL:
                    q0 = j0 + h * (BN // 4)
                    teacher = _pair(i0, q0, matrix, False, BM, BN // 4)
                    p = _compare(dots[h], p, teacher, MODE)
                else:
                    p = tl.exp2(p - shift)
                total += tl.sum(p, 1)
                if COLUMNS:
                    out = ((strip * tl.num_programs(2) + e) * WIDE + m) * SP
                    tl.store(COLS + out + quarter, tl.sum(p, 0))
            sums += tl.where(which == m, total[None, :], 0.0)
        # Not `step == STEPS - 1`, which would become one branch with the end of a single prefix.
        if (t + 1) % STEPS == 0:
            # The next tile. Reading `acc` first makes Triton wait for the product here, as ptxas
            # wants it, and not at every step; the condition never holds.
            acc = tl.where(step < 0, acc, 0.0)
            j0 = tl.minimum(j0 + BN, SP - BN)
            if not _plain(j0, e, mask, special, N_KEYS, MODE, BN):
                acc = _drop(acc, i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
    out = ((split * tl.num_programs(2) + e) * WIDE + which) * (tl.num_programs(1) * BM)
    out += strip * BM + tl.arange(0, BM)[None, :]
    tl.store(ROWS + out, sums, mask=which < WIDE)


def forward(
    x: Tensor, y: Tensor, bands: Bands, scale: Tensor, mask: PairMask, columns: bool, workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row LSEs [E, M, R], column LSEs and positives' cosines, empty if not asked for."""
    (E, R, _), S, M = x.shape, y.shape[1], len(bands.starts)
    pairs, ceiling = TileMask.of(mask, R, S), mask.ceiling
    counts = _tiles.counts_of(mask.row_counts, x), _tiles.counts_of(mask.col_counts, y)
    RP, SP = padded(R), padded(S)
    rows_EMR = torch.empty(E, M, R, dtype=torch.float32, device=x.device)
    cols_EMS = torch.empty(E, M, S if columns else 0, dtype=torch.float32, device=x.device)
    cos_EMR = rows_EMR.new_empty(E, M, R if pairs.positive is not None else 0)
    scale2 = scale * LOG2E
    row_bytes = SP if ceiling is not None else 0
    for kind, m in (("narrow", bands.narrow), ("wide", M - bands.narrow)) if columns else ():
        row_bytes += 4 * m * SP // config(f"{kind}_forward_columns", x.dtype)["BM"]
    whole = (RP + SP) * bands.width * x.element_size() + RP * row_bytes
    by_exits = _tiles.groups(E, whole, workspace)
    by_rows = _tiles.chunks(RP, row_bytes * by_exits[0].stop, workspace)
    # A mask of near pairs serves all exits; column sums are completed exit by exit.
    order = [(group, chunk) for group in by_exits for chunk in by_rows]
    if ceiling is not None:
        order = [(group, chunk) for chunk in by_rows for group in by_exits]
    last: tuple[slice | None, slice | None] = (None, None)
    for group, chunk in order:
        if group != last[0]:
            px, py = (pack(v[group], bands, n[group]) for v, n in zip((x, y), counts, strict=True))
            tiles = Tiles(px, py, bands, scale2[group], pairs)
            before = torch.zeros_like(py.u) if columns and len(by_rows) > 1 else None
            if pairs.positive is not None and chunk.start == 0:
                positive_cosines(cos_EMR[group], px, py, bands, pairs.positive)
        if ceiling is not None and chunk != last[1]:
            # The last chunk's matrix is freed first: with it there would be two workspaces.
            pairs = tiles.mask = replace(pairs, pair=None)
            near = _tiles.near_mask(x, y, bands, counts, ceiling, chunk)
            pairs = replace(pairs, pair=near, pair_row=chunk.start, mode=_tiles.NEAR.value)
            del near
        tiles.mask = pairs
        last = group, chunk
        row_sums, col_sums = tiles.sums(chunk, columns)
        merge(row_sums, rows_EMR[group], tiles.scale2, tiles.bits, chunk.start)
        tiles.repair(rows_EMR[group], chunk)
        if columns:
            merge(col_sums, cols_EMS[group], tiles.scale2, tiles.bits, before=before)
            if chunk is by_rows[-1]:
                tiles.repair(cols_EMS[group], slice(0, SP), swap=True)
        del row_sums, col_sums  # The next chunk's take their place in the workspace.
    return rows_EMR, cols_EMS, cos_EMR


@dataclass
class Tiles:
    """Packed vectors of a group of exits, and the launches over them."""

    x: Packed
    y: Packed
    bands: Bands
    scale2: Tensor  # log2(e) / t, fp32 [E, M]
    mask: TileMask

    @property
    def bits(self) -> float:
        """log2 of the most terms of a sum, less the largest exponent."""
        return math.log2(max(self.x.u.shape[2], self.y.u.shape[2])) - 126

    def sums(self, rows: slice, columns: bool) -> tuple[Parts, Parts]:
        """Return parts of the sums of 2^(z - shift) over columns, for `rows`, and over `rows`."""
        x, y, bands = self.x, self.y, self.bands
        (E, M, RP), SP, MN = x.u.shape, y.u.shape[2], bands.narrow
        n = rows.stop - rows.start
        variant = "_columns" if columns else "_matrix" if self.mask.mode else ""
        row_sums, col_sums = [], []
        for kind, m in (("narrow", MN), ("wide", M - MN)):
            options = fitted(config(f"{kind}_forward{variant}", x.x.dtype), n, SP)
            strips, tiles = n // options["BM"], SP // options["BN"]
            splits = splits_of(strips * E, tiles, options["num_warps"], x.x) if m else 0
            sizes = (splits, E, m, n), (strips if columns else 0, E, m, SP)
            for parts, size in zip((row_sums, col_sums), sizes, strict=True):
                parts.append(torch.empty(size, dtype=torch.float32, device=x.x.device))
            if not m:
                continue
            common = {
                "ROWS": row_sums[-1], "COLS": col_sums[-1], **self.mask.arguments(False, x.u),
                "bits": self.bits, "row0": rows.start, "RP": RP, "SP": SP, "tiles": tiles,
                "DP": bands.width, "M": M, "COLUMNS": columns,
            }  # fmt: skip
            shared = x.x, y.x, x.u, y.u, self.scale2, x.counts, y.counts
            grid = splits, strips, E
            if kind == "narrow":
                _narrow_forward_kernel[grid](
                    *shared, STARTS=bands.starts[:MN], WIDTHS=bands.widths[:MN], **common, **options
                )
            else:
                _wide_forward_kernel[grid](
                    *shared, ENDS=bands.ends, FIRST=MN, FROM=bands.wide,
                    MP=triton.next_power_of_2(m), **common, **options,
                )  # fmt: skip
        return tuple(row_sums), tuple(col_sums)

    def repair(self, lse: Tensor, rows: slice, swap: bool = False) -> None:
        """Compute LSEs of rows (swapped: columns) again where their sums underflowed."""
        sides = self.x, self.y
        exact(lse, sides, self.bands, self.mask, self.scale2, self.bits, rows, swap)


def fitted(options: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    """Return launch options with tiles that divide these rows and columns, multiples of ROWS."""
    sizes = {"BM": math.gcd(options["BM"], rows), "BN": math.gcd(options["BN"], columns)}
    return {**options, **sizes}


@lru_cache
def _splits(programs: int, tiles: int, slots: int) -> int:
    least = min(SPLITS, -(-tiles // SPLITS))
    most = min(max(2 * SPLITS, slots // programs), tiles)

    def steps(splits: int) -> float:
        # A program fills its pipeline before its first tile.
        return -(-programs * splits // slots) * (-(-tiles // splits) + 0.25)

    return min(range(least, max(least, most) + 1), key=steps)


def splits_of(programs: int, tiles: int, warps: int, x: Tensor) -> int:
    """Return into how many parts columns are split, so that the last programs end together.

    Programs of the same rows are neighbours and read them together, so that the rows in use at any
    time fit the cache: at least SPLITS of them, unless rows alone leave multiprocessors idle.
    """
    if not x.is_cuda:
        return 1
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    # Twelve warps of 168 registers fit a multiprocessor, or eight of 255.
    return _splits(programs, tiles, multiprocessors * (12 // warps))
