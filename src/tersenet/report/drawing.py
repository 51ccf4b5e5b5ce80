"""matplotlib figures as inline SVG: the same bytes each time, text as text, colours those of the page; and pictures."""

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tersenet.packed import Array

# Colours of their own, each of which the page's style stands in for, by light and dark.
INK, GRID, ONE, TWO, GREY = "#000102", "#000103", "#000104", "#000105", "#000106"
ON_PAGE = {INK: "currentColor", GRID: "var(--grid)", ONE: "var(--one)", TWO: "var(--two)", GREY: "var(--grey)"}
CELL = (59, 136, 204)  # of pictures, whose colours are fixed: seen on light and dark
WIDTH, HEIGHT, POINTS = 440, 270, 72
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tersenet",
    "text.parse_math": False,  # names may hold dollars
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


class Drawing(NamedTuple):
    """An image as a page has it, with its text alternative, and the line under it."""

    markup: str
    caption: str


class Canvas:
    """Axes to draw on; `drawing` has what was drawn once the `canvas` is left."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        self.figure, self.axes, self.svg = figure, axes, ""

    def drawing(self, caption: str, alternative: str) -> Drawing:
        label = f'<svg class="drawing" role="img" aria-label="{escape(alternative)}"'
        return Drawing(self.svg.replace("<svg", label, 1), caption)


@contextmanager
def canvas(name: str, height: int = HEIGHT, grid: str = "both") -> Iterator[Canvas]:
    """Axes of a figure; ids in it begin with `name`, which no other figure of the page has."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's own font lacks, the page's may have
        figure = Figure(figsize=(WIDTH / POINTS, height / POINTS), layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.grid(True, axis=grid)  # type: ignore[arg-type]
        made = Canvas(figure, axes)
        yield made
        file = io.StringIO()
        nothing: dict[str, Any] = {"Date": None, "Creator": None}
        figure.savefig(file, format="svg", dpi=POINTS, metadata=nothing)
        made.svg = _inline(file.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """A whole SVG file as a part of a page: no header, ids of its own, the page's colours and fonts."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1">', svg, count=1, flags=re.DOTALL)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'xlink:href="#([^"]+)"', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="', 'href="').replace('href="#', f'href="#{name}-')
    svg = re.sub(r"<!--.*?-->\s*|<g>\s*</g>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*; | transform=\"rotate\(-0 [^)]*\)\"", "", svg)
    for own, on_page in ON_PAGE.items():
        svg = svg.replace(own, on_page)
    return re.sub(r"\s*\n\s*", "\n", svg)


def picture(cells: Array, caption: str, alternative: str) -> Drawing:
    """Cells [rows, columns] of 0 to 1 as a picture: how much of a colour each has."""
    rows, columns = cells.shape
    image = Image.frombytes("P", (columns, rows), np.round(255 * cells).astype(np.uint8).tobytes())
    image.putpalette(CELL * 256)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)))
    ratio = min(max(columns / rows, 1 / 2), 4)  # narrow ones are drawn out, or they could not be seen
    data = base64.b64encode(file.getvalue()).decode()
    return Drawing(
        f'<img class="picture" alt="{escape(alternative)}" style="aspect-ratio: {ratio:.3f}"'
        f' src="data:image/png;base64,{data}">',
        caption,
    )
