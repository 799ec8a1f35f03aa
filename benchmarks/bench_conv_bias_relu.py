"""How long ``pixfuse.conv_bias_relu`` takes on the CPU, beside eager, compiled and fused torch.

    python -m benchmarks.bench_conv_bias_relu [--quick] [--filter TEXT] [--output FILE]

Stems from uint8 images, and layers of many channels from floats, to both memory formats; one
thread, every output fresh, as a training loop sees it; the ResNet stem also with all threads, its
backward pass, and the memory of a training step. Each result is compared with the float64
reference before it is timed. What the processor could do at most is measured too: no direct
convolution in float32 can take less time than its multiply-adds; one by Winograd's algorithm has
fewer, and one in whole numbers has none in floats, so their share of them can be above 1. Ends with
status 1 when a result was not equal.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d

import pixfuse
from benchmarks import harness, report
from benchmarks.harness import Contestant, Plan, Timing, Tolerance, UnequalError
from benchmarks.report import OURS, console

PACKAGES = ("pixfuse", "torch")
PLAN = Plan(rounds=15, sample_seconds=30e-3, budget_seconds=5.0, least_rounds=5)
QUICK_PLAN = Plan(rounds=3, sample_seconds=5e-3, budget_seconds=0.5, least_rounds=3)
EAGER, COMPILE, FUSED = "torch eager", "torch.compile", "oneDNN conv + ReLU alone"
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
TOLERANCE = Tolerance(1e-4, "sums of up to 2304 terms of about 1/48 in float32")
GRADIENT_TOLERANCE = Tolerance(1e-3, "sums of 200,704 terms in float32")


@dataclass(frozen=True)
class Layer:
    """A convolution with bias and ReLU; one of 3 channels takes uint8 images."""

    name: str
    channels: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    batch: int = 16
    side: int = 224

    @property
    def is_stem(self) -> bool:
        return self.channels == 3

    @property
    def multiply_adds(self) -> int:
        output_side = (self.side + 2 * self.padding - self.kernel) // self.stride + 1
        return self.batch * output_side**2 * self.outputs * self.channels * self.kernel**2


RESNET = Layer("ResNet stem", 3, 64, 7, 2, 3)
LAYERS = [
    RESNET,
    Layer("VGG stem", 3, 64, 3, 1, 1),
    Layer("MobileNet stem", 3, 32, 3, 2, 1),
    Layer("ConvNeXt stem", 3, 96, 4, 4, 0),
    Layer("ViT stem", 3, 768, 16, 16, 0),
    Layer("AlexNet stem", 3, 64, 11, 4, 2),
    Layer("3x3, 64 to 64", 64, 64, 3, 1, 1, side=56),
    Layer("3x3, 256 to 256", 256, 256, 3, 1, 1, side=14),
]


class Run(report.Run):
    """One run of this program: how long to measure, and what went wrong."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


# ---- the most that is possible -------------------------------------------------------------------


def fma_peak_gflops() -> float:
    """The operations per second of a loop of multiply-adds on registers alone, on one core."""
    compiler = shutil.which("c++") or "g++"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        source = harness.ROOT / "benchmarks" / "fma_peak.cpp"
        flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-w"]
        include = f"-I{harness.ROOT / 'csrc'}"
        subprocess.run([compiler, *flags, include, str(source), "-o", str(library)], check=True)
        rounds_of = ctypes.CDLL(str(library)).fma_rounds
    rounds_of.restype, rounds_of.argtypes = ctypes.c_int64, [ctypes.c_int64, ctypes.c_void_p]
    result = (ctypes.c_float * 2)(0.5, 0.25)
    best = 0.0
    for _ in range(40):
        start = time.perf_counter_ns()
        operations = rounds_of(200_000, result)
        best = max(best, operations / (time.perf_counter_ns() - start))
    return best


