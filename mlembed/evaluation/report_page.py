"""What a run gave, as one HTML page that needs nothing else, and its figures as PNG.

RUN is what train.py wrote, or what `python -m mlembed evaluate --out` did (then there are no
training curves). The page is readable on a phone, in print, in dark and in light, and without
telling colours apart. What a file does not say is said to be missing, never made up.

By default report.html and report_*.png go beside grid.json. They hold nothing that is not in the
run, yet someone may have kept or changed them: where there are some, nothing is written and the
error says so. Remove them, or name a new directory with --out.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..runtime import log
from . import charts, page
from .charts import mean_score
from .languages import UNKNOWN, Language, language, levels
from .results import Found, curve, mapping, names_of, number, thinned

POINTS = 200  # of a curve; more are not seen
BARS = 24  # of steps in the breakdown
MISSING = "not recorded"


@dataclass
class Images:
    """Figures drawn so far: PNGs by file name."""

    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, figure: Figure, alt: str, heading: str) -> str:
        """-> the figure as HTML; in the file its heading is inside."""
        both = charts.svg(figure)
        figure.suptitle(heading)
        self.files[f"report_{name}.png"] = charts.png(figure)
        return page.figure(both, alt, heading)


# ---- headline ----


def cell_name(cell: Mapping[str, Any]) -> str:
    rank = f" rank {cell['rank']}" if cell["rank"] else ""
    return f"exit {cell['exit']}{rank} width {cell['dim']}"


def percent(score: float) -> str:
    return f"{score:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(score) else "no finite score"


def costs(cell: Mapping[str, Any]) -> tuple[float, float, float]:
    """What a cell costs: parameters, bytes a vector, and latency in ms, inf where there is none."""
    latency = number(cell.get("latency_ms"))
    return cell["parameters"], cell["bytes_per_vector"], latency if latency > 0 else math.inf


def cheapest_within(
    cells: Sequence[dict[str, Any]], points: float, first: int = 0
) -> dict[str, Any] | None:
    """Of cells at most so many points below the best: the one of least cost, of which number
    `first` counts before the others. None where no score is finite."""
    scores = [mean_score(cell) for cell in cells]
    finite = [score for score in scores if math.isfinite(score)]
    if not finite:
        return None
    near = [c for c, s in zip(cells, scores, strict=True) if s >= max(finite) - points - 1e-9]
    return min(near, key=lambda c: (costs(c)[first], *costs(c)))


def headline(found: Found) -> str:
    rows = scored(found) if found.cells else []
    last = max((line["step"] for line in found.lines or []), default=None)
    if last is not None:
        rows.append(("Trained for", f"{last:,} steps", ""))
    for name, key in (("Commit", "commit"), ("Device", "device")):
        rows.append((name, str(found.grid.get(key) or MISSING), ""))
    rows.append(("Date of the metrics", found.date, ""))
    return page.facts(rows, [("Run again", command(found))])


def scored(found: Found) -> list[tuple[str, str, str]]:
    """What the nesting buys: (name, value, note)."""
    full, before = found.full, mean_score({"scores": found.grid["untrained"]})
    note = f"untrained {percent(before)}" if math.isfinite(before) else ""
    rows = [
        ("Score at full size", percent(mean_score(full)), note),
        ("Full size", cell_name(full), _costs(full)),
    ]
    chosen: list[tuple[dict[str, Any], list[str]]] = []
    for first, what in enumerate(("smallest model", "shortest vector", "fastest")):
        small = cheapest_within(found.cells, 1.0, first)
        if small is None or math.isinf(costs(small)[first]):
            continue
        if same := next((names for cell, names in chosen if cell is small), None):
            same.append(what)
        else:
            chosen.append((small, [what]))
    for small, names in chosen:
        name = f"{', '.join(names).capitalize()} within 1 point of the best"
        score = f"{cell_name(small)}: {percent(mean_score(small))}"
        rows.append((name, score, _costs(small, full)))
    tasks = ", ".join(full["scores"]) or "none"
    return [*rows, ("Tasks", tasks, f"{(n := len(found.cells))} cell{'s' if n > 1 else ''}")]


def _costs(cell: Mapping[str, Any], full: Mapping[str, Any] | None = None) -> str:
    """The costs of a cell, with their shares of the full one's."""
    shown = [f"{charts.millions(cell['parameters'])} parameters"]
    shown += (f"{cell['bytes_per_vector']:,} B a vector", f"{costs(cell)[2]:,.2f} ms a short text")
    whole = costs(full) if full else ()
    said = []
    for i, (value, text) in enumerate(zip(costs(cell), shown, strict=True)):
        if math.isfinite(value):
            share = whole and math.isfinite(whole[i])
            said.append(f"{text} ({value / whole[i]:.0%})" if share else text)
    return ", ".join(said)


