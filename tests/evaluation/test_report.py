"""A run's report: it says what the files say, on a phone, in print, and if values are missing."""

import base64
import copy
import json
import math
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import chromium
import processes
import pytest
from factories import write_jsonl

from mlembed.cli import report
from mlembed.evaluation import report_page, results

NASTY = "<b>R&D \"one\" 'two'</b>" + 60 * "x"
EXITS, DIMS, RANKS = (1, 2), (8, 16), (4, 8)
LANGUAGES = {"deu": 0.9, "rus": 0.5, "zho_Hant": 0.4, "fra": 0.6, "qqq": 0.1, "<i>&": 0.95}


def score(exit, dim, rank):
    return round(0.5 + 0.1 * exit + 0.002 * dim + 0.004 * (rank or 0), 6)


def cell_of(rank, exit, dim):
    s = score(exit, dim, rank)
    task = {"score": s, "f1": s / 2, "by_kind": {"date": s}, "by_language": LANGUAGES}
    cell = {"dim": dim, "exit": exit, "rank": rank, "scores": {NASTY: task}}
    cell |= {"parameters": 10**6 * exit + 1000 * (rank or 0), "bytes_per_vector": 4 * dim}
    return cell | {"latency_ms": 1.5 * exit, "texts_per_second": 1e4, "memory_mib": 321.0}


def grid_of(ranks=RANKS, exits=EXITS, dims=DIMS):
    cells = [cell_of(rank, exit, dim) for rank in ranks for exit in exits for dim in dims]
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
        write_jsonl(run / "metrics.jsonl", lines)
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
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.tags
    given = [pair for _, attrs in page.tags for pair in attrs.items()]
    addresses = [value for name, value in given if name in ("src", "href", "srcset")]
    places = [value for name, value in given if name == "id"]
    assert [value[1:] for value in addresses if value.startswith("#")] == places
    assert len(places) == len(set(places)) == 6
    assert all(value.startswith(("data:", "#")) for value in addresses)
    assert not re.search(r"url\(|@import", html)


def images_of(html):
    return [attrs for tag, attrs in Reader(html).tags if tag == "img"]


def alts_of(html):
    return [image["alt"] for image in images_of(html)]


FIGURES = ["cost_bytes_per_vector", "cost_latency_ms", "cost_parameters", "grid_4", "grid_8"]
FIGURES += ["stages", "tokens", "train_exit_1", "train_exit_2", "train_loss", "train_score"]


def test_figures_are_in_the_page_and_in_files(run, html):
    files = sorted((run / "report").glob("*.svg"))
    assert [path.name for path in files] == [f"report_{name}.svg" for name in FIGURES]
    images = images_of(html)
    assert all(len(image["alt"]) > 30 for image in images)
    start = "data:image/svg+xml;base64,"
    pictures = [base64.b64decode(image["src"].removeprefix(start)) for image in images]
    assert sorted(pictures) == sorted(path.read_bytes() for path in files)
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.tag.endswith("svg") and root.get("width") == "259.2pt"
        for element in root.iter():
            links = [value for name, value in element.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)
            assert not element.tag.endswith("script")


def test_names_from_files_are_escaped(html):
    page = Reader(html)
    assert page.of("h1") == [NASTY]
    assert NASTY not in html and "<i>&" not in html and "abc<1>" not in html
    for name in (NASTY, "<i>&", "abc<1>", "cpu & co, 2 threads", f"{NASTY}: date"):
        assert name in page.text
    # The page marks the untrained score of a bar by <i>; German alone has one.
    assert sum(tag == "i" for tag, _ in page.tags) == 1
    (stages,) = (alt for alt in alts_of(html) if "by stage" in alt)
    assert "data< 10.0 ms, 25%" in stages


