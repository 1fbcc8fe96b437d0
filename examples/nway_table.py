"""Turn line-aligned files name.xx, name.yy, ... into a table that `--data` and `--eval` take.

python examples/nway_table.py NAME OUT.parquet

Line i of every file says the same thing. The table has the columns id, lang and text; rows with
the same id are translations of each other.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main(name: str, out: str) -> None:
    path = Path(name)
    texts = {
        file.suffix[1:]: file.read_text(encoding="utf-8").split("\n")
        for file in sorted(path.parent.glob(f"{path.name}.*"))
    }
    lengths = {language: len(lines) for language, lines in texts.items()}
    if len(texts) < 2 or len(set(lengths.values())) > 1:
        sys.exit(f"{name}: expected two or more files of equal length, got {lengths}")
    rows = [
        {"id": f"{path.name}-{i}", "lang": language, "text": text.strip()}
        for language, lines in texts.items()
        for i, text in enumerate(lines)
        if text.strip()
    ]
    pq.write_table(pa.Table.from_pylist(rows), out)
    print(f"{out}: {len(rows)} texts in {', '.join(texts)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
