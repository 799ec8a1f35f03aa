"""How many images per second a DataLoader delivers, and where its time goes.

    python -m benchmarks.bench_loader [--quick] [--output FILE]

Pillow images held in memory, then a folder of JPEG files cut from real photographs and decoded by
Pillow; 0, 1 and 2 workers; torchvision's transforms in the dataset with torch's collate, against
``pixfuse.Collate``, and against uint8 batches that a ``pixfuse.DeviceLoader`` normalizes. Each
pipeline's batches are compared with the reference before it is timed. Ends with status 1 when one
was not equal; a missed target is reported, and is no error.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, default_collate

import pixfuse
from benchmarks import harness, report
from benchmarks.bench_normalize import PACKAGES
from benchmarks.peers import load
from benchmarks.photos import photographs, random_crops, write_jpegs
from benchmarks.report import OURS, Run, console

NORMALIZATION = pixfuse.IMAGENET
BATCH, SIDE = 64, 224
JPEG_SIDE = 256
WORKERS = (0, 1, 2)
TORCHVISION = "torchvision v2"
OURS_UINT8 = f"{OURS}, uint8 batches and DeviceLoader"
SOURCES = {
    "memory": f"Pillow images of {SIDE}x{SIDE} held in memory",
    "folder": f"JPEG files of {JPEG_SIDE}x{JPEG_SIDE}, decoded by Pillow, centre crop to {SIDE}",
}
PARTS = ("decode", "normalize", "move")


class Images(Dataset[Any]):
    """Images, their index, and the seconds it took to decode and to transform each of them."""

    def __init__(self, items: Sequence[Any], transform: Callable[[Any], Any] | None) -> None:
        self.items = items
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int, float, float]:
        start = time.perf_counter()
        image = self.items[index]
        if isinstance(image, Path):
            from PIL import Image

            with Image.open(image) as opened:
                image = opened.convert("RGB")
        decoded = time.perf_counter()
        if self.transform is not None:
            image = self.transform(image)
        return image, index, decoded - start, time.perf_counter() - decoded


@dataclass(frozen=True)
class TimedCollate:
    """A collate function, and the seconds that it took, for the whole batch."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> list[Any]:
        start = time.perf_counter()
        batch = self.collate(samples)
        return [*batch, time.perf_counter() - start]


@dataclass(frozen=True)
class Pipeline:
    """A loader that gives float32 batches, ready to train on."""

    name: str
    workers: int
    batches: Iterable[Any]


@dataclass
class Timing:
    """Seconds per image: of each epoch, and the parts that were measured beside the work."""

    epochs: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    normalize: list[float] = field(default_factory=list)


def pipelines(source: str, items: Sequence[Any], worker_counts: Sequence[int]) -> list[Pipeline]:
    """Every pipeline, with every number of workers, over the same items."""
    v2 = load("torchvision.transforms.v2")
    mean, std = list(NORMALIZATION.mean), list(NORMALIZATION.std)
    crop = source == "folder"
    transform = v2.Compose(
        [
            v2.ToImage(),
            *([v2.CenterCrop(SIDE)] if crop else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std, inplace=True),
        ]
    )
    window: dict[str, Any] = {"size": SIDE, "crop": "center"} if crop else {}
    collate = pixfuse.Collate(NORMALIZATION, **window)
    packing = pixfuse.Collate(NORMALIZATION, dtype=torch.uint8, **window)

    def loader(
        workers: int,
        collate_fn: Callable[[Any], Any],
        transform: Callable[[Any], Any] | None = None,
    ) -> DataLoader[Any]:
        return DataLoader(
            Images(items, transform),
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=TimedCollate(collate_fn),
        )

    found = []
    for workers in worker_counts:
        found += [
            Pipeline(TORCHVISION, workers, loader(workers, default_collate, transform)),
            Pipeline(OURS, workers, loader(workers, collate)),
            Pipeline(
                OURS_UINT8,
                workers,
                pixfuse.DeviceLoader(loader(workers, packing), "cpu", NORMALIZATION),
            ),
        ]
    return found


def expected_batches(source: str, items: Sequence[Any]) -> torch.Tensor:
    """What every pipeline must deliver, by torch alone."""
    from PIL import Image

    arrays = []
    for item in items:
        if isinstance(item, Path):
            with Image.open(item) as opened:
                arrays.append(np.asarray(opened.convert("RGB")))
        else:
            arrays.append(np.asarray(item))
    pixels = torch.from_numpy(np.stack(arrays))
    if source == "folder":
        first = (JPEG_SIDE - SIDE) // 2
        pixels = pixels[:, first : first + SIDE, first : first + SIDE]
    return pixfuse.reference.normalize(pixels, NORMALIZATION, input_layout="NHWC")


def check(pipeline: Pipeline, expected: torch.Tensor) -> str | None:
    """Why the pipeline's batches are not the expected ones, or None."""
    seen = 0
    for images, indices, *_ in pipeline.batches:
        wanted = expected[seen : seen + len(images)]
        same = images.shape == wanted.shape and images.dtype == wanted.dtype
        if not same or not torch.equal(images.view(torch.int32), wanted.view(torch.int32)):
            return f"{pipeline.name}, {pipeline.workers} workers: batch from {seen} differs"
        if indices.tolist() != list(range(seen, seen + len(images))):
            return f"{pipeline.name}, {pipeline.workers} workers: expected indices from {seen} on"
        seen += len(images)
    if seen != len(expected):
        return f"{pipeline.name}, {pipeline.workers} workers: {seen} of {len(expected)} images"
    return None


