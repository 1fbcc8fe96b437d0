"""Cut a model to one (dim, exit, rank), as sentence-transformers and transformers read it.

python -m mlembed.export RUN OUT [--dim 96] [--exit 2] [--rank 64]

The directory is a plain Qwen3, BERT or XLM-R model of `exit` layers with the vocabulary merged at
`rank`, and sentence-transformers modules under the names that every version from 5.0 on maps:

    Transformer -> Pooling -> (Dense: BERT's pooler) -> (Dense: the first `dim`) -> Normalize

BERT's pooler is written twice: as the module, and as the model's own for transformers, which gives
it as `pooler_output`. The last Dense module is a 0/1 matrix. `truncate_dim` would do less: readers
before 5.4 ignore it, later ones apply it after Normalize, which leaves vectors shorter than one.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor

from . import log, pretrained, tokenizer
from .checkpoint import atomic_directory
from .encode import Encoder

MODULES = "sentence_transformers.models"
TOLERANCE = 1e-4
PROBES = (  # several scripts, lengths and an empty text; enough to see a wrong EOS, mask or cut
    "Wednesday, May 4, 2050",
    "2050 թ. մայիսի 4, չորեքշաբթի",
    "বুধবার, ৪ মে, ২০৫০ এবং আরও কয়েকটি শব্দ যা এই লেখাটিকে দীর্ঘ করে তোলে",
    "比利时、哈萨克斯坦或赞比亚",
    "in 1 hour 🙂",
    "",
)


def export(
    encoder: Encoder,
    out: Path,
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
) -> float:
    """Write the cut model to `out`, once its vectors were checked; -> their largest difference.

    Args:
        dim: 1..width; full by default. exit: 1..depth. rank: 1..stored.

    Raises:
        ValueError: a dim, exit or rank that the model lacks, `out` not empty, vectors that differ.
    """
    cfg = encoder.model.cfg
    dim = cfg.hidden_size if dim is None else dim
    exit = cfg.num_hidden_layers if exit is None else exit
    cfg.check(dim, exit, rank)
    small = pretrained.cut(encoder.model, exit, rank)
    with atomic_directory(out) as partial:
        pretrained.save(small, partial)
        tokenizer.save(encoder.tokenizer, partial, encoder.max_length)
        write_sentence_transformers(partial, encoder, dim)
        worst = check(partial, encoder, dim, exit, rank)
        card = model_card(encoder, out.name, dim, exit, rank)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return worst


def write_sentence_transformers(directory: Path, encoder: Encoder, dim: int) -> None:
    """modules.json and what it names. Keys and class names are those of 5.0, which later ones map;
    text-embeddings-inference also needs `max_seq_length` and the two first pooling keys."""
    cfg = encoder.model.cfg
    D = cfg.hidden_size
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    layers = dense_layers(encoder, dim)
    modules += [(f"{i}_Dense", "Dense") for i in range(2, 2 + len(layers))]
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{MODULES}.{name}"}
        for i, (path, name) in enumerate(modules)
    ]
    pooling = {
        "word_embedding_dimension": D,
        "pooling_mode_cls_token": cfg.pooling in ("cls", "pooler"),
        "pooling_mode_mean_tokens": cfg.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": cfg.pooling == "last",
        "include_prompt": True,
    }
    settings = {
        "model_type": "SentenceTransformer",
        "__version__": {
            "sentence_transformers": "5.0.0",
            "transformers": "4.57.0",
            "pytorch": "2.11.0",
        },
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    files = {
        "modules.json": listed,
        "sentence_bert_config.json": {"max_seq_length": encoder.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": settings,
        "1_Pooling/config.json": pooling,
    }
    for i, (weights, activation) in enumerate(layers, 2):
        files[f"{i}_Dense/config.json"] = {
            "in_features": D,
            "out_features": len(weights["linear.weight"]),
            "bias": "linear.bias" in weights,
            "activation_function": activation,
        }
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for i, (weights, _) in enumerate(layers, 2):
        save_file(weights, directory / f"{i}_Dense" / "model.safetensors")


def dense_layers(encoder: Encoder, dim: int) -> list[tuple[dict[str, Tensor], str]]:
    """The Dense modules behind pooling, each its weights and its activation's class."""
    model, D = encoder.model, encoder.model.cfg.hidden_size
    layers: list[tuple[dict[str, Tensor], str]] = []
    if model.cfg.pooling == "pooler":
        own = {name: x.detach().float().cpu() for name, x in model.pooler.named_parameters()}
        named = {f"linear.{name}": x.contiguous() for name, x in own.items()}
        layers.append((named, "torch.nn.modules.activation.Tanh"))
    if dim < D:
        cut = {"linear.weight": torch.eye(dim, D)}
        layers.append((cut, "torch.nn.modules.linear.Identity"))
    return layers


