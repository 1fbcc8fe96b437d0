"""A run's report: what it says is what the files say, on a phone, in print, in the dark, and when
something is missing."""

import copy
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import chromium
import processes
import pytest
from PIL import Image

from mlembed.cli import report
from mlembed.evaluation import report_page, results

ROOT = Path(__file__).parents[2]
NASTY = "<b>R&D \"one\" 'two'</b>" + 60 * "x"
EXITS, DIMS, RANKS = (1, 2), (8, 16), (4, 8)
LANGUAGES = {"deu": 0.9, "rus": 0.5, "zho_Hant": 0.4, "fra": 0.6, "qqq": 0.1, "<i>&": 0.95}


def score(exit, dim, rank):
    return round(0.5 + 0.1 * exit + 0.002 * dim + 0.004 * (rank or 0), 6)


def grid_of(ranks=RANKS, exits=EXITS, dims=DIMS):
    cells = []
    for rank in ranks:
        for exit in exits:
            for dim in dims:
                s = score(exit, dim, rank)
                task = {"score": s, "f1": s / 2, "by_kind": {"date": s}, "by_language": LANGUAGES}
                size = {
                    "parameters": 10**6 * exit + 1000 * (rank or 0),
                    "bytes_per_vector": 4 * dim,
                }
                measured = {"latency_ms": 1.5 * exit, "texts_per_second": 1e4, "memory_mib": 321.0}
                cells.append(
                    {"dim": dim, "exit": exit, "rank": rank, **size, **measured}
                    | {"scores": {NASTY: task}}
                )
    start = {NASTY: {"score": 0.25, "by_kind": {"date": 0.125}, "by_language": {"deu": 0.2}}}
    return {
        "run": {"name": NASTY},
        "commit": "abc<1>",
        "device": "cpu & co, 2 threads",
        "untrained": start,
        "texts_by_language": {"de": 10, "ru": 20, "fr": 30},
        "cells": cells,
    }


def lines_of(exits=EXITS, dims=DIMS):
    lines = [{"step": 0, "kind": "eval", "score": 25.0, "tasks": {}}]
    for step in range(10, 60, 10):
        losses = {f"exit_{e}": {f"dim_{d}": 10 / (step + e + d) for d in dims} for e in exits}
        lines.append(
            {"step": step, "kind": "train", "loss": 30 / step, "tokens_per_second": 1e3 + step}
            | {"losses": losses, "stage_ms": {"forward": 30.0, "data<": 10.0}}
        )
    return [*lines, {"step": 35, "kind": "skipped", "bad": "loss"}]


def write(run, grid=None, lines=None):
    """The files of a run; their time is fixed."""
    (run / "report").mkdir(parents=True)
    if grid:
        (run / "report" / "grid.json").write_text(json.dumps(grid))
    if lines is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps({"name": NASTY}))
    for path in run.rglob("*.json*"):
        os.utime(path, (0, 10**9))
    return run


def command(*args):
    return processes.run("-m", "mlembed", "report", *args)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything, and its report made by the command."""
    path = write(tmp_path_factory.mktemp("report") / "run", grid_of(), lines_of())
    done = command(path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "report.html" in done.stdout
    return path


@pytest.fixture(scope="module")
def html(run):
    return (run / "report" / "report.html").read_text(encoding="utf-8")


VOID = {"meta", "link", "img", "source", "br", "hr"}


class Reader(HTMLParser):
    """Text by tag, every tag closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.sections = [], [], [], {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "head"):
            self.texts.append((self.open[-1], data))

    def of(self, *tags):
        return [text for tag, text in self.texts if tag in tags]

    @property
    def text(self):
        return " ".join(" ".join(text for _, text in self.texts).split())


# ---- a whole report ----


def test_page_is_well_formed_and_needs_nothing(html):
    page = Reader(html)
    assert html.startswith("<!DOCTYPE html>") and ("html", {"lang": "en"}) in page.tags
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1 and headings[0] == 1
    assert all(b <= a + 1 for a, b in zip(headings, headings[1:], strict=False))
    assert not {"script", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    addresses = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset")
    ]
    places = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert [value[1:] for value in addresses if value.startswith("#")] == places
    assert len(places) == len(set(places)) == 6
    assert all(value.startswith(("data:", "#")) for value in addresses)
    assert not re.search(r"url\(|@import", html)


