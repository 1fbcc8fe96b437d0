"""train.py as a user runs it: real processes, small runs on real text."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE

import processes
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from factories import SMALL, loss_trace, metrics, small_job, small_text, write_jsonl
from processes import started

from mlembed import config
from mlembed.training.objective.loss import loss_table
from mlembed.training.setup import bf16
from train import one_step

ROOT = Path(__file__).parents[2]


def train(*args, code=0, **options):
    """Run train.py to its end and return the process, whose exit status has to be `code`."""
    done = processes.run("train.py", *args, **options)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def arguments(data):
    dev = str(Path(data[0]).with_name("dev.jsonl"))
    return ["tiny", *SMALL, "--data", *data, "--eval", dev]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """Return an uninterrupted run of 12 steps and its process."""
    folder = tmp_path_factory.mktemp("runs")
    args = ["--output-dir", folder, "--name", "whole", "--steps", 12, "--save-every", 4]
    return folder / "whole", train(*arguments, *args)


def test_run_directory_and_table(whole):
    run, done = whole
    for name in ("config.json", "metrics.jsonl", "report/grid.json", "report/grid.png"):
        assert (run / name).stat().st_size > 0, name
    assert any((run / "tensorboard").iterdir())
    # The two newest of 4, 8 and 12.
    saved = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert saved == ["step_00000008", "step_00000012"]
    grid = json.loads((run / "report" / "grid.json").read_text())
    assert {(c["dim"], c["exit"], c["rank"]) for c in grid["cells"]} == {
        (dim, exit, rank) for dim in (8, 32) for exit in (1, 2) for rank in (8, 16)
    }
    assert "untrained" in done.stdout
    lines = metrics(run, "train")
    # Sources and numbers of candidates change from step to step, so compare means of several.
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
    for line in lines:
        entries = [x for row in line["losses"].values() for x in row.values()]
        # Weights are uniform.
        assert len(entries) == 4 and line["loss"] == pytest.approx(sum(entries) / 4, rel=1e-5)
        stages = line["stage_ms"]
        assert stages.keys() == {"data", "forward", "loss", "backward", "optimizer", "other"}
        assert all(ms >= 0 for ms in stages.values()) and stages["backward"] > 0
    # Only the rows of the n-way table name a language.
    assert grid["texts_by_language"] == {lang: 12 for lang in ("deu", "eng", "fra")}
    assert grid["device"].startswith("cpu")


def test_printed_commands_work(whole, tmp_path):
    run, done = whole
    commands = dict(re.findall(r"^(encode|export|page) +(.+)$", done.stdout, re.MULTILINE))
    python, *rest = shlex.split(commands["encode"])
    assert (ROOT / python).samefile(sys.executable)
    encoded = processes.run(*rest)
    vector = [float(x) for x in encoded.stdout.split()]
    assert len(vector) == 32 and sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
    export = commands["export"].replace(" OUT ", f" {tmp_path}/small ")
    assert processes.run(*shlex.split(export)[1:]).returncode == 0
    assert (tmp_path / "small" / "modules.json").is_file()
    card = (tmp_path / "small" / "README.md").read_text()
    assert "python train.py" in card and "eng" in card and "pairs" in card
    assert processes.run(*shlex.split(commands["page"])[1:]).returncode == 0
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    # A run, unlike a model, records the time of its stages and its texts by language.
    assert "optimizer" in page and "Step time by stage: not recorded" not in page
    assert "Training texts by language: not recorded" not in page and "German" in page


def test_saved_configuration_runs_again(whole, tmp_path):
    run, _ = whole
    train(run / "config.json", "--output-dir", tmp_path, "--name", "again", "--tracker", "none")
    assert loss_trace(tmp_path / "again") == loss_trace(run)


def test_killed_and_resumed_equals_uninterrupted(whole, arguments, tmp_path):
    run, _ = whole
    args = [*arguments, "--output-dir", tmp_path, "--name", "whole", "--steps", 12]
    args += ["--save-every", 4]
    saved = tmp_path / "whole/checkpoints/step_00000004"
    with started([sys.executable, "train.py", *args], stderr=DEVNULL) as process:
        while process.poll() is None and not saved.exists():
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert (tmp_path / "whole" / "metrics.jsonl").exists()
    # The run may have finished before the kill.
    for name in ("model", "checkpoints/step_00000012"):
        shutil.rmtree(tmp_path / "whole" / name, ignore_errors=True)
    train(*args, "--resume")
    assert loss_trace(tmp_path / "whole") == loss_trace(run)
    for name in ("model.safetensors", "mlembed_factors.safetensors"):
        mine, theirs = (folder / "model" / name for folder in (tmp_path / "whole", run))
        assert mine.read_bytes() == theirs.read_bytes()


# Groups leave at both exits, texts skip layers; every rank each step; weights in bf16,
# rounded stochastically; blocks recomputed; packs of a few texts.
SKIP = [
    *("--depth.exits", "1", "2", "--depth.layer-dropout", "0.3", "--loss.ranks", "all"),
    *("--optim.weights", "bf16", "--precision", "bf16", "--pack-tokens", "64"),
    *("--activation-checkpointing", "selective", "--activation-gib", "0.0001"),
]


def test_layer_skip_stopped_and_resumed_equals_uninterrupted(arguments, tmp_path):
    """All random draws repeat, to the last bit."""
    args = [*arguments, *SKIP, "--steps", 8, "--save-every", 4, "--tracker", "none"]
    done = train(*args, "--output-dir", tmp_path / "whole")
    whole, cut = tmp_path / "whole" / "tiny", tmp_path / "cut" / "tiny"
    assert "bf16 weights, rounded stochastically" in done.stdout
    assert "recomputed: blocks beyond 0.0001 GiB" in done.stdout
    # About half of the tokens leave at the first exit.
    queries = [line["queries"] for line in metrics(whole, "train")]
    assert all(q["exit_1"] == 8 and 1 <= q["exit_2"] < 8 for q in queries)
    args += ["--output-dir", tmp_path / "cut"]
    train(*args)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step_00000008")
    # Hardware settings may change: the resumed run recomputes nothing.
    plain = [a for a in args if a not in ("--activation-checkpointing", "selective")]
    assert "recomputed: nothing" in train(*plain, "--resume").stdout
    assert loss_trace(cut) == loss_trace(whole)
    mine, theirs = (folder / "model" / "model.safetensors" for folder in (cut, whole))
    assert mine.read_bytes() == theirs.read_bytes()


def test_profile_names_the_parts_of_a_step(arguments, tmp_path):
    """Steps 4 and 5, in Chrome's format."""
    args = ["--output-dir", tmp_path, "--steps", 6, "--tracker", "none", "--profile", 2]
    train(*arguments, *args, "--eval-every", 0)
    run = tmp_path / "tiny"
    events = json.loads((run / "trace_0.json").read_text())["traceEvents"]
    spans = [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation"
    ]
    inside = {
        name: {other for other, a, b in spans if a <= begin and end <= b} - {name}
        for name, begin, end in spans
    }
    steps = {name for name in inside if name.startswith("ProfilerStep#")}
    assert len(steps) == 2
    own = ("data", "forward", "loss", "backward", "optimizer", "exit 1", "exit 2")
    parents = {name: inside[name] & set(own) for name in own}
    assert parents == dict.fromkeys(own[:5], set()) | dict.fromkeys(own[5:], {"forward"})
    assert all(inside[name] & steps for name in own)
    # A run from the saved configuration traces nothing.
    assert json.loads((run / "config.json").read_text())["profile"] == 0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_all_ranks_in_one_step(data, tmp_path, micro_batches):
    """Losses and gradients at each rank add up, weighted as sampling would weigh them."""
    options = "--loss.ranks", "all", "--gradient-accumulation-steps", micro_batches, "--steps", 1
    job = small_job(tmp_path, data, *options)
    run, model, where = job.run, job.model, job.where
    want, batches = torch.zeros(2, 2), [job.batches[i] for i in range(micro_batches)]
    for rank, share in ((8, 8 / 24), (16, 16 / 24)):
        for batch in batches:
            exits_END = torch.cat([model(pack, rank=rank) for pack in batch.packs], dim=1)
            loss_EM = loss_table(exits_END, batch, run, where) * share / micro_batches
            (loss_EM / 4).sum().backward()
            want += loss_EM.detach()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    model.zero_grad()
    got = one_step(job, 0, iter(batches))
    torch.testing.assert_close(got.losses["contrastive"], want, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.norm, norm, rtol=1e-5, atol=0)
    assert got.queries == [8 * micro_batches] * 2
    assert got.tokens == sum(batch.tokens for batch in batches)


