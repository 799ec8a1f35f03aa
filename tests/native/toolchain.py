"""Compiles the loops and their tests, under sanitizers and for another machine, and runs them."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pixfuse._library import ISA_CODES, available_isas
from tests.build_cache import BuildCache, digest, jobs
from tests.isas import OF_BITS, OF_BYTES

NATIVE = Path(__file__).parent
ROOT = NATIVE.parent.parent
CSRC = ROOT / "csrc"

# The test programs themselves are not on trial: compiled once for all builds of a machine, without
# a sanitizer: with one, their plain formulas take most of the time.
TEST_FLAGS = ("-O2", "-ffp-contract=off")

# Checks by calls instead of in line in long functions: these compile three times as fast.
ADDRESS_CHECKS = ("-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=100")


@dataclass(frozen=True)
class Program:
    """A test program, and what it tests: sources, and loops that are compiled per machine."""

    name: str
    sources: tuple[str, ...]
    loops: tuple[str, ...]
    cases: int  # that it runs for each instruction set, at least
    of_bytes: tuple[str, ...] = ()  # loops that only a machine has that multiplies bytes
    of_bits: tuple[str, ...] = ()  # and that counts bits
    otherwise: tuple[str, ...] = ()  # instruction sets that use those of others another way

    def loops_for(self, isa: str) -> tuple[str, ...]:
        """None where those of another instruction set run."""
        if isa in OF_BYTES:
            return self.of_bytes
        return self.of_bits if isa in OF_BITS else self.loops


@dataclass(frozen=True)
class Build:
    """One way to compile a program and to run it."""

    flags: tuple[str, ...]
    compiler: str = "g++"
    machine: str = platform.machine()
    runner: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()  # instruction sets whose loops are, if not all: see `rest`
    rest: str = "plain"  # how the others are compiled: as another build, or not to run
    as_in_product: bool = False  # of what building the package has compiled, if it has


# Loops that are only linked.
NOT_RUN = "not run"

# The tiles of common/matrix_tiles.h as plain loops: sanitizers see them, and any machine has them.
PLAIN_TILES = "-DPIXFUSE_PLAIN_TILES"
# And what only processors of AMD do by themselves.
FOR_ANY_MACHINE = (PLAIN_TILES, "-DPIXFUSE_ADDS_BESIDE_MULTIPLYING")

BUILDS = {
    # Every step checked. What -O1 does beyond -Og doubles the time to compile so many checks.
    "sanitized": Build(
        (
            *("-Og", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=all"),
            *(*FOR_ANY_MACHINE, *ADDRESS_CHECKS),
        )
    ),
    # Threads share the same with every instruction set.
    "thread": Build(
        ("-O1", "-g1", *FOR_ANY_MACHINE, "-fsanitize=thread"),
        checked=("portable", "amx"),
        # The thread sanitizer of gcc 12 cannot run at the addresses that newer kernels choose.
        runner=("setarch", "--addr-no-randomize"),
        arguments=("threads",),
    ),
    # The loops as they are in the product, between forbidden pages.
    "plain": Build(
        ("-O3", *(() if "amx" in available_isas() else FOR_ANY_MACHINE)), as_in_product=True
    ),
    "aarch64": Build(
        ("-O3", "-static"),
        compiler="aarch64-linux-gnu-g++",
        machine="aarch64",
        runner=("qemu-aarch64",),
        # The emulator is slow, and other builds run the portable loops.
        checked=("neon",),
        rest=NOT_RUN,
    ),
}


def loop_flags(machine: str) -> dict[str, list[str]]:
    """The instruction sets of a machine, and how CMakeLists.txt compiles the loops for each."""
    text = (ROOT / "CMakeLists.txt").read_text()
    branches = re.search(
        r'MATCHES "x86_64\|AMD64"\)\n(.*?)else\(\)\n(.*?)endif\(\)', text, re.DOTALL
    )
    assert branches is not None
    branch = branches[1] if machine == "x86_64" else branches[2]
    common = re.search(r"set\(loop_flags (.*)\)", text)
    levels = re.search(r"set\(isa_levels (.*)\)", branch)
    assert common is not None
    assert levels is not None
    flags = {}
    for isa in levels[1].split():
        own = re.search(rf"set\(isa_flags_{isa} (.*)\)", branch)
        assert own is not None
        flags[isa] = [*filter(None, shlex.split(f"{common[1]} {own[1]}"))]
    return flags


@dataclass(frozen=True)
class Built:
    """A finished program, and the objects that it is linked of."""

    program: Path
    sources: dict[str, Path]  # by their names
    loops: dict[tuple[str, str], Path]  # by their names and instruction sets


@cache
def _state(compiler: str) -> str:
    """What every object depends on beside its source."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    headers = sorted([*CSRC.rglob("*.h"), *NATIVE.glob("*.h")])
    return digest(version.stdout, *(path.read_text() for path in headers))


def _of_product(source: Path, isa: str | None) -> Path | None:
    """What building the package made of a source, unless that or a header has changed since."""
    target = "pixfuse_cpu" if isa is None else f"pixfuse_loops_{isa}"
    inside = f"CMakeFiles/{target}.dir/{source.relative_to(ROOT)}.o"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-*"
    needed = [source, ROOT / "CMakeLists.txt", *CSRC.rglob("*.h")]
    newest = max(path.stat().st_mtime for path in needed)
    for folder in (ROOT / "build").glob(tag):
        compiled = folder / inside
        if compiled.exists() and compiled.stat().st_mtime > newest:
            return compiled
    return None


