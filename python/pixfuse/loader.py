"""DeviceLoader: the batches of any loader on a device, normalized there ahead of their use."""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch

from pixfuse._checks import tensor_of_images
from pixfuse._convert import convert, speak_as
from pixfuse._library import (
    CUDA_LOADED,
    CUDA_STATE,
    DTYPE_CODES,
    LAYOUT_CODES,
    MEMORY_FORMAT_CODES,
    dense_strides,
    resolve_channels_last,
    view_as_nchw,
)
from pixfuse.normalization import UNIT, Normalization, PerImageStandardization

_THREAD_NAME = "pixfuse.DeviceLoader"


class DeviceLoader:
    """Take batches from a loader, move them to a device, and normalize their images there.

    Formula: that of :func:`pixfuse.normalize`, or with a ``PerImageStandardization`` that of
    :func:`pixfuse.standardize_per_image`, whose bits these are.

    While the consumer works on one batch, the next ``prefetch`` are on their way: a background
    thread per iteration normalizes them into recycled memory (CPU), or copies them through pinned
    memory and normalizes them on a stream of its own (CUDA). Bytes travel as bytes: a quarter of
    what float32 would take.

    On the CPU, bytes from the workers cost a pass over memory more than floats, which
    ``Collate(normalization)`` writes there in one: prefer those where no core is left for the
    background thread. Bytes are the better choice where shared memory is short, or where the
    workers are what everybody waits for and this process has a core to spare. ``prefetch=0`` saves
    the hand-over to the thread.

    The loader itself is only ever called in the consumer's thread, so its random numbers come in
    the same order in every run, generators may be given, and an exception of a batch is raised
    where that batch would have come. As with a ``DataLoader``, the next batch can be asked for
    after it.

    On CUDA, memory is bounded by ``prefetch + 1`` batches: bytes on the host, bytes and results on
    the GPU. The consumer's current stream waits for a batch, the host does not; only the background
    thread waits, when the GPU is more than ``prefetch`` batches behind. The results belong to the
    stream that was current when they were asked for, so that their memory is free for use there
    as soon as they are dropped. This path has not yet run on a GPU; the tests run it on a model of
    one.

    Breaking out of a loop, or dropping or closing (``close()``) its iterator, ends the thread and
    lets go of the loader's own iterator. Every ``iter()`` starts afresh; several may run at once
    if the loader's may. Threads that share an iterator take turns, and each batch comes once.
    ``len()`` is the loader's, and so is every other attribute that is read (``dataset``,
    ``batch_size``, ``sampler``, ``set_epoch`` …); one that is set is set here, and the loader does
    not see it: set it on ``.loader``. It can be pickled if the loader can.

    What shares out a ``DataLoader`` over processes, as Lightning and accelerate do, takes a
    ``DeviceLoader`` as it is, so that each process sees everything: give the loader inside a
    ``DistributedSampler``, or wrap what accelerate has prepared.

    What the loader says of its progress (the ``state_dict`` of one that can go on where it stopped,
    accelerate's ``end_of_dataloader``) is up to ``prefetch`` batches ahead of the consumer: take
    ``prefetch=0`` where somebody goes by that.

    Args:
        loader: any iterable of batches: a ``DataLoader``, a list, a generator (for one iteration).
            A batch is a tensor, or tuples, lists, mappings, named tuples and dataclasses of them,
            nested at will. Every uint8 tensor or numpy array of 4 dimensions in it is a batch of
            images and gets normalized; other tensors, and objects that have a ``to`` method, are
            moved to the device; everything else stays as it is. Masks of bytes have to have
            another number of dimensions, or another dtype. A batch is read until it comes out
            (on CUDA until the GPU has it), so the loader must not write into it again.
        device: a CPU or CUDA device.
        normalization: mean and std per channel, and a rounding. Or a
            :class:`pixfuse.PerImageStandardization`: every image by its own mean and std, those of
            the bytes that come from the loader, whatever was cropped, padded or mirrored before;
            the bits of :func:`pixfuse.standardize_per_image`.
        input_layout: of the images, ``"NCHW"`` or ``"NHWC"``.
        dtype: of the results: ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``.
        memory_format: of the results: ``torch.contiguous_format``, ``torch.channels_last`` or
            ``torch.preserve_format``.
        prefetch: how many batches to work ahead; 0 works on each one when it is asked for, without
            a thread.
        transfer: CUDA only. ``"copy"`` copies the bytes to the GPU and normalizes them there;
            ``"direct"`` lets the kernel read the pinned memory itself, once, so not with a
            ``PerImageStandardization``. Which one is faster has not been measured.

    Returns:
        An iterable of batches of the same structure. Images have shape (N, C, H, W) and ``dtype``.

    Raises:
        TypeError: a wrong type or dtype, or ``len()`` of a loader that has none.
        ValueError: a wrong option, or images that do not fit (when their batch is due).
        NotImplementedError: a device that has no kernel.

    Equivalent to::

        for images, labels in loader:
            yield pixfuse.normalize(images.to(device), normalization), labels.to(device)

    Source:
        PyTorch, "A guide on good usage of non_blocking and pin_memory()".
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: torch.device | str | int,
        normalization: Normalization | PerImageStandardization = UNIT,
        *,
        input_layout: Literal["NCHW", "NHWC"] = "NCHW",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        prefetch: int = 2,
        transfer: Literal["copy", "direct"] = "copy",
    ) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(
                "DeviceLoader: expected loader to be an iterable of batches, got "
                f"{type(loader).__name__}"
            )
        if isinstance(prefetch, bool) or not isinstance(prefetch, int):
            raise TypeError(
                f"DeviceLoader: expected prefetch to be an int, got {type(prefetch).__name__}"
            )
        if prefetch < 0:
            raise ValueError(f"DeviceLoader: expected prefetch to be 0 or more, got {prefetch}")
        self.loader = loader
        self.device = _check_device(device)
        _check_transfer(transfer, self.device, normalization)
        self.normalization = normalization
        self.input_layout = input_layout
        self.dtype = dtype
        self.memory_format = memory_format
        self.prefetch = prefetch
        self.transfer = transfer
        # No image at all is enough for normalize to check what was given.
        channels = len(getattr(normalization, "mean", (0,)))
        shape = (0, channels, 1, 1) if input_layout != "NHWC" else (0, 1, 1, channels)
        nothing = torch.empty(shape, dtype=torch.uint8, device="cpu")
        _convert_images(nothing, normalization, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "input_layout": self.input_layout,
            "dtype": self.dtype,
            "memory_format": self.memory_format,
        }

    def __iter__(self) -> Iterator[Any]:
        """Start over, on an iterator of the loader."""
        line = _CudaLine(self) if self.device.type == "cuda" else _CpuLine(self)
        return _BatchIterator(iter(self.loader), line, self.prefetch)

    def __len__(self) -> int:
        """The number of batches, if the loader has one."""
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Only asked for what is not here. Copies and pickles ask before there is a loader.
        if name == "loader" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    def __repr__(self) -> str:
        return (
            f"DeviceLoader({self.loader!r}, {str(self.device)!r}, {self.normalization}, "
            f"input_layout={self.input_layout!r}, dtype={self.dtype}, "
            f"memory_format={self.memory_format}, prefetch={self.prefetch}, "
            f"transfer={self.transfer!r})"
        )


def _check_device(device: torch.device | str | int) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"DeviceLoader: expected device to be a CPU or CUDA device, got {device!r}"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"DeviceLoader: expected device to have a kernel (CPU or CUDA), got {device}"
        )
    if device.type == "cuda" and not CUDA_LOADED:
        raise NotImplementedError(
            f"DeviceLoader: expected device to have a kernel, got {device} ({CUDA_STATE})"
        )
    return device


def _check_transfer(transfer: str, device: torch.device, normalization: object) -> None:
    if transfer not in ("copy", "direct"):
        raise ValueError(
            f"DeviceLoader: expected transfer to be 'copy' or 'direct', got {transfer!r}"
        )
    if transfer == "direct" and device.type != "cuda":
        raise ValueError(
            f"DeviceLoader: expected transfer to be 'copy' for device {device}, got 'direct'"
        )
    if transfer == "direct" and isinstance(normalization, PerImageStandardization):
        raise ValueError(
            "DeviceLoader: expected transfer to be 'copy' with a PerImageStandardization, got "
            "'direct'; it reads every image twice"
        )


# --- the structure of a batch ---


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to all in it that is not a container.

    Containers keep their types, as in torch's own pinning of batches.
    """
    if isinstance(value, (torch.Tensor, np.ndarray, str, bytes)):
        return function(value)
    if isinstance(value, Mapping):
        mapped = {key: map_leaves(function, item) for key, item in value.items()}
        if type(value) is dict:
            return mapped
        if isinstance(value, MutableMapping):  # may hold more than its items
            clone = copy.copy(value)
            for key, item in mapped.items():  # a Counter's update() adds, a ModelOutput's raises
                clone[key] = item
            return clone
        return type(value)(mapped)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        same = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_leaves(function, getattr(value, field.name))
            object.__setattr__(same, field.name, item)  # frozen ones too
        return same
    if callable(getattr(value, "to", None)):  # a PackedSequence is a named tuple too
        return function(value)
    if isinstance(value, tuple):
        items = [map_leaves(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, (list, deque)):
        items = [map_leaves(function, item) for item in value]
        if type(value) is list:
            return items
        sequence = copy.copy(value)
        sequence.clear()
        sequence.extend(items)
        return sequence
    return function(value)


def is_image_batch(value: object) -> bool:
    """The rule: bytes of 4 dimensions."""
    if isinstance(value, torch.Tensor):
        return value.dtype is torch.uint8 and value.ndim == 4
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 4


# --- from the loader to the consumer ---


def _convert_images(images: Any, normalization: Any, **options: Any) -> torch.Tensor:
    """In the words of DeviceLoader, should that be an error."""
    try:
        return convert(images, normalization, **options)
    except Exception as error:
        speak_as("DeviceLoader", error)
        raise


class _CpuLine:
    """What becomes of a batch on the CPU."""

    def __init__(self, owner: DeviceLoader) -> None:
        self.device = owner.device
        self.normalization = owner.normalization
        self.options = owner._options()

    def prepare(self, batch: Any) -> Any:
        """In the consumer's thread, as soon as the loader has given the batch."""
        return batch

    def run(self, batch: Any) -> Any:
        """In the background thread, one batch at a time."""
        return map_leaves(self._convert, batch)

    def deliver(self, batch: Any) -> Any:
        """In the consumer's thread, when the batch is asked for."""
        return batch

    def abandon(self, batch: Any) -> None:
        """Instead of `deliver`, for what nobody will ask for."""

    def close(self) -> None:
        """After everything else."""

    def _convert(self, value: Any) -> Any:
        if is_image_batch(value) and not _on_cuda(value):
            return _convert_images(value, self.normalization, **self.options)
        if isinstance(value, torch.Tensor) or callable(getattr(value, "to", None)):
            moved = value.to(self.device)
            return self._convert(moved) if is_image_batch(moved) else moved
        return value


def _on_cuda(value: torch.Tensor | np.ndarray) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _is_plain(value: object) -> bool:
    """Whether a tensor is nothing but strided memory; other kinds know themselves how to move."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and _is_strided(value)


def _is_strided(value: Any) -> bool:
    return value.layout is torch.strided and not value.is_nested


def _is_dense(value: torch.Tensor) -> bool:
    return value.is_contiguous() or (
        value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    )


class _BatchIterator:
    """The queue between a loader and its consumer: up to ``prefetch`` batches beyond the next."""

    def __init__(self, batches: Iterator[Any], line: _CpuLine | _CudaLine, prefetch: int) -> None:
        self._batches: Iterator[Any] | None = batches
        self._line = line
        self._prefetch = prefetch
        self._pending: deque[Future[Any]] = deque()
        self._failing = False
        # Threads that share an iterator take turns: two that wait for the same batch would take one
        # more than there is, and most loaders may be called by one at a time only.
        self._turn = threading.RLock()
        self._thread: ThreadPoolExecutor | None = None
        self._thread_ids: list[int] = []
        if prefetch > 0:
            ids = self._thread_ids
            self._thread = ThreadPoolExecutor(
                1, _THREAD_NAME, initializer=lambda: ids.append(threading.get_ident())
            )

    def __iter__(self) -> _BatchIterator:
        return self

    def __next__(self) -> Any:
        with self._turn:
            return self._next()

    def _next(self) -> Any:
        while self._batches is not None and not self._failing and self._has_room():
            self._pull(self._batches)
        if not self._pending:
            self.close()
            raise StopIteration
        self._pending[0].exception()  # waits; should that be interrupted, the batch is not lost
        future = self._pending.popleft()
        # An error of the loader is the last of the queue: here it has had its turn.
        self._failing = self._failing and bool(self._pending)
        try:
            return self._line.deliver(future.result())
        finally:
            # An error holds this frame, and the future the error: that circle would keep the
            # thread, and the loader's workers, until a garbage collection.
            del future

    def _has_room(self) -> bool:
        return len(self._pending) <= self._prefetch

    def _pull(self, batches: Iterator[Any]) -> None:
        try:
            batch = next(batches)
        except StopIteration:
            self._batches = None
        except Exception as error:  # raised where its batch would have come
            self._failing = True
            self._pending.append(_failed(error))
        else:
            self._pending.append(self._submit(batch))

    def _submit(self, batch: Any) -> Future[Any]:
        try:
            work = self._line.prepare(batch)
            if self._thread is not None:
                return self._thread.submit(self._line.run, work)
            future: Future[Any] = Future()
            future.set_result(self._line.run(work))
            return future
        except Exception as error:
            return _failed(error)

    def close(self) -> None:
        """End the thread and let go of the loader's iterator; ask for nothing after it."""
        self._batches = None
        thread, self._thread = self._thread, None
        if thread is not None:
            # A garbage collection may run this in the very thread that would be waited for.
            here = threading.get_ident() in self._thread_ids
            thread.shutdown(wait=not here, cancel_futures=True)
        line = self._line

        def abandon(future: Future[Any]) -> None:
            if not future.cancelled() and future.exception() is None:
                line.abandon(future.result())

        pending, self._pending = self._pending, deque()
        for future in pending:
            future.add_done_callback(abandon)
        line.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the end of the interpreter the thread has ended, and modules are gone in part.
        if not is_finalizing():
            self.close()


def _failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


# --- CUDA ---


@dataclasses.dataclass(eq=False)
class _Move:
    """A tensor on its way: into ``result``, or, with None there, into what the kernel returns."""

    source: torch.Tensor
    result: torch.Tensor | None
    #: Of the result of a batch of images; None for other tensors, which are copied.
    memory_format: torch.memory_format | None = None


@dataclasses.dataclass(eq=False)
class _Work:
    """A batch on its way to the GPU."""

    batch: Any
    moves: list[_Move]
    #: The consumer's stream when the loader gave the batch: the owner of the results' memory.
    consumer: Any
    #: On the consumer's stream: whatever used the results' memory before has finished.
    ready: Any
    #: On the side stream: the results are there, and the sources have been read.
    done: Any = None


class _CudaLine:
    """What becomes of a batch on a GPU.

    Two events order everything. ``ready`` is recorded on the consumer's stream *after* the memory
    for the results was taken from it; the side stream waits for it before it writes there. ``done``
    is recorded on the side stream after the results; the consumer's stream waits for it before they
    are handed out. So the memory needs no ``record_stream``, and dropping a result makes it free
    for use at once, however far the host is ahead of the GPU.
    """

    #: Where streams come from. The tests put a model of a GPU here.
    cuda: Any = torch.cuda

    def __init__(self, owner: DeviceLoader) -> None:
        self.device = owner.device
        if self.device == torch.device("cuda"):  # tensors say which one
            self.device = torch.device("cuda", self.cuda.current_device())
        self.normalization = owner.normalization
        self.options = owner._options()
        self.direct = owner.transfer == "direct"
        self.ahead = owner.prefetch
        self.side = self.cuda.Stream(self.device)
        #: Events of the batches under way, each with the host memory that is read until then.
        self.under_way: deque[tuple[Any, list[torch.Tensor]]] = deque()

    def prepare(self, batch: Any) -> _Work:
        """In the consumer's thread: take the memory, then mark the moment."""
        moves: list[_Move] = []
        consumer = self.cuda.current_stream(self.device)
        map_leaves(lambda value: self._plan(value, moves), batch)
        return _Work(batch, moves, consumer, consumer.record_event())

    def _plan(self, value: Any, moves: list[_Move]) -> None:
        if is_image_batch(value):
            moves.append(self._plan_images(tensor_of_images("DeviceLoader", value)))
        elif _is_plain(value):
            here = value.device == self.device
            moves.append(_Move(value, value if here else self._same_memory(value)))

    def _plan_images(self, source: torch.Tensor) -> _Move:
        nchw = view_as_nchw(source, LAYOUT_CODES[self.options["input_layout"]])
        # Now, since a copy of the source may have other strides to preserve.
        channels_last = resolve_channels_last(nchw, self.options["memory_format"])
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if self.direct and source.is_cpu:
            return _Move(source, None, memory_format)
        strides = dense_strides(nchw.shape, channels_last)
        result = self._allocate(nchw.shape, strides, self.options["dtype"])
        return _Move(source, result, memory_format)

    def _same_memory(self, source: torch.Tensor) -> torch.Tensor:
        like = torch.empty_like(source, device="meta")
        return self._allocate(like.shape, like.stride(), like.dtype)

    def run(self, work: _Work) -> _Work:
        """In the background thread: issue all work; wait only for a GPU that is far behind."""
        while len(self.under_way) > self.ahead:
            done, _ = self.under_way.popleft()
            done.synchronize()
        host: list[torch.Tensor] = []
        with self.cuda.stream(self.side):
            self.side.wait_event(work.ready)
            try:
                for move in work.moves:
                    self._issue(move, host)
            except BaseException:
                # The results' memory goes back to the consumer's stream, half written.
                work.consumer.wait_event(self.side.record_event())
                raise
            finally:
                work.done = self.side.record_event()
                self.under_way.append((work.done, host))
        return work

    def _issue(self, move: _Move, host: list[torch.Tensor]) -> None:
        source = move.source
        if move.result is source:
            return
        if source.is_cpu:
            if not self._is_pinned(source):
                source = self._pin(source)
            host.append(source)
        if move.result is None:
            move.result = self._normalize_pinned(source, move.memory_format)
        elif move.memory_format is None:
            self._copy(source, move.result)
        else:
            self._normalize(self._upload(source), move.result, move.memory_format)

    def deliver(self, work: _Work) -> Any:
        """In the consumer's thread: its stream waits, the host does not."""
        stream = self.cuda.current_stream(self.device)
        stream.wait_event(work.done)
        results = iter(work.moves)

        def result(value: Any) -> Any:
            if is_image_batch(value) or _is_plain(value):
                move = next(results)
                assert move.result is not None
                if stream != work.consumer or self.direct:  # memory of another stream
                    self._keep_for(move.result, stream)
                return move.result
            return value.to(self.device) if callable(getattr(value, "to", None)) else value

        return map_leaves(result, work.batch)

    def abandon(self, work: _Work) -> None:
        """The results' memory goes back to the consumer's stream."""
        work.consumer.wait_event(work.done)

    def close(self) -> None:
        """Wait where a kernel still reads host memory: torch knows only of its own copies."""
        while self.under_way:
            done, _ = self.under_way.popleft()
            if self.direct:
                done.synchronize()

    # What touches memory, one step each.

    def _allocate(self, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)

    def _is_pinned(self, source: torch.Tensor) -> bool:
        # Copying what is not dense would go through ordinary memory, and block.
        return source.is_pinned() and _is_dense(source)

    def _pin(self, source: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(source, pin_memory=True).copy_(source)

    def _upload(self, source: torch.Tensor) -> torch.Tensor:
        return source.to(self.device, non_blocking=True)

    def _copy(self, source: torch.Tensor, result: torch.Tensor) -> None:
        result.copy_(source, non_blocking=True)

    def _normalize(self, images: torch.Tensor, result: torch.Tensor, memory_format: Any) -> None:
        options = {**self.options, "memory_format": memory_format}
        _convert_images(images, self.normalization, out=result, **options)

    def _normalize_pinned(self, source: torch.Tensor, memory_format: Any) -> torch.Tensor:
        normalization = self.normalization
        assert isinstance(normalization, Normalization)  # the constructor has seen to it
        return torch.ops.pixfuse.normalize_pinned(  # type: ignore[no-any-return]
            source,
            normalization.mean,
            normalization.std,
            normalization.rounding_code,
            LAYOUT_CODES[self.options["input_layout"]],
            DTYPE_CODES[self.options["dtype"]],
            MEMORY_FORMAT_CODES[memory_format],
            self.device.index,
        )

    def _keep_for(self, result: torch.Tensor, stream: Any) -> None:
        result.record_stream(stream)
