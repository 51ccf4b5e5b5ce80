"""The figures of a page: where bytes went, how weights lie, what was tried, how it was trained."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tersenet.report.drawing import GREY, HEIGHT, ONE, TWO, Drawing, canvas, picture
from tersenet.report.facts import Facts, Line, Peer
from tersenet.report.told import Candidate, Step, Told, Training
from tersenet.report.weights import Histogram, Mask

NAMED = 12  # layers that have bars of their own
SHORT = 26  # letters of a name in a figure


def bytes_by_layer(facts: Facts) -> Drawing:
    """The parts of all bytes that layers take before and after, or groups of layers where there are many."""
    sizes = _grouped(facts.lines)
    shares = 100 * np.array(list(sizes.values())) / np.maximum([facts.before, facts.bytes], 1)
    names, rows = list(map(_short, sizes)), np.arange(len(sizes))
    with canvas("bytes", 80 + 26 * len(names), "x") as made:
        made.axes.barh(rows - 0.19, shares[:, 0], 0.36, color=GREY, label="before")
        made.axes.barh(rows + 0.19, shares[:, 1], 0.36, color=ONE, label="after")
        made.axes.set_yticks(rows, names)
        made.axes.set_ylim(len(names) - 0.4, -0.6)
        made.axes.set_xlabel("part of all bytes, %")
        _legend(made.axes)
    top = int(np.argmax(shares[:, 1]))
    caption = (
        f"{facts.before:,} bytes before, {facts.bytes:,} after; the largest part of the file, {shares[top, 1]:.0f} %,"
        f" is {list(sizes)[top]}."
    )
    told = "; ".join(f"{name}: {a:.1f} % before, {b:.1f} % after" for name, (a, b) in zip(sizes, shares))
    return made.drawing(caption, f"Part of all bytes by layer. {told}")


def _grouped(lines: Sequence[Line]) -> dict[str, tuple[int, int]]:
    """Bytes before and after: of tensors, of those whose names begin alike, or of the largest and all others."""

    def added(named: Sequence[tuple[str, Line]]) -> dict[str, tuple[int, int]]:
        found = dict[str, tuple[int, int]]()
        for name, line in named:
            before, after = found.get(name, (0, 0))
            found[name] = before + line.before, after + line.bytes
        return found

    for depth in range(8, 0, -1):
        groups = added([(".".join(line.name.split(".")[:depth]), line) for line in lines])
        if 1 < len(groups) <= NAMED + 3:
            return groups
    largest = sorted(lines, key=lambda line: -line.bytes)[:NAMED]
    return added([(line.name if line in largest else "all others", line) for line in lines])


def layers(lines: Sequence[Line]) -> Drawing:
    """Bits a weight and error of each matrix or kernel, sized by its bytes."""
    bits, errors = [line.bits or 0 for line in lines], [line.error or 0 for line in lines]
    most = max(line.bytes for line in lines)
    with canvas("layers") as made:
        made.axes.scatter(
            bits, errors, [12 + 160 * line.bytes / most for line in lines], ONE, alpha=0.6, edgecolors="none"
        )
        named = sorted(lines, key=lambda line: -line.bytes)[:3] if len(lines) <= 2 * NAMED else []
        for number, line in enumerate(named):
            up = -13 if number % 2 else 6  # so that names of neighbours stand apart
            _named(made.axes, line.name, line.bits or 0, line.error or 0, sum(bits) / len(bits), up)
        made.axes.set_xlabel("bits per weight")
        made.axes.set_ylabel("relative error of the weights")
        made.axes.margins(0.12)
        if max(errors) > 30 * min(errors):
            _logarithmic(made.axes, "y")
        else:  # errors that are nearly alike would lie on the upper edge
            made.axes.set_ylim(0, 1.12 * max(errors) or None)
    return made.drawing(
        "Each dot is a matrix or kernel, the larger the more bytes it takes.",
        f"Bits per weight against relative error of {len(lines)} weights: {min(bits):.2f} to {max(bits):.2f} bits,"
        f" errors of {min(errors):.4f} to {max(errors):.4f}",
    )


def values(name: str, number: int, found: Histogram) -> Drawing:
    """How the values of one weight lie, with its codewords or steps as ticks."""
    with canvas(f"values{number}", 190, "y") as made:
        axes = made.axes
        if found.width:
            axes.bar(found.places, 100 * found.shares, found.width, color=ONE)
        else:
            axes.vlines(found.places, 0, 100 * found.shares, ONE, linewidth=2)
            axes.plot(found.places, 100 * found.shares, "o", color=ONE, markersize=4)
        axes.set_ylim(0)
        low = axes.get_ylim()[1]
        axes.set_ylim(-0.09 * low if len(found.marks) else 0)
        axes.vlines(found.marks, -0.08 * low, -0.02 * low, TWO, linewidth=1)
        axes.set_ylabel("values, %")
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(6))
    zeros = f"; {100 * found.zeros:.1f} % are zero and not drawn" if found.zeros else ""
    caption = f"{name}: {found.says}{zeros}."
    reach = f" between {found.places.min():.3g} and {found.places.max():.3g}" if len(found.places) else ""
    return made.drawing(caption, f"Histogram of the values of {name}{reach}. {caption}")


def mask(name: str, found: Mask) -> Drawing:
    """Which weights are kept."""
    caption = f"{name}: {100 * found.kept:.1f} % kept; {found.says}."
    return picture(found.cells, caption, f"Kept weights of {caption}")


def image(name: str, found: Mask) -> Drawing:
    """How many weights each place of an image keeps."""
    border = np.ones(found.cells.shape, bool)
    border[3:-3, 3:-3] = False
    middle, edge = found.cells[~border].mean(), found.cells[border].mean()
    caption = (
        f"{name}: {found.says}. Kept are {100 * middle:.1f} % in the middle, {100 * edge:.1f} % in the three"
        " pixels at its border."
    )
    return picture(found.cells / max(found.cells.max(), 1e-9), caption, f"Kept weights of {caption}")


def candidates(tried: Sequence[Candidate]) -> Drawing:
    """Metric, or error, of every file that was made, against its size; what was taken is marked."""
    by_metric = any(one.metric is not None for one in tried)
    points = [(one, one.metric if by_metric else one.error) for one in tried]
    shown = [(one, value) for one, value in points if value is not None]
    what = "metric on held back data" if by_metric else "error at the outputs"
    with canvas("candidates") as made:
        sizes, heights = [one.bytes for one, _ in shown], [value for _, value in shown]
        made.axes.plot(sizes, heights, "o", color=GREY, markersize=5)
        for one, value in shown:
            if one.chosen:
                made.axes.plot(one.bytes, value, "D", color=TWO, markersize=8)
                _named(made.axes, "taken", one.bytes, value, sum(sizes) / len(sizes))
        made.axes.set_ylabel(what)
        _sizes(made.axes, sizes)
        made.axes.margins(0.1)
    taken = [f"{one.label} was taken: {one.bytes:,.0f} bytes, {value:.5g}" for one, value in shown if one.chosen]
    return made.drawing(
        f"{len(shown)} files were made and looked at; {'; '.join(taken) or 'none of these was taken'}. Bytes are those"
        " counted in the search.",
        f"{what} against bytes of {len(shown)} candidates: {min(sizes):,.0f} to {max(sizes):,.0f} bytes,"
        f" {min(heights):.5g} to {max(heights):.5g}. {'; '.join(taken)}",
    )


def rounds(steps: Sequence[Step]) -> Drawing:
    """The metric over the part of the weights that is left, round by round."""
    shown = [(s.density, s.metric) for s in steps if s.density is not None and s.metric is not None]
    densities, metrics = [100 * d for d, _ in shown], [m for _, m in shown]
    with canvas("rounds") as made:
        made.axes.plot(densities, metrics, "o-", color=ONE, markersize=5)
        made.axes.set_xlabel("weights that are not zero, %")
        made.axes.set_ylabel("metric on held back data")
        _plain_log(made.axes, densities)
        made.axes.invert_xaxis()
        made.axes.margins(0.08, 0.15)
    told = "; ".join(f"{d:.1f} %: {m:.4f}" for d, m in zip(densities, metrics))
    return made.drawing(f"From {densities[0]:.0f} % to {densities[-1]:.1f} %.", f"Metric by density. {told}")


def rate_distortion(told: Told, lines: Sequence[Line]) -> Drawing:
    """What each layer would cost at each size that it could have had."""
    sizes = {line.name: line.bytes for line in lines}
    largest = sorted(told.offers, key=lambda name: -sizes.get(name, 0))[: 3 * NAMED]
    curves = {name: told.offers[name] for name in largest}
    with canvas("offers", HEIGHT + 40) as made:
        for number, curve in enumerate(curves.values()):
            first = {"color": TWO, "zorder": 3, "label": _short(next(iter(curves)))} if not number else {"color": GREY}
            made.axes.plot([x for x, _ in curve], [y for _, y in curve], ".-", linewidth=1, markersize=4, **first)
        made.axes.set_ylabel("cost at the outputs")
        made.axes.set_xlabel("bytes of the layer")
        _logarithmic(made.axes, "y")
        _plain_log(made.axes, [x for curve in curves.values() for x, _ in curve], always=True)
        _legend(made.axes)
    kept = f" of the {len(curves)} largest layers" if len(told.offers) > len(curves) else f" of {len(curves)} layers"
    caption = f"The best of what was offered to each{kept}; a line is a layer, the largest is named."
    return made.drawing(caption, f"Cost at the outputs against bytes. {caption}")


def trainings(found: Sequence[Training]) -> Drawing:
    """The loss of every epoch, one training after the other."""
    with canvas("trainings") as made:
        begin = 0
        for number, one in enumerate(found):
            places = range(begin + 1, begin + 1 + len(one.losses))
            made.axes.plot(places, one.losses, "o-", color=(ONE, TWO)[number % 2], markersize=4, linewidth=1.2)
            begin += len(one.losses)
        made.axes.set_xlabel("epoch of the whole run")
        made.axes.set_ylabel("mean loss")
        made.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _zero_based(made.axes)
    told = "; ".join(f"{one.label}: {one.losses[0]:.4f} to {one.losses[-1]:.4f}" for one in found[:40])
    names = list(dict.fromkeys(one.label for one in found))
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return made.drawing(f"Colours change where a training ends: {listed}.", f"Mean loss by epoch. {told}")


def scores(found: Sequence[float]) -> Drawing:
    """What a search scored, and the best so far."""
    with canvas("scores") as made:
        made.axes.plot(range(1, len(found) + 1), found, ".", color=GREY, markersize=4, label="scored")
        made.axes.plot(range(1, len(found) + 1), np.maximum.accumulate(found), color=ONE, label="best so far")
        made.axes.set_xlabel("number of the try")
        made.axes.set_ylabel("score")
        _legend(made.axes)
    return made.drawing(
        f"{len(found)} choices of channels were scored.",
        f"Scores of a search: the first {found[0]:.5g}, the best {max(found):.5g} of {len(found)}",
    )


def side_by_side(files: Mapping[str, Facts], peers: Sequence[Peer] = ()) -> Drawing:
    """Test metric against bytes of several files, and of what others made."""
    own = [Peer(name, facts.bytes, facts.metric) for name, facts in files.items() if facts.metric is not None]
    points = [*own, *peers]
    with canvas("files") as made:
        sizes = [one.bytes for one in points]
        made.axes.plot(sizes, [one.metric for one in points], "o", color=GREY, markersize=6)
        made.axes.plot(sizes[: len(own)], [one.metric for one in own], "o", color=ONE, markersize=7)
        for number, one in enumerate(sorted(points, key=lambda one: one.bytes)):
            _named(made.axes, one.name, one.bytes, one.metric, sum(sizes) / len(sizes), -14 if number % 2 else 6)
        made.axes.set_ylabel("test metric")
        _sizes(made.axes, sizes)
        made.axes.margins(0.2, 0.2)
    told = "; ".join(f"{one.name}: {one.bytes:,.0f} bytes, {one.metric:.4f}" for one in points)
    given = " What others made is grey, with bytes and metric as they were given." if peers else ""
    caption = f"The metric is measured from the file, opened again.{given}"
    return made.drawing(caption, f"Test metric against bytes. {told}")


def _short(name: str) -> str:
    return name if len(name) <= SHORT else f"{name[: SHORT // 2 - 1]}…{name[-SHORT // 2 :]}"


def _named(axes: Axes, name: str, x: float, y: float, middle: float, up: int = 6) -> None:
    """A name beside a point, on the side where there is room."""
    left = x <= middle
    where = {"textcoords": "offset points", "ha": "left" if left else "right"}
    axes.annotate(_short(name), (x, y), (8 if left else -8, up), **where).set_in_layout(False)  # type: ignore[arg-type]


def _legend(axes: Axes) -> None:
    """A legend above the axes, where nothing is drawn."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.5)


def _sizes(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_xlabel("bytes")
    _plain_log(axes, sizes)


def _plain_log(axes: Axes, places: Sequence[float], always: bool = False) -> None:
    """The horizontal axis with numbers written out, and logarithmic where they differ much."""
    if always or max(places, default=1) > 8 * max(min(places, default=1), 1e-9):
        _logarithmic(axes, "x")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _logarithmic(axes: Axes, which: str) -> None:
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value >= 1e-3 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def _zero_based(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if 0 < low < high / 2:
        axes.set_ylim(0)
