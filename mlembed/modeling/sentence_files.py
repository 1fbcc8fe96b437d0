"""Read a sentence-transformers directory: each key of its files is followed, or refused by name.

The files are modules.json, sentence_bert_config.json, config_sentence_transformers.json, and the
config.json of each module after the first. Their modules are a Transformer, a Pooling, at most one
tanh Dense layer of [CLS] (LaBSE's pooler) or linear Dense layers (EmbeddingGemma's), at most one
Dense layer that cuts vectors, which exports of a smaller width have, and Normalize, which does not
change cosines.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.files import field, read_object
from ..runtime.model_files import modules, open_tensors

ANY = object()  # A key that is followed, or that does not change vectors of unit length.
# Keys by file, each with the values that are followed.
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
    dense: folders of linear layers after the pooling, the last of them as wide as the model.
    cut, truncate_dim: widths to which a Dense layer and sentence-transformers, after all modules,
    cut vectors, None for all of them. default_prompt_name: prompt of texts for which none is asked
    for. normalize: whether vectors have length one; they do where `similarity` is dot, since
    mlembed compares by cosine.
    """

    pooling: str | None = None
    pooler: Path | None = None
    dense: tuple[Path, ...] = ()
    cut: int | None = None
    truncate_dim: int | None = None
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    normalize: bool = True
    similarity: str = "cosine"

    @property
    def width(self) -> int | None:
        """Width of the vectors, None for the model's."""
        return min((n for n in (self.cut, self.truncate_dim) if n is not None), default=None)


def read(directory: Path, width: int) -> SentenceFiles:
    """Read the files of a directory whose model has the given width.

    Raises:
        ValueError: a file that is not an object, and each key or module that is not followed.
    """
    settings = _object(directory / "config_sentence_transformers.json", SETTINGS)
    _object(directory / "sentence_bert_config.json", TRANSFORMER)
    prompts, default = _prompts(directory, settings)
    pooling = _pooling(directory, width)
    pooler, dense, cut, normalize = _layers(directory, width, pooling)
    truncate = settings.get("truncate_dim")
    if truncate is not None and (type(truncate) is not int or not 1 <= truncate <= width):
        path = directory / "config_sentence_transformers.json"
        raise ValueError(f"{path}: truncate_dim: expected 1 to {width}, got {truncate!r:.80}")
    similarity = settings.get("similarity_fn_name") or "cosine"
    return SentenceFiles(
        "pooler" if pooler else pooling,
        pooler,
        dense,
        cut,
        truncate,
        prompts,
        default,
        normalize or similarity == "dot",
        similarity,
    )


def _object(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the object of a file, {} if there is no file, with keys of the given values alone."""
    if not path.exists():
        return {}
    value = read_object(path)
    _check(path, value, keys)
    return value


def _check(path: Path, value: dict[str, Any], keys: dict[str, Any]) -> None:
    for key, got in value.items():
        if key not in keys:
            raise ValueError(
                f"{path}: expected only {', '.join(keys)}, got {key:.80}, not followed"
            )
        if keys[key] is not ANY and got not in keys[key]:
            expected = " or ".join(map(repr, keys[key]))
            raise ValueError(f"{path}: {key}: expected {expected}, got {got!r:.80}")


def _prompts(directory: Path, settings: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """Return prompts by name, null being an empty one, and the name of the default prompt."""
    path = directory / "config_sentence_transformers.json"
    given = settings.get("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(t, str | None) for t in given.values()):
        raise ValueError(f"{path}: prompts: expected texts by name, got {given!r:.80}")
    prompts = {name: text or "" for name, text in given.items()}
    default = field(path, settings, "default_prompt_name", str, None)
    if default is not None and default not in prompts:
        known = ", ".join(prompts) or "none"
        raise ValueError(
            f"{path}: default_prompt_name: expected one of the prompts ({known}), got "
            f"{default!r:.80}"
        )
    return prompts, default


def _pooling(directory: Path, width: int) -> str | None:
    path = directory / "1_Pooling" / "config.json"
    if not path.exists():
        return None
    pooling = _object(path, POOLING)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if pooling.get(key, width) != width:
            raise ValueError(f"{path}: {key}: expected {width}, got {pooling[key]!r:.80}")
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    mode = str(pooling.get("pooling_mode") or "+".join(modes))
    named = mode.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
    if named not in POOLINGS:
        raise ValueError(f"{path}: expected one pooling, cls, mean or lasttoken, got {mode!r:.80}")
    return POOLINGS[named]


def _layers(
    directory: Path, width: int, pooling: str | None
) -> tuple[Path | None, tuple[Path, ...], int | None, bool]:
    """Return the folder of the layer that is a pooler, those of linear layers, the width that
    another one cuts to, and whether vectors are normalised, as they are without modules.
    """
    path = directory / "modules.json"
    listed = modules(path) if path.exists() else []
    pooler, cut, dense, now = None, None, list[Path](), width
    for folder, name in listed:
        if name == "Normalize":
            _object(folder / "config.json", NORMALIZE)
        elif name == "Dense" and cut is None:
            layer = _object(folder / "config.json", DENSE)
            if _is_pooler(layer, width) and pooling == "cls" and not pooler:
                pooler = folder
            elif now == width and _is_cut(folder, layer, width):
                cut = int(layer["out_features"])
            elif not pooler and _is_linear(layer, now):
                dense.append(folder)
                now = int(layer["out_features"])
            else:
                raise ValueError(
                    f"{folder}/config.json: expected a tanh layer of {width} x {width} with a "
                    f"bias after cls pooling, or one that cuts vectors, got {layer!r:.200} after "
                    f"{pooling}"
                )
        elif name not in ("Transformer", "Pooling"):
            got = ", ".join(name for _, name in listed)
            raise ValueError(
                f"{path}: expected Transformer, Pooling, at most one Dense and Normalize, got {got}"
            )
    if now != width:
        raise ValueError(
            f"{dense[-1]}/config.json: out_features: expected {width}, the model's width, after "
            f"the last linear layer, got {now}"
        )
    return pooler, tuple(dense), cut, not listed or any(name == "Normalize" for _, name in listed)


def _activation(layer: dict[str, Any]) -> str:
    return str(layer.get("activation_function", "Tanh")).rpartition(".")[2]


def _is_pooler(layer: dict[str, Any], width: int) -> bool:
    sizes = [layer.get("in_features"), layer.get("out_features")]
    return sizes == [width, width] and _activation(layer) == "Tanh" and layer.get("bias", True)


def _is_linear(layer: dict[str, Any], width: int) -> bool:
    """Return whether a layer multiplies vectors of this width by a matrix and does nothing else."""
    plain = _activation(layer) == "Identity" and layer.get("bias", True) is False
    return plain and layer.get("in_features") == width and type(layer.get("out_features")) is int


def _is_cut(folder: Path, layer: dict[str, Any], width: int) -> bool:
    """Return whether a layer keeps the first numbers of a vector and does nothing else."""
    rows, file = layer.get("out_features"), folder / "model.safetensors"
    if _activation(layer) != "Identity" or layer.get("bias", True) or not file.exists():
        return False
    if layer.get("in_features") != width or type(rows) is not int or not 1 <= rows <= width:
        return False
    import torch  # The import takes a second, and command lines are read without it.

    from . import weight_checks

    with open_tensors(file) as tensors:
        weight = tensors.get_tensor("linear.weight")
    weight_checks.check(f"{file}: linear.weight", weight)
    return torch.equal(weight.float(), torch.eye(rows, width))
