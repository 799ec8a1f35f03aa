"""Collate: the samples of a DataLoader to a batch, their images through crop_mirror_normalize."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from pixfuse._convert import convert, speak_as
from pixfuse._image_input import Images, is_pillow, read_images
from pixfuse._placement import resolve_channels, resolve_size
from pixfuse._shared_memory import shared_output
from pixfuse.functional import crop_mirror_normalize
from pixfuse.normalization import UNIT, Normalization, PerImageStandardization


class Collate:
    """Make batches of samples as torch's ``default_collate`` does, their images normalized.

    Formula: that of :func:`pixfuse.crop_mirror_normalize`, whose bits these are; with a
    :class:`pixfuse.PerImageStandardization` that of :func:`pixfuse.standardize_per_image` on the
    bytes that ``dtype=torch.uint8`` would give: the mean and std are those of each image as the
    model gets it, after cropping, mirroring and padding, the fill included.

    An object of this class is a ``collate_fn``. Samples may be nested at will: tuples, lists,
    mappings, named tuples; every image in them becomes part of a batch (N, C, height, width), and
    everything else becomes what torch makes of it, by its own ``default_collate_fn_map``. These are
    images:

    - every Pillow image. (Turn masks that are Pillow images into tensors first.)
    - numpy arrays of dtype uint8 and shape (H, W, C), where C is 1, 3, 4 or ``channels``;
    - tensors of dtype uint8 and shape (C, H, W), likewise; of torchvision's ``tv_tensors`` only
      ``Image``.

    Bytes of any other shape are left to torch: above all those of shape (H, W), which may be masks
    as well as images. ``array[..., None]`` makes an image of one.

    In a worker the batch is written straight into shared memory, which is used again once the main
    process has dropped the batch; in the main process into recycled memory. ``dtype=torch.uint8``
    packs the bytes as they are, a quarter of the size, for :class:`pixfuse.DeviceLoader` to
    normalize. Random numbers come from torch's default generator, one draw per image:
    ``torch.manual_seed`` makes them reproducible, and each worker has a seed of its own. Can be
    pickled, for workers of any start method.

    With ``batch_size=None`` a ``DataLoader`` hands over each sample alone: then the samples of the
    dataset have to be lists of samples, which become the batches.

    While a call runs, no other thread may resize or free the storage of a tensor among the samples:
    it is read in place. (Writing its pixels meanwhile crashes nothing; which of them are read is
    open.) A batch from a worker lies in memory that the worker writes into again once the process
    that received it has dropped it; a child that this process forks sees the same memory, so it
    has to ``clone()`` a batch that it keeps longer.

    Args:
        normalization: mean and std per channel, and a rounding; or a ``PerImageStandardization``.
        size: of the batches, an int or (height, width); together with ``crop``. None: that of the
            images, which must be one within a batch.
        crop: where the window lies. ``"center"`` as torchvision's ``CenterCrop``; ``"random"`` as
            its ``RandomCrop``: any place within the image, all equally likely, and with
            ``out_of_bounds="pad"`` and a smaller image any place around the image.
        mirror: the probability, 0 to 1, of turning left and right around.
        flip: the probability of turning top and bottom around.
        same_within_sample: whether all images of a sample get the same draw: mirrored and flipped
            alike, and cropped at the same place (the same share of the room that there is).
        channels: of the batches; None: that of the images. See ``crop_mirror_normalize``, as for
            all that follow.
        out_of_bounds: ``"error"`` or ``"pad"``.
        fill: a number, or one per channel; whole with a ``PerImageStandardization``.
        fill_space: ``"input"`` or ``"output"``; a ``PerImageStandardization`` takes the first, as
            the fill is among the pixels whose mean and std are taken.
        return_mask: whether a pair (batch, mask) stands where the batch would.
        dtype: ``torch.float32``, ``torch.float16``, ``torch.bfloat16`` or ``torch.uint8``.
        memory_format: ``torch.contiguous_format`` or ``torch.channels_last``.

    Returns:
        Of a call with a list of samples: a batch. Images have shape (N, C, height, width), are of
        ``dtype`` and dense in ``memory_format``.

    Warns:
        UserWarning: of a call, there is no image in any sample, as where ``ToTensor`` has made
            floats of them. Such a batch is what torch makes of it.

    Raises:
        TypeError, ValueError: a wrong option, when the object is made; or, of a call, samples that
            do not fit together, and whatever ``crop_mirror_normalize`` raises: what is wrong with
            one image names the sample, counted from 0 within the batch.
        OSError: of a call, a file that Pillow cannot read to its end; names the sample.

    Equivalent to::

        transform = transforms.v2.Compose([
            transforms.v2.ToImage(),
            transforms.v2.RandomCrop(size),
            transforms.v2.RandomHorizontalFlip(mirror),
            transforms.v2.ToDtype(torch.float32, scale=True),
            transforms.v2.Normalize(mean, std),
        ])  # per image, in the dataset; then
        torch.utils.data.default_collate(samples)

    Source:
        PyTorch ``torch/utils/data/_utils/collate.py``; torchvision ``transforms.v2``.
    """

    def __init__(
        self,
        normalization: Normalization | PerImageStandardization = UNIT,
        size: int | Sequence[int] | None = None,
        crop: Literal["center", "random"] | None = None,
        *,
        mirror: float = 0.0,
        flip: float = 0.0,
        same_within_sample: bool = False,
        channels: int | None = None,
        out_of_bounds: Literal["error", "pad"] = "error",
        fill: float | Sequence[float] = 0.0,
        fill_space: Literal["input", "output"] = "input",
        return_mask: bool = False,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        _check_crop(crop, size)
        _check_probability("mirror", mirror)
        _check_probability("flip", flip)
        self.normalization = normalization
        self.size = size
        self.crop = crop
        self.mirror = mirror
        self.flip = flip
        self.same_within_sample = same_within_sample
        self.channels = channels
        self.out_of_bounds = out_of_bounds
        self.fill = fill
        self.fill_space = fill_space
        self.return_mask = return_mask
        self.dtype = dtype
        self.memory_format = memory_format
        with _speaking_as_collate():
            self._check_options()

    def _check_options(self) -> None:
        """Here, rather than in a worker at the first batch: one pixel is enough to check them."""
        pixel = [np.zeros((1, 1), np.uint8)]
        resolve_size(read_images(pixel), self.size)
        values = max(len(getattr(self.normalization, "mean", ())), np.asarray(self.fill).size, 1)
        options = self._options() | {"channels": values if self.channels is None else self.channels}
        per_image = isinstance(self.normalization, PerImageStandardization)
        normalization: Any = UNIT if per_image else self.normalization
        crop_mirror_normalize(pixel, None, normalization, **options)
        if per_image:
            _check_fill_of_pixels(self.fill, self.fill_space)

    def _options(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "out_of_bounds": self.out_of_bounds,
            "fill": self.fill,
            "fill_space": self.fill_space,
            "return_mask": self.return_mask,
            "dtype": self.dtype,
            "memory_format": self.memory_format,
        }

    def __call__(self, samples: Sequence[Any]) -> Any:
        """The batch of a list of samples."""
        if not isinstance(samples, (list, tuple)):
            raise TypeError(
                f"Collate: expected samples to be a list, got {type(samples).__name__}; with "
                "batch_size=None a DataLoader hands over each sample alone"
            )
        if len(samples) == 0:
            raise ValueError("Collate: expected at least 1 sample, got none")
        call = _Call(self)
        batch = collate(list(samples), collate_fn_map=call.functions())
        if not call.found_images:
            warnings.warn(
                "Collate: expected images in the samples, got none, so nothing was normalized; "
                "leave ToTensor and the like out of the dataset: images are Pillow images, or "
                "bytes of shape (H, W, C) as arrays and (C, H, W) as tensors",
                UserWarning,
                stacklevel=2,
            )
        return batch

    def __repr__(self) -> str:
        options = {
            "crop": self.crop,
            "mirror": self.mirror,
            "flip": self.flip,
            "same_within_sample": self.same_within_sample,
            **self._options(),
        }
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"Collate({self.normalization}, size={self.size!r}, {listed})"

    def _batch(self, images: Sequence[Any], draws: torch.Tensor | None) -> Any:
        """One batch of images, with four random numbers from 0 to 1 for each of them."""
        source = read_images(images)
        height, width = resolve_size(source, self.size)
        options = self._options()
        if draws is not None:
            options["mirror"] = draws[:, 0] < self.mirror
            options["flip"] = draws[:, 1] < self.flip
            if self.crop == "random":
                rows, columns = _rooms(source, height, width)
                options["top"] = _random_place(rows, draws[:, 2])
                options["left"] = _random_place(columns, draws[:, 3])
        out = None
        if source.device.type == "cpu" and torch.utils.data.get_worker_info() is not None:
            shape = (source.count, resolve_channels(source, self.channels), height, width)
            out = shared_output(shape, self.dtype, self.memory_format)
        crop = partial(crop_mirror_normalize, cast("Any", source), self.size)
        if isinstance(self.normalization, Normalization):
            return crop(self.normalization, out=out, **options)
        if self.dtype is torch.uint8:
            return crop(UNIT, out=out, **options)
        packed = crop(UNIT, **options | {"dtype": torch.uint8})
        pixels, mask = packed if self.return_mask else (packed, None)
        chosen = {"dtype": self.dtype, "memory_format": self.memory_format, "out": out}
        result = convert(pixels, self.normalization, **chosen)
        return result if mask is None else (result, mask)


@contextmanager
def _speaking_as_collate() -> Iterator[None]:
    """Errors of what works for it in the words of Collate, which has samples, not images."""
    try:
        yield
    except Exception as error:
        speak_as("Collate", error, _of_samples)
        raise


def _of_samples(said: str) -> str:
    return re.sub(r"\bimages\[(\d+)\]", r"the image of sample \1", said)


def _check_fill_of_pixels(fill: Any, fill_space: str) -> None:
    """A fill whose mean and std are taken with those of the image; other checks come before."""
    if fill_space != "input":
        raise ValueError(
            "Collate: expected fill_space to be 'input' with a PerImageStandardization, got "
            f"{fill_space!r}; the fill is among the pixels whose mean and std are taken"
        )
    if any(value != int(value) for value in np.ravel(fill).tolist()):
        raise ValueError(
            "Collate: expected fill to be a whole number with a PerImageStandardization, got "
            f"{fill}; it is among the pixels whose mean and std are taken, which are bytes"
        )


def _check_crop(crop: object, size: object) -> None:
    if crop not in (None, "center", "random"):
        raise ValueError(f"Collate: expected crop to be 'center', 'random' or None, got {crop!r}")
    if size is not None and crop is None:
        raise ValueError(
            f"Collate: expected crop with size={size!r}, got None; choose crop='center' or "
            "crop='random'"
        )
    if size is None and crop is not None:
        raise ValueError(f"Collate: expected size with crop={crop!r}, got None; pass size=")


def _check_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"Collate: expected {name} to be a probability from 0 to 1, got {value!r}; 0.5 is for "
            "half of the images"
        )
    if not 0 <= value <= 1:
        raise ValueError(f"Collate: expected {name} to be a probability from 0 to 1, got {value}")


class _Call:
    """One call of a Collate: what torch's collate asks at the leaves of the samples."""

    def __init__(self, owner: Collate) -> None:
        self.owner = owner
        self.found_images = False
        self.draws: torch.Tensor | None = None

    def functions(self) -> dict[Any, Callable[..., Any]]:
        """Torch's own, as they are now, and ours for what may be an image."""
        kinds = [torch.Tensor, np.ndarray]
        pillow = sys.modules.get("PIL.Image")
        if pillow is not None:  # otherwise there is no Pillow image
            kinds.append(pillow.Image)
        return {**default_collate_fn_map, **dict.fromkeys(kinds, self.collate_leaves)}

    def collate_leaves(self, values: Sequence[Any], *, collate_fn_map: object = None) -> Any:
        are_images = [is_image(value, self.owner.channels) for value in values]
        if all(are_images):
            self.found_images = True
            with _speaking_as_collate():
                return self.owner._batch(values, self.draw(len(values)))
        if any(are_images):
            other = are_images.index(not are_images[0])
            raise TypeError(
                "Collate: expected images in the same place of all samples or of none, got "
                f"{_describe(values[0])} in sample 0 and {_describe(values[other])} in sample "
                f"{other}{_hint(values[are_images.index(False)])}"
            )
        # Not with our functions: an array that is no image could be one as a tensor.
        return collate(values, collate_fn_map=default_collate_fn_map)

    def draw(self, count: int) -> torch.Tensor | None:
        owner = self.owner
        if owner.crop != "random" and owner.mirror == 0 and owner.flip == 0:
            return None
        if self.draws is not None and owner.same_within_sample:
            return self.draws
        # In float64, of which 0 to 1 has 2**53 values: all places are equally likely.
        self.draws = torch.rand(count, 4, dtype=torch.float64, device="cpu")
        return self.draws


