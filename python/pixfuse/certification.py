"""Channels that no image can make fire: proved from the weights, without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from pixfuse._checks import check_is_normalization
from pixfuse._convolution_autograd import OUTPUT_DTYPE_CODES
from pixfuse.functional import normalize
from pixfuse.normalization import Normalization

Range: TypeAlias = float | Sequence[float] | torch.Tensor


def certified_dead(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    low: Range | None = None,
    high: Range | None = None,
    *,
    normalization: Normalization | None = None,
    padding: int | Sequence[int] | str = 0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> torch.Tensor:
    """Find the output channels of a convolution with ReLU that no input in a range can make fire.

    Formula: ``sum over taps and channels of max(w * low[c], w * high[c]) + bias <= 0``. That is the
    largest pre-activation there is: without padding some input has it. With padding a tap may also
    see zeros, in all channels at once, and counts only where its sum over the channels is above 0;
    this is right for every image size and stride, and the same where each range holds 0, as it does
    for images whose mean is a possible pixel.

    A certificate also holds for what is computed with rounding: it is given only where the sum
    stays at 0 or below although each term grows, or if negative shrinks, by as much as rounding can
    make of it: ``k * u / (1 - k * u)`` of itself, with ``k`` the number of taps and 2, and ``u``
    2**-24 (2**-53 in float64), and with ``tf32`` 2**-9 more; and only where no partial sum can
    overflow. So it holds for every convolution that multiplies and adds the taps in any order, with
    sums in float32 or wider, also where they are rounded to 16 bits before the bias is added, which
    keeps their order with it; not for Winograd and FFT algorithms, but for those of
    :func:`pixfuse.conv_bias_relu`, which leave such channels out. Channels between the margin and
    0 are not certified. Where all terms are 0 or below no margin is needed, and none is taken.

    Args:
        weight: (O, C / groups, kH, kW), of a float dtype.
        bias: (O,), or None.
        low: the least value of the input, for all channels or one per channel (C values), in the
            units in which the convolution sees it; may be ``-inf`` for any finite number.
        high: the largest one; may be ``inf``.
        normalization: instead of ``low`` and ``high``: what images can become by it, from
            ``(0 - mean) / std`` to ``(1 - mean) / std``, however that is rounded.
        padding: as the convolution takes it; all that matters is whether zeros enter. With another
            padding mode than zeros, 0.
        groups: into which input and output channels are split.
        dtype: in which the convolution runs, such as that of autocast: weight, bias and the range
            are rounded to it. Default that of ``weight``.
        tf32: whether float32 factors may be rounded to TF32, which cuDNN does unless told not to.

    Returns:
        Bool (O,), on the device of ``weight``: True where nothing in the range fires. NaN weights
        are not certified.

    Raises:
        TypeError: an argument of a wrong type or dtype; both a range and a normalization, or
            neither.
        ValueError: a wrong shape, group count or padding; a range that is empty or not numbers.

    Equivalent to (of 3 channels without padding, but for the margin)::

        corner = torch.where(weight > 0, high.view(-1, 1, 1), low.view(-1, 1, 1))
        (weight.double() * corner).sum((1, 2, 3)) + bias <= 0

    Example::

        weight = torch.linspace(-1, 1, 64).view(64, 1, 1, 1).expand(64, 3, 3, 3)
        bias = torch.full((64,), -9.0)
        assert pixfuse.certified_dead(weight, bias, normalization=pixfuse.UNIT).sum() == 42
        assert pixfuse.certified_dead(weight, bias, normalization=pixfuse.SIGNED).sum() == 20

    Source:
        Interval arithmetic: Moore, "Interval Analysis", 1966; of networks: Gowal et al., arXiv
        1810.12715. Rounding: Higham, "Accuracy and Stability of Numerical Algorithms", chapter 3.
    """
    chosen = _check_operands(weight, bias, groups, dtype)
    channels = weight.shape[1] * groups
    least, most = _resolve_range(low, high, normalization, channels, chosen)
    padded = _enters_zero(padding, weight)

    wide = weight.detach().to(chosen).double()
    outputs = weight.shape[0]
    offset = wide.new_zeros(outputs) if bias is None else bias.detach().to(chosen).double()
    # The range of the channels that each output sees.
    shape = (outputs, weight.shape[1], 1, 1)
    each = [
        side.to(weight.device).view(groups, -1).repeat_interleave(outputs // groups, 0).view(shape)
        for side in (least, most)
    ]
    # Zero weights meet infinite ranges.
    terms = torch.maximum(*[torch.where(wide == 0, wide, wide * side) for side in each])

    count = weight[0].numel()
    grown, shrunk = _factors(count, chosen, tf32)
    above = terms.clamp(min=0).sum(1).flatten(1)  # (O, taps)
    below = terms.clamp(max=0).sum(1).flatten(1) * shrunk
    never_above = (above.sum(1) == 0) & (offset <= 0)
    above = above * grown
    if padded:
        counts = ~(above + below <= 0)  # also where it is not a number
        above, below = above * counts, below * counts
    grown, shrunk = _factors(count, chosen, tf32=False)  # the bias is no factor of a product
    positive = above.sum(1) + offset.clamp(min=0) * grown
    negative = below.sum(1) + offset.clamp(max=0) * shrunk
    # What falls below the least normal number may be taken for 0, in the sums and in the result.
    vanished = 2 * (count + 1) * torch.finfo(torch.float32).tiny + torch.finfo(chosen).tiny
    fits = positive <= torch.finfo(chosen).max
    return never_above | (fits & (positive + negative + vanished <= 0))


def _factors(count: int, dtype: torch.dtype, tf32: bool) -> tuple[float, float]:
    """How much a positive term can grow, and a negative one shrink, of so many terms."""
    unit = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    roundings = (count + 2) * unit
    if roundings >= 1:
        return math.inf, 0.0
    relative = roundings / (1 - roundings)
    own = (count + 8) * 2.0**-52  # of the float64 sums here
    factors = 2.0**-9 + 2.0**-20 if tf32 and dtype is torch.float32 else 0.0
    grown = (1 + relative) * (1 + factors) * (1 + own)
    shrunk = (1 - relative) * (1 - factors) * (1 - own)
    return grown, max(shrunk, 0.0)


def _check_operands(
    weight: object, bias: object, groups: object, dtype: torch.dtype | None
) -> torch.dtype:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(
            f"certified_dead: expected weight to be a torch.Tensor, got {type(weight).__name__}"
        )
    if weight.dtype not in OUTPUT_DTYPE_CODES:
        raise TypeError(f"certified_dead: expected weight of a float dtype, got {weight.dtype}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            "certified_dead: expected weight of shape (O, C / groups, kH, kW) without a 0, got "
            f"shape {tuple(weight.shape)}"
        )
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(
                "certified_dead: expected bias to be a torch.Tensor or None, got "
                f"{type(bias).__name__}"
            )
        if not bias.is_floating_point():
            raise TypeError(f"certified_dead: expected bias of a float dtype, got {bias.dtype}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"certified_dead: expected bias of shape ({weight.shape[0]},), as given by weight, "
                f"got shape {tuple(bias.shape)}"
            )
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(
            f"certified_dead: expected groups to be an integer, got {type(groups).__name__}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"certified_dead: expected groups to divide the {weight.shape[0]} output channels of "
            f"weight, got {groups}"
        )
    chosen = weight.dtype if dtype is None else dtype
    if chosen not in OUTPUT_DTYPE_CODES:
        raise TypeError(
            "certified_dead: expected dtype to be torch.float32, float16, bfloat16 or float64, got "
            f"{dtype}"
        )
    return chosen


def _resolve_range(
    low: Range | None,
    high: Range | None,
    normalization: Normalization | None,
    channels: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest input of each channel, in float64, before and after rounding."""
    if (normalization is None) == (low is None and high is None):
        given = "both" if normalization is not None else "neither"
        raise TypeError(
            f"certified_dead: expected either low and high, or a normalization, got {given}"
        )
    if normalization is None:
        if low is None or high is None:
            missing = "low" if low is None else "high"
            raise TypeError(f"certified_dead: expected low and high, got no {missing}")
        least, most = _numbers("low", low, channels), _numbers("high", high, channels)
        if not bool((least <= most).all()):
            channel = int((~(least <= most)).nonzero()[0])
            raise ValueError(
                "certified_dead: expected low to be at most high in every channel, got low "
                f"{least[channel].item()} and high {most[channel].item()} in channel {channel}"
            )
        bounds = [least, most]
    else:
        check_is_normalization("certified_dead", normalization)
        mean, std = normalization.mean, normalization.std
        if len(mean) not in (1, channels):
            raise ValueError(
                f"certified_dead: expected normalization of {channels} channels, as weight and "
                f"groups have it, or of one value for all, got {len(mean)} values"
            )
        bounds = [
            torch.tensor(
                [(pixel - m) / s for m, s in zip(mean, std, strict=True)],
                dtype=torch.float64,
                device="cpu",
            )
            for pixel in (0.0, 1.0)
        ]
        pixels = torch.tensor([0, 255], dtype=torch.uint8, device="cpu")
        pixels = pixels.expand(1, channels, 1, 2)
        bounds += list(normalize(pixels, normalization)[0, :, 0].double().unbind(1))
        bounds = [bound.expand(channels) for bound in bounds]
    # Rounding keeps the order, so the ends say it all.
    bounds += [bound.to(dtype).double() for bound in bounds]
    stacked = torch.stack(bounds)
    return stacked.amin(0), stacked.amax(0)


