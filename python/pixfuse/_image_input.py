"""What images may be given as, and what they have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pixfuse import _images
from pixfuse._checks import check_bytes, tensor_of_array
from pixfuse._library import ELEMENT_CODES

_NAME = "crop_mirror_normalize"
_CPU = torch.device("cpu")


@dataclass
class Images:
    """Images on one device, ready for an operator."""

    #: In the memory of Python objects on the CPU; None when ``tensors`` has them.
    memory: _images.ImageList | None
    #: (C, H, W) tensors, or one (N, C, H, W); empty when ``memory`` has them.
    tensors: list[torch.Tensor]
    device: torch.device
    count: int
    #: (height, width, channels) of every image; None when they differ.
    common: tuple[int, int, int] | None
    #: The same of each image where they differ, an array (N, 3); a list where torch.compile traces.
    each: Any


def read_images(images: Any) -> Images:
    """Find the memory of a batch, or of each image of a list; raises for what has no rule."""
    if isinstance(images, Images):  # as Collate has them
        return images
    if isinstance(images, torch.Tensor):
        return _read_batch(images)
    if not isinstance(images, (list, tuple)):
        images = _as_sequence(images)
    if len(images) == 0:
        raise ValueError(f"{_NAME}: expected images to hold at least 1 image, got none")
    if _go_to_an_operator(images):
        return _read_tensors(images)
    memory = _images.read(images, _pillow_exports_memory())
    common = memory.common
    each = memory.sizes if common is None else None
    return Images(memory, [], _CPU, len(memory), common, each)


def _go_to_an_operator(images: Sequence[Any]) -> bool:
    """Whether they are tensors whose memory is not to be read here."""
    if not isinstance(images[0], torch.Tensor):
        return False
    if torch.compiler.is_compiling() or not images[0].is_cpu:
        return True
    # What records operators would take the results for constants.
    is_recorded = _is_traced() or torch._C._len_torch_dispatch_stack() > 0
    return is_recorded and all(isinstance(image, torch.Tensor) for image in images)


def _is_traced() -> bool:
    """Whether torch.jit.trace is at work."""
    return torch._C._get_tracing_state() is not None


def _sizes(image: torch.Tensor) -> Sequence[Any]:
    """Its shape, of which torch.jit.trace makes tensors: the numbers in them."""
    return [int(size) for size in image.shape] if _is_traced() else image.shape


def _pillow_exports_memory() -> bool:
    """Whether the memory that Pillow exports can be trusted: before 13.0 it can be wrong."""
    pillow = sys.modules.get("PIL")
    return pillow is not None and int(pillow.__version__.partition(".")[0]) >= 13


def _as_sequence(images: Any) -> Sequence[Any]:
    if isinstance(images, np.ndarray):
        hint = "list(images)" if images.ndim == 4 else "[image]"
        raise TypeError(
            f"{_NAME}: expected images to be a list or a batch tensor, got one numpy array of "
            f"shape {images.shape}; pass {hint}"
        )
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise TypeError(
            f"{_NAME}: expected images to be a list or tuple of images, or a tensor (N, C, H, W), "
            f"got {type(images).__name__}; pass [image] for one image, list(...) for an iterator"
        )
    return images


def check_not_empty(function: str, name: str, shape: Sequence[int]) -> None:
    channels, height, width = shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(
            f"{function}: expected {name} to have pixels, got {height} x {width} of {channels} "
            "channels"
        )


def _check_tensor(function: str, name: str, image: torch.Tensor) -> None:
    """A tensor of a list."""
    check_bytes(function, name, image)
    if image.ndim != 3:
        raise ValueError(
            f"{function}: expected {name} to be a tensor of shape (C, H, W), got shape "
            f"{tuple(image.shape)}; a batch goes in alone, without a list around it"
        )
    check_not_empty(function, name, image.shape)


def _read_batch(images: torch.Tensor) -> Images:
    check_bytes(_NAME, "images", images)
    if images.ndim != 4:
        hint = "; pass [image] for one image" if images.ndim == 3 else ""
        raise ValueError(
            f"{_NAME}: expected images to be a list or a tensor of shape (N, C, H, W), got shape "
            f"{tuple(images.shape)}{hint}"
        )
    count, channels, height, width = _sizes(images)
    if count == 0:
        raise ValueError(f"{_NAME}: expected images to hold at least 1 image, got none")
    check_not_empty(_NAME, "images", images.shape[-3:])
    return Images(None, [images], images.device, count, (height, width, channels), None)


def _read_tensors(images: Sequence[Any], function: str = _NAME) -> Images:
    device = images[0].device
    shapes = []
    for index, image in enumerate(images):
        name = f"images[{index}]"
        if not isinstance(image, torch.Tensor):
            raise TypeError(
                f"{function}: expected {name} to be a tensor on {device}, as images[0] is, got "
                f"{type(image).__name__}; images must be on one device"
            )
        _check_tensor(function, name, image)
        if image.device != device:
            raise ValueError(
                f"{function}: expected {name} on {device}, as images[0] is, got {image.device}; "
                "images must be on one device"
            )
        channels, height, width = _sizes(image)
        shapes.append((height, width, channels))
    tensors = list(images)
    if all(shape == shapes[0] for shape in shapes):
        return Images(None, tensors, device, len(tensors), shapes[0], shapes)
    each = shapes if torch.compiler.is_compiling() else np.array(shapes)
    return Images(None, tensors, device, len(tensors), None, each)


def is_pillow(image: object) -> bool:
    """Whether this is a Pillow image; Pillow is not imported to find out."""
    module = sys.modules.get("PIL.Image")  # nobody holds an image of a module that is not imported
    return module is not None and isinstance(image, module.Image)


def read_list(function: str, images: Sequence[Any]) -> _images.ImageList | list[torch.Tensor]:
    """The memory of a list of images of one channel count; tensors where memory cannot be read."""
    if len(images) == 0:
        raise ValueError(f"{function}: expected images to have at least 1 image, got none")
    if _go_to_an_operator(images):
        listed = _read_tensors(images, function)
        channels = [tensor.shape[0] for tensor in listed.tensors]
        _check_channels(function, images, channels)
        return listed.tensors
    memory = _images.read(images, _pillow_exports_memory(), function)
    _check_channels(function, images, memory.sizes[:, 2].tolist())
    return memory


def _check_channels(function: str, images: Sequence[Any], channels: list[int]) -> None:
    for index, count in enumerate(channels):
        if count != channels[0]:
            hint = '; convert it, e.g. image.convert("RGB")' if is_pillow(images[index]) else ""
            raise ValueError(
                f"{function}: expected images of one channel count, got {channels[0]} in images[0] "
                f"and {count} in images[{index}]{hint}"
            )


def read_image(function: str, image: object) -> torch.Tensor:
    """A Pillow image, copied, or an array, in place, as a (C, H, W) tensor."""
    if isinstance(image, np.ndarray):
        check_bytes(function, "images[0]", image)
        if any(stride < 0 for stride in image.strides):
            image = image.copy()  # torch has no negative strides, even of one element
        pixels = tensor_of_array(image)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        check_not_empty(function, "images[0]", pixels.shape)
        return pixels
    memory = _images.read([image], _pillow_exports_memory(), function)
    height, width, channels = memory.sizes[0].tolist()
    pixels = torch.empty(
        (1, channels, height, width),
        dtype=torch.uint8,
        device="cpu",
        memory_format=torch.channels_last,
    )
    unturned = np.zeros((1, 4), np.int64)
    unchanged = ((0.0,), (1.0,), 0, (0.0,), False, ELEMENT_CODES[torch.uint8])
    memory.crop_mirror_normalize(
        unturned, channels, height, width, *unchanged, pixels.data_ptr(), pixels.stride(), 0
    )
    return pixels[0]
