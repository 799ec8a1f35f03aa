"""`pixfuse.conv_bias_relu` on a GPU: values, counts, precisions, streams, graphs, derivatives."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.functional import conv2d, relu

import pixfuse
from pixfuse._convolution_autograd import OUTPUT_DTYPE_CODES
from tests.bits import assert_same_bits
from tests.images import LAYOUTS, random_bytes, relaid
from tests.normalizations import made_up
from tests.test_conv_bias_relu import (
    DTYPES,
    FORMATS,
    GRID,
    STEMS,
    TOLERANCES,
    Case,
    Truth,
    check_activity,
)

# Of torch's own convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

#: How far a sum may be from the exact one, in parts of the sum of its terms' magnitudes. Tensor
#: cores cut off what they add, always towards zero, so that errors add up, and TF32 rounds both
#: factors to 11 bits.
SUM_ERROR = {"float32": 2.0**-19, "TF32": 2.0**-10, "tensor cores": 2.0**-16}
OWN_KERNEL, TORCH = 1, 2


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    with tf32(False):
        yield


def operator(
    way: int,
    case: Case,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    normalization: pixfuse.Normalization | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator, asked to go one way, with the padding of `conv2d`."""
    stride, padding, dilation, groups = case.options()
    geometry = pixfuse.convolution.resolve_geometry(input, weight, stride, padding, dilation)
    constants: tuple[Any, ...] = ((), (), 0)
    if normalization is not None:
        constants = (normalization.mean, normalization.std, normalization.rounding_code)
    code = OUTPUT_DTYPE_CODES[weight.dtype if dtype is None else dtype]
    return torch.ops.pixfuse.conv_bias_relu.default(  # type: ignore[no-any-return]
        input, weight, bias, *geometry, groups, *constants, code, channels_last, False, way
    )


def check_counts(output: torch.Tensor, counts: torch.Tensor, output_sum: torch.Tensor) -> None:
    images, _, height, width = output.shape
    active, active_images, nan = counts.unbind()
    check_activity(
        output,
        pixfuse.UnitActivity(
            active, active_images, nan, output_sum, images * height * width, images
        ),
    )


def check_values(
    output: torch.Tensor, truth: Truth, sums: str, rounded_before: torch.Tensor | None = None
) -> None:
    """`rounded_before` is a bias that was added to sums in the dtype of the output."""
    tolerance = TOLERANCES[output.dtype]
    error = (
        SUM_ERROR[sums] * truth.magnitude
        + tolerance.of_result * (truth.exact.abs() + SUM_ERROR[sums] * truth.magnitude)
        + tolerance.absolute
    )
    if rounded_before is not None:
        bias = rounded_before.double().abs().view(1, -1, 1, 1)
        error = error + tolerance.of_result * (truth.exact.abs() + bias) + tolerance.absolute
    too_far = (output.double() - truth.exact.relu()).abs() > error
    assert not too_far.any(), f"{int(too_far.sum())} of {output.numel()} outputs are too far off"


def to(device: torch.device, *tensors: torch.Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def check(
    device: torch.device, case: Case, input: torch.Tensor, weight_dtype: torch.dtype, way: int
) -> None:
    """A call against float64: its values, its counts, both memory formats."""
    weight, bias = to(device, *case.weights(weight_dtype))
    normalization = None
    values = input
    if not input.is_floating_point():
        normalization = made_up(case.channels, "torchvision")
        values = pixfuse.reference.normalize(input, normalization, dtype=weight_dtype)
    truth = Truth(values.to(device), weight, bias, case.options())
    sums = "float32" if weight_dtype is torch.float32 else "tensor cores"
    for channels_last in (False, True):
        result = operator(
            way, case, input.to(device), weight, bias, normalization, None, channels_last
        )
        assert result[0].dtype is weight_dtype
        check_values(result[0], truth, sums, bias if way == TORCH else None)
        check_counts(*result)


@pytest.mark.parametrize("way", [OWN_KERNEL, TORCH])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEMS)
def test_stems(cuda: torch.device, name: str, dtype: torch.dtype, way: int) -> None:
    case = STEMS[name]
    images = random_bytes(case.images, *case.size, case.channels).permute(0, 3, 1, 2)
    for layout in (images, images.contiguous()):
        check(cuda, case, layout, dtype, way)
        check(cuda, case, layout.to(dtype) / 64 - 2, dtype, way)


