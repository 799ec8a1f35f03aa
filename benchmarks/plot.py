"""The charts, the README's tables and docs/benchmarks.md, made from the results.

    python -m benchmarks.plot           # draws the charts, rewrites both texts
    python -m benchmarks.plot --check   # fails when one differs from the results

What is made stands between ``<!-- benchmark:start -->`` and ``<!-- benchmark:end -->``. The README
shows who takes how long, docs/benchmarks.md every claim, met or not, and where it comes from. A
folder of the results is another machine: its claims stand beside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT

START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
OURS, OURS_FRESH, COPY = "pixfuse", "pixfuse, fresh", "copy"
OURS_COLOR, PEER_COLOR, TEXT_COLOR, FAINT_COLOR = "#e4572e", "#b8c0cc", "#1f2933", "#6b7683"
PART_COLORS = {"decode": "#b8c0cc", "normalize": "#e4572e", "move": "#3a6ea5"}


@dataclass(frozen=True)
class Bar:
    """One way to do a piece of work."""

    name: str
    us_per_image: float
    max_error: float
    is_ours: bool = False


@dataclass(frozen=True)
class Report:
    """One file of results, and what is made of it."""

    file: str
    title: str
    tables: Callable[[dict[str, Any]], list[str]]  # lines for the README
    chart: str  # what it shows
    details: Callable[[dict[str, Any]], list[str]]  # lines for docs/benchmarks.md
    draw: Callable[[dict[str, Any], Path, str], None]


# ---- what all of them say ------------------------------------------------------------------------


def machine(results: dict[str, Any]) -> str:
    return f"{results['machine']['cpu']}, {results['pixfuse']['isa']}"


def claim_lines(results: dict[str, Any]) -> list[str]:
    lines = ["| claim | measured | target | met |", "|---|--:|--:|---|"]
    words = {True: "yes", False: "**no**", None: "not measured"}
    for item in results["claims"]:
        value = "" if item["value"] is None else f"{item['value']:.3g}"
        lines.append(f"| {item['claim']} | {value} | {item['target']} | {words[item['met']]} |")
    return lines


#: What a claim's words leave out, for who has not read the benchmark.
CLAIMS_IN_FULL = (
    (
        r"^points of (\d+) where a peer is faster",
        r"how many of \1 combinations of shape, layout, dtype and threads a peer does faster",
    ),
    (r"^memory, ", "images held in memory, "),
    (r"^folder, ", "JPEG files, "),
    (r"\b1 workers", "1 worker"),
    (
        "of uint8 batches and DeviceLoader over float batches",
        "with uint8 batches and DeviceLoader over those with float batches",
    ),
    ("a fresh output over a recycled one", "a call with a fresh output over one with `out=`"),
)


def in_full(claim: str) -> str:
    """A claim that can be understood on its own."""
    for short, full in CLAIMS_IN_FULL:
        claim = re.sub(short, full, claim)
    return claim


def missed_claims(claims: Sequence[dict[str, Any]]) -> list[str]:
    """What was missed, in full; what was asked of several cases is said once for all of them."""
    cases: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for item in claims:
        if item["met"] is False:
            case, _, asked = in_full(item["claim"]).rpartition(": ")
            cases.setdefault((asked, item["target"]), []).append((case, f"{item['value']:.3g}"))
    lines = []
    for (asked, target), found in cases.items():
        if len(found) == 1:
            ((case, value),) = found
            lines.append(f"{case + ': ' if case else ''}{asked} ({value}, target {target})")
        else:
            values = "; ".join(f"{case}: {value}" for case, value in found)
            lines.append(f"{asked}, target {target} ({values})")
    return lines


def verdict(results: dict[str, Any], others: Sequence[dict[str, Any]], title: str) -> str:
    """How many targets were met, which were not, and where all of them stand."""

    def missed(some: dict[str, Any], there: str = "") -> str:
        lines = missed_claims(some["claims"])
        return f"; missed{there}: {'; '.join(lines)}" if lines else ""

    def short(other: dict[str, Any]) -> str:
        where = f"{other['machine']['cpu']} ({other['pixfuse']['isa']})"
        return f"On {where} {met(other)} of {len(other['claims'])}{missed(other, ' there')}."

    def met(some: dict[str, Any]) -> int:
        return sum(1 for item in some["claims"] if item["met"])

    anchor = title.lower().replace(",", "").replace(" ", "-")
    targets = f"[{len(results['claims'])} targets](docs/benchmarks.md#{anchor})"
    return "\n\n".join(
        [
            f"{met(results)} of {targets} are met{missed(results)}.",
            *(short(other) for other in others),
        ]
    )


def origin(results: dict[str, Any]) -> str:
    versions = results["versions"]
    shown = ("torch", "torchvision", "pillow", "opencv-python-headless", "nvidia-dali-cuda130")
    named = ", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name))
    commit = f", commit {results['commit'][:12]}" if results["commit"] else ""
    commit += " with changes" if results["dirty"] else ""
    return f"Made by `{results['command']}` on {results['date'][:10]}{commit}; {named}."


def difference(bar: Bar) -> str:
    return "none, bit for bit" if bar.max_error == 0 else f"up to {bar.max_error:.1e}"


def microseconds(us: float) -> str:
    return f"{us:.0f}" if us >= 99.5 else f"{us:.1f}"


def bar_lines(found: Sequence[Bar], ours: float, copy: float) -> list[str]:
    """A table of bars, the quickest first, with the copy among them."""
    rows = [(copy, f"| *copy of as many bytes* | {copy:.1f} | {copy / ours:.2f} | |")]
    for bar in found:
        name = shown_name(bar.name)
        name = name.replace(OURS, f"**{OURS}**", 1) if bar.is_ours else name
        us = bar.us_per_image
        rows.append((us, f"| {name} | {us:.1f} | {us / ours:.2f} | {difference(bar)} |"))
    return [
        "| | µs per image | time / pixfuse | difference from torchvision v2 |",
        "|---|--:|--:|---|",
        *(text for _, text in sorted(rows)),
    ]


def shown_name(name: str) -> str:
    return {OURS: "pixfuse, out=", OURS_FRESH: "pixfuse"}.get(name, name)


# ---- a batch that is a tensor already ------------------------------------------------------------


def normalize_bars(results: dict[str, Any]) -> list[Bar]:
    """Ours and every peer at the main case, the quickest first; without the copy."""
    headline = results["headline"]
    us = {
        name: quartiles[1] / headline["images"]
        for name, quartiles in headline["us_per_call"].items()
    }
    found = []
    for name in (OURS, OURS_FRESH, *(name for name in results["peers"] if name != OURS)):
        if name in us:
            is_ours = name in (OURS, OURS_FRESH)
            # A peer that was measured in both ways is shown in its quicker one.
            quicker = us[name] if is_ours else min(us[name], us.get(f"{name}, fresh", us[name]))
            found.append(Bar(name, quicker, headline["max_error"][name], is_ours))
    return sorted(found, key=lambda bar: bar.us_per_image)


def normalize_work(results: dict[str, Any]) -> str:
    case = results["headline"]["case"]
    output_layout = {"contiguous": "NCHW", "channels_last": "NHWC"}[case["output"]]
    threads = {1: "one thread"}.get(case["threads"], f"{case['threads']} threads")
    return (
        f"{case['batch']} images of {case['height']}x{case['width']}x3, "
        f"uint8 {case['input']} to {case['dtype']} {output_layout}, {threads}"
    )


def normalize_tables(results: dict[str, Any]) -> list[str]:
    headline = results["headline"]
    found = normalize_bars(results)
    ours = next(bar.us_per_image for bar in found if bar.name == OURS)
    copy = headline["us_per_call"][COPY][1] / headline["images"]
    return [
        f"{normalize_work(results)} ({machine(results)}):",
        "",
        *bar_lines(found, ours, copy),
    ]


def normalize_details(results: dict[str, Any]) -> list[str]:
    return [
        *claim_lines(results),
        "",
        f"Medians of {results['headline']['samples']} interleaved rounds, each result checked "
        f"before it was timed. {origin(results)} What each peer runs stands in "
        "`benchmarks/peers.py`.",
    ]


def draw_normalize(results: dict[str, Any], path: Path, source: str) -> None:
    headline = results["headline"]
    panel = Panel(
        "",
        normalize_bars(results),
        headline["us_per_call"][COPY][1] / headline["images"],
    )
    subtitle = f"{normalize_work(results)}, ImageNet statistics; {machine(results)}"
    draw_bars([panel], subtitle, path, source)


# ---- a list of images ----------------------------------------------------------------------------

COLLATE_WORKS = {
    "plain": "{images} images of {input} to a float32 batch",
    "cropped": "{images} images of {input}, cropped to {output}, {mirrored} of them mirrored",
}


def collate_bars(result: dict[str, Any]) -> list[Bar]:
    """Ours in its ways to float32 and every peer, the quickest first; without the copy."""
    found = []
    for name, quartiles in result["us_per_call"].items():
        if name != COPY and not name.endswith(("bfloat16", "uint8")):
            is_ours = name.startswith(OURS)
            us = quartiles[1] / result["images"]
            shown = {OURS: "pixfuse, Pillow", f"{OURS}, out=": "pixfuse, Pillow, out="}
            found.append(Bar(shown.get(name, name), us, result["max_error"][name], is_ours))
    return sorted(found, key=lambda bar: bar.us_per_image)


def collate_tables(results: dict[str, Any]) -> list[str]:
    lines = []
    for work, title in COLLATE_WORKS.items():
        result = results[work]
        us = {name: quartiles[1] for name, quartiles in result["us_per_call"].items()}
        ours, copy = us[OURS] / result["images"], us[COPY] / result["images"]
        lines += [
            f"{title.format(**result)}, one thread ({machine(results)}):",
            "",
            *bar_lines(collate_bars(result), ours, copy),
            "",
        ]
    return lines[:-1]


def collate_details(results: dict[str, Any]) -> list[str]:
    return [
        *claim_lines(results),
        "",
        f"Medians of {results['plain']['samples']} interleaved rounds, each result checked before "
        f"it was timed. {origin(results)} Each peer is used as its users type it.",
    ]


def draw_collate(results: dict[str, Any], path: Path, source: str) -> None:
    panels = [
        Panel(
            title.format(**results[work]),
            collate_bars(results[work]),
            results[work]["us_per_call"][COPY][1] / results[work]["images"],
        )
        for work, title in COLLATE_WORKS.items()
    ]
    draw_bars(panels, f"one thread, ImageNet statistics; {machine(results)}", path, source)


# ---- a DataLoader --------------------------------------------------------------------------------


def loader_tables(results: dict[str, Any]) -> list[str]:
    lines = [
        f"{results['images']} images in batches of {results['batch']} ({machine(results)}):",
        "",
        "| | workers | images/s | decode | normalize | move, wait, read |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for source, title in results["sources"].items():
        lines.append(f"| *{title}* | | | µs per image | µs per image | µs per image |")
        for row in results["rows"]:
            if row["source"] == source:
                name = row["pipeline"].replace(OURS, f"**{OURS}**", 1)
                parts = " | ".join(microseconds(us) for us in row["parts_us"].values())
                rate = f"{row['images_per_second']:,.0f}"
                lines.append(f"| {name} | {row['workers']} | {rate} | {parts} |")
    return lines


def loader_details(results: dict[str, Any]) -> list[str]:
    return [
        *claim_lines(results),
        "",
        f"Medians of {results['epochs']} epochs, in turns, each pipeline's batches checked first. "
        f"Work done in W workers at once counts 1/W. {origin(results)}",
    ]


def draw_loader(results: dict[str, Any], path: Path, source: str) -> None:
    """Stacked bars of the wall-clock time per image, a panel for each source."""
    plt = pyplot()
    sources = results["sources"]
    rows = {name: [r for r in results["rows"] if r["source"] == name] for name in sources}
    counts = [len(found) for found in rows.values()]
    figure, axes = plt.subplots(
        len(sources),
        1,
        figsize=(9.0, 1.4 + sum(0.32 * count for count in counts) + 0.5 * (len(sources) - 1)),
        dpi=160,
        squeeze=False,
        gridspec_kw={"height_ratios": counts},
    )
    top = figure.get_figheight()
    figure.subplots_adjust(left=0.37, right=0.94, top=1 - 1.2 / top, bottom=0.1 / top)
    for place, (name, title) in zip(axes[:, 0], sources.items(), strict=True):
        _draw_stacks(place, title, rows[name])
    figure.text(
        0.02, 1 - 0.34 / top, "A DataLoader: time per image, in µs", fontsize=14, fontweight="bold"
    )
    figure.text(0.02, 1 - 0.62 / top, machine(results), fontsize=9.5, color=FAINT_COLOR)
    words = {"decode": "decode", "normalize": "normalize, collate", "move": "move, wait, read"}
    for index, (part, word) in enumerate(words.items()):
        figure.text(0.37 + 0.19 * index, 1 - 0.62 / top, "■", fontsize=11, color=PART_COLORS[part])
        figure.text(0.39 + 0.19 * index, 1 - 0.62 / top, word, fontsize=9.5)
    save(figure, path, source)


def _draw_stacks(axes: Any, title: str, rows: Sequence[dict[str, Any]]) -> None:
    longest = max(sum(row["parts_us"].values()) for row in rows)
    for index, row in enumerate(rows):
        end = 0.0
        for part, us in row["parts_us"].items():
            axes.barh(index, us, left=end, height=0.68, color=PART_COLORS[part])
            end += us
        ours = row["pipeline"].startswith(OURS)
        weight = "bold" if ours else "normal"
        name = row["pipeline"].replace(" batches and ", " + ")
        workers = f"{row['workers']} worker{'' if row['workers'] == 1 else 's'}"
        axes.text(
            -0.015 * longest,
            index,
            f"{name}, {workers}",
            ha="right",
            va="center",
            fontsize=9.5,
            fontweight=weight,
        )
        axes.text(
            end + 0.01 * longest,
            index,
            microseconds(end),
            va="center",
            fontsize=9.5,
            fontweight=weight,
        )
    axes.set_title(title, fontsize=9.5, loc="left", color=FAINT_COLOR)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.08)
    axes.set_axis_off()


# ---- conv + bias + ReLU --------------------------------------------------------------------------

EAGER, COMPILE, FUSED = "torch eager", "torch.compile", "oneDNN conv + ReLU alone"
CONVOLUTION_COLORS = {OURS: OURS_COLOR, EAGER: "#d9dee6", COMPILE: PEER_COLOR, FUSED: "#3a6ea5"}


def convolution_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The median milliseconds of everybody, for each layer, memory format and number of threads."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for timing in results["timings"]:
        key = (timing["layer"], timing["output"], timing["threads"])
        row = found.setdefault(key, {"ms": {}})
        row["layer"], row["output"], row["threads"] = key
        row["ms"][timing["name"]] = timing["us_per_call"][1] / 1e3
        if timing["name"] == OURS:
            row["share"] = timing["share_of_fma_peak"]
    return [row for row in found.values() if OURS in row["ms"]]


def convolution_work(results: dict[str, Any]) -> str:
    return f"batches of 16, one thread; {machine(results)}"


def convolution_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"| | **{OURS}** | {EAGER} | {COMPILE} | {FUSED} | share of the FMA peak |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        threads = "" if row["threads"] == 1 else f", {row['threads']} threads"
        times = " | ".join(
            f"{row['ms'][name]:.1f}" if name in row["ms"] else ""
            for name in (OURS, EAGER, COMPILE, FUSED)
        )
        share = f"{100 * row['share']:.0f} %"
        lines.append(f"| {row['layer']}{threads} | {times} | {share} |")
    return lines


def convolution_tables(results: dict[str, Any]) -> list[str]:
    rows = [row for row in convolution_rows(results) if row["output"] == "channels_last"]
    return [
        "Stems from uint8 images of 224x224x3, layers of many channels from floats, channels-last "
        f"outputs; milliseconds, {convolution_work(results)}:",
        "",
        *convolution_table(rows),
        "",
        f"Eager and compiled normalize, convolve, apply ReLU and count; {FUSED} starts from floats "
        "and neither normalizes nor counts. The share of the FMA peak, what a processor can "
        "multiply and add in float32, counts the multiplications of the direct sum. Above 100 % "
        "fewer were done than it has, or they were done in bytes, not in float32.",
    ]


def convolution_details(results: dict[str, Any]) -> list[str]:
    rows = convolution_rows(results)
    return [
        *claim_lines(results),
        "",
        "Contiguous outputs:",
        "",
        *convolution_table([row for row in rows if row["output"] != "channels_last"]),
        "",
        "The share of the FMA peak counts the multiplications of the direct sum. The peak, "
        f"{results['fma_peak_gflops']:.0f} GFLOP/s on a core, is that of a loop on registers "
        "alone, measured in the same run. " + convolution_limits(results, rows),
        "",
        f"Medians of up to {results['most_samples']} interleaved rounds, fresh outputs, each "
        "result checked before it was timed; claims are for the memory format where they are met "
        f"worse. {origin(results)}",
    ]


def convolution_limits(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """What the speedup over eager torch could be at most, where it is a matter of the peak."""
    work = {layer["name"]: layer["multiply_adds"] for layer in results["layers"]}
    stems = [layer["name"] for layer in results["layers"] if layer["is_stem"]]
    parts = []
    for name in stems:
        least_ms = work[name] * 2e-6 / results["fma_peak_gflops"]
        eager = [
            row["ms"][EAGER]
            for row in rows
            if row["layer"] == name and row["threads"] == 1 and EAGER in row["ms"]
        ]
        if eager:
            parts.append(f"{name.removesuffix(' stem')} {min(eager) / least_ms:.1f}")
    return f"A direct sum at that peak would be faster than eager torch by: {', '.join(parts)}."


def draw_convolution(results: dict[str, Any], path: Path, source: str) -> None:
    """Times over ours, a group of bars for each layer with a channels-last output."""
    plt = pyplot()
    rows = [
        row
        for row in convolution_rows(results)
        if row["threads"] == 1 and row["output"] == "channels_last"
    ]
    bars = sum(len(row["ms"]) for row in rows)
    figure, axes = plt.subplots(figsize=(9.0, 1.2 + 0.2 * bars + 0.16 * len(rows)), dpi=160)
    top = figure.get_figheight()
    figure.subplots_adjust(left=0.3, right=0.9, top=1 - 1.0 / top, bottom=0.15 / top)
    place, most = 0.0, max(max(row["ms"].values()) / row["ms"][OURS] for row in rows)
    for row in rows:
        begin = place
        for name, color in CONVOLUTION_COLORS.items():
            if name not in row["ms"]:
                continue
            ratio = row["ms"][name] / row["ms"][OURS]
            axes.barh(place, ratio, height=0.9, color=color)
            text = f"{ratio:.2f}" if name != OURS else f"{row['ms'][name]:.1f} ms"
            beyond_line = max(ratio, 1) + 0.01 * most
            axes.text(beyond_line, place, text, va="center", fontsize=8)
            place += 1
        axes.text(
            -0.02 * most,
            (begin + place - 1) / 2,
            row["layer"],
            ha="right",
            va="center",
            fontsize=10,
        )
        place += 0.8
    axes.axvline(1, color=TEXT_COLOR, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_ylim(place - 0.8, -0.8)
    axes.set_xlim(0, most * 1.05)
    axes.set_axis_off()
    title = "Convolution, bias and ReLU: time over pixfuse's"
    figure.text(0.02, 1 - 0.34 / top, title, fontsize=14, fontweight="bold")
    figure.text(0.02, 1 - 0.58 / top, convolution_work(results), fontsize=9.5, color=FAINT_COLOR)
    for index, (name, color) in enumerate(CONVOLUTION_COLORS.items()):
        figure.text(0.3 + 0.16 * index, 1 - 0.82 / top, "■", fontsize=11, color=color)
        figure.text(0.32 + 0.16 * index, 1 - 0.82 / top, name, fontsize=9)
    save(figure, path, source)


# ---- counts, standardizing, and the way back to pixels -------------------------------------------


def pixels_bars(result: dict[str, Any]) -> list[Bar]:
    """Everybody who does the same work, the quickest first; without the copy."""
    found = [
        Bar(
            OURS_FRESH if name == OURS else name,
            quartiles[1] / result["images"],
            result["max_error"][name],
            name.startswith(OURS),
        )
        for name, quartiles in result["us_per_call"].items()
        if name != COPY and "bfloat16" not in name
    ]
    return sorted(found, key=lambda bar: bar.us_per_image)


def pixels_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """A row for everybody, the quickest at planes first; and the copy."""
    lines = [
        "| | NCHW, µs per image | time / pixfuse | NHWC, µs per image | time / pixfuse | "
        "difference from the reference |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for operator in dict.fromkeys(result["operator"] for result in results):
        of_layout = {r["layout"]: r for r in results if r["operator"] == operator}
        lines.append(f"| *{operator}* | | | | | |")
        for bar in [*pixels_bars(of_layout["NCHW"]), Bar(COPY, 0.0, 0.0)]:
            key = OURS if bar.name == OURS_FRESH else bar.name
            name = shown_name(bar.name)
            cells = [name.replace(OURS, f"**{OURS}**", 1) if bar.is_ours else name]
            for layout in ("NCHW", "NHWC"):
                us, images = of_layout[layout]["us_per_call"], of_layout[layout]["images"]
                middle = us.get(key, [float("nan")] * 3)[1]
                cells += [f"{middle / images:.1f}", f"{middle / us[OURS][1]:.2f}"]
            cells.append("" if bar.name == COPY else difference(bar))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def pixels_tables(results: dict[str, Any]) -> list[str]:
    first = results["results"][0]
    return [
        f"{first['images']} crops of photographs, {first['input']}, one thread "
        f"({machine(results)}); the copy moves as many bytes:",
        "",
        *pixels_table(results["results"]),
    ]


def stats_table(stats: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"`pixfuse stats` on {stats['images']} {stats['input']}:",
        "",
        "| workers | µs per image | of it decoding | start of the workers |",
        "|--:|--:|--:|--:|",
    ]
    for row in stats["rows"]:
        image_us, share = microseconds(row["us_per_image"][1]), 100 * row["decoding_share"]
        startup = f"{row['startup_seconds']:.2g} s" if row["workers"] else ""
        lines.append(f"| {row['workers'] or 'none'} | {image_us} | {share:.1f} % | {startup} |")
    return lines


def pixels_details(results: dict[str, Any]) -> list[str]:
    first = results["results"][0]
    lines = claim_lines(results)
    for key in ("stats", "stats_of_crops"):
        if key in results:  # results of before photographs' own files were counted have one
            lines += stats_table(results[key])
    return [
        *lines,
        "",
        f"Medians of {first['samples']} interleaved rounds, each result checked before it was "
        f"timed; claims take the worse of the two layouts. {origin(results)} What each peer runs "
        "stands in `benchmarks/bench_pixels.py`.",
    ]


def draw_pixels(results: dict[str, Any], path: Path, source: str) -> None:
    panels = [
        Panel(
            f"{result['operator']}, {result['images']} images of {result['input']}, NHWC",
            pixels_bars(result),
            result["us_per_call"][COPY][1] / result["images"],
        )
        for result in results["results"]
        if result["layout"] == "NHWC"
    ]
    draw_bars(panels, f"one thread, crops of photographs; {machine(results)}", path, source)


# ---- drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Bars that share an axis, and the time of a copy."""

    title: str
    bars: list[Bar]
    copy_us: float


def pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": TEXT_COLOR})
    return plt


def save(figure: Any, path: Path, source: str) -> None:
    """``source`` names the results in the picture's data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None, "Source": source})
    pyplot().close(figure)


def draw_bars(panels: Sequence[Panel], subtitle: str, path: Path, source: str) -> None:
    """Horizontal bars of the time per image, one panel above the other."""
    plt = pyplot()
    counts = [len(panel.bars) for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9.0, 1.35 + sum(0.34 * count for count in counts) + 0.55 * (len(panels) - 1)),
        dpi=160,
        squeeze=False,
        gridspec_kw={"height_ratios": counts},
    )
    top = figure.get_figheight()
    margin = 1.05 if panels[0].title else 0.8
    # Between the panels, room for the title of the lower one.
    gap, bottom = 0.55, 0.25
    height = top - margin - bottom - gap * (len(panels) - 1)
    figure.subplots_adjust(
        left=0.24,
        right=0.955,
        top=1 - margin / top,
        bottom=bottom / top,
        hspace=gap / (height / len(panels)),
    )
    for place, panel in zip(axes[:, 0], panels, strict=True):
        _draw_panel(place, panel)
    figure.text(0.02, 1 - 0.34 / top, "Time per image, in µs", fontsize=14, fontweight="bold")
    figure.text(0.02, 1 - 0.62 / top, subtitle, fontsize=9.5, color=FAINT_COLOR)
    save(figure, path, source)


def _draw_panel(axes: Any, panel: Panel) -> None:
    longest = max(bar.us_per_image for bar in panel.bars)
    for row, bar in enumerate(panel.bars):
        weight = "bold" if bar.is_ours else "normal"
        axes.barh(
            row,
            bar.us_per_image,
            height=0.66,
            color=OURS_COLOR if bar.is_ours else PEER_COLOR,
            zorder=2,
        )
        axes.text(
            -0.012 * longest,
            row,
            shown_name(bar.name),
            ha="right",
            va="center",
            fontsize=10,
            fontweight=weight,
        )
        near_line = bar.us_per_image < 1.5 * panel.copy_us
        beyond_line = max(bar.us_per_image, panel.copy_us if near_line else 0)
        axes.text(
            beyond_line + 0.008 * longest,
            row,
            microseconds(bar.us_per_image),
            va="center",
            fontsize=10,
            fontweight=weight,
            color=OURS_COLOR if bar.is_ours else TEXT_COLOR,
        )
    axes.axvline(panel.copy_us, color=TEXT_COLOR, linewidth=1, linestyle=(0, (3, 2)), zorder=3)
    axes.text(
        panel.copy_us + 0.008 * longest,
        len(panel.bars) - 0.42,
        f"a copy of as many bytes: {panel.copy_us:.1f}",
        fontsize=8.5,
        color=FAINT_COLOR,
        va="top",
    )
    if panel.title:
        axes.set_title(panel.title, fontsize=9.5, loc="left", color=FAINT_COLOR)
    axes.set_ylim(len(panel.bars) - 0.05, -0.6)
    axes.set_xlim(0, longest * 1.07)
    axes.set_axis_off()


def drawn_from(path: Path) -> str | None:
    """The name of the results that a chart was drawn from."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        picture.load()
        source = picture.info.get("Source")
    return source if isinstance(source, str) else None


