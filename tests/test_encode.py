"""Texts to vectors: order, prefixes, cuts, hostile texts, and the command as a user runs it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_model import randomise

from mlembed import config, pretrained, tokenizer
from mlembed.encode import Encoder
from mlembed.model import Transformer
from mlembed.pack import budgeted

TEXTS = [
    "Wednesday, May 4, 2050",
    "",
    "2050 թ. մայիսի 4, չորեքշաբթի",
    "বুধবার, ৪ মে, ২০৫০ এবং আরও কয়েকটি শব্দ যা এই লেখাটিকে দীর্ঘ করে তোলে",
    "a",
    "比利时、哈萨克斯坦或赞比亚",
    "الأربعاء، ٤ مايو ٢٠٥٠",
    "in 1 hour 🙂",
    "один два три четыре пять шесть семь восемь девять десять",
]
# Combining marks, joined emoji, right-to-left overrides, controls, noncharacters, white space only,
# line breaks of all kinds, the special tokens' own names, the last code point.
HOSTILE = [
    "👩‍👩‍👧‍👦🏳️‍🌈🇧🇪",
    "e\u0301\u0327\u0323" * 9,
    "\u202eabc\u202c \u200f\u200e\u2066",
    "\x00\x01\x7f",
    "\ufffe\uffff\U0010ffff\ufeff",
    " ",
    "\n\r\n\t\u2028\u2029\x0b\x0c\x85",
    "   leading and trailing   ",
    "<|pad|><|endoftext|> in a text",
    "ﷺ𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
# The full model, each dimension cut alone, all of them; a rank and an exit that were never trained.
CUTS = [(None, None, None), (5, None, None), (None, 1, None), (None, None, 3), (5, 2, 7)]
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokens = tokenizer.train(TEXTS * 2, 300)
    cfg = config.Model(
        vocab_size=tokens.get_vocab_size(),
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=37,
        rope_theta=700.0,
        max_position_embeddings=64,
        exits=(1, 3),
        matryoshka_dims=(5, 12, 24),
        ranks=(3, 11),
    )
    return Encoder(randomise(Transformer(cfg)), tokens, MAX_LENGTH)


@pytest.fixture(scope="module")
def directory(encoder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    pretrained.save(encoder.model, path)
    tokenizer.save(encoder.tokenizer, path, MAX_LENGTH)
    return path


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# Packs of one text each, of two or three, and one pack for all.
@pytest.mark.parametrize("max_tokens", [1, 40, 16_384])
def test_order_is_the_input_order(encoder, max_tokens):
    texts = TEXTS + HOSTILE
    together = replace(encoder, max_tokens=max_tokens).encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    # All are distinct, so a wrong order would show; and turning the input turns the output.
    similarity = together @ together.T - 2 * np.eye(len(texts))
    assert similarity.max() < 0.9999
    turned = replace(encoder, max_tokens=max_tokens).encode(texts[::-1])
    np.testing.assert_allclose(turned[::-1], together, rtol=0, atol=1e-5)


def test_the_small_budget_really_makes_several_packs(encoder):
    # 40 tokens and texts of up to 24: fewer packs than texts, more than one.
    ids = tokenizer.tokenize(encoder.tokenizer, TEXTS + HOSTILE, MAX_LENGTH)
    lengths = np.array([len(text) for text in ids])
    packs = budgeted(lengths, 40)
    assert 1 < len(packs) < len(ids)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(ids)))
    assert all(lengths[rows].sum() <= 40 for rows in packs)
    assert len({len(text) for text in ids}) >= 6 and lengths.max() == MAX_LENGTH


@pytest.mark.parametrize(("dim", "exit", "rank"), CUTS)
def test_unit_norm_and_prefix(encoder, dim, exit, rank):
    vectors = encoder.encode(TEXTS, dim, exit, rank)
    assert isinstance(vectors, np.ndarray) and vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), dim or 24)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    for d in (1, 5, 12):
        prefix = encoder.encode(TEXTS, d, exit, rank)
        if d <= vectors.shape[1]:
            np.testing.assert_allclose(prefix, unit(vectors[:, :d]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "exit", "rank"), CUTS)
def test_arguments_equal_the_cut_model(encoder, dim, exit, rank):
    small = replace(encoder, model=pretrained.cut(encoder.model, exit or 3, rank))
    ours = encoder.encode(TEXTS, dim, exit, rank)
    np.testing.assert_array_equal(ours, small.encode(TEXTS, dim))
    if (dim, exit, rank) != (None, None, None):
        assert np.abs(ours - encoder.encode(TEXTS)[:, :dim]).max() > 0.01  # the cut is one


def test_raw_exits_of_one_pass(encoder):
    with_default = encoder.exits(TEXTS)
    assert with_default.shape == (2, len(TEXTS), 24) and with_default.dtype == torch.float32
    every = encoder.exits(TEXTS, [1, 2, 3], rank=3)
    for exit in (1, 2, 3):
        np.testing.assert_allclose(
            unit(every[exit - 1].numpy()), encoder.encode(TEXTS, None, exit, 3), rtol=0, atol=1e-6
        )
    torch.testing.assert_close(with_default, encoder.exits(TEXTS, [1, 3]), rtol=0, atol=0)


def test_any_unicode(encoder):
    vectors = encoder.encode(HOSTILE)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    # Composed and decomposed spellings are one text (NFC).
    composed, decomposed = encoder.encode(["caf\u00e9", "cafe\u0301"])
    np.testing.assert_allclose(composed, decomposed, rtol=0, atol=1e-6)
    # The name of a special token in a text ends nothing: what follows still counts.
    before, after = encoder.encode(["<|endoftext|> one", "<|endoftext|> two"])
    assert np.abs(before - after).max() > 0.01


@pytest.mark.parametrize("broken", ["\ud83d", "half an emoji \ude00 here"])
def test_half_a_character_is_refused(encoder, broken):
    # Json's "\\ud83d" gives such a string: no text, and no encoding holds it.
    with pytest.raises(ValueError, match="surrogate"):
        encoder.encode(["fine", broken])


def test_empty_text_is_its_eos(encoder):
    ids = tokenizer.tokenize(encoder.tokenizer, [""], MAX_LENGTH)
    assert ids[0].tolist() == [encoder.tokenizer.token_to_id(tokenizer.EOS)]
    assert np.isfinite(encoder.encode([""])).all()


def test_no_texts(encoder):
    assert encoder.encode([]).shape == (0, 24)
    assert encoder.encode([], dim=5).shape == (0, 5)
    assert encoder.exits([]).shape == (2, 0, 24)


# One word, many words, one emoji over and over: what tokenizers find hard, at 100,000 characters.
@pytest.mark.parametrize("unit_", ["a", "many words ", "🙂"])
def test_a_line_of_100k_characters(encoder, unit_):
    line = (unit_ * 100_000)[:100_000]
    ids = tokenizer.tokenize(encoder.tokenizer, [line], MAX_LENGTH)[0]
    assert len(ids) == MAX_LENGTH
    assert ids[-1] == encoder.tokenizer.token_to_id(tokenizer.EOS)
    # A neighbour in the same call neither suffers nor is cut.
    vectors = encoder.encode(["a", line, TEXTS[0]])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors[[0, 2]], encoder.encode(["a", TEXTS[0]]), atol=1e-5)


def test_longer_texts_are_cut_keeping_eos(encoder):
    words = " ".join(str(i) for i in range(50))
    whole = replace(encoder, max_length=64)
    long_ids = tokenizer.tokenize(whole.tokenizer, [words], 64)[0]
    cut_ids = tokenizer.tokenize(encoder.tokenizer, [words], MAX_LENGTH)[0]
    assert cut_ids[:-1].tolist() == long_ids[: MAX_LENGTH - 1].tolist()
    assert np.abs(encoder.encode([words]) - whole.encode([words])).max() > 1e-3
    # The other length was this call's alone.
    assert len(tokenizer.tokenize(encoder.tokenizer, [words], MAX_LENGTH)[0]) == MAX_LENGTH


def test_equal_texts_get_equal_vectors(encoder):
    vectors = replace(encoder, max_tokens=40).encode(["a b c", *TEXTS, "a b c"])
    np.testing.assert_allclose(vectors[0], vectors[-1], rtol=0, atol=1e-6)


def test_bf16_stays_near_and_returns_fp32(encoder):
    half = replace(encoder, bf16=True).encode(TEXTS)
    assert half.dtype == np.float32
    assert (half * encoder.encode(TEXTS)).sum(1).min() > 0.99


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_under_training_drops_nothing_and_goes_on_training(encoder, fails, monkeypatch):
    model = Transformer(replace(encoder.model.cfg, dropout=0.5))
    model.load_state_dict(encoder.model.state_dict())
    training = Encoder(model.train(), encoder.tokenizer, MAX_LENGTH)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(training.exits(TEXTS), encoder.exits(TEXTS))
        assert {module.training for module in model.modules()} == {mode}
    if fails:
        monkeypatch.setattr(model, "rotation", None)
        model.train()
        with pytest.raises(TypeError):
            training.exits(TEXTS)
        assert all(module.training for module in model.modules())


def test_encoding_leaves_the_model_alone(encoder):
    before = {n: w.clone() for n, w in encoder.model.state_dict().items()}
    first = encoder.encode(TEXTS, 5, 1, 3)
    encoder.encode(TEXTS)
    np.testing.assert_array_equal(encoder.encode(TEXTS, 5, 1, 3), first)
    assert all(torch.equal(w, before[n]) for n, w in encoder.model.state_dict().items())
    assert all(p.grad is None for p in encoder.model.parameters())


WRONG = [
    ((0, None, None), r"dim: expected 1\.\.24 \(the width\), got 0"),
    ((25, None, None), r"dim: expected 1\.\.24 \(the width\), got 25"),
    ((-1, None, None), "dim: expected"),
    ((None, 4, None), r"exit: expected 1\.\.3 \(the depth\), got 4"),
    ((None, 0, None), "exit: expected"),
    ((None, None, 12), r"rank: expected 1\.\.11 \(the stored rank\), got 12"),
    ((None, None, 0), "rank: expected"),
]


@pytest.mark.parametrize(("cut", "message"), WRONG)
def test_cuts_that_the_model_lacks(encoder, cut, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, *cut)


def test_rank_of_a_plain_table(encoder):
    cfg = replace(encoder.model.cfg, ranks=())
    with pytest.raises(ValueError, match="rank: expected none"):
        replace(encoder, model=Transformer(cfg)).encode(TEXTS, rank=3)


# ---- directories ----


def test_load(encoder, directory):
    loaded = Encoder.load(str(directory), "cpu")
    assert loaded.max_length == MAX_LENGTH and loaded.model.cfg == encoder.model.cfg
    assert not loaded.model.training
    texts = TEXTS + HOSTILE
    for cut in CUTS:
        np.testing.assert_array_equal(loaded.encode(texts, *cut), encoder.encode(texts, *cut))


def test_a_run_stands_for_its_model(encoder, directory, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="expected a finished run with model/, found none"):
        Encoder.load(str(tmp_path), "cpu")
    (tmp_path / "model").symlink_to(directory)
    np.testing.assert_array_equal(
        Encoder.load(str(tmp_path), "cpu").encode(TEXTS), encoder.encode(TEXTS)
    )


def test_directories_without_a_usable_tokenizer(encoder, tmp_path):
    pretrained.save(encoder.model, tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer: expected .*tokenizer.json"):
        Encoder.load(str(tmp_path), "cpu")
    tokenizer.save(encoder.tokenizer, tmp_path, MAX_LENGTH)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="expected a known eos_token, got '</s>'"):
        Encoder.load(str(tmp_path), "cpu")


def test_a_checkpoint_tokenizer_without_eos_gets_one(encoder, directory, tmp_path):
    # As Qwen3's own tokenizer.json, which appends nothing.
    pretrained.save(encoder.model, tmp_path)
    tokenizer.save(encoder.tokenizer, tmp_path, MAX_LENGTH)
    stored = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    stored["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    loaded = Encoder.load(str(tmp_path), "cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))


# ---- the command ----


def command(*arguments: str | Path | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("MLEMBED_TRACEBACK", None)
    return subprocess.run(
        [sys.executable, "-m", "mlembed.encode", *arguments],
        input=stdin,
        capture_output=True,
        env=environment,
        timeout=120,
    )


def one_line(done: subprocess.CompletedProcess) -> str:
    """The error of a failed command: one line, status 1, nothing on standard output."""
    message = done.stderr.decode()
    assert done.returncode == 1, message
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert done.stdout == b""
    return message


def test_command_prints_vectors_of_its_arguments(encoder, directory):
    done = command(directory, TEXTS[0], "", TEXTS[3], "--dim", "5", "--exit", "2", "--rank", "7")
    assert done.returncode == 0, done.stderr.decode()
    printed = np.array([line.split() for line in done.stdout.decode().splitlines()], dtype=float)
    want = encoder.encode([TEXTS[0], "", TEXTS[3]], 5, 2, 7)
    np.testing.assert_allclose(printed, want, rtol=0, atol=1e-5)


def test_command_reads_lines_and_writes_npy(encoder, directory, tmp_path):
    # An empty line is a text; the last line has no end; a name without .npy stays as it is.
    out = tmp_path / "vectors.bin"
    lines = [TEXTS[0], "", TEXTS[2], " 🙂 "]
    done = command(directory, "--out", out, stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"" and [path.name for path in tmp_path.iterdir()] == ["vectors.bin"]
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode(lines), rtol=0, atol=1e-6)


def test_command_never_overwrites(directory, tmp_path):
    out = tmp_path / "vectors.npy"
    out.write_bytes(b"precious")
    message = one_line(command(directory, "a", "--out", out))
    assert "expected a new file" in message and str(out) in message
    assert out.read_bytes() == b"precious"


def test_command_says_in_one_line_what_is_wrong(directory, tmp_path):
    assert "expected a directory or a hub id" in one_line(command(tmp_path / "nowhere", "a"))
    out = tmp_path / "vectors.npy"
    message = one_line(command(directory, "a", "--dim", "99", "--out", out))
    assert "dim: expected 1..24 (the width), got 99" in message
    assert not out.exists()


def test_command_with_bytes_that_are_no_text(directory):
    # Python hands them on as lone surrogates, arguments always, input where no locale is set.
    one_line(command(directory, stdin=b"fine\n\xff\xfe broken\n"))
    one_line(command(directory, b"\xff\xfe"))
