"""What the benchmarks print, and how a claim is judged."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

# The two names that every result has; the others are peers.
OURS = "pixfuse"
COPY = "copy"


def console() -> Console:
    # Wide enough for the tables where the output is a file.
    return Console(width=None if sys.stdout.isatty() else 110)


def claim(text: str, value: float | None, target: str) -> dict[str, Any]:
    """A claim for the JSON: ``target`` is a relation and a number, as in ``">= 10"``."""
    relation, limit = target.split()
    met = None
    if value is not None:
        value = float(f"{value:.4g}")
        met = {">=": operator.ge, "<=": operator.le}[relation](value, float(limit))
    return {"claim": text, "value": value, "target": target, "met": met}


def faster_peers(
    us_per_call: Mapping[str, Sequence[float]], margin: float = 1.0
) -> dict[str, float]:
    """The peers whose median times ``margin`` is below ours, with our time over theirs."""
    us = {name: quartiles[1] for name, quartiles in us_per_call.items()}
    if OURS not in us:  # our result was not equal: everybody beats that
        return dict.fromkeys(us, float("inf"))
    ratios = {name: us[OURS] / other for name, other in us.items() if name not in (OURS, COPY)}
    return {name: ratio for name, ratio in ratios.items() if ratio > margin}


def print_claims(console: Console, found: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Claims")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    table.add_column("met")
    words = {True: "[green]yes[/]", False: "[red]no[/]", None: "not measured"}
    for item in found:
        value = "" if item["value"] is None else f"{item['value']:.4g}"
        table.add_row(item["claim"], value, item["target"], words[item["met"]])
    console.print(table)