# ---- forward -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A layer with its data in one memory format, and what everybody must compute."""

    layer: Layer
    memory_format: torch.memory_format
    input: torch.Tensor
    floats: torch.Tensor  # the input, normalized
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def options(self) -> dict[str, Any]:
        return {"normalization": pixfuse.IMAGENET} if self.layer.is_stem else {}

    @property
    def geometry(self) -> tuple[int, int]:
        return self.layer.stride, self.layer.padding

    def ours(self) -> tuple[torch.Tensor, pixfuse.UnitActivity]:
        return pixfuse.conv_bias_relu(
            self.input,
            self.weight,
            self.bias,
            *self.geometry,
            memory_format=self.memory_format,
            **self.options,
        )

    def eager(self) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        mean, std = (
            torch.tensor(numbers).view(3, 1, 1)
            for numbers in (pixfuse.IMAGENET.mean, pixfuse.IMAGENET.std)
        )
        layer, input, weight, bias = self.layer, self.input, self.weight, self.bias

        def eager() -> tuple[torch.Tensor, torch.Tensor]:
            values = (input.float() * (1 / 255) - mean) / std if layer.is_stem else input
            output = conv2d(values, weight, bias, layer.stride, layer.padding).relu_()
            return output, (output > 0).sum((0, 2, 3))

        return eager

    def fused(self) -> torch.Tensor:
        both = [[number] * 2 for number in (self.layer.padding, self.layer.stride, 1)]
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            self.floats, self.weight, self.bias, *both, 1, "relu", [], ""
        )


def work_of(layer: Layer, memory_format: torch.memory_format) -> Work:
    torch.manual_seed(0)
    shape = (layer.batch, layer.channels, layer.side, layer.side)
    weight = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel)
    weight /= (layer.channels * layer.kernel**2) ** 0.5
    bias = torch.randn(layer.outputs) / 8
    if layer.is_stem:
        input = torch.randint(256, shape, dtype=torch.uint8)
        floats = pixfuse.normalize(input, pixfuse.IMAGENET)
    else:
        input = floats = torch.randn(shape)
    input, floats, weight = (
        tensor.contiguous(memory_format=memory_format) for tensor in (input, floats, weight)
    )
    return Work(layer, memory_format, input, floats, weight, bias)


def contestants(
    work: Work, *, compiled: bool
) -> list[tuple[str, Callable[[], Any], Callable[[Any], torch.Tensor]]]:
    def first(result: Any) -> torch.Tensor:
        output: torch.Tensor = result[0]
        return output

    eager = work.eager()
    found: list[tuple[str, Callable[[], Any], Callable[[Any], torch.Tensor]]] = [
        (OURS, work.ours, first),
        (EAGER, eager, first),
        (FUSED, work.fused, lambda result: result),
    ]
    if compiled:
        torch.compiler.reset()
        found.append((COMPILE, torch.compile(eager), first))
    return found


def check_counts(work: Work, active: torch.Tensor) -> None:
    """Of our own outputs exactly; of the reference but for outputs that the tolerance can turn."""
    output, activity = work.ours()
    if not torch.equal(activity.active, (output > 0).sum((0, 2, 3))):
        raise UnequalError(f"{OURS}: counts that are not those of the output")
    if int((activity.active - active).abs().max()) > activity.positions // 1000 + 1:
        raise UnequalError(f"{OURS}: counts that are not those of the reference")


def time_layer(run: Run, layer: Layer, peak_gflops: float) -> list[dict[str, Any]]:
    rows = []
    expected = active = None
    for format_name, memory_format in FORMATS.items():
        work = work_of(layer, memory_format)
        if expected is None:
            expected, activity = pixfuse.reference.conv_bias_relu(
                work.input, work.weight, work.bias, *work.geometry, **work.options
            )
            active = activity.active
        assert active is not None
        wanted = expected.contiguous(memory_format=memory_format)
        with torch.no_grad():
            try:
                check_counts(work, active)
            except UnequalError as error:
                run.problems.append(str(error))
            for threads in dict.fromkeys((1, all_threads())):
                everywhere = threads > 1
                if everywhere and (layer is not RESNET or format_name != "channels_last"):
                    continue
                torch.set_num_threads(threads)
                checked = [
                    one
                    for name, call, as_tensor in contestants(
                        work, compiled=layer.is_stem and not everywhere
                    )
                    for one in run.check(
                        Contestant(name, call, tolerance=TOLERANCE, as_tensor=as_tensor), wanted
                    )
                ]
                timings = harness.measure(checked, run.plan)
                torch.set_num_threads(1)
                ours = next((t for t in timings if t.name == OURS), None)
                rows += [
                    timing_row(t, ours, layer, format_name, threads, threads * peak_gflops)
                    for t in timings
                ]
    return rows


def all_threads() -> int:
    return int(harness.machine()["cores"])


