"""Merge models of one shape: soups of runs, or of the last checkpoints of one run.

mlembed merge OUT runs/a runs/b [--weights 1 3] [--method slerp]
mlembed merge OUT runs/a/checkpoints/step_*
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..config.choices import Method, Pooling
from ..modeling import hf_config
from ..runtime.files import check_new


def main(
    out: Annotated[Path, tyro.conf.Positional],
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    method: Method = "soup",
    weights: tuple[float, ...] = (),
    t: float | None = None,
    pooling: Pooling | None = None,
) -> None:
    """Merge models of one shape and tokenizer into one.

    Exits, widths, ranks, prompts and other settings are those of the first model that mlembed
    wrote: a base model merges with its tune.

    Args:
        out: new directory, to read with train.py --init, encode, export, sentence-transformers or
            transformers.
        models: two or more runs, model directories or training checkpoints.
        method: soup: the weighted mean; slerp: on the sphere, tensor by tensor, one model after the
            other.
        weights: one per model, 0 or more, relative to their sum; equal by default.
        t: instead of weights, for slerp of two models: how far from the first to the second, 0..1.
        pooling: last, mean, cls or pooler, of models whose directories do not say it.
    """
    check_new(out, "directory")
    if len(models) < 2:
        raise ValueError(f"models: expected two or more, got {len(models)}")
    from ..inference.encoder import Encoder
    from ..modeling import pretrained
    from ..modeling.merge import merge, shapes_and_serving, shared_tokenizer
    from ..publishing.export import export
    from ..publishing.model_card import Origin, shown

    counts = shares(method, len(models), weights, t)
    directories = [hf_config.resolve(model) for model in models]
    tokens = shared_tokenizer(directories)
    say = partial(print, file=sys.stderr)
    cfg, shapes, served = shapes_and_serving(directories, pooling, say)
    places = zip(map(str, directories), shapes, strict=True)
    loaded = (pretrained.load(place, shape) for place, shape in places)
    merged, fits = merge(loaded, counts, method, cfg)
    ratios = [f"{weight / sum(counts):.3g}" for weight in counts]
    names = [shown(model) for model in models]
    parts = ", ".join(f"{name} (weight {ratio})" for name, ratio in zip(names, ratios, strict=True))
    words = ["python", "-m", "mlembed", "merge", out.name, *names, "--method", method]
    command = shlex.join([*words, "--weights", *ratios])
    origin = Origin(how=f"{method.capitalize()} of {parts}.", command=command)
    report = export(Encoder(merged, tokens, **vars(served)), out, source=origin)
    print(f"{out}: {method} of {len(models)} models, weights {' '.join(ratios)}")
    for fit in fits:
        print(
            f"rank {fit.rank}: {fit.table_error:.2%} from the merged table, "
            f"{fit.rank_error:.2%} from the merge of the tables of this rank"
        )
    print(report.describe())


def shares(method: Method, models: int, weights: Sequence[float], t: float | None) -> list[float]:
    """Return the weights, one per model.

    Raises:
        ValueError: another number of weights than of models, or t without slerp of two models.
    """
    if weights and len(weights) != models:
        raise ValueError(f"weights: expected one for each of {models} models, got {len(weights)}")
    if t is None:
        from ..modeling.merge import check_weights

        return check_weights(weights or [1.0] * models)
    if method != "slerp" or models != 2 or weights:
        raise ValueError(
            f"t: expected only with slerp of two models without weights, got {method} of {models}"
            f"{' with weights' if weights else ''}"
        )
    if not 0 <= t <= 1:
        raise ValueError(f"t: expected 0..1, got {t}")
    return [1 - t, t]
