"""Collate: as torch's default_collate with the images normalized, in every kind of worker."""

import collections
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.photos import (
    CENTER,
    SMALL,
    Deadly,
    Endless,
    InBatches,
    Numbered,
    Photos,
    Small,
    Truncated,
    assert_photos,
    is_in_a_block,
    numbered,
    reference,
    with_place,
    with_state,
)
from tests.processes import (
    open_files,
    python,
    resident_bytes,
    shared_mappings,
    torch_files,
    torch_files_left,
)

v2 = import_torchvision("torchvision.transforms.v2")
tv_tensors = import_torchvision("torchvision.tv_tensors")


def pillow(height: int = 9, width: int = 10, mode: str = "RGB") -> Image.Image:
    channels = len(mode)
    array = random_bytes(height, width, channels).numpy()
    return Image.fromarray(array if channels > 1 else array[:, :, 0], mode)


def torchvision_pipeline(*first: Any, normalization: Any = pixfuse.IMAGENET) -> Any:
    return v2.Compose(
        [
            v2.ToImage(),
            *first,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(normalization.mean, normalization.std),
        ]
    )


def png(image: Image.Image) -> Image.Image:
    """What Pillow makes of a file: a class of its own, read when it is needed."""
    file = io.BytesIO()
    image.save(file, "png")
    return Image.open(file)


class Pair(NamedTuple):
    image: Any
    label: Any


# --- structures ---

STRUCTURES: dict[str, Callable[[Any, int], Any]] = {
    "image": lambda image, n: image,
    "tuple": lambda image, n: (image, n),
    "label first": lambda image, n: (f"{n}", n, image),
    "list": lambda image, n: [image, float(n)],
    "dict": lambda image, n: {"image": image, "label": n, "name": f"{n}.png"},
    "named tuple": lambda image, n: Pair(image, torch.tensor([n, n])),
    "ordered dict": lambda image, n: collections.OrderedDict(b=image, a=np.float32(n)),
    "nested": lambda image, n: {"x": [(image, n), Pair({"y": image}, b"n")], "z": (n, [n, n])},
    "two images": lambda image, n: (image, {"again": image}, n),
}


