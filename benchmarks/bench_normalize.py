"""How long ``pixfuse.normalize`` takes on the CPU, beside everybody else and a plain copy.

    python -m benchmarks.bench_normalize [--quick] [--filter TEXT] [--output FILE]

Measures a grid of sizes, layouts, types, thread counts and output memories, then the claims about
the main case (64 images of 224x224x3). Ends with status 1 when a result was not equal; a missed
target is reported, and is no error.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

import pixfuse
from benchmarks import harness, peers, report
from benchmarks.harness import Checked, Contestant, Plan, Timing
from benchmarks.peers import Batch, Case, Peer
from benchmarks.report import COPY, OURS, console

SIDES = (32, 64, 128, 224, 512, 1024)
BATCHES = (1, 8, 64, 256)
HEADLINE = Case(batch=64, height=224, width=224)
LARGEST_INPUT_BYTES = 1 << 27
# Up to this size every combination of layouts and types is measured; beyond, float32 from both
# layouts to planes; beyond the second size, from NHWC alone.
SMALL_INPUT_BYTES = 1 << 22
MEDIUM_INPUT_BYTES = 1 << 25
# Beyond this size nobody is run image by image.
PER_SAMPLE_INPUT_BYTES = 1 << 24

PACKAGES = (
    "pixfuse",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "albumentations",
    "kornia",
    "nvidia-dali-cuda130",
)
COPY_HUGE = f"{COPY}, huge pages"
OURS_FRESH = f"{OURS}, fresh"
COMPILE_FRESH = f"{peers.TorchCompile.name}, fresh"
OURS_HUGE = f"{OURS}, huge pages"
# Measured beside the main case, but not the same work.
BFLOAT16 = f"{OURS}, bfloat16"
LARGE_IMAGES = f"{OURS}, 1024x1024"
SMALL_CALL = f"{OURS}, one 3x8x8 image"
OTHER_WORK = (BFLOAT16, LARGE_IMAGES, SMALL_CALL)

GRID_PLAN = Plan(rounds=5, sample_seconds=2e-3, budget_seconds=0.5)
HEADLINE_PLAN = Plan(rounds=31, sample_seconds=10e-3, budget_seconds=60.0)
# Few samples of many contestants at many points: on a shared machine some come out in the wrong
# order by chance. Whoever came close, on either side, is measured again, longer, and that counts.
CLOSE = 1.25
CLOSE_PLAN = Plan(rounds=31, sample_seconds=4e-3, budget_seconds=4.0, least_rounds=9)
QUICK_GRID_PLAN = Plan(rounds=3, sample_seconds=1e-3, budget_seconds=0.2)
QUICK_HEADLINE_PLAN = Plan(rounds=7, sample_seconds=5e-3, budget_seconds=10.0)


# ---- who runs where ------------------------------------------------------------------------------


def fast_peers() -> list[Peer]:
    """Those who run at every point of the grid that they can do at all."""
    return [peers.TorchvisionV2(), peers.TorchEager(), peers.OpenCV(), peers.Dali()]


def slow_peers() -> list[Peer]:
    """Those who run on a part of the grid, because they take long to run or to compile."""
    return [
        peers.TorchCompile(),
        peers.TorchCompileInOrder(),
        peers.Numpy(),
        peers.Kornia(),
        peers.Albumentations(),
        peers.TorchvisionV1Pillow(),
        peers.TorchvisionV2Pillow(),
    ]


def sub_grid(peer: Peer, case: Case) -> bool:
    """Whether a peer runs at this point."""
    if isinstance(peer, peers.TorchCompile):  # each point compiles for a second or more
        main_size = (case.batch, case.height) == (HEADLINE.batch, HEADLINE.height)
        return (main_size and case.dtype != torch.float16) or (
            case.threads == 1
            and case.dtype == torch.float32
            and case.memory_format == torch.contiguous_format
        )
    if any(isinstance(peer, type(fast)) for fast in fast_peers()):
        return True
    return case.threads == 1 and case.elements <= PER_SAMPLE_INPUT_BYTES


SUB_GRIDS = {
    "torch.compile": "float32 and bfloat16 at 64x224x224; elsewhere float32, contiguous output, "
    "one thread",
    "torch.compile, reordered": "as torch.compile",
    "numpy": "one thread, up to 2^24 input bytes",
    "Kornia": "one thread, up to 2^24 input bytes",
    "albumentations": "one thread, up to 2^24 input bytes",
    "torchvision v1, Pillow": "one thread, up to 2^24 input bytes",
    "torchvision v2, Pillow": "one thread, up to 2^24 input bytes",
}


# ---- the grid ------------------------------------------------------------------------------------


def thread_counts() -> list[int]:
    return sorted({1, len(os.sched_getaffinity(0))})


def grid(quick: bool) -> Iterator[Case]:
    """Every point; those of one shape stand together."""
    shapes = [(1, 32), (64, 224)] if quick else list(itertools.product(BATCHES, SIDES))
    for batch, side in shapes:
        shape = Case(batch, side, side)
        if shape.elements > LARGEST_INPUT_BYTES:
            continue
        everything = shape.elements <= SMALL_INPUT_BYTES or (batch, side) == (
            HEADLINE.batch,
            HEADLINE.height,
        )
        formats = (torch.contiguous_format, torch.channels_last)
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for threads, layout, memory_format, dtype, recycled in itertools.product(
            thread_counts(),
            ("NHWC", "NCHW") if shape.elements <= MEDIUM_INPUT_BYTES else ("NHWC",),
            formats if everything else formats[:1],
            dtypes if everything and not quick else dtypes[:2] if quick else dtypes[:1],
            (True, False),
        ):
            yield replace(
                shape,
                threads=threads,
                input_layout=layout,
                memory_format=memory_format,
                dtype=dtype,
                recycled=recycled,
            )


def label(case: Case) -> str:
    """What --filter looks at."""
    described = case.described()
    return (
        f"{case.batch}x{case.height}x{case.width} {described['input']}->{described['output']} "
        f"{described['dtype']} threads={case.threads} {described['memory']}"
    )


# ---- contestants ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def checked_copy(traffic_bytes: int, *, huge_pages: bool = False) -> Checked:
    """A copy that reads and writes as many bytes in all as the operator does.

    This is the machine's own limit: between two buffers that are used again and again. numpy asks
    the kernel for huge pages for its large arrays, torch does not.
    """
    count = traffic_bytes // 2
    words = (count + 7) // 8
    if huge_pages:
        buffers = [torch.from_numpy(np.empty(words, np.int64)) for _ in range(2)]
    else:
        buffers = [torch.empty(words, dtype=torch.int64) for _ in range(2)]
    buffers[0].random_()
    source, target = (buffer.view(torch.uint8)[:count] for buffer in buffers)
    contestant = Contestant(
        COPY_HUGE if huge_pages else COPY,
        lambda: target.copy_(source),
        output="recycled",
        target=target,
    )
    return Checked(contestant, source)


class Run(report.Run):
    """One run of this program: who takes part, and what went wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[Peer] = []
        for peer in [*fast_peers(), *slow_peers()]:
            reason = peer.unavailable()
            if reason is None:
                self.peers.append(peer)
            else:
                self.unavailable[peer.name] = reason

    def point(
        self, case: Case, batch: Batch, expected: torch.Tensor, candidates: Sequence[Peer]
    ) -> list[Checked]:
        """Everybody who can do this case, checked; all recycled results go to the same buffer."""
        out = case.empty_output() if case.recycled else None
        checked: list[Checked] = []
        torch.compiler.reset()
        for peer in candidates:
            if peer.refusal(case) is None:
                checked += self.check(peer.contestant(case, batch, out), expected)
        return checked


