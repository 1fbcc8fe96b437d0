"""Style transformers: every family equals transformers at each exit, packed, trained, cut."""

import json
import shutil
from dataclasses import replace

import auto_models
import numpy as np
import pytest
import torch
from auto_models import FAMILIES, LAYERS
from factories import tiny_tokenizer
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from mlembed import config
from mlembed.config.shapes import nested
from mlembed.data.packing import pack
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.automodel import architecture, probe
from mlembed.modeling.automodel.choose import trunk_of
from mlembed.modeling.automodel.trunk import AutoTransformer
from mlembed.modeling.flops import layer_weights, training_flops
from mlembed.modeling.transformer import num_parameters
from mlembed.training.gradcache import ActivationCost
from mlembed.training.setup import try_attention

every_family = pytest.mark.parametrize("family", FAMILIES)
# Longer than the windows of 3 or 4 tokens on a side, as long as these, and shorter.
TEXTS = [np.arange(n) * 7 % 50 for n in (23, 9, 5, 4, 3, 1)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return the directory of each family's model."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        auto_models.host(family).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


def load(place, **changes) -> AutoTransformer:
    cfg = hf_config.from_checkpoint(place, config.Model(pooling="mean"), "transformers")
    model = pretrained.load(str(place), replace(cfg, **changes))
    assert isinstance(model, AutoTransformer)
    return model


def reference(place, text: np.ndarray, attention: str = "eager") -> list[torch.Tensor]:
    """Return the normed output [T, D] of each layer of transformers' own model for one text."""
    host = AutoModel.from_pretrained(place, attn_implementation=attention).eval()
    norm = getattr(host, "norm", getattr(host, "final_norm", lambda x: x))
    with torch.no_grad():
        output = host(torch.from_numpy(text)[None], output_hidden_states=True)
    *inner, _ = output.hidden_states[1:]
    return [norm(x)[0] for x in inner] + [output.last_hidden_state[0]]


# ---- equality ----


@every_family
@pytest.mark.parametrize(("attention", "pooling"), [("eager", "mean"), ("sdpa", "last")])
def test_every_exit_equals_transformers(places, family, attention, pooling):
    with torch.no_grad():
        exits_END = load(places[family], pooling=pooling)(pack(TEXTS), exits=range(1, LAYERS + 1))
    for text, got_ED in zip(TEXTS, exits_END.unbind(1), strict=True):
        layers = reference(places[family], text, attention)
        want_ED = torch.stack([x.mean(0) if pooling == "mean" else x[-1] for x in layers])
        torch.testing.assert_close(got_ED, want_ED, rtol=0, atol=1e-5)


@every_family
def test_gradients_equal_those_of_transformers(places, family):
    model = load(places[family]).eval()
    weight = torch.randn(len(TEXTS), model.cfg.hidden_size, generator=torch.manual_seed(0))
    (model(pack(TEXTS), exits=[LAYERS])[0] * weight).sum().backward()
    host = AutoModel.from_pretrained(places[family]).eval()
    for text, row in zip(TEXTS, weight, strict=True):
        hidden = host(torch.from_numpy(text)[None]).last_hidden_state[0]
        (hidden.mean(0) * row).sum().backward()
    theirs = dict(host.named_parameters())
    for name, parameter in model.named_parameters():
        got, want = parameter.grad, theirs.pop(model.hf_name(name)).grad
        if name == "embed_tokens.weight":
            # In transformers the row of the padding token has no gradient.
            pad = host.config.pad_token_id
            got, want = (torch.cat([x[:pad], x[pad + 1 :]]) for x in (got, want))
        atol = 1e-5 * want.abs().max().item() + 2e-5
        torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)
    assert not [name for name in theirs if not name.startswith("pooler")]


