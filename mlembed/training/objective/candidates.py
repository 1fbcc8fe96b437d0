"""Sources of a query's candidates, and the log-sum-exps over them that a softmax needs.

    in batch   documents of all processes; with a symmetric loss each document's candidates are the
               queries of all processes
    joint      GTE's one softmax over both, pairs of queries and pairs of documents
    bank       documents of earlier batches, which get no gradient

`gather` brings all processes' texts at once. In a ring each process passes the shard of documents
that it has worked with on to the next one and receives that of the one before: after `size` rounds
all queries have met all documents, and no process has held more than its own shard and two others.
Sums by document, columns in forward and gradients in backward, travel one hop behind their shard,
grow on every process and arrive at its owner after the last round.

Log-sum-exps of parts merge by logaddexp. With part k of lse = log sum_k exp(lse_k),

    dL/dlse_k = dL/dlse exp(lse_k - lse)

so a backward that visits the shards once more needs only the lse_k, not the cosines.

Letters: E exits, M prefixes, Q queries of this process, n documents of one shard, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlembed_kernels.similarity.pairwise_lse import NOTHING, pairwise_lse, pairwise_lse_backward

from ... import config
from ...runtime.distributed import World, gather
from .bank import Bank, Shard

Options = dict[str, Any]  # keyword arguments of pairwise_lse
Sums = list[list[Tensor]]  # of each softmax: log-sum-exps [E, M, Q] of parts of its candidates


@dataclass(frozen=True)
class Pairs:
    """Queries [E, Q, D] and documents [E, n, D] of this process, and the ids of all texts.

    target: int64 [Q], each query's positive among this process's documents. query_ids, doc_ids:
    int64, of each process. query_counts, doc_counts: int64 [E] of each process, how many of its
    texts run to each exit, None: all. common: arguments of all calls of `pairwise_lse` (dims,
    scale), the other arguments of which the methods return.
    """

    where: World
    queries: Tensor
    docs: Tensor
    target: Tensor
    query_ids: Sequence[Tensor]
    query_counts: Sequence[Tensor | None]
    doc_ids: Sequence[Tensor]
    doc_counts: Sequence[Tensor | None]
    common: Options

    def with_documents(self, process: int) -> Options:
        """Return arguments for queries as rows and a process's documents as columns."""
        positive = self.target if process == self.where.rank else None
        return self._with(self.doc_ids[process], self.doc_counts[process], positive)

    def with_queries(self, process: int) -> Options:
        """Return arguments for positives, under their queries' ids, and a process's queries."""
        ids, mine = self.query_ids[process], process == self.where.rank
        positive = torch.arange(len(ids), device=ids.device) if mine else None
        return self._with(ids, self.query_counts[process], positive)

    def with_shard(self, shard: Shard) -> Options:
        """Return arguments for queries as rows and earlier documents as columns."""
        return self._with(shard.ids_n, shard.counts_E, None)

    def of_positives(self) -> "Pairs":
        """Return pairs whose documents are the positives alone, in the order of the queries."""
        target = torch.arange(len(self.target), device=self.target.device)
        ids, counts = self.query_ids, self.query_counts
        docs = self.docs[:, self.target]
        return replace(self, docs=docs, target=target, doc_ids=ids, doc_counts=counts)

    def _with(self, ids: Tensor, counts: Tensor | None, positive: Tensor | None) -> Options:
        return {
            "positive": positive,
            "row_keys": (self.query_ids[self.where.rank],),
            "row_counts": self.query_counts[self.where.rank],
            "col_keys": (ids,),
            "col_counts": counts,
            **self.common,
        }


# ---- in batch ----


def in_batch(
    pairs: Pairs, source: str, run: config.Run, symmetric: bool, bank: Bank | None
) -> tuple[Sums, Tensor]:
    """Return the sums over documents and, if symmetric, over queries, and the positives' cosines.

    Documents are those of all processes, which are added to the bank, and the bank's; queries are
    those of all processes. The cosines are [E, M, Q].
    """
    earlier = [] if bank is None else bank.shards(source)
    size = pairs.where.size
    copies: dict[int, Shard] = {}

    def keep(process: int, vectors_EnD: Tensor) -> None:
        if bank is not None:
            ids, counts = pairs.doc_ids[process], pairs.doc_counts[process]
            copies[process] = bank.copied(Shard(vectors_EnD, ids, counts))

    if run.loss.negatives_across == "ring" and size > 1:
        sums, cos_EMQ = ring_lse(pairs, symmetric, keep)
    else:
        shards = gather(pairs.docs, [len(ids) for ids in pairs.doc_ids])
        for process, shard in enumerate(shards):
            keep(process, shard)
        query_shards = gather(pairs.queries, [len(pairs.target)] * size) if symmetric else None
        sums, cos_EMQ = _gathered(pairs, shards, query_shards)
    if earlier:
        sums[0].append(bank_lse(pairs, earlier))
    if bank is not None:
        bank.add(source, [copies[process] for process in range(size)])
    return sums, cos_EMQ


