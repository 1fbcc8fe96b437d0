"""Training is repeatable, any text survives, and every text ends in EOS in every library."""

import json
import os
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mlembed.data import tokenizer
from mlembed.data.tokenizer import EOS, PAD, tokenize

TEXTS = [
    "Wednesday, May 4, 2050",
    "the quick brown fox jumps over the lazy dog; the dog sleeps",
    "2050 թ. մայիսի 4, չորեքշաբթի",
    "বুধবার, ৪ মে, ২০৫০",
    "比利时、哈萨克斯坦或赞比亚",
    "الأربعاء، ٤ مايو ٢٠٥٠",
    "in 1 hour 🙂",
    "đồng Việt Nam",
] * 3
ODD = [
    "",
    " ",
    "\n\r\n\t ",
    "a\u0301 e\u0308",  # decomposed, comes back composed
    "क्षि ஸ்ரீ",  # marks stay with their letters
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "\u0000\u0001\u007f\u0080\uffff\U0010ffff",
    "\u202eright to left\u202c \u2028 \u2029 \u0085",
    "½ Ⅳ ٣ ৪ 𝟘",
    "don't   stop!!! ... \r\n\r\n  end  ",
    "fi ﬁ ſ İ ß",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train(TEXTS, 400)


@pytest.fixture
def plain():
    return tokenizer.train(TEXTS, 400)


def write(directory, files):
    for name, content in files.items():
        content = content.to_str() if isinstance(content, Tokenizer) else json.dumps(content)
        (directory / name).write_text(content)


def ids_of(some, texts, limit=100):
    return [ids.tolist() for ids in tokenize(some, texts, limit)]


# ---- training ----

SCRIPT = """
import sys
from mlembed.data import tokenizer
sys.stdout.write(tokenizer.train({texts!r}, 400).to_str())
"""


LETTERS = np.random.default_rng(0)
WORDS_OF_A_MILLION = {
    "random": "".join(LETTERS.choice(list("abcdefghijklmnopqrstuvwxyz"), 10**6)),
    "one letter": "a" * 10**6,
    "DNA": "".join(LETTERS.choice(list("ACGT"), 10**6)),
    "code": "".join(LETTERS.choice(list("(){};=.,+!"), 10**6)),
    "marks": "a" + "\u0301\u0316" * (5 * 10**5),
    "CJK": "".join(LETTERS.choice([*map(chr, range(0x4E00, 0x4E40))], 3 * 10**5)),
}


@pytest.mark.parametrize("name", WORDS_OF_A_MILLION)
def test_long_word_is_learnt_from_in_bounded_time(name):
    start = time.process_time()
    tokenizer.train([*TEXTS, WORDS_OF_A_MILLION[name]], 320)
    assert time.process_time() - start < 10


def test_white_space_of_millions_of_characters():
    """The regular expressions of the library give up after ten million steps."""
    some = tokenizer.train([" " * 11_000_000 + "x", *TEXTS], 300)
    assert ids_of(some, [" " * 11_000_000 + "x"], 8)[0][-1] == some.token_to_id(EOS)


def test_words_of_ordinary_length_are_learnt_from_whole():
    """Also where a script has no spaces: a text of 1024 characters may be one token."""
    text = "漢字かな交じり文"
    some = tokenizer.train([text * 128] * 2, 300)
    assert max(some.get_vocab(), key=len) == "".join(some.encode(text * 128).tokens[:-1])
    assert text * 129 == some.decode(some.encode(text * 129).ids)


def test_long_text_is_cut_before_it_is_tokenised(plain):
    """The tokens are the same, in time and memory that do not grow with the text."""
    text = "the quick brown fox jumps over the lazy dog " * 7000
    assert len(text) > tokenizer.A_TEXT
    whole = plain.encode(text).ids[:99]
    assert ids_of(plain, ["a", text, "b"])[1] == [*whole, plain.token_to_id(EOS)]
    start = time.process_time()
    ids_of(plain, ["x" * 10**7] * 3)
    assert time.process_time() - start < 5


def test_training_is_repeatable(learnt):
    assert tokenizer.train(iter(TEXTS), 400).to_str() == learnt.to_str()
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(texts=TEXTS)],
        env=os.environ | {"PYTHONHASHSEED": "4242"},
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert out == learnt.to_str()


def test_size(learnt):
    assert 258 < learnt.get_vocab_size() <= 400
    assert tokenizer.train(["ab"], 258).get_vocab_size() == 258
    assert tokenizer.train([], 300).get_vocab_size() == 258  # bytes alone, nothing to merge
    with pytest.raises(ValueError, match="at least 258.*got 257"):
        tokenizer.train(TEXTS, 257)
    assert [learnt.token_to_id(token) for token in (PAD, EOS)] == [0, 1]


# ---- encoding ----


@pytest.mark.parametrize("text", [*TEXTS[:8], *ODD])
def test_any_text_comes_back(learnt, text):
    ids = learnt.encode(text).ids
    assert ids[-1] == learnt.token_to_id(EOS)
    assert learnt.decode(ids) == unicodedata.normalize("NFC", text)


