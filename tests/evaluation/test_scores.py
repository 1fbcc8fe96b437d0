"""Every metric against plain Python in float64, and the papers' formulas by hand."""

import math

import numpy as np
import pytest
import torch

from mlembed.data.eval_tasks import STS, Bitext, Mining, Part
from mlembed.evaluation import scores


def unit(vectors):
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def nearest(vectors, a, b):
    """Return the share of rows a whose nearest row of b is their translation, in Python."""
    right = 0
    for i, row in enumerate(a):
        cosines = [vectors[row] @ vectors[j] / np.linalg.norm(vectors[j]) for j in b]
        right += int(np.argmax(cosines)) == i
    return right / len(a)


def test_bitext_means():
    """Means over languages, then over kinds; a language that lacks a kind counts in the others."""
    rng = np.random.default_rng(0)
    task = Bitext("t", [], {})
    groups = {("de", "date"): 7, ("fr", "date"): 3, ("de", "name"): 5}
    vectors = []
    for group, n in groups.items():
        first = len(vectors)
        english = rng.normal(size=(n, 6))
        vectors += [*(english + 0.9 * rng.normal(size=(n, 6))), *english]
        task.groups[group] = (first + np.arange(n), first + n + np.arange(n))
    vectors = np.array(vectors)
    there = {g: nearest(vectors, a, b) for g, (a, b) in task.groups.items()}
    back = {g: nearest(vectors, b, a) for g, (a, b) in task.groups.items()}
    both = {g: (there[g] + back[g]) / 2 for g in groups}
    assert len(set(both.values())) == 3 and there != back  # else the means could be mixed up
    date = (both["de", "date"] + both["fr", "date"]) / 2
    name = both["de", "name"]
    got = scores.score_bitext(task, unit(vectors))
    assert got["score"] == pytest.approx((date + name) / 2)
    assert got["by_kind"] == pytest.approx({"date": date, "name": name})
    german = (both["de", "date"] + both["de", "name"]) / 2
    assert got["by_language"] == pytest.approx({"de": german, "fr": both["fr", "date"]})
    for key, side in (("to_pivot", there), ("from_pivot", back)):
        mean = ((side["de", "date"] + side["fr", "date"]) / 2 + side["de", "name"]) / 2
        assert got[key] == pytest.approx(mean)


def test_bitext_without_kinds_has_no_by_kind():
    task = Bitext("t", [], {("de", ""): (np.arange(3), np.arange(3, 6))})
    got = scores.score_bitext(task, torch.eye(3).repeat(2, 1))
    assert got["by_kind"] == {} and got["score"] == 1.0 and got["by_language"] == {"de": 1.0}
    assert "means" not in got


def test_sts_is_spearman():
    """Without ties: 1 - 6 sum (rank difference)^2 / (n (n^2 - 1))."""
    rng = np.random.default_rng(0)
    n = 30
    vectors = rng.normal(size=(2 * n, 8))
    gold = rng.permutation(n) / 7
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (rows[0::2] * rows[1::2]).sum(1)
    gaps = np.argsort(np.argsort(cosines)) - np.argsort(np.argsort(gold))
    want = 1 - 6 * (gaps**2).sum() / (n * (n**2 - 1))
    task = STS("s", ["x"] * 2 * n, gold)
    got = scores.score_sts(task, unit(vectors))
    assert got["score"] == pytest.approx(want)
    assert got["pearson"] == pytest.approx(np.corrcoef(cosines, gold)[0, 1])
    assert abs(want) < 0.9
    order = np.sort(gold)[np.argsort(np.argsort(cosines))]
    perfect = scores.score_sts(STS("s", task.texts, order), unit(vectors))
    assert perfect["score"] == pytest.approx(1.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "texts, gold", [([0, 1, 2, 3], [1, 1]), ([0, 0, 1, 1], [1, 2]), ([0, 1], [1])]
)
def test_sts_without_variation(texts, gold):
    got = scores.score_sts(STS("s", ["x"] * len(texts), np.array(gold)), torch.eye(4)[texts])
    assert math.isnan(got["score"]) and math.isnan(got["pearson"])


# ---- bitext: F1 and means ----


def f1_by_hand(found):
    """Return the mean of each class's F1, from its counts."""
    total = 0.0
    for label in range(len(found)):
        right = int(found[label] == label)
        precision = right / max(1, sum(f == label for f in found))
        total += 2 * precision * right / (precision + right) if right else 0.0
    return total / len(found)


