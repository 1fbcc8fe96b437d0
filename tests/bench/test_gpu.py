"""`python -m bench gpu`: its plan, its state, its deadline, and items that fail or die."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench_command
from bench import named
from bench.gpu import command, plan, tools, training
from bench.gpu.plan import ITEMS, Item, Where
from bench.gpu.state import CUT, DONE, FAILED, OPEN, TRIES, State
from bench.harness import CPU

ROOT = Path(__file__).parents[2]


def item(name, code, seconds=20.0, **options):
    """Return an item that runs this code in a process of its own."""
    return Item(name, f"about {name}", seconds, lambda where, left: ["-c", code], **options)


FINE, FAILS = "print('fine: 3 of 3')", "raise SystemExit('error: out of registers')"
DIES, SLEEPS = "import os; print('here', flush=True); os.abort()", "import time; time.sleep(60)"


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """Return a function that runs the command on these items -> its status, and what it printed."""
    monkeypatch.setattr(command, "RESERVE", 0.0)

    def run(items, *args):
        with pytest.raises(SystemExit) as caught:
            command.main(["--out", str(tmp_path), *args], items)
        return caught.value.code, capsys.readouterr().out

    return run


def states(folder, items, sources=None):
    state = State.read(folder, sources or command.sources())
    return {item.name: state.of(item.name) for item in items}


# ---- a call ----


def test_items_run_in_order_and_once(call, tmp_path):
    items = item("a", FINE), item("b", DIES), item("c", FAILS), item("d", FINE)
    status, out = call(items)
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines()[:4]] == list("abcd")
    got = states(tmp_path, items)
    assert [got[name].state for name in "abcd"] == [DONE, FAILED, FAILED, DONE]
    assert (got["a"].note, got["c"].note) == ("fine: 3 of 3", "error: out of registers")
    assert got["b"].note == "here" and "4 of 4 items ended" in out.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.jsonl", "log.txt"]
    log = (tmp_path / "log.txt").read_text()
    assert "==== b: failed" in log and "error: out of registers" in log
    status, out = call(items)  # what failed is not tried again
    assert status == 0 and "a:" not in out and "4 of 4 items ended, about 0 s are left" in out


def test_failed_items_are_tried_with_other_sources_or_if_asked(call, tmp_path, monkeypatch):
    items = item("a", FINE), item("b", FAILS)
    call(items)
    assert "b: about b" in call(items, "--again", "b")[1]
    monkeypatch.setattr(command, "sources", lambda: "changed")
    status, out = call(items)
    assert "b: about b" in out and "a: about a" not in out and status == 1
    assert "other sources" in call(items, "--list")[1]


def test_call_ends_in_time_and_the_next_goes_on(call, tmp_path):
    slow = item("slow", SLEEPS, seconds=3.0)
    items = item("a", FINE), slow, item("long", FINE, seconds=99.0), item("b", FINE)
    start = time.monotonic()
    status, out = call(items[:2], "--seconds", "6")
    assert 2 < time.monotonic() - start < 20
    assert states(tmp_path, items)["slow"].state in (CUT, FAILED)
    status, out = call(items, "--seconds", "25")
    got = states(tmp_path, items)
    assert got["b"].state == DONE and got["long"].state == OPEN  # it did not fit, b did
    assert "long" not in out.splitlines()[-2] and "about 99 s" in out.splitlines()[-1]
    status, out = call(items, "--list")
    assert re.search(r"^long +open +- +99  about long$", out, re.MULTILINE)


def test_own_limit_ends_an_item(call, tmp_path):
    items = item("slow", SLEEPS, seconds=1.0), item("goes_on", SLEEPS, seconds=1.0, resumes=True)
    call(items, "--seconds", "30")
    got = states(tmp_path, items)
    assert (got["slow"].state, got["goes_on"].state) == (FAILED, CUT)
    assert "not finished in 2 s" in got["slow"].note or "not finished" in got["slow"].note
    for _ in range(TRIES):
        call(items, "--seconds", "30")
    assert states(tmp_path, items)["goes_on"].tries == TRIES
    assert "given up" in call(items, "--list")[1]


def test_predecessor_comes_first(tmp_path):
    first, then = item("gate", FINE, seconds=50.0), item("cases", FINE, after="gate")
    state = State(tmp_path, "x")
    assert state.next([first, then], 40.0) is None  # the gate does not fit
    state.write("gate", "begin")
    state.write("gate", CUT)
    assert state.next([first, then], 60.0) is first
    assert state.next([first, then], 60.0, ran=["gate"]) is None  # without its verdict
    state.write("gate", FAILED)
    assert state.next([first, then], 40.0) is then
    assert State(tmp_path, "x").next([then], 40.0) is then  # asked for alone


CALL = """
import sys; sys.path.insert(0, "tests")
from bench.gpu import command
from bench.gpu.plan import Item
code = "import os, time; open(os.environ['MARK'], 'w').write(str(os.getpid())); time.sleep(60)"
command.main(["--out", sys.argv[1]], [Item("slow", "sleeps", 20.0, lambda *_: ["-c", code])])
"""


def test_killed_call_loses_its_item_and_leaves_no_process(call, tmp_path):
    mark = tmp_path / "mark"
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, str(out)], cwd=ROOT, env={**os.environ, "MARK": str(mark)}
    )
    end = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    child = int(mark.read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)
    (slow,) = states(out, [item("slow", SLEEPS)]).values()
    assert (slow.state, slow.tries, slow.note) == (CUT, 1, "died with its call")
    # Half a line, as a full disk leaves it, costs that line alone.
    with (out / "items.jsonl").open("a") as file:
        file.write('{"item": "slo')
    state = State.read(out, command.sources())
    state.write("slow", DONE)
    assert states(out, [item("slow", SLEEPS)])["slow"].state == DONE


def alive(pid):
    """Return whether a process runs; one that nobody waits for may stay as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- what items tell ----


