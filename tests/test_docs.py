"""Run every command and code block of the documentation in the order printed.

The blocks run in one scratch folder, as forks of one warm process, with tiny stand-ins for data,
models and steps (docs_stand_ins.py has the tables). A block that needs a GPU, the hub, the network,
a cluster or minutes says so in a comment above it; its commands are parsed and not run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import processes
import pytest
from docs_stand_ins import BESIDES, DEFAULTS, QUICK, SMALLER, WORDS, write_data, write_models
from torch.distributed.run import get_args_parser

from mlembed.config.run import Run
from mlembed.training import arguments

ROOT = Path(__file__).parents[1]
DOCS = "install demo elastic train data recipes encode evaluate export distributed checkpoints "
DOCS += "integrations serving kernels benchmarks design troubleshooting status"
PAGES = ["README.md", *(f"docs/{name}.md" for name in DOCS.split())]
PAGES += ["examples/README.md", "CONTRIBUTING.md"]

# ---- reading pages ----


@dataclass(frozen=True)
class Block:
    """A fenced block. needs: what the comment above it says, "" if it can run here."""

    page: str
    line: int
    needs: str
    language: str
    content: str


FENCE = re.compile(
    r"(?:^<!-- (?:needs|takes) (?P<needs>[\w ]+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<content>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SUBCOMMANDS = {
    "audit",
    "compile",
    "gpu",
    "compare",
    "proof",
    "integrations",
    "students",
}  # of python -m bench, with options of their own
PROFILERS = {"ncu", "nsys", "proton", "proton-viewer"}  # before the command that they profile
SERVERS = {"docker", "vllm", "llama-server"}
NEEDS = {"a GPU", "the hub", "the network", "a cluster", "a server", "minutes", "tevatron"}


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    for m in FENCE.finditer(text):
        line = text[: m.start("content")].count("\n") + 1
        found.append(Block(page, line, m["needs"] or "", m["language"], m["content"]))
    return found


@dataclass(frozen=True)
class Command:
    """A command with the variables set before it and the file after `<`."""

    env: dict[str, str]
    words: list[str]
    stdin: str


def commands(content: str) -> list[Command]:
    """Return the commands of a block, one a line, without comments."""
    found = []
    for line in content.splitlines():
        words = shlex.split(line, comments=True)
        env, stdin = {}, ""
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            env[name] = value
        if "<" in words:
            at = words.index("<")
            stdin, words = words[at + 1], words[:at]
        if words or env:
            found.append(Command(env, words, stdin))
    return found


EXAMPLE = """
<!-- needs a GPU -->
```bash
A=1 mlembed encode M "two words"  # a comment
python x.py < y.txt
```

```
plain
```
"""


def test_the_readers_of_pages_read():
    first, second = blocks("x.md", EXAMPLE)
    assert (first.line, first.needs, first.language) == (4, "a GPU", "bash")
    assert (second.needs, second.language, second.content) == ("", "", "plain\n")
    assert commands(first.content) == [
        Command({"A": "1"}, ["mlembed", "encode", "M", "two words"], ""),
        Command({}, ["python", "x.py"], "y.txt"),
    ]


# ---- running ----


def tiny(words: list[str]) -> list[str]:
    """Return a command with its stand-ins."""
    line = shlex.join(words)
    for printed, other in WORDS.items():
        line = re.sub(rf"(?<![\w/-]){re.escape(printed)}(?![\w/.-])", other, line)
    words = shlex.split(line)
    trains = "train.py" in words or words[:2] == ["mlembed", "train"]
    if not trains or "--help" in words:
        return words
    for option, value in (SMALLER | DEFAULTS).items():
        if option not in words:
            words += [option, value]
        elif option in SMALLER:
            words[words.index(option) + 1] = value
    recipe = words[words.index("train.py" if "train.py" in words else "train") + 1]
    for pattern, options in BESIDES.items():
        if re.match(pattern, recipe):
            words += options
    return words


def run(command: Command, folder: Path) -> None:
    """Run a command as its block says, with its stand-ins. AssertionError if it fails."""
    program, *rest = words = tiny(command.words)
    if program == "make":
        make(command, folder)
    elif program == "cp":
        shutil.copy(folder / rest[0], folder / rest[1])
    elif program == "export":
        assert rest == ["PYTHONPATH=.path:."]  # as the tests have it
    elif program == "mlembed":
        python(["-m", *words], command, folder)
    elif program == "python":
        python(rest, command, folder)
    elif program == "torchrun":
        options, script = torchrun(rest)
        python(script, command, folder, int(options.nproc_per_node))
    else:
        raise AssertionError(f"no stand-in for {program}")


def python(words: list[str], command: Command, folder: Path, count: int = 1) -> None:
    """Run `python WORDS` in a fork of the warm process, or in a group of them."""
    module = words[0] == "-m"
    target = words[1] if module else words[0]
    script = folder / target if (folder / target).is_file() else ROOT / target
    argv = [target, *words[2 if module else 1 :]]
    how = f"run_module({target!r}, alter_sys=True," if module else f"run_path({str(script)!r},"
    code = f"import runpy, sys; {QUICK}; sys.path.insert(0, {str(script.parent)!r}); "
    code += f"sys.argv = {argv!r}; runpy.{how} run_name='__main__')"
    done = processes.run(
        *("-c", code),
        cwd=folder,
        env=os.environ | command.env,
        input=(folder / command.stdin).read_text(encoding="utf-8") if command.stdin else "",
        processes=count,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def make(command: Command, folder: Path) -> None:
    """Check what make would do. The first `make train` trains."""
    done = subprocess.run(
        [*command.words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    trains = [line.split() for line in done.stdout.splitlines() if "train.py" in line]
    if trains and not (folder / "runs" / "tiny").exists():
        (words,) = trains
        assert words[0].endswith("/bin/python")
        run(Command({}, ["python", *words[1:]], ""), folder)


def torchrun(words: list[str]) -> tuple[object, list[str]]:
    """Return torchrun's own options, and the script with its arguments."""
    options = get_args_parser().parse_args(words)
    return options, [options.training_script, *options.training_script_args]


