"""Named runs, each a complete configuration: `python train.py NAME`.

Docstrings tell which numbers are the paper's, which its released code's, and which ours if neither
has one (arXiv 2605.15081 and 2603.19223 ML-Embed, 2302.08387 LEALLA with 2007.01852 LaBSE,
2308.03281 GTE). The `init` of a second stage is the directory of the first.
"""

from collections.abc import Callable
from dataclasses import replace

from .model import Model
from .objective import Distill, Loss, Optim
from .run import Run
from .shapes import SHAPES, nested

# ---- ours ----


def tiny() -> Run:
    """Train a small 3D Matryoshka model on built-in CLDR text. All numbers are ours.

    `make train`, installation included, took 5:46 min on two CPU cores that have bf16 arithmetic,
    and 6:59 min on two that do not.
    """
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
    """3D Matryoshka from any Qwen3 checkpoint: `--init DIR`, and `--data` of your own.

    Exits, prefixes, prefix weights, temperature, betas, weight decay, clipping, the learning rate
    1e-5 -> 1e-7 and the stored rank 512 are those of ML-Embed's released code (arXiv 2605.15081);
    batch, length, steps and the single softmax over all candidates are ours.
    """
    return Run(
        name="qwen3",
        init="Qwen/Qwen3-0.6B-Base",
        model=Model(hidden_size=1024, ranks=(64, 128, 256, 512), max_position_embeddings=4096),
        loss=Loss(directions="query_to_doc", matryoshka_weights="ml-embed"),
        optim=Optim(lr=1e-5, min_lr_ratio=0.01),
        steps=10_000,
        max_length=512,
        activation_checkpointing="selective",
    )


def elastic(
    init: str = "intfloat/multilingual-e5-small", source: Model = SHAPES["multilingual-e5-small"]
) -> Run:
    """Make a trained embedding model elastic: `--init DIR`, and `--data` of any text.

    All numbers are ours (bench/LOG.md, elastic), and all dimensions are those of ML-Embed
    (arXiv 2605.15081). The model teaches itself: at every exit, prefix and rank, the softmax of a
    text's cosines with the batch's other texts is to be that of the source, at a temperature so low
    that near texts decide. Translations and answers of pairs are among these texts. The deepest
    exit also learns the source's hidden states of every token, and before training the first layers
    alone do. Every exit ends with the source's last layers, the vocabulary starts from an SVD by
    token frequency, and the numbers of the tokens stay. The rate is 2e-4 at width 384 and falls
    with the width.

    Args:
        init: the model to start from, which is the teacher too.
        source: its shape.
    """
    return Run(
        name="elastic",
        init=init,
        init_factors="frequency",
        model=nested(source),
        loss=Loss(temperature=0.02, ranks="inversely"),
        optim=Optim(lr=2e-4 * 384 / source.hidden_size, weight_decay=0.0, freeze_tokens=True),
        distill=Distill(
            teacher=init,
            contrastive=0.0,
            logits=1.0,
            logit_form="kl",
            teacher_temperature=0.02,
            exits="all",
            hidden=3.0,
            first_layers=0.3,
        ),
        steps=1000,
        batch_size=64,
        max_length=min(128, source.max_position_embeddings),
    )


# ---- ML-Embed ----

# Learning rates of F2LLM for 0.6B, 1.7B and 4B (arXiv 2510.02294; its v2 code has 8e-6 at 4B too).
# Those of 8B and of the pruned shapes are not known: ours are the nearest size's.
ML_EMBED_RATES = {
    "80m": 1e-5,
    "140m": 1e-5,
    "160m": 1e-5,
    "330m": 1e-5,
    "0.6b": 1e-5,
    "1.7b": 9e-6,
    "4b": 8e-6,
    "8b": 8e-6,
}


