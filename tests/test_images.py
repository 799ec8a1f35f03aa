"""The module that reads Python's images: in place, of every kind, and alive as long as needed."""

import gc
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from pixfuse import _image_input, _images
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.samples import PILLOW_IMAGES
from tests.test_concurrency import other_threads_ran_during

reference = pixfuse.reference
exports = pytest.mark.skipif(
    not _image_input._pillow_exports_memory(), reason="Pillow before 13.0 is not read in place"
)


def random_array(*shape: int) -> np.ndarray:
    return random_bytes(*shape).numpy().copy()


def batch_of(images: _images.ImageList, height: int, width: int, channels: int) -> torch.Tensor:
    """The top left windows of a list, as bytes."""
    out = torch.full((len(images), channels, height, width), 7, dtype=torch.uint8)
    images.crop_mirror_normalize(
        np.zeros((len(images), 4), np.int64),
        channels,
        height,
        width,
        [0.0],
        [1.0],
        0,
        [0.0],
        False,
        3,
        out.data_ptr(),
        out.stride(),
        0,
    )
    return out


# --- Pillow ---


@pytest.mark.parametrize("arrow", [pytest.param(True, marks=exports), False])
@pytest.mark.parametrize("case", PILLOW_IMAGES)
def test_every_mode(case: str, arrow: bool) -> None:
    make, _ = PILLOW_IMAGES[case]
    image = make(16, 16)
    expected: Any = reference.crop_mirror_normalize([image], dtype=torch.uint8)
    before = image.tobytes()
    listed = _images.read([image], arrow)
    channels = expected.shape[1]
    assert listed.sizes.tolist() == [[16, 16, channels]]
    assert_same_bits(batch_of(listed, 16, 16, channels), expected)
    assert image.tobytes() == before


@exports
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBX", "RGBA"])
def test_pillow_is_read_in_place(mode: str) -> None:
    image = Image.new(mode, (20, 10))
    listed = _images.read([image], True)
    image.putpixel((3, 2), 200 if mode == "L" else (200,) * len(mode))
    assert batch_of(listed, 10, 20, 1 if mode == "L" else 3)[0, 0, 2, 3] == 200


def test_without_the_export_there_is_a_copy() -> None:
    image = Image.new("RGB", (20, 10))
    listed = _images.read([image], False)
    image.putpixel((3, 2), (200, 200, 200))
    assert not batch_of(listed, 10, 20, 3).any()


@pytest.mark.parametrize("size", [(2048, 2048), (2049, 2048), (5000, 1000), (1000, 5000)])
def test_images_around_and_over_a_block_of_pillow(size: tuple[int, int]) -> None:
    """Of 16 MiB; larger images are not exported."""
    width, height = size
    array = random_array(height, width, 3)
    ours = pixfuse.crop_mirror_normalize(
        [Image.fromarray(array)], (64, 48), anchor=(1, 0.9), dtype=torch.uint8
    )
    theirs = pixfuse.crop_mirror_normalize([array], (64, 48), anchor=(1, 0.9), dtype=torch.uint8)
    assert_same_bits(ours, theirs)


def test_a_mapped_image(tmp_path: Path) -> None:
    """Pillow maps uncompressed files, and does not export such memory."""
    array = random_array(40, 30, 3)
    path = tmp_path / "image.bmp"
    Image.fromarray(array).save(path)
    with Image.open(path) as image:
        ours = pixfuse.crop_mirror_normalize([image], dtype=torch.uint8)
    assert_same_bits(ours, pixfuse.crop_mirror_normalize([array], dtype=torch.uint8))
    buffer = bytearray(array.tobytes())
    over = Image.frombuffer("L", (90, 40), buffer, "raw", "L", 0, 1)
    ours = pixfuse.crop_mirror_normalize([over], dtype=torch.uint8)
    assert_same_bits(ours[0, 0], torch.from_numpy(array.reshape(40, 90)))


@pytest.mark.parametrize("format_", ["PNG", "GIF", "TIFF", "BMP"])
def test_files_are_loaded(format_: str) -> None:
    array = random_array(20, 30)
    file = io.BytesIO()
    Image.fromarray(array).save(file, format_)
    ours = pixfuse.crop_mirror_normalize([Image.open(file)], dtype=torch.uint8)
    assert_same_bits(ours[0, 0], torch.from_numpy(array))


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "TIFF", "GIF"])
def test_truncated_files_name_their_index(format_: str) -> None:
    file = io.BytesIO()
    whole = Image.fromarray(random_array(200, 200, 3))
    whole.save(file, format_)
    broken = Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))
    with pytest.raises(
        (OSError, ValueError), match=r"expected images\[2\] to be an image that P"
    ) as raised:
        pixfuse.crop_mirror_normalize([whole, whole, broken], 100)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_modes_without_a_rule(mode: str) -> None:
    images = [Image.new("L", (4, 4)), Image.new(mode, (4, 4))]
    with pytest.raises(TypeError, match=rf"images\[1\] of a Pillow mode .* got mode '{mode}'"):
        pixfuse.crop_mirror_normalize(images)


