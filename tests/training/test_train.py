"""train.py as a user runs it: real processes, small runs on real text."""

import json
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
from processes import started

from mlembed import config
from mlembed.runtime.distributed import World
from mlembed.runtime.log import Log
from mlembed.training.arguments import parse
from mlembed.training.objective.loss import loss_table
from mlembed.training.setup import bf16, set_up
from train import one_step

ROOT = Path(__file__).parents[2]
# A model and a text small enough that a run is all start-up.
SMALL = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.head-dim", "8"),
    *("--model.intermediate-size", "48", "--model.vocab-size", "400", "--model.exits", "1", "2"),
    *("--model.matryoshka-dims", "8", "32", "--model.ranks", "8", "16"),
    *("--batch-size", "8", "--log-every", "1", "--precision", "fp32", "--max-length", "32"),
]


def train(*args, code=0, **options):
    """Run train.py to its end; -> the finished process, whose exit status is as expected."""
    done = processes.run("train.py", *args, **options)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "rank", "losses")
    return [{k: line[k] for k in kept} for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Pairs with hard negatives, an n-way table to learn from and one to score."""
    folder = tmp_path_factory.mktemp("text")
    numbers = [
        f"{a} {b}" for a in ("one", "two", "three", "four") for b in ("cats", "dogs", "owls")
    ]
    pairs = [
        {"query": f"{n} of {i}", "positive": f"{i} : {n}", "negatives": [f"{i + 1} : {n}"]}
        for i in range(10)
        for n in numbers
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    for name, words in (("nway", numbers), ("dev", ["five cats", "six dogs", "nine owls"])):
        rows = [
            {"id": word, "lang": lang, "text": f"{word} {mark}"}
            for word in words
            for lang, mark in (("eng", "."), ("deu", "!"), ("fra", "?"))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def arguments(text):
    sources = [str(text / "pairs.jsonl"), str(text / "nway.jsonl")]
    return ["tiny", *SMALL, "--data", *sources, "--eval", str(text / "dev.jsonl")]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """An uninterrupted run of 12 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    args = ["--output-dir", folder, "--name", "whole", "--steps", 12, "--save-every", 4]
    return folder / "whole", train(*arguments, *args)


def test_run_directory_and_table(whole):
    run, done = whole
    for name in ("config.json", "metrics.jsonl", "report/grid.json", "report/grid.png"):
        assert (run / name).stat().st_size > 0, name
    assert any((run / "tensorboard").iterdir())
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step_00000008",  # the two newest of 4, 8, 12
        "step_00000012",
    ]
    cells = json.loads((run / "report" / "grid.json").read_text())["cells"]
    assert {(c["dim"], c["exit"], c["rank"]) for c in cells} == {
        (dim, exit, rank) for dim in (8, 32) for exit in (1, 2) for rank in (8, 16)
    }
    assert "untrained" in done.stdout
    found = losses(run)
    first = found[0]
    # Of one source or the other, with more candidates or fewer: means of several steps.
    assert sum(line["loss"] for line in found[-5:]) < sum(line["loss"] for line in found[:5])
    table = first["losses"]
    mean = sum(x for row in table.values() for x in row.values()) / 4  # uniform weights
    assert first["loss"] == pytest.approx(mean, rel=1e-5)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        if (stages := json.loads(line).get("stage_ms")) is not None:
            assert stages.keys() == {"data", "forward", "loss", "backward", "optimizer", "other"}
            assert all(ms >= 0 for ms in stages.values()) and stages["backward"] > 0
    grid = json.loads((run / "report" / "grid.json").read_text())
    # As the rows say it: n-way text alone names languages here.
    assert grid["texts_by_language"] == {lang: 12 for lang in ("deu", "eng", "fra")}
    assert grid["device"].startswith("cpu")


def test_the_printed_commands_work(whole, tmp_path):
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
    # What a run alone records: where its time went, what it read of each language.
    assert "optimizer" in page and "Step time by stage: not recorded" not in page
    assert "Training texts by language: not recorded" not in page and "German" in page


def test_a_saved_configuration_runs_again(whole, tmp_path):
    run, _ = whole
    train(run / "config.json", "--output-dir", tmp_path, "--name", "again", "--tracker", "none")
    assert losses(tmp_path / "again") == losses(run)


