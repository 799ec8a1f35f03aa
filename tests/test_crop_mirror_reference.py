"""`pixfuse.reference.crop_mirror_normalize` against what it says it equals, mostly torchvision."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from pixfuse.normalization import Rounding
from pixfuse.reference import crop_mirror_normalize
from tests.bits import assert_same_bits
from tests.exact import round_to_float32
from tests.images import all_values, random_bytes
from tests.normalizations import ROUNDINGS, made_up, with_rounding
from tests.samples import PILLOW_IMAGES, pillow

transforms = import_torchvision("torchvision.transforms")
v2 = import_torchvision("torchvision.transforms.v2")
functional = import_torchvision("torchvision.transforms.v2.functional")
tv_tensors = import_torchvision("torchvision.tv_tensors")

# Every parity of the image, of the window and of their difference, above, at and below zero.
LENGTHS = tuple(itertools.product(range(1, 8), range(1, 10)))
MIRROR_AND_FLIP = tuple(itertools.product([False, True], repeat=2))


def pack(images: Any, size: Any = None, **options: Any) -> torch.Tensor:
    result = crop_mirror_normalize(images, size, out_of_bounds="pad", dtype=torch.uint8, **options)
    assert isinstance(result, torch.Tensor)
    return result


def normalized(images: Any, *args: Any, **options: Any) -> torch.Tensor:
    result = crop_mirror_normalize(images, *args, **options)
    assert isinstance(result, torch.Tensor)
    return result


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the strides of a new tensor, also where a dimension is 1."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


# --- windows ---


@pytest.mark.parametrize("shift", range(7))
def test_the_default_window_is_center_crop(shift: int) -> None:
    # Each pair of lengths, for the rows with seven others for the columns.
    for i, (image_height, height) in enumerate(LENGTHS):
        image_width, width = LENGTHS[(i * 8 + 9 * shift) % len(LENGTHS)]
        image = random_bytes(3, image_height, image_width)
        theirs = functional.center_crop(image, [height, width])
        assert_same_bits(pack([image], (height, width))[0], dense(theirs))


def test_those_windows_tell_the_ways_to_round_apart() -> None:
    """Else the test above would not show which it is."""
    slacks = {length - window for length, window in LENGTHS}
    assert any(round(0.5 * slack) != int(0.5 * slack + 0.5) for slack in slacks if slack > 0)
    assert any(round(0.5 * slack) != int(0.5 * slack) for slack in slacks if slack > 0)
    assert any(round(0.5 * slack) != int(0.5 * slack) for slack in slacks if slack < 0)


@pytest.mark.parametrize("height", [1, 3, 6, 9])
def test_a_given_window_is_crop(height: int) -> None:
    image = random_bytes(3, 6, 5)
    width = height + 1
    from_pillow = functional.to_pil_image(image)
    for top in range(-10, 8):
        for left in range(-11, 7, 3):
            ours = pack([image], (height, width), top=top, left=left)[0]
            theirs = functional.crop(from_pillow, top, left, height, width)
            assert_same_bits(ours, dense(functional.pil_to_tensor(theirs)))
            # Of a tensor, beyond all of the image, torchvision's crop has another size.
            if -height < top < 6 and -width < left < 5:
                assert_same_bits(ours, dense(functional.crop(image, top, left, height, width)))


def test_an_anchor_goes_from_the_first_row_to_the_last() -> None:
    rows = torch.arange(11, dtype=torch.uint8).view(1, 11, 1).expand(1, 11, 11)
    for anchor, first in (
        (0.0, 0),
        (0.05, 0),  # exactly half of a row: to the even one
        (0.06, 1),
        (0.1, 1),
        (0.15, 2),  # half again
        (0.25, 2),
        (0.35, 4),
        (0.5, 5),
        (0.999, 10),
        (1.0, 10),
    ):
        assert pack([rows], 1, anchor=(anchor, 0.3)).item() == first, anchor
        assert pack([rows.mT], 1, anchor=(0.3, anchor)).item() == first, anchor
    for anchor, padding in ((0.0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (0.99, 4), (1.0, 5)):
        found = pack([rows[:, 1:7, :1]], (11, 1), anchor=(anchor, 0.5)).flatten().tolist()
        assert found == [0] * padding + [1, 2, 3, 4, 5, 6] + [0] * (5 - padding), anchor


def test_arguments_may_be_given_for_each_image() -> None:
    images = [random_bytes(3, 9, 8), random_bytes(3, 6, 7), random_bytes(3, 5, 5)]
    anchors = [(0.0, 1.0), (0.5, 0.25), (1.0, 0.0)]
    tops, lefts = [4, 0, 1], [3, 2, 0]
    switches = [True, False, True]
    for form in (list, tuple, np.array, torch.tensor):
        together = pack(images, (5, 4), anchor=form(anchors), mirror=form(switches))
        for i, image in enumerate(images):
            alone = pack([image], (5, 4), anchor=anchors[i], mirror=switches[i])
            assert_same_bits(together[i], alone[0])
        together = pack(images, (4, 4), top=form(tops), left=form(lefts), flip=form(switches))
        for i, image in enumerate(images):
            alone = pack([image], 4, top=tops[i], left=lefts[i], flip=switches[i])
            assert_same_bits(together[i], alone[0])


# --- mirror and flip ---


@pytest.mark.parametrize(("mirror", "flip"), MIRROR_AND_FLIP)
def test_mirror_and_flip_are_hflip_and_vflip_of_the_window(mirror: bool, flip: bool) -> None:
    for height, width in ((4, 4), (3, 6), (9, 2), (9, 9)):
        image = random_bytes(3, 6, 5)
        theirs = functional.center_crop(image, [height, width])
        if mirror:
            theirs = functional.hflip(theirs)
        if flip:
            theirs = functional.vflip(theirs)
        ours = pack([image], (height, width), mirror=mirror, flip=flip)[0]
        assert_same_bits(ours, dense(theirs))


# --- fill ---

FILLS = ((0, 0, 0), (255, 1, 128), (124, 116, 104))


@pytest.mark.parametrize("fill", FILLS)
def test_a_fill_of_pixels_is_pad_then_normalize(fill: tuple[int, int, int]) -> None:
    image = random_bytes(3, 6, 5)
    for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3)):
        theirs = v2.Compose(
            [
                v2.Pad([2, 1, 4, 3], fill=list(fill)),  # left, top, right, bottom
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )(image)
        ours = normalized(
            [image],
            (10, 11),
            pixfuse.Normalization(mean, std),
            top=-1,
            left=-2,
            out_of_bounds="pad",
            fill=fill,
        )
        assert_same_bits(ours[0], theirs)


@pytest.mark.parametrize("fill", [(0.0, 0.0, 0.0), (-1.0, 0.1, 2.75)])
def test_a_fill_of_results_is_normalize_then_pad(fill: tuple[float, ...]) -> None:
    image = random_bytes(3, 6, 5)
    theirs = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(pixfuse.CLIP.mean), list(pixfuse.CLIP.std)),
            v2.Pad([2, 1, 4, 3], fill=list(fill)),
        ]
    )(image)
    options: dict[str, Any] = {
        "top": -1,
        "left": -2,
        "out_of_bounds": "pad",
        "fill": fill,
        "fill_space": "output",
    }
    assert_same_bits(normalized([image], (10, 11), pixfuse.CLIP, **options)[0], theirs)
    for dtype in (torch.float16, torch.bfloat16):
        ours = normalized([image], (10, 11), pixfuse.CLIP, dtype=dtype, **options)
        assert_same_bits(ours[0], theirs.to(dtype))


STEPS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "torchvision": lambda x, m, s: (x * np.float32(1 / 255) - np.float32(m)) / np.float32(s),
    "torchvision_v1": lambda x, m, s: (x / np.float32(255) - np.float32(m)) / np.float32(s),
    "timm": lambda x, m, s: (x - np.float32(255 * m)) / np.float32(255 * s),
    "transformers": lambda x, m, s: (
        (x - np.float32(m) * np.float32(255)) / (np.float32(s) * np.float32(255))
    ),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_fill_of_pixels_goes_through_the_arithmetic_of_a_byte(rounding: Rounding) -> None:
    image = torch.zeros(1, 1, 1, dtype=torch.uint8)
    # Whole ones, fractions that float32 holds, and fractions that it does not.
    for fill in (0, 1, 127, 255, 127.5, 0.25, 0.1, 123.675, 1 / 3, 254.999999999):
        for seed in range(20):
            normalization = made_up(1, rounding, seed)
            mean, std = normalization.mean[0], normalization.std[0]
            if rounding == "nearest":
                exact = (Fraction(fill) / 255 - Fraction(mean)) / Fraction(std)
                expected = round_to_float32(exact)
            else:
                expected = float(STEPS[rounding](np.float32(fill), mean, std))
            ours = normalized(
                [image], 1, normalization, top=1, left=0, out_of_bounds="pad", fill=fill
            )
            assert_same_bits(ours, torch.full((1, 1, 1, 1), expected))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_whole_fill_is_as_a_byte(rounding: Rounding) -> None:
    images = all_values(3)
    normalization = made_up(3, rounding)
    values = pixfuse.reference.normalize(images, normalization)
    for y in range(16):
        for x in range(16):
            fill = images[0, :, y, x].tolist()
            ours = normalized(
                [images[0]], 1, normalization, top=99, left=0, out_of_bounds="pad", fill=fill
            )
            assert_same_bits(ours[0, :, 0, 0], dense(values[0, :, y, x]))


# --- values ---


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_pipeline_of_v2_from_pillow(mode: str) -> None:
    images = [pillow(mode, height, width) for height, width in ((9, 12), (8, 7), (20, 5), (6, 6))]
    normalization = pixfuse.MNIST if mode == "L" else pixfuse.IMAGENET
    pipeline = v2.Compose(
        [
            v2.CenterCrop((6, 9)),
            v2.RandomHorizontalFlip(1.0),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(normalization.mean, normalization.std),
        ]
    )
    theirs = torch.stack([pipeline(image).as_subclass(torch.Tensor) for image in images])
    ours = normalized(images, (6, 9), normalization, mirror=True, out_of_bounds="pad")
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_pipeline_of_v1_from_pillow(mode: str) -> None:
    images = [pillow(mode, height, width) for height, width in ((9, 12), (8, 11), (20, 10))]
    channels = len(images[0].getbands())
    normalization = made_up(channels, "torchvision_v1")
    pipeline = transforms.Compose(
        [
            transforms.CenterCrop((6, 9)),
            transforms.RandomVerticalFlip(1.0),
            transforms.ToTensor(),
            transforms.Normalize(normalization.mean, normalization.std),
        ]
    )
    theirs = torch.stack([pipeline(image) for image in images])
    assert_same_bits(normalized(images, (6, 9), normalization, flip=True), theirs)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 20])
def test_without_a_window_it_is_normalize(channels: int, rounding: Rounding) -> None:
    images = torch.cat([all_values(channels), random_bytes(2, channels, 16, 16)])
    normalization = made_up(channels, rounding)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format}
            expected = pixfuse.reference.normalize(images, normalization, **options)
            for given in (images, list(images), [image for image in images.numpy()]):  # noqa: C416
                if isinstance(given, list) and isinstance(given[0], np.ndarray):
                    given = [image.transpose(1, 2, 0) for image in given]  # noqa: PLW2901
                assert_same_bits(normalized(given, None, normalization, **options), expected)


def test_uint8_packs_the_bytes() -> None:
    images = all_values(3)
    for normalization in (pixfuse.UNIT, with_rounding(pixfuse.IMAGENET, "nearest")):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ours = normalized(
                images, None, normalization, dtype=torch.uint8, memory_format=memory_format
            )
            assert_same_bits(ours, images.contiguous(memory_format=memory_format))


# --- what an image may be ---


def test_arrays_tensors_and_pillow_images_are_the_same() -> None:
    pixels = random_bytes(7, 5, 3)
    array, tensor = pixels.numpy(), pixels.permute(2, 0, 1)
    turned = array[::-1, ::-1].copy()
    read_only = array.copy()
    read_only.flags.writeable = False
    together = pack(
        [
            array,
            turned[::-1, ::-1],
            np.asfortranarray(array),
            read_only,
            tensor,
            tensor.contiguous(),
            tv_tensors.Image(tensor),
            Image.fromarray(array),
        ]
    )
    assert_same_bits(together, tensor.contiguous().expand(8, -1, -1, -1).contiguous())
    assert type(together) is torch.Tensor


@pytest.mark.parametrize("case", PILLOW_IMAGES)
def test_modes(case: str) -> None:
    make, conversions = PILLOW_IMAGES[case]
    image = make(16, 16)
    assert image.mode == case.split(maxsplit=1)[0]
    converted = image
    for mode in conversions:
        converted = converted.convert(mode)
    theirs = functional.pil_to_tensor(converted)
    assert theirs.float().std() > 10, "too plain to tell anything"
    assert_same_bits(pack([image])[0], dense(theirs))


# --- channels ---


def test_one_channel_is_repeated_beside_three() -> None:
    grey, color = random_bytes(1, 4, 5), random_bytes(3, 4, 5)
    assert_same_bits(
        pack([grey, color, grey]), torch.stack([grey.expand(3, 4, 5), color, grey.expand(3, 4, 5)])
    )
    assert_same_bits(pack([grey, grey]), torch.stack([grey, grey]))


def test_channels_are_what_is_asked_for() -> None:
    grey, color, alpha = random_bytes(1, 4, 5), random_bytes(3, 4, 5), random_bytes(4, 4, 5)
    assert_same_bits(
        pack([grey, color, alpha], channels=3),
        torch.stack([grey.expand(3, 4, 5), color, alpha[:3]]),
    )
    assert_same_bits(pack([grey, alpha], channels=4), torch.stack([grey.expand(4, 4, 5), alpha]))
    assert_same_bits(pack([grey], channels=20)[0], grey.expand(20, 4, 5).contiguous())
    # What a repeated channel becomes differs by the mean and std of each.
    assert_same_bits(
        normalized([grey], None, pixfuse.IMAGENET, channels=3),
        pixfuse.reference.normalize(grey.expand(1, 3, 4, 5).contiguous(), pixfuse.IMAGENET),
    )


# --- mask ---


def test_the_mask_says_which_pixels_are_of_an_image() -> None:
    images = [torch.full((1, height, width), 9, dtype=torch.uint8) for height, width in LENGTHS]
    for mirror, flip in MIRROR_AND_FLIP:
        values, mask = crop_mirror_normalize(
            images,
            (6, 5),
            anchor=(0.3, 0.9),
            mirror=mirror,
            flip=flip,
            out_of_bounds="pad",
            fill=3,
            return_mask=True,
            dtype=torch.uint8,
        )
        assert mask.dtype is torch.bool
        assert mask.shape == (len(images), 6, 5)
        assert torch.equal(mask, values[:, 0] == 9)
        assert torch.equal(~mask, values[:, 0] == 3)
        assert bool(mask.any())
        assert not bool(mask.all())
