"""Losses of other systems, in their own few lines of PyTorch, equal `infonce` with its options."""

import pytest
import torch
import torch.nn.functional as F
from loss_truth import ALL, vectors
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from mlembed_kernels import infonce

WIDTH, DIMS = 61, (5, 16, 61)
GTE = {"directions": ALL, "count_positive_twice": True}
OBJECTIVES = {
    "default": {},
    "gte": GTE,
    "symmetric": {"directions": ALL[:2], "partition_mode": "per_direction"},
    "two_joint": {"directions": ALL[:2], "count_positive_twice": True},
    "documents": {"directions": (ALL[0], ALL[3])},
    "queries": {"directions": (ALL[0], ALL[2])},
}


class Embeddings(nn.Module):
    """Stands where sentence-transformers' losses expect a model: hands on vectors it is given."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return WIDTH


def texts(columns: int, n: int = 31) -> Tensor:
    """[columns, n, WIDTH]: queries, their positives, which resemble them, and hard negatives."""
    x = vectors(columns, n, WIDTH, seed=7)
    x[1] += x[0]
    return x


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor], tolerance: float = 1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    gradients = zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    )
    for a, b in gradients:
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# In float64 the two may differ by rounding only; in fp32 by a few units of logits up to 20.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_equals_sentence_transformers(options, temperature, negatives, dtype, tolerance):
    columns = [x.to(dtype).requires_grad_() for x in texts(2 + negatives)]
    n = len(columns[0])
    model = Embeddings()
    kept = {name: x for name, x in options.items() if name != "count_positive_twice"}
    ranking = MultipleNegativesRankingLoss(model, scale=1 / temperature, **kept)
    matryoshka = MatryoshkaLoss(model, ranking, list(DIMS))
    theirs = matryoshka([{"vectors": x} for x in columns], torch.empty(0))

    candidates = torch.cat(columns[1:])  # positives, then each column of hard negatives
    owner = torch.arange(n).repeat(1 + negatives)
    loss_EM = infonce(
        columns[0][None],
        candidates[None],
        dims=DIMS,
        temperature=temperature,
        owner=owner,
        **options,
    )
    assert_same(loss_EM.sum(), theirs, columns, tolerance)  # uniform weights there are ones


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def test_equals_labse():
    """Additive margin softmax in both directions (arXiv 2007.01852, section 2; scale and margin as
    released), their sum where ours is the mean.
    """
    q, c = (x.requires_grad_() for x in texts(2))
    logits = 100 * (cosines(q, c) - 0.3 * torch.eye(len(q), dtype=q.dtype))
    labels = torch.arange(len(q))
    theirs = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    loss_EM = infonce(
        q[None],
        c[None],
        dims=(WIDTH,),
        temperature=0.01,
        margin=0.3,
        directions=ALL[:2],
        partition_mode="per_direction",
    )
    assert_same(2 * loss_EM.sum(), theirs, [q, c], 1e-11)


@pytest.mark.parametrize("in_batch", [False, True])
def test_equals_ml_embed_hard_loss(in_batch):
    """Cross-entropy over the own positive and the own negatives (2605.15081), at every exit and
    prefix; with in_batch, over all positives and the own negatives.
    """
    n, K = 13, 3
    q, c, own = (vectors(2, n, *k, WIDTH, seed=s) for s, k in ((1, ()), (2, ()), (3, (K,))))
    c += q
    leaves = [x.requires_grad_() for x in (q, c, own)]
    losses = []
    for e in range(2):
        for d in DIMS:
            cos_own = F.cosine_similarity(q[e, :, None, :d], own[e, ..., :d], dim=-1)
            cos = cosines(q[e, :, :d], c[e, :, :d])
            labels = torch.arange(n) if in_batch else torch.zeros(n, dtype=torch.int64)
            first = cos if in_batch else cos.diagonal()[:, None]
            losses.append(F.cross_entropy(torch.cat([first, cos_own], dim=1) / 0.05, labels))
    directions = ("query_to_doc",) if in_batch else ()
    loss_EM = infonce(q, c, dims=DIMS, negatives=own, directions=directions)
    weights = torch.arange(1.0, 2 * len(DIMS) + 1)
    assert_same((loss_EM.flatten() * weights).sum(), (torch.stack(losses) * weights).sum(), leaves)


def test_equals_qwen3_embedding():
    """2506.05176, section 3: the mask m is 0 for the positive's own text and for texts closer than
    s(q_i, d_i) + 0.1. Positives resemble queries here, other texts each other, so that some
    of each kind are masked and some are not.
    """
    n, K, t = 17, 2, 0.05
    q, d, own = (vectors(n, *k, WIDTH, seed=s) for s, k in ((1, ()), (2, ()), (3, (K,))))
    q, own = F.normalize(q, dim=-1), F.normalize(own, dim=-1)
    d = F.normalize(d, dim=-1) + q * torch.linspace(-0.2, 1.5, n)[:, None]
    q[1::3] += q[:-1:3]
    own[::2] += q[::2, None]
    q, d, own = leaves = [x.clone().requires_grad_() for x in (q, d, own)]
    s_qd, s_qq, s_dd = cosines(q, d), cosines(q, q), cosines(d, d)
    s_own = F.cosine_similarity(q[:, None], own, dim=-1)
    positive = s_qd.diagonal()
    other = ~torch.eye(n, dtype=torch.bool)
    total = (positive / t).exp()
    for s, allowed in ((s_qd, other), (s_qq, other), (s_dd, other), (s_own, True)):
        m = (s <= positive[:, None] + 0.1) & allowed
        assert m.any() and (~m & allowed).any()
        total = total + ((s / t).exp() * m).sum(1)
    theirs = (total.log() - positive / t).mean()
    ours = infonce(
        q[None],
        d[None],
        dims=(WIDTH,),
        temperature=t,
        negatives=own[None],
        directions=("query_to_doc", "query_to_query", "doc_to_doc"),
        false_negative_margin=0.1,
    )
    assert_same(ours.sum(), theirs, leaves)
