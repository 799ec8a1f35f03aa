"""The pure-torch twin of every function: what the kernels are compared with, bit for bit.

Written for reading, not for speed: each rounding is spelled out step by step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv2d

from pixfuse._library import LAYOUT_CODES, dense_strides, resolve_channels_last, view_as_nchw
from pixfuse.activity import UnitActivity
from pixfuse.normalization import UNIT, Normalization

__all__ = [
    "certified_dead",
    "channel_histogram",
    "conv_bias_relu",
    "crop_mirror_normalize",
    "denormalize",
    "image_moments",
    "normalize",
    "standardize_per_image",
]


def normalize(
    images: torch.Tensor | np.ndarray,
    normalization: Normalization = UNIT,
    *,
    input_layout: str = "NCHW",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Do what :func:`pixfuse.normalize` does, in plain torch operations.

    Args:
        images: uint8, (N, C, H, W) or (C, H, W), or with ``input_layout="NHWC"`` channels last.
        normalization: what a pixel becomes.
        input_layout: ``"NCHW"`` or ``"NHWC"``.
        dtype: float32, float16 or bfloat16.
        memory_format: contiguous, channels_last or preserve.

    Returns:
        A float tensor of shape (N, C, H, W) or (C, H, W) in ``memory_format``.

    Raises:
        Nothing of its own: arguments are taken as they come.
    """
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    pixels = view_as_nchw(tensor, LAYOUT_CODES[input_layout])
    values = _float32_values(pixels, normalization).to(dtype)
    channels_last = resolve_channels_last(pixels, memory_format)
    out = values.new_empty_strided(values.shape, dense_strides(values.shape, channels_last))
    return out.copy_(values)


#: What Pillow is asked to convert a mode to, step by step; L, RGB, RGBX and RGBA are read as such.
_PILLOW_CONVERSIONS = {
    "1": ("L",),
    "PA": ("RGBA",),
    "LA": ("RGBA",),
    "La": ("LA", "RGBA"),  # Pillow has no direct way
    "RGBa": ("RGBA",),
    "CMYK": ("RGB",),
    "YCbCr": ("RGB",),
    "LAB": ("RGB",),
    "HSV": ("RGB",),
}


