"""What charts have in common: names that are safe to draw, colours, and how a chart becomes a PNG.

Charts are narrow, with large type, so that they can be read on a phone as they are. Whatever a colour says is said by a
dash, a width or a shape as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D

from autoseg.core.text import spell_out

WIDTH_INCHES = 5.0
DPI = 200
TEXT_SIZE, SMALL_SIZE, TINY_SIZE = 11.0, 10.0, 8.8

MEAN_COLOUR, MEDIAN_COLOUR = "#f23a2e", "#008a2e"
MEAN_STYLE: dict[str, object] = {"color": MEAN_COLOUR, "linewidth": 2.6, "linestyle": "-"}
MEDIAN_STYLE: dict[str, object] = {"color": MEDIAN_COLOUR, "linewidth": 2.0, "linestyle": (0, (1.6, 1.1))}
INK, FAINT, BOX, BOX_EDGE, BAR = "#1b2733", "#5d6b78", "#dcebf3", "#8fb3c9", "#8fb3c9"
# The colours of html.PALETTE that are seen on white, the darkest first.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")

MAX_NAME = 20
NO_GLYPH = "\N{WHITE SQUARE}"


def safe_text(text: str) -> str:
    """The text as matplotlib draws it, letter by letter: no mathematics, nothing that its font lacks.

    What cannot be printed is spelled out as in `html.escape`; letters that the font lacks become squares.
    """
    known = _known_characters()
    shown = (character if ord(character) in known else NO_GLYPH for character in spell_out(text))
    return "".join(shown).replace("$", r"\$")


def safe_names(names: Sequence[str], *, longest: int = MAX_NAME) -> list[str]:
    """Names for the side of a chart: long ones are cut in the middle, and they stay different from each other."""
    # Spelled out before it is cut: what cannot be printed takes more room than it seems.
    spelled = [safe_text(name).replace(r"\$", "$") for name in names]
    short = [name if len(name) <= longest else f"{name[: longest - 9]}…{name[-8:]}" for name in spelled]
    counts, seen = Counter(short), Counter[str]()
    unique = []
    for name in short:
        seen[name] += 1
        unique.append(f"{name} #{seen[name]}" if counts[name] > 1 else name)
    return [name.replace("$", r"\$") for name in unique]


@cache
def _known_characters() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def new_figure(height_inches: float, *, width_inches: float = WIDTH_INCHES) -> Figure:
    """An empty figure whose parts make room for each other."""
    return Figure(figsize=(width_inches, height_inches), dpi=DPI, facecolor="white", layout="constrained")


def tidy_axes(axes: Axes) -> None:
    """Readable numbers, a faint grid behind everything, and no box around it."""
    axes.tick_params(labelsize=SMALL_SIZE, colors=INK)
    axes.grid(color="#d9dfe5", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(TEXT_SIZE)
        label.set_color(INK)


def mean_and_median_keys() -> list[Line2D]:
    """Entries of a legend."""
    return [
        Line2D([], [], label="mean", **MEAN_STYLE),  # type: ignore[arg-type]
        Line2D([], [], label="median", **MEDIAN_STYLE),  # type: ignore[arg-type]
    ]


def add_legend(figure: Figure, keys: Sequence[Line2D], *, n_columns: int) -> None:
    """A legend above everything else."""
    figure.legend(
        handles=list(keys),
        loc="outside upper left",
        ncols=n_columns,
        fontsize=SMALL_SIZE,
        frameon=False,
        handlelength=1.9,
        columnspacing=1.0,
        handletextpad=0.5,
        borderaxespad=0.2,
    )
