"""Distillation terms against float64 formulas text by text, against sentence-transformers' losses,
and on several gloo processes against one.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distill_truth import NARROW, WIDE, Sample, batch_of, distiller, run_of, texts, truth
from objective_truth import ALONE, DIMS, D, weighted_sum
from processes import gloo_once
from torch import Tensor

from mlembed.config import Distill, Run
from mlembed.runtime.distributed import World
from mlembed.training.objective.distill import TERMS, Distiller, principal, rows_of


def tables(sample: Sample, run: Run, where: World = ALONE, made=None, x=None, **options):
    """Return the tables of a sample's batch. x: vectors by row instead of the sample's."""
    batch, made = batch_of(sample, where, **options), made or distiller(run, sample, where)
    x = sample.vectors if x is None else x
    return made.tables(x[:, batch.rows[batch.place.argsort()]], batch, run, where)


def table(sample: Sample, run: Run, term: str, where: World = ALONE, **options):
    """Return loss_EM, its gradient by row (0 for other processes' rows), and that of P, if any."""
    made, leaf = distiller(run, sample, where), sample.vectors.clone().requires_grad_()
    terms = tables(sample, run, where, made, leaf, **options)
    assert list(terms) == [term]
    weighted_sum(terms[term]).backward()
    P = made.projection
    P_grad = torch.zeros((), dtype=torch.float64) if P is None else P.grad
    return terms[term].detach(), leaf.grad, P_grad


# exits, the teacher's width, whether texts leave
SIZES = ("last", WIDE, True), ("all", NARROW, False), ("all", WIDE, True)
# term, options, the teacher's width, whether texts leave
CASES = [
    *(
        ("features", {"align": align, "feature_form": form, "exits": exits}, width, skip)
        for align in ("truncate", "pca", "projection")
        for form in ("raw", "normalised")
        for exits, width, skip in SIZES
    ),
    *(
        ("features", {"align": "truncate", "feature_form": "ml-embed", "exits": exits}, WIDE, skip)
        for exits, skip in (("last", True), ("all", False))
    ),
    *(
        (term, {"logit_form": form, "exits": exits, "teacher_temperature": 0.2}, width, skip)
        for term in ("logits", "between_exits")
        for form in ("mse", "kl")
        for exits, width, skip in SIZES
    ),
]
NAMES = [
    f"{term}-{'-'.join(map(str, o.values()))}-{width}-{skip}" for term, o, width, skip in CASES
]


def of_case(case, where: World = ALONE):
    term, options, width, skip = case
    return table(texts(skip=skip, width=width), run_of(**{term: 1.0}, **options), term, where)


def assert_close(got, want, rtol=1e-9):
    assert torch.allclose(got[0], want[0], rtol=rtol, atol=0), (got[0], want[0])
    assert torch.equal(got[0] == 0, want[0] == 0)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.allclose(a.double(), b, rtol=0, atol=rtol * (b.abs().max().item() + 1e-9))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_term_is_its_formula(case):
    term, options, width, skip = case
    sample, run = texts(skip=skip, width=width), run_of(**{term: 1.0}, **options)
    got, want = table(sample, run, term), truth(sample, run, term)
    assert got[0].dtype == torch.float64 and got[1].norm() > 0
    # P and its gradient are fp32.
    P = options.get("align") == "projection"
    assert_close(got, want, 2e-6 if P else 1e-9)
    assert bool(got[2].norm() > 0) == P


@pytest.mark.parametrize("task", ["clustering", "classification", "bitext", "sts"])
@pytest.mark.parametrize("term", TERMS)
def test_terms_do_not_depend_on_the_task(term, task):
    sample, run = texts(), run_of(**{term: 1.0})
    for a, b in zip(table(sample, run, term), table(sample, run, term, task=task), strict=True):
        assert torch.equal(a, b)


def test_temperature_of_the_source():
    sample, run = texts(skip=True), run_of(logits=1.0, logit_form="kl", exits="all")
    got = table(sample, run, "logits", temperature=0.3)
    assert_close(got, truth(sample, run, "logits", temperature=0.3))
    assert not torch.allclose(got[0], table(sample, run, "logits")[0], rtol=1e-2)


def test_one_pair_is_enough():
    for term in TERMS:
        sample, run = texts((0,)), run_of(**{term: 1.0})
        assert_close(table(sample, run, term), truth(sample, run, term))


def test_terms_are_zero_without_texts():
    """No group runs to the last exit."""
    sample = texts()
    sample = sample._replace(depths=np.full(len(sample.groups), 2))
    for term in TERMS:
        run = run_of(**{term: 1.0})
        got = table(sample, run, term)
        assert (got[0] == 0).all() and (got[1] == 0).all()


def test_several_terms_equal_single_ones():
    sample = texts(skip=True)
    several = tables(sample, run_of(features=2.0, logits=3.0, between_exits=0.5))
    # The caller applies the terms' weights.
    assert list(several) == list(TERMS)
    for term in TERMS:
        assert torch.equal(several[term], table(sample, run_of(**{term: 1.0}), term)[0])


def test_one_exit_has_nothing_between_exits():
    run = run_of(features=1.0, between_exits=1.0)
    run = replace(run, model=replace(run.model, exits=(4,)))
    sample = texts()
    got = tables(sample._replace(vectors=sample.vectors[2:]), run)
    assert list(got) == ["features"]
    assert torch.equal(got["features"], table(sample, run_of(features=1.0), "features")[0][2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_of_half_vectors_are_fp32(dtype):
    sample = texts(skip=True)
    sample = sample._replace(teacher=sample.teacher.float())
    run = run_of(features=1.0, logits=1.0, between_exits=1.0, logit_form="kl")
    want, got = tables(sample, run), tables(sample, run, x=sample.vectors.to(dtype))
    for term in TERMS:
        assert got[term].dtype == torch.float32
        close = 1e-5 if dtype == torch.float32 else 0.05
        assert torch.allclose(got[term].double(), want[term], rtol=close, atol=1e-7)


# ---- published losses ----


@pytest.fixture(scope="module")
def published():
    """Import here, because other processes load this file, too."""
    from sentence_transformers.sentence_transformer import losses

    return losses


def test_features_are_sentence_transformers_mse_loss(published):
    """On the same bits, of all texts as one column, cut to the prefix."""
    sample, run = texts(dtype=torch.float32), run_of(features=1.0)
    got = table(sample, run, "features")[0]
    for m, d in enumerate(DIMS):
        students = sample.vectors[-1, :, :d]
        want = published.MSELoss(model=None).compute_loss_from_embeddings(
            [students], [sample.teacher[:, :d]]
        )
        assert torch.allclose(got[-1, m], want, rtol=1e-6)


def test_kl_is_sentence_transformers_distill_kl_div_loss(published):
    """On the same bits, every document as a column; theirs is times the squared temperature."""
    sample = texts(dtype=torch.float32)
    run = run_of(logits=1.0, logit_form="kl", teacher_temperature=0.2)
    got = table(sample, run, "logits")[0]
    queries = [group[0] for group in sample.groups]
    docs = [row for group in sample.groups for row in group[1:]]
    t = F.normalize(sample.teacher, dim=-1)
    public = published.DistillKLDivLoss(
        model=None, similarity_fct=F.cosine_similarity,
        student_temperature=0.1, teacher_temperature=0.2,
    )  # fmt: skip
    for m, d in enumerate(DIMS):
        x = sample.vectors[-1, :, :d]
        columns = [x[queries], *(x[j].expand(len(queries), -1) for j in docs)]
        want = public.compute_loss_from_embeddings(columns, t[queries] @ t[docs].T)
        assert torch.allclose(got[-1, m], want / 0.1**2, rtol=1e-4)


# ---- principal coordinates ----


@pytest.mark.parametrize("rows, width", [(200, 7), (4, 7), (1, 3)])
def test_prefixes_are_best_approximations(rows, width):
    """Compare with numpy's SVD (Eckart and Young); with fewer rows than coordinates as well."""
    rng = np.random.default_rng(rows)
    t = rng.normal(size=(rows, width)) * np.arange(1, width + 1) + 2
    R = principal(torch.from_numpy(t)).double()
    values = np.linalg.svd(t, compute_uv=False)
    assert torch.allclose(R.T @ R, torch.eye(width, dtype=torch.float64), atol=1e-6)
    for d in range(width + 1):
        rest = t - t @ R[:, :d].numpy() @ R[:, :d].numpy().T
        assert np.isclose((rest**2).sum(), (values[d:] ** 2).sum(), atol=1e-4 * (t**2).sum())
        if d:
            projected = t @ R[:, :d].numpy()
            assert np.isclose((projected**2).sum(), (values[:d] ** 2).sum(), rtol=1e-6)


def test_rotation_keeps_cosines():
    t = texts().teacher
    rotated = t @ principal(t).double()
    whole, turned = (F.normalize(v, dim=-1) @ F.normalize(v, dim=-1).T for v in (t, rotated))
    assert torch.allclose(whole, turned, atol=1e-6)


def test_signs_do_not_depend_on_the_sample():
    t = texts().teacher
    assert torch.allclose(principal(t), principal(-t.flip(0)), atol=1e-5)
    R = principal(t)
    assert (R.gather(0, R.abs().argmax(0, keepdim=True)) > 0).all()


# ---- widths ----


def test_prefixes_wider_than_the_teacher():
    sample = texts(width=NARROW)
    loss_EM, grad, _ = table(sample, run_of(features=1.0), "features")
    assert (loss_EM[-1] != 0).tolist() == [True, False, False]
    assert (grad[..., 3:] == 0).all() and (grad[-1, :, :3] != 0).all()


def test_teacher_narrower_than_every_prefix():
    run = run_of(features=1.0)
    with pytest.raises(ValueError, match="distill.align: expected pca or projection for a teacher"):
        Distiller.of(run, 2, None, ALONE)
    assert Distiller.of(run, 3, None, ALONE)
    assert Distiller.of(run_of(features=1.0, align="projection"), 2, None, ALONE)
    # Cosines need no alignment.
    assert Distiller.of(run_of(logits=1.0), 2, None, ALONE)


def test_ml_embed_needs_a_wide_teacher():
    run = run_of(features=1.0, feature_form="ml-embed")
    with pytest.raises(ValueError, match="at least as wide as the model, 13, for ml-embed, got"):
        Distiller.of(run, D - 1, None, ALONE)
    assert Distiller.of(run, D, None, ALONE)
    with pytest.raises(ValueError, match="distill.align: expected truncate with feature_form ml-"):
        run_of(features=1.0, feature_form="ml-embed", align="pca")


def test_nothing_to_distil():
    assert Distiller.of(run_of(), 0, None, ALONE) is None
    assert Distiller.of(run_of(between_exits=1.0), 0, None, ALONE) is not None


def test_rows_of():
    last, every = Distill(between_exits=1.0), Distill(between_exits=1.0, exits="all")
    rows = {(c.exits, t): rows_of(c, t, 3).tolist() for c in (last, every) for t in TERMS}
    inner, end, all_ = [True, True, False], [False, False, True], [True] * 3
    assert rows == {
        ("last", "features"): end, ("last", "logits"): end, ("last", "between_exits"): inner,
        ("all", "features"): all_, ("all", "logits"): all_, ("all", "between_exits"): inner,
    }  # fmt: skip
    assert rows_of(last, "contrastive", 3).tolist() == all_
    ml_embed = replace(last, feature_form="ml-embed")
    rows = [rows_of(ml_embed, term, 3).tolist() for term in ("features", "logits")]
    assert rows == [all_, end]


# ---- the projection ----

LEARNT = {"features": 1.0, "align": "projection", "exits": "all"}
TAKEN = torch.zeros(())  # found_inf of a step whose numbers are finite


@pytest.mark.parametrize("width", [NARROW, D, WIDE])
def test_projection_starts_orthonormal(width):
    run = run_of(**LEARNT)
    P = Distiller.of(run, width, None, ALONE).projection
    again = Distiller.of(run, width, None, ALONE).projection
    other = Distiller.of(replace(run, seed=1), width, None, ALONE).projection
    assert P.shape == (width, D) and torch.equal(P, again) and not torch.equal(P, other)
    gram = (P.T @ P if width >= D else P @ P.T).detach()
    assert torch.allclose(gram, torch.eye(min(width, D)), atol=1e-5)


def test_prefix_uses_its_columns():
    sample, run = texts(), run_of(**LEARNT)
    made = distiller(run, sample)
    loss_EM = tables(sample, run, made=made)["features"]
    for m, d in enumerate(DIMS):
        grad = torch.autograd.grad(loss_EM[0, m], made.projection, retain_graph=True)[0]
        assert (grad[:, :d] != 0).all() and (grad[:, d:] == 0).all()


def add_gradients(made: Distiller, sample: Sample, run: Run, where: World = ALONE) -> float:
    loss = tables(sample, run, where, made)["features"].mean()
    loss.backward()
    return loss.item()


def test_steps_are_adamw_of_clipped_gradients():
    sample, run = texts(), run_of(**LEARNT)
    run = replace(run, optim=replace(run.optim, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5))
    made = distiller(run, sample)
    P = made.projection.detach().double()
    m = v = torch.zeros_like(P)
    for i in range(1, 4):
        add_gradients(made, sample, run)
        g = made.projection.grad.double()
        assert g.norm() > 0.01
        g = g * min(1, 0.01 / (g.norm() + 1e-6))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        P = P - 0.1 * i * (m / (1 - 0.8**i)) / ((v / (1 - 0.9**i)).sqrt() + 1e-3)
        made.step(0.1 * i, 0.01, TAKEN)
        assert made.projection.grad is None
        assert torch.allclose(made.projection.detach().double(), P, atol=1e-6)


def test_projection_learns():
    sample, run = texts(), run_of(**LEARNT)
    made = distiller(run, sample)
    losses = []
    for _ in range(60):
        losses.append(add_gradients(made, sample, run))
        made.step(0.05, 1e9, TAKEN)
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_add_up_and_can_be_left_out():
    sample, run = texts(), run_of(**LEARNT)
    made = distiller(run, sample)
    before = made.projection.detach().clone()
    add_gradients(made, sample, run)
    once = made.projection.grad.clone()
    add_gradients(made, sample, run)
    assert torch.allclose(made.projection.grad, 2 * once)
    made.step(0.1, 1.0, 1 - TAKEN)
    assert torch.equal(made.projection, before) and made.gradients() == []
    assert not any(value.any() for value in made.optimizer.state[made.projection].values())


def test_steps_without_a_projection():
    made = distiller(run_of(logits=1.0), texts())
    made.step(0.1, 1.0, TAKEN)
    assert made.gradients() == []
    assert made.state() == {}
    made.load({})


@pytest.mark.parametrize("steps", [0, 3])
def test_resumed_projection(steps):
    sample, run = texts(), run_of(**LEARNT)
    made = distiller(run, sample)
    for _ in range(steps):
        add_gradients(made, sample, run)
        made.step(0.1, 1.0, TAKEN)
    saved = {name: value.clone() for name, value in made.state().items()}
    assert all(value.ndim > 0 for value in saved.values()) and len(saved) == (4 if steps else 1)
    again = distiller(replace(run, seed=5), sample)
    again.load(saved)
    for one in (made, again):
        for _ in range(2):
            add_gradients(one, sample, run)
            one.step(0.05, 1.0, TAKEN)
    assert torch.equal(made.projection, again.projection)


def test_resumed_rotation_needs_no_sample():
    sample, run = texts(), run_of(features=1.0, align="pca")
    made = distiller(run, sample)
    again = Distiller.of(run, WIDE, None, ALONE)
    again.load(made.state())
    assert torch.equal(made.rotation, again.rotation) and made.rotation.norm() > 1


@pytest.mark.parametrize(
    "align, name", [("pca", r"rotation \[17, 17\]"), ("projection", r"projection \[17, 13\]")]
)
def test_tensors_of_another_distillation(align, name):
    run = run_of(features=1.0, align=align)
    made = Distiller.of(run, WIDE, None, ALONE)
    with pytest.raises(ValueError, match=f"expected {name} in the checkpoint, got none"):
        made.load({})
    other = Distiller.of(run, NARROW, None, ALONE).state()
    with pytest.raises(ValueError, match=rf"expected {name} in the checkpoint, got \[5, "):
        made.load(other)


# ---- processes ----


def stepped(where: World) -> tuple[Tensor, list[Tensor]]:
    """Return the projection and its gradients of two steps; with a large eps scale matters."""
    sample, run = texts(skip=True), run_of(**LEARNT)
    run = replace(run, optim=replace(run.optim, eps=0.1))
    made = distiller(run, sample, where)
    grads = []
    for _ in range(2):
        add_gradients(made, sample, run, where)
        grads.append(made.projection.grad.clone())
        made.step(0.1, 1e9, TAKEN)
    return made.projection.detach(), grads


def rotated(where: World) -> Tensor:
    """Return the rotation of a sample that differs slightly between processes."""
    run = run_of(features=1.0, align="pca")
    return Distiller.of(run, WIDE, texts().teacher + 1e-3 * where.rank, where).rotation


def process(where: World) -> dict:
    """Return the results of one process by case."""
    results = {name: of_case(case, where) for name, case in zip(NAMES, CASES, strict=True)}
    results["stepped"], results["rotated"] = stepped(where), rotated(where)
    results["sizes"] = batch_of(texts(skip=True), where).doc_sizes
    return results


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request):
    """Return the results of each of 2 or 4 processes."""
    return gloo_once(request.param, process)


@pytest.mark.parametrize("name, case", zip(NAMES, CASES, strict=True), ids=NAMES)
def test_mean_over_processes_is_the_loss_of_one(results, name, case):
    got = [torch.stack(parts).mean(0) for parts in zip(*(p[name] for p in results), strict=True)]
    assert_close(got, [x.double() for x in of_case(case)], 2e-6 if "projection" in name else 1e-9)
    # Each process has texts of its own.
    assert (results[0][name][0] - results[1][name][0]).abs().max() > 1e-6


def test_shares_are_unequal(results):
    assert len(set(results[0]["sizes"])) > 1


def test_projection_is_equal_on_all_processes(results):
    want, grads = stepped(ALONE)
    for part in results:
        assert torch.equal(part["stepped"][0], results[0]["stepped"][0])
        assert not torch.equal(part["stepped"][1][0], grads[0])
    assert torch.allclose(results[0]["stepped"][0], want, atol=1e-5)


def test_rotation_is_the_main_process_s(results):
    for part in results:
        assert torch.equal(part["rotated"], rotated(ALONE))
