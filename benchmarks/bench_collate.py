"""How long a list of images takes to become a normalized batch, beside everybody else.

    python -m benchmarks.bench_collate [--quick] [--output FILE]

Two works, on one thread: 64 Pillow images of 224x224 to one float32 batch, and 64 images of 256x256
cropped to 224x224, half of them mirrored. Then a grid of sizes, batches, kinds of input, types and
thread counts for ourselves and torchvision. Ends with status 1 when a result was not equal; a
missed target is reported, and is no error.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import pixfuse
from benchmarks import harness, peers, report
from benchmarks.bench_normalize import PACKAGES, checked_copy, thread_counts
from benchmarks.harness import Contestant, Plan
from benchmarks.peers import TOLERANCES, load
from benchmarks.report import COPY, OURS, Run, console, print_work

BATCH, SIDE, LARGER_SIDE = 64, 224, 256
NORMALIZATION = pixfuse.IMAGENET
PLAN = Plan(rounds=21, sample_seconds=10e-3, budget_seconds=60.0)
QUICK_PLAN = Plan(rounds=5, sample_seconds=5e-3, budget_seconds=8.0)
GRID_PLAN = Plan(rounds=5, sample_seconds=3e-3, budget_seconds=0.6)
KINDS = ("Pillow", "numpy", "tensor")

OURS_OUT = f"{OURS}, out="
OURS_NUMPY = f"{OURS}, numpy"
OURS_TENSORS = f"{OURS}, tensors"
OURS_BFLOAT16 = f"{OURS}, bfloat16"
OURS_UINT8 = f"{OURS}, uint8"
V1, V2 = peers.TorchvisionV1Pillow.name, peers.TorchvisionV2Pillow.name
ALBUMENTATIONS = f"{peers.Albumentations.name}, Pillow"
ALBUMENTATIONS_NUMPY = f"{peers.Albumentations.name}, numpy"
DALI = peers.Dali.name
DALI_FED = f"{DALI}, fed each time"


@dataclass(frozen=True)
class Work:
    """What is done to a list of images; ``tops``, ``lefts`` and ``mirror`` have one value each."""

    arrays: list[np.ndarray[Any, Any]]
    size: int
    tops: list[int]
    lefts: list[int]
    mirror: list[bool]

    @property
    def crops(self) -> bool:
        return any(self.mirror) or any(a.shape[0] != self.size for a in self.arrays)

    @functools.cached_property
    def pillow_images(self) -> list[Any]:
        from PIL import Image

        return [Image.fromarray(array) for array in self.arrays]

    @functools.cached_property
    def tensors(self) -> list[torch.Tensor]:
        return [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in self.arrays]

    def images(self, kind: str) -> Sequence[Any]:
        return {"Pillow": self.pillow_images, "numpy": self.arrays, "tensor": self.tensors}[kind]

    def expected(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What everybody's result is compared with: slices, flips, and the reference's numbers."""
        pixels = np.stack(
            [
                array[top : top + self.size, left : left + self.size][:, :: -1 if mirror else 1]
                for array, top, left, mirror in zip(
                    self.arrays, self.tops, self.lefts, self.mirror, strict=True
                )
            ]
        )
        nhwc = torch.from_numpy(pixels)
        if dtype == torch.uint8:
            return nhwc.permute(0, 3, 1, 2).contiguous()
        return pixfuse.reference.normalize(nhwc, NORMALIZATION, input_layout="NHWC", dtype=dtype)

    def traffic_bytes(self, dtype: torch.dtype) -> int:
        return len(self.arrays) * self.size**2 * 3 * (1 + dtype.itemsize)


def random_work(batch: int, side: int, size: int, *, mirror: bool) -> Work:
    """Random pixels; random windows where the images are larger than the result."""
    random = np.random.default_rng(0)
    arrays = list(random.integers(0, 256, (batch, side, side, 3), dtype=np.uint8))
    tops, lefts = random.integers(0, side - size + 1, (2, batch)).tolist()
    mirrors = (random.random(batch) < 0.5).tolist() if mirror else [False] * batch
    return Work(arrays, size, tops, lefts, mirrors)


# ---- contestants ---------------------------------------------------------------------------------


