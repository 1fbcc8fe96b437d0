"""Mining against sentence-transformers on an exported model, and a loop over all pairs."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
from factories import tiny_encoder, tiny_tokenizer, write_encoder
from factories import write_jsonl as written
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from mlembed import config
from mlembed.cli.mine import main
from mlembed.data import sources
from mlembed.data.formats import layouts
from mlembed.data.sources import tables_of
from mlembed.inference import mining
from mlembed.inference.encoder import Encoder
from mlembed.inference.mining import Column, Options, gather, write
from mlembed.publishing.export import export
from tests.inference.test_encoder import ODD_SHAPE

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "один", "два", "три", "四", "五"]
MARGINS = Options(top=20, negatives=5)


def text(rng) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(3, 8)))


def pairs(count: int = 60, seed: int = 0, several: bool = True) -> list[dict]:
    """Return pairs that differ by a word, all texts distinct; with `several`, some queries have two
    or three positives.
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        words = text(rng).split()
        other = [*words[:-1], str(rng.choice(WORDS))]
        both = " ".join(words), " ".join(other)
        if len({*rows, *rows.values(), *both}) == 2 * len(rows) + 2:
            rows[both[0]] = both[1]
    found = [{"query": q, "positive": d} for q, d in rows.items()]
    for one, other in ((3, 14), (4, 15), (4, 16), (30, 41)) if several else ():
        found[other]["query"] = found[one]["query"]
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def encoder():
    tokens = tiny_tokenizer([" ".join(WORDS)] * 3, 280)
    return tiny_encoder(tokens, 48, **ODD_SHAPE, pooling="mean")


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("mine") / "model"
    export(encoder, out)
    return SentenceTransformer(str(out), device="cpu", local_files_only=True)


