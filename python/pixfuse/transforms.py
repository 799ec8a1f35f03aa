"""pixfuse as a transform: the tail of a torchvision pipeline, without importing torchvision."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pixfuse._checks import LARGEST, check_is_normalization, code_of, raise_too_large
from pixfuse._convert import convert, speak_as
from pixfuse._image_input import is_pillow, read_image
from pixfuse._library import DTYPE_CODES
from pixfuse.functional import crop_mirror_normalize
from pixfuse.normalization import UNIT, Normalization, PerImageStandardization

__all__ = ["ToNormalized"]

#: The Pillow modes in which torchvision's channels are the image's own.
_PILLOW_MODES = ("1", "L", "RGB", "RGBA")


class ToNormalized(nn.Module):
    """Convert the images of a sample to normalized float tensors, in one pass over each.

    Formula: ``(x / 255 - mean[c]) / std[c]``, with the steps and roundings that
    ``normalization.rounding`` names (see :class:`pixfuse.Normalization`). It stands at the end of a
    ``torchvision.transforms.v2.Compose``, in the place of ``ToImage``, ``ToDtype`` and
    ``Normalize``, or of ``ToTensor`` and ``Normalize`` in one of ``torchvision.transforms``.

    A sample is one image, or several arguments, or any nesting of tuples, lists, dicts and named
    tuples with images among other things. Images are what torchvision takes for them: every Pillow
    image, numpy array, ``tv_tensors.Image`` and ``tv_tensors.Video``; and, where there is no Pillow
    image, ``tv_tensors.Image`` or ``tv_tensors.Video``, the first plain tensor. Everything else
    (labels, masks, boxes, other tensors) comes back as it went in.

    Args:
        normalization: mean and std per channel, in units of [0, 1], and a rounding. ``rounding=
            "torchvision"`` gives the bits of v2, ``"torchvision_v1"`` those of v1. Or a
            :class:`pixfuse.PerImageStandardization`: every image, and every frame of a video or
            image of a batch, by its own mean and std, as it comes out of the transforms before;
            the bits of :func:`pixfuse.standardize_per_image`.
        dtype: ``torch.float32``, or ``torch.float16`` or ``torch.bfloat16``: the float32 result
            rounded once, half to even.

    Call with:
        Images of uint8 values 0 to 255: Pillow images of mode L, RGB, RGBA or 1; numpy arrays of
        shape (H, W) or (H, W, C), any strides; tensors of shape (C, H, W), (N, C, H, W), with more
        leading dimensions, or (H, W) for one channel, on CPU or CUDA.

    Returns:
        The sample with each image replaced by a contiguous tensor of ``dtype`` and shape
        (C, H, W), with the leading dimensions of the image: a ``tv_tensors.Image`` or
        ``tv_tensors.Video`` where the image was one, else a plain tensor.

    Raises:
        TypeError: a wrong type of argument, no image in the sample, an image of another dtype or
            Pillow mode.
        ValueError: an image of a wrong shape or channel count, results that do not fit ``dtype``.

    Equivalent to::

        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    Source:
        torchvision ``transforms.v2.Transform`` for what is an image; ``transforms.v2.Normalize``.
    """

    def __init__(
        self,
        normalization: Normalization | PerImageStandardization = UNIT,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(normalization, PerImageStandardization):
            check_is_normalization("ToNormalized", normalization)
        if code_of(dtype, DTYPE_CODES) is None:
            raise TypeError(
                "ToNormalized: expected dtype to be torch.float32, float16 or bfloat16, got "
                f"{dtype!r}"
            )
        # An image's own std leaves nothing beyond the square root of how many values it has.
        if isinstance(normalization, Normalization) and normalization.largest > LARGEST[dtype]:
            raise_too_large("ToNormalized", normalization, dtype)
        self.normalization = normalization
        self.dtype = dtype

    def forward(self, *inputs: Any) -> Any:
        """Normalize the images of one sample; see the class."""
        sample = inputs[0] if len(inputs) == 1 else inputs
        leaves, structure = tree_flatten(sample)
        chosen = _images_among(leaves)
        if not chosen:
            found = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
            raise TypeError(
                "ToNormalized: expected a sample with a Pillow image, a numpy array or a tensor, "
                f"got {found}"
            )
        try:
            for index in chosen:
                leaves[index] = self._normalized(leaves[index])
        except Exception as error:
            speak_as("ToNormalized", error, _of_one_image)
            raise
        return tree_unflatten(leaves, structure)

    def extra_repr(self) -> str:
        """The arguments, as they are written in Python."""
        return f"{self.normalization!r}, dtype={self.dtype}"

    def _normalized(self, image: Any) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return self._normalized_tensor(image)
        if isinstance(image, np.ndarray):
            _check_array(image)
        else:
            _check_mode(image.mode)
        if isinstance(self.normalization, PerImageStandardization):
            pixels = read_image("ToNormalized", image)
            return convert(pixels, self.normalization, dtype=self.dtype)
        batch: torch.Tensor = crop_mirror_normalize(
            [image], None, self.normalization, dtype=self.dtype
        )
        return batch[0]

    def _normalized_tensor(self, image: torch.Tensor) -> torch.Tensor:
        _check_tensor(image)
        wrapped = _is_tv(image, "TVTensor")
        pixels = image.as_subclass(torch.Tensor) if wrapped else image
        if pixels.ndim == 2:  # one channel, as tv_tensors.Image takes it
            pixels = pixels[None]
        leading = pixels.shape[:-3]
        if len(leading) > 1:
            pixels = pixels.flatten(0, -4)
        result = convert(pixels, self.normalization, dtype=self.dtype)
        if len(leading) > 1:
            result = result.unflatten(0, leading)
        if wrapped:
            result = sys.modules["torchvision.tv_tensors"].wrap(result, like=image)
        return result


def _of_one_image(said: str) -> str:
    """The words of ToNormalized, which has one image, and neither channels= nor input_layout=."""
    said = said.replace("images[0]", "the image")
    said = re.sub(r"; pass channels=(\d+)$", r"; convert the image to \1 channels before", said)
    hint = "; a tensor has its channels first: pass image.movedim(-1, -3)"
    return re.sub(r'; the shape fits input_layout="NHWC"$', hint, said)


def _images_among(leaves: list[Any]) -> list[int]:
    """The indices of what torchvision's ToImage, ToDtype and Normalize would take for images."""
    marked = [is_pillow(leaf) or _is_tv(leaf, "Image", "Video") for leaf in leaves]
    arrays = [isinstance(leaf, np.ndarray) for leaf in leaves]
    chosen = [index for index in range(len(leaves)) if marked[index] or arrays[index]]
    if not any(marked):
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and not _is_tv(leaf, "TVTensor"):
                # Beside an array, a label; torchvision fails here.
                if leaf.ndim >= 2 or not any(arrays):
                    chosen.append(index)
                break
    return chosen


