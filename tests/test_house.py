"""What the reader relies on: who imports whom, a specification beside each kernel, files that fit
in a head, and a README whose commands and paths exist."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import processes
import pytest

import mlembed_kernels
from mlembed import arguments, config, recipes, strict

ROOT = Path(__file__).parents[1]
KERNELS = sorted(p for p in (ROOT / "kernels").glob("*.py") if p.name != "__init__.py")
OURS = sorted(p for p in (ROOT / "mlembed").glob("*.py") if p.name != "__init__.py")
BENCH = sorted(p for p in (ROOT / "bench").glob("*.py") if p.name != "__init__.py")
MOST_LINES = 550
PACKAGES = {"_attention_backends.py": ("flash_attn", "xformers")}  # imported where asked for

# A file imports files of lower levels only; `log` also writes with `checkpoint`.
LEVELS = [
    {"attention_interface", "bank", "charts", "cldr", "distributed", "files", "languages"}
    | {"pack", "page", "rows", "strict", "vectors", "workers"},
    {"checkpoint", "config", "layouts", "stored", "tokenizer"},
    {"blocks", "depth", "log", "shapes", "sources"},
    {"model", "recipes", "results", "streams", "tasks", "teacher", "tokens"},
    {"arguments", "data", "guards", "resume", "ring", "scores"},
    {"activations", "engine", "pretrained", "optim", "loss", "distill"},
    {"gradcache", "windows"},
    {"encode"},
    {"card", "cost", "funnel", "mteb_encoder", "to_onnx"},
    {"evaluate", "export", "report", "mine", "merge", "prune"},
    {"prepare"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(path):
    """Every module that a file imports, anywhere in it: (name, dots before it)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node.level))
        elif isinstance(node, ast.ImportFrom):
            found += [(alias.name, node.level) for alias in node.names]
    return found


def of_ours(path):
    """Names of the files of mlembed/ that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mlembed" and not node.level:
            names |= {alias.name for alias in node.names}
    inside = path.parent.name == "mlembed"
    for name, dots in imports(path):
        if dots == 1 and inside:
            names.add(name.partition(".")[0])
        elif name.startswith("mlembed."):
            names.add(name.split(".")[1])
    return names


# ---- who imports whom ----


@pytest.mark.parametrize("path", [*KERNELS, ROOT / "kernels/__init__.py"], ids=lambda p: p.name)
def test_kernels_know_torch_triton_and_themselves(path):
    for name, dots in imports(path):
        top = name.partition(".")[0]
        if dots:
            assert dots == 1 and (ROOT / "kernels" / f"{top}.py").is_file(), name
        else:
            known = {"torch", "triton", "einops", *PACKAGES.get(path.name, ())}
            assert top in known | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_arrows_point_one_way(path):
    assert path.stem in LEVEL, f"{path.name} is new: give it a level above"
    known = {p.stem for p in OURS}
    for name in of_ours(path):
        assert name in known, f"{path.name} imports {name}, which does not exist"
        assert LEVEL[name] < LEVEL[path.stem], f"{path.stem} -> {name}"
    assert not any(dots > 1 for _, dots in imports(path))
    assert "train" not in {name for name, _ in imports(path)}


def test_there_are_no_cycles():
    after = {path.stem: of_ours(path) for path in OURS}
    while after:
        free = [name for name, needs in after.items() if not needs & after.keys()]
        assert free, f"a cycle among {sorted(after)}"
        for name in free:
            del after[name]


def test_kernels_are_imported_under_their_own_name():
    """`import kernels` would find Hugging Face's package, or hide it."""
    for path in [*OURS, *KERNELS, *BENCH, ROOT / "train.py", *(ROOT / "tests").rglob("*.py")]:
        assert "kernels" not in {name.partition(".")[0] for name, d in imports(path) if not d}, path


def test_no_drawer_for_everything():
    names = {p.stem for p in [*OURS, *KERNELS]}
    assert not names & {"utils", "util", "common", "misc", "helpers", "registry", "factory"}