def crop_mirror_normalize(
    images: Sequence[Any] | torch.Tensor,
    size: int | Sequence[int] | None = None,
    normalization: Normalization = UNIT,
    *,
    anchor: Any = (0.5, 0.5),
    top: Any = None,
    left: Any = None,
    mirror: Any = False,
    flip: Any = False,
    channels: int | None = None,
    out_of_bounds: str = "error",
    fill: Any = 0.0,
    fill_space: str = "input",
    return_mask: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Do what :func:`pixfuse.crop_mirror_normalize` does, in plain torch operations.

    One image after the other: to (C, H, W) bytes, to the common number of channels, its window,
    with the fill where the window leaves the image, mirrored, flipped; then the arithmetic of
    :func:`pixfuse.reference.normalize`, for the fill in pixel units as for a byte.

    Args:
        images: Pillow images, numpy arrays (H, W) or (H, W, C), tensors (C, H, W); or one tensor
            (N, C, H, W).
        size: of the windows, one int or (height, width); None: of the images.
        normalization: what a pixel becomes; of no effect for ``dtype=torch.uint8``.
        anchor: where a window lies, 0 to 1 of the slack: (vertical, horizontal), or N pairs.
        top: first row of each window, an int or N; with ``left``, in the place of ``anchor``.
        left: first column of each window, an int or N.
        mirror: whether each window is mirrored left to right, a bool or N.
        flip: whether each window is turned upside down, a bool or N.
        channels: of the result; None: of the images, 3 where some have 3 and others 1.
        out_of_bounds: of no effect: a window that leaves its image is always filled.
        fill: a number, or one per channel.
        fill_space: ``"input"``: fill is in units of pixels; ``"output"``: of the result.
        return_mask: whether to return too which pixels come from an image.
        dtype: float32, float16, bfloat16 or uint8.
        memory_format: contiguous or channels_last.

    Returns:
        A tensor (N, C, height, width) of ``dtype`` in ``memory_format``; with ``return_mask`` also
        a bool tensor (N, height, width), True where a pixel comes from an image.

    Raises:
        Nothing of its own: arguments are taken as they come.
    """
    pixels = _same_channels([_channels_first(image) for image in images], channels)
    count, device = len(pixels), pixels[0].device
    height, width = _height_and_width(size, pixels[0])
    if top is None:
        pairs = np.broadcast_to(np.asarray(anchor, dtype=np.float64), (count, 2)).tolist()
        tops = [_offset(a, p.shape[1] - height) for (a, _), p in zip(pairs, pixels, strict=True)]
        lefts = [_offset(a, p.shape[2] - width) for (_, a), p in zip(pairs, pixels, strict=True)]
    else:
        tops = np.broadcast_to(np.asarray(top), (count,)).tolist()
        lefts = np.broadcast_to(np.asarray(left), (count,)).tolist()
    mirrors = np.broadcast_to(np.asarray(mirror), (count,)).tolist()
    flips = np.broadcast_to(np.asarray(flip), (count,)).tolist()

    fills = torch.tensor(np.asarray(fill, dtype=np.float64), device=device).reshape(-1, 1, 1)
    values, masks = [], []
    for image, row, column, mirrored, flipped in zip(
        pixels, tops, lefts, mirrors, flips, strict=True
    ):
        window, mask = _window(image, row, column, height, width, fills)
        turned = ([-1] if mirrored else []) + ([-2] if flipped else [])
        values.append(window.flip(turned))
        masks.append(mask.flip(turned))
    batch, mask = torch.stack(values), torch.stack(masks)

    if dtype is not torch.uint8:
        batch = _float32_values(batch, normalization)
        if fill_space == "output":
            batch = torch.where(mask[:, None], batch, fills.to(torch.float32))
    result = batch.new_empty_strided(
        batch.shape, dense_strides(batch.shape, memory_format is torch.channels_last), dtype=dtype
    ).copy_(batch)
    return (result, mask) if return_mask else result


def _channels_first(image: Any) -> torch.Tensor:
    """One image as uint8 (C, H, W)."""
    if isinstance(image, torch.Tensor):
        return image.as_subclass(torch.Tensor)
    if isinstance(image, np.ndarray):
        array = image
    else:  # Pillow
        steps = _PILLOW_CONVERSIONS.get(image.mode, ())
        if image.mode == "P":
            steps = ("RGBA",) if image.has_transparency_data else ("RGB",)
        for mode in steps:
            image = image.convert(mode)
        array = np.asarray(image)
        if image.mode == "RGBX":
            array = array[:, :, :3]  # the fourth byte is padding
    # A copy: torch has no negative strides, and warns of arrays that it may not write to.
    tensor = torch.from_numpy(np.array(array, order="C"))
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def _same_channels(pixels: list[torch.Tensor], channels: int | None) -> list[torch.Tensor]:
    if channels is None:  # the most that any image has: they are alike, or of 1 and 3
        channels = max(image.shape[0] for image in pixels)
    same = []
    for image in pixels:
        if image.shape[0] == 4 and channels == 3:
            same.append(image[:3])
        else:
            same.append(image.expand(channels, -1, -1))
    return same


def _height_and_width(size: int | Sequence[int] | None, pixels: torch.Tensor) -> tuple[int, int]:
    if size is None:
        return pixels.shape[1], pixels.shape[2]
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _offset(anchor: float, slack: int) -> int:
    """Where a window begins in an image that is larger by ``slack``, or smaller where below 0."""
    # Python rounds halves to even and int() towards 0, as torchvision's center_crop does.
    return round(anchor * slack) if slack >= 0 else int(anchor * slack)


def _window(
    image: torch.Tensor, top: int, left: int, height: int, width: int, fill: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A window of an image, ``fill`` where it leaves the image, and where it does not.

    In float64, the type of ``fill``, which holds every byte too.
    """
    rows = torch.arange(top, top + height, device=image.device)
    columns = torch.arange(left, left + width, device=image.device)
    _, image_height, image_width = image.shape
    row_is_inside = (rows >= 0) & (rows < image_height)
    column_is_inside = (columns >= 0) & (columns < image_width)
    mask = row_is_inside[:, None] & column_is_inside
    rows, columns = rows.clamp(0, image_height - 1), columns.clamp(0, image_width - 1)
    return torch.where(mask, image[:, rows][:, :, columns], fill), mask


def _float32_values(pixels: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """The arithmetic, of bytes or of other numbers in their units."""

    def per_channel(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=pixels.device).view(-1, 1, 1)

    f32, f64 = torch.float32, torch.float64
    mean, std = list(normalization.mean), list(normalization.std)
    m, s = per_channel(mean, f32), per_channel(std, f32)
    # As a tensor: torch divides by a Python number on CUDA by multiplying with its reciprocal.
    c255 = torch.tensor(255.0, dtype=f32, device=pixels.device)

    match normalization.rounding:
        case "torchvision":
            return ((pixels.to(f32) * torch.tensor(1 / 255, dtype=f32)) - m) / s
        case "torchvision_v1":
            return ((pixels.to(f32) / c255) - m) / s
        case "timm":
            m255 = per_channel([255 * v for v in mean], f32)
            s255 = per_channel([255 * v for v in std], f32)
            return (pixels.to(f32) - m255) / s255
        case "transformers":
            return (pixels.to(f32) - m * c255) / (s * c255)
        case "nearest":
            # 255 * mean as a sum of two float64: nothing is lost where x is near it.
            center = [255 * Fraction(v) for v in mean]
            high = [float(v) for v in center]
            low = [float(v - Fraction(h)) for v, h in zip(center, high, strict=True)]
            inverse_width = per_channel([1 / (255 * v) for v in std], f64)
            difference = (pixels.to(f64) - per_channel(high, f64)) - per_channel(low, f64)
            return (difference * inverse_width).to(f32)


def channel_histogram(
    images: torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray],
    input_layout: str = "NCHW",
) -> torch.Tensor:
    """Do what :func:`pixfuse.channel_histogram` does, in plain torch operations.

    Args:
        images: a batch or an image of uint8 in ``input_layout``; or a list of arrays (H, W) or
            (H, W, C) and tensors (C, H, W).
        input_layout: ``"NCHW"`` or ``"NHWC"``.

    Returns:
        An int64 tensor of shape (C, 256).

    Raises:
        Nothing of its own: arguments are taken as they come.
    """
    counts = None
    for pixels in _images_as_nchw(images, input_layout):
        channels = pixels.movedim(-3, 0).flatten(1).to(torch.int64)
        found = torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
        counts = found if counts is None else counts + found
    assert counts is not None
    return counts


def image_moments(
    images: torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray],
    input_layout: str = "NCHW",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what :func:`pixfuse.image_moments` does, in plain torch operations.

    Args:
        images: a batch or an image of uint8 in ``input_layout``; or a list of arrays (H, W) or
            (H, W, C) and tensors (C, H, W).
        input_layout: ``"NCHW"`` or ``"NHWC"``.

    Returns:
        Two int64 tensors of shape (N, C): sums and sums of squares.

    Raises:
        Nothing of its own: arguments are taken as they come.
    """
    sums, squares = [], []
    for pixels in _images_as_nchw(images, input_layout):
        batch = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
        values = batch.to(torch.int64)
        sums.append(values.sum((2, 3)))
        squares.append((values * values).sum((2, 3)))
    return torch.cat(sums), torch.cat(squares)


def denormalize(
    tensor: torch.Tensor,
    normalization: Normalization,
    *,
    output_layout: str = "NCHW",
    return_counts: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Do what :func:`pixfuse.denormalize` does, in plain torch operations.

    Args:
        tensor: float32, float16 or bfloat16, (N, C, H, W) or (C, H, W).
        normalization: what the pixels became.
        output_layout: ``"NCHW"`` or ``"NHWC"``.
        return_counts: whether to count clamped and non-finite values too.

    Returns:
        A contiguous uint8 tensor in ``output_layout``; with ``return_counts`` also an int64 tensor
        of the two counts.

    Raises:
        Nothing of its own: arguments are taken as they come.
    """

    def per_channel(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=tensor.device).view(-1, 1, 1)

    values = tensor.detach().to(torch.float32)
    scale = per_channel([255.0 * s for s in normalization.std])
    offset = per_channel([255.0 * m for m in normalization.mean])
    scaled = values * scale
    pixels = scaled + offset
    nearest = torch.round(pixels)  # half to even
    outside = torch.isfinite(values) & ((nearest < 0) | (nearest > 255))
    counts = torch.stack([outside.sum(), (~torch.isfinite(values)).sum()])
    result = torch.nan_to_num(nearest.clamp(0, 255), nan=0.0).to(torch.uint8)
    if output_layout == "NHWC":
        result = result.movedim(-3, -1)
    result = result.contiguous()
    return (result, counts) if return_counts else result


def _images_as_nchw(
    images: torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray], input_layout: str
) -> Iterator[torch.Tensor]:
    """A batch or an image as (N,) C, H, W; or each image of a list as C, H, W."""
    if isinstance(images, (torch.Tensor, np.ndarray)):
        tensor = torch.tensor(images) if isinstance(images, np.ndarray) else images
        yield view_as_nchw(tensor, LAYOUT_CODES[input_layout])
        return
    for image in images:
        if isinstance(image, np.ndarray):
            array = image if image.ndim == 3 else image[:, :, np.newaxis]
            yield torch.tensor(np.ascontiguousarray(array)).permute(2, 0, 1)
        else:
            yield image


