"""The value that says what a pixel becomes: mean and std per channel, and a rounding."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, Literal, SupportsFloat, get_args

Rounding = Literal["torchvision", "torchvision_v1", "timm", "transformers", "nearest"]

#: The number of each rounding in the operators' schemas, where strings would leak.
ROUNDING_CODES: Final[dict[str, int]] = {name: code for code, name in enumerate(get_args(Rounding))}


def float32(value: float) -> float:
    """Round ``value`` to the nearest float32; beyond its range, to an infinity."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def is_unordered(value: object) -> bool:
    """Whether its items cannot say which channel they are for: a set, a mapping or its keys."""
    return isinstance(value, (Set, Mapping))


def _numbers(argument: str, value: object) -> tuple[float, ...]:
    """One number, or one per channel, as a tuple of floats."""
    problem = (
        f"Normalization: expected {argument} to be a number or a sequence of numbers, one per "
        f"channel, got {value!r}"
    )
    if isinstance(value, (str, bytes)):
        raise TypeError(problem)
    if is_unordered(value):
        raise TypeError(f"{problem}; pass a list or tuple, which says which channel is the first")
    try:
        if isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0:
            numbers = tuple(float(v) for v in value)
        elif isinstance(value, SupportsFloat):
            numbers = (float(value),)
        else:
            raise TypeError(problem)
    except (TypeError, ValueError):
        raise TypeError(problem) from None
    if not numbers:
        raise ValueError(f"Normalization: expected {argument} to have at least 1 value, got none")
    return numbers


