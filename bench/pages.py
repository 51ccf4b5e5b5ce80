"""Writes the tables of the pages in docs/ from bench/results, each between its marker and the next `<!-- end -->`.

`<!-- table: RESULTS -->` is a whole table, `<!-- table: RESULTS, PATTERN, ... -->` has the rows of
bench/results/RESULTS.json whose part, method or network fits one of the patterns. Where there are no results, or no
such rows, the page says so.

Run: make bench NAME=pages
"""

import json
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import readme
from table import ROOT

MARKED = re.compile(r"(<!-- table: ([\w-]+)((?:, [^,>]+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = ("part", "method", "network")  # what patterns are for
ABSENT = "Not measured yet."
Row = dict[str, Any]


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


REACHED = ("accuracy", "tuned")  # the network's own accuracy, "reference", is written behind these
# What a row may have: its key, the heading, and how a value is written.
FIELDS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("network", "network", str),
    ("method", "method", str),
    ("dithered", "dithered", lambda value: "yes" if value else "no"),
    ("weighted", "metric of the data", lambda value: "yes" if value else "no"),
    ("density", "weights left", percent),
    ("density_of_levels", "levels left", percent),
    ("zeros", "weights removed", percent),
    ("setting", "setting", str),
    ("times_fewer", "times fewer numbers", str),
    ("factored", "factored", str),
    ("macs", "MACs", lambda value: f"{100 * value:.1f} %" if isinstance(value, float) else f"{value / 1e6:.1f} M"),
    ("parameters", "parameters", "{:,}".format),
    ("published", "published file, bytes", "{:,}".format),
    ("bytes", "bytes", "{:,}".format),
    ("keys", "keys", "{:,}".format),
    ("cells_per_key", "cells a key", str),
    ("before", "before retraining", percent),
    ("norms_again", "before tuning, norms taken again", percent),
    ("anew", "norms taken anew, plain images", percent),
    ("anew_varied", "norms taken anew, varied images", percent),
    ("norms_follow", "before tuning, norms following", percent),
    ("tuned", "tuned (float)", percent),
    ("accuracy", "accuracy (float)", percent),
    ("errors", "errors of 10,000", str),
    ("threes_wrong", "of 1,010 threes", str),
    ("greedy_bleu", "BLEU, greedy", str),
    ("greedy_bleu_any", "any, greedy", str),
    ("beam5_bleu", "BLEU, beam of 5", str),
    ("beam5_bleu_any", "any, beam of 5", str),
    ("epochs", "epochs", str),
    ("milliseconds", "ms an image", str),
    ("seconds", "seconds", lambda value: f"{round(value, 1):,}"),
]


def listed(rows: list[Row]) -> Iterator[str]:
    """Every row as it is; a column for each field that one of them has."""
    shown = [field for field in FIELDS if any(row.get(field[0]) is not None for row in rows)]
    yield "| " + " | ".join(heading for _, heading, _ in shown) + " |"
    yield "|---" * len(shown) + "|"
    for row in rows:
        cells = {key: write(row[key]) for key, _, write in shown if row.get(key) is not None}
        if "reference" in row:
            cells |= {key: f"{cells[key]} ({percent(row['reference'])})" for key in REACHED if key in cells}
        if row.get("method") == "Dynamic Network Surgery":  # the one row that is quoted, not measured
            cells["method"] += ", the paper's figure"
        yield "| " + " | ".join(cells.get(key, "") for key, *_ in shown) + " |"


def curves(rows: list[Row]) -> Iterator[str]:
    parts = {part: [r for r in rows if r["part"] == part] for part in dict.fromkeys(r["part"] for r in rows)}
    yield from readme.curves(parts)


def costs(rows: list[Row]) -> Iterator[str]:
    """What a file of our own costs in accuracy and in time, for networks of which we know the float32 bytes."""
    yield "| network, float32 bytes | file, bytes | times smaller | accuracy (float) | seconds |"
    yield "|---|---|---|---|---|"
    for r in rows:
        if r["method"] == "tersenet" and r["network"] in ("resnet20", "mobilenetv2"):
            whole = 4 * readme.WEIGHTS[r["network"]]
            reached = f"{percent(r['accuracy'])} ({percent(r['reference'])})"
            times = f"{whole / r['bytes']:.1f}"
            yield f"| {r['network']}, {whole:,} | {r['bytes']:,} | {times} | {reached} | {r['seconds']} |"


WHOLE: dict[str, Callable[[], Iterator[str]]] = {
    "deep_compression": readme.deep_compression,
    "ptq": readme.without_retraining,
    "mixed": readme.mixtures,
    "ablation": readme.ablation,
    "traffic": readme.traffic,
    "codecs": readme.codecs,
    "sequence": readme.sequences,
    "attached": readme.attached,
}
# By results and the first pattern, where rows are not listed one by one.
FORMS: dict[tuple[str, str], Callable[[list[Row]], Iterator[str]]] = {
    ("pruning", "*-curves"): curves,
    ("ptq", "tersenet"): costs,
}


def table(name: str, patterns: list[str]) -> str:
    """The Markdown of one table."""
    if not patterns:
        return "\n".join(WHOLE[name]()).strip()
    path = ROOT / "bench/results" / f"{name}.json"
    if not path.exists():
        return ABSENT
    rows = [
        row
        for row in json.loads(path.read_text())["rows"]
        if any(fnmatchcase(str(row.get(key)), pattern) for key in NAMES for pattern in patterns)
    ]
    if not rows:
        return ABSENT
    form = FORMS.get((name, patterns[0]), listed)
    if name == "codes" and all(row["part"] == "table" for row in rows):
        return "\n".join(list(readme.methods(rows))[1:])  # without what the results page says of all of them
    return "\n".join(form(rows)).strip()


def filled(text: str) -> str:
    """A page with its tables as the results have them now."""

    def written(found: re.Match[str]) -> str:
        patterns = [pattern.strip() for pattern in found[3].split(",")[1:]]
        return f"{found[1]}\n{table(found[2], patterns)}\n\n{found[4]}"

    return MARKED.sub(written, text)


def pages() -> list[Path]:
    """The pages that have tables."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if "<!-- table: " in path.read_text()]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text()))
