"""Text to token ids: train a byte-level BPE, or load and save a checkpoint's tokenizer.

Every text ends in EOS, also when it is cut to the maximum length. The post-processor in
`tokenizer.json` appends it, because other libraries ignore `add_eos_token` for byte-level
tokenizers. Tokenizers of BERT and XLM-R put a text between two tokens, [CLS] x [SEP] or <s> x </s>:
these stay, and EOS is the second. A token that ends texts already is EOS, even if `eos_token`
differs, as in the config of Qwen3-Embedding.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from ..runtime.files import field, read_bytes, read_object
from ..runtime.model_files import check_tokenizer
from .formats.readers import Decoder
from .formats.text_reader import windows

PAD, EOS = "<|pad|>", "<|endoftext|>"
# Fallback spellings of special tokens: ours, BERT's, XLM-R's.
SPELLINGS = {
    "pad_token": (PAD, "[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
}
# Files that transformers converts if there is no tokenizer.json.
VOCABULARIES = "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"
# Letters stay with their combining marks (Indic vowels); each digit is a word: numbers compose.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = "sentence_bert_config.json"
LARGEST = 500_000_000  # bytes of a tokenizer.json; the largest that is known has 35 million
# Characters of a word and of a text after which training takes the rest as another one. Its time
# grows with the square of a word's length, and its regular expressions give up on long texts.
LONGEST_WORD, LONGEST_TEXT = 1024, 2**20
# Tokenising stops after this number of characters a token of the maximum length, or a text.
A_TOKEN, A_TEXT = 128, 2**18
# Texts, and characters, tokenised at once; an encoding is many times the size of its ids.
CHUNK, CHARACTERS = 8192, 2**22


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens, deterministically.

    Words of more than LONGEST_WORD characters (base64, DNA, minified code) and texts of more than
    LONGEST_TEXT are learnt from in pieces.

    Raises:
        ValueError: fewer tokens than the 256 bytes and two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(
            f"model.vocab_size: expected at least 258 (bytes, PAD, EOS), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    pieces = pre_tokenizers.Split(Regex(rf"(?m).{{1,{LONGEST_WORD}}}"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (
        text[begin : begin + LONGEST_TEXT]
        for text in texts
        for begin in range(0, len(text), LONGEST_TEXT)
    )
    tokenizer.train_from_iterator(parts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    return append_eos(tokenizer, EOS)


def append_eos(tokenizer: Tokenizer, eos: str) -> Tokenizer:
    """Set the post-processor to end every text in `eos`, after the tokens it already puts first."""
    first = tokenizer.encode("").tokens
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*first, eos])]
    tokenizer.post_processor = TemplateProcessing(
        single=[*first, "$A", eos], special_tokens=special
    )
    return tokenizer


def load(directory: Path) -> Tokenizer:
    """Load a checkpoint's `tokenizer.json`, and make it append its EOS if nothing ends texts.

    If there is only a vocabulary (vocab.txt, a sentencepiece model), transformers converts it.

    Raises:
        ValueError: the tokenizer is missing or invalid, or needs an EOS that tokenizer_config.json
            does not name.
    """
    tokenizer = _read(directory)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if field(directory / SENTENCES, settings(directory, SENTENCES), "do_lower_case", bool, False):
        # As sentence-transformers does, for a vocabulary with capitals as well.
        others = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
    with _problems(directory / "tokenizer.json", "cannot encode a text"):
        empty, letter = tokenizer.encode("").ids, tokenizer.encode("a").ids
    eos = eos_token(directory)
    if empty and letter and letter[-1] == empty[-1]:
        return tokenizer
    if eos is None or tokenizer.token_to_id(eos) is None:
        raise ValueError(
            f"{directory}/tokenizer_config.json: expected a known eos_token, got {eos!r}"
        )
    return append_eos(tokenizer, eos)


def _read(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if path.exists():
        data = read_bytes(path, LARGEST)
        with _problems(path, "not a tokenizer"):
            return Tokenizer.from_buffer(data)
    vocabulary = next((name for name in VOCABULARIES if (directory / name).exists()), None)
    if vocabulary is None:
        raise ValueError(f"tokenizer: expected {path}, which does not exist")
    check_tokenizer(directory)
    from transformers import AutoTokenizer  # The import takes seconds.

    with _problems(directory / vocabulary, "could not be converted"):
        converted = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"{directory / vocabulary}: could not be converted: got {converted}")
    return Tokenizer.from_str(backend.to_str())


@contextmanager
def _problems(path: Path, what: str) -> Iterator[None]:
    """Turn every error of a library that reads `path` into a ValueError with its first 300 letters.

    A panic of the tokenizers library is a BaseException, and not an Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {what}: {reason:.300}") from None


