"""Tiles of pairs: which pairs count, and matrices over a chunk of rows.

Dropped pairs start at -1e30 instead of 0, once per tile: adding dots does not change that, and
their exponentials are 0 at every prefix.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Configs, options_of
from ._bands import ROWS, TILE, Bands, Packed, pack, padded
from ._mask import PairMask

GONE = tl.constexpr(-1e30)
# Modes of a chunk's matrix: 1 where pairs are too similar; a teacher's cosines; its probabilities.
NEAR, MSE, KL = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
# _lse_forward.py says what the options are and how they were chosen.
CONFIGS: Configs = {"matrix": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}}
CONFIGS_FP32: Configs = {"matrix": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}}


@dataclass(frozen=True)
class TileMask:
    """A `PairMask` as kernels read it, rows padded to RP and columns to SP, but for ceilings.

    A chunk of rows may have a matrix with something of each pair: what, is its `mode`.
    """

    positive: Tensor | None = None  # int32 [RP]; none is -1, or S, which no column is
    row_keys: Tensor | None = None  # int32 [K, RP]
    col_keys: Tensor | None = None  # int32 [K, SP]
    pair: Tensor | None = None  # [chunk, SP]
    pair_row: int = 0  # the row of pair[0]
    mode: int = 0  # NEAR, MSE or KL

    @staticmethod
    def of(mask: PairMask, R: int, S: int) -> "TileMask":
        positive, row_keys, col_keys, *_ = mask
        if positive is not None:
            positive = _pad(positive.clamp(-1, S).to(torch.int32), R)
        if row_keys is not None and col_keys is not None:
            row_keys, col_keys = _ranks(row_keys, col_keys)
            row_keys, col_keys = _pad(row_keys, R), _pad(col_keys, S)
        return TileMask(positive, row_keys, col_keys)

    def arguments(self, swap: bool, unused: Tensor) -> dict[str, Any]:
        """Return keyword arguments of `_start`.

        swap: the kernel's rows are the columns here. unused: passed for what is None; kernels read
        nothing from it.
        """
        keys = (self.row_keys, self.col_keys)
        return {
            "POS": unused if self.positive is None else self.positive,
            "KX": unused if keys[0] is None else keys[swap],
            "KY": unused if keys[0] is None else keys[not swap],
            "PAIR": unused if self.pair is None else self.pair,
            "pair_row": self.pair_row,
            "pair_stride": 0 if self.pair is None else self.pair.stride(0),
            "HAS_POS": self.positive is not None,
            "N_KEYS": 0 if keys[0] is None else len(keys[0]),
            "MODE": self.mode,
        }


def _pad(x: Tensor, n: int) -> Tensor:
    """Return x [..., n] with as many -1 behind it as its rows have padding."""
    return x if n == padded(n) else F.pad(x, (0, padded(n) - n), value=-1)


def _ranks(row_keys: Tensor, col_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys as int32 [K, n], equal where the keys [K, n] are: half the registers of int64.

    A key's rank is among the columns' keys; torch.unique would wait for the device.
    """
    if not col_keys.shape[1]:
        return torch.full_like(row_keys, -1, dtype=torch.int32), col_keys.int()
    ordered = col_keys.sort(dim=1).values
    rows = torch.searchsorted(ordered, row_keys)
    known = ordered.gather(1, rows.clamp(max=ordered.shape[1] - 1)) == row_keys
    cols = torch.searchsorted(ordered, col_keys)
    return rows.masked_fill(~known, -1).int(), cols.int()


def counts_of(counts: Tensor | None, x: Tensor) -> Tensor:
    """Return int32 [E], how many rows of x [E, n, D] are present."""
    if counts is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int32, device=x.device)
    return counts.clamp(0, x.shape[1]).to(torch.int32)


