"""The CUDA kernels that count, standardize and invert pixels, run on the CPU.

Values, sanitizers in three orders of the threads, a race checker, and mistakes planted in the
kernels that these must find: `cuda_on_cpu/README.md`.
"""

import re
from dataclasses import dataclass

import pytest

from tests.cuda_on_cpu.toolchain import (
    CSRC,
    RACE,
    SANITIZED,
    VALUES,
    Flavor,
    Kernel,
    Program,
    Toolchain,
)
from tests.test_cuda_on_cpu import (
    ORDERS,
    UNREACHED,
    WRONG_VALUE,
    assert_finds,
    assert_passes,
    run,
    share_of,
)

#: Each operator that has kernels here, with what its test program can be asked to do.
OPERATORS = {
    "channel_histogram": ("shapes", "far"),
    "denormalize": ("values", "shapes", "far"),
    "standardize_per_image": ("shapes", "far", "large", "limits"),
}


#: Where a part of the kernels is in a header of its own.
HEADERS = {
    "standardize_per_image": CSRC / "standardize_per_image" / "standardize_per_image_one_pass.h"
}


def program(operator: str, flavor: Flavor, *replacements: tuple[str, str]) -> Program:
    source = CSRC / operator / f"{operator}_cuda.cu"
    kernel = Kernel(source, replacements, HEADERS.get(operator))
    return Program(kernel, (f"test_{operator}.cpp",), flavor)


@dataclass(frozen=True)
class Planted:
    """A mistake in a kernel, and the check that must find it."""

    name: str
    operator: str
    old: str  # stands in the source exactly once; line breaks do not matter
    new: str
    flavor: Flavor
    run: str  # what the test program is asked to do
    found_as: str  # what it says then

    @property
    def program(self) -> Program:
        return program(self.operator, self.flavor, (self.old, self.new))


def cases(flavor: Flavor) -> list[tuple[Program, str]]:
    return [(program(name, flavor), what) for name, jobs in OPERATORS.items() for what in jobs]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("program", "what"), cases(VALUES), ids=str)