def test_weighted_f1():
    assert scores.weighted_f1(np.array([0, 0, 2])) == pytest.approx((2 / 3 + 0 + 1) / 3)
    rng = np.random.default_rng(0)
    found = np.where(rng.random(40) < 0.5, np.arange(40), rng.integers(0, 40, 40))
    assert scores.weighted_f1(found) == pytest.approx(f1_by_hand(found.tolist()))
    assert scores.weighted_f1(np.arange(5)) == 1.0


def test_means_over_sets_of_languages():
    sizes = {n: len(set(codes.split())) for n, codes in scores.LANGUAGES.items()}
    assert sizes == {14: 14, 36: 36, 112: 112}
    all_112 = scores.LANGUAGES[112].split()
    assert set(scores.LANGUAGES[14].split()) | set(scores.LANGUAGES[36].split()) <= set(all_112)
    accuracy = {code: i / 112 for i, code in enumerate(all_112)}
    got = scores.means(accuracy)
    assert got["112"] == {"languages": 112, "accuracy": pytest.approx(111 / 224)}
    want = np.mean([accuracy[code] for code in scores.LANGUAGES[36].split()])
    assert got["36"]["accuracy"] == pytest.approx(want)
    del accuracy["tha"]
    got = scores.means(accuracy)
    assert got["14"] == {"languages": 13} and got["112"] == {"languages": 111}
    assert scores.means({"xyz": 1.0})["36"] == {"languages": 0}
    task = Bitext("t", [], {("deu", ""): (np.arange(3), np.arange(3, 6))}, tatoeba=True)
    got = scores.score_bitext(task, torch.eye(3).repeat(2, 1))
    assert got["means"]["14"] == {"languages": 1}
    got = scores.score_bitext(task, torch.eye(3)[[0, 1, 1, 0, 0, 1]])["by_direction"]
    want = {"to_pivot": 2 / 3, "from_pivot": 1 / 3, "f1_to_pivot": 5 / 9, "f1_from_pivot": 2 / 9}
    assert got == {"deu": pytest.approx(want)}


# ---- mining ----


def best_by_hand(a, b, k=4):
    """Return (margin, row, neighbour) for each row of a: the neighbour of the highest margin."""
    cosine = a @ b.T
    forward = np.sort(cosine, axis=1)[:, ::-1][:, :k].mean(1)
    backward = np.sort(cosine, axis=0)[::-1][:k].mean(0)
    margins = cosine / ((forward[:, None] + backward[None]) / 2)
    found = []
    for i in range(len(a)):
        near = sorted(range(len(b)), key=lambda j, i=i: -cosine[i, j])[:k]
        j = max(near, key=lambda j, i=i: margins[i, j])
        found.append((margins[i, j], i, j))
    return found


