"""`standardize_per_image` against its reference, exact arithmetic and the formula of TensorFlow."""

import inspect
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import pixfuse
from tests.bits import assert_same_bits
from tests.exact import round_to_float32
from tests.images import LAYOUTS, all_values, random_bytes
from tests.isas import WITH_OWN_LOOPS
from tests.normalizations import DTYPES

FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
FLOORS: tuple[Any, ...] = ("tensorflow", 1.0, 40)


def check(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    ours = pixfuse.standardize_per_image(images, *args, **kwargs)
    expected = pixfuse.reference.standardize_per_image(images.cpu(), *args, **kwargs)
    assert_same_bits(ours, expected)
    return ours


def photographs(*shape: int) -> torch.Tensor:
    """Images of different brightness and contrast, some of a single color."""
    n = shape[0]
    contrast = torch.linspace(0, 1, n).view(-1, *[1] * (len(shape) - 1))
    noise = torch.randn(shape) * 60 * contrast
    return (noise + 40 + 180 * torch.rand_like(contrast)).clamp(0, 255).to(torch.uint8)


# --- the reference ---


def exact_square_root(value: Fraction) -> Fraction:
    """Rounded down after 100 bits behind those of a double."""
    scale = 2**400
    return Fraction(math.isqrt(value.numerator * scale * scale // value.denominator), scale)


@pytest.mark.parametrize("per_channel", [False, True])
def test_reference_is_the_nearest_float32(per_channel: bool) -> None:
    for size, low, high in ((5, 0, 256), (31, 100, 103), (17, 254, 256), (9, 7, 8)):
        images = torch.randint(low, high, (1, 3, size, size), dtype=torch.uint8)
        ours = pixfuse.reference.standardize_per_image(images, per_channel)
        parts = [[c] for c in range(3)] if per_channel else [[0, 1, 2]]
        for channels in parts:
            values = images[0, channels].flatten().tolist()
            n = len(values)
            mean = Fraction(sum(values), n)
            squares = sum(((v - mean) ** 2 for v in values), Fraction(0))
            std = exact_square_root(squares / n)
            width = max(std, exact_square_root(Fraction(1, n)))
            expected = {v: round_to_float32((v - mean) / width) for v in set(values)}
            assert ours[0, channels].flatten().tolist() == [expected[v] for v in values]


def test_one_value_off_the_mean_of_millions(isa: str) -> None:
    """What a float64 drops of the mean then shows in the result, which is still the nearest."""
    for n in (6_000_011, 8_000_009):
        images = torch.full((1, 1, n), 201, dtype=torch.uint8)
        images[0, 0, 5] = 202
        mean = Fraction(201 * n + 1, n)
        std = exact_square_root(Fraction(n - 1, n * n))
        width = max(std, exact_square_root(Fraction(1, n)))
        ours = pixfuse.standardize_per_image(images)
        assert ours[0, 0, 5].item() == round_to_float32((202 - mean) / width)
        assert ours[0, 0, 6].item() == round_to_float32((201 - mean) / width)
        assert_same_bits(ours, pixfuse.reference.standardize_per_image(images))


def test_reference_equals_float64() -> None:
    images = photographs(6, 3, 33, 47)
    for axes, per_channel in (((1, 2, 3), False), ((2, 3), True)):
        array = images.numpy().astype(np.float64)
        mean, std = array.mean(axes, keepdims=True), array.std(axes, keepdims=True)
        floor = 1 / math.sqrt(array[0].size if not per_channel else array[0, 0].size)
        expected = (array - mean) / np.maximum(std, floor)
        ours = pixfuse.reference.standardize_per_image(images, per_channel)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=6e-8, atol=1e-13)


def test_tensorflow() -> None:
    """`tf.image.per_image_standardization`, written out: it computes in float32."""
    images = photographs(6, 29, 31, 3)
    x = images.numpy().astype(np.float32)
    num_pixels = np.float32(x[0].size)
    mean = x.mean((1, 2, 3), keepdims=True)
    stddev = x.std((1, 2, 3), keepdims=True)
    adjusted = np.maximum(stddev, np.float32(1) / np.sqrt(num_pixels))
    expected = (x - mean) / adjusted
    ours = pixfuse.standardize_per_image(images, input_layout="NHWC")
    # Float32 sums of 2697 bytes are off by up to some 1e-5 of their size.
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_what_the_docstring_says_it_equals() -> None:
    text = inspect.getdoc(pixfuse.standardize_per_image)
    assert text is not None
    lines = inspect.cleandoc(text.split("Equivalent to::\n")[1].split("up to the last bit")[0])
    names: dict[str, Any] = {"images": photographs(5, 3, 20, 30)}
    exec(lines, names)
    ours = pixfuse.standardize_per_image(names["images"])
    torch.testing.assert_close(ours, names["x"], rtol=1.2e-7, atol=1e-12)


def test_mean_and_std_of_the_result() -> None:
    images = random_bytes(9, 3, 40, 50)
    ours = pixfuse.standardize_per_image(images).double()
    torch.testing.assert_close(ours.mean((1, 2, 3)), torch.zeros(9).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(
        ours.var((1, 2, 3), correction=0), torch.ones(9).double(), rtol=1e-7, atol=0
    )
    each = pixfuse.standardize_per_image(images, per_channel=True).double()
    torch.testing.assert_close(each.mean((2, 3)), torch.zeros(9, 3).double(), rtol=0, atol=1e-8)


# --- the floor ---


def test_a_single_color_becomes_zero(device: torch.device) -> None:
    for value, floor in itertools.product((0, 1, 127, 255), FLOORS):
        images = torch.full((2, 3, 30, 40), value, dtype=torch.uint8, device=device)
        for per_channel in (False, True):
            ours = check(images, per_channel, floor)
            assert bool((ours == 0).all())


def test_a_flat_sky_is_not_blown_up(device: torch.device) -> None:
    sky = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8, device=device)
    sky[..., ::2] += 1
    ours = check(sky, floor=10.0)
    assert ours.abs().max().item() == pytest.approx(0.05)
    assert check(sky).abs().max().item() == pytest.approx(1.0)


def test_the_floor_of_tensorflow(device: torch.device) -> None:
    """One value that differs by 1: its std is just below 1 / sqrt(n)."""
    images = torch.zeros(1, 1, 10, 10, dtype=torch.uint8, device=device)
    images[0, 0, 3, 4] = 1
    ours = check(images)
    assert ours.max().item() == pytest.approx(0.99 * 10)  # 1 / 0.1, not 1 / sqrt(0.0099)
    assert_same_bits(ours, check(images, floor=0.1))


# --- layouts, sizes, devices ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    for size in ((2, 3, 5, 7), (1, 1, 1, 1), (3, 4, 33, 65), (2, 13, 6, 9), (2, 3, 3, 1030)):
        images = LAYOUTS[layout](*size)
        if device.type == "cuda":
            images = images.to(device)
        for index, memory_format in enumerate(FORMATS):
            per_channel = (index + size[1]) % 2 == 0
            check(images, per_channel, dtype=dtype, memory_format=memory_format)
            check(images[0], per_channel, dtype=dtype, memory_format=memory_format)
        check(images.permute(0, 2, 3, 1), input_layout="NHWC", dtype=dtype)


def test_many_images_and_few(device: torch.device) -> None:
    """Threads take whole images, or share each of them."""
    for count in (1, 2, 7, 8, 9, 50):
        images = photographs(count, 3, 40, 61).to(device)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(images)
            check(images, True, 3.0, memory_format=torch.channels_last)


def test_large_images(device: torch.device) -> None:
    torch.set_num_threads(3)
    check(photographs(2, 3, 500, 700).to(device))
    check(photographs(9, 3, 200, 300).to(device))


def test_an_image_does_not_depend_on_the_others(device: torch.device) -> None:
    images = photographs(9, 3, 31, 33).to(device)
    whole = pixfuse.standardize_per_image(images)
    for n in range(9):
        assert_same_bits(pixfuse.standardize_per_image(images[n]), whole[n])


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (3, 0, 5)])
def test_empty(device: torch.device, size: tuple[int, ...]) -> None:
    check(torch.empty(size, dtype=torch.uint8, device=device))


