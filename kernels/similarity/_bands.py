"""Bands: raw vectors packed for tiles of nested prefixes, and gradients unpacked.

Band m of the vectors is [d_{m-1}, d_m). The packed copy has two sections, in which a sum over
columns up to a band's end is a prefix's product, and the kernels that read it need no mask:

    narrow   the first bands, while their widths, as powers of two >= 16, add up to 128 columns:
             their exponentials cost more than their products, and one tile holds all of them.
             Zeros pad every band
    wide     all columns, if there are other bands: the narrow bands as one, then the others, each
             padded to a multiple of 64

Rows are padded with zeros to 128 or a multiple of 256, and scaled by a power of two, so that fp16
holds vectors of any length, their short prefixes, and gradients: the first wide prefix, or the last
one if none is wide, gets a length in [2^6, 2^7), but the last one less than 2^15.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_LENGTH = tl.constexpr(1e-12)  # As in cosine.py.
ROWS = 128  # Every buffer's rows are a multiple of it,
TILE = 256  # and of the largest tile's if there are more.
NARROW = 128  # Packed columns of the narrow prefixes, at most.


@dataclass(frozen=True)
class Bands:
    """Places of the bands in the packed copy.

    Band m: raw columns edges[m]:edges[m+1], packed columns starts[m]:+widths[m]; the first `narrow`
    bands are in the narrow section, the others in the wide one, columns wide:width, in which prefix
    narrow + i ends at ends[i], counted from the section's beginning.
    """

    edges: tuple[int, ...]
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    narrow: int
    narrow_width: int
    wide: int
    width: int
    ends: tuple[int, ...]

    @property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """(raw starts, raw ends, packed starts, packed widths) of the copies."""
        copies = list(zip(self.edges, self.edges[1:], self.starts, self.widths, strict=False))
        if self.ends and self.narrow:
            low = self.edges[self.narrow]
            copies.append((0, low, self.wide, _up(low, 64)))
        return tuple(zip(*copies, strict=True))

    @property
    def whole(self) -> tuple[int, int]:
        """Range of packed columns that holds every raw column once."""
        return (self.wide, self.width) if self.ends else (0, self.narrow_width)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


@lru_cache
def bands_of(dims: tuple[int, ...]) -> Bands:
    edges, starts, widths, ends = (0, *dims), [], [], []
    for low, high in zip(edges, dims, strict=False):
        power = max(16, triton.next_power_of_2(high - low))
        if sum(widths) + power > NARROW:
            break
        starts.append(sum(widths))
        widths.append(power)
    narrow, narrow_width = len(widths), sum(widths)
    wide = _up(narrow_width, 64)
    at = wide + _up(edges[narrow], 64)
    for low, high in zip(edges[narrow:], dims[narrow:], strict=False):
        starts.append(at)
        widths.append(_up(high - low, 64))
        at += widths[-1]
        ends.append(at - wide)
    width = at if ends else narrow_width
    places = tuple(starts), tuple(widths), narrow, narrow_width, wide, width, tuple(ends)
    return Bands(edges, *places)


def padded(n: int) -> int:
    """Return how many rows a buffer for n of them has."""
    return ROWS if n <= ROWS else _up(n, TILE)


# Counts and factors of a group of exits are slices, whose addresses may or may not be divisible by
# 16, as may a batch's number of rows. Triton would compile a kernel for each case, but kernels load
# single numbers from there, so that both would do the same.
@triton.jit(do_not_specialize_on_alignment=["COUNTS"])
def _pack_kernel(
    X, PACKED, U, UNIT, COUNTS, RP, stride_e, stride_r, stride_d,
    EDGES: tl.constexpr, FROM: tl.constexpr, UNTIL: tl.constexpr, AT: tl.constexpr,
    WIDTHS: tl.constexpr, DP: tl.constexpr, UNIT_OF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute lengths, then copy raw columns FROM:UNTIL to AT:+WIDTHS.

    X [E, R, D] of any strides, of which the first COUNTS int32 [E] rows are present. PACKED
    [E, RP, DP] = X * UNIT, fp32 [E, RP], a power of two. U fp32 [E, M, RP] is 1 / length of every
    packed prefix.
    """
    e = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    valid = (rows < tl.load(COUNTS + e))[:, None]
    k = tl.arange(0, 64)
    x_rows = X + e * stride_e + rows.to(tl.int64)[:, None] * stride_r
    M: tl.constexpr = len(EDGES) - 1
    squares = tl.zeros([BR], tl.float32)
    lengths = ()
    for m in tl.static_range(M):
        for at in range(EDGES[m], EDGES[m + 1], 64):
            col = (at + k)[None, :]
            x = tl.load(x_rows + col * stride_d, mask=valid & (col < EDGES[m + 1]), other=0.0)
            x = x.to(tl.float32)
            squares += tl.sum(x * x, 1)
        lengths = lengths + (tl.sqrt(squares),)
    # 2^(6 - floor(log2 length)), by its exponent's bits: exact.
    full = lengths[M - 1]
    length = tl.where(lengths[UNIT_OF] > NO_LENGTH, lengths[UNIT_OF], full)
    least = (full.to(tl.int32, bitcast=True) & 0x7F800000) - (8 << 23)
    bits = tl.maximum(length.to(tl.int32, bitcast=True) & 0x7F800000, least)
    bits = 0x7F000000 - (bits - (6 << 23))
    unit = tl.where(full > NO_LENGTH, bits.to(tl.float32, bitcast=True), 1.0)
    tl.store(UNIT + e * RP + rows, unit)
    for m in tl.static_range(M):
        u = tl.where(lengths[m] <= NO_LENGTH, 1.0, 1.0 / lengths[m])
        tl.store(U + (e * M + m) * RP + rows, u / unit)
    for s in tl.static_range(len(AT)):
        for at in range(0, WIDTHS[s], 64):
            col = (FROM[s] + at + k)[None, :]
            x = tl.load(x_rows + col * stride_d, mask=valid & (col < UNTIL[s]), other=0.0)
            x = (x.to(tl.float32) * unit[:, None]).to(PACKED.dtype.element_ty)
            out = PACKED + (e * RP + rows)[:, None] * DP + AT[s]
            tl.store(out + (at + k)[None, :], x, mask=(at + k < WIDTHS[s])[None, :])


