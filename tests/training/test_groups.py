"""Data of which no batch can teach anything is an error, and batches that teach nothing count."""

import json

import pytest
from factories import loss_trace, small_job, write_jsonl

import train
from mlembed.config import Run, Source
from mlembed.data import summary


def pairs(*rows, **more):
    return [{"query": query, "positive": positive} | more for query, positive in rows]


def nway(ids, lang=None):
    return [{"id": i, "lang": lang or f"l{n}", "text": f"t {n}"} for n, i in enumerate(ids)]


GROUPS = "two groups of linked texts or more, got one"
# Rows, their task, and what is expected of them.
SOURCES = {
    "one pair": (pairs(("a", "b")), "retrieval", GROUPS),
    "equal pairs": (pairs(*[("a", "b")] * 30), "retrieval", GROUPS),
    "one positive": (pairs(*((f"q {i}", "b") for i in range(30))), "bitext", GROUPS),
    "a chain": (pairs(*((f"q {i // 2}", f"p {-i // 2}") for i in range(9))), "bitext", GROUPS),
    "one id": (nway([1, 1, 1]), "auto", "two ids or more, got one"),
    "one id and language": (nway([1] * 9, "eng"), "auto", "two ids or more, got one"),
    "one score": (pairs(("a", "b"), ("c", "d"), score=0.5), "sts", "two different scores or more"),
    "one scored pair": (pairs(("a", "b"), score=0.5), "sts", "two different scores or more"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_that_cannot_teach(name, tmp_path):
    rows, task, message = SOURCES[name]
    mixture = tmp_path / "mixture.json"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    mixture.write_text(json.dumps({"sources": [{"path": path, "task": task, "name": "x"}]}))
    with pytest.raises(ValueError, match=f"^source x: expected {message}"):
        small_job(tmp_path, [str(mixture)])
    run = Run(data=(), sources=(Source(path=path, task=task, name="x"),))
    (one,) = summary.summaries(run, frozenset(), "error", len)
    assert one.name == "x" and message in one.error


def test_hard_negatives_and_distillation_teach_without_another_group(tmp_path):
    data = [write_jsonl(tmp_path / "x.jsonl", pairs(("a b", "c d"), negatives=["e", "f"]))]
    small_job(tmp_path, data).saver.close()
    with pytest.raises(ValueError, match=f"source x: expected {GROUPS}"):
        small_job(tmp_path, data, "--loss.num-negatives", 0)
    small_job(tmp_path, data, "--loss.num-negatives", 0, "--distill.between-exits", 1).saver.close()


def test_batches_of_one_pair(tmp_path):
    rows = pairs(("a b", "c d"), ("e f", "g h"))
    data, options = [write_jsonl(tmp_path / "x.jsonl", rows)], ("--batch-size", 1)
    with pytest.raises(ValueError, match="batch_size: expected 2 or more for source x, which"):
        small_job(tmp_path, data, *options)
    bank = ("--loss.memory-bank", 8, "--loss.num-negatives", 0)
    small_job(tmp_path, data, *options, *bank).saver.close()


def test_idle_batches_are_counted(tmp_path, capsys):
    """A batch of 8 of the 16 pairs with the same positive has only one group."""
    rows = pairs(*((f"q {i}", "b") for i in range(16)), ("x y", "z"))
    job = small_job(tmp_path, [write_jsonl(tmp_path / "x.jsonl", rows)], "--steps", 6)
    train.optimise(job, 0)
    job.saver.close()
    idle = [line["step"] for line in loss_trace(tmp_path / "run") if line["loss"] == 0]
    assert 0 < len(idle) < 6 and job.idle == {"x": len(idle)}
    assert capsys.readouterr().out.count(f"idle   step {idle[0]}, source x: texts of one") == 1
