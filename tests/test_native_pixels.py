"""The loops that count, standardize and invert pixels alone, in C++ programs under sanitizers."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import pixfuse
from tests.test_native import (
    BUILDS,
    CSRC,
    ISA_CODES,
    ROOT,
    loop_flags,
    run,
    shared_symbols,
    symbols,
)

NATIVE = ROOT / "tests" / "native"


@dataclass(frozen=True)
class Program:
    """A test program, and the operators whose loops it runs."""

    source: str
    operators: tuple[str, ...]
    cases: int  # that it runs for each instruction set, at least


PROGRAMS = {
    "counts": Program("test_count_loops.cpp", ("channel_histogram", "image_moments"), 700),
    "denormalize": Program("test_denormalize_loop.cpp", ("denormalize",), 2500),
    "standardize_per_image": Program(
        "test_standardize_loop.cpp", ("image_moments", "normalize", "standardize_per_image"), 700
    ),
}


class Builder:
    """Compiles each build once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def program(self, program: str, build: str) -> Path:
        for tool in (BUILDS[build].compiler, *BUILDS[build].runner[:1]):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} not found")
        folder = self.folder / f"{program}-{build}"
        if not (folder / "program").exists():
            self._compile(program, build, folder)
        return folder / "program"

    def _compile(self, program: str, build_name: str, folder: Path) -> None:
        build = BUILDS[build_name]
        folder.mkdir(exist_ok=True)
        compiler: tuple[str, ...] = (
            build.compiler,
            "-std=c++20",
            "-Wall",
            "-Wextra",
            f"-I{CSRC}",
            f"-I{NATIVE}",
            *build.flags,
        )
        sources: list[tuple[Path, str, list[str]]] = [
            (NATIVE / PROGRAMS[program].source, "test", ["-ffp-contract=off"]),
            (CSRC / "common" / "isa.cpp", "isa", []),
        ]
        for operator in PROGRAMS[program].operators:
            of_operator = CSRC / operator / f"{operator}_cpu.cpp"
            sources.append((of_operator, of_operator.stem, ["-ffp-contract=off"]))
            loop = CSRC / operator / f"{operator}_loop.cpp"
            if not loop.exists():
                continue  # it has none of its own
            for isa, flags in loop_flags(build.machine).items():
                sources.append((loop, f"{operator}_loop_{isa}", [*flags, f"-DPIXFUSE_ISA={isa}"]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for finished in [
                pool.submit(run, *compiler, *flags, "-c", source, "-o", folder / f"{stem}.o")
                for source, stem, flags in sources
            ]:
                finished.result()
        run(*compiler, "-pthread", *folder.glob("*.o"), "-o", folder / "program")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("native_pixels"))


def execute(
    built: Builder, program: str, build: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *BUILDS[build].runner,
            str(built.program(program, build)),
            *BUILDS[build].arguments,
            *arguments,
        ],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_loops(built: Builder, program: str, build: str) -> None:
    result = execute(built, program, build)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = {int(code): int(cases) for code, cases in re.findall(r"isa (\d+): (\d+)", result.stdout)}
    here = pixfuse._library.available_isas()
    available = ("portable", "neon") if build == "aarch64" else here
    assert set(seen) == {ISA_CODES[isa] for isa in available}
    assert min(seen.values()) > PROGRAMS[program].cases


# Each fault with what must notice it, and in which words; None: a forbidden page, without words.
PLANTED = [
    ("sanitized", "short_input", "heap-buffer-overflow"),
    ("sanitized", "short_output", "heap-buffer-overflow"),
    ("sanitized", "early_input", "heap-buffer-overflow"),
    ("sanitized", "wrong_value", "expected"),
    ("address", "short_input", "heap-buffer-overflow"),
    ("address", "short_output", "heap-buffer-overflow"),
    ("thread", "race", "data race"),
    ("plain", "wrong_value", "expected"),
    ("plain", "short_input", None),
    ("plain", "short_output", None),
    ("plain", "early_input", None),
    ("aarch64", "wrong_value", "expected"),
    ("aarch64", "short_input", None),
]


@pytest.mark.parametrize(("build", "fault", "words"), PLANTED)
@pytest.mark.parametrize("program", PROGRAMS)
def test_planted_faults_are_noticed(
    built: Builder, program: str, build: str, fault: str, words: str | None
) -> None:
    result = execute(built, program, build, f"planted={fault}")
    assert result.returncode != 0
    if words is None:
        assert result.returncode < 0
    else:
        assert words in result.stdout + result.stderr


@pytest.mark.parametrize("build", ["plain", "aarch64"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_loops_share_no_function_with_other_files(built: Builder, program: str, build: str) -> None:
    """Else a machine without AVX-512 could get the AVX-512 copy of a common inline function."""
    folder = built.program(program, build).parent
    for isa in loop_flags(BUILDS[build].machine):
        loops = list(folder.glob(f"*_loop_{isa}.o"))
        assert loops
        for loop in loops:
            listing = symbols(loop)
            assert shared_symbols(listing) == []
            visible = re.findall(r"^\w+ T (.*)\(", listing, re.MULTILINE)
            assert visible
            assert all(function.startswith(f"pixfuse::{isa}::") for function in visible)
