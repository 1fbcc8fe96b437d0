"""Names and scripts of every usual kind of code, nothing guessed; levels of training text."""

import pytest

from mlembed.evaluation.languages import Language, language, levels

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
    assert language(code) == Language(code, language(code).key, name, script)


@pytest.mark.parametrize(
    "code, script",
    [
        ("qqq", "unknown"),
        ("ber", "unknown"),  # a family of languages, in three scripts
        ("und", "unknown"),  # which CLDR would have in Latin
        ("und_FR", "unknown"),
        ("qqq_Foob", "unknown"),
        ("qqq_Cyrl", "Cyrillic"),  # named, not guessed
        ("<b>", "unknown"),
        ("", "unknown"),
    ],
)
def test_unknown_codes_stay(code, script):
    assert (language(code).name, language(code).script) == (code, script)


def test_keys():
    same = ["de", "deu", "deu_Latn", "de-DE"]
    assert len({language(code).key for code in same}) == 1
    assert language("sr").key == language("srp_Cyrl").key != language("sr_Latn").key
    assert language("zh_TW").key == language("zho_Hant").key != language("cmn").key


# ---- resource levels ----


def keys(*codes):
    return [language(code).key for code in codes]


def test_levels_are_thirds():
    texts = {"deu": 10, "fra": 20, "rus": 30, "jpn": 40, "ell": 50, "heb": 60, "vie": 10**6}
    codes = ["el", "he", "ja", "ru", "de", "fr", "sw"]  # not vie, which is not evaluated
    by_key, sentence = levels(keys(*codes), texts)
    want = ["high", "high", "mid", "mid", "low", "low", "unseen"]
    assert by_key == dict(zip(keys(*codes), want, strict=True))
    assert "low, 1 to 20;" in sentence and "mid, to 40;" in sentence and "high, to 60 " in sentence


def test_levels_add_codes_of_one_language():
    by_key, _ = levels(keys("pt", "de", "fr"), {"pt_BR": 60, "por-PT": 50, "de": 70, "fra": 80})
    assert by_key == dict(zip(keys("pt", "de", "fr"), ["high", "low", "mid"], strict=True))


def test_levels_without_thirds():
    by_key, sentence = levels(keys("de"), None)
    assert by_key == {} and "not recorded, so there are no resource levels" in sentence
    by_key, sentence = levels(keys("de", "fr"), {"it": 3})
    assert set(by_key.values()) == {"unseen"} and "No evaluated language" in sentence
    by_key, sentence = levels(keys("de", "fr", "sw"), {"de": 7, "fr": 7, "sw": None})
    assert list(by_key.values()) == ["seen", "seen", "unseen"] and "has 7 texts" in sentence
    # One that has fewer makes no thirds of the others.
    by_key, sentence = levels(keys("de", "fr", "it", "sw"), {"de": 7, "fr": 7, "it": 7, "sw": 5})
    assert set(by_key.values()) == {"seen"} and "has 5 to 7 texts" in sentence
