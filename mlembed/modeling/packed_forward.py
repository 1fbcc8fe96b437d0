"""Encode one window of texts on one device, in packs of texts of similar length without padding.

On CUDA, the host waits for the device only at the end of a window.

Letters: E exits, N texts, D width.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from .. import config
from ..data import tokenizer
from ..data.packing import PackedBatch, budgeted, pack
from ..runtime import transfer
from ..runtime.workers import ahead, device_of
from .automodel.choose import trunk_of
from .transformer import Transformer, mode

# Tokens x width of a pack on a CPU: larger activations leave its caches (bench/LOG.md, encode).
CPU_NUMBERS = 2048 * 384


@dataclass(frozen=True)
class Window:
    """Texts to encode together, prompts included, with each one's exit and rank (0: stored rank).

    first: index of the first text. dim: width of all vectors, which are then normalised; None for
    raw vectors of full width.
    """

    texts: list[str]
    first: int
    exits_N: np.ndarray
    ranks_N: np.ndarray
    dim: int | None


@dataclass
class DeviceEncoder:
    """A model with its tokenizer.

    max_length: tokens per text, EOS included. max_tokens: tokens per packed batch; on a CPU fewer,
    depending on the model's width. bf16: autocast, like in training; vectors stay fp32.
    """

    model: Transformer
    tokenizer: Tokenizer
    max_length: int
    max_tokens: int = 16_384
    bf16: bool = False

    def tokenised(self, window: Window) -> tuple[Window, list[np.ndarray]]:
        """Return the window and its texts' tokens.

        Raises ValueError, with the text's index, if a text is not valid Unicode.
        """
        texts, first = window.texts, window.first
        return window, tokenizer.tokenize(self.tokenizer, texts, self.max_length, first)

    def vectors(self, window: Window, ids: list[np.ndarray], bar: tqdm) -> np.ndarray:
        """Return fp32 [N, dim] of a window's texts, each at its own exit and rank."""
        width = self.model.cfg.hidden_size if window.dim is None else window.dim
        out = np.empty((len(ids), width), np.float32)
        for rank in np.unique(window.ranks_N).tolist():
            rows_N = np.flatnonzero(window.ranks_N == rank)
            depths = window.exits_N[rows_N]
            exits, places = np.unique(depths, return_inverse=True)

            def select(
                vectors_END: Tensor, rows: np.ndarray, places: np.ndarray = places
            ) -> Tensor:
                if len(vectors_END) > 1:
                    exit_N = transfer.moved(torch.from_numpy(places[rows]), vectors_END.device)
                    text_N = torch.arange(len(rows), device=exit_N.device)
                    vectors_END = vectors_END[exit_N, text_N][None]
                if window.dim is None:
                    return vectors_END
                return F.normalize(vectors_END[..., : window.dim], dim=-1)

            some = [ids[row] for row in rows_N]
            mixed = depths if len(exits) > 1 else None
            out[rows_N] = self.run(some, exits.tolist(), rank or None, select, bar, mixed)[
                0
            ].numpy()
        return out

    @torch.inference_mode()
    def run(
        self,
        ids: list[np.ndarray],
        exits: list[int],
        rank: int | None,
        select: Callable[[Tensor, np.ndarray], Tensor],
        bar: tqdm,
        depths: np.ndarray | None = None,
        to_host: bool = True,
    ) -> Tensor:
        """Return `select` of all packs, fp32 [K, n, d] on the CPU, in the order of ids.

        On CUDA the host waits only at the end: a thread makes and pins packs, and results are
        copied to pinned memory in the order of the packs.

        Args:
            select: called with a pack's vectors [E, n, D] and the indices of its texts.
            depths: last layer of each text, if they differ.
            to_host: without it, results stay on the model's device and the host does not wait.
        """
        device = self.model.device
        cuda = device.type == "cuda"
        to_host &= cuda
        lengths = np.array([len(text) for text in ids], dtype=np.int64)
        most = self.max_tokens
        if not cuda:
            most = min(most, max(512, CPU_NUMBERS // self.model.cfg.hidden_size))
        packs = budgeted(lengths, most)
        if depths is not None:
            packs = [rows[np.lexsort((lengths[rows], -depths[rows]))] for rows in packs]

        def packed(rows: np.ndarray) -> tuple[np.ndarray, PackedBatch]:
            batch = pack([ids[row] for row in rows], None if depths is None else depths[rows])
            return rows, transfer.pinned(batch) if cuda else batch

        half = torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()
        out, begin = torch.empty(0), 0
        with half, mode(self.model, training=False):
            for rows, batch in ahead(packed, packs) if cuda else map(packed, packs):
                vectors_END = self.model(batch.to(device), exits=exits, rank=rank)
                selected_KND = select(vectors_END.float(), rows)
                if not begin:
                    shape = len(selected_KND), len(ids), selected_KND.shape[-1]
                    where = torch.device("cpu") if to_host else device
                    out = torch.empty(shape, pin_memory=to_host, device=where)
                for target, vectors in zip(out, selected_KND, strict=True):
                    target[begin : begin + len(rows)].copy_(vectors, non_blocking=True)
                begin += len(rows)
                bar.update(len(rows))
        if to_host:
            torch.cuda.synchronize(device)
        ordered = torch.empty_like(out, pin_memory=False)
        ordered[:, transfer.moved(torch.from_numpy(np.concatenate(packs)), out.device)] = out
        return ordered


def progress_bar(count: int | None, progress: bool) -> tqdm:
    """Return a bar for `count` texts, None if unknown, shown only if `progress`."""
    return tqdm(total=count, desc="encoding", unit=" texts", disable=not progress, leave=False)


def process(
    device: str,
    cfg: config.Model,
    weights: dict[str, Tensor],
    options: Any,
    threads: int,
    compile: bool,
) -> Callable[[Window], np.ndarray]:
    """Return a worker's encoder of windows, which tokenises one while it encodes another."""
    target = device_of(device)
    if target.type == "cpu":
        torch.set_num_threads(threads)
    with torch.device("meta"):
        model = trunk_of(cfg)
    model.load_state_dict(weights, assign=True)
    model = model.to(target).eval()
    if compile:
        model.compile_blocks()
    encoder = DeviceEncoder(**options | {"model": model})
    # tqdm's default lock is a semaphore, which would leak when the process is killed.
    tqdm.set_lock(threading.RLock())
    reading, encoding = threading.Lock(), threading.Lock()
    bar = progress_bar(None, False)

    def run(window: Window) -> np.ndarray:
        with reading:
            window, ids = encoder.tokenised(window)
        with encoding:
            return encoder.vectors(window, ids, bar)

    return run
