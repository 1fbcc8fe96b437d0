"""An `Encoder` as a model of the package `mteb`, and its tasks run by name.

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
from torch.nn.functional import normalize

from ..config import strict
from ..inference.encoder import Encoder
from ..modeling.transformer import num_parameters


class Passes:
    """Raw vectors of texts at several exits of one rank, each text encoded once for all widths and
    depths: in files of a directory, until they are forgotten.

    revision: `digest` of the weights, which takes as long as reading them.
    """

    def __init__(
        self, encoder: Encoder, exits: Sequence[int], rank: int | None, directory: Path
    ) -> None:
        self.encoder, self.rank, self.directory = encoder, rank, directory
        self.exits = sorted(set(exits))
        self.revision = digest(encoder)

    def vectors(self, texts: Sequence[str], exit: int, prompt: str, progress: bool) -> np.ndarray:
        """fp32 [N, D], not to be written to."""
        seal = hashlib.sha256()
        for text in (prompt, *texts):
            seal.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        path = self.directory / f"{seal.hexdigest()}.npy"
        if not path.is_file():
            found = self.encoder.exits(texts, self.exits, self.rank, progress, prompt)
            np.save(path, found.numpy())
        return np.load(path, mmap_mode="r")[self.exits.index(exit)]

    def forget(self) -> None:
        for path in self.directory.iterdir():
            path.unlink()


class MTEBEncoder:
    """What mteb's evaluators call, at one width, depth and vocabulary rank.

    A prompt is chosen as mteb does for sentence-transformers' models: by the name of the task with
    the prompt's type (`NFCorpus-query`), the task, the type of task likewise, then `query` or
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
        """
        Args:
            name: organisation/model, for the directory of results.
            prompts: by name; the encoder's own by default.
            passes: shared with other widths and depths of this rank; else nothing is kept.

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
                "embed_dim": dim or cfg.hidden_size,
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
        """Texts of a data loader's batches -> unit vectors, float32 [N, dim]. `batch_size` and what
        else evaluators pass does not change vectors, and is left to the encoder."""
        texts = [text for batch in inputs for text in batch["text"]]
        name = get_prompt_name(self.prompts, task_metadata, prompt_type)
        prompt = self.prompts[name] if name else ""
        if self.passes:
            dim, exit = self.size[0], self.size[1] or self.encoder.model.cfg.num_hidden_layers
            raw = self.passes.vectors(texts, exit, prompt, show_progress_bar)[:, :dim]
            return normalize(torch.tensor(np.asarray(raw)), dim=-1).numpy()
        return self.encoder.encode(texts, *self.size, prompt=prompt, progress=show_progress_bar)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of all pairs."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of rows of equal number."""
        return pairwise_cos_sim(embeddings1, embeddings2)


def digest(encoder: Encoder) -> str:
    """Of all weights: results of other weights of the same name are others."""
    seal = hashlib.sha256()
    for name, weight in sorted(encoder.model.state_dict().items()):
        seal.update(name.encode())
        seal.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()[:16]


def tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks of these names, each once. ValueError, with near names, for one that it does not
    have, and for one of other things than texts."""
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
            what = ", ".join(task.modalities)
            raise ValueError(f"mteb: expected tasks of text, got {task.metadata.name}, of {what}")
    return found


def model_name(source: str) -> str:
    """A hub id as it is; of a directory mlembed/ and its last names."""
    path = Path(source)
    if not path.exists() and source.count("/") == 1:
        return source
    return "mlembed/" + "-".join(path.resolve().parts[-2:])


def evaluate(
    model: MTEBEncoder, wanted: Sequence[Any], out: Path | None, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Run mteb's tasks; its own json goes to out/results/<model>/<revision>/.

    Returns:
        By task name `score`, mteb's main score averaged as mteb does, and `by_language`, where
        there are several subsets, by subset.

    Raises:
        ValueError: a task's data cannot be had.
    """
    cache = ResultCache(out) if out is not None else None
    try:
        result = mteb.evaluate(
            model,
            list(wanted),
            cache=cache,
            encode_kwargs={"show_progress_bar": progress},
            show_progress_bar=progress,
            co2_tracker=False,
        )
    except OSError as error:  # no network and nothing in the cache of `datasets`
        names = ", ".join(task.metadata.name for task in wanted)
        raise ValueError(f"mteb: the data of {names} could not be had: {error}") from None
    return {found.task_name: _summary(found) for found in result.task_results}


def _summary(found: Any) -> dict[str, Any]:
    subsets: dict[str, list[float]] = {}
    for rows in found.scores.values():
        for row in rows:
            subsets.setdefault(row["hf_subset"], []).append(float(row["main_score"]))
    summary: dict[str, Any] = {"score": float(found.get_score())}
    if len(subsets) > 1:
        summary["by_language"] = {name: float(np.mean(some)) for name, some in subsets.items()}
    return summary
