"""Checkpoints are complete or absent, and training resumes from them bit for bit."""

import json
import re
import resource
import shutil
import threading
from functools import partial

import pytest
import torch
from factories import tiny_shape
from safetensors import safe_open

from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import checkpoint, intact
from mlembed.training.optim import optimizer_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPE = tiny_shape(vocab_size=50, hidden_size=16, head_dim=8, intermediate_size=24, ranks=(4, 8))
OPTIM = config.Optim(lr=1e-2, weight_decay=0.1)
ONES = {"a": torch.ones(3)}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def nothing(path):
    """Write no files next to the shards."""


# ---- training state ----


def fresh(device="cpu"):
    torch.manual_seed(7)
    model = Transformer(SHAPE).to(device)
    return model, optimizer_of(model, OPTIM)


def train(model, optimizer, steps):
    """Train on random text, so that the random state matters as well."""
    for _ in range(steps):
        rng = torch.randint(0, SHAPE.vocab_size, (6, 5)).numpy()
        batch = pack(list(rng)).to(model.norm.weight.device)
        model(batch, rank=4).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def saver(directory, keep=2):
    return checkpoint.Saver(directory, 0, 1, keep)


def save(directory, step, model, optimizer, keep=2):
    with saver(directory, keep) as one:
        tensors = checkpoint.training_tensors(model, optimizer, 0)
        one.save(step, tensors, partial(pretrained.describe, model.cfg))
    return directory / f"step_{step:08d}"


@pytest.fixture
def trained():
    """Return a model and its optimiser after one step."""
    model, optimizer = fresh()
    train(model, optimizer, 1)
    return model, optimizer


def restore(path, model, optimizer):
    return checkpoint.restore(path, model, optimizer, 0, 1)["step"]


CUDA = pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_resumed_training_is_bit_for_bit_equal(device, tmp_path):
    model, optimizer = fresh(device)
    train(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 4)

    again = pretrained.load(str(path)).to(device)
    resumed = optimizer_of(again, OPTIM)
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert restore(path, again, resumed) == 3
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, before[name]), name
    train(again, resumed, 4)
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert not torch.equal(ours[name], before[name]), name
        a, b = optimizer.state[ours[name]], resumed.state[theirs[name]]
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(a[k], b[k]) and a[k].device == b[k].device for k in a)


def test_checkpoint_before_the_first_step(tmp_path):
    model, optimizer = fresh()
    path = save(tmp_path, 0, model, optimizer)
    again, resumed = fresh()
    assert restore(path, again, resumed) == 0 and not resumed.state
    train(model, optimizer, 1)
    torch.set_rng_state(checkpoint.read(path, "rng.cpu.")["rng.cpu.0"])
    train(again, resumed, 1)
    assert torch.equal(model.norm.weight, again.norm.weight)


def test_checkpoint_is_a_model_directory_of_json_and_safetensors(tmp_path, trained):
    path = save(tmp_path, 12, *trained)
    assert path.name == "step_00000012"
    state = json.loads((path / intact.STATE).read_text())
    assert (state["step"], state["processes"]) == (12, 1)
    assert state["files"].keys() == {p.name for p in path.iterdir()} - {intact.STATE}
    assert pretrained.load(str(path)).cfg == SHAPE
    for file in path.rglob("*"):
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        else:
            with safe_open(file, framework="pt") as tensors:
                assert tensors.keys()


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_pruning_keeps_the_newest(keep, tmp_path):
    steps = [2, 9, 10, 11, 100]
    for i, step in enumerate(steps, 1):
        with saver(tmp_path, keep) as one:
            one.save(step, ONES, nothing)
        left = [int(p.name.removeprefix("step_")) for p in intact.complete(tmp_path)]
        assert left == steps[:i][-keep:]
    assert len(names(tmp_path)) == min(keep, 5)


def test_step_is_saved_once(tmp_path, trained):
    path = save(tmp_path, 5, *trained)
    written = {file.name: file.read_bytes() for file in path.iterdir()}
    train(*trained, 1)
    assert save(tmp_path, 5, *trained) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == written


