"""`pixfuse.DeadUnitMonitor`: exact counts of every kind of layer, over a window that moves."""

import ast
import copy
import inspect
import io
import math
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pixfuse
from pixfuse import DeadUnitMonitor, DeadUnitWarning, UnitActivity
from pixfuse.monitor import LayerReport, MonitorReport
from pixfuse.nn import ConvBiasReLU2d, PixelStem
from tests.processes import python

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "ReLU6 in place": lambda: nn.ReLU6(inplace=True),
    "Hardtanh": lambda: nn.Hardtanh(-0.5, 0.75),
    "LeakyReLU": nn.LeakyReLU,
    "LeakyReLU in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "RReLU": nn.RReLU,
    "PReLU": nn.PReLU,
    "PReLU upside down": lambda: nn.PReLU(init=-0.5),
    "ELU": nn.ELU,
    "CELU": nn.CELU,
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "Hardswish": nn.Hardswish,
}
STOPPING = {"ReLU", "ReLU in place", "ReLU6", "ReLU6 in place", "Hardtanh"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors; what conftest.py puts back


def fires(activation: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """The definition: where the inputs of an activation make it fire."""
    if isinstance(activation, nn.Hardtanh):
        return (values > activation.min_val) & (values < activation.max_val)
    return values > 0


def expected_activity(mask: torch.Tensor, output: torch.Tensor, dim: int) -> UnitActivity:
    """By the definition, in float64, a channel at a time."""
    if dim == 0:
        mask, output, dim = mask[None], output[None], 1
    rows = []
    for channel in range(output.shape[dim]):
        fired, values = mask.select(dim, channel), output.select(dim, channel).double()
        nan = values.isnan()
        rows.append(
            (
                fired.sum().item(),
                fired.flatten(1).any(1).sum().item() if fired.dim() > 1 else fired.sum().item(),
                nan.sum().item(),
                values[~nan].abs().sum().item(),
            )
        )
    active, images, nans, sums = zip(*rows, strict=True)
    return UnitActivity(
        torch.tensor(active),
        torch.tensor(images),
        torch.tensor(nans),
        torch.tensor(sums, dtype=torch.float64),
        output.numel() // output.shape[dim],
        output.shape[0],
    )


def assert_same(mine: UnitActivity, other: UnitActivity, rtol: float = 1e-5) -> None:
    for name in ("active", "active_images", "nan"):
        a, b = getattr(mine, name), getattr(other, name)
        assert a.dtype is torch.int64
        assert torch.equal(a, b), f"{name}: {a} and {b}"
    torch.testing.assert_close(mine.output_sum, other.output_sum, rtol=rtol, atol=0)
    assert (mine.positions, mine.images) == (other.positions, other.images)


def assert_same_reports(mine: MonitorReport, other: MonitorReport, rtol: float = 0) -> None:
    assert (mine.steps, mine.window_steps, mine.not_run) == (
        other.steps,
        other.window_steps,
        other.not_run,
    )
    assert [layer.name for layer in mine] == [layer.name for layer in other]
    for a, b in zip(mine, other, strict=True):
        assert_same(a.window, b.window, rtol)
        assert_same(a.total, b.total, rtol)
        assert torch.equal(a.steps_since_fired, b.steps_since_fired)
        for x, y in ((a.pre_mean, b.pre_mean), (a.pre_std, b.pre_std)):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=rtol, atol=0)


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def only(monitor: DeadUnitMonitor) -> LayerReport:
    (layer,) = monitor.report()
    return layer


def small_network() -> nn.Sequential:
    """Its third channel cannot fire, so all gradients of its weights are 0."""
    conv = nn.Conv2d(3, 6, 3, padding=1)
    conv.bias = nn.Parameter(torch.tensor([0.0, 0.0, -1e3, 0.0, 0.0, 0.0]))
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5), nn.ReLU())