@every_family
def test_texts_that_leave_early_and_skip_layers(places, family):
    """A text's exits do not depend on the other texts, nor on those that skip a layer."""
    model = load(places[family])
    depths = np.array([4, 4, 3, 2, 2, 1])
    runs_LN = np.ones((LAYERS, len(TEXTS)), dtype=bool)
    runs_LN[1, [0, 2]] = runs_LN[2, 1] = False
    with torch.no_grad():
        exits_END = model(pack(TEXTS, depths, runs_LN), exits=[1, 2, 3, 4])
        for n, (text, depth) in enumerate(zip(TEXTS, depths, strict=True)):
            x_TD, tables = model.embed(pack([text]), None)
            for number in range(1, depth + 1):
                if runs_LN[number - 1, n]:
                    x_TD = model.block(model.layers[number - 1], x_TD, tables, pack([text]).plan)
                want = model._normed(x_TD).mean(0)
                torch.testing.assert_close(exits_END[number - 1, n], want, rtol=0, atol=1e-5)
            assert not exits_END[depth:, n].any()


@every_family
@pytest.mark.parametrize("last", [0, 1])
def test_a_cut_is_read_by_transformers(places, family, last, tmp_path):
    # transformers 5.4 cannot read a ModernBERT without local layers: layers 1 and 4.
    exits = (2 + last, 4)
    model = load(places[family], exits=exits, last_layers=last, ranks=(8, 16))
    with torch.no_grad():
        exits_END = model(pack(TEXTS), rank=8)
    for exit, want_ND in zip(exits, exits_END, strict=True):
        small = pretrained.cut(model, exit, 8)
        folder = tmp_path / str(exit)
        folder.mkdir()
        pretrained.save(small, folder)
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == exit
        for text, want in zip(TEXTS, want_ND, strict=True):
            torch.testing.assert_close(reference(folder, text)[-1].mean(0), want, rtol=0, atol=1e-5)
        again = pretrained.load(str(folder))
        with torch.no_grad():
            torch.testing.assert_close(again(pack(TEXTS), exits=[exit])[0], want_ND)


# ---- training ----


@every_family
def test_recomputed_layers_have_equal_gradients(places, family):
    model = load(places[family], ranks=(8, 16)).train()
    runs_LN = np.ones((LAYERS, len(TEXTS)), dtype=bool)
    runs_LN[1, 0] = False
    batch = pack(TEXTS, np.array([4, 4, 3, 2, 2, 1]), runs_LN)
    grads = []
    for recompute in (0, LAYERS):
        model.zero_grad()
        model(batch, exits=[2, 4], rank=8, recompute=recompute).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_dropout_is_of_the_model_and_not_of_attention(places):
    for family in ("modernbert", "xlm-roberta"):
        model = load(places[family], dropout=0.3).train()
        batch = pack(TEXTS)
        torch.manual_seed(0)
        one, other = model(batch), model(batch)
        assert (one - other).abs().max() > 0.1
        torch.manual_seed(0)
        assert torch.equal(one, model(batch))
        model.eval()
        assert torch.equal(model(batch), load(places[family]).eval()(batch))
    with pytest.raises(ValueError, match="model.dropout: expected 0, as llama has none, got 0.3"):
        load(places["llama"], dropout=0.3)


def test_bf16_and_its_cost_of_memory(places):
    model = load(places["modernbert"])
    with torch.no_grad():
        want = model(pack(TEXTS))
    with torch.autocast("cpu", torch.bfloat16):
        got = model(pack(TEXTS))
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() > 0.99
    whole, half = (ActivationCost.measure(model, bf16) for bf16 in (False, True))
    assert whole.per_token > half.per_token > 0 and whole.input == 4 * 32


def test_compiled_layers_equal_eager_ones(places):
    model = load(places["modernbert"])
    with torch.no_grad():
        want = model(pack(TEXTS))
        model.compile_blocks(backend="eager")
        torch.testing.assert_close(model(pack(TEXTS)), want)


