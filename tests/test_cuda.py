"""What only a GPU does: streams, graphs, guards. Values are compared in test_normalize.py."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import pixfuse
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.normalizations import DTYPES, made_up


def expected(images: torch.Tensor, normalization: pixfuse.Normalization, **options: Any) -> Any:
    return pixfuse.reference.normalize(images.cpu(), normalization, **options)


def test_kernels_are_loaded_wherever_there_is_a_gpu(cuda: torch.device) -> None:
    assert cuda.type == "cuda"
    assert pixfuse.info()["cuda"]["loaded"] is True


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(cuda: torch.device, dtype: torch.dtype) -> None:
    images = random_bytes(4, 3, 32, 33).to(cuda)
    out = torch.empty(images.shape, dtype=dtype, device=cuda)
    pixfuse.normalize(images, pixfuse.IMAGENET, dtype=dtype)  # loads the kernel before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = pixfuse.normalize(images, pixfuse.IMAGENET, dtype=dtype)
        pixfuse.normalize(images, pixfuse.SIGNED, dtype=dtype, out=out)
    for _ in range(3):
        images.copy_(random_bytes(4, 3, 32, 33))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(result, expected(images, pixfuse.IMAGENET, dtype=dtype))
        assert_same_bits(out, expected(images, pixfuse.SIGNED, dtype=dtype))


@pytest.mark.parametrize("channels", [1, 3, 13, 200])
def test_no_synchronization(cuda: torch.device, channels: int) -> None:
    images = random_bytes(2, channels, 32, 33).to(cuda)
    normalization = made_up(channels, "torchvision")
    pixfuse.normalize(images, normalization)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = pixfuse.normalize(images, normalization)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(result, expected(images, normalization))


def test_the_current_stream_is_used(cuda: torch.device) -> None:
    images = torch.zeros(4, 3, 224, 224, dtype=torch.uint8, device=cuda)
    arriving = random_bytes(4, 3, 224, 224).to(cuda)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # on another stream, the zeros would be read meanwhile
        images.copy_(arriving)
        result = pixfuse.normalize(images, pixfuse.IMAGENET)
    stream.synchronize()
    assert_same_bits(result, expected(arriving, pixfuse.IMAGENET))


def test_no_memory_but_the_output(cuda: torch.device) -> None:
    images = random_bytes(8, 3, 261, 259).to(cuda)[:, :, 2:258, 1:257]
    pixfuse.normalize(images, pixfuse.IMAGENET)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    result = pixfuse.normalize(images, pixfuse.IMAGENET)
    assert torch.cuda.max_memory_allocated() - before <= result.nbytes + 512


def test_another_device_than_the_current_one(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    images = random_bytes(2, 3, 32, 33).to("cuda:1")
    with torch.cuda.device(0):
        result = pixfuse.normalize(images, pixfuse.IMAGENET)
        assert torch.cuda.current_device() == 0
    assert result.device == images.device
    assert_same_bits(result, expected(images, pixfuse.IMAGENET))


def test_tensors_on_two_devices(cuda: torch.device) -> None:
    images = random_bytes(2, 3, 4, 5)
    for there, out in (
        (images.to(cuda), torch.full((2, 3, 4, 5), 7.0)),
        (images, torch.full((2, 3, 4, 5), 7.0, device=cuda)),
    ):
        with pytest.raises(ValueError, match="normalize: expected out on the device of images"):
            pixfuse.normalize(there, pixfuse.CLIP, out=out)
        with pytest.raises((RuntimeError, ValueError), match="device"):
            torch.ops.pixfuse.normalize_out(there, [0.5], [0.5], 0, 0, out)
        assert bool((out == 7.0).all())


def test_compiled_with_cuda_graphs(cuda: torch.device) -> None:
    def function(images: torch.Tensor) -> torch.Tensor:
        return torch.relu(pixfuse.normalize(images, pixfuse.IMAGENET) - 0.5)

    images = random_bytes(4, 3, 32, 33).to(cuda)
    run = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        images.copy_(random_bytes(4, 3, 32, 33))
        assert_same_bits(run(images).clone(), function(images))


def test_one_image_of_more_than_65535_blocks(cuda: torch.device) -> None:
    """Beyond what one dimension of a grid can count."""
    for shape in ((70_000, 3, 2, 2), (1, 3, 70_000, 5), (1, 70_000, 2, 3)):
        images = random_bytes(*shape).to(cuda)
        assert_same_bits(
            pixfuse.normalize(images, pixfuse.SIGNED), expected(images, pixfuse.SIGNED)
        )


# --- normalize_pinned: the kernel reads the host's memory ---


def normalize_pinned(images: torch.Tensor, layout: int = 0, device: int = 0) -> torch.Tensor:
    """The operator itself: IMAGENET, float32, contiguous."""
    mean, std = pixfuse.IMAGENET.mean, pixfuse.IMAGENET.std
    result: torch.Tensor = torch.ops.pixfuse.normalize_pinned(
        images, mean, std, 0, layout, 0, 0, device
    )
    return result


def test_pinned_memory_is_read_in_place(cuda: torch.device) -> None:
    images = random_bytes(4, 3, 65, 67).pin_memory()
    for view in (images, images[1:, :, 3:60, 5:], images[:0]):
        result = normalize_pinned(view)
        torch.cuda.synchronize()
        assert result.is_cuda
        assert_same_bits(result, expected(view, pixfuse.IMAGENET))


def test_pinned_memory_on_a_side_stream_without_waiting(cuda: torch.device) -> None:
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8).pin_memory()
    normalize_pinned(images)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)
            result = normalize_pinned(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    images.copy_(random_bytes(4, 3, 64, 64))  # the kernel has not begun: it sees this
    stream.synchronize()
    assert_same_bits(result, expected(images, pixfuse.IMAGENET))


def test_memory_that_is_not_pinned_is_refused(cuda: torch.device) -> None:
    images = random_bytes(2, 3, 4, 5)
    with pytest.raises(
        (RuntimeError, ValueError), match="normalize_pinned: expected images in pinned memory"
    ):
        normalize_pinned(images)
    assert_same_bits(normalize_pinned(images.pin_memory()), expected(images, pixfuse.IMAGENET))


# --- crop_mirror_normalize ---


def ragged(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Images of 3 channels, by turns planar and interleaved, on the CPU."""
    images = []
    for n, (height, width) in enumerate(sizes):
        planes = random_bytes(3, height, width)
        pixels = random_bytes(height, width, 3).permute(2, 0, 1)
        images.append(pixels if n % 2 else planes)
    return images


