"""Counts the images of files in worker processes, so that a run can be interrupted and go on.

Whatever the number of workers and ranks, and however often it was interrupted, the file that a run
leaves is the same: everything in it is a whole number, or sorted.
"""

from __future__ import annotations

import concurrent.futures
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixfuse._image_files import (
    ArrayPart,
    Found,
    ImageFile,
    Reading,
    Unreadable,
    UsageProblemError,
    Work,
    plan_work,
    read_array,
    read_image,
    reason_of,
    transform,
)
from pixfuse._output_files import writing
from pixfuse.statistics import ChannelStatistics, ImageCounts, _id_of

#: How many files a worker takes at a time, if there are many: fewer would cost more to pass on than
#: they take to decode, and more would leave workers idle at the end.
_LEAST_FILES, _MOST_FILES, _PIECES = 16, 128, 64


@dataclass
class Piece:
    """What came of one piece of work, or of many."""

    statistics: ChannelStatistics
    unreadable: list[Unreadable] = field(default_factory=list)
    decode_seconds: float = 0.0  # from files to pixels
    count_seconds: float = 0.0


@dataclass
class Outcome(Piece):
    """What came of a run."""

    complete: bool = False
    signal: int = 0  # what interrupted it
    resumed: int = 0  # images that were counted before
    skipped: int = 0
    seconds: float = 0.0


class NotReadableError(Exception):
    """A strict run met a file that cannot be read."""

    def __init__(self, unreadable: Unreadable) -> None:
        super().__init__(f"cannot read {unreadable.key}: {unreadable.reason}")


# ---- one piece of work ---------------------------------------------------------------------------


def count_piece(work: Work, reading: Reading, split: str, folds: int) -> Piece:
    """Decode and count some images: what a worker does."""
    piece = Piece(ChannelStatistics(split, folds))
    if isinstance(work, ArrayPart):
        try:
            _count_array(work, reading, piece)
        except Exception as error:  # whatever a damaged file leads to
            piece.statistics = ChannelStatistics(split, folds)  # what is listed does not count
            piece.unreadable.append(Unreadable(work.key, reason_of(error)))
    else:
        _count_files(work, reading, piece)
    return piece


def _count_files(
    files: Iterable[ImageFile], reading: Reading, piece: Piece, seconds: float = math.inf
) -> None:
    """All of them, or as many as are read in some time, but at least one."""
    start = time.perf_counter()
    end = start + seconds
    counts = ImageCounts(len(piece.statistics._parts))
    for file in files:
        try:
            image = read_image(file, reading)
        except Exception as error:  # whatever a damaged file leads a decoder to
            piece.unreadable.append(Unreadable(file.key, reason_of(error)))
            image = None
        decoded = time.perf_counter()
        piece.decode_seconds += decoded - start
        if image is not None:
            # At once and where it lies: it is in the cache still.
            counts.add(image, file.key)
        start = time.perf_counter()
        piece.count_seconds += start - decoded
        if start >= end:
            break
    piece.statistics._add_parts(counts.parts())
    piece.count_seconds += time.perf_counter() - start


def _count_array(part: ArrayPart, reading: Reading, piece: Piece) -> None:
    start = time.perf_counter()
    for keys, batch in read_array(part):
        images: Any = batch
        if reading.resize is not None or reading.crop is not None:
            images = [transform(_image_of(array), reading) for array in batch]
        piece.decode_seconds += time.perf_counter() - start
        _update(piece, images, keys)
        start = time.perf_counter()


def _update(piece: Piece, images: Any, keys: list[str]) -> None:
    start = time.perf_counter()
    if isinstance(images, np.ndarray):
        piece.statistics.update(images, "NHWC", keys)
    else:
        piece.statistics.update(images, keys=keys)
    piece.count_seconds += time.perf_counter() - start


def _image_of(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))


# ---- workers -------------------------------------------------------------------------------------

#: What reaches every process of a terminal's or a scheduler's group, and is for the parent alone.
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While in force, the first SIGINT or SIGTERM is noted; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _GROUP_SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


