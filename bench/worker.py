"""Measures in a process of its own, and prints every result at once, as one line of JSON.

`python -m bench` starts it. A kernel that reads memory it may not read ends this process, and only
the measurement that was under way is lost.
"""

import argparse
import gc
import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from . import harness, named
from .environment import environment
from .harness import Leaves, Missing, reason

Config = dict[str, int | None]
BROKEN = 70  # exit status after an error of the device
MS = 1000.0  # of repeats for each measurement
RESERVE = 10  # seconds: with less left, no measurement begins


def say(kind: str, **values: Any) -> None:
    print(json.dumps({"kind": kind, **plain(values)}, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by text."""
    if isinstance(value, dict):
        return {key: plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Worker:
    """The stages of one bench on one device."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.bench = named(args.name)
        self.repeats = getattr(self.bench, "REPEATS", 5)
        self.device, self.smoke, self.green = device, args.smoke, not args.red
        self.skip, self.model = set(args.skip), args.model
        self.end = time.monotonic() + args.seconds
        self.ceilings: dict[str, float] = {}

    def run(self, stages: list[str], case: str | None) -> None:
        say("environment", **environment(self.device))
        if stages != ["gate"] and not hasattr(self.bench, "rows"):
            ceilings = harness.ceilings(self.device, self.smoke)
            self.ceilings = {} if self.smoke else ceilings
            say("ceilings", **self.ceilings)
        for stage in stages:
            if stage == "gate":
                for verdict in self.bench.gate(self.device, self.smoke):
                    self.green &= verdict["ok"]
                    say("gate", **verdict)
            elif stage == "sweep":
                self.sweep(case)
            else:
                self.case(stage)

    def alive(self) -> None:
        """Exit if the device is broken; the parent starts the worker again.

        After an illegal memory access every CUDA call fails.
        """
        try:
            harness.synchronize(self.device)
        except RuntimeError:
            sys.exit(BROKEN)

    def sets(self, case: Any) -> list[Leaves]:
        """Return enough sets of inputs to exceed the L2; two in a toy run."""
        first = case.inputs(self.device, 0)
        count = harness.sets_needed(first.nbytes(), harness.l2_bytes(self.device))
        count = 2 if self.smoke else count
        return [first, *(case.inputs(self.device, i) for i in range(1, count))]

    def shaped(self, name: str) -> Any:
        case = self.bench.CASES[name]
        case = case.toy() if self.smoke else case
        return replace(case, model=self.model) if self.model else case

    # ---- providers ----

    def case(self, name: str) -> None:
        if "torch._dynamo" in sys.modules:
            # What is compiled for a function is limited, and cases compile the same functions.
            torch.compiler.reset()
        case = self.shaped(name)
        if case.device not in ("", self.device.type) and not self.smoke:
            at = {"case": name, "provider": "ours", "mode": case.modes[0]}
            say("row", **at, status="absent", note=f"its times need the device {case.device}")
            return
        if hasattr(self.bench, "rows"):
            for kind, record in self.bench.rows(case, self.device, self.end, self.skip):
                say(kind, **({"green": self.green} if "value" in record else {}), **record)
            return
        if hasattr(case, "rows"):
            end, tflops = self.end - RESERVE, self.ceilings.get("tflops")
            for row in case.rows(end, self.skip, tflops):
                say("row", **({"green": self.green} if "value" in row else {}), **row)
            return
        sets: list[Leaves] = []
        for provider in case.providers:
            modes = [m for m in case.modes if f"{name}:{provider}:{m}" not in self.skip]
            if not modes:
                continue
            at = {"case": name, "provider": provider}
            if time.monotonic() > self.end - RESERVE:
                for mode in modes:
                    say("row", **at, mode=mode, status="skipped", note="no time was left")
                continue
            sets = sets or self.sets(case)
            self.provider(case, sets, modes, at)
            for inputs in sets:
                inputs.clear()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def provider(self, case: Any, sets: list[Leaves], modes: list[str], at: dict[str, str]) -> None:
        built = None
        for mode in modes:
            say("begin", **at, mode=mode)
            try:
                built = built or self.bench.build(at["provider"], case, sets[0], self.smoke)
                step, note = built
                row = self.row(case, step, sets, mode, at["provider"])
                say("row", **at, mode=mode, status="ran", note=note, **row)
            except Missing as missing:
                say("row", **at, mode=mode, status="absent", note=str(missing))
            except Exception as error:
                say("row", **at, mode=mode, status="failed", note=reason(error))
                self.alive()
        if at["provider"] == "ours" and at["case"] in getattr(self.bench, "BREAKDOWN", ()):
            self.breakdown(case, built, sets, at)

    def row(
        self, case: Any, step: harness.Step, sets: list[Leaves], mode: str, provider: str
    ) -> dict[str, Any]:
        call = harness.rotating(step, sets, mode)
        got = call(0)
        row: dict[str, Any] = {"value": None if got is None else harness.size_of(got)}
        if provider in getattr(self.bench, "OURS", ("ours",)):
            if (spot := self.bench.spot(case, sets[0], mode, got)) is not None:
                row["spot"] = spot
                self.green &= spot["ok"]
            row["green"] = self.green
        del got
        budget = (0.0, 1) if self.smoke else (MS, self.repeats)
        timing = harness.measure(call, self.device, *budget)
        if hasattr(self.bench, "numbers"):
            numbers = self.bench.numbers(case, step, sets[0], timing.ms)
        else:
            peak = harness.peak_bytes(call, sets, self.device)
            numbers = {"peak_mib": None if peak is None else peak / 2**20}
        if self.smoke:
            return row
        tflops = case.flops(mode) / timing.ms / 1e9
        gbs = case.nbytes(mode) / timing.ms / 1e6
        row |= {**asdict(timing), **numbers, "tflops": tflops, "gbs": gbs, "sets": len(sets)}
        row["share"] = tflops / self.ceilings["tflops"]
        return row | {"copy_share": gbs / self.ceilings["gbs"]}

    def breakdown(self, case: Any, built: Any, sets: list[Leaves], at: dict[str, str]) -> None:
        """Profile ours, forward and backward, by kernel and, if the bench has stages, by stage."""
        say("begin", **at, mode="by kernel")
        try:
            step, _ = built or self.bench.build("ours", case, sets[0], self.smoke)
            call, repeats = harness.rotating(step, sets, harness.TRAIN), 1 if self.smoke else 3
            kernels = harness.kernel_times(call, self.device, repeats)
        except Exception as error:
            say("kernels", **at, status="failed", note=reason(error))
            self.alive()
            return
        total = sum(kernel["ms"] for kernel in kernels)
        numbers = {} if self.smoke else {"total_ms": total, "top": kernels[:12]}
        say("kernels", **at, status="ran", green=self.green, count=len(kernels), **numbers)
        if hasattr(self.bench, "stages"):
            self.stages(case, step, sets[0], at)

    def stages(self, case: Any, step: harness.Step, inputs: Any, at: dict[str, str]) -> None:
        say("begin", **at, mode="by stage")
        try:
            stages = self.bench.stages(case, step, inputs, self.ceilings)
        except Exception as error:
            say("stages", **at, status="failed", note=reason(error))
            self.alive()
            return
        say("stages", **at, status="ran", green=self.green, **({} if self.smoke else stages))

    # ---- launch configurations ----

    def sweep(self, name: str | None) -> None:
        """Time the launch configurations of every kernel that the case launches."""
        if not hasattr(self.bench, "SWEEP"):
            return
        name = name or str(self.bench.SWEEP_CASE)
        case = self.shaped(name)
        sets = self.sets(case)
        step, _ = self.bench.build("ours", case, sets[0], self.smoke)
        masters = getattr(case, "masters", False)  # fp32 factors, bf16 products
        wide = sets[0].stacked[0].dtype == torch.float32 and not masters
        table_name = "CONFIGS_FP32" if wide else "CONFIGS"
        for module_name, mode in self.bench.SWEEP.items():
            at = {"case": name, "mode": mode}
            try:
                module = importlib.import_module(f"mlembed_kernels.{module_name}")
                seen = Seen(getattr(module, table_name))
                setattr(module, table_name, seen)
                harness.rotating(step, sets, mode)(0)
            except Exception as error:
                say("sweep", **at, kernel=module_name, status="failed", note=reason(error))
                self.alive()
                continue
            for kernel in sorted(seen.names)[: 1 if self.smoke else None]:
                self.sweep_kernel(seen, kernel, step, sets, at)

    def sweep_kernel(
        self,
        table: dict[str, Config],
        kernel: str,
        step: harness.Step,
        sets: list[Leaves],
        at: dict[str, str],
    ) -> None:
        """Time the present entry, then each candidate in its place, and restore the entry."""
        present = table[kernel]
        budget = (0.0, 1) if self.smoke else (MS / 4, 5)
        call = harness.rotating(step, sets, at["mode"])
        present_digest: tuple[float, ...] | None = None
        try:
            for config in candidates(self.bench.CANDIDATES, kernel, present, self.smoke):
                labels = {**at, "kernel": kernel, "config": config}
                if f"sweep:{kernel}:{json.dumps(config)}" in self.skip:
                    continue
                if time.monotonic() > self.end - RESERVE:
                    say("sweep", **labels, status="skipped", note="no time was left")
                    continue
                say("begin", **labels)
                table[kernel] = config
                try:
                    got = digest(harness.size_of(call(0)), sets[0])
                    present_digest = got if config == present else present_digest
                    right = None if present_digest is None else agree(got, present_digest)
                    note = None if present_digest else "unchecked: the present entry did not run"
                    timing = harness.measure(call, self.device, *budget)
                    times = {} if self.smoke else asdict(timing)
                    say("sweep", **labels, status="ran", right=right, note=note, **times)
                except Exception as error:
                    say("sweep", **labels, status="failed", note=reason(error))
                    self.alive()
        finally:
            table[kernel] = present


class Seen(dict[str, Config]):
    """A copy of a table of configurations that records which entries are read."""

    def __init__(self, table: dict[str, Config]) -> None:
        super().__init__(table)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Config:
        self.names.add(name)
        return super().__getitem__(name)


def candidates(
    listed: dict[str, list[Config]], kernel: str, present: Config, smoke: bool
) -> Iterator[Config]:
    """Yield the present entry, then the candidates listed for the kernel.

    A name stands for all kernels `name_...`; the longest counts. Options that a candidate does not
    name are those of the present entry, and None removes one. A kernel that is not listed gets
    other warps and stages.
    """
    names = [name for name in listed if kernel == name or kernel.startswith(f"{name}_")]
    if names:
        others = listed[max(names, key=len)]
    else:
        both = itertools.product((4, 8), (2, 3, 4))
        others = [{"num_warps": warps, "num_stages": stages} for warps, stages in both]
    yield present
    merged = [{**present, **other} for other in others]
    merged = [{k: v for k, v in config.items() if v is not None} for config in merged]
    merged = [c for i, c in enumerate(merged) if c != present and c not in merged[:i]]
    yield from merged[:1] if smoke else merged


def digest(value: float, inputs: Leaves) -> tuple[float, ...]:
    """Return the value and the norms of the gradients, which tell one result from another."""
    lengths = [x.grad.float().norm().item() for x in inputs.stacked if x.grad is not None]
    return value, *lengths


def agree(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= 1e-3 * abs(y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("stages", nargs="+", help="gate, sweep, or a case")
    parser.add_argument("--case", help="of the sweep")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--skip", nargs="*", default=[], help="finished: case:provider:mode")
    parser.add_argument("--model", default="", help="of the cases that take one: a directory")
    parser.add_argument("--red", action="store_true", help="the kernel's tests failed")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    devices = getattr(named(args.name), "DEVICES", ("cuda",))
    kind = "cuda" if cuda and "cuda" in devices else "cpu"
    if kind not in devices and not args.smoke:
        sys.exit("error: no CUDA device: times need one, --smoke runs anywhere")
    torch.manual_seed(0)
    Worker(args, torch.device(kind)).run(args.stages, args.case)


if __name__ == "__main__":
    main()
