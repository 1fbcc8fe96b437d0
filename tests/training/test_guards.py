"""Steps with NaN or infinity are skipped or stop the run; out-of-memory errors come with advice."""

import json
import math
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import metrics, small_job, write_jsonl
from torch import ops
from torch.utils._python_dispatch import TorchDispatchMode

import train
from mlembed import config
from mlembed.runtime import process
from mlembed.runtime.errors import out_of_memory
from mlembed.training import guards
from train import guarded, settle

NAME = "layers.1.mlp.down_proj.weight"


@pytest.fixture
def make(tmp_path):
    """Return a function that sets up a run of four steps and its batches; close the run's saver."""
    jobs = []

    def make(*options):
        rows = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(40)]
        data = [write_jsonl(tmp_path / "pairs.jsonl", rows)]
        jobs.append(small_job(tmp_path, data, "--steps", 4, *options))
        return jobs[0], iter([jobs[0].batches[i] for i in range(4)])

    yield make
    for job in jobs:
        job.saver.close()


def snapshot(job):
    """Return copies of weights and moments by name."""
    tensors = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    for i, state in enumerate(job.optimizer.state.values()):
        tensors |= {f"{i}.{key}": value.clone() for key, value in state.items()}
    return tensors


def poison(job):
    """Put a NaN into the gradient of one parameter from now on, and return the hook."""

    def hook(grad):
        return torch.where(torch.arange(grad.numel()).view_as(grad) == 3, math.nan, grad)

    return dict(job.model.named_parameters())[NAME].register_hook(hook)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_bad_gradient_is_skipped(make, tmp_path, capsys, weights):
    options = "--optim.weights", weights, "--precision", "bf16" if weights == "bf16" else "fp32"
    job, feed = make("--non-finite", "skip", "--loss.memory-bank", 64, *options)
    guarded(job, 0, feed)
    assert settle(job)
    before, bank = snapshot(job), job.bank.state()
    hook = poison(job)
    guarded(job, 1, feed)
    after = snapshot(job)
    assert before.keys() == after.keys() and len(before) > 40
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not metrics(tmp_path / "run", "skipped")
    hook.remove()
    # The next step reports it before its loss, and leaves the bad documents out of the bank.
    guarded(job, 2, feed)
    assert job.bank.state().keys() == bank.keys()
    printed = capsys.readouterr().out
    assert f"skipped step 2, source pairs: non-finite gradient of {NAME}" in printed
    assert settle(job)
    assert len(job.bank.state()) > len(bank) > 0
    assert all(x.isfinite().all() for x in snapshot(job).values())
    assert not torch.equal(before[NAME], snapshot(job)[NAME])
    (line,) = metrics(tmp_path / "run", "skipped")
    assert line == {"step": 2, "kind": "skipped", "source": "pairs", "bad": f"gradient of {NAME}"}


