"""Compare vectors of a written directory, as other libraries read it, with the model's own.

The probes go through every prompt. Readers are sentence-transformers, transformers with pooling
done here, and onnxruntime if there is a graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config import Model
from ..inference.encoder import Encoder
from ..modeling.automodel.choose import trunk_of
from ..modeling.transformer import Transformer
from ..runtime import files
from . import to_onnx

TOLERANCE = 1e-5
LONGEST = 512  # Tokens of the longest probe: Qwen3's 40,960 take hours on a CPU.
# Several scripts and lengths, capitals, an empty text, a character in no vocabulary.
PROBES = (
    "Wednesday, May 4, 2050",
    "2050 թ. մայիսի 4, չորեքշաբթի",
    "বুধবার, ৪ মে, ২০৫০ এবং আরও কয়েকটি শব্দ যা এই লেখাটিকে দীর্ঘ করে তোলে",
    "比利时、哈萨克斯坦或赞比亚",
    "in 1 hour 🙂",
    "",
    "a",
    "  space around \n",
    "الأربعاء، ٤ مايو ٢٠٥٠",
    "THE QUICK BROWN FOX, ЧЕТЫРЕ ЧЕРНЕНЬКИХ ЧЕРТЁНКА, ÉTÉ",
)


@dataclass
class Report:
    """Largest differences by reader, over a number of texts with each of a number of prompts.

    int8_cosine: the least cosine of the int8 graph's vectors with the model's, None without one.
    """

    texts: int
    prompts: int
    differences: dict[str, float] = field(default_factory=dict)
    int8_cosine: float | None = None

    @property
    def worst(self) -> float:
        """The largest difference of any reader."""
        return max(self.differences.values())

    def describe(self) -> str:
        """Return readers with their differences: "sentence-transformers 2.0e-07, ..."."""
        readers = ", ".join(f"{name} {worst:.1e}" for name, worst in self.differences.items())
        prompts = f" under each of {self.prompts} prompts" if self.prompts > 1 else ""
        text = f"vectors of {self.texts} texts{prompts} differ by at most: {readers}"
        if self.int8_cosine is not None:
            text += f"; cosines of the int8 graph with them are at least {self.int8_cosine:.4f}"
        return text


def check(directory: Path, encoder: Encoder, dim: int, exit: int, rank: int | None) -> Report:
    """Compare vectors of the whole model, stopped at `exit`, and of the written directory.

    Raises:
        ValueError: a difference that is NaN, or above 1e-5 and above fp32's own error (`noise`); a
            setting that a reader understands in another way.
    """
    limit = min(encoder.max_length, LONGEST)
    ours = replace(encoder, model=plain(encoder.model), bf16=False, max_length=limit)
    # The last text is longer than the limit.
    texts = [*PROBES, " ".join([PROBES[2]] * limit)]
    # One name for each distinct prompt: many sources may share one.
    names: dict[str, str | None] = {p: name for name, p in encoder.prompts.items()} | {"": None}
    expected = {p: ours.encode(texts, dim, exit, rank, prompt=p) for p in names}
    report = Report(len(texts), len(names))

    def compare(reader: str, read: Callable[[list[str], str, str | None], np.ndarray]) -> None:
        worst, allowed = 0.0, TOLERANCE
        for prompt, name in names.items():
            vectors, wanted = read(texts, prompt, name), expected[prompt]
            if vectors.shape[-2:] != wanted.shape:
                got = vectors.shape[-2:]
                raise ValueError(f"{reader}: expected vectors {wanted.shape}, read {got}")
            if not encoder.normalize:
                vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
            difference = float(np.abs(vectors - wanted).max())
            # A NaN is not below anything.
            if not difference < allowed:
                allowed = max(allowed, noise(ours, texts, wanted, dim, exit, rank, prompt=prompt))
            if not difference < allowed:
                under = f" with prompt {prompt!r}" if prompt else ""
                raise ValueError(
                    f"{reader}: expected the model's own vectors{under} within {allowed:.1e}, got "
                    f"{difference}"
                )
            worst = max(worst, difference)
        report.differences[reader] = worst

    compare("sentence-transformers", read_by_sentence_transformers(directory, encoder, limit))
    compare("transformers", read_by_transformers(directory, ours))
    if (directory / to_onnx.FILE).is_file():
        compare("onnxruntime", read_by_onnxruntime(directory, ours))
    if (directory / to_onnx.INT8_FILE).is_file():
        read = read_by_onnxruntime(directory, ours, to_onnx.INT8_FILE)
        cosines = []
        for prompt, name in names.items():
            vectors = read(texts, prompt, name)
            unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
            cosines.append((unit * expected[prompt]).sum(-1))
        report.int8_cosine = float(np.min(cosines))
        if not report.int8_cosine > 0:
            got = report.int8_cosine
            raise ValueError(f"{to_onnx.INT8_FILE}: expected cosines above 0, got {got}")
    return report


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, and reports of weights that no reader uses and of the
    default prompt.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    sentences = getLogger("sentence_transformers")
    before = sentences.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sentences.setLevel(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        sentences.setLevel(before)
        if bars:
            logging.enable_progress_bar()


def plain(model: Transformer) -> Transformer:
    """Return the model in fp32, eager, with an attention that supports it.

    Weights that are fp32 already are shared with `model`.
    """
    with torch.device("meta"):
        same = trunk_of(replace(model.cfg, attention="auto"))
    same.load_state_dict({n: w.float() for n, w in model.state_dict().items()}, assign=True)
    return same.eval()


def noise(
    ours: Encoder,
    texts: Sequence[str],
    expected: np.ndarray,
    *size: int | None,
    prompt: str = "",
) -> float:
    """Return the difference that fp32 allows between two readers: four times our own error.

    Our error is the distance to float64; a reader errs as well, and sums in another order. An error
    above 1e-3 allows nothing, as it would hide a wrong reader. Only deep or badly conditioned
    models need this allowance.
    """
    exact = replace(ours, model=plain(ours.model).double()).encode(texts, *size, prompt=prompt)
    error = float(np.abs(exact - expected).max())
    return 4 * error if error < 1e-3 else 0.0


# ---- readers: functions of texts, a prompt and its name, None without a prompt ----


def read_by_sentence_transformers(
    directory: Path, encoder: Encoder, limit: int
) -> Callable[[list[str], str, str | None], np.ndarray]:
    """Return a function that returns vectors [N, dim], by the prompt's name.

    Raises:
        ValueError: the library has another length limit, prompt, default or similarity than the
            encoder.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    default = encoder.default_prompt_name
    for key, wanted, got in (
        ("max_seq_length", encoder.max_length, model.max_seq_length),
        ("default_prompt_name", default, model.default_prompt_name),
        ("similarity_fn_name", encoder.similarity, model.similarity_fn_name),
        *((f"prompt {name}", p, model.prompts.get(name)) for name, p in encoder.prompts.items()),
    ):
        if got != wanted:
            raise ValueError(f"sentence-transformers: {key}: expected {wanted!r}, got {got!r}")
    model.max_seq_length = limit

    def read(texts: list[str], prompt: str, name: str | None) -> np.ndarray:
        # The default prompt, or none, is for texts for which nobody asks for one.
        by_name: dict[str, Any] = {"prompt_name": name} if name else {"prompt": prompt}
        options = {} if name == default else by_name
        return model.encode(texts, show_progress_bar=False, **options)

    return read


