"""A teacher's scores as a term: against float64 formulas query by query, against
sentence-transformers' losses on the same bits, and on two gloo processes against one.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_truth import EXITS, NEGATIVES, Sample, cosine, run_of, texts
from factories import small_job, write_jsonl
from objective_truth import ALONE, DIMS, weighted_sum
from processes import gloo_once

import train
from mlembed.data.collate import collate
from mlembed.runtime.distributed import World
from mlembed.training.objective import score_teacher

FORMS = "kl", "margin"
# options, numbers of negatives, whether texts leave, rows without a score
CASES = {
    f"{form}-{name}": ({"score_form": form, "score_temperature": 3.0}, *case)
    for form in FORMS
    for name, case in {
        "even": ((2,) * 8, False, ()),
        "ragged": (NEGATIVES, True, ()),
        # The first query's positive, one of its negatives, and all negatives of the fourth query.
        "missing": (NEGATIVES, True, (1, 12, 13)),
        "a negative": (NEGATIVES, False, (3,)),
    }.items()
}


def scores_of(sample: Sample, missing=()) -> np.ndarray:
    scores = np.random.default_rng(5).normal(0, 4, sample.vectors.shape[1]).astype(np.float32)
    scores[[*missing, *(group[0] for group in sample.groups)]] = np.nan
    return scores


def table(sample, teacher_scores, where: World = ALONE, temperature=0.0, **options):
    """Return loss_EM and its gradient by row, 0 for other processes' rows."""
    ids, lengths = np.arange(sample.vectors.shape[1]), lambda row: np.full(1 + row % 3, row)
    batch = collate(
        sample.groups, lengths, ids, sample.depths, None, rank=where.rank, size=where.size,
        max_tokens=11, teacher_scores=teacher_scores, temperature=temperature,
    )  # fmt: skip
    run, leaf = run_of(scores=1.0, **options), sample.vectors.clone().requires_grad_()
    x = leaf[:, batch.rows[batch.place.argsort()]]
    loss_EM = score_teacher.table(x, batch, run, where)
    weighted_sum(loss_EM).backward()
    return loss_EM.detach(), leaf.grad


def truth(sample, teacher_scores, score_form, score_temperature, temperature=0.1):
    """Return loss_EM and its gradient by row, query by query."""
    x, entries = sample.vectors.clone().double().requires_grad_(), []
    for (e, exit), d in itertools.product(enumerate(EXITS), DIMS):
        losses = []
        for (query, *docs), depth in zip(sample.groups, sample.depths, strict=True):
            first, *rest = docs
            rest = [row for row in rest if np.isfinite(teacher_scores[row])]
            if depth < exit or not rest or not np.isfinite(teacher_scores[first]):
                continue
            s = torch.stack([cosine(x[e, query, :d], x[e, row, :d]) for row in [first, *rest]])
            t = torch.from_numpy(teacher_scores[[first, *rest]]).double() / score_temperature
            if score_form == "margin":
                losses.append(((s[0] - s[1:]) - (t[0] - t[1:])).pow(2).mean())
            else:
                p, r = t.exp() / t.exp().sum(), (s / temperature).exp()
                losses.append((p * (p * r.sum() / r).log()).sum())
        entries.append(torch.stack(losses).mean() if losses else (x * 0).sum())
    loss_EM = torch.stack(entries).view(len(EXITS), len(DIMS))
    weighted_sum(loss_EM).backward()
    return loss_EM.detach(), x.grad


def of_case(case, where: World = ALONE):
    options, negatives, skip, missing = case
    sample = texts(negatives, skip)
    return table(sample, scores_of(sample, missing), where, **options)


def assert_close(got, want):
    assert torch.allclose(got[0], want[0], rtol=1e-6, atol=0), (got[0], want[0])
    assert torch.allclose(got[1], want[1], rtol=0, atol=1e-6 * want[1].abs().max().item())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_term_is_its_formula(case):
    options, negatives, skip, missing = case
    sample = texts(negatives, skip)
    got, want = of_case(case), truth(sample, scores_of(sample, missing), **options)
    assert got[0].dtype == torch.float64 and (want[0] > 0).all()
    assert_close(got, want)


def test_temperature_of_the_source():
    sample = texts()
    got = table(sample, scores_of(sample), temperature=0.3)
    assert_close(got, truth(sample, scores_of(sample), "kl", 1.0, 0.3))


