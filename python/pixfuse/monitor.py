"""Which units of a network live, step by step, without waiting for the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from pixfuse._firing import (
    PRE_SQUARES,
    PRE_SUM,
    Channels,
    Firing,
    channels_of,
    count_firing,
    count_moments,
    find_channel_dim,
    firing_after,
    firing_of,
    is_recorded,
)
from pixfuse._unit_record import COLUMNS, TENSORS, Record
from pixfuse._unit_report import LayerReport, MonitorReport, report_of
from pixfuse.activity import UnitActivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.distributed import ProcessGroup

__all__ = ["DeadUnitMonitor", "DeadUnitWarning", "LayerReport", "MonitorReport"]

_VERSION = 1
#: So many calls of an activation outside of the model's forward, and no step between them, are not
#: of so many units: steps do not end.
_CALLS_OUTSIDE = 64


class DeadUnitWarning(UserWarning):
    """More units of a layer than the set share have not fired over the whole window."""


class _Watched:
    """A module whose units are counted; one record, or one for each call within a forward."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        firing: Firing | None,
        before: tuple[Channels, ...],
    ) -> None:
        self.name = name
        self.module = module
        self.firing = firing  # None: the module counts by itself
        self.before = before  # the layers before it, the nearest first
        self.records: list[Record] = []
        self.calls = 0
        self.moments: torch.Tensor | None = None

    @property
    def owns_units(self) -> bool:
        """Whether it has weights, so that all of its calls are of the same units."""
        return self.firing is None or self.firing.rule == "before"

    @property
    def layer(self) -> str:
        return type(self.module).__name__ if self.firing is None else self.firing.layer

    @property
    def stops(self) -> bool:
        return self.firing is None or self.firing.stops

    def key(self, index: int) -> str:
        return self.name if index == 0 else f"{self.name}#{index + 1}"


