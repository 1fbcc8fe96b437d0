"""A teacher that mlembed's trunk encodes, with the vectors of its sentence-transformers modules.

Packs have no padding, so a teacher costs about the forward of a student of its shape. `load` takes
a directory only if shape, modules and tokenizer promise the vectors that sentence-transformers
returns, up to rounding; `SentenceTeacher` takes all others.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from ... import config
from ...config.choices import Pooling
from ...data import tokenizer
from ...data.packing import PackedBatch
from ...modeling import hf_config, pretrained, sentence_files
from ...modeling.automodel.architecture import OtherVectorsError
from ...modeling.automodel.choose import trunk_of
from ...modeling.packed_forward import DeviceEncoder
from ...modeling.sentence_files import SentenceFiles
from ...runtime import model_files
from ...runtime.files import field, read_object
from .sentence_teacher import check_pooling, note_of

# The Dense layers are a pooler or linear layers, and one that cuts vectors.
MODULES = re.compile(r"Transformer Pooling( Dense)*( Normalize)?")
# Texts on which two readers of a tokenizer's files differ: capitals, accents, spaces, digits,
# several scripts, an empty text, and one that is cut.
PROBES = (
    *("", "a", " Two  Words\n", "İSTANBUL, Łódź, Straße, e\u0301", "раз ДВА", "比利时、東京"),
    *("নমস্কার ১২", "3.14 http://x.org/a_b", "one two " * 50 + "three"),
)
SHORT = 24  # tokens to which a probe is cut


class UnsupportedError(Exception):
    """A directory that the trunk does not encode like sentence-transformers; the text says why."""


@dataclass
class PackedTeacher:
    """A trunk, and the modules after it: they take `cut` coordinates of its vectors, normalise them
    or not, and take `width` coordinates of the result.

    note: tells the pooling of a directory that does not, "" of others.
    """

    trunk: DeviceEncoder
    pipeline: str
    cut: int
    normalize: bool
    width: int
    note: str = ""

    @staticmethod
    def load(
        directory: Path,
        pooling: Pooling | None,
        device: torch.device,
        bf16: bool = False,
        compile: bool = False,
    ) -> "PackedTeacher":
        """Load a directory with fp32 weights.

        Args:
            pooling: of a directory that does not say how it is pooled.
            bf16: encode under bf16 autocast, as always on CUDA.
            compile: compile the blocks.

        Raises:
            UnsupportedError: sentence-transformers has to encode it.
            ValueError: the directory is pooled in another way; missing or misshapen weights.
        """
        cfg, files, note = _shape(directory, pooling)
        _check_names(directory, cfg)
        tokens, most = _tokenizer(directory, cfg)
        try:
            model = pretrained.load(str(directory), cfg)
        except OtherVectorsError as error:
            raise UnsupportedError(_clause(error, directory)) from None
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from None
        model = model.to(device).eval().requires_grad_(False)
        if compile:
            model.compile_blocks()
        trunk = DeviceEncoder(model, tokens, most, bf16=bf16 or device.type == "cuda")
        cut = files.cut or cfg.hidden_size
        width = min(cut, files.truncate_dim or cut)
        pipeline = _pipeline(cfg, files)
        return PackedTeacher(trunk, pipeline, cut, files.normalize, width, note)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.trunk.model.device

    @property
    def encoder(self) -> str:
        """The clause that tells who encodes, and why."""
        precision = "bf16" if self.trunk.bf16 else "fp32"
        return f"encoded by mlembed in {precision} packs, because it supports the model"

    def encode(self, texts: list[str], bar: tqdm) -> Tensor:
        """Return fp32 [N, width] of one or more texts on the model's device."""
        trunk = self.trunk
        ids = tokenizer.tokenize(trunk.tokenizer, texts, trunk.max_length)
        exits = [trunk.model.cfg.num_hidden_layers]
        return trunk.run(ids, exits, None, lambda x, _: self._modules(x), bar, to_host=False)[0]

    def read(self, pack: PackedBatch, layer: int) -> tuple[Tensor, Tensor]:
        """Return a pack's vectors fp32 [1, N, width], in its order, and its hidden states [T, D]
        after a layer; the pack has the teacher's tokens.
        """
        trunk, states = self.trunk, []

        def keep(x_TD: Tensor) -> Tensor:
            states.append(x_TD)
            return x_TD

        exits = [trunk.model.cfg.num_hidden_layers]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=trunk.bf16):
            vectors_END = trunk.model(pack, exits=exits, tap=(layer, keep))
        return self._modules(vectors_END), states[0]

    def _modules(self, vectors_END: Tensor) -> Tensor:
        vectors_END = vectors_END[..., : self.cut]
        if self.normalize:
            vectors_END = F.normalize(vectors_END, dim=-1)
        return vectors_END[..., : self.width]


# ---- what the trunk supports ----


