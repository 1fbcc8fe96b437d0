"""Small evaluation tasks in files of each layout, and scores of them by full matrices."""

import numpy as np
from factories import write_jsonl

from mlembed.evaluation import scores
from mlembed.evaluation.grid import score_grid

WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def tatoeba_directory(path):
    path.mkdir()
    for lang, form in {"deu": "x{}x", "fra": "le {} {}"}.items():
        other = [form.format(w, w[::-1]) for w in WORDS]
        write_lines(path / f"tatoeba.{lang}-eng.{lang}", other)
        write_lines(path / f"tatoeba.{lang}-eng.eng", WORDS)
    return path


def beir_directory(path):
    """Queries of two words, documents of five."""
    rng = np.random.default_rng(0)
    (path / "qrels").mkdir(parents=True)
    for name, size, n in (("queries", 2, 12), ("corpus", 5, 120)):
        texts = [" ".join(rng.choice(WORDS, size)) for _ in range(n)]
        rows = [{"_id": f"{name[0]}{i}", "text": text} for i, text in enumerate(texts)]
        write_jsonl(path / f"{name}.jsonl", rows)
    judged = [f"q{i}\tc{d}\t1" for i in range(12) for d in rng.choice(120, 4, False)]
    write_lines(path / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *judged])
    return path


def nearly(n, seed):
    """Return n texts of eight words, and the same texts with one or two words replaced."""
    rng = np.random.default_rng(seed)
    texts = rng.choice(WORDS, (n, 8))
    others = texts.copy()
    for row, other in enumerate(others):
        other[rng.choice(8, 1 + row % 2, False)] = rng.choice(WORDS, 1 + row % 2)
    return [[" ".join(words) for words in side] for side in (texts, others)]


def un_directory(path):
    path.mkdir()
    english, german = nearly(30, 1)
    write_lines(path / "un.en-de.en", english)
    write_lines(path / "un.en-de.de", german)
    write_lines(path / "pool.de", [*nearly(30, 2)[0], *nearly(30, 3)[0], *german[:5]])
    return path


def bucc_directory(path):
    path.mkdir()
    for side, texts in zip(("de", "en"), nearly(40, 4), strict=True):
        write_lines(path / f"de-en.dev.{side}", [f"{side}{i}\t{t}" for i, t in enumerate(texts)])
    write_lines(path / "de-en.dev.gold", [f"de{i}\ten{i}" for i in range(25)])
    return path


def score_cells(*args, **options):
    return score_grid(*args, **options, costs=False).cells


def size(cell):
    return cell["dim"], cell["exit"], cell["rank"]


def ndcg(beir, queries, documents):
    """Score a search with full matrices."""
    cosines = queries @ documents.T
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :101]
    near = np.take_along_axis(cosines, rows, 1)
    judged = beir.judged, beir.order_N, beir.own_Q
    return scores.retrieval(near, rows, *judged)["score"]
