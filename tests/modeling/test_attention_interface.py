"""Models of transformers with our packed attention against their own: padded, packed, trained."""

import inspect
from importlib.util import find_spec

import pytest
import torch
from factories import randomise
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    Gemma3TextConfig,
    Gemma3TextModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from mlembed.modeling import attention_interface

MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
# transformers 5.24 renamed it, and warns about the old name.
NO_CACHE = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
DECODER = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "qwen3": lambda: Qwen3Model(Qwen3Config(**DECODER)),
    "qwen3 both ways": lambda: Qwen3Model(Qwen3Config(**DECODER, is_causal=False)),
    "bert": lambda: BertModel(BertConfig(**SHAPE, num_attention_heads=4)),
    # Windows of 3, 4 and 4 tokens on a side in the local layers, shorter than most texts.
    "mistral": lambda: MistralModel(MistralConfig(**DECODER, sliding_window=4)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**SHAPE, num_attention_heads=4, local_attention=8, pad_token_id=0)
    ),
    "embedding gemma": lambda: Gemma3TextModel(
        Gemma3TextConfig(
            **DECODER,
            sliding_window=8,
            use_bidirectional_attention=True,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}
LOCAL = "mistral", "modernbert", "embedding gemma"
every_model = pytest.mark.parametrize("name", MODELS)
# A full row, a single token, a prime, two equal ones.
LENGTHS = (9, 1, 7, 4, 4)


@pytest.fixture(autouse=True, scope="module")
def registered():
    attention_interface.register()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for name, make in MODELS.items():
        model = make()
        randomise(model)
        with torch.no_grad():  # so that a lost bias or factor on scores shows
            for key, bias in model.named_parameters():
                if key.endswith("bias"):
                    bias.normal_(std=0.3, generator=generator)
        model.save_pretrained(folder / name)
    return folder


def compare(saved, name: str, batch: dict[str, Tensor], keep: Tensor, other: str = "sdpa") -> None:
    """Compare hidden states and gradients by our attention with those by another."""
    assert_same(*(outcome(load(saved, name, a), batch, keep) for a in ("mlembed", other)))


def load(saved, name: str, attention: str, **changes):
    return AutoModel.from_pretrained(
        saved / name, attn_implementation=attention, dtype=torch.float32, **changes
    ).eval()


def tokens(lengths=LENGTHS, side: str = "right") -> dict[str, Tensor]:
    longest = max(lengths)
    ids = torch.randint(50, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask.flip(1) if side == "left" else mask}


def outcome(model, batch: dict[str, Tensor], keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the hidden states of the tokens `keep`, and all gradients of a loss on them."""
    hidden = model(**batch).last_hidden_state[keep]
    model.zero_grad()
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), grads


def assert_same(mine, theirs) -> None:
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=2e-5)
    assert mine[1].keys() == theirs[1].keys() and mine[1]
    for name, grad in theirs[1].items():
        torch.testing.assert_close(
            mine[1][name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item() + 2e-5, msg=name
        )


# ---- padded ----


@every_model
@pytest.mark.parametrize("other", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left", "none", "no mask"])
def test_padded_batches(saved, name, side, other):
    batch = tokens((9, 9, 9) if side in ("none", "no mask") else LENGTHS, side)
    keep = batch["attention_mask"].bool()
    if side == "no mask":
        batch.pop("attention_mask")
    compare(saved, name, batch, keep, other)


@every_model
def test_masks_with_holes_and_masked_rows(saved, name):
    """Masks hide keys; outputs of masked tokens and rows are unspecified."""
    batch = tokens((9, 9, 9, 9))
    batch["attention_mask"][0, 2:4] = 0
    batch["attention_mask"][1, ::2] = 0
    batch["attention_mask"][2] = 0
    keep = batch["attention_mask"].bool()
    if name in LOCAL:
        with pytest.raises(
            ValueError, match="attention_mask: .* window of .*padding inside a text"
        ):
            load(saved, name, "mlembed")(**batch)
    else:
        compare(saved, name, batch, keep, "eager")


def test_rows_of_padding_are_zero(saved):
    model = load(saved, "bert", "mlembed")
    batch = tokens(side="left")
    seen = []
    for layer in model.encoder.layer:
        layer.attention.self.register_forward_hook(lambda m, i, out: seen.append(out[0]))
    model(**batch)
    padding = ~batch["attention_mask"].bool()
    assert len(seen) == 3
    for out in seen:
        assert (out[padding] == 0).all() and (out[~padding].abs().amax(-1) > 0).all()


def test_only_padding(saved):
    batch = tokens((3, 2))
    batch["attention_mask"][:] = 0
    for name in MODELS:
        assert load(saved, name, "mlembed")(**batch).last_hidden_state.isfinite().all()


# ---- packed ----


def flattened(lengths, **options) -> dict:
    ids = torch.randint(50, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    texts = [{"input_ids": part.tolist()} for part in ids.split(lengths)]
    batch = DataCollatorWithFlattening(**options)(texts, return_tensors="pt")
    batch.pop("labels")
    return dict(batch)


@every_model
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("bounds", [False, True], ids=["positions", "cu_seq_lens"])
def test_flattened_batches(saved, name, bounds, use_cache):
    """Each text of a collator's row equals the text alone."""
    batch = flattened(LENGTHS, return_flash_attn_kwargs=bounds)
    model = load(saved, name, "mlembed")
    if name == "modernbert" and not bounds:
        pytest.skip("ModernBERT does not give positions to its masks and layers")
    if name == "embedding gemma" and not use_cache:
        with pytest.raises(ValueError, match="expected causal or full .*, got another mask"):
            model(**batch, use_cache=False)
        return
    packed = model(**batch, use_cache=use_cache).last_hidden_state[0]
    alone = load(saved, name, "sdpa")
    for got, ids in zip(packed.split(LENGTHS), batch["input_ids"][0].split(LENGTHS), strict=True):
        want = alone(input_ids=ids[None]).last_hidden_state[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_positions_that_restart_train(saved, rows):
    batch = flattened(LENGTHS)
    if rows == 3:
        positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
        batch = {"input_ids": batch["input_ids"][0, :15].view(3, 5), "position_ids": positions}
    keep = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    compare(saved, "qwen3", batch | {"use_cache": False}, keep)


def test_contradicting_bounds(saved):
    model = load(saved, "qwen3", "mlembed")
    batch = flattened(LENGTHS, return_flash_attn_kwargs=True)
    wrong = torch.tensor([0, 9, 10, 25], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens: expected equal bounds for queries and keys"):
        model(**{**batch, "cu_seq_lens_k": wrong})
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: .* the mask's bounds \[0, 9, 10, 17, 21"):
        model(**{**batch, "cu_seq_lens_q": wrong, "cu_seq_lens_k": wrong}, use_cache=False)
    short = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 9, 10]))
    with pytest.raises(ValueError, match="cu_seqlens: expected the last to be T = 25, got 10"):
        model(input_ids=batch["input_ids"], **short)


# ---- training ----


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(saved, reentrant):
    batch, keep = tokens(), tokens()["attention_mask"].bool()
    plain = outcome(load(saved, "qwen3", "mlembed"), batch, keep)
    model = load(saved, "qwen3", "mlembed").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(outcome(model, batch, keep), plain)


@every_model
def test_under_autocast(saved, name):
    batch, keep = tokens(), tokens()["attention_mask"].bool()
    hidden = []
    for attention in ("mlembed", "sdpa"):
        with torch.autocast("cpu", torch.bfloat16):
            hidden.append(load(saved, name, attention)(**batch).last_hidden_state[keep].float())
    assert torch.nn.functional.cosine_similarity(*hidden, dim=-1).min() > 0.995


def test_mask_changed_in_place_is_read_again(saved):
    model, batch = load(saved, "bert", "mlembed"), tokens()
    batch["attention_mask"] = batch["attention_mask"].bool()  # a bool mask is not copied on its way
    before = model(**batch).last_hidden_state
    batch["attention_mask"][0, 5:] = False
    after = model(**batch).last_hidden_state
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-3
    torch.testing.assert_close(before[1:, 0], after[1:, 0])


@every_model
@pytest.mark.parametrize("given", ["attention_mask", "nothing", "position_ids", "cu_seq_lens"])
def test_mask_is_read_once_per_pass(saved, name, given, monkeypatch):
    calls = []
    layout = attention_interface._layout
    monkeypatch.setattr(attention_interface, "_layout", lambda *x: calls.append(x) or layout(*x))
    batch = {
        "attention_mask": tokens,
        "nothing": lambda: {"input_ids": tokens()["input_ids"]},
        "position_ids": lambda: flattened(LENGTHS),
        "cu_seq_lens": lambda: flattened(LENGTHS, return_flash_attn_kwargs=True),
    }[given]()
    model = load(saved, name, "mlembed")
    for passes in (1, 2):
        with torch.inference_mode():
            model(**batch)
        # Local and global layers have masks of their own.
        assert len(calls) == passes * len(set(getattr(model.config, "layer_types", [0]) or [0]))


# ---- unsupported features ----


def test_keys_of_a_cache(saved):
    model = load(saved, "qwen3", "mlembed")
    ids = tokens((5, 5))["input_ids"]
    # The first pass has no keys before it.
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="as many queries as keys, got 1 and 6.*use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_dropout_of_attention_weights(saved):
    batch = tokens()
    model = load(saved, "bert", "mlembed")  # 0.1 of them in training
    model(**batch)
    with pytest.raises(ValueError, match="dropout 0 .*got 0.1.*attention_probs_dropout_prob=0.0"):
        model.train()(**batch)
    load(saved, "bert", "mlembed", attention_probs_dropout_prob=0.0).train()(**batch)


def test_masks_of_other_kinds(saved):
    batch = tokens()
    model = load(saved, "qwen3", "mlembed")
    B, S = batch["input_ids"].shape
    dense = torch.ones(B, 1, S, S, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected .*\[5, 9\].*got torch.bool \[5, 1, 9, 9\]"):
        model(input_ids=batch["input_ids"], attention_mask=dense)
    common = {"config": model.config, "inputs_embeds": torch.zeros(B, S, 1), NO_CACHE: None}

    def near(batch, head, q, k):
        return abs(q - k) < 3

    # Every key before and two behind; two keys before.
    others = [{"or_mask_function": near}, {"and_mask_function": near}]
    if "block_sequence_ids" in MASK_ARGUMENTS:
        blocks = torch.full((B, S), -1)
        blocks[1, 2:4] = 0  # these two see each other
        others.append({"block_sequence_ids": blocks})
    for mask in (None, batch["attention_mask"]):
        for changed in others:
            with pytest.raises(ValueError, match="got another mask"):
                create_causal_mask(**common, attention_mask=mask, **changed)


def test_one_mask_for_two_kinds_of_layers(saved):
    """Causal and bidirectional layers of one model do not share a mask's state."""
    config = load(saved, "qwen3", "mlembed").config
    given = torch.ones(2, 9, dtype=torch.bool)
    common = {"config": config, "inputs_embeds": torch.zeros(2, 9, 1), NO_CACHE: None}
    causal = create_causal_mask(**common, attention_mask=given)
    other = create_bidirectional_mask(**common, attention_mask=given)
    assert (causal.mlembed.causal, other.mlembed.causal) == (True, False)
    assert not hasattr(given, "mlembed")


def test_scale_dtype_and_heads():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    module = torch.nn.Module()
    got, weights = attention_interface.attend(module, q, k, v, None, scaling=0.7)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.7, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(got, want.transpose(1, 2))
    # Like under autocast, where norms leave queries and keys in fp32.
    half, _ = attention_interface.attend(module, q, k, v.bfloat16(), None, scaling=0.7)
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), got, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("softcap", 30.0, "softcap: expected None, got 30"),
        ("s_aux", torch.zeros(4), "s_aux: expected None, got"),
        ("position_bias", torch.zeros(1, 4, 9, 9), "position_bias: expected None, got"),
        ("output_attentions", True, "output_attentions: expected None, got True"),
        # Zeros of an additive mask are visible: the opposite of ours.
        ("attention_mask", torch.zeros(2, 9), r"expected bools or integers \[2, 9\].*float32"),
        ("position_ids", torch.zeros(3, 2, 9), r"position_ids: expected \[2, 9\], got \[3, 2, 9\]"),
    ],
)
def test_errors_of_attend(name, value, message):
    q = torch.zeros(2, 4, 9, 8)
    base = {"attention_mask": None}
    with pytest.raises(ValueError, match=message):
        attention_interface.attend(torch.nn.Module(), q, q, q, **base | {name: value})
    off = base | {name: None, "output_attentions": False}
    out, _ = attention_interface.attend(torch.nn.Module(), q, q, q, **off)
    assert out.shape == (2, 9, 4, 8)


