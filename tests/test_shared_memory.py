"""Shared memory that workers use again: never while anybody still looks at it."""

import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pixfuse
from pixfuse import _shared_memory
from tests.processes import wait_for

BYTES = pixfuse.Collate(dtype=torch.uint8)


class Plain(Dataset[Any]):
    """Images that are full of their own number."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return np.full((64, 64, 3), index, np.uint8), index


def with_blocks(samples: Any) -> Any:
    """A batch, the address of its memory, and how many blocks there are."""
    images, labels = BYTES(samples)
    return images, labels, torch.tensor([images.data_ptr(), len(_shared_memory._blocks)])


def assert_untouched(images: torch.Tensor, labels: torch.Tensor) -> None:
    assert torch.equal(images, labels.to(torch.uint8).view(-1, 1, 1, 1).expand(images.shape))


def loader_of(collate: Callable[[Any], Any], count: int = 40, **options: Any) -> DataLoader[Any]:
    options = {"num_workers": 1, **options}
    return DataLoader(Plain(count), batch_size=4, collate_fn=collate, **options)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_few_blocks_are_used_again_and_again(method: str) -> None:
    addresses, blocks = set(), 0
    for images, labels, state in loader_of(with_blocks, 200, multiprocessing_context=method):
        assert type(images) is torch.Tensor
        assert_untouched(images, labels)
        images.fill_(255)  # it is the consumer's own
        addresses.add(int(state[0]))
        blocks = int(state[1])
        del images
    assert len(addresses) == blocks <= 5  # 2 prefetched, 1 sent, 1 consumed, 1 being made


KEEPERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda images: images,
    "view": lambda images: images[1:, :, 3:],
    "numpy": lambda images: images.numpy(),
    "numpy view": lambda images: images.numpy()[1:, :, 3:],
    "storage": lambda images: images.untyped_storage(),
    "dlpack": lambda images: np.from_dlpack(images)[1:],
    "shared": lambda images: images.share_memory_(),
    "other dtype": lambda images: images.view(torch.int32),
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_is_still_looked_at_is_left_alone(keeper: str) -> None:
    """More batches than blocks, some kept to the end, some dropped on the way."""
    kept = []
    for number, (images, labels) in enumerate(loader_of(BYTES, 160)):
        if number % 2 == 0:
            kept.append((KEEPERS[keeper](images), images.clone(), labels))
        del images
    assert len(kept) == _shared_memory._MOST_BLOCKS + 4
    for view, images, labels in kept:
        assert_untouched(images, labels)
        if isinstance(view, torch.UntypedStorage):  # its end is not part of the batch
            values = torch.empty(0, dtype=torch.uint8).set_(view)[: images.numel()]
        else:
            values = torch.as_tensor(view).contiguous().view(torch.uint8).view(-1)
        assert set(values.tolist()) <= set(labels.tolist())


def test_a_block_that_is_used_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shared_memory._Block, "is_free", lambda block: not block.in_use_here)
    batches = list(loader_of(BYTES))
    with pytest.raises(AssertionError):
        assert_untouched(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))


def in_the_middle(samples: Any) -> Any:
    images, labels = BYTES(samples)
    return (
        images + 0,
        images[:2],
        copy.deepcopy(images),
        copy.copy(images),
        pickle.loads(pickle.dumps(images)),
        images.flip(0).flip(0),
        labels,
    )


def test_what_a_worker_makes_of_a_batch() -> None:
    """A collate_fn of the user's own, around ours."""
    for *several, labels in loader_of(in_the_middle, 100):
        for images in several:
            assert_untouched(images, labels[: len(images)])


def twice(samples: Any) -> Any:
    images, labels = BYTES(samples)
    again = images.as_subclass(_shared_memory.SharedTensor)
    again.block = images.block
    return images, again, labels


def test_a_batch_that_is_sent_twice() -> None:
    kept = []
    for images, again, labels in loader_of(twice, 120):
        kept.append((again, labels))
        del images, again
    for again, labels in kept:
        assert_untouched(again, labels)


KEPT_IN_WORKER: list[Any] = []


def keeping(samples: Any) -> Any:
    images, labels = BYTES(samples)
    KEPT_IN_WORKER.append((images[:, :1], labels))
    for view, its_labels in KEPT_IN_WORKER:
        assert_untouched(view, its_labels)
    return images, labels


