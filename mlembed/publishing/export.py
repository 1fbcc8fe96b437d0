"""Cut a model to one (dim, exit, rank) and write it in the form that other libraries read.

The directory is a plain Qwen3, BERT or XLM-R model of `exit` layers with the vocabulary merged at
`rank`, and sentence-transformers modules under names that every version from 5.0 on maps:

    Transformer -> Pooling -> (Dense: BERT's pooler) -> (Dense: the first `dim`) -> Normalize

BERT's pooler is written twice: as the module, and as the model's own pooler, whose output
transformers returns as `pooler_output`. The last Dense module is a 0/1 matrix. `truncate_dim` would
do less: readers before 5.4 ignore it, later ones apply it after Normalize, which leaves vectors
shorter than one. Readers before 5.4 also strip the space around a text, after its prompt; mlembed
and later readers keep it.

config.json also has what text-embeddings-inference requires: the id of EOS, `initializer_range`,
and its own key for bidirectional attention. This follows its source; it has not been run.

Format onnx adds onnx/model.onnx (to_onnx.py). GGUF is left to llama.cpp, whose repository has the
only converter.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import Model
from ..data import tokenizer
from ..inference.encoder import Encoder
from ..modeling import pretrained
from ..modeling.transformer import Transformer
from ..runtime import files, model_files
from . import to_onnx

MODULES = "sentence_transformers.models"
FORMATS = "sentence-transformers", "onnx"
TOLERANCE = 1e-5
SHARD = 5_000_000_000  # Bytes of the largest file of weights, like transformers.
LONGEST = 512  # Tokens of the longest probe: Qwen3's 40,960 take hours on a CPU.
# Several scripts and lengths, an empty text, a character in no vocabulary.
PROBES = (
    "Wednesday, May 4, 2050",
    "2050 թ. մայիսի 4, չորեքշաբթի",
    "বুধবার, ৪ মে, ২০৫০ এবং আরও কয়েকটি শব্দ যা এই লেখাটিকে দীর্ঘ করে তোলে",
    "比利时、哈萨克斯坦或赞比亚",
    "in 1 hour 🙂",
    "",
    "a",
    "  space around \n",
    "الأربعاء، ٤ مايو ٢٠٥٠",
)


def export(
    encoder: Encoder,
    out: Path,
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
    *,
    formats: Sequence[str] = FORMATS[:1],
    source: str = "",
    license: str = "",
    repo: str = "",
) -> float:
    """Write the cut model to `out` and check its vectors; return their largest difference.

    At most two copies of the model are in memory: its own, and the cut or one reader's.

    Args:
        dim, exit, rank: 1 to the width, depth and stored rank, which are the defaults.
        formats: of FORMATS; the directory is always one for sentence-transformers.
        source: path or hub id of the encoder; a run's model card says how the model was made.
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
    origin = model_card.find_origin(source)
    with files.atomic_directory(out) as partial:
        write_model(partial, encoder, dim, exit, rank)
        model_files.check_model(partial)
        with quiet():
            if "onnx" in formats:
                to_onnx.write(partial)
            worst = check(partial, encoder, dim, exit, rank)
        cut = model_card.Cut(out.name, dim, exit, rank, tuple(formats), repo)
        card = model_card.write(encoder, cut, origin, license)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return worst


def write_model(directory: Path, encoder: Encoder, dim: int, exit: int, rank: int | None) -> None:
    """Write weights, tokenizer and modules to a directory that exists, unchecked."""
    pretrained.save(pretrained.cut(encoder.model, exit, rank), directory)
    split(directory, SHARD)
    tokenizer.save(encoder.tokenizer, directory, encoder.max_length)
    complete_config(directory, encoder)
    write_sentence_transformers(directory, encoder, dim)