def run_epoch(pipeline: Pipeline, timing: Timing) -> None:
    """One pass over all images; each batch is dropped when the next one is there.

    Each is read once, as a model would: pages that a worker filled cost their reader something too.
    """
    decode = normalize = 0.0
    count = 0
    start = time.perf_counter()
    for images, _, decoded, transformed, collated in pipeline.batches:
        images.sum()
        count += len(images)
        decode += float(decoded.sum())
        normalize += float(transformed.sum()) + collated
    seconds = time.perf_counter() - start
    timing.epochs.append(seconds / count)
    timing.decode.append(decode / count)
    timing.normalize.append(normalize / count)


def run_source(
    run: Run,
    source: str,
    items: Sequence[Any],
    rounds: int,
    worker_counts: Sequence[int] = WORKERS,
) -> list[dict[str, Any]]:
    """Check every pipeline, then run their epochs in turn, each round in a new order."""
    expected = expected_batches(source, items)
    found = []
    for pipeline in pipelines(source, items, worker_counts):
        problem = check(pipeline, expected)
        if problem is None:
            found.append(pipeline)
        else:
            run.note(problem)
    timings = [Timing() for _ in found]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(range(len(found)), len(found)):
            run_epoch(found[i], timings[i])
    return [row(source, p, t) for p, t in zip(found, timings, strict=True)]


def row(source: str, pipeline: Pipeline, timing: Timing) -> dict[str, Any]:
    """One line of the JSON.

    The parts are those of the wall-clock time per image: work done in W workers at once counts
    1/W. What is left of it is moving: fetching, passing batches between processes, waiting for
    them, reading them once.
    """
    low, middle, high = (float(q) * 1e6 for q in np.quantile(timing.epochs, (0.25, 0.5, 0.75)))
    at_once = max(1, pipeline.workers)
    decode = float(np.median(timing.decode)) * 1e6 / at_once
    normalize = float(np.median(timing.normalize)) * 1e6 / at_once
    return {
        "source": source,
        "pipeline": pipeline.name,
        "workers": pipeline.workers,
        "us_per_image": [float(f"{us:.4g}") for us in (low, middle, high)],
        "images_per_second": float(f"{1e6 / middle:.4g}"),
        "parts_us": {
            "decode": float(f"{decode:.4g}"),
            "normalize": float(f"{normalize:.4g}"),
            "move": float(f"{max(0.0, middle - decode - normalize):.4g}"),
        },
    }


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the numbers above."""
    us = {(r["source"], r["pipeline"], r["workers"]): r["us_per_image"][1] for r in rows}

    def ratio(source: str, workers: int, name: str = OURS) -> float | None:
        theirs, mine = us.get((source, TORCHVISION, workers)), us.get((source, name, workers))
        return theirs / mine if theirs and mine else None

    found = []
    for source, target in (("memory", ">= 3"), ("folder", ">= 1")):
        for workers in WORKERS:
            text = f"{source}, {workers} workers: images per second over torchvision's"
            found.append(report.claim(text, ratio(source, workers), target))
    for source in SOURCES:
        for workers in WORKERS[1:]:
            floats, packed = us.get((source, OURS, workers)), us.get((source, OURS_UINT8, workers))
            found.append(
                report.claim(
                    f"{source}, {workers} workers: images per second of uint8 batches and "
                    "DeviceLoader over float batches",
                    floats / packed if floats and packed else None,
                    ">= 1",
                )
            )
    return found


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for source, title in SOURCES.items():
        if all(item["source"] != source for item in rows):
            continue
        table = Table(title=title)
        for column in ("", "workers", "images/s", "µs per image", *PARTS):
            table.add_column(column, justify="left" if not column else "right")
        for item in rows:
            if item["source"] == source:
                table.add_row(
                    item["pipeline"],
                    str(item["workers"]),
                    f"{item['images_per_second']:,.0f}",
                    f"{item['us_per_image'][1]:.0f}",
                    *(f"{item['parts_us'][part]:.0f}" for part in PARTS),
                )
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    from PIL import Image

    options = report.options_of(__doc__, "loader_cpu.json", argv, quick="few images, few epochs")
    run = Run()
    # One thread per process for everybody, as DataLoader gives its workers.
    torch.set_num_threads(1)
    count, rounds = (2 * BATCH, 2) if options.quick else (8 * BATCH, 9)
    _, pixels = random_crops(photographs(), count, SIDE)
    rows = run_source(run, "memory", [Image.fromarray(crop) for crop in pixels], rounds)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), count, JPEG_SIDE)
        rows += run_source(run, "folder", paths, rounds)
    found = claims(rows)
    print_rows(rows)
    report.print_claims(found)
    document = {
        "about": "us_per_image holds the quartiles (25 %, median, 75 %) over epochs of the "
        "wall-clock microseconds per image; parts_us says where the median goes: work done "
        "in W workers at once counts 1/W, and what decoding and normalizing (transform and "
        "collate) leave is moving batches, waiting for them and reading them once",
        **harness.environment(PACKAGES),
        "pixfuse": {key: pixfuse.info()[key] for key in ("isa", "available_isas", "cuda")},
        "images": count,
        "batch": BATCH,
        "epochs": rounds,
        "sources": SOURCES,
        "unequal": run.problems,
        "claims": found,
        "rows": rows,
    }
    return run.finish(options.output, document)


if __name__ == "__main__":
    sys.exit(main())
