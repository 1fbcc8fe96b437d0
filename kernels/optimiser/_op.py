"""The stochastic AdamW in Triton: one launch a weight, one pass over its memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Unrun: compiled for sm_90a without stack. 8 elements a thread are 16 bytes of bf16.
OPTIONS = {"BLOCK": 1024, "num_warps": 4}
MOST = tl.constexpr(torch.finfo(torch.bfloat16).max)


# Only whether rows are whole vectors of 16 bytes is compiled in.
@triton.jit(do_not_specialize=["number", "seed"], do_not_specialize_on_alignment=["ROW"])
def _adamw_kernel(
    W, G, M, V, ROW, n, number, seed, decay, gain1, beta2, gain2, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Step W [n] by adamw.py's formula. ROW: rate, root, t, factor, and 1 to step or 0 not to."""
    if tl.load(ROW + 4) != 0:
        rate, root, factor = tl.load(ROW), tl.load(ROW + 1), tl.load(ROW + 3)
        t = tl.load(ROW + 2).to(tl.int32)
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        at = begin + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(M + at, mask=inside, other=0.0)
        v = tl.load(V + at, mask=inside, other=0.0)
        w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
        m = m + (g - m) * gain1
        v = v * beta2 + g * g * gain2
        tl.store(M + at, m, mask=inside)
        tl.store(V + at, v, mask=inside)
        w = w * decay - m / (tl.sqrt(v) / root + eps) * rate
        group = (begin // 8).to(tl.int32) + tl.arange(0, BLOCK // 8)
        word0, word1, word2, word3 = tl.philox(seed, group, number, t, 0)
        words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
        bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK])
        drawn = (w.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
        # The comparison is false for NaN.
        w = tl.where(tl.abs(w) <= MOST, drawn.to(tl.float32, bitcast=True), w)
        tl.store(W + at, w.to(tl.bfloat16), mask=inside)


def update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row: Tensor,
    number: int,
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
) -> None:
    n = weight.numel()
    if not n:
        return
    with torch.cuda.device_of(weight):  # Triton launches on the current device.
        _adamw_kernel[(triton.cdiv(n, OPTIONS["BLOCK"]),)](
            weight, grad.contiguous(), exp_avg, exp_avg_sq, row, n, number, seed,
            decay, 1 - betas[0], betas[1], 1 - betas[1], eps, **OPTIONS,
        )  # fmt: skip