@every_family
def test_numbers_of_parameters(places, family):
    cfg = load(places[family]).cfg
    for changes in ({}, {"ranks": (8, 16)}, {"dense": (48, 32)}):
        model = trunk_of(replace(cfg, **changes))
        assert num_parameters(model.cfg) == sum(p.numel() for p in model.parameters())
    small = pretrained.cut(model, 2, None)
    count = sum(p.numel() for p in small.parameters())
    assert num_parameters(model.cfg, 2) == num_parameters(small.cfg) == count
    matrices = [p for p in model.layers[-1].parameters() if p.ndim > 1]
    assert layer_weights(cfg) == sum(p.numel() for p in matrices)
    assert training_flops(nested(cfg), pack(TEXTS), None).forward > 0


def test_a_window_that_attention_lacks_stops_a_run_before_its_first_step(tmp_path):
    model = load(auto_models.write("gemma3", tmp_path / "source"), attention="triton")
    tokens = tiny_tokenizer()
    run = config.Run(model=model.cfg, max_length=20)
    with pytest.raises(
        ValueError, match="impl: triton supports windows from .* 20 tokens, got .* 4"
    ):
        try_attention(run, model, tokens, False)


# ---- linear layers after the pooling ----


def test_linear_layers_like_embeddinggemma(tmp_path):
    place = auto_models.write("embeddinggemma", tmp_path / "source", (48, 32))
    model = load(place, exits=(2, 4))
    assert model.cfg.dense == (48, 32) and model.cfg.pooling == "mean"
    sentences = SentenceTransformer(str(place), device="cpu")
    texts = ["one two three four five six seven", "a"]
    ids = [np.array(sentences.tokenizer(text)["input_ids"]) for text in texts]
    with torch.no_grad():
        exits_END = model(pack(ids))
        want = torch.nn.functional.normalize(exits_END[-1], dim=-1)
        for exit, row_ND in zip((2, 4), exits_END, strict=True):
            vectors = torch.stack([reference(place, x)[exit - 1].mean(0) for x in ids])
            torch.testing.assert_close(model.project(vectors), row_ND, rtol=0, atol=1e-5)
    got = sentences.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    out = tmp_path / "out"
    out.mkdir()
    pretrained.save(model, out)
    with torch.no_grad():
        torch.testing.assert_close(pretrained.load(str(out))(pack(ids)), exits_END)
    for changes, message in (
        ({"out_features": 31}, "3_Dense/config.json: out_features: expected 32, .*, got 31"),
        ({"bias": True}, "3_Dense/config.json: expected a tanh layer"),
    ):
        copy = shutil.copytree(place, tmp_path / str(changes))
        layer = copy / "3_Dense" / "config.json"
        layer.write_text(json.dumps(json.loads(layer.read_text()) | changes))
        with pytest.raises(ValueError, match=message):
            hf_config.from_checkpoint(copy, config.Model())


def test_own_styles_reject_linear_layers(tmp_path):
    place = auto_models.write("qwen3", tmp_path / "source", (48, 32))
    with pytest.raises(ValueError, match="2_Dense/config.json: .* needs --model.style transform"):
        hf_config.from_checkpoint(place, config.Model())
    assert load(place).cfg.dense == (48, 32)


# ---- shapes ----


def test_own_styles_stay_the_default(places):
    styles = {
        family: hf_config.from_checkpoint(place, config.Model()).style
        for family, place in places.items()
    }
    own = {"qwen3": "qwen3", "xlm-roberta": "bert"}
    assert styles == {family: own.get(family, "transformers") for family in FAMILIES}


