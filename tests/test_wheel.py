"""A wheel of a clean clone, installed outside of the checkout into an environment of its own."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from factories import tiny_encoder, write_encoder
from processes import ROOT

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
KERNELS = """
import torch, mlembed, mlembed_kernels
x = torch.eye(2, 8)[None]
print(mlembed_kernels.infonce(x, x, dims=(4, 8))[0, 0].item())
print(mlembed.__file__, mlembed_kernels.__file__, mlembed.__version__)
"""


def run(*command, cwd, status=0, **changes):
    """Run a command without this session's import paths. Return its standard output and errors."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clone") / "mlembed"
    run("git", "clone", "--quiet", ROOT, path, cwd=ROOT)
    return path


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BUILD, folder, cwd=clone)
    (path,) = folder.glob("mlembed-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the libraries of this one, but without its link to the checkout.

    A path file adds a folder to sys.path and runs no path files in it, editable ones included.
    """
    path = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path)
    (site,) = path.glob("lib/python*/site-packages")
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "libraries.pth").write_text("\n".join(folders) + "\n")
    pip = ["-m", "pip", "--python", path / "bin" / "python", "install", "--no-deps", "--no-index"]
    run(sys.executable, *pip, "--no-compile", "--ignore-installed", wheel, cwd=path)
    return path / "bin"


def test_wheel_has_the_files_of_git(clone, wheel):
    tracked = run("git", "ls-files", "mlembed", "kernels", cwd=clone).split()
    expected = {re.sub("^kernels/", "mlembed_kernels/", name) for name in tracked}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_commands_work_without_a_checkout(environment, tmp_path):
    write_encoder(tiny_encoder(), tmp_path / "model")
    command = environment / "mlembed"
    assert "usage: mlembed COMMAND" in run(command, "--help", cwd=tmp_path)
    message = run(command, "train", "tiny", cwd=tmp_path, status=1)
    assert message.startswith("error: train: expected an installation from a checkout")
    assert len(run(command, "encode", "model", "a text", "--dim", "8", cwd=tmp_path).split()) == 8
    cell = {"dim": 8, "exit": 1, "rank": None, "parameters": 9, "bytes_per_vector": 32}
    grid = {"cells": [cell | {"scores": {"task": {"score": 0.5}}}]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    assert "report.html" in run(command, "report", tmp_path, cwd=tmp_path)
    assert "task" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_kernels_work_without_a_checkout(environment, tmp_path):
    loss, path, kernels, version = run(environment / "python", "-c", KERNELS, cwd=tmp_path).split()
    assert 0 < float(loss) < 1 and version == "0.1.0"
    assert path.startswith(str(environment.parent)) and kernels.startswith(str(environment.parent))
