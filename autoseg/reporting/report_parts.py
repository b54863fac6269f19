"""What pages with pictures have in common: their looks, cards of facts, and pictures that are files of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg import __version__
from autoseg.reporting import animation, slice_pictures
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.html import Child, Html, classed, element, figure, join, page, picture, section
from autoseg.reporting.slice_pictures import Slices, write_strip

MAX_OPEN_ROWS = 20

STYLE = """
.facts { grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.chart { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; align-items: flex-start; margin: 0.6rem 0 1.6rem; }
.chart img { display: block; flex: 1 1 21rem; width: 100%; max-width: 34rem; min-width: 0; height: auto; }
.chart figcaption { flex: 1 1 16rem; max-width: 34rem; margin: 0.4rem 0 0; }
.panels { display: grid; gap: 0.6rem 1.2rem; margin: 0.6rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.panels img { display: block; width: 100%; max-width: 24rem; height: auto; }
.wide-picture img { display: block; width: 100%; height: auto; }
.walk img { display: block; max-width: 100%; height: auto; border-radius: 4px; background: #000; }
.pictures img { max-height: 28rem; }
tbody th { min-width: min(12rem, 40vw); }
th .note { font-weight: 400; }
.good { color: var(--mark-1); font-weight: 600; white-space: nowrap; }
details { margin: 0.8rem 0 1.2rem; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; padding: 0.3rem 0; }
h4 { font-size: 0.95rem; margin: 1.2rem 0 0.2rem; }
@media screen and (prefers-color-scheme: dark) {
  .chart img, .panels img, .wide-picture img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
@media (max-width: 42rem) {
  .facts div:nth-child(n+3) { grid-column: auto; }
  .facts dd { font-size: 1rem; }
  .stacked td.text::before { content: attr(data-title) ": "; color: var(--faint); font-size: 0.8rem; }
  .pictures img { height: 17rem; }
}
"""
"""Charts are drawn on white. In dark mode they are turned round: light becomes dark, and hues stay what they are."""

HOW_TO_READ_SLICES = (
    "Slices are seen from the feet, anterior up: the patient's right (R) is on the left. They are enlarged to where "
    "the labels are."
)
HOW_TO_READ_BORDERS = (
    "The wide green line with a dark rim is the reference, the thin red line with white dashes is the prediction; "
    "where both run together, the red line lies in the green one."
)


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Where the pictures of a page are kept as files; the page has them all in itself too.

    Attributes:
        folder: exists.
    """

    folder: Path

    def add(self, name: str, draw: Callable[[Path], object], *, description: str) -> Html:
        """Draws a picture.

        Args:
            name: of the PNG file, with its ending.
            draw: writes the file.
            description: for those who cannot see it.

        Returns:
            The picture for the page.
        """
        path = self.folder / name
        draw(path)
        return picture(path.read_bytes(), "image/png", description=description)

    def add_chart(self, name: str, draw: Callable[[Path], object], *, description: str, caption: Child) -> Html:
        """Draws a chart with its caption beside it, or below where there is no room."""
        drawn = self.add(name, draw, description=description)
        return element("figure", drawn, element("figcaption", caption), attributes={"class": "chart"})

    def add_slices(self, name: str, slices: Slices, *, title: str, caption: Child) -> Html:
        """Shows slices side by side; they are one file."""
        write_strip(self.folder / name, slices.pictures, title=title)
        pictures = [
            picture(data, slice_pictures.MEDIA_TYPE, description=f"{title}, slice {index}")
            for data, index in zip(slices.files(), slices.indices, strict=True)
        ]
        return figure(classed("div", "pictures", *pictures), caption)

    def add_animation(self, name: str, row: OverlayRow, *, title: str, caption: str) -> Html:
        """Walks through the slices of a case. Whoever is disturbed by what moves can close it."""
        path = self.folder / name
        shown = animation.write_animation(path, row)
        extent = f"{len(shown)} slices from {shown[0]} to {shown[-1]}, from feet to head"
        drawn = picture(path.read_bytes(), animation.MEDIA_TYPE, description=f"{title}: {extent}")
        body = element("figure", drawn, element("figcaption", f"{extent}. {caption}"), attributes={"class": "walk"})
        return details(f"Walk through {title}", body, is_open=True)


def file_name(text: str) -> str:
    """The text as a part of a file's name and as an anchor: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text) or "_"


def details(summary: Child, *children: Child, is_open: bool = False) -> Html:
    """Something that can be opened and closed."""
    attributes = {"open": ""} if is_open else {}
    return element("details", element("summary", summary), *children, attributes=attributes)


def fold_away(summary: str, content: Html, *, n_rows: int) -> Html:
    """What would take the better part of the page is closed at first."""
    return details(summary, content) if n_rows > MAX_OPEN_ROWS else content


def show_facts(facts: Sequence[tuple[str, str, str]]) -> Html:
    """Cards with a title, a value, and a detail that may be empty."""
    cards = [
        element("div", element("dt", title), element("dd", value, element("small", detail) if detail else ""))
        for title, value, detail in facts
    ]
    return classed("dl", "facts", *cards)


def assemble_page(
    title: str, *, kicker: str, heading: Sequence[Child], sections: Mapping[str, tuple[Child, Html | None]]
) -> str:
    """A whole page with links to its sections.

    Args:
        title: of the page.
        kicker: above the title.
        heading: below it.
        sections: title and content by anchor; those without content are left out.
    """
    shown = {key: (name, content) for key, (name, content) in sections.items() if content is not None}
    links = [element("a", name, attributes={"href": f"#{key}"}) for key, (name, _) in shown.items()]
    return page(
        title,
        header=join(
            classed("p", "kicker", kicker),
            element("h1", title),
            *heading,
            element("nav", *links),
        ),
        body=[section(key, name, content) for key, (name, content) in shown.items()],
        footer=element("p", f"Written by autoseg {__version__}."),
        style=STYLE,
    )