def eos_token(directory: Path) -> str | None:
    """Return the EOS that a directory's tokenizer_config.json names.

    Raises:
        ValueError: the file cannot be read, or names a value that is not text.
    """
    path = directory / "tokenizer_config.json"
    values = settings(directory)
    token = values.get("eos_token")
    if isinstance(token, dict):
        return field(path, token, "content", str, None)
    return field(path, values, "eos_token", str, None)


def max_length(directory: Path) -> int | None:
    """Return the tokens a text that a directory's files allow, None without a limit.

    The limit is the smaller of tokenizer_config.json's `model_max_length` (transformers writes 1e30
    for none) and sentence_bert_config.json's `max_seq_length`.

    Raises:
        ValueError: a file that cannot be read, a limit that is not a number from 1 on.
    """
    limits = []
    for name, key in (("tokenizer_config.json", "model_max_length"), (SENTENCES, "max_seq_length")):
        path = directory / name
        limit = field(path, settings(directory, name), key, float, None)
        if limit is not None and limit < 1:
            raise ValueError(f"{path}: {key}: expected 1 or more, got {limit:g}")
        limits += [int(limit)] if limit is not None and limit < 1e9 else []
    return min(limits, default=None)


def settings(directory: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """Return the object of a JSON file of a directory, {} without the file.

    Raises:
        ValueError: the file cannot be read, or holds another value.
    """
    path = directory / name
    return read_object(path) if path.exists() else {}


def frequencies(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """Return how often tokens occur in the text a Unigram tokenizer was trained on.

    Its scores are the logarithms (Kudo, arXiv 1804.10959); special tokens have 0 and count as
    absent.

    Returns:
        float64 [vocab_size] of sum 1, or None for another kind of tokenizer.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "Unigram":
        return None
    scores = np.array([score for _, score in model["vocab"][:vocab_size]])
    each = np.where(scores < 0, np.exp(np.minimum(scores, 0)), 0)
    return np.pad(each / each.sum(), (0, vocab_size - len(each)))


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return transformers' names for the special tokens of a tokenizer that ends texts in EOS.

    The last token of an empty text is EOS. If another token comes first, that is "cls" and BOS, and
    EOS is "sep" too. EOS is also the padding if the vocabulary has no token for it.

    Raises:
        ValueError: the tokenizer ends texts in no token.
    """
    ids = tokenizer.encode("").ids
    if not ids:
        raise ValueError("tokenizer: expected a token at the end of texts, got none")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    first, eos = (str(tokenizer.id_to_token(i)) for i in (ids[0], ids[-1]))
    names = {"eos_token": eos, "pad_token": eos}
    if len(ids) > 1:
        names |= {"bos_token": first, "cls_token": first, "sep_token": eos}
    for role, spellings in SPELLINGS.items():
        if known := [name for name in spellings if name in added]:
            names[role] = known[0]
    return names


def save(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write the three files from which transformers 4 and 5 make a PreTrainedTokenizerFast."""
    portable = Tokenizer.from_str(tokenizer.to_str())
    portable.no_truncation()
    # Unlike `Tokenizer.save`, this raises OSError on a full disk.
    (directory / "tokenizer.json").write_text(portable.to_str(pretty=True), encoding="utf-8")
    names = special_tokens(tokenizer)
    config = {
        # transformers 4 does not know the newest name, `TokenizersBackend`.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def shortened(ids: np.ndarray, most: int) -> np.ndarray:
    """Return a text's tokens as `tokenize` cuts them to `most`, which keeps the last one, EOS."""
    return ids if len(ids) <= most else np.append(ids[: most - 1], ids[-1:])


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, first: int = 0
) -> list[np.ndarray]:
    """Return one int32 array a text, at most `max_length` tokens, the last of them EOS.

    A text is first cut to A_TOKEN characters for each of `max_length` tokens, and to no fewer than
    A_TEXT, so that time and memory do not grow with a text of which nearly all is cut anyway. The
    tokens are the same, unless a tokenizer drops most of these characters, as BERT's drops spaces.

    Args:
        first: number of the first text, for errors.

    Raises:
        ValueError: a text holds a lone surrogate, which no encoding can represent.
    """
    tokenizer.enable_truncation(max_length)
    longest = max(A_TEXT, A_TOKEN * max_length)
    ids: list[np.ndarray] = []
    for chunk in windows((text[:longest] for text in texts), CHUNK, CHARACTERS):
        try:
            encodings = tokenizer.encode_batch_fast(chunk)
        except TypeError:
            for number, text in enumerate(chunk, first + len(ids)):
                Decoder().check(text, f"text {number}")
            raise
        ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    return ids
