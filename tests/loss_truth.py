"""The loss and its parts in float64, pair by pair, from the formulas alone; inputs to try them on;
and how close to that an implementation has to be."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where impl="triton" runs
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
Lists = list[list[bool]]

# ---- the truth ----


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """[R, S] of rows with rows; a vector of no length is left as it is."""

    def unit(x: Tensor) -> Tensor:
        squares = (x * x).sum(-1, keepdim=True)
        dead = squares <= 1e-24
        return x / torch.where(dead, 1.0, squares.where(~dead, 1.0)).sqrt()

    return unit(a) @ unit(b).T


def present(counts: Tensor | None, E: int, n: int) -> Lists:
    """[e][text]"""
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
    """Over each row's kept entries; -inf, a constant, where there are none."""
    nothing = z.new_tensor(-math.inf)
    logs = [row[k].logsumexp(0) if k.any() else nothing for row, k in zip(z, keep, strict=True)]
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
    here_x, here_y = present(row_counts, E, R), present(col_counts, E, S)
    own = [-1] * R if positive is None else positive.tolist()
    keys = [(a.tolist(), b.tolist()) for a, b in zip(row_keys, col_keys, strict=True)]
    highest = [[math.inf] * R] * E if ceiling is None else ceiling.tolist()
    full = [cosines(x[e, :, :W], y[e, :, :W]).tolist() for e in range(E)]

    def too_similar(i: int, j: int) -> bool:
        for e in reversed(range(E)):
            if here_x[e][i] and here_y[e][j] and highest[e][i] < math.inf:
                return full[e][i][j] > highest[e][i]
        return False

    def dropped(i: int, j: int) -> bool:
        return own[i] == j or any(a[i] == b[j] for a, b in keys) or too_similar(i, j)

    drop = [[dropped(i, j) for j in range(S)] for i in range(R)]
    rows, cols, cos = [], [], []
    for e in range(E):
        keep = [
            [here_x[e][i] and here_y[e][j] and not drop[i][j] for j in range(S)] for i in range(R)
        ]
        keep_RS = torch.tensor(keep, dtype=torch.bool).view(R, S)
        for m, d in enumerate(dims):
            cos_RS = cosines(x[e, :, :d], y[e, :, :d])
            z_RS = cos_RS * scale[e, m]
            rows.append(log_sums(z_RS, keep_RS))
            cols.append(log_sums(z_RS.T, keep_RS.T))
            there = [0 <= j < S and here_x[e][i] and here_y[e][j] for i, j in enumerate(own)]
            none = x.new_zeros(())
            with_own = [cos_RS[i, own[i]] if yes else none for i, yes in enumerate(there)]
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
    counts = (
        [cand_counts] if cand_counts is None or isinstance(cand_counts, Tensor) else cand_counts
    )
    counts = [None] * len(pieces) if cand_counts is None else counts
    of_pieces = [present(n, E, x.shape[1]) for x, n in zip(pieces, counts, strict=True)]
    here_c = [[yes for piece in of_pieces for yes in piece[e]] for e in range(E)]
    here_q = present(query_counts, E, Q)
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
        return t[i] >= 0 and here_q[e][i] and here_c[e][t[i]]

    def too_similar(
        i: int, similarity: Callable[[int], float], there: Callable[[int], bool]
    ) -> bool:
        if false_negative_margin is None:
            return False
        for e in reversed(range(E)):  # the deepest with all three texts
            if has_positive(e, i) and there(e):
                return similarity(e) > full[e]["qc"][i][t[i]] + false_negative_margin
        return False

    def kept(direction: str, e: int, i: int, j: int) -> bool:
        """Is text j one of query i's negatives at exit e? j counts queries or candidates."""
        if direction == "query_to_doc":
            other = j != t[i] and qid[i] != cid[j]
            similarity, here = (lambda e: full[e]["qc"][i][j]), here_c
        elif direction == "doc_to_query":
            other = t[j] != t[i] and qid[j] != cid[t[i]]
            similarity, here = (lambda e: full[e]["qc"][j][t[i]]), here_q
        elif direction == "query_to_query":
            other = j != i and qid[i] != qid[j]
            similarity, here = (lambda e: full[e]["qq"][i][j]), here_q
        else:
            other = j != t[i] and drawn_for[j] != i and cid[t[i]] != cid[j]
            similarity, here = (lambda e: full[e]["cc"][t[i]][j]), here_c
        return other and here[e][j] and not too_similar(i, similarity, lambda e: here[e][j])

    def own_kept(i: int, n: int) -> bool:
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
            loss += [(q.sum() + c.sum()) * 0] * M  # a mean over nothing counts as 0
            continue
        sizes = {name: Q if name.endswith("query") else C for name in directions}
        keep = {
            name: torch.tensor([[kept(name, e, i, j) for j in range(n)] for i in rows]).view(-1, n)
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
                keep_own = torch.tensor([[own_kept(i, n) for n in range(K)] for i in rows]).view(
                    -1, K
                )
                own = ((logits - z[:, None]).exp() * keep_own).sum(1)
                sums["query_to_doc"] = sums.get("query_to_doc", 0.0) + own
            groups = [sum(sums.values())] if partition_mode == "joint" else list(sums.values())
            # log(k exp z + N) - z, with N / exp z at hand
            losses = [math.log(k) + torch.log1p(ratio / k) for ratio in groups]
            loss.append(torch.stack(losses).mean(0).mean())
    return torch.stack(loss).view(E, M)


# ---- inputs ----

# E exits, Q queries, C candidates, K own negatives, D width: primes and unlike each other, so that
# no axis passes for another. Prefixes include a single coordinate, where a cosine is only a sign;
# the last leaves some of the width unread.
E, Q, C, K, D = 3, 5, 7, 2, 13
DIMS = (1, 3, 8, 11)


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of many lengths, as raw embeddings have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    lengths = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    return (x * lengths).to(dtype)


def pair(
    q: int = Q, c: int = C, dtype: torch.dtype = torch.float64, E: int = E, D: int = D
) -> tuple[Tensor, Tensor]:
    return vectors(E, q, D, seed=1, dtype=dtype), vectors(E, c, D, seed=2, dtype=dtype)


def masked() -> dict:
    """Query 0 has its own text twice among the candidates, queries 1 and 4 share a text, query 3
    has no positive, query 2's positive is not on the diagonal; id 60 is nobody's."""
    return {
        "target": torch.tensor([0, 1, 5, -1, 4]),
        "query_ids": torch.tensor([10, 11, 12, 13, 11]),
        "cand_ids": torch.tensor([10, 11, 60, 10, 11, 12, 13]),
    }


def leaving(texts: tuple[int, ...] = (5, 4, 3), candidates: tuple[int, ...] = (7, 6, 4)) -> dict:
    return {"query_counts": torch.tensor(texts), "cand_counts": torch.tensor(candidates)}


def own_negatives() -> dict:
    """Queries 1 and 4 have one instead of two, query 3 has none."""
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 0], [0, 1]], dtype=torch.bool)
    return {"negatives": vectors(E, Q, K, D, seed=3), "negatives_mask": mask}


