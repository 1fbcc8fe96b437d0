"""Token lists to packed batches: flat rows of tokens and the boundaries between texts.

A pack is ordered by the depth that its texts run to, deepest first, and by length: those that are
there at a layer are a prefix of it, so leaving costs nothing and copies nothing. A step's queries
and documents have packs of their own, each with as much to do as the others.

Letters: N texts, T packed tokens, L layers.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlembed_kernels import Occurrences, Work


@dataclass(frozen=True)
class Kept:
    """Those that run through a layer which others skip (LayerSkip's dropout): no prefix.

    rows_T: int64, their tokens' rows. work: what attention has to compute among them.
    """

    rows_T: Tensor
    work: Work


@dataclass(frozen=True)
class PackedBatch:
    """N texts end to end, without padding, deepest first.

    ids_T: int64 [T] tokens. pos_T: int64 [T] position of each token in its own text.
    occurrences: where each distinct token is, listed on the host once.
    live: (depth, work) by rising depth: up to that layer attention has that work, of a prefix of
    the texts. kept: of layers that some of these skip, by depth.
    """

    ids_T: Tensor
    pos_T: Tensor
    occurrences: Occurrences
    live: tuple[tuple[float, Work], ...]
    kept: dict[int, Kept]

    @property
    def work(self) -> Work:
        """Of all texts."""
        return self.live[0][1]

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [N + 1]; text i is ids_T[cu_seqlens[i]:cu_seqlens[i + 1]]."""
        return self.work.cu_seqlens

    def work_at(self, depth: int) -> Work | None:
        """Of the texts that run through layer `depth` (1..), if any do."""
        return next((work for until, work in self.live if depth <= until), None)

    def __len__(self) -> int:
        return self.work.sequences

    def to(self, device: torch.device) -> "PackedBatch":
        kept = {
            depth: Kept(some.rows_T.to(device, non_blocking=True), some.work.to(device))
            for depth, some in self.kept.items()
        }
        return replace(
            self,
            ids_T=self.ids_T.to(device, non_blocking=True),
            pos_T=self.pos_T.to(device, non_blocking=True),
            occurrences=self.occurrences.to(device),
            live=tuple((until, work.to(device)) for until, work in self.live),
            kept=kept,
        )


def pack(
    texts: Sequence[np.ndarray],
    depths: np.ndarray | None = None,
    runs_LN: np.ndarray | None = None,
) -> PackedBatch:
    """int arrays, one a text, each of at least one token -> PackedBatch.

    Args:
        depths: int [N], the last layer of each text, falling; by default all run as far as there
            are layers.
        runs_LN: bool [L, N], False where a text skips a layer; all run through it by default. Where
            all would skip one, the first does not: gradients and reductions expect every layer.

    Raises:
        ValueError: no texts, a text without tokens (there would be nothing to pool), depths that
            rise or begin below 1.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() < 1:
        raise ValueError(
            f"texts: expected one or more, each of one or more tokens, got lengths {lengths[:20]}"
        )
    bounds = np.concatenate([[0], lengths.cumsum()])
    live: list[tuple[float, Work]] = [(np.inf, Work.of(torch.from_numpy(bounds)))]
    if depths is not None:
        if len(depths) != len(lengths) or (np.diff(depths) > 0).any() or depths[-1] < 1:
            raise ValueError(f"depths: expected one a text, falling, from 1 on, got {depths[:20]}")
        live = [(int(until), live[0][1]) for until in depths[-1:]]
        for until in np.unique(depths)[1:]:
            there = int((depths >= until).sum())
            live.append((int(until), Work.of(torch.from_numpy(bounds[: there + 1]))))
    ids = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    positions = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths))
    packed = PackedBatch(ids, positions, Occurrences.of(ids), tuple(live), {})
    if runs_LN is None:
        return packed
    return replace(packed, kept=_kept(packed, lengths, runs_LN))


def _kept(batch: PackedBatch, lengths: np.ndarray, runs_LN: np.ndarray) -> dict[int, Kept]:
    kept = {}
    for depth, runs_N in enumerate(runs_LN, 1):
        work = batch.work_at(depth)
        if work is None:
            break
        runs_N = runs_N[: work.sequences].copy()
        runs_N[0] |= not runs_N.any()
        if runs_N.all():
            continue
        bounds = np.concatenate([[0], lengths[: len(runs_N)][runs_N].cumsum()])
        rows = np.flatnonzero(np.repeat(runs_N, lengths[: len(runs_N)]))
        kept[depth] = Kept(torch.from_numpy(rows), Work.of(torch.from_numpy(bounds)))
    return kept


# ---- how texts are shared out ----


def budgeted(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row numbers in packs of at most `max_tokens` tokens (a longer text is a pack of its own).

    Rows are sorted by length, so that texts of a pack are alike and attention wastes nothing.
    """
    order = np.argsort(lengths, kind="stable")
    packs, begin, tokens = [], 0, 0
    for at, row in enumerate(order):
        if at > begin and tokens + lengths[row] > max_tokens:
            packs.append(order[begin:at])
            begin, tokens = at, 0
        tokens += int(lengths[row])
    return [*packs, order[begin:]] if len(order) else []


def shared_out(
    lengths: np.ndarray, depths: np.ndarray, shares: int, most: int | None = None
) -> list[np.ndarray]:
    """Row numbers, rising, in shares with as many tokens, at every depth.

    Deepest first and then longest first, each row goes to the share that has fewest tokens yet and
    fewer than `most` rows (LPT): once all of a depth and deeper are given out, shares are even
    there. So `shares` rows of the deepest are on as many shares.
    """
    if shares == 1:
        return [np.arange(len(lengths))]
    parts: list[list[int]] = [[] for _ in range(shares)]
    open_shares = [(0, share) for share in range(shares)]
    for row in np.lexsort((-lengths, -depths)).tolist():
        total, share = heapq.heappop(open_shares)
        parts[share].append(row)
        if most is None or len(parts[share]) < most:
            heapq.heappush(open_shares, (total + int(lengths[row]), share))
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def packs(lengths: np.ndarray, depths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row numbers in as few packs of at most `max_tokens` tokens as hold them (a longer text is
    alone), alike in work, each deepest first, then shortest first."""
    found = [np.array([row]) for row in np.flatnonzero(lengths > max_tokens)]
    rest = np.flatnonzero(lengths <= max_tokens)
    count = -(-int(lengths[rest].sum()) // max_tokens)
    while len(rest):
        # Long texts that leave early come last, and may not fit any more: then depths do not count.
        for order in (depths[rest], np.zeros(len(rest))):
            parts = [rest[part] for part in shared_out(lengths[rest], order, count)]
            if all(lengths[part].sum() <= max_tokens for part in parts):
                sort = (np.lexsort((lengths[part], -depths[part])) for part in parts)
                return found + [part[at] for part, at in zip(parts, sort, strict=True)]
        count += 1
    return found


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
        return sum(pack.work.tokens for pack in self.packs)


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
