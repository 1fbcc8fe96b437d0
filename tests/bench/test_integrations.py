"""`python -m bench integrations`: three losses on the same rows."""

import json

import pytest
from factories import write_jsonl
from sentence_models import tiny_sentence_model

from bench import __main__ as bench
from bench.integrations import command, training
from bench.integrations.settings import LOSSES, Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    tiny_sentence_model(folder / "trunk").save(str(folder / "model"))
    words = ["one", "two", "three", "four", "five", "fox", "quick", "brown"]
    rows = [{"query": f"{a} {b}", "positive": f"{b} {a} {b}"} for a in words for b in words]
    data = write_jsonl(folder / "pairs.jsonl", [*rows, {"query": "one two", "positive": "drei"}])
    return Settings(str(folder / "model"), data, 2, batch_size=4, held_out=8, every=1)


def test_held_out_texts_are_in_no_other_row(settings):
    rows, held_out = training.read(settings)
    texts = {text for row in held_out for text in row.values()}
    assert len(held_out) == 8 and len(texts) == 16
    assert len(rows) >= 65 - 8 - 1
    assert not texts & {text for row in rows for text in row.values()}


def test_losses_see_the_same_rows_and_scores(settings):
    results = [training.train(loss, settings) for loss in LOSSES]
    theirs, ours, cached = (result["held_out"] for result in results)
    assert list(ours) == [0, 1, 2]
    assert list(ours[0]) == [f"exit{e}_dim{d}" for e in (1, 2, 3, 4) for d in (4, 8, 16, 32)]
    assert theirs[0] == ours[0] == cached[0]
    assert ours[2] != ours[0] and ours[2] != theirs[2]
    assert ours[2] == pytest.approx(cached[2], rel=1e-3)
    for result in results:
        assert result["seconds_a_step"] > 0 and result["peak_mib"] > 0
    table = command.markdown(results)
    assert f"| Matryoshka3dLoss | exit4_dim32 | {ours[0]['exit4_dim32']:.3f} |" in table


def test_the_command_writes_what_its_process_prints(settings, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    words = ["--model", settings.model, "--data", settings.data, "--steps", "1", "--out", str(out)]
    words += ["--batch-size", "4", "--held-out", "8", "--losses", "Matryoshka3dLoss"]
    monkeypatch.setattr("sys.argv", ["bench", "integrations", *words])
    bench.main()
    written = json.loads(out.read_text())
    assert written["settings"]["steps"] == 1
    assert [result["loss"] for result in written["results"]] == ["Matryoshka3dLoss"]
    assert "| Matryoshka3dLoss | exit4_dim32 |" in capsys.readouterr().out


def test_wrong_data_and_losses_are_errors(settings, tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    with pytest.raises(ValueError, match=r"expected columns .*, got \[.text.\]"):
        training.read(Settings("", data))
    with pytest.raises(ValueError, match="expected 99 rows or more next to 8 held-out rows"):
        training.read(Settings("", settings.data, batch_size=99, held_out=8))
    with pytest.raises(SystemExit):
        command.main(["--model", "M", "--data", "D", "--losses", "MSELoss"])
    assert "losses: expected some of" in capsys.readouterr().err
