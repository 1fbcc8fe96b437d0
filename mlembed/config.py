"""One run as a value: frozen dataclasses, named recipes, strict reading of saved ones.

A run's resolved configuration is saved as `config.json`, which `python train.py config.json`
re-runs; `arguments.py` reads what users write behind it.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

NESTING = "mlembed_config.json"  # what a model directory of ours says of its nesting
ML_EMBED_EXITS = (1, 2, 4, 8, 16, 24, 32, 40, 48)  # ML-Embed's released code; the last layer joins


@dataclass(frozen=True)
class Model:
    """Shape and nesting of the encoder (names as in a Hugging Face Qwen3 configuration)."""

    vocab_size: int = 8192
    """Tokens; when the tokenizer is trained here, how many it may learn."""
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 512
    causal: bool = True
    """Each token sees only what precedes it (as Qwen3 does); otherwise the whole text."""
    pooling: Literal["last", "mean", "cls"] = "last"
    """What stands for a text: its last token (EOS), the mean of all tokens, or the first."""
    exits: tuple[int, ...] = ()
    """Depths where texts are pooled, the last = all layers. Empty: 1, 2, 4, 8, 16, 24, .. all."""
    matryoshka_dims: tuple[int, ...] = ()
    """Nested widths, the last = hidden_size. Empty: powers of two from 8, and hidden_size."""
    ranks: tuple[int, ...] = ()
    """Nested ranks of the vocabulary U[:, :r] W[:r]; the last is stored. Empty: a plain table."""
    dropout: float = 0.0
    """In training, the share of what attention and the MLP add to the residual stream that is
    dropped, the rest scaled up."""
    attention: Literal["auto", "triton", "sdpa", "varlen", "flash_attn", "xformers"] = "auto"
    """What computes attention. auto: our Triton on CUDA, torch elsewhere; a name never changes."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            positive(f"model.{name}", getattr(self, name))
        positive("model.intermediate_size", self.intermediate_size)
        L, D = self.num_hidden_layers, self.hidden_size
        if not self.exits:
            exits = tuple(x for x in ML_EMBED_EXITS if x < L) + (L,)
            object.__setattr__(self, "exits", exits)
        if not self.matryoshka_dims:
            powers = tuple(2**i for i in range(3, 15) if 2**i < D)
            object.__setattr__(self, "matryoshka_dims", (*powers, D))
        check_rising("model.exits", self.exits, L, "depth num_hidden_layers")
        check_rising("model.matryoshka_dims", self.matryoshka_dims, D, "width hidden_size")
        if self.ranks:
            check_rising("model.ranks", self.ranks, min(D, self.vocab_size), "width hidden_size")
        if self.exits[-1] != L:
            raise ValueError(
                f"model.exits: expected to end at the last layer {L}, got {self.exits}"
            )
        if self.matryoshka_dims[-1] != D:
            raise ValueError(
                f"model.matryoshka_dims: expected to end at hidden_size {D}, "
                f"got {self.matryoshka_dims}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "model.num_key_value_heads: expected a divisor of num_attention_heads "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected 0..1 (1 excluded), got {self.dropout}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim: expected an even number, got {self.head_dim}")

    def check(
        self, dim: int | None = None, exit: int | None = None, rank: int | None = None
    ) -> None:
        """ValueError for a width, depth or vocabulary rank that a model of this shape lacks."""
        if dim is not None and not 1 <= dim <= self.hidden_size:
            raise ValueError(f"dim: expected 1..{self.hidden_size} (the width), got {dim}")
        if exit is not None and not 1 <= exit <= self.num_hidden_layers:
            raise ValueError(f"exit: expected 1..{self.num_hidden_layers} (the depth), got {exit}")
        if rank is not None and not self.ranks:
            raise ValueError(f"rank: expected none (the vocabulary is a plain table), got {rank}")
        if rank is not None and not 1 <= rank <= self.ranks[-1]:
            raise ValueError(f"rank: expected 1..{self.ranks[-1]} (the stored rank), got {rank}")


