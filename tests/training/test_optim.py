"""AdamW: steps against torch's, clipping, parameter groups, the schedule."""

import dataclasses
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_shape
from processes import gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import checkpoint
from mlembed.training.optim import (
    StochasticAdamW,
    learning_rate,
    optimizer_of,
    prepare,
    set_rates,
    to_weights,
)

BF16 = config.Optim(lr=1e-2, weight_decay=0.1, weights="bf16")
SHAPE = tiny_shape(vocab_size=50, hidden_size=16, head_dim=8, intermediate_size=24, ranks=(4, 8))
INF = math.inf


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


def test_fp32_steps_equal_torch_bit_by_bit():
    (ours, targets), (theirs, _) = problem(torch.float32), problem(torch.float32)
    one = StochasticAdamW(groups(ours), lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    two = torch.optim.AdamW(groups(theirs), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, fused=True)
    run(one, ours, targets, 200)
    run(two, theirs, targets, 200)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert one.state[a].keys() == two.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one.state[a][key], two.state[b][key]) for key in two.state[b])
        assert one.state[a]["step"].dtype == two.state[b]["step"].dtype


def test_each_parameter_draws_bits_of_its_own():
    """Equal weights with equal gradients, in one group or two, and again with the same seed."""
    ends = []
    for seed in (0, 0, 1):
        some = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(3)]
        lists = [{"params": some[:2]}, {"params": some[2:]}]
        optimizer = StochasticAdamW(lists, lr=2e-3, weight_decay=0.0, seed=seed)
        for parameter in some:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ends.append([parameter.detach() for parameter in some])
    first, again, other = ends
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(first[a], first[b])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_in_the_step_is_that_of_float64(weights, max_norm):
    """The step errs no more than clipping in a pass of its own, but for its own rounding."""
    torch.manual_seed(0)
    start = [torch.randn(64, 33).bfloat16(), torch.randn(33)]
    grads = [3 * torch.randn_like(x) for x in start]
    ends = []
    for ours in (True, False):
        model = nn.ParameterList(
            x.float() if weights == "fp32" or x.ndim == 1 else x.clone() for x in start
        )
        optimizer = optimizer_of(model, config.Optim(lr=1e-2, weights=weights))
        for step in range(3):
            for p, grad in zip(model, grads, strict=True):
                p.grad = (grad * (step + 1)).to(p.dtype)
            if ours:
                norm = torch.stack([p.grad.double().norm() for p in model]).norm().float()
                prepare(optimizer, norm, max_norm, torch.zeros(()))
            else:
                torch.nn.utils.clip_grad_norm_(model, max_norm)
            optimizer.step()
        ends.append([optimizer.state[p][key] for p in model for key in ("exp_avg", "exp_avg_sq")])
    want = []
    for grad, p in zip(grads, model, strict=True):
        m = v = torch.zeros(grad.shape, dtype=torch.float64)
        for step in range(3):
            every = [
                (g * (step + 1)).to(q.dtype).double() for g, q in zip(grads, model, strict=True)
            ]
            norm = torch.stack([g.norm() for g in every]).norm()
            g = (grad * (step + 1)).to(p.dtype).double() * min(1, max_norm / (norm + 1e-6))
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        want += [m, v]
    for mine, theirs, exact in zip(*ends, want, strict=True):
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (mine, theirs)]
        assert errors[0] <= errors[1] + 2e-7


def test_found_inf_leaves_weights_moments_and_step_counts():
    for dtype in (torch.float32, torch.bfloat16):
        parameters, targets = problem(dtype)
        optimizer = StochasticAdamW(groups(parameters))
        run(optimizer, parameters, targets, 2)
        states = [x for p in parameters for x in (p, *optimizer.state[p].values())]
        before = [x.detach().clone() for x in states]
        prepare(optimizer, torch.tensor(math.nan), 1.0, torch.ones(()))
        for p in parameters:
            p.grad = torch.full_like(p, math.nan)
        optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(states, before, strict=True))
        prepare(optimizer, torch.tensor(1.0), 1.0, torch.zeros(()))
        run(optimizer, parameters, targets, 1)
        assert not any(torch.equal(x, y) for x, y in zip(states, before, strict=True))


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
    with pytest.raises(ValueError, match="moments: expected contiguous fp32"):
        optimizer.step()


