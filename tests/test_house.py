"""The architecture: imports between wings, a reference for each kernel, sizes of files and folders,
and one home for each helper.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import mlembed
import mlembed_kernels

ROOT = Path(__file__).parents[1]
MOST_LINES = 500
MOST_MODULES = 14

# A wing imports itself and the wings that its row names. docs/design.md says what each one holds.
WINGS = {
    "kernels": "",
    "runtime": "",
    "config": "runtime",
    "data": "kernels config runtime",
    "modeling": "kernels config runtime data",
    "training": "kernels config runtime data modeling",
    "inference": "kernels config runtime data modeling",
    "evaluation": "kernels config runtime data modeling inference",
    "publishing": "kernels config runtime data modeling inference evaluation",
    "integrations": "kernels config runtime modeling",
    "cli": "config runtime data modeling training inference evaluation publishing",
}
# Packages that kernels/ imports, and those of optional backends.
KERNELS_KNOW = {"torch", "triton"}
BACKENDS = {"_backends.py": {"flash_attn", "xformers"}}


def tracked() -> list[Path]:
    """Return the Python files of the checkout, also those that are not yet committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split() if listed.returncode == 0 else []
    folders = ("kernels", "mlembed", "bench", "tests")
    every = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted({ROOT / name for name in names if (ROOT / name).is_file()} or every)


FILES = tracked()
PRODUCT = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("kernels", "mlembed")]
KERNELS = [path for path in PRODUCT if path.relative_to(ROOT).parts[0] == "kernels"]
BENCH = [path for path in FILES if path.relative_to(ROOT).parts[0] == "bench"]


def module_of(path: Path) -> str:
    """Return a file's dotted name: mlembed.data.packing, mlembed_kernels.attention._op."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[0] = {"kernels": "mlembed_kernels"}.get(parts[0], parts[0])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def wing_of(module: str) -> str:
    """Return a module's wing, "" for files outside of the wings."""
    top, *rest = module.split(".")
    if top == "mlembed_kernels":
        return "kernels"
    return rest[0] if top == "mlembed" and rest and rest[0] in WINGS else ""


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the dotted names of all modules and symbols that a file imports, anywhere in it."""
    names = set()
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            names |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def modules_in(path: Path) -> set[str]:
    """Return the modules of this repository that a file imports."""
    names = {name for name in imports(path) if name in MODULES} - {module_of(path)}
    # `from .wing import module` names the package as well; only its own symbols count as its use.
    return {
        name
        for name in names
        if MODULES[name].name != "__init__.py" or defines(name, imports(path))
    }


def defines(name: str, imported: frozenset[str]) -> bool:
    """Return whether a file that imports these names takes a symbol of the package itself."""
    return any(full.rpartition(".")[0] == name and full not in MODULES for full in imported)


# ---- who imports whom ----


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: module_of(p))
def test_wing_imports_only_wings_above_it(path):
    module = module_of(path)
    wing = wing_of(module)
    for name in modules_in(path):
        assert name.split(".")[0] in ("mlembed", "mlembed_kernels"), name
        if wing and wing_of(name) != wing:
            assert wing_of(name) in WINGS[wing].split() or name == "mlembed", f"{module} -> {name}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: module_of(p))
def test_kernels_import_torch_and_triton_alone(path):
    known = {"mlembed_kernels", *KERNELS_KNOW, *BACKENDS.get(path.name, ())}
    for name in imports(path):
        assert name.partition(".")[0] in known | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: module_of(p))
def test_kernels_import_each_other_relatively(path):
    """An absolute import loads an installed copy where the folder is imported as `kernels`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name for name in names if name and name.startswith("mlembed_kernels")}


def test_imports_have_no_cycles():
    after = {module_of(path): modules_in(path) for path in [*PRODUCT, *BENCH]}
    while after:
        free = [name for name, needs in after.items() if not needs & after.keys()]
        assert free, f"a cycle among {sorted(after)}"
        for name in free:
            del after[name]


def test_kernels_are_imported_as_mlembed_kernels():
    """`import kernels` would find Hugging Face's package, or hide it."""
    for path in FILES:
        assert "kernels" not in {name.partition(".")[0] for name in imports(path)}, path


# ---- one home for everything ----


