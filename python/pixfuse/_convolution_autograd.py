"""Of the operator conv_bias_relu: its fake kernel, its derivatives, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch.nn.functional import conv2d, pad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from pixfuse._library import dense_strides
from pixfuse.functional import normalize
from pixfuse.normalization import ROUNDING_CODES, Normalization, Rounding

#: The numbers of the output's dtype in the operator's schema. float64 is for checking derivatives;
#: it goes through torch's convolution for any number of channels.
OUTPUT_DTYPE_CODES: Final = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 4,
}
_DTYPES: Final = {code: dtype for dtype, code in OUTPUT_DTYPE_CODES.items()}

#: Normalized images exist during a backward pass a slice at a time, of as much output as this: what
#: a cache can hold, or what keeps a GPU busy.
_SLICE_BYTES: Final = {"cpu": 1 << 24, "cuda": 1 << 28}


def _output_shape(
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Any, ...]:
    height, width = (
        (input.shape[2 + d] + padding[2 * d] + padding[2 * d + 1] - reach) // stride[d] + 1
        for d, reach in enumerate(dilation[d] * (weight.shape[2 + d] - 1) + 1 for d in range(2))
    )
    return input.shape[0], weight.shape[0], height, width


@torch.library.register_fake("pixfuse::conv_bias_relu")
def _forward_fake(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    mean: list[float],
    std: list[float],
    rounding: int,
    dtype: int,
    channels_last: bool,
    allow_tf32: bool = False,
    way: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _output_shape(input, weight, stride, padding, dilation)
    output = weight.new_empty_strided(
        shape, dense_strides(shape, channels_last), dtype=_DTYPES[dtype]
    )
    counts = weight.new_empty((3, weight.shape[0]), dtype=torch.int64)
    return output, counts, weight.new_empty((weight.shape[0],), dtype=torch.float64)


# ---- what both derivatives are made of -----------------------------------------------------------


def _float_input(
    input: torch.Tensor, mean: Sequence[float], std: Sequence[float], rounding: int
) -> torch.Tensor:
    """The input as the convolution saw it: bytes are normalized again, not remembered."""
    if input.dtype is not torch.uint8:
        return input
    name = next(name for name, code in ROUNDING_CODES.items() if code == rounding)
    normalization = Normalization(mean, std, cast(Rounding, name))
    return normalize(input, normalization, memory_format=torch.preserve_format)


def _without_more_on_one_side(padding: Sequence[int]) -> tuple[list[int], list[int]]:
    """Padding that is alike on both sides, and the rest for `pad` (left, right, top, bottom)."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return [top, left], []
    return [0, 0], [left, right, top, bottom]


