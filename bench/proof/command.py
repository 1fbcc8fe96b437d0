"""python -m bench proof MODEL=DIR DATA=DIR OUT=DIR: prove on real text what the nesting is worth.

A model is made elastic by `train.py elastic`, and scored at every exit, width and two ranks next to
the model cut without training, to sentence-transformers after equal minutes, and to one size
trained alone. OUT holds every trained model and every score, so the same command continues where a
stopped one was, and at last proof.json, proof.md and proof.svg.

    MODEL      directory of a sentence-transformers model
    DATA       directory with train/*.parquet and eval/{tatoeba_dev,bitext,sts,retrieval}
    MIXTURE    training text; DATA/train by default
    SOURCE     a sentence that says what the model is; else the first of its README
    MINUTES    training of each run (12)
    SEEDS      of ours and of sentence-transformers (0,1)
    LANGUAGES  codes that the recipe was chosen on, which no score contains
    PAIRS      most pairs of a language of bitext (200)
    RANK       the small vocabulary rank (64)
    RECIPE, OPTIONS   of train.py (elastic)

--list prints what is done and what is left, and runs nothing.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

from mlembed.runtime import files
from mlembed.runtime.errors import one_line_errors

from . import plan
from .plan import Piece
from .settings import Proof, check_settings, parse


def main(arguments: Sequence[str]) -> None:
    """Print what is done and what is left, and run what is left."""
    run(arguments, str(__doc__), plan.pieces, write)


def run(
    arguments: Sequence[str],
    doc: str,
    pieces_of: Callable[[Proof], list[Piece]],
    write: Callable[[Proof], None],
) -> None:
    """Run the pieces of a command that are left; --list only names them.

    Args:
        doc: what --help prints. write: writes the pages of the pieces that are done.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(doc)
        sys.exit(0 if arguments else 2)
    with one_line_errors():
        proof = parse([argument for argument in arguments if argument != "--list"])
        check_settings(proof)
        pieces = pieces_of(proof)
        left = plan.left(proof, pieces)
        for piece in pieces:
            print(f"{'left' if piece in left else 'done'}  {piece.name}: {piece.about}")
        if "--list" not in arguments:
            prove(proof, left, write)


def write(proof: Proof) -> None:
    """Write proof.json, proof.md and proof.svg of the pieces that are done, once the source is."""
    from . import page, picture, report

    if not proof.piece("cut@full").exists():
        return
    content = json.loads(json.dumps(report.report(proof)))
    files.write_text(proof.folder / "proof.json", json.dumps(content, indent=1) + "\n")
    files.write_text(proof.folder / "proof.md", page.markdown(content))
    picture.save(content, proof.folder / "proof.svg")


def prove(proof: Proof, left: Sequence[Piece], write: Callable[[Proof], None] = write) -> None:
    """Run the pieces that are left, and write the pages after each."""
    for piece in left:
        print(f"{piece.name}: {piece.about}", flush=True)
        began = time.perf_counter()
        plan.finish(proof, piece, piece.run(proof))
        print(f"  done in {time.perf_counter() - began:.0f} s", flush=True)
        write(proof)
    if not left:
        write(proof)
    print(f"{proof.folder}: every piece is done")
