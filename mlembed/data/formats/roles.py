"""Recognise which column of a source is the query, the positive, a negative, a score, .., by name.

No column gets a role by its position alone, and none whose name or values suggest a role is left
out in silence: `config.Columns` settles such cases. `Roles.describe` says what was understood.

    query, positive [, negatives, score]                 ours
    anchor | question | sentence1 | ..  and  positive | answer | sentence2 | ..    also mixed
    negative, negative_1 .., hard_negatives, neg_0 ..    one text or a list each
    query, pos, neg [, prompt, type]                     FlagEmbedding: lists; an item per positive
    pos_scores, neg_scores                               a teacher's scores, as long as the texts
    query, positive_passages, negative_passages          tevatron: lists of {title, text}
    two columns that are named by codes of languages, also within `translation`    translations
    [text, text ..] a line                               query, positive, negatives
    {"set": [..]}                                        texts that mean the same
    id, lang, text                                       rows of one id are translations
    text [, title]                                       single texts, for distillation
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from ...config import Columns
from .paths import LANGUAGE
from .readers import is_text

QUERIES = {"query", "anchor", "question", "src"}
POSITIVES = {
    "positive", "positives", "pos", "passage", "document", "answer", "response", "context",
    "positive_passages", "positive_ctxs", "tgt",
}  # fmt: skip
# Pairs of names that have their meaning together.
TOGETHER = (
    *(("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_0", "sentence_1")),
    *(("sentence_a", "sentence_b"), ("text1", "text2"), ("text_1", "text_2")),
    *(("text_a", "text_b"), ("question1", "question2"), ("premise", "hypothesis")),
    ("source", "target"),
)
NEGATIVE = re.compile(
    r"(?:hard_)?neg(?:ative)?s?_?(\d*)(?:_(?:passages?|documents?|docs?|texts?|ctxs))?"
    r"|rejected(?:_responses?)?"
)
SCORES = {"score", "scores", "similarity_score", "similarity", "label", "labels"}
CLASSES = {"label", "labels"}
# Columns of a teacher's scores, by role.
TEACHER_SCORES = {
    "positive_scores": ("pos_scores", "positive_scores", "positive_score"),
    "negative_scores": ("neg_scores", "negative_scores", "negative_score"),
}
IDS = ("id", "verse_id")
# Parts of names that suggest a role, and ends of names of columns that describe another column.
HINT = re.compile(
    r"(?:^|_)(?:neg|negs|negatives?|pos|positives?|query|queries|questions?|anchors?|passages?|"
    r"documents?|docs?|answers?|responses?|hypothesis|premise|labels?|scores?|similarity|"
    r"prompts?|instructions?|duplicate)(?:_|\d|$)"
)
ABOUT = re.compile(
    r".*_(?:ids?|urls?|titles?|scores?|starts?|ends?|lengths?|types?|sources?|lang|language|ranks?|"
    r"index|date|time|tokens?|count|hash|meta|metadata)|answers"
)
# ISO 639-1. Codes of three letters count together with one of these, or with `eng`.
CODES = set(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy
    da de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu
    hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb
    lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om
    or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw
    ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Roles:
    """Columns of a source by role; "" is a role that no column has.

    Pairs have a query, n-way tables an id, single texts a text alone.

    positive_scores, negative_scores: a teacher's scores of the query with each of these texts.
    title: comes before a single text. label: COLUMN=VALUE of the rows that are pairs. kind: of the
    texts of an n-way table. type: of FlagEmbedding, which names a task. languages: codes that name
    the columns of query and positive. unused: columns without a role.
    """

    query: str = ""
    positive: str = ""
    negatives: tuple[str, ...] = ()
    score: str = ""
    positive_scores: str = ""
    negative_scores: str = ""
    label: str = ""
    prompt: str = ""
    type: str = ""
    query_lang: str = ""
    positive_lang: str = ""
    id: str = ""
    lang: str = ""
    text: str = ""
    title: str = ""
    kind: str = ""
    languages: tuple[str, ...] = ()
    unused: tuple[str, ...] = field(default=(), compare=False)

    @property
    def nway(self) -> bool:
        """Whether rows of one id are translations of each other."""
        return bool(self.id)

    @property
    def single(self) -> bool:
        """Whether rows are single texts, which belong to no pair."""
        return bool(self.text) and not self.id

    def by_role(self) -> dict[str, tuple[str, ...]]:
        """Return {role: columns} of the roles that have any."""
        names = (
            *("query", "positive", "negatives", "score", "positive_scores", "negative_scores"),
            *("label", "prompt", "type"),
            *("query_lang", "positive_lang", "id", "lang", "text", "title", "kind"),
        )
        given = {name: getattr(self, name) for name in names}
        columns = {name: (c,) if isinstance(c, str) else c for name, c in given.items() if c}
        if self.label:
            columns["label"] = (self.label.partition("=")[0],)
        return columns

    def columns(self) -> list[str]:
        """Return the columns that have a role, in the order of `by_role`."""
        return list(dict.fromkeys(c for columns in self.by_role().values() for c in columns))

    def describe(self) -> str:
        """Return what was understood: role=column .., and the columns that nothing uses."""
        parts = [f"{role}={','.join(columns)}" for role, columns in self.by_role().items()]
        if self.label:
            parts = [f"label:{self.label}" if p.startswith("label=") else p for p in parts]
        return f"{' '.join(parts)}; unused: {', '.join(self.unused) or 'none'}"


def recognise(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns,
    task: str = "auto",
    evaluation: bool = False,
) -> Roles:
    """Return the roles of the columns of a source.

    Args:
        rows: the first valid rows. columns: what the user has settled, which goes first. task: of
            the source; with sts whole numbers in `label` are similarities. evaluation: whether
            scores are compared with, and texts of an n-way table have kinds.

    Raises:
        ValueError: roles that the names do not give, or that several columns could have; a column
            without a role whose name or values suggest one.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    if columns.given:
        return _as_told(names, columns)
    plain = {_plain(name): name for name in reversed(names)}
    roles = _nway(plain, evaluation) or _pairs(plain, names) or _texts(plain)
    if not roles:
        got = ", ".join(names) or "none"
        raise ValueError(
            f"expected columns query, positive [, negatives, score], or id, lang, text, or text, "
            f"or names that docs/data.md lists, got {got}; name them: --columns.query .. "
            "--columns.positive .., or --columns.text .."
        )
    if _plain(roles.get("score", "")) in CLASSES and task != "sts" and not evaluation:
        _check_similarities(roles["score"], rows)
    used = Roles(**roles)
    unused = [name for name in names if name not in used.columns()]
    for name in unused:
        _check_unused(name, rows)
    return Roles(**roles, unused=tuple(unused))


