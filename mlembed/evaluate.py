"""Scores over the whole grid of width x depth x vocabulary rank.

python -m mlembed.evaluate MODEL --data DIR_OR_FILE .. [--out report]

Bitext (Tatoeba as LASER and LaBSE score it): for each text its nearest neighbour by cosine among
the texts of the other side; accuracy = share that is its translation, both directions averaged.
STS: Spearman correlation of cosine and human score. One pass of the trunk a rank serves all
widths and depths.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.stats import spearmanr
from torch import Tensor

from . import charts, checkpoint, cldr, layouts, log, rows, sources
from .charts import mean_score
from .encode import Encoder
from .model import num_parameters

PIVOTS = ("en", "eng", "eng_Latn", "eng-Latn")  # what each language is matched with


@dataclass
class Bitext:
    """Groups of aligned texts: (language, kind) -> rows of `texts` on either side."""

    name: str
    texts: list[str] = field(default_factory=list)
    groups: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass
class STS:
    """Scored pairs: pair i is texts[2 i], texts[2 i + 1]."""

    name: str
    texts: list[str]
    scores: np.ndarray


# ---- what to score ----


def read_all(sources: Sequence[str]) -> list[Bitext | STS]:
    """All tasks of all sources. ValueError for two of one name: their scores would be one."""
    tasks = [task for source in sources for task in read(source)]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"eval: expected distinct file or directory names, got {', '.join(names)}")
    return tasks


def read(source: str) -> list[Bitext | STS]:
    """`cldr`, a Tatoeba-layout directory, an n-way table, an STS csv, or a directory of the latter.

    Raises:
        ValueError: nothing there, an unknown layout, sides of unequal length, a malformed row.
    """
    if source == "cldr":
        return [nway("cldr", sources.cldr_tables()[1].to_pylist())]
    path = Path(source)
    if path.is_dir():
        if any(path.glob("tatoeba.*-*.*")):
            return [tatoeba(path)]
        files = sorted(p for p in path.iterdir() if p.suffix in (".csv", ".parquet", ".jsonl"))
        if not files:
            raise ValueError(
                f"eval: expected tatoeba.*, .csv, .parquet or .jsonl in {source}, found none"
            )
        return [scored for file in files for scored in read(str(file))]
    if path.suffix == ".csv" and path.is_file():
        return [sts(path)]
    (path,) = rows.files_of(source)
    layout, found = layouts.recognised(rows.of_file(path, layouts.worth_reading))
    if isinstance(layout, layouts.Layout):
        raise ValueError(f"{path}: expected an n-way table with columns id, lang, text")
    records = list(layouts.nway_rows(found, layouts.Report(path.stem)))
    if not records:
        raise ValueError(f"{path}: expected rows, found none")
    return [nway(path.stem, records)]


def nway(name: str, records: Iterable[dict[str, Any]]) -> Bitext:
    """Every language against English, kind by kind. ValueError without English."""
    found = Bitext(name)
    where: dict[tuple[str, str, str], int] = {}
    for record in records:
        where[record.get("kind") or "", record["lang"], record["id"]] = len(found.texts)
        found.texts.append(record["text"])
    pivot = next((p for p in PIVOTS if any(lang == p for _, lang, _ in where)), None)
    if pivot is None:
        raise ValueError(f"{name}: expected English ({', '.join(PIVOTS)}) among the languages")
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (kind, lang, key), row in where.items():
        if lang != pivot and (kind, pivot, key) in where:
            pairs.setdefault((lang, kind), []).append((row, where[kind, pivot, key]))
    for group, rows_of_group in sorted(pairs.items()):
        a, b = np.array(rows_of_group).T
        found.groups[group] = (a, b)
    if not found.groups:
        raise ValueError(f"{name}: expected ids shared with {pivot}, found none")
    return found


def tatoeba(directory: Path) -> Bitext:
    """Files tatoeba.xxx-eng.xxx and tatoeba.xxx-eng.eng, line by line translations."""
    found = Bitext(directory.name)
    for english in sorted(directory.glob("tatoeba.*-eng.eng")):
        lang = english.name.split(".")[1].removesuffix("-eng")
        other = english.with_name(f"tatoeba.{lang}-eng.{lang}")
        if not other.is_file():
            raise ValueError(f"{english}: expected {other.name} beside it, found none")
        sides = [_lines(path) for path in (other, english)]
        if len(sides[0]) != len(sides[1]) or not sides[0]:
            raise ValueError(
                f"{other}: expected as many lines as {english.name}, more than none, "
                f"got {len(sides[0])} and {len(sides[1])}"
            )
        first, n = len(found.texts), len(sides[0])
        found.texts += sides[0] + sides[1]
        found.groups[lang, ""] = (first + np.arange(n), first + n + np.arange(n))
    if not found.groups:
        raise ValueError(f"{directory}: expected tatoeba.xxx-eng.eng, found none")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: {error.reason}") from None


def _lines(path: Path) -> list[str]:
    """Lines of a text file. Not splitlines: Unicode's other separators occur inside sentences."""
    text = _text(path).replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n") if text else []


