"""Encode with the ONNX graph of an exported directory in place of its weights."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data import tokenizer
from ..data.packing import budgeted
from .encoder import Encoder

INPUTS, OUTPUTS = ["input_ids", "attention_mask"], ["last_hidden_state", "sentence_embedding"]
MAX_TOKENS = 4096  # Tokens of a padded batch, padding aside.


def open_graph(path: Path) -> Any:
    """Return onnxruntime's session of a graph, on the CPU, with as many threads as torch has.

    Raises:
        ValueError: onnxruntime is not installed, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            "graph: expected the package onnxruntime: pip install 'mlembed[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # Its exceptions have no common base of their own.
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected an ONNX graph, got {reason}") from None


@dataclass
class OnnxEncoder(Encoder):
    """An encoder whose graph computes the vectors, of one depth and vocabulary rank.

    session: of a graph with INPUTS and the last of OUTPUTS. Texts of a batch are padded.
    """

    session: Any = None

    @classmethod
    def of(cls, encoder: Encoder, path: Path) -> Self:
        """Return an encoder with the tokenizer and the settings of another."""
        settings = {one.name: getattr(encoder, one.name) for one in fields(Encoder)}
        return cls(**settings, session=open_graph(path))

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
        """Return `select` of all batches, fp32 [K, n, d], in the order of ids.

        select: called with a batch's vectors [1, n, D], zero behind the graph's width.

        Raises:
            ValueError: another depth or rank than the graph's.
        """
        cfg = self.model.cfg
        for name, got, own in (
            ("exit", exits, [cfg.num_hidden_layers]),
            ("rank", rank, None if rank is None else cfg.ranks[-1]),
        ):
            if got != own:
                raise ValueError(f"{name}: expected {own}, which the graph has, got {got}")
        batches = budgeted(np.array([len(text) for text in ids], dtype=np.int64), MAX_TOKENS)
        parts = []
        for rows in batches:
            vectors = torch.from_numpy(self._batch([ids[row] for row in rows]))
            whole = F.pad(vectors, (0, cfg.hidden_size - vectors.shape[1]))
            parts.append(select(whole[None], rows))
            bar.update(len(rows))
        together = torch.cat(parts, 1)
        ordered = torch.empty_like(together)
        ordered[:, torch.from_numpy(np.concatenate(batches))] = together
        return ordered

    def _batch(self, ids: list[np.ndarray]) -> np.ndarray:
        """Return the graph's vectors of one batch, fp32 [n, dim]."""
        shape = len(ids), max(len(text) for text in ids)
        pad = self.tokenizer.token_to_id(tokenizer.special_tokens(self.tokenizer)["pad_token"])
        tokens, mask = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
        for row, text in enumerate(ids):
            tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        (vectors,) = self.session.run(OUTPUTS[1:], dict(zip(INPUTS, (tokens, mask), strict=True)))
        return vectors
