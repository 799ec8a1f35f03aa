"""The instruction sets of this machine, as the tests go through them."""

from typing import Final

from pixfuse._library import available_isas

#: Those that multiply bytes: they run the loops of `avx512` but for some convolutions of bytes, so
#: only what looks at convolutions goes through them, and `tests/test_library.py` at the others.
OF_BYTES: Final = ("vnni", "amx")
WITH_OWN_LOOPS: Final = tuple(isa for isa in available_isas() if isa not in OF_BYTES)
