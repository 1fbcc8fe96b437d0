"""Compare two versions of the code, number by number, on this machine.

    python tests/golden.py                  the working tree against BASE
    python tests/golden.py --base v0.1.0    against another commit

Both versions train, encode and export with the same options, side by side, one thread each. Every
logged loss, gradient norm and learning rate, every vector and every exported weight must have the
same bits. It takes a minute and a half on two CPU cores. Exit status 1: a difference, named by its
place and both values, or a command that failed.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# The last commit before files moved into sub-packages, which must not change a number.
BASE = "9241bf5660f136b25a2b6675d946e3d671dba582"

STEPS = 20
RUN = ["--steps", STEPS, "--log-every", 1, "--eval", "--tracker", "none", "--device", "cpu"]
# The activation budget is given, because a probe of free memory differs from run to run. It is
# so small that some packs keep their graphs and others are encoded again.
DISTILLED = ["--batch-size", 64, "--gradient-cache", "--activation-gib", 0.02]
DISTILLED += ["--pack-tokens", 256]
DISTILLED += ["--depth.exits", 1, 2, 4, "--depth.shares", 0.3, 0.3, 0.4]
DISTILLED += ["--depth.layer-dropout", 0.2, "--distill.features", 1, "--distill.logits", 1]
DISTILLED += ["--distill.exits", "all", "--distill.align", "projection"]
DISTILLED += ["--distill.between-exits", 0.5]
TIMES = {"tokens_per_second", "stage_ms"}

PROBES = ["Wednesday, May 4, 2050", "٤ مايو ٢٠٥٠، الأربعاء", "2050年5月4日 水曜日 " * 40]
# (dim, exit, rank) of tiny, None for the full one; the last lies between the trained sizes.
SIZES = [(None, None, None), (96, 2, 64), (12, 1, 32), (100, 3, 48)]
CUT = ["--dim", 96, "--exit", 2, "--rank", 64]


@dataclass(frozen=True)
class Version:
    """One version of the code, and the folder that its commands write to."""

    source: Path
    work: Path

    def command(self, name: str) -> list[Any]:
        """Return the first words of `mlembed NAME`, which was a module of its own once."""
        if (self.source / "mlembed" / "__main__.py").exists():
            return ["-m", "mlembed", name]
        return ["-m", f"mlembed.{name}"]

    def environment(self) -> dict[str, str]:
        """Return variables that make Python import this version, with a cache of its own."""
        path = os.pathsep.join([str(self.work / "path"), str(self.source)])
        ours = {"PYTHONPATH": path, "MLEMBED_CACHE": str(self.work / "cache")}
        return {**os.environ, **ours, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def version(source: Path, work: Path) -> Version:
    """Prepare `work`, and check that Python imports both packages from `source`.

    Raises:
        ValueError: a package would be imported from elsewhere, so the comparison would be void.
    """
    (work / "path").mkdir(parents=True)
    (work / "path" / "mlembed_kernels").symlink_to(source / "kernels")
    made = Version(source, work)
    for package, folder in {"mlembed": "mlembed", "mlembed_kernels": "kernels"}.items():
        code = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
        words = [sys.executable, "-c", code]
        found = subprocess.check_output(words, cwd=source, env=made.environment(), text=True)
        origin = Path(found.strip()).resolve()
        if origin.parent != source / folder:
            raise ValueError(f"{package}: expected it in {source / folder}, got {origin}")
    return made


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check out `commit` in `folder`, and remove the worktree at the end.

    Raises:
        ValueError: `commit` is not in this repository (a shallow clone lacks older ones).
    """
    git = ["git", "-C", str(ROOT), "worktree"]
    done = subprocess.run([*git, "add", "--detach", folder, commit], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--base: expected a commit, got {commit}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", folder], check=False)


def run(versions: list[Version], words: Callable[[Version], list[Any]]) -> None:
    """Run `python WORDS` in all versions at the same time, and wait.

    Raises:
        ValueError: a command failed, with the end of its output.
    """
    processes = []
    try:
        for one in versions:
            with (one.work / "output").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, words(one))],
                        cwd=one.source,
                        env=one.environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                )
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for one, code in zip(versions, codes, strict=True):
        if code:
            end = (one.work / "output").read_text(errors="replace")[-2000:]
            command = " ".join(["python", *map(str, words(one))])
            raise ValueError(f"{one.source}: {command}: exit status {code}\n{end}")


# ---- comparisons: each returns (what is equal, the first difference or "") ----

Result = tuple[str, str]


def compare_traces(name: str, versions: list[Version]) -> Result:
    """Compare all that a run logged, but for times."""
    old, new = (trace(one.work / "runs" / name / "metrics.jsonl") for one in versions)
    equal = f"{len(new)} lines equal"
    if not len(old) == len(new) == STEPS:
        return equal, f"expected {STEPS} lines, got {len(old)} and {len(new)}"
    for before, after in zip(old, new, strict=True):
        if difference := first_difference(before, after):
            return equal, f"step {before['step']}, {difference}"
    return equal, ""


