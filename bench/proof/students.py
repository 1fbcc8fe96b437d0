"""python -m bench students MODEL=DIR DATA=DIR OUT=DIR: students of a real model on real text.

LEALLA's student is thin and deep, starts from random layers, and learns translations with MODEL as
its teacher (the recipe lealla-mini). ML-Embed's pair of stages starts from MODEL, in the shape that
the recipe elastic gives it, and learns retrieval, then retrieval and entailment with instructions
(the recipe ml-embed-80m). Every model is scored at its exits, prefixes and ranks, like in `bench
proof`. OUT holds every trained model and every score, so the same command continues where a stopped
one was, and at last students.json and students.md.

    MODEL      directory of a sentence-transformers model
    DATA       directory with train/*.parquet and eval/, like for `bench proof`
    SOURCE     a sentence that says what the model is; else the first of its README
    MINUTES    training of lealla-mini (60); a stage runs two epochs instead
    SEEDS      one seed (0)
    LANGUAGES  codes that recipes were chosen on, which no score contains
    PAIRS      most pairs of a language of bitext (200)

--list prints what is done and what is left, and runs nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlembed.config import recipes
from mlembed.config.model import Model
from mlembed.config.shapes import nested
from mlembed.modeling import hf_config
from mlembed.runtime import files

from . import command, plan
from .plan import Piece
from .settings import Proof

LEALLA, STAGES = "lealla-mini", ("stage1", "stage2")
# Files of DATA/train/, and the share of the batches that each gets.
TRANSLATIONS = {
    "bible": 0.25,
    "nllb_seed": 0.25,
    "stories": 0.15,
    "aosp_ui": 0.15,
    "opensource_guide": 0.1,
    "tldr_parallel": 0.1,
}
QUESTIONS = "qa_jaquad_ja", "qa_cmrc_zh", "qa_arcd_ar", "qa_afriqa"
ASKED = "Instruct: Given a question, retrieve passages that answer it\nQuery: "
ENTAILS = "Instruct: Given a sentence, retrieve a sentence that it entails\nQuery: "
DESCRIBED = "Instruct: Given a description, retrieve a command that fits it\nQuery: "
# Ours, for two cores and a trained encoder; all else is the recipe's.
LENGTH = 96
OPTIONS = (
    "--optim.lr 5e-5 --optim.warmup-steps 25 --optim.freeze-tokens --batch-size 64 "
    "--no-gradient-cache --activation-checkpointing none --loss.ranks evenly "
    "--init-factors frequency --distill.features 1 --distill.feature-form ml-embed --distill.keep"
)


def main(arguments: Sequence[str]) -> None:
    """Print what is done and what is left, and run what is left."""
    given = ["MINUTES=60", "SEEDS=0", *arguments] if arguments else []
    command.run(given, str(__doc__), pieces, write)


def pieces(proof: Proof) -> list[Piece]:
    """Return all pieces in their order: each model, then its scores at each rank."""
    mini, pair = recipes.RECIPES[LEALLA]().model.ranks, shape(proof).ranks
    listed = [
        Piece("text", "compare training text with the evaluation", plan.compare),
        Piece("source@full", "score the source", score_source),
        Piece(LEALLA, f"train {LEALLA}", train_lealla),
        *scores(LEALLA, mini),
    ]
    for stage in STAGES:
        train = partial(train_stage, stage=stage)
        listed += [Piece(stage, f"train {stage} of ML-Embed", train), *scores(stage, pair)]
    return listed


def scores(model: str, ranks: Sequence[int]) -> list[Piece]:
    """Return the pieces that score a model at each rank, or with its plain table."""
    return [
        Piece(f"{model}@{rank or 'full'}", f"score {model}, rank {rank or 'none'}",
              partial(score, model=model, rank=rank))
        for rank in ranks or (None,)
    ]  # fmt: skip


def shape(proof: Proof) -> Model:
    """Return the source's shape, nested like in the recipe elastic."""
    return nested(hf_config.from_checkpoint(Path(proof.model), Model()))


# ---- training text ----


def roles(proof: Proof) -> tuple[str, str]:
    """Return the source's prompts of queries and of documents, or E5's name for the latter."""
    path = Path(proof.model) / "config_sentence_transformers.json"
    prompts = files.read_object(path).get("prompts", {}) if path.exists() else {}
    return prompts.get("query", ""), prompts.get("document") or prompts.get("passage", "")


