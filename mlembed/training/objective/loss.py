"""The 3D Matryoshka objective: one loss per exit and prefix, and their weights.

    loss = sum_e sum_m w_e w_m loss_em,  loss_em of the batch's task at exit e and prefix m

The vocabulary rank, the third dimension, is sampled once per step (`sample_rank`).

With cosines s of truncated vectors, temperature t, query q_i, its positive d_i and its hard
negatives n_ik, and N_i a sum of exp(s / t) over negatives, a softmax is

    L(N) = mean_i -log( exp((s(q_i, d_i) - a) / t) / (exp((s(q_i, d_i) - a) / t) + N_i) )

and by task:

    retrieval       L over documents of all queries; with symmetric the mean of that and of L over
                    queries, N_i = sum_j exp(s(q_j, d_i) / t); with gte one L of both sums and of
                    those over pairs of queries and pairs of documents (arXiv 2308.03281, 3.1)
    bitext          the mean of both directions, a = loss.margin (LaBSE, arXiv 2007.01852)
    clustering,     L over the query's hard negatives alone, as in ML-Embed's released code
    classification  (arXiv 2605.15081): other texts of the batch may be of the query's class
    sts             log(1 + sum over pairs with y_i > y_j of exp((s_j - s_i) / t)), s_i of the pair
                    with score y_i (CoSENT, doi 10.1109/TASLP.2024.3402087)

`loss.hard_negatives`: shared, the n_ik are documents like others; own, only positives are, and the
n_ik join N_i of their own query; separate, the n_ik have a softmax of their own, whose loss is
added (ML-Embed's `inbatch` + `hard`).

Letters: E exits, M prefixes, N texts, D width, Q queries of this process, K hard negatives.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import cosine
from mlembed_kernels.similarity.infonce import softmax_loss
from mlembed_kernels.similarity.pairwise_lse import NOTHING

from ... import config
from ...data.collate import Batch
from ...runtime import transfer
from ...runtime.distributed import World, gather
from .bank import Bank
from .candidates import Pairs, in_batch, joint

# Exponent of the rank in the probability that a step draws it.
RANK_POWER = {"sampled": 1, "evenly": 0, "inversely": -1}


def loss_table(
    exits_END: Tensor,
    batch: Batch,
    run: config.Run,
    world: World,
    bank: Bank | None = None,
) -> Tensor:
    """Return loss_EM [E, M] of this process's texts by the batch's task, fp32 (float64 of float64).

    Candidates are those of all processes. At an exit only groups that run as deep take part. The
    hard-negative softmax averages over queries that have hard negatives; other queries contribute
    0. The mean over processes is the loss of the whole batch on one process, and so, as gathering
    and the ring carry gradients, is the mean of their gradients.

    Args:
        exits_END: this process's texts, in the order of `batch.packs`.
        batch: on the device of exits_END. Its ids, of all processes, tell which candidates are
            false negatives.
        bank: for retrieval and bitext, its documents of the batch's source are negatives, and the
            candidates of all processes are added to it, for the caller to commit or discard.

    Raises:
        ValueError: a clustering or classification batch without hard negatives, an sts batch
            without scores.
    """
    pairs = pairs_of(exits_END, batch, run, world)
    if batch.task == "sts":
        return _cosent(batch, pairs, run)
    if batch.task in ("clustering", "classification"):
        return _own_negatives_only(batch, pairs, run)
    return _contrastive(batch, pairs, run, bank)


def pairs_of(exits_END: Tensor, batch: Batch, run: config.Run, world: World) -> Pairs:
    """Split texts into queries and documents, with ids and counts on their device."""
    device, dims, exits = exits_END.device, run.model.matryoshka_dims, run.model.exits
    exits_END = exits_END[:, batch.place]
    query_sizes, doc_sizes = [len(batch.target)] * world.size, list(batch.doc_sizes)
    scale_EM = torch.full(
        (len(exits), len(dims)),
        1 / (batch.temperature or run.loss.temperature),
        dtype=torch.promote_types(exits_END.dtype, torch.float32),
        device=device,
    )
    query_counts, doc_counts = _counts(batch.host, world, exits, device)
    return Pairs(
        world,
        exits_END[:, : len(batch.target)],
        exits_END[:, len(batch.target) :],
        batch.target,
        batch.query_ids.split(query_sizes),
        query_counts,
        batch.doc_ids.split(doc_sizes),
        doc_counts,
        {"dims": dims, "scale": scale_EM},
    )


def _counts(
    host: Batch, world: World, exits: Sequence[int], device: torch.device
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return how many queries and documents of each process run to each exit [E]; None: all."""
    P = world.size
    # A query runs as deep as its documents.
    if int(host.query_depths.min()) >= exits[-1]:
        return [None] * P, [None] * P
    parts = *host.query_depths.split(len(host.target)), *host.doc_depths.split(list(host.doc_sizes))
    at_E1 = torch.tensor(exits)[:, None]
    counts = transfer.moved(torch.stack([(part >= at_E1).sum(1) for part in parts]), device)
    return [*counts[:P]], [*counts[P:]]


