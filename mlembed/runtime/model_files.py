"""The gate of model directories: what they may make us open, import and build is a closed list.

`check_files` runs before our own readers open a directory, `check_model` before
sentence-transformers or transformers do. Both read names, JSON and the headers of safetensors only.
Libraries follow more than that: older ones import any class that modules.json names, and a
configuration may name a file, a hub repository of kernels, or a package that builds its layers.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .files import check_object, check_regular, field, read_json, read_object

MOST_FILES = 10_000
MODULE_KEYS = "idx", "name", "path", "type", "kwargs"
# Classes of sentence-transformers, under the names of its versions.
MODULE = re.compile(
    r"sentence_transformers\.(?:models|base\.modules|sentence_transformer\.modules)"
    r"(?:\.[A-Z]\w*|\.[a-z_]+)?\.(Transformer|Pooling|Dense|Normalize|LayerNorm|Dropout|StaticEmbedding)"
)
WEIGHTED = "Transformer", "Dense", "LayerNorm", "StaticEmbedding"
FOLDER = re.compile(r"(?:[A-Za-z0-9_][\w.-]*)?")
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
ACTIVATION = re.compile(
    r"torch\.nn\.(?:modules\.(?:activation|linear)\.)?"
    r"(Tanh|Identity|ReLU|ReLU6|GELU|SiLU|Mish|ELU|SELU|CELU|LeakyReLU|Sigmoid|Softplus|Softsign|Hardtanh)"
)
# Encoders of text whose code is in transformers.
ARCHITECTURES = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
    *("eurobert", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral"),
    *("modernbert", "mpnet", "mt5", "nomic_bert", "phi3", "qwen2", "qwen3", "roberta"),
    *("roberta-prelayernorm", "t5", "xlm-roberta", "xlm-roberta-xl", "xlnet"),
)
TOKENIZER = re.compile(
    r"(?:Albert|Bert|Camembert|Deberta|DebertaV2|DistilBert|Electra|GPT2|GPTNeoX|Gemma|Llama"
    r"|MPNet|PreTrained|Qwen2|Roberta|T5|XLMRoberta|XLNet)Tokenizer(?:Fast)?|TokenizersBackend"
)
# Keys by which a configuration names code, packages, other weights or another model.
FORBIDDEN = (
    *("auto_map", "quantization_config", "compression_config", "transformers_weights"),
    *("fusion_config", "distributed_config", "kernel_config", "processor_class"),
)
ATTENTIONS = "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None
# Files that make a library open another model, or build more than an encoder of text.
FOREIGN = (
    *("adapter_config.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "router_config.json"),
)
DEPTHS = "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"
WIDTHS = (
    *("vocab_size", "hidden_size", "intermediate_size", "embedding_size", "type_vocab_size"),
    *("d_model", "d_ff", "n_embd", "n_inner", "dim", "hidden_dim", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "n_head", "n_heads", "num_heads", "d_kv", "d_inner"),
)
LARGEST = 2**24  # Of every other integer; tables of positions are built before they are compared.
PICKLES = "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"


# ---- files ----


def check_files(directory: Path) -> None:
    """Check that a model directory holds only files and directories of its own.

    Names that begin with a dot are left out, because no library opens them. A directory of the
    hub's cache holds links to the files next to it.

    Raises:
        ValueError: a link that leads out of the directory; a pipe, a socket or a device; more than
            10,000 files; files of an adapter, which would change the vectors.
    """
    root = directory.resolve()
    homes = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    for number, path in enumerate(_entries(directory)):
        if number >= MOST_FILES:
            raise ValueError(
                f"{directory}: expected a model of at most {MOST_FILES:,} files, got more"
            )
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(home) for home in homes):
                raise ValueError(
                    f"{path}: expected a file of the model's directory, got a link to {target}: "
                    "copy the file there"
                )
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode):
            check_regular(path)
    if (adapter := directory / "adapter_config.json").exists():
        raise ValueError(f"{adapter}: expected a model without an adapter: merge it into the model")


def _entries(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(folder) / name for name in [*folders, *names] if name[0] != ".")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, whose tensors are memory-mapped.

    Raises:
        ValueError: not a regular file, a damaged header, a tensor that the file does not have.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None


def shapes(path: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor of a safetensors file. ValueError as in `open_tensors`."""
    with open_tensors(path) as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}


