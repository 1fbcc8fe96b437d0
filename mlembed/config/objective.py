"""The objective of a run: loss, distillation, depth, optimiser, adapters."""

from dataclasses import dataclass
from typing import Literal

from .model import DEEPEST, WIDEST
from .strict import check_numbers, machine, number

# Bounds of temperatures: cosines are divided by them, in fp32, and above them softmaxes are flat.
TEMPERATURE = {"least": 1e-4, "most": 100}
# Bounds of the weights of terms.
WEIGHT = {"least": 0, "most": 1e6}
LEAST = 1e-6  # Terms whose weights are all below it would teach nothing.


@dataclass(frozen=True)
class Loss:
    """The 3D objective: sum over exits and prefixes of w_e w_m loss_em, weights summing to one."""

    temperature: float = number(0.05, **TEMPERATURE)
    """Temperature of sources without their own."""
    directions: Literal["query_to_doc", "symmetric", "gte"] = "symmetric"
    """Softmax of retrieval: over documents; the mean of that and one over queries; or GTE's single
    softmax over both, over pairs of queries and pairs of documents (arXiv 2308.03281, 3.1)."""
    count_positive_twice: bool = True
    """Count the positive in both sums that hold it, like the formula in GTE's paper."""
    margin: float = number(0.0, least=0, below=2)
    """Subtracted from the positives' cosines of bitext (LaBSE, arXiv 2007.01852: 0.3)."""
    hard_negatives: Literal["shared", "own", "separate"] = "shared"
    """Hard negatives of retrieval and bitext. shared: candidates of all queries of the batch; own:
    of their own query, in one softmax with the batch's positives; separate: of their own query, in
    a second softmax whose loss is added (ML-Embed's released code)."""
    num_negatives: int = number(7, least=0, most=2**16)
    """Hard negatives drawn for a row, if the data has any; ML-Embed's numbers for each task."""
    clustering_negatives: int = number(9, least=0, most=2**16)
    classification_negatives: int = number(1, least=0, most=2**16)
    exit_weights: Literal["uniform", "depth", "inverse", "log", "custom"] = "uniform"
    """w_e of an exit of depth l: equal (ML-Embed); proportional to l; 1 / l (2DMSE, 2402.14776 v1)
    or 1 / (1 + ln(1 + l)) (ESE, its v3), for all exits but the last, which weighs 1; or
    `custom_exit_weights`."""
    custom_exit_weights: tuple[float, ...] = number((), **WEIGHT)
    matryoshka_weights: Literal["uniform", "ml-embed", "custom"] = "uniform"
    """w_m of a prefix. uniform: equal; ml-embed: 1 / (n sqrt(D / d)), n counting down from the full
    width; custom: `custom_matryoshka_weights`."""
    custom_matryoshka_weights: tuple[float, ...] = number((), **WEIGHT)
    normalise_weights: bool = True
    """Scale the weights to sum to one. Otherwise the rules above give them, except that `uniform`
    stays a mean over exits, like in ML-Embed: the scale of the published losses."""
    ranks: Literal["sampled", "evenly", "inversely", "all"] = "sampled"
    """sampled: one vocabulary rank a step, drawn in proportion to itself (ML-Embed). evenly: one,
    all equally probable. inversely: one, in proportion to 1 / rank, for a vocabulary that starts
    from an SVD, whose small ranks have most to learn. all: every rank in a pass of its own,
    weighted in proportion to itself, which `sampled` estimates."""
    negatives_across: Literal["gather", "ring"] = machine("gather")
    """Exchange candidates between processes all at once, or in a ring, in which a process holds its
    own candidates and those of two others at most (in use, and arriving)."""
    memory_bank: int = number(0, least=0, most=2**31)
    """Number of documents of earlier steps, of the same source, that are further negatives (MoCo's
    queue, arXiv 1911.05722), without gradient. Holds the newest whole micro-batches."""
    bank_on: Literal["device", "host"] = machine("device")
    """Memory of the bank; pinned host memory is copied micro-batch by micro-batch."""
    hardness: float = number(0.0, **WEIGHT)
    """Weigh negatives by exp(hardness cos): it adds `hardness` times its cosine, as a constant, to
    the logit of every negative (arXiv 2503.04812, 9 there; EmbeddingGemma, 2509.20354, 5)."""
    quantise: Literal["none", "int8", "binary"] = "none"
    """Train vectors to be stored in bytes or bits: the loss also has a part in which every number
    is one of 255 steps or a sign, and gradients pass the rounding unchanged (straight-through,
    arXiv 1308.3432)."""
    quantise_weight: float = number(0.5, above=0, most=1)
    """Share of that part in the loss; the rest is the loss of the vectors as they are."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.")
        if self.memory_bank and self.ranks == "all":
            raise ValueError("loss.ranks: expected one rank a step with a memory bank, got all")
        if self.memory_bank and self.quantise != "none":
            raise ValueError(
                f"loss.quantise: expected none with a memory bank, got {self.quantise}"
            )
        for name in ("exit_weights", "matryoshka_weights"):
            given = getattr(self, f"custom_{name}")
            if (getattr(self, name) == "custom") != bool(given):
                raise ValueError(
                    f"loss.custom_{name}: expected numbers with loss.{name} custom and no numbers "
                    f"otherwise, got {given} with {getattr(self, name)}"
                )
            if given and max(given) < LEAST:
                raise ValueError(f"loss.custom_{name}: expected one above 0, got {given}")
        if self.directions == "gte" and (self.negatives_across == "ring" or self.memory_bank):
            raise ValueError(
                "loss.directions: expected query_to_doc or symmetric with a ring or a memory bank, "
                "got gte"
            )


@dataclass(frozen=True)
class Optim:
    """The rate warms up linearly, then falls to `min_lr_ratio` of itself, or stays."""

    lr: float = number(2e-3, least=1e-12, most=10)
    name: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon for the matrices of the layers, AdamW for all else. Its updates have
    AdamW's size (arXiv 2502.16982), so rates and weight decay stay what they are."""
    min_lr_ratio: float = number(0.05, least=0, most=1)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm-up, a constant rate, and a decay by the square root of its steps (MiniCPM, arXiv
    2404.06395; Haegele et al., 2405.18392), so that a run may be prolonged from before its decay.
    constant: no decay."""
    decay_ratio: float = number(0.2, above=0, most=1)
    """Share of the steps in which wsd decays, at most those after the warm-up."""
    warmup_ratio: float = number(0.05, least=0, most=1)
    """Share of the steps; `warmup_steps`, if it is above 0, takes precedence."""
    warmup_steps: int = number(0, least=0, most=10**8)
    betas: tuple[float, float] = number((0.9, 0.98), least=0, below=1)
    momentum: float = number(0.95, least=0, below=1)
    """Share of the last momentum in the next, for muon."""
    eps: float = number(1e-8, least=1e-30, most=1)
    weight_decay: float = number(0.01, least=0, most=10)
    max_grad_norm: float = number(1.0, least=1e-12, most=1e9)
    ema: float = number(0.0, least=0, below=1)
    """Decay of moving averages of the weights, which are then scored and exported instead of the
    last step's. 0: none."""
    layer_decay: float = number(1.0, above=0, most=1)
    """Factor of the rate from each layer to the one before it (layer-wise decay, ULMFiT, arXiv
    1801.06146). The tokens' is one below the first layer's; norm, pooler and dense layers have the
    last one's."""
    freeze_tokens: bool = False
    """Leave the table of the tokens as it is, of a nested vocabulary U. W and all else is trained,
    and a step takes neither gradients nor moments of the largest matrix of many models."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """fp32 master weights, or matrices in bf16 alone, rounded stochastically after each step."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim.")
        if self.weights == "bf16" and (self.name == "muon" or self.ema):
            name = "muon" if self.name == "muon" else "ema"
            raise ValueError(f"optim.weights: expected fp32 with {name}, got bf16")


