"""Forward kernels of packed attention: one for tiles of short sequences, one for longer ones.

A tile's rows are tokens of one query head, or of two heads of a group side by side, which read keys
and values once.

    packed   a tile of up to 64 tokens holds all that its tokens attend to: one product, a plain
             softmax under a block-diagonal mask, one product
    long     a tile of one sequence runs over the keys before it (all, if not causal), the block
             that needs a mask first, with the running maximum and sum of online softmax. It stores
             the logarithm of the sum, in base 2, for the backward

Sequences of up to 512 tokens ("middle") have the long kernel with tiles of 64 rows and four warps:
half of a program's life is its begin and its end, which a second program on the multiprocessor
hides. A sequence's own length decides, so that its result does not depend on the batch.

Scores are in base 2: exp(scale s) = exp2(scale log2(e) s). Probabilities are rounded to the inputs'
dtype before the division by their sum, which is in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import INTERPRETED, Configs, options_of
from .plan import AttentionPlan

LOG2E = 1.4426950408889634
# Launch options by kernel and width of a head (32 counts as 64, 96 as 128); "pair" for even groups.
# ROWS of a tile are tokens of one head, or half as many of two heads where groups are even. In fp32
# each product is three, and registers suffice for few tokens. All are unrun: compiled for sm_90a
# (triton 3.7.1), those of bf16 and fp16 without spills. A throw-away kernel of this kind ran on an
# H200 (2026-11-20): 64 rows and 4 warps were its best on short and middling sequences.
CONFIGS: Configs = {
    "packed_forward_pair_64": {"TOKENS": 64, "HEADS": 2, "num_warps": 8, "num_stages": 1},
    "packed_forward_pair_128": {
        "TOKENS": 64, "HEADS": 2, "num_warps": 8, "num_stages": 1, "maxnreg": 128,
    },
    "packed_forward_64": {"TOKENS": 64, "HEADS": 1, "num_warps": 4, "num_stages": 1},
    "packed_forward_128": {"TOKENS": 64, "HEADS": 1, "num_warps": 4, "num_stages": 1},
    "long_forward_64": {"ROWS": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "long_forward_128": {"ROWS": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "middle_forward_64": {"ROWS": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "middle_forward_128": {"ROWS": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
}  # fmt: skip
CONFIGS_FP32: Configs = {
    "packed_forward_pair_64": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "packed_forward_pair_128": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "packed_forward_64": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "packed_forward_128": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "long_forward_64": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 2},
    "long_forward_128": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 2},
    "middle_forward_64": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 2},
    "middle_forward_128": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 2},
}


def config(name: str, q: Tensor, group: int) -> dict[str, Any]:
    return tiled(CONFIGS, CONFIGS_FP32, name, q, group)


def tiled(half: Configs, fp32: Configs, name: str, q: Tensor, group: int) -> dict[str, Any]:
    """Return launch options for these heads; ROWS become TOKENS of HEADS side by side."""
    K = q.shape[-1]
    # The interpreter does not run out of registers: there fp32 takes half precision's tiles.
    wide = half if INTERPRETED else fp32
    options = options_of(half, wide, f"{name}_{64 if K <= 64 else 128}", q.dtype)
    options |= {"K": K, "KP": triton.next_power_of_2(K)}
    if options["KP"] > K:  # Masks of columns need registers too.
        options.pop("maxnreg", None)
    if "ROWS" in options:
        rows = options.pop("ROWS")
        heads = 2 if rows == 128 and group % 2 == 0 else 1
        options |= {"TOKENS": rows // heads, "HEADS": heads}
    assert group % options.get("HEADS", 1) == 0, f"{name}: {group} heads a group, {options}"
    return options


@triton.jit
def _rows(X, row, step: tl.constexpr, column, at, ok, K: tl.constexpr, KP: tl.constexpr):
    """Load [.., KP] of X, from `column` of the tile's first `row`, at offsets `at` of each line."""
    d = tl.arange(0, KP)
    mask = ok[:, None]
    if K < KP:
        mask = mask & (d < K)[None, :]
    tile = X + tl.cast(row, tl.int64) * step + column
    return tl.load(tile + (at[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_rows(X, x, row, step: tl.constexpr, column, at, ok, K: tl.constexpr, KP: tl.constexpr):
    d = tl.arange(0, KP)
    mask = ok[:, None]
    if K < KP:
        mask = mask & (d < K)[None, :]
    tile = X + tl.cast(row, tl.int64) * step + column
    tl.store(tile + (at[:, None] + d[None, :]), x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _span(BEGIN, END, first, row, ok, CAUSAL: tl.constexpr):
    """Return where in the tile what each row sees begins and ends; rows outside see nothing."""
    begin = tl.load(BEGIN + first + row, mask=ok, other=1 << 20) - first
    end = row + 1 if CAUSAL else tl.load(END + first + row, mask=ok, other=0) - first
    return begin, end


@triton.jit
def _visible(begin, end, col):
    """Return bool [rows, columns]."""
    return (col[None, :] >= begin[:, None]) & (col[None, :] < end[:, None])


@triton.jit
def _softmax(s, visible, ok):
    """Return exp2(s - maximum), 0 where not visible, and the inverse of each row's sum.

    A row of the tile whose scores are all -inf has a sum of 0, and weights of 0 x inf = NaN.
    """
    z = tl.where(visible, s, float("-inf"))
    m = tl.maximum(tl.max(z, 1), -1e30)
    p = tl.exp2(z - m[:, None])
    return p, 1.0 / tl.where(ok, tl.sum(p, 1), 1.0)


@triton.jit
def _alive(ALIVE, first, token, ok):
    return ok & (tl.load(ALIVE + first + token, mask=ok, other=0) != 0)


@triton.jit
def _finite(x):
    """Return x with 0 for NaN and infinities, and for each row 0, or NaN if it held one.

    Between sequences probabilities are 0, but 0 x NaN is NaN: a NaN of one sequence of the tile
    must not reach the others. Adding the second part to the scores keeps it in its sequence.
    """
    zero = x.to(tl.float32) * 0.0
    return tl.where(zero == 0.0, x, 0.0).to(x.dtype), tl.sum(zero, 1)


@triton.jit
def _packed_forward_kernel(
    Q, KEYS, V, O, BEGIN, END, ALIVE, PACKS, scale,
    Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    SKIP: tl.constexpr, CAUSAL: tl.constexpr, HQ: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, head = pid // (HQ // HEADS), pid % (HQ // HEADS) * HEADS
    first, n = tl.load(PACKS + 2 * tile), tl.load(PACKS + 2 * tile + 1)
    r = tl.arange(0, TOKENS * HEADS)
    row, col = r // HEADS, tl.arange(0, TOKENS)
    row_in, col_in = row < n, col < n
    # Behind the product's barrier the tile would wait for memory once more.
    begin, end = _span(BEGIN, END, first, row, row_in, CAUSAL)
    row_ok, col_ok = row_in, col_in
    if SKIP:  # Sequences that take no part are read as zeros, so that their output is zero.
        row_ok, col_ok = _alive(ALIVE, first, row, row_in), _alive(ALIVE, first, col, col_in)
    q = _rows(Q, first, Q_STEP, head * K, row * Q_STEP + r % HEADS * K, row_ok, K, KP)
    k = _rows(KEYS, first, K_STEP, head // GROUP * K, col * K_STEP, col_ok, K, KP)
    v = _rows(V, first, V_STEP, head // GROUP * K, col * V_STEP, col_ok, K, KP)
    v, v_bad = _finite(v)
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale + v_bad[None, :]
    p, inverse = _softmax(s, _visible(begin, end, col), row_in)
    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * inverse[:, None]
    at = row * (HQ * K) + r % HEADS * K
    _store_rows(O, o, first, HQ * K, head * K, at, row_in, K, KP)


@triton.jit
def _sees(row, col, n, CAUSAL: tl.constexpr):
    """Return which of a sequence's n columns each row sees, bool [rows or 1, columns]."""
    return col[None, :] <= row[:, None] if CAUSAL else (col < n)[None, :]


@triton.jit
def _attend(
    acc, m, total, q, KEYS, V, row, j, n, read, scale, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Continue online softmax over BN keys from j, or begin it if `m` is None.

    `row` are the queries' positions in a sequence of n keys, of which the first `read` are read.
    """
    c = tl.arange(0, BN)
    ok = j + c < read if MASKED else c < BN
    k = _rows(KEYS, j, K_STEP, 0, c * K_STEP, ok, K, KP)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if MASKED:
        s = tl.where(_sees(row, j + c, n, CAUSAL), s, float("-inf"))
    top = tl.max(s, 1) * scale
    if m is not None:
        top = tl.maximum(m, top)
    p = tl.exp2(s * scale - top[:, None])
    v = _rows(V, j, V_STEP, 0, c * V_STEP, ok, K, KP)
    if m is None:
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    else:
        fade = tl.exp2(m - top)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, top, total


# The tiles of one kind begin anywhere in the list of all.
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["TILES"])
def _long_forward_kernel(
    Q, KEYS, V, O, LSE, ALIVE, TILES, scale, T,
    Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    SKIP: tl.constexpr, CAUSAL: tl.constexpr, HQ: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, head = pid // (HQ // HEADS), pid % (HQ // HEADS) * HEADS
    first, begin = tl.load(TILES + 3 * tile), tl.load(TILES + 3 * tile + 1)
    n = tl.load(TILES + 3 * tile + 2) - begin
    r = tl.arange(0, TOKENS * HEADS)
    token = r // HEADS
    row = first - begin + token
    ok = row < n
    # Blocks before `free` need no mask. The others are computed first, outside of the loop, which
    # then takes its accumulator from no other pipeline: ptxas would wait for each of its products.
    free = (first - begin if CAUSAL else n - 1) // BN * BN
    until, read = free, n
    if SKIP:
        alive = tl.load(ALIVE + begin) != 0
        until, read = tl.where(alive, free, 0), tl.where(alive, n, 0)
    q = _rows(Q, first, Q_STEP, head * K, token * Q_STEP + r % HEADS * K, row < read, K, KP)
    keys = KEYS + begin.to(tl.int64) * K_STEP + head // GROUP * K
    values = V + begin.to(tl.int64) * V_STEP + head // GROUP * K
    acc, m, total = _attend(
        None, None, None, q, keys, values, row, free, n, read, scale, K_STEP, V_STEP,
        True, CAUSAL, BN, K, KP, PRECISION,
    )  # fmt: skip
    for block in tl.static_range(1, TOKENS // BN if CAUSAL else 1):
        acc, m, total = _attend(
            acc, m, total, q, keys, values, row, free + block * BN, n, read, scale, K_STEP, V_STEP,
            True, CAUSAL, BN, K, KP, PRECISION,
        )  # fmt: skip
    for j in tl.range(0, until, BN):
        acc, m, total = _attend(
            acc, m, total, q, keys, values, row, j, n, read, scale, K_STEP, V_STEP,
            False, CAUSAL, BN, K, KP, PRECISION,
        )  # fmt: skip
    o = acc * (1.0 / total)[:, None]
    at = token * (HQ * K) + r % HEADS * K
    _store_rows(O, o, first, HQ * K, head * K, at, ok, K, KP)
    lse = LSE + (head + r % HEADS).to(tl.int64) * T + first + token
    tl.store(lse, m + tl.log2(total), mask=ok)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    alive_T: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Return o [T, Hq, K], and base 2 LSEs, fp32 [Hq, T], of longer sequences' rows."""
    T, HQ, K = q.shape
    group = HQ // k.shape[1]
    o = torch.empty(T, HQ, K, dtype=q.dtype, device=q.device)
    lse = torch.empty(HQ, T, dtype=torch.float32, device=q.device)
    steps = q.stride(0), k.stride(0), v.stride(0)
    alive = plan.begin_T if alive_T is None else alive_T
    same: dict[str, Any] = {"SKIP": alive_T is not None, "CAUSAL": causal, "HQ": HQ, "GROUP": group}
    options = config("packed_forward" + "_pair" * (group % 2 == 0), q, group)
    packs = plan.packs(options["TOKENS"])
    if len(packs):
        _packed_forward_kernel[(len(packs) * (HQ // options["HEADS"]),)](
            q,
            k,
            v,
            o,
            plan.begin_T,
            plan.end_T,
            alive,
            packs,
            scale * LOG2E,
            *steps,
            **same,
            **options,
        )
    short = options["TOKENS"]
    for kernel, long in (("long_forward", True), ("middle_forward", False)):
        if not len(plan.tiles(short, long)):
            continue
        options = config(kernel, q, group)
        tiles = plan.tiles(options["TOKENS"], long)
        _long_forward_kernel[(len(tiles) * (HQ // options["HEADS"]),)](
            q, k, v, o, lse, alive, tiles, scale * LOG2E, T, *steps, **same, **options
        )
    return o, lse
