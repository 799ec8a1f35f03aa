"""`pixfuse.UnitActivity`: what follows from the counts, merging, and summing over ranks."""

import math
import pickle
from dataclasses import FrozenInstanceError, astuple
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import pixfuse
from pixfuse import UnitActivity
from tests.processes import python


def made(positions: int = 20, images: int = 2) -> UnitActivity:
    """Four channels: one that fires, one that fires rarely, one dead, one not a number."""
    return UnitActivity(
        torch.tensor([20, 1, 0, 0]),
        torch.tensor([2, 1, 0, 0]),
        torch.tensor([0, 0, 0, 3]),
        torch.tensor([10.0, 0.25, 0.0, 1.75], dtype=torch.float64),
        positions,
        images,
    )


def assert_equal(a: UnitActivity, b: UnitActivity) -> None:
    for mine, other in zip(astuple(a), astuple(b), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))


def test_what_follows_from_the_counts() -> None:
    activity = made()
    assert activity.dead.tolist() == [False, False, True, False]
    assert activity.dead_count.item() == 1
    assert activity.active_fraction.tolist() == [1.0, 0.05, 0.0, 0.0]
    assert activity.active_fraction.dtype is torch.float64


def test_printed_in_a_line() -> None:
    activity = made()
    assert str(activity) == "1 of 4 channels dead, 26.2% of outputs active, NaN in 1; 2 images"
    activity.nan.zero_()
    assert str(activity) == "2 of 4 channels dead, 26.2% of outputs active; 2 images"
    assert "tensor(" in repr(activity)


def test_dormant() -> None:
    activity = made()  # the mean over channels of output_sum is 3
    assert activity.dormant().tolist() == [False, False, True, False]
    assert activity.dormant(0.1).tolist() == [False, True, True, False]
    assert activity.dormant(1.0).tolist() == [False, True, True, True]
    for value in (math.nan, math.inf):
        activity.output_sum[3] = value
        assert activity.dormant().tolist() == [False, False, True, False]
    silent = UnitActivity(*(torch.zeros(2, dtype=torch.int64),) * 3, torch.zeros(2).double(), 9, 1)
    assert silent.dormant(0.5).all()
    for tau in (-0.1, float("nan")):
        with pytest.raises(
            ValueError, match=rf"^dormant: expected tau to be 0 or above, got {tau}"
        ):
            activity.dormant(tau)


def test_nothing_is_known_of_nothing() -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    activity = UnitActivity(counts, counts, counts, counts.double(), 0, 0)
    assert not activity.dead.any()
    assert not activity.dormant(1.0).any()
    assert activity.active_fraction.tolist() == [0.0] * 3


def test_sum() -> None:
    a, b = made(), made(30, 3)
    both = a + b
    assert both.active.tolist() == [40, 2, 0, 0]
    assert both.active_images.tolist() == [4, 2, 0, 0]
    assert both.nan.tolist() == [0, 0, 0, 6]
    assert both.output_sum.tolist() == [20.0, 0.5, 0.0, 3.5]
    assert (both.positions, both.images) == (50, 5)
    assert_equal(a, made())


def test_a_sum_over_batches_is_that_of_one_batch() -> None:
    weight, images = torch.randn(8, 3, 3, 3), torch.randn(5, 3, 9, 9)
    _, whole = pixfuse.conv_bias_relu(images, weight)
    parts = [pixfuse.conv_bias_relu(part, weight)[1] for part in images.split([1, 3, 1])]
    total = sum(parts)
    assert isinstance(total, UnitActivity)
    assert torch.equal(total.active, whole.active)
    assert torch.equal(total.active_images, whole.active_images)
    torch.testing.assert_close(total.output_sum, whole.output_sum, rtol=1e-12, atol=0)
    assert (total.positions, total.images) == (whole.positions, whole.images)


def test_what_cannot_be_added() -> None:
    other = UnitActivity(*(torch.zeros(2, dtype=torch.int64),) * 3, torch.zeros(2).double(), 9, 1)
    with pytest.raises(
        ValueError,
        match=r"^UnitActivity: expected two activities of the same number .* got 4 and 2",
    ):
        made() + other
    with pytest.raises(TypeError, match="unsupported operand"):
        made() + 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + made()


def test_it_is_a_value() -> None:
    activity = made()
    with pytest.raises(FrozenInstanceError):
        activity.positions = 3  # type: ignore[misc]
    assert_equal(pickle.loads(pickle.dumps(activity)), activity)


def test_it_is_a_bundle_of_tensors() -> None:
    activity = made()
    leaves, structure = pytree.tree_flatten(activity)
    assert len(leaves) == 6
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, UnitActivity)
    assert_equal(again, activity)
    doubled = pytree.tree_map(lambda x: 2 * x, activity)
    assert_equal(doubled, activity + activity)


def test_it_goes_through_the_compiler() -> None:
    def function(activity: UnitActivity) -> UnitActivity:
        return activity + activity

    torch._dynamo.reset()
    run = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_equal(run(made()), made() + made())
    torch._dynamo.reset()


RANKS = """
import sys, torch, pixfuse
import torch.distributed as dist

def rank(number, count, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=count)
    torch.manual_seed(0)
    weight, images = torch.randn(6, 3, 3, 3), torch.randn(4, 3, 8, 8)
    weight[2] = 0
    mine = images[:1] if number == 0 else images[1:]
    total = pixfuse.conv_bias_relu(mine, weight)[1].all_reduce()
    whole = pixfuse.conv_bias_relu(images, weight)[1]
    for name in ("active", "active_images", "nan", "positions", "images", "dead"):
        ours, expected = getattr(total, name), getattr(whole, name)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(expected)), name
    torch.testing.assert_close(total.output_sum, whole.output_sum, rtol=1e-12, atol=0)
    assert total.dead.tolist() == [False, False, True, False, False, False]
    if number == 0:
        print("equal")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank, (2, sys.argv[1]), nprocs=2, start_method="fork")
"""


def test_all_reduce(tmp_path: Path) -> None:
    result = python(f"import sys; sys.argv.append({str(tmp_path / 'store')!r})\n{RANKS}")
    assert result.returncode == 0, result.stderr
    assert "equal" in result.stdout


def test_all_reduce_without_ranks() -> None:
    with pytest.raises(RuntimeError, match=r"^all_reduce: expected torch.distributed to be init"):
        made().all_reduce()