@cache
def build(program: Program, name: str) -> Built:
    """Compiles a program; a build that this machine cannot make or run skips the test."""
    build = BUILDS[name]
    for tool in (build.compiler, *build.runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} not found")
    files = BuildCache(ROOT / "build" / "native")
    compiler = [build.compiler, "-std=c++20"]
    includes = ["-Wall", "-Wextra", f"-I{CSRC}", f"-I{NATIVE}"]

    def compiled(source: Path, stem: str, flags: Sequence[str]) -> Path:
        command = [*compiler, *includes, *flags, "-c", str(source)]
        key = digest(_state(build.compiler), source.read_text(), *command)
        return files.make(f"{stem}-{key}.o", command)

    def of_source(source: str, isa: str | None = None) -> Path:
        """An object of the package, checked or plain."""
        is_rest = isa is not None and build.checked and isa not in build.checked
        how = build.rest if is_rest else name
        flags, path = ("-O0",) if how == NOT_RUN else BUILDS[how].flags, CSRC / source
        own = [] if isa is None else [*loop_flags(build.machine)[isa], f"-DPIXFUSE_ISA={isa}"]
        stem = f"{path.stem}-{how}" if isa is None else f"{path.stem}_{isa}-{how}"
        if (
            how != NOT_RUN
            and BUILDS[how].as_in_product
            and not (isa in (None, "amx") and PLAIN_TILES in flags)
        ):
            product = _of_product(path, isa)
            if product is not None:
                state = digest(str(product), str(product.stat().st_mtime_ns))
                return files.make(f"{stem}-{state}.o", ["ld", "--relocatable", str(product)])
        return compiled(path, stem, [*flags, "-ffp-contract=off", *own])

    with ThreadPoolExecutor(jobs()) as pool:
        sources = {Path(source).name: pool.submit(of_source, source) for source in program.sources}
        loops = {
            (loop, isa): pool.submit(of_source, loop, isa)
            for isa in loop_flags(build.machine)
            for loop in program.loops_for(isa)
        }
        # After them, when another process may have made it already.
        test = pool.submit(compiled, NATIVE / program.name, Path(program.name).stem, TEST_FLAGS)
    # The test comes last: of an inline function that it shares with a source the linker keeps the
    # first copy, and that is to be the one with the checks.
    objects = [future.result() for future in (*sources.values(), *loops.values(), test)]
    command = [*compiler, *build.flags, "-pthread", *map(str, objects)]
    return Built(
        files.make(f"{Path(program.name).stem}-{name}-{digest(*command)}", command),
        {source: future.result() for source, future in sources.items()},
        {loop: future.result() for loop, future in loops.items()},
    )


def run(
    program: Program, name: str, *arguments: str, isa: str | None = None
) -> subprocess.CompletedProcess[str]:
    """With all instruction sets that the build is for, or one of them."""
    isas = native_isas(name) if isa is None else {isa}
    return subprocess.run(
        [
            *BUILDS[name].runner,
            str(build(program, name).program),
            *BUILDS[name].arguments,
            *arguments,
        ],
        env={
            **os.environ,
            "TSAN_OPTIONS": "halt_on_error=1",
            "NATIVE_ISAS": "".join(f"{ISA_CODES[isa]}," for isa in isas),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def native_isas(name: str) -> set[str]:
    """What programs run, as far as they have loops for it: amx with plain tiles, too."""
    if name == "aarch64":
        return {"neon"}
    return {*available_isas(), *(["amx"] if "avx512" in available_isas() else [])}


def assert_passes(program: Program, name: str) -> None:
    """It finds no fault, and has run its cases with each instruction set of the machine."""
    result = run(program, name)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = {int(code): int(cases) for code, cases in re.findall(r"isa (\d+): (\d+)", result.stdout)}
    available = {
        isa for isa in native_isas(name) if program.loops_for(isa) or isa in program.otherwise
    }
    assert set(seen) == {ISA_CODES[isa] for isa in available}
    assert min(seen.values()) > program.cases


def assert_notices(
    program: Program,
    name: str,
    fault: str,
    words: str | None,
    *arguments: str,
    isa: str | None = None,
) -> None:
    """It finds a planted fault and says so; `None`: a forbidden page, and the process is gone."""
    result = run(program, name, *arguments, f"planted={fault}", isa=isa)
    assert result.returncode != 0
    if words is None:
        assert result.returncode < 0
    else:
        assert words in result.stdout + result.stderr


# --- what the linker may not mix up ---


def shared_symbols(listing: str) -> list[str]:
    """Symbols of which the linker keeps one copy of many, whichever comes first."""
    return [line for line in listing.splitlines() if re.search(r"^\w* +[WVu] ", line)]


def symbols(compiled: Path) -> str:
    return subprocess.run(
        ["nm", "--demangle", str(compiled)], check=True, capture_output=True, text=True
    ).stdout


def assert_shares_no_function(program: Program, name: str) -> None:
    """Else a machine without AVX-512 could get the AVX-512 copy of a common inline function."""
    loops = build(program, name).loops
    levels = loop_flags(BUILDS[name].machine)
    assert {isa for _, isa in loops} == {isa for isa in levels if program.loops_for(isa)}
    for (_, isa), compiled in loops.items():
        if BUILDS[name].rest == NOT_RUN and isa not in BUILDS[name].checked:
            continue
        listing = symbols(compiled)
        assert shared_symbols(listing) == []
        visible = re.findall(r"^\w+ T (.*)\(", listing, re.MULTILINE)
        assert visible
        assert all(function.startswith(f"pixfuse::{isa}::") for function in visible)
