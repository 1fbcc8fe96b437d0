"""Mutants by name, each of which once survived, and changes that no test can see.

`make mutate NAMED=1` runs all mutants of the first table, `make mutate ONLY=NAME` one of them.
"""

from dataclasses import dataclass

from .operators import Mutant
from .parts import source


@dataclass(frozen=True)
class Named:
    """A replacement of text that stands in its file once, and the tests that must notice it."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...]


NAMED = {
    # The matrices of the loss ignore the workspace.
    "tiles-chunk": Named(
        "kernels/similarity/_tiles.py",
        "size = rows if not row_bytes else max(ROWS, workspace // row_bytes // ROWS * ROWS)",
        "size = rows",
        ("test_infonce_limits", "test_pairwise_lse"),
    ),
    "k-groups": Named(
        "kernels/similarity/_tiles.py",
        "together = max(1, min(E, workspace // exit_bytes))",
        "together = E",
        ("test_infonce_limits", "test_pairwise_lse"),
    ),
    # Slopes in fp16 underflow.
    "k-largest": Named(
        "kernels/similarity/_lse_backward.py",
        "return top.masked_fill(top == 0, 1.0)",
        "return torch.ones_like(top)",
        ("test_loss_scale", "test_infonce_triton", "test_pairwise_lse"),
    ),
    # All processes drop the same units.
    "train-seedrank": Named(
        "train.py",
        "seed = *spec.seed, where.rank, i",
        "seed = *spec.seed, i",
        ("test_gradcache",),
    ),
    # trec_eval's reciprocal rank has no cut.
    "mrr-cut": Named(
        "mlembed/evaluation/scores.py",
        "if rank >= 1 / 10)",
        "if rank >= 0)",
        ("test_scores",),
    ),
}

# (file, function, lines before, lines after) -> why no test can tell them apart.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (
        "train.py",
        "train_owned",
        "any_process(False, where)",
        "any_process(True, where)",
    ): "processes wait for each other here, and nothing reads the result",
}


def named(name: str) -> Mutant:
    """Raises ValueError unless the text stands in the file exactly once."""
    entry = NAMED[name]
    data, before = source(entry.file).encode(), entry.before.encode()
    if (count := data.count(before)) != 1:
        raise ValueError(f"{name}: expected its text once in {entry.file}, got {count} times")
    start = data.index(before)
    return Mutant(entry.file, name, "named", start, start + len(before), entry.after)
