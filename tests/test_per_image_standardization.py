"""`PerImageStandardization`, the value; what takes it is tested with each of them."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import pixfuse
from benchmarks import per_image
from pixfuse import PerImageStandardization
from tests.bits import assert_same_bits
from tests.images import random_bytes

IMAGES = random_bytes(2, 3, 4, 5)


def test_values() -> None:
    default = PerImageStandardization()
    assert (default.per_channel, default.floor) == (False, "tensorflow")
    chosen = PerImageStandardization(True, 2)
    assert (chosen.per_channel, chosen.floor) == (True, 2.0)
    assert type(chosen.floor) is float
    assert chosen == PerImageStandardization(per_channel=True, floor=torch.tensor(2.0).item())
    assert len({default, chosen, PerImageStandardization()}) == 2
    for value in (default, chosen):
        assert eval(repr(value)) == value
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
    with pytest.raises(AttributeError):
        chosen.floor = 3.0  # type: ignore[misc]


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "per channel": ({"per_channel": 1}, TypeError, r"per_channel to be True or False, got int"),
    "floor name": ({"floor": "torch"}, ValueError, r"floor to be 'tensorflow' or .*, got 'torch'"),
    "floor type": ({"floor": None}, TypeError, r"floor to be 'tensorflow' or .*, got NoneType"),
    "floor bool": ({"floor": True}, TypeError, r"floor to be .*, got bool"),
    "floor zero": ({"floor": 0}, ValueError, r"floor to be .* above 0 \(finite.*, got 0"),
    "floor nan": ({"floor": math.nan}, ValueError, r"floor to be .*, got nan"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=f"^PerImageStandardization: expected {message}"):
        PerImageStandardization(**options)


REFUSALS: dict[str, tuple[Any, str]] = {
    "normalize": (
        lambda value: pixfuse.normalize(IMAGES, value),
        r"; use pixfuse.standardize_per_image\(images\)$",
    ),
    "crop_mirror_normalize": (
        lambda value: pixfuse.crop_mirror_normalize(IMAGES, 3, value),
        r"; pass dtype=torch.uint8, and the result to pixfuse.standardize_per_image, as pixfuse.C",
    ),
    "denormalize": (
        lambda value: pixfuse.denormalize(IMAGES.float(), value),
        r"; standardized images do not say what mean and std they had$",
    ),
    "conv_bias_relu": (
        lambda value: pixfuse.conv_bias_relu(IMAGES, torch.ones(1, 3, 2, 2), normalization=value),
        "",
    ),
}


@pytest.mark.parametrize("function", REFUSALS)
def test_who_refuses_it_says_what_to_do(function: str) -> None:
    call, hint = REFUSALS[function]
    message = (
        f"^{function}: expected normalization to be a pixfuse.Normalization, got "
        f"PerImageStandardization{hint}"
    )
    with pytest.raises(TypeError, match=message):
        call(PerImageStandardization())


# --- the output of standardize_per_image, which they need ---


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_into_memory_of_the_caller(
    device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    images = IMAGES.to(device)
    for source in (images, images[0], images.mT.contiguous().mT, images[:0]):
        expected = pixfuse.standardize_per_image(
            source, True, dtype=dtype, memory_format=memory_format
        )
        out = torch.full_like(expected, 7)
        assert out.stride() == expected.stride()
        before = out._version
        ours = pixfuse.standardize_per_image(
            source, True, dtype=dtype, memory_format=memory_format, out=out
        )
        assert ours is out
        assert out._version == before + 1
        assert_same_bits(out, expected)


def test_out_that_preserves_the_order_of_the_images() -> None:
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    preserved: Any = {"memory_format": torch.preserve_format}
    out = torch.empty(IMAGES.shape, memory_format=torch.channels_last)
    assert_same_bits(
        pixfuse.standardize_per_image(images, out=out, **preserved),
        pixfuse.standardize_per_image(images, **preserved),
    )
    with pytest.raises(ValueError, match=r"^standardize_per_image: expected out to be dense in"):
        pixfuse.standardize_per_image(images, out=torch.empty(IMAGES.shape), **preserved)


BAD_OUTS: dict[str, tuple[Any, type[Exception], str]] = {
    "type": ([1.0], TypeError, r"out to be a torch.Tensor, got list"),
    "dtype": (torch.empty(2, 3, 4, 5).half(), TypeError, r"out of dtype torch.float32, got"),
    "shape": (torch.empty(2, 3, 5, 4), ValueError, r"out of shape \(2, 3, 4, 5\), got"),
    "strides": (torch.empty(2, 3, 5, 4).mT, ValueError, r"out to be dense in torch.contiguous"),
    "gradient": (torch.empty(2, 3, 4, 5, requires_grad=True), ValueError, r"out not to require"),
}


@pytest.mark.parametrize("case", BAD_OUTS)
def test_bad_outputs(case: str) -> None:
    out, kind, message = BAD_OUTS[case]
    with pytest.raises(kind, match=f"^standardize_per_image: expected {message}"):
        pixfuse.standardize_per_image(IMAGES, out=out)


def test_an_output_in_the_memory_of_the_images() -> None:
    memory = torch.zeros(480, dtype=torch.uint8)
    images, out = memory[:120].view(2, 3, 4, 5), memory.view(torch.float32).view(2, 3, 4, 5)
    message = "standardize_per_image: expected out to share no memory with images"
    with pytest.raises(ValueError, match=f"^{message}, got an overlap$"):
        pixfuse.standardize_per_image(images, out=out)
    operator = torch.ops.pixfuse.standardize_per_image_out
    with pytest.raises((RuntimeError, ValueError), match=message):
        operator(images, False, 0.0, 0, out)
    assert bool((memory == 0).all())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 3, 4, 5, dtype=torch.float64), "out.dtype to be float32, float16"),
        (torch.empty(3, 4, 5), "out with as many dimensions as images"),
        (torch.empty(2, 3, 5, 4), r"out of shape \(N, C, H, W\) = \(2, 3, 4, 5\)"),
        (torch.empty(2, 3, 5, 4).mT, "out to be contiguous or channels_last"),
    ],
)
def test_the_operator_checks_too(out: torch.Tensor, message: str) -> None:
    operator = torch.ops.pixfuse.standardize_per_image_out
    with pytest.raises((RuntimeError, ValueError), match=f"standardize_per_image: .*{message}"):
        operator(IMAGES, False, 0.0, 0, out)


def test_opcheck() -> None:
    operator = torch.ops.pixfuse.standardize_per_image_out.default
    for images in (IMAGES, IMAGES[0], IMAGES[:0], IMAGES.mT):
        out = torch.empty(images.shape, dtype=torch.bfloat16)
        torch.library.opcheck(operator, (images, True, 2.0, 0, out))
        torch.library.opcheck(operator, (images.movedim(-3, -1), False, 0.0, 1, out))


# --- docs/per_image.md ---


def test_the_page_tells_what_was_measured_for_its_picture() -> None:
    rows = per_image.rows_of_picture()
    assert per_image.PAGE.read_text() == per_image.page(rows)
    forged = [{**rows[0], "std": "0.999"}, *rows[1:]]
    assert per_image.PAGE.read_text() != per_image.page(forged)


def test_the_picture_shows_the_photograph() -> None:
    pytest.importorskip("sklearn", reason="its photographs come with make demo")
    patches = per_image.patches()
    assert per_image.rows_of_picture() == per_image.measure(patches)
    sky, roof = patches["sky"], patches["roof"]
    assert per_image.standardized(sky, 20.0).abs().max() < 1
    blown_up = per_image.standardized(sky, "tensorflow")
    assert blown_up.std(correction=0).item() == pytest.approx(1)
    with_floor, without = (per_image.standardized(roof, floor) for floor in (20.0, "tensorflow"))
    assert_same_bits(with_floor, without)
