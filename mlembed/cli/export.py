"""Cut a model to one (dim, exit, rank), as the libraries that people run read it.

python -m mlembed export RUN OUT [--dim 96] [--exit 2] [--rank 64] [--format onnx]
"""

from pathlib import Path
from typing import Annotated

import tyro

from mlembed.publishing.export import FORMATS, export, push

from ..inference.encoder import Encoder


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
    format: tuple[str, ...] = FORMATS[:1],
    license: str = "",
    push_to_hub: str = "",
    private: bool = False,
) -> None:
    """Write a cut of a trained model for sentence-transformers, transformers and onnxruntime.

    Args:
        model: run, checkpoint or model directory; of a run, the model card tells how it was made.
        out: new directory.
        dim: width; full by default.
        exit: depth; full by default.
        rank: vocabulary rank; the stored one by default.
        format: sentence-transformers, onnx (adds onnx/model.onnx), or both.
        license: of the weights, for the model card, e.g. apache-2.0.
        push_to_hub: new repository of the hub, e.g. me/small-model, to upload the directory to.
        private: whether that repository is private.
    """
    if private and not push_to_hub:
        raise ValueError("private: expected it with --push-to-hub, got it alone")
    if push_to_hub:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(push_to_hub)
        if "/" not in push_to_hub:  # the card's snippets need it
            raise ValueError(f"push-to-hub: expected OWNER/NAME, got {push_to_hub}")
    encoder = Encoder.load(model, "cpu")
    said = {"source": model, "license": license, "repo": push_to_hub}
    worst = export(encoder, out, dim, exit, rank, formats=format, **said)
    readers = ["sentence-transformers", "transformers"]
    readers += ["onnxruntime"] if "onnx" in format else []
    named = f"{', '.join(readers[:-1])} and {readers[-1]}"
    print(f"{out}: read by {named}, vectors within {worst:.1e}")
    if push_to_hub:
        print(f"pushed to {push(out, push_to_hub, private)}")
