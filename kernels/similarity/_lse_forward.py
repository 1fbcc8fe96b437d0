"""Forward kernels: sums of exponentials over tiles of pairs, for every prefix of every exit.

A tile [BM, BN] of dots grows over the packed columns; at each prefix's end

    e = 2^(dot u_i v_j log2(e)/t - shift)

is summed over rows and, with `columns`, over columns. A cosine is at most 1, so one shift serves
all pairs of a prefix: sums add over tiles, one exponential serves both directions, and nothing can
overflow. `_exact_kernel` recognises a row that underflowed by its sum and computes it again with a
running maximum; above a temperature of 0.014 that never happens.

Dropped pairs start at -1e30 instead of 0, once per tile: their exponentials are 0 at every prefix.

Floor, per exit: 2 R S D / matrix rate (here 1.08 D for D = 1024, prefixes 8 to 1024, because a
kernel of its own computes the narrow ones) and M R S / 16 exponentials per clock and
multiprocessor, which overlap at best. Bytes do not count.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Configs, options_of
from . import _tiles
from ._bands import Bands, Packed, pack, padded, positive_cosines
from ._mask import PairMask
from ._tiles import GONE, KL, LOG2E, MSE, TileMask, _pair, _quarters, _start

# Launch options by kernel, for half precision and for fp32, whose products are three tf32 ones (as
# exact as fp32 to a few 1e-7) of operands twice as large. All are unrun: compiled for sm_90a
# without spills, but for 8 bytes in some specialisations of "exact". With 128 registers two
# programs of the wide kernel's 8 warps share a multiprocessor: while one computes exponentials, the
# other computes products.
CONFIGS: Configs = {
    "narrow_forward": {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
    "narrow_forward_columns": {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
    "narrow_forward_matrix": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "wide_forward": {
        "BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128,
    },
    "wide_forward_columns": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3},
    "wide_forward_matrix": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3},
    "exact": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1},
}  # fmt: skip
CONFIGS_FP32: Configs = {
    "narrow_forward": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "narrow_forward_columns": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "narrow_forward_matrix": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
    "wide_forward": {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
    "wide_forward_columns": {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
    "wide_forward_matrix": {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2},
    "exact": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1},
}


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
SCALARS = ["NX", "NY", "SCALE", "SHIFT"]


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SCALARS)
def _narrow_forward_kernel(
    X, Y, U, V, SCALE, SHIFT, NX, NY, ROWS, COLS, POS, KX, KY, PAIR,
    row0, pair_row, pair_stride, RP, SP, tiles,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the narrow prefixes: ROWS fp32 [splits, E, M, RP], COLS fp32 [E, row tiles, MN, SP]."""
    split = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    i0 = row0 + tl.program_id(0) * BM
    rows = i0 + tl.arange(0, BM)
    x_rows = X + (e * RP + rows)[:, None] * DP
    MN: tl.constexpr = len(STARTS)
    x, u, shift, sums = (), (), (), ()
    for m in tl.static_range(MN):
        scale = tl.load(SCALE + e * M + m)
        x = x + (tl.load(x_rows + (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :]),)
        u = u + (tl.load(U + (e * M + m) * RP + rows) * scale,)
        shift = shift + (tl.load(SHIFT + e * M + m),)
        sums = sums + (tl.zeros([BM], tl.float32),)
    per = tl.cdiv(tiles, tl.num_programs(1))
    for j in tl.range(split * per, tl.minimum(split * per + per, tiles)):
        j0 = j * BN
        cols = j0 + tl.arange(0, BN)
        y_rows = Y + (e * SP + cols)[:, None] * DP
        acc = _start(i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
        new = ()
        for m in tl.static_range(MN):
            y = tl.load(y_rows + (STARTS[m] + tl.arange(0, WIDTHS[m]))[None, :])
            acc = tl.dot(x[m], y.T, acc, input_precision=PRECISION)
            v = tl.load(V + (e * M + m) * SP + cols)
            p = acc * u[m][:, None] * v[None, :]
            if MODE == MSE or MODE == KL:
                teacher = _pair(i0, j0, matrix, False, BM, BN)
                p = _compare(acc, p, teacher, MODE)
            else:
                p = tl.exp2(p - shift[m])
            new = new + (sums[m] + tl.sum(p, 1),)
            if COLUMNS:
                out = ((e * tl.num_programs(0) + tl.program_id(0)) * MN + m) * SP + cols
                tl.store(COLS + out, tl.sum(p, 0))
        sums = new
    for m in tl.static_range(MN):
        tl.store(ROWS + ((split * tl.num_programs(2) + e) * M + m) * RP + rows, sums[m])


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SCALARS)
def _wide_forward_kernel(
    X, Y, U, V, SCALE, SHIFT, NX, NY, ROWS, COLS, POS, KX, KY, PAIR,
    row0, pair_row, pair_stride, RP, SP, tiles,
    ENDS: tl.constexpr, FIRST: tl.constexpr, FROM: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr, COLUMNS: tl.constexpr,
    MP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the wide prefixes FIRST.., which end at FROM + ENDS; COLS [E, row tiles, WIDE, SP].

    One loop over (column tile, step) lets loads run ahead across tiles and prefixes.
    """
    split = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    i0 = row0 + tl.program_id(0) * BM
    rows = i0 + tl.arange(0, BM)
    k = tl.arange(0, BK)[None, :]
    x_tile = X + (e * RP + i0) * DP + FROM
    x_at, y_at = tl.arange(0, BM)[:, None] * DP + k, tl.arange(0, BN)[:, None] * DP + k
    STEPS: tl.constexpr = (DP - FROM) // BK
    WIDE: tl.constexpr = len(ENDS)
    which = tl.arange(0, MP)[:, None]
    sums = tl.zeros([MP, BM], tl.float32)
    per = tl.cdiv(tiles, tl.num_programs(1))
    first = split * per
    last = tl.minimum(first + per, tiles)
    # The last splits may have no tile: `_start` then reads the last tile, within its buffers.
    j0 = tl.minimum(first, tiles - 1) * BN
    acc = _start(i0, j0, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
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
            u = tl.load(U + at * RP + rows) * tl.load(SCALE + at)
            shift = tl.load(SHIFT + at)
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
                    out = ((e * tl.num_programs(0) + tl.program_id(0)) * WIDE + m) * SP
                    tl.store(COLS + out + quarter, tl.sum(p, 0))
            sums += tl.where(which == m, total[None, :], 0.0)
            if m == WIDE - 1:
                ahead = tl.minimum(j0 + BN, SP - BN)
                acc = _start(i0, ahead, e, mask, matrix, HAS_POS, N_KEYS, MODE, False, BM, BN)
    out = ((split * tl.num_programs(2) + e) * M + FIRST + which) * RP + rows[None, :]
    tl.store(ROWS + out, sums, mask=which < WIDE)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=SCALARS)
def _exact_kernel(
    X, Y, U, V, SCALE, NX, NY, SUMS, LSE, POS, KX, KY, PAIR,
    row0, pair_row, pair_stride, RP, SP, tiles,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute LSE [E, M, RP] of rows whose SUMS are so small that terms may have been lost.

    A program without such rows returns at once, as nearly all do.
    """
    e = tl.program_id(1).to(tl.int64)
    mask, matrix = (NX, NY, RP, SP, POS, KX, KY), (PAIR, pair_row, pair_stride)
    i0 = row0 + tl.program_id(0) * BM
    rows = i0 + tl.arange(0, BM)
    nx = tl.load(NX + e)
    lost = tl.zeros([BM], tl.int32)
    for m in tl.static_range(M):
        s = tl.load(SUMS + (e * M + m) * RP + rows)
        # Sums above 2^-60 are exact to 2^-49.
        lost = tl.where((s < 8.7e-19) & (rows < nx), 1, lost)
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
        at = (e * M + m) * RP + rows
        redo = (tl.load(SUMS + at) < 8.7e-19) & (rows < nx)
        lse = tl.where(
            sums[m] == 0, -float("inf"), (tops[m] + tl.log2(sums[m])) * 0.6931471805599453
        )
        tl.store(LSE + at, lse, mask=redo)


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
    cos_EMR = rows_EMR.new_zeros(E, M, R if pairs.positive is not None else 0)
    scale2 = (scale * LOG2E).contiguous()
    shift2 = (scale2.abs() + math.log2(max(RP, SP)) - 126).clamp(min=0)
    names = "narrow_forward_columns", "wide_forward_columns"
    smallest = min(config(name, x.dtype)["BM"] for name in names)
    row_bytes = (4 * M * SP // smallest if columns else 0) + (SP if ceiling is not None else 0)
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
            tiles = Tiles(px, py, bands, scale2[group], shift2[group], pairs)
            total = torch.zeros_like(py.u) if columns else None
            if pairs.positive is not None and chunk.start == 0:
                cos_EMR[group] = positive_cosines(px, py, bands, pairs.positive)[..., :R]
        if ceiling is not None and chunk != last[1]:
            # The last chunk's matrix is freed first: with it there would be two workspaces.
            pairs = tiles.mask = replace(pairs, pair=None)
            near = _tiles.near_mask(x, y, bands, counts, ceiling, chunk)
            pairs = replace(pairs, pair=near, pair_row=chunk.start, mode=_tiles.NEAR.value)
            del near
        tiles.mask = pairs
        last = group, chunk
        sums, col_sums = tiles.sums(chunk, columns)
        rows = slice(chunk.start, min(chunk.stop, R))
        rows_EMR[group, :, rows] = tiles.logs(sums, chunk, swap=False)[..., rows]
        if total is not None and col_sums is not None:
            total += col_sums
            if chunk is by_rows[-1]:
                cols_EMS[group] = tiles.logs(total, slice(0, SP), swap=True)[..., :S]
    return rows_EMR, cols_EMS, cos_EMR


@dataclass
class Tiles:
    """Packed vectors of a group of exits, and the launches over them."""

    x: Packed
    y: Packed
    bands: Bands
    scale2: Tensor  # log2(e) / t, fp32 [E, M]
    shift2: Tensor
    mask: TileMask

    def sums(self, rows: slice, columns: bool) -> tuple[Tensor, Tensor | None]:
        """Return sums of 2^(z - shift): [E, M, RP] of `rows`, [E, M, SP] of columns over them."""
        x, y, bands = self.x, self.y, self.bands
        (E, M, RP), SP, MN = x.u.shape, y.u.shape[2], bands.narrow
        n = rows.stop - rows.start
        variant = "_columns" if columns else "_matrix" if self.mask.mode else ""
        narrow = config("narrow_forward" + variant, x.x.dtype)
        wide = config("wide_forward" + variant, x.x.dtype)
        launched = [options for m, options in ((MN, narrow), (M - MN, wide)) if m]
        programs = n // launched[0]["BM"] * E
        splits = splits_of(programs, min(SP // options["BN"] for options in launched), x.x)
        out = torch.empty(splits, E, M, RP, dtype=torch.float32, device=x.x.device)
        empty = (E, 0, 0, SP)
        cols = [
            torch.empty(empty if not columns else (E, n // o["BM"], m, SP), device=x.x.device)
            for o, m in ((narrow, MN), (wide, M - MN))
        ]
        shared = (x.x, y.x, x.u, y.u, self.scale2, self.shift2, x.counts, y.counts, out)
        for m, options, buffer in ((MN, narrow, cols[0]), (M - MN, wide, cols[1])):
            if not m:
                continue
            common = {
                "COLS": buffer, **self.mask.arguments(False, x.u), "row0": rows.start, "RP": RP,
                "SP": SP, "tiles": SP // options["BN"], "DP": bands.width, "M": M,
                "COLUMNS": columns,
            }  # fmt: skip
            grid = (n // options["BM"], splits, E)
            if options is narrow:
                _narrow_forward_kernel[grid](
                    *shared, STARTS=bands.starts[:MN], WIDTHS=bands.widths[:MN], **common, **options
                )
            else:
                _wide_forward_kernel[grid](
                    *shared, ENDS=bands.ends, FIRST=MN, FROM=bands.wide,
                    MP=triton.next_power_of_2(m), **common, **options,
                )  # fmt: skip
        if not columns:
            return out.sum(0), None
        return out.sum(0), torch.cat([c.sum(1) for c in cols], dim=1)

    def logs(self, sums: Tensor, rows: slice, swap: bool) -> Tensor:
        """Return LSEs [E, M, RP] of rows (swapped: columns); exact where sums underflow."""
        x, y = (self.y, self.x) if swap else (self.x, self.y)
        (E, M, RP), SP = x.u.shape, y.u.shape[2]
        lse = sums.log() + (self.shift2 / LOG2E)[..., None]
        options = config("exact", x.x.dtype)
        _exact_kernel[((rows.stop - rows.start) // options["BM"], E)](
            x.x, y.x, x.u, y.u, self.scale2, x.counts, y.counts, sums, lse,
            **self.mask.arguments(swap, x.u), row0=rows.start, RP=RP, SP=SP,
            tiles=SP // options["BN"], STARTS=self.bands.starts, WIDTHS=self.bands.widths,
            DP=self.bands.width, M=M, SWAP=swap, **options,
        )  # fmt: skip
        return lse


def splits_of(programs: int, tiles: int, x: Tensor) -> int:
    """Return how many parts of the columns give every multiprocessor two programs."""
    if not x.is_cuda:
        return 1
    wanted = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(1, min(-(-wanted // programs), tiles))
