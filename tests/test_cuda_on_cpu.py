"""The CUDA kernels, compiled with the host compiler and run on the CPU: `cuda_on_cpu/README.md`.

Values, sanitizers and a race checker, each in three orders of the threads; and for each of these,
mistakes planted in the kernels that it must find.
"""

import ctypes
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pixfuse
from pixfuse._image_input import read_images
from pixfuse._library import ELEMENT_CODES, dense_strides
from pixfuse._placement import placements_of
from pixfuse.normalization import ROUNDING_CODES, Rounding
from tests.bits import assert_same_bits
from tests.cuda_on_cpu import toolchain
from tests.cuda_on_cpu.planted import Planted, Search, searches, together
from tests.cuda_on_cpu.toolchain import (
    CSRC,
    HERE,
    LIBRARY,
    RACE,
    SANITIZED,
    UCONTEXT,
    VALUES,
    Flavor,
    Kernel,
    Program,
    Toolchain,
    program_of,
)
from tests.images import LAYOUTS, all_values
from tests.normalizations import (
    DTYPES,
    EXTREMES,
    PRESETS,
    ROUNDINGS,
    made_up,
    of_any_units,
    with_rounding,
)
from tests.samples import SAMPLES as IMAGES_OF_EVERY_KIND

ORDERS = ("forward", "reverse", "random")
WRONG_VALUE = "wrong value"

SAMPLES = Kernel(HERE / "sample_kernels.cu")
TILE = CSRC / "normalize" / "normalize_tile.h"  # what the two kernels share
NORMALIZE = Kernel(CSRC / "normalize" / "normalize_cuda.cu", header=TILE)
CROP_MIRROR_NORMALIZE = Kernel(
    CSRC / "crop_mirror_normalize" / "crop_mirror_normalize_cuda.cu", header=TILE
)


def samples(flavor: Flavor) -> Program:
    return Program(SAMPLES, ("test_samples.cpp",), flavor)


def normalize(flavor: Flavor) -> Program:
    return program_of(NORMALIZE, flavor)


def crop_mirror_normalize(flavor: Flavor) -> Program:
    return program_of(CROP_MIRROR_NORMALIZE, flavor)


def crop_mirror_normalize_library(kernel: Kernel = CROP_MIRROR_NORMALIZE) -> Program:
    return Program(kernel, ("crop_mirror_normalize_library.cpp",), LIBRARY)


def normalize_library(kernel: Kernel = NORMALIZE) -> Program:
    return Program(kernel, ("normalize_library.cpp",), LIBRARY)


def share_of(order: str) -> str:
    """A third of the cases: what the race checker sees does not depend on the order.

    All orders together run each case.
    """
    return f"{ORDERS.index(order)}/{len(ORDERS)}"


def run(
    program: Path,
    *arguments: str,
    order: str = "forward",
    seed: int = 1,
    share: str = "0/1",
    mistake: int = 0,
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CUDA_ON_CPU_SHARE": share,
        "CUDA_ON_CPU_MISTAKE": str(mistake),
        "CUDA_ON_CPU_ORDER": order,
        "CUDA_ON_CPU_SEED": str(seed),
        # Leaks are not looked for: that needs a right (ptrace) which containers often withhold.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def assert_passes(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


def assert_has_no_races(program: Path, what: str, order: str, least_bytes: int) -> None:
    """In this order's share of the cases, of which the checker has looked at enough."""
    result = run(program, what, order=order, share=share_of(order))
    assert_passes(result)
    checked = re.search(r"race checker: (\d+) bytes checked", result.stderr)
    assert checked
    assert int(checked[1]) > least_bytes


def assert_finds(result: subprocess.CompletedProcess[str], message: str) -> None:
    said = result.stdout + result.stderr
    assert result.returncode != 0, f"the mistake was not found: {said}"
    assert re.search(message, said), said


def assert_is_found(builds: Toolchain, search: Search) -> None:
    program, planted = builds.build(search.program), search.planted
    assert_finds(run(program, planted.run, mistake=search.number), planted.found_as)


# --- The emulator itself, with kernels of its own ---


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "program", [samples(flavor) for flavor in (VALUES, UCONTEXT, SANITIZED, RACE)], ids=str
)
def test_samples(builds: Toolchain, program: Program, order: str) -> None:
    assert_passes(run(builds.build(program), order=order))


