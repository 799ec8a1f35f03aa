"""How long ``pixfuse.standardize_per_image`` takes on a GPU, in each of its two ways.

    python -m benchmarks.bench_standardize_per_image_cuda [--time-limit SECONDS] [--output FILE]

One pass keeps an image, or a plane of it, in the shared memory of a block; two kernels read the
bytes twice. Both are timed wherever both are possible, beside what the rule chooses, torch eager
and a plain copy, over numbers of images around the number of multiprocessors: so the rule can be
judged. Times and buffers as in ``bench_normalize_cuda``. ``--device cpu`` tries the program out
where there is no GPU: its times mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pixfuse
from benchmarks import report
from benchmarks.gpu.program import (
    Record,
    checked_copy,
    console,
    options_of,
    sets_of_buffers,
    times,
)
from benchmarks.harness import BIT_EQUAL, Checked, Contestant, Rotated, Tolerance
from benchmarks.peers import DTYPE_NAMES, Case

PACKAGES = ("pixfuse", "torch", "numpy")
ONE_PASS, TWO_KERNELS, EAGER = "one pass", "two kernels", "torch eager"
WAYS = {ONE_PASS: 1, TWO_KERNELS: 2}
#: Images and their side, the main one first. Images of 512 do not fit shared memory.
SHAPES = (
    (64, 224),
    (256, 224),
    (132, 224),
    (32, 224),
    (16, 224),
    (8, 224),
    (1, 224),
    (64, 32),
    (1024, 32),
    (64, 512),
)
HEADLINE = SHAPES[:2]
TOLERANCES = {
    torch.float32: Tolerance(1e-3, "sums in float32"),
    torch.bfloat16: Tolerance(0.06, "sums in float32, rounded to 8 bits"),
}


@dataclass(frozen=True)
class Point:
    """A dense batch, how it lies before and after, and what has a mean and std of its own."""

    batch: int
    side: int
    interleaved: bool
    memory_format: torch.memory_format
    dtype: torch.dtype
    per_channel: bool
    device: str

    @property
    def case(self) -> Case:
        """As many bytes, for the copy."""
        return Case(self.batch, self.side, self.side, dtype=self.dtype, device=self.device)

    def described(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "side": self.side,
            "input": "NHWC" if self.interleaved else "NCHW",
            "output": "channels_last"
            if self.memory_format is torch.channels_last
            else "contiguous",
            "dtype": DTYPE_NAMES[self.dtype],
            "mean_of": "channel" if self.per_channel else "image",
        }

    def images(self) -> torch.Tensor:
        shape = (self.batch, 3, self.side, self.side)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        return images.contiguous(memory_format=torch.channels_last) if self.interleaved else images


def points(device: str) -> Iterator[Point]:
    """The main shapes in every variant, then the others, which show where the rule should turn."""
    variants = list(
        itertools.product(
            (torch.float32, torch.bfloat16),
            (
                (True, torch.contiguous_format),
                (False, torch.contiguous_format),
                (True, torch.channels_last),
            ),
            (False, True),
        )
    )
    for batch, side in SHAPES:
        for dtype, (interleaved, memory_format), per_channel in variants:
            same_format = interleaved is (memory_format is torch.channels_last)
            if (batch, side) in HEADLINE or (dtype == torch.float32 and same_format):
                yield Point(batch, side, interleaved, memory_format, dtype, per_channel, device)


def ours(images: torch.Tensor, point: Point, out: torch.Tensor) -> torch.Tensor:
    return pixfuse.standardize_per_image(
        images,
        point.per_channel,
        dtype=point.dtype,
        memory_format=point.memory_format,
        out=out,
    )


def by_way(images: torch.Tensor, point: Point, out: torch.Tensor, *, way: int) -> torch.Tensor:
    torch.ops.pixfuse.standardize_per_image_out.default(images, point.per_channel, 0.0, 0, out, way)
    return out


def eager(images: torch.Tensor, point: Point, out: torch.Tensor) -> torch.Tensor:
    x = images.float()
    axes = (2, 3) if point.per_channel else (1, 2, 3)
    std, mean = torch.std_mean(x, axes, correction=0, keepdim=True)
    least = 1 / math.sqrt(x[0, 0].numel() if point.per_channel else x[0].numel())
    return out.copy_(x.sub_(mean).div_(std.clamp_min_(least)))


def contestants(point: Point, record: Record) -> list[Checked]:
    """Everybody on every set of buffers, each result compared with the operator's on the CPU."""
    sets = sets_of_buffers(point.case)
    batches = [point.images() for _ in range(sets)]
    expected = []
    for images in batches:
        values = pixfuse.standardize_per_image(
            images.cpu(), point.per_channel, dtype=point.dtype, memory_format=point.memory_format
        )
        expected.append(values.to(point.device))
    outs = [torch.empty_like(values) for values in expected]
    calls: dict[str, Callable[[torch.Tensor, Point, torch.Tensor], torch.Tensor]] = {
        report.OURS: ours,
        EAGER: eager,
    }
    if point.device == "cuda":
        for name, way in WAYS.items():
            calls[name] = functools.partial(by_way, way=way)
        try:
            calls[ONE_PASS](batches[0], point, outs[0])
        except (RuntimeError, ValueError) as error:
            if "way 0 or 2" not in str(error):
                raise
            del calls[ONE_PASS]  # images that do not fit
    found = []
    for name, call in calls.items():

        def rotated(
            name: str = name,
            call: Callable[[torch.Tensor, Point, torch.Tensor], torch.Tensor] = call,
        ) -> Checked:
            turns = [
                Checked(
                    Contestant(
                        name,
                        functools.partial(call, images, point, out),
                        output="recycled",
                        target=out,
                        tolerance=TOLERANCES[point.dtype] if call is eager else BIT_EQUAL,
                    ),
                    wanted,
                )
                for images, out, wanted in zip(batches, outs, expected, strict=True)
            ]
            return Rotated(turns)

        found += record.checked(name, rotated)
    return [*found, checked_copy(point.case, sets)]


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the rows."""

    def best_way(row: dict[str, Any]) -> float:
        return float(min(row["us_per_call"][way][1] for way in WAYS if way in row["us_per_call"]))

    main = [row for row in rows if (row["batch"], row["side"]) in HEADLINE]
    regrets = [
        row["us_per_call"][report.OURS][1] / best_way(row)
        for row in rows
        if report.OURS in row["us_per_call"] and set(WAYS) & set(row["us_per_call"])
    ]
    return [
        report.claim(
            "64 and 256 images of 224x224x3: the least speedup of one pass over two kernels",
            report.least_ratio(main, TWO_KERNELS, ONE_PASS),
            ">= 1.1",
        ),
        report.claim(
            "the same: the least share of the device's copy bandwidth in one pass",
            report.least_ratio(main, report.COPY, ONE_PASS),
            ">= 0.8",
        ),
        report.claim(
            "all shapes: the most time of what the rule chooses over the better way",
            max(regrets, default=None),
            "<= 1.1",
        ),
        report.claim(
            "all shapes: the least speedup over torch eager",
            report.least_ratio(rows, EAGER, report.OURS),
            ">= 3",
        ),
    ]


def describe(row: dict[str, Any]) -> str:
    us = ", ".join(f"{name} {q[1]:.1f}" for name, q in row["us_per_call"].items())
    about = (str(value) for value in row.values() if not isinstance(value, dict))
    return f"{' '.join(about)}: {us}"


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, "standardize_per_image_cuda.json", argv, time_limit=120.0)
    if options is None:
        return 1
    record = Record(
        options,
        "quartiles (25 %, median, 75 %) of one call in microseconds, into memory of the caller: "
        "us_per_call on the device alone, us_per_call_from_python as a loop in Python sees it",
        PACKAGES,
        claims,
    )

    def measure(point: Point) -> dict[str, Any]:
        return {**point.described(), **times(contestants(point, record), options.device)}

    console.print("us on the device")
    record.measure(list(points(options.device)), measure, describe)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