def corpora(n=30, m=40, planted=12, seed=0):
    """Return two sides of unit rows and the pairs that are translations, with noise."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 8)), rng.normal(size=(m, 8))
    gold = np.stack([rng.permutation(n)[:planted], rng.permutation(m)[:planted]], axis=1)
    b[gold[:, 1]] = a[gold[:, 0]] + 0.45 * rng.normal(size=(planted, 8))
    return *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)), gold


def test_candidates():
    a, b, _ = corpora()
    forward = best_by_hand(a, b)
    backward = [(x, i, j) for x, j, i in best_by_hand(b, a)]
    want = []
    for candidate in sorted([*forward, *backward], reverse=True):
        if not any(candidate[1] == t[1] or candidate[2] == t[2] for t in want):
            want.append(candidate)
    margins, pairs = scores.candidates(a.astype(np.float32), b.astype(np.float32))
    assert pairs.tolist() == [[i, j] for _, i, j in want]  # best first
    np.testing.assert_allclose(margins, [x for x, *_ in want], atol=1e-5)
    mutual = {pair[1:] for pair in forward} & {pair[1:] for pair in backward}
    assert len(mutual) < len(want) < len(forward)


def test_candidates_of_fewer_texts_than_neighbours():
    a, b, _ = corpora(3, 2, 1)
    margins, pairs = scores.candidates(a, b)
    assert 1 <= len(pairs) <= 2 and np.isfinite(margins).all()


@pytest.mark.parametrize(
    "margins, right, gold, want",
    [
        ([0.9, 0.8, 0.7, 0.1], [1, 1, 0, 0], 2, 0.75),  # between the last chosen and the next
        ([0.9, 0.8, 0.7, 0.1], [1, 1, 0, 1], 3, 0.1),  # all: F1 6/7 against 4/5
        ([0.9, 0.8, 0.7], [0, 1, 1], 2, 0.7),
        ([0.9, 0.8, 0.8, 0.4], [1, 1, 0, 0], 2, 0.6),  # equal ones are chosen together: 4/5
        ([0.9, 0.8, 0.8, 0.4], [1, 0, 0, 0], 1, 0.85),
        ([0.5], [1], 1, 0.5),
    ],
)
def test_threshold(margins, right, gold, want):
    at = scores.threshold(np.array(margins), np.array(right, bool), gold)
    assert at == pytest.approx(want)


def test_no_threshold_is_better():
    rng = np.random.default_rng(0)
    for _ in range(50):
        margins = np.sort(rng.integers(0, 12, 15))[::-1] / 10
        right, gold = rng.random(15) < 0.5, 9

        def f1(at, margins=margins, right=right, gold=gold):
            chosen = margins >= at
            return scores.precision_recall_f1((chosen & right).sum(), chosen.sum(), gold)[2]

        at = scores.threshold(margins, right, gold)
        assert f1(at) == pytest.approx(max(f1(x) for x in np.unique(margins)))


def test_precision_recall_f1():
    assert scores.precision_recall_f1(3, 4, 6) == (0.75, 0.5, pytest.approx(0.6))
    assert scores.precision_recall_f1(1, 1, 1) == (1, 1, 1)
    assert scores.precision_recall_f1(0, 0, 6) == (0, 0, 0)


def test_mining_tunes_one_part_and_scores_the_other():
    sets = {seed: corpora(seed=seed) for seed in (1, 2)}
    vectors, parts = [], []
    for a, b, gold in sets.values():
        first = len(vectors)
        vectors += [*a, *b]
        parts.append(Part(slice(first, first + 30), slice(first + 30, first + 70), gold))
    texts = [f"text {i}" for i in range(140)]
    task = Mining("m", texts, {"de": tuple(parts)}, {"de": ("dev", "test")})
    got = scores.score_mining(task, torch.tensor(np.array(vectors)).float())

    found = []
    for a, b, gold in sets.values():
        margins, pairs = scores.candidates(a, b)
        right = np.array([pair in gold.tolist() for pair in pairs.tolist()])
        found.append((margins, right, len(gold)))
    (margins, right, count), at = found[1], scores.threshold(*found[0])
    chosen = margins >= at
    want = scores.precision_recall_f1((chosen & right).sum(), chosen.sum(), count)
    assert (got["precision"], got["recall"], got["score"]) == pytest.approx(want)
    assert got["by_language"] == {"de": pytest.approx(want[2])} and 0.3 < want[2] < 1
    assert got["splits"] == {"de": "threshold of dev, scores of test"}
    # Tuned on what is reported, it cannot be worse.
    task.parts["de"] = parts[1], parts[1]
    assert scores.score_mining(task, torch.tensor(np.array(vectors)).float())["score"] >= want[2]


def test_mining_of_texts_that_repeat():
    """Like LASER's mine_bitexts.py --unify and bucc.py: they are searched once and in no pair."""
    a, b, gold = corpora()
    again = gold[:3, 1]
    vectors = torch.tensor(np.concatenate([a, b, b[again]])).float()
    texts = [f"text {i}" for i in range(70)]
    texts += [f" {texts[30 + row]}" for row in again]
    part = Part(slice(0, 30), slice(30, 73), gold)
    task = Mining("m", texts, {"de": (part, part)}, {"de": ("dev", "dev")})
    got = scores.score_mining(task, vectors)
    margins, pairs = scores.candidates(a, b)
    kept = ~np.isin(pairs[:, 1], again)
    right = np.array([pair in gold.tolist() for pair in pairs[kept].tolist()])
    chosen = margins[kept] >= scores.threshold(margins[kept], right, 12)
    want = scores.precision_recall_f1((chosen & right).sum(), chosen.sum(), 12)
    assert (got["precision"], got["recall"], got["score"]) == pytest.approx(want)
    assert 0 < got["recall"] <= 9 / 12


# ---- retrieval ----


def metrics_by_hand(ranking, grades):
    """Return one query's metrics from the grades down its ranking and all of its grades."""
    discount = [1 / math.log2(rank + 2) for rank in range(10)]
    ideal = sorted((g for g in grades if g > 0), reverse=True)
    best = sum(g * d for g, d in zip(ideal, discount, strict=False))
    gain = sum(max(0, g) * d for g, d in zip(ranking, discount, strict=False))
    hits = [g > 0 for g in ranking[:100]]
    relevant = len(ideal)
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    first = next((i for i, hit in enumerate(hits[:10]) if hit), None)
    return {
        "ndcg_at_10": gain / best if best else 0.0,
        "recall_at_10": sum(hits[:10]) / relevant if relevant else 0.0,
        "recall_at_100": sum(hits) / relevant if relevant else 0.0,
        "map_at_100": sum(p for p, hit in zip(precision, hits, strict=True) if hit) / relevant
        if relevant
        else 0.0,
        "mrr_at_10": 0.0 if first is None else 1 / (first + 1),
    }


