"""Backward kernels of packed attention, which compute again what would cost more to read.

With p = softmax, dp = do v', delta = sum_s p dp (= o . do): ds = p (dp - delta),

    dv = p' do,   dk = scale ds' q,   dq = scale ds k

    packed    whole short sequences in one program: five products from the forward's inputs alone;
              heads of a group add up in registers
    queries   tiles of longer sequences: delta, stored for the other kernel, and dq over the keys
    keys      tiles of keys: dk and dv over the queries of all heads of the group

Longer sequences cost seven products instead of the five of one kernel that adds dq with atomics,
and get the same bits every time. p is 2^(scale s - lse); ds is rounded to the inputs' dtype for the
products.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Configs
from ._forward import (
    LOG2E,
    _alive,
    _finite,
    _rows,
    _sees,
    _softmax,
    _span,
    _store_rows,
    _visible,
    tiled,
)
from .plan import AttentionPlan

# As in _forward.py. "pair": groups of two heads. "keys": TOKENS of its tile, BM queries of one head
# at a time.
CONFIGS: Configs = {
    "packed_backward_pair_64": {"TOKENS": 64, "HEADS": 2, "num_warps": 8, "num_stages": 1},
    "packed_backward_pair_128": {
        "TOKENS": 64, "HEADS": 2, "num_warps": 8, "num_stages": 1, "maxnreg": 128,
    },
    "packed_backward_64": {"TOKENS": 64, "HEADS": 1, "num_warps": 4, "num_stages": 1},
    "packed_backward_128": {"TOKENS": 64, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "queries_backward_64": {"ROWS": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
    "queries_backward_128": {"ROWS": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
    "middle_queries_backward_64": {"ROWS": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "middle_queries_backward_128": {"ROWS": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "keys_backward_64": {"TOKENS": 128, "BM": 64, "num_warps": 8, "num_stages": 2},
    "keys_backward_128": {"TOKENS": 128, "BM": 64, "num_warps": 8, "num_stages": 2},
}  # fmt: skip
CONFIGS_FP32: Configs = {
    "packed_backward_pair_64": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "packed_backward_pair_128": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "packed_backward_64": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "packed_backward_128": {"TOKENS": 16, "HEADS": 1, "num_warps": 8, "num_stages": 1},
    "queries_backward_64": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 1},
    "queries_backward_128": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 1},
    "middle_queries_backward_64": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 1},
    "middle_queries_backward_128": {"ROWS": 16, "BN": 32, "num_warps": 8, "num_stages": 1},
    "keys_backward_64": {"TOKENS": 16, "BM": 32, "num_warps": 8, "num_stages": 1},
    "keys_backward_128": {"TOKENS": 16, "BM": 32, "num_warps": 8, "num_stages": 1},
}


def config(name: str, q: Tensor, group: int) -> dict[str, Any]:
    return tiled(CONFIGS, CONFIGS_FP32, name, q, group)


@triton.jit
def _pack_backward(
    DO, Q, KEYS, V, DQ, DK, DV, BEGIN, END, ALIVE, first, lo, hi, kv_head, scale, base, group,
    DO_STEP: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    SKIP: tl.constexpr, CAUSAL: tl.constexpr, HQ: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store gradients of the tile's tokens lo..hi, whole sequences.

    Return NaN if some row's sum of p dp is NaN: a NaN or an infinity of q or k is in its weights,
    and one of v or do in dp, which weights of 0 do not hide.
    """
    r = tl.arange(0, TOKENS * HEADS)
    row, col = r // HEADS, tl.arange(0, TOKENS)
    row_in, col_in = (row >= lo) & (row < hi), (col >= lo) & (col < hi)
    row_ok, col_ok = row_in, col_in
    if SKIP:
        row_ok, col_ok = _alive(ALIVE, first, row, row_in), _alive(ALIVE, first, col, col_in)
    k, k_bad = _finite(_rows(KEYS, first, K_STEP, kv_head * K, col * K_STEP, col_ok, K, KP))
    v = _rows(V, first, V_STEP, kv_head * K, col * V_STEP, col_ok, K, KP)
    k_at, step = col * (HQ // GROUP * K), HQ // GROUP * K
    dk, dv = tl.zeros([TOKENS, KP], tl.float32), tl.zeros([TOKENS, KP], tl.float32)
    check = tl.zeros([TOKENS * HEADS], tl.float32)
    # A single step is not a loop, and stores each gradient as soon as it is computed, which takes
    # half of the registers. `group` is not constant, so that longer loops are not unrolled.
    for g in tl.range(0, GROUP if GROUP == HEADS else group, HEADS):
        begin, end = _span(BEGIN, END, first, row, row_in, CAUSAL)
        column, at = (kv_head * GROUP + g) * K, r % HEADS * K
        q = _rows(Q, first, Q_STEP, column, row * Q_STEP + at, row_ok, K, KP)
        do = _rows(DO, first, DO_STEP, column, row * DO_STEP + at, row_ok, K, KP)
        s = tl.dot(q, k.T, input_precision=PRECISION) * base + k_bad[None, :]
        p, inverse = _softmax(s, _visible(begin, end, col), row_in)
        p *= inverse[:, None]
        dv = tl.dot(p.to(do.dtype).T, do, dv, input_precision=PRECISION)
        if GROUP == HEADS:
            _store_rows(DV, dv, first, step, kv_head * K, k_at, col_in, K, KP)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        delta = tl.sum(p * dp, 1)
        check += delta
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(ds.T, q, dk, input_precision=PRECISION)
        if GROUP == HEADS:
            _store_rows(DK, dk * scale, first, step, kv_head * K, k_at, col_in, K, KP)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        _store_rows(DQ, dq, first, HQ * K, column, row * (HQ * K) + at, row_in, K, KP)
    if GROUP > HEADS:
        _store_rows(DK, dk * scale, first, step, kv_head * K, k_at, col_in, K, KP)
        _store_rows(DV, dv, first, step, kv_head * K, k_at, col_in, K, KP)
    return tl.sum(check)


@triton.jit
def _packed_backward_kernel(
    DO, Q, KEYS, V, DQ, DK, DV, BEGIN, END, ALIVE, PACKS, CHECK, scale, base, group,
    DO_STEP: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    SKIP: tl.constexpr, CAUSAL: tl.constexpr, HQ: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, kv_head = pid // (HQ // GROUP), pid % (HQ // GROUP)
    first, n = tl.load(PACKS + 2 * tile), tl.load(PACKS + 2 * tile + 1)
    check = _pack_backward(
        DO, Q, KEYS, V, DQ, DK, DV, BEGIN, END, ALIVE, first, 0, n, kv_head, scale, base, group,
        DO_STEP, Q_STEP, K_STEP, V_STEP, SKIP, CAUSAL, HQ, GROUP, TOKENS, HEADS, K, KP, PRECISION,
    )  # fmt: skip
    tl.store(CHECK + pid, check)


@triton.jit(do_not_specialize=["checks"])
def _apart_backward_kernel(
    DO, Q, KEYS, V, DQ, DK, DV, BEGIN, END, ALIVE, PACKS, CHECK, scale, base, group, checks,
    DO_STEP: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    SKIP: tl.constexpr, CAUSAL: tl.constexpr, HQ: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute tiles with a NaN again, sequence by sequence.

    0 x NaN is NaN, and a NaN of one sequence must not reach the others. As a rule there are none,
    and this returns at once. The tile and warps of the kernel before give the same bits for the
    other sequences.
    """
    start = tl.program_id(0) * 64
    some = start + tl.arange(0, 64)
    checked = tl.load(CHECK + some, mask=some < checks, other=0.0)
    if tl.max((checked != checked).to(tl.int32)) == 0:
        return
    for pid in range(start, tl.minimum(start + 64, checks)):
        check = tl.load(CHECK + pid)
        if check != check:
            tile, kv_head = pid // (HQ // GROUP), pid % (HQ // GROUP)
            first, n = tl.load(PACKS + 2 * tile), tl.load(PACKS + 2 * tile + 1)
            lo = n * 0
            while lo < n:
                hi = tl.load(END + first + lo) - first
                _pack_backward(
                    DO, Q, KEYS, V, DQ, DK, DV, BEGIN, END, ALIVE, first, lo, hi, kv_head,
                    scale, base, group, DO_STEP, Q_STEP, K_STEP, V_STEP,
                    SKIP, CAUSAL, HQ, GROUP, TOKENS, HEADS, K, KP, PRECISION,
                )  # fmt: skip
                lo = hi


@triton.jit
def _dq(
    dq, q, do, lse, delta, KEYS, V, row, j, n, read, base,
    K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dq + ds k over BN keys from j; arguments as of `_attend`."""
    c = tl.arange(0, BN)
    ok = j + c < read if MASKED else c < BN
    k = _rows(KEYS, j, K_STEP, 0, c * K_STEP, ok, K, KP)
    v = _rows(V, j, V_STEP, 0, c * V_STEP, ok, K, KP)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    p = tl.exp2(s * base - lse[:, None])
    if MASKED:
        p = tl.where(_sees(row, j + c, n, CAUSAL), p, 0.0)
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["TILES"])
def _queries_backward_kernel(
    DO, Q, KEYS, V, O, LSE, DELTA, DQ, ALIVE, TILES,
    scale, base, T,
    DO_STEP: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
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
    free = (first - begin if CAUSAL else n - 1) // BN * BN
    until, read = free, n
    if SKIP:
        alive = tl.load(ALIVE + begin) != 0
        until, read = tl.where(alive, free, 0), tl.where(alive, n, 0)
    row_read = row < read
    at = token * (HQ * K) + r % HEADS * K
    o = _rows(O, first, HQ * K, head * K, at, row_read, K, KP)
    do = _rows(DO, first, DO_STEP, head * K, token * DO_STEP + r % HEADS * K, row_read, K, KP)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    of_row = (head + r % HEADS).to(tl.int64) * T + first + token
    tl.store(DELTA + of_row, delta, mask=ok)
    lse = tl.load(LSE + of_row, mask=ok, other=float("inf"))
    q = _rows(Q, first, Q_STEP, head * K, token * Q_STEP + r % HEADS * K, row_read, K, KP)
    keys = KEYS + begin.to(tl.int64) * K_STEP + head // GROUP * K
    values = V + begin.to(tl.int64) * V_STEP + head // GROUP * K
    dq = tl.zeros([TOKENS * HEADS, KP], tl.float32)
    for block in tl.static_range(0, max(TOKENS // BN, 1) if CAUSAL else 1):
        dq = _dq(
            dq, q, do, lse, delta, keys, values, row, free + block * BN, n, read, base,
            K_STEP, V_STEP, True, CAUSAL, BN, K, KP, PRECISION,
        )  # fmt: skip
    for j in tl.range(0, until, BN):
        dq = _dq(
            dq, q, do, lse, delta, keys, values, row, j, n, read, base,
            K_STEP, V_STEP, False, CAUSAL, BN, K, KP, PRECISION,
        )  # fmt: skip
    _store_rows(DQ, dq * scale, first, HQ * K, head * K, at, ok, K, KP)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["TILES"])
def _keys_backward_kernel(
    DO, Q, KEYS, V, LSE, DELTA, DK, DV, ALIVE, TILES,
    scale, base, T,
    DO_STEP: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    SKIP: tl.constexpr, CAUSAL: tl.constexpr, HQ: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, BM: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv; scores [keys, queries] are transposed, to multiply from registers."""
    pid = tl.program_id(0)
    tile, kv_head = pid // (HQ // GROUP), pid % (HQ // GROUP)
    first, begin = tl.load(TILES + 3 * tile), tl.load(TILES + 3 * tile + 1)
    n = tl.load(TILES + 3 * tile + 2) - begin
    first -= begin
    if CAUSAL:  # The list begins with a sequence's end, but the first keys have most to do.
        first = (n - 1) // TOKENS * TOKENS - first
    start = first // BM * BM if CAUSAL else 0
    blocks = (n - start + BM - 1) // BM  # of the queries of one head
    read = n
    if SKIP:
        read = tl.where(tl.load(ALIVE + begin) != 0, n, 0)
        blocks = tl.where(read == n, blocks, 0)
    c, i = tl.arange(0, TOKENS), tl.arange(0, BM)
    col = first + c
    k = _rows(KEYS, begin + first, K_STEP, kv_head * K, c * K_STEP, col < read, K, KP)
    v = _rows(V, begin + first, V_STEP, kv_head * K, c * V_STEP, col < read, K, KP)
    dk, dv = tl.zeros([TOKENS, KP], tl.float32), tl.zeros([TOKENS, KP], tl.float32)
    queries = Q + begin.to(tl.int64) * Q_STEP + kv_head * GROUP * K
    outs = DO + begin.to(tl.int64) * DO_STEP + kv_head * GROUP * K
    of_head = (kv_head * GROUP).to(tl.int64) * T + begin
    for block in tl.range(0, blocks * GROUP):
        h, j = block // blocks, start + block % blocks * BM
        ok = j + i < n
        of_block = of_head + tl.cast(h, tl.int64) * T + j + i
        q = _rows(queries, j, Q_STEP, h * K, i * Q_STEP, ok, K, KP)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        p = tl.exp2(s * base - tl.load(LSE + of_block, mask=ok, other=float("inf"))[None, :])
        if CAUSAL:
            p = tl.where(col[:, None] <= (j + i)[None, :], p, 0.0)
        do = _rows(outs, j, DO_STEP, h * K, i * DO_STEP, ok, K, KP)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = (p * (dp - tl.load(DELTA + of_block, mask=ok, other=0.0)[None, :])).to(q.dtype)
        # Both products last: both are under way together, and fewer registers are live before.
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    at, step = c * (HQ // GROUP * K), HQ // GROUP * K
    _store_rows(DK, dk * scale, begin + first, step, kv_head * K, at, col < n, K, KP)
    _store_rows(DV, dv, begin + first, step, kv_head * K, at, col < n, K, KP)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    alive_T: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of the shapes of q, k, v."""
    T, HQ, _ = q.shape
    HKV = k.shape[1]
    group = HQ // HKV
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    steps = do.stride(0), q.stride(0), k.stride(0), v.stride(0)
    alive = plan.begin_T if alive_T is None else alive_T
    same: dict[str, Any] = {"SKIP": alive_T is not None, "CAUSAL": causal, "HQ": HQ, "GROUP": group}
    factors = scale, scale * LOG2E
    options = config("packed_backward" + "_pair" * (group == 2), q, group)
    short = options["TOKENS"]
    packs = plan.packs(short)
    if len(packs):
        check = torch.empty(len(packs) * HKV, dtype=torch.float32, device=q.device)
        args = (
            do,
            q,
            k,
            v,
            dq,
            dk,
            dv,
            plan.begin_T,
            plan.end_T,
            alive,
            packs,
            check,
            *factors,
            group,
        )
        _packed_backward_kernel[(len(check),)](*args, *steps, **same, **options)
        options.pop("maxnreg", None)
        _apart_backward_kernel[(triton.cdiv(len(check), 64),)](
            *args, len(check), *steps, **same, **options
        )
    if plan.max_seqlen <= short:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    for kernel, long in (("queries_backward", True), ("middle_queries_backward", False)):
        if not len(plan.tiles(short, long)):
            continue
        options = config(kernel, q, group)
        tiles = plan.tiles(options["TOKENS"], long)
        _queries_backward_kernel[(len(tiles) * (HQ // options["HEADS"]),)](
            do, q, k, v, o, lse, delta, dq, alive, tiles, *factors, T, *steps, **same, **options
        )
    options = config("keys_backward", q, group)
    tiles = plan.tiles(options["TOKENS"])
    _keys_backward_kernel[(len(tiles) * HKV,)](
        do, q, k, v, lse, delta, dk, dv, alive, tiles, *factors, T, *steps, **same, **options
    )
    return dq, dk, dv
