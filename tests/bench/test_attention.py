"""Attention's bench: its two numbers, its peers compute the same, and its gate can fail."""

import argparse
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import harness, report, worker
from bench.attention import bench, cases, peers
from bench.attention import gate as checked
from bench.attention.peers import Batch, Packed
from mlembed_kernels.attention.attention import attention_ref

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = cases.Case(name="tiny", mix="mid", lengths=(3, 1, 9, 6), Hq=4, Hkv=2, K=8, providers=())
MODES = harness.FORWARD, harness.BACKWARD, harness.TRAIN


# ---- the two numbers ----


@pytest.mark.parametrize("causal", [True, False])
def test_the_two_numbers_are_those_counted(causal):
    case = replace(TINY, causal=causal)
    pairs = sum(1 for n in case.lengths for q in range(n) for k in range(n) if k <= q or not causal)
    assert case.pairs == pairs and cases.exponentials(case) == 4 * pairs
    assert cases.flops(case, "fwd") == 2 * 2 * 4 * 8 * pairs  # q k' and p v, a product and a sum
    assert cases.flops(case, "bwd") == 5 * 2 * 4 * 8 * pairs
    inputs = cases.inputs(case, CPU, 0)
    q, k, v = inputs.stacked
    out, dq, dk, dv = inputs.dout, *inputs.stacked
    half = torch.bfloat16.itemsize / q.itemsize
    assert cases.nbytes(case, "fwd") == half * sum(x.nbytes for x in (q, k, v, out))
    assert cases.nbytes(case, "bwd") == half * sum(x.nbytes for x in (q, k, v, out, dq, dk, dv))
    for count in (cases.flops, cases.nbytes):
        assert count(case, "fwd+bwd") == count(case, "fwd") + count(case, "bwd")
    floors = cases.floors(case, "fwd", 788, 4247)
    assert floors["products"] == pytest.approx(cases.flops(case, "fwd") / 788e12 * 1e3)
    assert floors["bytes"] == pytest.approx(cases.nbytes(case, "fwd") / 4247e9 * 1e3)


def test_who_has_left_counts_for_nothing():
    case = replace(TINY, gone=0.4)  # 1.6 of four
    rest = replace(TINY, lengths=TINY.lengths[:2])
    assert case.alive == 2
    for mode in MODES:
        assert cases.flops(case, mode) == cases.flops(rest, mode)
        assert cases.nbytes(case, mode) == cases.nbytes(rest, mode)


def test_the_lengths_are_those_that_were_measured():
    tokens = {name: sum(lengths) for name, lengths in cases.MIXES.items()}
    assert tokens == {"short": 49748, "mid": 69466, "long": 65536, "very_long": 65536}
    assert max(cases.MIXES["short"]) == 128 and max(cases.MIXES["mid"]) == 512
    assert cases.CASES["skip"].alive == 307 and cases.CASES["skip_short"].alive == 1229


def test_the_log_says_what_the_functions_say():
    text = (ROOT / "bench/LOG.md").read_text(encoding="utf-8")
    text = text.partition("## attention: the two numbers")[2].partition("\n## ")[0]
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines()]
    table = {row[0]: [float(x) for x in row[1:]] for row in cells if row[0] in cases.CASES}
    assert list(table) == list(cases.CASES)
    for name, numbers in table.items():
        case = cases.CASES[name]
        wanted = [case.tokens]
        for mode in ("fwd", "bwd"):
            floors = cases.floors(case, mode, 788, 4247)
            wanted += [cases.flops(case, mode) / 1e9, cases.nbytes(case, mode) / 1e6]
            wanted += [floors["products"], floors["bytes"]]
        wanted.append(cases.exponentials(case) / (16 * 132 * 1.8e9) * 1e3)
        assert numbers == pytest.approx(wanted, abs=0.51, rel=0), name
        times = [numbers[i] for i in (3, 4, 7, 8, 9)]
        assert times == pytest.approx([wanted[i] for i in (3, 4, 7, 8, 9)], abs=0.00051), name


