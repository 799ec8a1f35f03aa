"""The pure-torch twin of every function: what the kernels are compared with, bit for bit.

Written for reading, not for speed: each rounding is spelled out step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch

from pixfuse._library import LAYOUT_CODES, dense_strides, resolve_channels_last, view_as_nchw
from pixfuse.normalization import UNIT, Normalization


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


def _float32_values(pixels: torch.Tensor, normalization: Normalization) -> torch.Tensor:
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
