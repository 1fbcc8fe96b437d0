"""Digests of evaluation sets, teachers and files, and which differences stop a resumed run."""

import numpy as np
import pytest

from mlembed.config import Distill
from mlembed.data import eval_sets
from mlembed.training import provenance
from tests.data.samples import beir

# ---- digests ----


def entry(path):
    """Return the entry of the one evaluation set of a path, as if its texts were always equal."""
    (task,) = eval_sets.read(str(path))
    return provenance.of_task(task, "")


def sts(path, rows):
    path.write_text("sentence1,sentence2,score\n" + "".join(f"{row}\n" for row in rows))
    return entry(path)


def test_scores_of_an_evaluation_set_count(tmp_path):
    before = sts(tmp_path / "sts.csv", ["a,b,1", "c,d,0.5"])
    assert before["name"] == "sts" and before["items"] == "4 texts"
    assert sts(tmp_path / "sts.csv", ["a,b,1", "c,d,0.5"]) == before
    assert sts(tmp_path / "sts.csv", ["a,b,1", "c,d,0.6"])["sha256"] != before["sha256"]


def test_judgements_of_an_evaluation_set_count(tmp_path):
    one = entry(beir(tmp_path / "one" / "set"))
    assert entry(beir(tmp_path / "two" / "set")) == one
    (file,) = (tmp_path / "two" / "set" / "qrels").glob("*.tsv")
    *head, last = file.read_text().splitlines()
    file.write_text("\n".join([*head, last[:-1] + "3"]) + "\n")
    assert entry(tmp_path / "two" / "set")["sha256"] != one["sha256"]


def test_languages_of_an_evaluation_set_count(tmp_path):
    def nway(langs):
        path = tmp_path / "dev.csv"
        lines = [f"{i},{lang},{i} {k}" for i in "12" for k, lang in enumerate(langs)]
        path.write_text("id,lang,text\n" + "\n".join(lines) + "\n")
        return entry(path)["sha256"]

    assert nway(["eng", "fra", "deu"]) == nway(["eng", "fra", "deu"])
    assert nway(["eng", "fra", "deu"]) != nway(["eng", "deu", "fra"])


def test_other_vectors_of_a_teacher_are_refused(tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((3, 2)))
    cfg = Distill(embeddings=str(tmp_path), features=1.0)
    before = {"data": [], "eval": [], "distill": provenance.of_teacher(cfg)}
    np.save(tmp_path / "vectors.npy", np.ones((3, 2)))
    now = {**before, "distill": provenance.of_teacher(cfg)}
    lines: list[str] = []
    with pytest.raises(ValueError, match="--allow-changed distill.embeddings$"):
        provenance.compare(before, now, ["data", "eval"], lines.append)
    assert lines == []
    provenance.compare(before, now, ["distill.embeddings"], lines.append)
    provenance.compare(now, now, [], lines.append)
    assert len(lines) == 1


def test_sample_of_large_files_covers_sizes_and_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "WHOLE", 100)
    monkeypatch.setattr(provenance, "END", 10)
    one, other = tmp_path / "a", tmp_path / "b"
    digests = []
    for content in (b"a" * 200, b"b" + b"a" * 199, b"a" * 199 + b"b", b"a" * 201):
        one.write_bytes(content)
        other.write_bytes(b"z")
        digests.append(provenance.sample([one, other]))
    assert len(set(digests)) == 4 and digests[0] != provenance.sample([other, one])
    one.write_bytes(b"a" * 100 + b"b" + b"a" * 99)
    assert provenance.sample([one, other]) == digests[0]
    monkeypatch.setattr(provenance, "WHOLE", 1000)
    assert provenance.sample([one, other]) != digests[0]


# ---- differences ----


def source(name, content="x", **options):
    return {"name": name, "items": "3 rows", "sha256": content * 64, "options": options}


A, B = source("a", "a", prompt=""), source("b", "b", prompt="")


@pytest.mark.parametrize(
    ("before", "now", "allowed", "refused"),
    [
        ([A, B], [A, B], [], ""),
        ([A, B], [source("c", "a", prompt=""), B], [], ""),  # Another name of the same items.
        ([A, B], [B, A], [], "data"),
        ([A, B], [B, A], ["data.a", "data.b"], "data"),
        ([A, B], [B, A], ["data"], ""),
        ([A, B], [A], [], "data.b"),
        ([A], [B, A], [], "data.b"),
        ([A], [B, A], ["data.b"], ""),
        ([A, B], [source("a", "c"), source("b b", "d")], [], "data.a data.b 'data.b b'"),
        ([A], [source("a", "a", prompt="x")], [], "data.a"),
        ([A], [source("a", "a", prompt="", rows=3)], [], "data.a"),
        ([A], [source("a", "a", prompt="x")], ["eval", "data.a"], ""),
    ],
)
def test_differences_are_allowed_by_name(before, now, allowed, refused):
    lines: list[str] = []
    records = [{"data": some, "eval": [], "distill": []} for some in (before, now)]
    if not refused:
        provenance.compare(*records, allowed, lines.append)
        assert bool(lines) == bool(allowed)
        return
    with pytest.raises(ValueError) as error:
        provenance.compare(*records, allowed, lines.append)
    assert str(error.value).endswith(f" with --allow-changed {refused}")
