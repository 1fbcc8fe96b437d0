"""The grid against each cell alone, search in chunks, printed tables, and the command."""

import json
import sys

import processes
import pytest
import torch
from factories import tiny_encoder, tiny_tokenizer
from grid_tasks import (
    WORDS,
    beir_directory,
    ndcg,
    score_cells,
    size,
    tatoeba_directory,
    un_directory,
)
from PIL import Image

from mlembed.cli import evaluate
from mlembed.data import eval_sets
from mlembed.data.eval_tasks import Bitext
from mlembed.evaluation import grid, scores, tables
from mlembed.evaluation.charts import mean_score
from mlembed.evaluation.grid import Grid, score_grid
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained

PRICE = ("latency_ms", "texts_per_second", "memory_mib")


# ---- the grid ----


@pytest.fixture(scope="module")
def cells(encoder, tasks):
    return score_grid(encoder, tasks).cells


def without_price(cells):
    """Leave out the measured costs, which differ between runs."""
    return [{k: v for k, v in cell.items() if k not in PRICE} for cell in cells]


def score_alone(encoder, task, *size):
    unit = torch.from_numpy(encoder.encode(task.texts, *size))
    return (scores.score_bitext if isinstance(task, Bitext) else scores.score_sts)(task, unit)


def test_grid_is_each_cell_alone(encoder, tasks, cells):
    sizes = [(d, e, r) for r in (4, 8) for e in (1, 3) for d in (4, 8, 32)]
    assert [size(c) for c in cells] == sizes
    for cell in cells:
        for task in tasks:
            got, want = cell["scores"][task.name], score_alone(encoder, task, *size(cell))
            assert got["score"] == pytest.approx(want["score"], abs=1e-6)
            assert got.get("by_language") == pytest.approx(want.get("by_language"))
    assert len({cell["scores"]["sts"]["score"] for cell in cells}) == len(cells)


def test_grid_of_chosen_sizes(encoder, tasks, cells):
    """Sizes have any order, also those that were never trained; the largest is the last."""
    chosen = score_cells(encoder, tasks, [32, 5, 32], [3, 2], [8, 3])
    assert [size(c) for c in chosen] == [(d, e, r) for r in (3, 8) for e in (2, 3) for d in (5, 32)]
    for cell in chosen:
        want = score_alone(encoder, tasks[1], *size(cell))["score"]
        assert cell["scores"]["sts"]["score"] == pytest.approx(want, abs=1e-6)
    assert chosen[-1] == without_price(cells)[-1]


def test_costs(encoder, cells):
    for cell in cells:
        small = pretrained.cut(encoder.model, cell["exit"], cell["rank"])
        assert cell["parameters"] == sum(p.numel() for p in small.parameters())
        assert cell["bytes_per_vector"] == encoder.encode(["sea"], *size(cell))[0].nbytes
    for row in Grid(cells).rows():  # measured once for all widths
        assert len({tuple(cell[name] for name in PRICE) for cell in row.values()}) == 1


def test_grid_of_a_plain_vocabulary(tasks):
    encoder = tiny_encoder(tiny_tokenizer(WORDS), hidden_size=16, num_hidden_layers=1)
    plain = score_grid(encoder, tasks[:1])
    assert [size(c) for c in plain.cells] == [(8, 1, None), (16, 1, None)]
    assert plain.cells[0]["parameters"] == sum(p.numel() for p in encoder.model.parameters())
    assert "table" in plain.table() and "| table | 1 |" in plain.markdown()
    with pytest.raises(ValueError, match="rank: expected none"):
        score_grid(encoder, tasks[:1], ranks=[4])


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(dims=[0, 4]), r"dim: expected 1\.\.32"),
        (dict(exits=[4]), r"exit: expected 1\.\.3 \(the depth\), got 4"),
        (dict(ranks=[9]), r"rank: expected 1\.\.8 \(the stored rank\), got 9"),
    ],
)
def test_sizes_that_the_model_lacks(encoder, tasks, sizes, message):
    with pytest.raises(ValueError, match=message):
        score_grid(encoder, tasks, **sizes)


