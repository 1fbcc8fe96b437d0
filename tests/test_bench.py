"""The bench on CPU: every line of it runs, a number is what it says, and none is made up."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import __main__ as command
from bench import baselines, harness, report, worker
from bench import infonce as bench
from bench.harness import Leaves
from mlembed_kernels import infonce

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


# ---- as a user runs it ----


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files; its kernels are told from the installed ones by their version."""
    path = tmp_path_factory.mktemp("checkout")
    for folder in ("bench", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.jsonl")
        shutil.copytree(ROOT / folder, path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", path)
    init = path / "kernels/__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', init.read_text()))
    return path


def run(cwd, *args):
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_smoke_runs_everything_and_gives_no_numbers(checkout):
    before = sorted(checkout.rglob("bench/results/*"))
    done = run(checkout, "-m", "bench", "all", "--smoke", "--case", "reference", "both")
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


def test_the_folder_beside_it_is_found_where_nothing_is_installed(checkout):
    code = """
import importlib.util, sys
def told(f): return f"{getattr(f, '__module__', '')} {type(f).__module__}"
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in told(f)]
sys.path[:] = [p for p in sys.path if "__editable__" not in p]
assert importlib.util.find_spec("mlembed_kernels") is None
import bench
assert "torch" not in sys.modules
import mlembed_kernels.infonce
print(mlembed_kernels.__version__, sys.modules["mlembed_kernels.infonce"].__file__)
"""
    done = run(checkout, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["9.9.9", str(checkout / "kernels/infonce.py")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fastest"], "error: bench: expected one of infonce, all, got 'fastest'"),
        (["all", "--case", "tiny"], "error: --case: expected one of reference, both, "),
        ([], "error: expected a bench: infonce or all"),
        (["all", "--fast"], "error: unrecognized arguments: --fast"),
        (["all", "--seconds", "soon"], "error: argument --seconds: invalid float value: 'soon'"),
    ],
    ids=str,
)
def test_a_wrong_call_is_one_line_and_status_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    with pytest.raises(SystemExit) as caught:
        command.main()
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert said.err.startswith(message) and said.err.count("\n") == 1


def test_list(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--list"])
    command.main()
    assert capsys.readouterr().out == "infonce: reference, both, small, labse, e1, huge\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_times_are_not_taken_on_a_cpu(checkout):
    done = run(checkout, "-m", "bench", "infonce", "--case", "small")
    assert done.returncode == 1
    assert "error: no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["benches"]["infonce"]["ms"] == {}


# ---- what becomes of the worker's results ----

STUB = """
import json, os, sys, time
args = sys.argv[1:]
cut, end = args.index("--skip"), args.index("--seconds")
stages, skip, red = args[1:cut], set(args[cut + 1 : end]), "--red" in args
def say(kind, **values): print(json.dumps({"kind": kind, **values}), flush=True)
say("environment", gpu="NVIDIA Toy 9000")
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
        tflops=25.0, gbs=7.0, share=0.25, peak_mib=12.0)
"""


@pytest.fixture
def stubbed(tmp_path, monkeypatch, capsys):
    """Runs the command with a stub for its worker -> (status, printed, last line, results)."""

    def call(mode, *args):
        stub = tmp_path / "stub.py"
        stub.write_text(f"MODE = {mode!r}\n{STUB}")
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


def test_a_provider_that_takes_its_process_down_takes_nothing_else(stubbed):
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
    assert " ".join(cells["ours"]) == "ours 50.000 50.000..50.000 25 25.0% 7 12 3.00 2.00"
    assert cells["eager"][-2:] == ["-", "0.67"] and cells["gemm"] == ["gemm", "failed"]


def test_red_takes_times_and_prints_no_speed_up(stubbed):
    status, printed, last, lines = stubbed("red")
    ours = next(line for line in lines if line.get("provider") == "ours")
    assert ours["ms"] == 50.0 and ours["green"] is False
    cells = next(line.split() for line in printed if line.startswith("ours"))
    assert cells[-2:] == ["red", "red"]
    assert any("RED one bfloat16" in line for line in printed)
    assert status == 1 and last["ok"] is False and not last["benches"]["infonce"]["green"]


def test_time_is_kept(stubbed, monkeypatch):
    monkeypatch.setattr(command, "LEAST", 0.0)
    start = time.monotonic()
    status, _, last, lines = stubbed("slow", "--seconds", "2")  # its worker sleeps for a minute
    assert time.monotonic() - start < 20
    assert status == 1 and not last["benches"]["infonce"]["finished"]
    assert any(line["kind"] == "gate" for line in lines)  # what was obtained stays


def test_what_no_time_is_left_for_is_said(stubbed):
    status, _, last, lines = stubbed("died", "--seconds", "5")
    assert status == 1 and not last["benches"]["infonce"]["finished"]
    (row,) = (line for line in lines if line["kind"] == "row")
    assert row["status"] == "skipped" and row["note"] == "no time was left"


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
def test_between_two_uses_of_a_set_lies_twice_the_cache(size, sets):
    assert harness.sets_needed(size, 50) == sets
    assert sets == 1 or (sets - 1) * size > 100


def test_measure_calls_in_turn():
    seen = []
    timing = harness.measure(lambda i: seen.append(i), CPU, budget_ms=0.0, least=4)
    assert timing.repeats == 4 and seen[-4:] == [0, 1, 2, 3]


def test_inputs_rotate_from_no_gradient():
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

    for backward in (True, False):
        call = harness.rotating(step, sets, backward)
        assert [float(call(i)) for i in range(3)] == [24.0] * 3


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


# ---- infonce ----


def test_the_two_numbers():
    reference, both = bench.CASES["reference"], bench.CASES["both"]
    unit = 2 * 16384 * 16384 * 1024 * 7
    assert bench.flops(reference, "fwd") == bench.flops(both, "fwd") == unit
    assert bench.flops(reference, "fwd+bwd") == 3 * unit
    assert bench.flops(reference, "fwd+bwd", 4) == 4 * unit
    assert bench.nbytes(reference, "fwd") == 2 * (2 * 7 * 16384 * 1024)  # q and c of two bytes each
    assert bench.nbytes(reference, "fwd+bwd") == 3 * bench.nbytes(reference, "fwd")
    assert bench.exponentials(reference) == 7 * 8 * 16384**2
    floors = bench.floors(reference, "fwd+bwd", 788, 4247)
    assert floors["recomputing"] == pytest.approx(4 * unit / 788e12 * 1e3)


def test_the_log_says_what_the_functions_say():
    text = (ROOT / "bench/LOG.md").read_text(encoding="utf-8")
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines()]
    table = {row[0]: [float(x) for x in row[1:]] for row in cells if row[0] in bench.CASES}
    assert list(table) == list(bench.CASES)
    for name, numbers in table.items():
        case = bench.CASES[name]
        forward, train = (bench.floors(case, mode, 788, 4247) for mode in ("fwd", "fwd+bwd"))
        wanted = [
            *(bench.flops(case, "fwd") / 1e12, bench.nbytes(case, "fwd") / 1e9),
            *(forward["gemms"], forward["bytes"]),
            *(train["gemms"], train["recomputing"], train["bytes"]),
            *(bench.exponentials(case) / 1e9, bench.exponentials(case) / (16 * 132 * 1.8e9) * 1e3),
        ]
        assert numbers == pytest.approx(wanted, abs=0.0051), name


def case_and_inputs(name, dtype=torch.float64):
    case = bench.toy(bench.CASES[name])
    q, c = (x.detach().to(dtype) for x in bench.inputs(case, CPU, 3).stacked)
    return case, Leaves(q, c)


def loss_and_gradients(step, inputs):
    inputs.clear()
    loss = step(inputs, True)
    if inputs.stacked[0].grad is not None:
        return loss, *(x.grad for x in inputs.stacked)
    return loss, *(torch.stack([view[i].grad for view in inputs.views]) for i in range(2))


def plain_loss(q, c):
    return F.cross_entropy(q @ c.T, torch.arange(len(q)))


@pytest.mark.parametrize("name", ["reference", "both"])
def test_all_compute_the_same(name):
    case, inputs = case_and_inputs(name)
    q, c = (x.detach().requires_grad_() for x in inputs.stacked)
    mode = "per_direction" if case.both else "joint"
    wanted = infonce(q, c, dims=case.dims, directions=case.directions, partition_mode=mode).sum()
    wanted = wanted, *torch.autograd.grad(wanted, (q, c))
    steps = {key: baselines.build(key, case, q[0], True) for key in bench.STEPS if key != "gemm"}
    if not case.both:
        pairs = baselines.by_pair(plain_loss, case.dims, case.temperature)
        steps["pairs"] = pairs, None
    for key, (step, note) in steps.items():
        assert note is None
        for got, want in zip(loss_and_gradients(step, inputs), wanted, strict=True):
            tolerance = 1e-6 if key == "pairs" else 1e-12  # whose sum is taken in fp32
            torch.testing.assert_close(
                got, want, rtol=tolerance, atol=tolerance, check_dtype=False, msg=key
            )


def test_prefixes_that_a_library_cannot_run_are_named(monkeypatch):
    def picky(case, smoke):
        def loss_of(q, c):
            if q.shape[1] == 8:
                raise RuntimeError("too narrow")
            return plain_loss(q, c)

        return loss_of

    case, inputs = case_and_inputs("reference", torch.float32)
    monkeypatch.setitem(baselines.PAIRS, "inf_cl", picky)
    with pytest.warns(UserWarning, match="prefix 8: too narrow"):
        step, note = baselines.build("inf_cl", case, inputs.stacked[0][0].detach(), True)
    assert note == "without prefixes 8, which it cannot run"
    want = sum(
        plain_loss(F.normalize(q) / case.temperature, F.normalize(c)) for q, c in inputs.views
    )
    torch.testing.assert_close(step(inputs, False), want.detach())
    for name in ("cut_cross_entropy", "inf_cl"):  # not installed is no failure
        monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
        with pytest.raises(harness.Missing, match="is not installed"):
            baselines.imported(name, name)


def test_gemm_is_one_product_per_chunk(monkeypatch):
    case, inputs = case_and_inputs("reference", torch.float32)
    monkeypatch.setattr(baselines, "CHUNK", 7)
    assert baselines.gemm(case, True)(inputs, True) is None


@pytest.mark.parametrize("check", bench.checks(), ids=lambda check: check.name)
def test_the_gates_eager_is_the_loss(check):
    """Else its error would be large, and let any kernel pass."""
    check = check.toy()
    given = bench.masks(check, CPU)
    generator = torch.Generator().manual_seed(1)
    q, c = (
        torch.randn(2, n, check.D, generator=generator, dtype=torch.float64)
        for n in (check.Q, check.C)
    )
    got = bench.eager_table(q, c, check, given)
    options = {"directions": check.directions, "partition_mode": check.partition_mode, **given}
    options |= {"dims": check.dims, "temperature": check.temperature, "impl": "reference"}
    torch.testing.assert_close(got, infonce(q, c, **options), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wrong", ["nothing", "loss", "gradient", "noise", "nan", "raises"])
def test_the_gate_sees(wrong, monkeypatch):
    calls = iter(range(100))

    def faulty(q, c, impl, **options):
        loss = infonce(q, c, impl="reference", **options)
        if impl == "reference" or wrong == "nothing":
            return loss
        if wrong == "raises":
            raise RuntimeError("out of resources")
        if wrong == "noise":  # right, but not the same twice
            return loss + next(calls) * 1e-7
        if wrong == "gradient":
            return loss.detach() + 1.0001 * (loss - loss.detach())
        return loss * {"loss": 1.0001, "nan": torch.nan}[wrong]

    monkeypatch.setattr(bench, "infonce", faulty)
    verdicts = list(bench.gate(CPU, True))
    assert len(verdicts) == len(list(bench.checks()))
    assert all(verdict["ok"] == (wrong == "nothing") for verdict in verdicts)
    assert report.gate(verdicts).count("RED") == (0 if wrong == "nothing" else len(verdicts))


def test_the_spot_check_sees():
    case, inputs = case_and_inputs("huge", torch.float32)
    loss_and_gradients(baselines.eager_stacked(case, True), inputs)
    assert bench.spot(case, inputs)["ok"]
    inputs.stacked[0].grad[0, case.B - 1, 3] += 1e-3
    assert not bench.spot(case, inputs)["ok"]


def test_targets_need_both_numbers_and_green():
    def row(case, ms, tflops=1.0, peak=100.0, green=True):
        at = {"case": case, "provider": "ours", "mode": "fwd+bwd", "green": green}
        return {**at, "ms": ms, "tflops": tflops, "peak_mib": peak}

    assert bench.targets([row("reference", 10.0)]) == []
    assert bench.targets([row("reference", 10.0), row("both", 13.5, green=False)]) == []
    both = bench.targets([row("reference", 10.0), row("both", 12.5)])
    assert [(t["value"], t["met"]) for t in both] == [(1.25, True)]
    huge = bench.targets([row("e1", 1.0, 400.0), row("huge", 64.0, 350.0, 3000.0)])
    assert [t["met"] for t in huge] == [False, False]


def test_another_loss_is_no_speed_up():
    def row(provider, value, ms, note=None):
        at = {"case": "small", "mode": "fwd", "provider": provider, "note": note}
        numbers = {"ms": ms, "p20": ms, "p80": ms, "tflops": 1.0, "share": 0.1, "gbs": 1.0}
        return {**at, **numbers, "value": value, "status": "ran"}

    rows = [row("eager", 10.0, 4.0), row("liger", 10.2, 2.0), row("inf_cl", 8.0, 1.0)]
    rows += [row("gemm", None, 0.5), row("cut_cross_entropy", 10.0, 1.0, "without prefixes 8")]
    assert [report.ratio(rows, r, "eager") for r in rows] == ["-", "2.00", "-", "-", "-"]
    assert "inf_cl: another loss: 8, eager 10" in report.table(rows, "fwd", None)


def test_candidates_begin_with_what_there_is():
    present = {"BM": 64, "num_warps": 4, "num_stages": 3}
    listed = {"k": [{"BM": 32}, present, {"BM": 32}, {"num_warps": 8}], "none": []}
    got = list(worker.candidates(listed, "k", present, False))
    assert got == [present, {**present, "BM": 32}, {**present, "num_warps": 8}]
    assert list(worker.candidates(listed, "none", present, False)) == [present]
    others = list(worker.candidates(listed, "new", present, False))
    assert others[0] == present and len(others) == 6
    assert all(config["BM"] == 64 for config in others)
    assert worker.agree((1.0, 2.0), (1.0001, 2.0)) and not worker.agree((1.0, 2.0), (1.0, 2.1))


def test_json_without_nan(capsys):
    worker.say("row", ms=[1.5, float("nan")], at={"x": float("inf")}, name="a")
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said == {"kind": "row", "ms": [1.5, "nan"], "at": {"x": "inf"}, "name": "a"}
