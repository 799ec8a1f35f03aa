"""Bad input of `crop_mirror_normalize`: the class and words of each error; nothing is written."""

import contextlib
import io
import math
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

import pixfuse
from pixfuse import Normalization
from tests.bits import assert_same_bits
from tests.images import quantized, random_bytes
from tests.samples import pillow

BATCH = torch.randint(256, (3, 3, 8, 9), dtype=torch.uint8)
IMAGES = (
    Image.fromarray(np.ascontiguousarray(BATCH[0].permute(1, 2, 0).numpy())),
    BATCH[1].permute(1, 2, 0).numpy(),
    BATCH[2],
)
SHAPE = (3, 3, 4, 5)  # of a good result


def with_image(image: Any, index: int = 1) -> dict[str, Any]:
    """Good images but one."""
    images: list[Any] = list(IMAGES)
    images[index] = image
    return {"images": images}


def sized(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [random_bytes(3, height, width) for height, width in sizes]


def of_channels(*counts: int) -> list[torch.Tensor]:
    return [random_bytes(count, 8, 9) for count in counts]


def truncated_jpeg() -> Image.Image:
    stream = io.BytesIO()
    pillow("RGB", 64, 64).save(stream, "JPEG")
    return Image.open(io.BytesIO(stream.getvalue()[: len(stream.getvalue()) // 2]))


def truncated_png() -> Image.Image:
    stream = io.BytesIO()
    pillow("RGB", 64, 64).save(stream, "PNG")
    return Image.open(io.BytesIO(stream.getvalue()[:2000]))


def closed_image() -> Image.Image:
    stream = io.BytesIO()
    pillow("RGB", 64, 64).save(stream, "PNG")
    image = Image.open(io.BytesIO(stream.getvalue()))
    image.close()
    return image


def out_over_an_image() -> dict[str, Any]:
    buffer = torch.zeros(4 * math.prod(SHAPE) + 64, dtype=torch.uint8)
    out = buffer[64:].view(torch.float32).view(SHAPE)
    return {**with_image(buffer[: 3 * 8 * 9].view(3, 8, 9), 2), "out": out}


def out_over_an_array() -> dict[str, Any]:
    changes = out_over_an_image()
    changes["images"][2] = changes["images"][2].numpy().transpose(1, 2, 0)[::-1]
    return changes


def out_over_the_batch() -> dict[str, Any]:
    buffer = torch.zeros(4 * math.prod(SHAPE) + 64, dtype=torch.uint8)
    out = buffer[64:].view(torch.float32).view(SHAPE)
    return {"images": buffer[: 3 * 3 * 8 * 9].view(3, 3, 8, 9), "out": out}


class Pretender:
    """What looks a little like an image, and is none."""

    mode = "RGB"
    size = (9, 8)


Errors = type[Exception] | tuple[type[Exception], ...]

# Keyword arguments that differ from a good call; the class of the error; its words.
BAD_CALLS: dict[str, tuple[Callable[[], dict[str, Any]], Errors, str]] = {
    # --- what images is ---
    "empty list": (
        lambda: {"images": []},
        ValueError,
        r"expected images to hold at least 1 image, got none",
    ),
    "empty tuple": (
        lambda: {"images": ()},
        ValueError,
        r"expected images to hold at least 1 image, got none",
    ),
    "empty batch": (
        lambda: {"images": BATCH[:0]},
        ValueError,
        r"expected images to hold at least 1 image, got none",
    ),
    "none": (lambda: {"images": None}, TypeError, r"expected images to be a list .* got NoneType"),
    "number": (lambda: {"images": 3}, TypeError, r"expected images to be a list .* got int"),
    "text": (lambda: {"images": "a.jpg"}, TypeError, r"expected images to be a list .* got str"),
    "bytes": (lambda: {"images": b"RGB"}, TypeError, r"expected images to be a list .* got bytes"),
    "generator": (
        lambda: {"images": (image for image in IMAGES)},
        TypeError,
        r"expected images to be a list .* got generator; pass .*list\(",
    ),
    "dictionary": (
        lambda: {"images": dict(enumerate(IMAGES))},
        TypeError,
        r"expected images to be a list .* got dict",
    ),
    "set": (lambda: {"images": {BATCH}}, TypeError, r"expected images to be a list .* got set"),
    "one Pillow image": (
        lambda: {"images": IMAGES[0]},
        TypeError,
        r"expected images to be a list .* got Image; pass \[image\]",
    ),
    "one array": (
        lambda: {"images": IMAGES[1]},
        TypeError,
        r"expected images to be a list .* got one numpy array of shape \(8, 9, 3\); "
        r"pass \[image\]",
    ),
    "an array of images": (
        lambda: {"images": BATCH.permute(0, 2, 3, 1).numpy()},
        TypeError,
        r"expected images to be a list .* got one numpy array of shape \(3, 8, 9, 3\); "
        r"pass list\(images\)",
    ),
    "one tensor": (
        lambda: {"images": BATCH[0]},
        ValueError,
        r"expected images to be a list .* \(N, C, H, W\), got shape \(3, 8, 9\); pass \[image\]",
    ),
    "tensor of rank 2": (
        lambda: {"images": BATCH[0, 0]},
        ValueError,
        r"expected images to be .* \(N, C, H, W\), got shape \(8, 9\)",
    ),
    "tensor of rank 5": (
        lambda: {"images": BATCH[None]},
        ValueError,
        r"expected images to be .* \(N, C, H, W\), got shape \(1, 3, 3, 8, 9\)",
    ),
    "batch of floats": (
        lambda: {"images": BATCH.float()},
        TypeError,
        r"expected images of dtype uint8, got torch.float32; .*bytes",
    ),
    "batch of bools": (
        lambda: {"images": BATCH > 3},
        TypeError,
        r"expected images of dtype uint8, got torch.bool",
    ),
    "sparse batch": (
        lambda: {"images": BATCH.to_sparse()},
        NotImplementedError,
        r"expected images to be a dense tensor, got layout torch.sparse_coo",
    ),
    "batch on meta": (
        lambda: {"images": BATCH.to("meta")},
        NotImplementedError,
        r"expected images on a device that has a kernel \(cpu.*\), got meta",
    ),
    "batch without rows": (
        lambda: {"images": BATCH[:, :, :0]},
        ValueError,
        r"expected images to have pixels, got 0 x 9 of 3 channels",
    ),
    "batch without channels": (
        lambda: {"images": BATCH[:, :0]},
        ValueError,
        r"expected images to have pixels, got 8 x 9 of 0 channels",
    ),
    # --- one image of the list ---
    "path": (lambda: with_image("a.jpg"), TypeError, r"expected images\[1\] to be .*, got str"),
    "nothing": (lambda: with_image(None), TypeError, r"expected images\[1\] to be .* got NoneType"),
    "list in the list": (
        lambda: with_image([IMAGES[0]], 0),
        TypeError,
        r"expected images\[0\] to be a Pillow image, a numpy array or a torch.Tensor, got list",
    ),
    "pretender": (
        lambda: with_image(Pretender(), 2),
        TypeError,
        r"expected images\[2\] to be a Pillow image, .*, got .*Pretender",
    ),
    "numpy number": (
        lambda: with_image(np.uint8(3)),
        TypeError,
        r"expected images\[1\] to be a Pillow image, .*, got numpy.uint8",
    ),
    "float tensor": (
        lambda: with_image(BATCH[0].float(), 2),
        TypeError,
        r"expected images\[2\] of dtype uint8, got torch.float32; .*bytes",
    ),
    "int8 tensor": (
        lambda: with_image(BATCH[0].to(torch.int8), 0),
        TypeError,
        r"expected images\[0\] of dtype uint8, got torch.int8",
    ),
    "quantized tensor": (
        lambda: with_image(quantized(3, 8, 9)),
        TypeError,
        r"expected images\[1\] of dtype uint8, got torch.quint8",
    ),
    "sparse tensor": (
        lambda: with_image(BATCH[0].to_sparse()),
        NotImplementedError,
        r"expected images\[1\] to be a dense tensor, got layout torch.sparse_coo",
    ),
    "meta tensor": (
        lambda: with_image(BATCH[0].to("meta")),
        ValueError,
        r"expected images\[1\] on the CPU, as the others are, got meta; .*one device",
    ),
    "meta tensor first": (
        lambda: with_image(BATCH[0].to("meta"), 0),
        NotImplementedError,
        r"expected images\[0\] on a device that has a kernel \(cpu.*\), got meta",
    ),
    "meta tensor last": (
        lambda: with_image(BATCH[0].to("meta"), 2),
        ValueError,
        r"expected images\[2\] on the CPU, as the others are, got meta; .*one device",
    ),
    "tensor of rank 4 in the list": (
        lambda: with_image(BATCH),
        ValueError,
        r"expected images\[1\] to be a tensor of shape \(C, H, W\), got shape \(3, 3, 8, 9\); a",
    ),
    "tensor of rank 2 in the list": (
        lambda: with_image(BATCH[0, 0]),
        ValueError,
        r"expected images\[1\] to be a tensor of shape \(C, H, W\), got shape \(8, 9\)",
    ),
    "float array": (
        lambda: with_image(IMAGES[1] / 255),
        TypeError,
        r"expected images\[1\] of dtype uint8, got float64; .*bytes",
    ),
    "int8 array": (
        lambda: with_image(IMAGES[1].astype(np.int8), 2),
        TypeError,
        r"expected images\[2\] of dtype uint8, got int8",
    ),
    "bool array": (
        lambda: with_image(IMAGES[1] > 3),
        TypeError,
        r"expected images\[1\] of dtype uint8, got bool",
    ),
    "array of objects": (
        lambda: with_image(IMAGES[1].astype(object)),
        TypeError,
        r"expected images\[1\] of dtype uint8, got object",
    ),
    "array of characters": (
        lambda: with_image(IMAGES[1].view("S1")),
        TypeError,
        r"expected images\[1\] of dtype uint8, got \|S1",
    ),
    "array of records": (
        lambda: with_image(IMAGES[1].view([("byte", np.uint8)])),
        TypeError,
        r"expected images\[1\] of dtype uint8, got \[\('byte', 'u1'\)\]",
    ),
    "array of dates": (
        lambda: with_image(np.zeros((8, 9), "datetime64[s]")),
        TypeError,
        r"expected images\[1\] of dtype uint8, got datetime64\[s\]",
    ),
    "array of rank 1": (
        lambda: with_image(IMAGES[1].ravel()),
        ValueError,
        r"expected images\[1\] to have shape \(H, W\) or \(H, W, C\), got \(216,\)",
    ),
    "array of rank 0": (
        lambda: with_image(np.array(3, np.uint8)),
        ValueError,
        r"expected images\[1\] to have shape \(H, W\) or \(H, W, C\), got \(\)",
    ),
    "array of rank 4": (
        lambda: with_image(IMAGES[1][None]),
        ValueError,
        r"expected images\[1\] to have shape \(H, W\) or \(H, W, C\), got \(1, 8, 9, 3\)",
    ),
    "array without rows": (
        lambda: with_image(IMAGES[1][:0]),
        ValueError,
        r"expected images\[1\] to have pixels, got 0 x 9 of 3 channels",
    ),
    "array without columns": (
        lambda: with_image(IMAGES[1][:, :0]),
        ValueError,
        r"expected images\[1\] to have pixels, got 8 x 0 of 3 channels",
    ),
    "array without channels": (
        lambda: with_image(IMAGES[1][:, :, :0]),
        ValueError,
        r"expected images\[1\] to have pixels, got 8 x 9 of 0 channels",
    ),
    "tensor without columns": (
        lambda: with_image(BATCH[0, :, :, :0], 2),
        ValueError,
        r"expected images\[2\] to have pixels, got 8 x 0 of 3 channels",
    ),
    "Pillow image without rows": (
        lambda: with_image(Image.new("RGB", (9, 0)), 0),
        ValueError,
        r"expected images\[0\] to have pixels, got 0 x 9 of 3 channels",
    ),
    **{
        f"mode {mode}": (
            lambda mode=mode: with_image(Image.new(mode, (9, 8))),  # type: ignore[misc]
            TypeError,
            rf"expected images\[1\] of a Pillow mode with 8 bits per channel, got mode '{mode}'; "
            r"convert it",
        )
        for mode in ("I", "F", "I;16", "I;16B", "I;16L")
    },
    "truncated JPEG": (
        lambda: with_image(truncated_jpeg()),
        OSError,
        r"expected images\[1\] to be an image that Pillow can read, got OSError: .*truncated",
    ),
    "truncated PNG": (
        lambda: with_image(truncated_png(), 2),
        OSError,
        r"expected images\[2\] to be an image that Pillow can read, got OSError: .*truncated",
    ),
    "closed image": (
        lambda: with_image(closed_image(), 0),
        ValueError,
        r"expected images\[0\] to be an image that Pillow can read, got ValueError: .*closed",
    ),
    # --- channels ---
    "3 channels beside 4": (
        lambda: {"images": of_channels(3, 3, 4)},
        ValueError,
        r"expected images of one channel count, got 3 in images\[0\] and 4 in images\[2\]; "
        r'pass channels=3.*image.convert\("RGB"\)',
    ),
    "1 channel beside 4": (
        lambda: {"images": of_channels(1, 4), "normalization": pixfuse.UNIT},
        ValueError,
        r"expected images of one channel count, got 1 in images\[0\] and 4 in images\[1\]",
    ),
    "1, 3 and 4 channels": (
        lambda: {"images": of_channels(1, 3, 4)},
        ValueError,
        r"expected images of one channel count, got 1 in images\[0\] and .* in images\[",
    ),
    "1 channel beside 2": (
        lambda: {"images": of_channels(2, 1), "normalization": pixfuse.UNIT},
        ValueError,
        r"expected images of one channel count, got 2 in images\[0\] and 1 in images\[1\]$",
    ),
    "color asked to be grey": (
        lambda: {"channels": 1, "normalization": pixfuse.UNIT},
        ValueError,
        r'expected images of 1 channels?.*, got 3 in images\[0\]; .*image.convert\("L"\)',
    ),
    "2 channels asked to be 3": (
        lambda: {"images": of_channels(3, 2), "channels": 3},
        ValueError,
        r"expected images of 3 channels, or of 1, which is repeated, got 2 in images\[1\]",
    ),
    "3 channels asked to be 4": (
        lambda: {"images": of_channels(4, 3), "channels": 4, "normalization": pixfuse.UNIT},
        ValueError,
        r"expected images of 4 channels, or of 1, which is repeated, got 3 in images\[1\]",
    ),
    "batch of 4 channels asked to be 2": (
        lambda: {"images": BATCH, "channels": 2, "normalization": pixfuse.UNIT},
        ValueError,
        r"expected images of 2 channels, or of 1, which is repeated, got 3 in images\[0\]",
    ),
    "0 channels": (
        lambda: {"channels": 0},
        ValueError,
        r"expected channels to be positive, got 0",
    ),
    "-1 channels": (
        lambda: {"channels": -1},
        ValueError,
        r"expected channels to be positive, got -1",
    ),
    "3.0 channels": (
        lambda: {"channels": 3.0},
        TypeError,
        r"expected channels to be an int or None, got float",
    ),
    "True channels": (
        lambda: {"channels": True},
        TypeError,
        r"expected channels to be an int or None, got bool",
    ),
    # --- size ---
    "mixed sizes": (
        lambda: {"images": sized((8, 9), (8, 9), (9, 8)), "size": None},
        ValueError,
        r"expected images of one size, as size is None, got 8 x 9 in images\[0\] and 9 x 8 in "
        r"images\[2\]; pass size=",
    ),
    "size 0": (lambda: {"size": 0}, ValueError, r"expected size to be positive, got 0"),
    "negative size": (
        lambda: {"size": (4, -5)},
        ValueError,
        r"expected size to be positive, got \(4, -5\)",
    ),
    "size of a float": (
        lambda: {"size": 4.0},
        TypeError,
        r"expected size to be an int or \(height, width\), got 4.0",
    ),
    "size of floats": (
        lambda: {"size": (4, 5.0)},
        TypeError,
        r"expected size to be an int or \(height, width\), got \(4, 5.0\)",
    ),
    "size of a bool": (
        lambda: {"size": True},
        TypeError,
        r"expected size to be an int or \(height, width\), got True",
    ),
    "size of bools": (
        lambda: {"size": (True, 2)},
        TypeError,
        r"expected size to be an int or \(height, width\), got \(True, 2\)",
    ),
    "size of text": (
        lambda: {"size": "45"},
        TypeError,
        r"expected size to be an int or \(height, width\), got '45'",
    ),
    "size of one": (
        lambda: {"size": (4,)},
        ValueError,
        r"expected size to be an int or \(height, width\), got 1 values?",
    ),
    "size of three": (
        lambda: {"size": (3, 4, 5)},
        ValueError,
        r"expected size to be an int or \(height, width\), got 3 values",
    ),
    "size of none": (
        lambda: {"size": ()},
        (TypeError, ValueError),
        r"expected size to be an int or \(height, width\), got ",
    ),
    "size beyond 32 bits": (
        lambda: {"size": 2**31, "out_of_bounds": "pad"},
        ValueError,
        r"expected size up to 2147483647, got 2147483648",
    ),
    "more elements than can be addressed": (
        lambda: {"size": 2**31 - 1, "out_of_bounds": "pad"},
        ValueError,
        r"expected a result that fits in memory, got one of shape \(.*2147483647, 2147483647\)",
    ),
    # --- windows ---
    "window larger than an image": (
        lambda: {"images": sized((8, 9), (3, 9))},
        ValueError,
        r"expected the window of images\[1\] inside its 3 x 9 pixels, got a window of size 4 x 5 "
        r'at top 0, left 2; pass out_of_bounds="pad"',
    ),
    "window below an image": (
        lambda: {"top": [0, 4, 5], "left": 0},
        ValueError,
        r"expected the window of images\[2\] inside its 8 x 9 pixels, got a window of size 4 x 5 "
        r"at top 5, left 0; pass",
    ),
    "window left of an image": (
        lambda: {"top": 0, "left": -1},
        ValueError,
        r"expected the window of images\[0\] inside its 8 x 9 pixels, .* at top 0, left -1; pass",
    ),
    "window right of an image": (
        lambda: {"images": BATCH, "top": 4, "left": [4, 5, 4]},
        ValueError,
        r"expected the window of images\[1\] inside its 8 x 9 pixels, .* at top 4, left 5; pass",
    ),
    "unknown out_of_bounds": (
        lambda: {"out_of_bounds": "clamp"},
        ValueError,
        r"expected out_of_bounds to be 'error' or 'pad', got 'clamp'",
    ),
    "out_of_bounds of none": (
        lambda: {"out_of_bounds": None},
        ValueError,
        r"expected out_of_bounds to be 'error' or 'pad', got None",
    ),
    "top without left": (
        lambda: {"top": 0},
        ValueError,
        r"expected top and left together, got left=None",
    ),
    "left without top": (
        lambda: {"left": [0, 0, 0]},
        ValueError,
        r"expected top and left together, got top=None",
    ),
    "top of a float": (
        lambda: {"top": 0.0, "left": 0},
        TypeError,
        r"expected top to be an int or one int per image, got 0.0",
    ),
    "left of a bool": (
        lambda: {"top": 0, "left": True},
        TypeError,
        r"expected left to be an int or one int per image, got True",
    ),
    "top of text": (
        lambda: {"top": "0", "left": 0},
        TypeError,
        r"expected top to be an int or one int per image, got '0'",
    ),
    "top of an array of text": (
        lambda: {"top": np.array(["a", "b", "c"]), "left": 0},
        TypeError,
        r"expected top to be an int or one int per image, got array\(",
    ),
    "too few tops": (
        lambda: {"top": [0, 0], "left": 0},
        ValueError,
        r"expected top to be an int or one int per image \(3\), got shape \(2,\)",
    ),
    "too many lefts": (
        lambda: {"top": 0, "left": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        r"expected left to be an int or one int per image \(3\), got shape \(4,\)",
    ),
    "tops of rank 2": (
        lambda: {"top": np.zeros((3, 1), int), "left": 0},
        ValueError,
        r"expected top to be an int or one int per image \(3\), got shape \(3, 1\)",
    ),
    "top far away": (
        lambda: {"top": 2**31, "left": 0, "out_of_bounds": "pad"},
        ValueError,
        r"expected top within 2147483647, got 2147483648",
    ),
    "left far away": (
        lambda: {"top": 0, "left": -(2**63), "out_of_bounds": "pad"},
        ValueError,
        r"expected left within 2147483647, got -9223372036854775808",
    ),
    "top beyond 64 bits": (
        lambda: {"top": 2**64, "left": 0, "out_of_bounds": "pad"},
        (TypeError, ValueError),
        r"expected top ",
    ),
    "anchor below 0": (
        lambda: {"anchor": (-0.1, 0.5)},
        ValueError,
        r"expected anchor from 0 to 1, got \(-0.1, 0.5\)",
    ),
    "anchor above 1": (
        lambda: {"anchor": [(0, 0), (0, 1), (0, 1.5)]},
        ValueError,
        r"expected anchor from 0 to 1, got \(0.0, 1.5\) in anchor\[2\]",
    ),
    "anchor of nan": (
        lambda: {"anchor": (math.nan, 0.5)},
        ValueError,
        r"expected anchor from 0 to 1, got \(nan, 0.5\)",
    ),
    "anchor of infinity": (
        lambda: {"anchor": (0.5, math.inf)},
        ValueError,
        r"expected anchor from 0 to 1, got \(0.5, inf\)",
    ),
    "anchor of one number": (
        lambda: {"anchor": 0.5},
        ValueError,
        r"expected anchor to be \(vertical, horizontal\) or one such pair per image \(3\), got "
        r"shape \(\)",
    ),
    "anchor of three numbers": (
        lambda: {"anchor": (0.5, 0.5, 0.5)},
        ValueError,
        r"expected anchor to be \(vertical, horizontal\) .*, got shape \(3,\)",
    ),
    "too few anchors": (
        lambda: {"anchor": [(0.5, 0.5), (0.5, 0.5)]},
        ValueError,
        r"expected anchor to be \(vertical, horizontal\) .* \(3\), got shape \(2, 2\)",
    ),
    "anchors of triples": (
        lambda: {"anchor": np.zeros((3, 3))},
        ValueError,
        r"expected anchor to be \(vertical, horizontal\) .* \(3\), got shape \(3, 3\)",
    ),
    "anchors of unequal lengths": (
        lambda: {"anchor": [(0.5, 0.5), (0.5,), (0.5, 0.5)]},
        (TypeError, ValueError),
        r"expected anchor to be \(vertical, horizontal\) ",
    ),
    "anchor of words": (
        lambda: {"anchor": ("center", "center")},
        TypeError,
        r"expected anchor to be \(vertical, horizontal\) .*, got \('center', 'center'\)",
    ),
    "anchor of none": (
        lambda: {"anchor": None},
        TypeError,
        r"expected anchor to be \(vertical, horizontal\) .*, got None",
    ),
    # --- mirror and flip ---
    "mirror of 1": (
        lambda: {"mirror": 1},
        TypeError,
        r"expected mirror to be a bool or one bool per image, got 1",
    ),
    "flip of a probability": (
        lambda: {"flip": 0.5},
        TypeError,
        r"expected flip to be a bool or one bool per image, got 0.5",
    ),
    "mirror of none": (
        lambda: {"mirror": None},
        TypeError,
        r"expected mirror to be a bool or one bool per image, got None",
    ),
    "mirror of words": (
        lambda: {"mirror": np.array(["yes", "no", "no"])},
        TypeError,
        r"expected mirror to be a bool or one bool per image, got array\(",
    ),
    "flip of ints": (
        lambda: {"flip": [0, 1, 0]},
        TypeError,
        r"expected flip to be a bool or one bool per image, got \[0, 1, 0\]",
    ),
    "too few mirrors": (
        lambda: {"mirror": [True, False]},
        ValueError,
        r"expected mirror to be a bool or one bool per image \(3\), got shape \(2,\)",
    ),
    "too many flips": (
        lambda: {"images": BATCH, "flip": torch.zeros(4, dtype=torch.bool)},
        ValueError,
        r"expected flip to be a bool or one bool per image \(3\), got shape \(4,\)",
    ),
    "no mirrors": (
        lambda: {"mirror": np.zeros(0, bool)},
        ValueError,
        r"expected mirror to be a bool or one bool per image \(3\), got shape \(0,\)",
    ),
    # --- fill ---
    "nan fill": (
        lambda: {"fill": (0, math.nan, 0)},
        ValueError,
        r"expected fill to be finite, got nan",
    ),
    "infinite fill": (
        lambda: {"fill": -math.inf, "fill_space": "output"},
        ValueError,
        r"expected fill to be finite, got -inf",
    ),
    "two fills": (
        lambda: {"fill": (1, 2)},
        ValueError,
        r"expected fill to have 1 value or one per channel \(3\), got 2",
    ),
    "no fill": (
        lambda: {"fill": ()},
        ValueError,
        r"expected fill to have 1 value or one per channel \(3\), got 0",
    ),
    "fill of text": (
        lambda: {"fill": "black"},
        TypeError,
        r"expected fill to be a number or one number per channel, got 'black'",
    ),
    "fill without an order": (
        lambda: {"fill": {1, 2, 3}},
        TypeError,
        r"expected fill to be a number or one number per channel, got \{1, 2, 3\}",
    ),
    "fill of none": (
        lambda: {"fill": None},
        TypeError,
        r"expected fill to be a number or one number per channel, got None",
    ),
    "nested fill": (
        lambda: {"fill": [[1, 2, 3]]},
        TypeError,
        r"expected fill to be a number or one number per channel, got \[\[1, 2, 3\]\]",
    ),
    "fill beyond a byte": (
        lambda: {"fill": 256},
        ValueError,
        r"expected fill from 0 to 255, got 256",
    ),
    "fill in results by mistake": (
        lambda: {"fill": (0.1, -2.1, 0.3)},
        ValueError,
        r'expected fill from 0 to 255, got -2.1; fill_space="output"',
    ),
    "fill beyond float16": (
        lambda: {"fill": 1e5, "fill_space": "output", "dtype": torch.float16},
        ValueError,
        r"expected fill to fit torch.float16 \(up to 65504\), got 100000",
    ),
    "fill beyond float32": (
        lambda: {"fill": 1e39, "fill_space": "output"},
        ValueError,
        r"expected fill to fit torch.float32 .*, got 1e\+39",
    ),
    "unknown fill_space": (
        lambda: {"fill_space": "pixels"},
        ValueError,
        r"expected fill_space to be 'input' or 'output', got 'pixels'",
    ),
    "fill of a fraction of a byte": (
        lambda: {"fill": 127.5, "dtype": torch.uint8},
        ValueError,
        r"expected fill to be a whole number for torch.uint8, got 127.5",
    ),
    "fill beyond uint8": (
        lambda: {"fill": -1, "dtype": torch.uint8},
        ValueError,
        r"expected fill from 0 to 255, got -1",
    ),
    "fill of results for uint8": (
        lambda: {"fill_space": "output", "dtype": torch.uint8},
        ValueError,
        r"expected fill_space to be 'input' for torch.uint8, got 'output'",
    ),
    # --- the result ---
    "normalization of another length": (
        lambda: {"normalization": Normalization((0.5, 0.5), 0.5)},
        ValueError,
        r"expected images of 2 channels, as mean and std have 2 values, got 3$",
    ),
    "three means for grey images": (
        lambda: {"images": of_channels(1, 1)},
        ValueError,
        r"expected images of 3 channels, .* got 1; pass channels=3",
    ),
    "normalization that is none": (
        lambda: {"normalization": (0.5, 0.5)},
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got tuple; use",
    ),
    "normalization that is none, for bytes": (
        lambda: {"normalization": None, "dtype": torch.uint8},
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got NoneType",
    ),
    "results beyond float16": (
        lambda: {"normalization": Normalization(0.0, 1e-5), "dtype": torch.float16},
        ValueError,
        r"expected results that fit torch.float16 \(up to 65504\), got results up to 100000",
    ),
    "float64 result": (
        lambda: {"dtype": torch.float64},
        TypeError,
        r"expected dtype to be torch.float32, float16, bfloat16 or uint8, got torch.float64",
    ),
    "list as dtype": (
        lambda: {"dtype": [1]},
        TypeError,
        r"expected dtype to be torch.float32, .*, got \[1\]",
    ),
    "dtype of numpy": (
        lambda: {"dtype": np.uint8},
        TypeError,
        r"expected dtype to be torch.float32, .*, got <class 'numpy.uint8'>",
    ),
    "memory format to preserve": (
        lambda: {"memory_format": torch.preserve_format},
        ValueError,
        r"expected memory_format to be torch.contiguous_format or channels_last, got "
        r"torch.preserve_format",
    ),
    "memory format that is none": (
        lambda: {"memory_format": "channels_last"},
        (TypeError, ValueError),
        r"expected memory_format to be torch.contiguous_format or channels_last, got "
        r"'?channels_last",
    ),
    # --- out ---
    "out that is no tensor": (
        lambda: {"out": np.zeros(SHAPE, np.float32)},
        TypeError,
        r"expected out to be a torch.Tensor, got ndarray",
    ),
    "out of the size of the images": (
        lambda: {"out": torch.zeros(3, 3, 8, 9)},
        ValueError,
        r"expected out of shape \(3, 3, 4, 5\), got \(3, 3, 8, 9\)",
    ),
    "out of another rank": (
        lambda: {"out": torch.zeros(3, 4, 5)},
        ValueError,
        r"expected out of shape \(3, 3, 4, 5\), got \(3, 4, 5\)",
    ),
    "out for more images": (
        lambda: {"out": torch.zeros(4, 3, 4, 5)},
        ValueError,
        r"expected out of shape \(3, 3, 4, 5\), got \(4, 3, 4, 5\)",
    ),
    "out of another dtype": (
        lambda: {"out": torch.zeros(SHAPE), "dtype": torch.uint8},
        TypeError,
        r"expected out of dtype torch.uint8, got torch.float32; pass dtype=",
    ),
    "out on meta": (
        lambda: {"out": torch.zeros(SHAPE, device="meta")},
        ValueError,
        r"expected out on the device of images \(cpu\), got meta",
    ),
    "out in another format": (
        lambda: {"out": torch.zeros(3, 4, 5, 3).permute(0, 3, 1, 2)},
        ValueError,
        r"expected out to be dense in torch.contiguous_format with strides \(60, 20, 5, 1\), got "
        r"strides \(60, 1, 15, 3\); pass memory_format=",
    ),
    "out with gaps": (
        lambda: {"out": torch.zeros(3, 3, 4, 6)[..., :5]},
        ValueError,
        r"expected out to be dense in .*, got strides \(72, 24, 6, 1\)",
    ),
    "out that overlaps itself": (
        lambda: {"out": torch.zeros(1, 3, 4, 5).expand(SHAPE)},
        ValueError,
        r"expected out to be dense in .*, got strides \(0, 20, 5, 1\)",
    ),
    "out over a tensor": (
        out_over_an_image,
        ValueError,
        r"expected out to share no memory with images, got an overlap with images\[2\]",
    ),
    "out over an array": (
        out_over_an_array,
        ValueError,
        r"expected out to share no memory with images, got an overlap with images\[2\]",
    ),
    "out over the batch": (
        out_over_the_batch,
        ValueError,
        r"expected out to share no memory with images, got an overlap with images",
    ),
    "out that requires a gradient": (
        lambda: {"out": torch.zeros(SHAPE, requires_grad=True)},
        ValueError,
        r"expected out not to require a gradient, got requires_grad=True",
    ),
    "sparse out": (
        lambda: {"out": torch.zeros(SHAPE).to_sparse()},
        NotImplementedError,
        r"expected out to be a dense tensor, got layout torch.sparse_coo",
    ),
}


def good_call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "images": list(IMAGES),
        "size": (4, 5),
        "normalization": pixfuse.CLIP,
        **changes,
    }
    return pixfuse.crop_mirror_normalize(**arguments)


def kept(tensor: Any) -> torch.Tensor | None:
    """A copy, of what can be copied."""
    if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
        return tensor.detach().clone()
    return None


def assert_kept(tensor: Any, copy: torch.Tensor | None) -> None:
    assert copy is None or torch.equal(tensor.detach(), copy), "written to"


def test_the_good_call_is_good() -> None:
    """Else every test here would pass for another reason than its own."""
    expected = pixfuse.reference.crop_mirror_normalize(IMAGES, (4, 5), pixfuse.CLIP)
    assert isinstance(expected, torch.Tensor)
    assert_same_bits(good_call(), expected)
    assert_same_bits(good_call(images=BATCH), expected)
    assert_same_bits(good_call(out=torch.full(SHAPE, 7.0)), expected)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors(case: str) -> None:
    make, error, message = BAD_CALLS[case]
    changes = make()
    out = changes.get("out")
    before = kept(out)
    with pytest.raises(error, match=f"^crop_mirror_normalize: .*{message}"):
        good_call(**changes)
    assert_kept(out, before)


@pytest.mark.parametrize("case", [name for name in BAD_CALLS if "out" not in BAD_CALLS[name][0]()])
def test_out_is_untouched_by_any_error(case: str) -> None:
    """Also where something else than `out` is wrong, which is then what is said."""
    make = BAD_CALLS[case][0]
    for dtype in (torch.float32, torch.uint8):
        out = torch.full(SHAPE, 7, dtype=dtype)
        version = out._version
        with pytest.raises((TypeError, ValueError, NotImplementedError, OSError)):
            good_call(**make(), out=out)
        assert bool((out == 7).all())
        assert out._version == version


@pytest.mark.parametrize("index", [0, 1, 63])
def test_the_index_of_a_broken_file_is_named(index: int) -> None:
    images: list[Any] = [pillow("RGB", 64, 64) for _ in range(64)]
    images[index] = truncated_jpeg()
    with pytest.raises(OSError, match=rf"expected images\[{index}\] .* truncated") as caught:
        pixfuse.crop_mirror_normalize(images)
    assert isinstance(caught.value.__cause__, OSError), "what Pillow said is kept"


def test_an_interrupt_while_reading_is_passed_on() -> None:
    class Interrupted(Image.Image):
        def load(self) -> Any:
            raise KeyboardInterrupt

    image = Interrupted()
    image.__dict__.update(pillow("RGB", 4, 5).__dict__)
    with pytest.raises(KeyboardInterrupt):
        pixfuse.crop_mirror_normalize([image])


def test_positional_options_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        pixfuse.crop_mirror_normalize(BATCH, 4, pixfuse.CLIP, (0.5, 0.5))  # type: ignore[call-arg]


def test_two_devices(cuda: torch.device) -> None:
    for images, message in (
        ([BATCH[0], BATCH[1].to(cuda)], r"images\[1\] on the CPU, as the others are, got cuda:0"),
        ([BATCH[0].to(cuda), BATCH[1]], r"images\[1\] on cuda:0, as images\[0\] is, got cpu"),
        ([IMAGES[0], BATCH[1].to(cuda)], r"images\[1\] on the CPU, as the others are, got cuda:0"),
        ([BATCH[1].to(cuda), IMAGES[0]], r"images\[1\] to be a tensor on cuda:0, .* got Image"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            pixfuse.crop_mirror_normalize(images)
    with pytest.raises(ValueError, match="expected out on the device of images"):
        good_call(images=BATCH.to(cuda), out=torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="expected out on the device of images"):
        good_call(out=torch.zeros(SHAPE, device=cuda))


# --- torch.ops: the same, whoever calls ---

OUT_OR_NOT = ("crop_mirror_normalize", "crop_mirror_normalize_out")
# How an error of the operator arrives is for torch to say; that it arrives is for us.
ANY_ERROR = (TypeError, ValueError, RuntimeError, NotImplementedError)


def call_operator(name: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "images": list(BATCH),
        "placements": torch.zeros(3, 4, dtype=torch.int64),
        "channels": 3,
        "height": 4,
        "width": 5,
        "mean": [0.5],
        "std": [0.5],
        "rounding": 0,
        "fill": [0.0],
        "fill_is_output": False,
        "dtype": 0,
        "memory_format": 0,
        "return_mask": True,
        "out": torch.full(SHAPE, 7.0),
        "mask": None,
        **changes,
    }
    skipped: tuple[str, ...] = ("out", "mask")
    if name == "crop_mirror_normalize_out":
        skipped = ("height", "width", "dtype", "memory_format", "return_mask")
    for argument in skipped:
        arguments.pop(argument)
    return getattr(torch.ops.pixfuse, name)(**arguments)


def placements(*row: int) -> torch.Tensor:
    return torch.tensor([row] * 3, dtype=torch.int64)


C = "crop_mirror_normalize: expected"
PLACEMENTS = rf"{C} placements to be a contiguous int64 CPU tensor of shape \(3, 4\)"
BAD_OPERANDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no images": (lambda: {"images": []}, r"crop_mirror_normalize|at least 1"),
    "float images": (lambda: {"images": list(BATCH.float())}, f"{C} images of dtype uint8"),
    "one float image": (
        lambda: {"images": [*BATCH[:2], BATCH[2].float()]},
        f"{C} images of dtype uint8",
    ),
    "rank 2": (lambda: {"images": [BATCH[0, 0]] * 3}, f"{C} images to have 3 or 4 dimensions"),
    "rank 5": (lambda: {"images": [BATCH[None]]}, f"{C} images to have 3 or 4 dimensions"),
    "rank 0": (lambda: {"images": [BATCH[0, 0, 0, 0]] * 3}, f"{C} images to have 3 or 4 dim"),
    "sparse images": (lambda: {"images": [BATCH[0].to_sparse()] * 3}, "Sparse|dense"),
    "one sparse image": (
        lambda: {"images": [*BATCH[:2], BATCH[2].to_sparse()]},
        "Sparse|dense",
    ),
    "quantized images": (lambda: {"images": [quantized(3, 8, 9)] * 3}, "Quantized|uint8"),
    "too few images": (
        lambda: {"images": list(BATCH[:2])},
        r"placements to be .* of shape \(2, 4\)",
    ),
    "too many images": (
        lambda: {"images": [BATCH, BATCH[0]]},
        r"placements to be .* of shape \(4, 4\)|at most 3 images",
    ),
    "far too many images": (
        lambda: {"images": [BATCH[0, :, :1, :1].expand(2**40, 3, 1, 1)]},
        r"crop_mirror_normalize: expected ",
    ),
    "placements of int32": (lambda: {"placements": placements(0, 0, 0, 0).int()}, PLACEMENTS),
    "placements of floats": (lambda: {"placements": torch.zeros(3, 4)}, PLACEMENTS),
    "placements of rank 1": (
        lambda: {"placements": torch.zeros(12, dtype=torch.int64)},
        PLACEMENTS,
    ),
    "placements of 5": (lambda: {"placements": placements(0, 0, 0, 0, 0)}, PLACEMENTS),
    "placements with gaps": (
        lambda: {"placements": placements(0, 0, 0, 0, 0)[:, :4]},
        PLACEMENTS,
    ),
    "sparse placements": (
        lambda: {"placements": placements(1, 0, 0, 0).to_sparse()},
        f"Sparse|dense|{PLACEMENTS}",
    ),
    "top far away": (
        lambda: {"placements": placements(2**31, 0, 0, 0)},
        rf"{C} the window of images\[0\] within 2147483647 pixels of it, got top 2147483648",
    ),
    "left far away": (
        lambda: {"placements": placements(0, -(2**63), 0, 0)},
        rf"{C} the window of images\[0\] within 2147483647 pixels .* left -9223372036854775808",
    ),
    "channels that do not fit": (
        lambda: {"images": [BATCH[:, :2]]},
        rf"{C} images\[0\] of 3 channels, got 2",
    ),
    "one image of other channels": (
        lambda: {"images": [*BATCH[:2], random_bytes(5, 8, 9)]},
        rf"{C} images\[2\] of 3 channels, got 5",
    ),
    "no channels": (
        lambda: {"images": [BATCH[:, :0]]},
        rf"{C} images\[0\] of 3 channels, got 0",
    ),
    "two means": (lambda: {"mean": [0.5, 0.5]}, rf"{C} mean with 1 value or one per channel \(3\)"),
    "four stds": (lambda: {"std": [0.5] * 4}, rf"{C} std with 1 value or one per channel \(3\)"),
    "no mean": (lambda: {"mean": []}, rf"{C} mean with 1 value or one per channel \(3\), got 0"),
    "no fill": (lambda: {"fill": []}, rf"{C} fill with 1 value or one per channel \(3\), got 0"),
    "two fills": (lambda: {"fill": [0, 0]}, rf"{C} fill with 1 value or one per channel \(3\)"),
    "nan fill": (lambda: {"fill": [math.nan]}, f"{C} fill to be finite in float32, got nan"),
    "infinite fill": (
        lambda: {"fill": [math.inf], "fill_is_output": True},
        f"{C} fill to be finite in float32, got inf",
    ),
    "fill beyond float32": (
        lambda: {"fill": [1e39], "fill_is_output": True},
        rf"{C} fill to be finite in float32, got 1e\+39",
    ),
    "zero std": (lambda: {"std": [0.5, 0.0, 0.5]}, f"{C} std above 0 and finite"),
    "negative std": (lambda: {"std": [-1.0]}, f"{C} std above 0 and finite"),
    "nan std": (lambda: {"std": [math.nan]}, f"{C} std above 0 and finite"),
    "std that vanishes": (lambda: {"std": [1e-46]}, f"{C} std above 0 and finite"),
    "nan mean": (lambda: {"mean": [math.nan]}, f"{C} mean finite"),
    "unknown rounding": (lambda: {"rounding": 5}, f"{C} rounding from 0 to 4, got 5"),
    "negative rounding": (lambda: {"rounding": -1}, f"{C} rounding from 0 to 4, got -1"),
    "huge rounding": (lambda: {"rounding": 2**32}, f"{C} rounding from 0 to 4, got 4294967296"),
    "negative channels": (lambda: {"channels": -1}, f"{C} a positive number of channels, got -1"),
    "zero channels": (lambda: {"channels": 0}, f"{C} a positive number of channels, got 0"),
    "other channels": (lambda: {"channels": 4}, rf"{C} images\[0\] of 4 channels, got 3"),
}
BAD_RESULTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "unknown dtype": (lambda: {"dtype": 4}, rf"{C} dtype 0 .* or 3 \(uint8\), got 4"),
    "negative dtype": (lambda: {"dtype": -1}, rf"{C} dtype 0 .*, got -1"),
    "huge dtype": (lambda: {"dtype": 2**32}, rf"{C} dtype 0 .*, got 4294967296"),
    "unknown format": (lambda: {"memory_format": 2}, rf"{C} memory_format 0 .*, got 2"),
    "negative format": (lambda: {"memory_format": -1}, rf"{C} memory_format 0 .*, got -1"),
    "zero height": (lambda: {"height": 0}, f"{C} a size from 1 to 2147483647, got 0 x 5"),
    "negative width": (lambda: {"width": -5}, f"{C} a size from 1 to 2147483647, got 4 x -5"),
    "huge width": (lambda: {"width": 2**31}, f"{C} a size from 1 to 2147483647, got 4 x 2147"),
    "huge result": (
        lambda: {"height": 2**31 - 1, "width": 2**31 - 1},
        rf"{C} a result that fits in memory|allocate",
    ),
    "fill that is no byte": (
        lambda: {"dtype": 3, "fill": [127.5]},
        f"{C} fill to be a whole number from 0 to 255 for uint8, got 127.5",
    ),
    "fill beyond a byte": (
        lambda: {"dtype": 3, "fill": [0, 256, 0]},
        f"{C} fill to be a whole number from 0 to 255 for uint8, got 256",
    ),
}
MASK = rf"{C} mask to be a contiguous bool tensor of shape \(3, 4, 5\)"
BAD_OUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "for more images": (
        lambda: {"out": torch.zeros(4, 3, 4, 5)},
        rf"{C} out of shape \(N, C, H, W\) = \(3, 3, 4, 5\), got size 4 in dimension 0",
    ),
    "of other channels": (
        lambda: {"out": torch.zeros(3, 1, 4, 5)},
        rf"{C} out of shape \(N, C, H, W\) = \(3, 3, 4, 5\), got size 1 in dimension 1",
    ),
    "of rank 3": (lambda: {"out": torch.zeros(3, 4, 5)}, f"{C} out .*4 dimensions"),
    "without pixels": (lambda: {"out": torch.zeros(3, 3, 0, 5)}, f"{C} a size from 1"),
    "of float64": (
        lambda: {"out": torch.zeros(SHAPE, dtype=torch.float64)},
        f"{C} out.dtype to be float32, float16, bfloat16 or uint8",
    ),
    "with gaps": (
        lambda: {"out": torch.zeros(3, 3, 4, 6)[..., :5]},
        f"{C} out to be contiguous or channels_last, without gaps",
    ),
    "that overlaps itself": (
        lambda: {"out": torch.zeros(1, 3, 4, 5).expand(SHAPE)},
        f"{C} out to be contiguous or channels_last, without gaps",
    ),
    "sparse": (lambda: {"out": torch.zeros(SHAPE).to_sparse()}, "Sparse|dense"),
    "over the batch": (
        lambda: {
            key: [value] if key == "images" else value
            for key, value in out_over_the_batch().items()
        },
        rf"{C} out to share no memory with images, got an overlap with images\[",
    ),
    "of bytes, with half a byte to fill": (
        lambda: {"out": torch.zeros(SHAPE, dtype=torch.uint8), "fill": [0.5]},
        f"{C} fill to be a whole number from 0 to 255 for uint8, got 0.5",
    ),
    "with a mask of bytes": (
        lambda: {"mask": torch.zeros(3, 4, 5, dtype=torch.uint8)},
        MASK,
    ),
    "with a mask of another shape": (
        lambda: {"mask": torch.zeros(3, 5, 4, dtype=torch.bool)},
        MASK,
    ),
    "with a mask of rank 4": (
        lambda: {"mask": torch.zeros(3, 1, 4, 5, dtype=torch.bool)},
        MASK,
    ),
    "with a mask with gaps": (
        lambda: {"mask": torch.zeros(3, 4, 6, dtype=torch.bool)[..., :5]},
        MASK,
    ),
    "with a sparse mask": (
        lambda: {"mask": torch.ones(3, 4, 5, dtype=torch.bool).to_sparse()},
        "Sparse|dense",
    ),
}


def mask_over_the_images() -> dict[str, Any]:
    batch = BATCH.clone()
    mask = batch.view(-1)[7 : 7 + 60].view(torch.bool).view(3, 4, 5)
    return {"images": [batch], "mask": mask}


def mask_over_out() -> dict[str, Any]:
    out = torch.full(SHAPE, 7.0)
    return {"out": out, "mask": out.view(-1)[:15].view(torch.bool).view(3, 4, 5)}


BAD_OUTS["with a mask over the images"] = (
    mask_over_the_images,
    f"{C} mask to share no memory with images",
)
BAD_OUTS["with a mask over it"] = (mask_over_out, f"{C} mask to share no memory with out")

CASES = {
    **{f"{op}: {k}": (op, *v) for op in OUT_OR_NOT for k, v in BAD_OPERANDS.items()},
    **{f"result: {k}": (OUT_OR_NOT[0], *v) for k, v in BAD_RESULTS.items()},
    **{f"out: {k}": (OUT_OR_NOT[1], *v) for k, v in BAD_OUTS.items()},
}


def test_the_good_operands_are_good() -> None:
    result, mask = call_operator(OUT_OR_NOT[0])
    out, written_mask = torch.full(SHAPE, 7.0), torch.zeros(3, 4, 5, dtype=torch.bool)
    call_operator(OUT_OR_NOT[1], out=out, mask=written_mask)
    expected = pixfuse.reference.normalize(BATCH[:, :, :4, :5], Normalization(0.5, 0.5))
    assert_same_bits(result, expected)
    assert_same_bits(out, expected)
    assert bool(mask.all())
    assert bool(written_mask.all())


@pytest.mark.parametrize(("name", "make", "message"), CASES.values(), ids=CASES)
def test_operator(name: str, make: Callable[[], dict[str, Any]], message: str) -> None:
    changes = make()
    out = changes.get("out", torch.full(SHAPE, 7.0))
    mask = changes.get("mask")
    before, mask_before = kept(out), kept(mask)
    with pytest.raises(ANY_ERROR, match=message):
        call_operator(name, **{"out": out, **changes})
    assert_kept(out, before)
    assert_kept(mask, mask_before)


def test_operator_with_meta_tensors_asks_for_shapes_alone() -> None:
    meta = list(BATCH.to("meta"))
    for places in (placements(0, 0, 0, 0), placements(0, 0, 0, 0).to("meta")):
        result, mask = call_operator(OUT_OR_NOT[0], images=meta, placements=places)
        assert result.is_meta
        assert result.shape == SHAPE
        assert mask.shape == (3, 4, 5)
        assert call_operator(OUT_OR_NOT[1], images=meta, out=result, mask=mask) is None


META = r"crop_mirror_normalize: expected (all tensors on one device|placements on the CPU).*meta"
META_AMONG_OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "one image": lambda: {"images": [*BATCH[:2], BATCH[2].to("meta")]},
    "the first image": lambda: {"images": [BATCH[2].to("meta"), *BATCH[:2]]},
    "placements": lambda: {"placements": placements(0, 0, 0, 0).to("meta")},
    "out": lambda: {"out": torch.zeros(SHAPE, device="meta")},
    "all images": lambda: {"images": list(BATCH.to("meta"))},
    "mask": lambda: {"mask": torch.zeros(3, 4, 5, dtype=torch.bool, device="meta")},
}


@pytest.mark.parametrize("case", META_AMONG_OTHERS)
def test_operator_with_meta_tensors_among_others(case: str) -> None:
    """Nothing would be computed, so it is an error; nothing is written."""
    out, mask = torch.full(SHAPE, 7.0), torch.zeros(3, 4, 5, dtype=torch.bool)
    changes = META_AMONG_OTHERS[case]()
    with pytest.raises(ValueError, match=META):
        call_operator(OUT_OR_NOT[1], **{"out": out, "mask": mask, **changes})
    assert bool((out == 7.0).all())
    assert not bool(mask.any())
    if case in ("one image", "the first image", "placements"):
        with pytest.raises(ValueError, match=META):
            call_operator(OUT_OR_NOT[0], **changes)


def test_shapes_too_large_for_any_memory() -> None:
    one = torch.zeros(1, dtype=torch.uint8)
    large = (RuntimeError, ValueError, MemoryError)
    with pytest.raises(large):
        pixfuse.crop_mirror_normalize(one.expand(2**46, 1, 1, 1))
    for side in (2**25, 2**30):  # beyond what any process can address
        with pytest.raises(large):
            pixfuse.crop_mirror_normalize([one.expand(1, side, side)] * 8)
        with pytest.raises(large):
            pixfuse.crop_mirror_normalize(one.expand(1, 1, side, side), return_mask=True)


def test_the_tables_are_of_words() -> None:
    """Each message is compared, not only the class: none of them fits any error."""
    for _, _, message in BAD_CALLS.values():
        assert re.search(message, "crop_mirror_normalize: expected something else, got 3") is None
    for _, message in (*BAD_RESULTS.values(), *BAD_OUTS.values()):
        assert re.search(message, "crop_mirror_normalize: expected something else, got 3") is None


NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1e-46, 1e300, math.inf, math.nan]))
LISTS = st.lists(NUMBERS, max_size=4)
INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 6)
# Nothing that would fit, and fill, the memory of a machine.
SIDES = st.integers(-1, 6) | st.sampled_from([2**31, 2**62, -(2**63)])


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=3),
    rows=st.integers(0, 5),
    data=st.data(),
)
def test_operator_never_crashes(shapes: list[list[int]], rows: int, data: st.DataObject) -> None:
    places = data.draw(
        st.lists(
            st.lists(INTEGERS | st.integers(-9, 9), min_size=4, max_size=4),
            min_size=rows,
            max_size=rows,
        )
    )
    changes: dict[str, Any] = {
        "images": [torch.zeros(shape, dtype=torch.uint8) for shape in shapes],
        "placements": torch.tensor(places, dtype=torch.int64).reshape(rows, 4),
        "channels": data.draw(SIDES),
        "height": data.draw(SIDES),
        "width": data.draw(SIDES),
        "mean": data.draw(LISTS | st.just([0.5])),
        "std": data.draw(LISTS | st.just([0.5])),
        "rounding": data.draw(INTEGERS | st.integers(0, 4)),
        "fill": data.draw(LISTS | st.just([3.0])),
        "fill_is_output": data.draw(st.booleans()),
        "dtype": data.draw(INTEGERS | st.integers(0, 3)),
        "memory_format": data.draw(INTEGERS | st.integers(0, 1)),
        "out": torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=5))),
    }
    images = sum(shape[0] if len(shape) == 4 else 1 for shape in shapes)
    for name in OUT_OR_NOT:
        with contextlib.suppress(*ANY_ERROR):
            result = call_operator(name, **changes)
            if result is not None:
                expected = (images, changes["channels"], changes["height"], changes["width"])
                assert result[0].shape == expected