def test_incomplete_directory_is_not_a_checkpoint(tmp_path, trained):
    save(tmp_path, 5, *trained)
    cut = tmp_path / "step_00000009"  # Left by an interrupted deletion.
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"half")
    for step in ("10", "11"):  # Left by processes that were killed.
        shutil.copytree(tmp_path / "step_00000005", tmp_path / f".step_000000{step}.partial")
    left = tmp_path / ".step_00000010.partial" / "shard-00007-left.safetensors"
    left.write_bytes(b"old")
    assert [p.name for p in intact.complete(tmp_path)] == ["step_00000005"]
    assert intact.complete(tmp_path / "none") == []
    with pytest.raises(ValueError, match="step_00000009"):
        save(tmp_path, 9, *trained)
    assert names(cut) == ["model.safetensors"]
    save(tmp_path, 10, *trained)
    assert [p.name for p in intact.complete(tmp_path)][-1] == "step_00000010"
    assert not list(tmp_path.glob(".*"))
    assert intact.damage(tmp_path / "step_00000010") is None
    assert not (tmp_path / "step_00000010" / left.name).exists()


def test_shapes_of_another_model_are_errors(tmp_path, trained):
    path = save(tmp_path, 1, *trained)
    for change, message in [
        ({"hidden_size": 24}, r"model\.embed_tokens\.W: expected shape \[8, 24\], got \[8, 16\]"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+: expected shape \[.*\], got none"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+: expected shape none, got \["),
    ]:
        other = {**vars(SHAPE), "exits": (), "matryoshka_dims": (), **change}
        other = Transformer(config.Model(**other))
        with pytest.raises(ValueError, match=message):
            restore(path, other, optimizer_of(other, config.Optim()))


def test_random_state_is_restored_for_the_same_number_of_processes(tmp_path):
    model, optimizer = fresh()
    path = save(tmp_path, 1, model, optimizer)
    saved = torch.get_rng_state()
    torch.manual_seed(5)
    other = torch.get_rng_state()
    checkpoint.restore(path, model, optimizer, 0, 2)
    assert torch.equal(torch.get_rng_state(), other)
    checkpoint.restore(path, model, optimizer, 0, 1)
    assert torch.equal(torch.get_rng_state(), saved)


def test_tensors_of_every_kind_are_saved(tmp_path):
    tensors = {
        "bank.scalar": torch.tensor(3),
        "bank.ids": torch.arange(5),
        "bank.rows": torch.randn(3, 4).bfloat16(),
        "bank.none": torch.zeros(0, 4),
        "bank.strided": torch.randn(4, 6).T[1:],
        "bank.flags": torch.tensor([True, False]),
        "bank.wide": torch.randn(2).double(),
    }
    with saver(tmp_path) as one:
        one.save(1, {**tensors, "bandit": torch.ones(1)}, nothing)
    stored = checkpoint.read(tmp_path / "step_00000001", "bank.")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    assert checkpoint.read(tmp_path / "step_00000001", "other.") == {}


def test_files_hold_one_kind_of_tensor_and_are_bounded(tmp_path, monkeypatch, trained):
    monkeypatch.setattr(checkpoint, "FILE", 4096)
    path = save(tmp_path, 1, *trained)
    kinds, stored = set(), {}
    for file in path.glob(checkpoint.SHARDS):
        with safe_open(file, framework="pt") as tensors:
            part = {name: tensors.get_tensor(name) for name in tensors.keys()}
        assert not stored.keys() & part.keys()
        (kind,) = {name.partition(".")[0] for name in part}
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 4096
        kinds.add(kind)
        stored |= part
    assert kinds == {"model", "optimizer", "rng"}
    want = checkpoint.training_tensors(*trained, 0)
    assert stored.keys() == want.keys()
    assert all(torch.equal(stored[name], want[name]) for name in want)


