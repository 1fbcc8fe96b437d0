"""A cache of compiled kernels, filled without a GPU and moved to another path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled import precompile

ROOT = Path(__file__).parents[2]
CASE = "embed-gate-one-token-bfloat16"

# Loads the launches of CASE from a cache, in a process that cannot compile.
LOAD = f"""
import sys, triton.compiler.compiler as compiler
from bench.compiled import bench_cases, launches
launches.prepare()
found = launches.collect({{"case": bench_cases.kernel_cases()[{CASE!r}]}})
def refuse(*args, **kwargs): raise RuntimeError("a miss")
compiler.ASTSource.make_ir = refuse
for launch in found:
    assert launch.compile().asm["cubin"]
print(len(found))
"""


def run(*command, **env):
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled") / "cache"
    done = run("-m", "bench", "compile", CASE, "--cache", str(folder), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 cases for sm_90: 0 kernels were there (0 moved), " in done.stdout
    return folder


def test_moved_cache_hits(filled, tmp_path):
    loaded = run("-c", LOAD, TRITON_CACHE_DIR=str(filled))
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    there = int(loaded.stdout)
    copy = tmp_path / "copy"
    shutil.copytree(filled, copy)
    original = filled.rename(filled.with_name("elsewhere"))
    try:
        missed = run("-c", LOAD, TRITON_CACHE_DIR=str(copy))
        assert missed.returncode and "a miss" in missed.stderr
        assert precompile.moved(copy) == there and precompile.moved(copy) == 0
        hit = run("-c", LOAD, TRITON_CACHE_DIR=str(copy))
        assert hit.returncode == 0 and int(hit.stdout) == there, hit.stderr[-2000:]
    finally:
        original.rename(filled)


def test_second_run_compiles_nothing(filled):
    done = run("-m", "bench", "compile", CASE, "--cache", str(filled), "--jobs", "1")
    assert done.returncode == 0 and " 0 compiled by 1 processes, 0 failed" in done.stdout


def test_moved_drops_broken_and_missing_entries(tmp_path):
    entry, broken = tmp_path / "A", tmp_path / "B"
    for folder in (entry, broken):
        folder.mkdir()
    (broken / "__grp__k.json").write_text('{"child_pa')
    (entry / "k.cubin").write_text("code")
    (entry / "k.json").write_text("{}")
    named = {name: f"/old/A/{name}" for name in ("k.json", "k.cubin", "k.ptx")}
    (entry / "__grp__k.json").write_text(json.dumps({"child_paths": named}))
    assert precompile.moved(tmp_path) == 1
    got = json.loads((entry / "__grp__k.json").read_text())["child_paths"]
    assert got == {name: str(entry / name) for name in ("k.json", "k.cubin")}
    assert list(broken.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        ((), ["a-x", "a-xy", "b"]),
        (("a",), ["a-x", "a-xy"]),
        (("a-x", "b"), ["a-x", "b"]),
    ],
)
def test_cases_are_chosen_by_beginning(wanted, got):
    assert precompile.chosen(["a-x", "a-xy", "b"], wanted) == got


def test_unknown_case_is_an_error():
    with pytest.raises(SystemExit, match="error: case: expected a name or its beginning.*'c'"):
        precompile.chosen(["a-x", "b"], ["c"])
