"""A teacher that sentence-transformers encodes, in batches padded to their longest text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...config.choices import Pooling
from ...modeling import hf_config

SLICE = 8192  # texts tokenised at once to know their lengths
MAX_TOKENS = 16_384  # encoded at once, padding included


@dataclass
class SentenceTeacher:
    """A SentenceTransformer.

    width: of its vectors. why: the reason why mlembed's trunk does not encode it. note: tells the
    pooling of a directory that does not, "" of others.
    """

    model: Any
    width: int
    why: str
    note: str = ""

    @staticmethod
    def load(
        directory: Path, pooling: Pooling | None, device: torch.device, why: str
    ) -> "SentenceTeacher":
        """Open a directory in fp32, from safetensors and without code of its own.

        Raises:
            ValueError: sentence-transformers cannot open it, or it is pooled in another way.
        """
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(
                str(directory),
                device=str(device),
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
        # The libraries raise many kinds of errors for a model that they cannot open.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"teacher: cannot open {directory}: {reason}") from None
        model.eval().requires_grad_(False)
        model.default_prompt_name = None
        note = _choose_pooling(model, directory, pooling)
        width = model.encode(["a"], convert_to_numpy=True, show_progress_bar=False).shape[1]
        return SentenceTeacher(model, int(width), why, note)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def pipeline(self) -> str:
        """The model's modules in order, with the pooling: "Transformer, Pooling (mean)"."""
        names = []
        for module in self.model:
            mode = getattr(module, "pooling_mode", "")
            mode = mode if isinstance(mode, str) else " and ".join(mode)
            names.append(type(module).__name__ + (f" ({mode})" if mode else ""))
        return ", ".join(names)

    @property
    def encoder(self) -> str:
        """The clause that tells who encodes, and why."""
        return f"encoded by sentence-transformers, because {self.why}"

    def encode(self, texts: list[str], bar: tqdm) -> Tensor:
        """Return fp32 [N, width] of texts on the model's device, under bf16 autocast on CUDA."""
        device = self.device
        out = torch.empty(len(texts), self.width, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for rows in self._batches(texts):
                out[rows] = self.model.encode(
                    [texts[row] for row in rows],
                    batch_size=len(rows),
                    convert_to_tensor=True,
                    show_progress_bar=False,
                ).to(out)
                bar.update(len(rows))
        return out

    def _lengths(self, texts: list[str]) -> list[int]:
        """Return the tokens of each text before truncation."""
        tokenizer = self.model.tokenizer
        # A static model has a tokenizer of the tokenizers library.
        if hasattr(tokenizer, "encode_batch"):
            return [len(text.ids) for text in tokenizer.encode_batch(texts)]
        return [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    def _batches(self, texts: list[str]) -> Iterator[list[int]]:
        """Yield rows by falling length, at most MAX_TOKENS tokens when padded to the longest."""
        limit = self.model.max_seq_length or 2**31
        slices = (texts[i : i + SLICE] for i in range(0, len(texts), SLICE))
        lengths = [min(n, limit) for some in slices for n in self._lengths(some)]
        batch: list[int] = []
        for row in sorted(range(len(texts)), key=lengths.__getitem__, reverse=True):
            if batch and (len(batch) + 1) * max(1, lengths[batch[0]]) > MAX_TOKENS:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def check_pooling(directory: Path, stored: str, pooling: Pooling | None) -> None:
    """Raise ValueError if another pooling is asked for than the directory's."""
    if pooling not in (stored, None):
        raise ValueError(f"pooling: expected {stored}, as {directory} says, got {pooling}")


def note_of(directory: Path, mode: str) -> str:
    """Return the clause that tells the pooling of a directory that does not."""
    return (
        f"pooled by {mode}: nothing in {directory} says how; `mlembed export {directory} OUT "
        "--pooling ..` writes a directory that does"
    )


def _choose_pooling(model: Any, directory: Path, pooling: Pooling | None) -> str:
    """Pool a model as asked, if its directory does not say how; return what to tell of it.

    Raises:
        ValueError: the directory says another pooling, or the model has no pooler.
    """
    from sentence_transformers.sentence_transformer import modules

    place = next((i for i, module in enumerate(model) if isinstance(module, modules.Pooling)), None)
    if place is None:  # A static model, for example, has none.
        if pooling:
            raise ValueError(f"pooling: expected none, as {directory} does not pool, got {pooling}")
        return ""
    mode = str(model[place].pooling_mode)
    mode = "last" if mode == "lasttoken" else mode
    if (directory / "modules.json").is_file():
        dense = len(model) > place + 1 and isinstance(model[place + 1], modules.Dense)
        stored = "pooler" if mode == "cls" and dense else mode
        check_pooling(directory, stored, pooling)
        return ""
    if (directory / hf_config.NESTING).is_file():
        pooling = hf_config.with_pooling(directory, pooling, print).pooling
    if pooling is None:
        return note_of(directory, mode)
    width = model[place].embedding_dimension
    if pooling == "pooler":
        pooler = getattr(model[0].auto_model, "pooler", None)
        if pooler is None:
            raise ValueError(f"pooling: expected last, mean or cls of {directory}, got pooler")
        weights = pooler.dense.weight.detach(), pooler.dense.bias.detach()
        layer = modules.Dense(width, width, init_weight=weights[0], init_bias=weights[1])
        model.append(layer.to(model.device))
    names = {"last": "lasttoken", "pooler": "cls"}
    model[place] = modules.Pooling(width, names.get(pooling, pooling))
    return ""
