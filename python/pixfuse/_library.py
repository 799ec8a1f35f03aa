"""Loads the compiled libraries, registers fake kernels, and says what was loaded."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from pixfuse import __path__ as package_folders

Key = TypeVar("Key")

#: The numbers of enum Isa in csrc/common/isa.h.
#: In the order of preference.
ISA_CODES: Final = {
    "portable": 0,
    "avx2": 1,
    "avx512": 2,
    "vnni": 5,
    "gfni": 6,
    "amx": 4,
    "neon": 3,
}
#: The numbers of enum ElementType in csrc/common/element_type.h: of floats, and with the bytes that
#: some operators can leave as they are.
DTYPE_CODES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ELEMENT_CODES: Final = {**DTYPE_CODES, torch.uint8: 3}
#: The numbers of enums InputLayout and MemoryFormat in csrc/common/layout.h.
LAYOUT_CODES: Final = {"NCHW": 0, "NHWC": 1}
MEMORY_FORMAT_CODES: Final = {
    torch.contiguous_format: 0,
    torch.channels_last: 1,
    torch.preserve_format: 2,
}


def _load_libraries() -> tuple[bool, str]:
    """Load _cpu, and _cuda where torch has CUDA; return (CUDA kernels loaded, why or why not)."""
    # Beside this file, unless pip installed with -e: then in another folder of the package.
    folders = [Path(__file__).parent, *map(Path, package_folders)]
    folder = next((one for one in folders if (one / "_cpu.so").exists()), folders[0])
    torch.ops.load_library(folder / "_cpu.so")
    # A wrong PIXFUSE_ISA or PIXFUSE_CACHE_BYTES must fail here, not at the first batch.
    try:
        torch.ops.pixfuse.active_isa()
        torch.ops.pixfuse.output_buffer()
    except (RuntimeError, ValueError) as error:
        raise ImportError(str(error)) from None
    cuda_library = folder / "_cuda.so"
    if not cuda_library.exists():
        return False, (
            "this build of pixfuse has no CUDA kernels: it was made without nvcc, for a torch "
            "without CUDA, or with PIXFUSE_CUDA=OFF"
        )
    if torch.version.cuda is None:
        return False, "this build of torch has no CUDA"
    torch.ops.load_library(cuda_library)
    return True, "loaded"


CUDA_LOADED, CUDA_STATE = _load_libraries()


def dense_strides(shape: Any, channels_last: bool) -> tuple[Any, ...]:
    """Strides of a dense (N, C, H, W) or (C, H, W) output, in elements."""
    channels, height, width = shape[-3:]
    if channels_last:
        image = (1, width * channels, channels)
    else:
        image = (height * width, width, 1)
    return image if len(shape) == 3 else (channels * height * width, *image)


def resolve_channels_last(images: torch.Tensor, memory_format: torch.memory_format) -> bool:
    """Whether the output of ``images`` (seen as NCHW) puts the channels of a pixel side by side."""
    if memory_format is torch.preserve_format:
        return bool(images.shape[-3] > 1 and images.stride(-3) == 1)
    return memory_format is torch.channels_last


def view_as_nchw(images: torch.Tensor, layout_code: int) -> torch.Tensor:
    """``images`` with its dimensions in the order (N,) C, H, W; never a copy."""
    return images.movedim(-1, -3) if layout_code == LAYOUT_CODES["NHWC"] else images


def _key(codes: dict[Key, int], code: int) -> Key:
    return next(key for key, number in codes.items() if number == code)


@torch.library.register_fake("pixfuse::normalize")
def _normalize_fake(
    images: torch.Tensor,
    mean: list[float],
    std: list[float],
    rounding: int,
    input_layout: int,
    dtype: int,
    memory_format: int,
) -> torch.Tensor:
    nchw = view_as_nchw(images, input_layout)
    channels_last = resolve_channels_last(nchw, _key(MEMORY_FORMAT_CODES, memory_format))
    return images.new_empty_strided(
        nchw.shape, dense_strides(nchw.shape, channels_last), dtype=_key(DTYPE_CODES, dtype)
    )


@torch.library.register_fake("pixfuse::normalize_pinned")
def _normalize_pinned_fake(
    images: torch.Tensor,
    mean: list[float],
    std: list[float],
    rounding: int,
    input_layout: int,
    dtype: int,
    memory_format: int,
    device: int,
) -> torch.Tensor:
    nchw = view_as_nchw(images, input_layout)
    channels_last = resolve_channels_last(nchw, _key(MEMORY_FORMAT_CODES, memory_format))
    return images.new_empty_strided(
        nchw.shape,
        dense_strides(nchw.shape, channels_last),
        dtype=_key(DTYPE_CODES, dtype),
        device=torch.device("cuda", device),
    )


@torch.library.register_fake("pixfuse::normalize_out")
def _normalize_out_fake(
    images: torch.Tensor,
    mean: list[float],
    std: list[float],
    rounding: int,
    input_layout: int,
    out: torch.Tensor,
) -> None:
    return None


@torch.library.register_fake("pixfuse::channel_histogram")
def _channel_histogram_fake(images: torch.Tensor, input_layout: int) -> torch.Tensor:
    channels = view_as_nchw(images, input_layout).shape[-3]
    return images.new_empty((channels, 256), dtype=torch.int64)


@torch.library.register_fake("pixfuse::image_moments")
def _image_moments_fake(
    images: torch.Tensor, input_layout: int
) -> tuple[torch.Tensor, torch.Tensor]:
    nchw = view_as_nchw(images, input_layout)
    shape = (nchw.shape[0] if nchw.ndim == 4 else 1, nchw.shape[-3])
    sums = images.new_empty(shape, dtype=torch.int64)
    return sums, torch.empty_like(sums)


def nhwc_shape(shape: Any) -> tuple[Any, ...]:
    """(N, H, W, C) of (N, C, H, W), or (H, W, C) of (C, H, W)."""
    return (*shape[:-3], *shape[-2:], shape[-3])


@torch.library.register_fake("pixfuse::denormalize")
def _denormalize_fake(
    values: torch.Tensor, mean: list[float], std: list[float], output_layout: int, count: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    nhwc = output_layout == LAYOUT_CODES["NHWC"]
    shape = nhwc_shape(values.shape) if nhwc else values.shape
    return (
        values.new_empty(shape, dtype=torch.uint8),
        values.new_empty((2 if count else 0,), dtype=torch.int64),
    )


@torch.library.register_fake("pixfuse::denormalize_out")
def _denormalize_out_fake(
    values: torch.Tensor,
    mean: list[float],
    std: list[float],
    output_layout: int,
    count: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    return values.new_empty((2 if count else 0,), dtype=torch.int64)


@torch.library.register_fake("pixfuse::standardize_per_image")
def _standardize_per_image_fake(
    images: torch.Tensor,
    per_channel: bool,
    floor: float,
    input_layout: int,
    dtype: int,
    memory_format: int,
    way: int = 0,
) -> torch.Tensor:
    nchw = view_as_nchw(images, input_layout)
    channels_last = resolve_channels_last(nchw, _key(MEMORY_FORMAT_CODES, memory_format))
    return images.new_empty_strided(
        nchw.shape, dense_strides(nchw.shape, channels_last), dtype=_key(DTYPE_CODES, dtype)
    )


@torch.library.register_fake("pixfuse::standardize_per_image_out")
def _standardize_per_image_out_fake(
    images: torch.Tensor,
    per_channel: bool,
    floor: float,
    input_layout: int,
    out: torch.Tensor,
    way: int = 0,
) -> None:
    return None


def _check_one_device(
    images: list[torch.Tensor], placements: torch.Tensor, *outputs: torch.Tensor | None
) -> None:
    """A meta tensor beside others brings the call here, where nothing would be computed."""
    device = images[0].device
    for tensor in (*images, *outputs):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"crop_mirror_normalize: expected all tensors on one device ({device}), got "
                f"{tensor.device}"
            )
    if placements.device.type not in ("cpu", device.type):
        raise ValueError(
            f"crop_mirror_normalize: expected placements on the CPU, got {placements.device}"
        )


@torch.library.register_fake("pixfuse::crop_mirror_normalize")
def _crop_mirror_normalize_fake(
    images: list[torch.Tensor],
    placements: torch.Tensor,
    channels: int,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    rounding: int,
    fill: list[float],
    fill_is_output: bool,
    dtype: int,
    memory_format: int,
    return_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_one_device(images, placements)
    count = sum(image.shape[0] if image.ndim == 4 else 1 for image in images)
    shape = (count, channels, height, width)
    strides = dense_strides(shape, memory_format == MEMORY_FORMAT_CODES[torch.channels_last])
    out = images[0].new_empty_strided(shape, strides, dtype=_key(ELEMENT_CODES, dtype))
    mask_shape = (count, height, width) if return_mask else (0,)
    return out, images[0].new_empty(mask_shape, dtype=torch.bool)


@torch.library.register_fake("pixfuse::crop_mirror_normalize_out")
def _crop_mirror_normalize_out_fake(
    images: list[torch.Tensor],
    placements: torch.Tensor,
    channels: int,
    mean: list[float],
    std: list[float],
    rounding: int,
    fill: list[float],
    fill_is_output: bool,
    out: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    _check_one_device(images, placements, out, mask)


@torch.library.register_fake("pixfuse::empty_output")
def _empty_output_fake(size: list[int], stride: list[int], dtype: int) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=_key(ELEMENT_CODES, dtype), device="cpu")


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, from portable to best."""
    return tuple(name for name, code in ISA_CODES.items() if torch.ops.pixfuse.isa_available(code))