def test_bf16_weights_are_never_multiplied_in_fp32(monkeypatch):
    """Also on a machine without bf16 products of its own."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    cpu = torch.device("cpu")
    for weights, want in (("fp32", False), ("bf16", True)):
        assert bf16(config.Run(optim=config.Optim(weights=weights)), cpu) is want


def test_layer_skip_on_two_processes_equals_one(arguments, tmp_path):
    args = [*arguments, "--depth.exits", 1, 2, "--steps", 4, "--tracker", "none"]
    args += ["--pack-tokens", 64, "--depth.shares", 0.3, 0.7]
    train(*args, "--output-dir", tmp_path / "one")
    train(*args, "--output-dir", tmp_path / "two", processes=2)
    one, two = (loss_trace(tmp_path / name / "tiny") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_attention_may_change_on_resume(arguments, tmp_path):
    run = tmp_path / "moved"
    args = [*arguments, "--output-dir", tmp_path, "--name", "moved", "--tracker", "none"]
    args += ["--steps", 2, "--model.attention"]
    assert "attention by sdpa, " in train(*args, "sdpa").stdout
    shutil.rmtree(run / "model")
    assert "attention by " in train(*args, "auto", "--resume").stdout
    assert (run / "model" / "config.json").is_file()
    assert json.loads((run / "config.json").read_text())["model"]["attention"] == "auto"


def test_workers_give_the_same_steps(whole, arguments, tmp_path):
    """Workers are not forks of this process, whose threads a fork would not have."""
    run, _ = whole
    code = "import os, runpy, sys; del os.fork; sys.argv = ['train.py', *sys.argv[1:]]; "
    code += "runpy.run_path('train.py', run_name='__main__')"
    args = [*arguments, "--output-dir", tmp_path, "--name", "whole", "--steps", 12]
    args += ["--save-every", 4, "--loader-workers", 2]
    done = processes.run("-c", code, *args)
    assert done.returncode == 0, done.stderr[-3000:]
    assert loss_trace(tmp_path / "whole") == loss_trace(run)
    for name in ("model", "checkpoints/step_00000012"):
        shutil.rmtree(tmp_path / "whole" / name)
    train(*args, "--resume")
    assert loss_trace(tmp_path / "whole") == loss_trace(run)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(arguments, tmp_path, number, workers):
    """A terminal and a scheduler send them to all processes of the run."""
    args = [*arguments, "--output-dir", tmp_path, "--name", "stopped", "--steps", 100_000]
    args += ["--loader-workers", workers]
    run = tmp_path / "stopped"
    with started([sys.executable, "train.py", *args], stdout=PIPE, stderr=DEVNULL) as process:
        while process.poll() is None and not metrics(run, "train"):
            time.sleep(0.02)
        # torchrun forwards a signal that a terminal has sent to all processes already.
        os.killpg(process.pid, number)
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "continue with --resume" in out
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step_{loss_trace(run)[-1]['step']:08d}"


def test_two_processes_equal_one(whole, arguments, tmp_path):
    run, _ = whole
    args = ["--output-dir", tmp_path, "--name", "whole", "--steps", 12, "--save-every", 4]
    train(*arguments, *args, processes=2)
    one, two = loss_trace(run), loss_trace(tmp_path / "whole")
    assert [line["rank"] for line in two] == [line["rank"] for line in one]
    for a, b in zip(one, two, strict=True):
        # Sums in another order; twelve steps of AdamW let the difference grow a little.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_accumulation_averages_micro_batches(arguments, tmp_path):
    args = ["--output-dir", tmp_path, "--steps", 3, "--tracker", "none"]
    train(*arguments, *args, "--name", "a", "--gradient-accumulation-steps", 2)
    train(*arguments, *args, "--name", "b", "--gradient-accumulation-steps", 2, processes=2)
    one, two = loss_trace(tmp_path / "a"), loss_trace(tmp_path / "b")
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)


def test_starts_from_a_qwen3_checkpoint(whole, data, tmp_path):
    run, _ = whole
    exported = tmp_path / "start"
    assert processes.run("-m", "mlembed", "export", run, exported).returncode == 0
    # Without these files it is any Qwen3 model, with a plain vocabulary table.
    for own in ("mlembed_config.json", "mlembed_factors.safetensors"):
        (exported / own).unlink()
    args = ["--init", exported, "--model.ranks", 8, 16, "--max-length", 32, "--steps", 30]
    args += ["--data", data[0], "--eval", Path(data[0]).with_name("dev.jsonl"), "--log-every", 1]
    args += ["--optim.lr", "1e-3", "--batch-size", 8, "--output-dir", tmp_path]
    train("qwen3", *args)
    trace = [line["loss"] for line in loss_trace(tmp_path / "qwen3")]
    assert sum(trace[-5:]) < 0.8 * sum(trace[:5])
    nesting = json.loads((tmp_path / "qwen3/model/mlembed_config.json").read_text())["model"]
    assert nesting["ranks"] == [8, 16] and nesting["hidden_size"] == 32


REAL = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="real multilingual text is not beside this checkout")
def test_real_text(tmp_path):
    """Scored pairs, pairs with negatives, an n-way table; Tatoeba and STS to score."""
    names = ("tldr_parallel", "nli_triplets", "sts_train", "nllb_seed")
    sources = [tmp_path / f"{name}.parquet" for name in names]
    for source in sources:
        table = pq.read_table(REAL / "train" / source.name)
        # The table may be sorted by language, not by id.
        if "id" in table.column_names:
            first = pc.unique(table["id"])[:20]
            table = table.filter(pc.is_in(table["id"], first))
        pq.write_table(table.slice(0, 300), source)
    dev = tmp_path / "tatoeba_dev"
    dev.mkdir()
    for lang in ("deu", "cor", "yue"):
        for side in (lang, "eng"):
            name = f"tatoeba.{lang}-eng.{side}"
            shutil.copy(REAL / "eval" / "tatoeba_dev" / name, dev / name)
    sts = REAL / "eval" / "sts" / "stsb-fr-dev.csv"
    args = ["tiny", *SMALL, "--steps", 4, "--data", *sources, "--eval", dev, sts]
    done = train(*args, "--output-dir", tmp_path)
    for name in names:
        assert f"train  {name}:" in done.stdout
    scores = json.loads((tmp_path / "tiny/report/grid.json").read_text())["cells"][-1]["scores"]
    assert set(scores["tatoeba_dev"]["by_language"]) == {"deu", "cor", "yue"}
    assert -1 <= scores["stsb-fr-dev"]["score"] <= 1


# ---- mistakes of a user: one line, a non-zero status, nothing lost ----


def line_of(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[0]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["tinny"], "tiny"),
        (["tiny", "--optim.lrr", "1"], "optim.lr"),
        (["tiny", "--eval", "--data", "no/such/file.jsonl"], "no/such/file.jsonl"),
        (["tiny", "--eval", "no/such/place"], "no/such/place"),
        (["tiny", "--model.matryoshka-dims", "64", "999"], "999"),
        (["tiny", "--model.exits", "2", "9"], "9"),
        (["tiny", "--model.ranks", "64", "999"], "999"),
        (["tiny", "--depth.exits", "1", "3", "4"], "depth.exits"),
        (["tiny", "--depth.layer-dropout", "1.5"], "depth.layer_dropout"),
        (["tiny", "--optim.weights", "bf16", "--precision", "fp32"], "precision"),
        (["tiny", "--init", "no/such/checkpoint/"], "no/such/checkpoint"),
        (["no_such.json"], "no_such.json"),
    ],
)
def test_mistakes_in_arguments(args, word, tmp_path):
    done = train(*args, *(["--output-dir", tmp_path] if len(args) > 1 else []), code=1)
    assert word in line_of(done)


def test_malformed_and_empty_data(tmp_path):
    bad, empty = tmp_path / "bad.jsonl", tmp_path / "empty.jsonl"
    write_jsonl(bad, [{"query": "a", "positive": "b"}, {"query": "a"}])
    empty.write_text("")
    args = ["tiny", "--output-dir", tmp_path / "runs", "--eval", "--data"]
    assert f"{bad}:2" in line_of(train(*args, bad, code=1))
    assert str(empty) in line_of(train(*args, empty, code=1))
    # There is nothing to clean up before the next try.
    assert not (tmp_path / "runs").exists()


def test_unavailable_attention(arguments, tmp_path):
    args = ["--output-dir", tmp_path / "runs", "--device", "cpu", "--model.attention", "flash_attn"]
    assert "flash_attn needs CUDA, got cpu" in line_of(train(*arguments, *args, code=1))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_tracker(arguments, tmp_path):
    done = train(*arguments, "--output-dir", tmp_path / "runs", "--tracker", "wandb", code=1)
    assert "pip install wandb" in line_of(done)
    assert not (tmp_path / "runs").exists()


def test_run_is_not_overwritten(whole, arguments):
    run, _ = whole
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    args = ["--output-dir", run.parent, "--name", "whole", "--steps", 12, "--save-every", 4]
    assert "--resume" in line_of(train(*arguments, *args, code=1))
    done = train(*arguments, *args, "--resume", "--optim.lr", "0.1", code=1)
    assert "optim.lr" in line_of(done)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


FULL_DISK = """
import resource, runpy, sys, mlembed.runtime.checkpoint as c
real = c.Saver.save
def save(self, step, *rest):
    self.wait()
    limit = {} if step > 2 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return real(self, step, *rest)
c.Saver.save = save
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_full_disk_keeps_earlier_checkpoints(arguments, tmp_path):
    """A limit on file size makes the second checkpoint's writes fail like a full disk."""
    args = [*arguments, "--output-dir", tmp_path, "--name", "full", "--save-every", "2"]
    args += ["--tracker", "none"]
    train(*args, "--steps", 4)
    largest = max(p.stat().st_size for p in (tmp_path / "full").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "full")
    done = processes.run("-c", FULL_DISK.format(largest // 2), *args, "--steps", 6)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "could not be written" in line_of(done)
    checkpoints = tmp_path / "full" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    # With room again the run continues from there.
    train(*args, "--steps", 6, "--resume")
    assert [line["step"] for line in loss_trace(tmp_path / "full")] == list(range(1, 7))