def check_rising(name: str, values: Sequence[int], top: int, what: str) -> None:
    """ValueError unless `values` is non-empty, rises strictly, and lies in 1..top."""
    if not values or list(values) != sorted(set(values)) or values[0] < 1:
        raise ValueError(f"{name}: expected rising numbers from 1 on, got {tuple(values)}")
    if values[-1] > top:
        raise ValueError(f"{name}: expected at most the {what} {top}, got {values[-1]}")


@dataclass(frozen=True)
class Loss:
    """The 3D objective: sum over exits and prefixes of w_e w_m loss_em, weights summing to one."""

    temperature: float = 0.05
    symmetric: bool = True
    """Mean of query-to-document and document-to-query; otherwise the first alone."""
    exit_weights: Literal["uniform", "depth"] = "uniform"
    """w_e equal (ML-Embed), or in proportion to the exit's depth."""
    matryoshka_weights: Literal["uniform", "ml-embed"] = "uniform"
    """w_m equal, or ML-Embed's 1 / (n sqrt(D / d)), n counted down from the full width."""
    num_negatives: int = 1
    """Hard negatives drawn per row where the data has them; shared by all queries of the batch."""
    ranks: Literal["sampled", "all"] = "sampled"
    """sampled: one vocabulary rank a step, in proportion to itself (ML-Embed). all: every rank each
    step, weighted by that proportion, which is what sampling estimates, at the cost of as many."""
    negatives_across: Literal["gather", "ring"] = "gather"
    """How other processes' texts become candidates: all at once, or passed around, so that no
    process ever holds more than its own and two others' (one in hand, one arriving)."""
    memory_bank: int = 0
    """Documents of earlier steps, of the batch's source, that are negatives of its queries as well
    (MoCo's queue, arXiv 1911.05722); no gradient reaches them. Whole micro-batches, the newest."""
    bank_on: Literal["device", "host"] = "device"
    """Where these are kept; from pinned host memory they come micro-batch by micro-batch."""

    def __post_init__(self) -> None:
        positive("loss.temperature", self.temperature)
        if self.memory_bank < 0:
            raise ValueError(f"loss.memory_bank: expected 0 or more, got {self.memory_bank}")
        if self.memory_bank and self.ranks == "all":
            raise ValueError("loss.ranks: expected sampled with a memory bank, got all")
        if self.num_negatives < 0:
            raise ValueError(f"loss.num_negatives: expected 0 or more, got {self.num_negatives}")