def trace(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file: values by their keys joined with dots, without times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [dict(flat({k: v for k, v in line.items() if k not in TIMES})) for line in lines]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their keys joined with dots."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return "KEY: VALUE before, VALUE now" of the first key that differs, "" if there is none.

    repr tells all floats apart, -0.0 from 0.0 too, and finds NaN equal to NaN.
    """
    for key in [*before, *(key for key in after if key not in before)]:
        a, b = (repr(each[key]) if key in each else "missing" for each in (before, after))
        if a != b:
            return f"{key}: {a} before, {b} now"
    return ""


def compare_vectors(file: str, versions: list[Version]) -> Result:
    """Compare two .npy files byte by byte."""
    paths = [one.work / file for one in versions]
    old, new = map(np.load, paths)
    equal = f"{' x '.join(map(str, new.shape))} {new.dtype} equal"
    if old.shape != new.shape or old.dtype != new.dtype:
        return equal, f"{old.shape} {old.dtype} before, {new.shape} {new.dtype} now"
    if paths[0].read_bytes() == paths[1].read_bytes():
        return equal, ""
    # Compared as bytes, because NaN differs from itself.
    bytes_before, bytes_now = (x.view(np.uint8).reshape(*x.shape, -1) for x in (old, new))
    places = np.argwhere((bytes_before != bytes_now).any(-1))
    if not len(places):
        return equal, "the files' headers differ"
    row, column = map(int, places[0])
    a, b = old[row, column], new[row, column]
    return equal, f"text {row}, coordinate {column}: {a} before, {b} now"


def compare_exports(folder: str, versions: list[Version]) -> Result:
    """Compare the names of all files, and the contents of weights."""
    old, new = (listing(one.work / folder) for one in versions)
    weights = sum(digest != "" for digest in new.values())
    equal = f"{len(new)} files, {weights} of them weights, equal"
    for a, b in zip_longest(old, new):
        if a != b:
            return equal, f"files: {a} before, {b} now"
    difference = first_difference(old, new)
    return equal, f"SHA-256 of {difference}" if difference else ""


def listing(folder: Path) -> dict[str, str]:
    """Return all files below `folder`, sorted; SHA-256 of safetensors, "" for other files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".safetensors"
        else ""
        for path in files
    }


# ---- the record ----


def record(versions: list[Version]) -> Iterator[tuple[str, Result]]:
    """Run everything, and yield each comparison with its name."""

    def train(*words: Any) -> Callable[[Version], list[Any]]:
        return lambda one: ["train.py", "tiny", *RUN, "--output-dir", one.work / "runs", *words]

    run(versions, train())
    yield f"tiny, {STEPS} steps", compare_traces("tiny", versions)

    def distilled(one: Version) -> list[Any]:
        teacher = one.work / "runs" / "tiny" / "model"
        return train("--name", "distilled", "--distill.teacher", teacher, *DISTILLED)(one)

    run(versions, distilled)
    name = f"distilled, layer-skip, gradient cache, {STEPS} steps"
    yield name, compare_traces("distilled", versions)

    for number, size in enumerate(SIZES):
        given = {k: v for k, v in zip(("dim", "exit", "rank"), size, strict=True) if v}
        file = f"vectors-{number}.npy"
        words = [word for k, v in given.items() for word in (f"--{k}", v)]
        run(versions, encoding(file, words))
        name = ", ".join(f"{k} {v}" for k, v in given.items()) or "full size"
        yield f"vectors, {name}", compare_vectors(file, versions)

    yield "export at full size", compare_exports("runs/tiny/model", versions)
    run(versions, lambda v: [*v.command("export"), v.work / "runs/tiny", v.work / "cut", *CUT])
    yield "export of a cut", compare_exports("cut", versions)


def encoding(file: str, words: list[Any]) -> Callable[[Version], list[Any]]:
    """Return the command that encodes PROBES to `file`."""

    def command(one: Version) -> list[Any]:
        out = ["--out", one.work / file, "--device", "cpu"]
        return [*one.command("encode"), one.work / "runs/tiny", *PROBES, *words, *out]

    return command


def main() -> int:
    """Print one line a comparison. Return the exit status: 1 if any differs, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base", default=BASE, help="commit to compare with (default: %(default)s)"
    )
    base = parser.parse_args().base
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # The worktree is removed then, too.
    different = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golden-"))).resolve()
        source = stack.enter_context(worktree(base, folder / "base"))
        versions = [version(source, folder / "before"), version(ROOT, folder / "now")]
        for name, (equal, difference) in record(versions):
            print(f"{name}: {difference or equal}", flush=True)
            different += bool(difference)
    print(f"{different} of the comparisons with {base} differ" if different else f"equal to {base}")
    return 1 if different else 0


if __name__ == "__main__":
    try:
        status = main()
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(status)
