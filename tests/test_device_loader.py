"""DeviceLoader: the same bits, in order, ahead of the consumer, and nothing left behind."""

import collections
import dataclasses
import functools
import gc
import pickle
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pixfuse
from pixfuse import loader as loader_module
from pixfuse._convert import convert
from tests import gpu_model
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.normalizations import DTYPES
from tests.processes import PATIENCE_SECONDS, python

THREAD = "pixfuse.DeviceLoader"


def threads_running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    if threads_running():
        gc.collect()
    assert eventually(lambda: threads_running() == [])


@pytest.fixture(params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return torch.device(request.param)


def batches_of(count: int, n: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(random_bytes(n, 3, 8, 9), torch.arange(i, i + n)) for i in range(count)]


def assert_same(actual: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert len(actual) == len(batches)
    for (x, y), (images, labels) in zip(actual, batches, strict=True):
        assert_same_bits(x, pixfuse.reference.normalize(images, pixfuse.IMAGENET))
        assert torch.equal(y.cpu(), labels)


# --- what comes out ---


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_same_batches_in_order(place: torch.device, prefetch: int, count: int) -> None:
    batches = batches_of(count)
    loader = pixfuse.DeviceLoader(batches, place, pixfuse.IMAGENET, prefetch=prefetch)
    for _ in range(2):  # every iteration starts afresh
        out = list(loader)
        assert all(x.device.type == place.type for pair in out for x in pair)
        assert_same(out, batches)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last, torch.preserve_format]
)
def test_options(
    place: torch.device, layout: Any, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    shape = (2, 3, 7, 9) if layout == "NCHW" else (2, 7, 9, 3)
    batches = [
        random_bytes(*shape),
        random_bytes(*shape).transpose(1, 2),
        random_bytes(*shape)[:, ::2, 1:],
        random_bytes(*shape).contiguous(memory_format=torch.channels_last),
    ]
    if layout == "NCHW":
        batches[1:3] = [random_bytes(2, 3, 9, 7).transpose(2, 3), random_bytes(4, 3, 8, 8)[::2]]
    options = {"input_layout": layout, "dtype": dtype, "memory_format": memory_format}
    loader = pixfuse.DeviceLoader(batches, place, pixfuse.IMAGENET, **options)
    for images, x in zip(batches, loader, strict=True):
        assert_same_bits(x, pixfuse.reference.normalize(images, pixfuse.IMAGENET, **options))


class Pair(NamedTuple):
    image: Any
    label: Any


@dataclasses.dataclass(frozen=True)
class Sample:
    image: Any
    name: str
    size: int = dataclasses.field(init=False, default=7)


class Tagged(dict[str, Any]):
    tag = "none"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_structures(place: torch.device, prefetch: int) -> None:
    images, mask = random_bytes(2, 3, 4, 5), random_bytes(2, 4, 5)
    floats, flags = torch.randn(2, 3, 4, 5), torch.tensor([True, False])
    tagged = Tagged(image=images)
    tagged.tag = "kept"
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    batch = {
        "tensor": images,
        "numpy": images.numpy(),
        "pair": Pair(images, torch.tensor([1, 2])),
        "list": [mask, floats, (flags,), []],
        "dataclass": Sample(images, "name"),
        "tagged": tagged,
        "ordered": collections.OrderedDict(b=images, a=flags),
        "default": collections.defaultdict(torch.Tensor, x=images),
        "user": collections.UserDict(x=images),
        "counter": collections.Counter(cat=3, dog=1),
        "proxy": MappingProxyType({"x": images}),
        "deque": collections.deque([images], maxlen=3),
        "packed": packed,
        "other": ("text", b"bytes", 3, 4.5, None, {"a"}, np.arange(3)),
    }
    (out,) = pixfuse.DeviceLoader([batch], place, pixfuse.IMAGENET, prefetch=prefetch)
    expected = pixfuse.reference.normalize(images, pixfuse.IMAGENET)
    for x in (
        out["tensor"],
        out["numpy"],
        out["pair"].image,
        out["dataclass"].image,
        out["tagged"]["image"],
        out["ordered"]["b"],
        out["default"]["x"],
        out["user"]["x"],
        out["proxy"]["x"],
        out["deque"][0],
    ):
        assert x.device.type == place.type
        assert_same_bits(x, expected)
    assert {key: type(value) for key, value in out.items()} == {
        key: torch.Tensor if key == "numpy" else type(value) for key, value in batch.items()
    }
    assert list(out["ordered"]) == ["b", "a"]
    assert out["default"].default_factory is torch.Tensor
    assert out["tagged"].tag == "kept"
    assert out["counter"] == {"cat": 3, "dog": 1}
    assert out["deque"].maxlen == 3
    assert (out["dataclass"].name, out["dataclass"].size) == ("name", 7)
    assert torch.equal(out["list"][0].cpu(), mask)
    assert torch.equal(out["list"][1].cpu(), floats)
    assert torch.equal(out["list"][2][0].cpu(), flags)
    assert type(out["list"][2]) is tuple
    assert out["list"][0].dtype == torch.uint8  # 3 dimensions: a mask
    assert out["packed"].data.device.type == place.type
    assert out["packed"].batch_sizes.is_cpu
    assert out["other"][:6] == ("text", b"bytes", 3, 4.5, None, {"a"})
    assert type(out["other"][6]) is np.ndarray
    # What was given is as it was.
    assert batch["pair"].image is images  # type: ignore[attr-defined]
    assert tagged["image"] is images
    assert batch["dataclass"].image is images  # type: ignore[attr-defined]


def test_large_results_are_recycled() -> None:
    """And none is used again while somebody still looks at it."""
    batches = [random_bytes(2, 3, 300, 300) for _ in range(12)]
    loader = pixfuse.DeviceLoader(batches, "cpu", pixfuse.IMAGENET)
    pixfuse.empty_cache()
    before = pixfuse.info()["output_buffer"]
    kept = []
    for number, x in enumerate(loader):
        if number % 4 == 0:
            kept.append(x)
    after = pixfuse.info()["output_buffer"]
    assert after["allocated"] - before["allocated"] <= 3 + 2 + len(kept)
    assert after["reused"] > before["reused"]
    for x, images in zip(kept, batches[::4], strict=True):
        assert_same_bits(x, pixfuse.reference.normalize(images, pixfuse.IMAGENET))


class Images(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 16, 17), dtype=torch.uint8, generator=generator), index


