"""What a monitor has counted, for reading: numbers on the CPU, and a table of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pixfuse._firing import ACTIVE, ACTIVE_IMAGES, NAN, OUTPUT_SUM, PRE_SQUARES, PRE_SUM
from pixfuse.activity import UnitActivity


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What became of the units of one layer. All tensors are on the CPU.

    Args:
        name: of the module in the model; the second call within a forward has ``#2`` behind it.
        layer: what it is: ``"ReLU"``, or ``"Conv2d, relu"`` for one named in ``layers``.
        stops_gradient: whether no gradient at all passes where a unit does not fire.
        window: the activity over the last steps.
        total: the activity since the start.
        steps_since_fired: int64 (C,): steps since each channel last fired; all of them, if never.
        pre_mean: float64 (C,): the mean of the pre-activations over the window, or None.
        pre_std: float64 (C,): their standard deviation over the window, or None.
        tau: the threshold of ``dormant``.
    """

    name: str
    layer: str
    stops_gradient: bool
    window: UnitActivity
    total: UnitActivity
    steps_since_fired: torch.Tensor
    pre_mean: torch.Tensor | None
    pre_std: torch.Tensor | None
    tau: float

    def __str__(self) -> str:
        return f"{self.name or '(model)'}, {self.layer}: {self.window}"

    @property
    def channels(self) -> int:
        """How many units there are."""
        return self.steps_since_fired.numel()

    @property
    def dead(self) -> torch.Tensor:
        """Bool (C,): did not fire once in the window."""
        return self.window.dead

    @property
    def dead_count(self) -> int:
        """How many units are dead."""
        return int(self.dead.sum())

    @property
    def dead_share(self) -> float:
        """The share of the units that is dead, from 0 to 1."""
        return self.dead_count / max(self.channels, 1)

    @property
    def dormant(self) -> torch.Tensor:
        """Bool (C,): a mean magnitude of at most ``tau`` times the layer's, and no NaN."""
        return self.window.dormant(self.tau) & (self.window.nan == 0)

    @property
    def active_fraction(self) -> float:
        """The share of all outputs in the window that fired; NaN if there were none."""
        outputs = self.window.positions * self.channels
        return int(self.window.active.sum()) / outputs if outputs else math.nan


@dataclass(frozen=True, eq=False)
class MonitorReport:
    """What became of the units of a model: one :class:`LayerReport` for each layer; prints a table.

    Args:
        steps: how many there were since the start.
        window_steps: how many of them, the last ones, the window holds.
        layers: in the order of the model. A layer that never ran is not among them.
        not_run: the names of those.
    """

    steps: int
    window_steps: int
    layers: tuple[LayerReport, ...]
    not_run: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(
            f"MonitorReport: expected the name of a layer that ran, got {name!r}; there are "
            f"{[layer.name for layer in self.layers]}"
        )

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def channels(self) -> int:
        """How many units there are in all layers."""
        return sum(layer.channels for layer in self.layers)

    @property
    def dead_count(self) -> int:
        """How many of them are dead."""
        return sum(layer.dead_count for layer in self.layers)

    @property
    def dead_share(self) -> float:
        """The share of all units that is dead, from 0 to 1."""
        return self.dead_count / max(self.channels, 1)

    def __str__(self) -> str:
        header = ("name", "layer", "units", "dead", "", "dormant", "active", "longest silence")
        rows = [header]
        for layer in self.layers:
            silence = int(layer.steps_since_fired.max()) if layer.channels else 0
            rows.append(
                (
                    layer.name or "(model)",
                    layer.layer,
                    f"{layer.channels:,}",
                    f"{layer.dead_count:,}{'' if layer.stops_gradient else '*'}",
                    f"{layer.dead_share:.1%}",
                    f"{int(layer.dormant.sum()):,}",
                    "-" if math.isnan(layer.active_fraction) else f"{layer.active_fraction:.1%}",
                    f"{silence:,} step{'' if silence == 1 else 's'}",
                )
            )
        dormant = sum(int(layer.dormant.sum()) for layer in self)
        share = f"{self.dead_share:.1%}"
        rows.append(
            ("all", "", f"{self.channels:,}", f"{self.dead_count:,}", share, f"{dormant:,}", "", "")
        )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [f"units over the last {self.window_steps:,} of {self.steps:,} steps"]
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right).rstrip())
        if not all(layer.stops_gradient for layer in self.layers):
            lines.append("* never above 0, where some gradient passes: such a unit can come back")
        lines += [
            f"{layer.name}: {units:,} units with outputs that are NaN"
            for layer in self.layers
            if (units := int((layer.window.nan > 0).sum()))
        ]
        if self.not_run:
            lines.append(f"never ran: {', '.join(self.not_run)}")
        return "\n".join(lines)


def report_of(
    name: str,
    layer: str,
    stops_gradient: bool,
    tau: float,
    window: torch.Tensor,
    total: torch.Tensor,
    since_fired: torch.Tensor,
) -> LayerReport:
    """Read the tensors of counts of one layer."""
    window, total, since_fired = window.cpu(), total.cpu(), since_fired.cpu()
    mean, std = _moments(window)
    return LayerReport(
        name,
        layer,
        stops_gradient,
        _activity(window),
        _activity(total),
        since_fired,
        mean,
        std,
        tau,
    )


def _activity(counts: torch.Tensor) -> UnitActivity:
    """From a tensor of counts on the CPU."""
    whole = counts[: NAN + 1].long()
    return UnitActivity(
        whole[ACTIVE, :-1],
        whole[ACTIVE_IMAGES, :-1],
        whole[NAN, :-1],
        counts[OUTPUT_SUM, :-1],
        int(whole[ACTIVE, -1]),
        int(whole[ACTIVE_IMAGES, -1]),
    )


def _moments(counts: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mean and standard deviation of the pre-activations, where they were summed up."""
    if counts.shape[0] <= PRE_SUM:
        return None, None
    positions = counts[ACTIVE, -1]
    mean = counts[PRE_SUM, :-1] / positions
    variance = counts[PRE_SQUARES, :-1] / positions - mean.square()
    return mean, variance.clamp_min(0).sqrt()
