"""`pixfuse.conv_bias_relu` against its float64 reference: values, counts, derivatives, errors."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.functional import conv2d, max_pool2d, pad, relu
from torch.utils.flop_counter import FlopCounterMode

import pixfuse
from pixfuse import _library
from pixfuse._convolution_autograd import _SLICE_BYTES
from tests.bits import assert_same_bits
from tests.images import LAYOUTS, random_bytes
from tests.isas import FOR_CONVOLUTIONS, IN_PAIRS, OF_BITS, OF_BYTES
from tests.normalizations import ROUNDINGS, made_up

# Of torch's own convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

ROOT = Path(__file__).parent.parent

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from the float64 reference, and why."""

    of_sum: float  # times the sum of the magnitudes that are added up, and their number's root
    of_result: float  # times the result
    absolute: float
    reason: str


# Each of n additions is wrong by up to 2^-24 of a sum, in either direction: together by about the
# root of n, and with 4 times that no case here is missed.
FLOAT32_SUM = 4 * 2.0**-24
TOLERANCES = {
    torch.float32: Tolerance(FLOAT32_SUM, 2**-24, 2**-149, "sums in float32"),
    torch.bfloat16: Tolerance(FLOAT32_SUM, 2**-8, 2**-133, "8 bits, rounded once"),
    torch.float16: Tolerance(FLOAT32_SUM, 2**-11, 2**-25, "11 bits, subnormal below 2^-14"),
    torch.float64: Tolerance(4 * 2**-53, 2**-53, 2**-1074, "sums in float64"),
}


