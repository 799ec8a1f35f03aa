"""The same work as a Triton kernel: what one would write in its place.

Each step is rounded, so the results are equal bit for bit; contraction must be off at launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles the annotations of its kernels, and knows no other than constexpr.

from typing import Any

import torch
import triton
import triton.language as tl


def _planes(
    images,
    out,
    pixels,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    scale,
    in_channel,
    out_channel,
    in_step: tl.constexpr,
    out_step: tl.constexpr,
    block: tl.constexpr,
):
    """One block of pixels of one image, its three channels one after the other."""
    pixel = tl.program_id(0) * block + tl.arange(0, block)
    inside = pixel < pixels
    image = tl.program_id(1).to(tl.int64) * pixels * 3
    for channel in tl.static_range(3):
        if channel == 0:
            mean, std = mean0, std0
        elif channel == 1:
            mean, std = mean1, std1
        else:
            mean, std = mean2, std2
        x = tl.load(images + image + channel * in_channel + pixel * in_step, mask=inside)
        y = tl.div_rn(x.to(tl.float32) * scale - mean, std)
        tl.store(out + image + channel * out_channel + pixel * out_step, y, mask=inside)


def _interleaved(
    images,
    out,
    elements,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    scale,
    block: tl.constexpr,
):
    """One block of elements, where both sides keep the channels of a pixel side by side."""
    element = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = element < elements
    channel = element % 3
    mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
    std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
    x = tl.load(images + element, mask=inside)
    y = tl.div_rn(x.to(tl.float32) * scale - mean, std)
    tl.store(out + element, y, mask=inside)


planes_kernel = triton.jit(_planes)
interleaved_kernel = triton.jit(_interleaved)


def normalize(
    images: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    interleaved_images: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """Normalize a dense batch of three channels into ``out``, of shape NCHW in its own format."""
    batch, _, height, width = out.shape
    pixels = height * width
    interleaved_out = out.is_contiguous(memory_format=torch.channels_last)
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    if interleaved_images and interleaved_out:
        elements = batch * pixels * 3
        interleaved_kernel[(triton.cdiv(elements, 2048),)](
            images, out, elements, *mean, *std, 1 / 255, block=2048, **options
        )
        return out
    planes_kernel[(triton.cdiv(pixels, 1024), batch)](
        images,
        out,
        pixels,
        *mean,
        *std,
        1 / 255,
        1 if interleaved_images else pixels,
        1 if interleaved_out else pixels,
        in_step=3 if interleaved_images else 1,
        out_step=3 if interleaved_out else 1,
        block=1024,
        **options,
    )
    return out
