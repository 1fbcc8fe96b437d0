"""Operators over the syntax tree: every place where a source can be broken, and how.

compare    < <-> <=, > <-> >=, == <-> !=, is <-> is not, in <-> not in
arithmetic + <-> -, * <-> /, // -> *, % -> +, ** -> *, & <-> |, << <-> >>, -x -> x; of `x += y` too
constant   an integer grows by one, a fraction doubles, True <-> False
drop       a statement that is run for its effect, or `raise`, becomes `pass`
negate     a condition becomes its opposite, `and` <-> `or`
swap       two neighbouring positional arguments that are names

Text that nothing computes with (messages, annotations, `assert`, launch options) is left alone.
Code that runs on CUDA alone has its own list: on a machine without a GPU its mutants survive.
"""

import ast
import re
from itertools import pairwise

from .operators import (
    ARITHMETIC,
    COMPARE,
    HINTS,
    KEYWORDS,
    LOOKS,
    MESSAGES,
    SEQUENCES,
    SILENT,
    SYMMETRIC,
    Mutant,
)


def mutants(file: str, source: str) -> tuple[list[Mutant], list[Mutant]]:
    """Return every mutant of a source that can run here, and those in code for CUDA."""
    visitor = _Sites(file, source)
    visitor.visit(ast.parse(source))
    return visitor.found, visitor.unreachable