def is_image(value: Any, channels: int | None) -> bool:
    """The rule of the class docstring."""
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.uint8 or value.ndim != 3:
            return False
        kinds = sys.modules.get("torchvision.tv_tensors")
        if kinds is not None and isinstance(value, kinds.TVTensor):
            return isinstance(value, kinds.Image)
        return value.shape[0] in (1, 3, 4, channels)
    if isinstance(value, np.ndarray):
        return value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] in (1, 3, 4, channels)
    return is_pillow(value)


def _describe(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return kind


def _hint(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 2:
        return "; array[..., None] makes an image of (H, W)"
    if isinstance(value, torch.Tensor) and value.dtype is torch.uint8 and value.ndim == 2:
        return "; tensor[None] makes an image of (H, W)"
    return ""


def _rooms(source: Images, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows and columns each image has more than its window; below 0 where fewer."""
    sizes = torch.as_tensor(source.common or source.each, dtype=torch.int64, device="cpu")
    return sizes[..., 0] - height, sizes[..., 1] - width


def _random_place(room: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """From 0 to room inclusive, each as likely, for draws from 0 to 1."""
    places = (draws * (room.abs() + 1)).floor().to(torch.int64)
    # The largest draw times the number of places may round to the number itself.
    return torch.minimum(places, room.abs()) * room.sign()
