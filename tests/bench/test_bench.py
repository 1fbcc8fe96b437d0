"""The bench's command, its worker and its measurements, on a CPU."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import _Beside, harness, named, report, worker
from bench import records as results
from bench.environment import sources
from bench.harness import CPU, Leaves
from bench.infonce import bench, peers

ROOT = Path(__file__).parents[2]


# ---- as a user runs it ----


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a copy of the files, whose kernels have another version than the installed ones."""
    path = tmp_path_factory.mktemp("checkout")
    for folder in ("bench", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.jsonl")
        shutil.copytree(ROOT / folder, path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", path)
    version = path / "kernels/_version.py"
    version.write_text('__version__ = "9.9.9"\n')
    return path


def run(cwd, *args):
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_smoke_runs_everything_without_numbers(checkout):
    before = sorted(checkout.rglob("bench/results/*"))
    done = run(checkout, "-m", "bench", "infonce", "--smoke", "--case", "reference", "both")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["smoke"] and last["ok"]
    result = last["benches"]["infonce"]
    assert result["environment"]["kernels"] == "9.9.9"  # this copy's, not the installed
    assert result["failed"] == {} and result["green"]
    assert "ms" not in result and result["ceilings"] == {} and result["targets"] == []
    rows = result["ran"]
    assert list(rows) == ["reference", "both"]
    for name in ("ours", "eager", "gemm", "compile", "sentence_transformers"):
        assert rows["reference"]["fwd"][name] == rows["both"]["fwd+bwd"][name] == "ran"
    assert rows["reference"]["fwd+bwd"]["cut_cross_entropy"] in ("ran", "absent")
    assert "tests: collected" in done.stdout and "sweep e1: ran" in done.stdout
    assert not re.search(r"\d ?(ms|s|us)\b|TFLOP|GB/s|MiB", done.stdout), done.stdout
    assert sorted(checkout.rglob("bench/results/*")) == before


def test_kernels_of_the_checkout_are_found(checkout):
    code = """
import importlib.util, sys
def told(f): return f"{getattr(f, '__module__', '')} {type(f).__module__}"
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in told(f)]
sys.path[:] = [p for p in sys.path if "__editable__" not in p]
assert importlib.util.find_spec("mlembed_kernels") is None
import bench
assert "torch" not in sys.modules
import mlembed_kernels.similarity.infonce
print(mlembed_kernels.__version__, sys.modules["mlembed_kernels.similarity.infonce"].__file__)
"""
    done = run(checkout, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["9.9.9", str(checkout / "kernels/similarity/infonce.py")]


def test_missing_module_is_not_taken_from_another_copy(tmp_path):
    assert importlib.util.find_spec("mlembed_kernels.similarity.cosine") is not None
    with pytest.raises(ModuleNotFoundError, match="mlembed_kernels.similarity.cosine"):
        _Beside.find_spec("mlembed_kernels.similarity.cosine", [str(tmp_path)])


NAMES = "infonce, attention, embed, train_step, gradcache, encode, loader"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fastest"], f"error: bench: expected one of {NAMES}, all, got 'fastest'"),
        (["all", "--case", "tiny"], "error: --case: expected one of reference, both, "),
        ([], f"error: expected a bench: {NAMES} or all"),
        (["all", "--fast"], "error: unrecognized arguments: --fast"),
        (["all", "--seconds", "soon"], "error: argument --seconds: invalid float value: 'soon'"),
    ],
    ids=str,
)
def test_wrong_call_is_one_line_and_status_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    with pytest.raises(SystemExit) as caught:
        command.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert printed.err.startswith(message) and printed.err.count("\n") == 1


def test_list(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--list"])
    command.main()
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert ", ".join(lines) == NAMES
    assert lines["infonce"] == "reference, both, small, labse, e1, siglip, huge"
    assert lines["attention"].startswith("short, mid, long, skip, ")
    assert lines["embed"] == "step, masters, rank64, lealla"
    assert lines["train_step"] == "step, step_skip, step_nested, lealla, cpu"
    assert (lines["gradcache"], lines["encode"]) == ("fit, peer, big", "short, mid")
    assert lines["loader"] == "groups, bitext, streamed"


@pytest.mark.parametrize("name", command.NAMES)
def test_benches_have_their_parts(name):
    one = named(name)
    assert all(case.name == key and case.about for key, case in one.CASES.items())
    assert one.gate and one.targets([]) == [] and one.BASELINES is not None
    assert hasattr(one, "rows") or (one.build and one.spot)
    assert not hasattr(one, "SWEEP") or (one.SWEEP_CASE in one.CASES and one.CANDIDATES)
    assert set(getattr(one, "BREAKDOWN", ())) <= set(one.CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_times_are_not_taken_on_a_cpu(checkout):
    done = run(checkout, "-m", "bench", "infonce", "--case", "small")
    assert done.returncode == 1
    assert "error: no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["benches"]["infonce"]["ms"] == {}


# ---- results of the worker ----

STUB = """
import json, os, sys, time
args = sys.argv[1:]
cut, end = args.index("--skip"), args.index("--seconds")
stages, skip, red = args[1:cut], set(args[cut + 1 : end]), "--red" in args
def say(kind, **values): print(json.dumps({"kind": kind, **values}), flush=True)
say("environment", gpu="NVIDIA Toy 9000", sources=SOURCES)
print("a library says hello")
if stages == ["gate"]:
    say("gate", check="one", dtype="bfloat16", ok=MODE != "red", loss={"ok": False})
    sys.exit()
say("ceilings", tflops=100.0, gbs=1000.0)
if MODE == "slow": time.sleep(60)
for provider, ms in {"ours": 50.0, "eager": 150.0, "gemm": None, "compile": 100.0}.items():
    at = {"case": stages[0], "provider": provider, "mode": "fwd+bwd"}
    if ":".join(at.values()) in skip: continue
    say("begin", **at)
    if ms is None:
        os._exit(70) if MODE == "broken" else os.abort()
    own = {"green": not red} if provider == "ours" else {}
    say("row", **at, **own, status="ran", note=None, value=3.0, ms=ms, p20=ms, p80=ms,
        tflops=25.0, gbs=7.0, share=0.25, copy_share=0.007, peak_mib=12.0)
"""


@pytest.fixture
def stubbed(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command with a stub for its worker.

    It returns the status, the printed lines, the last one as JSON, and the results file.
    """

    def call(mode, *args):
        stub = tmp_path / "stub.py"
        stub.write_text(f"MODE, SOURCES = {mode!r}, {sources()!r}\n{STUB}")
        monkeypatch.setattr(command, "WORKER", [sys.executable, str(stub)])
        out = tmp_path / "results"
        argv = ["bench", "infonce", "--case", "small", "--skip-tests", "--out", str(out), *args]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as caught:
            command.main()
        printed = capsys.readouterr().out.splitlines()
        (path,) = out.iterdir()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-toy-9000-infonce\.jsonl", path.name)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return caught.value.code, printed, json.loads(printed[-1]), lines

    return call


def test_dead_worker_loses_one_provider(stubbed):
    status, printed, last, lines = stubbed("died")
    rows = {line["provider"]: line for line in lines if line["kind"] == "row"}
    assert list(rows) == ["ours", "eager", "gemm", "compile"]
    assert rows["gemm"]["status"] == "failed" and "ms" not in rows["gemm"]
    assert "died, exit status -6" in rows["gemm"]["note"]
    result = last["benches"]["infonce"]
    medians = {"ours": 50.0, "eager": 150.0, "gemm": "failed", "compile": 100.0}
    assert result["ms"] == {"small": {"fwd+bwd": medians}}
    assert result["green"] and result["finished"] and status == 0
    cells = {line.split()[0]: line.split() for line in printed if line.split()}
    assert " ".join(cells["ours"]) == "ours 50.000 50.000..50.000 25 25.0% 7 0.7% 12 3.00 2.00"
    assert cells["eager"][-2:] == ["-", "0.67"] and cells["gemm"] == ["gemm", "failed"]


def test_red_has_times_and_no_speed_up(stubbed):
    status, printed, last, lines = stubbed("red")
    ours = next(line for line in lines if line.get("provider") == "ours")
    assert ours["ms"] == 50.0 and ours["green"] is False
    cells = next(line.split() for line in printed if line.startswith("ours"))
    assert cells[-2:] == ["red", "red"]
    assert any("RED one bfloat16" in line for line in printed)
    assert status == 1 and last["ok"] is False and not last["benches"]["infonce"]["green"]


def test_time_limit_holds(stubbed, monkeypatch):
    monkeypatch.setattr(command, "LEAST", 0.0)
    start = time.monotonic()
    status, _, last, lines = stubbed("slow", "--seconds", "2")  # its worker sleeps for a minute
    assert time.monotonic() - start < 20
    assert status == 1 and not last["benches"]["infonce"]["finished"]
    assert any(line["kind"] == "gate" for line in lines)  # what was obtained stays


def test_skipped_cases_are_listed(stubbed):
    status, _, last, lines = stubbed("died", "--seconds", "5")
    assert status == 1 and not last["benches"]["infonce"]["finished"]
    (row,) = (line for line in lines if line["kind"] == "row")
    assert row["status"] == "skipped" and row["note"] == "no time was left"


def test_cases_take_the_verdict_and_the_rows_of_earlier_runs(stubbed, monkeypatch):
    status, printed, _, lines = stubbed("died", "--part", "gate")
    assert [line["kind"] for line in lines] == ["environment", "gate", "stage"] and status == 0
    for _ in range(2):  # the second run finds all rows
        status, printed, last, lines = stubbed("died", "--part", "cases")
        rows = [line["provider"] for line in lines if line["kind"] == "row"]
        assert rows == ["ours", "eager", "gemm", "compile"]
        assert [line["kind"] for line in lines].count("gate") == 1
        assert last["benches"]["infonce"]["green"] and "gate: 1 of 1 checks right" in printed
        assert any(line.startswith("compile") for line in printed)  # in the table
    monkeypatch.setattr(results, "sources", lambda: "changed")
    status, printed, last, _ = stubbed("died", "--part", "cases")
    assert "gate: RED, it was not run for these sources" in printed and status == 1
    assert not last["benches"]["infonce"]["green"]


def test_results_are_kept_without_rows_that_lacked_time(tmp_path):
    row = {"kind": "row", "bench": "infonce", "case": "small", "provider": "ours", "mode": "fwd"}
    path = tmp_path / "r.jsonl"
    records = [
        {"kind": "environment", "bench": "infonce", "sources": "old"}, row | {"status": "ran"},
        {"kind": "environment", "bench": "infonce", "sources": sources()},
        {"kind": "gate", "bench": "infonce", "ok": True},
        {"kind": "stage", "bench": "infonce", "stages": ["gate"], "done": False},
        row | {"mode": "bwd", "status": "skipped"}, row | {"mode": "fwd+bwd", "status": "failed"},
        {"kind": "ceilings", "bench": "infonce"}, row | {"bench": "embed", "status": "ran"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"cut')
    kept = results.earlier(path, "infonce")
    assert kept.gate == [] and list(kept.rows) == ["small:ours:fwd+bwd"]
    assert [record["kind"] for record in kept.others] == ["ceilings"]


# ---- the worker, with times ----


@pytest.fixture
def measuring(make_worker, monkeypatch):
    """Return a function that makes a worker for toy shapes."""
    few = {"providers": ("ours", "eager", "gemm")}
    toys = {name: replace(case.toy(), **few) for name, case in bench.CASES.items()}
    monkeypatch.setattr(bench, "CASES", toys)
    monkeypatch.setattr(bench, "ours", lambda case: peers.eager_stacked(case, True))
    return lambda *skip: make_worker("infonce", skip=skip)


def test_row_has_the_measured_numbers(measuring, records):
    measuring("reference:eager:fwd+bwd").case("reference")
    every = records()
    rows = {(r["provider"], r["mode"]): r for r in every if r["kind"] == "row"}
    assert ("eager", "fwd+bwd") not in rows and rows["eager", "fwd"]["status"] == "ran"
    case = bench.CASES["reference"]
    for mode in case.modes:
        row = rows["ours", mode]
        assert row["repeats"] >= 5 and 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["tflops"] == pytest.approx(case.flops(mode) / row["ms"] / 1e9)
        assert row["gbs"] == pytest.approx(case.nbytes(mode) / row["ms"] / 1e6)
        assert row["share"] == pytest.approx(row["tflops"] / 2.0)
        assert row["copy_share"] == pytest.approx(row["gbs"] / 3.0)
        assert row["green"] and row["sets"] == 1 and row["peak_mib"] is None
    assert rows["ours", "fwd+bwd"]["spot"]["ok"] and rows["gemm", "fwd"]["value"] is None
    (kernels,) = (r for r in every if r["kind"] == "kernels")
    top = [kernel["ms"] for kernel in kernels["top"]]
    assert len(top) == 12 and top == sorted(top, reverse=True)
    assert 0 < sum(top) <= kernels["total_ms"] * 1.0001
    assert "ours, fwd+bwd" in report.kernels(kernels)
    table = report.table(list(rows.values()), "fwd", None, bench.BASELINES)
    assert table.count("\n") >= len(case.providers)


def test_wrong_spot_check_is_red(measuring, records, monkeypatch):
    monkeypatch.setattr(bench, "spot", lambda case, inputs, mode, got: {"ok": False})
    measuring("reference:ours:fwd").case("reference")
    rows = [r for r in records("row") if r["provider"] == "ours"]
    assert [(row["status"], row["green"]) for row in rows] == [("ran", False)]


def test_no_time_skips_providers(measuring, records):
    made = measuring()
    made.end = time.monotonic()
    made.case("huge")
    rows = records()
    assert [row["provider"] for row in rows] == ["ours", "eager", "gemm"]
    assert all(row["status"] == "skipped" and "ms" not in row for row in rows)


def test_sweep_compares_with_the_present_entry(measuring, records, monkeypatch):
    table = {"k": {"BM": 64}, "odd": {"BM": 1}, "unused": {"BM": 2}}

    def step(inputs, backward):
        now = module.CONFIGS_FP32
        if now["k"]["BM"] == 32:
            raise RuntimeError("out of resources")
        factor = (2 if now["k"]["BM"] == 16 else 1) * now["odd"]["BM"]
        loss = factor * sum(x.square().sum() for x in inputs.stacked)
        if backward:
            loss.backward()
        return loss.detach()

    listed = {"k": [{"BM": 32}, {"BM": 16}, {"BM": 8}], "odd": []}
    monkeypatch.setattr(bench, "CANDIDATES", listed)
    monkeypatch.setattr(bench, "build", lambda *_: (step, None))
    monkeypatch.setattr(bench, "SWEEP", {"_nowhere": "fwd", "similarity.cosine": "fwd+bwd"})
    module = importlib.import_module("mlembed_kernels.similarity.cosine")
    monkeypatch.setitem(sys.modules, "mlembed_kernels.similarity.cosine", module)
    monkeypatch.setattr(module, "CONFIGS_FP32", table, raising=False)
    measuring().sweep("e1")
    found = records("sweep")
    entries = [(r["kernel"], r.get("config", {}).get("BM"), r["status"]) for r in found]
    assert entries == [
        *[("_nowhere", None, "failed"), ("k", 64, "ran"), ("k", 32, "failed"), ("k", 16, "ran")],
        *[("k", 8, "ran"), ("odd", 1, "ran")],
    ]
    assert [r.get("right") for r in found[1:5]] == [True, None, False, True]
    assert table == module.CONFIGS_FP32 and table["k"] == {"BM": 64}
    printed = report.sweep(found)
    assert printed.count("WRONG") == 1 and "RuntimeError: out of resources" in printed


# ---- harness ----


def test_percentiles():
    times = [5.0, 1.0, 4.0, 2.0, 3.0, 100.0]
    wanted = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    got = harness.summary(times)
    assert [got.ms, got.p20, got.p80] == pytest.approx(wanted) and got.repeats == 6
    assert harness.summary([7.0]) == harness.Timing(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("size", "sets"), [(1, 102), (10, 12), (49, 4), (50, 4), (99, 3), (100, 3), (101, 1)]
)
def test_sets_exceed_twice_the_cache(size, sets):
    assert harness.sets_needed(size, 50) == sets
    assert sets == 1 or (sets - 1) * size > 100


def test_measure_calls_in_turn():
    seen = []
    timing = harness.measure(lambda i: seen.append(i), CPU, budget_ms=0.0, least=4)
    assert timing.repeats == 4 and seen[-4:] == [0, 1, 2, 3]


def test_inputs_rotate_without_gradients():
    sets = [Leaves(torch.ones(2, 3, 4)) for _ in range(2)]
    assert sets[0].nbytes() == 96 and sets[0].gradient_bytes() == 0

    def step(inputs, backward):
        assert inputs.gradient_bytes() == 0 and torch.is_grad_enabled() == backward
        (x,), total = inputs.stacked, sum((view.sum() for (view,) in inputs.views), torch.zeros(()))
        assert inputs.views[0][0].data_ptr() == x.data_ptr()  # no copy
        if backward:
            (x.sum() + total).backward()
            assert inputs.gradient_bytes() == 192
        return total.detach()

    for mode in ("fwd+bwd", "fwd"):
        call = harness.rotating(step, sets, mode)
        assert [float(call(i)) for i in range(3)] == [24.0] * 3
    with pytest.raises(TypeError, match="bwd: expected a step whose backward stands alone"):
        harness.rotating(step, sets, "bwd")


def test_backward_alone_rotates():
    sets = [Leaves(torch.full((1, 3), float(i))) for i in (2, 3)]
    seen = []

    def cube(x):
        seen.append(x)
        return x**3, 2 * x

    ones = torch.ones(1, 3)
    step = harness.Apart(cube, lambda inputs: (inputs.stacked, (ones, ones)))
    call = harness.rotating(step, sets, "bwd")
    assert len(seen) == 2 and seen[0] is sets[0].stacked[0]
    for i, want in enumerate([14.0, 29.0, 14.0]):  # 3 x^2 + 2
        torch.testing.assert_close(call(i), (torch.full((1, 3), want),))
    assert len(seen) == 2 and sets[0].gradient_bytes() == 0
    outs = harness.rotating(step, sets, "fwd")(1)
    assert not outs[0].requires_grad and [x[0, 0].item() for x in outs] == [27.0, 6.0]
    outs = harness.rotating(step, sets, "fwd+bwd")(0)
    assert [x[0, 0].item() for x in outs] == [8.0, 4.0, 14.0]
    assert harness.size_of((torch.ones(9), torch.full((4, 4), 1.0))) == 5.0
    assert harness.size_of(torch.tensor(-2.5)) == -2.5


def test_judged():
    truth = torch.tensor([1.0, -4.0, 0.5], dtype=torch.float64)
    off = torch.tensor([0.0, 1e-3, 0.0], dtype=torch.float64)
    assert harness.judged(truth + off, truth + off, truth, 0.0)["ok"]
    assert not harness.judged(truth + 1.01 * off, truth + off, truth, 0.0)["ok"]
    assert harness.judged(truth + off, truth, truth, 1e-3)["ok"]  # of the truth's size
    assert not harness.judged(truth + off, truth, truth, 1e-4)["ok"]
    assert not harness.judged(truth * torch.nan, truth + off, truth, 1.0)["ok"]
    part = harness.judged(truth + off, truth, truth, 1e-3)
    assert part["max"] == pytest.approx(1e-3 / 4) and part["eager_max"] == 0


def test_errors_name_no_path():
    error = RuntimeError("In /some/where/else/code.py:3\n  CUDA error a/b (/x/y)")
    assert harness.reason(error) == "RuntimeError: In code.py:3 CUDA error a/b (y)"


def test_candidates_begin_with_the_present_entry():
    present = {"BM": 64, "num_warps": 4, "num_stages": 3}
    listed = {"k": [{"BM": 32}, present, {"BM": 32}, {"BM": None}], "none": [], "k_x": [{"BM": 1}]}
    got = list(worker.candidates(listed, "k", present, False))
    assert got == [present, {**present, "BM": 32}, {"num_warps": 4, "num_stages": 3}]
    assert list(worker.candidates(listed, "k_y", present, False)) == got
    assert list(worker.candidates(listed, "k_x", present, False)) == [present, {**present, "BM": 1}]
    assert list(worker.candidates(listed, "none", present, False)) == [present]
    others = list(worker.candidates(listed, "kk", present, False))
    assert others[0] == present and len(others) == 6
    assert all(config["BM"] == 64 for config in others)
    assert worker.agree((1.0, 2.0), (1.0001, 2.0)) and not worker.agree((1.0, 2.0), (1.0, 2.1))


def test_json_without_nan(capsys):
    worker.say("row", ms=[1.5, float("nan")], at={"x": float("inf")}, name="a")
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert record == {"kind": "row", "ms": [1.5, "nan"], "at": {"x": "inf"}, "name": "a"}