def assert_same_batch(actual: Any, expected: Any) -> None:
    """The same types, and the same bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        if expected.is_floating_point():
            assert_same_bits(actual, expected)
        else:
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same_batch(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_batch(a, e)
    else:
        assert actual == expected


@pytest.mark.parametrize("structure", STRUCTURES)
def test_as_torchvision_and_default_collate(structure: str) -> None:
    build = STRUCTURES[structure]
    images = [pillow() for _ in range(5)]
    transform = torchvision_pipeline()
    expected = default_collate([build(transform(image), n) for n, image in enumerate(images)])
    actual = pixfuse.Collate(pixfuse.IMAGENET)([build(image, n) for n, image in enumerate(images)])
    assert_same_batch(actual, expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_center_crop_as_torchvision(structure: str) -> None:
    build = STRUCTURES[structure]
    images = [pillow(20 + n, 31 - n) for n in range(6)]
    transform = torchvision_pipeline(v2.CenterCrop((9, 12)))
    expected = default_collate([build(transform(image), n) for n, image in enumerate(images)])
    collate = pixfuse.Collate(pixfuse.IMAGENET, (9, 12), "center")
    assert_same_batch(collate([build(image, n) for n, image in enumerate(images)]), expected)


def test_a_difference_is_noticed() -> None:
    batch = [torch.zeros(2, 3), torch.tensor([1]), "text"]
    for other in (
        (torch.zeros(2, 3), torch.tensor([1]), "text"),
        [torch.full((2, 3), -0.0), torch.tensor([1]), "text"],
        [torch.zeros(2, 3), torch.tensor([2]), "text"],
        [torch.zeros(2, 3), torch.tensor([1]), "test"],
    ):
        with pytest.raises(AssertionError):
            assert_same_batch(other, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_options(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    images = [pillow(n, 7, mode) for n, mode in ((5, "RGB"), (9, "L"), (30, "RGBA"))]
    options: dict[str, Any] = {
        "channels": 3,
        "out_of_bounds": "pad",
        "fill": (1, 2, 3),
        "dtype": dtype,
        "memory_format": memory_format,
    }
    collate = pixfuse.Collate(
        pixfuse.IMAGENET, (8, 8), "center", mirror=1, flip=1.0, return_mask=True, **options
    )
    ((actual, mask),) = collate([[image] for image in images])
    expected, expected_mask = pixfuse.reference.crop_mirror_normalize(
        images, 8, pixfuse.IMAGENET, mirror=True, flip=True, return_mask=True, **options
    )
    assert torch.equal(mask, expected_mask)
    if dtype is torch.uint8:
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
    else:
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("form", [tuple, list, np.array, torch.tensor])
@pytest.mark.parametrize("normalization", [pixfuse.IMAGENET, pixfuse.PerImageStandardization()])
def test_a_fill_of_any_form(normalization: Any, form: Callable[[Any], Any]) -> None:
    """As crop_mirror_normalize takes it."""
    images = [pillow()]
    options: dict[str, Any] = {"size": 20, "crop": "center", "out_of_bounds": "pad"}
    expected = pixfuse.Collate(normalization, fill=(1, 2, 250), **options)(images)
    actual = pixfuse.Collate(normalization, fill=form((1, 2, 250)), **options)(images)
    assert_same_bits(actual, expected)


def test_kinds_of_images_mix() -> None:
    image = pillow()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [image, array, array[::-1, ::-1], tensor, tv_tensors.Image(tensor)]
    actual = pixfuse.Collate(pixfuse.IMAGENET)(kinds)
    expected = reference(kinds, None, pixfuse.IMAGENET)
    assert_same_bits(actual, expected)


# --- each image by its own mean and std ---

STANDARDIZED = [
    pixfuse.PerImageStandardization(),
    pixfuse.PerImageStandardization(per_channel=True, floor=30),
]


@pytest.mark.parametrize("per_image", STANDARDIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_standardized_as_the_function_does(
    per_image: pixfuse.PerImageStandardization,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """Of the crop, mirrored and padded, as bytes: fill and all."""
    images = [pillow(n, 7, mode) for n, mode in ((5, "RGB"), (9, "L"), (30, "RGBA"))]
    options: dict[str, Any] = {
        "channels": 3,
        "out_of_bounds": "pad",
        "fill": (1, 2, 250),
        "memory_format": memory_format,
    }
    collate = pixfuse.Collate(
        per_image, (8, 8), "center", mirror=1, return_mask=True, dtype=dtype, **options
    )
    ((actual, mask), labels) = collate([(image, n) for n, image in enumerate(images)])
    pixels, expected_mask = pixfuse.reference.crop_mirror_normalize(
        images, 8, mirror=True, return_mask=True, dtype=torch.uint8, **options
    )
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(mask, expected_mask)
    assert 0 < int(mask.sum()) < mask.numel()
    if dtype is torch.uint8:
        assert torch.equal(actual, pixels)
        assert actual.stride() == pixels.stride()
        return
    chosen: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format}
    expected = pixfuse.standardize_per_image(
        pixels, per_image.per_channel, per_image.floor, **chosen
    )
    assert_same_bits(actual, expected)
    again = pixfuse.reference.standardize_per_image(
        pixels, per_image.per_channel, per_image.floor, **chosen
    )
    assert_same_bits(actual, again)


@pytest.mark.parametrize("per_image", STANDARDIZED)
def test_standardized_random_crops(per_image: pixfuse.PerImageStandardization) -> None:
    options: dict[str, Any] = {"size": 7, "crop": "random", "mirror": 0.5, "flip": 0.5}
    images = [pillow(9 + n, 20 - n) for n in range(10)]
    torch.manual_seed(3)
    packed = pixfuse.Collate(**options, dtype=torch.uint8)(images)
    torch.manual_seed(3)
    standardized = pixfuse.Collate(per_image, **options)(images)
    assert_same_bits(
        standardized,
        pixfuse.standardize_per_image(packed, per_image.per_channel, per_image.floor),
    )
    mean = standardized.double().mean((1, 2, 3))  # of the crop, so not that of the whole image
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_standardized_in_workers(method: str | None) -> None:
    options: dict[str, Any] = {"size": 100, "crop": "center"}
    per_image = pixfuse.PerImageStandardization(floor=2.0)
    loader = DataLoader(
        Photos(16),
        batch_size=8,
        collate_fn=WithPlace(pixfuse.Collate(per_image, **options)),
        num_workers=0 if method is None else 1,
        multiprocessing_context=method,
    )
    packing = pixfuse.Collate(dtype=torch.uint8, **options)
    batches = list(loader)
    assert len(batches) == 2
    for number, (batch, is_shared) in enumerate(batches):
        assert is_shared == (method is not None)
        pixels = packing([Photos()[index] for index in range(8 * number, 8 * number + 8)])
        expected = pixfuse.standardize_per_image(pixels["image"], False, 2.0)
        assert_same_bits(batch["image"], expected)


class WithPlace:
    """A collate function, and whether its images are in shared memory."""

    def __init__(self, collate: pixfuse.Collate) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        return batch, is_in_a_block(batch["image"])


def test_standardized_images_of_packed_bytes() -> None:
    """The longer way: bytes from the workers, floats in the main process."""
    options: dict[str, Any] = {"size": 100, "crop": "center"}
    per_image = pixfuse.PerImageStandardization(per_channel=True)
    packed = pixfuse.Collate(per_image, dtype=torch.uint8, **options)
    loader = DataLoader(Photos(16), batch_size=8, collate_fn=packed, num_workers=1)
    collate = pixfuse.Collate(per_image, **options)
    for number, batch in enumerate(pixfuse.DeviceLoader(loader, "cpu", per_image)):
        samples = [Photos()[index] for index in range(8 * number, 8 * number + 8)]
        assert_same_bits(batch["image"], collate(samples)["image"])


def test_standardized_pickle_and_repr() -> None:
    collate = pixfuse.Collate(pixfuse.PerImageStandardization(True, 3), 8, "center")
    again = pickle.loads(pickle.dumps(collate))
    assert repr(again) == repr(collate)
    assert "PerImageStandardization(per_channel=True, floor=3.0)" in repr(collate)
    images = [pillow(9, 9)] * 2
    assert_same_bits(again(images), collate(images))


# --- what is an image ---

IMAGES: dict[str, Any] = {
    "Pillow": pillow(),
    "Pillow L": pillow(mode="L"),
    "Pillow file": png(pillow()),
    "array of 3": random_bytes(5, 6, 3).numpy(),
    "array of 1": random_bytes(5, 6, 1).numpy(),
    "array of 4": random_bytes(5, 6, 4).numpy(),
    "tensor of 3": random_bytes(3, 5, 6),
    "tensor of 1": random_bytes(1, 5, 6),
    "tensor of 4": random_bytes(4, 5, 6),
    "tv_tensors.Image": tv_tensors.Image(random_bytes(3, 5, 6)),
}
NO_IMAGES: dict[str, Any] = {
    "rows of bytes": random_bytes(5, 6),
    "array (H, W)": random_bytes(5, 6).numpy(),
    "bytes": random_bytes(5).numpy(),
    "array (C, H, W)": random_bytes(3, 5, 6).numpy(),
    "tensor (H, W, C)": random_bytes(5, 6, 3),
    "two channels": random_bytes(2, 5, 6),
    "masks": tv_tensors.Mask(random_bytes(3, 5, 6)),
    "video": random_bytes(4, 3, 5, 6),
    "floats": torch.rand(3, 5, 6),
    "float array": np.ones((5, 6, 3)),
    "signed bytes": torch.ones(3, 5, 6, dtype=torch.int8),
    "bools": torch.ones(3, 5, 6, dtype=torch.bool),
    "scalar": torch.tensor(3, dtype=torch.uint8),
    "numpy scalar": np.uint8(7),
    "int": 3,
    "bool": True,
    "float": 2.5,
    "text": "text",
    "raw": b"raw",
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    image = IMAGES[name]
    (batch,) = pixfuse.Collate()([(image,)] * 3)
    assert_same_bits(batch, reference([image] * 3))


@pytest.mark.parametrize("name", NO_IMAGES)
def test_no_images(name: str) -> None:
    value = NO_IMAGES[name]
    samples = [{"value": value, "list": [value]}] * 3
    with pytest.warns(UserWarning, match="Collate: expected images in the samples, got none"):
        batch = pixfuse.Collate()(samples)
    assert_same_batch(batch, default_collate(samples))
    image = pillow()
    batch = pixfuse.Collate()([sample | {"image": image} for sample in samples])  # no warning
    assert_same_bits(batch.pop("image"), reference([image] * 3))
    assert_same_batch(batch, default_collate(samples))


def test_channels_say_what_else_is_an_image() -> None:
    five, array = random_bytes(5, 6, 7), random_bytes(6, 7, 5).numpy()
    collate = pixfuse.Collate(channels=5)
    for image in (five, array):
        expected = reference([image, image], channels=5)
        assert_same_bits(collate([image, image]), expected)


class Box:
    pass


def test_torchs_table_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is when a batch is made, as torch's own function does."""
    samples = [(pillow(), Box()), (pillow(), Box())]
    collate = pixfuse.Collate()
    with pytest.raises(TypeError, match="default_collate: batch must contain"):
        collate(samples)
    monkeypatch.setitem(
        default_collate_fn_map, Box, lambda batch, *, collate_fn_map: f"{len(batch)} boxes"
    )
    images, boxes = collate(samples)
    assert boxes == "2 boxes"
    assert images.shape == (2, 3, 9, 10)


