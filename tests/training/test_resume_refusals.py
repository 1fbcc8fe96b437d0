"""A resumed run sees the data, the checkpoint and the number of steps that it began with, or stops
with one line: real runs of train.py.
"""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import processes
import pytest
import torch
from factories import SMALL, loss_trace, metrics, small_job, small_text, write_jsonl

from mlembed.config import Run
from mlembed.runtime import checkpoint, intact
from mlembed.training.arguments import parse
from mlembed.training.optim import learning_rate
from train import save

TRAIN = Path(__file__).parents[2] / "train.py"
STEPS = 6
ARGS = ["tiny", *SMALL, "--tracker", "none", "--save-every", "2", "--keep-checkpoints", "3"]
DATA = ["--data", "pairs.jsonl", "nway.jsonl"]
EVAL = ["--eval", "dev.jsonl"]
MORE = [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}]


def train(folder, *args, code=0, data=(*DATA, *EVAL), steps=STEPS):
    """Run train.py in a folder, check its exit status, and return its output."""
    done = processes.run(TRAIN, *ARGS, *data, "--steps", steps, *args, cwd=folder)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    if code:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a folder with data and a finished run of STEPS steps, with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    small_text(folder)
    train(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """Return a copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def stopped(folder):
    """Return a copy of `finished` whose run was killed after step 5, with checkpoints 2 and 4."""
    run = folder / "runs" / "tiny"
    for name in ("model", "report", "checkpoints/step_00000006"):
        shutil.rmtree(run / name)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] < 6))
    return folder


def contents(folder):
    """Return all files of a folder's run, but for the cache of the lock."""
    run = folder / "runs" / "tiny"
    paths = [path for path in run.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def refused(folder, *args, **options):
    """Return the line with which `--resume` stops; it changes no file of the run."""
    before = contents(folder)
    line = train(folder, "--resume", *args, code=1, **options)
    assert contents(folder) == before
    return line


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trace(folder):
    return loss_trace(folder / "runs" / "tiny")


# ---- data ----


def cut(folder):
    write_jsonl(folder / "pairs.jsonl", rows(folder / "pairs.jsonl")[:60])


def reword(folder):
    path = folder / "pairs.jsonl"
    path.write_text(path.read_text().replace("3 : one cats", "3 : one rats", 1))


def negative(folder):
    table = rows(folder / "pairs.jsonl")
    table[7]["negatives"] = ["another"]
    write_jsonl(folder / "pairs.jsonl", table)


def regroup(folder):
    """Give a text to another id of the n-way table; the texts and their order stay."""
    table = rows(folder / "nway.jsonl")
    table[2]["id"] = table[3]["id"]
    write_jsonl(folder / "nway.jsonl", table)


def hold_out(folder):
    table = rows(folder / "dev.jsonl")
    table[0]["text"] += " and more"
    write_jsonl(folder / "dev.jsonl", table)


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (cut, "data.pairs", r"expected 120 rows \(sha256 \w{12}\), got 60 rows \(sha256 \w{12}\)"),
        (reword, "data.pairs", "expected 120 rows .*, got 120 rows"),
        (negative, "data.pairs", "expected 120 rows .*, got 120 rows"),
        (regroup, "data.nway", "expected 12 rows .*, got 12 rows"),
        (hold_out, "eval.dev", "expected 9 texts .*, got 9 texts"),
    ],
)
def test_changed_file_is_refused_by_name(change, key, message, stopped):
    change(stopped)
    assert re.search(f"{key}: {message}.*--allow-changed {key}$", refused(stopped).strip())


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        ([*DATA, "more.jsonl", *EVAL], "data.more", "expected no such source, got 2 rows"),
        ([*DATA[:2], *EVAL], "data.nway", "expected 12 rows .*, got no such source"),
        (
            ["--data", "nway.jsonl", "pairs.jsonl", *EVAL],
            "data",
            "expected the order pairs nway, got the order nway pairs",
        ),
        ([*DATA, *EVAL, "new.jsonl"], "eval.new", "expected no such source, got 2 texts"),
        (["--data", "warm.json", *EVAL], "data.pairs", "expected temperature 0.0, got .*0.5"),
        (["--data", "heavy.json", *EVAL], "data.pairs", "expected weight 1.0, got weight 3.0"),
        (
            ["--data", "heavy.json", *EVAL, "--sampling", "weights"],
            "",
            "other values for sampling; --allow",
        ),
        (["--data", "asked.json", *EVAL], "data.pairs", "expected prompt '', got prompt 'ask '"),
        (
            ["--data", "streamed.json", *EVAL],
            "data.pairs",
            "expected 120 rows .*, got a stream of 1",
        ),
    ],
)
def test_other_sources_are_refused_by_name(data, key, message, stopped):
    write_jsonl(stopped / "more.jsonl", MORE)
    new = [{"id": 1, "lang": lang, "text": f"new {lang}"} for lang in ("eng", "fra")]
    write_jsonl(stopped / "new.jsonl", new)
    for name, option in (
        ("warm", {"temperature": 0.5}),
        ("heavy", {"weight": 3}),
        ("asked", {"prompt": "ask "}),
        ("streamed", {"streaming": True, "rows": 120}),
    ):
        listed = [{"path": "pairs.jsonl", **option}, {"path": "nway.jsonl"}]
        (stopped / f"{name}.json").write_text(json.dumps({"sources": listed}))
    assert re.search(f"{key}.*{message}", refused(stopped, data=data))


