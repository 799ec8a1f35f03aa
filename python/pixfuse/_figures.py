"""The pictures of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from pixfuse._image_files import printable
from pixfuse._output_files import writing
from pixfuse.functional import normalize
from pixfuse.normalization import Normalization
from pixfuse.pixels import standardize_per_image
from pixfuse.statistics import ChannelStatistics

_COLORS = {
    1: ["#1f2933"],
    3: ["#d64545", "#3f9142", "#2f6fb3"],
    4: ["#d64545", "#3f9142", "#2f6fb3", "#6b7683"],
}
_NAMES = {1: ["gray"], 3: ["red", "green", "blue"], 4: ["red", "green", "blue", "alpha"]}
_OURS, _PEER = "#e4572e", "#b8c0cc"
#: The longer side of a picture, in pixels: enough to see, quick to draw.
_SHOWN = 480


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with writing(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi, format="png")


def _set_title(axes: Any, title: str, **how: Any) -> None:
    """A title with names in it: a $ is a $, and bytes that are no UTF-8 are written out."""
    axes.set_title(printable(title), parse_math=False, **how)


def draw_histogram(statistics: ChannelStatistics, path: Path) -> None:
    """The share of pixels of each byte value, with the means."""
    counts = statistics.counts.numpy()
    channels = len(counts)
    colors = _COLORS.get(channels, [f"C{c}" for c in range(channels)])
    names = _NAMES.get(channels, [f"channel {c}" for c in range(channels)])
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for c, row in enumerate(counts):
        mean, std = statistics.mean[c], statistics.std[c]
        label = f"{names[c]}: mean {mean:.4f}, std {std:.4f}"
        axes.step(np.arange(256), row / statistics.pixels, colors[c], where="mid", label=label)
        axes.axvline(255 * mean, color=colors[c], linestyle=":", linewidth=1)
    axes.set(xlim=(-2, 257), xlabel="byte value", ylabel="share of the pixels")
    axes.set_ylim(bottom=0)
    split = f"{statistics.split}: " if statistics.split else ""
    title = f"{split}{statistics.images:,} images, {statistics.pixels:,} pixels"
    _set_title(axes, title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, 120)


def draw_show(
    image: Image.Image, normalizations: list[tuple[str, Normalization]], path: Path
) -> list[dict[str, Any]]:
    """An image under each mode, on one scale of brightness, and the histograms of its values.

    Returns:
        For each mode the mean, std, min and max of each channel.
    """
    pixels = torch.from_numpy(np.array(image))
    modes = [
        (name, normalize(pixels, normalization, input_layout="NHWC"))
        for name, normalization in normalizations
    ]
    for name, per_channel in (("per image", False), ("per image and channel", True)):
        modes.append((name, standardize_per_image(pixels, per_channel, input_layout="NHWC")))
    low = min(values.min().item() for _, values in modes)
    high = max(values.max().item() for _, values in modes)
    span = max(high - low, 1e-6)
    step = max(-(-max(image.size) // _SHOWN), 1)

    figure = Figure(figsize=(11, 2.6 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), 2, squeeze=False, sharex="col", width_ratios=[2, 3])
    for (name, values), (left, right) in zip(modes, axes, strict=True):
        shown = (values[:, ::step, ::step] - low) / span
        left.imshow(shown.permute(1, 2, 0).numpy())
        _set_title(left, name, loc="left")
        left.axis("off")
        for c, channel in enumerate(values):
            mean, std = (
                round(number.item(), 2) + 0.0  # no -0.00
                for number in (channel.mean(), channel.std(correction=0))
            )
            label = f"{_NAMES[3][c]}: mean {mean:.2f}, std {std:.2f}"
            density, edges = _density(pixels[..., c], channel, span / 256)
            right.stairs(density, edges, color=_COLORS[3][c], label=label)
        right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        right.set_xlim(low - 0.02 * span, high + 0.02 * span)
        right.set_yticks([])
        right.spines[["top", "left", "right"]].set_visible(False)
        right.axvline(0, color="#6b7683", linewidth=0.8)
    axes[-1][1].set_xlabel("value that the network gets")
    figure.suptitle("One scale of brightness, one axis of values")
    _save(figure, path, 110)
    return [
        {
            "mode": name,
            "mean": values.mean((1, 2), dtype=torch.float64).tolist(),
            "std": values.double().std((1, 2), correction=0).tolist(),
            "min": values.amin((1, 2)).tolist(),
            "max": values.amax((1, 2)).tolist(),
        }
        for name, values in modes
    ]


def _density(
    bytes_: torch.Tensor, values: torch.Tensor, flat_step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Density and edges of a channel's values, in bins of four bytes each.

    Bins that are even for the values would hold now one byte more, now one less: a comb. A channel
    of a single value does not say how far apart two bytes are: ``flat_step`` does.
    """
    low, high = int(bytes_.min()), int(bytes_.max())
    first, last = values.min().item(), values.max().item()
    step = (last - first) / (high - low) if high > low else flat_step
    counts, edges = np.histogram(bytes_.numpy(), np.arange(-0.5, 256, 4))
    return counts / (4 * step * bytes_.numel()), first + (edges - low) * step


def draw_bench(results: dict[str, Any], path: Path) -> None:
    """Bars of the time per image, one panel for each job."""
    jobs: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        jobs.setdefault(row["job"], []).append(row)
    sizes = [len(rows) for rows in jobs.values()]
    figure = Figure(figsize=(8, 0.9 + 0.55 * sum(sizes)), layout="constrained")
    panels = figure.subplots(len(jobs), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for (job, rows), axes in zip(jobs.items(), panels, strict=True):
        ordered = sorted(rows, key=lambda row: -row["us_per_image"])
        colors = [_OURS if row["by"] == "pixfuse" else _PEER for row in ordered]
        names = [row["by"] for row in ordered]
        bars = axes.barh(names, [row["us_per_image"] for row in ordered], color=colors)
        axes.bar_label(bars, [f"{row['us_per_image']:.1f}" for row in ordered], padding=3)
        axes.set_title(job, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    panels[-1].set_xlabel("µs per image, shorter is better")
    size, batch, threads = (results[name] for name in ("size", "batch", "threads"))
    figure.suptitle(f"{batch} images of {size}x{size}x3, threads: {threads}, {results['isa']}")
    _save(figure, path, 120)