UNREACHED = "__syncthreads is not reached by all threads at one line"


SAMPLE_BUGS = (
    ("over_read", samples(SANITIZED), "heap-buffer-overflow"),
    ("misaligned_access", samples(SANITIZED), "misaligned address"),
    ("missing_barrier", samples(VALUES), WRONG_VALUE),
    ("missing_barrier", samples(RACE), "uninitialized shared memory"),
    ("missing_barrier_in_loop", samples(VALUES), WRONG_VALUE),
    ("missing_barrier_in_loop", samples(RACE), "race on shared memory"),
    ("divergent_barrier", samples(VALUES), UNREACHED),
    ("early_return", samples(VALUES), f"{UNREACHED}(?s:.*)32 threads have returned"),
    ("static_shared_overrun", samples(SANITIZED), "out of bounds"),
    ("static_shared_overrun_by_pointer", samples(SANITIZED), "global-buffer-overflow"),
    ("dynamic_shared_overrun", samples(SANITIZED), "heap-buffer-overflow"),
    ("uninitialized_shared", samples(VALUES), WRONG_VALUE),
    ("uninitialized_shared", samples(RACE), "uninitialized shared memory"),
    ("missing_warp_barrier", samples(RACE), "uninitialized shared memory"),
    ("shuffle_as_warp_barrier", samples(RACE), "race on shared memory"),
    ("shuffle_outside_mask", samples(VALUES), "shuffle reads a lane that does not take part"),
    ("divergent_shuffle", samples(VALUES), "lanes of one mask meet at different"),
    ("plain_increment", samples(RACE), "race on shared memory"),
    ("overlapping_blocks", samples(RACE), "race on global memory"),
)


@pytest.mark.parametrize(
    ("bug", "program", "found_as"),
    SAMPLE_BUGS,
    ids=[f"{bug}-{program.flavor.name}" for bug, program, _ in SAMPLE_BUGS],
)
def test_bug_in_a_sample_is_found(
    builds: Toolchain, bug: str, program: Program, found_as: str
) -> None:
    assert_finds(run(builds.build(program), bug), found_as)


def test_orders_of_the_threads(builds: Toolchain) -> None:
    program = builds.build(samples(VALUES))

    def order(name: str, seed: int = 1) -> list[int]:
        return [int(rank) for rank in run(program, "order", order=name, seed=seed).stdout.split()]

    assert order("forward") == list(range(64))
    assert order("reverse") == list(reversed(range(64)))
    assert sorted(order("random")) == list(range(64))
    assert len({tuple(order("random", seed)) for seed in range(5)}) == 5
    assert_finds(run(program, "order", order="sideways"), "is forward, reverse or random")


def test_race_reports_name_both_lines(builds: Toolchain) -> None:
    said = run(builds.build(samples(RACE)), "missing_barrier_in_loop").stderr
    lines = re.findall(r"(read|write) by block 0, thread \d+, at sample_kernels\.cu:(\d+)", said)
    source = SAMPLES.path.read_text().splitlines()
    statements = {kind: source[int(line) - 1] for kind, line in lines}
    assert "= input[start + i]" in statements["write"]
    assert "= row[i]" in statements["read"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_samples_are_cuda(tmp_path: Path) -> None:
    # What the emulator accepts in them, the real compiler must accept too.
    command = ["nvcc", "-std=c++20", "-arch=sm_75", f"-I{CSRC}", "-c", str(SAMPLES.path)]
    subprocess.run([*command, "-o", str(tmp_path / "samples.o")], check=True)


def test_missing_headers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_package: str) -> None:
        return None

    monkeypatch.setattr(importlib.metadata, "files", none)
    with pytest.raises(RuntimeError, match=r"install nvidia-cuda-runtime as in requirements/test"):
        toolchain.cuda_include()


