"""The gradient cache's bench: its numbers, one step whatever is kept, and a gate that can fail."""

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gradcache as bench
from bench import report, worker
from bench.train_step import cases
from bench.train_step import gate as checked
from mlembed.modeling.transformer import Transformer
from mlembed.training.gradcache import ActivationCost

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOYS = {name: bench.toy(case) for name, case in bench.CASES.items()}


@pytest.fixture
def eager(monkeypatch):
    """What compiles has a test of its own; here it would take most of the time."""
    monkeypatch.setattr(Transformer, "compile_blocks", lambda self, *_, **options: None)


# ---- as a user runs it ----


@pytest.mark.slow
def test_smoke_runs_everything_and_gives_no_numbers():
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gradcache", "--smoke", "--skip-tests", "--case", "big"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    result = last["benches"]["gradcache"]
    assert last["ok"] and result["green"] and result["failed"] == {} and result["targets"] == []
    assert "ms" not in result and result["ceilings"] == {}
    assert result["ran"] == {"big": {"fwd+bwd": {"within_budget": "ran", "none_kept": "ran"}}}
    assert "gate: 13 of 13 checks" in done.stdout
    assert not re.search(r"\d ?(ms|s|us)\b|TFLOP|GB/s|[MG]iB|tokens/s", done.stdout), done.stdout


def test_names_are_one_anothers():
    assert "gradcache" in command.NAMES
    asked = {name for case in bench.CASES.values() for name in case.providers}
    assert asked == {*bench.OURS, *bench.PEERS}
    assert set(bench.OVERHEADS) <= set(bench.CASES["fit"].providers) & set(bench.OURS)
    assert bench.SWEEP_CASE in bench.CASES and not bench.SWEEP


# ---- the numbers ----


def test_one_more_forward_by_hand():
    """fit: 49,967 tokens of 28 layers; 15,728,640 weights, 3072 columns of heads in each."""
    S, plan = 49_967 * 28, bench.again_work(bench.CASES["fit"])
    assert cases.tokens(bench.CASES["fit"]) == 49_967
    assert plan["products"][0] == 2 * 15_728_640 * S
    assert plan["point-wise"] == (0.0, 2 * (9 * 1024 + 2 * 3072 + 3 * 3072) * S)
    pairs = sum(n * (n + 1) / 2 for n in cases.lengths(bench.CASES["fit"])) * 28
    assert plan["attention"] == pytest.approx((4 * 16 * 128 * pairs, 2 * 2 * 3072 * S))
    floors = bench.floors(bench.CASES["fit"], "fwd+bwd", 788, 4247)
    plain = cases.floors(bench.CASES["fit"], "fwd+bwd", 788, 4247)
    assert {k: v for k, v in floors.items() if k != bench.AGAIN} == plain
    assert 1.3 < 1 + floors[bench.AGAIN] / sum(plain.values()) < 1.4


def test_the_log_says_what_the_functions_say():
    text = (ROOT / "bench/LOG.md").read_text(encoding="utf-8")
    begin = text.index("## gradcache: the two numbers")
    lines = text[begin : text.index("\n## ", begin + 1)].splitlines()
    found = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines]
    table = {(row[0], row[1]): [float(x) for x in row[2:5]] for row in found
             if row[0] in bench.CASES}  # fmt: skip
    assert len(table) == 7 * len(bench.CASES)
    for name, case in bench.CASES.items():
        plan, again = cases.stage_work(case), bench.again_work(case).values()
        floors = {stage: max(a / 788e9, b / 4247e6) for stage, (a, b) in plan.items()}
        floors[bench.AGAIN] = sum(max(a / 788e9, b / 4247e6) for a, b in again)
        plan[bench.AGAIN] = tuple(sum(x) for x in zip(*again, strict=True))
        for stage, (products, size) in plan.items():
            wanted = [products / 1e12, size / 1e9, floors[stage]]
            assert table[name, stage] == pytest.approx(wanted, abs=0.0051), (name, stage)


