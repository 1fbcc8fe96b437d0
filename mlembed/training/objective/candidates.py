"""Log-partitions whose candidates are never all on the device: they come shard by shard.

In a ring each process hands the shard of documents that it has worked with on to the next, while
the one before hands over another: after `size` rounds all queries have met all documents, and no
process has held more than two shards besides its own documents. Logarithms of sums merge by
logaddexp. What is summed by document, columns in forward and gradients in backward, travels behind
its shard, grows at every process and is home after the last round.

The backward goes around once more instead of keeping what has passed. With part k of
log N = log sum_k exp(log N_k), dL/dlog N_k = dL/dlog N exp(log N_k - log N), so that it needs the
small logarithms alone.

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

Options = dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """This process's queries and everyone's texts, as `pairwise_lse` has to know them.

    target: int64 [Q], each query's positive among this process's documents. query_ids, doc_ids:
    int64, of each process. query_counts, doc_counts: int64 [E] of each process, so many are
    present at each exit, None: all. common: what goes with all (dims, scale).
    """

    where: World
    target: Tensor
    query_ids: Sequence[Tensor]
    query_counts: Sequence[Tensor | None]
    doc_ids: Sequence[Tensor]
    doc_counts: Sequence[Tensor | None]
    common: Options

    def with_documents(self, process: int) -> Options:
        """Queries as rows, a process's documents as columns."""
        positive = self.target if process == self.where.rank else None
        columns = self.doc_ids[process], self.doc_counts[process]
        return {"positive": positive, **self._rows_with(*columns)}

    def with_queries(self, process: int) -> Options:
        """The queries' positives as rows, which share their ids, a process's queries as columns."""
        ids = self.query_ids[process]
        positive = torch.arange(len(ids), device=ids.device)
        return {
            "positive": positive if process == self.where.rank else None,
            **self._rows_with(ids, self.query_counts[process]),
        }

    def of_positives(self) -> "Pairs":
        """The same where documents are the queries' positives alone, in the queries' order."""
        everyone = torch.arange(len(self.target), device=self.target.device)
        return replace(self, target=everyone, doc_ids=self.query_ids, doc_counts=self.query_counts)

    def with_shard(self, shard: Shard) -> Options:
        """Queries as rows, earlier documents as columns."""
        return self._rows_with(shard.ids_n, shard.counts_E)

    def _rows_with(self, ids: Tensor, counts: Tensor | None) -> Options:
        return {
            "row_keys": (self.query_ids[self.where.rank],),
            "row_counts": self.query_counts[self.where.rank],
            "col_keys": (ids,),
            "col_counts": counts,
            **self.common,
        }


# ---- earlier documents ----


def bank_lse(queries: Tensor, shards: Sequence[Shard], pairs: Pairs) -> Tensor:
    """Log-partitions [E, M, Q] of queries [E, Q, D] over shards of one or more, with gradient to
    the queries alone. One shard at a time is on the queries' device, in backward as well."""
    return _Streamed.apply(queries, shards, pairs)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, shards: Sequence[Shard], pairs: Pairs) -> Tensor:
        parts = []
        for kept in shards:
            shard = kept.to(queries)
            parts.append(pairwise_lse(queries, shard.vectors_EnD, **pairs.with_shard(shard))[0])
            del shard  # before the next one is brought
        logs = torch.stack(parts)
        whole = _merged(logs)
        ctx.save_for_backward(queries, logs, whole)
        ctx.shards, ctx.pairs = shards, pairs
        return whole

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        queries, logs, whole = ctx.saved_tensors
        dqueries = torch.zeros_like(queries, dtype=whole.dtype)
        for kept, part in zip(ctx.shards, logs, strict=True):
            shard = kept.to(queries)
            dqueries += pairwise_lse_backward(
                queries,
                shard.vectors_EnD,
                (part, None, None),
                (slopes[0] * _share(part, whole), None, None),
                **ctx.pairs.with_shard(shard),
            )[0]
            del shard
        return dqueries.to(queries.dtype), None, None