# ---- one softmax ----


def _softmax(sums: list[Tensor], z_EMQ: Tensor, share_EQ: Tensor, times: float = 1.0) -> Tensor:
    """Return loss_EM = sum_i share_i (log(k exp(z_i) + N_i) - z_i).

    sums: log-sum-exps [E, M, Q], whose exponentials add up to N. times: k, how often the softmax
    counts the positive.
    """
    loss_EMQ = softmax_loss(sums, z_EMQ, times)
    return (loss_EMQ.where(share_EQ[:, None] > 0, 0.0) * share_EQ[:, None]).sum(-1)


def shares_of(batch: Batch, pairs: Pairs, run: config.Run, only: Tensor | None = None) -> Tensor:
    """Return the weights [E, Q] of this process's queries, 0 where a query has left.

    With them the mean over processes is the mean over all queries that run to the exit.
    only: bool [queries of all processes], which of them count at all.
    """
    P, Q, scale = pairs.where.size, len(batch.target), pairs.common["scale"]
    runs_PEQ = torch.ones(P, len(scale), Q, dtype=torch.bool, device=scale.device)
    for runs_EQ, counts in zip(runs_PEQ, pairs.query_counts, strict=True):
        if counts is not None:
            runs_EQ &= torch.arange(Q, device=scale.device) < counts[:, None]
    if only is not None:
        runs_PEQ &= only.view(P, 1, Q)
    total_E1 = runs_PEQ.double().sum((0, 2))[:, None].clamp(min=1)
    return (P * runs_PEQ[pairs.where.rank] / total_E1).to(scale)


def _hard(batch: Batch, pairs: Pairs) -> Tensor | None:
    """Return the log-sum-exp [E, M, Q] of each query's hard negatives; None if the batch has none.

    Hard negatives exit at the same depth as their query.
    """
    if not batch.negatives.shape[1]:
        return None
    negatives = batch.negatives
    hard = pairs.docs[:, negatives.clamp(min=0)]
    cos_EMQK = cosine(pairs.queries, hard, dims=pairs.common["dims"])
    z_EMQK = cos_EMQK * pairs.common["scale"][..., None, None]
    return z_EMQK.masked_fill(negatives < 0, NOTHING).logsumexp(-1)


def _hardened(pairs: Pairs, hardness: float) -> Pairs:
    """Return pairs whose log-sum-exps are those of z + h cos, h the hardness."""
    if not hardness:
        return pairs
    return replace(pairs, common={**pairs.common, "scale": pairs.common["scale"] + hardness})


def _as_constants(sums: Sequence[Tensor], scale_EM: Tensor, hardness: float) -> list[Tensor]:
    """Return log-sum-exps of hardened pairs whose gradients are those of z alone.

    The gradient of z + h cos by cos is 1 / t + h times the softmax, so 1 / (1 + h t) of it is that
    of a constant h cos.
    """
    if not hardness:
        return list(sums)
    share_EM1 = (scale_EM / (scale_EM + hardness))[..., None]
    made = []
    for lse_EMQ in sums:
        lse_EMQ = lse_EMQ.view_as(lse_EMQ)
        if lse_EMQ.requires_grad:
            lse_EMQ.register_hook(lambda grad: grad * share_EM1)
        made.append(lse_EMQ)
    return made


