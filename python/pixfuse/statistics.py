"""Exact statistics of a dataset: what goes into a normalization."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import operator
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from pixfuse._checks import check_images
from pixfuse._image_input import check_not_empty
from pixfuse._output_files import replacing
from pixfuse.normalization import Normalization, Rounding
from pixfuse.pixels import Images, channel_histogram, count_each, image_counter, image_moments

_SCHEMA = "pixfuse.ChannelStatistics"
_VERSION = 1
#: Bits behind the point of the std of one image, so that stds add up exactly, in any order.
_STD_BITS = 64
_BYTES = np.arange(256)
#: Counts are int64, and so are their sums.
_MOST = 2**63 - 1


def fold_of(key: str, folds: int) -> int:
    """Say which fold an image belongs to: the same wherever and whenever it is asked.

    Formula: the first 8 bytes of the SHA-256 of ``key``, as a number, modulo ``folds``.

    Args:
        key: the image's name, e.g. its path within the dataset; of a file whose name is not UTF-8
            as Python spells it, with surrogate escapes.
        folds: how many folds there are, 1 or more.

    Returns:
        The number of the fold, from 0 to ``folds - 1``.

    Raises:
        TypeError: ``key`` is not a string, or ``folds`` not a whole number.
        ValueError: ``folds`` is below 1, or ``key`` is no text.

    Equivalent to::

        int.from_bytes(
            hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big"
        ) % folds

    Source:
        Assignment by hash, as for reproducible splits of growing datasets.
    """
    folds = _whole("fold_of", "folds", folds)
    if folds < 1:
        raise ValueError(f"fold_of: expected folds to be 1 or more, got {folds}")
    return _checked_id("fold_of", "key", key) % folds


def _id_of(key: str) -> int:
    # Names of files need not be UTF-8: their bytes as they are.
    name = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")


def _checked_id(function: str, name: str, key: object) -> int:
    """The id of what a caller gave as a key."""
    if not isinstance(key, str):
        raise TypeError(
            f"{function}: expected {name} to be a string, got {type(key).__name__}; pass str() or "
            "os.fsdecode() of it"
        )
    try:
        return _id_of(key)
    except UnicodeEncodeError:  # half of a character
        raise ValueError(
            f"{function}: expected {name} to be text or the name of a file, got {key!r}"
        ) from None


def _whole(function: str, name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{function}: expected {name} to be a whole number, got {value!r}"
        ) from None


@dataclass
class _Part:
    """What adds up: whole numbers only."""

    counts: np.ndarray  # int64 (C, 256)
    image_std_sums: list[int]  # in units of 2**-_STD_BITS of a byte
    images: int = 0
    pixels: int = 0
    ids: set[int] = field(default_factory=set)

    @staticmethod
    def empty(channels: int) -> _Part:
        return _Part(np.zeros((channels, 256), np.int64), [0] * channels)

    @staticmethod
    def of(
        counts: np.ndarray,
        sums: np.ndarray,
        squares: np.ndarray,
        pixels: Sequence[int],
        ids: Iterable[int],
    ) -> _Part:
        """Images by their histogram (C, 256), their moments (N, C) and their pixels (N)."""
        stds = [
            sum(
                math.isqrt((count * square - total**2) << (2 * _STD_BITS)) // count
                for count, total, square in zip(pixels, *moments, strict=True)
            )
            for moments in zip(sums.T.tolist(), squares.T.tolist(), strict=True)
        ]
        return _Part(counts, stds, len(pixels), sum(pixels), set(ids))

    def add(self, other: _Part) -> None:
        """In place: to add a batch costs the same however much has been counted."""
        self.counts += other.counts
        self.image_std_sums = [
            a + b for a, b in zip(self.image_std_sums, other.image_std_sums, strict=True)
        ]
        self.images += other.images
        self.pixels += other.pixels
        self.ids |= other.ids

    def combined(self, other: _Part, sign: int) -> _Part:
        sums = zip(self.image_std_sums, other.image_std_sums, strict=True)
        return _Part(
            self.counts + sign * other.counts,
            [a + sign * b for a, b in sums],
            self.images + sign * other.images,
            self.pixels + sign * other.pixels,
            self.ids | other.ids if sign > 0 else self.ids - other.ids,
        )


class ImageCounts:
    """Counts Pillow images one by one, of new keys: what :class:`ChannelStatistics` then adds."""

    def __init__(self, folds: int) -> None:
        self._folds = [(image_counter(), list[str]()) for _ in range(folds)]

    def add(self, image: Any, key: str) -> None:
        """Count an image, which has as many channels as those before."""
        folds = len(self._folds)
        counter, keys = self._folds[_id_of(key) % folds if folds > 1 else 0]
        counter.add(image)
        keys.append(key)

    def parts(self) -> list[_Part]:
        """What was counted of each fold; none of them if nothing was."""
        channels = next((len(each.counts) for each, keys in self._folds if keys), None)
        if channels is None:
            return []
        return [
            _Part.of(each.counts, each.sums, each.squares, each.pixels.tolist(), map(_id_of, keys))
            if keys
            else _Part.empty(channels)
            for each, keys in self._folds
        ]


class ChannelStatistics:
    """Count the pixels of a dataset and say what follows: mean, std, percentiles, a normalization.

    Everything that is kept is a whole number, so the result is the same, to the last bit, for any
    order of the images, batch size, worker count and number of ranks; and statistics can be added
    and subtracted: those of a training fold are the total minus the fold.

    Formula: with ``counts[c, v]`` the number of pixels whose channel ``c`` is ``v``, the mean and
    the std (over all pixels, not one less) are those of ``v / 255`` weighted by the counts,
    computed as fractions and rounded once. ``image_std`` is the mean over the images of each
    image's own std, as published for ImageNet: each taken to 64 bits behind the point of a byte,
    then averaged exactly.

    Args:
        split: the name of what is counted, e.g. ``"train"``.
        folds: in how many parts to keep the counts, for :meth:`folds`. Above 1, images need keys.

    Raises:
        TypeError: ``split`` is not a string, or ``folds`` not a whole number.
        ValueError: ``folds`` is below 1.

    Source:
        The definitions of mean, std and percentile; ImageNet's published std is a mean of stds of
        images.
    """

    def __init__(self, split: str = "", folds: int = 1) -> None:
        if not isinstance(split, str):
            raise TypeError(
                f"ChannelStatistics: expected split to be a string, got {type(split).__name__}"
            )
        folds = _whole("ChannelStatistics", "folds", folds)
        if folds < 1:
            raise ValueError(f"ChannelStatistics: expected folds to be 1 or more, got {folds}")
        self.split = split
        # Every part belongs to these statistics alone.
        self._parts: list[_Part | None] = [None] * folds
        self._reduced = False  # whether all_reduce has put other processes' images in

    # --- counting ---

    def update(
        self,
        images: Images,
        input_layout: Literal["NCHW", "NHWC"] = "NCHW",
        keys: Sequence[str] | None = None,
    ) -> None:
        """Count more images.

        Args:
            images: a batch, an image or a list of images of any sizes, as in
                :func:`pixfuse.channel_histogram`.
            input_layout: the order of the dimensions of a batch or image.
            keys: a list of a name for each image, e.g. its path within the dataset; what the
                fingerprint is made of, and what tells that two splits overlap. For all images or
                for none.

        Returns:
            Nothing.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape, no pixels, another channel count than before, not one key
                per image, a key that was counted before, or keys in some updates only.
            NotImplementedError: a device or tensor layout that has no kernel.
        """
        name = "ChannelStatistics.update"
        each = count_each(name, images, input_layout)
        if each is not None:
            self._update_counts(each, keys)
            return
        if not isinstance(images, (list, tuple)):
            images, _ = check_images(name, images, input_layout)
            shape = images.shape[-3:]
            # Channels first, as the shapes of all messages.
            check_not_empty(
                name, "images", shape if input_layout == "NCHW" else shape[-1:] + shape[:2]
            )
        sums, squares = (moments.cpu().numpy() for moments in image_moments(images, input_layout))
        pixels = [_pixels_of(images, input_layout, n) for n in range(len(sums))]

        def counts_of(members: list[int] | None) -> np.ndarray:
            if members is None or getattr(images, "ndim", 0) == 3:
                return channel_histogram(images, input_layout).cpu().numpy()
            if isinstance(images, (list, tuple)):
                return channel_histogram([images[n] for n in members]).cpu().numpy()
            each = [channel_histogram(images[n], input_layout) for n in members]
            return torch.stack(each).sum(0).cpu().numpy()

        self._update(sums, squares, pixels, counts_of, keys)

    def _update_counts(self, counts: np.ndarray, keys: Sequence[str] | None) -> None:
        """Count images by their histograms, int64 (N, C, 256): everything follows from them."""
        pixels: list[int] = counts[:, 0].sum(1).tolist()
        self._update(
            counts @ _BYTES,
            counts @ _BYTES**2,
            pixels,
            lambda members: (counts if members is None else counts[members]).sum(0),
            keys,
        )

    def _update(
        self,
        sums: np.ndarray,
        squares: np.ndarray,
        pixels: list[int],
        counts_of: Callable[[list[int] | None], np.ndarray],
        keys: Sequence[str] | None,
    ) -> None:
        """Count images by their moments (N, C) and pixels; ``counts_of`` some of them, or all."""
        count, channels = sums.shape
        self._check_channels("update", channels)
        ids = self._new_ids(keys, count)
        if count == 0:
            return
        folds = len(self._parts)
        if folds == 1:
            self._add_parts([_Part.of(counts_of(None), sums, squares, pixels, ids)])
            return
        members: list[list[int]] = [[] for _ in self._parts]
        for n, number in enumerate(ids):
            members[number % folds].append(n)
        self._add_parts(
            [
                _Part.of(
                    counts_of(own),
                    sums[own],
                    squares[own],
                    [pixels[n] for n in own],
                    [ids[n] for n in own],
                )
                if own
                else _Part.empty(channels)
                for own in members
            ]
        )

    def _add_parts(self, parts: Sequence[_Part]) -> None:
        for fold, part in enumerate(parts):  # nothing fails here
            before = self._parts[fold]
            if before is None:
                self._parts[fold] = part
            else:
                before.add(part)

    def _new_ids(self, keys: Sequence[str] | None, count: int) -> list[int]:
        if count > 0 and self.images > 0 and (keys is not None) != self._has_keys():
            before, now = ("none", "some") if keys is not None else ("some", "none")
            raise ValueError(
                "ChannelStatistics.update: expected keys for all images or for none, got "
                f"{now} after {self.images} images with {before}"
            )
        if keys is None:
            if len(self._parts) > 1:
                raise ValueError(
                    "ChannelStatistics.update: expected keys, as folds are kept apart by them, got "
                    "none"
                )
            return []
        # Not of an iterator, which ends, nor of a set, whose order says nothing.
        if not (hasattr(keys, "__len__") and hasattr(keys, "__getitem__")):
            raise TypeError(
                "ChannelStatistics.update: expected keys to be a list of strings, got "
                f"{type(keys).__name__}; pass a list, in the order of the images"
            )
        if isinstance(keys, (str, bytes)) or len(keys) != count:
            got = repr(keys) if isinstance(keys, (str, bytes)) else f"{len(keys)} keys"
            raise ValueError(
                f"ChannelStatistics.update: expected one key for each of {count} images, got {got}"
            )
        ids = [
            _checked_id("ChannelStatistics.update", f"keys[{n}]", key) for n, key in enumerate(keys)
        ]
        batch: set[int] = set()
        for key, number in zip(keys, ids, strict=True):
            part = self._parts[number % len(self._parts)]
            if number in batch or (part is not None and number in part.ids):
                raise ValueError(
                    f"ChannelStatistics.update: expected keys that are new, got {key!r} again"
                )
            batch.add(number)
        return ids

    def _check_channels(self, method: str, channels: int) -> None:
        known = next((len(part.counts) for part in self._parts if part is not None), channels)
        if known != channels:
            raise ValueError(
                f"ChannelStatistics.{method}: expected images of {known} channels, as before, got "
                f"{channels}"
            )

    def _total_or_none(self) -> _Part | None:
        return _sum_of([part for part in self._parts if part is not None])

    def _total(self, what: str) -> _Part:
        total = self._total_or_none()
        if total is None or total.pixels == 0:
            raise ValueError(
                f"ChannelStatistics.{what}: expected at least 1 image to be counted, got none; "
                "call update()"
            )
        return total

    # --- what follows ---

    @property
    def images(self) -> int:
        """How many images were counted."""
        return sum(part.images for part in self._parts if part is not None)

    @property
    def pixels(self) -> int:
        """How many pixels were counted, each with all its channels."""
        return sum(part.pixels for part in self._parts if part is not None)

    @property
    def counts(self) -> torch.Tensor:
        """The histogram of each channel: int64 (C, 256)."""
        return torch.from_numpy(self._total("counts").counts)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel over all pixels, in units of [0, 1]."""
        total = self._total("mean")
        return tuple(float(Fraction(s, 255 * total.pixels)) for s, _ in _moments(total))

    @property
    def std(self) -> tuple[float, ...]:
        """The std of each channel over all pixels, in units of [0, 1]."""
        total = self._total("std")
        n = total.pixels
        return tuple(
            _square_root(Fraction(n * squares - s * s, (255 * n) ** 2))
            for s, squares in _moments(total)
        )

    @property
    def image_std(self) -> tuple[float, ...]:
        """The mean over the images of each image's own std, in units of [0, 1]."""
        total = self._total("image_std")
        unit = 255 * total.images << _STD_BITS
        return tuple(float(Fraction(s, unit)) for s in total.image_std_sums)

    @property
    def min(self) -> tuple[int, ...]:
        """The least byte of each channel."""
        return tuple(int(row.nonzero()[0][0]) for row in self._total("min").counts)

    @property
    def max(self) -> tuple[int, ...]:
        """The greatest byte of each channel."""
        return tuple(int(row.nonzero()[0][-1]) for row in self._total("max").counts)

    def percentile(self, q: float) -> tuple[int, ...]:
        """Find the least byte that at least ``q`` percent of the pixels do not exceed.

        Args:
            q: from 0 to 100.

        Returns:
            One byte for each channel; the minimum for 0, the maximum for 100.

        Raises:
            TypeError: ``q`` is not a number.
            ValueError: ``q`` is out of range, or nothing was counted.
        """
        number: Any = q
        if not isinstance(number, (int, float, Fraction)):  # numpy's and torch's numbers
            try:
                # float() would read a string too.
                number = math.nan if isinstance(number, (str, bytes)) else float(number)
            except (RuntimeError, TypeError, ValueError):
                number = math.nan
            if math.isnan(number):
                raise TypeError(
                    f"ChannelStatistics.percentile: expected q to be a number, got {q!r}"
                )
        if not 0 <= number <= 100:
            raise ValueError(
                f"ChannelStatistics.percentile: expected q to be from 0 to 100, got {q}"
            )
        total = self._total("percentile")
        needed = max(math.ceil(Fraction(number) * total.pixels / 100), 1)
        return tuple(int(np.searchsorted(row.cumsum(), needed)) for row in total.counts)

    def normalization(
        self, rounding: Rounding = "torchvision", std: Literal["pixels", "images"] = "pixels"
    ) -> Normalization:
        """Make the normalization that brings this data to mean 0 and std 1.

        Args:
            rounding: as in :class:`pixfuse.Normalization`.
            std: ``"pixels"``: over all pixels; ``"images"``: the mean of the images' own.

        Returns:
            A :class:`pixfuse.Normalization` of one mean and std for each channel.

        Raises:
            ValueError: an unknown name, nothing was counted, or a channel of a single value.
        """
        if std not in ("pixels", "images"):
            raise ValueError(
                "ChannelStatistics.normalization: expected std to be 'pixels' or 'images', got "
                f"{std!r}"
            )
        return Normalization(self.mean, self.std if std == "pixels" else self.image_std, rounding)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of the keys that were counted, in whatever order; of nothing without keys."""
        ids = sorted(self._ids())
        return hashlib.sha256(b"".join(i.to_bytes(8, "big") for i in ids)).hexdigest()

    # --- together and apart ---

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        if not isinstance(other, ChannelStatistics):
            return NotImplemented
        self._check_like("+", other)
        overlap = self._ids() & other._ids()
        if overlap:
            warnings.warn(
                f"ChannelStatistics: {self.split or 'the first'!r} and "
                f"{other.split or 'the second'!r} have {len(overlap)} images in common, which "
                "count twice",
                stacklevel=2,
            )
        result = self._combined(other, 1)
        if result.pixels > _MOST:
            raise ValueError(
                f"ChannelStatistics: expected + of at most {_MOST} pixels together, got "
                f"{result.pixels}"
            )
        return result

    def __radd__(self, other: object) -> ChannelStatistics:
        return copy.deepcopy(self) if other == 0 else NotImplemented  # sum() begins with 0

    def __sub__(self, other: ChannelStatistics) -> ChannelStatistics:
        if not isinstance(other, ChannelStatistics):
            return NotImplemented
        self._check_like("-", other)
        result = self._combined(other, -1)
        for part in result._parts:
            if part is not None and ((part.counts < 0).any() or part.images < 0):
                raise ValueError(
                    "ChannelStatistics: expected - of a part of what was counted, got counts below "
                    "0"
                )
        missing = other._ids() - self._ids()
        if missing:
            raise ValueError(
                "ChannelStatistics: expected - of a part of what was counted, got "
                f"{len(missing)} images that were not"
            )
        for part in result._parts:
            if part is not None and len(part.ids) > part.images:  # other counted some twice
                raise ValueError(
                    "ChannelStatistics: expected - of a part of what was counted, got "
                    f"{part.images} images left for {len(part.ids)} keys"
                )
        for problem in result._contradictions():
            raise ValueError(
                "ChannelStatistics: expected - of a part of what was counted, got a difference "
                f"whose {problem.what} is {problem.got}, not {problem.expected}"
            )
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelStatistics):
            return NotImplemented
        return self._to_dict() == other._to_dict()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _has_keys(self) -> bool:
        return any(part.ids for part in self._parts if part is not None)

    def _ids(self) -> set[int]:
        return set().union(*(part.ids for part in self._parts if part is not None))

    def _check_like(self, operator: str, other: ChannelStatistics) -> None:
        if len(self._parts) != len(other._parts):
            raise ValueError(
                f"ChannelStatistics: expected {operator} of statistics with as many folds, got "
                f"{len(self._parts)} and {len(other._parts)}"
            )
        part = next((part for part in other._parts if part is not None), None)
        if part is not None:
            self._check_channels(operator, len(part.counts))
        if self.images > 0 and other.images > 0 and self._has_keys() != other._has_keys():
            raise ValueError(
                f"ChannelStatistics: expected {operator} of statistics that both have keys, or "
                f"both none, got {'keys' if self._has_keys() else 'none'} and "
                f"{'keys' if other._has_keys() else 'none'}"
            )

    def _contradictions(self) -> Iterable[_Problem]:
        """What no images could have led to: what can be said without having seen them."""
        for index, part in enumerate(self._parts):
            if part is None:
                continue
            problem = _contradiction(part)
            if problem is not None:
                yield problem._replace(what=f"parts[{index}].{problem.what}")
            folds = len(self._parts)
            strangers = sum(number % folds != index for number in part.ids)
            if strangers or (folds > 1 and part.images > 0 and not part.ids):
                yield _Problem(
                    f"parts[{index}].ids",
                    f"the keys of the images of fold {index} of {folds}",
                    f"{len(part.ids)} keys, {strangers} of them of others",
                )

    def _combined(self, other: ChannelStatistics, sign: int) -> ChannelStatistics:
        same = sign < 0 or self.split == other.split
        result = ChannelStatistics(
            self.split if same else f"{self.split}+{other.split}", len(self._parts)
        )
        result._reduced = self._reduced or other._reduced
        for index, (a, b) in enumerate(zip(self._parts, other._parts, strict=True)):
            either = a or b
            if either is not None:
                empty = _Part.empty(len(either.counts))
                result._parts[index] = (a or empty).combined(b or empty, sign)
        return result

    def folds(self, k: int) -> list[ChannelStatistics]:
        """Give the training statistics of each fold of a cross-validation, from one pass.

        Fold ``i`` holds the images with ``fold_of(key, k) == i``; its training statistics are those
        of all other images. Made with ``ChannelStatistics(split, folds=k)``, or a multiple of
        ``k``, and every ``update`` was given keys.

        Args:
            k: how many folds, 2 or more; the ``folds`` of the constructor must be a multiple of it.

        Returns:
            ``k`` statistics: ``[s.normalization() for s in statistics.folds(5)]``.

        Raises:
            TypeError: ``k`` is not a whole number.
            ValueError: ``k`` is below 2, or does not divide the ``folds`` of the constructor.
        """
        k = _whole("ChannelStatistics.folds", "k", k)
        kept = len(self._parts)
        if k < 2 or kept % k != 0:
            raise ValueError(
                f"ChannelStatistics.folds: expected k to be 2 or more and to divide {kept}, the "
                f"folds that were kept apart, got {k}; pass folds={max(k, 2)} when it is made"
            )
        present = [part for part in self._parts if part is not None]
        total = _sum_of(present)
        training = []
        for fold in range(k):
            result = ChannelStatistics(f"{self.split}-fold{fold}of{k}")
            own = [part for part in self._parts[fold::k] if part is not None]
            # All but the fold: to add up the others would take time by the square of k.
            if total is not None and len(own) < len(present):
                result._parts = [total.combined(_sum_of(own) or _Part.empty(len(total.counts)), -1)]
            result._reduced = self._reduced
            training.append(result)
        return training

    def all_reduce(self, group: Any = None) -> None:
        """Add up the statistics of all processes of a group, in each of them; once.

        Args:
            group: of ``torch.distributed``; None for all processes.

        Returns:
            Nothing; afterwards every process has the sum, the same bits as one process would have.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialized, or these statistics have been
                added up before: the images would count once more for each process.
            ValueError: the processes have different channel counts or folds.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "ChannelStatistics.all_reduce: expected torch.distributed to be initialized; call "
                "torch.distributed.init_process_group first"
            )
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        own = (self._reduced, self._to_dict())
        torch.distributed.all_gather_object(gathered, own, group=group)
        # After the exchange, so that all processes fail when one does.
        if any(reduced for reduced, _ in gathered):
            raise RuntimeError(
                "ChannelStatistics.all_reduce: expected statistics of one process each, got the "
                "sum of several, whose images would count again; call it once, after the last "
                "update()"
            )
        total = ChannelStatistics(self.split, len(self._parts))
        for _, content in gathered:
            what = "ChannelStatistics.all_reduce: expected the statistics of each process"
            one = ChannelStatistics._from_dict(content, what)
            one.split = self.split
            total = total + one
        self._parts = total._parts
        self._reduced = True

    # --- files ---

    def save(self, path: str | Path) -> None:
        """Write a JSON file; the same counts make the same file.

        Args:
            path: of the file, which is replaced as a whole.

        Returns:
            Nothing.

        Raises:
            OSError: the file cannot be written, or is a device, a pipe or a folder.
        """
        with replacing(Path(path)) as unfinished:
            unfinished.write_text(json.dumps(self._to_dict(), indent=1, sort_keys=True) + "\n")

    @staticmethod
    def load(path: str | Path) -> ChannelStatistics:
        """Read a file of :meth:`save`, checked.

        Args:
            path: of the file.

        Returns:
            The statistics that were saved.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file, of another version, or its numbers contradict.
        """
        where = f"ChannelStatistics.load: expected {str(path)!r}"
        try:
            content = json.loads(Path(path).read_text())
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{where} to be JSON, got: {error}") from None
        return ChannelStatistics._from_dict(content, where)

    def _to_dict(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "version": _VERSION,
            "split": self.split,
            "fingerprint": self.fingerprint,
            "parts": [
                None
                if part is None
                else {
                    "images": part.images,
                    "pixels": part.pixels,
                    "counts": part.counts.tolist(),
                    "image_std_sums": [str(s) for s in part.image_std_sums],
                    "ids": base64.b64encode(
                        b"".join(i.to_bytes(8, "big") for i in sorted(part.ids))
                    ).decode(),
                }
                for part in self._parts
            ],
        }

    @staticmethod
    def _from_dict(content: Any, where: str) -> ChannelStatistics:
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != _SCHEMA:
            raise ValueError(f"{where} to have schema {_SCHEMA!r}, got {schema!r}")
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{where} to have version {_VERSION}, got {content.get('version')!r}; it was "
                "written by another version of pixfuse"
            )
        split, parts = (_saved(content, name, kind, where) for name, kind in _TOP.items())
        if not parts:
            raise ValueError(f"{where} to have parts of at least 1 fold, got []")
        result = ChannelStatistics(split, len(parts))
        for index, saved in enumerate(parts):
            if saved is not None:
                result._parts[index] = _read_part(saved, f"parts[{index}]", where)
        channels = [len(part.counts) for part in result._parts if part is not None]
        if len(set(channels)) > 1:
            raise ValueError(f"{where} to have one channel count, got {sorted(set(channels))}")
        for problem in result._contradictions():
            raise ValueError(
                f"{where} to have {problem.expected} as {problem.what}, got {problem.got}"
            )
        if result.pixels > _MOST:
            raise ValueError(f"{where} to have at most {_MOST} pixels, got {result.pixels}")
        if result.fingerprint != content.get("fingerprint"):
            raise ValueError(
                f"{where} to have the fingerprint {result.fingerprint} of its keys, got "
                f"{content.get('fingerprint')!r}"
            )
        return result

    def __repr__(self) -> str:
        return (
            f"<ChannelStatistics {self.split!r}: {self.images} images, {self.pixels} pixels, "
            f"fingerprint {self.fingerprint[:12]}>"
        )