# --- numpy ---


ARRAYS: dict[str, Callable[[], np.ndarray]] = {
    "contiguous": lambda: random_array(9, 11, 3),
    "gray": lambda: random_array(9, 11),
    "upside down": lambda: random_array(9, 11, 3)[::-1],
    "mirrored": lambda: random_array(9, 11, 3)[:, ::-1],
    "bgr": lambda: random_array(9, 11, 3)[:, :, ::-1],
    "all backwards": lambda: random_array(9, 11, 3)[::-1, ::-1, ::-1],
    "gray backwards": lambda: random_array(9, 11)[::-1, ::-1],
    "every second": lambda: random_array(18, 22, 3)[::2, ::2],
    "every second, backwards": lambda: random_array(18, 22, 3)[::-2, ::-2],
    "planes": lambda: random_array(3, 9, 11).transpose(1, 2, 0),
    "transposed": lambda: random_array(11, 9, 3).transpose(1, 0, 2),
    "fortran": lambda: np.asfortranarray(random_array(9, 11, 3)),
    "one pixel, repeated": lambda: np.broadcast_to(random_array(1, 1, 3), (9, 11, 3)),
    "rgba": lambda: random_array(9, 11, 4),
    "alpha dropped": lambda: random_array(9, 11, 4)[:, :, :3],
    "many channels": lambda: random_array(9, 11, 20),
}


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_any_strides(case: str, writable: bool) -> None:
    array = ARRAYS[case]()
    expected = torch.from_numpy(array.copy(order="C"))
    expected = expected[None] if array.ndim == 2 else expected.permute(2, 0, 1)
    if not writable:
        array.flags.writeable = False
    listed = _images.read([array, array], True)
    ours = batch_of(listed, 9, 11, len(expected))
    for image in ours:
        assert torch.equal(image, expected)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "float32", "datetime64[s]", "O", "S1"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    images = [np.zeros((2, 2), np.uint8), np.zeros((2, 2), dtype)]
    with pytest.raises(
        TypeError, match=r"images\[1\] of dtype uint8, got .*; pixels must still be"
    ):
        _images.read(images, True)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 2, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images\[0\] to have shape \(H, W\) or \(H, W, C\), got"):
        _images.read([np.zeros(shape, np.uint8)], True)


# --- tensors ---


def test_tensors_of_any_strides() -> None:
    tensors = [
        random_bytes(3, 9, 11),
        random_bytes(9, 11, 3).permute(2, 0, 1),
        random_bytes(3, 20, 30)[:, 3:12, ::2][:, :, :11],
        random_bytes(1, 9, 11).expand(3, 9, 11),
    ]
    ours = batch_of(_images.read(tensors, True), 9, 11, 3)
    assert torch.equal(ours, torch.stack(tensors))


def test_subclasses_of_tensors() -> None:
    tv_tensors = import_torchvision("torchvision.tv_tensors")
    tensor = random_bytes(3, 9, 11)
    listed = _images.read([tv_tensors.Image(tensor), torch.nn.Parameter(tensor, False)], True)
    assert torch.equal(batch_of(listed, 9, 11, 3), torch.stack([tensor, tensor]))


def test_a_tensor_that_moves_on_does_not_take_its_memory_along() -> None:
    tensor = random_bytes(3, 9, 11)
    expected = tensor.clone()
    listed = _images.read([tensor], True)
    tensor.set_(torch.zeros(3, dtype=torch.uint8).untyped_storage())
    assert torch.equal(batch_of(listed, 9, 11, 3)[0], expected)


def without_memory() -> dict[str, torch.Tensor]:
    zeros = torch._efficientzerotensor((3, 4, 5), dtype=torch.uint8)
    given_back, shrunk = random_bytes(3, 4, 5).clone(), random_bytes(3, 4, 5).clone()
    given_back.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(59)
    with FakeTensorMode():
        fake = torch.empty(3, 4, 5, dtype=torch.uint8)
    return {
        "zeros": zeros,
        "a window of zeros": zeros[:, 1:],  # its address is not 0
        "fake": fake,
        "a window of a fake": fake[1:],
        "given back": given_back,
        "shrunk": shrunk,
    }


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", without_memory())
def test_tensors_without_memory_are_refused(kind: str) -> None:
    with pytest.raises(
        (ValueError, NotImplementedError), match=r"expected images\[1\] to .*memory"
    ):
        _images.read([random_bytes(3, 4, 5), without_memory()[kind]], True)


def test_a_tensor_of_torch_vmap_is_refused() -> None:
    def read(tensor: torch.Tensor) -> torch.Tensor:
        _images.read([tensor], True)
        return tensor

    with pytest.raises(NotImplementedError, match=r"images\[0\] to be a tensor that has memory"):
        torch.vmap(read)(random_bytes(2, 3, 4, 5))


def test_an_output_without_memory_is_refused() -> None:
    images = [random_bytes(3, 4, 5)]
    out = torch.empty(1, 3, 4, 5)
    out.untyped_storage().resize_(0)
    for given in (images, images[0][None]):
        with pytest.raises(ValueError, match="expected out to have memory"):
            pixfuse.crop_mirror_normalize(given, out=out)