def images_of(indices: list[int]) -> torch.Tensor:
    return torch.stack([Images()[index][0] for index in indices])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_over_a_data_loader(place: torch.device, workers: int, persistent: bool) -> None:
    if persistent and workers == 0:
        pytest.skip("nothing would persist")
    inner = DataLoader(
        Images(),
        batch_size=5,
        shuffle=True,
        num_workers=workers,
        persistent_workers=persistent,
        pin_memory=place.type == "cuda",
    )
    loader = pixfuse.DeviceLoader(inner, place, pixfuse.IMAGENET)
    for _ in range(3):
        seen = []
        for x, labels in loader:
            indices = labels.tolist()
            seen += indices
            expected = pixfuse.reference.normalize(images_of(indices), pixfuse.IMAGENET)
            assert_same_bits(x, expected)
        assert sorted(seen) == list(range(12))


def test_the_random_order_is_that_of_the_loader() -> None:
    inner = DataLoader(Images(), batch_size=5, shuffle=True)
    torch.manual_seed(3)
    expected = [labels.tolist() for _, labels in inner]
    torch.manual_seed(3)
    assert [labels.tolist() for _, labels in pixfuse.DeviceLoader(inner, "cpu")] == expected


def test_it_does_not_care_for_torchs_default_device() -> None:
    batch = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    with torch.device("meta"):
        (result,) = pixfuse.DeviceLoader([batch], "cpu")
    assert torch.equal(result, torch.zeros(1, 3, 4, 5))


def test_the_loader_is_called_in_the_consumers_thread() -> None:
    seen = set()

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(5):
            seen.add(threading.get_ident())
            yield random_bytes(1, 3, 4, 4)

    assert len(list(pixfuse.DeviceLoader(batches(), "cpu"))) == 5
    assert seen == {threading.get_ident()}


# --- ahead, and how far ---


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_it_is_that_far_ahead(prefetch: int) -> None:
    given = 0

    def batches() -> Iterator[torch.Tensor]:
        nonlocal given
        for given in range(1, 11):  # noqa: B007
            yield random_bytes(1, 3, 4, 4)

    for taken, _ in enumerate(pixfuse.DeviceLoader(batches(), "cpu", prefetch=prefetch), 1):
        assert given == min(taken + prefetch, 10)


