"""Evaluation of the proof: tasks without the languages of tuning, and four numbers a model.

DATA/eval/ holds tatoeba_dev/ (LASER's files), bitext/ (n-way tables), sts/ (files named by
language) and retrieval/ (folders in BEIR's format). The score is the unweighted mean of the four
numbers, in points of 100.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlembed.data import sources
from mlembed.data.eval_sets import read_all
from mlembed.data.eval_tasks import STS, Bitext, Retrieval, Task
from mlembed.data.formats.readers import normalise
from mlembed.evaluation.languages import language

KINDS = "tatoeba", "bitext", "sts", "retrieval"
FOLDERS = "tatoeba_dev", "bitext", "sts", "retrieval"
CODE = re.compile(r"[a-z]{2}")

Parts = dict[str, dict[str, float]]  # Points by kind, then by language or name of a set.


# ---- reading ----


def read(data: Path, tuned: Sequence[str] = (), pairs: int = 10**9) -> list[Task]:
    """Return the tasks of DATA/eval/, without languages of tuning, with at most `pairs` a language.

    The pairs of bitext are spaced evenly over their files; scored pairs, queries and documents are
    all taken.

    Args:
        tuned: codes of any kind. They match every script and region of their languages.

    Raises:
        ValueError: a layout that `read_all` rejects, or a kind of which no language is left.
    """
    every = read_all([str(data / "eval" / folder) for folder in FOLDERS])
    left_out = {tongue(code) for code in tuned}
    tasks: list[Task] = []
    for task in every:
        if isinstance(task, Bitext):
            groups = {at: rows for at, rows in task.groups.items() if tongue(at[0]) not in left_out}
            if groups:
                tasks.append(sample(task, groups, pairs))
        elif not {tongue(code) for code in codes(task.name)} & left_out:
            tasks.append(task)
    present = {kind_of(task) for task in tasks}
    for kind in KINDS:
        if kind not in present:
            raise ValueError(
                f"{data / 'eval'}: expected {kind} in languages other than those of tuning, "
                f"{' '.join(tuned)}, got none"
            )
    return tasks


def tongue(code: str) -> str:
    """Return CLDR's code of a language without script and region."""
    return language(code).key[0]


def codes(name: str) -> list[str]:
    """Return the words of two letters in a set's name: "de" of stsb-de-dev."""
    return [word for word in name.split("-") if CODE.fullmatch(word)]


def kind_of(task: Task) -> str:
    """Return the one of KINDS that a task belongs to. ValueError for a task of no kind."""
    if isinstance(task, Bitext):
        return "tatoeba" if task.tatoeba else "bitext"
    if isinstance(task, STS):
        return "sts"
    if isinstance(task, Retrieval):
        return "retrieval"
    raise ValueError(f"{task.name}: expected bitext, scored pairs or retrieval, got another layout")


def sample(
    task: Bitext, groups: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], pairs: int
) -> Bitext:
    """Return a task of some groups, each with at most `pairs` pairs at even distances."""
    some = Bitext(task.name, tatoeba=task.tatoeba)
    place: dict[str, int] = {}
    for at, (a, b) in groups.items():
        n = min(pairs, len(a))
        chosen = np.arange(n) * len(a) // n
        sides = [[task.texts[row] for row in side[chosen]] for side in (a, b)]
        first, second = (
            np.array([place.setdefault(text, len(place)) for text in side]) for side in sides
        )
        some.groups[at] = first, second
    some.texts = list(place)
    return some


# ---- scores ----


def parts(tasks: Sequence[Task], results: Mapping[str, dict[str, Any]]) -> Parts:
    """Return the points of each language or set, by kind.

    Bitext has the mean accuracy of both directions, STS the mean Spearman correlation of a
    language's files, retrieval nDCG@10.

    Args:
        results: a task's scores by its name, like the cells of `evaluation.grid`.
    """
    points: Parts = {kind: {} for kind in KINDS}
    by_language: dict[str, list[float]] = {}
    for task in tasks:
        kind, result = kind_of(task), results[task.name]
        if kind == "retrieval":
            points[kind][task.name] = 100 * result["score"]
        elif kind == "sts":
            name = next(iter(codes(task.name)), task.name)
            by_language.setdefault(name, []).append(100 * result["score"])
        else:
            before = "" if kind == "tatoeba" else f"{task.name} "
            for code, accuracy in result["by_language"].items():
                points[kind][before + code] = 100 * accuracy
    points["sts"] = {name: float(np.mean(scores)) for name, scores in by_language.items()}
    return points


def numbers(points: Parts) -> dict[str, float]:
    """Return the four numbers, each the mean of its kind."""
    return {kind: float(np.mean(list(of.values()))) for kind, of in points.items()}


def score(points: Parts) -> float:
    """Return the unweighted mean of the four numbers."""
    return float(np.mean(list(numbers(points).values())))


def bitext(points: Parts, by: Literal["name", "script"]) -> dict[str, float]:
    """Return the mean points of bitext, Tatoeba's and the tables', by language or by script."""
    groups: dict[str, list[float]] = {}
    for kind in ("tatoeba", "bitext"):
        for name, value in points[kind].items():
            groups.setdefault(getattr(language(name.split()[-1]), by), []).append(value)
    return {name: float(np.mean(values)) for name, values in sorted(groups.items())}


# ---- what training may not see ----


def check_disjoint(mixture: str, tasks: Sequence[Task]) -> dict[str, int]:
    """Count the texts of training and of evaluation, which share none.

    Two texts are equal if their letters, marks and digits are, after NFKC and case folding.

    Raises:
        ValueError: a training text equals a text of the evaluation.
    """
    evaluation = {bare(text) for task in tasks for text in task.texts} - {""}
    count = 0
    for table in sources.tables_of([mixture]):
        count += len(table.texts)
        if equal := [text for text in table.texts if bare(text) in evaluation]:
            raise ValueError(
                f"{table.name}: expected training text without texts of the evaluation, got "
                f"{len(equal)} of them, first {equal[0][:60]!r}"
            )
    return {"training_texts": count, "evaluation_texts": len(evaluation), "shared": 0}


def bare(text: str) -> str:
    """Return a text's letters, marks and digits, normalised."""
    return "".join(char for char in normalise(text) if unicodedata.category(char)[0] in "LMN")