def check_formats(formats: Sequence[str], out: Path) -> None:
    """Raise ValueError if a format is not one of FORMATS, or a package for it is missing."""
    for name in formats:
        if name == "gguf":
            raise ValueError(
                f"format: expected {' or '.join(FORMATS)}, got gguf, which llama.cpp makes of the "
                f"exported directory: python convert_hf_to_gguf.py {out}, in its repository"
            )
        if name not in FORMATS:
            raise ValueError(f"format: expected {' or '.join(FORMATS)}, got {name}")
    if "onnx" in formats:
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


def complete_config(directory: Path, encoder: Encoder) -> None:
    """Add the keys to config.json that text-embeddings-inference requires."""
    cfg, path = encoder.model.cfg, directory / "config.json"
    eos = tokenizer.special_tokens(encoder.tokenizer)["eos_token"]
    keys: dict[str, Any] = {"eos_token_id": encoder.tokenizer.token_to_id(eos)}
    if cfg.style == "bert":
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

    Keys and class names are those of 5.0, which later versions map. text-embeddings-inference also
    requires `max_seq_length` and the first two pooling keys.
    """
    cfg, layers = encoder.model.cfg, dense_layers(encoder, dim)
    dense = [f"{i}_Dense" for i in range(2, 2 + len(layers))]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *((path, "Dense") for path in dense)]
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    pooling = {
        "cls_token": cfg.pooling in ("cls", "pooler"),
        "mean_tokens": cfg.pooling == "mean",
        "max_tokens": False,
        "mean_sqrt_len_tokens": False,
        "weightedmean_tokens": False,
        "lasttoken": cfg.pooling == "last",
    }
    versions = {"sentence_transformers": "5.0.0", "transformers": "4.57.0", "pytorch": "2.11.0"}
    contents: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{MODULES}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": encoder.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "__version__": versions,
            # MTEB asks for these two by name; text-embeddings-inference reads strings only.
            "prompts": {"query": "", "document": ""} | encoder.prompts,
            "default_prompt_name": next(
                (n for n, p in encoder.prompts.items() if p == encoder.default_prompt), None
            ),
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": cfg.hidden_size,
            **{f"pooling_mode_{mode}": on for mode, on in pooling.items()},
            "include_prompt": True,
        },
    }
    for path, (weights, activation) in zip(dense, layers, strict=True):
        contents[f"{path}/config.json"] = {
            "in_features": cfg.hidden_size,
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
    if dim < model.cfg.hidden_size:
        weights = {"linear.weight": torch.eye(dim, model.cfg.hidden_size)}
        layers.append((weights, "torch.nn.modules.linear.Identity"))
    return layers


# ---- other readers ----


def check(directory: Path, encoder: Encoder, dim: int, exit: int, rank: int | None) -> float:
    """Return the largest difference between vectors of the whole model, stopped at `exit`, and of
    the written directory.

    Its readers are sentence-transformers, transformers with pooling done here, and onnxruntime if
    there is a graph.

    Raises:
        ValueError: a difference that is NaN, or above 1e-5 and above fp32's own error (`noise`); a
            reader that allows texts of another length, or has another prompt.
    """
    limit = min(encoder.max_length, LONGEST)
    ours = replace(encoder, model=plain(encoder.model), bf16=False, max_length=limit)
    # The last text is longer than the limit.
    texts = [*PROBES, " ".join([PROBES[2]] * limit)]
    expected = ours.encode(texts, dim, exit, rank, prompt="")
    worst, allowed = 0.0, TOLERANCE

    def compare(reader: str, vectors: np.ndarray) -> None:
        nonlocal worst, allowed
        if vectors.shape[-2:] != expected.shape:
            got = vectors.shape[-2:]
            raise ValueError(f"{reader}: expected vectors {expected.shape}, read {got}")
        difference = float(np.abs(vectors - expected).max())
        # A NaN is not below anything.
        if not difference < allowed:
            allowed = max(allowed, noise(ours, texts, expected, dim, exit, rank))
        if not difference < allowed:
            raise ValueError(
                f"{reader}: expected the model's own vectors within {allowed:.1e}, got {difference}"
            )
        worst = max(worst, difference)

    compare("sentence-transformers", read_by_sentence_transformers(directory, encoder, ours, texts))
    compare("transformers", read_by_transformers(directory, ours, texts))
    if (directory / to_onnx.FILE).is_file():
        compare("onnxruntime", read_by_onnxruntime(directory, ours, texts))
    return worst


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, and its reports of weights that no reader uses."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def plain(model: Transformer) -> Transformer:
    """Return the model in fp32, eager, with an attention that supports it.

    Weights that are fp32 already are shared with `model`.
    """
    with torch.device("meta"):
        same = Transformer(replace(model.cfg, attention="auto"))
    same.load_state_dict({n: w.float() for n, w in model.state_dict().items()}, assign=True)
    return same.eval()


def noise(ours: Encoder, texts: Sequence[str], expected: np.ndarray, *size: int | None) -> float:
    """Return the difference that fp32 allows between two readers: four times our own error.

    Our error is the distance to float64; a reader errs as well, and sums in another order. An error
    that is NaN or above 1e-3 allows nothing, as it would hide a wrong reader. Only deep or badly
    conditioned models need this allowance.
    """
    exact = replace(ours, model=plain(ours.model).double()).encode(texts, *size, prompt="")
    error = float(np.abs(exact - expected).max())
    return 4 * error if error < 1e-3 else 0.0


def read_by_sentence_transformers(
    directory: Path, encoder: Encoder, ours: Encoder, texts: list[str]
) -> np.ndarray:
    """Return vectors [N, dim]. ValueError if the length limit or a prompt is not the encoder's."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    if model.max_seq_length != encoder.max_length:
        raise ValueError(
            f"sentence-transformers: expected texts of {encoder.max_length} tokens, got "
            f"{model.max_seq_length}"
        )
    model.max_seq_length = ours.max_length
    vectors = model.encode(texts, prompt="", show_progress_bar=False)
    for name, prompt in encoder.prompts.items():
        by_name = model.encode(texts[:2], prompt_name=name, show_progress_bar=False)
        prompted = model.encode([prompt + t for t in texts[:2]], prompt="", show_progress_bar=False)
        if not np.array_equal(by_name, prompted):
            raise ValueError(
                f"sentence-transformers: expected prompt {name!r} to be {prompt!r}, got "
                f"{model.prompts.get(name)!r}"
            )
    return vectors


