"""Train with one loss, in a process of its own: held-out losses, seconds and peak memory of steps.

    python -m bench.integrations.training '{"loss": "Matryoshka3dLoss", "model": .., "data": ..}'

Losses train the same model on the same rows in the same order, with frozen token embeddings, whose
update would hide the difference in time and memory. Matryoshka2dLoss has its default settings: each
step trains the last layer and one other, drawn at random, which the last layer also teaches. The
held-out loss is InfoNCE of all held-out rows at every exit and width, whichever loss is trained.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    Matryoshka2dLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from transformers import TrainerCallback

from mlembed.integrations.sentence_transformers import CachedMatryoshka3dLoss, Matryoshka3dLoss
from mlembed.publishing.probes import quiet
from mlembed.runtime.errors import one_line_errors

from ..proof.scoring import quarters, widths
from .settings import Settings

MINI_BATCH = 32
PROMPTS = {"query": "query", "positive": "passage"}  # columns, and names of their prompts
RESET = Path("/proc/self/clear_refs")  # Writing 5 resets the peak of resident memory.


def make_loss(name: str, model: SentenceTransformer) -> nn.Module:
    """Return a loss of LOSSES over all widths, and over exits at the quarters of the depth."""
    exits, dims = sizes(model)
    if name == "Matryoshka2dLoss":
        return Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), dims)
    if name == "CachedMatryoshka3dLoss":
        return CachedMatryoshka3dLoss(model, dims, exits, mini_batch_size=MINI_BATCH)
    return Matryoshka3dLoss(model, dims, exits)


def sizes(model: SentenceTransformer) -> tuple[list[int], list[int]]:
    """Return exits and widths."""
    trunk: Any = model[0].auto_model
    return list(quarters(trunk.config.num_hidden_layers)), list(widths(trunk.config.hidden_size))


def train(loss: str, settings: Settings) -> dict[str, Any]:
    """Train with one loss; return held-out losses by step, and medians of a step.

    Raises:
        ValueError: data without columns query and positive, or with too few rows.
    """
    torch.manual_seed(settings.seed)
    rows, held_out = read(settings)
    with quiet():
        model = SentenceTransformer(settings.model, local_files_only=True)
    model.max_seq_length = settings.max_length
    trunk: Any = model[0].auto_model
    trunk.get_input_embeddings().requires_grad_(False)
    prompts = {name: model.prompts.get(key) or "" for name, key in PROMPTS.items()}
    watch = Watch(settings.every, held_out_loss(model, held_out, prompts))
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceTransformerTrainingArguments(
            folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            batch_sampler="no_duplicates",
            prompts=prompts,
            seed=settings.seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        made = make_loss(loss, model)
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=rows, loss=made, callbacks=[watch]
        )
        trainer.train()
    return {
        "loss": loss,
        "seconds_a_step": round(statistics.median(watch.seconds), 3),
        "cpu_seconds_a_step": round(statistics.median(watch.cpu_seconds), 3),
        "peak_mib": round(watch.peak),
        "held_out": watch.held_out,
    }


def read(settings: Settings) -> tuple[Dataset, Dataset]:
    """Return rows to train on, shuffled, and held-out rows whose texts occur in no other row."""
    kind = "json" if settings.data.endswith((".json", ".jsonl")) else "parquet"
    table = load_dataset(kind, data_files=settings.data, split="train")
    if not {*PROMPTS} <= {*table.column_names}:
        raise ValueError(
            f"{settings.data}: expected columns {[*PROMPTS]}, got {table.column_names}"
        )
    table = table.select_columns([*PROMPTS]).shuffle(seed=settings.seed)
    rows, known, held_out = [*table], set[str](), list[int]()
    for at, row in enumerate(rows):
        if len(held_out) < settings.held_out and not known & {*row.values()}:
            held_out.append(at)
        known |= {*row.values()}
    texts = {text for at in held_out for text in rows[at].values()}
    rest = [at for at, row in enumerate(rows) if not texts & {*row.values()}]
    if len(rest) < settings.batch_size:
        raise ValueError(
            f"{settings.data}: expected {settings.batch_size} rows or more next to "
            f"{settings.held_out} held-out rows, got {len(rest)}"
        )
    return table.select(rest), table.select(held_out)


def held_out_loss(
    model: SentenceTransformer, rows: Dataset, prompts: dict[str, str]
) -> Callable[[], dict[str, float]]:
    """Return a function that returns the held-out loss of each exit and width."""
    exits, dims = sizes(model)
    loss = CachedMatryoshka3dLoss(model, dims, exits, mini_batch_size=MINI_BATCH)

    def score() -> dict[str, float]:
        columns = [model.preprocess(rows[name], prompt=prompts[name]) for name in PROMPTS]
        on_device = [
            {k: x.to(model.device) if isinstance(x, torch.Tensor) else x for k, x in some.items()}
            for some in columns
        ]
        model.eval()
        with torch.no_grad():
            cells = loss(on_device)
        model.train()
        return {name: round(float(cell), 4) for name, cell in cells.items()}

    return score


@dataclass
class Watch(TrainerCallback):
    """Seconds of each step, peak memory of steps, and the held-out loss every few steps."""

    every: int
    score: Callable[[], dict[str, float]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # Other processes do not slow these.
    held_out: dict[int, dict[str, float]] = field(default_factory=dict)
    peak: float = 0.0  # MiB
    began: tuple[float, float] = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.held_out[0] = self.score()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        reset_peak()
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began[0])
        self.cpu_seconds.append(time.process_time() - self.began[1])
        self.peak = max(self.peak, peak_mib())
        if not state.global_step % self.every or state.global_step == state.max_steps:
            self.held_out[state.global_step] = self.score()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif RESET.exists():
        RESET.write_text("5")


def peak_mib() -> float:
    """Return the most memory since `reset_peak`: of the GPU, or resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(arguments: Sequence[str]) -> None:
    """Train as the JSON argument says, and print the result as one line of JSON."""
    with one_line_errors():
        given = json.loads(arguments[0])
        print(json.dumps(train(given.pop("loss"), Settings(**given))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
