"""The commands of ``pixfuse``: stats, info, show and bench."""

from __future__ import annotations

import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pixfuse._library import info as library_info
from pixfuse._output_files import NotWrittenError, unfinished_of
from pixfuse.normalization import (
    CIFAR10,
    CIFAR100,
    CLIP,
    FASHION_MNIST,
    IMAGENET,
    IMAGENET_DPN,
    KINETICS,
    MNIST,
    SIGNED,
    SVHN,
    UNIT,
    Normalization,
)
from pixfuse.statistics import ChannelStatistics

PRESETS = {
    "unit": UNIT,
    "signed": SIGNED,
    "imagenet": IMAGENET,
    "imagenet-dpn": IMAGENET_DPN,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "svhn": SVHN,
    "mnist": MNIST,
    "fashion-mnist": FASHION_MNIST,
    "clip": CLIP,
    "kinetics": KINETICS,
}

#: Exit codes beside 0, and 2 of a wrong command line.
FAILED, UNREADABLE, NOTHING = 1, 3, 4

#: Every fold has counts of its own, in memory and between processes.
MOST_FOLDS = 1000

EXIT_CODES = """\b
Exit codes: 0 done; 1 an error, or a library is missing; 2 a wrong command
line; 3 an unreadable file under --strict; 4 no image could be read; 130 or
143 interrupted by Ctrl-C or SIGTERM, what was counted is saved."""

Function = TypeVar("Function", bound=Callable[..., Any])


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End with a message."""
    click.echo(f"pixfuse: {message}", err=True)
    sys.exit(code)


@contextmanager
def extra(purpose: str) -> Iterator[None]:
    """Say what to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(
            f"expected {error.name} to be installed {purpose}, got none; pip install 'pixfuse[cli]'"
        )


def json_option(function: Function) -> Function:
    """The option that every command has."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON to stdout, and nothing else there."
    )(function)


def print_json(content: Any) -> None:
    """Without NaN and infinities, which JSON does not have."""
    click.echo(json.dumps(content, indent=2, allow_nan=False))


def console() -> Console:
    """Where tables go; as wide as they need where nobody looks."""
    plain: Any = {"highlight": False, "markup": False, "emoji": False}  # names are no markup
    out = Console(**plain)
    return out if out.is_terminal else Console(**plain, width=200)


def check_output(option: str, path: Path) -> None:
    """Say at once, and not after an hour of counting, that a file cannot be written there."""
    if not path.name:
        raise click.UsageError(f"expected {option} to be the name of a file, got ''")
    try:
        if not path.absolute().parent.is_dir():
            raise click.UsageError(
                f"expected {option} in a folder that exists, got {str(path)!r}; make it first"
            )
        if path.exists() and not path.is_file():
            raise click.UsageError(
                f"expected {option} to be a new or a regular file, got {str(path)!r}, which is "
                "neither; choose another"
            )
        unfinished = unfinished_of(path)
        unfinished.touch()
        unfinished.unlink()
    except OSError as error:
        raise click.UsageError(
            f"expected {option} to be a file that can be written, got {str(path)!r} "
            f"({error.strerror}); choose another"
        ) from None


def check_no_input(option: str, path: Path, inputs: Iterable[str | Path]) -> None:
    """What is read is not to be replaced by what is written, under whatever name."""
    if not path.exists():
        return
    status = path.stat()
    for one in inputs:
        try:
            same = os.path.samestat(os.stat(one), status)  # noqa: PTH116  (also of many files)
        except OSError:
            continue  # what is not there cannot be replaced
        if same:
            raise click.UsageError(
                f"expected {option} to be none of the files that are read, got {str(path)!r}; "
                "choose another"
            )


class _Commands(click.Group):
    """Commands that end as their exit codes say, wherever they are interrupted."""

    def invoke(self, context: click.Context) -> Any:
        """Run one."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:  # before counting began, or a second one; click would exit with 1
            fail("interrupted", 130)
        except NotWrittenError as error:
            fail(str(error))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(package_name="pixfuse")