def test_cross_attention():
    options = {"is_decoder": True, "add_cross_attention": True, "attn_implementation": "mlembed"}
    model = BertModel(BertConfig(**SHAPE, num_attention_heads=4, **options)).eval()
    with pytest.raises(ValueError, match="expected only self-attention, got add_cross_attention"):
        model(**tokens(), encoder_hidden_states=torch.zeros(5, 9, 32), use_cache=False)


def test_layer_that_contradicts_its_mask(saved):
    model = load(saved, "bert", "mlembed")
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True
    with pytest.raises(ValueError, match="is_causal: expected False like the mask, got True"):
        model(**tokens())


def test_compiled(saved):
    """The graph holds all but what depends on data."""
    model, batch = load(saved, "bert", "mlembed"), tokens()
    want = model(**batch).last_hidden_state
    got = torch.compile(model, backend="eager")(**batch).last_hidden_state
    torch.testing.assert_close(got, want)


def test_old_transformers(monkeypatch):
    def flash_attention_mask(batch_size, cache_position, kv_length, kv_offset=0, **kwargs):
        raise AssertionError

    masks = attention_interface.masking_utils
    monkeypatch.setattr(masks, "flash_attention_mask", flash_attention_mask)
    with pytest.raises(ValueError, match=r"transformers: expected 5\.4 or newer, got 5\."):
        attention_interface.register()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_model
def test_on_cuda(saved, name):
    assert find_spec("triton")
    batch = {k: v.cuda() for k, v in tokens().items()}
    keep = batch["attention_mask"].bool()
    models = (load(saved, name, attention).cuda() for attention in ("mlembed", "eager"))
    mine, theirs = (model(**batch).last_hidden_state[keep] for model in models)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
