"""Scores as a table to read on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from eval.protocol import Record


def table(records: Sequence[Record]) -> str:
    """Records as aligned lines: subject, score, value, 95 % interval, number of images."""
    rows = [("subject", "score", "value", "95 % interval", "images")]
    for entry in records:
        low_high = entry["interval"]
        interval = f"{low_high[0]:.4g} .. {low_high[1]:.4g}" if low_high else ""
        name = f"{entry['name']} at {entry['tap']}" if "tap" in entry else entry["name"]
        if entry["name"] in ("kid", "precision", "recall"):
            name += f" ({entry['protocol']['features']['name']})"
        rows.append((entry["subject"], name, f"{entry['value']:.4g}", interval, str(entry["n"])))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
