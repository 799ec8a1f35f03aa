"""Two questions for a GPU: crops of a list of images, and pinned memory read by the kernel itself.

    python -m benchmarks.bench_crop_mirror_normalize_cuda [--time-limit SECONDS] [--output FILE]

1. Images that lie on the GPU, of one size or of many, cropped to the middle 224 x 224 pixels, every
   second one mirrored: ``pixfuse.crop_mirror_normalize`` in one launch, torch image by image, and
   a plain copy of as many bytes.
2. A uint8 batch in pinned host memory: ``torch.ops.pixfuse.normalize_pinned``, whose kernel reads
   that memory over the bus, and a copy to the device followed by ``pixfuse.normalize``.

Times and buffers as in ``bench_normalize_cuda``. ``--device cpu`` tries the first half out where
there is no GPU: its times mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pixfuse
from benchmarks import report
from benchmarks.bench_normalize_cuda import PACKAGES
from benchmarks.gpu.program import Record, checked_copy, options_of, sets_of_buffers, times
from benchmarks.harness import Checked, Contestant, Rotated
from benchmarks.peers import DTYPE_NAMES, Case

SIDE = 224
PINNED_COPY = "pinned copy, then pixfuse.normalize"
PINNED_READ = "normalize_pinned"
IMAGE_BY_IMAGE = "torch, image by image"


@dataclass(frozen=True)
class Crops:
    """A batch of images on one device, of which the middle is taken."""

    batch: int
    ragged: bool
    interleaved: bool
    dtype: torch.dtype
    device: str

    @property
    def case(self) -> Case:
        """As many bytes as the crops have, for the copy."""
        return Case(self.batch, SIDE, SIDE, dtype=self.dtype, device=self.device)

    def described(self) -> dict[str, Any]:
        return {
            "question": "crops",
            "batch": self.batch,
            "height": SIDE,
            "width": SIDE,
            "images": "of many sizes" if self.ragged else "of one size",
            "input": "interleaved" if self.interleaved else "planar",
            "dtype": DTYPE_NAMES.get(self.dtype, str(self.dtype).removeprefix("torch.")),
        }

    def images(self, seed: int) -> list[torch.Tensor]:
        chance = random.Random(seed)
        images = []
        for _ in range(self.batch):
            height, width = 256, 256
            if self.ragged:
                height, width = chance.randint(SIDE, 288), chance.randint(SIDE, 288)
            shape = (height, width, 3) if self.interleaved else (3, height, width)
            image = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
            images.append(image.permute(2, 0, 1) if self.interleaved else image)
        return images


def ours(images: Sequence[torch.Tensor], mirror: Sequence[bool], dtype: torch.dtype) -> Any:
    return pixfuse.crop_mirror_normalize(images, SIDE, pixfuse.IMAGENET, mirror=mirror, dtype=dtype)


def image_by_image(
    images: Sequence[torch.Tensor],
    mirror: Sequence[bool],
    dtype: torch.dtype,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> torch.Tensor:
    """Slices, flips and one stack, then ``normalize`` as ``bench_normalize_cuda``'s torch eager."""
    crops = []
    for image, turned in zip(images, mirror, strict=True):
        top, left = (round((size - SIDE) / 2) for size in image.shape[1:])
        crop = image[:, top : top + SIDE, left : left + SIDE]
        crops.append(crop.flip(2) if turned else crop)
    batch = torch.stack(crops)
    if dtype == torch.uint8:
        return batch.contiguous()
    result = torch.empty(batch.shape, dtype=torch.float32, device=batch.device)
    return result.copy_(batch).mul_(1 / 255).sub_(mean).div_(std).to(dtype)


def crop_contestants(crops: Crops) -> list[Checked]:
    """Everybody on every set of buffers, each result compared with the operator's on the CPU."""
    mirror = [n % 2 == 1 for n in range(crops.batch)]
    statistics = [
        torch.tensor(values, dtype=torch.float32, device=crops.device).view(3, 1, 1)
        for values in (pixfuse.IMAGENET.mean, pixfuse.IMAGENET.std)
    ]
    sets = sets_of_buffers(crops.case)
    batches = [crops.images(seed) for seed in range(sets)]
    expected = [
        ours([image.cpu() for image in images], mirror, crops.dtype).to(crops.device)
        for images in batches
    ]
    calls: dict[str, Callable[[list[torch.Tensor]], Callable[[], torch.Tensor]]] = {
        report.OURS: lambda images: functools.partial(ours, images, mirror, crops.dtype),
        IMAGE_BY_IMAGE: lambda images: functools.partial(
            image_by_image, images, mirror, crops.dtype, *statistics
        ),
    }
    found: list[Checked] = [
        Rotated(
            [
                Checked(Contestant(name, call(images)), wanted)
                for images, wanted in zip(batches, expected, strict=True)
            ]
        )
        for name, call in calls.items()
    ]
    return [*found, checked_copy(crops.case, sets)]