# ---- models ----


def fresh(cfg=BF16):
    torch.manual_seed(7)
    model = Transformer(SHAPE)
    to_weights(model, cfg)
    return model, optimizer_of(model, cfg, seed=3)


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
    optimizer = optimizer_of(model, cfg)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        group = group_of[id(p)]
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.1, 0.2), 1e-8)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_rates_fall_from_layer_to_layer(weights):
    """Adam's first step moves each weight by its rate, with any gradient."""
    cfg = config.Optim(
        lr=2.0**-6, warmup_ratio=0, weight_decay=0, layer_decay=0.25, weights=weights
    )
    model, optimizer = fresh(cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    set_rates(optimizer, 0, config.Run(steps=10, optim=cfg))
    optimizer.step()
    shares = {"embed_tokens": 1 / 16, "layers.0": 1 / 4, "layers.1": 1, "norm": 1}
    for name, p in model.named_parameters():
        share = next(share for begin, share in shares.items() if name.startswith(begin))
        moved = (p.detach().float() - before[name].float()).abs().mean()
        # bf16 weights are rounded stochastically.
        tolerance = 1e-3 if p.dtype == torch.float32 else 0.2
        assert moved == pytest.approx(share * cfg.lr, rel=tolerance), name


def test_transformer_learns():
    model, optimizer = fresh()
    losses = train(model, optimizer, 60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_resumed_training_repeats_bit_for_bit(tmp_path):
    """Weights, moments and step counts are restored, of which the rounding is a function."""
    model, optimizer = fresh()
    train(model, optimizer, 3)
    with checkpoint.Saver(tmp_path, 0, 1, keep=1) as saver:
        tensors = checkpoint.training_tensors(model, optimizer, 0)
        saver.save(3, tensors, lambda p: pretrained.describe(model.cfg, p))
    path = tmp_path / "step_00000003"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 4)
    ends = []
    # The second time with other random bits.
    for seed in (3, 99):
        again = pretrained.load(str(path))
        to_weights(again, BF16)
        for name, p in again.named_parameters():
            assert p.dtype == before[name].dtype and torch.equal(p, before[name]), name
        resumed = optimizer_of(again, BF16, seed)
        assert checkpoint.restore(path, again, resumed, 0, 1)["step"] == 3
        torch.manual_seed(1)
        train(again, resumed, 4)
        mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
        ends.append(all(torch.equal(mine[name], theirs[name]) for name in mine))
        if seed == 3:
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
    optimizer = optimizer_of(model, BF16)
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


def test_wsd_schedule():
    rates = schedule(100, lr=2.0, warmup_ratio=0.1, min_lr_ratio=0.1, schedule="wsd")
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:80] == [2.0] * 70
    assert rates[79:] == pytest.approx([0.2 + 1.8 * (1 - (i / 20) ** 0.5) for i in range(21)])


def test_wsd_is_prolonged_from_before_its_decay():
    """A longer run has the same rates up to where the shorter one decays."""
    options = {"lr": 1.0, "warmup_steps": 5, "schedule": "wsd"}
    short, long = schedule(50, **options), schedule(500, **options)
    assert short[:40] == long[:40] and short[40] < long[40]


def test_constant_schedule():
    assert schedule(6, lr=3.0, warmup_steps=2, schedule="constant") == [1.5, *[3.0] * 5]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_schedule_at_its_edges(name, steps, warmup, floor):
    rates = schedule(steps, lr=1.0, warmup_ratio=warmup, min_lr_ratio=floor, schedule=name)
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates) and max(rates) == pytest.approx(1.0)
    if warmup == 0 and steps > 1:
        assert rates[0] == 1.0
        assert rates[-1] == pytest.approx(1.0 if name == "constant" else floor)
