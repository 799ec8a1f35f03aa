"""The public functions over torch.ops: they check, document, and hand over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from pixfuse._checks import (
    LARGEST,
    check_dtype,
    check_float_out,
    check_images,
    check_inference,
    check_is_normalization,
    check_memory_format,
    check_out,
    check_strides,
    code_of,
    raise_too_large,
    share_memory,
)
from pixfuse._image_input import Images, read_images
from pixfuse._images import normalize_small
from pixfuse._library import (
    ELEMENT_CODES,
    MEMORY_FORMAT_CODES,
    dense_strides,
)
from pixfuse._placement import placements_of, resolve_channels, resolve_size
from pixfuse.normalization import UNIT, Normalization, is_unordered

# The addresses of float32 elements are to fit 64 bits.
_MOST_ELEMENTS = 2**61 - 1


def normalize(
    images: torch.Tensor | np.ndarray,
    normalization: Normalization = UNIT,
    *,
    input_layout: Literal["NCHW", "NHWC"] = "NCHW",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convert uint8 images to normalized floats in one pass over memory.

    Formula: ``(x / 255 - mean[c]) / std[c]``, with the steps and roundings that
    ``normalization.rounding`` names (see :class:`pixfuse.Normalization`). The same input gives the
    same bits on every instruction set, thread count, layout, batch size and device.

    Args:
        images: uint8 tensor (CPU or CUDA) or numpy array, values 0 to 255, of shape (N, C, H, W) or
            (C, H, W); with ``input_layout="NHWC"`` of shape (N, H, W, C) or (H, W, C). Any
            strides; read in place, never copied.
        normalization: mean and std per channel, in units of [0, 1], and a rounding. Presets:
            ``pixfuse.UNIT`` [0, 1], ``pixfuse.SIGNED`` [-1, 1], ``pixfuse.IMAGENET`` and others.
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
        ValueError: a wrong shape, layout, channel count, memory format or range, or an ``out``
            that does not fit.
        RuntimeError: an ``out`` made in ``torch.inference_mode``, outside of it.
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        transforms.v2.functional.normalize(
            transforms.v2.functional.to_dtype(images, torch.float32, scale=True), mean, std
        )

    Source:
        torchvision ``transforms.v2``; the table of roundings in :class:`pixfuse.Normalization`.
    """
    if not torch.compiler.is_compiling():
        if out is not None:
            check_inference("normalize", out)
        result = normalize_small(images, normalization, input_layout, dtype, memory_format, out)
        if result is not None:
            return result
    images, layout_code = check_images("normalize", images, input_layout)
    _check_normalization(images, normalization, input_layout)
    dtype_code = check_dtype("normalize", dtype)
    if normalization.largest > LARGEST[dtype]:
        raise_too_large("normalize", normalization, dtype)
    memory_format_code = check_memory_format("normalize", memory_format)
    if out is None:
        return torch.ops.pixfuse.normalize.default(  # type: ignore[no-any-return]
            images,
            normalization.mean,
            normalization.std,
            normalization.rounding_code,
            layout_code,
            dtype_code,
            memory_format_code,
        )
    check_float_out("normalize", out, images, layout_code, dtype, memory_format)
    torch.ops.pixfuse.normalize_out.default(
        images,
        normalization.mean,
        normalization.std,
        normalization.rounding_code,
        layout_code,
        out,
    )
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as torch's own functions with out= do
    return out


