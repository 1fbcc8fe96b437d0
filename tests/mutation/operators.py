"""Operators of mutation, what they leave alone, and the mutant itself."""

import ast
from dataclasses import dataclass

OPERATORS = ("compare", "arithmetic", "constant", "drop", "negate", "swap")
# The order in which a part takes its mutants. Swapped arguments seldom escape: half as many.
TURNS = (*OPERATORS[:5], *OPERATORS)
COMPARE = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "+"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
# A sequence on one side: `-` or `/` would only raise TypeError.
SEQUENCES = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Set, ast.Dict)
# Calls that print a message, and calls whose absence is seen in time, memory or a crash alone.
MESSAGES = {"print", "say", "warn", "warning", "info", "debug", "error"}
SILENT = {"close", "collect", "flush", "fsync", "synchronize", "empty_cache", "filterwarnings"}
# Hints to the compiler, and launch options, none of which changes a result.
HINTS = {"assume", "multiple_of", "max_contiguous", "max_constancy"}
KEYWORDS = {
    *("num_warps", "num_stages", "maxnreg", "loop_unroll_factor", "eviction_policy"),
    *("help", "desc", "leave", "mininterval", "dynamic_ncols", "stacklevel", "timeout"),
    "show_progress_bar",
}
# Files whose numbers are looks, to be judged by eye.
LOOKS = "charts.py"
SYMMETRIC = {"min", "max", "minimum", "maximum", "isinstance", "issubclass", "Path", "World"}


@dataclass(frozen=True)
class Mutant:
    """One change: bytes start to end of a file become `after`."""

    file: str
    function: str
    operator: str
    start: int
    end: int
    after: str
    number: int = 0  # among the changes of this function by this operator

    @property
    def id(self) -> str:
        return f"{self.file}:{self.function}:{self.operator}:{self.number}"

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()

    def lines(self, source: str) -> tuple[str, str]:
        """The statement's lines before and after, each on one line."""
        data = source.encode()
        first = data.rfind(b"\n", 0, self.start) + 1
        last = data.find(b"\n", self.end)
        last = len(data) if last < 0 else last
        before = data[first:last].decode()
        after = (data[first : self.start] + self.after.encode() + data[self.end : last]).decode()
        return " ".join(before.split()), " ".join(after.split())

    def line(self, source: str) -> int:
        return source.encode()[: self.start].count(b"\n") + 1
