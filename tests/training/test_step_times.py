"""Times and learning rates that a run logs with its steps, and the scores between them."""

import time
from dataclasses import replace

import pytest
from factories import metrics, small_job, write_jsonl

import train
from mlembed.data.eval_sets import nway
from mlembed.inference import cost
from mlembed.training.optim import learning_rate


@pytest.fixture
def job(tmp_path):
    rows = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(8)]
    data = [write_jsonl(tmp_path / "pairs.jsonl", rows)]
    job = small_job(tmp_path, data, "--steps", 3, "--eval-every", 1, "--batch-size", 4)
    yield job
    job.saver.close()


def test_times_are_those_of_the_steps(job, monkeypatch):
    """A step takes a hundred seconds; set-up and evaluation take an hour each."""
    real, guarded, passed = time.perf_counter, train.guarded, [3600.0]

    def step(*args):
        passed[0] += 100
        return guarded(*args)

    def score(*args):
        passed[0] += 3600

    monkeypatch.setattr(time, "perf_counter", lambda: real() + passed[0])
    monkeypatch.setattr(train, "guarded", step)
    monkeypatch.setattr(train, "score", score)
    train.optimise(job, 0)
    lines = metrics(job.directory, "train")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for i, line in enumerate(lines):
        # What the machine really takes comes on top.
        assert 100_000 <= sum(line["stage_ms"].values()) < 130_000
        assert 1 / 1.3 < line["tokens_per_second"] * 100 / job.batches[i].tokens <= 1


def test_learning_rates_are_those_of_the_steps(job):
    train.optimise(job, 0)
    rates = [line["lr"] for line in metrics(job.directory, "train")]
    assert rates == [learning_rate(step, job.run) for step in range(3)]
    assert len(set(rates)) == 3


def test_scores_between_steps_measure_no_costs(job, monkeypatch):
    """Costs are those of the final grid: they would take longer than the score."""
    words = [(word, mark) for word in ("cat", "dog", "owl") for mark in (".", "!")]
    rows = [{"id": w, "lang": {".": "eng", "!": "deu"}[m], "text": w + m} for w, m in words]
    monkeypatch.setattr(cost, "measure", lambda *args: pytest.fail("costs were measured"))
    train.score(replace(job, tasks=[nway("dev", rows)]), 1)
    (line,) = metrics(job.directory, "eval")
    assert 0 <= line["score"] <= 100
