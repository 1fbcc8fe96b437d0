"""One run as a value: frozen dataclasses, named recipes, strict reading of saved ones.

A run's resolved configuration is saved as `config.json`, which `python train.py config.json`
re-runs; `arguments.py` reads what users write behind it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .model import Model
from .objective import Depth, Distill, Loss, Optim
from .strict import check_rising, flat_keys, from_dict, positive


@dataclass(frozen=True)
class Source:
    """One source of training text, as a mixture file lists them."""

    path: str
    """File, directory, `name` of parallel files name.xx and name.yy, hub id, or `cldr`."""
    name: str = ""
    """In logs and in the draw of its items. Empty: the file's or directory's own."""
    task: Literal["auto", "retrieval", "clustering", "classification", "bitext", "sts"] = "auto"
    """Which loss. auto: bitext for n-way tables and parallel files, retrieval otherwise."""
    weight: float = 1.0
    """With `sampling` weights: its share of the batches, beside the others'."""
    cap: int = 0
    """At most so many items, chosen at random; 0: all."""
    prompt: str = ""
    """Before each query, e.g. "Instruct: Find the answer\\nQuery: "; documents have another."""
    document_prompt: str = ""
    temperature: float = 0.0
    """0: the loss's."""
    num_negatives: int = -1
    """-1: the task's."""
    corpus: str = ""
    """File with the documents (_id or doc_id, text [, title]) that rows name by their ids."""
    subset: str = ""
    """Of a hub id: its configuration."""
    split: str = "train"
    streaming: bool = False
    """Read as it comes, batch by batch, instead of stored and shuffled as a whole."""
    rows: int = 0
    """Of a stream: how many there are, for `sampling` alpha and exhaust."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("source: expected a path, got none")
        for name in ("weight", "temperature", "cap", "rows"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"source {self.path}: {name}: expected 0 or more, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Run:
    """Everything `train.py` needs to repeat a run."""

    name: str = "run"
    """The run's directory is OUTPUT_DIR/NAME."""
    output_dir: str = "runs"
    data: tuple[str, ...] = ("cldr",)
    """Training text: `cldr` (built in); .jsonl, .csv, .tsv, .parquet files or directories of them;
    `name` of parallel files name.xx and name.yy; hub ids; or a mixture, a .json file {"sources":
    [{"path": .., "task": .., "prompt": .., ..}, ..]}. Each batch comes from one source."""
    sources: tuple[Source, ...] = ()
    """What the mixtures among `data` list, filled in from them."""
    eval: tuple[str, ...] = ("cldr",)
    """What to score: `cldr`, Tatoeba-layout directories, n-way tables, scored pairs (STS csv)."""
    init: str = ""
    """Start from this checkpoint (a run, a directory or a hub id): weights, shape, tokenizer."""
    tokenizer: str = ""
    """Without `init`: that of this directory or hub id. Empty: one learnt from the text."""
    init_factors: Literal["uniform", "frequency"] = "uniform"
    """How `init`'s table is factorised: every token alike, or by how often the training text has
    it, so that frequent ones are the nearest."""
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    depth: Depth = field(default_factory=Depth)
    optim: Optim = field(default_factory=Optim)
    distill: Distill = field(default_factory=Distill)
    steps: int = 1000
    """Optimiser steps."""
    epochs: float = 0.0
    """Above 0, instead of `steps`: how often as many items are drawn as there are."""
    batch_size: int = 128
    """Pairs a micro-batch, over all processes; each is a negative of all others in it."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a step. It averages gradients; it adds no negatives."""
    max_length: int = 64
    """Tokens a text, EOS included; longer ones are cut, keeping EOS."""
    pack_tokens: int = 131_072
    """Most tokens of one packed forward; queries and documents are packed apart."""
    sampling: Literal["alpha", "weights", "exhaust"] = "alpha"
    """A batch's source is drawn in proportion to (pairs in it) ** `source_alpha` (GTE, 2308.03281);
    to the weights of `sources`; or to the batches left in it until none has any (ML-Embed)."""
    source_alpha: float = 0.5
    bad_rows: Literal["error", "skip"] = "error"
    """A malformed row ends the run, by file and line; or it is left out, counted and listed."""
    loader_workers: int = -1
    """Processes that make batches ready; -1: two on CUDA, none on a CPU."""
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
        for name in ("eval_every", "save_every", "seed", "activation_gib", "epochs"):
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
        shared = self.loss.hard_negatives == "shared"
        most = self.batch_size * (1 + self.loss.num_negatives * shared)
        if 0 < self.loss.memory_bank < most:
            raise ValueError(
                f"loss.memory_bank: expected 0 or at least the {most} documents of a micro-batch, "
                f"got {self.loss.memory_bank}"
            )
        lone = self.distill.learns == self.distill.between_exits
        if lone and len(self.model.exits) == 1:
            raise ValueError(
                "distill.between_exits: expected another term beside it for a model of one exit, "
                f"got none, with exits {self.model.exits}"
            )
        if odd_keys := sorted(set(self.allow_changed) - set(flat_keys(Run))):
            raise ValueError(f"allow_changed: no such key {', '.join(odd_keys)}")
        if not self.data and not self.sources:
            raise ValueError("data: expected at least one source, got none")
        if self.tokenizer and self.init:
            raise ValueError("tokenizer: expected none with init, which has its own, got both")
        if self.loader_workers < -1:
            raise ValueError(f"loader_workers: expected -1 or more, got {self.loader_workers}")
        for name, nested in (
            ("exit_weights", self.model.exits),
            ("matryoshka_weights", self.model.matryoshka_dims),
        ):
            given = getattr(self.loss, f"custom_{name}")
            if given and len(given) != len(nested):
                raise ValueError(
                    f"loss.custom_{name}: expected {len(nested)}, for {nested}, got {given}"
                )
        if self.name == ".." or not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name: expected a plain directory name, got {self.name!r}")


# ---- from a file ----


def load(path: str | Path) -> Run:
    """Read a `config.json`. ValueError for a missing file, bad json, unknown keys, wrong types."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config: expected a file, got {path}, which does not exist") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not json: {error.msg}") from None
    return from_dict(Run, data, str(path))
