"""What the benchmarks share beside the clock: options, problems, tables, claims, the end."""

from __future__ import annotations

import argparse
import operator
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.harness import Checked, Contestant, UnequalError

# The two names that every result has; the others are peers.
OURS = "pixfuse"
COPY = "copy"


# Wide enough for the tables where the output is a file.
console = Console(width=None if sys.stdout.isatty() else 110)


def options_of(
    document: str | None,
    results: str,
    argv: Sequence[str] | None,
    *,
    quick: str,
    filter_help: str | None = None,
) -> argparse.Namespace:
    """What the command line says; ``output`` is None where nothing is to be written.

    ``document`` is the program's docstring, ``results`` the name of its file, ``quick`` says what
    ``--quick`` leaves, and ``filter_help`` what ``--filter`` looks at, for a program that has it.
    """
    parser = argparse.ArgumentParser(description=(document or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    if filter_help is not None:
        parser.add_argument("--filter", default="", help=filter_help)
    parser.add_argument(
        "--output",
        type=Path,
        help=f"JSON file; without it, a full run writes benchmarks/results/{results}",
    )
    options = parser.parse_args(argv)
    is_full = not options.quick and not getattr(options, "filter", "")
    if options.output is None and is_full:
        options.output = harness.RESULTS / results
    return options


class Run:
    """One run of a program: what was left out, and what went wrong in it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.problems: list[str] = []
        self.unavailable: dict[str, str] = {}

    def check(self, contestant: Contestant, expected: torch.Tensor) -> list[Checked]:
        """The checked contestant, or nobody: then the problem is noted and nothing is timed."""
        try:
            return [Checked(contestant, expected)]
        except UnequalError as error:
            self.note(str(error))
            return []

    def note(self, problem: str) -> None:
        self.problems.append(problem)
        console.print(f"not equal, so not timed: {problem}", style="red", markup=False)

    def finish(self, output: Path | None, document: Mapping[str, Any]) -> int:
        """Writes the file, if there is to be one; the status to exit with."""
        if output is not None:
            harness.write_json(output, document)
            console.print(f"wrote {output}")
        seconds = time.perf_counter() - self.started
        console.print(f"{seconds:.0f} s, {len(self.problems)} unequal results")
        return 1 if self.problems else 0


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


def least_ratio(rows: Sequence[Mapping[str, Any]], slower: str, faster: str) -> float | None:
    """The least of one's median time over the other's, of the rows that have both."""
    each = (row["us_per_call"] for row in rows)
    return min(
        (us[slower][1] / us[faster][1] for us in each if slower in us and faster in us),
        default=None,
    )


def print_work(title: str, result: Mapping[str, Any]) -> None:
    """Everybody's times for the same work, the quickest first."""
    table = Table(title=title)
    for column in ("", "µs per image", "quartiles", "time / pixfuse", "largest difference"):
        table.add_column(column, justify="left" if not column else "right")
    ours_us = result["us_per_call"].get(OURS, [float("nan")] * 3)[1]
    for name, quartiles in sorted(result["us_per_call"].items(), key=lambda item: item[1][1]):
        low, middle, high = (value / result["images"] for value in quartiles)
        error = result["max_error"][name]
        table.add_row(
            f"[bold]{name}[/]" if name.startswith(OURS) else name,
            f"{middle:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{quartiles[1] / ours_us:.2f}",
            "equal" if error == 0 else f"{error:.1e}",
        )
    console.print(table)


def print_claims(found: Sequence[dict[str, Any]]) -> None:
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