# ---- providers ----


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """A toy run takes fp16, whose launch options are bf16's; what is close is seen in fp32."""
    for module in (cases, checked):
        monkeypatch.setattr(module, "dtype_on", lambda device: torch.float32)


def truth(case, inputs, lengths=None, **options):
    """out, dq, dk, dv of the specification."""
    cu = F.pad(torch.tensor(lengths or case.lengths).cumsum(0), (1, 0))
    q, k, v = (x.detach()[: cu[-1]] for x in inputs.stacked)
    function = partial(attention_ref, cu_seqlens=cu, causal=case.causal, **options)
    return checked.differentiated(function, q, k, v, inputs.dout[: cu[-1]])


def in_every_mode(step, inputs):
    """out, dq, dk, dv, the same however they are asked for."""
    everything = step(inputs, True)
    apart = [*step(inputs, False), *step.backward(inputs)()]
    for a, b in zip(everything, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    return everything


def close(got, want):
    assert len(got) == len(want)
    for name, a, b in zip(checked.NAMES, got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["short", "skip", "long_bert"])
def test_ours_and_sdpa_are_attention(name):
    case = cases.toy(cases.CASES[name])
    inputs = cases.inputs(case, CPU, 3)
    want = truth(case, inputs, case.lengths[: case.alive])
    got = {}
    for provider in cases.SKIPPING if case.gone else ("ours", "sdpa"):
        step, _ = bench.build(provider, case, inputs, True)
        got[provider] = in_every_mode(step, inputs)
    close(got["ours"], want)
    if not case.gone:
        close(got["sdpa"], want)
        return
    for a, b in zip(got["ours"], got["alone"], strict=True):
        assert torch.equal(a, b)
    close(got["whole"], truth(case, inputs))
    flags = torch.arange(len(case.lengths)) < case.alive
    close(got["active"], truth(case, inputs, active=flags))
    close([x[: case.tokens] for x in got["active"]], want)


def test_a_prefix_lies_in_the_buffer_and_the_rest_alone_does_not():
    case = cases.toy(cases.CASES["skip"])
    inputs = cases.inputs(case, CPU, 3)
    for copied in (False, True):
        leaves, behind = bench.prefix(case.tokens, copied, inputs)
        for part, of in zip((*leaves, *behind), (*inputs.stacked, inputs.dout), strict=True):
            assert torch.equal(part, of[: case.tokens]) and len(part) < len(of)
            assert (part.data_ptr() == of.data_ptr()) != copied


def test_kv_written_out_for_every_head_are_the_same():
    inputs = cases.inputs(TINY, CPU, 1)
    (q, k, v), behind = peers.repeated(2)(inputs)
    assert k.shape == v.shape == q.shape and k.is_leaf and k.requires_grad
    cu = F.pad(torch.tensor(TINY.lengths).cumsum(0), (1, 0))
    out = attention_ref(q, k, v, cu_seqlens=cu, causal=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), behind)
    close((out, dq, *(x.unflatten(1, (2, 2)).sum(2) for x in (dk, dv))), truth(TINY, inputs))
    assert checked.spot(TINY, inputs, "bwd", (dq, dk, dv))["near"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
def test_flex_masks_by_sequence(causal):
    case = replace(TINY, causal=causal, K=16)
    inputs = cases.inputs(case, CPU, 1)
    batch = Batch.of(case.lengths, causal, 2, CPU)
    out = peers.flex(batch, True).function(*(x.detach() for x in inputs.stacked))
    close([out], truth(case, inputs)[:1])


def library(name, seen):
    """flash_attn_varlen_func of every version: kv in groups, some give the sums too."""

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, causal, **sizes):
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert sizes == {"max_seqlen_q": 9, "max_seqlen_k": 9}
        seen.append(name)
        out = attention_ref(q, k, v, cu_seqlens=cu_seqlens_q, causal=causal)
        return (out, None) if name == "flash_attn.cute" else out

    return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, __name__=name)