class Waits(TorchDispatchMode):
    """Counts reads of a tensor's value, for which the host would wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (ops.aten._local_scalar_dense.default, ops.aten.equal.default)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("bad", [False, True])
def test_an_update_reads_nothing_of_the_device(make, bad, monkeypatch):
    job, feed = make("--non-finite", "skip")
    waits, real = Waits(), train.update

    def update(*args):
        with waits:
            return real(*args)

    with waits:
        assert torch.ones(()).item()
    assert waits.count == 1
    monkeypatch.setattr(train, "update", update)
    guarded(job, 0, feed)
    if bad:
        poison(job)
    guarded(job, 1, feed)
    assert waits.count == 1
    assert settle(job) is not bad and not job.unread


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_ends_the_run_once_all_know(make, monkeypatch, at, size):
    """One process knows at once; several read it in the next step, without waiting for this one."""
    job, _ = make("--log-every", 100)
    real, alone = train.guarded, job.where
    handlers = {number: signal.getsignal(number) for number in process.SIGNALS}

    def guarded(job, step, feed):
        if step + 1 == at:
            signal.raise_signal(signal.SIGTERM)
        return real(replace(job, where=alone), step, feed)

    save = train.save
    monkeypatch.setattr(train, "guarded", guarded)
    monkeypatch.setattr(train, "save", lambda job, step: save(replace(job, where=alone), step))
    process.begin()
    try:
        where = replace(alone, size=size)
        with process.hold_signals():
            assert train.optimise(replace(job, where=where), 0) == at + size - 1
    finally:
        process.begin()  # forgets the signal
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not job.unread


def test_a_run_reports_a_bad_step_before_the_next_update(make, tmp_path, monkeypatch):
    """Steps that are not logged are read one step later, and the last one at the end."""
    job, _ = make("--non-finite", "skip", "--log-every", 3, "--save-every", 0)
    real, factor = train.loss_table, {1: math.nan, 3: math.nan}
    numbers = iter(range(4))
    monkeypatch.setattr(
        train, "loss_table", lambda *args: real(*args) * factor.get(next(numbers), 1.0)
    )
    train.optimise(job, 0)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("skipped", 2), ("train", 3), ("skipped", 4)
    ]  # fmt: skip


def test_bad_gradient_stops_and_saves(make, tmp_path):
    job, feed = make()
    guarded(job, 0, feed)
    before = snapshot(job)
    poison(job)
    guarded(job, 1, feed)
    with pytest.raises(ValueError, match=rf"non-finite gradient of {NAME} at step 2, source pairs"):
        guarded(job, 2, feed)
    job.saver.wait()
    after = snapshot(job)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_bad_loss_is_named_by_exit_and_width(make, monkeypatch, tmp_path):
    job, feed = make("--non-finite", "skip")
    real, factor = train.loss_table, torch.tensor([[1.0, 1.0], [math.inf, 1.0]])
    monkeypatch.setattr(train, "loss_table", lambda *args: real(*args) * factor)
    guarded(job, 0, feed)
    assert not settle(job)
    (line,) = metrics(tmp_path / "run", "skipped")
    assert line["bad"] == "contrastive loss of exit 2 at width 8 (inf)"


def test_bad_weights_always_stop(make, tmp_path):
    job, feed = make("--non-finite", "skip")
    with torch.no_grad():
        job.model.layers[0].mlp.up_proj.weight[2, 3] = math.inf
    guarded(job, 0, feed)
    with pytest.raises(ValueError, match="non-finite weight layers.0.mlp.up_proj.weight at step 1"):
        settle(job)
    job.saver.wait()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_a_checkpoint_is_finite(make, tmp_path, kind):
    """An update may spoil weights though gradients are finite; the checkpoint before it stays."""
    job, feed = make()
    guarded(job, 0, feed)
    train.save(job, 1)
    guarded(job, 1, feed)
    weight = dict(job.model.named_parameters())[NAME]
    spoilt = weight if kind == "weight" else job.optimizer.state[weight]["exp_avg"]
    with torch.no_grad():
        spoilt[1, 2] = math.nan
    name = f"model.{NAME}" if kind == "weight" else f"optimizer.{NAME}.exp_avg"
    with pytest.raises(ValueError, match=f"finite numbers after step 2, got others in {name}: "):
        train.save(job, 2)
    job.saver.wait()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_advice_names_a_plausible_cause():
    rate = "lower --optim.lr"
    assert rate in guards.non_finite_advice("contrastive loss of exit 2 at width 8 (inf)", 1)
    assert rate in guards.non_finite_advice(f"weight {NAME}", 1)
    first = guards.non_finite_advice("contrastive loss of exit 2 at width 8 (inf)", 0)
    assert rate not in first and "--precision fp32" in first


def test_bad_loss_and_bad_weight():
    table = torch.ones(2, 3)
    assert guards.bad_loss(table, (1, 2), (8, 16, 32)) is None
    table[1, 2] = math.nan
    assert guards.bad_loss(table, (1, 2), (8, 16, 32)) == "loss of exit 2 at width 32 (nan)"
    model = torch.nn.Linear(2, 2)
    assert guards.bad_weight(model) is None
    model.bias.data[0] = math.nan
    assert guards.bad_weight(model) == "weight bias"


# ---- memory ----


def test_host_allocator_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**58, dtype=torch.uint8)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    advice = guards.oom_advice(error.value, config.Run(), 3, 1000, math.inf, 0.0)
    assert "at step 3" in advice and f"asked for {2**28:.3g} GiB" in advice
    assert "--gradient-cache" in advice and "--pack-tokens 500" in advice


CUDA = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 79 GiB"


@pytest.mark.parametrize(
    ("cached", "graphs", "option"),
    [
        (False, math.inf, "--gradient-cache, whose graphs take one pack of 4096 tokens"),
        (True, 20.0, "--activation-gib 17.8 (was 20)"),
        (True, 1.0, "--pack-tokens 2048 (the largest pack had 4096)"),
    ],
)
def test_advice_by_numbers(cached, graphs, option):
    """A request of 3 GiB with 1 free lacks 2, or 2.2 with the margin."""
    error = torch.OutOfMemoryError(CUDA)
    assert out_of_memory(error)
    run = config.Run(gradient_cache=cached)
    advice = guards.oom_advice(error, run, 7, 4096, graphs * 2**30, 2.0**30)
    assert option in advice and "short by at least 2 GiB" in advice and "step 7" in advice


def test_step_beyond_memory_has_advice(make, monkeypatch):
    """The real allocator fails within a real step."""
    job, feed = make()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def allocate(*args, **options):
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
        torch.empty(2**31, dtype=torch.uint8)

    monkeypatch.setattr(type(job.engine), "forward", allocate)
    try:
        with pytest.raises(ValueError, match=r"memory: .*step 1.*asked for 2 GiB.*pack-tokens"):
            guarded(job, 0, feed)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_other_errors_pass_unchanged(make, monkeypatch):
    job, feed = make()

    def fail(*args, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(type(job.engine), "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        guarded(job, 0, feed)