class MonitorHook:
    """Calls a function. A copy of it, in a copy of the model, calls nobody."""

    def __init__(self, function: Any = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if self.function is not None:
            self.function(*args)

    def __deepcopy__(self, memo: object) -> MonitorHook:
        return MonitorHook()

    def __reduce__(self) -> tuple[type[MonitorHook], tuple[()]]:
        return MonitorHook, ()


def _untraced_hook(function: Any) -> MonitorHook:
    """One that torch.compile does not look into: it would compile again for each value it sees."""

    class Untraced(MonitorHook):
        __call__ = torch.compiler.disable(
            MonitorHook.__call__,
            reason="DeadUnitMonitor ends a step here: close it, or make it with auto_step=False",
        )

    return Untraced(function)


class DeadUnitMonitor:
    """Count, over the steps of training or evaluation, which units of a model fire.

    A unit is an output channel. It is ``dead`` when none of its outputs fired over the window, and
    ``dormant`` when their mean magnitude is at most ``tau`` times the mean over its layer's units.
    To fire is to be on the side where the activation lets the gradient through: an output above 0
    (``ReLU``, ``conv_bias_relu``), strictly between the ends (``ReLU6``, ``Hardtanh``), an input
    above 0 (``PReLU``), or an output above 0, which is an input above 0, though some gradient
    passes below 0 too (``LeakyReLU``, ``RReLU``, ``ELU``, ``CELU``, ``SELU``, ``GELU``, ``SiLU``,
    ``Mish``, ``Hardswish``: marked in the table). A NaN does not fire, and is counted apart.

    Nothing is read from the device during a step: counts are added to tensors that stay there.
    Modules are watched by hooks, so a functional ``relu`` is not seen: name the layer before it in
    ``layers``. Activations of :class:`pixfuse.nn.ConvBiasReLU2d` are taken as its kernel counted
    them. Where an activation module is called several times in a forward, each call has its own
    units, under ``name#2``, ``name#3``; a layer with weights has the same units in all calls.
    Layers that checkpointing runs again in the backward pass are not counted again. Recording the
    model, by ``torch.export`` or ``torch.jit.trace``, is no step, nor is a forward within
    transforms of ``torch.func`` (``grad``, ``vmap``). Give it the model that ``torch.compile``
    made, before its first call: the counting becomes part of the graph, also with
    ``fullgraph=True``. Where what calls the model is compiled too, a graph ends with each step;
    ``auto_step=False`` keeps it whole. What was compiled before is not seen: such layers never ran,
    says the table. A copy or a pickle of the model does not count for this monitor; nor can it tell
    forwards apart that run in several threads at once.

    Args:
        model: whose layers are watched, on any device; one that was wrapped by
            ``DistributedDataParallel`` or ``torch.compile`` too.
        window: how many of the last steps ``dead``, ``dormant`` and the shares are about; 1 or
            more.
        layers: names of the modules to watch, as in ``model.named_modules()``: activations, modules
            that count by themselves, and any other module, whose output goes into a functional
            ReLU.
            Default: all activations and all modules that count by themselves.
        tau: the threshold of ``dormant``, 0 or above; ReDo uses 0.025 to 0.1.
        pre_activation: also the mean and standard deviation of what goes into each activation; not
            of modules that count by themselves, which have no such tensor.
        warn_share: from 0 to 1: :meth:`check` at the end of every window, which waits for the
            device, and warns of layers with a larger share of dead units. Default: nobody is
            warned.
        only_training: count only while ``model.training``.
        auto_step: a step ends with each forward of ``model``. False: with each call of
            :meth:`step`, for gradients accumulated over several forwards, or captured CUDA graphs.
            What ran outside of a forward of the whole model belongs to the step that ends next.
        merge_calls: count several calls of one activation in a forward as the same units.
        channel_dims: from a layer's name to the dimension of its channels. Default: where the
            nearest layer defined before it that has as many puts them, which is 1 for convolutions
            and -1 for linear layers; without one that fits, 1, but the last of two.
        blocks: the window is kept as this many sums, so memory is bounded: it moves on by
            ``window / blocks`` steps at a time, holds at most ``window`` steps and says how many.
            As large as ``window``, it is exactly the last ``window`` steps. Each channel takes
            ``8 * (4 * blocks + 73)`` bytes.

    Returns:
        A context manager: the hooks are removed at its end, also after an error, or by
        :meth:`close`. The counts can still be read then.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a number out of range, a name that is not in the model, no layer to watch; in
            the first forward, channels that cannot be told; after 64 calls of an activation by
            parts of the model alone, that no step ends.
        NotImplementedError: ``torch.nn.DataParallel`` in it, whose copies run side by side.

    Equivalent to::

        dead = torch.stack([(relu(x) > 0).sum((0, 2, 3)) for x in window]).sum(0) == 0

    Source:
        Dead units: Lu et al., arXiv 1903.06733. Dormant: Sokar et al., arXiv 2302.12902. Steps
        since last fired: as in the training of sparse autoencoders.
    """

    def __init__(
        self,
        model: nn.Module,
        window: int = 100,
        *,
        layers: Sequence[str] | None = None,
        tau: float = 0.025,
        pre_activation: bool = False,
        warn_share: float | None = None,
        only_training: bool = False,
        auto_step: bool = True,
        merge_calls: bool = False,
        channel_dims: Mapping[str, int] | None = None,
        blocks: int = 10,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"DeadUnitMonitor: expected model to be a torch.nn.Module, got "
                f"{type(model).__name__}"
            )
        if any(isinstance(module, nn.DataParallel) for module in model.modules()):
            raise NotImplementedError(
                "DeadUnitMonitor: expected a model whose layers run once for each batch, got "
                "torch.nn.DataParallel; use DistributedDataParallel"
            )
        for name, value in (("window", window), ("blocks", blocks)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"DeadUnitMonitor: expected {name} to be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"DeadUnitMonitor: expected {name} to be 1 or more, got {value}")
        if not tau >= 0:
            raise ValueError(f"DeadUnitMonitor: expected tau to be 0 or above, got {tau}")
        if warn_share is not None and not 0 <= warn_share <= 1:
            raise ValueError(
                f"DeadUnitMonitor: expected warn_share to be from 0 to 1, got {warn_share}"
            )
        self.tau = tau
        self.warn_share = warn_share
        self.only_training = only_training
        self.auto_step = auto_step
        self.merge_calls = merge_calls
        self.steps = 0  #: How many steps are over.
        self._block_steps = -(-window // blocks)
        self._blocks = window // self._block_steps
        self._column_steps = 1
        self._pre_activation = pre_activation
        self._channel_dims = dict(channel_dims or {})
        self._warned: set[str] = set()
        self._closed = False
        self._inside = False  # a forward of the model
        self._model = model
        self._watched = _find_layers(model, layers)
        for name in self._channel_dims:
            if all(watched.name != name for watched in self._watched):
                raise ValueError(
                    "DeadUnitMonitor: expected channel_dims to name layers that are watched, got "
                    f"{name!r}"
                )
        self._handles: list[Any] = []
        for watched in self._watched:
            self._handles += self._hook(watched)
        self._handles.append(model.register_forward_pre_hook(MonitorHook(self._begin)))
        if auto_step:
            self._handles.append(model.register_forward_hook(_untraced_hook(self._end)))

    # --- during a step: nothing here may wait for the device ---

    def _hook(self, watched: _Watched) -> Iterator[Any]:
        module = watched.module
        if watched.firing is None:
            yield module.register_activity_hook(  # type: ignore[operator]
                MonitorHook(lambda _, activity: self._take(watched, activity))
            )
            return
        # Before, because an activation in place overwrites what it gets.
        if self._pre_activation and watched.firing.rule != "before":
            yield module.register_forward_pre_hook(
                MonitorHook(lambda _, args, kwargs: self._look_before(watched, args, kwargs)),
                with_kwargs=True,
            )
        yield module.register_forward_hook(
            MonitorHook(lambda _, args, kwargs, output: self._look(watched, args, kwargs, output)),
            with_kwargs=True,
        )

    def _listens(self) -> bool:
        if self._closed or (self.only_training and not self._model.training):
            return False
        if is_recorded():
            return False  # that is no step, and the counting would be recorded with the model
        if torch.compiler.is_compiling():
            return True
        if torch._C._functorch.maybe_current_level() is not None:
            return False  # what torch.func transforms may not add to a tensor from outside
        # Within a backward pass it is checkpointing that runs a layer again.
        return torch._C._current_graph_task_id() == -1

    def _begin(self, *_: object) -> None:
        if self._listens():
            self._inside = True
            for watched in self._watched:
                watched.calls = 0

    def _end(self, *_: object) -> None:
        self._inside = False
        if self._listens():
            self.step()

    def _look_before(self, watched: _Watched, args: Any, kwargs: Any) -> None:
        if self._listens():
            values = _first(args, kwargs).detach()
            watched.moments = count_moments(values, self._channel_dim(watched, values))

    def _look(self, watched: _Watched, args: Any, kwargs: Any, output: Any) -> None:
        assert watched.firing is not None
        if not self._listens():
            return
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            what = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
            raise TypeError(
                f"DeadUnitMonitor: expected the output of {watched.name!r} to be a tensor of a "
                f"float dtype, got {what}"
            )
        output = output.detach()
        dim = self._channel_dim(watched, output)
        input = _first(args, kwargs).detach() if watched.firing.rule == "input" else None
        rows, positions, images = count_firing(watched.firing, input, output, dim)
        moments, watched.moments = watched.moments, None
        if self._pre_activation and watched.firing.rule == "before":
            moments = count_moments(output, dim)
        self._record(watched, rows).add(rows, positions, images, moments)

    def _take(self, watched: _Watched, activity: UnitActivity) -> None:
        if self._listens():
            sums = torch.nan_to_num(activity.output_sum, 0.0, math.inf, -math.inf)
            counts = (activity.active, activity.active_images, activity.nan, sums)
            rows = torch.stack([row.double() for row in counts])
            self._record(watched, rows).add(rows, activity.positions, activity.images, None)

    def _channel_dim(self, watched: _Watched, values: torch.Tensor) -> int:
        chosen = self._channel_dims.get(watched.name)
        return find_channel_dim(watched.name, values, chosen, watched.before)

    def _record(self, watched: _Watched, rows: torch.Tensor) -> Record:
        """The record of this call; made when the number of channels is seen for the first time."""
        index = 0 if watched.owns_units or self.merge_calls else watched.calls
        watched.calls += 1
        channels = rows.shape[1]
        if index == len(watched.records):
            if index == _CALLS_OUTSIDE and self.auto_step and not self._inside:
                raise ValueError(
                    "DeadUnitMonitor: expected a forward of the whole model to end each step, got "
                    f"{index} calls of {watched.name!r} outside of one; give the monitor the "
                    "module that is called, end steps by step() with auto_step=False, or leave "
                    "evaluation out with only_training=True"
                )
            pre = self._pre_activation and watched.firing is not None
            count = PRE_SQUARES + 1 if pre else PRE_SUM
            watched.records.append(Record(count, channels, self._blocks, rows.device))
        record = watched.records[index]
        if record.channels != channels:
            raise ValueError(
                f"DeadUnitMonitor: expected {watched.key(index)!r} to have {record.channels} "
                f"channels, as before, got {channels}"
            )
        record.to(rows.device)
        return record

    def step(self) -> None:
        """End a step: what was counted since the last one becomes part of the window.

        Called at the end of each forward, unless ``auto_step=False``.

        Returns:
            Nothing; nothing is read from the device, but for a check at the end of a window where
            ``warn_share`` is set.

        Raises:
            DeadUnitWarning: as a warning, from that check.
        """
        block, within = divmod(self.steps, self._block_steps)
        if self.steps == COLUMNS * self._column_steps:
            self._column_steps *= 2
            for _, record in self._records():
                record.halve_history()
        column = self.steps // self._column_steps
        self.steps += 1
        for watched in self._watched:
            watched.calls = 0
            for record in watched.records:
                record.end_step(self.steps, block % self._blocks, within == 0, column)
        if self.warn_share is not None and self.steps % (self._blocks * self._block_steps) == 0:
            self.check()

    # --- reading ---

    def _records(self) -> Iterator[tuple[str, Record]]:
        for watched in self._watched:
            for index, record in enumerate(watched.records):
                yield watched.key(index), record

    @property
    def window_steps(self) -> int:
        """How many of the last steps the window holds now."""
        return self._window_after(self.steps)

    def _window_after(self, steps: int) -> int:
        if steps == 0:
            return 0
        in_block = (steps - 1) % self._block_steps + 1
        return min(steps, (self._blocks - 1) * self._block_steps + in_block)

    def report(self) -> MonitorReport:
        """Read the counts: what waits for the device.

        Returns:
            A :class:`pixfuse.monitor.MonitorReport`, whose tensors are on the CPU; ``print`` it.

        Raises:
            Nothing.
        """
        summaries = {
            key: (
                record.ring.sum(0) + record.open,
                record.total + record.open,
                record.since_fired(self.steps),
            )
            for key, record in self._records()
        }
        return self._report(summaries, self.steps)

    def _report(
        self,
        summaries: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        steps: int,
    ) -> MonitorReport:
        layers = []
        for watched in self._watched:
            index = 0
            while (key := watched.key(index)) in summaries:
                layers.append(
                    report_of(key, watched.layer, watched.stops, self.tau, *summaries[key])
                )
                index += 1
        ran = {layer.name for layer in layers}
        missing = tuple(watched.name for watched in self._watched if watched.name not in ran)
        return MonitorReport(steps, self._window_after(steps), tuple(layers), missing)

    def table(self) -> str:
        """Make a table of all layers, in plain text.

        Returns:
            ``str(self.report())``.

        Raises:
            Nothing.
        """
        return str(self.report())

    def __str__(self) -> str:
        return self.table()

    def check(self, share: float | None = None) -> list[LayerReport]:
        """Warn of layers with too many dead units: once, until they have fewer again.

        Args:
            share: from 0 to 1: more dead units than this are too many. Default ``warn_share``.

        Returns:
            The reports of all layers that have too many, warned of now or before.

        Raises:
            ValueError: neither ``share`` nor ``warn_share`` is set, or it is out of range.
            DeadUnitWarning: as a warning, for each layer that has too many since now.
        """
        share = self.warn_share if share is None else share
        if share is None or not 0 <= share <= 1:
            raise ValueError(
                "DeadUnitMonitor.check: expected share or warn_share to be from 0 to 1, got "
                f"{share}"
            )
        report = self.report()
        above = [layer for layer in report if layer.dead_share > share]
        names = {layer.name for layer in above}
        fresh = names - self._warned
        self._warned = names
        for layer in above:
            if layer.name in fresh:
                warnings.warn(
                    f"{layer.dead_count} of {layer.channels} units of {layer.name!r} did not fire "
                    f"in the last {report.window_steps} steps: more than {share:.0%}",
                    DeadUnitWarning,
                    stacklevel=2,
                )
        return above

    def all_reduce(self, group: ProcessGroup | None = None) -> MonitorReport:
        """Report what all ranks of a process group counted together.

        Counts are summed, and a unit fired last when it last did on any rank. Of unequal numbers of
        steps the largest is reported; each rank's window is of its own last ones. The monitors
        themselves stay as they are, so it can be called again and again.

        Args:
            group: the ranks; default all of them. Every rank of it must call.

        Returns:
            A :class:`pixfuse.monitor.MonitorReport`, the same on every rank.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialized.
            ValueError: the ranks watch different layers, or with different windows.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "DeadUnitMonitor.all_reduce: expected torch.distributed to be initialized, got no "
                "process group; call torch.distributed.init_process_group first"
            )
        records = dict(self._records())
        names = [watched.name for watched in self._watched]
        window = (self._blocks, self._block_steps, self._pre_activation)
        shapes = {key: tuple(record.open.shape) for key, record in records.items()}
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        own = (names, window, self.steps, shapes)
        torch.distributed.all_gather_object(gathered, own, group=group)
        # After the exchange, so that all ranks fail when one does.
        every: dict[str, tuple[int, int]] = {}
        for their_names, their_window, _, their_shapes in gathered:
            if (their_names, their_window) != (names, window):
                raise ValueError(
                    "DeadUnitMonitor.all_reduce: expected all ranks to watch the same layers in "
                    f"the same way, got {names} and {their_names}, windows {window} and "
                    f"{their_window}"
                )
            for key, shape in their_shapes.items():
                if every.setdefault(key, shape) != shape:
                    raise ValueError(
                        f"DeadUnitMonitor.all_reduce: expected {key!r} to have as many channels on "
                        f"all ranks, got {every[key][1] - 1} and {shape[1] - 1}"
                    )
        steps = max(entry[2] for entry in gathered)
        if not every:
            return self._report({}, steps)
        device = next((record.open.device for record in records.values()), torch.device("cpu"))
        sums, since = [], []
        for key, (rows, columns) in sorted(every.items()):
            # A layer that has not run here has counted nothing.
            record = records.get(key) or Record(rows, columns - 1, 1, device)
            sums += [record.ring.sum(0) + record.open, record.total + record.open]
            since.append(record.since_fired(steps))
        flat = torch.cat([tensor.to(device).flatten() for tensor in sums])
        flat_since = torch.cat([tensor.to(device) for tensor in since])
        torch.distributed.all_reduce(flat, group=group)
        torch.distributed.all_reduce(flat_since, op=torch.distributed.ReduceOp.MIN, group=group)
        summaries = {}
        for key, (rows, columns) in sorted(every.items()):
            size = rows * columns
            window_sum, total, flat = flat[:size], flat[size : 2 * size], flat[2 * size :]
            last, flat_since = flat_since[: columns - 1], flat_since[columns - 1 :]
            summaries[key] = (window_sum.view(rows, -1), total.view(rows, -1), last)
        return self._report(summaries, steps)

    # --- pictures and logs ---

    def heat_map(self, target: str | Path | Axes) -> None:
        """Draw how often each channel fired, from the first step to the last: channels x time.

        All layers have the same height; a channel's color is the share of its outputs that fired,
        red where none did. There are at most 64 columns, of as many steps as it takes.

        Args:
            target: the path of a PNG file, or the axes of matplotlib to draw in.

        Returns:
            Nothing.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: nothing was counted yet.
        """
        try:
            import matplotlib as mpl
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
            from matplotlib.ticker import MaxNLocator
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "DeadUnitMonitor.heat_map: expected matplotlib to be installed, got: "
                f"{error}; pip install matplotlib"
            ) from error
        records = list(self._records())
        if self.steps == 0 or not records:
            raise ValueError("DeadUnitMonitor.heat_map: expected at least one step, got none")
        # Of few layers, as high as the words beside the scale are long.
        height = max(1.4 + 0.55 * len(records), 3.2)
        figure = Figure(figsize=(9, height), layout="constrained")
        axes = figure.subplots() if isinstance(target, (str, Path)) else target
        colors = mpl.colormaps["viridis"].with_extremes(under="#d64545", bad="#e4e7eb")
        columns = -(-self.steps // self._column_steps)
        for row, (_, record) in enumerate(records):
            history = record.history[:columns].cpu().T
            shares = (history[:-1] / history[-1]).numpy()  # NaN where the layer did not run
            image = axes.imshow(
                shares,
                cmap=colors,
                vmin=1e-12,
                vmax=1,
                aspect="auto",
                interpolation="nearest",
                extent=(0, columns * self._column_steps, row + 1, row),
            )
            axes.axhline(row, color="white", linewidth=1)
        axes.set_ylim(len(records), 0)
        axes.set_yticks([row + 0.5 for row in range(len(records))], [name for name, _ in records])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, self.steps)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel("step")
        if isinstance(target, (str, Path)):
            figure.colorbar(image, ax=axes, label="share of outputs that fired")
            dead = Patch(color="#d64545", label="none fired")
            axes.legend(handles=[dead], loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
            figure.savefig(target, dpi=120, format="png")

    def write_to(self, writer: Any, step: int | None = None, tag: str = "units") -> None:
        """Write the report to TensorBoard.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar`` and
                ``add_histogram``.
            step: the number of the step; default the number of steps that were counted.
            tag: what the tags begin with: ``units/conv1/dead_share`` and so on.

        Returns:
            Nothing.

        Raises:
            Nothing of its own.
        """
        step = self.steps if step is None else step
        report = self.report()
        writer.add_scalar(f"{tag}/dead_share", report.dead_share, step)
        for layer in report:
            name = f"{tag}/{layer.name}"
            writer.add_scalar(f"{name}/dead_share", layer.dead_share, step)
            dormant = int(layer.dormant.sum()) / max(layer.channels, 1)
            writer.add_scalar(f"{name}/dormant_share", dormant, step)
            if layer.window.positions:
                writer.add_scalar(f"{name}/active_fraction", layer.active_fraction, step)
                writer.add_histogram(
                    f"{name}/active_fraction_by_unit", layer.window.active_fraction, step
                )
            writer.add_histogram(f"{name}/steps_since_fired", layer.steps_since_fired, step)

    # --- keeping ---

    def state_dict(self) -> dict[str, Any]:
        """Copy all counts into a dictionary of tensors and numbers, to be saved with a checkpoint.

        Returns:
            What :meth:`load_state_dict` takes; ``torch.save`` and ``torch.load`` keep it.

        Raises:
            Nothing.
        """
        return {
            "version": _VERSION,
            "steps": self.steps,
            "blocks": self._blocks,
            "block_steps": self._block_steps,
            "column_steps": self._column_steps,
            "pre_activation": self._pre_activation,
            "warned": sorted(self._warned),
            "layers": {
                watched.name: [
                    {name: getattr(record, name).clone() for name in TENSORS}
                    for record in watched.records
                ]
                for watched in self._watched
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, as if nothing had been in between.

        Args:
            state: of a monitor of the same layers with the same ``window``, ``blocks`` and
                ``pre_activation``. Its tensors may be on another device.

        Returns:
            Nothing.

        Raises:
            TypeError: it is no mapping.
            ValueError: it is of another version, of another monitor, or damaged; nothing is changed
                then.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping):
            raise TypeError(
                "DeadUnitMonitor.load_state_dict: expected what state_dict() gives, got "
                f"{type(state).__name__}"
            )
        missing = [name for name in own if name not in state]
        if missing:
            raise ValueError(
                "DeadUnitMonitor.load_state_dict: expected what state_dict() gives, got a state "
                f"without {missing[0]!r}"
            )
        for name in ("version", "blocks", "block_steps", "pre_activation"):
            if state[name] != own[name]:
                raise ValueError(
                    f"DeadUnitMonitor.load_state_dict: expected {name} {own[name]}, got "
                    f"{state[name]}"
                )
        names = [watched.name for watched in self._watched]
        if sorted(state["layers"]) != sorted(names):
            raise ValueError(
                f"DeadUnitMonitor.load_state_dict: expected the layers {names}, got "
                f"{list(state['layers'])}"
            )
        loaded = []
        for watched in self._watched:
            records = []
            for saved in state["layers"][watched.name]:
                missing = [name for name in TENSORS if name not in saved]
                if missing:
                    raise ValueError(
                        "DeadUnitMonitor.load_state_dict: expected records with "
                        f"{', '.join(TENSORS)}, got one of {watched.name} without {missing[0]!r}"
                    )
                rows, columns = saved["open"].shape
                record = Record(rows, columns - 1, self._blocks, saved["open"].device)
                for name in TENSORS:
                    own_tensor = getattr(record, name)
                    if saved[name].shape != own_tensor.shape:
                        raise ValueError(
                            f"DeadUnitMonitor.load_state_dict: expected {name!r} of "
                            f"{watched.name} of shape {tuple(own_tensor.shape)}, got "
                            f"{tuple(saved[name].shape)}"
                        )
                    own_tensor.copy_(saved[name])
                records.append(record)
            loaded.append(records)
        for watched, records in zip(self._watched, loaded, strict=True):
            watched.records = records
        self.steps = state["steps"]
        self._column_steps = state["column_steps"]
        self._warned = set(state["warned"])

    def close(self) -> None:
        """Remove the hooks; the counts stay.

        Returns:
            Nothing.

        Raises:
            Nothing.
        """
        self._closed = True
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> DeadUnitMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "DeadUnitMonitor: expected its state_dict() to be copied or pickled, got the monitor, "
            "which hangs on a model"
        )


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What an activation was called with."""
    tensor: torch.Tensor = args[0] if args else kwargs["input"]
    return tensor


def _find_layers(model: nn.Module, names: Sequence[str] | None) -> list[_Watched]:
    """The layers to watch, each with where those before it in the model put their channels."""
    while True:  # to the model that somebody wrote, whose names everybody knows
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # compiled
            model = inner
        else:
            break
    if isinstance(names, str):
        raise TypeError(f"DeadUnitMonitor: expected layers to be a list of names, got {names!r}")
    modules = dict(model.named_modules())
    for name in names or ():
        if name not in modules:
            raise ValueError(
                "DeadUnitMonitor: expected layers to name modules of the model, got "
                f"{name!r}; model.named_modules() lists them"
            )
    found: list[_Watched] = []
    before: tuple[Channels, ...] = ()  # the nearest first
    for name, module in modules.items():
        counts = callable(getattr(module, "register_activity_hook", None))
        own = channels_of(module)
        up_to_here = before if own is None else tuple(dict.fromkeys((own, *before)))
        firing = firing_of(module)
        if firing is None and not counts and names is not None and name in names:
            found.append(_Watched(name, module, firing_after(module), up_to_here))
        elif (counts or firing is not None) and (names is None or name in names):
            found.append(_Watched(name, module, None if counts else firing, before))
        before = up_to_here
    if not found:
        raise ValueError(
            "DeadUnitMonitor: expected a model with activation modules, got none; name the layers "
            "that a functional relu follows: layers=['conv1', 'fc1']"
        )
    return found
