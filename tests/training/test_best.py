"""The checkpoint of the best score is kept and exported, and a run ends when scores stop rising."""

import json
import shlex
import shutil

import processes
import pytest
from factories import SMALL, assert_same_model, loss_trace, metrics, small_text

from mlembed import config
from mlembed.modeling import pretrained
from mlembed.runtime.checkpoint import path_of
from mlembed.training import best

STEPS = 12
BEST = ["--eval-every", 2, "--save-every", 3, "--keep-checkpoints", 1, "--steps", STEPS]
# A rate that soon spoils the model, so that a score before the end is the highest.
WILD = ["--optim.lr", 1, "--optim.warmup-ratio", 0, "--optim.schedule", "constant"]
STILL = ["--optim.lr", 1e-12]  # Scores stay what they are.


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    data = small_text(folder)
    eval = str(folder / "dev.jsonl")
    return ["tiny", *SMALL, "--data", *data, "--eval", eval, "--tracker", "none", *BEST]


def train(*args, code=0, size=1):
    done = processes.run("train.py", *args, processes=size)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def saved(run):
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").iterdir())


def scores(run):
    return {line["step"]: line["score"] for line in metrics(run, "eval") if line["step"]}


def line(step, score, **tasks):
    tasks = {name: {"score": value} for name, value in tasks.items()}
    return {"kind": "eval", "step": step, "score": score, "tasks": tasks}


# ---- a function of the log ----


def test_best_of_lines():
    lines = [
        line(0, 99.0),
        {"kind": "train", "step": 1},
        line(2, 40.0, a=0.5),
        line(4, 60.0, a=0.4),
    ]
    assert best.of_lines([], "mean") == (0, 0) == best.of_lines(lines[:2], "mean")
    assert best.of_lines(lines, "mean") == (4, 0)
    assert best.of_lines(lines, "a") == (2, 1)
    # An equal score is no better, and neither are None and NaN.
    more = [*lines, line(6, 60.0, a=None), line(8, float("nan"), a=0.45)]
    assert best.of_lines(more, "mean") == (4, 2) and best.of_lines(more, "a") == (2, 3)


def test_errors():
    with pytest.raises(ValueError, match="eval_every: expected 1 or more with keep_best, got 0"):
        config.Run(keep_best="mean")
    with pytest.raises(ValueError, match="patience: expected 0 without keep_best, got 3"):
        config.Run(patience=3, eval_every=1)


def test_other_scores_are_refused(arguments, tmp_path):
    output = train(*arguments, "--output-dir", tmp_path, "--keep-best", "sts", code=1)
    assert "keep_best: expected a score of eval (mean, dev), got 'sts'" in output


# ---- runs ----


@pytest.mark.parametrize("options", [(), ("--lora.rank", 2)], ids=["whole", "lora"])
def test_best_checkpoint_is_kept_and_exported(arguments, tmp_path, options):
    init = []
    if options:
        train(*arguments, "--output-dir", tmp_path, "--name", "init")
        init = ["--init", tmp_path / "init", "--model.vocab-size", 299]
    args = [*arguments, *WILD, *options, *init, "--output-dir", tmp_path, "--keep-best", "mean"]
    output = train(*args)
    run = tmp_path / "tiny"
    by_step = scores(run)
    assert list(by_step) == list(range(2, STEPS + 1, 2))
    step = max(by_step, key=by_step.get)
    assert step < STEPS and f"best   step {step} of {STEPS}, by mean" in output
    assert saved(run) == [step, STEPS]
    if not options:
        checkpoint = pretrained.load(str(path_of(run / "checkpoints", step)))
        assert_same_model(checkpoint, pretrained.load(str(run / "model")))
    # The report scores what is exported.
    cells = json.loads((run / "report" / "grid.json").read_text())["cells"]
    (full,) = (c for c in cells if (c["dim"], c["exit"], c["rank"]) == (32, 2, 16))
    assert 100 * full["scores"]["dev"]["score"] == pytest.approx(by_step[step])


@pytest.mark.parametrize("size", [1, 2])
def test_run_ends_when_scores_stop_rising(arguments, tmp_path, size):
    args = [*arguments, *STILL, "--output-dir", tmp_path, "--keep-best", "dev", "--patience", 2]
    output = train(*args, size=size)
    run = tmp_path / "tiny"
    assert list(scores(run)) == [2, 4, 6] and saved(run) == [2, 6]
    assert "best   step 2 of 6, by dev" in output
    assert "nothing to do" in train(*args, "--resume", size=size)
    # Killed in the last scoring: the steps are not continued.
    before = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    assert "best   step 2 of 6, by dev" in train(*args, "--resume", size=size)
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert list(scores(run)) == [2, 4, 6]


def test_resumed_run_has_the_same_best(arguments, tmp_path):
    args = [*arguments, *WILD, "--keep-best", "mean", "--output-dir", tmp_path]
    train(*args)
    cut, whole = tmp_path / "tiny", tmp_path / "whole"
    shutil.copytree(cut, whole)
    # As if the run had been killed after its best step was saved.
    shutil.rmtree(cut / "model")
    shutil.rmtree(path_of(cut / "checkpoints", STEPS))
    train(*args, "--resume")
    assert loss_trace(cut) == loss_trace(whole) and scores(cut) == scores(whole)
    assert saved(cut) == saved(whole)
    for name in ("model.safetensors", "mlembed_factors.safetensors"):
        assert (cut / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_damaged_best_checkpoint_is_not_exported(arguments, tmp_path):
    args = [*arguments, *STILL, "--output-dir", tmp_path]
    best = ["--keep-best", "mean", "--patience", 2]
    train(*args, *best)
    run = tmp_path / "tiny"
    shutil.rmtree(run / "model")
    file = sorted(path_of(run / "checkpoints", 2).glob("shard-*"))[0]
    bits = bytearray(file.read_bytes())
    bits[-1] ^= 1
    file.write_bytes(bits)
    output = train(*args, *best, "--resume", code=1)
    assert "expected the checkpoint of the best score, got a damaged one" in output
    assert not (run / "model").exists()
    # The advice of the error.
    words = output[output.index("--resume --keep-best") :].splitlines()[0]
    train(*args, *best, *shlex.split(words))
    assert (run / "model").exists() and saved(run)[-1] == STEPS
