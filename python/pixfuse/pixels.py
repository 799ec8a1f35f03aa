"""Counts and sums of pixels, pixels standardized by them, and the way back to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch

from pixfuse import _images
from pixfuse._checks import (
    check_choice,
    check_device,
    check_dtype,
    check_float_out,
    check_images,
    check_is_normalization,
    check_memory_format,
    check_out,
    share_memory,
)
from pixfuse._image_input import _pillow_exports_memory, read_list
from pixfuse._library import DTYPE_CODES, LAYOUT_CODES, nhwc_shape
from pixfuse.normalization import Normalization, least_std_of

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
    listed = _read_list("channel_histogram", images, input_layout)
    if not isinstance(listed, list):
        return torch.from_numpy(listed.channel_histogram(each=False))
    counts: torch.Tensor | None = None
    for pixels in listed:
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
    listed = _read_list("image_moments", images, input_layout)
    if not isinstance(listed, list):
        sums, squares = torch.from_numpy(listed.image_moments())
        return sums, squares
    found = [
        torch.ops.pixfuse.image_moments.default(pixels, LAYOUT_CODES["NCHW"]) for pixels in listed
    ]
    return torch.cat([sums for sums, _ in found]), torch.cat([squares for _, squares in found])


@overload
def denormalize(
    tensor: torch.Tensor,
    normalization: Normalization,
    *,
    output_layout: Literal["NCHW", "NHWC"] = ...,
    out: torch.Tensor | None = ...,
    return_counts: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def denormalize(
    tensor: torch.Tensor,
    normalization: Normalization,
    *,
    output_layout: Literal["NCHW", "NHWC"] = ...,
    out: torch.Tensor | None = ...,
    return_counts: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def denormalize(
    tensor: torch.Tensor,
    normalization: Normalization,
    *,
    output_layout: Literal["NCHW", "NHWC"] = "NCHW",
    out: torch.Tensor | None = None,
    return_counts: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Turn normalized floats back into uint8 pixels in one pass over memory.

    Formula: ``y = x * f32(255 * std[c]) + f32(255 * mean[c])`` in float32, the product and the sum
    each rounded; then clamped to 0 to 255 and rounded to the nearest whole number, half to even. A
    NaN becomes 0, an infinity 0 or 255. 16-bit values are widened first, which is exact. The same
    input gives the same bits on every instruction set, thread count, layout and device.

    ``denormalize(normalize(images, n), n)`` is ``images``, for all 256 values, every preset and
    every rounding, in float32: the tests try them all. In bfloat16 a few values of some presets
    come back as a neighbour: ``docs/round_trip.md`` says which.

    Args:
        tensor: float32, float16 or bfloat16 (CPU or CUDA), of shape (N, C, H, W) or (C, H, W), in
            the units of ``normalization``; any values and any strides; read in place. Gradients end
            here.
        normalization: what the pixels became, e.g. ``pixfuse.SIGNED`` for tanh outputs and
            ``pixfuse.UNIT`` for sigmoid outputs. Its rounding does not matter on the way back.
        output_layout: the order of the dimensions of the result, ``"NCHW"`` or ``"NHWC"``.
        out: where to write: a contiguous uint8 tensor of the result's shape and device that shares
            no memory with ``tensor``.
        return_counts: whether to count too, see below.

    Returns:
        A contiguous uint8 tensor of shape (N, C, H, W) or (C, H, W), with ``output_layout="NHWC"``
        of (N, H, W, C) or (H, W, C), on the device of ``tensor``; ``out`` if given. With
        ``return_counts`` a pair of it and an int64 tensor of shape (2,): how many finite values
        were clamped, since they round to a whole number outside of 0 to 255, and how many values
        were not finite.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, layout or channel count, or an ``out`` that does not fit.
        RuntimeError: an ``out`` made in ``torch.inference_mode``, outside of it.
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        torch.nan_to_num(tensor.float() * scale + offset, nan=0).clamp(0, 255).round().byte()

    with ``scale = torch.tensor([255 * s for s in normalization.std]).view(-1, 1, 1)`` and
    ``offset = torch.tensor([255 * m for m in normalization.mean]).view(-1, 1, 1)``.

    Source:
        The inverse of :func:`pixfuse.normalize`. The CUDA kernel has not yet run on a GPU.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"denormalize: expected tensor to be a torch.Tensor, got {type(tensor).__name__}"
        )
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(
            "denormalize: expected tensor of dtype torch.float32, float16 or bfloat16, got "
            f"{tensor.dtype}"
        )
    check_device("denormalize", "tensor", tensor)
    if tensor.ndim not in (3, 4):
        raise ValueError(
            "denormalize: expected tensor of shape (N, C, H, W) or (C, H, W), got "
            f"{tuple(tensor.shape)}"
        )
    check_is_normalization("denormalize", normalization)
    count = len(normalization.mean)
    if count not in (1, tensor.shape[-3]):
        raise ValueError(
            f"denormalize: expected tensor of {count} channels, as mean and std have {count} "
            f"values, got {tensor.shape[-3]} channels in shape {tuple(tensor.shape)}"
        )
    layout_code = check_choice("denormalize", "output_layout", output_layout, LAYOUT_CODES)
    tensor = tensor.detach()
    if out is None:
        result, counts = torch.ops.pixfuse.denormalize.default(
            tensor, normalization.mean, normalization.std, layout_code, return_counts
        )
        return (result, counts) if return_counts else result
    _check_bytes_out(out, tensor, output_layout)
    counts = torch.ops.pixfuse.denormalize_out.default(
        tensor, normalization.mean, normalization.std, layout_code, return_counts, out
    )
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as torch's own functions with out= do
    return (out, counts) if return_counts else out


def standardize_per_image(
    images: torch.Tensor | np.ndarray,
    per_channel: bool = False,
    floor: Literal["tensorflow"] | float = "tensorflow",
    input_layout: Literal["NCHW", "NHWC"] = "NCHW",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bring every image to mean 0 and std 1, by its own mean and std.

    Formula: ``(x - mean) / max(std, floor)``, with the mean and std (over all values, not one less)
    of all values of the image, or of each channel. The sums are whole numbers, so nothing cancels
    and their order does not matter. From them, in float64 and each step rounded: ``std =
    sqrt(f64(n * sum(x**2) - sum(x)**2)) / n`` of ``n`` values, and ``((x - f64(mean)) - rest) * (1
    / max(std, floor))`` with the rest of the mean that its float64 drops; then rounded to float32:
    the nearest float32, but where the real number is within a relative 2**-50 of the middle between
    two. The same bits on every instruction set, thread count, layout, batch and device.

    The floor keeps the noise of a flat image from being blown up: without one, a sky whose pixels
    differ by 1 would get the contrast of a photograph, and a single color would be divided by 0.
    The picture is in ``docs/per_image.md``. :class:`pixfuse.PerImageStandardization` asks
    ``Collate``, ``DeviceLoader`` and ``transforms`` for the same.

    Args:
        images: uint8 tensor (CPU or CUDA) or numpy array, values 0 to 255, of shape (N, C, H, W) or
            (C, H, W); with ``input_layout="NHWC"`` of shape (N, H, W, C) or (H, W, C). Any
            strides; read in place.
        per_channel: False: one mean and std for all channels of an image, which keeps its colors;
            True: one of each channel, which balances them.
        floor: the least std to divide by, in units of 0 to 255: ``"tensorflow"`` for
            ``1 / sqrt(n)``, which changes single-colored images and next to nothing else; or a
            number above 0, e.g. 1.0 to leave differences of less than a step of the bytes small.
        input_layout: the order of the dimensions of ``images``, ``"NCHW"`` or ``"NHWC"``.
        dtype: ``torch.float32``, or ``torch.float16`` or ``torch.bfloat16``: the float32 result
            rounded once, half to even.
        memory_format: of the result: ``torch.contiguous_format``, ``torch.channels_last`` (for
            3 dimensions too: the channels of a pixel side by side), or ``torch.preserve_format``
            (channels-last when the channels of ``images`` lie side by side).
        out: where to write: a tensor of the result's shape, dtype, device and memory format that
            shares no memory with ``images`` and does not require a gradient.

    Returns:
        A tensor of shape (N, C, H, W) or (C, H, W), of ``dtype``, dense in ``memory_format``, on
        the device of ``images``; ``out`` if given.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, layout, floor or memory format, or an ``out`` that does not fit.
        RuntimeError: an ``out`` made in ``torch.inference_mode``, outside of it.
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        x = images.double().flatten(-3)
        x = x - x.mean(-1, keepdim=True)
        std = x.square().mean(-1, keepdim=True).sqrt()
        x = (x / std.clamp(min=x.shape[-1] ** -0.5)).view(images.shape).float()

    up to the last bit.

    Source:
        TensorFlow ``tf.image.per_image_standardization``, which computes in float32. The CUDA
        kernels have not yet run on a GPU.
    """
    name = "standardize_per_image"
    tensor, layout_code = check_images(name, images, input_layout)
    least = least_std_of(name, per_channel, floor)
    dtype_code = check_dtype(name, dtype)
    memory_format_code = check_memory_format(name, memory_format)
    if out is None:
        return torch.ops.pixfuse.standardize_per_image.default(  # type: ignore[no-any-return]
            tensor, per_channel, least, layout_code, dtype_code, memory_format_code
        )
    check_float_out(name, out, tensor, layout_code, dtype, memory_format)
    torch.ops.pixfuse.standardize_per_image_out.default(
        tensor, per_channel, least, layout_code, out
    )
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as torch's own functions with out= do
    return out


