"""What became of each output channel of a ReLU: exact counts, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class UnitActivity:
    """Per output channel of a ReLU: how often it fired, over one batch or a window of them.

    Counts are exact, and taken after the outputs were rounded to their dtype, so they agree with
    the mask that the ReLU's gradient goes through. ``a + b`` is the activity over both. A NaN is
    not above 0, so it is not active; it is counted apart. ``print`` says it in a line.

    Args:
        active: int64 (C,): outputs above 0.
        active_images: int64 (C,): images in which at least one output was above 0.
        nan: int64 (C,): outputs that are NaN.
        output_sum: float64 (C,): the sum of the outputs, right to a relative 1e-5.
        positions: outputs of each channel: images times height times width.
        images: images, an unbatched input counting as one.

    Raises:
        Nothing: arguments are taken as they come.

    Source:
        Dead and rarely active units: Lu et al., arXiv 1903.06733; Dohare et al., Nature 2024.
        Dormant ones: Sokar et al., arXiv 2302.12902.
    """

    active: torch.Tensor
    active_images: torch.Tensor
    nan: torch.Tensor
    output_sum: torch.Tensor
    positions: int
    images: int

    @property
    def dead(self) -> torch.Tensor:
        """Bool (C,): no output was above 0 or NaN, so no gradient reached weight and bias.

        Of no positions at all nothing is known, and no channel is dead.
        """
        if self.positions == 0:
            return torch.zeros_like(self.active, dtype=torch.bool)
        return (self.active == 0) & (self.nan == 0)

    @property
    def dead_count(self) -> torch.Tensor:
        """Int64 scalar: how many channels are dead."""
        return self.dead.sum()

    @property
    def active_fraction(self) -> torch.Tensor:
        """Float64 (C,): the share of outputs above 0; 0 of no positions."""
        return self.active.double() / max(self.positions, 1)

    def dormant(self, tau: float = 0.0) -> torch.Tensor:
        """Find the units whose mean output is at most ``tau`` times the layer's mean output.

        Formula: ``mean_c <= tau * mean over channels of mean_c``. With ``tau=0`` these are the
        channels whose outputs are all 0. Such a channel is dormant beside infinities and NaN too,
        and one that has them is not.

        Args:
            tau: the threshold; 0 or above. ReDo uses 0.025 to 0.1.

        Returns:
            Bool (C,); all False of no positions.

        Raises:
            ValueError: a negative ``tau``, or NaN.

        Source:
            Sokar et al., "The Dormant Neuron Phenomenon", arXiv 2302.12902, definition 3.1.
        """
        if not tau >= 0:
            raise ValueError(f"dormant: expected tau to be 0 or above, got {tau}")
        if self.positions == 0:
            return torch.zeros_like(self.active, dtype=torch.bool)
        is_small = self.output_sum <= tau * self.output_sum.mean()
        return (self.output_sum == 0) | (is_small & self.output_sum.isfinite())

    def __str__(self) -> str:
        channels, active = self.active.numel(), int(self.active.sum())
        share = active / max(self.positions * channels, 1)
        found = [
            f"{int(self.dead_count):,} of {channels:,} channels dead",
            f"{share:.1%} of outputs active",
        ]
        if nan := int((self.nan > 0).sum()):
            found.append(f"NaN in {nan:,}")
        return f"{', '.join(found)}; {self.images:,} image{'' if self.images == 1 else 's'}"

    def __add__(self, other: UnitActivity) -> UnitActivity:
        if not isinstance(other, UnitActivity):
            return NotImplemented
        if self.active.shape != other.active.shape:
            raise ValueError(
                "UnitActivity: expected two activities of the same number of channels, got "
                f"{self.active.numel()} and {other.active.numel()}"
            )
        return UnitActivity(
            self.active + other.active,
            self.active_images + other.active_images,
            self.nan + other.nan,
            self.output_sum + other.output_sum,
            self.positions + other.positions,
            self.images + other.images,
        )

    def __radd__(self, other: object) -> UnitActivity:
        return self if other == 0 else NotImplemented  # sum() begins with 0

    def all_reduce(self, group: ProcessGroup | None = None) -> UnitActivity:
        """Sum over the ranks of a process group: the activity over all of their batches.

        Args:
            group: the ranks; default all of them. Every rank of it must call.

        Returns:
            A new UnitActivity, the same on every rank. ``positions`` and ``images`` are read back
            from the device.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialized.
        """
        if not torch.distributed.is_initialized():
            raise RuntimeError(
                "all_reduce: expected torch.distributed to be initialized, got no process group; "
                "call torch.distributed.init_process_group first"
            )
        sizes = torch.tensor([self.positions, self.images], device=self.active.device)
        counts = torch.cat([self.active, self.active_images, self.nan, sizes])
        output_sum = self.output_sum.clone()
        torch.distributed.all_reduce(counts, group=group)
        torch.distributed.all_reduce(output_sum, group=group)
        channels = self.active.numel()
        active, active_images, nan, sizes = counts.split([channels, channels, channels, 2])
        positions, images = sizes.tolist()
        return UnitActivity(active, active_images, nan, output_sum, positions, images)


# So that it goes in and out of torch.compile, torch.export and torch.func as a bundle of tensors.
torch.export.register_dataclass(UnitActivity, serialized_type_name="pixfuse.UnitActivity")