# --- what fires, and how it is counted ---


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 4, 6, 7), (9, 4), (3, 4, 2, 5, 3), (0, 4, 3, 3)])
def test_counts_of_every_activation(name: str, shape: tuple[int, ...]) -> None:
    activation = ACTIVATIONS[name]()
    model = nn.Sequential(activation)
    monitor = DeadUnitMonitor(model)
    values = 4 * torch.randn(shape)
    values.view(-1)[::7] = 0.0
    values.select(1, 1).fill_(-0.25)  # fires nowhere, but for the clamp
    if values.numel():
        values.select(1, 3).select(0, 0).fill_(float("nan"))
    mask = fires(activation, values)
    with torch.no_grad():
        output = model(values.clone())
    assert_same(only(monitor).total, expected_activity(mask, output, 1))
    assert only(monitor).layer == type(activation).__name__


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_firing_is_where_the_gradient_passes(name: str) -> None:
    """All of it where nothing passes elsewhere; most of it elsewhere."""
    activation = ACTIVATIONS[name]().eval()
    values = torch.linspace(-8, 8, 4001).requires_grad_()
    activation(values * 1).sum().backward()
    mask = fires(activation, values.detach())
    monitor = DeadUnitMonitor(activation, channel_dims={"": 0})
    activation(values.detach().clone())
    assert torch.equal(only(monitor).total.active.bool(), mask)
    assert only(monitor).stops_gradient == (name in STOPPING)
    if name in STOPPING:
        assert torch.equal(gradient(values) != 0, mask)
    else:
        assert (gradient(values)[~mask] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ReLU", "GELU", "ReLU6"])
def test_every_dtype_and_layout(name: str, dtype: torch.dtype) -> None:
    activation = ACTIVATIONS[name]()
    images = torch.randn(3, 33, 40, 41).to(dtype)  # 1640 positions: no whole number in bfloat16
    images[:, 5] = 1
    expected = expected_activity(fires(activation, images), activation(images), 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        monitor = DeadUnitMonitor(activation)
        activation(images.contiguous(memory_format=layout))
        monitor.close()
        assert_same(only(monitor).total, expected, 2e-5)
    assert expected.active[5] == 3 * 1640


def test_infinity_fires_and_spoils_only_its_own_sum() -> None:
    values = torch.tensor([[math.inf, 1.0, -math.inf], [2.0, math.nan, -1.0]])
    for name in ("ReLU", "LeakyReLU"):
        activation = ACTIVATIONS[name]()
        monitor = DeadUnitMonitor(activation)
        activation(values)
        total = only(monitor).total
        assert total.active.tolist() == [2, 1, 0]
        assert total.nan.tolist() == [0, 1, 0]
        assert total.dead.tolist() == [False, False, True]
        assert total.output_sum[:2].tolist() == [math.inf, 1.0]


def test_a_dead_unit_has_no_gradient() -> None:
    network = small_network()
    with DeadUnitMonitor(network) as monitor:
        network(torch.randn(4, 3, 8, 8)).sum().backward()
    dead = monitor.report()["1"].dead
    assert dead.tolist() == [False, False, True, False, False, False]
    for parameter in network[0].parameters():
        assert torch.equal(gradient(parameter).reshape(6, -1).ne(0).any(1), ~dead)


def test_dormant_is_that_of_the_definition() -> None:
    relu = nn.ReLU()
    monitor = DeadUnitMonitor(relu, tau=0.1)
    relu(torch.tensor([[10.0, 0.5, -1.0, 9.5]]))
    assert only(monitor).dormant.tolist() == [False, True, True, False]  # the mean is 5
    assert only(monitor).dead.tolist() == [False, False, True, False]
    assert only(monitor).active_fraction == 0.75


# --- which dimension holds the channels ---


@pytest.mark.parametrize(
    ("before", "shape", "dim"),
    [
        (nn.Conv2d(3, 6, 1), (2, 6, 4, 5), 1),
        (nn.Conv2d(3, 6, 1), (6, 4, 5), 0),
        (nn.Conv1d(3, 6, 1), (2, 6, 5), 1),
        (nn.Conv3d(3, 6, 1), (2, 6, 4, 5, 3), 1),
        (nn.BatchNorm2d(6), (2, 6, 4, 5), 1),
        (nn.Linear(3, 6), (2, 6), 1),
        (nn.Linear(3, 6), (2, 7, 6), 2),
        (nn.Linear(3, 6), (2, 4, 5, 6), 3),
        (nn.Linear(3, 6), (6,), 0),
        (nn.LayerNorm(6), (2, 7, 6), 2),
        (nn.Linear(3, 9), (2, 6, 4, 5), 1),  # it is not what the activation follows
        (nn.Linear(3, 6), (2, 6, 4, 5), 1),  # permuted in between
        (nn.Conv2d(3, 6, 1), (2, 6, 20), 1),  # flattened
        (nn.Conv2d(3, 6, 1), (2, 20, 6), 2),  # into tokens
        (nn.Identity(), (2, 6, 4, 5), 1),
        (nn.Identity(), (2, 6), 1),
    ],
)
def test_channels_are_where_the_layer_before_puts_them(
    before: nn.Module, shape: tuple[int, ...], dim: int
) -> None:
    model = nn.ModuleList([before, nn.ReLU()])
    monitor = DeadUnitMonitor(model)
    values = torch.randn(shape)
    monitor.step()
    output = model[1](values)
    assert_same(only(monitor).total, expected_activity(output > 0, output, dim))


@pytest.mark.parametrize(
    ("layers", "shape", "dim"),
    [
        ([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)], (2, 8, 6, 5), 1),  # as ResNet's bottleneck
        ([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)], (2, 8, 5, 6), 1),
        ([nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)], (2, 6, 8), 2),  # as a transformer's
        ([nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)], (2, 7, 8), 2),
        ([nn.Conv2d(3, 6, 1)], (6, 20, 6), 2),  # into tokens, of as many images
    ],
)
def test_channels_where_a_size_is_that_of_another_layer(
    layers: list[nn.Module], shape: tuple[int, ...], dim: int
) -> None:
    """What an activation follows is not always what is defined last before it."""
    model = nn.ModuleList([*layers, nn.ReLU()])
    monitor = DeadUnitMonitor(model)
    output = model[-1](torch.randn(shape))
    assert_same(only(monitor).total, expected_activity(output > 0, output, dim))


def test_channels_that_nobody_can_tell() -> None:
    model = nn.Sequential(nn.ReLU())
    DeadUnitMonitor(model)
    with pytest.raises(
        ValueError,
        match=r"^DeadUnitMonitor: expected to know the channels of '0', got an output of shape "
        r"\(2, 6, 5\) .* pass channel_dims=\{'0': 1\} for \(N, C, L\), or -1",
    ):
        model(torch.randn(2, 6, 5))


@pytest.mark.parametrize(("chosen", "dim"), [(1, 1), (-1, 2), (2, 2), (-2, 1)])
def test_channels_that_are_named(chosen: int, dim: int) -> None:
    model = nn.Sequential(nn.ReLU())
    monitor = DeadUnitMonitor(model, channel_dims={"0": chosen})
    output = model(torch.randn(2, 6, 5))
    assert_same(only(monitor).total, expected_activity(output > 0, output, dim))


def test_channels_that_are_named_where_there_are_none() -> None:
    model = nn.Sequential(nn.ReLU())
    DeadUnitMonitor(model, channel_dims={"0": 3})
    with pytest.raises(
        ValueError, match=r"expected channel_dims\['0'\] to be a dimension .* got 3"
    ):
        model(torch.randn(2, 6, 5))


# --- the window ---


@pytest.mark.parametrize(("window", "blocks"), [(1, 1), (4, 10), (12, 4), (10, 4), (7, 1)])
def test_the_window_holds_the_last_steps_and_says_how_many(window: int, blocks: int) -> None:
    relu = nn.ReLU()
    monitor = DeadUnitMonitor(relu, window, blocks=blocks)
    past: list[UnitActivity] = []
    block = math.ceil(window / blocks)
    kept = window // block * block
    last = torch.zeros(5, dtype=torch.int64)
    for step in range(1, 40):
        # Channel 0 fires always, 1 never, 2 every ninth step, 3 until it dies, 4 at random.
        fired = torch.tensor([True, False, step % 9 == 0, step < 20, torch.rand(()) > 0.7])
        output = relu(
            torch.where(fired, 1.0, -1.0).view(5, 1, 1) * torch.rand(1 + step % 3, 5, 2, 2)
        )
        past.append(expected_activity(output > 0, output, 1))
        last[fired] = step
        report = monitor.report()
        assert report.steps == step
        assert report.window_steps == monitor.window_steps
        assert min(step, kept - block + 1) <= report.window_steps <= min(step, kept)
        assert kept == window or window % blocks
        for activity, parts in (
            (report.layers[0].window, past[-report.window_steps :]),
            (report.layers[0].total, past),
        ):
            expected = parts[0]
            for part in parts[1:]:
                expected = expected + part
            assert_same(activity, expected)
        assert torch.equal(report.layers[0].steps_since_fired, step - last)