@dataclass(frozen=True)
class Optim:
    """AdamW; the rate warms up linearly, then falls as a cosine to `min_lr_ratio` of itself."""

    lr: float = 2e-3
    min_lr_ratio: float = 0.05
    warmup_ratio: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    weights: Literal["fp32", "bf16"] = "fp32"
    """fp32 masters, or matrices kept in bf16 alone and rounded stochastically after each step."""

    def __post_init__(self) -> None:
        positive("optim.lr", self.lr)
        positive("optim.max_grad_norm", self.max_grad_norm)
        if self.weight_decay < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                "optim: expected weight_decay of 0 or more and betas in 0..1 (1 excluded), "
                f"got {self.weight_decay} and {self.betas}"
            )
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}: expected 0..1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Depth:
    """How deep each group, a query with its documents, runs in training (layer-skip training)."""

    exits: tuple[int, ...] = ()
    """Depths to leave at, some of model.exits, the last = all layers. Empty: all run to the end."""
    shares: tuple[float, ...] = ()
    """How much of a batch's tokens leaves at each, summing to one. Empty: equal shares."""
    layer_dropout: float = 0.0
    """A text skips layer l of 0..L-1 with probability layer_dropout * S(t) * (2^(l / (L-1)) - 1)
    (LayerSkip, arXiv 2404.16710)."""
    dropout_schedule: Literal["constant", "exponential"] = "constant"
    """S(t) at step t of T: 1, as LayerSkip fine-tunes, or 2^(t / T) - 1, as it pre-trains."""
    curriculum: Literal["none", "rotational", "gradual"] = "none"
    """Exits with a loss at a step, the last always: all of them; every `rotation`-th, the next ones
    at the next step; from the deepest on, all of them after half of the run."""
    rotation: int = 2

    def __post_init__(self) -> None:
        positive("depth.rotation", self.rotation)
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"depth.layer_dropout: expected 0..1, got {self.layer_dropout}")
        if self.shares and len(self.shares) != len(self.exits):
            raise ValueError(
                f"depth.shares: expected one for each of depth.exits {self.exits}, "
                f"got {self.shares}"
            )
        if self.shares and (min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise ValueError(
                f"depth.shares: expected positive numbers that sum to 1, got {self.shares}"
            )


@dataclass(frozen=True)
class Run:
    """Everything `train.py` needs to repeat a run."""

    name: str = "run"
    """The run's directory is OUTPUT_DIR/NAME."""
    output_dir: str = "runs"
    data: tuple[str, ...] = ("cldr",)
    """Training text: `cldr` (built in), or .jsonl / .parquet files or directories of them, holding
    pairs (query, positive, ..) or n-way tables (id, lang, text). Each batch comes from one file."""
    eval: tuple[str, ...] = ("cldr",)
    """What to score: `cldr`, Tatoeba-layout directories, n-way tables, scored pairs (STS csv)."""
    init: str = ""
    """Start from this Qwen3 checkpoint (directory or hub id): weights, shape and tokenizer."""
    init_factors: Literal["uniform", "frequency"] = "uniform"
    """How `init`'s table is factorised: every token alike, or by how often the training text has
    it, so that frequent ones are the nearest."""
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    depth: Depth = field(default_factory=Depth)
    optim: Optim = field(default_factory=Optim)
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 128
    """Pairs a micro-batch, over all processes; each is a negative of all others in it."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a step. It averages gradients; it adds no negatives."""
    max_length: int = 64
    """Tokens a text, EOS included; longer ones are cut, keeping EOS."""
    pack_tokens: int = 131_072
    """Most tokens of one packed forward; queries and documents are packed apart."""
    source_alpha: float = 0.5
    """A batch's source is drawn in proportion to (pairs in it) ** alpha (GTE, section 3.2)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the device multiplies it natively, fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks on both sides of attention; auto: on CUDA."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """What the backward computes again: nothing; every block; as many, from the first on, as keep
    what the others save within `activation_gib`, and of compiled blocks what is element-wise."""
    activation_gib: float = 0.0
    """GiB a process, for what blocks keep for the backward: with selective checkpointing, with the
    gradient cache, or both. 0: as much as a probe finds."""
    gradient_cache: bool = False
    """Encode pack by pack without a graph, take the loss of all, then encode again with one, for
    batches beyond memory (GradCache, arXiv 2101.06983). Packs whose graphs fit `activation_gib`
    keep them, and are encoded once. Loss and gradients are the same."""
    engine: Literal["ddp", "fsdp"] = "ddp"
    """How several processes hold the model: each all of it, or (FSDP2) a shard of weights,
    gradients and moments."""
    cpu_offload: bool = False
    """With fsdp: shards and moments are in host memory, and the optimiser computes there."""
    seed: int = 0
    eval_every: int = 0
    """Score the full size every so many steps; 0 = only at the end."""
    save_every: int = 500
    """Checkpoint every so many steps; 0 = only at the end."""
    keep_checkpoints: int = 2
    save_async: bool = True
    """Write checkpoints while training goes on: only copying to host memory makes it wait."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is no finite number: end the run, or leave the step out. Either
    way weights and moments stay as they were, and the first bad tensor is named."""
    log_every: int = 10
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    resume: bool = False
    """Go on from the run directory's last checkpoint that is whole."""
    allow_changed: tuple[str, ...] = ()
    """Keys whose values may differ from the run's when it goes on, e.g. `steps optim.lr`."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "log_every"):
            positive(name, getattr(self, name))
        for name in ("keep_checkpoints", "pack_tokens"):
            positive(name, getattr(self, name))
        for name in ("eval_every", "save_every", "seed", "activation_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError(f"max_length: expected 2 or more tokens, got {self.max_length}")
        if self.max_length > self.model.max_position_embeddings:
            raise ValueError(
                "max_length: expected at most model.max_position_embeddings "
                f"{self.model.max_position_embeddings}, got {self.max_length}"
            )
        if self.depth.exits:
            where = "model.exits"
            check_rising("depth.exits", self.depth.exits, self.model.exits[-1], where)
            odd = sorted(set(self.depth.exits) - set(self.model.exits))
            if odd or self.depth.exits[-1] != self.model.exits[-1]:
                raise ValueError(
                    f"depth.exits: expected some of {where} {self.model.exits}, the last among "
                    f"them, got {self.depth.exits}"
                )
        if self.optim.weights == "bf16" and self.precision == "fp32":
            raise ValueError("precision: expected bf16 or auto with optim.weights bf16, got fp32")
        if self.optim.weights == "bf16" and self.engine == "fsdp":
            raise ValueError("optim.weights: expected fp32 with engine fsdp, got bf16")
        if self.cpu_offload and self.engine != "fsdp":
            raise ValueError(f"engine: expected fsdp with cpu_offload, got {self.engine}")
        most = self.batch_size * (1 + self.loss.num_negatives)
        if 0 < self.loss.memory_bank < most:
            raise ValueError(
                f"loss.memory_bank: expected 0 or at least the {most} documents of a micro-batch, "
                f"got {self.loss.memory_bank}"
            )
        if self.loss.memory_bank and self.depth.curriculum != "none":
            raise ValueError(
                "depth.curriculum: expected none with loss.memory_bank, as kept documents have the "
                f"exits of their step, got {self.depth.curriculum}"
            )
        if odd_keys := sorted(set(self.allow_changed) - set(flat_keys(Run))):
            raise ValueError(f"allow_changed: no such key {', '.join(odd_keys)}")
        if not self.data:
            raise ValueError("data: expected at least one source, got none")
        if self.name == ".." or not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name: expected a plain directory name, got {self.name!r}")


def positive(name: str, value: float) -> None:
    """ValueError unless value > 0."""
    if not value > 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")


# ---- recipes ----


def tiny() -> Run:
    """3D Matryoshka on CLDR text in two minutes of two CPU cores. All numbers are ours."""
    return Run(
        name="tiny",
        steps=300,
        model=Model(
            vocab_size=4096,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            intermediate_size=512,
            exits=(1, 2, 4),
            matryoshka_dims=(12, 24, 48, 96, 192),
            ranks=(32, 64, 128),
            max_position_embeddings=512,
        ),
    )


def qwen3() -> Run:
    """3D Matryoshka from a Qwen3 checkpoint: `--init DIR`, and `--data` of your own.

    Exits, prefixes, prefix weights, temperature, betas, weight decay, clipping, the learning rate
    1e-5 -> 1e-7 and the stored rank 512 are those of ML-Embed's released code (arXiv 2605.15081);
    batch, length and steps are ours, and so is one softmax over all candidates.
    """
    return Run(
        name="qwen3",
        init="Qwen/Qwen3-0.6B-Base",
        model=Model(hidden_size=1024, ranks=(64, 128, 256, 512), max_position_embeddings=4096),
        loss=Loss(symmetric=False, matryoshka_weights="ml-embed", num_negatives=7),
        optim=Optim(lr=1e-5, min_lr_ratio=0.01),
        steps=10_000,
        max_length=512,
        activation_checkpointing="selective",
    )


RECIPES: dict[str, Callable[[], Run]] = {"tiny": tiny, "qwen3": qwen3}


# ---- shapes of checkpoints ----


def resolve(source: str) -> Path:
    """A local directory as it is; otherwise a hub id, of which only safetensors and json are taken.

    Raises:
        ValueError: neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"model: expected a directory or a hub id, got {source}, which is neither")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client raises many kinds, all of them "not to be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"model: {source} is no local directory, and the hub did not give it: {reason}"
        ) from None


