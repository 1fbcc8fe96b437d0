"""The nested embedding's bench: its two numbers, peers compute the same, its gate can fail."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

from bench import embed as bench
from bench import harness, report, worker
from mlembed_kernels.embedding.embed import embed_ref

CPU = torch.device("cpu")
TINY = bench.Case(name="tiny", V=31, R=12, D=10, rank=7, T=60, providers=())
MODES = harness.FORWARD, harness.BACKWARD, harness.TRAIN


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(bench, "dtype_on", lambda device: torch.float32)


# ---- the two numbers ----


@pytest.mark.parametrize("masters", [False, True])
def test_the_two_numbers_are_those_counted(masters):
    case = replace(TINY, masters=masters)
    inputs = bench.inputs(case, CPU, 0)
    n = len(set(inputs.ids.tolist()))
    assert case.distinct == n < case.T
    assert bench.flops(case, "fwd") == 2 * n * 7 * 10
    assert bench.flops(case, "bwd") == 4 * n * 7 * 10
    factor, half = 4 if masters else 2, 2
    U, W = inputs.stacked
    rows, columns = U.detach()[:n, :7].numel(), W.detach()[:7].numel()
    forward = factor * (rows + columns) + half * inputs.dx.numel()
    assert bench.nbytes(case, "fwd") == forward
    assert bench.nbytes(case, "bwd") == forward + factor * (U.numel() + W.numel())
    for count in (bench.flops, bench.nbytes):
        assert count(case, "fwd+bwd") == count(case, "fwd") + count(case, "bwd")
    floors = bench.floors(case, "fwd", 788, 4247)
    assert floors["products"] == pytest.approx(bench.flops(case, "fwd") / 788e12 * 1e3)
    assert floors["bytes"] == pytest.approx(bench.nbytes(case, "fwd") / 4247e9 * 1e3)


def test_the_stream_is_zipfs():
    ids = bench.stream(73_419, 151_936)
    counts = ids.bincount(minlength=151_936).sort(descending=True).values
    harmonic = sum(1 / rank for rank in range(1, 151_937))
    for rank in (1, 10, 100):
        assert counts[rank - 1].item() == pytest.approx(73_419 / harmonic / rank, rel=0.3)
    assert 20_000 < (counts > 0).sum() < 24_000
    assert ids.double().mean().item() == pytest.approx(
        151_936 / 2, rel=0.2
    )  # scattered over the rows


# ---- providers ----


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("name", bench.CASES["step"].providers)
def test_every_provider_computes_the_same(name, masters, monkeypatch):
    monkeypatch.undo()  # in fp16, as a toy run does
    case = replace(TINY, masters=masters)
    inputs = bench.inputs(case, CPU, 1)
    step, note = bench.build(name, case, inputs, True)
    assert note is None
    got = step(inputs, True)
    assert got[0].dtype == inputs.dx.dtype
    assert [x.dtype for x in got[1:]] == [inputs.stacked[0].dtype] * 2
    U, W = (x.detach().double() for x in inputs.stacked)
    truth = bench.differentiated(lambda u, w: embed_ref(inputs.ids, u, w, 7), U, W, inputs.dx)
    for x, t in zip(got, truth, strict=True):
        assert (x.double() - t).abs().max() <= 4e-3 * t.abs().max()
    assert bench.spot(case, inputs, "fwd+bwd", got)["near"]


def test_who_computes_something_else_has_no_time(monkeypatch):
    inputs = bench.inputs(TINY, CPU, 1)
    half = lambda ids, U, W, rank: embed_ref(ids, U, W.detach() + 0 * W, rank)  # noqa: E731
    monkeypatch.setitem(bench.PEERS, "eager", half)  # dW is 0
    step, _ = bench.build("eager", TINY, inputs, True)
    harness.rotating(step, [inputs], "fwd")(0)
    with pytest.raises(RuntimeError, match=r"computes something else, .*'dW': 1.0"):
        harness.rotating(step, [inputs], "fwd+bwd")(0)


# ---- right or not ----


@pytest.mark.parametrize("wrong", ["nothing", "x", "gradient", "noise", "nan", "raises"])
def test_the_gate_sees(wrong, monkeypatch):
    calls = iter(range(1, 1000))

    def faulty(ids, U, W, rank, impl):
        x = embed_ref(ids, U, W, rank)
        if wrong == "nothing":
            return x
        if wrong == "raises":
            raise RuntimeError("out of resources")
        if wrong == "noise":  # right, but not the same twice
            return x + next(calls) * 3e-6
        if wrong == "gradient":
            return x.detach() + 1.01 * (x - x.detach())
        return x * {"x": 1.01, "nan": torch.nan}[wrong]

    monkeypatch.setattr(bench, "embed", faulty)
    verdicts = list(bench.gate(CPU, True))
    assert len(verdicts) == sum(1 + check.fp32 for check in bench.checks())
    assert all(verdict["ok"] == (wrong == "nothing") for verdict in verdicts)
    assert report.gate(verdicts).count("RED") == (0 if wrong == "nothing" else len(verdicts))


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_the_spot_check_sees(mode):
    case = replace(TINY, V=200)  # of which some are not there
    inputs = bench.inputs(case, CPU, 1)
    U, W = (x.detach() for x in inputs.stacked)
    everything = bench.differentiated(lambda u, w: embed_ref(inputs.ids, u, w, 7), U, W, inputs.dx)
    got = everything[: 1 if mode == "fwd" else 3]
    assert bench.spot(case, inputs, mode, got)["ok"]
    absent = sorted(set(range(200)) - set(inputs.ids.tolist()))[0]
    # The most frequent token; a row of nobody; beyond the rank; the last column looked at.
    places = [(0, 0, 0), (1, absent, 0), (1, inputs.ids[0], 11), (2, 11, 0), (2, 0, 9)]
    for i, row, column in places[: 1 if mode == "fwd" else None]:
        for value in (0.5, torch.nan):
            other = [x.clone() for x in got]
            other[i][row, column] += value
            found = bench.spot(case, inputs, mode, other)
            assert not found["ok"] and not found["near"] and not found[bench.NAMES[i]]["ok"]


# ---- targets ----


def test_targets_need_both_numbers_and_green():
    def row(case, provider, ms, mode="fwd+bwd", **others):
        at = {"case": case, "provider": provider, "mode": mode, "ms": ms}
        return {**at, "copy_share": 0.5, **others}

    found = bench.targets([row("step", "ours", 1.0, green=True)])
    assert [(t["limit"], t["met"]) for t in found] == [("aim <= 1.5", False)]
    assert bench.targets([row("step", "ours", 1.0, green=False), row("step", "rebuild", 9.0)]) == []
    assert bench.targets([row("step", "ours", 1.0, "fwd", green=True)]) == []
    mine = {"green": True, "peak_mib": 70.0}
    peers = row("step", "rebuild", 9.0), row("step", "rebuild_embedding", 4.0)
    found = bench.targets([row("step", "ours", 1.0, **mine), *peers])
    assert [(t["value"], t["limit"], t["met"]) for t in found] == [
        (4.0, ">= 5.0", False),
        (9.0, ">= 5.0", True),
        (70.0, "<= 64", False),
        (2.0, "aim <= 1.5", False),
    ]
    aims = bench.targets([row("lealla", "ours", 1.0, **mine), row("lealla", "rebuild", 9.0)])
    assert all(t["limit"].startswith("aim") for t in aims) and len(aims) == 3


def test_every_case_runs_everywhere():
    for name, case in bench.CASES.items():
        assert case.name == name and case.providers[:2] == ("ours", "rebuild_embedding")
        small = bench.toy(case)
        assert small.masters == case.masters and small.modes == case.modes
        assert small.rank <= small.R and (small.rank < small.R) == (case.rank == 64)
        assert f"rank {case.rank} of {case.R}" in bench.about(case)


# ---- through the harness ----


def worker_of(smoke):
    args = argparse.Namespace(name="embed", smoke=smoke, red=False, skip=[], seconds=300.0)
    made = worker.Worker(args, CPU)
    made.ceilings = {"tflops": 2.0, "gbs": 3.0}
    return made


def said(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_toy_cases_and_the_sweep_run_to_their_end(capsys, monkeypatch):
    monkeypatch.undo()  # in fp16, as a toy run does
    made = worker_of(smoke=True)
    for name in ("step", "lealla"):
        made.case(name)
    for name in ("step", "masters"):  # fp32 factors, computed with by half precision's table
        made.sweep(name)
    records = said(capsys)
    rows = [r for r in records if r["kind"] == "row"]
    assert {r["status"] for r in rows} == {"ran"} and "ms" not in rows[0]
    mine = [r for r in rows if r["provider"] == "ours"]
    assert len(mine) == 4 and all(r["green"] and r["spot"]["ok"] for r in mine)
    sweeps = [r for r in records if r["kind"] == "sweep"]
    assert [(r["kernel"], r["mode"]) for r in sweeps] == [("gather", "fwd+bwd")] * 4
    assert all(r["status"] == "ran" and r["right"] for r in sweeps)


def test_times_become_targets(capsys, monkeypatch):
    toy = replace(bench.toy(bench.CASES["step"]), providers=("ours", "rebuild", "eager"))
    monkeypatch.setattr(bench, "CASES", {"step": toy})
    monkeypatch.setattr(bench, "BREAKDOWN", ())
    monkeypatch.setattr(worker, "MS", 1.0)
    quick = lambda ids, U, W, rank, impl, token_index: embed_ref(ids, U, W, rank)  # noqa: E731
    monkeypatch.setattr(bench, "embed", quick)
    worker_of(smoke=False).case("step")
    rows = [r for r in said(capsys) if r["kind"] == "row"]
    assert len(rows) == 3 * 2 and all(r["ms"] > 0 for r in rows)
    ms = {(r["provider"], r["mode"]): r["ms"] for r in rows}
    told = {t["target"]: t["value"] for t in bench.targets(rows)}
    times = ms["rebuild", "fwd+bwd"] / ms["ours", "fwd+bwd"]
    assert told["step, fwd+bwd: times rebuild"] == pytest.approx(times)
    floor = bench.nbytes(toy, "fwd+bwd") / 3.0 / 1e6
    above = told["step, fwd+bwd: time / floor of bytes"]
    assert above == pytest.approx(ms["ours", "fwd+bwd"] / floor)
    printed = report.table(rows, "fwd+bwd", None, bench.BASELINES)
    assert printed.splitlines()[1].endswith("x rebuild_embedding  x rebuild  x eager")
