"""Numbers that are not finite and memory that is not there: found before they do harm, and said."""

import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlembed import config
from mlembed.runtime.distributed import World
from mlembed.runtime.log import Log
from mlembed.training import guards
from mlembed.training.arguments import parse
from mlembed.training.setup import set_up
from train import guarded

ALONE = World(0, 1, torch.device("cpu"))
SMALL = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.head-dim", "8"),
    *("--model.intermediate-size", "48", "--model.vocab-size", "400", "--model.exits", "1", "2"),
    *("--model.matryoshka-dims", "8", "32", "--model.ranks", "8", "16", "--batch-size", "8"),
    *("--precision", "fp32"),
    *("--max-length", "32", "--compile", "off", "--steps", "4", "--tracker", "none"),
]


def job_of(folder, *options):
    rows = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    args = ["tiny", *SMALL, "--data", str(folder / "pairs.jsonl"), *map(str, options)]
    run = replace(parse(args), eval=())
    (folder / "run").mkdir(exist_ok=True)
    job = set_up(run, ALONE, folder / "run", None, Log(folder / "run", main=True))
    return job, iter([job.batches[i] for i in range(4)])


def snapshot(job):
    """Weights and moments."""
    tensors = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    for i, state in enumerate(job.optimizer.state.values()):
        tensors |= {f"{i}.{key}": value.clone() for key, value in state.items()}
    return tensors


def poisoned(job, name):
    """From now on the gradient of one parameter holds a NaN."""
    parameter = dict(job.model.named_parameters())[name]

    def hook(grad):
        return torch.where(torch.arange(grad.numel()).view_as(grad) == 3, math.nan, grad)

    return parameter.register_hook(hook)


NAME = "layers.1.mlp.down_proj.weight"


def test_a_bad_gradient_is_skipped_and_harms_nothing(tmp_path, capsys):
    job, feed = job_of(tmp_path, "--non-finite", "skip", "--loss.memory-bank", 64)
    assert guarded(job, 0, feed).bad is None
    before, held = snapshot(job), job.bank.state()
    hook = poisoned(job, NAME)
    result = guarded(job, 1, feed)
    assert result.bad == f"gradient of {NAME}"
    after = snapshot(job)
    assert before.keys() == after.keys() and len(before) > 40
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert job.bank.state().keys() == held.keys()  # nor are its documents negatives of others
    assert f"skipped step 2, source pairs: gradient of {NAME}" in capsys.readouterr().out
    hook.remove()
    assert guarded(job, 2, feed).bad is None
    assert len(job.bank.state()) > len(held) > 0
    assert all(x.isfinite().all() for x in snapshot(job).values())
    assert not torch.equal(before[NAME], snapshot(job)[NAME])
    (line,) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line == {"step": 2, "kind": "skipped", "source": "pairs", "bad": f"gradient of {NAME}"}
    job.saver.close()


def test_a_bad_gradient_stops_the_run_with_what_was_before_saved(tmp_path):
    job, feed = job_of(tmp_path)
    guarded(job, 0, feed)
    before = snapshot(job)
    poisoned(job, NAME)
    with pytest.raises(ValueError, match=rf"step 2, source pairs: gradient of {NAME}"):
        guarded(job, 1, feed)
    job.saver.wait()
    after = snapshot(job)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]
    job.saver.close()


def test_a_bad_loss_is_named_by_exit_and_width(tmp_path, monkeypatch):
    job, feed = job_of(tmp_path, "--non-finite", "skip")
    import train

    real = train.loss_table

    def bad(*args):
        table = real(*args)
        return table * torch.tensor([[1.0, 1.0], [math.inf, 1.0]])

    monkeypatch.setattr(train, "loss_table", bad)
    assert guarded(job, 0, feed).bad == "loss of exit 2 at width 8 is inf (contrastive)"
    job.saver.close()


def test_bad_weights_always_stop(tmp_path):
    job, feed = job_of(tmp_path, "--non-finite", "skip")
    with torch.no_grad():
        job.model.layers[0].mlp.up_proj.weight[2, 3] = math.inf
    with pytest.raises(ValueError, match="weight layers.0.mlp.up_proj.weight"):
        guarded(job, 0, feed)
    job.saver.wait()
    assert not (tmp_path / "run" / "checkpoints").exists()
    job.saver.close()


# ---- memory ----


def test_the_hosts_allocator_is_recognised(tmp_path):
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**58, dtype=torch.uint8)
    assert guards.out_of_memory(error.value)
    assert not guards.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    oom_advice = guards.oom_advice(error.value, config.Run(), 3, 1000, math.inf, 0.0)
    assert "at step 3" in oom_advice and f"expected {2**28:.3g} GiB more" in oom_advice
    assert "--gradient-cache" in oom_advice and "--pack-tokens 500" in oom_advice


CUDA = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 79 GiB"


@pytest.mark.parametrize(
    ("cached", "graphs", "says"),
    [
        (False, math.inf, "--gradient-cache, whose graphs take one pack of 4096 tokens"),
        (True, 20.0, "--activation-gib 17.8 (it was 20)"),
        (True, 1.0, "--pack-tokens 2048 (the largest pack had 4096)"),
    ],
)
def test_advice_by_numbers(cached, graphs, says):
    """3 GiB were asked for and 1 was free: 2 are missing, 2.2 with the margin."""
    run = config.Run(gradient_cache=cached)
    error = torch.OutOfMemoryError(CUDA)
    assert guards.out_of_memory(error)
    oom_advice = guards.oom_advice(error, run, 7, 4096, graphs * 2**30, 2.0**30)
    assert says in oom_advice and "short by at least 2 GiB" in oom_advice and "step 7" in oom_advice


def test_a_step_beyond_memory_says_which_knob(tmp_path, monkeypatch):
    """The real allocator gives up, within a real step."""
    job, feed = job_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    real = type(job.engine).forward

    def large(self, pack, **options):
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
        torch.empty(2**31, dtype=torch.uint8)
        return real(self, pack, **options)

    monkeypatch.setattr(type(job.engine), "forward", large)
    try:
        with pytest.raises(ValueError, match=r"memory: expected 2 GiB more at step 1.*pack-tokens"):
            guarded(job, 0, feed)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    job.saver.close()


def test_only_memory_errors_are_translated(tmp_path, monkeypatch):
    job, feed = job_of(tmp_path)
    error = RuntimeError("something else")
    monkeypatch.setattr(
        type(job.engine), "forward", lambda *args, **options: (_ for _ in ()).throw(error)
    )
    with pytest.raises(RuntimeError, match="something else"):
        guarded(job, 0, feed)
    job.saver.close()


def test_bad_loss_and_bad_weight():
    table = torch.ones(2, 3)
    assert guards.bad_loss(table, (1, 2), (8, 16, 32)) is None
    table[1, 2] = math.nan
    assert guards.bad_loss(table, (1, 2), (8, 16, 32)) == "loss of exit 2 at width 32 is nan"
    model = torch.nn.Linear(2, 2)
    assert guards.bad_weight(model) is None
    model.bias.data[0] = math.nan
    assert guards.bad_weight(model) == "weight bias"
    assert guards.bad_weight(SimpleNamespace(named_parameters=lambda: [])) is None
