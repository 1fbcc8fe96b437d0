"""The main process works alone for longer than a collective may take, on real gloo processes."""

import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from factories import small_job, write_jsonl
from processes import gloo

import train
from mlembed.data.eval_sets import nway
from mlembed.evaluation import grid
from mlembed.publishing import export, probes
from mlembed.runtime import distributed
from mlembed.runtime.distributed import World, any_process, main_works, world
from mlembed.training import resume, setup

LIMIT, WORK = timedelta(seconds=0.5), 2.0  # of a collective; seconds that the main process works


def limited(where):
    """Give collectives of the group LIMIT instead of half an hour."""
    any_process(False, where)  # Processes are connected; that may take longer.
    dist.distributed_c10d._set_pg_timeout(LIMIT, dist.group.WORLD)


def slowly(function):
    def run(*args, **options):
        time.sleep(WORK)
        return function(*args, **options)

    return run


def scored_and_finished(where, folder):
    """Return the seconds that a score at step 0, one after a step, and the end of a run take."""
    words = [(word, mark) for word in ("cat", "dog") for mark in (".", "!")]
    rows = [{"id": w, "lang": {".": "eng", "!": "deu"}[m], "text": w + m} for w, m in words]
    job = small_job(folder, [str(folder / "pairs.jsonl")], "--steps", 1, where=where)
    scored = replace(job, tasks=[nway("dev", rows)])
    took = []
    limited(where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "score_grid", slowly(grid.score_grid))
        patch.setattr(
            export, "export", slowly(lambda *args, **options: probes.Report(1, 1, {"a": 0.0}))
        )
        for step in (0, 1):
            began = time.monotonic()
            train.score(scored, step)
            any_process(False, where)
            took.append(time.monotonic() - began)
        began = time.monotonic()
        patch.setattr(train, "optimise", lambda job, start: job.run.steps)
        patch.setattr(train, "set_up", lambda *args: job)
        patch.setattr(train.resume, "write_config", lambda *args: None)
        again = replace(job.run, output_dir=str(folder / "again"), tracker="none")
        assert train.train(again, where) == 0
        any_process(False, where)
        took.append(time.monotonic() - began)
    return took


def test_evaluation_and_export_take_longer_than_a_collective(tmp_path):
    rows = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(8)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    for took in gloo(2, scored_and_finished, tmp_path):
        assert min(took) >= WORK > 2 * LIMIT.total_seconds()


def factorised(where):
    """Return the order in which processes loaded the model, which the main one does slowly."""
    limited(where)
    order = []

    def load(*args):
        if where.main:
            time.sleep(WORK)
        order.append(time.monotonic())
        return torch.nn.Linear(1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.pretrained, "load", load)
        setup.build(setup.config.Run(init="somewhere"), None, None, None, where)
    any_process(False, where)
    return order


def test_the_main_process_factorises_first(tmp_path):
    first, *others = (one for (one,) in gloo(2, factorised))
    assert all(first < other for other in others)


def set_up(where, folder):
    """Return the seconds that one process's slow reading takes, with that of its checkpoints."""
    limited(where)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        slow = slowly(setup.read_text) if where.rank else setup.read_text
        patch.setattr(setup, "read_text", slow)
        patch.setattr(resume.intact, "newest", slowly(lambda *args, **options: None))
        assert resume._newest(folder / "checkpoints", where, print) is None
        data = [str(folder / "pairs.jsonl")]
        job = small_job(folder / str(where.rank), data, "--steps", 1, where=where)
    group = job.saver.group._get_backend(torch.device("cpu"))
    job.saver.close()
    return time.monotonic() - began, group.options._timeout


def test_reading_takes_longer_on_one_process(tmp_path):
    """A checkpoint may take days to write."""
    rows = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(8)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    for name in "01":
        (tmp_path / name).mkdir()
    for seconds, timeout in gloo(2, set_up, tmp_path):
        assert seconds >= 2 * WORK and timeout >= timedelta(days=1)


def test_one_process_waits_for_none():
    worked = False
    with main_works(World(0, 1, torch.device("cpu")), "nothing"):
        worked = True
    assert worked


@pytest.fixture
def cuda_group(monkeypatch):
    """Pretend that there is CUDA, and return the arguments of the group that `world` joins."""
    arguments = {}
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(distributed, "fresh", lambda store, rank, size: store)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **rest: arguments.update(rest, backend=backend)
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return arguments


def test_nccl_knows_its_device(cuda_group):
    with world("cuda") as where:
        assert where.device == cuda_group["device_id"] == torch.device("cuda", 1)
        assert cuda_group["backend"] == "nccl" and cuda_group["rank"] == 1
