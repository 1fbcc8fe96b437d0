"""Prune a model to fewer layers, a narrower residual stream and a narrower MLP.

Attention heads, their width and the vocabulary stay, as in F2LLM-v2 (arXiv 2603.19223), whose 80M,
160M and 330M are pruned from the 0.6B and then trained. How their layers, coordinates and units
were chosen is not published; the choice here is ours, similar to Minitron's (arXiv 2407.14679):
those that are largest on a sample of text. The result has to be trained:

    python train.py RECIPE --init OUT

Every layer keeps the same coordinates of the residual stream. RMSNorm then takes its mean over
fewer of them, which keeps the scale if the removed ones were as large as the others. Nothing is
rescaled: if the removed ones were all zero, a norm's output is sqrt(new / old width) times what it
was.

Letters: T packed tokens, D width, F inner width of the MLP, V vocabulary, R rank.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .. import config
from ..config import shapes, strict
from ..data import sources, tokenizer
from ..data.packing import PackedBatch, budgeted, pack
from .transformer import Transformer

# Axes of the weights along which the residual stream's coordinates lie, and the MLP's units.
NORMS = ("norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight")
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
INPUTS = (
    *("embed_tokens.weight", "embed_tokens.W", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    *(f"self_attn.{name}_proj.weight" for name in "qkv"),
)
WIDTH = dict.fromkeys(INPUTS, 1) | dict.fromkeys((*NORMS, *OUTPUTS), 0)
UNITS = {
    "mlp.gate_proj.weight": 0,
    "mlp.up_proj.weight": 0,
    "mlp.up_proj.bias": 0,
    "mlp.down_proj.weight": 1,
}


@dataclass(frozen=True)
class Selection:
    """Layers, coordinates and units to keep, each rising.

    layers: from 1 on. width_D: int64 coordinates. units: int64 of each layer, equally many in each.
    """

    layers: tuple[int, ...]
    width_D: Tensor
    units: tuple[Tensor, ...]


def spread(layers: int, count: int) -> tuple[int, ...]:
    """Return `count` of layers 1..`layers`, evenly spaced from the first to the last.

    Layer 1 + round(i (L - 1) / (count - 1)) for i = 0..count - 1, halves up; for one, the first.

    Raises:
        ValueError: count outside 1..layers.
    """
    if not 1 <= count <= layers:
        raise ValueError(f"layers: expected 1..{layers} (the model's), got {count}")
    if count == 1:
        return (1,)
    return tuple(1 + (2 * i * (layers - 1) + count - 1) // (2 * (count - 1)) for i in range(count))


def prune(model: Transformer, selection: Selection) -> Transformer:
    """Return a copy with the selected layers, coordinates and units, fp32, on the CPU.

    Exits: if the layers are those that an exit runs, the exits up to it, as in `pretrained.cut`;
    otherwise the default ones, since every layer gets other inputs than in training. `last_layers`
    stays if these layers and an earlier one are kept, otherwise it becomes 0. Prefixes: those below
    the new width, and the width. Ranks: those up to the new width (W loses columns like any table);
    a plain table if none is left.
    """
    width, ffn = len(selection.width_D), len(selection.units[0])
    cfg = pruned_config(model.cfg, selection.layers, width, ffn)
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    if model.cfg.ranks:
        U, W = (weights.pop(f"embed_tokens.{name}") for name in "UW")
        if cfg.ranks:
            most = cfg.ranks[-1]
            weights |= {"embed_tokens.U": U[:, :most], "embed_tokens.W": W[:most]}
        else:
            weights["embed_tokens.weight"] = U.float() @ W.float()
    places = {old: new for new, old in enumerate(selection.layers)}
    state = {}
    for name, weight in weights.items():
        layer, part = _split_name(name)
        if layer and layer not in places:
            continue
        if part in WIDTH:
            weight = weight.index_select(WIDTH[part], selection.width_D)
        if layer and part in UNITS:
            weight = weight.index_select(UNITS[part], selection.units[places[layer]])
        state[f"layers.{places[layer]}.{part}" if layer else name] = weight.float()
    small = Transformer(cfg)
    small.load_state_dict(state)
    return small.eval()


def _split_name(name: str) -> tuple[int, str]:
    """Return the layer of a weight, from 1 on or 0 outside of layers, and its name in the layer."""
    if not name.startswith("layers."):
        return 0, name
    _, layer, part = name.split(".", 2)
    return int(layer) + 1, part


def pruned_config(cfg: config.Model, layers: Sequence[int], width: int, ffn: int) -> config.Model:
    """Return the shape of a pruned model, see `prune`.

    Raises:
        ValueError: layers that do not rise in 1..depth, a width or an MLP beyond the model's, a
            BERT's width other than its heads' together.
    """
    strict.check_rising("keep_layers", layers, cfg.num_hidden_layers, "model's depth")
    for name, got, most in (
        ("width", width, cfg.hidden_size),
        ("ffn", ffn, cfg.intermediate_size),
    ):
        if not 1 <= got <= most:
            raise ValueError(f"{name}: expected 1..{most} (the model's), got {got}")
    if cfg.style == "transformers":
        raise ValueError("model.style: expected qwen3 or bert to prune, got transformers")
    if cfg.style == "bert" and width != cfg.hidden_size:
        raise ValueError(
            f"width: expected {cfg.hidden_size} of a BERT, whose heads together have that width "
            f"and stay, got {width}"
        )
    L, H = len(layers), cfg.last_layers
    whole = L > H and tuple(layers[L - H :]) == cfg.layers_of(L)[L - H :]
    cut = whole and tuple(layers) == cfg.layers_of(L)
    return replace(
        cfg,
        num_hidden_layers=L,
        hidden_size=width,
        intermediate_size=ffn,
        exits=(*(e for e in cfg.exits if e < L), L) if cut else (),
        last_layers=H if whole else 0,
        matryoshka_dims=(*(d for d in cfg.matryoshka_dims if d < width), width),
        ranks=tuple(rank for rank in cfg.ranks if rank <= width),
    )


# ---- selection ----


def choose(
    model: Transformer,
    layers: Sequence[int],
    width: int,
    ffn: int,
    batches: Iterable[PackedBatch] | None = None,
) -> Selection:
    """Return the `width` coordinates and, in each of `layers`, the `ffn` units to keep.

    Without text, the first ones: Matryoshka training makes them useful on their own. With text,
    those that score highest (float64; the first of equal scores):

    - a coordinate's score is its share of the mean |x| of the residual stream, summed over the
      inputs of all layers and the output of the last one; shares, since deeper streams are larger.
    - a unit's score is the mean |inner activation| times the norm of its column of down_proj: the
      size of what it adds.

    Args:
        batches: packed text; every token counts once.

    Raises:
        ValueError: see `pruned_config`; batches without text.
    """
    pruned_config(model.cfg, layers, width, ffn)
    if batches is None:
        return Selection(tuple(layers), torch.arange(width), (torch.arange(ffn),) * len(layers))
    width_D, units = _activation_scores(model, batches)
    highest = tuple(_highest(units[layer - 1], ffn) for layer in layers)
    return Selection(tuple(layers), _highest(width_D, width), highest)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return the rising indices of the `count` highest scores."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _activation_scores(
    model: Transformer, batches: Iterable[PackedBatch]
) -> tuple[Tensor, list[Tensor]]:
    sums, units, tokens = _activations(model, batches)
    if not tokens:
        raise ValueError("data: expected text for pruning by activation, got none")
    shares = sums / sums.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    layers: Any = model.layers
    down = [layer.mlp.down_proj.weight.detach().cpu().double() for layer in layers]
    norms = [weight.square().sum(0).sqrt() for weight in down]
    return shares.sum(0), [x / tokens * norm for x, norm in zip(units, norms, strict=True)]


@torch.no_grad()
def _activations(
    model: Transformer, batches: Iterable[PackedBatch]
) -> tuple[Tensor, list[Tensor], int]:
    """Return sums over tokens of |residual stream| [L + 1, D] and, for each layer, of
    |inner activation| [F], float64, and the number of tokens.
    """
    L, D = model.cfg.num_hidden_layers, model.cfg.hidden_size
    stream = torch.zeros(L + 1, D, dtype=torch.float64)
    units = [torch.zeros(model.cfg.intermediate_size, dtype=torch.float64) for _ in range(L)]
    tokens = 0
    with _add_activations(model, stream, units):
        for batch in batches:
            model(batch.to(model.device), exits=[L])
            tokens += batch.plan.tokens
    return stream, units, tokens


@contextmanager
def _add_activations(model: Transformer, stream: Tensor, units: list[Tensor]) -> Iterator[None]:
    """Add the absolute activations of forward passes inside the block to `stream` and `units`."""

    def add(x: Tensor, to: Tensor) -> None:
        to += x.abs().sum(0, dtype=torch.float64).cpu()

    def add_input(to: Tensor) -> Any:
        return lambda module, args: add(args[0], to)

    layers: Any = model.layers
    hooks = [layers[-1].register_forward_hook(lambda module, args, out: add(out, stream[-1]))]
    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(add_input(stream[i])))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(add_input(units[i])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- a sample of text, and published shapes ----


def sample(
    tokens: Tokenizer,
    max_length: int,
    max_tokens: int,
    data: Sequence[str],
    texts: int,
    seed: int,
) -> Iterator[PackedBatch]:
    """Return packs of `texts` texts of the sources (all if there are fewer), drawn uniformly.

    Prompts are left out.

    Raises:
        ValueError: text that cannot be read, a stream, texts below 1.
    """
    if texts < 1:
        raise ValueError(f"texts: expected 1 or more, got {texts}")
    tables = sources.tables_of(data)
    ends = np.cumsum([len(table.texts) for table in tables])
    rows = np.random.default_rng(seed).permutation(ends[-1])[:texts]
    places = np.searchsorted(ends, rows, side="right")
    drawn = [
        tables[place].texts[row - (ends[place - 1] if place else 0)]
        for place, row in zip(places.tolist(), rows.tolist(), strict=True)
    ]
    ids = tokenizer.tokenize(tokens, drawn, max_length)
    lengths = np.array([len(text) for text in ids], dtype=np.int64)
    return (pack([ids[row] for row in rows]) for rows in budgeted(lengths, max_tokens))


def target(cfg: config.Model, shape: str) -> config.Model:
    """Return a published shape that `cfg` can be pruned to.

    Raises:
        ValueError: an unknown name (with near ones), other heads, vocabulary or style.
    """
    if shape not in shapes.SHAPES:
        near = strict.near(shape, shapes.SHAPES)
        raise ValueError(f"shape: expected one of {', '.join(shapes.SHAPES)}{near}, got {shape!r}")
    wanted = shapes.SHAPES[shape]
    names = ("style", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in names:
        want, got = getattr(wanted, name), getattr(cfg, name)
        if want != got:
            raise ValueError(f"shape: {name}: expected {want}, as {shape} has, got {got}")
    return wanted
