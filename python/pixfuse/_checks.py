"""Checks that several functions share; each error is in the words of its function."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

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
from pixfuse.normalization import Normalization, PerImageStandardization

#: The largest finite value that each dtype can hold.
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPE_CODES}


#: What to do where an image's own mean and std are asked for.
_PER_IMAGE_HINTS = {
    "normalize": "use pixfuse.standardize_per_image(images)",
    "crop_mirror_normalize": "pass dtype=torch.uint8, and the result to "
    "pixfuse.standardize_per_image, as pixfuse.Collate does",
    "denormalize": "standardized images do not say what mean and std they had",
}


def check_is_normalization(function: str, normalization: object) -> None:
    if not isinstance(normalization, Normalization):
        hint = "use pixfuse.Normalization(mean, std)"
        if isinstance(normalization, PerImageStandardization):
            hint = _PER_IMAGE_HINTS.get(function, hint)
        raise TypeError(
            f"{function}: expected normalization to be a pixfuse.Normalization, got "
            f"{type(normalization).__name__}; {hint}"
        )


def raise_too_large(function: str, normalization: Normalization, dtype: torch.dtype) -> None:
    raise ValueError(
        f"{function}: expected results that fit {dtype} (up to {LARGEST[dtype]:.6g}), got "
        f"results up to {normalization.largest:.6g}; use torch.float32 or a larger std"
    )


class _Writable:
    """A numpy array's memory under an interface that says writable; keeps the array alive.

    torch warns of every read-only array, although nothing here writes to it.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def tensor_of_array(array: np.ndarray) -> torch.Tensor:
    """The memory of an array as a tensor, without a copy, whether or not it is writable."""
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def check_choice(function: str, argument: str, value: object, choices: dict[Any, int]) -> int:
    """The number of a named option."""
    code = choices.get(value) if isinstance(value, str) else None
    if code is None:
        names = " or ".join(repr(name) for name in choices)
        raise ValueError(f"{function}: expected {argument} to be {names}, got {value!r}")
    return code


def code_of(value: Any, codes: Mapping[Any, int]) -> int | None:
    """Its number; None of what has none, also of what cannot be a key, as a list."""
    return codes.get(value) if isinstance(value, Hashable) else None


def check_dtype(function: str, dtype: torch.dtype) -> int:
    """The number of a dtype that results of floats can have."""
    code = code_of(dtype, DTYPE_CODES)
    if code is None:
        raise TypeError(
            f"{function}: expected dtype to be torch.float32, float16 or bfloat16, got {dtype}"
        )
    return code


def check_memory_format(function: str, memory_format: torch.memory_format) -> int:
    """The number of a memory format, ``torch.preserve_format`` among them."""
    code = code_of(memory_format, MEMORY_FORMAT_CODES)
    if code is None:
        raise ValueError(
            f"{function}: expected memory_format to be torch.contiguous_format, channels_last or "
            f"preserve_format, got {memory_format}"
        )
    return code


def check_device(function: str, name: str, tensor: torch.Tensor) -> None:
    """A dense tensor, on a device that has a kernel."""
    if tensor.layout is not torch.strided:
        raise NotImplementedError(
            f"{function}: expected {name} to be a dense tensor, got layout {tensor.layout}; pass "
            f"{name}.to_dense()"
        )
    if not (tensor.is_cpu or (CUDA_LOADED and tensor.is_cuda)):
        device = tensor.device.type
        because = f" ({CUDA_STATE})" if device == "cuda" else ""
        raise NotImplementedError(
            f"{function}: expected {name} on a device that has a kernel "
            f"({'cpu, cuda' if CUDA_LOADED else 'cpu'}), got {device}{because}; move them with "
            f"{name}.cpu()"
        )


def check_bytes(function: str, name: str, pixels: torch.Tensor | np.ndarray) -> None:
    """Pixels of dtype uint8; a tensor of them dense, on a device that has a kernel."""
    is_tensor = isinstance(pixels, torch.Tensor)
    are_bytes = pixels.dtype is torch.uint8 if is_tensor else pixels.dtype == np.uint8
    if not are_bytes:
        raise TypeError(
            f"{function}: expected {name} of dtype uint8, got {pixels.dtype}; pixels must still be "
            "bytes from 0 to 255: convert them to float here, not before"
        )
    if is_tensor:
        check_device(function, name, pixels)  # type: ignore[arg-type]


