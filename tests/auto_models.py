"""Tiny random models of transformers, one of each family that style transformers is tested with."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from factories import randomise, tiny_tokenizer
from safetensors.torch import save_file
from torch import nn

from mlembed import config
from mlembed.data import tokenizer
from mlembed.modeling.automodel import architecture

LAYERS, WIDTH = 4, 32
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": LAYERS}
DECODER = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MIXED = ["sliding_attention", "full_attention"] * 2
# Class, and configuration. Windows are shorter than the texts of most tests: a token sees 4 tokens
# before itself in ModernBERT and EmbeddingGemma, and as many after itself, or 3 in others.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("ModernBert", {**SHAPE, "num_attention_heads": 4, "local_attention": 8}),
    "gemma3": ("Gemma3Text", {**DECODER, "sliding_window": 4, "layer_types": MIXED}),
    "embeddinggemma": (
        "Gemma3Text",
        DECODER | {"sliding_window": 8, "layer_types": MIXED, "use_bidirectional_attention": True},
    ),
    "llama": ("Llama", DECODER),
    "mistral": ("Mistral", {**DECODER, "sliding_window": 4}),
    "qwen2": (
        "Qwen2",
        {key: value for key, value in DECODER.items() if key != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", DECODER),
    "xlm-roberta": (
        "XLMRoberta",
        {**SHAPE, "num_attention_heads": 4, "max_position_embeddings": 66, "pad_token_id": 1},
    ),
}


def host(family: str, vocab_size: int = 50, **changes: Any) -> Any:
    """Return a model of transformers with random weights, in evaluation mode."""
    name, shape = FAMILIES[family]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if family == "modernbert":
        special |= {"cls_token_id": 1, "sep_token_id": 1}
    shape = {"vocab_size": vocab_size, **special, **shape, **changes}
    hf = getattr(transformers, f"{name}Config")(**shape)
    model = randomise(getattr(transformers, f"{name}Model")(hf), 1)
    with torch.no_grad():  # so that a lost bias shows
        for key, bias in model.named_parameters():
            if key.endswith("bias"):
                bias.add_(0.1)
    return model


def shape(family: str, **changes: Any) -> config.Model:
    """Return the shape of a family's model."""
    hf = json.loads(host(family, changes.get("vocab_size", 50)).config.to_json_string())
    fields = architecture.shape(Path("config.json"), hf)
    depth = changes.get("num_hidden_layers", LAYERS)
    model = config.Model(**fields | {"pooling": "mean"})
    cut = architecture.cut(model, range(1, depth + 1))
    return config.Model(**fields | {"pooling": "mean", "architecture": cut} | changes)


def write(family: str, folder: Path, dense: tuple[int, ...] = (), **changes: Any) -> Path:
    """Write a model and a tokenizer to `folder` like sentence-transformers, pooled by mean.

    dense: output widths of linear layers after the pooling.
    """
    tokens = tiny_tokenizer()
    model = host(family, tokens.get_vocab_size(), **changes)
    model.save_pretrained(folder)
    tokenizer.save(tokens, folder, 64)
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    contents: dict[str, Any] = {
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": WIDTH,
            "pooling_mode_mean_tokens": True,
            "include_prompt": True,
        },
    }
    before = WIDTH
    for number, width in enumerate(dense, 2):
        place = f"{number}_Dense"
        modules[place] = "Dense"
        contents[f"{place}/config.json"] = {
            "in_features": before,
            "out_features": width,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        (folder / place).mkdir()
        layer = randomise(nn.Linear(before, width, bias=False), number)
        weights = {"linear.weight": layer.weight.detach()}
        save_file(weights, folder / place / "model.safetensors")
        before = width
    modules[f"{len(modules)}_Normalize"] = "Normalize"
    contents["modules.json"] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules.items())
    ]
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder
