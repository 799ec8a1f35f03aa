"""Which units of a small network die in training, by what the network gets: a part of the demo.

The network sees crops of photographs as [0, 1], [-1, 1] and standardized values, with the same
weights to begin with and the same batches, and says which photograph and which quarter of it a crop
is from. It is trained with a learning rate that suits and with one that is nearly too high: with a
little more, some networks diverge, which ones depends on the processor's rounding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pixfuse
import pixfuse.nn
from benchmarks.photos import random_crops

CROPS, SIDE, BATCH, STEPS = 256, 32, 32, 60
WIDTH = 32  # units of each layer
SEEDS = (0, 1, 2, 3)
LEARNING_RATES = (0.02, 0.15)
TIMED_STEPS = 30
LAYERS = {"stem": "stem", "relu2": "2nd layer", "relu3": "3rd layer"}


@dataclass(frozen=True)
class Crops:
    """The images, NHWC bytes, and which photograph and quarter each is from."""

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: int


@dataclass(frozen=True)
class Run:
    """What became of one network for each seed."""

    output: str
    learning_rate: float
    reports: list[pixfuse.monitor.MonitorReport]  # of all crops, after training
    loss: float
    guessing: float  # the loss of a network that knows nothing
    monitor: pixfuse.DeadUnitMonitor  # of the training with the first seed

    @property
    def diverged(self) -> bool:
        return not self.loss < 10 * self.guessing

    def dead(self, layer: str) -> int:
        return sum(report[layer].dead_count for report in self.reports)


def take_crops(photos: Sequence[np.ndarray[Any, Any]]) -> Crops:
    crops, pixels = random_crops(photos, CROPS, SIDE)
    labels = []
    for crop in crops:
        height, width, _ = photos[crop.photo].shape
        lower, right = 2 * crop.top >= height - SIDE, 2 * crop.left >= width - SIDE
        labels.append(4 * crop.photo + 2 * int(lower) + int(right))
    return Crops(torch.from_numpy(pixels), torch.tensor(labels), 4 * len(photos))


def network(normalization: pixfuse.Normalization, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    stem = pixfuse.nn.PixelStem(
        3, WIDTH, 5, stride=2, normalization=normalization, input_layout="NHWC"
    )
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stem=stem,
            conv2=nn.Conv2d(WIDTH, WIDTH, 3, stride=2),
            relu2=nn.ReLU(inplace=True),
            conv3=nn.Conv2d(WIDTH, WIDTH, 3, stride=2),
            relu3=nn.ReLU(inplace=True),
            flatten=nn.Flatten(),
            head=nn.Linear(4 * WIDTH, classes),
        )
    )


def train(model: nn.Module, crops: Crops, learning_rate: float, steps: int) -> Iterator[float]:
    """Plain gradient descent, a step at a time: the loss before each."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(crops.labels), (BATCH,), generator=source)
        loss = nn.functional.cross_entropy(model(crops.pixels[chosen]), crops.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def run_one(
    output: str,
    normalization: pixfuse.Normalization,
    crops: Crops,
    learning_rate: float,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
) -> Run:
    """Train a network for each seed, then count which of its units fire for any crop."""
    reports, losses, monitors = [], [], []
    for seed in seeds:
        model = network(normalization, crops.classes, seed)
        with pixfuse.DeadUnitMonitor(model) as monitor:
            losses += list(train(model, crops, learning_rate, steps))[-5:]
        monitors.append(monitor)
        with torch.no_grad(), pixfuse.DeadUnitMonitor(model) as after:
            model(crops.pixels)
        reports.append(after.report())
    guessing = math.log(crops.classes)
    return Run(output, learning_rate, reports, statistics.fmean(losses), guessing, monitors[0])


def run(
    photos: Sequence[np.ndarray[Any, Any]], outputs: Mapping[str, pixfuse.Normalization]
) -> list[Run]:
    crops = take_crops(photos)
    return [
        run_one(output, normalization, crops, learning_rate)
        for learning_rate in LEARNING_RATES
        for output, normalization in outputs.items()
    ]


def cost_of_monitor(photos: Sequence[np.ndarray[Any, Any]], steps: int = TIMED_STEPS) -> float:
    """How much longer a training step takes with a monitor, in turns: 0.05 for 5 % more."""
    crops = take_crops(photos)
    models = [network(pixfuse.SIGNED, crops.classes, 0) for _ in range(2)]
    seconds: list[list[float]] = [[], []]
    with pixfuse.DeadUnitMonitor(models[1]):
        trainings = [train(model, crops, LEARNING_RATES[0], steps) for model in models]
        for _ in range(steps):
            for training, times in zip(trainings, seconds, strict=True):
                started = time.process_time()
                next(training)
                times.append(time.process_time() - started)
    return min(seconds[1]) / min(seconds[0]) - 1


def print_table(console: Console, runs: Sequence[Run], cost: float) -> None:
    units = WIDTH * len(SEEDS)
    table = Table(
        title=f"dead of {units} units in each layer ({len(SEEDS)} networks, {STEPS} steps)"
    )
    table.add_column("the network gets", no_wrap=True)
    for name in ("learning rate", *LAYERS.values(), "loss"):
        table.add_column(name, justify="right")
    for one in runs:
        loss = "diverged" if one.diverged else f"{one.loss:.2f}"
        dead = [str(one.dead(layer)) for layer in LAYERS]
        table.add_row(one.output, f"{one.learning_rate:g}", *dead, loss)
        if one is not runs[-1] and one.output == runs[-1].output:
            table.add_section()
    console.print(table)
    console.print(
        f"A dead unit is 0 for each of {CROPS} crops, so nothing trains it any more. Values in "
        "[0, 1] have one sign: a step that lowers the weights of a unit of the stem lowers its "
        "sums for all images at once. Around 0 it lowers some and raises others. Deeper layers get "
        "outputs of a ReLU, which have one sign whatever the stem gets. To watch the units makes a "
        f"training step of this network take {max(cost, 0):.1%} longer.",
        highlight=False,
    )


def draw(axes: Any, one: Run) -> None:
    """Which units fire, step by step, while the first of the networks is trained."""
    one.monitor.heat_map(axes)
    axes.set_yticks(axes.get_yticks(), list(LAYERS.values()), rotation=90, va="center")
    axes.set_title(f"{one.output}: how often units fire", fontsize=10, loc="left")
    axes.set_xlabel(
        f"training step, learning rate {one.learning_rate:g} (yellow: always fires, red: never)",
        fontsize=8.5,
    )
    axes.tick_params(labelsize=8.5)
