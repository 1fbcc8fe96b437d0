"""A tiny model and tiny files in the layout that `python -m bench proof` reads."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from factories import random_model, tiny_tokenizer

from mlembed import config
from mlembed.inference.encoder import Encoder
from mlembed.publishing.export import write_model

COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ANIMALS = ("cats", "dogs", "owls")
WORDS = {"eng": "see {}", "fra": "je vois {}", "deu": "ich sehe {}", "tam": "{} vaa"}
FLORES = {"eng": "eng_Latn", "fra": "fra_Latn", "deu": "deu_Latn", "tam": "tam_Taml"}
SCORED = {"en": "I {}", "de": "Wir {}", "fr": "Nous {}"}


def sentences(lang: str, what: str) -> list[str]:
    """Return 30 sentences in one language, different for each `what`."""
    things = [f"{count} {animal} {what}" for count in COUNTS for animal in ANIMALS]
    return [WORDS[lang].format(thing) for thing in things]


def write_model_directory(folder: Path) -> Path:
    """Write a BERT of four layers of width 16 with random weights, for sentence-transformers."""
    every = [text for lang in WORDS for text in sentences(lang, "here")]
    tokens = tiny_tokenizer(every)
    shape = config.Model(
        style="bert", vocab_size=tokens.get_vocab_size(), hidden_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=24,
        causal=False, pooling="mean", max_position_embeddings=64,
    )  # fmt: skip
    prompts = {"query": "query: ", "passage": "passage: "}
    encoder = Encoder(random_model(shape), tokens, 32, prompts=prompts)
    folder.mkdir(parents=True)
    write_model(folder, encoder, 16, 4, None)
    return folder


def write_data(folder: Path) -> Path:
    """Write train/*.parquet and eval/; German is a language of tuning."""
    (folder / "train").mkdir(parents=True)
    rows = [
        {"id": str(i), "lang": lang, "text": text}
        for lang in WORDS
        for i, text in enumerate(sentences(lang, "there"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train" / "nway.parquet")
    write_evaluation(folder / "eval")
    return folder


def write_evaluation(folder: Path) -> None:
    """Write tatoeba_dev/, bitext/, sts/ and retrieval/."""
    for name in ("tatoeba_dev", "bitext", "sts", "retrieval/toy-dev/qrels"):
        (folder / name).mkdir(parents=True)
    for lang in ("fra", "deu"):
        for side in (lang, "eng"):
            lines = "".join(f"{text}\n" for text in sentences(side, "now"))
            (folder / "tatoeba_dev" / f"tatoeba.{lang}-eng.{side}").write_text(lines)
    for name, langs in (("flores", FLORES), ("tico", {x: x for x in ("eng", "fra", "deu")})):
        rows = [
            {"id": i, "lang": code, "text": text}
            for lang, code in langs.items()
            for i, text in enumerate(sentences(lang, name))
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "bitext" / f"{name}.parquet")
    for lang, words in SCORED.items():
        for split in ("dev", "test") if lang == "en" else ("dev",):
            with (folder / "sts" / f"stsb-{lang}-{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("row", "genre", "sentence1", "sentence2", "score"))
                for i, thing in enumerate(sentences("eng", split)):
                    other = words.format(thing[: 9 + i % 5])
                    writer.writerow((i, "images", words.format(thing), other, i % 6))
    corpus = [{"_id": f"d{i}", "title": "", "text": x} for i, x in enumerate(sentences("fra", "d"))]
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(sentences("eng", "q"))]
    place = folder / "retrieval" / "toy-dev"
    for name, objects in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(one) + "\n" for one in objects)
        (place / f"{name}.jsonl").write_text(lines)
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(queries)))
    (place / "qrels" / "dev.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
