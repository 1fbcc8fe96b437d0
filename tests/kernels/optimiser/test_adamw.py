"""The stochastic AdamW: rounding bit by bit, random bits, steps against float64, equal bits of the
reference and the kernel.
"""

import math

import numpy as np
import pytest
import torch
from live_memory import Live
from torch import Tensor

from mlembed_kernels import stochastic_adamw, stochastic_adamw_ref
from mlembed_kernels.optimiser import adamw
from mlembed_kernels.optimiser.adamw import philox, random_bits, rounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, MAX = math.inf, torch.finfo(torch.bfloat16).max
MAX_FP32 = torch.finfo(torch.float32).max
T = torch.tensor(3.0)
# Of a whole block, one more and one less, several blocks, and none.
SHAPES = ((7, 13), (32, 32), (25, 41), (11, 93), (64, 40), (1, 1), (0, 3))
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1, "seed": 2**62 + 5}


def from_bits(*bits: int) -> Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


def drawn(x: Tensor, seed: int = 0) -> Tensor:
    return rounded(x, random_bits(seed, 0, T, 0, x.numel()).view(x.shape))


def many(value: float, n: int = 1 << 14) -> Tensor:
    return drawn(torch.full((n,), value)).float()


# ---- random bits ----


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The vectors of its authors' Random123."""
    assert philox(counter, key) == words
    tensors = [torch.tensor(word) for word in counter]
    assert tuple(int(word) for word in philox(tuple(tensors), key)) == words


def test_bits_are_of_seed_parameter_step_and_element():
    bits = random_bits(1, 2, T, 0, 4096)
    assert bits.dtype == torch.int32 and bits.min() >= 0 and bits.max() < 1 << 16
    for first in (8, 1000):
        assert torch.equal(random_bits(1, 2, T, first, 77), bits[first : first + 77])
    others = [random_bits(2, 2, T, 0, 4096), random_bits(1, 3, T, 0, 4096)]
    others += [random_bits(1, 2, T + 1, 0, 4096), bits.roll(1), bits.roll(8)]
    for other in others:
        # 4096 pairs agree by chance in 4096 / 65536 places.
        assert (other == bits).sum() < 3


