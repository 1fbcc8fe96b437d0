"""Moving averages of the weights: by hand in float64, in runs, resumed, and on two processes."""

import json
import shutil

import processes
import pytest
import torch
from factories import SMALL, metrics, small_text
from torch import nn

from mlembed import config
from mlembed.modeling import pretrained
from mlembed.runtime import checkpoint
from mlembed.runtime.checkpoint import path_of
from mlembed.training import average

DECAY = 0.5


def test_averages_by_hand():
    """A step that is left out changes no average, and the first steps count more."""
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    still = nn.Parameter(torch.randn(2))
    optimizer = torch.optim.AdamW([*weights, still], lr=0.1)
    want = None
    for step in range(12):
        for w in weights:
            w.grad = torch.randn_like(w)
        optimizer.step()
        found = torch.tensor(float(step == 5))
        average.update(optimizer, DECAY, step, found)
        now = [w.detach().double() for w in weights]
        if want is None:
            want = now
        elif step != 5:
            share = 1 - min(DECAY, (1 + step) / (10 + step))
            want = [a + share * (w - a) for a, w in zip(want, now, strict=True)]
    for w, a in zip(weights, want, strict=True):
        got = optimizer.state[w][average.KEY]
        torch.testing.assert_close(got.double(), a, rtol=1e-6, atol=1e-7)
    # Nothing averages weights that are not trained.
    assert still not in optimizer.state
    assert (1 + 5) / (10 + 5) < DECAY < (1 + 11) / (10 + 11)


def test_swapped_and_taken():
    w = nn.Parameter(torch.randn(7))
    optimizer = torch.optim.AdamW([w], lr=0.1)
    assert not average.take(optimizer)
    for step in range(3):
        w.grad = torch.randn_like(w)
        optimizer.step()
        average.update(optimizer, DECAY, step, torch.tensor(0.0))
    last, averaged = w.detach().clone(), optimizer.state[w][average.KEY].clone()
    assert not torch.equal(last, averaged)
    with pytest.raises(KeyError), average.swapped(optimizer):
        assert torch.equal(w, averaged)
        raise KeyError
    assert torch.equal(w, last) and torch.equal(optimizer.state[w][average.KEY], averaged)
    assert average.take(optimizer) and torch.equal(w, averaged)


def test_bf16_weights_are_refused():
    with pytest.raises(ValueError, match=r"optim\.weights: expected fp32 with ema, got bf16"):
        config.Optim(ema=0.9, weights="bf16")


# ---- runs ----

STEPS = 8


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    data = ["--data", *small_text(folder), "--eval", str(folder / "dev.jsonl"), "--tracker", "none"]
    often = ["--eval-every", 1, "--save-every", 1, "--keep-checkpoints", 99, "--steps", STEPS]
    return ["tiny", *SMALL, *data, *often, "--optim.ema", DECAY, "--optim.lr", 0.02]


def train(*args, size=1):
    done = processes.run("train.py", *args, processes=size)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    output = train(*arguments, "--output-dir", folder)
    assert f"ema    report and model have weights averaged with decay {DECAY}" in output
    return folder / "tiny"


def weights_of(run, step):
    return dict(pretrained.load(str(path_of(run / "checkpoints", step))).named_parameters())


def exported(run):
    return dict(pretrained.load(str(run / "model")).named_parameters())


def test_exported_weights_are_the_averages_of_the_steps(whole):
    want = weights_of(whole, 1)
    for step in range(1, STEPS):
        share = 1 - min(DECAY, (1 + step) / (10 + step))
        now = weights_of(whole, step + 1)
        want = {name: a + share * (now[name] - a) for name, a in want.items()}
    last = weights_of(whole, STEPS)
    stored = checkpoint.read(path_of(whole / "checkpoints", STEPS), "optimizer.")
    for name, got in exported(whole).items():
        torch.testing.assert_close(got, want[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(got, last[name], rtol=1e-4)
        assert torch.equal(got, stored[f"optimizer.{name}.average"])


def test_resumed_run_has_the_same_averages(arguments, whole, tmp_path):
    run = tmp_path / "tiny"
    train(*arguments, "--output-dir", tmp_path)
    shutil.rmtree(run / "model")
    for step in range(4, STEPS + 1):
        shutil.rmtree(path_of(run / "checkpoints", step))
    train(*arguments, "--output-dir", tmp_path, "--resume")
    for name in ("model.safetensors", "mlembed_factors.safetensors"):
        assert (run / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_average_like_one(arguments, whole, tmp_path, engine):
    train(*arguments, "--output-dir", tmp_path, "--engine", engine, size=2)
    alone = exported(whole)
    for name, got in exported(tmp_path / "tiny").items():
        assert (got - alone[name]).norm() < 2e-3 * alone[name].norm(), name


def test_best_score_is_that_of_its_averages(arguments, tmp_path):
    output = train(
        *arguments, "--output-dir", tmp_path, "--keep-best", "mean", "--optim.lr", 1,
        "--optim.warmup-ratio", 0, "--optim.schedule", "constant",
    )  # fmt: skip
    run = tmp_path / "tiny"
    by_step = {line["step"]: line["score"] for line in metrics(run, "eval") if line["step"]}
    step = max(by_step, key=by_step.get)
    assert f"best   step {step} of {STEPS}" in output
    cells = json.loads((run / "report" / "grid.json").read_text())["cells"]
    (full,) = (c for c in cells if (c["dim"], c["exit"], c["rank"]) == (32, 2, 16))
    assert 100 * full["scores"]["dev"]["score"] == pytest.approx(by_step[step])
    stored = checkpoint.read(path_of(run / "checkpoints", step), "optimizer.")
    for name, got in exported(run).items():
        assert torch.equal(got, stored[f"optimizer.{name}.average"])
