"""AdamW (arXiv 1711.05101) for bf16 weights without fp32 masters, rounded stochastically.

    g = grad / grad_scale
    m = m + (1 - beta1) (g - m),    v = beta2 v + (1 - beta2) g^2
    w = (1 - lr decay) w - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

in fp32; the new w is rounded to one of its two neighbours in bf16, drawn so that the expectation is
w. A bf16 step is at least 2^-8 of a weight, and rounding to nearest would lose every update below
half of that.

Random bits are a function of seed, parameter, step and element alone, so replicas stay equal, a
resumed run repeats them, and no launch layout changes them: Philox 4x32-10 (Salmon et al., SC 2011)
with the seed as key and the counter (i // 8, number, t, 0) gives four words, of which the halves,
lower ones first, are the 16 bits of the eight elements i // 8 * 8 and following.

Bytes a weight: 22, of which weight and gradient 2 + 2, moments 8, written 2 + 8.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import check_impl, reference_of, use_triton

CHUNK = 2**24  # Elements that the reference updates at once, a multiple of 8.
WORD = 0xFFFF_FFFF
ROUND, KEY = (0xD251_1F53, 0xCD9E_8D57), (0x9E37_79B9, 0xBB67_AE85)  # Philox's constants.


@torch.no_grad()
def stochastic_adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int,
    numbers: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Step bf16 weights in place, or change nothing where `found_inf` is 1.

    "triton" reads `steps`, `grad_scale` and `found_inf` on the device and waits for none of them;
    "reference" waits for `found_inf`.

    Args:
        weights: bf16, contiguous. grads: floating, of the weights' shapes. exp_avgs, exp_avg_sqs:
            fp32, contiguous, of the weights' shapes.
        steps: fp32 scalars, how many steps each weight has taken: the call adds 1.
        seed: 0 to 2^63 - 1. numbers: 0 to 2^31 - 1, one a weight, which draws its own bits.
        grad_scale, found_inf: fp32 scalars on the weights' device, by default 1 and 0.
        impl: "triton", "reference", or "auto": triton on CUDA.

    Raises:
        ValueError: lists of other lengths, dtypes and layouts, an `impl` that cannot run.
    """
    check_impl(impl)
    _check(weights, grads, exp_avgs, exp_avg_sqs, steps, numbers)
    if not weights:
        return
    one = torch.ones((), device=weights[0].device)
    scale = one if grad_scale is None else grad_scale
    taken = one if found_inf is None else 1 - found_inf
    torch._foreach_add_(list(steps), [taken] * len(steps))
    t = torch.stack(list(steps)).double()
    rates, roots = lr / (1 - betas[0] ** t), (1 - betas[1] ** t).sqrt()
    # One fp32 row for each weight.
    scalars = torch.stack(
        [rates, roots, t, (1 / scale).double().expand_as(t), taken.double().expand_as(t)], 1
    ).float()
    options: dict[str, Any] = {
        "decay": 1 - lr * weight_decay,
        "betas": betas,
        "eps": eps,
        "seed": seed,
    }
    lists = zip(weights, grads, exp_avgs, exp_avg_sqs, scalars, numbers, strict=True)
    if use_triton(impl, weights[0], dots=False):
        from . import _op  # imports triton, which not every platform has

        for weight, grad, exp_avg, exp_avg_sq, row, number in lists:
            _op.update(weight, grad, exp_avg, exp_avg_sq, row, number, **options)
    elif taken:
        for weight, grad, exp_avg, exp_avg_sq, row, number in lists:
            w, g, m, v = weight.view(-1), grad.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)
            for i in range(0, len(w), CHUNK):
                some = slice(i, i + CHUNK)
                _update(w[some], g[some], m[some], v[some], row, number, first=i, **options)


stochastic_adamw_ref = reference_of(stochastic_adamw)


def _check(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    lists = weights, grads, exp_avgs, exp_avg_sqs, steps, numbers
    if len({len(one) for one in lists}) > 1:
        raise ValueError(f"weights: expected lists of one length, got {[len(x) for x in lists]}")
    for weight, grad, *moments in zip(weights, grads, exp_avgs, exp_avg_sqs, strict=True):
        if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
            raise ValueError(f"weights: expected contiguous bf16, got {weight.dtype}")
        if grad.shape != weight.shape or not grad.is_floating_point():
            raise ValueError(f"grads: expected {list(weight.shape)}, got {list(grad.shape)}")
        for moment in moments:
            fits = moment.shape == weight.shape and moment.is_contiguous()
            if moment.dtype != torch.float32 or not fits:
                raise ValueError(
                    f"moments: expected contiguous fp32 {list(weight.shape)}, got {moment.dtype} "
                    f"{list(moment.shape)} (load_state_dict casts them)"
                )


def _update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row: Tensor,
    number: int,
    *,
    first: int,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
) -> None:
    """Step elements first, first + 1, .. [n] of a weight; the kernel computes in the same order."""
    rate, root, t, factor, _ = row
    bits = random_bits(seed, number, t, first, len(weight))
    grad = grad.float() * factor
    exp_avg.add_((grad - exp_avg).mul_(1 - betas[0]))
    exp_avg_sq.mul_(betas[1]).add_(grad.mul_(grad).mul_(1 - betas[1]))
    # Rounding needs this memory.
    del grad
    denominator = exp_avg_sq.sqrt().div_(root).add_(eps)
    change = torch.div(exp_avg, denominator, out=denominator).mul_(rate)
    wide = weight.float().mul_(decay).sub_(change)
    del change, denominator
    weight.copy_(rounded(wide, bits))


def random_bits(seed: int, number: int, t: Tensor, first: int, n: int) -> Tensor:
    """Return the 16 random bits of elements first..first + n - 1, int32 [n]; 8 divides `first`."""
    groups = torch.arange(first // 8, -(-(first + n) // 8), device=t.device)
    words = philox((groups, number, t.long(), 0), seed)
    bits = torch.empty(len(groups), 8, dtype=torch.int32, device=t.device)
    for i, word in enumerate(words):
        bits[:, 2 * i], bits[:, 2 * i + 1] = word & 0xFFFF, word >> 16
    return bits.view(-1)[:n]


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: int
) -> tuple[Tensor | int, ...]:
    """Return the four words of Philox 4x32-10 for counters and a key, as int64 in 0..2^32 - 1."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        high0, low0 = _product(c0, ROUND[0])
        high2, low2 = _product(c2, ROUND[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEY[0] & WORD, k1 + KEY[1] & WORD
    return c0, c1, c2, c3


def _product(word: Tensor | int, constant: int) -> tuple[Tensor | int, Tensor | int]:
    """Return the upper and lower 32 bits of a product, none of whose parts exceeds 63 bits."""
    low, high = (word & 0xFFFF) * constant, (word >> 16) * constant
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to one of the two neighbouring bf16, by 16 random bits of each element (int32).

    A bf16 is the upper half of an fp32. Adding 16 random bits to the lower half carries into the
    upper half with probability (lower half) / 2^16, the position of x between its neighbours, for
    both signs and for subnormals. Beyond the largest finite bf16, infinities and NaN included, it
    rounds to nearest. `bits` is overwritten.
    """
    drawn = bits.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)
    # The comparison is false for NaN.
    inside = x.abs() <= torch.finfo(torch.bfloat16).max
    return torch.where(inside, drawn, x).bfloat16()
