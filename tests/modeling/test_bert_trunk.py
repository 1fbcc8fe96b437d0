"""BERT as training runs it: texts that leave or skip layers, recomputed, compiled, in bf16, against
every text alone with its layers written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mlembed.data.packing import pack
from mlembed.modeling.transformer import Transformer
from mlembed.training.gradcache import ActivationCost
from tests.modeling.test_bert import ALL_EXITS, LENGTHS, NESTED, POOLINGS, build, texts

DEPTHS = np.array([3, 3, 2, 1, 1])


def skipped() -> np.ndarray:
    runs_LN = np.random.default_rng(3).random((3, len(LENGTHS))) < 0.7
    runs_LN[:, 0] = True
    return runs_LN


def cotangents(exits) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(exits), len(LENGTHS), 24, generator=generator, dtype=torch.float64)


def gradients(model, batch, exits, **how) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    got = model(batch, exits=exits, **how)
    (got * cotangents(exits)).sum().backward()
    return got.detach(), {n: p.grad for n, p in model.named_parameters()}


def alone(model, ids, depth, runs_L, exits) -> list[Tensor]:
    """One text by itself, its layers written out."""
    positions = torch.arange(len(ids)) + model.cfg.position_offset
    places, x = model.embed_places, model.embed_tokens(torch.from_numpy(ids), None)

    def norm(layer, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + model.cfg.layer_norm_eps).sqrt()
        return x * layer.weight + layer.bias

    x = norm(places.norm, x + places.positions.weight[positions] + places.segments.weight[:1])
    found = []
    for i in range(depth):
        layer = model.layers[i]
        if runs_L[i]:
            attn = layer.self_attn
            q, k, v = (
                (x @ w.weight.T + w.bias).view(len(ids), 4, 6).transpose(0, 1)
                for w in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            made = (q @ k.mT * 6**-0.5).softmax(-1) @ v
            made = made.transpose(0, 1).reshape(len(ids), 24)
            x = norm(layer.attention_norm, x + attn.o_proj(made))
            grown = layer.mlp.up_proj(x)
            grown = grown * (1 + torch.erf(grown * 0.5**0.5)) / 2
            x = norm(layer.output_norm, x + layer.mlp.down_proj(grown))
        if i + 1 in exits:
            pooled = {"mean": x.mean(0), "last": x[-1]}.get(model.cfg.pooling, x[0])
            if model.cfg.pooling == "pooler":
                pooled = (model.pooler.weight @ pooled + model.pooler.bias).tanh()
            found.append(pooled)
    return found


@pytest.mark.parametrize("skip", [False, True], ids=["", "skipping"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_leaving_equals_every_text_alone(pooling, skip):
    """The contract: embeddings and all parameters' gradients, in float64."""
    model = build(replace(NESTED, pooling=pooling, position_offset=2), dtype=torch.float64)
    ids, exits = texts(), (1, 3)
    runs_LN = skipped() if skip else np.ones((3, len(LENGTHS)), dtype=bool)
    batch = pack(ids, DEPTHS, runs_LN)
    got, mine = gradients(model, batch, exits)
    again, recomputed = gradients(model, batch, exits, recompute=2)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for i, (text, depth) in enumerate(zip(ids, DEPTHS.tolist(), strict=True)):
        found = alone(model, text, depth, runs_LN[:, i], exits)
        for e, vector in enumerate(found):
            torch.testing.assert_close(got[e, i], vector, rtol=0, atol=1e-12)
            total = total + (vector * cotangents(exits)[e, i]).sum()
        assert (got[len(found) :, i] == 0).all()
    total.backward()
    assert torch.equal(again, got)
    for name, p in model.named_parameters():
        assert mine[name] is not None, f"{name}: no gradient, which several processes wait for"
        torch.testing.assert_close(mine[name], p.grad, rtol=0, atol=1e-11, msg=lambda m, n=name: n)
        torch.testing.assert_close(recomputed[name], mine[name], rtol=0, atol=1e-13)


def test_every_parameter_has_a_use():
    """Gradients that are not zero: of the segments only the first row, of positions those met."""
    for pooling in POOLINGS:
        model = build(replace(NESTED, pooling=pooling), dtype=torch.float64)
        _, found = gradients(model, pack(texts()), (1, 3))
        for name, grad in found.items():
            if name.endswith("k_proj.bias"):  # moves all scores of a query alike: none to a softmax
                assert grad is not None and grad.abs().max() < 1e-12
            else:
                assert grad is not None and grad.abs().max() > 1e-6, name
        assert (found["embed_places.segments.weight"][1:] == 0).all()


