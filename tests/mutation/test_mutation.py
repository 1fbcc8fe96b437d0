"""The list of mutants, and the runner on a toy."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from tests.mutation import named, parts, sites

SOURCE = """
def f(x, y, items):
    '''A docstring with 1 and 2 < 3.'''
    if x < 1 and not y:
        raise ValueError("at least " + str(1))
    x = x + 2.5
    items[0] = True
    g(x, y, key=-3)
    assert x == 7
    print("of 9", 9)
    if x.is_cuda:
        return x * 4
    return x if y else items
"""


def changes(source):
    """Every change of a source, as (operator, lines before, lines after)."""
    found, unreachable = sites.mutants("toy.py", source)
    return [(m.operator, *m.lines(source)) for m in found], unreachable


def test_operators():
    found, unreachable = changes(SOURCE)
    condition = "if x < 1 and not y:"
    call = "g(x, y, key=-3)"
    assert sorted(found) == sorted(
        [
            ("negate", condition, "if x < 1 or not y:"),
            ("negate", condition, "if x < 1 and y:"),
            ("compare", condition, "if x <= 1 and not y:"),
            ("constant", condition, "if x < 2 and not y:"),
            ("drop", 'raise ValueError("at least " + str(1))', "pass"),
            ("arithmetic", "x = x + 2.5", "x = x - 2.5"),
            ("constant", "x = x + 2.5", "x = x + 5.0"),
            ("drop", "x = x + 2.5", "pass"),
            ("drop", "items[0] = True", "pass"),
            ("constant", "items[0] = True", "items[1] = True"),
            ("constant", "items[0] = True", "items[0] = False"),
            ("swap", call, "g(y, x, key=-3)"),
            ("constant", call, "g(x, y, key=-4)"),
            ("drop", call, "pass"),
            ("negate", "return x if y else items", "return x if not (y) else items"),
        ]
    )
    assert [m.after for m in unreachable] == ["/", "5"]


def test_after_a_return_without_cuda_nothing_runs_here():
    source = "def f(x):\n    if not x.is_cuda:\n        return 1\n    return 2\n"
    found, unreachable = changes(source)
    assert found == [("constant", "return 1", "return 2")]
    assert [m.after for m in unreachable] == ["3"]


def test_text_before_a_change_may_have_any_letters():
    found, _ = changes("x = 'äöü', 1 < y\n")
    assert ("compare", "x = 'äöü', 1 < y", "x = 'äöü', 1 <= y") in found


def test_the_list_is_a_function_of_the_seed():
    chosen = parts.choose(1)
    parts.choose.cache_clear()
    assert parts.choose(1) == chosen
    assert parts.choose(2) != chosen
    assert len({m.id for m in chosen}) == len(chosen) >= 100


@pytest.mark.parametrize("seed", [1, 2])
def test_every_part_has_its_share(seed):
    counts = Counter(parts.part_of(m.file) for m in parts.choose(seed))
    assert set(counts) == {parts.part_of(file) for file in parts.product()}
    assert min(counts.values()) >= 8
    assert counts["kernels"] >= 20
    assert len({parts.part_of(m.file) for m in parts.choose(seed)[:20]}) >= len(counts) - 1


def test_every_mutant_parses_and_differs():
    """Parse only the function or class around a mutant; whole files take ten times as long."""
    tree_of = cache(lambda file: ast.parse(parts.source(file)))
    for mutant in [*parts.choose(1), *map(named.named, named.NAMED)]:
        source, line = parts.source(mutant.file), mutant.line(parts.source(mutant.file))
        body = tree_of(mutant.file).body
        (node,) = [node for node in body if node.lineno <= line <= node.end_lineno]
        lines = mutant.apply(source).splitlines()
        fewer = len(source.splitlines()) - len(lines)
        (mutated,) = ast.parse("\n".join(lines[node.lineno - 1 : node.end_lineno - fewer])).body
        node.decorator_list = []
        assert ast.dump(mutated) != ast.dump(node), mutant.id


def test_every_file_has_tests():
    for file in {mutant.file for mutant in parts.choose(1)}:
        assert parts.tests_of(file), file


def test_explanations_are_of_mutants_that_exist():
    for file, function, before, after in named.EQUIVALENT:
        source = parts.source(file)
        lines = [m.lines(source) for m in parts.mutants_of(file)[0] if m.function == function]
        assert (before, after) in lines, (file, function, before)


# ---- the runner ----

TOY = """
def count(n):
    total = 0
    while n > 0:
        total = total + n
        n -= 1
    return total
"""
TESTS = """
import os
import subprocess
import sys

from toy import count

def test_fails_without_a_mutant():
    assert False

def test_zero():
    assert count(0) == 0

def test_large():
    if count(3) != 6:
        code = "import time; time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code, "OUTLIVES"], start_new_session=True)
        assert False
"""
RUN = """
import json, sys
from pathlib import Path
import pytest
from tests.mutation import sites
from tests.mutation.child import Trial
from tests.mutation.runner import Runner

root = Path(sys.argv[1])
source = (root / "toy.py").read_text()
found, _ = sites.mutants("toy.py", source)
results = {}
def report(mutant, verdict):
    results[" -> ".join(mutant.lines(source))] = verdict
trials = [Trial(m, source, ("tests/test_toy.py",)) for m in found if m.operator != "negate"]
Runner(report, budget=20, limit=3, root=root).run(trials)
print(json.dumps(results))
"""


def test_a_toy_is_broken(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_toy.py").write_text(TESTS.replace("OUTLIVES", str(tmp_path)))
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path],
        cwd=parts.ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert {change: verdict["status"] for change, verdict in results.items()} == {
        "total = 0 -> total = 1": "killed",
        "while n > 0: -> while n >= 0:": "survived",
        "while n > 0: -> while n > 1:": "killed",
        "total = total + n -> total = total - n": "killed",
        "total = total + n -> pass": "killed",
        "n -= 1 -> n += 1": "timeout",
        "n -= 1 -> pass": "timeout",
        "n -= 1 -> n -= 2": "killed",
    }
    # It fails on the toy itself: nothing is killed by it.
    assert "test_fails_without_a_mutant" in done.stderr
    assert results["while n > 0: -> while n >= 0:"]["passed"] == 2
    assert (tmp_path / "toy.py").read_text() == TOY
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError):
            assert str(tmp_path).encode() not in (process / "cmdline").read_bytes()
