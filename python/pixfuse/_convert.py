"""Bytes to floats by whichever of the two kinds of values says how."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pixfuse.functional import normalize
from pixfuse.normalization import Normalization, PerImageStandardization
from pixfuse.pixels import standardize_per_image


def convert(
    images: torch.Tensor | np.ndarray,
    normalization: Normalization | PerImageStandardization,
    **options: Any,
) -> torch.Tensor:
    """A uint8 batch or image as floats; the options are those that both functions have."""
    if isinstance(normalization, PerImageStandardization):
        chosen = normalization
        return standardize_per_image(images, chosen.per_channel, chosen.floor, **options)
    return normalize(images, normalization, **options)