def test_allowed_change_goes_on_and_is_said(stopped):
    cut(stopped)
    hold_out(stopped)
    assert "data.pairs: " in refused(stopped, "--allow-changed", "eval.dev")
    out = train(stopped, "--resume", "--allow-changed", "data.pairs", "eval")
    assert re.search(r"data.pairs: 120 rows \(.*\) before, now 60 rows", out)
    assert re.search(r"eval.dev: 9 texts \(.*\) before, now 9 texts", out)
    # The checkpoints from here on are of the new data.
    *_, before, after = intact.complete(stopped / "runs" / "tiny" / "checkpoints")
    items = [intact.state(path)["digests"]["data"][0]["items"] for path in (before, after)]
    assert items == ["120 rows", "60 rows"]


def test_same_rows_in_another_file_are_the_same_data(finished, stopped):
    table = rows(stopped / "pairs.jsonl")
    with (stopped / "other.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["query", "positive", "negative"])
        out.writerows([row["query"], row["positive"], *row["negatives"]] for row in table)
    (stopped / "pairs.jsonl").unlink()
    train(stopped, "--resume", data=["--data", "other.csv", "nway.jsonl", *EVAL])
    assert trace(stopped) == trace(finished)


def test_file_added_to_a_directory_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    small_text(tmp_path / "text")
    data = ["--data", "text", "--eval"]
    train(tmp_path, data=data, steps=2)
    shutil.rmtree(tmp_path / "runs" / "tiny" / "model")
    write_jsonl(tmp_path / "text" / "more.jsonl", MORE)
    line = refused(tmp_path, data=data, steps=2)
    assert re.search("resume: data.more: expected no such source, got 2 rows [^;]*$", line)


def test_changed_stream_is_refused(tmp_path):
    small_text(tmp_path)
    listed = [{"path": "pairs.jsonl", "streaming": True, "rows": 120}]
    (tmp_path / "mix.json").write_text(json.dumps({"sources": listed}))
    data = [*DATA[:1], "mix.json", "nway.jsonl", *EVAL]
    train(tmp_path, data=data, steps=2)
    shutil.rmtree(tmp_path / "runs" / "tiny" / "model")
    reword(tmp_path)
    line = refused(tmp_path, data=data, steps=2)
    assert re.search("data.pairs: expected a stream of 1 files .*, got a stream of 1 files", line)


def reseal(path, change):
    """Change the contents of a checkpoint's state.json, as an earlier version would write it."""
    state = intact.state(path)
    del state["sha256"]
    change(state)
    (path / intact.STATE).write_text(json.dumps({**state, "sha256": intact.seal_of(state)}))


def test_checkpoint_without_digests_is_accepted_with_a_line(finished, stopped):
    def old(state):
        for key in ("run", "config", "digests", "steps"):
            del state[key]

    for path in intact.complete(stopped / "runs" / "tiny" / "checkpoints"):
        reseal(path, old)
    (stopped / "runs" / "tiny" / "run.json").unlink()
    out = train(stopped, "--resume")
    assert "step_00000004 is of an earlier version and holds no digests" in out
    assert trace(stopped) == trace(finished)


# ---- checkpoints ----


def test_renamed_step_is_refused(stopped):
    saved = stopped / "runs" / "tiny" / "checkpoints"
    (saved / "step_00000004").rename(saved / "step_00000005")
    line = refused(stopped)
    assert "step_00000005: expected the checkpoint of step 5, got that of step 4" in line


def test_checkpoint_of_another_run_is_refused(stopped, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    small_text(other)
    shape = ["--model.hidden-size", 16, "--model.matryoshka-dims", 8, 16]
    train(other, "--seed", 7, *shape, steps=8)
    place = stopped / "runs" / "tiny" / "checkpoints" / "step_00000008"
    shutil.copytree(other / "runs" / "tiny" / "checkpoints" / place.name, place)
    line = refused(stopped)
    assert re.search(r"00008: expected a checkpoint of this run, whose id is \w+, got one of", line)
    # Without its id the checkpoint still tells its configuration, and without that its shape.
    reseal(place, lambda state: state.pop("run"))
    line = refused(stopped)
    assert "other values for model.hidden_size, model.matryoshka_dims, seed, steps; another" in line
    reseal(place, lambda state: state.pop("config"))
    assert "expected the run's shape, got hidden_size 16 instead of 32" in refused(stopped)


def test_checkpoints_of_another_run_stay(tmp_path):
    for run, step in (("a", 4), ("a", 6), ("b", 2), ("b", 3), ("b", 4)):
        keep = 2 if run == "a" else 1
        with checkpoint.Saver(tmp_path, 0, 1, keep, {"run": run}) as one:
            one.save(step, {"a": torch.ones(3)}, lambda path: None)
            if (run, step) == ("b", 4):
                with pytest.raises(ValueError, match="new directory, got a checkpoint of run a"):
                    one.wait()
    # Run b deletes neither those of run a nor its own newest.
    left = [path.name[-1] for path in intact.complete(tmp_path)]
    assert left == ["3", "4", "6"]


def test_edited_configuration_is_refused(stopped):
    """config.json may say anything: the checkpoint knows its own configuration."""
    path = stopped / "runs" / "tiny" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5'))
    line = refused(stopped, "--seed", 5)
    assert re.search(r"step_00000004/state.json, got other values for seed", line)


@pytest.mark.parametrize("key", ["model.intermediate_size", "model.dropout", "tokenizer"])
def test_shape_and_tokenizer_never_change(key):
    with pytest.raises(ValueError, match=f"allow_changed: expected no key .*, got {key}"):
        Run(allow_changed=("steps", key))


# ---- no whole checkpoint ----


def test_only_damaged_checkpoints_are_an_error(stopped):
    for path in intact.complete(stopped / "runs" / "tiny" / "checkpoints"):
        (path / intact.STATE).unlink()
    message = "all are damaged: .*04/state.json: no such file; .*02/.*; restore one"
    assert re.search(message, refused(stopped))
    args = [TRAIN, *ARGS, *DATA, *EVAL, "--steps", STEPS, "--resume"]
    two = processes.run(*args, processes=2, cwd=stopped)
    # The second process does not wait for the first, which looks for checkpoints.
    assert two.returncode == 1 and re.search(message, two.stderr)


@pytest.mark.parametrize("old", [False, True], ids=["new", "earlier version"])
@pytest.mark.parametrize("how", ["all", "contents"])
def test_lost_checkpoints_are_an_error(how, old, stopped):
    run = stopped / "runs" / "tiny"
    shutil.rmtree(run / "checkpoints")
    if how == "contents":
        (run / "checkpoints" / ".step_00000006.partial").mkdir(parents=True)
    if old:
        (run / "run.json").unlink()
    assert "expected the checkpoint that this run saved, found none; restore" in refused(stopped)


def test_run_without_a_first_checkpoint_begins_again(finished, stopped):
    run = stopped / "runs" / "tiny"
    shutil.rmtree(run / "checkpoints")
    identity = json.loads((run / "run.json").read_text())
    assert identity["saved"] is True
    (run / "run.json").write_text(json.dumps({**identity, "saved": False}))
    lines = (run / "metrics.jsonl").read_text()
    train(stopped, "--resume")
    assert trace(stopped) == trace(finished)
    assert (run / "metrics_dropped.jsonl").read_text() == lines
    assert json.loads((run / "run.json").read_text()) == identity


# ---- metrics ----


def test_cut_lines_of_metrics_are_kept(finished, stopped):
    run = stopped / "runs" / "tiny"
    last = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[-1]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ki')
    train(stopped, "--resume")
    assert trace(stopped) == trace(finished)
    assert json.loads(last)["step"] == 5
    assert (run / "metrics_dropped.jsonl").read_text() == last


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train"}',
        "[1, 2]",
        '{"step": "3", "kind": "train"}',
        '{"step": 1, "ki',
        "[" * 10**6,
    ],
)
def test_broken_line_of_metrics_is_named(line, stopped):
    path = stopped / "runs" / "tiny" / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    assert re.search(r"metrics.jsonl:1: (expected an object with|invalid JSON)", refused(stopped))


