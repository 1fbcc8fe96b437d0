"""Packed attention by Triton, in its interpreter where there is no GPU, against float64: values and
gradients never further off than the plain loop in the same dtype and a few roundings.
"""

import random

import pytest
import torch
from attention_truth import (
    DEVICE,
    DTYPES,
    assert_as_exact,
    bounds,
    cotangent,
    inputs,
    on,
    results,
    run,
    same_bits,
    triton,
)
from pairwise import all_pairs
from torch import Tensor

from mlembed_kernels import AttentionPlan, attention, attention_ref

pytest.importorskip("triton", reason="needs triton, which is not installed")
from mlembed_kernels.attention import _forward  # noqa: E402

both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
UNEVEN = [65, 1, 63, 300, 2, 127, 64]


def heads_of(dtype: torch.dtype) -> tuple[int, int]:
    """Heads of one tile."""
    return (1, 1) if dtype == torch.float32 else (2, 1)


def check(
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] | None = None,
    K: int = 16,
    qkv: tuple[Tensor, ...] | None = None,
    cancels: bool = False,
    **options,
) -> dict[str, Tensor]:
    if qkv is None:
        qkv = inputs(lengths, heads or heads_of(dtype), K)
    qkv = on(DEVICE, dtype, qkv)
    got = run(qkv, lengths, **options)
    assert_as_exact(got, qkv, lengths, cancels=cancels, **{"causal": True, **options})
    return got


# One sequence alone: a key to weigh, two; a pack and the two kernels' step at 64 | 65; two tiles,
# short of them, full and over them; tiles that are full and a last one of 44 tokens; the step to
# the tiles of long sequences at 512 | 513.
ALONE = all_pairs([1, 2, 63, 64, 65, 127, 128, 129, 300, 512, 513], [True, False], DTYPES)


@pytest.mark.parametrize(("n", "causal", "dtype"), ALONE)
def test_one_sequence(n, causal, dtype):
    check([n], dtype, causal=causal)


@every_dtype
@both_masks
def test_mixed_lengths(causal, dtype):
    order = UNEVEN if causal else random.Random(1).sample(UNEVEN, len(UNEVEN))
    check(order, dtype, causal=causal)


# Beyond 512 tokens odd groups have tiles of 128 tokens, with two masked blocks: the last tile ends
# in the first of them, in the second, and with it.
@pytest.mark.parametrize("n", [513, 600, 640])
@both_masks
def test_long_tiles_of_odd_groups(n, causal):
    check([n, 3], torch.float16, (3, 1), causal=causal)


# Packs that one token fills or misses; packs around, before and behind long sequences.
PACKS = {
    "full": [32, 31, 1],
    "one_over": [32, 32, 1],
    "ones": [1] * 65,
    "primes": [2, 3, 5, 7, 11, 13, 17, 19],
    "between": [3, 66, 4, 5, 70, 1],
    "long_at_both_ends": [66, 1, 2, 129],
}


@every_dtype
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_packs(lengths, dtype):
    check(lengths, dtype, causal=(dtype == torch.float32) == (len(lengths) % 2 == 0))


@both_masks
def test_three_thousand_tokens_alone(causal):
    """One key: its weight is 1, to the bit."""
    lengths = [1] * (3000 if causal or DEVICE == "cuda" else 500)
    q, k, v = on(DEVICE, torch.float16, inputs(lengths, (1, 1)))
    got = run([q, k, v], lengths, causal=causal)
    assert torch.equal(got["out"], v)
    assert torch.equal(got["dv"], cotangent(v.shape, v))
    assert (got["dq"] == 0).all() and (got["dk"] == 0).all()


# Groups: two heads a tile, several times over; three, so one head a tile also in half precision;
# all on one; none.
@every_dtype
@pytest.mark.parametrize("heads", [(16, 8), (4, 2), (6, 2), (8, 1), (3, 3)], ids=str)
def test_grouped_heads(heads, dtype):
    few = heads[0] <= (4 if dtype == torch.float32 else 8)  # interpreted, each takes its time
    lengths = [5, 66, 1] if DEVICE == "cuda" or few else [5, 1, 2]
    check(lengths, dtype, heads, causal=(dtype == torch.float32) == (heads[1] == 2))


# Qwen3's 128, others' 64, what a power of two above them has to mask; each pair of widths that are
# launched equally, and every remainder of 128.
@every_dtype
@pytest.mark.parametrize("K", range(16, 129, 16))
def test_widths(K, dtype):
    check([3, 66, 2], dtype, K=K, causal=(dtype == torch.float32) == (K % 32 == 0))


# On a GPU fp32 has registers for tiles of 16 tokens, and the interpreter for those of half
# precision: so this is the step at 16 | 17, and a sequence of three tiles.
@both_masks
@pytest.mark.parametrize("lengths", [[16], [17], [5, 10, 1, 40, 2, 16, 33]], ids=str)
def test_tiles_of_fp32(lengths, causal, monkeypatch):
    monkeypatch.setattr(_forward, "INTERPRETED", False)
    check(lengths, heads=(1, 1), causal=causal)
    if len(lengths) == 1:
        check(lengths, heads=(4, 2), K=48, causal=causal)


# ---- scale ----


SCALES = all_pairs([-0.7, 0.0, 1.3, 1e-3], [True, False], DTYPES)


@pytest.mark.parametrize(("scale", "causal", "dtype"), SCALES)
def test_scale(scale, causal, dtype):
    # A negative factor turns the order of scores round: what was largest is smallest. At 0 all
    # keys weigh the same, and what is masked still nothing.
    check([5, 1, 66], dtype, causal=causal, scale=scale)


# ---- numbers that hurt ----


