"""What is optimised: the 3D Matryoshka objective, one number per exit and prefix, weighted.

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
    clustering,     L over the query's hard negatives alone, as ML-Embed's released code
    classification  (arXiv 2605.15081) has it: others of a batch may be of its class
    sts             log(1 + sum over pairs with y_i > y_j of exp((s_j - s_i) / t)), s_i of the pair
                    that is scored y_i (CoSENT, doi 10.1109/TASLP.2024.3402087)

`loss.hard_negatives`: n_ik are documents like others, N_i = sum over all (shared); only positives
are, and n_ik join N_i of their own query (own); or they have a softmax of their own, whose loss is
added (separate: ML-Embed's `inbatch` + `hard`).

Letters: E exits, M prefixes, N texts, D width, Q queries of this process, K hard negatives.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import cosine
from mlembed_kernels.similarity.infonce import softmax_loss
from mlembed_kernels.similarity.pairwise_lse import NOTHING

from ... import config
from ...data.collate import Batch
from ...runtime.distributed import World, gather
from .bank import Bank
from .candidates import Pairs, _in_batch, _joint


def loss_table(
    exits_END: Tensor,
    batch: Batch,
    run: config.Run,
    world: World,
    exits: Sequence[int] | None = None,
    bank: Bank | None = None,
) -> Tensor:
    """loss_EM [E, M] of this process's texts, fp32 (float64 of float64), by the batch's task.

    Candidates are those of all processes. At an exit only groups that run as deep take part.
    Queries without hard negatives have no part in a softmax over these alone: it is a mean over the
    queries that have any, all others' loss is 0.

    Args:
        exits_END: this process's texts, in the order of `batch.packs`.
        batch: whose ids (for all processes) tell false negatives apart.
        exits: their depths; the configured ones by default.
        bank: whose documents of the batch's source are negatives of its queries as well (retrieval
            and bitext). Those of all processes are added to it, for the caller to commit or to
            discard: with hard negatives of one's own only positives, as these alone are candidates
            of other queries. Batches of other tasks neither read it nor add to it.

    The mean over processes is the loss of the whole batch on one process, and so, as gathering and
    passing around carry gradients, is the mean of their gradients.

    Raises:
        ValueError: a clustering or classification batch without hard negatives, an sts batch
            without scores.
    """
    exits = run.model.exits if exits is None else exits
    exits_END = exits_END[:, batch.place.to(exits_END.device)]
    queries, docs = exits_END[:, : len(batch.target)], exits_END[:, len(batch.target) :]
    pairs = _pairs(batch, run, world, exits, exits_END)
    if batch.task == "sts":
        return _cosent(queries, docs[:, pairs.target], batch, pairs, exits)
    if batch.task in ("clustering", "classification"):
        return _own_negatives_only(queries, docs, batch, pairs, exits)
    return _contrastive(queries, docs, batch, run, pairs, exits, bank)


def _pairs(
    batch: Batch, run: config.Run, world: World, exits: Sequence[int], like: Tensor
) -> Pairs:
    """What the batch says of all texts, on the vectors' device."""
    device, dims = like.device, run.model.matryoshka_dims
    query_sizes, doc_sizes = [len(batch.target)] * world.size, list(batch.doc_sizes)
    scale_EM = torch.full(
        (len(exits), len(dims)),
        1 / (batch.temperature or run.loss.temperature),
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


# ---- one softmax ----


def _softmax(parts: list[Tensor], z_EMQ: Tensor, share_EQ: Tensor, times: float = 1.0) -> Tensor:
    """loss_EM = sum_i share_i (log(k exp(z_i) + N_i) - z_i), log N [E, M, Q] in parts.

    share_EQ: see `_shares`. times: k, how often the sums contain the positive.
    """
    loss_EMQ, there_EQ = softmax_loss(parts, z_EMQ, times), share_EQ > 0
    return (loss_EMQ.where(there_EQ[:, None], 0.0) * share_EQ[:, None]).sum(-1)


def _shares(batch: Batch, pairs: Pairs, exits: Sequence[int], only: Tensor | None = None) -> Tensor:
    """[E, Q], what each query of this process weighs, so that the mean over processes is the mean
    over the queries of all processes that are there at the exit (0: it is not).

    only: bool [queries of all processes], which of them count at all.
    """
    there_EQ = batch.query_depths[None] >= torch.tensor(exits)[:, None]
    there_EQ = there_EQ if only is None else there_EQ & only
    share_EQ = pairs.where.size * there_EQ / there_EQ.double().sum(1, keepdim=True).clamp(min=1)
    own = share_EQ.split(len(batch.target), dim=1)[pairs.where.rank]
    return own.to(pairs.common["scale"])


def _hard(queries: Tensor, docs: Tensor, batch: Batch, pairs: Pairs) -> Tensor | None:
    """Log-partition [E, M, Q] of each query's own hard negatives; None where this process has none.
    They run as deep as their query: where that is, they are."""
    if not batch.negatives.shape[1]:
        return None
    negatives = batch.negatives.to(queries.device)
    cos_EMQK = cosine(queries, docs[:, negatives.clamp(min=0)], dims=pairs.common["dims"])
    z_EMQK = cos_EMQK * pairs.common["scale"][..., None, None]
    return z_EMQK.masked_fill(negatives < 0, NOTHING).logsumexp(-1)


# ---- clustering, classification ----


def _own_negatives_only(
    queries: Tensor, docs: Tensor, batch: Batch, pairs: Pairs, exits: Sequence[int]
) -> Tensor:
    """One softmax over the positive and the query's own hard negatives. Nothing is gathered."""
    if not batch.has_negatives.any():
        raise ValueError(
            f"{batch.source or 'batch'}: expected hard negatives, which are all that a query of "
            f"task {batch.task} is told apart from, got a batch without any"
        )
    dims, scale_EM = pairs.common["dims"], pairs.common["scale"]
    cos_EMQ = cosine(queries, docs[:, pairs.target, None], dims=dims)[..., 0]
    hard_EMQ = _hard(queries, docs, batch, pairs)
    parts = [torch.full_like(cos_EMQ, NOTHING) if hard_EMQ is None else hard_EMQ]
    share_EQ = _shares(batch, pairs, exits, batch.has_negatives)
    return _softmax(parts, cos_EMQ * scale_EM[..., None], share_EQ)


# ---- retrieval, bitext ----


def _contrastive(
    queries: Tensor,
    docs: Tensor,
    batch: Batch,
    run: config.Run,
    pairs: Pairs,
    exits: Sequence[int],
    bank: Bank | None,
) -> Tensor:
    """In-batch softmaxes, and what hard negatives of one's own add to them or have beside them.

    LaBSE's code adds up its two directions: with `normalise_weights` False, which is for the
    published losses' scale, bitext is the sum and not the mean.
    """
    bitext, loss = batch.task == "bitext", run.loss
    symmetric = bitext or loss.directions != "query_to_doc"
    share_EQ = _shares(batch, pairs, exits)
    hard_EMQ, owner = None, batch.owner.to(queries.device)
    if loss.hard_negatives != "shared":
        hard_EMQ = _hard(queries, docs, batch, pairs)
        docs, pairs = docs[:, pairs.target], pairs.of_positives()
        owner = pairs.target
    times = 1.0
    if loss.directions == "gte" and not bitext:
        logs, cos_EMQ = _joint(queries, docs, owner, pairs)
        times = 2.0 if loss.count_positive_twice else 1.0
    else:
        logs, cos_EMQ = _in_batch(queries, docs, batch.source, run, pairs, symmetric, bank)
    margin = loss.margin if bitext else 0.0
    z_EMQ = (cos_EMQ - margin) * pairs.common["scale"][..., None]
    beside = loss.hard_negatives == "separate" and not bitext
    if hard_EMQ is not None and not beside:
        logs[0].append(hard_EMQ)
    loss_EM = torch.stack([_softmax(parts, z_EMQ, share_EQ, times) for parts in logs]).sum(0)
    if loss.normalise_weights or not bitext:
        loss_EM = loss_EM / len(logs)
    if hard_EMQ is not None and beside:
        share_EQ = _shares(batch, pairs, exits, batch.has_negatives)
        loss_EM = loss_EM + _softmax([hard_EMQ], z_EMQ, share_EQ)
    return loss_EM


# ---- sts ----


def _cosent(
    queries: Tensor, docs: Tensor, batch: Batch, pairs: Pairs, exits: Sequence[int]
) -> Tensor:
    """CoSENT over the scored pairs of all processes, the same number on each of them.

    In the order of scores the sum is sum_i exp(-z_i) sum_j exp(z_j) over the j that come before all
    that are scored as i is: cumulative sums, no matrix of pairs.
    """
    if batch.scores is None:
        raise ValueError(f"{batch.source or 'batch'}: expected scores for task sts, got none")
    dims, scale_EM = pairs.common["dims"], pairs.common["scale"]
    cos_EMQ = cosine(queries, docs[:, :, None], dims=dims)[..., 0]
    scores_E1Q = batch.scores.to(cos_EMQ).expand(len(exits), 1, -1)
    mine = torch.cat([cos_EMQ, scores_E1Q], dim=1).transpose(1, 2)
    told = torch.cat(gather(mine, [len(batch.target)] * pairs.where.size), dim=1)
    losses = []
    for e, depth in enumerate(exits):
        there = (batch.query_depths >= depth).nonzero()[:, 0].to(told.device)
        cos_nM, scores = told[e, there, :-1], told[e, there, -1].detach()
        scores, order = scores.sort(stable=True)
        z_Mn = cos_nM[order].T * scale_EM[e][:, None]
        before = F.pad(z_Mn.logcumsumexp(1), (1, 0), value=NOTHING)
        lower = torch.searchsorted(scores, scores)
        logs = before[:, lower] - z_Mn
        losses.append(F.pad(logs, (1, 0)).logsumexp(1))
    return torch.stack(losses)


# ---- weights and ranks ----


def weights(run: config.Run, exits: Sequence[int] | None = None) -> Tensor:
    """w_e w_m as fp32 [E, M] of the exits that have a loss (by default all).

    They sum to one, or with `normalise_weights` False are as their rules have them, which makes the
    loss's scale depend on how many prefixes are listed, as published losses' does; `uniform` is a
    mean over exits even so, as in ML-Embed's released code (arXiv 2605.15081).

    Raises:
        ValueError: custom weights that are all 0 at these exits.
    """
    exits = run.model.exits if exits is None else exits
    w_E, w_M = torch.tensor(_exit_weights(run, exits)), torch.tensor(_prefix_weights(run))
    if not w_E.sum() > 0:
        raise ValueError(
            f"loss.custom_exit_weights: expected one above 0 among the exits {tuple(exits)} that "
            f"have a loss, got {w_E.tolist()}"
        )
    if run.loss.normalise_weights or run.loss.exit_weights == "uniform":
        w_E = w_E / w_E.sum()
    if run.loss.normalise_weights:
        w_M = w_M / w_M.sum()
    return torch.outer(w_E, w_M)


def _exit_weights(run: config.Run, exits: Sequence[int]) -> list[float]:
    """Before they are normalised. The last layer's is 1 where others' fall with their depth l."""
    rule, last = run.loss.exit_weights, run.model.exits[-1]
    if rule == "custom":
        given = dict(zip(run.model.exits, run.loss.custom_exit_weights, strict=True))
        return [given[depth] for depth in exits]
    if rule == "depth":
        return [float(depth) for depth in exits]
    if rule == "inverse":
        return [1.0 if depth == last else 1 / depth for depth in exits]
    if rule == "log":
        return [1.0 if depth == last else 1 / (1 + math.log1p(depth)) for depth in exits]
    return [1.0] * len(exits)


def _prefix_weights(run: config.Run) -> list[float]:
    """Before they are normalised. ML-Embed's: w_m = 1 / (n sqrt(D / d)), n = 1 for the full width D
    and counting up towards the smallest prefix."""
    dims = run.model.matryoshka_dims
    if run.loss.matryoshka_weights == "custom":
        return list(run.loss.custom_matryoshka_weights)
    if run.loss.matryoshka_weights == "ml-embed":
        n = range(len(dims), 0, -1)
        return [1 / (k * math.sqrt(dims[-1] / d)) for k, d in zip(n, dims, strict=True)]
    return [1.0] * len(dims)


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