def temperatures(*shape: int) -> Tensor:
    return torch.linspace(0.03, 0.3, math.prod(shape), dtype=torch.float64).view(shape)


OWNER = torch.tensor([0, 1, 2, 3, -1, 1, 1])  # 5 and 6 were drawn for query 1, 4 for nobody
SYMMETRIC = {"directions": ALL[:2], "partition_mode": "per_direction"}
TWICE = {"directions": ALL, "count_positive_twice": True}
# name: (queries, candidates, options)
CASES: dict[str, tuple[int, int, dict]] = {
    "default": (Q, C, {}),
    "square": (Q, Q, {}),
    "more_queries": (C, Q, {"target": torch.tensor([0, 4, 2, 2, 1, 0, 3])}),
    "one_by_one": (1, 1, {}),
    "one_query": (1, C, {"target": torch.tensor([C - 1])}),
    "no_positive_for_some": (Q, C, {"target": torch.tensor([-1, 6, 0, -1, 2])}),
    "ids": (Q, C, masked()),
    "doc_to_query": (Q, C, {"directions": ("doc_to_query",)}),
    "query_to_query": (Q, C, {"directions": ("query_to_query",)}),
    "doc_to_doc": (Q, C, {"directions": ("doc_to_doc",)}),
    "doc_to_doc_owner": (Q, C, {"directions": ("doc_to_doc",), "owner": OWNER}),
    "one_positive_for_two": (
        C,
        Q,
        {"directions": ALL, "target": torch.tensor([0, 4, 2, 2, -1, 0, 3])},
    ),
    "all": (Q, C, {"directions": ALL}),
    "all_twice": (Q, C, {**TWICE, "owner": OWNER}),
    "all_ids": (Q, C, {**TWICE, "owner": OWNER, **masked()}),
    "two_joint": (Q, C, {"directions": ALL[1::-1], "count_positive_twice": True}),
    "symmetric": (Q, C, SYMMETRIC),
    "symmetric_ids": (Q, C, {**SYMMETRIC, **masked()}),
    "symmetric_negatives": (Q, C, {**SYMMETRIC, **own_negatives()}),
    "margin": (Q, C, {"margin": 0.3}),
    "margin_symmetric": (Q, C, {**SYMMETRIC, "margin": 0.3}),
    "margin_all": (Q, C, {**TWICE, "margin": -0.2}),
    "negatives": (Q, C, own_negatives()),
    "negatives_alone": (Q, C, {"directions": (), **own_negatives()}),
    "negatives_unmasked": (Q, C, {"negatives": vectors(E, Q, K, D, seed=3)}),
    "negatives_of_the_documents": (Q, C, {"directions": ALL[1:2], **own_negatives()}),
    "temperature_scalar": (Q, C, {"temperature": torch.tensor(0.07, dtype=torch.float64)}),
    "temperature_of_prefix": (Q, C, {"temperature": temperatures(len(DIMS))}),
    "temperature_of_exit": (Q, C, {**SYMMETRIC, "temperature": temperatures(E, 1)}),
    "temperature_of_both": (
        Q,
        C,
        {**TWICE, **own_negatives(), "margin": 0.1, "temperature": temperatures(E, len(DIMS))},
    ),
    "near": (Q, C, {"false_negative_margin": 0.1}),
    "near_negative_margin": (Q, C, {"directions": ALL[:3], "false_negative_margin": -0.15}),
    "near_symmetric": (Q, C, {**SYMMETRIC, "false_negative_margin": 0.1}),
    "near_doc_to_doc": (Q, C, {"directions": ALL[3:], "false_negative_margin": 0.2}),
    "near_negatives": (Q, C, {"directions": (), **own_negatives(), "false_negative_margin": 0.4}),
    "leaving": (Q, C, leaving()),
    "leaving_all": (Q, C, {**TWICE, **leaving(), "owner": OWNER}),
    "leaving_negatives": (Q, C, {**SYMMETRIC, **own_negatives(), **leaving()}),
    "leaving_near": (Q, C, {"directions": ALL, **leaving(), "false_negative_margin": 0.1}),
    # No query leaves, but positives do: what the deepest exit cannot judge, another does.
    "candidates_leave_near": (
        Q,
        C,
        {
            "directions": ALL[1:3],
            "cand_counts": torch.tensor([7, 4, 2]),
            "false_negative_margin": 0.1,
        },
    ),
    "all_have_left": (Q, C, {**SYMMETRIC, **leaving((5, 3, 0), (7, 2, 1))}),
    "all_have_left_near": (
        Q,
        C,
        {"directions": ALL, **leaving((5, 3, 0), (7, 5, 1)), "false_negative_margin": 0.1},
    ),
    "everything": (
        Q,
        C,
        {
            **TWICE,
            **masked(),
            **own_negatives(),
            **leaving((5, 5, 4), (7, 7, 6)),
            "owner": OWNER,
            "margin": 0.1,
            "false_negative_margin": 0.6,
            "temperature": temperatures(E, len(DIMS)),
        },
    ),
}

