"""The loss and its parts in float64, pair by pair, from the formulas alone; test inputs; and how
close an implementation has to be.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where impl="triton" runs
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
impls = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=triton)])
# Triton's interpreter multiplies the bits of bf16 as integers.
HALVES = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
Lists = list[list[bool]]

# ---- the truth ----


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return [R, S] of rows with rows; a vector of length 0 is not normalised."""

    def unit(x: Tensor) -> Tensor:
        squares = (x * x).sum(-1, keepdim=True)
        dead = squares <= 1e-24
        return x / torch.where(dead, 1.0, squares.where(~dead, 1.0)).sqrt()

    return unit(a) @ unit(b).T


def present(counts: Tensor | None, E: int, n: int) -> Lists:
    """Return [e][text]."""
    many = [n] * E if counts is None else counts.tolist()
    return [[i < many[e] for i in range(n)] for e in range(E)]


def cosine(x: Tensor, y: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    E, R, K, _ = y.shape
    table = [
        cosines(x[e, i : i + 1, :d], y[e, i, :, :d])[0]
        for e in range(E)
        for d in dims
        for i in range(R)
    ]
    return torch.stack(table).view(E, len(dims), R, K) if R else x.new_zeros(E, len(dims), 0, K)


def log_sums(z: Tensor, keep: Tensor) -> Tensor:
    """Return LSEs over each row's entries in `keep`; -inf, a constant, for empty rows."""
    empty = z.new_tensor(-math.inf)
    logs = [row[k].logsumexp(0) if k.any() else empty for row, k in zip(z, keep, strict=True)]
    return torch.stack(logs) if logs else z.new_zeros(0)


def pairwise_lse(
    x: Tensor,
    y: Tensor,
    *,
    dims: tuple[int, ...],
    scale: Tensor,
    positive: Tensor | None = None,
    row_keys: Sequence[Tensor] = (),
    col_keys: Sequence[Tensor] = (),
    ceiling: Tensor | None = None,
    row_counts: Tensor | None = None,
    col_counts: Tensor | None = None,
    columns: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    E, R, S, W = x.shape[0], x.shape[1], y.shape[1], dims[-1]
    x_in, y_in = present(row_counts, E, R), present(col_counts, E, S)
    own = [-1] * R if positive is None else positive.tolist()
    keys = [(a.tolist(), b.tolist()) for a, b in zip(row_keys, col_keys, strict=True)]
    highest = [[math.inf] * R] * E if ceiling is None else ceiling.tolist()
    full = [cosines(x[e, :, :W], y[e, :, :W]).tolist() for e in range(E)]

    def too_similar(i: int, j: int) -> bool:
        for e in reversed(range(E)):
            if x_in[e][i] and y_in[e][j] and highest[e][i] < math.inf:
                return full[e][i][j] > highest[e][i]
        return False

    def dropped(i: int, j: int) -> bool:
        return own[i] == j or any(a[i] == b[j] for a, b in keys) or too_similar(i, j)

    drop = [[dropped(i, j) for j in range(S)] for i in range(R)]
    rows, cols, cos = [], [], []
    for e in range(E):
        keep = [[x_in[e][i] and y_in[e][j] and not drop[i][j] for j in range(S)] for i in range(R)]
        keep_RS = torch.tensor(keep, dtype=torch.bool).view(R, S)
        for m, d in enumerate(dims):
            cos_RS = cosines(x[e, :, :d], y[e, :, :d])
            z_RS = cos_RS * scale[e, m]
            rows.append(log_sums(z_RS, keep_RS))
            cols.append(log_sums(z_RS.T, keep_RS.T))
            known = [0 <= j < S and x_in[e][i] and y_in[e][j] for i, j in enumerate(own)]
            zero = x.new_zeros(())
            with_own = [cos_RS[i, own[i]] if yes else zero for i, yes in enumerate(known)]
            cos.append(torch.stack(with_own) if R else x.new_zeros(0))
    M = len(dims)
    return (
        torch.stack(rows).view(E, M, R),
        torch.stack(cols).view(E, M, S) if columns else None,
        None if positive is None else torch.stack(cos).view(E, M, R),
    )


def infonce(
    q: Tensor,
    c: Tensor | Sequence[Tensor],
    *,
    dims: tuple[int, ...],
    temperature: float | Tensor = 0.05,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    count_positive_twice: bool = False,
    margin: float = 0.0,
    query_ids: Tensor | None = None,
    cand_ids: Tensor | None = None,
    owner: Tensor | None = None,
    false_negative_margin: float | None = None,
    query_counts: Tensor | None = None,
    cand_counts: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    E, Q, _ = q.shape
    M, W = len(dims), dims[-1]
    pieces = [c] if isinstance(c, Tensor) else list(c)
    c = torch.cat(pieces, dim=1)
    counts = [None] * len(pieces) if cand_counts is None else cand_counts
    counts = [counts] if isinstance(counts, Tensor) else counts
    of_pieces = [present(n, E, x.shape[1]) for x, n in zip(pieces, counts, strict=True)]
    c_in = [[yes for piece in of_pieces for yes in piece[e]] for e in range(E)]
    q_in = present(query_counts, E, Q)
    C = c.shape[1]
    t = list(range(Q)) if target is None else target.tolist()
    qid = [f"query {i}" for i in range(Q)] if query_ids is None else query_ids.tolist()
    cid = [f"candidate {j}" for j in range(C)] if cand_ids is None else cand_ids.tolist()
    drawn_for = [-1] * C if owner is None else owner.tolist()
    inverse_EM = 1 / torch.as_tensor(temperature, dtype=torch.float64).expand(E, M)
    k = 2.0 if count_positive_twice else 1.0
    qs, cs = q.detach()[..., :W], c.detach()[..., :W]
    full = [
        {
            name: cosines(a[e], b[e]).tolist()
            for name, a, b in (("qc", qs, cs), ("qq", qs, qs), ("cc", cs, cs))
        }
        for e in range(E)
    ]

    def has_positive(e: int, i: int) -> bool:
        return t[i] >= 0 and q_in[e][i] and c_in[e][t[i]]

    def too_similar(
        i: int, similarity: Callable[[int], float], is_in: Callable[[int], bool]
    ) -> bool:
        if false_negative_margin is None:
            return False
        for e in reversed(range(E)):  # The deepest with all three texts.
            if has_positive(e, i) and is_in(e):
                return similarity(e) > full[e]["qc"][i][t[i]] + false_negative_margin
        return False

    def is_negative(direction: str, e: int, i: int, j: int) -> bool:
        """Return whether text j, a query or candidate, is one of query i's negatives at exit e."""
        if direction == "query_to_doc":
            other = j != t[i] and qid[i] != cid[j]
            similarity, inside = (lambda e: full[e]["qc"][i][j]), c_in
        elif direction == "doc_to_query":
            other = t[j] != t[i] and qid[j] != cid[t[i]]
            similarity, inside = (lambda e: full[e]["qc"][j][t[i]]), q_in
        elif direction == "query_to_query":
            other = j != i and qid[i] != qid[j]
            similarity, inside = (lambda e: full[e]["qq"][i][j]), q_in
        else:
            other = j != t[i] and drawn_for[j] != i and cid[t[i]] != cid[j]
            similarity, inside = (lambda e: full[e]["cc"][t[i]][j]), c_in
        return other and inside[e][j] and not too_similar(i, similarity, lambda e: inside[e][j])

    def is_own_negative(i: int, n: int) -> bool:
        if negatives_mask is not None and not negatives_mask[i, n]:
            return False
        own = negatives.detach()[:, i, n : n + 1, :W]
        return not too_similar(
            i, lambda e: cosines(qs[e, i : i + 1], own[e]).item(), lambda e: True
        )

    loss = []
    for e in range(E):
        rows = [i for i in range(Q) if has_positive(e, i)]
        if not rows:
            loss += [(q.sum() + c.sum()) * 0] * M  # An empty mean counts as 0.
            continue
        sizes = {name: Q if name.endswith("query") else C for name in directions}
        keep = {
            name: torch.tensor([[is_negative(name, e, i, j) for j in range(n)] for i in rows]).view(
                -1, n
            )
            for name, n in sizes.items()
        }
        for m, d in enumerate(dims):
            queries, docs = q[e, rows, :d], c[e, [t[i] for i in rows], :d]
            z = (cosines(queries, docs).diagonal() - margin) * inverse_EM[e, m]
            sums = {}
            for name in directions:
                anchors = docs if name.startswith("doc") else queries
                others = (q if name.endswith("query") else c)[e, :, :d]
                logits = cosines(anchors, others) * inverse_EM[e, m]
                sums[name] = ((logits - z[:, None]).exp() * keep[name]).sum(1)
            if negatives is not None:
                K = negatives.shape[2]
                mine = [cosines(q[e, i : i + 1, :d], negatives[e, i, :, :d])[0] for i in rows]
                logits = torch.stack(mine) * inverse_EM[e, m]
                mask = [[is_own_negative(i, n) for n in range(K)] for i in rows]
                own = ((logits - z[:, None]).exp() * torch.tensor(mask).view(-1, K)).sum(1)
                sums["query_to_doc"] = sums.get("query_to_doc", 0.0) + own
            groups = [sum(sums.values())] if partition_mode == "joint" else list(sums.values())
            # log(k exp z + N) - z, with N / exp z at hand
            losses = [math.log(k) + torch.log1p(ratio / k) for ratio in groups]
            loss.append(torch.stack(losses).mean(0).mean())
    return torch.stack(loss).view(E, M)


# ---- inputs ----

# E exits, Q queries, C candidates, K own negatives, D width: different primes, so that no axis
# passes for another. Prefixes include a single coordinate, where a cosine is only a sign; the last
# leaves some of the width unread.
E, Q, C, K, D = 3, 5, 7, 2, 13
DIMS = (1, 3, 8, 11)


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return vectors of many lengths, like raw embeddings."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    lengths = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    return (x * lengths).to(dtype)


def pair(
    q: int = Q, c: int = C, dtype: torch.dtype = torch.float64, E: int = E, D: int = D
) -> tuple[Tensor, Tensor]:
    return vectors(E, q, D, seed=1, dtype=dtype), vectors(E, c, D, seed=2, dtype=dtype)


def masked() -> dict:
    """Return options in which query 0 has its own text twice among the candidates, queries 1 and 4
    share a text, query 3 has no positive, and query 2's positive is not on the diagonal.
    """
    return {
        "target": torch.tensor([0, 1, 5, -1, 4]),
        "query_ids": torch.tensor([10, 11, 12, 13, 11]),
        "cand_ids": torch.tensor([10, 11, 60, 10, 11, 12, 13]),
    }


def leaving(texts: tuple[int, ...] = (5, 4, 3), candidates: tuple[int, ...] = (7, 6, 4)) -> dict:
    return {"query_counts": torch.tensor(texts), "cand_counts": torch.tensor(candidates)}


def own_negatives() -> dict:
    """Return negatives: queries 1 and 4 have one instead of two, query 3 has none."""
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 0], [0, 1]], dtype=torch.bool)
    return {"negatives": vectors(E, Q, K, D, seed=3), "negatives_mask": mask}


