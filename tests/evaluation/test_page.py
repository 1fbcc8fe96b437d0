"""The page around a report: what is text stays text, legible in light and dark, and no request."""

import base64
import re

import pytest

from mlembed.evaluation import charts, page

NASTY = "<b>&amp; \"q\" 'a' \u202e"


@pytest.mark.parametrize("side", [0, 1])
def test_text_is_legible(side):
    colours = {name: both[side] for name, both in page.COLOURS.items()}
    for text in ("ink", "soft"):
        for ground in ("paper", "card"):
            assert charts.contrast(colours[text], colours[ground]) >= 4.5
    assert charts.contrast(colours["bar"], colours["track"]) >= 3
    assert charts.contrast(colours["bar"], colours["paper"]) >= 3
    used = set(re.findall(r"var\(--(\w+)\)", page.STYLE))
    assert used == set(colours)


def test_figures_have_the_pages_colours():
    for name in ("paper", "ink", "soft"):
        light = getattr(charts, name.upper())
        assert page.COLOURS[name] == (light, charts.DARK[light])


@pytest.mark.parametrize(
    "html",
    [
        page.document(NASTY, []),
        page.section(NASTY, page.paragraph(NASTY), page.paragraph(NASTY, note=True)),
        page.figure(("<svg/>", "<svg/>"), NASTY, NASTY),
        page.facts([(NASTY, NASTY, NASTY)], [(NASTY, NASTY)]),
        page.table([NASTY], [[NASTY, NASTY]], NASTY),
        page.bars([(NASTY, [(NASTY, NASTY, 1.0, 2.0)])]),
    ],
)
def test_nothing_escapes(html):
    assert NASTY not in html and "<b>&" not in html
    escaped = page.escape(NASTY)
    assert escaped == "&lt;b&gt;&amp;amp; &quot;q&quot; &#x27;a&#x27; \u202e" and escaped in html


def test_a_figure_has_a_light_and_a_dark_side():
    html = page.figure(("<svg>light</svg>", "<svg>dark</svg>"), "what it shows", "Heading")
    sides = re.findall(r'"data:image/svg\+xml;base64,([^"]+)"', html)
    assert [base64.b64decode(side) for side in sides] == [b"<svg>light</svg>", b"<svg>dark</svg>"]
    assert re.findall(r'class="(\w+)" alt="what it shows"', html) == ["light", "dark"]


def test_half_a_character_is_written_out():
    """JSON can hold what UTF-8 cannot."""
    html = page.document("a \ud800", [])
    assert r"<title>a \ud800</title>" in html and html.encode("utf-8")


def test_links_lead_to_sections():
    titles = ["All numbers", NASTY]
    links = re.findall('href="#([^"]+)"', page.contents(titles))
    sections = "".join(page.section(title) for title in titles)
    assert links == re.findall('id="([^"]+)"', sections) and len(set(links)) == 2


def test_bars_stay_on_their_track():
    html = page.bars([("Latin", [("German", "de", 120.0, -3.0), ("French", "", 45.25, None)])])
    assert re.findall(r"(?:width|left):([^\"]+)\"", html) == ["100.00%", "0.00%", "45.25%"]
    assert ">120.0<" in html and ">45.2<" in html and html.count("<i ") == 1
