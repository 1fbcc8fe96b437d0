"""The loss's bench: its two numbers, its baselines are the same loss, and its gate can fail."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import harness, report
from bench.harness import Leaves
from bench.infonce import bench, cases, gate, peers
from mlembed_kernels import infonce

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_two_numbers():
    reference, both = bench.CASES["reference"], bench.CASES["both"]
    unit = 2 * 16384 * 16384 * 1024 * 7
    assert cases.flops(reference, "fwd") == cases.flops(both, "fwd") == unit
    assert cases.flops(reference, "fwd+bwd") == 3 * unit
    assert cases.flops(reference, "fwd+bwd", 4) == 4 * unit
    assert cases.nbytes(reference, "fwd") == 2 * (2 * 7 * 16384 * 1024)  # q and c of two bytes each
    assert cases.nbytes(reference, "fwd+bwd") == 3 * cases.nbytes(reference, "fwd")
    assert cases.exponentials(reference) == 7 * 8 * 16384**2
    floors = cases.floors(reference, "fwd+bwd", 788, 4247)
    assert floors["recomputing"] == pytest.approx(4 * unit / 788e12 * 1e3)


def test_the_log_says_what_the_functions_say():
    text = (ROOT / "bench/LOG.md").read_text(encoding="utf-8")
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines()]
    table = {row[0]: [float(x) for x in row[1:]] for row in cells if row[0] in bench.CASES}
    assert list(table) == list(bench.CASES)
    for name, numbers in table.items():
        case = bench.CASES[name]
        forward, train = (cases.floors(case, mode, 788, 4247) for mode in ("fwd", "fwd+bwd"))
        wanted = [
            *(cases.flops(case, "fwd") / 1e12, cases.nbytes(case, "fwd") / 1e9),
            *(forward["gemms"], forward["bytes"]),
            *(train["gemms"], train["recomputing"], train["bytes"]),
            *(cases.exponentials(case) / 1e9, cases.exponentials(case) / (16 * 132 * 1.8e9) * 1e3),
        ]
        assert numbers == pytest.approx(wanted, abs=0.0051), name


def case_and_inputs(name, dtype=torch.float64):
    case = cases.toy(bench.CASES[name])
    q, c = (x.detach().to(dtype) for x in cases.inputs(case, CPU, 3).stacked)
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
    steps = {key: peers.build(key, case, q[0], True) for key in bench.STEPS if key != "gemm"}
    if not case.both:
        pairs = peers.by_pair(plain_loss, case.dims, case.temperature)
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
    monkeypatch.setitem(peers.PAIRS, "inf_cl", picky)
    with pytest.warns(UserWarning, match="prefix 8: too narrow"):
        step, note = peers.build("inf_cl", case, inputs.stacked[0][0].detach(), True)
    assert note == "without prefixes 8, which it cannot run"
    want = sum(
        plain_loss(F.normalize(q) / case.temperature, F.normalize(c)) for q, c in inputs.views
    )
    torch.testing.assert_close(step(inputs, False), want.detach())
    for name in ("cut_cross_entropy", "inf_cl"):  # not installed is no failure
        monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
        with pytest.raises(harness.Missing, match="is not installed"):
            peers.imported(name, name)


def test_gemm_is_one_product_per_chunk(monkeypatch):
    case, inputs = case_and_inputs("reference", torch.float32)
    monkeypatch.setattr(peers, "CHUNK", 7)
    assert peers.gemm(case, True)(inputs, True) is None


@pytest.mark.parametrize("check", gate.checks(), ids=lambda check: check.name)
def test_the_gates_eager_is_the_loss(check):
    """Else its error would be large, and let any kernel pass."""
    check = check.toy()
    given = gate.masks(check, CPU)
    generator = torch.Generator().manual_seed(1)
    q, c = (
        torch.randn(2, n, check.D, generator=generator, dtype=torch.float64)
        for n in (check.Q, check.C)
    )
    got = gate.eager_table(q, c, check, given)
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

    monkeypatch.setattr(gate, "infonce", faulty)
    verdicts = list(gate.gate(CPU, True))
    assert len(verdicts) == len(list(gate.checks()))
    assert all(verdict["ok"] == (wrong == "nothing") for verdict in verdicts)
    assert report.gate(verdicts).count("RED") == (0 if wrong == "nothing" else len(verdicts))


def test_the_spot_check_sees():
    case, inputs = case_and_inputs("huge", torch.float32)
    loss_and_gradients(peers.eager_stacked(case, True), inputs)
    assert gate.spot(case, inputs, "fwd+bwd", None)["ok"]
    inputs.stacked[0].grad[0, case.B - 1, 3] += 1e-3
    assert not gate.spot(case, inputs, "fwd+bwd", None)["ok"]
    assert gate.spot(case, inputs, "fwd", None) is None


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
        numbers = {"ms": ms, "p20": ms, "p80": ms, "tflops": 1.0, "share": 0.1}
        numbers |= {"gbs": 1.0, "copy_share": 0.1}
        return {**at, **numbers, "value": value, "status": "ran"}

    rows = [row("eager", 10.0, 4.0), row("liger", 10.2, 2.0), row("inf_cl", 8.0, 1.0)]
    rows += [row("gemm", None, 0.5), row("cut_cross_entropy", 10.0, 1.0, "without prefixes 8")]
    assert [report.ratio(rows, r, "eager") for r in rows] == ["-", "2.00", "-", "-", "-"]
    assert "inf_cl: another loss: 8, eager 10" in report.table(rows, "fwd", None, bench.BASELINES)
