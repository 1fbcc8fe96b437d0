"""Times and learning rates that a run logs with its steps, and the time of scores between them."""

import json
import time
from dataclasses import replace

import pytest
import torch

import train
from mlembed.data.eval_sets import nway
from mlembed.inference import cost
from mlembed.runtime.distributed import World
from mlembed.runtime.log import Log
from mlembed.training.arguments import parse
from mlembed.training.optim import learning_rate

SMALL = [
    *("--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.head-dim", "8"),
    *("--model.intermediate-size", "16", "--model.vocab-size", "300", "--model.exits", "1"),
    *("--model.matryoshka-dims", "16", "--model.ranks", "8", "--batch-size", "4"),
    *("--precision", "fp32", "--compile", "off", "--tracker", "none", "--steps", "3"),
    *("--log-every", "1", "--eval-every", "1"),
]


def job_of(folder):
    rows = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = replace(parse(["tiny", *SMALL, "--data", str(folder / "pairs.jsonl")]), eval=())
    where = World(0, 1, torch.device("cpu"))
    return train.set_up(run, where, folder, None, Log(folder, main=True))


def steps(job):
    """Optimise to the end; -> the lines of metrics.jsonl about steps."""
    train.optimise(job, 0)
    job.saver.close()
    lines = (job.directory / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


def test_times_are_those_of_the_steps(tmp_path, monkeypatch):
    """A step takes a hundred seconds; set-up and evaluation take an hour each."""
    job = job_of(tmp_path)
    real, guarded, passed = time.perf_counter, train.guarded, [3600.0]

    def step(*args):
        passed[0] += 100
        return guarded(*args)

    def score(*args):
        passed[0] += 3600

    monkeypatch.setattr(time, "perf_counter", lambda: real() + passed[0])
    monkeypatch.setattr(train, "guarded", step)
    monkeypatch.setattr(train, "score", score)
    lines = steps(job)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for i, line in enumerate(lines):
        # What the machine really takes comes on top.
        assert 100_000 <= sum(line["stage_ms"].values()) < 130_000
        assert 1 / 1.3 < line["tokens_per_second"] * 100 / job.batches[i].tokens <= 1


def test_learning_rates_are_those_of_the_steps(tmp_path):
    job = job_of(tmp_path)
    rates = [line["lr"] for line in steps(job)]
    assert rates == [learning_rate(step, job.run) for step in range(3)]
    assert len(set(rates)) == 3


def test_scores_between_steps_measure_no_costs(tmp_path, monkeypatch):
    """Costs are those of the final grid: they would take longer than the score."""
    rows = [
        {"id": word, "lang": lang, "text": word + mark}
        for word in ("cat", "dog", "owl")
        for lang, mark in (("eng", "."), ("deu", "!"))
    ]
    job = replace(job_of(tmp_path), tasks=[nway("dev", rows)])
    monkeypatch.setattr(cost, "measure", lambda *args: pytest.fail("costs were measured"))
    train.score(job, 1)
    job.saver.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (line,) = map(json.loads, lines)
    assert line["kind"] == "eval" and 0 <= line["score"] <= 100