def test_digits_stand_alone():
    learnt = tokenizer.train(["2050 2050 2050 12 12 12 ৪৪ ৪৪ a1a1 a1a1"] * 50, 400)
    for text in ("2050", "12", "20502050", "৪৪৪"):
        assert [learnt.decode([i]) for i in learnt.encode(text).ids[:-1]] == list(text)
    tokens = [learnt.decode([i]) for i in range(2, learnt.get_vocab_size())]
    assert not [t for t in tokens if len(t) > 1 and any(c.isdigit() for c in t)]


@pytest.mark.parametrize("limit", [2, 3, 5, 100])
def test_every_text_ends_in_eos(learnt, plain, limit):
    eos = learnt.token_to_id(EOS)
    texts = ["", "a", *TEXTS]
    for text, ids in zip(texts, tokenize(learnt, texts, limit), strict=True):
        whole = plain.encode(text).ids
        assert ids.dtype == np.int32
        assert ids.tolist() == (whole if len(whole) <= limit else [*whole[: limit - 1], eos])
        assert (ids == eos).sum() == 1


def test_tokenize_in_chunks(learnt, monkeypatch):
    monkeypatch.setattr(tokenizer, "CHUNK", 7)
    texts = [str(i) for i in range(15)]
    ids = tokenize(learnt, texts, 8)
    assert [learnt.decode(row) for row in ids] == texts
    assert tokenize(learnt, [], 8) == []
    with pytest.raises(ValueError, match=r"text 112: expected Unicode, got a lone surrogate in 'a"):
        tokenize(learnt, [*texts[:12], "a\ud83d"], 8, first=100)


# ---- files ----


def test_frequencies_of_a_unigram_tokenizer(learnt):
    """Scores are logarithms; special tokens, whose score is 0, and padding rows are absent."""
    pieces = [("<s>", 0.0), ("a", np.log(0.3)), ("b", np.log(0.1)), ("c", np.log(0.2))]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    expected = np.array([0, 3, 1, 2, 0, 0]) / 6
    np.testing.assert_allclose(tokenizer.frequencies(unigram, 6), expected, rtol=1e-12)
    assert tokenizer.frequencies(learnt, learnt.get_vocab_size()) is None


def test_saved_files(learnt, tmp_path):
    """transformers and `load` give the same ids from the saved files."""
    tokenize(learnt, ["a long text, cut"], 4)
    tokenizer.save(learnt, tmp_path, 16)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), tokenizer.load(tmp_path)
    for text in [*TEXTS[:8], *ODD]:
        assert theirs(text)["input_ids"] == ids_of(learnt, [text], 10_000)[0]
        assert theirs(text, truncation=True)["input_ids"] == ids_of(learnt, [text], 16)[0]
        assert ids_of(again, [text], 32) == ids_of(learnt, [text], 32)
    assert (theirs.pad_token, theirs.eos_token) == (PAD, EOS)
    assert theirs.model_max_length == 16 and theirs.padding_side == "right"
    padded = theirs(["a", TEXTS[1]], padding=True)
    assert padded["input_ids"][0][-1] == 0 and padded["attention_mask"][0][-1] == 0
    assert tokenizer.max_length(tmp_path) == 16 and tokenizer.eos_token(tmp_path) == EOS
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert names == {"eos_token": EOS, "pad_token": PAD}


@pytest.mark.parametrize("nested", [False, True])
def test_load_appends_a_missing_eos(nested, tmp_path):
    """Qwen's files have a byte-level post-processor that adds nothing, and padding left on."""
    stored = json.loads(tokenizer.train(TEXTS, 400).to_str())
    stored["post_processor"] = {"type": "ByteLevel", "use_regex": False}
    stored["post_processor"] |= {"add_prefix_space": False, "trim_offsets": False}
    bare = Tokenizer.from_str(json.dumps(stored))
    bare.enable_padding(length=20)
    eos = {"content": EOS} if nested else EOS
    write(tmp_path, {"tokenizer.json": bare, "tokenizer_config.json": {"eos_token": eos}})
    loaded = tokenizer.load(tmp_path)
    (out := tmp_path / "out").mkdir()
    tokenizer.save(loaded, out, 32)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in ["", *TEXTS]:
        encoding = bare.encode(text)
        want = [*encoding.ids[: sum(encoding.attention_mask)], 1]
        assert ids_of(loaded, [text]) == [want]
        assert theirs(text, truncation=True)["input_ids"] == ids_of(loaded, [text], 32)[0]


def test_eos_is_the_padding_of_checkpoints_without_pad(tmp_path):
    other = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.add_special_tokens(["</s>"])
    tokenizer.save(tokenizer.append_eos(other, "</s>"), tmp_path, 8)
    assert tokenizer.eos_token(tmp_path) == "</s>"
    assert tokenizer.load(tmp_path).encode("a").ids == [0, 1]
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert names["pad_token"] == "</s>"


