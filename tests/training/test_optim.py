"""AdamW: rounding to bf16 bit by bit, steps against torch's, parameter groups, the schedule."""

import copy
import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import tiny_shape
from live_memory import Live
from processes import gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import checkpoint
from mlembed.training import optim
from mlembed.training.optim import StochasticAdamW, adamw, learning_rate, rounded, to_weights

BF16 = config.Optim(lr=1e-2, weight_decay=0.1, weights="bf16")
SHAPE = tiny_shape(vocab_size=50, hidden_size=16, head_dim=8, intermediate_size=24, ranks=(4, 8))
INF, MAX = math.inf, torch.finfo(torch.bfloat16).max
MAX_FP32 = torch.finfo(torch.float32).max


def from_bits(*bits):
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


def many(value, n=1 << 14):
    return rounded(torch.full((n,), value)).float()


# ---- rounding ----


def test_every_bf16_stays_equal():
    """All 65536 of them: zeros of both signs, subnormals, the largest, infinities, NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    number = ~every.isnan()
    for _ in range(20):
        got = rounded(every.float())
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


def test_elements_are_drawn_independently():
    """Each element and each call draws bits of its own, all from the seed."""
    x = torch.full((64, 64), 1 + 2**-9)
    torch.manual_seed(0)
    first, second = rounded(x), rounded(x)
    torch.manual_seed(0)
    assert torch.equal(rounded(x), first) and not torch.equal(first, second)
    ups = (first > 1).double()
    # 64 sums of 64 fair coins have a variance of 16, with a relative error of 0.18.
    for dim in (0, 1):
        assert 4 < ups.sum(dim).var() < 40


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
    assert rounded(nans.repeat(1 << 12)).isnan().all()


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5)])
def test_shapes(shape):
    assert rounded(torch.ones(shape)).shape == shape


# ---- against torch ----


def problem(dtype, seed=0):
    """Return parameters of several shapes and targets to fit."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 13), (64, 33), (1, 1), (13,), (101,)]
    # All dtypes start at the same bf16 numbers.
    at = [torch.randn(s, generator=generator).bfloat16().to(dtype) for s in shapes]
    return [nn.Parameter(x) for x in at], [torch.randn(s, generator=generator) for s in shapes]


def groups(parameters):
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim == 1]
    return [
        {"params": matrices, "weight_decay": 0.3},
        {"params": vectors, "weight_decay": 0.0, "lr": 3e-3},
    ]


