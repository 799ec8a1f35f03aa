"""``make demo``: photographs to tensors, checked against torchvision, timed, drawn.

    python -m benchmarks.demo [--output demo.png]

64 crops of scikit-learn's two photographs, as NHWC bytes, become [0, 1], [-1, 1] and standardized
tensors in float32 and bfloat16. Then a DataLoader reads a folder of JPEG files cut from them, and a
small network is trained on each kind of tensor, to see which of its units die.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import pixfuse
from benchmarks import bench_loader, harness, peers, report, units
from benchmarks.harness import Checked, Plan, Timing, UnequalError
from benchmarks.peers import Batch, Case, Peer
from benchmarks.photos import Crop, photographs, random_crops, write_jpegs
from benchmarks.report import console

CROPS, SIDE = 64, 224
FILES, LOADER_EPOCHS, LOADER_WORKERS = 256, 3, (0, 2)
OUTPUTS = {
    "[0, 1]": pixfuse.UNIT,
    "[-1, 1]": pixfuse.SIGNED,
    "standardized": pixfuse.IMAGENET,
}
DTYPES = (torch.float32, torch.bfloat16)
PLAN = Plan(rounds=9, sample_seconds=8e-3, budget_seconds=1.0)
CHANNEL_COLORS = ("#d64545", "#3f9142", "#3a6ea5")
BAR_COLORS = {torch.float32: "#e4572e", torch.bfloat16: "#f3a98f"}
PEER_BAR_COLORS = {torch.float32: "#9aa5b1", torch.bfloat16: "#cbd2d9"}
TEXT_COLOR, FAINT_COLOR = "#1f2933", "#6b7683"


@dataclass(frozen=True)
class Result:
    """One output in one type: what everybody took, and a word for who took nothing."""

    output: str
    dtype: torch.dtype
    timings: dict[str, Timing]
    words: dict[str, str]
    unequal: list[str]


def torchvision_result(case: Case, batch: Batch) -> torch.Tensor:
    """What torchvision makes of it in float32, rounded once to the case's type."""
    truth = peers.TorchvisionV2().contestant(replace(case, dtype=torch.float32), batch, None)
    result: torch.Tensor = truth.call()
    return result.to(case.dtype)


def run_output(
    output: str, dtype: torch.dtype, batch: Batch, everybody: Sequence[Peer]
) -> tuple[Result, torch.Tensor]:
    """Check everybody against torchvision, then time those who passed."""
    case = Case(
        CROPS,
        SIDE,
        SIDE,
        dtype=dtype,
        recycled=False,
        normalization=OUTPUTS[output],
    )
    expected = torchvision_result(case, batch)
    checked: list[Checked] = []
    words: dict[str, str] = {}
    unequal: list[str] = []
    for peer in everybody:
        refusal = "cannot run" if peer.unavailable() else peer.refusal(case)
        if refusal is not None:
            words[peer.name] = refusal
            continue
        try:
            checked.append(Checked(peer.contestant(case, batch, None), expected))
        except UnequalError as error:
            words[peer.name] = "NOT EQUAL"
            unequal.append(f"{output} {peers.DTYPE_NAMES[dtype]}: {error}")
    timings = {timing.name: timing for timing in harness.measure(checked, PLAN)}
    return Result(output, dtype, timings, words, unequal), expected


# ---- the table -----------------------------------------------------------------------------------


def print_table(results: Sequence[Result], everybody: Sequence[Peer]) -> None:
    table = Table(title=f"µs per image, and how many times as long as pixfuse ({CROPS} crops)")
    table.add_column("tensor", no_wrap=True)
    table.add_column("equal to torchvision")
    for peer in everybody:
        table.add_column(peer.name, justify="right")
    for result in results:
        ours = result.timings.get(peers.Pixfuse.name)
        cells = []
        for peer in everybody:
            timing = result.timings.get(peer.name)
            if timing is None:
                cells.append(f"[dim]{result.words[peer.name]}[/]")
                continue
            us = f"{timing.median_us / CROPS:.1f}"
            if ours is None or timing is ours:
                cells.append(f"[bold]{us}[/]")
            else:
                cells.append(f"{us}  [dim]{timing.median_us / ours.median_us:4.1f}x[/]")
        equal = "[green]every bit[/]" if ours is not None else "[red]NO[/]"
        table.add_row(f"{result.output} {peers.DTYPE_NAMES[result.dtype]}", equal, *cells)
    console.print(table)


