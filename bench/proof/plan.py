"""Pieces of the proof in their order. A piece is done when its file in OUT/pieces/ exists.

    text           training text shares no text with the evaluation
    cut            the source, cut without training: width, first layers, plain SVD
    start          the source in our shape, without training: exits with its last layers
    ours-SEED      our recipe
    corner         our recipe, restricted to half the depth and the small rank
    peer-SEED      sentence-transformers, with its own losses

Each trained model is one piece, and each rank at which a model is scored another. The pieces that
train have the minutes of the first one, `ours` of the first seed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlembed.runtime import files

from ..environment import sources
from .settings import Proof

Run = Callable[[Proof], dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """One step of the proof; `run` returns what its file holds."""

    name: str
    about: str
    run: Run


def pieces(proof: Proof) -> list[Piece]:
    """Return all pieces in their order."""
    small = f"rank {proof.rank}"
    listed = [
        Piece("text", "compare training text with the evaluation", compare),
        *scored(proof, "cut", "the source, cut without training"),
        *scored(proof, "start", "the source in our shape, without training"),
    ]
    for seed in proof.seeds:
        ours = partial(train_ours, seed=seed)
        listed.append(Piece(f"ours-{seed}", f"train {proof.recipe}, seed {seed}", ours))
        listed += scored(proof, f"ours-{seed}", "ours")
    corner = partial(score, model="corner", small=True)
    listed.append(Piece("corner", f"train half the depth at {small} alone", train_corner))
    listed.append(Piece("corner@small", "score the size that was trained alone", corner))
    for seed in proof.seeds:
        peer = partial(train_peer, seed=seed)
        listed.append(Piece(f"peer-{seed}", f"train with sentence-transformers, seed {seed}", peer))
        listed += scored(proof, f"peer-{seed}", "sentence-transformers'")
    return listed


def scored(proof: Proof, model: str, about: str) -> list[Piece]:
    """Return the pieces that score a model at its full rank and at the small one."""
    names = ("full", "its full rank", False), ("small", f"rank {proof.rank}", True)
    return [
        Piece(
            f"{model}@{name}", f"score {about}, at {at}", partial(score, model=model, small=small)
        )
        for name, at, small in names
    ]


# ---- what pieces run; torch and the libraries load only then ----


def compare(proof: Proof) -> dict[str, Any]:
    """Compare training text with all texts of evaluation, those of tuning included."""
    from . import tasks

    return tasks.check_disjoint(proof.text, tasks.read(Path(proof.data)))


def score(proof: Proof, model: str, small: bool) -> dict[str, Any]:
    """Score a model at its full rank or at the small one, `corner` at its one size."""
    from . import scoring, tasks

    chosen = tasks.read(Path(proof.data), proof.languages.split(), proof.pairs)
    rank = proof.rank if small else None
    encoder = scoring.load(proof.trained(model), rank, nest=model == "start")
    cfg = encoder.model.cfg
    if model == "corner":
        return scoring.score(encoder, chosen, [cfg.num_hidden_layers], [cfg.hidden_size])
    exits = [exit for exit in scoring.quarters(cfg.num_hidden_layers) if exit > cfg.last_layers]
    return scoring.score(encoder, chosen, exits, scoring.widths(cfg.hidden_size))


def train_ours(proof: Proof, seed: int) -> dict[str, Any]:
    from . import training

    return training.ours(proof, seed)


def train_corner(proof: Proof) -> dict[str, Any]:
    from . import training

    return training.corner(proof)


def train_peer(proof: Proof, seed: int) -> dict[str, Any]:
    from . import peer

    return peer.train(proof, seed)


# ---- state ----


def left(proof: Proof, listed: list[Piece]) -> list[Piece]:
    """Return the pieces whose files do not exist yet."""
    return [piece for piece in listed if not proof.piece(piece.name).exists()]


def finish(proof: Proof, piece: Piece, result: dict[str, Any]) -> None:
    """Write a piece's file, whole or not at all."""
    content = result | {"sources": sources()}
    files.write_text(proof.piece(piece.name), json.dumps(content) + "\n")