def test_half_of_a_surrogate_pair_is_written_out(tmp_path):
    grid = grid_of(ranks=(None,))
    grid["device"] = "a \ud800"
    report.main(write(tmp_path / "run", grid))
    html = (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")
    assert r"<dd>a \ud800</dd>" in html


def test_bars_stay_on_their_track(tmp_path):
    grid = grid_of(ranks=(None,), exits=(1,))
    grid["cells"][-1]["scores"][NASTY]["by_language"] = {"de": 1.2, "fr": 0.4525, "ru": -0.1}
    grid["untrained"][NASTY]["by_language"] = {"de": -0.03}
    html, _ = report_page.render(results.read(write(tmp_path / "run", grid)))
    bars = html[html.index("<h4>Latin") :]
    shares = re.findall(r"(?:width|left):([\d.-]+%)\"", bars)
    assert shares == ["100.00%", "0.00%", "45.25%", "0.00%"]
    assert ">120.0<" in bars and ">45.2<" in bars and ">-10.0<" in bars


def test_headline(html):
    text = Reader(html).text
    for sentence in (
        f"Score at full size {100 * score(2, 16, 8):.1f} % untrained 25.0 %",
        "Full size exit 2 rank 8 width 16 2.01 M parameters, 64 B a vector, 3.00 ms a short text",
        "Smallest model, shortest vector, fastest within 1 point of the best exit 2 rank 8 width",
        "2.01 M parameters (100%), 64 B a vector (100%), 3.00 ms a short text (100%)",
        "Trained for 50 steps",
        "Date of the metrics 2001-09-09 01:46 UTC",
        "8 cells",
        "Run again python train.py",
    ):
        assert sentence in text, sentence


def test_cheapest_within_a_point():
    cells = grid_of()["cells"]  # exit 2: 70 % + 0.2 a width + 0.4 a rank

    def size(points):
        cell = report_page.cheapest_within(cells, points)
        return cell["rank"], cell["exit"], cell["dim"]

    assert size(1.0) == (8, 2, 16)
    assert size(1.6) == (4, 2, 16)  # 1.6 below the best
    assert size(3.2) == (4, 2, 8)  # fewest parameters, then the shorter vector
    assert size(100.0) == (4, 1, 8)
    cells[1] |= {"parameters": 9, "latency_ms": 9.0}
    cheapest = [report_page.cheapest_within(cells, 100.0, first) for first in range(3)]
    assert cheapest == [cells[1], cells[0], cells[0]]
    unscored = copy.deepcopy(cells)
    for cell in unscored:
        cell["scores"][NASTY]["score"] = None
    assert report_page.cheapest_within(unscored, 1.0) is None


def test_unknown_cost_is_infinite():
    cell = {"parameters": 9, "bytes_per_vector": 32}
    assert report_page.costs({**cell, "latency_ms": 1.5}) == (9, 32, 1.5)
    for unknown in ({}, {"latency_ms": 0.0}, {"latency_ms": None}):
        assert report_page.costs(cell | unknown) == (9, 32, math.inf)


def rows_of(html, caption):
    table = re.search(rf"<caption>{caption}.*?</table>", html, re.DOTALL)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


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
    now = f"{100 * best:.1f}"
    assert [row[1:] for row in kinds] == [[now, "25.0"], [now, "12.5"]]
    assert [row[1:] for row in metrics] == [["f1", f"{best / 2:.4g}"]]


def test_languages_by_script_and_level(html):
    bars = html[html.index('<div class="bars">') : html.index(">Training</h2>")]
    parts = re.split(r"<h4>(.*?)</h4>", bars)[1:]
    row = r"<li><span>(.*?)(?: <small>(.*?)</small>)?</span>\n.*\n<span>([\d.]+)</span>"
    heads = zip(parts[::2], parts[1::2], strict=True)
    groups = {head: re.findall(row, rows) for head, rows in heads}
    one, two, three = "1 language", "2 languages", "3 languages"
    scripts = [("Latin", two, "75.0"), ("Cyrillic", one, "50.0"), ("Traditional Han", one, "40.0")]
    levels = [("high", one, "60.0"), ("mid", one, "50.0"), ("low", one, "90.0")]
    assert list(groups.items()) == [  # by mean, best first, unknown last in any case
        ("Mean by script", [*scripts, ("unknown", two, "52.5")]),
        ("Mean by resource level", [*levels, ("unseen", three, "48.3")]),
        ("Latin (2)", [("German", "deu, low", "90.0"), ("French", "fra, high", "60.0")]),
        ("Cyrillic (1)", [("Russian", "rus, mid", "50.0")]),
        ("Traditional Han (1)", [("Chinese (Traditional)", "zho_Hant, unseen", "40.0")]),
        ("unknown (2)", [("&lt;i&gt;&amp;", "unseen", "95.0"), ("qqq", "unseen", "10.0")]),
    ]


def test_training_curves(html):
    alts = " ".join(alts_of(html))
    assert "Weighted loss by step: 3 at step 10, 0.6 at step 50." in alts
    best = 100 * score(2, 16, 8)  # the grid is scored after the last step
    assert f"Score at full size by step: 25 at step 0, {best:.4g} at step 50." in alts
    assert f"exit 2, each prefix a line; at the end: dim 8 {10 / 60:.3g}, dim 16" in alts
    assert "forward 30.0 ms, 75%" in alts and "mean 1,030, from 1,010 to 1,050" in alts
    assert "not finite: 1 (35)." in Reader(html).text


def test_pareto_front_is_listed(html):
    front = [["exit 1 rank 8 width 16", "1.50 ms", "66.4 %"]]
    front += [["exit 2 rank 8 width 16", "3.00 ms", "76.4 %"]]
    (alt,) = (alt for alt in alts_of(html) if "against latency" in alt)
    assert alt.endswith("front: " + "; ".join(", ".join(row) for row in front) + ".")
    head, *rows = rows_of(html, "Pareto front of score against latency")
    assert head == ["Cell", "Latency", "Score"] and rows == front


# ---- files ----


def test_same_files_same_bytes(run, html):
    again, images = report_page.render(results.read(run))
    assert again == html
    files = {path.name: path.read_text() for path in (run / "report").glob("*.svg")}
    assert files == {f"report_{image.name}.svg": image.svg for image in images}


def test_nothing_is_overwritten(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = command(run)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    words = r"error: out: expected a directory without a report, got .*/report\.html and 11 more;"
    assert re.match(words, done.stderr)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="expected a new directory"):
        report.main(run, out=str(run))
    mine = write(tmp_path / "mine", lines=[]) / "report" / "report_mine.svg"
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"got .*report_mine\.svg"):
        report.main(tmp_path / "mine")
    assert mine.read_text() == "mine" and list(mine.parent.iterdir()) == [mine]


