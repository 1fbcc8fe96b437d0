"""Scores and costs of one model at one vocabulary rank, at every exit and width, from one pass."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlembed import config
from mlembed.data.eval_tasks import Task
from mlembed.evaluation.grid import score_grid
from mlembed.inference import cost
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.serving import of as serving_of
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

    vectors: fp32 [E, D] by prompt and text. tokens: tokens encoded so far.
    """

    vectors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
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
        new = [text for _, text in dict.fromkeys(keys) if (prompt, text) not in self.vectors]
        if new:
            encoded = super().encode_exits(new, exits, rank, progress, prompt)
            rows = zip(new, encoded.unbind(1), strict=True)
            self.vectors.update(((prompt, text), vector) for text, vector in rows)
        return torch.stack([self.vectors[key] for key in keys], dim=1, out=out)

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


def last(directory: Path) -> tuple[list[int], list[int]]:
    """Return the last exit and the full width of a model that serves no other size."""
    cfg = hf_config.from_checkpoint(directory, config.Model())
    return [cfg.num_hidden_layers], [cfg.hidden_size]


def load(directory: Path, rank: int | None, device: str = "auto") -> OnceEncoder:
    """Load a model to score at a rank; None keeps a plain table, or takes the stored rank.

    A plain table is cut to `rank` by a plain SVD; stored factors are cut as they are. Matrices
    multiply in bf16 where the device does so natively, like in training.

    Raises:
        ValueError: what `Encoder.load` raises, or a rank that is not stored.
    """
    encoder = Encoder.load(str(directory), device, say=lambda _: None)
    model = encoder.model
    if rank is not None and not model.cfg.ranks:
        cfg = replace(model.cfg, ranks=(rank,))
        model = pretrained.load(str(directory), cfg).to(device_of(device)).eval()
    model.cfg.check(rank=rank)
    served = vars(serving_of(encoder)) | {"max_length": min(encoder.max_length, LENGTH)}
    half = bf16(config.Run(), model.device)
    return OnceEncoder(model, encoder.tokenizer, bf16=half, **served)


def score(
    directory: Path,
    rank: int | None,
    tasks: Sequence[Task],
    exits: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Return the cells of a model: points by language and costs at every exit and width.

    Queries get the model's prompt "query" and documents "document", or else "passage", which is
    E5's name; other texts get the default prompt.

    Args:
        exits, dims: quarters of the depth, and an eighth to all of the width, by default.
    """
    encoder, began = load(directory, rank), time.perf_counter()
    cfg, prompts = encoder.model.cfg, encoder.prompts
    exits = quarters(cfg.num_hidden_layers) if exits is None else exits
    dims = widths(cfg.hidden_size) if dims is None else dims
    stored = cfg.ranks[-1] if cfg.ranks else None
    at = stored if rank is None else rank
    document = prompts.get("document") or prompts.get("passage", "")
    roles = {"query": prompts.get("query", ""), "document": document}
    grid = score_grid(encoder, tasks, dims, exits, [at] if at else None, prompts=roles, costs=False)
    grid.check()
    seconds = time.perf_counter() - began
    say(f"  {len(encoder.vectors)} texts, {encoder.tokens} tokens in {seconds:.0f} s")
    counts = {"texts": len(encoder.vectors), "tokens": encoder.tokens}
    speed = {exit: texts_per_second(encoder, exit, at) for exit in exits}
    cells = [
        {
            **{key: value for key, value in cell.items() if key != "scores"},
            "megabytes": BYTES * cell["parameters"] / 1e6,
            "texts_per_second": speed[cell["exit"]],
            "points": kinds.parts(tasks, cell["scores"]),
        }
        for cell in grid.cells
    ]
    return {"rank": at, "cells": cells, "seconds": round(seconds, 1), "bf16": encoder.bf16} | counts


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
