"""Real builds: the split has to hold for the locales that Babel ships."""

import calendar
import hashlib
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict

import pyarrow as pa
import pytest

from mlembed.data import cldr

NAMES = {*calendar.month_name[1:], *calendar.day_name}


def digest(tables: tuple[pa.Table, pa.Table]) -> str:
    return hashlib.sha256(repr([table.to_pydict() for table in tables]).encode()).hexdigest()


@pytest.fixture(scope="module")
def tables() -> tuple[pa.Table, pa.Table]:
    return cldr.build()


@pytest.fixture(scope="module")
def train(tables) -> list[dict]:
    return tables[0].to_pylist()


@pytest.fixture(scope="module")
def held_out(tables) -> list[dict]:
    return tables[1].to_pylist()


def test_columns_and_size(tables):
    train, held_out = tables
    assert train.column_names == ["query", "positive", "query_lang", "positive_lang", "kind"]
    assert held_out.column_names == ["id", "kind", "lang", "text"]
    assert {field.type for table in tables for field in table.schema} == {pa.string()}
    assert 0.95 * 120_000 <= train.num_rows <= 1.02 * 120_000


def test_locales_and_scripts(train, held_out):
    texts = defaultdict(list)
    for row in train:
        texts[row["positive_lang"]].append(row["positive"])
    assert len(texts) >= 140
    assert set(texts) == {row["lang"] for row in held_out} - {"en"}
    assert {row["query_lang"] for row in train} == {"en"}
    scripts = set()
    for positives in texts.values():
        letters = Counter(
            unicodedata.name(letter).split()[0] for letter in "".join(positives) if letter.isalpha()
        )
        scripts.add(letters.most_common(1)[0][0])
    assert len(scripts) >= 25, sorted(scripts)
    # zh_Hans, no and ht print the very texts of zh, nb and fr.
    assert not {"zh_Hans", "no", "ht", "sr_Cyrl"} & set(texts)
    assert {"zh", "zh_Hant", "sr", "sr_Latn", "yue_Hans"} <= set(texts)


def test_training_mix(train):
    kinds = Counter(row["kind"] for row in train)
    assert set(kinds) == set(cldr.MIX)
    for kind, share in cldr.MIX.items():
        assert kinds[kind] / len(train) == pytest.approx(share, abs=0.02), kind
    per_locale = Counter((row["kind"], row["positive_lang"]) for row in train)
    locales = {row["positive_lang"] for row in train}
    for kind in cldr.MIX:
        counts = [per_locale[kind, locale] for locale in locales]
        full = max(counts)
        # Some locales have few currencies, or no words for units (25 of 161 in Babel 2.19, where
        # Igbo has 44 of 52 territories); none may have more than others.
        assert counts.count(full) >= 0.8 * len(locales), (kind, sorted(counts)[:40])
        if kind in ("date", "datetime", "territory"):
            assert min(counts) >= 0.8 * full, kind


def test_pairs_are_distinct_and_translated(train):
    assert len({(row["query"], row["positive"]) for row in train}) == len(train)
    assert all(cldr.normalise(row["query"]) != cldr.normalise(row["positive"]) for row in train)


def test_every_locale_has_all_months_and_weekdays(train):
    seen = defaultdict(set)
    for row in train:
        if row["kind"] in ("date", "datetime"):
            seen[row["positive_lang"]] |= NAMES & set(row["query"].replace(",", "").split())
    assert [lang for lang, names in seen.items() if names != NAMES] == []


def test_no_text_is_a_fallback_of_babel(train, held_out):
    """Babel prints the root's patterns or the unit's identifier where CLDR has no words."""
    units = set(cldr._UNITS)
    texts = [(row["kind"], row["positive"]) for row in train]
    texts += [(row["kind"], row["text"]) for row in held_out if row["lang"] != "en"]
    for kind, text in texts:
        assert text and "{" not in text, (kind, text)
        if kind == "unit":
            assert units.isdisjoint(text.split()), text
        if kind == "duration":  # such as "+5 h"
            letters = text[1:].replace(" ", "").strip("0123456789")
            assert not (text[0] in "+-" and letters in set("yqmwdhs")), text
        if kind in ("date", "datetime"):
            assert any(map(str.isalpha, text)) and " M0" not in text, text


def test_units_whose_long_form_is_the_short_form(train):
    """CLDR states such a unit once, as short, which most East Asian locales rely on."""
    miles = [
        row["positive"]
        for row in train
        if row["positive_lang"] == "zh"
        and row["kind"] == "unit"
        and row["query"].endswith(" miles")
    ]
    assert miles and all(text.endswith("英里") for text in miles), miles


def test_held_out_sizes(held_out):
    sizes = cldr.COMPOSED_SIZES | cldr.ZERO_SHOT_SIZES
    assert tuple(sizes) == cldr.COMPOSED + cldr.ZERO_SHOT
    assert sizes == {
        **{"date": 50, "datetime": 50, "unit": 24, "money": 24, "duration": 24, "list": 24},
        **{"territory": 20, "language": 20, "currency": 20},
    }
    english = Counter(row["kind"] for row in held_out if row["lang"] == "en")
    assert english == sizes
    count = Counter((row["lang"], row["kind"]) for row in held_out)
    locales = {lang for lang, _ in count} - {"en"}
    for kind, size in sizes.items():
        counts = [count[lang, kind] for lang in locales]
        assert max(counts) <= size
        assert sum(counts) >= 0.7 * size * len(locales), kind
        if kind in ("date", "datetime"):
            assert min(counts) == size


