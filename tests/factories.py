"""Small shapes, models, tokenizers, encoders and runs that tests share."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mlembed import config
from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer

WORDS = ["Wednesday, May 4, 2050", "mercredi 4 mai 2050", "বুধবার, ৪ মে, ২০৫০", "one two three"]


def tiny_shape(**changes: Any) -> config.Model:
    """Return a shape of two layers of width 32 for 300 tokens, with `changes`."""
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
    }
    return config.Model(**shape | changes)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give a model weights of a trained model's size, and return it in evaluation mode.

    At the initial 0.02 attention is uniform and every layer nearly the identity, and norms of
    weight 1 hide which norm is used.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise if "embed_tokens" in name else noise * weight.shape[1] ** -0.5)
    return model.eval()


def tiny_model(seed: int = 0, **changes: Any) -> Transformer:
    """Return a model of `tiny_shape(**changes)` with random weights, in evaluation mode."""
    return random_model(tiny_shape(**changes), seed)


def tiny_tokenizer(texts: Iterable[str] = WORDS, size: int = 300) -> Tokenizer:
    """Return a byte-level tokenizer that was trained on `texts`."""
    return tokenizer.train(texts, size)


def tiny_encoder(tokens: Tokenizer | None = None, max_length: int = 24, **changes: Any) -> Encoder:
    """Return an encoder with random weights, its table as large as its tokenizer needs."""
    tokens = tokens or tiny_tokenizer()
    shape = {"vocab_size": tokens.get_vocab_size()} | changes
    return Encoder(tiny_model(**shape), tokens, max_length)


def write_encoder(encoder: Encoder, folder: Path) -> Path:
    """Write an encoder's model and tokenizer to a folder, which may be new, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    pretrained.save(encoder.model, folder)
    tokenizer.save(encoder.tokenizer, folder, encoder.max_length)
    return folder


def tiny_run(shape: dict[str, Any] | None = None, **changes: Any) -> config.Run:
    """Return a run of `tiny_shape(**shape)`, with `changes` to the run's own fields."""
    return config.Run(model=tiny_shape(**shape or {}), **changes)


def odd_shape(style: str = "qwen3", **changes: Any) -> config.Model:
    """Return a small shape in which no two sizes are equal, of either style, with `changes`.

    The vocabulary and the MLP's width are primes; Qwen3's heads together are wider than the model.
    """
    shape: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 37,
        "rope_theta": 700.0,
        "max_position_embeddings": 64,
    }
    if style == "bert":
        shape |= {"style": "bert", "num_key_value_heads": 4, "head_dim": 6, "causal": False}
        shape |= {"pooling": "pooler", "layer_norm_eps": 1e-3, "type_vocab_size": 3}
    return config.Model(**shape | changes)


def random_model(shape: config.Model, seed: int = 0) -> Transformer:
    """Return a model of `shape` with random weights, in evaluation mode."""
    model = randomise(Transformer(shape), seed)
    assert isinstance(model, Transformer)
    return model


def assert_same_model(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Compare the shapes of two models, if they are ours, and their weights bit for bit."""
    assert getattr(one, "cfg", None) == getattr(other, "cfg", None)
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- runs of train.py ----

# Arguments of a model and text so small that a run is mostly start-up.
SMALL = [
    *("--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.head-dim", "8"),
    *("--model.intermediate-size", "48", "--model.vocab-size", "400", "--model.exits", "1", "2"),
    *("--model.matryoshka-dims", "8", "32", "--model.ranks", "8", "16", "--batch-size", "8"),
    *("--precision", "fp32", "--max-length", "32", "--log-every", "1"),
]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small_text(folder: Path, ragged: bool = False) -> list[str]:
    """Write pairs with hard negatives, an n-way table, and dev.jsonl; return the first two paths.

    ragged: pairs have 0 to 2 hard negatives instead of one, and queries of different lengths.
    dev.jsonl is an n-way table to score.
    """
    counts = ("one", "two", "three", "four")
    words = [f"{count} {animal}" for count in counts for animal in ("cats", "dogs", "owls")]
    pairs = []
    for i in range(10):
        negatives = i % 3 if ragged else 1
        for w in words:
            hard = [f"{i + 1} : {w}"] * negatives
            query = f"{w} of {i}" + " and more" * (i % 4 * ragged)
            pairs.append({"query": query, "positive": f"{i} : {w}", "negatives": hard})
    marks = {"eng": ".", "deu": "! and more of it", "fra": "?"}
    for name, ids in (("nway", words), ("dev", ["five cats", "six dogs", "nine owls"])):
        rows = [
            {"id": i, "lang": x, "text": f"{i} {mark}"} for i in ids for x, mark in marks.items()
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return [write_jsonl(folder / "pairs.jsonl", pairs), str(folder / "nway.jsonl")]


def small_job(folder: Path, data: Iterable[str], *options: Any, where: Any = None) -> Any:
    """Set up a run of SMALL on `data` in folder/run, without an evaluation."""
    from mlembed.runtime.distributed import World
    from mlembed.runtime.log import Log
    from mlembed.training.arguments import parse
    from mlembed.training.setup import set_up

    args = ["tiny", *SMALL, "--compile", "off", "--tracker", "none", "--data", *data]
    run = replace(parse([*args, *map(str, options)]), eval=())
    where, directory = where or World(0, 1, torch.device("cpu")), folder / "run"
    directory.mkdir(exist_ok=True)
    return set_up(run, where, directory, None, Log(directory, where.main))


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl of one kind: train, eval or skipped."""
    path = run / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def loss_trace(run: Path) -> list[dict[str, Any]]:
    """Return what a resumed run has to repeat of each step."""
    keys = ("step", "loss", "grad_norm", "rank", "losses")
    return [{key: line[key] for key in keys} for line in metrics(run, "train")]