# ---- all together --------------------------------------------------------------------------------

REPORTS = (
    Report(
        "normalize_cpu.json",
        "A batch that is a tensor already",
        normalize_tables,
        "Time per image of pixfuse and its peers",
        normalize_details,
        draw_normalize,
    ),
    Report(
        "collate_cpu.json",
        "A list of images",
        collate_tables,
        "Time per image of pixfuse and its peers, from lists of images",
        collate_details,
        draw_collate,
    ),
    Report(
        "loader_cpu.json",
        "A DataLoader",
        loader_tables,
        "Where the time of a DataLoader goes",
        loader_details,
        draw_loader,
    ),
    Report(
        "conv_bias_relu_cpu.json",
        "Convolution, bias and ReLU",
        convolution_tables,
        "Times of pixfuse and its peers, over those of pixfuse",
        convolution_details,
        draw_convolution,
    ),
    Report(
        "pixels_cpu.json",
        "Counts, standardizing, and the way back to pixels",
        pixels_tables,
        "Time per image of counting, standardizing and going back to pixels",
        pixels_details,
        draw_pixels,
    ),
)


def readme_section(
    report: Report, results: dict[str, Any], others: Sequence[dict[str, Any]], chart: str
) -> str:
    return "\n".join(
        [
            f"### {report.title}",
            "",
            *report.tables(results),
            "",
            f"![{report.chart}]({chart})",
            "",
            verdict(results, others, report.title),
        ]
    )


