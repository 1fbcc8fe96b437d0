"""Every test can fail: it asserts, or calls a function of the tests that does. Warnings that point
at our own code fail it as well.
"""

import ast
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Calls that fail a test without the statement `assert`; the last one turns a wait for the GPU into
# an error.
ASSERTING = {"raises", "warns", "fail", "set_sync_debug_mode"}
Function = ast.FunctionDef | ast.ClassDef


class File:
    """Functions and classes of one file, and the names that it imports from its neighbours."""

    def __init__(self, path: Path) -> None:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        self.path, self.top = path, TESTS if path.is_relative_to(TESTS) else path.parent
        self.functions = {node.name: node for node in nodes if isinstance(node, Function)}
        self.imports: dict[str, tuple[Path, str]] = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                near = path.parent / f"{node.module}.py"
                source = near if near.is_file() else TESTS / near.name
                self.imports |= {a.asname or a.name: (source, a.name) for a in node.names}

    def called(self, function: ast.AST) -> "Iterator[tuple[File, ast.AST]]":
        """Functions of the tests that `function` names, with the file that defines each. A fixture
        that a test names in its body, not as an argument alone, is one of them.
        """
        folders = [folder for folder in self.path.parents if folder.is_relative_to(self.top)]
        shared = [path for folder in folders if (path := folder / "conftest.py").is_file()]
        for name in {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}:
            if name in self.functions:
                yield self, self.functions[name]
            elif name in self.imports:
                source, name = self.imports[name]
                if source.is_file() and name in file(source).functions:
                    yield file(source), file(source).functions[name]
            else:
                for fixtures in shared:
                    if name in file(fixtures).functions:
                        yield file(fixtures), file(fixtures).functions[name]


file = cache(File)


def asserts(function: ast.AST) -> bool:
    """Whether `function` itself holds an assertion."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ASSERTING or name.startswith("assert_"):
                return True
    return False


def hollow(path: Path) -> list[str]:
    """Names of the tests of a file from which no assertion is reached."""
    names = []
    for name, test in file(path).functions.items():
        if not name.startswith("test_"):
            continue
        ahead, seen = [(file(path), test)], set()
        while ahead and not asserts(ahead[-1][1]):
            here, function = ahead.pop()
            seen.add(function)
            ahead += [pair for pair in here.called(function) if pair[1] not in seen]
        if not ahead:
            names.append(name)
    return names


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda p: p.stem)
def test_every_test_reaches_an_assertion(path):
    assert hollow(path) == []


def test_hollow_tests_are_found(tmp_path):
    (tmp_path / "truth.py").write_text("def same(a): assert a\ndef other(a): same\ndef no(): pass")
    (tmp_path / "conftest.py").write_text("def fixture(): assert 1")
    path = tmp_path / "test_example.py"
    path.write_text(
        "from truth import no, other as close\n"
        "def again(n): again(n - 1)\n"
        "def test_a(): assert 1\n"
        "def test_b(): pytest.raises(ValueError, f)\n"
        "def test_c(): close(1)\n"
        "def test_d(): np.testing.assert_allclose(1, 1)\n"
        "def test_e(): no()\n"
        "def test_f(): again(2)\n"
        "def test_g(): charts.pareto([])\n"
        "def test_h(fixture): fixture()\n"
        "def test_i(fixture): pass\n"
    )
    assert hollow(path) == ["test_e", "test_f", "test_g", "test_i"]


@pytest.mark.parametrize("kind", [UserWarning, RuntimeWarning, DeprecationWarning, FutureWarning])
@pytest.mark.parametrize(
    "module", ["mlembed.data", "mlembed_kernels.infonce", "bench.harness", "train", __name__]
)
def test_warnings_of_our_code_are_errors(module, kind):
    with pytest.raises(kind, match="as expected"):
        warnings.warn_explicit("as expected", kind, "file.py", 1, module)


@pytest.mark.parametrize("module", ["torch.nn", "trainer", "transformers.training_args"])
def test_warnings_of_libraries_are_warnings(module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit("as expected", UserWarning, "file.py", 1, module)
    assert [str(warning.message) for warning in caught] == ["as expected"]