def test_no_query_with_scores_is_zero():
    sample = texts()
    for teacher_scores in (None, np.full(sample.vectors.shape[1], np.nan, np.float32)):
        for form in FORMS:
            loss_EM, grad = table(sample, teacher_scores, score_form=form)
            assert (loss_EM == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_term_is_sentence_transformers_loss(form):
    """On the same bits; their KL is times the squared temperature."""
    from sentence_transformers.sentence_transformer import losses

    sample = texts((3,) * 6, dtype=torch.float32)
    teacher_scores = scores_of(sample)
    got = table(sample, teacher_scores, score_form=form, score_temperature=1.0)[0]
    columns = torch.tensor(sample.groups).T
    labels = torch.from_numpy(teacher_scores)[columns[1:]].T
    for e, (m, d) in itertools.product(range(len(EXITS)), enumerate(DIMS)):
        vectors = [sample.vectors[e, rows, :d] for rows in columns]
        options = {"model": None, "similarity_fct": torch.cosine_similarity}
        if form == "margin":
            want = losses.MarginMSELoss(**options).compute_loss_from_embeddings(vectors, labels)
        else:
            public = losses.DistillKLDivLoss(
                **options, student_temperature=0.1, teacher_temperature=1.0
            )
            want = public.compute_loss_from_embeddings(vectors, labels) / 0.1**2
        assert torch.allclose(got[e, m], want, rtol=1e-5)


# ---- processes ----


def process(where: World) -> dict:
    return {name: of_case(case, where) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_mean_over_processes_is_the_loss_of_one(name):
    parts = [results[name] for results in gloo_once(2, process)]
    assert_close([torch.stack(x).mean(0) for x in zip(*parts, strict=True)], of_case(CASES[name]))
    assert not torch.allclose(parts[0][0], parts[1][0])


# ---- runs ----


def scored(i: int, negatives: int = 2) -> dict:
    hard = [f"{i} against {j}" for j in range(negatives)]
    row = {"query": f"query {i}", "pos": [f"positive {i}"], "neg": hard}
    return row | {
        "pos_scores": [5.0 + i % 3],
        "neg_scores": [float(j - i % 4) for j in range(negatives)],
    }


def step_of(folder, data, *options):
    """Return the first two steps of a run."""
    folder.mkdir()
    job = small_job(folder, [data], "--distill.scores", 0.5, "--optim.lr", 1e-3, *options)
    return [train.one_step(job, i, iter([job.batches[i]])) for i in range(2)], job


def test_gradient_cache_and_memory_bank(tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [scored(i) for i in range(40)])
    cache = "--gradient-cache", "--activation-gib", 1e-7
    plain, job = step_of(tmp_path / "a", data)
    cached, _ = step_of(tmp_path / "b", data, *cache, "--pack-tokens", 60)
    banked, other = step_of(tmp_path / "c", data, "--loss.memory-bank", 64)
    assert other.bank is not None and list(plain[0].losses) == ["contrastive", "scores"]
    for a, b in zip(plain, cached, strict=True):
        assert torch.allclose(a.norm, b.norm, rtol=1e-4)
        assert torch.allclose(a.losses["scores"], b.losses["scores"], rtol=1e-4)
    # The bank adds negatives to the contrastive loss alone; the first step has an empty bank.
    assert torch.equal(plain[0].losses["scores"], banked[0].losses["scores"])
    assert (banked[1].losses["contrastive"] > plain[1].losses["contrastive"]).all()
    assert replace(job.run, distill=other.run.distill) == job.run


def test_source_without_scores(tmp_path):
    bare = write_jsonl(
        tmp_path / "bare.jsonl", [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(9)]
    )
    data = write_jsonl(tmp_path / "scored.jsonl", [scored(i) for i in range(9)])
    with pytest.raises(ValueError, match=r"distill.scores: expected a teacher's .* none in bare$"):
        step_of(tmp_path / "a", bare)
    lone = "--data", bare, data, "--distill.contrastive", 0
    with pytest.raises(ValueError, match="none in bare$"):
        step_of(tmp_path / "b", bare, *lone)
    steps, job = step_of(tmp_path / "c", bare, "--data", bare, data, "--sampling", "exhaust")
    teacher_scores = [bool((step.losses["scores"] != 0).all()) for step in steps]
    assert teacher_scores == [
        job.batches.names[source] == "scored" for source in job.batches.order[:2]
    ]
    assert set(teacher_scores) == {True, False}
    stream = {"path": bare, "streaming": True, "rows": 9}
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": data}, stream]}))
    with pytest.raises(ValueError, match="none in bare$"):
        step_of(tmp_path / "d", str(mixture), "--distill.contrastive", 0)