def run(optimizer, parameters, targets, steps):
    """Step with noisy gradients of very different sizes and a rate that falls."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for i, (p, target) in enumerate(zip(parameters, targets, strict=True)):
            noise = torch.randn(p.shape, generator=generator)
            p.grad = ((p.detach().float() - target + noise) * 10.0 ** (2 * i - 4)).to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"] *= 0.99
        optimizer.step()
        optimizer.zero_grad()


def test_fp32_steps_equal_torch_bit_by_bit(monkeypatch):
    # Larger parameters are cut unevenly.
    monkeypatch.setattr(optim, "CHUNK", 100)
    (ours, targets), (theirs, _) = problem(torch.float32), problem(torch.float32)
    one = StochasticAdamW(groups(ours), lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    two = torch.optim.AdamW(
        groups(theirs), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, foreach=False, fused=False
    )
    run(one, ours, targets, 200)
    run(two, theirs, targets, 200)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert one.state[a].keys() == two.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one.state[a][key], two.state[b][key]) for key in two.state[b])
        assert one.state[a]["step"].dtype == two.state[b]["step"].dtype


def test_bf16_step_is_the_rounded_fp32_step():
    """Every new weight is one of the two neighbours of what fp32 masters would have become."""
    parameters, targets = problem(torch.bfloat16)
    optimizer = StochasticAdamW(groups(parameters), lr=1e-2)
    changed = 0
    for step in range(20):
        masters = [nn.Parameter(p.detach().float()) for p in parameters]
        exact = StochasticAdamW(groups(masters), lr=1e-2)
        for p, master, target in zip(parameters, masters, targets, strict=True):
            p.grad = (p.detach().float() - target).bfloat16()
            master.grad = p.grad.float()
            if step:
                exact.state[master] = copy.deepcopy(optimizer.state[p])
        optimizer.step()
        exact.step()
        for p, master in zip(parameters, masters, strict=True):
            assert p.dtype == torch.bfloat16
            for key, moment in exact.state[master].items():
                mine = optimizer.state[p][key]
                assert mine.dtype == torch.float32 and torch.equal(mine, moment)
            bits = master.detach().view(torch.int32)
            low = (bits & -(1 << 16)).view(torch.float32)
            high = ((bits & -(1 << 16)) + (1 << 16)).view(torch.float32)
            assert ((p.float() == low) | (p.float() == high)).all()
            changed += (p.float() == high).sum().item()
    assert changed > 1000


def test_small_updates_arrive_on_average():
    """Weights 1 with lr 1e-5: a bf16 step down is 2^-8, 400 updates; nearest loses each of them."""
    steps, lr, n = 100, 1e-5, 1 << 16
    ends = {}
    for kind in (StochasticAdamW, torch.optim.AdamW):
        parameter = nn.Parameter(torch.ones(n // 64, 64, dtype=torch.bfloat16))
        optimizer = kind([parameter], lr=lr, weight_decay=0.0)
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ends[kind] = 1 - parameter.detach().double()
    assert (ends[torch.optim.AdamW] == 0).all()
    moved = ends[StochasticAdamW]
    want = steps * lr
    # Binomial: about want / 2^-8 weights have moved by 2^-8, a few of them twice.
    sigma = math.sqrt(want * 2**-8 / n)
    assert abs(moved.mean().item() - want) < 5 * sigma < want / 5


def test_decay_alone_reaches_bf16():
    """1 - lr * decay is 1e-4 from one: a thousand steps show in bf16, a single one cannot."""
    parameter = nn.Parameter(torch.full((1 << 12, 4), -1.0).bfloat16())
    optimizer = StochasticAdamW([parameter], lr=1e-3, weight_decay=0.1)
    for _ in range(1000):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert abs(parameter.double().mean().item() + math.exp(-0.1)) < 2e-3


def test_chunks_of_a_large_parameter(monkeypatch):
    """Moments do not depend on the chunks, and every chunk is updated."""
    ends = []
    for chunk in (2**24, 7):
        monkeypatch.setattr(optim, "CHUNK", chunk)
        parameters, targets = problem(torch.bfloat16)
        before = [p.detach().clone() for p in parameters]
        optimizer = StochasticAdamW(parameters, lr=1.0)
        for p, target in zip(parameters, targets, strict=True):
            p.grad = target.bfloat16()
        optimizer.step()
        assert all((p != b).all() for p, b in zip(parameters, before, strict=True))
        ends.append([optimizer.state[p]["exp_avg"] for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_step_takes_three_fp32_copies_of_a_chunk(monkeypatch):
    n = 1 << 12
    monkeypatch.setattr(optim, "CHUNK", n)
    # Eight chunks.
    parameter = nn.Parameter(torch.ones(64, n // 8, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([parameter])
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        with Live() as live:
            optimizer.step()
    # The first step allocates the moments. The second also has a mask of a byte and a result of two
    # bytes each, and `step`.
    assert 3 * 4 * n <= live.most() <= (3 * 4 + 3) * n + 64


def test_strided_and_missing_gradients():
    parameters, _ = problem(torch.bfloat16)
    optimizer = StochasticAdamW(parameters, lr=1.0, weight_decay=0.0)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert not optimizer.state
    parameters[1].grad = torch.randn(33, 64).bfloat16().T
    assert not parameters[1].grad.is_contiguous()
    optimizer.step()
    assert list(optimizer.state) == [parameters[1]]
    moved = parameters[1].detach().float() - before[1].float()
    assert torch.equal(moved.sign(), -parameters[1].grad.float().sign())
    assert all(torch.equal(parameters[i], before[i]) for i in (0, 2, 3, 4))


def test_nan_gradients_make_nan_weights():
    parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([parameter], lr=0.1)
    parameter.grad = torch.tensor([[1, math.nan, 1], [INF, 1, -INF]]).bfloat16()
    optimizer.step()
    assert parameter.isnan().tolist() == [[False, True, False], [True, False, True]]


def test_closure_has_gradients():
    parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.float().square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0 and optimizer.step(closure) < 6.0
    assert optimizer.step() is None


def test_other_dtypes_and_cast_moments_are_errors():
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"expected fp32 or bf16 parameters, got {dtype}"):
            StochasticAdamW([nn.Parameter(torch.ones(2, 2, dtype=dtype))])
    parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(AssertionError, match="fp32 moments"):
        optimizer.step()


# ---- models ----


def fresh(cfg=BF16):
    torch.manual_seed(7)
    model = Transformer(SHAPE)
    to_weights(model, cfg)
    return model, adamw(model, cfg)


def train(model, optimizer, steps, texts=6):
    """Train texts with equal starts to have equal vectors, and return the loss of each step."""
    losses = []
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids = torch.randint(0, SHAPE.vocab_size, (texts, 5), generator=generator)
        batch = pack(list(torch.cat([ids, ids.roll(1, 1)]).numpy()))
        with torch.autocast("cpu", torch.bfloat16):
            queries, docs = F.normalize(model(batch)[-1], dim=-1).split(texts)
        loss = F.cross_entropy(queries @ docs.T / 0.05, torch.arange(texts))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_matrices_alone_are_cast():
    model, optimizer = fresh()
    exact, fused = fresh(config.Optim())
    assert type(optimizer) is StochasticAdamW and type(fused) is torch.optim.AdamW
    assert all(group["fused"] for group in fused.param_groups)
    masters = dict(exact.named_parameters())
    assert {p.dtype for p in masters.values()} == {torch.float32}
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
        assert torch.equal(p, masters[name].to(p.dtype)) and p.requires_grad


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [(), (4, 8)])
def test_every_parameter_is_in_one_group(weights, ranks):
    model = Transformer(dataclasses.replace(SHAPE, ranks=ranks))
    cfg = config.Optim(0.5, betas=(0.1, 0.2), weight_decay=0.3, weights=weights)
    to_weights(model, cfg)
    optimizer = adamw(model, cfg)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        group = group_of[id(p)]
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.1, 0.2), 1e-8)


def test_transformer_learns():
    model, optimizer = fresh()
    losses = train(model, optimizer, 60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_resumed_training_repeats_bit_for_bit(tmp_path):
    """Weights, moments and the random numbers of the rounding are restored."""
    model, optimizer = fresh()
    train(model, optimizer, 3)
    with checkpoint.Saver(tmp_path, 0, 1, keep=1) as saver:
        tensors = checkpoint.training_tensors(model, optimizer, 0)
        saver.save(3, tensors, lambda p: pretrained.describe(model.cfg, p))
    path = tmp_path / "step_00000003"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 4)
    ends = []
    # The second time without the restored random state.
    for seed in (None, 99):
        again = pretrained.load(str(path))
        to_weights(again, BF16)
        for name, p in again.named_parameters():
            assert p.dtype == before[name].dtype and torch.equal(p, before[name]), name
        resumed = adamw(again, BF16)
        torch.manual_seed(1)
        assert checkpoint.restore(path, again, resumed, 0, 1)["step"] == 3
        if seed:
            torch.manual_seed(seed)
        train(again, resumed, 4)
        mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
        ends.append(all(torch.equal(mine[name], theirs[name]) for name in mine))
        if not seed:
            for name, p in mine.items():
                a, b = optimizer.state[p], resumed.state[theirs[name]]
                assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert ends == [True, False]


def test_saved_weights_load_to_the_same_bits(tmp_path):
    model, optimizer = fresh()
    train(model, optimizer, 5)
    pretrained.save(model, tmp_path)
    again = pretrained.load(str(tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    to_weights(again, BF16)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


# ---- processes ----


def test_replicas_stay_equal():
    """Two processes with different data average gradients and draw the same random numbers."""
    (first, own), (second, other) = gloo(2, replica)
    assert first == second and own != other


def replica(where):
    """Return digests of the weights after some steps and of this process's last batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16))
    to_weights(model, BF16)
    optimizer = adamw(model, BF16)
    ddp = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(where.rank)
    for _ in range(5):
        x = torch.randn(8, 16, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            ddp(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = [p.detach().float() for p in model.parameters()], [x]
    return [
        hashlib.sha256(b"".join(t.numpy().tobytes() for t in some)).hexdigest() for some in tensors
    ]


# ---- schedule ----


def schedule(steps, **optim):
    run = config.Run(steps=steps, optim=config.Optim(**optim))
    return [learning_rate(step, run) for step in range(steps)]


def test_cosine_schedule():
    rates = schedule(200, lr=2.0, warmup_ratio=0.1, min_lr_ratio=0.05)
    assert rates[:20] == pytest.approx([2.0 * (i + 1) / 20 for i in range(20)])
    assert rates[20] == pytest.approx(2.0) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[20:-1], rates[21:], strict=True))
    for step in (50, 110, 180):
        phase = (step - 20) / 179
        want = 0.1 + (2.0 - 0.1) * (1 + math.cos(math.pi * phase)) / 2
        assert rates[step] == pytest.approx(want)


def test_linear_schedule_after_warmup_steps():
    rates = schedule(
        11, lr=1.0, warmup_steps=2, warmup_ratio=0.9, min_lr_ratio=0.2, schedule="linear"
    )
    assert rates == pytest.approx([0.5, 1.0, *(1 - 0.8 * i / 8 for i in range(9))][:11])


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_schedule_at_its_edges(steps, warmup, floor):
    rates = schedule(steps, lr=1.0, warmup_ratio=warmup, min_lr_ratio=floor)
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates) and max(rates) == pytest.approx(1.0)
    if warmup == 0 and steps > 1:
        assert rates[0] == 1.0 and rates[-1] == pytest.approx(floor)