def tensor_of_images(function: str, images: object) -> torch.Tensor:
    """A batch or image as a tensor; of an array's memory without a copy."""
    if isinstance(images, torch.Tensor):
        return images
    if not isinstance(images, np.ndarray):
        hint = "; stack them first" if isinstance(images, (list, tuple)) else ""
        raise TypeError(
            f"{function}: expected images to be a torch.Tensor or a numpy.ndarray, got "
            f"{type(images).__name__}{hint}"
        )
    check_bytes(function, "images", images)
    if any(stride < 0 for stride in images.strides):
        raise ValueError(
            f"{function}: expected images to have no negative strides, got {images.strides}; torch "
            "has none: pass images.copy()"
        )
    return tensor_of_array(images)


def check_images(function: str, images: object, input_layout: str) -> tuple[torch.Tensor, int]:
    """A uint8 batch or image as a tensor, and the number of its layout."""
    # A call on a small image takes little longer than these checks: the usual case comes first.
    tensor = images if isinstance(images, torch.Tensor) else tensor_of_images(function, images)
    layout_code = check_choice(function, "input_layout", input_layout, LAYOUT_CODES)
    check_bytes(function, "images", tensor)
    if tensor.ndim not in (3, 4):
        raise ValueError(
            f"{function}: expected images to have 4 dimensions (a batch) or 3 (one image), got "
            f"shape {tuple(tensor.shape)}"
        )
    return tensor, layout_code


def check_inference(function: str, out: object) -> None:
    """An ``out`` that may be written now: as torch, which raises a RuntimeError too."""
    is_inference = isinstance(out, torch.Tensor) and out.is_inference()
    if is_inference and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{function}: expected out to be an ordinary tensor, got one that was made in "
            "torch.inference_mode; write to it there, or pass out.clone()"
        )


def check_out(
    function: str,
    out: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    source: str = "images",
    dtype_hint: str = "; pass dtype=",
    shape_hint: str = "",
) -> None:
    """All of a caller's output but its strides and where it lies; ``source`` is the input."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{function}: expected out to be a torch.Tensor, got {type(out).__name__}")
    if out.layout is not torch.strided:
        raise NotImplementedError(
            f"{function}: expected out to be a dense tensor, got layout {out.layout}"
        )
    if out.dtype is not dtype:
        raise TypeError(f"{function}: expected out of dtype {dtype}, got {out.dtype}{dtype_hint}")
    if out.device != device:
        raise ValueError(
            f"{function}: expected out on the device of {source} ({device}), got {out.device}"
        )
    if out.shape != shape:
        raise ValueError(
            f"{function}: expected out of shape {tuple(shape)}{shape_hint}, got {tuple(out.shape)}"
        )
    if out.requires_grad:
        raise ValueError(
            f"{function}: expected out not to require a gradient, got requires_grad=True; pass "
            "out.detach()"
        )
    if not torch.compiler.is_compiling():
        check_inference(function, out)


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


def check_float_out(
    function: str,
    out: torch.Tensor,
    images: torch.Tensor,
    layout_code: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """A caller's output for the floats that a batch or image becomes."""
    shape: tuple[int, ...] = images.shape
    if layout_code == LAYOUT_CODES["NHWC"]:
        shape = (*shape[:-3], shape[-1], *shape[-3:-1])
    check_out(function, out, shape, dtype, images.device)
    if memory_format is torch.preserve_format or not out.is_contiguous(memory_format=memory_format):
        nchw = view_as_nchw(images, layout_code)
        strides = dense_strides(nchw.shape, resolve_channels_last(nchw, memory_format))
        check_strides(function, out, strides, memory_format)
    # Addresses cannot be traced; the operators assert the same.
    if not torch.compiler.is_compiling() and share_memory(images, out):
        raise ValueError(f"{function}: expected out to share no memory with images, got an overlap")


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