def ml_embed(size: str, stage: int) -> Run:
    """ML-Embed: width, depth and vocabulary rank nested, from Qwen3 (arXiv 2605.15081).

    The paper: two stages, the first on retrieval pairs without instructions, the second, which
    starts from the first, on retrieval, clustering and classification with instructions. Its data
    have to be given. The released code: exits 1, 2, 4, 8, 16, 24, .., L with equal weights;
    prefixes 8, 16, .. D and their weights; a softmax over the batch's positives for retrieval plus
    one over a query's own 7, 9 or 1 negatives; temperature 0.05; ranks up to 512 drawn in
    proportion; two epochs that use up every source; 1024 tokens; AdamW of betas 0.9, 0.98 and decay
    0.01; a cosine to 1e-7; clipping at 1. Batch 512, warm-up 500 and rates are F2LLM's, or ours
    for sizes whose rates are not known (`ML_EMBED_RATES`). Ours are also: weights that sum to one
    (`--loss.no-normalise-weights` for the code's), negatives drawn for each row, gradients to the
    documents of all processes, and equal numbers in both stages.

    From 0.6B up the first stage starts from Qwen3's base models. 80M, 160M and 330M are pruned from
    a trained 0.6B, like F2LLM-v2's (how is not known; `mlembed prune`). 140M is 160M with a nested
    vocabulary; 160M is the only size without one (`config/shapes.py`: ours, as the paper's
    arithmetic is not known).

    The released code distils at every exit and the full width alone, from the raw vectors of a
    teacher cut to the student's width: MSE(queries) + MSE(positives) + MSE(hard negatives), added
    with weight 1. `--distill.teacher DIR --distill.features 1 --distill.feature-form ml-embed` is
    exactly that.
    """
    shape = SHAPES[f"ml-embed-{size}"]
    ranks = shape.ranks or tuple(r for r in (64, 128, 256, 512) if r < shape.hidden_size)
    if size == "160m":  # With a nested vocabulary it is the 140M.
        ranks = ()
    name = f"ml-embed-{size}"
    pruned = size.endswith("m")
    first = f"./models/{name}" if pruned else f"Qwen/Qwen3-{size.upper()}-Base"
    rate = ML_EMBED_RATES[size]
    return Run(
        name=f"{name}-stage{stage}",
        init=first if stage == 1 else f"./runs/{name}-stage1",
        model=replace(shape, ranks=ranks),
        loss=Loss(
            directions="query_to_doc", hard_negatives="separate", matryoshka_weights="ml-embed"
        ),
        optim=Optim(lr=rate, min_lr_ratio=1e-7 / rate, warmup_steps=500),
        epochs=2,
        batch_size=512,
        max_length=1024,
        sampling="exhaust",
        gradient_cache=True,
        activation_checkpointing="selective",
    )


# ---- LEALLA ----


def lealla(size: str) -> Run:
    """LEALLA: a thin and deep student of LaBSE for bitext (arXiv 2302.08387).

    The paper: shapes, and LaBSE as the teacher of both vectors and similarities. Its formulas,
    weights, rates, batch and steps are not known. LaBSE's released code: margin 0.3 and scale 100
    (temperature 0.01), both directions; batch 4096, at most 32 tokens, 500,000 steps, AdamW of
    betas 0.9, 0.999, epsilon 1e-5, no decay, 5,000 steps of warm-up, then a line from 1e-4 to 0,
    clipping at 100, dropout 0.1. Ours: mean instead of sum of the directions, both distillations
    with weight 1, normalised vectors against the teacher's principal components, which the paper
    motivates (reduced LaBSE is as good), and random weights to start from. A layer of the small or
    base size is so little work that launching it takes longer, so that one pack holds a whole batch
    of 2 x 4096 texts of 32 tokens: at most 44 and 65 GiB of graphs. The large size, 78 GiB, takes
    two packs.

    `--distill.embeddings DIR` takes vectors that `mlembed teacher` wrote.
    """
    shape = SHAPES[f"lealla-{size}"]
    flat = replace(
        shape,
        exits=(shape.num_hidden_layers,),
        matryoshka_dims=(shape.hidden_size,),
        dropout=0.1,
    )
    return Run(
        name=f"lealla-{size}",
        tokenizer="sentence-transformers/LaBSE",
        model=flat,
        loss=Loss(temperature=0.01, margin=0.3),
        distill=Distill(
            teacher="sentence-transformers/LaBSE",
            features=1.0,
            feature_form="normalised",
            align="pca",
            logits=1.0,
        ),
        optim=Optim(
            lr=1e-4,
            min_lr_ratio=0.0,
            schedule="linear",
            warmup_steps=5000,
            betas=(0.9, 0.999),
            eps=1e-5,
            weight_decay=0.0,
            max_grad_norm=100.0,
        ),
        steps=500_000,
        batch_size=4096,
        max_length=32,
        pack_tokens=131_072 if size == "large" else 262_144,
        gradient_cache=True,
    )