@pytest.mark.parametrize("way", [OWN_KERNEL, TORCH])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grid(cuda: torch.device, dtype: torch.dtype, way: int) -> None:
    for i, case in enumerate(GRID):
        shape = (case.images, case.channels, *case.size)
        if case.channels <= 32:
            images = random_bytes(*shape).contiguous(memory_format=FORMATS[i % 2])
            check(cuda, case, images, dtype, way)
        floats = torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[i // 2 % 2])
        check(cuda, case, floats, dtype, way)


def test_outputs_of_another_dtype(cuda: torch.device) -> None:
    case = STEMS["mobilenet"]
    images = random_bytes(2, 3, *case.size).to(cuda)
    for way, of_weight, of_output in itertools.product((OWN_KERNEL, TORCH), DTYPES, DTYPES):
        weight, bias = to(cuda, *case.weights(of_weight))
        # Where the types differ, torch's convolution goes through float32.
        exact = way == TORCH and of_weight is not of_output
        values = pixfuse.normalize(
            images, pixfuse.IMAGENET, dtype=torch.float32 if exact else of_weight
        )
        result = operator(way, case, images, weight, bias, pixfuse.IMAGENET, of_output)
        assert result[0].dtype is of_output
        truth = Truth(values, weight, bias, case.options())
        check_values(result[0], truth, "tensor cores", bias if way == TORCH else None)
        check_counts(*result)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(cuda: torch.device, layout: str) -> None:
    for channels in (1, 3, 4, 8):
        case = Case(channels, 18, (3, 3), 2, 1, size=(9, 31))
        images = LAYOUTS[layout](2, channels, *case.size)
        weight, bias = to(cuda, *case.weights(torch.float16))
        options: dict[str, Any] = {"normalization": made_up(channels, "timm")}
        call = (weight, bias, *case.options())
        dense = images.clone(memory_format=torch.contiguous_format).to(cuda)
        strided = relaid(images, cuda)
        contiguous = torch.contiguous_format
        expected, _ = pixfuse.conv_bias_relu(dense, *call, **options, memory_format=contiguous)
        ours, activity = pixfuse.conv_bias_relu(strided, *call, **options, memory_format=contiguous)
        if channels <= 4:
            assert_same_bits(ours, expected)
        torch.testing.assert_close(ours, expected)
        check_activity(ours, activity)


def test_nan_and_infinity(cuda: torch.device) -> None:
    for way, dtype in itertools.product((OWN_KERNEL, TORCH), DTYPES):
        case = Case(3, 20, (3, 3), 1, 1, size=(33, 35))
        weight, bias = to(cuda, *case.weights(dtype))
        input = torch.randn(2, 3, 33, 35).to(cuda, dtype)
        input[0, 1, 5, 6] = math.nan
        input[1, 2, 20, 30] = math.inf
        result = operator(way, case, input, weight, bias)
        check_counts(*result)
        if way == TORCH:  # cuDNN's quicker algorithms spread them over neighbouring pixels
            continue
        expected = relu(conv2d(input.double(), weight.double(), bias.double(), *case.options()))
        assert torch.equal(result[0].isnan(), expected.isnan())
        assert torch.equal(result[0].isinf(), expected.isinf())


def test_tf32_only_where_torch_allows_it(cuda: torch.device) -> None:
    case = STEMS["resnet"]
    weight, bias = to(cuda, *case.weights(torch.float32))
    input = torch.randn(2, 3, *case.size, device=cuda)
    truth = Truth(input, weight, bias, case.options())
    with tf32(False):
        exact, _ = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
    check_values(exact, truth, "float32")
    with tf32(True):
        quick, activity = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
    check_values(quick, truth, "TF32")
    check_activity(quick, activity)
    has_tf32 = torch.cuda.get_device_capability()[0] >= 8
    assert torch.equal(quick, exact) is not has_tf32


def test_no_further_off_than_twice_torch(cuda: torch.device) -> None:
    for case, dtype, allowed in itertools.product(STEMS.values(), DTYPES, (False, True)):
        weight, bias = to(cuda, *case.weights(dtype))
        input = torch.randn(case.images, case.channels, *case.size).to(cuda, dtype)
        with tf32(allowed):
            output, _ = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
            theirs = relu(conv2d(input, weight, bias, *case.options()))
        exact, _ = pixfuse.reference.conv_bias_relu(
            input, weight, bias, *case.options(), dtype=torch.float64
        )
        mine, torchs = (
            (result.double() - exact).pow(2).mean().sqrt().item() for result in (output, theirs)
        )
        assert mine <= 2 * torchs


@pytest.mark.parametrize("way", [OWN_KERNEL, TORCH])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_every_run(cuda: torch.device, dtype: torch.dtype, way: int) -> None:
    case = STEMS["resnet"]
    weight, bias = to(cuda, *case.weights(dtype))
    input = torch.randn(8, 3, 224, 224, device=cuda).to(dtype)
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        first = operator(way, case, input, weight, bias)
        for _ in range(5):
            for again, once in zip(operator(way, case, input, weight, bias), first, strict=True):
                assert torch.equal(again, once)
    finally:
        torch.backends.cudnn.deterministic = deterministic


def test_an_empty_batch(cuda: torch.device) -> None:
    for channels in (3, 6):
        case = Case(channels, 8, (3, 3), 1, 1)
        weight, bias = to(cuda, *case.weights(torch.float32))
        output, activity = pixfuse.conv_bias_relu(
            torch.randn(0, channels, 9, 10, device=cuda), weight, bias, *case.options()
        )
        assert output.shape == (0, 8, 9, 10)
        assert activity.active.tolist() == [0] * 8
        assert activity.output_sum.tolist() == [0.0] * 8


def test_float64_goes_through_torch(cuda: torch.device) -> None:
    case = Case(3, 5, (3, 3), 1, "same")
    weight, bias = to(cuda, *case.weights(torch.float64))
    input = torch.randn(2, 3, 9, 10, device=cuda, dtype=torch.float64)
    result = operator(0, case, input, weight, bias)
    torch.testing.assert_close(result[0], relu(conv2d(input, weight, bias, *case.options())))
    check_counts(*result)
    with pytest.raises((RuntimeError, ValueError), match="expected way 0 or 2 for float64"):
        operator(OWN_KERNEL, case, input, weight, bias)


def test_derivatives(cuda: torch.device) -> None:
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64, device=cuda, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, device=cuda, requires_grad=True)
    input = torch.randn(2, 2, 5, 6, dtype=torch.float64, device=cuda, requires_grad=True)

    def function(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return pixfuse.conv_bias_relu(input, weight, bias, 2, 1)[0]

    # cuDNN may add up the derivatives of weights in another order each time.
    options: dict[str, Any] = {"nondet_tol": 1e-12}
    assert torch.autograd.gradcheck(function, (input, weight, bias), **options)
    assert torch.autograd.gradgradcheck(function, (input, weight, bias), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_from_bytes(cuda: torch.device, dtype: torch.dtype) -> None:
    case = STEMS["mobilenet"]
    images = random_bytes(2, 3, *case.size).to(cuda)
    weight, bias = to(cuda, *case.weights(dtype))
    ours = [t.clone().requires_grad_() for t in (weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (weight, bias)]
    output, _ = pixfuse.conv_bias_relu(
        images, ours[0], ours[1], *case.options(), normalization=pixfuse.IMAGENET
    )
    floats = pixfuse.normalize(images, pixfuse.IMAGENET, dtype=dtype)
    expected = relu(conv2d(floats, theirs[0], theirs[1], *case.options()))
    gradient = torch.randn(output.shape, device=cuda).to(dtype) * ((output > 0) == (expected > 0))
    output.backward(gradient)
    expected.backward(gradient)
    for mine, torchs in zip(ours, theirs, strict=True):
        scale = torchs.grad.abs().max().item()
        bound = scale * (1e-4 if dtype is torch.float32 else 2e-2)
        torch.testing.assert_close(mine.grad, torchs.grad, rtol=0, atol=bound)


def test_opcheck(cuda: torch.device) -> None:
    for channels in (3, 6):
        case = Case(channels, 8, (3, 3), 1, 1, size=(7, 8))
        weight, bias = to(cuda, *case.weights(torch.float32))
        input = torch.randn(2, channels, *case.size, device=cuda, requires_grad=True)
        geometry = pixfuse.convolution.resolve_geometry(input, weight, 1, 1, 1)
        torch.library.opcheck(
            torch.ops.pixfuse.conv_bias_relu.default,
            (
                input,
                weight.requires_grad_(),
                bias.requires_grad_(),
                *geometry,
                1,
                [],
                [],
                0,
                0,
                False,
                False,
                0,
            ),
        )


def test_compiled(cuda: torch.device) -> None:
    case = STEMS["vgg"]
    weight, bias = to(cuda, *case.weights(torch.float16))
    images = random_bytes(2, 3, *case.size).to(cuda)

    def function(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, activity = pixfuse.conv_bias_relu(
            images, weight, bias, *case.options(), normalization=pixfuse.IMAGENET
        )
        return output * 2, activity.active

    run = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        images.copy_(random_bytes(2, 3, *case.size))
        for ours, expected in zip(run(images), function(images), strict=True):
            assert torch.equal(ours.clone(), expected)


def test_autocast(cuda: torch.device) -> None:
    case = STEMS["vgg"]
    weight, bias = to(cuda, *case.weights(torch.float32))
    input = torch.randn(2, 3, *case.size, device=cuda)
    with torch.autocast("cuda", torch.bfloat16):
        output, _ = pixfuse.conv_bias_relu(input, weight, bias, *case.options())
    low = input.bfloat16(), weight.bfloat16(), bias.bfloat16()
    assert_same_bits(output, pixfuse.conv_bias_relu(*low, *case.options())[0])


@pytest.mark.parametrize("channels", [3, 6])
def test_cuda_graph(cuda: torch.device, channels: int) -> None:
    case = Case(channels, 40, (3, 3), 1, 1, size=(33, 35))
    weight, bias = to(cuda, *case.weights(torch.float16))
    images = random_bytes(2, channels, *case.size).to(cuda)
    options: dict[str, Any] = {"normalization": made_up(channels, "torchvision")}
    pixfuse.conv_bias_relu(images, weight, bias, *case.options(), **options)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, activity = pixfuse.conv_bias_relu(images, weight, bias, *case.options(), **options)
    for _ in range(3):
        images.copy_(random_bytes(2, channels, *case.size))
        graph.replay()
        torch.cuda.synchronize()
        expected, wanted = pixfuse.conv_bias_relu(images, weight, bias, *case.options(), **options)
        torch.testing.assert_close(output, expected)
        check_activity(output, activity)
        assert activity.images == wanted.images


@pytest.mark.parametrize("channels", [3, 6])
def test_no_synchronization(cuda: torch.device, channels: int) -> None:
    case = Case(channels, 40, (3, 3), 1, 1, size=(33, 35))
    weight, bias = to(cuda, *case.weights(torch.float32))
    images = random_bytes(2, channels, *case.size).to(cuda)
    options: dict[str, Any] = {"normalization": made_up(channels, "torchvision")}
    pixfuse.conv_bias_relu(images, weight, bias, *case.options(), **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, activity = pixfuse.conv_bias_relu(images, weight, bias, *case.options(), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_activity(output, activity)


def test_the_current_stream_is_used(cuda: torch.device) -> None:
    case = STEMS["vgg"]
    weight, bias = to(cuda, *case.weights(torch.float16))
    images = torch.zeros(2, 3, *case.size, dtype=torch.uint8, device=cuda)
    arriving = random_bytes(2, 3, *case.size).to(cuda)
    call = (weight, bias, *case.options())
    expected, wanted = pixfuse.conv_bias_relu(arriving, *call, normalization=pixfuse.IMAGENET)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # on another stream, the zeros would be read meanwhile
        images.copy_(arriving)
        output, activity = pixfuse.conv_bias_relu(images, *call, normalization=pixfuse.IMAGENET)
    stream.synchronize()
    assert_same_bits(output, expected)
    assert torch.equal(activity.active, wanted.active)


def test_another_device_than_the_current_one(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = STEMS["vgg"]
    weight, bias = case.weights(torch.float16)
    images = random_bytes(2, 3, *case.size)
    results = []
    for place in ("cuda:0", "cuda:1"):
        there = to(torch.device(place), images, weight, bias)
        with torch.cuda.device(0):
            output, activity = pixfuse.conv_bias_relu(
                *there, *case.options(), normalization=pixfuse.IMAGENET
            )
            assert torch.cuda.current_device() == 0
        assert output.device == there[0].device
        check_activity(output, activity)
        results.append(output.cpu())
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert_same_bits(*results)


def test_tensors_on_two_devices(cuda: torch.device) -> None:
    case = STEMS["vgg"]
    weight, bias = case.weights(torch.float32)
    input = torch.randn(1, 3, 9, 9, device=cuda)
    with pytest.raises(ValueError, match="expected weight on the device of input"):
        pixfuse.conv_bias_relu(input, weight, bias)
    with pytest.raises((RuntimeError, ValueError), match="weight and bias on the device of input"):
        operator(0, case, input, weight, bias)


def test_offsets_beyond_32_bits(cuda: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    images = random_bytes(2, 3, 20, 20).to(cuda)
    far = torch.empty((1 << 32) + 3 * 400, dtype=torch.uint8, device=cuda)
    spread = far.as_strided((2, 3, 20, 20), (1 << 32, 400, 20, 1))
    spread.copy_(images)
    case = Case(3, 8, (3, 3), 1, 1)
    weight, bias = to(cuda, *case.weights(torch.float16))
    call = (weight, bias, *case.options())
    for ours, expected in zip(
        pixfuse.conv_bias_relu(spread, *call, normalization=pixfuse.IMAGENET)[:1],
        pixfuse.conv_bias_relu(images, *call, normalization=pixfuse.IMAGENET)[:1],
        strict=True,
    ):
        assert_same_bits(ours, expected)
