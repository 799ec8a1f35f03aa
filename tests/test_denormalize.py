"""`denormalize`: the way back to pixels, for every value that a float can be."""

import inspect
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import pixfuse
from benchmarks import round_trip
from tests.exact import round_to_float32
from tests.images import LAYOUTS, LONG_WIDTHS, WIDTHS, all_values, random_bytes
from tests.normalizations import (
    DTYPES,
    EXTREMES,
    PRESETS,
    ROUNDINGS,
    made_up,
    of_any_units,
    with_rounding,
)

OUTPUT_LAYOUTS: tuple[Literal["NCHW", "NHWC"], ...] = ("NCHW", "NHWC")


def check(tensor: torch.Tensor, normalization: pixfuse.Normalization) -> torch.Tensor:
    """Compares both output layouts, with and without counts, with the reference."""
    before = tensor.clone()
    for layout in OUTPUT_LAYOUTS:
        expected, expected_counts = pixfuse.reference.denormalize(
            tensor.cpu(), normalization, output_layout=layout, return_counts=True
        )
        plain = pixfuse.denormalize(tensor, normalization, output_layout=layout)
        ours, counts = pixfuse.denormalize(
            tensor, normalization, output_layout=layout, return_counts=True
        )
        for result in (plain, ours):
            assert result.dtype is torch.uint8
            assert result.shape == expected.shape
            assert result.is_contiguous()
            assert torch.equal(result.cpu(), expected)
        assert counts.tolist() == expected_counts.tolist()
    assert torch.equal(tensor.isnan(), before.isnan())
    assert torch.equal(tensor.nan_to_num(), before.nan_to_num())
    return pixfuse.denormalize(tensor, normalization)