def test_shape_of_a_checkpoint(places):
    shapes = {f: hf_config.from_checkpoint(p, config.Model()) for f, p in places.items()}
    assert {f for f, cfg in shapes.items() if not cfg.causal} == {
        *("modernbert", "embeddinggemma", "xlm-roberta")
    }
    assert shapes["modernbert"].pooling == "mean" and shapes["llama"].pooling == "last"
    cfg = hf_config.from_checkpoint(places["xlm-roberta"], config.Model(), "transformers")
    assert (cfg.position_offset, cfg.max_position_embeddings) == (2, 64)
    with pytest.raises(ValueError, match="texts: expected at most 64 tokens .positions., got 65"):
        load(places["xlm-roberta"])(pack([np.arange(65) % 50]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "own"}, "model_type: expected 'albert', .*, got 'own'"),
        ({"auto_map": {"AutoModel": "code.M"}}, "auto_map: expected none"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: expected self-attention alone"),
        ({"add_cross_attention": True}, "add_cross_attention: .*, got cross-attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: .* without a soft cap, got 50"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "rope_type: expected rotary positions that depend on a text alone, got 'dynamic'",
        ),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation: expected 'eager'"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings: expected at most 16777216"),
        ({"hidden_size": None}, "expected vocab_size, .*got none of hidden_size"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers: expected an integer, got '4'"),
    ],
)
def test_unsupported_architectures(places, changes, message, tmp_path):
    hf = json.loads((places["llama"] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=message):
        hf_config.from_checkpoint(tmp_path, config.Model())
    cfg = load(places["llama"]).cfg
    with pytest.raises(ValueError, match="model"):
        trunk_of(replace(cfg, architecture=json.dumps(hf)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("deberta-v2", {}, "takes its attention from transformers' registry, got deberta-v2"),
        ("albert", {"embedding_size": 32}, "expected one list of 4 layers in albert, got none"),
        (
            "electra",
            {"embedding_size": 16},
            "expected a table .* of width 32 in electra, got .* 16",
        ),
    ],
)
def test_architectures_without_what_the_trunk_needs(kind, changes, message):
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    hf = {"model_type": kind, **shape, "intermediate_size": 40, **changes}
    fields = {"head_dim": 8, "num_key_value_heads": 4, "intermediate_size": 40, "causal": False}
    with pytest.raises(ValueError, match=message):
        trunk_of(
            config.Model(
                style="transformers",
                architecture=json.dumps(hf),
                **shape,
                **fields,
                max_position_embeddings=512,
                pooling="mean",
            )
        )


def test_a_trunk_with_other_vectors_is_noticed(places, monkeypatch):
    """A norm that is not found by its name, and a mask in the other direction."""
    monkeypatch.setattr(architecture, "NORMS", ("no_such_norm",))
    with pytest.raises(probe.OtherVectorsError, match="expected the vectors .* LlamaModel, got"):
        load(places["llama"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model.causal: expected True, got False, unlike"):
        load(places["llama"], causal=False)


def test_checkpoints_with_a_head_and_other_weights(places, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(places["modernbert"], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    named = {f"model.{name}": x for name, x in weights.items()}
    head = {"head.dense.weight": torch.ones(32, 32), "decoder.bias": torch.ones(50)}
    save_file(named | head, copy / "model.safetensors")
    for name, weight in load(copy).state_dict().items():
        assert torch.equal(weight, load(places["modernbert"]).state_dict()[name])
    save_file(named | {"model.layers.4.new": torch.ones(3)}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.4.new: expected shape none, got \[3\]"):
        load(copy)
    named.pop("model.layers.2.attn.Wqkv.weight")
    save_file(named, copy / "model.safetensors")
    with pytest.raises(ValueError, match="layers.2.block.attn.Wqkv.weight: expected .*got none"):
        load(copy)


def test_a_shape_and_its_architecture_agree(places):
    cfg = load(places["llama"]).cfg
    for changes, message in (
        ({"num_hidden_layers": 3, "exits": (3,)}, "model.num_hidden_layers: expected 4, .*got 3"),
        ({"architecture": "{"}, "model.architecture: expected JSON"),
        ({"architecture": "[]"}, "model.architecture: expected an object, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            trunk_of(replace(cfg, **changes))
    with pytest.raises(ValueError, match="model.architecture: expected none, got another value"):
        replace(cfg, style="qwen3")
    with pytest.raises(ValueError, match="model.architecture: expected that of init .* got none"):
        config.Model(style="transformers")
    with pytest.raises(ValueError, match="model.dense: expected layers .* end at hidden_size 32"):
        replace(cfg, dense=(32, 16))
