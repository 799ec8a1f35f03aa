"""The loops that count, standardize and invert pixels alone, in C++ programs under sanitizers."""

from dataclasses import replace

import pytest

from tests.native.toolchain import (
    BUILDS,
    CSRC,
    Program,
    assert_notices,
    assert_passes,
    assert_shares_no_function,
    native_isas,
)


def program(name: str, operators: tuple[str, ...], cases: int) -> Program:
    """A program that runs the loops of some operators, as far as they have loops of their own."""
    sources = (f"{operator}/{operator}_cpu.cpp" for operator in operators)
    loops = (f"{operator}/{operator}_loop.cpp" for operator in operators)
    return Program(
        name,
        ("common/isa.cpp", *sources),
        tuple(loop for loop in loops if (CSRC / loop).exists()),
        cases,
    )


PROGRAMS = {
    "counts": replace(
        program("test_count_loops.cpp", ("channel_histogram", "image_moments"), 900),
        of_bits=("channel_histogram/bit_planes_loop.cpp",),
    ),
    "denormalize": program("test_denormalize_loop.cpp", ("denormalize",), 2500),
    "standardize_per_image": program(
        "test_standardize_loop.cpp", ("image_moments", "normalize", "standardize_per_image"), 700
    ),
}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_loops(program: str, name: str) -> None:
    assert_passes(PROGRAMS[program], name)


# Each fault with what must notice it, and in which words; None: a forbidden page, without words.
PLANTED = [
    ("sanitized", "short_input", "heap-buffer-overflow"),
    ("sanitized", "short_output", "heap-buffer-overflow"),
    ("sanitized", "early_input", "heap-buffer-overflow"),
    ("sanitized", "wrong_value", "expected"),
    ("thread", "race", "data race"),
    ("plain", "wrong_value", "expected"),
    ("plain", "short_input", None),
    ("plain", "short_output", None),
    ("plain", "early_input", None),
    ("aarch64", "wrong_value", "expected"),
    ("aarch64", "short_input", None),
]
# What reads whole vectors too far has no name of its own.
PLANTED_FOR_BITS = [
    ("sanitized", "short_input", "AddressSanitizer"),
    ("sanitized", "short_output", "AddressSanitizer"),
    ("sanitized", "early_input", "AddressSanitizer"),
    ("sanitized", "wrong_value", "expected"),
    ("plain", "wrong_value", "expected"),
    ("plain", "short_input", None),
    ("plain", "short_output", None),
    ("plain", "early_input", None),
]


@pytest.mark.parametrize(("name", "fault", "words"), PLANTED)
@pytest.mark.parametrize("program", PROGRAMS)
def test_planted_faults_are_noticed(program: str, name: str, fault: str, words: str | None) -> None:
    assert_notices(PROGRAMS[program], name, fault, words)


@pytest.mark.parametrize(("name", "fault", "words"), PLANTED_FOR_BITS)
def test_planted_faults_are_noticed_where_bits_are_counted(
    name: str, fault: str, words: str | None
) -> None:
    if "gfni" not in native_isas(name):
        pytest.skip("this machine turns no matrices of bits")
    assert_notices(PROGRAMS["counts"], name, fault, words, isa="gfni")


@pytest.mark.parametrize("name", ["plain", "aarch64"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_loops_share_no_function_with_other_files(program: str, name: str) -> None:
    assert_shares_no_function(PROGRAMS[program], name)