def test_all_values(device: torch.device) -> None:
    for channels in (1, 2, 3, 4, 5, 17):
        for per_channel, floor, dtype in itertools.product((False, True), FLOORS, DTYPES):
            check(all_values(channels).to(device), per_channel, floor, dtype=dtype)


def test_arrays() -> None:
    array = random_bytes(2, 9, 8, 3).numpy()
    array.flags.writeable = False
    ours = pixfuse.standardize_per_image(array, input_layout="NHWC")
    assert_same_bits(ours, pixfuse.reference.standardize_per_image(array, input_layout="NHWC"))


def test_every_isa_gives_the_same_bits() -> None:
    images = photographs(10, 3, 50, 60)
    results = []
    for isa in WITH_OWN_LOOPS:
        with pixfuse._library.use_isa(isa):
            results.append(pixfuse.standardize_per_image(images))
    for result in results[1:]:
        assert_same_bits(result, results[0])


# --- the two ways of a GPU ---

ONE_PASS, TWO_KERNELS = 1, 2
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways(cuda: torch.device, layout: str, dtype: torch.dtype) -> None:
    """Up to images that, in some layout, nearly fill the least shared memory that a GPU has."""
    for size in ((2, 3, 5, 7), (1, 1, 1, 1), (3, 4, 33, 65), (2, 13, 6, 9), (5, 3, 70, 131)):
        images = LAYOUTS[layout](*size).to(cuda)
        for per_channel, memory_format in itertools.product((False, True), (0, 1)):
            expected = pixfuse.reference.standardize_per_image(
                images.cpu(), per_channel, dtype=dtype, memory_format=FORMATS[memory_format]
            )
            for way in (ONE_PASS, TWO_KERNELS):
                ours = torch.ops.pixfuse.standardize_per_image(
                    images, per_channel, 0.0, 0, CODES[dtype], memory_format, way
                )
                assert_same_bits(ours, expected)