def check(directory: Path, encoder: Encoder, dim: int, exit: int, rank: int | None) -> float:
    """Largest difference of any coordinate between our vectors and those of the written directory.

    Read by sentence-transformers as a whole, and by transformers alone with pooling done here.

    Raises:
        ValueError: a difference above 1e-4, or not-a-number.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # The same weights in fp32, eager, by an attention that has it.
    plain = pretrained.cut(encoder.model, encoder.model.cfg.num_hidden_layers, None)
    plain.cfg = replace(plain.cfg, attention="auto")
    plain.to(encoder.model.device).eval()
    ours = replace(encoder, model=plain, bf16=False).encode(PROBES, dim, exit, rank)
    sentence = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    theirs = sentence.encode(list(PROBES), convert_to_numpy=True, show_progress_bar=False)
    hf = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(directory, local_files_only=True)(
        list(PROBES), padding=True, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        read = hf(**{k: tokens[k] for k in ("input_ids", "attention_mask")})
    hidden = read.last_hidden_state
    mask = tokens["attention_mask"]
    rows = torch.arange(len(PROBES))
    pooled = {
        "last": lambda: hidden[rows, mask.sum(1) - 1],
        "cls": lambda: hidden[:, 0],
        "pooler": lambda: read.pooler_output,
        "mean": lambda: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    }[encoder.model.cfg.pooling]()
    alone = F.normalize(pooled[:, :dim], dim=-1).numpy()
    worst = 0.0
    for reader, vectors in (("sentence-transformers", theirs), ("transformers", alone)):
        if vectors.shape != ours.shape:
            raise ValueError(f"{reader}: expected vectors {ours.shape}, read {vectors.shape}")
        difference = float(np.abs(vectors - ours).max())
        if not difference < TOLERANCE:  # also when it is not a number, which max() would drop
            raise ValueError(
                f"{reader}: expected the model's own vectors within {TOLERANCE}, got {difference}"
            )
        worst = max(worst, difference)
    return worst


def model_card(encoder: Encoder, name: str, dim: int, exit: int, rank: int | None) -> str:
    """README.md with the front matter that the hub reads, and how to use the model."""
    cfg = encoder.model.cfg
    bidirectional = ""
    if cfg.style == "qwen3" and not cfg.causal:
        bidirectional = "\nIts attention looks both ways: transformers 5.2 or newer."
    prefixes = ", ".join(str(d) for d in cfg.matryoshka_dims if d <= dim)
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, sentence-similarity, matryoshka, multilingual]
---
# {name}

A multilingual text encoder trained with mlembed: {exit} of {cfg.num_hidden_layers} layers, width
{dim} of {cfg.hidden_size}, vocabulary {f"rank {rank or cfg.ranks[-1]}" if cfg.ranks else "table"}.
Smaller prefixes of its vectors are vectors too ({prefixes}).{bidirectional}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")  # or a local path
vectors = model.encode(["Wednesday, May 4, 2050", "2050 թ. մայիսի 4, չորեքշաբթի"])
```
"""


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
) -> None:
    """Write a cut of a trained model for sentence-transformers and transformers.

    Args:
        model: run, checkpoint or model directory.
        out: new directory.
        dim: width; full by default.
        exit: depth; full by default.
        rank: vocabulary rank; the stored one by default.
    """
    worst = export(Encoder.load(model, "cpu"), out, dim, exit, rank)
    print(f"{out}: read by sentence-transformers and transformers, vectors within {worst:.1e}")


if __name__ == "__main__":
    with log.one_line_errors():
        tyro.cli(main, prog="python -m mlembed.export")