def name_of(call: ast.Call) -> str:
    """Return the last name of what is called: `save` of `self.out.save(x)`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def message(call: ast.Call) -> bool:
    """Return whether a call prints a message, or is a hint or a launch option to the compiler."""
    name = name_of(call)
    if any(isinstance(arg, ast.Constant) and arg.value in KEYWORDS for arg in call.args):
        return True
    if name in MESSAGES or name in HINTS or name.endswith(("Error", "Warning")):
        return True
    return ast.unparse(call.func) == "bar.update"


def on_cuda(test: ast.expr) -> bool | None:
    """Return whether a condition holds on CUDA alone (True), or without CUDA alone (False)."""
    if "cuda" not in ast.unparse(test).lower():
        return None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = on_cuda(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        sides = {on_cuda(value) for value in test.values}
        decisive = isinstance(test.op, ast.And)
        return decisive if decisive in sides else None
    if isinstance(test, ast.Compare):
        return not isinstance(test.ops[0], (ast.NotEq, ast.NotIn))
    return True


class _Sites(ast.NodeVisitor):
    def __init__(self, file: str, source: str) -> None:
        self.file, self.data = file, source.encode()
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.unreachable: list[Mutant] = []
        self.names: list[str] = []
        self.in_class = False
        self.here = True
        self.numbers: dict[tuple[str, str], int] = {}

    # ---- places ----

    def span(self, node: ast.AST) -> tuple[int, int]:
        begin = self.starts[node.lineno - 1] + node.col_offset
        return begin, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, operator: str, start: int, end: int, after: str) -> None:
        function = ".".join(self.names) or "module"
        number = self.numbers.get((function, operator), 0)
        self.numbers[function, operator] = number + 1
        mutant = Mutant(self.file, function, operator, start, end, after, number)
        (self.found if self.here else self.unreachable).append(mutant)

    def between(self, operator: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace the operator that stands between two nodes."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.data[start:end].decode()
        if "#" in gap:
            return
        words = r"\s+".join(map(re.escape, old.split()))
        match = re.search(words, gap)
        assert match, (self.file, left.lineno, gap)
        self.add(operator, start + match.start(), start + match.end(), new)

    # ---- walking ----

    def elsewhere(self, *nodes: ast.AST) -> None:
        """Collect what runs on CUDA alone."""
        here, self.here = self.here, False
        for node in nodes:
            self.visit(node)
        self.here = here

    def block(self, statements: list[ast.stmt]) -> None:
        for i, statement in enumerate(statements):
            self.visit(statement)
            if isinstance(statement, ast.If) and on_cuda(statement.test) is False:
                leaves = isinstance(statement.body[-1], (ast.Return, ast.Raise, ast.Continue))
                if leaves and not statement.orelse:
                    self.elsewhere(*statements[i + 1 :])
                    return

    def generic_visit(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "ctx"):
                continue
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.block(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.AST):
                        self.visit(item)
            elif isinstance(value, ast.AST):
                self.visit(value)

    def named(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        outer, self.in_class = self.in_class, isinstance(node, ast.ClassDef)
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()
        self.in_class = outer

    visit_FunctionDef = visit_ClassDef = named

    def skip(self, node: ast.AST) -> None:
        """Leave these alone; f-strings also because Python 3.11 misplaces what is in them."""

    visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = skip

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in KEYWORDS:
            self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and key.value in KEYWORDS):
                self.visit(value)

    # ---- conditions ----

    def condition(self, test: ast.expr) -> None:
        if on_cuda(test) is None:
            if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
                start, end = self.span(test)
                self.add("negate", start, end, f"not ({self.data[start:end].decode()})")
            self.visit(test)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in (text := ast.unparse(node.test)) or "__name__" in text:
            return
        self.condition(node.test)
        cuda = on_cuda(node.test)
        for body, runs in ((node.body, cuda is not True), (node.orelse, cuda is not False)):
            if runs:
                self.block(body)
            else:
                self.elsewhere(*body)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        cuda = on_cuda(node.test)
        for value, runs in ((node.body, cuda is not True), (node.orelse, cuda is not False)):
            if runs:
                self.visit(value)
            else:
                self.elsewhere(value)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        if on_cuda(node) is not None:
            return
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in pairwise(node.values):
            self.between("negate", left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        operators = {ast.Not: ("negate", 4), ast.USub: ("arithmetic", 1), ast.Invert: ("negate", 1)}
        constant = isinstance(node.operand, ast.Constant)
        if type(node.op) in operators and not constant and on_cuda(node) is None:
            operator, letters = operators[type(node.op)]
            start, _ = self.span(node)
            self.add(operator, start, start + letters, "")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if on_cuda(node) is not None:
            return
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, node.comparators, strict=False):
            self.between("compare", left, right, *COMPARE[type(op)])
        self.generic_visit(node)

    # ---- values ----

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not (sequence(node.left) or sequence(node.right)):
            self.between("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self.span(node)
        if isinstance(node.value, bool):
            self.add("constant", start, end, str(not node.value))
        elif self.file.endswith(LOOKS):
            return
        elif isinstance(node.value, int):
            self.add("constant", start, end, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add("constant", start, end, repr(2 * node.value or 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        if message(node):
            return
        name = name_of(node)
        if name not in SYMMETRIC and not name.endswith("attr"):
            for left, right in pairwise(node.args):
                texts = [ast.unparse(side) for side in (left, right)]
                named = all(isinstance(s, (ast.Name, ast.Attribute)) for s in (left, right))
                if named and texts[0] != texts[1]:
                    (start, _), (_, end) = self.span(left), self.span(right)
                    self.add("swap", start, end, ", ".join(reversed(texts)))
        self.generic_visit(node)

    # ---- statements ----

    def drop(self, node: ast.stmt) -> None:
        self.add("drop", *self.span(node), "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value
        if isinstance(call, ast.Call) and name_of(call) not in SILENT and not message(call):
            self.drop(node)
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.drop(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self.drop(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.drop(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        # Tiles and stages of a kernel, none of which changes a result.
        if not self.names and any(name.startswith(("CONFIG", "__")) for name in names):
            return
        used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        item = isinstance(node.targets[0], ast.Subscript)
        if item or (self.names and names & used):
            self.drop(node)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if not self.names and ast.unparse(node.target).startswith("CONFIG"):
            return
        # The default of a setting is a choice, not a rule that a test could hold.
        if node.value is not None and not (self.in_class and "config" in self.file):
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.drop(node)
        if type(node.op) in ARITHMETIC and not sequence(node.value):
            self.between("arithmetic", node.target, node.value, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)


def sequence(node: ast.expr) -> bool:
    """Return whether a node is text or a sequence, or the `None` of a union of types."""
    if isinstance(node, ast.BinOp):
        return sequence(node.left) or sequence(node.right)
    return isinstance(node, SEQUENCES) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes, type(None)))
    )
