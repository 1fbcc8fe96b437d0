"""Encoding: order, prefixes, cuts, sizes by text, prompts, windows, hostile texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import tiny_encoder, tiny_tokenizer

from mlembed.inference import encoder as module
from mlembed.inference.encoder import Encoder
from mlembed.inference.vector_files import Quantiser
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer

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
ODD_SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 10}
ODD_SHAPE |= {"num_key_value_heads": 2, "intermediate_size": 37, "rope_theta": 700.0}
ODD_SHAPE |= {"exits": (1, 3), "matryoshka_dims": (5, 12, 24), "ranks": (3, 11)}


def build() -> Encoder:
    return tiny_encoder(tiny_tokenizer(TEXTS * 2), MAX_LENGTH, **ODD_SHAPE)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build()


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def assert_near(ours, theirs, atol=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


# Packs of one text each, of two or three, and one pack for all.
@pytest.mark.parametrize("max_tokens", [1, 40, 16_384])
def test_order(encoder, max_tokens):
    texts = TEXTS + HOSTILE
    packed = replace(encoder, max_tokens=max_tokens)
    together = packed.encode(texts)
    assert_near(together, np.concatenate([encoder.encode([text]) for text in texts]))
    # All are distinct, so a wrong order would show; and turning the input turns the output.
    similarity = together @ together.T - 2 * np.eye(len(texts))
    assert similarity.max() < 0.9999
    assert_near(packed.encode(texts[::-1])[::-1], together)
    # Equal texts have equal vectors.
    vectors = packed.encode(["a b c", *TEXTS, "a b c"])
    assert_near(vectors[0], vectors[-1], 1e-6)


@pytest.mark.parametrize(("dim", "exit", "rank"), CUTS)
def test_cuts(encoder, dim, exit, rank):
    """Unit norm, nested prefixes, and equality with the cut model."""
    vectors = encoder.encode(TEXTS, dim, exit, rank)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), dim or 24)
    assert_near(np.linalg.norm(vectors, axis=1), 1, 1e-6)
    for d in (1, 5, 12):
        if d <= vectors.shape[1]:
            assert_near(encoder.encode(TEXTS, d, exit, rank), unit(vectors[:, :d]))
    small = replace(encoder, model=pretrained.cut(encoder.model, exit or 3, rank))
    np.testing.assert_array_equal(vectors, small.encode(TEXTS, dim))
    if (dim, exit, rank) != (None, None, None):
        assert np.abs(vectors - encoder.encode(TEXTS)[:, :dim]).max() > 0.01


def test_encode_exits(encoder):
    trained = encoder.encode_exits(TEXTS)
    assert trained.shape == (2, len(TEXTS), 24) and trained.dtype == torch.float32
    every = encoder.encode_exits(TEXTS, [1, 2, 3], rank=3)
    for exit in (1, 2, 3):
        assert_near(unit(every[exit - 1].numpy()), encoder.encode(TEXTS, None, exit, 3), 1e-6)
    assert torch.equal(trained, encoder.encode_exits(TEXTS, [1, 3]))


@pytest.mark.parametrize("on_disk", [False, True])
def test_encode_grid(encoder, on_disk, hooked, monkeypatch):
    """Each size alone, from one pass a rank."""
    files, disk_array = [], module.disk_array
    monkeypatch.setattr(module, "disk_array", lambda s: [files.append(s), disk_array(s)][1])
    counts = texts_of_forwards(hooked.model)
    sizes = [(5, 1, 3), (24, 1, 3), (12, 2, 3), (24, 3, 11)]
    vectors = hooked.encode_grid(TEXTS, sizes, prompt="x ", on_disk=on_disk)
    assert sum(counts) == 2 * len(TEXTS)
    for size in sizes:
        assert vectors[size].dtype == torch.float32
        assert_near(vectors[size], encoder.encode(TEXTS, *size, prompt="x "), 1e-6)
    default = replace(encoder, prompts={"x": "x "}, default_prompt_name="x")
    default = default.encode_grid(TEXTS, sizes)
    for size in sizes:
        assert_near(vectors[size], default[size], 1e-6)
    assert files == ([(2, 9, 24), (1, 9, 24)] if on_disk else [])
    assert hooked.encode_grid([], sizes, on_disk=on_disk)[24, 1, 3].shape == (0, 24)
    with pytest.raises(ValueError, match=r"exit: expected 1\.\.3"):
        encoder.encode_grid(TEXTS, [(5, 4, 3)])


def test_full_size(encoder):
    assert encoder.full_size() == (24, 3, 11)
    assert encoder.full_size((5, None, 2)) == (5, 3, 2)
    plain = replace(encoder, model=Transformer(replace(encoder.model.cfg, ranks=())))
    assert plain.full_size() == (24, 3, None)


def test_any_unicode(encoder):
    vectors = encoder.encode(HOSTILE)
    assert_near(np.linalg.norm(vectors, axis=1), 1, 1e-6)
    # Composed and decomposed spellings are one text (NFC).
    composed, decomposed = encoder.encode(["caf\u00e9", "cafe\u0301"])
    assert_near(composed, decomposed, 1e-6)
    # The name of a special token in a text ends nothing: what follows still counts.
    before, after = encoder.encode(["<|endoftext|> one", "<|endoftext|> two"])
    assert np.abs(before - after).max() > 0.01


def test_no_texts(encoder):
    assert encoder.encode([]).shape == (0, 24)
    assert encoder.encode([], dim=5).shape == (0, 5)
    assert encoder.encode_exits([]).shape == (2, 0, 24)
    assert encoder.encode_widths([], []) == [] == list(encoder.stream([]))


# One word, many words, one emoji again and again: hard for tokenizers at 100,000 characters.
@pytest.mark.parametrize("word", ["a", "many words ", "🙂"])
def test_line_of_100k_characters(encoder, word):
    line = (word * 100_000)[:100_000]
    # Texts of the same call are as they are without it.
    vectors = encoder.encode(["a", line, TEXTS[0]])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors[[0, 2]], encoder.encode(["a", TEXTS[0]]), atol=1e-5)


def test_texts_are_cut_to_max_length(encoder):
    """A call's length does not stay with the tokenizer."""
    words = [" ".join(map(str, range(n))) for n in (50, 60)]
    for length, equal in ((MAX_LENGTH, True), (256, False), (MAX_LENGTH, True)):
        one, other = replace(encoder, max_length=length).encode(words)
        assert (np.abs(one - other).max() < 1e-5) == equal


