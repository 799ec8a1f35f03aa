"""The instruction sets of this machine, as the tests go through them."""

from pathlib import Path
from typing import Final

from pixfuse._library import available_isas

#: These run the loops of `avx512` but for some convolutions of bytes, and for counting. So only
#: what looks at these goes through them, and `tests/test_library.py` at the others.
OF_BYTES: Final = ("vnni", "amx")
OF_BITS: Final = ("gfni",)


def _is_amds() -> bool:
    cpus = Path("/proc/cpuinfo")
    return cpus.exists() and "AuthenticAMD" in cpus.read_text()


#: These multiply bytes in pairs, where vectors add beside multiplying.
IN_PAIRS: Final = OF_BITS if _is_amds() else ()


def _without(*left_out: str) -> tuple[str, ...]:
    return tuple(isa for isa in available_isas() if isa not in left_out)


WITH_OWN_LOOPS: Final = _without(*OF_BYTES, *OF_BITS)
FOR_CONVOLUTIONS: Final = _without(*() if IN_PAIRS else OF_BITS)
FOR_COUNTS: Final = _without(*OF_BYTES)