# ---- what libraries read ----


def check_model(directory: Path) -> None:
    """Check that sentence-transformers and transformers can open a directory as data alone.

    Raises:
        ValueError: a module, class, activation or architecture that is not in the lists above; a
            path out of the directory; code of the model's own; pickled weights; sizes beyond those
            of the weights; a file that cannot be read. The message names the file and the key.
    """
    check_files(directory)
    settings = directory / "config_sentence_transformers.json"
    if settings.exists():
        _expect(settings, "model_type", read_object(settings), ("SentenceTransformer", None))
    for folder, kind in modules(directory / "modules.json"):
        dims = [dim for shape in _weights(folder, kind).values() for dim in shape]
        if kind == "Transformer":
            _check_transformer(folder)
        elif (path := folder / "config.json").exists():
            values = read_object(path)
            activation = field(path, values, "activation_function", str, "torch.nn.Tanh")
            if not ACTIVATION.fullmatch(activation):
                raise ValueError(
                    f"{path}: activation_function: expected an activation of torch.nn, got "
                    f"{activation!r:.80}"
                )
            for key in ("in_features", "out_features", "dimension"):
                _check_size(path, key, values, max(dims, default=0))
    check_tokenizer(directory)


def modules(path: Path) -> list[tuple[Path, str]]:
    """Return the folder and the class of each module of a modules.json.

    Without the file, the directory is a Transformer, which sentence-transformers pools itself.

    Raises:
        ValueError: not a list of modules; a class that may do more than compute; a folder that is
            not in the directory.
    """
    if not path.exists():
        return [(path.parent, "Transformer")]
    listed, read = read_json(path), []
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected a list of modules, got {listed!r:.60}")
    for number, module in enumerate(listed):
        where = f"{path}: module {number}"
        module = check_object(module, where)
        kind = str(module.get("type"))
        folder = field(path, module, "path", str, "")
        if odd := module.keys() - {*MODULE_KEYS}:
            raise ValueError(f"{where}: expected only {', '.join(MODULE_KEYS)}, got {min(odd):.80}")
        match = MODULE.fullmatch(kind)
        if not match:
            raise ValueError(
                f"{where}: type: expected a module of sentence_transformers that only computes "
                f"(Transformer, Pooling, Dense, ..), got {kind!r:.80}"
            )
        inside = folder or match[1] in ("Transformer", "StaticEmbedding")
        exists = match[1] not in WEIGHTED or (path.parent / folder).is_dir()
        if not (inside and FOLDER.fullmatch(folder) and exists):
            raise ValueError(f"{where}: path: expected a folder of the model, got {folder!r:.80}")
        if module.get("kwargs"):
            raise ValueError(f"{where}: kwargs: expected none, got {module['kwargs']!r:.80}")
        read.append((path.parent / folder, match[1]))
    return read


def _weights(folder: Path, kind: str) -> dict[str, list[int]]:
    """Return the shapes of a module's weights.

    Raises:
        ValueError: pickled weights alone, an index that names a file elsewhere.
    """
    for index in sorted(folder.glob("*.index.json")):
        for name in field(index, read_object(index), "weight_map", dict).values():
            plain = isinstance(name, str) and SHARD.fullmatch(name)
            if not plain and ".safetensors." in index.name:
                raise ValueError(
                    f"{index}: weight_map: expected names of files beside it, got {name!r:.80}"
                )
    files = sorted(folder.glob("*.safetensors"))
    pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
    if not files and (pickles or kind in WEIGHTED):
        raise ValueError(f"expected weights in safetensors in {folder}, got none")
    return {name: shape for path in files for name, shape in shapes(path).items()}