def outcome(text, status=0, **options):
    return command.outcome(item("x", "", **options), status, text)


def last(**values):
    result = {"green": True, "finished": True, "environment": {"gpu": "H200"}, "failed": {}}
    result |= {"targets": [], **values}
    return json.dumps({"benches": {"infonce": result}})


def test_outcome_of_a_bench():
    assert outcome(f"a table\n{last()}") == (DONE, "green")
    assert outcome(last(green=False), 1) == (DONE, "RED")
    assert outcome(last(finished=False), 1) == (CUT, "green, no time for all rows")
    assert outcome(last(failed={"k": "x"}), 1) == (DONE, "green, 1 rows failed")
    missed = {"target": "both / one", "met": False, "limit": "<= 1.3"}
    aim = {"target": "dream", "met": False, "limit": "aim >= 3"}
    assert outcome(last(targets=[missed, aim])) == (DONE, "green, missed: both / one")
    assert outcome(last(environment={}), 1)[0] == FAILED
    assert outcome("", 1) == (FAILED, "no output")


def test_outcome_of_tests():
    red = "FAILED tests/kernels/a.py::test_b[1] - assert\n== 1 failed, 7 passed in 3.0s =="
    state, note = outcome(red, 1, tests=True)
    assert state == DONE and note == "1 failed, 7 passed in 3.0s; tests/kernels/a.py::test_b[1]"
    assert outcome("error: no file", 4, tests=True)[0] == FAILED


# ---- the plan ----


def test_plan_is_complete():
    names = [one.name for one in ITEMS]
    assert len(set(names)) == len(names)
    assert all(one.after in names[: names.index(one.name)] for one in ITEMS if one.after)
    where, planned = Where(Path("out"), Path("cache"), False), {}
    for one in ITEMS:
        words = one.command(where, 100.0)
        if words[:2] == ["-m", "bench"] and "cases" in words and "--sweep" not in words:
            cases = words[words.index("--case") + 1 : words.index("--out")]
            planned.setdefault(words[2], []).extend(cases)
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word).is_file(), word
    for name, cases in planned.items():
        known = [case.name for case in named(name).CASES.values() if case.device != "cpu"]
        assert sorted(cases) == sorted(known), name
    assert set(planned) == set(bench_command.NAMES) - {"loader"}  # which needs no GPU


def test_six_calls_do_everything(tmp_path):
    """Each item takes its prediction; those that can go on take what is left."""
    state, calls, done = State(tmp_path, "x"), 0, {one.name: 0.0 for one in ITEMS}
    while any(state.open(one.name) for one in ITEMS):
        calls, left, ran = calls + 1, 540.0 - command.RESERVE, []
        while one := state.next(ITEMS, left, ran):
            ran.append(one.name)
            took = min(one.seconds - done[one.name], left)
            done[one.name] += took
            left -= took
            state.write(one.name, "begin")
            state.write(one.name, DONE if done[one.name] >= one.seconds else CUT)
        assert ran, "an item never fits"
    assert calls <= 6


