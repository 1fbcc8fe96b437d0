"""Contrastive loss over every exit and every prefix, without the logits.

For exit e, prefix width d and temperature t, with cosines of *truncated* vectors, query i's
positive t(i) and margin a,

    z_i = (cos(q_i, c_t(i)) - a) / t
    loss_ed = mean_i  log( k exp(z_i) + N_i ) - z_i

N_i is the sum of exp(cos / t) over query i's negatives, and the mean is over the queries with a
positive. `directions` choose the negatives:

    query_to_doc    q_i with c_j,            j != t(i)
    doc_to_query    c_t(i) with q_k,         t(k) != t(i)
    query_to_query  q_i with q_k,            k != i
    doc_to_doc      c_t(i) with c_j,         j != t(i), owner(j) != i

and each query's own `negatives`. Joint: one sum N_i over all directions, with k = 1, or k = 2 as in
formula and port of GTE's improved contrastive loss (arXiv 2308.03281, section 3.2), whose sums over
query_to_doc and doc_to_query both contain the positive. Per direction: one loss for each direction,
averaged (symmetric InfoNCE). The margin is LaBSE's additive one (2007.01852); prefixes are those of
MRL (2205.13147) and, with exits, of ML-Embed (2605.15081).

The sums exclude false negatives: pairs with equal ids, and, given `false_negative_margin` b, texts
that are closer to query i (or to its positive, where that is the anchor) than cos(q_i, c_t(i)) + b
(Qwen3-Embedding, 2506.05176). The deepest exit at which the texts are present decides, at its full
width, for all exits and prefixes; no gradient flows through the decision.

With log N the log-sum-exp from `pairwise_lse`, the loss is softplus(log N - z): its slope in z is
-sigmoid(log N - z), never a difference of two rounded numbers. This file is plain PyTorch over
[E, M, Q]; pairwise_lse.py has all that is quadratic in the batch, with its FLOPs and bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import check_impl, reference_of
from . import _checks
from ._mask import present
from .cosine import cosine
from .pairwise_lse import NOTHING, WORKSPACE, pairwise_lse

OF_ONE_SIDE = {"query_to_query", "doc_to_doc"}  # directions that compare a row with its own number


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
    """Return loss_EM [E, M], InfoNCE at every exit and prefix (fp32; float64 for float64 inputs).

    Two calls give the same bits. The host does not wait for the device.

    Args:
        q: [E, Q, D] raw (not normalised) query vectors of each exit; fp16, bf16, fp32, fp64.
        c: [E, C, D] candidates: positives, other queries' positives, hard negatives; or several
            such pieces (from other ranks, a memory bank), whose C add up: the loss is that of
            their concatenation, computed one piece at a time.
        dims: prefix widths, rising, the last at most D.
        temperature: t above, positive: a number, or a tensor that expands to [E, M] (learnable).
        target: int [Q], the column of each query's positive; -1 = none, and the loss ignores the
            row. By default row i's positive is column i.
        negatives: [E, Q, K, D] hard negatives that only their own query sees; they join its sum of
            query_to_doc. With directions=() they are the only negatives.
        negatives_mask: bool [Q, K], False where a query has fewer than K.
        directions: any of the four above, named as in sentence-transformers.
        partition_mode: "joint", or "per_direction" (query_to_doc and doc_to_query only: the others
            do not contain the positive).
        count_positive_twice: k = 2 (joint, with query_to_doc and doc_to_query).
        margin: a above, a cosine.
        query_ids, cand_ids: int [Q], int [C], both or neither: equal ids are never negatives.
        owner: int [C], the query that each candidate was drawn for, -1 = none; doc_to_doc excludes
            candidates with the query as owner.
        false_negative_margin: b above, a cosine; None excludes none.
        query_counts, cand_counts: int [E], on the vectors' device: how many leading rows are
            present at exit e; the others have left (deepest first). Pieces: one tensor each.
        workspace: bytes that matrices of pairs may take at any time.
        impl: "triton" (CUDA; fp16, bf16, fp32), "reference"; "auto" is triton where it can run.

    Raises:
        ValueError: an argument that is not as described.
    """
    check_impl(impl)
    pieces = [c] if isinstance(c, Tensor) else list(c)
    _checks.check_vectors(q, pieces, dims, negatives, negatives_mask, impl)
    _checks.check_objective(directions, partition_mode, count_positive_twice, negatives is not None)
    E, Q, _ = q.shape
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.shape[1])
    C, device = starts[-1], q.device
    if (query_ids is None) != (cand_ids is None):
        raise ValueError("query_ids, cand_ids: expected both or neither, got one")
    _checks.check_integers(Q, device, target=target, query_ids=query_ids)
    _checks.check_integers(C, device, cand_ids=cand_ids, owner=owner)
    _checks.check_integers(E, device, query_counts=query_counts)
    counts = _checks.piece_counts(cand_counts, len(pieces))
    for count in counts:
        _checks.check_integers(E, device, cand_counts=count)
    _checks.check_targets(Q, C, target)
    scale_EM = _checks.scale_of(temperature, q, E, len(dims))
    # Without targets or counts every query has a positive, and nothing needs to look.
    always = target is None and query_counts is None and not any(x is not None for x in counts)
    target = torch.arange(Q, device=q.device) if target is None else target
    common = {"dims": dims, "scale": scale_EM, "workspace": workspace, "impl": impl}
    pairs = _Pairs(
        q, pieces, starts, target, query_ids, cand_ids, owner, query_counts, counts, common
    )
    has_positive = None if always else pairs.has_positive()
    ceiling = None
    if false_negative_margin is not None:
        with torch.no_grad():
            cos_EQ = cosine(q, pairs.anchors()[:, :, None], dims=dims[-1:], impl=impl)[:, 0, :, 0]
            ceiling = cos_EQ + false_negative_margin
            if has_positive is not None:
                ceiling = ceiling.masked_fill(~has_positive, torch.inf)
    parts, cos_EMQ = _log_sums(pairs, directions, ceiling)
    if negatives is not None:
        cos_EMQK = cosine(q, negatives, dims=dims, impl=impl)
        valid = _valid_negatives(cos_EMQK[:, -1], negatives_mask, ceiling)
        z_EMQK = (cos_EMQK * scale_EM[..., None, None]).masked_fill(~valid, NOTHING)
        parts.setdefault("query_to_doc", []).append(z_EMQK.logsumexp(-1))
    z_EMQ = (cos_EMQ - margin if margin else cos_EMQ) * scale_EM[..., None]
    return _loss(parts, z_EMQ, has_positive, partition_mode, count_positive_twice)


infonce_ref = reference_of(infonce)


@dataclass(frozen=True)
class _Pairs:
    """Queries, candidates in pieces, and the ids that tell which text belongs to which."""

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
        """Return ids of the positives, any number for a missing one."""
        if self.cand_ids is None or not len(self.cand_ids):
            return () if self.cand_ids is None else (self.target,)
        return (self.cand_ids[self.target.clamp(0, len(self.cand_ids) - 1)],)

    def columns(self, k: int) -> Tensor:
        """Return the columns of piece k that the positives would be, int [Q]."""
        return self.target - self.starts[k] if k else self.target

    def located(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether piece k has each query's positive, [Q] and by exit [E, Q], and where."""
        E, n, _ = self.pieces[k].shape
        at = self.columns(k).clamp(0, max(n - 1, 0))
        inside = (self.target >= self.starts[k]) & (self.target < self.starts[k + 1])
        if not n or self.counts[k] is None:
            return inside, inside.expand(E, -1), at
        return inside, inside & present(self.counts[k], E, n, self.q.device)[:, at], at

    def has_positive(self) -> Tensor:
        """bool [E, Q]: whether query and positive are both present."""
        q_in = present(self.query_counts, self.q.shape[0], self.q.shape[1], self.q.device)
        c_in = torch.zeros_like(q_in)
        for k in range(len(self.pieces)):
            c_in |= self.located(k)[1]
        return q_in & c_in

    def anchors(self) -> Tensor:
        """Return the positives [E, Q, D], zeros for queries without one."""
        anchors = torch.zeros_like(self.q)
        for k, piece in enumerate(self.pieces):
            if piece.shape[1]:
                _, inside, at = self.located(k)
                anchors = torch.where(inside[..., None], piece[:, at], anchors)
        return anchors