def command(found: Found) -> str:
    """What made these files."""
    if (config := found.run / "config.json").is_file():
        again = shlex.quote(f"{found.name}-again")
        return f"python train.py {shlex.quote(str(config))} --name {again}"
    model, data = found.grid.get("model"), found.grid.get("data")
    if not isinstance(model, str) or not isinstance(data, list):
        return MISSING
    words = " ".join(shlex.quote(str(word)) for word in [model, "--data", *data])
    return f"python -m mlembed evaluate {words} --out NEW"


# ---- the grid ----


def grid_section(found: Found, images: Images) -> list[str]:
    if not found.cells:
        text = f"Not scored: {found.run} has no report/grid.json; a run writes it at its end."
        return [page.paragraph(text)]
    limits = charts.score_range(found.cells)
    maps = []
    for rank in dict.fromkeys(cell["rank"] for cell in found.cells):
        cells = [cell for cell in found.cells if cell["rank"] == rank]
        scores = {cell_name(c): s for c in cells if math.isfinite(s := mean_score(c))}
        name = charts.rank_name(rank)
        alt = f"Heat map of scores, {name}: no score is finite."
        if scores:
            low, high = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
            alt = (
                f"Heat map of scores, {name}: from {scores[low]:.1f} % at {low} to "
                f"{scores[high]:.1f} % at {high}."
            )
        maps.append(
            images.add(
                f"grid_{rank or 'plain'}", charts.heat(cells, limits), alt, f"Score (%) at {name}"
            )
        )
    how = (
        "Each number is the mean score over all tasks, in percent, of the model cut at that exit "
        "(down, with the parameters that are left) and vectors cut at that width (across). "
        "Lighter is better, on one scale for all ranks; – is a score that is not finite or not "
        "there. Where numbers do not fit, they are in the table at the end."
    )
    return [page.paragraph(how, note=True), page.figures(*maps)]


COSTS = (  # of a cell: key, unit, what it is, its axis, how it is printed
    ("parameters", 1e-6, "size", "parameters (millions, log scale)", "{:,.2f} M"),
    ("latency_ms", 1.0, "latency", "latency of one short text (ms, log scale)", "{:,.2f} ms"),
    ("bytes_per_vector", 1.0, "bytes a vector", "bytes a vector (log scale)", "{:,.0f} B"),
)


def cost_section(found: Found, images: Images) -> list[str]:
    parts, missing = [], []
    for key, unit, what, axis, shown in COSTS:
        points = [(unit * number(c.get(key)), mean_score(c)) for c in found.cells]
        points = [(cost if cost > 0 else math.nan, score) for cost, score in points]
        best = charts.front(points)
        if not best:
            costs = [cost for cost, _ in points if math.isfinite(cost)]
            missing.append(f"{what}: {'no finite score' if costs else MISSING}")
            continue
        names = [cell_name(cell) for cell in found.cells]
        rows = [f"{c['rank'] or 'plain':>5} {c['exit']:>4} {c['dim']:>5}" for c in found.cells]
        listed = "; ".join(
            f"{names[i]}, {shown.format(points[i][0])}, {points[i][1]:.1f} %" for i in best
        )
        alt = f"Score against {what}. Pareto front: {listed}."
        figure = charts.pareto(points, rows, axis, shown, " rank exit width")
        parts.append(images.add(f"cost_{key}", figure, alt, f"Score against {what}"))
    how = (
        "Every cell of the grid is a circle; up and to the left is better. Diamonds are the Pareto "
        "front: no other cell is as good at no higher cost. Their numbers are listed below each "
        f"figure, {charts.LISTED} of them where there are more; where two numbers would meet, the "
        "first is shown."
    )
    said = [page.paragraph("; ".join(missing).capitalize() + ".")] if missing else []
    return [page.paragraph(how, note=True), *said, page.figures(*parts)]


# ---- languages ----