def tokens_of(directory: Path, ours: Encoder, texts: list[str], kind: str) -> dict[str, Any]:
    """Return input_ids and attention_mask of transformers' tokenizer, padded."""
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokens = reader(
        texts, padding=True, truncation=True, max_length=ours.max_length, return_tensors=kind
    )
    return {name: tokens[name] for name in to_onnx.INPUTS}


def read_by_transformers(
    directory: Path, ours: Encoder
) -> Callable[[list[str], str, str | None], np.ndarray]:
    """Return a function that returns vectors [N, dim], pooled and cut here."""
    from transformers import AutoModel

    hf = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()

    @torch.inference_mode()
    def read(texts: list[str], prompt: str, name: str | None) -> np.ndarray:
        tokens = tokens_of(directory, ours, [prompt + text for text in texts], "pt")
        output = hf(**tokens)
        hidden, mask = output.last_hidden_state, tokens["attention_mask"]
        pooled = {
            "last": lambda: hidden[torch.arange(len(texts)), mask.sum(1) - 1],
            "cls": lambda: hidden[:, 0],
            "pooler": lambda: output.pooler_output,
            "mean": lambda: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        }[ours.model.cfg.pooling]()
        pooled = ours.model.project(pooled)
        return F.normalize(pooled[:, : width(directory, ours.model.cfg)], dim=-1).numpy()

    return read


def width(directory: Path, cfg: Model) -> int:
    """Return the width of a written directory's vectors: the last Dense module's or the model's."""
    layers = sorted(directory.glob("*_Dense/config.json"))
    return files.read_json(layers[-1])["out_features"] if layers else cfg.hidden_size


def read_by_onnxruntime(
    directory: Path, ours: Encoder, file: str = to_onnx.FILE
) -> Callable[[list[str], str, str | None], np.ndarray]:
    """Return a function that returns vectors [2, N, dim]: of one padded batch, and of each text
    alone.
    """

    def read(texts: list[str], prompt: str, name: str | None) -> np.ndarray:
        prompted = [prompt + text for text in texts]
        return to_onnx.read(directory, tokens_of(directory, ours, prompted, "np"), file)

    return read
