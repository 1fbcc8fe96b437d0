"""What is optimised: the 3D Matryoshka objective, one number per exit and prefix, weighted.

    loss = sum_e sum_m w_e w_m loss_em,  loss_em = InfoNCE at exit e and prefix m

The vocabulary rank, the third dimension, is sampled once per step (`sample_rank`).

Letters: E exits, M prefixes, N texts, D width.
"""

import numpy as np
import torch
from torch import Tensor

from mlembed_kernels import infonce

from . import config
from .data import Batch
from .distributed import World, gather


def loss_table(exits_END: Tensor, batch: Batch, run: config.Run, world: World) -> Tensor:
    """loss_EM fp32 [E, M] of this process's pairs against the candidates of all processes.

    Args:
        exits_END: this process's texts, in the order of `batch.packed`.
        batch: whose ids (for all processes) tell false negatives apart.

    The mean over processes is the loss of the whole batch on one process, and so, as gathering
    carries gradients, is the mean of their gradients.
    """
    device = exits_END.device
    pairs = len(batch.pair_ids) // world.size
    exits_END = exits_END[:, batch.place.to(device)]
    queries, docs = exits_END[:, :pairs], exits_END[:, pairs:]
    pair_ids, doc_ids = batch.pair_ids.to(device), batch.doc_ids.to(device)
    mine = slice(world.rank * pairs, (world.rank + 1) * pairs)
    rows = torch.arange(pairs, device=device)
    dims, temperature = run.model.matryoshka_dims, run.loss.temperature
    # Where all queries are here, one pass over the pairs serves both directions.
    both = run.loss.symmetric and world.size == 1
    loss_EM = infonce(
        queries,
        gather(docs, batch.doc_sizes),
        dims=dims,
        temperature=temperature,
        target=rows + sum(batch.doc_sizes[: world.rank]),
        directions=("query_to_doc", "doc_to_query") if both else ("query_to_doc",),
        partition_mode="per_direction",
        query_ids=pair_ids[mine],
        cand_ids=doc_ids,
    )
    if both or not run.loss.symmetric:
        return loss_EM
    reverse_EM = infonce(
        docs[:, :pairs],
        gather(queries, [pairs] * world.size),
        dims=dims,
        temperature=temperature,
        target=rows + world.rank * pairs,
        query_ids=pair_ids[mine],
        cand_ids=pair_ids,
    )
    return (loss_EM + reverse_EM) / 2


def weights(run: config.Run) -> Tensor:
    """w_e w_m as [E, M], summing to one.

    `ml-embed` (released code of arXiv 2605.15081): w_m = 1 / (n sqrt(D / d)), n = 1 for the full
    width D and counting up towards the smallest prefix; there the sum is left as it falls, which
    makes the loss's scale depend on how many prefixes are listed.
    """
    exits, dims = run.model.exits, run.model.matryoshka_dims
    w_E = torch.tensor([float(e) if run.loss.exit_weights == "depth" else 1.0 for e in exits])
    w_M = torch.ones(len(dims))
    if run.loss.matryoshka_weights == "ml-embed":
        count_down = range(len(dims), 0, -1)
        w_M = torch.tensor(
            [1 / (n * (dims[-1] / d) ** 0.5) for n, d in zip(count_down, dims, strict=True)]
        )
    return torch.outer(w_E / w_E.sum(), w_M / w_M.sum())


def sample_rank(ranks: tuple[int, ...], seed: int, step: int) -> int | None:
    """The step's vocabulary rank, drawn in proportion to itself (ML-Embed); None without ranks.

    A function of seed and step alone, so it is equal on all processes and after a resume.
    """
    if not ranks:
        return None
    p = np.array(ranks) / sum(ranks)
    return int(np.random.default_rng([seed, step, 1]).choice(ranks, p=p))
