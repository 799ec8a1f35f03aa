"""`pixfuse.nn`: drop-ins that keep their activity, and a swap that changes no result."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, weight_norm

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from pixfuse import UnitActivity, _fusion
from pixfuse.nn import ConvBiasReLU2d, FuseReport, PixelStem, fuse
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.processes import python

FORMATS = (torch.contiguous_format, torch.channels_last)
INPUT = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from that of torch's own modules, of the largest one there."""

    of_largest: float
    reason: str


# In float32 a quarter of each, or less, was measured.
TOLERANCES = {
    "one layer": Tolerance(2e-6, "the taps are summed up in another order"),
    "bfloat16": Tolerance(2.0**-7, "one in the last of 8 bits, where sums are near a tie"),
    "float16": Tolerance(2.0**-10, "one in the last of 11 bits, where sums are near a tie"),
    "network": Tolerance(4e-6, "other orders, layer upon layer"),
    "gradients": Tolerance(2e-4, "other orders, and a mask that differs where an output is near 0"),
    "tf32": Tolerance(2.0**-8, "on GPUs factors are rounded to 11 bits where torch allows it"),
    "folded": Tolerance(5e-6, "batch norm's constants are rounded into the weights"),
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, kind: str) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    tolerance = TOLERANCES[kind]
    largest = theirs.abs().max().item() if theirs.numel() else 0.0
    error = (ours.double() - theirs.double()).abs().max().item() if theirs.numel() else 0.0
    assert error <= tolerance.of_largest * largest, f"{kind}: off by {error} of {largest}"


def assert_activity_of(activity: UnitActivity | None, output: torch.Tensor) -> None:
    assert activity is not None
    batch = output if output.dim() == 4 else output[None]
    assert torch.equal(activity.active, (batch > 0).sum((0, 2, 3)))
    assert torch.equal(activity.active_images, (batch > 0).flatten(2).any(2).sum(0))
    assert activity.positions == batch.shape[0] * batch.shape[2] * batch.shape[3]
    assert activity.images == batch.shape[0]


def assert_same_activity(a: UnitActivity | None, b: UnitActivity | None) -> None:
    assert a is not None
    assert b is not None
    for mine, other in zip(astuple(a), astuple(b), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))


