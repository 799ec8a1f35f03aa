"""`pixfuse.normalize` against its reference: every value, layout, length, alignment and device."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import pixfuse
from pixfuse.normalization import Rounding
from tests.bits import assert_same_bits
from tests.guards import assert_guards_untouched, guarded_output
from tests.images import (
    LAYOUTS,
    LONG_WIDTHS,
    WIDTHS,
    all_values,
    random_bytes,
    relaid,
    whole_storage,
)
from tests.isas import WITH_OWN_LOOPS
from tests.normalizations import (
    DTYPES,
    EXTREMES,
    PRESETS,
    ROUNDINGS,
    made_up,
    of_any_units,
    with_rounding,
)
from tests.watched import Watched

FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
DENSE_FORMATS = (torch.contiguous_format, torch.channels_last)


def check(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compares one call with the reference, and sees that the images are as they were."""
    before = whole_storage(images).clone()
    ours = pixfuse.normalize(images, *args, **kwargs)
    assert_same_bits(ours, pixfuse.reference.normalize(images.cpu(), *args, **kwargs))
    if ours.is_cpu and ours.numel() <= 32768:  # then that was the short way of small images
        with Watched() as watched:
            assert_same_bits(pixfuse.normalize(images, *args, **kwargs), ours)
        assert len(watched.operators) == 1
    assert torch.equal(whole_storage(images), before), "the images were written to"
    return ours