#: The kinds of what a file holds, in its order.
_TOP = {"split": str, "parts": list}
_KINDS: dict[Any, str] = {str: "a string", list: "a list", dict: "an object"}
#: The sums of stds of any images whose pixels can be counted have fewer digits.
_DIGITS = re.compile("[0-9]{1,50}", re.ASCII)


def _saved(content: dict[str, Any], name: str, kind: type, where: str, within: str = "") -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        got = reprlib.repr(value) if name in content else "none"
        raise ValueError(f"{where} to have {_KINDS[kind]} as {within}{name}, got {got}")
    return value


def _saved_whole(value: object, name: str, where: str) -> int:
    # Not an instance of int alone: True is one.
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(
            f"{where} to have a whole number from 0 to {_MOST} as {name}, got {reprlib.repr(value)}"
        )
    return value


def _read_part(saved: object, name: str, where: str) -> _Part:
    """A part of a file, each of its numbers by itself in order."""
    if not isinstance(saved, dict):
        raise ValueError(f"{where} to have an object or null as {name}, got {reprlib.repr(saved)}")
    within = f"{name}."
    counts = _saved(saved, "counts", list, where, within)
    if not counts or not all(isinstance(row, list) and len(row) == 256 for row in counts):
        raise ValueError(
            f"{where} to have 256 numbers for each channel as {name}.counts, got "
            f"{reprlib.repr(counts)}"
        )
    for c, row in enumerate(counts):
        for value, number in enumerate(row):
            _saved_whole(number, f"{name}.counts[{c}][{value}]", where)
    sums = _saved(saved, "image_std_sums", list, where, within)
    if len(sums) != len(counts):
        raise ValueError(
            f"{where} to have one number for each of {len(counts)} channels as "
            f"{name}.image_std_sums, got {len(sums)}"
        )
    for c, digits in enumerate(sums):
        if not isinstance(digits, str) or not _DIGITS.fullmatch(digits):
            raise ValueError(
                f"{where} to have a string of at most 50 digits as {name}.image_std_sums[{c}], got "
                f"{reprlib.repr(digits)}"
            )
    text = _saved(saved, "ids", str, where, within)
    try:
        packed = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{where} to have base64 as {name}.ids, got: {error}") from None
    ids = [int.from_bytes(packed[i : i + 8], "big") for i in range(0, len(packed), 8)]
    if len(packed) % 8 != 0 or len(set(ids)) != len(ids):
        raise ValueError(
            f"{where} to have different keys of 8 bytes each as {name}.ids, got {len(set(ids))} "
            f"of {len(packed)} bytes"
        )
    return _Part(
        np.array(counts, np.int64),
        [int(digits) for digits in sums],
        _saved_whole(saved.get("images"), f"{name}.images", where),
        _saved_whole(saved.get("pixels"), f"{name}.pixels", where),
        set(ids),
    )


