"""Logs of a run: metrics.jsonl, which survives crashes, TensorBoard, header and stage times."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlembed.runtime import log
from mlembed.runtime.log import Log

NESTED = {"loss": 2.5, "losses": {"exit_1": {"dim_8": 3}}, "rank": None}


def lines_of(directory):
    return [json.loads(line) for line in (directory / log.METRICS).read_text().splitlines()]


def begin(directory, tracker="none", step=0):
    out = Log(directory, main=True)
    out.open(tracker, step)
    return out


def logged(directory, steps, tracker="none", step=0, scale=1.0):
    """Log the loss `scale * step` of some steps, and close."""
    out = begin(directory, tracker, step)
    for step in steps:
        out.metrics(step, "train", {"loss": scale * step})
    out.close()


# ---- metrics.jsonl ----


def test_metrics_are_written_at_once(tmp_path):
    out = begin(tmp_path)
    assert out.lines() == []
    out.metrics(1, "train", NESTED)
    assert len(lines_of(tmp_path)) == 1
    out.metrics(2, "eval", {"score": 50.0, "note": "a\nb"})
    want = [
        {"step": 1, "kind": "train", **NESTED},
        {"step": 2, "kind": "eval", "score": 50.0, "note": "a\nb"},
    ]
    assert out.lines() == lines_of(tmp_path) == want


@pytest.mark.parametrize("step, left", [(10, [0, 5, 10]), (0, [])])
def test_resuming_removes_later_steps(step, left, tmp_path):
    """A run that was stopped before its first checkpoint starts from nothing."""
    logged(tmp_path, (0, 5, 10, 15))
    before = (tmp_path / log.METRICS).read_bytes()
    assert len(Log(tmp_path, main=True).lines()) == 4
    assert (tmp_path / log.METRICS).read_bytes() == before  # Reading does not write.
    logged(tmp_path, [15], step=step, scale=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [*left, 15]
    assert lines_of(tmp_path)[-1]["loss"] == 30


def test_bad_line_is_named(tmp_path):
    """Power failures leave blocks of zeros."""
    logged(tmp_path, [1])
    with (tmp_path / log.METRICS).open("ab") as file:
        file.write(b"\0" * 64 + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: invalid JSON"):
        begin(tmp_path, step=1)


def test_half_written_last_line_is_ignored(tmp_path):
    logged(tmp_path, [1])
    with (tmp_path / log.METRICS).open("a") as file:
        file.write('{"step": 2, "kind": "tra')
    assert [line["step"] for line in Log(tmp_path, main=True).lines()] == [1]
    logged(tmp_path, [2], step=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_other_processes_write_nothing(tmp_path, capsys):
    logged(tmp_path, [9])
    out = Log(tmp_path, main=False)
    out.open("tensorboard", 0)
    out.metrics(10, "train", {"loss": 1.0})
    out.say("hello")
    out.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [9]
    assert [path.name for path in tmp_path.iterdir()] == [log.METRICS]
    assert capsys.readouterr().out == ""


def test_say(tmp_path, capsys):
    out = begin(tmp_path)
    out.say("one ሰላም")
    out.say()
    assert capsys.readouterr().out == "one ሰላም\n\n"


def test_flat():
    nested = {"a": 1, "b": {"c": 2.5, "d": {"e": -3}}, "f": "text", "g": None, "h": [1]}
    assert list(log.flat(nested)) == [("a", 1.0), ("b/c", 2.5), ("b/d/e", -3.0)]
    assert list(log.flat({})) == []


# ---- trackers ----


def scalars(directory):
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_scalars(tmp_path):
    out = begin(tmp_path, "tensorboard")
    out.metrics(1, "train", NESTED)
    out.metrics(2, "train", {"loss": 1.5, "name": "x"})
    out.metrics(2, "eval", {"score": 50.0})
    out.close()
    assert scalars(tmp_path) == {
        "train/loss": [(1, 2.5), (2, 1.5)],
        "train/losses/exit_1/dim_8": [(1, 3.0)],
        "eval/score": [(2, 50.0)],
    }


@pytest.mark.parametrize("step, left", [(2, [0, 1, 2]), (0, [])])
def test_tensorboard_hides_steps_that_are_written_again(step, left, tmp_path):
    logged(tmp_path, range(5), "tensorboard")
    logged(tmp_path, [3], "tensorboard", step, scale=10)
    assert scalars(tmp_path)["train/loss"] == [*((s, float(s)) for s in left), (3, 30.0)]


def test_mlflow_has_the_scalars(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    (tmp_path / "run").mkdir()
    out = begin(tmp_path / "run", "mlflow")
    out.metrics(1, "train", NESTED)
    out.metrics(2, "train", {"loss": 1.5, "name": "x"})
    out.close()
    (run,) = mlflow.search_runs(experiment_names=["mlembed"], output_format="list")
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.5), (2, 1.5)]
    assert run.data.metrics["train/losses/exit_1/dim_8"] == 3.0


def test_missing_tracker_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="tracker: no_such_tracker is not installed: pip install"):
        begin(tmp_path, "no_such_tracker")


# ---- header and stages ----


def test_header_names_commit_versions_and_device(monkeypatch):
    header = log.header(torch.device("cpu"))
    assert torch.__version__ in header and "python 3." in header and "cpu" in header
    assert log.commit().rstrip("+") in header
    monkeypatch.setattr(log, "__file__", "/usr/lib/python3/mlembed/runtime/log.py")
    assert log.commit() == "unknown"


def test_stages_share_the_time_of_a_step(monkeypatch):
    now = iter([0, 1, 2, 4, 8, 11, 13, 25, 26, 26, 27, 40, 41, 41, 41])
    monkeypatch.setattr(log.time, "perf_counter", lambda: float(next(now)))
    stages = log.Stages(torch.device("cpu"))  # 0
    with stages.of("backward"), stages.of("forward"):  # 1 [2 4] 8
        pass
    with stages.of("data"):  # 11 .. 13
        pass
    want = {"backward": 2500.0, "data": 1000.0, "forward": 1000.0, "other": 8000.0}
    assert stages.take(2) == want  # Until 25; the next begins at 26.
    with pytest.raises(KeyError), stages.of("data"):  # 26 .. 27: failures take time as well.
        raise KeyError
    assert stages.take(1) == {"data": 1000.0, "other": 13000.0}  # Until 40.
    assert stages.take(1) == {"other": 0.0}
