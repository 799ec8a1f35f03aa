"""How long counts, standardizing and the way back to pixels take, beside everybody else.

    python -m benchmarks.bench_pixels [--quick] [--output FILE]

``channel_histogram``, ``image_moments``, ``standardize_per_image`` and ``denormalize``, one thread,
interleaved with their peers and with a copy of as many bytes; then a grid of sizes and layouts;
then the counting of ``pixfuse stats`` on JPEG files, those of real photographs and smaller ones cut
from them: the share of its time that decoding takes, and what a second worker brings. Ends with
status 1 when a result was not equal; a missed target is reported, and is no error.
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import pixfuse
from benchmarks import harness, report
from benchmarks.bench_normalize import PACKAGES, checked_copy
from benchmarks.harness import Contestant, Plan, Tolerance
from benchmarks.peers import Batch, load
from benchmarks.photos import copy_photographs, photographs, random_crops, write_jpegs
from benchmarks.report import COPY, OURS, console, print_work
from pixfuse import _counting
from pixfuse._image_files import Reading, find_images

BATCH, SIDE = 64, 224
NORMALIZATION = pixfuse.IMAGENET
SIDES = (32, 224, 1024)
GRID_PIXELS = 1 << 20  # of a batch of the grid, about
JPEG_SIDE = 256
WORKERS = (1, 2)
PLAN = Plan(rounds=15, sample_seconds=10e-3, budget_seconds=5.0, least_rounds=7)
QUICK_PLAN = Plan(rounds=3, sample_seconds=2e-3, budget_seconds=1.0)
GRID_PLAN = Plan(rounds=5, sample_seconds=3e-3, budget_seconds=0.4)

OURS_OUT = f"{OURS}, out="
OURS_BFLOAT16 = f"{OURS}, bfloat16, out="
NUMPY, OPENCV = "numpy bincount", "OpenCV calcHist"
EAGER, EAGER_IN_PLACE = "torch eager", "torch eager, in place"
ALBUMENTATIONS = "albumentations"

# Whoever is not in it must equal `pixfuse.reference` bit for bit. Results of standardizing reach
# about 4 in absolute value, where one step of float32 is 4.8e-7.
TOLERANCES = {
    EAGER: Tolerance(1e-5, "mean and std in float32"),
    # The std of some crops of 32x32 is about 2, where that shows.
    ALBUMENTATIONS: Tolerance(2e-3, "float32, and adds 1e-4 to the std"),
}


def photo_pixels(count: int, side: int) -> Batch:
    """Crops of photographs: neighbouring pixels are alike, as in what is counted in earnest."""
    photos = [np.tile(photo, (-(-side // 427), -(-side // 640), 1)) for photo in photographs()]
    return Batch(torch.from_numpy(random_crops(photos, count, side)[1]))


def random_pixels(count: int, side: int) -> Batch:
    """Every byte as likely as any other, and no neighbours alike."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Batch(torch.from_numpy(pixels))


# ---- contestants ---------------------------------------------------------------------------------


class Run(report.Run):
    """One run of this program: who was left out, and what went wrong in it."""

    def load(self, name: str, module: str) -> Any:
        """The module of a peer, or None: then it is noted that it was left out."""
        try:
            return load(module)
        except ImportError as error:
            self.unavailable[name] = str(error)
            return None


@dataclass(frozen=True)
class Job:
    """Who does a piece of work, what everybody's result must be, and what has to move."""

    contestants: list[Contestant]
    expected: torch.Tensor
    traffic_bytes: int
    others: list[tuple[Contestant, torch.Tensor]] = field(default_factory=list)  # not the same work