def _shape(directory: Path, pooling: Pooling | None) -> tuple[config.Model, SentenceFiles, str]:
    """Return the trunk's shape with its pooling, the modules after it, and a note on the pooling.

    Without modules.json, sentence-transformers reads no settings of its own. It pools the last
    token of a causal language model and the mean of others.
    """
    note = ""
    if not (directory / "config.json").exists():
        raise UnsupportedError("its folder has no config.json")
    try:
        cfg = hf_config.from_checkpoint(directory, config.Model())
        files = _modules(directory, cfg.hidden_size)
        ours = (directory / hf_config.NESTING).is_file()
        stored = files.pooling or (cfg.pooling if ours else None)
        if stored is None:
            hf = read_object(directory / "config.json", strict=False)
            names = field(directory / "config.json", hf, "architectures", list, None) or [""]
            generates = str(names[0]).endswith("ForCausalLM") and hf.get("is_causal", True)
            usual: Pooling = "last" if generates else "mean"
            note = "" if pooling else note_of(directory, usual)
            cfg = replace(cfg, pooling=pooling or usual)
        elif ours and stored != cfg.pooling:
            raise UnsupportedError(f"{hf_config.NESTING} says {cfg.pooling} and 1_Pooling {stored}")
        # A merged table gives the vectors of its factors.
        cfg = replace(cfg, ranks=())
    except ValueError as error:
        raise UnsupportedError(_clause(error, directory)) from None
    if stored is not None:
        check_pooling(directory, stored, pooling)
    return cfg, files, note


def _clause(error: Exception, directory: Path) -> str:
    """Return the first 200 letters of an error, with files named relative to the directory."""
    return " ".join(str(error).replace(f"{directory}/", "").split())[:200]


def _modules(directory: Path, width: int) -> SentenceFiles:
    """Return the settings of the modules after the trunk.

    Raises:
        UnsupportedError: other modules, or modules in another order.
        ValueError: a file that `sentence_files.read` rejects.
    """
    path = directory / "modules.json"
    if not path.exists():
        return SentenceFiles(normalize=False)
    listed, files = model_files.modules(path), sentence_files.read(directory, width)
    folders, names = zip(*listed, strict=True)
    usual = folders[:2] == (directory, directory / "1_Pooling") and files.pooling
    pooler_first = files.pooler in (None, *folders[2:3])
    if not usual or not pooler_first or not MODULES.fullmatch(" ".join(names)):
        raise UnsupportedError(f"modules.json lists {', '.join(names)}")
    for other in directory.glob("sentence_*_config.json"):
        if other.name != tokenizer.SENTENCES:
            raise UnsupportedError(f"it has {other.name}")
    # `files.normalize` is about mlembed's vectors.
    return replace(files, normalize=names[-1] == "Normalize")


def _pipeline(cfg: config.Model, files: SentenceFiles) -> str:
    """Return the modules in order, like `SentenceTeacher.pipeline`."""
    mode = {"last": "lasttoken", "pooler": "cls"}.get(cfg.pooling, cfg.pooling)
    dense = (cfg.pooling == "pooler") + len(files.dense) + (files.cut is not None)
    after = ["Dense"] * dense + ["Normalize"] * files.normalize
    return ", ".join(["Transformer", f"Pooling ({mode})", *after])


def _check_names(directory: Path, cfg: config.Model) -> None:
    """Raise UnsupportedError for a weight that the trunk does not have.

    Missing weights are errors of `pretrained.load`; transformers would draw random ones.
    """
    try:
        with torch.device("meta"):
            model: Any = trunk_of(cfg)
    except ValueError as error:
        raise UnsupportedError(_clause(error, directory)) from None
    ours = model.state_dict().keys() | {"pooler.weight", "pooler.bias"}
    files = sorted(directory.glob("model*.safetensors"))
    names = [name for file in files for name in model_files.shapes(file)]
    auto = cfg.style == "transformers"
    owned = model.own_names(names) if auto else {n: pretrained.own_name(n) for n in names}
    for name, own in owned.items():
        if own not in (None, *ours):
            raise UnsupportedError(f"mlembed's {cfg.style} does not have the weight {name}")


def _tokenizer(directory: Path, cfg: config.Model) -> tuple[Tokenizer, int]:
    """Return the tokenizer and the most tokens of a text, special tokens included.

    Both are those of sentence-transformers: `max_seq_length` decides, or else the tokenizer's limit
    and the model's positions.

    Raises:
        UnsupportedError: a tokenizer that cannot be read, or that transformers reads differently.
    """
    from transformers import AutoTokenizer

    try:
        path, settings = directory / tokenizer.SENTENCES, {}
        if (directory / "modules.json").exists():
            settings = tokenizer.settings(directory, tokenizer.SENTENCES)
        asked = field(path, settings, "max_seq_length", int, None)
        lower = field(path, settings, "do_lower_case", bool, False)
        options = {} if asked is None else {"model_max_length": asked}
        theirs = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
        most = int(theirs.model_max_length)
        if asked is None or cfg.style == "bert":
            most = min(most, cfg.max_position_embeddings)
        short = min(most, SHORT)
        ours = tokenizer.load(directory)
        got = tokenizer.tokenize(ours, PROBES, short)
        read = [probe.lower() if lower else probe for probe in PROBES]
        want = theirs(read, truncation=True, max_length=short)["input_ids"]
    # The libraries raise many kinds of errors for a tokenizer that they cannot read.
    except Exception as error:
        raise UnsupportedError(f"of its tokenizer: {_clause(error, directory)}") from None
    for probe, one, other in zip(PROBES, got, want, strict=True):
        if one.tolist() != other:
            raise UnsupportedError(f"transformers tokenises {probe[:20]!r} differently")
    if ours.get_vocab_size() > cfg.vocab_size:
        raise UnsupportedError(f"its tokenizer has more than {cfg.vocab_size} tokens")
    return ours, most
