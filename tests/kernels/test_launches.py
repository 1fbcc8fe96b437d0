"""Specialisations of kernels for a GPU: one for each thing that a kernel does differently."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# In a process of its own: collecting patches torch, and this one interprets.
SCRIPT = """
import json, sys
from dataclasses import replace
from functools import partial
from bench import embed
from bench.attention import bench as attention
from bench.compiled import bench_cases, launches
from bench.infonce import bench as infonce
from bench.infonce.cases import NESTED

launches.prepare()
cases = bench_cases.kernel_cases()
for name in ("reference", "both"):
    case = infonce.CASES[name]
    # The last batch of an epoch: rows of no tile, and an odd number of them.
    cases[f"ragged-{name}"] = partial(bench_cases.run_loss, replace(case, B=case.B - 37))
    for E, B in ((1, 16384), (1, 16383), (7, 16384), (7, 16383)):
        cases[f"{name}-{E}-{B}"] = partial(bench_cases.run_loss, replace(case, E=E, B=B))
    # Five prefixes: slices of exits do not begin on 16 bytes either.
    cases[f"five-{name}"] = partial(bench_cases.run_loss, replace(case, dims=NESTED[-5:]))


def batches():
    # Of other lengths, as training meets them: no list begins where that of another batch did.
    for n in range(8):
        bench_cases.run_embed(replace(embed.CASES["step"], T=30_000 + 1001 * n))
        some = replace(attention.CASES["mid"], lengths=(600 + 64 * n, 300, 20 + 4 * n))
        bench_cases.run_attention(some, "ours")


cases["batches"] = batches
for name in sys.argv[1:]:
    for launch in launches.collect({name: cases[name]}):
        found = {"case": name, "kernel": launch.name, "grid": launch.grid}
        print(json.dumps(found | {"key": launch.key(), "layout": launch.key(addresses=False)}))
"""


SIZES = [f"{E}-{B}" for E in (1, 7) for B in (16384, 16383)]
CASES = (
    *(f"{name}-{size}" for name in ("reference", "both") for size in SIZES),
    *("infonce-reference", "infonce-both", "infonce-small", "infonce-gate-ids-both-float32"),
    *("ragged-reference", "ragged-both", "five-reference", "five-both"),
    *("embed-rank64", "attention-mid-ours", "batches"),
)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Every specialisation of each case, as if each were compiled by itself."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *CASES]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_is_compiled_twice_for_its_addresses(rows):
    """Exits are slices at any multiple of 4 bytes, as are a batch's lists of tokens."""
    assert len({row["kernel"] for row in rows}) >= 19
    times = Counter((row["case"], row["layout"]) for row in rows)
    assert not {key: count for key, count in times.items() if count > 1}


def test_no_batch_compiles_what_another_has(rows):
    names = [row["kernel"] for row in rows if row["case"] == "batches"]
    times = Counter(names)
    assert len(times) == 10
    # Of parts in fp32 and of tokens in bf16; of U's rows, and of sums times W's transpose; of
    # sequences up to 512 tokens and beyond.
    assert {name: count for name, count in times.items() if count > 1} == {
        "_sum_kernel": 2, "_project_kernel": 2,
        "_long_forward_kernel": 2, "_queries_backward_kernel": 2,
    }  # fmt: skip


@pytest.mark.parametrize("case", ["reference", "both"])
def test_a_ragged_batch_compiles_nothing(case, rows):
    """Training would wait for it at the end of an epoch."""
    whole, ragged = (
        {row["key"] for row in rows if row["case"] == f"{kind}-{case}"}
        for kind in ("infonce", "ragged")
    )
    assert any("_unpack_kernel" in key for key in whole)
    assert ragged == whole


@pytest.mark.parametrize("case", ["reference", "both"])
def test_each_kernel_is_compiled_once(case, rows):
    """For any number of exits, and of texts, that a run has."""
    keys = [{row["key"] for row in rows if row["case"] == f"{case}-{size}"} for size in SIZES]
    assert all(found == keys[0] for found in keys)
    names = Counter(key.split()[0] for key in keys[0])
    forward = ("_pack", "_positive", "_narrow_forward", "_wide_forward", "_merge")
    assert {names[f"{name}_kernel"] for name in forward} == {1}
    assert max(names.values()) <= 2  # sides as they are, and swapped


def test_splits_are_those_of_a_card(rows):
    """Neighbours on the grid have the same rows: eight at least, or all multiprocessors at once."""
    grids = {
        row["case"]: tuple(row["grid"]) for row in rows if row["kernel"] == "_wide_forward_kernel"
    }
    assert grids["infonce-small"] == (4, 32, 1)
    assert grids["infonce-reference"] == (8, 128, 7)
