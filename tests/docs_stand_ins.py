"""Stand-ins for what a reader of the documentation has: data, checkpoints, time and the hub.

The tables say what a printed command becomes; the functions write the files that it names.
"""

import shutil
from pathlib import Path

import auto_models
import pyarrow as pa
import pyarrow.parquet as pq
import teacher_models
from factories import tiny_model, tiny_tokenizer, write_encoder, write_jsonl

from mlembed.inference.encoder import Encoder

# Options of every command that trains, instead of those it prints.
SMALLER = {"--steps": "4", "--batch-size": "8", "--precision": "fp32"}
# Options of those that print none: the built-in text takes long to make and to score.
DEFAULTS = {"--data": "pairs.jsonl", "--eval": "tatoeba_dir"}
# Further options of some recipes.
BESIDES = {
    # LaBSE's vocabulary has 501,153 rows.
    r"lealla-(small|base|large)": ["--init", "google-bert/bert-base-uncased"],
    r"gte-.*-supervised": ["--loss.num-negatives", "2"],
}
# Words of any command, and what they become.
WORDS = {
    "cldr": "tatoeba_dir",
    # A published shape has the heads and the vocabulary of Qwen3.
    "--shape ml-embed-80m": "--layers 2 --width 16 --ffn 32",
    "--negatives 15": "--negatives 2",
    # The stand-ins are narrower.
    "short-vectors --dim 96": "short-vectors --dim 16",
    "own_model.py 200": "own_model.py 2",
}
# Checkpoints of the hub and of a user, and the style of the tiny model there.
MODELS = {
    "DIRECTORY": "qwen3",
    "Qwen/Qwen3-0.6B-Base": "qwen3",
    "google-bert/bert-base-uncased": "bert",
    "sentence-transformers/LaBSE": "bert",
}
# Run before each command: prices of sizes are measured once, on two texts.
QUICK = "from mlembed.inference import cost; "
QUICK += "cost.LATENCY_S, cost.PACKS_S, cost.PACK = 0.0, 0.0, 2"

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
THINGS = ("cats", "dogs", "owls", "bees", "ants")
TEXTS = [f"{number} {thing}" for number in NUMBERS for thing in THINGS]
PLACES = [f"{number} {place}" for number in NUMBERS for place in ("hills", "lakes", "roads")]


def write_data(folder: Path) -> None:
    """Write small files under the names that the documentation uses."""
    pairs = [
        {
            "query": text,
            "positive": f"{text.split()[1]}: {text.split()[0]}",
            "negatives": [f"{thing}: {number}" for thing in THINGS[:3] for number in ("no", "all")],
        }
        for text in TEXTS
    ]
    translated = [
        {"id": text, "lang": lang, "text": f"{text}{mark}"}
        for text in TEXTS
        for lang, mark in (("eng", "."), ("deu", "!"), ("fra", "?"))
    ]
    scored = [f"{text} a,{text} b,{i % 5}" for i, text in enumerate(PLACES)]
    rows = {
        "pairs.jsonl": pairs,
        "retrieval.jsonl": pairs,
        "nli.jsonl": [
            {"premise": text, "hypothesis": f"so {text}", "label": i % 3}
            for i, text in enumerate(TEXTS)
        ],
        "examples/msmarco.jsonl": pairs,
        "examples/webpages.jsonl": pairs,
        "examples/scidocs.jsonl": [
            {"query": f"{text}?", "positive": str(i), "negatives": [str((i + 7) % len(TEXTS))]}
            for i, text in enumerate(TEXTS)
        ],
        "examples/scidocs-corpus.jsonl": [
            {"_id": str(i), "title": text, "text": f"about {text}"} for i, text in enumerate(TEXTS)
        ],
        "beir_dir/queries.jsonl": [{"_id": f"q{i}", "text": x} for i, x in enumerate(PLACES)],
        "beir_dir/corpus.jsonl": [
            {"_id": f"d{i}", "title": x, "text": f"of {x}"} for i, x in enumerate(PLACES)
        ],
    }
    for name, table in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_jsonl(folder / name, table)
    for name, table in {
        "nway.parquet": translated,
        "bitext.parquet": translated,
        "corpus.parquet": [{"body": text} for text in TEXTS],
        "examples/emotion.parquet": pairs,
    }.items():
        pq.write_table(pa.Table.from_pylist(table), folder / name)
    sts = "\n".join(["sentence1,sentence2,score", *scored])
    topics = [f"{text},of {text.split()[1]},of nothing" for text in TEXTS]
    for name, content in {
        "corpus.txt": "\n".join(TEXTS) + "\n",
        "stsb.csv": sts,
        "forum.csv": "\n".join(["title,body", *(f"{text},on {text}" for text in TEXTS)]),
        "triples.tsv": "\n".join(f"{text} ?\tof {text}\tof nothing" for text in TEXTS),
        "examples/stsb.csv": sts,
        "examples/topics.csv": "\n".join(["query,positive,negative", *topics]),
        "opus/en-sw.en": "\n".join(TEXTS),
        "opus/en-sw.sw": "\n".join(f"{text} moja" for text in TEXTS),
        "tatoeba_dir/tatoeba.deu-eng.deu": "\n".join(f"{text} !" for text in PLACES),
        "tatoeba_dir/tatoeba.deu-eng.eng": "\n".join(PLACES),
        "beir_dir/qrels/test.tsv": "query-id\tcorpus-id\tscore\n"
        + "".join(f"q{i}\td{i}\t1\n" for i in range(len(PLACES))),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    # A mixture names its files relative to itself; the documentation copies it out of examples/.
    for path in [*(folder / "examples").iterdir(), folder / "opus"]:
        if path.suffix in (".jsonl", ".csv", ".parquet"):
            shutil.copy(path, folder)


def write_models(folder: Path) -> None:
    """Write the checkpoints of MODELS with one tokenizer, and a model of transformers."""
    tokens = tiny_tokenizer([*TEXTS, *PLACES])
    shape = {"vocab_size": tokens.get_vocab_size(), "max_position_embeddings": 4096}
    shape |= {"num_hidden_layers": 3, "num_key_value_heads": 2}
    bert = {"style": "bert", "causal": False, "pooling": "mean"}
    for name, style in MODELS.items():
        model = tiny_model(**shape | (bert if style == "bert" else {}))
        write_encoder(Encoder(model, tokens, 64), folder / name)
    auto_models.write("modernbert", folder / "answerdotai" / "ModernBERT-base")
    teacher_models.cross_encoder(folder / "cross-encoder", words=TEXTS)
