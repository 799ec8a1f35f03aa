"""Rational arithmetic, rounded once: the truth that needs no floating point."""

import math
from fractions import Fraction


def round_to_float32(value: Fraction) -> float:
    """The float32 nearest to a rational number, ties to even, subnormals and infinity included."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    # 24 bits for normal numbers; below 2**-126 the last bit stays where it is.
    last_bit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / last_bit) * last_bit  # Python's round() breaks ties to even
    if rounded >= Fraction(2) ** 128:
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)  # exact: every float32 is a float64


def nearest(x: int, mean: float, std: float) -> float:
    """What the byte `x` becomes with `rounding="nearest"`."""
    return round_to_float32((Fraction(x, 255) - Fraction(mean)) / Fraction(std))