# --- values ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_value(device: torch.device, rounding: Rounding, dtype: torch.dtype) -> None:
    # Few pixels are computed step by step; for many a shorter way is tried, of few channels.
    for channels, sides in (
        *((channels, (16, 64)) for channels in range(1, 6)),
        *((channels, (16,)) for channels in (6, 7, 8, 13, 16, 17, 40)),
    ):
        for side in sides:
            images = all_values(channels, side, side).to(device)
            for layout in (images, images.contiguous(memory_format=torch.channels_last)):
                for memory_format in DENSE_FORMATS:
                    check(
                        layout,
                        made_up(channels, rounding),
                        dtype=dtype,
                        memory_format=memory_format,
                    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_of_the_presets(device: torch.device, preset: str) -> None:
    images = all_values(3).to(device)
    for rounding in ROUNDINGS:
        for dtype in DTYPES:
            check(images, with_rounding(PRESETS[preset], rounding), dtype=dtype)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_value_at_the_ends_of_the_range(device: torch.device, rounding: Rounding) -> None:
    for mean, std in EXTREMES:
        normalization = of_any_units(mean, std, rounding)
        for dtype in DTYPES:
            if normalization.largest > torch.finfo(dtype).max:
                continue  # an error: see test_errors.py
            for side in (16, 64):
                check(all_values(2, side, side).to(device), normalization, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_many_normalizations(device: torch.device, rounding: Rounding, dtype: torch.dtype) -> None:
    """Enough pixels for shorter ways to be tried; some are exact for none of the channels."""
    images = all_values(3, 48, 48).to(device)
    for seed in range(100):
        for memory_format in DENSE_FORMATS if seed < 20 else FORMATS[:1]:
            check(images, made_up(3, rounding, seed), dtype=dtype, memory_format=memory_format)


# In float32: the inverse of the first is infinite, though no quotient is; the others are where
# inverses are known to miss quotients, or lie between two floats.
DIVISORS = (1.6e-39, 1 - 2.0**-24, 0.25 - 2.0**-26, 1 + 2.0**-23, 1 / 3, 0.1, 9e35)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_divisions_by_the_inverse(device: torch.device, rounding: Rounding) -> None:
    """Enough pixels for the loops to try inverses: each gives the quotient, or is not used."""
    for channels in (3, 8, 17):
        images = all_values(channels, 48, 48).to(device)
        for std in DIVISORS if channels == 3 else DIVISORS[:2]:
            for mean in (0.5, 0.485, 128 / 255):
                normalization = of_any_units(
                    [mean] * channels, [std, 0.229, *[std] * (channels - 2)], rounding
                )
                for memory_format in DENSE_FORMATS:
                    check(images, normalization, memory_format=memory_format)


def test_one_number_stands_for_every_channel(device: torch.device) -> None:
    for channels in (1, 2, 3, 4, 5, 13):
        images = all_values(channels).to(device)
        one = pixfuse.Normalization(0.3, 0.7)
        each = pixfuse.Normalization([0.3] * channels, [0.7] * channels)
        assert_same_bits(pixfuse.normalize(images, one), pixfuse.normalize(images, each))


def test_the_default_is_the_unit_interval() -> None:
    images = all_values(3)
    expected = pixfuse.reference.normalize(images, pixfuse.Normalization(0, 1, "torchvision"))
    assert_same_bits(pixfuse.normalize(images), expected)
    assert expected.min() == 0.0
    assert expected.max() == 1.0


# --- large results, which are stored past the caches where they are whole lines of these ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1040, 1056, 1033])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop", "one_byte_more_per_pixel"])
@pytest.mark.parametrize("memory_format", DENSE_FORMATS)
def test_results_beyond_the_caches(
    memory_format: torch.memory_format, layout: str, width: int, dtype: torch.dtype
) -> None:
    # Of 3 * 731 rows the last one begins on a whole line where the first one does.
    images = LAYOUTS[layout](3 if dtype == torch.float32 else 6, 3, 731, width)
    options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results = check(images, made_up(3, "torchvision"), **options)
        assert results.nbytes > 24 << 20
    # Into memory that is not our own, on whole lines and not.
    for start in (0, 1):
        memory = torch.full((results.numel() + 32,), 7, dtype=dtype)
        out = memory.as_strided(results.shape, results.stride(), start)
        pixfuse.normalize(images, made_up(3, "torchvision"), out=out, **options)
        assert_same_bits(out, results)
        assert bool((memory[:start] == 7).all())
        assert bool((memory[start + results.numel() :] == 7).all())
    check(images[..., 1:], pixfuse.CLIP, **options)


# --- shapes and layouts ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    sizes = [
        (2, 3, 5, 7),
        (1, 1, 1, 1),
        (3, 4, 33, 65),
        (2, 3, 3, 1030),
        (2, 1, 9, 131),
        (2, 2, 40, 31),
        (2, 13, 6, 9),
        (2, 17, 6, 9),
        (3, 3, 1, 40),
        (3, 3, 40, 1),
    ]
    for size in sizes:
        images = LAYOUTS[layout](*size).to(device)
        if device.type == "cuda":  # .to() makes a dense copy: lay it out again over there
            images = relaid(LAYOUTS[layout](*size), device)
        normalization = made_up(size[1], "nearest" if dtype == torch.float32 else "torchvision")
        for memory_format in FORMATS:
            nchw = check(images, normalization, dtype=dtype, memory_format=memory_format)
            nhwc = check(
                images.permute(0, 2, 3, 1),
                normalization,
                input_layout="NHWC",
                dtype=dtype,
                memory_format=memory_format,
            )
            assert_same_bits(nhwc, nchw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last_images", [False, True])
def test_lengths(device: torch.device, channels_last_images: bool, dtype: torch.dtype) -> None:
    for channels in (1, 2, 3, 4, 5):
        normalization = made_up(channels, "torchvision")
        for height in (1, 3):
            for width in (*WIDTHS, *LONG_WIDTHS) if height == 1 else WIDTHS:
                shape = (1, channels, height, width)
                images = random_bytes(*shape).to(device)
                if channels_last_images:
                    images = images.contiguous(memory_format=torch.channels_last)
                for memory_format in DENSE_FORMATS:
                    out, buffer = guarded_output(shape, dtype, memory_format, device)
                    check(images, normalization, dtype=dtype, memory_format=memory_format)
                    pixfuse.normalize(
                        images, normalization, dtype=dtype, memory_format=memory_format, out=out
                    )
                    expected = pixfuse.reference.normalize(images.cpu(), normalization, dtype=dtype)
                    assert torch.equal(out.cpu(), expected)
                    assert_guards_untouched(buffer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last_images", [False, True])
def test_unaligned_starts(
    device: torch.device, channels_last_images: bool, dtype: torch.dtype
) -> None:
    for channels, height, width in ((1, 3, 67), (3, 3, 67), (4, 2, 35), (3, 40, 33)):
        shape = (1, channels, height, width)
        elements = torch.Size(shape).numel()
        normalization = made_up(channels, "timm")
        flat = random_bytes(elements + 16).to(device)
        for offset in range(16):
            dense = flat[offset : offset + elements]
            if channels_last_images:
                images = dense.view(1, height, width, channels).permute(0, 3, 1, 2)
            else:
                images = dense.view(shape)
            for memory_format in DENSE_FORMATS:
                out, buffer = guarded_output(shape, dtype, memory_format, device, offset)
                result = pixfuse.normalize(
                    images, normalization, dtype=dtype, memory_format=memory_format, out=out
                )
                assert result is out
                expected = pixfuse.reference.normalize(images.cpu(), normalization, dtype=dtype)
                assert torch.equal(out.cpu(), expected)
                assert_guards_untouched(buffer, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_between_two_elements(device: torch.device, dtype: torch.dtype) -> None:
    """torch.frombuffer allows addresses that are no multiple of the element."""
    if device.type == "cuda":
        pytest.skip("there is no such tensor on a GPU")
    for shape in ((1, 3, 3, 67), (2, 3, 64, 64)):
        images = random_bytes(*shape)
        for memory_format in DENSE_FORMATS:
            expected = pixfuse.reference.normalize(
                images, pixfuse.CLIP, dtype=dtype, memory_format=memory_format
            )
            memory = bytearray(expected.nbytes + 1)
            flat = torch.frombuffer(memory, dtype=dtype, offset=1)
            out = flat.as_strided(expected.shape, expected.stride())
            pixfuse.normalize(
                images, pixfuse.CLIP, dtype=dtype, memory_format=memory_format, out=out
            )
            assert_same_bits(out, expected)


@pytest.mark.parametrize("input_layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "size", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 0, 0), (2, 0, 4, 5), (0, 0, 0, 0)]
)
def test_nothing_to_do(
    device: torch.device, size: tuple[int, int, int, int], input_layout: Literal["NCHW", "NHWC"]
) -> None:
    for shape in (size, size[1:]):
        images = torch.empty(shape, dtype=torch.uint8, device=device)
        if input_layout == "NHWC":
            images = images.movedim(-3, -1)
        for memory_format in FORMATS:
            ours = check(
                images, pixfuse.SIGNED, input_layout=input_layout, memory_format=memory_format
            )
            assert ours.shape == shape
            out = torch.empty_like(ours)
            assert (
                pixfuse.normalize(
                    images,
                    pixfuse.SIGNED,
                    input_layout=input_layout,
                    memory_format=memory_format,
                    out=out,
                )
                is out
            )


@pytest.mark.parametrize("input_layout", ["NCHW", "NHWC"])
def test_one_image(device: torch.device, input_layout: str) -> None:
    for layout in LAYOUTS.values():
        batch = layout(1, 3, 6, 11)
        batch = relaid(batch, device)
        if input_layout == "NHWC":
            batch = batch.permute(0, 2, 3, 1)
        for memory_format in FORMATS:
            kwargs: dict[str, Any] = {"input_layout": input_layout, "memory_format": memory_format}
            single = check(batch[0], pixfuse.IMAGENET, **kwargs)
            assert single.shape == (3, 6, 11)
            whole = pixfuse.normalize(batch, pixfuse.IMAGENET, **kwargs)
            assert_same_bits(single, whole[0])
            out = torch.empty_like(single)
            pixfuse.normalize(batch[0], pixfuse.IMAGENET, out=out, **kwargs)
            assert_same_bits(out, single)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop", "transposed"])
def test_memory_format(
    device: torch.device, layout: str, memory_format: torch.memory_format
) -> None:
    images = relaid(LAYOUTS[layout](2, 3, 6, 5), device)
    ours = pixfuse.normalize(images, pixfuse.CLIP, memory_format=memory_format)
    if memory_format is torch.preserve_format:
        last = layout == "channels_last"
    else:
        last = memory_format is torch.channels_last
    assert ours.is_contiguous(memory_format=torch.channels_last) is last
    assert ours.is_contiguous() is not last


# --- numpy ---


@pytest.fixture
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("writable", [True, False])
def test_arrays(writable: bool) -> None:
    images = random_bytes(2, 5, 7, 3)
    expected = pixfuse.reference.normalize(images, pixfuse.CLIP, input_layout="NHWC")
    array = images.numpy().copy()
    array.flags.writeable = writable
    assert_same_bits(pixfuse.normalize(array, pixfuse.CLIP, input_layout="NHWC"), expected)
    # views of it: channels first, an inner crop, every second row
    for view in (array.transpose(0, 3, 1, 2), array.transpose(0, 3, 1, 2)[:, :, 1:4, 2:6]):
        assert_same_bits(
            pixfuse.normalize(view, pixfuse.CLIP),
            pixfuse.reference.normalize(torch.tensor(view), pixfuse.CLIP),
        )
    stepped = array[:, ::2]
    assert_same_bits(
        pixfuse.normalize(stepped, pixfuse.CLIP, input_layout="NHWC"),
        pixfuse.reference.normalize(torch.tensor(stepped), pixfuse.CLIP, input_layout="NHWC"),
    )
    assert array.flags.writeable is writable


@pytest.mark.usefixtures("_no_warnings")
def test_an_array_over_bytes() -> None:
    content = bytes(range(192))
    array = np.frombuffer(content, dtype=np.uint8).reshape(8, 8, 3)
    ours = pixfuse.normalize(array, pixfuse.IMAGENET, input_layout="NHWC")
    assert_same_bits(
        ours,
        pixfuse.reference.normalize(torch.tensor(array), pixfuse.IMAGENET, input_layout="NHWC"),
    )
    assert content == bytes(range(192))


def test_an_array_into_out() -> None:
    images = random_bytes(2, 3, 5, 7)
    out = torch.empty(2, 3, 5, 7)
    assert pixfuse.normalize(images.numpy(), pixfuse.CLIP, out=out) is out
    assert_same_bits(out, pixfuse.reference.normalize(images, pixfuse.CLIP))


# --- no hidden copy ---

COPY_OR_NOT = """
import pathlib, re, torch, pixfuse

def peak_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

images = torch.empty(65, 3, 515, 517, dtype=torch.uint8).fill_(3)[1:, :, 2:514, 3:515]
pixfuse.normalize(images[:1], pixfuse.IMAGENET, dtype=torch.bfloat16)  # code and tables
out = torch.empty(images.shape, dtype=torch.bfloat16).fill_(0)

def growth(prepare):
    before = peak_bytes()
    pixfuse.normalize(prepare(images), pixfuse.IMAGENET, dtype=torch.bfloat16, out=out)
    return (peak_bytes() - before) / images.nbytes

print("plain", growth(lambda images: images))
print("copy", growth(torch.Tensor.contiguous))
"""


def test_no_hidden_copy() -> None:
    """Of 50 MB of images with gaps between rows: the most memory ever used does not grow."""
    result = subprocess.run(
        [sys.executable, "-c", COPY_OR_NOT], capture_output=True, text=True, check=True
    )
    growth = {what: float(value) for what, value in map(str.split, result.stdout.splitlines())}
    assert growth["plain"] < 0.1
    assert growth["copy"] > 0.9, "this way of measuring would not see a copy"


# --- the same bits, whatever the circumstances ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["torchvision", "nearest"])
def test_threads(device: torch.device, rounding: Rounding, dtype: torch.dtype) -> None:
    """Large enough for several threads and for the table."""
    for layout in ("nchw", "channels_last", "crop", "padded_rows_of_pixels"):
        images = relaid(LAYOUTS[layout](5, 3, 131, 257), device)
        for memory_format in DENSE_FORMATS:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                check(images, made_up(3, rounding), dtype=dtype, memory_format=memory_format)


def test_one_long_row_is_shared_among_threads(device: torch.device) -> None:
    torch.set_num_threads(3)
    for shape in ((1, 1, 1, 500_001), (1, 3, 1, 200_003), (3, 200_001, 1, 1), (100_003, 3, 1, 1)):
        check(random_bytes(*shape).to(device), pixfuse.SIGNED)
    check(random_bytes(1, 1, 200_003, 3).permute(0, 3, 1, 2).to(device), pixfuse.IMAGENET)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_split(device: torch.device, dtype: torch.dtype) -> None:
    images = random_bytes(7, 3, 37, 41).to(device)
    whole = pixfuse.normalize(images, pixfuse.IMAGENET, dtype=dtype)
    for size in (1, 2, 3):
        parts = [
            pixfuse.normalize(part, pixfuse.IMAGENET, dtype=dtype) for part in images.split(size)
        ]
        assert_same_bits(torch.cat(parts), whole)
    rows = [
        pixfuse.normalize(part, pixfuse.IMAGENET, dtype=dtype) for part in images.split(5, dim=2)
    ]
    assert_same_bits(torch.cat(rows, dim=2), whole)


def test_every_device_gives_the_same_bits() -> None:
    """Directly, beside the comparison of each with the reference."""
    images = all_values(3, 64, 64)
    for rounding in ROUNDINGS:
        for dtype in DTYPES:
            normalization = made_up(3, rounding)
            results = []
            for isa in WITH_OWN_LOOPS:
                with pixfuse._library.use_isa(isa):
                    results.append(pixfuse.normalize(images, normalization, dtype=dtype))
            if torch.cuda.is_available():
                results.append(pixfuse.normalize(images.cuda(), normalization, dtype=dtype).cpu())
            for result in results[1:]:
                assert_same_bits(result, results[0])


# --- anything else ---


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, str]:
    """Any uint8 view of 3 or 4 dimensions, and the layout it is to be read in."""
    rank = draw(st.sampled_from([3, 4]))
    layout = draw(st.sampled_from(["NCHW", "NHWC"]))
    channels = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17]))
    height = draw(st.integers(0, 12))
    width = draw(st.one_of(st.integers(0, 80), st.sampled_from([255, 1024, 1030])))
    size = [channels, height, width] if layout == "NCHW" else [height, width, channels]
    if rank == 4:
        size.insert(0, draw(st.integers(0, 3)))
    order = draw(st.permutations(range(rank)))
    strides = [0] * rank
    step = 1
    for dim in order:  # from the innermost dimension outwards, with gaps
        strides[dim] = step * draw(st.sampled_from([1, 1, 1, 2, 3]))
        step = strides[dim] * max(size[dim], 1) + draw(st.sampled_from([0, 0, 1, 5]))
    for dim in range(rank):
        if draw(st.sampled_from([False] * 7 + [True])):
            strides[dim] = draw(st.integers(0, strides[dim]))  # broadcast, or overlapping
    offset = draw(st.integers(0, 17))
    reach = sum(max(n - 1, 0) * stride for n, stride in zip(size, strides, strict=True))
    storage = torch.randint(256, (offset + reach + 1,), dtype=torch.uint8)
    return storage.as_strided(size, strides, offset), layout


