"""`pixfuse.crop_mirror_normalize` against its reference: values, windows, images of every kind."""

import io
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image, ImageFile

import pixfuse
from pixfuse.normalization import ROUNDING_CODES, Rounding
from tests.bits import assert_same_bits
from tests.conftest import require_cuda
from tests.guards import assert_guards_untouched, guarded_output
from tests.images import LAYOUTS, LONG_WIDTHS, WIDTHS, all_values, random_bytes, relaid
from tests.isas import WITH_OWN_LOOPS
from tests.normalizations import ROUNDINGS, made_up, of_any_units
from tests.samples import PILLOW_IMAGES, SAMPLES, contents, pillow, samples

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.uint8)
FORMATS = (torch.contiguous_format, torch.channels_last)
MIRROR_AND_FLIP = tuple(itertools.product([False, True], repeat=2))


def moved(images: Any, device: torch.device) -> Any:
    """The images as they can be given on a device: on a GPU, as tensors."""
    if device.type == "cpu":
        return images
    if isinstance(images, torch.Tensor):
        return relaid(images, device)
    return [
        relaid(image, device)
        if isinstance(image, torch.Tensor)
        else pixfuse.reference._channels_first(image).to(device)
        for image in images
    ]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """What many threads do is told where it is tested; small images are quicker with one."""
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, with every instruction set in turn: see `in_turn`; and the GPU."""
    if request.param == "cuda":
        require_cuda()
    return torch.device(request.param)


def in_turn(device: torch.device) -> Iterator[str]:
    """Every way in which a device can do the work, in force during each turn of a loop.

    The reference, which takes most of the time, is then asked once for all of them.
    """
    if device.type == "cuda":
        yield "cuda"
        return
    for isa in WITH_OWN_LOOPS:
        with pixfuse._library.use_isa(isa):
            yield isa


def check(images: Any, *args: Any, device: torch.device = CPU, **options: Any) -> torch.Tensor:
    """Compares calls with the reference, their masks too, and sees that the images are as before.

    The images lie on the CPU, and are moved to `device`.
    """
    before = [contents(image) for image in images]
    expected, expected_mask = pixfuse.reference.crop_mirror_normalize(
        images, *args, return_mask=True, **options
    )
    there = moved(images, device)
    for _ in in_turn(device):
        ours: torch.Tensor = pixfuse.crop_mirror_normalize(there, *args, **options)
        assert isinstance(ours, torch.Tensor)
        assert ours.device.type == device.type
        assert_same_bits(ours, expected)
        again, mask = pixfuse.crop_mirror_normalize(there, *args, return_mask=True, **options)
        assert mask.device == ours.device
        assert_same_bits(again, expected)
        assert_same_bits(mask, expected_mask)
    assert [contents(image) for image in there] == before, "the images were written to"
    return ours


def dense(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """The same values with the strides of a new tensor, also where a dimension is 1."""
    strides = pixfuse._library.dense_strides(tensor.shape, memory_format is torch.channels_last)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


# --- the comparison itself ---


def _wrong_pixel(result: torch.Tensor, mask: torch.Tensor, images: list[Any]) -> None:
    result[-1, -1, -1, -1] += 1


def _wrong_mask(result: torch.Tensor, mask: torch.Tensor, images: list[Any]) -> None:
    mask[0, 0, 0] ^= True


def _written_tensor(result: torch.Tensor, mask: torch.Tensor, images: list[Any]) -> None:
    images[0][0, 0, 0] += 1


def _written_array(result: torch.Tensor, mask: torch.Tensor, images: list[Any]) -> None:
    images[1][0, 0, 0] += 1


def _written_pillow_image(result: torch.Tensor, mask: torch.Tensor, images: list[Any]) -> None:
    images[2].putpixel((0, 0), tuple((v + 1) % 256 for v in images[2].getpixel((0, 0))))


FAULTS = (_wrong_pixel, _wrong_mask, _written_tensor, _written_array, _written_pillow_image)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_comparison_notices(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None] | None
) -> None:
    def faulty(images: Any, *args: Any, return_mask: bool = False, **options: Any) -> Any:
        result, mask = pixfuse.reference.crop_mirror_normalize(
            images, *args, return_mask=True, **options
        )
        if fault is not None:
            fault(result, mask, images)
        return (result, mask) if return_mask else result

    monkeypatch.setattr(pixfuse, "crop_mirror_normalize", faulty)
    images = [random_bytes(3, 4, 5), random_bytes(4, 5, 3).numpy(), pillow("RGB", 4, 5)]
    options: dict[str, Any] = {"out_of_bounds": "pad", "device": CPU}
    if fault is None:
        check(images, (6, 3), pixfuse.CLIP, **options)
    else:
        with pytest.raises(AssertionError, match=r"elements differ|written to"):
            check(images, (6, 3), pixfuse.CLIP, **options)


@pytest.mark.parametrize("index", [0, 63, -64, -1])
def test_the_guards_notice(index: int) -> None:
    _, buffer = guarded_output((1, 1, 2, 3), torch.uint8, torch.contiguous_format, CPU)
    assert_guards_untouched(buffer)
    buffer[index] = 8
    with pytest.raises(AssertionError, match=r"written (before|after) the output"):
        assert_guards_untouched(buffer)


# --- values ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_value(device: torch.device, rounding: Rounding, dtype: torch.dtype) -> None:
    for channels, side in ((1, 64), (2, 16), (3, 16), (3, 64), (4, 64), (5, 16), (20, 16)):
        batch = all_values(channels, side, side)
        images: list[Any] = [batch[0], batch[0].permute(1, 2, 0).contiguous().numpy()]
        if channels in (1, 3, 4):
            images.append(Image.fromarray(batch[0].permute(1, 2, 0).squeeze().contiguous().numpy()))
        for memory_format in FORMATS:
            options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format}
            ours = check(images, None, made_up(channels, rounding), device=device, **options)
            if dtype is not torch.uint8:
                same = pixfuse.normalize(batch.to(device), made_up(channels, rounding), **options)
                assert_same_bits(ours[:1], same)
            check(batch, None, made_up(channels, rounding), device=device, mirror=True, **options)


def test_the_defaults(device: torch.device) -> None:
    images = all_values(3)
    assert_same_bits(check([images[0]], device=device), pixfuse.normalize(images))
    assert_same_bits(check(images, 7, device=device), pixfuse.normalize(images[:, :, 4:11, 4:11]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_stands_for_every_channel(device: torch.device, dtype: torch.dtype) -> None:
    for channels in (1, 2, 3, 4, 5, 13):
        one, each = pixfuse.Normalization(0.3, 0.7), pixfuse.Normalization([0.3] * channels, 0.7)
        images = [random_bytes(channels, 9, 9)]
        options: dict[str, Any] = {"out_of_bounds": "pad", "dtype": dtype, "device": device}
        assert_same_bits(
            check(images, 11, one, fill=3, **options),
            check(images, 11, each, fill=[3] * channels, **options),
        )


# --- windows ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_crops_at_every_offset(
    device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """Against slicing: nothing here asks the reference where a window lies."""
    offsets = list(range(71))
    for channels, height, width in ((1, 2, 65), (3, 3, 33), (3, 1, 130), (4, 2, 40), (5, 2, 9)):
        pixels = random_bytes(channels, 71 + height, 71 + width)
        pixels_last = pixels.permute(1, 2, 0).contiguous()
        images: list[Any] = [pixels, pixels_last.numpy()]
        if channels in (1, 3, 4):
            images.append(Image.fromarray(pixels_last.squeeze().numpy()))
        normalization = made_up(channels, "torchvision")
        for turned in (False, True):
            slices = torch.stack(
                [pixels[:, o : o + height, o : o + width].flip([1, 2] * turned) for o in offsets]
            )
            if dtype is torch.uint8:
                expected = dense(slices, memory_format)
            else:
                expected = pixfuse.reference.normalize(
                    slices, normalization, dtype=dtype, memory_format=memory_format
                )
            for image in images:
                there = moved([image] * 71, device)
                for _ in in_turn(device):
                    ours = pixfuse.crop_mirror_normalize(
                        there,
                        (height, width),
                        normalization,
                        top=offsets,
                        left=offsets,
                        mirror=turned,
                        flip=turned,
                        dtype=dtype,
                        memory_format=memory_format,
                    )
                    assert_same_bits(ours, expected)


def test_images_at_every_address(device: torch.device) -> None:
    for channels in (1, 3, 4):
        memory = random_bytes(channels * 9 * 67 + 71)
        images = [
            memory[o : o + channels * 9 * 67].view(9, 67, channels).permute(2, 0, 1)
            for o in range(71)
        ]
        planes = [memory[o : o + channels * 9 * 67].view(channels, 9, 67) for o in range(71)]
        for given in (images, planes, [image.numpy().transpose(1, 2, 0) for image in images]):
            for mirror in (False, True):
                check(given, (5, 66), made_up(channels, "timm"), mirror=mirror, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_widths(device: torch.device, channels: int, dtype: torch.dtype) -> None:
    """Around the widths of vectors, with every kind of image and of window, into guarded memory."""
    normalization = made_up(channels, "torchvision")
    for width in (*WIDTHS[1:], *(LONG_WIDTHS[1::4] if channels == 3 else ())):
        images = [
            random_bytes(channels, 4, width + 2),
            random_bytes(4, width + 2, channels).numpy(),
            random_bytes(3, width, channels).numpy(),  # of which some is padding
        ]
        if channels in (1, 3, 4):
            array = random_bytes(4, width + 1, channels).numpy()
            images.append(Image.fromarray(array.squeeze(2) if channels == 1 else array))
        images = [image for image in images for _ in MIRROR_AND_FLIP]
        for memory_format in FORMATS:
            options: dict[str, Any] = {
                "anchor": (1.0, 0.5),
                "mirror": [mirror for mirror, _ in MIRROR_AND_FLIP] * (len(images) // 4),
                "flip": [flip for _, flip in MIRROR_AND_FLIP] * (len(images) // 4),
                "out_of_bounds": "pad",
                "fill": 200,
                "dtype": dtype,
                "memory_format": memory_format,
            }
            expected = pixfuse.reference.crop_mirror_normalize(
                images, (4, width), normalization, **options
            )
            assert isinstance(expected, torch.Tensor)
            there = moved(images, device)
            for offset, _ in ((o, isa) for o in (0, 1) for isa in in_turn(device)):
                out, buffer = guarded_output(
                    (len(images), channels, 4, width), dtype, memory_format, device, offset
                )
                pixfuse.crop_mirror_normalize(there, (4, width), normalization, out=out, **options)
                assert torch.equal(out.cpu(), expected)
                assert_guards_untouched(buffer, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mirror_and_flip_in_one_batch(device: torch.device, dtype: torch.dtype) -> None:
    combinations = [*MIRROR_AND_FLIP, *reversed(MIRROR_AND_FLIP)]
    mirrors, flips = [m for m, _ in combinations], [f for _, f in combinations]
    for form in (list, tuple, np.array, torch.tensor):
        for channels in (1, 3, 4, 5):
            batch = random_bytes(8, channels, 20, 37)
            for images in (batch, list(batch)):
                check(
                    images,
                    (18, 35),
                    made_up(channels, "nearest"),
                    mirror=form(mirrors),
                    flip=form(flips),
                    dtype=dtype,
                    device=device,
                )


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_on_every_side(
    device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Windows from wholly above and left of an image to wholly below and right of it."""
    height, width, (window_height, window_width) = 5, 35, (4, 33)
    places = [
        (top, left)
        for top in (-99, -5, -4, -3, -1, 0, 1, 2, 4, 5, 99)
        for left in (-99, -34, -33, -32, -17, -1, 0, 1, 2, 3, 18, 34, 35, 99)
    ]
    for channels in (1, 3):
        makers = (*SAMPLES.values(),) if channels == 3 else (SAMPLES["array"], SAMPLES["tensor"])
        kinds = [make(channels, height, width) for make in makers]
        images = [kinds[i % len(kinds)] for i in range(len(places))]
        check(
            images,
            (window_height, window_width),
            made_up(channels, "torchvision"),
            top=[top for top, _ in places],
            left=[left for _, left in places],
            mirror=[i % 3 == 0 for i in range(len(places))],
            flip=[i % 2 == 0 for i in range(len(places))],
            out_of_bounds="pad",
            fill=[7, 250, 93][:channels],
            dtype=dtype,
            memory_format=memory_format,
            device=device,
        )


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_window_larger_than_its_image(
    device: torch.device, memory_format: torch.memory_format
) -> None:
    images = samples(3, 5, 7)
    for size in ((9, 7), (5, 12), (30, 1), (1, 40), (17, 16), (200, 300)):
        for anchor in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.2, 0.7)):
            given = images if size[0] < 200 else images[:2]
            check(
                given,
                size,
                pixfuse.IMAGENET,
                anchor=anchor,
                out_of_bounds="pad",
                fill=(124, 116, 104),
                memory_format=memory_format,
                device=device,
            )


