"""First equal, then timed.

Only a ``Checked`` contestant can be timed, and a ``Checked`` comes into being by running the
contestant and comparing its result with the expected one. So no number can be recorded for a
result that was not checked in the same process, on the same data.
"""

from __future__ import annotations

import datetime as dt
import gc
import hashlib
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Integer types for comparing bit for bit: -0.0 is not 0.0, and a NaN equals itself.
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# Results are compared piece by piece, so that the comparison needs little memory.
_COMPARED_ELEMENTS = 1 << 22


class UnequalError(Exception):
    """A contestant's result is not what it should be."""


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the expected one, and why. 0 means equal bit for bit."""

    max_error: float
    reason: str


BIT_EQUAL = Tolerance(0.0, "the same bits")


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    ``call`` is what is timed. ``target`` is the preallocated buffer that ``call`` must fill, if it
    has one. ``output`` says where the result lives: "recycled" (in ``target``), "fresh" (allocated
    by each call) or "own pool" (the library reuses its own memory). ``around`` is entered before
    and left after each sample, outside the clock. ``as_tensor`` turns what ``call`` returns into
    a tensor, outside the clock too.
    """

    name: str
    call: Callable[[], Any]
    output: str = "fresh"
    target: torch.Tensor | None = None
    tolerance: Tolerance = BIT_EQUAL
    as_tensor: Callable[[Any], torch.Tensor] = lambda result: result
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Checked:
    """A contestant whose result was compared with ``expected``; raises UnequalError otherwise."""

    def __init__(self, contestant: Contestant, expected: torch.Tensor) -> None:
        self.contestant = contestant
        self.max_error = _check(contestant, expected)


class Rotated(Checked):
    """Checked contestants that do the same work on different buffers, called in turn.

    With enough of them a cache that is larger than one batch (a GPU's) cannot hold their data.
    """

    def __init__(self, turns: Sequence[Checked]) -> None:
        calls = itertools.cycle([turn.contestant.call for turn in turns])

        def call_the_next() -> Any:
            return next(calls)()

        self.contestant = replace(turns[0].contestant, call=call_the_next)
        self.max_error = max(turn.max_error for turn in turns)


def _check(contestant: Contestant, expected: torch.Tensor) -> float:
    target = contestant.target
    if target is not None:  # whoever does not write cannot pass with what stood there before
        target.fill_(float("nan") if target.is_floating_point() else 0)
    with contestant.around():
        result = contestant.as_tensor(contestant.call())
    for what, got, wanted in (
        ("shape", result.shape, expected.shape),
        ("dtype", result.dtype, expected.dtype),
        ("strides", _strides(result), _strides(expected)),
        ("device", result.device, expected.device),
    ):
        if got != wanted:
            raise UnequalError(f"{contestant.name}: expected {what} {wanted}, got {got}")
    if target is not None and result.data_ptr() != target.data_ptr():
        raise UnequalError(f"{contestant.name}: the result is not in the buffer it was given")
    max_error = _max_error(result, expected)
    if not max_error <= contestant.tolerance.max_error:
        raise UnequalError(
            f"{contestant.name}: expected {contestant.tolerance.max_error:g} or less as the largest"
            f" difference ({contestant.tolerance.reason}), got {max_error:g}"
        )
    return max_error


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of the axes that have more than one element: those of the others mean nothing."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride for size, stride in pairs if size > 1)


def _max_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; 0 only when the bits are the same, and infinite for a NaN."""
    bits = _BITS[result.element_size()]
    per_piece = max(1, _COMPARED_ELEMENTS * len(result) // max(1, result.numel()))
    worst = 0.0
    for a, b in zip(result.split(per_piece), expected.split(per_piece), strict=True):
        if torch.equal(a.view(bits), b.view(bits)):
            continue
        difference = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"))
        # Different bits of equal value (the two zeros) are not "the same bits".
        worst = max(worst, difference.max().item(), float(np.finfo(np.float64).tiny))
    return worst


Clock: TypeAlias = Callable[[Callable[[], Any], int], float]


def wall_clock(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call. Each result dies when the next one exists, as in a training loop."""
    result = call()  # not timed: brings caches and buffers to the state that a loop keeps them in
    start = time.perf_counter_ns()
    for _ in range(calls):
        result = call()
    elapsed_ns = time.perf_counter_ns() - start
    del result
    return elapsed_ns / calls * 1e-9


