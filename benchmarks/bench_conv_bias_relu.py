"""How long ``pixfuse.conv_bias_relu`` takes on the CPU, beside eager, compiled and fused torch.

    python -m benchmarks.bench_conv_bias_relu [--quick] [--filter TEXT] [--output FILE]

Stems from uint8 images, and layers of many channels from floats; one thread, every output fresh, as
a training loop sees it. Each result is compared with the float64 reference before it is timed. Ends
with status 1 when a result was not equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d

import pixfuse
from benchmarks import harness, report
from benchmarks.harness import Checked, Contestant, Plan, Tolerance, UnequalError

PACKAGES = ("pixfuse", "torch")
TOLERANCE = Tolerance(1e-4, "sums of up to 2304 terms of about 1/48 in float32")
PLAN = Plan(rounds=15, sample_seconds=50e-3, budget_seconds=60.0)
QUICK_PLAN = Plan(rounds=5, sample_seconds=10e-3, budget_seconds=10.0)
OURS, EAGER, COMPILE, FUSED = "pixfuse", "torch eager", "torch.compile", "oneDNN conv + ReLU alone"
console = report.console()


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
    def multiply_adds(self) -> int:
        output_side = (self.side + 2 * self.padding - self.kernel) // self.stride + 1
        return self.batch * output_side**2 * self.outputs * self.channels * self.kernel**2


LAYERS = [
    Layer("ResNet stem", 3, 64, 7, 2, 3),
    Layer("VGG stem", 3, 64, 3, 1, 1),
    Layer("MobileNet stem", 3, 32, 3, 2, 1),
    Layer("ConvNeXt stem", 3, 96, 4, 4, 0),
    Layer("ViT stem", 3, 768, 16, 16, 0),
    Layer("AlexNet stem", 3, 64, 11, 4, 2),
    Layer("3x3, 64 to 64", 64, 64, 3, 1, 1, side=56),
    Layer("3x3, 256 to 256", 256, 256, 3, 1, 1, side=14),
]


def contestants(layer: Layer, memory_format: torch.memory_format) -> tuple[list[Contestant], Any]:
    """Everybody who does the work of this layer, and the expected result."""
    torch.manual_seed(0)
    weight = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel)
    weight = (weight / (layer.channels * layer.kernel**2) ** 0.5).contiguous(
        memory_format=memory_format
    )
    bias = torch.randn(layer.outputs) / 8
    shape = (layer.batch, layer.channels, layer.side, layer.side)
    from_bytes = layer.channels == 3
    options: dict[str, Any] = {}
    if from_bytes:
        input = torch.randint(256, shape, dtype=torch.uint8)
        options["normalization"] = pixfuse.IMAGENET
        floats = pixfuse.normalize(input, pixfuse.IMAGENET, memory_format=memory_format)
    else:
        input = floats = torch.randn(shape)
    input, floats = (t.contiguous(memory_format=memory_format) for t in (input, floats))
    mean = torch.tensor(pixfuse.IMAGENET.mean).view(3, 1, 1)
    std = torch.tensor(pixfuse.IMAGENET.std).view(3, 1, 1)

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        values = (input.float() * (1 / 255) - mean) / std if from_bytes else input
        output = conv2d(values, weight, bias, layer.stride, layer.padding).relu_()
        return output, (output > 0).sum((0, 2, 3))

    def fused() -> torch.Tensor:
        both = [[number] * 2 for number in (layer.padding, layer.stride, 1)]
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            floats, weight, bias, *both, 1, "relu", [], ""
        )

    def ours() -> tuple[torch.Tensor, pixfuse.UnitActivity]:
        return pixfuse.conv_bias_relu(
            input, weight, bias, layer.stride, layer.padding, memory_format=memory_format, **options
        )

    def first(result: Any) -> torch.Tensor:
        output: torch.Tensor = result[0]
        return output

    calls: list[tuple[str, Callable[[], Any], Callable[[Any], torch.Tensor]]] = [
        (OURS, ours, first),
        (EAGER, eager, first),
        (COMPILE, torch.compile(eager), first),
        (FUSED, fused, lambda result: result),
    ]
    expected, activity = pixfuse.reference.conv_bias_relu(
        input, weight, bias, layer.stride, layer.padding, **options
    )
    output, mine = ours()
    if not torch.equal(mine.active, (output > 0).sum((0, 2, 3))):
        raise UnequalError(f"{OURS}: counts that are not those of the output")
    # Only outputs that the tolerance can turn may be counted otherwise.
    if int((mine.active - activity.active).abs().max()) > activity.positions // 1000 + 1:
        raise UnequalError(f"{OURS}: counts that are not those of the reference")
    return (
        [Contestant(name, c, tolerance=TOLERANCE, as_tensor=a) for name, c, a in calls],
        expected.contiguous(memory_format=memory_format),
    )


def check(contestant: Contestant, expected: torch.Tensor, problems: list[str]) -> list[Checked]:
    """The checked contestant, or nobody: then the problem is noted and nothing is timed."""
    try:
        return [Checked(contestant, expected)]
    except UnequalError as error:
        problems.append(str(error))
        console.print(f"not equal, so not timed: {error}", markup=False)
        return []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few short rounds")
    parser.add_argument("--filter", default="", help="only layers whose name contains this")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "conv_bias_relu_cpu.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for layer in LAYERS:
        if arguments.filter not in layer.name:
            continue
        for memory_format in (torch.channels_last, torch.contiguous_format):
            torch.compiler.reset()
            with torch.no_grad():
                candidates, expected = contestants(layer, memory_format)
                checked = [c for one in candidates for c in check(one, expected, problems)]
                timings = harness.measure(checked, QUICK_PLAN if arguments.quick else PLAN)
            mine = next((t.median_us for t in timings if t.name == OURS), None)
            for timing in timings:
                ratio = None if mine is None else timing.median_us / mine
                rows.append(
                    {
                        "layer": layer.name,
                        "output": str(memory_format).removeprefix("torch."),
                        "name": timing.name,
                        "median_us": timing.median_us,
                        "quartiles_us": timing.quartiles_us(),
                        "time_over_pixfuse": ratio,
                        "max_error": timing.checked.max_error,
                        "multiply_adds_per_us": layer.multiply_adds / timing.median_us,
                    }
                )
                console.print(
                    f"{layer.name:16} {rows[-1]['output']:18} {timing.name:26} "
                    f"{timing.median_us / 1e3:9.2f} ms  {ratio or float('nan'):6.2f}",
                    markup=False,
                    highlight=False,
                )
    harness.write_json(
        arguments.output,
        {
            "environment": harness.environment(PACKAGES),
            "isa": pixfuse.info()["isa"],
            "threads": 1,
            "memory": "fresh outputs",
            "problems": problems,
            "timings": rows,
        },
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
