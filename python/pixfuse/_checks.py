"""Checks that several functions share; each names the function that it speaks for."""

from __future__ import annotations

from typing import Any

import torch

from pixfuse._library import DTYPE_CODES
from pixfuse.normalization import Normalization

#: The largest finite value that each dtype can hold.
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPE_CODES}


def check_is_normalization(function: str, normalization: object) -> None:
    if not isinstance(normalization, Normalization):
        raise TypeError(
            f"{function}: expected normalization to be a pixfuse.Normalization, got "
            f"{type(normalization).__name__}; use pixfuse.Normalization(mean, std)"
        )


def raise_too_large(function: str, normalization: Normalization, dtype: torch.dtype) -> None:
    raise ValueError(
        f"{function}: expected results that fit {dtype} (up to {LARGEST[dtype]:.6g}), got "
        f"results up to {normalization.largest:.6g}; use torch.float32 or a larger std"
    )


def check_out(
    function: str,
    out: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """All of a caller's output but its strides and where it lies."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{function}: expected out to be a torch.Tensor, got {type(out).__name__}")
    if out.layout is not torch.strided:
        raise NotImplementedError(
            f"{function}: expected out to be a dense tensor, got layout {out.layout}"
        )
    if out.dtype is not dtype:
        raise TypeError(f"{function}: expected out of dtype {dtype}, got {out.dtype}; pass dtype=")
    if out.device != device:
        raise ValueError(
            f"{function}: expected out on the device of images ({device}), got {out.device}"
        )
    if out.shape != shape:
        raise ValueError(
            f"{function}: expected out of shape {tuple(shape)}, got {tuple(out.shape)}"
        )
    if out.requires_grad:
        raise ValueError(
            f"{function}: expected out not to require a gradient, got requires_grad=True; pass "
            "out.detach()"
        )


def check_strides(
    function: str,
    out: torch.Tensor,
    expected: tuple[Any, ...],
    memory_format: torch.memory_format,
) -> None:
    if out.numel() > 0 and any(
        size > 1 and actual != wanted
        for size, actual, wanted in zip(out.shape, out.stride(), expected, strict=True)
    ):
        raise ValueError(
            f"{function}: expected out to be dense in {memory_format} with strides {expected}, got "
            f"strides {out.stride()}; pass memory_format= as out has it"
        )


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the byte ranges that two tensors span overlap."""
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    return a_begin < b_end and b_begin < a_end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return begin, begin + tensor.nbytes
    if tensor.numel() == 0:
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return begin, begin + (last + 1) * tensor.element_size()