def from_checkpoint(directory: Path, model: Model) -> Model:
    """`model` with the shape of a Qwen3 checkpoint, exits and prefixes by their default rules and
    ranks as far as the width allows; for a directory that mlembed saved, exactly what was saved.
    What computes attention is always `model`'s: it belongs to a machine, not to weights.

    Raises:
        ValueError: no config.json, another architecture, or a variant that `model.py` has not.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"init: expected a checkpoint directory with config.json, got {directory}")
    if (nesting := directory / NESTING).is_file():
        stored = json.loads(nesting.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or "model" not in stored:
            raise ValueError(f"{nesting}: expected an object with key 'model', found none")
        saved = from_dict(Model, stored["model"], str(nesting))
        return dataclasses.replace(saved, attention=model.attention)
    hf = json.loads(path.read_text(encoding="utf-8"))
    if hf.get("model_type") != "qwen3":
        raise ValueError(f"{path}: expected model_type 'qwen3', got {hf.get('model_type')!r}")
    rotary = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rotary
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    layers = hf.get("layer_types")  # transformers 4 wrote none, but three keys that mean the same
    first = hf.get("max_window_layers", 28)
    sliding = hf.get("use_sliding_window") and first < hf.get("num_hidden_layers", 32)
    windows = "sliding_attention" in layers if layers else bool(sliding)
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: expected hidden_act 'silu', got {hf['hidden_act']!r}")
    if kind != "default" or windows or hf.get("attention_bias"):
        raise ValueError(
            f"{path}: expected plain rotary positions, full attention and no attention bias, got "
            f"rope_type {kind!r}, sliding windows {windows}, bias {hf.get('attention_bias')}"
        )
    same = [f.name for f in fields(Model) if f.name in hf and f.name != "rope_theta"]
    theta = rotary.get("rope_theta") or hf.get("rope_theta") or 10_000.0  # Qwen3's own default
    return dataclasses.replace(
        model,
        **{name: hf[name] for name in same},
        rope_theta=float(theta),
        causal=hf.get("is_causal", True),
        exits=(),
        matryoshka_dims=(),
        ranks=tuple(rank for rank in model.ranks if rank <= hf["hidden_size"]),
    )


# ---- from and to json ----


def near(name: str, names: typing.Iterable[str]) -> str:
    """The hint ", near: a, b" of an error about an unknown name, or nothing."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    leaf = name.rpartition(".")[2]
    close += [n for n in names if n.rpartition(".")[2] == leaf and n not in close]
    return f" (near: {', '.join(close)})" if close else ""