def test_bf16_returns_fp32(encoder):
    half = replace(encoder, bf16=True).encode(TEXTS)
    assert half.dtype == np.float32
    assert (half * encoder.encode(TEXTS)).sum(1).min() > 0.99


@pytest.mark.parametrize("fails", [False, True])
def test_encoding_suspends_training(encoder, fails, monkeypatch):
    model = Transformer(replace(encoder.model.cfg, dropout=0.5))
    model.load_state_dict(encoder.model.state_dict())
    training = Encoder(model.train(), encoder.tokenizer, MAX_LENGTH)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(training.encode_exits(TEXTS), encoder.encode_exits(TEXTS))
        assert {module.training for module in model.modules()} == {mode}
    if fails:
        monkeypatch.setattr(model, "rotation", None)
        model.train()
        with pytest.raises(TypeError):
            training.encode_exits(TEXTS)
        assert all(module.training for module in model.modules())


def test_encoding_leaves_the_model_alone(encoder):
    before = {n: w.clone() for n, w in encoder.model.state_dict().items()}
    first = encoder.encode(TEXTS, 5, 1, 3)
    encoder.encode(TEXTS)
    np.testing.assert_array_equal(encoder.encode(TEXTS, 5, 1, 3), first)
    assert all(torch.equal(w, before[n]) for n, w in encoder.model.state_dict().items())
    assert all(p.grad is None for p in encoder.model.parameters())


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ((25, None, None), r"dim: expected 1\.\.24 \(the width\), got 25"),
        ((None, 4, None), r"exit: expected 1\.\.3 \(the depth\), got 4"),
        ((None, None, 12), r"rank: expected 1\.\.11 \(the stored rank\), got 12"),
    ],
)
def test_cuts_that_the_model_lacks(encoder, cut, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, *cut)


