"""What is optimised: the 3D Matryoshka objective, one number per exit and prefix, weighted.

    loss = sum_e sum_m w_e w_m loss_em,  loss_em = InfoNCE at exit e and prefix m

The vocabulary rank, the third dimension, is sampled once per step (`sample_rank`).

Letters: E exits, M prefixes, N texts, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import infonce, partition
from mlembed_kernels.partition import NOTHING, present

from . import config
from .bank import Bank, Slab
from .distributed import World, gather
from .pack import Batch
from .ring import Pairs, ringed, streamed


def loss_table(
    exits_END: Tensor,
    batch: Batch,
    run: config.Run,
    world: World,
    exits: Sequence[int] | None = None,
    bank: Bank | None = None,
) -> Tensor:
    """loss_EM fp32 [E, M] of this process's pairs against the candidates of all processes.

    At an exit only groups that run as deep take part, as queries and as candidates.

    Args:
        exits_END: this process's texts, in the order of `batch.packs`.
        batch: whose ids (for all processes) tell false negatives apart.
        exits: their depths; the configured ones by default.
        bank: whose documents of the batch's source are negatives of its queries as well. Those of
            all processes are added to it, for the caller to commit or to discard.

    The mean over processes is the loss of the whole batch on one process, and so, as gathering and
    passing around carry gradients, is the mean of their gradients.
    """
    exits = run.model.exits if exits is None else exits
    exits_END = exits_END[:, batch.place.to(exits_END.device)]
    pairs = _pairs(batch, run, world, exits, exits_END)
    queries, docs = exits_END[:, : len(batch.target)], exits_END[:, len(batch.target) :]
    held = [] if bank is None else bank.slabs(batch.source)
    passing: dict[int, Slab] = {}

    def keep(process: int, vectors_EnD: Tensor) -> None:
        if bank is not None:
            ids, counts = pairs.doc_ids[process], pairs.doc_counts[process]
            passing[process] = bank.copied(Slab(vectors_EnD, ids, counts))

    ring = run.loss.negatives_across == "ring" and world.size > 1
    symmetric = run.loss.directions == "symmetric"
    slabs = [] if ring else gather(docs, batch.doc_sizes)
    for process, slab in enumerate(slabs):
        keep(process, slab)
    if not ring and not held:
        loss_EM = _infonce(queries, docs, slabs, pairs, run)
    else:
        if ring:
            logs, own_EMQ = ringed(queries, docs, pairs, symmetric, keep)
        else:
            logs, own_EMQ = _partitions(queries, docs, slabs, pairs, symmetric)
        if held:
            logs[0].append(streamed(queries, held, pairs))
        loss_EM = _loss(logs, own_EMQ, pairs)
    if bank is not None:
        bank.add(batch.source, [passing[process] for process in range(world.size)])
    count_E = pairs.query_counts[world.rank]
    if count_E is None or world.size == 1:
        return loss_EM
    # Processes differ in how many of their queries are there: each counts by its share of them.
    total_E = torch.stack([count for count in pairs.query_counts if count is not None]).sum(0)
    return loss_EM * (count_E * world.size / total_E.to(loss_EM.dtype))[:, None]


def _pairs(
    batch: Batch, run: config.Run, world: World, exits: Sequence[int], like: Tensor
) -> Pairs:
    """What the batch says of all texts, on the vectors' device."""
    device, dims = like.device, run.model.matryoshka_dims
    query_sizes, doc_sizes = [len(batch.target)] * world.size, list(batch.doc_sizes)
    scale_EM = torch.full(
        (len(exits), len(dims)),
        1 / run.loss.temperature,
        dtype=torch.promote_types(like.dtype, torch.float32),
        device=device,
    )
    return Pairs(
        world,
        batch.target.to(device),
        batch.query_ids.to(device).split(query_sizes),
        _counts(batch.query_depths, query_sizes, exits, device),
        batch.doc_ids.to(device).split(doc_sizes),
        _counts(batch.doc_depths, doc_sizes, exits, device),
        {"dims": dims, "scale": scale_EM},
    )


def _counts(
    depths: Tensor, sizes: Sequence[int], exits: Sequence[int], device: torch.device
) -> list[Tensor | None]:
    """How many of each process's texts, deepest first, are there at each exit; None: all."""
    if int(depths.min()) >= exits[-1]:
        return [None] * len(sizes)
    at = torch.tensor(exits)
    return [(part[None] >= at[:, None]).sum(1).to(device) for part in depths.split(list(sizes))]