def test_pillow_is_not_imported() -> None:
    code = """
import sys
import numpy, torch, pixfuse
x, y = pixfuse.Collate()([(torch.zeros(3, 4, 5, dtype=torch.uint8), numpy.ones((4, 5, 3)))] * 2)
print(tuple(x.shape), tuple(y.shape), "PIL" in sys.modules, "torchvision" in sys.modules)
"""
    result = python(code)
    assert result.stderr == ""
    assert result.stdout == "(2, 3, 4, 5) (2, 4, 5, 3) False False\n"


def test_pickle_and_repr() -> None:
    collate = pixfuse.Collate(
        pixfuse.IMAGENET, 8, "random", mirror=0.5, memory_format=torch.channels_last
    )
    again = pickle.loads(pickle.dumps(collate))
    assert repr(again) == repr(collate)
    assert "crop='random', mirror=0.5" in repr(collate)
    images = [pillow() for _ in range(6)]
    torch.manual_seed(1)
    expected = collate(images)
    torch.manual_seed(1)
    assert_same_bits(again(images), expected)


# --- chance ---


def corners(batch: torch.Tensor) -> list[tuple[int, int]]:
    """Top and left of each window of numbered images; checks the rest of it."""
    _, _, height, width = batch.shape
    found = []
    for window in batch:
        top, left = int(window[0].min()), int(window[1].min())
        assert torch.equal(
            window[0].sort(0).values.long(),
            torch.arange(top, top + height)[:, None].expand(-1, width),
        )
        assert torch.equal(
            window[1].sort(1).values.long(), torch.arange(left, left + width).expand(height, -1)
        )
        found.append((top, left))
    return found