def python_files():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split() if listed.returncode == 0 else []
    return [ROOT / name for name in names if (ROOT / name).is_file()] or [
        *OURS,
        *BENCH,
        *KERNELS,
        *ROOT.glob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]


def test_no_file_is_too_long():
    files = python_files()
    assert len(files) > len(OURS)
    long = {p.name: n for p in files if (n := len(p.read_text().splitlines())) > MOST_LINES}
    assert not long


# ---- kernels ----


PUBLIC = [path for path in KERNELS if not path.name.startswith("_")]


@pytest.mark.parametrize("path", PUBLIC, ids=lambda p: p.stem)
def test_a_kernel_has_its_specification_its_name_and_its_test(path):
    name = path.stem
    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").is_file()
    assert {name, f"{name}_ref"} <= set(mlembed_kernels.__all__)
    module = importlib.import_module(f"mlembed_kernels.{name}")
    public, reference = getattr(module, name), getattr(module, f"{name}_ref")
    assert getattr(mlembed_kernels, name) is public
    assert getattr(mlembed_kernels, f"{name}_ref") is reference
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
        public(**nothing, impl="fastest")  # looked at first, and never replaced by another


@pytest.mark.parametrize("path", [p for p in KERNELS if p not in PUBLIC], ids=lambda p: p.stem)
def test_what_several_kernels_share_stays_inside(path):
    users = [p for p in KERNELS if (path.stem, 1) in imports(p)]
    assert ast.get_docstring(ast.parse(path.read_text())) and users
    for other in [*OURS, ROOT / "train.py"]:
        assert not re.search(rf"kernels(\.| import ){path.stem}\b", other.read_text()), other


def test_kernels_say_their_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlembed_kernels.__version__)
    assert len(set(mlembed_kernels.__all__)) == len(mlembed_kernels.__all__)


# ---- fresh processes ----


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_reading_text_and_files_needs_no_triton():
    names = ("config", "pack", "data", "tokenizer", "checkpoint")
    fresh("import sys; sys.modules['triton'] = None; import mlembed." + ", mlembed.".join(names))


def test_our_folder_does_not_stand_in_for_hugging_faces_kernels():
    code = (
        "import transformers; from transformers.utils import is_kernels_available as f; print(f())"
    )
    installed = importlib.util.find_spec("kernels") is not None and any(
        True for d in importlib.metadata.distributions() if d.metadata["Name"] == "kernels"
    )
    assert fresh(code).strip() == str(installed)


# ---- Makefile and README ----


def test_makefile_trains_and_tests():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("train", "test"):
        assert re.search(rf"^{target}\s*:", makefile, re.MULTILINE), target
        said = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
        assert {"train": "train.py", "test": "pytest"}[target] in said.stdout


def blocks(text):
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Commands of ```bash blocks as lists of words, without variables, pipes and comments."""
    found = []
    for language, content in blocks(text):
        if language not in ("bash", "sh", "shell", "console"):
            continue
        for line in content.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            command = []
            for word in [*words, "&&"]:
                if word in ("&&", "|", ";", ">", ">>", "&"):
                    found += [command] if command else []
                    command = []
                elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
                    command.append(word)
    return found


def tree(text):
    """Paths of every block that draws the repository: folders indent what they hold."""
    paths = []
    for _, content in blocks(text):
        lines = [re.sub(r"[│├└─]", " ", line) for line in content.splitlines() if line.strip()]
        tops = [line.split()[0] for line in lines if not line.startswith(" ")]
        if "train.py" not in tops and "mlembed/" not in tops:
            continue
        folders = []  # (indent, path)
        for line in lines:
            indent = len(line) - len(line.lstrip())
            folders = [(at, folder) for at, folder in folders if at < indent]
            here = folders[-1][1] if folders else Path()
            names = re.split(r"\s{2,}", line.strip())[0].split()
            for i, name in enumerate(names):
                if i and not re.fullmatch(r"[\w.*-]+(\.\w+|/)", name):
                    break
                paths.append(here / name)
                if name.endswith("/"):
                    folders.append((indent, here / name))
    return paths


README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = """
```
train.py         one run
kernels/         the operations
  infonce.py     the loss, see model.py