def active_isa() -> str:
    """The instruction set in use."""
    return _key(ISA_CODES, torch.ops.pixfuse.active_isa())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the loops of one instruction set in all threads: for tests and benchmarks."""
    before = torch.ops.pixfuse.active_isa()
    torch.ops.pixfuse.set_active_isa(ISA_CODES[name])
    try:
        yield
    finally:
        torch.ops.pixfuse.set_active_isa(before)


def _pixfuse_version() -> str:
    try:
        return version("pixfuse")
    except PackageNotFoundError:
        return "not installed"


def info() -> dict[str, Any]:
    """Say what runs here: what to paste into a bug report.

    Returns:
        A dict with

        - ``pixfuse``, ``torch``, ``python``, ``machine``: versions and processor architecture;
        - ``isa``: the instruction set of the CPU loops; ``available_isas``: what this machine can
          run. The environment variable ``PIXFUSE_ISA`` forces one;
        - ``threads``: torch's number of CPU threads;
        - ``cuda``: ``loaded`` (are CUDA kernels loaded), ``state`` (why not), ``torch`` (the CUDA
          version of torch, or None);
        - ``output_buffer``: ``limit_bytes`` (of idle memory; environment variable
          ``PIXFUSE_CACHE_BYTES``), ``idle_bytes``, ``in_use_bytes``, and the counts ``allocated``
          and ``reused``.

    Raises:
        Nothing.
    """
    limit_bytes, idle_bytes, in_use_bytes, allocated, reused = torch.ops.pixfuse.output_buffer()
    return {
        "pixfuse": _pixfuse_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "isa": active_isa(),
        "available_isas": available_isas(),
        "threads": torch.get_num_threads(),
        "cuda": {"loaded": CUDA_LOADED, "state": CUDA_STATE, "torch": torch.version.cuda},
        "output_buffer": {
            "limit_bytes": limit_bytes,
            "idle_bytes": idle_bytes,
            "in_use_bytes": in_use_bytes,
            "allocated": allocated,
            "reused": reused,
        },
    }


def empty_cache() -> None:
    """Give the idle memory of the CPU output buffer cache back to the operating system.

    Large CPU outputs (1 MiB and more) use memory that earlier ones left, since fresh pages cost
    several times the normalization itself. Up to ``PIXFUSE_CACHE_BYTES`` (environment variable,
    default 1 GiB; 0 turns the cache off) are kept while idle.

    Raises:
        Nothing.
    """
    torch.ops.pixfuse.empty_cache()