@pytest.mark.parametrize(("times", "causal", "dtype"), all_pairs([10, 100], [True, False], DTYPES))
def test_softmax_of_one_key(times, causal, dtype):
    # Scores in the hundreds: all but one weight underflow, and that one is 1.
    lengths = [7, 1, 66]
    q, k, v = inputs(lengths, heads_of(dtype))
    check(lengths, dtype, qkv=(times * q, k, v), causal=causal)


@every_dtype
@both_masks
def test_equal_scores(causal, dtype):
    lengths = [7, 1, 66]
    q, k, v = inputs(lengths, heads_of(dtype))
    for equal in ((0 * q, k, v), (q, k[:1].expand_as(k).contiguous(), v)):
        got = check(lengths, dtype, qkv=equal, cancels=True, causal=causal)
        # Weights are 1 / n: the mean of what is seen.
        for part, values in zip(
            got["out"].double().cpu().split(lengths), v.split(lengths), strict=True
        ):
            mean = values.cumsum(0) / torch.arange(1, len(values) + 1)[:, None, None]
            mean = mean if causal else values.mean(0).expand_as(values)
            torch.testing.assert_close(part, mean.expand_as(part), rtol=0, atol=5e-3)


@both_masks
def test_scores_far_below_nought(causal):
    """Softmax sees differences only; a maximum that began at 0 would lose all of these."""
    lengths = [7, 66]
    q, k, v = inputs(lengths, (1, 1))
    q, k = q.abs() + 1, k.abs() + 1
    check(lengths, qkv=(10 * q, -10 * k, v), causal=causal)


def test_rising_and_falling_scores():
    """The running maximum moves at every block, or is found in the first."""
    n = 130
    q, k, v = inputs([n], (1, 1))
    q = q.abs()
    for order in (torch.arange(n), torch.arange(n).flip(0)):
        ramp = (order[:, None, None] / 8).double() * torch.ones_like(k)
        check([n], qkv=(q, ramp, v), causal=False)


# ---- invariants and calls ----


@both_masks
def test_permuting_sequences_permutes_the_result(causal):
    lengths, order = [7, 1, 70, 2, 64, 2], [4, 3, 0, 2, 5, 1]
    qkv = on(DEVICE, torch.float32, inputs(lengths, (1, 1)))
    do = cotangent(qkv[0].shape, qkv[0])

    def moved(x: Tensor) -> Tensor:
        return torch.cat([x.split(lengths)[i] for i in order])

    before = run(qkv, lengths, causal=causal, do=do)
    turned = [lengths[i] for i in order]
    after = run([moved(x) for x in qkv], turned, causal=causal, do=moved(do))
    for name in before:
        torch.testing.assert_close(after[name], moved(before[name]), rtol=1e-4, atol=1e-4)


def test_grouped_heads_equal_repeated_heads():
    # The convention of Qwen3 and Llama: query heads 0..2 read key head 0, 3..5 read key head 1.
    lengths = [5, 1, 70]
    q, k, v = on(DEVICE, torch.float16, inputs(lengths, (6, 2)))
    options = {"cu_seqlens": bounds(lengths), "causal": True}
    keys, values = (torch.stack([x[:, 0]] * 3 + [x[:, 1]] * 3, dim=1) for x in (k, v))
    assert torch.equal(triton(q, k, v, **options), triton(q, keys, values, **options))


def test_auto_is_triton_on_cuda():
    lengths = [5, 66]
    qkv = on(DEVICE, torch.float32, inputs(lengths))
    options = {"cu_seqlens": bounds(lengths), "causal": True}
    auto, ours = attention(*qkv, **options), triton(*qkv, **options)
    assert torch.equal(auto, ours) if DEVICE == "cuda" else auto.isclose(ours, atol=1e-4).all()
    # Sdpa computes unsupported dtypes and widths.
    for odd in (on(DEVICE, torch.float64, qkv), [x[..., :12] for x in qkv]):
        torch.testing.assert_close(
            attention(*odd, **options), attention_ref(*odd, **options), rtol=1e-4, atol=1e-4
        )


def test_given_plan_same_bits():
    lengths = [66, 3]
    qkv = inputs(lengths, (1, 1))
    want = run(qkv, lengths)
    same_bits(run(qkv, lengths, plan=AttentionPlan.of(bounds(lengths)).to(DEVICE)), want)
    same_bits(run(qkv, lengths, cu_seqlens=bounds(lengths, DEVICE).long()), want)


@pytest.mark.parametrize("only", ["q", "k", "v", "qk", "kv", "qv"])
def test_gradients_of_some(only):
    lengths = [5, 66]
    qkv = dict(zip("qkv", on(DEVICE, torch.float16, inputs(lengths, (1, 1))), strict=True))
    want = run(list(qkv.values()), lengths)
    leaves = {n: x.clone().requires_grad_(n in only) for n, x in qkv.items()}
    out = triton(**leaves, cu_seqlens=bounds(lengths), causal=True)
    grads = torch.autograd.grad(out, [leaves[n] for n in only], cotangent(out.shape, out))
    assert all(torch.equal(g, want[f"d{n}"]) for n, g in zip(only, grads, strict=True))


def test_without_gradients():
    lengths = [5, 66]
    qkv = on(DEVICE, torch.float32, inputs(lengths, (1, 1)))
    out = triton(*qkv, cu_seqlens=bounds(lengths), causal=True)
    assert not out.requires_grad and torch.equal(out, run(qkv, lengths)["out"])


def test_under_autocast_it_follows_its_inputs():
    lengths = [5, 66]
    qkv = on(DEVICE, torch.float32, inputs(lengths, (1, 1)))
    want = run(qkv, lengths)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(triton, qkv, cu_seqlens=bounds(lengths), causal=True)
    same_bits(got, want)