def histogram_job(run: Run, pixels: Batch, layout: Any) -> Job:
    """Counts of each channel; peers count channel after channel, as their users type it."""
    images = pixels.images(layout)
    array = images.numpy()

    def bincount() -> Any:
        channels = [array[..., c] if layout == "NHWC" else array[:, c] for c in range(3)]
        return [np.bincount(channel.ravel(), minlength=256) for channel in channels]

    def calc_hist() -> Any:
        if layout == "NHWC":  # one tall image
            tall = array.reshape(-1, *array.shape[2:])
            return [cv2.calcHist([tall], [c], None, [256], [0, 256]) for c in range(3)]
        counts: list[Any] = [None] * 3
        for image in array:
            for c in range(3):
                more = counts[c] is not None
                counts[c] = cv2.calcHist([image[c]], [0], None, [256], [0, 256], counts[c], more)
        return counts

    def rows(found: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack(found).astype(np.int64).reshape(3, 256))

    contestants = [
        Contestant(OURS, lambda: pixfuse.channel_histogram(images, layout)),
        Contestant(NUMPY, bincount, as_tensor=rows),
    ]
    cv2 = run.load(OPENCV, "cv2")
    if cv2 is not None:
        cv2.setNumThreads(1)
        contestants.append(Contestant(OPENCV, calc_hist, as_tensor=rows))
    return Job(contestants, pixfuse.reference.channel_histogram(images, layout), images.numel())


def moments_job(run: Run, pixels: Batch, layout: Any) -> Job:
    """Sums and sums of squares of each image: int64, as sums of squares leave 32 bits."""
    images, view = pixels.images(layout), pixels.view(layout)

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        values = view.long()
        return values.sum((2, 3)), values.square().sum((2, 3))

    expected = torch.stack(pixfuse.reference.image_moments(images, layout))
    contestants = [
        Contestant(OURS, lambda: pixfuse.image_moments(images, layout), as_tensor=torch.stack),
        Contestant(EAGER, eager, as_tensor=torch.stack),
    ]
    return Job(contestants, expected, images.numel())


def standardize_job(run: Run, pixels: Batch, layout: Any) -> Job:
    """Each image to mean 0 and std 1, in the memory format that it has."""
    images, view = pixels.images(layout), pixels.view(layout)
    least = float(view[0].numel()) ** -0.5

    def ours() -> torch.Tensor:
        return pixfuse.standardize_per_image(
            images, input_layout=layout, memory_format=torch.preserve_format
        )

    def eager() -> torch.Tensor:
        values = view.float()
        mean = values.mean((1, 2, 3), keepdim=True)
        std = values.std((1, 2, 3), correction=0, keepdim=True)
        return (values - mean) / std.clamp(min=least)

    arrays = list(pixels.nhwc.numpy())
    expected = pixfuse.reference.standardize_per_image(
        images, input_layout=layout, memory_format=torch.preserve_format
    )
    contestants = [
        Contestant(OURS, ours),
        Contestant(EAGER, eager, tolerance=TOLERANCES[EAGER]),
    ]
    library = run.load(ALBUMENTATIONS, "albumentations")
    if library is not None:
        normalize = library.Normalize(normalization="image")

        def per_image() -> list[Any]:
            return [normalize(image=array)["image"] for array in arrays]

        def stacked(results: Any) -> torch.Tensor:  # a batch takes its users another copy
            nhwc = torch.from_numpy(np.stack(results))
            return torch.empty_like(expected).copy_(nhwc.permute(0, 3, 1, 2))

        tolerance = TOLERANCES[ALBUMENTATIONS]
        contestants.append(
            Contestant(ALBUMENTATIONS, per_image, tolerance=tolerance, as_tensor=stacked)
        )
    return Job(contestants, expected, 5 * images.numel())


