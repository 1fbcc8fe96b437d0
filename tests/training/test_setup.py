"""Prompts and languages of a run, which the tests of whole runs do not show."""

import pytest
from factories import write_jsonl

from mlembed.config import Run, Source
from mlembed.training import setup

ASK = Source(path="a.jsonl", prompt="ask: ")


@pytest.mark.parametrize(
    ("data", "sources", "want"),
    [
        ((), (ASK,), {"a": "ask: ", "query": "ask: ", "document": ""}),
        # Sources that differ have no common prompt.
        ((), (ASK, Source(path="b.jsonl")), {"a": "ask: ", "query": "", "document": ""}),
        (
            (),
            (ASK, Source(path="b.jsonl", name="b", prompt="ask: ", document_prompt="text: ")),
            {"a": "ask: ", "b": "ask: ", "query": "ask: ", "document": ""},
        ),
        # Plain data have no prompt.
        (("cldr",), (ASK,), {"a": "ask: ", "query": "", "document": ""}),
        (("cldr",), (), {"query": "", "document": ""}),
    ],
)
def test_prompts_by_name(data, sources, want):
    assert setup.prompts(Run(data=data, sources=sources)) == want


def test_languages_of_all_tables(tmp_path):
    def nway(name, langs, ids):
        rows = [{"id": i, "lang": x, "text": f"{name} {i} {x}"} for i in range(ids) for x in langs]
        return write_jsonl(tmp_path / f"{name}.jsonl", rows)

    data, dev = (nway("one", "ab", 3), nway("two", "bc", 3)), nway("dev", ("eng", "deu"), 1)
    run = Run(data=data, eval=(dev,))
    assert setup.read_text(run, lambda line: None).languages == {"a": 3, "b": 6, "c": 3}