# --- lifetime ---


MAKERS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda array: array.copy(),
    "a view": lambda array: array.copy()[::-1, ::-1][::-1, ::-1],
    "tensor": lambda array: torch.from_numpy(array.copy()).permute(2, 0, 1),
    "pillow": Image.fromarray,
    "pillow, converted": lambda array: Image.fromarray(array).convert("HSV"),
}


@pytest.mark.parametrize("arrow", [pytest.param(True, marks=exports), False])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_list_keeps_its_images(kind: str, arrow: bool) -> None:
    images = [MAKERS[kind](random_array(300, 400, 3)) for _ in range(3)]
    listed = _images.read(images, arrow)
    expected = batch_of(listed, 300, 400, 3)
    images.clear()
    gc.collect()
    for _ in range(20):  # new owners for the memory, were it free
        np.full((300, 400, 3), 99, np.uint8)
        Image.new("RGB", (400, 300), (99, 99, 99))
    assert torch.equal(batch_of(listed, 300, 400, 3), expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_counts_of_references_return(kind: str) -> None:
    image = MAKERS[kind](random_array(30, 40, 3))
    images = [image] * 5
    pixfuse.crop_mirror_normalize(images)  # what is made once, is made
    before = sys.getrefcount(image)
    listed = _images.read(images, True)
    batch_of(listed, 30, 40, 3)
    del listed
    for wrong in (None, np.zeros((2, 2)), random_bytes(2, 3)):
        with pytest.raises((TypeError, ValueError)):
            _images.read([*images, wrong], True)
    assert sys.getrefcount(image) == before


def test_objects_die_with_the_list() -> None:
    array = random_array(30, 40, 3)
    gone = weakref.ref(array)
    listed = _images.read([array], True)
    del array
    assert gone() is not None
    del listed
    assert gone() is None


def test_memory_does_not_grow() -> None:
    code = """
import resource, numpy as np, torch, pixfuse
from PIL import Image
array = np.zeros((200, 200, 3), np.uint8)
images = [array, torch.from_numpy(array).permute(2, 0, 1), Image.fromarray(array),
          Image.fromarray(array).convert("HSV"), Image.new("RGB", (3000, 2000))]
def use():
    pixfuse.crop_mirror_normalize(images, 100)
    for wrong in ([*images, 1], [*images, array[:, :0]], [*images, array.astype(np.int32)]):
        try:
            pixfuse.crop_mirror_normalize(wrong, 100)
        except (TypeError, ValueError):
            pass
for _ in range(20):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(60):
    use()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 12 * 1024, grown  # KiB; the large image alone is 23 MiB a copy
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# --- other threads ---


@pytest.mark.parametrize("kind", ["numpy", "tensor", "pillow"])
def test_the_gil_is_released(kind: str) -> None:
    images = [MAKERS[kind](random_array(1024, 1024, 3))] * 64
    out = torch.empty(64, 3, 1024, 1024, dtype=torch.bfloat16)
    torch.set_num_threads(1)
    assert other_threads_ran_during(
        lambda: pixfuse.crop_mirror_normalize(
            images, None, pixfuse.IMAGENET, dtype=torch.bfloat16, out=out
        )
    )


def test_images_changed_by_another_thread() -> None:
    """Some bytes, no crash: the list and what it holds are replaced all the time."""
    images: list[Any] = [MAKERS[kind](random_array(64, 64, 3)) for kind in MAKERS] * 4
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            for number, kind in enumerate(MAKERS):
                images[number] = MAKERS[kind](np.zeros((64, 64, 3), np.uint8))
            for image in images:
                if isinstance(image, np.ndarray):
                    image[:] = 1
                elif isinstance(image, Image.Image):
                    image.paste(1, (0, 0, 64, 64))
                else:
                    image.zero_()
            images.append(images.pop())

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        for _ in range(200):
            ours = pixfuse.crop_mirror_normalize(images, dtype=torch.uint8)
            assert ours.shape[1:] == (3, 64, 64)
    finally:
        stop.set()
        disturbing.join()


# --- what is wrong with the call ---


def test_placements_must_fit() -> None:
    listed = _images.read([random_array(4, 4)], True)
    with pytest.raises(
        ValueError, match=r"expected placements to be an int64 array of shape \(1, 4\)"
    ):
        listed.crop_mirror_normalize(
            np.zeros((2, 4), np.int64), 1, 4, 4, [0.0], [1.0], 0, [0.0], False, 0, 0, (16,) * 4, 0
        )


@pytest.mark.parametrize("image", [None, 3, "image", b"image", [1], memoryview(b"12"), object()])
def test_other_objects_are_refused(image: object) -> None:
    name = type(image).__name__
    with pytest.raises(
        TypeError, match=rf"images\[1\] to be a Pillow image, a numpy array or .*, got {name}"
    ):
        _images.read([random_array(4, 4), image], True)