def _check_bytes_out(out: torch.Tensor, tensor: torch.Tensor, output_layout: str) -> None:
    shape = nhwc_shape(tensor.shape) if output_layout == "NHWC" else tuple(tensor.shape)
    because = f", as output_layout is {output_layout!r}"
    check_out("denormalize", out, shape, torch.uint8, tensor.device, "tensor", "", because)
    if not out.is_contiguous():
        raise ValueError(f"denormalize: expected out to be contiguous, got strides {out.stride()}")
    # Addresses cannot be traced; the operator asserts the same.
    if not torch.compiler.is_compiling() and share_memory(tensor, out):
        raise ValueError("denormalize: expected out to share no memory with tensor, got an overlap")


def _is_list(images: object) -> bool:
    return isinstance(images, (list, tuple))


def _read_list(
    function: str, images: Any, input_layout: str
) -> _images.ImageList | list[torch.Tensor]:
    """A list of images, after what has to hold for all of them."""
    if input_layout != "NCHW":
        raise ValueError(
            f"{function}: expected no input_layout with a list, got {input_layout!r}; arrays in a "
            "list are (H, W, C) and tensors (C, H, W)"
        )
    return read_list(function, images)


def count_each(
    function: str, images: Images, input_layout: Literal["NCHW", "NHWC"]
) -> np.ndarray | None:
    """The histograms of each image of a list, int64 (N, C, 256); None where two operators count."""
    if not _is_list(images):
        return None
    listed = _read_list(function, images, input_layout)
    return None if isinstance(listed, list) else listed.channel_histogram(each=True)


def image_counter() -> _images.ImageCounter:
    """What counts Pillow images one by one, as they are decoded."""
    return _images.ImageCounter(_pillow_exports_memory())
