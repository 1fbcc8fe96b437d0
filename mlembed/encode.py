"""Texts to vectors at any width, depth and vocabulary rank: the one inference path.

python -m mlembed.encode MODEL "a text" "another" [--dim 48] [--exit 2] [--rank 64]
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from . import log, pretrained, shapes, tokenizer
from .model import Transformer, mode
from .pack import budgeted, pack


@dataclass
class Encoder:
    """A model with its tokenizer.

    max_length: tokens a text, EOS included. max_tokens: tokens in one packed batch.
    bf16: autocast (training's precision, for scores during a run); vectors stay fp32.
    """

    model: Transformer
    tokenizer: Tokenizer
    max_length: int
    max_tokens: int = 16_384
    bf16: bool = False

    @staticmethod
    def load(source: str, device: str = "auto") -> "Encoder":
        """From a run or directory that mlembed saved, a checkpoint of an architecture that
        `shapes.from_checkpoint` knows, or a hub id.

        Raises:
            ValueError: nothing usable there.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        directory = shapes.resolve(source)
        model = pretrained.load(str(directory))
        text_to_ids = tokenizer.load(directory)
        most = model.cfg.max_position_embeddings
        limit = min(tokenizer.max_length(directory) or most, most)
        if text_to_ids.get_vocab_size() > model.cfg.vocab_size:
            raise ValueError(
                f"{directory}: expected a tokenizer of at most {model.cfg.vocab_size} tokens, "
                f"as the model has, got {text_to_ids.get_vocab_size()}"
            )
        return Encoder(model.to(device).eval(), text_to_ids, limit)

    @torch.inference_mode()
    def exits(
        self,
        texts: Sequence[str],
        exits: Sequence[int] | None = None,
        rank: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Raw vectors of every exit in one pass -> fp32 [E, N, D] on the CPU, in texts' order.

        Nothing is dropped, also while the model is being trained.
        """
        cfg = self.model.cfg
        exits = cfg.exits if exits is None else exits
        device = self.model.device
        ids = tokenizer.tokenize(self.tokenizer, texts, self.max_length)
        out = torch.empty(len(exits), len(texts), cfg.hidden_size)
        half = torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()
        packs = budgeted(np.array([len(text) for text in ids], dtype=np.int64), self.max_tokens)
        for rows in tqdm(packs, desc="encoding", disable=not progress, leave=False):
            batch = pack([ids[row] for row in rows]).to(device)
            with half, mode(self.model, training=False):
                vectors = self.model(batch, exits=exits, rank=rank)
            out[:, torch.from_numpy(rows)] = vectors.float().cpu()
        return out

    def encode(
        self,
        texts: Sequence[str],
        dim: int | None = None,
        exit: int | None = None,
        rank: int | None = None,
    ) -> np.ndarray:
        """Unit vectors -> float32 [N, dim]: cut to the first `dim` of exit `exit`, then normalised.

        Raises:
            ValueError: dim above the width, exit above the depth, rank above the stored one.
        """
        self.model.cfg.check(dim, exit, rank)
        depth = self.model.cfg.num_hidden_layers if exit is None else exit
        vectors = self.exits(texts, [depth], rank)[0]
        return F.normalize(vectors[:, :dim], dim=-1).numpy()


def main(
    model: Annotated[str, tyro.conf.Positional],
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    dim: int | None = None,
    exit: int | None = None,
    rank: int | None = None,
    out: str = "",
    device: str = "auto",
) -> None:
    """Encode texts, or lines of standard input, to unit vectors.

    Args:
        model: run, model directory or hub id.
        texts: what to encode; standard input's lines when none are given.
        dim: width; full by default.
        exit: depth; full by default.
        rank: vocabulary rank; the stored one by default.
        out: .npy file for the vectors; otherwise one line of numbers a text on standard output.
        device: auto, cpu or cuda.
    """
    if out and Path(out).exists():
        raise ValueError(f"out: expected a new file, got {out}, which exists")
    encoder = Encoder.load(model, device)
    lines = list(texts) or [line.rstrip("\n") for line in sys.stdin]
    vectors = encoder.encode(lines, dim, exit, rank)
    if out:
        with open(out, "xb") as file:
            np.save(file, vectors)
    else:
        for vector in vectors:
            print(" ".join(f"{x:.6f}" for x in vector))


if __name__ == "__main__":
    with log.one_line_errors():
        tyro.cli(main, prog="python -m mlembed.encode")