def test_vectors_that_are_not_finite(directory, searched, tasks, tmp_path):
    """They have no score; other depths keep theirs, and the file is JSON."""
    encoder = Encoder.load(str(directory), "cpu")
    every = [*searched, *tasks]
    before = score_cells(encoder, every, [8])
    with torch.no_grad():
        next(encoder.model.layers[2].parameters()).fill_(torch.nan)
    cells = score_cells(encoder, every, [8])
    tables.write_report(tmp_path, Grid(cells), {})
    text = (tmp_path / "grid.json").read_text()
    stored = json.loads(text, parse_constant=pytest.fail)["cells"]
    for cell, written, old in zip(cells, stored, before, strict=True):
        if cell["exit"] == 1:
            assert cell == written == old
        else:
            assert all(task["score"] is None for task in written["scores"].values())
            assert all(task["not_unit"] > 0 for task in written["scores"].values())
            assert "b: no score: 132 vectors are not of length one" in tables.details(
                cell["scores"]
            )


# ---- search ----


def test_search_in_chunks(encoder, searched, monkeypatch):
    """Chunks of any size, at every exit and dim of one pass, equal each size alone."""
    beir, un, bucc = searched
    side = un.sides["de"]
    want = {}
    for cut in ((4, 1, 8), (32, 1, 8), (4, 3, 8), (32, 3, 8)):
        pool = encoder.encode([*side.answers, *side.others()], *cut)
        best = (encoder.encode(side.queries, *cut) @ pool.T).argmax(1)
        mined = scores.score_mining(bucc, torch.tensor(encoder.encode(bucc.texts, *cut)))
        documents = encoder.encode(list(beir.documents()), *cut)
        found = ndcg(beir, encoder.encode(beir.queries, *cut), documents)
        want[cut] = found, scores.precision_at_1(best, side.answers), mined["score"]
    assert all(len({column[i] for column in want.values()}) > 1 for i in range(3))
    for chunk in (16_384, 7):
        monkeypatch.setattr(grid, "DOCUMENTS", chunk)
        for cell in score_cells(encoder, searched, [4, 32], [1, 3], [8]):
            got = [task["score"] for task in cell["scores"].values()]
            assert got == pytest.approx(want[size(cell)], abs=1e-6)
    assert cell["scores"]["u"]["by_language"].keys() == {"de"}


def test_vectors_of_many_texts_lie_in_a_file(encoder, searched, tasks, monkeypatch):
    every, encode_grid, on_disk = [searched[2], *tasks], Encoder.encode_grid, []
    usual = score_cells(encoder, every)

    def spy(*args, **options):
        on_disk.append(options.get("on_disk"))
        return encode_grid(*args, **options)

    monkeypatch.setattr(Encoder, "encode_grid", spy)
    monkeypatch.setattr(grid, "IN_MEMORY", 0)
    assert score_cells(encoder, every) == usual and on_disk == [True] * 6


def test_prompts(encoder, searched):
    """The encoder's own by default, before queries and documents, not before bitext."""
    beir, un, _ = searched
    cut = 32, 3, 8

    def score(encoder, **options):
        (cell,) = score_cells(encoder, [beir, un], *([one] for one in cut), **options)
        return cell["scores"]["b"]["score"], cell["scores"]["u"]["score"]

    plain = score(encoder)
    prompts = {"query": "sun sun sun ", "document": "tree "}
    prompted = Encoder(encoder.model, encoder.tokenizer, 32, prompts=prompts)
    queries = encoder.encode([f"sun sun sun {text}" for text in beir.queries], *cut)
    want = ndcg(beir, queries, encoder.encode([f"tree {text}" for text in beir.documents()], *cut))
    assert score(prompted) == (pytest.approx(want, abs=1e-6), plain[1]) and want != plain[0]
    assert score(encoder, prompts=prompts) == score(prompted)
    assert score(prompted, prompts={}) == plain

    # Texts for which the model has no other prompt get its default one, as in `encode`.
    default = Encoder(
        encoder.model,
        encoder.tokenizer,
        32,
        prompts={"sun": "sun sun sun "},
        default_prompt_name="sun",
    )
    assert score(default) == score(default, prompts={}) != plain
    both = {"query": "sun sun sun ", "document": "sun sun sun "}
    assert score(default)[0] == score(encoder, prompts=both)[0]
    assert score(default, prompts=dict.fromkeys(both, ""))[0] == plain[0]


# ---- tables ----


def test_table(cells):
    head, columns, sizes, *rows = Grid(cells).table().splitlines()
    assert "score (%)" in head and columns.split() == ["rank", "exit", "params", "4", "8", "32"]
    assert sizes.split() == ["16B", "32B", "128B"]
    for row, begin in zip(rows, range(0, 12, 3), strict=True):
        rank, exit, parameters, *shown = row.split()
        group = cells[begin : begin + 3]
        assert (int(rank), int(exit)) == (group[0]["rank"], group[0]["exit"])
        assert parameters == f"{group[0]['parameters'] / 1e6:.2f}M"
        assert shown == [f"{mean_score(cell):.1f}" for cell in group]
    assert len({len(row) for row in (columns, sizes, *rows)}) == 1  # columns are aligned


