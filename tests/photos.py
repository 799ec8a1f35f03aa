"""Datasets for workers: in a module of its own, which a fresh process imports quickly."""

import io
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

import pixfuse
from pixfuse import _shared_memory
from tests.bits import assert_same_bits
from tests.processes import open_files, resident_bytes, shared_mappings

CENTER = pixfuse.Collate(pixfuse.IMAGENET, 100, "center")
SMALL = pixfuse.Collate(pixfuse.IMAGENET, 64, "random", mirror=0.5)


def numbered(height: int, width: int) -> np.ndarray:
    """An image whose pixels say where they are."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 200)], 2)


class Numbered(Dataset[Any]):
    """Every sample is the same image, so that only chance tells them apart."""

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return Image.fromarray(numbered(64, 64)), index


class Photos(Dataset[Any]):
    """Images that are known by their index; a batch of 8 is large enough to be recycled."""

    def __init__(self, count: int = 24, bad: int | None = None) -> None:
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        size = (4, 4) if index == self.bad else (120, 130)
        array = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        return {"image": Image.fromarray(array), "index": index}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (Photos()[index] for index in range(first, 24, step))


class InBatches(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return [Photos()[n] for n in range(6 * index, 6 * index + 6)]


class Deadly(Photos):
    def __getitem__(self, index: int) -> Any:
        if index == 9 and torch.utils.data.get_worker_info() is not None:
            # What was sent before is to arrive first: torch says EOFError where it asks for the
            # file of a batch and finds the worker dying, and names the worker where it is dead.
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Truncated(Photos):
    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        if index == 11:
            file = io.BytesIO()
            sample["image"].save(file, "png")
            sample["image"] = Image.open(io.BytesIO(file.getvalue()[:1000]))
        return sample


class Small(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count
        generator = np.random.default_rng(0)
        arrays = generator.integers(0, 256, (8, 80, 80, 3), dtype=np.uint8)
        self.images = [Image.fromarray(array) for array in arrays]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.images[index % 8], index


def with_state(samples: Any) -> Any:
    """A batch, and what the process that made it holds."""
    state = [resident_bytes("RssAnon"), open_files(), shared_mappings()]
    return *SMALL(samples), torch.tensor(state)


def is_in_a_block(tensor: torch.Tensor) -> bool:
    """Whether it lies in the shared memory that this worker uses again."""
    blocks = [block.storage for block in _shared_memory._blocks]
    return any(block.is_shared() and block.data_ptr() == tensor.data_ptr() for block in blocks)


def with_place(samples: Any) -> Any:
    """A batch, and whether it was in shared memory before it was sent."""
    batch = CENTER(samples)
    return batch, is_in_a_block(batch["image"])


def reference(images: Any, *args: Any, **options: Any) -> torch.Tensor:
    """What a batch should be, without its mask."""
    batch = pixfuse.reference.crop_mirror_normalize(images, *args, **options)
    assert isinstance(batch, torch.Tensor)
    return batch


def assert_photos(batches: list[Any], shuffled: bool = False) -> None:
    seen: list[int] = []
    for batch in batches:
        indices = batch["index"].tolist()
        seen += indices
        images = [Photos()[index]["image"] for index in indices]
        expected = reference(images, 100, pixfuse.IMAGENET)
        assert_same_bits(batch["image"], expected)
    assert (sorted(seen) if shuffled else seen) == list(range(24))