def test_unshared_directory_is_an_error(tmp_path, monkeypatch):
    """The main process does not see the files of another machine."""
    everywhere = checkpoint.Saver._everywhere
    elsewhere = {"shard-00002-x.safetensors": {"bytes": 8, "sha256": "0"}}

    def of_two(self, what):
        found = everywhere(self, what)
        return [*found, elsewhere] if isinstance(found[0], dict) else found

    monkeypatch.setattr(checkpoint.Saver, "_everywhere", of_two)
    with pytest.raises(ValueError, match="that all processes share"), saver(tmp_path) as one:
        one.save(1, ONES, nothing)
    assert names(tmp_path) == []


# ---- in the background ----


@pytest.fixture
def held(monkeypatch):
    """Return an event; nothing is written before it is set."""
    event, begin = threading.Event(), checkpoint._begin

    def after_it(*args):
        assert event.wait(30)
        return begin(*args)

    monkeypatch.setattr(checkpoint, "_begin", after_it)
    return event


def test_tensors_may_change_after_save(held, tmp_path, trained):
    tensors = checkpoint.training_tensors(*trained, 0)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with saver(tmp_path) as one:
        one.save(1, tensors, nothing)
        for tensor in tensors.values():
            tensor.fill_(3)
        assert intact.complete(tmp_path) == []
        held.set()
    found = checkpoint.read(tmp_path / "step_00000001", "")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_save_waits_for_the_one_before(held, tmp_path):
    with saver(tmp_path) as one:
        one.save(1, ONES, nothing)
        threading.Timer(0.5, held.set).start()
        one.save(2, ONES, nothing)
        assert held.is_set() and intact.complete(tmp_path)[0].name == "step_00000001"
    assert [path.name for path in intact.complete(tmp_path)][-1] == "step_00000002"


def fails(path):
    (path / "config.json").write_text("{}")
    raise OSError("no room")


MESSAGE = "step_00000001: could not be written: no room"


@pytest.mark.parametrize("by", ["wait", "save", "close", "with"])
def test_error_is_raised_once(by, tmp_path):
    one = saver(tmp_path)
    one.save(1, ONES, fails)
    with pytest.raises(ValueError, match=MESSAGE):
        if by == "save":
            one.save(2, ONES, fails)
        elif by == "with":
            with one:
                pass
        else:
            getattr(one, by)()
    assert names(tmp_path) == []
    if by in ("wait", "save"):
        one.save(1, ONES, nothing)
        one.wait()
        assert names(tmp_path) == ["step_00000001"]
    one.close()


def test_error_does_not_hide_another(tmp_path):
    with pytest.raises(KeyError, match="mine"), saver(tmp_path) as one:
        one.save(1, ONES, fails)
        raise KeyError("mine")
    assert names(tmp_path) == []


def test_failed_deletion_names_the_checkpoint(tmp_path, monkeypatch):
    with saver(tmp_path, keep=1) as one:
        one.save(1, ONES, nothing)

        def stuck(path):
            raise OSError("busy")

        monkeypatch.setattr(checkpoint.shutil, "rmtree", stuck)
        one.save(2, ONES, nothing)
        with pytest.raises(ValueError, match="step_00000001: could not be deleted: busy"):
            one.wait()
    assert [path.name for path in intact.complete(tmp_path)] == ["step_00000002"]


# ---- a full disk ----


