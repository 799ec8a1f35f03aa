"""The public functions over torch.ops: they check, document, and hand over."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from pixfuse._library import (
    CUDA_LOADED,
    CUDA_STATE,
    DTYPE_CODES,
    LAYOUT_CODES,
    MEMORY_FORMAT_CODES,
    dense_strides,
    resolve_channels_last,
    view_as_nchw,
)
from pixfuse.normalization import UNIT, Normalization

#: The largest finite value that each dtype can hold.
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPE_CODES}


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
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        transforms.v2.functional.normalize(
            transforms.v2.functional.to_dtype(images, torch.float32, scale=True), mean, std
        )

    Source:
        torchvision ``transforms.v2``; the table of roundings in :class:`pixfuse.Normalization`.
    """
    if not isinstance(images, torch.Tensor):
        images = _tensor_from_numpy(images)
    layout_code = LAYOUT_CODES.get(input_layout)
    if layout_code is None:
        raise ValueError(
            f"normalize: expected input_layout to be 'NCHW' or 'NHWC', got {input_layout!r}"
        )
    _check_images(images)
    _check_normalization(images, normalization, input_layout)
    dtype_code = DTYPE_CODES.get(dtype)
    if dtype_code is None:
        raise TypeError(
            f"normalize: expected dtype to be torch.float32, float16 or bfloat16, got {dtype}"
        )
    if normalization.largest > _LARGEST[dtype]:
        raise ValueError(
            f"normalize: expected results that fit {dtype} (up to {_LARGEST[dtype]:.6g}), got "
            f"results up to {normalization.largest:.6g}; use torch.float32 or a larger std"
        )
    memory_format_code = MEMORY_FORMAT_CODES.get(memory_format)
    if memory_format_code is None:
        raise ValueError(
            "normalize: expected memory_format to be torch.contiguous_format, channels_last or "
            f"preserve_format, got {memory_format}"
        )
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
    _check_out(out, images, layout_code, dtype, memory_format)
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


class _Writable:
    """A numpy array's memory under an interface that says writable; keeps the array alive.

    torch warns of every read-only array, although nothing here writes to it.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _tensor_from_numpy(images: object) -> torch.Tensor:
    if not isinstance(images, np.ndarray):
        hint = "; stack them first" if isinstance(images, (list, tuple)) else ""
        raise TypeError(
            "normalize: expected images to be a torch.Tensor or a numpy.ndarray, got "
            f"{type(images).__name__}{hint}"
        )
    if images.dtype != np.uint8:
        raise TypeError(_dtype_message(images.dtype))
    if any(stride < 0 for stride in images.strides):
        raise ValueError(
            f"normalize: expected images to have no negative strides, got {images.strides}; torch "
            "has none: pass numpy.ascontiguousarray(images)"
        )
    if not images.flags.writeable:
        images = np.asarray(_Writable(images))
    return torch.from_numpy(images)


def _dtype_message(dtype: object) -> str:
    return (
        f"normalize: expected images of dtype uint8, got {dtype}; pixels must still be bytes from "
        "0 to 255: convert them to float here, not before"
    )


def _check_images(images: torch.Tensor) -> None:
    if images.dtype is not torch.uint8:
        raise TypeError(_dtype_message(images.dtype))
    if images.layout is not torch.strided:
        raise NotImplementedError(
            f"normalize: expected images to be a dense tensor, got layout {images.layout}; pass "
            "images.to_dense()"
        )
    if images.ndim not in (3, 4):
        raise ValueError(
            "normalize: expected images to have 4 dimensions (a batch) or 3 (one image), got shape "
            f"{tuple(images.shape)}"
        )
    if not (images.is_cpu or (CUDA_LOADED and images.is_cuda)):
        device = images.device.type
        because = f" ({CUDA_STATE})" if device == "cuda" else ""
        raise NotImplementedError(
            "normalize: expected images on a device that has a kernel "
            f"({'cpu, cuda' if CUDA_LOADED else 'cpu'}), got {device}{because}; move them with "
            "images.cpu()"
        )


def _check_normalization(
    images: torch.Tensor, normalization: Normalization, input_layout: str
) -> None:
    if not isinstance(normalization, Normalization):
        raise TypeError(
            "normalize: expected normalization to be a pixfuse.Normalization, got "
            f"{type(normalization).__name__}; use pixfuse.Normalization(mean, std)"
        )
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


def _check_out(
    out: torch.Tensor,
    images: torch.Tensor,
    layout_code: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"normalize: expected out to be a torch.Tensor, got {type(out).__name__}")
    if out.layout is not torch.strided:
        raise NotImplementedError(
            f"normalize: expected out to be a dense tensor, got layout {out.layout}"
        )
    if out.dtype is not dtype:
        raise TypeError(f"normalize: expected out of dtype {dtype}, got {out.dtype}; pass dtype=")
    if out.device != images.device:
        raise ValueError(
            f"normalize: expected out on the device of images ({images.device}), got {out.device}"
        )
    shape: tuple[int, ...] = images.shape
    if layout_code == LAYOUT_CODES["NHWC"]:
        shape = (*shape[:-3], shape[-1], *shape[-3:-1])
    if out.shape != shape:
        raise ValueError(f"normalize: expected out of shape {tuple(shape)}, got {tuple(out.shape)}")
    if out.requires_grad:
        raise ValueError(
            "normalize: expected out not to require a gradient, got requires_grad=True; pass "
            "out.detach()"
        )
    if memory_format is not torch.contiguous_format or not out.is_contiguous():
        _check_strides(out, view_as_nchw(images, layout_code), memory_format)
    # Addresses cannot be traced; the operator asserts the same.
    if not torch.compiler.is_compiling() and _share_memory(images, out):
        raise ValueError("normalize: expected out to share no memory with images, got an overlap")


def _check_strides(
    out: torch.Tensor, nchw: torch.Tensor, memory_format: torch.memory_format
) -> None:
    expected = dense_strides(nchw.shape, resolve_channels_last(nchw, memory_format))
    if out.numel() > 0 and any(
        size > 1 and actual != wanted
        for size, actual, wanted in zip(out.shape, out.stride(), expected, strict=True)
    ):
        raise ValueError(
            f"normalize: expected out to be dense in {memory_format} with strides {expected}, got "
            f"strides {out.stride()}; pass memory_format= as out has it"
        )


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the byte ranges that two tensors span overlap."""
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    return a_begin < b_end and b_begin < a_end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    if tensor.numel() == 0:
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return begin, begin + (last + 1) * tensor.element_size()
