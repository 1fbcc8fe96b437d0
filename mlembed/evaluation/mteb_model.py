"""Run tasks of the package `mteb` by name, with an `Encoder` as its model.

Importing this imports mteb, which takes seconds.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import torch
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.models.abs_encoder import get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from torch import Tensor

from ..config import strict
from ..inference.encoder import Encoder, FullSize, GridVectors
from ..inference.vector_files import check_unit
from ..modeling.transformer import num_parameters


class Passes:
    """Vectors at several sizes of one rank, each list of texts encoded once, until `clear`.

    revision: `digest` of the weights, which takes as long as reading them.
    """

    def __init__(self, encoder: Encoder, sizes: Sequence[FullSize]) -> None:
        self.encoder, self.sizes = encoder, sizes
        self.revision = digest(encoder)
        self._vectors: dict[str, GridVectors] = {}

    def vectors(self, texts: Sequence[str], size: FullSize, prompt: str, progress: bool) -> Tensor:
        """Return unit vectors fp32 [N, dim]."""
        seal = hashlib.sha256()
        for text in (prompt, *texts):
            seal.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        key = seal.hexdigest()
        if key not in self._vectors:
            self._vectors[key] = self.encoder.encode_grid(
                texts, self.sizes, progress, prompt, on_disk=True
            )
        return self._vectors[key][size]

    def clear(self) -> None:
        self._vectors.clear()


class MTEBEncoder:
    """An encoder at one width, depth and vocabulary rank for mteb's evaluators.

    Prompts are chosen like mteb does for models of sentence-transformers: by the task's name with
    the prompt's type (`NFCorpus-query`), the task's name, its type likewise, then `query` or
    `document`.
    """

    def __init__(
        self,
        encoder: Encoder,
        name: str,
        dim: int | None = None,
        exit: int | None = None,
        rank: int | None = None,
        prompts: dict[str, str] | None = None,
        passes: Passes | None = None,
    ) -> None:
        """Args:
            name: organisation/model, for the directory of results.
            prompts: by name; the encoder's own by default.
            passes: vectors shared with other widths and depths of this rank.

        Raises:
            ValueError: a size that the model lacks.
        """
        cfg = encoder.model.cfg
        cfg.check(dim, exit, rank)
        self.encoder, self.size, self.passes = encoder, (dim, exit, rank), passes
        self.prompts = encoder.prompts if prompts is None else prompts
        chosen = {"dim": dim, "exit": exit, "rank": rank}
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name,
                "revision": passes.revision if passes else digest(encoder),
                "n_parameters": num_parameters(cfg, exit, rank),
                "max_tokens": encoder.max_length,
                "embed_dim": dim or encoder.full_size()[0],
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
                "use_instructions": any(self.prompts.values()),
                "experiment_kwargs": {k: v for k, v in chosen.items() if v is not None} or None,
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Return unit vectors float32 [N, dim] of a data loader's texts. Other options, such as
        `batch_size`, are left to the encoder, as they do not change vectors.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        name = get_prompt_name(self.prompts, task_metadata, prompt_type)
        prompt = self.prompts[name] if name else self.encoder.default_prompt
        if self.passes:
            size = self.encoder.full_size(self.size)
            return check_unit(self.passes.vectors(texts, size, prompt, show_progress_bar).numpy())
        return self.encoder.encode(texts, *self.size, prompt=prompt, progress=show_progress_bar)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the cosines of all pairs."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the cosines of rows with equal numbers."""
        return pairwise_cos_sim(embeddings1, embeddings2)


def digest(encoder: Encoder) -> str:
    """Return a hash of all weights, the revision under which mteb caches results."""
    seal = hashlib.sha256()
    for name, weight in sorted(encoder.model.state_dict().items()):
        seal.update(name.encode())
        seal.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()[:16]


def tasks(names: Sequence[str]) -> list[Any]:
    """Return mteb's tasks by name, each once.

    Raises:
        ValueError: an unknown name, with near ones, or a task of anything but texts.
    """
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    for name in names:
        if name not in known:
            raise ValueError(
                f"mteb: expected a task of mteb {mteb.__version__}"
                f"{strict.near(name, known)}, got {name!r}"
            )
    found = list(mteb.get_tasks(tasks=list(dict.fromkeys(names))))
    for task in found:
        if list(task.modalities) != ["text"]:
            kinds = ", ".join(task.modalities)
            raise ValueError(f"mteb: expected tasks of text, got {task.metadata.name}, of {kinds}")
    return found


def model_name(source: str) -> str:
    """Return a Hub id as it is; for a directory mlembed/ and its last two names."""
    path = Path(source)
    if not path.exists() and source.count("/") == 1:
        return source
    return "mlembed/" + "-".join(path.resolve().parts[-2:])


def evaluate(
    model: MTEBEncoder, tasks: Sequence[Any], out: Path | None, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Run mteb's tasks, whose own json goes to out/results/<model>/<revision>/.

    Returns:
        by task name `score`, mteb's main score averaged like mteb does, and, if there are several
        subsets, `by_language`, the score of each.

    Raises:
        ValueError: a task's data cannot be loaded.
    """
    cache = ResultCache(out) if out is not None else None
    try:
        result = mteb.evaluate(
            model,
            list(tasks),
            cache=cache,
            encode_kwargs={"show_progress_bar": progress},
            show_progress_bar=progress,
            co2_tracker=False,
        )
    except OSError as error:  # There is no network and nothing in the cache of `datasets`.
        names = ", ".join(task.metadata.name for task in tasks)
        raise ValueError(f"mteb: the data of {names} could not be loaded: {error}") from None
    return {one.task_name: _summary(one) for one in result.task_results}


def _summary(result: Any) -> dict[str, Any]:
    subsets: dict[str, list[float]] = {}
    for rows in result.scores.values():
        for row in rows:
            subsets.setdefault(row["hf_subset"], []).append(float(row["main_score"]))
    summary: dict[str, Any] = {"score": float(result.get_score())}
    if len(subsets) > 1:
        summary["by_language"] = {name: float(np.mean(some)) for name, some in subsets.items()}
    return summary
