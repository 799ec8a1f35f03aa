"""The cache behind large CPU outputs: what it recycles, what it keeps, what it never touches."""

import copy
import gc
import itertools
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import pixfuse
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.processes import python, resident_bytes, wait_for

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    gc.collect()
    pixfuse.empty_cache()


def state() -> dict[str, int]:
    return dict(pixfuse.info()["output_buffer"])


def images_for(output_bytes: int) -> torch.Tensor:
    """Images whose float32 output has at least this size."""
    return random_bytes(1, 3, -(-output_bytes // (4 * 3 * 256)), 256)


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter printed; it must end well and in silence."""
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_a_freed_output_is_used_again() -> None:
    images = images_for(8 * MIB)
    before = state()
    first = pixfuse.normalize(images)
    address = first.data_ptr()
    assert state()["allocated"] == before["allocated"] + 1
    del first
    assert state()["idle_bytes"] >= 8 * MIB
    second = pixfuse.normalize(images)
    assert second.data_ptr() == address
    assert state()["reused"] == before["reused"] + 1
    assert state()["allocated"] == before["allocated"] + 1
    assert state()["idle_bytes"] == 0


def test_what_was_there_before_does_not_show() -> None:
    images = images_for(8 * MIB)
    first = pixfuse.normalize(images)
    address = first.data_ptr()
    first.fill_(float("nan"))
    del first
    second = pixfuse.normalize(images, pixfuse.SIGNED)
    assert second.data_ptr() == address
    assert_same_bits(second, pixfuse.reference.normalize(images, pixfuse.SIGNED))


def test_every_option_uses_it() -> None:
    images = images_for(16 * MIB)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            before = state()
            result = pixfuse.normalize(images, dtype=dtype, memory_format=memory_format)
            after = state()
            assert after["in_use_bytes"] - before["in_use_bytes"] >= result.nbytes
            del result
            assert state()["in_use_bytes"] == before["in_use_bytes"]


def test_small_outputs_are_left_to_torch() -> None:
    before = state()
    for _ in range(10):
        pixfuse.normalize(random_bytes(1, 3, 64, 64))
    assert state() == before


def test_out_is_left_alone() -> None:
    images = images_for(8 * MIB)
    out = torch.empty(images.shape)
    before = state()
    pixfuse.normalize(images, out=out)
    assert state() == before


def test_the_storage_has_the_size_of_the_tensor() -> None:
    """Else saving a result would save more than the result."""
    images = random_bytes(1, 3, 601, 601)
    result = pixfuse.normalize(images)
    assert state()["in_use_bytes"] > 0
    assert result.untyped_storage().nbytes() == result.nbytes
    assert result.data_ptr() % 64 == 0


KEEPERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda result: result[0, 1:, 5:].permute(2, 0, 1),
    "numpy": lambda result: result.numpy()[0, 1:, 5:].transpose(2, 0, 1),
    "dlpack": lambda result: np.from_dlpack(result)[0, 1:, 5:].transpose(2, 0, 1),
    "storage": lambda result: result.untyped_storage(),
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_still_looks_at_it_keeps_it(keeper: str) -> None:
    images = images_for(8 * MIB)
    expected = pixfuse.reference.normalize(images)
    kept = KEEPERS[keeper](pixfuse.normalize(images))
    gc.collect()
    for _ in range(3):  # were the memory free, these would take it
        pixfuse.normalize(images).fill_(7.0)
    if keeper == "storage":
        assert torch.equal(torch.empty(0).set_(kept).view(images.shape), expected)
    else:
        assert torch.equal(torch.as_tensor(kept), expected[0, 1:, 5:].permute(2, 0, 1))


def test_results_travel_as_other_tensors_do() -> None:
    images = images_for(8 * MIB)
    expected = pixfuse.reference.normalize(images)
    for copied in (
        pickle.loads(pickle.dumps(pixfuse.normalize(images))),
        copy.deepcopy(pixfuse.normalize(images)),
        pixfuse.normalize(images).share_memory_(),
    ):
        pixfuse.normalize(images).fill_(7.0)
        assert_same_bits(copied, expected)


def test_outputs_alive_at_once_are_different_memory() -> None:
    images = images_for(4 * MIB)
    for _ in range(3):
        results = [pixfuse.normalize(images, pixfuse.SIGNED) for _ in range(5)]
        spans = sorted((r.data_ptr(), r.data_ptr() + r.nbytes) for r in results)
        for (_, end), (begin, _) in itertools.pairwise(spans):
            assert end <= begin
        del results


def test_a_much_smaller_output_does_not_take_a_large_block() -> None:
    large = pixfuse.normalize(images_for(64 * MIB))
    address = large.data_ptr()
    del large
    small = pixfuse.normalize(images_for(4 * MIB))
    assert small.data_ptr() != address


def test_empty_cache_gives_the_memory_back() -> None:
    images = images_for(128 * MIB)
    result = pixfuse.normalize(images)
    del result
    full = resident_bytes()
    assert state()["idle_bytes"] >= 128 * MIB
    pixfuse.empty_cache()
    assert state()["idle_bytes"] == 0
    assert resident_bytes() < full - 120 * MIB


def test_empty_cache_spares_what_is_in_use() -> None:
    images = images_for(8 * MIB)
    result = pixfuse.normalize(images)
    in_use = state()["in_use_bytes"]
    pixfuse.empty_cache()
    assert state()["in_use_bytes"] == in_use
    assert_same_bits(result, pixfuse.reference.normalize(images))


# --- the limit ---

FREE_MANY = """
import torch, pixfuse
images = torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8)  # outputs of 12 MiB
results = [pixfuse.normalize(images) for _ in range(8)]
seen = []
while results:
    results.pop()
    seen.append(pixfuse.info()["output_buffer"]["idle_bytes"])
state = pixfuse.info()["output_buffer"]
print(state["limit_bytes"], state["in_use_bytes"], max(seen), state["allocated"])
"""


def test_the_limit_is_kept() -> None:
    limit, in_use, most_idle, allocated = map(
        int, run(FREE_MANY, PIXFUSE_CACHE_BYTES=str(40 * MIB)).split()
    )
    assert limit == 40 * MIB
    assert in_use == 0
    assert 12 * MIB <= most_idle <= 40 * MIB
    assert allocated == 8


def test_nothing_larger_than_the_limit_is_kept() -> None:
    *_, most_idle, allocated = map(int, run(FREE_MANY, PIXFUSE_CACHE_BYTES=str(11 * MIB)).split())
    assert most_idle == 0
    assert allocated == 8


def test_zero_turns_it_off() -> None:
    assert run(FREE_MANY, PIXFUSE_CACHE_BYTES="0").split() == ["0", "0", "0", "0"]


def test_the_default_limit() -> None:
    code = "import pixfuse; print(pixfuse.info()['output_buffer']['limit_bytes'])"
    assert int(run(code, PIXFUSE_CACHE_BYTES="")) == 1 << 30
    assert pixfuse.empty_cache.__doc__ is not None
    assert "default 1 GiB" in pixfuse.empty_cache.__doc__


def test_tensors_that_outlive_the_interpreter() -> None:
    """Freed while Python shuts down, in whatever order: no crash, no word."""
    run(
        "import sys, torch, pixfuse; images = torch.zeros(3, 999, 999).byte(); "
        "kept = pixfuse.normalize(images); sys.modules['kept'] = pixfuse.normalize(images)"
    )


# --- threads and forks ---


def test_threads_share_it() -> None:
    """Blocks are taken, filled, handed to other threads and freed there."""
    in_use = state()["in_use_bytes"]
    sizes = [2 * MIB, 3 * MIB, 4 * MIB, 9 * MIB]
    images = [images_for(size) for size in sizes]
    shelf: list[tuple[float, torch.Tensor]] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        torch.set_num_threads(1)
        for turn in range(60):
            value = float(number * 1000 + turn)
            result = pixfuse.normalize(images[(number + turn) % len(images)])
            result.fill_(value)  # if another tensor has this memory, its check below fails
            with lock:
                shelf.append((value, result))
                written, other = shelf.pop(len(shelf) // 2)
            assert bool((other == written).all())
            if turn % 20 == 0:
                pixfuse.empty_cache()

    with ThreadPoolExecutor(6) as pool:
        for finished in [pool.submit(work, number) for number in range(6)]:
            finished.result()
    shelf.clear()
    after = state()
    assert after["in_use_bytes"] == in_use
    assert 0 <= after["idle_bytes"] <= after["limit_bytes"]
    pixfuse.empty_cache()
    assert state()["idle_bytes"] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_a_cache_of_its_own() -> None:
    images = images_for(8 * MIB)
    expected = pixfuse.reference.normalize(images, pixfuse.SIGNED)
    inherited = pixfuse.normalize(images, pixfuse.SIGNED)
    idle = pixfuse.normalize(images)
    del idle
    assert state()["idle_bytes"] > 0

    child = os.fork()
    if child == 0:
        code = 2
        try:
            torch.set_num_threads(1)
            checks = [state()["idle_bytes"] == 0, torch.equal(inherited, expected)]
            inherited.fill_(7.0)
            del inherited
            for _ in range(5):
                result = pixfuse.normalize(images, pixfuse.SIGNED)
                checks.append(torch.equal(result, expected))
                result.fill_(8.0)
                del result
            pixfuse.empty_cache()
            checks.append(state()["idle_bytes"] == 0)
            code = 0 if all(checks) else 10 + checks.index(False)
        finally:
            os._exit(code)
    for _ in range(20):  # at the same time
        assert torch.equal(pixfuse.normalize(images, pixfuse.SIGNED), expected)
    assert wait_for(child) == 0
    assert torch.equal(inherited, expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_change() -> None:
    """The lock is held for long while memory goes back to the system: no child inherits it."""
    images = images_for(8 * MIB)
    expected = pixfuse.reference.normalize(images)
    stop = threading.Event()

    def work() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            pixfuse.normalize(images)
            pixfuse.empty_cache()

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work) for _ in range(3)]
        try:
            for _ in range(50):
                child = os.fork()
                if child == 0:
                    code = 2
                    try:
                        torch.set_num_threads(1)
                        code = 0 if torch.equal(pixfuse.normalize(images), expected) else 3
                    finally:
                        os._exit(code)
                assert wait_for(child) == 0
        finally:
            stop.set()
        for finished in working:
            finished.result()
