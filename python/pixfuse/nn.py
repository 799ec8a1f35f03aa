"""Convolution, bias and ReLU as modules that say which units fire, and a swap that puts them in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import fx, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.hooks import RemovableHandle

from pixfuse._checks import check_is_normalization
from pixfuse._firing import is_recorded
from pixfuse._fusion import (
    Fused,
    FuseReport,
    Left,
    Tracer,
    copy_that_shares_tensors,
    find,
    has_hooks,
    name_of,
    stem_of,
    trace,
)
from pixfuse._library import LAYOUT_CODES
from pixfuse.activity import UnitActivity
from pixfuse.convolution import conv_bias_relu
from pixfuse.normalization import Normalization

__all__ = ["ConvBiasReLU2d", "FuseReport", "Fused", "Left", "PixelStem", "fuse"]

Conv = TypeVar("Conv", bound=nn.Conv2d)
Pair: TypeAlias = int | tuple[int, int]
PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
ActivityHook: TypeAlias = Callable[["ConvBiasReLU2d", UnitActivity], object]


# ---- modules -------------------------------------------------------------------------------------


class ConvBiasReLU2d(nn.Conv2d):
    """Convolve, add a bias and apply ReLU in one pass, and keep which output channels fired.

    Formula: ``relu(conv2d(input, weight, bias))``, as :func:`pixfuse.conv_bias_relu` computes it.
    It stands in the place of an ``nn.Conv2d`` and the ``nn.ReLU`` behind it: it is an
    ``nn.Conv2d``, with the same parameters, state dict, initialization and attributes.

    Its activity: after each forward pass ``last_activity`` is the :class:`pixfuse.UnitActivity` of
    that batch (None before the first), and every function registered with
    :meth:`register_activity_hook` has been called with it. It is neither parameter nor buffer, is
    not in the state dict, stays on the device where it was counted, and nothing of it waits for a
    device.

    - ``torch.compile(fullgraph=True)`` takes the module whole; ``last_activity`` is set after each
      call as without it, and hooks are compiled along, so they must be functions that it can
      compile (such as ``list.append``; with dynamic shapes ``activity.positions`` may be a symbol).
    - ``torch.export`` takes it too; the exported program gives the output alone, without activity.
    - ``torch.jit.trace`` runs it, and records the output alone; ``torch.jit.script`` refuses it.
    - Every ``torch.fx`` tracer takes it as one step.
    - ``DistributedDataParallel``: each rank has the activity of its own batch, see
      :meth:`pixfuse.UnitActivity.all_reduce`. ``DataParallel`` runs copies that live for one pass:
      hooks are called by each, from its thread and with the copy; ``last_activity`` of the module
      itself stays as it was.
    - ``torch.utils.checkpoint`` may run a forward pass twice, and hooks with it.
    - ``torch.nn.utils.fuse_conv_bn_eval`` takes it for a convolution without ReLU: call it on the
      ``nn.Conv2d`` before, and :meth:`from_conv2d` on what it gives.
    - ``torch.func.vmap`` runs it for each, and leaves no activity.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one number, or height and width.
        stride: 1 or more; one number, or height and width.
        padding: on all sides: a number, or height and width, ``"valid"`` or ``"same"``.
        dilation: 1 or more; one number, or height and width.
        groups: into which input and output channels are split.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``; or ``"reflect"``, ``"replicate"`` or ``"circular"``, for which
            the input is padded first, as ``nn.Conv2d`` does it.
        device: of the parameters.
        dtype: of the parameters.
        memory_format: of the output, as :func:`pixfuse.conv_bias_relu` takes it.

    Call with:
        A float tensor (N, C, H, W) or (C, H, W) of the dtype of the parameters, or any under
        autocast.

    Returns:
        The output alone, (N, O, H', W') or (O, H', W').

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, stride, padding, dilation or group count.
        NotImplementedError: a device that has no kernel.

    Equivalent to::

        nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size), nn.ReLU())

    Source:
        ``torch.nn.Conv2d``, ``torch.nn.ReLU``.
    """

    last_activity: UnitActivity | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.memory_format = memory_format
        self.last_activity = None
        self._activity_hooks: OrderedDict[int, ActivityHook] = OrderedDict()

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the output."""
        return cast(torch.memory_format, getattr(torch, self._memory_format))

    @memory_format.setter
    def memory_format(self, value: torch.memory_format) -> None:
        # By its name: torch.save cannot pickle the value.
        self._memory_format = str(value).removeprefix("torch.")

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, *, memory_format: torch.memory_format = torch.preserve_format
    ) -> ConvBiasReLU2d:
        """Make a module that shares the parameters of an ``nn.Conv2d``, ReLU added.

        Args:
            conv: a plain ``nn.Conv2d`` without hooks, which would not come along.
            memory_format: of the output.

        Returns:
            A new module; ``conv`` is not changed.

        Raises:
            TypeError: not a plain ``nn.Conv2d``, such as a parametrized one.
            ValueError: it has hooks.
        """
        _check_is_plain_conv2d("from_conv2d", conv)
        return _sharing(conv, cls, memory_format=memory_format)

    def register_activity_hook(self, hook: ActivityHook) -> RemovableHandle:
        """Have a function called after every forward pass, with the module and its activity.

        Args:
            hook: called as ``hook(module, activity)``; what it returns is not used. It is pickled
                and deep-copied with the module, as torch's hooks are.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            TypeError: ``hook`` is not callable.
        """
        if not callable(hook):
            raise TypeError(
                f"register_activity_hook: expected hook to be callable, got {type(hook).__name__}"
            )
        handle = RemovableHandle(self._activity_hooks)
        self._activity_hooks[handle.id] = hook
        return handle

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve, add the bias, apply ReLU; see the class."""
        if _is_traced(input):
            return cast(torch.Tensor, _step_of(self, input))
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        output, activity = conv_bias_relu(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            memory_format=self.memory_format,
        )
        self._tell(activity)
        return output

    def extra_repr(self) -> str:
        """The arguments, as ``nn.Conv2d`` shows them, and what is more."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.memory_format is not torch.preserve_format:
            text += f", memory_format={self.memory_format}"
        return text

    def _tell(self, activity: UnitActivity) -> None:
        if is_recorded():
            return  # that may not change the module
        if torch._C._functorch.is_batchedtensor(activity.active):
            self.last_activity = None  # of all at once; it would not outlive vmap
            return
        self.last_activity = activity
        for hook in tuple(self._activity_hooks.values()):
            hook(self, activity)


