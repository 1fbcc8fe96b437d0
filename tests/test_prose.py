"""Plain English, as far as a machine can tell: first words of docstrings, and a list of words.

Docstrings begin with a verb or the returned thing. The listed words are defects in nearly all uses;
a line that needs one of them may quote it in backticks.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest
from test_house import FILES, ROOT

FIRST_WORDS = {"Of", "By", "With", "As", "In", "What", "Who", "Which", "Whose", "When", "Where"}
FIRST_WORDS |= {"Those", "These", "Such"}
# A pattern, and what to write instead.
WORDS = {
    r"no UTF-8": "invalid UTF-8",
    r"(?<!there )(is|are|was|were) no (number|text|word|json|list|file|name|tensor)s?": "not a",
    r"(which|that|it|they) (is|are|was|were) none": "not found, or: there is no X",
    r"(has|have|had) not(?! been| yet| \w+ed)": "does not have",
    r"(is|are|was|were) (said|told|heard of)": "an active verb with its subject",
    r"(is|are|was|were) refused by": "X rejects Y",
    r"(goes|go|went|going|gone) on (with|from)": "continue, resume",
    r"(whoever|whomever|whatever|however many)": "the noun",
    r"(anew|alike|beside|besides|towards|afresh|thereof|whence|thus)": "again, equally, next to",
    r"(so many|that many|as many as)": "N, up to",
    r"as \w+('s)? (has|have) (it|them)": "like X",
    r"where there (is|are) none": "if there is no X",
    r"(of these alone|is home|stays itself|made ready)": "name the thing",
}
FORBIDDEN = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in WORDS), re.IGNORECASE)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of docstrings, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                value = getattr(statement, "value", None)
                text = getattr(value, "value", None)
                if isinstance(statement, ast.Expr) and isinstance(text, str):
                    yield statement.lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of comments; lines that follow each other are one text."""
    block, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, (line, _) = token.string.strip("# "), token.start
            if block and line != last + 1:
                yield last, block
                block = ""
            block, last = f"{block} {text}", line
    yield last, block


def defects(source: str) -> Iterator[str]:
    """Yield what a reviewer would mark, with its line."""
    for line, text in docstrings(source):
        word = (re.match(r"\W*(\w+)", text) or [text, ""])[1]
        if word in FIRST_WORDS:
            yield f"{line}: begins with {word}: {text[:60]!r}"
    for line, text in (*docstrings(source), *comments(source)):
        plain = re.sub(r"`[^`]*`|\"[^\"]*\"", "", " ".join(text.split()))
        for match in FORBIDDEN.finditer(plain):
            near = plain[max(0, match.start() - 30) : match.end() + 20]
            yield f"{line}: {match[0]!r} in {near!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_plain(path):
    assert not list(defects(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source, count",
    [
        ('"""Of a model."""', 1),
        ('def f():\n    """What it gives."""', 1),
        ('class A:\n    x: int\n    """With `y`: the same."""', 1),
        ('"""Return what it gives."""', 0),
        ("x = 1  # bytes that are no text", 1),
        ("# Bytes that are\n# no text.", 1),
        ("# There is no file.", 0),
        ("# It has not been read; it has not arrived.", 0),
        ("# Which the kernels have not.", 1),
        ('# A message says "is none".\nx = "which is none"', 0),
    ],
)
def test_defects_are_noticed(source, count):
    assert len(list(defects(source))) == count