def test_packages_are_called_as_they_ask(monkeypatch):
    inputs, seen = cases.inputs(TINY, CPU, 1), []
    batch = Batch.of(TINY.lengths, TINY.causal, 2, CPU)
    places = {"flash_attn": "flash_attn", "fa4": "flash_attn.cute", "fa3": "flash_attn_interface"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: library(name, seen))
    for provider, module in places.items():
        peer = peers.PEERS[provider](batch, True)
        close(in_every_mode(harness.Apart(peer.function, bench.whole), inputs), truth(TINY, inputs))
        assert set(seen) == {module} and not seen.clear()
    monkeypatch.setattr(
        peers.importlib, "import_module", lambda name: SimpleNamespace(__name__=name)
    )
    with pytest.raises(harness.Missing, match="flash_attn has no flash_attn_varlen_func"):
        peers.flash_attn(batch, True)  # version 4 alone makes the folder too


def test_xformers_sees_groups(monkeypatch):
    inputs = cases.inputs(TINY, CPU, 1)
    batch = Batch.of(TINY.lengths, TINY.causal, 2, CPU)

    class Mask:
        @staticmethod
        def from_seqlens(lengths, device):
            assert lengths == list(TINY.lengths)
            return "causal"

    def memory_efficient_attention(q, k, v, attn_bias):
        assert attn_bias == "causal" and q.shape == k.shape == (1, 19, 2, 2, 8)
        q, k, v = (x[0].flatten(1, 2) for x in (q, k, v))
        return attention_ref(q, k, v, cu_seqlens=batch.cu, causal=True).view(1, 19, 2, 2, 8)

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    bias = SimpleNamespace(BlockDiagonalCausalMask=Mask)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(peers.importlib, "import_module", lambda n: bias if "bias" in n else ops)
    peer = peers.xformers(batch, True)
    close(in_every_mode(harness.Apart(peer.function, bench.whole), inputs), truth(TINY, inputs))


class Operator:
    """Stands for an operator of a library, with the true one's arguments."""

    def __init__(self, schema, function):
        self._schema, self.function = schema, function

    def __call__(self, **given):
        return self.function(**given)


def forward_and_backward(batch):
    def forward(q, k, v):
        return attention_ref(q, k, v, cu_seqlens=batch.cu, causal=batch.causal)

    @torch.enable_grad()
    def backward(dout, q, k, v):
        return checked.differentiated(forward, q, k, v, dout)[1:]

    return forward, backward


def test_cudnn_is_called_by_its_schema(monkeypatch):
    inputs, aten = cases.inputs(TINY, CPU, 1), torch.ops.aten
    batch = Batch.of(TINY.lengths, TINY.causal, 2, CPU)
    forward, backward = forward_and_backward(batch)

    def there(query, key, value, is_causal, max_q, cum_seq_q, compute_log_sumexp, **rest):
        assert is_causal and max_q == 9 and cum_seq_q is batch.cu and compute_log_sumexp
        assert rest["attn_bias"] is None
        out = forward(query, key, value)
        return out, out.new_tensor(1.0), None, None, 9, 9, *out.new_tensor([6.0, 7.0]), None

    def back(grad_out, query, key, value, logsumexp, philox_seed, philox_offset, **rest):
        assert [x.item() for x in (logsumexp, philox_seed, philox_offset)] == [1.0, 6.0, 7.0]
        return backward(grad_out, query, key, value)

    for name, function in (("forward", there), ("backward", back)):
        full = f"_cudnn_attention_{name}"
        fake = Operator(getattr(aten, full).default._schema, function)
        monkeypatch.setattr(aten, full, SimpleNamespace(default=fake))
    peer = peers.cudnn(batch, True)
    close(in_every_mode(harness.Apart(peer.function, bench.whole), inputs), truth(TINY, inputs))