def test_memory_is_bounded() -> None:
    relu = nn.ReLU()
    monitor = DeadUnitMonitor(relu, 50)

    for steps in (1, 200):
        for _ in range(steps):
            relu(torch.randn(2, 3))
        state = monitor.state_dict()["layers"][""][0]
        # As the docstring has it for each channel, and as much again for the one that always fires.
        assert sum(t.numel() for t in state.values()) == (3 + 1) * (4 * 10 + 73) - 1


@pytest.mark.parametrize("steps", [1, 63, 64, 65, 128, 129, 300])
def test_the_history_keeps_every_step_in_columns_of_equal_width(steps: int) -> None:
    relu = nn.ReLU()
    monitor = DeadUnitMonitor(relu, 3)
    counts = []
    for _ in range(steps):
        output = relu(torch.randn(2, 3, 2, 2))
        counts.append((output > 0).sum((0, 2, 3)))
    width = monitor._column_steps
    assert width == 2 ** max(0, math.ceil(math.log2(steps / 64)))
    history = monitor._watched[0].records[0].history
    for column in range(64):
        part = counts[column * width : (column + 1) * width]
        assert torch.equal(history[column, :-1], sum(part, torch.zeros(3)).double())
        assert history[column, -1] == 8 * len(part)


def test_steps_that_the_caller_ends() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network, auto_step=False)
    images = torch.randn(4, 3, 8, 8)
    for part in images.split(2):
        network(part)
    assert monitor.steps == 0
    assert monitor.report()["1"].window.images == 4  # what is counted can be read before the end
    monitor.step()
    monitor.close()
    assert monitor.steps == 1
    whole = DeadUnitMonitor(network)
    network(images)
    assert_same(monitor.report()["1"].window, whole.report()["1"].window)


def test_what_runs_outside_of_the_model_belongs_to_the_next_step() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network, window=1)
    network[1](torch.randn(3, 6, 8, 8))
    network(torch.randn(4, 3, 8, 8))
    assert monitor.report()["1"].window.images == 7
    network(torch.randn(4, 3, 8, 8))
    assert monitor.report()["1"].window.images == 4


def test_a_model_of_which_only_parts_are_called() -> None:
    """Its steps never end, so each call would be taken for one of units of its own."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2))
    values = torch.randn(2, 3)
    with DeadUnitMonitor(model):
        for _ in range(64):
            model[0](values)
        with pytest.raises(
            ValueError,
            match=r"expected a forward of the whole model to end each step, got 64 calls of '0.1' "
            r"outside of one; give the monitor the module that is called, end .* auto_step=False",
        ):
            model[0](values)
    with DeadUnitMonitor(model[0]) as part, DeadUnitMonitor(model, auto_step=False) as manual:
        for _ in range(65):
            model[0](values)
            manual.step()
    assert_same(only(part).total, only(manual).total)

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(70):
                x = self.relu(x)
            return x

    with DeadUnitMonitor(unrolled := Unrolled()) as monitor:
        unrolled(values)
    assert len(monitor.report()) == 70


# --- models of many kinds ---


class Reusing(nn.Module):
    """One activation after two convolutions of different widths, as in ResNet's bottleneck."""

    def __init__(self, second: int = 7) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 3), nn.Conv2d(4, second, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.relu(self.wide(self.relu(self.narrow(x))))
        return output


def test_each_call_of_an_activation_has_units_of_its_own() -> None:
    model, images = Reusing(), torch.randn(2, 3, 9, 9)
    with DeadUnitMonitor(model) as monitor:
        for _ in range(3):
            output = model(images)
    report = monitor.report()
    assert [(layer.name, layer.channels) for layer in report] == [("relu", 4), ("relu#2", 7)]
    one = expected_activity(output > 0, output, 1)
    assert_same(report["relu#2"].window, one + one + one)
    inner = model.narrow(images).relu()
    one = expected_activity(inner > 0, inner, 1)
    assert_same(report["relu"].window, one + one + one)


def test_calls_that_are_of_the_same_units() -> None:
    model, images = Reusing(4), torch.randn(2, 3, 9, 9)
    with DeadUnitMonitor(model, merge_calls=True) as monitor:
        output = model(images)
    inner = model.narrow(images).relu()
    both = expected_activity(output > 0, output, 1) + expected_activity(inner > 0, inner, 1)
    assert_same(only(monitor).window, both)


def test_channels_that_change() -> None:
    model = Reusing()
    DeadUnitMonitor(model, merge_calls=True)
    with pytest.raises(ValueError, match=r"expected 'relu' to have 4 channels, as before, got 7"):
        model(torch.randn(2, 3, 9, 9))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu_(self.conv(x))
        x = functional.relu(self.fc(x.mean((2, 3))))
        output: torch.Tensor = self.last(x)
        return output


def test_a_functional_relu_behind_named_layers() -> None:
    model, images = Functional(), torch.randn(5, 3, 8, 8)
    with DeadUnitMonitor(model, layers=["conv", "fc"], pre_activation=True) as monitor:
        model(images)
    report = monitor.report()
    assert [layer.name for layer in report] == ["conv", "fc"]
    pre = model.conv(images)
    assert_same(report["conv"].window, expected_activity(pre > 0, pre.relu(), 1))
    assert report["conv"].layer == "Conv2d, relu"
    torch.testing.assert_close(report["conv"].pre_mean, pre.double().mean((0, 2, 3)))
    hidden = model.fc(pre.relu().mean((2, 3)))
    assert_same(report["fc"].window, expected_activity(hidden > 0, hidden.relu(), 1))


def test_layers_are_those_that_are_named() -> None:
    network = small_network()
    with DeadUnitMonitor(network, layers=["4"]) as monitor:
        network(torch.randn(4, 3, 8, 8))
    assert only(monitor).name == "4"


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("offset", "rtol"), [(0.0, 1e-5), (300.0, 1e-3)])
def test_pre_activations(inplace: bool, offset: float, rtol: float) -> None:
    conv = nn.Conv2d(3, 4, 1)
    conv.bias = nn.Parameter(torch.full((4,), offset))
    model = nn.Sequential(conv, nn.ReLU(inplace), nn.Flatten(2), nn.ReLU(inplace))
    batches = [torch.randn(n, 3, 6, 6) for n in (4, 1, 3)]
    with DeadUnitMonitor(model, window=2, pre_activation=True) as monitor:
        for batch in batches:
            model(batch)
    layer = monitor.report()["1"]
    pre = torch.cat([conv(batch) for batch in batches[1:]]).double()  # what the window holds
    torch.testing.assert_close(layer.pre_mean, pre.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    std = pre.std((0, 2, 3), correction=0)
    torch.testing.assert_close(layer.pre_std, std, rtol=rtol, atol=1e-6)
    assert DeadUnitMonitor(model).report().layers == ()


def test_no_pre_activations_unless_asked_for() -> None:
    network = small_network()
    with DeadUnitMonitor(network) as monitor:
        network(torch.randn(4, 3, 8, 8))
    assert monitor.report()["1"].pre_mean is None
    assert monitor.report()["1"].pre_std is None


def test_modules_that_count_by_themselves() -> None:
    model = nn.Sequential(ConvBiasReLU2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.ReLU())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    plain[0].load_state_dict(model[0].state_dict())
    with DeadUnitMonitor(model, pre_activation=True) as monitor, DeadUnitMonitor(plain) as other:
        for _ in range(3):
            images = torch.randn(2, 3, 8, 8)
            model(images)
            plain(images)
    assert_same(monitor.report()["0"].window, other.report()["1"].window)
    assert monitor.report()["0"].pre_mean is None
    assert monitor.report()["2"].pre_mean is not None
    assert not model[0]._activity_hooks


def test_a_stem_that_takes_bytes() -> None:
    stem = PixelStem(3, 5, 3, normalization=pixfuse.SIGNED, input_layout="NHWC")
    model = nn.Sequential(stem, nn.Conv2d(5, 2, 1))
    images = torch.randint(256, (4, 9, 9, 3), dtype=torch.uint8)
    with DeadUnitMonitor(model) as monitor:
        model(images)
        model(images[:1])
    assert stem.last_activity is not None
    model(images)
    assert_same(
        only(monitor).total,
        stem.last_activity
        + pixfuse.conv_bias_relu(
            images[:1], stem.weight, stem.bias, normalization=pixfuse.SIGNED, input_layout="NHWC"
        )[1],
        1e-12,
    )
    assert only(monitor).layer == "PixelStem"


def test_a_fused_model_has_the_same_units() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    ).eval()
    fused, _ = pixfuse.nn.fuse(model)
    with DeadUnitMonitor(model) as monitor, DeadUnitMonitor(fused) as other:
        for _ in range(2):
            images = torch.randn(2, 3, 8, 8)
            model(images)
            fused(images)
    for mine, theirs in zip(monitor.report(), other.report(), strict=True):
        assert theirs.layer == "ConvBiasReLU2d"
        # Sums near 0 may fall on the other side.
        assert (mine.total.active - theirs.total.active).abs().max() <= 2
        torch.testing.assert_close(
            mine.total.output_sum, theirs.total.output_sum, rtol=1e-5, atol=1e-5
        )