def test_anchors(device: torch.device) -> None:
    images = [random_bytes(3, 6 + i % 5, 6 + i % 7) for i in range(35)]
    anchors = [(i / 34, 1 - i / 34) for i in range(35)]
    for size in (1, 5, 6, (9, 3)):
        for form in (list, tuple, np.array, torch.tensor):
            check(
                images,
                size,
                pixfuse.CLIP,
                anchor=form(anchors),
                out_of_bounds="pad",
                device=device,
            )
        for anchor in anchors[::7]:
            check(images, size, anchor=list(anchor), out_of_bounds="pad", device=device)


def test_one_anchor_for_images_of_one_size(device: torch.device) -> None:
    images = [random_bytes(3, 11, 8) for _ in range(3)]
    for size in (1, 6, (11, 8), (12, 5)):
        for anchor in itertools.product((0.0, 0.1, 0.25, 0.5, 0.7, 1.0), repeat=2):
            check(images, size, anchor=anchor, out_of_bounds="pad", mirror=True, device=device)
            check(images, size, anchor=anchor, out_of_bounds="pad", flip=True, device=device)


def test_two_anchors_are_for_two_images() -> None:
    images = [random_bytes(3, 9, 9), random_bytes(3, 9, 9)]
    check(images, 4, anchor=((0.0, 1.0), (1.0, 0.0)))
    check(images, 4, anchor=(0.0, 1.0))


