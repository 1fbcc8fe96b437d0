"""A step of training makes the host wait for nothing on the device.

Steps run on a device without memory, which lists what would wait: reading a number of the device,
an operation whose result's shape it decides, a copy that is not from or to pinned memory. Blocks
are not compiled, and processes do not communicate.
"""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from factories import small_job, small_text, tiny_encoder, write_jsonl
from fake_device import DEVICE, fake_device

import train
from mlembed.config import Distill
from mlembed.modeling.packed_forward import DeviceEncoder
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import distributed, transfer
from mlembed.runtime.distributed import World
from mlembed.training.engine import Engine
from mlembed.training.objective import candidates
from mlembed.training.objective.bank import Bank
from mlembed.training.objective.distill import Distiller
from mlembed.training.objective.loss import weights
from mlembed.training.objective.packed_teacher import PackedTeacher
from mlembed.training.objective.teacher import Teacher
from mlembed.training.optim import optimizer_of, to_weights
from mlembed.training.step import LossSpec, update

WIDTH = 40  # of the teacher's vectors
# Functions that wait, and why they may.
EXCEPTIONS = {
    "guards.py: bad": "reads the check of the step before, once this step's forward is launched",
}
SHARED = ["--steps", 2, "--model.head-dim", 16]  # a width of our attention
EXITS = ["--depth.exits", 1, 2, "--depth.shares", 0.3, 0.7, "--pack-tokens", 40]
BANK = ["--loss.memory-bank", 64, "--loss.bank-on"]
OBJECTIVES = {
    "plain": [],
    "exits": [*EXITS, "--depth.layer-dropout", 0.3],
    "one way": ["--loss.directions", "query_to_doc"],
    "gte": ["--loss.directions", "gte", "--loss.hard-negatives", "own", *EXITS],
    "separate": ["--loss.hard-negatives", "separate", *EXITS],
    "bank on device": [*BANK, "device", *EXITS],
    "bank on host": [*BANK, "host", *EXITS],
}
CASES = OBJECTIVES | {
    "blocks again": [*EXITS, "--activation-checkpointing", "block"],
    "gradient cache": [*EXITS, "--gradient-cache", "--loss.ranks", "all"],
    "mean pooling": [*EXITS, "--model.pooling", "mean"],
}
TERMS = {"embeddings": "somewhere", "features": 1.0, "exits": "all"}
DISTILLED = {
    "features": TERMS,
    "pca": {**TERMS, "align": "pca"},
    "projection": {**TERMS, "align": "projection", "logits": 1.0, "between_exits": 1.0},
    "ml-embed": {**TERMS, "feature_form": "ml-embed", "logits": 1.0, "logit_form": "kl"},
}
TASKS = ("sts", "clustering", "bitext")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("text"), ragged=True)


def set_up(folder, data, options, where, distill=None):
    """Set up a run whose model, optimiser and distiller are on the device."""
    job = small_job(folder, data, *SHARED, *options)
    job.saver.close()
    run = replace(job.run, distill=Distill(**distill)) if distill else job.run
    model = Transformer(run.model).to(DEVICE)
    to_weights(model, run.optim)
    job.batches.world = where
    distiller = Distiller.of(run, WIDTH, torch.zeros(99, WIDTH), World(0, 1, DEVICE))
    bank = Bank(run.loss.memory_bank, run.loss.bank_on == "host") if run.loss.memory_bank else None
    parts = {"optimizer": optimizer_of(model, run.optim), "distiller": distiller, "bank": bank}
    return replace(job, run=run, where=where, engine=Engine(model, where), budget=1.0, **parts)


def batch_of(job, number):
    """Return a batch as the loader gives it: in one pinned buffer."""
    batch = job.batches[number]
    if job.run.distill.embeddings:
        batch = replace(batch, teacher_ND=torch.zeros(len(batch.rows), WIDTH))
    return batch.pin_memory()


def unexpected(device):
    return [(where, what) for where, what in device.waits if where not in EXCEPTIONS]


def steps(folder, data, options, distill=None):
    """Take two steps and return the device."""
    with fake_device() as device:
        job = set_up(folder, data, options, World(0, 1, DEVICE), distill)
        for number in range(2):
            device.waits.clear()
            device.copies = 0
            train.one_step(job, number, iter([batch_of(job, number)]))
    return device