def _merged(logs: Tensor) -> Tensor:
    """log sum exp over the first axis, pair by pair: -inf where all are."""
    whole = logs[0]
    for part in logs[1:]:
        whole = torch.logaddexp(whole, part)
    return whole


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole): how much of a sum is one part of it. Where all are empty, no matter."""
    return (part.clamp(min=NOTHING) - whole.clamp(min=NOTHING)).exp()


# ---- the ring ----


def ring_lse(
    queries: Tensor,
    docs: Tensor,
    pairs: Pairs,
    columns: bool,
    keep: Callable[[int, Tensor], None],
) -> tuple[list[list[Tensor]], Tensor]:
    """Of this process's queries and all processes' documents, which are passed around
    -> (log-partitions [E, M, Q] by direction, each in one part; the positives' cosines [E, M, Q]).

    Args:
        queries, docs: [E, Q, D], [E, n, D] of this process.
        columns: whether the positives' partitions over all processes' queries are wanted as well.
        keep: is shown every process's documents as they pass, and has to copy what it keeps.

    Gradients are those of the sum of all processes' losses, as `gather`'s are.
    """
    rows, columns_EMn, own = _Ring.apply(queries, docs, pairs, columns, keep)
    return [[rows], *([[columns_EMn[:, :, pairs.target]]] if columns else [])], own


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        docs: Tensor,
        pairs: Pairs,
        columns: bool,
        keep: Callable[[int, Tensor], None],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        where, sizes = pairs.where, [len(ids) for ids in pairs.doc_ids]
        by_row, by_column, positives = [], [], None
        sums = _Travelling(where, sizes, torch.logaddexp)
        for process, (shard,) in _passed_around(where, sizes, docs):
            keep(process, shard)
            rows, cols, own = pairwise_lse(
                queries, shard, columns=columns, **pairs.with_documents(process)
            )
            positives = own if own is not None else positives
            by_row.append(rows)
            by_column.append(cols)
            if cols is not None:
                sums.add(process, cols.transpose(1, 2))
        assert positives is not None
        whole = _merged(torch.stack(by_row))
        columns_EMn = sums.home().transpose(1, 2).contiguous() if columns else None
        ctx.save_for_backward(queries, docs, whole, columns_EMn, positives, *by_row, *by_column)
        ctx.pairs = pairs
        return whole, columns_EMn, positives

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        pairs, where = ctx.pairs, ctx.pairs.where
        queries, docs, whole, columns_EMn, positives, *logs = ctx.saved_tensors
        drows, dcolumns, dpositives = slopes
        parcel = [docs]
        if columns_EMn is not None:  # what a process's loss asks of its documents' columns
            parcel.append(torch.cat([columns_EMn, dcolumns], dim=1).transpose(1, 2))
        sizes = [len(ids) for ids in pairs.doc_ids]
        dqueries = torch.zeros_like(queries, dtype=whole.dtype)
        sums = _Travelling(where, sizes, torch.Tensor.add_)
        rounds = _passed_around(where, sizes, *parcel)
        for (process, (shard, *asked)), rows, cols in zip(
            rounds, logs[: where.size], logs[where.size :], strict=True
        ):
            dcols = None
            if asked:
                all_cols, dcols = asked[0].transpose(1, 2).chunk(2, dim=1)
                dcols = dcols * _share(cols, all_cols)
            mine = process == where.rank
            dx, dy, _ = pairwise_lse_backward(
                queries,
                shard,
                (rows, cols, positives if mine else None),
                (drows * _share(rows, whole), dcols, dpositives if mine else None),
                columns=columns_EMn is not None,
                **pairs.with_documents(process),
            )
            dqueries += dx
            sums.add(process, dy.to(whole.dtype))
            del dx, dy  # not beside the next round's
        return dqueries.to(queries.dtype), sums.home().to(docs.dtype), None, None, None


def _passed_around(
    where: World, sizes: Sequence[int], *own: Tensor
) -> Iterator[tuple[int, list[Tensor]]]:
    """(process, its tensors), this one's first, then those of the one before, and so on.

    While the caller works with some, the next are under way: into one of two buffers, which it may
    not hold on to. own: each [E, n, K], n = sizes[rank], of one E, K and dtype everywhere.
    """
    parcel = [x.detach().contiguous() for x in own]
    longest = max(sizes)
    buffers = [
        [x.new_empty(x.shape[0] * longest * x.shape[2]) for x in own]
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


class _Travelling:
    """Sums [E, n, K] by document that follow their shard, one hop behind it."""

    def __init__(
        self, where: World, sizes: Sequence[int], plus: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.where, self.sizes, self.plus = where, sizes, plus
        self.sent: Tensor | None = None
        self.arriving: Tensor | None = None
        self.transfers: list[dist.Work] = []

    def add(self, process: int, part: Tensor) -> None:
        """This process's share of the sum that belongs to the shard in hand; sends it on."""
        if self.arriving is not None:
            part = self.plus(self.home(), part)
        self.sent = part.contiguous()
        E, _, K = part.shape
        self.arriving = self.sent.new_empty(E, self.sizes[process - 1], K)
        self.transfers = _exchange(self.where, self.sent, self.arriving)

    def home(self) -> Tensor:
        """What has arrived: after the last round, the sum of this process's own documents."""
        for transfer in self.transfers:
            transfer.wait()
        assert self.arriving is not None
        return self.arriving


def _exchange(where: World, mine: Tensor, theirs: Tensor) -> list[dist.Work]:
    """Begin to send to the next process and to receive from the one before.

    As one group, or NCCL would wait for a send that no one receives yet. All processes exchange in
    the same order, which is what tells messages apart.
    """
    after, before = (where.rank + 1) % where.size, (where.rank - 1) % where.size
    return dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, theirs, before)]
    )


