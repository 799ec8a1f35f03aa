"""How long ``pixfuse.normalize`` takes on a GPU, beside its peers and a plain copy.

    python -m benchmarks.bench_normalize_cuda [--time-limit SECONDS] [--output FILE]

Two times for each: ``us_per_call`` on the GPU alone, and ``us_per_call_from_python`` as a loop sees
it that does not wait for each result. Every call works on other buffers than the one before, so
many of them that the GPU's cache cannot hold them. ``--device cpu`` tries the program out where
there is no GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pixfuse
from benchmarks import harness, peers, report
from benchmarks.harness import Checked, Contestant, Plan, Rotated, UnequalError
from benchmarks.peers import Batch, Case, Peer

HEADLINE = Case(batch=64, height=224, width=224, device="cuda")
# The first three are "large": a copy of as many bytes leaves the GPU's cache.
LARGE_SHAPES = ((64, 224), (256, 224), (64, 512))
SMALL_SHAPES = ((8, 224), (1, 224), (1, 32))
PACKAGES = ("pixfuse", "torch", "torchvision", "triton", "numpy")
DEVICE_PLAN = Plan(
    rounds=9,
    sample_seconds=1e-3,
    budget_seconds=1.5,
    most_calls=64,
    clock=harness.device_clock,
)
PYTHON_PLAN = replace(DEVICE_PLAN, rounds=5, budget_seconds=0.5, clock=harness.synchronized_clock)
TRY_OUT_PLAN = Plan(rounds=3, sample_seconds=1e-3, budget_seconds=0.2)

console = report.console()


class TritonKernel(Peer):
    """A Triton kernel for the same work, one for planes and one for interleaved outputs."""

    name = "Triton"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    memory_formats = (torch.contiguous_format, torch.channels_last)
    modules = ("triton", "benchmarks.gpu.triton_kernel")

    def refusal(self, case: Case) -> str | None:
        return "runs on a GPU" if case.device == "cpu" else super().refusal(case)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        normalize: Callable[..., torch.Tensor] = peers.load(self.modules[1]).normalize
        images = batch.images(case.input_layout)
        interleaved = case.input_layout == "NHWC"
        mean, std = case.normalization.mean, case.normalization.std

        def call() -> torch.Tensor:
            target = case.empty_output() if out is None else out
            return normalize(images, mean, std, interleaved_images=interleaved, out=target)

        return self._contestant(case, call, out)


def grid(device: str) -> Iterator[Case]:
    """The large shapes in every variant, the main one first, then the small ones in a few."""
    formats = (torch.contiguous_format, torch.channels_last)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for batch, side in (*LARGE_SHAPES, *SMALL_SHAPES):
        large = (batch, side) in LARGE_SHAPES
        for recycled, layout, memory_format, dtype in itertools.product(
            (True, False),
            ("NHWC", "NCHW"),
            formats if large else formats[:1],
            dtypes if large else dtypes[:2],
        ):
            yield Case(
                batch,
                side,
                side,
                input_layout="NHWC" if layout == "NHWC" else "NCHW",
                memory_format=memory_format,
                dtype=dtype,
                recycled=recycled,
                device=device,
            )


def compiled_here(case: Case) -> bool:
    """torch.compile needs seconds for each point, so it is not at all of them."""
    main_shape = (case.batch, case.height) == (HEADLINE.batch, HEADLINE.height)
    return main_shape or (
        case.recycled
        and case.dtype == torch.float32
        and case.memory_format == torch.contiguous_format
    )


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


class Run:
    """One run of this program: who takes part, and what went wrong."""

    def __init__(self, device: str) -> None:
        everybody: list[Peer] = [
            peers.Pixfuse(),
            peers.TorchvisionV2(),
            peers.TorchEager(),
            peers.TorchCompile(device),
            TritonKernel(),
        ]
        reasons = {peer.name: peer.unavailable() for peer in everybody}
        self.everybody = [peer for peer in everybody if reasons[peer.name] is None]
        self.unavailable = {name: reason for name, reason in reasons.items() if reason}
        self.problems: list[str] = []

    def point(self, case: Case) -> dict[str, Any]:
        """Check everybody on every set of buffers, then time them."""
        sets = sets_of_buffers(case)
        batches = [peers.random_batch(case) for _ in range(sets)]
        expected = [peers.expected_result(case, batch) for batch in batches]
        outs = [case.empty_output() if case.recycled else None for _ in range(sets)]
        torch.compiler.reset()
        checked: list[Checked] = []
        for peer in self.everybody:
            skipped = isinstance(peer, peers.TorchCompile) and not compiled_here(case)
            if skipped or peer.refusal(case) is not None:
                continue
            try:
                turns = [
                    Checked(peer.contestant(case, batch, out), wanted)
                    for batch, out, wanted in zip(batches, outs, expected, strict=True)
                ]
            except UnequalError as error:
                self.problems.append(str(error))
                console.print(f"not equal, so not timed: {error}", style="red", markup=False)
                continue
            checked.append(Rotated(turns))
        checked.append(checked_copy(case, sets))
        row = {**case.described(), "sets_of_buffers": sets}
        if case.device == "cpu":
            plans = {"us_per_call": TRY_OUT_PLAN}
        else:
            plans = {"us_per_call": DEVICE_PLAN, "us_per_call_from_python": PYTHON_PLAN}
        for key, plan in plans.items():
            row[key] = {t.name: t.quartiles_us() for t in harness.measure(checked, plan)}
        row["max_error"] = {c.contestant.name: c.max_error for c in checked if c.max_error}
        return row


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the rows."""

    def ratio(row: dict[str, Any], a: str, b: str) -> float | None:
        us = row["us_per_call"]
        return us[a][1] / us[b][1] if a in us and b in us else None

    def least(a: str, b: str, among: Sequence[dict[str, Any]]) -> float | None:
        return min((r for row in among if (r := ratio(row, a, b)) is not None), default=None)

    ours, copy = report.OURS, report.COPY
    large = [row for row in rows if (row["batch"], row["height"]) in LARGE_SHAPES]
    main = [
        row
        for row in rows
        if {k: v for k, v in row.items() if k in HEADLINE.described()} == HEADLINE.described()
    ]
    recycled = [row for row in large if row["memory"] == "recycled"]
    found = [
        report.claim(
            "share of the device's copy bandwidth, 64x224x224x3 NHWC to float32 NCHW",
            least(copy, ours, main),
            ">= 0.9",
        ),
        report.claim(
            "the same, the least of all layouts and types at 64x224x224x3 and larger",
            least(copy, ours, recycled),
            ">= 0.9",
        ),
        report.claim(
            "speedup over torchvision v2, 64x224x224x3 NHWC to float32 NCHW",
            least("torchvision v2", ours, main),
            ">= 5",
        ),
        report.claim(
            "the same, the least at 64x224x224x3 and larger",
            least("torchvision v2", ours, large),
            ">= 5",
        ),
    ]
    for text, margin in (("", 1.0), (" by more than 5 %", 1.05)):
        slower = sum(1 for row in rows if report.faster_peers(row["us_per_call"], margin))
        found.append(
            report.claim(f"points of {len(rows)} where a peer is faster{text}", slower, "<= 0")
        )
    return found


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