class PixelStem(ConvBiasReLU2d):
    """Run the first convolution of a model, with bias and ReLU, straight from uint8 images.

    Formula: ``relu(conv2d(normalize(images), weight, bias))``, see :func:`pixfuse.conv_bias_relu`:
    images are normalized line by line, so the normalized batch never exists, and padding is zero in
    normalized space. It has the parameters and state dict of an ``nn.Conv2d``, so a model's
    checkpoint goes on to load. What is said of :class:`ConvBiasReLU2d` and its activity holds here.

    Args:
        in_channels: channels of the images.
        out_channels: channels of the output.
        kernel_size: one number, or height and width.
        stride: 1 or more; one number, or height and width.
        padding: zeros on all sides: a number, or height and width, ``"valid"`` or ``"same"``.
        dilation: 1 or more; one number, or height and width.
        groups: into which input and output channels are split.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``; of another one the images have to be padded before.
        device: of the parameters.
        dtype: of the parameters: float32, float16 or bfloat16.
        normalization: what a byte becomes.
        input_layout: of the images, ``"NCHW"`` or ``"NHWC"``.
        output_dtype: float32, float16 or bfloat16; default that of the parameters, or of autocast.
        memory_format: of the output, as :func:`pixfuse.conv_bias_relu` takes it.

    Call with:
        uint8 images, tensor or numpy array, (N, C, H, W) or (C, H, W), or with
        ``input_layout="NHWC"`` channels last; any strides.

    Returns:
        The output alone, (N, O, H', W') or (O, H', W').

    Raises:
        TypeError: a wrong dtype; ``normalization`` is not a Normalization.
        ValueError: a wrong shape, stride, padding, padding mode, layout or channel count.
        NotImplementedError: a device that has no kernel.

    Equivalent to::

        nn.Sequential(v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
                      nn.Conv2d(in_channels, out_channels, kernel_size), nn.ReLU())

    Source:
        torchvision ``transforms.v2.Normalize``, ``torch.nn.Conv2d``, ``torch.nn.ReLU``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalization: Normalization,
        input_layout: Literal["NCHW", "NHWC"] = "NCHW",
        output_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        check_is_normalization("PixelStem", normalization)
        count = len(normalization.mean)
        if count not in (1, in_channels):
            raise ValueError(
                f"PixelStem: expected normalization of {in_channels} channels, as in_channels "
                f"says, or of one value for all, got {count} values"
            )
        if input_layout not in LAYOUT_CODES:
            raise ValueError(
                f"PixelStem: expected input_layout to be 'NCHW' or 'NHWC', got {input_layout!r}"
            )
        if padding_mode != "zeros":
            raise ValueError(
                f"PixelStem: expected padding_mode to be 'zeros', got {padding_mode!r}; pad the "
                "images before, and use padding=0"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            memory_format=memory_format,
        )
        self.normalization = normalization
        self.input_layout = input_layout
        self.output_dtype = output_dtype

    @classmethod
    def from_conv2d(  # type: ignore[override]  # it needs a normalization
        cls,
        conv: nn.Conv2d,
        normalization: Normalization,
        *,
        input_layout: Literal["NCHW", "NHWC"] = "NCHW",
        output_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> PixelStem:
        """Make a module that shares the parameters of an ``nn.Conv2d``, for images before it.

        Args:
            conv: a plain ``nn.Conv2d`` without hooks, which would not come along.
            normalization: what a byte becomes.
            input_layout: of the images, ``"NCHW"`` or ``"NHWC"``.
            output_dtype: float32, float16 or bfloat16; default that of the parameters.
            memory_format: of the output.

        Returns:
            A new module; ``conv`` is not changed.

        Raises:
            TypeError: not a plain ``nn.Conv2d``, or not a Normalization.
            ValueError: it has hooks, another padding mode than zeros, or other channels than the
                normalization.
        """
        _check_is_plain_conv2d("from_conv2d", conv)
        return _sharing(
            conv,
            cls,
            normalization=normalization,
            input_layout=input_layout,
            output_dtype=output_dtype,
            memory_format=memory_format,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize, convolve, add the bias, apply ReLU; see the class."""
        if _is_traced(input):
            return cast(torch.Tensor, _step_of(self, input))
        output, activity = conv_bias_relu(
            input,
            self.weight,
            self.bias,
            self.stride,
            cast(Any, self.padding),
            self.dilation,
            self.groups,
            normalization=self.normalization,
            input_layout=self.input_layout,
            dtype=self.output_dtype,
            memory_format=self.memory_format,
        )
        self._tell(activity)
        return output

    def extra_repr(self) -> str:
        """The arguments, as ``nn.Conv2d`` shows them, and what is more."""
        text = f"{super().extra_repr()}, normalization={self.normalization!r}"
        if self.input_layout != "NCHW":
            text += f", input_layout={self.input_layout!r}"
        if self.output_dtype is not None:
            text += f", output_dtype={self.output_dtype}"
        return text


