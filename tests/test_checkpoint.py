"""A checkpoint is complete or it is not there, and training goes on from it bit for bit."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from mlembed import checkpoint, config, pretrained
from mlembed.model import Transformer
from mlembed.optim import adamw
from mlembed.pack import pack

SHAPE = config.Model(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    ranks=(4, 8),
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ---- atomic_directory ----


def test_success_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with checkpoint.atomic_directory(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text("a")
        (partial / "b.txt").write_text("b")
        assert not target.exists()
    assert names(target) == ["b.txt", "sub"] and (target / "sub" / "a.txt").read_text() == "a"
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_an_exception_inside_leaves_nothing(error, tmp_path):
    with pytest.raises(error, match="half way"), checkpoint.atomic_directory(tmp_path / "t") as p:
        (p / "a.txt").write_text("a")
        raise error("half way")
    assert names(tmp_path) == []


def test_an_existing_target_is_refused_and_untouched(tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    file.write_text("precious")
    for target in (full, file):
        entered = False
        with (
            pytest.raises(ValueError, match="expected nothing there yet, found something"),
            checkpoint.atomic_directory(target),
        ):
            entered = True
        assert not entered
    assert names(tmp_path) == ["file", "full"] and names(full) == ["mine.txt"]
    assert file.read_text() == (full / "mine.txt").read_text() == "precious"


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "t"
    with (
        pytest.raises(ValueError, match="could not be written"),
        checkpoint.atomic_directory(target) as partial,
    ):
        (partial / "a.txt").write_text("a")
        target.mkdir()
        (target / "theirs.txt").write_text("precious")
    assert names(tmp_path) == ["t"] and names(target) == ["theirs.txt"]


def test_an_empty_target_is_filled(tmp_path):
    (tmp_path / "t").mkdir()
    with checkpoint.atomic_directory(tmp_path / "t") as partial:
        (partial / "a.txt").write_text("a")
    assert names(tmp_path / "t") == ["a.txt"]


def test_what_a_killed_run_left_is_replaced(tmp_path):
    left = tmp_path / ".t.partial"
    left.mkdir()
    (left / "old.txt").write_text("old")
    with checkpoint.atomic_directory(tmp_path / "t") as partial:
        (partial / "new.txt").write_text("new")
    assert names(tmp_path) == ["t"] and names(tmp_path / "t") == ["new.txt"]


def test_an_os_error_becomes_one_about_the_target(tmp_path):
    with (
        pytest.raises(ValueError, match=r"t: could not be written: .*No such file"),
        checkpoint.atomic_directory(tmp_path / "t") as partial,
    ):
        (partial / "none" / "a.txt").write_text("a")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("a file where a directory is needed")
    with (
        pytest.raises(ValueError, match="could not be written"),
        checkpoint.atomic_directory(tmp_path / "file" / "t"),
    ):
        pass
    assert names(tmp_path) == ["file"]


# ---- write_text ----


def test_write_text(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_text(path, "one é\n")
    checkpoint.write_text(path, "two é\n")
    assert path.read_bytes() == "two é\n".encode() and names(tmp_path) == ["a.json"]


def test_write_text_that_fails_keeps_the_old_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: could not be written"):
        checkpoint.write_text(tmp_path / "none" / "a.json", "x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "in.txt").write_text("old")
    with pytest.raises(ValueError, match="d: could not be written"):
        checkpoint.write_text(tmp_path / "d", "x")
    assert names(tmp_path) == ["d"] and (tmp_path / "d" / "in.txt").read_text() == "old"


# ---- training state ----


def fresh(device="cpu"):
    torch.manual_seed(7)
    model = Transformer(SHAPE).to(device)
    return model, adamw(model, config.Optim(lr=1e-2, weight_decay=0.1))


def train(model, optimizer, steps):
    """Steps on random text, so that the random state matters too."""
    for _ in range(steps):
        rng = torch.randint(0, SHAPE.vocab_size, (6, 5)).numpy()
        batch = pack(list(rng)).to(model.norm.weight.device)
        model(batch, rank=4).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(directory, step, model, optimizer, keep=2):
    return checkpoint.save(
        directory, step, lambda p: pretrained.save(model, p), model, optimizer, keep
    )


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))],
)
def test_training_goes_on_bit_for_bit(device, tmp_path):
    model, optimizer = fresh(device)
    train(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 4)

    again = pretrained.load(str(path)).to(device)
    resumed = adamw(again, config.Optim(lr=1e-2, weight_decay=0.1))
    torch.manual_seed(99)  # another process would be anywhere
    assert checkpoint.restore(path, again, resumed) == {"step": 3}
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


def test_without_its_state_the_optimiser_goes_elsewhere(tmp_path):
    """So the test above can fail."""
    model, optimizer = fresh()
    train(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer)
    state = torch.get_rng_state()
    train(model, optimizer, 1)
    again = pretrained.load(str(path))
    torch.set_rng_state(state)
    train(again, adamw(again, config.Optim(lr=1e-2, weight_decay=0.1)), 1)
    assert not torch.equal(model.norm.weight, again.norm.weight)


def test_a_checkpoint_before_the_first_step(tmp_path):
    model, optimizer = fresh()
    path = save(tmp_path, 0, model, optimizer)
    again, resumed = fresh()
    assert checkpoint.restore(path, again, resumed) == {"step": 0}
    train(model, optimizer, 1)
    torch.set_rng_state(checkpoint.load_file(path / checkpoint.TRAINING)["rng.cpu"])
    train(again, resumed, 1)
    assert torch.equal(model.norm.weight, again.norm.weight)


def test_a_checkpoint_is_a_model_directory(tmp_path):
    model, optimizer = fresh()
    path = save(tmp_path, 12, model, optimizer)
    assert path.name == "step_00000012"
    assert json.loads((path / checkpoint.STATE).read_text()) == {"step": 12}
    assert pretrained.load(str(path)).cfg == SHAPE


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_pruning_keeps_the_newest(keep, tmp_path):
    model, optimizer = fresh()
    steps = [2, 9, 10, 11, 100]
    for i, step in enumerate(steps, 1):
        save(tmp_path, step, model, optimizer, keep)
        kept = [int(p.name.removeprefix("step_")) for p in checkpoint.complete(tmp_path)]
        assert kept == steps[:i][-keep:]
    assert len(names(tmp_path)) == min(keep, 5)


def test_saving_the_same_step_again_keeps_what_is_there(tmp_path):
    model, optimizer = fresh()
    path = save(tmp_path, 5, model, optimizer)
    written = (path / "model.safetensors").read_bytes()
    train(model, optimizer, 1)
    assert save(tmp_path, 5, model, optimizer) == path
    assert (path / "model.safetensors").read_bytes() == written


def test_an_incomplete_directory_is_never_complete(tmp_path):
    model, optimizer = fresh()
    save(tmp_path, 5, model, optimizer)
    cut = tmp_path / "step_00000009"  # as a deletion that was interrupted leaves it
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"half")
    partial = tmp_path / ".step_00000010.partial"
    shutil.copytree(tmp_path / "step_00000005", partial)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000005"]
    assert checkpoint.complete(tmp_path / "none") == []
    with pytest.raises(ValueError, match="step_00000009"):  # not reported as saved
        save(tmp_path, 9, model, optimizer)
    assert names(cut) == ["model.safetensors"]
    save(tmp_path, 10, model, optimizer)
    assert [p.name for p in checkpoint.complete(tmp_path)][-1] == "step_00000010"
    assert not partial.exists()


# ---- a full disk ----

FULL = """
import resource, sys
from pathlib import Path
import torch
from mlembed import checkpoint, config, pretrained
from mlembed.model import Transformer
from mlembed.optim import adamw

