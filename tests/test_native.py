"""The loops alone, in C++ programs under sanitizers, and under an emulator of another machine."""

import pytest

from tests.native.toolchain import (
    BUILDS,
    Program,
    assert_notices,
    assert_passes,
    assert_shares_no_function,
    build,
    shared_symbols,
    symbols,
)

NORMALIZE = Program(
    "test_normalize_loop.cpp",
    (
        "common/isa.cpp",
        "crop_mirror_normalize/crop_mirror_normalize_cpu.cpp",
        "normalize/normalize_cpu.cpp",
    ),
    ("normalize/normalize_loop.cpp",),
    cases=5000,
)


@pytest.mark.parametrize("name", BUILDS)
def test_loops(name: str) -> None:
    assert_passes(NORMALIZE, name)


# Each fault with what must notice it, and in which words.
PLANTED = [
    ("sanitized", "short_input", "heap-buffer-overflow"),
    ("sanitized", "short_output", "heap-buffer-overflow"),
    ("sanitized", "early_input", "heap-buffer-overflow"),
    ("sanitized", "misaligned", "misaligned address"),
    ("sanitized", "wrong_value", "expected"),
    ("thread", "race", "data race"),
    ("plain", "wrong_value", "expected"),
    ("plain", "short_input", None),
    ("plain", "short_output", None),
    ("plain", "early_input", None),
    ("aarch64", "wrong_value", "expected"),
    ("aarch64", "short_input", None),
    ("aarch64", "short_output", None),
]
# Those that are planted in the calls of crop_mirror_normalize too must be noticed by these alone.
IN_CROPS = [
    (name, fault, words, "crop")
    for name, fault, words in PLANTED
    if fault in ("short_input", "short_output", "wrong_value", "race")
]


@pytest.mark.parametrize(
    ("name", "fault", "words", "arguments"), [*((*fault, "") for fault in PLANTED), *IN_CROPS]
)
def test_planted_faults_are_noticed(
    name: str, fault: str, words: str | None, arguments: str
) -> None:
    assert_notices(NORMALIZE, name, fault, words, *arguments.split())


@pytest.mark.parametrize("name", ["plain", "aarch64"])
def test_loops_share_no_function_with_other_files(name: str) -> None:
    assert_shares_no_function(NORMALIZE, name)


@pytest.mark.parametrize("name", ["plain"])
def test_a_shared_function_is_noticed(name: str) -> None:
    uses_strings = build(NORMALIZE, name).sources["isa.cpp"]
    assert shared_symbols(symbols(uses_strings))
