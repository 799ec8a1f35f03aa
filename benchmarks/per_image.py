"""What a floor under the std does to a flat sky: writes docs/per_image.md and its picture.

`python -m benchmarks.per_image`; the tests compare the page with the numbers inside the picture,
and, where scikit-learn is installed, with its photograph.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pixfuse
from benchmarks.photos import Crop, photographs

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE = DOCS / "per_image.md", DOCS / "per_image.png"
SIDE = 96
#: Of scikit-learn's temple: the flattest window of its sky, and one of the busiest of all.
PATCHES = {"sky": Crop(0, 32, 544), "roof": Crop(0, 120, 56)}
FLOORS: tuple[Any, ...] = ("tensorflow", 20.0)

INTRODUCTION = """\
# Each image by its own mean and std, and what the floor is for

`pixfuse.standardize_per_image(images, floor=...)`, and `PerImageStandardization(floor=...)` in
`Collate`, `DeviceLoader` and `transforms.ToNormalized`, bring an image to mean 0 and std 1. Of a
sky there is little to bring there: the noise of its pixels gets the contrast of a roof. With a
floor it stays the flat thing that it is, and an image whose std is above the floor does not change
by a bit.

![The two patches as bytes, and standardized with each floor](per_image.png)

| patch | std of its bytes | `floor` | std of the result | range of the result |
|---|--:|---|--:|---|
"""
ENDING = f"""
`floor="tensorflow"` is `1 / sqrt(n)` for an image of `n` values. That is so small that in practice
only images of a single color have a std below it: noise is blown up all the same. All pictures of
results share one scale, -3 to 3. The patches are {SIDE}x{SIDE} pixels of scikit-learn's
photograph of a temple.

The mean and std are those of the image as the model gets it. In `Collate` they are taken of the
crop, after mirroring; with `out_of_bounds="pad"` the padding counts too, since the model sees it.
To count the pixels of the photograph alone, choose crops that need no padding.

Made by `python -m benchmarks.per_image`.
"""


def patches() -> dict[str, np.ndarray[Any, Any]]:
    """The bytes of each patch, (SIDE, SIDE, 3)."""
    photos = photographs()
    return {
        name: photos[c.photo][c.top : c.top + SIDE, c.left : c.left + SIDE]
        for name, c in PATCHES.items()
    }


def standardized(patch: np.ndarray[Any, Any], floor: Any) -> torch.Tensor:
    return pixfuse.standardize_per_image(patch, floor=floor, input_layout="NHWC")


def measure(found: dict[str, np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    """One row of the table for each patch and floor, the numbers as they are shown."""
    rows = []
    for name, patch in found.items():
        for floor in FLOORS:
            values = standardized(patch, floor).double()
            rows.append(
                {
                    "patch": name,
                    "std_of_bytes": f"{patch.std():.2f}",
                    "floor": repr(floor),
                    "std": f"{values.std(correction=0).item():.3f}",
                    "range": f"{values.min().item():.2f} to {values.max().item():.2f}",
                }
            )
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {r['patch']} | {r['std_of_bytes']} | `{r['floor']}` | {r['std']} | {r['range']} |"
        for r in rows
    ]
    return INTRODUCTION + "\n".join(lines) + "\n" + ENDING


def draw(found: dict[str, np.ndarray[Any, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """The picture, with the rows inside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.subplots(len(found), 1 + len(FLOORS), squeeze=False)
    for (name, patch), line in zip(found.items(), axes, strict=True):
        std = next(row["std_of_bytes"] for row in rows if row["patch"] == name)
        line[0].imshow(patch)
        line[0].set_title(f"{name}: bytes, std {std}", fontsize=10)
        for floor, place in zip(FLOORS, line[1:], strict=True):
            shown = ((standardized(patch, floor) + 3) / 6).clamp(0, 1)
            place.imshow(shown.permute(1, 2, 0).numpy())
            place.set_title(f"floor={floor!r}", fontsize=10)
        for place in line:
            place.axis("off")
    metadata = {"Software": None, "Source": json.dumps(rows)}
    figure.savefig(path, dpi=90, format="png", metadata=metadata)


def rows_of_picture(path: Path = PICTURE) -> list[dict[str, Any]]:
    """The rows that were measured when the picture was drawn."""
    from PIL import Image

    with Image.open(path) as picture:
        rows: list[dict[str, Any]] = json.loads(picture.info["Source"])
    return rows


if __name__ == "__main__":
    found = patches()
    measured = measure(found)
    draw(found, measured, PICTURE)
    PAGE.write_text(page(measured))
    print(PAGE.read_text())