def standardize_per_image(
    images: torch.Tensor | np.ndarray,
    per_channel: bool = False,
    floor: str | float = "tensorflow",
    input_layout: str = "NCHW",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Do what :func:`pixfuse.standardize_per_image` does, in plain Python and torch operations.

    Args:
        images: uint8, (N, C, H, W) or (C, H, W), or with ``input_layout="NHWC"`` channels last.
        per_channel: whether each channel has a mean and std of its own.
        floor: ``"tensorflow"``, or the least std to divide by.
        input_layout: ``"NCHW"`` or ``"NHWC"``.
        dtype: float32, float16 or bfloat16.
        memory_format: contiguous, channels_last or preserve.

    Returns:
        A float tensor of shape (N, C, H, W) or (C, H, W) in ``memory_format``.

    Raises:
        Nothing of its own: arguments are taken as they come.
    """
    tensor = torch.tensor(images) if isinstance(images, np.ndarray) else images
    pixels = view_as_nchw(tensor, LAYOUT_CODES[input_layout])
    batch = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
    values = torch.empty(batch.shape, dtype=torch.float32)
    for n in range(batch.shape[0] if batch.numel() else 0):
        for c in range(batch.shape[1]) if per_channel else [slice(None)]:
            x = batch[n, c].to(torch.int64)
            high, low, inverse_width = _standardization(
                x.numel(), int(x.sum()), int((x * x).sum()), floor
            )
            difference = (x.to(torch.float64) - high) - low
            values[n, c] = (difference * inverse_width).to(torch.float32)
    values = values.view(pixels.shape).to(dtype)
    channels_last = resolve_channels_last(pixels, memory_format)
    out = values.new_empty_strided(values.shape, dense_strides(values.shape, channels_last))
    return out.copy_(values)


def _standardization(
    count: int, total: int, squares: int, floor: str | float
) -> tuple[float, float, float]:
    """The mean as a sum of two floats, and one over what is divided by."""
    mean = Fraction(total, count)
    high = float(mean)
    low = float(mean - Fraction(high))
    # count**2 times the variance is a whole number; the nearest float of it.
    std = math.sqrt(float(count * squares - total * total)) / count
    least = 1 / math.sqrt(count) if isinstance(floor, str) else float(floor)
    return high, low, 1 / max(std, least)


def conv_bias_relu(
    input: torch.Tensor | np.ndarray,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    normalization: Normalization | None = None,
    input_layout: str = "NCHW",
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, UnitActivity]:
    """Do what :func:`pixfuse.conv_bias_relu` does, in float64 and rounded once at the end.

    Args:
        input: float of shape (N, C, H, W) or (C, H, W), or uint8 with a ``normalization``, which
            is then exact in float32.
        weight: (O, C / groups, kH, kW).
        bias: (O,), or None.
        stride: as ``conv2d`` takes it.
        padding: as ``conv2d`` takes it.
        dilation: as ``conv2d`` takes it.
        groups: as ``conv2d`` takes it.
        normalization: what a byte becomes.
        input_layout: ``"NCHW"`` or ``"NHWC"``.
        dtype: of the output; default that of ``weight``. ``torch.float64`` leaves out the rounding.

    Returns:
        The output, contiguous, and its activity, taken after the rounding.

    Raises:
        Nothing of its own: arguments are taken as they come.
    """
    tensor = torch.from_numpy(input) if isinstance(input, np.ndarray) else input
    values = view_as_nchw(tensor, LAYOUT_CODES[input_layout])
    if normalization is not None:
        values = _float32_values(values, normalization)
    wide_bias = None if bias is None else bias.double()
    sums = conv2d(
        values.double().contiguous(), weight.double(), wide_bias, stride, padding, dilation, groups
    )
    output = sums.to(weight.dtype if dtype is None else dtype).relu()
    batch = output if output.dim() == 4 else output.unsqueeze(0)
    fires = batch > 0
    activity = UnitActivity(
        fires.sum((0, 2, 3)),
        fires.flatten(2).any(2).sum(0),
        batch.isnan().sum((0, 2, 3)),
        batch.detach().double().sum((0, 2, 3)),
        batch.shape[0] * batch.shape[2] * batch.shape[3],
        batch.shape[0],
    )
    return output, activity


def certified_dead(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: Sequence[float],
    high: Sequence[float],
    *,
    padding: bool = False,
    groups: int = 1,
) -> torch.Tensor:
    """Do what :func:`pixfuse.certified_dead` does, in rational numbers and so without a margin.

    Args:
        weight: (O, C / groups, kH, kW), finite.
        bias: (O,), or None.
        low: C finite numbers.
        high: C finite numbers.
        padding: whether zeros enter.
        groups: into which input and output channels are split.

    Returns:
        Bool (O,): True where the largest sum, as a real number, is 0 or below.

    Raises:
        Nothing of its own: arguments are taken as they come.
    """
    outputs, inputs, height, width = weight.shape
    dead = []
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        total = Fraction(0 if bias is None else bias[o].item())
        for y in range(height):
            for x in range(width):
                tap = Fraction(0)
                for c in range(inputs):
                    w = Fraction(weight[o, c, y, x].item())
                    tap += max(w * Fraction(low[first + c]), w * Fraction(high[first + c]))
                total += max(tap, Fraction(0)) if padding else tap
        dead.append(total <= 0)
    return torch.tensor(dead)