def temperatures(*shape: int) -> Tensor:
    return torch.linspace(0.03, 0.3, math.prod(shape), dtype=torch.float64).view(shape)


OWNER = torch.tensor([0, 1, 2, 3, -1, 1, 1])  # 5 and 6 were drawn for query 1, 4 for nobody
SYMMETRIC = {"directions": ALL[:2], "partition_mode": "per_direction"}
TWICE = {"directions": ALL, "count_positive_twice": True}


def case(queries: int = Q, candidates: int = C, **options) -> tuple[int, int, dict]:
    return queries, candidates, options


SHARED = torch.tensor([0, 4, 2, 2, 1, 0, 3])  # More queries than candidates.
CASES: dict[str, tuple[int, int, dict]] = {
    "default": case(),
    "square": case(Q, Q),
    "more_queries": case(C, Q, target=SHARED),
    "one_by_one": case(1, 1),
    "one_query": case(1, C, target=torch.tensor([C - 1])),
    "no_positive_for_some": case(target=torch.tensor([-1, 6, 0, -1, 2])),
    "ids": case(**masked()),
    "doc_to_query": case(directions=("doc_to_query",)),
    "query_to_query": case(directions=("query_to_query",)),
    "doc_to_doc": case(directions=("doc_to_doc",)),
    "doc_to_doc_owner": case(directions=("doc_to_doc",), owner=OWNER),
    "one_positive_for_two": case(C, Q, directions=ALL, target=torch.where(SHARED == 1, -1, SHARED)),
    "all": case(directions=ALL),
    "all_twice": case(**TWICE, owner=OWNER),
    "all_ids": case(**TWICE, owner=OWNER, **masked()),
    "two_joint": case(directions=ALL[1::-1], count_positive_twice=True),
    "symmetric": case(**SYMMETRIC),
    "symmetric_ids": case(**SYMMETRIC, **masked()),
    "symmetric_negatives": case(**SYMMETRIC, **own_negatives()),
    "margin": case(margin=0.3),
    "margin_symmetric": case(**SYMMETRIC, margin=0.3),
    "margin_all": case(**TWICE, margin=-0.2),
    "negatives": case(**own_negatives()),
    "negatives_alone": case(directions=(), **own_negatives()),
    "negatives_unmasked": case(negatives=vectors(E, Q, K, D, seed=3)),
    "negatives_of_the_documents": case(directions=ALL[1:2], **own_negatives()),
    "temperature_scalar": case(temperature=torch.tensor(0.07, dtype=torch.float64)),
    "temperature_of_prefix": case(temperature=temperatures(len(DIMS))),
    "temperature_of_exit": case(**SYMMETRIC, temperature=temperatures(E, 1)),
    "temperature_of_both": case(
        **TWICE, **own_negatives(), margin=0.1, temperature=temperatures(E, len(DIMS))
    ),
    "near": case(false_negative_margin=0.1),
    "near_negative_margin": case(directions=ALL[:3], false_negative_margin=-0.15),
    "near_symmetric": case(**SYMMETRIC, false_negative_margin=0.1),
    "near_doc_to_doc": case(directions=ALL[3:], false_negative_margin=0.2),
    "near_negatives": case(directions=(), **own_negatives(), false_negative_margin=0.4),
    "leaving": case(**leaving()),
    "leaving_all": case(**TWICE, **leaving(), owner=OWNER),
    "leaving_negatives": case(**SYMMETRIC, **own_negatives(), **leaving()),
    "leaving_near": case(directions=ALL, **leaving(), false_negative_margin=0.1),
    # No query leaves, but positives do: what the deepest exit cannot judge, another does.
    "candidates_leave_near": case(
        directions=ALL[1:3], cand_counts=torch.tensor([7, 4, 2]), false_negative_margin=0.1
    ),
    "all_have_left": case(**SYMMETRIC, **leaving((5, 3, 0), (7, 2, 1))),
    "all_have_left_near": case(
        directions=ALL, **leaving((5, 3, 0), (7, 5, 1)), false_negative_margin=0.1
    ),
    "everything": case(
        **TWICE,
        **masked(),
        **own_negatives(),
        **leaving((5, 5, 4), (7, 7, 6)),
        owner=OWNER,
        margin=0.1,
        false_negative_margin=0.6,
        temperature=temperatures(E, len(DIMS)),
    ),
}

