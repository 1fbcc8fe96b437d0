"""Our scores against mteb's own on the same vectors, and our encoder as its model.

No other test imports mteb, which takes seconds.
"""

import json
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from datasets import Dataset
from factories import tiny_encoder, tiny_tokenizer, write_encoder, write_jsonl

from mlembed.data import eval_sets
from mlembed.evaluation import grid, scores
from mlembed.inference.encoder import Encoder, GridVectors
from mlembed.modeling import pretrained

mteb = pytest.importorskip("mteb")
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from mlembed.evaluation import mteb_model  # noqa: E402

WIDTH = 48
WORDS = ["sea", "land", "sun", "moon", "river", "hill", "road", "tree", "stone", "bird"]
AGREE = 1e-6


def vector(text):
    """Return the sum of the vectors of a text's trigrams, so that similar texts are near."""
    text = f" {text} "
    rows = [zlib.crc32(text[i : i + 3].encode()) % len(TABLE) for i in range(len(text) - 2)]
    return TABLE[rows].sum(0)


TABLE = np.random.default_rng(0).normal(size=(4096, WIDTH)).astype(np.float32)


def unit(texts):
    raw = np.array([vector(text) for text in texts], dtype=np.float32).reshape(-1, WIDTH)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


class Vectors:
    """An `Encoder` to our evaluation, with one exit and a fixed vector for each text."""

    model = SimpleNamespace(device=torch.device("cpu"), cfg=SimpleNamespace(hidden_size=WIDTH))
    prompts: dict[str, str] = {}

    def encode_grid(self, texts, sizes, progress=False, prompt="", on_disk=False):
        raw = torch.from_numpy(unit(texts))[None]
        return GridVectors({None: raw}, {None: [1]})


class SameVectors(mteb_model.MTEBEncoder):
    """The model of these vectors for mteb."""

    def __init__(self):
        self.mteb_model_meta = mteb.models.ModelMeta.create_empty(
            overwrites={"name": "made/up", "revision": "1"}
        )

    def encode(self, inputs, **options):
        return unit([text for batch in inputs for text in batch["text"]])


def metadata(kind, name, main_score, langs, split="test"):
    given = {"name": name, "type": kind, "main_score": main_score, "eval_langs": langs}
    given |= {"dataset": {"path": "local", "revision": "1"}, "eval_splits": [split]}
    return mteb.TaskMetadata(description="local", **given)


def by_mteb(task, out=None):
    cache = mteb.ResultCache(out) if out else None
    quiet = {"co2_tracker": False, "show_progress_bar": False}
    (result,) = mteb.evaluate(SameVectors(), [task], cache=cache, **quiet).task_results
    return result


def ours(task):
    return grid.score(Vectors(), task, [(WIDTH, 1, None)], {})[WIDTH, 1, None]


# ---- bitext ----


def bitext_task(name, sides):
    """Return a task of mteb of two lists of texts for each subset."""

    class Local(AbsTaskBitextMining):
        metadata = metadata("BitextMining", name, "f1", {subset: ["eng-Latn"] for subset in sides})

        def load_data(self, **options):
            self.dataset = {
                subset: {"test": Dataset.from_dict({"sentence1": a, "sentence2": b})}
                for subset, (a, b) in sides.items()
            }
            self.data_loaded = True

    return Local()


def tatoeba_files(path):
    """Write English sentences that repeat, and a language in which most words are near."""
    rng = np.random.default_rng(0)
    path.mkdir()
    for lang, form in (("deu", "x{}x"), ("nld", "{} de {}")):
        english = [" ".join(rng.choice(WORDS, 3)) for _ in range(80)]
        other = [form.format(s, s[::-1][:4]) for s in english]
        (path / f"tatoeba.{lang}-eng.{lang}").write_text("\n".join(other) + "\n")
        (path / f"tatoeba.{lang}-eng.eng").write_text("\n".join(english) + "\n")
    return path, ("deu", "nld")


