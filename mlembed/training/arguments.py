"""What users write on the command line, read strictly: a recipe or a file, then overrides.

`python train.py RECIPE --optim.lr 1e-3` starts from a recipe and overrides it field by field.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import textwrap
from collections.abc import Iterator, Sequence

from .. import config
from ..config import recipes, strict
from ..data import sources
from ..modeling import hf_config


def parse(args: Sequence[str]) -> config.Run:
    """`RECIPE | config.json` and overrides (`--optim.lr 1e-3` or `optim.lr=1e-3`) -> Run.

    Raises:
        ValueError: an unknown recipe or key (with near names), a value that does not fit.
    """
    usage = "python train.py RECIPE | FILE [--help] [--key value ..]"
    if not args or args[0] in ("-h", "--help"):
        print("\n".join([f"usage: {usage}", *_listed(), "FILE: a config.json that a run saved"]))
        raise SystemExit(0 if args else 2)
    name, *rest = args
    if name in recipes.RECIPES:
        base = recipes.RECIPES[name]()
    elif name.endswith(".json"):
        base = config.load(name)
    else:
        raise ValueError(
            "recipe: expected a name that --help lists or a config.json"
            f"{strict.near(name, recipes.RECIPES)}, got {name!r}"
        )
    known = [*strict.flat_keys(config.Run), "help"]
    rest = [f"--{arg}" if _is_override(arg, known) else arg for arg in rest]
    helping = {"-h", "--help"} & set(rest)
    for arg in rest:
        key = arg[2:].split("=")[0].replace("-", "_")
        negated = key.rpartition(".")[2].startswith("no_")
        if arg.startswith("--") and key not in known and not negated:
            raise ValueError(f"--{key}: no such key{strict.near(key, known)}")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--init", default=base.init if name in recipes.RECIPES else "")
    init = finder.parse_known_args(rest)[0].init
    if init and not helping:  # the checkpoint's shape is what further keys override
        model = hf_config.from_checkpoint(hf_config.resolve(init), base.model)
        longest = min(base.max_length, model.max_position_embeddings)
        base = dataclasses.replace(base, init=init, tokenizer="", model=model, max_length=longest)
    said = {arg[2:].split("=")[0] for arg in rest if arg.startswith("--")}
    if "steps" in said and "epochs" not in said:
        base = dataclasses.replace(base, epochs=0.0)
    return sources.expand(_override(base, rest, f"train.py {name}"))


def _listed() -> Iterator[str]:
    """Recipes by what they are: names, then the first line of the docstring they share."""
    by_doc: dict[str, list[str]] = {}
    for name, make in recipes.RECIPES.items():
        by_doc.setdefault((make.__doc__ or "").splitlines()[0], []).append(name)
    for doc, names in by_doc.items():
        yield from textwrap.wrap(", ".join(names), width=100, break_on_hyphens=False)
        yield f"    {doc}"


def _override(base: config.Run, args: Sequence[str], prog: str) -> config.Run:
    """tyro's reading of the arguments, with its errors as one-line ValueErrors."""
    import tyro  # here, as benches read shapes where it is not installed

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config.Run, default=base, args=args, prog=prog)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        # tyro draws a box around what was wrong, a ValueError of ours included: one line of it.
        words = re.sub(r"[^\x20-\x7e]+", " ", said.getvalue()).split()
        reason = " ".join(words).split(" For full helptext")[0]
        raise ValueError(reason.removeprefix("Value error ")) from None


def _is_override(arg: str, known: Sequence[str]) -> bool:
    """`optim.lr=1e-3`; other words with an equals sign are paths, as partitioned data has them."""
    key, equals, _ = arg.partition("=")
    ours = key.startswith(("model.", "loss.", "depth.", "optim.")) or key.replace("-", "_") in known
    return bool(equals) and ours