# ---- comparing ----


def on(device: str, x: object) -> object:
    """Return tensors, and lists of them, on a device; anything else unchanged."""
    if isinstance(x, Tensor):
        return x.to(device)
    return [on(device, y) for y in x] if isinstance(x, list) else x


def floating(inputs: dict[str, object], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return floating inputs: vectors in `dtype`, temperatures and others in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    numbers = {"scale", "temperature", "ceiling"}
    return {
        name: x.detach().to(wide if name in numbers else dtype)
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def rounded(inputs: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Return inputs rounded to `dtype`, in float64: the same bits for every implementation."""
    return inputs | {name: x.double() for name, x in floating(inputs, dtype).items()}


def results(
    function: Callable[..., object],
    inputs: dict[str, object],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    only: int | None = None,
) -> dict[str, Tensor]:
    """Return outputs, and gradients of every floating input but ceilings, which have none.

    Cotangents are different weights, so that no exit, prefix or row passes for another. only: the
    number of the one output that gets a cotangent.
    """
    given = {name: on(device, x) for name, x in {**inputs, **floating(inputs, dtype)}.items()}
    leaves = {
        name: x.clone().requires_grad_()
        for name, x in given.items()
        if isinstance(x, Tensor) and x.is_floating_point() and name != "ceiling"
    }
    out = function(**{**given, **leaves})
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    generator = torch.Generator().manual_seed(7)
    total = 0
    for n, x in enumerate(outs):
        weights = torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5
        if only in (None, n):
            total = total + (x.where(x != -torch.inf, 0.0) * weights.to(x)).sum()
    total = total + sum(x.sum() * 0 for x in leaves.values())  # Outputs may be constants.
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {f"output {n}": x.detach() for n, x in enumerate(outs)}
    named |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return named


def assert_as_exact(
    got: dict[str, Tensor],
    reference: dict[str, Tensor],
    truth: dict[str, Tensor],
    temperature: float,
    dtype: torch.dtype = torch.float32,
    terms: float = 0.0,
) -> None:
    """Assert errors of at most the reference's in fp32, and a few roundings.

    A logit near 1 / temperature is only known to half a step of fp32 there. Gradients of half
    precision vectors are rounded once more. terms: the size of a gradient's summands that cancel.
    """
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        a, b = got[name].double().cpu(), reference[name].double().cpu()
        assert torch.equal(a.isinf(), want.isinf()) and not a.isnan().any(), name
        finite = want.isfinite()
        a, b, want = a[finite], b[finite], want[finite]
        if not want.numel():
            continue
        step = 4 * torch.finfo(torch.float32).eps / temperature
        if got[name].dtype == dtype != torch.float32:
            step += torch.finfo(dtype).eps
        floor = step * max(want.abs().max().item(), terms)
        error, allowed = ((x - want).abs().max().item() for x in (a, b))
        assert error <= allowed + floor, f"{name}: error {error}, eager {allowed}, floor {floor}"


def check(
    impl: str,
    function: Callable[..., object],
    truth: Callable[..., object],
    inputs: dict[str, object],
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.05,
    terms: float = 0.0,
    **how,
) -> dict[str, Tensor]:
    """Compare outputs and gradients with the truth: the reference in float64, Triton in `dtype`."""
    run, reference = (partial(function, impl=name) for name in (impl, "reference"))
    if impl == "reference":
        got, want = results(run, inputs, **how), results(truth, inputs, **how)
        assert_same(got, want)
        return got
    inputs = rounded(inputs, dtype)
    got = results(run, inputs, dtype, DEVICE, **how)
    allowed, want = results(reference, inputs, dtype, **how), results(truth, inputs, **how)
    assert all((x.shape, x.dtype) == (allowed[n].shape, allowed[n].dtype) for n, x in got.items())
    assert_as_exact(got, allowed, want, temperature, dtype, terms)
    return got


def assert_same(
    got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-11, atol: float = 1e-11
) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_strides_ignored(function: Callable[..., Tensor], *odd: Tensor) -> None:
    """Compare values and gradients of tensors in odd layouts with those of contiguous copies."""
    assert not any(x.is_contiguous() for x in odd)
    outs = []
    for given in (odd, [x.contiguous() for x in odd]):
        leaves = [x.detach().requires_grad_() for x in given]
        out = function(*leaves)
        # The gradients of a sum are one number, expanded: without strides of their own.
        outs.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
