"""Cut a smaller model out of a larger one: fewer layers, a narrower residual stream and MLP.

Attention heads, their width and the vocabulary stay, as in F2LLM-v2 (arXiv 2603.19223), whose 80M,
160M and 330M are pruned from the 0.6B and then trained. How their layers, coordinates and units
were chosen is not published; what is here is ours, in the manner of Minitron (arXiv 2407.14679):
what a sample of text makes large is kept. The result is a start for training, not a model:

    python train.py RECIPE --init OUT

Of the residual stream the same coordinates stay in every layer. RMSNorm then takes its mean over
fewer of them, which keeps the scale where those that went were as large as those that stay. Nothing
is rescaled: where they were all zero, what a norm gives is sqrt(kept / all) times what it was.

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

# Along which axis a weight has the residual stream's coordinates, and the MLP's units.
WIDTH = {
    "embed_tokens.weight": 1,
    "embed_tokens.W": 1,
    "norm.weight": 0,
    "input_layernorm.weight": 0,
    "post_attention_layernorm.weight": 0,
    "self_attn.q_proj.weight": 1,
    "self_attn.k_proj.weight": 1,
    "self_attn.v_proj.weight": 1,
    "self_attn.o_proj.weight": 0,
    "mlp.gate_proj.weight": 1,
    "mlp.up_proj.weight": 1,
    "mlp.down_proj.weight": 0,
}
UNITS = {
    "mlp.gate_proj.weight": 0,
    "mlp.up_proj.weight": 0,
    "mlp.up_proj.bias": 0,
    "mlp.down_proj.weight": 1,
}


@dataclass(frozen=True)
class Selection:
    """What stays. layers: rising, from 1 on. width_D: int64, rising coordinates. units: int64,
    rising, of each kept layer; as many in each."""

    layers: tuple[int, ...]
    width_D: Tensor
    units: tuple[Tensor, ...]


def spread(layers: int, keep: int) -> tuple[int, ...]:
    """`keep` of layers 1..`layers`, evenly spaced, the first and the last among them.

    Layer 1 + round(i (L - 1) / (keep - 1)) for i = 0..keep - 1, halves up. Of one, the first: what
    follows the embedding.

    Raises:
        ValueError: keep outside 1..layers.
    """
    if not 1 <= keep <= layers:
        raise ValueError(f"layers: expected 1..{layers} (the model's), got {keep}")
    if keep == 1:
        return (1,)
    return tuple(1 + (2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep))


def prune(model: Transformer, kept: Selection) -> Transformer:
    """A copy with the kept layers, coordinates and units, fp32, on the CPU.

    Exits: where the kept layers are the first ones, those among them and the last, as
    `pretrained.cut` has them; otherwise the default ones of that depth, as no kept layer sees any
    more what it was trained on. Prefixes: those below the new width, and it. Ranks: those that the
    new width allows, W's columns being cut as any table's are; with none left, a plain table.
    """
    cfg = pruned_config(model.cfg, kept.layers, len(kept.width_D), len(kept.units[0]))
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    if model.cfg.ranks:
        U, W = (weights.pop(f"embed_tokens.{name}") for name in "UW")
        if cfg.ranks:
            most = cfg.ranks[-1]
            weights |= {"embed_tokens.U": U[:, :most], "embed_tokens.W": W[:most]}
        else:
            weights["embed_tokens.weight"] = U.float() @ W.float()
    small = Transformer(cfg)
    places = {old: new for new, old in enumerate(kept.layers)}
    state = {}
    for name, weight in weights.items():
        layer, part = _place(name)
        if layer and layer not in places:
            continue
        if part in WIDTH:
            weight = weight.index_select(WIDTH[part], kept.width_D)
        if layer and part in UNITS:
            weight = weight.index_select(UNITS[part], kept.units[places[layer]])
        state[f"layers.{places[layer]}.{part}" if layer else name] = weight.float()
    small.load_state_dict(state)
    return small.eval()


def _place(name: str) -> tuple[int, str]:
    """A weight's layer, from 1 on, 0 for none, and its name within."""
    if not name.startswith("layers."):
        return 0, name
    _, layer, part = name.split(".", 2)
    return int(layer) + 1, part


