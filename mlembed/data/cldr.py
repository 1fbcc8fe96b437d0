"""Parallel text in more than 140 languages and scripts, from the Unicode CLDR as Babel ships it.

Dates, amounts, durations, lists and names, each in English and in one other locale. Nothing is
downloaded and nothing is vendored: locale data is under the Unicode License V3 (Babel carries it),
Babel's code under BSD-3-Clause.

No held-out text of any language occurs in training, compared after NFKC, casefold and strip.
Held-out texts of the kinds in COMPOSED are new combinations of known parts; names of the kinds in
ZERO_SHOT are in training neither alone nor inside a list or an amount of money.
"""

import datetime
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from babel import Locale, localedata
from babel.dates import (
    TIMEDELTA_UNITS,
    format_date,
    format_time,
    format_timedelta,
    get_datetime_format,
)
from babel.lists import format_list
from babel.numbers import format_currency
from babel.units import format_unit

from .formats.readers import normalise

# Number of held-out concepts of each kind; a locale that lacks a concept has fewer.
COMPOSED_SIZES = {"date": 50, "datetime": 50, "unit": 24, "money": 24, "duration": 24, "list": 24}
ZERO_SHOT_SIZES = {"territory": 20, "language": 20, "currency": 20}
COMPOSED = tuple(COMPOSED_SIZES)
ZERO_SHOT = tuple(ZERO_SHOT_SIZES)

# Share of each kind in training, the same in every locale.
MIX = {
    "date": 0.10,
    "datetime": 0.10,
    "list": 0.22,
    "unit": 0.16,
    "money": 0.14,
    "duration": 0.10,
    "territory": 0.07,
    "language": 0.06,
    "currency": 0.04,
    "script": 0.01,
}

MIN_PAIRS = 10_000  # With fewer pairs a locale would have no row of the rarest kind.
MIN_LOCALES = 140
MIN_NAMES = 400  # names that differ from English in a locale that counts as translated
COVERAGE = 0.7  # minimum share of the locales that know a part which evaluation uses
TRIES = 10  # maximum draws for each wanted row

_NAMES = {
    "territory": "territories",
    "language": "languages",
    "currency": "currencies",
    "script": "scripts",
}
_PARTS = {"date": "day", "datetime": "day", "money": "currency", "list": "style"}
_NOTHING = ("XA", "XB", "XXX", "ZZ")  # pseudo-locales, unknown currency, unknown region
_SECONDS = dict(TIMEDELTA_UNITS)
# The signs say "ago", nothing, "in".
_DURATIONS = [(unit, sign) for unit in _SECONDS for sign in (-1, 0, 1)]
_STYLES: list[Literal["or", "standard"]] = ["or", "standard"]
_UNITS = [
    *("angle-degree", "area-acre", "area-hectare", "area-square-kilometer", "area-square-meter"),
    *("area-square-mile", "digital-byte", "digital-gigabyte", "digital-kilobyte"),
    *("digital-megabyte", "electric-ampere", "electric-volt", "energy-calorie", "energy-joule"),
    *("energy-kilowatt-hour", "length-centimeter", "length-foot", "length-inch"),
    *("length-kilometer", "length-light-year", "length-meter", "length-mile"),
    *("length-millimeter", "length-yard", "mass-gram", "mass-kilogram", "mass-milligram"),
    *("mass-ounce", "mass-pound", "mass-tonne", "power-horsepower", "power-kilowatt"),
    *("power-watt", "speed-kilometer-per-hour", "speed-meter-per-second", "speed-mile-per-hour"),
    *("temperature-celsius", "volume-cubic-kilometer", "volume-cubic-meter", "volume-gallon"),
    *("volume-liter", "volume-milliliter", "volume-tablespoon", "volume-teaspoon"),
]
# Small numbers are frequent, for the plural forms; large numbers show the grouping of digits. They
# recur in a batch, so that the counted thing has to tell texts apart, not the number alone.
_NUMBERS = [*range(1, 30), *range(100, 1000, 90), *range(1000, 10_000, 900)]
_DAYS = [datetime.date(1950, 1, 1) + datetime.timedelta(days) for days in range(36_525)]

# The meaning of a text in any language: a day, a moment, (number, unit or currency code),
# (number, unit, sign), (style, *territory codes), or the code of a name.
Concept = Any


