"""Rates and stages that a run logs: of its steps, not of what lies before and between them."""

import json
import time
from dataclasses import replace

import torch

import train
from mlembed.arguments import parse
from mlembed.distributed import World
from mlembed.log import Log

SMALL = [
    *("--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.head-dim", "8"),
    *("--model.intermediate-size", "16", "--model.vocab-size", "300", "--model.exits", "1"),
    *("--model.matryoshka-dims", "16", "--model.ranks", "8", "--batch-size", "4"),
    *("--precision", "fp32", "--compile", "off", "--tracker", "none", "--steps", "3"),
    *("--log-every", "1", "--eval-every", "1"),
]


def test_times_exclude_set_up_and_evaluation(tmp_path, monkeypatch):
    rows = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = replace(parse(["tiny", *SMALL, "--data", str(tmp_path / "pairs.jsonl")]), eval=())
    where = World(0, 1, torch.device("cpu"))
    job = train.set_up(run, where, tmp_path, None, Log(tmp_path, main=True))
    real, passed = time.perf_counter, [0.0]

    def an_hour_passes(*args):
        passed[0] += 3600

    monkeypatch.setattr(time, "perf_counter", lambda: real() + passed[0])
    monkeypatch.setattr(train, "score", an_hour_passes)
    an_hour_passes()
    train.optimise(job, 0)
    job.saver.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert sum(line["stage_ms"].values()) < 60_000
        assert line["tokens_per_second"] > 1