def tokens_of(directory: Path, ours: Encoder, texts: list[str], kind: str) -> dict[str, Any]:
    """Return input_ids and attention_mask of transformers' tokenizer, padded."""
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokens = reader(
        texts, padding=True, truncation=True, max_length=ours.max_length, return_tensors=kind
    )
    return {name: tokens[name] for name in to_onnx.INPUTS}


def read_by_transformers(directory: Path, ours: Encoder, texts: list[str]) -> np.ndarray:
    """Return vectors [N, dim], pooled and cut here."""
    from transformers import AutoModel

    hf = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
    tokens = tokens_of(directory, ours, texts, "pt")
    with torch.inference_mode():
        read = hf(**tokens)
    hidden, mask = read.last_hidden_state, tokens["attention_mask"]
    pooled = {
        "last": lambda: hidden[torch.arange(len(texts)), mask.sum(1) - 1],
        "cls": lambda: hidden[:, 0],
        "pooler": lambda: read.pooler_output,
        "mean": lambda: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    }[ours.model.cfg.pooling]()
    return F.normalize(pooled[:, : width(directory, ours.model.cfg)], dim=-1).numpy()


def width(directory: Path, cfg: Model) -> int:
    """Return the width of a written directory's vectors: the last Dense module's or the model's."""
    layers = sorted(directory.glob("*_Dense/config.json"))
    return files.read_json(layers[-1])["out_features"] if layers else cfg.hidden_size


def read_by_onnxruntime(directory: Path, ours: Encoder, texts: list[str]) -> np.ndarray:
    """Return vectors [2, N, dim]: of one padded batch, and of each text alone."""
    return to_onnx.read(directory, tokens_of(directory, ours, texts, "np"))


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