def test_bitext(tmp_path):
    directory, langs = tatoeba_files(tmp_path / "tat")

    def lines(lang, end):
        path = directory / f"tatoeba.{lang}-eng.{end}"
        return path.read_bytes().decode().removesuffix("\n").split("\n")

    task = bitext_task(
        "LocalTatoeba",
        {
            f"{lang}-{way}": (lines(lang, one), lines(lang, two))
            for lang in langs
            for way, one, two in (("to", lang, "eng"), ("from", "eng", lang))
        },
    )
    found = {row["hf_subset"]: row for row in by_mteb(task).scores["test"]}
    (data,) = eval_sets.read(str(directory))
    data.groups = {(lang, ""): data.groups[lang, ""] for lang in langs}
    got = ours(data)
    for metric, name in (("accuracy", "{}_pivot"), ("f1", "f1_{}_pivot")):
        for way in ("to", "from"):
            want = np.mean([found[f"{lang}-{way}"][metric] for lang in langs])
            assert got[name.format(way)] == pytest.approx(want, abs=AGREE)
    for lang in langs:
        both = [found[f"{lang}-{way}"]["accuracy"] for way in ("to", "from")]
        assert got["by_language"][lang] == pytest.approx(np.mean(both), abs=AGREE)
    assert 0 < got["f1_to_pivot"] < got["to_pivot"] < 1


# ---- scored pairs ----


