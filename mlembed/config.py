"""One run as a value: frozen dataclasses, named recipes, strict reading of saved ones.

A run's resolved configuration is saved as `config.json`, which `python train.py config.json`
re-runs; `arguments.py` reads what users write behind it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .strict import flat_keys, from_dict

ML_EMBED_EXITS = (1, 2, 4, 8, 16, 24, 32, 40, 48)  # ML-Embed's released code; the last layer joins


@dataclass(frozen=True)
class Model:
    """Shape and nesting of the encoder (names as in Hugging Face configurations)."""

    style: Literal["qwen3", "bert"] = "qwen3"
    """Blocks: RMSNorm before, rotary positions, SwiGLU, no biases; or LayerNorm behind, learned
    positions, GELU, biases."""
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
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    """Tokens of the longest text that there are positions for."""
    position_offset: int = 0
    """Rows of a BERT's position table before position 0: 0, or 2 as RoBERTa and XLM-R have it."""
    type_vocab_size: int = 2
    """Rows of a BERT's segment table, of which the first is added to every token."""
    causal: bool = True
    """Each token sees only what precedes it (as Qwen3 does); otherwise the whole text."""
    pooling: Literal["last", "mean", "cls", "pooler"] = "last"
    """What stands for a text: its last token (EOS), the mean of all tokens, the first ([CLS]), or
    BERT's pooler, tanh of a dense layer over the first."""
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
        if self.style == "bert":
            self._check_bert()
        elif self.pooling == "pooler":
            raise ValueError("model.pooling: expected last, mean or cls without style bert")

    def _check_bert(self) -> None:
        positive("model.type_vocab_size", self.type_vocab_size)
        heads = self.num_attention_heads
        if self.causal:
            raise ValueError("model.causal: expected False with style bert, got True")
        if self.num_key_value_heads != heads or heads * self.head_dim != self.hidden_size:
            raise ValueError(
                "model: expected as many key-value heads as heads, together hidden_size "
                f"{self.hidden_size} wide, with style bert, got {self.num_key_value_heads} and "
                f"{heads} heads of {self.head_dim}"
            )

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
    """Of sources that have none of their own."""
    directions: Literal["query_to_doc", "symmetric", "gte"] = "symmetric"
    """Of retrieval: a softmax over documents; the mean of that and one over queries; or GTE's one
    softmax over both and over pairs of queries and pairs of documents (arXiv 2308.03281, 3.1)."""
    count_positive_twice: bool = True
    """With gte: both sums that hold the positive count it, as the paper prints them."""
    margin: float = 0.0
    """Of bitext: what the positives' cosines are lowered by (LaBSE, arXiv 2007.01852: 0.3)."""
    hard_negatives: Literal["shared", "own", "separate"] = "shared"
    """Of retrieval and bitext: candidates of all queries of the batch; of their own query, in one
    softmax with the others' positives; of their own query, in a softmax of its own whose loss is
    added (ML-Embed's released code)."""
    num_negatives: int = 7
    """Hard negatives drawn per row where the data has them: ML-Embed's numbers, by task."""
    clustering_negatives: int = 9
    classification_negatives: int = 1
    exit_weights: Literal["uniform", "depth", "inverse", "log", "custom"] = "uniform"
    """w_e equal (ML-Embed); in proportion to the exit's depth l; 1 / l (2DMSE, arXiv 2402.14776 v1)
    or 1 / (1 + ln(1 + l)) (ESE, its v3) for all but the last, which weighs 1; or as given."""
    custom_exit_weights: tuple[float, ...] = ()
    matryoshka_weights: Literal["uniform", "ml-embed", "custom"] = "uniform"
    """w_m equal; ML-Embed's 1 / (n sqrt(D / d)), n counted down from the full width; as given."""
    custom_matryoshka_weights: tuple[float, ...] = ()
    normalise_weights: bool = True
    """Weights sum to one. Otherwise prefixes' stay as their rule has them, and so do exits' but for
    `uniform`, which is a mean over exits in ML-Embed as well: the published losses' scale."""
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
        for name in ("num_negatives", "clustering_negatives", "classification_negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("exit_weights", "matryoshka_weights"):
            given = getattr(self, f"custom_{name}")
            if (getattr(self, name) == "custom") != bool(given) or any(w < 0 for w in given):
                raise ValueError(
                    f"loss.custom_{name}: expected numbers of 0 or more with loss.{name} custom, "
                    f"and none otherwise, got {given} with {getattr(self, name)}"
                )
            if given and not sum(given) > 0:
                raise ValueError(f"loss.custom_{name}: expected one above 0, got {given}")
        if not 0 <= self.margin < 2:
            raise ValueError(f"loss.margin: expected 0..2 (2 excluded), got {self.margin}")
        if self.directions == "gte" and (self.negatives_across == "ring" or self.memory_bank):
            raise ValueError(
                "loss.directions: expected query_to_doc or symmetric with a ring or a memory bank, "
                "got gte"
            )


@dataclass(frozen=True)
class Optim:
    """AdamW; the rate warms up linearly, then falls to `min_lr_ratio` of itself."""

    lr: float = 2e-3
    min_lr_ratio: float = 0.05
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup_ratio: float = 0.05
    """Share of the steps; `warmup_steps`, where it is above 0, instead."""
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    weights: Literal["fp32", "bf16"] = "fp32"
    """fp32 masters, or matrices kept in bf16 alone and rounded stochastically after each step."""

    def __post_init__(self) -> None:
        positive("optim.lr", self.lr)
        positive("optim.max_grad_norm", self.max_grad_norm)
        positive("optim.eps", self.eps)
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps: expected 0 or more, got {self.warmup_steps}")
        if self.weight_decay < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                "optim: expected weight_decay of 0 or more and betas in 0..1 (1 excluded), "
                f"got {self.weight_decay} and {self.betas}"
            )
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}: expected 0..1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Distill:
    """What a student learns from a teacher, beside, or instead of, the contrastive loss.

    loss = contrastive L + features F + logits S + between_exits B, each a table over exits and
    prefixes with the weights of L.
    """

    teacher: str = ""
    """Directory or hub id of a sentence-transformers or transformers model, which encodes each
    batch's texts with its own tokenizer."""
    embeddings: str = ""
    """Or a directory of a teacher's vectors, which `python -m mlembed.teacher` wrote."""
    prompt: str = ""
    """What the teacher reads before each query; its documents have none."""
    batch_tokens: int = 16_384
    """Tokens that the teacher encodes at once, padding included."""
    contrastive: float = 1.0
    features: float = 0.0
    """Mean squared difference of the vectors' coordinates."""
    feature_form: Literal["raw", "normalised"] = "raw"
    align: Literal["truncate", "pca", "projection"] = "truncate"
    """How vectors of two widths are compared, at a prefix d: with the teacher's first d coordinates
    (ML-Embed's code); with its first d principal ones; or, by a learnt matrix of which d columns
    are used, in the teacher's space."""
    logits: float = 0.0
    """Difference of the cosines of queries and documents, student's and teacher's."""
    logit_form: Literal["mse", "kl"] = "mse"
    teacher_temperature: float = 0.05
    """Of kl, beside the student's own."""
    exits: Literal["last", "all"] = "last"
    """Which exits have `features` and `logits`."""
    between_exits: float = 0.0
    """`logits` of every other exit towards the last one's, of whole width and without gradient."""

    def __post_init__(self) -> None:
        terms = ("contrastive", "features", "logits", "between_exits")
        if min(getattr(self, name) for name in terms) < 0 or self.learns == 0:
            given = ", ".join(f"{name} {getattr(self, name)}" for name in terms)
            raise ValueError(f"distill: expected weights of 0 or more, one above 0, got {given}")
        positive("distill.teacher_temperature", self.teacher_temperature)
        positive("distill.batch_tokens", self.batch_tokens)
        if self.teacher and self.embeddings:
            raise ValueError("distill.embeddings: expected none with distill.teacher, got both")
        if self.prompt and not self.teacher:
            raise ValueError(
                "distill.prompt: expected none without distill.teacher (stored embeddings have "
                f"theirs), got {self.prompt!r}"
            )
        needs, has = bool(self.features or self.logits), bool(self.teacher or self.embeddings)
        if needs != has:
            raise ValueError(
                "distill: expected a teacher (or its embeddings) with features or logits above 0, "
                f"and none without, got teacher {self.teacher or self.embeddings or 'none'}, "
                f"features {self.features}, logits {self.logits}"
            )

    @property
    def learns(self) -> float:
        """Sum of the terms' weights."""
        return self.contrastive + self.features + self.logits + self.between_exits


TASKS = ("retrieval", "clustering", "classification", "bitext", "sts")


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
    bad_rows: Literal["refuse", "skip"] = "refuse"
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
        if self.loss.memory_bank and self.depth.curriculum != "none":
            raise ValueError(
                "depth.curriculum: expected none with loss.memory_bank, as kept documents have the "
                f"exits of their step, got {self.depth.curriculum}"
            )
        lone = self.distill.learns == self.distill.between_exits
        if lone and (len(self.model.exits) == 1 or self.depth.curriculum != "none"):
            raise ValueError(
                "distill.between_exits: expected another term beside it where a step may have one "
                f"exit, got none, with exits {self.model.exits}, curriculum {self.depth.curriculum}"
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


def positive(name: str, value: float) -> None:
    """ValueError unless value > 0."""
    if not value > 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")


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
