"""`pixfuse.certified_dead`: what it certifies never fires, all but a margin of the rest does."""

import inspect
import itertools
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import conv2d

import pixfuse
from pixfuse import certified_dead, reference
from tests.normalizations import ROUNDINGS, made_up

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# By how much of itself a term may be rounded, for one step of k of them.
UNITS = {torch.float64: 2.0**-53} | dict.fromkeys(DTYPES, 2.0**-24)


@dataclass(frozen=True)
class Layer:
    weight: torch.Tensor
    bias: torch.Tensor
    low: list[float]
    high: list[float]
    groups: int
    padding: int

    def certified(self, **options: Any) -> torch.Tensor:
        return certified_dead(
            self.weight,
            self.bias,
            self.low,
            self.high,
            groups=self.groups,
            padding=self.padding,
            **options,
        )

    def exact(self) -> torch.Tensor:
        return reference.certified_dead(
            self.weight,
            self.bias,
            self.low,
            self.high,
            groups=self.groups,
            padding=self.padding > 0,
        )

    def channels_of(self, output: int) -> slice:
        """The input channels that an output sees."""
        inputs = self.weight.shape[1]
        first = output // (len(self.weight) // self.groups) * inputs
        return slice(first, first + inputs)

    def witness(self, output: int) -> torch.Tensor:
        """(C, kH, kW), of the dtype of the weights: the input of largest sum, without padding."""
        every = torch.tensor(self.low).view(-1, 1, 1)
        corner = every.expand(-1, *self.weight.shape[2:]).clone()
        mine = self.channels_of(output)
        low, high = (torch.tensor(side[mine]).view(-1, 1, 1) for side in (self.low, self.high))
        corner[mine] = torch.where(self.weight[output] > 0, high, low)
        return corner.to(self.weight.dtype)


def exact_sum(layer: Layer, output: int, input: torch.Tensor) -> Fraction:
    """The pre-activation as a real number."""
    pairs = zip(
        layer.weight[output].flatten().tolist(),
        input[layer.channels_of(output)].flatten().tolist(),
        strict=True,
    )
    total = sum((Fraction(w) * Fraction(x) for w, x in pairs), Fraction(0))
    return total + Fraction(layer.bias[output].item())


def sums_in_float32(layer: Layer, output: int, input: torch.Tensor) -> list[float]:
    """The pre-activation in float32, added up in orders that are as unlike as they can be."""
    weight = layer.weight[output].float().numpy().ravel()
    products = weight * input[layer.channels_of(output)].float().numpy().ravel()
    terms = np.append(products, np.float32(layer.bias[output].item()))
    by_size = np.argsort(np.abs(terms), kind="stable")
    orders = [np.arange(len(terms)), by_size, by_size[::-1], np.argsort(terms, kind="stable")]
    orders += [orders[-1][::-1], *(np.array([*o[o != len(products)], -1]) for o in orders[:3])]
    sums = []
    for order in orders:
        total = np.float32(0)
        for term in terms[order]:
            total = np.float32(total + term)
        sums.append(float(total))
    return sums


def inputs_of(layer: Layer, source: torch.Generator) -> torch.Tensor:
    """Corners and random points of the range, as large as the kernel, in the dtype of weight."""
    shape = (8, len(layer.low), *layer.weight.shape[2:])
    low, high = (torch.tensor(side).view(-1, 1, 1) for side in (layer.low, layer.high))
    corners = torch.where(torch.rand(shape, generator=source) < 0.5, low, high)
    inside = low + torch.rand(shape, generator=source) * (high - low)
    witnesses = torch.stack([layer.witness(o) for o in range(len(layer.weight))]).float()
    points = torch.cat([corners, inside.clamp(low, high), witnesses, low.expand(shape)[:1]])
    return points.to(layer.weight.dtype)


