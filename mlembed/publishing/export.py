"""Cut a model to one (dim, exit, rank) and write it in the form that other libraries read.

The directory is a plain model of transformers, a Qwen3, a BERT, an XLM-R or the architecture that
the model began with, of `exit` layers with the vocabulary merged at `rank`, and
sentence-transformers modules under names that every version from 5.0 on maps:

    Transformer -> Pooling -> (Dense: BERT's pooler, or EmbeddingGemma's linear layers)
    -> (Dense: the first `dim`) -> Normalize

BERT's pooler is written twice: as the module, and as the model's own pooler, whose output
transformers returns as `pooler_output`. The last Dense module is a 0/1 matrix. `truncate_dim` would
do less: readers before 5.4 ignore it, later ones apply it after Normalize, which leaves vectors
shorter than one. Readers before 5.4 also strip the space around a text, after its prompt; mlembed
and later readers keep it.

config.json also has what servers read (docs/serving.md): the widths that vLLM cuts to on request,
and what text-embeddings-inference requires, the id of EOS, `initializer_range` and its own key for
bidirectional attention. This follows their sources; no server has been run.

Format onnx adds onnx/model.onnx, onnx-int8 also onnx/model_quantized.onnx (to_onnx.py). GGUF is
left to llama.cpp, whose repository has the only converter.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data import tokenizer
from ..inference.encoder import Encoder, FullSize
from ..inference.vector_files import RANGES
from ..modeling import pretrained, serving
from ..runtime import files, model_files
from . import probes, to_onnx

if TYPE_CHECKING:
    from .model_card import Origin

FORMATS = "sentence-transformers", "onnx", "onnx-int8"
SHARD = 5_000_000_000  # Bytes of the largest file of weights, like transformers.


def export(
    encoder: Encoder,
    out: Path,
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
    *,
    formats: Sequence[str] = FORMATS[:1],
    source: "str | Origin" = "",
    license: str = "",
    repo: str = "",
) -> probes.Report:
    """Write the cut model to `out` and compare its vectors; return the largest differences.

    At most two copies of the model are in memory: its own, and the cut or one reader's.

    Args:
        dim, exit, rank: 1 to the width, depth and stored rank, which are the defaults.
        formats: of FORMATS; the directory is always one for sentence-transformers.
        source: path or hub id of the encoder, whose run's model card says how the model was made;
            or the origin itself.
        license: of the weights, in the hub's spelling ("apache-2.0"), for the model card.
        repo: on the hub ("me/small-model"), which the card's snippets then name.

    Raises:
        ValueError: a dim, exit, rank or format that does not exist, `out` without a name or not
            empty, vectors that differ, missing packages for onnx.
    """
    if not out.name:
        raise ValueError(f"out: expected a new directory with a name of its own, got {out}")
    cfg = encoder.model.cfg
    dim = encoder.full_size()[0] if dim is None else dim
    exit = cfg.num_hidden_layers if exit is None else exit
    cfg.check(dim, exit, rank)
    from . import model_card

    check_formats(formats, out)
    origin = model_card.find_origin(source) if isinstance(source, str) else source
    with files.atomic_directory(out) as partial:
        write_model(partial, encoder, dim, exit, rank)
        model_files.check_model(partial)
        with probes.quiet():
            if {"onnx", "onnx-int8"} & {*formats}:
                to_onnx.write(partial)
            if "onnx-int8" in formats:
                to_onnx.quantise(partial)
            report = probes.check(partial, encoder, dim, exit, rank)
        write_ranges(partial, origin.grid, (dim, exit, rank or max(cfg.ranks, default=None)))
        cut = model_card.Cut(out.name, dim, exit, rank, tuple(formats), repo)
        card = model_card.write(encoder, cut, origin, license)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return report


def write_model(directory: Path, encoder: Encoder, dim: int, exit: int, rank: int | None) -> None:
    """Write weights, tokenizer and modules to a directory that exists, unchecked."""
    pretrained.save(pretrained.cut(encoder.model, exit, rank), directory)
    split(directory, SHARD)
    tokenizer.save(encoder.tokenizer, directory, encoder.max_length)
    complete_config(directory, encoder, dim)
    write_sentence_transformers(directory, encoder, dim)


def write_ranges(directory: Path, grid: Mapping[str, Any], size: FullSize) -> None:
    """Write the ranges in which a run's evaluation scored vectors of this size as int8.

    The file is what `mlembed encode --ranges` and sentence-transformers take, fp32 [2, dim]. Runs
    whose vectors were not scored as int8 have none.
    """
    for cell in grid.get("cells", []):
        if (cell["dim"], cell["exit"], cell["rank"]) == size and "int8_range" in cell:
            low_high = np.array(cell["int8_range"], np.float32)[:, None]
            files.save_array(directory / RANGES, np.repeat(low_high, size[0], axis=1))


def check_formats(formats: Sequence[str], out: Path) -> None:
    """Raise ValueError if a format is not one of FORMATS, or a package for it is missing."""
    expected = f"format: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    for name in formats:
        if name == "gguf":
            raise ValueError(
                f"{expected}, got gguf, which llama.cpp makes of the exported directory: "
                f"python convert_hf_to_gguf.py {out}, in its repository"
            )
        if name not in FORMATS:
            raise ValueError(f"{expected}, got {name}")
    if {"onnx", "onnx-int8"} & {*formats}:
        to_onnx.require()


def split(directory: Path, most: int) -> None:
    """Split model.safetensors into files of at most `most` bytes, with an index, if it is larger.

    Its tensors are mapped, not read, so one file's tensors are in memory at a time.
    """
    whole = directory / "model.safetensors"
    if whole.stat().st_size > most:
        weights = load_file(whole)
        whole.unlink()
        save_torch_state_dict(weights, directory, max_shard_size=most)


def complete_config(directory: Path, encoder: Encoder, dim: int) -> None:
    """Add the keys to config.json that servers read."""
    cfg, path = encoder.model.cfg, directory / "config.json"
    eos = tokenizer.special_tokens(encoder.tokenizer)["eos_token"]
    keys: dict[str, Any] = {
        "eos_token_id": encoder.tokenizer.token_to_id(eos),
        "matryoshka_dimensions": [*(d for d in cfg.matryoshka_dims if d < dim), dim],
    }
    model: Any = encoder.model
    if cfg.style == "transformers":
        keys["architectures"] = [model.kind]
    elif cfg.style == "bert":
        keys["initializer_range"] = 0.02
    elif not cfg.causal:
        keys["use_bidirectional_attention"] = True
    write_json(path, files.read_json(path) | keys)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and the directory that it is in."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sentence_transformers(directory: Path, encoder: Encoder, dim: int) -> None:
    """Write modules.json and the modules that it names.

    Class names are those of 5.0, which later versions map. text-embeddings-inference also requires
    `max_seq_length` and the first two pooling keys.
    """
    cfg, layers = encoder.model.cfg, dense_layers(encoder, dim)
    dense = [f"{i}_Dense" for i in range(2, 2 + len(layers))]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *((path, "Dense") for path in dense)]
    if encoder.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    pooling = {
        "cls_token": cfg.pooling in ("cls", "pooler"),
        "mean_tokens": cfg.pooling == "mean",
        "max_tokens": False,
        "mean_sqrt_len_tokens": False,
        "weightedmean_tokens": False,
        "lasttoken": cfg.pooling == "last",
    }
    contents: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{serving.MODULES}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        **serving.of(encoder).files(),
        "1_Pooling/config.json": {
            "word_embedding_dimension": cfg.hidden_size,
            **{f"pooling_mode_{mode}": on for mode, on in pooling.items()},
            "include_prompt": True,
        },
    }
    for path, (weights, activation) in zip(dense, layers, strict=True):
        contents[f"{path}/config.json"] = {
            "in_features": weights["linear.weight"].shape[1],
            "out_features": len(weights["linear.weight"]),
            "bias": "linear.bias" in weights,
            "activation_function": activation,
        }
    for name, content in contents.items():
        write_json(directory / name, content)
    for path, (weights, _) in zip(dense, layers, strict=True):
        save_file(weights, directory / path / "model.safetensors")


def dense_layers(encoder: Encoder, dim: int) -> list[tuple[dict[str, Tensor], str]]:
    """Return the weights of each Dense module after pooling, and its activation's class."""
    model, layers = encoder.model, list[tuple[dict[str, Tensor], str]]()
    if model.cfg.pooling == "pooler":
        weights = {
            f"linear.{name}": weight.detach().float().cpu().contiguous()
            for name, weight in model.pooler.named_parameters()
        }
        layers.append((weights, "torch.nn.modules.activation.Tanh"))
    for weight in model.dense.parameters():
        weights = {"linear.weight": weight.detach().float().cpu().contiguous()}
        layers.append((weights, "torch.nn.modules.linear.Identity"))
    if dim < model.cfg.hidden_size:
        weights = {"linear.weight": torch.eye(dim, model.cfg.hidden_size)}
        layers.append((weights, "torch.nn.modules.linear.Identity"))
    return layers


# ---- the hub ----


def push(directory: Path, repo: str, private: bool) -> str:
    """Create a repository on the hub and upload the directory in one commit; return its address.

    Raises:
        ValueError: a missing token or network, a repository that exists, a card that the hub
            rejects.
    """
    from huggingface_hub import HfApi, ModelCard

    try:
        # An upload validates the card last, and would leave an empty repository.
        ModelCard.load(directory / "README.md").validate()
        api = HfApi()
        address = api.create_repo(repo, private=private)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message=f"mlembed {repo}")
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        again = f"hf upload {repo} {directory}{' --private' if private else ''}"
        raise ValueError(
            f"push-to-hub: {repo} was not uploaded: {reason}; {directory} is complete: run "
            f"`hf auth login`, then `{again}`"
        ) from None
    return str(address)
