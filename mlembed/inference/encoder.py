"""Texts to vectors at any width, depth and vocabulary rank: the one inference path.

Texts go by windows, which bound memory. A window is sorted by length into packs without padding,
and the next one's texts become tokens meanwhile.

Letters: E exits, N texts, D width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data import tokenizer
from ..data.formats import readers
from ..modeling import hf_config, pretrained
from ..modeling.packed_forward import DeviceEncoder, Window, process, progress_bar
from ..runtime.workers import Workers, ahead, device_of
from .vector_files import Quantiser

WINDOW = 32_768  # texts of a window at most
CHARACTERS = 8_000_000  # of a window's texts, but for the last of them
DTYPES = ("float32", "bfloat16", "float16")
# One for all texts or, in a sequence, one for each; None is the whole.
Size = int | None | Sequence[int | None]


@dataclass
class Encoder(DeviceEncoder):
    """A model with its tokenizer. prompts: texts to put before others, by name."""

    prompts: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def load(
        source: str, device: str = "auto", dtype: str = "float32", compile: bool = False
    ) -> "Encoder":
        """From a run or directory that mlembed saved, a checkpoint of an architecture that
        `shapes.from_checkpoint` knows, or a hub id.

        Args:
            device: auto (CUDA where there is one), cpu, cuda or cuda:0 ..
            dtype: of the weights, float32, bfloat16 or float16. Vectors are fp32 of any.
            compile: blocks by torch.compile: a minute once, and faster from there on.

        Raises:
            ValueError: nothing usable there, no such device or dtype.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        where = device_of(device)
        directory = hf_config.resolve(source)
        model = pretrained.load(str(directory), dtype=getattr(torch, dtype))
        text_to_ids = tokenizer.load(directory)
        most = model.cfg.max_position_embeddings
        limit = min(tokenizer.max_length(directory) or most, most)
        if text_to_ids.get_vocab_size() > model.cfg.vocab_size:
            raise ValueError(
                f"{directory}: expected a tokenizer of at most {model.cfg.vocab_size} tokens, "
                f"as the model has, got {text_to_ids.get_vocab_size()}"
            )
        model = model.to(where).eval()
        if compile:
            model.compile_blocks()
        return Encoder(model, text_to_ids, limit, prompts=_prompts(directory))

    from_pretrained = load  # The name that Hugging Face's libraries use.

    def on(self, devices: Sequence[str], compile: bool = False) -> "ParallelEncoder":
        """Copies of this in a process each, one a device: what `with` gives encodes on all of them.

        Args:
            compile: each by torch.compile, as `load` says.

        Raises:
            ValueError: no device, or one that is not there.
        """
        if not devices:
            raise ValueError("device: expected one or more, got none")
        for device in devices:
            device_of(device)
        own = {one.name: getattr(self, one.name) for one in fields(Encoder)}
        return ParallelEncoder(**own, devices=tuple(devices), compile=compile)

    # ---- what is asked for ----

    def exits(
        self,
        texts: Sequence[str],
        exits: Sequence[int] | None = None,
        rank: int | None = None,
        progress: bool = False,
        prompt: str = "",
    ) -> Tensor:
        """Raw vectors of every exit in one pass -> fp32 [E, N, D] on the CPU, in texts' order.

        Nothing is dropped, also while the model is being trained. prompt: put before each text.
        """
        cfg = self.model.cfg
        _sized(texts)
        exits = cfg.exits if exits is None else exits
        rank = _number("rank", rank)
        cfg.check(rank=rank)
        out = torch.empty(len(exits), len(texts), cfg.hidden_size)
        windows = self._windows(texts, prompt, None, None, rank, WINDOW)
        with progress_bar(len(texts), progress) as bar:
            for window, ids in ahead(self.tokenised, windows):
                here = slice(window.first, window.first + len(ids))
                out[:, here] = self.run(ids, list(exits), rank, lambda v, _: v, bar)
        return out

    @overload
    def encode(
        self,
        texts: Sequence[str],
        dim: int | None = None,
        exit: Size = None,
        rank: Size = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        progress: bool = False,
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        texts: Sequence[str],
        dim: Sequence[int | None],
        exit: Size = None,
        rank: Size = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]: ...

    def encode(
        self,
        texts: Sequence[str],
        dim: Size = None,
        exit: Size = None,
        rank: Size = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        progress: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """Unit vectors -> float32 [N, dim]: cut to the first `dim` of exit `exit`, then normalised.

        A text's vector is the same, but for rounding, whatever other texts are with it.

        Args:
            dim, exit, rank: one for all texts or a sequence with one for each; None is the whole.
                Texts of several exits share their packs, those of several ranks do not.
            prompt_name: one of `prompts`, to put before each text. prompt: the text itself instead.
            precision: float32, or what `vectors.Quantiser` makes of it, by these `ranges` [2, dim]
                of int8 and uint8, or by these vectors' own.

        Returns:
            One array; of a sequence of dims a list of arrays [dim], one a text, always fp32.

        Raises:
            ValueError: dim above the width, exit above the depth, rank above the stored one,
                sequences not as long as texts, no such prompt or precision, a text that is none.
        """
        quantise = Quantiser(precision, ranges)
        before = self._prompt(prompt, prompt_name)
        _sized(texts)
        dim, exit, rank = _plain("dim", dim), _plain("exit", exit), _plain("rank", rank)
        dims = self._sizes("dim", dim, len(texts))
        self._sizes("exit", exit, len(texts))
        self._sizes("rank", rank, len(texts))
        mixed = isinstance(dim, list)
        same = dim if isinstance(dim, int) else self.model.cfg.hidden_size
        if mixed and precision != "float32":
            raise ValueError(f"precision: expected float32 of several dims, got {precision}")
        quantise.check(same)
        windows = self._windows(
            texts, before, None if mixed else same, exit, rank, self._most(len(texts))
        )
        with progress_bar(len(texts), progress) as bar:
            parts = list(self._mapped(windows, bar))
        found = np.concatenate(parts) if parts else np.zeros((0, same), np.float32)
        if not mixed:
            return quantise(found)
        cut = (torch.from_numpy(v[: d or None]) for v, d in zip(found, dims.tolist(), strict=True))
        return [F.normalize(v, dim=-1).numpy() for v in cut]

    def encode_query(self, texts: Sequence[str], *args: Any, **options: Any) -> np.ndarray:
        """`encode` behind the prompt "query", where there is one and no other is asked for."""
        return self.encode(texts, *args, **self._role("query", options))

    def encode_document(self, texts: Sequence[str], *args: Any, **options: Any) -> np.ndarray:
        """`encode` behind the prompt "document", where there is one and no other is asked for."""
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
        """As `encode`, of as many texts as come: arrays [n, dim] of at most 32,768 texts, in order.

        Memory does not grow with their number. int8 and uint8 without `ranges` take them from the
        first array; a Quantiser in place of `precision` keeps them.

        Raises:
            ValueError: as `encode`; of arguments, before any text is read.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            got = "one string" if isinstance(texts, str) else type(texts).__name__
            raise ValueError(f"texts: expected an iterable of texts, got {got}")
        quantise = precision if isinstance(precision, Quantiser) else Quantiser(precision, ranges)
        before = self._prompt(prompt, prompt_name)
        dim, exit, rank = _number("dim", dim), _number("exit", exit), _number("rank", rank)
        self.model.cfg.check(dim, exit, rank)
        whole = self.model.cfg.hidden_size if dim is None else dim
        quantise.check(whole)

        def parts() -> Iterator[np.ndarray]:
            windows = self._windows(texts, before, whole, exit, rank, self._most(None))
            with progress_bar(len(texts) if isinstance(texts, Sequence) else None, progress) as bar:
                yield from map(quantise, self._mapped(windows, bar))

        return parts()

    # ---- how it is done ----

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if not isinstance(prompt, str | None):
            raise ValueError(f"prompt: expected a text, got {type(prompt).__name__}")
        if prompt is not None and name is not None:
            raise ValueError("prompt: expected it or prompt_name, got both")
        if name is None:
            return prompt or ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none, as the model has no prompts"
            raise ValueError(f"prompt_name: expected one of {known}, got {name!r}")
        return self.prompts[name]

    def _role(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        return options | {"prompt_name": name if name in self.prompts else None}

    def _sizes(self, name: str, value: Any, count: int) -> np.ndarray:
        """int64 [count], 0 for the whole. ValueError for what the model lacks."""
        if not isinstance(value, list):
            self.model.cfg.check(**{name: value})
            return np.full(count, 0 if value is None else value, dtype=np.int64)
        if len(value) != count:
            raise ValueError(f"{name}: expected one a text, {count}, got {len(value)}")
        for one in set(value):
            self.model.cfg.check(**{name: one})
        return np.array([0 if one is None else one for one in value], dtype=np.int64)

    def _most(self, count: int | None) -> int:
        """Texts of a window, where there are `count` of them in all."""
        return WINDOW

    def _windows(
        self, texts: Iterable[str], prompt: str, dim: int | None, exit: Size, rank: Size, most: int
    ) -> Iterator[Window]:
        """Windows of texts as they come."""
        first = 0
        for some in readers.windows(texts, most, CHARACTERS):
            here = slice(first, first + len(some))
            exits_N, ranks_N = (
                self._sizes(name, size[here] if isinstance(size, list) else size, len(some))
                for name, size in (("exit", exit), ("rank", rank))
            )
            exits_N[exits_N == 0] = self.model.cfg.num_hidden_layers
            given = [prompt + text for text in some] if prompt else some
            yield Window(given, first, exits_N, ranks_N, dim)
            first += len(some)

    def _mapped(self, windows: Iterable[Window], bar: tqdm) -> Iterator[np.ndarray]:
        """Vectors of each window -> fp32 [n, dim or D]."""
        for window, ids in ahead(self.tokenised, windows):
            yield self.vectors(window, ids, bar)


def _sized(texts: Any) -> None:
    """ValueError for what is no sequence of texts."""
    if isinstance(texts, str):
        raise ValueError("texts: expected a sequence of texts, got one string")
    if not hasattr(texts, "__len__"):
        got = type(texts).__name__
        raise ValueError(f"texts: expected a sequence, got {got}; `stream` takes any iterable")


def _number(name: str, size: Any) -> int | None:
    """A whole number of any library, as Python's own. ValueError for another thing."""
    found = size.item() if isinstance(size, np.generic) else size
    if isinstance(size, np.ndarray | Tensor) and size.ndim == 0:
        found = size.item()
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise ValueError(f"{name}: expected a whole number, got {size!r}")
    return found


def _plain(name: str, size: Any) -> int | None | list[int | None]:
    """One for all texts, or a list with one for each, of what lists and arrays there are."""
    several = hasattr(size, "__len__") and hasattr(size, "__getitem__")
    if several and getattr(size, "ndim", 1) > 0 and not isinstance(size, str | bytes | dict):
        return [_number(name, one) for one in size]
    return _number(name, size)


def _prompts(directory: Path) -> dict[str, str]:
    """By name, as sentence-transformers keeps them; null is an empty one."""
    name = "config_sentence_transformers.json"
    found = tokenizer.settings(directory, name).get("prompts") or {}
    if not isinstance(found, dict) or any(not isinstance(x, str | None) for x in found.values()):
        raise ValueError(f"{directory / name}: prompts: expected texts by name, got {found}")
    return {key: text or "" for key, text in found.items()}


# ---- several devices ----


@dataclass
class ParallelEncoder(Encoder):
    """An encoder whose windows are dealt to processes, one a device; they live within `with`.

    `exits`, of all exits at once, is still of the model it was made from, in this process.

    Raises:
        ChildProcessError: a process died, or failed as no text can make it.
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
        made_of = [(device, *shared) for device in self.devices]
        self.workers = Workers(process, made_of, self.devices).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.workers is not None:
            self.workers.__exit__()
        self.workers = None

    def _most(self, count: int | None) -> int:
        # Four windows a device, so that all are done at about the same time.
        shared = WINDOW // 2 if count is None else -(-count // (4 * len(self.devices)))
        return max(1, min(WINDOW, shared))

    def _mapped(self, windows: Iterable[Window], bar: tqdm) -> Iterator[np.ndarray]:
        if self.workers is None:
            raise ValueError("encoder: expected `with encoder.on(devices)`, got a call outside it")
        for found in self.workers.map(windows):
            bar.update(len(found))
            yield found
