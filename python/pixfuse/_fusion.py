"""How `pixfuse.nn.fuse` finds what it can fuse in the graph of a model, and what it reports."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import fx, nn
from torch.nn.functional import conv2d, relu

from pixfuse._convolution_autograd import OUTPUT_DTYPE_CODES
from pixfuse.monitor import MonitorHook

# ---- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """A convolution that became one step with what stands behind it.

    Args:
        name: of the convolution in the model.
        batch_norm: name of the batch normalization that was folded into it, or None.
        relu: name of the ReLU, a module or a step of the graph.
        into: class of what stands there now.
    """

    name: str
    batch_norm: str | None
    relu: str
    into: str


@dataclass(frozen=True)
class Left:
    """A convolution that stayed as it was.

    Args:
        name: of the convolution in the model.
        reason: why it stayed.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse` did with each ``nn.Conv2d`` of a model; ``print`` shows it as a table.

    Args:
        fused: what became one step, in the order of the model.
        left: what stayed, and why. Every convolution is in one of the two.
        unused: keys of the model's state dict that the fused model does not have, because the
            forward pass does not use them (or knows them by another name). What was folded is not
            listed.
    """

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.fused) + len(self.left)
        rows = [("convolution", f"{len(self.fused)} of {total} fused")]
        for step in self.fused:
            behind = [name for name in (step.batch_norm, step.relu) if name is not None]
            rows.append((step.name, f"{step.into}, with {' and '.join(behind)}"))
        rows += [(step.name, f"left: {step.reason}") for step in self.left]
        rows += [(key, "not in the fused model: not used") for key in self.unused]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


# ---- the copy and its graph ----------------------------------------------------------------------

_CALL_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_HOOKS: Final = (
    *_CALL_HOOKS,
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


_NOT_LAYERS: Final = ("torch.nn.modules.module", "torch.nn.modules.container")


def has_hooks(module: nn.Module, kinds: tuple[str, ...] = _HOOKS) -> bool:
    return any(getattr(module, kind) for kind in kinds)


def forward_is_its_own(module: nn.Module) -> bool:
    """Whether somebody put another function in the place of this module's ``forward``."""
    return "forward" in vars(module)


def copy_that_shares_tensors(model: nn.Module) -> nn.Module:
    """New modules with the same parameters, buffers, and other tensors that they hold.

    Without hooks of a DeadUnitMonitor, which do nothing in a copy.
    """
    tensors = [
        tensor
        for module in model.modules()
        for held in (module._parameters, module._buffers, vars(module))
        for tensor in held.values()
        if isinstance(tensor, torch.Tensor)
    ]
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise ValueError(
            f"fuse: expected a model that copy.deepcopy can copy, got {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    for module in copied.modules():
        for kind in _CALL_HOOKS:
            hooks = getattr(module, kind)
            for key in [key for key, hook in hooks.items() if isinstance(hook, MonitorHook)]:
                del hooks[key]
    return copied


class Tracer(fx.Tracer):
    """Keeps modules with hooks whole, whose hooks are not for tracing; knows where it is."""

    #: Else what is computed of buffers alone would be computed once and for all.
    proxy_buffer_attributes = True

    def __init__(self, leaf_modules: Sequence[type[nn.Module] | str] = ()) -> None:
        super().__init__()
        self.leaf_classes = tuple(leaf for leaf in leaf_modules if isinstance(leaf, type))
        self.leaf_names = {leaf for leaf in leaf_modules if isinstance(leaf, str)}
        self.inside: list[tuple[str, str]] = []
        self.modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise RuntimeError("a step under no_grad or autocast, which torch.fx would leave out")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.why_leaf(m, module_qualified_name) is not None

    def why_leaf(self, m: nn.Module, name: str) -> str | None:
        if isinstance(m, self.leaf_classes) or name in self.leaf_names:
            return "is among leaf_modules"
        if has_hooks(m, _CALL_HOOKS):
            return "has hooks"
        if super().is_leaf_module(m, name):
            return "is a module of torch"
        # Its forward may be another one, and is of no use in pieces.
        kinds = (base for base in type(m).__mro__ if base.__module__.startswith("torch.nn.modules"))
        base = next((k for k in kinds if k.__module__ not in _NOT_LAYERS), None)
        return None if base is None else f"is a kind of {base.__name__}"

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):  # one step, of whatever calls it
            return super().call_module(m, forward, args, kwargs)
        self.inside.append((path, type(m).__name__))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not after an error: it says where
        return result


def _modes() -> tuple[Any, ...]:
    """What a forward may set around steps, and a graph does not keep."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
    )


def trace(root: nn.Module, tracer: Tracer, concrete_args: Mapping[str, Any] | None) -> fx.Graph:
    """The steps of a model, without those that do nothing."""
    names = {name for name, _ in root.named_modules()}
    unknown = sorted(tracer.leaf_names - names)
    if unknown:
        raise ValueError(
            "fuse: expected leaf_modules to be classes, or names of modules in the model, got "
            f"{unknown[0]!r}"
        )
    try:
        graph = tracer.trace(root, None if concrete_args is None else dict(concrete_args))
    except Exception as error:
        name, kind = tracer.inside[-1] if tracer.inside else ("", type(root).__name__)
        where = f"module '{name}' of class {kind}" if name else f"its own forward ({kind})"
        raise ValueError(
            f"fuse: expected a model that torch.fx can trace, got {type(root).__name__}: in "
            f"{where}: {type(error).__name__}: {error}; keep that module whole with leaf_modules, "
            "give what Python decides upon as concrete_args, or fuse the parts that can be traced "
            "one by one, such as model.features, report = fuse(model.features)"
        ) from error
    modules = dict(root.named_modules())
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 1:
            module = modules[node.target]
            plain = not has_hooks(module) and not forward_is_its_own(module)
            if type(module) is nn.Identity and plain:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
    return graph


# ---- finding -------------------------------------------------------------------------------------

_RELU_FUNCTIONS: Final = (relu, torch.relu, torch.relu_)
_RELU_METHODS: Final = ("relu", "relu_")


@dataclass(frozen=True)
class Call:
    """One call of a convolution, and what comes behind it."""

    conv: fx.Node
    batch_norm: fx.Node | None
    relu: fx.Node


def find(
    root: nn.Module, graph: fx.Graph, tracer: Tracer
) -> Iterator[tuple[str, list[Call] | str]]:
    """Of every convolution the calls to fuse, or why it is left."""
    modules = dict(root.named_modules(remove_duplicate=False))
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    calls: dict[str, list[fx.Node]] = {}
    taken = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, module in root.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        whole = _owner_kept_whole(names[module], modules, tracer)
        match = whole or _match(module, calls.get(name, []), modules)
        folds = not isinstance(match, str) and match[0].batch_norm is not None
        if folds and taken & {f"{name}.weight", f"{name}.bias"}:
            match = "has parameters that are used elsewhere, so no BatchNorm2d is folded into them"
        yield name, match
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (conv2d, torch.conv2d):
            yield f"{node.name}()", "a call of conv2d, not a module"


def _owner_kept_whole(
    names: list[str], modules: dict[str, nn.Module], tracer: Tracer
) -> str | None:
    """Why a convolution is out of reach: its owner calls it, by one of its names."""
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            owner = ".".join(parts[:end])
            why = tracer.why_leaf(modules[owner], owner)
            if why is not None:
                return f"inside {owner}, which is kept whole: it {why}"
    return None


def _match(
    conv: nn.Conv2d, nodes: list[fx.Node], modules: dict[str, nn.Module]
) -> list[Call] | str:
    if not nodes:
        return "not called in the forward pass"
    if nn.utils.parametrize.is_parametrized(conv):
        return "has parametrizations"
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__name__}, which does more than Conv2d"
    if has_hooks(conv):
        return "has hooks"
    if forward_is_its_own(conv):
        return "has a forward of its own"
    if {"weight", "bias"} & vars(conv).keys():
        return "has a weight or bias that is not a parameter"
    if conv.weight.dtype not in OUTPUT_DTYPE_CODES:
        return f"has weights of dtype {conv.weight.dtype}"
    calls = [_follow(node, modules) for node in nodes]
    for call in calls:
        if isinstance(call, str):
            return call if len(calls) == 1 else f"called {len(calls)} times, and once it is {call}"
    found = cast(list[Call], calls)
    if len({None if c.batch_norm is None else c.batch_norm.target for c in found}) > 1:
        return f"called {len(found)} times, with different batch normalizations behind it"
    return found


def _follow(conv: fx.Node, modules: dict[str, nn.Module]) -> Call | str:
    behind = _only_user(conv)
    if isinstance(behind, str):
        return behind
    batch_norm = None
    if behind.op == "call_module" and type(modules[str(behind.target)]) is nn.BatchNorm2d:
        batch_norm = behind
        problem = _why_not_folded(str(behind.target), modules)
        if problem is not None:
            return problem
        behind = _only_user(batch_norm)
        if isinstance(behind, str):
            return f"followed by {batch_norm.target}, which is {behind}"
    if not _is_relu(behind, modules):
        after = "" if batch_norm is None else f"{batch_norm.target} and "
        return f"followed by {after}{_describe(behind, modules)}, not by a ReLU"
    if behind.op == "call_module":
        problem = _why_not_as_its_class(str(behind.target), modules)
        if problem is not None:
            return problem
    return Call(conv, batch_norm, behind)


def _only_user(node: fx.Node) -> fx.Node | str:
    users = list(node.users)
    if not users:
        return "followed by nothing"
    if len(users) > 1:
        return f"followed by {len(users)} steps that use its output"
    if users[0].op == "output":
        return "followed by the end of the model"
    return users[0]


def _why_not_folded(name: str, modules: dict[str, nn.Module]) -> str | None:
    batch_norm = cast(nn.BatchNorm2d, modules[name])
    if batch_norm.training:
        return f"followed by {name}, a BatchNorm2d in training mode; call model.eval() before"
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        return f"followed by {name}, a BatchNorm2d without running statistics"
    return _why_not_as_its_class(name, modules)


def _why_not_as_its_class(name: str, modules: dict[str, nn.Module]) -> str | None:
    if has_hooks(modules[name]):
        return f"followed by {name}, which has hooks"
    if forward_is_its_own(modules[name]):
        return f"followed by {name}, which has a forward of its own"
    return None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    if node.op == "call_method":
        return node.target in _RELU_METHODS
    return node.op == "call_function" and node.target in _RELU_FUNCTIONS


def name_of(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target}, a {type(modules[str(node.target)]).__name__}"
    return f"the step {getattr(node.target, '__name__', node.target)}"


def stem_of(root: nn.Module, graph: fx.Graph, found: Mapping[str, list[Call] | str]) -> str:
    """The name of the convolution that takes the model's first input."""
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    expected = "fuse: expected the model's first input to go to one Conv2d that is fused, with a "
    if first is None:
        raise ValueError(f"{expected}normalization, got a model without inputs")
    users = list(first.users)
    if len(users) != 1 or users[0].op != "call_module":
        steps = ", ".join(name_of(user) for user in users) or "nothing"
        raise ValueError(f"{expected}normalization, got an input that goes to {steps}")
    name = str(users[0].target)
    match = found.get(name, "is not a Conv2d")
    if isinstance(match, str):
        raise ValueError(f"{expected}normalization, got {name}: {match}")
    if cast(nn.Conv2d, root.get_submodule(name)).weight.dtype is torch.float64:
        raise ValueError(
            f"{expected}normalization, got {name} of float64; call model.float() before"
        )
    if len(match) > 1:
        raise ValueError(f"{expected}normalization, got {name}: called {len(match)} times")
    return name
