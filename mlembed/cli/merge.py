"""Merge models of one shape into one: soups of runs, or of the last checkpoints of a run.

python -m mlembed merge OUT runs/a runs/b [--method slerp] [--weights 1 3]
python -m mlembed merge OUT runs/a/checkpoints/step_*
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ..config.choices import Method
from ..modeling import hf_config
from ..runtime.files import atomic_directory, check_new


def main(
    out: Annotated[Path, tyro.conf.Positional],
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    method: Method | None = None,
    weights: tuple[float, ...] = (),
    t: float | None = None,
) -> None:
    """Merge models of one shape and tokenizer into one.

    Args:
        out: new directory, which train.py --init, encode, export and transformers read.
        models: two or more runs, model directories or training checkpoints.
        method: soup: their mean; weighted: by weights; slerp: on the sphere, tensor by tensor, one
            model after the other. By default weighted where weights are given, else soup.
        weights: one a model, 0 or more; they count relative to their sum.
        t: of slerp of two, instead of weights: how far from the first to the second, 0..1.
    """
    check_new(out, "directory")
    if len(models) < 2:
        raise ValueError(f"models: expected two or more, got {len(models)}")
    method = method or ("weighted" if weights else "soup")
    counts = shares(method, len(models), weights, t)
    directories = [hf_config.resolve(model) for model in models]
    from ..data import tokenizer
    from ..modeling import pretrained
    from ..modeling.merge import common, merge

    tokens, length = common(directories)
    merged, fits = merge((pretrained.load(str(at)) for at in directories), counts, method)
    most = merged.cfg.max_position_embeddings
    with atomic_directory(out) as partial:
        pretrained.save(merged, partial)
        tokenizer.save(tokens, partial, min(length or most, most))
    of = " ".join(f"{weight / sum(counts):.3g}" for weight in counts)
    print(f"{out}: {method} of {len(models)} models, weights {of}")
    for fit in fits:
        print(
            f"rank {fit.rank}: {fit.of_table:.2%} off the merged table, "
            f"{fit.of_rank:.2%} off the merge of this rank's tables"
        )


def shares(method: Method, models: int, weights: Sequence[float], t: float | None) -> list[float]:
    """Weights, one a model.

    Raises:
        ValueError: weights or t that the method has not, or of another number of models.
    """
    if (method == "weighted") > bool(weights) or (method == "soup" and weights):
        given = "some" if weights else "none"
        raise ValueError(
            f"weights: expected some with weighted, none with soup, got {given}, {method}"
        )
    if weights and len(weights) != models:
        raise ValueError(f"weights: expected one for each of {models} models, got {len(weights)}")
    if t is None:
        from ..modeling.merge import checked

        return checked(weights or [1.0] * models)
    if method != "slerp" or models != 2 or weights:
        raise ValueError(
            f"t: expected only with slerp of two models without weights, got {method} of {models}"
            f"{' with weights' if weights else ''}"
        )
    if not 0 <= t <= 1:
        raise ValueError(f"t: expected 0..1, got {t}")
    return [1 - t, t]