def test_every_figure_has_words_and_a_file(run, html):
    images = [attrs for tag, attrs in Reader(html).tags if tag == "img"]
    assert [image["alt"] for image in images[::2]] == [image["alt"] for image in images[1::2]]
    images = images[::2]  # light and dark
    files = sorted(path.name for path in (run / "report").glob("*.png"))
    names = ["cost_bytes_per_vector", "cost_latency_ms", "cost_parameters", "grid_4", "grid_8"]
    names += ["level_1", "script_1", "stages", "tokens", "train_exit_1", "train_exit_2"]
    names += ["train_loss", "train_score"]
    assert files == [f"report_{name}.png" for name in sorted(names)]
    assert len(images) == len(files) and all(len(image["alt"]) > 30 for image in images)
    for name in files:
        with Image.open(run / "report" / name) as image:
            image.load()
            assert image.width <= 720 and len(image.getcolors(10**6)) > 3


def test_what_files_name_stays_text(html):
    page = Reader(html)
    assert page.of("h1") == [NASTY]
    assert NASTY not in html and "<i>&" not in html and "abc<1>" not in html
    for name in (NASTY, "<i>&", "abc<1>", "cpu & co, 2 threads"):
        assert name in page.text
    assert {tag for tag, _ in page.tags} & {"i"} == {"i"}  # our marks on the bars, and those only
    assert sum(tag == "i" for tag, _ in page.tags) == 1  # German alone has an untrained score
    assert "data< 10.0 ms, 25%" in [a for t, a in page.tags if t == "img"][-4]["alt"]


def test_headline_says_what_nesting_buys(html):
    page = Reader(html).text
    best = 100 * score(2, 16, 8)
    assert f"Score at full size {best:.1f}\N{NO-BREAK SPACE}%".split() == (
        re.search(r"Score at full size \S+ %|Score at full size \S+\s\S", page)[0].split()
    )
    assert "untrained 25.0" in page and "2.01 M parameters" in page
    assert "Full size exit 2 rank 8 width 16 2.01 M parameters, 64 B a vector, 3.00 ms a" in page
    assert "Smallest model, shortest vector, fastest within 1 point of the best exit 2" in page
    assert "2.01 M parameters (100%), 64 B a vector (100%), 3.00 ms a short text (100%)" in page
    assert "50 steps" in page and "2001-09-09 01:46 UTC" in page and "8 cells" in page


def test_smallest_within_a_point():
    cells = grid_of()["cells"]  # exit 2: 70 % + 0.2 a width + 0.4 a rank
    assert report_page.cheapest_within(cells, 1.0) is cells[-1]
    small = report_page.cheapest_within(cells, 1.6)  # rank 4, 1.6 below
    assert (small["rank"], small["exit"], small["dim"]) == (4, 2, 16)
    small = report_page.cheapest_within(cells, 3.2)  # fewest parameters, then the shorter vector
    assert (small["rank"], small["exit"], small["dim"]) == (4, 2, 8)
    assert report_page.cheapest_within(cells, 100.0) is cells[0]
    cells[1] |= {"parameters": 9, "latency_ms": 9.0}
    assert [report_page.cheapest_within(cells, 100.0, first) for first in range(3)] == [
        cells[1],
        cells[0],
        cells[0],
    ]
    none = copy.deepcopy(cells)
    for cell in none:
        cell["scores"][NASTY]["score"] = None
    assert report_page.cheapest_within(none, 1.0) is None


def test_a_cost_that_is_unknown_is_infinite():
    cell = {"parameters": 9, "bytes_per_vector": 32}
    assert report_page.costs({**cell, "latency_ms": 1.5}) == (9, 32, 1.5)
    for unknown in ({}, {"latency_ms": 0.0}, {"latency_ms": None}):
        assert report_page.costs(cell | unknown) == (9, 32, math.inf)


def rows_of(html, caption):
    table = re.search(rf"<caption>{caption}.*?</table>", html, re.DOTALL)[0]
    found = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found]


def test_tables_have_every_number(html):
    head, *rows = rows_of(html, "All cells")
    assert head[:4] == ["Rank", "Exit", "Width", "Score (%)"] and len(rows) == 8
    for row, cell in zip(rows, grid_of()["cells"], strict=True):
        rank, exit, dim = cell["rank"], cell["exit"], cell["dim"]
        wanted = [rank, exit, dim, f"{100 * score(exit, dim, rank):.2f}"]
        wanted += [f"{cell['parameters']:,}", 4 * dim, f"{1.5 * exit:.2f}", "10,000", "321"]
        assert row == list(map(str, wanted))
    (_, *kinds), (_, *metrics) = rows_of(html, "Scores at"), rows_of(html, "Other metrics")
    best = score(2, 16, 8)
    assert [row[1:] for row in kinds] == [
        [f"{100 * best:.1f}", "25.0"],
        [f"{100 * best:.1f}", "12.5"],
    ]
    assert [row[1:] for row in metrics] == [["f1", f"{best / 2:.4g}"]]