def test_each_bit_is_a_fair_coin():
    bits = random_bits(3, 1, T, 0, 1 << 14)
    for place in range(16):
        ones = (bits >> place & 1).double()
        assert abs(ones.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(len(bits))
        # Neighbours, and elements of one counter, are independent.
        for distance in (1, 2, 4, 8):
            same = (ones == ones.roll(distance)).double().mean().item()
            assert abs(same - 0.5) < 5 * 0.5 / math.sqrt(len(bits))


# ---- rounding ----


def test_every_bf16_stays_equal():
    """All 65536 of them: zeros of both signs, subnormals, the largest, infinities, NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    number = ~every.isnan()
    for seed in range(20):
        got = drawn(every.float(), seed)
        assert got.dtype == torch.bfloat16 and got.shape == every.shape
        assert torch.equal(got[number].view(torch.int16), every[number].view(torch.int16))
        assert got[~number].isnan().all()


# Of either sign: between two steps, subnormal in fp32, and the last step before the largest.
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "bits",
    [0x3F80_4000, 0x3F80_8000, 0x3F80_FFFF, 0x3F80_0001, 0x0000_C000, 0x0080_1000, 0x7F7E_8000],
    ids=hex,
)
def test_the_mean_of_many_is_the_value(bits, sign):
    """Rounding to nearest is off by up to 2^-1 of a step; a bound of 5 sigma is 0.02 of one."""
    low, high = sign * from_bits(bits & 0xFFFF_0000, (bits & 0xFFFF_0000) + 0x1_0000).double()
    n, p = 1 << 14, (bits & 0xFFFF) / 0x1_0000
    got = many(sign * from_bits(bits).item(), n).double()
    assert ((got == low) | (got == high)).all()
    up = (got == high).double().mean().item()
    assert abs(up - p) <= 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values(sign):
    # MAX = 2^128 - step, and from half a step above it the nearest bf16 is infinity.
    step = 2.0**120
    for value, want in [
        (MAX, {MAX}),
        (MAX + step * 0.49, {MAX}),
        (MAX + step * 0.5, {INF}),
        (MAX_FP32, {INF}),
        (INF, {INF}),
        (MAX - step * 0.25, {MAX, MAX - step}),
    ]:
        x = torch.tensor(sign * value, dtype=torch.float32)
        assert {sign * v for v in many(x.item()).tolist()} == want, value
        assert x.bfloat16().item() in {sign * v for v in want}


def test_nan_stays_nan():
    """CUDA's own, 0x7FFFFFFF, and NaNs whose upper half alone is an infinity."""
    nans = from_bits(0x7FFF_FFFF, 0xFFFF_FFFF, 0x7FC0_0000, 0x7F80_0001, 0xFF80_0001, 0x7F80_FFFF)
    assert nans.isnan().all()
    assert drawn(nans.repeat(1 << 12)).isnan().all()


# ---- steps ----


class Problem:
    """Weights of several shapes, gradients of very different sizes, moments after some steps."""

    def __init__(self, grads: torch.dtype = torch.bfloat16, t: float = 3.0) -> None:
        rng = torch.Generator().manual_seed(0)

        def draw(scale: float = 1.0) -> list[Tensor]:
            return [scale * torch.randn(shape, generator=rng) for shape in SHAPES]

        self.weights = [w.bfloat16() for w in draw()]
        self.grads = [(g * 10.0 ** (2 * i - 4)).to(grads) for i, g in enumerate(draw())]
        self.exp_avgs, self.exp_avg_sqs = draw(0.1), [v.square() for v in draw(0.1)]
        self.steps = [torch.tensor(t) for _ in SHAPES]
        lists = "weights", "grads", "exp_avgs", "exp_avg_sqs", "steps"
        for name in lists:
            setattr(self, name, [x.to(DEVICE) for x in getattr(self, name)])
        self.lists = [getattr(self, name) for name in lists]

    def step(self, impl: str, **options) -> list[list[Tensor]]:
        """Step once, and return copies of what changed: weights, moments and step counts."""
        options = {**OPTIONS, "numbers": range(len(SHAPES)), **options}
        stochastic_adamw(*self.lists, **options, impl=impl)
        return [[x.clone().cpu() for x in part] for i, part in enumerate(self.lists) if i != 1]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def exact(problem: Problem, scale: float = 1.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return weight, before rounding, and moments of each weight's next step, in float64."""
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    ends = []
    for weight, grad, m, v, t in zip(*problem.lists, strict=True):
        w, g, m, v, t = (x.double().cpu() for x in (weight, grad, m, v, t + 1))
        g = g / scale
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + OPTIONS["eps"])
        ends.append((w * (1 - lr * OPTIONS["weight_decay"]) - lr * step, m, v))
    return ends


def between(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the magnitudes of the two bf16 around float64 w, the lower one first."""
    bits = w.abs().float().view(torch.int32) & -(1 << 16)
    return tuple(x.view(torch.float32) for x in (bits, bits + (1 << 16)))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("t", "scale"), [(0.0, 1.0), (3.0, 2.7), (4000.0, 1e3)])
def test_a_step_is_adamw_in_float64(impl, grads, t, scale):
    """Moments within rounding, and weights one of the two neighbours of what they would be."""
    problem = Problem(grads, t)
    want = exact(problem, scale)
    weights, firsts, seconds, steps = problem.step(impl, grad_scale=scalar(scale))
    rose = 0
    for weight, first, second, step, (w, m, v) in zip(
        weights, firsts, seconds, steps, want, strict=True
    ):
        assert step == t + 1
        torch.testing.assert_close(first.double(), m, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(second.double(), v, rtol=1e-6, atol=0)
        # The fp32 number that is rounded may differ a little, and lie beyond a neighbour.
        inner, _ = between(w * (1 - 1e-6) - w.sign() * 1e-8)
        _, outer = between(w * (1 + 1e-6) + w.sign() * 1e-8)
        assert ((inner <= weight.abs()) & (weight.abs() <= outer)).all()
        rose += (weight.double() > w).sum().item()
    assert rose > 500


@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32])
def test_the_kernel_has_the_bits_of_the_reference(grads):
    one, two = Problem(grads), Problem(grads)
    for i in range(3):
        options = {"grad_scale": scalar(1.0 + i), "found_inf": scalar(0.0)}
        for a, b in zip(
            one.step("reference", **options), two.step("triton", **options), strict=True
        ):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_launch_layout_changes_the_bits(monkeypatch):
    from mlembed_kernels.optimiser import _op

    ends = []
    for block in (64, 2048):
        monkeypatch.setitem(_op.OPTIONS, "BLOCK", block)
        ends.append(Problem().step("triton"))
    for chunk in (64, 2**24):
        monkeypatch.setattr(adamw, "CHUNK", chunk)
        ends.append(Problem().step("reference"))
    for end in ends[1:]:
        for a, b in zip(ends[0], end, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_found_inf_changes_nothing(impl):
    problem = Problem()
    problem.grads[2][3] = math.nan
    before = [[x.clone().cpu() for x in part] for i, part in enumerate(problem.lists) if i != 1]
    after = problem.step(impl, grad_scale=scalar(math.nan), found_inf=scalar(1.0))
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    # Without it a NaN reaches its weight, and no other.
    weights = problem.step(impl)[0]
    assert [int(w.isnan().sum()) for w in weights] == [0, 0, 41, 0, 0, 0, 0]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_decay_alone_reaches_bf16(impl):
    """1 - lr * decay is 1e-4 from one: hundreds of steps show in bf16, a single one cannot."""
    weight = torch.full((1 << 12,), -1.0).bfloat16().to(DEVICE)
    zeros = [torch.zeros(len(weight), device=DEVICE) for _ in range(3)]
    lists = [[weight], *([x] for x in zeros), [scalar(0.0)]]
    for _ in range(200):
        options = {**OPTIONS, "lr": 1e-3, "numbers": [0]}
        stochastic_adamw(*lists, **options, impl=impl)
    # Each weight that moved, moved by a step of 2^-8 or two.
    sigma = math.sqrt(0.02 * 2**-8 / len(weight))
    assert abs(weight.double().mean().item() + math.exp(-0.02)) < 5 * sigma < 0.02 / 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_waits_for_nothing(no_wait):
    problem = Problem()
    options = {"grad_scale": scalar(2.0), "found_inf": scalar(0.0)}
    problem.step("triton", **options)
    with no_wait():
        stochastic_adamw(
            *problem.lists, **OPTIONS, **options, numbers=range(len(SHAPES)), impl="triton"
        )


def test_strided_gradients():
    problem, strided = Problem(), Problem()
    strided.grads[:] = [g.T.contiguous().T if g.numel() > 1 else g for g in strided.grads]
    assert not strided.grads[0].is_contiguous()
    for a, b in zip(problem.step("triton"), strided.step("triton"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reference_takes_three_fp32_copies_of_a_chunk(monkeypatch):
    n = 1 << 12
    monkeypatch.setattr(adamw, "CHUNK", n)
    # Eight chunks.
    lists = [[torch.ones(8 * n).bfloat16()], [torch.ones(8 * n).bfloat16()]]
    lists += [[torch.zeros(8 * n)], [torch.zeros(8 * n)], [torch.zeros(())]]
    with Live() as live:
        stochastic_adamw_ref(*lists, **OPTIONS, numbers=[0])
    # Rounding also has a mask of a byte and a result of two bytes each.
    assert 3 * 4 * n <= live.most() <= (3 * 4 + 3) * n + 512


def test_mistakes_are_named():
    def call(**changes):
        problem = Problem()
        lists = dict(
            zip(
                ("weights", "grads", "exp_avgs", "exp_avg_sqs", "steps"), problem.lists, strict=True
            )
        )
        options = {**OPTIONS, "numbers": range(len(SHAPES))}
        stochastic_adamw(**{**lists, **options, **changes})

    with pytest.raises(
        ValueError, match=r"weights: expected lists of one length, got \[7, 7, 7, 7"
    ):
        call(numbers=range(3))
    with pytest.raises(ValueError, match="weights: expected contiguous bf16, got torch.float32"):
        call(weights=[torch.zeros(shape) for shape in SHAPES])
    with pytest.raises(ValueError, match=r"grads: expected \[7, 13\], got \[13, 7\]"):
        call(grads=[g.T for g in Problem().grads])
    with pytest.raises(
        ValueError, match=r"moments: expected contiguous fp32 \[7, 13\], got torch.bfloat16"
    ):
        call(exp_avg_sqs=[w.clone() for w in Problem().weights])
    nothing = [[]] * 5
    stochastic_adamw(*nothing, **OPTIONS, numbers=[])