def read_pinned(images: torch.Tensor, dtype_code: int, device: int) -> torch.Tensor:
    mean, std = pixfuse.IMAGENET.mean, pixfuse.IMAGENET.std
    layout = pixfuse._library.LAYOUT_CODES["NHWC"]
    result: torch.Tensor = torch.ops.pixfuse.normalize_pinned(
        images, mean, std, 0, layout, dtype_code, 0, device
    )
    return result


def copy_pinned(images: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    there = images.to(device, non_blocking=True)
    return pixfuse.normalize(there, pixfuse.IMAGENET, input_layout="NHWC", dtype=dtype)


def pinned_contestants(case: Case) -> list[Checked]:
    """Both ways from pinned memory. Sixteen batches: no cache between the two holds them."""
    code = pixfuse._library.DTYPE_CODES[case.dtype]
    device = torch.cuda.current_device()
    turns: dict[str, list[Checked]] = {PINNED_READ: [], PINNED_COPY: []}
    for _ in range(16):
        shape = (case.batch, case.height, case.width, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8).pin_memory()
        wanted = pixfuse.normalize(
            images, pixfuse.IMAGENET, input_layout="NHWC", dtype=case.dtype
        ).to(case.device)
        for name, call in (
            (PINNED_READ, functools.partial(read_pinned, images, code, device)),
            (PINNED_COPY, functools.partial(copy_pinned, images, case.dtype, case.device)),
        ):
            turns[name].append(Checked(Contestant(name, call), wanted))
    return [Rotated(each) for each in turns.values()]


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the rows."""
    return [
        report.claim(
            "share of the device's copy bandwidth, crops, the least",
            report.least_ratio(rows, report.COPY, report.OURS),
            ">= 0.8",
        ),
        report.claim(
            "speedup over torch image by image, the least",
            report.least_ratio(rows, IMAGE_BY_IMAGE, report.OURS),
            ">= 5",
        ),
        report.claim(
            "speedup of reading pinned memory in the kernel over copying it first, the least",
            report.least_ratio(rows, PINNED_COPY, PINNED_READ),
            ">= 1",
        ),
    ]


Point = tuple[dict[str, Any], Callable[[], list[Checked]]]


def points(device: str) -> list[Point]:
    """Each as its description and what makes its contestants; the second question first."""
    found: list[Point] = []
    if device == "cuda":
        for batch, dtype in itertools.product((64, 256, 8), (torch.float32, torch.bfloat16)):
            case = Case(batch, SIDE, SIDE, dtype=dtype, device="cuda", recycled=False)
            described = {"question": "pinned", **case.described()}
            found.append((described, functools.partial(pinned_contestants, case)))
    for batch, ragged, interleaved, dtype in itertools.product(
        (64, 256, 8), (True, False), (True, False), (torch.float32, torch.bfloat16, torch.uint8)
    ):
        crops = Crops(batch, ragged, interleaved, dtype, device)
        found.append((crops.described(), functools.partial(crop_contestants, crops)))
    return found


def describe(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {q[1]:.1f}" for name, q in row["us_per_call"].items())
    about = (str(value) for value in row.values() if not isinstance(value, dict))
    return f"{' '.join(about)}: {times} us"


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, "crop_mirror_normalize_cuda.json", argv, time_limit=120.0)
    if options is None:
        return 1
    record = Record(
        options,
        "quartiles (25 %, median, 75 %) of one call in microseconds: us_per_call on the device "
        "alone, us_per_call_from_python as a loop in Python sees it",
        PACKAGES,
        claims,
    )

    def measure(point: Point) -> dict[str, Any]:
        described, contestants = point
        return {**described, **times(contestants(), options.device)}

    record.measure(points(options.device), measure, describe)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
