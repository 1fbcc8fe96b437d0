"""Scores of pairs by a cross-encoder, which reads query and document together.

sentence-transformers runs the model. `write` stores the scores of training pairs, from which
`distill.scores` learns.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data.formats.layouts import SINGLE
from ..data.tables import Table
from ..modeling import hf_config
from ..runtime import files

BATCH = 64  # pairs that are encoded at once
BLOCK = 512  # items that are scored, in the order of their lengths, and written at once


class CrossEncoder:
    """A cross-encoder of one score. name: of its directory, for errors."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    @staticmethod
    def load(source: str, device: str = "auto") -> "CrossEncoder":
        """Open a directory or hub id in fp32, from safetensors and without code of its own.

        Args:
            device: auto, cpu or cuda.

        Raises:
            ValueError: sentence-transformers cannot open it, or it gives several scores.
        """
        from sentence_transformers import CrossEncoder as Model

        directory = hf_config.resolve(source)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = Model(
                str(directory),
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
        # The libraries raise many kinds of errors for a model that they cannot open.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"cross-encoder: cannot open {directory}: {reason}") from None
        if model.num_labels != 1:
            raise ValueError(
                f"{directory}: expected a cross-encoder of one score, got {model.num_labels}"
            )
        return CrossEncoder(model, str(directory))

    def scores(self, pairs: Sequence[tuple[str, str]], sigmoid: bool = False) -> np.ndarray:
        """Return the scores of (query, document) pairs, fp32 [pairs]: logits, or their sigmoid.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        device = self.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            scores = self.model.predict(
                list(pairs),
                batch_size=BATCH,
                activation_fn=torch.nn.Identity(),
                show_progress_bar=False,
            )
        scores = np.asarray(scores, dtype=np.float32).reshape(len(pairs))
        # In fp32: bf16 rounds the sigmoid of all logits above 7 to 1.
        scores = torch.from_numpy(scores).sigmoid().numpy() if sigmoid else scores
        if not np.isfinite(scores).all():
            at = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"{self.name}: non-finite score of the query {pairs[at][0][:80]!r}")
        return scores


def write(model: CrossEncoder, tables: Sequence[Table], out: Path, progress: bool = False) -> int:
    """Write a row {query, pos, neg, pos_scores, neg_scores} for every pair to `out`, atomically.

    The rows have no prompts of a mixture. Returns the number of scores.

    Raises:
        ValueError: `out` exists or is not a .jsonl file; a source that is not of pairs, or is of
            task sts; a non-finite score.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"out: expected a .jsonl file, got {out}")
    for table in tables:
        if table.nway or table.task in (SINGLE, "sts"):
            kind = "an n-way table" if table.nway else f"task {table.task}"
            raise ValueError(f"source {table.name}: expected pairs to score, got {kind}")
    count, total = 0, sum(map(len, tables))
    with (
        files.atomic_file(out) as partial,
        partial.open("w", encoding="utf-8") as file,
        tqdm(total=total, desc="pairs", disable=not progress, leave=False) as bar,
    ):
        items = ((table, number) for table in tables for number in range(len(table)))
        while block := list(islice(items, BLOCK)):
            rows = [_texts(*item) for item in block]
            pairs = [(query, document) for query, *documents in rows for document in documents]
            scores = iter(model.scores(pairs).tolist())
            file.writelines(_lines(rows, scores))
            count += len(pairs)
            bar.update(len(block))
    return count


def _texts(table: Table, number: int) -> list[str]:
    begin, end = int(table.starts[number]), int(table.starts[number + 1])
    return [table.texts[row] for row in range(begin, end)]


def _lines(rows: Sequence[Sequence[str]], scores: Iterator[float]) -> Iterator[str]:
    for query, positive, *negatives in rows:
        row = {
            "query": query,
            "pos": [positive],
            "neg": negatives,
            "pos_scores": [round(next(scores), 6)],
            "neg_scores": [round(next(scores), 6) for _ in negatives],
        }
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
