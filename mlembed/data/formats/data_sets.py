"""Read data sets of the library `datasets`: saved directories, cloned repositories, Hub ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .paths import SUFFIXES, suffix_of
from .readers import MANY, Decoder, Names, Row, from_arrow

if TYPE_CHECKING:
    import datasets


def is_saved(path: Path) -> bool:
    """Return whether `save_to_disk` wrote the directory."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def is_clone(path: Path) -> bool:
    """Return whether a directory looks like a repository of the Hub, whose files lie deeper.

    `datasets` then finds its files, by split.
    """
    if any(suffix_of(p) in SUFFIXES for p in path.iterdir() if p.is_file()):
        return False
    return any(suffix_of(p) in SUFFIXES for p in path.glob("*/*"))


def load(
    path: str, subset: str, split: str, streaming: bool
) -> "datasets.Dataset | datasets.IterableDataset":
    """Open a directory of `save_to_disk`, memory-mapped, or call `load_dataset` with a hub id or a
    directory in its layout. A data set's own code never runs.

    Raises:
        ValueError: the data set, subset or split does not exist, in one line.
    """
    import datasets  # The import takes seconds.

    try:
        if not is_saved(Path(path)):
            return datasets.load_dataset(path, subset or None, split=split, streaming=streaming)
        data = datasets.load_from_disk(path)
    # Several libraries raise exceptions of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data: expected a file, a directory or a data set that can be loaded, got {path} "
            f"(subset {subset or 'none'}, split {split}): {reason}"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{path}: split: expected one of {', '.join(data)}, got {split}")
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def rows_of(
    data: "datasets.Dataset | datasets.IterableDataset", name: str, names: Names = None
) -> Iterator[Row]:
    """Yield the rows of a data set, at name:row from 1; of its columns those in `names`, or all."""
    # A stream may not know its columns.
    if names is not None and data.column_names:
        data = data.select_columns(list(names))
    import pyarrow as pa

    number, decoder = 0, Decoder()
    try:
        for batch in data.with_format("arrow").iter(batch_size=MANY):
            for row in from_arrow(batch, decoder):
                number += 1
                yield f"{name}:{number}", row
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot be read after row {number}: {reason}") from None