@dataclass(frozen=True)
class Normalization:
    """What a pixel becomes: ``(x / 255 - mean) / std`` per channel, rounded as a library does it.

    ==================== ======================================================= ===============
    rounding             arithmetic in float32, each step rounded, of a byte ``x``  equal to
    ==================== ======================================================= ===============
    ``"torchvision"``    ``((x * f32(1/255)) - f32(mean)) / f32(std)``           v2 transforms
    ``"torchvision_v1"`` ``((x / 255) - f32(mean)) / f32(std)``                  v1 on CPU
    ``"timm"``           ``(x - f32(255*mean)) / f32(255*std)``                  its loader
    ``"transformers"``   ``(x - f32(mean)*255) / (f32(std)*255)``                fast processors
    ``"nearest"``        the real number ``(x/255 - mean) / std``, rounded once  float64
    ==================== ======================================================= ===============

    float16 and bfloat16 results are the float32 result rounded once, half to even.

    ``"nearest"`` is computed in float64 from ``x - 255 * mean`` without cancellation, with a
    relative error below 2**-50, and then rounded to float32: the nearest float32, unless the real
    number lies that close to the middle between two of them. For every preset the tests check all
    256 values against exact rational arithmetic.

    Args:
        mean: a number for every channel, or one per channel; finite, in units of [0, 1].
        std: likewise; finite and above 0, also once rounded to float32.
        rounding: a name of the table above; default ``"torchvision"``.

    Warns:
        UserWarning: a mean above 1.5, or a std above 1.5 beside a mean above 1: most likely they
            are in units of 0 to 255. They are taken as they are.

    Raises:
        TypeError: ``mean`` or ``std`` is not made of numbers, or has no order (sets, mappings);
            ``rounding`` is not a string.
        ValueError: a value is out of range, the lengths differ, the rounding is unknown, or some
            result would not fit float32.

    Source:
        torchvision ``transforms.v2.functional.normalize`` and ``to_dtype``; timm
        ``data/loader.py``; transformers ``image_processing_utils_fast.py``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounding: Rounding = "torchvision"
    #: Number of the rounding in the operators' schemas.
    rounding_code: int = field(init=False, repr=False, compare=False)
    #: The largest magnitude of a result, as the rounding gives it in float32; finite.
    largest: float = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        mean: SupportsFloat | Iterable[SupportsFloat],
        std: SupportsFloat | Iterable[SupportsFloat],
        rounding: Rounding = "torchvision",
    ) -> None:
        means, stds = _numbers("mean", mean), _numbers("std", std)
        if len(means) != len(stds):
            if 1 not in (len(means), len(stds)):
                raise ValueError(
                    "Normalization: expected mean and std to have the same length, got "
                    f"{len(means)} and {len(stds)}"
                )
            channels = max(len(means), len(stds))
            means = means * (channels // len(means))
            stds = stds * (channels // len(stds))
        _check_values(means, stds)
        if not isinstance(rounding, str):
            raise TypeError(
                f"Normalization: expected rounding to be a string, got {type(rounding).__name__}"
            )
        if rounding not in ROUNDING_CODES:
            raise ValueError(
                f"Normalization: expected rounding to be one of {', '.join(ROUNDING_CODES)}, "
                f"got {rounding!r}"
            )
        # Both ends of a range give the largest magnitude: no step of the arithmetic swaps values.
        largest = max(
            abs(_result(x, m, s, rounding))
            for m, s in zip(means, stds, strict=True)
            for x in (0.0, 255.0)
        )
        if math.isinf(largest):
            real = max(max(abs(m), abs(1.0 - m)) / s for m, s in zip(means, stds, strict=True))
            raise ValueError(
                "Normalization: expected mean and std whose results fit float32, got results up to "
                f"{real:.3g} from mean={means} and std={stds}; use a larger std"
            )
        _warn_of_bytes(means, stds)
        object.__setattr__(self, "mean", means)
        object.__setattr__(self, "std", stds)
        object.__setattr__(self, "rounding", rounding)
        object.__setattr__(self, "rounding_code", ROUNDING_CODES[rounding])
        object.__setattr__(self, "largest", largest)


def _result(x: float, mean: float, std: float, rounding: Rounding) -> float:
    """What a byte becomes in float32: each step in float64, which is exact enough, and rounded."""
    m, s = float32(mean), float32(std)
    match rounding:
        case "torchvision":
            return float32(float32(float32(x * float32(1 / 255)) - m) / s)
        case "torchvision_v1":
            return float32(float32(float32(x / 255) - m) / s)
        case "timm":
            return float32(float32(x - float32(255 * mean)) / float32(255 * std))
        case "transformers":
            return float32(float32(x - float32(m * 255)) / float32(s * 255))
        case "nearest":
            center = 255 * Fraction(mean)
            high = float(center)
            return float32(((x - high) - float(center - Fraction(high))) * (1 / (255 * std)))


def _warn_of_bytes(means: tuple[float, ...], stds: tuple[float, ...]) -> None:
    """Numbers of 0 to 255 are legal, and make almost every result the same."""
    likely = max(means) > 1.5 or (max(stds) > 1.5 and max(means) > 1.0)
    if not likely:
        return
    name, value = ("mean", max(means)) if max(means) > 1.5 else ("std", max(stds))
    warnings.warn(
        f"Normalization: {name} {value:g} is in units of 0..255, it seems; pixfuse takes units of "
        "[0, 1]: divide mean and std by 255",
        stacklevel=3,
    )


def _check_values(means: tuple[float, ...], stds: tuple[float, ...]) -> None:
    for m in means:
        if not math.isfinite(m):
            raise ValueError(f"Normalization: expected mean to be finite, got {m} in {means}")
        if math.isinf(float32(255.0 * max(abs(m), abs(float32(m))))):
            raise ValueError(f"Normalization: expected 255 * mean to fit float32, got mean {m}")
    for s in stds:
        if not math.isfinite(s):
            raise ValueError(f"Normalization: expected std to be finite, got {s} in {stds}")
        if s <= 0.0:
            raise ValueError(f"Normalization: expected std to be above 0, got {s} in {stds}")
        if float32(s) == 0.0 or math.isinf(float32(255.0 * max(s, float32(s)))):
            raise ValueError(
                "Normalization: expected std to stay above 0 and finite when rounded to float32 "
                f"(about 1e-45 to 1e36), got {s}"
            )


@dataclass(frozen=True)
class PerImageStandardization:
    """What a pixel becomes by the mean and std of its own image: ``(x - mean) / max(std, floor)``.

    :class:`pixfuse.Collate`, :class:`pixfuse.DeviceLoader` and
    :class:`pixfuse.transforms.ToNormalized` take it in the place of a
    :class:`pixfuse.Normalization`. The bits are those of :func:`pixfuse.standardize_per_image` on
    the image as the model gets it: its mean and std are taken after cropping, mirroring and
    padding, of what is in the window and of the fill around it.

    Args:
        per_channel: False: one mean and std for all channels of an image; True: one of each.
        floor: the least std to divide by, in units of 0 to 255: ``"tensorflow"`` for
            ``1 / sqrt(n)`` of ``n`` values, or a number above 0.

    Raises:
        TypeError: ``per_channel`` is no bool, ``floor`` neither a name nor a number.
        ValueError: ``floor`` is another name, not finite, or not above 0.

    Source:
        TensorFlow ``tf.image.per_image_standardization``.
    """

    per_channel: bool = False
    floor: Literal["tensorflow"] | float = "tensorflow"

    def __post_init__(self) -> None:
        least = least_std_of("PerImageStandardization", self.per_channel, self.floor)
        if not isinstance(self.floor, str):
            object.__setattr__(self, "floor", least)


#: Of what an image can be divided by; less would serve nobody and its reciprocal overflow.
_LEAST_FLOOR = 1e-30


def least_std_of(function: str, per_channel: object, floor: object) -> float:
    """The least std to divide by, 0 for TensorFlow's: the operators' word for it; checks both."""
    if not isinstance(per_channel, bool):
        raise TypeError(
            f"{function}: expected per_channel to be True or False, got "
            f"{type(per_channel).__name__}"
        )
    if isinstance(floor, str):
        if floor != "tensorflow":
            raise ValueError(
                f"{function}: expected floor to be 'tensorflow' or a number above 0, got {floor!r}"
            )
        return 0.0
    if isinstance(floor, bool) or not isinstance(floor, SupportsFloat):
        raise TypeError(
            f"{function}: expected floor to be 'tensorflow' or a number above 0, got "
            f"{type(floor).__name__}"
        )
    least = float(floor)
    if not (math.isfinite(least) and least >= _LEAST_FLOOR):
        raise ValueError(
            f"{function}: expected floor to be 'tensorflow' or a number above 0 (finite, "
            f"{_LEAST_FLOOR:g} or more), in units of 0 to 255, got {floor}"
        )
    return least


#: [0, 1]: ``x / 255``. For sigmoid outputs and models that normalize themselves.
UNIT: Final = Normalization(0.0, 1.0)
#: [-1, 1]: ``(x / 255 - 0.5) / 0.5``. For tanh outputs; Inception, ViT of timm, diffusion models.
SIGNED: Final = Normalization(0.5, 0.5)
#: ImageNet, as torchvision's models expect; the std is a mean over images of per-image stds.
IMAGENET: Final = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: ImageNet as timm's DPN models expect.
IMAGENET_DPN: Final = Normalization((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3)
#: CIFAR-10 training split, std over all pixels (0.2023, 0.1994, 0.2010 is the per-image mean).
CIFAR10: Final = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
#: CIFAR-100 training split, std over all pixels.
CIFAR100: Final = Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
#: SVHN training split, std over all pixels.
SVHN: Final = Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
#: MNIST training split (one channel, or any number of equal ones).
MNIST: Final = Normalization(0.1307, 0.3081)
#: Fashion-MNIST training split (one channel, or any number of equal ones).
FASHION_MNIST: Final = Normalization(0.2860, 0.3530)
#: CLIP of OpenAI, also OpenCLIP and SigLIP's predecessors.
CLIP: Final = Normalization(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
#: Kinetics-400, as torchvision's video models expect.
KINETICS: Final = Normalization((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