# ---- sizes by text ----


def texts_of_forwards(model) -> list[int]:
    """Return a list to which each forward from now on appends its number of texts."""
    counts = []
    model.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts


@pytest.fixture
def hooked(encoder):
    """An encoder of the same weights whose model may be hooked."""
    model = Transformer(encoder.model.cfg)
    model.load_state_dict(encoder.model.state_dict())
    return replace(encoder, model=model.eval())


# Of TEXTS.
EXITS = [1, 3, None, 2, 1, 3, 2, 2, 1]
RANKS = [None, 3, 11, 3, None, 7, 3, None, 7]


# All in one pack; several packs, of which some have texts of one exit only.
@pytest.mark.parametrize("max_tokens", [16_384, 40])
def test_exits_by_text_share_packs(hooked, max_tokens):
    hooked.max_tokens = max_tokens
    counts = texts_of_forwards(hooked.model)
    vectors = hooked.encode(TEXTS, 12, EXITS)
    assert sum(counts) == len(TEXTS) and (len(counts) == 1) == (max_tokens > 40)
    for vector, text, exit in zip(vectors, TEXTS, EXITS, strict=True):
        assert_near(vector, hooked.encode([text], 12, exit)[0])


def test_ranks_by_text_are_a_pack_each(hooked):
    counts = texts_of_forwards(hooked.model)
    vectors = hooked.encode(TEXTS, None, np.array([3] * len(TEXTS)), RANKS)
    assert sorted(counts) == [1, 2, 3, 3]  # None, the stored rank, and 11 have packs of their own
    for vector, text, rank in zip(vectors, TEXTS, RANKS, strict=True):
        assert_near(vector, hooked.encode([text], rank=rank)[0])


