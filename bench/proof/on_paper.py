"""Training of the published students on H100s, on paper: formulas, not measurements.

The floor of a step is the time that `bench.train_step.cases` counts for each stage, by FLOPs or by
bytes, and the FLOPs of a teacher's forward. Hours are those of one GPU: at the floor, and at the
share of it that a step of 0.6B reached on an H200 (bench/LOG.md).
"""

from dataclasses import dataclass
from typing import Any

from mlembed.config import recipes, shapes
from mlembed.config.model import Model
from mlembed.modeling.flops import layer_weights

from ..scaling import Assumed
from ..train_step.cases import Case, Lengths, floors_of, stage_work, tokens
from .page import table

REACHED = 134.1 / 227  # Thousand tokens a second of that step, measured and at its floor.
NEGATIVES = 7
# Lengths as in the benches, cut at the 32 tokens of LaBSE: median, sigma, least, most.
SHORT: Lengths = 20, 0.6, 5, 32
QUERIES: Lengths = 20, 0.6, 5, 512
PASSAGES: Lengths = 110, 0.7, 8, 512
# Samples of the two stages: of F2LLM-v2's model cards, and of secondary notes on ML-Embed.
SAMPLES = 27e6, 8.3e6


@dataclass(frozen=True)
class Training:
    """A recipe's training: one step, the number of steps, and the teacher's shape."""

    name: str
    step: Case
    steps: float
    teacher: Model | None = None


def trainings() -> list[Training]:
    """Return lealla-small, and both stages of ml-embed-140m without and with distillation."""
    lealla, stage = recipes.lealla("small"), recipes.ml_embed("140m", 1)
    short = Case(name="lealla", run=lealla, pairs=lealla.batch_size, queries=SHORT, docs=SHORT)
    groups = Case(
        name="ml-embed", run=stage, pairs=stage.batch_size, negatives=NEGATIVES,
        queries=QUERIES, docs=PASSAGES,
    )  # fmt: skip
    steps = stage.epochs * sum(SAMPLES) / stage.batch_size
    small, large = shapes.SHAPES["labse"], shapes.SHAPES["ml-embed-0.6b"]
    return [
        Training("lealla-small, vectors stored before", short, lealla.steps),
        Training("lealla-small, LaBSE in each step", short, lealla.steps, small),
        Training("ml-embed-140m, both stages", groups, steps),
        Training("ml-embed-140m, both stages, taught by 0.6B", groups, steps, large),
    ]


def row(training: Training, a: Assumed) -> dict[str, Any]:
    """Return tokens, FLOPs a token of student and teacher, and hours of one GPU."""
    work, count = stage_work(training.step), tokens(training.step)
    teacher = training.teacher
    forward = 2.0 * teacher.num_hidden_layers * layer_weights(teacher) if teacher else 0.0
    floor = sum(floors_of(work, a.ceiling_tflops, a.copy_gbs).values()) / 1e3
    floor += forward * count / a.ceiling_tflops / 1e12
    hours = training.steps * floor / 3600
    return {
        "name": training.name,
        "tokens": training.steps * count,
        "student_flops": sum(flops for flops, _ in work.values()) / count,
        "teacher_flops": forward,
        "floor_hours": hours,
        "hours": hours / REACHED,
    }


def rows() -> list[dict[str, Any]]:
    return [row(training, Assumed()) for training in trainings()]


def markdown(lines: list[dict[str, Any]]) -> list[str]:
    """Return the assumptions, and a table of the rows."""
    a = Assumed()
    about = (
        "Formulas, not measurements. lealla-small: LaBSE's 500,000 steps of 4,096 pairs of at most "
        "32 tokens, as LEALLA's own are not published. ml-embed-140m: two epochs of "
        f"{SAMPLES[0] / 1e6:.0f} and {SAMPLES[1] / 1e6:.1f} million samples, each a query of "
        f"median {QUERIES[0]} tokens and eight passages of {PASSAGES[0]}. One H100 that reaches "
        f"{a.ceiling_tflops:.0f} TFLOP/s and {a.copy_gbs:.0f} GB/s at the floor; "
        f"{REACHED:.0%} of it is what a step of 0.6B reached on an H200."
    )
    head = ["training", "tokens", "MFLOP a token", "the teacher's", "hours at the floor", "hours"]
    cells = [
        [
            line["name"],
            f"{line['tokens'] / 1e9:.0f} billion",
            f"{line['student_flops'] / 1e6:.0f}",
            f"{line['teacher_flops'] / 1e6:.0f}",
            f"{line['floor_hours']:.1f}",
            f"{line['hours']:.0f}",
        ]
        for line in lines
    ]
    return [about, table(head, cells)]