def test_sts(tmp_path):
    rng = np.random.default_rng(0)
    sides = [[" ".join(words) for words in rng.choice(WORDS, (60, 4))] for _ in range(2)]
    score = [len({*a.split()} & {*b.split()}) for a, b in zip(*sides, strict=True)]
    rows = zip(*sides, score, strict=True)
    lines = ["sentence1,sentence2,score", *(f"{a},{b},{s}" for a, b, s in rows)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")

    class Local(AbsTaskSTS):
        metadata = metadata("STS", "LocalSTS", "cosine_spearman", ["eng-Latn"])

        def load_data(self, **options):
            columns = dict(zip(("sentence1", "sentence2"), sides, strict=True))
            columns["score"] = list(map(float, score))
            self.dataset = {"test": Dataset.from_dict(columns)}
            self.data_loaded = True

    (found,) = by_mteb(Local()).scores["test"]
    (task,) = eval_sets.read(str(tmp_path / "pairs.csv"))
    got = ours(task)
    assert got["score"] == pytest.approx(found["cosine_spearman"], abs=AGREE)
    assert got["pearson"] == pytest.approx(found["cosine_pearson"], abs=AGREE)
    assert 0.05 < got["score"] < 0.99 and got["score"] != got["pearson"]


# ---- retrieval ----


def beir_files(path):
    """Write documents that repeat (equal scores), grades, a query whose judgements are all 0, one
    without any, queries that are documents, and a judged document that the corpus lacks.
    """
    rng = np.random.default_rng(1)
    (path / "qrels").mkdir(parents=True)
    documents = [" ".join(rng.choice(WORDS, 5)) for _ in range(150)]
    documents += documents[:40]
    rows = [
        {"_id": f"d{i * 7 % 190}", "title": "sun" if i % 3 else "", "text": text}
        for i, text in enumerate(documents)
    ]
    queries = [{"_id": f"q{i}", "text": " ".join(rng.choice(WORDS, 3))} for i in range(30)]
    rows += queries[::3]
    lines = ["query-id\tcorpus-id\tscore", "q2\tnowhere\t2"]
    for i in range(29):
        for j in rng.choice(190, 6, replace=False):
            lines.append(f"q{i}\td{j}\t{0 if i == 4 else rng.integers(-1, 4)}")
    write_jsonl(path / "corpus.jsonl", rows)
    write_jsonl(path / "queries.jsonl", queries)
    (path / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return path


def test_retrieval(tmp_path, monkeypatch):
    beir, split = beir_files(tmp_path / "made"), "test"

    class Local(AbsTaskRetrieval):
        metadata = metadata("Retrieval", "LocalRetrieval", "ndcg_at_10", ["eng-Latn"], split)
        k_values = (1, 10, 100, 200)
        ignore_identical_ids = True  # as BEIR does

        def load_data(self, **options):
            data = {"relevant_docs": {}, "top_ranked": None}
            for name in ("corpus", "queries"):
                rows = map(json.loads, (beir / f"{name}.jsonl").read_text().splitlines())
                texts = [{"title": "", **row, "id": row["_id"]} for row in rows]
                data[name] = Dataset.from_list(texts).remove_columns("_id")
            data["queries"] = data["queries"].remove_columns("title")
            for line in (beir / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
                query, document, grade = line.split("\t")
                data["relevant_docs"].setdefault(query, {})[document] = int(grade)
            self.dataset, self.data_loaded = {"default": {split: data}}, True

        def task_specific_scores(self, scores, *args, **options):
            """Return what mteb's table rounds to five places."""
            names = ("ndcg_cut_10", "recall_10", "recall_100", "map_cut_100")
            return {n: float(np.mean([row[n] for row in scores.values()])) for n in names}

    (found,) = by_mteb(Local()).scores[split]
    with warnings.catch_warnings(action="ignore"):  # of what is nowhere
        (task,) = eval_sets.read(str(beir))
    monkeypatch.setattr(grid, "DOCUMENTS", 64)  # several chunks
    got = ours(task)
    for name, theirs in (
        ("score", "ndcg_cut_10"),
        ("ndcg_at_10", "ndcg_cut_10"),
        ("recall_at_10", "recall_10"),
        ("recall_at_100", "recall_100"),
        ("map_at_100", "map_cut_100"),
        ("mrr_at_10", "mrr_at_10"),
    ):
        assert got[name] == pytest.approx(found[theirs], abs=AGREE), name
    assert 0 < got["map_at_100"] < got["recall_at_10"] < got["recall_at_100"]


# ---- our encoder as mteb's model ----


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    encoder = tiny_encoder(tiny_tokenizer(WORDS * 5), 32, exits=(1, 2), ranks=(4, 8))
    return write_encoder(encoder, tmp_path_factory.mktemp("model") / "small")


def loader(texts):
    return torch.utils.data.DataLoader(Dataset.from_dict({"text": texts}), batch_size=3)


@pytest.mark.parametrize(
    "prompts, kind, used",
    [
        ({}, "query", ""),
        ({"query": "Q: ", "document": "D: "}, "query", "Q: "),
        ({"query": "Q: ", "document": "D: "}, "document", "D: "),
        ({"query": "Q: "}, None, ""),
        ({"query": "Q: ", "Retrieval": "R: "}, "query", "R: "),
        ({"Retrieval": "R: ", "NFCorpus": "N: "}, "query", "N: "),
        ({"NFCorpus": "N: ", "NFCorpus-query": "NQ: "}, "query", "NQ: "),
        ({"NFCorpus": "N: ", "NFCorpus-query": "NQ: "}, "document", "N: "),
    ],
)
def test_vectors_and_prompts(directory, prompts, kind, used):
    encoder = Encoder.load(str(directory), "cpu")
    model = mteb_model.MTEBEncoder(encoder, "made/up", 8, 1, 4, prompts)
    assert isinstance(model, mteb.models.EncoderProtocol)
    got = model.encode(
        loader(WORDS),
        task_metadata=mteb.get_task("NFCorpus").metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=PromptType(kind) if kind else None,
        batch_size=2,
    )
    want = encoder.encode([used + word for word in WORDS], 8, 1, 4)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.shape == (10, 8)


def test_model_meta(directory):
    encoder = Encoder.load(str(directory), "cpu")
    meta = mteb_model.MTEBEncoder(encoder, "made/up", 8, 1, 4).mteb_model_meta
    small = pretrained.cut(encoder.model, 1, 4)
    assert meta.n_parameters == sum(p.numel() for p in small.parameters())
    assert (meta.embed_dim, meta.max_tokens) == (8, 32)
    assert meta.experiment_kwargs == {"dim": 8, "exit": 1, "rank": 4}
    other = Encoder.load(str(directory), "cpu")
    assert mteb_model.digest(other) == meta.revision
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    assert mteb_model.digest(other) != meta.revision
    with pytest.raises(ValueError, match="exit: expected 1..2"):
        mteb_model.MTEBEncoder(encoder, "made/up", exit=3)


def test_tasks():
    (task,) = mteb_model.tasks(["STS12"])
    assert task.metadata.name == "STS12"
    with pytest.raises(ValueError, match=r"mteb: expected a task .*near:.*NFCorpus.*got 'NFCorpu'"):
        mteb_model.tasks(["STS12", "NFCorpu"])
    with pytest.raises(ValueError, match=r"mteb: expected tasks of text, got CIFAR10, of image"):
        mteb_model.tasks(["CIFAR10"])
    assert len(mteb_model.tasks(["STS12", "STS12"])) == 1


def test_model_name(directory, monkeypatch):
    assert mteb_model.model_name("Qwen/Qwen3-Embedding-0.6B") == "Qwen/Qwen3-Embedding-0.6B"
    assert mteb_model.model_name(str(directory)) == f"mlembed/{directory.parent.name}-small"
    monkeypatch.chdir(directory.parent)
    assert mteb_model.model_name("small") == f"mlembed/{directory.parent.name}-small"
    assert mteb_model.model_name("nowhere") == f"mlembed/{directory.parent.name}-nowhere"


def local_run(task, langs):
    def texts(rows):
        return [task.texts[i] for i in rows]

    groups = {lang: task.groups[lang, ""] for lang in langs}
    sides = {f"{lang}-eng": (texts(a), texts(b)) for lang, (a, b) in groups.items()}
    return bitext_task("LocalRun", sides)


def test_run_by_mteb(directory, tmp_path):
    """It writes results in its own layout; its scores equal ours on the same text."""
    encoder = Encoder.load(str(directory), "cpu")
    path, langs = tatoeba_files(tmp_path / "tat")
    (task,) = eval_sets.read(str(path))
    model = mteb_model.MTEBEncoder(encoder, "made/up", 8, 2, 8)
    found = mteb_model.evaluate(model, [local_run(task, langs)], tmp_path / "out")["LocalRun"]
    unit = torch.from_numpy(encoder.encode(task.texts, 8, 2, 8))
    want = scores.score_bitext(task, unit)
    assert found["score"] == pytest.approx(want["f1_to_pivot"], abs=AGREE)
    assert found["by_language"].keys() == {"deu-eng", "nld-eng"}
    (stored,) = (tmp_path / "out").rglob("LocalRun.json")
    rows = json.loads(stored.read_text())["scores"]["test"]
    assert np.mean([row["main_score"] for row in rows]) == pytest.approx(found["score"])
    # results/<model>/<revision>/experiments/<sizes>/LocalRun.json
    assert "made__up" in stored.parts and "dim_8__exit_2__rank_8" in stored.parts


class Counting(Encoder):
    """Counts the texts that go through the trunk."""

    encoded = 0

    def run(self, ids, *args, **options):
        self.encoded += len(ids)
        return super().run(ids, *args, **options)


def test_one_pass_for_all_sizes_of_a_rank(directory, tmp_path, monkeypatch):
    """Each size equals the size alone, in bf16."""
    path, langs = tatoeba_files(tmp_path / "tat")
    (task,) = eval_sets.read(str(path))
    monkeypatch.setattr(mteb_model, "tasks", lambda names: [local_run(task, langs)])
    plain = Encoder.load(str(directory), "cpu", "bfloat16")
    encoder = Counting(plain.model, plain.tokenizer, plain.max_length)
    sizes = {"dims": [8, 32], "exits": [1, 2], "ranks": [8]}
    scored = grid.score_grid(encoder, [], **sizes, costs=False)
    cells = scored.cells
    grid.add_mteb(encoder, str(directory), ["LocalRun"], scored, {}, tmp_path / "out")
    assert encoder.encoded == len(task.texts)
    alone = grid.score_grid(plain, [task], **sizes, costs=False).cells
    for cell, one in zip(cells, alone, strict=True):
        want = one["scores"]["tat"]["f1_to_pivot"]
        assert cell["scores"]["LocalRun"]["score"] == pytest.approx(want, abs=AGREE)
        assert cell["parameter_bytes"] == 2 * cell["parameters"]
    assert len({cell["scores"]["LocalRun"]["score"] for cell in cells}) > 1
    stored = list((tmp_path / "out").rglob("LocalRun.json"))
    assert len(stored) == 4 and all(mteb_model.digest(plain) in file.parts for file in stored)


def test_command_rejects_an_unknown_task(directory, tmp_path):
    out = tmp_path / "report"
    done = processes.run("-m", "mlembed", "evaluate", directory, "--mteb", "STS21", "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: mteb: expected a task of mteb") and "near: STS22" in last
    assert not out.exists()
