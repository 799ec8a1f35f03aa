"""Python's images as memory: the compiled module of csrc/images."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

class ImageList:
    """Images in memory that stays alive with this list."""

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(N, 3): height, width and channels of each image."""

    @property
    def common(self) -> tuple[int, int, int] | None:
        """Height, width and channels of every image; None where they differ."""

    def __len__(self) -> int: ...
    def crop_mirror_normalize(
        self,
        placements: npt.NDArray[np.int64],
        channels: int,
        height: int,
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
        rounding: int,
        fill: Sequence[float],
        fill_is_output: bool,
        dtype: int,
        output: int,
        output_strides: Sequence[int],
        mask: int,
    ) -> None:
        """Do the work without the GIL; `output` and `mask` are addresses, `mask` may be 0."""

    def channel_histogram(self, each: bool) -> npt.NDArray[np.int64]:
        """Counts (C, 256) of all images, or of each (N, C, 256); of one channel count."""

    def image_moments(self) -> npt.NDArray[np.int64]:
        """(2, N, C): sums, and sums of squares; of images of one channel count."""

class ImageCounter:
    """Counts images one by one, all of one channel count."""

    def __init__(self, arrow: bool) -> None: ...
    def add(self, image: object) -> None: ...
    @property
    def pixels(self) -> npt.NDArray[np.int64]:
        """(N,): the pixels of each image."""

    @property
    def sums(self) -> npt.NDArray[np.int64]:
        """(N, C): the sums of each image."""

    @property
    def squares(self) -> npt.NDArray[np.int64]:
        """(N, C): the sums of the squares of each image."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(C, 256): the histograms of all images together."""

def read(images: Sequence[object], arrow: bool, function: str = ...) -> ImageList:
    """Find the memory of Pillow images, numpy arrays and CPU tensors; copy what cannot be read."""

def normalize_small(
    images: object,
    normalization: object,
    input_layout: object,
    dtype: object,
    memory_format: object,
    out: object,
) -> torch.Tensor | None:
    """pixfuse.normalize without torch's dispatcher; None where a call is not plain and small."""