def test_compiled_equals_eager():
    batch = pack(texts(), DEPTHS, skipped())
    want, wanted = gradients(build(dtype=torch.float64), batch, ALL_EXITS)
    for lean in (False, True):
        model = build(NESTED, "aot_eager", torch.float64, lean)
        got, found = gradients(model, batch, ALL_EXITS, recompute=1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize("lean", [False, True])
def test_token_counts_do_not_compile_anew(lean):
    """As test_trunk.py: one graph a half for training, one for inference, one more for one row."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = build(NESTED, counting, lean=lean)
    lengths = [(3, 4), (17, 1, 30), (31,), (2, 2, 2, 2, 9), (5,) * 20]
    for some in lengths:
        model(pack(texts(some)), exits=ALL_EXITS).sum().backward()
    first = len(graphs)
    for some in lengths[1:]:
        depths = np.array([3, *[2] * (len(some) - 1)])
        model(pack(texts(some), depths), exits=ALL_EXITS, recompute=2).sum().backward()
    assert first <= 2 and len(graphs) == first
    with torch.inference_mode():
        for some in lengths:
            model(pack(texts(some)))
    assert len(graphs) <= first + 3  # a text alone ends in one row, no matrix to the compiler


def test_dropout_is_of_what_is_added_and_repeats_in_recomputation():
    model = build(replace(NESTED, dropout=0.4)).train()
    batch, results = pack(texts()), []
    for recompute in (0, 3):
        torch.manual_seed(7)
        results.append(gradients(model, batch, (1, 3), recompute=recompute))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=0, atol=1e-6)
    torch.manual_seed(8)
    assert not torch.equal(model(batch, exits=(1, 3)), results[0][0])
    # Where nothing but the embedding is dropped from, that is seen as well.
    shallow, words = build(replace(NESTED, dropout=0.4)).train(), torch.ones(500, 24)
    made = shallow.embed_places(words, torch.zeros(500, dtype=torch.int64))
    assert 0.3 < (made == 0).float().mean() < 0.5
    shallow.eval()
    assert (shallow.embed_places(words, torch.zeros(500, dtype=torch.int64)) != 0).all()


def test_norms_and_vectors_stay_fp32_under_autocast():
    model = build(replace(NESTED, layer_norm_eps=1e-12))
    with torch.no_grad():
        want = model(pack(texts()), exits=ALL_EXITS)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(pack(texts()), exits=ALL_EXITS)
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())  # no bf16 number, dressed up
    cosines = torch.nn.functional.cosine_similarity(got, want, dim=-1)
    assert cosines.min() > 0.995


def test_bf16_weights_run_under_autocast():
    """As bf16 training has it: matrices in bf16, norms and biases in fp32."""
    model = build()
    for p in model.parameters():
        if p.ndim > 1:
            p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pack(texts()), exits=ALL_EXITS)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_probe_measures_a_block(bf16):
    kept = ActivationCost.measure(build().train(), bf16)
    assert kept.input == 24 * (2 if bf16 else 4)
    assert kept.per_token > 5 * kept.input


def test_initial_weights():
    torch.manual_seed(0)
    model = Transformer(replace(NESTED, ranks=(11,)))
    for name, p in model.state_dict().items():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.ndim == 1:
            assert (p == 1).all()
        elif name == "embed_tokens.W":
            assert p.std() == pytest.approx(11**-0.5, rel=0.2)
        else:
            assert p.std() == pytest.approx(0.02, rel=0.25), name


def test_trains():
    """A few steps of matching: what is built learns."""
    torch.manual_seed(0)
    model = Transformer(replace(NESTED, layer_norm_eps=1e-12)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    a, b = pack(texts((5,) * 12, 1)), pack(texts((5,) * 12, 2))
    losses = []
    for _ in range(30):
        x, y = (torch.nn.functional.normalize(model(z)[-1], dim=-1) for z in (a, b))
        loss = torch.nn.functional.cross_entropy(x @ y.T / 0.05, torch.arange(12))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
