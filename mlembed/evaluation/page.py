"""One HTML page that holds all it shows: no script, no request, one column on a phone.

Everything that is text is escaped here; what a function below returns is HTML.
"""

import base64
import html
from collections.abc import Iterable, Sequence

# Name -> (light, dark). Text is INK or SOFT on PAPER, or on CARD.
COLOURS = {
    "paper": ("#ffffff", "#15181d"),
    "card": ("#f4f6f8", "#1d2127"),
    "ink": ("#1f2328", "#e6e9ed"),
    "soft": ("#57606a", "#a8b1bb"),
    "line": ("#d8dee4", "#363d47"),
    "bar": ("#0072b2", "#56b4e9"),
    "track": ("#e4e9ee", "#2a3038"),
}

STYLE = """
:root{color-scheme:light dark;LIGHT}
@media screen and (prefers-color-scheme:dark){:root{DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:0 12px 3rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;
overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:1.5rem 0 .25rem}
h2{font-size:1.25rem;margin:2.5rem 0 .25rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .25rem}
h4{font-size:.95rem;margin:1rem 0 .25rem}
p{margin:.25rem 0 .75rem;max-width:46rem}
.note,caption{color:var(--soft);font-size:.875rem}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.85em;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.5rem;
margin:1rem 0}
dl div{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.5rem .75rem}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}
dd small{display:block;font-weight:400;color:var(--soft)}
.wide{grid-column:1/-1}
.wide dd{font-weight:400}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21.6rem),1fr));
gap:1rem;align-items:start}
figure{margin:0;break-inside:avoid}
figure h3{margin:.25rem 0}
img{display:block;width:100%;max-width:27rem;height:auto;margin:0 auto}
.dark{display:none}
@media screen and (prefers-color-scheme:dark){.dark{display:block}.light{display:none}}
nav{display:flex;flex-wrap:wrap;gap:0 1rem;font-size:.9rem}
nav a{color:var(--bar);padding:.3rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.25rem}
th,td{padding:.15rem .5rem;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:600;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
tbody th{font-weight:400}
thead th{vertical-align:bottom}
tr{break-inside:avoid}
.scroll{overflow-x:auto;margin:.5rem 0 1rem;max-width:100%}
.scroll table{min-width:max-content}
.bars{columns:19rem;column-gap:2rem}
.bars section{break-inside:auto}
.bars h4{break-after:avoid;margin-top:.75rem}
.bars ol{list-style:none;margin:0;padding:0}
.bars li{display:grid;grid-template-columns:minmax(0,10rem) 1fr 2.6rem;gap:.4rem;
align-items:center;font-size:.8125rem;line-height:1.25;padding:.1rem 0;break-inside:avoid}
.bars li>span:last-child{text-align:right;font-variant-numeric:tabular-nums}
.bars small{color:var(--soft);font-size:.75rem}
.track{position:relative;height:.7rem;background:var(--track);print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.track b{display:block;height:100%;background:var(--bar)}
.track i{position:absolute;top:-.15rem;bottom:-.15rem;width:2px;background:var(--ink)}
@media print{:root{color-scheme:light}@page{margin:14mm}
body{font-size:10pt;padding:0;max-width:none}
h2,h3,h4{break-after:avoid}
.note{break-after:avoid;break-inside:avoid}
nav{display:none}
.figures{display:block;orphans:1;widows:1}
figure{display:inline-block;width:48%;margin:0 1% .75rem 0;vertical-align:top}
.scroll{overflow:visible}
.scroll table{min-width:0;font-size:7.5pt}
thead{display:table-header-group}
p{orphans:3;widows:3}}
"""


def escape(value: object) -> str:
    """Any text, as text: inside an element or a quoted attribute. Half a surrogate pair, which JSON
    can hold and UTF-8 cannot, is written out."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


def document(title: str, body: Iterable[str]) -> str:
    """The whole page; `body` is HTML and has the one h1."""
    sides = ["".join(f"--{n}:{both[i]};" for n, both in COLOURS.items()) for i in (0, 1)]
    style = STYLE.replace("LIGHT", sides[0]).replace("DARK", sides[1])
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page under its h2."""
    heading = f'<h2 id="{_anchor(title)}">{escape(title)}</h2>'
    return f"<section>\n{heading}\n" + "\n".join(parts) + "\n</section>"


def contents(titles: Iterable[str]) -> str:
    """Links to the sections of those titles."""
    links = [f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title in titles]
    return '<nav aria-label="Sections">\n' + "\n".join(links) + "\n</nav>"


def _anchor(title: str) -> str:
    return escape("-".join(title.lower().split()))


def paragraph(text: str, note: bool = False) -> str:
    """Text; a note is smaller."""
    return f"<p{' class=note' if note else ''}>{escape(text)}</p>"


def figures(*parts: str) -> str:
    """Figures beside each other where there is room."""
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def figure(svg: tuple[str, str], alt: str, heading: str) -> str:
    """An image for light and for dark pages, one of them shown; on paper it is the light one.

    Not a <picture>: a browser that prints does not choose its source again, and a page opened in
    the dark would have pale letters on paper.
    """
    images = [
        f'<img class="{side}" alt="{escape(alt)}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(image.encode()).decode()}">'
        for side, image in zip(("light", "dark"), svg, strict=True)
    ]
    return f"<figure>\n<h3>{escape(heading)}</h3>\n" + "\n".join(images) + "\n</figure>"


def facts(rows: Iterable[tuple[str, str, str]], wide: Iterable[tuple[str, str]] = ()) -> str:
    """Cards of (name, value, note); `wide` ones, (name, command), span the page."""
    cards = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        + (f"<small>{escape(note)}</small>" if note else "")
        + "</dd></div>"
        for name, value, note in rows
    ]
    cards += [
        f'<div class="wide"><dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd></div>'
        for name, value in wide
    ]
    return "<dl>\n" + "\n".join(cards) + "\n</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """A table that scrolls inside its own box where it is wider than the page."""
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table>\n<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n"
        "</div>"
    )


def bars(groups: Iterable[tuple[str, Sequence[tuple[str, str, float, float | None]]]]) -> str:
    """(heading, rows of (name, note, percent, percent of a mark or None)): horizontal bars."""
    parts = []
    for heading, rows in groups:
        lines = []
        for name, note, value, mark in rows:
            small = f" <small>{escape(note)}</small>" if note else ""
            line = "" if mark is None else f'<i style="left:{_share(mark)}"></i>'
            lines.append(
                f"<li><span>{escape(name)}{small}</span>"
                f'<span class="track"><b style="width:{_share(value)}"></b>{line}</span>'
                f"<span>{value:.1f}</span></li>"
            )
        parts.append(f"<h4>{escape(heading)}</h4>\n<ol>\n" + "\n".join(lines) + "\n</ol>")
    return '<div class="bars">\n' + "\n".join(parts) + "\n</div>"


def _share(percent: float) -> str:
    return f"{min(100.0, max(0.0, percent)):.2f}%"