def values_like(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats around and beyond the range, in the memory layout of a uint8 view."""
    storage = torch.empty(0, dtype=torch.uint8).set_(pixels.untyped_storage())
    values = (torch.randn(storage.shape) * 2).to(dtype)
    return values.as_strided(pixels.shape, pixels.stride(), pixels.storage_offset())


# --- the reference ---


def exact(x: float, mean: float, std: float) -> int:
    """The promise in rational numbers, each step rounded to float32."""
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return 255 if x > 0 else 0
    scale, offset = (
        round_to_float32(Fraction(255.0 * std)),
        round_to_float32(Fraction(255.0 * mean)),
    )
    product = round_to_float32(Fraction(x) * Fraction(scale))
    if math.isinf(product):
        return 255 if product > 0 else 0
    pixel = round_to_float32(Fraction(product) + Fraction(offset))
    return min(max(round(Fraction(pixel)), 0), 255) if math.isfinite(pixel) else 255


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_rational_arithmetic(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 1e30, -1e30, 65504.0]
    values = torch.tensor([*special, *torch.linspace(-3, 3, 501).tolist()]).to(dtype)
    for normalization in (pixfuse.UNIT, pixfuse.SIGNED, pixfuse.MNIST, made_up(1, "timm")):
        ours = pixfuse.reference.denormalize(values.view(1, 1, -1), normalization)
        assert isinstance(ours, torch.Tensor)
        mean, std = normalization.mean[0], normalization.std[0]
        expected = [exact(x, mean, std) for x in values.tolist()]
        assert ours.flatten().tolist() == expected


def test_halves_go_to_the_even_neighbour() -> None:
    """255 * std and 255 * mean are 1 and 0 here, so values are pixels."""
    unit = pixfuse.Normalization(0.0, 1 / 255)
    halves = torch.arange(-4, 520) / 2
    ours = pixfuse.denormalize(halves.view(1, 1, -1), unit)
    expected = [min(max(round(x), 0), 255) for x in halves.tolist()]
    assert ours.flatten().tolist() == expected
    assert 0 < sum(x % 2 for x in expected) < len(expected)


# --- the round trip ---


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_comes_back(device: torch.device, preset: str) -> None:
    normalization = PRESETS[preset]
    channels = max(len(normalization.mean), 3)
    images = all_values(channels).to(device)
    for rounding in ROUNDINGS:
        same = with_rounding(normalization, rounding)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            there = pixfuse.normalize(images, same, memory_format=memory_format)
            back, counts = pixfuse.denormalize(there, same, return_counts=True)
            assert torch.equal(back, images)
            assert counts.tolist() == [0, 0]
            nhwc = pixfuse.denormalize(there, same, output_layout="NHWC")
            assert torch.equal(nhwc, images.movedim(1, -1))


def test_the_page_of_survivors_is_what_the_command_makes() -> None:
    assert round_trip.PAGE.read_text() == round_trip.page()
    rows = [line.split(" | ") for line in round_trip.page().splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `") for row in rows} == set(PRESETS)
    assert all(row[1] == "all 256" for row in rows)  # float32
    assert any(row[3] != "all 256 |" for row in rows), "a table that could not show a loss"


def test_a_lost_value_is_noticed() -> None:
    """MNIST's largest results are beyond what bfloat16 tells apart."""
    assert round_trip.lost_values(pixfuse.MNIST, "torchvision", torch.bfloat16)[0]
    assert round_trip.describe(((), (3, 5))) == "all but channel 1: 3, 5"


# --- every value ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value(device: torch.device, dtype: torch.dtype) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).view(1, 1, 256, 256).to(device)
    for normalization in (pixfuse.UNIT, pixfuse.SIGNED, pixfuse.MNIST):
        check(values, normalization)


def test_float32_values_of_every_size(device: torch.device) -> None:
    bits = torch.arange(-(2**31), 2**31, 40_503).to(torch.int32)
    values = bits.view(torch.float32)[:106_000].view(1, 1, 1, -1).to(device)
    for normalization in (pixfuse.UNIT, pixfuse.SIGNED, pixfuse.IMAGENET_DPN):
        check(values.expand(1, 3, 1, -1).contiguous(), normalization)


def test_around_every_step(device: torch.device) -> None:
    """The floats next to the middle between two pixels."""
    for normalization in (pixfuse.UNIT, pixfuse.SIGNED, pixfuse.MNIST):
        mean, std = normalization.mean[0], normalization.std[0]
        middle = ((torch.arange(-1, 257).double() + 0.5) / 255 - mean) / std
        near = middle.float()
        steps = [near]
        for towards in (math.inf, -math.inf):
            moved = near
            for _ in range(6):
                moved = torch.nextafter(moved, torch.tensor(towards))
                steps.append(moved)
        check(torch.cat(steps).view(1, 1, 1, -1).to(device), normalization)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities(device: torch.device, dtype: torch.dtype) -> None:
    line = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, 9.0, -9.0], dtype=dtype)
    for channels in (1, 3, 5):
        values = line.view(1, 1, 1, 7).expand(2, channels, 50, 7).contiguous().to(device)
        pixels, counts = pixfuse.denormalize(values, pixfuse.SIGNED, return_counts=True)
        assert pixels[0, 0, 0].tolist() == [0, 0, 255, 0, 128, 255, 0]
        each = 2 * channels * 50
        assert counts.tolist() == [2 * each, 4 * each]
        check(values, pixfuse.SIGNED)


def test_extreme_normalizations(device: torch.device) -> None:
    for mean, std in EXTREMES:
        normalization = of_any_units(mean, std)
        images = all_values(2).to(device)
        check(pixfuse.normalize(images, normalization), normalization)


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_numbers_whatever_the_thread_does_with_them(isa: str, flush: bool) -> None:
    values = torch.arange(-1023, 1024, dtype=torch.int32)
    bits = torch.where(values < 0, 0x8000 - values, values).to(torch.int16)
    halves = bits.view(torch.float16).view(1, 1, 1, -1)
    # So that they decide: one subnormal float16 is far more than half a pixel.
    normalization = pixfuse.Normalization(0.5, 2000.0)
    expected = pixfuse.denormalize(halves, normalization)
    if not torch.set_flush_denormal(flush):
        pytest.skip("this machine cannot flush subnormal numbers")
    try:
        assert torch.equal(pixfuse.denormalize(halves, normalization), expected)
        assert len(expected.unique()) == 64
    finally:
        torch.set_flush_denormal(False)


