"""The loops of conv_bias_relu alone, in a C++ program under sanitizers, and under an emulator."""

import re

import pytest

import pixfuse
from tests.test_native import BUILDS, ISA_CODES, Builder, Program, check_symbols, execute

CONV_BIAS_RELU = Program(
    "test_conv_bias_relu_loop.cpp",
    ("common/isa.cpp", "conv_bias_relu/conv_bias_relu_cpu.cpp"),
    ("conv_bias_relu/conv_bias_relu_loop.cpp", "conv_bias_relu/relu_count_loop.cpp"),
)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("native_conv_bias_relu"), CONV_BIAS_RELU)


@pytest.mark.parametrize("name", BUILDS)
def test_loops(built: Builder, name: str) -> None:
    result = execute(built, name)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = {int(code): int(cases) for code, cases in re.findall(r"isa (\d+): (\d+)", result.stdout)}
    here = pixfuse._library.available_isas()
    available = ("portable", "neon") if name == "aarch64" else here
    assert set(seen) == {ISA_CODES[isa] for isa in available}
    assert min(seen.values()) > 250


# Each fault with what must notice it, and in which words.
PLANTED = [
    ("sanitized", "short_input", "heap-buffer-overflow"),
    ("sanitized", "short_output", "heap-buffer-overflow"),
    ("sanitized", "short_weight", "heap-buffer-overflow"),
    ("sanitized", "wrong_value", "expected"),
    ("sanitized", "wrong_count", "counted"),
    ("address", "short_input", "heap-buffer-overflow"),
    ("address", "short_output", "heap-buffer-overflow"),
    ("thread", "race", "data race"),
    ("plain", "short_input", None),
    ("plain", "short_output", None),
    ("plain", "wrong_value", "expected"),
    ("aarch64", "short_output", None),
    ("aarch64", "wrong_value", "expected"),
]


@pytest.mark.parametrize(("name", "fault", "words"), PLANTED)
def test_planted_faults_are_noticed(
    built: Builder, name: str, fault: str, words: str | None
) -> None:
    result = execute(built, name, f"planted={fault}")
    assert result.returncode != 0
    if words is None:  # a forbidden page: no words, the process is gone
        assert result.returncode < 0
    else:
        assert words in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["plain", "aarch64"])
def test_loops_share_no_function_with_other_files(built: Builder, name: str) -> None:
    """Else a machine without AVX-512 could get the AVX-512 copy of a common inline function."""
    check_symbols(built, name)