def test_languages_are_under_their_script_and_level(html):
    bars = html[html.index('<div class="bars">') : html.index(">Training</h2>")]
    parts = re.split(r"<h4>(.*?)</h4>", bars)[1:]
    found = {
        heading: re.findall(r"<li><span>(.*?)(?: <small>(.*?)</small>)?</span>.*?>([\d.]+)</", rows)
        for heading, rows in zip(parts[::2], parts[1::2], strict=True)
    }
    assert list(found.items()) == [  # by mean, best first, unknown last in any case
        ("Latin (2)", [("German", "deu, low", "90.0"), ("French", "fra, high", "60.0")]),
        ("Cyrillic (1)", [("Russian", "rus, mid", "50.0")]),
        ("Traditional Han (1)", [("Chinese (Traditional)", "zho_Hant, unseen", "40.0")]),
        ("unknown (2)", [("&lt;i&gt;&amp;", "unseen", "95.0"), ("qqq", "unseen", "10.0")]),
    ]
    alts = [attrs["alt"] for tag, attrs in Reader(html).tags if tag == "img"]
    assert any("Latin 75.0 % (2), Cyrillic 50.0 % (1)" in alt for alt in alts)
    assert any("high 60.0 % (1), mid 50.0 % (1), low 90.0 % (1), unseen 48.3" in a for a in alts)


def test_training_says_what_was_logged(html):
    alts = " ".join(attrs["alt"] for tag, attrs in Reader(html).tags if tag == "img")
    assert "Weighted loss by step: 3 at step 10, 0.6 at step 50." in alts
    best = 100 * score(2, 16, 8)  # the grid is scored behind the last step
    assert f"Score at full size by step: 25 at step 0, {best:.4g} at step 50." in alts
    assert f"exit 2, each prefix a line; at the end: dim 8 {10 / 60:.3g}, dim 16" in alts
    assert "forward 30.0 ms, 75%" in alts and "mean 1,030, from 1,010 to 1,050" in alts
    assert "not finite: 1 steps (35)." in Reader(html).text


def test_pareto_front_is_listed(html):
    (alt,) = (
        a["alt"]
        for t, a in Reader(html).tags
        if t == "img" and a["class"] == "dark" and "against latency" in a["alt"]
    )
    assert alt.endswith(
        "front: exit 1 rank 8 width 16, 1.50 ms, 66.4 %; exit 2 rank 8 width 16, 3.00 ms, 76.4 %."
    )


# ---- files ----


def test_same_files_same_bytes(run, html):
    again, files = report_page.render(results.read(run))
    assert again == html
    assert files == {path.name: path.read_bytes() for path in (run / "report").glob("*.png")}


def test_nothing_is_overwritten(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = command(run)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(
        r"error: out: expected no report there yet, got .*/report\.html and 13 more;", done.stderr
    )
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="expected a new directory"):
        report.main(run, out=str(run))
    kept = write(tmp_path / "kept", lines=[]) / "report" / "report_mine.png"
    kept.write_text("mine")
    with pytest.raises(ValueError, match=r"got .*report_mine\.png"):
        report.main(tmp_path / "kept")
    assert kept.read_text() == "mine" and list(kept.parent.iterdir()) == [kept]


def test_a_new_directory(tmp_path, capsys):
    source = write(tmp_path / "run", lines=lines_of()[:2])
    report.main(source, out=str(tmp_path / "new" / "er"))
    assert (tmp_path / "new" / "er" / "report.html").is_file()
    assert not list((source / "report").iterdir())
    assert str(tmp_path / "new" / "er" / "report.html") in capsys.readouterr().out


# ---- what is missing ----


def rendered(path, grid, lines):
    html, files = report_page.render(results.read(write(path / "run", grid, lines)))
    return Reader(html).text, files


def without(*keys):
    grid = grid_of(ranks=(None,), exits=(1,))
    for key in keys:
        grid.pop(key, None)
        for cell in grid["cells"]:
            cell.pop(key, None)
            cell["scores"][NASTY].pop(key, None)
    return grid


def test_what_an_older_grid_lacks_is_said(tmp_path):
    grid = without("latency_ms", "texts_by_language", "device", "commit", "untrained", "run")
    text, files = rendered(tmp_path, grid, None)
    for said in ("Latency: not recorded.", "Device not recorded", "Commit not recorded"):
        assert said in text
    assert "Training texts by language: not recorded, so there are no resource levels." in text
    assert "Latency (ms): not recorded." in text and NASTY in text  # the name is in config.json
    assert "untrained" not in text
    names = ("cost_bytes_per_vector", "cost_parameters", "grid_plain", "script_1")
    assert sorted(files) == [f"report_{name}.png" for name in names]


