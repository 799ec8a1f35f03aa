"""The benchmarks can be believed: nothing unequal is timed, no number in the README is typed."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import pixfuse
from benchmarks import bench_conv_bias_relu, bench_pixels, harness, plot, report, units
from benchmarks.harness import Checked, Contestant, Tolerance, UnequalError

EXPECTED = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)


def result_of(result: torch.Tensor, **options: object) -> Contestant:
    return dataclasses.replace(Contestant("somebody", lambda: result), **options)  # type: ignore[arg-type]


def test_an_equal_result_is_timed() -> None:
    checked = Checked(result_of(EXPECTED.clone()), EXPECTED)
    plan = harness.Plan(rounds=3, sample_seconds=1e-4)
    (timing,) = harness.measure([checked], plan)
    assert timing.checked.max_error == 0
    assert len(timing.samples_seconds) == 3
    assert timing.median_us > 0


def one_ulp_up() -> torch.Tensor:
    wrong = EXPECTED.clone()
    wrong[1, 2, 1, 1] = torch.nextafter(wrong[1, 2, 1, 1], torch.tensor(9.0))
    return wrong


def with_nan() -> torch.Tensor:
    wrong = EXPECTED.clone()
    wrong[0, 0, 0, 0] = float("nan")
    return wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (one_ulp_up(), "largest difference"),
        (with_nan(), "largest difference"),
        (EXPECTED[:1], "expected shape"),
        (EXPECTED.double(), "expected dtype"),
        (EXPECTED.contiguous(memory_format=torch.channels_last), "expected strides"),
    ],
)
def test_an_unequal_result_is_not(wrong: torch.Tensor, message: str) -> None:
    with pytest.raises(UnequalError, match=message):
        Checked(result_of(wrong), EXPECTED)


def test_the_other_zero_is_unequal() -> None:
    with pytest.raises(UnequalError, match="largest difference"):
        Checked(result_of(torch.tensor([-0.0])), torch.tensor([0.0]))


def test_a_tolerance_has_an_end() -> None:
    near, far = EXPECTED + 5e-7, EXPECTED + 5e-5
    tolerance = Tolerance(1e-6, "another formula")
    assert 0 < Checked(result_of(near, tolerance=tolerance), EXPECTED).max_error <= 1e-6
    with pytest.raises(UnequalError, match="another formula"):
        Checked(result_of(far, tolerance=tolerance), EXPECTED)


def test_who_does_not_write_to_the_buffer_is_found() -> None:
    buffer = EXPECTED.clone()  # what an earlier call left there
    with pytest.raises(UnequalError, match="largest difference"):
        Checked(result_of(buffer, target=buffer), EXPECTED)
    with pytest.raises(UnequalError, match="not in the buffer"):
        Checked(result_of(EXPECTED.clone(), target=buffer), EXPECTED)


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [(3.0, ">= 3", True), (2.99, ">= 3", False), (0.0, "<= 0", True), (1.0, "<= 0", False)],
)
def test_a_claim_is_judged(value: float, target: str, met: bool) -> None:
    assert report.claim("", value, target)["met"] is met


def test_the_readme_and_the_charts_are_those_of_the_results() -> None:
    assert plot.main(["--check"]) == 0


@pytest.mark.parametrize(("option", "name"), [("readme", "README"), ("details", "docs/benchmarks")])
def test_a_number_typed_into_a_text_is_found(
    option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (harness.ROOT / f"{name}.md").read_text()
    head, start, block = text.partition(plot.START)
    digit = next(c for c in block if c.isdigit())
    forged = tmp_path / "forged.md"
    forged.write_text(head + start + block.replace(digit, str((int(digit) + 1) % 10), 1))
    assert plot.main(["--check", f"--{option}", str(forged)]) == 1
    assert "forged.md differs" in capsys.readouterr().err


def test_results_that_are_not_there_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [tmp_path / name for name in ("readme.md", "details.md")]
    for text in texts:
        text.write_text(f"before\n{plot.START}\nold\n{plot.END}\nafter\n")
    readme, details = map(str, texts)
    assert plot.main(["--results", str(tmp_path), "--readme", readme, "--details", details]) == 0
    for text in texts:
        assert text.read_text() == f"before\n{plot.START}\n\n{plot.END}\nafter\n"
    assert "there is no pixels_cpu.json" in capsys.readouterr().out


def test_results_of_another_machine_stand_beside(tmp_path: Path) -> None:
    content = json.loads((harness.RESULTS / "pixels_cpu.json").read_text())
    (tmp_path / "pixels_cpu.json").write_text(json.dumps(content))
    content["machine"]["cpu"] = "abacus"
    for item in content["claims"][:2]:
        item["value"], item["met"] = 0.125, False
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pixels_cpu.json").write_text(json.dumps(content))
    texts = [tmp_path / name for name in ("readme.md", "details.md")]
    for text in texts:
        text.write_text(f"{plot.START}\n{plot.END}\n")
    readme, details = map(str, texts)
    assert plot.main(["--results", str(tmp_path), "--readme", readme, "--details", details]) == 0
    missed = "; ".join(plot.missed_claims(content["claims"]))
    met = sum(1 for item in content["claims"] if item["met"])
    where = f"abacus ({content['pixfuse']['isa']})"
    expected = f"On {where} {met} of {len(content['claims'])}; missed there: {missed}."
    assert expected in texts[0].read_text()
    assert texts[1].read_text().count("| 0.125 |") == 2


@pytest.mark.parametrize(
    ("claim", "value", "target", "shown"),
    [
        (
            "points of 800 where a peer is faster by more than 5 %",
            3.0,
            "<= 0",
            "how many of 800 combinations of shape, layout, dtype and threads a peer does faster "
            "by more than 5 % (3, target <= 0)",
        ),
        (
            "memory, 1 workers: images per second of uint8 batches and DeviceLoader over float "
            "batches",
            0.7539,
            ">= 1",
            "images held in memory, 1 worker: images per second with uint8 batches and "
            "DeviceLoader over those with float batches (0.754, target >= 1)",
        ),
        ("speedup over DALI", 2.0, ">= 3", "speedup over DALI (2, target >= 3)"),
    ],
)
def test_a_missed_claim_can_be_understood_on_its_own(
    claim: str, value: float, target: str, shown: str
) -> None:
    assert plot.missed_claims([report.claim(claim, value, target)]) == [shown]


def test_what_several_cases_miss_is_said_once() -> None:
    claims = [
        report.claim("memory, 1 workers: images per second", 0.5, ">= 1"),
        report.claim("memory, 2 workers: images per second", 2.0, ">= 1"),
        report.claim("folder, 2 workers: images per second", 0.75, ">= 1"),
        report.claim("folder, 2 workers: time per image", 3.0, "<= 1"),
    ]
    assert plot.missed_claims(claims) == [
        "images per second, target >= 1 (images held in memory, 1 worker: 0.5; JPEG files, "
        "2 workers: 0.75)",
        "JPEG files, 2 workers: time per image (3, target <= 1)",
    ]


def test_the_readme_says_what_a_share_above_all_of_the_peak_is() -> None:
    content = json.loads((harness.RESULTS / "conv_bias_relu_cpu.json").read_text())
    lines = plot.convolution_tables(content)
    assert any("321 %" in line for line in lines)
    assert "counts the multiplications of the direct sum" in lines[-1]


PIXELS_PLAN = harness.Plan(rounds=1, sample_seconds=1e-4, least_rounds=1)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", bench_pixels.JOBS)
def test_everybody_who_handles_pixels_is_checked(name: str, layout: str) -> None:
    run = bench_pixels.Run()
    result = bench_pixels.run_job(run, name, bench_pixels.random_pixels(2, 5), layout, PIXELS_PLAN)
    assert run.problems == []
    assert {report.OURS, report.COPY} < result["us_per_call"].keys()


@pytest.mark.parametrize("name", bench_pixels.JOBS)
def test_one_wrong_pixel_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = bench_pixels.random_pixels(2, 5)
    honest = getattr(pixfuse, name)
    other = pixels.nhwc.clone()
    other[1, 4, 4, 2] ^= 1

    def wrong(*arguments: object, **options: object) -> object:
        if name != "denormalize":
            return honest(other, *arguments[1:], **options)
        result = honest(*arguments, **options)
        result.view(-1)[-1] ^= 1
        return result

    monkeypatch.setattr(pixfuse, name, wrong)
    run = bench_pixels.Run()
    result = bench_pixels.run_job(run, name, pixels, "NHWC", PIXELS_PLAN)
    assert report.OURS not in result["us_per_call"]
    assert any(problem.startswith(report.OURS) for problem in run.problems)


def test_files_that_were_counted_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench_pixels.expected_counts

    def write(folder: Path, count: int) -> list[Path]:
        """Not from photographs: those need a package that only benchmarks have."""
        paths = [folder / f"{n}.jpg" for n in range(count)]
        for n, path in enumerate(paths):
            PIL.Image.radial_gradient("L").rotate(n).resize((64, 64)).convert("RGB").save(path)
        return paths

    def one_more(paths: list[Path]) -> torch.Tensor:
        counts = honest(paths)
        counts[0, np.random.default_rng(0).integers(256)] += 1
        return counts

    run = bench_pixels.Run()
    files = bench_pixels.Files("gradients", 64, write)
    monkeypatch.setattr(bench_pixels, "WORKERS", ())
    stats = bench_pixels.run_stats(run, files, quick=True)
    assert run.problems == []
    assert [row["workers"] for row in stats["rows"]] == [0]
    monkeypatch.setattr(bench_pixels, "expected_counts", one_more)
    assert "rows" not in bench_pixels.run_stats(run, files, quick=True)
    assert run.problems == ["pixfuse stats, 0 workers: counts differ from numpy's"]


def test_workers_are_compared_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase of the machine that is over before the round is must not pass for a speedup."""
    rounds = [{0: 1.0, 1: 2.0, 2: 1.0}, {0: 1.0, 1: 3.0, 2: 3.0}, {0: 1.0, 1: 8.0, 2: 4.0}] * 5
    taken = (dict(one) for one in rounds)
    current: dict[int, float] = {}
    counts = torch.zeros(3, 256, dtype=torch.int64)

    def count_folder(folder: Path, workers: int) -> bench_pixels.Counted:
        if not current:
            current.update(next(taken))
        outcome = SimpleNamespace(
            statistics=SimpleNamespace(counts=counts),
            decode_seconds=3.0,
            count_seconds=1.0,
            seconds=5.0,
        )
        return bench_pixels.Counted(outcome, current.pop(workers), 0.0)

    monkeypatch.setattr(bench_pixels, "expected_counts", lambda paths: counts)
    monkeypatch.setattr(bench_pixels, "count_folder", count_folder)
    files = bench_pixels.Files("none", 1, lambda folder, count: [])
    stats = bench_pixels.run_stats(bench_pixels.Run(), files, quick=False)
    assert next(taken, None) is None
    share, speedup = bench_pixels.claims([], stats)[-2:]
    assert share["value"] == 0.6  # of the whole run, as there are no workers
    assert speedup["value"] == 2.0  # and not 1.0, of the median times