def gradients(model: nn.Module, input: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that weights every output otherwise: those of the parameters, and of the input."""
    model.zero_grad(set_to_none=True)
    leaf = input.clone().requires_grad_(input.is_floating_point())
    output = model(leaf)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if leaf.grad is not None:
        found["input"] = leaf.grad
    model.zero_grad(set_to_none=True)
    return found


# --- a drop-in ---

ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 3, "out_channels": 8, "kernel_size": 3},
    "all": {
        "in_channels": 6,
        "out_channels": 8,
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": (1, 2),
        "groups": 2,
        "bias": False,
    },
    "depthwise": {"in_channels": 8, "out_channels": 16, "kernel_size": 3, "groups": 8},
    "same": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "same"},
    "valid": {"in_channels": 5, "out_channels": 4, "kernel_size": 3, "padding": "valid"},
    **{
        mode: {
            "in_channels": 3,
            "out_channels": 4,
            "kernel_size": (3, 5),
            "padding": (1, 3),
            "padding_mode": mode,
        }
        for mode in ("reflect", "replicate", "circular")
    },
    "reflect, same": {
        "in_channels": 8,
        "out_channels": 4,
        "kernel_size": (5, 3),
        "padding": "same",
        "padding_mode": "reflect",
    },
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_is_a_conv2d_with_relu(name: str) -> None:
    arguments = ARGUMENTS[name]
    torch.manual_seed(3)
    conv = nn.Conv2d(**arguments)
    torch.manual_seed(3)
    ours = ConvBiasReLU2d(**arguments)
    assert isinstance(ours, nn.Conv2d)
    assert list(ours.state_dict()) == list(conv.state_dict())
    for mine, theirs in zip(ours.parameters(), conv.parameters(), strict=True):
        assert_same_bits(mine.data, theirs.data)
    assert repr(ours) == repr(conv).replace("Conv2d", "ConvBiasReLU2d")
    batch = torch.randn(2, conv.in_channels, 9, 11)
    for input in (batch, batch[0], batch.contiguous(memory_format=torch.channels_last)):
        output = ours(input)
        assert_close(output, conv(input).relu(), "one layer")
        assert_activity_of(ours.last_activity, output)
    expected = gradients(nn.Sequential(conv, nn.ReLU()), batch)
    found = gradients(nn.Sequential(ours), batch)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert_close(gradient, expected[key], "gradients")


def test_checkpoints_go_both_ways() -> None:
    conv, ours = nn.Conv2d(3, 8, 3), ConvBiasReLU2d(3, 8, 3)
    ours.load_state_dict(conv.state_dict())
    assert_same_bits(ours.weight.data, conv.weight.data)
    other = nn.Conv2d(3, 8, 3)
    other.load_state_dict(ours.state_dict())
    assert other.bias is not None
    assert conv.bias is not None
    assert_same_bits(other.bias.data, conv.bias.data)


def test_from_conv2d_shares_the_parameters() -> None:
    for arguments in ARGUMENTS.values():
        conv = nn.Conv2d(**arguments).eval()
        state = torch.get_rng_state()
        ours = ConvBiasReLU2d.from_conv2d(conv)
        assert torch.equal(torch.get_rng_state(), state), "it draws random numbers"
        assert ours.weight is conv.weight
        assert ours.bias is conv.bias
        assert not ours.training
        assert repr(ours) == repr(conv).replace("Conv2d", "ConvBiasReLU2d")
        input = torch.randn(2, conv.in_channels, 9, 11)
        assert_close(ours(input), conv(input).relu(), "one layer")


def hooked() -> nn.Conv2d:
    conv = nn.Conv2d(3, 8, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("conv", "error", "message"),
    [
        (nn.Linear(3, 8), TypeError, r"a plain torch.nn.Conv2d, .*, got Linear"),
        (
            parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
            TypeError,
            r"a plain .*, got ParametrizedConv2d; remove its parametrizations",
        ),
        (ConvBiasReLU2d(3, 8, 3), TypeError, r"a plain .*, got ConvBiasReLU2d"),
        (hooked(), ValueError, r"without hooks, got Conv2d\(3, 8, .*\) with hooks, which would be"),
    ],
)
def test_what_has_no_drop_in(conv: Any, error: type[Exception], message: str) -> None:
    words = f"^from_conv2d: expected conv (to be )?{message}"
    with pytest.raises(error, match=words):
        ConvBiasReLU2d.from_conv2d(conv)
    with pytest.raises(error, match=words):
        PixelStem.from_conv2d(conv, pixfuse.UNIT)


def test_memory_formats() -> None:
    input = torch.randn(2, 8, 9, 11)
    conv = nn.Conv2d(8, 4, 3)
    for given, weights in ((i, w) for i in FORMATS for w in FORMATS):
        theirs = cast(Any, copy.deepcopy(conv)).to(memory_format=weights)
        ours = cast(Any, ConvBiasReLU2d.from_conv2d(conv)).to(memory_format=weights)
        expected = theirs(input.contiguous(memory_format=given)).relu()
        assert ours(input.contiguous(memory_format=given)).stride() == expected.stride()
        for chosen in FORMATS:
            fixed = ConvBiasReLU2d.from_conv2d(conv, memory_format=chosen)
            output = fixed(input.contiguous(memory_format=given))
            assert output.is_contiguous(memory_format=chosen)
    assert repr(fixed).endswith("memory_format=torch.channels_last)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    conv = nn.Conv2d(3, 16, 3)
    ours = ConvBiasReLU2d.from_conv2d(copy.deepcopy(conv))
    stem = PixelStem.from_conv2d(copy.deepcopy(conv), pixfuse.IMAGENET)
    images = random_bytes(2, 3, 9, 9)
    input = pixfuse.normalize(images, pixfuse.IMAGENET)
    with torch.autocast("cpu", dtype):
        expected = conv(input).relu()
        assert expected.dtype is dtype
        assert_close(ours(input), expected, name)
        assert_close(stem(images), expected, name)
    cast_conv = copy.deepcopy(conv).to(dtype)
    expected = cast_conv(input.to(dtype)).relu()
    assert_close(ours.to(dtype)(input.to(dtype)), expected, name)
    assert_close(stem.to(dtype)(images), expected, name)
    assert_activity_of(ours.last_activity, ours(input.to(dtype)))


# --- the stem ---


def test_a_stem_is_normalize_and_conv2d_and_relu() -> None:
    for arguments in ({"stride": 2, "padding": 3}, {"padding": "same"}, {"dilation": 2}):
        torch.manual_seed(4)
        conv = nn.Conv2d(3, 16, 7, **cast(Any, arguments))
        torch.manual_seed(4)
        stem = PixelStem(3, 16, 7, **cast(Any, arguments), normalization=pixfuse.IMAGENET)
        assert list(stem.state_dict()) == list(conv.state_dict())
        assert_same_bits(stem.weight.data, conv.weight.data)
        images = random_bytes(2, 3, 25, 27)
        input = pixfuse.normalize(images, pixfuse.IMAGENET)
        assert_close(stem(images), conv(input).relu(), "one layer")
        assert_activity_of(stem.last_activity, stem(images))
        assert_close(stem(images[0]), conv(input[:1]).relu()[0], "one layer")
        nhwc = images.permute(0, 2, 3, 1).contiguous()
        other = PixelStem.from_conv2d(conv, pixfuse.IMAGENET, input_layout="NHWC")
        assert other.weight is conv.weight
        assert_close(other(nhwc), conv(input).relu(), "one layer")
        assert_same_bits(other(nhwc.numpy()), other(nhwc))
        assert_same_bits(other(nhwc[0].numpy()), other(nhwc[:1])[0])
        expected = gradients(nn.Sequential(conv, nn.ReLU()), input)
        del expected["input"]
        found = gradients(nn.Sequential(stem), images)
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            assert_close(gradient, expected[key], "gradients")


def test_a_stem_says_what_it_is() -> None:
    stem = PixelStem(
        1,
        4,
        3,
        bias=False,
        normalization=pixfuse.MNIST,
        input_layout="NHWC",
        output_dtype=torch.bfloat16,
        memory_format=torch.channels_last,
    )
    assert repr(stem) == (
        "PixelStem(1, 4, kernel_size=(3, 3), stride=(1, 1), bias=False, "
        "memory_format=torch.channels_last, normalization=Normalization(mean=(0.1307,), "
        "std=(0.3081,), rounding='torchvision'), input_layout='NHWC', output_dtype=torch.bfloat16)"
    )
    output = stem(random_bytes(2, 9, 9, 1))
    assert output.dtype is torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)


BAD_STEMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number": (
        {"normalization": 0.5},
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got float",
    ),
    "channels": (
        {"normalization": pixfuse.Normalization([0, 0], 1)},
        ValueError,
        r"expected normalization of 3 channels, .*, or of one value for all, got 2 values",
    ),
    "layout": (
        {"input_layout": "HWC"},
        ValueError,
        r"expected input_layout to be 'NCHW' or 'NHWC', got 'HWC'",
    ),
    "padding": (
        {"padding": 1, "padding_mode": "reflect"},
        ValueError,
        r"expected padding_mode to be 'zeros', got 'reflect'; pad the images before",
    ),
}


@pytest.mark.parametrize("case", BAD_STEMS)
def test_bad_stems(case: str) -> None:
    changed, error, message = BAD_STEMS[case]
    with pytest.raises(error, match=f"^PixelStem: {message}"):
        PixelStem(3, 8, 3, **{"normalization": pixfuse.UNIT, **changed})


# --- activity ---


def test_activity_is_kept_and_told() -> None:
    assert ConvBiasReLU2d(3, 8, 3).last_activity is None
    module = ConvBiasReLU2d(3, 8, 3)
    told: list[tuple[str, nn.Module, UnitActivity]] = []
    first = module.register_activity_hook(lambda m, a: told.append(("first", m, a)))
    second = module.register_activity_hook(lambda m, a: told.append(("second", m, a)))
    with torch.no_grad():
        output = module(torch.randn(2, 3, 9, 9))
    assert [name for name, _, _ in told] == ["first", "second"]
    assert all(m is module and a is module.last_activity for _, m, a in told)
    assert_activity_of(module.last_activity, output)
    first.remove()
    module(torch.randn(1, 3, 9, 9))
    assert [name for name, _, _ in told] == ["first", "second", "second"]
    assert told[2][2] is module.last_activity
    assert told[2][2] is not told[1][2]
    second.remove()
    module.register_activity_hook(lambda m, _: handle.remove())
    handle = module.register_activity_hook(lambda m, a: told.append(("third", m, a)))
    for _ in range(2):  # a hook may remove one: it is called once more
        module(torch.randn(1, 3, 9, 9))
    assert [name for name, _, _ in told[3:]] == ["third"]
    with pytest.raises(
        TypeError, match=r"^register_activity_hook: expected hook to be callable, got list"
    ):
        module.register_activity_hook(cast(Any, []))


def test_activity_is_no_state() -> None:
    module = ConvBiasReLU2d(3, 8, 3)
    module(INPUT)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert not list(module.buffers())
    assert module.last_activity is not None
    assert not module.last_activity.output_sum.requires_grad
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_activity(again.last_activity, module.last_activity)
        assert again.last_activity is not module.last_activity
        assert_same_bits(again(INPUT), module(INPUT))
    stem = PixelStem(3, 8, 3, normalization=pixfuse.CLIP, input_layout="NHWC")
    stem.register_activity_hook(note_to_itself)
    for new in (copy.deepcopy(stem), pickle.loads(pickle.dumps(stem))):
        images = random_bytes(2, 9, 9, 3)
        assert_same_bits(new(images), stem(images))
        assert new.noted is new.last_activity, "hooks go with it"
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    module.load_state_dict(torch.load(saved, weights_only=True))
    for memory_format in (*FORMATS, torch.preserve_format):
        module = ConvBiasReLU2d(3, 8, 3, memory_format=memory_format)
        whole = through_a_file(module)
        assert whole.memory_format is memory_format
        assert_same_bits(whole(INPUT), module(INPUT))


def through_a_file(module: nn.Module) -> Any:
    """As torch.save and torch.load take a whole module."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def note_to_itself(module: Any, activity: UnitActivity) -> None:
    module.noted = activity


def test_data_parallel_copies_tell_the_same_hooks() -> None:
    """What DataParallel does on each device, without one."""
    module = ConvBiasReLU2d(3, 8, 3)
    told: list[tuple[nn.Module, UnitActivity]] = []
    module.register_activity_hook(lambda m, a: told.append((m, a)))
    copies = [cast(Any, module)._replicate_for_data_parallel() for _ in range(2)]
    for one in copies:
        one.weight, one.bias = module.weight, module.bias
    parts = [torch.randn(count, 3, 9, 9) for count in (2, 1)]
    outputs = [one(part) for one, part in zip(copies, parts, strict=True)]
    assert module.last_activity is None
    assert [m for m, _ in told] == copies
    total = told[0][1] + told[1][1]
    assert_activity_of(total, torch.cat(outputs))
    whole = nn.DataParallel(module)  # no devices: the module itself
    output = whole(parts[0])
    assert_activity_of(module.last_activity, output)


# --- compilers ---


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(backend: str, dynamic: bool | None) -> None:
    model = nn.Sequential(ConvBiasReLU2d(3, 8, 3, padding=1), ConvBiasReLU2d(8, 4, 3))
    eager = copy.deepcopy(model)
    told: list[UnitActivity] = []
    layer = cast(ConvBiasReLU2d, model[0])
    layer.register_activity_hook(lambda _, activity: told.append(activity))
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for count in (2, 2, 3):
        input = torch.randn(count, 3, 8, 9)
        output = run(input)
        expected = eager(input)
        torch.testing.assert_close(output, expected)
        for ours, theirs in zip(model, eager, strict=True):
            assert_same_activity(cast(Any, ours).last_activity, cast(Any, theirs).last_activity)
        assert_same_activity(told[-1], layer.last_activity)
        output.square().sum().backward()
        expected.square().sum().backward()
    assert len(told) == 3
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_stem() -> None:
    stem = PixelStem(3, 8, 3, normalization=pixfuse.IMAGENET, input_layout="NHWC")
    images = random_bytes(2, 9, 9, 3)
    expected = stem(images)
    stem.last_activity = None
    assert_same_bits(torch.compile(stem, backend="aot_eager", fullgraph=True)(images), expected)
    assert_activity_of(stem.last_activity, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    for module, input in (
        (ConvBiasReLU2d(3, 8, 3, padding=1, padding_mode="circular"), INPUT),
        (PixelStem(3, 8, 3, normalization=pixfuse.UNIT), random_bytes(2, 3, 9, 9)),
    ):
        module.register_activity_hook(note_to_itself)
        program = torch.export.export(module, (input,), strict=strict)
        assert module.last_activity is None
        assert not hasattr(module, "noted")
        assert_same_bits(program.module()(input), module(input))


def test_checkpointing_runs_a_layer_twice() -> None:
    module = ConvBiasReLU2d(3, 8, 3)
    told: list[UnitActivity] = []
    module.register_activity_hook(lambda _, activity: told.append(activity))
    both = nn.Sequential(module, nn.Conv2d(8, 2, 3))  # it stops where it has what it needs
    torch.utils.checkpoint.checkpoint(both, INPUT, use_reentrant=False).sum().backward()
    assert len(told) == 2
    assert_same_activity(*told)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of every size
def test_torch_jit() -> None:
    module = ConvBiasReLU2d(3, 8, 3)
    input = torch.randn(2, 3, 9, 9)
    traced = torch.jit.trace(module, (input,), check_trace=False)  # which runs it once more
    assert module.last_activity is None
    other = torch.randn(2, 3, 9, 9)
    assert_same_bits(traced(other), module(other))
    with pytest.raises((ValueError, RuntimeError)):
        torch.jit.script(module)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_leaves_no_activity() -> None:
    modules = [ConvBiasReLU2d(3, 8, 3) for _ in range(2)]
    input = torch.randn(2, 3, 9, 9)
    modules[0](input)
    parameters, _ = torch.func.stack_module_state(cast(Any, modules))

    def run(values: Any) -> torch.Tensor:
        return cast(torch.Tensor, torch.func.functional_call(modules[0], values, (input,)))

    outputs = torch.func.vmap(run)(parameters)
    assert modules[0].last_activity is None
    for output, module in zip(outputs, modules, strict=True):
        assert_same_bits(output, module(input))


def test_any_tracer_takes_it_as_one_step() -> None:
    model = nn.Sequential(
        PixelStem(3, 8, 3, normalization=pixfuse.UNIT), nn.Sequential(ConvBiasReLU2d(8, 4, 3))
    )
    traced = fx.symbolic_trace(model)
    steps = [(node.op, node.target) for node in traced.graph.nodes]
    assert steps[1:3] == [("call_module", "0"), ("call_module", "1.0")]
    images = random_bytes(2, 3, 9, 9)
    assert_same_bits(traced(images), model(images))
    with pytest.raises(
        TypeError, match=r"^ConvBiasReLU2d: expected to be traced as a part of a model, got traced"
    ):
        fx.symbolic_trace(ConvBiasReLU2d(3, 4, 3))


# --- the swap: whole networks ---


def initialized(model: nn.Module) -> nn.Module:
    """Weights under which no layer is dead, and batch norms that change something."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(cast(Any, module.running_mean), std=0.2)
            nn.init.uniform_(cast(Any, module.running_var), 0.5, 2.0)
            cast(Any, module.num_batches_tracked).zero_()
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(cast(Any, module.bias), std=0.1)
    return model


def network(name: str) -> nn.Module:
    with torch.device("meta"):  # classifiers of 100 million weights are not wanted
        model = getattr(import_torchvision("torchvision.models"), name)()
        if name in ("alexnet", "vgg11", "vgg11_bn"):
            inputs = next(m for m in model.classifier if isinstance(m, nn.Linear)).in_features
            model.classifier = nn.Linear(inputs, 10)
    return initialized(model.to_empty(device="cpu")).eval()


def convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def check_report(model: nn.Module, fused: nn.Module, report: FuseReport) -> None:
    """Every convolution is named once, and is what the report says."""
    found = [step.name for step in report.fused]
    assert sorted([*found, *(step.name for step in report.left)]) == sorted(convolutions(model))
    for step in report.fused:
        assert type(fused.get_submodule(step.name)).__name__ == step.into
        assert type(model.get_submodule(step.name)) is nn.Conv2d
    text = str(report)
    for name in convolutions(model):
        assert re.search(rf"^{re.escape(name)} +(\w+, with|left: )", text, re.MULTILINE), name


def check_fused(
    model: nn.Module, input: torch.Tensor, kind: str = "network", **options: Any
) -> tuple[fx.GraphModule, FuseReport]:
    """Fuse: the same outputs and gradients, and a model that is as it was before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    fused, report = fuse(model, **options)
    check_report(model, fused, report)
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == kinds
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        expected = model(input)
        assert expected.abs().max() > 0
        assert_close(fused(input), expected, kind)
    theirs, ours = gradients(model, input), gradients(fused, input)
    folded = {step.name for step in report.fused if step.batch_norm is not None}
    gone = {step.batch_norm for step in report.fused if step.batch_norm is not None}
    same = 0
    for name, gradient in ours.items():
        if name.rpartition(".")[0] not in folded:
            assert_close(gradient, theirs[name], "gradients")
            same += 1
    assert same == len([n for n in theirs if n.rpartition(".")[0] not in folded | gone])
    return fused, report


NETWORKS = {  # convolutions fused, and all
    "resnet18": (9, 20),
    "vgg11": (8, 8),
    "vgg11_bn": (8, 8),
    "mobilenet_v2": (0, 52),
    "alexnet": (5, 5),
    "squeezenet1_1": (26, 26),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    model = network(name)
    input = torch.randn(2, 3, 64, 64)
    norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    fused, report = check_fused(model, input, "folded" if norms else "network")
    assert (len(report.fused), len(convolutions(model))) == NETWORKS[name]
    assert report.unused == ()
    if not norms:
        assert list(fused.state_dict()) == list(model.state_dict())
        assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
        fused.load_state_dict(model.state_dict())
    layers = [m for m in fused.modules() if isinstance(m, ConvBiasReLU2d)]
    assert all(layer.last_activity is not None for layer in layers)
    assert str(report).splitlines()[0].endswith("{} of {} fused".format(*NETWORKS[name]))


def test_resnet18_in_detail() -> None:
    model = network("resnet18")
    _, report = fuse(model)
    assert astuple(report.fused[0]) == ("conv1", "bn1", "relu", "ConvBiasReLU2d")
    assert astuple(report.fused[1])[:3] == ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu")
    reasons = {step.name: step.reason for step in report.left}
    assert reasons["layer1.0.conv2"] == "followed by layer1.0.bn2 and the step add, not by a ReLU"
    assert reasons["layer2.0.downsample.0"] == (
        "followed by layer2.0.downsample.1 and the step add, not by a ReLU"
    )
    _, report = fuse(model.train())
    assert not report.fused
    assert {step.reason for step in report.left if step.name == "conv1"} == {
        "followed by bn1, a BatchNorm2d in training mode; call model.eval() before"
    }


def test_mobilenet_says_that_relu6_is_another_function() -> None:
    _, report = fuse(network("mobilenet_v2"))
    assert report.left[0].name == "features.0.0"
    assert report.left[0].reason == (
        "followed by features.0.1 and features.0.2, a ReLU6, not by a ReLU"
    )


def test_a_network_that_takes_pixels() -> None:
    for name in ("resnet18", "squeezenet1_1"):
        model = network(name)
        images = random_bytes(2, 64, 64, 3)
        floats = pixfuse.normalize(images, pixfuse.IMAGENET, input_layout="NHWC")
        fused, report = fuse(model, normalization=pixfuse.IMAGENET, input_layout="NHWC")
        check_report(model, fused, report)
        assert [s.into for s in report.fused].count("PixelStem") == 1
        assert report.fused[0].into == "PixelStem"
        with torch.no_grad():
            assert_close(fused(images), model(floats), "folded")


# --- the swap: small models ---

RELUS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu by name": lambda x: F.relu(input=x),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
}


class Small(nn.Module):
    """Two convolutions with something between them."""

    def __init__(
        self,
        between: Callable[..., torch.Tensor],
        channels: int = 8,
        norm: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, **options)
        self.norm = norm or nn.Identity()
        self.between = between
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if not isinstance(self.norm, nn.Identity):
            y = self.norm(y)
        return cast(torch.Tensor, self.last(self.between(y)))


@pytest.mark.parametrize("name", RELUS)
@pytest.mark.parametrize("norm", [False, True])
def test_every_way_to_write_a_relu(name: str, norm: bool) -> None:
    model = initialized(Small(RELUS[name], norm=nn.BatchNorm2d(8) if norm else None)).eval()
    fused, report = check_fused(model, INPUT, "folded" if norm else "network")
    assert [step.name for step in report.fused] == ["first"]
    assert [step.name for step in report.left] == ["last"]
    assert report.left[0].reason == "followed by the end of the model"
    names = [node.name for node in fused.graph.nodes]
    assert len(names) == 4, f"nothing else is left: {names}"
    shared = fused.get_parameter("first.weight") is model.get_parameter("first.weight")
    assert shared is (not norm)
    assert fused.get_parameter("last.weight") is model.get_parameter("last.weight")


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 3, "channels": 9},
        {"groups": 3, "channels": 3},
        {"bias": False},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
        {"stride": 2},
    ],
)
@pytest.mark.parametrize("norm", [False, True])
def test_every_kind_of_convolution(options: dict[str, Any], norm: bool) -> None:
    channels = options.get("channels", 8)
    batch_norm = nn.BatchNorm2d(channels, eps=0.1) if norm else None
    model = initialized(Small(F.relu, norm=batch_norm, **options)).eval()
    _, report = check_fused(model, INPUT, "folded" if norm else "network")
    assert len(report.fused) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_fold_is_that_of_torch(dtype: torch.dtype, affine: bool) -> None:
    """Rounded once, and so never further from the real numbers than theirs."""
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=affine)
    model = nn.Sequential(conv, norm, nn.ReLU()).eval()
    if affine:
        initialized(model)
    model.to(dtype)
    theirs = ConvBiasReLU2d.from_conv2d(fuse_conv_bn_eval(conv, norm))
    fused, _ = fuse(model)
    ours = cast(ConvBiasReLU2d, fused.get_submodule("0"))
    mean, var = (cast(torch.Tensor, t).double() for t in (norm.running_mean, norm.running_var))
    gamma, beta = (norm.weight.double(), norm.bias.double()) if affine else (1.0, 0.0)
    scale = gamma * torch.rsqrt(var + norm.eps)
    exact = {"weight": conv.weight.double() * scale.view(-1, 1, 1, 1), "bias": beta - mean * scale}
    for name, value in exact.items():
        mine, other = ours.get_parameter(name), theirs.get_parameter(name)
        unit = torch.finfo(dtype).eps / 2 * (1 + 1e-6)
        assert ((mine.double() - value).abs() <= unit * value.abs()).all()
        assert (mine.double() - value).norm() <= (other.double() - value).norm()
    kind = "folded" if dtype is torch.float32 else str(dtype).removeprefix("torch.")
    assert_close(fused(INPUT.to(dtype)), theirs(INPUT.to(dtype)), kind)


