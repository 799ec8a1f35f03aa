"""The loops of conv_bias_relu alone, in a C++ program under sanitizers, and under an emulator."""

import pytest

from tests.native.toolchain import (
    BUILDS,
    Program,
    assert_notices,
    assert_passes,
    assert_shares_no_function,
    native_isas,
)

CONV_BIAS_RELU = Program(
    "test_conv_bias_relu_loop.cpp",
    (
        "common/isa.cpp",
        "conv_bias_relu/bounds.cpp",
        "conv_bias_relu/conv_bias_relu_cpu.cpp",
        "conv_bias_relu/digits.cpp",
        "conv_bias_relu/winograd.cpp",
    ),
    (
        "conv_bias_relu/bounds_loop.cpp",
        "conv_bias_relu/conv_bias_relu_loop.cpp",
        "conv_bias_relu/lines_loop.cpp",
        "conv_bias_relu/relu_count_loop.cpp",
        "conv_bias_relu/winograd_loop.cpp",
    ),
    cases=400,
    of_bytes=("conv_bias_relu/digits_loop.cpp",),
    otherwise=("gfni",),
)


@pytest.mark.parametrize("name", BUILDS)
def test_loops(name: str) -> None:
    assert_passes(CONV_BIAS_RELU, name)


# Each fault with what must notice it, and in which words.
PLANTED = [
    ("sanitized", "short_input", "heap-buffer-overflow"),
    ("sanitized", "short_output", "heap-buffer-overflow"),
    ("sanitized", "short_weight", "heap-buffer-overflow"),
    ("sanitized", "wrong_value", "expected"),
    ("sanitized", "wrong_count", "counted"),
    ("thread", "race", "data race"),
    ("plain", "short_input", None),
    ("plain", "short_output", None),
    ("plain", "wrong_value", "expected"),
    ("sanitized amx", "short_output", "AddressSanitizer"),
    ("sanitized amx", "wrong_value", "expected"),
    ("sanitized amx", "wrong_count", "counted"),
    ("sanitized vnni", "short_output", "AddressSanitizer"),
    ("sanitized vnni", "wrong_value", "expected"),
    ("sanitized vnni", "wrong_count", "counted"),
    ("sanitized gfni", "short_output", "AddressSanitizer"),
    ("sanitized gfni", "wrong_value", "expected"),
    ("sanitized gfni", "wrong_count", "counted"),
    ("plain vnni", "short_input", None),
    ("plain vnni", "short_output", None),
    ("plain vnni", "wrong_value", "expected"),
    ("plain gfni", "short_input", None),
    ("plain gfni", "short_output", None),
    ("plain gfni", "wrong_value", "expected"),
    ("thread amx", "race", "data race"),
    ("plain amx", "short_input", None),
    ("plain amx", "short_output", None),
    ("plain amx", "wrong_value", "expected"),
    ("aarch64", "short_output", None),
    ("aarch64", "wrong_value", "expected"),
]


@pytest.mark.parametrize(("name", "fault", "words"), PLANTED)
def test_planted_faults_are_noticed(name: str, fault: str, words: str | None) -> None:
    name, _, isa = name.partition(" ")
    if isa and isa not in native_isas(name):
        pytest.skip(f"{isa} cannot run here")
    assert_notices(CONV_BIAS_RELU, name, fault, words, isa=isa or None)


@pytest.mark.parametrize("name", ["plain", "aarch64"])
def test_loops_share_no_function_with_other_files(name: str) -> None:
    assert_shares_no_function(CONV_BIAS_RELU, name)
