"""The comparison behind ``pixfuse bench``: short, self-contained, results compared first."""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import pixfuse
from pixfuse._library import active_isa

#: How far a float result may be from the exact one, in units of the result.
_CLOSE = 2e-5


class Contender(NamedTuple):
    """One way to do a job; its result is compared with that of pixfuse before it is timed."""

    by: str
    call: Callable[[], torch.Tensor]


def run(batch: int, size: int, threads: int, rounds: int) -> dict[str, Any]:
    """Compare, then time in turn.

    Returns:
        A dict of ``rows`` (job, by, us_per_image, ratio to pixfuse, difference) and what was run.

    Raises:
        RuntimeError: a result is not that of pixfuse.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    with _threads(threads):
        for job, contenders in _jobs(images, notes).items():
            rows += _compare(job, contenders, batch, rounds)
    return {
        "batch": batch,
        "size": size,
        "threads": threads,
        "rounds": rounds,
        "isa": active_isa(),
        "torch": torch.__version__,
        "rows": rows,
        "notes": notes,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _jobs(images: torch.Tensor, notes: list[str]) -> dict[str, list[Contender]]:
    """Each job's contenders, pixfuse first."""
    nchw = images.permute(0, 3, 1, 2)
    mean = torch.tensor(pixfuse.IMAGENET.mean).view(3, 1, 1)
    std = torch.tensor(pixfuse.IMAGENET.std).view(3, 1, 1)
    normalized = pixfuse.normalize(images, pixfuse.IMAGENET, input_layout="NHWC")
    # Memory of the results' size, both read and written.
    source, target = torch.zeros_like(normalized), torch.zeros_like(normalized)

    def eager_normalize() -> torch.Tensor:
        x = nchw.to(torch.float32, memory_format=torch.contiguous_format)
        return x.mul_(1 / 255).sub_(mean).div_(std)

    def eager_denormalize() -> torch.Tensor:
        return normalized.mul(255 * std).add_(255 * mean).clamp_(0, 255).round_().to(torch.uint8)

    def eager_histogram() -> torch.Tensor:
        return torch.stack([torch.bincount(c.flatten(), minlength=256) for c in nchw.unbind(1)])

    def eager_standardize() -> torch.Tensor:
        x = nchw.to(torch.float32, memory_format=torch.contiguous_format).flatten(1)
        variance, average = torch.var_mean(x, 1, correction=0, keepdim=True)
        floor = x.shape[1] ** -0.5
        return x.sub_(average).div_(variance.sqrt_().clamp_(min=floor)).view_as(nchw)

    torchvision_normalize = _torchvision(nchw, notes)
    return {
        "normalize": [
            Contender(
                "pixfuse",
                lambda: pixfuse.normalize(images, pixfuse.IMAGENET, input_layout="NHWC"),
            ),
            Contender("torch eager", eager_normalize),
            *(
                [Contender("torchvision v2", torchvision_normalize)]
                if torchvision_normalize
                else []
            ),
            Contender("copy of result", lambda: target.copy_(source)),
        ],
        "standardize_per_image": [
            Contender(
                "pixfuse", lambda: pixfuse.standardize_per_image(images, input_layout="NHWC")
            ),
            Contender("torch eager", eager_standardize),
        ],
        "denormalize": [
            Contender("pixfuse", lambda: pixfuse.denormalize(normalized, pixfuse.IMAGENET)),
            Contender("torch eager", eager_denormalize),
        ],
        "channel_histogram": [
            Contender("pixfuse", lambda: pixfuse.channel_histogram(images, "NHWC")),
            Contender("torch bincount", eager_histogram),
        ],
    }


def _torchvision(nchw: torch.Tensor, notes: list[str]) -> Callable[[], torch.Tensor] | None:
    """Its function, if it can be imported; torchvision is as particular about torch as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functional = importlib.import_module("torchvision.transforms.v2.functional")
    except ModuleNotFoundError:
        notes.append("torchvision is not installed: not compared")
        return None
    except Exception as error:  # another build of torch, say
        notes.append(f"torchvision cannot be imported: not compared ({error})")
        return None
    mean, std = list(pixfuse.IMAGENET.mean), list(pixfuse.IMAGENET.std)

    def call() -> torch.Tensor:
        scaled = functional.to_dtype(nchw, torch.float32, scale=True)
        result: torch.Tensor = functional.normalize(scaled, mean, std)
        return result

    return call


def _compare(
    job: str, contenders: list[Contender], batch: int, rounds: int
) -> list[dict[str, Any]]:
    ours = contenders[0]
    expected = ours.call().clone()
    differences = {
        one.by: "" if one.by.startswith("copy") else _difference(job, one, expected)
        for one in contenders
    }
    seconds: dict[str, list[float]] = {one.by: [] for one in contenders}
    for one in contenders:  # warm
        one.call()
    for _ in range(rounds):
        for one in contenders:
            start = time.perf_counter()
            one.call()
            seconds[one.by].append(time.perf_counter() - start)
    medians = {by: statistics.median(times) for by, times in seconds.items()}
    return [
        {
            "job": job,
            "by": by,
            "us_per_image": 1e6 * median / batch,
            "ratio": median / medians[ours.by],
            "difference": differences[by],
        }
        for by, median in medians.items()
    ]


def _difference(job: str, one: Contender, expected: torch.Tensor) -> str:
    result = one.call()
    if result.shape != expected.shape or result.dtype != expected.dtype:
        raise RuntimeError(
            f"bench: expected {job} by {one.by} to give {expected.dtype} of {expected.shape}, got "
            f"{result.dtype} of {result.shape}"
        )
    if torch.equal(result, expected):
        return "none"
    error = (result.double() - expected.double()).abs().max().item()
    if not expected.is_floating_point() or not error <= _CLOSE:
        raise RuntimeError(
            f"bench: expected {job} by {one.by} to give the result of pixfuse, got a difference "
            f"of {error:.3g}"
        )
    return f"up to {error:.1e}"
