"""Set-up of distillation: the teacher, or the vectors that it stored, and the distiller."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from ... import config
from ...data.tables import Table
from ...runtime.distributed import World
from . import hidden
from .distill import Distiller
from .teacher import StoredVectors, Teacher, check_vectors

SAMPLE = 8192  # texts whose teacher's vectors give the principal axes; at least 8 a coordinate
PROBES = 32  # texts whose vectors tell before training whether a live teacher works


def teachers(
    run: config.Run,
    tables: Sequence[Table],
    tokens: Tokenizer,
    half: bool,
    compiled: bool,
    resume_from: Path | None,
    where: World,
) -> tuple[Teacher | None, StoredVectors | None, Distiller | None]:
    """Load the teacher, or open its stored vectors, and make the distiller.

    Args:
        tables: the training text. tokens: the student's tokenizer.
        half, compiled: of the teacher, if mlembed encodes it.
        resume_from: the checkpoint to continue from; it holds what the distiller sampled.
    """
    cfg = run.distill
    live = None
    if cfg.teacher:
        live = Teacher.load(
            cfg.teacher, cfg.prompt, where.device, bf16=half, compile=compiled, keep=cfg.keep
        )
        hidden.check(run, live, tokens)
    stored = StoredVectors.open(cfg.embeddings) if cfg.embeddings else None
    if stored and where.main:
        stored.check()
    if live and tables:
        texts = sample(tables, PROBES, run.seed)
        check_vectors(texts, live.encode(texts).cpu().numpy())
    source = live or stored
    width, sample_ND = source.width if source else 0, None
    # A checkpoint holds the rotation, so a resumed run needs no sample.
    if width and cfg.features and cfg.align == "pca" and not resume_from:
        texts = sample(tables, max(SAMPLE, 8 * width), run.seed)
        if live:
            sample_ND = live.encode(texts)
        elif stored:
            sample_ND = torch.from_numpy(stored.vectors(texts))
    return live, stored, Distiller.of(run, width, sample_ND, where)


def sample(tables: Sequence[Table], most: int, seed: int) -> list[str]:
    """Draw about `most` training texts from all tables in proportion, as a function of the seed.

    Raises:
        ValueError: all text is streamed.
    """
    if not tables:
        raise ValueError(
            "distill.align: expected truncate or projection where all text is streamed, got pca"
        )
    rng = np.random.default_rng([seed, 7])
    total = max(1, sum(len(table.texts) for table in tables))
    texts: list[str] = []
    for table in tables:
        share = min(max(1, most * len(table.texts) // total), len(table.texts))
        rows = rng.choice(len(table.texts), size=share, replace=False)
        texts += [table.texts[int(row)] for row in np.sort(rows)]
    return texts