mlembed/
  loss.py data.py        two of them
  deep/
    x.py         deeper
tests/           mirrors the above
```

```bash
python train.py tiny --steps 3 \\
  --name a  # a comment
A=1 torchrun --nproc_per_node 2 train.py tiny && python -m mlembed.encode M "two words" | head
```
"""


def test_the_two_readers_below_read():
    assert commands(EXAMPLE) == [
        ["python", "train.py", "tiny", "--steps", "3", "--name", "a"],
        ["torchrun", "--nproc_per_node", "2", "train.py", "tiny"],
        ["python", "-m", "mlembed.encode", "M", "two words"],
        ["head"],
    ]
    names = (
        "train.py kernels kernels/infonce.py mlembed mlembed/loss.py mlembed/data.py "
        "mlembed/deep mlembed/deep/x.py tests"
    )
    assert [str(path) for path in tree(EXAMPLE)] == names.split()


TRAIN = [c[c.index("train.py") + 1 :] for c in commands(README) if "train.py" in c]
MODULES = [c[2:] for c in commands(README) if re.match(r"python3? -m (mlembed|bench)", " ".join(c))]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """For what the reader has and we have not: a saved config.json, a Qwen3 checkpoint, and the
    mixture that the README shows."""
    path = tmp_path_factory.mktemp("stand_ins")
    (path / "run.json").write_text(json.dumps(strict.to_dict(recipes.tiny())))
    small = config.Model(hidden_size=1024, max_position_embeddings=32_768)
    shape = {"model_type": "qwen3"} | {
        key: value
        for key, value in strict.to_dict(small).items()
        if key not in ("exits", "matryoshka_dims", "ranks", "pooling", "causal", "rope_theta")
    }
    (path / "config.json").write_text(json.dumps(shape | {"rope_theta": 1e6}))
    (path / "mixture.json").write_text(next(c for kind, c in blocks(README) if kind == "json"))
    return path


@pytest.mark.parametrize("args", TRAIN, ids=" ".join)
def test_train_commands_of_the_readme_parse(args, stand_ins, monkeypatch):
    monkeypatch.chdir(stand_ins)
    args = list(args)
    if args[0].endswith(".json"):
        args[0] = str(stand_ins / "run.json")
    if "--help" in args:
        with pytest.raises(SystemExit) as caught:
            arguments.parse(args)
        assert caught.value.code == 0
        return
    if "--init" in args:
        args[args.index("--init") + 1] = str(stand_ins)
    elif args[0] in recipes.RECIPES and recipes.RECIPES[args[0]]().init:
        args += ["--init", str(stand_ins)]
    run = arguments.parse(args)
    assert isinstance(run, config.Run)
    assert bool(run.sources) == ("mixture.json" in args)


@cache
def help_of(module):
    done = processes.run("-m", module, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("args", MODULES, ids=" ".join)
def test_module_commands_of_the_readme_exist(args):
    module, *rest = args
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    said = help_of(module)
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert re.search(rf"(^|[\s|\[]){re.escape(flag)}([\s,|=\]]|$)", said), flag


def test_paths_of_the_readme_exist():
    missing = [str(path) for path in tree(README) if not any(ROOT.glob(str(path)))]
    assert not missing
    if tree(README):  # and no file of the packages is left out
        drawn = {str(path) for path in tree(README)}
        files = [*OURS, *KERNELS, *BENCH]
        assert {str(p.relative_to(ROOT)) for p in files} <= drawn


def test_every_module_with_a_command_has_a_help():
    for path in OURS:
        if '\nif __name__ == "__main__":' in path.read_text():
            # From a cold start, as its users begin.
            command = [sys.executable, "-m", f"mlembed.{path.stem}", "--help"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            assert done.stdout == help_of(f"mlembed.{path.stem}") and "--help" in done.stdout
