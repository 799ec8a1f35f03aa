"""How long ``pixfuse.conv_bias_relu`` takes on a GPU, beside torch and beside its roofline.

    python -m benchmarks.bench_conv_bias_relu_cuda [--time-limit SECONDS] [--output FILE]

Stems from uint8 images, and layers of many channels from floats. Both of our ways are timed, our
own kernel and cuDNN with one pass over its result, so that the rule that chooses can be judged. The
roofline is the longer of two times: that of moving the bytes at the bandwidth of a copy, and that
of the multiply-adds at the rate of a large matrix product, both measured here. ``--device cpu``
tries the program out where there is no GPU: its times mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import conv2d

import pixfuse
from benchmarks import harness, report
from benchmarks.bench_conv_bias_relu import LAYERS, Layer
from benchmarks.gpu.program import Record, console, device_plan, options_of
from benchmarks.harness import Checked, Contestant, Tolerance, UnequalError
from pixfuse._convolution_autograd import OUTPUT_DTYPE_CODES

PACKAGES = ("pixfuse", "torch", "triton")
OURS, OWN, CUDNN = "pixfuse", "pixfuse, own kernel", "pixfuse, cuDNN and a pass"
EAGER, COMPILE, FUSED = "torch eager", "torch.compile", "cuDNN conv + bias + ReLU alone"
FORMATS = (torch.channels_last, torch.contiguous_format)
BATCH, TRY_OUT_BATCH = 64, 1
#: Side of the matrices whose product says how fast this GPU multiplies.
MATRIX_SIDE, TRY_OUT_MATRIX_SIDE = 8192, 256


@dataclass(frozen=True)
class Precision:
    """A dtype, whether torch may multiply float32 as TF32, and how far a result may then be off."""

    name: str
    dtype: torch.dtype
    tf32: bool
    tolerance: Tolerance


# Outputs are below 8, sums of up to 2304 terms whose squares add up to about 1.
PRECISIONS = (
    Precision("float16", torch.float16, False, Tolerance(0.02, "11 bits, and inputs rounded")),
    Precision("bfloat16", torch.bfloat16, False, Tolerance(0.16, "8 bits, and inputs rounded")),
    Precision("TF32", torch.float32, True, Tolerance(0.02, "10 bits of each factor")),
    Precision("float32", torch.float32, False, Tolerance(1e-4, "sums in float32")),
)


@dataclass(frozen=True)
class Point:
    """A layer in one precision and memory format."""

    layer: Layer
    precision: Precision
    memory_format: torch.memory_format

    @property
    def bytes(self) -> int:
        """That must be moved: input, weight and output, each once."""
        layer, size = self.layer, self.precision.dtype.itemsize
        side = (layer.side + 2 * layer.padding - layer.kernel) // layer.stride + 1
        input = layer.batch * layer.channels * layer.side**2 * (1 if layer.is_stem else size)
        weight = layer.outputs * layer.channels * layer.kernel**2 * size
        return input + weight + layer.batch * layer.outputs * side**2 * size


def points(batch: int) -> Iterator[Point]:
    """The main ones first: there may be no time for all."""
    for memory_format, precision in itertools.product(FORMATS, PRECISIONS):
        for layer in LAYERS:
            yield Point(replace(layer, batch=batch), precision, memory_format)


def compiled_here(point: Point) -> bool:
    """torch.compile needs seconds for each point, so it is not at all of them."""
    main = point.precision is PRECISIONS[0] and point.memory_format is FORMATS[0]
    return main and point.layer.name in ("ResNet stem", "VGG stem", "3x3, 64 to 64")


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Torch's settings for convolutions and matrix products, and back."""
    backends: Any = torch.backends
    conv, matmul = backends.cudnn.conv, backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def contestants(point: Point, device: str) -> tuple[list[Contestant], torch.Tensor]:
    """Everybody who does the work of this point, and the expected result."""
    torch.manual_seed(0)
    layer, dtype, memory_format = point.layer, point.precision.dtype, point.memory_format
    weight = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel, device=device)
    weight = (weight / (layer.channels * layer.kernel**2) ** 0.5).to(
        dtype, memory_format=memory_format
    )
    bias = (torch.randn(layer.outputs, device=device) / 8).to(dtype)
    shape = (layer.batch, layer.channels, layer.side, layer.side)
    normalization = None
    constants: tuple[Any, ...] = ((), (), 0)
    if point.layer.is_stem:
        normalization = pixfuse.IMAGENET
        constants = (normalization.mean, normalization.std, normalization.rounding_code)
        input = torch.randint(256, shape, dtype=torch.uint8, device=device)
        input = input.contiguous(memory_format=memory_format)
        floats = pixfuse.normalize(
            input, normalization, dtype=dtype, memory_format=torch.preserve_format
        )
    else:
        input = torch.randn(shape, device=device).to(dtype, memory_format=memory_format)
        floats = input
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (pixfuse.IMAGENET.mean, pixfuse.IMAGENET.std)
    )

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        values = input
        if point.layer.is_stem:
            values = ((input.float() * (1 / 255) - mean) / std).to(dtype)
        output = conv2d(values, weight, bias, layer.stride, layer.padding).relu_()
        return output, (output > 0).sum((0, 2, 3))

    def fused() -> torch.Tensor:
        both = [[number] * 2 for number in (layer.stride, layer.padding, 1)]
        result: torch.Tensor = torch.ops.aten.cudnn_convolution_relu.default(
            floats, weight, bias, *both, 1
        )
        return result

    def ours() -> Any:
        return pixfuse.conv_bias_relu(
            input,
            weight,
            bias,
            layer.stride,
            layer.padding,
            normalization=normalization,
            memory_format=memory_format,
        )

    def by(way: int) -> Callable[[], Any]:
        arguments = (
            [layer.stride] * 2,
            [layer.padding] * 4,
            [1, 1],
            1,
            *constants,
            OUTPUT_DTYPE_CODES[dtype],
            memory_format is torch.channels_last,
            point.precision.tf32,
            way,
        )
        return lambda: torch.ops.pixfuse.conv_bias_relu.default(input, weight, bias, *arguments)

    def first(result: Any) -> torch.Tensor:
        output: torch.Tensor = result[0]
        return output

    tolerance = point.precision.tolerance
    found = [Contestant(OURS, ours, tolerance=tolerance, as_tensor=first)]
    if device == "cuda":
        found += [
            Contestant(name, by(way), tolerance=tolerance, as_tensor=first)
            for name, way in ((OWN, 1), (CUDNN, 2))
        ]
        found.append(Contestant(FUSED, fused, tolerance=tolerance))
    found.append(Contestant(EAGER, eager, tolerance=tolerance, as_tensor=first))
    if device == "cuda" and compiled_here(point):
        found.append(
            Contestant(COMPILE, torch.compile(eager), tolerance=tolerance, as_tensor=first)
        )
    expected, activity = pixfuse.reference.conv_bias_relu(
        floats, weight, bias, layer.stride, layer.padding
    )
    for contestant in found:
        if contestant.name in (OURS, OWN, CUDNN):
            check_counts(contestant, activity)
    return found, expected.contiguous(memory_format=memory_format)


