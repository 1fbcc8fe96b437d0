"""Data files as nobody should write them: a refusal with file and place, or the same table."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .rows import Row, named, refused
from .scene import Scene
from .stock import CLI, START, TEXT

GOOD = [{"query": f"{i} cats", "positive": f"{i} dogs"} for i in range(6)]
LINE = json.dumps(GOOD[0])


def jsonl(*lines: str | bytes) -> bytes:
    """Return six good lines with odd ones after the second."""
    good = [json.dumps(row).encode() for row in GOOD]
    odd = [line.encode() if isinstance(line, str) else line for line in lines]
    return b"\n".join([*good[:2], *odd, *good[2:]]) + b"\n"


BOMB_LINE = b"%c: &%c [%s]\n"
# The third line of a .jsonl file.
LINES: dict[str, str | bytes] = {
    "a line that is not JSON": "{",
    "a line of invalid UTF-8": b'{"query": "\xff", "positive": "b"}',
    "a line that is a number": "3",
    "a line that is null": "null",
    "a line that is a string": '"x"',
    "a row without its positive": '{"query": "a"}',
    "a query that is null": '{"query": null, "positive": "b"}',
    "a query that is a number": '{"query": 3, "positive": "b"}',
    "a query that is an object": '{"query": {}, "positive": "b"}',
    "an empty query": '{"query": "", "positive": "b"}',
    "a lone surrogate": '{"query": "\\ud800", "positive": "b"}',
    "an empty positive": '{"query": "a", "positive": []}',
    "a number of 10,000 digits": '{"query": ' + "9" * 10_000 + "}",
    "100,000 brackets": "[" * 100_000,
    "20,000 nested objects": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "a query of nested lists": '{"query": [[["a"]]], "positive": "b"}',
    "a NUL byte": b'{"query": "\x00", "positive": "b"}',
}
# A file, its bytes, and the place that the refusal names.
ODD: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("odd.jsonl", b"", "odd.jsonl"),
    "blank lines alone": ("odd.jsonl", b"\n\n\n", "odd.jsonl"),
    "UTF-16": ("odd.jsonl", LINE.encode("utf-16"), "odd.jsonl"),
    "UTF-16 without a mark": ("odd.csv", "query,positive\na,b\n".encode("utf-16-le"), "odd.csv"),
    "UTF-32": ("odd.csv", "query,positive\na,b\n".encode("utf-32"), "odd.csv"),
    "a pickle": ("odd.jsonl", b"\x80\x04\x95\x10\x00\x8c\x02os\x94.", "odd.jsonl"),
    "gzip without its suffix": ("odd.jsonl", b"\x1f\x8b\x08\x00" + bytes(40), "odd.jsonl"),
    "no gzip with its suffix": ("odd.jsonl.gz", LINE.encode(), "odd.jsonl.gz"),
    "half a gzip": (
        "odd.jsonl.gz",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab",
        "odd.jsonl.gz",
    ),
    "no zstd with its suffix": ("odd.jsonl.zst", LINE.encode(), "odd.jsonl.zst"),
    "no parquet": ("odd.parquet", LINE.encode(), "odd.parquet"),
    "an empty parquet": ("odd.parquet", b"", "odd.parquet"),
    "PAR1 alone": ("odd.parquet", b"PAR1" + bytes(8) + b"PAR1", "odd.parquet"),
    "a .json that is an object": ("odd.json", b'{"a": 1}', "odd.json"),
    "a .json of half an array": ("odd.json", b'[{"query": "a"', "odd.json"),
    "a .json of numbers": ("odd.json", b"[1, 2, 3]", "odd.json"),
    "a mixture of nothing": ("odd.json", b'{"sources": []}', "odd.json"),
    "a mixture of numbers": ("odd.json", b'{"sources": [3]}', "odd.json"),
    "a mixture with an unknown key": ("odd.json", b'{"sources": [{"pathh": "a"}]}', "odd.json"),
    "a mixture of itself": ("odd.json", b'{"sources": [{"path": "odd.json"}]}', "odd.json"),
    "a YAML mixture with code": (
        "odd.yaml",
        b"sources: !!python/object/apply:os.system [touch PWNED]",
        "odd.yaml",
    ),
    "a YAML bomb": (
        "odd.yaml",
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            BOMB_LINE % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
        )
        + b"sources: *j\n",
        "odd.yaml",
    ),
    "YAML 100,000 brackets deep": ("odd.yaml", b"sources: " + b"[" * 100_000, "odd.yaml"),
    "a csv row too long": ("odd.csv", b"query,positive\na,b\na,b,c\n", "odd.csv:3"),
    "a csv row too short": ("odd.csv", b"query,positive\na,b\na\n", "odd.csv:3"),
    "a csv quote without an end": ("odd.csv", b'query,positive\na,b\n"a,b\nc,d\n', "odd.csv"),
    "a csv header twice the same": ("odd.csv", b"query,query,positive\na,b,c\n", "odd.csv"),
    "a csv header without roles": ("odd.csv", b"a,b\nc,d\n", "odd.csv"),
    "a csv of a header alone": ("odd.csv", b"query,positive\n", "odd.csv"),
    "a csv without a header": ("odd.csv", b"12,34\n56,78\n", "odd.csv"),
    "a tsv row too long": ("odd.tsv", b"query\tpositive\na\tb\na\tb\tc\n", "odd.tsv:3"),
    "two columns for one role": ("odd.csv", b"query,question,positive\na,b,c\n", "odd.csv"),
    "scores that are words": ("odd.csv", b"sentence1,sentence2,score\na,b,high\n", "odd.csv:2"),
    "a score of NaN": ("odd.csv", b"sentence1,sentence2,score\na,b,nan\nc,d,1\n", "odd.csv:2"),
    "a score of inf": ("odd.csv", b"sentence1,sentence2,score\na,b,inf\nc,d,1\n", "odd.csv:2"),
    "a score of -3": ("odd.csv", b"sentence1,sentence2,score\na,b,-3\nc,d,1\n", "odd.csv:2"),
    "a score of 1e999": (
        "odd.jsonl",
        b'{"query": "a", "positive": "b", "score": 1e999}\n',
        "odd.jsonl:1",
    ),
    "n-way rows without a language": (
        "odd.jsonl",
        b'{"id": "1", "lang": "", "text": "a"}\n',
        "odd.jsonl:1",
    ),
    "n-way rows, an id that is a list": (
        "odd.jsonl",
        b'{"id": [1], "lang": "eng", "text": "a"}\n',
        "odd.jsonl:1",
    ),
}
LONE: dict[str, list[dict]] = {
    "one pair": GOOD[:1],
    "thirty equal pairs": GOOD[:1] * 30,
    "thirty queries of one positive": [{"query": f"{i}", "positive": "p"} for i in range(30)],
    "thirty positives of one query": [{"query": "q", "positive": f"{i}"} for i in range(30)],
    "an n-way table of one id": [{"id": "1", "lang": x, "text": x} for x in ("eng", "deu", "fra")],
    "one id and one language nine times": [
        {"id": "1", "lang": "eng", "text": f"{i}"} for i in range(9)
    ],
    "n-way rows of one language": [{"id": f"{i}", "lang": "eng", "text": f"{i}"} for i in range(9)],
    "texts alone": [{"text": f"{i}"} for i in range(9)],
}
SCORED = "sentence1,sentence2,score\n"
EVALS: dict[str, tuple[str, bytes]] = {
    "an sts of no row": ("odd.csv", SCORED.encode()),
    "an n-way table of one language": (
        "odd.jsonl",
        b'{"id": "1", "lang": "eng", "text": "a"}\n{"id": "2", "lang": "eng", "text": "b"}\n',
    ),
    "nothing": ("odd.jsonl", b""),
}
QRELS = {
    "a grade of 9e29": "q1 0 d1 9e29",
    "a grade of nan": "q1 0 d1 nan",
    "a grade of inf": "q1 0 d1 inf",
    "a grade that is a word": "q1 0 d1 good",
    "two columns": "q1 d1",
    "a row of nothing": "\t",
    "a document that is not there": "q1 0 d9 1",
    "a query that is not there": "q9 0 d1 1",
    "conflicting grades": "q1 0 d1 1\nq1 0 d1 2",
}


def rows(seed: int) -> Iterator[Row]:
    odd = {label: ("odd.jsonl", jsonl(line), "odd.jsonl:3") for label, line in LINES.items()}
    for label, (name, content, place) in (odd | ODD).items():
        spoil = partial(written, name, content)
        argv = [*START, "--data", name, "--name", "new"]
        yield refused("data", f"train, {label}", argv, (place,), TEXT, spoil)
        yield Row("data", f"`data`, {label}", "1, names it", partial(dry, name, content, place))
    for label, lines in LONE.items():
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        spoil = partial(written, "odd.jsonl", content)
        argv = [*START, "--data", "odd.jsonl", "--name", "new"]
        yield refused("data", f"train on {label}", argv, ("odd",), TEXT, spoil)
    for label, (name, content) in EVALS.items():
        argv = [*CLI, "evaluate", "model", "--data", name]
        spoil = partial(written, name, content)
        yield refused("data", f"evaluate on {label}", argv, (name,), ("model",), spoil)
    for label, line in QRELS.items():
        yield Row("data", f"qrels with {label}", "1, names the file", partial(qrels, line))


def written(name: str, content: bytes, work: Path) -> None:
    (work / name).write_bytes(content)


def dry(name: str, content: bytes, place: str, scene: Scene) -> None:
    """Read an odd file with the dry run, which lists what training would refuse."""
    (scene.work / name).write_bytes(content)
    ended = scene.run(*CLI, "data", name)
    scene.check(ended.status == 1, f"status {ended.status}, expected 1")
    scene.check(place in ended.out + ended.err, f"does not name {place}")


def qrels(line: str, scene: Scene) -> None:
    """Evaluate on a retrieval data set of which one judgement is odd."""
    scene.take("model")
    folder = scene.work / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, prefix in (("corpus", "d"), ("queries", "q")):
        rows = [{"_id": f"{prefix}{i}", "title": "", "text": f"{i} cats"} for i in range(1, 5)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = [f"q{i} 0 d{i} 1" for i in range(1, 5)]
    text = "\n".join(x.replace(" ", "\t") for x in [*good[1:], *line.splitlines()])
    (folder / "qrels/test.tsv").write_text(text + "\n")
    ended = scene.run(*CLI, "evaluate", "model", "--data", "beir")
    if "not there" in line or line[:2] == "q9" or "d9" in line:
        # Missing ids are left out with a warning.
        scene.check(ended.status in (0, 1), f"status {ended.status}")
        scene.check("9" in ended.err, "does not warn")
    else:
        named(scene, ended, "test.tsv")
