"""Images as the list of a DataLoader holds them: tensors, arrays, Pillow images of every kind."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.torchvision_import import import_torchvision
from tests.images import random_bytes

tv_tensors = import_torchvision("torchvision.tv_tensors")


def _array(height: int, width: int, channels: int) -> Any:
    return random_bytes(height, width, channels).numpy()


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


# Each makes one uint8 image of fresh random bytes from channels, height and width.
SAMPLES: dict[str, Callable[[int, int, int], Any]] = {
    "tensor": random_bytes,
    "tensor of pixels": lambda c, h, w: random_bytes(h, w, c).permute(2, 0, 1),
    "tensor with an offset": lambda c, h, w: random_bytes(c * h * w + 7)[7:].view(c, h, w),
    "tensor with gaps": lambda c, h, w: random_bytes(c, h + 5, 2 * w + 7)[
        :, 2 : 2 + h, 3 : 3 + 2 * w : 2
    ],
    "tensor turned": lambda c, h, w: random_bytes(c, w, h).mT,
    "tensor of one plane": lambda c, h, w: random_bytes(1, h, w).expand(c, h, w),
    "tensor of one column": lambda c, h, w: random_bytes(c, h, 1).expand(c, h, w),
    "tv_tensor": lambda c, h, w: tv_tensors.Image(random_bytes(c, h, w)),
    "array": lambda c, h, w: _array(h, w, c),
    "array of planes": lambda c, h, w: random_bytes(c, h, w).numpy().transpose(1, 2, 0),
    "array, read-only": lambda c, h, w: _read_only(_array(h, w, c)),
    "array, rows backwards": lambda c, h, w: _array(h, w, c)[::-1],
    "array, columns backwards": lambda c, h, w: _array(h, w, c)[:, ::-1],
    "array, channels backwards": lambda c, h, w: _array(h, w, c)[:, :, ::-1],
    "array, all backwards, with gaps": lambda c, h, w: _array(2 * h, 3 * w, c + 2)[
        ::-2, ::-3, c:0:-1
    ],
    "array with an offset": lambda c, h, w: (
        random_bytes(c * h * w + 7).numpy()[7:].reshape(h, w, c)
    ),
    "array turned": lambda c, h, w: _array(w, h, c).transpose(1, 0, 2),
    "array in Fortran's order": lambda c, h, w: np.asfortranarray(_array(h, w, c)),
    "array, padded rows": lambda c, h, w: _array(h, w + 3, c)[:, :w],
    "array, one byte more per pixel": lambda c, h, w: _array(h, w, c + 1)[:, :, 1:],
    "array of one pixel": lambda c, h, w: np.broadcast_to(_array(1, 1, c), (h, w, c)),
    "array of one row": lambda c, h, w: np.broadcast_to(_array(1, w, c), (h, w, c)),
    "array of overlapping rows": lambda c, h, w: np.lib.stride_tricks.as_strided(
        random_bytes(c * (h + w)).numpy(), (h, w, c), (c, c, 1)
    ),
}


def pillow(mode: str, height: int, width: int) -> Image.Image:
    """A Pillow image of random pixels, in mode L, RGB or RGBA."""
    pixels = _array(height, width, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    return Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels)


def _palette(height: int, width: int) -> Image.Image:
    image = Image.frombytes("P", (width, height), random_bytes(height, width).numpy().tobytes())
    image.putpalette(random_bytes(768).numpy().tobytes())
    return image


def _transparent_palette(height: int, width: int) -> Image.Image:
    image = _palette(height, width)
    image.info["transparency"] = random_bytes(256).numpy().tobytes()
    return image


def _one_transparent_color(height: int, width: int) -> Image.Image:
    image = _palette(height, width)
    image.info["transparency"] = 3
    return image


def _palette_of_rgba(height: int, width: int) -> Image.Image:
    image = _palette(height, width)
    image.putpalette(random_bytes(1024).numpy().tobytes(), "RGBA")
    return image


# Every mode that has a rule: a maker of an image from height and width, and what a user would
# convert it to first.
PILLOW_IMAGES: dict[str, tuple[Callable[[int, int], Image.Image], tuple[str, ...]]] = {
    "1": (lambda h, w: pillow("L", h, w).convert("1"), ("L",)),
    "L": (lambda h, w: pillow("L", h, w), ()),
    "P": (_palette, ("RGB",)),
    "P with transparency": (_transparent_palette, ("RGBA",)),
    "P with a transparent color": (_one_transparent_color, ("RGBA",)),
    "P of RGBA": (_palette_of_rgba, ("RGBA",)),
    "PA": (lambda h, w: _palette(h, w).convert("PA"), ("RGBA",)),
    "LA": (lambda h, w: pillow("RGBA", h, w).convert("LA"), ("RGBA",)),
    "La": (lambda h, w: pillow("RGBA", h, w).convert("LA").convert("La"), ("LA", "RGBA")),
    "RGB": (lambda h, w: pillow("RGB", h, w), ()),
    "RGBX": (lambda h, w: pillow("RGB", h, w).convert("RGBX"), ("RGB",)),
    "RGBA": (lambda h, w: pillow("RGBA", h, w), ()),
    "RGBa": (lambda h, w: pillow("RGBA", h, w).convert("RGBa"), ("RGBA",)),
    "CMYK": (
        lambda h, w: Image.frombytes("CMYK", (w, h), random_bytes(h, w, 4).numpy().tobytes()),
        ("RGB",),
    ),
    "YCbCr": (lambda h, w: pillow("RGB", h, w).convert("YCbCr"), ("RGB",)),
    "LAB": (
        lambda h, w: Image.frombytes("LAB", (w, h), random_bytes(h, w, 3).numpy().tobytes()),
        ("RGB",),
    ),
    "HSV": (lambda h, w: pillow("RGB", h, w).convert("HSV"), ("RGB",)),
}


def samples(channels: int, height: int, width: int) -> list[Any]:
    """One image of every kind that can have so many channels."""
    images = [make(channels, height, width) for make in SAMPLES.values()]
    if channels == 1:
        images.append(random_bytes(height, width).numpy())
        images.append(random_bytes(height, width).numpy()[::-1, ::-1])
    modes = {1: ("1", "L"), 3: ("RGB", "RGBX", "P", "HSV"), 4: ("RGBA", "LA")}.get(channels, ())
    images += [PILLOW_IMAGES[mode][0](height, width) for mode in modes]
    return images


def contents(image: Any) -> bytes:
    """The bytes of an image, to see later whether they are still the same."""
    if isinstance(image, torch.Tensor):
        return bytes(image.cpu().contiguous().as_subclass(torch.Tensor).numpy().tobytes())
    return bytes(image.tobytes())
