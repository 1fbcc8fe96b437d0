"""Small models of sentence-transformers: four layers, random weights, several architectures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from factories import randomise
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from teacher_models import trained
from transformers import AutoConfig, AutoModel, PreTrainedModel

LAYERS, WIDTH = 4, 32
ROWS = {
    "anchor": ["one two", "four", "ein zwei", "раз два", "quick fox", "three", "fox", "vier"],
    "positive": [
        "one two three",
        "five",
        "zwei drei",
        "раз",
        "brown fox",
        "two",
        "the fox",
        "drei",
    ],
    "negative": ["two three", "four five six", "eins", "три", "the", "three four", "one", "the"],
}
# Options of an architecture, next to sizes that all share.
STYLES: dict[str, dict[str, Any]] = {
    "bert": {},
    "xlm-roberta": {"max_position_embeddings": 34, "type_vocab_size": 1},
    "mpnet": {},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "llama": {"num_key_value_heads": 1},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
}
DECODERS = {"qwen3", "llama", "gemma3_text"}


def tiny_trunk(style: str, **options: Any) -> PreTrainedModel:
    """Return a model of transformers in evaluation mode, without dropout."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1}
    settings = sizes | special | (dropout if style not in DECODERS | {"modernbert"} else {})
    torch.manual_seed(0)
    trunk = AutoModel.from_config(AutoConfig.for_model(style, **settings | STYLES[style] | options))
    return randomise(trunk)


def tiny_sentence_model(
    folder: Path, style: str = "bert", after: Sequence[torch.nn.Module] = (), **options: Any
) -> SentenceTransformer:
    """Return a model with mean pooling, of decoders the last token, that lies in `folder`."""
    if not (folder / "config.json").exists():
        tiny_trunk(style, **options).save_pretrained(folder)
        trained("qwen3" if style in DECODERS else "bert").save_pretrained(folder)
    pooling = Pooling(WIDTH, "lasttoken" if style in DECODERS else "mean")
    return SentenceTransformer(modules=[Transformer(str(folder)), pooling, *after], device="cpu")


def features(model: SentenceTransformer, rows: dict[str, list[str]] = ROWS) -> list[dict[str, Any]]:
    """Return the features of each column."""
    return [model.preprocess(texts) for texts in rows.values()]