# ---- clustering, classification ----


def _own_negatives_only(batch: Batch, pairs: Pairs, run: config.Run) -> Tensor:
    """Return the softmax over the positive and the query's own hard negatives; gathers nothing."""
    if not batch.host.has_negatives.any():
        raise ValueError(
            f"{batch.source or 'batch'}: expected hard negatives, the only negatives of task "
            f"{batch.task}, got a batch without any"
        )
    dims, scale_EM = pairs.common["dims"], pairs.common["scale"]
    cos_EMQ = cosine(pairs.queries, pairs.docs[:, pairs.target, None], dims=dims)[..., 0]
    hardness = run.loss.hardness
    hard_EMQ = _hard(batch, _hardened(pairs, hardness))
    sums = [torch.full_like(cos_EMQ, NOTHING) if hard_EMQ is None else hard_EMQ]
    sums = _as_constants(sums, scale_EM, hardness)
    share_EQ = shares_of(batch, pairs, run, batch.has_negatives)
    return _softmax(sums, cos_EMQ * scale_EM[..., None], share_EQ)


# ---- retrieval, bitext ----


def _contrastive(batch: Batch, pairs: Pairs, run: config.Run, bank: Bank | None) -> Tensor:
    """Return the in-batch softmaxes, with a query's own hard negatives in them or added.

    LaBSE's code adds up its two directions: without `normalise_weights`, which asks for the
    published losses' scale, bitext is the sum instead of the mean.
    """
    bitext, loss = batch.task == "bitext", run.loss
    symmetric = bitext or loss.directions != "query_to_doc"
    share_EQ, scale_EM = shares_of(batch, pairs, run), pairs.common["scale"]
    pairs = _hardened(pairs, loss.hardness)
    hard_EMQ, owner = None, batch.owner
    if loss.hard_negatives != "shared":
        hard_EMQ, pairs = _hard(batch, pairs), pairs.of_positives()
        owner = pairs.target
    times = 1.0
    if loss.directions == "gte" and not bitext:
        sums, cos_EMQ = joint(pairs, owner)
        times = 2.0 if loss.count_positive_twice else 1.0
    else:
        sums, cos_EMQ = in_batch(pairs, batch.source, run, symmetric, bank)
    margin = loss.margin if bitext else 0.0
    z_EMQ = (cos_EMQ - margin) * scale_EM[..., None]
    separate = loss.hard_negatives == "separate" and not bitext
    if hard_EMQ is not None:
        (hard_EMQ,) = _as_constants([hard_EMQ], scale_EM, loss.hardness)
    sums = [_as_constants(parts, scale_EM, loss.hardness) for parts in sums]
    if hard_EMQ is not None and not separate:
        sums[0].append(hard_EMQ)
    loss_EM = torch.stack([_softmax(parts, z_EMQ, share_EQ, times) for parts in sums]).sum(0)
    if loss.normalise_weights or not bitext:
        loss_EM = loss_EM / len(sums)
    if hard_EMQ is not None and separate:
        share_EQ = shares_of(batch, pairs, run, batch.has_negatives)
        loss_EM = loss_EM + _softmax([hard_EMQ], z_EMQ, share_EQ)
    return loss_EM


# ---- sts ----


