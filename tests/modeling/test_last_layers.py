"""Exits that end with the model's last layers, against ordinary models of the layers they run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import assert_same_model, tiny_encoder
from torch import Tensor, nn
from transformer_truth import SHAPES, as_transformers, build, hf_exits, texts

from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer, num_parameters

LAYERS = 5
KINDS = [("bert", "mean"), ("bert", "cls"), ("bert", "pooler"), ("qwen3", "last")]
every_kind = pytest.mark.parametrize(("style", "pooling"), KINDS)
# Falling depths, some at no exit, and lengths that hurt: one token, two, a prime, a long one.
DEPTHS = np.array([5, 5, 4, 3, 3, 3, 2])
LENGTHS = (7, 1, 19, 2, 40, 1, 5)


def shape(style: str = "qwen3", pooling: str = "last", last: int = 2) -> config.Model:
    exits = (last + 1, LAYERS)
    sizes = {"num_hidden_layers": LAYERS, "exits": exits, "last_layers": last}
    return replace(SHAPES[style], pooling=pooling, causal=style == "qwen3", **sizes)


def ordinary(model: Transformer, exit: int) -> Transformer:
    """Return a model that runs an exit's layers one after another, with the model's own modules."""
    cfg = replace(model.cfg, num_hidden_layers=exit, exits=(exit,), last_layers=0)
    tied = Transformer(cfg)
    for name, module in model.named_children():
        setattr(tied, name, module)
    layers = list(model.layers)
    last = model.cfg.last_layers
    tied.layers = nn.ModuleList([*layers[: exit - last], *layers[LAYERS - last :]])
    return tied.train(model.training)


# ---- vectors ----


@every_kind
@pytest.mark.parametrize("last", [1, 2])
def test_every_exit_equals_transformers_and_its_cut(style, pooling, last):
    model, ids = build(shape(style, pooling, last)), texts((17, 1, 30, 2))
    exits = range(last + 1, LAYERS + 1)
    with torch.no_grad():
        got = model(pack(ids), exits=exits)
        assert torch.equal(model(pack(ids)), got[[0, -1]])  # the configured exits
        for exit, vectors in zip(exits, got, strict=True):
            small = pretrained.cut(model, exit, None)
            assert len(small.layers) == small.cfg.num_hidden_layers == exit
            assert small.cfg.exits == tuple(sorted({last + 1, exit}))
            inner = small(pack(ids), exits=range(last + 1, exit + 1))
            torch.testing.assert_close(inner, got[: exit - last], rtol=0, atol=0)
            assert num_parameters(model.cfg, exit) == sum(p.numel() for p in small.parameters())
            theirs = hf_exits(as_transformers(ordinary(model, exit)), ids, pooling)[-1]
            torch.testing.assert_close(vectors, theirs, rtol=0, atol=1e-5)
            cut = hf_exits(as_transformers(small), ids, pooling)[-1]
            torch.testing.assert_close(cut, theirs, rtol=0, atol=1e-6)
    # Exits differ from each other, so that equality means something at each.
    assert (got[1:] - got[:-1]).abs().amax((1, 2)).min() > 0.1


@every_kind
@pytest.mark.parametrize("recompute", [0, 2, 4, 5])
def test_gradients_equal_those_of_every_text_alone(style, pooling, recompute):
    """Vectors and all gradients of a pack of mixed depths, in float64."""
    model = build(shape(style, pooling), dtype=torch.float64).train()
    exits, ids = (3, 5), texts(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, len(ids), 24, generator=generator, dtype=torch.float64)
    got = model(pack(ids, DEPTHS), recompute=recompute)
    (got * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for e, exit in enumerate(exits):
        alone = ordinary(model, exit)
        for i, text in enumerate(ids):
            if DEPTHS[i] < exit:
                assert (got[e, i] == 0).all()
                continue
            vector = alone(pack([text]))[0, 0]
            torch.testing.assert_close(got[e, i], vector, rtol=0, atol=1e-12)
            (vector * weights[e, i]).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and grads[name] is not None, name
        torch.testing.assert_close(grads[name], p.grad, rtol=0, atol=1e-11, msg=name)


def test_dropout_is_drawn_again_by_recomputation():
    """The last layers drop other units at every exit, and recomputation drops the same ones."""

    def gradients(recompute: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        model(pack(texts(LENGTHS), DEPTHS), recompute=recompute).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model = build(replace(shape(), dropout=0.4), dtype=torch.float64).train()
    want = gradients(0)
    for recompute in (3, 5):
        for name, gradient in gradients(recompute).items():
            torch.testing.assert_close(gradient, want[name], rtol=0, atol=1e-11)


def test_compiled_equals_eager():
    """The last layers run the graphs of the others, at every exit."""
    graphs: list[torch.fx.GraphModule] = []
    model = build(shape(), lambda graph, _: graphs.append(graph) or graph.forward, torch.float64)
    plain = build(shape(), None, torch.float64)
    for depths in (None, DEPTHS):
        batch = pack(texts(LENGTHS), depths)
        torch.testing.assert_close(model(batch, recompute=4), plain(batch), rtol=0, atol=1e-12)
    assert len(graphs) == 2


@every_kind
def test_encoding_ends_after_the_last_attention(style, pooling):
    """At every exit the last layer computes only pooled rows after its attention."""
    model = build(shape(style, pooling), dtype=torch.float64)
    rows: list[list[int]] = [[] for _ in model.layers]
    for layer, counts in zip(model.layers, rows, strict=True):
        layer.mlp.register_forward_hook(lambda _, x, out, counts=counts: counts.append(len(x[0])))
    batch = pack(texts(LENGTHS), DEPTHS)
    want = model(batch).detach()
    for counts in rows:
        counts.clear()
    with torch.inference_mode():
        got = model(batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    # Six texts of 70 tokens reach exit 3, two of 8 tokens exit 5.
    assert rows[:4] == [[70], [27], [8], [70, 8]]
    assert rows[4] == ([70, 8] if pooling == "mean" else [6, 2])


def test_encoder_mixes_exits():
    encoder = tiny_encoder(num_hidden_layers=4, exits=(3, 4), last_layers=2)
    words = ["one", "two three", "three one two", "one two", "three"]
    exits = [4, 3, 4, 3, 3]
    mixed = encoder.encode(words, exit=exits)
    for exit in (3, 4):
        alone = encoder.encode(words, exit=exit)
        rows = [i for i, e in enumerate(exits) if e == exit]
        np.testing.assert_allclose(mixed[rows], alone[rows], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"exit: expected 3\.\.4 \(the depth\), got 2"):
        encoder.encode(words, exit=2)


# ---- directories ----


def test_saved_models_keep_their_last_layers(tmp_path):
    model = build(shape("bert", "cls"))
    pretrained.save(model, tmp_path)
    assert_same_model(pretrained.load(str(tmp_path)), model)
    small = pretrained.cut(model, 3, 11)
    assert (small.cfg.last_layers, small.cfg.exits, small.cfg.ranks) == (2, (3,), (3, 11))


# ---- errors ----


def test_exits_are_above_the_last_layers():
    assert config.Model(num_hidden_layers=6, last_layers=2).exits == (4, 6)
    for exits in ((2, 4), (1, 2, 4)):
        with pytest.raises(ValueError, match=r"model.exits: expected more than last_layers 2, got"):
            config.Model(exits=exits, last_layers=2)
    with pytest.raises(ValueError, match=r"model.exits: expected more than last_layers 4, got \(4"):
        config.Model(last_layers=4)
    with pytest.raises(ValueError, match="model.last_layers: expected 0 or more, got -1"):
        config.Model(last_layers=-1)
    model = build(shape())
    for exits in ([2], [1, 5]):
        with pytest.raises(
            ValueError, match=rf"exit: expected 3\.\.5 \(the depth\), got {exits[0]}"
        ):
            model(pack(texts((3, 2))), exits=exits)
    with pytest.raises(ValueError, match=r"exit: expected 3\.\.5 \(the depth\), got 2"):
        pretrained.cut(model, 2, None)


def test_layer_dropout_skips_no_shared_layer():
    depth = config.Depth(layer_dropout=0.1)
    with pytest.raises(ValueError, match=r"depth.layer_dropout: expected 0 with .*, got 0\.1"):
        config.Run(model=config.Model(last_layers=2), depth=depth)