def test_held_out_texts_are_distinct(held_out):
    """No two ids of a locale and kind share a text, and none repeats the English of its id."""
    assert len({(row["id"], row["lang"]) for row in held_out}) == len(held_out)
    keys = [(row["kind"], row["lang"], cldr.normalise(row["text"])) for row in held_out]
    assert len(set(keys)) == len(keys)
    english = {row["id"]: cldr.normalise(row["text"]) for row in held_out if row["lang"] == "en"}
    for row in held_out:
        if row["lang"] != "en":
            assert cldr.normalise(row["text"]) != english[row["id"]]


def test_held_out_texts_are_not_in_training(train, held_out):
    shown = {cldr.normalise(row[side]) for row in train for side in ("query", "positive")}
    leaks = [row for row in held_out if cldr.normalise(row["text"]) in shown]
    assert leaks == []


def test_held_out_days(train, held_out):
    """A day asked for in `date` is not in training with a time attached, nor the reverse."""

    def day(text: str) -> str:
        return ",".join(text.split(",")[:3])

    dated = ("date", "datetime")
    asked = {day(row["text"]) for row in held_out if row["lang"] == "en" and row["kind"] in dated}
    assert len(asked) == 100
    assert asked.isdisjoint(day(row["query"]) for row in train if row["kind"] in dated)


def test_zero_shot_names_in_lists_and_amounts(train, held_out):
    names = defaultdict(set)
    for row in held_out:
        if row["kind"] in cldr.ZERO_SHOT and row["lang"] == "en":
            names[row["kind"]].add(row["text"])
    items = set()
    for row in train:
        if row["kind"] == "list":
            for separator in (", and ", ", or ", " and ", " or "):
                head, found, last = row["query"].rpartition(separator)
                if found:
                    items |= {*head.split(", "), last}
                    break
    assert {"Germany", "Japan"} & items  # the split into items works
    # Not even as another thing of that name: the language Nauru held out, the country in a list.
    assert items.isdisjoint(set().union(*names.values()))
    # An amount shows the plural: "5 Kenyan shillings"; compare without number and plural ending.
    english = cldr._voice(cldr.Locale("en"))
    codes = [code for code, name in english.names["currency"].items() if name in names["currency"]]
    assert len(codes) == 20
    plurals = {english.say("money", (5, code)).removeprefix("5 ") for code in codes}
    plurals |= {english.say("money", (1, code)).removeprefix("1 ") for code in codes}
    amounts = {row["query"].split(" ", 1)[1] for row in train if row["kind"] == "money"}
    assert "Japanese yen" in amounts  # the split works
    assert amounts.isdisjoint(plurals)


def test_zero_shot_names_in_lists_of_other_languages(train, held_out):
    """The same in languages whose lists split at one sign."""
    names = {(row["lang"], row["text"]) for row in held_out if row["kind"] == "territory"}
    for lang, signs in {"ja": "、|または", "zh": "、|和|或"}.items():
        texts = [r["positive"] for r in train if (r["kind"], r["positive_lang"]) == ("list", lang)]
        shown = {(lang, item) for text in texts for item in re.split(signs, text)}
        assert len(shown) > 50 and shown.isdisjoint(names)


def test_lists_have_two_to_four_items():
    parts = {"style": ["or"], "territory": list("ABCDEFG")}
    rng = random.Random(0)
    drawn = [cldr._draw("list", rng, parts, ()) for _ in range(100)]
    assert {len(items) for _, *items in drawn} == {2, 3, 4}
    assert all(len(set(items)) == len(items) for _, *items in drawn)


def test_parts_of_held_out_texts_are_in_training(train, held_out):
    """Held-out lists name countries, and amounts name units, that training shows in English."""
    shown = {kind: set() for kind in ("unit", "money", "territory")}
    for row in train:
        if row["kind"] in ("unit", "money"):
            shown[row["kind"]].add(row["query"].split(" ", 1)[1])
        if row["kind"] == "territory":
            shown["territory"].add(row["query"])
    for row in held_out:
        if row["lang"] == "en" and row["kind"] in ("unit", "money"):
            assert row["text"].split(" ", 1)[1] in shown[row["kind"]]
        if row["lang"] == "en" and row["kind"] == "list":
            assert sum(name in row["text"] for name in shown["territory"]) >= 2, row


def test_builds_are_repeatable(tables):
    small = cldr.build(seed=1, pairs=cldr.MIN_PAIRS)
    assert 0.9 * cldr.MIN_PAIRS <= small[0].num_rows <= 1.1 * cldr.MIN_PAIRS
    assert set(small[0]["kind"].to_pylist()) == set(cldr.MIX)
    assert small[1]["text"].to_pylist() != tables[1]["text"].to_pylist()  # another seed
    command = (
        "import hashlib; from mlembed.data import cldr; tables = cldr.build(1, cldr.MIN_PAIRS);"
        "print(hashlib.sha256(repr([t.to_pydict() for t in tables]).encode()).hexdigest())"
    )
    elsewhere = {"PYTHONHASHSEED": "12345", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"}
    elsewhere["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    fresh = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == digest(small)


@pytest.mark.parametrize("arguments", [{"pairs": 0}, {"pairs": cldr.MIN_PAIRS - 1}, {"seed": -1}])
def test_bad_arguments(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
        cldr.build(**arguments)
