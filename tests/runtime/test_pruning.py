"""Which checkpoints a run deletes, and deletions that are interrupted."""

import pytest
import torch

from mlembed.runtime import checkpoint, intact
from mlembed.runtime.checkpoint import Saver

ONES = {"a": torch.ones(3)}


def test_pruning_keeps_as_many_damaged_ones(tmp_path):
    for name in ("step_00000001", "step_00000001_1", "step_00000003", "step_00000002"):
        (tmp_path / f"damaged_{name}").mkdir()
    with Saver(tmp_path, 0, 1, 2) as one:
        one.save(4, ONES, lambda path: None)
    left = [f"damaged_step_0000000{step}" for step in (2, 3)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [*left, "step_00000004"]


def test_interrupted_deletion_ends_with_the_next_checkpoint(tmp_path, monkeypatch):
    """A process that is killed while it deletes leaves some files of an earlier checkpoint."""

    def killed(path):
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    with Saver(tmp_path, 0, 1, 1) as one, monkeypatch.context() as patch:
        one.save(1, {"model.x": torch.ones(2)}, lambda path: (path / "config.json").touch())
        one.wait()
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            one.save(2, ONES, lambda path: None)
            one.wait()
    assert [path.name for path in tmp_path.glob(".*")] == [".step_step_00000001.partial"]
    assert [path.name for path in intact.complete(tmp_path)] == ["step_00000002"]
    with Saver(tmp_path, 0, 1, 1) as one:
        one.save(3, ONES, lambda path: None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