def _plain(name: str) -> str:
    return re.sub(r"[-\s]+", "_", name.strip().lower())


def _as_told(names: Sequence[str], columns: Columns) -> Roles:
    told = columns.to_roles()
    used = Roles(**told)
    for role, given in used.by_role().items():
        for column in given:
            if column not in names:
                raise ValueError(
                    f"columns.{role}: expected one of {', '.join(names) or 'none'}, got {column}"
                )
    return Roles(**told, unused=tuple(n for n in names if n not in used.columns()))


def _nway(plain: Mapping[str, str], kinds: bool) -> dict[str, Any]:
    for name in IDS:
        if {name, "lang", "text"} <= plain.keys():
            roles = {"id": plain[name], "lang": plain["lang"], "text": plain["text"]}
            return roles | ({"kind": plain["kind"]} if kinds and "kind" in plain else {})
    return {}


def _pairs(plain: Mapping[str, str], names: Sequence[str]) -> dict[str, Any]:
    """Return the roles of pairs, {} if the names give no query and positive."""
    roles: dict[str, Any] = {}
    together = next(((a, b) for a, b in TOGETHER if {a, b} <= plain.keys()), ())
    queries = [plain[name] for name in plain if name in {*QUERIES, *together[:1]}]
    positives = [plain[name] for name in plain if name in {*POSITIVES, *together[1:]}]
    if queries and positives:
        roles["query"] = _single("query", queries)
        roles["positive"] = _single("positive", positives)
    elif set(plain) >= {"1", "2"} and all(name.isdecimal() for name in plain):
        # The texts of a list, which have no names.
        roles = {"query": "1", "positive": "2", "negatives": tuple(names[2:])}
        return roles
    elif len(codes := _codes(names)) == 2:
        roles = {"query": codes[0], "positive": codes[1], "languages": tuple(codes)}
    else:
        return {}
    matches = [(int(m[1] or 0), n) for n in names if (m := NEGATIVE.fullmatch(_plain(n)))]
    roles["negatives"] = tuple(name for _, name in sorted(matches, key=lambda match: match[0]))
    if scores := [plain[name] for name in plain if name in SCORES]:
        roles["score"] = _single("score", scores)
    teacher_scores = {
        role: [plain[n] for n in names if n in plain] for role, names in TEACHER_SCORES.items()
    }
    # Only both together can be compared, so one without the other is unused.
    if all(teacher_scores.values()):
        roles |= {role: _single(role, found) for role, found in teacher_scores.items()}
    for role in ("prompt", "query_lang", "positive_lang"):
        if role in plain:
            roles[role] = plain[role]
    if "type" in plain and _plain(roles["positive"]) == "pos":
        roles["type"] = plain["type"]
    return roles


