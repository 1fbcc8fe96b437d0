"""Scores of vectors, as the papers and their evaluators compute them.

Letters: N texts, Q queries, C documents, K nearest documents of a query, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from ..data.eval_sets import STS, Bitext, Mining, Part
from ..inference.search import nearest, neighbours

DIRECTIONS = ("to_pivot", "from_pivot", "f1_to_pivot", "f1_from_pivot")

# Sets of Tatoeba's languages whose means are published (LaBSE, arXiv 2007.01852): 14 of the
# multilingual Universal Sentence Encoder, 36 of XTREME, and all. LaBSE's 82 are not listed there.
LANGUAGES = {
    14: "ara cmn deu fra ita jpn kor nld pol por rus spa tha tur",
    36: "afr ara ben bul cmn deu ell est eus fin fra heb hin hun ind ita jav jpn kat kaz kor mal "
    "mar nld pes por rus spa swh tam tel tgl tha tur urd vie",
    112: "afr amh ang ara arq arz ast awa aze bel ben ber bos bre bul cat cbk ceb ces cha cmn cor "
    "csb cym dan deu dsb dtp ell epo est eus fao fin fra fry gla gle glg gsw heb hin hrv hsb hun "
    "hye ido ile ina ind isl ita jav jpn kab kat kaz khm kor kur kzj lat lfn lit lvs mal mar max "
    "mhr mkd mon nds nld nno nob nov oci orv pam pes pms pol por ron rus slk slv spa sqi srp swe "
    "swg swh tam tat tel tgl tha tuk tur tzl uig ukr urd uzb vie war wuu xho yid yue zsm",
}


def accuracy(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Share of unit rows of a [n, D] whose nearest row of b is their own, and the reverse: LASER's
    measure on Tatoeba (arXiv 1812.10464, section 4.3)."""
    own = torch.arange(len(a))
    there, back = (found.cpu() == own for found in nearest(a, b))
    return there.float().mean().item(), back.float().mean().item()


def weighted_f1(found: np.ndarray) -> float:
    """MTEB's score of bitext: F1 of every text as a class, weighted by support (1 each).

    found: int64 [n], the text that was found for each i, whose own is i. Of a class that is found c
    times, once rightly, precision is 1 / c and recall 1, so F1 = 2 / (c + 1).
    """
    right = found == np.arange(len(found))
    times = np.bincount(found, minlength=len(found))
    return float(np.mean(right * 2 / (times + 1)))


def score_bitext(task: Bitext, vectors: Tensor) -> dict[str, Any]:
    """Of texts encoded as [N, d]: `score`, the mean over kinds of the mean over languages of both
    directions' accuracy; to_pivot and from_pivot, one direction each (LASER, XTREME and LaBSE give
    the former); f1_to_pivot and f1_from_pivot (MTEB gives the former); of Tatoeba these four by
    language, `by_direction`, and `means`."""
    langs, kinds = (sorted({group[i] for group in task.groups}) for i in (0, 1))
    unit = F.normalize(vectors, dim=-1)
    right = np.full((len(langs), len(kinds), 2), np.nan)  # a language may lack a kind
    f1 = np.full_like(right, np.nan)
    for (lang, kind), (a, b) in task.groups.items():
        at = langs.index(lang), kinds.index(kind)
        sides = nearest(unit[torch.from_numpy(a)], unit[torch.from_numpy(b)])
        for way, rows in enumerate(side.cpu().numpy() for side in sides):
            right[at][way] = (rows == np.arange(len(rows))).mean()
            f1[at][way] = weighted_f1(rows)
    of_ways = [np.nanmean(measure, axis=0).mean(axis=0) for measure in (right, f1)]
    by_kind = np.nanmean(right, axis=(0, 2))
    by_language = np.nanmean(right, axis=(1, 2))
    found: dict[str, Any] = {
        "score": float(by_kind.mean()),
        **dict(zip(DIRECTIONS, np.concatenate(of_ways).tolist(), strict=True)),
        "by_kind": dict(zip(kinds, by_kind.tolist(), strict=True)) if kinds != [""] else {},
        "by_language": dict(zip(langs, by_language.tolist(), strict=True)),
    }
    if task.tatoeba:
        both = np.concatenate([right[:, 0], f1[:, 0]], axis=1)
        each = {
            lang: dict(zip(DIRECTIONS, row, strict=True))
            for lang, row in zip(langs, both.tolist(), strict=True)
        }
        found["by_direction"] = each
        found["means"] = means({lang: row["to_pivot"] for lang, row in each.items()})
    return found


def means(by_language: dict[str, float]) -> dict[str, dict[str, float]]:
    """Of accuracies into English by Tatoeba's code, the means over the sets of languages that
    papers report: `accuracy` where all of a set are there, and `languages`, how many of it are."""
    found: dict[str, dict[str, float]] = {}
    for size, codes in LANGUAGES.items():
        there = [by_language[code] for code in codes.split() if code in by_language]
        found[str(size)] = {"languages": len(there)}
        if len(there) == size:
            found[str(size)]["accuracy"] = float(np.mean(there))
    return found


