"""Language codes of any of the usual kinds to an English name and a script, by CLDR; and how much
training text each had."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from babel import Locale
from babel.core import get_global

UNKNOWN = "unknown"
HAN = {"Hans": "Simplified Han", "Hant": "Traditional Han"}  # CLDR says "Simplified": of what?


@dataclass(frozen=True)
class Language:
    """code: as it was given. key: (language, script) in CLDR's codes, by which two codes are the
    same; the script is "" where it is not known. name, script: English."""

    code: str
    key: tuple[str, str]
    name: str
    script: str


@cache
def language(code: str) -> Language:
    """`de`, `zh_Hant` (CLDR), `deu` (ISO 639-3), `eng_Latn` (FLORES), `cmn-Hans` (BCP 47).

    What the code does not say is CLDR's likely script. A language that CLDR does not know has its
    code for a name, and the script "unknown" unless the code names one.
    """
    tongue, script, territory = _parts(code)
    english = Locale("en")
    known = tongue in english.languages and tongue != "und"
    name = english.languages[tongue] if known else code
    likely = _likely(tongue, territory)
    script = script if script in english.scripts else likely
    said = []
    if known and script != _likely(tongue, ""):
        said.append(english.scripts[script])
    if known and territory in english.territories:
        said.append(english.territories[territory])
    shown = HAN.get(script) or english.scripts.get(script, UNKNOWN)
    return Language(code, (tongue, script), f"{name} ({', '.join(said)})" if said else name, shown)


def _parts(code: str) -> tuple[str, str, str]:
    """Language, script and territory in CLDR's codes; "" for what the code does not say."""
    tongue, *rest = re.split("[-_]", code)
    tongue = tongue.lower()
    script = next((p.title() for p in rest if re.fullmatch("[A-Za-z]{4}", p)), "")
    territory = next((p.upper() for p in rest if re.fullmatch("[A-Za-z]{2}|[0-9]{3}", p)), "")
    alias = get_global("language_aliases").get(tongue, tongue)  # deu: de, hbs: sr_Latn
    tongue, _, of_alias = alias.partition("_")
    return tongue, script or of_alias, territory


def _likely(tongue: str, territory: str) -> str:
    """Script code that CLDR takes such a text to be in, "" where it says nothing."""
    if tongue == "und":  # CLDR has one for this too: English
        return ""
    likely = get_global("likely_subtags")
    found = likely.get(f"{tongue}_{territory}") or likely.get(tongue) or ""
    return next((p for p in found.split("_")[1:] if len(p) == 4), "")


def levels(
    keys: Sequence[tuple[str, str]], texts: Mapping[str, Any] | None
) -> tuple[dict[tuple[str, str], str], str]:
    """Resource level of each language by its training texts, and where it is cut.

    unseen: none; low, mid, high: thirds of those that have some, "seen" where more than two thirds
    have as many as any. {} where `texts` (code -> training texts) is None.
    """
    if texts is None:
        return {}, "Training texts by language: not recorded, so there are no resource levels."
    counts: dict[tuple[str, str], int] = {}
    for code, n in texts.items():
        key = language(code).key
        counts[key] = counts.get(key, 0) + (n if type(n) is int else 0)
    here = {key: counts.get(key, 0) for key in keys}
    seen = sorted(n for n in here.values() if n > 0)
    if not seen:
        return dict.fromkeys(here, "unseen"), "No evaluated language has a text in training."
    low, mid = (seen[math.ceil(len(seen) * third / 3) - 1] for third in (1, 2))
    if low == seen[-1]:
        most = f"{seen[0]:,} to {seen[-1]:,}" if seen[0] < seen[-1] else f"{seen[0]:,}"
        said = f"each language that is seen in training has {most} texts there."
        return {
            k: "seen" if n > 0 else "unseen" for k, n in here.items()
        }, f"Resource level: {said}"
    found = {
        key: "unseen" if n <= 0 else "low" if n <= low else "mid" if n <= mid else "high"
        for key, n in here.items()
    }
    return found, (
        f"Resource level: unseen, no training text; low, 1 to {low:,}; mid, to {mid:,}; high, "
        f"to {seen[-1]:,} (thirds of the languages that are seen)."
    )
