"""`pixfuse.reference` against the functions that it says it equals: the root of every proof.

Everything else is compared with the reference, so each test here is over all 256 byte values.
"""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from pixfuse.normalization import Rounding
from tests.bits import assert_same_bits
from tests.exact import nearest, round_to_float32
from tests.images import all_values
from tests.normalizations import EXTREMES, PRESETS, ROUNDINGS, made_up, of_any_units, with_rounding

transforms = import_torchvision("torchvision.transforms")
v2 = import_torchvision("torchvision.transforms.v2")

# Every preset, extremes of the range, and a few hundred that nobody would choose.
NORMALIZATIONS = [
    *PRESETS.values(),
    *(of_any_units(mean, std) for mean, std in EXTREMES),
    *(made_up(3, "torchvision", seed) for seed in range(200)),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_largest_result_is_that_of_the_arithmetic(rounding: Rounding) -> None:
    for normalization in NORMALIZATIONS:
        same = with_rounding(normalization, rounding)
        values = pixfuse.reference.normalize(all_values(len(same.mean)), same)
        assert same.largest == float(values.abs().max())


def per_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_is_v2(channels: int) -> None:
    images = all_values(channels)
    for normalization in NORMALIZATIONS:
        if len(normalization.mean) not in (1, channels):
            continue
        theirs = v2.Compose(
            [
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(normalization.mean), list(normalization.std)),
            ]
        )
        assert_same_bits(pixfuse.reference.normalize(images, normalization), theirs(images))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_torchvision_v1_is_v1_from_pillow(mode: str, channels: int) -> None:
    images = all_values(channels)
    pixels = images[0].permute(1, 2, 0).numpy()
    sample = Image.fromarray(pixels[:, :, 0] if mode == "L" else np.ascontiguousarray(pixels))
    assert sample.mode == mode
    for normalization in [*NORMALIZATIONS, made_up(4, "torchvision_v1")]:
        if len(normalization.mean) not in (1, channels):
            continue
        theirs = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize(list(normalization.mean), list(normalization.std)),
            ]
        )
        ours = pixfuse.reference.normalize(
            images,
            with_rounding(normalization, "torchvision_v1"),
            memory_format=torch.contiguous_format,
        )
        assert_same_bits(ours, torch.stack([theirs(sample)]))


def test_timm_is_its_prefetch_loader() -> None:
    # timm 1, timm/data/loader.py, PrefetchLoader:
    #   self.mean = torch.tensor([x * 255 for x in mean], device=device, dtype=img_dtype)
    #   self.std = torch.tensor([x * 255 for x in std], device=device, dtype=img_dtype)
    #   next_input = next_input.to(img_dtype).sub_(self.mean).div_(self.std)
    images = all_values(3)
    for normalization in NORMALIZATIONS:
        mean = per_channel(tuple(x * 255 for x in normalization.mean))
        std = per_channel(tuple(x * 255 for x in normalization.std))
        theirs = images.to(torch.float32).sub_(mean).div_(std)
        ours = pixfuse.reference.normalize(images, with_rounding(normalization, "timm"))
        assert_same_bits(ours, theirs)


def test_transformers_is_its_fast_image_processors() -> None:
    # transformers 4, image_processing_utils_fast.py, BaseImageProcessorFast:
    #   image_mean = torch.tensor(image_mean, device=device) * (1.0 / rescale_factor)
    #   image_std = torch.tensor(image_std, device=device) * (1.0 / rescale_factor)
    #   images = self.normalize(images.to(dtype=torch.float32), image_mean, image_std)
    # with rescale_factor = 1 / 255 and torchvision's normalize.
    rescale_factor = 1 / 255
    images = all_values(3)
    for normalization in NORMALIZATIONS:
        mean = torch.tensor(normalization.mean) * (1.0 / rescale_factor)
        std = torch.tensor(normalization.std) * (1.0 / rescale_factor)
        theirs = v2.functional.normalize(images.to(dtype=torch.float32), mean, std)
        ours = pixfuse.reference.normalize(images, with_rounding(normalization, "transformers"))
        assert_same_bits(ours, theirs)


