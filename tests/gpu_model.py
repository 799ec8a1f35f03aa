"""A GPU on the CPU: streams, events and memory that is used again, in the worst allowed order.

Nothing runs when it is issued. It runs later, in an order drawn at random, as far as streams and
events allow, with some streams far behind others. Memory that a tensor leaves is handed out again
at once, as torch's allocator does within a stream. So whatever an ordering forgets to say shows in
the results.
"""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pixfuse.loader import DeviceLoader, _CudaLine


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.done = False

    def synchronize(self) -> None:
        self.gpu.run_until(lambda: self.done)


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.queue: deque[Callable[[], object] | Event] = deque()
        self.speed = gpu.random.choice([1, 30])

    def issue(self, work: Callable[[], object]) -> None:
        with self.gpu.lock:
            self.queue.append(work)

    def record_event(self) -> Event:
        event = Event(self.gpu)
        self.issue(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        with self.gpu.lock:
            self.queue.append(event)


class Gpu:
    """What `_CudaLine` uses of torch.cuda, and the machine behind it."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.local = threading.local()
        self.Stream = self.new_stream
        self.default = self.new_stream()
        self.free: dict[int, list[torch.Tensor]] = {}
        self.allocated = 0
        self.pinned_alive = 0
        self.pinned_peak = 0

    # As torch.cuda has them.

    def new_stream(self, device: Any = None) -> Stream:
        stream = Stream(self)
        self.streams.append(stream)
        return stream

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: Any = None) -> Stream:
        stream: Stream = getattr(self.local, "stream", self.default)
        return stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self.local.stream = stream
        try:
            yield
        finally:
            self.local.stream = before

    # The machine.

    def _step(self) -> bool:
        """Runs one thing at the head of some stream; False where nothing can run."""
        ready = [
            stream
            for stream in self.streams
            if stream.queue
            and (stream.queue[0].done if isinstance(stream.queue[0], Event) else True)
        ]
        if not ready:
            return False
        (stream,) = self.random.choices(ready, [stream.speed for stream in ready])
        work = stream.queue.popleft()
        if not isinstance(work, Event):
            work()
        return True

    def run_until(self, done: Callable[[], bool]) -> None:
        with self.lock:
            while not done():
                assert self._step(), "a wait that nothing can end"

    def run_some(self) -> None:
        with self.lock:
            for _ in range(self.random.randrange(4)):
                self._step()

    def run_all(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))

    def memory(self, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the consumer's stream: what was freed on the host may still be in use there."""
        elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        nbytes = elements * dtype.itemsize
        with self.lock:
            blocks = self.free.setdefault(nbytes, [])
            if blocks:
                block = blocks.pop()
            else:
                block = torch.zeros(nbytes, dtype=torch.uint8)
                self.allocated += 1
        tensor = block.view(dtype).as_strided(shape, strides)
        weakref.finalize(tensor, blocks.append, block)
        return tensor

    def pinned(self, source: torch.Tensor) -> torch.Tensor:
        """Host memory that is gone at once when it is dropped."""
        tensor = source.clone()
        raw = tensor.detach()
        with self.lock:
            self.pinned_alive += 1
            self.pinned_peak = max(self.pinned_peak, self.pinned_alive)

        def vanish() -> None:
            raw.fill_(111)
            with self.lock:
                self.pinned_alive -= 1

        weakref.finalize(tensor, vanish)
        return tensor


class Line(_CudaLine):
    """The CUDA path, every step of it that touches memory issued to the model."""

    def __init__(self, owner: DeviceLoader, gpu: Gpu) -> None:
        self.cuda = gpu
        super().__init__(owner)

    def _issue_step(self, step: Callable[[], object]) -> None:
        self.cuda.current_stream().issue(step)
        self.cuda.run_some()

    def _allocate(self, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        memory: torch.Tensor = self.cuda.memory(shape, strides, dtype)
        return memory

    def _is_pinned(self, source: torch.Tensor) -> bool:
        return False

    def _pin(self, source: torch.Tensor) -> torch.Tensor:
        pinned: torch.Tensor = self.cuda.pinned(source)
        return pinned

    def _upload(self, source: torch.Tensor) -> torch.Tensor:
        on_gpu = torch.empty_like(source)
        # torch's allocator keeps pinned memory until torch's own copies have read it.
        self._issue_step(lambda: on_gpu.copy_(source))
        return on_gpu

    def _copy(self, source: torch.Tensor, result: torch.Tensor) -> None:
        raw = result.detach()  # a stream keeps no tensor alive
        self._issue_step(lambda: raw.copy_(source))

    def _normalize(self, images: torch.Tensor, result: torch.Tensor, memory_format: Any) -> None:
        super()._normalize(images[:0], result[:0], memory_format)  # its checks
        raw = result.detach()
        self._issue_step(lambda: super(Line, self)._normalize(images, raw, memory_format))

    def _normalize_pinned(self, source: torch.Tensor, memory_format: Any) -> torch.Tensor:
        raw = source.detach()  # and nobody but us knows of this kernel
        result = torch.empty(source.shape, dtype=self.options["dtype"])
        self._issue_step(lambda: super(Line, self)._normalize(raw, result, memory_format))
        return result

    def _keep_for(self, result: torch.Tensor, stream: Any) -> None:
        self.kept = result, stream