@dataclass(frozen=True)
class Case:
    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    size: tuple[int, int] = (23, 26)
    images: int = 2
    bias: bool = True

    def options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        taps = self.channels // self.groups * math.prod(self.kernel)
        weight = torch.randn(self.outputs, self.channels // self.groups, *self.kernel)
        bias = torch.randn(self.outputs) / 4 if self.bias else None
        return (weight / math.sqrt(taps)).to(dtype), None if bias is None else bias.to(dtype)


class Truth:
    """Pre-activations in float64, and how far from them a result of some dtype may be."""

    def __init__(
        self,
        values: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        options: tuple[Any, ...],
    ) -> None:
        wide = values.double().contiguous(), weight.double()
        wide_bias = None if bias is None else bias.double()
        self.exact = conv2d(*wide, wide_bias, *options)
        absolute_bias = None if bias is None else bias.double().abs()
        self.magnitude = conv2d(wide[0].abs(), wide[1].abs(), absolute_bias, *options)
        self.root = math.sqrt(weight[0].numel() + 1)

    def share_rounding(self) -> None:
        """Winograd's algorithm rounds what up to 4 by 2 neighbouring outputs have in common."""
        self.magnitude = max_pool2d(self.magnitude, (3, 7), 1, (1, 3))

    def error(self, dtype: torch.dtype) -> torch.Tensor:
        tolerance = TOLERANCES[dtype]
        return (
            tolerance.of_sum * self.root * self.magnitude
            + tolerance.of_result * self.exact.abs()
            + tolerance.absolute
        )


def check_activity(output: torch.Tensor, activity: pixfuse.UnitActivity) -> None:
    """The activity is that of the very output that came with it."""
    batch = output if output.dim() == 4 else output[None]
    fires = batch > 0
    assert torch.equal(activity.active, fires.sum((0, 2, 3)))
    assert torch.equal(activity.active_images, fires.flatten(2).any(2).sum(0))
    assert torch.equal(activity.nan, batch.isnan().sum((0, 2, 3)))
    assert activity.positions == batch.shape[0] * batch.shape[2] * batch.shape[3]
    assert activity.images == batch.shape[0]
    expected = batch.double().sum((0, 2, 3))
    torch.testing.assert_close(
        activity.output_sum, expected, rtol=1e-5, atol=1e-300, equal_nan=True
    )


def check_values(output: torch.Tensor, activity: pixfuse.UnitActivity, truth: Truth) -> None:
    exact, error = truth.exact, truth.error(output.dtype)
    assert output.shape == exact.shape
    too_far = (output.double() - exact.relu()).abs() > error
    assert not too_far.any(), f"{int(too_far.sum())} of {output.numel()} outputs are too far off"
    surely = (exact > error).sum((0, 2, 3))
    perhaps = (exact > -error).sum((0, 2, 3))
    assert bool((surely <= activity.active).all())
    assert bool((activity.active <= perhaps).all())
    check_activity(output, activity)


def check(
    case: Case,
    input: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    *,
    winograd: bool = False,
    isas: Sequence[str] = FOR_CONVOLUTIONS,
    **options: Any,
) -> None:
    """A call on each instruction set against float64: its values, its counts, that both agree.

    `dtypes` are those of the output: of float input its own one.
    """
    weight, bias = case.weights(input.dtype if input.is_floating_point() else torch.float32)
    values = input
    if not input.is_floating_point():
        normalization = made_up(case.channels, "torchvision")
        options["normalization"] = normalization
        values = pixfuse.reference.normalize(input, normalization)
    truth = Truth(values, weight, bias, case.options())
    if winograd:
        truth.share_rounding()
    for isa, dtype in itertools.product(isas, dtypes):
        with _library.use_isa(isa):
            output, activity = pixfuse.conv_bias_relu(
                input, weight, bias, *case.options(), dtype=dtype, **options
            )
        assert output.dtype is dtype
        check_values(output, activity, truth)


STEMS = {
    "resnet": Case(3, 64, (7, 7), 2, 3, size=(65, 64)),
    "vgg": Case(3, 64, (3, 3), 1, 1, size=(33, 31)),
    "mobilenet": Case(3, 32, (3, 3), 2, 1, size=(64, 61)),
    "convnext": Case(3, 96, (4, 4), 4, 0, size=(64, 68)),
    "vit": Case(3, 768, (16, 16), 16, 0, size=(64, 48), images=1),
    "alexnet": Case(3, 64, (11, 11), 4, 2, size=(135, 131)),
}

GRID = [
    *(
        Case(3, 16, (k, k), stride, k // 2, size=(25, 37))
        for k in (1, 2, 3, 4, 5, 6, 7, 11, 16)
        for stride in (1, 2, 3, 4)
    ),
    *(
        Case(channels, outputs, (3, 3), 1, 1, size=(9, 13))
        for channels in (1, 2, 3, 4, 8, 13, 64)
        for outputs in (1, 7, 16, 64, 96, 100, 768)
    ),
    *(Case(3, 5, (3, 2), (2, 1), (1, 2), dilation) for dilation in (2, 3, (1, 4), (5, 1))),
    *(Case(4, 8, (3, 3), 1, 1, 1, groups) for groups in (2, 4)),
    *(Case(12, 24, (3, 3), 2, 1, 2, groups) for groups in (2, 3, 12)),
    *(Case(3, 20, (5, 5), 1, padding) for padding in ("same", "valid", (4, 0), 9)),
    *(Case(channels, 6, (4, 2), 1, "same", (1, 3)) for channels in (3, 8)),
    *(Case(2, 17, (1, 1), 1, 0, size=(1, width)) for width in (1, 5, 11, 12, 13, 47, 48, 49, 97)),
    *(Case(channels, 9, (3, 3), 1, 1, bias=False) for channels in (2, 9)),
    Case(3, 33, (7, 1), (3, 2), (3, 0), size=(64, 7)),
    Case(1, 4, (20, 20), 1, 0, size=(20, 20)),
    Case(1, 130, (16, 16), 5, 3, size=(40, 41)),
]


@pytest.fixture(params=FOR_CONVOLUTIONS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, in force while the test runs."""
    with _library.use_isa(request.param):
        yield request.param


# --- values and counts ---


@pytest.mark.parametrize("name", STEMS)
def test_stems(name: str) -> None:
    case = STEMS[name]
    for channels_last, memory_format in itertools.product((False, True), FORMATS):
        images = random_bytes(case.images, *case.size, case.channels).permute(0, 3, 1, 2)
        if not channels_last:
            images = images.contiguous()
        check(case, images, DTYPES, memory_format=memory_format)
        for dtype in DTYPES:
            check(case, images.to(dtype) / 64 - 2, (dtype,), memory_format=memory_format)


def test_grid() -> None:
    for i, case in enumerate(GRID):
        shape = (case.images, case.channels, *case.size)
        # Not every combination of layouts and types with every case, but each with many.
        memory_format = FORMATS[i // 2 % 2]
        images = random_bytes(*shape).contiguous(memory_format=FORMATS[i % 2])
        check(case, images, DTYPES, memory_format=memory_format)
        floats = torch.randn(shape).to(DTYPES[i % 3]).contiguous(memory_format=FORMATS[i // 4 % 2])
        check(case, floats, (floats.dtype,), memory_format=memory_format)


@pytest.mark.parametrize("fault", ["a tap", "the bias", "a pixel", "a border", "a count"])
def test_a_fault_is_noticed(fault: str) -> None:
    """Of the checks above, in the case with the most taps."""
    case = STEMS["vit"]
    weight, bias = case.weights(torch.float32)
    assert bias is not None
    images = torch.randn(1, 3, 64, 48)
    truth = Truth(images, weight, bias, case.options())
    if fault == "a tap":
        weight = weight.clone()
        weight[5, 1, 7, 7] += 0.002
    elif fault == "the bias":
        bias = bias * 1.001
    elif fault == "a pixel":
        images = images.clone()
        images[0, 1, 40, 30] += 0.01
    elif fault == "a border":
        images = images.roll(1, 3)
    output, activity = pixfuse.conv_bias_relu(images, weight, bias, *case.options())
    if fault == "a count":
        activity.active[3] += 1
        with pytest.raises(AssertionError):
            check_activity(output, activity)
    else:
        with pytest.raises(AssertionError, match="outputs are too far off"):
            check_values(output, activity, truth)


def test_no_further_off_than_twice_torch(isa: str) -> None:
    for case in (*STEMS.values(), Case(64, 64, (3, 3), 1, 1, size=(14, 14)), Case(3, 40, (1, 1))):
        for dtype in DTYPES:
            weight, bias = case.weights(dtype)
            input = torch.randn(case.images, case.channels, *case.size).to(dtype)
            output, _ = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
            theirs = relu(conv2d(input, weight, bias, *case.options()))
            exact = pixfuse.reference.conv_bias_relu(
                input, weight, bias, *case.options(), dtype=torch.float64
            )[0]

            def error(result: torch.Tensor, exact: torch.Tensor = exact) -> tuple[float, float]:
                difference = (result.double() - exact).abs()
                return difference.max().item(), difference.pow(2).mean().sqrt().item()

            for mine, torchs in zip(error(output), error(theirs), strict=True):
                assert mine <= 2 * torchs


@pytest.mark.parametrize("positive", [False, True])
def test_no_further_off_than_torch_where_many_are_added_up(isa: str, positive: bool) -> None:
    """In floats, of any weights and images, and with a bias as large as the result."""
    cases = (
        Case(4, 16, (16, 16), 1, size=(30, 30)),
        Case(3, 64, (16, 16), 16, size=(112, 112)),
        Case(3, 64, (11, 11), 4, 2, size=(112, 112)),
        Case(3, 17, (7, 7), 3, (3, 1), (1, 3), size=(57, 43)),
        Case(4, 31, (13, 13), 2, 3, size=(33, 56)),
        Case(1, 20, (20, 20), 1, 7, size=(40, 40)),
        Case(3, 32, (3, 3), 1, 1, size=(56, 56)),
    )
    for case, memory_format in itertools.product(cases, FORMATS):
        input = torch.randn(2, case.channels, *case.size)
        weight = torch.randn(case.outputs, case.channels, *case.kernel)
        weight /= math.sqrt(weight[0].numel())
        if positive:
            weight = weight.abs()
        bias = torch.randn(case.outputs)
        call = (weight, bias, *case.options())
        exact = relu(conv2d(input.double(), weight.double(), bias.double(), *case.options()))
        ours, _ = pixfuse.conv_bias_relu(input, *call, memory_format=memory_format)
        theirs = relu(conv2d(input, *call))
        mine, torchs_own = ((result - exact).abs() for result in (ours, theirs))
        few = weight[0].numel() < 100
        assert mine.max() <= (2 if few else 1) * torchs_own.max()
        assert mine.pow(2).mean() <= (1.5**2 if few else 1) * torchs_own.pow(2).mean()


@pytest.mark.parametrize("kernel", [(7, 7), (11, 11), (16, 16)])
def test_a_kernel_of_one_weight_leaves_the_bits_of_the_pixel(
    isa: str, kernel: tuple[int, int]
) -> None:
    """Torch has no error there, so a sum of many zeros must have none."""
    images = random_bytes(2, 3, 40, 41)
    weight = torch.zeros(17, 3, *kernel)
    taps = torch.randint(0, weight[0].numel(), (17,))
    weight.view(17, -1)[torch.arange(17), taps] = torch.randn(17)
    ours, _ = pixfuse.conv_bias_relu(images, weight, normalization=pixfuse.IMAGENET)
    floats = pixfuse.normalize(images, pixfuse.IMAGENET)
    assert_same_bits(ours, relu(conv2d(floats.double(), weight.double())).float())


def test_rows_of_padding_that_are_left_out_leave_the_bits(isa: str) -> None:
    """Rows of the kernel are added up in the same groups, whether or not the first ones are."""
    for kernel, padding in (((13, 8), (5, 1)), ((9, 12), (7, 0)), ((16, 6), (1, 1))):
        case = Case(4, 20, kernel, 1, padding, size=(30, 31))
        weight, bias = case.weights(torch.float32)
        input = torch.randn(2, 4, *case.size)
        of_planes, of_pixels = (
            pixfuse.conv_bias_relu(
                input.contiguous(memory_format=memory_format),
                weight,
                bias,
                *case.options(),
                memory_format=torch.contiguous_format,
            )[0]
            for memory_format in FORMATS
        )
        assert_same_bits(of_pixels, of_planes)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bytes_are_normalized_exactly_as_normalize_does(isa: str, rounding: Any) -> None:
    """The same bits as from normalized floats: in the middle, and at the borders."""
    for channels, outputs in ((1, 5), (2, 16), (3, 20), (4, 64), (6, 8)):
        case = Case(channels, outputs, (3, 5), (1, 2), (2, 3), size=(19, 43))
        normalization = made_up(channels, rounding)
        for layout in (random_bytes, LAYOUTS["channels_last"], LAYOUTS["crop"]):
            images = layout(2, channels, *case.size)
            weight, bias = case.weights(torch.float32)
            call = (weight, bias, *case.options())
            ours, activity = pixfuse.conv_bias_relu(
                images, *call, normalization=normalization, memory_format=torch.contiguous_format
            )
            floats = pixfuse.normalize(images, normalization)
            expected, of_floats = pixfuse.conv_bias_relu(
                floats, *call, memory_format=torch.contiguous_format
            )
            assert_same_bits(ours, expected)
            assert torch.equal(activity.output_sum, of_floats.output_sum)


def test_one_number_stands_for_every_channel() -> None:
    case = Case(3, 8, (3, 3))
    weight, bias = case.weights(torch.float32)
    images = random_bytes(2, 3, 9, 9)
    one = pixfuse.conv_bias_relu(images, weight, bias, normalization=pixfuse.SIGNED)[0]
    three = pixfuse.Normalization([0.5] * 3, [0.5] * 3)
    assert_same_bits(one, pixfuse.conv_bias_relu(images, weight, bias, normalization=three)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(isa: str, layout: str) -> None:
    for channels in (1, 3, 5):
        case = Case(channels, 18, (3, 3), 2, 1, size=(9, 31))
        images = LAYOUTS[layout](2, channels, *case.size)
        weight, bias = case.weights(torch.float32)
        call = (weight, bias, *case.options())
        options: dict[str, Any] = {
            "normalization": made_up(channels, "timm"),
            "memory_format": torch.contiguous_format,
        }
        expected, _ = pixfuse.conv_bias_relu(images.clone(), *call, **options)
        ours, activity = pixfuse.conv_bias_relu(images, *call, **options)
        nhwc, _ = pixfuse.conv_bias_relu(
            images.permute(0, 2, 3, 1), *call, input_layout="NHWC", **options
        )
        torch.testing.assert_close(ours, expected)  # oneDNN sums up in other orders by layout
        torch.testing.assert_close(nhwc, expected)
        if channels <= 4:
            assert_same_bits(ours, expected)
            assert_same_bits(nhwc, expected)
        check_activity(ours, activity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_floats_and_weights(isa: str, dtype: torch.dtype) -> None:
    for channels in (3, 6):
        case = Case(channels, 20, (3, 3), 1, 1, size=(11, 13))
        weight, bias = case.weights(dtype)
        assert bias is not None
        wide = torch.randn(2, channels, 11, 26).to(dtype)
        every_second = wide[..., ::2]
        transposed = torch.randn(2, channels, 13, 11).to(dtype).transpose(2, 3)
        strided_weight = torch.stack([weight, weight], -1)[..., 0]
        strided_bias = torch.stack([bias, bias], -1)[:, 0]
        for input in (every_second, transposed, every_second.expand(2, channels, 11, 13)):
            ours, activity = pixfuse.conv_bias_relu(
                input, strided_weight, strided_bias, *case.options()
            )
            check_values(ours, activity, Truth(input, weight, bias, case.options()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_lies_as_that_of_torch(dtype: torch.dtype) -> None:
    for shape, kernel in itertools.product(
        [(2, 3, 8, 9), (2, 1, 8, 9), (2, 6, 8, 9), (1, 6, 8, 8)], [(3, 3), (1, 1)]
    ):
        for input_format, weight_format in itertools.product(FORMATS, FORMATS):
            input = torch.randn(shape).to(dtype).contiguous(memory_format=input_format)
            weight = torch.randn(7, shape[1], *kernel).to(dtype)
            weight = weight.contiguous(memory_format=weight_format)
            ours, _ = pixfuse.conv_bias_relu(input, weight)
            assert ours.stride() == conv2d(input, weight).stride()


def test_one_image(isa: str) -> None:
    for channels in (3, 5):
        case = Case(channels, 8, (3, 3), 1, 1)
        weight, bias = case.weights(torch.float32)
        image = torch.randn(channels, 9, 10)
        single, activity = pixfuse.conv_bias_relu(image, weight, bias, *case.options())
        batch, of_batch = pixfuse.conv_bias_relu(image[None], weight, bias, *case.options())
        assert_same_bits(single, batch[0])
        assert activity.images == of_batch.images == 1
        check_activity(single, activity)


def test_an_array() -> None:
    case = Case(3, 8, (3, 3), 2, 1)
    weight, bias = case.weights(torch.float32)
    images = random_bytes(2, 9, 10, 3)
    options: dict[str, Any] = {"normalization": pixfuse.CLIP, "input_layout": "NHWC"}
    ours, _ = pixfuse.conv_bias_relu(images.numpy(), weight, bias, *case.options(), **options)
    expected, _ = pixfuse.conv_bias_relu(images, weight, bias, *case.options(), **options)
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("channels", [3, 6])
def test_no_images(isa: str, channels: int) -> None:
    weight = torch.randn(5, channels, 3, 3)
    for input in (torch.empty(0, channels, 8, 9), random_bytes(0, channels, 8, 9)):
        options = {} if input.is_floating_point() else {"normalization": pixfuse.UNIT}
        output, activity = pixfuse.conv_bias_relu(input, weight, **options)  # type: ignore[arg-type]
        assert output.shape == (0, 5, 6, 7)
        check_activity(output, activity)
        assert activity.dead_count == 0


def test_float64() -> None:
    for channels in (3, 8):
        case = Case(channels, 16, (3, 3), 2, 1)
        for memory_format in FORMATS:
            input = torch.randn(2, channels, 9, 11, dtype=torch.float64)
            check(case, input, (torch.float64,), memory_format=memory_format)


def test_negated_weights(isa: str) -> None:
    """relu(z) - relu(-z) = z, and each output is above 0 in one of both, or 0 in both."""
    for case in (STEMS["resnet"], Case(8, 24, (3, 3), 1, 1)):
        for dtype in DTYPES:
            weight, bias = case.weights(dtype)
            assert bias is not None
            weight[:3] = 0  # ties, where the bias is 0 too
            bias[:3] = 0
            input = torch.randn(2, case.channels, *case.size).to(dtype)
            above, active = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
            below, inactive = pixfuse.conv_bias_relu(input, -weight, -bias, *case.options())
            truth = Truth(input, weight, bias, case.options())
            difference = above.double() - below.double() - truth.exact
            assert bool((difference.abs() <= truth.error(dtype)).all())
            ties = ((above == 0) & (below == 0)).sum((0, 2, 3))
            assert bool((ties[:3] == active.positions).all())
            assert bool((active.active + inactive.active + ties == active.positions).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 8])
def test_what_is_not_a_number(isa: str, channels: int, dtype: torch.dtype) -> None:
    for memory_format in FORMATS:
        case = Case(channels, 21, (3, 3), 1, 0, size=(12, 70))
        weight, bias = case.weights(dtype)
        assert bias is not None
        input = torch.randn(2, channels, *case.size).to(dtype)
        input[0, 1, 5, 5] = math.nan
        input[1, 0, 3, 66] = math.inf
        input[1, 0, 3, 67] = -math.inf
        weight[4, 0, 1, 1] = math.nan
        weight[5, 1, 0, 0] = math.inf
        bias[6], bias[7], bias[8] = math.nan, math.inf, -math.inf
        ours, activity = pixfuse.conv_bias_relu(
            input, weight, bias, *case.options(), memory_format=memory_format
        )
        # More channels are torch's work, whose bfloat16 on AMX has more NaNs than float64 has.
        of = torch.float64 if channels <= 4 else dtype
        theirs = relu(conv2d(input.to(of), weight.to(of), bias.to(of), *case.options()))
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        check_activity(ours, activity)
        assert activity.nan[0] > 0
        assert activity.nan[4] == activity.positions
        assert not activity.dead[4]
        assert activity.active[7] > 0
        assert activity.nan[8] > 0


def test_small_and_large_results_of_float16(isa: str) -> None:
    """Subnormal numbers, ties, the largest number, and infinity, as torch rounds them."""
    for channels in (1, 5):
        wide = torch.tensor(
            [2**-24, 2**-25, 2**-26, 3 * 2**-25, 5 * 2**-25, 2**-14, 2**-15, 65504, 65519, 65520]
        )
        input = torch.ones(1, channels, 1, 1)
        weight = torch.zeros(10, channels, 1, 1)
        images = (input * 255).to(torch.uint8)
        options: dict[str, Any] = {"normalization": pixfuse.UNIT, "dtype": torch.float16}
        ours, activity = pixfuse.conv_bias_relu(images, weight, wide, **options)
        assert_same_bits(ours.flatten(), wide.half())
        check_activity(ours, activity)
        options["dtype"] = torch.bfloat16
        ours, activity = pixfuse.conv_bias_relu(images, weight, wide, **options)
        assert_same_bits(ours.flatten(), wide.bfloat16())


def test_minus_zero_becomes_zero(isa: str) -> None:
    """In float16 every small sum below 0 is one."""
    for channels, dtype in itertools.product((3, 8), DTYPES):
        for memory_format in FORMATS:
            input = torch.zeros(1, channels, 5, 9, dtype=dtype)
            weight = torch.full((20, channels, 3, 3), -1.0, dtype=dtype)
            ours, activity = pixfuse.conv_bias_relu(
                input, weight, torch.full((20,), -0.0, dtype=dtype), memory_format=memory_format
            )
            zeros = torch.zeros(1, 20, 3, 7, dtype=dtype)
            assert_same_bits(ours, zeros.contiguous(memory_format=memory_format))
            assert activity.dead_count == 20
            assert activity.nan.sum() == 0
    small = torch.full((1, 8, 2, 2), 1e-4, dtype=torch.float16)
    weight = torch.full((1, 8, 1, 1), -1e-5, dtype=torch.float16)
    ours, _ = pixfuse.conv_bias_relu(small, weight)
    assert_same_bits(ours, torch.zeros(1, 1, 2, 2, dtype=torch.float16))


def test_the_same_bits_for_any_number_of_threads(isa: str) -> None:
    for channels, outputs in ((3, 96), (8, 40)):
        case = Case(channels, outputs, (5, 5), 2, 2, size=(61, 70), images=5)
        weight, bias = case.weights(torch.float32)
        for memory_format in FORMATS:
            input = torch.randn(5, channels, *case.size)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(
                    pixfuse.conv_bias_relu(
                        input, weight, bias, *case.options(), memory_format=memory_format
                    )
                )
            for output, activity in results[1:]:
                assert_same_bits(output, results[0][0])
                assert_same_bits(activity.output_sum, results[0][1].output_sum)
                assert torch.equal(activity.active, results[0][1].active)


def test_a_batch_is_its_images(isa: str) -> None:
    case = STEMS["resnet"]
    weight, bias = case.weights(torch.float32)
    images = random_bytes(3, 3, *case.size)
    call = (weight, bias, *case.options())
    whole, activity = pixfuse.conv_bias_relu(images, *call, normalization=pixfuse.CLIP)
    parts = [
        pixfuse.conv_bias_relu(images[i : i + 1], *call, normalization=pixfuse.CLIP)
        for i in range(3)
    ]
    assert_same_bits(whole, torch.cat([output for output, _ in parts]))
    total = parts[0][1] + parts[1][1] + parts[2][1]
    assert torch.equal(total.active, activity.active)
    assert torch.equal(total.active_images, activity.active_images)
    assert (total.positions, total.images) == (activity.positions, activity.images)


def test_autocast() -> None:
    case = Case(3, 8, (3, 3), 1, 1)
    weight, bias = case.weights(torch.float32)
    input = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, activity = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
        theirs = relu(conv2d(input, weight, bias, *case.options()))
        of_bytes, _ = pixfuse.conv_bias_relu(
            random_bytes(2, 3, 9, 9), weight, bias, normalization=pixfuse.UNIT
        )
        wide, _ = pixfuse.conv_bias_relu(input.double(), weight.double())
    assert ours.dtype is theirs.dtype is of_bytes.dtype is torch.bfloat16
    assert wide.dtype is torch.float64
    low = [t.bfloat16() for t in (input, weight)] + [bias.bfloat16() if bias is not None else None]
    expected, _ = pixfuse.conv_bias_relu(*low, *case.options())  # type: ignore[arg-type]
    assert_same_bits(ours, expected)
    check_activity(ours, activity)


# --- more channels than images have, directly ---

# Float32 on AVX-512, from pixels to pixels, whose channels lie side by side: 1x1 and 3x3.
MANY_DIRECTLY = {
    "5 channels": Case(5, 17, (3, 3), 1, 1, size=(19, 56)),
    "8 to 16": Case(8, 16, (3, 3), 2, 1, size=(41, 61)),
    "64 to 64": Case(64, 64, (3, 3), 1, 1, size=(15, 57)),
    "64 to 100, large steps": Case(64, 100, (3, 3), (2, 3), (2, 1), size=(41, 100)),
    "1x1": Case(256, 256, (1, 1), 1, 0, size=(33, 16)),
    "1x1, large steps": Case(576, 40, (1, 1), (1, 2), (1, 0), 2, size=(33, 34)),
    "more weights than the cache holds": Case(64, 128, (3, 3), 1, 1, size=(41, 14)),
    "256 to 170": Case(256, 170, (3, 3), 1, 1, size=(14, 14), images=6),
    "65 to 72": Case(65, 72, (3, 3), 1, (2, 0), size=(17, 33)),
    "no bias": Case(13, 20, (3, 3), 1, "same", size=(20, 40), bias=False),
    "more padding than input": Case(8, 32, (3, 3), 1, 16, size=(2, 2)),
    **{
        f"{outputs} outputs, {width} wide": Case(16, outputs, (3, 3), 1, 1, size=(height, width))
        for outputs in (32, 48, 64)  # 2, 3 and 4 vectors: tiles of 14, 8 and 7
        for width in (1, 6, 7, 8, 9, 13, 14, 15, 55, 113)
        for height in (-(-512 // width),)
    },
}
# And from planes to planes: 3x3, of rows that are not short.
MANY_PLANES_DIRECTLY = {
    "64 to 64": Case(64, 64, (3, 3), 1, 1, size=(20, 57)),
    "64 to 100, large steps": Case(64, 100, (3, 3), (2, 3), (2, 1), size=(41, 100)),
    "256 to 170": Case(256, 170, (3, 3), 1, 1, size=(14, 14), images=6),
    "65 to 72": Case(65, 72, (3, 3), 1, (2, 0), size=(17, 33)),
    "not padded": Case(49, 32, (3, 3), 1, 0, size=(23, 58), bias=False),
    "more padding than input": Case(32, 32, (3, 3), 1, 16, size=(2, 2)),
    "more weights than the cache holds": Case(62, 129, (3, 3), 1, 1, size=(21, 32)),
    **{
        f"{outputs} outputs, {width} wide": Case(33, outputs, (3, 3), 1, 1, size=(height, width))
        for outputs in (32, 33, 48, 64)
        for width in (14, 15, 16, 28, 31, 56, 57, 64, 112, 113)
        for height in (-(-512 // width),)
    },
}
MANY_BY_TORCH = {
    "too many weights": Case(257, 64, (3, 3), 1, 1, size=(32, 32)),
    "too many for few outputs": Case(65, 63, (3, 3), 1, 1, size=(32, 32)),
    "too many for many outputs": Case(256, 171, (3, 3), 1, 1, size=(32, 32)),
    "too many for a stride": Case(65, 64, (3, 3), (1, 2), 1, size=(32, 33)),
    "too many for 1x1": Case(577, 64, (1, 1), size=(32, 32)),
    "too many for one vector": Case(15, 16, (3, 3), 1, 1, size=(32, 32)),
    "groups": Case(16, 64, (3, 3), 1, 1, 1, 2, size=(32, 32)),
    "another kernel": Case(16, 64, (3, 2), 1, 1, size=(32, 32)),
    "dilated": Case(16, 64, (3, 3), 1, 2, (1, 2), size=(32, 32)),
    "a small result": Case(16, 64, (3, 3), 1, 1, size=(31, 16)),
}
MANY_PLANES_BY_TORCH = {
    "too few weights": Case(28, 64, (3, 3), 1, 1, size=(20, 57)),
    "few outputs": Case(64, 31, (3, 3), 1, 1, size=(20, 57)),
    "short rows": Case(64, 64, (3, 3), 1, 1, size=(80, 13)),
    "1x1": Case(300, 64, (1, 1), size=(20, 57)),
}


def goes_by_torch(case: Case, input: torch.Tensor, memory_format: torch.memory_format) -> bool:
    weight, bias = case.weights(input.dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pixfuse.conv_bias_relu(input, weight, bias, *case.options(), memory_format=memory_format)
    return "aten::convolution" in {event.name for event in profile.events()}


def many_channels(case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    input = torch.randn(case.images, case.channels, *case.size, dtype=dtype)
    return input.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("isa", _library.available_isas(), indirect=True)
def test_who_goes_directly(isa: str) -> None:
    directly = isa in ("avx512", *OF_BYTES, *OF_BITS)
    for case in MANY_DIRECTLY.values():
        assert goes_by_torch(case, many_channels(case), torch.channels_last) is not directly
    for case in MANY_BY_TORCH.values():
        assert goes_by_torch(case, many_channels(case), torch.channels_last)
    for case in MANY_PLANES_DIRECTLY.values():
        planes = many_channels(case).contiguous()
        assert goes_by_torch(case, planes, torch.contiguous_format) is not directly
    for case in (*MANY_BY_TORCH.values(), *MANY_PLANES_BY_TORCH.values()):
        assert goes_by_torch(case, many_channels(case).contiguous(), torch.contiguous_format)
    case = MANY_DIRECTLY["64 to 64"]
    assert goes_by_torch(case, many_channels(case), torch.contiguous_format)
    assert goes_by_torch(case, many_channels(case).contiguous(), torch.channels_last)
    for dtype in (torch.bfloat16, torch.float64):
        for memory_format in FORMATS:
            input = many_channels(case, dtype).contiguous(memory_format=memory_format)
            assert goes_by_torch(case, input, memory_format)


MANY_IN_BOTH_FORMATS = [
    *((torch.channels_last, name) for name in MANY_DIRECTLY),
    *((torch.contiguous_format, name) for name in MANY_PLANES_DIRECTLY),
]


def many_in(memory_format: torch.memory_format, name: str) -> tuple[Case, torch.Tensor]:
    cases = MANY_DIRECTLY if memory_format is torch.channels_last else MANY_PLANES_DIRECTLY
    return cases[name], many_channels(cases[name]).contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("memory_format", "name"), MANY_IN_BOTH_FORMATS)
def test_many_channels_directly(memory_format: torch.memory_format, name: str, isa: str) -> None:
    case, input = many_in(memory_format, name)
    check(case, input, DTYPES[:1], isas=(isa,), memory_format=memory_format)
    input[0, case.channels - 1, case.size[0] // 2, case.size[1] // 2] = math.nan
    weight, bias = case.weights(torch.float32)
    output, activity = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
    exact = relu(conv2d(input.double(), weight.double(), None, *case.options()))
    assert torch.equal(output.isnan(), exact.isnan())
    check_activity(output, activity)


def test_many_channels_directly_are_as_accurate_as_torch(isa: str) -> None:
    for memory_format, name in MANY_IN_BOTH_FORMATS:
        if name == "more padding than input":
            continue  # a handful of sums: the largest error of so few is chance
        case, input = many_in(memory_format, name)
        input = input.abs()  # sums that grow: where the order of adding tells
        call = (*case.weights(torch.float32), *case.options())
        exact = pixfuse.reference.conv_bias_relu(input, *call, dtype=torch.float64)[0]
        ours = (pixfuse.conv_bias_relu(input, *call)[0] - exact).abs()
        theirs = (relu(conv2d(input, *call)) - exact).abs()
        assert ours.max() <= 2 * theirs.max()
        assert ours.pow(2).mean() <= (1.5**2) * theirs.pow(2).mean()


def test_rows_of_planes_in_larger_images(isa: str) -> None:
    """Rows, planes and images that do not lie next to each other."""
    case = Case(40, 64, (3, 3), 1, 1, size=(24, 56), images=2)
    weight, bias = case.weights(torch.float32)
    large = torch.randn(4, 43, 30, 70)
    input = large[1:4:2, 2:42, 3:27, 5:61]
    output, activity = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
    alone, _ = pixfuse.conv_bias_relu(input.contiguous(), weight, bias, *case.options())
    assert_same_bits(output, alone)
    check_activity(output, activity)


@pytest.mark.parametrize(
    ("channels", "memory_format"),
    [
        (2, torch.channels_last),
        (3, torch.channels_last),
        (8, torch.channels_last),
        (32, torch.contiguous_format),
    ],
)
def test_padding_that_is_left_out(
    channels: int, memory_format: torch.memory_format, isa: str
) -> None:
    """The same bits as of an input with zeros around it, wherever a tile begins and ends."""
    if channels > 4 and isa not in ("avx512", *OF_BYTES, *OF_BITS):
        pytest.skip("torch's work")
    for kernel, padding in (
        ((3, 3), (1, 1)),
        ((3, 3), (2, 1)),
        ((3, 3), (1, 0)),
        ((1, 1), (0, 0)),
        ((1, 1), (0, 1)),  # a column of nothing but padding
        ((5, 2), (4, 1)),  # nothing is left of its two columns at a width of 1
        ((2, 4), (1, 1)),
        ((7, 3), (6, 1)),
    ):
        if channels > 4 and kernel not in ((1, 1), (3, 3)):
            continue
        if channels == 32 and kernel == (1, 1):
            continue
        for stride in ((1, 1), (2, 1), (1, 2), (3, 3)):
            for width in (1, 2, 5, 7, 8, 9, 14, 15, 29, 57, 64):
                images = -(-1024 * stride[0] * stride[1] // (6 * width))
                case = Case(channels, 36, kernel, stride, padding, size=(6, width), images=images)
                weight, bias = case.weights(torch.float32)
                input = torch.randn(images, channels, *case.size)
                around = pad(input, [padding[1]] * 2 + [padding[0]] * 2)
                if any(side < size for side, size in zip(around.shape[2:], kernel, strict=True)):
                    continue
                if channels == 32 and (around.shape[3] - kernel[1]) // stride[1] + 1 < 14:
                    continue  # torch's work
                results = [
                    pixfuse.conv_bias_relu(
                        floats.contiguous(memory_format=memory_format),
                        weight,
                        bias,
                        stride,
                        zeros,
                    )
                    for floats, zeros in ((input, padding), (around, 0))
                ]
                assert_same_bits(results[0][0], results[1][0])
                assert torch.equal(results[0][1].active, results[1][1].active)
                check_activity(*results[0])


@pytest.mark.parametrize(
    ("channels", "memory_format"),
    [(3, torch.channels_last), (8, torch.channels_last), (32, torch.contiguous_format)],
)
def test_padding_times_what_is_not_finite(
    channels: int, memory_format: torch.memory_format, isa: str
) -> None:
    case = Case(channels, 37, (3, 3), 1, 1, size=(24, 28))
    weight, bias = case.weights(torch.float32)
    input = torch.rand(2, channels, *case.size) + 1
    input = input.contiguous(memory_format=memory_format)
    if goes_by_torch(case, input, memory_format):
        pytest.skip("torch leaves padding out, whatever its weight")
    for number in (math.inf, -math.inf, math.nan):
        for ky, kx in ((0, 1), (2, 1), (1, 0), (1, 2), (1, 1)):
            one = weight.clone()
            one[5, 1, ky, kx] = number
            ours, activity = pixfuse.conv_bias_relu(input, one, bias, *case.options())
            exact, _ = pixfuse.reference.conv_bias_relu(
                input, one, bias, *case.options(), dtype=torch.float64
            )
            assert torch.equal(ours.isnan(), exact.isnan())
            assert torch.equal(ours.isinf(), exact.isinf())
            check_activity(ours, activity)


def test_large_batches_of_many_channels(isa: str) -> None:
    """Whole, or in slices: of outputs, or of inputs that are larger than the outputs."""
    for case in (
        Case(8, 80, (1, 1), size=(96, 97), images=9),  # 27 MB to 3 MB a slice
        Case(80, 8, (1, 1), size=(96, 97), images=9),
        Case(40, 80, (3, 3), 1, 1, (1, 1), 2, size=(270, 271), images=1),
        Case(600, 40, (1, 1), size=(96, 96), images=4),
    ):
        for memory_format in FORMATS:
            for dtype in (torch.float32, torch.bfloat16):
                input = torch.randn(case.images, case.channels, *case.size).to(dtype)
                input = input.contiguous(memory_format=memory_format)
                check(case, input, (dtype,), isas=(isa,), memory_format=memory_format)


# --- fewer multiplications ---

# What goes through Winograd's algorithm, and what stays direct: with the reason.
WINOGRAD = {
    "resnet": STEMS["resnet"],
    "alexnet": STEMS["alexnet"],
    "four channels": Case(4, 20, (5, 5), 1, 2, size=(57, 58)),
    "stride 1": Case(3, 33, (7, 7), 1, 3, size=(45, 45)),
    "one row of taps 9 wide": Case(4, 16, (5, 9), (1, 3), 0, size=(70, 200)),
    "rows dilated": Case(3, 70, (7, 8), 2, 3, (2, 1), size=(68, 65)),
    "rows dilated by more than the stride": Case(3, 40, (7, 5), 1, 2, (2, 1), size=(52, 42)),
    "phases of 3, 2 and 2": Case(3, 64, (7, 7), 3, 2, size=(100, 97)),
    "a stride of its own for rows": Case(3, 64, (9, 6), (5, 2), 1, size=(166, 66)),
    "not padded": Case(3, 64, (7, 7), 2, 0, size=(71, 69), bias=False),
    "a single row": Case(3, 64, (7, 7), 2, 0, size=(7, 2053), images=1),
}
DIRECT = {
    "a phase of one tap": Case(3, 64, (7, 3), 2, 1, size=(70, 66)),
    "few terms": Case(3, 64, (5, 5), 2, 2, size=(66, 64)),
    "few taps": Case(3, 32, (11, 3), 1, 1, size=(64, 61)),
    "one channel": Case(1, 64, (7, 7), 2, 3, size=(65, 64)),
    "dilated": Case(3, 64, (7, 7), 1, 3, 2, size=(48, 47)),
    "few outputs": Case(3, 64, (7, 7), 2, 3, size=(64, 62)),
    **{name: STEMS[name] for name in ("vgg", "mobilenet", "convnext", "vit")},
}


def is_direct(case: Case, weight: torch.Tensor, normalization: pixfuse.Normalization) -> bool:
    """Floats always are: so whether bytes have the same bits as their normalized floats."""
    images = random_bytes(1, case.channels, *case.size)
    call = (weight, torch.zeros(case.outputs), *case.options())
    of_bytes, _ = pixfuse.conv_bias_relu(images, *call, normalization=normalization)
    of_floats, _ = pixfuse.conv_bias_relu(pixfuse.normalize(images, normalization), *call)
    return torch.equal(of_bytes.nan_to_num(), of_floats.nan_to_num())


def outputs_per_image(case: Case) -> int:
    weight = torch.empty(case.outputs, case.channels, *case.kernel, device="meta")
    image = weight.new_empty(1, case.channels, *case.size)
    return conv2d(image, weight, None, *case.options()).numel()


def is_in_points(case: Case) -> bool:
    """What Winograd's algorithm is for."""
    strides, dilations = (
        pair if isinstance(pair, tuple) else (pair, pair) for pair in (case.stride, case.dilation)
    )
    return (
        dilations[1] == 1
        and case.kernel[1] >= 2 * strides[1]
        and case.kernel[0] * case.channels >= 20
        and math.prod(case.kernel) * case.channels >= 100
        and outputs_per_image(case) >= 1 << 16
    )


IN_DIGITS = (*OF_BYTES, *IN_PAIRS)


def is_in_digits(case: Case, isa: str) -> bool:
    """What is summed up in whole numbers: in vectors, what Winograd's algorithm is not for."""
    taps = case.channels * math.prod(case.kernel)
    if case.channels > 3 or isa not in IN_DIGITS:
        return False
    return taps >= (64 if isa == "vnni" else 48) and (isa == "amx" or not is_in_points(case))


def test_who_goes_another_way(isa: str) -> None:
    for case in WINOGRAD.values():
        assert is_in_points(case)
        weight, _ = case.weights(torch.float32)
        normalization = made_up(case.channels, "torchvision")
        assert not is_direct(case, weight, normalization)
        for value in (math.nan, math.inf, -math.inf, 2.0**41):
            bad = weight.clone()
            bad[-1, -1, -1, -1] = value
            assert is_direct(case, bad, normalization)
        for rounding in ROUNDINGS:
            huge = pixfuse.Normalization(0.5, 1e-13, rounding=rounding)
            assert is_direct(case, weight, huge)
        half = weight.clone()
        half[-1].view(-1)[: half[-1].numel() // 2] = 0.0
        half[0] = 0.0
        assert not is_direct(case, half, normalization)
        half[-1].view(-1)[half[-1].numel() // 2] = 0.0
        assert is_direct(case, half, normalization)
    for case in DIRECT.values():
        weight, _ = case.weights(torch.float32)
        direct = is_direct(case, weight, made_up(case.channels, "torchvision"))
        assert direct is not is_in_digits(case, isa)
        assert not is_in_points(case)


@pytest.mark.parametrize("name", WINOGRAD)
def test_winograd(name: str) -> None:
    case = WINOGRAD[name]
    for channels_last, memory_format in itertools.product((False, True), FORMATS):
        images = random_bytes(case.images, *case.size, case.channels).permute(0, 3, 1, 2)
        if not channels_last:
            images = images.contiguous()
        check(case, images, DTYPES, winograd=True, memory_format=memory_format)


def test_winograd_of_every_width() -> None:
    for columns in (*range(1, 14), 47, 48, 49, 50, 97):  # 12 tiles of 4 are taken together
        for kernel, stride, padding, outputs in ((7, 2, 3, 64), (11, 4, 5, 17), (8, 1, 5, 33)):
            width = max(1, (columns - 1) * stride + kernel - 2 * padding)
            rows = -(-(1 << 16) // (outputs * columns)) + columns % 2
            size = ((rows - 1) * stride + kernel - 2 * padding, width)
            case = Case(3, outputs, (kernel, kernel), stride, padding, size=size, images=1)
            images = random_bytes(1, 3, *size)
            check(case, images, DTYPES[:1], winograd=True, memory_format=FORMATS[columns % 2])


def test_winograd_is_as_accurate_as_torch(isa: str) -> None:
    """Also on images that are smooth, or whose mean is far from 0, or both."""
    rows, columns = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    smooth = (120 + 90 * torch.sin(rows / 9) * torch.cos(columns / 7)).expand(1, 3, 112, 112)
    noise = random_bytes(1, 3, 112, 112)
    pictures = (noise, smooth.to(torch.uint8), (0.9 * smooth + 0.1 * noise).to(torch.uint8))
    for case in (STEMS["resnet"], STEMS["alexnet"], WINOGRAD["stride 1"]):
        weight, bias = case.weights(torch.float32)
        assert bias is not None
        call = (weight, bias, *case.options())
        for images, normalization in itertools.product(
            pictures, (pixfuse.IMAGENET, pixfuse.SIGNED, pixfuse.UNIT)
        ):
            floats = pixfuse.normalize(images, normalization)
            exact = conv2d(floats.double(), weight.double(), bias.double(), *case.options()).relu()
            ours, _ = pixfuse.conv_bias_relu(images, *call, normalization=normalization)
            theirs = relu(conv2d(floats, *call))
            mine, torchs_own = ((result - exact).abs() for result in (ours, theirs))
            assert mine.max() <= 2 * torchs_own.max()
            assert mine.pow(2).mean() <= (1.75**2) * torchs_own.pow(2).mean()


def edges() -> torch.Tensor:
    """Black and white stripes: where all that an output sees is 0, its neighbours see 255."""
    columns = torch.arange(150)
    return ((columns // 25 % 2) * 255).to(torch.uint8).expand(1, 3, 64, 150).contiguous()


def test_the_error_is_that_of_the_neighbourhood(isa: str) -> None:
    """Of 3 outputs to the left and right: they share what is rounded."""
    case = STEMS["resnet"]
    weight, bias = case.weights(torch.float32)
    images = edges()
    truth = Truth(pixfuse.normalize(images, pixfuse.UNIT), weight, bias, case.options())
    call = (images, weight, bias, *case.options())
    ours, activity = pixfuse.conv_bias_relu(*call, normalization=pixfuse.UNIT)
    if not is_in_digits(case, isa):
        with pytest.raises(AssertionError, match="outputs are too far off"):
            check_values(
                ours, activity, truth
            )  # if this passes, the tolerance can be the usual one
        truth.share_rounding()
    check_values(ours, activity, truth)


def test_rounding_wakes_no_dead_channel(isa: str) -> None:
    """What no image can bring above 0 is 0, although its neighbours are rounded."""
    case = STEMS["resnet"]
    weight = -torch.rand(64, 3, 7, 7)
    weight[40] = 0
    bias = torch.zeros(64)
    bias[40] = 0.3
    bias[50:] = 1e-30  # not certain to be dead, and woken
    images = edges()
    for memory_format in FORMATS:
        ours, activity = pixfuse.conv_bias_relu(
            images,
            weight,
            bias,
            *case.options(),
            normalization=pixfuse.UNIT,
            memory_format=memory_format,
        )
        certain = pixfuse.certified_dead(weight, bias, normalization=pixfuse.UNIT)
        assert certain.sum() == 49
        assert bool(activity.dead[certain].all())
        assert bool((ours[:, certain] == 0).all())
        assert bool((ours[:, 40] == bias[40]).all())
        assert bool((activity.active[50:] > 0).all())
        assert bool((ours[:, 50:] > 1e-20).any()) is not is_in_digits(case, isa)


@pytest.mark.parametrize("padding", [0, 3, 7, 9])
def test_rounding_wakes_no_dead_channel_in_the_padding(isa: str, padding: int) -> None:
    """Where an output sees nothing else, and no pixel is 0: all its channels are, at once."""
    normalization = pixfuse.Normalization((-0.5, 1.5, -0.5), (1.0, 1.0, 1.0))
    weight = torch.rand(256, 3, 7, 7)
    weight[:, 1] = (weight[:, 0] + weight[:, 2]) * 3 * (1 + 1e-4)
    bias = torch.full((256,), -1e-30)
    images = torch.full((1, 3, 20, 24), 255, dtype=torch.uint8)
    certain = pixfuse.certified_dead(weight, bias, normalization=normalization, padding=padding)
    assert certain.all()
    ours, activity = pixfuse.conv_bias_relu(
        images, weight, bias, padding=padding, normalization=normalization
    )
    assert activity.dead_count == 256
    assert not ours.any()


def test_padding_wakes_what_no_pixel_can(isa: str) -> None:
    """Where only the one weight above 0 sees the image; no pixel is 0 after the normalization."""
    case = Case(3, 32, (7, 7), 2, 6, size=(40, 40))
    weight = -torch.rand(32, 3, 7, 7)
    weight[:, :, -1, -1] = 1.0
    normalization = pixfuse.Normalization(-1.0, 1.0)
    images = random_bytes(1, 3, *case.size)
    _, inside = pixfuse.conv_bias_relu(images, weight, None, 2, normalization=normalization)
    assert inside.dead_count == 32
    ours, activity = pixfuse.conv_bias_relu(
        images, weight, None, *case.options(), normalization=normalization
    )
    assert activity.dead_count == 0
    floats = pixfuse.normalize(images, normalization)
    truth = Truth(floats, weight, None, case.options())
    truth.share_rounding()
    check_values(ours, activity, truth)


@pytest.mark.parametrize("mean", [-1.0, 0.45])
def test_a_dead_channel_is_dead_with_a_bias(isa: str, mean: float) -> None:
    """Also where its bias is above 0: no pixel is 0 after a normalization to [1, 2]."""
    case = STEMS["resnet"]
    weight = -torch.rand(64, 3, 7, 7) if mean < 0 else torch.zeros(64, 3, 7, 7)
    bias = torch.full((64,), 0.5 if mean < 0 else -0.5)
    normalization = pixfuse.Normalization(mean, 1.0)
    images = random_bytes(1, 3, *case.size)
    ours, activity = pixfuse.conv_bias_relu(images, weight, bias, 2, normalization=normalization)
    assert bool(pixfuse.certified_dead(weight, bias, normalization=normalization).all())
    assert activity.dead_count == 64
    assert not ours.any()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("padding", [0, 3])
def test_weights_of_one_sign_are_alive(isa: str, sign: int, padding: int) -> None:
    """Black or white, normalized to -1 or 1, brings every channel above 0, and the other none."""
    weight = sign * (torch.rand(64, 3, 7, 7) + 0.1)
    bias = torch.full((64,), -0.5)
    fires, rests = (torch.full((1, 3, 56, 56), value, dtype=torch.uint8) for value in (0, 255))
    if sign > 0:
        fires, rests = rests, fires
    for images, expected in ((fires, 0), (rests, 64)):
        _, activity = pixfuse.conv_bias_relu(
            images, weight, bias, 2, padding, normalization=pixfuse.SIGNED
        )
        assert activity.dead_count == expected


def test_winograd_has_one_result(isa: str) -> None:
    """For any number of threads and split of the batch, any layout of input and output."""
    for case in WINOGRAD.values():
        weight, bias = case.weights(torch.float32)
        images = random_bytes(3, case.channels, *case.size)
        call = (weight, bias, *case.options())
        options: dict[str, Any] = {"normalization": made_up(case.channels, "timm")}
        expected, activity = pixfuse.conv_bias_relu(images, *call, **options)
        for threads, memory_format, input_format in itertools.product((1, 2, 5), FORMATS, FORMATS):
            torch.set_num_threads(threads)
            given = images.contiguous(memory_format=input_format)
            ours, counted = pixfuse.conv_bias_relu(
                given, *call, memory_format=memory_format, **options
            )
            assert_same_bits(ours.contiguous(), expected.contiguous())
            assert torch.equal(counted.active, activity.active)
        torch.set_num_threads(2)
        parts = [
            pixfuse.conv_bias_relu(image, *call, **options)[0].contiguous() for image in images
        ]
        assert_same_bits(torch.stack(parts), expected.contiguous())


def test_negated_weights_of_winograd(isa: str) -> None:
    case = STEMS["resnet"]
    weight, bias = case.weights(torch.float32)
    assert bias is not None
    images = random_bytes(2, 3, *case.size)
    call = (*case.options(),)
    above, active = pixfuse.conv_bias_relu(
        images, weight, bias, *call, normalization=pixfuse.IMAGENET
    )
    below, inactive = pixfuse.conv_bias_relu(
        images, -weight, -bias, *call, normalization=pixfuse.IMAGENET
    )
    floats = pixfuse.normalize(images, pixfuse.IMAGENET)
    truth = Truth(floats, weight, bias, case.options())
    error = truth.error(torch.float32)
    assert bool(((above.double() - below.double() - truth.exact).abs() <= error).all())
    assert bool((active.active + inactive.active <= active.positions).all())


# --- whole numbers ---

in_digits = pytest.mark.parametrize(
    "isa", [isa for isa in FOR_CONVOLUTIONS if isa in IN_DIGITS], indirect=True
)

# As ResNet's, but a stride that leaves Winograd's algorithm nothing to save.
LARGE_STEPS = Case(3, 64, (7, 7), 4, 3, size=(61, 64))

# Kernels whose rows fill a row of a tile, a part of it, or several; with padding and without.
DIGITS = [
    *(
        Case(3, 20, (k, k), stride, k // 2, size=(41, 43))
        for k in (4, 5, 6, 7, 8, 9, 11, 16, 17)
        for stride in (1, 2, 3)
    ),
    *(Case(channels, 33, (11, 13), 2, 3, size=(37, 45)) for channels in (1, 2, 3)),
    Case(3, 16, (40, 1), 3, 1, size=(64, 9)),
    Case(3, 16, (16, 2), 1, (0, 1), size=(33, 50)),
    Case(2, 70, (1, 40), (1, 3), (0, 20), size=(9, 131)),
    Case(3, 5, (5, 7), 1, (0, 18), (2, 6), size=(19, 60)),
    Case(3, 100, (9, 3), (2, 1), (9, 3), bias=False, size=(5, 97)),
    Case(1, 4, (20, 20), 1, 0, size=(20, 20)),
    Case(3, 768, (16, 16), 16, 0, size=(80, 224), images=1),
    Case(2, 5, (33, 33), 1, 0, size=(40, 40)),
    # More than a block of output channels: patches that fit for all of them, or are too large.
    Case(3, 70, (9, 9), (50, 2), (4, 0), size=(130, 90)),
    Case(3, 130, (31, 30), (1, 2), 3, size=(33, 180), images=1),
    # All outputs see the same part of the kernel, which is not all of it.
    Case(3, 16, (11, 11), 1, 1, size=(9, 9)),
    Case(3, 16, (7, 7), 1, 3, size=(1, 1)),
    Case(3, 16, (16, 16), 16, 1, size=(14, 14)),
    Case(3, 16, (7, 7), 4, (2, 0), size=(6, 32)),
    Case(3, 16, (10, 10), 2, 1, size=(8, 8)),
]


@in_digits
def test_digits(isa: str) -> None:
    for i, case in enumerate(DIGITS):
        assert is_in_digits(case, "amx")
        if not is_in_digits(case, isa):
            continue
        images = random_bytes(case.images, *case.size, case.channels + i % 2)[..., : case.channels]
        images = images.permute(0, 3, 1, 2)
        if i % 3 == 0:
            images = images.contiguous()
        check(case, images, DTYPES, memory_format=FORMATS[i // 2 % 2], isas=(isa,))


@in_digits
def test_digits_of_every_width(isa: str) -> None:
    """Pixels of some rows come in tiles of 16, two at a time, or 8, 5 or 3 at a time."""
    for columns in (*range(1, 19), 31, 32, 33, 34, 47, 48, 49, 65):
        for kernel, stride, padding, outputs in ((7, 2, 3, 64), (16, 16, 0, 40), (11, 4, 2, 17)):
            width = (columns - 1) * stride + kernel - 2 * padding
            if width < 1:
                continue
            rows = 1 + columns % 4
            height = (rows - 1) * stride + kernel - 2 * padding
            case = Case(3, outputs, (kernel, kernel), stride, padding, size=(max(1, height), width))
            images = random_bytes(2, 3, *case.size)
            check(case, images, DTYPES[:1], memory_format=FORMATS[columns % 2], isas=(isa,))


@in_digits
def test_digits_are_as_accurate_as_torch(isa: str) -> None:
    """Nearer where many terms are summed up; with few, torch has little to lose itself."""
    rows, columns = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    smooth = (120 + 90 * torch.sin(rows / 9) * torch.cos(columns / 7)).expand(1, 3, 112, 112)
    pictures = (random_bytes(1, 3, 112, 112), smooth.to(torch.uint8))
    stems = (STEMS[name] for name in ("resnet", "alexnet", "convnext")) if isa == "amx" else ()
    cases = (*stems, STEMS["vit"], LARGE_STEPS, Case(3, 32, (5, 5), 1, 2))
    for case, images, normalization in itertools.product(
        cases, pictures, (pixfuse.IMAGENET, pixfuse.SIGNED, pixfuse.UNIT)
    ):
        weight, bias = case.weights(torch.float32)
        assert bias is not None
        call = (weight, bias, *case.options())
        floats = pixfuse.normalize(images, normalization)
        exact = conv2d(floats.double(), weight.double(), bias.double(), *case.options()).relu()
        ours, _ = pixfuse.conv_bias_relu(images, *call, normalization=normalization)
        theirs = relu(conv2d(floats, *call))
        mine, torchs_own = ((result - exact).abs() for result in (ours, theirs))
        many = weight[0].numel() > 128
        assert mine.max() <= (1 if many else 2) * torchs_own.max()
        assert mine.pow(2).mean() <= (1 if many else 1.5**2) * torchs_own.pow(2).mean()


def test_a_bias_larger_than_all_the_rest_is_rounded_with_once(isa: str) -> None:
    """Half a step of the result is all that there is to lose then, and what the sums have lost."""
    for case in (WINOGRAD["resnet"], Case(3, 64, (5, 5), 1, 2, size=(24, 24))):
        weight, bias = case.weights(torch.float32)
        assert bias is not None
        bias = bias.abs() + 4
        images = random_bytes(1, 3, *case.size) // 8
        floats = pixfuse.normalize(images, pixfuse.UNIT)
        exact = conv2d(floats.double(), weight.double(), bias.double(), *case.options()).relu()
        ours, _ = pixfuse.conv_bias_relu(
            images, weight, bias, *case.options(), normalization=pixfuse.UNIT
        )
        step = torch.from_numpy(np.spacing(exact.float().numpy())).double()
        assert ((ours.double() - exact).abs() / step).max() < 0.9


@in_digits
@pytest.mark.parametrize("side", [16, 36, 37])  # pairs are for up to 4096 taps
def test_the_largest_sums_in_digits(isa: str, side: int) -> None:
    """Of weights that are all as large as they can be, with what brings most of them together."""
    case = Case(3, 33, (side, side), 1, 0, images=1, size=(side + 1, side + 2))
    signs = torch.ones(case.outputs, 3, side, side)
    signs[::2, :, :, ::2] = -1
    signs[::3] *= -1
    noise = torch.rand_like(signs) * (torch.arange(case.outputs) % 4 == 3)[:, None, None, None]
    weight = (0.3 - 0.2 * noise) * signs
    columns = (torch.arange(side + 2) % 2 * 255).to(torch.uint8)
    pictures = (columns, 255 - columns, torch.full_like(columns, 255), torch.zeros_like(columns))
    for picture, normalization in itertools.product(
        pictures, (pixfuse.UNIT, pixfuse.SIGNED, pixfuse.IMAGENET)
    ):
        images = picture.expand(1, 3, side + 1, side + 2).contiguous()
        truth = Truth(pixfuse.normalize(images, normalization), weight, None, case.options())
        ours, activity = pixfuse.conv_bias_relu(
            images, weight, None, *case.options(), normalization=normalization
        )
        check_values(ours, activity, truth)


@in_digits
def test_weights_of_any_strides_in_digits(isa: str) -> None:
    """Read in runs of floats or one by one, they are the same."""
    case = Case(3, 40, (9, 7), 4, 1, size=(41, 43))
    usual, bias = case.weights(torch.float32)
    images = random_bytes(2, 3, *case.size)

    def output(weight: torch.Tensor) -> torch.Tensor:
        return pixfuse.conv_bias_relu(
            images,
            weight,
            bias,
            *case.options(),
            normalization=pixfuse.UNIT,
            memory_format=torch.contiguous_format,
        )[0]

    expected = output(usual)
    for order in itertools.permutations(range(4)):
        back = [order.index(dimension) for dimension in range(4)]
        permuted = usual.permute(order).contiguous()
        apart = torch.empty(*permuted.shape[:3], 2 * permuted.shape[3])[..., ::2].copy_(permuted)
        for weight in (permuted.permute(back), apart.permute(back)):
            assert_same_bits(output(weight), expected)


@in_digits
def test_weights_whose_channels_lie_side_by_side_in_digits(isa: str) -> None:
    """Their sums, which the offsets of the normalization go with, are each channel's own."""
    for channels in (1, 2, 3):
        case = Case(channels, 20, (9, 8), 3, 0, size=(30, 29))
        weight, bias = case.weights(torch.float32)
        weight = (weight + torch.arange(channels)[:, None, None]).to(
            memory_format=torch.channels_last
        )
        images = random_bytes(1, channels, *case.size)
        normalization = made_up(channels, "torchvision")
        floats = pixfuse.normalize(images, normalization)
        truth = Truth(floats, weight, bias, case.options())
        ours, activity = pixfuse.conv_bias_relu(
            images, weight, bias, *case.options(), normalization=normalization
        )
        check_values(ours, activity, truth)


@pytest.mark.skipif(not IN_PAIRS, reason="vectors add instead of multiplying here")
def test_pairs_are_for_up_to_4096_taps() -> None:
    """More would leave their words fewer bits."""
    for side, taken in ((36, True), (37, False)):
        images, weight = random_bytes(1, 3, side, side), torch.randn(16, 3, side, side)
        results = []
        for isa in ("vnni", *IN_PAIRS):
            with _library.use_isa(isa):
                call = pixfuse.conv_bias_relu(images, weight, normalization=pixfuse.IMAGENET)
                results.append(call[0])
        assert torch.equal(*results) is not taken


@in_digits
def test_black_is_nothing(isa: str) -> None:
    """In [0, 1] a black pixel leaves no trace of its weight, however large that is."""
    case = LARGE_STEPS
    weight, bias = case.weights(torch.float32)
    assert bias is not None
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    ours, _ = pixfuse.conv_bias_relu(
        images, weight * 1e6, bias, *case.options(), normalization=pixfuse.UNIT
    )
    assert torch.equal(ours, relu(bias)[:, None, None].expand(1, 64, 16, 16))


@in_digits
@pytest.mark.parametrize("padding", [3, 9])
def test_weights_in_the_padding_leave_nothing(padding: int, isa: str) -> None:
    """Where only taps of weight 0 lie inside the image an output is its bias, to the last bit."""
    case = Case(3, 64, (7, 7), 4, padding, size=(37, 41))
    weight, bias = case.weights(torch.float32)
    assert bias is not None
    images = random_bytes(1, *case.size, 3).permute(0, 3, 1, 2)
    for rows, columns in ((slice(3, None), slice(None)), (slice(None), slice(0, 4))):
        some = weight.clone()
        some[:, :, rows, columns] = 0
        inside = conv2d(
            torch.ones(1, 1, *case.size), (some[:1] != 0).float()[:, :1], None, 4, padding
        )
        ours, _ = pixfuse.conv_bias_relu(
            images, some, bias, *case.options(), normalization=pixfuse.IMAGENET
        )
        untouched = (inside == 0).expand_as(ours)
        assert 0 < untouched.sum() < untouched.numel()
        assert torch.equal(
            ours[untouched], relu(bias)[None, :, None, None].expand_as(ours)[untouched]
        )


@in_digits
def test_small_and_large_weights_in_digits(isa: str) -> None:
    """A channel has steps of its own; weights too small for steps go the direct way."""
    case = LARGE_STEPS
    weight, _ = case.weights(torch.float32)
    images = random_bytes(1, 3, *case.size)
    for factor in (1e-25, 1e-8, 1e8, 1e-35):
        scaled = weight.clone()
        scaled[::2] *= factor
        truth = Truth(pixfuse.normalize(images, pixfuse.SIGNED), scaled, None, case.options())
        ours, activity = pixfuse.conv_bias_relu(
            images, scaled, None, *case.options(), normalization=pixfuse.SIGNED
        )
        check_values(ours, activity, truth)


@in_digits
def test_weights_too_far_apart_for_digits(isa: str) -> None:
    """Further than 32 bits say: in memory that is asked for, but hardly touched."""
    case = LARGE_STEPS
    usual, bias = case.weights(torch.float32)
    apart = 2**30
    shape, steps = tuple(usual.shape), (49, apart, 7, 1)
    weight = torch.empty(2 * apart + usual.numel()).as_strided(shape, steps).copy_(usual)
    images = random_bytes(1, 3, *case.size)
    truth = Truth(pixfuse.normalize(images, pixfuse.SIGNED), usual, bias, case.options())
    ours, activity = pixfuse.conv_bias_relu(
        images, weight, bias, *case.options(), normalization=pixfuse.SIGNED
    )
    check_values(ours, activity, truth)


@dataclass
class Points:
    """The points of winograd.h along one side, and the matrices that its comment makes of them."""

    outputs: int
    points: list[Fraction]  # of the slots before infinity
    slots: list[list[int]]  # of pieces of some taps, of one more and so on
    least_taps: int

    @classmethod
    def of_columns(cls) -> "Points":
        pairs = [Fraction(number) for number in cls.read("kWinogradPairPoints")[0]]
        points = [*(v for pair in pairs for v in (pair, -pair)), Fraction(0)]
        return cls(4, points, cls.slots_of("kWinogradPointSlots", kWinogradZero=6), 2)

    @classmethod
    def of_rows(cls) -> "Points":
        points = [Fraction(number) for number in cls.read("kWinogradRowPoints")[0]]
        return cls(2, points, cls.slots_of("kWinogradRowPointSlots"), 1)

    @staticmethod
    def read(name: str) -> list[list[str]]:
        """The rows of a constant."""
        text = (ROOT / "csrc" / "conv_bias_relu" / "winograd.h").read_text()
        value = re.search(name + r"\[.*?\] = \{(.*?)\};", text, re.DOTALL)
        assert value is not None
        rows = re.findall(r"\{(.*?)\}", value[1]) or [value[1]]
        return [row.split(", ") for row in rows]

    @classmethod
    def slots_of(cls, name: str, **names: int) -> list[list[int]]:
        names |= {"kWinogradInfinity": -1, "kWinogradRowInfinity": -1}
        return [[names[w] if w in names else int(w) for w in row] for row in cls.read(name)]

    @property
    def taps(self) -> range:
        return range(self.least_taps, self.least_taps + len(self.slots))

    def matrices(self, taps: int) -> tuple[list[list[Fraction]], ...]:
        slots = self.slots[taps - self.least_taps]
        count = self.outputs + taps - 1
        assert len(slots) == count
        assert slots[-1] == -1
        points = [self.points[slot] for slot in slots[:-1]]
        assert len({*points}) == len(points)
        infinity = [Fraction(int(j == self.outputs - 1)) for j in range(self.outputs)]
        outputs = [[p**j for p in points] + [infinity[j]] for j in range(self.outputs)]
        weights, inputs = [], []
        for point in [*points, None]:
            others = [other for other in points if other != point]
            product = [Fraction(1)]
            for other in others:
                product = [
                    high - other * low
                    for high, low in zip(
                        [Fraction(0), *product], [*product, Fraction(0)], strict=True
                    )
                ]
            inputs.append(product + [Fraction(0)] * (count - len(product)))
            if point is None:
                weights.append([Fraction(int(k == taps - 1)) for k in range(taps)])
            else:
                slope = math.prod((point - other for other in others), start=Fraction(1))
                weights.append([point**k / slope for k in range(taps)])
        return outputs, weights, inputs


def is_a_convolution(matrices: tuple[list[list[Fraction]], ...]) -> bool:
    """y[j] is the sum of w[k] * x[j + k], and of nothing else: exactly."""
    outputs, weights, inputs = matrices
    return all(
        sum(row[i] * weights[i][k] * inputs[i][at] for i in range(len(inputs))) == int(at == j + k)
        for j, row in enumerate(outputs)
        for k in range(len(weights[0]))
        for at in range(len(inputs))
    )


def test_the_points_of_winograd() -> None:
    for points in (Points.of_columns(), Points.of_rows()):
        for taps in points.taps:
            matrices = points.matrices(taps)
            assert is_a_convolution(matrices)
            outputs, _, inputs = matrices
            for matrix in (outputs, inputs):
                assert all(
                    Fraction(float(np.float32(float(f)))) == f for row in matrix for f in row
                )
            for matrix in matrices:  # a planted fault
                matrix[1][0] += Fraction(1, 1024)
                assert not is_a_convolution(matrices)
                matrix[1][0] -= Fraction(1, 1024)


def test_lines_of_winograd_have_two_terms() -> None:
    """Along the height, and the last one as it is: so it is one addition for each point."""
    points = Points.of_rows()
    for taps in points.taps:
        for row in points.matrices(taps)[2]:
            factors = [factor for factor in row if factor != 0]
            assert factors[-1] == 1
            assert len(factors) <= 2


# --- derivatives ---


def torchs(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, case: Case
) -> torch.Tensor:
    return relu(conv2d(input, weight, bias, *case.options()))


GRADIENT_CASES = [
    Case(2, 3, (3, 2), (2, 1), (1, 2), (1, 2), size=(4, 3), images=1),
    Case(2, 2, (2, 2), 1, "same", size=(3, 2), images=2),
    Case(4, 2, (2, 3), 1, 1, 1, 2, size=(2, 3), images=1),
    Case(5, 2, (1, 1), bias=False, size=(2, 2), images=1),
]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    weight, bias = case.weights(torch.float64)
    input = torch.randn(case.images, case.channels, *case.size, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (input, weight, bias) if t is not None]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        given = tensors if len(tensors) == 3 else (*tensors, None)
        return pixfuse.conv_bias_relu(*given, *case.options())[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_torch(dtype: torch.dtype, memory_format: Any) -> None:
    for case in (Case(3, 16, (7, 7), 2, 3, size=(21, 30)), *GRADIENT_CASES):
        given = torch.randn(2, case.channels, *case.size).to(dtype)
        given = given.contiguous(memory_format=memory_format)
        weight, bias = case.weights(dtype)

        def leaves(
            given: torch.Tensor = given,
            weight: torch.Tensor = weight,
            bias: torch.Tensor | None = bias,
        ) -> list[torch.Tensor | None]:
            return [
                None if t is None else t.detach().clone().requires_grad_()
                for t in (given, weight, bias)
            ]

        ours, theirs = leaves(), leaves()
        output, _ = pixfuse.conv_bias_relu(*ours, *case.options())  # type: ignore[arg-type]
        expected = relu(conv2d(*theirs, *case.options()))  # type: ignore[call-overload]
        gradient = torch.randn(output.shape).to(dtype)
        agree = (output > 0) == (expected > 0)  # where rounding differs, so does the mask
        gradient = gradient * agree
        output.backward(gradient)
        expected.backward(gradient)
        for mine, torchs_own in zip(ours, theirs, strict=True):
            if mine is None or torchs_own is None:
                continue
            assert mine.grad is not None
            assert torchs_own.grad is not None
            assert mine.grad.dtype is dtype
            torch.testing.assert_close(mine.grad, torchs_own.grad)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_gradients_from_bytes(low: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for slice_bytes in (1, 1 << 24):
        monkeypatch.setitem(_SLICE_BYTES, "cpu", slice_bytes)
        for channels, padding in ((3, 3), (3, "same"), (6, 1)):
            case = Case(channels, 16, (4, 4), 1, padding, size=(12, 14), images=3)
            images = random_bytes(3, channels, *case.size)
            normalization = made_up(channels, "torchvision")
            weight, bias = case.weights(torch.float32)
            assert bias is not None
            ours = [t.clone().requires_grad_() for t in (weight, bias)]
            theirs = [t.clone().requires_grad_() for t in (weight, bias)]
            output, _ = pixfuse.conv_bias_relu(
                images,
                ours[0],
                ours[1],
                *case.options(),
                normalization=normalization,
                dtype=low,
            )
            floats = pixfuse.normalize(images, normalization)
            expected = torchs(floats, theirs[0], theirs[1], case)
            gradient = torch.randn(output.shape).to(low) * ((output > 0) == (expected > 0))
            output.backward(gradient)
            expected.backward(gradient.float())
            for mine, torchs_own in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine.grad, torchs_own.grad, rtol=1e-4, atol=1e-4)


def test_second_derivatives_from_bytes() -> None:
    case = Case(3, 4, (3, 3), 2, 1, size=(7, 8))
    images = random_bytes(2, 3, *case.size)
    weight, bias = case.weights(torch.float32)
    assert bias is not None

    def penalty(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        loss = function(*leaves).pow(2).sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        squares = torch.stack([g.pow(2).sum() for g in gradients])
        return list(torch.autograd.grad(squares.sum(), leaves))

    ours = penalty(
        lambda w, b: pixfuse.conv_bias_relu(
            images, w, b, *case.options(), normalization=pixfuse.SIGNED
        )[0]
    )
    floats = pixfuse.normalize(images, pixfuse.SIGNED)
    for mine, expected in zip(ours, penalty(lambda w, b: torchs(floats, w, b, case)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


def test_bytes_are_all_that_is_kept_of_the_images() -> None:
    case = STEMS["resnet"]
    weight, bias = case.weights(torch.float32)
    weight.requires_grad_()
    images = random_bytes(2, 3, *case.size)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = pixfuse.conv_bias_relu(
            images, weight, bias, *case.options(), normalization=pixfuse.UNIT
        )
    assert {t.data_ptr() for t in kept} == {
        images.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
    }


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dead_channel_has_no_gradient(channels: int, dtype: torch.dtype) -> None:
    case = Case(channels, 12, (3, 3), 1, 1, size=(12, 14))
    weight, bias = case.weights(torch.float32)
    assert bias is not None
    bias[[2, 7]] = -100.0
    images = random_bytes(2, channels, *case.size)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    output, activity = pixfuse.conv_bias_relu(
        images, weight, bias, *case.options(), normalization=pixfuse.UNIT, dtype=dtype
    )
    assert activity.dead.nonzero().flatten().tolist() == [2, 7]
    (output * torch.randn(output.shape).to(dtype)).sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    for gradient in (weight.grad, bias.grad):
        assert bool((gradient[activity.dead] == 0).all())
        assert bool((gradient[~activity.dead] != 0).flatten(1 if gradient.dim() > 1 else 0).any())


def test_no_gradient_flows_to_the_activity() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    output, activity = pixfuse.conv_bias_relu(torch.randn(1, 3, 8, 8), weight)
    assert output.requires_grad
    assert not activity.output_sum.requires_grad
    _, _, sums = torch.ops.pixfuse.conv_bias_relu(
        torch.randn(1, 3, 8, 8), weight, None, [1, 1], [0] * 4, [1, 1], 1, [], [], 0, 0, False
    )
    assert not sums.requires_grad


# --- the operator and torch's transformations ---


OPERANDS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "floats": lambda: (torch.randn(2, 3, 7, 8), (4, 3, 3, 3), 1, [], [], 0, 0, False),
    "many channels": lambda: (torch.randn(2, 6, 7, 8), (4, 3, 3, 3), 2, [], [], 0, 0, True),
    "bytes": lambda: (random_bytes(2, 3, 7, 8), (4, 3, 2, 3), 1, [0.5], [0.25], 0, 0, True),
    "bytes, many": lambda: (random_bytes(2, 6, 7, 8), (4, 6, 3, 2), 1, [0.5], [0.25], 4, 2, False),
    "no images": lambda: (torch.randn(0, 3, 7, 8), (4, 3, 3, 3), 1, [], [], 0, 0, False),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("operand", OPERANDS)
def test_opcheck(operand: str, requires_grad: bool) -> None:
    input, shape, groups, *options = OPERANDS[operand]()
    if input.is_floating_point() and requires_grad:
        input.requires_grad_()
    weight = torch.randn(shape, requires_grad=requires_grad)
    bias = torch.randn(4, requires_grad=requires_grad)
    for given in (bias, None):
        arguments = (input, weight, given, [2, 1], [1, 1, 0, 1], [1, 2], groups, *options)
        torch.library.opcheck(torch.ops.pixfuse.conv_bias_relu.default, arguments)
    output = torch.ops.pixfuse.conv_bias_relu(*arguments)[0].detach()
    gradient = torch.randn(output.shape).to(output.dtype).requires_grad_(requires_grad)
    mean, std, rounding, _, _ = options
    arguments = (gradient, output, input, weight, [2, 1], [1, 1, 0, 1], [1, 2], groups)
    wanted = [input.is_floating_point(), True, True]
    torch.library.opcheck(
        torch.ops.pixfuse.conv_bias_relu_backward.default,
        (*arguments, mean, std, rounding, wanted),
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    def function(
        images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, pixfuse.UnitActivity]:
        return pixfuse.conv_bias_relu(
            images, weight, bias, 2, 1, normalization=pixfuse.IMAGENET, input_layout="NHWC"
        )

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for count in (2, 3) if dynamic else (2,):
        leaves = [torch.randn(8, 3, 3, 3).requires_grad_(), torch.randn(8).requires_grad_()]
        same = [t.detach().clone().requires_grad_() for t in leaves]
        images = random_bytes(count, 17, 19, 3)
        ours, activity = run(images, *leaves)
        expected, eager = function(images, *same)
        assert_same_bits(ours, expected)
        assert torch.equal(activity.active, eager.active)
        assert activity.positions == eager.positions
        ours.pow(2).sum().backward()
        expected.pow(2).sum().backward()
        for mine, other in zip(leaves, same, strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    def function(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output, activity = pixfuse.conv_bias_relu(input.flip(-1), weight, padding="same")
        return output * 2 + activity.active.view(-1, 1, 1)

    input, weight = torch.randn(2, 3, 8, 9), torch.randn(5, 3, 3, 3)
    run = torch.compile(function, fullgraph=True)
    assert_same_bits(run(input, weight), function(input, weight))


@pytest.mark.parametrize("memory_format", [*FORMATS, torch.preserve_format])
def test_fake_tensors_are_like_real_ones(memory_format: torch.memory_format) -> None:
    for channels, low in itertools.product((1, 3, 6), DTYPES):
        weight = torch.randn(5, channels, 3, 2)
        for images in (
            random_bytes(2, channels, 8, 9),
            LAYOUTS["channels_last"](2, channels, 8, 9),
        ):
            options: dict[str, Any] = {
                "normalization": pixfuse.UNIT,
                "memory_format": memory_format,
                "dtype": low,
            }
            real, _ = pixfuse.conv_bias_relu(images, weight, None, 2, 1, **options)
            with FakeTensorMode() as mode:
                fake, _ = pixfuse.conv_bias_relu(
                    mode.from_tensor(images), mode.from_tensor(weight), None, 2, 1, **options
                )
            assert (fake.shape, fake.stride(), fake.dtype) == (
                real.shape,
                real.stride(),
                real.dtype,
            )


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_flops_are_those_of_torchs_convolution(wanted: tuple[bool, bool]) -> None:
    counts = []
    for function in (conv2d, lambda *arguments: pixfuse.conv_bias_relu(*arguments)[0]):
        input = torch.randn(2, 3, 9, 8, requires_grad=wanted[0])
        weight = torch.randn(4, 3, 3, 2, requires_grad=wanted[1])
        with FlopCounterMode(display=False) as forward:
            output = function(input, weight, torch.randn(4, requires_grad=True), (2, 1), 1)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_integers_of_numpy() -> None:
    """As torch takes them."""
    two: Any = np.int64(2)
    input, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 2, 3, 3, requires_grad=True)
    ours, _ = pixfuse.conv_bias_relu(input, weight, None, two, (two, two), two, two)
    expected = conv2d(input, weight, None, two, (two, two), two, two).relu()
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_torch_func_can_do() -> None:
    """What torch does with the operators of its stable interface: no more than this."""
    weights, input = torch.randn(2, 4, 3, 3, 3), torch.randn(1, 3, 6, 6)
    each = torch.func.vmap(lambda weight: pixfuse.conv_bias_relu(input, weight)[0])(weights)
    for weight, output in zip(weights, each, strict=True):
        assert_same_bits(output, pixfuse.conv_bias_relu(input, weight)[0])
    with pytest.raises(RuntimeError, match=r"autograd.Function with functorch transforms"):
        torch.func.grad(lambda w: pixfuse.conv_bias_relu(input, w)[0].sum())(weights[0])


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_forward_mode_is_refused(name: str) -> None:
    """Not left out of the result."""
    tensors: dict[str, Any] = {"input": INPUT, "weight": WEIGHT, "bias": BIAS}

    def output(tensor: torch.Tensor) -> torch.Tensor:
        return pixfuse.conv_bias_relu(**{**tensors, name: tensor})[0]

    given = tensors[name]
    message = f"expected no forward-mode derivative, got {name} with a tangent"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(output, (given,), (torch.ones_like(given),))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(output)(given)
    with forward_ad.dual_level():
        assert_same_bits(output(given), pixfuse.conv_bias_relu(**tensors)[0])
        with pytest.raises(NotImplementedError, match=message):
            output(forward_ad.make_dual(given, torch.ones_like(given)))


# --- errors ---

INPUT, WEIGHT, BIAS = torch.randn(2, 3, 8, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
IMAGES = torch.randint(256, (2, 3, 8, 9), dtype=torch.uint8)

# Arguments that differ from a good call; the class of the error; its words.
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"input": [1]}, TypeError, r"expected input to be a torch.Tensor or .*, got list"),
    "no weight": ({"weight": None}, TypeError, r"expected weight to be a torch.Tensor, got NoneT"),
    "bias a number": ({"bias": 1.0}, TypeError, r"expected bias to be a torch.Tensor, got float"),
    "bytes alone": (
        {"input": IMAGES},
        TypeError,
        r"expected input of a float dtype, got torch.uint8; pass normalization= for uint8 images",
    ),
    "integers": (
        {"input": IMAGES.int()},
        TypeError,
        r"expected input of a float dtype, got torch.int32$",
    ),
    "float with a normalization": (
        {"normalization": pixfuse.UNIT},
        TypeError,
        r"expected input of dtype uint8 with a normalization, got torch.float32; leave",
    ),
    "another normalization": (
        {"input": IMAGES, "normalization": 0.5},
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got float",
    ),
    "integer weight": (
        {"weight": WEIGHT.long()},
        TypeError,
        r"expected weight of a float dtype, got torch.int64",
    ),
    "mixed dtypes": (
        {"weight": WEIGHT.half(), "bias": None},
        TypeError,
        r"expected input and weight of the same dtype, got input torch.float32 and weight torch.fl",
    ),
    "mixed bias": (
        {"bias": BIAS.double()},
        TypeError,
        r"expected weight and bias of the same dtype, got weight torch.float32 and bias torch.flo",
    ),
    "float64 with bytes": (
        {
            "input": IMAGES,
            "weight": WEIGHT.double(),
            "bias": None,
            "normalization": pixfuse.UNIT,
        },
        TypeError,
        r"expected weight of dtype float32, float16 or bfloat16 with uint8 input, got torch.flo",
    ),
    "another output dtype": (
        {"dtype": torch.float16},
        TypeError,
        r"expected dtype to be that of a float input \(torch.float32\), got torch.float16",
    ),
    "integer output": (
        {"input": IMAGES, "normalization": pixfuse.UNIT, "dtype": torch.int32},
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got torch.int32",
    ),
    "rank 2": (
        {"input": INPUT[0, 0]},
        ValueError,
        r"expected input to have 4 dimensions \(a batch\) or 3 \(one image\), got shape \(8, 9\)",
    ),
    "rank 5": ({"input": INPUT[None]}, ValueError, r"expected input to have 4 dimensions .*"),
    "weight of rank 3": (
        {"weight": WEIGHT[0]},
        ValueError,
        r"expected weight of shape \(O, C / groups, kH, kW\) without a 0, got shape \(3, 3, 3\)",
    ),
    "empty weight": ({"weight": WEIGHT[:0]}, ValueError, r"expected weight of shape .* without a"),
    "channels": (
        {"input": INPUT[:, :2]},
        ValueError,
        r"expected input to have 3 channels, as given by groups=1 and weight of size "
        r"\[4, 3, 3, 3\], got 2 channels in \(N, C, H, W\) shape \(2, 2, 8, 9\)",
    ),
    "channels of a group": (
        {"groups": 2},
        ValueError,
        r"expected input to have 6 channels, as given by groups=2",
    ),
    "groups": (
        {"groups": 3, "weight": WEIGHT[:, :1]},
        ValueError,
        r"expected weight to be divisible by groups=3 at dimension 0, got weight of size "
        r"\[4, 1, 3, 3\]",
    ),
    "no groups": (
        {"groups": 0},
        ValueError,
        r"expected groups to be 1 or more, got 0; non-positive groups is not supported",
    ),
    "fraction of a group": (
        {"groups": 1.0},
        TypeError,
        r"expected groups to be an integer, got fl",
    ),
    "bias": (
        {"bias": BIAS[:3]},
        ValueError,
        r"expected bias to be 1-dimensional with 4 elements, .*, got bias of size \[3\]",
    ),
    "no stride": (
        {"stride": (1, 0)},
        ValueError,
        r"expected stride to be 1 or more, got \(1, 0\); non-positive stride is not supported",
    ),
    "three strides": (
        {"stride": (1, 1, 1)},
        TypeError,
        r"expected stride to be an integer, or two \(height, width\), got \(1, 1, 1\)",
    ),
    "negative dilation": (
        {"dilation": -1},
        ValueError,
        r"expected dilation to be 1 or more, got -1; dilation should be greater than zero",
    ),
    "negative padding": (
        {"padding": -1},
        ValueError,
        r"expected padding to be 0 or more, got -1; negative padding is not supported",
    ),
    "unknown padding": (
        {"padding": "reflect"},
        ValueError,
        r"expected padding to be 'valid', 'same' or integers, got 'reflect'",
    ),
    "same with a stride": (
        {"padding": "same", "stride": 2},
        ValueError,
        r"expected stride 1 with padding='same', got 2; padding='same' is not supported for str",
    ),
    "large kernel": (
        {"dilation": 4},
        ValueError,
        r"expected a kernel that is not greater than the padded input size per channel \(8 x 9\), "
        r"got kernel size \(9 x 9\)",
    ),
    "huge padding": (
        {"padding": (2**40, 2**30)},
        ValueError,
        r"expected a result that fits memory, got one of \d+ x 4 x 21990232555\d\d x 21474836\d\d$",
    ),
    "padding beyond 64 bits": (
        {"padding": 2**63 - 1},
        ValueError,
        r"expected a result that fits memory, got one of \d+ x 4 x 18446744073709551\d\d\d x ",
    ),
    "channels of the normalization": (
        {"input": IMAGES, "normalization": pixfuse.Normalization([0, 0], 1)},
        ValueError,
        r"expected images of 2 channels, as the mean and std of normalization have 2 values, got 3",
    ),
    "normalized too large": (
        {
            "input": IMAGES,
            "normalization": pixfuse.Normalization(0, 1e-6),
            "dtype": torch.float16,
        },
        ValueError,
        r"expected normalized images that fit torch.float16 \(up to 65504\), got values up to",
    ),
    "a list for a layout": (
        {"input_layout": ["NHWC"]},
        ValueError,
        r"expected input_layout to be 'NCHW' or 'NHWC', got \['NHWC'\]",
    ),
    "a list for a dtype": (
        {"input": IMAGES, "normalization": pixfuse.UNIT, "dtype": [torch.float32]},
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got \[torch.float32\]",
    ),
    "layout": (
        {"input_layout": "nhwc"},
        ValueError,
        r"expected input_layout to be 'NCHW' or 'NHWC', got 'nhwc'",
    ),
    "memory format": (
        {"memory_format": torch.channels_last_3d},
        ValueError,
        r"expected memory_format to be torch.contiguous_format, channels_last or preserve_format",
    ),
    "sparse": (
        {"input": INPUT.to_sparse()},
        NotImplementedError,
        r"expected input to be a dense tensor, got layout torch.sparse_coo",
    ),
    "another device": (
        {"weight": WEIGHT.to("meta")},
        ValueError,
        r"expected weight on the device of input \(cpu\), got meta",
    ),
    "no kernel": (
        {"input": INPUT.to("meta"), "weight": WEIGHT.to("meta"), "bias": None},
        NotImplementedError,
        r"expected input on a device that has a kernel \(cpu(, cuda)?\), got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    changed, error, message = BAD_CALLS[case]
    good: dict[str, Any] = {"input": INPUT, "weight": WEIGHT, "bias": BIAS}
    with pytest.raises(error, match=f"^conv_bias_relu: {message}"):
        pixfuse.conv_bias_relu(**{**good, **changed})


def operator(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "input": INPUT,
        "weight": WEIGHT,
        "bias": BIAS,
        "stride": [1, 1],
        "padding": [0, 0, 0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "mean": [],
        "std": [],
        "rounding": 0,
        "dtype": 0,
        "channels_last": False,
    }
    return torch.ops.pixfuse.conv_bias_relu(**{**arguments, **changed})


BAD_OPERANDS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": 3}, r"dtype 0 \(float32\), .* got 3"),
    "stride": ({"stride": [0, 1]}, "stride and dilation of at least 1"),
    "strides": ({"stride": [1]}, "2 strides, 2 dilations and 4 paddings"),
    "padding": ({"padding": [0, 0, -1, 0]}, "padding of at least 0"),
    "groups": ({"groups": 0}, "groups of at least 1, got 0"),
    "channels": ({"input": INPUT[:, :2]}, "input of 3 channels in 1 groups of outputs, got 2"),
    "rank": ({"input": INPUT[0]}, "input and weight to have 4 dimensions"),
    "bias": ({"bias": BIAS[:3]}, r"bias of shape \(4\)"),
    "bias dtype": ({"bias": BIAS.half()}, "bias of the dtype of weight"),
    "kernel": ({"dilation": [9, 1]}, r"a kernel that fits into the padded input \(8\), got one"),
    "memory": (
        {"padding": [0, 2**50, 0, 2**20]},
        r"a result that fits memory, got one of \d+ x 4 x 11258999068426\d\d x 10485\d\d",
    ),
    "padding beyond 64 bits": (
        {"padding": [2**62, 2**62, 0, 0]},
        r"a kernel and a padded input of less than 2\^63, got padding 4611686018427387904 and 46",
    ),
    "dilation beyond 64 bits": (
        {"dilation": [2**62, 1]},
        r"a kernel and a padded input of less than 2\^63, got padding 0 and 0, dilation 4611686",
    ),
    "empty": ({"weight": WEIGHT[:0]}, "weight without a size of 0"),
    "dtypes": ({"weight": WEIGHT.half()}, "input, weight and output of the same dtype, or uint8"),
    "mean": ({"input": IMAGES, "mean": [0.0, 0.0], "std": [1.0, 1.0]}, "mean and std with 1 value"),
    "std": ({"input": IMAGES, "mean": [0.0], "std": [0.0]}, "std above 0 and finite in float32"),
}


@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_the_operator_asserts_the_same(case: str) -> None:
    changed, message = BAD_OPERANDS[case]
    with pytest.raises((ValueError, RuntimeError), match=f"expected {message}"):
        operator(**changed)


def test_arrays_are_images() -> None:
    with pytest.raises(TypeError, match=r"expected images of dtype uint8, got float64"):
        pixfuse.conv_bias_relu(np.zeros((1, 3, 8, 8)), WEIGHT, normalization=pixfuse.UNIT)


# --- large outputs, which are stored past the caches where they are whole lines of these ---


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("outputs", "kernel", "stride", "columns"),
    # Rows of whole lines, or of none; some rows together of whole lines.
    [(64, 7, 2, 64), (96, 7, 2, 63), (64, 3, 1, 64), (40, 4, 2, 64), (64, 7, 2, 56)],
)
def test_outputs_beyond_the_caches(
    isa: str,
    outputs: int,
    kernel: int,
    stride: int,
    columns: int,
    memory_format: torch.memory_format,
) -> None:
    width = (columns - 1) * stride + kernel - 2 * (kernel // 2)
    image = random_bytes(1, 3, 50 * stride + 3, width)
    weight, bias = torch.randn(outputs, 3, kernel, kernel), torch.randn(outputs)

    def convolve(images: torch.Tensor) -> tuple[torch.Tensor, pixfuse.UnitActivity]:
        return pixfuse.conv_bias_relu(
            images.contiguous(memory_format=memory_format),
            weight,
            bias,
            stride=stride,
            padding=kernel // 2,
            normalization=pixfuse.IMAGENET,
        )

    count = (25 << 20) // convolve(image)[0].nbytes + 1
    images = random_bytes(count, *image.shape[1:])
    large, activity = convolve(images)
    assert large.nbytes > 24 << 20
    assert large.shape[3] == columns
    assert large.is_contiguous(memory_format=memory_format)
    parts = [convolve(part) for part in images.split(8)]
    assert torch.equal(large, torch.cat([output for output, _ in parts]))
    assert torch.equal(activity.active, (large > 0).sum((0, 2, 3)))
    counts = torch.stack([counted.active for _, counted in parts])
    assert torch.equal(activity.active, counts.sum(0))