def flat_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields, nested dataclasses included."""
    keys = []
    for f, kind in zip(fields(cls), typing.get_type_hints(cls).values(), strict=True):
        nested = isinstance(kind, type) and is_dataclass(kind)
        keys += flat_keys(kind, f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def to_dict(run: Any) -> dict[str, Any]:
    """Nested plain values, tuples as lists: what json gives back."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def load(path: str | Path) -> Run:
    """Read a `config.json`. ValueError for a missing file, bad json, unknown keys, wrong types."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config: expected a file, got {path}, which does not exist") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not json: {error.msg}") from None
    return from_dict(Run, data, str(path))


def from_dict(cls: type, data: Any, where: str) -> Any:
    """Strict inverse of `to_dict`: every key known, every value of its field's type."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ValueError(f"{where}: no such key {key!r}{near(key, hints)}")
    return cls(**{key: _typed(hints[key], value, f"{where}: {key}") for key, value in data.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError(f"{where}: expected {len(inner)} values, got {len(value)}")
        return tuple(_typed(inner[0], item, where) for item in value)
    if origin is Literal and value in inner:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and type(value) is kind:
        return value
    expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise ValueError(f"{where}: expected {expected}, got {value!r}")


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ between two nested dictionaries."""
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield prefix + key
