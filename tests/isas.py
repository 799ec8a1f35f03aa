"""The instruction sets of this machine, as the tests go through them."""

from typing import Final

from pixfuse._library import available_isas

#: Those with loops of their own. `amx` runs those of `avx512` but for some convolutions of bytes,
#: so only what looks at convolutions goes through it, and `tests/test_library.py` at the others.
WITH_OWN_LOOPS: Final = tuple(isa for isa in available_isas() if isa != "amx")
