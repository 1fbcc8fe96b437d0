"""The bench of encode: it runs, its gate can fail, and what it says is what was measured."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import encode as bench
from bench import loader
from mlembed.inference.encoder import Encoder
from mlembed.modeling.transformer import Transformer, num_parameters

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_smoke_runs_everything_and_gives_no_numbers():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "encode", "--smoke"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    result = last["benches"]["encode"]
    assert last["ok"] and result["green"] and result["finished"] and result["failed"] == {}
    ran = dict.fromkeys(("ours", *bench.BASELINES), "ran")
    assert result["ran"] == {name: {"full": ran, "exit": {"ours": "ran"}} for name in bench.CASES}
    assert "gate: 2 of 2 checks right" in done.stdout
    assert not re.search(r"\d ?(ms|s)\b|texts/s", done.stdout), done.stdout


def test_names_are_one_anothers():
    assert "encode" in command.NAMES
    assert all(case.modes == bench.MODES and case.name == n for n, case in bench.CASES.items())
    assert set(bench.BATCH) == set(bench.BASELINES)


def test_flops_are_two_a_weight_of_the_layers():
    for cfg in (bench.CPU_SHAPE, bench.CUDA_SHAPE):
        with torch.device("meta"):
            layers = Transformer(replace(cfg, num_hidden_layers=2, exits=(2,))).layers
        products = sum(w.numel() for w in layers.parameters() if w.ndim == 2)
        assert bench.flops(cfg, 2) == 2 * products
    # Those of Qwen3-0.6B, without its table.
    held = num_parameters(replace(bench.CUDA_SHAPE, vocab_size=2)) - 2 * 1024
    assert bench.flops(bench.CUDA_SHAPE, 28) / 2 == pytest.approx(held, rel=1e-3)


def test_texts_have_the_lengths_of_their_case():
    for case, tokens in ((bench.CASES["short"], 12), (bench.CASES["mid"], 80)):
        counts = [len(text.split()) for text in bench.texts(replace(case, cpu=800), CPU)]
        assert np.median(counts) == pytest.approx(tokens, rel=0.1) and len(counts) == 800


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A model as the bench saves it, without the check of export: its gate is one."""
    from mlembed.data import tokenizer
    from mlembed.modeling import pretrained
    from mlembed.publishing.export import write_sentence_transformers

    case, path = bench.toy(bench.CASES["short"]), tmp_path_factory.mktemp("toy") / "model"
    path.mkdir()
    read = loader.learnt(bench.drawn(case))
    cfg = replace(bench.shape(case, CPU), vocab_size=read.get_vocab_size())
    encoder = Encoder(Transformer(cfg).eval(), read, 512)
    pretrained.save(encoder.model, path)
    tokenizer.save(read, path, 512)
    write_sentence_transformers(path, encoder, cfg.hidden_size)
    return case, path


def test_an_encoder_that_mixes_up_its_texts_is_not_green(toy, monkeypatch):
    case, path = toy
    assert [verdict["ok"] for verdict in bench.gate(case, path, CPU)] == [True, True]
    encode = Encoder.encode
    # Only ours, and only the gate's many texts: export compares few, before.
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, texts, *a, **o: encode(self, texts[:: 1 if len(texts) < 40 else -1], *a, **o),
    )
    cut = path.parent / "again"
    path.rename(cut)
    assert [verdict["ok"] for verdict in bench.gate(case, cut, CPU)] == [False, False]
    cut.rename(path)


def test_a_row_is_what_was_measured(monkeypatch):
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
    # Where no time is left one round is all, and of toys there are no times.
    (late, _) = bench.measure(case, ["a"], of, time.monotonic(), CPU).values()
    assert late["repeats"] == 1
    (toy_row, _) = bench.measure(bench.toy(case), ["a"], of, time.monotonic(), CPU).values()
    assert "ms" not in toy_row


def row(provider, mode, ms, device="cpu"):
    at = {"case": "short", "provider": provider, "mode": mode, "device": device, "status": "ran"}
    return at | {"ms": ms, "p20": ms, "p80": ms, "texts_s": 7.0, "tokens": 900, "floor_ms": 25.0}


def test_targets():
    rows = [row("ours", "full", 100.0), row("ours", "exit", 50.0)]
    assert bench.targets(rows) == []
    (target,) = bench.targets([*rows, row("sentence_transformers", "full", 140.0)])
    assert target["value"] == pytest.approx(1.4) and target["met"] and target["limit"] == ">= 1.3"
    assert not bench.targets([*rows, row("sentence_transformers", "full", 120.0)])[0]["met"]
    cuda = [one | {"device": "cuda"} for one in rows]
    whole, shallow = bench.targets([*cuda, row("sentence_transformers", "full", 390.0, "cuda")])
    assert not whole["met"] and whole["limit"] == ">= 4.0"
    assert shallow["value"] == 2 and not shallow["met"] and shallow["limit"] == ">= 2.5"


def test_the_table_says_what_is_measured_and_what_failed():
    rows = [row("ours", "full", 100.0), row("st_batch_256", "full", 150.0)]
    told = bench.table([*rows, row("ours", "exit", 1.0)], "full", None, ()).splitlines()
    assert len(told) == 3 and told[1].split() == [
        "ours",
        "100",
        "100..100",
        "7",
        "9,000",
        "25%",
        "-",
    ]
    assert told[2].split()[-1] == "1.50"
    failed = {"provider": "ours", "mode": "full", "status": "failed", "note": "no memory"}
    assert "failed no memory" in bench.table([failed], "full", None, ())
