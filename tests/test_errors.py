"""Bad input: the class and the words of each error, and that nothing was written."""

import contextlib
import math
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import pixfuse
from pixfuse import Normalization, _library
from pixfuse.normalization import Rounding
from tests.images import quantized
from tests.processes import python

IMAGES = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)


def images_in_a_buffer() -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and a float32 tensor of their shape that shares some of their memory."""
    buffer = torch.zeros(4 * IMAGES.numel() + 64, dtype=torch.uint8)
    images = buffer[60 : 60 + IMAGES.numel()].view(IMAGES.shape)
    return images, buffer[64:].view(torch.float32).view(IMAGES.shape)


def sparse() -> torch.Tensor:
    return IMAGES.to_sparse()


# --- Normalization ---

BAD_NORMALIZATIONS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "text": ("0.5", 0.5, TypeError, r"expected mean to be a number or a sequence .*, got '0.5'"),
    "none": (0.5, None, TypeError, r"expected std to be a number or a sequence .*, got None"),
    "nested": ([[0.5]], 0.5, TypeError, r"expected mean to be a number .*, got \[\[0.5\]\]"),
    "words": (0.5, ["a", "b"], TypeError, r"expected std to be a number .*, got \['a', 'b'\]"),
    "set": (
        {0.1, 0.2},
        0.5,
        TypeError,
        r"expected mean to be .*, got \{.*; pass a list",
    ),
    "frozen set": (0.5, frozenset([1.0]), TypeError, r"expected std to be .*, got frozenset.*list"),
    "mapping": ({0.1: "red", 0.2: "green"}, 0.5, TypeError, r"expected mean to be .*; pass a list"),
    "keys": ({0.1: 0, 0.2: 0}.keys(), 0.5, TypeError, r"expected mean to be .*; pass a list"),
    "complex": (0.5j, 0.5, TypeError, r"expected mean to be a number .*, got 0.5j"),
    "empty": ([], 0.5, ValueError, r"expected mean to have at least 1 value, got none"),
    "lengths": (
        [0.5, 0.5],
        [1, 1, 1],
        ValueError,
        r"expected mean and std to have the same length, got 2 and 3",
    ),
    "nan mean": (math.nan, 1, ValueError, r"expected mean to be finite, got nan"),
    "infinite mean": ([0, math.inf], 1, ValueError, r"expected mean to be finite, got inf in"),
    "huge mean": (1e38, 1, ValueError, r"expected 255 \* mean to fit float32, got mean 1e\+38"),
    "zero std": (0.5, [0.5, 0.0], ValueError, r"expected std to be above 0, got 0.0 in"),
    "negative zero std": (0.5, -0.0, ValueError, r"expected std to be above 0, got -0.0"),
    "negative std": (0.5, -0.5, ValueError, r"expected std to be above 0, got -0.5"),
    "nan std": (0.5, math.nan, ValueError, r"expected std to be finite, got nan"),
    "infinite std": (0.5, math.inf, ValueError, r"expected std to be finite, got inf"),
    "std that vanishes": (
        0.5,
        1e-46,
        ValueError,
        r"expected std to stay above 0 and finite when rounded to float32 .*, got 1e-46",
    ),
    "std too large": (0.5, 1e39, ValueError, r"expected std to stay above 0 and finite .* 1e\+39"),
    "results too large": (
        0.5,
        1e-40,
        ValueError,
        r"expected mean and std whose results fit float32, got results up to 5e\+39 .*larger std",
    ),
}


@pytest.mark.parametrize("case", BAD_NORMALIZATIONS)
def test_normalization(case: str) -> None:
    mean, std, error, message = BAD_NORMALIZATIONS[case]
    with pytest.raises(error, match=f"^Normalization: {message}"):
        Normalization(mean, std)


@pytest.mark.parametrize(
    ("mean", "std", "named"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "mean 123.675"),
        ((0.0, 1.75), 1.0, "mean 1.75"),
        (1.25, 58.395, "std 58.395"),
    ],
)
def test_units_of_bytes_are_warned_of(mean: Any, std: Any, named: str) -> None:
    with pytest.warns(
        UserWarning,
        match=rf"^Normalization: {named} is in units of 0\.\.255, it seems; pixfuse takes units of "
        r"\[0, 1\]: divide mean and std by 255$",
    ) as caught:
        normalization = Normalization(mean, std)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert max(normalization.mean) == max(np.atleast_1d(mean))


@pytest.mark.parametrize(("mean", "std"), [(1.5, 1.0), (-200.0, 1.0), (1.0, 255.0), (0.0, 1e7)])
def test_units_that_may_well_be_meant(mean: float, std: float) -> None:
    Normalization(mean, std)  # a warning would be an error here


def test_rounding() -> None:
    with pytest.raises(
        ValueError,
        match=r"^Normalization: expected rounding to be one of torchvision, torchvision_v1, timm, "
        r"transformers, nearest, got 'exact'",
    ):
        Normalization(0, 1, "exact")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"^Normalization: expected rounding to be a str\w*, got int"
    ):
        Normalization(0, 1, 4)  # type: ignore[arg-type]


# The real results are below the largest float32, 3.4028235e38; their roundings are not.
BEYOND_FLOAT32 = (0.0676483282116509, 2.7399356931288797e-39)


@pytest.mark.parametrize("rounding", ["torchvision", "torchvision_v1", "transformers"])
def test_results_that_only_the_rounding_makes_infinite(rounding: Rounding) -> None:
    mean, std = BEYOND_FLOAT32
    assert (1 - mean) / std < torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match=r"^Normalization: expected .* fit float32.* 3\.4e\+38"):
        Normalization(mean, std, rounding)
    assert Normalization(mean, 1.001 * std, rounding).largest > 3.39e38


def test_a_normalization_keeps_the_order_of_what_has_one() -> None:
    values = {"red": 0.4, "green": 0.3, "blue": 0.2}
    for mean in (values.values(), iter(values.values()), np.array([0.4, 0.3, 0.2])):
        assert Normalization(mean, 1.0).mean == (0.4, 0.3, 0.2)


def test_a_normalization_is_a_value() -> None:
    a, b = Normalization([0.5, 0.5], 0.25), Normalization((0.5, 0.5), torch.tensor([0.25, 0.25]))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Normalization([0.5, 0.5], 0.25, "nearest")
    assert a.mean == (0.5, 0.5)
    assert a.std == (0.25, 0.25)
    assert eval(repr(a), {"Normalization": Normalization}) == a
    with pytest.raises(AttributeError, match="cannot assign to field 'mean'"):
        a.mean = (0.0,)  # type: ignore[misc]


# --- normalize ---

Errors = type[Exception] | tuple[type[Exception], ...]

# Keyword arguments that differ from a good call; the class of the error; its words.
BAD_CALLS: dict[str, tuple[Callable[[], dict[str, Any]], Errors, str]] = {
    "float images": (
        lambda: {"images": IMAGES.float()},
        TypeError,
        r"expected images of dtype uint8, got torch.float32; .*bytes",
    ),
    "int8 images": (
        lambda: {"images": IMAGES.to(torch.int8)},
        TypeError,
        r"expected images of dtype uint8, got torch.int8",
    ),
    "bool images": (
        lambda: {"images": IMAGES > 3},
        TypeError,
        r"expected images of dtype uint8, got torch.bool",
    ),
    "float array": (
        lambda: {"images": IMAGES.numpy() / 255},
        TypeError,
        r"expected images of dtype uint8, got float64",
    ),
    "int8 array": (
        lambda: {"images": IMAGES.numpy().astype(np.int8)},
        TypeError,
        r"expected images of dtype uint8, got int8",
    ),
    "list of tensors": (
        lambda: {"images": [IMAGES[0], IMAGES[1]]},
        TypeError,
        r"expected images to be a torch.Tensor or a numpy.ndarray, got list; stack them",
    ),
    "no images": (
        lambda: {"images": None},
        TypeError,
        r"expected images to be a torch.Tensor or a numpy.ndarray, got NoneType",
    ),
    "rank 2": (
        lambda: {"images": IMAGES[0, 0]},
        ValueError,
        r"expected images to have 4 dimensions \(a batch\) or 3 \(one image\), got shape \(4, 5\)",
    ),
    "rank 5": (
        lambda: {"images": IMAGES[None]},
        ValueError,
        r"expected images to have 4 dimensions .*, got shape \(1, 2, 3, 4, 5\)",
    ),
    "rank 0 array": (
        lambda: {"images": np.array(3, dtype=np.uint8)},
        ValueError,
        r"expected images to have 4 dimensions .*, got shape \(\)",
    ),
    "negative strides": (
        lambda: {"images": IMAGES.numpy()[:, :, ::-1]},
        ValueError,
        r"expected images to have no negative strides, got \(.*-5.*\); .*copy\(\)",
    ),
    "sparse images": (
        lambda: {"images": sparse()},
        NotImplementedError,
        r"expected images to be a dense tensor, got layout torch.sparse_coo; .*to_dense",
    ),
    "quantized images": (
        lambda: {"images": quantized(2, 3, 4, 5)},
        TypeError,
        r"expected images of dtype uint8, got torch.quint8",
    ),
    "meta images": (
        lambda: {"images": IMAGES.to("meta")},
        NotImplementedError,
        r"expected images on a device that has a kernel \(cpu.*\), got meta",
    ),
    "unknown layout": (
        lambda: {"input_layout": "CHW"},
        ValueError,
        r"expected input_layout to be 'NCHW' or 'NHWC', got 'CHW'",
    ),
    "layout in lower case": (
        lambda: {"input_layout": "nhwc"},
        ValueError,
        r"expected input_layout to be 'NCHW' or 'NHWC', got 'nhwc'",
    ),
    "layout that is no name": (
        lambda: {"input_layout": None},
        ValueError,
        r"expected input_layout to be 'NCHW' or 'NHWC', got None",
    ),
    "other layout fits": (
        lambda: {"images": IMAGES.permute(0, 2, 3, 1)},
        ValueError,
        r"expected images of 3 channels, .* got 4 channels in NCHW shape \(2, 4, 5, 3\); "
        r'the shape fits input_layout="NHWC"',
    ),
    "other layout fits, the other way": (
        lambda: {"input_layout": "NHWC"},
        ValueError,
        r'got 5 channels in NHWC shape \(2, 3, 4, 5\); the shape fits input_layout="NCHW"',
    ),
    "no layout fits": (
        lambda: {"images": IMAGES[:, :2], "input_layout": "NHWC"},
        ValueError,
        r"expected images of 3 channels, .* got 5 channels in NHWC shape \(2, 2, 4, 5\)$",
    ),
    "other layout fits one image": (
        lambda: {"images": IMAGES[0], "input_layout": "NHWC"},
        ValueError,
        r"got 5 channels in NHWC shape \(3, 4, 5\); the shape fits input_layout=\"NCHW\"",
    ),
    "wrong number of channels": (
        lambda: {"images": IMAGES[:, :2]},
        ValueError,
        r"expected images of 3 channels, as mean and std have 3 values, got 2 channels in NCHW "
        r"shape \(2, 2, 4, 5\)$",
    ),
    "one grey channel with three means": (
        lambda: {"images": IMAGES[:, :1]},
        ValueError,
        r"expected images of 3 channels, .*, got 1 channels?",
    ),
    "normalization that is none": (
        lambda: {"normalization": (0.5, 0.5)},
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got tuple; use",
    ),
    "float64 result": (
        lambda: {"dtype": torch.float64},
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got torch.float64",
    ),
    "list as dtype": (
        lambda: {"dtype": [torch.float32]},
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got \[torch.float32\]",
    ),
    "list as memory format": (
        lambda: {"memory_format": [1]},
        ValueError,
        r"expected memory_format to be torch.contiguous_format, .* got \[1\]",
    ),
    "uint8 result": (
        lambda: {"dtype": torch.uint8},
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got torch.uint8",
    ),
    "dtype of numpy": (
        lambda: {"dtype": np.float32},
        TypeError,
        r"expected dtype to be torch.float32, float16 or bfloat16, got <class 'numpy.float32'>",
    ),
    "results beyond float16": (
        lambda: {"normalization": Normalization(0.0, 1e-5), "dtype": torch.float16},
        ValueError,
        r"expected results that fit torch.float16 \(up to 65504\), got results up to 100000; use",
    ),
    "memory format for video": (
        lambda: {"memory_format": torch.channels_last_3d},
        ValueError,
        r"expected memory_format to be torch.contiguous_format, channels_last or preserve_format, "
        r"got torch.channels_last_3d",
    ),
    "memory format that is none": (
        lambda: {"memory_format": "channels_last"},
        (TypeError, ValueError),
        r"expected memory_format to be torch.contiguous_format, .* got '?channels_last",
    ),
    "out that is no tensor": (
        lambda: {"out": np.zeros((2, 3, 4, 5), np.float32)},
        TypeError,
        r"expected out to be a torch.Tensor, got ndarray",
    ),
    "out of another shape": (
        lambda: {"out": torch.zeros(2, 3, 5, 4)},
        ValueError,
        r"expected out of shape \(2, 3, 4, 5\), got \(2, 3, 5, 4\)",
    ),
    "out of another rank": (
        lambda: {"out": torch.zeros(1, 2, 3, 4, 5)},
        ValueError,
        r"expected out of shape \(2, 3, 4, 5\), got \(1, 2, 3, 4, 5\)",
    ),
    "out that would broadcast": (
        lambda: {"out": torch.zeros(1, 3, 4, 5)},
        ValueError,
        r"expected out of shape \(2, 3, 4, 5\), got \(1, 3, 4, 5\)",
    ),
    "out of another dtype": (
        lambda: {"out": torch.zeros(2, 3, 4, 5, dtype=torch.float16)},
        TypeError,
        r"expected out of dtype torch.float32, got torch.float16; pass dtype=",
    ),
    "out on another device": (
        lambda: {"out": torch.zeros(2, 3, 4, 5, device="meta")},
        ValueError,
        r"expected out on the device of images \(cpu\), got meta",
    ),
    "out in another format": (
        lambda: {"out": torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2)},
        ValueError,
        r"expected out to be dense in torch.contiguous_format with strides \(60, 20, 5, 1\), got "
        r"strides \(60, 1, 15, 3\)",
    ),
    "out with gaps": (
        lambda: {"out": torch.zeros(2, 3, 4, 6)[..., :5]},
        ValueError,
        r"expected out to be dense in .*, got strides \(72, 24, 6, 1\)",
    ),
    "out that overlaps itself": (
        lambda: {"out": torch.zeros(1, 3, 4, 5).expand(2, 3, 4, 5)},
        ValueError,
        r"expected out to be dense in .*, got strides \(0, 20, 5, 1\)",
    ),
    "out over the images": (
        lambda: dict(zip(("images", "out"), images_in_a_buffer(), strict=True)),
        ValueError,
        r"expected out to share no memory with images, got an overlap",
    ),
    "out that requires a gradient": (
        lambda: {"out": torch.zeros(2, 3, 4, 5, requires_grad=True)},
        ValueError,
        r"expected out not to require a gradient, got requires_grad=True",
    ),
    "sparse out": (
        lambda: {"out": torch.zeros(2, 3, 4, 5).to_sparse()},
        NotImplementedError,
        r"expected out to be a dense tensor, got layout torch.sparse_coo",
    ),
    "quantized out": (
        lambda: {"out": quantized(2, 3, 4, 5)},
        TypeError,
        r"expected out of dtype torch.float32, got torch.quint8",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_normalize(case: str) -> None:
    make, error, message = BAD_CALLS[case]
    arguments: dict[str, Any] = {"images": IMAGES, "normalization": pixfuse.CLIP, **make()}
    out = arguments.get("out")
    readable = isinstance(out, torch.Tensor) and out.layout == torch.strided and not out.is_meta
    before = out.detach().clone() if readable else None  # type: ignore[union-attr]
    with pytest.raises(error, match=f"normalize: .*{message}") as caught:
        pixfuse.normalize(**arguments)
    assert str(caught.value).startswith("normalize: expected ")
    if before is not None:
        assert torch.equal(out.detach(), before), "out was written to"  # type: ignore[union-attr]


@pytest.mark.parametrize("case", [name for name in BAD_CALLS if "out" not in BAD_CALLS[name][0]()])
def test_out_is_untouched_by_any_error(case: str) -> None:
    """Also where something else than `out` is wrong."""
    make, *_ = BAD_CALLS[case]
    arguments: dict[str, Any] = {"images": IMAGES, "normalization": pixfuse.CLIP, **make()}
    out = torch.full((2, 3, 4, 5), 7.0)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        pixfuse.normalize(**arguments, out=out)
    assert bool((out == 7.0).all())


def freed(tensor: torch.Tensor, left: int = 0) -> torch.Tensor:
    """A tensor whose storage was given back, as FSDP does it, or made smaller."""
    tensor.untyped_storage().resize_(left)
    return tensor


@pytest.mark.parametrize("side", [8, 700])  # small images go another way
@pytest.mark.parametrize(
    ("name", "call"),
    {
        "images": pixfuse.normalize,
        "out": lambda out: pixfuse.normalize(out.new_zeros(out.shape).byte(), out=out),
        "images of channel_histogram": pixfuse.channel_histogram,
        "images of image_moments": pixfuse.image_moments,
        "images of standardize_per_image": pixfuse.standardize_per_image,
        "tensor": lambda tensor: pixfuse.denormalize(tensor, pixfuse.UNIT),
        "input": lambda input: pixfuse.conv_bias_relu(input, torch.ones(8, 3, 3, 3)),
        "weight": lambda weight: pixfuse.conv_bias_relu(torch.ones(1, 3, 900, 900), weight),
        "bias": lambda bias: pixfuse.conv_bias_relu(
            torch.ones(1, 3, 9, 9), torch.ones(bias.numel(), 3, 3, 3), bias.flatten()
        ),
    }.items(),
)
def test_memory_that_was_freed(name: str, call: Callable[[torch.Tensor], Any], side: int) -> None:
    of_bytes = name.startswith("images")
    tensor = torch.zeros(2, 3, side, side, dtype=torch.uint8 if of_bytes else torch.float32)
    message = (
        f"expected {name.split(maxsplit=1)[0]} to have memory for [0-9]+ bytes, got a storage of "
    )
    with pytest.raises(ValueError, match=f"{message}0; was it freed or resized"):
        call(freed(tensor))
    if side > 8:
        # By its shape `out` may reach into the images, wherever its 100 bytes come to lie.
        overlap = "|out to share no memory with images" if name == "out" else ""
        with pytest.raises(ValueError, match=f"{message}100; {overlap}"):
            call(freed(tensor.new_zeros(tensor.shape), left=100))


OF_INFERENCE: dict[str, Callable[[torch.Tensor], Any]] = {
    "normalize": lambda out: pixfuse.normalize(IMAGES, out=out),
    "normalize, one image": lambda out: pixfuse.normalize(IMAGES[0], out=out[0]),
    "crop_mirror_normalize": lambda out: pixfuse.crop_mirror_normalize(IMAGES, out=out),
    "standardize_per_image": lambda out: pixfuse.standardize_per_image(IMAGES, out=out),
    "denormalize": lambda out: pixfuse.denormalize(IMAGES.float(), pixfuse.UNIT, out=out),
}


@pytest.mark.parametrize("call", OF_INFERENCE)
def test_out_of_inference_mode_is_for_inference_mode(call: str) -> None:
    with torch.inference_mode():
        dtype = torch.uint8 if call == "denormalize" else torch.float32
        out = torch.full((2, 3, 4, 5), 7, dtype=dtype)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        torch.add(torch.zeros_like(out), 7, out=out)  # torch's own, after it has written
    message = rf"^{call.partition(',')[0]}: expected out to be an ordinary tensor, .*; write to it"
    with pytest.raises(RuntimeError, match=message):
        OF_INFERENCE[call](out)
    assert bool((out == 7).all())
    with torch.inference_mode():
        OF_INFERENCE[call](out)


def test_positional_options_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        pixfuse.normalize(IMAGES, pixfuse.CLIP, "NHWC")  # type: ignore[call-arg]


def test_unusual_images_that_are_fine() -> None:
    """No error: a Parameter-like subclass, an inference tensor, images that share their bytes."""
    expected = pixfuse.reference.normalize(IMAGES, pixfuse.CLIP)
    with torch.inference_mode():
        inference = IMAGES.clone()
    assert torch.equal(pixfuse.normalize(inference, pixfuse.CLIP), expected)
    assert not pixfuse.normalize(IMAGES, pixfuse.CLIP).requires_grad


# --- torch.ops: the same, whoever calls ---

GOOD = {
    "images": IMAGES,
    "mean": [0.5],
    "std": [0.5],
    "rounding": 0,
    "input_layout": 0,
}
OUT_OR_NOT = ("normalize", "normalize_out")


def call_operator(name: str, **changes: Any) -> torch.Tensor | None:
    arguments: dict[str, Any] = {**GOOD, **changes}
    if name == "normalize":
        arguments.pop("out", None)
        defaults = {"dtype": 0, "memory_format": 0}
        return torch.ops.pixfuse.normalize(**{**defaults, **arguments})  # type: ignore[no-any-return]
    arguments.setdefault("out", torch.full((2, 3, 4, 5), 7.0))
    torch.ops.pixfuse.normalize_out(**arguments)
    return None


DTYPE = "normalize: expected images of dtype uint8"
DTYPE_CODE = r"normalize: expected dtype 0 \(float32\), 1 \(float16\) or 2 \(bfloat16\)"
ROUNDING = "normalize: expected rounding from 0 to 4, got"
BAD_OPERANDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "float images": (
        lambda: {"images": IMAGES.float()},
        DTYPE,
    ),
    "int8 images": (
        lambda: {"images": IMAGES.to(torch.int8)},
        DTYPE,
    ),
    "rank 2": (
        lambda: {"images": IMAGES[0, 0]},
        "normalize: expected images to have 3 or 4 dimensions, got 2",
    ),
    "rank 5": (
        lambda: {"images": IMAGES[None]},
        "normalize: expected images to have 3 or 4 dimensions, got 5",
    ),
    "sparse images": (lambda: {"images": sparse()}, "Sparse"),
    "quantized images": (lambda: {"images": quantized(2, 3, 4, 5)}, "Quantized"),
    "no mean": (lambda: {"mean": []}, r"normalize: expected mean and std with 1 value or one per"),
    "no std": (lambda: {"std": []}, r"normalize: expected mean and std with 1 value or one per"),
    "two means": (
        lambda: {"mean": [0.5, 0.5]},
        r"normalize: expected mean and std with 1 value or one per channel \(3\), got 2",
    ),
    "four stds": (
        lambda: {"std": [0.5] * 4},
        r"normalize: expected mean and std with 1 value or one per channel \(3\), got 4",
    ),
    "zero std": (lambda: {"std": [0.5, 0.0, 0.5]}, "normalize: expected std above 0 and finite"),
    "negative std": (lambda: {"std": [-1.0]}, "normalize: expected std above 0 and finite"),
    "nan std": (lambda: {"std": [math.nan]}, "normalize: expected std above 0 and finite"),
    "infinite std": (lambda: {"std": [math.inf]}, "normalize: expected std above 0 and finite"),
    "std that vanishes": (lambda: {"std": [1e-46]}, "normalize: expected std above 0 and finite"),
    "nan mean": (lambda: {"mean": [math.nan]}, "normalize: expected mean finite"),
    "infinite mean": (lambda: {"mean": [-math.inf]}, "normalize: expected mean finite"),
    "unknown rounding": (
        lambda: {"rounding": 5},
        f"{ROUNDING} 5",
    ),
    "negative rounding": (lambda: {"rounding": -1}, f"{ROUNDING} -1"),
    "huge rounding": (
        lambda: {"rounding": 2**32},
        f"{ROUNDING} 4294967296",
    ),
    "unknown layout": (
        lambda: {"input_layout": 2},
        r"normalize: expected input_layout 0 \(NCHW\) or 1 \(NHWC\)",
    ),
}
BAD_RESULTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "unknown dtype": (lambda: {"dtype": 3}, rf"{DTYPE_CODE}, got 3"),
    "negative dtype": (lambda: {"dtype": -1}, rf"{DTYPE_CODE}, got -1"),
    "huge dtype": (lambda: {"dtype": 2**32}, rf"{DTYPE_CODE}, got 4294967296"),
    "unknown format": (lambda: {"memory_format": 3}, "normalize: expected memory_format .*, got 3"),
    "negative format": (lambda: {"memory_format": -1}, "normalize: expected memory_format .* -1"),
}
BAD_OUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "shape": (
        lambda: {"out": torch.zeros(2, 3, 4, 6)},
        r"normalize: expected out of shape \(N, C, H, W\) = \(2, 3, 4, 5\), got size 6 in dim",
    ),
    "rank": (
        lambda: {"out": torch.zeros(3, 4, 5)},
        "normalize: expected out with as many dimensions as images",
    ),
    "rank 1": (lambda: {"out": torch.zeros(120)}, "normalize: expected out to have 3 or 4 dim"),
    "dtype": (
        lambda: {"out": torch.zeros(2, 3, 4, 5, dtype=torch.float64)},
        "normalize: expected out.dtype to be float32, float16 or bfloat16",
    ),
    "gaps": (
        lambda: {"out": torch.zeros(2, 3, 4, 6)[..., :5]},
        "normalize: expected out to be contiguous or channels_last",
    ),
    "overlaps itself": (
        lambda: {"out": torch.zeros(1, 3, 4, 5).expand(2, 3, 4, 5)},
        "normalize: expected out to be contiguous or channels_last",
    ),
    "overlaps the images": (
        lambda: dict(zip(("images", "out"), images_in_a_buffer(), strict=True)),
        "normalize: expected out to share no memory with images",
    ),
    "sparse": (lambda: {"out": torch.zeros(2, 3, 4, 5).to_sparse()}, "Sparse"),
    "quantized": (lambda: {"out": quantized(2, 3, 4, 5)}, "Quantized"),
}
CASES = {
    **{f"{op}: {k}": (op, *v) for op in OUT_OR_NOT for k, v in BAD_OPERANDS.items()},
    **{f"result: {k}": ("normalize", *v) for k, v in BAD_RESULTS.items()},
    **{f"out: {k}": ("normalize_out", *v) for k, v in BAD_OUTS.items()},
}
# How an error of the operator arrives is for torch to say; that it arrives is for us.
ANY_ERROR = (TypeError, ValueError, RuntimeError, NotImplementedError)


@pytest.mark.parametrize(("name", "make", "message"), CASES.values(), ids=CASES)
def test_operator(name: str, make: Callable[[], dict[str, Any]], message: str) -> None:
    changes = make()
    out = changes.get("out", torch.full((2, 3, 4, 5), 7.0))
    before = out.detach().clone() if out.layout == torch.strided else None
    with pytest.raises(ANY_ERROR, match=message):
        call_operator(name, **{"out": out, **changes})
    if before is not None:
        assert torch.equal(out.detach(), before), "out was written to"


def test_operator_with_meta_tensors_touches_no_memory() -> None:
    """A meta tensor asks for shapes alone, and out on another device must not be written."""
    result = call_operator("normalize", images=IMAGES.to("meta"))
    assert result is not None
    assert result.is_meta
    assert result.shape == (2, 3, 4, 5)
    for images, out in (
        (IMAGES, torch.zeros(2, 3, 4, 5, device="meta")),
        (IMAGES.to("meta"), torch.full((2, 3, 4, 5), 7.0)),
    ):
        with contextlib.suppress(*ANY_ERROR):
            call_operator("normalize_out", images=images, out=out)
        if not out.is_meta:
            assert bool((out == 7.0).all())


NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1e-46, 1e300, math.inf, math.nan]))
ANY_DTYPE = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]
)


@hypothesis.settings(max_examples=500)
@hypothesis.given(
    mean=st.lists(NUMBERS, max_size=5),
    std=st.lists(NUMBERS, max_size=5),
    rounding=st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 5),
    layout=st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 2),
    code=st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3),
    dtype=ANY_DTYPE,
    shape=st.lists(st.integers(0, 5), max_size=5),
    out_shape=st.lists(st.integers(0, 5), max_size=5),
)
def test_operator_never_crashes(
    mean: list[float],
    std: list[float],
    rounding: int,
    layout: int,
    code: int,
    dtype: torch.dtype,
    shape: list[int],
    out_shape: list[int],
) -> None:
    images = torch.zeros(shape, dtype=torch.uint8)
    for name, extra in (
        ("normalize", {"dtype": code, "memory_format": 2}),
        ("normalize_out", {"out": torch.zeros(out_shape, dtype=dtype)}),
    ):
        arguments = {"mean": mean, "std": std, "rounding": rounding, "input_layout": layout}
        try:
            result = call_operator(name, images=images, **arguments, **extra)
        except ANY_ERROR:
            continue
        if result is not None:
            assert result.numel() == images.numel()


def test_shapes_too_large_for_any_memory() -> None:
    # The last two have byte counts that leave 64 bits, to below 0 and to 2 MiB.
    for shape in ((2**40, 1, 2**15, 1), (2**40, 1, 2**21, 1), (2**43 + 1, 1, 2**19, 1)):
        images = torch.zeros(1, dtype=torch.uint8).expand(shape)
        with pytest.raises((RuntimeError, ValueError, MemoryError)):
            pixfuse.normalize(images)


# --- environment variables ---


def import_pixfuse(**environment: str) -> subprocess.CompletedProcess[str]:
    return python("import pixfuse; print(pixfuse.info()['isa'])", **environment)


@pytest.mark.parametrize("value", ["sse9", "AVX2"])
def test_unknown_isa(value: str) -> None:
    result = import_pixfuse(PIXFUSE_ISA=value)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    available = ", ".join(pixfuse.info()["available_isas"])
    assert last_line == (
        "ImportError: pixfuse: expected the environment variable PIXFUSE_ISA to be one of "
        f"{available} on this machine, got '{value}'; unset it to let pixfuse choose"
    )


def test_isa_of_another_machine() -> None:
    missing = set(_library.ISA_CODES) - set(pixfuse.info()["available_isas"])
    assert missing, "no machine has them all"
    for name in missing:
        result = import_pixfuse(PIXFUSE_ISA=name)
        assert result.returncode != 0
        assert "PIXFUSE_ISA to be one of portable" in result.stderr
        assert f"got '{name}'" in result.stderr


def test_each_available_isa_can_be_forced() -> None:
    names = pixfuse.info()["available_isas"]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda name: import_pixfuse(PIXFUSE_ISA=name), names)
    for name, result in zip(names, results, strict=True):
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == name


def test_empty_isa_is_unset() -> None:
    result = import_pixfuse(PIXFUSE_ISA="")
    assert result.stdout.strip() == pixfuse.info()["available_isas"][-1], result.stderr


@pytest.mark.parametrize("value", ["lots", "-1", "1e9"])
def test_wrong_cache_size(value: str) -> None:
    result = import_pixfuse(PIXFUSE_CACHE_BYTES=value)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line == (
        "ImportError: pixfuse: expected the environment variable PIXFUSE_CACHE_BYTES to be a whole "
        f"number of bytes, 0 or more, got '{value}'; 0 turns the output buffer cache off"
    )
