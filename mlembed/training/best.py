"""The checkpoint of the highest score, and whether a run's scores still rise.

Both are functions of the scores that a run has logged, so a resumed run decides like one that was
never stopped.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import config
from ..data.eval_tasks import Task
from ..runtime import checkpoint, intact, log
from ..runtime.distributed import World, broadcast, broadcast_text, main_works

MEAN = "mean"  # of all tasks


def check(run: config.Run, tasks: Sequence[Task]) -> None:
    """Raise ValueError if `keep_best` names no score of the evaluation."""
    names = [MEAN, *(task.name for task in tasks)] if tasks else []
    if run.keep_best and run.keep_best not in names:
        some = ", ".join(names) or "none, as there is no evaluation"
        raise ValueError(f"keep_best: expected a score of eval ({some}), got {run.keep_best!r}")


def of_lines(lines: Iterable[dict[str, Any]], name: str) -> tuple[int, int]:
    """Return the step of the highest score, the first of equals, and the number of scores after it.

    Both are 0 without a score. That of step 0, before training, and NaN do not count.

    Args:
        lines: of metrics.jsonl. name: `mean`, or that of a task.
    """
    best, since, highest = 0, 0, -math.inf
    for line in lines:
        if line["kind"] != "eval" or line["step"] == 0:
            continue
        score = line["score"] if name == MEAN else line["tasks"][name]["score"]
        since += 1
        if score is not None and score > highest:
            best, since, highest = line["step"], 0, score
    return best, since


def judge(run: config.Run, out: log.Log, where: World) -> tuple[int, bool]:
    """Return the step of the best score so far, and whether `patience` is exhausted.

    All processes call it, and get what the log of the main process says.
    """
    if not run.keep_best:
        return 0, False
    best, since = of_lines(out.lines(), run.keep_best) if where.main else (0, 0)
    over = 0 < run.patience <= since
    return broadcast(best, where), bool(broadcast(int(over), where))


def checkpoint_of(step: int, directory: Path, where: World) -> Path:
    """Return the best step's checkpoint among those in a directory; all processes call it.

    Raises:
        ValueError: its files are no longer those that were written.
    """
    path, damage = checkpoint.path_of(directory, step), ""
    with main_works(where, "check"):  # It reads every byte.
        if where.main:
            damage = intact.damage(path) or ""
    if damage := broadcast_text(damage, where):
        raise ValueError(
            f"{path}: expected the checkpoint of the best score, got a damaged one ({damage}); "
            "restore it, or export the last step by --resume --keep-best '' --patience 0 "
            "--allow-changed keep_best patience"
        )
    return path