def test_convolutions_are_compared_within_a_round() -> None:
    """Medians of 2 and 2 would say that both are as fast; in two rounds of three we take half."""
    ours, fused = (
        harness.Timing(Checked(Contestant(name, lambda: torch.zeros(1)), torch.zeros(1)), seconds)
        for name, seconds in (
            (report.OURS, (1.0, 2.0, 4.0)),
            (bench_conv_bias_relu.FUSED, (2.0, 4.0, 1.0)),
        )
    )
    layer = bench_conv_bias_relu.LAYERS[-1]
    rows = [
        bench_conv_bias_relu.timing_row(timing, ours, layer, "contiguous", 1, 100.0)
        for timing in (ours, fused)
    ]
    (claim,) = bench_conv_bias_relu.claims(rows, None, None)
    assert claim["value"] == 0.5
    assert claim["met"]


def test_the_dead_units_of_the_demo_are_dead() -> None:
    torch.set_num_threads(1)  # two trainings must round alike, however busy the machine is
    random = np.random.default_rng(0)
    photos = [random.integers(256, size=(90, 80, 3), dtype=np.uint8) for _ in range(2)]
    crops = units.take_crops(photos)
    assert sorted(set(crops.labels.tolist())) == list(range(8))
    one = units.run_one("[0, 1]", pixfuse.UNIT, crops, 1.0, seeds=(0, 1), steps=8)

    dead = dict.fromkeys(units.LAYERS, 0)
    for seed in (0, 1):
        model = units.network(pixfuse.UNIT, crops.classes, seed)
        assert len(list(units.train(model, crops, 1.0, 8))) == 8
        values = crops.pixels
        for name, module in model.named_children():
            values = module(values)
            if name in dead:
                dead[name] += int((values.amax((0, 2, 3)) <= 0).sum())
    assert sum(dead.values()) > 0
    assert {layer: one.dead(layer) for layer in units.LAYERS} == dead
    assert one.monitor.steps == 8

    console = Console(record=True, width=120)
    units.print_table(console, [one], 0.05)
    text = console.export_text()
    row = [
        cell.strip() for line in text.splitlines() if "[0, 1] " in line for cell in line.split("│")
    ]
    assert row[1:6] == ["[0, 1]", "1", *(str(count) for count in dead.values())]
    assert row[6] == f"{one.loss:.2f}"
    assert "5.0% longer" in text
    axes = Figure().subplots()
    units.draw(axes, one)
    for loss in (1e8, math.inf, math.nan):
        units.print_table(console, [dataclasses.replace(one, loss=loss)], 0.05)
        assert "diverged" in console.export_text()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(units.LAYERS.values())


