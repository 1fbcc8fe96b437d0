"""Names and scripts of language codes of any usual kind, by CLDR, and levels of training text."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from babel import Locale
from babel.core import get_global

UNKNOWN = "unknown"
# CLDR's "Simplified" and "Traditional" do not say of what.
HAN = {"Hans": "Simplified Han", "Hant": "Traditional Han"}


@dataclass(frozen=True)
class Language:
    """A language in English.

    code: as given. key: language and script in CLDR's codes, equal for codes of one language; the
    script is "" if unknown.
    """

    code: str
    key: tuple[str, str]
    name: str
    script: str


@cache
def language(code: str) -> Language:
    """Look up `de`, `zh_Hant` (CLDR), `deu` (ISO 639-3), `eng_Latn` (FLORES), `cmn-Hans` (BCP 47).

    A code without a script gets CLDR's likely one. A language that CLDR does not know keeps its
    code as its name, and the script "unknown" unless the code names one.
    """
    tongue, script, territory = _parts(code)
    english = Locale("en")
    known = tongue in english.languages and tongue != "und"
    name = english.languages[tongue] if known else code
    script = script if script in english.scripts else _likely(tongue, territory)
    details = []
    if known and script != _likely(tongue, ""):
        details.append(english.scripts[script])
    if known and territory in english.territories:
        details.append(english.territories[territory])
    full_name = f"{name} ({', '.join(details)})" if details else name
    return Language(
        code, (tongue, script), full_name, HAN.get(script) or english.scripts.get(script, UNKNOWN)
    )


def _parts(code: str) -> tuple[str, str, str]:
    """Return language, script and territory in CLDR's codes; "" for parts that the code lacks."""
    tongue, *rest = re.split("[-_]", code)
    tongue = tongue.lower()
    script = next((p.title() for p in rest if re.fullmatch("[A-Za-z]{4}", p)), "")
    territory = next((p.upper() for p in rest if re.fullmatch("[A-Za-z]{2}|[0-9]{3}", p)), "")
    # Aliases are names like deu: de, and hbs: sr_Latn, which brings a script.
    tongue, _, alias_script = get_global("language_aliases").get(tongue, tongue).partition("_")
    return tongue, script or alias_script, territory


def _likely(tongue: str, territory: str) -> str:
    """Return the code of CLDR's likely script, or ""."""
    if tongue == "und":  # CLDR takes an undetermined language to be English.
        return ""
    subtags = get_global("likely_subtags")
    likely = subtags.get(f"{tongue}_{territory}") or subtags.get(tongue) or ""
    return next((p for p in likely.split("_")[1:] if len(p) == 4), "")


def levels(
    keys: Sequence[tuple[str, str]], texts: Mapping[str, Any] | None
) -> tuple[dict[tuple[str, str], str], str]:
    """Return the resource level of each language, by its training texts, and a sentence about it.

    unseen: no texts. low, mid, high: thirds of the other languages; "seen" instead, if more than
    two thirds have as many texts as any. {} if `texts`, training texts by code, is None.
    """
    if texts is None:
        return {}, "Training texts by language: not recorded, so there are no resource levels."
    counts = dict.fromkeys(keys, 0)
    for code, count in texts.items():
        key = language(code).key
        if key in counts and type(count) is int:
            counts[key] += count
    seen = sorted(count for count in counts.values() if count > 0)
    if not seen:
        return dict.fromkeys(counts, "unseen"), "No evaluated language has a text in training."
    low, mid, high = (seen[math.ceil(len(seen) * third / 3) - 1] for third in (1, 2, 3))
    if low == high:
        span = f"{seen[0]:,} to {high:,}" if seen[0] < high else f"{high:,}"
        sentence = f"Resource level: each language that is seen in training has {span} texts there."
        return {key: "seen" if n > 0 else "unseen" for key, n in counts.items()}, sentence
    by_key = {
        key: "unseen" if n <= 0 else "low" if n <= low else "mid" if n <= mid else "high"
        for key, n in counts.items()
    }
    return by_key, (
        f"Resource level: unseen, no training text; low, 1 to {low:,}; mid, to {mid:,}; high, "
        f"to {high:,} (thirds of the languages that are seen)."
    )