def test_killed_and_resumed_equals_uninterrupted(whole, arguments, tmp_path):
    run, _ = whole
    args = [*arguments, "--output-dir", tmp_path, "--name", "whole", "--steps", 12]
    args += ["--save-every", 4]
    metrics = tmp_path / "whole" / "metrics.jsonl"
    saved = tmp_path / "whole/checkpoints/step_00000004"
    with started([sys.executable, "train.py", *args], stderr=DEVNULL) as process:
        while process.poll() is None and not saved.exists():
            time.sleep(0.005)
        process.kill()  # no chance to save: whatever was done after step 4 or 8 is lost
        process.wait()
    assert metrics.exists()
    shutil.rmtree(tmp_path / "whole" / "model", ignore_errors=True)  # if it was too fast to kill
    later = tmp_path / "whole" / "checkpoints" / "step_00000012"
    shutil.rmtree(later, ignore_errors=True)
    train(*args, "--resume")
    assert losses(tmp_path / "whole") == losses(run)
    same = ("model.safetensors", "mlembed_factors.safetensors")
    for name in same:
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
    """Everything that is drawn at random is drawn again: to the last bit."""
    args = [*arguments, *SKIP, "--steps", 8, "--save-every", 4, "--tracker", "none"]
    done = train(*args, "--output-dir", tmp_path / "whole")
    assert "bf16 weights, rounded stochastically" in done.stdout
    assert "recomputed: blocks beyond 0.0001 GiB" in done.stdout
    trace = losses(tmp_path / "whole" / "tiny")
    lines = (tmp_path / "whole" / "tiny" / "metrics.jsonl").read_text().splitlines()
    queries = [json.loads(line).get("queries") for line in lines]
    # About half of the tokens leave at the first exit.
    assert [sorted(line["losses"]) for line in trace[:2]] == [["exit_1", "exit_2"]] * 2
    seen = [found for found in queries if found]
    assert all(found.get("exit_1", 8) == 8 and 1 <= found["exit_2"] < 8 for found in seen)
    args += ["--output-dir", tmp_path / "cut"]
    train(*args)
    cut = tmp_path / "cut" / "tiny"
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step_00000008")
    # What fits a machine may change: the next one recomputes nothing.
    plain = [a for a in args if a not in ("--activation-checkpointing", "selective")]
    done = train(*plain, "--resume")
    assert "recomputed: nothing" in done.stdout
    assert losses(cut) == trace
    folders = cut, tmp_path / "whole" / "tiny"
    mine, theirs = (folder / "model" / "model.safetensors" for folder in folders)
    assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_all_ranks_in_one_step(arguments, tmp_path, micro_batches):
    """Losses and gradients at each rank, weighted as sampling would weigh them, added up."""
    options = ["--loss.ranks", "all", "--gradient-accumulation-steps", micro_batches, "--steps", 1]
    run = parse([str(x) for x in (*arguments, *options)])
    where = World(0, 1, torch.device("cpu"))
    job = set_up(run, where, tmp_path, None, Log(tmp_path, main=False))
    run, model = job.run, job.model
    want, batches = torch.zeros(2, 2), [job.batches[i] for i in range(micro_batches)]
    for rank, share in ((8, 8 / 24), (16, 16 / 24)):
        for batch in batches:
            exits_END = torch.cat([model(pack, rank=rank) for pack in batch.packs], dim=1)
            loss_EM = loss_table(exits_END, batch, run, where) * share / micro_batches
            (loss_EM / 4).sum().backward()  # uniform weights
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
    one, two = (losses(tmp_path / name / "tiny") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_a_run_may_go_on_by_another_attention(arguments, tmp_path):
    args = [*arguments, "--output-dir", tmp_path, "--name", "moved", "--tracker", "none"]
    args += ["--steps", 2, "--model.attention"]
    assert "attention by sdpa, " in train(*args, "sdpa").stdout
    shutil.rmtree(tmp_path / "moved" / "model")
    done = train(*args, "auto", "--resume")  # which is sdpa where there is no GPU
    assert (
        tmp_path / "moved" / "model" / "config.json"
    ).is_file() and "attention by " in done.stdout
    saved = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert saved["model"]["attention"] == "auto"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(arguments, tmp_path, number):
    args = [*arguments, "--output-dir", tmp_path, "--name", "stopped", "--steps", 100_000]
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    with started([sys.executable, "train.py", *args], stdout=PIPE, stderr=DEVNULL) as process:
        while process.poll() is None and not (metrics.exists() and losses(tmp_path / "stopped")):
            time.sleep(0.02)
        process.send_signal(number)
        process.send_signal(number)  # as torchrun does, of what a terminal has sent to all already
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "go on with --resume" in out
    (saved,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert saved.name == f"step_{losses(tmp_path / 'stopped')[-1]['step']:08d}"


def test_two_processes_equal_one(whole, arguments, tmp_path):
    run, _ = whole
    args = ["--output-dir", tmp_path, "--name", "whole", "--steps", 12, "--save-every", 4]
    train(*arguments, *args, processes=2)
    one, two = losses(run), losses(tmp_path / "whole")
    assert [line["rank"] for line in two] == [line["rank"] for line in one]
    for a, b in zip(one, two, strict=True):
        # Sums in another order; twelve steps of AdamW let the difference grow a little.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_accumulation_averages_micro_batches(arguments, tmp_path):
    args = ["--output-dir", tmp_path, "--steps", 3, "--tracker", "none"]
    train(*arguments, *args, "--name", "a", "--gradient-accumulation-steps", 2)
    train(*arguments, *args, "--name", "b", "--gradient-accumulation-steps", 2, processes=2)
    one, two = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)


def test_starts_from_a_qwen3_checkpoint(whole, text, tmp_path):
    run, _ = whole
    exported = tmp_path / "start"
    assert processes.run("-m", "mlembed", "export", run, exported).returncode == 0
    for own in ("mlembed_config.json", "mlembed_factors.safetensors"):
        (exported / own).unlink()  # now it is any Qwen3 model, its vocabulary a plain table
    args = ["--init", exported, "--model.ranks", 8, 16, "--max-length", 32, "--steps", 30]
    args += ["--data", text / "pairs.jsonl", "--eval", text / "dev.jsonl", "--log-every", 1]
    args += ["--optim.lr", "1e-3", "--batch-size", 8, "--output-dir", tmp_path]
    train("qwen3", *args)
    trace = [line["loss"] for line in losses(tmp_path / "qwen3")]
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
        if "id" in table.column_names:  # The table may be sorted by language, not by id.
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


# ---- what a user can get wrong: one line, a non-zero status, nothing lost ----


def line_of(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[0]


@pytest.mark.parametrize(
    ("args", "says"),
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
def test_mistakes_in_arguments(args, says, tmp_path):
    done = train(*args, *(["--output-dir", tmp_path] if len(args) > 1 else []), code=1)
    assert says in line_of(done)


def test_malformed_and_empty_data(text, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a", "positive": "b"}\n{"query": "a"}\n')
    args = ["tiny", "--output-dir", tmp_path / "runs", "--eval", text / "dev.jsonl", "--data"]
    assert f"{bad}:2" in line_of(train(*args, bad, code=1))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert str(empty) in line_of(train(*args, empty, code=1))
    assert not (tmp_path / "runs").exists()  # nothing to clear away before the next try


def test_an_attention_that_this_machine_has_not(arguments, tmp_path):
    args = ["--output-dir", tmp_path / "runs", "--device", "cpu", "--model.attention", "flash_attn"]
    assert "flash_attn needs CUDA, got cpu" in line_of(train(*arguments, *args, code=1))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed(arguments, tmp_path):
    done = train(*arguments, "--output-dir", tmp_path / "runs", "--tracker", "wandb", code=1)
    assert "pip install wandb" in line_of(done)
    assert not (tmp_path / "runs").exists()


def test_another_run_is_not_overwritten(whole, arguments):
    run, _ = whole
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    args = ["--output-dir", run.parent, "--name", "whole", "--steps", 12, "--save-every", 4]
    assert "--resume" in line_of(train(*arguments, *args, code=1))
    changed = line_of(train(*arguments, *args, "--resume", "--optim.lr", "0.1", code=1))
    assert "optim.lr" in changed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_full_disk_keeps_what_was_saved(arguments, tmp_path):
    """A file-size limit makes the second checkpoint's writes fail as a full disk would."""
    args = [*arguments, "--output-dir", tmp_path, "--name", "full", "--save-every", "2"]
    args += ["--tracker", "none"]
    train(*args, "--steps", 4)
    largest = max(p.stat().st_size for p in (tmp_path / "full").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "full")

    wrapper = (
        "import resource, runpy, sys, mlembed.checkpoint as c\n"
        "real = c.Saver.save\n"
        "def save(self, step, *rest):\n"
        "    self.wait()\n"  # the one before is written in the background, and has room
        f"    limit = {largest // 2} if step > 2 else resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    return real(self, step, *rest)\n"
        "c.Saver.save = save\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = processes.run("-c", wrapper, *args, "--steps", 6)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "could not be written" in line_of(done)
    checkpoints = tmp_path / "full" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    train(*args, "--steps", 6, "--resume")  # with room again, the run goes on from it
    assert [line["step"] for line in losses(tmp_path / "full")] == list(range(1, 7))
