"""Random models of every kind that can be exported, and texts on which they differ."""

import json
from pathlib import Path
from typing import Any

from factories import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from mlembed import config
from mlembed.data import tokenizer
from mlembed.inference.encoder import Encoder

TRAINED_ON = [
    "Wednesday, May 4, 2050",
    "2050 թ. մայիսի 4, չորեքշաբթի",
    "বুধবার, ৪ মে, ২০৫০",
    "比利时、哈萨克斯坦或赞比亚",
    "один два три четыре пять",
]
# From EOS alone to ten times max_length, in several scripts; unseen bytes; spaces around a text,
# which readers must not strip; a special token's name.
TEXTS = [
    "",
    "a",
    "one two",
    *TRAINED_ON,
    "in 1 hour 🙂",
    "  space around \n",
    "<|endoftext|> in a text",
    "বুধবার, ৪ মে, ২০৫০ এবং আরও কয়েকটি শব্দ যা এই লেখাটিকে দীর্ঘ করে তোলে",
    " ".join(str(i) for i in range(100)),
    "long " * 60,
]
MAX_LENGTH = 24
# Width 24, 3 layers, rank 11: the full size, the smallest of all, and both mixed corners.
CORNERS = [(24, 3, 11), (5, 1, 3), (5, 3, 3), (24, 1, 11)]
SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 37,
    "rope_theta": 700.0,
    "max_position_embeddings": 64,
    "exits": (1, 3),
    "matryoshka_dims": (5, 12, 24),
    "ranks": (3, 11),
}
BERT = {"style": "bert", "causal": False, "num_key_value_heads": 4, "head_dim": 6}
# The shapes of Qwen3, causal and bidirectional, of LaBSE, of MiniLM and GTE, and of XLM-R.
KINDS = {
    "qwen3": {},
    "qwen3 both ways": {"causal": False, "pooling": "mean"},
    "bert": {**BERT, "pooling": "pooler"},
    "minilm": {**BERT, "pooling": "mean"},
    "xlm-roberta": {**BERT, "pooling": "cls", "position_offset": 2, "type_vocab_size": 1},
}


def tokens_of(kind: str) -> Tokenizer:
    """Return a tokenizer like that of the kind: it adds EOS, or a token on either side."""
    if "qwen3" in kind:
        return tokenizer.train(TRAINED_ON * 2, 290)
    # XLM-R's positions begin after its padding token, the second one.
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind != "xlm-roberta":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    first, last = (special[0], special[2]) if kind == "xlm-roberta" else special[2:]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TRAINED_ON * 2, trainer)
    ends = [(token, bpe.token_to_id(token)) for token in (first, last)]
    bpe.post_processor = TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    return bpe


def build(kind: str = "qwen3", tokens: Tokenizer | None = None, **changes) -> Encoder:
    """Return an encoder of one of KINDS, with changes to its shape."""
    tokens = tokens or tokens_of(kind)
    shape = {"vocab_size": tokens.get_vocab_size(), **SHAPE, **KINDS[kind], **changes}
    return Encoder(random_model(config.Model(**shape)), tokens, MAX_LENGTH)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def files_below(path: Path) -> dict[str, bytes | None]:
    """Return the contents of everything below a directory, hidden files included."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")
    }
