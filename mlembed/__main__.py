"""The command `mlembed`: `mlembed encode MODEL "a text"`, or `python -m mlembed` in a checkout."""

import sys
from importlib import import_module

from .runtime import process

COMMANDS = {
    "train": "train a model by a recipe, with the train.py of a checkout",
    "data": "read training data and say what it is taken for, without training",
    "encode": "encode texts at any width, depth and vocabulary rank",
    "evaluate": "score a model over every size",
    "export": "write a model of one size for sentence-transformers, transformers and onnxruntime",
    "report": "make an HTML page of a run's scores and costs",
    "mine": "find hard negatives for pairs",
    "merge": "average models of one shape",
    "prune": "cut a smaller model out of a larger one",
    "teacher": "store a teacher's vectors of training text",
    "score": "score training pairs with a cross-encoder",
    "cache": "list what is stored of earlier calls, and clear it",
}


def usage() -> str:
    """Return the text of `mlembed --help`."""
    lines = [f"  {name:<9} {about}" for name, about in COMMANDS.items()]
    return "usage: mlembed COMMAND ...\n\n" + "\n".join(lines) + "\n\nmlembed COMMAND --help"


def main() -> int:
    """Run the command that the first argument names. Return the exit status.

    A command's file is imported when it runs, and what needs torch only once its arguments are
    read, so that help and mistakes are answered quickly.
    """
    process.begin()
    from .runtime.errors import one_line_errors

    with one_line_errors():
        name, rest = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
        if name in ("-h", "--help"):
            print(usage())
            return 0
        if name not in COMMANDS:
            raise ValueError(f"command: expected one of {', '.join(COMMANDS)}, got {name}")
        command = import_module(f"mlembed.cli.{name}")
        if name == "train":  # Its arguments are a run's keys, which have a parser of their own.
            command.main(rest)
        else:
            from .config import command_line

            command_line.call(command.main, rest, f"mlembed {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
