"""`pixfuse.transforms` in the place of torchvision's own, in its pipelines: no bit changes."""

import collections
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, Dataset

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from pixfuse.transforms import ToNormalized
from tests.bits import assert_same_bits
from tests.images import LAYOUTS, all_values, random_bytes
from tests.normalizations import DTYPES, PRESETS, made_up, with_rounding
from tests.processes import python

v1 = import_torchvision("torchvision.transforms")
v2 = import_torchvision("torchvision.transforms.v2")
tv_tensors = import_torchvision("torchvision.tv_tensors")

MODES = {"L": 1, "RGB": 3, "RGBA": 4}


def v2_tail(normalization: pixfuse.Normalization) -> list[Any]:
    """What ToNormalized replaces."""
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(normalization.mean), list(normalization.std)),
    ]


def v1_tail(normalization: pixfuse.Normalization) -> list[Any]:
    return [v1.ToTensor(), v1.Normalize(list(normalization.mean), list(normalization.std))]


def plain(image: torch.Tensor) -> torch.Tensor:
    """The tensor under a tv_tensor, contiguous: torchvision keeps the strides of its input."""
    return torch.empty(image.shape, dtype=image.dtype).copy_(image.as_subclass(torch.Tensor))


def assert_same_sample(ours: Any, theirs: Any) -> None:
    """Fails unless two samples have the same structure, and equal leaves of the same type.

    Where torchvision made a tv_tensors.Image of something else, ours is a plain tensor.
    """
    ours_leaves, ours_structure = torch.utils._pytree.tree_flatten(ours)
    theirs_leaves, theirs_structure = torch.utils._pytree.tree_flatten(theirs)
    assert ours_structure == theirs_structure
    for our, their in zip(ours_leaves, theirs_leaves, strict=True):
        if isinstance(their, torch.Tensor) and their.is_floating_point():
            assert_same_bits(our.as_subclass(torch.Tensor), plain(their))
        elif isinstance(their, torch.Tensor):
            assert type(our) is type(their)
            assert torch.equal(our, their)
        else:
            assert our is their


def pillow(mode: str, height: int = 16, width: int = 16) -> Image.Image:
    """An image in which every channel has all 256 values."""
    pixels = all_values(MODES[mode], height, width)[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[:, :, 0] if mode == "L" else np.ascontiguousarray(pixels))
    assert image.mode == mode
    return image


def normalizations(channels: int, rounding: Any = "torchvision") -> list[pixfuse.Normalization]:
    chosen = [*PRESETS.values(), *(made_up(channels, rounding, seed) for seed in range(20))]
    return [
        with_rounding(normalization, rounding)
        for normalization in chosen
        if len(normalization.mean) in (1, channels)
    ]


# --- every input against torchvision, all 256 values ---

