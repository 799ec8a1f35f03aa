"""When a unit fires, for each kind of layer, and counting it with no more than plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

#: Rows of a tensor of counts. All float64, in which whole numbers are exact up to 2**53.
ACTIVE, ACTIVE_IMAGES, NAN, OUTPUT_SUM, PRE_SUM, PRE_SQUARES = range(6)
#: Above this, a float32 sum of zeros and ones could stop growing.
_EXACT_IN_FLOAT32 = 2**24

_ABOVE = (
    *(nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
)
_SPATIAL = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.LazyConv1d, nn.LazyConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.LazyConv2d, nn.LazyConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.LazyConv3d, nn.LazyConvTranspose3d, nn.BatchNorm3d),
}


@dataclass(frozen=True)
class Firing:
    """What firing means in one layer.

    Args:
        layer: what the layer is, in words for a table.
        rule: ``"relu"``: an output above 0, and none is below; ``"above"``: an output above 0;
            ``"input"``: an input above 0, for PReLU, whose slope below 0 may have any sign;
            ``"between"``: an output strictly between ``low`` and ``high``; ``"before"``: an output
            above 0 that goes into a functional ReLU.
        stops: whether no gradient at all passes where a unit does not fire.
        low: the lower end of a clamp.
        high: the upper end of a clamp.
    """

    layer: str
    rule: Literal["relu", "above", "input", "between", "before"]
    stops: bool = True
    low: float = 0.0
    high: float = 0.0


def firing_of(module: nn.Module) -> Firing | None:
    """What firing means in an activation; None for a layer that is none of those that are known."""
    name = type(module).__name__
    if isinstance(module, nn.Hardtanh):  # and ReLU6, which is one
        return Firing(name, "between", low=float(module.min_val), high=float(module.max_val))
    if isinstance(module, nn.PReLU):
        return Firing(name, "input", stops=False)
    if isinstance(module, nn.ReLU):
        return Firing(name, "relu")
    if isinstance(module, _ABOVE):
        return Firing(name, "above", stops=False)
    return None


def firing_after(module: nn.Module) -> Firing:
    """What firing means in a layer whose outputs go into a functional ReLU."""
    return Firing(f"{type(module).__name__}, relu", "before")


@dataclass(frozen=True)
class Channels:
    """Where a layer puts its channels: ``dim`` counts from the end; ``count`` None if unknown."""

    dim: int
    count: int | None


def channels_of(module: nn.Module) -> Channels | None:
    """Where a layer with weights puts its channels; None for a layer that does not say."""
    for spatial, kinds in _SPATIAL.items():
        if isinstance(module, kinds):
            count = getattr(module, "out_channels", None) or getattr(module, "num_features", None)
            return Channels(-1 - spatial, count)
    if isinstance(module, nn.Linear):
        return Channels(-1, module.out_features)
    if isinstance(module, nn.LayerNorm):
        return Channels(-1, module.normalized_shape[-1]) if module.normalized_shape else None
    return None


def is_recorded() -> bool:
    """Whether torch.export or torch.jit.trace is running the model, to record it."""
    # The flag behind torch.compiler.is_exporting(), which torch.compile took for true in torch
    # 2.11.
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def find_channel_dim(
    name: str, output: torch.Tensor, chosen: int | None, before: Sequence[Channels]
) -> int:
    """The dimension of the channels, from 0.

    As chosen; else where the nearest layer before that fits puts them: an activation that several
    layers share is not always called after the last one. If none fits, the only dimension in which
    there are as many as the last layer has; else the second, but the last of two. Of three
    dimensions nothing can be said without a layer before that fits.
    """
    dims = output.dim()
    if chosen is not None:
        if not -dims <= chosen < dims:
            raise ValueError(
                f"DeadUnitMonitor: expected channel_dims[{name!r}] to be a dimension of the output "
                f"of shape {tuple(output.shape)}, got {chosen}"
            )
        return chosen % dims
    for index, layer in enumerate(before):
        unknown = index == 0 and layer.count in (None, 0)
        # Not the first dimension: a batch may be as large by chance.
        if -layer.dim < dims and (unknown or output.shape[layer.dim] == layer.count):
            return layer.dim % dims
    if before:
        fitting = [d for d in range(dims) if output.shape[d] == before[0].count]
        behind = [d for d in fitting if d > 0]
        if len(behind) == 1:
            return behind[0]
        if fitting == [0] and before[0].dim == -dims:
            return 0  # one image, without a batch
    if dims in (1, 2):
        return dims - 1
    if dims >= 4:
        return 1
    raise ValueError(
        f"DeadUnitMonitor: expected to know the channels of {name!r}, got an output of shape "
        f"{tuple(output.shape)} and no convolution or linear layer before it that fits; pass "
        f"channel_dims={{{name!r}: 1}} for (N, C, L), or -1 for (N, T, F)"
    )


def count_firing(
    firing: Firing, input: torch.Tensor | None, output: torch.Tensor, dim: int
) -> tuple[torch.Tensor, int, int]:
    """Count what fires in one output, reading nothing back from its device.

    Only floats are summed up: torch's sums of booleans take ten times as long on a CPU. ``input``
    is what the activation was called with, where its rule asks for it.

    Returns:
        Float64 (4, C): how often each channel fired, in how many images, how many NaN, and the sum
        of the magnitudes of the outputs without the NaN; then positions and images.
    """
    if dim == 0:  # one image, without a batch
        output, dim = output.unsqueeze(0), 1
        input = None if input is None else input.unsqueeze(0)
    elsewhere = [d for d in range(1, output.dim()) if d != dim]
    images, channels = output.shape[0], output.shape[dim]
    positions = output.numel() // channels if channels else 0
    narrow = torch.float64 if output.dtype is torch.float64 else torch.float32
    of_image = torch.float64 if positions > images * _EXACT_IN_FLOAT32 else narrow
    of_batch = torch.float64 if positions > _EXACT_IN_FLOAT32 else narrow

    def per_image(values: torch.Tensor) -> torch.Tensor:
        if not elsewhere:
            return values.to(of_image, copy=True)  # values will be changed in place
        return values.sum(elsewhere, dtype=of_image)

    def nan_as(values: torch.Tensor, nan: float) -> torch.Tensor:
        return torch.nan_to_num(values, nan, float("inf"), float("-inf"))

    if firing.rule == "between":
        inside = (output > firing.low) & (output < firing.high)
        marks = torch.where(output.isnan(), -1.0, inside.to(narrow))
    elif firing.rule == "relu":
        marks = nan_as(output, -1.0)
    else:
        marks = nan_as((output if input is None else input).relu(), -1.0)
    is_relu = firing.rule in ("relu", "before")
    sums = per_image(marks if is_relu else nan_as(output, 0.0).abs_())
    active_less_nan = per_image(marks.sign_())
    active = per_image(marks.relu_())
    rows = torch.stack([active, active.sign(), active - active_less_nan, sums])
    counts = rows.sum(1, dtype=of_batch).double()
    if is_relu:
        counts[OUTPUT_SUM] += counts[NAN]  # each of which was summed up as -1
    return counts, positions, images


def count_moments(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum and sum of squares of each channel, float64 (2, C): of each image around its own mean.

    So the squares keep their digits also where the mean is large.
    """
    if dim == 0:
        values, dim = values.unsqueeze(0), 1
    values = values.to(torch.float64 if values.dtype is torch.float64 else torch.float32)
    elsewhere = [d for d in range(1, values.dim()) if d != dim]
    if not elsewhere:
        wide = values.double()
        return torch.stack([wide.sum(0), wide.square().sum(0)])
    size = 1
    for d in elsewhere:
        size *= values.shape[d]
    means = values.sum(elsewhere, keepdim=True) / max(size, 1)
    squares = values.sub(means).square_().sum(elsewhere).double()
    wide = means.flatten(1).double()
    return torch.stack([wide.sum(0) * size, (squares + wide.square() * size).sum(0)])
