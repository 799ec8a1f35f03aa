"""The counts of one layer: of the open step, of a window of blocks, since the start."""

from __future__ import annotations

import torch

from pixfuse._firing import ACTIVE, ACTIVE_IMAGES, PRE_SUM

#: Columns of the history. When they are full, pairs of them become one, of twice the steps.
COLUMNS = 64
#: What makes a record, and goes into a state dict.
TENSORS = ("open", "ring", "total", "history", "last_fired")


class Record:
    """The counts of one layer, on the device of its outputs.

    Each tensor of counts has a column for each channel and one more, which holds what a channel
    that always fires would have: positions and images.
    """

    def __init__(self, rows: int, channels: int, blocks: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            # Made in inference mode, they could never be changed outside of it.
            with torch.inference_mode(False):
                return torch.zeros(shape, dtype=dtype, device=device)

        self.channels = channels
        self.open = zeros(rows, channels + 1)  # the step that is not over
        self.ring = zeros(blocks, rows, channels + 1)  # the window
        self.total = zeros(rows, channels + 1)  # since the start
        self.history = zeros(COLUMNS, channels + 1)  # row ACTIVE since the start, for the picture
        self.last_fired = zeros(channels, dtype=torch.int64)  # the number of the step; 0 for never

    def to(self, device: torch.device) -> None:
        if self.open.device != device:
            with torch.inference_mode(False):
                for name in TENSORS:
                    setattr(self, name, getattr(self, name).to(device))

    def add(
        self, rows: torch.Tensor, positions: int, images: int, moments: torch.Tensor | None
    ) -> None:
        self.open[:PRE_SUM, :-1].add_(rows)
        self.open[ACTIVE, -1].add_(positions)
        self.open[ACTIVE_IMAGES, -1].add_(images)
        if moments is not None:
            self.open[PRE_SUM:, :-1].add_(moments)

    def end_step(self, step: int, block: int, begins: bool, column: int) -> None:
        if begins:
            self.ring[block].zero_()
        self.ring[block].add_(self.open)
        self.total.add_(self.open)
        self.history[column].add_(self.open[ACTIVE])
        self.last_fired.masked_fill_(self.open[ACTIVE, :-1] > 0, step)
        self.open.zero_()

    def halve_history(self) -> None:
        pairs = self.history.view(COLUMNS // 2, 2, -1).sum(1)
        self.history[: COLUMNS // 2].copy_(pairs)
        self.history[COLUMNS // 2 :].zero_()

    def since_fired(self, steps: int) -> torch.Tensor:
        return (steps - self.last_fired).masked_fill(self.open[ACTIVE, :-1] > 0, 0)