def test_budgets_keep_what_the_cases_say():
    """By the log's 45,224 bytes a token and layer and bf16 weights: graphs of fit, and of big."""
    kept = ActivationCost(2 * 15_728_640, 45_224, 2048)
    for name, keep, packs, graphs in (("fit", "half", 4, 2), ("big", "budget", 164, 2)):
        case = bench.CASES[name]
        _, some = bench.inputs(case, CPU, 0).packs(False)
        run = replace(case.run, gradient_cache=True)
        budget = bench.budget_of(keep, kept, some, run)
        keeps, again, _ = bench.gradcache.choose_graphs(run, kept, some, budget)
        assert (len(keeps), sum(keeps), sum(again)) == (packs, graphs, 0), name


# ---- the same step ----


def taken(name, case, inputs):
    step, _ = bench.build(name, case, inputs, True)
    return step(inputs, True).item(), step(inputs, True).item(), step


def test_whatever_is_kept_the_step_is_the_plain_one(eager):
    case = TOYS["fit"]
    case = replace(case, run=replace(case.run, optim=replace(case.run.optim, lr=1e-2)))
    inputs = bench.inputs(case, CPU, 0)
    assert len(inputs.packs(False)[1]) == 4
    first, second, plain = taken("uncached", case, inputs)
    wanted, twice = dict(plain.model.named_parameters()), {}
    assert second < first - 0.01
    for name in ("none_kept", "half_kept", "all_kept", "large_packs"):
        *losses, step = taken(name, case, inputs)
        assert losses == pytest.approx([first, second], rel=1e-4), name
        for key, p in step.model.named_parameters():
            torch.testing.assert_close(p, wanted[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
            assert p.grad is None
        twice[name] = bench.numbers(case, step, inputs, 2.0)["again"]
    assert twice["none_kept"] == 1.0 and twice["all_kept"] == twice["large_packs"] == 0.0
    assert 0.3 < twice["half_kept"] < 0.7


def test_sentence_transformers_is_compared_with_itself():
    pytest.importorskip("sentence_transformers")
    case = TOYS["peer"]
    inputs = bench.inputs(case, CPU, 0)
    cached, plain = (taken(name, case, inputs)[:2] for name in bench.PEERS)
    assert cached == pytest.approx(plain, rel=1e-4)


# ---- right or not ----


def few(monkeypatch):
    """Two of the gate's checks suffice to see that it can fail."""
    some = [c for c in checked.checks() if c.name in ("whole", "nested, skipping, recomputed")]
    monkeypatch.setattr(checked, "checks", lambda: iter(some))


@pytest.mark.parametrize("wrong", ["nothing", "gradient", "pack", "raises"])
def test_the_gate_sees(wrong, monkeypatch, eager):
    few(monkeypatch)
    right, gradients = bench.loss_table, bench.gradcache.gradients

    def faulty(exits_END, *args):
        if wrong == "raises":
            raise RuntimeError("out of resources")
        if wrong == "gradient":
            exits_END = exits_END.detach() + 1.01 * (exits_END - exits_END.detach())
        return right(exits_END, *args)

    def forgetful(engine, forward, loss, keeps, final, **options):
        """Texts of one pack are encoded, and never differentiated."""
        first = next(i for i in range(len(keeps)) if i != final)

        def partly(i, sync):
            out = forward(i, sync)
            return out * 1.0 if i != first else out.detach() + 0.0 * out

        gradients(engine, partly, loss, keeps, final, **options)

    monkeypatch.setattr(bench, "loss_table", faulty)
    if wrong == "pack":
        monkeypatch.setattr(bench.gradcache, "gradients", forgetful)
    found = list(bench.gate(CPU, True))
    assert len(found) == 7 and {v["check"].rpartition(", ")[2] for v in found} == {
        *("none kept", "half kept", "all kept", "drawn again"),
    }
    held = [v for v in found if not v["check"].startswith("dropout")]
    assert all(v["ok"] == (wrong == "nothing") for v in held), found
    assert report.gate(held).count("RED") == (0 if wrong == "nothing" else len(held))


def test_the_gate_sees_dropout_that_is_drawn_anew(monkeypatch, eager):
    few(monkeypatch)
    monkeypatch.setattr(bench.gradcache, "drawing", lambda *args: nullcontext())
    verdicts = {v["check"]: v["ok"] for v in bench.gate(CPU, True)}
    assert {check for check, ok in verdicts.items() if not ok} == {"dropout, drawn again"}


# ---- targets and what is printed ----


def row(case, provider, ms, value=5.0, **others):
    at = {"case": case, "provider": provider, "mode": "fwd+bwd", "ms": ms, "p20": ms, "p80": ms}
    numbers = {"again": 0.0, "peak_mib": 2048.0, "activation_mib": 1024.0, "hopper": True}
    return {**at, **numbers, "value": value, "status": "ran", "green": True, **others}


def test_targets_met_missed_and_absent():
    assert bench.targets([]) == [] == bench.targets([row("fit", "none_kept", 130.0)])
    rows = [row("fit", "uncached", 100.0), row("fit", "none_kept", 139.0, value=5.05)]
    rows += [row("fit", "all_kept", 111.0), row("fit", "half_kept", 150.0)]
    rows += [row("big", "within_budget", 1.0, budget_mib=1000.0)]
    rows += [row("peer", "uncached", 1.0), row("peer", "none_kept", 2.0)]
    got = {t["target"]: (round(t["value"], 3), t["limit"], t["met"]) for t in bench.targets(rows)}
    assert got == {
        "fit, none_kept: times the plain step": (1.39, "<= 1.4", True),
        "fit, all_kept: times the plain step": (1.11, "<= 1.1", False),
        "big, within_budget: peak of activations / budget": (1.024, "<= 1.25", True),
    }
    for other in ({"hopper": False}, {"green": False}, {"value": 6.0}, {"ms": None}):
        mine = [row("fit", "uncached", 100.0), {**row("fit", "none_kept", 130.0), **other}]
        assert bench.targets(mine) == [], other


def test_the_table():
    rows = [row("fit", "uncached", 200.0), row("fit", "none_kept", 260.0, again=1.0)]
    rows += [row("fit", "uncached_eager", 300.0), row("fit", "none_kept_eager", 330.0)]
    rows += [row("fit", "sentence_transformers", 2600.0, green=None, note="padded")]
    rows += [{"case": "fit", "provider": "all_kept", "mode": "fwd+bwd", "status": "failed"}]
    floors = {"products": 100.0, bench.AGAIN: 30.0}
    told = bench.table(rows, "fwd+bwd", floors, bench.BASELINES)
    lines = {line.split()[0]: line.split()[1:] for line in told.splitlines()}
    assert lines["none_kept"] == [
        *("260.0", "260.0..260.0", "1.30", "100%", "130.0", "50.0%", "2.0", "1.0", "-", "10.00")
    ]
    assert lines["uncached"][2:5] == ["-", "0%", "100.0"]
    assert lines["none_kept_eager"][2] == "1.10" and lines["all_kept"] == ["failed"]
    assert lines["sentence_transformers"][2:6] == ["-", "-", "-", "-"]
    assert "products 100.00 ms" in told and "sentence_transformers: padded" in told


# ---- through the harness ----


def test_times_become_rows(capsys, monkeypatch, eager):
    toy = replace(TOYS["fit"], providers=("uncached", "none_kept"))
    monkeypatch.setattr(bench, "CASES", {"fit": toy})
    monkeypatch.setattr(worker, "MS", 1.0)
    args = argparse.Namespace(name="gradcache", smoke=False, red=False, skip=[], seconds=300.0)
    made = worker.Worker(args, CPU)
    made.ceilings = {"tflops": 0.02, "gbs": 3.0}
    made.case("fit")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [r for r in records if r["kind"] == "row"]
    assert [r["provider"] for r in rows] == ["uncached", "none_kept"]
    assert all(r["ms"] > 0 and r["green"] and r["peak_mib"] is None for r in rows)
    assert [r["again"] for r in rows] == [0.0, 1.0] and bench.targets(rows) == []
    assert bench.overhead(rows, rows[1]) == pytest.approx(rows[1]["ms"] / rows[0]["ms"])
    assert "none_kept" in bench.table(rows, "fwd+bwd", None, bench.BASELINES)
