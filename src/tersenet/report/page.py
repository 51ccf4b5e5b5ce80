"""One self-contained page of a file and its run, or of several files: `report` and `compare`."""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

try:
    import jinja2

    from tersenet.report import figures
    from tersenet.report.drawing import Drawing
except ImportError as wrong:
    raise ImportError("a page needs jinja2 and matplotlib: pip install 'tersenet[report]'", name=wrong.name) from None

from tersenet.report.facts import Facts, Line
from tersenet.report.weights import histogram, image, mask

SHOWN = 12  # weights, the largest, whose values and masks are drawn
HERE = Path(__file__).parent


class Section(NamedTuple):
    """A part of a page: what stands above its figures, and these."""

    title: str
    word: str
    drawings: list[Drawing]


def report(facts: Facts) -> str:
    """The page of a file, or of a run that has not made one yet, as HTML that asks for nothing from elsewhere.

    The same facts give the same page.
    """
    sections, missing = list[Section](), list[str]()
    for title, make in PARTS.items():
        made = make(facts) if facts.artifact is not None or make in OF_RUN else NO_FILE
        if isinstance(made, str):
            missing.append(f"{title}: {made}")
        else:
            sections.append(Section(title, *made))
    return _page(
        "report.html.j2",
        title=facts.title,
        facts=facts,
        headline=_headline(facts),
        outputs=any(line.outputs is not None for line in facts.lines),
        parts=f"{facts.bytes:,} bytes: {', '.join(f'{size:,} of {name}' for name, size in facts.parts.items())}.",
        weights=facts.weights,
        sections=sections,
        missing=missing,
    )


def compare(files: Mapping[str, Facts]) -> str:
    """The page of several files side by side, by the name of each."""
    lines = {name: {line.key: line for line in facts.lines} for name, facts in files.items()}
    names = {key: line.name for found in lines.values() for key, line in found.items()}
    measured = sum(facts.metric is not None for facts in files.values())
    return _page(
        "compare.html.j2",
        title=", ".join(files),
        files=files,
        rows=[(name, [found.get(key) for found in lines.values()]) for key, name in names.items()],
        drawings=[figures.side_by_side(files)] if measured > 1 else [],
        missing=[]
        if measured > 1
        else ["Metric against size is not drawn: fewer than two of the files tell a metric."],
    )


def _page(template: str, **parts: Any) -> str:
    style, script = (HERE / "page.css").read_text("utf-8"), (HERE / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(style=style, script=script, policy=policy, **parts)


def _headline(facts: Facts) -> list[tuple[str, str, str]]:
    """Name, value and a remark of what comes first."""
    found, told = list[tuple[str, str, str]](), facts.told
    if facts.artifact is not None:
        found.append(("Size of the file", f"{facts.bytes:,} bytes", f"of {facts.before:,} before"))
        bits = 8 * facts.bytes / max(facts.weights, 1)
        found.append(("Times smaller", f"{facts.before / facts.bytes:.1f}", f"{bits:.3f} bits per weight"))
    if facts.metric is not None:
        before = "" if told.before is None else f"{told.before:.4f} → "
        found.append(("Metric on the test data", f"{before}{facts.metric:.4f}", "measured from the reopened file"))
    if told.seconds is not None:
        found.append(("Time", _time(told.seconds), _counted(len(told.steps), "stage or round", "stages and rounds")))
    return found


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _time(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> _time(12.34), _time(75), _time(7265)
    ('12.3 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


Made = tuple[str, list[Drawing]] | str  # a word and the figures, or why there are none
NO_FILE = "the run has made no file."
NO_RUN = "the run that made this file is not known; give its folder instead of the file."


def _bytes(facts: Facts) -> Made:
    return "", [figures.bytes_by_layer(facts)]


def _layers(facts: Facts) -> Made:
    lines = [line for line in facts.matrices if line.error and line.bits and math.isfinite(line.error)]
    return ("", [figures.layers(lines)]) if lines else "no weight of the file tells an error."


def _values(facts: Facts) -> Made:
    shown, word = _largest(facts, facts.matrices)
    if not shown:
        return "no tensor is a matrix."
    return word, [figures.values(line.name, k, histogram(tensor)) for k, (line, tensor) in enumerate(shown)]


def _masks(facts: Facts) -> Made:
    pruned = [line for line in facts.lines if "Sparse" in line.form or "Sliced" in line.form]
    shown, word = _largest(facts, pruned)
    found = [figures.mask(line.name, kept) for line, tensor in shown if (kept := mask(tensor.tree)) is not None]
    first = next(iter(facts.matrices), None)
    inputs = next((image(tensor.tree) for line, tensor in shown if line is first), None)
    if first is not None and inputs is not None:
        found.insert(0, figures.image(first.name, inputs))
    return (word, found) if found else "no weight was pruned."


def _largest(facts: Facts, lines: list[Line]) -> tuple[list[tuple[Line, Any]], str]:
    """The largest tensors of these, in the order of the file, and a word where others are left out."""
    largest = sorted(lines, key=lambda line: -line.weights)[:SHOWN]
    word = f"The {SHOWN} largest of {len(lines)} weights are drawn." if len(lines) > SHOWN else ""
    held = {} if facts.artifact is None else facts.artifact.tensors
    return [(line, held[line.key]) for line in lines if line in largest], word


def _candidates(facts: Facts) -> Made:
    told = facts.told
    tried = [one for one in told.candidates if one.metric is not None or one.error is not None]
    found = [figures.candidates(tried)] if len(tried) > 1 else []
    found += [figures.scores(told.scores)] if len(told.scores) > 1 else []
    return ("", found) if found else _unless_told(facts, "one file was made and no other was tried.")


def _peers(facts: Facts) -> Made:
    if not facts.peers:
        return "no points of others were given."
    if facts.artifact is None:
        return NO_FILE
    if facts.metric is None:
        return "the file tells no metric, so the points of others have nothing to stand beside."
    return "", [figures.side_by_side({facts.title: facts}, facts.peers)]


def _rounds(facts: Facts) -> Made:
    thinned = [step for step in facts.told.steps if step.density is not None and step.metric is not None]
    steps = [s for s, before in zip(thinned, [None, *thinned]) if before is None or s.density != before.density]
    if len(steps) < 2:
        return _unless_told(facts, "the weights were not pruned in rounds.")
    return "", [figures.rounds(steps)]


def _offers(facts: Facts) -> Made:
    if not facts.told.offers:
        return _unless_told(facts, "this recipe does not choose among several packings of a layer.")
    return "", [figures.rate_distortion(facts.told, facts.lines)]


def _trainings(facts: Facts) -> Made:
    if not facts.told.trainings:
        return _unless_told(facts, "nothing was trained.")
    return "", [figures.trainings(facts.told.trainings)]


def _unless_told(facts: Facts, why: str) -> str:
    return why if facts.told.recipe else NO_RUN


PARTS: dict[str, Callable[[Facts], Made]] = {
    "Where the bytes went": _bytes,
    "Bits and errors": _layers,
    "How the weights lie": _values,
    "What was pruned": _masks,
    "What was tried": _candidates,
    "Beside what others made": _peers,
    "Pruning, round by round": _rounds,
    "What each layer could have been": _offers,
    "Training": _trainings,
}
OF_RUN = (_candidates, _peers, _rounds, _offers, _trainings)