def what_fires(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """Bool (O,): what torch, pixfuse, or float32 sums in some order find above 0."""
    options = (1, layer.padding, 1, layer.groups)
    torchs = conv2d(inputs, layer.weight, layer.bias, *options)
    fires = (torchs > 0).any(3).any(2).any(0)
    separate = conv2d(inputs, layer.weight, None, *options) + layer.bias.view(-1, 1, 1)
    fires |= (separate > 0).any(3).any(2).any(0)  # rounded before the bias, as on CUDA
    fires |= pixfuse.conv_bias_relu(inputs, layer.weight, layer.bias, *options)[1].active > 0
    for output in range(len(layer.weight)):
        if not fires[output]:
            sums = (s for input in inputs for s in sums_in_float32(layer, output, input))
            fires[output] = any(s > 0 for s in sums)
    return fires


def check(layer: Layer, certified: torch.Tensor, source: torch.Generator) -> None:
    """Every claim of a certificate; without padding also that of there being none."""
    exact = layer.exact()
    assert not (certified & ~exact).any(), "certified, but some real sum is above 0"
    fires = what_fires(layer, inputs_of(layer, source))
    assert not (certified & fires).any(), "certified, but it fires"
    if layer.padding:
        return
    count = layer.weight[0].numel()
    margin = Fraction(UNITS[layer.weight.dtype]) * (count + 4) + Fraction(2.0**-45)
    for output in range(len(layer.weight)):
        witness = layer.witness(output)
        largest = exact_sum(layer, output, witness)
        assert (largest > 0) == (not exact[output]), "the reference is another one"
        if not certified[output] and largest <= 0:
            absolute = Layer(
                layer.weight.abs(), layer.bias.abs(), layer.low, layer.high, layer.groups, 0
            )
            size = exact_sum(absolute, output, witness.abs())
            tiny = Fraction(torch.finfo(layer.weight.dtype).tiny) + Fraction(2.0**-110)
            assert largest > -(margin * size + tiny), "not certified, and beyond the margin"


NUMBERS = st.one_of(
    st.integers(-4, 4).map(float),
    st.floats(-2, 2, width=16),
    st.floats(-(2.0**-10), 2.0**-10, width=32),
)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Layers whose largest sums are near 0, where certificates can go wrong."""
    dtype = draw(st.sampled_from(DTYPES))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    inputs, kernel = draw(st.integers(1, 3)), (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    outputs, channels = groups * draw(st.integers(1, 2)), groups * inputs
    size = inputs * math.prod(kernel)
    rows = st.lists(NUMBERS, min_size=size, max_size=size)
    values = [draw(rows) for _ in range(outputs)]
    weight = torch.tensor(values).view(outputs, inputs, *kernel).to(dtype)
    ends = torch.tensor([[draw(NUMBERS), draw(NUMBERS)] for _ in range(channels)]).to(dtype)
    low, high = ends.amin(1).tolist(), ends.amax(1).tolist()
    padding = draw(st.integers(0, 1))
    layer = Layer(weight, torch.zeros(outputs, dtype=dtype), low, high, groups, padding)
    bias = []
    for output in range(outputs):
        largest = float(exact_sum(layer, output, layer.witness(output)))
        shift = draw(st.sampled_from((0.0, 0.0, 1e-7, -1e-7, 1e-2, -1e-2, 1.0, -1.0)))
        bias.append(-largest * (1 + shift))
    return Layer(weight, torch.tensor(bias).to(dtype), low, high, groups, padding)


@hypothesis.settings(max_examples=60)
@hypothesis.given(layer=layers(), seed=st.integers(0, 2**31))
def test_a_certificate_holds_and_what_has_none_has_a_witness(layer: Layer, seed: int) -> None:
    check(layer, layer.certified(), torch.Generator().manual_seed(seed))


def test_layers_of_ordinary_weights() -> None:
    """Many channels, of which some of each kind."""
    source = torch.Generator().manual_seed(1)
    for dtype, (groups, padding) in itertools.product(DTYPES, [(1, 0), (1, 1), (2, 0), (4, 1)]):
        weight = torch.randn(16, 8 // groups, 3, 3, generator=source).to(dtype)
        low = (-torch.rand(8, generator=source)).to(dtype)
        high = (low.float() + 2 * torch.rand(8, generator=source)).to(dtype)
        layer = Layer(weight, torch.zeros(16).to(dtype), low.tolist(), high.tolist(), groups, 0)
        largest = [float(exact_sum(layer, o, layer.witness(o))) for o in range(16)]
        bias = -torch.tensor(largest) * torch.linspace(0.9, 1.1, 16)
        layer = Layer(weight, bias.to(dtype), layer.low, layer.high, groups, padding)
        certified = layer.certified()
        assert certified.any()
        assert not certified.all()
        check(layer, certified, source)


def adversarial() -> Layer:
    """The real sum is below 0, but in float32 all terms of -2**-26 can get lost."""
    terms = [-1.0, *[-(2.0**-26)] * 64, 1 + 2.0**-23]
    weight = torch.tensor(terms).view(1, -1, 1, 1)
    return Layer(weight, torch.zeros(1), [1.0] * 66, [1.0] * 66, 1, 0)


def test_what_only_rounding_makes_fire_is_not_certified() -> None:
    layer = adversarial()
    assert layer.exact().tolist() == [True]
    assert layer.certified().tolist() == [False]
    source = torch.Generator().manual_seed(0)
    check(layer, layer.certified(), source)
    with pytest.raises(AssertionError, match="certified, but it fires"):
        check(layer, layer.exact(), source)  # a certificate without a margin


FAULTS = ("swapped ends", "the midpoint", "no bias", "another group", "no padding", "none at all")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_notices_a_wrong_certificate(fault: str) -> None:
    source = torch.Generator().manual_seed(2)
    weight = torch.randn(12, 2, 2, 2, generator=source)
    low, high = [1.0, 2.0, -1.0, 0.5], [1.5, 2.5, 0.5, 2.0]
    layer = Layer(weight, torch.linspace(-12, -1, 12), low, high, 2, 0)
    check(layer, layer.certified(), source)
    mid = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    middle = torch.tensor(mid)[:2].view(1, 2, 1, 1)
    if fault == "no padding":  # where a border is what fires
        layer = Layer(-weight.abs(), torch.full((12,), 1.0), low, high, 2, 1)
        wrong = certified_dead(layer.weight, layer.bias, low, high, groups=2)
        assert wrong.any()
    else:
        wrong = {
            "swapped ends": lambda: (
                (weight.clamp(max=0) * torch.tensor(high)[:2].view(1, 2, 1, 1)).sum((1, 2, 3))
                + (weight.clamp(min=0) * torch.tensor(low)[:2].view(1, 2, 1, 1)).sum((1, 2, 3))
                + layer.bias
                <= 0
            ),
            "the midpoint": lambda: (weight * middle).sum((1, 2, 3)) + layer.bias <= 0,
            "no bias": lambda: certified_dead(weight, -100 * layer.bias.abs(), low, high, groups=2),
            "another group": lambda: certified_dead(
                weight, layer.bias, low[2:] + low[:2], high[2:] + high[:2], groups=2
            ),
            "none at all": lambda: torch.zeros(12, dtype=torch.bool),
        }[fault]()
    with pytest.raises(AssertionError, match=r"certified, (but|and)"):
        check(layer, wrong, source)


def test_without_a_term_above_zero_there_is_no_margin() -> None:
    weight = -torch.rand(4, 3, 3, 3)
    assert certified_dead(weight, None, 0.0, 1.0).all()
    assert certified_dead(weight, torch.zeros(4), 0.0, 1.0, padding=1).all()
    assert certified_dead(weight * 1e38, torch.full((4,), -1e38), 0.0, 1e3).all()
    assert certified_dead(torch.zeros(2, 1, 1, 1), torch.zeros(2), -1, 1).all()
    assert not certified_dead(torch.zeros(2, 1, 1, 1), torch.full((2,), 1e-45), -1, 1).any()


def test_sums_that_overflow_are_not_certified() -> None:
    """Infinity stays, whatever is subtracted from it."""
    weight = torch.tensor([[3e38, 3e38, -3e38, -3e38]]).view(1, 4, 1, 1)
    total = np.float32(0)
    with np.errstate(over="ignore"):
        for term in weight.flatten().numpy():
            total = np.float32(total + term)
    assert total == np.inf
    assert not certified_dead(weight, torch.tensor([-3e38]), 1.0, 1.0).any()
    assert certified_dead(weight / 8, torch.tensor([-3e37]), 1.0, 1.0).all()
    half = torch.full((1, 64, 1, 1), 1024.0).half()
    half[:, ::2] = -2000
    assert not certified_dead(half, None, 1.0, 2.0).any()
    assert certified_dead(half.float(), None, 1.5, 1.5).all()


def test_ranges_without_an_end() -> None:
    """As behind another ReLU."""
    weight = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-1.0, 1e-30]]).view(3, 2, 1, 1)
    bias = torch.tensor([-1.0, -1.0, -1.0])
    assert certified_dead(weight, bias, 0.0, math.inf).tolist() == [True, True, False]
    assert not certified_dead(weight, bias, -math.inf, 0.0).any()
    mixed = certified_dead(weight, bias, [0.0, -1e9], [math.inf, 1e9])
    assert mixed.tolist() == [False, True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers(value: float) -> None:
    weight = -torch.ones(3, 1, 1, 1)
    weight[1] = value
    bias = torch.full((3,), -1.0)
    bias_too = bias.clone()
    bias_too[2] = value
    certified = certified_dead(weight, bias, 0.0, 1.0)
    assert certified.tolist() == [True, False, True]  # 0 * infinity is no number
    positive_range = certified_dead(weight, bias_too, 1.0, 2.0).tolist()
    assert positive_range == [True, value == -math.inf, value == -math.inf]


def test_padding_counts_whole_pixels() -> None:
    """A tap sees zeros in all channels at once: +1 of one and -3 of another never come apart."""
    weight = torch.tensor([[1.0, -3.0], [1.0, -0.5]]).view(2, 2, 1, 1).repeat(1, 1, 3, 3)
    bias = torch.tensor([-1.0, -6.0])
    low, high = [1.0, 1.0], [1.0, 1.0]
    assert certified_dead(weight, bias, low, high, padding=1).tolist() == [True, True]
    below = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    assert certified_dead(below, torch.tensor([-0.5]), [1, 2], [1, 2]).tolist() == [True]
    # Where all taps are below 0, a border is what fires.
    fires_at_borders = (-torch.ones(1, 1, 3, 3), torch.tensor([5.0]), 1.0, 1.0)
    assert certified_dead(*fires_at_borders).tolist() == [True]
    assert certified_dead(*fires_at_borders, padding=(0, 1)).tolist() == [False]
    assert certified_dead(*fires_at_borders, padding="same").tolist() == [False]
    assert certified_dead(*fires_at_borders, padding="valid").tolist() == [True]
    one = (-torch.ones(1, 1, 1, 1), torch.tensor([0.5]), 1.0, 1.0)
    assert certified_dead(*one, padding="same").tolist() == [True]  # of one tap: no padding


def test_padding_changes_nothing_where_zero_is_in_the_range() -> None:
    weight, bias = torch.randn(64, 3, 3, 3), torch.linspace(-20, 0, 64)
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (-2.0, 0.0)):
        without = certified_dead(weight, bias, low, high)
        assert 0 < without.sum() < 64
        assert torch.equal(without, certified_dead(weight, bias, low, high, padding=1))


def test_groups_are_layers_side_by_side() -> None:
    weight, bias = torch.randn(12, 2, 3, 3), torch.linspace(-9, -4, 12)[torch.randperm(12)]
    low, high = torch.rand(6) - 1, torch.rand(6)
    together = certified_dead(weight, bias, low, high, groups=3)
    apart = [
        certified_dead(w, b, lo, hi)
        for w, b, lo, hi in zip(
            weight.chunk(3), bias.chunk(3), low.chunk(3), high.chunk(3), strict=True
        )
    ]
    assert torch.equal(together, torch.cat(apart))
    assert 0 < together.sum() < 12


# --- images ---


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_normalization_is_what_bytes_can_become(rounding: Any) -> None:
    """A stem on bytes: no image fires what is certified, and a few bytes fire all but a margin."""
    for channels, low in itertools.product((1, 3), DTYPES):
        normalization = made_up(channels, rounding)
        weight = torch.randn(64, channels, 3, 3)
        mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
        ends = torch.stack([-mean / std, (1 - mean) / std]).view(2, 1, channels, 1, 1)
        largest = (weight * ends).amax(0).sum((1, 2, 3))
        bias = -largest * torch.linspace(0.99, 1.01, 64)
        weight, bias = weight.to(low), bias.to(low)
        certified = certified_dead(weight, bias, normalization=normalization)
        assert 5 < certified.sum() < 60
        witnesses = torch.where(weight > 0, 255, 0).to(torch.uint8)
        random = torch.randint(256, (100, channels, 3, 3), dtype=torch.uint8)
        images = torch.cat([witnesses, random, 255 * (random > 99).to(torch.uint8)])
        _, ours = pixfuse.conv_bias_relu(images, weight, bias, normalization=normalization)
        floats = reference.normalize(images, normalization, dtype=low)
        theirs = conv2d(floats, weight, bias) > 0
        assert not (certified & ~ours.dead).any()
        assert not (certified & theirs.any(3).any(2).any(0)).any()
        # bfloat16 rounds the range itself by up to 2^-8.
        if low is torch.float32:
            assert (certified | ~ours.dead).sum() >= 63


def test_zero_to_one_and_minus_one_to_one() -> None:
    """The example of the docstring."""
    text = inspect.getdoc(certified_dead)
    assert text is not None
    lines = text.split("Example::\n")[1].split("\n\nSource")[0]
    code = inspect.cleandoc(lines)
    assert len(re.findall(r"^assert ", code, re.MULTILINE)) == 2
    exec(code, {"pixfuse": pixfuse, "torch": torch})


def test_the_lines_that_it_says_it_equals() -> None:
    text = inspect.getdoc(certified_dead)
    assert text is not None
    lines = text.split("margin)::\n")[1].split("\n\nExample")[0]
    corner, result = inspect.cleandoc(lines).splitlines()
    weight, bias = torch.randn(32, 3, 3, 3), torch.linspace(-20, 0, 32)
    low, high = torch.tensor([-1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 1.0])
    names = {"torch": torch, "weight": weight, "bias": bias, "low": low, "high": high}
    exec(corner, names)
    expected = eval(result, names)
    assert 0 < expected.sum() < 32
    assert torch.equal(certified_dead(weight, bias, low, high), expected)


# --- dtypes ---


def test_a_low_precision_is_that_of_its_weights() -> None:
    """Under autocast another network runs, whose weights were rounded."""
    weight, bias = torch.randn(64, 3, 5, 5), None
    high = 1.0
    largest = weight.clamp(min=0).sum((1, 2, 3))
    bias = -largest * (1 + torch.linspace(-2e-3, 2e-3, 64))
    for low in (torch.bfloat16, torch.float16):
        rounded = certified_dead(weight.to(low), bias.to(low), 0.0, high)
        assert torch.equal(certified_dead(weight, bias, 0.0, high, dtype=low), rounded)
        if low is torch.bfloat16:
            assert not torch.equal(certified_dead(weight, bias, 0.0, high), rounded)
        with torch.autocast("cpu", low):
            images = (weight > 0).float()
            _, activity = pixfuse.conv_bias_relu(images, weight, bias)
        assert not (rounded & ~activity.dead).any()


def test_an_end_of_the_range_is_rounded_with_the_input() -> None:
    """1.0042 becomes 1.0078 in bfloat16, and three times that fires."""
    weight, bias, high, low = torch.full((1, 1, 1, 1), 3.0), torch.tensor([-3.015625]), 1.0042, 0.0
    input = torch.full((1, 1, 1, 1), high)
    assert conv2d(input, weight, bias).item() < 0
    assert certified_dead(weight, bias, low, high).all()
    assert conv2d(input.bfloat16(), weight.bfloat16(), bias.bfloat16()).item() > 0
    assert not certified_dead(weight, bias, low, high, dtype=torch.bfloat16).any()
    assert certified_dead(weight, bias, low, 1.0035, dtype=torch.bfloat16).all()


def test_tf32_has_a_wider_margin() -> None:
    weight = torch.ones(1, 1, 1, 1)
    for gap, plain, wide in ((2.0**-8, True, True), (2.0**-10, True, False), (0.0, False, False)):
        bias = torch.tensor([-1.0 - gap])
        assert certified_dead(weight, bias, 0.0, 1.0).item() is plain
        assert certified_dead(weight, bias, 0.0, 1.0, tf32=True).item() is wide
        assert certified_dead(weight.double(), bias.double(), 0.0, 1.0, tf32=True).item() is plain
    # Rounded to 10 bits, both factors up: it fires, although the real product does not.
    up = 1 + 2.0**-11 + 2.0**-20
    rounded = 1 + 2.0**-10
    bias = torch.tensor([-(up**2) - 2.0**-14])
    assert rounded**2 + bias.item() > 0
    assert certified_dead(weight * up, bias, 0.0, up).item() is True
    assert certified_dead(weight * up, bias, 0.0, up, tf32=True).item() is False


def test_float64() -> None:
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    bias = torch.tensor([-1.0 - 1e-12], dtype=torch.float64)
    assert certified_dead(weight, bias, 0.0, 1.0).all()
    assert not certified_dead(weight, bias, 0.0, 1.0, dtype=torch.float32).any()


def test_a_parameter_is_taken_as_it_is() -> None:
    conv = torch.nn.Conv2d(3, 8, 3)
    certified = certified_dead(conv.weight, conv.bias, normalization=pixfuse.UNIT)
    assert certified.shape == (8,)
    assert certified.dtype is torch.bool
    assert not certified.requires_grad


def test_it_does_not_care_for_torchs_default_device() -> None:
    conv = torch.nn.Conv2d(3, 8, 3)
    certified = certified_dead(conv.weight, conv.bias, normalization=pixfuse.UNIT)
    with torch.device("meta"):
        ours = certified_dead(conv.weight, conv.bias, normalization=pixfuse.UNIT)
    assert torch.equal(ours, certified)


# --- errors ---

WEIGHT, BIAS = torch.randn(4, 3, 3, 3), torch.randn(4)

BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no weight": ({"weight": None}, TypeError, r"expected weight to be a torch.Tensor, got NoneT"),
    "integers": (
        {"weight": WEIGHT.long()},
        TypeError,
        r"expected weight of a float dtype, got torch.int64",
    ),
    "rank": (
        {"weight": WEIGHT[0]},
        ValueError,
        r"expected weight of shape \(O, C / groups, kH, kW\) without a 0, got shape \(3, 3, 3\)",
    ),
    "empty": ({"weight": WEIGHT[:0]}, ValueError, r"expected weight of shape .* without a 0, got"),
    "bias a number": ({"bias": 0.0}, TypeError, r"expected bias to be a torch.Tensor or None, got"),
    "integer bias": (
        {"bias": BIAS.int()},
        TypeError,
        r"expected bias of a float dtype, got torch.int32",
    ),
    "bias": (
        {"bias": BIAS[:2]},
        ValueError,
        r"expected bias of shape \(4,\), as given by weight, got shape \(2,\)",
    ),
    "groups": (
        {"groups": 3},
        ValueError,
        r"expected groups to divide the 4 output channels of weight, got 3",
    ),
    "no groups": ({"groups": 0}, ValueError, r"expected groups to divide .*, got 0"),
    "a fraction of a group": (
        {"groups": 0.5},
        TypeError,
        r"expected groups to be an integer, got float",
    ),
    "dtype": (
        {"dtype": torch.int8},
        TypeError,
        r"expected dtype to be torch.float32, float16, bfloat16 or float64, got torch.int8",
    ),
    "no range": (
        {"low": None, "high": None},
        TypeError,
        r"expected either low and high, or a normalization, got neither",
    ),
    "two ranges": (
        {"normalization": pixfuse.UNIT},
        TypeError,
        r"expected either low and high, or a normalization, got both",
    ),
    "no high": ({"high": None}, TypeError, r"expected low and high, got no high"),
    "words": ({"low": "0"}, TypeError, r"expected low to be a number, or one per channel, got str"),
    "two lows": (
        {"low": [0, 0]},
        ValueError,
        r"expected low to be a number or 3, one per channel, got shape \(2,\)",
    ),
    "not a number": ({"high": math.nan}, ValueError, r"expected high without NaN, got nan"),
    "empty range": (
        {"low": [0, 2, 0]},
        ValueError,
        r"expected low to be at most high in every channel, got low 2.0 and high 1.0 in channel 1",
    ),
    "another normalization": (
        {"low": None, "high": None, "normalization": 0.5},
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got float",
    ),
    "channels": (
        {"low": None, "high": None, "normalization": pixfuse.Normalization([0, 0], 1)},
        ValueError,
        r"expected normalization of 3 channels, .* or of one value for all, got 2 values",
    ),
    "padding's name": (
        {"padding": "reflect"},
        ValueError,
        r"expected padding to be 'valid', 'same' or integers, got 'reflect'",
    ),
    "padding's type": (
        {"padding": 0.5},
        TypeError,
        r"expected padding to be an integer, or two \(height, width\), got 0.5",
    ),
    "three paddings": (
        {"padding": (1, 1, 1)},
        TypeError,
        r"expected padding to be an integer, or two \(height, width\), got \(1, 1, 1\)",
    ),
    "negative padding": (
        {"padding": (0, -1)},
        ValueError,
        r"expected padding to be 0 or more, got \(0, -1\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    changed, error, message = BAD_CALLS[case]
    good: dict[str, Any] = {"weight": WEIGHT, "bias": BIAS, "low": 0.0, "high": 1.0}
    with pytest.raises(error, match=f"^certified_dead: {message}"):
        certified_dead(**{**good, **changed})