def test_a_task_without_languages_is_said(tmp_path):
    text, files = rendered(tmp_path, without("by_language"), None)
    assert f"Scores by language, not recorded: {NASTY}." in text
    assert not [name for name in files if "script" in name or "level" in name]


def test_a_run_that_has_not_ended(tmp_path):
    """No grid, a line that was cut off, and losses that are null or NaN."""
    lines = lines_of()
    lines[1]["losses"]["exit_1"]["dim_8"] = None
    lines[2]["losses"]["exit_1"] = {"dim_8": float("nan"), "dim_16": -1.0}
    lines[3]["loss"] = float("inf")
    for line in lines[1:]:
        line.pop("stage_ms", None)
        line.pop("tokens_per_second", None)
    run = write(tmp_path / "run", lines=lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "ki')
    html, files = report_page.render(results.read(run))
    text = Reader(html).text
    assert "has no report/grid.json" in text and "Step time by stage: not recorded." in text
    assert "Tokens a second: not recorded." in text and "Not scored." in text
    assert sorted(files) == [
        f"report_train_{name}.png" for name in ("exit_1", "exit_2", "loss", "score")
    ]


def test_nothing_was_logged_or_scored(tmp_path):
    text, files = rendered(tmp_path, None, [])
    assert not files and "Weighted loss by step: not recorded." in text
    assert "Score at full size by step: not recorded." in text


def test_one_cell_whose_score_is_not_finite(tmp_path):
    grid = grid_of(ranks=(None,), exits=(1,), dims=(8,))
    grid["cells"][0]["scores"][NASTY]["score"] = float("nan")
    text, files = rendered(tmp_path, grid, None)
    assert "no finite score" in text and "Smallest within" not in text
    assert "Size: no finite score; latency: no finite score; bytes a vector: no" in text
    assert not [name for name in files if "cost" in name] and "report_grid_plain.png" in files


def test_what_evaluate_wrote(tmp_path):
    """grid.json alone, in a directory of any name: the report is beside it."""
    grid = {"model": "some model", "data": ["cldr", "a b"], "cells": without()["cells"]}
    run = tmp_path / "scores & more"
    run.mkdir()
    (run / "grid.json").write_text(json.dumps(grid))
    report.main(run)
    text = Reader((run / "report.html").read_text(encoding="utf-8")).text
    assert "has no metrics.jsonl: it was evaluated, not trained, here." in text
    assert "python -m mlembed evaluate 'some model' --data cldr 'a b' --out NEW" in text
    assert (run / "report_grid_plain.png").is_file() and "scores & more" in text


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser(run, tmp_path_factory):
    if chromium.PATH is None:
        pytest.skip("no Chromium")
    with chromium.Page(run / "report" / "report.html", tmp_path_factory.mktemp("c")) as page:
        yield page


SHOWN = "[...new Set([...document.images].filter(i => i.checkVisibility()).map(i => i.className))]"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme, paper", [("light", "255, 255, 255"), ("dark", "21, 24, 29")])
def test_it_fits_and_is_whole(browser, width, scheme, paper):
    browser.open(width, scheme)
    assert browser.value("document.scrollingElement.scrollWidth") <= width
    images = browser.value(
        "[...document.images].filter(i => i.checkVisibility())"
        ".map(i => [i.complete && i.naturalWidth, i.clientWidth])"
    )
    assert len(images) == 13 and all(natural > 0 for natural, _ in images)
    assert all(300 < shown <= 432 for _, shown in images)  # letters keep their size
    assert browser.value("getComputedStyle(document.body).backgroundColor") == f"rgb({paper})"
    own = (browser.path.resolve().as_uri(),)
    assert set(browser.requests) == set(own) and not browser.complaints
    assert browser.value(SHOWN) == [scheme]


def test_wide_tables_scroll_in_their_box(browser):
    browser.open(360)
    inner, outer = browser.value(
        "(b => [b.scrollWidth, b.clientWidth])(document.querySelector('.scroll'))"
    )
    assert outer <= 360 < inner


def test_print_is_light_and_keeps_figures_whole(browser):
    browser.open(800, "dark")
    assert browser.value(SHOWN) == ["dark"]
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.ask("Emulation.setEmulatedMedia", media="print", features=features)  # as it stands
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value(SHOWN) == ["light"]
    assert browser.value("getComputedStyle(document.querySelector('.figures')).orphans") == "1"
    for element in ("figure", "tr", "li"):
        said = browser.value(f"getComputedStyle(document.querySelector('{element}')).breakInside")
        assert said == "avoid", element
    assert browser.value("getComputedStyle(document.querySelector('h2')).breakAfter") == "avoid"
    assert browser.pdf().startswith(b"%PDF-")