def _gathered(
    pairs: Pairs, doc_shards: list[Tensor], query_shards: list[Tensor] | None
) -> tuple[Sums, Tensor]:
    """Sum over gathered shards [E, n, D]; without `query_shards` in one direction only."""
    # On one process a single pass over the pairs serves both directions.
    both = query_shards is not None and len(query_shards) == 1
    forward, backward = [], []
    cos_EMQ = pairs.queries.new_zeros(())
    for process, shard in enumerate(doc_shards):
        options = pairs.with_documents(process)
        rows, columns, positives = pairwise_lse(pairs.queries, shard, columns=both, **options)
        forward.append(rows)
        cos_EMQ = cos_EMQ if positives is None else positives
        backward += [] if columns is None else [columns[:, :, pairs.target]]
    if query_shards is None:
        return [forward], cos_EMQ
    if not both:
        anchors = pairs.docs[:, pairs.target]
        for process, shard in enumerate(query_shards):
            backward.append(pairwise_lse(anchors, shard, **pairs.with_queries(process))[0])
    return [forward, backward], cos_EMQ


# ---- joint ----


def joint(pairs: Pairs, owner: Tensor) -> tuple[Sums, Tensor]:
    """Return GTE's four sums as one softmax's, and the positives' cosines [E, M, Q].

    To those of `in_batch` come q_i with the queries of all processes but itself, and d_i with all
    documents but those drawn for q_i. owner: int64 [own documents], the query each was drawn for.
    """
    doc_shards = gather(pairs.docs, [len(ids) for ids in pairs.doc_ids])
    query_shards = gather(pairs.queries, [len(pairs.target)] * pairs.where.size)
    sums, cos_EMQ = _gathered(pairs, doc_shards, query_shards)
    parts = [part for direction in sums for part in direction]
    anchors = pairs.docs[:, pairs.target]
    numbers = torch.arange(len(pairs.target), device=owner.device)
    for process, (query_shard, doc_shard) in enumerate(zip(query_shards, doc_shards, strict=True)):
        parts.append(pairwise_lse(pairs.queries, query_shard, **pairs.with_queries(process))[0])
        options = pairs.with_documents(process)
        # Only this process has documents that were drawn for its queries.
        if process == pairs.where.rank:
            options["row_keys"] += (numbers,)
            options["col_keys"] += (owner,)
        parts.append(pairwise_lse(anchors, doc_shard, **options)[0])
    return [parts], cos_EMQ


# ---- bank ----


def bank_lse(pairs: Pairs, shards: Sequence[Shard]) -> Tensor:
    """Return the log-sum-exp [E, M, Q] of the queries over shards, at least one.

    Only queries get a gradient. One shard at a time is on their device, in backward, too.
    """
    return _BankLse.apply(pairs.queries, shards, pairs)


class _BankLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, shards: Sequence[Shard], pairs: Pairs) -> Tensor:
        parts = []
        for stored in shards:
            shard = stored.to(queries)
            parts.append(pairwise_lse(queries, shard.vectors_EnD, **pairs.with_shard(shard))[0])
            # Free it before the next one is copied.
            del shard
        stacked = torch.stack(parts)
        lse = _merged(stacked)
        ctx.save_for_backward(queries, stacked, lse)
        ctx.shards, ctx.pairs = shards, pairs
        return lse

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        queries, parts, lse = ctx.saved_tensors
        dqueries = torch.zeros_like(queries, dtype=lse.dtype)
        for stored, part in zip(ctx.shards, parts, strict=True):
            shard = stored.to(queries)
            dqueries += pairwise_lse_backward(
                queries,
                shard.vectors_EnD,
                (part, None, None),
                (slopes[0] * _share(part, lse), None, None),
                **ctx.pairs.with_shard(shard),
            )[0]
            del shard
        return dqueries.to(queries.dtype), None, None


def _merged(parts: Tensor) -> Tensor:
    """Return log sum exp over the first axis, by pairs: -inf where all parts are."""
    lse = parts[0]
    for part in parts[1:]:
        lse = torch.logaddexp(lse, part)
    return lse


def _share(part: Tensor, lse: Tensor) -> Tensor:
    """Return exp(part - lse), a part's share of a sum; of an empty sum any finite number."""
    return (part.clamp(min=NOTHING) - lse.clamp(min=NOTHING)).exp()


# ---- ring ----


def ring_lse(
    pairs: Pairs, columns: bool, keep: Callable[[int, Tensor], None]
) -> tuple[Sums, Tensor]:
    """Return what `in_batch` does, with documents that are passed around.

    columns: also sum over all processes' queries. keep: is called with each process's documents as
    they pass, and has to copy them. Gradients are those of the sum of all processes' losses, as
    `gather`'s are.
    """
    rows, columns_EMn, cos_EMQ = _RingLse.apply(pairs.queries, pairs.docs, pairs, columns, keep)
    return [[rows], *([[columns_EMn[:, :, pairs.target]]] if columns else [])], cos_EMQ


