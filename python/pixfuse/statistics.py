"""Exact statistics of a dataset: what goes into a normalization."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pixfuse.normalization import Normalization, Rounding
from pixfuse.pixels import Images, channel_histogram, count_each, image_moments

_SCHEMA = "pixfuse.ChannelStatistics"
_VERSION = 1
#: Bits behind the point of the std of one image, so that stds add up exactly, in any order.
_STD_BITS = 64
_BYTES = np.arange(256)


def fold_of(key: str, folds: int) -> int:
    """Say which fold an image belongs to: the same wherever and whenever it is asked.

    Formula: the first 8 bytes of the SHA-256 of ``key``, as a number, modulo ``folds``.

    Args:
        key: the image's name, e.g. its path within the dataset.
        folds: how many folds there are, 1 or more.

    Returns:
        The number of the fold, from 0 to ``folds - 1``.

    Raises:
        ValueError: ``folds`` is below 1.

    Equivalent to::

        int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % folds

    Source:
        Assignment by hash, as for reproducible splits of growing datasets.
    """
    if folds < 1:
        raise ValueError(f"fold_of: expected folds to be 1 or more, got {folds}")
    return _id_of(key) % folds


def _id_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


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
        TypeError: ``split`` is not a string.
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
            keys: a name for each image, e.g. its path within the dataset; what the fingerprint is
                made of, and what tells that two splits overlap. For all images or for none.

        Returns:
            Nothing.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape, another channel count than before, not one key per image, a
                key that was counted before, or keys in some updates only.
        """
        each = count_each("image_moments", images, input_layout)
        if each is not None:
            self._update_counts(each, keys)
            return
        sums, squares = (moments.cpu().numpy() for moments in image_moments(images, input_layout))
        pixels = [_pixels_of(images, input_layout, n) for n in range(len(sums))]

        def counts_of(n: int | None) -> np.ndarray:
            image = images if n is None or getattr(images, "ndim", 0) == 3 else images[n]
            one: Any = [image] if n is not None and isinstance(images, (list, tuple)) else image
            return channel_histogram(one, input_layout).cpu().numpy()

        self._update(sums, squares, pixels, counts_of, keys)

    def _update_counts(self, counts: np.ndarray, keys: Sequence[str] | None) -> None:
        """Count images by their histograms, int64 (N, C, 256): everything follows from them."""
        pixels: list[int] = counts[:, 0].sum(1).tolist()
        self._update(
            counts @ _BYTES,
            counts @ _BYTES**2,
            pixels,
            lambda n: counts.sum(0) if n is None else counts[n],
            keys,
        )

    def _update(
        self,
        sums: np.ndarray,
        squares: np.ndarray,
        pixels: list[int],
        counts_of: Callable[[int | None], np.ndarray],
        keys: Sequence[str] | None,
    ) -> None:
        """Count images by their moments (N, C) and pixels; ``counts_of`` one of them, or all."""
        count, channels = sums.shape
        self._check_channels("update", channels)
        ids = self._new_ids(keys, count)
        whole = len(self._parts) == 1
        if count == 0:
            return
        added = [_Part.empty(channels) for _ in self._parts]
        for n, (of_sums, of_squares) in enumerate(
            zip(sums.tolist(), squares.tolist(), strict=True)
        ):
            fold = 0 if whole else ids[n] % len(self._parts)
            part = added[fold]
            if not whole:
                part.counts += counts_of(n)
            part.images += 1
            part.pixels += pixels[n]
            part.ids.update(ids[n : n + 1])
            for c in range(channels):
                spread = pixels[n] * of_squares[c] - of_sums[c] ** 2
                part.image_std_sums[c] += math.isqrt(spread << (2 * _STD_BITS)) // pixels[n]
        if whole:
            added[0].counts += counts_of(None)
        for fold, part in enumerate(added):  # nothing fails from here on
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
        if isinstance(keys, str) or len(keys) != count:
            got = repr(keys) if isinstance(keys, str) else f"{len(keys)} keys"
            raise ValueError(
                f"ChannelStatistics.update: expected one key for each of {count} images, got {got}"
            )
        ids = [_id_of(key) for key in keys]
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
            ValueError: ``q`` is out of range, or nothing was counted.
        """
        if not 0 <= q <= 100:
            raise ValueError(
                f"ChannelStatistics.percentile: expected q to be from 0 to 100, got {q}"
            )
        total = self._total("percentile")
        needed = max(math.ceil(Fraction(q) * total.pixels / 100), 1)
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
        return self._combined(other, 1)

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
            ValueError: ``k`` is below 2, or does not divide the ``folds`` of the constructor.
        """
        kept = len(self._parts)
        if k < 2 or kept % k != 0:
            raise ValueError(
                f"ChannelStatistics.folds: expected k to be 2 or more and to divide {kept}, the "
                f"folds that were kept apart, got {k}; pass folds={max(k, 2)} when it is made"
            )
        training = []
        for fold in range(k):
            result = ChannelStatistics(f"{self.split}-fold{fold}of{k}")
            result._parts = [
                _sum_of([part for i, part in enumerate(self._parts) if i % k != fold and part])
            ]
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
            one = ChannelStatistics._from_dict(content, "ChannelStatistics.all_reduce")
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
            OSError: the file cannot be written.
        """
        target = Path(path)
        unfinished = target.with_name(f"{target.name}.unfinished")
        unfinished.write_text(json.dumps(self._to_dict(), indent=1, sort_keys=True) + "\n")
        unfinished.replace(target)

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
        except ValueError as error:
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
        try:
            result = ChannelStatistics(content["split"], len(content["parts"]))
            for index, saved in enumerate(content["parts"]):
                result._parts[index] = None if saved is None else _read_part(saved)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} to be complete and consistent, got: {error!r}") from None
        if len({len(part.counts) for part in result._parts if part is not None}) > 1:
            raise ValueError(f"{where} to have one channel count, got several")
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


def _read_part(saved: dict[str, Any]) -> _Part:
    counts = np.array(saved["counts"], dtype=np.int64)
    packed = base64.b64decode(saved["ids"], validate=True)
    ids = [int.from_bytes(packed[i : i + 8], "big") for i in range(0, len(packed), 8)]
    part = _Part(
        counts,
        [int(s) for s in saved["image_std_sums"]],
        saved["images"],
        saved["pixels"],
        set(ids),
    )
    if counts.ndim != 2 or counts.shape[1] != 256 or (counts < 0).any():
        raise ValueError(f"counts of shape {counts.shape}, or below 0")
    if len(part.image_std_sums) != len(counts):
        raise ValueError(f"{len(part.image_std_sums)} stds for {len(counts)} channels")
    if any(int(row.sum()) != part.pixels for row in counts):
        raise ValueError(f"counts that do not add up to {part.pixels} pixels")
    if len(packed) % 8 != 0 or len(ids) > part.images or len(ids) != len(part.ids):
        raise ValueError(f"{len(ids)} keys for {part.images} images")
    return part


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
