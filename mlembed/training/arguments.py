"""Command lines of a training run: a recipe or a file, then overrides. Imports no torch.

`python train.py RECIPE --optim.lr 1e-3` starts from a recipe and overrides it field by field.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence

from .. import config
from ..config import command_line, recipes, strict
from ..modeling import hf_config


def parse(args: Sequence[str]) -> config.Run:
    """Return the run of `RECIPE | config.json` and overrides `--optim.lr 1e-3` or `optim.lr=1e-3`.

    Raises:
        ValueError: an unknown recipe or key (with near names), or a wrong value.
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
    for arg in rest:
        key = arg[2:].split("=")[0].replace("-", "_")
        negated = key.rpartition(".")[2].startswith("no_")
        if arg.startswith("--") and key not in known and not negated:
            raise ValueError(f"--{key}: no such key{strict.near(key, known)}")
    if not {"-h", "--help"} & set(rest):
        base = _from_init(name, base, rest)
    keys = {arg[2:].split("=")[0] for arg in rest if arg.startswith("--")}
    if "steps" in keys and "epochs" not in keys:
        base = dataclasses.replace(base, epochs=0.0)
    run: config.Run = command_line.read(config.Run, rest, f"train.py {name}", default=base)
    if run.init and run.optim.lr > config.TUNING_LR and name == "tiny" and "optim.lr" not in keys:
        raise ValueError(
            f"optim.lr: expected a rate for the trained weights of --init, like --optim.lr 2e-5; "
            f"the {run.optim.lr:g} of tiny is for random weights and would spoil them"
        )
    from ..data import sources  # Arrow and numpy load only once the arguments are read.

    return sources.expand(run)


def _from_init(name: str, base: config.Run, args: Sequence[str]) -> config.Run:
    """Return `base` with the shape of the checkpoint that --init names, for args to override.

    The recipe elastic is made for that checkpoint. The shape of a saved run is its own.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--init", default=base.init if name in recipes.RECIPES else "")
    finder.add_argument("--model.style", dest="style", default="")
    given = finder.parse_known_args(args)[0]
    if not (init := given.init):
        return base
    model = hf_config.from_checkpoint(hf_config.resolve(init, "init"), base.model, given.style)
    if name == "elastic":
        base = recipes.elastic(init, model)
        model = base.model
    longest = min(base.max_length, model.max_position_embeddings)
    return dataclasses.replace(
        base, init=init, tokenizer="", init_tokens="random", model=model, max_length=longest
    )


def _listed() -> Iterator[str]:
    """Yield lines of recipes: those that share a docstring, then its first line."""
    by_doc: dict[str, list[str]] = {}
    for name, make in recipes.RECIPES.items():
        by_doc.setdefault((make.__doc__ or "").splitlines()[0], []).append(name)
    for doc, names in by_doc.items():
        yield from textwrap.wrap(", ".join(names), width=100, break_on_hyphens=False)
        yield f"    {doc}"


def _is_override(arg: str, known: Sequence[str]) -> bool:
    """Return whether `arg` sets a key, as `lang=en/part.parquet` does not."""
    key, equals, _ = arg.partition("=")
    ours = key.startswith(("model.", "loss.", "depth.", "optim.")) or key.replace("-", "_") in known
    return bool(equals) and ours
