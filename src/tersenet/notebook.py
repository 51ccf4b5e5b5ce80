"""The ledger as a table for notebooks; names come from files, so all text is escaped."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tersenet.artifact import LedgerRow

HEADS = ("tensor", "form", "codec", "weights", "bytes", "bits per weight", "error", "why it is so")


def ledger_html(rows: "Sequence[LedgerRow]", below: str = "") -> str:
    """Rows of the ledger as a table that scrolls by itself, with the sum, and a line of text below."""
    total, weights = sum(row.total for row in rows), sum(row.weights for row in rows)
    said = f"{total:,} bytes for {weights:,} weights: {8 * total / max(weights, 1):.3f} bits each"
    said += f", {4 * weights / max(total, 1):.1f}x smaller than float32"
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    body = "".join(map(_row, rows))
    table = f"<table><caption>{said}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    line = f"<p>{escape(below)}</p>" if below else ""
    return f'<div style="max-height: 30em; overflow: auto" tabindex="0">{table}</div>{line}'


def _row(row: "LedgerRow") -> str:
    bits = f"{8 * row.total / row.weights:.3f}" if row.weights else ""
    error = "" if row.error is None else f"{row.error:.4f}"
    cells = (row.kind, row.codec, f"{row.weights:,}", f"{row.total:,}", bits, error, row.note)
    return f'<tr><th scope="row">{escape(row.name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