def test_markdown(cells):
    lines = Grid(cells).markdown((8, 1, 8)).splitlines()
    head, rule, *rows = ([word.strip() for word in line.strip("|").split("|")] for line in lines)
    assert head[:6] == ["rank", "exit", "parameters", "ms a text", "texts/s", "MiB"]
    assert head[6:] == ["4 wide", "8 wide", "32 wide"] and set(rule) == {"---:"}
    assert [row[:2] for row in rows] == [["4", "1"], ["4", "3"], ["8", "1"], ["8", "3"]]
    assert rows[2][-2] == f"**{mean_score(cells[7]):.1f}**"
    assert rows[2][3:6] == [f"{cells[6][name]:.4g}" for name in PRICE]
    some = Grid(without_price(cells[1:])).markdown().splitlines()
    assert some[2].split(" | ")[3] == "" and "ms" not in some[0] and "**" not in "".join(some)


def test_figure(cells):
    assert len(Grid(cells).figure("title").axes) == 2  # a heat map a rank


def test_by_kind():
    now = {"cldr": {"score": 0.5, "by_kind": {"date": 0.25, "territory": 0.75}}}
    before = {"cldr": {"score": 0.125, "by_kind": {"date": 0.0}}}
    lines = tables.by_kind(now, before).splitlines()
    assert lines[0].split()[-2:] == ["trained", "untrained"]
    assert lines[1].split() == ["cldr", "50.0", "12.5"]
    assert lines[2].split() == ["date", "25.0", "0.0"]
    assert lines[3].split() == ["territory", "(unseen", "names)", "75.0"]
    assert len(tables.by_kind(now, {}).splitlines()) == 4


