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
)

#: Each operator that has kernels here, with what its test program can be asked to do.
OPERATORS = {
    "channel_histogram": ("shapes", "far"),
    "denormalize": ("values", "shapes", "far"),
    "standardize_per_image": ("shapes", "far", "large"),
}


def program(operator: str, flavor: Flavor, *replacements: tuple[str, str]) -> Program:
    kernel = Kernel(CSRC / operator / f"{operator}_cuda.cu", replacements)
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


@pytest.mark.parametrize(("program", "what"), cases(VALUES), ids=str)
def test_values(builds: Toolchain, program: Program, what: str) -> None:
    assert_passes(run(builds.build(program), what))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("program", "what"), cases(SANITIZED), ids=str)
def test_sanitized(builds: Toolchain, program: Program, what: str, order: str) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [program(name, RACE) for name in OPERATORS], ids=str)
def test_no_races(builds: Toolchain, program: Program, order: str) -> None:
    result = run(builds.build(program), "few", order=order)
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
        "__syncthreads();",
        "",
        RACE,
        "few",
        "race on shared memory|uninitialized shared memory",
    ),
    Planted(
        "barrier_in_a_branch",
        STANDARDIZE,
        "__syncthreads();",
        "if (threadIdx.x < p.channels) __syncthreads();",
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
        "image + channel * p.image_strides[1] +",
        "image + static_cast<int>(channel * p.image_strides[1]) +",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "half_towards_zero",
        STANDARDIZE,
        "__float2half_rn(value)",
        "__float2half_rz(value)",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: f"{p.operator}-{p.name}")
def test_mistakes_are_found(builds: Toolchain, planted: Planted) -> None:
    assert_finds(run(builds.build(planted.program), planted.run), planted.found_as)
