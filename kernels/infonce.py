"""Contrastive loss over every exit and every prefix.

For exit e, prefix width d and temperature t, with cosines of *truncated* vectors,

    s_ij = q_i[:d] . c_j[:d] / (|q_i[:d]| |c_j[:d]|)
    loss_ed = mean_i ( log sum_j m_ij exp(s_ij / t)  -  s_i,target(i) / t )

the mean over the queries that have a positive. m_ij = 0 removes a false negative: a candidate
that carries the query's own id but is not its positive (another copy of the same text, or another
translation of the same sentence). InfoNCE as in GTE (arXiv 2308.03281, section 3.1), nested as in
MRL and ML-Embed (arXiv 2605.15081).

The reference materialises one [Q, C] matrix per exit and prefix: E M Q C logits and
2 E Q C sum(dims) FLOPs forward, twice that backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLS = ("auto", "reference")


def infonce_ref(
    q: Tensor,
    c: Tensor,
    *,
    dims: tuple[int, ...],
    temperature: float = 0.05,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    cand_ids: Tensor | None = None,
) -> Tensor:
    """The specification. Arguments as in `infonce`; float64 in, float64 out; otherwise fp32 out."""
    Q, C = q.shape[1], c.shape[1]
    if target is None:
        target = torch.arange(Q, device=q.device)
    has_positive = target >= 0
    target = target.clamp(min=0)
    dropped = torch.zeros(Q, C, dtype=torch.bool, device=q.device)
    if query_ids is not None and cand_ids is not None:
        dropped = query_ids[:, None] == cand_ids[None, :]
        dropped = dropped & (torch.arange(C, device=q.device) != target[:, None])
    # Half precision has a step of 0.06 at logit 16: products and sums are taken in fp32 or wider.
    wide = torch.promote_types(q.dtype, torch.float32)
    losses = []
    with torch.autocast(q.device.type, enabled=False):
        for exit_q, exit_c in zip(q.to(wide), c.to(wide), strict=True):
            for d in dims:
                unit_q, unit_c = (
                    F.normalize(exit_q[:, :d], dim=-1),
                    F.normalize(exit_c[:, :d], dim=-1),
                )
                logits = (unit_q @ unit_c.T / temperature).masked_fill(dropped, -torch.inf)
                positive = logits.gather(1, target[:, None])[:, 0]
                rows = (logits.logsumexp(-1) - positive).masked_fill(~has_positive, 0.0)
                losses.append(rows.sum() / has_positive.sum().clamp(min=1))
    return torch.stack(losses).view(q.shape[0], len(dims))


def infonce(
    q: Tensor,
    c: Tensor,
    *,
    dims: tuple[int, ...],
    temperature: float = 0.05,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    cand_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """InfoNCE at every exit and prefix -> loss_EM [E, M] (fp32; float64 for float64 inputs).

    Args:
        q: [E, Q, D] raw (not normalised) query vectors, one slab per exit; fp16, bf16, fp32, fp64.
        c: [E, C, D] candidates: positives, other queries' positives, hard negatives.
        dims: prefix widths, rising, the last at most D.
        temperature: t above, positive.
        target: int [Q], the column of each query's positive; -1 = none, the row counts for nothing.
            By default row i's positive is column i.
        query_ids, cand_ids: int [Q], int [C], both or neither: equal ids are never negatives.
        impl: "reference"; "auto" is the same until a kernel beats it.

    Raises:
        ValueError: any argument other than the above.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if q.ndim != 3 or c.ndim != 3 or q.shape[::2] != c.shape[::2]:
        raise ValueError(
            f"q, c: expected [E, Q, D] and [E, C, D], got {list(q.shape)} and {list(c.shape)}"
        )
    if q.dtype != c.dtype or q.device != c.device:
        raise ValueError(
            "q, c: expected one dtype and device, got "
            f"{q.dtype} on {q.device} and {c.dtype} on {c.device}"
        )
    if not q.is_floating_point():
        raise ValueError(f"q, c: expected a floating dtype, got {q.dtype}")
    E, Q, D = q.shape
    C = c.shape[1]
    if not dims or list(dims) != sorted(set(dims)) or dims[0] < 1 or dims[-1] > D:
        raise ValueError(f"dims: expected rising widths in 1..{D}, got {dims}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if target is None and Q > C:
        raise ValueError(f"target: needed when Q > C, got none with Q = {Q}, C = {C}")
    if target is not None and target.shape != (Q,):
        raise ValueError(f"target: expected [{Q}], got {list(target.shape)}")
    # Looking into a device tensor would wait for the device; there, gather's own check remains.
    if (
        target is not None
        and target.device.type == "cpu"
        and target.numel()
        and (target.max() >= C or target.min() < -1)
    ):
        raise ValueError(f"target: expected -1..{C - 1}, got {target.min()}..{target.max()}")
    if (query_ids is None) != (cand_ids is None):
        raise ValueError("query_ids, cand_ids: expected both or neither, got one")
    if (
        query_ids is not None
        and cand_ids is not None
        and (query_ids.shape != (Q,) or cand_ids.shape != (C,))
    ):
        raise ValueError(
            f"query_ids, cand_ids: expected [{Q}] and [{C}], "
            f"got {list(query_ids.shape)} and {list(cand_ids.shape)}"
        )
    return infonce_ref(
        q,
        c,
        dims=dims,
        temperature=temperature,
        target=target,
        query_ids=query_ids,
        cand_ids=cand_ids,
    )
