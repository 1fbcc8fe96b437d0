"""Distillation of similarities: a student's, at every exit and prefix, towards a teacher's.

With cosines s_ij of truncated student vectors and t_ij of whole teacher vectors of any width,

    mse    mean over pairs of (s_ij - t_ij)^2
    kl     mean over queries of sum_j p_ij (log p_ij - log r_ij),
           p_i = softmax_j(t_ij / T'),  r_i = softmax_j(s_ij / T)

Logit distillation as LEALLA has it (arXiv 2302.08387; its formula is not published, this is the
usual one), and the divergence between exits of Matryoshka2d losses where the teacher is the model's
own deepest exit. No gradient flows to the teacher.

KL splits into -H(p_i), log-partition of the student (`pairwise_lse`), and -sum_j p_ij s_ij / T: the
last, like the squared difference, is a sum over the same tiles as the contrastive loss, with one
matrix beside it, the teacher's, made anew for a chunk of rows at a time. FLOPs: 2 Q C D_t more a
pass than the loss.
"""

import torch
from torch import Tensor

from .._dispatch import check_impl, use_triton
from ._checks import check_counts, check_vectors, scale_of
from .cosine import unit
from .pairwise_lse import NOTHING, WORKSPACE, pairwise_lse, present

KINDS = ("mse", "kl")


def distill_ref(
    q: Tensor,
    c: Tensor,
    teacher_q: Tensor,
    teacher_c: Tensor,
    *,
    dims: tuple[int, ...],
    kind: str = "mse",
    temperature: float | Tensor = 0.05,
    teacher_temperature: float = 0.05,
    query_counts: Tensor | None = None,
    cand_counts: Tensor | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """The specification: every matrix, in fp32 or wider. Arguments as in `distill`."""
    (E, Q, _), C = q.shape, c.shape[1]
    scale_EM = scale_of(temperature, q, E, len(dims))
    here_q = present(query_counts, E, Q, q.device)
    here_c = present(cand_counts, E, C, q.device)
    losses = []
    with torch.autocast(q.device.type, enabled=False):
        # What has left is not looked at, whatever it holds.
        q = q.to(scale_EM.dtype).masked_fill(~here_q[..., None], 0)
        c = c.to(scale_EM.dtype).masked_fill(~here_c[..., None], 0)
        t = unit(teacher_q.detach().to(q.dtype)) @ unit(teacher_c.detach().to(q.dtype)).T
        for e in range(E):
            kept = here_q[e, :, None] & here_c[e, None, :]
            log_p = (t / teacher_temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)
            for m, d in enumerate(dims):
                s = unit(q[e, :, :d]) @ unit(c[e, :, :d]).T
                if kind == "mse":
                    losses.append((s - t).where(kept, 0).square().sum() / kept.sum().clamp(min=1))
                    continue
                log_r = (s * scale_EM[e, m]).masked_fill(~kept, NOTHING).log_softmax(-1)
                rows = (log_p.exp() * (log_p - log_r)).where(kept, 0).sum(-1)
                losses.append(rows.sum() / kept.any(-1).sum().clamp(min=1))
    return torch.stack(losses).view(E, len(dims))


def distill(
    q: Tensor,
    c: Tensor,
    teacher_q: Tensor,
    teacher_c: Tensor,
    *,
    dims: tuple[int, ...],
    kind: str = "mse",
    temperature: float | Tensor = 0.05,
    teacher_temperature: float = 0.05,
    query_counts: Tensor | None = None,
    cand_counts: Tensor | None = None,
    workspace: int = WORKSPACE,
    impl: str = "auto",
) -> Tensor:
    """loss_EM [E, M] (fp32; float64 for float64 inputs), differentiable in q, c and temperature.

    Args:
        q, c: [E, Q, D], [E, C, D] raw student vectors.
        teacher_q, teacher_c: [Q, Dt], [C, Dt] raw teacher vectors, of the same dtype.
        dims: prefix widths of the student, rising, the last at most D.
        kind: "mse" or "kl".
        temperature: T, of "kl": a number, or a tensor that expands to [E, M].
        teacher_temperature: T', of "kl".
        query_counts, cand_counts: int [E]: only so many leading rows are present at exit e.
        workspace: bytes that matrices of pairs may take at any time.
        impl: "triton" (CUDA; fp16, bf16, fp32), "reference"; "auto" is triton where it can be.

    Raises:
        ValueError: any argument other than the above.
    """
    check_impl(impl)
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    check_vectors(q, [c], dims, None, None, impl)
    check_vectors(teacher_q[None], [teacher_c[None]], teacher_q.shape[1:], None, None, impl)
    (E, Q, _), C = q.shape, c.shape[1]
    if teacher_q.shape[0] != Q or teacher_c.shape[0] != C or teacher_q.dtype != q.dtype:
        raise ValueError(
            f"teacher_q, teacher_c: expected [{Q}, Dt] and [{C}, Dt] of {q.dtype}, got "
            f"{list(teacher_q.shape)} and {list(teacher_c.shape)} of {teacher_q.dtype}"
        )
    if not teacher_temperature > 0:
        raise ValueError(
            f"teacher_temperature: expected a positive number, got {teacher_temperature}"
        )
    check_counts(E, q.device, query_counts=query_counts, cand_counts=cand_counts)
    if not use_triton(impl, q):
        return distill_ref(
            q,
            c,
            teacher_q,
            teacher_c,
            dims=dims,
            kind=kind,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            query_counts=query_counts,
            cand_counts=cand_counts,
        )
    from ._distill_op import distill_op  # imports triton, which not every platform has

    scale_EM = scale_of(temperature, q, E, len(dims))
    sums_EMQ, entropy_EQ = distill_op(
        q,
        c,
        teacher_q.detach(),
        teacher_c.detach(),
        query_counts,
        cand_counts,
        list(dims),
        kind,
        teacher_temperature,
        workspace,
    )
    n_q = present(query_counts, E, Q, q.device).sum(-1, keepdim=True)
    n_c = present(cand_counts, E, C, q.device).sum(-1, keepdim=True)
    if kind == "mse":
        return sums_EMQ.sum(-1) / (n_q * n_c).clamp(min=1)
    log_EMQ = pairwise_lse(
        q,
        c,
        dims=dims,
        scale=scale_EM,
        row_counts=query_counts,
        col_counts=cand_counts,
        workspace=workspace,
        impl=impl,
    )[0].clamp(min=NOTHING)
    rows_EMQ = log_EMQ - scale_EM[..., None] * sums_EMQ - entropy_EQ[:, None]
    here = present(query_counts, E, Q, q.device) & (n_c > 0)
    return rows_EMQ.where(here[:, None], 0.0).sum(-1) / here.sum(-1, keepdim=True).clamp(min=1)
