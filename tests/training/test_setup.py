"""What a run is built from, beyond what runs as a whole show."""

import json

from mlembed import config
from mlembed.config import Run, Source
from mlembed.training import setup


def test_prompts_by_name():
    ask, other = Source(path="a.jsonl", prompt="ask: "), Source(path="b.jsonl", name="bee")
    run = Run(data=(), sources=(ask,))
    assert setup.prompts(run) == {"a": "ask: ", "query": "ask: ", "document": ""}
    # Which of two a query should have is not known.
    run = Run(data=(), sources=(ask, other))
    assert setup.prompts(run) == {"a": "ask: ", "query": "", "document": ""}
    bee = Source(path="b.jsonl", name="bee", prompt="ask: ", document_prompt="text: ")
    run = Run(data=(), sources=(ask, bee))
    want = {"a": "ask: ", "bee": "ask: ", "query": "ask: ", "document": ""}
    assert setup.prompts(run) == want
    run = Run(data=("cldr",), sources=(ask,))  # plain data have none
    assert setup.prompts(run) == {"a": "ask: ", "query": "", "document": ""}
    assert setup.prompts(Run()) == {"query": "", "document": ""}


def test_languages_of_all_tables(tmp_path):
    for name, langs in (("one", "ab"), ("two", "bc")):
        rows = [
            {"id": i, "lang": lang, "text": f"{name} {i} {lang}"}
            for i in range(3)
            for lang in langs
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "dev.jsonl").write_text(
        "\n".join(
            json.dumps({"id": 1, "lang": lang, "text": f"dev {lang}"}) for lang in ("eng", "deu")
        )
    )
    data = tuple(str(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    run = config.Run(data=data, eval=(str(tmp_path / "dev.jsonl"),))
    assert setup.read_text(run, lambda line: None).languages == {"a": 3, "b": 6, "c": 3}
