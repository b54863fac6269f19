"""Pages of HTML that need nothing from outside: elements that escape their text, tables, and the page around them.

Text becomes HTML only through `element`, which escapes it, so that no name of a case, label or channel can become
markup. Pages hold no scripts, and their content security policy forbids both scripts and anything to be loaded.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoseg.core.text import spell_out

VOID_ELEMENTS = frozenset({"img", "meta", "br"})
NO_VALUE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"

# Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind people too; the dark blue, which is hard to
# see on a scan, comes last, and black is left out.
PALETTE = ("#e69f00", "#56b4e9", "#d55e00", "#009e73", "#f0e442", "#cc79a7", "#0072b2")


@dataclass(frozen=True)
class Html:
    """Text that is markup already.

    Attributes:
        markup: well-formed HTML.
    """

    markup: str


Child = Html | str


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        title: its heading.
        kind: "text", "prose" (half of the width), "number" (aligned to the right) or "plot" (two fifths of the width).
        axis: of a column of plots that share one: drawn under the heading.
    """

    title: str
    kind: str = "text"
    axis: Html | None = None


def escape(text: str) -> str:
    """The text as HTML, for content and for attributes; what cannot be printed is spelled out, as in `\\x1b`."""
    return html.escape(spell_out(text), quote=True)


def element(name: str, *children: Child, attributes: Mapping[str, str] | None = None) -> Html:
    """An element of HTML or SVG.

    Args:
        name: such as "p"; never from outside.
        children: what it holds; text is escaped.
        attributes: their values are escaped.
    """
    listed = "".join(f' {key}="{escape(value)}"' for key, value in (attributes or {}).items())
    if name in VOID_ELEMENTS:
        return Html(f"<{name}{listed}>")
    return Html(f"<{name}{listed}>{join(*children).markup}</{name}>")


def join(*children: Child, separator: str = "") -> Html:
    """Children one after the other."""
    return Html(
        escape(separator).join(child.markup if isinstance(child, Html) else escape(child) for child in children)
    )


def classed(name: str, css_class: str, *children: Child) -> Html:
    """An element with a class for its looks."""
    return element(name, *children, attributes={"class": css_class})


def bullets(items: Iterable[Child]) -> Html:
    """A list."""
    return element("ul", *(element("li", item) for item in items))


def section(identifier: str, title: Child, *children: Child) -> Html:
    """A part of the page that links can lead to as `#identifier`."""
    return element("section", element("h2", title), *children, attributes={"id": identifier})


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Child]],
    *,
    footer: Sequence[Child] | None = None,
    is_stacked: bool = False,
) -> Html:
    """A table; the first cell of each row is its heading.

    Args:
        columns: what it has.
        rows: one cell per column.
        footer: a last row, for totals.
        is_stacked: on a narrow screen, every row becomes a block with its cells below each other. Else the table is
            scrolled sideways.
    """
    heading = [
        element("th", column.title, column.axis or "", attributes={"scope": "col", "class": column.kind})
        for column in columns
    ]
    parts = [element("thead", element("tr", *heading)), element("tbody", *(_row(columns, row) for row in rows))]
    if footer is not None:
        parts.append(element("tfoot", _row(columns, footer)))
    return classed("div", "scroll", classed("table", "stacked" if is_stacked else "wide", *parts))


def _row(columns: Sequence[Column], cells: Sequence[Child]) -> Html:
    made = []
    for i, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        kind = {"class": column.kind}
        if i == 0:
            made.append(element("th", cell, attributes={"scope": "row", **kind}))
        else:
            made.append(element("td", cell, attributes={"data-title": column.title, **kind}))
    return element("tr", *made)


def picture(data: bytes, media_type: str, *, description: str) -> Html:
    """A picture that is part of the page.

    Args:
        data: the file.
        media_type: such as "image/png".
        description: for those who cannot see it.
    """
    source = f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
    return element("img", attributes={"src": source, "alt": description})