# ---- parsing ----


@cache
def help_of(*words: str) -> str:
    done = processes.run("-m", *words, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command that cannot run here: its program, its options, its files."""
    program, *rest = command.words
    if program in PROFILERS:
        inner = [i for i, word in enumerate(rest) if word in ("python", "train.py")]
        if inner:
            words = ["torchrun"] * (rest[inner[0]] == "train.py") + rest[inner[0] :]
            parse(Command(command.env, words, command.stdin), folder, monkeypatch)
    elif program == "mlembed" or rest[:2] == ["-m", "bench"]:
        module = ["mlembed", rest.pop(0)] if program == "mlembed" else ["bench"]
        module += [word for word in rest[2:3] if word in SUBCOMMANDS]
        text = help_of(*module)
        names = [word for word in rest if word.startswith("--")]
        assert names or rest
        for name in names:
            assert re.search(rf"(^|[\s|\[]){re.escape(name)}([\s,|=\]]|$)", text), name
    elif program in ("torchrun", "sbatch"):
        if program == "sbatch":
            at = rest.index("examples/slurm.sh")
            assert (ROOT / rest[at]).is_file()
            script = ["train.py", *rest[at + 1 :]]
        else:
            _, script = torchrun(rest)
        assert script[0] == "train.py"
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            assert isinstance(arguments.parse(script[1:]), Run)
    elif program == "make":
        make(command, folder)
    elif program in SERVERS or rest[:1] == ["convert_hf_to_gguf.py"]:
        assert "served" in re.findall(r"\w+", " ".join(rest)) and (folder / "served").is_dir()
    elif program == "pip":
        assert rest[0] == "install"
        folder, _, asked = rest[-1].rstrip("]").partition("[")
        project = tomllib.loads(text_of(f"{folder}/pyproject.toml"))["project"]
        assert asked or folder == "./kernels"
        assert {*asked.split(",")} <= {"", *project["optional-dependencies"]}
    else:
        assert command.words == [".", ".venv/bin/activate"]


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scratch folder, in which the README's blocks have run."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("docs", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    write_data(folder)
    write_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        perform("README.md", folder, patch)
    return folder


def perform(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, or parse, the blocks of a page in order."""
    for block in blocks(page, text_of(page)):
        where = f"{block.page}:{block.line}"
        try:
            assert not block.needs or block.needs in NEEDS
            if block.language == "python" and block.needs:
                compile(block.content, where, "exec")
            elif block.language == "python":
                done = processes.run("-c", block.content, cwd=folder)
                assert done.returncode == 0, done.stderr[-3000:]
            elif block.language == "json":
                json.loads(block.content)
            elif block.language == "bash":
                for command in commands(block.content):
                    if block.needs:
                        parse(command, folder, monkeypatch)
                    else:
                        run(command, folder)
            else:
                assert not block.language
        except (AssertionError, ValueError, OSError) as error:
            raise AssertionError(f"{where}: {error}") from error


def test_the_readme_runs(folder):
    for name in ("runs/tiny/model", "scores/grid.json", "small-model", "runs/mine/model"):
        assert (folder / name).exists(), name


@pytest.mark.parametrize("page", PAGES[1:])
def test_a_page_runs(page, folder, monkeypatch):
    perform(page, folder, monkeypatch)


def test_every_page_is_tested():
    written = [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), ROOT / "README.md"]
    assert {str(path.relative_to(ROOT)) for path in written} <= set(PAGES)