def test_metrics_are_on_disk_before_a_checkpoint_is_complete(tmp_path, monkeypatch):
    """A power failure may not leave a saved step without its line."""
    job = small_job(tmp_path, small_text(tmp_path))
    job.out.metrics(1, "train", {"loss": 1.0})
    flushed, fsync = [], os.fsync

    def record(handle):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    with job.saver:
        save(job, 1)
    assert flushed.index("metrics.jsonl") < flushed.index(intact.STATE)


# ---- the number of steps ----


def test_finished_run_is_extended(finished, folder):
    run = folder / "runs" / "tiny"
    old = {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.is_file()}
    extend = ["--resume", "--allow-changed", "steps"]
    out = train(folder, *extend, steps=8)
    assert "steps  6 became 8: the rate from step 7 on is that of a schedule of 8 steps" in out
    assert trace(folder)[:STEPS] == trace(finished) and len(trace(folder)) == 8
    rate = learning_rate(6, parse([*ARGS, "--steps", "8"]))
    assert metrics(run, "train")[6]["lr"] == pytest.approx(rate) != metrics(run, "train")[5]["lr"]
    kept = run / "model_until_6"
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == old
    assert (run / "report_until_6" / "grid.json").is_file()
    assert (run / "model" / "model.safetensors").read_bytes() != old["model.safetensors"]
    assert "is finished: nothing to do" in train(folder, *extend, steps=8)
    assert "steps: expected at least the 8 that are done, got 7" in refused(
        folder, *extend[1:], steps=7
    )


def test_fewer_steps_than_done_are_refused(stopped):
    line = refused(stopped, "--allow-changed", "steps", steps=3)
    assert "steps: expected at least the 4 that are done, got 3" in line
    line = refused(stopped, "--allow-changed", "epochs", "--epochs", "0.05")
    assert "steps: expected at least the 4 that are done, got 1" in line


def test_empty_model_is_not_an_end(finished, stopped):
    (stopped / "runs" / "tiny" / "model").mkdir()
    train(stopped, "--resume")
    assert trace(stopped) == trace(finished)
    assert "is finished: nothing to do" in train(stopped, "--resume")
