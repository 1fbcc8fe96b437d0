"""Encode texts to vectors at any width, depth and vocabulary rank: the one inference path.

Texts pass in windows, which bound memory. A window is sorted by length into packs without padding,
while the next window is tokenised.

Letters: E exits, N texts, D width.
"""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..config.choices import Pooling
from ..data import tokenizer
from ..data.formats.text_reader import windows
from ..modeling import hf_config, pretrained, serving
from ..modeling.packed_forward import DeviceEncoder, Window, process, progress_bar
from ..runtime import files
from ..runtime.workers import Workers, ahead, device_of
from .vector_files import Quantiser, check_unit

# The most texts of a window, and the number of characters that ends one early.
WINDOW = 32_768
CHARACTERS = 8_000_000
DTYPES = ("float32", "bfloat16", "float16")

# dim, exit and vocabulary rank; None is the largest. A plain table has no rank.
Size = tuple[int | None, int | None, int | None]
FullSize = tuple[int, int, int | None]
FULL: Size = (None, None, None)
# One number for all texts, or a sequence with one for each.
PerText = int | None | Sequence[int | None]


@dataclass(frozen=True)
class GridVectors:
    """Vectors of the same texts at several sizes.

    raw: fp32 [E, N, D] by rank. exits: the depths of those E, by rank.
    """

    raw: dict[int | None, Tensor]
    exits: dict[int | None, list[int]]

    def __getitem__(self, size: FullSize) -> Tensor:
        """Return unit vectors fp32 [N, dim] of one size."""
        dim, exit, rank = size
        return F.normalize(self.raw[rank][self.exits[rank].index(exit), :, :dim], dim=-1)

    def to(self, device: torch.device) -> "GridVectors":
        return replace(self, raw={rank: raw.to(device) for rank, raw in self.raw.items()})


