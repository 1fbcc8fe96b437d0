"""Distillation of a teacher's scores, usually a cross-encoder's, which the data hold.

With cosines s of truncated vectors, temperature t, the teacher's scores T divided by
`score_temperature`, a query's positive 0 and its own hard negatives 1..K, the term of a query is

    kl       sum_k p_k log(p_k / r_k),  p = softmax(T),  r = softmax(s / t)
    margin   mean_k ((s_0 - s_k) - (T_0 - T_k))^2          (MarginMSE, arXiv 2010.02666)

and loss_EM is the mean over queries whose positive and at least one negative have scores; of these
queries negatives without a score are left out. Nothing is gathered: a query's documents are all of
its own process.

Letters: E exits, M prefixes, N own texts, D width, Q own queries, C = 1 + K documents of a query.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import cosine
from mlembed_kernels.similarity.pairwise_lse import NOTHING

from ... import config
from ...data import sources
from ...data.collate import Batch
from ...data.streams import name_of
from ...data.tables import Table
from ...runtime.distributed import World
from .loss import pairs_of, shares_of


def check(run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source]) -> None:
    """Check that the data hold scores for the term to learn from.

    Raises:
        ValueError: no source has scores; a source has no scores and the run has no other term.
    """
    scored = {table.name: table.scored > 0 for table in tables}
    scored |= {name_of(source): sources.has_teacher_scores(source) for source in streams}
    without = [name for name, has in scored.items() if not has]
    alone = run.distill.learns == run.distill.scores
    if len(without) == len(scored) or without and alone:
        raise ValueError(
            "distill.scores: expected a teacher's scores of positives and negatives (columns "
            f"pos_scores and neg_scores), got none in {', '.join(without)}"
        )


def table(exits_END: Tensor, batch: Batch, run: config.Run, world: World) -> Tensor:
    """Return loss_EM [E, M] of this process's texts, fp32 (float64 of float64).

    It is 0 for a batch of a source without scores. The mean over processes is the loss of the whole
    batch on one process, and so is the mean of gradients.

    Args:
        exits_END: this process's texts, in the order of `batch.packs`. batch: on their device.
    """
    pairs = pairs_of(exits_END, batch, run, world)
    scale_EM, cfg = pairs.common["scale"], run.distill
    if batch.teacher_scores is None:
        return scale_EM * 0 * exits_END.sum()
    places_QC = torch.cat([batch.target[:, None], batch.negatives], dim=1)
    at_QC = places_QC.clamp(min=0)
    teacher_QC = batch.teacher_scores[at_QC].masked_fill(places_QC < 0, torch.nan)
    known_QC, teacher_QC = teacher_QC.isfinite(), teacher_QC / cfg.score_temperature
    cos_EMQC = cosine(pairs.queries, pairs.docs[:, at_QC], dims=pairs.common["dims"])
    if cfg.score_form == "kl":
        teacher_QC = teacher_QC.to(cos_EMQC).masked_fill(~known_QC, NOTHING).log_softmax(-1)
        z_EMQC = (cos_EMQC * scale_EM[..., None, None]).masked_fill(~known_QC, NOTHING)
        student_EMQC = z_EMQC.log_softmax(-1)
        target_EMQC = teacher_QC.expand_as(student_EMQC)
        loss_EMQ = F.kl_div(student_EMQC, target_EMQC, reduction="none", log_target=True).sum(-1)
    else:
        known_QK = known_QC[:, 1:] & known_QC[:, :1]
        want_QK = (teacher_QC[:, :1] - teacher_QC[:, 1:]).to(cos_EMQC)
        gap_EMQK = cos_EMQC[..., :1] - cos_EMQC[..., 1:] - want_QK
        square_EMQK = gap_EMQK.masked_fill(~known_QK, 0).square()
        loss_EMQ = square_EMQK.sum(-1) / known_QK.sum(-1).clamp(min=1)
    share_EQ = shares_of(batch, pairs, run, batch.has_teacher_scores)[:, None]
    return (loss_EMQ.masked_fill(share_EQ == 0, 0) * share_EQ).sum(-1)