def test_nearest_is_the_real_number_rounded_once() -> None:
    images = all_values(3)
    for normalization in NORMALIZATIONS[:80]:  # rational arithmetic takes its time
        ours = pixfuse.reference.normalize(images, with_rounding(normalization, "nearest"))
        for c in range(3):
            k = c if len(normalization.mean) == 3 else 0
            mean, std = normalization.mean[k], normalization.std[k]
            exact = torch.tensor([nearest(x, mean, std) for x in range(256)])
            assert_same_bits(ours[0, c].flatten(), exact[images[0, c].flatten().long()])


def test_nearest_is_float64_rounded_to_float32() -> None:
    images = all_values(3)
    for normalization in PRESETS.values():
        mean = torch.tensor(normalization.mean, dtype=torch.float64).view(-1, 1, 1)
        std = torch.tensor(normalization.std, dtype=torch.float64).view(-1, 1, 1)
        float64 = ((images.double() / 255 - mean) / std).float()
        ours = pixfuse.reference.normalize(images, with_rounding(normalization, "nearest"))
        # x / 255 - mean cancels in float64 too, so near zero it is the less exact one.
        near_zero = ours.abs() < 1e-6
        assert_same_bits(ours.masked_fill(near_zero, 0), float64.masked_fill(near_zero, 0))


def test_round_to_float32_is_right() -> None:
    source = random.Random(0)
    values = [source.uniform(-2, 2) * 2.0 ** source.randint(-160, 130) for _ in range(2000)]
    for exponent in (-149, -148, -127, -126, -3, 0, 127):
        for significand in (1, 2**23 - 1, 2**23 + 1, 2**24 - 1):
            middle = (significand + 0.5) * 2.0**exponent / 2**23  # halfway between two float32
            values += [middle, -middle, math.nextafter(middle, 0), math.nextafter(middle, math.inf)]
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(np.array(values).astype(np.float32))  # one rounding of a double
    assert_same_bits(torch.tensor([round_to_float32(Fraction(v)) for v in values]), expected)
    assert math.isinf(round_to_float32(Fraction(2) ** 128))
    assert round_to_float32(Fraction(1, 3)) == 0xAAAAAB / 2**25


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_low_precision_is_float32_rounded_once(rounding: Rounding) -> None:
    images = all_values(3)
    for normalization in [*PRESETS.values(), *(made_up(3, rounding, seed) for seed in range(20))]:
        chosen = with_rounding(normalization, rounding)
        float32 = pixfuse.reference.normalize(images, chosen)
        half = pixfuse.reference.normalize(images, chosen, dtype=torch.float16)
        assert_same_bits(half, torch.from_numpy(float32.numpy().astype(np.float16)))
        bfloat16 = pixfuse.reference.normalize(images, chosen, dtype=torch.bfloat16)
        assert_same_bits(bfloat16, round_to_bfloat16(float32))


def round_to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Half to even on the bit patterns; for finite values."""
    bits = values.view(torch.int32).numpy().astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(rounded.astype(np.int16)).view(torch.bfloat16)


def test_the_roundings_differ() -> None:
    """Else the tests above would show nothing about which is which."""
    images = all_values(3)
    results = {
        rounding: pixfuse.reference.normalize(images, with_rounding(pixfuse.IMAGENET, rounding))
        for rounding in ROUNDINGS
    }
    for a in ROUNDINGS:
        for b in ROUNDINGS:
            if a < b:
                assert not torch.equal(results[a], results[b]), (a, b)
                torch.testing.assert_close(results[a], results[b])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_layout", ["NCHW", "NHWC"])
def test_layout_and_memory_format(input_layout: str, memory_format: torch.memory_format) -> None:
    nchw = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    images = nchw if input_layout == "NCHW" else nchw.permute(0, 2, 3, 1).contiguous()
    ours = pixfuse.reference.normalize(
        images, pixfuse.CLIP, input_layout=input_layout, memory_format=memory_format
    )
    expected = pixfuse.reference.normalize(nchw, pixfuse.CLIP)
    assert_same_bits(ours, expected.contiguous(memory_format=memory_format))


def test_an_array_is_read_as_a_tensor_is() -> None:
    images = all_values(3)
    assert_same_bits(
        pixfuse.reference.normalize(images.numpy(), pixfuse.CLIP),
        pixfuse.reference.normalize(images, pixfuse.CLIP),
    )
