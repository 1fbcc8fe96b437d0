"""What is optimised: the 3D Matryoshka objective, one number per exit and prefix, weighted.

    loss = sum_e sum_m w_e w_m loss_em,  loss_em = InfoNCE at exit e and prefix m

The vocabulary rank, the third dimension, is sampled once per step (`sample_rank`).

Letters: E exits, M prefixes, N texts, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlembed_kernels import infonce

from . import config
from .distributed import World, gather
from .pack import Batch


def loss_table(
    exits_END: Tensor,
    batch: Batch,
    run: config.Run,
    world: World,
    exits: Sequence[int] | None = None,
) -> Tensor:
    """loss_EM fp32 [E, M] of this process's pairs against the candidates of all processes.

    At an exit only groups that run as deep take part, as queries and as candidates.

    Args:
        exits_END: this process's texts, in the order of `batch.packs`.
        batch: whose ids (for all processes) tell false negatives apart.
        exits: their depths; the configured ones by default.

    The mean over processes is the loss of the whole batch on one process, and so, as gathering
    carries gradients, is the mean of their gradients.
    """
    device, size = exits_END.device, world.size
    exits = run.model.exits if exits is None else exits
    pairs = len(batch.query_ids) // size
    exits_END = exits_END[:, batch.place.to(device)]
    queries, docs = exits_END[:, :pairs], exits_END[:, pairs:]
    query_ids, doc_ids = batch.query_ids.to(device), batch.doc_ids.to(device)
    target, mine = batch.target.to(device), slice(world.rank * pairs, (world.rank + 1) * pairs)
    of_queries = _counts(batch.query_depths, [pairs] * size, exits)
    of_docs = _counts(batch.doc_depths, batch.doc_sizes, exits)
    here = [None if count is None else count.to(device) for count in of_queries]
    there = [None if count is None else count.to(device) for count in of_docs]
    own = here[world.rank]
    # Where all queries are here, one pass over the pairs serves both directions.
    both = run.loss.symmetric and size == 1
    common = {"dims": run.model.matryoshka_dims, "temperature": run.loss.temperature}
    loss_EM = infonce(
        queries,
        **_candidates(gather(docs, batch.doc_sizes), there),
        target=target + sum(batch.doc_sizes[: world.rank]),
        directions=("query_to_doc", "doc_to_query") if both else ("query_to_doc",),
        partition_mode="per_direction",
        query_ids=query_ids[mine],
        cand_ids=doc_ids,
        query_counts=own,
        **common,
    )
    if run.loss.symmetric and not both:
        reverse_EM = infonce(
            docs[:, target],
            **_candidates(gather(queries, [pairs] * size), here),
            target=torch.arange(mine.start, mine.stop, device=device),
            query_ids=query_ids[mine],
            cand_ids=query_ids,
            query_counts=own,
            **common,
        )
        loss_EM = (loss_EM + reverse_EM) / 2
    if own is None or size == 1:
        return loss_EM
    # Processes differ in how many of their queries are there: each counts by its share of them.
    total = torch.stack([count for count in here if count is not None]).sum(0)
    return loss_EM * (own * size / total.to(loss_EM.dtype))[:, None]


def _counts(depths: Tensor, sizes: Sequence[int], exits: Sequence[int]) -> list[Tensor | None]:
    """How many of each process's texts, deepest first, are there at each exit; None: all."""
    if int(depths.min()) >= exits[-1]:
        return [None] * len(sizes)
    at = torch.tensor(exits)
    return [(part[None] >= at[:, None]).sum(1) for part in depths.split(list(sizes))]


def _candidates(slabs: list[Tensor], counts: list[Tensor | None]) -> dict[str, Any]:
    """Arguments of infonce: one tensor, or, where texts have left, a piece a process."""
    if counts[0] is None:
        return {"c": torch.cat(slabs, dim=1) if len(slabs) > 1 else slabs[0]}
    return {"c": slabs, "cand_counts": counts}


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
