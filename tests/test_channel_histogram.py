"""`channel_histogram` and `image_moments`: exact counts of every layout, list and device."""

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import hypothesis
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import pixfuse
from pixfuse import _library
from tests.conftest import in_place, places
from tests.images import LAYOUTS, LONG_WIDTHS, WIDTHS, all_values, random_bytes
from tests.isas import FOR_COUNTS

FUNCTIONS = ("channel_histogram", "image_moments")


@pytest.fixture(params=FOR_COUNTS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with _library.use_isa(request.param):
        yield request.param


@pytest.fixture(params=places(FOR_COUNTS))
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with in_place(request.param) as device:
        yield device


def results(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def check(images: Any, **options: Any) -> None:
    """Compares both functions with their references."""
    for name in FUNCTIONS:
        ours = results(getattr(pixfuse, name)(images, **options))
        host = images.cpu() if isinstance(images, torch.Tensor) else images
        expected = results(getattr(pixfuse.reference, name)(host, **options))
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == b.dtype == torch.int64
            assert a.shape == b.shape
            assert a.is_contiguous()
            assert torch.equal(a.cpu(), b), name


# --- the references ---


def test_reference_equals_numpy() -> None:
    for channels, side in ((1, 16), (3, 31), (5, 8)):
        images = random_bytes(3, channels, side, side)
        counts = pixfuse.reference.channel_histogram(images)
        sums, squares = pixfuse.reference.image_moments(images)
        array = images.numpy()
        for c in range(channels):
            expected = np.bincount(array[:, c].ravel(), minlength=256)
            assert np.array_equal(counts[c].numpy(), expected)
            for n in range(3):
                values = array[n, c].astype(np.int64)
                assert sums[n, c].item() == values.sum()
                assert squares[n, c].item() == (values**2).sum()


def test_moments_follow_from_counts() -> None:
    """The two functions share no loop, and have to agree."""
    images = random_bytes(4, 3, 33, 65)
    values = torch.arange(256)
    sums, squares = pixfuse.image_moments(images)
    for n in range(4):
        counts = pixfuse.channel_histogram(images[n])
        assert torch.equal((counts * values).sum(1), sums[n])
        assert torch.equal((counts * values * values).sum(1), squares[n])


# --- values, shapes, layouts ---


def test_every_value(device: torch.device) -> None:
    for channels in (1, 2, 3, 4, 5, 13, 17):
        images = all_values(channels).to(device)
        counts = pixfuse.channel_histogram(images)
        assert torch.equal(counts.cpu(), torch.ones(channels, 256, dtype=torch.int64))
        for value in (0, 1, 128, 255):
            check(torch.full((2, channels, 40, 70), value, dtype=torch.uint8, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, layout: str) -> None:
    for size in (
        (2, 3, 5, 7),
        (1, 1, 1, 1),
        (3, 4, 33, 65),
        (2, 3, 3, 1030),
        (2, 1, 9, 131),
        (2, 2, 40, 31),
        (2, 13, 6, 9),
        (2, 16, 6, 40),
        (3, 3, 40, 1),
        (2, 3, 130, 70),
    ):
        images = LAYOUTS[layout](*size)
        if device.type == "cuda":
            storage = images.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage).to(device)
            images = whole.as_strided(images.shape, images.stride(), images.storage_offset())
        check(images)
        check(images[0])
        check(images.permute(0, 2, 3, 1), input_layout="NHWC")


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_lengths(device: torch.device, channels: int) -> None:
    for width in (*WIDTHS, *LONG_WIDTHS, 8191, 8192, 8193, 30_001):
        check(random_bytes(1, channels, 1, width).to(device))
        check(random_bytes(1, 1, width, channels).to(device), input_layout="NHWC")


def test_alignment(device: torch.device) -> None:
    memory = random_bytes(70 + 3 * 35 * 4).to(device)
    for offset in range(65):
        part = memory[offset : offset + 3 * 35 * 4]
        check(part.view(1, 3, 4, 35))
        check(part.view(1, 4, 35, 3), input_layout="NHWC")


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 4, 5)])
def test_empty(device: torch.device, size: tuple[int, ...]) -> None:
    check(torch.empty(size, dtype=torch.uint8, device=device)) if size[1] else None
    counts = pixfuse.channel_histogram(torch.empty(size, dtype=torch.uint8, device=device))
    assert counts.shape == (size[1], 256)
    assert counts.sum().item() == 0


def test_threads(device: torch.device) -> None:
    for layout in ("nchw", "channels_last", "crop", "transposed"):
        images = LAYOUTS[layout](5, 3, 131, 257).to(device)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(images)