class _Problem(NamedTuple):
    """A number that cannot be, beside the others."""

    what: str
    expected: str
    got: Any


def _contradiction(part: _Part) -> _Problem | None:
    """What no images could have led to, if anything."""
    for c, row in enumerate(part.counts.tolist()):
        if sum(row) != part.pixels:  # of Python's numbers, which do not overflow
            return _Problem("pixels", f"{sum(row)}, the sum of counts[{c}]", part.pixels)
    least = 1 if part.pixels > 0 else 0
    if not least <= part.images <= part.pixels:
        return _Problem("images", f"{least} to {part.pixels} for {part.pixels} pixels", part.images)
    if len(part.ids) > part.images:
        return _Problem("ids", f"the keys of {part.images} images", f"{len(part.ids)} keys")
    for c, (total, squares) in enumerate(_moments(part)):
        spread = part.pixels * squares - total**2 if part.pixels > 0 else 0
        if part.images == 1:
            least = most = math.isqrt(spread << (2 * _STD_BITS)) // part.pixels
        else:
            # The stds of images are largest where all images have the same mean: with n pixels
            # each, sum(n * std**2) <= spread / pixels, and sum(std)**2 <= images * sum(std**2).
            least = 0
            most = math.isqrt((part.images * spread << (2 * _STD_BITS)) // max(part.pixels, 1))
        if not least <= part.image_std_sums[c] <= most:
            bounds = f"{least}" if least == most else f"{least} to {most}"
            return _Problem(
                f"image_std_sums[{c}]", f"{bounds} for these counts", part.image_std_sums[c]
            )
    return None


def _sum_of(parts: list[_Part]) -> _Part | None:
    """A part of its own; None for the sum of none."""
    if not parts:
        return None
    total = _Part.empty(len(parts[0].counts))
    for part in parts:
        total.add(part)
    return total


def _moments(part: _Part) -> list[tuple[int, int]]:
    """Sum and sum of squares of each channel, as Python's unlimited integers."""
    return [
        (
            sum(v * n for v, n in enumerate(row)),
            sum(v * v * n for v, n in enumerate(row)),
        )
        for row in part.counts.tolist()
    ]


def _square_root(value: Fraction) -> float:
    """The nearest float to the square root of a fraction."""
    bits = 256
    scaled, rest = divmod(value.numerator << (2 * bits), value.denominator)
    root = math.isqrt(scaled)
    exact = rest == 0 and root * root == scaled
    # Not exact: a little more than the root rounded down, which is never halfway between floats.
    return float(Fraction(2 * root + (0 if exact else 1), 2 << bits))


def _pixels_of(images: Any, input_layout: str, n: int) -> int:
    """How many pixels image ``n`` has."""
    if not isinstance(images, (list, tuple)):
        height, width = images.shape[-2:] if input_layout == "NCHW" else images.shape[-3:-1]
        return int(height * width)
    image = images[n]
    if isinstance(image, torch.Tensor):
        return int(image.shape[-2] * image.shape[-1])
    if isinstance(image, np.ndarray):
        return int(image.shape[0] * image.shape[1])
    return int(image.width * image.height)