def language_section(found: Found, images: Images) -> list[str]:
    if not found.cells:
        return [page.paragraph(f"Scores by language: {MISSING}.")]
    parts, without = [], []
    for at, (task, result) in enumerate(found.full["scores"].items(), 1):
        scores = {
            language(code): 100 * number(score)
            for code, score in mapping(result.get("by_language")).items()
        }
        finite = {lang: score for lang, score in scores.items() if math.isfinite(score)}
        if finite:
            parts.append(_languages_of(found, images, at, task, finite))
        else:
            without.append(task)
    how = (
        f"Scores by language at full size ({cell_name(found.full)}). Scripts are those that a "
        "code names, otherwise the likely one by Unicode CLDR; a language that CLDR does not know "
        'is under "unknown".'
    )
    said = (
        [page.paragraph(f"Scores by language, {MISSING}: {', '.join(without)}.")] if without else []
    )
    return [page.paragraph(how, note=True), *said, *parts]


def _languages_of(
    found: Found, images: Images, at: int, task: str, scores: dict[Language, float]
) -> str:
    texts = found.grid.get("texts_by_language")
    level, cut = levels([lang.key for lang in scores], texts if isinstance(texts, dict) else None)
    start = mapping(mapping(found.grid["untrained"].get(task)).get("by_language"))
    marks = {code: 100 * x for code, score in start.items() if math.isfinite(x := number(score))}
    by_script = _grouped(scores, lambda lang: lang.script)
    figures = [_group_figure(images, f"script_{at}", by_script, "script")]
    if level:
        by_level = _grouped(scores, lambda lang: level[lang.key])
        order = [name for name in ("high", "mid", "low", "seen", "unseen") if name in by_level]
        by_level = {name: by_level[name] for name in order}
        figures.append(_group_figure(images, f"level_{at}", by_level, "resource level"))
    bars = [
        (
            f"{script} ({len(members)})",
            [
                (lang.name, _note(lang, level), score, marks.get(lang.code))
                for lang, score in members.items()
            ],
        )
        for script, members in by_script.items()
    ]
    note = f"{cut} Bars are percent, sorted within each script."
    if marks:
        note += " The upright line is the untrained model's score."
    return "\n".join(
        [
            f"<h3>{page.escape(task)}: {len(scores)} languages</h3>",
            page.figures(*figures),
            page.paragraph(note, note=True),
            page.bars(bars),
        ]
    )


def _note(lang: Language, level: Mapping[tuple[str, str], str]) -> str:
    code = "" if lang.name == lang.code else lang.code
    return ", ".join(part for part in (code, level.get(lang.key, "")) if part)


def _grouped(
    scores: dict[Language, float], name: Callable[[Language], str]
) -> dict[str, dict[Language, float]]:
    """Groups by mean, languages in each by score, best first; "unknown" is the last group."""
    found: dict[str, dict[Language, float]] = {}
    for lang in sorted(scores, key=lambda lang: (-scores[lang], lang.name, lang.code)):
        found.setdefault(name(lang), {})[lang] = scores[lang]

    def last(group: str) -> tuple[bool, float, str]:
        return group == UNKNOWN, -float(np.mean(list(found[group].values()))), group

    return {group: found[group] for group in sorted(found, key=last)}


def _group_figure(
    images: Images, name: str, groups: dict[str, dict[Language, float]], what: str
) -> str:
    values = {group: list(members.values()) for group, members in groups.items()}
    means = ", ".join(f"{group} {np.mean(x):.1f} % ({len(x)})" for group, x in values.items())
    alt = f"Mean score by {what}, with the number of languages: {means}."
    return images.add(name, charts.groups(values), alt, f"Mean score by {what}")


# ---- training ----


