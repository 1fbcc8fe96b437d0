"""Times and learning rates that a run logs with its steps, and the scores between them."""

import time
from dataclasses import replace

import pytest
import torch
from factories import metrics, small_job, write_jsonl

import train
from mlembed.data.eval_sets import nway
from mlembed.inference import cost
from mlembed.modeling.flops import Flops, training_flops
from mlembed.runtime import log
from mlembed.runtime.distributed import World
from mlembed.training.objective.loss import ranks_of
from mlembed.training.optim import learning_rate
from mlembed.training.step import Rates, Step, speed_line


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


def test_operations_are_those_of_the_steps(job, monkeypatch):
    """On one process, and as if the other one of two had tokens and operations, too."""
    each = [
        sum((training_flops(job.run.model, pack, rank) for pack in job.batches[i].packs), Flops())
        for i in range(3)
        for rank, _ in ranks_of(job.run, i)
    ]
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rates = Rates(replace(job, bf16=True))
    steps = [Step({}, [], torch.ones(()), 50, work, None) for work in each]
    rates.add(steps[0])
    rates.begin()
    rates.add(steps[1])
    rates.add(steps[2])
    now[0] = 4.0
    got, total = rates.take(), each[1] + each[2]
    parts = {name: x / 4e12 for name, x in vars(total).items()}
    assert got == {"tokens_per_second": 25.0, "tflops": parts}
    # A known device has a share of its peak; what is computed again does not count.
    monkeypatch.setattr(log, "device_name", lambda device: "NVIDIA H100 PCIe")
    rates = Rates(replace(job, bf16=True))
    rates.add(steps[1])
    now[0] = 6.0
    line = rates.take()
    assert line["mfu"] == pytest.approx((each[1].forward + each[1].backward) / 2 / 756e12)
    assert speed_line({**line, "mfu": 0.421}).endswith(" TFLOP/s (42% MFU)")
    rates = Rates(replace(job, bf16=False))
    now[0] = 7.0
    assert "mfu" not in rates.take()
    two = Rates(replace(job, where=World(0, 2, torch.device("cpu"))))
    two.add(steps[1])
    now[0] = 9.0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(x.clone() / 2))
    got, total = two.take(), each[1]
    assert got["tokens_per_second"] == 75 / 2
    assert got["tflops"]["backward"] == pytest.approx(1.5 * total.backward / 2 / 2e12)


def test_a_run_logs_its_speed(job):
    train.optimise(job, 0)
    for line in metrics(job.directory, "train"):
        tflops = line["tflops"]
        assert 0 < tflops["recomputed"] < tflops["forward"]
        assert tflops["backward"] == pytest.approx(2 * tflops["forward"])
        assert "mfu" not in line


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
    line = train.score(replace(job, tasks=[nway("dev", rows)]), 1)
    assert 0 <= line["score"] <= 100