def denormalize_job(run: Run, pixels: Batch, layout: Any) -> Job:
    """Normalized floats back to the bytes they were."""
    formats = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    values = pixfuse.normalize(
        pixels.images(layout), NORMALIZATION, input_layout=layout, memory_format=formats[layout]
    )
    expected = pixels.images(layout)
    scale = torch.tensor([255.0 * s for s in NORMALIZATION.std]).view(-1, 1, 1)
    offset = torch.tensor([255.0 * m for m in NORMALIZATION.mean]).view(-1, 1, 1)

    def ours(tensor: torch.Tensor, out: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        return functools.partial(
            pixfuse.denormalize, tensor, NORMALIZATION, output_layout=layout, out=out
        )

    def eager() -> torch.Tensor:
        return values.mul(scale).add(offset).clamp(0, 255).round().to(torch.uint8)

    buffer = torch.empty_like(values)
    bytes_buffer = torch.empty_like(values, dtype=torch.uint8)

    def eager_in_place() -> torch.Tensor:
        torch.mul(values, scale, out=buffer).add_(offset).clamp_(0, 255).round_()
        return bytes_buffer.copy_(buffer)

    def in_layout(result: torch.Tensor) -> torch.Tensor:
        return result.permute(0, 2, 3, 1) if layout == "NHWC" else result

    out, narrow_out = torch.empty_like(expected), torch.empty_like(expected)
    narrow = values.bfloat16()
    contestants = [
        Contestant(OURS, ours(values, None)),
        Contestant(OURS_OUT, ours(values, out), output="recycled", target=out),
        Contestant(EAGER, eager, as_tensor=in_layout),
        Contestant(EAGER_IN_PLACE, eager_in_place, output="recycled", as_tensor=in_layout),
    ]
    narrow_expected = pixfuse.reference.denormalize(narrow, NORMALIZATION, output_layout=layout)
    assert isinstance(narrow_expected, torch.Tensor)
    bfloat16 = Contestant(
        OURS_BFLOAT16, ours(narrow, narrow_out), output="recycled", target=narrow_out
    )
    return Job(contestants, expected, 5 * values.numel(), [(bfloat16, narrow_expected)])


JOBS: dict[str, Callable[[Run, Batch, str], Job]] = {
    "channel_histogram": histogram_job,
    "image_moments": moments_job,
    "standardize_per_image": standardize_job,
    "denormalize": denormalize_job,
}


# ---- the operators -------------------------------------------------------------------------------


def run_job(run: Run, name: str, pixels: Batch, layout: str, plan: Plan) -> dict[str, Any]:
    """Ourselves, every peer and a copy, interleaved, one thread."""
    torch.set_num_threads(1)
    job = JOBS[name](run, pixels, layout)
    pairs = [(contestant, job.expected) for contestant in job.contestants] + job.others
    checked = [item for pair in pairs for item in run.check(*pair)]
    checked.append(checked_copy(job.traffic_bytes))
    timings = harness.measure(checked, plan)
    count, height, width, channels = pixels.nhwc.shape
    return {
        "operator": name,
        "layout": layout,
        "images": count,
        "input": f"{height}x{width}x{channels}",
        "us_per_call": {t.name: t.quartiles_us() for t in timings},
        "max_error": {t.name: t.checked.max_error for t in timings},
        "samples": len(timings[0].samples_seconds),
    }


def run_grid(run: Run, *, quick: bool) -> list[dict[str, Any]]:
    """Every operator at a few sizes, in both layouts, on photographs and on random bytes."""
    rows = []
    for side in SIDES[:1] if quick else SIDES:
        count = max(1, min(256, GRID_PIXELS // side**2)) if not quick else 4
        for kind, make in (("photographs", photo_pixels), ("random", random_pixels)):
            pixels = make(count, side)
            rows += [
                {"pixels": kind, **run_job(run, name, pixels, layout, GRID_PLAN)}
                for layout, name in itertools.product(("NCHW", "NHWC"), JOBS)
            ]
            pixfuse.empty_cache()
    return rows


# ---- pixfuse stats -------------------------------------------------------------------------------


@dataclass
class Counted:
    """What one run of the command's counting took."""

    outcome: Any
    seconds_per_image: float  # once all workers are at work
    startup_seconds: float  # until then


def count_folder(folder: Path, workers: int) -> Counted:
    """``pixfuse stats folder --workers N``, from finding the files to the statistics.

    The same functions as the command calls, without what it prints. Starting the workers, each of
    which has to import torch, takes the same second or two for a folder of any size, and is kept
    apart: with workers, the clock runs from when a tenth of the images are counted to when all are.
    """
    marks: list[tuple[float, int]] = []
    start = time.perf_counter()
    outcome = _counting.count_all(
        find_images([str(folder)]),
        Reading(),
        split="",
        folds=1,
        workers=workers,
        output=None,
        resume=False,
        strict=True,
        save_every=30.0,
        ranks=_counting.Ranks(),
        progress=lambda total, ready, unreadable: marks.append((time.perf_counter(), ready)),
    )
    end, last = marks[-1]
    begin, first = next(mark for mark in marks if workers == 0 or mark[1] >= last / 10)
    each = (end - begin) / (last - first)
    return Counted(outcome, each, max(0.0, end - start - last * each))


def expected_counts(paths: Sequence[Path]) -> torch.Tensor:
    """The histogram of each channel by Pillow and numpy."""
    from PIL import Image

    counts = np.zeros((3, 256), np.int64)
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        counts += [np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)]
    return torch.from_numpy(counts)


@dataclass(frozen=True)
class Files:
    """A folder for ``pixfuse stats``."""

    words: str
    count: int
    write: Callable[[Path, int], list[Path]]


def write_crops(folder: Path, count: int) -> list[Path]:
    return write_jpegs(folder, count, JPEG_SIDE)


PHOTOGRAPHS = Files("JPEG files of 640x427, copies of two photographs'", 256, copy_photographs)
CROPS = Files(
    f"JPEG files of {JPEG_SIDE}x{JPEG_SIDE}, cut from photographs, quality 90", 1024, write_crops
)


def run_stats(run: Run, files: Files, *, quick: bool) -> dict[str, Any]:
    """A folder of JPEG files: in this process, with one worker, and with two, in turns.

    Short runs in many rounds, and ratios within a round: what else the machine does changes from
    second to second, and would otherwise fall on one of them.
    """
    count, rounds = (64, 1) if quick else (files.count, 15)
    found: dict[int, list[Counted]] = {workers: [] for workers in (0, *WORKERS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = expected_counts(files.write(folder, count))
        for _ in range(rounds):
            for workers, outcomes in found.items():
                counted = count_folder(folder, workers)
                if not torch.equal(counted.outcome.statistics.counts, expected):
                    run.note(f"pixfuse stats, {workers} workers: counts differ from numpy's")
                    return {"images": count, "input": files.words}
                outcomes.append(counted)
    rows: list[dict[str, Any]] = []
    for workers, outcomes in found.items():
        decode = [one.outcome.decode_seconds for one in outcomes]
        work = [one.outcome.decode_seconds + one.outcome.count_seconds for one in outcomes]
        whole = [one.outcome.seconds for one in outcomes] if workers == 0 else work
        each = [one.seconds_per_image for one in outcomes]
        rows.append(
            {
                "workers": workers,
                "us_per_image": _microseconds(each),
                "decode_us": _microseconds([seconds / count for seconds in decode]),
                "decoding_share": float(f"{np.median(np.divide(decode, whole)):.4g}"),
                "startup_seconds": float(
                    f"{np.median([one.startup_seconds for one in outcomes]):.3g}"
                ),
            }
        )
        if workers > 0:
            alone = [one.seconds_per_image for one in found[1]]
            rows[-1]["speedup_over_one"] = harness.quartiles(np.divide(alone, each))
    return {
        "images": count,
        "input": files.words,
        "rounds": rounds,
        "rows": rows,
    }


def _microseconds(seconds: Sequence[float]) -> list[float]:
    return harness.quartiles(1e6 * np.asarray(seconds))


# ---- claims --------------------------------------------------------------------------------------


def claims(main: Sequence[dict[str, Any]], stats: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the numbers above."""
    us = {
        (result["operator"], result["layout"], name): quartiles[1]
        for result in main
        for name, quartiles in result["us_per_call"].items()
    }

    def slowest(operator: str, other: str, mine: str = OURS) -> float | None:
        """How many times our time the other takes, in the layout that is worse for us."""
        ratios = [
            us[operator, layout, other] / us[operator, layout, mine]
            for layout in ("NCHW", "NHWC")
            if (operator, layout, other) in us and (operator, layout, mine) in us
        ]
        return min(ratios, default=None)

    copy = slowest("denormalize", COPY, OURS_OUT)
    rows = {row["workers"]: row for row in stats.get("rows", ())}
    found = [
        (f"channel_histogram: speedup over {NUMPY}", slowest("channel_histogram", NUMPY), ">= 5"),
        (f"channel_histogram: speedup over {OPENCV}", slowest("channel_histogram", OPENCV), ">= 1"),
        (f"image_moments: speedup over {EAGER}", slowest("image_moments", EAGER), ">= 8"),
        (
            f"standardize_per_image: speedup over {EAGER}",
            slowest("standardize_per_image", EAGER),
            ">= 8",
        ),
        (
            f"standardize_per_image: speedup over {ALBUMENTATIONS}",
            slowest("standardize_per_image", ALBUMENTATIONS),
            ">= 4",
        ),
        (f"denormalize: speedup over {EAGER}", slowest("denormalize", EAGER), ">= 8"),
        ("denormalize, out=: time over a copy of as many bytes", copy and 1 / copy, "<= 1.3"),
        (
            "pixfuse stats, JPEG files: share of the whole time that is decoding",
            rows[0]["decoding_share"] if rows else None,
            ">= 0.95",
        ),
        (
            "pixfuse stats, JPEG files: images per second of two workers over one",
            rows[2]["speedup_over_one"][1] if rows else None,
            ">= 1.8",
        ),
    ]
    return [report.claim(*item) for item in found]


def print_stats(stats: dict[str, Any]) -> None:
    table = Table(title=f"pixfuse stats, {stats['images']} {stats['input']}")
    for column in ("workers", "µs per image", "decode", "decoding share", "startup, s"):
        table.add_column(column, justify="right")
    for row in stats.get("rows", ()):
        table.add_row(
            str(row["workers"]),
            f"{row['us_per_image'][1]:.0f}",
            f"{row['decode_us'][1]:.0f}",
            f"{100 * row['decoding_share']:.1f} %",
            f"{row['startup_seconds']:.2f}",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    options = report.options_of(
        __doc__, "pixels_cpu.json", argv, quick="few samples, a grid of one size"
    )
    run = Run()
    pixels = photo_pixels(BATCH, SIDE)
    plan = QUICK_PLAN if options.quick else PLAN
    results = [
        run_job(run, name, pixels, layout, plan) for name in JOBS for layout in ("NCHW", "NHWC")
    ]
    pixfuse.empty_cache()
    rows = run_grid(run, quick=options.quick)
    checked_copy.cache_clear()
    stats = run_stats(run, PHOTOGRAPHS, quick=options.quick)
    crops_stats = run_stats(run, CROPS, quick=options.quick)
    found = claims(results, stats)
    for result in results:
        print_work(f"{result['operator']}, {result['layout']}, {result['input']}", result)
    print_stats(stats)
    print_stats(crops_stats)
    report.print_claims(found)
    for name, reason in run.unavailable.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    document = {
        "about": "us_per_call holds the quartiles (25 %, median, 75 %) of one call in "
        "microseconds, a call being a whole batch; max_error the largest difference from "
        "pixfuse.reference; the claims take the worse of the two layouts. In stats, "
        "us_per_image is the wall-clock time once all workers run, startup_seconds what comes "
        "before; speedup_over_one holds the quartiles of the rounds' ratios to one worker; "
        "decoding is opening, reading and decompressing a file; decoding_share is its "
        "share of the whole run without workers, and with them of the workers' work",
        **harness.environment(PACKAGES),
        "pixfuse": {key: pixfuse.info()[key] for key in ("isa", "available_isas", "cuda")},
        "unavailable": run.unavailable,
        "unequal": run.problems,
        "claims": found,
        "results": results,
        "stats": stats,
        "stats_of_crops": crops_stats,
        "grid": rows,
    }
    return run.finish(options.output, document)


if __name__ == "__main__":
    sys.exit(main())
