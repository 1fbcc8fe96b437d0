"""Pages of the students: a JSON object of every number, and Markdown, a pure function of it."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlembed.runtime.workers import device_of

from ..environment import environment
from . import on_paper, page, report, tasks
from .page import NUMBERS, table
from .settings import Proof

SHOWN = "minutes", "seeds", "languages", "pairs", "options"
ABOUT = {
    "lealla-mini": "LEALLA's student, from random layers and the source's tokens, of translations.",
    "stage1": "From the source: retrieval without instructions.",
    "stage2": "From the first stage: retrieval and entailment with instructions, scored pairs, "
    "translations.",
}
LABELS = {
    "source": "source",
    "lealla-mini": "lealla-mini",
    "stage1": "ML-Embed, first stage",
    "stage2": "ML-Embed, second stage",
}


# ---- the numbers ----


def content_of(proof: Proof) -> dict[str, Any]:
    """Return the JSON object; models whose pieces are not done are missing."""
    device = device_of("auto")
    settings = asdict(proof)
    models = {name: found for name in LABELS if (found := cells_of(proof, name))}
    names = [name for name in models if proof.piece(name).exists()]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": report.machine(device),
        "environment": environment(device),
        "source": proof.source or report.described(Path(proof.model)),
        "command": proof.command.replace("bench proof", "bench students"),
        "settings": {name: settings[name] for name in SHOWN},
        "training": {name: proof.read(name)["training"] for name in names},
        "models": models,
        "paper": on_paper.rows(),
    }


def cells_of(proof: Proof, model: str) -> list[dict[str, Any]]:
    """Return the cells of a model at the ranks whose pieces are done, the smallest rank first."""
    done = sorted(proof.folder.glob(f"pieces/{model}@*.json"))
    cells = [cell for path in done for cell in proof.read(path.stem)["cells"]]
    every = [
        {
            **{name: value for name, value in cell.items() if name != "points"},
            "numbers": tasks.numbers(cell["points"]),
            "score": tasks.score(cell["points"]),
        }
        for cell in cells
    ]
    return sorted(every, key=lambda cell: (cell["rank"] or 0, cell["exit"], cell["dim"]))


# ---- Markdown ----


def markdown(content: dict[str, Any]) -> str:
    """Return the page: a section for each model, their training, and GPUs on paper."""
    parts = ["# Students of a real model on real text", introduction(content)]
    for model in (name for name in ABOUT if name in content["models"]):
        cells = content["models"][model]
        number = "tatoeba" if model == "lealla-mini" else "score"
        parts += [f"## {LABELS[model]}", ABOUT[model]]
        parts += [size_table(content["models"]["source"] + named(cells)), *grids(cells, number)]
    runs = {LABELS[name]: run for name, run in content["training"].items()}
    parts += page.training({"training": runs})
    parts += ["## On GPUs, on paper", *on_paper.markdown(content["paper"])]
    parts.append(f"All of it: `{content['command']}`")
    return "\n\n".join(parts) + "\n"


def introduction(content: dict[str, Any]) -> str:
    settings, env = content["settings"], content["environment"]
    return (
        f"Source: {content['source']}. Measured on {content['date']} with {content['machine']}, "
        f"torch {env['torch']}, commit {env['commit']}; one seed.\n\n"
        "The score is the mean of four numbers: accuracy on Tatoeba and on FLORES-200 with "
        "TICO-19, both directions between each language and English; Spearman correlation on STS; "
        "nDCG@10 on retrieval. Each is a mean over languages or sets. No number contains "
        f"{settings['languages']}, and at most {settings['pairs']} pairs of a language of bitext "
        "are taken."
    )


def named(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells of all layers, half of them and the smallest, each at the ends of the ranks
    and at full width, and the smallest cell.
    """
    exits = sorted({cell["exit"] for cell in cells})
    ranks = sorted({cell["rank"] or 0 for cell in cells})
    width = max(cell["dim"] for cell in cells)
    depths = dict.fromkeys((exits[-1], exits[(len(exits) - 1) // 2], exits[0]))
    sizes = [(exit, rank) for rank in dict.fromkeys((ranks[-1], ranks[0])) for exit in depths]
    by_size = {(c["exit"], c["rank"] or 0): c for c in cells if c["dim"] == width}
    return [*(by_size[size] for size in sizes), cells[0]]


def size_table(cells: list[dict[str, Any]]) -> str:
    head = ["layers, rank, width", "parameters", "MB", "bytes a vector", "texts/s"]
    rows = []
    for cell in cells:
        row = [f"{cell['exit']}, {cell['rank'] or 'table'}, {cell['dim']}"]
        row += [f"{cell['parameters'] / 1e6:.1f} M", f"{cell['megabytes']:.0f}"]
        row += [str(cell["bytes_per_vector"]), f"{cell['texts_per_second']:.0f}"]
        row += [f"{cell['numbers'][kind]:.1f}" for kind in NUMBERS]
        rows.append([*row, f"{cell['score']:.1f}"])
    return table([*head, *NUMBERS.values(), "score"], rows)


def grids(cells: list[dict[str, Any]], number: str) -> list[str]:
    """Return a table of depths and widths for each rank, of the score or one of the numbers."""
    parts = []
    for rank in dict.fromkeys(cell["rank"] for cell in cells):
        some = [cell for cell in cells if cell["rank"] == rank]
        dims = sorted({cell["dim"] for cell in some})
        rows = []
        for exit in sorted({cell["exit"] for cell in some}):
            by_dim = {cell["dim"]: cell for cell in some if cell["exit"] == exit}
            values = [by_dim[dim]["numbers"].get(number, by_dim[dim]["score"]) for dim in dims]
            rows.append([str(exit), *(f"{value:.1f}" for value in values)])
        what = NUMBERS.get(number, "score")
        parts.append(f"{what[0].upper()}{what[1:]}, {f'rank {rank}' if rank else 'a plain table'}:")
        parts.append(table(["layers", *(f"{dim} wide" for dim in dims)], rows))
    return parts