def run_grid(run: Run, cases: Sequence[Case], plan: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (side, number), same_shape in itertools.groupby(cases, lambda c: (c.height, c.batch)):
        started = time.perf_counter()
        shape_cases = list(same_shape)
        batch = peers.random_batch(shape_cases[0])

        @functools.lru_cache(maxsize=2)
        def expected(
            dtype: torch.dtype,
            memory_format: torch.memory_format,
            batch: Batch = batch,
            shape: Case = shape_cases[0],
        ) -> torch.Tensor:
            return peers.expected_result(
                replace(shape, dtype=dtype, memory_format=memory_format), batch
            )

        for case in shape_cases:
            torch.set_num_threads(case.threads)
            candidates = [peers.Pixfuse(), *(p for p in run.peers if sub_grid(p, case))]
            checked = run.point(case, batch, expected(case.dtype, case.memory_format), candidates)
            checked.append(checked_copy(case.traffic_bytes))
            rows.append(described_row(case, measure_point(checked, plan)))
        pixfuse.empty_cache()
        checked_copy.cache_clear()
        seconds = time.perf_counter() - started
        console.print(
            f"{number:4d} x {side:4d}² : {len(shape_cases):3d} points, {seconds:5.1f} s",
            highlight=False,
        )
    return rows


def measure_point(checked: Sequence[Checked], plan: Plan) -> list[Timing]:
    """Everybody's time; that of ourselves and of those near us, or before us, by a second look."""
    timings = harness.measure(checked, plan)
    medians = {timing.name: timing.quartiles_us() for timing in timings}
    close = {OURS, *report.faster_peers(medians, 1 / CLOSE)}
    if len(close) == 1:
        return timings
    again = harness.measure([c for c in checked if c.contestant.name in close], CLOSE_PLAN)
    return [*again, *(timing for timing in timings if timing.name not in close)]


def described_row(case: Case, timings: Sequence[Timing]) -> dict[str, Any]:
    """One line of the JSON. The errors stand beside the times: both come from the same run."""
    return {
        **case.described(),
        "us_per_call": {t.name: t.quartiles_us() for t in timings},
        "samples": {t.name: len(t.samples_seconds) for t in timings},
        "max_error": {t.name: t.checked.max_error for t in timings if t.checked.max_error},
    }


# ---- the claims ----------------------------------------------------------------------------------


def run_headline(run: Run, plan: Plan) -> dict[str, Any]:
    """Everything that the claims compare, interleaved in one measurement, with one thread."""
    torch.set_num_threads(1)
    case, bfloat16 = HEADLINE, replace(HEADLINE, dtype=torch.bfloat16)
    fresh, large = replace(HEADLINE, recycled=False), replace(HEADLINE, height=1024, width=1024)
    batch = peers.random_batch(case)
    expected = peers.expected_result(case, batch)
    ours = peers.Pixfuse()

    checked = run.point(case, batch, expected, [ours, *run.peers])
    checked += [checked_copy(case.traffic_bytes), checked_copy(case.traffic_bytes, huge_pages=True)]

    def add(name: str, contestant: Contestant, wanted: torch.Tensor) -> None:
        nonlocal checked
        checked += run.check(replace(contestant, name=name), wanted)

    for peer in run.peers:
        if type(peer) is peers.TorchCompile:
            add(COMPILE_FRESH, peer.contestant(fresh, batch, None), expected)
    add(OURS_FRESH, ours.contestant(fresh, batch, None), expected)
    huge = torch.from_numpy(np.empty((case.batch, 3, case.height, case.width), np.float32))
    add(OURS_HUGE, ours.contestant(case, batch, huge), expected)
    add(
        BFLOAT16,
        ours.contestant(bfloat16, batch, bfloat16.empty_output()),
        peers.expected_result(bfloat16, batch),
    )
    for isa in pixfuse._library.available_isas():
        contestant = ours.contestant(case, batch, case.empty_output())
        around = functools.partial(pixfuse._library.use_isa, isa)
        add(f"{OURS}, {isa}", replace(contestant, around=around), expected)
    small = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    add(
        SMALL_CALL,
        Contestant("", lambda: pixfuse.normalize(small, pixfuse.IMAGENET)),
        pixfuse.reference.normalize(small, pixfuse.IMAGENET),
    )
    large_batch = peers.random_batch(large)
    add(
        LARGE_IMAGES,
        ours.contestant(large, large_batch, large.empty_output()),
        peers.expected_result(large, large_batch),
    )
    timings = harness.measure(checked, plan)
    return {
        "case": case.described(),
        "images": case.batch,
        "traffic_bytes": case.traffic_bytes,
        "us_per_call": {t.name: t.quartiles_us() for t in timings},
        "output": {t.name: t.checked.contestant.output for t in timings},
        "max_error": {t.name: t.checked.max_error for t in timings},
        "samples": len(timings[0].samples_seconds),
    }


def claims(headline: dict[str, Any] | None, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the numbers above."""
    found: list[dict[str, Any]] = []

    def claim(text: str, value: float | None, target: str) -> None:
        found.append(report.claim(text, value, target))

    if headline is not None:
        us = {name: quartiles[1] for name, quartiles in headline["us_per_call"].items()}

        def ratio(a: str, b: str, factor: float = 1.0) -> float | None:
            return us[a] / us[b] * factor if a in us and b in us else None

        pixels = (1024 * 1024) / (HEADLINE.height * HEADLINE.width)
        claim("speedup over torchvision v2 on a batch", ratio("torchvision v2", OURS), ">= 10")
        claim(
            "speedup over torch.compile, the quicker of recycled and fresh",
            min(
                filter(None, (ratio("torch.compile", OURS), ratio(COMPILE_FRESH, OURS))),
                default=None,
            ),
            ">= 8",
        )
        claim("speedup over DALI", ratio("DALI", OURS), ">= 3")
        claim("share of the copy bandwidth", ratio(COPY, OURS), ">= 0.7")
        claim(
            "share of the copy bandwidth, both in huge pages",
            ratio(COPY_HUGE, OURS_HUGE),
            ">= 0.7",
        )
        claim("time of a fresh output over a recycled one", ratio(OURS_FRESH, OURS), "<= 1.15")
        claim("time with AVX2 over AVX-512", ratio(f"{OURS}, avx2", f"{OURS}, avx512"), "<= 1.3")
        claim("elements per second, bfloat16 over float32", ratio(OURS, BFLOAT16), ">= 1.3")
        claim(
            "time per pixel, 1024x1024 over 224x224",
            ratio(LARGE_IMAGES, OURS, 1 / pixels),
            "<= 1.1",
        )
        claim("us for a call on one 3x8x8 image", us.get(SMALL_CALL), "<= 6")
    if rows:
        for text, margin in (("", 1.0), (" by more than 5 %", 1.05)):
            slower = sum(1 for row in rows if report.faster_peers(row["us_per_call"], margin))
            claim(f"points of {len(rows)} where a peer is faster{text}", slower, "<= 0")
    return found


# ---- the report ----------------------------------------------------------------------------------


def print_headline(headline: dict[str, Any]) -> None:
    table = Table(title="64 images of 224x224x3, NHWC uint8 to NCHW float32, one thread")
    table.add_column("")
    table.add_column("result in")
    for column in ("µs per image", "quartiles", "largest difference"):
        table.add_column(column, justify="right")
    for same_work in (True, False):
        for name, quartiles in sorted(
            headline["us_per_call"].items(), key=lambda item: float(item[1][1])
        ):
            if (name in OTHER_WORK) == same_work:
                continue
            images = 1 if name == SMALL_CALL else headline["images"]
            low, middle, high = (value / images for value in quartiles)
            error = headline["max_error"][name]
            table.add_row(
                f"[bold]{name}[/]" if name.startswith(OURS) else name,
                headline["output"][name],
                f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}",
                "equal" if error == 0 else f"{error:.1e}",
            )
        table.add_section()
    console.print(table)


def print_slower(rows: Sequence[dict[str, Any]]) -> None:
    slower = [(row, report.faster_peers(row["us_per_call"])) for row in rows]
    slower = [(row, found) for row, found in slower if found]
    if not slower:
        return
    console.print(f"A peer is faster at {len(slower)} points:")
    slower.sort(key=lambda item: -max(item[1].values()))
    for row, found in slower[:40]:
        names = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in sorted(found.items()))
        console.print(
            f"  {row['batch']}x{row['height']}² {row['input']}->{row['output']} {row['dtype']} "
            f"threads={row['threads']} {row['memory']}: {names}",
            highlight=False,
        )


def document(
    run: Run, headline: dict[str, Any] | None, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    everybody = [peers.Pixfuse(), *run.peers]
    relevant = ("OMP_", "MKL_", "PIXFUSE_", "MALLOC_", "GOMP_")
    return {
        "about": "us_per_call holds the quartiles (25 %, median, 75 %) of one call in "
        "microseconds; max_error the largest difference from pixfuse.reference, where it is not 0",
        **harness.environment(PACKAGES),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(relevant)},
        "pixfuse": {key: pixfuse.info()[key] for key in ("isa", "available_isas", "cuda")},
        "threads": thread_counts(),
        "samples_rule": "a few per contestant at each point of the grid; where somebody took less "
        f"than {CLOSE} times our time, both are measured a second time, longer, and that counts",
        "grid_rule": f"sides {SIDES}, batches {BATCHES}, up to {LARGEST_INPUT_BYTES} input bytes; "
        f"up to {SMALL_INPUT_BYTES} bytes and at 64x224x224 all layouts and types; beyond, float32 "
        f"to planes, and beyond {MEDIUM_INPUT_BYTES} bytes from NHWC alone",
        "peers": {
            peer.name: {
                "does": " ".join((peer.__doc__ or "").split()),
                "measured_at": SUB_GRIDS.get(peer.name, "every point that it can do"),
                "input_layouts": list(peer.input_layouts),
                "dtypes": [peers.DTYPE_NAMES[dtype] for dtype in peer.dtypes],
                "outputs": [peers.MEMORY_FORMAT_NAMES[f] for f in peer.memory_formats],
                "tolerance": {
                    peers.DTYPE_NAMES[dtype]: {
                        "max_error": peer.tolerance(replace(HEADLINE, dtype=dtype)).max_error,
                        "reason": peer.tolerance(replace(HEADLINE, dtype=dtype)).reason,
                    }
                    for dtype in peer.dtypes
                },
            }
            for peer in everybody
        },
        "unavailable": run.unavailable,
        "unequal": run.problems,
        "claims": claims(headline, rows),
        "headline": headline,
        "grid": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = report.options_of(
        __doc__,
        "normalize_cpu.json",
        argv,
        quick="a small grid and few samples",
        filter_help="only points whose label holds this text; 'headline' for none",
    )
    run = Run()
    for reason in run.unavailable.values():
        console.print(f"left out: {reason}", style="yellow", markup=False)
    headline = None
    if options.filter in ("", "headline"):
        headline = run_headline(run, QUICK_HEADLINE_PLAN if options.quick else HEADLINE_PLAN)
    cases = [case for case in grid(options.quick) if options.filter in label(case)]
    rows = run_grid(run, cases, QUICK_GRID_PLAN if options.quick else GRID_PLAN)
    result = document(run, headline, rows)
    if headline is not None:
        print_headline(headline)
    print_slower(rows)
    report.print_claims(result["claims"])
    return run.finish(options.output, result)


if __name__ == "__main__":
    sys.exit(main())