def ours(
    work: Work,
    kind: str = "Pillow",
    *,
    name: str = OURS,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> Contestant:
    """``pixfuse.crop_mirror_normalize`` on the list."""
    images = work.images(kind)
    window: dict[str, Any] = {}
    if work.crops:
        window = {"size": work.size, "top": work.tops, "left": work.lefts, "mirror": work.mirror}

    def call() -> torch.Tensor:
        result: torch.Tensor = pixfuse.crop_mirror_normalize(
            images, normalization=NORMALIZATION, dtype=dtype, out=out, **window
        )
        return result

    return Contestant(name, call, output="fresh" if out is None else "recycled", target=out)


def torchvision_v1(work: Work) -> Contestant:
    """v1 ``ToTensor`` + ``Normalize`` for each Pillow image, then ``torch.stack``."""
    v1 = load("torchvision.transforms")
    functional = load("torchvision.transforms.functional")
    compose = v1.Compose([v1.ToTensor(), v1.Normalize(*_statistics())])
    return _per_sample(V1, work, work.pillow_images, functional.crop, functional.hflip, compose)


def torchvision_v2(work: Work) -> Contestant:
    """v2 ``ToImage`` + ``ToDtype`` + ``Normalize`` for each Pillow image, then ``torch.stack``."""
    v2 = load("torchvision.transforms.v2")
    functional = load("torchvision.transforms.v2.functional")
    compose = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*_statistics()),
        ]
    )
    crop, mirror = functional.crop, functional.horizontal_flip
    return _per_sample(V2, work, work.pillow_images, crop, mirror, compose)


def albumentations(work: Work, *, kind: str) -> Contestant:
    """``Crop`` and ``HorizontalFlip`` as the sample needs them, ``Normalize`` + ``ToTensorV2``.

    It takes arrays alone: a Pillow image becomes one with ``np.asarray``, within the clock.
    """
    library, size = load("albumentations"), work.size
    mean, std = _statistics()
    tail = [
        library.Normalize(mean=mean, std=std),
        load("albumentations.pytorch").ToTensorV2(),
    ]
    if not work.crops:
        transforms = [library.Compose(tail)] * len(work.arrays)
    else:
        transforms = [
            library.Compose(
                [
                    library.Crop(left, top, left + size, top + size, p=1.0),
                    *([library.HorizontalFlip(p=1.0)] if mirror else []),
                    *tail,
                ]
            )
            for top, left, mirror in zip(work.tops, work.lefts, work.mirror, strict=True)
        ]
    samples = list(zip(transforms, work.images(kind), strict=True))

    def from_pillow() -> torch.Tensor:
        return torch.stack(
            [transform(image=np.asarray(image))["image"] for transform, image in samples]
        )

    def from_arrays() -> torch.Tensor:
        return torch.stack([transform(image=array)["image"] for transform, array in samples])

    name, call = {
        "Pillow": (ALBUMENTATIONS, from_pillow),
        "numpy": (ALBUMENTATIONS_NUMPY, from_arrays),
    }[kind]
    return Contestant(name, call, tolerance=TOLERANCES[peers.Albumentations.name])


def dali(work: Work, *, fed: bool) -> Contestant:
    """DALI's CPU ``crop_mirror_normalize``, run synchronously, one thread, on the numpy arrays.

    ``fed``: takes the list of them in each call, as a pipeline must; otherwise it holds them
    already, side by side, without a copy.
    """
    library, fn, types = (load(module) for module in peers.Dali.modules)
    mean, std = _statistics()
    pipeline = library.Pipeline(
        batch_size=len(work.arrays),
        num_threads=1,
        device_id=None,
        exec_pipelined=False,
        exec_async=False,
        prefetch_queue_depth=1,
    )
    slack = np.maximum(1, [array.shape[0] - work.size for array in work.arrays])
    per_image: dict[str, list[np.ndarray[Any, Any]]] = {}
    if work.crops:
        per_image = {
            "crop_pos_y": [np.array(top, np.float32) for top in work.tops / slack],
            "crop_pos_x": [np.array(left, np.float32) for left in work.lefts / slack],
            "mirror": [np.array(mirror, np.int32) for mirror in work.mirror],
        }

    with pipeline:
        images = fn.external_source(name="images", layout="HWC", repeat_last=not fed, no_copy=True)
        window = {
            name: fn.external_source(name=name, repeat_last=True, no_copy=True)
            for name in per_image
        }
        if work.crops:
            window["crop"] = (work.size, work.size)
        pipeline.set_outputs(
            fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * m for m in mean],
                std=[255 * s for s in std],
                **window,
            )
        )
    pipeline.build()
    for name, values in per_image.items():
        pipeline.feed_input(name, values)
    if not fed:
        pixels = np.stack(work.arrays)
        pipeline.feed_input("images", library.tensors.TensorListCPU(pixels, layout="HWC"))

    def call() -> Any:
        if fed:
            pipeline.feed_input("images", work.arrays)
        return pipeline.run()

    call.held = per_image  # type: ignore[attr-defined]  # DALI has no copy of its own
    return Contestant(
        DALI_FED if fed else DALI,
        call,
        output="own pool",
        tolerance=TOLERANCES[DALI],
        as_tensor=lambda outputs: torch.from_numpy(np.asarray(outputs[0].as_tensor())),
    )


