"""Compute scores of unit vectors like the papers and their evaluators do.

Letters: N texts, Q queries, K nearest documents of a query, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytrec_eval
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from ..data.eval_tasks import STS, Bitext, Mining, Part
from ..inference.search import nearest

NEIGHBOURS = 4  # k of the margin, in LASER's and BUCC's evaluations.
DIRECTIONS = ("to_pivot", "from_pivot", "f1_to_pivot", "f1_from_pivot")
RETRIEVAL = {  # Our names of metrics, and trec_eval's.
    "ndcg_at_10": "ndcg_cut_10",
    "recall_at_10": "recall_10",
    "recall_at_100": "recall_100",
    "map_at_100": "map_cut_100",
    "mrr_at_10": "recip_rank",
}

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


# ---- bitext ----


def nearest_rows(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 [n] and [m]: for each unit row of a [n, D] the nearest row of b [m, D], and the
    reverse.
    """
    there, back = nearest(a, b, 1)[1], nearest(b, a, 1)[1]
    return there[:, 0].numpy(), back[:, 0].numpy()


def accuracy(rows: np.ndarray) -> float:
    """Return the share of texts whose nearest text is their translation, the one of their number:
    LASER's metric on Tatoeba (arXiv 1812.10464, section 4.3).
    """
    return float((rows == np.arange(len(rows))).mean())


def weighted_f1(rows: np.ndarray) -> float:
    """Return MTEB's score of bitext: F1 of every text as a class, weighted by support (1 each).

    rows: int64 [n], the text nearest to each i, whose translation is i. For a class that is
    predicted c times, once rightly, precision is 1 / c and recall 1, so F1 = 2 / (c + 1).
    """
    right = rows == np.arange(len(rows))
    times = np.bincount(rows, minlength=len(rows))
    return float(np.mean(right * 2 / (times + 1)))


def score_bitext(task: Bitext, unit: Tensor) -> dict[str, Any]:
    """Score bitext retrieval of texts encoded as unit vectors [N, d].

    Returns:
        `score`, the mean over kinds of the mean over languages of both directions' accuracy;
        to_pivot and from_pivot, one direction each (LASER, XTREME and LaBSE give the former);
        f1_to_pivot and f1_from_pivot (MTEB gives the former); `by_kind`, `by_language`; for
        Tatoeba these four by language, `by_direction`, and `means`.
    """
    langs, kinds = (sorted({group[i] for group in task.groups}) for i in (0, 1))
    # A language may lack a kind, which stays NaN.
    right = np.full((len(langs), len(kinds), 2), np.nan)
    f1 = np.full_like(right, np.nan)
    for (lang, kind), (a, b) in task.groups.items():
        at = langs.index(lang), kinds.index(kind)
        sides = nearest_rows(unit[torch.from_numpy(a)], unit[torch.from_numpy(b)])
        right[at] = [accuracy(rows) for rows in sides]
        f1[at] = [weighted_f1(rows) for rows in sides]
    directions = [np.nanmean(metric, axis=0).mean(axis=0) for metric in (right, f1)]
    by_kind = np.nanmean(right, axis=(0, 2))
    by_language = np.nanmean(right, axis=(1, 2))
    result: dict[str, Any] = {
        "score": float(by_kind.mean()),
        **dict(zip(DIRECTIONS, np.concatenate(directions).tolist(), strict=True)),
        "by_kind": dict(zip(kinds, by_kind.tolist(), strict=True)) if kinds != [""] else {},
        "by_language": dict(zip(langs, by_language.tolist(), strict=True)),
    }
    if task.tatoeba:
        both = np.concatenate([right[:, 0], f1[:, 0]], axis=1)
        each = {
            lang: dict(zip(DIRECTIONS, row, strict=True))
            for lang, row in zip(langs, both.tolist(), strict=True)
        }
        result["by_direction"] = each
        result["means"] = means({lang: row["to_pivot"] for lang, row in each.items()})
    return result


