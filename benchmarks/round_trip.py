"""Which byte values survive normalize and denormalize: writes docs/round_trip.md.

`python -m benchmarks.round_trip`; the tests compare the file with what this makes.
"""

from pathlib import Path

import torch

import pixfuse
from pixfuse.normalization import ROUNDING_CODES, Rounding

PAGE = Path(__file__).parent.parent / "docs" / "round_trip.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

INTRODUCTION = """\
# Which byte values survive the way there and back

`pixfuse.denormalize(pixfuse.normalize(images, n, dtype=dtype), n)` for each preset `n`, all 256
values of every channel, and all five roundings. A value that is not named comes back as itself; one
that is named comes back as its neighbour, since 16 bits hold no number closer to its own.

| preset | float32 | float16 | bfloat16 |
|---|---|---|---|
"""
ENDING = "\nMade by `python -m benchmarks.round_trip`.\n"


def presets() -> dict[str, pixfuse.Normalization]:
    values = vars(pixfuse).items()
    return {name: v for name, v in sorted(values) if isinstance(v, pixfuse.Normalization)}


def lost_values(
    preset: pixfuse.Normalization, rounding: Rounding, dtype: torch.dtype
) -> tuple[tuple[int, ...], ...]:
    """The byte values of each channel that do not come back."""
    channels = len(preset.mean)
    normalization = pixfuse.Normalization(preset.mean, preset.std, rounding)
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(channels, 16, 16)
    there = pixfuse.normalize(images, normalization, dtype=dtype)
    lost = pixfuse.denormalize(there, normalization) != images
    return tuple(tuple(channel.nonzero().flatten().tolist()) for channel in lost.flatten(1))


def describe(lost: tuple[tuple[int, ...], ...]) -> str:
    """One cell of the table."""
    if not any(lost):
        return "all 256"
    channels = [
        (f"channel {c}: " if len(lost) > 1 else "") + ", ".join(map(str, values))
        for c, values in enumerate(lost)
        if values
    ]
    return "all but " + "; ".join(channels)


def cell(preset: pixfuse.Normalization, dtype: torch.dtype) -> str:
    """One cell; where roundings differ, each of them."""
    found: dict[str, list[str]] = {}
    for rounding in ROUNDING_CODES:
        text = describe(lost_values(preset, rounding, dtype))  # type: ignore[arg-type]
        found.setdefault(text, []).append(rounding)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in found.items())


def page() -> str:
    rows = [
        f"| `{name}` | " + " | ".join(cell(preset, dtype) for dtype in DTYPES) + " |"
        for name, preset in presets().items()
    ]
    return INTRODUCTION + "\n".join(rows) + "\n" + ENDING


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.read_text())
