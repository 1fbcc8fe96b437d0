"""The bench of encode: the least work, a gate that can fail, rows and targets."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import encode as bench
from bench import loader, report
from bench.harness import CPU
from mlembed.inference.encoder import Encoder
from mlembed.modeling.transformer import Transformer, num_parameters


def test_smoke_runs_everything_without_numbers(smoke):
    result, printed = smoke("encode")
    ran = dict.fromkeys(("ours", *bench.BASELINES), "ran")
    modes = {"full": ran | {bench.INT8: "ran"}, "exit": {"ours": "ran"}, "bf16": ran}
    assert result["ran"] == dict.fromkeys(bench.CASES, modes)
    assert "gate: 2 of 2 checks right" in printed and set(bench.BATCH) == set(bench.BASELINES)


def test_flops_are_two_a_weight_of_the_layers():
    for cfg in (bench.CPU_SHAPE, bench.CUDA_SHAPE):
        with torch.device("meta"):
            layers = Transformer(replace(cfg, num_hidden_layers=2, exits=(2,))).layers
        products = sum(w.numel() for w in layers.parameters() if w.ndim == 2)
        assert bench.flops(cfg, 2) == 2 * products
    # Those of Qwen3-0.6B, without its table.
    held = num_parameters(replace(bench.CUDA_SHAPE, vocab_size=2)) - 2 * 1024
    assert bench.flops(bench.CUDA_SHAPE, 28) / 2 == pytest.approx(held, rel=1e-3)


def test_texts_have_the_lengths_of_the_case():
    for case, tokens in ((bench.CASES["short"], 12), (bench.CASES["mid"], 80)):
        counts = [len(text.split()) for text in replace(case, cpu=800).texts(CPU)]
        assert np.median(counts) == pytest.approx(tokens, rel=0.1) and len(counts) == 800


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Return a case and a model like the bench's, without the check of `export`."""
    from mlembed.data import tokenizer
    from mlembed.modeling import pretrained
    from mlembed.publishing.export import write_sentence_transformers

    case, path = bench.CASES["short"].toy(), tmp_path_factory.mktemp("toy") / "model"
    path.mkdir()
    read = loader.learnt(case.language)
    cfg = replace(bench.shape(case, CPU), vocab_size=read.get_vocab_size())
    encoder = Encoder(Transformer(cfg).eval(), read, 512)
    pretrained.save(encoder.model, path)
    tokenizer.save(read, path, 512)
    write_sentence_transformers(path, encoder, cfg.hidden_size)
    return case, path


def test_gate_sees_mixed_up_texts(toy, monkeypatch):
    case, path = toy
    assert [verdict["ok"] for verdict in bench.compared(case, path, CPU)] == [True, True]
    encode = Encoder.encode

    def reversed_encode(self, texts, *args, **options):
        few = len(texts) < 40  # texts that `export` compares
        return encode(self, texts[:: 1 if few else -1], *args, **options)

    monkeypatch.setattr(Encoder, "encode", reversed_encode)
    cut = path.parent / "again"
    path.rename(cut)
    assert [verdict["ok"] for verdict in bench.compared(case, cut, CPU)] == [False, False]
    cut.rename(path)


def test_row_has_the_measured_numbers(monkeypatch):
    case = replace(bench.CASES["short"], rounds=3)
    seen = []

    def slow(some):
        seen.append(len(some))
        time.sleep(0.05)
        return np.full((len(some), 4), 2.0, np.float32)

    def fast(some):
        return slow(some)[:, :1]

    of = {("ours", "full"): fast, ("sentence_transformers", "full"): slow}
    rows = bench.measure(case, ["a"] * 500, of, time.monotonic() + 60, CPU)
    assert seen == [300, 300] + [500] * 6
    row = rows["ours", "full"]
    assert row["value"] == 2 and rows["sentence_transformers", "full"]["value"] == 8
    assert row["repeats"] == 3 and 50 <= row["p20"] <= row["ms"] <= row["p80"]
    assert row["texts_s"] == pytest.approx(500 / row["ms"] * 1e3)
    # Without time left there is one round, and toys have no times.
    (late, _) = bench.measure(case, ["a"], of, time.monotonic(), CPU).values()
    assert late["repeats"] == 1
    (toy_row, _) = bench.measure(case.toy(), ["a"], of, time.monotonic(), CPU).values()
    assert "ms" not in toy_row


def row(provider, mode, ms, device="cpu"):
    at = {"case": "short", "provider": provider, "mode": mode, "device": device, "status": "ran"}
    at["value"] = 1.0
    return at | {"ms": ms, "p20": ms, "p80": ms, "texts_s": 7.0, "tokens": 900, "floor_ms": 25.0}


def test_targets():
    rows = [row("ours", "full", 100.0), row("ours", "exit", 50.0), row("ours", "bf16", 40.0)]
    (early,) = bench.targets(rows)
    assert early["value"] == 2 and early["met"] and early["limit"] == ">= 1.9"
    theirs = row("sentence_transformers", "full", 210.0), row("sentence_transformers", "bf16", 60.0)
    full, half, _ = bench.targets([*rows, *theirs])
    assert full["value"] == pytest.approx(2.1) and full["met"] and full["limit"] == ">= 2"
    assert half["value"] == pytest.approx(1.5) and not half["met"]
    cuda = [one | {"device": "cuda"} for one in rows[:2]]
    whole, early = bench.targets([*cuda, row("sentence_transformers", "full", 390.0, "cuda")])
    assert not whole["met"] and whole["limit"] == ">= 4"
    assert early["value"] == 2 and not early["met"] and early["limit"] == ">= 2.5"


def test_a_model_of_the_user_is_exported_and_encoded(toy, tmp_path, monkeypatch):
    case, path = toy
    # The bench lets tokenizers use threads, which a loader's worker that is forked later waits for.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    asked = replace(case, model=str(path))
    own = bench.saved(asked, CPU, tmp_path / "own")
    cfg = Encoder.load(str(own), "cpu").model.cfg
    assert (
        cfg.num_hidden_layers == 3 and bench.shallow(asked, cfg) == 1 == cfg.num_hidden_layers // 2
    )
    some = ["a b", "c"]
    want = Encoder.load(str(path), "cpu").encode(some)
    assert np.abs(Encoder.load(str(own), "cpu").encode(some) - want).max() < 1e-5


def test_table():
    rows = [row("ours", "full", 100.0), row("st_batch_256", "full", 150.0)]
    how = None, bench.BASELINES, bench.COLUMNS, bench.cells
    lines = report.table([*rows, row("ours", "exit", 1.0)], "full", *how).splitlines()
    assert len(lines) == 4
    assert lines[2].split() == ["ours", "100.0", "100.0..100.0", "7", "9,000", "25%", "-", "1.50"]
    failed = row("ours", "full", None) | {"status": "failed", "note": "no memory"}
    assert "failed" in report.table([failed], "full", *how)