def sources(proof: Proof, model: str) -> list[dict[str, Any]]:
    """Return the entries of a model's mixture.

    Texts of equal roles, translations and scored pairs, have no prompt in the second stage, whose
    queries of retrieval have instructions.
    """
    if model == LEALLA:
        return [
            {"path": name, "weight": weight, "task": "bitext"}
            for name, weight in TRANSLATIONS.items()
        ]
    query, document = roles(proof)
    entries: list[dict[str, Any]] = [{"path": name} for name in QUESTIONS]
    if model == "stage1":
        entries += [{"path": name, "cap": 3000} for name in ("tldr_commands", "opensource_guide")]
        return [{"prompt": query, "document_prompt": document, **entry} for entry in entries]
    asked = [{**entry, "prompt": ASKED} for entry in entries]
    asked.append({"path": "nli_triplets", "prompt": ENTAILS})
    asked.append({"path": "tldr_commands", "cap": 1000, "prompt": DESCRIBED})
    symmetric = [
        {"path": "sts_train", "cap": 3000, "task": "sts"},
        {"path": "opensource_guide", "cap": 2000, "task": "bitext"},
    ]
    return [*({"document_prompt": document, **entry} for entry in asked), *symmetric]


def mixture(proof: Proof, model: str) -> str:
    """Write a model's mixture to OUT/mixtures/, and return its path."""
    folder = Path(proof.data) / "train"
    entries = [
        {**entry, "path": str(folder / f"{entry['path']}.parquet")}
        for entry in sources(proof, model)
    ]
    path = proof.folder / "mixtures" / f"{model}.json"
    files.write_text(path, json.dumps({"sources": entries}, indent=1) + "\n")
    return str(path)


# ---- what pieces run; torch and the libraries load only then ----


def train_lealla(proof: Proof) -> dict[str, Any]:
    from . import training

    one = replace(proof, recipe=LEALLA, mixture=mixture(proof, LEALLA))
    options = ["--tokenizer", proof.model, "--distill.teacher", proof.model]
    options += ["--seed", str(proof.seeds[0])]
    return training.train(one, LEALLA, options, 60 * proof.minutes)


def train_stage(proof: Proof, stage: str) -> dict[str, Any]:
    """Train a stage for the epochs of its recipe, the second from the first."""
    from . import training

    one = replace(proof, recipe=f"ml-embed-80m-{stage}", mixture=mixture(proof, stage))
    first = stage == STAGES[0]
    cfg = shape(proof)
    dims = {"exits": cfg.exits, "matryoshka-dims": cfg.matryoshka_dims, "ranks": cfg.ranks}
    options = ["--init", proof.model if first else str(proof.runs / STAGES[0])]
    options += ["--distill.teacher", proof.model, "--seed", str(proof.seeds[0])]
    options += ["--model.last-layers", str(cfg.last_layers), *OPTIONS.split()]
    options += ["--max-length", str(min(LENGTH, cfg.max_position_embeddings))]
    for name, sizes in dims.items():
        options += [f"--model.{name}", *map(str, sizes)]
    return training.train(one, stage, options, None)


def score_source(proof: Proof) -> dict[str, Any]:
    """Score the source at its full size."""
    from . import scoring, tasks

    encoder = scoring.load(Path(proof.model), None)
    cfg = encoder.model.cfg
    chosen = tasks.read(Path(proof.data), proof.languages.split(), proof.pairs)
    return scoring.score(encoder, chosen, [cfg.num_hidden_layers], [cfg.hidden_size])


def score(proof: Proof, model: str, rank: int | None) -> dict[str, Any]:
    """Score a model at a rank, at all of its exits and prefixes.

    Questions have the second stage's instruction, and in the first the source's prompts.
    """
    from . import scoring, tasks

    encoder = scoring.load(proof.trained(model), rank)
    query, document = roles(proof)
    if model in STAGES:
        asked = query if model == STAGES[0] else ASKED
        encoder = replace(encoder, prompts={"query": asked, "document": document})
    cfg = encoder.model.cfg
    chosen = tasks.read(Path(proof.data), proof.languages.split(), proof.pairs)
    return scoring.score(encoder, chosen, cfg.exits, cfg.matryoshka_dims)


# ---- the pages ----


def write(proof: Proof) -> None:
    """Write students.json and students.md of the pieces that are done, once the source is."""
    from . import students_page

    if proof.piece("source@full").exists():
        content = json.loads(json.dumps(students_page.content_of(proof)))
        files.write_text(proof.folder / "students.json", json.dumps(content, indent=1) + "\n")
        files.write_text(proof.folder / "students.md", students_page.markdown(content))