def sts(path: Path) -> STS:
    """csv with columns sentence1, sentence2, score."""
    texts, scores = [], []
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    for row in reader:
        try:
            pair, score = [row["sentence1"], row["sentence2"]], float(row["score"])
        except KeyError as error:
            raise ValueError(
                f"{path}: expected columns sentence1, sentence2, score, no {error}"
            ) from None
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}:{reader.line_num}: score: expected a number, got {row['score']!r}"
            ) from None
        if None in pair or not math.isfinite(score):
            raise ValueError(
                f"{path}:{reader.line_num}: sentence1, sentence2, score: expected two texts "
                f"and a number, got {pair[0]!r}, {pair[1]!r}, {score}"
            )
        texts += pair
        scores.append(score)
    if not scores:
        raise ValueError(f"{path}: expected rows, found none")
    return STS(path.stem, texts, np.array(scores))


# ---- scoring ----


def accuracy(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Share of unit rows of a [n, D] whose nearest row of b is their own, and the reverse."""
    cosine = a @ b.T
    own = torch.arange(len(a))
    there = (cosine.argmax(1) == own).float().mean()
    back = (cosine.argmax(0) == own).float().mean()
    return there.item(), back.item()


def score_bitext(task: Bitext, vectors: Tensor) -> dict[str, Any]:
    """Accuracies of texts encoded as [N, d]: `score` is the mean over kinds of the mean over
    languages of both directions; to_pivot and from_pivot are one direction each."""
    langs, kinds = (sorted({group[i] for group in task.groups}) for i in (0, 1))
    unit = F.normalize(vectors, dim=-1)
    both = np.full((len(langs), len(kinds), 2), np.nan)  # a language may lack a kind
    for (lang, kind), (a, b) in task.groups.items():
        sides = accuracy(unit[torch.from_numpy(a)], unit[torch.from_numpy(b)])
        both[langs.index(lang), kinds.index(kind)] = sides
    there, back = np.nanmean(both, axis=0).mean(axis=0)
    by_kind = np.nanmean(both, axis=(0, 2))
    by_language = np.nanmean(both, axis=(1, 2))
    return {
        "score": float(by_kind.mean()),
        "to_pivot": float(there),
        "from_pivot": float(back),
        "by_kind": dict(zip(kinds, by_kind.tolist(), strict=True)) if kinds != [""] else {},
        "by_language": dict(zip(langs, by_language.tolist(), strict=True)),
    }


def score_sts(task: STS, vectors: Tensor) -> dict[str, Any]:
    """{"score": Spearman correlation} of texts encoded as [N, d]."""
    cosine = F.cosine_similarity(vectors[0::2], vectors[1::2], dim=-1)
    return {"score": float(spearmanr(cosine.numpy(), task.scores).statistic)}


def grid(
    encoder: Encoder,
    tasks: Sequence[Bitext | STS],
    dims: Sequence[int] | None = None,
    exits: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One cell for each (rank, exit, dim): its cost, and its scores by task name.

    Args:
        dims, exits, ranks: the trained ones by default.

    Raises:
        ValueError: a width, depth or rank that the model does not have.
    """
    cfg = encoder.model.cfg
    dims, exits = dims or cfg.matryoshka_dims, exits or cfg.exits
    for sizes, name in ((dims, "dim"), (exits, "exit"), (ranks or (), "rank")):
        for size in sizes:
            cfg.check(**{name: size})
    cells = []
    for rank in ranks or cfg.ranks or (None,):
        scores: dict[tuple[int, int], dict[str, Any]] = {}
        for task in tasks:
            score = score_bitext if isinstance(task, Bitext) else score_sts
            exits_END = encoder.exits(task.texts, exits, rank, progress)
            for exit, vectors in zip(exits, exits_END, strict=True):
                for dim in dims:
                    cell = scores.setdefault((exit, dim), {})
                    cell[task.name] = score(task, vectors[:, :dim])  # type: ignore[arg-type]
        for (exit, dim), by_task in scores.items():
            cost = {"parameters": num_parameters(cfg, exit, rank), "bytes_per_vector": 4 * dim}
            cells.append({"dim": dim, "exit": exit, "rank": rank, **cost, "scores": by_task})
    return cells


# ---- showing ----


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The grid as text: a line for each rank and exit, a column for each width."""
    dims = sorted({cell["dim"] for cell in cells})
    at = {(cell["rank"], cell["exit"], cell["dim"]): cell for cell in cells}
    lines = [
        "                       score (%) at width, bytes a vector",
        "  rank  exit  params  " + "".join(f"{dim:>8}" for dim in dims),
        " " * 22 + "".join(f"{4 * dim:>7}B" for dim in dims),
    ]
    for rank, exit in dict.fromkeys((cell["rank"], cell["exit"]) for cell in cells):
        parameters = at[rank, exit, dims[0]]["parameters"]
        scores = "".join(f"{mean_score(at[rank, exit, dim]):>8.1f}" for dim in dims)
        lines.append(f"{rank or 'table':>6}{exit:>6}{parameters / 1e6:>7.2f}M  {scores}")
    return "\n".join(lines)


def by_kind(trained: dict[str, Any], untrained: dict[str, Any]) -> str:
    """Scores at full size, kind by kind, beside the untrained model's (percent)."""
    lines = ["  at full size (%)          trained  untrained"]
    for task, result in trained.items():
        start = untrained.get(task, {})
        rows = {task: (result["score"], start.get("score"))}
        for kind, score in result.get("by_kind", {}).items():
            note = " (unseen names)" if kind in cldr.ZERO_SHOT else ""
            rows[f"  {kind}{note}"] = (score, start.get("by_kind", {}).get(kind))
        for name, (now, then) in rows.items():
            before = f"{100 * then:>11.1f}" if then is not None else " " * 11
            lines.append(f"  {name:26}{100 * now:>7.1f}{before}")
    return "\n".join(lines)


def write_report(directory: Path, cells: Sequence[dict[str, Any]], extra: dict[str, Any]) -> None:
    """grid.json and grid.png in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    title = ", ".join(cells[0]["scores"])
    checkpoint.write_text(
        directory / "grid.json", json.dumps({**extra, "cells": list(cells)}, indent=1) + "\n"
    )
    title = f"{title}: mean score by width, depth and vocabulary rank"
    charts.heat_map(cells, directory / "grid.png", title)


def main(
    model: Annotated[str, tyro.conf.Positional],
    /,
    data: tuple[str, ...] = ("cldr",),
    dim: tuple[int, ...] = (),
    exit: tuple[int, ...] = (),
    rank: tuple[int, ...] = (),
    out: str = "",
    device: str = "auto",
) -> None:
    """Score a model over width x depth x vocabulary rank.

    Args:
        model: run, checkpoint, model directory or hub id.
        data: cldr, Tatoeba-layout directories, n-way tables (id, lang, text), STS csv files.
        dim: widths; those it was trained for by default.
        exit: depths, likewise.
        rank: vocabulary ranks, likewise.
        out: new directory for grid.json and grid.png.
        device: auto, cpu or cuda.
    """
    if out and Path(out).exists():
        raise ValueError(f"out: expected a new directory, got {out}, which exists")
    tasks = read_all(data)
    cells = grid(Encoder.load(model, device), tasks, dim, exit, rank, progress=True)
    print(table(cells))
    print(by_kind(cells[-1]["scores"], {}))
    if out:
        write_report(Path(out), cells, {"model": model, "data": data})


if __name__ == "__main__":
    with log.one_line_errors():
        tyro.cli(main, prog="python -m mlembed.evaluate")