# --- shapes and layouts ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    for size in (
        (2, 3, 5, 7),
        (1, 1, 1, 1),
        (3, 4, 33, 65),
        (2, 3, 3, 1030),
        (2, 2, 40, 31),
        (2, 13, 6, 9),
        (2, 17, 6, 9),
        (3, 3, 40, 1),
    ):
        values = values_like(LAYOUTS[layout](*size), dtype)
        if device.type == "cuda":
            values = values.to(device)
        check(values, made_up(size[1], "torchvision"))
        check(values[0], made_up(size[1], "torchvision"))


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_lengths(device: torch.device, channels: int) -> None:
    for index, width in enumerate((*WIDTHS, *LONG_WIDTHS)):
        dtype = DTYPES[index % 3]
        values = values_like(random_bytes(1, channels, 1, width), dtype).to(device)
        check(values, made_up(channels, "torchvision"))
        check(values.to(memory_format=torch.channels_last), made_up(channels, "torchvision"))


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (3, 0, 5)])
def test_empty(device: torch.device, size: tuple[int, ...]) -> None:
    check(torch.empty(size, device=device), pixfuse.IMAGENET)


def test_threads(device: torch.device) -> None:
    for dtype in DTYPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            values = (torch.randn(5, 3, 131, 257) * 2).to(dtype).to(memory_format=memory_format)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                check(values.to(device), pixfuse.IMAGENET)