def _texts(plain: Mapping[str, str]) -> dict[str, Any]:
    """Return the roles of single texts; {} without a column text, or with one of another role."""
    if "text" not in plain or "lang" in plain or any(map(suggests_role, plain)):
        return {}
    return {name: plain[name] for name in ("text", "title") if name in plain}


def _single(role: str, candidates: Sequence[str]) -> str:
    if len(candidates) > 1:
        raise ValueError(
            f"{role}: expected one column, got {', '.join(sorted(candidates))}; name it: "
            f"--columns.{role}"
        )
    return candidates[0]


def _codes(names: Iterable[str]) -> list[str]:
    """Return the columns that are named by codes of languages; `id` and scores are not."""
    codes = [n for n in names if LANGUAGE.fullmatch(n) and n.lower() not in {"id", *SCORES}]
    short = [n for n in codes if re.split("[-_]", n)[0].lower() in CODES | {"eng"}]
    # A code of three letters counts together with a known one.
    return codes if len(codes) == 2 and short else short


def _check_similarities(column: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if the values of `label` may be classes: few whole numbers, or words."""
    values = {row.get(column) for row in rows if isinstance(row.get(column), str | int | float)}
    numbers = {number for value in values if (number := as_number(value)) is not None}
    words = sorted(str(value) for value in values if as_number(value) is None)
    whole = bool(numbers) and all(number == int(number) for number in numbers)
    if words or whole and len(numbers) <= 3:
        got = ", ".join(words[:3] or [f"{number:g}" for number in sorted(numbers)])
        raise ValueError(
            f"{column}: expected similarities, got classes: {got}; say what they mean: "
            f"--columns.score {column} for similarities, --columns.label {column}=VALUE if only "
            "rows of that value are pairs, each beside --columns.query and --columns.positive"
        )


def suggests_role(name: str) -> bool:
    """Return whether a column's name is that of a role, or reads like one."""
    plain = _plain(name)
    return bool(HINT.search(plain) or NEGATIVE.fullmatch(plain)) and not ABOUT.fullmatch(plain)


def _check_unused(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a column that has no role, although its name or values suggest one."""
    if ABOUT.fullmatch(_plain(name)):
        return
    why = "its name suggests a role" if suggests_role(name) else ""
    values = [value for row in rows[:100] if isinstance(value := row.get(name), list) and value]
    if not why and any(all(is_text(item) or text_of(item) for item in value) for value in values):
        why = "its values are lists of texts, as negatives are"
    if why:
        raise ValueError(
            f"{name}: expected a column that can be left out, but {why}; say which columns are "
            "used: --columns.query .., --columns.positive .. [, --columns.negatives ..]"
        )


# ---- values ----


def as_number(value: Any) -> float | None:
    """Return a number, or a text that spells one, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def text_of(value: Any) -> str:
    """Return the text of {text [, title]}, a title in front as in BEIR; "" for anything else."""
    if not isinstance(value, Mapping) or not is_text(value.get("text")):
        return ""
    title = value.get("title")
    return f"{title} {value['text']}" if is_text(title) else str(value["text"])


def unwrap(row: dict[str, Any], number: int, known: AbstractSet[str]) -> list[dict[str, Any]]:
    """Return a row with the columns that are inside one of its values.

    {"translation": {"en": .., "de": ..}} has the columns en and de, and {"set": {"query": .., ..}}
    has those of the set. {"set": [text, text ..]} is several rows of an n-way table, whose id is
    `number`.

    Args:
        known: columns that are named by the user, which stay as they are.
    """
    for name in ("translation", "set"):
        value = row.get(name)
        if name in known or value is None:
            continue
        rest = {key: other for key, other in row.items() if key != name}
        if isinstance(value, dict):
            return [rest | value]
        if name == "set" and isinstance(value, list):
            return [{"id": str(number), "lang": "und", "text": text} for text in value]
    return [row]
