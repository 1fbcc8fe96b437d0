"""Prune a model to fewer layers, a narrower residual stream and a narrower MLP.

mlembed prune MODEL OUT --shape ml-embed-80m [--data FILES]
mlembed prune MODEL OUT --layers 8 --width 320 --ffn 2048
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..config.choices import Pooling, PruneBy
from ..config.strict import SEED, check_number
from ..runtime.files import check_new


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    shape: str = "",
    layers: int | None = None,
    width: int | None = None,
    ffn: int | None = None,
    keep_layers: tuple[int, ...] = (),
    pooling: Pooling | None = None,
    by: PruneBy | None = None,
    data: tuple[str, ...] = (),
    texts: int = 4096,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Prune a model to fewer layers, a narrower residual stream and a narrower MLP.

    Args:
        model: run, checkpoint or model directory, or hub id.
        out: new directory, to read with `train.py --init`, sentence-transformers or transformers.
        shape: name of a published shape, instead of layers, width and ffn.
        layers: number of layers to keep, evenly spaced; all by default.
        width: width of the residual stream; the model's by default.
        ffn: inner width of the MLP; the model's by default.
        keep_layers: layers to keep, from 1 on, instead of evenly spaced ones.
        pooling: last, mean, cls or pooler, of a model whose directory does not say it.
        by: what stays of width and MLP: the first coordinates and units, or those that a sample of
            `data` makes largest. By default activation with data, first without.
        data: what train.py's --data takes.
        texts: how many texts of the data are drawn.
        seed: seed of the draw.
        device: auto, cpu or cuda.
    """
    check_number("texts", texts, above=0, below=2**31)
    check_number("seed", seed, int, **SEED)
    check_new(out, "directory")
    if shape and not (layers is width is ffn is None and not keep_layers):
        raise ValueError("shape: expected no layers, width, ffn or keep_layers with it, got some")
    if layers is not None and keep_layers:
        raise ValueError("layers: expected none with keep_layers, got both")
    by = by or ("activation" if data else "first")
    if (by == "activation") != bool(data):
        given = "some" if data else "none"
        raise ValueError(
            f"data: expected text for activation and none otherwise, got {given}, {by}"
        )
    from ..inference.encoder import Encoder
    from ..modeling.prune import choose, prune, pruned_config, sample, spread, target
    from ..modeling.transformer import num_parameters
    from ..publishing import model_card
    from ..publishing.export import export

    say = partial(print, file=sys.stderr)
    encoder = Encoder.load(model, device, pooling=pooling, say=say)
    cfg = encoder.model.cfg
    if shape:
        wanted = target(cfg, shape)
        layers, width, ffn = wanted.num_hidden_layers, wanted.hidden_size, wanted.intermediate_size
    depth = cfg.num_hidden_layers
    keep = keep_layers or spread(depth, depth if layers is None else layers)
    width = cfg.hidden_size if width is None else width
    ffn = cfg.intermediate_size if ffn is None else ffn
    # Check the sizes before reading text.
    pruned_config(cfg, keep, width, ffn)
    limits = encoder.max_length, encoder.max_tokens
    batches = sample(encoder.tokenizer, *limits, data, texts, seed) if data else None
    small = prune(encoder.model, choose(encoder.model, keep, width, ffn, batches))
    served = min(encoder.width or width, width)
    pruned = replace(encoder, model=small, width=served if served < width else None)
    before, now = num_parameters(cfg), num_parameters(small.cfg)
    what = (
        f"layers {' '.join(map(str, keep))} of {depth}, width {width} of {cfg.hidden_size}, mlp "
        f"{ffn} of {cfg.intermediate_size}, by {by}: {now:,} parameters of {before:,}"
    )
    source, *files = (model_card.shown(path) for path in (model, *data))
    words = [source, out.name, "--keep-layers", *keep, "--width", width, "--ffn", ffn]
    words += ["--data", *files, "--texts", texts, "--seed", seed] if files else []
    origin = model_card.find_origin(model).derived(f"Pruned to {what}.", ["prune", *words])
    report = export(pruned, out, source=origin)
    print(f"{out}: {what}")
    print(report.describe())
