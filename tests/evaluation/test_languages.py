"""Codes of every usual kind to one name and script, nothing guessed; levels of training text."""

import pytest

from mlembed.evaluation.languages import language, levels

# ---- names and scripts ----


@pytest.mark.parametrize(
    "code, name, script",
    [
        ("de", "German", "Latin"),
        ("deu", "German", "Latin"),
        ("eng_Latn", "English", "Latin"),
        ("ENG-latn", "English", "Latin"),
        ("zh", "Chinese", "Simplified Han"),
        ("zh_Hant", "Chinese (Traditional)", "Traditional Han"),
        ("cmn-Hans", "Chinese", "Simplified Han"),
        ("zh_TW", "Chinese (Traditional, Taiwan)", "Traditional Han"),
        ("por-BR", "Portuguese (Brazil)", "Latin"),
        ("es-419", "Spanish (Latin America)", "Latin"),
        ("sr", "Serbian", "Cyrillic"),
        ("hbs", "Serbian (Latin)", "Latin"),  # an alias that names a script
        ("uz_Cyrl", "Uzbek (Cyrillic)", "Cyrillic"),
        ("arz_Arab", "Egyptian Arabic", "Arabic"),
        ("iw", "Hebrew", "Hebrew"),
        ("kzj", "Central Dusun", "Latin"),  # an alias of an alias in ISO 639-3
        ("jpn", "Japanese", "Japanese"),
        ("ca_ES_VALENCIA", "Catalan (Spain)", "Latin"),
    ],
)
def test_names_and_scripts(code, name, script):
    found = language(code)
    assert (found.code, found.name, found.script) == (code, name, script)


@pytest.mark.parametrize(
    "code, script",
    [
        ("qqq", "unknown"),
        ("ber", "unknown"),  # a family of languages, in three scripts
        ("und", "unknown"),  # which CLDR would have in Latin
        ("und_FR", "unknown"),
        ("qqq_Foob", "unknown"),
        ("qqq_Cyrl", "Cyrillic"),  # said, not guessed
        ("<b>", "unknown"),
        ("", "unknown"),
    ],
)
def test_what_cldr_does_not_know_keeps_its_code(code, script):
    found = language(code)
    assert (found.name, found.script) == (code, script)


def test_codes_of_one_language_are_one():
    same = ["de", "deu", "deu_Latn", "de-DE"]
    assert len({language(code).key for code in same}) == 1
    assert language("sr").key == language("srp_Cyrl").key != language("sr_Latn").key
    assert language("zh_TW").key == language("zho_Hant").key != language("cmn").key


# ---- resource levels ----


def keys(*codes):
    return [language(code).key for code in codes]


def test_levels_are_thirds_of_the_seen():
    texts = {"deu": 10, "fra": 20, "rus": 30, "jpn": 40, "ell": 50, "heb": 60, "vie": 10**6}
    codes = ["el", "he", "ja", "ru", "de", "fr", "sw"]  # not vie, which is not evaluated
    found, said = levels(keys(*codes), texts)
    assert found == dict(
        zip(keys(*codes), ["high", "high", "mid", "mid", "low", "low", "unseen"], strict=True)
    )
    assert "low, 1 to 20;" in said and "mid, to 40;" in said and "high, to 60 " in said


def test_levels_add_what_two_codes_have():
    found, _ = levels(keys("pt", "de", "fr"), {"pt_BR": 60, "por-PT": 50, "de": 70, "fra": 80})
    assert found == dict(zip(keys("pt", "de", "fr"), ["high", "low", "mid"], strict=True))


def test_levels_that_are_none():
    assert levels(keys("de"), None) == (
        {},
        "Training texts by language: not recorded, so there are no resource levels.",
    )
    found, said = levels(keys("de", "fr"), {"it": 3})
    assert set(found.values()) == {"unseen"} and "No evaluated language" in said
    found, said = levels(keys("de", "fr", "sw"), {"de": 7, "fr": 7, "sw": None})
    assert list(found.values()) == ["seen", "seen", "unseen"] and "has 7 texts" in said
    # One that has fewer makes no thirds of the others.
    found, said = levels(keys("de", "fr", "it", "sw"), {"de": 7, "fr": 7, "it": 7, "sw": 5})
    assert set(found.values()) == {"seen"} and "has 5 to 7 texts" in said