def test_new_directory(tmp_path, capsys):
    source = write(tmp_path / "run", lines=lines_of()[:2])
    report.main(source, out=str(tmp_path / "new" / "er"))
    assert (tmp_path / "new" / "er" / "report.html").is_file()
    assert not list((source / "report").iterdir())
    assert str(tmp_path / "new" / "er" / "report.html") in capsys.readouterr().out


# ---- missing values ----


def rendered(path, grid, lines):
    html, images = report_page.render(results.read(write(path / "run", grid, lines)))
    return Reader(html).text, sorted(image.name for image in images)


def without(*keys):
    grid = grid_of(ranks=(None,), exits=(1,))
    for key in keys:
        grid.pop(key, None)
        for cell in grid["cells"]:
            cell.pop(key, None)
            cell["scores"][NASTY].pop(key, None)
    return grid


def test_older_grid(tmp_path):
    grid = without("latency_ms", "texts_by_language", "device", "commit", "untrained", "run")
    text, figures = rendered(tmp_path, grid, None)
    for sentence in ("Latency: not recorded.", "Device not recorded", "Commit not recorded"):
        assert sentence in text
    assert "Training texts by language: not recorded, so there are no resource levels." in text
    assert "Latency (ms): not recorded." in text and NASTY in text  # the name is in config.json
    assert "untrained" not in text and "resource level " not in text
    assert figures == ["cost_bytes_per_vector", "cost_parameters", "grid_plain"]


def test_task_without_languages(tmp_path):
    text, _ = rendered(tmp_path, without("by_language"), None)
    assert f"Scores by language, not recorded: {NASTY}." in text and "Mean by" not in text


def test_unfinished_run(tmp_path):
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
    html, images = report_page.render(results.read(run))
    text = Reader(html).text
    assert "has no report/grid.json" in text and "Step time by stage: not recorded." in text
    assert "Tokens a second: not recorded." in text and "Not scored." in text
    assert "Scores by language, not recorded." in text
    names = ["train_loss", "train_score", "train_exit_1", "train_exit_2"]
    assert [image.name for image in images] == names