class _RingLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, docs: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        pairs, columns, keep = options
        where, sizes = pairs.where, [len(ids) for ids in pairs.doc_ids]
        by_row, by_column, positives = [], [], None
        sums = _TravellingSums(where, sizes, torch.logaddexp)
        for process, (shard,) in _passed_around(where, sizes, docs):
            keep(process, shard)
            arguments = pairs.with_documents(process)
            rows, cols, cosines = pairwise_lse(queries, shard, columns=columns, **arguments)
            positives = cosines if cosines is not None else positives
            by_row.append(rows)
            by_column.append(cols)
            if cols is not None:
                sums.add(process, cols.transpose(1, 2))
        assert positives is not None
        lse = _merged(torch.stack(by_row))
        columns_EMn = sums.received().transpose(1, 2).contiguous() if columns else None
        ctx.save_for_backward(queries, docs, lse, columns_EMn, positives, *by_row, *by_column)
        ctx.pairs = pairs
        return lse, columns_EMn, positives

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        pairs, where = ctx.pairs, ctx.pairs.where
        queries, docs, lse, columns_EMn, positives, *parts = ctx.saved_tensors
        drows, dcolumns, dpositives = slopes
        parcel = [docs]
        # The columns of a process's documents and their slopes travel with the documents.
        if columns_EMn is not None:
            parcel.append(torch.cat([columns_EMn, dcolumns], dim=1).transpose(1, 2))
        sizes = [len(ids) for ids in pairs.doc_ids]
        dqueries = torch.zeros_like(queries, dtype=lse.dtype)
        sums = _TravellingSums(where, sizes, torch.Tensor.add_)
        rounds = _passed_around(where, sizes, *parcel)
        for (process, (shard, *slope)), rows, cols in zip(
            rounds, parts[: where.size], parts[where.size :], strict=True
        ):
            dcols = None
            if slope:
                all_cols, dcols = slope[0].transpose(1, 2).chunk(2, dim=1)
                dcols = dcols * _share(cols, all_cols)
            mine = process == where.rank
            dx, dy, _ = pairwise_lse_backward(
                queries,
                shard,
                (rows, cols, positives if mine else None),
                (drows * _share(rows, lse), dcols, dpositives if mine else None),
                columns=columns_EMn is not None,
                **pairs.with_documents(process),
            )
            dqueries += dx
            sums.add(process, dy.to(lse.dtype))
            # Free both before the next round computes its own.
            del dx, dy
        return dqueries.to(queries.dtype), sums.received().to(docs.dtype), None, None, None


def _passed_around(
    where: World, sizes: Sequence[int], *mine: Tensor
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (process, its tensors): this process's, then those of the one before, and so on.

    While the caller works with one process's tensors, the next ones arrive in the other of two
    buffers, so the caller must not keep them. mine: each [E, sizes[rank], K], with equal E, K and
    dtype on all processes.
    """
    parcel = [x.detach().contiguous() for x in mine]
    longest = max(sizes)
    buffers = [
        [x.new_empty(x.shape[0] * longest * x.shape[2]) for x in mine]
        for _ in range(min(2, where.size - 1))
    ]
    for hop in range(where.size):
        process = (where.rank - hop) % where.size
        arriving: list[Tensor] = []
        transfers: list[dist.Work] = []
        if hop < where.size - 1:
            n = sizes[process - 1]
            for x, buffer in zip(parcel, buffers[hop % 2], strict=True):
                E, _, K = x.shape
                arriving.append(buffer[: E * n * K].view(E, n, K))
                transfers += _exchange(where, x, arriving[-1])
        yield process, parcel
        for transfer in transfers:
            transfer.wait()
        parcel = arriving


class _TravellingSums:
    """Sums [E, n, K] by document that follow their shard, one hop behind it."""

    def __init__(
        self, where: World, sizes: Sequence[int], plus: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.where, self.sizes, self.plus = where, sizes, plus
        self.sent: Tensor | None = None
        self.arriving: Tensor | None = None
        self.transfers: list[dist.Work] = []

    def add(self, process: int, part: Tensor) -> None:
        """Add this process's part to the sum of the current shard, and send the sum on."""
        if self.arriving is not None:
            part = self.plus(self.received(), part)
        self.sent = part.contiguous()
        E, _, K = part.shape
        self.arriving = self.sent.new_empty(E, self.sizes[process - 1], K)
        self.transfers = _exchange(self.where, self.sent, self.arriving)

    def received(self) -> Tensor:
        """Wait for the last sum: after the last round, that of this process's own documents."""
        for transfer in self.transfers:
            transfer.wait()
        assert self.arriving is not None
        return self.arriving


def _exchange(where: World, mine: Tensor, theirs: Tensor) -> list[dist.Work]:
    """Begin to send `mine` to the next process and to receive `theirs` from the one before.

    The two form one group, because NCCL would wait for a send that no process receives yet. All
    processes exchange in the same order, which tells messages apart.
    """
    after, before = (where.rank + 1) % where.size, (where.rank - 1) % where.size
    return dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, theirs, before)]
    )
