"""Cut a model to one (dim, exit, rank), as the libraries that people run read it.

The directory is a plain Qwen3, BERT or XLM-R model of `exit` layers with the vocabulary merged at
`rank`, and sentence-transformers modules under the names that every version from 5.0 on maps:

    Transformer -> Pooling -> (Dense: BERT's pooler) -> (Dense: the first `dim`) -> Normalize

BERT's pooler is written twice: as the module, and as the model's own for transformers, which gives
it as `pooler_output`. The last Dense module is a 0/1 matrix. `truncate_dim` would do less: readers
before 5.4 ignore it, later ones apply it after Normalize, which leaves vectors shorter than one.
Readers before 5.4 also take the space around a text away, after its prompt; we and later ones keep
it.

config.json has what text-embeddings-inference requires beside what transformers does: the id of
EOS, `initializer_range`, and which way attention looks in its own word. That is by its source; it
has not been run on such a directory.

Format onnx adds onnx/model.onnx (to_onnx.py). There is no GGUF: PyPI's `gguf` writes such files,
but what turns a model into one lives in llama.cpp's repository alone.
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import Model
from ..data import tokenizer
from ..inference.encoder import Encoder
from ..modeling import pretrained
from ..modeling.transformer import Transformer
from ..runtime.files import atomic_directory
from . import model_card, to_onnx

MODULES = "sentence_transformers.models"
FORMATS = "sentence-transformers", "onnx"
TOLERANCE = 1e-5
SHARD = 5_000_000_000  # bytes of the largest file of weights, as the hub's own libraries have it
LONGEST = 512  # tokens of the longest probe: the 40,960 that Qwen3 allows take a CPU hours
PROBES = (  # several scripts and lengths, an empty text, what is in no vocabulary
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
    """Write the cut model to `out`, once its vectors were checked; -> their largest difference.

    At most two copies of the model are in memory: its own, and the cut or one reader's.

    Args:
        dim: 1..width; full by default. exit: 1..depth. rank: 1..stored.
        formats: of FORMATS; the directory is always one for sentence-transformers.
        source: what the encoder was loaded from; of a run, the model card says how it came to be.
        license: of the weights, as the hub spells it ("apache-2.0"), for the model card.
        repo: of the hub ("me/small-model"), where the card's snippets are to find it.

    Raises:
        ValueError: a dim, exit or rank that the model lacks, another format, `out` without a name
            or not empty, vectors that differ, packages for onnx that are missing.
    """
    if not out.name:
        raise ValueError(f"out: expected a new directory with a name of its own, got {out}")
    cfg = encoder.model.cfg
    dim = cfg.hidden_size if dim is None else dim
    exit = cfg.num_hidden_layers if exit is None else exit
    cfg.check(dim, exit, rank)
    check_formats(formats, out)
    of = model_card.find_origin(source)
    with atomic_directory(out) as partial:
        pretrained.save(pretrained.cut(encoder.model, exit, rank), partial)
        split(partial, SHARD)
        tokenizer.save(encoder.tokenizer, partial, encoder.max_length)
        complete_config(partial, encoder)
        write_sentence_transformers(partial, encoder, dim)
        with quiet():
            if "onnx" in formats:
                to_onnx.write(partial)
            worst = check(partial, encoder, dim, exit, rank)
        made = model_card.Cut(out.name, dim, exit, rank, tuple(formats), repo)
        text = model_card.write(encoder, made, of, license)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return worst


def check_formats(formats: Sequence[str], out: Path) -> None:
    """ValueError where one is not of FORMATS, or its packages are missing."""
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
    """Where model.safetensors has more than `most` bytes, files of at most that many, or of one
    tensor, and an index of them, as transformers reads it. One file's tensors are in memory."""
    whole = directory / "model.safetensors"
    if whole.stat().st_size <= most:
        return
    with safe_open(whole, framework="pt") as tensors:
        shards: list[list[str]] = [[]]
        room = total = 0
        for name in tensors.keys():
            size = 4 * int(np.prod(tensors.get_slice(name).get_shape()))  # pretrained.save: fp32
            total += size
            if shards[-1] and room < size:
                shards.append([])
            room = (room if shards[-1] else most) - size
            shards[-1].append(name)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            some = {name: tensors.get_tensor(name) for name in names}
            save_file(some, directory / file, metadata={"format": "pt"})
    whole.unlink()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / f"{whole.name}.index.json", index)


def complete_config(directory: Path, encoder: Encoder) -> None:
    """Add to config.json what text-embeddings-inference reads there, and transformers need not."""
    cfg, path = encoder.model.cfg, directory / "config.json"
    eos = tokenizer.special_tokens(encoder.tokenizer)["eos_token"]
    more: dict[str, Any] = {"eos_token_id": encoder.tokenizer.token_to_id(eos)}
    if cfg.style == "bert":
        more["initializer_range"] = 0.02
    elif not cfg.causal:
        more["use_bidirectional_attention"] = True
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | more)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        # MTEB asks for these two by name; text-embeddings-inference takes nothing but strings.
        "prompts": {"query": "", "document": ""} | encoder.prompts,
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
        write_json(directory / name, content)
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


# ---- as others read it ----


