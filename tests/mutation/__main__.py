"""Break the product on purpose, and list what no test notices: `make mutate SEED=1 N=20`.

Results are kept in .cache/mutation/results.jsonl as they come. A mutant whose file and tests are
those of an earlier result is not run again, so that an interrupted run goes on. Without N,
mutants that survive their tests' first minute have ten times as long.
"""

import argparse
import hashlib
import json
import math
import signal
import sys
import time
from collections import Counter
from typing import Any

from .child import Trial, prepare
from .named import EQUIVALENT, NAMED, named
from .operators import Mutant
from .parts import ROOT, choose, mutants_of, part_of, product, source, tests_of
from .parts import test_files as files_of_tests
from .runner import Runner

RESULTS = ROOT / ".cache/mutation/results.jsonl"
# CPU seconds of a mutant's tests.
BUDGETS = 60, 600


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutate", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="chooses the mutants")
    parser.add_argument("--n", type=int, help="how many of them, default all")
    parser.add_argument("--part", help="those of one part alone")
    parser.add_argument("--only", help="one mutant, by its name or id")
    parser.add_argument("--named", action="store_true", help="those with a name instead")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--again", action="store_true", help="run survivors again")
    args = parser.parse_args()
    chosen = select(args)
    if not chosen:
        parser.error(f"expected a mutant or a part that exists, got {args.only or args.part}")
    if args.list:
        for mutant in chosen:
            print(mutant.id, *mutant.lines(source(mutant.file)), sep="\n    ")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun, results = time.monotonic(), kept(chosen, args.again)

    def report(mutant: Mutant, verdict: dict[str, Any]) -> None:
        results[mutant.id] = record(mutant, verdict)
        with RESULTS.open("a", encoding="utf-8") as out:
            out.write(json.dumps(results[mutant.id]) + "\n")
        by = verdict["killer"] or f"{verdict['passed']} tests pass"
        print(f"{verdict['status']:9}{verdict['seconds']:6.0f} s  {mutant.id}  {by}", flush=True)

    for budget in BUDGETS[: 1 if args.n else 2]:
        left = [m for m in chosen if unfinished(m, results.get(m.id), budget)]
        print(f"{len(chosen)} mutants, {len(left)} to run, {budget} CPU s each", flush=True)
        if left:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            prepare()
            trials = [Trial(mutant, source(mutant.file), tests(mutant)) for mutant in left]
            Runner(report, budget).run(trials)
    print(f"{time.monotonic() - begun:.0f} s\n")
    return close(chosen, results)


def unfinished(mutant: Mutant, result: dict[str, Any] | None, budget: float) -> bool:
    """Return whether a mutant has no result, or survived less time than it has now."""
    if result is None:
        return True
    survived = result["status"] == "survived" and not reason(mutant)
    return survived and result["stopped"] < budget


def reason(mutant: Mutant) -> str | None:
    """Return why no test can see a mutant."""
    before, after = mutant.lines(source(mutant.file))
    return EQUIVALENT.get((mutant.file, mutant.function, before, after))


def select(args: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the arguments ask for."""
    if args.only in NAMED:
        return [named(args.only)]
    if args.only:
        files = [file for file in product() if file == args.only.partition(":")[0]]
        return [m for file in files for m in mutants_of(file)[0] if m.id == args.only]
    if args.named:
        return [named(name) for name in NAMED]
    chosen = [m for m in choose(args.seed) if args.part in (None, part_of(m.file))]
    return chosen[: args.n] if args.n else [*chosen, *([] if args.part else map(named, NAMED))]


def tests(mutant: Mutant) -> tuple[str, ...]:
    if mutant.function in NAMED:
        names = NAMED[mutant.function].tests
        by_name = {path.stem: str(path.relative_to(ROOT)) for path in files_of_tests()}
        files = tuple(by_name[name] for name in names if name in by_name)
    else:
        files = tests_of(mutant.file)
    if not files:
        raise ValueError(f"{mutant.id}: expected tests that watch it, got none")
    return files


def digest(files: list[str]) -> str:
    return hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()[:16]


def record(mutant: Mutant, verdict: dict[str, Any]) -> dict[str, Any]:
    """Return the line of results.jsonl: it holds as long as its files are the same."""
    killer = verdict["killer"].partition("::")[0]
    files = [mutant.file, *([killer] if killer else tests(mutant))]
    before, after = mutant.lines(source(mutant.file))
    return {
        "id": mutant.id,
        "part": part_of(mutant.file),
        "before": before,
        "after": after,
        **verdict,
        "files": files,
        "digest": digest(files),
    }


def kept(chosen: list[Mutant], again: bool) -> dict[str, dict[str, Any]]:
    """Return earlier results that still hold, by the mutant's id."""
    wanted = {mutant.id: mutant.lines(source(mutant.file)) for mutant in chosen}
    results = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []:
        old = json.loads(line)
        same = wanted.get(old["id"]) == (old["before"], old["after"])
        same = same and all((ROOT / file).is_file() for file in old["files"])
        if same and digest(old["files"]) == old["digest"]:
            results[old["id"]] = old
    if again:
        results = {id: old for id, old in results.items() if old["status"] != "survived"}
    return results


def close(chosen: list[Mutant], results: dict[str, dict[str, Any]]) -> int:
    """Print counts by part and every survivor; return 1 if one of them has no explanation."""
    counts, unexplained = Counter(), 0
    for mutant in chosen:
        result = results[mutant.id]
        status = result["status"]
        if status == "survived" and reason(mutant):
            status = "equivalent"
        counts[result["part"], status] += 1
        if status == "survived":
            unexplained += 1
            print(f"survived: {mutant.id}, line {mutant.line(source(mutant.file))}")
            print(f"  - {result['before']}\n  + {result['after']}")
            ran = "all" if result["stopped"] == math.inf else f"in {result['stopped']:.0f} CPU s"
            print(f"  {result['passed']} tests pass, {ran} of {' '.join(tests(mutant))}")
            print(f"  longer: make mutate ONLY={mutant.id}\n")
    columns = ("killed", "timeout", "survived", "equivalent")
    print(f"{'part':20}" + "".join(f"{name:>12}" for name in (*columns, "needs CUDA")))
    for part in sorted({part for part, _ in counts}):
        row = [counts[part, name] for name in columns]
        cuda = sum(len(mutants_of(f)[1]) for f in product() if part_of(f) == part)
        print(f"{part:20}" + "".join(f"{n:12}" for n in (*row, cuda)))
    total = [sum(n for (_, name), n in counts.items() if name == column) for column in columns]
    print(f"{'all':20}" + "".join(f"{n:12}" for n in total))
    return min(unexplained, 1)


if __name__ == "__main__":
    sys.exit(main())
