"""What a run writes down: metrics that survive a crash, TensorBoard."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlembed.runtime import log
from mlembed.runtime.log import Log


def lines_of(directory):
    return [json.loads(line) for line in (directory / log.METRICS).read_text().splitlines()]


def begin(directory, tracker="none", step=0):
    out = Log(directory, main=True)
    out.open(tracker, step)
    return out


# ---- metrics.jsonl ----


def test_metrics_lines(tmp_path):
    out = begin(tmp_path)
    assert out.lines() == []
    out.metrics(1, "train", {"loss": 2.5, "losses": {"exit_1": {"dim_8": 3}}, "rank": None})
    out.metrics(2, "eval", {"score": 50.0, "note": "a\nb"})
    want = [
        {
            "step": 1,
            "kind": "train",
            "loss": 2.5,
            "losses": {"exit_1": {"dim_8": 3}},
            "rank": None,
        },
        {"step": 2, "kind": "eval", "score": 50.0, "note": "a\nb"},
    ]
    assert out.lines() == lines_of(tmp_path) == want


def test_each_line_is_there_at_once(tmp_path):
    """A run that is killed has logged what it said."""
    out = begin(tmp_path)
    for step in range(3):
        out.metrics(step, "train", {"loss": 1.0})
        assert len(lines_of(tmp_path)) == step + 1


def test_resuming_removes_later_steps(tmp_path):
    out = begin(tmp_path)
    for step in (0, 5, 10, 15):
        out.metrics(step, "train", {"loss": float(step)})
    out.metrics(10, "eval", {"score": 1.0})
    resumed = begin(tmp_path, step=10)
    assert [(x["step"], x["kind"]) for x in lines_of(tmp_path)] == [
        (0, "train"),
        (5, "train"),
        (10, "train"),
        (10, "eval"),
    ]
    resumed.metrics(15, "train", {"loss": 7.0})
    assert lines_of(tmp_path)[-1]["loss"] == 7.0 and len(lines_of(tmp_path)) == 5


def test_starting_over_removes_every_step(tmp_path):
    """A run that was stopped before its first checkpoint begins again from nothing."""
    out = begin(tmp_path)
    out.metrics(0, "eval", {"score": 1.0})
    out.metrics(5, "train", {"loss": 1.0})
    assert begin(tmp_path).lines() == lines_of(tmp_path) == []


def test_looking_does_not_write(tmp_path):
    begin(tmp_path).metrics(5, "train", {"loss": 1.0})
    before = (tmp_path / log.METRICS).read_bytes()
    assert [x["step"] for x in Log(tmp_path, main=True).lines()] == [5]
    assert (tmp_path / log.METRICS).read_bytes() == before


def test_a_line_that_is_not_ours_is_named(tmp_path):
    """As where power was lost: a block of zeros."""
    begin(tmp_path).metrics(1, "train", {"loss": 1.0})
    with (tmp_path / log.METRICS).open("ab") as file:
        file.write(b"\0" * 64 + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected json"):
        begin(tmp_path, step=1)


def test_a_half_written_last_line_is_ignored(tmp_path):
    out = begin(tmp_path)
    out.metrics(1, "train", {"loss": 1.0})
    with (tmp_path / log.METRICS).open("a") as file:
        file.write('{"step": 2, "kind": "tra')
    assert [x["step"] for x in out.lines()] == [1]
    resumed = begin(tmp_path, step=2)
    resumed.metrics(2, "train", {"loss": 2.0})
    assert [x["step"] for x in lines_of(tmp_path)] == [1, 2]


def test_other_processes_are_silent(tmp_path, capsys):
    begin(tmp_path).metrics(9, "train", {"loss": 1.0})
    out = Log(tmp_path, main=False)
    out.open("tensorboard", 0)
    out.metrics(10, "train", {"loss": 1.0})
    out.say("hello")
    out.close()
    assert [x["step"] for x in lines_of(tmp_path)] == [9]
    assert [p.name for p in tmp_path.iterdir()] == [log.METRICS]
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
    out.metrics(1, "train", {"loss": 2.5, "losses": {"exit_1": {"dim_8": 3}}, "rank": None})
    out.metrics(2, "train", {"loss": 1.5, "name": "x"})
    out.metrics(2, "eval", {"score": 50.0})
    out.close()
    assert scalars(tmp_path) == {
        "train/loss": [(1, 2.5), (2, 1.5)],
        "train/losses/exit_1/dim_8": [(1, 3.0)],
        "eval/score": [(2, 50.0)],
    }


def test_tensorboard_goes_on_after_resuming(tmp_path):
    first = begin(tmp_path, "tensorboard")
    first.metrics(1, "train", {"loss": 3.0})
    first.metrics(2, "train", {"loss": 2.0})
    first.close()
    second = begin(tmp_path, "tensorboard", 2)
    second.metrics(3, "train", {"loss": 1.0})
    second.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 3.0), (2, 2.0), (3, 1.0)]


@pytest.mark.parametrize(
    "step, kept", [(2, [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]), (0, [(3, 30.0)])]
)
def test_tensorboard_forgets_what_is_written_again(step, kept, tmp_path):
    """Steps after the checkpoint are in the first file and again in the second."""
    first = begin(tmp_path, "tensorboard")
    for done in range(5):
        first.metrics(done, "train", {"loss": float(done)})
    first.close()
    second = begin(tmp_path, "tensorboard", step)
    second.metrics(3, "train", {"loss": 30.0})
    second.close()
    assert scalars(tmp_path)["train/loss"] == kept


def test_no_tracker_writes_nothing_else(tmp_path):
    out = begin(tmp_path)
    out.metrics(1, "train", {"loss": 1.0})
    out.close()
    assert [p.name for p in tmp_path.iterdir()] == [log.METRICS]


def test_a_tracker_that_is_not_installed(tmp_path):
    with pytest.raises(ValueError, match="expected no_such_tracker to be installed.*pip install"):
        begin(tmp_path, "no_such_tracker")


# ---- header ----


def test_header_names_commit_versions_and_device():
    header = log.header(torch.device("cpu"))
    assert torch.__version__ in header and "python 3." in header and "cpu" in header
    assert log.commit().rstrip("+") in header


# ---- where a step's time goes ----


def test_stages_share_out_the_time_between_them(monkeypatch):
    """What runs inside another stage is not that one's as well; a mean over the steps asked for."""
    now = iter([0, 1, 2, 4, 8, 11, 13, 25, 26, 26, 27, 40, 41, 41, 41])
    monkeypatch.setattr(log.time, "perf_counter", lambda: float(next(now)))
    stages = log.Stages(torch.device("cpu"))  # 0
    with stages.of("backward"), stages.of("forward"):  # 1 [2 4] 8
        pass
    with stages.of("data"):  # 11 .. 13
        pass
    want = {"backward": 2500.0, "data": 1000.0, "forward": 1000.0, "other": 8000.0}
    assert stages.take(2) == want  # until 25; from 26
    with pytest.raises(KeyError), stages.of("data"):  # 26 .. 27: what fails took its time too
        raise KeyError
    assert stages.take(1) == {"data": 1000.0, "other": 13000.0}  # until 40; from 41
    assert stages.take(1) == {"other": 0.0}