def training_section(found: Found, images: Images) -> list[str]:
    if found.lines is None:
        text = f"{found.run} has no {log.METRICS}: it was evaluated, not trained, here."
        return [page.paragraph(text)]
    train, skipped = found.logged("train"), found.logged("skipped")
    parts, notes = [], []
    scores = found.logged("eval")
    last = train[-1]["step"] if train else 0
    if found.cells and last not in {line["step"] for line in scores}:  # where the grid comes from
        scores.append({"step": last, "score": mean_score(found.full)})
    for name, lines, key, title, axis in (
        ("loss", train, "loss", "Weighted loss", "loss"),
        ("score", scores, "score", "Score at full size", "score (%)"),
    ):
        steps, values = curve(lines, key, most=POINTS)
        if not len(steps):
            notes.append(f"{title} by step: {MISSING}.")
            continue
        alt = (
            f"{title} by step: {values[0]:.4g} at step {steps[0]:.0f}, {values[-1]:.4g} at step "
            f"{steps[-1]:.0f}."
        )
        figure = charts.lines(
            {title: (steps, values)}, axis, log=key == "loss" and values.min() > 0
        )
        parts.append(images.add(f"train_{name}", figure, alt, title))
    parts += _curves_by_exit(train, images)
    if len(parts) and not names_of(train, "exit", "losses"):
        notes.append(f"Losses by exit and prefix: {MISSING}.")
    if skipped:
        steps_left_out = ", ".join(str(line["step"]) for line in skipped[:20])
        notes.append(
            f"Left out because a loss or gradient was not finite: {len(skipped)} steps "
            f"({steps_left_out}{', ..' if len(skipped) > 20 else ''})."
        )
    how = (
        "A line for each prefix (dim) and a figure for each exit, all on the same axes; losses are "
        "those of the step's own batch and vocabulary rank, on a logarithmic axis where all are "
        f"above 0. Beyond {POINTS} points neighbours are averaged; values that are not finite are "
        "left out."
    )
    said = [page.paragraph(" ".join(notes))] if notes else []
    return [page.paragraph(how, note=True), *said, page.figures(*parts)]


def _curves_by_exit(train: Sequence[dict[str, Any]], images: Images) -> list[str]:
    by_exit: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for exit in names_of(train, "exit", "losses"):
        curves = {
            dim.replace("_", " "): curve(train, "losses", exit, dim, most=POINTS)
            for dim in names_of(train, "dim", "losses", exit)
        }
        if curves := {name: xy for name, xy in curves.items() if len(xy[0])}:
            by_exit[exit] = curves
    if not by_exit:
        return []
    steps, values = (
        np.concatenate([xy[i] for curves in by_exit.values() for xy in curves.values()])
        for i in (0, 1)
    )
    positive, ends = bool(values.min() > 0), (float(steps.min()), float(steps.max()))
    room = (values.min() / 1.05, values.max() * 1.05)
    limits = room if positive else (float(values.min()), float(values.max()))
    parts = []
    for exit, curves in by_exit.items():
        figure = charts.lines(curves, "contrastive loss", positive, limits, ends)
        last = ", ".join(f"{name} {y[-1]:.3g}" for name, (_, y) in curves.items())
        alt = f"Loss by step at {exit.replace('_', ' ')}, each prefix a line; at the end: {last}."
        parts.append(images.add(f"train_{exit}", figure, alt, f"Loss at {exit.replace('_', ' ')}"))
    return parts


def time_section(found: Found, images: Images) -> list[str]:
    train = found.logged("train")
    parts, notes = [], []
    if timed := [line for line in train if mapping(line.get("stage_ms"))]:
        parts.append(_stage_figure(timed, images))
    else:
        notes.append(f"Step time by stage: {MISSING}.")
    at, rate = curve(train, "tokens_per_second", most=POINTS)
    if len(at):
        spread = f"from {rate.min():,.0f} to {rate.max():,.0f}"
        alt = f"Tokens a second by step: mean {rate.mean():,.0f}, {spread}."
        figure = charts.lines({"": (at, rate / 1e3)}, "thousand tokens/s")
        parts.append(images.add("tokens", figure, alt, "Tokens a second"))
    else:
        notes.append(f"Tokens a second: {MISSING}.")
    how = (
        "Where a step's time goes: above over the run, stacked from the bottom in the order of "
        "the list below it, which has the mean over all logged steps and its share. Stages have "
        "hatches as well as colours."
    )
    said = [page.paragraph(" ".join(notes))] if notes else []
    return [page.paragraph(how, note=True), *said, page.figures(*parts)]


