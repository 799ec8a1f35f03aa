"""How long ``pixfuse.normalize`` takes on a GPU, beside its peers and a plain copy.

    python -m benchmarks.bench_normalize_cuda [--time-limit SECONDS] [--output FILE]

Two times for each: ``us_per_call`` on the GPU alone, and ``us_per_call_from_python`` as a loop sees
it that does not wait for each result. Every call works on other buffers than the one before, so
many of them that the GPU's cache cannot hold them. ``--device cpu`` tries the program out where
there is no GPU: its times mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import peers, report
from benchmarks.gpu.program import (
    Record,
    checked_copy,
    console,
    options_of,
    sets_of_buffers,
    times,
)
from benchmarks.harness import Checked, Contestant, Rotated
from benchmarks.peers import Batch, Case, Peer

HEADLINE = Case(batch=64, height=224, width=224, device="cuda")
# The first three are "large": a copy of as many bytes leaves the GPU's cache.
LARGE_SHAPES = ((64, 224), (256, 224), (64, 512))
SMALL_SHAPES = ((8, 224), (1, 224), (1, 32))
PACKAGES = ("pixfuse", "torch", "torchvision", "triton", "numpy")


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
    """torch.compile needs seconds for each point, so it is at a few of each shape."""
    return (
        case.recycled
        and case.dtype == torch.float32
        and case.memory_format == torch.contiguous_format
    )


def rotated(
    peer: Peer,
    case: Case,
    batches: Sequence[Batch],
    outs: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor],
) -> Rotated:
    """A peer on all sets of buffers, its results checked."""
    return Rotated(
        [
            Checked(peer.contestant(case, batch, out), wanted)
            for batch, out, wanted in zip(batches, outs, expected, strict=True)
        ]
    )


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
        self.record: Record

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
            checked += self.record.checked(
                peer.name, functools.partial(rotated, peer, case, batches, outs, expected)
            )
        checked.append(checked_copy(case, sets))
        row = {**case.described(), "sets_of_buffers": sets, **times(checked, case.device)}
        row["max_error"] = {c.contestant.name: c.max_error for c in checked if c.max_error}
        return row


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the rows."""
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
            report.least_ratio(main, copy, ours),
            ">= 0.9",
        ),
        report.claim(
            "the same, the least of all layouts and types at 64x224x224x3 and larger",
            report.least_ratio(recycled, copy, ours),
            ">= 0.9",
        ),
        report.claim(
            "speedup over torchvision v2, 64x224x224x3 NHWC to float32 NCHW",
            report.least_ratio(main, "torchvision v2", ours),
            ">= 5",
        ),
        report.claim(
            "the same, the least at 64x224x224x3 and larger",
            report.least_ratio(large, "torchvision v2", ours),
            ">= 5",
        ),
    ]
    for text, margin in (("", 1.0), (" by more than 5 %", 1.05)):
        slower = sum(1 for row in rows if report.faster_peers(row["us_per_call"], margin))
        found.append(
            report.claim(f"points of {len(rows)} where a peer is faster{text}", slower, "<= 0")
        )
    return found


def describe(row: dict[str, Any]) -> str:
    us = row["us_per_call"]
    copy = us[report.COPY][1]
    times = ", ".join(f"{name} {q[1]:.1f} ({copy / q[1]:.2f})" for name, q in us.items())
    return (
        f"{row['batch']}x{row['height']}² {row['input']}->{row['output']} {row['dtype']} "
        f"{row['memory']}: {times}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, "normalize_cuda.json", argv)
    if options is None:
        return 1
    run = Run(options.device)
    run.record = Record(
        options,
        "quartiles (25 %, median, 75 %) of one call in microseconds: us_per_call on the device "
        "alone, us_per_call_from_python as a loop in Python sees it; max_error is the largest "
        "difference from pixfuse.reference, where it is not 0",
        PACKAGES,
        claims,
        unavailable=run.unavailable,
    )
    console.print("us on the device, and in brackets the share of the copy bandwidth")
    run.record.measure(list(grid(options.device)), run.point, describe)
    return run.record.finish()


if __name__ == "__main__":
    sys.exit(main())
