"""What several functions ask of their arguments, each error in the words of its function."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from pixfuse._library import CUDA_LOADED, CUDA_STATE, LAYOUT_CODES

#: What Pillow's modes are converted to where their bytes are not pixels as they stand.
_PILLOW_MODES = {
    "1": "L",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "LAB": "RGB",
    "HSV": "RGB",
    "PA": "RGBA",
    "LA": "RGBA",
    "La": "LA",  # and that to RGBA: Pillow has no direct way
    "RGBa": "RGBA",
}
_PILLOW_CHANNELS = {"L": 1, "RGB": 3, "RGBX": 3, "RGBA": 4}


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


def check_images(
    function: str, images: object, input_layout: str, ranks: tuple[int, ...] = (3, 4)
) -> tuple[torch.Tensor, int]:
    """A uint8 batch or image as a tensor, and the number of its layout."""
    layout_code = check_choice(function, "input_layout", input_layout, LAYOUT_CODES)
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8:
            raise TypeError(_dtype_message(function, "images", images.dtype))
        if any(stride < 0 for stride in images.strides):
            raise ValueError(
                f"{function}: expected images to have no negative strides, got {images.strides}; "
                "torch has none: pass images.copy()"
            )
        images = tensor_of_array(images)
    if not isinstance(images, torch.Tensor):
        raise TypeError(
            f"{function}: expected images to be a torch.Tensor or a numpy.ndarray, got "
            f"{type(images).__name__}"
        )
    if images.dtype is not torch.uint8:
        raise TypeError(_dtype_message(function, "images", images.dtype))
    check_device(function, "images", images)
    if images.ndim not in ranks:
        raise ValueError(
            f"{function}: expected images to have 4 dimensions (a batch) or 3 (one image), got "
            f"shape {tuple(images.shape)}"
        )
    return images, layout_code


def _dtype_message(function: str, name: str, dtype: object) -> str:
    return (
        f"{function}: expected {name} of dtype uint8, got {dtype}; pixels must still be bytes from "
        "0 to 255"
    )


def is_pillow(image: object) -> bool:
    """Whether this is a Pillow image; Pillow is not imported to find out."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def read_image(function: str, image: object, index: int) -> torch.Tensor:
    """One image of a list as a (C, H, W) view of its pixels: Pillow, array or tensor."""
    name = f"images[{index}]"
    if is_pillow(image):
        image = _pillow_pixels(function, name, image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(_dtype_message(function, name, image.dtype))
        if image.ndim not in (2, 3):
            raise ValueError(
                f"{function}: expected {name} of shape (H, W) or (H, W, C), as arrays have it, got "
                f"{image.shape}"
            )
        if any(stride < 0 for stride in image.strides):
            image = image.copy()  # torch has no negative strides, even of one element
        pixels = tensor_of_array(image)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    elif isinstance(image, torch.Tensor):
        if image.dtype is not torch.uint8:
            raise TypeError(_dtype_message(function, name, image.dtype))
        check_device(function, name, image)
        if image.ndim != 3:
            raise ValueError(
                f"{function}: expected {name} of shape (C, H, W), as tensors have it, got "
                f"{tuple(image.shape)}"
            )
        pixels = image
    else:
        raise TypeError(
            f"{function}: expected {name} to be a Pillow image, a numpy.ndarray or a torch.Tensor, "
            f"got {type(image).__name__}"
        )
    if pixels.numel() == 0:
        raise ValueError(
            f"{function}: expected {name} to have pixels, got shape {tuple(pixels.shape)} (C, H, W)"
        )
    return pixels


def _pillow_pixels(function: str, name: str, image: Any) -> np.ndarray:
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise type(error)(f"{function}: expected {name} to be readable, got: {error}") from error
    mode = image.mode
    if mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif mode in _PILLOW_MODES:
        image = image.convert(_PILLOW_MODES[mode])
        if image.mode == "LA":
            image = image.convert("RGBA")
    elif mode not in _PILLOW_CHANNELS:
        raise TypeError(
            f"{function}: expected {name} of a mode with 8 bits per channel, got {mode!r}, which "
            'would lose precision; convert it, e.g. image.convert("L")'
        )
    pixels = np.asarray(image)
    return pixels[:, :, : _PILLOW_CHANNELS[image.mode]] if pixels.ndim == 3 else pixels