def test_retrieval_by_hand():
    """Data have equal scores, graded and negative relevance, queries without a relevant document,
    and one with more relevant documents than are searched.
    """
    rng = np.random.default_rng(0)
    Q, N = 12, 160
    cosines = rng.integers(0, 40, (Q, N)) / 40
    order = rng.permutation(N)  # of the ids
    grades = {(q, d): int(rng.integers(-1, 4)) for q in range(Q) for d in rng.choice(N, 20, False)}
    grades |= {key: 0 for key in grades if key[0] == 3}
    grades |= {(5, d): 1 for d in range(130)}
    want, found = [], np.empty((Q, 100), dtype=np.int64)
    for q in range(Q):
        ranking = sorted(range(N), key=lambda d, q=q: (cosines[q, d], order[d]), reverse=True)
        found[q] = rng.permutation(ranking[:100])
        judged = [g for (of, _), g in grades.items() if of == q]
        want.append(metrics_by_hand([grades.get((q, d), 0) for d in ranking], judged))
    assert want[3]["ndcg_at_10"] == 0 and want[5]["recall_at_100"] < 100 / 130
    judged = np.array([[q, d, g] for (q, d), g in sorted(grades.items())])
    near = np.take_along_axis(cosines, found, axis=1).astype(np.float32)
    got = scores.retrieval(near, found, judged, order)
    means = {name: np.mean([row[name] for row in want]) for name in want[0]}
    assert got == pytest.approx(means | {"score": means["ndcg_at_10"]})
    for q in (3, 5, 7):  # a mean could hide two faults
        alone = judged[judged[:, 0] == q] * [0, 1, 1]
        got = scores.retrieval(near[q : q + 1], found[q : q + 1], alone, order)
        assert got == pytest.approx(want[q] | {"score": want[q]["ndcg_at_10"]})


def test_mrr_is_cut_at_10():
    rows, judged = np.arange(12)[None], np.array([[0, 9, 1], [0, 10, 1]])
    near = np.linspace(1, 0, 12, dtype=np.float32)[None]
    got = [scores.retrieval(near, rows, judged[some], np.arange(12)) for some in ([0], [1])]
    assert [one["mrr_at_10"] for one in got] == [0.1, 0]


def test_retrieval_of_three_documents():
    rows = np.array([[0, 1, 2], [2, 1, 0]])
    near = np.array([[0.9, 0.8, 0.7]] * 2, np.float32)
    got = scores.retrieval(near, rows, np.array([[0, 2, 1], [1, 2, 1]]), np.arange(3))
    assert got["mrr_at_10"] == pytest.approx((1 / 3 + 1) / 2)
    assert got["ndcg_at_10"] == pytest.approx((0.5 + 1) / 2)
    assert got["recall_at_10"] == got["recall_at_100"] == 1


def test_retrieval_leaves_out_the_query():
    """A judged document that the corpus lacks (3, of 3 documents) counts as not found."""
    rows = np.array([[2, 1, 0]])
    near = np.array([[0.9, 0.8, 0.7]], np.float32)
    judged = np.array([[0, 1, 1], [0, 3, 1]])
    first, second = 1, 1 / math.log2(3)
    got = scores.retrieval(near, rows, judged, np.arange(3), np.array([2]))
    assert got["ndcg_at_10"] == pytest.approx(first / (first + second))
    assert (got["mrr_at_10"], got["recall_at_10"], got["map_at_100"]) == (1, 0.5, 0.5)
    got = scores.retrieval(near, rows, judged, np.arange(3), np.array([-1]))
    assert got["mrr_at_10"] == 0.5


def test_precision_at_1():
    """An answer counts by its text; rows after the answers belong to the pool."""
    answers = ["a", "b", "a", "c"]
    assert scores.precision_at_1(np.array([0, 1, 2, 3]), answers) == 1
    assert scores.precision_at_1(np.array([2, 1, 0, 3]), answers) == 1
    assert scores.precision_at_1(np.array([1, 1, 3, 4]), answers) == 0.25
