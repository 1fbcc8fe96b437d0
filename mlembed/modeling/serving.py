"""Settings of a model that serves texts: length, prompts, width. Read from a directory, written.

The settings are those that sentence-transformers keeps in two files of a directory. A training
checkpoint has the two files as well, so that every command serves it like the finished model.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import config
from ..data import tokenizer
from . import sentence_files

MODULES = "sentence_transformers.models"
ROLES = {"query": "", "document": ""}
LENGTH, SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"


@dataclass(frozen=True)
class Serving:
    """Settings of a model that serves.

    max_length: tokens of a text, special tokens included. prompts: texts to put before other texts,
    by name. default_prompt_name: prompt of texts for which none is asked for. width: of vectors for
    which none is asked for, None for the model's. normalize, similarity: whether the vectors of
    sentence-transformers have length one, and how it compares them; ours always have length one.
    """

    max_length: int
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    width: int | None = None
    normalize: bool = True
    similarity: str = "cosine"

    def files(self) -> dict[str, Any]:
        """Return the contents of the two files by name.

        Keys are those of sentence-transformers 5.0, which later versions map; an older reader warns
        of a newer version. `do_lower_case` is part of tokenizer.json, which every library reads.
        """
        versions = {"sentence_transformers": "5.0.0", "transformers": "4.57.0", "pytorch": "2.11.0"}
        return {
            LENGTH: {"max_seq_length": self.max_length, "do_lower_case": False},
            SETTINGS: {
                "model_type": "SentenceTransformer",
                "__version__": versions,
                # MTEB asks for these two by name; text-embeddings-inference reads strings only.
                "prompts": ROLES | self.prompts,
                "default_prompt_name": self.default_prompt_name,
                "similarity_fn_name": self.similarity,
            },
        }


def of(encoder: Any) -> Serving:
    """Return the settings of an encoder, which has fields of the same names."""
    return Serving(**{one.name: getattr(encoder, one.name) for one in fields(Serving)})


def read(directory: Path, cfg: config.Model) -> Serving:
    """Read the settings of a directory whose model has the shape `cfg`, which bounds a text's
    length.

    Raises:
        ValueError: what `sentence_files.read` raises.
    """
    most = cfg.max_position_embeddings
    files = sentence_files.read(directory, cfg.hidden_size)
    # In sentence-transformers a default prompt is for neither queries nor documents.
    roles = {} if files.default_prompt_name is None else ROLES
    return Serving(
        min(tokenizer.max_length(directory) or most, most),
        roles | files.prompts,
        files.default_prompt_name,
        files.width,
        files.normalize,
        files.similarity,
    )


def write(serving: Serving, directory: Path) -> None:
    """Write the two files to a checkpoint, with its width as `truncate_dim`, since it has no Dense
    modules, and whether it normalises in modules.json.
    """
    files = serving.files()
    files[SETTINGS]["truncate_dim"] = serving.width
    modules = {"Transformer": "", **({"Normalize": "1_Normalize"} if serving.normalize else {})}
    files["modules.json"] = [
        {"type": f"{MODULES}.{name}", "path": path} for name, path in modules.items()
    ]
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
