"""Muon with AdamW: torch's two optimisers alone, clipping, processes, and a restored state."""

import dataclasses
from functools import partial

import pytest
import torch
from factories import tiny_shape
from processes import gloo_once
from torch.distributed.tensor import DTensor, distribute_tensor

from mlembed import config
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import checkpoint
from mlembed.runtime.distributed import World
from mlembed.training.engine import Engine
from mlembed.training.muon import MuonWithAdamW
from mlembed.training.optim import optimizer_of, prepare, set_rates

SHAPE = tiny_shape(vocab_size=50, hidden_size=16, head_dim=8, intermediate_size=24, ranks=(4, 8))
CFG = config.Optim(lr=1e-2, name="muon", weight_decay=0.1, layer_decay=0.5)
NO = torch.zeros(())


def fresh(cfg=CFG):
    torch.manual_seed(7)
    model = Transformer(SHAPE)
    return model, optimizer_of(model, cfg)


def by_muon(name, p):
    return name.startswith("layers.") and p.ndim == 2


def give_gradients(model, step, scale=1.0):
    """Give every parameter a gradient that depends on its name and the step alone."""
    for number, (_, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        gradient = scale * torch.randn(p.shape, generator=generator)
        if isinstance(p, DTensor):
            gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
        p.grad = gradient


def test_steps_are_those_of_torch():
    """The matrices of layers by torch.optim.Muon, all else by its AdamW, to the bit."""
    model, optimizer = fresh()
    other, _ = fresh()
    run = config.Run(model=SHAPE, steps=6, optim=CFG)
    named = list(other.named_parameters())
    shares = {"embed": 0.25, **{f"layers.{i}.": 0.5 ** (1 - i) for i in range(2)}}
    assert len(other.layers) == 2

    def group(p, name):
        share = next((s for start, s in shares.items() if name.startswith(start)), 1.0)
        decay = CFG.weight_decay if p.ndim > 1 else 0.0
        return {"params": [p], "weight_decay": decay, "share": share}

    muon = torch.optim.Muon(
        [group(p, n) for n, p in named if by_muon(n, p)], adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [group(p, n) for n, p in named if not by_muon(n, p)], betas=CFG.betas, fused=True
    )
    assert 0 < len(muon.param_groups) < len(named)
    for step in range(6):
        for one in (model, other):
            give_gradients(one, step)
        for one in (optimizer, muon, adamw):
            set_rates(one, step, run)
        for one in (optimizer, muon, adamw):
            one.step()
    for (name, got), want in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_updates_have_the_size_of_adamws():
    """A rate of AdamW holds: both first steps move a matrix by about 0.2 and 1 of it a number."""
    moved = {}
    for name in ("adamw", "muon"):
        cfg = dataclasses.replace(CFG, name=name, weight_decay=0.0, layer_decay=1.0)
        model, optimizer = fresh(cfg)
        before = model.layers[0].mlp.up_proj.weight.detach().clone()
        give_gradients(model, 0)
        optimizer.step()
        difference = model.layers[0].mlp.up_proj.weight.detach() - before
        moved[name] = difference.square().mean().sqrt().item() / cfg.lr
    assert moved["adamw"] == pytest.approx(1, rel=1e-3) and 0.1 < moved["muon"] < 0.3


def test_clips_like_adamw():
    """Gradients divided before a step, and divided by it, give the same weights."""
    results = []
    for clipped in (False, True):
        model, optimizer = fresh()
        for step in range(3):
            give_gradients(model, step, scale=1.0 if clipped else 0.125)
            if clipped:
                prepare(optimizer, torch.tensor(8.0 - 1e-6), 1.0, NO)
            optimizer.step()
        results.append(dict(model.named_parameters()))
    for name, want in results[0].items():
        assert torch.allclose(results[1][name], want, rtol=1e-5, atol=1e-7), name


def test_infinite_gradient_changes_nothing():
    model, optimizer = fresh()
    give_gradients(model, 0)
    prepare(optimizer, torch.tensor(1.0), 1.0, NO)
    optimizer.step()
    tensors = [*model.parameters(), *(x for s in optimizer.state.values() for x in s.values())]
    before = [x.detach().clone() for x in tensors]
    give_gradients(model, 1)
    model.layers[0].mlp.up_proj.weight.grad[0, 0] = torch.inf
    prepare(optimizer, torch.tensor(torch.inf), 1.0, torch.ones(()))
    optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    prepare(optimizer, torch.tensor(1.0), 1.0, NO)
    give_gradients(model, 1)
    optimizer.step()
    assert not any(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_restored_state_goes_on_bit_for_bit(tmp_path):
    model, optimizer = fresh()

    def steps(model, optimizer, numbers):
        for step in numbers:
            give_gradients(model, step)
            optimizer.step()

    steps(model, optimizer, range(3))
    with checkpoint.Saver(tmp_path, 0, 1, 2) as saver:
        tensors = checkpoint.training_tensors(model, optimizer, 0)
        saver.save(3, tensors, partial(pretrained.describe, model.cfg))
    steps(model, optimizer, range(3, 6))
    torch.manual_seed(1)
    again = Transformer(SHAPE)
    resumed = optimizer_of(again, CFG)
    assert checkpoint.restore(tmp_path / "step_00000003", again, resumed, 0, 1)["step"] == 3
    steps(again, resumed, range(3, 6))
    for (name, want), got in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(got, want), name
        keys = {"momentum_buffer"} if by_muon(name, want) else {"step", "exp_avg", "exp_avg_sq"}
        a, b = optimizer.state[want], resumed.state[got]
        assert a.keys() == b.keys() == keys and all(torch.equal(a[k], b[k]) for k in keys)


def test_bf16_weights_are_refused():
    with pytest.raises(ValueError, match=r"optim\.weights: expected fp32 with muon, got bf16"):
        config.Optim(name="muon", weights="bf16")


# ---- processes ----


def stepped(where, engine):
    """Return the weights after three steps on every process, whole."""
    torch.manual_seed(7)
    run = config.Run(model=SHAPE, engine=engine, optim=CFG)
    model = Transformer(SHAPE)
    Engine.of(model, run, where, False)
    optimizer = optimizer_of(model, CFG)
    assert isinstance(optimizer, MuonWithAdamW)
    for step in range(3):
        give_gradients(model, step)
        prepare(optimizer, torch.tensor(2.0), 1.0, NO)
        optimizer.step()
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_processes_equal_one(engine):
    alone = stepped(World(0, 1, torch.device("cpu")), "ddp")
    start = dict(fresh()[0].named_parameters())
    for got in gloo_once(2, stepped, engine):
        for name, want in alone.items():
            # Sharded products are summed in another order, in bf16.
            limit = 0.02 if engine == "fsdp" and by_muon(name, want) else 1e-6
            moved = (want - start[name]).norm()
            assert moved > 0 and (got[name] - want).norm() <= limit * moved, name
