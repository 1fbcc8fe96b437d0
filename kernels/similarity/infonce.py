"""Contrastive loss over every exit and every prefix, without the logits.

For exit e, prefix width d and temperature t, with cosines of *truncated* vectors, query i's
positive t(i) and margin a,

    z_i = (cos(q_i, c_t(i)) - a) / t
    loss_ed = mean_i  log( k exp(z_i) + N_i ) - z_i

N_i the sum of exp(cos / t) over query i's negatives, the mean over the queries with a positive.
Which negatives, by `directions`:

    query_to_doc    q_i with c_j,            j != t(i)
    doc_to_query    c_t(i) with q_k,         t(k) != t(i)
    query_to_query  q_i with q_k,            k != i
    doc_to_doc      c_t(i) with c_j,         j != t(i), owner(j) != i

and `negatives`, seen by their own query only. Joint: one partition N_i for all, k = 1, or k = 2 as
formula and port of GTE's improved contrastive loss (arXiv 2308.03281, section 3.2) have it, whose
sums over query_to_doc and doc_to_query both contain the positive. Per direction: one loss for each
direction, averaged (symmetric InfoNCE). The margin is LaBSE's additive one (2007.01852); prefixes
as in MRL (2205.13147) and, with exits, ML-Embed (2605.15081).

False negatives are left out: pairs with equal ids, and, given `false_negative_margin` b, texts that
are closer to query i (or to its positive, where that is the anchor) than cos(q_i, c_t(i)) + b
(Qwen3-Embedding, 2506.05176). What is left out is decided once, by the deepest exit at which the
texts are present at its full width, for all exits and prefixes; no gradient flows through it.

With N the log-partition from `pairwise_lse`, the loss is softplus(log N - z): its slope in z is
-sigmoid(log N - z), never a difference of two rounded numbers. This file is plain PyTorch over
[E, M, Q]; what is quadratic in the batch is in pairwise_lse.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import check_impl
from ._checks import check_indices, check_objective, check_vectors, scale_of
from .cosine import cosine
from .pairwise_lse import NOTHING, WORKSPACE, pairwise_lse, present


def infonce_ref(
    q: Tensor,
    c: Tensor | Sequence[Tensor],
    *,
    dims: tuple[int, ...],
    temperature: float | Tensor = 0.05,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    count_positive_twice: bool = False,
    margin: float = 0.0,
    query_ids: Tensor | None = None,
    cand_ids: Tensor | None = None,
    owner: Tensor | None = None,
    false_negative_margin: float | None = None,
    query_counts: Tensor | None = None,
    cand_counts: Tensor | Sequence[Tensor] | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """The specification: `infonce` over the references of `pairwise_lse` and `cosine`."""
    return infonce(**locals(), impl="reference")


def infonce(
    q: Tensor,
    c: Tensor | Sequence[Tensor],
    *,
    dims: tuple[int, ...],
    temperature: float | Tensor = 0.05,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    count_positive_twice: bool = False,
    margin: float = 0.0,
    query_ids: Tensor | None = None,
    cand_ids: Tensor | None = None,
    owner: Tensor | None = None,
    false_negative_margin: float | None = None,
    query_counts: Tensor | None = None,
    cand_counts: Tensor | Sequence[Tensor] | None = None,
    workspace: int = WORKSPACE,
    impl: str = "auto",
) -> Tensor:
    """InfoNCE at every exit and prefix -> loss_EM [E, M] (fp32; float64 for float64 inputs).

    Args:
        q: [E, Q, D] raw (not normalised) query vectors, one slab per exit; fp16, bf16, fp32, fp64.
        c: [E, C, D] candidates: positives, other queries' positives, hard negatives; or several
            such pieces (from other ranks, a memory bank), whose C add up: the loss is that of
            their concatenation, and only one piece at a time is worked on.
        dims: prefix widths, rising, the last at most D.
        temperature: t above, positive: a number, or a tensor that expands to [E, M] (learnable).
        target: int [Q], the column of each query's positive; -1 = none, the row counts for nothing.
            By default row i's positive is column i.
        negatives: [E, Q, K, D] hard negatives that only their own query sees; they join its
            query_to_doc partition. With directions=() they are the only negatives.
        negatives_mask: bool [Q, K], False where a query has fewer than K.
        directions: any of the four above, named as in sentence-transformers.
        partition_mode: "joint", or "per_direction" (query_to_doc and doc_to_query only: the others
            do not contain the positive).
        count_positive_twice: k = 2 (joint, with query_to_doc and doc_to_query).
        margin: a above, a cosine.
        query_ids, cand_ids: int [Q], int [C], both or neither: equal ids are never negatives.
        owner: int [C], the query that each candidate was drawn for, -1 = none; doc_to_doc leaves
            out candidates of one owner.
        false_negative_margin: b above, a cosine; None keeps all.
        query_counts, cand_counts: int [E], on the vectors' device: only so many leading rows are
            present at exit e, the others have left (deepest first). Pieces: one tensor each.
        workspace: bytes that matrices of pairs may take at any time.
        impl: "triton" (CUDA; fp16, bf16, fp32), "reference"; "auto" is triton where it can be.

    Two calls give the same bits. Nothing waits for the device.

    Raises:
        ValueError: any argument other than the above.
    """
    check_impl(impl)
    pieces = [c] if isinstance(c, Tensor) else list(c)
    check_vectors(q, pieces, dims, negatives, negatives_mask, impl)
    check_objective(directions, partition_mode, count_positive_twice, negatives is not None)
    E, Q, _ = q.shape
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.shape[1])
    ids = query_ids, cand_ids
    counts = check_indices(E, Q, starts, target, ids, owner, query_counts, cand_counts, q.device)
    scale_EM = scale_of(temperature, q, E, len(dims))
    pairs = _Pairs(
        q,
        pieces,
        starts,
        torch.arange(Q, device=q.device) if target is None else target,
        query_ids,
        cand_ids,
        owner,
        query_counts,
        counts,
        {"dims": dims, "scale": scale_EM, "workspace": workspace, "impl": impl},
    )
    has_positive = pairs.has_positive()
    ceiling = None
    if false_negative_margin is not None:
        with torch.no_grad():
            own = cosine(q, pairs.anchors()[:, :, None], dims=dims[-1:], impl=impl)[:, 0, :, 0]
            ceiling = (own + false_negative_margin).masked_fill(~has_positive, torch.inf)
    parts, cos_EMQ = _partitions(pairs, directions, ceiling)
    if negatives is not None:
        cos_EMQK = cosine(q, negatives, dims=dims, impl=impl)
        keep = _kept(cos_EMQK[:, -1], negatives_mask, ceiling)
        z_EMQK = (cos_EMQK * scale_EM[..., None, None]).masked_fill(~keep, NOTHING)
        parts.setdefault("query_to_doc", []).append(z_EMQK.logsumexp(-1))
    z_EMQ = (cos_EMQ - margin) * scale_EM[..., None]
    return _loss(parts, z_EMQ, has_positive, partition_mode, count_positive_twice)


@dataclass(frozen=True)
class _Pairs:
    """Queries, candidates in pieces, and what tells whose positive is whose."""

    q: Tensor
    pieces: list[Tensor]
    starts: list[int]
    target: Tensor
    query_ids: Tensor | None
    cand_ids: Tensor | None
    owner: Tensor | None
    query_counts: Tensor | None
    counts: list[Tensor | None]
    common: dict[str, Any]

    def of_piece(self, values: Tensor | None, k: int) -> tuple[Tensor, ...]:
        return () if values is None else (values[self.starts[k] : self.starts[k + 1]],)

    def of_query(self) -> tuple[Tensor, ...]:
        return () if self.query_ids is None else (self.query_ids,)

    def of_target(self) -> tuple[Tensor, ...]:
        """Ids of the positives; what stands for a missing one does not matter."""
        if self.cand_ids is None or not len(self.cand_ids):
            return () if self.cand_ids is None else (self.target,)
        return (self.cand_ids[self.target.clamp(0, len(self.cand_ids) - 1)],)

    def located(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each query: is its positive in piece k, [Q] and at each exit [E, Q], and where."""
        E, n, _ = self.pieces[k].shape
        at = (self.target - self.starts[k]).clamp(0, max(n - 1, 0))
        here = (self.target >= self.starts[k]) & (self.target < self.starts[k + 1])
        if not n:
            return here, here.expand(E, -1), at
        return here, here & present(self.counts[k], E, n, self.q.device)[:, at], at

    def has_positive(self) -> Tensor:
        """bool [E, Q]: query and positive are both present."""
        there = present(self.query_counts, self.q.shape[0], self.q.shape[1], self.q.device)
        inside = torch.zeros_like(there)
        for k in range(len(self.pieces)):
            inside |= self.located(k)[1]
        return there & inside

    def anchors(self) -> Tensor:
        """The positives [E, Q, D], zeros where there is none."""
        anchors = torch.zeros_like(self.q)
        for k, piece in enumerate(self.pieces):
            if piece.shape[1]:
                _, there, at = self.located(k)
                anchors = torch.where(there[..., None], piece[:, at], anchors)
        return anchors


