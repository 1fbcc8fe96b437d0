"""`mlembed train`: checks its arguments, then runs the train.py of a checkout."""

import os
import sys

import pytest
from processes import ROOT

from mlembed.cli import train


def test_train_runs_the_script_of_the_checkout(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda *args: calls.append(args))
    train.main(["tiny", "--steps", "3"])
    command = [sys.executable, str(ROOT / "train.py"), "tiny", "--steps", "3"]
    assert calls == [(sys.executable, command)]


@pytest.mark.parametrize("names", [[], ["train.py"], ["pyproject.toml"]])
def test_train_needs_a_checkout(names, tmp_path, monkeypatch):
    """A folder of installed packages may hold another project's train.py."""
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(train, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="train: expected an installation from a checkout"):
        train.main(["tiny"])
    with pytest.raises(ValueError, match="no such key"):
        train.main(["tiny", "--stepz", "3"])