Logs = list[list[Tensor]]  # log-partitions [E, M, Q] by softmax, each in parts


def _in_batch(
    queries: Tensor,
    docs: Tensor,
    source: str,
    run: config.Run,
    pairs: Pairs,
    symmetric: bool,
    bank: Bank | None,
) -> tuple[Logs, Tensor]:
    """Log-partitions over all processes' documents and the bank's and, if symmetric, over all
    processes' queries; and the positives' cosines [E, M, Q]."""
    held = [] if bank is None else bank.shards(source)
    size = pairs.where.size
    passing: dict[int, Shard] = {}

    def keep(process: int, vectors_EnD: Tensor) -> None:
        if bank is not None:
            ids, counts = pairs.doc_ids[process], pairs.doc_counts[process]
            passing[process] = bank.copied(Shard(vectors_EnD, ids, counts))

    if run.loss.negatives_across == "ring" and size > 1:
        logs, cos_EMQ = ring_lse(queries, docs, pairs, symmetric, keep)
    else:
        shards = gather(docs, [len(ids) for ids in pairs.doc_ids])
        for process, shard in enumerate(shards):
            keep(process, shard)
        others = gather(queries, [len(pairs.target)] * size) if symmetric else None
        logs, cos_EMQ = _gathered(queries, docs, shards, others, pairs)
    if held:
        logs[0].append(bank_lse(queries, held, pairs))
    if bank is not None:
        bank.add(source, [passing[process] for process in range(size)])
    return logs, cos_EMQ


def _gathered(
    queries: Tensor,
    docs: Tensor,
    doc_shards: list[Tensor],
    query_shards: list[Tensor] | None,
    pairs: Pairs,
) -> tuple[Logs, Tensor]:
    """`_in_batch` of what is here of all processes, [E, n, D] of each; without queries only one
    direction."""
    # Where all queries are here, one pass over the pairs serves both directions.
    both = query_shards is not None and len(query_shards) == 1
    forward, backward = [], []
    cos_EMQ = queries.new_zeros(())
    for process, shard in enumerate(doc_shards):
        rows, columns, own = pairwise_lse(
            queries, shard, columns=both, **pairs.with_documents(process)
        )
        forward.append(rows)
        cos_EMQ = cos_EMQ if own is None else own
        backward += [] if columns is None else [columns[:, :, pairs.target]]
    if query_shards is None:
        return [forward], cos_EMQ
    if not both:
        anchors = docs[:, pairs.target]
        for process, shard in enumerate(query_shards):
            backward.append(pairwise_lse(anchors, shard, **pairs.with_queries(process))[0])
    return [forward, backward], cos_EMQ


def _joint(queries: Tensor, docs: Tensor, owner: Tensor, pairs: Pairs) -> tuple[Logs, Tensor]:
    """GTE's four sums as one softmax: beside those of `_gathered`, of q_i over the queries of all
    processes but itself, and of d_i over all documents but those that were drawn for q_i."""
    doc_shards = gather(docs, [len(ids) for ids in pairs.doc_ids])
    query_shards = gather(queries, [len(pairs.target)] * pairs.where.size)
    logs, cos_EMQ = _gathered(queries, docs, doc_shards, query_shards, pairs)
    parts = [part for direction in logs for part in direction]
    anchors = docs[:, pairs.target]
    everyone = torch.arange(len(pairs.target), device=owner.device)
    for process, (query_shard, doc_shard) in enumerate(zip(query_shards, doc_shards, strict=True)):
        parts.append(pairwise_lse(queries, query_shard, **pairs.with_queries(process))[0])
        options = pairs.with_documents(process)
        if process == pairs.where.rank:  # others have no documents of its queries
            options["row_keys"] += (everyone,)
            options["col_keys"] += (owner,)
        parts.append(pairwise_lse(anchors, doc_shard, **options)[0])
    return [parts], cos_EMQ