def _check_transformer(folder: Path) -> None:
    for path in sorted(folder.glob("sentence_*_config.json")):
        values = read_object(path)
        for key in ("model_args", "tokenizer_args", "config_args", "tokenizer_name_or_path"):
            _expect(path, key, values, ({}, None))
        for key in ("model_kwargs", "processor_kwargs", "config_kwargs", "processing_kwargs"):
            _expect(path, key, values, ({}, None))
        _expect(path, "transformer_task", values, ("feature-extraction", None))
        for name, modality in field(path, values, "modality_config", dict, {}).items():
            place = f"{path}: modality_config: {name}"
            if check_object(modality, place).get("method") != "forward":
                raise ValueError(
                    f"{place}: method: expected 'forward', got {modality.get('method')!r:.80}"
                )
    for name in FOREIGN:
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: expected an encoder of text without this file")
    path = folder / "config.json"
    values = read_object(path, strict=False)
    check_architecture(str(path), values)
    tensors = _weights(folder, "Transformer")
    widest = max((dim for shape in tensors.values() for dim in shape), default=0)
    for part in objects(values):
        for key, value in part.items():
            most = len(tensors) if key in DEPTHS else widest if key in WIDTHS else LARGEST
            if "theta" not in key:
                _check_size(path, key, {key: value}, most)
    check_tokenizer(folder)


def check_architecture(place: str, values: dict[str, Any]) -> None:
    """Check a configuration from which transformers builds a model.

    Raises:
        ValueError: it begins with `place`: an architecture that is not in ARCHITECTURES, code of
            the model's own, another attention than those of transformers, a size above LARGEST.
    """
    _expect(place, "model_type", values, ARCHITECTURES)
    for part in objects(values):
        _check_config(place, part)
        for key in part:
            if "theta" not in key:
                _check_size(place, key, part, LARGEST)


def check_tokenizer(directory: Path) -> None:
    """Check the files from which transformers makes a tokenizer. ValueError as in `check_model`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (directory / name).exists():
            read_object(directory / name)
    for name in ("tokenizer_config.json", "config.json"):
        path = directory / name
        values = read_object(path, strict=False) if path.exists() else {}
        _check_config(path, values)
        kind = values.get("tokenizer_class")
        if kind is not None and not (isinstance(kind, str) and TOKENIZER.fullmatch(kind)):
            raise ValueError(
                f"{path}: tokenizer_class: expected a tokenizer of text of transformers, got "
                f"{kind!r:.80}"
            )
    path = directory / "tokenizer_config.json"
    for key, value in (read_object(path) if path.exists() else {}).items():
        # transformers before 5 opens the files that these keys name.
        named = key.endswith(("_file", "_files")) and key != "special_tokens_map_file"
        names = value if isinstance(value, list) else [value]
        inside = all(isinstance(name, str) and FOLDER.fullmatch(name) for name in names)
        if named and value is not None and not inside:
            raise ValueError(f"{path}: {key}: expected a file of the model, got {value!r:.80}")


def _check_config(path: Path | str, values: dict[str, Any]) -> None:
    for key in FORBIDDEN:
        _expect(path, key, values, (None,))
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        _expect(path, key, values, ATTENTIONS)


def _expect(path: Path | str, key: str, values: dict[str, Any], allowed: tuple[Any, ...]) -> None:
    if values.get(key) not in allowed:
        known = ", ".join(repr(value) for value in allowed if value is not None) or "none"
        raise ValueError(f"{path}: {key}: expected {known}, got {values.get(key)!r:.80}")


def _check_size(path: Path | str, key: str, values: dict[str, Any], most: int) -> None:
    value = values.get(key)
    if isinstance(value, int) and value > most:
        raise ValueError(
            f"{path}: {key}: expected at most {most}, as the model's weights have it, got {value}"
        )


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a JSON object and all that are in it."""
    if isinstance(value, dict):
        yield value
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from objects(item)