def details_section(
    report: Report, results: dict[str, Any], others: Sequence[dict[str, Any]]
) -> str:
    lines = [f"## {report.title}", "", f"On {machine(results)}:", "", *report.details(results)]
    for other in others:
        lines += ["", f"On {machine(other)}:", "", *claim_lines(other), "", origin(other)]
    return "\n".join(lines)


def with_block(path: Path, block: str) -> str:
    """A text with a new block between the marks."""
    text = path.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path.name}: expected one {START} and one {END}")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{block}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--details", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args(argv)

    readme, details, problems = [], [], []
    for report in REPORTS:
        path = options.results / report.file
        if not path.exists():  # not measured yet
            print(f"left out: there is no {report.file}")
            continue
        text = path.read_text()
        results = json.loads(text)
        others = [
            json.loads(other.read_text())
            for other in sorted(options.results.glob(f"*/{path.name}"))
        ]
        source = hashlib.sha256(text.encode()).hexdigest()
        chart = path.with_suffix(".png").resolve()
        shown = chart.relative_to(ROOT).as_posix() if chart.is_relative_to(ROOT) else chart.name
        readme.append(readme_section(report, results, others, shown))
        details.append(details_section(report, results, others))
        if not options.check:
            report.draw(results, chart, source)
            print(f"drew {shown}")
        elif drawn_from(chart) != source:
            problems.append(f"{chart.name} was not drawn from this {report.file}")

    for path, sections in ((options.readme, readme), (options.details, details)):
        wanted = with_block(path, "\n\n".join(sections))
        if not options.check:
            path.write_text(wanted)
            print(f"rewrote {path.name}")
        elif path.read_text() != wanted:
            problems.append(f"{path.name} differs from the results")
    for problem in problems:
        print(f"{problem}; run python -m benchmarks.plot", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
