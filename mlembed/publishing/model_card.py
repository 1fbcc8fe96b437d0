"""A model card: what an exported model is, how it was made, what it scores, how to use it.

All of it is read: from the model, and from the directory of the run that it comes from (config.json
and report/grid.json). What nothing there says is "not recorded"; a card makes nothing up.
"""

import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import config
from ..config import strict
from ..data import streams
from ..evaluation.charts import mean_score
from ..evaluation.languages import language
from ..inference.encoder import Encoder
from ..modeling.transformer import num_parameters
from ..runtime import files, log

TEXTS = '"Wednesday, May 4, 2050", "mercredi 4 mai 2050"'
NOT_RECORDED = "not recorded"
LICENCES = {"cldr": "Unicode License V3"}  # of data that the package brings along
PACKAGES = "torch", "transformers", "sentence-transformers", "onnxruntime"
# Keys of a run that say where it was, and those whose values are paths.
PLACES = "output_dir", "resume", "allow_changed"
PATHS = "path", "corpus", "data", "eval", "init", "tokenizer", "teacher", "embeddings"


@dataclass(frozen=True)
class Cut:
    """What is exported, under which name. repo: of the hub, if it goes there."""

    name: str
    dim: int
    exit: int
    rank: int | None
    formats: tuple[str, ...]
    repo: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from. run, grid: the configuration and report of a run, empty where it
    comes from none or where there are none; name: of the run, or of what was loaded instead;
    checkpoint: where in the run, of a model that is not its finished one."""

    name: str = ""
    checkpoint: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)


def origin(source: str) -> Origin:
    """Of a run's directory, its model/ or one of its checkpoints; of all else, its name.

    What a run scored is its finished model, so of a checkpoint there are no scores.

    Raises:
        ValueError: a configuration or report that is not json.
    """
    if not source:
        return Origin()
    path = Path(source)
    if not path.exists():  # a hub id
        return Origin(source)
    place = path.resolve()
    directory = place.parent if place.name == "model" else place
    checkpoint = ""
    if place.parent.name == "checkpoints":
        directory, checkpoint = place.parents[1], f"{place.parent.name}/{place.name}"
    run = _json(directory / "config.json")
    if "steps" not in run:  # of a model, not of a run
        return Origin(place.name)
    grid = _json(directory / "report/grid.json")
    if checkpoint:
        grid.pop("cells", None)
    return Origin(str(run.get("name") or directory.name), checkpoint, run, grid)


def _json(path: Path) -> dict[str, Any]:
    read = files.read_json(path) if path.is_file() else {}
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected an object, got {type(read).__name__}")
    return read


def write(encoder: Encoder, cut: Cut, of: Origin, license: str = "") -> str:
    """README.md: front matter that the hub reads, then the card."""
    parts = [
        front_matter(of, license),
        f"# {cut.name}",
        what_it_is(encoder, cut, of),
        how_to_use(encoder, cut),
        scores(cut, of),
        how_it_was_made(cut, of, license),
        languages(of),
        licences(of, license),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def front_matter(of: Origin, license: str) -> str:
    """YAML between dashes."""
    from huggingface_hub import ModelCardData

    codes = {language(code).key[0] for code in _languages(of)}
    codes = {code for code in codes if re.fullmatch("[a-z]{2,3}", code)}
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "matryoshka"]
    data = ModelCardData(
        language=[*(["multilingual"] if len(codes) > 1 else []), *sorted(codes)] or None,
        license=license or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[*tags, "multilingual", "mlembed"],
        base_model=hub_id(str(of.run.get("init", ""))),
    )
    return f"---\n{data.to_yaml()}\n---"


def hub_id(init: str) -> str | None:
    """The hub's model that training began from, through as many runs as it takes; None where it is
    not known to be one."""
    if not init:
        return None
    if not Path(init).exists():
        return init if re.fullmatch(r"\w[\w.-]*/[\w.-]+", init) else None
    before = str(origin(init).run.get("init", ""))
    return hub_id(before) if before != init else None


# ---- sections ----


def what_it_is(encoder: Encoder, cut: Cut, of: Origin) -> str:
    cfg = encoder.model.cfg
    rank = cut.rank or (cfg.ranks[-1] if cfg.ranks else None)
    size = num_parameters(cfg, cut.exit, rank)
    vocabulary = f"rank {rank}" if rank else "table"
    lines = [
        "A text encoder made with mlembed, whose vectors nest in width, depth and vocabulary rank:",
        f"{cut.exit} of {cfg.num_hidden_layers} layers, width {cut.dim} of {cfg.hidden_size}, "
        f"vocabulary {vocabulary}; {size / 1e6:.2f} M parameters, texts of up to "
        f"{encoder.max_length} tokens.",
    ]
    if rank:
        lines.append(
            "In model.safetensors the vocabulary is merged to a table, its factors beside."
        )
    if cut.dim < cfg.hidden_size:
        lines.append(f"mlembed itself reads all {cfg.hidden_size} of its width, unless asked.")
    if prefixes := [str(d) for d in cfg.matryoshka_dims if d < cut.dim]:
        lines.append(f"The first {', '.join(prefixes)} of a vector's numbers are vectors too.")
    if cfg.style == "qwen3" and not cfg.causal:
        lines.append("Its attention looks both ways: transformers 5.2 or newer.")
    if prompts := {name: text for name, text in encoder.prompts.items() if text}:
        lines.append("Trained with prompts, which sentence-transformers takes by name:\n")
        lines += [f"- {_code(key)}: {_code(_quoted(text))}" for key, text in prompts.items()]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """As Python and JSON write it."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    """As Markdown shows it letter by letter; what looks like a tag would not be shown at all."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def how_to_use(encoder: Encoder, cut: Cut) -> str:
    """Snippets that run where the directory is, or, of what goes to the hub, anywhere."""
    cfg = encoder.model.cfg
    pooled = {
        "last": "hidden[torch.arange(len(hidden)), tokens.attention_mask.sum(1) - 1]",
        "cls": "hidden[:, 0]",
        "pooler": "read.pooler_output",
        "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    }[cfg.pooling]
    name, texts = _quoted(cut.repo or cut.name), f"texts = [{TEXTS}]"
    method, prompted = "encode", [texts]
    if prompt := encoder.prompts.get("query"):
        behind = f"texts = [{_quoted(prompt)} + text for text in texts]"
        method, prompted = "encode_query", [texts, behind]
    tokens = (
        "AutoTokenizer.from_pretrained(name)(texts, padding=True, truncation=True, return_tensors="
    )
    snippets = {
        "sentence-transformers": [
            "from sentence_transformers import SentenceTransformer",
            "",
            texts,
            f"vectors = SentenceTransformer({name}).{method}(texts)  # [2, {cut.dim}]",
        ],
        "transformers": [
            "import torch",
            "from transformers import AutoModel, AutoTokenizer",
            "",
            f"name = {name}",
            *prompted,
            f'tokens = {tokens}"pt")',
            "with torch.inference_mode():",
            "    read = AutoModel.from_pretrained(name).eval()(**tokens)",
            "hidden, mask = read.last_hidden_state, tokens.attention_mask[..., None]",
            f"pooled = {pooled}",
            f"vectors = torch.nn.functional.normalize(pooled[:, :{cut.dim}], dim=-1)",
        ],
        "onnxruntime": [
            *(["from huggingface_hub import snapshot_download"] if cut.repo else []),
            "import onnxruntime",
            "from transformers import AutoTokenizer",
            "",
            f"name = snapshot_download({name})" if cut.repo else f"name = {name}",
            *prompted,
            f'tokens = {tokens}"np")',
            'session = onnxruntime.InferenceSession(f"{name}/onnx/model.onnx")',
            'vectors = session.run(["sentence_embedding"], dict(tokens))[0]',
        ],
        "mlembed": [
            "from mlembed.inference.encoder import Encoder",
            "",
            texts,
            f"vectors = Encoder.load({name}).{method}(texts, dim={cut.dim})",
        ],
    }
    if "onnx" not in cut.formats:
        del snippets["onnxruntime"]
    code = [f"```python\n{chr(10).join(lines)}\n```" for lines in snippets.values()]
    return "## Use\n\n" + "\n\n".join(
        f"With {name}:\n\n{block}" for name, block in zip(snippets, code, strict=True)
    )


def scores(cut: Cut, of: Origin) -> str:
    """The grid as a table, and which of it this is."""
    cells = of.grid.get("cells", [])
    if not cells:
        return f"## Scores\n\n{NOT_RECORDED.capitalize()}."
    dims = sorted({cell["dim"] for cell in cells})
    costs = {
        "latency_ms": "ms a text",
        "texts_per_second": "texts/s",
        "memory_mib": "MiB",
    }
    costs = {key: title for key, title in costs.items() if any(key in cell for cell in cells)}
    titles = ["rank", "exit", "parameters", *costs.values(), *(f"{dim} wide" for dim in dims)]
    lines = [f"| {' | '.join(titles)} |", f"|{' ---: |' * len(titles)}"]
    ranks = [cell["rank"] for cell in cells if cell["rank"] is not None]
    rank = cut.rank or max(ranks, default=None)
    for row in dict.fromkeys((cell["rank"], cell["exit"]) for cell in cells):
        at = {c["dim"]: c for c in cells if (c["rank"], c["exit"]) == row}
        some = next(iter(at.values()))
        numbers = ["table" if row[0] is None else str(row[0]), str(row[1])]
        numbers.append(f"{some['parameters'] / 1e6:.2f} M")
        numbers += [f"{some[key]:.4g}" if key in some else "" for key in costs]
        for dim in dims:
            score = f"{mean_score(at[dim]):.1f}" if dim in at else ""
            numbers.append(f"**{score}**" if (*row, dim) == (rank, cut.exit, cut.dim) else score)
        lines.append(f"| {' | '.join(numbers)} |")
    here = any((c["rank"], c["exit"], c["dim"]) == (rank, cut.exit, cut.dim) for c in cells)
    tasks = ", ".join(cells[0]["scores"])
    said = f"Percent, the mean of {tasks}, of the model that this is cut from"
    said += "; this cut is bold." if here else "; this cut itself was not scored."
    if costs:
        device = of.grid.get("device", f"device {NOT_RECORDED}")
        said += f" Times and memory are those of all widths alike, measured on {device}."
    return f"## Scores\n\n{said}\n\n" + "\n".join(lines)


def how_it_was_made(cut: Cut, of: Origin, license: str) -> str:
    lines = ["## How it was made", ""]
    options = f"--dim {cut.dim} --exit {cut.exit}" + (f" --rank {cut.rank}" if cut.rank else "")
    if cut.formats != ("sentence-transformers",):
        options += f" --format {' '.join(cut.formats)}"
    if license:
        options += f" --license {shlex.quote(license)}"
    source, commands = of.name or "MODEL", []
    if of.run:
        source = "/".join(filter(None, ("runs", of.name, of.checkpoint)))
        lines += _data(of.run)
        commands = ["python train.py config.json"]
    else:
        lines += [
            f"Exported from {of.name or 'a model in memory'}; its training is {NOT_RECORDED}.",
            "",
        ]
    commands.append(f"python -m mlembed export {shlex.join((source, cut.name))} {options}")
    lines += ["```bash", *commands, "```", ""]
    if of.run:
        written = json.dumps(differences(of.run), indent=2, ensure_ascii=False)
        lines += [
            "config.json, what differs from the defaults (of absolute paths the last part):",
            "",
            f"```json\n{written}\n```",
            "",
        ]
    packages = [f"{name} {v}" for name in PACKAGES if (v := _version(name))]
    trained = of.grid.get("commit", NOT_RECORDED)
    lines.append(
        f"mlembed commit of the training run: {trained}, of the export: {log.commit()}; "
        f"exported with {', '.join(packages)}."
    )
    return "\n".join(lines)


def _data(run: Mapping[str, Any]) -> list[str]:
    """The sources of text, and which models it learnt from."""
    lines = ["| source | task | licence |", "| --- | --- | --- |"]
    for source in _sources(run):
        name, licence = streams.name_of(source), LICENCES.get(source.path, NOT_RECORDED)
        lines.append(f"| {name} | {source.task} | {licence} |")
    lines.append("")
    distil = run.get("distill", {})
    for said, path in (
        ("Began from", run.get("init")),
        ("Taught by", distil.get("teacher") or distil.get("embeddings")),
    ):
        if path:
            lines += [f"{said} {shown(str(path))}.", ""]
    return lines


def _sources(run: Mapping[str, Any]) -> list[config.Source]:
    plain = [config.Source(path=path) for path in run.get("data", [])]
    where = "config.json: sources"
    return plain + [strict.from_dict(config.Source, one, where) for one in run.get("sources", [])]


def languages(of: Origin) -> str:
    """Those of the training text, where its rows name them, and those it was scored in."""
    texts, scored = of.grid.get("texts_by_language", {}), _scored(of)
    parts = []
    if texts:
        most = sorted(texts, key=lambda code: (-texts[code], code))
        parts.append(
            f"Training texts by language ({len(texts)}): "
            + ", ".join(f"{language(code).name} {texts[code]:,}" for code in most)
        )
    if scored:
        names = sorted({language(code).name for code in scored})
        parts.append(f"Scored in {len(names)}: " + ", ".join(names))
    return "## Languages\n\n" + (
        "\n\n".join(f"{p}." for p in parts) or f"{NOT_RECORDED.capitalize()}."
    )


def _languages(of: Origin) -> set[str]:
    return {*of.grid.get("texts_by_language", {}), *_scored(of)}


def _scored(of: Origin) -> set[str]:
    cells = of.grid.get("cells", [])
    results: Iterable[Mapping[str, Any]] = cells[0]["scores"].values() if cells else ()
    return {code for result in results for code in result.get("by_language", {})}


def licences(of: Origin, license: str) -> str:
    lines = [f"- these weights: {license or NOT_RECORDED}"]
    if init := str(of.run.get("init", "")):
        lines.append(f"- {hub_id(init) or shown(init)}, which it began from: {NOT_RECORDED}")
    for source in _sources(of.run):
        licence = LICENCES.get(source.path, NOT_RECORDED)
        lines.append(f"- training text {streams.name_of(source)}: {licence}")
    return "## Licences\n\n" + "\n".join(lines)


# ---- a run's configuration ----


def differences(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's configuration is not the default, without where it was: read again as a
    config.json it is the same run, in the default place."""
    default = strict.to_dict(config.Run())
    kept = {key: value for key, value in run.items() if key not in PLACES}
    return _shorter(_beyond(kept, default))


def _beyond(run: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in run.items():
        if isinstance(value, dict):
            value = _beyond(value, default.get(key, {}))
            if value:
                found[key] = value
        elif key not in default or value != default[key]:
            found[key] = value
    return found


def _shorter(value: Any, path: bool = False) -> Any:
    """Absolute paths by their last part: where they were concerns nobody else."""
    if isinstance(value, dict):
        return {key: _shorter(one, key in PATHS) for key, one in value.items()}
    if isinstance(value, list):
        return [_shorter(one, path) for one in value]
    return shown(value) if path and isinstance(value, str) else value


def shown(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
