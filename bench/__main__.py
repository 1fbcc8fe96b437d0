"""python -m bench NAME... | all: check kernels, then time them next to other implementations.

The gate and the kernel's tests come first. If they fail, times are still taken, marked
`"green": false`, and no speed-up is printed. Every measurement is appended to bench/results/ at
once. The last line of stdout is one JSON object. Times of kernels need a CUDA device; --smoke runs
every line on toy shapes anywhere, prints no times and writes no file.
"""

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from . import ROOT, named, report
from .children import end, start
from .records import Kept, append, earlier, key, results_file

NAMES = "infonce", "attention", "embed", "train_step", "gradcache", "encode", "loader"
COMMANDS = {
    "audit": "bench.compiled.audit",
    "compile": "bench.compiled.precompile",
    "gpu": "bench.gpu.command",
    "compare": "bench.compare",
    "proof": "bench.proof.command",
    "integrations": "bench.integrations.command",
    "students": "bench.proof.students",
}
BROKEN = 70  # as in worker.py, which imports torch
TESTS_SHARE = 0.25  # of the time, at most
LEAST = 15.0  # seconds: with less left, no case begins
WORKER = [sys.executable, "-m", "bench.worker"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


class Run:
    """One bench: runs its worker, and collects the records in memory and in a file."""

    def __init__(self, name: str, args: argparse.Namespace, deadline: float) -> None:
        self.name, self.args, self.deadline = name, args, deadline
        self.bench: ModuleType = named(name)
        self.records: list[dict[str, Any]] = []
        self.path: Path | None = None
        self.environment: dict[str, Any] = {}
        self.green = True
        self.finished = True
        self.printing: str | None = None  # the case whose table is printed when the next begins
        self.kept = Kept([], {}, [])
        if args.part == "cases" and not args.smoke:
            self.kept = earlier(args.out, name)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def add(self, record: dict[str, Any]) -> None:
        if record["kind"] == "begin":
            if self.printing not in (None, record["case"]):
                self.print_case(self.printing)
                self.printing = record["case"]
            return
        if record["kind"] == "environment":
            if record == self.environment:
                return
            self.environment = record
            if not self.args.smoke:
                self.path = self.path or results_file(self.args.out, record["gpu"], self.name)
        self.records.append(record)
        if self.path is not None:
            append(self.path, {"bench": self.name, **record})

    # ---- the worker ----

    def stage(self, stages: list[str], *options: str) -> bool:
        """Run stages to their end. If the worker dies, start it again without what is finished."""
        began, skip = time.monotonic(), list(self.kept.rows)
        while True:
            before = len(self.records)
            status, begun = self.worker([*stages, *options, "--skip", *skip])
            if begun is not None:
                kind = "sweep" if "config" in begun else "row"
                ended = "failed", f"died, exit status {status}"
                if self.left() < 2:
                    ended = "skipped", "no time was left"
                self.add({**begun, "kind": kind, "status": ended[0], "note": ended[1]})
            skip += [key(record) for record in self.records[before:] if key(record)]
            again = (status == BROKEN or begun is not None) and self.left() > 20
            if status == 0 or not again or len(self.records) == before:
                break
        seconds = {} if self.args.smoke else {"seconds": round(time.monotonic() - began, 1)}
        self.add({"kind": "stage", "stages": stages, "done": status == 0, **seconds})
        return status == 0

    def worker(self, arguments: list[str]) -> tuple[int, dict[str, Any] | None]:
        """Return the exit status, and the measurement that began and did not end."""
        command = [*WORKER, self.name, *arguments]
        command += ["--seconds", f"{max(self.left() - 5, 0):.0f}"]
        command += [f"--model={self.args.model}"] * bool(self.args.model)
        command += ["--smoke"] * self.args.smoke + ["--red"] * (not self.green)
        begun = None
        with start(command, stdout=subprocess.PIPE) as process:
            timer = threading.Timer(max(self.left(), 1), end, [process])
            timer.start()
            try:
                for record in records(process):
                    begun = record if record["kind"] == "begin" else None
                    self.add(record)
                process.wait()
            finally:
                timer.cancel()
                end(process)
        return process.returncode, begun

    # ---- stages ----

    def check(self) -> None:
        """Run the gate of the bench, then the kernel's tests."""
        done = self.stage(["gate"])
        verdicts = self.of("gate")
        self.green = done and bool(verdicts) and all(record["ok"] for record in verdicts)
        if self.path is None:  # the worker printed the reason
            self.finished = False
            return
        print(report.gate(verdicts) if done else "gate: RED, it did not finish", flush=True)
        if not self.args.skip_tests and self.args.part is None:
            self.tests()

    def tests(self) -> None:
        """Run the kernel's tests, if pytest is installed; a toy run only collects them.

        On a GPU they compile for every shape. If that takes longer than TESTS_SHARE, the gate
        decides alone, and the result says so.
        """
        files = [
            path.relative_to(ROOT).as_posix()
            for pattern in getattr(self.bench, "TESTS", ())
            for path in ROOT.glob(f"tests/kernels/{pattern}")
            if path.name.startswith("test_")
        ]
        if importlib.util.find_spec("pytest") is None or not files:
            self.add({"kind": "tests", "ok": None, "note": "pytest or the tests are missing"})
            return
        if self.environment.get("gpu") is None and not self.args.smoke:
            self.add({"kind": "tests", "ok": None, "note": "the kernels' tests need a GPU"})
            return
        command = [sys.executable, "-m", "pytest", "-p", "bench", "-q", "-p", "no:cacheprovider"]
        command += ["--collect-only"] * self.args.smoke
        if importlib.util.find_spec("xdist") is not None and not self.args.smoke:
            command += ["-n", "8", "--dist", "worksteal"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = start([*command, *sorted(files)], **pipes)
        seconds = max(TESTS_SHARE * self.left(), 1)
        try:
            lines = process.communicate(timeout=seconds)[0].strip().splitlines() or ["silent"]
        except subprocess.TimeoutExpired:
            note = f"not finished in {seconds:.0f} s: the gate decides alone"
            self.add({"kind": "tests", "ok": None, "note": note})
            print(f"tests: {note}", flush=True)
            return
        finally:
            end(process)
        ok = process.returncode == 0
        self.green &= ok
        note = re.sub(r" in [\d.]+s.*", "", lines[-1])
        failures = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
        self.add({"kind": "tests", "ok": ok, "note": note, "failures": failures[:20]})
        how = "RED" if not ok else "collected" if self.args.smoke else "green"
        print(f"tests: {how}, {note}", *failures[:5], sep="\n  ", flush=True)

    def check_kept(self) -> None:
        """Take the gate's verdict and the finished rows from the results of the same sources."""
        verdicts = self.kept.gate
        self.green = bool(verdicts) and all(record["ok"] for record in verdicts)
        print(report.gate(verdicts) if verdicts else "gate: RED, it was not run for these sources")
        self.records += [*self.kept.others, *self.kept.rows.values()]

    def cases(self, names: list[str]) -> None:
        """Run the cases in one worker, which loads torch and measures the ceilings once."""
        if self.left() >= LEAST and (todo := [name for name in names if self.unfinished(name)]):
            self.printing = todo[0]
            self.finished &= self.stage(todo)
            if self.printing is not None:
                self.print_case(self.printing)
            self.printing = None
        for name in names:
            if not any(row["case"] == name for row in self.of("row")):
                at = {"case": name, "provider": "ours", "mode": self.bench.CASES[name].modes[0]}
                self.add({"kind": "row", **at, "status": "skipped", "note": "no time was left"})

    def unfinished(self, name: str) -> bool:
        case = self.bench.CASES[name]
        keys = (f"{name}:{who}:{mode}" for who in case.providers for mode in case.modes)
        return any(key not in self.kept.rows for key in keys)

    def print_case(self, name: str) -> None:
        rows = [row for row in self.of("row") if row["case"] == name]
        case, ceilings = self.bench.CASES[name], self.of("ceilings")
        print(f"\n{self.name}: {name}: {case.about}")
        limits = (ceilings[-1]["tflops"], ceilings[-1]["gbs"]) if ceilings else None
        if limits is not None:
            print("ceilings: matmul {:.3g} TFLOP/s, copy {:.3g} GB/s".format(*limits))
        columns = getattr(self.bench, "COLUMNS", report.COLUMNS)
        cells = getattr(self.bench, "cells", report.cells)
        for mode in case.modes:
            floors = None if limits is None else case.floors(mode, *limits)
            lines = report.table(rows, mode, floors, self.bench.BASELINES, columns, cells)
            print(lines, flush=True)
        for record in self.of("kernels"):
            if record["case"] == name:
                print(report.kernels(record), flush=True)
        for record in self.of("stages"):
            if record["case"] == name:
                whole = report.ms_of(rows, name, case.modes[0], "ours")
                print(report.stages(record, whole), flush=True)

    def smoke(self, names: list[str]) -> None:
        """Run everything once, in one process, without numbers."""
        part = self.args.part
        stages = {"gate": ["gate"], "cases": names}.get(part, ["gate", *names, "sweep"])
        self.finished = self.stage(["sweep"] if self.args.sweep else stages)
        if "gate" in stages and not self.args.sweep:
            verdicts = self.of("gate")
            self.green = bool(verdicts) and all(record["ok"] for record in verdicts)
            print(report.gate(verdicts))
        if not self.args.skip_tests and part is None and not self.args.sweep:
            self.tests()
        groups: dict[str, list[str]] = {}
        for record in self.of("row") + self.of("kernels") + self.of("stages") + self.of("sweep"):
            what = record.get("provider") or record["kernel"]
            by = {"kernels": "by kernel", "stages": "by stage"}
            what += f" {by.get(record['kind'], record.get('mode', ''))}"
            note = f" ({record['note']})" if record["status"] == "failed" else ""
            group = f"{self.name} {record['kind']} {record['case']}: {record['status']}{note}"
            groups.setdefault(group, []).append(what)
        for group, members in groups.items():
            print(f"{group}: {', '.join(dict.fromkeys(members))}")

    def measure(self, names: list[str]) -> None:
        if self.args.part == "cases":
            self.check_kept()
        else:
            self.check()
            if self.path is None:
                return
            if self.args.part == "gate":
                self.finished = self.of("stage")[-1]["done"]
                return
        if self.args.sweep and not hasattr(self.bench, "SWEEP"):
            print(f"{self.name}: nothing to sweep", flush=True)
            return
        if self.args.sweep:
            for case in names if self.args.case else [self.bench.SWEEP_CASE]:
                self.finished &= self.stage(["sweep"], "--case", case)
            print(report.sweep(self.of("sweep")), flush=True)
            return
        self.cases(names)
        for target in self.bench.targets(self.of("row")):
            met = "met" if target["met"] else "missed"
            print(f"{target['target']}: {target['value']:.3f} ({target['limit']}: {met})")
            self.add({"kind": "target", **target})

    def result(self) -> dict[str, Any]:
        """Return medians and targets, short enough for the end of a log."""

        def bare(record: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in record.items() if name != "kind"}

        rows = self.of("row")
        failed = [row for row in rows + self.of("sweep") if row["status"] == "failed"]
        skipped = any(row["status"] == "skipped" for row in rows + self.of("sweep"))
        return {
            "green": self.green,
            "finished": self.finished and not skipped,
            "environment": bare(self.environment),
            "ceilings": bare((self.of("ceilings") or [{}])[-1]),
            "ran" if self.args.smoke else "ms": report.compact(rows),
            "failed": {key(row): row["note"] for row in failed},
            "targets": list(map(bare, self.of("target"))),
            "file": None if self.path is None else self.path.name,
        }


def records(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield the worker's records; other lines, which libraries print, go to stderr."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"kind": '):
            yield json.loads(line)
        else:
            sys.stderr.write(line)


def wrong(what: str, known: tuple[str, ...], got: str) -> NoReturn:
    print(f"error: {what}: expected one of {', '.join(known)}, got {got!r}", file=sys.stderr)
    sys.exit(2)


def model_of(args: argparse.Namespace) -> str:
    """Take MODEL=DIR from the names or cases, and return the absolute path, "" without one."""
    given = [name for name in (*args.names, *args.case) if name.startswith("MODEL=")]
    args.names = [name for name in args.names if name not in given]
    args.case = [name for name in args.case if name not in given]
    if not given:
        return ""
    path = Path(given[-1].removeprefix("MODEL="))
    if not path.is_dir():
        print(f"error: MODEL: expected a directory, got {str(path)!r}", file=sys.stderr)
        sys.exit(2)
    return str(path.absolute())


def chosen(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the cases of each bench, in the order of NAMES."""
    for name in args.names:
        if name not in (*NAMES, "all"):
            wrong("bench", (*NAMES, "all"), name)
    names = NAMES if "all" in args.names else tuple(n for n in NAMES if n in args.names)
    cases = {name: tuple(named(name).CASES) for name in names}
    known = tuple(case for of_one in cases.values() for case in of_one)
    for case in args.case:
        if case not in known:
            wrong("--case", known, case)
    if args.model:
        takes = {n: tuple(c for c in of if hasattr(named(n).CASES[c], "model"))
                 for n, of in cases.items()}  # fmt: skip
        if not any(not args.case or c in args.case for of in takes.values() for c in of):
            of = ", ".join(args.case or names)
            print(f"error: MODEL: no case of {of} takes a model", file=sys.stderr)
            sys.exit(2)
        cases = takes
    return {n: [c for c in of if not args.case or c in args.case] for n, of in cases.items()}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return importlib.import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:])
    parser = Parser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} or all, and MODEL=DIR"
    )
    parser.add_argument("--list", action="store_true", help="benches and their cases")
    parser.add_argument("--case", nargs="+", default=[], help="only these")
    parser.add_argument("--seconds", type=float, default=530.0, help="for all benches together")
    parser.add_argument(
        "--part", choices=("gate", "cases"),
        help="gate: nothing else. cases: take the gate's verdict and finished rows from --out",
    )  # fmt: skip
    parser.add_argument("--skip-tests", action="store_true", help="run the gate, but not pytest")
    parser.add_argument("--sweep", action="store_true", help="time launch configurations instead")
    parser.add_argument("--smoke", action="store_true", help="toy shapes, no times, any device")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench/results", help="folder, or a .jsonl, of results"
    )
    args = parser.parse_intermixed_args()
    args.model = model_of(args)
    if args.list:
        args.names, args.case = args.names or ["all"], []
        for name, cases in chosen(args).items():
            print(f"{name}: {', '.join(cases)}")
        return
    if not args.names:
        parser.error(f"expected a bench: {', '.join(NAMES)} or all")
    todo = chosen(args)
    began, results = time.monotonic(), {}
    for at, (name, cases) in enumerate(todo.items(), 1):
        # Benches share the time equally; the next ones get what one does not use.
        left = args.seconds - (time.monotonic() - began)
        run = Run(name, args, time.monotonic() + left / (len(todo) - at + 1))
        (run.smoke if args.smoke else run.measure)(cases)
        results[name] = run.result()
    good = all(
        r["green"] and r["finished"] and not (args.smoke and r["failed"]) for r in results.values()
    )
    print(json.dumps({"smoke": args.smoke, "ok": good, "benches": results}), flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
