"""Tokens compared with each text encoded alone, and their files: reused, damaged, mapped."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from mlembed import config
from mlembed.data import tables, tokenizer, tokens
from mlembed.data.tables import Table, TextWriter
from mlembed.data.tokens import tokenise

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
WORDS += ["Straße", "мир", "海", "ملح"]


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train([f"{a} {b}" for a in WORDS for b in WORDS], 300)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of stored tokens, used for tables of any size."""
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "FEW", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def calls(monkeypatch):
    """Texts that were tokenised."""
    seen = []

    def counted(by, texts, max_length):
        seen.extend(texts)
        return tokenizer.tokenize(by, texts, max_length)

    monkeypatch.setattr(tokens, "tokenize", counted)
    return seen


def pairs(n=23, prompt="", document_prompt="", nway=False):
    """A table of items of two to four texts of one to nine words."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 5, size=n)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 10))) for _ in range(sizes.sum())]
    source = config.Source(path="t", prompt=prompt, document_prompt=document_prompt)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Table("t", nway, texts, np.arange(len(texts)), starts, source)


def alone(table, learnt, max_length):
    """The ids of each text by the library's truncation, and how many texts it cuts."""
    whole, cutting = (Tokenizer.from_str(learnt.to_str()) for _ in range(2))
    whole.no_truncation()
    cutting.enable_truncation(max_length)
    first = set(table.starts[:-1].tolist())
    prompts = (table.source.document_prompt, table.source.prompt)
    texts = [prompts[row in first] + text for row, text in enumerate(table.texts)]
    cut = sum(len(whole.encode(text).ids) > max_length for text in texts)
    return [cutting.encode(text).ids for text in texts], cut


def lists(made):
    return [made.flat[begin:end].tolist() for begin, end in itertools.pairwise(made.offsets)]


# ---- tokens ----


@pytest.mark.parametrize("chunk", [1, 7, 8192])
@pytest.mark.parametrize("stored_on_disk", [False, True])
def test_tokens(learnt, chunk, stored_on_disk, monkeypatch, tmp_path):
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "CHUNK", chunk)
    monkeypatch.setattr(tokens, "FEW", 0 if stored_on_disk else 10_000)
    table = pairs(prompt="Instruct: find\nQuery: ", document_prompt="passage: ")
    made = tokenise(table, learnt, 24)
    want, cut = alone(table, learnt, 24)
    assert lists(made) == want and made.truncated == cut
    assert 0 < cut < len(want)
    assert (made.flat.dtype, made.offsets.dtype) == (np.int32, np.int64)
    assert isinstance(made.flat, np.memmap) == stored_on_disk


def test_text_that_just_fits(learnt):
    ids = tokenizer.tokenize(learnt, ["sea land river stone"], 1000)[0]
    n, eos = len(ids), ids[-1]
    table = Table("t", False, ["sea land river stone", "x"], np.arange(2), np.array([0, 2]))
    for length, cut in ((n - 2, 1), (n - 1, 1), (n, 0), (n + 1, 0)):
        made = tokenise(table, learnt, length)
        assert made.truncated == cut
        first = lists(made)[0]
        assert len(first) == min(n, length) and first[-1] == eos
        assert first[:-1] == ids[: len(first) - 1].tolist()


@pytest.mark.parametrize("template", ["$A <|pad|>", "<|pad|> $A <|endoftext|>", "$A", "<|pad|> $A"])
@pytest.mark.parametrize("twice", [False, True])
def test_special_tokens_stay(learnt, template, twice):
    """Like BERT's template, with two tokens at the end, with none."""
    changed = Tokenizer.from_str(learnt.to_str())
    template += " <|endoftext|>" if twice else ""
    ids = [(name, changed.token_to_id(name)) for name in (tokenizer.PAD, tokenizer.EOS)]
    changed.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    table = pairs()
    made = tokenise(table, changed, 11)
    want, cut = alone(table, changed, 11)
    assert lists(made) == want and made.truncated == cut > 0