def _per_sample(
    name: str,
    work: Work,
    images: Sequence[Any],
    crop: Callable[..., Any],
    mirror: Callable[[Any], Any],
    tail: Callable[[Any], torch.Tensor],
) -> Contestant:
    size = work.size
    if not work.crops:

        def call() -> torch.Tensor:
            return torch.stack([tail(image) for image in images])

    else:
        places = list(zip(images, work.tops, work.lefts, work.mirror, strict=True))

        def call() -> torch.Tensor:
            return torch.stack(
                [
                    tail(
                        mirror(crop(image, top, left, size, size))
                        if mirrored
                        else crop(image, top, left, size, size)
                    )
                    for image, top, left, mirrored in places
                ]
            )

    return Contestant(name, call, tolerance=TOLERANCES.get(name, harness.BIT_EQUAL))


def _statistics() -> tuple[list[float], list[float]]:
    return list(NORMALIZATION.mean), list(NORMALIZATION.std)


# ---- the run -------------------------------------------------------------------------------------

PEERS: tuple[tuple[str, Callable[[Work], Contestant]], ...] = (
    (V1, torchvision_v1),
    (V2, torchvision_v2),
    (ALBUMENTATIONS, functools.partial(albumentations, kind="Pillow")),
    (ALBUMENTATIONS_NUMPY, functools.partial(albumentations, kind="numpy")),
    (DALI, functools.partial(dali, fed=False)),
    (DALI_FED, functools.partial(dali, fed=True)),
)


def run_work(run: Run, work: Work, plan: Plan) -> dict[str, Any]:
    """Ourselves in several ways and every peer, interleaved, one thread."""
    torch.set_num_threads(1)
    expected = work.expected()
    checked = run.check(ours(work), expected)
    checked += run.check(ours(work, name=OURS_OUT, out=torch.empty_like(expected)), expected)
    checked += run.check(ours(work, "numpy", name=OURS_NUMPY), expected)
    checked += run.check(ours(work, "tensor", name=OURS_TENSORS), expected)
    for name, dtype in ((OURS_BFLOAT16, torch.bfloat16), (OURS_UINT8, torch.uint8)):
        checked += run.check(ours(work, name=name, dtype=dtype), work.expected(dtype))
    for name, make in PEERS:
        try:
            contestant = make(work)
        except ImportError as error:
            run.unavailable[name] = str(error)
            continue
        checked += run.check(contestant, expected)
    checked.append(checked_copy(work.traffic_bytes(torch.float32)))
    timings = harness.measure(checked, plan)
    return {
        "images": len(work.arrays),
        "input": f"{work.arrays[0].shape[0]}x{work.arrays[0].shape[1]}x3",
        "output": f"{work.size}x{work.size}",
        "mirrored": sum(work.mirror),
        "us_per_call": {t.name: t.quartiles_us() for t in timings},
        "max_error": {t.name: t.checked.max_error for t in timings},
        "samples": len(timings[0].samples_seconds),
    }


def run_grid(run: Run, *, quick: bool) -> list[dict[str, Any]]:
    """Ourselves and torchvision over sizes, batches, kinds of input, types and threads."""
    rows = []
    shapes = [(8, 64)] if quick else list(itertools.product((1, 16, 64), (32, 96, 224, 384)))
    for batch, size in shapes:
        for larger in (False, True):
            side = size * 8 // 7 if larger else size
            work = random_work(batch, side, size, mirror=larger)
            expected = work.expected()
            for threads in thread_counts():
                torch.set_num_threads(threads)
                checked = [
                    item
                    for kind in KINDS
                    for item in run.check(ours(work, kind, name=f"{OURS}, {kind}"), expected)
                ]
                for make in (torchvision_v1, torchvision_v2):
                    checked += run.check(make(work), expected)
                checked.append(checked_copy(work.traffic_bytes(torch.float32)))
                timings = harness.measure(checked, GRID_PLAN)
                rows.append(
                    {
                        "batch": batch,
                        "side": side,
                        "size": size,
                        "mirror": larger,
                        "threads": threads,
                        "us_per_call": {t.name: t.quartiles_us() for t in timings},
                    }
                )
            pixfuse.empty_cache()
            checked_copy.cache_clear()
    return rows


