"""Counts and sums of pixels, pixels standardized by them, and the way back to pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pixfuse._library import LAYOUT_CODES
from pixfuse._pixel_checks import check_images, is_pillow, read_image

#: A batch, an image, or a list of images of any sizes (Pillow images are not named: optional).
Images = torch.Tensor | np.ndarray | Sequence[Any]


def channel_histogram(
    images: Images, input_layout: Literal["NCHW", "NHWC"] = "NCHW"
) -> torch.Tensor:
    """Count how often each byte value occurs in each channel.

    Formula: ``counts[c, v]`` is the number of pixels whose channel ``c`` is ``v``, over all images.
    Whole numbers: exact, and the same for any order, batch size, thread count and device.

    Args:
        images: a uint8 tensor (CPU or CUDA) or numpy array, values 0 to 255, of shape (N, C, H, W)
            or (C, H, W), with ``input_layout="NHWC"`` of shape (N, H, W, C) or (H, W, C), of any
            strides, read in place; or a list or tuple of images of any sizes and one channel
            count: Pillow images, arrays (H, W) or (H, W, C), tensors (C, H, W). Pillow converts
            modes 1 to L, P to RGB (RGBA with transparency), PA, LA, La and RGBa to RGBA, CMYK,
            YCbCr, LAB and HSV to RGB; an array with negative strides is copied first.
        input_layout: the order of the dimensions of a batch or image; a list has its own, above.

    Returns:
        An int64 tensor of shape (C, 256), contiguous, on the device of ``images``.

    Raises:
        TypeError: a wrong type, dtype or Pillow mode.
        ValueError: a wrong shape or layout, a list that is empty or mixes channel counts or
            devices.
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.movedim(-3, 0)])

    Source:
        numpy ``bincount``, OpenCV ``calcHist``. The CUDA kernel has not yet run on a GPU.
    """
    if not _is_list(images):
        tensor, layout_code = check_images("channel_histogram", images, input_layout)
        return torch.ops.pixfuse.channel_histogram.default(  # type: ignore[no-any-return]
            tensor, layout_code
        )
    counts: torch.Tensor | None = None
    for pixels in _read_list("channel_histogram", images, input_layout):
        found = torch.ops.pixfuse.channel_histogram.default(pixels, LAYOUT_CODES["NCHW"])
        counts = found if counts is None else counts.add_(found)
    assert counts is not None  # an empty list is an error
    return counts


def image_moments(
    images: Images, input_layout: Literal["NCHW", "NHWC"] = "NCHW"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the pixels of each channel of each image, and their squares, exactly.

    Formula: ``sums[n, c]`` is the sum of ``x`` and ``squares[n, c]`` that of ``x * x`` over the
    pixels of channel ``c`` of image ``n``, in the units of 0 to 255. Whole numbers: exact, and the
    same for any order, thread count and device; they hold any image of less than 2**47 pixels. With
    ``p`` pixels, the mean is ``sums / p`` and the variance ``(p * squares - sums**2) / p**2``.

    Args:
        images: a uint8 tensor (CPU or CUDA) or numpy array, values 0 to 255, of shape (N, C, H, W)
            or (C, H, W), with ``input_layout="NHWC"`` of shape (N, H, W, C) or (H, W, C), of any
            strides, read in place; or a list or tuple of images of any sizes and one channel
            count, as in :func:`pixfuse.channel_histogram`.
        input_layout: the order of the dimensions of a batch or image; a list has its own.

    Returns:
        Two int64 tensors of shape (N, C), contiguous, on the device of ``images``: sums and sums
        of squares. N is 1 for one image.

    Raises:
        TypeError: a wrong type, dtype or Pillow mode.
        ValueError: a wrong shape or layout, a list that is empty or mixes channel counts or
            devices.
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        (images.long().sum((-2, -1)).view(-1, images.shape[-3]),
         images.long().square().sum((-2, -1)).view(-1, images.shape[-3]))

    Source:
        The definitions of mean and variance. The CUDA kernel has not yet run on a GPU.
    """
    if not _is_list(images):
        tensor, layout_code = check_images("image_moments", images, input_layout)
        return torch.ops.pixfuse.image_moments.default(  # type: ignore[no-any-return]
            tensor, layout_code
        )
    found = [
        torch.ops.pixfuse.image_moments.default(pixels, LAYOUT_CODES["NCHW"])
        for pixels in _read_list("image_moments", images, input_layout)
    ]
    return torch.cat([sums for sums, _ in found]), torch.cat([squares for _, squares in found])


def _is_list(images: object) -> bool:
    return isinstance(images, (list, tuple))


def _read_list(function: str, images: Any, input_layout: str) -> Iterator[torch.Tensor]:
    """Each image of a list as (C, H, W), after what has to hold for all of them."""
    if input_layout != "NCHW":
        raise ValueError(
            f"{function}: expected no input_layout with a list, got {input_layout!r}; arrays in a "
            "list are (H, W, C) and tensors (C, H, W)"
        )
    if len(images) == 0:
        raise ValueError(f"{function}: expected images to have at least 1 image, got none")
    first: torch.Tensor | None = None
    for index, image in enumerate(images):
        pixels = read_image(function, image, index)
        if first is None:
            first = pixels
        if pixels.shape[0] != first.shape[0]:
            hint = '; convert it, e.g. image.convert("RGB")' if is_pillow(image) else ""
            raise ValueError(
                f"{function}: expected images of one channel count, got {first.shape[0]} in "
                f"images[0] and {pixels.shape[0]} in images[{index}]{hint}"
            )
        if pixels.device != first.device:
            raise ValueError(
                f"{function}: expected images on one device, got {first.device} for images[0] and "
                f"{pixels.device} for images[{index}]"
            )
        yield pixels
