"""Tokens against each text encoded alone, and files that are found again, damaged, raced for."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from mlembed import config
from mlembed.data import tokenizer, tokens
from mlembed.data.tables import Table
from mlembed.data.tokens import tokenised
from mlembed.runtime import cache as stored

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
WORDS += ["Straße", "мир", "海", "ملح"]


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train([f"{a} {b}" for a in WORDS for b in WORDS], 300)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, used for tables of any size."""
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "FEW", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def calls(monkeypatch):
    """Texts that were tokenised."""
    seen = []

    def counted(own, texts, max_length):
        seen.extend(texts)
        return tokenizer.tokenize(own, texts, max_length)

    monkeypatch.setattr(tokens, "tokenize", counted)
    return seen


def pairs(n=23, prompt="", document_prompt="", nway=False, seed=0):
    """Items of two to four texts of one to nine words."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, size=n)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 10))) for _ in range(sizes.sum())]
    source = config.Source(path="t", prompt=prompt, document_prompt=document_prompt)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Table("t", nway, texts, np.arange(len(texts)), starts, source)


def alone(table, own, max_length):
    """Each text by the library's own truncation, item by item, and how many it cuts."""
    one = Tokenizer.from_str(own.to_str())
    one.no_truncation()
    whole = Tokenizer.from_str(one.to_str())
    one.enable_truncation(max_length)
    ids, cut = [], 0
    for begin, end in zip(table.starts[:-1], table.starts[1:], strict=True):
        for place, text in enumerate(table.texts[begin:end]):
            text = (table.source.document_prompt if place else table.source.prompt) + text
            ids.append(one.encode(text).ids)
            cut += len(whole.encode(text).ids) > max_length
    return ids, cut


def lists(found):
    bounds = zip(found.offsets[:-1], found.offsets[1:], strict=True)
    return [found.flat[begin:end].tolist() for begin, end in bounds]


# ---- what is computed ----


@pytest.mark.parametrize("chunk", [1, 7, 8192])
@pytest.mark.parametrize("stored_on_disk", [False, True])
def test_tokens_are_those_of_each_text_alone(learnt, chunk, stored_on_disk, monkeypatch, tmp_path):
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path))
    monkeypatch.setattr(stored, "CHUNK", chunk)
    monkeypatch.setattr(tokens, "FEW", 0 if stored_on_disk else 10_000)
    table = pairs(prompt="Instruct: find\nQuery: ", document_prompt="passage: ")
    found = tokenised(table, learnt, 24)
    want, cut = alone(table, learnt, 24)
    assert lists(found) == want and found.truncated == cut
    assert 0 < cut < len(want)
    assert (found.flat.dtype, found.offsets.dtype) == (np.int32, np.int64)
    assert isinstance(found.flat, np.memmap) == stored_on_disk


def test_a_text_that_just_fits_is_not_truncated(learnt):
    ids = tokenizer.tokenize(learnt, ["sea land river stone"], 1000)[0]
    n, eos = len(ids), ids[-1]
    table = Table("t", False, ["sea land river stone", "x"], np.arange(2), np.array([0, 2]))
    for length, cut in ((n - 2, 1), (n - 1, 1), (n, 0), (n + 1, 0)):
        found = tokenised(table, learnt, length)
        assert found.truncated == cut
        first = lists(found)[0]
        assert len(first) == min(n, length) and first[-1] == eos
        assert first[:-1] == ids[: len(first) - 1].tolist()


@pytest.mark.parametrize("template", ["$A <|pad|>", "<|pad|> $A <|endoftext|>", "$A", "<|pad|> $A"])
@pytest.mark.parametrize("twice", [False, True])
def test_special_tokens_stay_where_they_are(learnt, template, twice):
    """As BERT's, with two at the end, with none there."""
    own = Tokenizer.from_str(learnt.to_str())
    template += " <|endoftext|>" if twice else ""
    ids = [(name, own.token_to_id(name)) for name in (tokenizer.PAD, tokenizer.EOS)]
    own.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    table = pairs()
    found = tokenised(table, own, 11)
    want, cut = alone(table, own, 11)
    assert lists(found) == want and found.truncated == cut > 0


def test_only_the_first_text_of_an_item_has_the_query_prompt(learnt):
    table = pairs(prompt="Q:")
    decoded = [learnt.decode(ids) for ids in lists(tokenised(table, learnt, 1000))]
    first = set(table.starts[:-1].tolist())
    want = [("Q:" if i in first else "") + text for i, text in enumerate(table.texts)]
    assert decoded == want


def test_texts_of_nway_tables_have_one_prompt(learnt):
    table = pairs(prompt="a: ", document_prompt="b: ", nway=True)
    with pytest.raises(ValueError, match="source t: prompt: expected that of documents, 'b: '"):
        tokenised(table, learnt, 16)
    table = pairs(prompt="a: ", document_prompt="a: ", nway=True)
    assert lists(tokenised(table, learnt, 64)) == alone(table, learnt, 64)[0]


def test_the_callers_tokenizer_stays_as_it_is(learnt, cache):
    own = Tokenizer.from_str(learnt.to_str())
    own.enable_truncation(5)
    own.enable_padding()
    before = own.to_str()
    found = tokenised(pairs(), own, 40)
    assert own.to_str() == before and lists(found) == alone(pairs(), learnt, 40)[0]


# ---- what is kept ----


