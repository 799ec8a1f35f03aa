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
from tests.processes import PATIENCE_SECONDS, shared_mappings, wait_for

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


VIEWS: dict[str, Callable[[torch.Tensor], np.ndarray]] = {
    "numpy": lambda images: images.numpy(),
    "numpy view": lambda images: images.numpy()[1:, :, 3:],
    "dlpack": np.from_dlpack,
    "numpy of a slice": lambda images: images[1:].numpy(),
}
MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "share_memory_": lambda images: images.share_memory_(),
    "a queue": lambda images: images.untyped_storage()._share_fd_cpu_(),  # in its put()
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("view", VIEWS)
def test_an_array_outlives_the_move_of_its_tensor(view: str, move: str) -> None:
    """Sharing a batch puts other memory under it; arrays made before look at the old one."""
    kept = []
    for number, (images, _) in enumerate(loader_of(BYTES, 80)):
        if number % 4 == 0:
            array = VIEWS[view](images)
            address = images.data_ptr()
            MOVES[move](images)
            assert images.data_ptr() != address
            kept.append((array, array.copy()))
        del images
    for array, before in kept:
        assert (array == before).all()


def test_a_moved_batch_is_given_back() -> None:
    blocks = 0
    for images, _, state in loader_of(with_blocks, 200):
        array = images.numpy()
        images.share_memory_()
        blocks = int(state[1])
        del images, array
    assert blocks <= 5


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


def with_gradients(samples: Any) -> Any:
    """In a worker as in the main process: an error while a batch is sent would never arrive."""
    images, labels = pixfuse.Collate()(samples)
    images.requires_grad_()
    return images, pickle.loads(pickle.dumps(images)), copy.deepcopy(images), labels


def test_a_batch_that_requires_gradients_is_sent_as_a_leaf() -> None:
    kept = list(loader_of(with_gradients, 80, timeout=PATIENCE_SECONDS))
    for *several, labels in kept:
        for images in several:
            assert images.is_leaf
            assert images.requires_grad
            assert_untouched((images.detach() * 255).round().to(torch.uint8), labels)


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
    assert wait_for(child) == 0


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


# --- what the receiver keeps mapped ---


class Unlabelled(Plain):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


def count_new_mappings(monkeypatch: pytest.MonkeyPatch, epochs: int = 1) -> int:
    """Of 50 batches per epoch, each of one tensor and dropped before the next one."""
    new: list[int] = []
    storages: Any = torch.UntypedStorage
    theirs = storages._new_shared_fd_cpu

    def counting(fd: int, size: int) -> Any:
        new.append(size)
        return theirs(fd, size)

    monkeypatch.setattr(storages, "_new_shared_fd_cpu", counting)
    loader = DataLoader(
        Unlabelled(200),
        batch_size=4,
        collate_fn=BYTES,
        num_workers=1,
        persistent_workers=epochs > 1,
    )
    for _ in range(epochs):
        for number, images in enumerate(loader):
            assert bool((images == torch.arange(4 * number, 4 * number + 4).view(4, 1, 1, 1)).all())
            del images
    return len(new)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_block_is_mapped_once(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    gc.collect()
    before = shared_mappings()
    assert count_new_mappings(monkeypatch, epochs) <= 5
    gc.collect()
    assert shared_mappings() == before  # they went with the worker
    assert len(_shared_memory._mapped) == 0


def test_mapping_every_batch_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shared_memory, "_keep_mapped", lambda *arguments: None)
    assert count_new_mappings(monkeypatch) > 40


def test_leaving_early_unmaps() -> None:
    iterator = iter(loader_of(BYTES))
    for _ in range(4):
        next(iterator)
    assert shared_mappings() > 0
    del iterator
    gc.collect()
    assert shared_mappings() == 0


class Child:
    """What is needed of a process object."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


def test_few_blocks_of_a_living_worker_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shared_memory, "_mapped", weakref.WeakKeyDictionary())
    worker = Child(7)
    children = {worker, Child(8)}
    monkeypatch.setattr("multiprocessing.process._children", children)
    most = _shared_memory._MOST_BLOCKS
    storages = [torch.UntypedStorage(64) for _ in range(most + 1)]
    for storage in (*storages[:most], storages[0], storages[most]):
        _shared_memory._keep_mapped(storage, 7)
    _shared_memory._keep_mapped(storages[1], 9)  # of nobody's
    (kept,) = _shared_memory._mapped.values()
    # The second one was not used for longest.
    assert {s.data_ptr() for s in kept.values()} == {
        s.data_ptr() for s in storages if s is not storages[1]
    }
    children.clear()
    del worker
    gc.collect()
    assert len(_shared_memory._mapped) == 0