def pruned_config(cfg: config.Model, layers: Sequence[int], width: int, ffn: int) -> config.Model:
    """The shape of what is left, see `prune`.

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
    if cfg.style == "bert" and width != cfg.hidden_size:
        raise ValueError(
            f"width: expected {cfg.hidden_size} of a BERT, whose heads together are as wide and "
            f"stay, got {width}"
        )
    L, prefix = len(layers), list(layers) == list(range(1, len(layers) + 1))
    return replace(
        cfg,
        num_hidden_layers=L,
        hidden_size=width,
        intermediate_size=ffn,
        exits=(*(e for e in cfg.exits if e < L), L) if prefix else (),
        matryoshka_dims=(*(d for d in cfg.matryoshka_dims if d < width), width),
        ranks=tuple(rank for rank in cfg.ranks if rank <= width),
    )


# ---- what is kept ----


def choose(
    model: Transformer,
    layers: Sequence[int],
    width: int,
    ffn: int,
    batches: Iterable[PackedBatch] | None = None,
) -> Selection:
    """Return the `width` coordinates and, in each kept layer, the `ffn` units to keep.

    Without text the first ones stay, as suits models of Matryoshka training. With text those stay
    that score highest (float64; the first of equal scores):

    - a coordinate's score is its share of the mean |x| of the residual stream, summed over the
      inputs of all layers and the output of the last; shares, since deeper streams are larger.
    - a unit's score is the mean |inner activation| times the norm of its column of down_proj: the
      size of what it adds.

    Args:
        batches: packed text; every token counts once.

    Raises:
        ValueError: see `pruned_config`; no text in `batches`.
    """
    pruned_config(model.cfg, layers, width, ffn)
    if batches is None:
        return Selection(tuple(layers), torch.arange(width), (torch.arange(ffn),) * len(layers))
    width_D, units = _activation_scores(model, batches)
    highest = tuple(_highest(units[layer - 1], ffn) for layer in layers)
    return Selection(tuple(layers), _highest(width_D, width), highest)


def _highest(scores: Tensor, keep: int) -> Tensor:
    """Rising places of the `keep` highest scores."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


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
    """Sums over tokens of |residual stream| [L + 1, D] and of |inner activation| [F] of each layer,
    float64, and how many tokens there were."""
    L, D = model.cfg.num_hidden_layers, model.cfg.hidden_size
    stream = torch.zeros(L + 1, D, dtype=torch.float64)
    units = [torch.zeros(model.cfg.intermediate_size, dtype=torch.float64) for _ in range(L)]
    tokens = 0
    with _watched(model, stream, units):
        for batch in batches:
            model(batch.to(model.device), exits=[L])
            tokens += batch.plan.tokens
    return stream, units, tokens


@contextmanager
def _watched(model: Transformer, stream: Tensor, units: list[Tensor]) -> Iterator[None]:
    """Inside, what passes through the model is added to these."""

    def add(x: Tensor, to: Tensor) -> None:
        to += x.abs().sum(0, dtype=torch.float64).cpu()

    def before(to: Tensor) -> Any:
        return lambda module, args: add(args[0], to)

    def behind(to: Tensor) -> Any:
        return lambda module, args, out: add(out, to)

    layers: Any = model.layers
    hooks = [layers[-1].register_forward_hook(behind(stream[-1]))]
    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(before(stream[i])))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(before(units[i])))
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
    """`texts` texts of the sources, all if there are fewer, drawn alike from all, packed.

    Prompts are left out.

    Raises:
        ValueError: text that cannot be read, a stream, texts below 1.
    """
    if texts < 1:
        raise ValueError(f"texts: expected 1 or more, got {texts}")
    tables = sources.tables_of(data)
    ends = np.cumsum([len(table.texts) for table in tables])
    chosen = np.random.default_rng(seed).permutation(ends[-1])[:texts]
    of = np.searchsorted(ends, chosen, side="right")
    found = [
        tables[table].texts[row - (ends[table - 1] if table else 0)]
        for table, row in zip(of.tolist(), chosen.tolist(), strict=True)
    ]
    ids = tokenizer.tokenize(tokens, found, max_length)
    lengths = np.array([len(text) for text in ids], dtype=np.int64)
    return (pack([ids[row] for row in rows]) for rows in budgeted(lengths, max_tokens))


def target(cfg: config.Model, shape: str) -> config.Model:
    """A published shape that `cfg` can be pruned to.

    Raises:
        ValueError: no shape of that name (with near ones), one of other heads, vocabulary or style.
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