directory, limit = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = Transformer(config.Model(vocab_size=500, hidden_size=32, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=32, intermediate_size=32))
optimizer = adamw(model, config.Optim())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
write = lambda path: pretrained.save(model, path)
checkpoint.save(directory, 1, write, model, optimizer, keep=1)
checkpoint.write_text(directory / "small.txt", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for attempt in (lambda: checkpoint.save(directory, 2, write, model, optimizer, keep=1),
                lambda: checkpoint.write_text(directory / "small.txt", "new" * limit)):
    try:
        attempt()
        print("saved?")
    except ValueError as error:
        print("ValueError:", " ".join(str(error).split()))
"""


# The model takes 90 KB, the optimiser twice that: the first file fails, only the last fails.
@pytest.mark.parametrize("limit", [1000, 100_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(limit, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(limit)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"ValueError: {tmp_path}/step_00000002: could not be written: ")
    assert second.startswith(f"ValueError: {tmp_path}/small.txt: could not be written: ")
    assert names(tmp_path) == ["small.txt", "step_00000001"]
    assert (tmp_path / "small.txt").read_text() == "old"
    (path,) = checkpoint.complete(tmp_path)
    model = pretrained.load(str(path))
    assert checkpoint.restore(path, model, adamw(model, config.Optim())) == {"step": 1}
