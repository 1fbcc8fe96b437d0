"""Ranges of a trace: nested, free when nothing is traced, in the traced steps alone."""

import json
from contextlib import nullcontext

import pytest
import torch

from mlembed.runtime import profiling
from mlembed.runtime.log import Stages
from mlembed.runtime.profiling import WARM_UP, Spans, span, trace


def steps(count, path, traced=2):
    """Run steps of nested ranges."""
    stages = Stages(torch.device("cpu"))
    with trace(traced, path) as end_of_step:
        for _ in range(count):
            with stages.of("outer"):
                spans = Spans(f"exit {i}" for i in (1, 2))
                for _ in range(2):
                    spans.next()
                    torch.ones(3).sum()
                spans.close()
            end_of_step()


def ranges(path):
    """Return begin and end of a trace's named ranges, by name."""
    events = json.loads(path.read_text())["traceEvents"]
    found = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def test_ranges_nest_and_follow_each_other(tmp_path):
    path = tmp_path / "new" / "trace.json"
    steps(WARM_UP + 5, path)
    found = ranges(path)
    assert len(found["outer"]) == len(found["exit 1"]) == len(found["exit 2"]) == 2
    for outer, first, second in zip(
        *(found[x] for x in ("outer", "exit 1", "exit 2")), strict=True
    ):
        assert outer[0] <= first[0] <= first[1] <= second[0] <= second[1] <= outer[1]
    numbers = sorted(name for name in found if name.startswith("ProfilerStep"))
    assert numbers == [f"ProfilerStep#{WARM_UP}", f"ProfilerStep#{WARM_UP + 1}"]


def test_a_run_that_ends_early_writes_what_it_has(tmp_path):
    steps(WARM_UP + 1, tmp_path / "trace.json", traced=9)
    assert len(ranges(tmp_path / "trace.json")["outer"]) == 1
    steps(WARM_UP - 1, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
    steps(WARM_UP + 5, None)


def test_nothing_is_recorded_without_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "record_function", lambda name: pytest.fail(name))
    steps(3, tmp_path / "trace.json", traced=0)
    assert isinstance(span("a"), nullcontext) and not list(tmp_path.iterdir())
    with pytest.raises(pytest.fail.Exception):
        steps(1, None)
    assert isinstance(span("a"), nullcontext)


def test_ranges_are_nvtx_s_where_there_is_cuda(monkeypatch, tmp_path):
    """A torch without CUDA raises if torch.cuda.nvtx is called."""
    called = []

    def nvtx(name):
        called.append(name)
        return nullcontext()

    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    steps(1, None)
    assert called == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profiling, "_tracing", True)
    with span("a"), span("b"):
        pass
    assert called == ["a", "b"]