def _infonce(
    queries: Tensor, docs: Tensor, slabs: list[Tensor], pairs: Pairs, run: config.Run
) -> Tensor:
    """loss_EM where the documents of all processes, [E, n, D] of each, are here and no others."""
    rank, size = pairs.where.rank, pairs.where.size
    n = len(pairs.target)
    # Where all queries are here, one pass over the pairs serves both directions.
    both = (run.loss.directions == "symmetric") and size == 1
    common: dict[str, Any] = {
        "dims": run.model.matryoshka_dims,
        "temperature": run.loss.temperature,
        "query_ids": pairs.query_ids[rank],
        "query_counts": pairs.query_counts[rank],
    }
    loss_EM = infonce(
        queries,
        **_candidates(slabs, pairs.doc_counts),
        target=pairs.target + sum(slab.shape[1] for slab in slabs[:rank]),
        directions=("query_to_doc", "doc_to_query") if both else ("query_to_doc",),
        partition_mode="per_direction",
        cand_ids=torch.cat(list(pairs.doc_ids)),
        **common,
    )
    if (run.loss.directions == "symmetric") and not both:
        reverse_EM = infonce(
            docs[:, pairs.target],
            **_candidates(gather(queries, [n] * size), pairs.query_counts),
            target=torch.arange(rank * n, (rank + 1) * n, device=docs.device),
            cand_ids=torch.cat(list(pairs.query_ids)),
            **common,
        )
        loss_EM = (loss_EM + reverse_EM) / 2
    return loss_EM


def _candidates(slabs: list[Tensor], counts: Sequence[Tensor | None]) -> dict[str, Any]:
    """Arguments of infonce: one tensor, or, where texts have left, a piece a process."""
    if counts[0] is None:
        return {"c": torch.cat(slabs, dim=1) if len(slabs) > 1 else slabs[0]}
    return {"c": slabs, "cand_counts": counts}


def _partitions(
    queries: Tensor, docs: Tensor, slabs: list[Tensor], pairs: Pairs, symmetric: bool
) -> tuple[list[list[Tensor]], Tensor]:
    """-> (log-partitions [E, M, Q] by direction, over each process's texts; cosines [E, M, Q]).

    What `_infonce` computes, before it is a loss: further negatives can still join.
    """
    size = pairs.where.size
    both = symmetric and size == 1
    forward, backward = [], []
    own_EMQ = queries.new_zeros(())
    for process, slab in enumerate(slabs):
        rows, columns, own = partition(queries, slab, columns=both, **pairs.with_documents(process))
        forward.append(rows)
        own_EMQ = own_EMQ if own is None else own
        backward += [] if columns is None else [columns[:, :, pairs.target]]
    if symmetric and not both:
        anchors = docs[:, pairs.target]
        for process, slab in enumerate(gather(queries, [len(pairs.target)] * size)):
            backward.append(partition(anchors, slab, **pairs.with_queries(process))[0])
    return [forward, backward] if symmetric else [forward], own_EMQ


def _loss(logs: list[list[Tensor]], own_EMQ: Tensor, pairs: Pairs) -> Tensor:
    """loss_EM = mean over queries and directions of softplus(log N - z), as `infonce` has it."""
    E, _, Q = own_EMQ.shape
    z_EMQ = own_EMQ * pairs.common["scale"][..., None]
    losses = []
    for parts in logs:
        log_N = torch.stack(parts).clamp(min=NOTHING).logsumexp(0)
        losses.append(-F.logsigmoid(z_EMQ - log_N))
    there_EQ = present(pairs.query_counts[pairs.where.rank], E, Q, own_EMQ.device)
    loss_EMQ = torch.stack(losses).mean(0).where(there_EQ[:, None], 0.0)
    return loss_EMQ.sum(-1) / there_EQ.sum(-1).clamp(min=1)[:, None]


def weights(run: config.Run, exits: Sequence[int] | None = None) -> Tensor:
    """w_e w_m as [E, M], summing to one over the exits that have a loss (by default all).

    `ml-embed` (released code of arXiv 2605.15081): w_m = 1 / (n sqrt(D / d)), n = 1 for the full
    width D and counting up towards the smallest prefix; there the sum is left as it falls, which
    makes the loss's scale depend on how many prefixes are listed.
    """
    exits, dims = run.model.exits if exits is None else exits, run.model.matryoshka_dims
    w_E = torch.tensor([float(e) if run.loss.exit_weights == "depth" else 1.0 for e in exits])
    w_M = torch.ones(len(dims))
    if run.loss.matryoshka_weights == "ml-embed":
        count_down = range(len(dims), 0, -1)
        w_M = torch.tensor(
            [1 / (n * (dims[-1] / d) ** 0.5) for n, d in zip(count_down, dims, strict=True)]
        )
    return torch.outer(w_E / w_E.sum(), w_M / w_M.sum())


def ranks_of(run: config.Run, step: int) -> list[tuple[int | None, float]]:
    """The step's vocabulary ranks, and what the loss at each of them weighs."""
    ranks = run.model.ranks
    if run.loss.ranks == "all" and ranks:
        return [(rank, rank / sum(ranks)) for rank in ranks]
    return [(sample_rank(ranks, run.seed, step), 1.0)]


def sample_rank(ranks: tuple[int, ...], seed: int, step: int) -> int | None:
    """The step's vocabulary rank, drawn in proportion to itself (ML-Embed); None without ranks.

    A function of seed and step alone, so it is equal on all processes and after a resume.
    """
    if not ranks:
        return None
    p = np.array(ranks) / sum(ranks)
    return int(np.random.default_rng([seed, step, 1]).choice(ranks, p=p))
