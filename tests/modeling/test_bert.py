"""BERT in the one transformer: against transformers' BertModel and XLMRobertaModel at every exit,
and through directories both ways. test_bert_trunk.py has what training does with it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import randomise
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from mlembed import config
from mlembed.data.packing import pack
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.transformer import Transformer, num_parameters
from mlembed.publishing.export import export

# A prime vocabulary, heads of width 6, an MLP of a prime width, an epsilon that counts.
CFG = config.Model(
    style="bert",
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=6,
    intermediate_size=37,
    layer_norm_eps=1e-3,
    max_position_embeddings=31,
    type_vocab_size=3,
    causal=False,
    pooling="pooler",
    exits=(1, 3),
    matryoshka_dims=(5, 24),
)
NESTED = replace(CFG, ranks=(3, 11))
ALL_EXITS = (1, 2, 3)
LENGTHS = (17, 1, 31, 2, 5)  # the longest fills the position table
POOLINGS = "pooler", "cls", "mean", "last"
BERT = {
    "vocab_size": 101,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "layer_norm_eps": 1e-3,
    "type_vocab_size": 3,
}
HF = {
    "bert": lambda **more: BertModel(
        BertConfig(**{**BERT, "max_position_embeddings": 31, "pad_token_id": 0, **more})
    ),
    "xlm-roberta": lambda **more: XLMRobertaModel(
        XLMRobertaConfig(**{**BERT, "max_position_embeddings": 33, "pad_token_id": 1, **more})
    ),
}


def texts(lengths=LENGTHS, seed=0) -> list[np.ndarray]:
    """Without tokens 0 and 1, which are padding for one model or the other."""
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 101, n) for n in lengths]


@torch.no_grad()
def hf_exits(hf, ids, pooling) -> Tensor:
    """Every layer's pooled output of a batch padded on the right -> [L, N, D]."""
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), hf.config.pad_token_id)
    mask = torch.zeros(len(ids), longest, dtype=torch.int64)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = torch.from_numpy(text)
        mask[row, : len(text)] = 1
    out = hf(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    pooled = []
    for x in out.hidden_states[1:]:
        rows = [x[i, : len(text)] for i, text in enumerate(ids)]
        pick = {
            "last": lambda r: r[-1],
            "cls": lambda r: r[0],
            "mean": lambda r: r.mean(0),
            "pooler": lambda r: hf.pooler(r[None])[0],
        }
        pooled.append(torch.stack([pick[pooling](r) for r in rows]))
    if pooling == "pooler":
        torch.testing.assert_close(out.pooler_output, pooled[-1], rtol=0, atol=1e-6)
    return torch.stack(pooled)


def build(cfg=NESTED, backend=None, dtype=torch.float32, lean=False) -> Transformer:
    model = randomise(Transformer(cfg)).to(dtype)
    if backend is not None:
        torch._dynamo.reset()
        model.compile_blocks(backend, lean=lean)
    return model


def edit(directory: Path, name="config.json", **changes) -> None:
    path = directory / name
    stored = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(stored), encoding="utf-8")


def equal(model: Transformer, hf, pooling: str, rank=None) -> None:
    with torch.no_grad():
        ours = model(pack(texts()), exits=ALL_EXITS, rank=rank)
    assert ours.shape == (3, len(LENGTHS), 24) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, hf_exits(hf, texts(), pooling), rtol=0, atol=1e-5)
    assert (ours[1:] - ours[:-1]).abs().amax((1, 2)).min() > 0.1  # exits are different things


# ---- from and to transformers ----


@pytest.mark.parametrize("kind", HF)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_reads_what_transformers_writes(kind, pooling, tmp_path):
    hf = randomise(HF[kind]())
    hf.save_pretrained(tmp_path)
    cfg = hf_config.from_checkpoint(tmp_path, config.Model(pooling="mean"))
    assert cfg.position_offset == (2 if kind == "xlm-roberta" else 0) and cfg.style == "bert"
    assert cfg.max_position_embeddings == 31 and cfg.layer_norm_eps == 1e-3 and not cfg.causal
    model = pretrained.load(str(tmp_path), replace(cfg, pooling=pooling))
    assert hasattr(model, "pooler") == (pooling == "pooler")
    equal(model, hf, pooling)