def _stage_figure(timed: Sequence[dict[str, Any]], images: Images) -> str:
    names = {name for line in timed for name in line["stage_ms"]}
    ms = {}
    for name in names:
        values = [number(line["stage_ms"].get(name)) for line in timed]
        ms[name] = [x if math.isfinite(x) else 0.0 for x in values]
    means = {name: float(np.mean(values)) for name, values in ms.items()}
    order = sorted(names, key=lambda name: (-means[name], name))
    whole = sum(means.values()) or 1.0
    said = {name: f"{means[name]:,.1f} ms, {means[name] / whole:.0%}" for name in order}
    steps = [line["step"] for line in timed]
    shown = {name: thinned(steps, ms[name], BARS)[1] for name in order}
    figure = charts.stages(thinned(steps, steps, BARS)[0], shown, means, said)
    alt = "Mean time of a step by stage: " + "; ".join(f"{n} {text}" for n, text in said.items())
    return images.add("stages", figure, f"{alt}.", "Step time by stage")


# ---- tables ----


MEASURED = (
    ("latency_ms", "Latency (ms)", "{:,.2f}"),
    ("texts_per_second", "Texts/s", "{:,.0f}"),
    ("memory_mib", "Memory (MiB)", "{:,.0f}"),
)


def table_section(found: Found) -> list[str]:
    if not found.cells:
        return [page.paragraph("Not scored.")]

    def shown(value: Any, form: str) -> str:
        return form.format(number(value)) if math.isfinite(number(value)) else "–"

    head = ("Rank", "Exit", "Width", "Score (%)", "Parameters", "Bytes a vector")
    kept = [m for m in MEASURED if any(m[0] in cell for cell in found.cells)]
    rows = [
        (
            cell["rank"] or "plain",
            cell["exit"],
            cell["dim"],
            shown(mean_score(cell), "{:.2f}"),
            f"{cell['parameters']:,}",
            f"{cell['bytes_per_vector']:,}",
            *(shown(cell.get(key), form) for key, _, form in kept),
        )
        for cell in found.cells
    ]
    parts = [page.table((*head, *(name for _, name, _ in kept)), rows, "All cells of the grid")]
    if left := [name for key, name, form in MEASURED if (key, name, form) not in kept]:
        parts.append(page.paragraph(f"{', '.join(left)}: {MISSING}.", note=True))
    parts += task_tables(found)
    return parts


def task_tables(found: Found) -> list[str]:
    """Tasks and kinds at full size beside the untrained model's, and metrics beyond the score."""
    untrained = found.grid["untrained"]

    def row(name: str, now: Any, then: Any) -> tuple[str, ...]:
        values = [100 * number(score) for score in (now, then)]
        return (name, *(f"{v:.1f}" if math.isfinite(v) else "–" for v in values))

    kinds, metrics = [], []
    for task, result in found.full["scores"].items():
        start = mapping(untrained.get(task))
        kinds.append(row(task, result["score"], start.get("score")))
        before = mapping(start.get("by_kind"))
        for kind, score in mapping(result.get("by_kind")).items():
            kinds.append(row(f"{task}: {kind}", score, before.get(kind)))
        for metric, value in result.items():
            if metric != "score" and type(value) in (int, float):
                metrics.append((task, metric, f"{number(value):.4g}"))
    where = f"at full size ({cell_name(found.full)})"
    parts = [page.table(("Task", "Score (%)", "Untrained"), kinds, f"Scores {where}")]
    if metrics:
        parts.append(page.table(("Task", "Metric", "Value"), metrics, f"Other metrics {where}"))
    return parts


# ---- the page ----


def render(found: Found) -> tuple[str, dict[str, bytes]]:
    """-> the page, and PNGs by file name. The same files give the same bytes."""
    images = Images()
    with charts.style():
        sections = {
            "Scores": grid_section(found, images),
            **({"Quality against cost": cost_section(found, images)} if found.cells else {}),
            "Languages": language_section(found, images),
            "Training": training_section(found, images),
            "Step time": time_section(found, images),
            "All numbers": table_section(found),
        }
    title = f"<h1>{page.escape(found.name)}</h1>"
    parts = [page.section(name, *section) for name, section in sections.items()]
    body = [title, headline(found), page.contents(sections), *parts]
    return page.document(f"{found.name}: report", body), images.files


def write(found: Found, target: Path) -> str:
    """report.html and its figures into a directory; -> what they are."""
    html, files = render(found)
    contents = {**files, "report.html": html.encode("utf-8")}
    for name, content in contents.items():
        (target / name).write_bytes(content)
    size = len(contents["report.html"]) / 1e6
    return f"{size:.1f} MB, and {len(files)} figures as PNG beside it"
