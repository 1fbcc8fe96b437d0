"""Exits of models of transformers: each equals the model cut to its first layers."""

from weakref import ref

import pytest
import torch
from sentence_models import LAYERS, STYLES, tiny_trunk
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

from mlembed.integrations.exits import Exits

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 0, 0, 0]])
MASK = (IDS > 0).long()


def mean(states_NSD):
    return (states_NSD * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)


def run(trunk):
    return trunk(input_ids=IDS, attention_mask=MASK).last_hidden_state


@pytest.mark.parametrize("style", STYLES)
def test_exits_are_the_model_cut(style):
    """Texts are longer than the windows of the styles that have local layers."""
    trunk = tiny_trunk(style)
    exits = Exits(trunk, (1, 3))
    with torch.no_grad(), exits.pooled(mean) as vectors:
        full = run(trunk)
        assert len(vectors) == 2
    for depth, vectors_ND in zip((1, 3), vectors, strict=True):
        shorter = {"layer_types": trunk.config.layer_types[:depth]} if layered(trunk) else {}
        cut = tiny_trunk(style, num_hidden_layers=depth, **shorter)
        assert not cut.load_state_dict(trunk.state_dict(), strict=False).missing_keys
        with torch.no_grad():
            assert torch.equal(mean(run(cut)), vectors_ND), depth
    assert not torch.equal(vectors[0], vectors[1])
    assert torch.equal(full, run(trunk)), "hooks changed the output"


def layered(trunk):
    return getattr(trunk.config, "layer_types", None) is not None


def test_hooks_act_inside_of_the_block_alone():
    trunk = tiny_trunk("bert")
    exits = Exits(trunk, (1, 2))
    with exits.pooled(mean) as vectors:
        run(trunk)
        run(trunk)
    assert [list(v.shape) for v in vectors] == [[2, 32]] * 4
    run(trunk)
    assert len(vectors) == 4
    with pytest.raises(ZeroDivisionError), exits.pooled(lambda states: 1 / 0):
        run(trunk)
    run(trunk)


def test_states_of_exits_are_not_kept():
    trunk = tiny_trunk("bert")
    exits = Exits(trunk, (1, 2))
    states = []
    trunk.encoder.layer[0].register_forward_hook(lambda *args: states.append(ref(args[2])))
    with torch.no_grad(), exits.pooled(mean) as vectors:
        run(trunk)
        assert len(vectors) == 2 and states[0]() is None


@pytest.mark.parametrize("style", ["bert", "qwen3"])
def test_checkpoints_leave_gradients_unchanged(style):
    gradients = []
    for checkpoint in (False, True):
        trunk = tiny_trunk(style).train()
        if checkpoint:
            trunk.gradient_checkpointing_enable()
        exits = Exits(trunk, (1, 2))
        with exits.pooled(mean) as vectors:
            run(trunk)
        torch.stack(vectors).square().sum().backward()
        grads = {n: p.grad for n, p in trunk.named_parameters() if p.grad is not None}
        assert any("layers.1." in name or "layer.1." in name for name in grads)
        assert not any("layers.2." in name or "layer.2." in name for name in grads)
        gradients.append(grads)
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


@pytest.mark.parametrize("depths", [(0, 2), (2, 1), (2, 2), (LAYERS,)])
def test_wrong_depths_are_errors(depths):
    with pytest.raises(ValueError, match=r"exits: expected rising numbers in 1..3 before"):
        Exits(tiny_trunk("bert"), depths)


def test_models_without_such_layers_are_errors():
    albert = AlbertModel(AlbertConfig(vocab_size=20, hidden_size=12, num_attention_heads=2))
    with pytest.raises(ValueError, match="expected a list of 12 layers, got none in AlbertModel"):
        Exits(albert, (1,))

    class Scaled(BertModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * 2
            return output

    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 8}
    scaled = Scaled(BertConfig(vocab_size=20, num_hidden_layers=2, **sizes))
    with pytest.raises(ValueError, match="last layer's output or a norm of it, got Scaled"):
        Exits(scaled, (1,))
    assert scaled.training