def where_it_ran() -> str:
    """The device and the instruction set, plainly."""
    info = pixfuse.info()
    return (
        f"Ran on the CPU ({harness.machine()['cpu']}, {info['isa']} loops, "
        f"one thread, as in a DataLoader's worker), torch {torch.__version__}."
    )


def peer_notes(results: Sequence[Result]) -> list[str]:
    """Whose results differ, and by how much."""
    worst: dict[tuple[str, str], float] = {}
    for result in results:
        for name, timing in result.timings.items():
            key = (name, peers.DTYPE_NAMES[result.dtype])
            worst[key] = max(worst.get(key, 0.0), timing.checked.max_error)
    return [
        f"{name}'s {dtype} differs from float32 rounded once by up to {error:.1e}"
        if dtype != "float32"
        else f"{name}'s {dtype} differs from torchvision's by up to {error:.1e}"
        for (name, dtype), error in worst.items()
        if error > 0
    ]


# ---- the DataLoader ------------------------------------------------------------------------------


def run_loader() -> list[str]:
    """A folder of JPEG files through a DataLoader, every batch checked; returns what differed."""
    run = report.Run()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), FILES, bench_loader.JPEG_SIDE)
        rows = bench_loader.run_source(run, "folder", paths, LOADER_EPOCHS, LOADER_WORKERS)
    bench_loader.print_rows(rows)
    return run.problems


# ---- the picture ---------------------------------------------------------------------------------