numbers = st.floats(-4, 4)
positive_numbers = st.floats(1e-3, 10)


@hypothesis.settings(
    max_examples=400,
    # `device` stays the same for all examples of a test, which is what is wanted.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    view=views(),
    rounding=st.sampled_from(ROUNDINGS),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(FORMATS),
    with_out=st.booleans(),
    data=st.data(),
)
def test_anything(
    device: torch.device,
    view: tuple[torch.Tensor, str],
    rounding: Rounding,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    with_out: bool,
    data: st.DataObject,
) -> None:
    images, layout = relaid(view[0], device), view[1]
    channels = images.shape[-3 if layout == "NCHW" else -1]
    count = data.draw(st.sampled_from([1, channels]))
    mean = data.draw(st.lists(numbers, min_size=count, max_size=count))
    std = data.draw(st.lists(positive_numbers, min_size=count, max_size=count))
    normalization = of_any_units(mean, std, rounding)
    kwargs: dict[str, Any] = {
        "input_layout": layout,
        "dtype": dtype,
        "memory_format": memory_format,
    }
    ours = check(images, normalization, **kwargs)
    if with_out:
        out = torch.empty_strided(ours.shape, ours.stride(), dtype=dtype, device=device)
        pixfuse.normalize(images, normalization, out=out, **kwargs)
        assert_same_bits(out, ours)


