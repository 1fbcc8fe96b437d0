"""A teacher's scores in data: FlagEmbedding's columns, in tables, large files and streams."""

import numpy as np
import pytest
from factories import tiny_tokenizer

from mlembed import config
from mlembed.data import sources
from mlembed.data.batches import Batches
from mlembed.data.tables import describe
from mlembed.runtime.distributed import World
from tests.data.samples import jsonl, mistake, reports, table_of

ROWS = [
    {"query": "a", "pos": ["b", "c"], "neg": ["d", "e"], "pos_scores": [3, "2.5"]}
    | {"neg_scores": [-1, None]},
    {"query": "f", "pos": ["g"], "neg": [], "pos_scores": [1], "neg_scores": []},
    {"query": "h", "pos": ["i"], "neg": ["j"], "pos_scores": None, "neg_scores": None},
]
NAN = np.nan


@pytest.fixture
def path(tmp_path):
    return jsonl(tmp_path / "p.jsonl", ROWS)


def test_scores_of_a_table(path):
    ((table, report),) = reports(path)
    assert list(table.texts) == list("abdeacdefghij")
    want = [NAN, 3, -1, NAN, NAN, 2.5, -1, NAN, NAN, 1, NAN, NAN, NAN]
    np.testing.assert_array_equal(table.teacher_scores, np.array(want, np.float32))
    assert table.scored == 2 and "; a teacher's scores of 2 pairs" in describe(table, report)


def test_scores_count_in_the_digest(path, tmp_path):
    rows = [ROWS[0] | {"neg_scores": [-1, 0]}, *ROWS[1:]]
    assert table_of(path).sha256 != table_of(jsonl(tmp_path / "q.jsonl", rows)).sha256


def test_scores_follow_their_texts(path, tmp_path, monkeypatch):
    """Held-out texts and a cap leave others' scores; large files are stored."""
    held = table_of(path, "error", {"b"})
    np.testing.assert_array_equal(
        held.teacher_scores[:4], np.array([NAN, 2.5, -1, NAN], np.float32)
    )
    want = table_of(path, cap=2)
    monkeypatch.setattr(sources, "BIG", 1)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        got = table_of(path, cap=2)
        np.testing.assert_array_equal(got.teacher_scores, want.teacher_scores)
        assert got.sha256 == want.sha256 and len(got.teacher_scores) == len(got.texts)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"neg_scores": [1]}, "neg_scores: expected 2 scores, one a text, got 1"),
        ({"pos_scores": 2}, "pos_scores: expected 2 scores, one a text, got 1"),
        ({"neg_scores": [1, "high"]}, "neg_scores: expected finite numbers, got"),
        ({"neg_scores": [1, "inf"]}, "neg_scores: expected finite numbers, got"),
    ],
)
def test_malformed_scores(change, words, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [ROWS[1], ROWS[0] | change])
    assert f"p.jsonl:2: {words}" in mistake(path)


def test_one_column_alone_is_unused(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "neg_scores"} for row in ROWS]
    path = jsonl(tmp_path / "p.jsonl", rows)
    ((table, report),) = reports(path)
    assert table.teacher_scores is None and report.roles.endswith("unused: pos_scores")
    with pytest.raises(ValueError, match="expected positive_scores and negative_scores or neither"):
        config.Columns("query", "pos", positive_scores="pos_scores")


def test_columns_by_name(tmp_path):
    rows = [{"q": "a", "p": "b", "n": ["c", "d"], "t": 4, "u": [1, 2], "score": 1.0}]
    names = config.Columns("q", "p", ("n",), positive_scores="t", negative_scores="u")
    teacher_scores = table_of(jsonl(tmp_path / "p.jsonl", rows), columns=names).teacher_scores
    assert teacher_scores.tolist()[1:] == [4, 1, 2]


def test_batches_of_a_table_and_a_stream(tmp_path):
    """Each document of a batch has the score that its row gives it."""
    number = {}
    rows = []
    for i in range(16):
        texts = [f"query {i}", f"positive {i}", *(f"negative {i} {j}" for j in range(3))]
        number |= {text: 100 * i + j for j, text in enumerate(texts)}
        scores = {"pos_scores": [number[texts[1]]], "neg_scores": [number[t] for t in texts[2:]]}
        rows.append({"query": texts[0], "pos": texts[1:2], "neg": texts[2:], **scores})
    path = jsonl(tmp_path / "p.jsonl", rows)
    distill = config.Distill(scores=1.0)
    run = config.Run(batch_size=8, steps=2, distill=distill, loss=config.Loss(num_negatives=2))
    tokens, table = tiny_tokenizer(number), table_of(path)
    stream = config.Source(str(path), streaming=True, rows=16)
    for size, rank in ((1, 0), (2, 1)):
        world = World(rank, size, None)
        for batches in (
            Batches([table], tokens, run, world),
            Batches([], tokens, run, world, streams=[stream]),
        ):
            batch = batches[0]
            assert batch.has_teacher_scores.all() and len(batch.has_teacher_scores) == 8
            hundreds = batch.teacher_scores.long() // 100
            assert (hundreds == hundreds[batch.target][batch.owner]).all()
            assert (batch.teacher_scores[batch.target] % 100 == 1).all()
            assert (batch.teacher_scores[batch.negatives] % 100 > 1).all()
            if batches.tables:
                rows_of = batch.rows[len(batch.target) :].tolist()
                assert batch.teacher_scores.tolist() == [
                    number[table.texts[row]] for row in rows_of
                ]
    plain = Batches([table], tokens, config.Run(batch_size=8, steps=2), World(0, 1, None))[0]
    assert plain.teacher_scores is None and plain.has_teacher_scores is None
