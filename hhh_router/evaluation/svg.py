"""How a chart becomes inline SVG: drawn off screen, the same bytes for the same figures, readable in any viewer.

Text stays text (searchable, in the page's font) and colours are told apart by the colour-blind too; where there are
several series they also differ in dash or marker, so that a print in black and white can be read. matplotlib is asked
for when the first chart is drawn, never its pyplot state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from hhh_router.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, HAIR = "#1f2328", "#6a7079", "#e4e7eb"
# Okabe & Ito 2008 without their yellow, which is lost on white paper; their black is a grey here, text is black
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6068")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (7, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hhh-router",  # ids would be random without it
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.size": 8.5,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIR,
    "grid.linewidth": 0.7,
    "xtick.color": "#9aa0a8",
    "ytick.color": "#9aa0a8",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.4,
    "text.color": INK,
}
ID_MARK = "\ue000"
"""Stands in every id of a chart: the page puts the chart's number there. `plain` text never holds it."""
_POINTS = 72.0  # SVG units to the inch


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How one series looks."""

    colour: str
    dash: Any
    """A matplotlib line style."""
    marker: str
    """A matplotlib marker."""
    width: float = 1.3
    """Of the line, in points."""


def plain(text: object) -> str:
    """The text on one line, without what no page should carry: control characters, direction marks, lone surrogates.

    >>> plain("two\\nlines"), plain("a\\x00b")
    ('two lines', 'a�b')
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def style(series: int) -> Style:
    """The look of a series by its number; the first (the bundle) is the boldest. Distinct for the first 35."""
    return Style(
        colour=PALETTE[series % len(PALETTE)],
        dash=_DASHES[series % len(_DASHES)],
        marker=_MARKERS[series % len(_MARKERS)],
        width=2.0 if series == 0 else 1.3,
    )


def faint(colour: str, opacity: float) -> tuple[float, ...]:
    """Red, green, blue and opacity, each in [0, 1].

    >>> faint("#ff0000", 0.5)
    (1.0, 0.0, 0.0, 0.5)
    """
    return (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), opacity)


def chart_svg(
    draw: Callable[[Axes], None],
    *,
    size: tuple[float, float],
    box: tuple[float, float, float, float],
    alt: str | None,
) -> str:
    """One ``<svg>`` for use inside an HTML page.

    matplotlib's settings are global: they are changed while a chart is drawn, so draw from one thread.

    Args:
        draw: Puts the chart on its axes.
        size: Width and height, inches.
        box: Left, bottom, width and height of the axes, as shares of the size.
        alt: What the chart shows; None for an ornament.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    return _inline(chart_file(draw, size=size, box=box)("svg", {"Date": None, "Creator": None}), size, alt)


def chart_file(
    *draws: Callable[[Axes], None], size: tuple[float, float], box: tuple[float, float, float, float]
) -> Callable[[str, dict[str, None]], bytes]:
    """A function from a file's format and metadata to its bytes; size and box are those of each of the drawings."""
    left, bottom, width, height = box

    def save(form: str, metadata: dict[str, None]) -> bytes:
        try:
            from matplotlib import style as styles
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtra("train", needed_for="drawing the report's charts") from error
        out = io.BytesIO()
        with styles.context(["default", _LOOK], after_reset=True), warnings.catch_warnings():
            # its font lacks some scripts; that is no matter, the text is drawn by the reader's browser with the page's
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            n = len(draws)
            figure = Figure(figsize=(n * size[0], size[1]))
            figure.patch.set_visible(form != "svg")
            for k, draw in enumerate(draws):
                draw(figure.add_axes(((k + left) / n, bottom, width / n, height)))
            figure.savefig(out, format=form, dpi=160, metadata=metadata)
        return out.getvalue()

    return save


def _inline(svg: bytes, size: tuple[float, float], alt: str | None) -> str:
    """Without prologue, metadata, style sheet and unused ids; the others hold `ID_MARK`, so that many fit one page."""
    tree = ElementTree.fromstring(svg)  # matplotlib's own output: nothing foreign is parsed as markup here
    used = set(re.findall(rb"#([\w.-]+)", svg))
    for parent in tree.iter():
        for child in list(parent):
            if _tag(child) in ("metadata", "style"):
                parent.remove(child)
    for element in tree.iter():
        element.tag = _tag(element)
        element.text = _trim(element)
        element.tail = None
        found = dict(element.attrib)
        element.attrib.clear()
        for name, value in found.items():
            if name == "id":
                if value.encode() in used:
                    element.set("id", f"{ID_MARK}-{value}")
            elif name.endswith("}href"):
                element.set("href", f"#{ID_MARK}-{value[1:]}")
            elif name == "clip-path":
                element.set(name, value.replace("#", f"#{ID_MARK}-"))
            elif name == "style" and element.tag == "text":
                element.set(name, re.sub(r"font-family:[^;]*(;|$)", "", value))  # the page's
            elif name != "transform" or not value.startswith("rotate(-0 "):
                element.set(name, " ".join(value.split()))
    width, height = (round(inches * _POINTS, 2) for inches in size)
    tree.attrib.clear()
    tree.set("viewBox", f"0 0 {width:g} {height:g}")
    tree.set("width", f"{width:g}")
    tree.set("height", f"{height:g}")
    if alt is None:
        tree.set("aria-hidden", "true")
    else:
        tree.set("role", "img")
        tree.set("aria-label", plain(alt))
    return ElementTree.tostring(tree, encoding="unicode")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _trim(element: ElementTree.Element) -> str | None:
    return element.text if element.tag == "text" else None