def test_a_nan_of_a_module_that_counts_passes_with_the_window() -> None:
    model = ConvBiasReLU2d(3, 4, 3)
    monitor = DeadUnitMonitor(model, window=1)
    model(torch.full((1, 3, 5, 5), math.nan))
    assert only(monitor).window.nan.tolist() == [9] * 4
    model(torch.randn(1, 3, 5, 5))
    assert only(monitor).window.nan.tolist() == [0] * 4
    assert only(monitor).total.nan.tolist() == [9] * 4
    assert only(monitor).total.output_sum.isfinite().all()


# --- where and how the model runs ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_does_not_count_twice(reentrant: bool, whole: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = small_network(), nn.Linear(5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.head(self.body(x) if whole else again(self.body, x))
            return output

    def again(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = checkpoint(module, x, use_reentrant=reentrant)
        return output

    model, images = Checkpointed(), torch.randn(4, 3, 8, 8, requires_grad=True)
    model.body.insert(0, ConvBiasReLU2d(3, 3, 3, padding=1))
    runs = []
    model.body[2].register_forward_hook(lambda *_: runs.append(1))
    with DeadUnitMonitor(model) as monitor:
        for _ in range(2):
            (again(model, images) if whole else model(images)).sum().backward()
    assert len(runs) == 4, "the layers ran again"
    assert monitor.steps == 2
    assert [layer.total.images for layer in monitor.report()] == [8, 8, 8]


def test_only_training() -> None:
    network = small_network()
    with DeadUnitMonitor(network) as both, DeadUnitMonitor(network, only_training=True) as one:
        network.train()(torch.randn(4, 3, 8, 8))
        network[1].eval()  # frozen, in a model that trains
        network(torch.randn(4, 3, 8, 8))
        network.eval()(torch.randn(3, 3, 8, 8))
    assert (both.steps, both.report()["1"].total.images) == (3, 11)
    assert (one.steps, one.report()["1"].total.images) == (2, 8)


def test_without_gradients_and_with_them_in_turns() -> None:
    network, images = small_network(), torch.randn(4, 3, 8, 8)
    with DeadUnitMonitor(network) as monitor:
        with torch.inference_mode():  # first, so that the counts are made in it
            network(images)
        network(images).sum().backward()
        with torch.no_grad():
            network(images)
        with torch.inference_mode():
            network(images)
    assert monitor.report()["1"].window.images == 16
    assert monitor.report()["1"].dead.tolist() == [i == 2 for i in range(6)]


def test_autocast() -> None:
    network, images = small_network(), torch.randn(4, 3, 8, 8)
    seen = []
    network[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with DeadUnitMonitor(network) as monitor, torch.autocast("cpu", torch.bfloat16):
        network(images)
    assert seen[0].dtype is torch.bfloat16
    expected = expected_activity(seen[0] > 0, seen[0], 1)
    assert_same(monitor.report()["1"].window, expected)


def test_the_result_of_the_model_stays_what_it_was() -> None:
    images = torch.randn(4, 3, 8, 8)
    for model in (small_network(), Reusing()):
        plain = copy.deepcopy(model)
        with DeadUnitMonitor(model, pre_activation=True):
            output = model(images)
        assert torch.equal(output, plain(images))
        output.sum().backward()
        plain(images).sum().backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(gradient(mine), gradient(other))


def test_the_counts_follow_the_model_to_another_device() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network, pre_activation=True)
    network(torch.randn(4, 3, 8, 8))
    network.to("meta")(torch.randn(4, 3, 8, 8, device="meta"))
    for watched in monitor._watched:
        (record,) = watched.records
        devices = {t.device.type for t in vars(record).values() if isinstance(t, torch.Tensor)}
        assert devices == {"meta"}
    assert monitor.steps == 2


def test_data_parallel_is_refused() -> None:
    """Also of a part, as of AlexNet's features."""
    parallel = nn.DataParallel(small_network())
    for model in (parallel, nn.Sequential(parallel, nn.ReLU())):
        with pytest.raises(
            NotImplementedError, match=r"^DeadUnitMonitor: .* got torch.nn.DataParallel; use Dist"
        ):
            DeadUnitMonitor(model)


def test_transforms_of_torch_func_are_no_steps() -> None:
    network, images = small_network(), torch.randn(4, 3, 8, 8)
    parameters = dict(network.named_parameters())

    def loss(parameters: dict[str, nn.Parameter], image: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(network, cast(Any, parameters), image[None])
        return cast(torch.Tensor, output).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))
    expected = gradients(parameters, images)
    with DeadUnitMonitor(network, pre_activation=True) as monitor:
        for ran in range(2):
            found = gradients(parameters, images)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert (monitor.steps, len(monitor.report())) == (ran, 2 * ran)
            network(images)
    assert [layer.total.images for layer in monitor.report()] == [8, 8]