def test_the_cost_of_a_monitor_counts_all_that_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock of the test's own, a monitor's step takes three times as long as the rest."""

    class Clock:
        seconds = 0.0

        def process_time(self) -> float:
            return self.seconds

    clock = Clock()
    step, loss = pixfuse.DeadUnitMonitor.step, nn.functional.cross_entropy

    def slow_step(monitor: pixfuse.DeadUnitMonitor) -> None:
        clock.seconds += 3
        step(monitor)

    def timed_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        clock.seconds += 1
        return loss(scores, labels)

    monkeypatch.setattr(units, "time", clock)
    monkeypatch.setattr(pixfuse.DeadUnitMonitor, "step", slow_step)
    monkeypatch.setattr(nn.functional, "cross_entropy", timed_loss)
    photos = [np.zeros((64, 64, 3), np.uint8)]
    assert units.cost_of_monitor(photos, steps=3) == 3


# --- the one command for a machine with a GPU ---


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def run_gpu_step(folder: Path, step: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A step of run.sh, with the programs in `folder` in the place of the machine's."""
    search = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", harness.ROOT / "benchmarks" / "gpu" / "run.sh", step],
        env={**os.environ, "PATH": search, "OUT": str(folder / "out"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_sanitizer_watches_our_kernels_alone(tmp_path: Path) -> None:
    """Though its help goes on after the line that says that it can."""
    script(
        tmp_path / "compute-sanitizer",
        'if [[ $1 != --help ]]; then echo "$@"; exit; fi\n'
        "echo '  --kernel-name arg'\n"
        "for ((i = 0; i < 20000; ++i)); do echo more || exit 141; done\n",
    )
    result = run_gpu_step(tmp_path, "memcheck", PYTHON="python-of-the-machine")
    assert result.returncode == 0, result.stderr
    assert "--tool memcheck " in result.stdout
    assert "--kernel-name kns=pixfuse " in result.stdout
    assert result.stdout.endswith(" python-of-the-machine -m benchmarks.gpu.short_case\n")


def test_gpu_tests_show_a_failure_at_once_and_skip_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "test_machine.py").write_text(
        "import os\n"
        "def test_absent(): import a_package_of_nobody\n"
        "def test_ours(): import pixfuse.not_there\n"
        "def test_wrong(): assert 'got' == 'wanted'\n"
        "def test_the_time_is_over(): os._exit(9)\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.choose_tests", "-v", tmp_path],
        cwd=harness.ROOT,
        env={**os.environ, "PIXFUSE_TESTS": "others"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 9
    assert "test_absent SKIPPED" in result.stdout
    assert "No module named 'pixfuse.not_there'" in result.stdout
    assert "assert 'got' == 'wanted'" in result.stdout