def test_helpers_have_one_home():
    names = {path.stem for path in [*PRODUCT, *BENCH]}
    assert not names & {"utils", "util", "common", "misc", "helpers", "registry", "factory"}
    # Files of cli/ are named after their commands.
    homes = [path.stem for path in PRODUCT if path.parent.name != "cli"]
    for one in ("files", "cache", "search", "readers"):
        assert homes.count(one) <= 1, one


def test_folders_have_few_modules():
    folders = {path.parent for path in [*PRODUCT, *BENCH]}
    modules = {folder: {*folder.glob("*.py")} - {folder / "__init__.py"} for folder in folders}
    assert not [folder for folder, some in modules.items() if len(some) > MOST_MODULES]


def test_no_merge_is_unfinished():
    marks = re.compile("^(<<<<<<<|>>>>>>>) ", re.MULTILINE)
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")]
    assert not [path for path in [*FILES, *pages] if marks.search(path.read_text(encoding="utf-8"))]


def test_files_are_short():
    assert len(FILES) > len(PRODUCT)
    lines = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert not {name: n for name, n in lines.items() if n > MOST_LINES}


# ---- kernels ----


PUBLIC = [name for name in mlembed_kernels.__all__ if f"{name}_ref" in mlembed_kernels.__all__]
HIDDEN = [path for path in KERNELS if path.name.startswith("_") and path.name != "__init__.py"]


@pytest.mark.parametrize("name", PUBLIC)
def test_kernel_has_a_reference_and_a_test(name):
    public, reference = getattr(mlembed_kernels, name), getattr(mlembed_kernels, f"{name}_ref")
    module = importlib.import_module(public.__module__)
    assert getattr(module, f"{name}_ref") is reference
    stem = module.__name__.rpartition(".")[2]
    place = module.__name__.replace("mlembed_kernels", "kernels").replace(".", "/")
    assert (ROOT / "tests" / place).with_name(f"test_{stem}.py").is_file()
    wanted = list(inspect.signature(public).parameters.values())
    given = list(inspect.signature(reference).parameters.values())
    at = [p.name for p in wanted].index("impl")
    assert wanted[at].default == "auto"
    assert [(p.name, p.kind, p.default) for p in given] == [
        (p.name, p.kind, p.default) for p in wanted[:at]
    ]
    assert module.__doc__ and public.__doc__ and reference.__doc__
    nothing = {p.name: None for p in given if p.default is p.empty}
    with pytest.raises(ValueError, match="impl: expected one of .*got 'fastest'"):
        public(**nothing, impl="fastest")  # checked first, and never replaced by another


@pytest.mark.parametrize("path", HIDDEN, ids=lambda p: module_of(p))
def test_shared_parts_of_kernels_are_private(path):
    module = module_of(path)
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert [p for p in KERNELS if module in imports(p)]
    for other in [*PRODUCT, ROOT / "train.py"]:
        assert other in KERNELS or module not in imports(other), other


def test_kernels_have_the_version_of_mlembed():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlembed.__version__)
    assert mlembed_kernels.__version__ == mlembed.__version__
    assert len(set(mlembed_kernels.__all__)) == len(mlembed_kernels.__all__)


# ---- fresh processes ----


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_reading_text_and_files_needs_no_triton():
    names = ("config", "data.packing", "data.batches", "data.tokenizer", "runtime.checkpoint")
    fresh("import sys; sys.modules['triton'] = None; import mlembed." + ", mlembed.".join(names))


def test_our_folder_is_not_taken_for_hugging_faces_kernels():
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    installed = importlib.util.find_spec("kernels") is not None and any(
        True for d in importlib.metadata.distributions() if d.metadata["Name"] == "kernels"
    )
    assert fresh(code).strip() == str(installed)


# ---- Makefile ----


def test_makefile_trains_and_tests():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:tests|bench)/[\w/]+\.py", makefile):
        assert (ROOT / path).is_file(), path
    names = makefile.partition("$(addprefix tests/,")[2].partition(")")[0].split()
    assert names and all((ROOT / "tests" / n).exists() for n in names if n != "\\")
    for target in ("train", "test"):
        assert re.search(rf"^{target}\s*:", makefile, re.MULTILINE), target
        said = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
        assert {"train": "train.py", "test": "pytest"}[target] in said.stdout