def _log_sums(
    pairs: _Pairs, directions: tuple[str, ...], ceiling: Tensor | None
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Return log-sum-exps [E, M, Q] by direction, and the positives' cosines [E, M, Q]."""
    q, target, dims = pairs.q, pairs.target, pairs.common["dims"]
    common = {"row_counts": pairs.query_counts, "ceiling": ceiling, **pairs.common}
    parts: dict[str, list[Tensor]] = {name: [] for name in directions}
    # Without ceilings, which belong to anchors, one pass over the pairs serves both directions.
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
    rows = torch.arange(q.shape[1], device=q.device) if {*directions} & OF_ONE_SIDE else target
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
    """Return rows of queries with each piece, the positives' columns, the positives' cosines."""
    forward, backward, cos_EMQ = [], None, None
    for k, piece in enumerate(pairs.pieces):
        rows_EMQ, cols_EMC, part_EMQ = pairwise_lse(
            pairs.q,
            piece,
            positive=pairs.columns(k),
            row_keys=pairs.of_query(),
            col_keys=pairs.of_piece(pairs.cand_ids, k),
            col_counts=pairs.counts[k],
            columns=columns,
            **common,
        )
        assert part_EMQ is not None
        forward.append(rows_EMQ)
        cos_EMQ = part_EMQ if cos_EMQ is None else cos_EMQ + part_EMQ
        if cols_EMC is not None and piece.shape[1]:
            inside, _, at = pairs.located(k)
            old = torch.full_like(rows_EMQ, -torch.inf) if backward is None else backward
            backward = torch.where(inside, cols_EMC[:, :, at], old)
    assert cos_EMQ is not None
    if columns and backward is None:
        backward = torch.full_like(cos_EMQ, -torch.inf)
    return forward, [] if backward is None else [backward], cos_EMQ


def _valid_negatives(cos_EQK: Tensor, mask: Tensor | None, ceiling: Tensor | None) -> Tensor:
    """bool [Q, K]: whether own negatives exist and are unlikely to be false negatives."""
    valid = torch.ones_like(cos_EQK[0], dtype=torch.bool) if mask is None else mask
    if ceiling is None:
        return valid
    similar = torch.zeros_like(valid)
    for cos_QK, highest in zip(cos_EQK, ceiling[..., None], strict=True):  # The deepest decides.
        similar = torch.where(highest < torch.inf, cos_QK > highest, similar)
    return valid & ~similar


def softmax_loss(parts: Sequence[Tensor], z_EMQ: Tensor, times: float = 1.0) -> Tensor:
    """Return log(k exp(z) + N) - z [E, M, Q] of positives' logits z, log N given in parts.

    It is log k + softplus(log N - z - log k), which subtracts no two rounded numbers if N << z.
    An empty part is -inf. times: k, how often the sum contains the positive.
    """
    log_N = parts[0].clamp(min=NOTHING)
    if len(parts) > 1:
        log_N = torch.stack(list(parts)).clamp(min=NOTHING).logsumexp(0)
    if times == 1:
        return -F.logsigmoid(z_EMQ - log_N)
    log_k = math.log(times)
    return log_k - F.logsigmoid(z_EMQ + log_k - log_N)


def _loss(
    parts: dict[str, list[Tensor]],
    z_EMQ: Tensor,
    has_positive: Tensor | None,
    partition_mode: str,
    count_positive_twice: bool,
) -> Tensor:
    """Return the mean over directions of the mean over the queries with a positive, [E, M].

    has_positive: bool [E, Q], None: all.
    """
    groups = list(parts.values())
    if partition_mode == "joint":
        groups = [[part for group in groups for part in group]]
    times = 2.0 if count_positive_twice else 1.0
    losses = [softmax_loss(group, z_EMQ, times) for group in groups]
    loss_EMQ = losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)
    if has_positive is None:
        return loss_EMQ.sum(-1) / max(loss_EMQ.shape[-1], 1)
    loss_EMQ = loss_EMQ.where(has_positive[:, None], 0.0)
    return loss_EMQ.sum(-1) / has_positive.sum(-1).clamp(min=1)[:, None]