def over_ours(timing: Timing, ours: Timing) -> float:
    """Time over ours, within rounds: what slows the machine for a while slows both."""
    pairs = zip(timing.samples_seconds, ours.samples_seconds, strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def timing_row(
    timing: Timing,
    ours: Timing | None,
    layer: Layer,
    format_name: str,
    threads: int,
    peak_gflops: float,
) -> dict[str, Any]:
    gflops = 2e-3 * layer.multiply_adds / timing.median_us
    return {
        "layer": layer.name,
        "output": format_name,
        "threads": threads,
        "name": timing.name,
        "us_per_call": timing.quartiles_us(),
        "over_ours": None if ours is None else over_ours(timing, ours),
        "max_error": timing.checked.max_error,
        "gflops": float(f"{gflops:.4g}"),
        "share_of_fma_peak": float(f"{gflops / peak_gflops:.4g}"),
    }


# ---- backward ------------------------------------------------------------------------------------


def time_backward(run: Run) -> dict[str, Any]:
    """Gradients of weight and bias of the ResNet stem, from a result that is there already."""
    work = work_of(RESNET, torch.channels_last)
    weight, bias = work.weight.requires_grad_(), work.bias.requires_grad_()
    pre_activation = conv2d(work.floats.double(), weight.double(), bias.double(), *work.geometry)
    # Where rounding could turn the ReLU, nothing flows: so everybody has the same mask.
    certain = pre_activation.abs() > TOLERANCE.max_error
    gradient = torch.randn(certain.shape) * certain / certain[:, 0].numel() ** 0.5
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    wanted = torch.autograd.grad(pre_activation.relu(), (weight, bias), gradient.double())
    expected = torch.cat([g.flatten() for g in wanted])
    eager = work.eager()
    torch.compiler.reset()
    # Else compiled code would overwrite what it saved, and could run backward only once.
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = {
            OURS: work.ours()[0],
            EAGER: eager()[0],
            COMPILE: torch.compile(eager)()[0],
        }

        def call_of(output: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
            return lambda: torch.autograd.grad(output, (weight, bias), gradient, retain_graph=True)

        checked = [
            one
            for name, output in outputs.items()
            for one in run.check(
                Contestant(
                    name,
                    call_of(output),
                    tolerance=GRADIENT_TOLERANCE,
                    as_tensor=lambda found: torch.cat([g.flatten() for g in found]),
                ),
                expected,
            )
        ]
        timings = harness.measure(checked, run.plan)
    return {
        "us_per_call": {t.name: t.quartiles_us() for t in timings},
        "max_error": {t.name: t.checked.max_error for t in timings},
    }


# ---- memory --------------------------------------------------------------------------------------


def step_memory(name: str) -> int:
    """Bytes that one training step of the ResNet stem adds to this process at its peak.

    The kernel keeps the most that was resident (VmHWM), and forgets it when told to. A step on one
    small image comes first: what libraries keep for themselves is there before the count begins.
    """

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    def step(work: Work) -> None:
        weight, bias = work.weight.requires_grad_(), work.bias.requires_grad_()
        output = work.ours()[0] if name == OURS else work.eager()()[0]
        torch.autograd.grad(output, (weight, bias), torch.ones_like(output))

    torch.set_num_threads(1)
    step(work_of(Layer("small", 3, 64, 7, 2, 3, batch=1, side=32), torch.channels_last))
    work = work_of(RESNET, torch.channels_last)
    work = Work(RESNET, torch.channels_last, work.input, work.input, work.weight, work.bias)
    pixfuse.empty_cache()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(work)
    return resident("VmHWM") - before


def measure_memory() -> dict[str, Any]:
    """Each in a process of its own, so that nobody finds memory that another one left."""
    code = "from benchmarks.bench_conv_bias_relu import step_memory; print(step_memory({!r}))"
    added = {
        name: int(harness.output_of(sys.executable, "-c", code.format(name)) or "0")
        for name in (OURS, EAGER)
    }
    normalized = RESNET.batch * RESNET.channels * RESNET.side**2 * 4
    return {"added_bytes": added, "normalized_input_bytes": normalized}


# ---- what is claimed -----------------------------------------------------------------------------


def speedup(rows: Sequence[dict[str, Any]], layer: str, peer: str) -> float | None:
    """Of ours over the peer's on one thread, in the memory format where it is the smallest."""
    ratios = [
        row["over_ours"]
        for row in rows
        if (row["layer"], row["name"], row["threads"]) == (layer, peer, 1)
    ]
    return None if not ratios or None in ratios else min(ratios)


def claims(
    rows: Sequence[dict[str, Any]], backward: dict[str, Any] | None, memory: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Each for the memory format of the output in which it is met worse."""
    timed = [layer for layer in LAYERS if any(row["layer"] == layer.name for row in rows)]
    found = []
    for layer in timed:
        if layer is RESNET:
            for peer, target in ((EAGER, 5), (COMPILE, 2.5), (FUSED, 1.8)):
                value = speedup(rows, layer.name, peer)
                found.append(
                    report.claim(f"{layer.name}: speedup over {peer}", value, f">= {target}")
                )
        elif layer.is_stem:
            for peer, target in ((EAGER, 2.5), (COMPILE, 1)):
                value = speedup(rows, layer.name, peer)
                found.append(
                    report.claim(f"{layer.name}: speedup over {peer}", value, f">= {target}")
                )
        else:
            faster = speedup(rows, layer.name, FUSED)
            value = None if faster is None else 1 / faster
            found.append(report.claim(f"{layer.name}: time over {FUSED}'s", value, "<= 1.03"))
    if backward is not None:
        us = {name: quartiles[1] for name, quartiles in backward["us_per_call"].items()}
        ratio = us[EAGER] / us[OURS] if EAGER in us and OURS in us else None
        found.append(report.claim("ResNet stem, backward: speedup over torch eager", ratio, ">= 1"))
    if memory is not None:
        added = memory["added_bytes"]
        saved = (added[EAGER] - added[OURS]) / memory["normalized_input_bytes"]
        found.append(
            report.claim(
                "ResNet stem, a training step: peak memory saved, in normalized inputs",
                saved,
                ">= 1",
            )
        )
    return found


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        mine = next(
            (
                other["us_per_call"][1]
                for other in rows
                if other["name"] == OURS
                and all(other[key] == row[key] for key in ("layer", "output", "threads"))
            ),
            float("nan"),
        )
        median = row["us_per_call"][1]
        console.print(
            f"{row['layer']:16} {row['output']:14} {row['threads']} {row['name']:26}"
            f"{median / 1e3:9.2f} ms {median / mine:6.2f}  {100 * row['share_of_fma_peak']:4.0f} %",
            markup=False,
            highlight=False,
        )


def main(argv: Sequence[str] | None = None) -> int:
    options = report.options_of(
        __doc__,
        "conv_bias_relu_cpu.json",
        argv,
        quick="few short rounds",
        filter_help="only layers whose name contains this, and nothing else",
    )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = Run(QUICK_PLAN if options.quick else PLAN)
    peak_gflops = fma_peak_gflops()
    console.print(f"multiply-adds on registers alone: {peak_gflops:.1f} GFLOP/s on one core")
    rows = []
    for layer in LAYERS:
        if options.filter in layer.name:
            timed = time_layer(run, layer, peak_gflops)
            print_rows(timed)
            rows += timed
    backward = memory = None
    if not options.filter:
        backward = time_backward(run)
        console.print("backward", {n: q[1] / 1e3 for n, q in backward["us_per_call"].items()}, "ms")
        memory = measure_memory()
        console.print("memory of a training step", memory)
    torch.set_num_threads(threads_before)
    found = claims(rows, backward, memory)
    report.print_claims(found)
    document = {
        "about": "us_per_call holds the quartiles (25 %, median, 75 %) of one call in "
        "microseconds, a call being a batch of 16; over_ours the median of the ratios to "
        "pixfuse's time within a round, which the claims are made of; max_error the largest "
        "difference from the float64 reference; added_bytes what one training step adds to "
        "the resident memory of a process at its peak, as the kernel counts it (VmHWM over "
        "VmRSS before)",
        **harness.environment(PACKAGES),
        "pixfuse": {key: pixfuse.info()[key] for key in ("isa", "available_isas", "cuda")},
        "unequal": run.problems,
        "claims": found,
        "most_samples": run.plan.rounds,
        "fma_peak_gflops": float(f"{peak_gflops:.4g}"),
        "layers": [
            {"name": layer.name, "is_stem": layer.is_stem, "multiply_adds": layer.multiply_adds}
            for layer in LAYERS
        ],
        "timings": rows,
        "backward": backward,
        "memory": memory,
    }
    return run.finish(options.output, document)


if __name__ == "__main__":
    sys.exit(main())
