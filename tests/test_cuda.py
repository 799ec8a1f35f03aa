"""What only a GPU does: streams, graphs, guards. Values are compared in test_normalize.py."""

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
