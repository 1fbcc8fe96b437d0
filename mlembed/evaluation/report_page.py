"""Build a run's report: one HTML page that needs nothing else, and its figures as SVG files.

A run is a directory that train.py wrote, or one of `mlembed evaluate --out`, which has no training
curves. The page reads on a phone, in print, and without telling colours apart. It names what the
run's files do not hold and invents nothing. report.html.j2 is its template.
"""

import base64
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from ..runtime import log
from . import charts
from .charts import mean_score
from .languages import UNKNOWN, Language, language, levels
from .results import Results, curve, mapping, names_of, number, thinned

POINTS = 200  # Points of a curve; the eye sees no more.
BARS = 24  # Bars of the breakdown by stage.
MISSING = "not recorded"

# A bar: name, note, percent, and percent of the untrained model. A table: caption, head, rows.
Row = tuple[str, str, float, float | None]
Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]


class Image(NamedTuple):
    """A figure as SVG, and in words."""

    name: str
    alt: str
    svg: str


@dataclass
class Section:
    """Part of the page under one heading: remarks (sentences), figures, tables, bars by group, and
    parts, in this order.
    """

    title: str
    remarks: list[str] = field(default_factory=list)
    figures: list[Image] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    bars: list[tuple[str, list[Row]]] = field(default_factory=list)
    parts: list["Section"] = field(default_factory=list)

    def add(self, name: str, figure: Figure, alt: str) -> None:
        """Append a figure that `alt` describes."""
        self.figures.append(Image(name, alt, charts.svg(figure)))


# ---- headline ----


def cell_name(cell: Mapping[str, Any]) -> str:
    """Return what a cell is called."""
    rank = f" rank {cell['rank']}" if cell["rank"] else ""
    return f"exit {cell['exit']}{rank} width {cell['dim']}"


def shown(value: Any, form: str, missing: str = "–") -> str:
    """Return a number in a format, or what stands for a missing one."""
    return form.format(number(value)) if math.isfinite(number(value)) else missing


def percent(score: float) -> str:
    """Return a score with its unit."""
    return shown(score, "{:.1f}\N{NO-BREAK SPACE}%", "no finite score")