def _is_traced(input: object) -> bool:
    return isinstance(input, fx.Proxy)


def _step_of(module: nn.Module, input: Any) -> Any:
    """The module as one step of the graph that is being made, whoever traces."""
    tracer: fx.Tracer = input.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"{type(module).__name__}: expected to be traced as a part of a model, got traced "
            "alone; put it into an nn.Sequential"
        )
    return tracer.create_proxy("call_module", path, (input,), {})


def _sharing(conv: nn.Conv2d, cls: type[Conv], **options: Any) -> Conv:
    """A module of another class, with the arguments and the very parameters of a Conv2d."""
    module = cls(
        conv.in_channels,
        conv.out_channels,
        cast(Any, conv.kernel_size),
        cast(Any, conv.stride),
        cast(Any, conv.padding),
        cast(Any, conv.dilation),
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        "meta",  # nothing is drawn at random
        conv.weight.dtype,
        **options,
    )
    module.weight, module.bias = conv.weight, conv.bias
    return module.train(conv.training)


def _check_is_plain_conv2d(function: str, conv: object) -> None:
    if type(conv) is not nn.Conv2d:
        raise TypeError(
            f"{function}: expected conv to be a plain torch.nn.Conv2d, not a subclass of it, got "
            f"{type(conv).__name__}; remove its parametrizations, if it has some, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if has_hooks(conv):
        raise ValueError(
            f"{function}: expected conv without hooks, got {conv} with hooks, which would be lost; "
            "remove them, and register them on the new module"
        )


# ---- the swap ------------------------------------------------------------------------------------


def fuse(
    model: nn.Module,
    *,
    normalization: Normalization | None = None,
    input_layout: Literal["NCHW", "NHWC"] = "NCHW",
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    concrete_args: Mapping[str, Any] | None = None,
) -> tuple[fx.GraphModule, FuseReport]:
    """Put a :class:`ConvBiasReLU2d` in the place of each Conv2d with a ReLU behind it.

    ``nn.Conv2d`` followed by a ReLU (module, ``torch.relu``, ``F.relu``, ``Tensor.relu``, in place
    or not) becomes one step, and so does ``nn.Conv2d``, ``nn.BatchNorm2d`` in eval mode, and ReLU,
    whose constants are folded into new parameters: ``weight * s`` and
    ``(bias - running_mean) * s + beta`` with ``s = gamma / sqrt(running_var + eps)``, in float64
    and rounded once. This is done only where nothing else uses what lies between them, and neither
    has hooks, parametrizations, or another function in the place of its ``forward``. Hooks of a
    :class:`pixfuse.DeadUnitMonitor` are no hindrance; it does not watch the fused model.

    The model is not changed. The fused one shares its parameters and buffers, except those that
    were folded, but no module: what is left is copied, so each has a mode (train or eval) of its
    own. Names, and so the keys of the state dict, stay; of a folded BatchNorm2d those of the
    convolution stay, with a bias. It is a ``torch.fx.GraphModule``, of which only the forward pass
    is kept: modules in between are plain ones without methods; what Python decides in a ``forward``
    (branches, ``self.training``) is decided as it was on this call; and a folded batch
    normalization stays in eval mode for ever.

    Args:
        model: what ``torch.fx`` can trace, and ``copy.deepcopy`` copy. Fuse before wrapping it in
            DistributedDataParallel or ``torch.compile``.
        normalization: with one, the fused model takes uint8 images: the convolution that takes the
            model's first input becomes a :class:`PixelStem`.
        input_layout: of those images, ``"NCHW"`` or ``"NHWC"``.
        leaf_modules: classes, or names in the model, of modules that are kept whole, besides the
            layers of torch.nn, classes derived from them, and modules with hooks.
        concrete_args: values of arguments of ``forward`` that Python decides upon, such as
            ``{"mask": None}``; they are fixed in the fused model.

    Returns:
        The fused model, and a :class:`FuseReport` on every convolution.

    Raises:
        TypeError: ``model`` is not a module, or is one that wraps the model to fuse.
        ValueError: it cannot be traced or copied, has steps under ``no_grad`` or ``autocast`` of
            its own, which ``torch.fx`` leaves out, or hooks of its own, which would be lost; with a
            ``normalization``, its input does not go to one convolution that is fused.

    Equivalent to (the output of the fused model, within rounding)::

        model(input)

    Source:
        ``torch.fx``; ``torch.nn.utils.fuse_conv_bn_eval``.
    """
    _check_model(model)
    if normalization is not None:
        check_is_normalization("fuse", normalization)
    if input_layout not in LAYOUT_CODES:
        raise ValueError(
            f"fuse: expected input_layout to be 'NCHW' or 'NHWC', got {input_layout!r}"
        )
    root = copy_that_shares_tensors(model)
    if has_hooks(root):
        raise ValueError(
            f"fuse: expected a model without hooks of its own, got {type(model).__name__} with "
            "some; remove them, and register them on the fused model"
        )
    tracer = Tracer(leaf_modules)
    graph = trace(root, tracer, concrete_args)
    modules = dict(root.named_modules())
    found = dict(find(root, graph, tracer))
    stem = None
    if normalization is not None:
        stem = stem_of(root, graph, found)
    fused: list[Fused] = []
    left: list[Left] = []
    folded: set[str] = set()
    for name, match in found.items():
        if isinstance(match, str):
            left.append(Left(name, match))
            continue
        conv = cast(nn.Conv2d, modules[name])
        batch_norm = None if match[0].batch_norm is None else str(match[0].batch_norm.target)
        if batch_norm is not None:
            folded.add(batch_norm)
            conv = _with_batch_norm(conv, cast(nn.BatchNorm2d, modules[batch_norm]))
        if normalization is not None and name == stem:
            module: ConvBiasReLU2d = PixelStem.from_conv2d(
                conv, normalization, input_layout=input_layout
            )
        else:
            module = ConvBiasReLU2d.from_conv2d(conv)
        root.set_submodule(name, module)
        fused.append(Fused(name, batch_norm, name_of(match[0].relu), type(module).__name__))
        for call in match:
            call.relu.replace_all_uses_with(call.conv)
            graph.erase_node(call.relu)
            if call.batch_norm is not None:
                graph.erase_node(call.batch_norm)
    graph.lint()
    result = fx.GraphModule(root, graph, type(model).__name__)
    keys = model.state_dict().keys()
    _keep_out_of_state_dict(result, keys)
    missing = keys - result.state_dict().keys()
    unused = [k for k in keys if k in missing and k.rpartition(".")[0] not in folded]
    return result, FuseReport(tuple(fused), tuple(left), tuple(unused))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "fuse: expected model to be a torch.nn.Module, not scripted, got "
            f"{type(model).__name__}"
        )
    wrapped = {"_orig_mod"} & model._modules.keys()  # by torch.compile
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        wrapped = {"module"}
    for attribute in wrapped:
        raise TypeError(
            f"fuse: expected the model itself, got a {type(model).__name__} of it; fuse "
            f"model.{attribute}, and wrap the result"
        )


def _with_batch_norm(conv: nn.Conv2d, batch_norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution with new parameters that does what both do."""
    constants = (
        conv.weight,
        conv.bias,
        batch_norm.running_mean,
        batch_norm.running_var,
        batch_norm.weight,
        batch_norm.bias,
    )
    weight, bias, mean, var, gamma, beta = (
        cast(Any, None if tensor is None else tensor.detach().double()) for tensor in constants
    )
    folded = fuse_conv_bn_weights(weight, bias, mean, var, batch_norm.eps, gamma, beta)
    new: nn.Conv2d = _sharing(conv, nn.Conv2d)
    new.weight, new.bias = (
        nn.Parameter(exact.detach().to(conv.weight.dtype), conv.weight.requires_grad)
        for exact in folded
    )
    return new


def _keep_out_of_state_dict(model: fx.GraphModule, keys: Any) -> None:
    """Buffers that the state dict did not have: torch.fx registers them as persistent ones."""
    for name, _ in model.named_buffers():
        if name not in keys:
            owner, _, field = name.rpartition(".")
            model.get_submodule(owner)._non_persistent_buffers_set.add(field)