def pixfuse() -> None:
    """Images to normalized tensors: the numbers that go in, and what comes out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")


# ---- info ----------------------------------------------------------------------------------------


@pixfuse.command(epilog=EXIT_CODES)
@json_option
def info(as_json: bool) -> None:
    """Say what runs here: what to paste into a bug report."""
    found = library_info()
    if as_json:
        print_json(found)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _flat(found):
        table.add_row(name, value)
    console().print(table)


def _flat(content: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        elif isinstance(value, (list, tuple)):
            yield above + name, ", ".join(map(str, value))
        else:
            yield above + name, str(value)


# ---- stats ---------------------------------------------------------------------------------------


@pixfuse.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, required=True)
@click.option("--split", default="", help="Name of what is counted, e.g. train.")
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that decode; 0 for none but this one. Default: one for each processor.",
)
@click.option(
    "--folds",
    type=click.IntRange(2, MOST_FOLDS),
    help="Also give the training statistics of each fold of a cross-validation.",
)
@click.option("--resize", type=click.IntRange(1), help="Resize the shorter side first, bilinear.")
@click.option("--crop", type=click.IntRange(1), help="Count only the centre, of this size.")
@click.option(
    "--mode",
    type=click.Choice(["RGB", "L", "RGBA"]),
    help="Convert images to this. Default: RGB; where there are only arrays, as these are.",
)
@click.option(
    "--layout",
    type=click.Choice(["NHWC", "NCHW", "NHW", "HWC", "CHW", "HW"]),
    help="Order of the dimensions of arrays. Default: by their shape, if that is beyond doubt.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file for pixfuse.ChannelStatistics.load; unfinished runs go there too.",
)
@click.option(
    "--resume", is_flag=True, help="Go on from what --output holds; start where there is nothing."
)
@click.option(
    "--save-every",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds between saves to --output, in case the run is killed.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="PNG file for the histograms.",
)
@click.option("--strict", is_flag=True, help="End at the first unreadable file.")
@json_option
def stats(
    paths: tuple[str, ...],
    split: str,
    workers: int | None,
    folds: int | None,
    resize: int | None,
    crop: int | None,
    mode: str | None,
    layout: str | None,
    output: Path | None,
    resume: bool,
    save_every: float,
    plot: Path | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Count the pixels of PATHS exactly: mean, std, the line to paste.

    PATHS are folders (with all folders in them), globs, text files (.txt, .lst, .list) with a path
    in each line, images, .npy and .npz arrays, and .tar shards. Of a folder or shard, files that
    are not named like images are skipped; files that cannot be read are listed. Links count as
    what they lead to; of a damaged shard what stands before the damage counts, of a damaged array
    nothing.

    Every image counts in whole numbers, so the result is the same for any order, number of workers
    and number of processes. Under torchrun each process takes its part of the images.

    Ctrl-C saves what was counted to --output; the same command with --resume goes on from there.
    """
    from pixfuse._counting import NotReadableError, Ranks, count_all, number_of, rank_file
    from pixfuse._image_files import Reading, UsageProblemError, find_images

    if resume and output is None:
        raise click.UsageError("expected --output with --resume, to go on from, got none")
    options = (("--output", output), ("--plot", plot))
    written = [(option, path) for option, path in options if path is not None]
    for option, path in written:
        check_output(option, path)
    if output is not None and plot is not None and output.resolve() == plot.resolve():
        raise click.UsageError(
            f"expected --plot to be another file than --output, got {str(plot)!r} for both"
        )
    if plot is not None:
        with extra("for --plot"):
            import matplotlib.figure  # noqa: F401  (now, and not after an hour of counting)
    ranks = None
    try:
        ranks = Ranks()
        local_ranks = number_of("LOCAL_WORLD_SIZE", 1, default=ranks.size)
        with ranks:
            found = find_images(paths, layout)
            for option, path in written:
                check_no_input(option, path, _read_by(paths, found))
            if output is not None and not resume and ranks.rank == 0:
                _check_unfinished(output, rank_file(output, 0))
            if mode is None:
                mode = _mode_of(found)
            if workers is None:
                workers = max(len(os.sched_getaffinity(0)) // local_ranks, 1)
                workers = min(workers, found.images // 200)  # they take a while to start
            with _progress(quiet=as_json or ranks.rank > 0) as progress:
                outcome = count_all(
                    found,
                    Reading(mode, resize, crop, layout),
                    split=split,
                    folds=folds or 1,
                    workers=workers,
                    output=output,
                    resume=resume,
                    strict=strict,
                    save_every=save_every,
                    ranks=ranks,
                    progress=progress,
                )
    except UsageProblemError as error:
        raise click.UsageError(str(error)) from None
    except NotReadableError as error:
        fail(str(error), UNREADABLE)
    except BrokenProcessPool:
        saved = f"; {output} holds what was counted, --resume goes on" if output else ""
        fail(f"expected the workers to live, got one that died: too little memory?{saved}")
    except RuntimeError as error:
        if ranks is None or ranks.size == 1:
            raise
        fail(f"expected all processes to reach the end, got one that did not ({error})")
    if ranks.rank > 0 and outcome.complete:
        return
    summary = summarize(outcome, folds)
    if output is not None:
        summary["output"] = str(output)
    if as_json:
        print_json(summary)
    else:
        _print_stats(summary, outcome.unreadable)
    if plot is not None and outcome.statistics.images:
        from pixfuse._figures import draw_histogram

        draw_histogram(outcome.statistics, plot)
        if not as_json:
            console().print(f"drawn to {plot}")
    if outcome.signal:
        how = "add --resume to go on" if output else "nothing was saved: there is no --output"
        fail(f"interrupted after {outcome.statistics.images} images; {how}", 128 + outcome.signal)
    if outcome.statistics.images == 0:
        fail("expected at least 1 image that can be read, got none", NOTHING)


def _read_by(paths: Iterable[str], found: Any) -> Iterator[str]:
    """All files that a run reads: those that were named, lists among them, and the images."""
    named = {name for path in paths for name in [path, *glob.glob(path, recursive=True)]}  # noqa: PTH207
    yield from named
    yield from {file.path for file in found.files}  # once for all images of a shard
    yield from {part.path for part, _ in found.arrays}


def _check_unfinished(output: Path, first_rank: Path) -> None:
    """An hour of counting is not to be overwritten by a forgotten option."""
    try:
        finished = json.loads(output.read_text())["run"]["complete"]
    except FileNotFoundError:
        finished = not first_rank.exists()
    except (OSError, KeyError, RecursionError, TypeError, ValueError):
        finished = True
    if not finished:
        raise click.UsageError(
            f"expected {str(output)!r} not to hold an unfinished run, got one; add --resume to go "
            "on from it, or remove it"
        )


def _mode_of(found: Any) -> str:
    """RGB, as for torchvision's folders; arrays alone stay as they are."""
    if found.files or not found.arrays:
        return "RGB"
    return {1: "L", 4: "RGBA"}.get(found.arrays[0][1], "RGB")


class _Rate(ProgressColumn):  # type: ignore[misc]  # rich is not looked into
    def render(self, task: Task) -> Text:
        """Images per second, once there are some."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} images/s")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A bar with rate and time left on stderr, where somebody looks."""
    shown = Console(stderr=True)
    columns = (
        TextColumn("counting"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    off = quiet or not shown.is_terminal
    with Progress(*columns, console=shown, transient=True, disable=off) as bar:
        task = bar.add_task("", total=None, note="")

        def update(total: int, ready: int, unreadable: int) -> None:
            note = f"{unreadable} unreadable" if unreadable else ""
            bar.update(task, total=total, completed=ready, note=note)

        yield update


def normalization_lines(statistics: ChannelStatistics) -> dict[str, str] | None:
    """The lines to paste; None where a channel has a single value."""
    mean, std = statistics.mean, statistics.std
    if min(std) == 0:
        return None
    return {
        "torchvision": f"v2.Normalize(mean={list(mean)}, std={list(std)})",
        "pixfuse": f"pixfuse.Normalization({mean}, {std})",
    }


def summarize(outcome: Any, folds: int | None) -> dict[str, Any]:
    """What the command prints, as JSON has it."""
    statistics: ChannelStatistics = outcome.statistics
    busy = outcome.decode_seconds + outcome.count_seconds
    summary: dict[str, Any] = {
        "split": statistics.split,
        "complete": outcome.complete,
        "images": statistics.images,
        "pixels": statistics.pixels,
        "resumed_images": outcome.resumed,
        "skipped_files": outcome.skipped,
        "unreadable": [one._asdict() for one in outcome.unreadable],
        "fingerprint": statistics.fingerprint,
        "seconds": outcome.seconds,
        "decoding_share": outcome.decode_seconds / busy if busy else None,
    }
    if statistics.images:
        summary |= {
            "mean": statistics.mean,
            "std": statistics.std,
            "image_std": statistics.image_std,
            "min": statistics.min,
            "max": statistics.max,
            "percentiles": {str(q): statistics.percentile(q) for q in (1, 5, 25, 50, 75, 95, 99)},
            "paste": normalization_lines(statistics),
        }
        if folds is not None:
            summary["folds"] = [
                {"images": one.images, "mean": one.mean, "std": one.std, "image_std": one.image_std}
                if one.images
                else {"images": 0}
                for one in statistics.folds(folds)
            ]
    return summary


def _print_stats(summary: dict[str, Any], unreadable: list[Any]) -> None:
    out = console()
    for key, reason in unreadable:
        click.echo(f"unreadable: {key}: {reason}", err=True)
    share = summary["decoding_share"]
    name = f"{summary['split']}: " if summary["split"] else ""
    out.print(
        f"{name}{summary['images']:,} images, {summary['pixels']:,} pixels, "
        f"{len(unreadable)} unreadable, {summary['skipped_files']} other files skipped; "
        f"{summary['seconds']:.1f} s"
        + (f", {100 * share:.0f} % of the work in decoding" if share is not None else "")
    )
    if not summary["images"]:
        return
    channels = len(summary["mean"])
    names = {1: ["gray"], 3: ["red", "green", "blue"], 4: ["red", "green", "blue", "alpha"]}
    table = Table(box=None, pad_edge=False)
    table.add_column("channel")
    for title in ("mean", "std", "mean of image stds", "min", "1 %", "50 %", "99 %", "max"):
        table.add_column(title, justify="right")
    for c, channel in enumerate(names.get(channels, [str(c) for c in range(channels)])):
        floats = [f"{summary[what][c]:.6f}" for what in ("mean", "std", "image_std")]
        percentiles = [str(summary["percentiles"][q][c]) for q in ("1", "50", "99")]
        ends = [str(summary["min"][c]), str(summary["max"][c])]
        table.add_row(channel, *floats, ends[0], *percentiles, ends[1])
    out.print(table)
    if summary["paste"] is None:
        out.print("no normalization: a channel has a single value, so its std is 0")
    else:
        for line in summary["paste"].values():
            click.echo(line)
    for index, fold in enumerate(summary.get("folds", [])):
        if fold["images"]:
            mean, std = (", ".join(f"{v:.6f}" for v in fold[name]) for name in ("mean", "std"))
            out.print(f"fold {index}: train on {fold['images']:,} images: mean {mean}; std {std}")
    if "output" in summary:
        out.print(f"saved to {summary['output']}")


# ---- show ----------------------------------------------------------------------------------------


def parse_normalization(text: str) -> Normalization:
    """A preset by its name, or ``mean/std`` with commas between the channels."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
        found = Normalization(mean, std)
    except (TypeError, ValueError) as error:
        raise click.BadParameter(
            f"expected one of {', '.join(PRESETS)}, or mean/std such as "
            f"0.5,0.5,0.5/0.25,0.25,0.25, got {text!r} ({error})"
        ) from None
    if len(found.mean) not in (1, 3):
        raise click.BadParameter(f"expected mean and std of 1 or 3 channels, got {text!r}")
    return found


def _parse_normalizations(
    _context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> list[tuple[str, Normalization]]:
    return [(text, parse_normalization(text)) for text in texts]


@pixfuse.command(epilog=EXIT_CODES)
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--normalization",
    "normalizations",
    default=["unit", "signed", "imagenet"],
    multiple=True,
    callback=_parse_normalizations,
    help="A preset, or mean/std such as 0.5,0.5,0.5/0.25,0.25,0.25; may be repeated. "
    f"Presets: {', '.join(PRESETS)}. Default: unit, signed, imagenet.",
)
@click.option(
    "--stats",
    "stats_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also the normalization of this file of pixfuse stats.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("show.png"),
    show_default=True,
    help="PNG file for the picture.",
)
@json_option
def show(
    image: Path,
    normalizations: list[tuple[str, Normalization]],
    stats_file: Path | None,
    output: Path,
    as_json: bool,
) -> None:
    """Draw IMAGE under each normalization, with histograms of its values.

    All pictures share one scale of brightness and all histograms one axis, so that what differs is
    what a network would be given. Per-image standardization is drawn too.
    """
    with extra("for pixfuse show"):
        from pixfuse._figures import draw_show
    from pixfuse._image_files import ImageFile, Reading, read_image, reason_of

    check_output("--output", output)
    check_no_input("--output", output, [image, *([stats_file] if stats_file else [])])
    try:
        pixels = read_image(ImageFile(image.name, str(image)), Reading())
    except Exception as error:  # whatever a damaged file leads a decoder to
        fail(f"cannot read {str(image)!r}: {reason_of(error)}", UNREADABLE)
    chosen = list(normalizations)
    if stats_file is not None:
        try:
            counted = ChannelStatistics.load(stats_file)
            channels = len(counted.mean)
            if channels not in (1, 3):
                raise ValueError(
                    "expected --stats of 1 or 3 channels, as pictures are drawn in RGB, got "
                    f"{channels} in {str(stats_file)!r}; count with --mode RGB"
                )
            chosen.append((stats_file.name, counted.normalization()))
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    rows = draw_show(pixels, chosen, output)
    if as_json:
        print_json({"image": str(image), "output": str(output), "modes": rows})
        return
    table = Table(box=None, pad_edge=False)
    for title in ("mode", "channel", "mean", "std", "min", "max"):
        table.add_column(title, justify="left" if title == "mode" else "right")
    for row in rows:
        numbers = [row[what] for what in ("mean", "std", "min", "max")]
        for c, channel in enumerate(("red", "green", "blue")):
            values = [f"{round(number[c], 4) + 0.0:.4f}" for number in numbers]  # no -0.0000
            table.add_row(row["mode"] if c == 0 else "", channel, *values)
    console().print(table)
    console().print(f"drawn to {output}")


# ---- bench ---------------------------------------------------------------------------------------


@pixfuse.command(epilog=EXIT_CODES)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images.")
@click.option("--size", type=click.IntRange(1), default=224, show_default=True, help="Their side.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of torch."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=9, show_default=True, help="Of which the median."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG file for a chart."
)
@json_option
def bench(
    batch: int, size: int, threads: int, rounds: int, plot: Path | None, as_json: bool
) -> None:
    """Compare pixfuse with torch and torchvision on this machine.

    Results are compared first and timed afterwards, all in turn; torchvision only where it is
    installed.
    """
    from pixfuse._quick_bench import run

    if plot is not None:
        check_output("--plot", plot)
        with extra("for --plot"):
            import matplotlib.figure  # noqa: F401
    results = run(batch, size, threads, rounds)
    if plot is not None:
        from pixfuse._figures import draw_bench

        draw_bench(results, plot)
        results["plot"] = str(plot)
    if as_json:
        print_json(results)
        return
    out = console()
    out.print(
        f"{batch} images of {size}x{size}x3, {threads} thread{'s' if threads > 1 else ''}, "
        f"{results['isa']}; medians of {rounds} interleaved rounds"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("job", "by", "us/image", "time / pixfuse", "difference"):
        table.add_column(title, justify="right" if "/" in title or "us" in title else "left")
    job = None
    for row in results["rows"]:
        values = [f"{row['us_per_image']:.1f}", f"{row['ratio']:.2f}", row["difference"]]
        table.add_row("" if row["job"] == job else row["job"], row["by"], *values)
        job = row["job"]
    out.print(table)
    for note in results["notes"]:
        out.print(note)
    if plot is not None:
        out.print(f"drawn to {plot}")
