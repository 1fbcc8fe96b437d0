"""Parts of the product, the tests that watch each file, and the list of mutants of a seed."""

import ast
import hashlib
from collections import Counter, defaultdict
from functools import cache
from itertools import cycle, islice
from pathlib import Path

from . import sites
from .operators import TURNS, Mutant

ROOT = Path(__file__).parents[2]
# Mutants of the whole list, by part.
SIZES = defaultdict(lambda: 12, kernels=32)
# A file's part is its wing's name; the commands count with configuration and runtime.
FOLDERS = dict.fromkeys(("config", "runtime", "cli"), "config and runtime")
# Tests to run before others, for files that no test is named after or whose own are slow.
LOSS = (
    "test_pairwise_lse test_splits test_loss_scale test_infonce_triton test_infonce_limits "
    "test_cosine test_distill"
)
ATTENTION = "test_attention_triton test_limits"
FIRST = {
    "kernels/attention/_forward.py": ATTENTION,
    "kernels/attention/_backward.py": ATTENTION,
    "kernels/attention/_op.py": ATTENTION,
    "kernels/_dispatch.py": "test_infonce test_distill test_cosine test_pairwise_lse",
    "kernels/similarity/_checks.py": "test_infonce test_distill test_cosine test_pairwise_lse",
    "kernels/similarity/_lse_forward.py": LOSS,
    "kernels/similarity/_lse_logs.py": LOSS,
    "kernels/similarity/_lse_backward.py": LOSS,
    "kernels/similarity/_bands.py": LOSS,
    "kernels/similarity/_lse_op.py": LOSS,
    "kernels/similarity/_mask.py": LOSS,
    "kernels/similarity/_tiles.py": LOSS,
    "kernels/_lists.py": "test_token_index test_plan",
    "kernels/embedding/token_index.py": "test_token_index test_embed_triton",
    "kernels/attention/plan.py": f"test_plan {ATTENTION}",
    "kernels/optimiser/_op.py": "test_adamw",
    # Tests import the configuration from its package.
    "mlembed/config/model.py": "test_numbers test_config test_transformer test_last_layers",
    "mlembed/config/objective.py": "test_numbers test_config test_loss test_distill",
    "mlembed/config/run.py": "test_numbers test_config test_batches",
    "mlembed/data/tables.py": "test_tables test_groups test_teacher_scores",
    "mlembed/modeling/blocks.py": "test_transformer test_bert test_trunk",
    "mlembed/modeling/transformer.py": "test_transformer test_trunk test_last_layers",
    "mlembed/runtime/distributed.py": "test_waiting test_distributed",
    "mlembed/runtime/failures.py": "test_failures test_endings",
    "mlembed/runtime/process.py": "test_process test_stopping test_signals",
    "mlembed/runtime/intact.py": "test_checkpoint test_resume",
    "mlembed/training/provenance.py": "test_provenance test_resume_refusals",
    "mlembed/training/resume.py": "test_resume_refusals test_resume",
    "mlembed/training/gradcache.py": "test_gradcache test_trunk",
    "mlembed/modeling/automodel/architecture.py": "test_automodel",
    "mlembed/modeling/automodel/choose.py": "test_automodel",
    "mlembed/modeling/automodel/probe.py": "test_automodel",
    "mlembed/modeling/automodel/trunk.py": "test_automodel test_auto_training",
    "mlembed/modeling/hf_config.py": "test_hf_config test_pooling test_automodel",
    "mlembed/modeling/serving.py": "test_tuning test_publish test_sentence_files",
    "mlembed/publishing/probes.py": "test_export_readers test_publish",
    "mlembed/training/objective/sentence_teacher.py": "test_teacher test_packed_teacher",
    "mlembed/training/setup.py": "test_setup test_tuning test_train test_resume",
    "mlembed/training/step.py": "test_guards test_train test_resume",
    "train.py": "test_guards test_step_times test_no_wait test_gradcache test_train test_resume",
}


def product() -> list[str]:
    paths = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "mlembed").rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*paths, ROOT / "train.py"])


def part_of(file: str) -> str:
    top, *rest = Path(file).parts
    if not rest or top == "kernels":
        return top
    if len(rest) == 1:
        return "config and runtime"
    return FOLDERS.get(rest[0], rest[0])


@cache
def source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def mutants_of(file: str) -> tuple[tuple[Mutant, ...], tuple[Mutant, ...]]:
    """Return the mutants of a file that can run here, and those that need CUDA."""
    found, unreachable = sites.mutants(file, source(file))
    return tuple(found), tuple(unreachable)


@cache
def choose(seed: int) -> tuple[Mutant, ...]:
    """Return the seed's mutants: parts take turns, so that the first N are a balanced sample.

    Mutants are drawn by a hash of their names: a change elsewhere in the source draws no others.
    """

    def rank(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.id}".encode()).hexdigest()

    by_part = defaultdict(lambda: defaultdict(list))
    for file in product():
        for mutant in mutants_of(file)[0]:
            by_part[part_of(file)][mutant.operator].append(mutant)
    places = []
    for part, by_operator in by_part.items():
        turns = Counter(islice(cycle(TURNS), SIZES[part]))
        drawn = [m for o, n in turns.items() for m in sorted(by_operator[o], key=rank)[:n]]
        # Kernels have more mutants: theirs are spread over the turns of all others.
        for i, mutant in enumerate(sorted(drawn, key=rank)):
            places.append(((i + 0.5) / len(drawn), rank(mutant), mutant))
    return tuple(mutant for *_, mutant in sorted(places, key=lambda place: place[:2]))


# ---- tests ----


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the dotted names that a file and its helpers in tests/ import."""
    names = set()
    package = ".".join(path.relative_to(ROOT).parent.parts).replace("kernels", "mlembed_kernels")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            names |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    if path.name.startswith("test_"):
        for name in list(names):
            helper = ROOT / "tests" / f"{name.partition('.')[0]}.py"
            if helper.is_file():
                names |= imports(helper)
    return frozenset(names)


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").replace("kernels.", "mlembed_kernels.")


@cache
def test_files() -> tuple[Path, ...]:
    return tuple(sorted((ROOT / "tests").rglob("test_*.py")))


@cache
def tests_of(file: str) -> tuple[str, ...]:
    """Return the test files that are to kill a file's mutants, in the order in which they run.

    First those of the table above, then test_X.py and test_X_*.py for X.py, then all that import X,
    those with the fewest imports first. A file without any has the tests of the files that import
    it.
    """
    stem = Path(file).stem.lstrip("_").removesuffix("_op")
    kernels = file.startswith("kernels/")
    near = [path for path in test_files() if ("kernels" in path.parts) == kernels]
    first = [path for name in FIRST.get(file, "").split() for path in near if path.stem == name]
    own = [path for path in near if path.stem == f"test_{stem}"]
    own += [path for path in near if path.stem.startswith(f"test_{stem}_")]
    focus = [path for path in test_files() if module_of(file) in imports(path)]
    focus.sort(key=lambda path: ("bench" in path.name, len(imports(path)), path))
    found = [str(path.relative_to(ROOT)) for path in [*first, *own, *focus]]
    if not found:
        for other in product():
            if other != file and module_of(file) in imports(ROOT / other):
                found += tests_of(other)
    return tuple(dict.fromkeys(found))