def _check_normalization(
    images: torch.Tensor, normalization: Normalization, input_layout: str
) -> None:
    check_is_normalization("normalize", normalization)
    count = len(normalization.mean)
    if count == 1:
        return
    channel_dim, other_dim, other = (-3, -1, "NHWC") if input_layout == "NCHW" else (-1, -3, "NCHW")
    if images.shape[channel_dim] != count:
        hint = (
            f'; the shape fits input_layout="{other}"' if images.shape[other_dim] == count else ""
        )
        raise ValueError(
            f"normalize: expected images of {count} channels, as mean and std have {count} values, "
            f"got {images.shape[channel_dim]} channels in {input_layout} shape "
            f"{tuple(images.shape)}{hint}"
        )


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
    out_of_bounds: Literal["error", "pad"] = "error",
    fill: float | Sequence[float] = 0.0,
    fill_space: Literal["input", "output"] = "input",
    return_mask: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: torch.Tensor | None = None,
) -> Any:
    """Bring images to one normalized batch, cropped and mirrored, in one pass over memory.

    Formula: ``out[n, c, y, x] = (images[n][c, top + y, left + x] / 255 - mean[c]) / std[c]``, with
    the steps and roundings that ``normalization.rounding`` names (see
    :class:`pixfuse.Normalization`); ``x`` counts from the right where ``mirror[n]``, ``y`` from
    below where ``flip[n]``. The window is cut first and then turned, its padding with it. The same
    images give the same bits wherever they come from, however they lie in memory, on every
    instruction set, thread count and device.

    ===================== ======= ==========================================================
    Pillow mode           becomes how
    ===================== ======= ==========================================================
    L, RGB, RGBA          1, 3, 4 read in place (Pillow 13.0 or later), else one copy
    RGBX                  3       likewise; the fourth byte is padding
    1                     1       ``convert("L")``
    P                     3       ``convert("RGB")``; with transparency 4, ``convert("RGBA")``
    LA, La, PA, RGBa      4       ``convert("RGBA")`` (La by way of LA)
    CMYK, YCbCr, LAB, HSV 3       ``convert("RGB")``
    I, I;16, F and others refused they hold more than bytes: convert them yourself
    ===================== ======= ==========================================================

    Args:
        images: a list or tuple of images, mixed freely: Pillow images (table above), uint8 numpy
            arrays (H, W) or (H, W, C) of any strides, negative ones too, uint8 CPU tensors
            (C, H, W); or of CUDA tensors on one device; or one tensor (N, C, H, W) on CPU or CUDA.
            Values 0 to 255. Never written; copied only where the table says so.
        size: of the result in pixels: an int for a square, or (height, width). None: that of the
            images, which must be one.
        normalization: mean and std per channel, in units of [0, 1], and a rounding.
        anchor: where a window lies: (vertical, horizontal) from 0 (top, left) to 1 (bottom, right),
            or one pair per image: a sequence, array or tensor (N, 2). The first row is
            ``anchor * (image height - height)``, rounded half to even, or towards 0 where that is
            below 0; so (0.5, 0.5) is torchvision's ``center_crop``. (DALI rounds halves away
            from 0.)
        top: first row of the window in pixels, an int or one per image, in the place of
            ``anchor``; together with ``left``.
        left: first column of the window in pixels, likewise.
        mirror: whether to turn left and right around, a bool or one per image.
        flip: whether to turn top and bottom around, a bool or one per image.
        channels: of the result. None: all images have the same number, except that images of 1
            channel are repeated where the others have 3. 3: images of 1 channel are repeated, and
            of 4 channels (RGBA) the last is dropped. Any other: images have that number, or 1,
            which is repeated.
        out_of_bounds: ``"error"``: a window that leaves its image is one; ``"pad"``: what lies
            outside becomes ``fill``.
        fill: a number, or one per channel.
        fill_space: ``"input"``: ``fill`` is in units of pixels, 0 to 255, fractions too, and goes
            through the arithmetic as a byte would; ``"output"``: it is a result, rounded to
            ``dtype``.
        return_mask: whether to return which pixels came from an image, too.
        dtype: ``torch.float32``, or ``torch.float16`` or ``torch.bfloat16``: the float32 result
            rounded once, half to even; or ``torch.uint8``: the bytes as they are, without
            ``normalization``, and with a whole number as ``fill``.
        memory_format: of the result, ``torch.contiguous_format`` or ``torch.channels_last``.
        out: where to write: a tensor of the result's shape, dtype, device and memory format that
            shares no memory with ``images`` and does not require a gradient.

    Returns:
        A tensor (N, C, height, width) of ``dtype``, dense in ``memory_format``, on the device of
        ``images``; ``out`` if given. With ``return_mask`` a pair: that tensor, and a bool tensor
        (N, height, width), True where the pixel came from an image.

    Raises:
        TypeError: a wrong type or dtype, a Pillow mode without a rule.
        ValueError: a wrong shape, size, channel count, memory format, range or number of values, a
            window that leaves its image, or an ``out`` that does not fit. What is wrong with one
            image names it as ``images[i]``.
        OSError: a file that Pillow cannot read to its end.
        RuntimeError: an ``out`` made in ``torch.inference_mode``, outside of it.
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        torch.stack([
            transforms.v2.functional.normalize(
                transforms.v2.functional.to_dtype(
                    transforms.v2.functional.center_crop(
                        transforms.v2.functional.to_image(image), size
                    ),
                    torch.float32,
                    scale=True,
                ),
                mean,
                std,
            )
            for image in images
        ])

    Source:
        DALI ``crop_mirror_normalize``, torchvision ``transforms.v2``; the table of roundings in
        :class:`pixfuse.Normalization`.
    """
    source = read_images(images)
    count = source.count
    channel_count = resolve_channels(source, channels)
    height, width = resolve_size(source, size)
    placements = placements_of(
        source, (height, width), anchor, top, left, mirror, flip, out_of_bounds
    )
    code = code_of(dtype, ELEMENT_CODES)
    if code is None:
        raise TypeError(
            "crop_mirror_normalize: expected dtype to be torch.float32, float16, bfloat16 or "
            f"uint8, got {dtype}"
        )
    _check_crop_normalization(normalization, channel_count, dtype)
    fills = _fill_values(fill, fill_space, channel_count, dtype)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "crop_mirror_normalize: expected memory_format to be torch.contiguous_format or "
            f"channels_last, got {memory_format}"
        )
    shape = (count, channel_count, height, width)
    if not torch.compiler.is_compiling() and math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(
            "crop_mirror_normalize: expected a result that fits in memory, got one of shape "
            f"{shape}"
        )
    strides = dense_strides(shape, memory_format is torch.channels_last)
    if out is not None:
        check_out("crop_mirror_normalize", out, shape, dtype, source.device)
        check_strides("crop_mirror_normalize", out, strides, memory_format)
    constants = (
        normalization.mean if dtype is not torch.uint8 else (0.0,),
        normalization.std if dtype is not torch.uint8 else (1.0,),
        normalization.rounding_code,
        fills,
        fill_space == "output",
    )
    if source.memory is None and out is None:
        made, mask = torch.ops.pixfuse.crop_mirror_normalize.default(
            source.tensors,
            placements,
            channel_count,
            height,
            width,
            *constants,
            code,
            MEMORY_FORMAT_CODES[memory_format],
            return_mask,
        )
        return (made, mask) if return_mask else made

    mask = None
    if return_mask:
        mask = torch.empty((count, height, width), dtype=torch.bool, device=source.device)
    result = out
    if source.memory is None:
        assert result is not None
        _check_apart(source, result)
        torch.ops.pixfuse.crop_mirror_normalize_out.default(
            source.tensors, placements, channel_count, *constants, result, mask
        )
    else:
        if result is None:
            result = torch.ops.pixfuse.empty_output.default(shape, strides, code)
        source.memory.crop_mirror_normalize(
            placements.numpy(),
            channel_count,
            height,
            width,
            *constants,
            code,
            result.data_ptr(),
            strides,
            0 if mask is None else mask.data_ptr(),
        )
    if out is not None and not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as torch's own functions with out= do
    return result if mask is None else (result, mask)