@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_transformers_reads_what_we_write(pooling, offset, cfg, tmp_path):
    model = build(replace(cfg, pooling=pooling, position_offset=offset))
    pretrained.save(model, tmp_path)
    hf, how = AutoModel.from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert type(hf) is (XLMRobertaModel if offset else BertModel)
    missing = {"pooler.dense.weight", "pooler.dense.bias"} if pooling == "mean" else set()
    assert set(how["missing_keys"]) == missing and not how["unexpected_keys"]
    equal(model, hf.eval(), pooling)
    # And back, to the bit; and written again, the same bytes.
    again = pretrained.load(str(tmp_path))
    assert again.cfg == model.cfg
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    (tmp_path / "b").mkdir()
    pretrained.save(again, tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_reads_what_transformers_writes_and_transformers_reads_it_again(tmp_path):
    hf = randomise(HF["xlm-roberta"]())
    hf.save_pretrained(tmp_path / "theirs")
    cfg = hf_config.from_checkpoint(tmp_path / "theirs", CFG)
    (tmp_path / "ours").mkdir()
    pretrained.save(pretrained.load(str(tmp_path / "theirs"), cfg), tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert again.state_dict().keys() == hf.state_dict().keys()
    for name, weight in hf.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_prefixes_heads_and_old_names(tmp_path):
    bert = randomise(BertForPreTraining(BertConfig(**BERT, max_position_embeddings=31)))
    bert.save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    weights = load_file(path)
    assert any(n.startswith("cls.") for n in weights) and "bert.pooler.dense.bias" in weights
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if n.startswith("bert.")
        else n: w.clone()
        for n, w in weights.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(31)[None]
    save_file(old, path, metadata={"format": "pt"})
    equal(pretrained.load(str(tmp_path / "bert"), CFG), bert.bert, "pooler")
    roberta = RobertaConfig(**BERT, max_position_embeddings=33, pad_token_id=1)
    masked = randomise(RobertaForMaskedLM(roberta))
    masked.save_pretrained(tmp_path / "roberta")
    model = pretrained.load(str(tmp_path / "roberta"))
    assert model.cfg.pooling == "mean" and model.cfg.position_offset == 2
    equal(model, masked.roberta, "mean")
    with pytest.raises(ValueError, match="pooler's weights .* choose model.pooling cls or mean"):
        pretrained.load(str(tmp_path / "roberta"), replace(model.cfg, pooling="pooler"))


@pytest.mark.parametrize(
    ("asked", "given"), [("last", "mean"), ("mean", "mean"), ("cls", "cls"), ("pooler", "pooler")]
)
def test_pooling_of_a_plain_checkpoint(asked, given, tmp_path):
    HF["bert"]().save_pretrained(tmp_path)
    start = replace(CFG, pooling=asked)
    assert hf_config.from_checkpoint(tmp_path, start).pooling == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu', got 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: .*'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"embedding_size": 12}, "embedding_size: expected 24, got 12"),
        ({"model_type": "electra"}, "expected model_type 'qwen3', 'bert', .*got 'electra'"),
        ({"max_position_embeddings": 30}, r"positions.weight: expected shape \[30, 24\], got \[31"),
        ({"num_hidden_layers": 4}, r"layers.3.\S+: expected shape \[.*\], got none"),
    ],
)
def test_variants_that_the_model_lacks(change, message, tmp_path):
    HF["bert"]().save_pretrained(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(tmp_path))


def test_a_table_that_is_factorised_is_the_words_alone(tmp_path):
    hf = randomise(HF["bert"]())
    hf.save_pretrained(tmp_path)
    model = pretrained.load(str(tmp_path), NESTED)
    words = hf.embeddings.word_embeddings.weight
    U, s, Vh = torch.linalg.svd(words.detach().double(), full_matrices=False)
    for rank in (3, 11):
        words.data = ((U[:, :rank] * s[:rank]) @ Vh[:rank]).float()
        with torch.no_grad():
            ours = model(pack(texts()), exits=ALL_EXITS, rank=rank)
        torch.testing.assert_close(ours, hf_exits(hf, texts(), "pooler"), rtol=0, atol=1e-4)


def test_a_cut_ends_at_its_exit():
    model = build()
    small = pretrained.cut(model, 2, 3)
    with torch.no_grad():
        want = model(pack(texts()), exits=(2,), rank=3)
        torch.testing.assert_close(small(pack(texts()), exits=(2,)), want, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) == num_parameters(model.cfg, 2, 3)


def test_texts_beyond_the_position_table():
    with pytest.raises(ValueError, match="at most 31 tokens .*got 32"):
        build()(pack(texts((4, 32))))


# ---- tokenizers, sentence-transformers, exports ----

WORDS = ["one", "two", "three", "##s", "a", "b", "2050", ",", "май"]
SENTENCES = ["one two", "", "three threes 2050", "a b " * 40, "May 2050, май", "B unknown"]


def wordpiece(kind="bert") -> tuple[Tokenizer, dict[str, str]]:
    """As BERT's files have it, and as XLM-R's, whose padding is token 1."""
    roles, tokens = {
        "bert": ("pad unk cls sep mask", "[PAD] [UNK] [CLS] [SEP] [MASK]"),
        "xlm-roberta": ("cls pad sep unk mask", "<s> <pad> </s> <unk> <mask>"),
    }[kind]
    special = dict(zip(roles.split(), tokens.split(), strict=True))
    ids = {token: i for i, token in enumerate([*special.values(), *WORDS])}
    made = Tokenizer(models.WordPiece(ids, unk_token=special["unk"]))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(list(special.values()))
    cls, sep = special["cls"], special["sep"]
    made.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, ids[cls]), (sep, ids[sep])]
    )
    return made, special