def test_one_place_for_every_image(device: torch.device) -> None:
    images = [random_bytes(3, 9, 9), random_bytes(3, 12, 7), random_bytes(3, 8, 20)]
    for form in (int, np.int64, lambda v: torch.tensor(v)):  # noqa: PLW0108
        check(images, (4, 5), top=form(3), left=form(1), device=device)
    check(images, (4, 5), top=form(3), left=[0, 2, 15], device=device)


# --- large outputs, which are stored past the caches where their rows are whole lines of these ---


@pytest.mark.parametrize("width", [1040, 1033])
@pytest.mark.parametrize("larger", [0, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_beyond_the_caches(larger: int, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    height, channels = 720, 3
    makers = [
        SAMPLES["array"],
        SAMPLES["tensor"],
        SAMPLES["array, one byte more per pixel"],
        lambda c, h, w: pillow("RGB", h, w),
        SAMPLES["array, rows backwards"],
    ]
    images = [make(channels, height + larger, width + larger) for make in makers * 2]
    result = check(
        images,
        (height, width),
        made_up(channels, "torchvision"),
        mirror=[i >= len(makers) and larger > 0 for i in range(len(images))],
    )
    assert result.nbytes > 24 << 20


# --- images ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("kind", SAMPLES)
def test_kinds_of_images(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    for channels in (1, 2, 3, 4, 5, 20):
        for height, width in ((1, 1), (9, 1), (1, 19), (11, 70)):
            images = [SAMPLES[kind](channels, height, width) for _ in range(4)]
            for memory_format in FORMATS:
                check(
                    images,
                    None,
                    made_up(channels, "transformers"),
                    mirror=[False, True, False, True],
                    flip=[False, False, True, True],
                    dtype=dtype,
                    memory_format=memory_format,
                    device=device,
                )


@pytest.mark.parametrize("case", PILLOW_IMAGES)
def test_modes(case: str) -> None:
    make, _ = PILLOW_IMAGES[case]
    for height, width in ((1, 1), (13, 67)):
        images = [make(height, width) for _ in range(4)]
        channels = pixfuse.reference._channels_first(images[0]).shape[0]
        for size, dtype, memory_format in (
            (None, torch.float32, torch.contiguous_format),
            ((2, 65), torch.bfloat16, torch.channels_last),
            ((14, 64), torch.uint8, torch.contiguous_format),
        ):
            check(
                images,
                size,
                made_up(channels, "torchvision"),
                anchor=(1, 1),
                mirror=[False, True, False, True],
                flip=[False, False, True, True],
                out_of_bounds="pad",
                fill=99,
                dtype=dtype,
                memory_format=memory_format,
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_of_everything(dtype: torch.dtype) -> None:
    images = [
        *samples(3, 9, 11),
        *samples(1, 30, 8),
        *samples(4, 7, 40),
        *(make(12, 12) for make, _ in PILLOW_IMAGES.values()),
    ]
    for memory_format in FORMATS:
        check(
            images,
            (8, 10),
            pixfuse.IMAGENET,
            channels=3,
            anchor=[(i % 4 / 3, i % 5 / 4) for i in range(len(images))],
            mirror=[i % 2 == 0 for i in range(len(images))],
            flip=[i % 3 == 0 for i in range(len(images))],
            out_of_bounds="pad",
            fill=(1, 2, 3),
            dtype=dtype,
            memory_format=memory_format,
        )


def test_a_tuple_is_as_a_list(device: torch.device) -> None:
    images = [random_bytes(3, 4, 5), random_bytes(3, 4, 5)]
    assert_same_bits(check(tuple(images), device=device), check(images, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    """One tensor of images is as the list of them, whatever lies between its elements."""
    for channels in (1, 3, 4):
        images = LAYOUTS[layout](4, channels, 6, 35)
        for memory_format in FORMATS:
            options: dict[str, Any] = {
                "mirror": [False, True, False, True],
                "flip": [False, False, True, True],
                "anchor": [(0, 0), (0.5, 0.5), (1, 1), (0.3, 0.8)],
                "out_of_bounds": "pad",
                "fill": 17,
                "dtype": dtype,
                "memory_format": memory_format,
                "device": device,
            }
            for size in ((4, 33), (7, 34)):
                args = (size, made_up(channels, "torchvision_v1"))
                assert_same_bits(
                    check(images, *args, **options), check(list(images), *args, **options)
                )


def test_one_image_many_times(device: torch.device) -> None:
    image = random_bytes(3, 9, 70)
    ours = check([image] * 40, (9, 33), left=list(range(37)) + [0] * 3, top=0, device=device)
    assert_same_bits(ours[37], ours[0])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_lazy_pillow_images(tmp_path: Path, mode: str) -> None:
    """Opened, and not yet read when they are given."""
    images = [pillow(mode, 33, 47) for _ in range(3)]
    expected = pixfuse.reference.crop_mirror_normalize(images, 30, pixfuse.SIGNED)
    assert isinstance(expected, torch.Tensor)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    opened = [Image.open(tmp_path / f"{i}.png") for i in range(3)]
    assert_same_bits(pixfuse.crop_mirror_normalize(opened, 30, pixfuse.SIGNED), expected)
    streams = [Image.open(io.BytesIO((tmp_path / f"{i}.png").read_bytes())) for i in range(3)]
    assert all(isinstance(image, ImageFile.ImageFile) for image in streams)
    assert_same_bits(pixfuse.crop_mirror_normalize(streams, 30, pixfuse.SIGNED), expected)
    for image in (*opened, *streams):
        image.close()


def test_pillow_images_after_pillow_s_own_operations() -> None:
    image = pillow("RGB", 40, 50)
    check(
        [
            image.crop((3, 5, 40, 39)),
            image.resize((44, 38)),
            image.transpose(Image.Transpose.ROTATE_90),
            image.copy(),
            Image.merge("RGB", image.split()[::-1]),
            image.getchannel("G"),
            Image.new("RGB", (45, 41), (1, 2, 3)),
            image.crop((-9, -9, 60, 60)),
        ],
        34,
        pixfuse.IMAGENET,
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGBX"])
def test_pillow_images_over_the_memory_of_others(mode: str) -> None:
    """Read in place by Pillow itself, read-only."""
    channels = 1 if mode == "L" else 4
    memory = random_bytes(20 * 31 * channels).numpy().tobytes()
    image = Image.frombuffer(mode, (31, 20), memory, "raw", mode, 0, 1)
    check([image, image], (17, 16), mirror=[True, False])
    if mode != "RGBX":
        check(
            [Image.fromarray(np.frombuffer(memory, np.uint8).reshape(20, 31, channels).squeeze())]
        )


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pillow_images_in_several_blocks(mode: str) -> None:
    """An image of more than 16 MB lies in several pieces of memory."""
    side = 4200 if mode == "L" else 2100
    image = pillow(mode, side, side)
    reference = torch.from_numpy(np.array(image)).view(side, side, -1).permute(2, 0, 1)
    tops = [0, 1, side // 2, side - 64]
    ours = pixfuse.crop_mirror_normalize([image] * 4, 64, dtype=torch.uint8, top=tops, left=tops)
    for i, top in enumerate(tops):
        assert torch.equal(ours[i], reference[:, top : top + 64, top : top + 64])


def test_pillow_images_in_small_blocks() -> None:
    core: Any = vars(Image)["core"]  # no public name
    before = core.get_block_size()
    core.set_block_size(4096)
    try:
        images = [pillow(mode, 50, 60) for mode in ("L", "RGB", "RGBA")]
        images += [make(50, 60) for make, _ in PILLOW_IMAGES.values()]
    finally:
        core.set_block_size(before)
    check(images, (49, 57), pixfuse.CLIP, channels=3, mirror=True)


class Photo(Image.Image):
    """As a data set might derive it."""


def test_subclasses(tmp_path: Path) -> None:
    photo = Photo()
    photo.__dict__.update(pillow("RGB", 5, 6).__dict__)
    assert isinstance(photo, Image.Image)
    mapped = np.memmap(tmp_path / "pixels", np.uint8, "w+", shape=(5, 6, 3))
    mapped[:] = random_bytes(5, 6, 3).numpy()
    field = np.zeros((5, 6), [("a", np.uint16), ("b", np.uint8)])["b"]
    field[:] = random_bytes(5, 6).numpy()
    parameter = torch.nn.Parameter(random_bytes(3, 5, 6), requires_grad=False)
    with torch.inference_mode():
        inference = random_bytes(3, 5, 6)
    ours = check([photo, mapped, field, parameter, inference], None, pixfuse.IMAGENET, mirror=True)
    assert type(ours) is torch.Tensor
    assert not ours.requires_grad


def test_tensors_with_lazy_bits(device: torch.device) -> None:
    """Views that torch leaves to be computed when read: a negated or conjugated one is no byte."""
    image = random_bytes(3, 5, 6)
    assert not image.is_neg()
    check([image.detach(), image.view(3, 5, 6), image[:]], None, pixfuse.CLIP, device=device)


# --- channels ---


def test_grey_beside_color(device: torch.device) -> None:
    images = [random_bytes(1, 5, 40), random_bytes(3, 6, 39), random_bytes(1, 5, 39)]
    for memory_format in FORMATS:
        for dtype in DTYPES:
            options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format}
            check(images, (5, 38), pixfuse.IMAGENET, mirror=True, device=device, **options)


def test_channels(device: torch.device) -> None:
    for memory_format in FORMATS:
        for dtype in DTYPES:
            options: dict[str, Any] = {
                "dtype": dtype,
                "memory_format": memory_format,
                "mirror": [True, False, True, False],
                "device": device,
            }
            counts = ((3, (1, 3, 4, 3)), (4, (1, 4, 4, 1)), (1, (1, 1, 1, 1)), (5, (5, 1, 5, 1)))
            for channels, given in counts:
                for side in (1, 5, 35):
                    images = [random_bytes(c, side, side) for c in given]
                    arrays: Sequence[Any] = [image.numpy().transpose(1, 2, 0) for image in images]
                    for images_or_arrays in (images, arrays):
                        check(
                            images_or_arrays,
                            None,
                            made_up(channels, "timm"),
                            channels=channels,
                            **options,
                        )
            for count in (1, 4):
                check(
                    random_bytes(4, count, 9, 35),
                    (8, 33),
                    pixfuse.IMAGENET,
                    channels=3,
                    **options,
                )


def test_alpha_is_dropped_only_when_asked(device: torch.device) -> None:
    images = [random_bytes(4, 5, 6), random_bytes(5, 6, 4).numpy(), pillow("RGBA", 5, 6)]
    assert check(images, device=device).shape == (3, 4, 5, 6)
    assert check(images, channels=3, device=device).shape == (3, 3, 5, 6)
    x = pillow("RGB", 5, 6).convert("RGBX")
    assert check([x]).shape == (1, 3, 5, 6)


# --- fill ---


@pytest.mark.parametrize("fill_space", ["input", "output"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_fills(
    device: torch.device, rounding: Rounding, dtype: torch.dtype, fill_space: str
) -> None:
    fills: tuple[Any, ...] = (0.0, -0.0, 128, 127.5, (0, 255, 1 / 3), (0.1, 123.675, 254.999999999))
    if fill_space == "output":
        fills += (-1.0, (-2.117904, 1e-7, 0.3), (1 / 3, -60000.0, 1e-30))
    images = [random_bytes(3, 5, 40), random_bytes(4, 39, 3).numpy()]
    for fill in fills:
        for form in (tuple, list, np.array, torch.tensor) if isinstance(fill, tuple) else (float,):
            for memory_format in FORMATS:
                check(
                    images,
                    (6, 44),
                    made_up(3, rounding),
                    out_of_bounds="pad",
                    fill=form(fill),
                    fill_space=fill_space,
                    dtype=dtype,
                    memory_format=memory_format,
                    device=device,
                )


def test_fills_of_bytes(device: torch.device) -> None:
    images = [random_bytes(3, 5, 40), random_bytes(4, 39, 3).numpy()]
    fills: tuple[Any, ...] = (0, 255, 128.0, (1, 2, 3), np.array([255, 0, 7], np.uint8))
    for fill in fills:
        check(images, 44, out_of_bounds="pad", fill=fill, dtype=torch.uint8, device=device)


def test_a_fill_that_is_not_used_changes_nothing(device: torch.device) -> None:
    images = [random_bytes(3, 5, 40), random_bytes(3, 6, 39)]
    plain = check(images, (5, 38), pixfuse.CLIP, device=device)
    for out_of_bounds in ("error", "pad"):
        filled = check(
            images, (5, 38), pixfuse.CLIP, fill=9.0, out_of_bounds=out_of_bounds, device=device
        )
        assert_same_bits(filled, plain)


def test_a_mask_of_nothing_and_of_everything(device: torch.device) -> None:
    images = moved([random_bytes(3, 5, 40), random_bytes(3, 6, 39)], device)
    _, mask = pixfuse.crop_mirror_normalize(images, 5, return_mask=True)
    assert bool(mask.all())
    _, mask = pixfuse.crop_mirror_normalize(
        images, 5, top=-5, left=0, out_of_bounds="pad", return_mask=True
    )
    assert not bool(mask.any())


# --- out ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("as_batch", [False, True])
def test_out(
    device: torch.device, as_batch: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    batch = random_bytes(3, 3, 9, 40)
    images = moved(batch if as_batch else list(batch), device)
    options: dict[str, Any] = {
        "mirror": [True, False, True],
        "top": [0, 3, 9],
        "left": [-3, 2, 6],
        "out_of_bounds": "pad",
        "fill": 3,
        "dtype": dtype,
        "memory_format": memory_format,
    }
    args = ((7, 35), pixfuse.IMAGENET)
    expected = check(batch if as_batch else list(batch), *args, device=device, **options)
    for offset, _ in ((o, isa) for o in range(0, 17, 4) for isa in in_turn(device)):
        out, buffer = guarded_output((3, 3, 7, 35), dtype, memory_format, device, offset)
        version = out._version
        assert pixfuse.crop_mirror_normalize(images, *args, out=out, **options) is out
        assert out._version > version, "autograd would not notice that out has changed"
        assert_same_bits(out, expected)
        assert_guards_untouched(buffer, offset)
        out.fill_(7)
        result, mask = pixfuse.crop_mirror_normalize(
            images, *args, out=out, return_mask=True, **options
        )
        assert result is out
        assert_same_bits(out, expected)
        assert mask.shape == (3, 7, 35)
    with torch.inference_mode():
        out = torch.empty_like(expected)
        assert pixfuse.crop_mirror_normalize(images, *args, out=out, **options) is out
        assert_same_bits(out, expected)


def test_a_result_is_its_own(device: torch.device) -> None:
    """Also of bytes that need no change at all."""
    images = moved(random_bytes(2, 3, 4, 5), device)
    for given in (images, list(images)):
        result = pixfuse.crop_mirror_normalize(given, dtype=torch.uint8)
        assert_same_bits(result, images.contiguous())
        result.zero_()
        assert bool(images.any())
    array = random_bytes(4, 5, 3).numpy()
    pixfuse.crop_mirror_normalize([array], dtype=torch.uint8).zero_()
    assert bool(array.any())


def test_large_results_use_recycled_memory() -> None:
    images = [random_bytes(3, 300, 300).permute(1, 2, 0).contiguous().numpy() for _ in range(4)]
    before = pixfuse.info()["output_buffer"]["reused"]
    for _ in range(3):
        pixfuse.crop_mirror_normalize(images, 256, pixfuse.IMAGENET)
    if torch.__version__.split(".")[:2] != ["2", "10"]:
        assert pixfuse.info()["output_buffer"]["reused"] >= before + 2


# --- the same bits, whatever the circumstances ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(device: torch.device, dtype: torch.dtype) -> None:
    images = samples(3, 70, 131)[::5]
    batch = random_bytes(6, 3, 70, 131)
    for given in (images, batch):
        for memory_format in FORMATS:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                check(
                    given,
                    (64, 129),
                    made_up(3, "torchvision"),
                    mirror=[i % 2 == 0 for i in range(len(given))],
                    anchor=(0.2, 0.9),
                    dtype=dtype,
                    memory_format=memory_format,
                    device=device,
                )


def test_one_large_image_among_threads(device: torch.device) -> None:
    torch.set_num_threads(3)
    for shape in ((1, 1, 200_003), (3, 70_001, 2), (3, 500, 601)):
        for flip in (False, True):
            check([random_bytes(*shape)], None, pixfuse.SIGNED, mirror=flip, flip=flip)
            check([random_bytes(*shape)], None, mirror=flip, flip=flip, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_split(dtype: torch.dtype) -> None:
    images = [*samples(3, 20, 41), *samples(1, 22, 40)]
    mirror = [i % 2 == 0 for i in range(len(images))]
    args: tuple[Any, ...] = ((18, 37), pixfuse.IMAGENET)
    whole = check(images, *args, mirror=mirror, dtype=dtype)
    for size in (1, 5):
        parts = [
            pixfuse.crop_mirror_normalize(
                images[i : i + size], *args, channels=3, mirror=mirror[i : i + size], dtype=dtype
            )
            for i in range(0, len(images), size)
        ]
        assert_same_bits(torch.cat(parts), whole)
    order = torch.randperm(len(images)).tolist()
    shuffled = pixfuse.crop_mirror_normalize(
        [images[i] for i in order], *args, mirror=[mirror[i] for i in order], dtype=dtype
    )
    assert_same_bits(shuffled, whole[order])


def test_every_device_gives_the_same_bits() -> None:
    """Directly, beside the comparison of each with the reference."""
    images = [random_bytes(3, 40, 67) for _ in range(4)]
    for rounding, dtype in itertools.product(ROUNDINGS, DTYPES):
        results = []
        devices = [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]
        for isa, device in itertools.product(WITH_OWN_LOOPS, devices):
            with pixfuse._library.use_isa(isa):
                result = pixfuse.crop_mirror_normalize(
                    moved(images, device),
                    (33, 66),
                    made_up(3, rounding),
                    mirror=[True, False, True, False],
                    dtype=dtype,
                )
            results.append(result.cpu())
        for result in results[1:]:
            assert_same_bits(result, results[0])


def test_no_image_is_kept() -> None:
    images = [*samples(3, 9, 9), *(make(9, 9) for make, _ in PILLOW_IMAGES.values())]
    for _ in range(3):  # what is made once per image or mode
        pixfuse.crop_mirror_normalize(images, 8, channels=3)
    before = [sys.getrefcount(image) for image in images]
    for _ in range(10):
        pixfuse.crop_mirror_normalize(images, 8, channels=3)
    assert [sys.getrefcount(image) for image in images] == before


def test_a_list_and_its_images_changed_by_another_thread() -> None:
    """No crash: each call reads what it got, or refuses it."""
    images: list[Any] = samples(3, 64, 64)
    failures: list[BaseException] = []
    done = threading.Event()

    def change() -> None:
        for i in itertools.count():
            if done.is_set():
                return
            images[i % len(images)] = SAMPLES["array" if i % 2 else "tensor"](3, 64, 64)
            if i % 50 == 0:
                images.append(images.pop(0))
            if isinstance(images[-1], np.ndarray) and images[-1].flags.writeable:
                images[-1][:] = i % 256

    def call() -> None:
        try:
            for _ in range(150):
                result = pixfuse.crop_mirror_normalize(images, 60, mirror=True, dtype=torch.uint8)
                assert result.shape[1:] == (3, 60, 60)
        except BaseException as error:
            failures.append(error)

    changer = threading.Thread(target=change)
    callers = [threading.Thread(target=call) for _ in range(3)]
    for thread in (changer, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    done.set()
    changer.join()
    assert not failures


# --- torch.ops ---

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}


def call_operator(
    images: list[torch.Tensor],
    placements: torch.Tensor,
    channels: int,
    size: tuple[int, int],
    normalization: pixfuse.Normalization,
    fill: Sequence[float],
    fill_space: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.pixfuse.crop_mirror_normalize(  # type: ignore[no-any-return]
        images,
        placements,
        channels,
        *size,
        normalization.mean,
        normalization.std,
        ROUNDING_CODES[normalization.rounding],
        fill,
        fill_space == "output",
        DTYPE_CODES[dtype],
        int(memory_format is torch.channels_last),
        True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_operators(
    device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """A list of images, of batches, and of both is one batch."""
    for channels in (1, 3, 4):
        normalization = made_up(channels, "torchvision")
        images = [
            random_bytes(channels, 7, 40),
            random_bytes(2, channels, 8, 39),
            random_bytes(channels, 6, 35).mT.contiguous().mT,
            random_bytes(3, 9, 36, channels).permute(0, 3, 1, 2),
        ]
        flat = [one for image in images for one in (image if image.ndim == 4 else [image])]
        placements = torch.tensor(
            [[i - 2, 5 - 2 * i, i % 2, i // 2 % 2] for i in range(7)], dtype=torch.int64
        )
        fill = [3.0, 200.0, 1.0, 9.0][:channels]
        for fill_space in ("input", "output") if dtype is not torch.uint8 else ("input",):
            expected, expected_mask = pixfuse.reference.crop_mirror_normalize(
                flat,
                (8, 37),
                normalization,
                top=placements[:, 0],
                left=placements[:, 1],
                mirror=placements[:, 2],
                flip=placements[:, 3],
                fill=fill,
                fill_space=fill_space,
                return_mask=True,
                dtype=dtype,
                memory_format=memory_format,
            )
            there = [relaid(image, device) for image in images]
            for _ in in_turn(device):
                result, mask = call_operator(
                    there,
                    placements,
                    channels,
                    (8, 37),
                    normalization,
                    fill,
                    fill_space,
                    dtype,
                    memory_format,
                )
                assert_same_bits(result, expected)
                assert_same_bits(mask, expected_mask)
                for with_mask in (False, True):
                    out, buffer = guarded_output((7, channels, 8, 37), dtype, memory_format, device)
                    mask.fill_(False)
                    torch.ops.pixfuse.crop_mirror_normalize_out(
                        there,
                        placements,
                        channels,
                        normalization.mean,
                        normalization.std,
                        ROUNDING_CODES[normalization.rounding],
                        fill,
                        fill_space == "output",
                        out,
                        mask if with_mask else None,
                    )
                    assert_same_bits(out, expected)
                    assert_guards_untouched(buffer)
                    if with_mask:
                        assert_same_bits(mask, expected_mask)


# --- no hidden copy ---

COPY_OR_NOT = """
import pathlib, re, numpy, torch, pixfuse
from PIL import Image

def peak_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

side = 1500  # below the size from which on Pillow splits an image
tensors = [torch.full((side, side + 7, 3), i, dtype=torch.uint8)[:, 7:] for i in range(8)]
kinds = {
    "tensors": [image.permute(2, 0, 1) for image in tensors],
    "arrays": [image.numpy()[::-1] for image in tensors],
    "pillow": [Image.new("RGB", (side, side), (i, i, i)) for i in range(8)],
}
out = torch.empty(8, 3, side - 1, side - 2, dtype=torch.uint8).fill_(0)

def growth(images, prepare=lambda image: image):
    pixfuse.crop_mirror_normalize(images[:1], 8, mirror=True)  # code and tables
    before = peak_bytes()
    images = [prepare(image) for image in images]
    pixfuse.crop_mirror_normalize(
        images, (side - 1, side - 2), mirror=True, dtype=torch.uint8, out=out
    )
    return (peak_bytes() - before) / out.nbytes

for kind, images in kinds.items():
    print(kind, growth(images))
print("copies", growth(kinds["arrays"], numpy.array))
"""


def test_no_hidden_copy() -> None:
    """Of 54 MB of images: the most memory ever used does not grow."""
    result = subprocess.run(
        [sys.executable, "-c", COPY_OR_NOT], capture_output=True, text=True, check=True
    )
    growth = {kind: float(value) for kind, value in map(str.split, result.stdout.splitlines())}
    assert growth.pop("copies") > 0.9, "this way of measuring would not see a copy"
    if not hasattr(Image.Image, "__arrow_c_array__"):
        growth.pop("pillow")  # this Pillow does not export its memory
    assert max(growth.values()) < 0.1, growth


def test_strides_beyond_32_bits() -> None:
    """Only the pages that the views touch ever exist."""
    gap = 2**31 + 11
    try:
        storage = torch.empty(3 * gap + 64, dtype=torch.uint8)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    for strides in ((gap, 4, 1), (1, gap, 4), (4, 1, gap)):
        images = storage.as_strided((3, 3, 3), strides)
        images.copy_(random_bytes(3, 3, 3))
        array = images.numpy().transpose(1, 2, 0)
        for given in ([images], images[None], [array], [array[::-1, ::-1, ::-1]]):
            for mirror in (False, True):
                options: dict[str, Any] = {"mirror": mirror, "flip": mirror}
                ours = pixfuse.crop_mirror_normalize(given, 2, pixfuse.IMAGENET, **options)
                expected = pixfuse.reference.crop_mirror_normalize(
                    given, 2, pixfuse.IMAGENET, **options
                )
                assert isinstance(expected, torch.Tensor)
                assert_same_bits(ours, expected)


# --- anything else ---


@st.composite
def image_lists(draw: st.DrawFn) -> tuple[Any, int]:
    """A list of images of any kinds and sizes, or a batch; and the channels they come to."""
    channels = draw(st.sampled_from([1, 2, 3, 3, 3, 4, 5, 17]))
    sides = st.one_of(st.integers(1, 12), st.integers(1, 90))
    count = draw(st.integers(1, 4))
    if draw(st.booleans()):
        layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
        return layout(count, channels, draw(sides), draw(sides)), channels
    kinds = [*sorted(SAMPLES), *(["pillow"] if channels in (1, 3, 4) else [])]
    images = []
    for _ in range(count):
        kind, height, width = draw(st.sampled_from(kinds)), draw(sides), draw(sides)
        if kind == "pillow":
            images.append(pillow({1: "L", 3: "RGB", 4: "RGBA"}[channels], height, width))
        else:
            repeated = channels == 3 and len(images) > 0 and draw(st.booleans())
            images.append(SAMPLES[kind](1 if repeated else channels, height, width))
    return images, channels


numbers = st.floats(-4, 4)
positive_numbers = st.floats(1e-3, 10)


@hypothesis.settings(
    max_examples=250,
    # `device` stays the same for all examples of a test, which is what is wanted.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    given=image_lists(),
    rounding=st.sampled_from(ROUNDINGS),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(FORMATS),
    fill_space=st.sampled_from(["input", "output"]),
    size=st.one_of(
        st.integers(1, 20), st.tuples(st.integers(1, 40), st.one_of(st.integers(1, 100)))
    ),
    explicit=st.booleans(),
    data=st.data(),
)
def test_anything(
    device: torch.device,
    given: tuple[Any, int],
    rounding: Rounding,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    fill_space: str,
    size: int | tuple[int, int],
    explicit: bool,
    data: st.DataObject,
) -> None:
    images, channels = given

    def for_each_image(values: st.SearchStrategy[Any]) -> Any:
        count = len(images)
        return data.draw(st.one_of(values, st.lists(values, min_size=count, max_size=count)))

    def for_each_channel(values: st.SearchStrategy[Any]) -> Any:
        return data.draw(st.one_of(values, st.lists(values, min_size=channels, max_size=channels)))

    options: dict[str, Any] = {}
    if explicit:
        places = st.integers(-30, 30)
        options |= {"top": for_each_image(places), "left": for_each_image(places)}
    else:
        share = st.floats(0, 1)
        options |= {"anchor": for_each_image(st.tuples(share, share))}
    if dtype is torch.uint8:
        options |= {"fill": for_each_channel(st.integers(0, 255))}
    elif fill_space == "input":
        options |= {"fill": for_each_channel(st.floats(0, 255))}
    else:
        options |= {"fill": for_each_channel(st.floats(-4, 4)), "fill_space": "output"}
    options |= {
        "mirror": for_each_image(st.booleans()),
        "flip": for_each_image(st.booleans()),
        "out_of_bounds": "pad",
        "dtype": dtype,
        "memory_format": memory_format,
    }
    count = data.draw(st.sampled_from([1, channels]))
    mean = data.draw(st.lists(numbers, min_size=count, max_size=count))
    std = data.draw(st.lists(positive_numbers, min_size=count, max_size=count))
    normalization = of_any_units(mean, std, rounding)
    ours = check(images, size, normalization, device=device, channels=channels, **options)
    out, buffer = guarded_output(tuple(ours.shape), dtype, memory_format, device)
    pixfuse.crop_mirror_normalize(
        moved(images, device), size, normalization, channels=channels, out=out, **options
    )
    assert torch.equal(out, ours)
    assert_guards_untouched(buffer)
