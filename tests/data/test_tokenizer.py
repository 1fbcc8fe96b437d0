"""Training is repeatable, any text survives, and every text ends in EOS wherever it is read."""

import hashlib
import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mlembed.data import tokenizer

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
    "a\u0301 e\u0308",  # decomposed: comes back composed
    "क्षि ஸ்ரீ",  # marks stay with their letters
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "\u0000\u0001\u007f\u0080\uffff\U0010ffff",
    "\u202eright to left\u202c \u2028 \u2029 \u0085",
    "½ Ⅳ ٣ ৪ 𝟘",
    "don't   stop!!! ... \r\n\r\n  end  ",
    "fi ﬁ ſ İ ß",
    "".join(map(chr, range(0x20, 0x250))),
]
SCRIPT = """
import sys
from mlembed.data import tokenizer
sys.stdout.write(tokenizer.train({texts!r}, 400).to_str())
"""


@pytest.fixture(scope="module")
def learnt():
    return tokenizer.train(TEXTS, 400)


@pytest.fixture
def saved(learnt, tmp_path):
    tokenizer.save(learnt, tmp_path, 16)
    return tmp_path


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- training ----


def test_training_twice_gives_the_same_file(learnt, tmp_path):
    tokenizer.train(iter(TEXTS), 400).save(str(tmp_path / "a.json"))
    tokenizer.train(list(TEXTS), 400).save(str(tmp_path / "b.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("seed", ["1", "4242"])
def test_training_in_another_process_gives_the_same_tokenizer(learnt, seed):
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(texts=TEXTS)],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert digest(out) == digest(learnt.to_str())


def test_size(learnt):
    assert 258 < learnt.get_vocab_size() <= 400
    assert tokenizer.train(["ab"], 258).get_vocab_size() == 258
    assert tokenizer.train([], 300).get_vocab_size() == 258  # bytes alone; nothing to merge
    with pytest.raises(ValueError, match="at least 258.*got 257"):
        tokenizer.train(TEXTS, 257)


def test_special_tokens_come_first(learnt):
    assert learnt.token_to_id(tokenizer.PAD) == 0
    assert learnt.token_to_id(tokenizer.EOS) == 1


# ---- encoding ----


@pytest.mark.parametrize("text", [*TEXTS[:8], *ODD])
def test_any_text_comes_back(learnt, text):
    ids = learnt.encode(text).ids
    assert ids[-1] == learnt.token_to_id(tokenizer.EOS)
    assert learnt.decode(ids) == unicodedata.normalize("NFC", text)


def test_random_unicode_comes_back(learnt):
    rng = np.random.default_rng(0)
    codes = np.concatenate([np.arange(1, 0xD800), np.arange(0xE000, 0x30000)])
    for _ in range(200):
        text = "".join(map(chr, rng.choice(codes, rng.integers(1, 30))))
        assert learnt.decode(learnt.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_composed_and_decomposed_are_one(learnt):
    assert learnt.encode("e\u0301").ids == learnt.encode("\u00e9").ids


def test_digits_stand_alone():
    learnt = tokenizer.train(["2050 2050 2050 12 12 12 ৪৪ ৪৪ a1a1 a1a1"] * 50, 400)
    for text in ("2050", "12", "20502050", "৪৪৪"):
        assert [learnt.decode([i]) for i in learnt.encode(text).ids[:-1]] == list(text)
    learned = [learnt.decode([i]) for i in range(2, learnt.get_vocab_size())]
    assert not [t for t in learned if len(t) > 1 and any(c.isdigit() for c in t)]


def test_words_become_tokens(learnt):
    assert len(learnt.encode("the dog").ids) < len("the dog")


@pytest.mark.parametrize("limit", [2, 3, 5, 100])
def test_every_text_ends_in_eos_also_when_cut(learnt, limit):
    eos = learnt.token_to_id(tokenizer.EOS)
    texts = ["", "a", *TEXTS]
    for text, ids in zip(texts, tokenizer.tokenize(learnt, texts, limit), strict=True):
        whole = Tokenizer.from_str(tokenizer.train(TEXTS, 400).to_str()).encode(text).ids
        assert ids.dtype == np.int32
        assert ids.tolist() == (whole if len(whole) <= limit else [*whole[: limit - 1], eos])
        assert (ids == eos).sum() == 1


def test_tokenize_more_texts_than_a_slice(learnt):
    texts = [str(i) for i in range(8200)]
    ids = tokenizer.tokenize(learnt, texts, 8)
    assert [learnt.decode(row) for row in (ids[0], ids[8191], ids[8192], ids[-1])] == [
        "0",
        "8191",
        "8192",
        "8199",
    ]
    assert len(ids) == len(texts)
    assert tokenizer.tokenize(learnt, [], 8) == []


# ---- files ----


def test_saved_files_open_in_transformers_with_the_same_ids(learnt, saved):
    theirs = AutoTokenizer.from_pretrained(saved)
    for text in [*TEXTS[:8], *ODD]:
        plain = Tokenizer.from_str(learnt.to_str())
        plain.no_truncation()
        assert theirs(text)["input_ids"] == plain.encode(text).ids
        (cut,) = tokenizer.tokenize(learnt, [text], 16)
        assert theirs(text, truncation=True)["input_ids"] == cut.tolist()
    assert (theirs.pad_token, theirs.eos_token) == (tokenizer.PAD, tokenizer.EOS)
    assert theirs.model_max_length == 16 and theirs.padding_side == "right"
    padded = theirs(["a", TEXTS[1]], padding=True)
    assert padded["input_ids"][0][-1] == 0 and padded["attention_mask"][0][-1] == 0


def test_saved_files_open_here(learnt, saved):
    again = tokenizer.load(saved)
    for text in [*TEXTS, *ODD]:
        (ours,), (theirs,) = (tokenizer.tokenize(t, [text], 32) for t in (learnt, again))
        assert ours.tolist() == theirs.tolist()
    assert tokenizer.max_length(saved) == 16
    assert tokenizer.eos_token(saved) == tokenizer.EOS


def test_settings_that_are_not_json(learnt, tmp_path):
    tokenizer.save(learnt, tmp_path, 16)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": \n')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json:2: invalid JSON"):
        tokenizer.load(tmp_path)


def test_saving_after_truncation_stores_no_truncation(learnt, tmp_path):
    tokenizer.tokenize(learnt, ["a long text, cut"], 4)
    tokenizer.save(learnt, tmp_path, 16)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None


@pytest.mark.parametrize("nested", [False, True])
def test_a_tokenizer_without_eos_learns_to_append_it(nested, tmp_path):
    """As Qwen's own files: a byte-level post-processor that adds nothing, padding left on."""
    plain = tokenizer.train(TEXTS, 400)
    stored = json.loads(plain.to_str())
    stored["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    bare = Tokenizer.from_str(json.dumps(stored))
    bare.enable_padding(length=20)
    bare.save(str(tmp_path / "tokenizer.json"))
    eos = {"content": tokenizer.EOS} if nested else tokenizer.EOS
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    loaded = tokenizer.load(tmp_path)
    for text in ["", *TEXTS]:
        want = [*bare.encode(text).ids[: sum(bare.encode(text).attention_mask)], 1]
        assert tokenizer.tokenize(loaded, [text], 100)[0].tolist() == want
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.save(loaded, out, 32)
    for text in ["", *TEXTS]:
        (ours,) = tokenizer.tokenize(loaded, [text], 32)
        theirs = AutoTokenizer.from_pretrained(out)(text, truncation=True)["input_ids"]
        assert theirs == ours.tolist()


def test_pad_falls_back_to_eos(tmp_path):
    """Checkpoints need not have our PAD."""
    other = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.add_special_tokens(["</s>"])
    tokenizer.save(tokenizer.append_eos(other, "</s>"), tmp_path, 8)
    assert tokenizer.eos_token(tmp_path) == "</s>"
    assert tokenizer.load(tmp_path).encode("a").ids == [0, 1]


@pytest.mark.parametrize("named", ["<|im_end|>", None])
def test_what_ends_texts_already_is_eos(named, tmp_path):
    """As Qwen3-Embedding's: its template ends texts in another token than `eos_token` names."""
    plain = tokenizer.train(TEXTS, 400)
    plain.add_special_tokens(["<|im_end|>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    loaded = tokenizer.load(tmp_path)
    for text in ["", *TEXTS]:
        assert loaded.encode(text).ids == plain.encode(text).ids
    assert tokenizer.special_tokens(loaded)["eos_token"] == tokenizer.EOS


def test_what_stands_before_texts_stays(tmp_path):
    plain = tokenizer.train(TEXTS, 400)
    plain.add_special_tokens(["<s>"])
    plain.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.token_to_id("<s>"))]
    )
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.EOS}))
    loaded = tokenizer.load(tmp_path)
    for text in ["", *TEXTS]:
        assert loaded.encode(text).ids == [*plain.encode(text).ids, 1]