def means(by_language: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return mean accuracies into English over the sets of Tatoeba's languages that papers report:
    `languages`, how many of a set are present, and `accuracy` if all of them are.
    """
    result: dict[str, dict[str, float]] = {}
    for size, codes in LANGUAGES.items():
        present = [by_language[code] for code in codes.split() if code in by_language]
        result[str(size)] = {"languages": len(present)}
        if len(present) == size:
            result[str(size)]["accuracy"] = float(np.mean(present))
    return result


# ---- scored pairs ----


def score_sts(task: STS, unit: Tensor) -> dict[str, Any]:
    """Correlate cosines with human scores, for texts encoded as unit vectors [N, d]: `score` is
    Spearman's correlation, `pearson` Pearson's; NaN if either side is the same for all pairs.
    """
    a, b = unit[0::2], unit[1::2]
    # This form gives exactly 1 for equal vectors, so rounding does not break ties.
    cosine = (1 - (a - b).square().sum(1) / 2).numpy()
    if not (np.ptp(cosine) and np.ptp(task.scores)):
        return {"score": np.nan, "pearson": np.nan}
    return {
        "score": float(spearmanr(cosine, task.scores).statistic),
        "pearson": float(pearsonr(cosine, task.scores).statistic),
    }


# ---- mining of bitext ----


def candidates(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return margins, falling, and pairs int64 [P, 2] of unit rows a [n, D] and b [m, D].

    The margin of a pair is its cosine divided by the mean of both texts' average cosine with their
    4 nearest neighbours (Artetxe and Schwenk, arXiv 1811.01136, 3.1, "ratio"). Every text of either
    side proposes its neighbour of the highest margin; a pair stays if no better one shares a text
    with it (3.2, "max").
    """
    sides = torch.from_numpy(a), torch.from_numpy(b)
    there, to = (x.numpy() for x in nearest(*sides, NEIGHBOURS))
    back, origin = (x.numpy() for x in nearest(*sides[::-1], NEIGHBOURS))
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
    """Return the margin of the highest F1: midway between the last candidate that it admits and the
    next one of another margin (BUCC's evaluations in LASER and XTREME).

    margins: falling [P]. right: bool [P], whether a candidate is gold. gold: number of gold pairs.
    """
    if not len(margins):
        return np.inf
    admitted = np.arange(1, len(margins) + 1)
    f1 = 2 * right.cumsum() / (admitted + gold)
    # No threshold separates equal margins.
    f1[:-1][margins[:-1] == margins[1:]] = -1
    last = int(f1.argmax())
    return float(margins[last : last + 2].astype(np.float64).mean())


def precision_recall_f1(right: int, chosen: int, gold: int) -> tuple[float, float, float]:
    """Return precision, recall and F1 of `chosen` pairs, of which `right` are gold; 0 for none."""
    return right / max(1, chosen), right / max(1, gold), 2 * right / max(1, chosen + gold)


def score_mining(task: Mining, unit: Tensor) -> dict[str, Any]:
    """Score pairs mined from texts that are encoded as unit vectors [N, d]: `score` is F1, averaged
    over languages, with precision and recall; `by_language`, F1 of each.

    The threshold is tuned on one part, and the other part is scored if it has gold pairs: `splits`
    says which. Like LASER's evaluation, a text that one side repeats is searched once, and no pair
    with it is chosen.
    """
    by_language = {}
    for lang, (tuned, reported) in task.parts.items():
        mined = _mined(task.texts, unit.numpy(), tuned)
        least = threshold(*mined, len(tuned.gold))
        if reported is not tuned:
            mined = _mined(task.texts, unit.numpy(), reported)
        margins, right = mined
        chosen = margins >= least
        by_language[lang] = precision_recall_f1(
            int(right[chosen].sum()), int(chosen.sum()), len(reported.gold)
        )
    precision, recall, f1 = np.mean(list(by_language.values()), axis=0).tolist()
    return {
        "score": f1,
        "precision": precision,
        "recall": recall,
        "by_language": {lang: triple[2] for lang, triple in by_language.items()},
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
    """Return the first row of each distinct text, and whether no other row has it."""
    first: dict[str, int] = {}
    same = np.array([first.setdefault(text.strip(), row) for row, text in enumerate(texts)])
    rows, counts = np.unique(same, return_counts=True)
    return rows, counts == 1


def _in(pairs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Return bool [P], whether each pair is among the gold pairs."""
    return np.isin(pairs[:, 0] << 32 | pairs[:, 1], gold[:, 0] << 32 | gold[:, 1])


# ---- retrieval ----


def retrieval(
    scores_QK: np.ndarray,
    rows_QK: np.ndarray,
    judged: np.ndarray,
    order_N: np.ndarray,
    own_Q: np.ndarray | None = None,
) -> dict[str, float]:
    """Compute trec_eval's metrics, like BEIR and MTEB: of equal scores the document of the higher
    id comes first; nDCG has graded gains, other metrics count any relevance above 0; the mean is
    over all queries, of which one without a relevant document counts 0.

    Args:
        scores_QK, rows_QK: the nearest documents of each query, in any order.
        judged: int64 [judgements, 3] of query, document, relevance; a document may be N or above,
            which no search returns.
        order_N: each document's place among all, sorted by id.
        own_Q: for each query the document with its id, or -1; left out, like in BEIR.

    Returns:
        score = ndcg_at_10, recall_at_10, recall_at_100, map_at_100, mrr_at_10.
    """
    N = len(order_N)
    run: dict[str, dict[str, float]] = {}
    for query, (places, scores) in enumerate(
        zip(order_N[rows_QK].tolist(), scores_QK.tolist(), strict=True)
    ):
        run[str(query)] = dict(zip(map(_name, places), scores, strict=True))
        if own_Q is not None and own_Q[query] >= 0:
            run[str(query)].pop(_name(order_N[own_Q[query]]), None)
    judgements: dict[str, dict[str, int]] = {}
    for query, row, grade in judged.tolist():
        place = _name(order_N[row] if row < N else row)
        judgements.setdefault(str(query), {})[place] = grade
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, set(RETRIEVAL.values()))
    by_query = evaluator.evaluate(run)
    sums = {
        ours: sum(metrics[theirs] for metrics in by_query.values())
        for ours, theirs in RETRIEVAL.items()
    }
    # trec_eval has no cut of the reciprocal rank.
    ranks = (metrics["recip_rank"] for metrics in by_query.values())
    sums["mrr_at_10"] = sum(rank for rank in ranks if rank >= 1 / 10)
    result = {name: total / len(rows_QK) for name, total in sums.items()}
    return {"score": result["ndcg_at_10"], **result}


def _name(place: int) -> str:
    """Return a document's name for trec_eval; names sort like ids."""
    return f"{place:012}"


def precision_at_1(rows_Q: np.ndarray, answers: Sequence[str]) -> float:
    """Return the share of queries i whose nearest document is answer i, or has its text. The first
    documents are the answers, in order; all others belong to a pool.
    """
    first: dict[str, int] = {}
    same = np.array([first.setdefault(text, row) for row, text in enumerate(answers)])
    inside = rows_Q < len(answers)
    return float(np.mean(inside & (same[np.where(inside, rows_Q, 0)] == same)))
