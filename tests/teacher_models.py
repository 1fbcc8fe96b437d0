"""Small models as transformers and sentence-transformers save them: BERT, XLM-R and Qwen3 of random
weights, with tokenizers of their own.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import randomise
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

WORDS = ["one two three", "four five", "ein zwei drei vier", "раз два три", "the quick brown fox"]
# An empty text, several scripts, unseen words, one text beyond the model's length, and one twice.
TEXTS = ["one", "", *WORDS, "two two", "比利时 fox", "one", "long " * 50, " space around \n"]
BERT_LENGTH, QWEN_LENGTH = 16, 12
# [PAD], [UNK], [CLS] and [SEP] in the order of their ids.
SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    "xlm-r": ("<s>", "<pad>", "</s>", "<unk>"),
}
NAMES = {
    "bert": ("pad_token", "unk_token", "cls_token", "sep_token"),
    "xlm-r": ("cls_token", "pad_token", "sep_token", "unk_token"),
}


def trained(kind: str, words: Iterable[str] = WORDS, **options: Any) -> PreTrainedTokenizerFast:
    """Train WordPiece, between two tokens and padded right, or byte BPE with EOS, padded left."""
    if kind in SPECIAL:
        special, names = SPECIAL[kind], NAMES[kind]
        named = dict(zip(names, special, strict=True))
        read = Tokenizer(models.WordPiece(unk_token=named["unk_token"]))
        read.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=list(special))
        read.train_from_iterator(words, trainer)
        first, last = named["cls_token"], named["sep_token"]
        read.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(token, special.index(token)) for token in (first, last)],
        )
        known: dict[str, Any] = {"model_max_length": BERT_LENGTH, **named}
    else:
        read = Tokenizer(models.BPE())
        read.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
        read.train_from_iterator(words, trainer)
        read.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 1)]
        )
        known = {"model_max_length": QWEN_LENGTH, "padding_side": "left"}
        known |= {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=read, **known | options)


def plain(kind: str, out: Path, **options: Any) -> Path:
    """Save a model of transformers alone; options are the tokenizer's.

    kind: bert, xlm-r, distilbert, qwen3, or qwen3-lm, which has a head that generates.
    """
    read = trained("bert" if kind == "distilbert" else kind, **options)
    sizes: dict[str, Any] = {
        "vocab_size": len(read), "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": BERT_LENGTH,
    }  # fmt: skip
    bert = {"hidden_size": 20, "intermediate_size": 31}
    model: torch.nn.Module
    if kind == "bert":
        model = BertModel(BertConfig(**sizes, **bert, pad_token_id=0))
    elif kind == "xlm-r":
        sizes["max_position_embeddings"] += 2
        model = XLMRobertaModel(
            XLMRobertaConfig(**sizes, **bert, pad_token_id=1, type_vocab_size=1)
        )
    elif kind == "distilbert":
        sizes = {"vocab_size": len(read), "max_position_embeddings": BERT_LENGTH, "dim": 20}
        model = DistilBertModel(DistilBertConfig(**sizes, n_layers=1, n_heads=2, hidden_dim=31))
    else:
        sizes |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
        shape = Qwen3Config(
            **sizes, hidden_size=24, intermediate_size=37, pad_token_id=0, tie_word_embeddings=True
        )
        model = Qwen3ForCausalLM(shape) if kind == "qwen3-lm" else Qwen3Model(shape)
    randomise(model).save_pretrained(out)
    read.save_pretrained(out)
    return out


def sentence(
    kind: str,
    out: Path,
    pooling: str | None = None,
    after: Sequence[torch.nn.Module] | None = None,
    tokens: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Save a model of sentence-transformers.

    Args:
        pooling: by default Qwen3's last token, and the mean of others.
        after: modules after the pooling; by default BERT is normalised.
        tokens: options of the tokenizer. options: of SentenceTransformer.
    """
    words = Transformer(str(plain(kind, out.with_name(out.name + "-plain"), **tokens or {})))
    usual = "lasttoken" if kind.startswith("qwen3") else "mean"
    after = [Normalize()] * (kind == "bert") if after is None else after
    modules = [words, Pooling(words.get_embedding_dimension(), pooling or usual), *after]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(out))
    return out


def cross_encoder(out: Path, labels: int = 1, words: Iterable[str] = WORDS) -> Path:
    """Save a BERT that scores pairs of texts, with a tokenizer of `words`."""
    read = trained("bert", words=words)
    shape = BertConfig(
        vocab_size=len(read), hidden_size=20, intermediate_size=31, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=48, pad_token_id=0, num_labels=labels,
    )  # fmt: skip
    randomise(BertForSequenceClassification(shape)).save_pretrained(out)
    read.save_pretrained(out)
    return out


def by_sentence_transformers(path: Path, texts: Sequence[str]) -> np.ndarray:
    """Return the vectors of a directory, a few texts at a time."""
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    return model.encode(list(texts), prompt="", batch_size=4, show_progress_bar=False)
