"""The benchmarks can be believed: nothing unequal is timed, no number in the README is typed."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import harness, plot, report
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


def test_a_number_typed_into_the_readme_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (harness.ROOT / "README.md").read_text()
    head, start, block = readme.partition(plot.START)
    digit = next(c for c in block if c.isdigit())
    forged = tmp_path / "README.md"
    forged.write_text(head + start + block.replace(digit, str((int(digit) + 1) % 10), 1))
    assert plot.main(["--check", "--readme", str(forged)]) == 1
    assert "README.md differs" in capsys.readouterr().err