def print_row(row: dict[str, Any]) -> None:
    us = row["us_per_call"]
    copy = us[report.COPY][1]
    times = ", ".join(f"{name} {q[1]:.1f} ({copy / q[1]:.2f})" for name, q in us.items())
    console.print(
        f"{row['batch']}x{row['height']}² {row['input']}->{row['output']} {row['dtype']} "
        f"{row['memory']}: {times}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "normalize_cuda.json")
    parser.add_argument(
        "--time-limit", type=float, default=300.0, help="seconds after which no point is begun"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU; --device cpu tries this program out without one", file=sys.stderr)
        return 1

    started = time.perf_counter()
    run = Run(options.device)
    rows: list[dict[str, Any]] = []
    cases = list(grid(options.device))
    console.print("us on the device, and in brackets the share of the copy bandwidth")
    for case in cases:
        if time.perf_counter() - started > options.time_limit:
            break
        rows.append(run.point(case))
        print_row(rows[-1])
    found = claims(rows)
    document = {
        "about": "quartiles (25 %, median, 75 %) of one call in microseconds: us_per_call on the "
        "device alone, us_per_call_from_python as a loop in Python sees it; max_error is the "
        "largest difference from pixfuse.reference, where it is not 0",
        **harness.environment(PACKAGES),
        "gpu": gpu(),
        "pixfuse": {key: pixfuse.info()[key] for key in ("isa", "cuda")},
        "unavailable": run.unavailable,
        "unequal": run.problems,
        "points_left_out_for_lack_of_time": len(cases) - len(rows),
        "claims": found,
        "grid": rows,
    }
    harness.write_json(options.output, document)
    report.print_claims(console, found)
    seconds = time.perf_counter() - started
    console.print(
        f"{seconds:.0f} s, {len(rows)} of {len(cases)} points, {len(run.problems)} unequal results"
    )
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