def test_widths_by_text_are_a_list(encoder):
    dims = [1, 24, None, 5, 12, 5, 7, 24, 3]
    vectors = encoder.encode_widths(TEXTS, dims, EXITS, RANKS)
    assert [len(v) for v in vectors] == [d or 24 for d in dims]
    for vector, text, *size in zip(vectors, TEXTS, dims, EXITS, RANKS, strict=True):
        assert vector.dtype == np.float32
        assert_near(vector, encoder.encode([text], *size)[0])
    with pytest.raises(ValueError, match="dim: expected a whole number, got"):
        encoder.encode(TEXTS, dims)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"exit": [1, 2]}, "exit: expected one per text, 9, got 2"),
        ({"dims": [5] * 10}, "dim: expected one per text, 9, got 10"),
        ({"rank": [3] * 8 + [12]}, r"rank: expected 1\.\.11 \(the stored rank\), got 12"),
        ({"exit": [1] * 8 + [0]}, r"exit: expected 1\.\.3 \(the depth\), got 0"),
    ],
)
def test_wrong_sizes_by_text(encoder, sizes, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode_widths(TEXTS, **{"dims": [None] * 9} | sizes)


# ---- precisions ----


def test_precisions(encoder):
    plain = encoder.encode(TEXTS)
    ranges = np.stack([plain.min(0) - 0.1, plain.max(0) + 0.1])
    for precision in ("float16", "int8", "ubinary"):
        given = None if precision != "int8" else ranges
        made = encoder.encode(TEXTS, precision=precision, ranges=given)
        np.testing.assert_array_equal(made, Quantiser(precision, given)(plain))
    with pytest.raises(ValueError, match="precision: expected one of float32, .*, got 'int4'"):
        encoder.encode(TEXTS, precision="int4")


# ---- windows ----


def test_stream_reads_as_it_encodes(encoder, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4)
    read = []

    def source():
        for text in TEXTS * 4:
            read.append(text)
            yield text

    parts, most = [], 0
    for part in encoder.stream(source(), 12, 2, 3):
        parts.append(part)
        most = max(most, len(read) - sum(map(len, parts)))
    assert [len(part) for part in parts] == [4] * 9 and most <= 8  # at most two windows ahead
    # Sizes by text, and exits, go by windows too.
    by_text = encoder.encode_widths(TEXTS * 2, [5] * 18, EXITS * 2, RANKS * 2)
    raw = encoder.encode_exits(TEXTS * 2, [1, 3])
    monkeypatch.undo()
    assert_near(np.concatenate(parts), encoder.encode(TEXTS * 4, 12, 2, 3), 1e-6)
    assert_near(by_text, encoder.encode(TEXTS * 2, 5, EXITS * 2, RANKS * 2))
    np.testing.assert_allclose(raw, encoder.encode_exits(TEXTS * 2, [1, 3]), rtol=1e-4, atol=1e-4)


def test_stream_of_long_texts_has_smaller_windows(encoder, monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS", 100)
    parts = list(encoder.stream(["a" * 60] * 5 + ["b"], 5))
    assert [len(part) for part in parts] == [2, 2, 2]


def test_stream_checks_before_it_reads(encoder):
    def source():
        raise AssertionError("read")
        yield

    narrow = {"precision": "int8", "ranges": np.zeros((2, 5))}
    for options in ({"dim": 99}, {"prompt_name": "x"}, {"precision": "int4"}, narrow):
        with pytest.raises(ValueError, match="expected"):
            encoder.stream(source(), **options)


def test_stream_keeps_the_first_ranges(encoder, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4)
    quantiser = Quantiser("int8")
    parts = np.concatenate(list(encoder.stream(TEXTS, precision=quantiser)))
    plain = encoder.encode(TEXTS)
    ranges = np.stack([plain[:4].min(0), plain[:4].max(0)])
    assert_near(quantiser.ranges, ranges, 1e-6)
    # A number on a step's edge may fall to either side of it.
    assert np.abs(parts.astype(int) - Quantiser("int8", ranges)(plain)).max() <= 1


def test_errors_give_the_text_number(encoder, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4)
    with pytest.raises(ValueError, match="text 6: expected Unicode, got a lone surrogate"):
        encoder.encode([*TEXTS[:6], "\ud800"])
    with pytest.raises(ValueError, match="text 5: expected a string, got NoneType"):
        encoder.encode([*TEXTS[:5], None])


def test_progress_counts_texts(encoder, capsys):
    encoder.encode(TEXTS, progress=True)
    printed = capsys.readouterr()
    assert "encoding" in printed.err and "texts/s" in printed.err and printed.out == ""
    encoder.encode(TEXTS)
    assert capsys.readouterr().err == ""


# ---- arguments from NumPy and torch, and arguments that are errors ----


@pytest.mark.parametrize("make", [np.int64, np.array, torch.tensor])
def test_sizes_of_other_libraries(encoder, make):
    want = encoder.encode(TEXTS[:3], 5, 2, 7)
    np.testing.assert_array_equal(encoder.encode(TEXTS[:3], make(5), make(2), make(7)), want)
    (part,) = encoder.stream(TEXTS[:3], make(5), make(2), make(7))
    np.testing.assert_array_equal(part, want)
    if make is not np.int64:
        several = encoder.encode(TEXTS[:3], exit=make([1, 2, 3]))
        np.testing.assert_array_equal(several, encoder.encode(TEXTS[:3], exit=[1, 2, 3]))


@pytest.mark.parametrize("size", [True, 5.0, np.float32(5), "5", [5.0, 5, 5], {1: 5}, iter([5])])
@pytest.mark.parametrize("name", ["dim", "exit", "rank"])
def test_sizes_must_be_whole_numbers(encoder, name, size):
    for call in (encoder.encode, encoder.stream):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number, got "):
            call(TEXTS[:3], **{name: size})


def test_texts_must_be_a_sequence_of_strings(encoder):
    for call in (encoder.encode, encoder.encode_exits):
        for texts in (iter(TEXTS), None, 3):
            with pytest.raises(ValueError, match="texts: expected a sequence, got .*stream"):
                call(texts)
    for call in (encoder.encode, encoder.encode_exits, encoder.stream):
        with pytest.raises(ValueError, match="texts: expected .* of texts, got one str"):
            call("abc")
    with pytest.raises(ValueError, match="texts: expected an iterable of texts, got NoneType"):
        encoder.stream(None)
    with pytest.raises(ValueError, match="prompt: expected a string, got int"):
        encoder.encode(TEXTS, prompt=3)
