"""A run as a value: frozen dataclasses, saved as `config.json` and read strictly.

`python train.py config.json` repeats a saved run; `training/arguments.py` reads command lines.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..runtime.files import read_json
from .choices import BadRows
from .columns import Columns
from .model import Model
from .objective import TEMPERATURE, Depth, Distill, Lora, Loss, Optim
from .strict import (
    SEED,
    check_number,
    check_numbers,
    check_rising,
    flat_keys,
    from_dict,
    machine,
    number,
)


@dataclass(frozen=True)
class Source:
    """One source of training text, an entry of a mixture file."""

    path: str
    """File, directory, `name` of parallel files name.xx and name.yy, hub id, or `cldr`."""
    name: str = ""
    """Name in logs and in the seed of its draws. Empty: that of the file or directory."""
    task: Literal["auto", "retrieval", "clustering", "classification", "bitext", "sts"] = "auto"
    """Selects the loss. auto: bitext for n-way tables and parallel files, retrieval otherwise."""
    weight: float = number(1.0, least=0, most=1e12)
    """Share of the batches with `sampling` weights, relative to the other sources."""
    cap: int = number(0, least=0, most=10**15)
    """Number of items to choose at random; 0: all."""
    prompt: str = ""
    """Text before each query, e.g. "Instruct: Find the answer\\nQuery: "."""
    document_prompt: str = ""
    temperature: float = number(0.0, least=0, most=TEMPERATURE["most"])
    """0: that of the loss."""
    num_negatives: int = number(-1, least=-1, most=2**16)
    """-1: that of the task."""
    corpus: str = ""
    """File with the documents (_id or doc_id, text [, title]) that rows name by their ids."""
    columns: Columns = field(default_factory=Columns)
    """Columns by role, where their names do not say it."""
    header: bool = True
    """Whether the first row of .csv and .tsv names the columns; else they are "1", "2", .."""
    prompt_format: str = "{}{}"
    """How a row's own prompt and its query become one text."""
    subset: str = ""
    """Configuration of a data set of the Hub."""
    split: str = "train"
    streaming: bool = False
    """Read batch by batch, instead of storing and shuffling the whole source."""
    rows: int = number(0, least=0, most=10**15)
    """Number of rows of a stream, for `sampling` alpha and exhaust."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("source: expected a path, got none")
        if self.prompt_format.count("{}") != 2:
            got = repr(self.prompt_format)
            raise ValueError(f"source {self.path}: prompt_format: expected {{}} twice, got {got}")
        check_numbers(self, f"source {self.path}: ")
        if self.temperature:
            check_number(f"source {self.path}: temperature", self.temperature, float, **TEMPERATURE)


@dataclass(frozen=True)
class Run:
    """Everything `train.py` needs to repeat a run."""

    name: str = "run"
    """The run's directory is OUTPUT_DIR/NAME."""
    output_dir: str = "runs"
    data: tuple[str, ...] = ("cldr",)
    """Training text: `cldr` (built in); .jsonl, .csv, .tsv, .parquet files or directories of them;
    `name` of parallel files name.xx and name.yy; ids of the Hub; or a mixture, a .json file
    {"sources": [{"path": .., "task": .., "prompt": .., ..}, ..]}. A batch comes from one source."""
    columns: Columns = field(default_factory=Columns)
    """Columns by role of the files among `data`, where their names do not say it."""
    header: bool = True
    """Whether the first row of .csv and .tsv among `data` names the columns; else they are numbers,
    from 1 on."""
    sources: tuple[Source, ...] = ()
    """Entries of the mixtures among `data`, filled in from them."""
    eval: tuple[str, ...] = ("cldr",)
    """Evaluation: `cldr`, directories in Tatoeba's format, n-way tables, scored pairs (STS csv)."""
    init: str = ""
    """Start from this checkpoint (run, directory or id of the Hub): weights, shape, tokenizer."""
    tokenizer: str = ""
    """Directory or id of the Hub of a tokenizer, without `init`. Empty: train one on the text."""
    init_tokens: Literal["random", "tokenizer"] = "random"
    """Tokens of a model without `init`: random, or those of the trained model in `tokenizer`, cut
    to the width and weighted by how rare they are in the training text."""
    init_factors: Literal["uniform", "frequency"] = "uniform"
    """Weights of tokens when `init`'s table is factorised: equal, or frequencies, so that frequent
    tokens are approximated best: in the training text, and, half and half, in the text that a
    Unigram tokenizer was trained on."""
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    depth: Depth = field(default_factory=Depth)
    optim: Optim = field(default_factory=Optim)
    lora: Lora = field(default_factory=Lora)
    distill: Distill = field(default_factory=Distill)
    steps: int = number(1000, above=0, most=10**8)
    """Optimiser steps."""
    epochs: float = number(0.0, least=0, most=1e6)
    """Passes over the items, instead of `steps`, if above 0."""
    batch_size: int = number(128, above=0, most=2**24)
    """Pairs of a micro-batch over all processes; each is a negative of all other pairs."""
    gradient_accumulation_steps: int = number(1, above=0, most=10**6)
    """Micro-batches of a step. Their gradients are averaged; they do not share negatives."""
    max_length: int = number(64, least=2, most=2**24)
    """Tokens of a text, EOS included; longer texts are cut and keep EOS."""
    query_max_length: int = number(0, least=0, most=2**24)
    """Tokens of a query in training, if less than `max_length`, which then holds for documents
    alone. 0: like documents."""
    pack_tokens: int = number(131_072, above=0, below=2**31)
    """Most tokens of a packed forward, queries and documents together."""
    sampling: Literal["alpha", "weights", "exhaust"] = "alpha"
    """A batch's source is drawn in proportion to pairs ** `source_alpha` (GTE, 2308.03281), to the
    weights of `sources`, or to remaining batches, until every source is used up (ML-Embed)."""
    source_alpha: float = number(0.5, least=0, most=10)
    bad_rows: BadRows = "error"
    """A malformed row stops the run with its file and line, or is skipped, counted and listed."""
    loader_workers: int = machine(-1, least=-1, most=1024)
    """Processes that prepare batches; -1: two on CUDA, 0 on a CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on devices that multiply bf16 natively, fp32 on others."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = machine("auto")
    """torch.compile of the blocks on both sides of attention; auto: on CUDA."""
    activation_checkpointing: Literal["none", "block", "selective"] = machine("none")
    """Recompute in the backward nothing, every block, or as many first blocks as it takes for the
    others' activations to fit `activation_gib`, and element-wise parts of compiled blocks."""
    activation_gib: float = machine(0.0, least=0, most=2**20)
    """GiB of activations of a process, with selective checkpointing or the gradient cache. 0: as
    much as a probe finds."""
    gradient_cache: bool = machine(False)
    """Encode pack by pack without a graph, compute the loss of all packs, then encode each again
    with its graph, for batches beyond memory (GradCache, arXiv 2101.06983). Packs whose graphs fit
    `activation_gib` are encoded once. Loss and gradients do not change."""
    engine: Literal["ddp", "fsdp"] = machine("ddp")
    """A process holds the whole model, or (FSDP2) a shard of weights, gradients and moments."""
    cpu_offload: bool = machine(False)
    """Keep fsdp's shards and moments in host memory, and update them there."""
    seed: int = number(0, **SEED)
    eval_every: int = number(0, least=0, most=10**8)
    """Steps between scores of the full size; 0: score only at the end."""
    keep_best: str = ""
    """Keep the checkpoint of the highest of these scores, and export its weights at the end: `mean`
    of all tasks, or the name of a task of `eval`. Empty: export the last step's."""
    patience: int = number(0, least=0, most=10**8)
    """Number of scores in a row, none higher than the best, after which the run ends; 0: never."""
    save_every: int = number(500, least=0, most=10**8)
    """Steps between checkpoints; 0: save only at the end."""
    keep_checkpoints: int = number(2, above=0, most=10**8)
    non_finite: Literal["stop", "skip"] = machine("stop")
    """Stop the run at a non-finite loss or gradient, or skip the step. Either way weights and
    moments stay unchanged, and the first bad tensor is named."""
    log_every: int = number(10, above=0, most=10**8)
    profile: int = machine(0, least=0, most=10**8)
    """Steps to trace after the first ones, with named ranges, for Chrome's or Perfetto's viewer;
    nsys sees the ranges, too."""
    tracker: Literal["tensorboard", "wandb", "trackio", "mlflow", "none"] = "tensorboard"
    resume: bool = machine(False)
    """Resume from the newest intact checkpoint of the run's directory."""
    allow_changed: tuple[str, ...] = machine(())
    """Keys that may differ from the saved run when resuming, e.g. `steps optim.lr`; `data.NAME` or
    `eval.NAME` for the text of one source, `data` or `eval` for that of all."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.epochs:
            check_number("epochs", self.epochs, float, least=1e-6)
        # The order of all micro-batches is in memory.
        batches = self.steps * self.gradient_accumulation_steps
        check_number("steps * gradient_accumulation_steps", batches, most=10**9)
        if self.max_length > self.model.max_position_embeddings:
            raise ValueError(
                "max_length: expected at most model.max_position_embeddings "
                f"{self.model.max_position_embeddings}, got {self.max_length}"
            )
        if self.query_max_length == 1 or self.query_max_length > self.max_length:
            raise ValueError(
                f"query_max_length: expected 0, or 2 to max_length {self.max_length}, got "
                f"{self.query_max_length}"
            )
        if self.depth.exits:
            where = "model.exits"
            check_rising("depth.exits", self.depth.exits, self.model.exits[-1], where)
            odd = sorted(set(self.depth.exits) - set(self.model.exits))
            if odd or self.depth.exits[-1] != self.model.exits[-1]:
                raise ValueError(
                    f"depth.exits: expected some of {where} {self.model.exits}, including the "
                    f"last, got {self.depth.exits}"
                )
        if self.depth.layer_dropout and self.model.last_layers:
            raise ValueError(
                "depth.layer_dropout: expected 0 with model.last_layers, "
                f"got {self.depth.layer_dropout}"
            )
        if self.optim.weights == "bf16" and self.precision == "fp32":
            raise ValueError("precision: expected bf16 or auto with optim.weights bf16, got fp32")
        if self.optim.weights == "bf16" and self.engine == "fsdp":
            raise ValueError("optim.weights: expected fp32 with engine fsdp, got bf16")
        if self.cpu_offload and self.engine != "fsdp":
            raise ValueError(f"engine: expected fsdp with cpu_offload, got {self.engine}")
        if self.keep_best and not self.eval_every:
            raise ValueError("eval_every: expected 1 or more with keep_best, got 0")
        if self.patience and not self.keep_best:
            raise ValueError(f"patience: expected 0 without keep_best, got {self.patience}")
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
        keys = [key for key in self.allow_changed if not key.startswith(("data.", "eval."))]
        if odd_keys := sorted(set(keys) - set(flat_keys(Run))):
            raise ValueError(f"allow_changed: no such key {', '.join(odd_keys)}")
        shaping = "model.", "lora."
        if fixed := [key for key in keys if key == "tokenizer" or key.startswith(shaping)]:
            raise ValueError(
                f"allow_changed: expected no key of the model, its adapters or tokenizer, got "
                f"{', '.join(fixed)}; weights have one shape, so begin a new run with another name"
            )
        if not self.data and not self.sources:
            raise ValueError("data: expected at least one source, got none")
        if self.lora.rank and not self.init:
            raise ValueError("init: expected a checkpoint to adapt with lora.rank, got none")
        if self.lora.rank and (stage := self.distill.first_layers):
            raise ValueError(
                "distill.first_layers: expected 0 with lora.rank, which keeps all weights of init, "
                f"got {stage}"
            )
        if self.tokenizer and self.init:
            raise ValueError("tokenizer: expected init or tokenizer, got both")
        if self.init_tokens == "tokenizer" and not self.tokenizer:
            raise ValueError("init_tokens: expected random without a tokenizer, got tokenizer")
        for name, nested in (
            ("exit_weights", self.model.exits),
            ("matryoshka_weights", self.model.matryoshka_dims),
        ):
            given = getattr(self.loss, f"custom_{name}")
            if given and len(given) != len(nested):
                raise ValueError(
                    f"loss.custom_{name}: expected {len(nested)} for {nested}, got {given}"
                )
        plain = Path(self.name).name == self.name != ".." and self.name.isprintable()
        if not (plain and 0 < len(self.name) <= 200):
            raise ValueError(f"name: expected a plain directory name, got {self.name!r}")


def load(path: str | Path) -> Run:
    """Read a `config.json`. ValueError for a missing file, bad json, unknown keys, wrong types."""
    run: Run = from_dict(Run, read_json(Path(path)), str(path))
    return run