def figure(body: Child, caption: Child) -> Html:
    """Something to look at, with what it shows below it."""
    return element("figure", body, element("figcaption", caption))


def exact(value: int, shown: str) -> Html:
    """A number in a short form that keeps its exact value for whoever hovers over it or reads the page by program."""
    return element("data", shown, attributes={"value": str(value), "title": f"{value:,}"})


def format_number(value: float, *, n_digits: int = 4) -> str:
    """At most so many digits, but all before the point of a large number: "0.0123", "12.5", "12,345"."""
    if not math.isfinite(value):
        return NO_VALUE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{n_digits}g}"


def format_large(value: float) -> str:
    """Three digits and a unit: "640", "12.5 k", "31.4 M", "1.2 G", "3 T"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:,.0f} {unit}" if value >= 1000 * size else f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def format_size(values: Iterable[float]) -> str:
    """Numbers per axis, with times signs between, on one line."""
    return f"\u00a0{TIMES}\u00a0".join(format_number(value) for value in values)


def page(title: str, *, header: Child, body: Sequence[Child], footer: Child, style: str = "") -> str:
    """A whole page.

    Args:
        title: of the browser's tab.
        header: above the body.
        body: sections.
        footer: below it.
        style: CSS that this page needs besides that of all pages.

    Returns:
        The text of an HTML file, to be written in UTF-8.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", attributes={"charset": "utf-8"}),
        element("meta", attributes={"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", attributes={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", attributes={"name": "color-scheme", "content": "light dark"}),
        element("title", title),
        element("style", Html(STYLE + style)),
    )
    content = element("body", element("header", header), element("main", *body), element("footer", footer))
    return "<!DOCTYPE html>\n" + element("html", head, content, attributes={"lang": "en"}).markup + "\n"


STYLE = """
:root {
  --paper: #ffffff; --panel: #f5f7f9; --ink: #1b2733; --faint: #5d6b78; --line: #d9dfe5; --accent: #0b6e99;
  --bar: #8fb3c9; --share: #dcebf3; --warn: #9a5b00; --warn-paper: #fff6e5;
  --mark-0: #d55e00; --mark-1: #007a59; --mark-2: #a8447a;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12181e; --panel: #1b232b; --ink: #e2e8ee; --faint: #9aa8b5; --line: #303b46; --accent: #6cc0e5;
    --bar: #4d7a94; --share: #203d4d; --warn: #f2b84b; --warn-paper: #2b2415;
    --mark-0: #ff8a3d; --mark-1: #3ccfa4; --mark-2: #e58fc0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1.5rem clamp(0.9rem, 3vw, 2rem) 3rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 0.3rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 2.6rem 0 0.6rem; padding-top: 0.9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 0.35rem; }
p { margin: 0.4rem 0 0.7rem; max-width: 48rem; }
a { color: var(--accent); }
.kicker { color: var(--accent); font-weight: 600; font-size: 0.85rem; letter-spacing: 0.06em; margin: 0; }
.note, .reason, figcaption, footer { color: var(--faint); font-size: 0.9rem; }
.lead { font-size: 1.06rem; }
.lead .reason { font-size: inherit; color: inherit; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0.9rem 0 0; font-size: 0.92rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.6rem; margin: 1.1rem 0; }
.facts div { background: var(--panel); border-radius: 8px; padding: 0.55rem 0.8rem; }
.facts dt { color: var(--faint); font-size: 0.8rem; }
.facts dd { margin: 0; font-size: 1.1rem; font-weight: 600; line-height: 1.3; }
.facts small { display: block; font-weight: 400; font-size: 0.82rem; color: var(--faint); }
.badge { background: var(--accent); color: var(--paper); font-size: 0.72rem; font-weight: 600; border-radius: 99px;
  padding: 0.15rem 0.6rem; margin-left: 0.6rem; vertical-align: 0.2em; white-space: nowrap; }
.warning { background: var(--warn-paper); border-left: 4px solid var(--warn); border-radius: 4px;
  padding: 0.6rem 0.9rem; margin: 0.8rem 0; }
.warning h3 { margin: 0 0 0.3rem; color: var(--warn); }
.warning ul { margin: 0.3rem 0; padding-left: 1.2rem; font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); font-weight: 600; font-size: 0.8rem; vertical-align: bottom; line-height: 1.3; }
tbody th { font-weight: 600; }
tfoot th, tfoot td { font-weight: 600; border-top: 2px solid var(--line); border-bottom: 0; }
.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.wide td, .wide th { white-space: nowrap; overflow-wrap: normal; padding-right: 0.8rem; }
thead th, .wide thead th { overflow-wrap: normal; white-space: normal; }
th.plot, td.plot { width: 40%; min-width: 14rem; padding-left: 0.6rem; }
td.plot { vertical-align: middle; }
.prose { width: 52%; }
.value { font-weight: 600; }
.share { display: block; background: linear-gradient(to left, var(--share) var(--part), transparent var(--part));
  border-radius: 3px; padding: 0 0.3rem; margin-right: -0.3rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 9.5px; font-weight: 400; font-family: inherit; }
.bars { fill: var(--bar); }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.whisker { stroke: var(--bar); stroke-width: 1.5; fill: none; }
.box { fill: var(--bar); }
.spread { stroke: var(--ink); stroke-width: 1.5; fill: none; }
.median { stroke: var(--ink); stroke-width: 2.5; fill: none; }
.mean { stroke: var(--ink); stroke-width: 5; stroke-linecap: round; fill: none; }
.dots { stroke: var(--ink); stroke-opacity: 0.4; stroke-width: 3; stroke-linecap: round; fill: none; }
.mark { stroke-width: 2; fill: none; }
.mark-0 { stroke: var(--mark-0); } .mark-1 { stroke: var(--mark-1); stroke-dasharray: 5 2.5; }
.mark-2 { stroke: var(--mark-2); stroke-dasharray: 1.5 2.5; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; padding: 0; margin: 0.4rem 0; list-style: none;
  font-size: 0.86rem; color: var(--faint); }
.marked { white-space: nowrap; margin-left: 0.5rem; }
.marked svg, .legend svg { display: inline-block; width: 16px; height: 14px; vertical-align: -2px;
  margin-right: 0.35rem; }
.marked svg { margin-right: 0; }
figure { margin: 1rem 0 1.4rem; break-inside: avoid; }
figcaption { margin-top: 0.4rem; }
figcaption strong { color: var(--ink); }
.pictures { display: flex; gap: 4px; align-items: flex-start; }
.pictures img { display: block; min-width: 0; max-height: 19rem; border-radius: 4px; background: #000; }
footer { margin-top: 3rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
@media (max-width: 42rem) {
  .facts { grid-template-columns: 1fr 1fr; }
  .facts div:nth-child(n+3) { grid-column: 1 / -1; }
  .pictures { overflow-x: auto; }
  .pictures img { height: 14rem; min-width: auto; }
  .stacked, .stacked tbody, .stacked thead { display: block; }
  .stacked thead th { display: none; }
  .stacked thead th.plot:has(svg) { display: block; flex-basis: 100%; padding: 0; }
  .stacked tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0.5rem 0; border-bottom: 1px solid var(--line); }
  .stacked th, .stacked td { border: 0; padding: 0.1rem 0; text-align: left; min-width: 4.6rem; }
  .stacked tbody th, .stacked td.text, .stacked td.prose, .stacked td.plot { flex-basis: 100%; }
  .stacked tr:has(td.prose) th { color: var(--faint); font-size: 0.82rem; }
  .stacked td.number::before { content: attr(data-title); display: block; color: var(--faint); font-size: 0.75rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  .wide { font-size: 7.5pt; }
  tr, .warning, svg { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