@dataclass(frozen=True)
class _Voice:
    """One locale, which turns concepts into text.

    names: {kind: {code: name}}, without names that two codes share. parts: {kind: parts of its
    concepts}, which are codes of names, units, (duration, sign) or styles.
    """

    locale: Locale
    names: dict[str, dict[str, str]]
    parts: dict[str, list]

    def say(self, kind: str, concept: Concept) -> str | None:
        """Return the text of a concept, or None if the locale lacks a part of it."""
        match kind, concept:
            case "date", day:
                return format_date(day, "full", locale=self.locale)
            case "datetime", moment:
                # Babel's format_datetime would add the time zone.
                text = str(get_datetime_format("full", locale=self.locale)).replace("'", "")
                text = text.replace("{0}", format_time(moment.time(), "short", locale=self.locale))
                return text.replace("{1}", format_date(moment, "full", locale=self.locale))
            case "unit", (number, unit) if unit in self.parts["unit"]:
                text = format_unit(number, unit, "long", locale=self.locale)
                # CLDR omits a "long" form that equals "short", which Babel does not look up.
                if unit in text:
                    text = format_unit(number, unit, "short", locale=self.locale)
                return text
            case "money", (number, code) if code in self.parts["currency"]:
                return format_currency(
                    number, code, locale=self.locale, currency_digits=False, format_type="name"
                )
            case "duration", (number, unit, sign) if (unit, sign) in self.parts["duration"]:
                return format_timedelta(
                    number * _SECONDS[unit] * (sign or 1),
                    granularity=unit,
                    threshold=float("inf"),  # "90 minutes", not "2 hours"
                    add_direction=sign != 0,
                    locale=self.locale,
                )
            case "list", (style, *codes) if style in self.parts["style"]:
                known = self.names["territory"]
                if known.keys() >= set(codes):
                    return format_list([known[code] for code in codes], style, locale=self.locale)
            case _ if kind in _NAMES:
                return self.names[kind].get(concept)
        return None


def _voice(locale: Locale) -> _Voice:
    names = {}
    for kind, attribute in _NAMES.items():
        keys = {code: normalise(name) for code, name in getattr(locale, attribute).items()}
        count = Counter(keys.values())
        names[kind] = {
            code: getattr(locale, attribute)[code]
            for code in sorted(keys)
            if count[keys[code]] == 1 and keys[code] and code not in _NOTHING
        }
    parts = {kind: list(table) for kind, table in names.items()}
    return _Voice(locale, names, parts | {"unit": _UNITS, "duration": _DURATIONS, "style": _STYLES})


def _voices() -> tuple[_Voice, list[_Voice]]:
    """Return English, and every other translated locale without a territory, sorted by id.

    A locale's parts are reduced to those for which CLDR has a translation.
    """
    english = _voice(Locale("en"))
    root = _voice(Locale.parse("root"))  # Babel's fallback: "+5 h", "5 km", "M05", "Thu"
    voices, seen = [], []
    for identifier in sorted(localedata.locale_identifiers()):
        locale = Locale.parse(identifier)
        if locale.language in ("en", "root") or locale.territory or locale.variant:
            continue
        voice = _voice(locale)
        for kind, known in english.names.items():
            voice.parts[kind] = [
                code
                for code, name in voice.names[kind].items()
                if code in known and normalise(name) != normalise(known[code])
            ]
        if sum(len(voice.parts[kind]) for kind in _NAMES) < MIN_NAMES:
            continue
        date = format_date(datetime.date(2024, 5, 9), "full", locale=locale)
        if "M05" in date or "Thu" in date or not any(map(str.isalpha, date)):
            continue
        # zh_Hans repeats zh, no repeats nb, and ht is French except for one name.
        twin = (date, voice.names["territory"])
        if twin in seen:
            continue
        seen.append(twin)
        samples: dict[str, dict[Any, tuple]] = {
            "unit": {unit: (5, unit) for unit in _UNITS},
            "duration": {part: (5, *part) for part in _DURATIONS},
        }
        for kind, wholes in samples.items():
            voice.parts[kind] = [
                part
                for part, whole in wholes.items()
                if voice.say(kind, whole) != root.say(kind, whole)
            ]
        voice.parts["style"] = [
            style
            for style in _STYLES
            if format_list("AB", style, locale) != format_list("AB", style, english.locale)
        ]
        voices.append(voice)
    assert len(voices) >= MIN_LOCALES, f"expected >= {MIN_LOCALES} locales, got {len(voices)}"
    return english, voices


def _draw(kind: str, rng: random.Random, parts: dict[str, list], numbers: Sequence[int]) -> Concept:
    """Return a concept of the given parts."""
    pool = parts[_PARTS.get(kind, kind)]
    match kind:
        case "datetime":
            clock = datetime.time(rng.randrange(24), rng.randrange(60))
            return datetime.datetime.combine(rng.choice(pool), clock)
        case "unit" | "money":
            return rng.choice(numbers), rng.choice(pool)
        case "duration":
            return rng.choice(numbers), *rng.choice(pool)
        case "list":
            return rng.choice(pool), *rng.sample(parts["territory"], rng.randint(2, 4))
        case _:
            return rng.choice(pool)