# --- nothing waits for the device ---


class WaitingError(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait: reading a value, or a shape that depends on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.REFUSED:
            raise WaitingError(str(func))
        return func(*args, **(kwargs or {}))


def steps_without_waiting(model: nn.Module, monitor: DeadUnitMonitor) -> None:
    with NoWaiting():  # type: ignore[no-untyped-call]
        for _ in range(70):  # beyond the window, and beyond the columns of the history
            model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert monitor.steps == 70


def test_a_step_reads_nothing() -> None:
    model = nn.Sequential(
        ConvBiasReLU2d(3, 6, 3, 1),
        *(ACTIVATIONS[name]() for name in ACTIVATIONS if "in place" not in name),
        nn.Flatten(),
        nn.Linear(216, 5),
        nn.ReLU(inplace=True),
    )
    steps_without_waiting(model, DeadUnitMonitor(model, window=30, pre_activation=True))


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, torch.Tensor.nonzero])
def test_a_hook_that_reads_is_noticed(read: Callable[[torch.Tensor], object]) -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network)
    network[1].register_forward_hook(lambda module, args, output: read(output.sum()) and None)
    with pytest.raises(WaitingError):
        steps_without_waiting(network, monitor)


def test_the_check_at_the_end_of_a_window_is_what_reads() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network, window=30, warn_share=0.9)
    with pytest.raises(WaitingError):
        steps_without_waiting(network, monitor)
    assert monitor.steps == 30


def test_a_step_stays_on_the_device() -> None:
    """On the device that has no memory: nothing can be read, and nothing of the CPU may enter."""
    model = nn.Sequential(*(activation() for activation in ACTIVATIONS.values())).to("meta")
    images = torch.empty(4, 3, 8, 8, device="meta")
    with DeadUnitMonitor(model, window=3, pre_activation=True) as monitor:
        for _ in range(4):
            model(images)
        for _ in range(64):
            monitor.step()
    for _, record in monitor._records():
        tensors = [value for value in vars(record).values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        images + torch.ones(8)
    with pytest.raises(RuntimeError, match="meta"):
        bool(images.sum() > 0)


# --- torch.compile ---


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("way", ["wrapped", "wrapped later", "in place"])
def test_a_compiled_model(way: str, fullgraph: bool) -> None:
    model = Reusing()
    plain = copy.deepcopy(model)
    watched: nn.Module = model
    options: dict[str, Any] = {"backend": "aot_eager", "fullgraph": fullgraph}
    if way == "wrapped":
        watched = cast(nn.Module, torch.compile(model, **options))
    elif way == "in place":
        model.compile(**options)
    # Made before the first call, which compiles the counting too.
    with DeadUnitMonitor(watched, 4) as monitor, DeadUnitMonitor(plain, 4) as expected:
        compiled = torch.compile(model, **options) if way == "wrapped later" else watched
        for step in range(12):
            images = torch.randn(2 + (step == 11), 3, 9, 9)
            compiled(images).sum().backward()
            plain(images)
    assert_same_reports(monitor.report(), expected.report(), 1e-6)
    compiled(images)
    assert monitor.report()["relu"].total.images == 25, "closed"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("auto_step", [True, False])
@torch.no_grad()
def test_compiled_together_with_what_calls_the_model(auto_step: bool) -> None:
    """No step is compiled anew, and with ``auto_step=False`` it is one graph."""
    model = Reusing()
    monitor = DeadUnitMonitor(model, auto_step=auto_step)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda x: model(x).sum(), backend=backend, fullgraph=not auto_step)
    for _ in range(20):
        run(torch.randn(2, 3, 9, 9))
    assert len(graphs) <= (4 if auto_step else 2)  # before and after the records are made
    assert monitor.steps == 20 * auto_step
    assert monitor.report()["relu#2"].total.images == 40


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_that_counts_by_itself() -> None:
    model = nn.Sequential(ConvBiasReLU2d(3, 4, 3), ConvBiasReLU2d(4, 5, 3))
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wrapped = cast(nn.Module, compiled)
    with DeadUnitMonitor(wrapped, 2) as monitor, DeadUnitMonitor(plain, 2) as expected:
        for images in torch.randn(4, 2, 3, 9, 9):
            compiled(images)
            plain(images)
    assert_same_reports(monitor.report(), expected.report())


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_that_was_compiled_before() -> None:
    model = Reusing()
    compiled = torch.compile(model, backend="aot_eager")
    images = torch.randn(2, 3, 9, 9)
    compiled(images)
    monitor = DeadUnitMonitor(cast(nn.Module, compiled))
    compiled(images)
    assert monitor.report().not_run == ("relu",)
    assert "never ran: relu" in monitor.table()