@hypothesis.settings(
    max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    size=st.tuples(
        st.integers(0, 3),
        st.sampled_from([1, 2, 3, 4, 5, 17]),
        st.integers(0, 9),
        st.integers(0, 80),
    ),
    order=st.permutations(range(4)),
    gaps=st.tuples(*[st.sampled_from([1, 1, 2, 3])] * 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_anything(
    isa: str,
    size: tuple[int, ...],
    order: list[int],
    gaps: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
) -> None:
    strides, step = [0] * 4, 1
    for dim in order:
        strides[dim] = step * gaps[dim]
        step = strides[dim] * max(size[dim], 1)
    reach = sum(max(n - 1, 0) * stride for n, stride in zip(size, strides, strict=True))
    generator = torch.Generator().manual_seed(seed)
    memory = (torch.randn(reach + 4, generator=generator) * 2).to(dtype)
    check(memory.as_strided(size, strides, seed % 4), made_up(size[1], "torchvision", seed))


# --- out ---


@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
def test_out(device: torch.device, layout: Literal["NCHW", "NHWC"]) -> None:
    for offset in range(17):
        values = torch.randn(2, 3, 7, 11, device=device)
        expected = pixfuse.denormalize(values, pixfuse.SIGNED, output_layout=layout)
        buffer = torch.full((expected.numel() + 64 + offset,), 77, dtype=torch.uint8, device=device)
        out = buffer[32 + offset : 32 + offset + expected.numel()].view(expected.shape)
        version = out._version
        same = pixfuse.denormalize(values, pixfuse.SIGNED, output_layout=layout, out=out)
        assert same is out
        assert out._version > version
        assert torch.equal(out, expected)
        assert bool((buffer[: 32 + offset] == 77).all())
        assert bool((buffer[-32:] == 77).all())
        _, counts = pixfuse.denormalize(
            values, pixfuse.SIGNED, output_layout=layout, out=out, return_counts=True
        )
        clamped = ((values < -1 - 1 / 255) | (values > 1 + 1 / 255)).sum().item()
        assert counts.tolist() == [clamped, 0]


def test_gradients_end_here() -> None:
    values = torch.randn(1, 3, 4, 5, requires_grad=True)
    assert not pixfuse.denormalize(values, pixfuse.SIGNED).requires_grad


# --- errors ---

VALUES = torch.randn(2, 3, 4, 5)
PIXELS = torch.empty(2, 3, 4, 5, dtype=torch.uint8)
BYTES_OF_VALUES = VALUES.view(torch.uint8).flatten()[:120].view(2, 3, 4, 5)

BAD_CALLS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "array": (
        lambda: {"tensor": VALUES.numpy()},
        TypeError,
        r"tensor to be a torch.Tensor, got ndarray",
    ),
    "float64": (
        lambda: {"tensor": VALUES.double()},
        TypeError,
        r"tensor of dtype torch.float32, float16 or bfloat16, got torch.float64",
    ),
    "uint8": (lambda: {"tensor": PIXELS}, TypeError, r"tensor of dtype .*, got torch.uint8"),
    "sparse": (
        lambda: {"tensor": VALUES.to_sparse()},
        NotImplementedError,
        r"tensor to be a dense tensor, got layout torch.sparse_coo",
    ),
    "meta": (
        lambda: {"tensor": VALUES.to("meta")},
        NotImplementedError,
        r"tensor on a device that has a kernel \(.*\), got meta",
    ),
    "two dimensions": (
        lambda: {"tensor": VALUES[0, 0]},
        ValueError,
        r"tensor of shape \(N, C, H, W\) or \(C, H, W\), got \(4, 5\)",
    ),
    "no normalization": (
        lambda: {"normalization": 0.5},
        TypeError,
        r"normalization to be a pixfuse.Normalization, got float",
    ),
    "channels": (
        lambda: {"normalization": pixfuse.Normalization((0.5, 0.5), 0.5)},
        ValueError,
        r"tensor of 2 channels, as mean and std have 2 values, got 3 channels",
    ),
    "layout": (
        lambda: {"output_layout": "HWC"},
        ValueError,
        r"output_layout to be 'NCHW' or 'NHWC', got 'HWC'",
    ),
    "out type": (
        lambda: {"out": PIXELS.numpy()},
        TypeError,
        r"out to be a torch.Tensor, got ndarray",
    ),
    "out dtype": (lambda: {"out": VALUES}, TypeError, r"out of dtype torch.uint8, got torch.float"),
    "out device": (
        lambda: {"out": PIXELS.to("meta")},
        ValueError,
        r"out on the device of tensor \(cpu\), got meta",
    ),
    "out shape": (
        lambda: {"out": PIXELS, "output_layout": "NHWC"},
        ValueError,
        r"out of shape \(2, 4, 5, 3\), as output_layout is 'NHWC', got \(2, 3, 4, 5\)",
    ),
    "out strides": (
        lambda: {"out": PIXELS.to(memory_format=torch.channels_last)},
        ValueError,
        r"out to be contiguous, got strides \(60, 1, 15, 3\)",
    ),
    "overlap": (
        lambda: {"out": BYTES_OF_VALUES},
        ValueError,
        r"out to share no memory with tensor, got an overlap",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors(case: str) -> None:
    change, error, message = BAD_CALLS[case]
    arguments: dict[str, Any] = {"tensor": VALUES, "normalization": pixfuse.SIGNED, **change()}
    with pytest.raises(error, match=f"^denormalize: expected {message}"):
        pixfuse.denormalize(**arguments)


OPERATOR = torch.ops.pixfuse


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OPERATOR.denormalize(PIXELS, [0.5], [0.5], 0, False),
            "tensor.dtype to be float32",
        ),
        (lambda: OPERATOR.denormalize(VALUES, [0.5], [0.5], 2, False), "output_layout 0"),
        (lambda: OPERATOR.denormalize(VALUES, [0.5] * 2, [0.5], 0, False), "mean and std with 1"),
        (lambda: OPERATOR.denormalize(VALUES, [0.5], [0.0], 0, False), r"255 \* std above 0"),
        (lambda: OPERATOR.denormalize(VALUES, [math.nan], [0.5], 0, False), r"255 \* mean finite"),
        (lambda: OPERATOR.denormalize(VALUES[0, 0], [0.5], [0.5], 0, False), "tensor to have 3 or"),
        (
            lambda: OPERATOR.denormalize_out(VALUES, [0.5], [0.5], 0, False, VALUES),
            "out of dtype uint8",
        ),
        (
            lambda: OPERATOR.denormalize_out(VALUES, [0.5], [0.5], 0, False, PIXELS[:1]),
            "out of size 2 in dimension 0, got 1",
        ),
        (
            lambda: OPERATOR.denormalize_out(
                VALUES, [0.5], [0.5], 0, False, PIXELS.to(memory_format=torch.channels_last)
            ),
            "out to be contiguous",
        ),
        (
            lambda: OPERATOR.denormalize_out(
                VALUES,
                [0.5],
                [0.5],
                0,
                False,
                VALUES.view(torch.uint8).flatten()[:120].view(2, 3, 4, 5),
            ),
            "out to share no memory",
        ),
    ],
)
def test_operators_check_too(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"denormalize: expected {message}"):
        call()