@pytest.mark.parametrize("zero", [False, True])
def test_report(cells, tmp_path, zero):
    if zero:  # a heat map of one colour
        cells = [{**cell, "scores": {"t": {"score": 0.0}}} for cell in cells]
    out = tmp_path / "deep" / "report"
    tables.write_report(out, Grid(cells), {"commit": "abc"})
    assert sorted(p.name for p in out.iterdir()) == ["grid.json", "grid.png"]
    assert json.loads((out / "grid.json").read_text()) == {"commit": "abc", "cells": cells}
    with Image.open(out / "grid.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 300 and image.height > 300
        colours = image.convert("RGB").getcolors(1 << 24)
    assert zero or len(colours) > 50


def test_prices(cells):
    head, *rows = tables.prices(Grid(cells)).splitlines()
    assert len(rows) == 4 and "ms a short text" in head
    rank, exit, latency, rate, memory = rows[1].split()
    cell = cells[3]
    assert (int(rank), int(exit)) == (cell["rank"], cell["exit"])
    assert latency == f"{cell['latency_ms']:.2f}" and memory == f"{cell['memory_mib']:.1f}"
    assert rate == f"{cell['texts_per_second']:.0f}"
    assert tables.prices(Grid(without_price(cells))) == ""


def test_details():
    means = {"14": {"languages": 14, "accuracy": 0.75}, "36": {"languages": 30}}
    bitext = {"score": 0.5, "to_pivot": 0.25, "by_language": {"de": 1.0}, "means": means}
    mining = {"score": 0.5, "splits": {"de": "threshold of dev, scores of dev"}}
    by_task = {"t": bitext, "m": mining}
    assert tables.details(by_task, "width 8").splitlines() == [
        "  other metrics at width 8 (%)",
        "  t: to_pivot 25.0, mean of 14 languages 75.0, mean of 36 languages: only 30 present",
        "    de: threshold of dev, scores of dev",
    ]
    assert tables.details({"t": {"score": 0.5}}) == ""


# ---- the command ----


def command(*args):
    return processes.run("-m", "mlembed", "evaluate", *args)


def test_command(directory, tmp_path):
    data = tatoeba_directory(tmp_path / "tat")
    out = tmp_path / "report"
    sizes = ["--dim", 8, 32, "--exit", 1, "--rank", 8, "--dtype", "bfloat16"]
    done = command(directory, "--data", data, *sizes, "--out", out)
    assert done.returncode == 0, done.stderr
    half = Encoder.load(str(directory), "cpu", "bfloat16")
    want = score_cells(half, eval_sets.read(str(data)), [8, 32], [1], [8])
    assert done.stdout.startswith(Grid(want).table() + "\n\n")
    assert "to_pivot" in done.stdout and "mean of 36 languages: only 2" in done.stdout
    stored = json.loads((out / "grid.json").read_text())
    assert without_price(stored.pop("cells")) == want
    assert (stored["model"], stored["data"]) == (str(directory), [str(data)])
    assert stored["device"].startswith("cpu") and stored["commit"]
    assert stored["dtype"] == "bfloat16" and "at width 32, exit 1, rank 8 (%)" in done.stdout
    assert want[0]["parameter_bytes"] == 2 * want[0]["parameters"]
    with Image.open(out / "grid.png") as image:
        image.verify()


def test_command_with_a_funnel(directory, tmp_path, encoder):
    beir, other = beir_directory(tmp_path / "b"), un_directory(tmp_path / "u")
    out = tmp_path / "report"
    given = ["--dim", 32, "--exit", 3, "--rank", 8, "--funnel", "4:1:8", "--shortlist", 20]
    prompts = ["--query-prompt", "sun ", "--document-prompt", "tree "]
    done = command(directory, "--data", beir, other, *given, *prompts, "--out", out)
    assert done.returncode == 0, done.stderr
    stored = json.loads((out / "grid.json").read_text())
    (task,) = eval_sets.read(str(beir))
    texts = {"query": "sun ", "document": "tree "}
    want = grid.score_funnel(encoder, task, (4, 1, 8), 20, texts)
    assert stored["funnel"] == {"small": [4, 1, 8], "shortlist": 20, "b": pytest.approx(want)}
    (cell,) = stored["cells"]
    assert cell["scores"]["b"]["score"] == pytest.approx(want["full"])
    assert want["small"] != want["full"] and 0 < want["scanned"] < 1
    line = next(line for line in done.stdout.splitlines() if "%" in line and "b " in line)
    assert f"{100 * want['funnel']:.1f}" in line


@pytest.mark.parametrize(
    "given, error",
    [
        (["--dim", "64"], "dim: expected 1..32 (the width), got 64"),
        (["--out", "{}"], "out: expected a new directory, got {}, which exists"),
    ],
)
def test_command_writes_nothing_after_an_error(directory, given, error, tmp_path):
    """There is no progress bar outside a terminal."""
    data = tatoeba_directory(tmp_path / "tat")
    given = [word.format(data) for word in given]
    done = command(directory, "--data", data, "--out", tmp_path / "report", *given)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {error.format(data)}\n"
    assert list(tmp_path.iterdir()) == [data] and len(list(data.iterdir())) == 4


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(funnel="4:1"), "funnel: expected retrieval among --data, got none"),
        (dict(funnel="4:1:2:3"), "funnel: expected DIM:EXIT:RANK, as 48:2:64 or 48::, got '4:1:2:"),
        (dict(out="{}/tat/tatoeba.deu-eng.deu/report"), "out: cannot create .*deu"),
        (dict(mteb=("tat",)), "mteb: expected names that differ from --data, got tat"),
    ],
)
def test_command_rejects_before_any_work(given, message, tmp_path):
    """Even before it looks for a model."""
    data = tatoeba_directory(tmp_path / "tat")
    if "out" in given:
        given = {"out": given["out"].format(tmp_path)}
    with pytest.raises(ValueError, match=message):
        evaluate.main("no such model", data=(str(data),), **given)


def test_funnel_uses_scores_of_the_grid(encoder, searched):
    cells = score_cells(encoder, searched[:1], [4, 32], [1, 3], [8])
    alone = grid.score_funnel(encoder, searched[0], (4, 1, 8), 20)
    assert alone == grid.score_funnel(encoder, searched[0], (4, 1, 8), 20, cells=cells)
    (small,) = (c for c in cells if (c["dim"], c["exit"]) == (4, 1))
    assert alone["small"] == pytest.approx(small["scores"]["b"]["score"], abs=1e-6)
    small["scores"]["b"]["score"] = 7.0  # it is not computed again
    assert grid.score_funnel(encoder, searched[0], (4, 1, 8), 20, cells=cells)["small"] == 7


@pytest.mark.parametrize(
    ("missing", "error", "says"),
    [("mteb", ValueError, "pip install mlembed"), ("torch", ModuleNotFoundError, "torch")],
)
def test_missing_mteb_is_named(missing, error, says, monkeypatch):
    monkeypatch.delitem(sys.modules, "mlembed.evaluation.mteb_model", raising=False)
    monkeypatch.delattr("mlembed.evaluation.mteb_model", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(error, match=says):
        grid.load_mteb()