def device_clock(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call on the GPU alone: it is kept busy until all calls are in its queue."""
    result = call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(calls * _QUEUEING_CYCLES)
    start.record()
    for _ in range(calls):
        result = call()
    end.record()
    end.synchronize()
    del result
    return float(start.elapsed_time(end)) / calls * 1e-3


# A clock cycle is about half a nanosecond; the slowest peers need some 50 us to queue their work.
_QUEUEING_CYCLES = 160_000


def synchronized_clock(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call as Python sees it, when it waits for the GPU only at the end."""
    result = call()
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(calls):
        result = call()
    torch.cuda.synchronize()
    elapsed_ns = time.perf_counter_ns() - start
    del result
    return elapsed_ns / calls * 1e-9


@dataclass(frozen=True)
class Plan:
    """How long to measure: ``rounds`` samples of each contestant, each at least this long.

    When a round would take long, fewer rounds are made, but not fewer than ``least_rounds``.
    """

    rounds: int = 9
    sample_seconds: float = 4e-3
    budget_seconds: float = 2.0
    least_rounds: int = 3
    most_calls: int = 1 << 16
    clock: Clock = wall_clock


@dataclass(frozen=True)
class Timing:
    """What one contestant took; made by ``measure`` alone."""

    checked: Checked
    samples_seconds: tuple[float, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.checked.contestant.name

    @property
    def median_us(self) -> float:
        return float(np.median(self.samples_seconds)) * 1e6

    def quartiles_us(self) -> list[float]:
        """Of one call, in microseconds."""
        return quartiles(1e6 * np.asarray(self.samples_seconds))


def quartiles(values: Any) -> list[float]:
    """25 %, 50 % and 75 %, with as many digits as mean something."""
    return [float(f"{quantile:.4g}") for quantile in np.quantile(values, (0.25, 0.5, 0.75))]


def measure(contestants: Sequence[Checked], plan: Plan = Plan(), seed: int = 0) -> list[Timing]:
    """Time all contestants in rounds; each round runs every one of them, in a new order."""
    order = random.Random(seed)
    calls = [_calls_per_sample(checked, plan) for checked in contestants]
    samples: list[list[float]] = [[] for _ in contestants]
    started = time.perf_counter()
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_number in range(plan.rounds):
            late = time.perf_counter() - started > plan.budget_seconds
            if late and round_number >= plan.least_rounds:
                break
            for i in order.sample(range(len(contestants)), len(contestants)):
                samples[i].append(_sample(contestants[i], plan.clock, calls[i]))
    finally:
        if was_enabled:
            gc.enable()
    return [
        Timing(checked, tuple(seconds))
        for checked, seconds in zip(contestants, samples, strict=True)
    ]


def _calls_per_sample(checked: Checked, plan: Plan) -> int:
    calls = 1
    while calls < plan.most_calls:
        seconds = _sample(checked, plan.clock, calls)
        if seconds * calls >= plan.sample_seconds / 4:
            return min(plan.most_calls, round(plan.sample_seconds / seconds + 0.5))
        calls *= 4
    return plan.most_calls


def _sample(checked: Checked, clock: Clock, calls: int) -> float:
    with checked.contestant.around():
        return clock(checked.contestant.call, calls)


# ---- what is written beside the numbers ----------------------------------------------------------


def environment(packages: Sequence[str], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Machine, versions and commit. Neither paths nor the machine's name."""
    commit = output_of("git", "rev-parse", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(sys.argv if argv is None else argv),
        "commit": commit,
        "dirty": None if commit is None else bool(changed),
        "sources_sha256": _sources_sha256(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions(packages)},
    }


def _sources_sha256() -> str:
    """Names what was measured where no git is: on a machine that only got a copy of the files."""
    digest = hashlib.sha256()
    for folder in ("csrc", "python", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".cpp", ".cu", ".h", ".py"}:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """The processor as the kernel describes it."""
    lines = (output_of("lscpu") or "").splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu.get("Model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "family_model_stepping": "/".join(
            cpu.get(key, "?") for key in ("CPU family", "Model", "Stepping")
        ),
        "cores": len(os.sched_getaffinity(0)),
        "caches": {name: cpu[name] for name in sorted(cpu) if name.endswith(" cache")},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "transparent_huge_pages": _chosen(huge_pages.read_text()) if huge_pages.exists() else None,
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON with one line per point, so that a diff of two runs can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
            lines.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _command(argv: Sequence[str]) -> str:
    """The command as it would be typed in the repository."""
    path = Path(argv[0]).resolve()
    if path.is_relative_to(ROOT):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        first = "python -m " + module.removesuffix(".__main__")
    else:
        first = path.name
    arguments = (
        str(Path(argument).resolve().relative_to(ROOT))
        if Path(argument).is_absolute() and Path(argument).is_relative_to(ROOT)
        else Path(argument).name
        if Path(argument).is_absolute()
        else argument
        for argument in argv[1:]
    )
    return " ".join([first, *arguments])


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return package_metadata.version(package)
        except package_metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in packages}


def _chosen(options: str) -> str:
    """The word in brackets: ``always [madvise] never`` -> ``madvise``."""
    return options.partition("[")[2].partition("]")[0]


def output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