def test_one_large_image_is_shared_among_threads(device: torch.device) -> None:
    torch.set_num_threads(3)
    check(random_bytes(1, 3, 700, 900).to(device))
    check(torch.full((1, 3, 700, 900), 255, dtype=torch.uint8, device=device))


def in_memory_as(memory: str, count: int, height: int, width: int) -> torch.Tensor:
    """Random pixels (N, C, H, W), in one of the ways in which bytes are counted in pairs."""
    if memory == "planes":
        return random_bytes(count, 3, height, width)
    channels = {"RGB": 3, "RGBX": 4, "RGBA": 4}[memory]
    pixels = random_bytes(count, height, width, channels).permute(0, 3, 1, 2)
    return pixels[:, :3] if memory == "RGBX" else pixels


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_pixel_or_row_repeated(device: torch.device, channels: int) -> None:
    """As ``expand`` does: the stride of a width of 1 says nothing."""
    pixel = random_bytes(1, 1, 1, channels).to(device)
    check(pixel.expand(100, 100, 1, channels), input_layout="NHWC")
    check(pixel.expand(1, 5000, 1, channels), input_layout="NHWC")
    row = random_bytes(1, 1, 64, channels).to(device)
    check(row.expand(3, 50, 64, channels), input_layout="NHWC")


@pytest.mark.parametrize("memory", ["planes", "RGB", "RGBX", "RGBA"])
def test_pairs_of_bytes(isa: str, memory: str) -> None:
    """From 32768 pixels on; odd widths leave pixels over, and rows of a crop are on their own."""
    torch.set_num_threads(1)
    for width in (64, 65, 66, 67, 8192, 8195):
        images = in_memory_as(memory, 2, 40000 // width + 1, width)
        check(images)
        check(images[..., : width - 1])


@pytest.mark.parametrize("memory", ["planes", "RGB", "RGBX", "RGBA"])
def test_one_pair_more_often_than_16_bits_count(isa: str, memory: str) -> None:
    torch.set_num_threads(1)
    images = in_memory_as(memory, 1, 601, 701)
    images[:] = torch.tensor([255, 0, 7, 255])[: images.shape[1]].view(1, -1, 1, 1)
    check(images)
    images[..., 1::2] = 3
    check(images)


@pytest.mark.parametrize("memory", ["planes", "RGB", "RGBX", "RGBA"])
def test_one_pair_as_often_as_16_bits_count(isa: str, memory: str) -> None:
    """And a little more or less: an image of 256 x 256 pixels fills a counter of RGBX."""
    torch.set_num_threads(1)
    for height, width in ((256, 256), (255, 257), (1, 65534), (3, 43691), (16, 8192), (300, 257)):
        check(torch.full_like(in_memory_as(memory, 1, height, width), 255))
        mixed = in_memory_as(memory, 1, height, width)
        mixed[..., : width - 9] = 7
        check(mixed)


@pytest.mark.parametrize("memory", ["planes", "RGB", "RGBX", "RGBA"])
def test_pieces_of_one_color(isa: str, memory: str) -> None:
    """Counted at once, but only where nothing in them differs."""
    torch.set_num_threads(1)
    for length in (1, 2, 100, 257, 1000, 70_000):
        images = in_memory_as(memory, 1, 300, 401)
        storage = images.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(9)  # also what is not counted
        color = torch.arange(300 * 401).view(300, 401) // length * 37
        images[:] = (color + torch.arange(images.shape[1]).view(-1, 1, 1) * 11).to(torch.uint8)
        check(images)
        other = random_bytes(*images.shape) < 1  # one in 256
        images[other] = 77
        check(images)


def test_tables_of_pairs_are_left_clear(isa: str) -> None:
    """They are used again: by any layout, and by several threads."""
    torch.set_num_threads(3)
    for memory in ("planes", "RGBA", "RGB", "planes", "RGBX", "RGB"):
        check(in_memory_as(memory, 3, 300, 400))


# --- pieces of images, as `csrc/channel_histogram/bit_planes_loop.cpp` goes over them ---


@pytest.mark.parametrize("memory", ["planes", "RGB", "RGBX", "RGBA"])
def test_pieces(isa: str, memory: str) -> None:
    """Of 16 rows and 32 columns: whole, cut off, and of images too small, in one long row."""
    torch.set_num_threads(1)
    for height, width in itertools.product((15, 16, 17, 31, 49), (63, 64, 65, 95, 97, 129)):
        check(in_memory_as(memory, 3, height, width))
        check(in_memory_as(memory, 3, height + 1, width + 3)[..., :height, 1 : width + 1])
    narrow = [(100, 31), (200, 16), (1000, 3)]
    for height, width in ((1, 4000), (3, 1200), (7, 500), (32, 32), *narrow):
        check(in_memory_as(memory, 3, height, width))
        check(in_memory_as(memory, 4, height, width)[1:].transpose(2, 3))
        check(in_memory_as(memory, 3, height + 1, width)[:, :, 1:])


@pytest.mark.parametrize("memory", ["planes", "RGB", "RGBX", "RGBA"])
def test_every_range_of_values(isa: str, memory: str) -> None:
    """A piece is searched for the upper halves of bytes from its least byte to its greatest."""
    torch.set_num_threads(1)
    images = in_memory_as(memory, 1, 32, 96)
    ends = (0, 1, 15, 16, 17, 31, 128, 239, 240, 255)
    for least, greatest in itertools.combinations_with_replacement(ends, 2):
        for channel in range(images.shape[1]):  # one at a time
            images[:] = random_bytes(*images.shape)
            images[:, channel] = images[:, channel].int() % (greatest - least + 1) + least
            check(images)
        images[:] = least
        images[..., 3, 40] = greatest
        check(images)


@pytest.mark.parametrize("memory", ["planes", "RGB", "RGBX", "RGBA"])
def test_more_pieces_than_words_count(isa: str, memory: str) -> None:
    """511 of them, if every pixel has the same bits."""
    torch.set_num_threads(1)
    for pieces in (510, 511, 512, 513, 1030):
        images = in_memory_as(memory, 1, 16, 32 * pieces)
        for value in (0, 15, 255):
            images[:] = value
            check(images)
    check(in_memory_as(memory, 1, 16 * 9, 32 * 117))


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, str]:
    rank = draw(st.sampled_from([3, 4]))
    layout = draw(st.sampled_from(["NCHW", "NHWC"]))
    size = [draw(st.sampled_from([1, 2, 3, 4, 5, 8, 17])), draw(st.integers(1, 12))]
    size.append(draw(st.one_of(st.integers(1, 80), st.sampled_from([255, 1030]))))
    size = size if layout == "NCHW" else [*size[1:], size[0]]
    size = size if rank == 3 else [draw(st.integers(0, 3)), *size]
    strides, step = [0] * rank, 1
    for dim in draw(st.permutations(range(rank))):
        strides[dim] = step * draw(st.sampled_from([1, 1, 1, 2, 3]))
        step = strides[dim] * max(size[dim], 1) + draw(st.sampled_from([0, 0, 1, 5]))
    for dim in range(rank):
        if draw(st.sampled_from([False] * 7 + [True])):
            strides[dim] = 0
    offset = draw(st.integers(0, 17))
    reach = sum(max(n - 1, 0) * stride for n, stride in zip(size, strides, strict=True))
    return random_bytes(offset + reach + 1).as_strided(size, strides, offset), layout