@pytest.mark.filterwarnings("ignore")  # as in test_nn.py
@pytest.mark.parametrize(
    "record",
    [
        lambda model, images: torch.export.export(model, (images,), strict=False).module(),
        lambda model, images: torch.jit.trace(model, images, check_trace=False),
    ],
    ids=["export", "trace"],
)
@pytest.mark.parametrize("ran", [False, True])
def test_what_is_recorded_is_no_step(record: Callable[..., Any], ran: bool) -> None:
    model, images = small_network(), torch.randn(4, 3, 8, 8)
    monitor = DeadUnitMonitor(model, pre_activation=True)
    if ran:
        model(images)
    recorded = record(model, images)
    assert torch.equal(recorded(images), model(images))
    assert monitor.steps == 1 + ran
    assert monitor.report()["1"].total.images == 4 * (1 + ran)
    graph = getattr(recorded, "inlined_graph", None) or recorded.graph
    assert "add_" not in str(graph), "the counting"


# --- copies, and going on ---


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_the_model_does_not_count(copied: Callable[[nn.Module], nn.Module]) -> None:
    for model, name in ((small_network(), "1"), (nn.Sequential(ConvBiasReLU2d(3, 6, 3)), "0")):
        monitor = DeadUnitMonitor(model, pre_activation=True)
        images = torch.randn(4, 3, 8, 8)
        model(images)
        other = copied(model)
        assert torch.equal(other(images), model(images))
        assert monitor.steps == 2
        assert monitor.report()[name].total.images == 8


def test_the_monitor_itself_is_not_copied() -> None:
    monitor = DeadUnitMonitor(small_network())
    for action in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match=r"expected its state_dict\(\) to be copied or pickled"):
            action(monitor)


@pytest.mark.parametrize("after", [1, 5, 66])
def test_going_on_from_a_checkpoint(after: int) -> None:
    batches = [torch.randn(2, 3, 9, 9) for _ in range(80)]
    model = Reusing()

    def made() -> DeadUnitMonitor:
        return DeadUnitMonitor(model, window=8, blocks=4, pre_activation=True, merge_calls=False)

    with made() as whole:
        for batch in batches:
            model(batch)
    with made() as first:
        for batch in batches[:after]:
            model(batch)
        model.relu(torch.randn(2, 4, 3, 3))  # within a step that is not over
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
    file.seek(0)
    with made() as second:
        second.load_state_dict(torch.load(file, weights_only=True))
        second._watched[0].records[0].open.zero_()
        for batch in batches[after:]:
            model(batch)
    assert_same_reports(second.report(), whole.report())
    mine, other = second.state_dict(), whole.state_dict()
    for a, b in zip(mine["layers"]["relu"], other["layers"]["relu"], strict=True):
        for name in b:
            assert torch.equal(a[name], b[name]), name
    assert mine["column_steps"] == other["column_steps"]


def test_a_state_is_a_copy() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network)
    network(torch.randn(4, 3, 8, 8))
    state = monitor.state_dict()
    before = pickle.dumps(state)
    other = DeadUnitMonitor(network)
    other.load_state_dict(state)
    network(torch.randn(4, 3, 8, 8))
    assert pickle.dumps(state) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 20}, "expected block_steps 2, got 10"),
        ({"blocks": 5}, "expected blocks 5, got 10"),
        ({"pre_activation": True}, "expected pre_activation True, got False"),
        ({"layers": ["1"]}, r"expected the layers \['1'\], got \['1', '4'\]"),
    ],
)
def test_a_state_of_another_monitor(options: dict[str, Any], message: str) -> None:
    network = small_network()
    state = DeadUnitMonitor(network).state_dict()
    monitor = DeadUnitMonitor(network, **options)
    with pytest.raises(ValueError, match=rf"^DeadUnitMonitor.load_state_dict: {message}"):
        monitor.load_state_dict(state)
    assert monitor.steps == 0


def test_damaged_states() -> None:
    """Nothing of them is taken."""
    model = small_network()
    with DeadUnitMonitor(model) as monitor:
        model(torch.randn(2, 3, 8, 8))
        model(torch.randn(2, 3, 8, 8))
    name = next(iter(monitor.state_dict()["layers"]))
    before = str(monitor.report())

    def record(state: dict[str, Any]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = state["layers"][name][0]
        return found

    def one_row(state: dict[str, Any]) -> None:
        record(state)["ring"] = record(state)["ring"][:1]

    damages: dict[str, Callable[[dict[str, Any]], object]] = {
        r"a state without 'layers'": lambda state: state.pop("layers"),
        r"a state without 'warned'": lambda state: state.pop("warned"),
        rf"expected records with open, .*, got one of {name} without 'total'": (
            lambda state: record(state).pop("total")
        ),
        rf"expected 'ring' of {name} of shape \([0-9]+, .*\), got \(1, ": one_row,
    }
    for message, damage in damages.items():
        state = monitor.state_dict()
        damage(state)
        with pytest.raises(ValueError, match=f"^DeadUnitMonitor.load_state_dict: .*{message}"):
            monitor.load_state_dict(state)
        assert str(monitor.report()) == before
    with pytest.raises(TypeError, match=r"expected what state_dict\(\) gives, got NoneType"):
        monitor.load_state_dict(cast(Any, None))


def test_the_hooks_are_gone_at_the_end() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network, pre_activation=True)
    network(torch.randn(4, 3, 8, 8))
    with pytest.raises(RuntimeError, match="expected input"), monitor:
        network(torch.randn(4, 9, 8, 8))
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    network(torch.randn(4, 3, 8, 8))
    assert monitor.steps == 1
    assert monitor.report()["1"].total.images == 4  # still there


# --- several processes ---