@triton.jit
def _pair(row0, col0, matrix, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Return the tile [BM, BN] at (row0, col0) of a chunk's `matrix`, transposed if SWAP."""
    PAIR, pair_row, pair_stride = matrix
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    if SWAP:
        tile = PAIR + (col0 - pair_row).to(tl.int64) * pair_stride + row0
        at = j * pair_stride + i
    else:
        tile = PAIR + (row0 - pair_row).to(tl.int64) * pair_stride + col0
        at = i * pair_stride + j
    return tl.load(tile + at)


@triton.jit
def _start(
    row0, col0, e, mask, matrix, HAS_POS: tl.constexpr, N_KEYS: tl.constexpr, MODE: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return what a tile's dots begin with: 0, or far below any dot where the pair is dropped."""
    acc = tl.zeros([BM, BN], tl.float32)
    return _drop(acc, row0, col0, e, mask, matrix, HAS_POS, N_KEYS, MODE, SWAP, BM, BN)


@triton.jit
def _drop(
    acc, row0, col0, e, mask, matrix, HAS_POS: tl.constexpr, N_KEYS: tl.constexpr,
    MODE: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return a tile that is GONE where the pair is dropped, and `acc` elsewhere.

    Its inputs are loaded here, not held in registers from one tile to the next.
    """
    NX, NY, RP, SP, POS, KX, KY = mask
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    rows, cols = row0 + i, col0 + j
    x_gone = tl.where(rows < tl.load(NX + e), 0.0, GONE)
    y_gone = tl.where(cols < tl.load(NY + e), 0.0, GONE)
    acc += x_gone[:, None] + y_gone[None, :]
    if HAS_POS:
        if SWAP:
            is_positive = tl.load(POS + cols)[None, :] == rows[:, None]
        else:
            is_positive = tl.load(POS + rows)[:, None] == cols[None, :]
        acc = tl.where(is_positive, GONE, acc)
    for k in tl.static_range(N_KEYS):
        same = tl.load(KX + k * RP + rows)[:, None] == tl.load(KY + k * SP + cols)[None, :]
        acc = tl.where(same, GONE, acc)
    if MODE == NEAR:
        near = _pair(row0, col0, matrix, SWAP, BM, BN)
        acc = tl.where(near == 1, GONE, acc)
    return acc


@triton.jit
def _special(row0, e, mask, HAS_POS: tl.constexpr, BM: tl.constexpr):
    """Return the first and last column with a pair that `_plain` has to look at, of BM rows.

    They are the positives' columns, or all columns if a row is absent.
    """
    NX, NY, RP, SP, POS, KX, KY = mask
    first, last = SP, -1
    if HAS_POS:
        positive = tl.load(POS + row0 + tl.arange(0, BM))
        first = tl.min(tl.where(positive < 0, SP, positive))
        last = tl.max(positive)
    ragged = row0 + BM > tl.load(NX + e)
    return tl.where(ragged, 0, first), tl.where(ragged, SP, last)


@triton.jit
def _plain(
    col0, e, mask, special, N_KEYS: tl.constexpr, MODE: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Tell whether every pair of a tile counts, so that its dots may begin with 0."""
    NX, NY, RP, SP, POS, KX, KY = mask
    first, last = special
    inside = col0 + BN <= tl.load(NY + e)
    plain = inside & ((col0 + BN <= first) | (col0 > last))
    return plain if N_KEYS == 0 and MODE != NEAR else False


@triton.jit
def _halves(x):
    """Return the left and the right columns of a tile, in the registers they are in."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _quarters(x):
    left, right = _halves(x)
    return _halves(left) + _halves(right)


@triton.jit(do_not_specialize_on_alignment=["NX", "NY"])
def _matrix_kernel(
    X, Y, U, V, NX, NY, CEILING, OUT, row0, RP, SP,
    FROM: tl.constexpr, UNTIL: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute OUT [chunk, SP] of one exit's pairs.

    MODE NEAR: int8, whether the cosine is above the row's ceiling, where OUT is 2 (undecided) and
    both texts are present. Otherwise fp32, the cosine.
    """
    local = tl.program_id(0) * BM + tl.arange(0, BM)
    rows, cols = row0 + local, tl.program_id(1) * BN + tl.arange(0, BN)
    out = OUT + local.to(tl.int64)[:, None] * SP + cols[None, :]
    if MODE == NEAR:
        ceiling = tl.load(CEILING + rows)
        can_tell = (rows < tl.load(NX)) & (ceiling < float("inf"))
        near = tl.load(out).to(tl.int32)
        decide = (near == 2) & can_tell[:, None] & (cols < tl.load(NY))[None, :]
        if tl.max(tl.max(decide.to(tl.int32), 1)) == 0:
            return
    k = tl.arange(0, BK)[None, :]
    x_rows = X + rows.to(tl.int64)[:, None] * DP + k
    y_rows = Y + cols.to(tl.int64)[:, None] * DP + k
    acc = tl.zeros([BM, BN], tl.float32)
    for at in tl.range(FROM, UNTIL, BK):
        acc = tl.dot(tl.load(x_rows + at), tl.load(y_rows + at).T, acc, input_precision=PRECISION)
    u = tl.load(U + (M - 1) * RP + rows)
    v = tl.load(V + (M - 1) * SP + cols)
    cos = acc * u[:, None] * v[None, :]
    if MODE == NEAR:
        above = (cos > ceiling[:, None]).to(tl.int32)
        tl.store(out, tl.where(decide, above, near).to(tl.int8))
    else:
        tl.store(out, cos)


def near_mask(
    x: Tensor, y: Tensor, bands: Bands, counts: tuple[Tensor, Tensor], ceiling: Tensor, rows: slice
) -> Tensor:
    """Return int8 [rows, SP]: 1 where the deepest exit that can tell finds a pair too similar."""
    E, SP = x.shape[0], padded(y.shape[1])
    n = rows.stop - rows.start
    near = torch.full((n, SP), 2, dtype=torch.int8, device=x.device)
    for e in reversed(range(E)):  # Tiles that are decided return at once.
        px = pack(x[e : e + 1], bands, counts[0][e : e + 1])
        py = pack(y[e : e + 1], bands, counts[1][e : e + 1])
        high = F.pad(ceiling[e], (0, px.x.shape[1] - x.shape[1]), value=torch.inf)
        fill(near, px, py, bands, rows.start, high, NEAR.value)
    return near


def fill(
    out: Tensor, x: Packed, y: Packed, bands: Bands, row: int, ceiling: Tensor, mode: int
) -> None:
    """Compute a matrix over the pairs of one exit, for the rows from `row`."""
    options = options_of(CONFIGS, CONFIGS_FP32, "matrix", x.x.dtype)
    # The columns of a step divide every prefix's end.
    first, last = bands.whole
    options["BK"] = next(k for k in (64, 32, 16) if k <= options["BK"] and last % k == 0)
    _matrix_kernel[(out.shape[0] // options["BM"], out.shape[1] // options["BN"])](
        x.x, y.x, x.u, y.u, x.counts, y.counts, ceiling, out, row, x.x.shape[1], out.shape[1],
        FROM=first, UNTIL=last, DP=bands.width, M=len(bands.starts), MODE=mode, **options,
    )  # fmt: skip


def chunks(rows: int, row_bytes: int, workspace: int) -> list[slice]:
    """Return rows to process together, multiples of ROWS: row_bytes of each fit the workspace."""
    size = rows if not row_bytes else max(ROWS, workspace // row_bytes // ROWS * ROWS)
    if size > TILE:  # A chunk of full tiles compiles no kernel of smaller ones.
        size -= size % TILE
    return [slice(r, min(r + size, rows)) for r in range(0, rows, size)]


def groups(E: int, exit_bytes: int, workspace: int) -> list[slice]:
    """Return exits to process together: all that fit the workspace, at least one."""
    together = max(1, min(E, workspace // exit_bytes))
    return [slice(e, min(e + together, E)) for e in range(0, E, together)]
