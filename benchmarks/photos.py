"""Real photographs to work on: the two of scikit-learn, their files, and such cut from them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Crop:
    """Where a crop was taken: the photograph's index, and its upper left corner."""

    photo: int
    top: int
    left: int


def photographs() -> list[np.ndarray[Any, Any]]:
    """A temple and a flower, (427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_images

    return [np.ascontiguousarray(image) for image in load_sample_images().images]


def random_crops(
    photos: Sequence[np.ndarray[Any, Any]], count: int, side: int
) -> tuple[list[Crop], np.ndarray[Any, Any]]:
    """The crops' places, and their pixels as one (count, side, side, 3) batch."""
    random = np.random.default_rng(0)
    crops = []
    for index in range(count):
        photo = index % len(photos)
        height, width, _ = photos[photo].shape
        top, left = random.integers(0, [height - side + 1, width - side + 1])
        crops.append(Crop(photo, int(top), int(left)))
    pixels = np.stack(
        [photos[c.photo][c.top : c.top + side, c.left : c.left + side] for c in crops]
    )
    return crops, pixels


def write_jpegs(folder: Path, count: int, side: int) -> list[Path]:
    """``count`` square JPEG files cut from the photographs; quality 90, as cameras and the web."""
    from PIL import Image

    _, pixels = random_crops(photographs(), count, side)
    paths = [folder / f"{index:05}.jpg" for index in range(count)]
    for path, crop in zip(paths, pixels, strict=True):
        Image.fromarray(crop).save(path, quality=90)
    return paths


def copy_photographs(folder: Path, count: int) -> list[Path]:
    """``count`` copies of the photographs' own JPEG files, 640x427, as they were published."""
    from sklearn.datasets import load_sample_images

    originals = [Path(name) for name in load_sample_images().filenames]
    paths = [folder / f"{index:05}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        shutil.copyfile(originals[index % len(originals)], path)
    return paths
