"""The printed example for tevatron, with the real package where it is installed."""

import pytest
import torch
from sentence_models import ROWS, tiny_trunk
from teacher_models import trained
from test_docs import blocks, text_of
from transformers import TrainingArguments

pytest.importorskip("tevatron.retriever.modeling", reason="tevatron is not on PyPI in this version")


def test_the_printed_model_trains(tmp_path):
    from tevatron.retriever.modeling import DenseModel
    from tevatron.retriever.trainer import TevatronTrainer

    page = "docs/integrations.md"
    (block,) = (b for b in blocks(page, text_of(page)) if b.needs == "tevatron")
    printed: dict = {}
    exec(block.content, printed)
    tokenizer = trained("bert")

    def tokens(texts):
        return tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)

    def collate(rows):
        passages = [row[name] for row in rows for name in ("positive", "negative")]
        return tokens([row["anchor"] for row in rows]), tokens(passages)

    rows = [dict(zip(ROWS, texts, strict=True)) for texts in zip(*ROWS.values(), strict=True)]
    options = {"pooling": "mean", "normalize": False, "temperature": 0.05}
    model = printed["NestedModel"](tiny_trunk("bert"), **options).train()
    queries, passages = collate(rows)
    exits_END = model.encode_exits(queries)
    assert exits_END.shape == (3, 8, 32)
    assert torch.equal(exits_END[2], DenseModel(model.encoder, **options).encode_query(queries))
    before = float(model(queries, passages).loss.detach())
    args = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=1e-2, remove_unused_columns=False,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    TevatronTrainer(model=model, args=args, train_dataset=rows, data_collator=collate).train()
    assert float(model(queries, passages).loss.detach()) < 0.8 * before