@hypothesis.settings(
    max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(view=views())
def test_anything(isa: str, view: tuple[torch.Tensor, str]) -> None:
    check(view[0], input_layout=view[1])


@pytest.mark.skipif(
    os.environ.get("PIXFUSE_TEST_LARGE") != "1", reason="needs 5 GB: set PIXFUSE_TEST_LARGE=1"
)
@pytest.mark.timeout(1200)
def test_more_of_one_value_than_32_bits_count(isa: str) -> None:
    """Also more than the narrow counters of one thread hold."""
    torch.set_num_threads(1)
    images = torch.full((1, 1, 2**16 + 1, 2**16), 255, dtype=torch.uint8)
    counts = pixfuse.channel_histogram(images)
    assert counts[0, 255].item() == images.numel()
    assert counts.sum().item() == images.numel()
    sums, squares = pixfuse.image_moments(images)
    assert sums.item() == 255 * images.numel()
    assert squares.item() == 255 * 255 * images.numel()


# --- arrays and lists ---


@pytest.mark.parametrize("writable", [True, False])
def test_arrays(writable: bool) -> None:
    array = random_bytes(2, 5, 7, 3).numpy().copy()
    array.flags.writeable = writable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(array, input_layout="NHWC")
        check(array[:, ::2, 1:5], input_layout="NHWC")
        check(array.transpose(0, 3, 1, 2))
        check(list(array))


def test_lists_of_ragged_images() -> None:
    arrays = [random_bytes(h, w, 3).numpy() for h, w in ((5, 7), (1, 1), (40, 33))]
    tensors = [torch.from_numpy(a).permute(2, 0, 1) for a in arrays]
    pillow = [PIL.Image.fromarray(a) for a in arrays]
    flipped = [a[::-1, ::-1] for a in arrays]
    swapped = [np.ascontiguousarray(a[..., ::-1])[..., ::-1] for a in arrays]
    expected = pixfuse.reference.channel_histogram(arrays)
    sums, squares = pixfuse.reference.image_moments(arrays)
    mixed = [pillow[0], tensors[1], swapped[2]]
    for images in (arrays, tuple(tensors), pillow, flipped, swapped, mixed):
        assert torch.equal(pixfuse.channel_histogram(images), expected)
        ours = pixfuse.image_moments(images)
        assert torch.equal(ours[0], sums)
        assert torch.equal(ours[1], squares)
    whole = pixfuse.channel_histogram(arrays[0], input_layout="NHWC")
    for image in arrays[1:]:
        whole += pixfuse.channel_histogram(image, input_layout="NHWC")
    assert torch.equal(whole, expected)


def test_gray_arrays_in_a_list() -> None:
    gray = random_bytes(6, 9).numpy()
    check([gray, gray[::2], gray[:, :, np.newaxis]])


@pytest.mark.parametrize(
    ("mode", "like"),
    [
        ("L", "L"),
        ("1", "L"),
        ("RGB", "RGB"),
        ("RGBX", "RGB"),
        ("RGBA", "RGBA"),
        ("P", "RGB"),
        ("LA", "RGBA"),
        ("La", "RGBA"),
        ("RGBa", "RGBA"),
        ("PA", "RGBA"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
        ("HSV", "RGB"),
        ("LAB", "RGB"),
    ],
)
def test_pillow_modes(mode: str, like: str) -> None:
    color = PIL.Image.fromarray(random_bytes(9, 11, 3).numpy())
    if mode in ("LAB", "PA", "RGBX"):
        image = PIL.Image.new(mode, (11, 9), 5 if mode == "PA" else (5, 200, 30, 9)[: len(mode)])
    elif mode == "P":
        image = color.convert("P")
    else:
        image = color.convert("RGBA").convert({"La": "LA"}.get(mode, mode)).convert(mode)
    converted = (image.convert("LA") if mode == "La" else image).convert(like)
    pixels = np.asarray(converted)
    expected = pixfuse.reference.channel_histogram([pixels])
    assert torch.equal(pixfuse.channel_histogram([image]), expected)
    same = pixfuse.crop_mirror_normalize([image], dtype=torch.uint8)  # what other operators read
    assert torch.equal(pixfuse.channel_histogram(same), expected)


def test_a_palette_with_transparency_is_rgba() -> None:
    image = PIL.Image.fromarray(random_bytes(9, 11, 3).numpy()).convert("P")
    image.info["transparency"] = 3
    expected = pixfuse.reference.channel_histogram([np.asarray(image.convert("RGBA"))])
    assert torch.equal(pixfuse.channel_histogram([image]), expected)


# --- errors ---

IMAGES = random_bytes(2, 3, 4, 5)


def truncated() -> PIL.Image.Image:
    import io

    data = io.BytesIO()
    PIL.Image.fromarray(random_bytes(64, 64, 3).numpy()).save(data, "PNG")
    return PIL.Image.open(io.BytesIO(data.getvalue()[:2000]))


BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "float": (IMAGES.float, TypeError, r"images of dtype uint8, got torch.float32"),
    "float array": (lambda: IMAGES.numpy() / 2, TypeError, r"images of dtype uint8, got float64"),
    "text": (lambda: "x", TypeError, r"images to be a torch.Tensor or a numpy.ndarray, got str"),
    "two dimensions": (lambda: IMAGES[0, 0], ValueError, r"images to have 4 dimensions .* or 3"),
    "negative strides": (
        lambda: IMAGES.numpy()[::-1],
        ValueError,
        r"images to have no negative strides, .*copy",
    ),
    "sparse": (IMAGES.to_sparse, NotImplementedError, r"images to be a dense tensor"),
    "meta": (
        lambda: IMAGES.to("meta"),
        NotImplementedError,
        r"images on a device that has a kernel \(.*\), got meta",
    ),
    "empty list": (list, ValueError, r"images to have at least 1 image, got none"),
    "list of text": (lambda: ["a"], TypeError, r"images\[0\] to be a Pillow image, .*got str"),
    "list of batches": (
        lambda: [IMAGES[0], IMAGES],
        ValueError,
        r"images\[1\] to be a tensor of shape \(C, H, W\), got shape \(2, 3, 4, 5\); a batch",
    ),
    "list of arrays": (
        lambda: [IMAGES.numpy()],
        ValueError,
        r"images\[0\] to have shape \(H, W\) or \(H, W, C\), got \(2, 3, 4, 5\)",
    ),
    "list of floats": (
        lambda: [IMAGES[0], IMAGES[0].float()],
        TypeError,
        r"images\[1\] of dtype uint8, got torch.float32",
    ),
    "list of float arrays": (
        lambda: [IMAGES[0].numpy() / 2],
        TypeError,
        r"images\[0\] of dtype uint8, got float64",
    ),
    "no pixels": (
        lambda: [IMAGES[0], IMAGES[0, :, :0]],
        ValueError,
        r"images\[1\] to have pixels, got 0 x 5 of 3 channels",
    ),
    "channel counts": (
        lambda: [IMAGES[0], IMAGES[0, :1]],
        ValueError,
        r"images of one channel count, got 3 in images\[0\] and 1 in images\[1\]",
    ),
    "gray among colors": (
        lambda: [IMAGES[0], PIL.Image.new("L", (3, 3))],
        ValueError,
        r"images of one channel count, got 3 .* 1 in images\[1\]; convert it, e.g. image.conv",
    ),
    "16 bits": (
        lambda: [PIL.Image.new("I;16", (3, 3))],
        TypeError,
        r"images\[0\] of a Pillow mode with 8 bits per channel, got mode 'I;16'.*convert",
    ),
    "truncated": (
        lambda: [IMAGES[0], truncated()],
        OSError,
        r"images\[1\] to be an image that Pillow can read, got OSError: ",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name: str, case: str) -> None:
    images, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=f"^{name}: expected {message}"):
        getattr(pixfuse, name)(images())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layout_errors(name: str) -> None:
    function = getattr(pixfuse, name)
    for images in (IMAGES, IMAGES[0]):
        for layout in ("HWC", 0, None):
            with pytest.raises(
                ValueError, match=f"^{name}: expected input_layout to be 'NCHW' or 'NHWC', got"
            ):
                function(images, input_layout=layout)
    with pytest.raises(ValueError, match=f"^{name}: expected no input_layout with a list"):
        function([IMAGES[0]], input_layout="NHWC")


def test_operators_check_too() -> None:
    for name in FUNCTIONS:
        operator = getattr(torch.ops.pixfuse, name)
        for arguments, message in (
            ((IMAGES.float(), 0), "images of dtype uint8"),
            ((IMAGES, 2), r"input_layout 0 \(NCHW\) or 1"),
            ((IMAGES[0, 0], 0), "images to have 3 or 4 dimensions, got 2"),
        ):
            with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected {message}"):
                operator(*arguments)


# --- torch.compile ---


@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.pixfuse, name).default
    for images in (IMAGES, IMAGES[0], IMAGES[:0], IMAGES.permute(0, 1, 3, 2)):
        torch.library.opcheck(operator, (images, 0))
        torch.library.opcheck(operator, (images.movedim(-3, -1), 1))