# ---- scored pairs ----


def score_sts(task: STS, vectors: Tensor) -> dict[str, Any]:
    """{"score": Spearman correlation of cosine and human score, "pearson"} of texts encoded as
    [N, d]; nan for both where either is the same for all pairs."""
    a, b = (F.normalize(vectors[side::2], dim=-1) for side in (0, 1))
    # Not a product: equal vectors are at exactly 1, so that rounding orders no ties.
    cosine = (1 - (a - b).square().sum(1) / 2).numpy()
    if not (np.ptp(cosine) and np.ptp(task.scores)):
        return {"score": np.nan, "pearson": np.nan}
    return {
        "score": float(spearmanr(cosine, task.scores).statistic),
        "pearson": float(pearsonr(cosine, task.scores).statistic),
    }


def candidates(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return margins, falling, and pairs int64 [P, 2] of unit rows a [n, D] and b [m, D].

    The margin of a pair is its cosine divided by the mean of both texts' average cosine with their
    4 nearest neighbours (Artetxe and Schwenk, arXiv 1811.01136, 3.1, "ratio"). Every text of either
    side proposes its neighbour of the highest margin; a pair stays if no better one shares a text
    with it (3.2, "max").
    """
    (there, to), (back, origin) = neighbours(a, b), neighbours(b, a)
    forward = _best(there, to, back)
    backward = _best(back, origin, there)
    margins = np.concatenate([forward[0], backward[0]])
    pairs = np.stack(
        [
            np.concatenate([np.arange(len(a)), backward[1]]),
            np.concatenate([forward[1], np.arange(len(b))]),
        ],
        axis=1,
    )
    order = np.argsort(-margins, kind="stable")
    margins, pairs = margins[order], pairs[order]
    free = _without_a_better(pairs)
    return margins[free], pairs[free]


def _best(
    cosines: np.ndarray, rows: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest margin of each text [n] and the neighbour that has it."""
    mean = (cosines.mean(1, keepdims=True) + others.mean(1)[rows]) / 2
    margins = cosines / mean
    at = np.arange(len(rows)), margins.argmax(1)
    return margins[at], rows[at]


def _without_a_better(pairs: np.ndarray) -> np.ndarray:
    """Return the rows of pairs, best first, whose texts no earlier chosen row has."""
    left, right, chosen = set[int](), set[int](), []
    for row, (a, b) in enumerate(pairs.tolist()):
        if a not in left and b not in right:
            left.add(a)
            right.add(b)
            chosen.append(row)
    return np.array(chosen, dtype=np.int64)


def threshold(margins: np.ndarray, right: np.ndarray, gold: int) -> float:
    """Where F1 is highest: midway between the last candidate that is taken and the next of another
    margin (BUCC's evaluations in LASER and XTREME).

    margins: falling [P]. right: bool [P], whether a candidate is gold. gold: how many there are.
    """
    if not len(margins):
        return np.inf
    taken = np.arange(1, len(margins) + 1)
    f1 = 2 * right.cumsum() / (taken + gold)  # = 2 P R / (P + R)
    f1[:-1][margins[:-1] == margins[1:]] = -1  # no threshold is between equal ones
    last = int(f1.argmax())
    return float(margins[last : last + 2].astype(np.float64).mean())


def precision_recall_f1(right: int, taken: int, gold: int) -> tuple[float, float, float]:
    """0 where nothing is taken."""
    return right / max(1, taken), right / max(1, gold), 2 * right / max(1, taken + gold)


def score_mining(task: Mining, vectors: Tensor) -> dict[str, Any]:
    """Return BUCC's scores of texts encoded as [N, d]: `score` is F1, averaged over languages, with
    precision and recall; `by_language`, F1 of each.

    The threshold is tuned on one part, and the other part is scored if it has gold pairs: `splits`
    says which. Like LASER's evaluation, a text that one side repeats is searched once, and no pair
    with it is chosen.
    """
    unit = F.normalize(vectors, dim=-1).numpy()
    by_language = {}
    for lang, (tuned, reported) in task.parts.items():
        first = _mined(task.texts, unit, tuned)
        second = first if reported is tuned else _mined(task.texts, unit, reported)
        margins, right = second
        chosen = margins >= threshold(*first, len(tuned.gold))
        by_language[lang] = precision_recall_f1(
            int(right[chosen].sum()), int(chosen.sum()), len(reported.gold)
        )
    precision, recall, f1 = np.mean(list(by_language.values()), axis=0).tolist()
    return {
        "score": f1,
        "precision": precision,
        "recall": recall,
        "by_language": {lang: found[2] for lang, found in by_language.items()},
        "splits": {
            lang: f"threshold of {tuned}, scores of {reported}"
            for lang, (tuned, reported) in task.splits.items()
        },
    }


def _mined(texts: Sequence[str], unit: np.ndarray, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return the margins of a part's candidates, falling, as float64, and whether each is gold."""
    (a, a_once), (b, b_once) = (_distinct(texts[side]) for side in (part.source, part.target))
    margins, pairs = candidates(unit[part.source][a], unit[part.target][b])
    once = a_once[pairs[:, 0]] & b_once[pairs[:, 1]]
    pairs = np.stack([a[pairs[once, 0]], b[pairs[once, 1]]], axis=1)
    return margins[once].astype(np.float64), _in(pairs, part.gold)


def _distinct(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Row of each distinct text, and whether it is the only one."""
    first: dict[str, int] = {}
    same = np.array([first.setdefault(text.strip(), row) for row, text in enumerate(texts)])
    rows, counts = np.unique(same, return_counts=True)
    return rows, counts == 1


def _in(pairs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """bool [P]: whether each pair is among gold."""
    return np.isin(pairs[:, 0] << 32 | pairs[:, 1], gold[:, 0] << 32 | gold[:, 1])


def retrieval(
    scores_QK: np.ndarray,
    rows_QK: np.ndarray,
    judged: np.ndarray,
    order_N: np.ndarray,
    own_Q: np.ndarray | None = None,
) -> dict[str, float]:
    """As trec_eval (through pytrec_eval, as BEIR and MTEB have it) computes them: of equal scores
    the document of the higher id comes first; relevance is graded in nDCG, with linear gains, and
    anything above 0 otherwise; the mean is over queries with judgements, of which one without a
    relevant document counts 0.

    Args:
        scores_QK, rows_QK: the nearest documents of each query, in any order; rows of -1 are none.
        judged: int64 [judgements, 3] of query, document, relevance, by rising query and document,
            which may be N or above where there is none such.
        order_N: each document's place among all by id.
        own_Q: documents of the queries' own ids, or -1; passed over, as BEIR does.

    Returns:
        score = ndcg_at_10, recall_at_10, recall_at_100, map_at_100, mrr_at_10.
    """
    if own_Q is not None:
        own = rows_QK == own_Q[:, None]
        scores_QK, rows_QK = np.where(own, -np.inf, scores_QK), np.where(own, -1, rows_QK)
    order = np.lexsort((-order_N[rows_QK], -scores_QK), axis=1)
    rows_QK = np.take_along_axis(rows_QK, order, axis=1)
    Q, N = len(rows_QK), max(len(order_N), judged[:, 1].max() + 1)
    keys = judged[:, 0] * N + judged[:, 1]
    wanted = np.arange(Q)[:, None] * N + rows_QK
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    there = (keys[at] == wanted) & (rows_QK >= 0)
    grades_QK = np.where(there, judged[at, 2], 0).clip(min=0)

    ideal = judged[np.lexsort((-judged[:, 2], judged[:, 0]))]
    starts = np.searchsorted(ideal[:, 0], np.arange(Q))
    rank = np.arange(len(ideal)) - starts[ideal[:, 0]]
    first = ideal[(rank < 10) & (ideal[:, 2] > 0)]
    first_rank = rank[(rank < 10) & (ideal[:, 2] > 0)]
    best = np.bincount(first[:, 0], first[:, 2] / np.log2(first_rank + 2), minlength=Q)
    gains = grades_QK[:, :10] / np.log2(np.arange(grades_QK[:, :10].shape[1]) + 2)
    ndcg = gains.sum(1) / np.where(best > 0, best, 1)

    relevant = np.bincount(judged[judged[:, 2] > 0, 0], minlength=Q).clip(min=1)
    hits = grades_QK[:, :100] > 0
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    first_hit = np.where(hits[:, :10].any(1), hits[:, :10].argmax(1) + 1, np.inf)
    found = {
        "ndcg_at_10": ndcg,
        "recall_at_10": hits[:, :10].sum(1) / relevant,
        "recall_at_100": hits.sum(1) / relevant,
        "map_at_100": (precision * hits).sum(1) / relevant,
        "mrr_at_10": 1 / first_hit,
    }
    means = {name: float(values.mean()) for name, values in found.items()}
    return {"score": means["ndcg_at_10"], **means}


def precision_at_1(rows_Q: np.ndarray, answers: Sequence[str]) -> float:
    """Share of queries i whose nearest document is answer i, or one of the same text. The first
    documents are the answers, in their order; others are a pool's."""
    first: dict[str, int] = {}
    same = np.array([first.setdefault(text, row) for row, text in enumerate(answers)])
    inside = rows_Q < len(answers)
    return float(np.mean(inside & (same[np.where(inside, rows_Q, 0)] == same)))