def test_random_crops_are_uniform() -> None:
    """Over all places, the first and the last included, as torchvision's RandomCrop."""
    collate = pixfuse.Collate(size=(5, 7), crop="random", dtype=torch.uint8)
    counts = collections.Counter(
        corner for _ in range(40) for corner in corners(collate([numbered(8, 9)] * 100))
    )
    places = [(top, left) for top in range(4) for left in range(3)]
    assert sorted(counts) == places
    expected = 4000 / len(places)
    chi_squared = sum((counts[place] - expected) ** 2 / expected for place in places)
    assert chi_squared < 31.3  # 11 degrees of freedom: exceeded once in 1,000 seeds


def test_random_crops_of_torchvision_have_the_same_range() -> None:
    image = tv_tensors.Image(torch.from_numpy(numbered(8, 9)).permute(2, 0, 1).contiguous())
    theirs = set(corners(torch.stack([v2.RandomCrop((5, 7))(image) for _ in range(400)])))
    assert sorted(theirs) == [(top, left) for top in range(4) for left in range(3)]


def test_random_crops_of_smaller_images() -> None:
    """Any place around the image, as torchvision's RandomCrop(pad_if_needed=True)."""
    collate = pixfuse.Collate(
        size=(6, 5),
        crop="random",
        out_of_bounds="pad",
        fill=99,
        return_mask=True,
        dtype=torch.uint8,
    )
    image = numbered(4, 7)
    places: collections.Counter[tuple[int, int]] = collections.Counter()
    for _ in range(10):
        batch, mask = collate([image] * 100)
        for window, inside in zip(batch, mask, strict=True):
            rows = inside.any(1).nonzero()[:, 0].tolist()
            assert rows == list(range(rows[0], rows[0] + 4))
            assert bool((window[2][~inside] == 99).all())
            assert bool((window[2][inside] == 200).all())
            places[rows[0], int(window[1][rows[0], 0])] += 1
    assert sorted(places) == [(row, column) for row in range(3) for column in range(3)]
    assert min(places.values()) > 70