def expected_crops(images: Sequence[torch.Tensor], size: int | None, **options: Any) -> Any:
    return pixfuse.reference.crop_mirror_normalize(
        [image.cpu() for image in images], size, pixfuse.IMAGENET, **options
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [1, 5, 65, 700])
def test_ragged_batch(
    cuda: torch.device, count: int, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    sizes = [(20 + n * 7 % 31, 20 + n * 5 % 37) for n in range(count)]
    images = ragged(*sizes)
    options: dict[str, Any] = {
        "mirror": [n % 2 == 0 for n in range(count)],
        "flip": [n % 3 == 0 for n in range(count)],
        "out_of_bounds": "pad",
        "fill": 7,
        "return_mask": True,
        "dtype": dtype,
        "memory_format": memory_format,
    }
    result, mask = pixfuse.crop_mirror_normalize(
        [image.to(cuda) for image in images], 33, pixfuse.IMAGENET, **options
    )
    wanted, wanted_mask = expected_crops(images, 33, **options)
    assert result.is_cuda
    assert mask.is_cuda
    assert_same_bits(result, wanted)
    assert_same_bits(mask, wanted_mask)


def test_batch_tensor(cuda: torch.device) -> None:
    for images in (random_bytes(5, 3, 40, 41), random_bytes(5, 40, 41, 3).permute(0, 3, 1, 2)):
        for size in (None, 24):
            result = pixfuse.crop_mirror_normalize(images.to(cuda), size, pixfuse.IMAGENET)
            assert_same_bits(result, expected_crops(list(images), size))


def test_crops_in_a_cuda_graph(cuda: torch.device) -> None:
    images = [image.to(cuda) for image in ragged((40, 50), (33, 34), (64, 32))]
    pixfuse.crop_mirror_normalize(images, 32, pixfuse.IMAGENET)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = pixfuse.crop_mirror_normalize(images, 32, pixfuse.IMAGENET, mirror=True)
    for _ in range(3):
        for image in images:
            image.copy_(random_bytes(*image.shape))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(result, expected_crops(images, 32, mirror=True))


@pytest.mark.parametrize("count", [3, 100, 700])
def test_crops_without_synchronization(cuda: torch.device, count: int) -> None:
    images = [image.to(cuda) for image in ragged(*[(40, 50)] * count)]
    pixfuse.crop_mirror_normalize(images, 32, pixfuse.IMAGENET)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = pixfuse.crop_mirror_normalize(images, 32, pixfuse.IMAGENET)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(result, expected_crops(images, 32))


def test_crops_on_the_current_stream(cuda: torch.device) -> None:
    arriving = [image.to(cuda) for image in ragged((64, 70), (65, 71))]
    images = [torch.zeros_like(image) for image in arriving]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # on another stream, the zeros would be read meanwhile
        for image, there in zip(images, arriving, strict=True):
            image.copy_(there)
        result = pixfuse.crop_mirror_normalize(images, 48, pixfuse.IMAGENET)
    stream.synchronize()
    assert_same_bits(result, expected_crops(arriving, 48))


def test_crops_into_out(cuda: torch.device) -> None:
    images = [image.to(cuda) for image in ragged((40, 50), (33, 34))]
    out = torch.full((2, 3, 32, 32), 7.0, device=cuda)
    assert pixfuse.crop_mirror_normalize(images, 32, pixfuse.IMAGENET, out=out) is out
    assert_same_bits(out, expected_crops(images, 32))


def test_crops_on_another_device_than_the_current_one(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    images = [image.to("cuda:1") for image in ragged((40, 50), (33, 34))]
    with torch.cuda.device(0):
        result = pixfuse.crop_mirror_normalize(images, 32, pixfuse.IMAGENET)
        assert torch.cuda.current_device() == 0
    assert result.device == images[0].device
    assert_same_bits(result, expected_crops(images, 32))
    with pytest.raises(ValueError, match="device"):
        pixfuse.crop_mirror_normalize([images[0], images[1].to("cuda:0")], 32)


def test_crops_of_two_devices_are_refused(cuda: torch.device) -> None:
    images = ragged((40, 50), (33, 34))
    placements = torch.zeros(2, 4, dtype=torch.int64)
    constants = (3, [0.5], [0.5], 0, [0.0], False)
    for mixed in ([images[0], images[1].to(cuda)], [images[0].to(cuda), images[1]]):
        with pytest.raises((TypeError, ValueError), match=r"device|CPU tensor|cuda"):
            pixfuse.crop_mirror_normalize(mixed, 32)
    for there, out in (
        ([image.to(cuda) for image in images], torch.full((2, 3, 32, 32), 7.0)),
        (images, torch.full((2, 3, 32, 32), 7.0, device=cuda)),
    ):
        with pytest.raises((RuntimeError, ValueError), match="device"):
            torch.ops.pixfuse.crop_mirror_normalize_out(there, placements, *constants, out, None)
        assert bool((out == 7.0).all())
