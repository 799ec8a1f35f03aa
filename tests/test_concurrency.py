"""Many threads at once, workers of every kind, and forks in the middle of work."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pixfuse
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.normalizations import DTYPES, ROUNDINGS, made_up
from tests.processes import wait_for


def test_many_threads_at_once(device: torch.device) -> None:
    """Small and large calls, with and without the table and the output buffer cache."""
    sizes = [(1, 3, 8, 8), (2, 3, 64, 65), (4, 3, 224, 224)]
    jobs = []
    for number in range(24):
        images = random_bytes(*sizes[number % 3]).to(device)
        normalization = made_up(3, ROUNDINGS[number % 5])
        dtype = DTYPES[number % 2]
        expected = pixfuse.reference.normalize(images.cpu(), normalization, dtype=dtype)
        jobs.append((images, normalization, dtype, expected))

    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        for turn in range(30):
            images, normalization, dtype, expected = jobs[(first + turn) % len(jobs)]
            ours = pixfuse.normalize(images, normalization, dtype=dtype)
            out = torch.empty_like(ours)
            pixfuse.normalize(images, normalization, dtype=dtype, out=out)
            assert_same_bits(ours, expected)
            assert_same_bits(out, expected)

    with ThreadPoolExecutor(8) as pool:
        for finished in [pool.submit(work, 3 * number) for number in range(8)]:
            finished.result()


# --- the GIL ---


def other_threads_ran_during(call: Callable[[], object], tries: int = 20) -> bool:
    """Whether another Python thread made progress in the middle of a call."""
    stamps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0)

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        for _ in range(tries):
            begin = time.perf_counter()
            call()
            took = time.perf_counter() - begin
            # The interpreter may switch threads just before and just after the call itself, so
            # only the middle counts, and only of calls that are longer than a time slice.
            middle = (begin + 0.4 * took, begin + 0.6 * took)
            if took > 10 * sys.getswitchinterval() and any(
                middle[0] < stamp < middle[1] for stamp in reversed(stamps)
            ):
                return True
    finally:
        stop.set()
        ticking.join()
    return False


def test_the_gil_is_released() -> None:
    images = random_bytes(1, 3, 1024, 1024).expand(64, 3, 1024, 1024)
    out = torch.empty(64, 3, 1024, 1024, dtype=torch.bfloat16)
    torch.set_num_threads(1)
    assert other_threads_ran_during(
        lambda: pixfuse.normalize(images, pixfuse.IMAGENET, dtype=torch.bfloat16, out=out)
    )


def test_a_held_gil_is_noticed() -> None:
    held = ctypes.PyDLL(None).usleep  # PyDLL keeps the GIL, CDLL releases it
    released = ctypes.CDLL(None).usleep
    # Long: on a busy machine this thread may wait for its turn before it reads the clock again.
    assert not other_threads_ran_during(lambda: held(400_000), tries=4)
    assert other_threads_ran_during(lambda: released(60_000))


# --- workers ---


class Bytes(Dataset[torch.Tensor]):
    """Images of which everybody knows the content; large enough to be recycled as a batch."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (256, 256, 3), dtype=torch.uint8, generator=generator)


def normalize_batch(samples: list[torch.Tensor]) -> torch.Tensor:
    return pixfuse.normalize(torch.stack(samples), pixfuse.IMAGENET, input_layout="NHWC")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers(method: str) -> None:
    pixfuse.normalize(random_bytes(4, 3, 256, 256))  # the parent has threads and a warm cache
    loader = DataLoader(
        Bytes(),
        batch_size=4,
        collate_fn=normalize_batch,
        num_workers=2,
        multiprocessing_context=method,
    )
    batches = list(loader)
    assert len(batches) == 6
    for number, batch in enumerate(batches):
        samples = [Bytes()[index] for index in range(4 * number, 4 * number + 4)]
        expected = pixfuse.reference.normalize(
            torch.stack(samples), pixfuse.IMAGENET, input_layout="NHWC"
        )
        assert_same_bits(batch, expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_threads_normalize() -> None:
    images = random_bytes(4, 3, 224, 224)
    expected = pixfuse.reference.normalize(images, pixfuse.IMAGENET)
    stop = threading.Event()

    def work() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            assert torch.equal(pixfuse.normalize(images, pixfuse.IMAGENET), expected)

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work) for _ in range(3)]
        try:
            for _ in range(25):
                child = os.fork()
                if child == 0:
                    code = 2
                    try:
                        # As DataLoader does in its workers: OpenMP's threads do not survive forks.
                        torch.set_num_threads(1)
                        results = [pixfuse.normalize(images, pixfuse.IMAGENET) for _ in range(3)]
                        code = 0 if all(torch.equal(r, expected) for r in results) else 3
                    finally:
                        os._exit(code)
                assert wait_for(child) == 0
        finally:
            stop.set()
        for finished in working:
            finished.result()


# --- crop_mirror_normalize ---


def samples_of(number: int) -> list[np.ndarray]:
    generator = np.random.default_rng(number)
    return [
        generator.integers(0, 256, (70 + 3 * n, 90 - 2 * n, 3), np.uint8) for n in range(4 + number)
    ]


def test_many_threads_crop_at_once() -> None:
    jobs = []
    for number in range(6):
        images = samples_of(number)
        options: dict[str, Any] = {
            "mirror": [n % 2 == 0 for n in range(len(images))],
            "dtype": DTYPES[number % 3],
        }
        expected: Any = pixfuse.reference.crop_mirror_normalize(images, 48, pixfuse.CLIP, **options)
        jobs.append((images, options, expected))
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        for turn in range(30):
            images, options, expected = jobs[(first + turn) % len(jobs)]
            assert_same_bits(
                pixfuse.crop_mirror_normalize(images, 48, pixfuse.CLIP, **options), expected
            )

    with ThreadPoolExecutor(8) as pool:
        for finished in [pool.submit(work, number) for number in range(8)]:
            finished.result()


class Samples(Dataset[np.ndarray]):
    """Images of different sizes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> np.ndarray:
        return samples_of(index)[0]


def crop_batch(samples: list[np.ndarray]) -> torch.Tensor:
    return pixfuse.crop_mirror_normalize(samples, 64, pixfuse.IMAGENET)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_crop(method: str) -> None:
    crop_batch(samples_of(3))  # the parent has threads
    loader = DataLoader(
        Samples(),
        batch_size=4,
        collate_fn=crop_batch,
        num_workers=2,
        multiprocessing_context=method,
    )
    for number, batch in enumerate(loader):
        images = [Samples()[index] for index in range(4 * number, 4 * number + 4)]
        expected: Any = pixfuse.reference.crop_mirror_normalize(images, 64, pixfuse.IMAGENET)
        assert_same_bits(batch, expected)
