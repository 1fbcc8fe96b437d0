"""Draw one step of texts and collate them into packed batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .packing import PackedBatch, pack, packs, shared_out

# ---- a step's texts ----


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch, and what it must know of the others'.

    Groups are a query, its positive and its hard negatives, and run to one depth. Queries and
    documents are each ordered deepest first; at one depth positives come before negatives.

    packs: this process's texts, queries and documents apart. place: int64 [texts], where each is in
    the packs one after the other: queries, then documents. target: int64 [queries], the positive of
    each among this process's documents.
    query_ids, query_depths: int64 [queries of all processes], process by process; doc_ids,
    doc_depths: the same of documents, doc_sizes of each process. A query has its positive's id, and
    texts of equal ids are never each other's negatives.
    owner: int64 [own documents], the query that each was drawn for, among this process's.
    negatives: int64 [own queries, K], places of a query's hard negatives among this process's
    documents, -1 where it has fewer than K, the most that one has here (0 where none has any). Left
    out are those of its id, but not for clustering and classification: there ids, which are equal
    for all that pairs link, may tie whole classes together, and negatives are of other classes.
    has_negatives: bool [queries of all processes], which have any.
    rows: int64 [own texts], the table's row of each, queries, then documents.
    task: which loss, one of `config.TASKS`. temperature: its, 0 for the run's.
    scores: fp32 [own queries], of the pairs, for task sts.
    texts, teacher_ND: the own texts and a teacher's vectors of them, fp32 [own texts, Dt], in the
    order of `rows`, for distillation.
    """

    packs: tuple[PackedBatch, ...]
    place: Tensor
    target: Tensor
    query_ids: Tensor
    query_depths: Tensor
    doc_ids: Tensor
    doc_depths: Tensor
    doc_sizes: tuple[int, ...]
    source: str
    owner: Tensor
    negatives: Tensor
    has_negatives: Tensor
    rows: Tensor
    task: str = "retrieval"
    temperature: float = 0.0
    scores: Tensor | None = None
    texts: tuple[str, ...] | None = None
    teacher_ND: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Of this process."""
        return sum(pack.plan.tokens for pack in self.packs)


def collate(
    groups: Sequence[Sequence[int]],
    text: Callable[[int], np.ndarray],
    ids: np.ndarray,
    depths: np.ndarray,
    runs_LN: np.ndarray | None,
    *,
    rank: int = 0,
    size: int = 1,
    max_tokens: int,
    source: str = "",
    task: str = "retrieval",
    temperature: float = 0.0,
    scores: np.ndarray | None = None,
) -> Batch:
    """Groups of rows to the packs of process `rank` of `size`. All processes see all groups.

    Args:
        groups: rows of each group: query, positive, hard negatives; a multiple of `size` of them.
        text: tokens of a row. ids: int64, by row.
        depths: int64 [groups], the last layer of each.
        runs_LN: bool [L, texts in the order of groups] as in `pack`.
        scores: [groups], of each query with its positive.

    Raises:
        ValueError: scores of another number than groups.
    """
    if scores is not None and len(scores) != len(groups):
        raise ValueError(
            f"scores: expected one for each of {len(groups)} groups, got {len(scores)}"
        )
    rows = np.array([row for group in groups for row in group])
    sizes = np.array([len(group) for group in groups])
    group_of = np.repeat(np.arange(len(groups)), sizes)
    first = np.cumsum(sizes) - sizes
    lengths = np.array([len(text(row)) for row in rows.tolist()], dtype=np.int64)
    of_groups = np.bincount(group_of, weights=lengths).astype(np.int64)
    shares = []  # of each process: its groups, and places in `rows` of its queries, its documents
    for mine in shared_out(of_groups, depths, size, len(groups) // size):
        mine = mine[np.argsort(-depths[mine], kind="stable")]
        others = [np.arange(first[g] + 2, first[g] + sizes[g]) for g in mine.tolist()]
        docs = np.concatenate([first[mine] + 1, *others])
        docs = docs[np.argsort(-depths[group_of[docs]], kind="stable")]
        shares.append((mine, first[mine], docs))
    own_packs, order = [], []
    mine, queries, docs = shares[rank]
    for begin, part in ((0, queries), (len(queries), docs)):
        part_depths = depths[group_of[part]]
        for some in packs(lengths[part], part_depths, max_tokens):
            at = part[some]
            here = None if runs_LN is None else runs_LN[:, at]
            own_packs.append(
                pack([text(row) for row in rows[at].tolist()], part_depths[some], here)
            )
            order.append(begin + some)
    all_groups, all_queries, all_docs = (np.concatenate(part) for part in zip(*shares, strict=True))
    query_of = np.zeros(len(groups), dtype=np.int64)
    query_of[mine] = np.arange(len(mine))
    owner = query_of[group_of[docs]]
    member = np.arange(len(rows)) - first[group_of]
    hard = member >= 2
    if task not in ("clustering", "classification"):
        hard &= ids[rows] != ids[rows[first[group_of]]]
    many = np.bincount(group_of, weights=hard)
    return Batch(
        tuple(own_packs),
        torch.from_numpy(np.argsort(np.concatenate(order))),
        torch.from_numpy(_lists(owner, member[docs] == 1, len(mine))[:, 0]),
        torch.from_numpy(ids[rows[all_queries]]),
        torch.from_numpy(depths[all_groups]),
        torch.from_numpy(ids[rows[all_docs]]),
        torch.from_numpy(depths[group_of[all_docs]]),
        tuple(len(part) for *_, part in shares),
        source,
        torch.from_numpy(owner),
        torch.from_numpy(_lists(owner, hard[docs], len(mine))),
        torch.from_numpy(many[all_groups] > 0),
        torch.from_numpy(rows[np.concatenate([queries, docs])]),
        task,
        temperature,
        None if scores is None else torch.from_numpy(np.asarray(scores, np.float32)[mine]),
    )


def _lists(owner: np.ndarray, which: np.ndarray, queries: int) -> np.ndarray:
    """Places of the documents `which` (bool), in order, by owner -> int64 [queries, K], -1 behind
    those that a query has."""
    places = np.flatnonzero(which)
    places = places[np.argsort(owner[places], kind="stable")]
    counts = np.bincount(owner[places], minlength=queries)
    lists = np.full((queries, int(counts.max(initial=0))), -1, dtype=np.int64)
    lists[np.arange(lists.shape[1]) < counts[:, None]] = places
    return lists