RANKS = """
import gc, sys, torch, pixfuse
import torch.distributed as dist
from tests.test_monitor import Reusing, assert_same_reports

class Branching(Reusing):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 else self.relu(self.narrow(x))

def rank(number, count, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=count)
    torch.manual_seed(0)
    model = Branching()
    model.narrow.bias.data[1] = -1e3
    whole = Branching()
    whole.load_state_dict(model.state_dict())
    model = torch.nn.parallel.DistributedDataParallel(model)
    options = dict(window=4, blocks=2, pre_activation=True)
    mine = pixfuse.DeadUnitMonitor(model, **options)
    expected = pixfuse.DeadUnitMonitor(whole, auto_step=False, **options)
    for step in range(7):
        images = torch.randn(4, 3, 9, 9)
        # One image alone goes the short way: the second call has not run on rank 0.
        model(images[:1] if number == 0 else images[1:])
        whole(images[:1])
        whole(images[1:])
        expected.step()
    alone = [layer.name for layer in mine.report()]
    assert alone == (["relu"] if number == 0 else ["relu", "relu#2"]), alone
    for _ in range(2):  # the monitors stay as they are
        merged = mine.all_reduce()
        assert_same_reports(merged, expected.report(), 1e-12)
    assert merged["relu"].dead.tolist() == [False, True, False, False]
    assert merged["relu"].steps_since_fired[1] == 7
    if number == 0:
        model(images[:1])  # one more step than the other rank
    merged = mine.all_reduce()
    assert (merged.steps, merged.window_steps) == (8, 4)
    other = pixfuse.DeadUnitMonitor(model, window=4 + number)
    try:
        other.all_reduce()
    except ValueError as error:
        assert "expected all ranks to watch the same layers" in str(error)
        print("refused")
    act = torch.nn.ReLU()
    wider = pixfuse.DeadUnitMonitor(act)
    act(torch.randn(2, 3 + number))
    try:
        wider.all_reduce()
    except ValueError as error:
        assert "expected '' to have as many channels on all ranks, got 3 and 4" in str(error)
        print("refused")
    if number == 0:
        print("equal")
    # Before the process group: a reducer that holds it last would wait with the GIL held for a
    # thread of gloo that wants the GIL.
    mine.close()
    other.close()
    del model, mine, other
    gc.collect()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank, (2, sys.argv[1]), nprocs=2, start_method="fork")
"""


def test_all_reduce(tmp_path: Path) -> None:
    result = python(f"import sys; sys.argv.append({str(tmp_path / 'store')!r})\n{RANKS}")
    assert result.returncode == 0, result.stderr
    assert "equal" in result.stdout
    assert result.stdout.count("refused") == 4


def test_all_reduce_without_ranks() -> None:
    with pytest.raises(
        RuntimeError, match=r"^DeadUnitMonitor.all_reduce: expected torch.distributed to be init"
    ):
        DeadUnitMonitor(nn.ReLU()).all_reduce()


# --- tables, warnings, pictures, logs ---


def test_the_table() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(3, 4)
    nn.init.zeros_(first.weight)
    nn.init.zeros_(second.weight)
    first.bias.data = torch.tensor([-0.5, 1.0, 2.0])
    second.bias.data = torch.tensor([-1.0, 1.0, -2.0, math.nan])
    model = nn.Sequential(first, nn.GELU(), second, nn.ReLU())
    with DeadUnitMonitor(model, window=4) as monitor:
        for _ in range(120):
            model(torch.ones(2, 2))
    lines = str(monitor).splitlines()
    assert lines[0] == "units over the last 4 of 120 steps"
    cells = [line.split() for line in lines]
    assert cells[1:5] == [
        ["name", "layer", "units", "dead", "dormant", "active", "longest", "silence"],
        ["1", "GELU", "3", "1*", "33.3%", "0", "66.7%", "120", "steps"],
        ["3", "ReLU", "4", "2", "50.0%", "2", "25.0%", "120", "steps"],
        ["all", "7", "3", "42.9%", "2"],
    ]
    assert lines[5] == "* never above 0, where some gradient passes: such a unit can come back"
    assert lines[6] == "3: 1 units with outputs that are NaN"
    assert str(monitor) == monitor.table() == str(report := monitor.report())
    shown = "3, ReLU: 2 of 4 channels dead, 25.0% of outputs active, NaN in 1; 8 images"
    assert str(report["3"]) == shown


def test_a_report_is_read_by_name() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network)
    network(torch.randn(4, 3, 8, 8))
    report = monitor.report()
    assert [layer.name for layer in report] == ["1", "4"]
    assert len(report) == 2
    assert report.channels == 11
    assert report.dead_count == report["1"].dead_count + report["4"].dead_count
    assert report.dead_share == report.dead_count / 11
    with pytest.raises(
        KeyError, match=r"expected the name of a layer that ran, got 'x'; there are"
    ):
        report["x"]


def test_before_the_first_step() -> None:
    monitor = DeadUnitMonitor(small_network())
    report = monitor.report()
    assert (report.steps, report.window_steps, report.layers) == (0, 0, ())
    assert report.dead_share == 0
    assert str(monitor).splitlines()[-1] == "never ran: 1, 4"


def test_warnings_once_for_each_crossing() -> None:
    model = nn.Sequential(nn.ReLU())
    monitor = DeadUnitMonitor(model, window=2, warn_share=0.5)
    alive, dead = torch.ones(1, 4), torch.tensor([[1.0, -1.0, -1.0, -1.0]])

    def run(batch: torch.Tensor) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(batch)
            model(batch)
        assert all(warning.category is DeadUnitWarning for warning in caught)
        return [str(warning.message) for warning in caught]

    assert run(alive) == []
    message = "3 of 4 units of '0' did not fire in the last 2 steps: more than 50%"
    assert run(dead) == [message]
    assert run(dead) == []
    assert run(alive) == []
    assert run(dead) == [message]
    assert [layer.name for layer in monitor.check()] == ["0"]
    assert monitor.check(0.75) == []


def test_a_check_needs_a_share() -> None:
    for share in (None, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"expected share .* to be from 0 to 1, got {share}"):
            DeadUnitMonitor(nn.ReLU()).check(share)