def costs(cell: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return parameters, bytes a vector, and latency in ms, which is inf if unknown."""
    latency = number(cell.get("latency_ms"))
    return cell["parameters"], cell["bytes_per_vector"], latency if latency > 0 else math.inf


def cheapest_within(
    cells: Sequence[dict[str, Any]], points: float, first: int = 0
) -> dict[str, Any] | None:
    """Return the cheapest cell that scores at most `points` below the best; None without a score.

    Args:
        first: index of the cost that counts before the other two.
    """
    scores = [mean_score(cell) for cell in cells]
    finite = [score for score in scores if math.isfinite(score)]
    if not finite:
        return None
    near = [c for c, s in zip(cells, scores, strict=True) if s >= max(finite) - points - 1e-9]
    return min(near, key=lambda cell: (costs(cell)[first], *costs(cell)))


def facts(run: Results) -> list[tuple[str, str, str]]:
    """Return what the page says first: (name, value, note)."""
    rows = scored(run) if run.cells else []
    if run.lines:
        rows.append(("Trained for", f"{max(line['step'] for line in run.lines):,} steps", ""))
    for name, key in (("Commit", "commit"), ("Device", "device")):
        rows.append((name, str(run.grid.get(key) or MISSING), ""))
    return [*rows, ("Date of the metrics", run.date, "")]


def scored(run: Results) -> list[tuple[str, str, str]]:
    """Return the scores at full size and at the cheapest sizes within a point of the best."""
    full, untrained = run.full, mean_score({"scores": run.grid["untrained"]})
    note = f"untrained {percent(untrained)}" if math.isfinite(untrained) else ""
    rows = [
        ("Score at full size", percent(mean_score(full)), note),
        ("Full size", cell_name(full), describe_costs(full)),
    ]
    superlatives: dict[str, list[str]] = {}
    cells = {cell_name(cell): cell for cell in run.cells}
    for first, superlative in enumerate(("smallest model", "shortest vector", "fastest")):
        cell = cheapest_within(run.cells, 1.0, first)
        if cell and math.isfinite(costs(cell)[first]):
            superlatives.setdefault(cell_name(cell), []).append(superlative)
    for size, words in superlatives.items():
        name = f"{', '.join(words).capitalize()} within 1 point of the best"
        score = f"{size}: {percent(mean_score(cells[size]))}"
        rows.append((name, score, describe_costs(cells[size], full)))
    count = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}"
    return [*rows, ("Tasks", ", ".join(full["scores"]) or "none", count)]


def describe_costs(cell: Mapping[str, Any], full: Mapping[str, Any] | None = None) -> str:
    """Return the costs of a cell, with their shares of the full cell's costs."""
    texts = [
        f"{charts.millions(cell['parameters'])} parameters",
        f"{cell['bytes_per_vector']:,} B a vector",
        f"{costs(cell)[2]:,.2f} ms a short text",
    ]
    whole = costs(full) if full else (math.inf,) * 3
    known = [trio for trio in zip(costs(cell), whole, texts, strict=True) if trio[0] < math.inf]
    return ", ".join(f"{t} ({c / w:.0%})" if w < math.inf else t for c, w, t in known)


def command(run: Results) -> str:
    """Return the command that made the files of a run."""
    if (config := run.run / "config.json").is_file():
        again = shlex.quote(f"{run.name}-again")
        return f"python train.py {shlex.quote(str(config))} --name {again}"
    model, data = run.grid.get("model"), run.grid.get("data")
    if not isinstance(model, str) or not isinstance(data, list):
        return MISSING
    words = shlex.join(str(word) for word in [model, "--data", *data])
    return f"python -m mlembed evaluate {words} --out NEW"


# ---- the grid ----


def grid_section(run: Results) -> Section:
    """Return a heat map for each vocabulary rank, all on one scale."""
    section = Section("Scores")
    if not run.cells:
        ending = "has no report/grid.json, which a run writes at its end"
        section.remarks.append(f"Not scored: {run.run} {ending}.")
        return section
    for rank in dict.fromkeys(cell["rank"] for cell in run.cells):
        cells = [cell for cell in run.cells if cell["rank"] == rank]
        scores = [(mean_score(cell), cell_name(cell)) for cell in cells]
        scores = sorted(score for score in scores if math.isfinite(score[0]))
        ends = [f"{score:.1f} % at {name}" for score, name in scores[:: max(1, len(scores) - 1)]]
        alt = f"Heat map of scores, {charts.rank_name(rank)}: {' to '.join(ends) or 'none'}."
        figure = charts.score_map(cells, "", charts.score_range(run.cells))
        section.add(f"grid_{rank or 'plain'}", figure, alt)
    return section


# Key of a cell, factor to the unit, name, label of the axis, format.
COSTS = (
    ("parameters", 1e-6, "size", "parameters (millions, log scale)", "{:,.2f} M"),
    ("latency_ms", 1.0, "latency", "latency of one short text (ms, log scale)", "{:,.2f} ms"),
    ("bytes_per_vector", 1.0, "bytes a vector", "bytes a vector (log scale)", "{:,.0f} B"),
)


def cost_section(run: Results) -> Section:
    """Return score against size, latency and bytes: a figure, and its Pareto front as a table."""
    section, missing = Section("Quality against cost"), []
    for key, factor, name, axis, form in COSTS:
        points = [(factor * number(c.get(key)), mean_score(c)) for c in run.cells]
        points = [(cost if cost > 0 else math.nan, score) for cost, score in points]
        rows = [
            (cell_name(run.cells[i]), form.format(points[i][0]), f"{points[i][1]:.1f} %")
            for i in charts.front(points)
        ]
        if not rows:
            known = any(math.isfinite(cost) for cost, _ in points)
            missing.append(f"{name}: {'no finite score' if known else MISSING}")
            continue
        title = f"Score against {name}"
        alt = f"{title}. Pareto front: {'; '.join(', '.join(row) for row in rows)}."
        section.add(f"cost_{key}", charts.pareto(points, axis, title), alt)
        front = f"Pareto front of score against {name}"
        section.tables.append((front, ("Cell", name.capitalize(), "Score"), rows))
    if missing:
        section.remarks.append("; ".join(missing).capitalize() + ".")
    return section


# ---- languages ----


def language_section(run: Results) -> Section:
    """Return scores by language at full size, a part for each task."""
    section = Section("Languages")
    without = []
    for task, result in run.full["scores"].items() if run.cells else ():
        if scores := _by_language(result):
            untrained = _by_language(mapping(run.grid["untrained"].get(task)))
            texts = run.grid.get("texts_by_language")
            title = f"{task}: {len(scores)} languages"
            section.parts.append(_languages(title, scores, untrained, texts))
        else:
            without.append(task)
    if not run.cells or without:
        tasks = f": {', '.join(without)}" if without else ""
        section.remarks.append(f"Scores by language, {MISSING}{tasks}.")
    return section


def _by_language(result: Mapping[str, Any]) -> dict[Language, float]:
    by_code = mapping(result.get("by_language"))
    scores = {language(code): 100 * number(score) for code, score in by_code.items()}
    return {lang: score for lang, score in scores.items() if math.isfinite(score)}


def _languages(
    title: str, scores: dict[Language, float], untrained: dict[Language, float], texts: Any
) -> Section:
    level, cut = levels([lang.key for lang in scores], texts if isinstance(texts, dict) else None)
    by_script = _grouped(scores, lambda lang: lang.script)
    bars = [("Mean by script", _means(by_script))]
    if level:
        by_level = _grouped(scores, lambda lang: level[lang.key])
        order = [name for name in ("high", "mid", "low", "seen", "unseen") if name in by_level]
        bars.append(("Mean by resource level", _means({name: by_level[name] for name in order})))
    for script, members in by_script.items():
        rows: list[Row] = []
        for lang in members:
            code = "" if lang.name == lang.code else lang.code
            note = ", ".join(filter(None, (code, level.get(lang.key, ""))))
            rows.append((lang.name, note, scores[lang], untrained.get(lang)))
        bars.append((f"{script} ({len(members)})", rows))
    remark = f"{cut} Bars are percent, sorted within each script."
    if untrained.keys() & scores.keys():
        remark += " The upright line is the untrained model's score."
    return Section(title, [remark], bars=bars)


Groups = dict[str, dict[Language, float]]


def _grouped(scores: dict[Language, float], name: Callable[[Language], str]) -> Groups:
    """Return groups by mean, and their languages by score, best first; "unknown" comes last."""
    groups: Groups = {}
    for lang in sorted(scores, key=lambda lang: (-scores[lang], lang.name, lang.code)):
        groups.setdefault(name(lang), {})[lang] = scores[lang]
    order = sorted(groups, key=lambda group: (group == UNKNOWN, -_mean(groups[group]), group))
    return {group: groups[group] for group in order}


def _mean(scores: Mapping[Language, float]) -> float:
    return float(np.mean(list(scores.values())))


def _means(groups: Groups) -> list[Row]:
    counts = {name: len(scores) for name, scores in groups.items()}
    notes = {name: f"{n} language{'s' if n > 1 else ''}" for name, n in counts.items()}
    return [(name, notes[name], _mean(scores), None) for name, scores in groups.items()]


# ---- training ----


def training_section(run: Results) -> Section:
    """Return the curves of loss and score, and those of the loss by exit and prefix."""
    section = Section("Training")
    if run.lines is None:
        section.remarks.append(f"{run.run} has no {log.METRICS}: it was evaluated, not trained.")
        return section
    train, scores, skipped = (run.logged(kind) for kind in ("train", "eval", "skipped"))
    last = train[-1]["step"] if train else 0
    if run.cells and last not in {line["step"] for line in scores}:
        # The grid is scored after the last step.
        scores.append({"step": last, "score": mean_score(run.full)})
    for name, lines, title, axis in (
        ("loss", train, "Weighted loss", "loss"),
        ("score", scores, "Score at full size", "score (%)"),
    ):
        steps, values = curve(lines, name, most=POINTS)
        if not len(steps):
            section.remarks.append(f"{title} by step: {MISSING}.")
            continue
        first, final = (f"{values[i]:.4g} at step {steps[i]:.0f}" for i in (0, -1))
        logarithmic = name == "loss" and values.min() > 0
        figure = charts.lines({title: (steps, values)}, axis, title, logarithmic)
        section.add(f"train_{name}", figure, f"{title} by step: {first}, {final}.")
    _add_curves_by_exit(section, train)
    if section.figures and not names_of(train, "exit", "losses"):
        section.remarks.append(f"Losses by exit and prefix: {MISSING}.")
    if skipped:
        listed = ", ".join(str(line["step"]) for line in skipped[:20])
        listed += ", ..." if len(skipped) > 20 else ""
        reason = "because a loss or gradient was not finite"
        section.remarks.append(f"Steps skipped {reason}: {len(skipped)} ({listed}).")
    return section


def _add_curves_by_exit(section: Section, train: Sequence[dict[str, Any]]) -> None:
    """Append a figure for each exit, a line for each prefix; all figures have the same axes."""
    by_exit = {}
    for exit in names_of(train, "exit", "losses"):
        curves = {
            dim.replace("_", " "): curve(train, "losses", exit, dim, most=POINTS)
            for dim in names_of(train, "dim", "losses", exit)
        }
        if curves := {name: xy for name, xy in curves.items() if len(xy[0])}:
            by_exit[exit.replace("_", " ")] = curves
    if not by_exit:
        return
    every = [xy for curves in by_exit.values() for xy in curves.values()]
    steps, values = (np.concatenate([xy[i] for xy in every]) for i in (0, 1))
    low, high = float(values.min()), float(values.max())
    limits = (low / 1.05, high * 1.05) if low > 0 else (low, high)
    ends = float(steps.min()), float(steps.max())
    for exit, curves in by_exit.items():
        figure = charts.lines(curves, "contrastive loss", f"Loss at {exit}", low > 0, limits, ends)
        final = ", ".join(f"{name} {y[-1]:.3g}" for name, (_, y) in curves.items())
        alt = f"Loss by step at {exit}, each prefix a line; at the end: {final}."
        section.add(f"train_{exit.replace(' ', '_')}", figure, alt)


def time_section(run: Results) -> Section:
    """Return the time of a step by stage, and tokens a second."""
    section, train = Section("Step time"), run.logged("train")
    if timed := [line for line in train if mapping(line.get("stage_ms"))]:
        _add_stages(section, timed)
    else:
        section.remarks.append(f"Step time by stage: {MISSING}.")
    steps, rate = curve(train, "tokens_per_second", most=POINTS)
    if len(steps):
        figure = charts.lines({"": (steps, rate / 1e3)}, "thousand tokens/s", "Tokens a second")
        spread = f"mean {rate.mean():,.0f}, from {rate.min():,.0f} to {rate.max():,.0f}"
        section.add("tokens", figure, f"Tokens a second by step: {spread}.")
    else:
        section.remarks.append(f"Tokens a second: {MISSING}.")
    return section


def _add_stages(section: Section, timed: Sequence[dict[str, Any]]) -> None:
    """Append a figure of stages, the longest first; a stage that a step lacks took 0 ms."""
    ms = {
        name: np.nan_to_num([number(line["stage_ms"].get(name)) for line in timed], posinf=0)
        for name in {name for line in timed for name in line["stage_ms"]}
    }
    whole = sum(values.mean() for values in ms.values()) or 1.0
    steps, series = [line["step"] for line in timed], {}
    for name in sorted(ms, key=lambda name: (-ms[name].mean(), name)):
        mean = ms[name].mean()
        series[f"{name} {mean:,.1f} ms, {mean / whole:.0%}"] = thinned(steps, ms[name], BARS)[1]
    figure = charts.stages(thinned(steps, steps, BARS)[0], series, "Step time by stage")
    section.add("stages", figure, f"Mean time of a step by stage: {'; '.join(series)}.")


# ---- tables ----


# Key of a cell, title, format.
COLUMNS = (
    ("parameters", "Parameters", "{:,.0f}"),
    ("bytes_per_vector", "Bytes a vector", "{:,.0f}"),
    ("latency_ms", "Latency (ms)", "{:,.2f}"),
    ("texts_per_second", "Texts/s", "{:,.0f}"),
    ("memory_mib", "Memory (MiB)", "{:,.0f}"),
)


def table_section(run: Results) -> Section:
    """Return all cells of the grid, and the scores at full size next to the untrained model's."""
    section = Section("All numbers")
    if not run.cells:
        section.remarks.append("Not scored.")
        return section
    columns = [column for column in COLUMNS if any(column[0] in cell for cell in run.cells)]
    rows, names = [], charts.precisions(run.cells)
    for cell in run.cells:
        size = cell["rank"] or "plain", cell["exit"], cell["dim"]
        values = (shown(cell.get(key), form) for key, _, form in columns)
        stored = (shown(mean_score(cell, name), "{:.2f}") for name in names)
        rows.append((*size, shown(mean_score(cell), "{:.2f}"), *stored, *values))
    titles = *(f"{name} (%)" for name in names), *(title for _, title, _ in columns)
    head = ("Rank", "Exit", "Width", "Score (%)", *titles)
    section.tables += [("All cells of the grid", head, rows), *task_tables(run)]
    if missing := [title for _, title, _ in COLUMNS if title not in head]:
        section.remarks.append(f"{', '.join(missing)}: {MISSING}.")
    return section


def task_tables(run: Results) -> list[Table]:
    """Return scores of tasks and kinds at full size, and metrics beyond the score."""
    kinds, metrics = [], []
    for task, result in run.full["scores"].items():
        start = mapping(run.grid["untrained"].get(task))
        kinds.append((task, result["score"], start.get("score")))
        before = mapping(start.get("by_kind"))
        for kind, score in mapping(result.get("by_kind")).items():
            kinds.append((f"{task}: {kind}", score, before.get(kind)))
        for metric, value in result.items():
            if metric != "score" and type(value) in (int, float):
                metrics.append((task, metric, f"{number(value):.4g}"))
    where = f"at full size ({cell_name(run.full)})"
    rows = [(name, *(shown(100 * number(x), "{:.1f}") for x in xs)) for name, *xs in kinds]
    scores: Table = f"Scores {where}", ("Task", "Score (%)", "Untrained"), rows
    other: Table = f"Other metrics {where}", ("Task", "Metric", "Value"), metrics
    return [scores, other] if metrics else [scores]


# ---- the page ----


def render(run: Results) -> tuple[str, list[Image]]:
    """Return the page and its figures. The same files give the same bytes."""
    sections = [
        grid_section(run),
        *([cost_section(run)] if run.cells else []),
        language_section(run),
        training_section(run),
        time_section(run),
        table_section(run),
    ]
    templates = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["base64"] = lambda svg: base64.b64encode(svg.encode("utf-8")).decode("ascii")
    html = templates.get_template("report.html.j2").render(
        name=run.name,
        facts=facts(run),
        command=command(run),
        sections=sections,
        full=cell_name(run.full) if run.cells else "",
        points=POINTS,
    )
    # JSON can hold half of a surrogate pair, which UTF-8 cannot; the page shows its code.
    html = html.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"
    return html, [image for section in sections for image in section.figures]


def write(run: Results, directory: Path) -> int:
    """Write report.html and its figures, report_*.svg; return the number of figures."""
    html, images = render(run)
    (directory / "report.html").write_text(html, encoding="utf-8")
    for image in images:
        (directory / f"report_{image.name}.svg").write_text(image.svg, encoding="utf-8")
    return len(images)
