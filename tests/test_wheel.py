"""Wheels of mlembed and of mlembed-kernels from a clean clone, each installed outside of the
checkout into an environment of its own. That of the kernels has torch, triton, numpy and pytest.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from factories import tiny_encoder, write_encoder
from packaging.requirements import Requirement
from processes import ROOT

from mlembed import __version__

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
# Files of tests/kernels that compare with another package, or read the benches' cases.
NOT_ALONE = ["similarity/test_infonce_published.py"]
NOT_ALONE += ["test_hopper.py", "test_launches.py", "test_machine_code.py"]
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


def build(folder: Path, out: Path) -> Path:
    """Build a wheel of a folder with the setuptools that is installed, without the network."""
    run(sys.executable, "-c", BUILD, out, cwd=folder)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    return build(clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def kernels_wheel(clone, tmp_path_factory) -> Path:
    return build(clone / "kernels", tmp_path_factory.mktemp("kernels_wheel"))


def install(wheel: Path, libraries: set[str], path: Path, *options: str) -> Path:
    """Install a wheel into a new environment that also has the packages of some folders.

    A path file adds a folder to sys.path and runs no path files in it, editable ones included.
    """
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    pip = ["-m", "pip", "--python", path / "bin" / "python", "install", "--no-index"]
    run(sys.executable, *pip, "--no-compile", *options, wheel, cwd=path)
    return path / "bin"


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the libraries of this one, but without its link to the checkout."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = tmp_path_factory.mktemp("environment")
    return install(wheel, folders, path, "--no-deps", "--ignore-installed")


def required(names: list[str], known: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Return the files and folders of distributions, and of those that they require, by name."""
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # One that only other platforms need.
        tops = {str(Path(file).parts[0]) for file in found.files or ()} - {"..", "__pycache__"}
        if name not in known:
            known[name] = [Path(str(found.locate_file(top))) for top in tops]
            wanted = [Requirement(text) for text in found.requires or ()]
            needed = [w.name for w in wanted if not w.marker or w.marker.evaluate({"extra": ""})]
            required(needed, known)
    return known


@pytest.fixture(scope="module")
def kernels_alone(kernels_wheel, tmp_path_factory) -> Path:
    """An environment with mlembed-kernels, torch, triton, numpy, pytest and what they require.

    pip checks that the wheel requires no other package.
    """
    libraries = tmp_path_factory.mktemp("libraries")
    for paths in required(["torch", "triton", "numpy", "pytest"], {}).values():
        for path in paths:
            if not (libraries / path.name).exists():
                (libraries / path.name).symlink_to(path)
    return install(kernels_wheel, {str(libraries)}, tmp_path_factory.mktemp("kernels_alone"))


def test_wheel_has_the_files_of_git(clone, wheel):
    tracked = run("git", "ls-files", "mlembed", "kernels", cwd=clone).split()
    of_project = {"kernels/README.md", "kernels/LICENSE", "kernels/pyproject.toml"}
    expected = {re.sub("^kernels/", "mlembed_kernels/", name) for name in {*tracked} - of_project}
    assert contents(wheel).keys() == expected | {"mlembed/_version.py"}


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel by name, without its metadata."""
    with zipfile.ZipFile(wheel) as files:
        return {name: files.read(name) for name in files.namelist() if ".dist-info/" not in name}


def test_both_wheels_have_the_same_kernels(wheel, kernels_wheel):
    ours = contents(wheel)
    kernels = {name: data for name, data in ours.items() if name.startswith("mlembed_kernels/")}
    assert contents(kernels_wheel) == kernels and len(kernels) > 30
    assert ours["mlembed/_version.py"] == kernels["mlembed_kernels/_version.py"]
    version = re.escape(wheel.name.split("-")[1])
    assert re.fullmatch(rf"mlembed_kernels-{version}-py3-none-any\.whl", kernels_wheel.name)
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "kernels" / "LICENSE").read_bytes()


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
    assert 0 < float(loss) < 1 and version == __version__
    assert path.startswith(str(environment.parent)) and kernels.startswith(str(environment.parent))


def test_kernels_of_another_version_are_rejected(environment, tmp_path):
    other = tmp_path / "mlembed_kernels"
    other.mkdir()
    (other / "__init__.py").write_text("raise AssertionError('imported')")
    (other / "_version.py").write_text('__version__ = "0.0.9"\n')
    command = environment / "python", "-c", "import mlembed; print(mlembed.__version__)"
    said = run(*command, cwd=tmp_path, status=1).splitlines()[-1]
    expected = f"ImportError: mlembed_kernels: expected version {__version__}, got 0.0.9: "
    assert said.startswith(expected)
    (other / "_version.py").write_text(f'__version__ = "{__version__}"\n')
    assert run(*command, cwd=tmp_path) == f"{__version__}\n"


# ---- the kernels alone ----


def test_kernels_alone_run_their_readme(kernels_alone, tmp_path):
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert any('impl="triton"' in block for block in blocks)
    python = kernels_alone / "python"
    run(python, "-W", "ignore", "-c", "".join(blocks), cwd=tmp_path, TRITON_INTERPRET="1")
    # numpy and triton are for the interpreter and for CUDA.
    plain = "".join(block for block in blocks if 'impl="triton"' not in block)
    hide = "import sys; sys.modules['numpy'] = sys.modules['triton'] = None\n"
    run(python, "-W", "ignore", "-c", hide + plain, cwd=tmp_path)
    find = "import importlib.util as u, sys; print(*map(u.find_spec, sys.argv[1:]))"
    assert run(python, "-c", find, "mlembed", "einops", cwd=tmp_path) == "None None\n"


def run_tests(kernels_alone: Path, *words: str) -> str:
    """Run tests of tests/kernels against the installed wheel.

    The option -P keeps the checkout out of sys.path, to which pytest then adds tests/ alone.
    """
    options = ["-P", "-m", "pytest", "-p", "no:cacheprovider", "-o", "pythonpath=tests"]
    return run(kernels_alone / "python", *options, *words, cwd=ROOT, PYTHONDONTWRITEBYTECODE="1")


def test_kernels_alone_pass_quick_tests(kernels_alone):
    names = ["similarity/test_cosine.py", "embedding/test_token_index.py", "attention/test_plan.py"]
    assert " passed" in run_tests(kernels_alone, *(f"tests/kernels/{name}" for name in names))


@pytest.mark.slow
def test_kernels_alone_pass_all_tests(kernels_alone):
    ignored = [f"--ignore=tests/kernels/{name}" for name in NOT_ALONE]
    assert " passed" in run_tests(kernels_alone, "tests/kernels", *ignored)