@dataclass(frozen=True)
class Lora:
    """Adapters of low rank by peft (LoRA, arXiv 2106.09685): W x + alpha / rank B A x, W frozen.

    All weights of `init` are frozen but U and W of a nested vocabulary.
    """

    rank: int = number(0, least=0, most=WIDEST)
    """Rank of A and B of each target. 0: no adapters, all weights are trained."""
    alpha: int = number(0, least=0, most=2**20)
    """0: twice the rank."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the linear layers to adapt, e.g. `q_proj v_proj`. Empty: all of them in
    attention and MLP."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora.")
        if not self.rank and (self.alpha or self.targets):
            raise ValueError("lora.rank: expected 1 or more with lora.alpha or lora.targets, got 0")
        object.__setattr__(self, "alpha", self.alpha or 2 * self.rank)

    @property
    def scale(self) -> float:
        """Return alpha / rank, 0 without adapters."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class Distill:
    """Distillation from a teacher, in addition to the contrastive loss or instead of it.

    loss = contrastive L + features F + logits S + between_exits B + scores C + hidden H; the first
    five are tables over exits and prefixes with the weights of L.
    """

    teacher: str = ""
    """Directory or hub id of a sentence-transformers or transformers model, which encodes each
    batch's texts with its own tokenizer, in the run's precision if mlembed supports it."""
    embeddings: str = ""
    """Directory of a teacher's vectors, written by `mlembed teacher`, instead of `teacher`."""
    prompt: str = ""
    """Text before each query of the teacher; its documents have no prompt."""
    keep: bool = False
    """Keep the teacher's vectors in memory, rounded to fp16, so that later epochs encode nothing.
    Each process holds 2 bytes a coordinate and about 200 a text; a resumed run encodes again."""
    contrastive: float = number(1.0, **WEIGHT)
    features: float = number(0.0, **WEIGHT)
    """Mean squared difference of the vectors' coordinates."""
    feature_form: Literal["raw", "normalised", "ml-embed"] = "raw"
    """The vectors as they are; normalised; or the distillation of ML-Embed's released code: at
    every exit and the full width alone, means over queries, positives and negatives, added."""
    align: Literal["truncate", "pca", "projection"] = "truncate"
    """Compare a prefix of width d with the teacher's first d coordinates (ML-Embed), with its
    first d principal components, or in the teacher's space, by d columns of a learnt matrix."""
    logits: float = number(0.0, **WEIGHT)
    """Difference of the cosines of queries and documents, student's and teacher's."""
    logit_form: Literal["mse", "kl"] = "mse"
    teacher_temperature: float = number(0.05, **TEMPERATURE)
    """Temperature of the teacher's softmax with kl."""
    exits: Literal["last", "all"] = "last"
    """Exits at which `features` and `logits` apply."""
    between_exits: float = number(0.0, **WEIGHT)
    """Weight of `logits` from every other exit to the last, at full width, without its gradient."""
    scores: float = number(0.0, **WEIGHT)
    """Difference from a teacher's scores of a query with its positive and its own hard negatives,
    which the data hold, at every exit and prefix. Queries without scores have no part in it."""
    score_form: Literal["kl", "margin"] = "kl"
    """kl: of the softmax over a query's own documents, at the loss's temperature. margin: mean
    squared difference of the margins between positive and negatives (MarginMSE, arXiv 2010.02666),
    of cosines, so at most 2."""
    score_temperature: float = number(1.0, **TEMPERATURE)
    """The teacher's scores are divided by it."""
    hidden: float = number(0.0, **WEIGHT)
    """Relative squared difference of the hidden states of every token, before the last layers, for
    a teacher of the student's width and tokenizer, which then reads the student's tokens. It needs
    another term."""
    first_layers: float = number(0.0, least=0, most=1)
    """Steps before training in which the vocabulary and the first sixth of the layers alone learn
    the hidden states of such a teacher, as a part of `steps`; each costs a fraction of a step."""

    def __post_init__(self) -> None:
        check_numbers(self, "distill.")
        if self.learns < LEAST:
            terms = ("contrastive", "features", "logits", "between_exits", "scores")
            given = ", ".join(f"{name} {getattr(self, name)}" for name in terms)
            raise ValueError(f"distill: expected weights of 0 or more, one above 0, got {given}")
        if self.feature_form == "ml-embed" and self.align != "truncate":
            raise ValueError(
                f"distill.align: expected truncate with feature_form ml-embed, got {self.align}"
            )
        if self.teacher and self.embeddings:
            raise ValueError("distill.embeddings: expected none with distill.teacher, got both")
        if self.prompt and not self.teacher:
            raise ValueError(
                "distill.prompt: expected none without distill.teacher (stored embeddings have "
                f"theirs), got {self.prompt!r}"
            )
        if self.keep and not self.teacher:
            raise ValueError("distill.keep: expected False without distill.teacher, got True")
        if self.hidden and (self.embeddings or self.prompt or self.keep):
            raise ValueError(
                "distill.hidden: expected 0 with distill.embeddings, prompt or keep (the teacher "
                f"reads the student's tokens at every step), got {self.hidden}"
            )
        if self.first_layers and not self.hidden:
            got = self.first_layers
            raise ValueError(f"distill.first_layers: expected 0 without distill.hidden, got {got}")
        needs = bool(self.features or self.logits or self.hidden)
        has = bool(self.teacher or self.embeddings)
        if needs != has:
            raise ValueError(
                "distill: expected a teacher (or its embeddings) with features, logits or hidden "
                "above 0, and none without, got teacher "
                f"{self.teacher or self.embeddings or 'none'}, features {self.features}, "
                f"logits {self.logits}, hidden {self.hidden}"
            )

    @property
    def learns(self) -> float:
        """Sum of the weights of the tables; `hidden` only adds to them."""
        tables = self.contrastive + self.features + self.logits
        return tables + self.between_exits + self.scores


TUNING_LR = 1e-4  # Above it AdamW spoils weights that are trained already.
TASKS = ("retrieval", "clustering", "classification", "bitext", "sts")


@dataclass(frozen=True)
class Depth:
    """How deep each group, a query with its documents, runs in training (layer-skip training)."""

    exits: tuple[int, ...] = number((), above=0, most=DEEPEST)
    """Depths to leave at, some of model.exits, the last = all layers. Empty: all run to the end."""
    shares: tuple[float, ...] = number((), least=0, most=1)
    """How much of a batch's tokens leaves at each, summing to one. Empty: equal shares."""
    layer_dropout: float = number(0.0, least=0, below=1)
    """A text skips layer l of 0..L-1 with probability layer_dropout * (2^(l / (L-1)) - 1), as in
    LayerSkip's fine-tuning (arXiv 2404.16710)."""

    def __post_init__(self) -> None:
        check_numbers(self, "depth.")
        if self.shares and len(self.shares) != len(self.exits):
            raise ValueError(
                f"depth.shares: expected one for each of depth.exits {self.exits}, "
                f"got {self.shares}"
            )
        if self.shares and (min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise ValueError(
                f"depth.shares: expected positive numbers that sum to 1, got {self.shares}"
            )