def lealla_3d(size: str) -> Run:
    """LEALLA's student, nested like ML-Embed (arXiv 2302.08387 with 2605.15081).

    87 to 93 % of LEALLA's parameters are vocabulary. `lealla-*`, and ours: exits at each quarter of
    the depth, prefixes from 32 on, ranks from an eighth to half of the width, distillation at every
    exit and prefix, and from the last exit to the inner ones.
    """
    run = lealla(size)
    D, L = run.model.hidden_size, run.model.num_hidden_layers
    nested = replace(
        run.model,
        exits=(L // 4, L // 2, 3 * L // 4, L),
        matryoshka_dims=tuple(d for d in (32, 64, 128) if d < D) + (D,),
        ranks=(D // 8, D // 4, D // 2),
    )
    distill = replace(run.distill, exits="all", between_exits=1.0)
    return replace(run, name=f"{run.name}-3d", model=nested, distill=distill)


def lealla_mini(teacher: str = "intfloat/multilingual-e5-small") -> Run:
    """LEALLA's student for two CPU cores, nested, of any teacher (arXiv 2302.08387).

    The paper: 24 layers of width 128, and a student that learns from translations and from a
    teacher's similarities. All other numbers are ours. Tokens start from the teacher's, cut to the
    width, and stay as they are; layers are random. Blocks are Qwen3's without the causal mask,
    because BERT's gave all texts one vector within a few steps of random weights. The KL divergence
    has the teacher's softmax at temperature 0.02, because cosines of many teachers lie close
    together. No margin.

    `--tokenizer DIR --distill.teacher DIR` names the teacher, and `--data` translations.
    """
    return Run(
        name="lealla-mini",
        tokenizer=teacher,
        init_tokens="tokenizer",
        model=Model(
            vocab_size=SHAPES["multilingual-e5-small"].vocab_size,
            hidden_size=128,
            num_hidden_layers=24,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=384,
            causal=False,
            pooling="mean",
            exits=(6, 12, 18, 24),
            matryoshka_dims=(16, 32, 64, 128),
            ranks=(32, 64, 96),
        ),
        distill=Distill(
            teacher=teacher,
            logits=1.0,
            logit_form="kl",
            teacher_temperature=0.02,
            exits="all",
        ),
        optim=Optim(lr=5e-4, freeze_tokens=True),
        steps=2000,
        batch_size=64,
        max_length=64,
        sampling="weights",
    )


# ---- GTE ----

# The model to start from and the first stage's rate, from the paper's table 3.
GTE_STARTS = {
    "small": ("microsoft/MiniLM-L12-H384-uncased", 3e-4),
    "base": ("google-bert/bert-base-uncased", 2e-4),
    "large": ("google-bert/bert-large-uncased", 5e-5),
}


def gte(size: str, supervised: bool) -> Run:
    """GTE: one loss of four parts, in two stages (arXiv 2308.03281).

    The paper, for both stages: mean pooling, no prompts, temperature 0.01, the joint softmax with
    the positive counted twice, batches of one source drawn by n^0.5, AdamW, 5 % warm-up and a line.
    Unsupervised: pairs alone, batch 16,384 of 128 tokens, 50,000 steps. Supervised, from there:
    batch 128 of groups of 16 (15 negatives) and 512 tokens, a tenth of the rate, one epoch. Ours:
    bf16 for its fp16, betas 0.9, 0.999 and decay 0.01, clipping at 1, the second stage's warm-up,
    a line to 0, and the gradient cache, which changes no number.
    """
    start, rate = GTE_STARTS[size]
    shape = SHAPES[f"gte-{size}"]
    flat = replace(
        shape,
        pooling="mean",
        exits=(shape.num_hidden_layers,),
        matryoshka_dims=(shape.hidden_size,),
    )
    name = f"gte-{size}"
    run = Run(
        name=f"{name}-unsupervised",
        init=start,
        model=flat,
        loss=Loss(temperature=0.01, directions="gte", num_negatives=0),
        optim=Optim(lr=rate, min_lr_ratio=0.0, schedule="linear", betas=(0.9, 0.999)),
        steps=50_000,
        batch_size=16_384,
        max_length=128,
        gradient_cache=True,
        activation_checkpointing="selective",
    )
    if not supervised:
        return run
    return replace(
        run,
        name=f"{name}-supervised",
        init=f"./runs/{name}-unsupervised",
        loss=replace(run.loss, num_negatives=15),
        optim=replace(run.optim, lr=rate / 10),
        epochs=1,
        batch_size=128,
        max_length=512,
    )


def _all() -> dict[str, Callable[[], Run]]:
    named: dict[str, Callable[[], Run]] = {"tiny": tiny, "qwen3": qwen3, "elastic": elastic}

    def add(name: str, make: Callable[..., Run], *args: object) -> None:
        def recipe() -> Run:
            return make(*args)

        recipe.__doc__ = make.__doc__
        named[name] = recipe

    for size in ML_EMBED_RATES:
        for stage in (1, 2):
            add(f"ml-embed-{size}-stage{stage}", ml_embed, size, stage)
    for size in ("small", "base", "large"):
        add(f"lealla-{size}", lealla, size)
        add(f"lealla-{size}-3d", lealla_3d, size)
    add("lealla-mini", lealla_mini)
    for size in GTE_STARTS:
        add(f"gte-{size}-unsupervised", gte, size, False)
        add(f"gte-{size}-supervised", gte, size, True)
    return named


RECIPES = _all()