def check(directory: Path, encoder: Encoder, dim: int, exit: int, rank: int | None) -> float:
    """Largest difference of any coordinate between our vectors, by the whole model stopped at
    `exit`, and those of the written directory: read by sentence-transformers, by transformers alone
    with pooling done here, and by onnxruntime where there is a graph.

    Raises:
        ValueError: a difference above 1e-5, or above what fp32 itself is off (`noise`), or
            not-a-number; a reader that allows texts of another length.
    """
    limit = min(encoder.max_length, LONGEST)
    ours = replace(encoder, model=plain(encoder.model), bf16=False, max_length=limit)
    texts = [*PROBES, " ".join([PROBES[2]] * limit)]  # the last is longer than any may be
    expected = ours.encode(texts, dim, exit, rank)
    worst, allowed = 0.0, TOLERANCE

    def compare(reader: str, vectors: np.ndarray) -> None:
        nonlocal worst, allowed
        if vectors.shape[-2:] != expected.shape:
            got = vectors.shape[-2:]
            raise ValueError(f"{reader}: expected vectors {expected.shape}, read {got}")
        difference = float(np.abs(vectors - expected).max())
        if not difference < allowed:
            allowed = max(allowed, noise(ours, texts, expected, dim, exit, rank))
        if not difference < allowed:  # also when it is not a number, which max() would drop
            raise ValueError(
                f"{reader}: expected the model's own vectors within {allowed:.1e}, got {difference}"
            )
        worst = max(worst, difference)

    compare("sentence-transformers", by_sentence_transformers(directory, encoder, ours, texts))
    compare("transformers", by_transformers(directory, ours, texts))
    if (directory / to_onnx.FILE).is_file():
        compare("onnxruntime", by_onnxruntime(directory, ours, texts))
    return worst


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers draws no bars and reports no weights that nothing reads: a pooler's."""
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
    """The same weights in fp32, eager, by an attention that has it; those that are fp32 already are
    the model's own, not copies."""
    with torch.device("meta"):
        same = Transformer(replace(model.cfg, attention="auto"))
    same.load_state_dict({n: w.float() for n, w in model.state_dict().items()}, assign=True)
    return same.eval()


def noise(
    ours: Encoder,
    texts: Sequence[str],
    expected: np.ndarray,
    dim: int,
    exit: int,
    rank: int | None,
) -> float:
    """What two readers may differ by in fp32: four times what ours is off from float64, as both err
    and in another order of sums by more. 0 where that is so much, or not a number, that nothing
    could be told. Only deep or badly conditioned models need it.
    """
    exact = replace(ours, model=plain(ours.model).double()).encode(texts, dim, exit, rank)
    off = float(np.abs(exact - expected).max())
    return 4 * off if off < 1e-3 else 0.0


def by_sentence_transformers(
    directory: Path, encoder: Encoder, ours: Encoder, texts: list[str]
) -> np.ndarray:
    """-> [N, dim]. ValueError where it allows texts of another length than `encoder`, or puts
    something else before a text than a prompt."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    if model.max_seq_length != encoder.max_length:
        raise ValueError(
            f"sentence-transformers: expected texts of {encoder.max_length} tokens, got "
            f"{model.max_seq_length}"
        )
    model.max_seq_length = ours.max_length
    vectors = model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
    for name, prompt in encoder.prompts.items():
        by_name = model.encode(texts[:2], prompt_name=name, show_progress_bar=False)
        behind = model.encode([prompt + t for t in texts[:2]], show_progress_bar=False)
        if not np.array_equal(by_name, behind):
            raise ValueError(
                f"sentence-transformers: expected prompt {name!r} to be {prompt!r}, got "
                f"{model.prompts.get(name)!r}"
            )
    return vectors


def tokens_of(directory: Path, ours: Encoder, texts: list[str], kind: str) -> dict[str, Any]:
    """input_ids and attention_mask by transformers' own tokenizer, padded as it pads."""
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokens = reader(
        texts, padding=True, truncation=True, max_length=ours.max_length, return_tensors=kind
    )
    return {name: tokens[name] for name in to_onnx.INPUTS}


def by_transformers(directory: Path, ours: Encoder, texts: list[str]) -> np.ndarray:
    """As one would without sentence-transformers -> [N, dim]."""
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
    """Of the vectors of a written directory: its last Dense module's, or the model's."""
    layers = sorted(directory.glob("*_Dense/config.json"))
    return json.loads(layers[-1].read_text())["out_features"] if layers else cfg.hidden_size


def by_onnxruntime(directory: Path, ours: Encoder, texts: list[str]) -> np.ndarray:
    """-> [2, N, dim]: in one padded batch, and one by one."""
    return to_onnx.read(directory, tokens_of(directory, ours, texts, "np"))


# ---- the command ----


def push(directory: Path, repo: str, private: bool) -> str:
    """Make a new repository of the hub and upload the directory, in one commit; -> its address.

    Raises:
        ValueError: no token, no network, a repository of that name, a card that the hub refuses.
    """
    from huggingface_hub import HfApi, ModelCard

    try:
        # Asked first, as an upload asks it last: with a repository made, and left empty.
        ModelCard.load(directory / "README.md").validate()
        api = HfApi()
        address = api.create_repo(repo, private=private)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message=f"mlembed {repo}")
    except Exception as error:  # the hub's client raises many kinds
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        again = f"hf upload {repo} {directory}{' --private' if private else ''}"
        raise ValueError(
            f"push-to-hub: {repo} was not uploaded: {reason}; {directory} is complete, and goes "
            f"there by `hf auth login`, then `{again}`"
        ) from None
    return str(address)