@pytest.mark.parametrize("name", CASES)
def test_objectives_and_models(data, tmp_path, name):
    device = steps(tmp_path, data, CASES[name])
    assert unexpected(device) == []
    ours = {"attention", "embed", "pairwise_lse"}
    ran = {f"mlembed::{op}{way}" for op in ours for way in ("", "_backward")}
    assert ran <= device.operators


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation(data, tmp_path, name):
    assert unexpected(steps(tmp_path, data, EXITS, DISTILLED[name])) == []


def test_a_live_teacher():
    encoder = tiny_encoder()
    trunk = DeviceEncoder(encoder.model.to(DEVICE), encoder.tokenizer, 24, max_tokens=40)
    teacher = Teacher(PackedTeacher(trunk, "", cut=32, normalize=True, width=32), 32, "ask ")
    texts = ["one", "two three " * 9, "one", "four"]
    with fake_device() as device:
        vectors = teacher.encode(texts, queries=2)
    assert unexpected(device) == [] and "mlembed::attention" in device.operators
    assert vectors.device == DEVICE and vectors.shape == (4, 32)


@pytest.mark.parametrize("task", TASKS)
def test_tasks(tmp_path, task):
    own = {"sts": "score"}.get(task, "negatives")
    rows = [
        {"query": f"{i} cats", "positive": f"{i} dogs", own: i / 20 if own == "score" else ["owls"]}
        for i in range(20)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": path, "task": task}]}))
    assert unexpected(steps(tmp_path, [str(mixture)], EXITS)) == []


@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes(data, tmp_path, monkeypatch, name, across):
    """Forward, loss and backward of one of two processes, whose transfers do nothing."""
    options = OBJECTIVES[name]
    if across == "ring" and name == "gte":
        pytest.skip("gte gathers")
    monkeypatch.setattr(distributed, "all_gather", lambda whole, x: None)
    monkeypatch.setattr(distributed, "reduce_scatter", lambda own, whole, op: None)
    monkeypatch.setattr(candidates, "_exchange", lambda where, mine, theirs: [])
    monkeypatch.setattr(dist, "all_reduce", lambda x, op=None: None)
    with fake_device() as device:
        where = World(1, 2, DEVICE)
        job = set_up(tmp_path, data, [*options, "--loss.negatives-across", across], where)
        device.waits.clear()
        for number in range(2):
            weight_EM = transfer.moved(weights(job.run), DEVICE)
            spec = LossSpec(8, weight_EM, 1.0, (0,))
            train.add_gradients(job, batch_of(job, number).to(DEVICE), spec, True)
    assert unexpected(device) == []


def test_stochastic_optimiser(data, tmp_path):
    with fake_device() as device:
        options = "--optim.weights", "bf16", "--precision", "bf16"
        job = set_up(tmp_path, data, options, World(0, 1, DEVICE))
        for parameter in job.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        device.waits.clear()
        update(job, 0, {"contrastive": torch.zeros(2, 2, device=DEVICE)})
    assert unexpected(device) == []


def test_a_step_copies_its_batch_at_once(data, tmp_path):
    """The other two are the weights of the loss, and the exits of each term."""
    assert steps(tmp_path, data, []).copies == 3


# ---- waits that have to be found ----


def found(function):
    # Operations whose results' shapes the device decides have none here.
    with fake_device() as device, suppress(NotImplementedError):
        function(torch.rand(4, 3, device=DEVICE))
    return [what for _, what in device.waits]


X, ROWS_OF_X = torch.rand(4, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: X.to(x.device),
        lambda x: X.to(x.device, non_blocking=True),
        lambda x: X.pin_memory().to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x[ROWS_OF_X],
        lambda x: x[[0, 2]],
        lambda x: x.copy_(X),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Event().synchronize(),
        lambda x: torch.empty(4, 3).copy_(x, non_blocking=True),
    ],
)
def test_a_wait_is_found(function):
    assert len(found(function)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum() + 2.0,
        lambda x: x[torch.arange(2, device=x.device)],
        lambda x: torch.full((3,), 2.0, device=x.device),
        lambda x: X.pin_memory().to(x.device, non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(4, 3, pin_memory=True).copy_(x, non_blocking=True),
        lambda x: transfer.moved(X, x.device),
        lambda x: x * torch.tensor(3.0),
    ],
)
def test_what_does_not_wait(function):
    assert found(function) == []
