"""Shared memory in which workers hand over batches, used again once the other process is done.

Fresh shared memory costs several times what writing a batch takes. So a worker keeps a few blocks.
A block is free when nothing in the worker looks at it, and when the process that it was last sent
to has dropped all that looked at it there: then that process writes the number of the sending into
the last bytes of the block. That process keeps it mapped, too, as long as there is the worker.
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing import process
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from pixfuse._library import dense_strides

#: Behind the batch: the number of the sending whose batch was dropped last.
_TRAILER_BYTES = 64
#: Of a worker. A batch needs one per image of a sample, and a few batches are under way; what a
#: consumer holds beyond that is left to torch.
_MOST_BLOCKS = 16

_blocks: list[_Block] = []
_owner = 0
# Whoever takes it has seen everything before, and shows everything before: a fence.
_fence = threading.RLock()


def _renew_fence() -> None:
    """In a fork: the thread that may have held the fence is not there to let go of it."""
    global _fence  # noqa: PLW0603
    _fence = threading.RLock()


os.register_at_fork(after_in_child=_renew_fence)


class SharedTensor(torch.Tensor):
    """A tensor in a block; all that is computed from it is an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    block: _Block | None = None

    # Copies are not in the block.

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return copy.deepcopy(self.plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def plain(self) -> torch.Tensor:
        """The same memory as an ordinary tensor, a leaf where this is one."""
        if self.is_leaf:  # as_subclass() would make another of it, which torch does not send
            return self.detach().requires_grad_(self.requires_grad)
        return self.as_subclass(torch.Tensor)


class _Block:
    """A piece of shared memory, as the worker that made it sees it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.storage = torch.UntypedStorage._new_shared(nbytes + _TRAILER_BYTES, device="cpu")
        self.trailer = _trailer(self.storage, nbytes)
        self.trailer[0] = 0
        self.sent = 0
        self.in_use_here = False

    def is_free(self) -> bool:
        with _fence:
            return not self.in_use_here and int(self.trailer[0]) == self.sent

    def drop(self) -> None:
        self.in_use_here = False


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _TRAILER_BYTES) * _TRAILER_BYTES


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()


def _trailer(storage: torch.UntypedStorage, nbytes: int) -> np.ndarray:
    return _bytes_of(storage)[nbytes : nbytes + 8].view(np.int64)


def _tensor(
    storage: torch.UntypedStorage,
    nbytes: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    dropped: Callable[..., None],
    *arguments: object,
) -> torch.Tensor:
    """A tensor on that memory; ``dropped`` is called when nothing looks at it any more."""
    window = _bytes_of(storage)[:nbytes]  # a new object, which the tensor's storage keeps
    weakref.finalize(window, dropped, *arguments).atexit = False
    whole: Any = torch.from_numpy(window).untyped_storage()
    # share_memory_() and queues put other memory under the storage, and arrays that look at the
    # window stay. They keep the tensor, so the storage, and with it what hangs on its object.
    whole.window = window
    return torch.empty(0, dtype=dtype, device="cpu").set_(whole, 0, shape, strides)


def shared_output(
    shape: tuple[int, int, int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> torch.Tensor:
    """Uninitialized shared memory for a batch that will be sent to another process."""
    strides = dense_strides(shape, memory_format is torch.channels_last)
    needed = dtype.itemsize * shape[0] * shape[1] * shape[2] * shape[3]
    with _fence:  # a worker may have threads of its own
        block = _free_block(_round_up(needed))
        if block is not None:
            block.in_use_here = True
    if block is None:  # as torch's own collate does it
        storage = torch.UntypedStorage._new_shared(needed, device="cpu")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)
    plain = _tensor(block.storage, block.nbytes, shape, strides, dtype, block.drop)
    tensor = plain.as_subclass(SharedTensor)
    tensor.block = block
    return tensor


def _free_block(nbytes: int) -> _Block | None:
    """A block of that size, an old one if possible; None where torch should do it."""
    global _owner  # noqa: PLW0603
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":
        return None
    if _owner != os.getpid():  # a fork: these blocks are its parent's
        _owner = os.getpid()
        _blocks.clear()
    free = [block for block in _blocks if block.is_free()]
    # The last batch of an epoch may be smaller.
    fitting = [block for block in free if nbytes <= block.nbytes <= 2 * nbytes]
    if fitting:
        return min(fitting, key=lambda block: block.nbytes)
    if len(_blocks) == _MOST_BLOCKS:
        if not free:
            return None
        _blocks.remove(free[0])
    _blocks.append(_Block(nbytes))
    return _blocks[-1]


def _reduce(tensor: SharedTensor) -> Any:
    """In the worker: what travels."""
    block = tensor.block
    if (
        block is None
        or block.storage.data_ptr() != tensor.data_ptr()
        or tensor.requires_grad
        or block not in _blocks
    ):
        return reduce_tensor(tensor.plain())
    if int(block.trailer[0]) != block.sent:
        _blocks.remove(block)  # on its way twice: nobody could tell when both are done
    block.sent += 1
    return _rebuild, (
        block.storage,
        block.nbytes,
        block.sent,
        os.getpid(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


ForkingPickler.register(SharedTensor, _reduce)


def _rebuild(
    storage: torch.UntypedStorage,
    nbytes: int,
    number: int,
    worker: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """In the process that receives it: an ordinary tensor."""
    _keep_mapped(storage, worker)
    give_back = (_trailer(storage, nbytes), number, os.getpid())
    return _tensor(storage, nbytes, shape, strides, dtype, _give_back, *give_back)


#: Of each worker of this process: its blocks as they are mapped here, the latest last.
_mapped: weakref.WeakKeyDictionary[process.BaseProcess, OrderedDict[int, torch.UntypedStorage]] = (
    weakref.WeakKeyDictionary()
)


def _keep_mapped(storage: torch.UntypedStorage, pid: int) -> None:
    """Keep a block mapped that will be received again; torch finds it there by its file.

    A mapping of its own for each batch would go with the batch, and the next one would find its
    pages one page fault after the other: that can take as long as reading what is on them. The
    memory is the worker's until it ends, and by then its process object is gone.
    """
    children = tuple(getattr(process, "_children", ()))  # active_children() would wait for the dead
    worker = next((child for child in children if child.pid == pid), None)
    if worker is None:  # of somebody else
        return
    with _fence:  # a thread may pin memory
        blocks = _mapped.setdefault(worker, OrderedDict())
        blocks[storage.data_ptr()] = storage
        blocks.move_to_end(storage.data_ptr())
        if len(blocks) > _MOST_BLOCKS:  # the worker has given up the one that came last long ago
            blocks.popitem(last=False)


def _give_back(trailer: np.ndarray, number: int, receiver: int) -> None:
    if os.getpid() == receiver:  # and not in a fork of it, which shares the memory
        with _fence:
            trailer[0] = number
