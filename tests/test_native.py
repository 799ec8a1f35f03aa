"""The loops alone, in a C++ program under sanitizers, and under an emulator of another machine."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import pixfuse

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
ISA_CODES = pixfuse._library.ISA_CODES


@dataclass(frozen=True)
class Program:
    """A test program, and what it tests: sources, and loops that are compiled per machine."""

    name: str
    sources: tuple[str, ...]
    loops: tuple[str, ...]


NORMALIZE = Program(
    "test_normalize_loop.cpp",
    (
        "common/isa.cpp",
        "crop_mirror_normalize/crop_mirror_normalize_cpu.cpp",
        "normalize/normalize_cpu.cpp",
    ),
    ("normalize/normalize_loop.cpp",),
)


@dataclass(frozen=True)
class Build:
    """One way to compile the program and to run it."""

    flags: tuple[str, ...]
    compiler: str = "g++"
    machine: str = platform.machine()
    runner: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


BUILDS = {
    # Every step checked.
    "sanitized": Build(("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")),
    # The loops as they are vectorized in the product: gcc adds these checks after that.
    "address": Build(("-O3", "-g1", "-fsanitize=address")),
    "thread": Build(
        ("-O1", "-g1", "-fsanitize=thread"),
        # The thread sanitizer of gcc 12 cannot run at the addresses that newer kernels choose.
        runner=("setarch", "--addr-no-randomize"),
        arguments=("threads",),
    ),
    # The loops as they are in the product, between forbidden pages.
    "plain": Build(("-O3",)),
    "aarch64": Build(
        ("-O3", "-static"),
        compiler="aarch64-linux-gnu-g++",
        machine="aarch64",
        runner=("qemu-aarch64",),
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
        flags[isa] = ["-ffp-contract=off", *filter(None, shlex.split(f"{common[1]} {own[1]}"))]
    return flags


def run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(map(str, command))}\n{result.stderr}"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> "Builder":
    return Builder(tmp_path_factory.mktemp("native"), NORMALIZE)


class Builder:
    """Compiles each build once, when it is first asked for."""

    def __init__(self, folder: Path, program: Program) -> None:
        self.folder = folder
        self.tested = program
        self.done: set[str] = set()

    def program(self, name: str) -> Path:
        build = BUILDS[name]
        for tool in (build.compiler, *build.runner[:1]):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} not found")
        program = self.folder / name / "program"
        if name not in self.done:
            self._compile(build, program)
            self.done.add(name)
        return program

    def _compile(self, build: Build, program: Path) -> None:
        folder = program.parent
        folder.mkdir(exist_ok=True)
        compiler: tuple[str, ...] = (
            build.compiler,
            "-std=c++20",
            "-Wall",
            "-Wextra",
            f"-I{CSRC}",
            *build.flags,
        )
        sources: list[tuple[Path, str, list[str]]] = [
            (source, source.stem, ["-ffp-contract=off"])
            for source in (
                ROOT / "tests" / "native" / self.tested.name,
                *(CSRC / source for source in self.tested.sources),
            )
        ]
        for isa, flags in loop_flags(build.machine).items():
            for loop in self.tested.loops:
                stem = f"{Path(loop).stem}_{isa}"
                sources.append((CSRC / loop, stem, [*flags, f"-DPIXFUSE_ISA={isa}"]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for finished in [
                pool.submit(run, *compiler, *flags, "-c", source, "-o", folder / f"{stem}.o")
                for source, stem, flags in sources
            ]:
                finished.result()
        run(*compiler, "-pthread", *folder.glob("*.o"), "-o", program)


def execute(built: Builder, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(built.program(name))
    return subprocess.run(
        [*BUILDS[name].runner, program, *BUILDS[name].arguments, *arguments],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", BUILDS)
def test_loops(built: Builder, name: str) -> None:
    result = execute(built, name)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = {int(code): int(cases) for code, cases in re.findall(r"isa (\d+): (\d+)", result.stdout)}
    here = pixfuse._library.available_isas()
    available = ("portable", "neon") if name == "aarch64" else here
    assert set(seen) == {ISA_CODES[isa] for isa in available}
    assert min(seen.values()) > 5000


# Each fault with what must notice it, and in which words.
PLANTED = [
    ("sanitized", "short_input", "heap-buffer-overflow"),
    ("sanitized", "short_output", "heap-buffer-overflow"),
    ("sanitized", "early_input", "heap-buffer-overflow"),
    ("sanitized", "misaligned", "misaligned address"),
    ("sanitized", "wrong_value", "expected"),
    ("address", "short_input", "heap-buffer-overflow"),
    ("address", "short_output", "heap-buffer-overflow"),
    ("address", "early_input", "heap-buffer-overflow"),
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
    built: Builder, name: str, fault: str, words: str | None, arguments: str
) -> None:
    result = execute(built, name, *arguments.split(), f"planted={fault}")
    assert result.returncode != 0
    if words is None:  # a forbidden page: no words, the process is gone
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


def check_symbols(built: Builder, name: str) -> None:
    folder = built.program(name).parent
    for isa in loop_flags(BUILDS[name].machine):
        for loop in built.tested.loops:
            listing = symbols(folder / f"{Path(loop).stem}_{isa}.o")
            assert shared_symbols(listing) == []
            visible = re.findall(r"^\w+ T (.*)\(", listing, re.MULTILINE)
            assert visible
            assert all(function.startswith(f"pixfuse::{isa}::") for function in visible)


@pytest.mark.parametrize("name", ["plain", "aarch64"])
def test_loops_share_no_function_with_other_files(built: Builder, name: str) -> None:
    """Else a machine without AVX-512 could get the AVX-512 copy of a common inline function."""
    check_symbols(built, name)


def test_a_shared_function_is_noticed(built: Builder) -> None:
    listing = symbols(built.program("sanitized").parent / "isa.o")  # uses std::string
    assert shared_symbols(listing)
