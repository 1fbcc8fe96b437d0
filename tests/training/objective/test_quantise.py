"""Straight-through gradients by hand, the loss of rounded vectors, and steps of several packs."""

from dataclasses import replace

import pytest
import torch
from factories import small_job, small_text
from objective_truth import ALONE, OBJECTIVES, batch_of, ragged, run_of, table
from processes import gloo_once

from mlembed.config import Loss
from mlembed.training.objective import quantise
from mlembed.training.objective.loss import loss_table
from train import one_step

KINDS = ["int8", "binary"]


def by_hand(x_END, kind):
    """Return q(x) and where its gradient passes, number by number."""
    made, passes = torch.empty_like(x_END), torch.empty_like(x_END)
    for e, n in torch.cartesian_prod(*(torch.arange(size) for size in x_END.shape[:2])).tolist():
        row = x_END[e, n].tolist()
        r = (sum(x * x for x in row) / len(row)) ** 0.5
        for i, x in enumerate(row):
            if kind == "binary":
                made[e, n, i] = r if x > 0 else -r
                passes[e, n, i] = abs(x) <= quantise.CLIP * r
            else:
                step = quantise.RANGE * r / 127
                made[e, n, i] = step * max(-127, min(127, round(x / (step or 1))))
                passes[e, n, i] = abs(x) <= quantise.RANGE * r
    return made, passes


def vectors():
    x_END = ragged().vectors.clone()
    # A number beyond the range, one at zero, and a vector of zeros.
    x_END[0, 0] = 0.01
    x_END[0, 0, 3] = 50.0
    x_END[1, 2, 4], x_END[1, 5] = 0.0, 0.0
    return x_END


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through(kind, monkeypatch):
    monkeypatch.setattr(quantise, "RANGE", 2.0)
    x_END = vectors().requires_grad_()
    want, passes = by_hand(x_END.detach(), kind)
    got = quantise.quantised(x_END, kind)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-300)
    grad = torch.randn(x_END.shape, generator=torch.Generator().manual_seed(1)).double()
    got.backward(grad)
    assert torch.equal(x_END.grad, grad * passes) and 0 < (passes == 0).sum() < passes.numel()
    narrow = quantise.quantised(x_END.detach().bfloat16(), kind)
    assert narrow.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["symmetric-shared", "bitext-own", "sts"])
def test_loss_is_the_mean_of_both(kind, name):
    """The rounded part is the loss of vectors that are rounded by hand, its gradient passed on."""
    task, options = OBJECTIVES[name]
    sample = ragged()._replace(vectors=vectors() + 0.01)
    rounded, passes = by_hand(sample.vectors, kind)
    run = run_of(**options, quantise=kind, quantise_weight=0.3)
    plain = table(sample, task, run)
    stored = table(sample._replace(vectors=rounded), task, run)
    batch = batch_of(sample, task)
    order = batch.rows[batch.place.argsort()]
    leaf = sample.vectors.clone().requires_grad_()
    for loss, w in ((run.loss, 0.3), (replace(run.loss, quantise_weight=1.0), 1.0)):
        leaf.grad = None
        terms = quantise.mixed(
            lambda x: {"contrastive": loss_table(x, batch, run, ALONE)}, leaf[:, order], loss
        )
        got_EM = terms["contrastive"]
        weights_EM = torch.arange(1.0, 1 + got_EM.numel()).view_as(got_EM).to(got_EM)
        (got_EM * weights_EM).sum().backward()
        torch.testing.assert_close(got_EM, (1 - w) * plain[0] + w * stored[0], rtol=1e-12, atol=0)
        want = (1 - w) * plain[1] + w * stored[1] * passes
        torch.testing.assert_close(leaf.grad, want, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(plain[0], stored[0], rtol=1e-3)


def test_without_quantise_the_loss_is_called_once():
    calls = []
    terms = quantise.mixed(lambda x: calls.append(x) or {"a": x}, torch.ones(1, 2, 3), Loss())
    assert len(calls) == 1 and terms["a"] is calls[0]


def test_memory_bank_is_refused():
    with pytest.raises(ValueError, match=r"loss\.quantise: expected none with a memory bank"):
        Loss(quantise="binary", memory_bank=64)


# ---- steps ----

OPTIONS = ["--pack-tokens", "23", "--loss.quantise", "binary"]


def gradients(where, folder, *options):
    """Return loss_EM of the first step, and its gradients by name."""
    data = [str(folder / name) for name in ("pairs.jsonl", "nway.jsonl")]
    job = small_job(folder, data, *OPTIONS, *options, where=where)
    if job.run.gradient_cache:
        job = replace(job, budget=1.0)
    made = {}

    def read(optimizer, args, kwargs):
        made.update({name: p.grad.clone() for name, p in job.model.named_parameters()})

    job.optimizer.register_step_pre_hook(read)
    result = one_step(job, 0, iter([job.batches[0]]))
    job.saver.close()
    return result.losses["contrastive"], made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    small_text(folder, ragged=True)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return gradients(ALONE, folder)


def same(got, want):
    assert got.keys() == want.keys() and len(want) > 20
    for name, gradient in want.items():
        assert gradient.norm() > 0 and (got[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_gradient_cache(folder, alone):
    got_EM, got = gradients(ALONE, folder, "--gradient-cache")
    torch.testing.assert_close(got_EM, alone[0], rtol=2e-6, atol=0)
    same(got, alone[1])
    plain_EM, _ = gradients(ALONE, folder, "--loss.quantise", "none")
    assert not torch.allclose(plain_EM, got_EM, rtol=1e-2)


@pytest.mark.parametrize("across", ["gather", "ring"])
def test_two_processes(folder, alone, across):
    options = "--loss.negatives-across", across
    found = gloo_once(2, gradients, folder, *options)
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, alone[0], rtol=2e-6, atol=0)
    for _, got in found:
        same(got, alone[1])
