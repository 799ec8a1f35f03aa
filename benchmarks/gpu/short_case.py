"""A few small batches on the GPU, compared with the reference: what compute-sanitizer watches.

    python -m benchmarks.gpu.short_case

Every layout, type and output format, odd sizes, rows that end mid-vector, starts at odd addresses.
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


def main() -> int:
    unequal = 0
    count = 0
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