def claims(
    plain: dict[str, Any], cropped: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the numbers above."""

    def ratio(result: dict[str, Any], a: str, b: str = OURS) -> float | None:
        return report.least_ratio([result], a, b)

    def quickest(result: dict[str, Any], names: Sequence[str], b: str) -> float | None:
        return min(filter(None, (ratio(result, name, b) for name in names)), default=None)

    found = [
        report.claim("64 Pillow images: speedup over torchvision v1", ratio(plain, V1), ">= 15"),
        report.claim("64 Pillow images: speedup over torchvision v2", ratio(plain, V2), ">= 15"),
        report.claim(
            "64 Pillow images: speedup over albumentations, which makes arrays of them",
            ratio(plain, ALBUMENTATIONS),
            ">= 8",
        ),
        report.claim(
            "64 numpy arrays: speedup over albumentations",
            ratio(plain, ALBUMENTATIONS_NUMPY, OURS_NUMPY),
            ">= 8",
        ),
        report.claim(
            "64 numpy arrays: speedup over DALI, the quicker of fed and held",
            quickest(plain, (DALI, DALI_FED), OURS_NUMPY),
            ">= 3",
        ),
        report.claim(
            "64 numpy arrays, 256 to 224 with mirror: speedup over DALI, the quicker of both",
            quickest(cropped, (DALI, DALI_FED), OURS_NUMPY),
            ">= 3",
        ),
        report.claim("64 Pillow images: share of the copy bandwidth", ratio(plain, COPY), ">= 0.9"),
        report.claim(
            "64 numpy arrays: share of the copy bandwidth",
            ratio(plain, COPY, OURS_NUMPY),
            ">= 0.9",
        ),
    ]
    slower = 0
    for row in rows:
        us = {name: quartiles[1] for name, quartiles in row["us_per_call"].items()}
        slower += us[f"{OURS}, Pillow"] > min(us[V1], us[V2])
    found.append(report.claim(f"points of {len(rows)} where torchvision is faster", slower, "<= 0"))
    return found


def at_the_copy(result: dict[str, Any]) -> dict[str, float]:
    """The speedup over each peer of whoever takes as long as the copy of as many bytes."""
    us = {name: quartiles[1] for name, quartiles in result["us_per_call"].items()}
    peer_names = [name for name, _ in PEERS if name in us]
    return {name: float(f"{us[name] / us[COPY]:.4g}") for name in peer_names}


def main(argv: Sequence[str] | None = None) -> int:
    options = report.options_of(
        __doc__, "collate_cpu.json", argv, quick="few samples, a grid of one point"
    )
    run = Run()
    plan = QUICK_PLAN if options.quick else PLAN
    plain = run_work(run, random_work(BATCH, SIDE, SIDE, mirror=False), plan)
    cropped = run_work(run, random_work(BATCH, LARGER_SIDE, SIDE, mirror=True), plan)
    rows = run_grid(run, quick=options.quick)
    found = claims(plain, cropped, rows)
    print_work(f"{BATCH} images of {SIDE}x{SIDE} to NCHW float32, one thread", plain)
    print_work(f"{BATCH} images of {LARGER_SIDE}x{LARGER_SIDE}, cropped and mirrored", cropped)
    report.print_claims(found)
    for name, reason in run.unavailable.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    document = {
        "about": "us_per_call holds the quartiles (25 %, median, 75 %) of one call in "
        "microseconds, a call being a whole list; max_error the largest difference from slices "
        "of the pixels given to pixfuse.reference.normalize; speedup_at_the_copy the "
        "speedup over each peer of whoever does the plain work in the time of the copy",
        **harness.environment(PACKAGES),
        "pixfuse": {key: pixfuse.info()[key] for key in ("isa", "available_isas", "cuda")},
        "unavailable": run.unavailable,
        "unequal": run.problems,
        "claims": found,
        "speedup_at_the_copy": at_the_copy(plain),
        "plain": plain,
        "cropped": cropped,
        "grid": rows,
    }
    return run.finish(options.output, document)


if __name__ == "__main__":
    sys.exit(main())