def test_a_second_call_reads(learnt, cache, calls):
    table = pairs()
    first = tokenised(table, learnt, 16)
    assert calls == table.texts
    again = tokenised(table, learnt, 16)
    assert calls == table.texts  # and no more
    assert isinstance(again.flat, np.memmap) and isinstance(again.offsets, np.memmap)
    assert not again.flat.flags.writeable
    assert lists(again) == lists(first) and again.truncated == first.truncated > 0


def test_few_texts_are_not_kept(learnt, cache, monkeypatch):
    monkeypatch.setattr(tokens, "FEW", len(pairs().texts))
    tokenised(pairs(), learnt, 16)
    assert not cache.exists()
    monkeypatch.setattr(tokens, "FEW", len(pairs().texts) - 1)
    tokenised(pairs(), learnt, 16)
    assert len(list(cache.iterdir())) == 1


def test_what_changes_tokens_changes_the_key(learnt, cache):
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
    for n, (some, own, length) in enumerate(made, 1):
        assert lists(tokenised(some, own, length)) == alone(some, own, length)[0]
        assert len(list(cache.iterdir())) == n


def test_what_changes_no_token_changes_no_key(learnt, cache, calls, tmp_path, monkeypatch):
    table = pairs()
    tokenised(table, learnt, 16)
    calls.clear()
    truncating = Tokenizer.from_str(learnt.to_str())
    truncating.enable_truncation(3)
    truncating.enable_padding()
    writer = stored.Writer(tmp_path / "texts.arrow")
    writer.extend(table.texts)
    same = [
        dataclasses.replace(table, name="u", ids=table.ids * 0, texts=writer.close()),
        dataclasses.replace(table, starts=np.array([0, len(table.texts)])),  # no prompts, no roles
    ]
    for other in same:
        tokenised(other, truncating, 16)
    assert not calls


@pytest.mark.parametrize("size", ["cut", "gone", "longer", "manifest", "no manifest", "empty"])
def test_damaged_files_are_replaced(size, learnt, cache, calls):
    table = pairs()
    want = lists(tokenised(table, learnt, 16))
    (entry,) = cache.iterdir()
    flat, whole = entry / "flat.bin", entry / stored.WHOLE
    content = flat.read_bytes()
    match size:
        case "cut":
            flat.write_bytes(content[: len(content) // 2])
        case "gone":
            (entry / "offsets.npy").unlink()
        case "longer":
            flat.write_bytes(content + b"\0" * 4)
        case "manifest":
            whole.write_text("{")
        case "no manifest":
            whole.unlink()
        case "empty":
            flat.write_bytes(b"")
    calls.clear()
    assert lists(tokenised(table, learnt, 16)) == want and calls == table.texts
    calls.clear()
    assert lists(tokenised(table, learnt, 16)) == want and not calls
    assert [p.name for p in cache.iterdir()] == [entry.name]  # nothing half done is left


def test_a_cache_that_cannot_be_written(learnt, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tokens, "FEW", 0)
    with pytest.warns(UserWarning, match="tokens could not be stored"):
        found = tokenised(pairs(), learnt, 16)
    assert lists(found) == alone(pairs(), learnt, 16)[0]
    assert (tmp_path / "file").read_text() == "no directory"


def test_an_interrupted_write_leaves_nothing(learnt, cache, monkeypatch):
    def stop(own, texts, max_length):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "tokenize", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenised(pairs(), learnt, 16)
    assert not list(cache.iterdir())
    assert lists(tokenised(pairs(), learnt, 16)) == alone(pairs(), learnt, 16)[0]


def test_other_processes_map_the_files(learnt, cache):
    found = tokenised(pairs(2000), learnt, 16)
    sent = pickle.dumps(found)
    assert len(sent) < 1000 < found.flat.nbytes
    back = pickle.loads(sent)
    assert isinstance(back.flat, np.memmap) and back.truncated == found.truncated
    assert np.array_equal(back.flat, found.flat) and np.array_equal(back.offsets, found.offsets)


def test_tokens_in_memory_pickle(learnt):
    found = tokenised(pairs(), learnt, 16)
    back = pickle.loads(pickle.dumps(found))
    assert lists(back) == lists(found) and back.truncated == found.truncated


WRITER = """
import hashlib, json, sys, time
from pathlib import Path
import numpy as np
from tokenizers import Tokenizer
from mlembed.data import tokens
from mlembed.data.tables import Table
tokens.FEW = 0
texts = json.loads(Path(sys.argv[1]).read_text())
own = Tokenizer.from_file(sys.argv[2])
table = Table("t", False, texts, np.arange(len(texts)), np.arange(0, len(texts) + 1, 2))
print("ready", flush=True)
sys.stdin.readline()
for length in range(8, 16):
    found = tokens.tokenised(table, own, length)
    parts = found.flat.tobytes() + found.offsets.tobytes()
    print(hashlib.sha256(parts).hexdigest(), flush=True)
"""


def test_processes_that_write_at_the_same_time(learnt, cache, tmp_path):
    """Both have the right tokens, and one entry a length is left."""
    texts = pairs(300).texts
    texts = texts[: len(texts) // 2 * 2]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    learnt.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-c", WRITER, tmp_path / "texts.json", tmp_path / "tokenizer.json"]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [one.stdout.readline() for one in both] == ["ready\n"] * 2
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate()[0].split() for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert said[0] == said[1] and len(set(said[0])) == 8
    assert len(list(cache.iterdir())) == 8
    starts = np.arange(0, len(texts) + 1, 2)
    table = Table("t", False, texts, np.arange(len(texts)), starts)
    assert lists(tokenised(table, learnt, 9)) == alone(table, learnt, 9)[0]
