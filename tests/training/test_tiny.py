"""The tiny recipe of `make train` on the built-in text, in a third of its steps or fewer."""

import json

import pytest
from processes import run

# Half and whole of each dimension, in fewer steps; `make test-all` trains and scores all sizes.
HALVES = ["--model.matryoshka-dims", 96, 192, "--model.exits", 2, 4, "--model.ranks", 128]
HALVES += ["--steps", 60]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(HALVES, id="halves"),
        pytest.param([], id="whole", marks=pytest.mark.slow),
    ],
)
def report(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    args = ["tiny", "--steps", 100, *request.param, "--output-dir", folder, "--tracker", "none"]
    done = run("train.py", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "tiny" / "report" / "grid.json").read_text())


@pytest.fixture(scope="module")
def score(report):
    cells = {(c["dim"], c["exit"], c["rank"]): c["scores"]["cldr"] for c in report["cells"]}
    return lambda dim=192, exit=4, rank=128: cells[dim, exit, rank]


def test_dates_are_found(score):
    for kind in ("date", "datetime"):
        assert score()["by_kind"][kind] >= 0.5


def test_well_above_the_untrained_model(report, score):
    untrained = report["untrained"]["cldr"]
    assert score()["score"] >= 1.5 * untrained["score"]
    # Digits alone do not find the dates.
    assert untrained["by_kind"]["date"] < 0.2


def test_half_sizes_keep_most_of_the_score(score):
    assert score(dim=96)["score"] >= 0.8 * score()["score"]
    assert score(exit=2)["score"] >= 0.8 * score()["score"]


def test_every_locale_is_scored_in_both_directions(score):
    scores = score()
    assert len(scores["by_language"]) >= 140
    assert scores["to_pivot"] != scores["from_pivot"]
    assert scores["score"] == pytest.approx(
        (scores["to_pivot"] + scores["from_pivot"]) / 2, abs=0.01
    )
