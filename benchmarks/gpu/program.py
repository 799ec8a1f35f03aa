"""What the programs that time on a GPU share: options, plans, buffers, and the file of results.

A machine with a GPU is lent for minutes. So the file is written anew after each point, and a point
that fails is noted in it and does not stop the others: whatever ends the program early, what was
measured until then is there.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import pixfuse
from benchmarks import harness, report
from benchmarks.harness import Checked, Contestant, Plan, Rotated, UnequalError
from benchmarks.peers import Case

DEVICE_PLAN = Plan(
    rounds=9,
    sample_seconds=1e-3,
    budget_seconds=1.5,
    most_calls=64,
    clock=harness.device_clock,
)
PYTHON_PLAN = replace(DEVICE_PLAN, rounds=5, budget_seconds=0.5, clock=harness.synchronized_clock)
TRY_OUT_PLAN = Plan(rounds=3, sample_seconds=1e-3, budget_seconds=0.2)

Point = TypeVar("Point")

console = report.console


def options_of(
    document: str | None,
    results: str,
    argv: Sequence[str] | None,
    *,
    time_limit: float = 300.0,
    quick: str | None = None,
) -> argparse.Namespace | None:
    """What the command line says, or None where there is no GPU though one is asked for.

    ``document`` is the program's docstring, ``results`` the name of its file, and ``quick`` says
    what ``--quick`` leaves, for a program that has it.
    """
    parser = argparse.ArgumentParser(description=(document or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=harness.RESULTS / results)
    parser.add_argument(
        "--time-limit",
        type=float,
        default=time_limit,
        help=f"seconds after which no point is begun (default: {time_limit:g})",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU; --device cpu tries this program out without one", file=sys.stderr)
        return None
    return options


def gpu() -> dict[str, Any]:
    """The GPU as the driver describes it."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_cache_bytes": properties.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
        "driver": harness.output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
    }


def device_plan(device: str) -> Plan:
    return TRY_OUT_PLAN if device == "cpu" else DEVICE_PLAN


def times(checked: Sequence[Checked], device: str) -> dict[str, Any]:
    """``us_per_call`` and, on a GPU, ``us_per_call_from_python`` of each contestant."""
    plans = {"us_per_call": device_plan(device)}
    if device != "cpu":
        plans["us_per_call_from_python"] = PYTHON_PLAN
    return {
        key: {timing.name: timing.quartiles_us() for timing in harness.measure(checked, plan)}
        for key, plan in plans.items()
    }


def sets_of_buffers(case: Case) -> int:
    """How many batches are needed to leave the cache, four times over; at least two."""
    if case.device == "cpu":
        return 2
    cache_bytes = torch.cuda.get_device_properties(case.device).L2_cache_size
    return min(64, max(2, -(-4 * cache_bytes // case.traffic_bytes)))


def checked_copy(case: Case, sets: int) -> Checked:
    """Device to device, with as many bytes read and written in all as the operator moves."""
    words = (case.traffic_bytes // 2 + 7) // 8
    turns = []
    for _ in range(sets):
        numbers = torch.empty(words, dtype=torch.int64, device=case.device).random_()
        source = numbers.view(torch.uint8)
        target = torch.empty_like(source)
        copy = functools.partial(target.copy_, source)
        contestant = Contestant(report.COPY, copy, output="recycled", target=target)
        turns.append(Checked(contestant, source))
    return Rotated(turns)


class Record:
    """What a program has measured so far, on the screen and in its file.

    Args:
        options: of ``options_of``.
        about: what the numbers mean.
        packages: whose versions are noted.
        claims: from all rows to the claims about them.
        facts: what else goes into the file.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        about: str,
        packages: Sequence[str],
        claims: Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]],
        **facts: Any,
    ) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.unequal: list[str] = []
        self.failed: list[str] = []
        self.left_out = 0
        self._claims = claims
        self._head = {
            "about": about,
            **harness.environment(packages),
            "gpu": gpu(),
            "pixfuse": {key: pixfuse.info()[key] for key in ("isa", "cuda")},
            **facts,
        }

    def note(self, what: object, error: Exception) -> None:
        """Notes what is not timed, and why: a wrong result or a failure of whatever library."""
        if isinstance(error, UnequalError):
            self.unequal.append(str(error))
            console.print(f"not equal, so not timed: {error}", style="red", markup=False)
            return
        text = f"{what}: {type(error).__name__}: {error}"[:2000]
        self.failed.append(text)
        console.print(f"failed: {text}", style="red", markup=False)

    def checked(self, name: str, make: Callable[[], Checked]) -> list[Checked]:
        """The contestant that ``make`` makes and checks, or nobody, with a note why."""
        try:
            return [make()]
        except Exception as error:
            self.note(name, error)
            return []

    def measure(
        self,
        points: Sequence[Point],
        measure: Callable[[Point], dict[str, Any]],
        describe: Callable[[dict[str, Any]], str],
    ) -> None:
        """One row for each point, in their order, until the time is over."""
        for done, point in enumerate(points):
            if time.perf_counter() - self.started > self.options.time_limit:
                self.left_out = len(points) - done
                break
            try:
                row = measure(point)
            except Exception as error:
                self.note(point, error)
            else:
                self.rows.append(row)
                console.print(describe(row), highlight=False, soft_wrap=True, markup=False)
            self.write()

    def write(self) -> list[dict[str, Any]]:
        """Writes the file; returns the claims."""
        found = self._claims(self.rows)
        document = {
            **self._head,
            "seconds": round(time.perf_counter() - self.started, 1),
            "unequal": self.unequal,
            "failed": self.failed,
            "points_left_out_for_lack_of_time": self.left_out,
            "claims": found,
            "grid": self.rows,
        }
        harness.write_json(self.options.output, document)
        return found

    def finish(self) -> int:
        """Writes the file and prints the claims; the status to exit with."""
        report.print_claims(self.write())
        seconds = time.perf_counter() - self.started
        console.print(
            f"{seconds:.0f} s, {len(self.rows)} points, {self.left_out} left out, "
            f"{len(self.unequal)} unequal results, {len(self.failed)} failed"
        )
        return 1 if self.unequal or self.failed else 0
