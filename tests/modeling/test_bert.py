"""BERT's directories: those of transformers and sentence-transformers, read and written."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import assert_same_model, odd_shape, random_model, randomise
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformer_truth import POOLINGS, assert_equals_transformers
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
from mlembed.inference.encoder import Encoder
from mlembed.modeling import hf_config, pretrained
from mlembed.publishing.export import export

CFG = odd_shape("bert", max_position_embeddings=31, exits=(1, 3), matryoshka_dims=(5, 24))
NESTED = replace(CFG, ranks=(3, 11))
BERT = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT |= {"intermediate_size": 37, "layer_norm_eps": 1e-3, "type_vocab_size": 3}
# Positions of XLM-R's texts begin after that of its padding.
BERT_POSITIONS = BERT | {"max_position_embeddings": 31, "pad_token_id": 0}
XLM_POSITIONS = BERT | {"max_position_embeddings": 33, "pad_token_id": 1}
HF = {
    "bert": lambda: BertModel(BertConfig(**BERT_POSITIONS)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**XLM_POSITIONS)),
}


def edit(directory: Path, name="config.json", **changes) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- from and to transformers ----


@pytest.mark.parametrize("kind", HF)
@pytest.mark.parametrize("pooling", POOLINGS["bert"])
def test_reads_what_transformers_writes(kind, pooling, tmp_path):
    hf = randomise(HF[kind]())
    hf.save_pretrained(tmp_path)
    cfg = hf_config.from_checkpoint(tmp_path, config.Model(pooling="mean"))
    assert cfg.position_offset == (2 if kind == "xlm-roberta" else 0) and cfg.style == "bert"
    assert cfg.max_position_embeddings == 31 and cfg.layer_norm_eps == 1e-3 and not cfg.causal
    model = pretrained.load(str(tmp_path), replace(cfg, pooling=pooling))
    assert hasattr(model, "pooler") == (pooling == "pooler")
    assert_equals_transformers(model, hf)


@pytest.mark.parametrize("cfg", [CFG, NESTED], ids=["table", "factors"])
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_transformers_reads_what_we_write(pooling, offset, cfg, tmp_path):
    model = random_model(replace(cfg, pooling=pooling, position_offset=offset))
    pretrained.save(model, tmp_path)
    hf, how = AutoModel.from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert type(hf) is (XLMRobertaModel if offset else BertModel)
    missing = {"pooler.dense.weight", "pooler.dense.bias"} if pooling == "mean" else set()
    assert set(how["missing_keys"]) == missing and not how["unexpected_keys"]
    assert_equals_transformers(model, hf.eval())
    # Loading is exact, and saving again gives the same bytes.
    again = pretrained.load(str(tmp_path))
    assert_same_model(again, model)
    (tmp_path / "b").mkdir()
    pretrained.save(again, tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_prefixes_heads_and_old_names(tmp_path):
    bert = randomise(BertForPreTraining(BertConfig(**BERT_POSITIONS)))
    bert.save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    weights = load_file(path)
    assert any(n.startswith("cls.") for n in weights) and "bert.pooler.dense.bias" in weights
    names = {"bert(.*)Norm.weight": r"bert\1Norm.gamma", "bert(.*)Norm.bias": r"bert\1Norm.beta"}
    old = {name: weight.clone() for name, weight in weights.items()}
    for new, before in names.items():
        old = {re.sub(new, before, name): weight for name, weight in old.items()}
    old["bert.embeddings.position_ids"] = torch.arange(31)[None]
    save_file(old, path, metadata={"format": "pt"})
    assert_equals_transformers(pretrained.load(str(tmp_path / "bert"), CFG), bert.bert)
    masked = randomise(RobertaForMaskedLM(RobertaConfig(**XLM_POSITIONS)))
    masked.save_pretrained(tmp_path / "roberta")
    model = pretrained.load(str(tmp_path / "roberta"))
    assert model.cfg.pooling == "mean" and model.cfg.position_offset == 2
    assert_equals_transformers(model, masked.roberta)
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
        (
            {"model_type": "electra"},
            "a table of tokens of width 24 in electra, got .* of width 128",
        ),
        ({"max_position_embeddings": 30}, r"positions.weight: expected shape \[30, 24\], got \[31"),
        ({"num_hidden_layers": 4}, "num_hidden_layers: expected at most 3, the layers in the"),
    ],
)
def test_unsupported_variants(change, message, tmp_path):
    HF["bert"]().save_pretrained(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(tmp_path))


def test_factorisation_is_of_the_words_alone(tmp_path):
    hf = randomise(HF["bert"]())
    hf.save_pretrained(tmp_path)
    model = pretrained.load(str(tmp_path), replace(NESTED, ranks=(3, 24)))
    assert_equals_transformers(model, hf)
    words = hf.embeddings.word_embeddings.weight
    U, s, Vh = torch.linalg.svd(words.detach().double(), full_matrices=False)
    words.data = ((U[:, :3] * s[:3]) @ Vh[:3]).float()
    assert_equals_transformers(model, hf, rank=3)


# ---- tokenizers, sentence-transformers, exports ----

WORDS = ["one", "two", "three", "##s", "a", "b", "2050", ",", "май"]
SENTENCES = ["one two", "", "three threes 2050", "a b " * 40, "May 2050, май", "B unknown"]


def wordpiece(kind="bert") -> tuple[Tokenizer, dict[str, str]]:
    """Return a tokenizer like BERT's or XLM-R's, whose padding is token 1, and its roles."""
    roles, tokens = {
        "bert": ("pad unk cls sep mask", "[PAD] [UNK] [CLS] [SEP] [MASK]"),
        "xlm-roberta": ("cls pad sep unk mask", "<s> <pad> </s> <unk> <mask>"),
    }[kind]
    special = dict(zip(roles.split(), tokens.split(), strict=True))
    ids = {token: i for i, token in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(special.values()))
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, ids[cls]), (sep, ids[sep])]
    )
    return tokenizer, special


def write_sentence_transformers(path: Path, pooling: str, dense=None, kind="bert", old=True):
    """Write a directory like published ones, with LaBSE's modules if there is a `dense`."""
    hf = randomise(HF[kind]())
    hf.save_pretrained(path)
    tokenizer, special = wordpiece(kind)
    tokenizer.save(str(path / "tokenizer.json"))
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
        sizes = {"in_features": 24, "out_features": 24, "bias": True}
        tanh = {"activation_function": "torch.nn.modules.activation.Tanh"}
        contents["2_Dense/config.json"] = sizes | tanh
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