def as_sentence_transformers(path: Path, pooling: str, dense=None, kind="bert", old=True):
    """A directory as the library's users publish one: LaBSE's modules where there is `dense`."""
    hf = randomise(HF[kind]())
    hf.save_pretrained(path)
    made, special = wordpiece(kind)
    made.save(str(path / "tokenizer.json"))
    names = {f"{role}_token": token for role, token in special.items()}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names})
    )
    listed = [("", "Transformer"), ("1_Pooling", "Pooling")]
    mode = {f"pooling_mode_{pooling}": True} if old else {"pooling_mode": pooling.split("_")[0]}
    if old and pooling != "mean_tokens":
        mode["pooling_mode_mean_tokens"] = False
    contents = {
        "1_Pooling/config.json": {"word_embedding_dimension": 24, **mode},
        "sentence_bert_config.json": {"max_seq_length": 19, "do_lower_case": False},
    }
    if dense is not None:
        listed.append(("2_Dense", "Dense"))
        contents["2_Dense/config.json"] = {
            "in_features": 24,
            "out_features": 24,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
    listed.append((f"{len(listed)}_Normalize", "Normalize"))
    contents["modules.json"] = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"}
        for i, (p, t) in enumerate(listed)
    ]
    for name, content in contents.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    if dense is not None:
        save_file(dense, path / "2_Dense" / "model.safetensors")
    return hf


def dense_module() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "linear.weight": torch.randn(24, 24, generator=generator) / 4,
        "linear.bias": torch.randn(24, generator=generator),
    }


def by_sentence_transformers(path: Path) -> np.ndarray:
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    return model.encode(SENTENCES, batch_size=4, show_progress_bar=False)


@pytest.mark.parametrize(
    ("pooling", "has_dense", "kind", "old", "ours"),
    [
        ("cls_token", True, "bert", True, "pooler"),  # LaBSE
        ("cls_token", True, "xlm-roberta", False, "pooler"),
        ("cls_token", False, "bert", True, "cls"),
        ("mean_tokens", False, "xlm-roberta", True, "mean"),
        ("mean_tokens", False, "bert", False, "mean"),
        ("lasttoken", False, "bert", True, "last"),
    ],
)
def test_sentence_transformers_directories(pooling, has_dense, kind, old, ours, tmp_path):
    dense = dense_module() if has_dense else None
    as_sentence_transformers(tmp_path / "st", pooling, dense, kind, old)
    encoder = Encoder.load(str(tmp_path / "st"), "cpu")
    assert encoder.model.cfg.pooling == ours and encoder.max_length == 19
    theirs = by_sentence_transformers(tmp_path / "st")
    np.testing.assert_allclose(encoder.encode(SENTENCES), theirs, rtol=0, atol=1e-5)
    # Out again, whole and cut: the two readers' vectors were compared on the way.
    assert export(encoder, tmp_path / "whole") < 1e-5
    np.testing.assert_allclose(
        by_sentence_transformers(tmp_path / "whole"), theirs, rtol=0, atol=1e-5
    )
    assert export(encoder, tmp_path / "cut", 7, 2) < 1e-5
    assert by_sentence_transformers(tmp_path / "cut").shape == (len(SENTENCES), 7)
    again = Encoder.load(str(tmp_path / "whole"), "cpu").encode(SENTENCES)
    np.testing.assert_allclose(again, theirs, rtol=0, atol=1e-6)
    # The tokenizer that went out pads by the right token.
    reader = AutoTokenizer.from_pretrained(tmp_path / "whole", local_files_only=True)
    _, special = wordpiece(kind)
    for role, token in special.items():
        assert getattr(reader, f"{role}_token") == token
    assert reader.pad_token_id == (1 if kind == "xlm-roberta" else 0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "expected one pooling"),
        ("2_Dense/config.json", {"out_features": 12}, "expected a tanh layer of 24 x 24"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Identity"}, "got Identity"),
        ("2_Dense/config.json", {"bias": False}, "bias False"),
    ],
)
def test_modules_that_we_have_not(name, change, message, tmp_path):
    as_sentence_transformers(tmp_path, "cls_token", dense_module())
    edit(tmp_path, name, **change)
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_a_nested_vocabulary_is_merged_on_the_way_out(kind, tmp_path):
    made, _ = wordpiece()
    encoder = Encoder(build(replace(NESTED, pooling=kind, vocab_size=101)), made, 20)
    assert export(encoder, tmp_path / "out", 5, 1, 3) < 1e-5
    theirs = by_sentence_transformers(tmp_path / "out")
    np.testing.assert_allclose(theirs, encoder.encode(SENTENCES, 5, 1, 3), rtol=0, atol=1e-5)