# The optimiser takes twice as much as the model: the first file fails, or only the second.
@pytest.mark.parametrize("share", [0.1, 1.5])
def test_full_disk_leaves_the_earlier_checkpoint(share, tmp_path, trained):
    path = save(tmp_path, 1, *trained)
    limit = int(share * sum(parameter.nbytes for parameter in trained[0].parameters()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ValueError, match="step_00000002: could not be written: "):
            save(tmp_path, 2, *trained)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step_00000001"]
    assert restore(path, *fresh()) == 1


# ---- damage ----

FILES = [f"shard-00001-model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FILES += ["config.json", "mlembed_config.json", "state.json"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    model, optimizer = fresh()
    for step in (1, 2):
        train(model, optimizer, 1)
        save(directory, step, model, optimizer)
    return directory


def damaged(file, how):
    """Damage a file; return a pattern of what is then wrong with it."""
    data = file.read_bytes()
    middle = len(data) // 2
    if how == "missing":
        file.unlink()
        return "no such file"
    if how == "cut":
        file.write_bytes(data[:middle])
        return f"expected {len(data)} bytes, got {middle}"
    file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    return "expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}$"


@pytest.mark.parametrize("how", ["missing", "cut", "bit"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_used(name, how, two, tmp_path):
    directory = tmp_path / "c"
    shutil.copytree(two, directory)
    older, newer = (directory / f"step_0000000{step}" for step in (1, 2))
    assert names(newer) == sorted(FILES)
    lines: list[str] = []
    assert intact.newest(directory, lines.append) == newer and lines == []
    message = damaged(newer / name, how)
    if name == intact.STATE and how != "missing":
        message = "expected"
    assert intact.newest(directory, lines.append) == older
    words = rf"{newer} is damaged; step_00000001 is used instead\. {name}: {message}"
    assert re.match(words, lines[0])
    assert "\n" not in lines[0] and names(directory) == [older.name, newer.name]

    before = {file.name: file.read_bytes() for file in newer.iterdir()}
    assert intact.newest(directory, lines.append, set_aside=True) == older
    aside = directory / "damaged_step_00000002"
    assert f"renamed to {aside.name}" in lines[1] and names(directory) == [aside.name, older.name]
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == before
    model, optimizer = fresh()
    assert intact.newest(directory, lines.append) == older and restore(older, model, optimizer)
    assert save(directory, 2, model, optimizer) == newer and intact.damage(newer) is None
    damaged(newer / name, how)
    intact.newest(directory, lines.append, set_aside=True)
    assert (directory / "damaged_step_00000002_1").is_dir() and aside.is_dir()


def test_every_bit_of_the_state_counts(two, tmp_path):
    shutil.copytree(two / "step_00000002", tmp_path / "c")
    file = tmp_path / "c" / intact.STATE
    data = file.read_bytes()
    for bit in range(0, 8 * len(data), 29):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        assert intact.damage(file.parent), bit
    file.write_bytes(data)
    assert intact.damage(file.parent) is None


def test_surplus_shard_is_damage(two, tmp_path):
    """It would be read with the others."""
    shutil.copytree(two / "step_00000002", tmp_path / "c")
    shutil.copy(two / "step_00000001" / FILES[0], tmp_path / "c" / "shard-00009-x.safetensors")
    wrong = intact.damage(tmp_path / "c")
    assert wrong == "shard-00009-x.safetensors: not a file of this checkpoint"


def test_all_damaged_is_an_error(two, tmp_path):
    directory = tmp_path / "c"
    assert intact.newest(directory) is None
    shutil.copytree(two, directory)
    for path in directory.iterdir():
        (path / "config.json").unlink()
    message = r"intact checkpoint, all are damaged: step_00000002/config\.json: .*01/"
    with pytest.raises(ValueError, match=message):
        intact.newest(directory, set_aside=True)
    assert names(directory) == ["step_00000001", "step_00000002"]


def test_missing_shard_is_an_error(two, tmp_path):
    with saver(tmp_path) as one:
        one.save(1, {"a": torch.ones(4)}, lambda path: None)
    (file,) = (tmp_path / "step_00000001").glob(checkpoint.SHARDS)
    data = file.read_bytes()
    moved = data.replace(b'saved_offsets\\": [0]', b'saved_offsets\\": [8]')
    assert moved != data
    file.write_bytes(moved)
    with pytest.raises(ValueError, match="a: expected all of its shards, some are missing"):
        checkpoint.read(file.parent, "")
    file.write_bytes(data[:-3])
    with pytest.raises(ValueError, match="step_00000001: could not be read"):
        checkpoint.read(file.parent, "")