def _convolution_gradients(
    gradient: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    both_sides, rest = _without_more_on_one_side(padding)
    found = torch.ops.aten.convolution_backward.default(
        gradient,
        pad(input, rest) if rest else input,
        weight,
        [weight.shape[0]],
        stride,
        both_sides,
        dilation,
        False,
        [0, 0],
        groups,
        list(wanted),
    )
    if rest and found[0] is not None:
        left, _, top, _ = rest
        height, width = input.shape[2:]
        return found[0][:, :, top : top + height, left : left + width], found[1], found[2]
    return found  # type: ignore[no-any-return]


def _through_relu(gradient: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The gradient where the output is above 0, or NaN, as torch's relu passes it."""
    return torch.ops.aten.threshold_backward.default(  # type: ignore[no-any-return]
        gradient, output, 0
    )


def _dense(gradient: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """In this memory format, and not a part of a larger tensor."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if gradient.storage_offset() != 0:
        return gradient.clone(memory_format=memory_format)
    return gradient.contiguous(memory_format=memory_format)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.stride(1) == 1


# ---- first derivative ----------------------------------------------------------------------------


@torch.library.custom_op(
    "pixfuse::conv_bias_relu_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor output, Tensor input, Tensor weight, int[] stride, "
    "int[] padding, int[] dilation, int groups, float[] mean, float[] std, int rounding, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
    gradient: torch.Tensor,
    output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mean: Sequence[float],
    std: Sequence[float],
    rounding: int,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias; those that are not wanted are empty."""
    geometry = (stride, padding, dilation, groups)
    if input.dtype is not torch.uint8:
        masked = _through_relu(gradient, output)
        found = _convolution_gradients(masked, input, weight, *geometry, wanted)
    else:
        dtype = torch.promote_types(gradient.dtype, weight.dtype)
        image_bytes = output.nbytes // max(1, len(output))
        step = max(1, _SLICE_BYTES[input.device.type] // max(1, image_bytes))
        wide_weight = weight.to(dtype)
        total_weight = total_bias = None
        for begin in range(0, len(input), step):
            part = slice(begin, begin + step)
            masked = _through_relu(gradient[part], output[part]).to(dtype)
            images = _float_input(input[part], mean, std, rounding).to(dtype)
            _, of_weight, of_bias = _convolution_gradients(
                masked, images, wide_weight, *geometry, wanted
            )
            if of_weight is not None:
                total_weight = of_weight if total_weight is None else total_weight.add_(of_weight)
            if of_bias is not None:
                total_bias = of_bias if total_bias is None else total_bias.add_(of_bias)
        if len(input) == 0:
            total_weight = torch.zeros_like(weight)
            total_bias = weight.new_zeros(weight.shape[0])
        found = (None, total_weight, total_bias)
    of_input, of_weight, of_bias = found
    return (
        _dense(of_input, _is_channels_last(output))
        if wanted[0] and of_input is not None
        else weight.new_empty(0),
        _dense(of_weight.to(weight.dtype), _is_channels_last(weight))
        if wanted[1] and of_weight is not None
        else weight.new_empty(0),
        of_bias.to(weight.dtype) if wanted[2] and of_bias is not None else weight.new_empty(0),
    )


@_backward_op.register_fake
def _backward_fake(
    gradient: torch.Tensor,
    output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mean: Sequence[float],
    std: Sequence[float],
    rounding: int,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def dense(shape: Any, channels_last: bool) -> torch.Tensor:
        return weight.new_empty_strided(shape, dense_strides(shape, channels_last))

    nothing = weight.new_empty(0)
    return (
        dense(input.shape, _is_channels_last(output)) if wanted[0] else nothing,
        dense(weight.shape, _is_channels_last(weight)) if wanted[1] else nothing.clone(),
        weight.new_empty(weight.shape[0]) if wanted[2] else nothing.clone(),
    )


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, weight, _, *options, _, _, _, _ = inputs
    result, counts, output_sum = output
    ctx.mark_non_differentiable(counts, output_sum)
    ctx.save_for_backward(input, weight, result)
    ctx.options = options  # stride, padding, dilation, groups, mean, std, rounding


def _backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    input, weight, output = ctx.saved_tensors
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    found = torch.ops.pixfuse.conv_bias_relu_backward.default(
        gradient, output, input, weight, *ctx.options, wanted
    )
    needed = [g if want else None for g, want in zip(found, wanted, strict=True)]
    return (*needed, *[None] * 11)


torch.library.register_autograd(
    "pixfuse::conv_bias_relu", _backward, setup_context=_forward_context
)


# ---- second derivative ---------------------------------------------------------------------------


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    gradient, result, input, weight, *options = inputs
    ctx.save_for_backward(gradient, result, input, weight)
    ctx.options = options


def _double_backward(
    ctx: Any, of_input: torch.Tensor, of_weight: torch.Tensor, of_bias: torch.Tensor
) -> tuple[Any, ...]:
    """Each of the three results is linear in the gradient, and in one of input and weight."""
    gradient, output, input, weight = ctx.saved_tensors
    stride, padding, dilation, groups, mean, std, rounding, wanted = ctx.options
    geometry = (stride, padding, dilation, groups)
    both_sides, rest = _without_more_on_one_side(padding)

    def convolve(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        padded = pad(images, rest) if rest else images
        return conv2d(padded, kernel, None, stride, both_sides, dilation, groups)

    dtype = torch.promote_types(gradient.dtype, weight.dtype)
    images = _float_input(input, mean, std, rounding).to(dtype)
    kernel = weight.to(dtype)
    masked = _through_relu(gradient.to(dtype), output.to(dtype))
    of_gradient = torch.zeros_like(masked)
    to_input = to_weight = None
    if wanted[0]:
        of_gradient = of_gradient + convolve(of_input.to(dtype), kernel)
        _, to_weight, _ = _convolution_gradients(
            masked, of_input.to(dtype), kernel, *geometry, (False, True, False)
        )
    if wanted[1]:
        of_gradient = of_gradient + convolve(images, of_weight.to(dtype))
        if input.dtype is not torch.uint8:
            to_input, _, _ = _convolution_gradients(
                masked, images, of_weight.to(dtype), *geometry, (True, False, False)
            )
    if wanted[2]:
        of_gradient = of_gradient + of_bias.to(dtype).view(1, -1, 1, 1)
    to_gradient = _through_relu(of_gradient, output.to(dtype)).to(gradient.dtype)
    return (to_gradient, None, to_input, to_weight, *[None] * 8)


torch.library.register_autograd(
    "pixfuse::conv_bias_relu_backward", _double_backward, setup_context=_backward_context
)


# ---- multiplications and additions, as torch counts those of its convolution ---------------------


@register_flop_formula(torch.ops.pixfuse.conv_bias_relu)
def _forward_flops(
    input_shape: list[int], weight_shape: list[int], *_: Any, out_shape: Any, **__: Any
) -> int:
    return conv_flop_count(input_shape, weight_shape, out_shape[0])


@register_flop_formula(torch.ops.pixfuse.conv_bias_relu_backward)
def _backward_flops(
    gradient_shape: list[int],
    output_shape: list[int],
    input_shape: list[int],
    weight_shape: list[int],
    *options: Any,
    out_shape: Any,
    **_: Any,
) -> int:
    wanted: list[bool] = options[-1]
    return sum(wanted[:2]) * conv_flop_count(input_shape, weight_shape, output_shape)
