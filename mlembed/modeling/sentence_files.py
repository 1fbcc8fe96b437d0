"""Read a sentence-transformers directory: each key of its files is followed, or refused by name.

The files are modules.json, sentence_bert_config.json, config_sentence_transformers.json, and the
config.json of each module after the first. Their modules are a Transformer, a Pooling, at most one
tanh Dense layer of [CLS] (LaBSE's pooler), at most one Dense layer that cuts vectors, which exports
of a smaller width have, and Normalize, which does not change cosines.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.files import read_json

ANY = object()  # A key that is followed, or that does not change vectors of unit length.
# Keys by file, each with the values that are followed.
MODULE = {"idx": ANY, "name": ANY, "path": ANY, "type": ANY, "kwargs": ({}, [], None)}
TRANSFORMER = {
    "max_seq_length": ANY,
    "do_lower_case": ANY,
    "transformer_task": ("feature-extraction",),
    "modality_config": (
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        None,
    ),
    "module_output_name": ("token_embeddings", None),
    "processing_kwargs": ({}, None),
    "unpad_inputs": ANY,  # speed alone
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "model_args": ({}, None),
    "tokenizer_args": ({}, None),
    "config_args": ({}, None),
    "tokenizer_name_or_path": (None,),
}
SETTINGS = {
    "__version__": ANY,
    "model_type": ("SentenceTransformer",),
    "prompts": ANY,
    "default_prompt_name": ANY,
    "similarity_fn_name": ("cosine", "dot", None),  # equal for vectors of unit length
    "truncate_dim": ANY,
}
MODES = (
    *("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"),
    *("weightedmean_tokens", "lasttoken"),
)
POOLING = {
    "word_embedding_dimension": ANY,
    "embedding_dimension": ANY,
    "pooling_mode": ANY,
    **{f"pooling_mode_{mode}": ANY for mode in MODES},
    "include_prompt": (True,),
}
DENSE = {
    "in_features": ANY,
    "out_features": ANY,
    "bias": ANY,
    "activation_function": ANY,
    "module_input_name": ("sentence_embedding", None),
    "module_output_name": ("sentence_embedding", None),
    "use_residual": (False,),
}
NORMALIZE = {name: DENSE[name] for name in ("module_input_name", "module_output_name")}
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


@dataclass(frozen=True)
class SentenceFiles:
    """Settings of a directory. Without its files: no pooling, vectors of the model's width.

    pooling: cls, mean, last or pooler. pooler: folder of the Dense layer with a pooler's weights.
    width: of the vectors, None for the model's. default_prompt: goes before texts for which no
    prompt is asked for.
    """

    pooling: str | None = None
    pooler: Path | None = None
    width: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


def read(directory: Path, width: int) -> SentenceFiles:
    """Read the files of a directory whose model has the given width.

    Raises:
        ValueError: a file that is not an object, and each key or module that is not followed.
    """
    settings = _object(directory / "config_sentence_transformers.json", SETTINGS)
    _object(directory / "sentence_bert_config.json", TRANSFORMER)
    prompts, default = _prompts(directory, settings)
    pooling = _pooling(directory, width)
    pooler, cut = _dense_layers(directory, width, pooling)
    shorter = [n for n in (cut, settings.get("truncate_dim")) if n is not None]
    if any(not isinstance(n, int) or not 1 <= n <= width for n in shorter):
        path = directory / "config_sentence_transformers.json"
        raise ValueError(f"{path}: truncate_dim: expected 1 to {width}, got {shorter[-1]!r}")
    return SentenceFiles(
        "pooler" if pooler else pooling, pooler, min(shorter, default=None), prompts, default
    )


def _object(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the object of a file, {} if there is no file, with keys of the given values alone."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    _check(path, value, keys)
    return value


def _check(path: Path, value: dict[str, Any], keys: dict[str, Any]) -> None:
    for key, got in value.items():
        if key not in keys:
            raise ValueError(f"{path}: expected only {', '.join(keys)}, got {key}, not followed")
        if keys[key] is not ANY and got not in keys[key]:
            expected = " or ".join(map(repr, keys[key]))
            raise ValueError(f"{path}: {key}: expected {expected}, got {got!r}")


def _prompts(directory: Path, settings: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """Return prompts by name, null being an empty one, and the default prompt."""
    path = directory / "config_sentence_transformers.json"
    given = settings.get("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(t, str | None) for t in given.values()):
        raise ValueError(f"{path}: prompts: expected texts by name, got {given}")
    prompts = {name: text or "" for name, text in given.items()}
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        known = ", ".join(prompts) or "none"
        raise ValueError(
            f"{path}: default_prompt_name: expected one of the prompts ({known}), got {default!r}"
        )
    return prompts, None if default is None else prompts[default]


def _pooling(directory: Path, width: int) -> str | None:
    path = directory / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    pooling = _object(path, POOLING)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if pooling.get(key, width) != width:
            raise ValueError(f"{path}: {key}: expected {width}, got {pooling[key]!r}")
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    mode = str(pooling.get("pooling_mode") or "+".join(modes))
    named = mode.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
    if named not in POOLINGS:
        raise ValueError(f"{path}: expected one pooling, cls, mean or lasttoken, got {mode!r}")
    return POOLINGS[named]


def _dense_layers(
    directory: Path, width: int, pooling: str | None
) -> tuple[Path | None, int | None]:
    """Return the folder of the layer that is a pooler, and the width that another one cuts to."""
    path = directory / "modules.json"
    listed = read_json(path) if path.is_file() else []
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise ValueError(f"{path}: expected a list of modules, got {listed!r}")
    names = []
    for module in listed:
        _check(path, module, MODULE)
        kind = str(module.get("type", ""))
        if not kind.startswith("sentence_transformers."):
            raise ValueError(f"{path}: expected modules of sentence_transformers, got {kind!r}")
        names.append(kind.rpartition(".")[2])
    pooler, cut = None, None
    for module, name in zip(listed, names, strict=True):
        folder = directory / str(module.get("path", ""))
        if name == "Normalize":
            _object(folder / "config.json", NORMALIZE)
        elif name == "Dense" and cut is None:
            layer = _object(folder / "config.json", DENSE)
            if _is_pooler(layer, width) and pooling == "cls" and not pooler:
                pooler = folder
            elif _is_cut(folder, layer, width):
                cut = int(layer["out_features"])
            else:
                raise ValueError(
                    f"{folder}/config.json: expected a tanh layer of {width} x {width} with a bias "
                    f"after cls pooling, or one that cuts vectors, got {layer} after {pooling}"
                )
        elif name not in ("Transformer", "Pooling"):
            got = ", ".join(names)
            raise ValueError(
                f"{path}: expected Transformer, Pooling, at most one Dense and Normalize, got {got}"
            )
    return pooler, cut


def _activation(layer: dict[str, Any]) -> str:
    return str(layer.get("activation_function", "Tanh")).rpartition(".")[2]


def _is_pooler(layer: dict[str, Any], width: int) -> bool:
    sizes = [layer.get("in_features"), layer.get("out_features")]
    return sizes == [width, width] and _activation(layer) == "Tanh" and layer.get("bias", True)


def _is_cut(folder: Path, layer: dict[str, Any], width: int) -> bool:
    """Return whether a layer keeps the first numbers of a vector and does nothing else."""
    rows, file = layer.get("out_features"), folder / "model.safetensors"
    if _activation(layer) != "Identity" or layer.get("bias", True) or not file.is_file():
        return False
    if layer.get("in_features") != width or not isinstance(rows, int) or not 1 <= rows <= width:
        return False
    import torch  # The import takes a second, and command lines are read without it.
    from safetensors import safe_open

    from . import weight_checks

    with safe_open(file, framework="pt") as tensors:
        weight = tensors.get_tensor("linear.weight")
    weight_checks.check(f"{file}: linear.weight", weight)
    return torch.equal(weight.float(), torch.eye(rows, width))
