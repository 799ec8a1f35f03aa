"""The CUDA kernels of `conv_bias_relu`, run on the CPU.

Values, sanitizers in three orders of the threads, a race checker, and mistakes planted in the
kernels that these must find: `cuda_on_cpu/README.md`.
"""

import pytest

from tests.cuda_on_cpu.planted import Planted, Search, searches, together
from tests.cuda_on_cpu.toolchain import (
    CSRC,
    RACE,
    SANITIZED,
    VALUES,
    Flavor,
    Kernel,
    Program,
    Toolchain,
    program_of,
)
from tests.test_cuda_on_cpu import (
    ORDERS,
    UNREACHED,
    WRONG_VALUE,
    assert_has_no_races,
    assert_is_found,
    assert_passes,
    run,
)

FOLDER = CSRC / "conv_bias_relu"
CONVOLUTION = Kernel(FOLDER / "conv_bias_relu_cuda.cu", header=CSRC / "common" / "tensor_core.h")
LAST_PASS = Kernel(FOLDER / "relu_count_cuda.cu", header=FOLDER / "activity_records.h")

#: What the test program of each kernel can be asked to do.
JOBS = {CONVOLUTION: ("shapes", "values", "far"), LAST_PASS: ("shapes",)}


def cases(flavor: Flavor) -> list[tuple[Program, str]]:
    return [(program_of(kernel, flavor), what) for kernel, jobs in JOBS.items() for what in jobs]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("program", "what"), cases(VALUES), ids=str)