def test_what_the_worker_still_looks_at_is_left_alone() -> None:
    for images, labels in loader_of(keeping, 80):
        assert_untouched(images, labels)
        del images


def test_threads_of_a_worker_get_blocks_of_their_own() -> None:
    shape = (1, 3, 4, 4)
    spoiled: list[int] = []

    def write(value: int) -> None:
        for _ in range(1000):
            pair = [
                _shared_memory.shared_output(shape, torch.uint8, torch.contiguous_format)
                for _ in range(2)
            ]
            for tensor in pair:
                tensor.fill_(value)
            spoiled.extend(value for tensor in pair if not bool((tensor == value).all()))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
        _shared_memory._blocks.clear()
    assert spoiled == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_drops_a_batch() -> None:
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with _shared_memory._fence:
            held.set()
            forked.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        for _ in range(2):  # the second asks whether the first block is free
            _shared_memory.shared_output((1, 3, 4, 4), torch.uint8, torch.contiguous_format)
        os._exit(0)
    forked.set()
    thread.join()
    assert wait_for(child, seconds=20) == 0


def test_a_fork_of_the_consumer_gives_nothing_back() -> None:
    """It has the same tensors, and may drop them while its parent looks at them."""
    iterator = iter(loader_of(BYTES, 160))
    kept = [next(iterator) for _ in range(3)]
    child = os.fork()
    if child == 0:
        kept.clear()
        gc.collect()
        os._exit(0)
    assert wait_for(child) == 0
    for images, labels in iterator:
        assert_untouched(images, labels)
        del images
    for images, labels in kept:
        assert_untouched(images, labels)


class TwoSizes(Plain):
    def __getitem__(self, index: int) -> Any:
        large, _ = super().__getitem__(index)
        return large, large[:20, :20], index


def test_images_of_several_sizes() -> None:
    loader = DataLoader(TwoSizes(120), batch_size=4, collate_fn=with_two, num_workers=1)
    for large, small, labels, blocks in loader:
        assert_untouched(large, labels)
        assert_untouched(small, labels)
        assert int(blocks) <= 10
        del large, small


def with_two(samples: Any) -> Any:
    return *BYTES(samples), torch.tensor(len(_shared_memory._blocks))


def test_persistent_workers_and_early_breaks() -> None:
    loader = loader_of(with_blocks, 80, persistent_workers=True)
    for _ in range(6):
        for number, (images, labels, state) in enumerate(loader):
            assert_untouched(images, labels)
            assert int(state[1]) <= 6
            del images
            if number == 5:
                break


# --- what a receiver keeps mapped ---


def storages(count: int) -> list[torch.UntypedStorage]:
    return [torch.UntypedStorage(64) for _ in range(count)]


def test_mappings_are_bounded() -> None:
    mappings = _shared_memory.Mappings()
    first, *others = storages(_shared_memory.Mappings.MOST)
    alive = weakref.WeakSet([first, others[0]])
    for storage in (first, *others, first):
        mappings.add(storage)
    assert len(mappings) == len(others) + 1
    mappings.add(storages(1)[0])
    del storage, first, others
    assert len(mappings) == _shared_memory.Mappings.MOST
    assert len(alive) == 1  # the one that had not been used for longest
    mappings.clear()
    assert len(mappings) == len(alive) == 0


def test_mappings_of_this_thread_and_this_block_only() -> None:
    receiving = _shared_memory._receiving
    outer, inner = _shared_memory.Mappings(), _shared_memory.Mappings()
    seen: list[Any] = []

    def failing() -> None:
        with inner.kept():
            seen.append(receiving.mappings)
            raise KeyError

    with outer.kept():
        with pytest.raises(KeyError):
            failing()
        assert receiving.mappings is outer
        thread = threading.Thread(target=lambda: seen.append(getattr(receiving, "mappings", None)))
        thread.start()
        thread.join()
    assert seen == [inner, None]
    assert receiving.mappings is None


def test_copies_of_mappings_are_empty() -> None:
    mappings = _shared_memory.Mappings()
    mappings.add(storages(1)[0])
    for again in (copy.deepcopy(mappings), pickle.loads(pickle.dumps(mappings))):
        assert len(again) == 0
        again.add(storages(1)[0])
    assert len(mappings) == 1