def check_counts(contestant: Contestant, expected: pixfuse.UnitActivity) -> None:
    """Those of the very output, and close to the reference's."""
    output, found, *_ = contestant.call()
    active = found.active if isinstance(found, pixfuse.UnitActivity) else found[0]
    if not torch.equal(active, (output > 0).sum((0, 2, 3))):
        raise UnequalError(f"{contestant.name}: counts that are not those of the output")
    # Outputs near 0 may be counted otherwise in few bits.
    if int((active - expected.active).abs().max()) > expected.positions // 50 + 1:
        raise UnequalError(f"{contestant.name}: counts that are not those of the reference")


class Limits:
    """What this GPU can do at most: bytes per us of a copy, multiply-adds per us of a product."""

    def __init__(self, device: str) -> None:
        side = MATRIX_SIDE if device == "cuda" else TRY_OUT_MATRIX_SIDE
        plan = device_plan(device)
        words = torch.empty(side * side, dtype=torch.int64, device=device).random_()
        source = words.view(torch.uint8)
        target = torch.empty_like(source)
        copy = Contestant(
            report.COPY, lambda: target.copy_(source), output="recycled", target=target
        )
        us = harness.measure([Checked(copy, source)], plan)[0].median_us
        self.bytes_per_us = 2 * source.nbytes / us
        self.multiply_adds_per_us: dict[str, float] = {}
        for precision in PRECISIONS:
            # Random numbers: a GPU multiplies equal ones with less power, and so faster.
            a, b = (
                (torch.randn(side, side, device=device) / side**0.25).to(precision.dtype)
                for _ in range(2)
            )
            product = Contestant(
                "product",
                lambda a=a, b=b: a @ b,  # type: ignore[misc]
                tolerance=precision.tolerance,
            )
            with tf32(precision.tf32):
                checked = Checked(product, (a.double() @ b.double()).to(precision.dtype))
                us = harness.measure([checked], plan)[0].median_us
            self.multiply_adds_per_us[precision.name] = side**3 / us

    def roofline_us(self, point: Point) -> float:
        return max(
            point.bytes / self.bytes_per_us,
            point.layer.multiply_adds / self.multiply_adds_per_us[point.precision.name],
        )