def run(encoder, rows, options, tmp_path, corpus=None):
    """Return the report and the written rows."""
    data = written(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    report = write(encoder, gather(tables_of([data]), corpus), options, out)
    return report, lines(out)


def by_pair(rows):
    found = {(row["query"], row["positive"]): row["negatives"] for row in rows}
    assert len(found) == len(rows)
    return found


# ---- sentence-transformers ----


def by_sentence_transformers(model, rows, options, corpus=None):
    given = {"range_min": options.skip, "range_max": options.top, "sampling_strategy": "top"}
    given |= {"num_negatives": options.negatives, "output_format": "labeled-list"}
    for name in ("relative_margin", "absolute_margin", "max_score"):
        given[name] = getattr(options, name)
    both = [{"query": row["query"], "positive": row["positive"]} for row in rows]
    pairs = datasets.Dataset.from_list(both)
    found = mine_hard_negatives(
        pairs, model, corpus=corpus, **given, output_scores=True, verbose=False
    )
    texts = {(r["query"], r["positive"][0]): r["positive"][1:] for r in found}
    scores = {(r["query"], r["positive"][0]): r["scores"] for r in found}
    return texts, scores


@pytest.mark.parametrize(
    "options",
    [
        MARGINS,
        replace(MARGINS, relative_margin=0.3),
        replace(MARGINS, relative_margin=0.0, absolute_margin=0.2),
        replace(MARGINS, max_score=0.6),
        replace(MARGINS, top=7, negatives=7),
        replace(MARGINS, top=200, negatives=24),
    ],
    ids=["margin", "wide", "absolute", "most", "few", "all"],
)
@pytest.mark.parametrize("with_corpus", [False, True])
def test_sentence_transformers_agrees(encoder, exported, options, with_corpus, tmp_path):
    """It searches `range_max` candidates and as many more as any query has positives, so with
    several positives only `top=200`, all documents, is comparable.
    """
    several = options.top == 200
    rows = pairs(several=several)
    rng = np.random.default_rng(1)
    corpus = None
    if with_corpus:  # none of them a query: to it that would be a candidate
        corpus = sorted({text(rng) for _ in range(50)} - {row["query"] for row in rows})
        corpus.append(rows[0]["positive"])
    want, scores = by_sentence_transformers(exported, rows, options, corpus)
    report, got = run(encoder, rows, options, tmp_path, corpus)
    assert sum(len(negatives) for negatives in want.values()) > 50
    assert len(got) == report.pairs == len(rows)
    for row in got:
        key = row["query"], row["positive"]
        assert row["negatives"] == want.get(key, []), key
        if key in want:
            ours = [row["positive_score"], *row["negative_scores"]]
            np.testing.assert_allclose(ours, scores[key], rtol=0, atol=1e-5)
    queries = {row["query"]: len(row["negatives"]) for row in got}
    assert report.queries == len(queries) == len(rows) - 4 * several
    assert report.full == sum(n == options.negatives for n in queries.values())
    assert report.none == sum(n == 0 for n in queries.values())


# ---- a loop over all pairs ----


def linked_groups(rows):
    """Return each text's group: groups of linked texts are merged until nothing changes."""
    group = {}
    for row in rows:
        for name in ("query", "positive"):
            group.setdefault(row[name], row[name])
    changed = True
    while changed:
        changed = False
        for row in rows:
            both = sorted((group[row["query"]], group[row["positive"]]))
            if both[0] != both[1]:
                changed = True
                group = {t: both[0] if g == both[1] else g for t, g in group.items()}
    return group


def brute(encoder, rows, options, corpus=None):
    group = linked_groups(rows)
    pool = [row["positive"] for row in rows]
    pool += [n for row in rows for n in row.get("negatives", [])] if corpus is None else corpus
    pool = list(dict.fromkeys(pool))
    queries = list(dict.fromkeys(row["query"] for row in rows))

    def vectors(texts, *size):
        raw = encoder.encode_exits(texts, [size[1] or 3], size[2])[0].double().numpy()
        raw = raw[:, : size[0] or 24]
        return dict(zip(texts, raw / np.linalg.norm(raw, axis=1, keepdims=True), strict=True))

    near = vectors(sorted({*pool, *queries}), options.dim, options.exit, options.rank)
    deep = vectors(sorted({*pool, *queries}), None, None, None) if options.rescore else near
    found, short = {}, 0
    for query in queries:
        others = [d for d in pool if group.get(d) != group[query]]
        others.sort(key=lambda d: -(near[d] @ near[query]))
        others = others[: options.top]
        others.sort(key=lambda d: -(deep[d] @ deep[query]))
        own = [row["positive"] for row in rows if row["query"] == query]
        s = min(deep[d] @ deep[query] for d in own)
        chosen = []
        for d in others[options.skip :]:
            score = deep[d] @ deep[query]
            near_positive = score > s - abs(s) * options.relative_margin
            if near_positive or score > s - options.absolute_margin or score > options.max_score:
                continue
            chosen.append(d)
        chosen = chosen[: options.negatives]
        if len(chosen) < options.negatives and options.short == "discard":
            short += 1
            continue
        for d in own:
            found[query, d] = chosen
    return found, short


@pytest.mark.parametrize(
    "options",
    [
        MARGINS,
        replace(MARGINS, skip=3, relative_margin=0.1, max_score=0.4),
        replace(MARGINS, skip=3, short="discard"),
        replace(MARGINS, exit=1, dim=5),
        replace(MARGINS, exit=1, dim=5, rank=3, rescore=True),
        replace(MARGINS, exit=1, rescore=True, top=9, skip=2, relative_margin=0.2, max_score=0.5),
        Options(),
        Options(top=1, negatives=1),
    ],
    ids=["plain", "skip", "discard", "shallow", "rescored", "both", "default", "one"],
)
@pytest.mark.parametrize("block", [10**6, 90])
def test_loop_over_all_pairs_agrees(encoder, options, block, tmp_path, monkeypatch):
    """Rows may link in chains, have stored negatives, and queries may be documents."""
    monkeypatch.setattr(mining, "BLOCK", block)
    monkeypatch.setattr(mining, "CHUNK", 32)
    rows = pairs(90, seed=2)
    for i in range(0, 20, 2):
        rows[i]["positive"] = rows[i + 2]["positive"]  # a chain of queries
    rows[50]["positive"] = rows[51]["query"]
    rng = np.random.default_rng(3)
    for row in rows[::3]:
        row["negatives"] = [text(rng), row["query"], rows[7]["positive"], rows[60]["query"]]
    rows = list({(row["query"], row["positive"]): row for row in rows}.values())
    want, short = brute(encoder, rows, options)
    report, got = run(encoder, rows, options, tmp_path)
    assert by_pair(got) == want
    assert report.discarded == short
    assert (short > 0) == (options.short == "discard")
    for row in got:
        scores = row["negative_scores"]
        assert scores == sorted(scores, reverse=True) and len(scores) == len(row["negatives"])
        assert row["query"] not in row["negatives"]
        assert all(score == round(score, 6) for score in [*scores, row["positive_score"]])


def test_rescoring_encodes_shortlisted_documents_once(encoder, tmp_path, monkeypatch):
    """Only documents on a shortlist and positives are encoded at full size."""
    calls = []

    def encode(self, texts, *size, prompt):
        calls.append((size, list(texts)))
        return real(self, texts, *size, prompt=prompt)

    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", encode)
    monkeypatch.setattr(mining, "BLOCK", 50)
    rows = pairs()
    options = Options(top=2, negatives=1, exit=1, dim=5, rescore=True)
    run(encoder, rows, options, tmp_path, corpus=[f"{i} один" for i in range(200)])
    deep = [text for size, texts in calls if size == () for text in texts]
    queries = {row["query"] for row in rows}
    documents = [text for text in deep if text not in queries]
    assert len(documents) == len(set(documents)) < 180  # of 260
    assert {row["positive"] for row in rows} <= set(documents)
    assert all(size == (5, 1, None) for size, _ in calls if size != ())


def test_corpus_replaces_stored_negatives(encoder, tmp_path):
    rng = np.random.default_rng(4)
    documents = [{"_id": str(i), "title": "t", "text": text(rng)} for i in range(40)]
    path = written(tmp_path / "corpus.jsonl", documents)
    rows = pairs()
    rows[0]["negatives"] = ["stored here alone"]
    corpus = [f"t {row['text']}" for row in documents]
    want, _ = brute(encoder, rows, MARGINS, corpus)
    report, got = run(encoder, rows, MARGINS, tmp_path, Column(layouts.Corpus(path)))
    assert by_pair(got) == want
    assert report.documents == len({*corpus, *(row["positive"] for row in rows)})
    assert any(n in corpus for row in got for n in row["negatives"])


def test_report_counts(encoder, tmp_path):
    rows = pairs()
    options = replace(MARGINS, skip=2, relative_margin=0.2)
    report, got = run(encoder, rows, options, tmp_path)
    # Ranks by hand: each negative's place among all candidates.
    everything, _ = brute(encoder, rows, replace(options, relative_margin=-9.0, skip=0, max_score=2,
                                                 absolute_margin=-9.0, negatives=20))  # fmt: skip
    by_query = {row["query"]: row for row in got}
    ranks = [
        everything[query, row["positive"]].index(n) + 1
        for query, row in by_query.items()
        for n in row["negatives"]
    ]
    assert report.negatives == len(ranks) and report.ranks == sum(ranks) and min(ranks) > 2
    assert report.left_out["skip"] == 2 * report.queries
    assert report.left_out["relative_margin"] > 0
    printed = str(report)
    assert f"{report.queries} queries of {len(rows)} pairs, {report.documents} documents" in printed
    assert f"mean rank {np.mean(ranks):.1f}" in printed
    assert f"{report.full} with all negatives, {report.none} with none, 0 discarded" in printed


def test_random_picks_depend_on_seed_and_query(encoder, tmp_path, monkeypatch):
    rows = pairs()
    options = replace(MARGINS, pick="random", negatives=4)
    _, got = run(encoder, rows, options, tmp_path)
    monkeypatch.setattr(mining, "BLOCK", 50)
    assert by_pair(run(encoder, rows, options, tmp_path)[1]) == by_pair(got)
    other = run(encoder, rows, replace(options, seed=1), tmp_path)[1]
    assert by_pair(other) != by_pair(got)
    everything, _ = brute(encoder, rows, replace(options, negatives=20))
    left = [(len(everything[key]), set(n) - set(everything[key][:4])) for key, n in
            by_pair(got).items()]  # fmt: skip
    for key, negatives in by_pair(got).items():
        assert set(negatives) <= set(everything[key]) and len(set(negatives)) == len(negatives)
        assert len(negatives) == min(4, len(everything[key]))
    # Queries with equally many candidates get different places.
    drawn = {
        tuple(everything[key].index(n) for n in negatives)
        for key, negatives in by_pair(got).items()
        if len(everything[key]) == 20
    }
    assert len(drawn) > 5
    assert sum(bool(beyond) for many, beyond in left if many > 8) > 10


# ---- files ----


def test_command_writes_rows_for_our_reader_and_datasets(encoder, tmp_path, capsys):
    model = str(write_encoder(encoder, tmp_path / "model"))
    rows = pairs()
    data = written(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "deep" / "out.jsonl"
    main(model, out, data=(data,), options=MARGINS, device="cpu")
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    assert "queries of 60 pairs" in capsys.readouterr().out
    want, _ = brute(encoder, rows, MARGINS)
    assert by_pair(lines(out)) == want
    ((table, report),) = sources.read(config.Source(path=str(out)))
    assert report.items == len(rows) and report.bad == 0 and table.task == "retrieval"
    items = [table.texts[slice(*table.starts[i : i + 2])] for i in range(len(table))]
    assert {(q, p): negatives for q, p, *negatives in items} == want
    # Training would leave out none of the negatives.
    for i in range(len(table)):
        ids = table.ids[slice(*table.starts[i : i + 2])]
        assert ids[1] == ids[0] and not (ids[2:] == ids[0]).any()
    found = datasets.load_dataset("json", data_files=str(out), split="train",
                                  cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert by_pair(found) == want
    with pytest.raises(ValueError, match="out: expected a new file"):
        main(model, out, data=(data,), options=MARGINS, device="cpu")


def mixture(path, *listed):
    """Return the tables of a mixture of sources."""
    (path / "mixture.json").write_text(json.dumps({"sources": listed}))
    return tables_of([str(path / "mixture.json")])


def test_prompts_are_encoded_and_not_written(encoder, tmp_path):
    rows = pairs()
    data = written(tmp_path / "pairs.jsonl", rows)
    source = {"path": data, "prompt": "one two: ", "document_prompt": "три "}
    write(encoder, gather(mixture(tmp_path, source)), MARGINS, tmp_path / "out.jsonl")
    got = by_pair(lines(tmp_path / "out.jsonl"))
    before = {"query": "one two: ", "positive": "три "}
    prompted = [{name: prompt + row[name] for name, prompt in before.items()} for row in rows]
    want, _ = brute(encoder, prompted, MARGINS)
    assert got != brute(encoder, rows, MARGINS)[0]
    assert want == {
        (f"one two: {query}", f"три {positive}"): [f"три {negative}" for negative in negatives]
        for (query, positive), negatives in got.items()
    }


def test_positives_of_all_files_count(encoder, tmp_path):
    rows = pairs()
    half = [*rows[:30], {"query": rows[40]["query"], "positive": rows[2]["positive"]}]
    data = [written(tmp_path / "a.jsonl", half), written(tmp_path / "b.jsonl", rows[30:])]
    write(encoder, gather(tables_of(data)), MARGINS, tmp_path / "out.jsonl")
    got = by_pair(lines(tmp_path / "out.jsonl"))
    assert got == brute(encoder, half + rows[30:], MARGINS)[0]
    key = rows[40]["query"]
    assert got[key, rows[2]["positive"]] == got[key, rows[40]["positive"]]


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(top=0), "top: expected more than 0, got 0"),
        (Options(negatives=0), "negatives: expected more than 0, got 0"),
        (Options(skip=-1), "skip: expected 0 or more, got -1"),
        (Options(relative_margin=-0.1), "relative_margin: expected 0 or more"),
        (Options(absolute_margin=float("nan")), "absolute_margin: expected 0 or more, got nan"),
        (Options(max_score=1.5), "max_score: expected at most 1, got 1.5"),
        (Options(top=28, skip=5), r"top: expected at least skip \+ negatives, 29, got 28"),
        (Options(exit=4), r"exit: expected 1..3 \(the depth\), got 4"),
        (Options(dim=25), "dim: expected 1..24"),
        (Options(rank=12), "rank: expected 1..11"),
    ],
)
def test_options_out_of_range(encoder, options, reason, tmp_path):
    texts = gather(tables_of([written(tmp_path / "pairs.jsonl", pairs())]))
    with pytest.raises(ValueError, match=reason):
        write(encoder, texts, options, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_unusable_data(encoder, tmp_path):
    nway = [{"id": str(i % 3), "lang": "ab"[i // 3], "text": f"{i} one"} for i in range(6)]
    path = written(tmp_path / "nway.jsonl", nway)
    with pytest.raises(ValueError, match="expected pairs .* an n-way table of translations, nway"):
        gather(tables_of([path]))
    classes = [{"query": "one", "positive": "two", "negatives": ["three"]}]
    data = written(tmp_path / "classes.jsonl", classes)
    with pytest.raises(ValueError, match="task classification, classes"):
        gather(mixture(tmp_path, {"path": data, "task": "classification"}))
    other = {"path": data, "name": "other", "document_prompt": "d: "}
    with pytest.raises(ValueError, match="data: expected one document_prompt, got .*'d: '"):
        gather(mixture(tmp_path, {"path": data}, other))
    with pytest.raises(ValueError, match="data: expected stored sources, got streams"):
        mixture(tmp_path, {"path": data, "streaming": True})
    with pytest.raises(ValueError, match="out: expected a .jsonl file"):
        write(encoder, gather(tables_of([data])), MARGINS, tmp_path / "out.json")


def test_one_pair_has_no_negatives(encoder, tmp_path):
    report, got = run(encoder, pairs()[:1], MARGINS, tmp_path)
    assert [row["negatives"] for row in got] == [[]] and report.none == 1 and report.documents == 1
    report, got = run(encoder, pairs()[:1], replace(MARGINS, short="discard"), tmp_path)
    assert got == [] and report.discarded == 1
