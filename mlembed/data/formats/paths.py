"""Find data files by path: files, directories of them, shards of one source, parallel files."""

import re
import warnings
from pathlib import Path

# A directory is read as the first of these kinds that it holds. A csv next to parquet describes it.
KINDS = ((".jsonl", ".parquet"), (".csv", ".tsv"), (".json",))
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind)
TEXT = ".txt"  # One text a line; in a directory it may be a note about the data.
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*")
SHARD = re.compile(r"(.*?)[-_.]?(\d{3,})(?:-of-\d+)?")


def plain_name(path: Path) -> str:
    """Return a file's name without the suffix of a compression."""
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


def suffix_of(path: Path) -> str:
    """Return a file's suffix in lower case, that of a compression left out."""
    return Path(plain_name(path)).suffix.lower()


def bytes_of(path: Path) -> int:
    """Return about how many bytes of text a file holds, 0 if it is not a regular file."""
    if not path.is_file():
        return 0
    compressed = path.suffix.lower() in (*COMPRESSED, ".parquet")
    return path.stat().st_size * (8 if compressed else 1)


def by_plain_name(directory: Path) -> dict[str, Path]:
    """Return {name: file} of a directory, sorted, names without the suffix of a compression."""
    return {plain_name(path): path for path in sorted(directory.iterdir())}


def is_data(path: Path) -> bool:
    """Return whether a file's name is that of a data file."""
    return suffix_of(path) in (*SUFFIXES, TEXT)


def stem_of(path: Path) -> str:
    """Return a file's name without its suffixes."""
    return Path(plain_name(path)).stem


def files_of(source: str) -> list[Path]:
    """Return the data files of a path: the file itself, or the files of a directory, sorted.

    A directory's files are its .jsonl and .parquet files; without any, its .csv and .tsv files;
    without any, its .json files, and without any, its .txt files. Data files of the other kinds but
    .txt are left out with a warning. All but .parquet may be compressed (.gz, .zst).

    Raises:
        ValueError: the path does not exist, or holds no data files.
    """
    path = Path(source)
    listed = ", ".join((*SUFFIXES, TEXT))
    if path.is_dir():
        data = sorted(p for p in path.iterdir() if is_data(p) and p.is_file())
        for kind in (*KINDS, (TEXT,)):
            files = [p for p in data if suffix_of(p) in kind]
            if files:
                notes = (".json", TEXT)
                others = [p.name for p in data if p not in files and suffix_of(p) not in notes]
                if others:
                    warnings.warn(
                        f"{source}: {', '.join(others)} left out, beside {' and '.join(kind)}: "
                        "name a file itself to read it",
                        stacklevel=2,
                    )
                return files
        raise ValueError(f"data: expected {listed} files in {source}, found none")
    if not path.exists():
        raise ValueError(f"data: expected a file or directory, got {source}, which does not exist")
    if not path.is_file():
        raise ValueError(f"data: expected a regular file, got {source}")
    if not is_data(path):
        raise ValueError(f"data: expected {listed}, got {source}")
    return [path]


def shards(files: list[Path]) -> dict[str, list[Path]]:
    """Return {name: files} of sources: files whose names differ by a running number are one.

    The number has three digits or more and runs from 0 or 1 without a gap: train-00000-of-00002,
    train-00001-of-00002; part_001, part_002. Any other file is a source of its own.
    """
    series: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    for file in files:
        if match := SHARD.fullmatch(stem_of(file)):
            series.setdefault((match[1], suffix_of(file)), []).append((int(match[2]), file))
    name_of: dict[Path, str] = {}
    for (name, _), members in series.items():
        numbers = sorted(number for number, _ in members)
        if len(numbers) > 1 and numbers in ([*range(len(numbers))], [*range(1, len(numbers) + 1)]):
            name_of |= {file: name or file.parent.name for _, file in members}
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(name_of.get(file, stem_of(file)), []).append(file)
    return groups


def parallel_files(source: str) -> dict[str, Path]:
    """Return {language code: file} of two or more files name.xx, name.yy, else {}.

    The files may be compressed: name.xx.gz.
    """
    path = Path(source)
    if not path.parent.is_dir() or path.exists() or not path.name:
        return {}
    files = {}
    for other in sorted(path.parent.iterdir()):
        name = plain_name(other)
        code = name.removeprefix(f"{path.name}.")
        if code == name or not LANGUAGE.fullmatch(code) or not other.is_file():
            continue
        if f".{code}" not in (*SUFFIXES, TEXT, *COMPRESSED):
            files[code] = other
    return files if len(files) > 1 else {}
