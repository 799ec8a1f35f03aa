"""Bytes to floats by whichever of the two kinds of values says how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pixfuse.functional import normalize
from pixfuse.normalization import Normalization, PerImageStandardization
from pixfuse.pixels import standardize_per_image

#: What errors of the functions that others work with begin with.
_FUNCTIONS = ("normalize: ", "crop_mirror_normalize: ", "standardize_per_image: ")


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


def speak_as(name: str, error: Exception, reword: Callable[[str], str] | None = None) -> None:
    """Give an error of one of those functions the name of what its user called.

    ``reword`` changes what speaks of arguments that this does not have.
    """
    message = error.args[0] if len(error.args) == 1 else None
    if isinstance(message, str) and message.startswith(_FUNCTIONS):
        said = message.partition(": ")[2]
        error.args = (f"{name}: {said if reword is None else reword(said)}",)