def test_a_frozen_layer_stays_frozen() -> None:
    model = Small(F.relu, norm=nn.BatchNorm2d(8)).eval().requires_grad_(False)
    fused, _ = fuse(model)
    assert not any(p.requires_grad for p in fused.parameters())


# What stands between the convolutions, and why the first is left.
class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z: torch.Tensor = torch.relu(y) + y
        return z


class InPlaceWithTwoUsers(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        torch.relu_(y)
        return cast(torch.Tensor, y * 2)


class NormWithTwoUsers(TwoUsers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        z: torch.Tensor = torch.relu(y) - y
        return z


class NotUsed(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv(x)
        return x.relu()


class NeverCalled(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(F.conv2d(x, self.conv.weight, self.conv.bias))


class CalledTwice(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.relu(self.conv(x)) + self.conv(-x)
        return y


class TwoNorms(TwoUsers):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(self.conv(x))) - torch.relu(self.b(self.conv(x)))


class WeightElsewhere(NormWithTwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x))) + self.conv.weight.sum()


class TorchLayer(nn.Conv2d):
    pass


class NormAndReLU(nn.BatchNorm2d):
    """As timm has it: whose forward does more, and asks about sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 4
        return super().forward(x).relu()


def with_hook(part: str, kind: str = "register_forward_hook") -> nn.Module:
    model = Small(nn.ReLU(), norm=nn.BatchNorm2d(8))
    getattr(model.get_submodule(part), kind)(lambda *_: None)
    return model


def with_state_dict_hook() -> nn.Module:
    model = Small(nn.ReLU())
    model.first.register_state_dict_post_hook(lambda *_: None)
    return model


def parametrized() -> nn.Module:
    model = Small(nn.ReLU())
    parametrizations.weight_norm(model.first)
    return model


def with_old_weight_norm() -> nn.Module:
    model = Small(nn.ReLU())
    weight_norm(model.first)
    return model


def of_a_subclass() -> nn.Module:
    model = Small(nn.ReLU())
    model.first = TorchLayer(3, 8, 3)
    return model


def already_fused() -> nn.Module:
    model = Small(nn.ReLU())
    model.first = ConvBiasReLU2d(3, 8, 3)
    return model


def shared_with_what_is_kept_whole() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1), nn.ReLU())
    model[1] = cast(nn.Sequential, model[0])[0]
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_another_forward(part: str) -> nn.Module:
    model = Small(nn.ReLU(), norm=nn.BatchNorm2d(8))
    module = model.get_submodule(part)
    forward = module.forward
    cast(Any, module).forward = lambda x: 2 * forward(x)
    return model


def with_a_plain_weight() -> nn.Module:
    model = Small(nn.ReLU())
    weight = model.first.weight.detach()
    del model.first.weight
    cast(Any, model.first).weight = weight
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another user": (TwoUsers, "followed by 2 steps that use its output"),
    "another user, in place": (InPlaceWithTwoUsers, "followed by 2 steps that use its output"),
    "another user of the norm": (
        NormWithTwoUsers,
        "followed by norm, which is followed by 2 steps that use its output",
    ),
    "no user": (NotUsed, "followed by nothing"),
    "never called": (NeverCalled, "not called in the forward pass"),
    "called twice": (CalledTwice, "called 2 times, and once it is followed by the step add"),
    "two norms": (TwoNorms, "called 2 times, with different batch normalizations behind it"),
    "weight elsewhere": (
        WeightElsewhere,
        "has parameters that are used elsewhere, so no BatchNorm2d is folded into them",
    ),
    "leaky": (
        lambda: Small(nn.LeakyReLU()),
        "followed by between, a LeakyReLU, not by a ReLU",
    ),
    "a method": (lambda: Small(lambda x: x.sigmoid()), "followed by the step sigmoid, not by"),
    "no statistics": (
        lambda: Small(nn.ReLU(), norm=nn.BatchNorm2d(8, track_running_stats=False)),
        "followed by norm, a BatchNorm2d without running statistics",
    ),
    "another norm": (
        lambda: Small(nn.ReLU(), norm=nn.GroupNorm(2, 8)),
        "followed by norm, a GroupNorm, not by a ReLU",
    ),
    "a norm that does more": (
        lambda: Small(nn.Identity(), norm=NormAndReLU(8)),
        "followed by norm, a NormAndReLU, not by a ReLU",
    ),
    "a hook": (lambda: with_hook("first"), "has hooks"),
    "a backward hook": (lambda: with_hook("first", "register_full_backward_hook"), "has hooks"),
    "a pre-hook": (lambda: with_hook("first", "register_forward_pre_hook"), "has hooks"),
    "a hook of the state dict": (with_state_dict_hook, "has hooks"),
    "a hook of the norm": (lambda: with_hook("norm"), "followed by norm, which has hooks"),
    "a hook of the ReLU": (lambda: with_hook("between"), "followed by between, which has hooks"),
    "another forward": (lambda: with_another_forward("first"), "has a forward of its own"),
    "another forward of the norm": (
        lambda: with_another_forward("norm"),
        "followed by norm, which has a forward of its own",
    ),
    "another forward of the ReLU": (
        lambda: with_another_forward("between"),
        "followed by between, which has a forward of its own",
    ),
    "no parameter": (with_a_plain_weight, "has a weight or bias that is not a parameter"),
    "parametrized": (parametrized, "has parametrizations"),
    "weight norm": (with_old_weight_norm, "has hooks"),
    "a subclass": (of_a_subclass, "is a TorchLayer, which does more than Conv2d"),
    "already": (already_fused, "is a ConvBiasReLU2d, which does more than Conv2d"),
    "in what is kept whole": (
        shared_with_what_is_kept_whole,
        "inside 0, which is kept whole: it has hooks",
    ),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_what_is_left(name: str) -> None:
    make, reason = LEFT[name]
    model = make().eval()
    fused, report = fuse(model)
    assert report.fused == ()
    assert report.left[0].reason.startswith(reason)
    assert_close(fused(INPUT), model(INPUT), "network")
    if name == "never called":
        assert report.left[1].name == "conv2d()"
        assert report.left[1].reason == "a call of conv2d, not a module"
    assert f"left: {reason}" in str(report)


def test_a_convolution_that_is_called_more_than_once() -> None:
    class Twice(TwoUsers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.relu(self.conv(x)) - self.conv(-x).relu()
            return y

    model = Twice()
    fused, report = check_fused(model, INPUT)
    assert len(report.fused) == 1
    told: list[UnitActivity] = []
    cast(ConvBiasReLU2d, fused.get_submodule("conv")).register_activity_hook(
        lambda _, activity: told.append(activity)
    )
    fused(INPUT)
    assert len(told) == 2


def test_what_does_nothing_is_passed_over() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, nn.Identity(), norm, nn.Identity(), nn.Identity(), nn.ReLU())
    initialized(model).eval()
    fused, report = check_fused(model, INPUT, "folded")
    assert [astuple(step)[:3] for step in report.fused] == [("0", "2", "5")]
    assert len(fused.graph.nodes) == 3
    seen: list[torch.Tensor] = []
    model[3].register_forward_hook(lambda _, __, output: seen.append(output))
    fused, report = fuse(model)
    assert report.left[0].reason == "followed by 2 and 3, a Identity, not by a ReLU"
    fused(INPUT)
    assert len(seen) == 1


def test_a_monitor_counts_the_same_of_a_fused_model() -> None:
    conv = nn.Conv2d(3, 8, 3)
    with torch.no_grad():  # whole numbers, so sums are exact in every order
        conv.weight.copy_(torch.randint(-3, 4, conv.weight.shape))
        cast(torch.Tensor, conv.bias).copy_(torch.linspace(-200, 20, 8).round())
    model = nn.Sequential(conv, nn.ReLU())
    fused, _ = fuse(model)
    images = torch.randint(-3, 4, (4, 3, 9, 9)).float()
    with pixfuse.DeadUnitMonitor(model) as plain, pixfuse.DeadUnitMonitor(fused) as ours:
        for _ in range(2):
            model(images)
            fused(images)
    before, after = plain.report()["1"].window, ours.report()["0"].window
    assert 0 < after.dead_count < 8
    assert_same_activity(after, before)


def test_a_model_that_is_monitored() -> None:
    model = initialized(Small(nn.ReLU(), norm=nn.BatchNorm2d(8))).eval()
    with pixfuse.DeadUnitMonitor(model, pre_activation=True) as monitor:
        for watched in (model, copy.deepcopy(model)):
            fused, report = fuse(watched)
            assert [step.name for step in report.fused] == ["first"]
            assert_close(fused(INPUT), copy.deepcopy(model)(INPUT), "folded")
        assert monitor.steps == 0
        model(INPUT)
        assert (monitor.steps, len(monitor.report())) == (1, 1), "it still counts"


def test_one_norm_behind_two_convolutions() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.relu(self.norm(self.a(x))) - self.norm(self.b(x))
            return y

    model = initialized(Shared()).eval()
    fused, report = fuse(model)
    check_report(model, fused, report)
    assert_close(fused(INPUT), model(INPUT), "folded")
    assert [step.name for step in report.fused] == ["a"]
    assert report.unused == ()
    assert "norm.weight" in fused.state_dict()


# --- the comparison itself ---


@pytest.mark.parametrize("fault", ["a second user", "epsilon", "no ReLU", "a hook", "a gradient"])
def test_the_comparison_notices_a_wrong_swap(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = initialized(Small(nn.ReLU(), norm=nn.BatchNorm2d(8))).eval()
    if fault == "a second user":
        model = TwoUsers()
        monkeypatch.setattr(_fusion, "_only_user", lambda node: next(iter(node.users)))
    elif fault == "epsilon":
        fold = cast(Any, pixfuse.nn).fuse_conv_bn_weights
        monkeypatch.setattr(
            pixfuse.nn,
            "fuse_conv_bn_weights",
            lambda w, b, m, v, eps, *rest: fold(w, b, m, v, 100 * eps, *rest),
        )
    elif fault == "no ReLU":
        model = Small(nn.LeakyReLU(0.5))
        monkeypatch.setattr(_fusion, "_is_relu", lambda node, modules: node.op == "call_module")
    elif fault == "a gradient":
        model = Small(nn.ReLU())
        right = cast(Any, pixfuse.nn).conv_bias_relu

        def wrong(input: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> Any:
            output, activity = right(input, weight, *rest, **options)
            return output + (weight - weight.detach()).mean(), activity

        monkeypatch.setattr(pixfuse.nn, "conv_bias_relu", wrong)
    else:
        model = with_hook("first").eval()
        cast(Any, model.get_submodule("first")).register_forward_hook(lambda *_: _[2] + 1)
        monkeypatch.setattr(_fusion, "has_hooks", lambda *_: False)
        monkeypatch.setattr(pixfuse.nn, "has_hooks", lambda *_: False)
    words = "gradients" if fault == "a gradient" else "(network|folded)"
    with pytest.raises(AssertionError, match=f"{words}: off by"):
        check_fused(model, INPUT, "network" if fault == "no ReLU" else "folded")


# --- what goes along ---


def test_the_fused_model_has_modes_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5)).train()
    fused, _ = fuse(model)
    assert fused.training
    assert all(module.training for module in fused.modules())
    fused.eval()
    assert model[2].training
    assert_same_bits(fused(INPUT), fused(INPUT))
    assert not torch.equal(model(INPUT), model(INPUT))
    handle = fused.get_submodule("2").register_forward_hook(lambda *_: None)
    assert not model[2]._forward_hooks
    handle.remove()


def test_training_one_trains_the_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2))
    fused, report = fuse(model)
    assert report.left[0].reason.startswith("followed by 3, a BatchNorm2d in training mode; call")
    optimizer = torch.optim.SGD(fused.parameters(), 0.1)
    weight = model.get_parameter("0.weight")
    before = weight.detach().clone()
    fused(INPUT).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert model.get_buffer("3.num_batches_tracked") == 1
    assert_close(fused.eval()(INPUT), model.eval()(INPUT), "network")


def test_a_fused_model_is_a_model() -> None:
    """Copied, pickled, compiled, fused again."""
    model = initialized(Small(nn.ReLU(), norm=nn.BatchNorm2d(8))).eval()
    fused, _ = fuse(model)
    expected = fused(INPUT)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), through_a_file(fused)):
        assert_same_bits(again(INPUT), expected)
        assert list(again.state_dict()) == list(fused.state_dict())
    twice, report = fuse(fused)
    assert not report.fused
    assert_same_bits(twice(INPUT), expected)
    torch._dynamo.reset()
    run = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(INPUT), expected)
    torch._dynamo.reset()
    assert fused.bfloat16()(INPUT.bfloat16()).dtype is torch.bfloat16


class Kept(nn.Module):
    """What a state dict has beyond the convolutions."""

    kept: torch.Tensor
    passing: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("kept", torch.tensor(3.0))
        self.register_buffer("passing", torch.tensor(4.0), persistent=False)
        self.constant = torch.tensor(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.relu(self.head(x)) * self.scale
        return y + (self.kept + self.passing + self.constant)


def test_the_state_dict_stays() -> None:
    model = Kept()
    fused, report = check_fused(model, INPUT)
    keys = [key for key in model.state_dict() if not key.startswith("unused")]
    assert set(fused.state_dict()) == set(keys)
    assert report.unused == ("unused.weight", "unused.bias")
    assert "\nunused.weight  not in the fused model: not used" in str(report)
    fused.load_state_dict(model.state_dict(), strict=False)
    assert fused.get_buffer("kept") is model.get_buffer("kept")


def test_leaf_modules() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x).relu() if x.sum() > -1e9 else x
            return y

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Sequential(Branch()))
    with pytest.raises(
        ValueError,
        match=r"^fuse: expected a model that torch.fx can trace, got Sequential: in module '2.0' "
        r"of class Branch: TraceError: symbolically traced variables cannot be .*; keep that "
        r"module whole with leaf_modules, .*, or fuse the parts",
    ):
        fuse(model)
    for leaf in ("2.0", "2", Branch):
        fused, report = check_fused(model, INPUT, leaf_modules=[leaf])
        owner = "2" if leaf == "2" else "2.0"
        assert [step.name for step in report.fused] == ["0"]
        assert report.left[0].reason == (
            f"inside {owner}, which is kept whole: it is among leaf_modules"
        )
        assert_close(fused(INPUT), model(INPUT), "network")
    with pytest.raises(ValueError, match=r"^fuse: expected leaf_modules .*, got '3'"):
        fuse(model, leaf_modules=["3"])
    with pytest.raises(ValueError, match=r"got Branch: in its own forward \(Branch\): TraceError"):
        fuse(Branch())


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    ],
    ids=["no_grad", "inference_mode", "autocast", "float16"],
)
def test_steps_under_no_grad_or_autocast(mode: Callable[[], Any]) -> None:
    """The graph would compute them without, and say nothing."""

    class Frozen(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with mode():
                return cast(torch.Tensor, self[1](self[0](x)))

    body = Frozen(nn.Conv2d(3, 3, 1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), body)
    with pytest.raises(
        ValueError,
        match=r"^fuse: expected .* in module '2' of class Frozen: RuntimeError: a step under "
        r"no_grad or autocast, which torch.fx would leave out; keep that module whole with",
    ):
        fuse(model)
    fused, report = fuse(model, leaf_modules=["2"])
    assert [step.name for step in report.fused] == ["0"]
    with mode():  # the same all over
        fuse(body)
        output, expected = fused(INPUT), model(INPUT)
    assert (output.requires_grad, output.dtype) == (expected.requires_grad, expected.dtype)


def test_arguments_that_python_decides_upon() -> None:
    class Masked(TwoUsers):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            y = torch.relu(self.conv(x))
            return y if mask is None else y * mask

    model = Masked()
    fused, _ = check_fused(model, INPUT, concrete_args={"mask": None})
    assert "mul" not in fused.code


def test_models_with_hooks_of_their_own_and_wrapped_ones() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    for wrong, message in (
        (nn.DataParallel(model), r"got a DataParallel of it; fuse model.module, and wrap"),
        (torch.compile(model), r"got a OptimizedModule of it; fuse model._orig_mod, and wrap"),
        (F.relu, r"to be a torch.nn.Module, not scripted, got function"),
    ):
        with pytest.raises(TypeError, match=rf"^fuse: expected .*{message}"):
            fuse(cast(Any, wrong))
    model.lock = open  # type: ignore[assignment]  # can be copied
    fuse(model)
    model.lock = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"^fuse: expected a model that copy.deepcopy can copy, got Sequential: "
    ):
        fuse(model)
    del model.lock
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^fuse: expected a model without hooks of its own, got"):
        fuse(model)


class TwoInputs(TwoUsers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x)) + x.mean()


BAD_PIXELS: dict[str, tuple[nn.Module, Any, type[Exception], str]] = {
    "a number": (
        Small(F.relu),
        0.5,
        TypeError,
        r"expected normalization to be a pixfuse.Normalization, got float",
    ),
    "not fused": (Small(torch.sigmoid), pixfuse.UNIT, ValueError, r".*, got first: followed by t"),
    "used twice": (TwoInputs(), pixfuse.UNIT, ValueError, r".*, got an input that goes to conv, m"),
    "no convolution": (
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 3, 1), nn.ReLU()),
        pixfuse.UNIT,
        ValueError,
        r".*, got 0: is not a Conv2d",
    ),
    "float64": (
        Small(F.relu).double(),
        pixfuse.UNIT,
        ValueError,
        r".*, got first of float64; call model.float\(\) before",
    ),
}


@pytest.mark.parametrize("case", BAD_PIXELS)
def test_models_that_cannot_take_pixels(case: str) -> None:
    model, normalization, error, message = BAD_PIXELS[case]
    with pytest.raises(error, match=f"^fuse: {message}"):
        fuse(model, normalization=normalization)
    with pytest.raises(ValueError, match=r"^fuse: expected input_layout to be 'NCHW' or 'NHWC'"):
        fuse(model, input_layout=cast(Any, "CHW"))


def test_on_a_gpu(cuda: torch.device) -> None:
    model = initialized(Small(nn.ReLU(), norm=nn.BatchNorm2d(8))).eval()
    fused, _ = fuse(model)
    expected = fused(INPUT)
    layer = cast(ConvBiasReLU2d, fused.to(cuda).get_submodule("first"))
    certified = pixfuse.certified_dead(layer.weight, layer.bias, -1.0, 1.0)
    assert certified.device == layer.weight.device
    assert_close(fused(INPUT.to(cuda)).cpu(), expected, "tf32")
    assert layer.last_activity is not None
    assert layer.last_activity.active.device == layer.weight.device


# --- several processes ---

RANKS = """
import gc, sys, torch, pixfuse
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

def rank(number, count, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=count)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU())
    images = torch.randn(4, 3, 8, 8)
    model(images).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    fused, report = pixfuse.nn.fuse(model)
    assert len(report.fused) == 2
    parallel = DistributedDataParallel(fused)
    mine = images[:1] if number == 0 else images[1:]
    # DDP takes the mean over ranks.
    parallel(mine).square().sum().mul(count).backward()
    for name, p in fused.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    local = fused.get_submodule("0").last_activity
    assert local.images == len(mine)
    total = local.all_reduce()
    whole = pixfuse.conv_bias_relu(images, model[0].weight, model[0].bias)[1]
    assert torch.equal(total.active, whole.active) and total.images == 4
    if number == 0:
        print("equal")
    # What holds the process group last must not be a reducer: it would wait with the GIL held for
    # a thread of gloo that wants the GIL.
    del parallel
    gc.collect()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank, (2, sys.argv[1]), nprocs=2, start_method="fork")
"""


def test_distributed_data_parallel(tmp_path: Path) -> None:
    result = python(f"import sys; sys.argv.append({str(tmp_path / 'store')!r})\n{RANKS}")
    assert result.returncode == 0, result.stderr
    assert "equal" in result.stdout


def test_numpy_images_go_into_a_stem() -> None:
    stem = PixelStem(3, 4, 3, normalization=pixfuse.UNIT, input_layout="NHWC")
    with pytest.raises(TypeError, match=r"^conv_bias_relu: expected images of dtype uint8"):
        stem(np.zeros((1, 8, 8, 3)))
    with pytest.raises(TypeError, match=r"expected input of dtype uint8 with a normalization"):
        stem(torch.zeros(1, 8, 8, 3))
