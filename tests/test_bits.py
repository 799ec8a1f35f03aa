"""The comparator itself: each planted difference must be caught."""

import math

import pytest
import torch

from tests.bits import assert_same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def one_ulp_away(tensor: torch.Tensor) -> torch.Tensor:
    integer = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    changed = tensor.clone(memory_format=torch.preserve_format)
    changed.view(integer)[(-1,) * changed.dim()] += 1
    return changed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_bits_pass(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    tensor = torch.rand(2, 3, 4, 5).to(dtype).contiguous(memory_format=memory_format)
    tensor[0, 0, 0, 0] = math.nan
    assert_same_bits(tensor, tensor.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_ulp_is_caught(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    tensor = torch.rand(2, 3, 4, 5).to(dtype).contiguous(memory_format=memory_format)
    with pytest.raises(AssertionError, match=r"1 of 120 elements differ, .* at \(1, 2, 3, 4\)"):
        assert_same_bits(one_ulp_away(tensor), tensor)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(-0.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, -math.inf), (-math.nan, math.nan)],
)
def test_values_that_compare_oddly_are_caught(actual: float, expected: float) -> None:
    with pytest.raises(AssertionError, match="1 of 1 elements differ"):
        assert_same_bits(torch.tensor([actual]), torch.tensor([expected]))


@pytest.mark.parametrize(
    ("actual", "expected", "dtype"),
    [(3, 2, torch.uint8), (255, 0, torch.uint8), (1, 0, torch.bool)],
)
def test_bytes_and_masks_are_compared(actual: int, expected: int, dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, 4, 5, dtype=dtype) + torch.tensor(expected, dtype=dtype)
    changed = tensor.clone()
    assert_same_bits(changed, tensor)
    changed[1, 2, 3, 4] = actual
    with pytest.raises(AssertionError, match=r"1 of 120 elements differ, .* at \(1, 2, 3, 4\)"):
        assert_same_bits(changed, tensor)


def test_a_true_of_other_bits_is_caught() -> None:
    """Torch reads any byte but 0 as True; a mask is to hold 1."""
    true = torch.tensor([1], dtype=torch.uint8).view(torch.bool)
    with pytest.raises(AssertionError, match="1 of 1 elements differ"):
        assert_same_bits(torch.tensor([255], dtype=torch.uint8).view(torch.bool), true)


def test_dtype_shape_and_strides_are_compared() -> None:
    tensor = torch.zeros(2, 3, 4, 5)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(tensor.half(), tensor.bfloat16())
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(tensor, tensor[:1])
    with pytest.raises(AssertionError, match="strides"):
        assert_same_bits(tensor, tensor.contiguous(memory_format=torch.channels_last))
