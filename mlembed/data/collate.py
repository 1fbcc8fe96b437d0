"""Collate one step of texts into the packed batch of a process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime import transfer
from .packing import PackedBatch, even_packs, even_shares, pack


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch, and the ids and depths of all processes.

    A group is a query, its positive and its hard negatives, which run to one depth. Queries and
    documents are each ordered deepest first; at one depth positives come before negatives. Tensors
    are int64 unless stated.

    Of this process:
        packs: the texts, queries and documents together. place: [texts], the position of each text
            (queries, then documents) in the packs one after the other. rows: [texts], its row of
            the table.
        target: [queries], the positive of each query among the documents. owner: [documents], the
            query of each document.
        negatives: [queries, K], places of a query's hard negatives among the documents, then -1; K
            is the most that a query has. A negative with its query's id is left out, except for
            clustering and classification: there ids, equal for all that pairs link, may tie whole
            classes together, while negatives are of other classes.
        scores: fp32 [queries], of the pairs, for task sts.
        teacher_scores: fp32 [documents], a teacher's scores of the documents with their queries,
            NaN where a document has no score.
        texts, teacher_ND: for distillation, the texts in the order of `rows`, and a teacher's
            vectors of them, fp32 [texts, Dt].
    Of all processes, one after another:
        query_ids, query_depths: [all queries]. doc_ids, doc_depths: [all documents]. doc_sizes:
            documents of each process. A query has its positive's id, and texts of equal ids are
            never each other's negatives. has_negatives: bool [all queries].
        has_teacher_scores: bool [all queries], whether a query's positive and at least one of its
            negatives have scores of a teacher.
    source, task, temperature: the source's name, its loss, one of `config.TASKS`, and its
        temperature, 0 for the run's. A group of task SINGLE is two single texts, which only
        distillation compares.
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
    teacher_scores: Tensor | None = None
    has_teacher_scores: Tensor | None = None
    texts: tuple[str, ...] | None = None
    teacher_ND: Tensor | None = None
    _host: "Batch | None" = None

    @property
    def tokens(self) -> int:
        """Tokens of this process."""
        return sum(pack.plan.tokens for pack in self.packs)

    @property
    def host(self) -> "Batch":
        """The same batch on the host, whose numbers can be read without waiting."""
        return self._host or self

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, by one copy that the host does not wait for."""
        return self if device.type == "cpu" else replace(transfer.moved(self, device), _host=self)

    def pin_memory(self) -> "Batch":
        """Return the batch in one pinned buffer; a DataLoader calls it."""
        return transfer.pinned(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Each tensor that a worker sends is an open file, so it sends one.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _received, transfer.flattened(values)


def _received(buffer: Tensor, layout: dict[str, Any]) -> Batch:
    return Batch(**transfer.restored(buffer, layout))


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
    teacher_scores: np.ndarray | None = None,
) -> Batch:
    """Return the batch of process `rank` of `size`; all processes pass all groups.

    Args:
        groups: rows of each group: query, positive, hard negatives; a multiple of `size` groups.
        text: returns the tokens of a row. ids: int64, by row.
        depths: int64 [groups], the last layer of each.
        runs_LN: bool [L, texts in the order of groups] as in `pack`.
        scores: [groups], of each query with its positive.
        teacher_scores: fp32, a teacher's scores by row.

    Raises:
        ValueError: the number of scores is not the number of groups.
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
    # Of each process: its groups, and the places in `rows` of its queries and of its documents.
    shares = []
    for mine in even_shares(of_groups, depths, size, len(groups) // size):
        mine = mine[np.argsort(-depths[mine], kind="stable")]
        hard = [np.arange(first[g] + 2, first[g] + sizes[g]) for g in mine.tolist()]
        docs = np.concatenate([first[mine] + 1, *hard])
        docs = docs[np.argsort(-depths[group_of[docs]], kind="stable")]
        shares.append((mine, first[mine], docs))
    packs, order = [], []
    mine, queries, docs = shares[rank]
    texts = np.concatenate([queries, docs])
    text_depths = depths[group_of[texts]]
    for chosen in even_packs(lengths[texts], text_depths, max_tokens):
        at = texts[chosen]
        runs = None if runs_LN is None else runs_LN[:, at]
        packs.append(pack([text(row) for row in rows[at].tolist()], text_depths[chosen], runs))
        order.append(chosen)
    all_groups, all_queries, all_docs = (np.concatenate(part) for part in zip(*shares, strict=True))
    query_of = np.zeros(len(groups), dtype=np.int64)
    query_of[mine] = np.arange(len(mine))
    owner = query_of[group_of[docs]]
    member = np.arange(len(rows)) - first[group_of]
    is_hard = member >= 2
    if task not in ("clustering", "classification"):
        is_hard &= ids[rows] != ids[rows[first[group_of]]]
    hard_counts = np.bincount(group_of, weights=is_hard)
    has_teacher_scores = None
    if teacher_scores is not None:
        known = np.isfinite(teacher_scores[rows])
        of_hard = np.bincount(group_of, weights=is_hard & known) > 0
        has_teacher_scores = torch.from_numpy((known[first + 1] & of_hard)[all_groups])
    return Batch(
        packs=tuple(packs),
        place=torch.from_numpy(np.argsort(np.concatenate(order))),
        target=torch.from_numpy(_lists(owner, member[docs] == 1, len(mine))[:, 0]),
        query_ids=torch.from_numpy(ids[rows[all_queries]]),
        query_depths=torch.from_numpy(depths[all_groups]),
        doc_ids=torch.from_numpy(ids[rows[all_docs]]),
        doc_depths=torch.from_numpy(depths[group_of[all_docs]]),
        doc_sizes=tuple(len(part) for *_, part in shares),
        source=source,
        owner=torch.from_numpy(owner),
        negatives=torch.from_numpy(_lists(owner, is_hard[docs], len(mine))),
        has_negatives=torch.from_numpy(hard_counts[all_groups] > 0),
        rows=torch.from_numpy(rows[texts]),
        task=task,
        temperature=temperature,
        scores=None if scores is None else torch.from_numpy(np.asarray(scores, np.float32)[mine]),
        teacher_scores=None
        if teacher_scores is None
        else torch.from_numpy(teacher_scores[rows[docs]]),
        has_teacher_scores=has_teacher_scores,
    )


def _lists(owner: np.ndarray, chosen: np.ndarray, queries: int) -> np.ndarray:
    """Return places of the documents `chosen` (bool), in order, by owner: int64 [queries, K], with
    -1 after a query's last document.
    """
    places = np.flatnonzero(chosen)
    places = places[np.argsort(owner[places], kind="stable")]
    counts = np.bincount(owner[places], minlength=queries)
    lists = np.full((queries, int(counts.max(initial=0))), -1, dtype=np.int64)
    lists[np.arange(lists.shape[1]) < counts[:, None]] = places
    return lists
