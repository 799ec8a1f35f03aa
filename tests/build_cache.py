"""Compiled files that tests need: made once for all test processes, kept while nothing changes."""

import contextlib
import fcntl
import hashlib
import os
import shlex
import subprocess
import time
from pathlib import Path

KEEP_SECONDS = 7 * 24 * 3600


PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # that run these tests


def jobs() -> int:
    """How many compilers one test process may run, so that all together have the whole machine."""
    return max(1, len(os.sched_getaffinity(0)) // PROCESSES)


def digest(*texts: str) -> str:
    """Of texts in this order: other texts have another one."""
    result = hashlib.sha256()
    for text in texts:
        result.update(text.encode() + b"\0")
    return result.hexdigest()[:16]


class BuildCache:
    """A folder of files, each named after what it is made of."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for path in folder.iterdir():
            # Another process has just finished, and thereby renamed, what was listed a moment ago.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > KEEP_SECONDS:
                    path.unlink()

    def make(self, name: str, command: list[str], source: str = "") -> Path:
        """The file of that name; a command makes it, if it is not there, from what it can read.

        Whoever wants a file that another process is making waits for it. The command is given the
        source on its standard input and the name of the file as `-o`.
        """
        result = self._folder / name
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                unfinished = result.with_name(f"{name}.unfinished")
                run = subprocess.run(
                    [*command, "-o", str(unfinished)],
                    input=source,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if run.returncode != 0:
                    raise RuntimeError(f"{shlex.join(run.args)}\n{run.stderr}")
                unfinished.replace(result)
        os.utime(result)
        return result