def _is_tv(leaf: object, *names: str) -> bool:
    """Whether a leaf is one of these classes of torchvision.tv_tensors."""
    module = sys.modules.get("torchvision.tv_tensors")
    return module is not None and isinstance(leaf, tuple(getattr(module, name) for name in names))


def _check_array(image: np.ndarray) -> None:
    if image.dtype != np.uint8:
        raise TypeError(
            f"ToNormalized: expected an array of dtype uint8, got {image.dtype}; every array of a "
            "sample is taken for an image, so pass other data as a tensor or a number"
        )
    if image.ndim not in (2, 3):
        raise ValueError(
            "ToNormalized: expected an array of shape (H, W) or (H, W, C), got "
            f"{image.shape}; for a batch use pixfuse.normalize(images, input_layout='NHWC')"
        )


def _check_mode(mode: str) -> None:
    if mode not in _PILLOW_MODES:
        raise TypeError(
            f"ToNormalized: expected a Pillow image of mode {', '.join(_PILLOW_MODES)}, got "
            f"{mode}; use image.convert('RGB'), or numpy.asarray(image) for its stored channels"
        )


def _check_tensor(image: torch.Tensor) -> None:
    if image.dtype is not torch.uint8:
        raise TypeError(
            f"ToNormalized: expected an image of dtype uint8, got {image.dtype}; it stands in the "
            "place of ToTensor or ToDtype, not behind it"
        )
    if image.ndim < 2:
        raise ValueError(
            "ToNormalized: expected an image of shape (C, H, W) or (N, C, H, W), got "
            f"{tuple(image.shape)}; the first plain tensor of a sample is taken for its image"
        )
