"""The proof's page in Markdown: a pure function of its JSON object."""

from typing import Any

from .report import COMPETITORS

NUMBERS = {"tatoeba": "Tatoeba", "bitext": "FLORES, TICO", "sts": "STS", "retrieval": "retrieval"}


def markdown(proof: dict[str, Any]) -> str:
    """Return the page: sizes and competitors, the four numbers, the grid, scripts, training."""
    parts = [
        "# What nesting is worth on real text",
        introduction(proof),
        "![score against parameters and bytes a vector](proof.svg)",
        "## Five sizes",
        size_table(proof),
        notes(proof),
        "## The four numbers",
        number_table(proof),
        "## Every exit and width",
        *grids(proof),
        "## Scripts and languages",
        "Mean accuracy of bitext, Tatoeba and tables together.",
        group_table(proof, "scripts"),
        group_table(proof, "languages"),
        *training(proof),
        f"All of it: `{proof['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose first column is aligned left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def introduction(proof: dict[str, Any]) -> str:
    settings, env = proof["settings"], proof["environment"]
    seeds = len(settings["seeds"])
    return (
        f"Source: {proof['source']}. Measured on {proof['date']} with {proof['machine']}, torch "
        f"{env['torch']}, commit {env['commit']}; {settings['minutes']:g} minutes of training a "
        f"run, {seeds} seed{'s' * (seeds > 1)} of mlembed and sentence-transformers.\n\n"
        "The score is the mean of four numbers: accuracy on Tatoeba and on FLORES-200 with "
        "TICO-19, both directions between each language and English; Spearman correlation on STS; "
        "nDCG@10 on retrieval. Each is a mean over languages or sets. The recipe was chosen on "
        f"{settings['languages']}, which no number here contains in any of the four, and at most "
        f"{settings['pairs']} pairs of a language of bitext are taken."
    )


def notes(proof: dict[str, Any]) -> str:
    """Say what the costs count, and how the competitors were made."""
    whole = next(iter(proof["sizes"].values()))["cut"]
    return (
        "Percent of the source's score, with points in brackets; ± is half the distance of two "
        f"seeds. Megabytes are {proof['measured']['megabytes']}; a vector has fp32 numbers. Texts "
        f"a second: the median of three runs over {proof['measured']['timed_texts']} short texts, "
        "through mlembed. The costs are those of the first competitor of a row.\n\n"
        "Source, cut: its prefixes, first layers and plain SVD. mlembed, untrained: the shape of "
        "ours, whose exits end with the source's last layers. sentence-transformers: its "
        "Matryoshka2dLoss around MSELoss, for the same time on the same batches with the same "
        "teacher vectors; its small rank is a plain SVD. At full rank the source, cut, and "
        "sentence-transformers keep the plain table, "
        f"{whole['parameters'] / 1e6:.1f} M parameters in all. Trained alone: our recipe for the "
        "same time with this one size."
    )


def competitors(proof: dict[str, Any]) -> list[str]:
    return [name for name in COMPETITORS if name in proof["cells"]]


def first(of: dict[str, Any]) -> dict[str, Any]:
    """Return the cell whose costs a row shows: ours, or else the first competitor's."""
    return of.get("ours") or next(iter(of.values()))


def size_table(proof: dict[str, Any]) -> str:
    names = competitors(proof)
    head = ["size", "parameters", "MB", "bytes a vector", "texts/s"]
    head += [COMPETITORS[name] for name in names]
    rows = []
    for size, of in proof["sizes"].items():
        cell = first(of)
        row = [size, f"{cell['parameters'] / 1e6:.1f} M", f"{cell['megabytes']:.0f}"]
        row += [str(cell["bytes_per_vector"]), f"{cell['texts_per_second']:.0f}"]
        rows.append(row + [share(of[name]) if name in of else "" for name in names])
    return table(head, rows)


def share(cell: dict[str, Any]) -> str:
    spread = f" ± {cell['spread'] / 2:.1f}" if cell["seeds"] > 1 else ""
    return f"{cell['percent']:.1f} ({cell['score']:.1f}{spread})"


def number_table(proof: dict[str, Any]) -> str:
    rows = []
    for size, of in proof["sizes"].items():
        for name in competitors(proof):
            if cell := of.get(name):
                row = [f"{cell['numbers'][kind]:.1f}" for kind in NUMBERS]
                rows.append([size, COMPETITORS[name], *row, f"{cell['score']:.1f}"])
    return table(["size", "", *NUMBERS.values(), "score"], rows)


def grids(proof: dict[str, Any]) -> list[str]:
    """Return a table of percents for ours, or the source, at each of the two ranks."""
    who = competitors(proof)[0]
    cells, parts = proof["cells"][who], []
    dims = sorted({cell["dim"] for cell in cells})
    for small in (False, True):
        some = [cell for cell in cells if cell["small"] == small]
        if not some:
            continue
        rank = some[0]["rank"]
        rows = []
        for exit in sorted({cell["exit"] for cell in some}):
            by_dim = {cell["dim"]: cell for cell in some if cell["exit"] == exit}
            size = f"{by_dim[dims[-1]]['parameters'] / 1e6:.1f} M"
            rows.append([str(exit), size, *(f"{by_dim[dim]['percent']:.1f}" for dim in dims)])
        title = f"rank {rank}" if rank else "a plain table"
        parts.append(f"{COMPETITORS[who]}, {title}, percent of the source:")
        head = ["layers", "parameters", *(f"{dim} wide" for dim in dims)]
        parts.append(table(head, rows))
    return parts


def group_table(proof: dict[str, Any], group: str) -> str:
    """Return the source's points next to those of ours at each size, by script or language."""
    sizes, who = proof["sizes"], competitors(proof)[0]
    source = next(iter(sizes.values()))["cut"][group]
    shown = {size: of[who][group] for size, of in sizes.items() if who in of}
    rows = [
        [name, f"{value:.1f}", *(f"{points[name]:.1f}" for points in shown.values())]
        for name, value in source.items()
    ]
    return table([group.removesuffix("s"), "source", *shown], rows)


def training(proof: dict[str, Any]) -> list[str]:
    """Return the runs' times and commands, [] if nothing was trained."""
    if not proof["training"]:
        return []
    rows = [
        [name, f"{run['seconds'] / 60:.1f}", str(run["steps"]), f"{run['tokens'] / 1e6:.2f} M"]
        for name, run in proof["training"].items()
    ]
    commands = [f"- {name}: `{run['command']}`" for name, run in proof["training"].items()]
    about = "Minutes are wall-clock of training alone: reading and export are not counted."
    head = ["run", "minutes", "steps", "tokens"]
    return ["## Training", about, table(head, rows), "\n".join(commands)]