def test_fa3s_operators_alone(monkeypatch, tmp_path):
    binary = tmp_path / "xformers/flash_attn_3/_C.so"
    binary.parent.mkdir(parents=True)
    binary.touch()
    inputs = cases.inputs(TINY, CPU, 1)
    batch = Batch.of(TINY.lengths, TINY.causal, 2, CPU)
    forward, backward = forward_and_backward(batch)
    bounds = "Tensor? cu_seqlens_q=None, int? max_seqlen_q=None, float? softmax_scale=None"
    there = f"x::fwd(Tensor q, Tensor k, Tensor v, {bounds}, bool is_causal=False) -> Tensor"
    back = "x::bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    back += f"Tensor? dq=None, Tensor? dk=None, Tensor? dv=None, {bounds}) -> Tensor"

    def written(dout, q, k, v, dq, dk, dv, **rest):
        for x, grad in zip((dq, dk, dv), backward(dout, q, k, v), strict=True):
            x.copy_(grad)

    def given(q, k, v, is_causal, **rest):
        assert is_causal and rest["max_seqlen_q"] == 9 and rest["softmax_scale"] == 8**-0.5
        return forward(q, k, v), q.new_zeros(4, 19), None, None

    parse = torch._C.parse_schema
    operators = SimpleNamespace(
        fwd=SimpleNamespace(default=Operator(parse(there), given)),
        bwd=SimpleNamespace(default=Operator(parse(back), written)),
    )
    loaded = []
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)
    peer = peers.fa3(batch, True)
    assert loaded == [str(binary)]
    close(in_every_mode(harness.Apart(peer.function, bench.whole), inputs), truth(TINY, inputs))


def test_another_schema_is_an_error_and_what_is_missing_is_none():
    schema = torch._C.parse_schema("x::f(Tensor q, Tensor sinks, int n=1) -> Tensor")
    with pytest.raises(TypeError, match="this version asks for sinks"):
        peers.by_schema(Operator(schema, None), q=torch.ones(1), m=3)
    got = peers.by_schema(Operator(schema, lambda **x: x), q=1, sinks=2, m=3)
    assert got == {"q": 1, "sinks": 2}
    for name in ("nowhere", "nowhere.at.all", "json.nothing"):
        with pytest.raises(harness.Missing, match="that is not installed"):
            peers.module_of(name, "that")
    case = cases.toy(cases.CASES["short"])
    for name in set(peers.PEERS) - set(peers.ANYWHERE):
        with pytest.raises(harness.Missing, match="needs CUDA"):
            bench.build(name, case, cases.inputs(case, CPU, 0), True)