def test_values(builds: Toolchain, program: Program, what: str, order: str) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("program", "what"), cases(SANITIZED), ids=str)
def test_sanitized(builds: Toolchain, program: Program, what: str, order: str) -> None:
    assert_passes(run(builds.build(program), what, order=order, share=share_of(order)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [program(name, RACE) for name in OPERATORS], ids=str)
def test_no_races(builds: Toolchain, program: Program, order: str) -> None:
    result = run(builds.build(program), "few", order=order, share=share_of(order))
    assert_passes(result)
    checked = re.search(r"race checker: (\d+) bytes checked", result.stderr)
    assert checked
    assert int(checked[1]) > 100_000


HISTOGRAM = "channel_histogram"
DENORMALIZE = "denormalize"
STANDARDIZE = "standardize_per_image"

PLANTED = (
    Planted(
        "load_past_the_end",
        HISTOGRAM,
        "first >= 0 && first + kChunk <= p.run_elements) {",
        "first >= 0 && first < p.run_elements) {",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow",
    ),
    Planted(
        "load_before_the_start",
        HISTOGRAM,
        "p.run_step == 1 && first >= 0 && first + kChunk",
        "p.run_step == 1 && first + kChunk",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "misaligned_load",
        HISTOGRAM,
        "item % p.chunks_per_run * kChunk - off_boundary",
        "item % p.chunks_per_run * kChunk",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "chunk_left_out",
        HISTOGRAM,
        "divide_up(p.run_elements + (p.run_step == 1 ? kChunk - 1 : 0), kChunk)",
        "divide_up(p.run_elements, kChunk)",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "plain_increment",
        HISTOGRAM,
        "const unsigned byte = __ldg(source + i * p.run_step); "
        "atomicAdd(&table[channel * kByteValues + byte], 1u);",
        "const unsigned byte = __ldg(source + i * p.run_step); "
        "++table[channel * kByteValues + byte];",
        RACE,
        "few",
        "race on shared memory",
    ),
    Planted(
        "plain_addition_of_results",
        HISTOGRAM,
        "atomicAdd(reinterpret_cast<Counter*>(total), value)",
        "*reinterpret_cast<Counter*>(total) += value",
        RACE,
        "few",
        "race on global memory",
    ),
    Planted(
        "no_barrier_before_counting",
        HISTOGRAM,
        "__syncthreads(); // Count.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "no_barrier_after_counting",
        HISTOGRAM,
        "__syncthreads(); // Add up",
        "// Add up",
        RACE,
        "few",
        "race on shared memory",
    ),
    Planted(
        "barrier_in_a_branch",
        HISTOGRAM,
        "__syncthreads(); // Add up",
        "if (start + threadIdx.x < p.items) __syncthreads(); // Add up",
        VALUES,
        "shapes",
        UNREACHED,
    ),
    Planted(
        "table_not_cleared",
        HISTOGRAM,
        "i < kTables * entries;",
        "i < (kTables - 1) * entries;",
        RACE,
        "few",
        "uninitialized shared memory",
    ),
    Planted(
        "table_left_out",
        HISTOGRAM,
        "for (int k = 0; k < kTables; ++k)",
        "for (int k = 1; k < kTables; ++k)",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "offset_of_32_bits",
        HISTOGRAM,
        "group * p.group_stride +",
        "static_cast<int>(group * p.group_stride) +",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "channel_offset_of_32_bits",
        HISTOGRAM,
        "channel * p.channel_stride;",
        "static_cast<int>(channel * p.channel_stride);",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "channels_out_of_turn",
        HISTOGRAM,
        "channel = static_cast<int>(first % p.channels)",
        "channel = 0",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "second_launch_over_the_first",
        HISTOGRAM,
        "part.counts = args.counts + first * kByteValues;",
        "part.counts = args.counts + 0 * first;",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "store_past_the_end",
        DENORMALIZE,
        "!p.gaps && end - begin == kChunk",
        "!p.gaps && begin == first",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow",
    ),
    Planted(
        "store_before_the_start",
        DENORMALIZE,
        "!p.gaps && end - begin == kChunk",
        "!p.gaps && end == first + kChunk",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "misaligned_store",
        DENORMALIZE,
        "kChunk - off_boundary;",
        "kChunk;",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "misaligned_load",
        DENORMALIZE,
        "together = whole && p.in_order && aligned;",
        "together = whole && p.in_order;",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "load_past_the_end",
        DENORMALIZE,
        "together = whole && p.in_order && aligned;",
        "together = begin == first && p.in_order && aligned;",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow",
    ),
    Planted(
        "values_in_another_order",
        DENORMALIZE,
        "together = whole && p.in_order && aligned;",
        "together = whole && p.value_strides[3] <= p.channels && aligned;",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "gaps_overwritten",
        DENORMALIZE,
        "whole = !p.gaps &&",
        "whole =",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "chunk_left_out",
        DENORMALIZE,
        "divide_up(p.run_elements + kChunk - 1, kChunk)",
        "divide_up(p.run_elements, kChunk)",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "contraction",
        DENORMALIZE,
        "__fadd_rn(__fmul_rn(x, scales[channel].scale), scales[channel].offset)",
        "__fmaf_rn(x, scales[channel].scale, scales[channel].offset)",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "half_up",
        DENORMALIZE,
        "__float_as_uint(__fadd_rn(inside, kRoundToInteger)) & 0xffu",
        "inside + 0.5f",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "nan_to_255",
        DENORMALIZE,
        "y > 0.0f ? y : 0.0f;",
        "y < 0.0f ? 0.0f : y;",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "half_of_a_step_clamped",
        DENORMALIZE,
        "y < -0.5f ||",
        "y <= -0.5f ||",
        VALUES,
        "values",
        WRONG_VALUE,
    ),
    Planted(
        "no_barrier_before_converting",
        DENORMALIZE,
        "__syncthreads(); // Convert.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "no_barrier_after_converting",
        DENORMALIZE,
        "__syncthreads(); // Add up.",
        "",
        RACE,
        "few",
        "race on shared memory",
    ),
    Planted(
        "barrier_in_a_branch",
        DENORMALIZE,
        "__syncthreads(); // Add up.",
        "if (start < p.items) __syncthreads();",
        VALUES,
        "shapes",
        UNREACHED,
    ),
    Planted(
        "plain_tally",
        DENORMALIZE,
        "atomicAdd(total, tallies[threadIdx.x]);",
        "*total += tallies[threadIdx.x];",
        RACE,
        "few",
        "race on global memory",
    ),
    Planted(
        "offset_of_32_bits",
        DENORMALIZE,
        "pixel * p.value_strides[3] +",
        "static_cast<int>(pixel * p.value_strides[3]) +",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "output_offset_of_32_bits",
        DENORMALIZE,
        "p.output + n * p.output_strides[0] +",
        "p.output + static_cast<int>(n * p.output_strides[0]) +",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "last_constant_left_out",
        DENORMALIZE,
        "if (threadIdx.x < p.channels)",
        "if (threadIdx.x + 1 < p.channels)",
        RACE,
        "few",
        "uninitialized shared memory",
    ),
    Planted(
        "no_barrier",
        STANDARDIZE,
        "__syncthreads(); const uint8_t* image =",
        "const uint8_t* image =",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "barrier_in_a_branch",
        STANDARDIZE,
        "__syncthreads(); const uint8_t* image =",
        "if (threadIdx.x < p.channels) __syncthreads(); const uint8_t* image =",
        VALUES,
        "shapes",
        UNREACHED,
    ),
    Planted(
        "last_constant_left_out",
        STANDARDIZE,
        "if (threadIdx.x < p.channels)",
        "if (threadIdx.x + 1 < p.channels)",
        RACE,
        "few",
        "uninitialized shared memory",
    ),
    Planted(
        "write_past_the_end",
        STANDARDIZE,
        "const int64_t values = p.pixels * p.channels;",
        "const int64_t values = p.pixels * p.channels + 1;",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow|out of bounds",
    ),
    Planted(
        "blocks_that_overlap",
        STANDARDIZE,
        "blockIdx.x % p.blocks_per_image) * kThreads;",
        "blockIdx.x % p.blocks_per_image) * (kThreads - 1);",
        RACE,
        "few",
        "race on global memory",
    ),
    Planted(
        "cancellation",
        STANDARDIZE,
        "low[threadIdx.x] = constants.center_low;",
        "low[threadIdx.x] = 0.0;",
        VALUES,
        "large",
        WRONG_VALUE,
    ),
    Planted(
        "float_instead_of_double",
        STANDARDIZE,
        "__double2float_rn(__dmul_rn(centered, inverse_width[channel]))",
        "__fmul_rn(static_cast<float>(centered), static_cast<float>(inverse_width[channel]))",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "count_of_one_channel",
        STANDARDIZE,
        "count *= p.all_channels;",
        "",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "channels_of_the_first_launch",
        STANDARDIZE,
        "p.first_channel + threadIdx.x;",
        "threadIdx.x;",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "offset_of_32_bits",
        STANDARDIZE,
        "image + channel * p.image_strides[1] + h",
        "image + static_cast<int>(channel * p.image_strides[1]) + h",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_no_barrier_after_staging",
        STANDARDIZE,
        "__syncthreads(); // All bytes are staged.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "one_pass_no_barrier_before_constants",
        STANDARDIZE,
        "__syncthreads(); // All parts are added up.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "one_pass_no_barrier_before_tables",
        STANDARDIZE,
        "__syncthreads(); // The constants are there.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "one_pass_no_barrier_before_writing",
        STANDARDIZE,
        "__syncthreads(); // The tables are there.",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "one_pass_barrier_in_a_branch",
        STANDARDIZE,
        "__syncthreads(); // The tables are there.",
        "if (thread < channels) __syncthreads();",
        VALUES,
        "shapes",
        UNREACHED,
    ),
    Planted(
        "one_pass_first_byte_not_counted",
        STANDARDIZE,
        "target[k][i] = byte; own.add(byte);",
        "target[k][i] = byte; if (i > 0) own.add(byte);",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_chunks_not_counted",
        STANDARDIZE,
        "own.add(bytes[k]);",
        "",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_last_byte_of_a_chunk_not_counted",
        STANDARDIZE,
        "sum = __dp4a(word, 0x01010101u, sum);",
        "sum = __dp4a(word, word == bytes.w ? 0x00010101u : 0x01010101u, sum);",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_gathered_byte_not_counted",
        STANDARDIZE,
        "walk.item] = byte; own.add(byte);",
        "walk.item] = byte; if (walk.run > 0) own.add(byte);",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_first_pixel_not_counted",
        STANDARDIZE,
        "for (Walk walk(p.pixels, start, parts",
        "for (Walk walk(p.pixels, start + 1, parts",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_parts_that_overlap",
        STANDARDIZE,
        "item / channels * kWarpThreads + lane;",
        "item / channels * (kWarpThreads - 1) + lane;",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_bytes_of_nobody_counted",
        STANDARDIZE,
        "const bool dense = p.plan.pixel_bytes == channels &&",
        "const bool dense = p.plan.pixel_bytes > 0 ||",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_sums_of_32_bits",
        STANDARDIZE,
        "using Total = unsigned long long;",
        "using Total = unsigned;",
        VALUES,
        "limits",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_count_of_one_channel",
        STANDARDIZE,
        "p.pixels * (p.per_channel ? 1 : channels);",
        "p.pixels;",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_constants_of_all_channels",
        STANDARDIZE,
        "if (p.per_channel && item % channels != thread) continue;",
        "",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_table_of_the_first_channel",
        STANDARDIZE,
        "p.per_channel ? channel_of(i) * kByteValues : 0",
        "0",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_table_too_short",
        STANDARDIZE,
        "(p.per_channel ? channels : 1) * kByteValues;",
        "(p.per_channel ? channels : 1) * kByteValues - 1;",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "one_pass_limit_without_what_is_declared",
        STANDARDIZE,
        "limits.shared_bytes - static_cast<int64_t>(sizeof(OnePassBlock));",
        "limits.shared_bytes;",
        VALUES,
        "limits",
        "what fits",
    ),
    Planted(
        "one_pass_limit_without_tables",
        STANDARDIZE,
        "staged + tables * kByteValues * element_bytes(args.dtype);",
        "staged;",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow",
    ),
    Planted(
        "one_pass_no_limit",
        STANDARDIZE,
        "found.fits = found.shared_bytes <= room;",
        "found.fits = true;",
        VALUES,
        "limits",
        "what fits",
    ),
    Planted(
        "one_pass_memory_not_asked_for",
        STANDARDIZE,
        "const cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);",
        "const cudaError_t error = cudaSuccess;",
        VALUES,
        "limits",
        "CUDA error",
    ),
    Planted(
        "one_pass_load_past_the_end",
        STANDARDIZE,
        "first[k] >= 0 && first[k] + kChunkBytes <= run_bytes;",
        "first[k] >= 0 && first[k] < run_bytes;",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow",
    ),
    Planted(
        "one_pass_load_before_the_start",
        STANDARDIZE,
        "first[k] >= 0 && first[k] + kChunkBytes <= run_bytes;",
        "first[k] + kChunkBytes <= run_bytes;",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_misaligned_load",
        STANDARDIZE,
        "walk.item * kChunkBytes - offset_in_chunk(source[k]);",
        "walk.item * kChunkBytes;",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "one_pass_misaligned_staging",
        STANDARDIZE,
        "(gathered ? 0 : offset_in_chunk(source));",
        "0;",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "one_pass_misaligned_store",
        STANDARDIZE,
        "- offset_in_chunk(target) / static_cast<int>(sizeof(T));",
        ";",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "one_pass_store_past_the_end",
        STANDARDIZE,
        "if (first < 0 || first + kVector > elements) {",
        "if (first < 0) {",
        SANITIZED,
        "shapes",
        "heap-buffer-overflow",
    ),
    Planted(
        "one_pass_store_before_the_start",
        STANDARDIZE,
        "if (first < 0 || first + kVector > elements) {",
        "if (first + kVector > elements) {",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_chunk_left_out",
        STANDARDIZE,
        "(run_bytes + 2 * (kChunkBytes - 1)) / kChunkBytes",
        "(run_bytes + kChunkBytes - 1) / kChunkBytes",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_groups_that_overlap",
        STANDARDIZE,
        "plane = blockIdx.x % p.planes;",
        "plane = 0 * blockIdx.x;",
        RACE,
        "few",
        "race on global memory",
    ),
    Planted(
        "one_pass_offset_of_32_bits",
        STANDARDIZE,
        "image + channel * p.image_strides[1] + row",
        "image + static_cast<int>(channel * p.image_strides[1]) + row",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_output_offset_of_32_bits",
        STANDARDIZE,
        "static_cast<T*>(p.output) + n * p.output_strides[0] +",
        "static_cast<T*>(p.output) + static_cast<int>(n * p.output_strides[0]) +",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "one_pass_for_too_few_images",
        STANDARDIZE,
        "4 * plan.groups >= limits.multiprocessors",
        "8 * plan.groups >= limits.multiprocessors",
        VALUES,
        "limits",
        "what the rule says",
    ),
)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: f"{p.operator}-{p.name}")
def test_mistakes_are_found(builds: Toolchain, planted: Planted) -> None:
    assert_finds(run(builds.build(planted.program), planted.run), planted.found_as)