@dataclass(frozen=True)
class Packed:
    """Vectors of a group of exits as tiles read them."""

    x: Tensor  # [E, RP, DP]
    u: Tensor  # fp32 [E, M, RP]
    unit: Tensor  # fp32 [E, RP]
    counts: Tensor  # int32 [E]


def pack(x: Tensor, bands: Bands, counts: Tensor) -> Packed:
    """Pack x [E, R, D]: read it twice, the second time from cache, and write it once."""
    E, R, _ = x.shape
    RP, M = padded(R), len(bands.starts)
    packed = torch.empty(E, RP, bands.width, dtype=x.dtype, device=x.device)
    u = torch.empty(E, M, RP, dtype=torch.float32, device=x.device)
    unit = torch.empty(E, RP, dtype=torch.float32, device=x.device)
    start, end, at, width = bands.segments
    _pack_kernel[(RP // 32, E)](
        x, packed, u, unit, counts, RP, *x.stride(),
        EDGES=bands.edges, FROM=start, UNTIL=end, AT=at, WIDTHS=width, DP=bands.width,
        UNIT_OF=bands.narrow if bands.ends else M - 1, BR=32,
        num_warps=4,
    )  # fmt: skip
    return Packed(packed, u, unit, counts)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["NX", "NY", "COS"])
