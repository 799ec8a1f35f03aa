"""Windows in images: from the arguments of crop_mirror_normalize to a row of numbers per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pixfuse._image_input import Images

_NAME = "crop_mirror_normalize"
_FARTHEST = 2**31 - 1
_ANCHOR = "(vertical, horizontal) or one such pair per image"
_PAD_HINT = 'pass out_of_bounds="pad" to fill what lies outside'


def resolve_channels(images: Images, channels: Any) -> int:
    """The number of channels of the result, for images that can be brought to it."""
    if channels is not None:
        if isinstance(channels, bool) or not isinstance(channels, (int, np.integer)):
            raise TypeError(
                f"{_NAME}: expected channels to be an int or None, got {type(channels).__name__}"
            )
        if channels < 1:
            raise ValueError(f"{_NAME}: expected channels to be positive, got {channels}")
    if images.common is not None:
        counts = [int(images.common[2])]
    else:
        counts = [int(size[2]) for size in images.each]
    if channels is None:
        if len(counts) == 1:
            return counts[0]
        distinct = set(counts)
        if len(distinct) == 1:
            return counts[0]
        if distinct == {1, 3}:
            return 3
        other = next(n for n, count in enumerate(counts) if count != counts[0])
        hint = "; pass channels=3, which drops the alpha" if 4 in distinct else ""
        if distinct <= {1, 3, 4}:
            hint += ', or convert them with image.convert("RGB")'
        raise ValueError(
            f"{_NAME}: expected images of one channel count, got {counts[0]} in images[0] and "
            f"{counts[other]} in images[{other}]{hint}"
        )
    for n, count in enumerate(counts):
        # Not `in`: torch.compile does not look for symbols in tuples.
        fits = count == channels or count == 1 or (count == 4 and channels == 3)  # noqa: PLR1714
        if not fits:
            or_one = ", or of 1, which is repeated" if channels != 1 else ""
            hint = '; convert it with image.convert("L")' if channels == 1 else ""
            raise ValueError(
                f"{_NAME}: expected images of {channels} channels{or_one}, got {count} in "
                f"images[{n}]{hint}"
            )
    return int(channels)


def resolve_size(images: Images, size: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width of the windows."""
    if size is None:
        if images.common is not None:
            return images.common[:2]
        (height, width, _), *others = images.each
        for n, other in enumerate(others, 1):
            if other[0] != height or other[1] != width:
                raise ValueError(
                    f"{_NAME}: expected images of one size, as size is None, got {height} x "
                    f"{width} in images[0] and {other[0]} x {other[1]} in images[{n}]; pass "
                    "size=(height, width)"
                )
        return int(height), int(width)
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        pair: tuple[Any, ...] = (size, size)
    elif isinstance(size, torch.SymInt):
        pair = (size, size)
    elif isinstance(size, Sequence) and not isinstance(size, (str, bytes)):
        pair = tuple(size)
    else:
        pair = ()
    if not pair or any(
        not isinstance(side, (int, np.integer, torch.SymInt)) or isinstance(side, bool)
        for side in pair
    ):
        raise TypeError(f"{_NAME}: expected size to be an int or (height, width), got {size!r}")
    if len(pair) != 2:
        raise ValueError(
            f"{_NAME}: expected size to be an int or (height, width), got {len(pair)} values"
        )
    if any(side < 1 for side in pair):
        raise ValueError(f"{_NAME}: expected size to be positive, got {size!r}")
    if torch.compiler.is_compiling():
        return pair[0], pair[1]
    height, width = int(pair[0]), int(pair[1])
    if max(height, width) > _FARTHEST:
        raise ValueError(f"{_NAME}: expected size up to {_FARTHEST}, got {size!r}")
    return height, width


def placements_of(
    images: Images,
    size: tuple[int, int],
    anchor: Any,
    top: Any,
    left: Any,
    mirror: Any,
    flip: Any,
    out_of_bounds: str,
) -> torch.Tensor:
    """(N, 4) int64 on the CPU: top, left, mirror, flip of each image."""
    if out_of_bounds not in ("error", "pad"):
        raise ValueError(
            f"{_NAME}: expected out_of_bounds to be 'error' or 'pad', got {out_of_bounds!r}"
        )
    if (top is None) != (left is None):
        missing = "top" if top is None else "left"
        raise ValueError(
            f"{_NAME}: expected top and left together, got {missing}=None; pass both or neither"
        )
    if torch.compiler.is_compiling():
        return _traced_placements(images, size, anchor, top, left, mirror, flip, out_of_bounds)
    placements = np.empty((images.count, 4), np.int64)
    if images.common is not None and top is None:
        same = _same_placement(images.common, size, anchor, mirror, flip)
        if same is not None:
            placements[:] = same
            return torch.from_numpy(placements)
    sizes = np.array([images.common]) if images.common is not None else images.each
    slack = sizes[:, :2] - size
    if top is None:
        offset = _anchors(anchor, images.count) * slack
        # rint() takes halves to even; both are what torchvision's center_crop does.
        placements[:, :2] = np.where(offset >= 0, np.rint(offset), np.trunc(offset))
    else:
        placements[:, 0] = _integers("top", top, images.count)
        placements[:, 1] = _integers("left", left, images.count)
    placements[:, 2] = _booleans("mirror", mirror, images.count)
    placements[:, 3] = _booleans("flip", flip, images.count)
    if out_of_bounds == "error":
        begin = placements[:, :2]
        inside = (begin >= 0) & (begin <= slack)
        if not inside.all():
            n = int(inside.all(1).argmin())
            height, width, _ = np.broadcast_to(sizes, (images.count, 3))[n].tolist()
            raise ValueError(
                f"{_NAME}: expected the window of images[{n}] inside its {height} x {width} "
                f"pixels, got a window of size {size[0]} x {size[1]} at top {begin[n, 0]}, left "
                f"{begin[n, 1]}; {_PAD_HINT}"
            )
    return torch.from_numpy(placements)


