"""Other processes: fresh interpreters, forked children, and what a process holds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# How long to wait for what takes a moment on an idle machine. It is less than a test may take, so
# that what never comes fails where it is waited for.
PATIENCE_SECONDS = 200


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter with some environment variables changed."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def wait_for(child: int) -> int:
    """The exit code of a forked child, which is killed if it does not end."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def torch_files() -> set[str]:
    """Shared memory of torch that has a name."""
    return {path.name for path in Path("/dev/shm").glob("torch_*")}


def torch_files_left(before: set[str]) -> set[str]:
    """What has stayed since then: other test processes make such files too, for moments."""
    left = torch_files() - before
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.005)
        left &= torch_files()
    return left


def shared_mappings() -> int:
    """Pieces of torch's shared memory that this process can see, named or not."""
    return Path("/proc/self/maps").read_text().count("/dev/shm/torch_")


def resident_bytes(kind: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(kind)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