def _positive_kernel(
    X, Y, U, V, POS, NX, NY, COS, RP, SP, R,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute COS [E, M, R] of each row with column POS [RP]; 0 where one is not present."""
    e = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    pos = tl.load(POS + rows)
    valid = (rows < tl.load(NX + e)) & (pos >= 0) & (pos < tl.load(NY + e))
    pos = tl.where(valid, pos, 0)
    k = tl.arange(0, 16)[None, :]
    x_rows = X + (e * RP + rows)[:, None] * DP + k
    y_rows = Y + (e * SP + pos)[:, None] * DP + k
    M: tl.constexpr = len(STARTS)
    dot = tl.zeros([BR], tl.float32)
    for m in tl.static_range(M):
        for at in range(STARTS[m], STARTS[m] + WIDTHS[m], 16):
            x = tl.load(x_rows + at).to(tl.float32)
            y = tl.load(y_rows + at, mask=valid[:, None], other=0.0).to(tl.float32)
            dot += tl.sum(x * y, 1)
        cos = dot * tl.load(U + (e * M + m) * RP + rows) * tl.load(V + (e * M + m) * SP + pos)
        tl.store(COS + (e * M + m) * R + rows, tl.where(valid, cos, 0.0), mask=rows < R)


def positive_cosines(out: Tensor, x: Packed, y: Packed, bands: Bands, positive: Tensor) -> None:
    """Compute out fp32 [E, M, R]; `positive` is int32 [RP], outside the columns there is none."""
    (E, _, RP), SP = x.u.shape, y.u.shape[2]
    _positive_kernel[(RP // 32, E)](
        x.x, y.x, x.u, y.u, positive, x.counts, y.counts, out, RP, SP, out.shape[2],
        STARTS=bands.starts, WIDTHS=bands.widths, DP=bands.width, BR=32, num_warps=4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["R", "N"],
    do_not_specialize_on_alignment=["COUNTS", "FACTOR", "COS", "DCOS", "FIRST", "PARTNER", "PAIR"],
)
def _unpack_kernel(
    GN, GW, X, Y, U, V, ALONG, UNIT, COUNTS, COS, DCOS, FIRST, PARTNER, PAIR, FACTOR, OUT,
    row0, GR, R, RP, SP, N,
    EDGES: tl.constexpr, STARTS: tl.constexpr, DP: tl.constexpr, D: tl.constexpr,
    NARROW: tl.constexpr, WN: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute BK columns of the gradient OUT [E, R, D] of raw vectors, for rows from row0.

    OUT = UNIT (G - sum_m u_m^2 along_m x + sum over partners of dcos (u v y - cos u^2 x)), each
    term of prefix m in its columns only.

    GN fp32 [E, RP, narrow width], GW fp32 [E, GR, wide width]: gradients of the dots of narrow and
    wide prefixes, not projected. X [E, RP, DP] is the side whose gradient this is, Y [E, SP, DP]
    the other. ALONG fp32 [E, M, RP]: the sums over tiles of dL/dcos * cos. G and ALONG are to be
    multiplied by FACTOR fp32 [E].
    COS, DCOS fp32 [E, M, N] of the positive pairs, by query: a row's partners are
    PARTNER[FIRST[row] : FIRST[row + 1]], rows of Y (-1: none), the pairs' queries those of PAIR.
    """
    e = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BR + tl.arange(0, BR)
    rows = row0 + local
    M: tl.constexpr = len(STARTS)
    # Counting blocks tells the band: the same code serves all of them, and is compiled once.
    block = tl.program_id(2)
    band, low, high, start, before = 0, EDGES[0], EDGES[1], STARTS[0], 0
    for b in tl.static_range(1, M):
        before += (EDGES[b] - EDGES[b - 1] + BK - 1) // BK
        band = tl.where(block >= before, b, band)
        low = tl.where(block >= before, EDGES[b] - before * BK, low)
        high = tl.where(block >= before, EDGES[b + 1], high)
        start = tl.where(block >= before, STARTS[b] - before * BK, start)
    k = block * BK + tl.arange(0, BK)
    raw, col = (low + k)[None, :], (start + k)[None, :]
    inside = raw < high
    x = tl.load(X + (e * RP + rows)[:, None] * DP + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.zeros([BR, BK], tl.float32)
    if NARROW > 0:
        g_at = (e * RP + rows)[:, None] * WN + col
        g += tl.load(GN + g_at, mask=inside & (band < NARROW), other=0.0)
    if DP > WIDE:  # The wide section has the narrow bands as one, unpadded.
        g_at = (e * GR + local)[:, None] * (DP - WIDE) + tl.where(band < NARROW, raw, col - WIDE)
        g += tl.load(GW + g_at, mask=inside, other=0.0)
    factor = tl.load(FACTOR + e)
    along = tl.zeros([BR], tl.float32)
    for m in tl.static_range(M):
        at = (e * M + m) * RP + rows
        u = tl.load(U + at, mask=m >= band, other=0.0)
        along += u * u * tl.load(ALONG + at, mask=m >= band, other=0.0)
    g = factor * (g - along[:, None] * x)
    first = tl.load(FIRST + rows) if PAIRS else rows
    last = tl.load(FIRST + rows + 1) if PAIRS else rows
    for n in range(tl.max(last - first) if PAIRS else 0):
        has = first + n < last
        partner = tl.load(PARTNER + first + n, mask=has, other=-1)
        has = has & (partner >= 0)
        # Triton 3.6.0 does not compile tl.where(has, partner, 0) here.
        partner = tl.maximum(partner, 0)
        pair = tl.load(PAIR + first + n, mask=has, other=0)
        y_at = (e * SP + partner)[:, None] * DP + col
        y = tl.load(Y + y_at, mask=inside & has[:, None], other=0.0).to(tl.float32)
        along_x, along_y = tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32)
        for m in tl.static_range(M):
            here = has & (m >= band)
            u = tl.load(U + (e * M + m) * RP + rows, mask=here, other=0.0)
            v = tl.load(V + (e * M + m) * SP + partner, mask=here, other=0.0)
            at_pair = (e * M + m) * N + pair
            d = tl.load(DCOS + at_pair, mask=here, other=0.0)
            along_y += d * u * v
            along_x += d * u * u * tl.load(COS + at_pair, mask=here, other=0.0)
        g += along_y[:, None] * y - along_x[:, None] * x
    valid = rows < tl.load(COUNTS + e)
    g = tl.where(valid[:, None], g * tl.load(UNIT + e * RP + rows)[:, None], 0.0)
    out = OUT + (e * R + rows)[:, None] * D + raw
    tl.store(out, g.to(OUT.dtype.element_ty), mask=inside & (rows < R)[:, None])


@dataclass(frozen=True)
class Pairs:
    """Positive pairs, listed by the rows of one side."""

    cos: Tensor  # fp32 [E, M, N], by query
    dcos: Tensor
    first: Tensor
    partner: Tensor
    pair: Tensor

    @staticmethod
    def of(cos: Tensor, dcos: Tensor, positive: Tensor, SP: int) -> tuple["Pairs", "Pairs"]:
        """Return the pairs by row, and by column: sorted, so that sums have one order."""
        cos, dcos = cos.contiguous(), dcos.contiguous()
        each = torch.arange(len(positive) + 1, dtype=torch.int32, device=positive.device)
        at = positive.masked_fill((positive < 0) | (positive >= SP), SP)
        order = at.argsort(stable=True)
        first = torch.searchsorted(
            at[order], torch.arange(SP + 1, dtype=torch.int32, device=at.device), out_int32=True
        )
        by_row = Pairs(cos, dcos, each, at.masked_fill(at == SP, -1), each)
        return by_row, Pairs(cos, dcos, first, order.int(), order.int())


def unpack(
    out: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Packed,
    y: Packed,
    bands: Bands,
    pairs: Pairs | None,
    row0: int = 0,
) -> None:
    """Write raw vectors' gradients into out [E, R, D], for the rows from row0 that `wide` has.

    gradients: narrow, wide, along and factor, the kernel's GN, GW, ALONG and FACTOR.
    """
    E, R, D = out.shape
    RP, SP = x.x.shape[1], y.x.shape[1]
    narrow, wide, along, factor = gradients
    unused = x.counts
    listed = pairs or Pairs(along, along, unused, unused, unused)
    last = bands.edges[-1]
    if last < D:
        out[:, row0 : row0 + wide.shape[1], last:] = 0
    blocks = sum(triton.cdiv(b - a, 64) for a, b in zip(bands.edges, bands.edges[1:], strict=False))
    _unpack_kernel[(wide.shape[1] // 32, E, blocks)](
        narrow, wide, x.x, y.x, x.u, y.u, along, x.unit, x.counts,
        listed.cos, listed.dcos, listed.first, listed.partner, listed.pair,
        factor, out, row0, wide.shape[1], R, RP, SP, pairs.cos.shape[2] if pairs else 0,
        EDGES=bands.edges, STARTS=bands.starts, DP=bands.width, D=D, NARROW=bands.narrow,
        WN=bands.narrow_width, WIDE=bands.wide if bands.ends else bands.width,
        PAIRS=pairs is not None, BR=32, BK=64, num_warps=8,
    )  # fmt: skip