@pytest.mark.parametrize("count", [1, 7, 64, 300])
def test_images_of_imagenet_by_the_rule(cuda: torch.device, count: int) -> None:
    """One pass or two, whatever the GPU has."""
    images = photographs(count, 3, 224, 224).to(cuda)
    for view in (images, images.contiguous(memory_format=torch.channels_last)):
        check(view)
        check(view, True)


def test_one_pass_needs_no_memory_but_the_output(cuda: torch.device) -> None:
    images = random_bytes(8, 3, 64, 65).to(cuda)
    pixfuse.standardize_per_image(images)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    result = torch.ops.pixfuse.standardize_per_image(images, False, 0.0, 0, 0, 0, ONE_PASS)
    assert torch.cuda.max_memory_allocated() - before <= result.nbytes + 512


def test_ways_that_cannot_be(cuda: torch.device) -> None:
    images = random_bytes(2, 3, 600, 600).to(cuda)
    operator = torch.ops.pixfuse.standardize_per_image
    with pytest.raises((RuntimeError, ValueError), match=r"way 0 or 2 for images of which .* 1"):
        operator(images, False, 0.0, 0, 0, 0, ONE_PASS)
    with pytest.raises((RuntimeError, ValueError), match="way from 0 to 2, got 3"):
        operator(images, False, 0.0, 0, 0, 0, 3)
    assert_same_bits(operator(images, False, 0.0, 0, 0, 0, TWO_KERNELS), check(images))


# --- errors ---

IMAGES = random_bytes(2, 3, 4, 5)