def test_random_crops_of_images_of_many_sizes() -> None:
    collate = pixfuse.Collate(pixfuse.IMAGENET, 5, "random", mirror=0.5, flip=0.5)
    packed = pixfuse.Collate(pixfuse.IMAGENET, 5, "random", mirror=0.5, flip=0.5, dtype=torch.uint8)
    images = [numbered(5 + n % 7, 5 + n // 7) for n in range(49)]
    torch.manual_seed(5)
    bytes_ = packed(images)
    torch.manual_seed(5)
    floats = collate(images)
    for image, (top, left) in zip(images, corners(bytes_), strict=True):
        assert 0 <= top <= image.shape[0] - 5
        assert 0 <= left <= image.shape[1] - 5
    mirrored = [bool(window[1, 0, 0] > window[1, 0, 1]) for window in bytes_]
    flipped = [bool(window[0, 0, 0] > window[0, 1, 0]) for window in bytes_]
    assert 10 < sum(mirrored) < 40
    assert 10 < sum(flipped) < 40
    assert mirrored != flipped
    tops, lefts = zip(*corners(bytes_), strict=True)
    expected = reference(
        images, 5, pixfuse.IMAGENET, top=tops, left=lefts, mirror=mirrored, flip=flipped
    )
    assert_same_bits(floats, expected)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("option", ["mirror", "flip"])
def test_probabilities(option: str, probability: float) -> None:
    options: dict[str, Any] = {option: probability}
    batch = pixfuse.Collate(dtype=torch.uint8, **options)([numbered(3, 3)] * 4000)
    turned = batch[:, 1, 0, 0] > 0 if option == "mirror" else batch[:, 0, 0, 0] > 0
    assert abs(int(turned.sum()) - 4000 * probability) <= 4 * 4000**0.5 * 0.5 * (
        0 < probability < 1
    )


def test_nothing_is_drawn_without_need() -> None:
    before = torch.get_rng_state()
    pixfuse.Collate(size=4, crop="center")([numbered(8, 8)] * 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_reproducible() -> None:
    collate = pixfuse.Collate(size=4, crop="random", dtype=torch.uint8)
    torch.manual_seed(7)
    first, second = collate([numbered(60, 60)] * 8), collate([numbered(60, 60)] * 8)
    torch.manual_seed(7)
    assert torch.equal(collate([numbered(60, 60)] * 8), first)
    assert not torch.equal(second, first)


def test_images_of_a_sample_are_drawn_apart_or_alike() -> None:
    options: dict[str, Any] = {"size": 8, "crop": "random", "mirror": 0.5, "dtype": torch.uint8}
    samples = [{"a": numbered(40, 40), "b": (numbered(40, 40), 1)} for _ in range(20)]
    apart = pixfuse.Collate(**options)(samples)
    assert sum(torch.equal(a, b) for a, b in zip(apart["a"], apart["b"][0], strict=True)) < 3
    alike = pixfuse.Collate(**options, same_within_sample=True)(samples)
    assert torch.equal(alike["a"], alike["b"][0])
    assert len(set(corners(alike["a"]))) > 15


# --- workers ---


@pytest.mark.parametrize("method", [None, "fork", "spawn", "forkserver"])
def test_start_methods(method: str | None) -> None:
    CENTER([Photos()[0]])  # the parent has threads and a warm cache
    loader = DataLoader(
        Photos(),
        batch_size=8,
        collate_fn=CENTER,
        num_workers=0 if method is None else 2,
        multiprocessing_context=method,
        persistent_workers=method == "spawn",
    )
    for _ in range(2 if method == "spawn" else 1):
        assert_photos(list(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_datasets(workers: int) -> None:
    loader = DataLoader(Endless(), batch_size=5, collate_fn=CENTER, num_workers=workers)
    assert_photos(list(loader), shuffled=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_of_batches(workers: int) -> None:
    """batch_size=None: what the dataset gives is the batch."""
    loader = DataLoader(InBatches(), batch_size=None, collate_fn=CENTER, num_workers=workers)
    assert_photos(list(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_write_into_shared_memory(workers: int) -> None:
    loader = DataLoader(Photos(), batch_size=8, collate_fn=with_place, num_workers=workers)
    shared = {is_shared for _, is_shared in loader}
    assert shared == {workers > 0}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_options_in_workers(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    collate = pixfuse.Collate(
        pixfuse.IMAGENET,
        100,
        "center",
        return_mask=True,
        out_of_bounds="pad",
        dtype=dtype,
        memory_format=memory_format,
    )
    loader = DataLoader(Photos(8), batch_size=8, collate_fn=collate, num_workers=1)
    here = collate([Photos()[index] for index in range(8)])
    (there,) = loader
    assert here["image"][0].stride() == there["image"][0].stride()
    assert torch.equal(here["image"][0], there["image"][0])
    assert torch.equal(here["image"][1], there["image"][1])
    assert isinstance(there["image"], (tuple, list))


def test_file_system_sharing() -> None:
    """The other way in which torch shares memory; in a process of its own, as it is global."""
    code = """
import torch
from torch.utils.data import DataLoader
from tests.photos import CENTER, Photos, assert_photos
torch.multiprocessing.set_sharing_strategy("file_system")
assert_photos(list(DataLoader(Photos(), batch_size=8, collate_fn=CENTER, num_workers=2)))
print("ended")
"""
    result = python(code)
    assert result.stderr == ""
    assert result.stdout == "ended\n"


@pytest.mark.parametrize("persistent", [False, True])
def test_chance_in_workers(persistent: bool) -> None:
    """Other numbers in each worker and each epoch, the same ones again from the same seed."""
    collate = pixfuse.Collate(size=4, crop="random", dtype=torch.uint8)

    def epochs() -> list[list[tuple[int, int]]]:
        torch.manual_seed(11)
        loader = DataLoader(
            Numbered(),
            batch_size=6,
            collate_fn=collate,
            num_workers=2,
            persistent_workers=persistent,
        )
        return [[c for images, _ in loader for c in corners(images)] for _ in range(3)]

    first = epochs()
    assert epochs() == first
    batches = [tuple(epoch[n : n + 6]) for epoch in first for n in range(0, 24, 6)]
    assert len(set(batches)) == len(batches) == 12
    assert len({corner for batch in batches for corner in batch}) > 60


def test_packed_bytes_for_a_device_loader() -> None:
    packed = pixfuse.Collate(size=100, crop="center", dtype=torch.uint8)
    loader = DataLoader(Photos(), batch_size=8, collate_fn=packed, num_workers=2)
    assert_photos(list(pixfuse.DeviceLoader(loader, "cpu", pixfuse.IMAGENET)))


def test_pinned(cuda: torch.device) -> None:
    loader = DataLoader(Photos(), batch_size=8, collate_fn=CENTER, num_workers=2, pin_memory=True)
    batches = list(loader)
    assert all(batch["image"].is_pinned() for batch in batches)
    assert_photos(batches)


def test_the_main_process_recycles_memory() -> None:
    loader = DataLoader(Photos(), batch_size=8, collate_fn=CENTER)
    gc.collect()
    pixfuse.empty_cache()
    before = pixfuse.info()["output_buffer"]
    for _ in range(2):
        for batch in loader:
            assert batch["image"].nbytes < 1 << 20 or not batch["image"].is_shared()
            del batch
    after = pixfuse.info()["output_buffer"]
    if CENTER([Photos()[0]] * 8)["image"].nbytes >= 1 << 20:
        assert after["allocated"] - before["allocated"] <= 2
        assert after["reused"] - before["reused"] >= 4


# --- leaks, crashes ---


def test_a_thousand_batches_leave_nothing() -> None:
    files = torch_files()
    loader = DataLoader(Small(4000), batch_size=4, collate_fn=with_state, num_workers=2)
    states = []
    for number, (images, labels, there) in enumerate(loader):
        assert images.shape == (4, 3, 64, 64)
        if number % 100 == 99:
            here = torch.tensor([resident_bytes("RssAnon"), open_files(), shared_mappings()])
            states.append((here.tolist(), there.tolist()))
        del images, labels, there
    assert number == 999
    for place in (0, 1):  # here, and in the workers
        memory, descriptors, mappings = zip(*(s[place] for s in states), strict=True)
        assert max(memory[5:]) - max(memory[:5]) < 4 << 20  # 1,000 batches are 190 MiB
        assert max(descriptors[5:]) - max(descriptors[:5]) <= 4
        assert max(mappings) <= 12
    gc.collect()
    assert shared_mappings() == 0
    assert torch_files_left(files) == set()


def test_growth_would_be_noticed() -> None:
    """What the test above looks at grows when batches are kept."""
    loader = DataLoader(Small(80), batch_size=4, collate_fn=SMALL, num_workers=1)
    before = (open_files(), shared_mappings(), resident_bytes("RssShmem"))
    kept = list(loader)
    assert shared_mappings() >= before[1] + len(kept)
    sum(float(images.sum()) for images, _ in kept)
    assert resident_bytes("RssShmem") - before[2] >= 20 * 4 * 3 * 64 * 64 * 4


def test_a_killed_worker() -> None:
    files = torch_files()
    loader = DataLoader(Deadly(), batch_size=4, collate_fn=CENTER, num_workers=2)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(?s?\)? \d+"):
        list(loader)
    gc.collect()
    assert shared_mappings() == 0
    assert torch_files_left(files) == set()


MESSAGE_OF_13 = r"Collate: expected the window of the image of sample 5 inside its 4 x 4"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_sample(workers: int) -> None:
    files = torch_files()
    loader = DataLoader(Photos(bad=13), batch_size=8, collate_fn=CENTER, num_workers=workers)
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match=MESSAGE_OF_13):
        next(batches)
    next(batches)  # the worker goes on
    assert next(batches, None) is None
    del batches
    gc.collect()
    assert shared_mappings() == 0
    assert torch_files_left(files) == set()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_file_names_the_sample(workers: int) -> None:
    loader = DataLoader(Truncated(), batch_size=8, collate_fn=CENTER, num_workers=workers)
    batches = iter(loader)
    next(batches)
    with pytest.raises(OSError, match=r"Collate: expected the image of sample 3 to be an image th"):
        next(batches)


class Unloadable(Image.Image):
    """What some plugins do with a damaged file."""

    def load(self) -> Any:
        raise TypeError("unsupported operand")


def test_a_file_that_fails_with_any_error_names_the_sample() -> None:
    message = (
        r"^Collate: expected the image of sample 2 to be an image that Pillow can read, got "
        r"TypeError: unsupported operand$"
    )
    with pytest.raises(ValueError, match=message) as caught:
        pixfuse.Collate()([pillow(), pillow(), Unloadable()])
    assert isinstance(caught.value.__cause__, TypeError)


# --- bad input ---

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "crop": (
        {"size": 4, "crop": "middle"},
        ValueError,
        r"^Collate: expected crop to be 'center', 'random' or None, got 'middle'$",
    ),
    "size without crop": (
        {"size": (4, 5)},
        ValueError,
        r"^Collate: expected crop with size=\(4, 5\), got None; choose crop='center' or crop='ran",
    ),
    "crop without size": (
        {"crop": "random"},
        ValueError,
        r"^Collate: expected size with crop='random', got None; pass size=$",
    ),
    "mirror as a bool": (
        {"mirror": True},
        TypeError,
        r"^Collate: expected mirror to be a probability from 0 to 1, got True; 0.5 is for half",
    ),
    "mirror as text": ({"mirror": "0.5"}, TypeError, r"mirror to be a probability .*, got '0.5'"),
    "mirror too large": (
        {"mirror": 1.5},
        ValueError,
        r"^Collate: expected mirror to be a probability from 0 to 1, got 1.5$",
    ),
    "flip": ({"flip": float("nan")}, ValueError, r"flip to be a probability from 0 to 1, got nan"),
    "normalization": (
        {"normalization": 0.5},
        TypeError,
        r"^Collate: expected normalization to be a pixfuse.Normalization",
    ),
    "size": (
        {"size": 0, "crop": "center"},
        ValueError,
        r"^Collate: expected size to be positive, got 0",
    ),
    "size of three": (
        {"size": (1, 2, 3), "crop": "center"},
        ValueError,
        r"^Collate: expected size to be an int or \(height, width\), got 3 values",
    ),
    "channels": ({"channels": 0}, ValueError, r"^Collate: expected channels to be positive, got 0"),
    "channels of the normalization": (
        {"normalization": pixfuse.IMAGENET, "channels": 4},
        ValueError,
        r"^Collate: expected images of 3 channels, as mean and std have 3 values, got 4",
    ),
    "out of bounds": (
        {"out_of_bounds": "clip"},
        ValueError,
        r"^Collate: expected out_of_bounds to be 'error' or 'pad', got 'clip'",
    ),
    "fill": ({"fill": 256}, ValueError, r"^Collate: expected fill from 0 to 255, got 256"),
    "fill space": (
        {"fill_space": "raw"},
        ValueError,
        r"^Collate: expected fill_space to be 'input' or 'out",
    ),
    "dtype": (
        {"dtype": torch.float64},
        TypeError,
        r"^Collate: expected dtype to be .*, got torch.float64",
    ),
    "memory format": (
        {"memory_format": torch.preserve_format},
        ValueError,
        r"^Collate: expected memory_format to be .*, got torch.preserve_format",
    ),
}


PER_IMAGE = pixfuse.PerImageStandardization()
ERRORS |= {
    "per image: fill space": (
        {"normalization": PER_IMAGE, "fill_space": "output", "fill": 0.5},
        ValueError,
        r"^Collate: expected fill_space to be 'input' with a PerImageStandardization, got 'output'"
        r"; the fill is among the pixels whose mean and std are taken$",
    ),
    "per image: fill": (
        {"normalization": PER_IMAGE, "fill": (1, 2.5, 3)},
        ValueError,
        r"^Collate: expected fill to be a whole number with a PerImageStandardization, got "
        r"\(1, 2.5, 3\); it is among",
    ),
    "per image: fill out of range": (
        {"normalization": PER_IMAGE, "fill": 256},
        ValueError,
        r"^Collate: expected fill from 0 to 255, got 256",
    ),
    "per image: dtype": (
        {"normalization": PER_IMAGE, "dtype": torch.float64},
        TypeError,
        r"^Collate: expected dtype to be .*, got torch.float64",
    ),
    "per image: the class": (
        {"normalization": pixfuse.PerImageStandardization},
        TypeError,
        r"^Collate: expected normalization to be a pixfuse.Normalization, got type",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    """When the object is made, not when the first batch is."""
    options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        pixfuse.Collate(**options)


RGB = pillow(6, 6)
BAD_SAMPLES: dict[str, tuple[Any, type[Exception], str]] = {
    "none": ([], ValueError, r"^Collate: expected at least 1 sample, got none$"),
    "one image": (
        RGB,
        TypeError,
        r"^Collate: expected samples to be a list, got Image; with batch_size=None a DataLoader",
    ),
    "a generator": (
        (n for n in (1, 2)),
        TypeError,
        r"expected samples to be a list, got generator",
    ),
    "an image and its label": (
        (RGB, torch.tensor(3)),
        TypeError,
        r"got Image in sample 0 and Tensor of shape \(\) and dtype torch.int64 in sample 1$",
    ),
    "no image among images": (
        [RGB, RGB, random_bytes(6, 6).numpy()],
        TypeError,
        r"^Collate: expected images in the same place of all samples or of none, got Image in "
        r"sample 0 and ndarray of shape \(6, 6\) and dtype uint8 in sample 2; array\[..., None\] m",
    ),
    "floats among images": (
        [random_bytes(3, 6, 6), torch.rand(3, 6, 6)],
        TypeError,
        r"got Tensor of shape \(3, 6, 6\) and dtype torch.uint8 in sample 0 and .*torch.float32 in",
    ),
    "an image among floats": (
        [torch.rand(3, 6, 6), torch.rand(3, 6, 6), RGB],
        TypeError,
        r"torch.float32 in sample 0 and Image in sample 2$",
    ),
    "rows among images": (
        [random_bytes(6, 6), random_bytes(3, 6, 6)],
        TypeError,
        r"in sample 1; tensor\[None\] makes an image of \(H, W\)$",
    ),
    "sizes": (
        [(RGB, 1), (RGB, 2), (pillow(6, 7), 3)],
        ValueError,
        r"^Collate: expected images of one size, as size is None, got 6 x 6 in the image of sample "
        r"0 and 6 x 7 in the image of sample 2",
    ),
    "channels": (
        [{"x": RGB}, {"x": pillow(6, 6, "RGBA")}],
        ValueError,
        r"^Collate: expected images of one channel count, got 3 in the image of sample 0 and 4 in",
    ),
    "mode": (
        [RGB, Image.new("F", (6, 6))],
        TypeError,
        r"^Collate: expected the image of sample 1 of a Pillow mode with 8 bits",
    ),
    "lengths": (
        [(RGB, 1), (RGB,)],
        RuntimeError,
        r"each element in list of batch should be of equ",
    ),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples(case: str) -> None:
    samples, kind, message = BAD_SAMPLES[case]
    with pytest.raises(kind, match=message):
        pixfuse.Collate()(samples)


def test_one_sample_with_its_label() -> None:
    """What a DataLoader with batch_size=None hands over."""
    with pytest.raises(TypeError):
        list(DataLoader(Numbered(), batch_size=None, collate_fn=CENTER))