def test_it_normalizes_while_the_consumer_works(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[int] = []

    def slow(images: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        result = pixfuse.normalize(images, *args, **options)
        if images.shape[0]:
            finished.append(threading.get_ident())
        return result

    monkeypatch.setattr(loader_module, "convert", slow)
    batches = [random_bytes(1, 3, 4, 4) for _ in range(4)]
    iterator = iter(pixfuse.DeviceLoader(batches, "cpu", prefetch=2))
    next(iterator)
    assert eventually(lambda: len(finished) == 3)
    assert threading.get_ident() not in finished
    assert len(set(finished)) == 1


# --- ends ---


class BrokenError(Exception):
    pass


def failing_after(count: int) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield random_bytes(1, 3, 4, 4)
    raise BrokenError("in the loader")


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_error_of_the_loader_comes_in_its_turn(
    place: torch.device, prefetch: int, count: int
) -> None:
    iterator = iter(pixfuse.DeviceLoader(failing_after(count), place, prefetch=prefetch))
    for _ in range(count):
        next(iterator)
    with pytest.raises(BrokenError, match="in the loader") as caught:
        next(iterator)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "failing_after" in frames  # the original traceback
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_error_of_a_batch_comes_in_its_turn(place: torch.device, prefetch: int) -> None:
    batches = [random_bytes(1, n, 4, 4) for n in (3, 3, 4, 3)]
    iterator = iter(pixfuse.DeviceLoader(batches, place, pixfuse.IMAGENET, prefetch=prefetch))
    next(iterator)
    next(iterator)
    with pytest.raises(
        ValueError, match=r"^DeviceLoader: expected images of 3 channels.* got 4"
    ) as e:
        next(iterator)
    frames = [frame.name for frame in traceback.extract_tb(e.value.__traceback__)]
    assert "_check_normalization" in frames
    x = next(iterator)  # as with a DataLoader, the next batch can still be had
    assert_same_bits(x, pixfuse.reference.normalize(batches[3], pixfuse.IMAGENET))
    with pytest.raises(StopIteration):
        next(iterator)


class SometimesBroken(Images):
    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise BrokenError(f"sample {index}")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_a_worker(workers: int, prefetch: int) -> None:
    inner = DataLoader(SometimesBroken(), batch_size=3, num_workers=workers)
    iterator = iter(pixfuse.DeviceLoader(inner, "cpu", prefetch=prefetch))
    assert next(iterator)[1].tolist() == [0, 1, 2]
    with pytest.raises(BrokenError, match="sample 5"):
        next(iterator)
    assert next(iterator)[1].tolist() == [6, 7, 8]
    assert next(iterator)[1].tolist() == [9, 10, 11]
    with pytest.raises(StopIteration):
        next(iterator)


def test_an_interrupt_is_not_held_back() -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield random_bytes(1, 3, 4, 4)
        raise KeyboardInterrupt

    iterator = iter(pixfuse.DeviceLoader(batches(), "cpu", prefetch=2))
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert next(iterator).shape == (1, 3, 4, 4)  # the batch before it is not lost
    with pytest.raises(StopIteration):
        next(iterator)


class Endless:
    """A loader whose iterator tells when it is gone."""

    def __init__(self) -> None:
        self.closed = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        try:
            while True:
                yield random_bytes(1, 3, 4, 4)
        finally:
            self.closed += 1


def consume_and_break(loader: Any) -> None:
    for _ in loader:
        raise BrokenError


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("how", ["break", "del", "close", "error", "cycle"])
def test_leaving_early(place: torch.device, prefetch: int, how: str) -> None:
    inner = Endless()
    loader = pixfuse.DeviceLoader(inner, place, prefetch=prefetch)
    if how == "break":
        for number, _ in enumerate(loader):
            if number == 3:
                break
    elif how == "error":
        with pytest.raises(BrokenError):
            consume_and_break(loader)
        gc.collect()  # pytest looked at the traceback
    else:
        iterator = iter(loader)
        next(iterator)
        if prefetch:
            assert len(threads_running()) == 1
        if how == "close":
            iterator.close()  # type: ignore[attr-defined]
            with pytest.raises(StopIteration):
                next(iterator)
        elif how == "cycle":
            cycle: list[Any] = [iterator]
            cycle.append(cycle)
            del cycle, iterator
            gc.collect()
        else:
            del iterator
    assert inner.closed == 1
    assert eventually(lambda: threads_running() == [])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("where", ["loader", "batch"])
def test_an_error_leaves_nothing_to_a_garbage_collection(prefetch: int, where: str) -> None:
    closed = []

    def batches() -> Iterator[torch.Tensor]:
        try:
            yield random_bytes(1, 3, 4, 4)
            if where == "loader":
                raise BrokenError
            while True:
                yield random_bytes(1, 2, 4, 4)
        finally:
            closed.append(True)

    def use_all() -> str:
        try:
            for _ in pixfuse.DeviceLoader(batches(), "cpu", pixfuse.IMAGENET, prefetch=prefetch):
                pass
        except (BrokenError, ValueError) as error:
            return type(error).__name__
        return "none"

    gc.collect()
    gc.disable()
    try:
        assert use_all() == ("BrokenError" if where == "loader" else "ValueError")
        assert closed == [True]
        assert eventually(lambda: threads_running() == [])
    finally:
        gc.enable()


def test_leaving_early_ends_the_workers() -> None:
    inner = DataLoader(Images(), batch_size=1, num_workers=2)
    iterator = iter(pixfuse.DeviceLoader(inner, "cpu"))
    next(iterator)
    workers = list(iterator._batches._workers)  # type: ignore[attr-defined]
    assert all(worker.is_alive() for worker in workers)
    del iterator
    gc.collect()
    assert eventually(lambda: not any(worker.is_alive() for worker in workers))


def test_nothing_is_kept_afterwards() -> None:
    batches = [random_bytes(1, 3, 4, 4) for _ in range(6)]
    alive = [weakref.ref(batch) for batch in batches]
    iterator = iter(pixfuse.DeviceLoader(iter(batches), "cpu"))
    results = [weakref.ref(next(iterator)) for _ in range(4)]
    assert eventually(lambda: len(threads_running()) == 1)
    assert [result() for result in results] == [None] * 4
    batches.clear()
    gc.collect()
    assert eventually(lambda: [ref() for ref in alive][:4] == [None] * 4)
    list(iterator)
    assert eventually(lambda: [ref() for ref in alive] == [None] * 6)


def test_a_collection_in_the_thread_itself() -> None:
    """The last reference to an iterator may go away in its own background thread."""
    holder: list[Any] = []

    class Dropping:
        def to(self, device: torch.device) -> str:
            time.sleep(0.05)
            holder.clear()
            return "moved"

    loader = pixfuse.DeviceLoader([1, Dropping(), 3], "cpu")
    holder.append(iter(loader))
    assert next(holder[0]) == 1
    assert eventually(lambda: holder == [])
    assert eventually(lambda: threads_running() == [])


def test_two_at_once(place: torch.device) -> None:
    batches = batches_of(5)
    loader = pixfuse.DeviceLoader(batches, place, pixfuse.IMAGENET)
    for (x, _), (images, _) in zip(loader, batches, strict=True):
        assert_same(list(loader), batches)  # an iteration within another one
        assert_same_bits(x, pixfuse.reference.normalize(images, pixfuse.IMAGENET))
    together = list(zip(loader, loader, strict=True))
    assert_same([first for first, _ in together], batches)
    assert_same([second for _, second in together], batches)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_threads_that_share_an_iterator(prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.full((1, 3, 4, 4), number, dtype=torch.uint8) for number in range(40)]
    calls: list[None] = []
    last = threading.Event()

    def slow_at_the_end(images: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if images.numel() > 0 and int(images.max()) == 39:
            last.wait()  # until several threads wait for the last batch
        return convert(images, *arguments, **options)

    monkeypatch.setattr(loader_module, "convert", slow_at_the_end)
    iterator = iter(pixfuse.DeviceLoader((b for b in batches), "cpu", prefetch=prefetch))
    found: list[int] = []
    ends: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                calls.append(None)
                found.append(round(255 * float(next(iterator).max())))
        except BaseException as end:
            ends.append(end)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    # All come back but those of the last batch; an early end is one too many.
    assert eventually(lambda: len(calls) == 39 + len(threads) or bool(ends))
    last.set()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(40))
    assert [type(end) for end in ends] == [StopIteration] * 4


def test_iterations_in_many_threads() -> None:
    batches = batches_of(20)
    loader = pixfuse.DeviceLoader(batches, "cpu", pixfuse.IMAGENET)
    results: list[Any] = [None] * 6

    def work(number: int) -> None:
        results[number] = list(loader)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same(result, batches)


# --- as if it were the loader ---


def test_it_has_what_the_loader_has() -> None:
    class Epochs(DataLoader[Any]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    inner = Epochs(Images(), batch_size=5)
    loader = pixfuse.DeviceLoader(inner, "cpu")
    assert len(loader) == 3
    assert loader.batch_size == 5
    assert loader.dataset is inner.dataset
    assert loader.sampler is inner.sampler
    assert loader.num_workers == 0
    loader.set_epoch(4)
    assert inner.epoch == 4
    assert not hasattr(loader, "no_such_attribute")
    with pytest.raises(AttributeError, match="no_such_attribute"):
        loader.no_such_attribute  # noqa: B018


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Images()[index] for index in range(7))


def test_loaders_without_a_length() -> None:
    inner = DataLoader(Stream(), batch_size=3)
    loader = pixfuse.DeviceLoader(inner, "cpu", pixfuse.IMAGENET)
    with pytest.raises(TypeError, match="has no len"):
        len(loader)
    assert [len(labels) for _, labels in loader] == [3, 3, 1]
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        len(pixfuse.DeviceLoader(iter([]), "cpu"))


def test_pickle_and_repr() -> None:
    inner = DataLoader(Images(), batch_size=5)
    loader = pixfuse.DeviceLoader(
        inner, "cpu", pixfuse.IMAGENET, dtype=torch.bfloat16, memory_format=torch.channels_last
    )
    again = pickle.loads(pickle.dumps(loader))
    for (x, _), (y, _) in zip(loader, again, strict=True):
        assert_same_bits(x, y)
    assert "prefetch=2" in repr(again)
    assert "torch.channels_last" in repr(again)


# --- bad input ---

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "loader": (
        lambda: pixfuse.DeviceLoader(3, "cpu"),  # type: ignore[arg-type]
        TypeError,
        r"^DeviceLoader: expected loader to be an iterable of batches, got int$",
    ),
    "device": (
        lambda: pixfuse.DeviceLoader([], "gpu"),
        ValueError,
        r"^DeviceLoader: expected device to be a CPU or CUDA device, got 'gpu'$",
    ),
    "device type": (
        lambda: pixfuse.DeviceLoader([], None),  # type: ignore[arg-type]
        TypeError,
        r"^DeviceLoader: expected device to be a CPU or CUDA device, got None$",
    ),
    "device without a kernel": (
        lambda: pixfuse.DeviceLoader([], "meta"),
        NotImplementedError,
        r"^DeviceLoader: expected device to have a kernel \(CPU or CUDA\), got meta$",
    ),
    "normalization": (
        lambda: pixfuse.DeviceLoader([], "cpu", 0.5),  # type: ignore[arg-type]
        TypeError,
        r"^DeviceLoader: expected normalization to be a pixfuse.Normalization, got float; use",
    ),
    "layout": (
        lambda: pixfuse.DeviceLoader([], "cpu", input_layout="HWC"),  # type: ignore[arg-type]
        ValueError,
        r"expected input_layout to be 'NCHW' or 'NHWC', got 'HWC'",
    ),
    "dtype": (
        lambda: pixfuse.DeviceLoader([], "cpu", dtype=torch.uint8),
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got torch.uint8",
    ),
    "memory format": (
        lambda: pixfuse.DeviceLoader([], "cpu", memory_format=torch.channels_last_3d),
        ValueError,
        r"expected memory_format to be torch.contiguous_format, .*, got torch.channels_last_3d",
    ),
    "prefetch type": (
        lambda: pixfuse.DeviceLoader([], "cpu", prefetch=1.5),  # type: ignore[arg-type]
        TypeError,
        r"^DeviceLoader: expected prefetch to be an int, got float$",
    ),
    "prefetch bool": (
        lambda: pixfuse.DeviceLoader([], "cpu", prefetch=True),
        TypeError,
        r"^DeviceLoader: expected prefetch to be an int, got bool$",
    ),
    "prefetch": (
        lambda: pixfuse.DeviceLoader([], "cpu", prefetch=-1),
        ValueError,
        r"^DeviceLoader: expected prefetch to be 0 or more, got -1$",
    ),
    "transfer": (
        lambda: pixfuse.DeviceLoader([], "cpu", transfer="zero"),  # type: ignore[arg-type]
        ValueError,
        r"^DeviceLoader: expected transfer to be 'copy' or 'direct', got 'zero'$",
    ),
    "direct on a CPU": (
        lambda: pixfuse.DeviceLoader([], "cpu", transfer="direct"),
        ValueError,
        r"^DeviceLoader: expected transfer to be 'copy' for device cpu, got 'direct'$",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).startswith("DeviceLoader: expected ")


PER_IMAGE = pixfuse.PerImageStandardization(per_channel=True, floor=3)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_standardized(
    place: torch.device, layout: Any, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Each image by its own mean and std, the bits of the function."""
    batches = [(random_bytes(2, 3, 7, 9), n) for n in range(4)]
    options = {"input_layout": layout, "dtype": dtype, "memory_format": memory_format}
    for per_image in (pixfuse.PerImageStandardization(), PER_IMAGE):
        loader = pixfuse.DeviceLoader(batches, place, per_image, **options)
        for (images, n), (x, number) in zip(batches, loader, strict=True):
            assert (x.device.type, number) == (place.type, n)
            arguments = (images, per_image.per_channel, per_image.floor)
            assert_same_bits(x.cpu(), pixfuse.standardize_per_image(*arguments, **options))
            assert_same_bits(
                x.cpu(), pixfuse.reference.standardize_per_image(*arguments, **options)
            )


def test_standardized_arrays_in_nested_batches_and_pickled() -> None:
    images = random_bytes(3, 8, 9, 3)
    loader = pixfuse.DeviceLoader(
        [{"x": [images.numpy(), "name"]}], "cpu", PER_IMAGE, input_layout="NHWC"
    )
    again = pickle.loads(pickle.dumps(loader))
    assert "PerImageStandardization(per_channel=True, floor=3.0)" in repr(again)
    expected = pixfuse.standardize_per_image(images, True, 3.0, input_layout="NHWC")
    for batch in (*loader, *again):
        assert batch["x"][1] == "name"
        assert_same_bits(batch["x"][0], expected)


def test_standardized_over_workers() -> None:
    inner = DataLoader(Images(), batch_size=5, num_workers=2)
    for x, labels in pixfuse.DeviceLoader(inner, "cpu", PER_IMAGE):
        images = images_of(labels.tolist())
        assert_same_bits(x, pixfuse.standardize_per_image(images, True, 3.0))


def test_standardizing_reads_pinned_memory_only_by_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CUDA_LOADED", True)
    with pytest.raises(
        ValueError,
        match=r"^DeviceLoader: expected transfer to be 'copy' with a PerImageStandardization, got "
        r"'direct'; it reads every image twice$",
    ):
        pixfuse.DeviceLoader([], "cuda", PER_IMAGE, transfer="direct")
    pixfuse.DeviceLoader([], "cuda", PER_IMAGE)


def test_standardized_on_the_model_of_a_gpu() -> None:
    for seed in range(10):
        gpu = gpu_model.Gpu(seed)
        batches = batches_of(12)
        loader = ModelLoader(gpu, batches, normalization=PER_IMAGE)
        seen = consume(gpu, loader, 12)
        gpu.run_all()
        for (x, labels), (images, numbers) in zip(seen, batches, strict=True):
            assert torch.equal(labels, numbers)
            assert_same_bits(x, pixfuse.standardize_per_image(images, True, 3.0))


def test_cuda_without_kernels() -> None:
    if pixfuse.info()["cuda"]["loaded"]:
        pytest.skip("CUDA kernels are loaded")
    with pytest.raises(
        NotImplementedError, match=r"expected device to have a kernel, got cuda:0 \(this build of"
    ):
        pixfuse.DeviceLoader([], "cuda:0")


# --- what only a GPU does ---


def slow_stream(cuda: torch.device) -> None:
    torch.cuda._sleep(100_000_000)


@pytest.mark.parametrize("transfer", ["copy", "direct"])
@pytest.mark.parametrize("pinned", [False, True])
def test_transfer(cuda: torch.device, transfer: Any, pinned: bool) -> None:
    batches = batches_of(7)
    given = [(x.pin_memory(), y.pin_memory()) for x, y in batches] if pinned else batches
    loader = pixfuse.DeviceLoader(given, cuda, pixfuse.IMAGENET, transfer=transfer)
    assert_same(list(loader), batches)


@pytest.mark.parametrize("transfer", ["copy", "direct"])
def test_a_slow_side_stream(cuda: torch.device, transfer: Any) -> None:
    batches = batches_of(7)
    iterator = iter(
        pixfuse.DeviceLoader(batches, cuda, pixfuse.IMAGENET, transfer=transfer, prefetch=3)
    )
    seen = []
    for _ in batches:
        with torch.cuda.stream(iterator._line.side):  # type: ignore[attr-defined]
            slow_stream(cuda)
        x, labels = next(iterator)
        seen.append((x + 0, labels + 0))  # on the consumer's stream, while the side stream sleeps
        del x, labels
    assert_same([(x - 0, labels) for x, labels in seen], batches)


@pytest.mark.parametrize("transfer", ["copy", "direct"])
def test_a_slow_consumer_stream(cuda: torch.device, transfer: Any) -> None:
    """Memory that the host has dropped is still being read when the next batches arrive."""
    batches = batches_of(12)
    seen = []
    for x, labels in pixfuse.DeviceLoader(batches, cuda, pixfuse.IMAGENET, transfer=transfer):
        slow_stream(cuda)
        seen.append((x + 0, labels + 0))
        del x, labels
    assert_same(seen, batches)


def test_the_consumer_is_not_synchronized(cuda: torch.device) -> None:
    batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches_of(6)]
    seen: list[Any] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen.extend(pixfuse.DeviceLoader(batches, cuda, pixfuse.IMAGENET))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(seen, batches)


@pytest.mark.parametrize("transfer", ["copy", "direct"])
def test_memory_on_the_gpu_is_bounded(cuda: torch.device, transfer: Any) -> None:
    images = random_bytes(8, 3, 256, 256)
    size = 4 * images.numel()
    loader = pixfuse.DeviceLoader([images] * 40, cuda, transfer=transfer, prefetch=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for x in loader:
        slow_stream(cuda)
        x.sum()
        del x
    torch.cuda.synchronize()
    # prefetch + 1 under way and one in use, each with its bytes; twice that in reserve.
    assert torch.cuda.max_memory_allocated() - before <= 2 * 4 * 1.25 * size
    gc.collect()
    assert torch.cuda.memory_allocated() - before < size


@pytest.mark.parametrize("transfer", ["copy", "direct"])
def test_leaving_early_on_a_gpu(cuda: torch.device, transfer: Any) -> None:
    for _ in range(5):
        batches = batches_of(12)
        iterator = iter(pixfuse.DeviceLoader(batches, cuda, transfer=transfer, prefetch=4))
        next(iterator)
        with torch.cuda.stream(iterator._line.side):  # type: ignore[attr-defined]
            slow_stream(cuda)
        del iterator
        blocks = [torch.full((2, 3, 8, 9), 7.0, device=cuda) for _ in range(8)]
        torch.cuda.synchronize()
        assert all(bool((block == 7.0).all()) for block in blocks)


def test_batches_that_are_on_the_gpu_already(cuda: torch.device) -> None:
    batches = batches_of(5)

    def made_there() -> Iterator[Any]:
        for x, y in batches:
            slow_stream(cuda)
            yield x.to(cuda), y.to(cuda)

    assert_same(list(pixfuse.DeviceLoader(made_there(), cuda, pixfuse.IMAGENET)), batches)


# --- the order of a GPU's streams, on a model of one ---


class ModelLoader(pixfuse.DeviceLoader):
    """A DeviceLoader that believes the model to be its GPU."""

    def __init__(
        self,
        gpu: gpu_model.Gpu,
        batches: Any,
        line: type[gpu_model.Line] = gpu_model.Line,
        *,
        transfer: Any = "copy",
        prefetch: int = 2,
        normalization: Any = pixfuse.IMAGENET,
    ) -> None:
        super().__init__(batches, "cpu", normalization, prefetch=prefetch)
        self.gpu, self.line = gpu, line
        self.device, self.transfer = torch.device("cuda"), transfer

    def __iter__(self) -> Iterator[Any]:
        line = self.line(self, self.gpu)
        return loader_module._BatchIterator(iter(self.loader), line, self.prefetch)


def consume(gpu: gpu_model.Gpu, loader: Any, stop: int) -> list[Any]:
    """What a consumer's kernels see that run long after the host has dropped the tensors."""
    seen: list[Any] = []
    for number, (x, labels) in enumerate(loader):
        seen.append([])
        gpu.current_stream().issue(functools.partial(look, seen[-1], x.detach(), labels.detach()))
        gpu.run_some()
        if number + 1 == stop:
            break
        del x, labels
    return seen


def look(entry: list[Any], *tensors: torch.Tensor) -> None:
    entry.extend(tensor.clone() for tensor in tensors)


def run_on_the_model(
    seed: int, line: type[gpu_model.Line] = gpu_model.Line, stop: int = 12, **options: Any
) -> gpu_model.Gpu:
    """12 batches; raises AssertionError where what is seen is wrong."""
    gpu = gpu_model.Gpu(seed)
    batches = batches_of(12)
    seen = consume(gpu, ModelLoader(gpu, batches, line, **options), stop)
    assert eventually(lambda: threads_running() == [])
    # Somebody else takes all the memory that was given back, as the consumer's stream may.
    blocks = [block for free in gpu.free.values() for block in free]
    gpu.current_stream().issue(lambda: [block.fill_(77) for block in blocks])
    gpu.run_all()
    assert all(bool((block == 77).all()) for block in blocks), "written after it was given back"
    assert_same(seen, batches[:stop])
    return gpu


@pytest.mark.parametrize("transfer", ["copy", "direct"])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("stop", [1, 4, 12])
def test_order_of_streams(transfer: str, prefetch: int, stop: int) -> None:
    for seed in range(10):
        gpu = run_on_the_model(seed, stop=stop, transfer=transfer, prefetch=prefetch)
        # Bounded, however far behind the GPU is: a batch is images and labels.
        assert gpu.allocated <= 2 * (prefetch + 2)
        assert gpu.pinned_peak <= 2 * (prefetch + 2)
        assert gpu.pinned_alive == 0


class MemoryTakenLate(gpu_model.Line):
    def prepare(self, batch: Any) -> Any:
        work = super().prepare(batch)
        for move in work.moves:
            move.result = None
        return work

    def run(self, work: Any) -> Any:
        for move in work.moves:
            again = self._plan_images(move.source) if move.memory_format else None
            move.result = again.result if again else self._same_memory(move.source)
        return super().run(work)


class MemoryTakenUnordered(gpu_model.Line):
    def prepare(self, batch: Any) -> Any:
        work = super().prepare(batch)
        work.ready = gpu_model.Event(self.cuda)
        work.ready.done = True
        return work


class HandedOutUnordered(gpu_model.Line):
    def deliver(self, work: Any) -> Any:
        work.done = gpu_model.Event(self.cuda)
        work.done.done = True
        return super().deliver(work)


class AbandonedUnordered(gpu_model.Line):
    def abandon(self, work: Any) -> None:
        pass


class HostMemoryDropped(gpu_model.Line):
    def run(self, work: Any) -> Any:
        super().run(work)
        self.under_way[-1][1].clear()
        return work


class HostMemoryDroppedAtTheEnd(gpu_model.Line):
    def close(self) -> None:
        self.under_way.clear()


class NeverWaiting(gpu_model.Line):
    def run(self, work: Any) -> Any:
        self.ahead = 1000
        return super().run(work)


FAULTS: dict[str, tuple[type[gpu_model.Line], dict[str, Any]]] = {
    "memory taken late": (MemoryTakenLate, {}),
    "memory taken unordered": (MemoryTakenUnordered, {}),
    "handed out unordered": (HandedOutUnordered, {}),
    "abandoned unordered": (AbandonedUnordered, {"stop": 3}),
    "host memory dropped": (HostMemoryDropped, {"transfer": "direct"}),
    "host memory dropped at the end": (HostMemoryDroppedAtTheEnd, {"transfer": "direct"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_notices(fault: str) -> None:
    line, options = FAULTS[fault]

    def noticed(seed: int) -> bool:
        try:
            run_on_the_model(seed, line, **options)
        except AssertionError:
            return True
        return False

    assert any(noticed(seed) for seed in range(40))


def test_the_model_notices_unbounded_memory() -> None:
    peaks = [run_on_the_model(seed, NeverWaiting).pinned_peak for seed in range(20)]
    assert max(peaks) > 2 * (2 + 2)


def test_the_model_notices_a_deadlock() -> None:
    gpu = gpu_model.Gpu(0)
    gpu.default.wait_event(gpu_model.Event(gpu))
    with pytest.raises(AssertionError, match="nothing can end"):
        gpu.run_all()


@pytest.mark.parametrize("stop", [2, 12])
def test_order_of_streams_when_a_batch_fails(stop: int) -> None:
    """What a failed batch half wrote is ordered too."""
    for seed in range(20):
        gpu = gpu_model.Gpu(seed)
        batches = batches_of(12)
        broken: list[Any] = list(batches)
        broken[3] = (batches[3][0], batches[3][1], random_bytes(2, 4, 8, 9))
        loader = iter(ModelLoader(gpu, broken))
        seen = consume(gpu, loader, 3)
        with pytest.raises(ValueError, match="expected images of 3 channels"):
            next(loader)
        seen += consume(gpu, loader, stop)
        del loader
        gpu.run_all()
        assert_same(seen, (batches[:3] + batches[4:])[: 3 + stop])


def test_a_consumer_on_another_stream() -> None:
    gpu = gpu_model.Gpu(0)
    iterator = iter(ModelLoader(gpu, batches_of(4)))
    next(iterator)
    assert not hasattr(iterator._line, "kept")  # type: ignore[attr-defined]
    other = gpu.new_stream()
    with gpu.stream(other):
        _, labels = next(iterator)
    assert iterator._line.kept[0] is labels  # type: ignore[attr-defined]
    assert iterator._line.kept[1] is other  # type: ignore[attr-defined]
    assert any(isinstance(work, gpu_model.Event) for work in other.queue)


# --- the steps themselves, on tensors without memory ---


class FakeLine(loader_module._CudaLine):
    """Streams of the model, memory of the real thing: devices, shapes and strides are checked."""

    def _is_pinned(self, source: torch.Tensor) -> bool:
        return True  # pinning needs a GPU

    def _copy(self, source: torch.Tensor, result: torch.Tensor) -> None:
        assert (source.shape, source.stride()) == (result.shape, result.stride())

    def _keep_for(self, result: torch.Tensor, stream: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("transfer", "normalization"),
    [("copy", pixfuse.IMAGENET), ("direct", pixfuse.IMAGENET), ("copy", PER_IMAGE)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.preserve_format])
def test_the_steps_on_fake_tensors(
    monkeypatch: pytest.MonkeyPatch,
    transfer: Any,
    normalization: Any,
    memory_format: torch.memory_format,
) -> None:
    monkeypatch.setattr("pixfuse._checks.CUDA_LOADED", True)
    monkeypatch.setattr("pixfuse._checks.share_memory", lambda a, b: False)  # no addresses
    owner = pixfuse.DeviceLoader(
        [],
        "cpu",
        normalization,
        input_layout="NHWC",
        dtype=torch.bfloat16,
        memory_format=memory_format,
    )
    owner.device, owner.transfer = torch.device("cuda"), transfer
    monkeypatch.setattr(FakeLine, "cuda", gpu_model.Gpu(0))
    line = FakeLine(owner)
    images, labels = random_bytes(2, 8, 9, 3), torch.arange(2)
    with FakeTensorMode() as mode:
        monkeypatch.setattr(loader_module, "_is_plain", lambda value: value.dtype == torch.int64)
        batch = (mode.from_tensor(images), mode.from_tensor(labels))
        x, y = line.deliver(line.run(line.prepare(batch)))
    expected = pixfuse.normalize(images, input_layout="NHWC", memory_format=memory_format)
    assert (x.device, x.dtype) == (torch.device("cuda", 0), torch.bfloat16)
    assert (x.shape, x.stride()) == (expected.shape, expected.stride())
    assert (y.device, y.dtype, y.shape) == (torch.device("cuda", 0), torch.int64, (2,))


def test_an_iterator_that_is_open_when_the_interpreter_ends() -> None:
    result = python("""
import torch, pixfuse
batches = iter(pixfuse.DeviceLoader([torch.zeros(2, 3, 4, 5, dtype=torch.uint8)] * 9, "cpu"))
next(batches)
""")
    assert (result.returncode, result.stderr) == (0, "")
