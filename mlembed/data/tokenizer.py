"""Text to token ids: a byte-level BPE trained on the training text, or a checkpoint's own.

Every text ends in EOS, appended by the post-processor in `tokenizer.json` itself (other libraries
ignore `add_eos_token` for such tokenizers), also when it is cut to the maximum length. Tokenizers
of BERT and XLM-R put a text between two tokens, [CLS] x [SEP] or <s> x </s>: these stay, and EOS is
the second. What ends texts already is EOS whatever `eos_token` says: Qwen3-Embedding's is another.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from ..runtime.files import read_json

PAD, EOS = "<|pad|>", "<|endoftext|>"
# By which names tokenizers go that say nothing of them: ours, BERT's, XLM-R's.
CALLED = {
    "pad_token": (PAD, "[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
}
# What a tokenizer is made from where there is no tokenizer.json.
VOCABULARIES = "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"
# Letters stay with their combining marks (Indic vowels), each digit stands alone: numbers compose.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens: deterministic, any text representable.

    Raises:
        ValueError: fewer tokens than the 256 bytes and two special ones.
    """
    if vocab_size < 258:
        raise ValueError(
            f"model.vocab_size: expected at least 258 (bytes, PAD, EOS), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return append_eos(tokenizer, EOS)


def append_eos(tokenizer: Tokenizer, eos: str) -> Tokenizer:
    """Set the post-processor that ends every text in `eos`; what stands before texts stays."""
    before = tokenizer.encode("").tokens
    tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", eos],
        special_tokens=[
            (token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, eos])
        ],
    )
    return tokenizer


def load(directory: Path) -> Tokenizer:
    """A checkpoint's `tokenizer.json`, made to append its own EOS where it does not. One that ends
    texts in some token, or puts them between two, as BERT's and XLM-R's do, is left as it is.

    Where there is only a vocabulary (vocab.txt, a sentencepiece model), transformers converts it.

    Raises:
        ValueError: no tokenizer there, or one that needs an EOS of which tokenizer_config.json
            says nothing.
    """
    tokenizer = _read(directory)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    empty, one = tokenizer.encode("").ids, tokenizer.encode("a").ids
    eos = eos_token(directory)
    if empty and one[-1] == empty[-1]:
        return tokenizer
    if eos is None or tokenizer.token_to_id(eos) is None:
        raise ValueError(
            f"{directory}/tokenizer_config.json: expected a known eos_token, got {eos!r}"
        )
    return append_eos(tokenizer, eos)


def _read(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
    found = [name for name in VOCABULARIES if (directory / name).is_file()]
    if not found:
        raise ValueError(f"tokenizer: expected {path}, which does not exist")
    from transformers import AutoTokenizer  # here, as all else is done without it

    try:
        made = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, as the kinds of tokenizers are many
        raise ValueError(f"{directory}: no tokenizer made from {found[0]}: {error}") from None
    backend = getattr(made, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"{directory}: expected a tokenizer that can be converted, got {made}")
    return Tokenizer.from_str(backend.to_str())


def eos_token(directory: Path) -> str | None:
    """The EOS that a directory's tokenizer_config.json names."""
    token = settings(directory).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def max_length(directory: Path) -> int | None:
    """Tokens a text that a directory's files allow, the least of them: tokenizer_config.json's
    `model_max_length`, where it is a real number, and sentence_bert_config.json's `max_seq_length`.
    """
    limits = (
        settings(directory).get("model_max_length"),
        settings(directory, "sentence_bert_config.json").get("max_seq_length"),
    )
    real = [int(limit) for limit in limits if limit and limit < 1e9]
    return min(real, default=None)  # transformers writes 1e30 for "none"


def settings(directory: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """Return a JSON file of a directory, {} if it has none. ValueError if it is invalid."""
    path = directory / name
    return read_json(path) if path.is_file() else {}


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """What transformers calls the special tokens of a tokenizer that ends texts in EOS.

    The last token of an empty text is EOS, and "sep" where another comes first, which is "cls" (and
    BOS). Padding is done with EOS where the vocabulary has no token for it.

    Raises:
        ValueError: it ends texts in nothing.
    """
    ids = tokenizer.encode("").ids
    if not ids:
        raise ValueError("tokenizer: expected one that ends texts in a token, got none at the end")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    first, eos = (str(tokenizer.id_to_token(i)) for i in (ids[0], ids[-1]))
    names = {"eos_token": eos, "pad_token": eos}
    if len(ids) > 1:
        names |= {"bos_token": first, "cls_token": first, "sep_token": eos}
    for role, spellings in CALLED.items():
        if known := [name for name in spellings if name in added]:
            names[role] = known[0]
    return names


def save(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write the three files from which transformers 4 and 5 make a PreTrainedTokenizerFast."""
    portable = Tokenizer.from_str(tokenizer.to_str())
    portable.no_truncation()
    portable.save(str(directory / "tokenizer.json"))
    names = special_tokens(tokenizer)
    written = {
        # Not the newest name: transformers 4 does not know `TokenizersBackend`.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, content in (("tokenizer_config.json", written), ("special_tokens_map.json", names)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
    """-> one int32 array a text, at most `max_length` tokens, the last of them EOS."""
    tokenizer.enable_truncation(max_length)
    ids = []
    for begin in range(0, len(texts), 8192):
        # Encodings are many times the size of their ids; a slice at a time bounds them.
        some = list(texts[begin : begin + 8192])
        try:
            encodings = tokenizer.encode_batch_fast(some)
        except TypeError:  # half a character (json's "\ud83d"): no encoding holds it
            for row, text in enumerate(some, begin):
                if any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise ValueError(
                        f"text {row}: expected Unicode, got a lone surrogate in {text[:40]!r}"
                    ) from None
            raise
        ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    return ids
