"""Convolution, bias and ReLU in one pass that also says which output channels are alive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.autograd import forward_ad

from pixfuse._checks import check_choice, check_device, code_of, tensor_of_images
from pixfuse._convolution_autograd import OUTPUT_DTYPE_CODES
from pixfuse._library import LAYOUT_CODES, view_as_nchw
from pixfuse.activity import UnitActivity
from pixfuse.normalization import Normalization

Pair: TypeAlias = int | Sequence[int]

#: Of 8 bytes each, more than anything can address.
_MOST_ELEMENTS = 2**60


class _Geometry(NamedTuple):
    """Stride, padding and dilation as the operator takes them."""

    stride: list[int]
    padding: list[int]  # top, bottom, left, right
    dilation: list[int]


def conv_bias_relu(
    input: torch.Tensor | np.ndarray,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    normalization: Normalization | None = None,
    input_layout: Literal["NCHW", "NHWC"] = "NCHW",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[torch.Tensor, UnitActivity]:
    """Convolve, add a bias, apply ReLU, and count which output channels fire, in one pass.

    Formula: ``relu(conv2d(input, weight, bias))``, summed up in float32 and rounded once; with
    uint8 input ``input`` is first normalized as :func:`pixfuse.normalize` does it, line by line,
    so that the normalized images never exist. Padding is zero in normalized space: borders are
    exact. The same bits for any number of threads; of up to 4 channels also for any batch size and
    layout. Between instruction sets the last bits may differ.

    Bytes under large kernels (``kH * C`` of 20 or more, ``kH * kW * C`` of 100 or more, and ``kW``
    of twice the stride or more, as in the first layers of ResNet and AlexNet) are summed up on the
    CPU by Winograd's algorithm where an image has 65536 outputs or more, with about a third of
    the multiplications. The error is then relative to the largest magnitudes under the neighbouring
    outputs, 3 to each side and 1 above and below, not under an output alone, and the last bits are
    not those of normalized floats. A channel that no image can bring above 0 is 0 still.

    Where the processor multiplies bytes (``pixfuse.info()["isa"]`` is ``"amx"``, ``"gfni"`` or
    ``"vnni"``), bytes of up to 3 channels are summed up in whole numbers: under kernels of
    ``kH * kW * C`` of 48 or more (64 with ``"vnni"``, and with ``"gfni"`` on Intel's processors),
    and but with ``"amx"`` only where Winograd's algorithm does not apply. Each weight is taken in
    steps of 2**-23 of the largest of its output channel, with ``"gfni"`` on AMD's processors of
    2**-31 of the sum of their magnitudes if that is more, and the sum is exact, in any order. The
    error is no larger than that of torch's own sums in float32 for many weights, and at most twice
    that for few; the last bits are not those of normalized floats. ``PIXFUSE_ISA=avx512`` turns it
    off.

    Both are for weights that are not mostly zeros: where an output channel has more of these than
    of others, though not only these, all are summed up directly. Torch is the more accurate the
    fewer terms there are, and a kernel of a single weight gives the product, rounded once.

    On CUDA, tensor cores multiply 16-bit weights, and float32 ones where torch allows TF32 for
    convolutions (``torch.backends.cudnn.conv.fp32_precision``, on unless you turn it off; under
    ``torch.compile``, what it was when it was compiled). Bytes become the dtype of ``weight``
    there, as ``normalize(images, dtype=weight.dtype)`` leaves them, and of more than 4 channels
    torch rounds 16-bit sums before the bias is added. The same bits in every run, as far as
    torch's convolution gives them.

    Args:
        input: float tensor (float32, float16, bfloat16, or float64) of shape (N, C, H, W) or
            (C, H, W), or uint8 images, tensor or numpy array, with a ``normalization``; with
            ``input_layout="NHWC"`` channels last. Any strides. Up to 4 channels in one group run
            as one kernel; on CPUs with AVX-512 also more of float32, where N * H' * W' is 1024 or
            more, under undilated 3x3 kernels, and 1x1 ones if both are channels-last, of up to 576
            weights per output, or 2304 for 64 outputs or more, stride 1, and weights of up to 1.5
            MiB: from channels-last to channels-last (16 outputs or fewer: of up to 128 weights),
            and from contiguous to contiguous (of 256 weights or more, 32 outputs or more, and W' of
            14 or more). That is always IEEE float32. All else, and float64, is torch's convolution
            followed by one pass, in slices of the batch where it is larger than the caches.
        weight: (O, C / groups, kH, kW), of the dtype of a float ``input``; with uint8 input of any
            float dtype but float64.
        bias: (O,), of the dtype of ``weight``, or None.
        stride: 1 or more; one number, or height and width.
        padding: zeros on all sides: a number, or height and width, ``"valid"`` (none) or
            ``"same"`` (as large an output as the input; needs stride 1).
        dilation: 1 or more; one number, or height and width.
        groups: into which input and output channels are split.
        normalization: what a byte becomes; needed for uint8 input, not allowed for other input.
        input_layout: the order of the dimensions of ``input``, ``"NCHW"`` or ``"NHWC"``.
        dtype: of the output. Default: that of ``weight``, or of autocast where it is on. Another
            one (float32, float16, bfloat16) only with uint8 input.
        memory_format: of the output: ``torch.contiguous_format``, ``torch.channels_last``, or
            ``torch.preserve_format``: channels-last when the channels of ``input`` or of
            ``weight`` lie side by side, as torch's convolution has it.

    Returns:
        The output, (N, O, H', W') or (O, H', W'), and its :class:`pixfuse.UnitActivity`. Gradients
        flow to a float ``input``, ``weight`` and ``bias``, twice; none to the activity. With uint8
        input only the bytes are kept for the backward pass. ``torch.compile`` takes it whole;
        ``torch.func.vmap`` calls it once for each, ``torch.func.grad`` refuses it, as it does all
        operators of torch's stable interface; forward-mode derivatives (``jvp``, ``jacfwd``) are
        refused too.

    Raises:
        TypeError: a wrong type or dtype; uint8 without a normalization, or float with one.
        ValueError: a wrong shape, channel count, group count, stride, padding or dilation.
        NotImplementedError: a device or tensor layout that has no kernel.

    Equivalent to::

        torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()

    Source:
        ``torch.nn.functional.conv2d``, ``torch.nn.functional.relu``; Lavin and Gray,
        arXiv:1509.09308 (Winograd's algorithm).
    """
    if not isinstance(input, torch.Tensor):
        if not isinstance(input, np.ndarray):
            raise TypeError(
                "conv_bias_relu: expected input to be a torch.Tensor or a numpy.ndarray, got "
                f"{type(input).__name__}"
            )
        input = tensor_of_images("conv_bias_relu", input)
    layout_code = check_choice("conv_bias_relu", "input_layout", input_layout, LAYOUT_CODES)
    _check_tensors(input, weight, bias)
    if input.dim() not in (3, 4):
        raise ValueError(
            "conv_bias_relu: expected input to have 4 dimensions (a batch) or 3 (one image), got "
            f"shape {tuple(input.shape)}"
        )
    nchw = view_as_nchw(input, layout_code)
    batch = nchw if nchw.dim() == 4 else nchw.unsqueeze(0)
    batch, weight, bias, dtype = _resolve_dtypes(batch, weight, bias, normalization, dtype)
    _check_shapes(batch, weight, bias, groups)
    geometry = resolve_geometry(batch, weight, stride, padding, dilation)
    if normalization is None:
        constants: tuple[Sequence[float], Sequence[float], int] = ((), (), 0)
    else:
        constants = (normalization.mean, normalization.std, normalization.rounding_code)
        _check_normalization(batch, normalization, dtype)
    output, counts, output_sum = torch.ops.pixfuse.conv_bias_relu.default(
        batch,
        weight,
        bias,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
        *constants,
        OUTPUT_DTYPE_CODES[dtype],
        resolve_output_format(batch, weight, memory_format),
        bool(batch.is_cuda and weight.dtype is torch.float32 and _torch_allows_tf32()),
    )
    images, _, height, width = output.shape
    active, active_images, nan = counts.unbind()
    activity = UnitActivity(
        active, active_images, nan, output_sum.detach(), images * height * width, images
    )
    return output if nchw.dim() == 4 else output.squeeze(0), activity


def _torch_allows_tf32() -> bool:
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32")


# Dynamo cannot look into torch's settings, so that it takes what they are while it traces. This is
# all that torch.compiler.assume_constant_result does, but for importing Dynamo, which takes as long
# as importing torch.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _lies_channels_last(tensor: torch.Tensor) -> bool:
    """As torch tells it: of one channel by the strides alone, of one element not at all."""
    _, channels, height, width = tensor.shape
    one = channels == 1 and height == 1 and width == 1
    return bool(tensor.stride(1) == 1 and tensor.stride(3) >= channels and not one)


def resolve_output_format(
    batch: torch.Tensor, weight: torch.Tensor, memory_format: torch.memory_format
) -> bool:
    """Whether the output puts the channels of a pixel side by side."""
    if memory_format is torch.preserve_format:
        return _lies_channels_last(batch) or _lies_channels_last(weight)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "conv_bias_relu: expected memory_format to be torch.contiguous_format, channels_last "
            f"or preserve_format, got {memory_format}"
        )
    return memory_format is torch.channels_last


def _pair(name: str, value: object) -> list[int]:
    if type(value) is int:  # what it mostly is
        return [value, value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        given = list(value)
    else:
        given = [] if isinstance(value, bool) else [value]
    # torch takes those of numpy too; in sums they would overflow.
    sides = [int(side) if isinstance(side, np.integer) else side for side in given]
    if len(sides) in (1, 2) and all(isinstance(side, (int, torch.SymInt)) for side in sides):
        return [sides[0], sides[-1]]
    raise TypeError(
        f"conv_bias_relu: expected {name} to be an integer, or two (height, width), got {value!r}"
    )


def resolve_geometry(
    batch: torch.Tensor,
    weight: torch.Tensor,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
) -> _Geometry:
    """Stride, dilation and the padding of each side, checked against the shapes."""
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    if min(strides) < 1:
        raise ValueError(
            f"conv_bias_relu: expected stride to be 1 or more, got {stride}; non-positive stride "
            "is not supported"
        )
    if min(dilations) < 1:
        raise ValueError(
            f"conv_bias_relu: expected dilation to be 1 or more, got {dilation}; dilation should "
            "be greater than zero"
        )
    kernel = weight.shape[2:]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(
                "conv_bias_relu: expected padding to be 'valid', 'same' or integers, got "
                f"{padding!r}"
            )
        if padding == "same" and max(strides) != 1:
            raise ValueError(
                f"conv_bias_relu: expected stride 1 with padding='same', got {stride}; "
                "padding='same' is not supported for strided convolutions"
            )
        total = [r - 1 if padding == "same" else 0 for r in reach]
        sides = [side for t in total for side in (t // 2, t - t // 2)]
    else:
        height, width = _pair("padding", padding)
        if min(height, width) < 0:
            raise ValueError(
                f"conv_bias_relu: expected padding to be 0 or more, got {padding}; negative "
                "padding is not supported"
            )
        sides = [height, height, width, width]
    padded = [batch.shape[2] + sides[0] + sides[1], batch.shape[3] + sides[2] + sides[3]]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ValueError(
            "conv_bias_relu: expected a kernel that is not greater than the padded input size per "
            f"channel ({padded[0]} x {padded[1]}), got kernel size ({reach[0]} x {reach[1]})"
        )
    outputs = [(p - r) // s + 1 for p, r, s in zip(padded, reach, strides, strict=True)]
    shape = (batch.shape[0], weight.shape[0], *outputs)
    if math.prod(shape) >= _MOST_ELEMENTS or max(padded) >= _MOST_ELEMENTS:
        raise ValueError(
            "conv_bias_relu: expected a result that fits memory, got one of "
            f"{' x '.join(map(str, shape))}"
        )
    return _Geometry(strides, sides, dilations)


def _check_tensors(input: torch.Tensor, weight: object, bias: object) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"conv_bias_relu: expected {name} to be a torch.Tensor, got {type(tensor).__name__}"
            )
        if tensor.layout is not torch.strided:
            raise NotImplementedError(
                f"conv_bias_relu: expected {name} to be a dense tensor, got layout {tensor.layout}"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"conv_bias_relu: expected {name} on the device of input ({input.device}), got "
                f"{tensor.device}"
            )
        # torch would leave it out of the result without a word.
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"conv_bias_relu: expected no forward-mode derivative, got {name} with a tangent; "
                "use torch.nn.functional.conv2d(...).relu() under jvp and jacfwd"
            )
    check_device("conv_bias_relu", "input", input)


def _resolve_dtypes(
    batch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    normalization: Normalization | None,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype]:
    """Everything in the dtype in which it goes to the operator, and the output's dtype."""
    allowed = OUTPUT_DTYPE_CODES
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in allowed:
            raise TypeError(f"conv_bias_relu: expected {name} of a float dtype, got {tensor.dtype}")
    if normalization is None:
        if batch.dtype not in allowed:
            hint = "; pass normalization= for uint8 images" if batch.dtype == torch.uint8 else ""
            raise TypeError(
                f"conv_bias_relu: expected input of a float dtype, got {batch.dtype}{hint}"
            )
    elif not isinstance(normalization, Normalization):
        raise TypeError(
            "conv_bias_relu: expected normalization to be a pixfuse.Normalization, got "
            f"{type(normalization).__name__}"
        )
    elif batch.dtype is not torch.uint8:
        raise TypeError(
            "conv_bias_relu: expected input of dtype uint8 with a normalization, got "
            f"{batch.dtype}; leave normalization out for input that is normalized already"
        )
    device = batch.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
            return tensor.to(low) if eligible else tensor

        batch, weight = cast(batch), cast(weight)
        bias = None if bias is None else cast(bias)
    if normalization is None and batch.dtype is not weight.dtype:
        raise TypeError(
            "conv_bias_relu: expected input and weight of the same dtype, got input "
            f"{batch.dtype} and weight {weight.dtype}"
        )
    if bias is not None and bias.dtype is not weight.dtype:
        raise TypeError(
            "conv_bias_relu: expected weight and bias of the same dtype, got weight "
            f"{weight.dtype} and bias {bias.dtype}"
        )
    if normalization is not None and weight.dtype is torch.float64:
        raise TypeError(
            "conv_bias_relu: expected weight of dtype float32, float16 or bfloat16 with uint8 "
            "input, got torch.float64"
        )
    chosen = weight.dtype if dtype is None else dtype
    if normalization is None and chosen is not batch.dtype:
        raise TypeError(
            f"conv_bias_relu: expected dtype to be that of a float input ({batch.dtype}), got "
            f"{chosen}; convert the output"
        )
    if code_of(chosen, allowed) is None or (normalization is not None and chosen is torch.float64):
        raise TypeError(
            f"conv_bias_relu: expected dtype to be torch.float32, float16 or bfloat16, got {chosen}"
        )
    return batch, weight, bias, chosen


def _check_shapes(
    batch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: object
) -> None:
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            "conv_bias_relu: expected weight of shape (O, C / groups, kH, kW) without a 0, got "
            f"shape {tuple(weight.shape)}"
        )
    if not isinstance(groups, (int, np.integer)) or isinstance(groups, bool):
        raise TypeError(
            f"conv_bias_relu: expected groups to be an integer, got {type(groups).__name__}"
        )
    if groups < 1:
        raise ValueError(
            f"conv_bias_relu: expected groups to be 1 or more, got {groups}; non-positive groups "
            "is not supported"
        )
    outputs, group_channels = weight.shape[:2]
    if outputs % groups != 0:
        raise ValueError(
            f"conv_bias_relu: expected weight to be divisible by groups={groups} at dimension 0, "
            f"got weight of size {list(weight.shape)}"
        )
    if batch.shape[1] != group_channels * groups:
        raise ValueError(
            f"conv_bias_relu: expected input to have {group_channels * groups} channels, as given "
            f"by groups={groups} and weight of size {list(weight.shape)}, got {batch.shape[1]} "
            f"channels in (N, C, H, W) shape {tuple(batch.shape)}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(
            f"conv_bias_relu: expected bias to be 1-dimensional with {outputs} elements, as given "
            f"by weight of size {list(weight.shape)}, got bias of size {list(bias.shape)}"
        )


def _check_normalization(
    batch: torch.Tensor, normalization: Normalization, dtype: torch.dtype
) -> None:
    count = len(normalization.mean)
    # Not `in`, which cannot be traced where sizes are symbols.
    if count != 1 and count != batch.shape[1]:
        raise ValueError(
            f"conv_bias_relu: expected images of {count} channels, as the mean and std of "
            f"normalization have {count} values, got {batch.shape[1]} channels"
        )
    largest = torch.finfo(dtype).max
    if normalization.largest > largest:
        raise ValueError(
            f"conv_bias_relu: expected normalized images that fit {dtype} (up to "
            f"{largest:.6g}), got values up to {normalization.largest:.6g}; use "
            "torch.float32 or a larger std"
        )
