"""Thirty steps of train.py on this machine, and what interrupts them.

    python -m bench.gpu.training --out results.jsonl

Nothing else of the benches runs the loader, the stages and the loop of train.py. The text is a
file of synthetic pairs with hard negatives that is read on the fly, the model has the shape of 0.6B
with random weights; nothing is saved, scored or exported. Reported after the first steps:

    recompilations   of torch.compile, with their reasons
    kernels          that Triton compiled in the middle of the run
    host waits       calls that wait for the device, by line (torch.cuda.set_sync_debug_mode)
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mlembed import config
from mlembed.data import tokenizer
from mlembed.runtime import log
from mlembed.runtime.distributed import World

from .. import ROOT, harness, loader
from ..environment import environment
from ..records import append
from ..train_step import cases

STEPS = 30
SETTLED = 10  # steps after which nothing should be compiled: all kinds of batches have occurred


# ---- what interrupts a step ----


@dataclass
class Watch:
    """Events by step: recompilations, kernels that were compiled, and host waits by line."""

    step: int = 0
    recompiled: list[tuple[int, str]] = field(default_factory=list)
    kernels: list[tuple[int, str]] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)

    def emit(self, record: logging.LogRecord) -> None:
        lines = " ".join(record.getMessage().split())
        self.recompiled.append((self.step, lines[:300]))

    def compiled(self, *args: Any, **values: Any) -> None:
        self.kernels.append((self.step, str(getattr(values.get("fn"), "name", "?"))))

    def warned(self, message: Warning | str, category: Any, path: str, line: int, *_: Any) -> None:
        if "synchronizing" in str(message):
            place = Path(path)
            known = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place.name
            self.waits[f"{known}:{line}"] += self.step >= SETTLED


@contextmanager
def watching(device: torch.device) -> Iterator[Watch]:
    """Watch torch.compile, Triton and the host's waits."""
    import torch._dynamo  # noqa: F401 (its loggers exist then)

    watch, handler = Watch(), logging.Handler()
    handler.emit = watch.emit  # type: ignore[method-assign]
    torch._logging.set_logs(recompiles=True)
    logger = logging.getLogger("torch._dynamo.guards.__recompiles")
    logger.addHandler(handler)
    if device.type == "cuda":
        import triton

        triton.knobs.runtime.jit_post_compile_hook = watch.compiled
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing.*")
        warnings.showwarning = watch.warned  # type: ignore[assignment]
        try:
            yield watch
        finally:
            logger.removeHandler(handler)
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


# ---- the run ----


def configured(folder: Path, device: torch.device, smoke: bool) -> config.Run:
    """Return a run of train.py, and write its text and its tokenizer."""
    case = replace(loader.CASES["streamed"], items=4096, pairs=64)
    case = case.toy() if smoke else case
    (folder / "tokenizer").mkdir()
    tokenizer.save(loader.learnt(case), folder / "tokenizer", 512)
    run = cases.CASES["step"].run
    run = cases.CASES["step"].toy().run if smoke else run
    return replace(
        run, name="thirty", output_dir=str(folder), init="", tokenizer=str(folder / "tokenizer"),
        data=(), sources=(loader.written(case, folder / "text.jsonl"),), eval=(),
        loss=replace(run.loss, num_negatives=case.negatives), batch_size=case.pairs,
        steps=3 if smoke else STEPS, max_length=32 if smoke else 512, tracker="none", log_every=1,
        compile="off" if smoke else "on", precision="fp32" if smoke else "auto", epochs=0.0,
        device="cuda" if device.type == "cuda" else "cpu",
    )  # fmt: skip


def thirty(run: config.Run, device: torch.device) -> tuple[Watch, list[dict[str, float]]]:
    """Run all steps; return what was watched, and tokens and milliseconds of each step."""
    import train

    rows: list[dict[str, float]] = []
    where, folder = World(0, 1, device), Path(run.output_dir) / run.name
    folder.mkdir()
    out = log.Log(folder, True)
    job = train.set_up(run, where, folder, None, out)
    out.open(run.tracker, 0)
    step = train.one_step

    def timed(job: Any, number: int, feed: Any) -> Any:
        watch.step = number
        began = time.perf_counter()
        result = step(job, number, feed)
        # Between steps the loop itself decides whether it waits for the device.
        rows.append({"ms": (time.perf_counter() - began) * 1e3, "tokens": float(result.tokens)})
        return result

    def skip(job: Any, number: int) -> None:
        """Save nothing: a checkpoint of 0.6B is 7 GB."""

    changed: dict[str, Callable[..., Any]] = {"one_step": timed, "save": skip}
    before = {name: getattr(train, name) for name in changed}
    with watching(device) as watch, job.saver:
        try:
            for name, function in changed.items():
                setattr(train, name, function)
            train.optimise(job, 0)
        finally:
            for name, function in before.items():
                setattr(train, name, function)
    out.close()
    return watch, rows


def summary(watch: Watch, rows: list[dict[str, float]], settled: int) -> dict[str, Any]:
    """Return the numbers of a run; its rate is that of the steps after `settled`."""
    late = rows[settled:] or rows
    seconds = sum(row["ms"] for row in late) / 1e3
    timing = harness.summary([row["ms"] for row in late])
    return {
        "steps": len(rows),
        "ms": timing.ms,
        "p20": timing.p20,
        "p80": timing.p80,
        "tokens_s": sum(row["tokens"] for row in late) / seconds,
        "recompiled": watch.recompiled,
        "recompiled_late": [why for at, why in watch.recompiled if at >= settled],
        "kernels_late": [name for at, name in watch.kernels if at >= settled],
        "kernels": len(watch.kernels),
        "host_waits": dict(watch.waits.most_common(40)),
        "by_step": [round(row["ms"], 2) for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLEMBED_CACHE"] = folder
        watch, rows = thirty(configured(Path(folder), device, args.smoke), device)
    found = summary(watch, rows, 0 if args.smoke else SETTLED)
    late = len(found["recompiled_late"]), len(found["kernels_late"])
    waits = sum(found["host_waits"].values())
    counts = f"{late[0]} recompilations and {late[1]} kernels after step {SETTLED}"
    if args.smoke:
        print(f"training: {found['steps']} steps ran")
        return
    for kind, values in (("environment", environment(device)), ("training", found)):
        append(args.out, {"bench": "training", "kind": kind, **values})
    print(json.dumps({k: found[k] for k in ("recompiled_late", "kernels_late", "host_waits")}))
    each = waits / max(len(rows) - SETTLED, 1)
    print(f"training: {found['tokens_s']:.0f} tokens/s, {counts}, {each:.1f} host waits a step")
    sys.exit(0)


if __name__ == "__main__":
    main()
