"""Truth for the transformer: the same weights in transformers' classes, and each text alone."""

from pathlib import Path

import numpy as np
import torch
from factories import odd_shape, random_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.transformer import Transformer

# Ranks 11 and 20 are not powers of two. BERT's longest text fills its position table.
SIZES = {
    "num_hidden_layers": 4,
    "exits": (1, 2, 4),
    "matryoshka_dims": (5, 12, 24),
    "ranks": (3, 11, 20),
}
SHAPES = {
    "qwen3": odd_shape(max_position_embeddings=512, **SIZES),
    "bert": odd_shape("bert", max_position_embeddings=300, **SIZES),
}
ALL_EXITS = (1, 2, 3, 4)
# One token, two, a prime, and 300: beyond 256 attention takes another path on the CPU.
LENGTHS = (17, 1, 300, 2, 5)
POOLINGS = {"qwen3": ("last", "mean", "cls"), "bert": ("pooler", "cls", "mean", "last")}
STYLE_POOLINGS = [(style, pooling) for style in SHAPES for pooling in POOLINGS[style]]


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    """Return random tokens 2..100: 0 and 1 are the padding of BERT and XLM-R."""
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 101, n) for n in lengths]


def build(
    cfg: config.Model,
    backend: object = None,
    dtype: torch.dtype = torch.float32,
    lean: bool = False,
) -> Transformer:
    """Return a random model, compiled by `backend` if it is not None."""
    model = random_model(cfg).to(dtype)
    if backend is not None:
        torch._dynamo.reset()
        model.compile_blocks(backend, lean=lean)
    return model


def as_transformers(model: Transformer, rank: int | None = None) -> PreTrainedModel:
    """Return transformers' model with the same weights, every name matched."""
    cfg = model.cfg
    kinds = {"qwen3": (Qwen3Model, Qwen3Config), "bert": (BertModel, BertConfig)}
    kind, options = kinds[cfg.style]
    if cfg.position_offset:
        kind, options = XLMRobertaModel, XLMRobertaConfig
    more = {} if cfg.style == "qwen3" else {"add_pooling_layer": cfg.pooling == "pooler"}
    hf = kind(options(**hf_config.hf_config(cfg)), **more).eval()
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith("embed_tokens.")}
    weights["embed_tokens.weight"] = model.embed_tokens.table(rank).detach()
    named = {pretrained.hf_name(name, cfg): weight for name, weight in weights.items()}
    hf.load_state_dict(named, strict=True)
    return hf


@torch.no_grad()
def hf_exits(hf: PreTrainedModel, ids: list[np.ndarray], pooling: str) -> Tensor:
    """Return every layer's pooled output of a batch padded on the right, [L, N, D]."""
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), hf.config.pad_token_id or 0)
    mask = torch.zeros(len(ids), longest, dtype=torch.int64)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = torch.from_numpy(text)
        mask[row, : len(text)] = 1
    out = hf(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    layers = out.hidden_states[1:]
    if isinstance(hf, Qwen3Model):  # only the last of hidden_states is normed
        layers = [*(hf.norm(x) for x in layers[:-1]), out.last_hidden_state]
    pools = {
        "last": lambda rows: rows[-1],
        "cls": lambda rows: rows[0],
        "mean": lambda rows: rows.mean(0),
        "pooler": lambda rows: hf.pooler(rows[None])[0],
    }
    pooled = [
        torch.stack([pools[pooling](x[i, : len(text)]) for i, text in enumerate(ids)])
        for x in layers
    ]
    if pooling == "pooler":
        torch.testing.assert_close(out.pooler_output, pooled[-1], rtol=0, atol=1e-6)
    return torch.stack(pooled)


def assert_equals_transformers(
    model: Transformer, hf: PreTrainedModel, rank: int | None = None
) -> None:
    """Compare a model at every exit with transformers' in fp32."""
    ids = texts((17, 1, 31, 2, 5))
    with torch.no_grad():
        ours = model(pack(ids), exits=range(1, model.cfg.num_hidden_layers + 1), rank=rank)
    theirs = hf_exits(hf, ids, model.cfg.pooling)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def read_by_transformers(directory: Path, texts: list[str], pooling: str) -> Tensor:
    """Return the vectors [N, D] that transformers' classes make of a directory, of norm 1."""
    hf = AutoModel.from_pretrained(directory, local_files_only=True).eval()
    reader = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    rows = []
    for text in texts:
        out = hf(**reader(text, truncation=True, return_tensors="pt"))
        rows.append(out.last_hidden_state[0, -1] if pooling == "last" else out.pooler_output[0])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def alone(
    model: Transformer, ids: np.ndarray, depth: int, runs_L: np.ndarray, exits: tuple[int, ...]
) -> list[Tensor]:
    """Return one text's pooled vector at each exit up to `depth`, through the layers it runs."""
    batch = pack([ids])
    tables = model.rotation(batch.pos_T)
    bert = model.cfg.style == "bert"
    x_TD, vectors = model.embed_tokens(batch.ids_T, None), []
    if bert:
        x_TD = model.embed_places(x_TD, batch.pos_T)
    for layer in range(depth):
        if runs_L[layer]:
            x_TD = model.block(model.layers[layer], x_TD, tables, batch.plan)
        if layer + 1 in exits:
            rows = x_TD if bert else model.norm(x_TD)
            pooled = {"last": rows[-1], "mean": rows.mean(0)}.get(model.cfg.pooling, rows[0])
            if model.cfg.pooling == "pooler":
                pooled = (model.pooler.weight @ pooled + model.pooler.bias).tanh()
            vectors.append(pooled)
    return vectors
