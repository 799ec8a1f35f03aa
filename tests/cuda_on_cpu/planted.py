"""Mistakes planted in kernels: many compiled into one program, which makes one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.cuda_on_cpu.toolchain import Flavor, Kernel, Program, program_of


@dataclass(frozen=True)
class Planted:
    """A mistake in a kernel, and the check that must find it."""

    name: str
    kernel: Kernel
    old: str  # an expression or statements, in the source exactly once; line breaks do not matter
    new: str
    flavor: Flavor
    run: str  # what the test program is asked to do
    found_as: str  # what it says then
    # A constant or a type cannot be chosen while a program runs, nor texts that overlap.
    has_own_program: bool = False

    def __str__(self) -> str:
        return f"{self.kernel.path.stem.removesuffix('_cuda')}-{self.name}"


@dataclass(frozen=True)
class Search:
    """A run of a program that makes a mistake on demand."""

    planted: Planted
    program: Program
    number: int  # of the mistake in the program; 0: it always makes it

    def __str__(self) -> str:
        return str(self.planted)


def searches(mistakes: Sequence[Planted]) -> list[Search]:
    """One run for each mistake, with one program for all of a kernel that a flavor is to find."""
    found = []
    groups: dict[tuple[Kernel, Flavor], list[Planted]] = {}
    for planted in mistakes:
        if planted.has_own_program:
            kernel = replace(planted.kernel, replacements=((planted.old, planted.new),))
            found.append(Search(planted, program_of(kernel, planted.flavor), 0))
        else:
            groups.setdefault((planted.kernel, planted.flavor), []).append(planted)
    for (kernel, flavor), group in groups.items():
        changed = replace(kernel, mistakes=tuple((planted.old, planted.new) for planted in group))
        for number, planted in enumerate(group, start=1):
            found.append(Search(planted, program_of(changed, flavor), number))
    return found


def together(searches: Sequence[Search]) -> list[Program]:
    """The programs that can also make no mistake."""
    return list(dict.fromkeys(search.program for search in searches if search.number > 0))