def _start_fork_server() -> None:
    """Start what workers are forked from, with the signals of groups blocked, as in its children.

    It imports torch for seconds before it could ask for that itself.
    """
    # Of its own accord the server would start it first, and Python 3.11 unblocks signals there.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Leaves the signals of groups to the parent, and does not outlive it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    threading.Thread(target=_end_when_told_by, args=(parent.pid,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _end_when_told_by(parent: int) -> None:
    """The pool ends its workers by SIGTERM when one of them has died."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(1)


class _Deaths:
    """Notices a worker that died in the middle of a message, for whose end the pool would wait."""

    #: A pool that can tell that itself does so sooner.
    patience_seconds = 5.0

    def __init__(self, pool: concurrent.futures.ProcessPoolExecutor) -> None:
        self._pool = pool
        self._since: float | None = None  # when somebody was first found dead

    def look(self) -> None:
        """While nothing arrives."""
        workers = list((self._pool._processes or {}).values())
        living = [worker for worker in workers if worker.is_alive()]
        if len(living) == len(workers):
            return
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since < self.patience_seconds:
            return
        # Without anybody left who could write it, the message ends, and the pool is broken.
        for worker in living:
            worker.kill()
        self._pool._result_queue._writer.close()  # type: ignore[attr-defined]


def _in_workers(
    work: list[Work], workers: int, interruption: Interruption, *how: Any
) -> Generator[Piece, None, None]:
    """The results of all pieces, in the order in which they are finished."""
    # Not forked from here, where torch and gloo have threads; imported once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_fork_server()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker)
    deaths = _Deaths(pool)
    waiting = iter(work)
    pending: set[concurrent.futures.Future[Piece]] = set()
    try:
        while True:
            if interruption.signal:  # what has begun is waited for
                waiting = iter(())
                pending = {future for future in pending if not future.cancel()}
            while len(pending) < 4 * workers and (piece := next(waiting, None)) is not None:
                pending.add(pool.submit(count_piece, piece, *how))
            if not pending:
                return
            done, pending = concurrent.futures.wait(
                pending, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                yield future.result()
            if not done:
                deaths.look()
    finally:
        pool.shutdown(cancel_futures=True)


#: How long a process takes files for before it says what it has counted, if nobody else does.
_PIECE_SECONDS = 0.2


def _here(
    work: list[Work], interruption: Interruption, reading: Reading, split: str, folds: int
) -> Generator[Piece, None, None]:
    """The results of this process: of files, some at a time, whichever pieces they were cut to."""
    arrays = [one for one in work if isinstance(one, ArrayPart)]
    files = itertools.chain.from_iterable(one for one in work if not isinstance(one, ArrayPart))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers: one image is not worth waking the others for
    try:
        while not interruption.signal:
            piece = Piece(ChannelStatistics(split, folds))
            _count_files(files, reading, piece, _PIECE_SECONDS)
            if piece.statistics.images + len(piece.unreadable) == 0:
                break
            yield piece
        for array in arrays:
            if interruption.signal:
                return
            yield count_piece(array, reading, split, folds)
    finally:
        torch.set_num_threads(threads)


class _Sum:
    """Adds up statistics in pairs of like size, so that many small ones cost little."""

    def __init__(self, split: str, folds: int) -> None:
        self._empty = ChannelStatistics(split, folds)
        self._sums: list[tuple[int, ChannelStatistics]] = []

    def add(self, statistics: ChannelStatistics) -> None:
        size = max(statistics.images, 1)
        while self._sums and self._sums[-1][0] <= size:
            before, other = self._sums.pop()
            statistics, size = other + statistics, before + size
        self._sums.append((size, statistics))

    def total(self) -> ChannelStatistics:
        total = self._empty
        for _, statistics in reversed(self._sums):
            total = total + statistics
        return total


# ---- ranks ---------------------------------------------------------------------------------------


def number_of(
    variable: str, least: int, most: int | None = None, default: int | None = None
) -> int:
    """The number in an environment variable that torchrun sets."""
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise UsageProblemError(
            f"expected the environment variable {variable} to be a whole number {bounds}, got "
            f"{'none' if text is None else repr(text)}; start it with torchrun, or unset "
            "WORLD_SIZE and LOCAL_WORLD_SIZE"
        )
    return number


class Ranks:
    """The processes that share the work, as torchrun starts them; without it this one alone."""

    def __init__(self) -> None:
        self.size = number_of("WORLD_SIZE", 1, default=1)
        self.rank = number_of("RANK", 0, self.size - 1) if self.size > 1 else 0

    def __enter__(self) -> Ranks:
        if self.size > 1:
            # A rank may wait long for the one that got the largest images.
            timeout = timedelta(days=7)
            try:
                torch.distributed.init_process_group("gloo", timeout=timeout)
            except ValueError as error:  # where to meet is in variables too
                raise UsageProblemError(
                    f"expected the environment variables of torchrun, got: {error}; start it with "
                    "torchrun, or unset WORLD_SIZE"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            torch.distributed.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in each of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


# ---- files ---------------------------------------------------------------------------------------


def save_run(path: Path, outcome: Piece, reading: Reading, complete: bool) -> None:
    """Write the statistics, and what a later run has to know, in one step.

    ``ChannelStatistics.load`` reads the file, finished or not.
    """
    content = outcome.statistics._to_dict()
    content["run"] = {
        "complete": complete,
        "reading": asdict(reading),
        "unreadable": [one._asdict() for one in sorted(set(outcome.unreadable))],
    }
    with writing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _load_run(path: Path, reading: Reading, split: str, folds: int) -> ChannelStatistics:
    """What an earlier run counted, if it read images as this one does."""
    what = f"expected {str(path)!r}"
    try:
        content = json.loads(path.read_text())
        statistics = ChannelStatistics._from_dict(content, what)
        run = content.get("run")
        before = run.get("reading") if isinstance(run, dict) else None
        if not isinstance(before, dict):
            raise ValueError("no record of a run")  # as ChannelStatistics.save leaves none
    except (OSError, RecursionError, ValueError) as error:
        raise UsageProblemError(
            f"{what} to be from an earlier run of pixfuse stats, got: {error}; choose another "
            "--output, or leave out --resume to replace it"
        ) from None
    now = {**asdict(reading), "split": split, "folds": folds}
    before = {**before, "split": statistics.split, "folds": len(statistics._parts)}
    for name, value in now.items():
        if before.get(name) != value:
            raise UsageProblemError(
                f"{what} to be from a run with the same --{name}, got {before.get(name)!r} there "
                f"and {value!r} now; pass the same, or another --output"
            )
    return statistics


def rank_file(output: Path, rank: int) -> Path:
    """Where a rank leaves what it counted, until all are ready."""
    return output.with_name(f"{output.name}.rank{rank}")


def _rank_files(output: Path) -> list[tuple[int, Path]]:
    found = []
    for path in output.parent.glob(f"{glob.escape(output.name)}.rank*"):
        number = path.name.rpartition(".rank")[2]
        if number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def _earlier(
    output: Path, ranks: Ranks, reading: Reading, split: str, folds: int
) -> ChannelStatistics:
    """What this rank goes on from: its own file; the first one takes all that is left over."""
    files = [path for rank, path in _rank_files(output) if rank == ranks.rank]
    if ranks.rank == 0:
        files += [path for rank, path in _rank_files(output) if rank >= ranks.size]
        files += [output] if output.exists() else []
    total = ChannelStatistics(split, folds)
    loaded = [_load_run(path, reading, split, folds) for path in files]
    for statistics in sorted(loaded, key=lambda one: -one.images):
        ids, known = statistics._ids(), total._ids()
        if ids <= known:  # it went on from this one
            continue
        if ids & known:
            raise UsageProblemError(
                f"expected the files {str(output)!r} and {output.name}.rank* to be from one run, "
                "got files that overlap; remove them to start again"
            )
        total = total + statistics
    return total


# ---- a run ---------------------------------------------------------------------------------------


def count_all(
    found: Found,
    reading: Reading,
    *,
    split: str,
    folds: int,
    workers: int,
    output: Path | None,
    resume: bool,
    strict: bool,
    save_every: float,
    ranks: Ranks,
    progress: Callable[[int, int, int], None],
) -> Outcome:
    """Count all images that were found, going on from what ``output`` holds if ``resume``.

    Args:
        found: the images; the same on every rank.
        reading: how to read them.
        split: the name for what is counted.
        folds: in how many parts to keep the counts.
        workers: processes that decode; 0 for none but this one.
        output: where the statistics go, unfinished ones too.
        resume: whether to go on from there.
        strict: whether an unreadable file ends the run.
        save_every: seconds between saves, and more where saving takes long.
        ranks: who shares the work.
        progress: is called with images to do on this rank, done, and unreadable.

    Raises:
        UsageProblemError: ``output`` is from another run.
        NotReadableError: a file is unreadable, and ``strict``.
        NotWrittenError: ``output`` cannot be written.
    """
    began = time.perf_counter()
    _check_same_images(found, ranks)
    sums = _Sum(split, folds)
    outcome = Outcome(ChannelStatistics(split, folds), skipped=found.skipped)
    counted: set[int] = set()
    if output is not None and resume:
        earlier = _earlier(output, ranks, reading, split, folds)
        sums.add(earlier)
        counted = set().union(*ranks.gather(earlier._ids()))
        if sum(ranks.gather(earlier.images)) != len(counted):
            raise UsageProblemError(
                "expected the ranks' files to be from one run, got files that overlap; remove "
                f"{str(output)!r} and {output.name}.rank* to start again"
            )
        outcome.resumed = len(counted)
    if output is not None and not resume and ranks.rank == 0:
        for _, path in _rank_files(output):
            path.unlink()
    ranks.gather(None)  # nobody writes before all have read
    work = _work_left(found, reading, counted, output)[ranks.rank :: ranks.size]
    outcome.unreadable = list(found.unreadable)
    if strict and outcome.unreadable:
        raise NotReadableError(outcome.unreadable[0])
    place = output if output is None or ranks.size == 1 else rank_file(output, ranks.rank)

    def save(complete: bool) -> None:
        outcome.statistics = sums.total()
        if place is not None:
            save_run(place, outcome, reading, complete)

    todo = sum(len(w) if isinstance(w, list) else w.stop - w.start for w in work)
    ready = 0
    progress(todo, 0, len(outcome.unreadable))
    next_save = time.perf_counter() + save_every
    failed: NotReadableError | None = None
    with Interruption() as interruption:
        how = (reading, split, folds)
        pieces = (
            _in_workers(work, workers, interruption, *how)
            if workers > 0
            else _here(work, interruption, *how)
        )
        try:
            for piece in pieces:
                sums.add(piece.statistics)
                outcome.unreadable += piece.unreadable
                outcome.decode_seconds += piece.decode_seconds
                outcome.count_seconds += piece.count_seconds
                ready += piece.statistics.images + len(piece.unreadable)
                progress(todo, ready, len(outcome.unreadable))
                if strict and piece.unreadable:
                    failed = NotReadableError(piece.unreadable[0])
                    break
                now = time.perf_counter()
                if place is not None and now >= next_save:
                    save(complete=False)
                    saved = time.perf_counter()
                    next_save = saved + max(save_every, 20 * (saved - now))
        finally:
            pieces.close()
            save(complete=False)
        outcome.signal = interruption.signal
    if failed is not None:
        raise failed
    if outcome.signal:
        outcome.seconds = time.perf_counter() - began
        return outcome
    _combine(outcome, ranks)
    if output is not None:
        if ranks.rank == 0:
            save_run(output, outcome, reading, complete=True)
        ranks.gather(None)
        if ranks.rank == 0:
            for _, path in _rank_files(output):
                path.unlink(missing_ok=True)
        rank_file(output, ranks.rank).unlink(missing_ok=True)
    outcome.complete = True
    outcome.seconds = time.perf_counter() - began
    return outcome


def _work_left(
    found: Found, reading: Reading, counted: set[int], output: Path | None
) -> list[Work]:
    """The pieces of all ranks, without the images that were counted before."""
    missing = set(counted)

    def done(key: str) -> bool:
        if not counted:
            return False
        number = _id_of(key)
        missing.discard(number)
        return number in counted

    files_each = min(max(len(found.files) // _PIECES, _LEAST_FILES), _MOST_FILES)
    work = plan_work(found, reading, done, files_each)
    if missing:
        raise UsageProblemError(
            f"expected all images that {str(output)!r} counted to be there still, got "
            f"{len(missing)} that are not; leave out --resume to count afresh"
        )
    return work


def _check_same_images(found: Found, ranks: Ranks) -> None:
    names = [file.key for file in found.files]
    names += [f"{part.key} {part.layout} {part.stop}" for part, _ in found.arrays]
    digests = ranks.gather(_digest(names))
    if len(set(digests)) > 1:
        raise UsageProblemError(
            "expected every rank to find the same images, got different names on ranks 0 and "
            f"{next(r for r, digest in enumerate(digests) if digest != digests[0])}"
        )


def _digest(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _combine(outcome: Outcome, ranks: Ranks) -> None:
    """Every rank has the results of all."""
    if ranks.size > 1:
        outcome.statistics.all_reduce()
        outcome.unreadable = [one for part in ranks.gather(outcome.unreadable) for one in part]
        outcome.decode_seconds = sum(ranks.gather(outcome.decode_seconds))
        outcome.count_seconds = sum(ranks.gather(outcome.count_seconds))
    outcome.unreadable = sorted(set(outcome.unreadable))