def _hold_out(rng: random.Random, voices: list[_Voice]) -> dict[str, list]:
    """Return {kind: held-out concepts}, and at "day" the days that training may not show."""
    wide = {}
    for kind in voices[0].parts:
        known = Counter(part for voice in voices for part in voice.parts[kind])
        wide[kind] = sorted(part for part in known if known[part] >= COVERAGE * len(voices))
    concepts: dict[str, list] = {}
    for kind, size in ZERO_SHOT_SIZES.items():
        concepts[kind] = rng.sample(wide[kind], size)
        wide[kind] = [part for part in wide[kind] if part not in concepts[kind]]
    concepts["day"] = rng.sample(_DAYS, COMPOSED_SIZES["date"] + COMPOSED_SIZES["datetime"])
    days = iter(concepts["day"])
    for kind, size in COMPOSED_SIZES.items():
        # Few numbers, each in many texts, so that digits alone do not give the answer away.
        numbers = rng.sample(_NUMBERS, 4)
        draws: dict[Concept, None] = {}
        while len(draws) < size:
            if kind in ("date", "datetime"):
                wide["day"] = [next(days)]  # Every moment has another day.
            draws[_draw(kind, rng, wide, numbers)] = None
        concepts[kind] = list(draws)
    return concepts


def _held_out_rows(
    english: _Voice, voices: list[_Voice], concepts: dict[str, list]
) -> list[tuple[str, str, str, str]]:
    """Return (id, kind, lang, text), without texts equal to English or shared by two ids of a
    kind.
    """
    rows = []
    for kind in (*COMPOSED, *ZERO_SHOT):
        spoken = [english.say(kind, concept) or "" for concept in concepts[kind]]
        keys = [normalise(text) for text in spoken]
        assert len({*keys} - {""}) == len(keys), f"expected distinct texts of {kind}, got {spoken}"
        rows += [(f"{kind}-{i:02d}", kind, "en", text) for i, text in enumerate(spoken)]
        for voice in voices:
            texts = [voice.say(kind, concept) for concept in concepts[kind]]
            shared = Counter(normalise(text) for text in texts if text)
            rows += [
                (f"{kind}-{i:02d}", kind, str(voice.locale), text)
                for i, (key, text) in enumerate(zip(keys, texts, strict=True))
                if text and normalise(text) != key and shared[normalise(text)] == 1
            ]
    return rows


def _train_rows(
    rng: random.Random,
    english: _Voice,
    voices: list[_Voice],
    held_days: list[datetime.date],
    banned: set[str],
    pairs: int,
) -> list[tuple[str, str, str, str, str]]:
    """Return (query, positive, query_lang, positive_lang, kind), without the texts of `banned`.

    The English of every held-out concept is banned, and with it the concept in all languages.
    """
    days = sorted(set(_DAYS) - set(held_days))
    rows, seen = [], set()
    for voice in voices:
        parts = voice.parts | {"day": days}
        for kind in _NAMES:  # These names are also parts of lists and money.
            parts[kind] = [
                code
                for code in voice.parts[kind]
                if normalise(english.names[kind][code]) not in banned
                and normalise(voice.names[kind][code]) not in banned
            ]
        for kind, share in MIX.items():
            if not parts[_PARTS.get(kind, kind)]:
                # CLDR has, for example, only international symbols for the units of xh.
                continue
            wanted = round(pairs * share / len(voices))
            for _ in range(TRIES * wanted):
                if wanted == 0:
                    break
                concept = _draw(kind, rng, parts, _NUMBERS)
                query, positive = english.say(kind, concept), voice.say(kind, concept)
                if not query or not positive or (query, positive) in seen:
                    continue
                keys = {normalise(query), normalise(positive)}
                if len(keys) == 2 and keys.isdisjoint(banned):
                    seen.add((query, positive))
                    rows.append((query, positive, "en", str(voice.locale), kind))
                    wanted -= 1
    rng.shuffle(rows)
    return rows


def _table(rows: Sequence[tuple[str, ...]], columns: Sequence[str]) -> pa.Table:
    return pa.table({column: [row[i] for row in rows] for i, column in enumerate(columns)})


def build(seed: int = 0, pairs: int = 120_000) -> tuple[pa.Table, pa.Table]:
    """Return the tables (train, held_out), equal on every machine with the same Babel.

    train: about `pairs` shuffled rows (query, positive, query_lang, positive_lang, kind), English
        to one other locale, with kinds in equal shares in every locale.
    held_out: rows (id, kind, lang, text), each id in "en" and in every locale that translates it.

    Raises:
        ValueError: a negative seed, or fewer pairs than MIN_PAIRS.
    """
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if pairs < MIN_PAIRS:
        raise ValueError(f"pairs: expected >= {MIN_PAIRS}, got {pairs}")
    rng = random.Random(seed)
    english, voices = _voices()
    concepts = _hold_out(rng, voices)
    held_out = _held_out_rows(english, voices, concepts)
    banned = {normalise(text) for *_, text in held_out}
    train = _train_rows(rng, english, voices, concepts["day"], banned, pairs)
    return (
        _table(train, ("query", "positive", "query_lang", "positive_lang", "kind")),
        _table(held_out, ("id", "kind", "lang", "text")),
    )