def _partitions(
    pairs: _Pairs, directions: tuple[str, ...], ceiling: Tensor | None
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Log-partitions [E, M, Q] by direction, and the positives' cosines [E, M, Q]."""
    q, target, dims = pairs.q, pairs.target, pairs.common["dims"]
    rows = torch.arange(q.shape[1], device=q.device)
    common = {"row_counts": pairs.query_counts, "ceiling": ceiling, **pairs.common}
    parts: dict[str, list[Tensor]] = {name: [] for name in directions}
    # Without ceilings, which go with the anchor, one pass over the pairs serves both directions.
    both = "doc_to_query" in directions and ceiling is None
    cos_EMQ = None
    if both or "query_to_doc" in directions:
        docs = _query_doc(pairs, both, common)
        cos_EMQ = docs[2]
        parts |= {"query_to_doc": docs[0]} if "query_to_doc" in directions else {}
        parts |= {"doc_to_query": docs[1]} if both else {}
    anchors = q
    if cos_EMQ is None or "doc_to_doc" in directions or ("doc_to_query" in directions and not both):
        anchors = pairs.anchors()
    if cos_EMQ is None:
        cos_EMQ = cosine(q, anchors[:, :, None], dims=dims, impl=common["impl"])[..., 0]
    if "doc_to_query" in directions and not both:
        keys = (target, *pairs.of_target()), (target, *pairs.of_query())
        parts["doc_to_query"] = [_rows(anchors, q, keys, pairs.query_counts, common)]
    if "query_to_query" in directions:
        keys = (rows, *pairs.of_query()), (rows, *pairs.of_query())
        parts["query_to_query"] = [_rows(q, q, keys, pairs.query_counts, common)]
    if "doc_to_doc" in directions:
        for k, piece in enumerate(pairs.pieces):
            columns = torch.arange(pairs.starts[k], pairs.starts[k + 1], device=q.device)
            owner = pairs.of_piece(pairs.owner, k)
            row_keys = (target, *(rows for _ in owner), *pairs.of_target())
            keys = row_keys, (columns, *owner, *pairs.of_piece(pairs.cand_ids, k))
            parts["doc_to_doc"].append(_rows(anchors, piece, keys, pairs.counts[k], common))
    return parts, cos_EMQ


def _rows(
    x: Tensor,
    y: Tensor,
    keys: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    col_counts: Tensor | None,
    common: dict[str, Any],
) -> Tensor:
    row_keys, col_keys = keys
    return pairwise_lse(
        x, y, row_keys=row_keys, col_keys=col_keys, col_counts=col_counts, **common
    )[0]


def _query_doc(
    pairs: _Pairs, columns: bool, common: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of queries against each piece: rows, the positives' columns, the positives' cosines."""
    forward, backward, cos_EMQ = [], None, None
    for k, piece in enumerate(pairs.pieces):
        rows_EMQ, cols_EMC, own_EMQ = pairwise_lse(
            pairs.q,
            piece,
            positive=pairs.target - pairs.starts[k],
            row_keys=pairs.of_query(),
            col_keys=pairs.of_piece(pairs.cand_ids, k),
            col_counts=pairs.counts[k],
            columns=columns,
            **common,
        )
        assert own_EMQ is not None
        forward.append(rows_EMQ)
        cos_EMQ = own_EMQ if cos_EMQ is None else cos_EMQ + own_EMQ
        if cols_EMC is not None and piece.shape[1]:
            here, _, at = pairs.located(k)
            old = torch.full_like(rows_EMQ, -torch.inf) if backward is None else backward
            backward = torch.where(here, cols_EMC[:, :, at], old)
    assert cos_EMQ is not None
    if backward is None:
        backward = torch.full_like(cos_EMQ, -torch.inf)
    return forward, [backward], cos_EMQ


def _kept(cos_EQK: Tensor, mask: Tensor | None, ceiling: Tensor | None) -> Tensor:
    """bool [Q, K]: own negatives that exist and are no likely false negatives."""
    keep = torch.ones_like(cos_EQK[0], dtype=torch.bool) if mask is None else mask
    if ceiling is None:
        return keep
    similar = torch.zeros_like(keep)
    for cos_QK, highest in zip(cos_EQK, ceiling[..., None], strict=True):  # the deepest decides
        similar = torch.where(highest < torch.inf, cos_QK > highest, similar)
    return keep & ~similar


def softmax_loss(parts: Sequence[Tensor], z_EMQ: Tensor, times: float = 1.0) -> Tensor:
    """log(k exp(z) + N) - z [E, M, Q] of positives' logits z and log-partitions log N in parts.

    That is log k + softplus(log N - z - log k), which subtracts no two rounded numbers in N << z.
    A part of no pairs is -inf. times: k, how often the sum contains the positive.
    """
    log_N = torch.stack(list(parts)).clamp(min=NOTHING).logsumexp(0)
    log_k = math.log(times)
    return log_k - F.logsigmoid(z_EMQ + log_k - log_N)


def _loss(
    parts: dict[str, list[Tensor]],
    z_EMQ: Tensor,
    has_positive: Tensor,
    partition_mode: str,
    count_positive_twice: bool,
) -> Tensor:
    """The mean over directions of the mean over the queries with a positive, [E, M]."""
    groups = list(parts.values())
    if partition_mode == "joint":
        groups = [[part for group in groups for part in group]]
    times = 2.0 if count_positive_twice else 1.0
    losses = [softmax_loss(group, z_EMQ, times) for group in groups]
    loss_EMQ = torch.stack(losses).mean(0).where(has_positive[:, None], 0.0)
    return loss_EMQ.sum(-1) / has_positive.sum(-1).clamp(min=1)[:, None]
