"""Write a model of one (dim, exit, rank) in the formats of other libraries.

mlembed export RUN OUT [--dim 96] [--exit 2] [--rank 64] [--format onnx]
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..config.choices import Pooling
from ..runtime.files import check_new


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
    pooling: Pooling | None = None,
    format: tuple[str, ...] = ("sentence-transformers",),
    license: str = "",
    push_to_hub: str = "",
    private: bool = False,
) -> None:
    """Write one size of a model for sentence-transformers, transformers and onnxruntime.

    Args:
        model: run, checkpoint or model directory. The model card of a run tells how it was trained.
        out: new directory.
        dim: width; full by default.
        exit: depth; full by default.
        rank: vocabulary rank; the stored rank by default.
        pooling: last, mean, cls or pooler, of a model whose directory does not say it.
        format: sentence-transformers, onnx (adds onnx/model.onnx), onnx-int8 (adds
            onnx/model_quantized.onnx as well), or several.
        license: license of the weights for the model card, e.g. apache-2.0.
        push_to_hub: upload the directory to this new repository of the Hub, e.g. me/small-model.
        private: make that repository private.
    """
    if private and not push_to_hub:
        raise ValueError("private: expected it with --push-to-hub, got it alone")
    if push_to_hub:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(push_to_hub)
        if "/" not in push_to_hub:  # The snippets of the model card name the owner.
            raise ValueError(f"push-to-hub: expected OWNER/NAME, got {push_to_hub}")
    check_new(out, "directory")
    from ..inference.encoder import Encoder
    from ..publishing.export import export, push

    encoder = Encoder.load(model, "cpu", pooling=pooling, say=partial(print, file=sys.stderr))
    card = {"source": model, "license": license, "repo": push_to_hub}
    report = export(encoder, out, dim, exit, rank, formats=format, **card)
    *others, last = report.differences
    print(f"{out}: for {', '.join(others)} and {last}, vectors within {report.worst:.1e}")
    print(report.describe())
    if push_to_hub:
        print(f"pushed to {push(out, push_to_hub, private)}")