def _numbers(argument: str, value: Range, channels: int) -> torch.Tensor:
    """One number for all channels, or one for each, in float64."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"certified_dead: expected {argument} to be a number, or one per channel, got "
            f"{type(value).__name__}"
        ) from None
    if numbers.dim() > 1 or (numbers.dim() == 1 and numbers.numel() not in (1, channels)):
        raise ValueError(
            f"certified_dead: expected {argument} to be a number or {channels}, one per channel, "
            f"got shape {tuple(numbers.shape)}"
        )
    if bool(numbers.isnan().any()):
        raise ValueError(f"certified_dead: expected {argument} without NaN, got {value}")
    return numbers.expand(channels)


def _enters_zero(padding: int | Sequence[int] | str, weight: torch.Tensor) -> bool:
    """Whether the convolution sees zeros beside the images."""
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(
                "certified_dead: expected padding to be 'valid', 'same' or integers, got "
                f"{padding!r}"
            )
        return padding == "same" and max(weight.shape[2:]) > 1
    sides: list[Any] = list(padding) if isinstance(padding, Sequence) else [padding]
    if len(sides) not in (1, 2) or not all(isinstance(side, int) for side in sides):
        raise TypeError(
            "certified_dead: expected padding to be an integer, or two (height, width), got "
            f"{padding!r}"
        )
    if min(sides) < 0:
        raise ValueError(f"certified_dead: expected padding to be 0 or more, got {padding}")
    return bool(max(sides) > 0)