@pytest.mark.parametrize("named", ["<|im_end|>", None])
def test_token_that_ends_texts_is_eos(plain, named, tmp_path):
    """The template of Qwen3-Embedding ends texts in another token than `eos_token` names."""
    plain.add_special_tokens(["<|im_end|>"])
    write(tmp_path, {"tokenizer.json": plain, "tokenizer_config.json": {"eos_token": named}})
    loaded = tokenizer.load(tmp_path)
    for text in ["", *TEXTS]:
        assert loaded.encode(text).ids == plain.encode(text).ids
    assert tokenizer.special_tokens(loaded)["eos_token"] == EOS


def test_token_before_texts_stays(plain, tmp_path):
    plain.add_special_tokens(["<s>"])
    plain.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.token_to_id("<s>"))]
    )
    write(tmp_path, {"tokenizer.json": plain, "tokenizer_config.json": {"eos_token": EOS}})
    loaded = tokenizer.load(tmp_path)
    for text in ["", *TEXTS]:
        assert loaded.encode(text).ids == [*plain.encode(text).ids, 1]


def test_tokenizer_without_an_end_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="expected a token at the end of texts, got none"):
        tokenizer.save(Tokenizer(models.BPE({"a": 0}, [])), tmp_path, 8)


def test_load_errors(learnt, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json, which does not exist"):
        tokenizer.load(tmp_path)
    bare = json.loads(learnt.to_str()) | {"post_processor": None}
    write(tmp_path, {"tokenizer.json": bare})
    with pytest.raises(ValueError, match="expected a known eos_token, got None"):
        tokenizer.load(tmp_path)
    write(tmp_path, {"tokenizer_config.json": {"eos_token": "</s>"}})
    with pytest.raises(ValueError, match="expected a known eos_token, got '</s>'"):
        tokenizer.load(tmp_path)
    write(tmp_path, {"tokenizer.json": learnt})
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": \n')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json:2: invalid JSON"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer: "):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "sentence", "limit"),
    [(512, None, 512), (1e30, None, None), (None, None, None)]
    + [(512, 256, 256), (64, 256, 64), (1e30, 7, 7)],
)
def test_max_length(model, sentence, limit, tmp_path):
    assert tokenizer.max_length(tmp_path) is None and tokenizer.eos_token(tmp_path) is None
    write(tmp_path, {"tokenizer_config.json": {"model_max_length": model}})
    if sentence:
        write(tmp_path, {"sentence_bert_config.json": {"max_seq_length": sentence}})
    assert tokenizer.max_length(tmp_path) == limit


# ---- tokenizers like BERT's and XLM-R's: a text between two tokens ----

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "##s", "a"]


def bert_like(directory, **config):
    """Write a WordPiece with BERT's template, and return it as loaded."""
    ids = {piece: i for i, piece in enumerate(PIECES)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(PIECES[:5])
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(3)  # BERT's own files have a limit, which must not apply.
    made.enable_padding(length=9)
    write(directory, {"tokenizer.json": made, "tokenizer_config.json": config})
    return tokenizer.load(directory)


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"sep_token": "[SEP]"}, {"eos_token": "a"}]
)
def test_text_between_two_tokens(config, tmp_path):
    loaded = bert_like(tmp_path, **config)
    texts = ["", "a", "one twos a", "one " * 30]
    assert ids_of(loaded, texts) == [[2, 3], [2, 8, 3], [2, 5, 6, 7, 8, 3], [2, *[5] * 30, 3]]
    assert ids_of(loaded, texts, 4) == [[2, 3], [2, 8, 3], [2, 5, 6, 3], [2, 5, 5, 3]]
    assert ids_of(loaded, texts, 2)[3] == [2, 3]


def test_roles_of_special_tokens(tmp_path):
    (out := tmp_path / "out").mkdir()
    tokenizer.save(bert_like(tmp_path), out, 4)
    theirs = AutoTokenizer.from_pretrained(out)
    for role in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(theirs, f"{role}_token") == f"[{role.upper()}]", role
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            assert json.loads((out / name).read_text())[f"{role}_token"] == f"[{role.upper()}]"
    padded = theirs(["", "one one one one"], padding=True, truncation=True)
    assert padded["input_ids"] == [[2, 3, 0, 0], [2, 5, 5, 3]]
    assert ids_of(tokenizer.load(out), ["one two"]) == [[2, 5, 6, 3]]


def test_vocabulary_is_converted(tmp_path):
    """Old BERT directories hold vocab.txt and a config.json with the model's type."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    write(tmp_path, {"config.json": {"model_type": "bert"}})
    assert ids_of(tokenizer.load(tmp_path), ["One twos a"]) == [[2, 5, 6, 7, 8, 3]]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("One twos a")["input_ids"] == [2, 5, 6, 7, 8, 3]
    write(tmp_path, {"config.json": {"model_type": "nobody's"}})
    with pytest.raises(ValueError, match=r"vocab\.txt: could not be converted: "):
        tokenizer.load(tmp_path)
