"""Equality as this project promises it: the same bits, shape, dtype and strides."""

import torch

_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.uint8: torch.uint8,
    torch.bool: torch.uint8,
}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor, as integers on the CPU."""
    return tensor.detach().cpu().view(_INTEGER[tensor.dtype])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails unless both have the same dtype, shape, strides and bits; devices may differ.

    Stricter than `torch.equal`: 0.0 is not -0.0, and a NaN equals a NaN of the same bits.
    """
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert actual.stride() == expected.stride(), (
        f"strides {actual.stride()}, expected {expected.stride()}, of shape {tuple(actual.shape)}"
    )
    actual_bits, expected_bits = bits_of(actual), bits_of(expected)
    if torch.equal(actual_bits, expected_bits):
        return
    different = (actual_bits != expected_bits).nonzero()
    first = tuple(different[0].tolist())
    raise AssertionError(
        f"{len(different)} of {actual.numel()} elements differ, the first at {first}: "
        f"{actual[first].item()!r} with bits {actual_bits[first].item():#x}, expected "
        f"{expected[first].item()!r} with bits {expected_bits[first].item():#x}"
    )