def test_a_tokenizer_that_ends_texts_in_nothing_is_not_saved(tmp_path):
    other = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(ValueError, match="expected one that ends texts in a token"):
        tokenizer.save(other, tmp_path, 8)


def test_load_errors(learnt, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json, which does not exist"):
        tokenizer.load(tmp_path)
    bare = json.loads(learnt.to_str()) | {"post_processor": None}
    Tokenizer.from_str(json.dumps(bare)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="expected a known eos_token, got None"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="expected a known eos_token, got '</s>'"):
        tokenizer.load(tmp_path)


def test_a_broken_tokenizer_file_is_the_users_error(saved):
    (saved / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        tokenizer.load(saved)


@pytest.mark.parametrize("limit, read", [(512, 512), (1e30, None), (None, None)])
def test_max_length(limit, read, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert tokenizer.max_length(tmp_path) == read


def test_max_length_without_a_file(tmp_path):
    assert tokenizer.max_length(tmp_path) is None
    assert tokenizer.eos_token(tmp_path) is None


# ---- of BERT's and XLM-R's kind: a text between two tokens ----

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "##s", "a"]


def between(path, names=None, eos=None):
    """tokenizer.json of a WordPiece with BERT's template, and what its config says."""
    ids = {piece: i for i, piece in enumerate(PIECES)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(PIECES[:5])
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(3)  # as BERT's own files have it, which is not what we are asked for
    made.enable_padding(length=9)
    made.save(str(path / "tokenizer.json"))
    written = {**(names or {}), **({"eos_token": eos} if eos else {})}
    (path / "tokenizer_config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("names", [{}, {"do_lower_case": False}, {"sep_token": "[SEP]"}])
def test_a_text_between_two_tokens_stays_there_also_when_cut(names, tmp_path):
    between(tmp_path, names)
    loaded = tokenizer.load(tmp_path)
    texts = ["", "a", "one twos a", "one " * 30]
    whole = [[2, 3], [2, 8, 3], [2, 5, 6, 7, 8, 3], [2, *[5] * 30, 3]]
    assert [ids.tolist() for ids in tokenizer.tokenize(loaded, texts, 100)] == whole
    cut = [[2, 3], [2, 8, 3], [2, 5, 6, 3], [2, 5, 5, 3]]
    assert [ids.tolist() for ids in tokenizer.tokenize(loaded, texts, 4)] == cut
    assert tokenizer.tokenize(loaded, texts, 2)[3].tolist() == [2, 3]


@pytest.mark.parametrize("eos", ["[SEP]", "a"])
def test_a_named_eos_changes_no_template(eos, tmp_path):
    between(tmp_path, eos=eos)
    assert tokenizer.tokenize(tokenizer.load(tmp_path), ["one"], 9)[0].tolist() == [2, 5, 3]


def test_special_tokens_are_saved_by_their_roles(tmp_path):
    between(tmp_path)
    (out := tmp_path / "out").mkdir()
    tokenizer.save(tokenizer.load(tmp_path), out, 4)
    reader = AutoTokenizer.from_pretrained(out)
    for role in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(reader, f"{role}_token") == f"[{role.upper()}]", role
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            assert json.loads((out / name).read_text())[f"{role}_token"] == f"[{role.upper()}]"
    padded = reader(["", "one one one one"], padding=True, truncation=True)
    assert padded["input_ids"] == [[2, 3, 0, 0], [2, 5, 5, 3]]
    again = tokenizer.load(out)
    assert tokenizer.tokenize(again, ["one two"], 9)[0].tolist() == [2, 5, 6, 3]
    # Ours has one special token at a text's end, and says nothing of the others.
    tokenizer.save(tokenizer.train(["a b"] * 5, 260), out, 4)
    stored = json.loads((out / "special_tokens_map.json").read_text())
    assert stored == {"eos_token": tokenizer.EOS, "pad_token": tokenizer.PAD}


def test_a_vocabulary_alone_is_converted(tmp_path):
    """As old BERT directories are: vocab.txt, and a config.json that says whose it is."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    loaded = tokenizer.load(tmp_path)
    assert tokenizer.tokenize(loaded, ["One twos a"], 9)[0].tolist() == [2, 5, 6, 7, 8, 3]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("One twos a")["input_ids"] == [2, 5, 6, 7, 8, 3]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody's"}))
    with pytest.raises(ValueError, match=r"no tokenizer made from vocab\.txt"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "sentence", "read"), [(512, 256, 256), (64, 256, 64), (1e30, 7, 7)]
)
def test_max_length_is_the_least_that_is_said(model, sentence, read, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": model}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": sentence}))
    assert tokenizer.max_length(tmp_path) == read
