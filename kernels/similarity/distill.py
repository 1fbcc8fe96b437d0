"""Distillation of similarities: a student's, at every exit and prefix, to a teacher's.

With cosines s_ij of truncated student vectors and t_ij of whole teacher vectors of any width,

    mse    mean over pairs of (s_ij - t_ij)^2
    kl     mean over queries of sum_j p_ij (log p_ij - log r_ij),
           p_i = softmax_j(t_ij / T'),  r_i = softmax_j(s_ij / T)

This is logit distillation as in LEALLA (arXiv 2302.08387, which does not print its formula; this is
the usual one), and, with the model's own deepest exit as teacher, the divergence between exits of
Matryoshka2d losses. No gradient flows to the teacher.

KL is -H(p_i) + the student's log-sum-exp (`pairwise_lse`) - sum_j p_ij s_ij / T. The last term,
like the squared difference, is a sum over the tiles of the contrastive loss, and reads one more
matrix, the teacher's, which is computed for a chunk of rows at a time. FLOPs: 2 Q C D_t a pass more
than the loss.
"""

from typing import Any

import torch
from torch import Tensor

from .._dispatch import check_impl, reference_of, use_triton
from ._checks import check_integers, check_vectors, scale_of
from ._mask import present
from .cosine import unit
from .pairwise_lse import NOTHING, WORKSPACE, pairwise_lse

KINDS = ("mse", "kl")


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
    """Return loss_EM [E, M] (fp32; float64 for float64 inputs).

    Differentiable in q, c and temperature.

    Args:
        q, c: [E, Q, D], [E, C, D] raw student vectors.
        teacher_q, teacher_c: [Q, Dt], [C, Dt] raw teacher vectors, of the same dtype.
        dims: prefix widths of the student, rising, the last at most D.
        kind: "mse" or "kl".
        temperature: T, of "kl": a number, or a tensor that expands to [E, M].
        teacher_temperature: T', of "kl".
        query_counts, cand_counts: int [E], how many leading rows are present at exit e.
        workspace: bytes that matrices of pairs may take at any time.
        impl: "triton" (CUDA; fp16, bf16, fp32), "reference"; "auto" is triton where it can run.

    Raises:
        ValueError: an argument that is not as described.
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
        raise ValueError(f"teacher_temperature: expected above 0, got {teacher_temperature}")
    check_integers(E, q.device, query_counts=query_counts, cand_counts=cand_counts)
    scale_EM = scale_of(temperature, q, E, len(dims))
    q_in = present(query_counts, E, Q, q.device)
    c_in = present(cand_counts, E, C, q.device)
    teacher_q, teacher_c = teacher_q.detach(), teacher_c.detach()
    if not use_triton(impl, q):
        teachers = teacher_q, teacher_c, teacher_temperature
        return _dense(q, c, *teachers, dims, kind, scale_EM, q_in, c_in)
    from ._distill_op import distill_op  # imports triton, which not every platform has

    counts = query_counts, cand_counts
    sums_EMQ, entropy_EQ = distill_op(
        q, c, teacher_q, teacher_c, *counts, list(dims), kind, teacher_temperature, workspace
    )
    n_q, n_c = (inside.sum(-1, keepdim=True) for inside in (q_in, c_in))
    if kind == "mse":
        return sums_EMQ.sum(-1) / (n_q * n_c).clamp(min=1)
    how: dict[str, Any] = {"dims": dims, "scale": scale_EM, "workspace": workspace, "impl": impl}
    lse_EMQ = pairwise_lse(q, c, row_counts=query_counts, col_counts=cand_counts, **how)[0]
    rows_EMQ = lse_EMQ.clamp(min=NOTHING) - scale_EM[..., None] * sums_EMQ - entropy_EQ[:, None]
    counted = q_in & (n_c > 0)
    return rows_EMQ.where(counted[:, None], 0.0).sum(-1) / counted.sum(-1, True).clamp(min=1)


distill_ref = reference_of(distill)


def _dense(
    q: Tensor,
    c: Tensor,
    teacher_q: Tensor,
    teacher_c: Tensor,
    teacher_temperature: float,
    dims: tuple[int, ...],
    kind: str,
    scale_EM: Tensor,
    q_in: Tensor,
    c_in: Tensor,
) -> Tensor:
    """Return what `distill` does, by every matrix in fp32 or wider."""
    losses = []
    with torch.autocast(q.device.type, enabled=False):
        # Vectors that have left are not read, even if they hold NaN.
        q = q.to(scale_EM.dtype).masked_fill(~q_in[..., None], 0)
        c = c.to(scale_EM.dtype).masked_fill(~c_in[..., None], 0)
        t = unit(teacher_q.to(q.dtype)) @ unit(teacher_c.to(q.dtype)).T
        for e in range(len(q)):
            counted = q_in[e, :, None] & c_in[e, None, :]
            log_p = (t / teacher_temperature).masked_fill(~counted, -torch.inf).log_softmax(-1)
            for m, d in enumerate(dims):
                s = unit(q[e, :, :d]) @ unit(c[e, :, :d]).T
                if kind == "mse":
                    squares = (s - t).where(counted, 0).square()
                    losses.append(squares.sum() / counted.sum().clamp(min=1))
                    continue
                log_r = (s * scale_EM[e, m]).masked_fill(~counted, NOTHING).log_softmax(-1)
                rows = (log_p.exp() * (log_p - log_r)).where(counted, 0).sum(-1)
                losses.append(rows.sum() / counted.any(-1).sum().clamp(min=1))
    return torch.stack(losses).view(scale_EM.shape)