def test_values(builds: Toolchain, program: Program, what: str, order: str) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("program", "what"), cases(SANITIZED), ids=str)
def test_sanitized(builds: Toolchain, program: Program, what: str, order: str) -> None:
    assert_passes(run(builds.build(program), what, order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", [program_of(kernel, RACE) for kernel in JOBS], ids=str)
def test_no_races(builds: Toolchain, program: Program, order: str) -> None:
    assert_has_no_races(builds.build(program), "few", order, 100_000)


RACES = "race on shared memory|uninitialized shared memory"

PLANTED = (
    Planted(
        "no_barrier_before_staging",
        CONVOLUTION,
        "__syncthreads(); // the memory is free",
        "",
        RACE,
        "few",
        RACES,
    ),
    Planted(
        "no_barrier_before_multiplying",
        CONVOLUTION,
        "__syncthreads(); // the patch is there",
        "",
        RACE,
        "few",
        RACES,
    ),
    Planted(
        "no_barrier_before_the_results",
        CONVOLUTION,
        "__syncthreads(); // nobody reads the patch, or the half before, any more",
        "",
        RACE,
        "few",
        RACES,
    ),
    Planted(
        "no_barrier_before_storing",
        CONVOLUTION,
        "__syncthreads(); // the results are there",
        "",
        RACE,
        "few",
        RACES,
    ),
    Planted(
        "barrier_in_a_branch",
        CONVOLUTION,
        "__syncthreads(); // the results are there",
        "if (inside != 0) __syncthreads();",
        VALUES,
        "few",
        UNREACHED,
    ),
    Planted(
        "fragments_swapped",
        CONVOLUTION,
        "mma_m16n8k16_bf16( sums, {register_of(upper, 0), register_of(lower, 0), "
        "register_of(upper, 1), register_of(lower, 1)}, {register_of(column, 0), "
        "register_of(column, 1)});",
        "mma_m16n8k16_bf16( sums, {register_of(upper, 0), register_of(upper, 1), "
        "register_of(lower, 0), register_of(lower, 1)}, {register_of(column, 0), "
        "register_of(column, 1)});",
        VALUES,
        "few",
        WRONG_VALUE,
    ),
    Planted(
        "rows_swapped",
        CONVOLUTION,
        "mma_m16n8k8_tf32(sums, {register_of(upper, i), register_of(lower, i), "
        "register_of(upper, i + 1), register_of(lower, i + 1)}, {register_of(column, i), "
        "register_of(column, i + 1)});",
        "mma_m16n8k8_tf32(sums, {register_of(lower, i), register_of(upper, i), "
        "register_of(upper, i + 1), register_of(lower, i + 1)}, {register_of(column, i), "
        "register_of(column, i + 1)});",
        VALUES,
        "few",
        WRONG_VALUE,
    ),
    Planted(
        "half_of_a_quad_twice",
        CONVOLUTION,
        "mma_m16n8k8_f16(sums, register_of(upper, 1), register_of(lower, 1), register_of(column, "
        "1));",
        "mma_m16n8k8_f16(sums, register_of(upper, 1), register_of(lower, 1), register_of(column, "
        "0));",
        VALUES,
        "few",
        WRONG_VALUE,
    ),
    Planted(
        "read_past_the_border",
        CONVOLUTION,
        "y < p.rows.size",
        "y <= p.rows.size",
        SANITIZED,
        "few",
        "heap-buffer-overflow",
    ),
    Planted(
        "read_before_the_border",
        CONVOLUTION,
        "x >= 0 && x < p.columns.size",
        "x < p.columns.size",
        VALUES,
        "few",
        WRONG_VALUE,
    ),
    Planted(
        "padding_of_black_pixels",
        CONVOLUTION,
        "float values[4] = {};",
        "float values[4] = {-2.0f, -2.0f, -2.0f, 0.0f};",
        VALUES,
        "few",
        WRONG_VALUE,
        has_own_program=True,
    ),
    Planted(
        "channel_too_many",
        CONVOLUTION,
        "if (k < left) { values[k] = load_float(p.input, p.input_type, offset + k * "
        "p.input_strides[1]); }",
        "if (k <= left) { values[k] = load_float(p.input, p.input_type, offset + k * "
        "p.input_strides[1]); }",
        SANITIZED,
        "few",
        "heap-buffer-overflow",
    ),
    Planted(
        "channel_too_few",
        CONVOLUTION,
        "channel < p.group_channels && row < p.slice[0]",
        "channel + 1 < p.group_channels && row < p.slice[0]",
        VALUES,
        "few",
        WRONG_VALUE,
    ),
    Planted(
        "output_channel_too_few",
        CONVOLUTION,
        "output < p.group_outputs",
        "output + 1 < p.group_outputs",
        VALUES,
        "few",
        WRONG_VALUE,
    ),
    Planted(
        "counted_before_rounding",
        CONVOLUTION,
        "value = rounded_to(p.output_type, relu(__fadd_rn(value, bias))); "
        "if ((inside >> i & 1u) != 0) { counts[j] += value > 0.0f",
        "const float before = relu(__fadd_rn(value, bias)); "
        "value = rounded_to(p.output_type, before); "
        "if ((inside >> i & 1u) != 0) { counts[j] += before > 0.0f",
        VALUES,
        "values",
        "wrong value: tiny.*counts of channel",
        has_own_program=True,
    ),
    Planted(
        "pixels_counted_that_are_none",
        CONVOLUTION,
        "(inside >> i & 1u) != 0",
        "true",
        VALUES,
        "few",
        "counts of channel",
    ),
    Planted(
        "no_tap_is_some_tap",
        CONVOLUTION,
        "if (tap >= 0) pixels[i] = patch[windows[i] + tap];",
        "pixels[i] = patch[windows[i] + (tap >= 0 ? tap : 0)];",
        VALUES,
        "values",
        "wrong value: special",
    ),
    Planted(
        "weights_of_the_first_slice",
        CONVOLUTION,
        "weights + slice * slice_weights",
        "weights",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "stored_past_the_end",
        CONVOLUTION,
        "y >= p.rows.output",
        "y > p.rows.output",
        SANITIZED,
        "few",
        "heap-buffer-overflow",
    ),
    Planted(
        "misaligned_store",
        CONVOLUTION,
        "is_aligned(call.output, kChunkBytes)",
        "true",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
    Planted(
        "tf32_not_rounded",
        CONVOLUTION,
        "result = to_tensor_float32(value);",
        "result = {value};",
        VALUES,
        "few",
        WRONG_VALUE,
    ),
    Planted(
        "offset_of_32_bits",
        CONVOLUTION,
        "y * p.input_strides[2]",
        "static_cast<int>(y * p.input_strides[2])",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "output_offset_of_32_bits",
        CONVOLUTION,
        "image * p.output_strides[0]",
        "static_cast<int>(image * p.output_strides[0])",
        VALUES,
        "far",
        WRONG_VALUE,
    ),
    Planted(
        "nan_lost",
        LAST_PASS,
        "return x <= T(0) ? T(0) : x;",
        "return x > T(0) ? x : T(0);",
        VALUES,
        "shapes",
        WRONG_VALUE,
    ),
    Planted(
        "image_fires_for_its_neighbours",
        LAST_PASS,
        "(firing & own_lanes) != 0",
        "firing != 0",
        VALUES,
        "shapes",
        "counts of channel",
    ),
    Planted(
        "no_barrier_before_adding",
        LAST_PASS,
        "__syncthreads(); // All tallies are there.",
        "",
        RACE,
        "few",
        RACES,
    ),
    Planted(
        "misaligned_vector",
        LAST_PASS,
        "is_aligned(call.input, vector * in_bytes)",
        "true",
        SANITIZED,
        "shapes",
        "misaligned address",
    ),
)


SEARCHES = searches(PLANTED)


@pytest.mark.parametrize("program", together(SEARCHES), ids=str)
def test_nothing_is_found_without_a_mistake(builds: Toolchain, program: Program) -> None:
    assert_passes(run(builds.build(program), "few"))


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_mistakes_are_found(builds: Toolchain, search: Search) -> None:
    assert_is_found(builds, search)
