"""The chart and the README's table, made from the results.

    python -m benchmarks.plot           # draws the chart, rewrites the block in README.md
    python -m benchmarks.plot --check   # fails when either differs from the results

The block stands between ``<!-- benchmark:start -->`` and ``<!-- benchmark:end -->``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT

START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
OURS, OURS_FRESH, COPY = "pixfuse", "pixfuse, fresh", "copy"
OURS_COLOR, PEER_COLOR, TEXT_COLOR, FAINT_COLOR = "#e4572e", "#b8c0cc", "#1f2933", "#6b7683"


@dataclass(frozen=True)
class Bar:
    """One way to do the main case."""

    name: str
    us_per_image: float
    max_error: float

    @property
    def is_ours(self) -> bool:
        return self.name in (OURS, OURS_FRESH)


def bars(results: dict[str, Any]) -> list[Bar]:
    """Ours and every peer at the main case, the quickest first; without the copy."""
    headline = results["headline"]
    us = {
        name: quartiles[1] / headline["images"]
        for name, quartiles in headline["us_per_call"].items()
    }
    found = []
    for name in (OURS, OURS_FRESH, *(name for name in results["peers"] if name != OURS)):
        if name in us:
            # A peer that was measured in both ways is shown in its quicker one.
            quicker = (
                us[name] if name == OURS else min(us[name], us.get(f"{name}, fresh", us[name]))
            )
            found.append(Bar(name, quicker, headline["max_error"][name]))
    return sorted(found, key=lambda bar: bar.us_per_image)


def copy_us_per_image(results: dict[str, Any]) -> float:
    headline = results["headline"]
    return float(headline["us_per_call"][COPY][1] / headline["images"])


def shown_name(name: str) -> str:
    return {OURS: "pixfuse, out=", OURS_FRESH: "pixfuse"}.get(name, name)


def work(results: dict[str, Any]) -> str:
    case = results["headline"]["case"]
    output_layout = {"contiguous": "NCHW", "channels_last": "NHWC"}[case["output"]]
    threads = {1: "one thread"}.get(case["threads"], f"{case['threads']} threads")
    return (
        f"{case['batch']} images of {case['height']}x{case['width']}x3, "
        f"uint8 {case['input']} to {case['dtype']} {output_layout}, {threads}"
    )


def machine(results: dict[str, Any]) -> str:
    return f"{results['machine']['cpu']}, {results['pixfuse']['isa']}"


# ---- the table -----------------------------------------------------------------------------------


def readme_block(results: dict[str, Any], chart: str) -> str:
    """What stands between the marks."""
    found = bars(results)
    ours = next(bar.us_per_image for bar in found if bar.name == OURS)
    lines = [
        f"{work(results)} ({machine(results)}):",
        "",
        "| | µs per image | time / pixfuse | difference from torchvision v2 |",
        "|---|--:|--:|---|",
    ]
    copy = copy_us_per_image(results)
    rows: list[tuple[float, str]] = [
        (copy, f"| *copy of as many bytes* | {copy:.1f} | {copy / ours:.2f} | |")
    ]
    for bar in found:
        name = {OURS: "**pixfuse**, `out=`", OURS_FRESH: "**pixfuse**"}.get(bar.name, bar.name)
        error = "none, bit for bit" if bar.max_error == 0 else f"up to {bar.max_error:.1e}"
        us = bar.us_per_image
        rows.append((us, f"| {name} | {us:.1f} | {us / ours:.2f} | {error} |"))
    lines += [text for _, text in sorted(rows)]
    lines += ["", f"![Time per image of pixfuse and its peers]({chart})", ""]
    lines += ["| claim | measured | target | met |", "|---|--:|--:|---|"]
    words = {True: "yes", False: "**no**", None: "not measured"}
    for item in results["claims"]:
        value = "" if item["value"] is None else f"{item['value']:.3g}"
        lines.append(f"| {item['claim']} | {value} | {item['target']} | {words[item['met']]} |")
    versions = results["versions"]
    shown = ("torch", "torchvision", "opencv-python-headless", "nvidia-dali-cuda130")
    named = ", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name))
    commit = f", commit {results['commit'][:12]}" if results["commit"] else ""
    commit += " with changes" if results["dirty"] else ""
    lines += [
        "",
        f"Medians of {results['headline']['samples']} interleaved rounds, each result checked "
        f"before it was timed. Made by `{results['command']}` on {results['date'][:10]}{commit}; "
        f"{named}. What each peer runs stands in `benchmarks/peers.py`.",
    ]
    return "\n".join(lines)


def with_block(readme: str, block: str) -> str:
    """The README with a new block between the marks."""
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected one {START} and one {END}")
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{block}\n{END}{tail}"


# ---- the chart -----------------------------------------------------------------------------------


def draw(results: dict[str, Any], path: Path, source: str) -> None:
    """Horizontal bars of the time per image; ``source`` names the results in the picture's data."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = bars(results)
    copy = copy_us_per_image(results)
    longest = max(bar.us_per_image for bar in found)
    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": TEXT_COLOR})
    figure, axes = plt.subplots(figsize=(9.0, 1.35 + 0.34 * len(found)), dpi=160)
    figure.subplots_adjust(
        left=0.24, right=0.955, top=1 - 0.8 / figure.get_figheight(), bottom=0.06
    )
    for row, bar in enumerate(found):
        color = OURS_COLOR if bar.is_ours else PEER_COLOR
        weight = "bold" if bar.is_ours else "normal"
        axes.barh(row, bar.us_per_image, height=0.66, color=color, zorder=2)
        axes.text(
            -0.012 * longest,
            row,
            shown_name(bar.name),
            ha="right",
            va="center",
            fontsize=10,
            fontweight=weight,
        )
        beyond_line = max(bar.us_per_image, copy if bar.us_per_image < 1.5 * copy else 0)
        axes.text(
            beyond_line + 0.008 * longest,
            row,
            f"{bar.us_per_image:.0f}" if bar.us_per_image >= 99.5 else f"{bar.us_per_image:.1f}",
            va="center",
            fontsize=10,
            fontweight=weight,
            color=OURS_COLOR if bar.is_ours else TEXT_COLOR,
        )
    axes.axvline(copy, color=TEXT_COLOR, linewidth=1, linestyle=(0, (3, 2)), zorder=3)
    axes.text(
        copy + 0.008 * longest,
        len(found) - 0.42,
        f"a copy of as many bytes: {copy:.1f}",
        fontsize=8.5,
        color=FAINT_COLOR,
        va="top",
    )
    axes.set_ylim(len(found) - 0.05, -0.6)
    axes.set_xlim(0, longest * 1.07)
    axes.set_axis_off()
    top = figure.get_figheight()
    figure.text(0.02, 1 - 0.34 / top, "Time per image, in µs", fontsize=14, fontweight="bold")
    figure.text(
        0.02,
        1 - 0.62 / top,
        f"{work(results)}, ImageNet statistics; {machine(results)}",
        fontsize=9.5,
        color=FAINT_COLOR,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None, "Source": source})
    plt.close(figure)


def drawn_from(path: Path) -> str | None:
    """The name of the results that a chart was drawn from."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        picture.load()
        source = picture.info.get("Source")
    return source if isinstance(source, str) else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    parser.add_argument("--results", type=Path, default=RESULTS / "normalize_cpu.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(argv)

    text = options.results.read_text()
    results = json.loads(text)
    chart = options.results.with_suffix(".png").resolve()
    shown = chart.relative_to(ROOT).as_posix() if chart.is_relative_to(ROOT) else chart.name
    source = hashlib.sha256(text.encode()).hexdigest()
    readme = options.readme.read_text()
    wanted = with_block(readme, readme_block(results, shown))
    if options.check:
        problems = []
        if readme != wanted:
            problems.append(f"{options.readme.name} differs from {options.results.name}")
        if drawn_from(chart) != source:
            problems.append(f"{chart.name} was not drawn from this {options.results.name}")
        for problem in problems:
            print(f"{problem}; run python -m benchmarks.plot", file=sys.stderr)
        return 1 if problems else 0
    draw(results, chart, source)
    options.readme.write_text(wanted)
    print(f"drew {shown}, rewrote {options.readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