def measure(point: Point, limits: Limits, record: Record) -> dict[str, Any]:
    """Check everybody, then time them."""
    torch.compiler.reset()
    with torch.no_grad(), tf32(point.precision.tf32):
        candidates, expected = contestants(point, record.options.device)
        checked = [
            checked
            for one in candidates
            for checked in record.checked(one.name, functools.partial(Checked, one, expected))
        ]
        timings = harness.measure(checked, device_plan(record.options.device))
    return {
        "layer": point.layer.name,
        "batch": point.layer.batch,
        "input": "uint8" if point.layer.is_stem else point.precision.name,
        "precision": point.precision.name,
        "memory_format": str(point.memory_format).removeprefix("torch."),
        "roofline_us": float(f"{limits.roofline_us(point):.4g}"),
        "us_per_call": {timing.name: timing.quartiles_us() for timing in timings},
        "max_error": {c.contestant.name: c.max_error for c in checked},
    }


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its value, all computed from the rows."""

    def over_roofline(among: Sequence[dict[str, Any]]) -> float | None:
        return max(
            (row["us_per_call"][OURS][1] / row["roofline_us"] for row in among), default=None
        )

    stems = [row for row in rows if row["input"] == "uint8"]
    layers = [row for row in rows if row["input"] != "uint8"]
    of_layers = report.least_ratio(layers, FUSED, OURS)
    return [
        report.claim(
            "stems from uint8: the least speedup over normalize, cuDNN, ReLU and count",
            report.least_ratio(stems, EAGER, OURS),
            ">= 2",
        ),
        report.claim(
            "stems from uint8: the most time over the roofline", over_roofline(stems), "<= 1.5"
        ),
        report.claim(
            "stems from uint8: the least speedup over torch.compile",
            report.least_ratio(stems, COMPILE, OURS),
            ">= 1",
        ),
        report.claim(
            "layers of many channels: the most time over cuDNN's conv + bias + ReLU",
            None if of_layers is None else 1 / of_layers,
            "<= 1.1",
        ),
        report.claim(
            "stems: the least speedup of our own kernel over cuDNN and a pass",
            report.least_ratio(stems, CUDNN, OWN),
            ">= 1",
        ),
        report.claim(
            "layers: the least speedup of cuDNN and a pass over our own kernel",
            report.least_ratio(layers, OWN, CUDNN),
            ">= 1",
        ),
    ]


def describe(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {q[1]:.1f}" for name, q in row["us_per_call"].items())
    return (
        f"{row['layer']} {row['precision']} {row['memory_format']}: roofline "
        f"{row['roofline_us']:.1f}, {times}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, "conv_bias_relu_cuda.json", argv, quick="the first layers alone")
    if options is None:
        return 1
    limits = Limits(options.device)
    record = Record(
        options,
        "quartiles (25 %, median, 75 %) of one call in microseconds on the device alone; "
        "max_error is the largest difference from the float64 reference",
        PACKAGES,
        claims,
        copy_bytes_per_us=limits.bytes_per_us,
        multiply_adds_per_us=limits.multiply_adds_per_us,
    )
    every_point = list(points(BATCH if options.device == "cuda" else TRY_OUT_BATCH))
    if options.quick:
        every_point = every_point[: len(LAYERS)]
    console.print("us on the device")
    record.measure(every_point, lambda point: measure(point, limits, record), describe)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
