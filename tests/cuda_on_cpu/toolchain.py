"""Compiles CUDA kernels, the emulator and their tests with the host compiler."""

import importlib.metadata
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.build_cache import PROCESSES, BuildCache, digest, jobs

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"

EMULATOR = ("fiber.cpp", "emulator.cpp", "static_shared_memory.cpp")


@dataclass(frozen=True)
class Flavor:
    """What one kind of check needs of the compiler."""

    name: str
    flags: tuple[str, ...]
    kernel_flags: tuple[str, ...] = ()
    changed_kernel_flags: tuple[str, ...] = ()  # and of a kernel with replaced text
    link_flags: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()


# Less optimization of the kernels than elsewhere: to compile them takes longer than to run them.
VALUES = Flavor("values", ("-O2",), kernel_flags=("-Og",))
UCONTEXT = Flavor("ucontext", ("-O1", "-DCUDA_ON_CPU_UCONTEXT"))
LIBRARY = Flavor("library", ("-O2", "-fPIC"), kernel_flags=("-Og",), link_flags=("-shared",))
# In these two the kernels alone are checked: it is they that are on trial, and the rest is fast.
SANITIZED = Flavor(
    "sanitized",
    ("-O2", "-DCUDA_ON_CPU_ADDRESS_SANITIZER"),
    kernel_flags=("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    # The same checks by calls instead of in line, and nothing optimized: faster to compile, slower
    # to run; a mistake that is found ends the run.
    changed_kernel_flags=("-O0", "--param", "asan-instrumentation-with-call-threshold=0"),
    link_flags=("-fsanitize=address,undefined",),
)
# The race checker stands in for libtsan, so the linker is not told of it. Addresses that do not
# move are the ones that addr2line knows.
RACE = Flavor(
    "race",
    ("-O2", "-g1", "-fno-pie"),
    kernel_flags=("-O1", "-fsanitize=thread"),
    link_flags=("-no-pie",),
    runtime=("race_checker.cpp",),
)


@dataclass(frozen=True)
class Kernel:
    """A `.cu` file, or what becomes of it when some of its text is replaced.

    Each text to replace stands in the source exactly once; line breaks do not matter. A header
    whose text may be replaced too is named in `header`; it is pasted into the source.
    """

    path: Path
    header: Path | None = None
    replacements: tuple[tuple[str, str], ...] = ()
    # Of these a program has one or none while it runs: that of the number (from 1) in
    # CUDA_ON_CPU_MISTAKE. Each is an expression for another, or statements for others.
    mistakes: tuple[tuple[str, str], ...] = ()

    @property
    def is_changed(self) -> bool:
        return bool(self.replacements or self.mistakes)

    def text(self) -> str:
        """The source; a text to replace that is not there exactly once is an error."""
        source = self.path.read_text()
        if self.header is not None:
            source = self._pasted(source, self.header)
        new_texts = {self._span(source, old): new for old, new in self.replacements}
        choices: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for number, (old, new) in enumerate(self.mistakes, start=1):
            choices.setdefault(self._span(source, old), []).append((number, new))
        for (start, end), chosen in choices.items():
            new_texts[start, end] = _one_of(source[start:end], chosen)
        before = len(source)
        for (start, end), new in sorted(new_texts.items(), reverse=True):
            if end > before:
                raise ValueError(f"{self.path.name}: overlaps what is replaced, too: {new}")
            source = source[:start] + new + source[end:]
            before = start
        # Messages name lines of the original file.
        return f'#line 1 "{self.path}"\n{source}'

    def _span(self, source: str, text: str) -> tuple[int, int]:
        # The formatter may break lines elsewhere tomorrow.
        pattern = r"\s+".join(re.escape(word) for word in text.split())
        found = [match.span() for match in re.finditer(pattern, source)]
        if len(found) != 1:
            raise ValueError(f"{self.path.name}: found {len(found)} times instead of once: {text}")
        return found[0]

    def _pasted(self, source: str, header: Path) -> str:
        include = f'#include "{header.relative_to(CSRC)}"\n'
        before, found, after = source.partition(include)
        if not found or include in after:
            raise ValueError(f"{self.path.name}: expected one line {include}")
        text = header.read_text().replace("#pragma once\n", "\n")
        line = (before + include).count("\n") + 1
        return f'{before}#line 1 "{header}"\n{text}\n#line {line} "{self.path}"\n{after}'


def _one_of(old: str, mistakes: list[tuple[int, str]]) -> str:
    """C++ that does one of several things, as the program is told when it starts."""

    def on_one_line(text: str) -> str:
        return " ".join(re.sub("//.*", "", text).split())

    code = on_one_line(old)
    conditions = [
        (f"::cuda_on_cpu::has_mistake({number})", on_one_line(new)) for number, new in mistakes
    ]
    if code.endswith((";", "}")):
        cases = "".join(f"if ({condition}) {{ {new} }} else " for condition, new in conditions)
        result = f"{{ {cases}{{ {code} }} }}"
    else:
        cases = "".join(f"{condition} ? ({new}) : " for condition, new in conditions)
        result = f"({cases}({code}))"
    # Lines keep their numbers, and the end of a comment is still one.
    comment = " //" if "//" in old.splitlines()[-1] else ""
    return result + "\n" * old.count("\n") + comment


@dataclass(frozen=True)
class Program:
    """A test program, or a library for ctypes: one `.cu` file and C++ files of this folder."""

    kernel: Kernel
    sources: tuple[str, ...]
    flavor: Flavor

    def __str__(self) -> str:
        return f"{self.kernel.path.stem}-{self.flavor.name}"


def program_of(kernel: Kernel, flavor: Flavor) -> Program:
    """A kernel of the product with the program that tests it."""
    return Program(kernel, (f"test_{kernel.path.stem.removesuffix('_cuda')}.cpp",), flavor)


def programs_of(item: pytest.Item) -> Iterator[Program]:
    """What a test will ask for: parameters of it and of its fixtures, or a `program` of these."""
    for parameter in item.callspec.params.values() if hasattr(item, "callspec") else ():
        program = getattr(parameter, "program", parameter)
        if isinstance(program, Program):
            yield program


def cuda_include() -> Path:
    """The folder of CUDA's host headers, as the pinned packages install them."""
    needed = {
        "nvidia-cuda-runtime": "cuda_fp16.h",
        "nvidia-cuda-crt": "crt/host_defines.h",
        "nvidia-cuda-cccl": "nv/target",
    }
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    folders = [Path(str(file.locate())).parent for file in files if file.name == "cuda_fp16.h"]
    for package, header in needed.items():
        if not folders or not (folders[0] / header).exists():
            raise RuntimeError(
                f"CUDA kernels run on the CPU in the tests, which needs CUDA's {header}: install "
                f"{package} as in requirements/test.txt (`make test` does)"
            )
    return folders[0]


class Toolchain:
    """Builds programs in the background; what did not change since the last time is kept."""

    def __init__(self, folder: Path) -> None:
        self._files = BuildCache(folder)
        self._executor = ThreadPoolExecutor(min(2, jobs()))  # each takes half a gigabyte
        self._objects: dict[str, Future[Path]] = {}
        self._compiler = os.environ.get("CXX", "g++")
        self._flags = (
            *("-std=c++20", "-ffp-contract=off"),
            *("-isystem", str(cuda_include())),
            # gcc 12 gives a `noinit` variable of a template another section type than it says.
            "-Wa,--no-warn",
            f"-I{CSRC}",
            f"-I{HERE}",
        )
        version = subprocess.run(
            [self._compiler, "--version"], check=True, capture_output=True, text=True
        ).stdout
        self._state = digest(
            version,
            importlib.metadata.version("nvidia-cuda-runtime"),
            *(path.read_text() for path in sorted([*CSRC.rglob("*.h"), *HERE.glob("*.h")])),
        )

    def start(self, programs: Iterable[Program]) -> None:
        """Begins to compile, in this order, unless other processes take part in the tests."""
        for program in programs if PROCESSES == 1 else ():
            self._start_objects(program)

    def build(self, program: Program) -> Path:
        """The finished program or library."""
        objects = [future.result() for future in self._start_objects(program)]
        script = HERE / "shared_memory.ld"
        command = [
            self._compiler,
            *program.flavor.link_flags,
            *map(str, objects),
            "-T",
            str(script),
        ]
        key = digest(*command, script.read_text())
        return self._files.make(f"{program}-{key}", command)

    def close(self) -> None:
        """Drops what has not been started."""
        self._executor.shutdown(cancel_futures=True)

    def _start_objects(self, program: Program) -> list[Future[Path]]:
        flavor = program.flavor
        kernel_flags = flavor.flags + flavor.kernel_flags
        if program.kernel.is_changed:
            kernel_flags += flavor.changed_kernel_flags
        sources = (*program.sources, *EMULATOR, *flavor.runtime)
        return [
            self._start(str(program.kernel), kernel_flags, program.kernel),
            *(self._start(name, flavor.flags, HERE / name) for name in sources),
        ]

    def _start(self, name: str, flags: tuple[str, ...], source: Path | Kernel) -> Future[Path]:
        key = digest(name, *flags)
        if key not in self._objects:
            self._objects[key] = self._executor.submit(self._compile, flags, source)
        return self._objects[key]

    def _compile(self, flags: tuple[str, ...], source: Path | Kernel) -> Path:
        path = source.path if isinstance(source, Kernel) else source
        text = source.text() if isinstance(source, Kernel) else source.read_text()
        command = [self._compiler, *self._flags, *flags, "-x", "c++", "-c"]
        key = digest(self._state, text, *command)
        # From standard input: a changed kernel is in no file.
        command += ["-"] if isinstance(source, Kernel) else [str(path)]
        return self._files.make(f"{path.stem}-{key}.o", command, text)