def test_rope_and_qk_norm_by_themselves():
    inputs = cases.inputs(TINY, CPU, 1)
    step, note = bench.build("rope_qk_norm", TINY, inputs, True)
    q, k, *gradients = step(inputs, True)
    assert "no attention" in note and len(gradients) == 4
    position = torch.cat([torch.arange(n) for n in TINY.lengths])
    for got, x in zip((q, k), inputs.stacked, strict=False):
        x = x.detach() * (x.detach().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        pairs = torch.complex(x[..., :4], x[..., 4:])
        angle = torch.outer(position, 1e4 ** (-torch.arange(4) / 4))
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(got, torch.cat([pairs.real, pairs.imag], -1))


# ---- right or not ----


@pytest.mark.parametrize("wrong", ["nothing", "out", "gradient", "noise", "nan", "raises"])
def test_the_gate_sees(wrong, monkeypatch):
    calls = iter(range(1000))

    def faulty(q, k, v, impl, plan, **options):
        out = attention_ref(q, k, v, **options)
        if wrong == "nothing":
            return out
        if wrong == "raises":
            raise RuntimeError("out of resources")
        if wrong == "noise":  # right, but not the same twice
            return out + next(calls) * 1e-6
        if wrong == "gradient":
            return out.detach() + 1.0001 * (out - out.detach())
        return out * {"out": 1.0001, "nan": torch.nan}[wrong]

    monkeypatch.setattr(checked, "attention", faulty)
    verdicts = list(bench.gate(CPU, True))
    assert len(verdicts) == len(list(checked.checks()))
    assert all(verdict["ok"] == (wrong == "nothing") for verdict in verdicts)
    assert report.gate(verdicts).count("RED") == (0 if wrong == "nothing" else len(verdicts))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_spot_check_sees(mode, causal, monkeypatch):
    case = replace(TINY, causal=causal)
    inputs = cases.inputs(case, CPU, 1)
    names = {"fwd": ["out"], "bwd": ["dq", "dk", "dv"], "fwd+bwd": [*checked.NAMES]}[mode]
    everything = dict(zip(checked.NAMES, truth(case, inputs), strict=True))
    got = [everything[name] for name in names]
    found = checked.spot(case, inputs, mode, got)
    assert found["ok"] and found["near"] and list(found["rms"]) == names
    for i, name in enumerate(names):
        other = [x.clone() for x in got]
        other[i][-1, -1, -1] += 0.01
        found = checked.spot(case, inputs, mode, other)
        assert not found["ok"] and not found["near"] and not found[name]["ok"]
        other[i][-1, -1, -1] = torch.nan
        assert not checked.spot(case, inputs, mode, other)["near"]
    monkeypatch.setattr(checked, "MOST", 8)  # of the sequence of 9 only some rows
    monkeypatch.setattr(checked, "ROWS", 5)
    assert checked.spot(case, inputs, mode, got)["ok"]


def test_who_computes_something_else_has_no_time(monkeypatch):
    inputs = cases.inputs(TINY, CPU, 1)

    def half(batch, smoke):
        right = peers.sdpa(batch, smoke).function
        return peers.Peer(lambda q, k, v: right(q, k, v.detach() + 0 * v))  # dv is 0

    monkeypatch.setitem(peers.PEERS, "sdpa", half)
    step, _ = bench.build("sdpa", TINY, inputs, True)
    harness.rotating(step, [inputs], "fwd")(0)
    with pytest.raises(RuntimeError, match=r"computes something else, .*'dv': 1.0"):
        harness.rotating(step, [inputs], "bwd")


# ---- targets ----


def test_targets_need_both_numbers_and_green():
    def row(case, provider, ms, mode="fwd", **others):
        at = {"case": case, "provider": provider, "mode": mode, "ms": ms}
        return {**at, "copy_share": 0.5, **others}

    assert bench.targets([row("mid", "ours", 1.0, green=True)]) == []
    assert bench.targets([row("mid", "ours", 1.0, green=False), row("mid", "varlen", 2.0)]) == []
    mid = bench.targets([row("mid", "ours", 1.0, green=True), row("mid", "varlen", 2.0)])
    assert [(t["value"], t["limit"], t["met"]) for t in mid] == [
        (2.0, ">= 1.6", True),
        (2.0, "aim >= 2.5", False),
    ]
    skip = bench.targets([row("skip", "ours", 1.06, green=True), row("skip", "alone", 1.0)])
    assert [(t["target"], t["met"]) for t in skip] == [
        ("skip, fwd: time / that of the rest alone", False)
    ]
    short = [row("short", "ours", 0.5, "bwd", green=True), row("short", "varlen", 2.0, "bwd")]
    assert [(t["value"], t["limit"], t["met"]) for t in bench.targets(short)] == [
        (4.0, ">= 3.0", True),
        (4.0, "aim >= 6.0", False),
        (2.0, "aim <= 1.5", False),
    ]
    long = [row("long", "ours", 1.0, green=True), row("long", "fa3", 0.9)]
    assert [(t["target"], t["met"]) for t in bench.targets(long)] == [
        ("long, fwd: times FA3", True)
    ]


def test_every_case_has_a_baseline_and_runs_everywhere():
    for name, case in cases.CASES.items():
        assert (
            case.name == name
            and case.providers[0] == "ours"
            and case.providers[1] in (*("varlen", "alone"),)
        )
        small = cases.toy(case)
        assert small.causal == case.causal and small.modes == case.modes
        assert f"T = {case.tokens}, {case.Hq}/{case.Hkv} heads" in cases.about(case)
        assert (0 < small.alive < len(small.lengths)) == (case.gone > 0)


def test_packed_inputs_are_no_views_apart():
    inputs = Packed(*(torch.ones(5, h, 4) for h in (2, 1, 1, 2)))
    assert len(inputs.all()) == 3 and inputs.nbytes() == 4 * 5 * 4 * 4


# ---- through the harness ----


def worker_of(smoke):
    args = argparse.Namespace(name="attention", smoke=smoke, red=False, skip=[], seconds=300.0)
    made = worker.Worker(args, CPU)
    made.ceilings = {"tflops": 2.0, "gbs": 3.0}
    return made


def said(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_toy_cases_and_the_sweep_run_to_their_end(capsys, monkeypatch):
    monkeypatch.undo()  # in fp16, as a toy run does
    made = worker_of(smoke=True)
    for name in ("mid", "skip_short", "short_bert", "very_long"):
        made.case(name)
    made.sweep("mid")
    records = said(capsys)
    rows = [r for r in records if r["kind"] == "row"]
    assert {r["status"] for r in rows} == {"ran", "absent"} and "ms" not in rows[0]
    mine = [r for r in rows if r["provider"] == "ours"]
    assert len(mine) == 8 and all(r["green"] and r["spot"]["ok"] for r in mine)
    assert {r["provider"] for r in rows if r["status"] == "absent"} <= set(peers.PEERS)
    sweeps = [r for r in records if r["kind"] == "sweep"]
    assert [(r["kernel"], r["mode"]) for r in sweeps] == [
        *[("long_forward_64", "fwd")] * 2,  # the present entry and one candidate
        *[("keys_backward_64", "bwd")] * 2,
    ]
    assert all(r["status"] == "ran" and r["right"] for r in sweeps)


@pytest.mark.slow
def test_times_become_targets(capsys, monkeypatch):
    toys = {name: cases.toy(cases.CASES[name]) for name in ("short", "skip")}
    few = {"short": ("ours", "sdpa", "rope_qk_norm"), "skip": ("ours", "alone")}
    toys = {name: replace(case, providers=few[name]) for name, case in toys.items()}
    monkeypatch.setattr(cases, "CASES", toys)
    monkeypatch.setattr(bench, "BREAKDOWN", ())
    monkeypatch.setattr(worker, "MS", 1.0)

    def quick(q, k, v, impl, plan, **options):
        return attention_ref(q, k, v, **options)

    monkeypatch.setattr(bench, "attention", quick)
    made = worker_of(smoke=False)
    for name in toys:
        made.case(name)
    rows = [r for r in said(capsys) if r["kind"] == "row"]
    assert len(rows) == 3 * 3 + 2 * 2 and all(r["ms"] > 0 for r in rows)
    for row in rows:
        case = toys[row["case"]]
        gbs = cases.nbytes(case, row["mode"]) / row["ms"] / 1e6
        assert row["copy_share"] == pytest.approx(gbs / 3.0) and row["sets"] == 1
    ms = {(r["case"], r["provider"], r["mode"]): r["ms"] for r in rows}
    ratio = {t["target"]: t["value"] for t in bench.targets(rows)}
    for mode in ("fwd", "bwd"):
        told = ratio[f"skip, {mode}: time / that of the rest alone"]
        assert told == pytest.approx(ms["skip", "ours", mode] / ms["skip", "alone", mode])
        floor = cases.nbytes(toys["short"], mode) / 3.0 / 1e6
        told = ratio[f"short, {mode}: time / floor of bytes"]
        assert told == pytest.approx(ms["short", "ours", mode] / floor)
    mine = [r for r in rows if r["case"] == "skip"]
    printed = report.table(mine, "bwd", None, bench.BASELINES)
    assert printed.splitlines()[1].endswith("x varlen  x varlen_gqa  x alone")
    assert f"{1 / ratio['skip, bwd: time / that of the rest alone']:.2f}" in printed