INPUTS: dict[str, Callable[[int], Any]] = {
    "array": lambda channels: all_values(channels)[0].permute(1, 2, 0).contiguous().numpy(),
    "array of planes": lambda channels: all_values(channels)[0].numpy().transpose(1, 2, 0),
    "tensor": lambda channels: all_values(channels)[0],
    "tensor, channels last": lambda channels: (
        all_values(channels)[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    ),
    "batch": lambda channels: torch.cat([all_values(channels), all_values(channels).flip(3)]),
    "two batches": lambda channels: torch.stack([all_values(channels), all_values(channels)]),
    "many dimensions": lambda channels: all_values(channels).expand(2, 3, 1, -1, -1, -1),
    "empty batch": lambda channels: all_values(channels)[:0],
    "tv_tensors.Image": lambda channels: tv_tensors.Image(all_values(channels)[0]),
    "batch of tv_tensors.Image": lambda channels: tv_tensors.Image(all_values(channels)),
    "tv_tensors.Video": lambda channels: tv_tensors.Video(
        torch.cat([all_values(channels), all_values(channels).flip(2)])
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_pillow_is_v2(mode: str) -> None:
    image = pillow(mode)
    for normalization in normalizations(MODES[mode]):
        theirs = v2.Compose(v2_tail(normalization))(image)
        ours = ToNormalized(normalization)(image)
        assert type(ours) is torch.Tensor
        assert_same_bits(ours, plain(theirs))


@pytest.mark.parametrize("mode", MODES)
def test_pillow_is_v1(mode: str) -> None:
    image = pillow(mode)
    for normalization in normalizations(MODES[mode], "torchvision_v1"):
        theirs = v1.Compose(v1_tail(normalization))(image)
        ours = v1.Compose([ToNormalized(normalization)])(image)
        assert_same_bits(ours, plain(theirs))


PER_IMAGE = [
    pixfuse.PerImageStandardization(),
    pixfuse.PerImageStandardization(per_channel=True, floor=20),
]


@pytest.mark.parametrize("per_image", PER_IMAGE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_standardized_as_the_function_does(
    channels: int, dtype: torch.dtype, per_image: pixfuse.PerImageStandardization
) -> None:
    """Every image and every frame by its own mean and std, whatever holds it."""
    transform = ToNormalized(per_image, dtype)

    def expected(pixels: torch.Tensor) -> torch.Tensor:
        whole = pixels.reshape(-1, *pixels.shape[-3:])
        standardized = pixfuse.standardize_per_image(
            whole, per_image.per_channel, per_image.floor, dtype=dtype
        )
        again = pixfuse.reference.standardize_per_image(
            whole, per_image.per_channel, per_image.floor, dtype=dtype
        )
        assert_same_bits(standardized, again)
        return standardized.view(pixels.shape)

    for kind, make in INPUTS.items():
        image = make(channels)
        pixels = plain(v2.functional.to_image(image) if "array" in kind else image)
        ours = transform(image)
        assert_same_bits(ours.as_subclass(torch.Tensor), expected(pixels))
        assert type(ours) is (type(image) if kind.endswith(("Image", "Video")) else torch.Tensor)
    for mode in (mode for mode, count in MODES.items() if count == channels):
        image = pillow(mode, 17, 31)
        pixels = plain(v2.functional.to_image(image))
        assert_same_bits(transform((image, 3))[0], expected(pixels))


def test_standardized_in_a_pipeline() -> None:
    """Behind a crop: its pixels, not those of the image it came from."""
    per_image = pixfuse.PerImageStandardization(floor=1.0)
    image = pillow("RGB", 40, 40)
    ours = v2.Compose([v2.CenterCrop(16), ToNormalized(per_image)])(image)
    pixels = plain(v2.functional.center_crop(v2.functional.to_image(image), 16))
    assert_same_bits(ours, pixfuse.standardize_per_image(pixels, floor=1.0))
    again = pickle.loads(pickle.dumps(ToNormalized(per_image)))
    assert repr(again) == (
        "ToNormalized(PerImageStandardization(per_channel=False, floor=1.0), dtype=torch.float32)"
    )
    assert_same_bits(again(pixels), ours)


def test_it_does_not_care_for_torchs_default_device() -> None:
    image = pillow("RGB", 5, 7)
    for transform in (ToNormalized(pixfuse.IMAGENET), ToNormalized(PER_IMAGE[0])):
        expected = transform(image)
        with torch.device("meta"):
            ours = transform(image)
        assert_same_bits(ours, expected)


def test_standardized_errors() -> None:
    transform = ToNormalized(PER_IMAGE[0])
    with pytest.raises(ValueError, match=r"^ToNormalized: expected images\[0\] to have pixels, "):
        transform(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(TypeError, match=r"^ToNormalized: expected a Pillow image of mode"):
        transform(Image.new("CMYK", (3, 3)))
    with pytest.raises(TypeError, match=r"^ToNormalized: expected normalization .*, got type"):
        ToNormalized(pixfuse.PerImageStandardization)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", INPUTS)
def test_input_is_v2(kind: str, channels: int) -> None:
    image = INPUTS[kind](channels)
    before = copy.deepcopy(image)
    for normalization in normalizations(channels):
        theirs = v2.Compose(v2_tail(normalization))(image)
        ours = ToNormalized(normalization)(image)
        assert_same_bits(ours.as_subclass(torch.Tensor), plain(theirs))
        assert type(ours) is (type(image) if kind.endswith(("Image", "Video")) else torch.Tensor)
    assert type(image) is type(before)
    assert np.array_equal(np.asarray(image), np.asarray(before))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_array_is_v1(channels: int) -> None:
    image = INPUTS["array"](channels)
    for normalization in normalizations(channels, "torchvision_v1"):
        theirs = v1.Compose(v1_tail(normalization))(image)
        assert_same_bits(ToNormalized(normalization)(image), plain(theirs))


def test_an_image_without_a_channel_dimension_has_one() -> None:
    pixels = all_values(1)[0, 0]
    theirs = v2.Compose(v2_tail(pixfuse.MNIST))(pixels)
    ours = ToNormalized(pixfuse.MNIST)
    for image in (pixels, pixels.numpy(), Image.fromarray(pixels.numpy())):
        assert_same_bits(ours(image), plain(theirs))


def test_black_and_white_is_v2_and_v1() -> None:
    image = pillow("L").convert("1")
    assert np.unique(np.asarray(image)).tolist() == [False, True]
    for normalization in (pixfuse.UNIT, pixfuse.MNIST, pixfuse.SIGNED):
        theirs = v2.Compose(v2_tail(normalization))(image)
        assert_same_bits(ToNormalized(normalization)(image), plain(theirs))
        first = with_rounding(normalization, "torchvision_v1")
        assert_same_bits(ToNormalized(first)(image), plain(v1.Compose(v1_tail(first))(image)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    images = LAYOUTS[layout](2, 3, 5, 6)
    expected = pixfuse.reference.normalize(images, pixfuse.CLIP)
    ours = ToNormalized(pixfuse.CLIP)
    assert_same_bits(ours(images), expected)
    assert_same_bits(ours(images[1]), expected[1])
    assert_same_bits(ours(images[1].permute(1, 2, 0).numpy()), expected[1])
    assert_same_bits(ours(images[1].permute(1, 2, 0).numpy()[::-1, ::-1]), expected[1].flip(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(dtype: torch.dtype) -> None:
    expected = pixfuse.reference.normalize(all_values(3), pixfuse.CLIP, dtype=dtype)[0]
    transform = ToNormalized(pixfuse.CLIP, dtype)
    for image in (pillow("RGB"), INPUTS["array"](3), INPUTS["tensor"](3)):
        assert_same_bits(transform(image), expected)


def test_the_two_versions_of_torchvision_differ() -> None:
    """Else the tests above would not show which is which."""
    image = pillow("RGB")
    second = ToNormalized(pixfuse.IMAGENET)(image)
    first = ToNormalized(with_rounding(pixfuse.IMAGENET, "torchvision_v1"))(image)
    assert not torch.equal(first, second)


# --- samples: what is an image, and what is left alone ---


class Sample(NamedTuple):
    image: Any
    label: Any


def boxes() -> Any:
    return tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(16, 16))


def mask() -> Any:
    return tv_tensors.Mask(torch.ones(16, 16, dtype=torch.uint8))


SAMPLES: dict[str, Callable[[], Any]] = {
    "pair": lambda: (pillow("RGB"), 7),
    "list": lambda: [pillow("RGB"), "a label", None, 0.5],
    "dict": lambda: {"image": pillow("RGB"), "label": 7, "name": "x.jpg"},
    "ordered dict": lambda: collections.OrderedDict(label=7, image=pillow("RGB")),
    "named tuple": lambda: Sample(pillow("RGB"), "cat"),
    "nested": lambda: ({"views": [pillow("RGB"), (pillow("RGB"), 1)]}, {"target": {"id": 3}}),
    "Pillow, tensor label": lambda: (pillow("RGB"), torch.tensor(7)),
    "tensor label, Pillow": lambda: (torch.tensor(7), pillow("RGB")),
    "Pillow, image-like tensor": lambda: (pillow("RGB"), random_bytes(3, 4, 5)),
    "tv image, image-like tensor": lambda: (
        random_bytes(3, 4, 5),
        tv_tensors.Image(random_bytes(3, 6, 7)),
    ),
    "video, image-like tensor": lambda: (
        random_bytes(3, 4, 5),
        tv_tensors.Video(random_bytes(2, 3, 6, 7)),
    ),
    "two tensors": lambda: (random_bytes(3, 4, 5), random_bytes(3, 4, 5)),
    "tensor, tensor label": lambda: (random_bytes(3, 4, 5), torch.tensor(7)),
    "two arrays": lambda: (INPUTS["array"](3), INPUTS["array"](3)),
    "array, numpy label": lambda: (INPUTS["array"](3), np.int64(7)),
    "array, image-like tensors": lambda: (
        INPUTS["array"](3),
        random_bytes(3, 4, 5),
        random_bytes(3, 4, 5),
    ),
    "array and Pillow": lambda: (INPUTS["array"](3), pillow("RGB"), random_bytes(3, 4, 5)),
    "masks and boxes": lambda: (
        pillow("RGB"),
        {"masks": mask(), "boxes": boxes(), "labels": torch.tensor([1])},
    ),
    "tensor, masks and boxes": lambda: {
        "mask": mask(),
        "boxes": boxes(),
        "image": random_bytes(3, 16, 16),
    },
    "float tensor beside Pillow": lambda: (pillow("RGB"), torch.rand(3, 4, 5)),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_sample_is_v2(kind: str) -> None:
    sample = SAMPLES[kind]()
    theirs = v2.Compose(v2_tail(pixfuse.IMAGENET))(sample)
    assert_same_sample(ToNormalized(pixfuse.IMAGENET)(sample), theirs)


def test_several_arguments_are_v2() -> None:
    image, label = pillow("RGB"), torch.tensor(7)
    theirs = v2.Compose(v2_tail(pixfuse.IMAGENET))(image, label, {"mask": mask()})
    ours = ToNormalized(pixfuse.IMAGENET)(image, label, {"mask": mask()})
    assert isinstance(ours, tuple)
    assert_same_sample(ours, theirs)


def test_a_difference_between_samples_is_noticed() -> None:
    image = pillow("RGB")
    theirs = v2.Compose(v2_tail(pixfuse.IMAGENET))((image, torch.tensor(7)))
    ours = ToNormalized(pixfuse.IMAGENET)((image, torch.tensor(8)))
    with pytest.raises(AssertionError):
        assert_same_sample(ours, theirs)
    with pytest.raises(AssertionError):
        assert_same_sample(list(theirs), theirs)
    with pytest.raises(AssertionError):
        assert_same_sample((ours[0] + 0.5, theirs[1]), theirs)


def test_a_tensor_label_beside_an_array() -> None:
    """Here torchvision takes the label for an image, and fails."""
    image, label = INPUTS["array"](3), torch.tensor(7)
    with pytest.raises(ValueError, match="Tensor must be 2D or higher"):
        v2.Compose(v2_tail(pixfuse.IMAGENET))((image, label))
    ours = ToNormalized(pixfuse.IMAGENET)((image, label))
    assert_same_bits(ours[0], pixfuse.reference.normalize(all_values(3), pixfuse.IMAGENET)[0])
    assert ours[1] is label


# --- in pipelines ---


@pytest.mark.parametrize("kind", ["Pillow", "tensor", "tv_tensors.Image", "dict"])
def test_in_a_v2_pipeline(kind: str) -> None:
    images: dict[str, Any] = {
        "Pillow": Image.fromarray(random_bytes(40, 50, 3).numpy()),
        "tensor": random_bytes(3, 40, 50),
        "tv_tensors.Image": tv_tensors.Image(random_bytes(3, 40, 50)),
        "dict": {"image": Image.fromarray(random_bytes(40, 50, 3).numpy()), "label": 3},
    }

    def augment() -> list[Any]:
        return [
            v2.RandomResizedCrop(24, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2),
        ]

    ours = v2.Compose([*augment(), ToNormalized(pixfuse.IMAGENET)])
    theirs = v2.Compose([*augment(), *v2_tail(pixfuse.IMAGENET)])
    for seed in range(10):
        torch.manual_seed(seed)
        expected = theirs(images[kind])
        torch.manual_seed(seed)
        assert_same_sample(ours(images[kind]), expected)


def test_in_a_v1_pipeline() -> None:
    image = Image.fromarray(random_bytes(40, 50, 3).numpy())
    normalization = with_rounding(pixfuse.IMAGENET, "torchvision_v1")
    augment = [v1.RandomResizedCrop(24), v1.RandomHorizontalFlip()]
    ours = v1.Compose([*augment, ToNormalized(normalization)])
    theirs = v1.Compose([*augment, *v1_tail(normalization)])
    for seed in range(10):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert_same_bits(ours(image), expected)


def test_before_random_erasing() -> None:
    """A plain tensor is what the transforms after it take for the image."""
    sample = (pillow("RGB"), torch.tensor(7))
    theirs = v2.Compose([*v2_tail(pixfuse.IMAGENET), v2.RandomErasing(p=1.0)])
    ours = v2.Compose([ToNormalized(pixfuse.IMAGENET), v2.RandomErasing(p=1.0)])
    torch.manual_seed(1)
    expected = theirs(sample)
    torch.manual_seed(1)
    assert_same_sample(ours(sample), expected)


def test_in_a_sequential() -> None:
    images = random_bytes(2, 3, 20, 20)
    model = nn.Sequential(v2.CenterCrop(8), ToNormalized(pixfuse.CLIP))
    expected = pixfuse.reference.normalize(images[..., 6:14, 6:14], pixfuse.CLIP)
    assert_same_bits(model(images), expected)


class Pictures(Dataset[tuple[Any, int]]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Any, int]:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, (9, 10, 3), dtype=torch.uint8, generator=generator)
        sample: tuple[Any, int] = self.transform((Image.fromarray(pixels.numpy()), index))
        return sample


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers(method: str) -> None:
    loader = DataLoader(
        Pictures(ToNormalized(pixfuse.IMAGENET)),
        batch_size=4,
        num_workers=2,
        multiprocessing_context=method,
    )
    theirs = DataLoader(Pictures(v2.Compose(v2_tail(pixfuse.IMAGENET))), batch_size=4)
    for ours, expected in zip(loader, theirs, strict=True):
        assert_same_bits(ours[0], plain(expected[0]))
        assert torch.equal(ours[1], expected[1])


# --- as a module ---


def test_repr_is_what_one_writes() -> None:
    transform = ToNormalized(pixfuse.Normalization(0.45, 0.225, "timm"), torch.bfloat16)
    assert repr(transform) == (
        "ToNormalized(Normalization(mean=(0.45,), std=(0.225,), rounding='timm'), "
        "dtype=torch.bfloat16)"
    )
    names = {"ToNormalized": ToNormalized, "Normalization": pixfuse.Normalization, "torch": torch}
    again = eval(repr(transform), names)
    assert again.normalization == transform.normalization
    assert again.dtype is transform.dtype
    assert "    ToNormalized(Normalization(mean=" in repr(v2.Compose([transform]))


def test_it_is_pixfuse_transforms() -> None:
    assert pixfuse.transforms.ToNormalized is ToNormalized
    assert ToNormalized().normalization == pixfuse.UNIT
    assert ToNormalized().dtype is torch.float32


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(again: Callable[[Any], Any]) -> None:
    transform = ToNormalized(pixfuse.CLIP, torch.float16)
    copied = again(transform)
    assert copied.normalization == transform.normalization
    assert_same_bits(copied(pillow("RGB")), transform(pillow("RGB")))


def test_it_has_no_state() -> None:
    transform = ToNormalized(pixfuse.CLIP)
    assert transform.state_dict() == {}
    assert list(transform.parameters()) == []
    expected = transform(pillow("RGB"))
    assert_same_bits(transform.half().eval().train()(pillow("RGB")), expected)


def test_it_imports_neither_torchvision_nor_pillow() -> None:
    result = python(
        "import sys, torch, pixfuse\n"
        "image = torch.zeros(3, 4, 5, dtype=torch.uint8)\n"
        "assert pixfuse.transforms.ToNormalized()((image, 1))[0].shape == (3, 4, 5)\n"
        "assert pixfuse.transforms.ToNormalized()(image.numpy()).shape == (5, 3, 4)\n"
        "assert not {'torchvision', 'PIL'} & set(sys.modules)\n"
    )
    assert result.returncode == 0, result.stderr


# --- torch.compile ---


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["tensor", "batch", "two batches", "pair"])
def test_compiled_is_eager(kind: str) -> None:
    transform = ToNormalized(pixfuse.IMAGENET)
    sample = (all_values(3), torch.tensor(7)) if kind == "pair" else INPUTS[kind](3)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(transform, backend=counter, fullgraph=True)
    assert_same_sample(run(sample), transform(sample))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_behind_v2() -> None:
    pipeline = nn.Sequential(v2.CenterCrop(8), ToNormalized(pixfuse.IMAGENET))
    images = random_bytes(2, 3, 20, 20)
    run = torch.compile(pipeline, backend="aot_eager")
    assert_same_bits(run(images), pipeline(images))


# --- bad input ---


def truncated() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(random_bytes(64, 64, 3).numpy()).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))


BAD_SAMPLES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "text": (
        lambda: "image.jpg",
        TypeError,
        r"expected a sample with a Pillow image, a numpy array or a tensor, got str$",
    ),
    "no image": (
        lambda: {"label": 7, "mask": mask()},
        TypeError,
        r"expected a sample with .*, got int, Mask$",
    ),
    "nothing": (list, TypeError, r"expected a sample with .*, got nothing$"),
    "float tensor": (
        lambda: torch.rand(3, 4, 5),
        TypeError,
        r"expected an image of dtype uint8, got torch.float32; it stands in the place of .* not",
    ),
    "float tv image": (
        lambda: (tv_tensors.Image(torch.rand(3, 4, 5)), 1),
        TypeError,
        r"expected an image of dtype uint8, got torch.float32",
    ),
    "float array": (
        lambda: np.zeros((4, 5, 3), np.float32),
        TypeError,
        r"expected an array of dtype uint8, got float32; every array of a sample is taken",
    ),
    "array label": (
        lambda: (pillow("RGB"), np.array([1, 2])),
        TypeError,
        r"expected an array of dtype uint8, got int64; .* pass other data as a tensor or a number",
    ),
    "batch of arrays": (
        lambda: np.zeros((2, 4, 5, 3), np.uint8),
        ValueError,
        r"expected an array of shape \(H, W\) or \(H, W, C\), got \(2, 4, 5, 3\); for a batch",
    ),
    "flat array": (
        lambda: np.zeros(4, np.uint8),
        ValueError,
        r"expected an array of shape \(H, W\) or \(H, W, C\), got \(4,\)",
    ),
    "flat tensor": (
        lambda: torch.zeros(4, dtype=torch.uint8),
        ValueError,
        r"expected an image of shape \(C, H, W\) or .*, got \(4,\); the first plain tensor",
    ),
    "number": (
        lambda: (torch.tensor(4, dtype=torch.uint8), random_bytes(3, 4, 5)),
        ValueError,
        r"expected an image of shape .*, got \(\); the first plain tensor of a sample",
    ),
    **{
        f"mode {mode}": (
            lambda mode=mode: Image.new(mode, (5, 4)),  # type: ignore[misc]
            TypeError,
            rf"expected a Pillow image of mode 1, L, RGB, RGBA, got {mode}; use .*'RGB'",
        )
        for mode in ("P", "PA", "LA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")
    },
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_sample(case: str) -> None:
    make, error, message = BAD_SAMPLES[case]
    with pytest.raises(error, match=f"^ToNormalized: {message}"):
        ToNormalized()(make())


def test_no_arguments() -> None:
    with pytest.raises(TypeError, match=r"^ToNormalized: expected a sample with .*, got nothing$"):
        ToNormalized()()


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("L", "; convert the image to 3 channels before"),
        ("array", "; convert the image to 3 channels before"),
        ("tensor", r" channels in NCHW shape \(1, 16, 16\)"),
    ],
)
def test_channels_that_do_not_fit(kind: str, hint: str) -> None:
    """Here torchvision makes three channels of one."""
    image = pillow("L") if kind == "L" else INPUTS[kind](1)
    assert v2.Compose(v2_tail(pixfuse.IMAGENET))(image).shape == (3, 16, 16)
    message = r"^ToNormalized: expected images of 3 channels, as mean and std have 3 values, got 1"
    with pytest.raises(ValueError, match=rf"{message}{hint}$"):
        ToNormalized(pixfuse.IMAGENET)(image)


def test_errors_name_no_argument_that_there_is_not() -> None:
    with pytest.raises(
        ValueError,
        match=r"^ToNormalized: .* got 4 channels in NCHW shape \(4, 5, 3\); a tensor has its "
        r"channels first: pass image.movedim\(-1, -3\)$",
    ):
        ToNormalized(pixfuse.IMAGENET)(random_bytes(4, 5, 3))
    with pytest.raises(ValueError, match=r"^ToNormalized: expected images of 3 channels, .* got 2"):
        ToNormalized(pixfuse.IMAGENET)(np.zeros((4, 5, 2), np.uint8))
    with pytest.raises(OSError, match=r"^ToNormalized: expected the image to be .*truncated"):
        ToNormalized()(truncated())


def test_truncated_file() -> None:
    with pytest.raises(OSError, match="truncated"):
        ToNormalized()(truncated())


BAD_ARGUMENTS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "mean": (
        ((0.5, 0.5, 0.5),),
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got tuple; use pixfuse.Norm",
    ),
    "dtype": (
        (pixfuse.UNIT, torch.uint8),
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got torch.uint8",
    ),
    "dtype's name": (
        (pixfuse.UNIT, "float32"),
        TypeError,
        r"expected dtype to be torch.float32, .*, got 'float32'",
    ),
    "results": (
        (pixfuse.Normalization(0.0, 1e-9), torch.float16),
        ValueError,
        r"expected results that fit torch.float16 \(up to 65504\), got results up to 1e\+09; use",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case: str) -> None:
    arguments, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=f"^ToNormalized: {message}"):
        ToNormalized(*arguments)