@dataclass
class Encoder(DeviceEncoder):
    """A model with its tokenizer.

    The fields below and `max_length` are those of `Serving`.
    """

    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    width: int | None = None
    normalize: bool = True
    similarity: str = "cosine"

    @staticmethod
    def load(
        source: str,
        device: str = "auto",
        dtype: str = "float32",
        compile: bool = False,
        pooling: Pooling | None = None,
        say: Callable[[str], object] = warnings.warn,
    ) -> "Encoder":
        """Load a run, a directory that mlembed saved, a checkpoint of an architecture that
        `hf_config.from_checkpoint` supports, or a Hub id.

        Args:
            device: auto (CUDA if available), cpu, cuda or cuda:0 ..
            dtype: dtype of the weights: float32, bfloat16 or float16. Vectors are always fp32.
            compile: compile the blocks with torch.compile, which takes a minute once.
            pooling: of a directory that does not say how it is pooled.
            say: gets a sentence that tells the pooling, if neither directory nor `pooling` does.

        Raises:
            ValueError: nothing usable at `source`, an unavailable device, an unknown dtype, another
                pooling than the directory's.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        where = device_of(device)
        directory = hf_config.resolve(source)
        cfg = hf_config.with_pooling(directory, pooling, say)
        model = pretrained.load(str(directory), cfg, dtype=getattr(torch, dtype))
        text_to_ids = tokenizer.load(directory)
        if text_to_ids.get_vocab_size() > model.cfg.vocab_size:
            raise ValueError(
                f"{directory}: expected a tokenizer of at most {model.cfg.vocab_size} tokens, "
                f"the model's vocabulary, got {text_to_ids.get_vocab_size()}"
            )
        model = model.to(where).eval()
        if compile:
            model.compile_blocks()
        return Encoder(model, text_to_ids, **vars(serving.read(directory, cfg)))

    @property
    def default_prompt(self) -> str:
        """The prompt of texts for which none is asked for."""
        return self.prompts.get(self.default_prompt_name or "", "")

    from_pretrained = load  # The name that Hugging Face's libraries use.

    def on(self, devices: Sequence[str], compile: bool = False) -> "ParallelEncoder":
        """Return an encoder that, inside `with`, runs a copy of this one in a process per device.

        Args:
            compile: compile each copy with torch.compile, like `load`.

        Raises:
            ValueError: an empty list, or an unavailable device.
        """
        if not devices:
            raise ValueError("device: expected one or more, got none")
        for device in devices:
            device_of(device)
        settings = {one.name: getattr(self, one.name) for one in fields(Encoder)}
        return ParallelEncoder(**settings, devices=tuple(devices), compile=compile)

    def full_size(self, size: Size = FULL) -> FullSize:
        """Replace every None by the largest, or by the width that the model's directory asks for.

        Raises:
            ValueError: a size that the model lacks.
        """
        cfg = self.model.cfg
        cfg.check(*size)
        dim, exit, rank = size
        largest = cfg.ranks[-1] if cfg.ranks else None
        return dim or self.width or cfg.hidden_size, exit or cfg.num_hidden_layers, rank or largest

    # ---- several sizes ----

    def encode_exits(
        self,
        texts: Sequence[str],
        exits: Sequence[int] | None = None,
        rank: int | None = None,
        progress: bool = False,
        prompt: str | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return raw vectors of several exits from one pass, fp32 [E, N, D] on the CPU.

        Dropout is off, also while the model is being trained.

        Args:
            exits: depths; those of training by default.
            prompt: text to put before each text, None for the default prompt.
            out: fp32 [E, N, D] to write to.
        """
        cfg, prompt = self.model.cfg, self._prompt(prompt, None)
        _check_texts(texts)
        exits = cfg.exits if exits is None else exits
        rank = _number("rank", rank)
        cfg.check(rank=rank)
        if out is None:
            out = torch.empty(len(exits), len(texts), cfg.hidden_size)
        whole = np.int64(0)
        windows = self._windows(texts, prompt, None, whole, np.int64(rank or 0), WINDOW)
        with progress_bar(len(texts), progress) as bar:
            for window, ids in ahead(self.tokenised, windows):
                rows = slice(window.first, window.first + len(ids))
                out[:, rows] = self.run(ids, list(exits), rank, lambda v, _: v, bar)
        return out

    def encode_grid(
        self,
        texts: Sequence[str],
        sizes: Iterable[FullSize],
        progress: bool = False,
        prompt: str | None = None,
        on_disk: bool = False,
    ) -> GridVectors:
        """Encode texts at several sizes, in one pass for each vocabulary rank.

        Args:
            sizes: (dim, exit, rank) without None, see `full_size`.
            prompt: text to put before each text, None for the default prompt.
            on_disk: hold the vectors in an unnamed temporary file instead of memory.

        Raises:
            ValueError: a size that the model lacks.
        """
        exits: dict[int | None, set[int]] = {}
        for size in sizes:
            self.model.cfg.check(*size)
            exits.setdefault(size[2], set()).add(size[1])
        raw = {}
        for rank, depths in exits.items():
            shape = len(depths), len(texts), self.model.cfg.hidden_size
            out = torch.from_numpy(disk_array(shape)) if on_disk else None
            raw[rank] = self.encode_exits(texts, sorted(depths), rank, progress, prompt, out)
        return GridVectors(raw, {rank: sorted(depths) for rank, depths in exits.items()})

    # ---- one size for each text ----

    def encode(
        self,
        texts: Sequence[str],
        dim: int | None = None,
        exit: PerText = None,
        rank: PerText = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Return unit vectors float32 [N, dim]: the first `dim` numbers of an exit, normalised.

        A text's vector does not depend on the other texts, up to rounding.

        Args:
            dim: width of all vectors; None is the full one. `encode_widths` takes one a text.
            exit, rank: one for all texts or a sequence with one for each; None is the largest.
                Texts of several exits share packs, texts of several ranks do not.
            prompt_name: name of one of `prompts`, to put before each text.
            prompt: text to put before each text, instead of a named one.
            precision, ranges: number format, see `vector_files.Quantiser`; int8 and uint8 without
                `ranges` take them from these vectors.

        Raises:
            ValueError: a size that the model lacks, a sequence of another length than `texts`, an
                unknown prompt or precision, a text that is not valid Unicode, a vector that is not
                of length one, because its numbers are zero or not finite.
        """
        quantise = Quantiser(precision, ranges)
        prompt = self._prompt(prompt, prompt_name)
        _check_texts(texts)
        width = self.full_size((_number("dim", dim), None, None))[0]
        quantise.check(width)
        return quantise(check_unit(self._vectors(texts, prompt, width, exit, rank, progress)))

    def encode_widths(
        self,
        texts: Sequence[str],
        dims: Sequence[int | None],
        exit: PerText = None,
        rank: PerText = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """Return a unit vector float32 [dim] for each text, each of the width that `dims` asks for.

        The other arguments and errors are those of `encode`.
        """
        prompt = self._prompt(prompt, prompt_name)
        _check_texts(texts)
        dims_N = self._per_text("dim", dims, len(texts)).tolist()
        vectors = torch.from_numpy(self._vectors(texts, prompt, None, exit, rank, progress))
        cuts = enumerate(zip(vectors, dims_N, strict=True))
        return [
            check_unit(F.normalize(vector[None, : dim or None], dim=-1).numpy(), [i])[0]
            for i, (vector, dim) in cuts
        ]

    def encode_query(self, texts: Sequence[str], *args: Any, **options: Any) -> np.ndarray:
        """`encode` with the prompt "query", if the model has it and no other prompt is given."""
        return self.encode(texts, *args, **self._role("query", options))

    def encode_document(self, texts: Sequence[str], *args: Any, **options: Any) -> np.ndarray:
        """`encode` with the prompt "document", if the model has it and no other prompt is given."""
        return self.encode(texts, *args, **self._role("document", options))

    def stream(
        self,
        texts: Iterable[str],
        dim: int | None = None,
        exit: int | None = None,
        rank: int | None = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: str | Quantiser = "float32",
        ranges: np.ndarray | None = None,
        progress: bool = False,
    ) -> Iterator[np.ndarray]:
        """Encode any number of texts: yield arrays [n, dim] of at most 32,768 texts, in order.

        Memory does not grow with the number of texts. int8 and uint8 without `ranges` take them
        from the first array; a Quantiser passed as `precision` keeps them.

        Raises:
            ValueError: like `encode`; for arguments before any text is read.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            got = "one string" if isinstance(texts, str) else type(texts).__name__
            raise ValueError(f"texts: expected an iterable of texts, got {got}")
        quantise = precision if isinstance(precision, Quantiser) else Quantiser(precision, ranges)
        before = self._prompt(prompt, prompt_name)
        dim, exit, rank = _number("dim", dim), _number("exit", exit), _number("rank", rank)
        width = self.full_size((dim, exit, rank))[0]
        quantise.check(width)

        def parts() -> Iterator[np.ndarray]:
            sizes = np.int64(exit or 0), np.int64(rank or 0)
            windows = self._windows(texts, before, width, *sizes, self._window_limit(None))
            count = 0
            with progress_bar(len(texts) if isinstance(texts, Sequence) else None, progress) as bar:
                for vectors in self._mapped(windows, bar):
                    yield quantise(check_unit(vectors, range(count, count + len(vectors))))
                    count += len(vectors)

        return parts()

    # ---- arguments ----

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if not isinstance(prompt, str | None):
            raise ValueError(f"prompt: expected a string, got {type(prompt).__name__}")
        if prompt is not None and name is not None:
            raise ValueError("prompt: expected prompt or prompt_name, got both")
        if name is None:
            return self.default_prompt if prompt is None else prompt
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none, as the model has no prompts"
            raise ValueError(f"prompt_name: expected one of {known}, got {name!r}")
        return self.prompts[name]

    def _role(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        return options | {"prompt_name": name if name in self.prompts else None}

    def _per_text(self, name: str, size: Any, count: int) -> Any:
        """Return sizes from a list or array, int64 [count], or from one number, int64 [].

        0 stands for None. Raises ValueError for a size that the model lacks.
        """
        several = hasattr(size, "__len__") and not isinstance(size, str | bytes | dict)
        several = several and getattr(size, "ndim", 1) > 0
        sizes = [_number(name, one) for one in (size if several else [size])]
        if several and len(sizes) != count:
            raise ValueError(f"{name}: expected one per text, {count}, got {len(sizes)}")
        for one in set(sizes):
            self.model.cfg.check(**{name: one})
        sizes_N = np.array([one or 0 for one in sizes], dtype=np.int64)
        return sizes_N if several else sizes_N[0]

    # ---- windows ----

    def _vectors(
        self,
        texts: Sequence[str],
        prompt: str,
        dim: int | None,
        exit: PerText,
        rank: PerText,
        progress: bool,
    ) -> np.ndarray:
        """Return vectors of all texts, fp32 [N, dim]; raw ones [N, D] without a dim."""
        count = len(texts)
        sizes = self._per_text("exit", exit, count), self._per_text("rank", rank, count)
        windows = self._windows(texts, prompt, dim, *sizes, self._window_limit(count))
        with progress_bar(count, progress) as bar:
            parts = list(self._mapped(windows, bar))
        width = self.model.cfg.hidden_size if dim is None else dim
        return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)

    def _window_limit(self, count: int | None) -> int:
        """Return the most texts of a window, if there are `count` texts in all."""
        return WINDOW

    def _windows(
        self,
        texts: Iterable[str],
        prompt: str,
        dim: int | None,
        exits: Any,
        ranks: Any,
        most: int,
    ) -> Iterator[Window]:
        """Yield texts in windows. exits, ranks: int64 [N], or [] for all; 0 is the largest."""
        first = 0
        for some in windows(texts, most, CHARACTERS):
            rows = slice(first, first + len(some))
            exits_N, ranks_N = (
                size[rows] if size.ndim else np.full(len(some), size) for size in (exits, ranks)
            )
            exits_N = np.where(exits_N == 0, self.model.cfg.num_hidden_layers, exits_N)
            prompted = [prompt + text for text in some] if prompt else some
            yield Window(prompted, first, exits_N, ranks_N, dim)
            first += len(some)

    def _mapped(self, windows: Iterable[Window], bar: tqdm) -> Iterator[np.ndarray]:
        """Yield the vectors of each window, fp32 [n, dim or D]."""
        for window, ids in ahead(self.tokenised, windows):
            yield self.vectors(window, ids, bar)


def disk_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return an fp32 array in an unnamed temporary file, which goes with the array.

    Raises:
        ValueError: the disk is full.
    """
    if 0 in shape:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile() as file:
        size = 4 * math.prod(shape)
        try:
            files.reserve(file, size)
        except OSError as error:
            place = tempfile.gettempdir()
            raise ValueError(f"{place}: no room for {size:,} bytes: {error.strerror}") from None
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


def _check_texts(texts: Any) -> None:
    """ValueError for anything but a sequence of texts."""
    if isinstance(texts, str):
        raise ValueError("texts: expected a sequence of texts, got one string")
    if not hasattr(texts, "__len__"):
        got = type(texts).__name__
        raise ValueError(f"texts: expected a sequence, got {got}; `stream` takes any iterable")


def _number(name: str, size: Any) -> int | None:
    """Return a whole number of any library as Python's own. ValueError for anything else."""
    number = size.item() if isinstance(size, np.generic) else size
    if isinstance(size, np.ndarray | Tensor) and size.ndim == 0:
        number = size.item()
    if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
        raise ValueError(f"{name}: expected a whole number, got {size!r}")
    return number


# ---- several devices ----


@dataclass
class ParallelEncoder(Encoder):
    """An encoder that deals windows to processes, one per device, which live inside `with`.

    `encode_exits` and `encode_grid` run in this process.

    Raises:
        ChildProcessError: a process died or failed for a reason that no text can cause.
    """

    devices: tuple[str, ...] = ()
    compile: bool = False
    workers: Workers | None = None

    def __enter__(self) -> Self:
        weights = {name: x.detach().cpu() for name, x in self.model.state_dict().items()}
        threads = max(1, torch.get_num_threads() // len(self.devices))
        options = {one.name: getattr(self, one.name) for one in fields(DeviceEncoder)} | {
            "model": None
        }
        shared = self.model.cfg, weights, options, threads, self.compile
        arguments = [(device, *shared) for device in self.devices]
        self.workers = Workers(process, arguments, self.devices).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.workers is not None:
            self.workers.__exit__()
        self.workers = None

    def _window_limit(self, count: int | None) -> int:
        # With four windows per device all devices finish at about the same time.
        share = WINDOW // 2 if count is None else -(-count // (4 * len(self.devices)))
        return max(1, min(WINDOW, share))

    def _mapped(self, windows: Iterable[Window], bar: tqdm) -> Iterator[np.ndarray]:
        if self.workers is None:
            raise ValueError("encoder: expected `with encoder.on(devices)`, got a call outside it")
        for vectors in self.workers.map(windows):
            bar.update(len(vectors))
            yield vectors
