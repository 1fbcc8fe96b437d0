"""Write a model card: what an exported model is, how it was made, what it scores, how to use it.

All of it is read from the model, and from the run's config.json and report/grid.json. What these do
not say is "not recorded"; a card invents nothing. model_card.md.j2 is the template.
"""

import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import config
from ..config import strict
from ..data import streams
from ..evaluation import results
from ..evaluation.charts import millions
from ..evaluation.grid import Grid
from ..evaluation.languages import language
from ..inference.encoder import Encoder
from ..modeling.transformer import num_parameters
from ..runtime import files, log
from ..runtime.errors import printable

TEXTS = '"Wednesday, May 4, 2050", "mercredi 4 mai 2050"'
NOT_RECORDED = "not recorded"
# Licences of data that comes with the package.
LICENCES = {"cldr": "Unicode License V3"}
PACKAGES = "torch", "transformers", "sentence-transformers", "onnxruntime"
TAGS = ("sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka")
# Keys of a run that say where it was, and keys whose values are paths.
PLACES = "output_dir", "resume", "allow_changed"
PATHS = "path", "corpus", "data", "eval", "init", "tokenizer", "teacher", "embeddings"


@dataclass(frozen=True)
class Cut:
    """Name and size of what is exported. repo: on the hub, if it goes there."""

    name: str
    dim: int
    exit: int
    rank: int | None
    formats: tuple[str, ...]
    repo: str = ""


@dataclass(frozen=True)
class Origin:
    """Source of a model.

    Args:
        name: of the run, or of what was loaded instead.
        checkpoint: path inside the run, for unfinished models.
        run, grid: the run's configuration and scores, {} if unknown.
        how, command: what a command made of the model since, and the command, "" if nothing.
    """

    name: str = ""
    checkpoint: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    how: str = ""
    command: str = ""

    def derived(self, how: str, command: Sequence[object]) -> "Origin":
        """Return the origin of what a command made of the model, which nobody has scored yet."""
        words = ["python", "-m", "mlembed", *map(str, command)]
        grid = {key: value for key, value in self.grid.items() if key != "cells"}
        return replace(self, grid=grid, how=how, command=shlex.join(words))


def find_origin(source: str) -> Origin:
    """Return the origin of a run's directory, its model/, one of its checkpoints, or a hub id.

    A checkpoint has no scores, as a run scores its finished model.

    Raises:
        ValueError: a configuration or report that train.py would not have written.
    """
    if not source or not Path(source).exists():
        return Origin(source)
    place = Path(source).resolve()
    directory = place.parent if place.name == "model" else place
    checkpoint = ""
    if place.parent.name == "checkpoints":
        directory, checkpoint = place.parents[1], f"{place.parent.name}/{place.name}"
    path, scored = directory / "config.json", directory / "report" / "grid.json"
    if not path.exists() or "steps" not in files.read_object(path):
        # The configuration is a model's, not a run's.
        return Origin(place.name)
    run = strict.to_dict(config.load(str(path)))
    grid = results.read_grid(scored) if scored.exists() else {}
    if checkpoint:
        grid.pop("cells", None)
    return Origin(str(run.get("name") or directory.name), checkpoint, run, grid)