# --- torch.compile ---


def test_opcheck() -> None:
    for values, layout, count in itertools.product(
        (VALUES, VALUES[0].half(), VALUES[:0], VALUES.mT), (0, 1), (False, True)
    ):
        arguments = (values, [0.5], [0.5, 0.4, 0.3], layout, count)
        torch.library.opcheck(OPERATOR.denormalize.default, arguments)
        out = OPERATOR.denormalize(*arguments)[0]
        torch.library.opcheck(OPERATOR.denormalize_out.default, (*arguments, out))


@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
def test_compiled_is_eager(layout: Literal["NCHW", "NHWC"]) -> None:
    torch._dynamo.reset()

    def function(values: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels, counts = pixfuse.denormalize(
            values, pixfuse.IMAGENET, output_layout=layout, return_counts=True
        )
        pixfuse.denormalize(values * 2, pixfuse.SIGNED, output_layout=layout, out=out)
        return pixels + 1, counts

    run = torch.compile(function, backend=CompileCounterWithBackend("aot_eager"), fullgraph=True)
    out = torch.empty_like(PIXELS if layout == "NCHW" else PIXELS.movedim(1, -1).contiguous())
    expected_out = out.clone()
    expected = function(VALUES, expected_out)
    for ours, wanted in zip(run(VALUES, out), expected, strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(out, expected_out)


def test_fake_tensors_are_like_real_ones() -> None:
    for values, layout in itertools.product((VALUES, VALUES[0], VALUES.mT), OUTPUT_LAYOUTS):
        real = pixfuse.denormalize(values, pixfuse.UNIT, output_layout=layout, return_counts=True)
        with FakeTensorMode() as mode:
            fake = pixfuse.denormalize(
                mode.from_tensor(values), pixfuse.UNIT, output_layout=layout, return_counts=True
            )
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_large_outputs_are_recycled() -> None:
    values = torch.randn(4, 3, 512, 512)
    first = pixfuse.denormalize(values, pixfuse.SIGNED)
    expected = first.clone()
    before = pixfuse.info()["output_buffer"]["reused"]
    del first
    again = pixfuse.denormalize(values, pixfuse.SIGNED)
    assert torch.equal(again, expected)
    assert pixfuse.info()["output_buffer"]["reused"] > before


def test_what_the_docstring_says_it_equals() -> None:
    text = inspect.getdoc(pixfuse.denormalize)
    assert text is not None
    line = text.split("Equivalent to::\n")[1].split("\n\nwith ")[0].strip()
    for normalization in (*PRESETS.values(), made_up(3, "torchvision")):
        names: dict[str, Any] = {
            "torch": torch,
            "tensor": torch.cat([torch.randn(2, 3, 40, 50), torch.full((1, 3, 40, 50), math.nan)]),
        }
        for name, values in (("scale", normalization.std), ("offset", normalization.mean)):
            names[name] = torch.tensor([255 * value for value in values]).view(-1, 1, 1)
        assert torch.equal(pixfuse.denormalize(names["tensor"], normalization), eval(line, names))