def test_toy_runs_take_toy_shapes():
    where = Where(Path("out"), Path("cache"), True)
    for one in ITEMS:
        words = one.command(where, 100.0)
        toy = {"--smoke", "--collect-only", "embed-gate-one-token-bfloat16"}
        assert toy & set(words), one.name


# ---- NVIDIA's tools ----

NCU = """
==PROF== Connected to process 7
a line of the program
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","_narrow_forward_kernel(float *)","dram__bytes_read.sum","byte","1,000"
"0","7","_narrow_forward_kernel(float *)","gpu__time_duration.sum","ns","250.5"
"1","7","_narrow_forward_kernel(float *)","dram__bytes_read.sum","byte","500"
"2","7","_product_kernel","dram__bytes_write.sum","byte","8"
"2","7","_product_kernel","sm__cycles.sum","cycle","8"
"""


def test_counters_are_summed_by_kernel():
    assert tools.counted(NCU) == {
        "_narrow_forward_kernel": {"read": 1500.0, "ns": 250.5, "launches": 2},
        "_product_kernel": {"written": 8.0, "launches": 1},
    }
    assert tools.counted("==ERROR== no permission") == {}


def test_errors_of_the_sanitizer_are_counted():
    text = "========= ERROR SUMMARY: 2 errors\n========= RACECHECK SUMMARY: 1 hazard displayed"
    assert tools.reported(text) == 3
    assert tools.reported("========= ERROR SUMMARY: 0 errors") == 0
    assert tools.reported("========= Device not supported") is None


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Return a function that puts a stand-in for a tool on the PATH, which prints some text."""

    def make(name, text, status=0):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return make


def test_tools_run_where_they_are_installed(tool):
    tool("compute-sanitizer", "========= ERROR SUMMARY: 0 errors")
    record = tools.memcheck(True)
    assert record["ok"] and record["memcheck"] == record["racecheck"] == 0
    tool("compute-sanitizer", "========= ERROR SUMMARY: 5 errors", status=1)
    record = tools.memcheck(True)
    assert not record["ok"] and record["note"] == "memcheck: 5 errors, racecheck: 5 errors"
    tool("ncu", NCU)
    record = tools.counters(True)
    assert record["ok"] and record["kernels"]["_product_kernel"]["written"] == 8.0
    assert record["note"].startswith("0.00 GB from and to memory, at least 1.41")


# ---- thirty steps ----


def test_training_watches_what_interrupts_it():
    with training.watching(CPU) as watch:
        double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
        double(torch.ones(2))
        for watch.step in (3, training.SETTLED + 2):
            double(torch.ones(watch.step))
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            watch.compiled(key="k", fn=argparse.Namespace(name="_sum_kernel"))
    rows = [{"ms": 100.0, "tokens": 5.0}] * training.SETTLED + [{"ms": 10.0, "tokens": 50.0}] * 4
    found = training.summary(watch, rows, training.SETTLED)
    assert [at for at, _ in found["recompiled"]] == [3, 12] and len(found["recompiled_late"]) == 1
    assert "size mismatch" in found["recompiled_late"][0]
    assert found["kernels"] == 2 and found["kernels_late"] == ["_sum_kernel"]
    ((place, count),) = ((at, n) for at, n in found["host_waits"].items() if n)
    assert place.startswith("tests/bench/test_gpu.py:") and count == 1
    assert found["tokens_s"] == pytest.approx(5000) and found["ms"] == 10.0


# ---- all of it ----

ABSENT = "pyarrow scipy babel datasets mteb tyro faiss matplotlib tensorboard pytrec_eval einops"
IMPORTS = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT.split()!r}))
import bench, importlib
for name in ("train", "bench.gpu.training", "bench.gpu.tools", "bench.gpu.once"):
    importlib.import_module(name)
for name in sys.argv[1:]:
    bench.named(name)
"""


def test_items_need_few_libraries():
    """A GPU machine may have torch, triton, sentence-transformers and pytest alone."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *bench_command.NAMES],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_smoke_runs_every_item(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(ITEMS)} of {len(ITEMS)} items ended" in done.stdout
    assert not (tmp_path / "results.jsonl").exists()


def test_no_gpu_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "card", lambda: None)
    with pytest.raises(SystemExit, match="error: no CUDA device: times need one, --smoke runs"):
        command.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "nothing"], "item: expected one of compile, tests-loss, .*got 'nothing'"),
        ([], "--out: expected a folder, got none"),
    ],
)
def test_wrong_arguments(args, message, capsys):
    with pytest.raises(SystemExit):
        command.main(args)
    assert re.search(message, capsys.readouterr().err)
    assert plan.RESULTS == "results.jsonl"
