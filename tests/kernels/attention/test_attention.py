"""Packed attention against float64: values, all gradients, and what must not leak across texts."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_truth import NAMES, bounds, inputs, results, rows_of

from mlembed_kernels import attention, attention_ref

# Shapes that hurt: single tokens (softmax over one key), primes (no tile or vector width divides
# them), one long text among short ones (a rectangle that is mostly unused). "sdpa" takes its own
# softmax up to 256 tokens and torch's SDPA from 257 on, so both sides of that step are here.
LENGTHS = {
    "one_token": [1],
    "all_single": [1, 1, 1],
    "primes": [2, 3, 5, 7, 11, 13],
    "long_among_short": [1, 97, 1, 2],
    "last_of_softmax": [256, 1, 3],
    "first_of_sdpa": [3, 257, 1],
    "sdpa_prime": [1, 263, 31],
    "quarters": [9, 9, 8, 8, 8, 7, 5, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1],  # a rectangle for each
}
# (Hq, Hkv): no grouping, grouping by two and three, all queries on one key head.
HEADS = [(1, 1), (4, 2), (6, 2), (3, 1)]
ragged = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
both_masks = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def layout(lengths: list[int]) -> dict:
    return {"cu_seqlens": bounds(lengths)}


@both_masks
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_reference_is_the_formula(heads, causal):
    # In plain numbers, one output at a time: the specification itself has to be held to something.
    lengths = [1, 3, 2]
    q, k, v = inputs(lengths, heads, K=3)
    out = attention_ref(q, k, v, causal=causal, **layout(lengths))
    begin = 0
    for n in lengths:
        for t in range(n):
            for h in range(heads[0]):
                g = h // (heads[0] // heads[1])
                seen = range(begin, begin + (t + 1 if causal else n))
                score = [sum((q[begin + t, h] * k[s, g]).tolist()) / math.sqrt(3) for s in seen]
                weight = [math.exp(s - max(score)) for s in score]
                for i in range(3):
                    want = sum(w * v[s, g, i].item() for w, s in zip(weight, seen, strict=True))
                    assert out[begin + t, h, i].item() == pytest.approx(want / sum(weight), 1e-12)
        begin += n


@both_masks
@pytest.mark.parametrize("heads", HEADS, ids=str)
@ragged
def test_sdpa_equals_reference_in_float64(lengths, heads, causal):
    qkv, options = inputs(lengths, heads), {"causal": causal, **layout(lengths)}
    truth = results(attention_ref, qkv, **options)
    got = results(attention, qkv, impl="sdpa", **options)
    for name in NAMES:
        a, b = got[name], truth[name]
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@both_masks
@pytest.mark.parametrize("window", [1, 2, 5, 300])
@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("lengths", [[1, 7, 3], [3, 263, 1], LENGTHS["quarters"]], ids=str)
def test_window(lengths, impl, window, causal):
    """A token sees those at a smaller distance than the window, none of another sequence."""
    qkv = inputs(lengths)

    def dense(q, k, v):
        texts = torch.repeat_interleave(torch.tensor(lengths))
        t = torch.arange(len(q))
        sees = (texts[:, None] == texts) & ((t[:, None] - t).abs() < window)
        sees = sees.tril() if causal else sees
        heads = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=sees, enable_gqa=True)
        return out.transpose(0, 1)

    truth = results(dense, qkv)
    options = {"causal": causal, "window": window, **layout(lengths)}
    got = results(attention, qkv, impl=impl, **options)
    for name in NAMES:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-10, atol=1e-12, msg=name)


def test_window_of_a_kernel_without_one():
    qkv = [x.float() for x in inputs([3, 9])]
    options = {"causal": True, **layout([3, 9])}
    for impl in ("triton", "xformers"):
        with pytest.raises(
            ValueError, match=f"impl: {impl} supports windows from .*, 9 tokens, got .* of 8"
        ):
            attention(*qkv, window=8, impl=impl, **options)
    with pytest.raises(ValueError, match="window: expected 1 or more, got 0"):
        attention(*qkv, window=0, **options)


@both_masks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ragged
def test_sdpa_is_as_exact_as_eager(lengths, dtype, causal):
    # Same bits into both; eager is the plain loop in the same dtype. The floor is in units in the
    # last place of the largest value: 4 for another order of sums, 16 for torch's flash kernel,
    # whose backward takes exp(score - logsumexp) again: 2.5 times eager's RMS error in fp32.
    ulps = 4 if max(lengths) <= 256 else 16
    options = {"causal": causal, **layout(lengths)}
    qkv = [x.to(dtype) for x in inputs(lengths)]
    truth = results(attention_ref, [x.double() for x in qkv], **options)
    eager = results(attention_ref, qkv, **options)
    got = results(attention, qkv, impl="sdpa", **options)
    for name in NAMES:
        a, e, t = got[name], eager[name], truth[name]
        assert a.dtype == dtype
        floor = ulps * torch.finfo(dtype).eps * t.abs().max().item()
        error, allowed = ((x.double() - t).abs().max().item() for x in (a, e))
        assert error <= allowed + floor, f"{name}: error {error}, eager {allowed}, floor {floor}"


@both_masks
@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_scale(impl, causal):
    lengths = [5, 1, 7]
    q, k, v = inputs(lengths)
    options = {"causal": causal, "impl": impl, **layout(lengths)}
    default = attention(q, k, v, **options)
    torch.testing.assert_close(attention(q, k, v, scale=16**-0.5, **options), default)
    # A factor on the scores can as well be put on q; scale 0 weighs all visible keys equally.
    torch.testing.assert_close(
        attention(q, k, v, scale=0.3, **options), attention(q * 0.3, k, v, scale=1.0, **options)
    )
    uniform = attention(q, k, v, scale=0.0, **options)
    for part, values in zip(uniform.split(lengths), v.split(lengths), strict=True):
        mean = values.cumsum(0) / torch.arange(1, len(values) + 1)[:, None, None]
        mean = mean if causal else values.mean(0).expand_as(values)
        torch.testing.assert_close(part, mean.repeat_interleave(2, dim=1))


# 256/257: the softmax and the SDPA side of "sdpa"; the neighbours are what could leak.
@both_masks
@pytest.mark.parametrize("longest", [19, 257])
def test_sequences_are_independent(longest, causal):
    lengths = [7, 1, longest, 2]
    q, k, v = inputs(lengths)
    options = {"causal": causal, "impl": "sdpa", **layout(lengths)}
    packed = attention(q, k, v, **options)
    begin = 0
    for n in lengths:
        rows = slice(begin, begin + n)
        alone = attention(q[rows], k[rows], v[rows], causal=causal, impl="sdpa", **layout([n]))
        torch.testing.assert_close(packed[rows], alone, rtol=1e-12, atol=1e-13)
        # Not-a-number in every other text reaches neither values nor gradients of this one.
        others = torch.ones(len(q), dtype=torch.bool)
        others[rows] = False
        poisoned = [x.clone().masked_fill_(others[:, None, None], torch.nan) for x in (q, k, v)]
        poisoned = [x.requires_grad_() for x in poisoned]
        out = attention(*poisoned, **options)
        torch.testing.assert_close(out[rows], packed[rows], rtol=0, atol=0)
        for grad in torch.autograd.grad(out[rows].square().sum(), poisoned):
            assert grad[rows].isfinite().all()
        begin += n


def test_under_autocast_it_follows_its_inputs():
    # The model calls it under bf16 autocast; fp32 inputs then may lose precision, never meaning.
    lengths = [7, 1, 19]
    qkv = [x.float() for x in inputs(lengths)]
    options = {"causal": True, "impl": "sdpa", **layout(lengths)}
    plain = attention(*qkv, **options)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(*qkv, **options)
    cosines = F.cosine_similarity(plain.flatten(1), half.float().flatten(1), dim=-1)
    assert cosines.min() > 0.999


# ---- active sequences ----

every = pytest.mark.parametrize("impl", ["sdpa", "reference"])


@both_masks
@every
@pytest.mark.parametrize("flags", [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0] * 4, [1] * 4])
def test_active_sequences_alone_are_read(flags, impl, causal):
    lengths, active = [3, 1, 5, 2], torch.tensor(flags, dtype=torch.bool)
    options = {**layout(lengths), "causal": causal, "impl": impl}
    here = rows_of(lengths, [i for i, flag in enumerate(flags) if flag])
    qkv = inputs(lengths)
    q, k, v = (x.masked_fill(~here[:, None, None], torch.nan).requires_grad_() for x in qkv)
    out = attention(q, k, v, active=active, **options)
    alone = [n for n, flag in zip(lengths, flags, strict=True) if flag]
    assert (out[~here] == 0).all()
    if alone:
        part = [x[here].requires_grad_() for x in qkv]
        want = attention_ref(*part, **layout(alone), causal=causal)
        torch.testing.assert_close(out[here], want, rtol=1e-12, atol=1e-13)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        wanted = torch.autograd.grad(want.square().sum(), part)
        for a, b in zip(grads, wanted, strict=True):
            assert (a[~here] == 0).all()
            torch.testing.assert_close(a[here], b, rtol=1e-11, atol=1e-12)
    if flags == sorted(flags, reverse=True):
        for count in (torch.tensor(sum(flags)), torch.tensor([sum(flags)], dtype=torch.int32)):
            assert torch.equal(attention(q, k, v, active=count, **options), out)


@every
@pytest.mark.parametrize("count", [-1, 5])
def test_count_beyond_either_end(count, impl):
    lengths = [3, 1, 5]
    qkv, options = inputs(lengths), {**layout(lengths), "causal": True, "impl": impl}
    out = attention(*qkv, active=torch.tensor(count), **options)
    whole = attention(*qkv, **options)
    assert torch.equal(out, whole if count > 0 else torch.zeros_like(whole))


@every
def test_no_sequences(impl):
    # cu_seqlens [0] is N = 0, T = 0: rising, ends at T.
    x = torch.zeros(0, 2, 4)
    out = attention(x, x, x, cu_seqlens=torch.tensor([0]), causal=False, impl=impl)
    assert out.shape == (0, 2, 4)
