"""Windows in images: from the arguments of crop_mirror_normalize to a row of numbers per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pixfuse._image_input import Images

_NAME = "crop_mirror_normalize"
_FARTHEST = 2**31 - 1


def resolve_channels(images: Images, channels: Any) -> int:
    """The number of channels of the result, for images that can be brought to it."""
    if channels is not None:
        if isinstance(channels, bool) or not isinstance(channels, int):
            raise TypeError(
                f"{_NAME}: expected channels to be an int or None, got {type(channels).__name__}"
            )
        if channels < 1:
            raise ValueError(f"{_NAME}: expected channels to be positive, got {channels}")
    if images.common is not None:
        counts = [images.common[2]]
    else:
        assert images.each is not None
        counts = images.each[:, 2].tolist()
    if channels is None:
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
        if count not in (channels, 1) and (count, channels) != (4, 3):
            hint = '; convert it with image.convert("L")' if channels == 1 else ""
            raise ValueError(
                f"{_NAME}: expected images of {channels} channels, or of 1, which is repeated, got "
                f"{count} in images[{n}]{hint}"
            )
    return int(channels)


def resolve_size(images: Images, size: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width of the windows."""
    if size is None:
        if images.common is not None:
            return images.common[:2]
        assert images.each is not None
        sizes = images.each[:, :2]
        differs = (sizes != sizes[0]).any(1)
        if bool(differs.any()):
            n = int(differs.to(torch.uint8).argmax())
            (h0, w0), (h, w) = sizes[0].tolist(), sizes[n].tolist()
            raise ValueError(
                f"{_NAME}: expected images of one size, as size is None, got {h0} x {w0} in "
                f"images[0] and {h} x {w} in images[{n}]; pass size=(height, width)"
            )
        height, width = sizes[0].tolist()
        return height, width
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
    height: Any
    width: Any
    if images.common is not None:
        height, width, _ = images.common
    else:
        assert images.each is not None
        height, width = images.each[:, 0], images.each[:, 1]
    if top is None:
        anchors = _anchors(anchor, images.count)
        tops = _begin(anchors[:, 0], height - size[0])
        lefts = _begin(anchors[:, 1], width - size[1])
    else:
        tops = _integers("top", top, images.count)
        lefts = _integers("left", left, images.count)
    if out_of_bounds == "error":
        _check_inside(tops, lefts, size, height, width)
    rows = torch.broadcast_tensors(
        tops,
        lefts,
        _booleans("mirror", mirror, images.count).to(torch.int64),
        _booleans("flip", flip, images.count).to(torch.int64),
    )
    return torch.stack(rows, 1).expand(images.count, 4).contiguous()


def _begin(anchor: torch.Tensor, slack: Any) -> torch.Tensor:
    offset = anchor * slack
    # round() takes halves to even; both are what torchvision's center_crop does.
    return torch.where(offset >= 0, offset.round(), offset.trunc()).to(torch.int64)


def _check_inside(
    tops: torch.Tensor, lefts: torch.Tensor, size: tuple[int, int], height: Any, width: Any
) -> None:
    inside = (tops >= 0) & (lefts >= 0) & (tops <= height - size[0]) & (lefts <= width - size[1])
    hint = 'pass out_of_bounds="pad" to fill what lies outside'
    if torch.compiler.is_compiling():
        torch._assert_async(
            inside.all(), f"{_NAME}: expected every window inside its image; {hint}"
        )
        return
    if bool(inside.all()):
        return
    n = int(inside.to(torch.uint8).argmin())
    top, left, h, w = (
        int(torch.as_tensor(value, device="cpu").expand(inside.shape)[n])
        for value in (tops, lefts, height, width)
    )
    raise ValueError(
        f"{_NAME}: expected the window of images[{n}] inside its {h} x {w} pixels, got a window of "
        f"size {size[0]} x {size[1]} at top {top}, left {left}; {hint}"
    )


def _as_tensor(name: str, value: Any, what: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A number, or a sequence, array or tensor of numbers, as a tensor on the CPU.

    Numbers of Python become ``dtype``; arrays and tensors have their own.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C"))  # a copy: writable, no negative strides
    try:
        return torch.tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{_NAME}: expected {name} to be {what}, got {value!r}") from None


def _check_count(name: str, values: torch.Tensor, count: int, what: str) -> torch.Tensor:
    if values.ndim == 0:
        return values.reshape(1)
    if values.ndim != 1 or values.shape[0] != count:
        raise ValueError(
            f"{_NAME}: expected {name} to be {what} ({count}), got shape {tuple(values.shape)}"
        )
    return values


def _booleans(name: str, value: Any, count: int) -> torch.Tensor:
    what = "a bool or one bool per image"
    values = _as_tensor(name, value, what)
    if values.dtype is not torch.bool:
        raise TypeError(f"{_NAME}: expected {name} to be {what}, got {value!r}")
    return _check_count(name, values, count, what)


def _integers(name: str, value: Any, count: int) -> torch.Tensor:
    what = "an int or one int per image"
    values = _as_tensor(name, value, what)
    if values.dtype is torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{_NAME}: expected {name} to be {what}, got {value!r}")
    values = _check_count(name, values.to(torch.int64), count, what)
    if not torch.compiler.is_compiling() and bool((values.abs() > _FARTHEST).any()):
        raise ValueError(f"{_NAME}: expected {name} within {_FARTHEST}, got {value!r}")
    return values


def _anchors(value: Any, count: int) -> torch.Tensor:
    """(1, 2) or (N, 2) float64."""
    what = "(vertical, horizontal) or one such pair per image"
    values = _as_tensor("anchor", value, what, torch.float64)
    if values.dtype is torch.bool or values.is_complex():
        raise TypeError(f"{_NAME}: expected anchor to be {what}, got {value!r}")
    if values.shape not in ((2,), (count, 2)):
        raise ValueError(
            f"{_NAME}: expected anchor to be {what} ({count}), got shape {tuple(values.shape)}"
        )
    values = values.to(torch.float64).reshape(-1, 2)
    inside = (values >= 0) & (values <= 1)
    if torch.compiler.is_compiling():
        torch._assert_async(inside.all(), f"{_NAME}: expected anchor from 0 to 1")
    elif not bool(inside.all()):
        n = int(inside.all(1).to(torch.uint8).argmin())
        where = f" in anchor[{n}]" if len(values) > 1 else ""
        raise ValueError(
            f"{_NAME}: expected anchor from 0 to 1, got {tuple(values[n].tolist())}{where}"
        )
    return values