def read_by_sentence_transformers(path: Path) -> np.ndarray:
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
    write_sentence_transformers(tmp_path / "st", pooling, dense, kind, old)
    encoder = Encoder.load(str(tmp_path / "st"), "cpu")
    assert encoder.model.cfg.pooling == ours and encoder.max_length == 19
    theirs = read_by_sentence_transformers(tmp_path / "st")
    np.testing.assert_allclose(encoder.encode(SENTENCES), theirs, rtol=0, atol=1e-5)
    assert export(encoder, tmp_path / "whole").worst < 1e-5
    whole = read_by_sentence_transformers(tmp_path / "whole")
    np.testing.assert_allclose(whole, theirs, rtol=0, atol=1e-5)
    again = Encoder.load(str(tmp_path / "whole"), "cpu").encode(SENTENCES)
    np.testing.assert_allclose(again, theirs, rtol=0, atol=1e-6)
    # The exported tokenizer pads with the right token.
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
        ("2_Dense/config.json", {"activation_function": "torch.nn.Identity"}, "got .*Identity"),
        ("2_Dense/config.json", {"bias": False}, "bias': False"),
    ],
)
def test_unsupported_modules(name, change, message, tmp_path):
    write_sentence_transformers(tmp_path, "cls_token", dense_module())
    edit(tmp_path, name, **change)
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(tmp_path))