def test_text_to_replace_must_be_there_once() -> None:
    replacements = (("int sum_rows(", "int other("),)
    assert "int other(" in replace(SAMPLES, replacements=replacements).text()
    for old in ("no such text", "__syncthreads();"):
        found = SAMPLES.path.read_text().count(old)
        assert found != 1
        with pytest.raises(ValueError, match=f"found {found} times instead of once: "):
            replace(SAMPLES, replacements=((old, ""),)).text()
        with pytest.raises(ValueError, match=f"found {found} times instead of once: "):
            replace(SAMPLES, mistakes=((old, ""),)).text()


def test_texts_to_replace_must_not_overlap() -> None:
    mistakes = (("sum_of_warp(sum, bug)", "0"), ("sum = sum_of_warp(sum, bug);", ""))
    with pytest.raises(ValueError, match="overlaps what is replaced, too: "):
        replace(SAMPLES, mistakes=mistakes).text()


# --- normalize ---


@pytest.mark.parametrize("what", ["values", "shapes", "far"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [normalize(VALUES)], ids=str)
def test_normalize(builds: Toolchain, program: Program, order: str, what: str) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("what", ["values", "shapes", "far"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [normalize(SANITIZED)], ids=str)
def test_normalize_sanitized(builds: Toolchain, program: Program, order: str, what: str) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("what", ["values", "few"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [normalize(RACE)], ids=str)
def test_normalize_has_no_races(builds: Toolchain, program: Program, order: str, what: str) -> None:
    assert_has_no_races(builds.build(program), what, order, 1_000_000)


@pytest.mark.skipif(
    os.environ.get("PIXFUSE_TEST_LARGE") != "1", reason="takes a minute: set PIXFUSE_TEST_LARGE=1"
)
@pytest.mark.parametrize("program", [normalize(VALUES)], ids=str)
def test_normalize_more_than_2_to_the_31_elements(builds: Toolchain, program: Program) -> None:
    assert_passes(run(builds.build(program), "large"))


# Each line of the kernel that keeps it inside its memory, ordered or exact, left out once.
PLANTED = (
    Planted(
        "load_past_the_end",
        NORMALIZE,
        "first >= 0 && first + kChunkBytes <= run_bytes",
        "first >= 0 && first < run_bytes",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow",
    ),
    Planted(
        "load_before_the_start",
        NORMALIZE,
        "first >= 0 && first + kChunkBytes <= run_bytes",
        "first + kChunkBytes <= run_bytes",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow|use-after-poison",
    ),
    Planted(
        "misaligned_load",
        NORMALIZE,
        "walk.chunk * kChunkBytes - offset_in_chunk(source)",
        "walk.chunk * kChunkBytes",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "misaligned_store",
        NORMALIZE,
        "offset_in_chunk(target) / static_cast<int>(sizeof(T))",
        "0",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "store_past_the_end",
        NORMALIZE,
        "gaps || first < 0 || first + kVector > run_elements",
        "gaps || first < 0",
        VALUES,
        "shapes",
        "which lies between, was written",
    ),
    Planted(
        "too_little_shared_memory",
        NORMALIZE,
        "return run_count * run_pitch(pixels);",
        "return run_count * run_pitch(pixels) - 16;",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow|store to null pointer",
    ),
    Planted(
        "too_much_shared_memory",
        NORMALIZE,
        "constexpr int kTileBytes = 4096;",
        "constexpr int kTileBytes = 65536;",
        VALUES,
        "shapes",
        "CUDA error 1",
        has_own_program=True,
    ),
    Planted(
        "no_barrier_before_staging",
        NORMALIZE,
        "__syncthreads(); // Stage the bytes.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "no_barrier_after_staging",
        NORMALIZE,
        "__syncthreads(); // Convert, in the order of the output.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "barrier_in_a_branch",
        NORMALIZE,
        "__syncthreads(); // Stage the bytes.",
        "if (described < rows * channels) __syncthreads();",
        VALUES,
        "values",
        UNREACHED,
    ),
    Planted(
        "uninitialized_constant",
        NORMALIZE,
        "threadIdx.x < channels",
        "threadIdx.x + 1 < channels",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "blocks_that_overlap",
        NORMALIZE,
        "smaller(p.shape.pixels, p.width - pixel0)",
        "smaller(p.shape.pixels + 1, p.width - pixel0)",
        RACE,
        "few",
        "race on global memory",
    ),
    Planted(
        "offset_of_32_bits",
        NORMALIZE,
        "parameters.images + offset(parameters.image_strides)",
        "parameters.images + static_cast<int>(offset(parameters.image_strides))",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "output_offset_of_32_bits",
        NORMALIZE,
        "offset(parameters.output_strides)",
        "static_cast<int>(offset(parameters.output_strides))",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "reciprocal",
        NORMALIZE,
        "__fdiv_rn(static_cast<float>(x), 255.0f)",
        "__fmul_rn(static_cast<float>(x), 1.0f / 255.0f)",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "contraction",
        NORMALIZE,
        "__fsub_rn(scaled, mean)",
        "__fmaf_rn(static_cast<float>(x), launch.scale, -mean)",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "cancellation",
        NORMALIZE,
        "center_low = channel.center_low;",
        "center_low = 0.0;",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "float_instead_of_double",
        NORMALIZE,
        "__double2float_rn(__dmul_rn(centered, inverse_width))",
        "__fmul_rn(static_cast<float>(centered), static_cast<float>(inverse_width))",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "half_towards_zero",
        NORMALIZE,
        "result = __float2half_rn(value);",
        "result = __float2half_rz(value);",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "bfloat16_truncated",
        NORMALIZE,
        "result = __float2bfloat16_rn(value);",
        "result = __float2bfloat16_rz(value);",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
)


def test_shares_are_all_cases(builds: Toolchain) -> None:
    program = builds.build(normalize(VALUES))

    def calls(share: str) -> int:
        result = run(program, "values", share=share)
        assert_passes(result)
        found = re.match(r"(\d+) calls, 0 wrong", result.stdout)
        assert found
        return int(found[1])

    shares = [calls(share_of(order)) for order in ORDERS]
    assert min(shares) > 0
    assert sum(shares) == calls("0/1")
    assert_finds(run(program, "values", share="3/3"), "CUDA_ON_CPU_SHARE is a share")


def test_header_to_replace_text_in_must_be_included_once() -> None:
    assert "struct Tile {" in NORMALIZE.text()
    with pytest.raises(ValueError, match="expected one line #include"):
        replace(SAMPLES, header=TILE).text()


# --- crop_mirror_normalize ---


@pytest.mark.parametrize("what", ["values", "shapes", "far"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [crop_mirror_normalize(VALUES)], ids=str)
def test_crop_mirror_normalize(builds: Toolchain, program: Program, order: str, what: str) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("what", ["values", "shapes", "far"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [crop_mirror_normalize(SANITIZED)], ids=str)
def test_crop_mirror_normalize_sanitized(
    builds: Toolchain, program: Program, order: str, what: str
) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("what", ["values", "shapes"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [crop_mirror_normalize(RACE)], ids=str)
def test_crop_mirror_normalize_has_no_races(
    builds: Toolchain, program: Program, order: str, what: str
) -> None:
    assert_has_no_races(builds.build(program), what, order, 1_000_000)


PLANTED_IN_CROP_MIRROR_NORMALIZE = (
    Planted(
        "mirrored_run_starts_at_its_end",
        CROP_MIRROR_NORMALIZE,
        "smaller(0, (end_pixel - first_pixel - 1) * pixel_step)",
        "0",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "channels_backwards_start_at_the_end",
        CROP_MIRROR_NORMALIZE,
        "smaller(0, (p.launch.channels - 1) * channel_step)",
        "0",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "rows_below_the_image",
        CROP_MIRROR_NORMALIZE,
        "end_row = between(first_row, top + image.height, rows);",
        "end_row = rows;",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow|null pointer",
    ),
    Planted(
        "pixels_right_of_the_image",
        CROP_MIRROR_NORMALIZE,
        "end_pixel = between(first_pixel, left + image.width, pixels);",
        "end_pixel = pixels;",
        VALUES,
        "shapes",
        "elements of the mask differ",
    ),
    Planted(
        "tile_without_pixels_of_the_image",
        CROP_MIRROR_NORMALIZE,
        "first_pixel == end_pixel",
        "false",
        SANITIZED,
        "shapes",
        "division by zero",
    ),
    Planted(
        "vector_that_ends_in_the_fill",
        CROP_MIRROR_NORMALIZE,
        "pixel_inside(pixel_of(first + kVector - 1))",
        "true",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "vector_that_begins_in_the_fill",
        CROP_MIRROR_NORMALIZE,
        "pixel_inside(pixel_of(first))",
        "true",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "fill_of_another_channel",
        CROP_MIRROR_NORMALIZE,
        "convert(fill[channel], result);",
        "convert(fill[0], result);",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "fill_of_another_launch",
        CROP_MIRROR_NORMALIZE,
        "p.fill[c] = args.fill[first_channel + c];",
        "p.fill[c] = args.fill[c];",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "channels_of_another_launch",
        CROP_MIRROR_NORMALIZE,
        "image.pixels += first_channel * image.channel_stride;",
        "",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "images_of_another_launch",
        CROP_MIRROR_NORMALIZE,
        "part.images += n;",
        "",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "output_of_another_launch",
        CROP_MIRROR_NORMALIZE,
        "part.output = static_cast<T*>(args.output) + n * args.output_strides[0];",
        "",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "mask_of_another_launch",
        CROP_MIRROR_NORMALIZE,
        "if (args.mask != nullptr) part.mask += n * args.sizes[2] * args.sizes[3];",
        "",
        VALUES,
        "shapes",
        "elements of the mask differ",
    ),
    Planted(
        "mask_without_an_end",
        CROP_MIRROR_NORMALIZE,
        "static_cast<uint8_t>(inside && pixel >= tile.first_pixel && pixel < tile.end_pixel)",
        "static_cast<uint8_t>(inside && pixel >= tile.first_pixel)",
        VALUES,
        "shapes",
        "elements of the mask differ",
    ),
    Planted(
        "mask_past_the_end",
        CROP_MIRROR_NORMALIZE,
        "first < 0 || first + kChunkBytes > tile.pixels",
        "first < 0",
        VALUES,
        "shapes",
        "the mask's end was written over",
    ),
    Planted(
        "misaligned_mask",
        CROP_MIRROR_NORMALIZE,
        "walk.chunk * kChunkBytes - offset_in_chunk(target)",
        "walk.chunk * kChunkBytes",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "shared_memory_of_the_last_image",
        CROP_MIRROR_NORMALIZE,
        "if (needed > shared_bytes) shared_bytes = needed;",
        "shared_bytes = needed;",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow|store to null pointer",
    ),
    Planted(
        "rows_with_gaps_as_one",
        CROP_MIRROR_NORMALIZE,
        "image.row_stride != image.pixel_stride * width",
        "false",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "row_offset_of_32_bits",
        CROP_MIRROR_NORMALIZE,
        "(row0 + row - image.top) * image.row_stride",
        "static_cast<int>((row0 + row - image.top) * image.row_stride)",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "pixel_offset_of_32_bits",
        CROP_MIRROR_NORMALIZE,
        "walk.chunk * tile.pixel_stride()",
        "static_cast<int>(walk.chunk * tile.pixel_stride())",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "tiles_that_overlap",
        CROP_MIRROR_NORMALIZE,
        "smaller(p.shape.pixels, p.width - pixel0)",
        "smaller(p.shape.pixels + 1, p.width - pixel0)",
        RACE,
        "few",
        "race on global memory",
    ),
    Planted(
        "no_barrier_after_staging_a_crop",
        CROP_MIRROR_NORMALIZE,
        "__syncthreads(); // Convert, in the order of the output.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
)


SEARCHES = searches([*PLANTED, *PLANTED_IN_CROP_MIRROR_NORMALIZE])


@pytest.mark.parametrize("program", together(SEARCHES), ids=str)
def test_nothing_is_found_without_a_mistake(builds: Toolchain, program: Program) -> None:
    assert_passes(run(builds.build(program), "few"))


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_mistakes_are_found(builds: Toolchain, search: Search) -> None:
    assert_is_found(builds, search)


# --- normalize, called from Python ---

Normalize = Callable[[torch.Tensor, pixfuse.Normalization, torch.dtype, bool], torch.Tensor]


def load(library: Path) -> Normalize:
    function = ctypes.CDLL(str(library)).normalize_cuda_on_cpu

    def per_channel(values: tuple[float, ...], channels: int) -> ctypes.Array[ctypes.c_double]:
        repeated = values * channels if len(values) == 1 else values
        return (ctypes.c_double * channels)(*repeated)

    def call(
        images: torch.Tensor,
        normalization: pixfuse.Normalization,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> torch.Tensor:
        n, c, h, w = images.shape
        strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
        out = torch.full((n * c * h * w,), torch.nan, dtype=dtype).as_strided(images.shape, strides)
        four = ctypes.c_int64 * 4
        error = function(
            ctypes.c_void_p(images.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            four(*images.shape),
            four(*images.stride()),
            four(*strides),
            ctypes.c_int32(DTYPES.index(dtype)),
            per_channel(normalization.mean, c),
            per_channel(normalization.std, c),
            ctypes.c_int32(ROUNDING_CODES[normalization.rounding]),
        )
        assert error == 0, f"CUDA error {error}"
        return out

    return call


@pytest.fixture(scope="session", params=[normalize_library()], ids=str)
def normalize_on_cpu(builds: Toolchain, request: pytest.FixtureRequest) -> Normalize:
    return load(builds.build(request.param))


def assert_equals_reference(
    normalize: Normalize,
    images: torch.Tensor,
    normalization: pixfuse.Normalization,
    dtype: torch.dtype,
) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        expected = pixfuse.reference.normalize(
            images, normalization, dtype=dtype, memory_format=memory_format
        )
        channels_last = memory_format == torch.channels_last
        assert_same_bits(normalize(images, normalization, dtype, channels_last), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_value_equals_reference(
    normalize_on_cpu: Normalize, rounding: Rounding, dtype: torch.dtype
) -> None:
    normalizations = [
        *PRESETS.values(),
        *(of_any_units(mean, std) for mean, std in EXTREMES),
    ]
    for channels in (*range(1, 9), 13):
        planar = all_values(channels)
        interleaved = planar.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for normalization in (made_up(channels, rounding), *normalizations):
            if len(normalization.mean) not in (1, channels):
                continue
            same = with_rounding(normalization, rounding)
            for images in (planar, interleaved):
                assert_equals_reference(normalize_on_cpu, images, same, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_reference(normalize_on_cpu: Normalize, layout: str) -> None:
    for channels in (1, 2, 3, 4, 13):
        for height, width in ((1, 1), (1, 40), (5, 33), (16, 16), (3, 1500)):
            images = LAYOUTS[layout](2, channels, height, width)
            normalization = made_up(channels, "torchvision")
            assert_equals_reference(normalize_on_cpu, images, normalization, torch.float32)


@pytest.mark.parametrize(
    "program",
    [
        normalize_library(
            replace(
                NORMALIZE,
                replacements=(
                    ("result = __float2half_rn(value)", "result = __float2half_rz(value)"),
                ),
            )
        )
    ],
    ids=["round_towards_zero"],
)
def test_comparison_with_reference_can_fail(builds: Toolchain, program: Program) -> None:
    wrong = load(builds.build(program))
    normalization = made_up(3, "torchvision")
    assert_equals_reference(wrong, all_values(3), normalization, torch.float32)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_equals_reference(wrong, all_values(3), normalization, torch.float16)


# --- crop_mirror_normalize, called from Python ---

Crop = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def load_crop(library: Path) -> Crop:
    function = ctypes.CDLL(str(library)).crop_mirror_normalize_cuda_on_cpu

    def described(image: Any) -> tuple[int, ...]:
        """Address, sizes and strides of an array or a tensor, as rows, pixels, channels."""
        array = image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else image
        return (array.__array_interface__["data"][0], *array.shape, *array.strides)

    def call(
        images: list[Any],
        size: tuple[int, int],
        normalization: pixfuse.Normalization,
        *,
        fill: tuple[float, ...],
        fill_space: str,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        **placing: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(images), len(normalization.mean), *size)
        channels_last = memory_format == torch.channels_last
        strides = dense_strides(shape, channels_last)
        out = torch.full((math.prod(shape),), 77, dtype=dtype).as_strided(shape, strides)
        mask = torch.full((len(images), *size), True)
        whole = {"anchor": (0.5, 0.5), "top": None, "left": None, **placing}
        placements = placements_of(read_images(images), size, **whole)
        rows = torch.tensor([described(image) for image in images])
        per_channel = ctypes.c_double * shape[1]
        error = function(
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_void_p(placements.data_ptr()),
            (ctypes.c_int64 * 4)(*shape),
            (ctypes.c_int64 * 4)(*strides),
            per_channel(*normalization.mean),
            per_channel(*normalization.std),
            ctypes.c_int32(normalization.rounding_code),
            per_channel(*fill),
            ctypes.c_bool(fill_space == "output"),
            ctypes.c_int32(ELEMENT_CODES[dtype]),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(mask.data_ptr()),
        )
        assert error == 0, f"CUDA error {error}"
        return out, mask

    return call


@pytest.fixture(scope="session", params=[crop_mirror_normalize_library()], ids=str)
def crop_on_cpu(builds: Toolchain, request: pytest.FixtureRequest) -> Crop:
    return load_crop(builds.build(request.param))


def assert_crops_equal_reference(
    crop: Crop, rounding: Rounding, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Images of every kind in one batch, windows that leave them, both units of the fill."""
    images = [
        make(3, 11 + n % 19, 38 - n % 23) for n, make in enumerate(IMAGES_OF_EVERY_KIND.values())
    ]
    count = len(images)
    for fill_space in ("input",) if dtype == torch.uint8 else ("input", "output"):
        options: dict[str, Any] = {
            "mirror": [n % 2 == 1 for n in range(count)],
            "flip": [n % 3 == 1 for n in range(count)],
            "out_of_bounds": "pad",
            "fill": (3.0, 200.0, 77.0),
            "fill_space": fill_space,
            "dtype": dtype,
            "memory_format": memory_format,
        }
        normalization = made_up(3, rounding)
        result, mask = crop(images, (20, 27), normalization, **options)
        expected, expected_mask = pixfuse.reference.crop_mirror_normalize(
            images, (20, 27), normalization, return_mask=True, **options
        )
        assert_same_bits(result, expected)
        assert_same_bits(mask, expected_mask)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_crops_equal_reference(
    crop_on_cpu: Crop, rounding: Rounding, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    assert_crops_equal_reference(crop_on_cpu, rounding, dtype, memory_format)


@pytest.mark.parametrize(
    "program",
    [
        crop_mirror_normalize_library(
            replace(
                CROP_MIRROR_NORMALIZE,
                replacements=(
                    ("p.fill[c] = args.fill[first_channel + c];", "p.fill[c] = args.fill[0];"),
                ),
            )
        )
    ],
    ids=["one_fill_for_all"],
)
def test_comparison_of_crops_with_reference_can_fail(builds: Toolchain, program: Program) -> None:
    wrong = load_crop(builds.build(program))
    with pytest.raises(AssertionError, match="elements differ"):
        assert_crops_equal_reference(wrong, "torchvision", torch.float32, torch.channels_last)
