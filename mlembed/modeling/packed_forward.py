"""A window of texts to vectors, on one device.

Its texts become tokens, sorted by length into packs without padding; on CUDA nothing is waited for
before its end.

Letters: E exits, N texts, D width.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from ..runtime.workers import ahead, device_of
from .transformer import Transformer, mode

# Tokens x width of a pack: what a layer makes of more leaves a CPU's caches (bench/LOG.md, encode).
CPU_NUMBERS = 2048 * 384


@dataclass(frozen=True)
class Window:
    """Texts that are encoded together, prompts included, and of each its exit, and its rank, 0 for
    the stored one.

    first: number of the first text. dim: of all vectors, which are then of length one; None for raw
    ones of the whole width.
    """

    texts: list[str]
    first: int
    exits_N: np.ndarray
    ranks_N: np.ndarray
    dim: int | None


@dataclass
class DeviceEncoder:
    """A model with its tokenizer.

    max_length: tokens a text, EOS included. max_tokens: tokens in one packed batch, of which a CPU
    takes fewer, by the model's width. bf16: autocast (training's precision, for scores during a
    run); vectors stay fp32.
    """

    model: Transformer
    tokenizer: Tokenizer
    max_length: int
    max_tokens: int = 16_384
    bf16: bool = False

    def tokenised(self, window: Window) -> tuple[Window, list[np.ndarray]]:
        """Tokenize the window. ValueError: a text is not valid Unicode, with the text's number."""
        texts, first = window.texts, window.first
        return window, tokenizer.tokenize(self.tokenizer, texts, self.max_length, first)

    def vectors(self, window: Window, ids: list[np.ndarray], bar: tqdm) -> np.ndarray:
        """Of a window's texts: each its own exit's, by the rank that it asks for."""
        width = self.model.cfg.hidden_size if window.dim is None else window.dim
        out = np.empty((len(ids), width), np.float32)
        for rank in np.unique(window.ranks_N).tolist():
            there = np.flatnonzero(window.ranks_N == rank)
            depths = window.exits_N[there]
            exits = np.unique(depths)
            place = torch.from_numpy(np.searchsorted(exits, depths))

            def own(vectors_END: Tensor, rows: np.ndarray, place: Tensor = place) -> Tensor:
                if len(vectors_END) > 1:
                    at = place[torch.from_numpy(rows)].to(vectors_END.device)
                    vectors_END = vectors_END[at, torch.arange(len(rows), device=at.device)][None]
                if window.dim is None:
                    return vectors_END
                return F.normalize(vectors_END[..., : window.dim], dim=-1)

            mine = ids if len(there) == len(ids) else [ids[row] for row in there]
            mixed = depths if len(exits) > 1 else None
            out[there] = self.run(mine, exits.tolist(), rank or None, own, bar, mixed)[0].numpy()
        return out

    @torch.inference_mode()
    def run(
        self,
        ids: list[np.ndarray],
        exits: list[int],
        rank: int | None,
        take: Callable[[Tensor, np.ndarray], Tensor],
        bar: tqdm,
        depths: np.ndarray | None = None,
    ) -> Tensor:
        """fp32 [K, n, d] on the CPU, in the order of ids: what `take` makes of a pack's vectors
        [E, texts, D] and its rows. depths: the last layer of each text, where they differ.

        On CUDA nothing is waited for before the end: packs are made and pinned in a thread, copies
        back are of pinned memory, in the order of the packs.
        """
        device = self.model.device
        cuda = device.type == "cuda"
        lengths = np.array([len(text) for text in ids], dtype=np.int64)
        most = self.max_tokens
        if not cuda:
            most = min(most, max(512, CPU_NUMBERS // self.model.cfg.hidden_size))
        packs = budgeted(lengths, most)
        if depths is not None:
            packs = [rows[np.lexsort((lengths[rows], -depths[rows]))] for rows in packs]

        def made(rows: np.ndarray) -> tuple[np.ndarray, PackedBatch]:
            batch = pack([ids[row] for row in rows], None if depths is None else depths[rows])
            return rows, _pinned(batch) if cuda else batch

        half = torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()
        out, begin = torch.empty(0), 0
        with half, mode(self.model, training=False):
            for rows, batch in ahead(made, packs) if cuda else map(made, packs):
                vectors_END = self.model(batch.to(device), exits=exits, rank=rank)
                taken = take(vectors_END.float(), rows)
                if not begin:
                    shape = len(taken), len(ids), taken.shape[-1]
                    out = torch.empty(shape, pin_memory=cuda)
                for to, one in zip(out, taken, strict=True):
                    to[begin : begin + len(rows)].copy_(one, non_blocking=True)
                begin += len(rows)
                bar.update(len(rows))
        if cuda:
            torch.cuda.synchronize(device)
        ordered = torch.empty_like(out, pin_memory=False)
        ordered[:, torch.from_numpy(np.concatenate(packs))] = out
        return ordered


def progress_bar(count: int | None, progress: bool) -> tqdm:
    """Of so many texts, if known; drawn where `progress` says so."""
    off = not progress
    return tqdm(total=count, desc="encoding", unit=" texts", disable=off, leave=False)


def _pinned(batch: PackedBatch) -> PackedBatch:
    """Copies of pinned memory do not wait for what the device is doing."""
    live = tuple(
        (until, replace(plan, buffer=plan.buffer.pin_memory())) for until, plan in batch.live
    )
    tokens = replace(batch.token_index, buffer=batch.token_index.buffer.pin_memory())
    ids_T, pos_T = batch.ids_T.pin_memory(), batch.pos_T.pin_memory()
    return replace(batch, ids_T=ids_T, pos_T=pos_T, token_index=tokens, live=live)


def process(
    device: str,
    cfg: config.Model,
    weights: dict[str, Tensor],
    options: Any,
    threads: int,
    compile: bool,
) -> Callable[[Window], np.ndarray]:
    """In a process of its own: tokens of one window are made while another is encoded."""
    where = device_of(device)
    if where.type == "cpu":
        torch.set_num_threads(threads)
    with torch.device("meta"):
        model = Transformer(cfg)
    model.load_state_dict(weights, assign=True)
    model = model.to(where).eval()
    if compile:
        model.compile_blocks()
    encoder = DeviceEncoder(**options | {"model": model})
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, left behind by who is made to end
    reading, encoding = threading.Lock(), threading.Lock()
    bar = progress_bar(None, False)

    def run(window: Window) -> np.ndarray:
        with reading:
            window, ids = encoder.tokenised(window)
        with encoding:
            return encoder.vectors(window, ids, bar)

    return run
