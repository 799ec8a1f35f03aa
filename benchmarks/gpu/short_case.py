"""A few small batches on the GPU, compared with the reference: what compute-sanitizer watches.

    python -m benchmarks.gpu.short_case

Every layout, type and output format, odd sizes, rows that end mid-vector, starts at odd addresses,
pinned host memory, windows that leave their images, convolutions of many shapes, images
standardized both ways.
The reference runs on the CPU, so that the GPU does little else than our kernels.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch

import pixfuse

FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def batches() -> Iterator[tuple[str, torch.Tensor]]:
    """Inputs with their layout; the first two are dense, the others are views."""
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).cuda()

    yield "NHWC", pixels(2, 33, 47, 3)
    yield "NCHW", pixels(2, 3, 33, 47)
    yield "NHWC", pixels(1, 1, 1, 3)
    yield "NCHW", pixels(1, 3, 5, 1)
    yield "NHWC", pixels(2, 40, 50, 3)[:, 3:36, 1:48]  # a crop: rows with gaps, odd starts
    yield "NCHW", pixels(3 * 2 * 64 * 64 + 1)[1:].view(2, 3, 64, 64)  # unaligned
    yield "NCHW", pixels(2, 3, 9, 21).transpose(2, 3)


def ragged(count: int) -> list[torch.Tensor]:
    """Images of many sizes on the CPU, by turns interleaved and planar."""
    generator = torch.Generator().manual_seed(count)
    images = []
    for n in range(count):
        height, width = 20 + 7 * n % 31, 18 + 5 * n % 37
        shape = (3, height, width) if n % 2 else (height, width, 3)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        images.append(image if n % 2 else image.permute(2, 0, 1))
    return images


def unequal_crops() -> tuple[int, int]:
    """How many crops of ragged batches there are, and how many differ from those on the CPU."""
    unequal = 0
    cases = list(itertools.product((3, 70, 650), (*DTYPES, torch.uint8), FORMATS))
    for count, dtype, memory_format in cases:
        images = ragged(count)

        def crop(
            images: list[torch.Tensor],
            dtype: torch.dtype = dtype,
            memory_format: torch.memory_format = memory_format,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            result, mask = pixfuse.crop_mirror_normalize(
                images,
                33,
                pixfuse.IMAGENET,
                mirror=[n % 2 == 0 for n in range(len(images))],
                flip=[n % 3 == 0 for n in range(len(images))],
                out_of_bounds="pad",
                fill=(1, 2, 3),
                return_mask=True,
                dtype=dtype,
                memory_format=memory_format,
            )
            return result.cpu(), mask.cpu()

        pairs = zip(crop([image.cuda() for image in images]), crop(images), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            unequal += 1
            print(f"not equal: {count} crops {dtype} {memory_format}", file=sys.stderr)
    return len(cases), unequal


def unequal_standardized() -> tuple[int, int]:
    """How many standardized batches there are, in one pass and by two kernels, and the unequal."""
    operator = torch.ops.pixfuse.standardize_per_image.default
    unequal = 0
    cases = list(
        itertools.product(batches(), enumerate(DTYPES), enumerate(FORMATS), (False, True), (1, 2))
    )
    for (layout, images), (code, dtype), (form, memory_format), per_channel, way in cases:
        nhwc = layout == "NHWC"
        result = operator(images, per_channel, 0.0, int(nhwc), code, form, way)
        expected = pixfuse.reference.standardize_per_image(
            images.cpu(),
            per_channel,
            input_layout="NHWC" if nhwc else "NCHW",
            dtype=dtype,
            memory_format=memory_format,
        )
        if not torch.equal(result.cpu(), expected):
            unequal += 1
            print(
                f"not equal: standardized {layout} {tuple(images.shape)} {dtype} {memory_format} "
                f"per channel {per_channel} way {way}",
                file=sys.stderr,
            )
    # More shared memory than a block has without asking, on any GPU.
    images = torch.randint(0, 256, (2, 3, 140, 142), dtype=torch.uint8).cuda()
    result = pixfuse.standardize_per_image(images)
    if not torch.equal(result.cpu(), pixfuse.reference.standardize_per_image(images.cpu())):
        unequal += 1
        print("not equal: standardized 3x140x142", file=sys.stderr)
    return len(cases) + 1, unequal


def wrong_convolutions() -> tuple[int, int]:
    """How many convolutions there are, and how many are far off or counted wrongly."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        # channels, outputs, kernel, stride, padding, side
        (3, 64, 7, 2, 3, 33),
        (3, 70, 3, 1, 1, 17),
        (1, 5, 1, 1, 0, 9),
        (4, 96, 4, 4, 0, 35),
        (3, 8, 16, 16, 0, 48),
        (13, 33, 3, 1, 1, 11),
    )
    wrong = 0
    cases = [(1, *case) for case in itertools.product(shapes, DTYPES, FORMATS)]
    # cuDNN's own kernels take long to watch.
    cases += [(2, *case) for case in itertools.product(shapes[-1:], DTYPES, FORMATS)]
    for way, (channels, outputs, kernel, stride, padding, side), dtype, memory_format in cases:
        images = torch.randint(
            0, 256, (2, channels, side, side), dtype=torch.uint8, generator=generator
        )
        weight = torch.randn(outputs, channels, kernel, kernel, generator=generator)
        weight = (weight / (channels * kernel**2) ** 0.5).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        output, counts, _ = torch.ops.pixfuse.conv_bias_relu.default(
            images.cuda().contiguous(memory_format=memory_format),
            weight.cuda(),
            bias.cuda(),
            [stride] * 2,
            [padding] * 4,
            [1, 1],
            1,
            [0.5],
            [0.5],
            0,
            DTYPES.index(dtype),
            memory_format is torch.channels_last,
            False,
            way,
        )
        values = pixfuse.reference.normalize(images, pixfuse.SIGNED, dtype=dtype)
        expected, _ = pixfuse.reference.conv_bias_relu(values, weight, bias, stride, padding)
        result = output.cpu()
        near = torch.allclose(result.double(), expected.double(), rtol=0.02, atol=0.02)
        if not near or not torch.equal(counts[0].cpu(), (result > 0).sum((0, 2, 3))):
            wrong += 1
            print(
                f"wrong: convolution {channels} to {outputs}, {kernel}, {dtype} {memory_format} "
                f"way {way}",
                file=sys.stderr,
            )
    return len(cases), wrong