def write(encoder: Encoder, cut: Cut, origin: Origin, license: str = "") -> str:
    """Return README.md: front matter for the hub, then the card."""
    cfg, run = encoder.model.cfg, origin.run
    rank = cut.rank or max(cfg.ranks, default=None)
    prompts = {name: prompt for name, prompt in encoder.prompts.items() if prompt}
    init, distill = str(run.get("init") or ""), run.get("distill", {})
    teacher = distill.get("teacher") or distill.get("embeddings")
    ancestors = {"Began from": init, "Taught by": str(teacher or "")}
    texts = origin.grid.get("texts_by_language", {})
    scored_codes = _scored_codes(origin)
    templates = Environment(
        loader=PackageLoader(__package__, "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = {"code": _code, "quoted": _quoted, "plain": _plain}
    templates.filters |= filters | {"millions": millions}
    return templates.get_template("model_card.md.j2").render(
        front_matter=front_matter(origin, {*texts, *scored_codes}, license),
        cut=cut,
        origin=origin,
        run=run,
        cfg=cfg,
        rank=rank,
        parameters=num_parameters(cfg, cut.exit, rank),
        sizes=sizes(cfg, cut.exit, rank),
        max_length=encoder.max_length,
        prefixes=[dim for dim in cfg.matryoshka_dims if dim < cut.dim],
        prompts=prompts,
        default=encoder.default_prompt_name if encoder.default_prompt else "",
        before=prompts.get("query", encoder.default_prompt),
        normalize=encoder.normalize,
        similarity=encoder.similarity,
        address=cut.repo or cut.name,
        texts=TEXTS,
        method="encode_query" if "query" in prompts else "encode",
        scores=scores((cut.dim, cut.exit, rank), origin.grid),
        sources=sources(run),
        ancestors=[(how, shown(path)) for how, path in ancestors.items() if path],
        command=origin.command or command(cut, origin, license),
        config=json.dumps(differences(run), indent=2, ensure_ascii=False),
        trained_commit=origin.grid.get("commit", NOT_RECORDED),
        export_commit=log.commit(),
        packages=[f"{name} {v}" for name in PACKAGES if (v := _version(name))],
        texts_by_language=[
            f"{language(code).name} {texts[code]:,}"
            for code in sorted(texts, key=lambda code: (-texts[code], code))
        ],
        scored_languages=sorted({language(code).name for code in scored_codes}),
        license=license,
        base_model=init and (hub_id(init) or shown(init)),
    )


def sizes(cfg: config.Model, exit: int, rank: int | None) -> list[list[str]]:
    """Return a table of the parameters of each exit and rank that an export holds, with its head;
    [] if it holds one size.

    An exit that ends with the last layers of a deeper model is a model of its own.
    """
    whole = exit == cfg.num_hidden_layers or not cfg.last_layers
    exits = [depth for depth in {*cfg.exits, exit} if depth <= exit] if whole else [exit]
    ranks: list[int | None] = [r for r in sorted({*cfg.ranks, rank or 0}) if 0 < r <= (rank or 0)]
    ranks = ranks or [None]
    if len(exits) * len(ranks) == 1:
        return []
    table = [["layers", *(f"rank {r}" if r else "parameters" for r in ranks)]]
    for depth in sorted(exits):
        table.append([str(depth), *(millions(num_parameters(cfg, depth, r)) for r in ranks)])
    return table


def front_matter(origin: Origin, codes: set[str], license: str) -> str:
    """Return what the hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    tongues = {language(code).key[0] for code in codes}
    tongues = {tongue for tongue in tongues if re.fullmatch("[a-z]{2,3}", tongue)}
    data = ModelCardData(
        language=[*(["multilingual"] if len(tongues) > 1 else []), *sorted(tongues)] or None,
        license=license or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[*TAGS, "multilingual", "mlembed"],
        base_model=hub_id(str(origin.run.get("init", ""))),
    )
    return str(data.to_yaml())


def hub_id(init: str) -> str | None:
    """Return the hub's model that training began from, through any number of runs; None if
    unknown.
    """
    seen: set[str] = set()
    while init and init not in seen and Path(init).exists():
        seen.add(init)
        init = str(find_origin(init).run.get("init", ""))
    return init if init not in seen and re.fullmatch(r"\w[\w.-]*/[\w.-]+", init) else None


def _quoted(text: str) -> str:
    """Quote a text like Python and JSON."""
    return json.dumps(text, ensure_ascii=False)


def _plain(text: Any) -> str:
    """Escape a text of one line, so that Markdown and a table's cell show its letters alone."""
    line = " ".join(printable(str(text)).split())
    return re.sub(r"[\\`*\[\]<>|&]", lambda odd: f"\\{odd[0]}", line)


def _code(text: str) -> str:
    """Fence a text, so that Markdown shows each letter; it would drop what looks like a tag."""
    text = printable(text).replace("\n", "\\n")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- what a run recorded ----


def scores(size: tuple[int, int, int | None], grid: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's scores as a table, that of a (dim, exit, rank) in bold; {} without a grid."""
    cells = grid.get("cells", [])
    if not cells:
        return {}
    return {
        "table": Grid(cells).markdown(bold=size),
        "has_cut": any((cell["dim"], cell["exit"], cell["rank"]) == size for cell in cells),
        "tasks": list(cells[0]["scores"]),
        "measured": any("latency_ms" in cell for cell in cells),
        "device": grid.get("device", f"device {NOT_RECORDED}"),
    }


def _scored_codes(origin: Origin) -> set[str]:
    cells = origin.grid.get("cells", [])
    results = cells[0]["scores"].values() if cells else ()
    return {code for result in results for code in result.get("by_language", {})}


def command(cut: Cut, origin: Origin, license: str) -> str:
    """Return the command that exports this cut."""
    source = origin.name or "MODEL"
    if origin.run:
        source = "/".join(filter(None, ("runs", origin.name, origin.checkpoint)))
    words = ["python", "-m", "mlembed", "export", source, cut.name, "--dim", str(cut.dim)]
    words += ["--exit", str(cut.exit), *(["--rank", str(cut.rank)] if cut.rank else [])]
    if cut.formats != ("sentence-transformers",):
        words += ["--format", *cut.formats]
    words += ["--license", license] if license else []
    # A line break in a name would end the block of code in the model card.
    return printable(shlex.join(words)).replace("\n", "\\n")


def sources(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, task and licence of each source of text."""
    listed = [config.Source(path=path) for path in run.get("data", [])]
    where = "config.json: sources"
    listed += [strict.from_dict(config.Source, one, where) for one in run.get("sources", [])]
    return [
        (streams.name_of(one), one.task, LICENCES.get(one.path, NOT_RECORDED)) for one in listed
    ]


def differences(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a run's configuration that is not the default, without where it was.

    Read again as a config.json it is the same run, in the default place.
    """
    default = strict.to_dict(config.Run())
    return _shorter(_beyond({k: v for k, v in run.items() if k not in PLACES}, default))


def _beyond(run: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    changed = {}
    for key, value in run.items():
        if isinstance(value, dict):
            if value := _beyond(value, default.get(key, {})):
                changed[key] = value
        elif key not in default or value != default[key]:
            changed[key] = value
    return changed


def _shorter(value: Any, path: bool = False) -> Any:
    """Cut absolute paths to their last part, as their place concerns nobody else."""
    if isinstance(value, dict):
        return {key: _shorter(one, key in PATHS) for key, one in value.items()}
    if isinstance(value, list):
        return [_shorter(one, path) for one in value]
    return shown(value) if path and isinstance(value, str) else value


def shown(path: str) -> str:
    """Return the last part of an absolute path, and any other path as it is."""
    return Path(path).name if Path(path).is_absolute() else path