@pytest.mark.parametrize(("count", "listed"), [(20, "(0, 1, 2, "), (21, ", 19, ...)")])
def test_skipped_steps(count, listed, tmp_path):
    lines = [{"step": step, "kind": "skipped", "bad": "loss"} for step in range(count)]
    text, _ = rendered(tmp_path, grid_of(), [*lines_of()[:-1], *lines])
    assert f": {count} (" in text and listed in text and (", ...)" in text) == (count > 20)


def test_stage_that_some_steps_lack(tmp_path):
    lines = lines_of()[1:3]
    lines[0]["stage_ms"] = {"forward": 30.0}
    lines[1]["stage_ms"] = {"forward": 10.0, "data<": None, "sync": 20.0}
    html, _ = report_page.render(results.read(write(tmp_path / "run", lines=lines)))
    (alt,) = (alt for alt in alts_of(html) if "by stage" in alt)
    assert alt.endswith("forward 20.0 ms, 67%; sync 10.0 ms, 33%; data< 0.0 ms, 0%.")


def test_nothing_was_logged_or_scored(tmp_path):
    text, figures = rendered(tmp_path, None, [])
    assert not figures and "Weighted loss by step: not recorded." in text
    assert "Score at full size by step: not recorded." in text


def test_one_cell_whose_score_is_not_finite(tmp_path):
    grid = grid_of(ranks=(None,), exits=(1,), dims=(8,))
    grid["cells"][0]["scores"][NASTY]["score"] = float("nan")
    text, figures = rendered(tmp_path, grid, None)
    assert "Score at full size no finite score" in text and "within 1 point" not in text
    assert "Size: no finite score; latency: no finite score; bytes a vector: no" in text
    assert figures == ["grid_plain"]


def test_directory_of_evaluate(tmp_path):
    """grid.json alone, in a directory of any name: the report goes next to it."""
    grid = {"model": "some model", "data": ["cldr", "a b"], "cells": without()["cells"]}
    run = tmp_path / "scores & more"
    run.mkdir()
    (run / "grid.json").write_text(json.dumps(grid))
    report.main(run)
    text = Reader((run / "report.html").read_text(encoding="utf-8")).text
    assert "has no metrics.jsonl: it was evaluated, not trained." in text
    assert "python -m mlembed evaluate 'some model' --data cldr 'a b' --out NEW" in text
    assert (run / "report_grid_plain.svg").is_file() and "scores & more" in text


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser(run, tmp_path_factory):
    if chromium.PATH is None:
        pytest.skip("no Chromium")
    with chromium.Page(run / "report" / "report.html", tmp_path_factory.mktemp("c")) as page:
        yield page


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_is_whole(browser, width, scheme):
    browser.open(width, scheme)
    assert browser.value("document.scrollingElement.scrollWidth") <= width
    widths = "[i.complete && i.naturalWidth, i.clientWidth]"
    images = browser.value(f"[...document.images].map(i => {widths})")
    assert len(images) == 11 and all(natural > 0 for natural, _ in images)
    assert all(300 < shown <= 432 for _, shown in images)  # letters keep their size
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    own = (browser.path.resolve().as_uri(),)
    assert set(browser.requests) == set(own) and not browser.complaints


def test_wide_tables_scroll_in_their_box(browser):
    browser.open(360)
    widths = "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth, b.clientWidth])"
    boxes = browser.value(widths)
    assert all(outer <= 360 for _, outer in boxes) and any(i > outer for i, outer in boxes)


def test_print_keeps_figures_whole(browser):
    browser.open(800, "light", "print")
    assert browser.value("getComputedStyle(document.querySelector('.figures')).orphans") == "1"
    for element in ("figure", "tr", "li"):
        rule = browser.value(f"getComputedStyle(document.querySelector('{element}')).breakInside")
        assert rule == "avoid", element
    assert browser.value("getComputedStyle(document.querySelector('h2')).breakAfter") == "avoid"
    assert browser.pdf().startswith(b"%PDF-")