# ---- comparing ----


def on(device: str, x: object) -> object:
    """Tensors, and lists of them, on a device; all else as it is."""
    if isinstance(x, Tensor):
        return x.to(device)
    return [on(device, y) for y in x] if isinstance(x, list) else x


def floating(inputs: dict[str, object], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating inputs: vectors in `dtype`, temperatures and the like in no less than fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    numbers = {"scale", "temperature", "ceiling"}
    return {
        name: x.detach().to(wide if name in numbers else dtype)
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def rounded(inputs: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Inputs as `dtype` has them, in float64: the same bits for all who are compared."""
    return inputs | {name: x.double() for name, x in floating(inputs, dtype).items()}


def results(
    function: Callable[..., object],
    inputs: dict[str, object],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    only: int | None = None,
) -> dict[str, Tensor]:
    """Outputs, and gradients of every floating input but ceilings, which have none, for fixed
    cotangents: unlike weights, so that no exit, prefix or row passes for another.

    only: the number of the one output that gets a cotangent.
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
    total = total + sum(x.sum() * 0 for x in leaves.values())  # where the outputs are constants
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
    """No further from the truth than the reference in fp32 is, and a few roundings: a logit near
    1 / temperature is only known to half a step of fp32 there. Gradients of half precision vectors
    are rounded once more.

    terms: size of what a gradient is a sum of, where that cancels.
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