@pytest.mark.filterwarnings("error")
def test_nobody_is_warned_by_default() -> None:
    relu = nn.ReLU()
    monitor = DeadUnitMonitor(relu, window=1)
    relu(-torch.ones(1, 4))
    with pytest.warns(DeadUnitWarning, match="4 of 4 units"):
        monitor.check(0.5)


def test_the_heat_map(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    model = Reusing()
    model.narrow.bias = nn.Parameter(torch.tensor([0.0, -1e3, 0.0, 0.0]))
    monitor = DeadUnitMonitor(model)
    for _ in range(70):
        model(torch.randn(2, 3, 9, 9))
    monitor.heat_map(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    axes = Figure().subplots()
    monitor.heat_map(axes)
    first, second = (image.get_array() for image in axes.images)
    assert first is not None
    assert second is not None
    assert first.shape == (4, 35)
    assert second.shape == (7, 35)
    assert (first[1] == 0).all()
    red, green, blue, _ = axes.images[0].to_rgba(np.zeros(1))[0]
    assert red > 2 * green
    assert red > 2 * blue
    history = monitor._watched[0].records[0].history
    assert first[2, 3] == history[3, 2] / history[3, -1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["relu", "relu#2"]


def test_the_heat_map_of_a_small_model_has_room_for_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    relu = nn.ReLU()
    monitor = DeadUnitMonitor(relu)
    relu(torch.ones(1, 4))
    monitor.heat_map(tmp_path / "map.png")
    (figure,) = figures
    figure.draw_without_rendering()
    axes, scale = figure.axes
    words = scale.yaxis.label.get_window_extent()
    assert words.y0 >= 0
    assert words.y1 <= figure.bbox.height
    assert all(float(step).is_integer() for step in axes.get_xticks())


def test_a_heat_map_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"^DeadUnitMonitor.heat_map: expected at least one step"):
        DeadUnitMonitor(nn.ReLU()).heat_map("map.png")


def test_a_heat_map_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    relu = nn.ReLU()
    monitor = DeadUnitMonitor(relu)
    relu(torch.ones(1, 4))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"heat_map: expected matplotlib to be installed"):
        monitor.heat_map("map.png")


class Writer:
    """Records what it gets; the test below compares it with torch's, which needs tensorboard."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[str, Any, Any]]] = {"scalar": [], "histogram": []}

    def add_scalar(
        self,
        tag: str,
        scalar_value: Any,
        global_step: Any = None,
        walltime: Any = None,
        new_style: Any = False,
        double_precision: Any = False,
    ) -> None:
        self.calls["scalar"].append((tag, float(scalar_value), global_step))

    def add_histogram(
        self,
        tag: str,
        values: Any,
        global_step: Any = None,
        bins: Any = "tensorflow",
        walltime: Any = None,
        max_bins: Any = None,
    ) -> None:
        self.calls["histogram"].append((tag, values.detach().cpu().numpy(), global_step))


@pytest.mark.parametrize("name", ["add_scalar", "add_histogram"])
def test_the_writer_is_like_the_one_of_torch(name: str) -> None:
    """By its source: importing it needs tensorboard, twenty megabytes for these two methods."""
    source = Path(torch.__file__).parent / "utils" / "tensorboard" / "writer.py"
    (theirs,) = (
        method
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "SummaryWriter"
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == name
    )
    mine = list(inspect.signature(getattr(Writer, name)).parameters)
    assert [argument.arg for argument in theirs.args.args] == mine


def test_writing_to_tensorboard() -> None:
    network = small_network()
    monitor = DeadUnitMonitor(network)
    for _ in range(3):
        network(torch.randn(4, 3, 8, 8))
    writer = Writer()
    monitor.write_to(writer)
    monitor.write_to(writer, 7, tag="net")
    scalars = {tag: (value, step) for tag, value, step in writer.calls["scalar"]}
    layer = monitor.report()["1"]
    assert scalars["units/1/dead_share"] == (1 / 6, 3)
    assert scalars["net/1/active_fraction"] == (layer.active_fraction, 7)
    assert scalars["units/dead_share"] == (monitor.report().dead_share, 3)
    assert scalars["units/4/dormant_share"][1] == 3
    histograms = {tag: values for tag, values, _ in writer.calls["histogram"]}
    assert histograms["units/1/steps_since_fired"].tolist() == [0, 0, 3, 0, 0, 0]
    assert histograms["units/1/active_fraction_by_unit"][2] == 0


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "expected window to be 1 or more, got 0"),
        ({"window": 2.5}, TypeError, "expected window to be an integer, got 2.5"),
        ({"blocks": 0}, ValueError, "expected blocks to be 1 or more, got 0"),
        ({"blocks": True}, TypeError, "expected blocks to be an integer, got True"),
        ({"tau": -1}, ValueError, "expected tau to be 0 or above, got -1"),
        ({"tau": math.nan}, ValueError, "expected tau to be 0 or above, got nan"),
        ({"warn_share": 50}, ValueError, "expected warn_share to be from 0 to 1, got 50"),
        ({"layers": ["7"]}, ValueError, "expected layers to name modules of the model, got '7'; "),
        ({"layers": "1"}, TypeError, "expected layers to be a list of names, got '1'"),
        ({"layers": []}, ValueError, "expected a model with activation modules, got none; name "),
        ({"channel_dims": {"0": 1}}, ValueError, "expected channel_dims to name layers that are "),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    network = small_network()
    with pytest.raises(error, match=rf"^DeadUnitMonitor: {message}"):
        DeadUnitMonitor(network, **options)
    assert not any(module._forward_hooks for module in network.modules())


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module, got function"):
        DeadUnitMonitor(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected a model with activation modules, got none"):
        DeadUnitMonitor(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("module", "batch", "got"),
    [
        (nn.LSTM(2, 3), torch.randn(4, 2), "tuple"),
        (nn.Identity(), torch.ones(2, 2).long(), "int64"),
    ],
)
def test_a_layer_whose_output_cannot_be_counted(
    module: nn.Module, batch: torch.Tensor, got: str
) -> None:
    model = nn.Sequential(module)
    DeadUnitMonitor(model, layers=["0"])
    with pytest.raises(
        TypeError, match=rf"expected the output of '0' to be a tensor .* got .*{got}"
    ):
        model(batch)