def main() -> int:
    count, unequal = unequal_crops()
    convolutions, wrong = wrong_convolutions()
    standardized, unstandardized = unequal_standardized()
    count += convolutions + standardized
    unequal += wrong + unstandardized
    pinned = torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8).pin_memory()
    mean, std = pixfuse.IMAGENET.mean, pixfuse.IMAGENET.std
    read = torch.ops.pixfuse.normalize_pinned(pinned, mean, std, 0, 0, 0, 0, 0)
    count += 1
    if not torch.equal(read.cpu(), pixfuse.reference.normalize(pinned, pixfuse.IMAGENET)):
        unequal += 1
        print("not equal: pinned memory", file=sys.stderr)
    for (layout, images), dtype, memory_format in itertools.product(batches(), DTYPES, FORMATS):
        result = pixfuse.normalize(
            images,
            pixfuse.IMAGENET,
            input_layout="NHWC" if layout == "NHWC" else "NCHW",
            dtype=dtype,
            memory_format=memory_format,
        )
        expected = pixfuse.reference.normalize(
            images.cpu(),
            pixfuse.IMAGENET,
            input_layout=layout,
            dtype=dtype,
            memory_format=memory_format,
        )
        count += 1
        if not torch.equal(result.cpu(), expected):
            unequal += 1
            print(
                f"not equal: {layout} {tuple(images.shape)} {dtype} {memory_format}",
                file=sys.stderr,
            )
    torch.cuda.synchronize()
    print(f"{count} results, {unequal} not equal to the reference")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