@pytest.mark.parametrize("input_layout", ["NCHW", "NHWC"])
def test_compiled_is_eager(input_layout: Literal["NCHW", "NHWC"]) -> None:
    torch._dynamo.reset()

    def function(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        counts = pixfuse.channel_histogram(images, input_layout)
        return counts + 1, *pixfuse.image_moments(images, input_layout)

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(function, backend=counter, fullgraph=True)
    for images in (IMAGES, IMAGES[0]):
        given = images if input_layout == "NCHW" else images.movedim(-3, -1)
        for ours, expected in zip(run(given), function(given), strict=True):
            assert torch.equal(ours, expected)


def test_lists_compile() -> None:
    torch._dynamo.reset()
    run = torch.compile(pixfuse.channel_histogram, backend="aot_eager", fullgraph=True)
    images = [random_bytes(3, 4, 5), random_bytes(3, 6, 7)]
    assert torch.equal(run(images), pixfuse.channel_histogram(images))


def test_fake_tensors_are_like_real_ones() -> None:
    for name, images in itertools.product(FUNCTIONS, (IMAGES, IMAGES[0])):
        function = getattr(pixfuse, name)
        with FakeTensorMode() as mode:
            fakes = results(function(mode.from_tensor(images)))
        for fake, real in zip(fakes, results(function(images)), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (
                real.shape,
                real.stride(),
                real.dtype,
            )