def _check_crop_normalization(
    normalization: Normalization, channels: int, dtype: torch.dtype
) -> None:
    check_is_normalization("crop_mirror_normalize", normalization)
    if dtype is torch.uint8:
        return
    count = len(normalization.mean)
    if count != 1 and count != channels:  # noqa: PLR1714 (`in` does not see symbols of torch.compile)
        hint = f"; pass channels={count}" if channels == 1 or (channels, count) == (4, 3) else ""
        raise ValueError(
            f"crop_mirror_normalize: expected images of {count} channels, as mean and std have "
            f"{count} values, got {channels}{hint}"
        )
    if normalization.largest > LARGEST[dtype]:
        raise_too_large("crop_mirror_normalize", normalization, dtype)


def _fill_values(fill: Any, space: str, channels: int, dtype: torch.dtype) -> tuple[float, ...]:
    """One value for every channel, or one per channel."""
    name = "crop_mirror_normalize"
    if space not in ("input", "output"):
        raise ValueError(f"{name}: expected fill_space to be 'input' or 'output', got {space!r}")
    if isinstance(fill, (int, float)):
        values: tuple[float, ...] = (float(fill),)
    else:
        try:
            if isinstance(fill, (str, bytes)) or is_unordered(fill):
                raise TypeError
            scalar = getattr(fill, "ndim", 1) == 0
            values = (float(fill),) if scalar else tuple(float(v) for v in fill)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}: expected fill to be a number or one number per channel, got {fill!r}"
            ) from None
    if len(values) != 1 and len(values) != channels:
        raise ValueError(
            f"{name}: expected fill to have 1 value or one per channel ({channels}), got "
            f"{len(values)}"
        )
    if dtype is torch.uint8 and space == "output":
        raise ValueError(
            f"{name}: expected fill_space to be 'input' for torch.uint8, got 'output'; its results "
            "are pixels"
        )
    for value in values:
        if not abs(value) < math.inf:  # infinite or no number
            raise ValueError(f"{name}: expected fill to be finite, got {value}")
        if space == "input" and not 0 <= value <= 255:
            raise ValueError(
                f'{name}: expected fill from 0 to 255, got {value}; fill_space="output" takes '
                "results"
            )
        if dtype is torch.uint8 and value != int(value):
            raise ValueError(
                f"{name}: expected fill to be a whole number for torch.uint8, got {value}"
            )
        if space == "output" and abs(value) > LARGEST[dtype]:
            raise ValueError(
                f"{name}: expected fill to fit {dtype} (up to {LARGEST[dtype]:.6g}), got {value}"
            )
    return values


def _check_apart(source: Images, out: torch.Tensor) -> None:
    # Addresses cannot be traced; the operator asserts the same.
    if torch.compiler.is_compiling():
        return
    for n, tensor in enumerate(source.tensors):
        if share_memory(tensor, out):
            where = "images" if tensor.ndim == 4 else f"images[{n}]"
            raise ValueError(
                "crop_mirror_normalize: expected out to share no memory with images, got an "
                f"overlap with {where}"
            )