def test_nway_tables_have_one_prompt(learnt):
    table = pairs(prompt="a: ", document_prompt="b: ", nway=True)
    with pytest.raises(ValueError, match="source t: prompt: expected that of documents, 'b: '"):
        tokenise(table, learnt, 16)
    table = pairs(prompt="a: ", document_prompt="a: ", nway=True)
    assert lists(tokenise(table, learnt, 64)) == alone(table, learnt, 64)[0]


def test_tokenizer_is_not_changed(learnt, cache):
    changed = Tokenizer.from_str(learnt.to_str())
    changed.enable_truncation(5)
    changed.enable_padding()
    before = changed.to_str()
    made = tokenise(pairs(), changed, 40)
    assert changed.to_str() == before and lists(made) == alone(pairs(), learnt, 40)[0]


# ---- stored tokens ----


def test_second_call_reads_the_files(learnt, cache, calls):
    table = pairs()
    first = tokenise(table, learnt, 16)
    assert calls == table.texts
    again = tokenise(table, learnt, 16)
    assert calls == table.texts  # and no more
    assert isinstance(again.flat, np.memmap) and isinstance(again.offsets, np.memmap)
    assert not again.flat.flags.writeable
    assert lists(again) == lists(first) and again.truncated == first.truncated > 0


def test_few_texts_are_not_stored(learnt, cache, monkeypatch):
    monkeypatch.setattr(tokens, "FEW", len(pairs().texts))
    tokenise(pairs(), learnt, 16)
    assert not cache.exists()
    monkeypatch.setattr(tokens, "FEW", len(pairs().texts) - 1)
    tokenise(pairs(), learnt, 16)
    assert len(list(cache.iterdir())) == 1


def test_keys(learnt, cache):
    table = pairs(prompt="q", document_prompt="d")
    other = Tokenizer.from_str(learnt.to_str())
    other.add_special_tokens(["<|new|>"])
    moved = dataclasses.replace(table, starts=np.array([0, 2, len(table.texts)]))
    texts = list(table.texts)
    swapped = dataclasses.replace(table, texts=[texts[1], texts[0], *texts[2:]])
    # The same letters in all, but another border between two texts.
    shifted = [texts[0] + texts[1][0], texts[1][1:], *texts[2:]]
    made = [
        (table, learnt, 16),
        (table, learnt, 17),
        (table, other, 16),
        (moved, learnt, 16),
        (swapped, learnt, 16),
        (dataclasses.replace(table, texts=shifted), learnt, 16),
        (pairs(prompt="Q", document_prompt="d"), learnt, 16),
        (pairs(prompt="q", document_prompt="D"), learnt, 16),
        (pairs(prompt="qd", document_prompt=""), learnt, 16),
        (pairs(prompt="d", document_prompt="d"), learnt, 16),
        (pairs(), learnt, 16),
    ]
    for n, (some, by, length) in enumerate(made, 1):
        assert lists(tokenise(some, by, length)) == alone(some, by, length)[0]
        assert len(list(cache.iterdir())) == n


def test_equal_keys(learnt, cache, calls, tmp_path, monkeypatch):
    table = pairs()
    tokenise(table, learnt, 16)
    calls.clear()
    truncating = Tokenizer.from_str(learnt.to_str())
    truncating.enable_truncation(3)
    truncating.enable_padding()
    writer = TextWriter(tmp_path / "texts.arrow")
    writer.extend(table.texts)
    same = [
        dataclasses.replace(table, name="u", ids=table.ids * 0, texts=writer.close()),
        dataclasses.replace(table, starts=np.array([0, len(table.texts)])),  # no prompts, no roles
    ]
    for other in same:
        tokenise(other, truncating, 16)
    assert not calls


def test_pickled_tokens(learnt, cache):
    made = tokenise(pairs(2000), learnt, 16)
    sent = pickle.dumps(made)
    assert len(sent) < 1000 < made.flat.nbytes
    back = pickle.loads(sent)
    assert isinstance(back.flat, np.memmap) and back.truncated == made.truncated
    assert np.array_equal(back.flat, made.flat) and np.array_equal(back.offsets, made.offsets)
