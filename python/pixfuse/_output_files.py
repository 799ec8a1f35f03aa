"""Files that take the place of what was there before in one step, when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


class NotWrittenError(Exception):
    """A file could not be written; what was there before is there still."""


def unfinished_of(path: Path) -> Path:
    """Where a file is written until it is whole: beside its place, by this process alone."""
    return path.with_name(f"{path.name}.unfinished{os.getpid()}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """What to write instead of ``path``, whose place it takes at the end; on an error it is gone.

    Raises:
        OSError: it cannot be written, or ``path`` is a device, a pipe or a folder, which a file is
            not to take the place of.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    unfinished = unfinished_of(path)
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """As :func:`replacing`, for the command line.

    Raises:
        NotWrittenError: the file cannot be written; it says why.
    """
    try:
        with replacing(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise NotWrittenError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