BAD_CALLS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "float": (lambda: {"images": IMAGES / 2}, TypeError, r"images of dtype uint8, got torch.float"),
    "list": (
        lambda: {"images": [IMAGES[0]]},
        TypeError,
        r"images to be a torch.Tensor or a numpy.ndarray, got list",
    ),
    "dimensions": (lambda: {"images": IMAGES[0, 0]}, ValueError, r"images to have 4 dimensions"),
    "sparse": (
        lambda: {"images": IMAGES.to_sparse()},
        NotImplementedError,
        r"images to be a dense tensor",
    ),
    "layout": (
        lambda: {"input_layout": "CHW"},
        ValueError,
        r"input_layout to be 'NCHW' or 'NHWC', got 'CHW'",
    ),
    "per_channel": (
        lambda: {"per_channel": 1},
        TypeError,
        r"per_channel to be True or False, got int",
    ),
    "floor name": (
        lambda: {"floor": "torch"},
        ValueError,
        r"floor to be 'tensorflow' or a number above 0, got 'torch'",
    ),
    "floor type": (
        lambda: {"floor": None},
        TypeError,
        r"floor to be 'tensorflow' or a number above 0, got NoneType",
    ),
    "floor bool": (lambda: {"floor": True}, TypeError, r"floor to be .*, got bool"),
    "floor zero": (lambda: {"floor": 0}, ValueError, r"floor to be .* above 0 \(finite.*, got 0"),
    "floor below": (lambda: {"floor": -1.0}, ValueError, r"floor to be .* above 0 .*, got -1.0"),
    "floor nan": (lambda: {"floor": math.nan}, ValueError, r"floor to be .*, got nan"),
    "floor infinite": (lambda: {"floor": math.inf}, ValueError, r"floor to be .*, got inf"),
    "floor tiny": (lambda: {"floor": 1e-310}, ValueError, r"floor to be .*1e-30 or more.*1e-310"),
    "dtype": (
        lambda: {"dtype": torch.float64},
        TypeError,
        r"dtype to be torch.float32, float16 or bfloat16, got torch.float64",
    ),
    "memory format": (
        lambda: {"memory_format": torch.channels_last_3d},
        ValueError,
        r"memory_format to be torch.contiguous_format, channels_last or preserve_format, got",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors(case: str) -> None:
    change, error, message = BAD_CALLS[case]
    arguments: dict[str, Any] = {"images": IMAGES, **change()}
    with pytest.raises(error, match=f"^standardize_per_image: expected {message}"):
        pixfuse.standardize_per_image(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGES.float(), False, 0.0, 0, 0, 0), "images of dtype uint8"),
        ((IMAGES, False, -1.0, 0, 0, 0), "floor 0 .* or above, finite"),
        ((IMAGES, False, math.nan, 0, 0, 0), "floor 0 .* or above, finite"),
        ((IMAGES, False, 1e-310, 0, 0, 0), "floor with a finite reciprocal"),
        ((IMAGES, False, 0.0, 2, 0, 0), r"input_layout 0"),
        ((IMAGES, False, 0.0, 0, 3, 0), r"dtype 0 \(float32\), .*, got 3"),
        ((IMAGES, False, 0.0, 0, 0, 3), r"memory_format 0 .*, got 3"),
    ],
)
def test_operators_check_too(arguments: tuple[Any, ...], message: str) -> None:
    operator = torch.ops.pixfuse.standardize_per_image
    pattern = f"standardize_per_image: expected {message}"
    with pytest.raises((RuntimeError, ValueError), match=pattern):
        operator(*arguments)


# --- torch.compile ---


def test_opcheck() -> None:
    operator = torch.ops.pixfuse.standardize_per_image.default
    for images, per_channel, code in itertools.product(
        (IMAGES, IMAGES[0], IMAGES[:0], IMAGES.mT), (False, True), (0, 1, 2)
    ):
        torch.library.opcheck(operator, (images, per_channel, 0.0, 0, code, code))
        torch.library.opcheck(operator, (images.movedim(-3, -1), per_channel, 2.0, 1, code, code))


@pytest.mark.parametrize("input_layout", ["NCHW", "NHWC"])
def test_compiled_is_eager(input_layout: Literal["NCHW", "NHWC"]) -> None:
    torch._dynamo.reset()

    def function(images: torch.Tensor) -> list[torch.Tensor]:
        return [
            pixfuse.standardize_per_image(images, per_channel, 0.5, input_layout, dtype, form) + 1
            for per_channel, dtype, form in itertools.product((False, True), DTYPES, FORMATS)
        ]

    run = torch.compile(function, backend=CompileCounterWithBackend("aot_eager"), fullgraph=True)
    for ours, expected in zip(run(IMAGES), function(IMAGES), strict=True):
        assert_same_bits(ours, expected)


def test_fake_tensors_are_like_real_ones() -> None:
    for images, form in itertools.product((IMAGES, IMAGES[0], IMAGES.mT), FORMATS):
        real = pixfuse.standardize_per_image(images, memory_format=form)
        with FakeTensorMode() as mode:
            fake = pixfuse.standardize_per_image(mode.from_tensor(images), memory_format=form)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
