"""Normalizations to test with."""

import random
import warnings
from collections.abc import Sequence

import torch

import pixfuse
from pixfuse.normalization import Rounding

ROUNDINGS: tuple[Rounding, ...] = (
    "torchvision",
    "torchvision_v1",
    "timm",
    "transformers",
    "nearest",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

PRESETS = {
    name: value for name, value in vars(pixfuse).items() if isinstance(value, pixfuse.Normalization)
}


def made_up(channels: int, rounding: Rounding, seed: int = 0) -> pixfuse.Normalization:
    """A normalization with a mean and std of its own for each channel."""
    source = random.Random(f"{channels} {rounding} {seed}")
    return pixfuse.Normalization(
        [source.uniform(0, 1) for _ in range(channels)],
        [source.uniform(0.05, 0.6) for _ in range(channels)],
        rounding,
    )


def of_any_units(
    mean: Sequence[float], std: Sequence[float], rounding: Rounding = "torchvision"
) -> pixfuse.Normalization:
    """Numbers that may look as if they were of 0 to 255, without the warning about them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Normalization: .* is in units of 0..255")
        return pixfuse.Normalization(mean, std, rounding)


def with_rounding(
    normalization: pixfuse.Normalization, rounding: Rounding
) -> pixfuse.Normalization:
    return of_any_units(normalization.mean, normalization.std, rounding)


# Where the arithmetic gets close to the ends of its range, or the sign of zero shows.
EXTREMES = (
    ((0.0,), (1e-30,)),
    ((0.0,), (1e30,)),
    ((0.5,), (1e-7,)),
    ((-3.0,), (2.0,)),
    ((200.0,), (0.01,)),
    ((1e-40,), (1.0,)),
    ((-0.0,), (1.0,)),
    ((1.0,), (255.0,)),
    ((128 / 255,), (1 / 255,)),
    ((0.0,), (1 / 65280,)),  # float16 results around its largest number
    ((0.0,), (1e7,)),  # float16 results below its smallest normal number
)
