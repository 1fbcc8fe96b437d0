"""A checkpoint that is not what was written is never gone on from: it is named, and the one before
is used."""

import re
import shutil

import pytest
import torch

from mlembed.runtime import checkpoint
from tests.runtime.test_checkpoint import fresh, names, restore, save, saver, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    model, optimizer = fresh()
    for step in (1, 2):
        train(model, optimizer, 1)
        save(directory, step, model, optimizer)
    return directory


FILES = [
    *(f"shard-00001-model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    "config.json",
    "mlembed_config.json",
    "state.json",
]


def hurt(file, how):
    """-> what is then to be said of it."""
    text = file.read_bytes()
    if how == "missing":
        file.unlink()
        return "expected a file, found none"
    if how == "cut":
        file.write_bytes(text[: len(text) // 2])
        return f"expected {len(text)} bytes, found {len(text) // 2}"
    middle = len(text) // 2
    file.write_bytes(text[:middle] + bytes([text[middle] ^ 1]) + text[middle + 1 :])
    return "expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}$"


@pytest.mark.parametrize("how", ["missing", "cut", "bit"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_used(name, how, two, tmp_path):
    directory = tmp_path / "c"
    shutil.copytree(two, directory)
    older, newer = (directory / f"step_0000000{step}" for step in (1, 2))
    assert names(newer) == sorted(FILES)
    said: list[str] = []
    assert checkpoint.newest(directory, said.append) == newer and said == []
    message = hurt(newer / name, how)
    if name == checkpoint.STATE and how != "missing":
        message = "expected"
    assert checkpoint.newest(directory, said.append) == older
    (line,) = said
    assert "\n" not in line and line.startswith(
        f"{newer} is damaged; step_00000001 is used instead"
    )
    assert re.search(rf"\. {name}: {message}", line)
    assert names(directory) == [older.name, newer.name]

    kept = {file.name: file.read_bytes() for file in newer.iterdir()}
    assert checkpoint.newest(directory, said.append, set_aside=True) == older
    assert "renamed to damaged_step_00000002" in said[1]
    assert names(directory) == ["damaged_step_00000002", older.name]
    aside = directory / "damaged_step_00000002"
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == kept
    model, optimizer = fresh()
    assert checkpoint.newest(directory, said.append) == older and restore(older, model, optimizer)
    assert save(directory, 2, model, optimizer) == newer and checkpoint.damage(newer) is None
    hurt(newer / name, how)
    checkpoint.newest(directory, said.append, set_aside=True)
    assert (directory / "damaged_step_00000002_1").is_dir() and aside.is_dir()


def test_any_bit_of_the_state_file(two, tmp_path):
    shutil.copytree(two / "step_00000002", tmp_path / "step_00000002")
    file = tmp_path / "step_00000002" / checkpoint.STATE
    text = file.read_bytes()
    for bit in range(0, 8 * len(text), 29):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        assert checkpoint.damage(file.parent), bit
    file.write_bytes(text)
    assert checkpoint.damage(file.parent) is None


def test_a_shard_that_is_not_of_it(two, tmp_path):
    """It would be read with the others."""
    shutil.copytree(two / "step_00000002", tmp_path / "c")
    shutil.copy(two / "step_00000001" / FILES[0], tmp_path / "c" / "shard-00009-x.safetensors")
    wrong = checkpoint.damage(tmp_path / "c")
    assert wrong == "shard-00009-x.safetensors: expected no such file, found one"


def test_all_are_damaged(two, tmp_path):
    directory = tmp_path / "c"
    assert checkpoint.newest(directory) is None
    shutil.copytree(two, directory)
    for path in directory.iterdir():
        (path / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"whole, all are damaged: step_00000002/config\.json: .*01/"
    ):
        checkpoint.newest(directory, set_aside=True)
    assert names(directory) == ["step_00000001", "step_00000002"]


def test_a_missing_shard_is_not_read_as_anything(two, tmp_path):
    with saver(tmp_path) as one:
        one.save(1, {"a": torch.ones(4)}, lambda path: None)
    (file,) = (tmp_path / "step_00000001").glob(checkpoint.SHARDS)
    text = file.read_bytes()
    elsewhere = text.replace(b'saved_offsets\\": [0]', b'saved_offsets\\": [8]')
    assert elsewhere != text
    file.write_bytes(elsewhere)
    with pytest.raises(ValueError, match="a: expected all of its shards, some are missing"):
        checkpoint.read(file.parent, "")
    file.write_bytes(text[:-3])
    with pytest.raises(ValueError, match="step_00000001: could not be read"):
        checkpoint.read(file.parent, "")
