"""A few small batches on the GPU, compared with the reference: what compute-sanitizer watches.

    python -m benchmarks.gpu.short_case

Every layout, type and output format, odd sizes, rows that end mid-vector, starts at odd addresses,
pinned host memory, windows that leave their images.
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


def main() -> int:
    count, unequal = unequal_crops()
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