def _cosent(batch: Batch, pairs: Pairs, run: config.Run) -> Tensor:
    """Return CoSENT over the scored pairs of all processes, equal on all of them.

    In the order of scores the sum is sum_i exp(-z_i) sum_j exp(z_j) over the j with lower scores
    than i, which cumulative sums give without a matrix of pairs.
    """
    if batch.scores is None:
        raise ValueError(f"{batch.source or 'batch'}: expected scores for task sts, got none")
    dims, scale_EM = pairs.common["dims"], pairs.common["scale"]
    cos_EMQ = cosine(pairs.queries, pairs.docs[:, pairs.target, None], dims=dims)[..., 0]
    scores_E1Q = batch.scores.to(cos_EMQ).expand(len(cos_EMQ), 1, -1)
    mine = torch.cat([cos_EMQ, scores_E1Q], dim=1).transpose(1, 2)
    gathered = torch.cat(gather(mine, [len(batch.target)] * pairs.where.size), dim=1)
    depths = batch.host.query_depths.split(len(batch.target))
    losses = []
    for e, exit in enumerate(run.model.exits):
        # Each process's queries are ordered deepest first.
        counts = [int((part >= exit).sum()) for part in depths]
        parts = gathered[e].split(len(batch.target))
        present = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        cos_nM, scores = present[:, :-1], present[:, -1].detach()
        scores, order = scores.sort(stable=True)
        z_Mn = cos_nM[order].T * scale_EM[e][:, None]
        before = F.pad(z_Mn.logcumsumexp(1), (1, 0), value=NOTHING)
        lower = torch.searchsorted(scores, scores)
        logs = before[:, lower] - z_Mn
        losses.append(F.pad(logs, (1, 0)).logsumexp(1))
    return torch.stack(losses)


# ---- weights and ranks ----


def weights(run: config.Run) -> Tensor:
    """Return w_e w_m, fp32 [E, M].

    They sum to one. Without `normalise_weights` they are what their rules give, as in published
    losses, whose scale grows with the number of prefixes; `uniform` is a mean over exits even then,
    as in ML-Embed's released code (arXiv 2605.15081).
    """
    w_E, w_M = torch.tensor(_exit_weights(run)), torch.tensor(_prefix_weights(run))
    if run.loss.normalise_weights or run.loss.exit_weights == "uniform":
        w_E = w_E / w_E.sum()
    if run.loss.normalise_weights:
        w_M = w_M / w_M.sum()
    return torch.outer(w_E, w_M)


def _exit_weights(run: config.Run) -> list[float]:
    """Return w_e before normalisation, as `config.Loss.exit_weights` defines them."""
    rule, exits, last = run.loss.exit_weights, run.model.exits, run.model.exits[-1]
    if rule == "custom":
        return list(run.loss.custom_exit_weights)
    if rule == "depth":
        return [float(depth) for depth in exits]
    if rule == "inverse":
        return [1.0 if depth == last else 1 / depth for depth in exits]
    if rule == "log":
        return [1.0 if depth == last else 1 / (1 + math.log1p(depth)) for depth in exits]
    return [1.0] * len(exits)


def _prefix_weights(run: config.Run) -> list[float]:
    """Return w_m before normalisation, as `config.Loss.matryoshka_weights` defines them."""
    dims = run.model.matryoshka_dims
    if run.loss.matryoshka_weights == "custom":
        return list(run.loss.custom_matryoshka_weights)
    if run.loss.matryoshka_weights == "ml-embed":
        n = range(len(dims), 0, -1)
        return [1 / (k * math.sqrt(dims[-1] / d)) for k, d in zip(n, dims, strict=True)]
    return [1.0] * len(dims)


def ranks_of(run: config.Run, step: int) -> list[tuple[int | None, float]]:
    """Return the step's vocabulary ranks, each with the weight of its loss."""
    ranks = run.model.ranks
    if not ranks:
        return [(None, 1.0)]
    if run.loss.ranks == "all":
        return [(rank, rank / sum(ranks)) for rank in ranks]
    return [(sample_rank(ranks, run.seed, step, RANK_POWER[run.loss.ranks]), 1.0)]


def sample_rank(ranks: tuple[int, ...], seed: int, step: int, power: int = 1) -> int | None:
    """Draw the step's vocabulary rank in proportion to rank^power; None without ranks.

    A function of seed and step alone, so it is equal on all processes and after a resume. ML-Embed
    draws a rank in proportion to itself.
    """
    if not ranks:
        return None
    p = np.array(ranks, dtype=float) ** power
    return int(np.random.default_rng([seed, step, 1]).choice(ranks, p=p / p.sum()))
