"""Damaged checkpoints are named and never used: the one before is."""

import re
import shutil

import pytest
import torch

from mlembed.runtime import checkpoint
from tests.runtime.test_checkpoint import fresh, names, restore, save, saver, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FILES = [
    *(f"shard-00001-model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    "config.json",
    "mlembed_config.json",
    "state.json",
]


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
    assert checkpoint.newest(directory, lines.append) == newer and lines == []
    message = damaged(newer / name, how)
    if name == checkpoint.STATE and how != "missing":
        message = "expected"
    assert checkpoint.newest(directory, lines.append) == older
    assert re.match(
        rf"{newer} is damaged; step_00000001 is used instead\. {name}: {message}", lines[0]
    )
    assert "\n" not in lines[0] and names(directory) == [older.name, newer.name]

    before = {file.name: file.read_bytes() for file in newer.iterdir()}
    assert checkpoint.newest(directory, lines.append, set_aside=True) == older
    aside = directory / "damaged_step_00000002"
    assert f"renamed to {aside.name}" in lines[1] and names(directory) == [aside.name, older.name]
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == before
    model, optimizer = fresh()
    assert checkpoint.newest(directory, lines.append) == older and restore(older, model, optimizer)
    assert save(directory, 2, model, optimizer) == newer and checkpoint.damage(newer) is None
    damaged(newer / name, how)
    checkpoint.newest(directory, lines.append, set_aside=True)
    assert (directory / "damaged_step_00000002_1").is_dir() and aside.is_dir()


def test_every_bit_of_the_state_counts(two, tmp_path):
    shutil.copytree(two / "step_00000002", tmp_path / "c")
    file = tmp_path / "c" / checkpoint.STATE
    data = file.read_bytes()
    for bit in range(0, 8 * len(data), 29):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        assert checkpoint.damage(file.parent), bit
    file.write_bytes(data)
    assert checkpoint.damage(file.parent) is None


def test_surplus_shard_is_damage(two, tmp_path):
    """It would be read with the others."""
    shutil.copytree(two / "step_00000002", tmp_path / "c")
    shutil.copy(two / "step_00000001" / FILES[0], tmp_path / "c" / "shard-00009-x.safetensors")
    wrong = checkpoint.damage(tmp_path / "c")
    assert wrong == "shard-00009-x.safetensors: not a file of this checkpoint"


def test_all_damaged_is_an_error(two, tmp_path):
    directory = tmp_path / "c"
    assert checkpoint.newest(directory) is None
    shutil.copytree(two, directory)
    for path in directory.iterdir():
        (path / "config.json").unlink()
    message = r"intact checkpoint, all are damaged: step_00000002/config\.json: .*01/"
    with pytest.raises(ValueError, match=message):
        checkpoint.newest(directory, set_aside=True)
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
