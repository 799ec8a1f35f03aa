"""Outputs in the middle of larger buffers, which show whether anything was written outside."""

import torch

GUARD = 64  # elements before and after an output that must stay as they were
_PATTERN = 7


def guarded_output(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An output `offset` elements off its alignment, and the larger buffer that it lies in."""
    elements = torch.Size(shape).numel()
    buffer = torch.full((elements + 2 * GUARD + offset,), _PATTERN, dtype=dtype, device=device)
    dense = buffer[GUARD + offset : GUARD + offset + elements]
    if memory_format is torch.channels_last:
        *batch, channels, height, width = shape
        return dense.view(*batch, height, width, channels).movedim(-1, -3), buffer
    return dense.view(shape), buffer


def assert_guards_untouched(buffer: torch.Tensor, offset: int = 0) -> None:
    assert bool((buffer[: GUARD + offset] == _PATTERN).all()), "written before the output"
    assert bool((buffer[-GUARD:] == _PATTERN).all()), "written after the output"