def _same_placement(
    common: tuple[int, int, int], size: tuple[int, int], anchor: Any, mirror: Any, flip: Any
) -> tuple[int, int, bool, bool] | None:
    """The one placement of images of one size, without numpy; None for all but plain cases."""
    plain = type(mirror) is bool and type(flip) is bool and type(anchor) is tuple
    if (
        not plain
        or len(anchor) != 2
        or type(anchor[0]) is not float
        or type(anchor[1]) is not float
    ):
        return None
    vertical, horizontal = common[0] - size[0], common[1] - size[1]
    if min(vertical, horizontal) < 0 or not (0 <= anchor[0] <= 1 and 0 <= anchor[1] <= 1):
        return None
    return round(anchor[0] * vertical), round(anchor[1] * horizontal), mirror, flip


def _traced_placements(
    images: Images,
    size: tuple[int, int],
    anchor: Any,
    top: Any,
    left: Any,
    mirror: Any,
    flip: Any,
    out_of_bounds: str,
) -> torch.Tensor:
    """The same as operations of torch, for torch.compile: other values need no other graph."""

    def numbers(value: Any, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to("cpu", dtype)
        return torch.tensor(value, dtype=dtype, device="cpu")

    height: Any
    width: Any
    if images.common is not None:
        height, width, _ = images.common
    else:
        height = numbers([size[0] for size in images.each], torch.int64)
        width = numbers([size[1] for size in images.each], torch.int64)
    if top is None:
        anchors = numbers(anchor, torch.float64)
        if anchors.shape not in ((2,), (images.count, 2)):
            raise ValueError(_anchor_message(images.count, tuple(anchors.shape)))
        inside = (anchors >= 0) & (anchors <= 1)
        torch._assert_async(inside.all(), f"{_NAME}: expected anchor from 0 to 1")
        vertical, horizontal = (
            anchors[..., 0] * (height - size[0]),
            anchors[..., 1] * (width - size[1]),
        )
        tops = torch.where(vertical >= 0, vertical.round(), vertical.trunc()).to(torch.int64)
        lefts = torch.where(horizontal >= 0, horizontal.round(), horizontal.trunc()).to(torch.int64)
    else:
        tops, lefts = numbers(top, torch.int64), numbers(left, torch.int64)
    if out_of_bounds == "error":
        rows_inside = (tops >= 0) & (tops <= height - size[0])
        columns_inside = (lefts >= 0) & (lefts <= width - size[1])
        torch._assert_async(
            (rows_inside & columns_inside).all(),
            # No double quotes: the compiler puts the words into C++ as they are.
            f"{_NAME}: expected every window inside its image; pass out_of_bounds='pad'",
        )
    columns = [tops, lefts, numbers(mirror, torch.int64), numbers(flip, torch.int64)]
    return torch.stack([column.expand(images.count) for column in columns], 1)


def _array(name: str, value: Any, kinds: str, what: str) -> np.ndarray:
    """A number, or a sequence, array or tensor of numbers, of one of numpy's kinds of dtype."""
    try:
        array = (
            value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        )
    except (TypeError, ValueError):
        array = np.empty(0, object)
    if array.dtype.kind not in kinds:
        raise TypeError(f"{_NAME}: expected {name} to be {what}, got {value!r}")
    return array


def _check_count(name: str, values: np.ndarray, count: int, what: str) -> np.ndarray:
    if values.shape not in ((), (count,)):
        raise ValueError(
            f"{_NAME}: expected {name} to be {what} ({count}), got shape {values.shape}"
        )
    return values


def _booleans(name: str, value: Any, count: int) -> Any:
    if isinstance(value, bool):
        return value
    what = "a bool or one bool per image"
    return _check_count(name, _array(name, value, "b", what), count, what)


def _integers(name: str, value: Any, count: int) -> np.ndarray:
    what = "an int or one int per image"
    values = _check_count(name, _array(name, value, "iu", what), count, what)
    if (values > _FARTHEST).any() or (values < -_FARTHEST).any():
        raise ValueError(f"{_NAME}: expected {name} within {_FARTHEST}, got {value!r}")
    return values


def _anchor_message(count: int, shape: tuple[int, ...]) -> str:
    return f"{_NAME}: expected anchor to be {_ANCHOR} ({count}), got shape {shape}"


def _anchors(value: Any, count: int) -> np.ndarray:
    """(2,) or (N, 2) float64."""
    values = _array("anchor", value, "fiu", _ANCHOR).astype(np.float64)
    if values.shape not in ((2,), (count, 2)):
        raise ValueError(_anchor_message(count, values.shape))
    inside = (values >= 0) & (values <= 1)
    if not inside.all():
        pairs = values.reshape(-1, 2)
        n = int(inside.reshape(-1, 2).all(1).argmin())
        where = f" in anchor[{n}]" if values.ndim > 1 else ""
        raise ValueError(
            f"{_NAME}: expected anchor from 0 to 1, got {tuple(pairs[n].tolist())}{where}"
        )
    return values