# --- large ---


def test_strides_beyond_32_bits() -> None:
    """Only the pages that the views touch ever exist."""
    gap = 2**31 + 11
    try:
        storage = torch.empty(3 * gap + 64, dtype=torch.uint8)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    for strides in ((gap, 16, 4, 1), (1, gap, 4, 16), (16, 1, gap, 4), (16, 4, 1, gap)):
        images = storage.as_strided((3, 3, 3, 3), strides)
        images.copy_(random_bytes(3, 3, 3, 3))
        ours = pixfuse.normalize(images, pixfuse.IMAGENET)
        assert_same_bits(ours, pixfuse.reference.normalize(images, pixfuse.IMAGENET))


@pytest.mark.skipif(
    os.environ.get("PIXFUSE_TEST_LARGE") != "1", reason="needs 10 GB: set PIXFUSE_TEST_LARGE=1"
)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("memory_format", DENSE_FORMATS)
def test_more_elements_than_32_bits(
    device: torch.device, layout: str, memory_format: torch.memory_format
) -> None:
    height, width = 27_000, 27_001
    elements = 3 * height * width
    assert elements > 2**31
    pattern = torch.arange(251, dtype=torch.uint8).repeat(elements // 251 + 1)[:elements]
    shape = (1, 3, height, width) if layout == "NCHW" else (1, height, width, 3)
    images = pattern.view(shape).to(device)
    kwargs: dict[str, Any] = {
        "input_layout": layout,
        "dtype": torch.bfloat16,
        "memory_format": memory_format,
    }
    ours = pixfuse.normalize(images, pixfuse.IMAGENET, **kwargs)
    row_dim = 2 if layout == "NCHW" else 1
    for first in range(0, height, 3000):  # in parts: the reference needs many times the memory
        part = images.narrow(row_dim, first, 3000)
        expected = pixfuse.reference.normalize(part.cpu(), pixfuse.IMAGENET, **kwargs)
        assert torch.equal(ours.narrow(2, first, 3000).cpu(), expected)