def draw(
    path: Path,
    photos: Sequence[np.ndarray[Any, Any]],
    crops: Sequence[Crop],
    tensors: dict[str, torch.Tensor],
    results: Sequence[Result],
    trained: Sequence[units.Run],
) -> None:
    """The photographs and the times; below, the values of the three outputs and what they train."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": TEXT_COLOR, "font.size": 9})
    figure, axes = plt.subplots(3, 3, figsize=(13.0, 10.8), dpi=130)
    figure.subplots_adjust(
        left=0.025, right=0.985, top=0.88, bottom=0.051, hspace=0.28, wspace=0.07
    )
    figure.text(0.025, 0.958, "pixfuse: bytes to tensors", fontsize=17, fontweight="bold")
    figure.text(0.025, 0.931, where_it_ran(), fontsize=10, color=FAINT_COLOR)
    for index, photo in enumerate(photos):
        _draw_photo(axes[0, index], photo, [crop for crop in crops if crop.photo == index])
    _draw_times(axes[0, 2], results)
    for place, (output, tensor) in zip(axes[1], tensors.items(), strict=True):
        _draw_values(place, output, tensor)
    # The last ones: those with the high learning rate.
    for place, one in zip(axes[2], trained[-len(tensors) :], strict=True):
        units.draw(place, one)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _draw_photo(axes: Any, photo: np.ndarray[Any, Any], crops: Sequence[Crop]) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(photo, interpolation="lanczos")
    shown = crops[:4]
    for crop in shown:
        corner = (crop.left, crop.top)
        axes.add_patch(Rectangle(corner, SIDE, SIDE, fill=False, edgecolor="white", linewidth=1.1))
    axes.set_title(
        f"{len(crops)} crops of {SIDE}x{SIDE}, uint8 ({len(shown)} are drawn)",
        fontsize=10,
        loc="left",
    )
    axes.set_anchor("W")
    axes.set_axis_off()


def _draw_values(axes: Any, output: str, tensor: torch.Tensor) -> None:
    highest = 0
    for channel, (color, name) in enumerate(zip(CHANNEL_COLORS, "RGB", strict=True)):
        values = tensor[:, channel].numpy().ravel()
        # About four grey levels in a bin.
        counts, edges = np.histogram(values, bins=64)
        middles = (edges[:-1] + edges[1:]) / 2
        axes.fill_between(middles, counts, color=color, alpha=0.10, linewidth=0)
        axes.plot(middles, counts, color=color, linewidth=1.3, label=name)
        highest = max(highest, counts[1:-1].max())
    low, high = tensor.min().item(), tensor.max().item()
    axes.set_title(
        f"values of the {output} tensor: {low:.2f} to {high:.2f}", fontsize=10, loc="left"
    )
    axes.set_yticks([])
    # Black and white, the two ends, may stick out: the rest is what one wants to see.
    axes.set_ylim(0, 1.12 * highest)
    axes.margins(x=0.02)
    axes.tick_params(labelsize=8.5, color=FAINT_COLOR, labelcolor=FAINT_COLOR)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT_COLOR)
    axes.legend(frameon=False, fontsize=9, handlelength=1.0, loc="upper center", ncols=3)


def _draw_times(axes: Any, results: Sequence[Result]) -> None:
    """A bar for each library and type. The three outputs cost the same, so their mean is shown."""
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    means = {
        (name, dtype): float(np.mean(medians))
        for name in names
        for dtype in DTYPES
        if (
            medians := [
                result.timings[name].median_us / CROPS
                for result in results
                if result.dtype == dtype and name in result.timings
            ]
        )
    }
    longest = max(means.values())
    for row, name in enumerate(names):
        ours = name == peers.Pixfuse.name
        weight = "bold" if ours else "normal"
        axes.text(
            -0.02 * longest, row, name, ha="right", va="center", fontsize=10, fontweight=weight
        )
        for offset, dtype in zip((-0.2, 0.2), DTYPES, strict=True):
            mean = means.get((name, dtype), 0.0)
            color = (BAR_COLORS if ours else PEER_BAR_COLORS)[dtype]
            axes.barh(row + offset, mean, height=0.36, color=color)
            dtype_name = peers.DTYPE_NAMES[dtype]
            axes.text(
                mean + 0.015 * longest,
                row + offset,
                f"{mean:.0f}  {dtype_name}" if mean else f"no {dtype_name}",
                va="center",
                fontsize=8.5,
                fontweight=weight,
                color=TEXT_COLOR if mean else FAINT_COLOR,
            )
    axes.set_title("µs per image", fontsize=10, loc="left")
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(-0.42 * longest, 1.32 * longest)
    axes.set_axis_off()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture")
    options = parser.parse_args(argv)

    started = time.perf_counter()
    torch.set_num_threads(1)
    photos = photographs()
    crops, pixels = random_crops(photos, CROPS, SIDE)
    batch = Batch(torch.from_numpy(pixels))
    everybody: list[Peer] = [
        peers.Pixfuse(),
        peers.TorchvisionV2(),
        peers.TorchCompile(),
        peers.OpenCV(),
    ]
    results: list[Result] = []
    tensors: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        for output in OUTPUTS:
            result, tensor = run_output(output, dtype, batch, everybody)
            results.append(result)
            if dtype == torch.float32:
                tensors[output] = tensor
    console.print(where_it_ran())
    print_table(results, everybody)
    console.print(
        f"Everybody allocates the result, and the last one is dropped, as in a training loop. "
        f"{'; '.join(peer_notes(results))}.",
        highlight=False,
    )
    for reason in filter(None, (peer.unavailable() for peer in everybody)):
        console.print(f"Cannot run here: {reason}", markup=False, highlight=False)
    unequal = [message for result in results for message in result.unequal]
    unequal += run_loader()
    trained = units.run(photos, OUTPUTS)
    units.print_table(console, trained, units.cost_of_monitor(photos))
    draw(options.output, photos, crops, tensors, results, trained)
    console.print(f"wrote {options.output} ({time.perf_counter() - started:.0f} s)")
    for message in unequal:
        console.print(message, style="red", markup=False)
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
