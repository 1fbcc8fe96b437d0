"""Scores and costs of one model at one vocabulary rank, at every exit and width, from one pass."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlembed import config
from mlembed.config.shapes import nested
from mlembed.data.eval_tasks import Task
from mlembed.evaluation.grid import score_grid
from mlembed.inference import cost
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained, serving
from mlembed.runtime.workers import device_of
from mlembed.training.setup import bf16

from . import tasks as kinds

LENGTH = 256  # Tokens of a text; longer documents are cut.
TEXTS = 256  # Short texts whose encoding is timed.
REPEATS = 3
BYTES = 4  # Bytes of a parameter on disk: fp32, the vocabulary as factors if it has ranks.


@dataclass
class OnceEncoder(Encoder):
    """An encoder that encodes each text once with each prompt, for all tasks, at equal exits.

    by_text: vectors fp32 [E, D] by prompt and text. tokens: tokens encoded so far.
    """

    by_text: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    tokens: int = 0

    def encode_exits(
        self,
        texts: Sequence[str],
        exits: Sequence[int] | None = None,
        rank: int | None = None,
        progress: bool = False,
        prompt: str | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return what `Encoder.encode_exits` returns, and encode only new texts."""
        prompt = self._prompt(prompt, None)
        keys = [(prompt, text) for text in texts]
        new = [text for _, text in dict.fromkeys(keys) if (prompt, text) not in self.by_text]
        if new:
            encoded = super().encode_exits(new, exits, rank, progress, prompt)
            rows = zip(new, encoded.unbind(1), strict=True)
            self.by_text.update(((prompt, text), vector) for text, vector in rows)
        return torch.stack([self.by_text[key] for key in keys], dim=1, out=out)

    def tokenised(self, window: Any) -> Any:
        """Tokenise a window and count its tokens."""
        window, ids = super().tokenised(window)
        self.tokens += sum(map(len, ids))
        return window, ids


def quarters(size: int) -> list[int]:
    """Return the quarters of a depth or width, without zeros."""
    return sorted({max(1, size * part // 4) for part in (1, 2, 3, 4)})


def widths(size: int) -> list[int]:
    """Return an eighth, a quarter, a half and all of a width, without zeros."""
    return sorted({max(1, size // part) for part in (8, 4, 2, 1)})


def load(
    directory: Path, rank: int | None, device: str = "auto", nest: bool = False
) -> OnceEncoder:
    """Load a model to score at a rank; None keeps a plain table, or the stored rank.

    A plain table is cut to `rank` by a plain SVD, and stored factors to their first columns and
    rows. Matrices multiply in bf16 where the device does so natively, like in training.

    Args:
        nest: give the model the shape of the recipe elastic, with a vocabulary by plain SVD.

    Raises:
        ValueError: what `Encoder.load` raises, or a rank that is not stored.
    """
    encoder = Encoder.load(str(directory), "cpu", say=lambda _: None)
    model = encoder.model
    if nest:
        model = pretrained.load(str(directory), nested(model.cfg))
    if rank is not None and not model.cfg.ranks:
        model = pretrained.load(str(directory), replace(model.cfg, ranks=(rank,)))
    elif rank is not None:
        model = pretrained.cut(model, model.cfg.num_hidden_layers, rank)
    model = model.to(device_of(device)).eval()
    served = vars(serving.of(encoder)) | {"max_length": min(encoder.max_length, LENGTH)}
    half = bf16(config.Run(), model.device)
    return OnceEncoder(model, encoder.tokenizer, bf16=half, **served)


def score(
    encoder: OnceEncoder, tasks: Sequence[Task], exits: Sequence[int], dims: Sequence[int]
) -> dict[str, Any]:
    """Return the cells of a model: points by language and costs at every exit and width.

    The rank is the model's stored one. Queries get the model's prompt "query" and documents
    "document", or else "passage", which is E5's name; other texts get the default prompt.
    """
    began, ranks = time.perf_counter(), encoder.model.cfg.ranks
    rank, prompts = ranks[-1] if ranks else None, encoder.prompts
    document = prompts.get("document") or prompts.get("passage", "")
    roles = {"query": prompts.get("query", ""), "document": document}
    one = [rank] if rank else None
    grid = score_grid(encoder, tasks, dims, exits, one, prompts=roles, costs=False)
    grid.check()
    seconds = round(time.perf_counter() - began, 1)
    counts = {"texts": len(encoder.by_text), "tokens": encoder.tokens, "seconds": seconds}
    print(f"  {counts['texts']} texts, {counts['tokens']} tokens in {seconds:.0f} s", flush=True)
    speed = {exit: texts_per_second(encoder, exit, rank) for exit in exits}
    cells = [
        {
            **{key: value for key, value in cell.items() if key != "scores"},
            "megabytes": BYTES * cell["parameters"] / 1e6,
            "texts_per_second": speed[cell["exit"]],
            "points": kinds.parts(tasks, cell["scores"]),
        }
        for cell in grid.cells
    ]
    return {"rank": rank, "bf16": encoder.bf16, **counts, "cells": cells}


def texts_per_second(encoder: Encoder, exit: int, rank: int | None) -> float:
    """Return the median rate over REPEATS at which TEXTS different short texts are encoded."""
    plain = Encoder.encode_exits
    times: list[float] = []
    for repeat in range(REPEATS + 1):
        began = time.perf_counter()
        plain(encoder, cost.short_texts(TEXTS), [exit], rank, prompt="")
        if repeat:
            times.append(time.perf_counter() - began)
    return TEXTS / statistics.median(times)