def test_the_readme_fits_on_a_few_screens():
    assert len(text_of("README.md").splitlines()) <= 150


def test_the_printed_mixture_is_the_example():
    printed = [b.content for b in blocks("", text_of("docs/data.md")) if '"sources"' in b.content]
    example = json.loads(text_of("examples/mixture.json"))
    assert [json.loads(content) for content in printed] == [example]


def test_the_picture_shows_the_table():
    """Every score and size of docs/demo.md is a text of the picture, in order."""
    rows = re.findall(r"^ *\d+ +\d+ +([\d.]+M)((?: +\d+\.\d)+)$", text_of("docs/demo.md"), re.M)
    assert len(rows) == 9
    drawn = re.findall(r"<text[^>]*>\s*([^<]+?)\s*</text>", text_of("docs/nesting.svg"))
    scores = [score for _, line in rows for score in line.split()]
    assert [text for text in drawn if re.fullmatch(r"\d+\.\d", text)] == scores
    assert {size for size, _ in rows} <= set(re.findall(r"[\d.]+M", " ".join(drawn)))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_and_paths_exist(page):
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(str(linked.resolve().relative_to(ROOT))), target
    top = r"`((?:kernels|mlembed|tests|bench|docs|examples|\.github)/[\w./-]*|train\.py|\.ci/run)`"
    for name in re.findall(top, text):
        assert (ROOT / name).exists(), name


def test_the_tree_of_the_readme_is_the_tree():
    (tree,) = (b.content for b in blocks("", text_of("README.md")) if "mlembed/\n" in b.content)
    drawn = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    folders = [p.name for p in (ROOT / "mlembed").iterdir() if (p / "__init__.py").is_file()]
    assert sorted(drawn) == sorted(folders)
    for name in re.findall(r"^([\w.]+/?) ", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_ci_runs_what_developers_run():
    """The workflow calls .ci/run, whose targets exist; ruff has one version."""
    assert "- run: .ci/run\n" in text_of(".github/workflows/ci.yml")
    targets = re.findall(r"^make ([\w-]+)$", text_of(".ci/run"), re.MULTILINE)
    written = re.findall(r"`make ([\w-]+)", text_of("CONTRIBUTING.md"))
    assert targets and set(targets) <= set(written)
    hooks = text_of(".pre-commit-config.yaml")
    (version,) = re.findall(r"ruff-pre-commit\n +rev: v(.+)$", hooks, re.M)
    assert f"\nruff=={version}\n" in text_of("constraints.txt")


# ---- the job ----


def test_slurm_script_starts_one_torchrun_a_node(folder, tmp_path, monkeypatch):
    stand_ins = {
        "scontrol": 'test "$*" = "show hostnames node[0-1]" && printf "node0\\nnode1\\n"',
        "srun": f'printf "%s\\n" "$OMP_NUM_THREADS" "$@" > {tmp_path}/started',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    job |= {"SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    args = ["qwen3", "--init", "DIRECTORY", "--data", "pairs.jsonl"]
    script = ROOT / "examples/slurm.sh"
    done = subprocess.run([script, *args], env=env | job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads, kill, *started = (tmp_path / "started").read_text().splitlines()
    assert (threads, kill) == ("8", "--kill-on-bad-exit=1")
    assert started[:3] == [".venv/bin/python", "-m", "torch.distributed.run"]
    options, (name, *given) = torchrun(started[3:])
    assert (name, given) == ("train.py", args)
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "4", 3)
    assert (options.rdzv_id, options.rdzv_endpoint) == ("7", "node0:29500")
    monkeypatch.chdir(folder)
    assert arguments.parse(given).init == "DIRECTORY"


def test_slurm_script_fails_where_scontrol_does(tmp_path):
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nexit 3\n")
    (tmp_path / "scontrol").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[0-1]"}
    done = subprocess.run([ROOT / "examples/slurm.sh"], env=env, capture_output=True)
    assert done.returncode == 3
