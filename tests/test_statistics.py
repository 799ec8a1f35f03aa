"""`ChannelStatistics`: exact, whatever the order, the batches, the folds and the processes."""

import contextlib
import inspect
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import strategies as st

import pixfuse
from pixfuse import ChannelStatistics
from pixfuse.statistics import _id_of, _square_root
from tests.images import random_bytes
from tests.processes import PATIENCE_SECONDS


def dataset(count: int, channels: int = 3) -> list[torch.Tensor]:
    """Images of different sizes, brightness and contrast."""
    source = random.Random(count)
    images = []
    for _ in range(count):
        size = (channels, source.randint(1, 9), source.randint(1, 9))
        low = source.randint(0, 250)
        images.append(torch.randint(low, source.randint(low + 1, 256), size, dtype=torch.uint8))
    return images


def names(count: int) -> list[str]:
    return [f"folder/{i}.jpg" for i in range(count)]


def statistics_of(images: list[torch.Tensor], split: str = "train") -> ChannelStatistics:
    result = ChannelStatistics(split)
    result.update(images, keys=[f"{id(image)}" for image in images])
    return result


# --- values ---


def test_mean_and_std_are_the_nearest_floats() -> None:
    images = dataset(7)
    statistics = statistics_of(images)
    assert statistics.images == 7
    assert statistics.pixels == sum(image[0].numel() for image in images)
    for c in range(3):
        values = [Fraction(v, 255) for image in images for v in image[c].flatten().tolist()]
        mean = sum(values, Fraction(0)) / len(values)
        variance = sum(((v - mean) ** 2 for v in values), Fraction(0)) / len(values)
        assert statistics.mean[c] == float(mean)
        with localcontext() as context:
            context.prec = 80
            root = (Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt()
        assert statistics.std[c] == float(root)


def test_float64_agrees() -> None:
    images = random_bytes(5, 3, 40, 50)
    statistics = ChannelStatistics()
    statistics.update(images)
    array = images.numpy() / 255
    np.testing.assert_allclose(statistics.mean, array.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(statistics.std, array.std((0, 2, 3)), rtol=1e-14)
    each = array.std((2, 3)).mean(0)
    np.testing.assert_allclose(statistics.image_std, each, rtol=1e-14)
    assert statistics.image_std != statistics.std


def test_square_roots() -> None:
    assert _square_root(Fraction(0)) == 0.0
    assert _square_root(Fraction(9, 16)) == 0.75
    for value in (2, 3, 5, 1 << 60, (1 << 53) + 1):
        assert _square_root(Fraction(value)) == math.sqrt(value)
    middle = Fraction(2**53 + 1, 2**53)  # between two floats: the even one
    assert _square_root(middle**2) == 1.0
    assert _square_root(middle**2 + Fraction(1, 2**200)) == 1.0 + 2**-52


def test_minimum_maximum_and_percentiles() -> None:
    images = random_bytes(2, 3, 7, 11) // 2 + 20
    statistics = ChannelStatistics()
    statistics.update(images)
    for c in range(3):
        values = sorted(images[:, c].flatten().tolist())
        assert statistics.min[c] == values[0]
        assert statistics.max[c] == values[-1]
        for q in (0, 0.1, 1, 25, 50, 73.2, 99, 100):
            expected = np.percentile(values, q, method="inverted_cdf")
            assert statistics.percentile(q)[c] == expected


def test_normalization() -> None:
    images = random_bytes(4, 3, 30, 30)
    statistics = ChannelStatistics()
    statistics.update(images)
    normalization = statistics.normalization(rounding="nearest")
    assert normalization == pixfuse.Normalization(statistics.mean, statistics.std, "nearest")
    result = pixfuse.normalize(images, normalization).double()
    torch.testing.assert_close(result.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        result.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-6, rtol=0
    )
    of_images = statistics.normalization(std="images")
    assert of_images == pixfuse.Normalization(statistics.mean, statistics.image_std)


def test_counts() -> None:
    images = random_bytes(2, 3, 7, 11)
    statistics = ChannelStatistics()
    statistics.update(images.permute(0, 2, 3, 1), input_layout="NHWC")
    assert torch.equal(statistics.counts, pixfuse.channel_histogram(images))
    statistics.counts.zero_()  # a copy
    assert torch.equal(statistics.counts, pixfuse.channel_histogram(images))


def test_kinds_of_images() -> None:
    array = random_bytes(6, 5, 3).numpy()
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = ChannelStatistics()
    expected.update(tensor.unsqueeze(0))
    for images in ([array], [tensor], [PIL.Image.fromarray(array)], (array,), tensor):
        statistics = ChannelStatistics()
        statistics.update(images)
        assert statistics == expected
    gray = ChannelStatistics()
    gray.update([array[:, :, 0]])
    assert gray.pixels == 30


def test_the_example_of_the_readme() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    example = text.split("## Statistics, and back to pixels\n\n```python\n")[1].split("```")[0]
    values: dict[str, Any] = {
        "pixfuse": pixfuse,
        "images": random_bytes(30, 8, 9, 3),
        "names": names(30),
    }
    exec(example, values)
    assert torch.equal(values["pixels"], values["images"])
    assert values["counts"].tolist() == [0, 0]
    assert len(set(values["training"])) == 5
    assert values["statistics"].images == 30


# --- any order, any batches ---


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    order=st.permutations(range(9)), cuts=st.sets(st.integers(1, 8)), k=st.integers(1, 6)
)
def test_order_and_batches_change_nothing(order: list[int], cuts: set[int], k: int) -> None:
    images = dataset(9)
    expected = ChannelStatistics("train", folds=k)
    expected.update(images, keys=names(9))
    statistics = ChannelStatistics("train", folds=k)
    edges = [0, *sorted(cuts), 9]
    for first, last in itertools.pairwise(edges):
        part = order[first:last]
        statistics.update([images[i] for i in part], keys=[names(9)[i] for i in part])
    assert statistics == expected
    assert statistics.fingerprint == expected.fingerprint


@hypothesis.settings(max_examples=40)
@hypothesis.given(cut=st.integers(1, 8))
def test_sum_and_difference(cut: int) -> None:
    images = dataset(9)
    first, second = statistics_of(images[:cut]), statistics_of(images[cut:])
    total = statistics_of(images)
    assert first + second == total == second + first == sum([first, second])
    assert sum([first]) == first
    assert sum([first]) is not first
    assert total - first == second
    assert total - second == first
    assert (total - total).images == 0


def test_a_batch_is_its_images() -> None:
    images = random_bytes(6, 3, 5, 7)
    batch, one_by_one = ChannelStatistics(folds=4), ChannelStatistics(folds=4)
    batch.update(images, keys=names(6))
    for image, name in zip(images, names(6), strict=True):
        one_by_one.update(image, keys=[name])
    assert batch == one_by_one


def test_a_difference_is_what_was_never_together() -> None:
    images = random_bytes(3, 3, 4, 5)
    all_three, two, one = (ChannelStatistics(folds=7) for _ in range(3))
    all_three.update(images, keys=names(3))
    two.update(images[:2], keys=names(2))
    one.update(images[2:], keys=names(3)[2:])
    assert all_three - two == one


def test_a_refused_batch_changes_nothing() -> None:
    statistics = counted(2)
    saved = statistics._to_dict()
    for keys in (["c", "a"], ["c", "c"], ["c"]):
        with pytest.raises(ValueError, match=r"ChannelStatistics.update: expected "):
            statistics.update(random_bytes(2, 3, 4, 5), keys=keys)
    assert statistics._to_dict() == saved


class OnlyLookedUp:
    """A set whose members cannot be gone through."""

    def __init__(self, members: set[int]) -> None:
        self.members = members

    def __contains__(self, member: int) -> bool:
        return member in self.members

    def __ior__(self, more: set[int]) -> "OnlyLookedUp":
        self.members |= more
        return self


@pytest.mark.parametrize("folds", [1, 5])
def test_a_batch_costs_the_same_however_much_was_counted(folds: int) -> None:
    statistics = ChannelStatistics(folds=folds)
    statistics.update(random_bytes(30, 1, 1, 1), keys=names(30))
    for part in statistics._parts:
        assert part is not None
        part.ids = OnlyLookedUp(part.ids)  # type: ignore[assignment]
    statistics.update(random_bytes(8, 1, 1, 1), keys=[f"new {i}" for i in range(8)])
    assert statistics.images == statistics.pixels == 38
    for repeated in ("new 3", names(30)[7]):
        with pytest.raises(ValueError, match=f"keys that are new, got '{repeated}' again"):
            statistics.update(random_bytes(1, 1, 1, 1), keys=[repeated])


def test_results_keep_what_they_were_made_of() -> None:
    """Later images count in the statistics that they are given to, and nowhere else."""
    images = dataset(30)
    a, nothing = ChannelStatistics(folds=2), ChannelStatistics(folds=2)
    a.update(images[:20], keys=names(20))
    made = [a + nothing, nothing + a, a - nothing, *a.folds(2)]
    before = [repr(one) + json.dumps(one._to_dict()) for one in made]
    a.update(images[20:], keys=names(30)[20:])
    assert [repr(one) + json.dumps(one._to_dict()) for one in made] == before
    for one in made[:3]:
        one.update(images[20:], keys=names(30)[20:])
        assert one == a


def without_keys(images: list[torch.Tensor]) -> ChannelStatistics:
    result = ChannelStatistics("train")
    result.update(images)
    return result


def test_keys_for_all_images_or_for_none(tmp_path: Path) -> None:
    """A fingerprint of some would be that of other data, and a difference could not be loaded."""
    images = dataset(6)
    keyed, plain = statistics_of(images[:3], "train"), without_keys(images[3:])
    for statistics, keys, message in (
        (keyed, None, "got none after 3 images with some"),
        (plain, ["new"], "got some after 3 images with none"),
    ):
        before = statistics._to_dict()
        with pytest.raises(
            ValueError, match=f"expected keys for all images or for none, {message}"
        ):
            statistics.update(images[:1], keys=keys)
        assert statistics._to_dict() == before
    for combine, sign in ((ChannelStatistics.__add__, r"\+"), (ChannelStatistics.__sub__, "-")):
        for a, b, got in ((keyed, plain, "keys and none"), (plain, keyed, "none and keys")):
            with pytest.raises(ValueError, match=f"expected {sign} of .* or both none, got {got}"):
                combine(a, b)
    nothing = ChannelStatistics("train")
    for statistics in (keyed, plain):
        combined = [statistics, statistics + nothing, nothing + statistics, statistics - nothing]
        for number, one in enumerate(combined):
            one.save(tmp_path / f"{number}.json")
            assert ChannelStatistics.load(tmp_path / f"{number}.json") == statistics


@hypothesis.given(data=st.data())
def test_whatever_can_be_made_can_be_saved_and_loaded(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Sums of what overlaps and differences of what looks the same among them."""
    image = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    draw = data.draw
    with_keys = draw(st.booleans())
    pool = [ChannelStatistics("train")]
    for _ in range(draw(st.integers(1, 8))):
        chosen = draw(st.lists(st.sampled_from("abcd")))
        one = ChannelStatistics("train")
        for key in sorted(set(chosen)):
            one.update(image, keys=[key] if with_keys else None)
        pool.append(one)
        a, b = (draw(st.sampled_from(pool)) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            pool.append(a + b)
        with contextlib.suppress(ValueError):  # not all of them are a part of the other
            pool.append(a - b)
    path = tmp_path_factory.mktemp("saved") / "stats.json"
    for statistics in pool:
        statistics.save(path)
        assert ChannelStatistics.load(path) == statistics


def test_a_difference_with_more_keys_than_images_is_refused() -> None:
    image = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    alike, part = ChannelStatistics("train"), ChannelStatistics("train")
    for key in "abcd":
        alike.update(image, keys=[key])
    part.update(image, keys=["a"])
    with pytest.warns(UserWarning, match="1 images in common"):
        twice = part + part
    with pytest.raises(ValueError, match=r"of what was counted, got 2 images left for 3 keys$"):
        alike - twice


def test_sums_and_differences_of_any_images_are_possible() -> None:
    """Flat images and those of black and white are at the bounds of what stds can add up to."""
    source = random.Random(0)
    sides = range(1, 5)
    for _ in range(100):
        one, other = (
            without_keys(
                [
                    random_bytes(2, source.choice(sides), source.choice(sides)) // step * step
                    for step in source.choices([1, 128, 255], k=source.randint(1, 6))
                ]
            )
            for _ in range(2)
        )
        both = one + other
        assert both - one == other
        assert both - other == one
        for statistics in (one, both, both + both, both - one, both - both):
            content = json.loads(json.dumps(statistics._to_dict()))
            assert ChannelStatistics._from_dict(content, "expected it") == statistics


def test_a_difference_that_no_images_have_is_refused() -> None:
    """Without keys the numbers alone say what is no part of the other."""
    flat, half = (torch.zeros(1, 2, 2, dtype=torch.uint8) for _ in range(2))
    wide = torch.zeros(1, 4, 2, dtype=torch.uint8)
    half[0, 0] = 255
    for whole, part, message in (
        ([flat, flat + 255], [half], r"image_std_sums\[0\] is -(\d+), not \1 for"),
        ([torch.zeros(1, 4, 4, dtype=torch.uint8)], [flat], "images is 0, not 1 to 12 for 12"),
        ([flat, flat], [wide], "images is 1, not 0 to 0 for 0 pixels"),
    ):
        with pytest.raises(
            ValueError, match=rf"expected - of a part .* whose parts\[0\].{message}"
        ):
            without_keys(whole) - without_keys(part)
    assert without_keys([flat, half, wide]) - without_keys([half]) == without_keys([flat, wide])


def test_overlap_is_warned_of() -> None:
    images = dataset(4)
    a, b = statistics_of(images[:3], "train"), statistics_of(images[2:], "test")
    with pytest.warns(UserWarning, match="'train' and 'test' have 1 images in common"):
        both = a + b
    assert both.split == "train+test"
    assert both.images == 5


def test_folds() -> None:
    images = dataset(40)
    kept = ChannelStatistics("train", folds=12)
    kept.update(images, keys=names(40))
    for k in (2, 3, 4, 6, 12):
        for fold, training in enumerate(kept.folds(k)):
            chosen = [i for i in range(40) if pixfuse.fold_of(names(40)[i], k) != fold]
            expected = ChannelStatistics(training.split)
            expected.update([images[i] for i in chosen], keys=[names(40)[i] for i in chosen])
            assert training == expected
            assert training.normalization() == expected.normalization()
            assert training.split == f"train-fold{fold}of{k}"


def test_many_folds_take_time_by_their_number() -> None:
    """By the square of it, ten times as many would take a hundred times as long."""
    many = ChannelStatistics(folds=20_000)
    many.update(random_bytes(6, 1, 3, 4), keys=names(6))
    start = time.perf_counter()
    training = many.folds(20_000)
    assert time.perf_counter() - start < PATIENCE_SECONDS / 10
    assert sum(6 - one.images for one in training) == 6


def test_keys_of_files_whose_names_are_not_utf8() -> None:
    key = os.fsdecode(b"folder/\xff.jpg")
    statistics = ChannelStatistics(folds=2)
    statistics.update(random_bytes(2, 3, 4, 5), keys=[key, "plain"])
    kept = [part for part in statistics._parts if part is not None]
    assert _id_of(key) in kept[pixfuse.fold_of(key, 2)].ids


def test_numbers_of_numpy_and_torch() -> None:
    statistics = counted(4)
    numbers: list[Any] = [np.float32(50), np.int64(50), np.float16(50), torch.tensor(50.0)]
    for fifty in (*numbers, Decimal(50), Fraction(50)):
        assert statistics.percentile(fifty) == statistics.percentile(50)
    assert len(statistics.folds(np.int64(2))) == 2  # type: ignore[arg-type]
    assert pixfuse.fold_of("a", np.int64(5)) == pixfuse.fold_of("a", 5)  # type: ignore[arg-type]


def test_fold_of() -> None:
    text = inspect.getdoc(pixfuse.fold_of)
    assert text is not None
    line = " ".join(text.split("Equivalent to::\n")[1].split("\n\nSource")[0].split())
    for key in (*names(20), "\udcff.jpg"):
        for folds in (1, 2, 7):
            import hashlib

            expected = eval(line, {"hashlib": hashlib, "key": key, "folds": folds})
            assert pixfuse.fold_of(key, folds) == expected
    assert {pixfuse.fold_of(key, 5) for key in names(100)} == set(range(5))


# --- files ---


def test_save_and_load(tmp_path: Path) -> None:
    statistics = ChannelStatistics("train", folds=3)
    statistics.update(dataset(9), keys=names(9))
    path = tmp_path / "stats.json"
    statistics.save(path)
    loaded = ChannelStatistics.load(path)
    assert loaded == statistics
    assert loaded.split == "train"
    assert loaded.mean == statistics.mean
    assert loaded.folds(3)[1] == statistics.folds(3)[1]
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "stats.json"]
    nothing = ChannelStatistics()
    nothing.save(path)
    assert ChannelStatistics.load(path) == nothing


def _change(content: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    place: Any = content
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", "other", "to have schema 'pixfuse.ChannelStatistics', got 'other'"),
        ("version", 2, "to have version 1, got 2; it was written by another version"),
        ("fingerprint", "0" * 64, "to have the fingerprint"),
        ("split", None, "to have a string as split, got None"),
        ("parts", [], r"to have parts of at least 1 fold, got \[\]"),
        ("parts", {}, r"to have a list as parts, got {}"),
        ("parts.0.pixels", 3, r"to have \d+, the sum of counts\[0\] as parts\[0\].pixels, got 3"),
        ("parts.0.images", 1, r"to have the keys of 1 images as parts\[0\].ids, got 4 keys"),
        ("parts.0.counts.0.7", -1, r"to have a whole number from 0 .*counts\[0\]\[7\], got -1"),
        ("parts.0.counts", [[1]], r"to have 256 numbers for each channel as .*, got \[\[1\]\]"),
        (
            "parts.0.image_std_sums",
            ["1"],
            r"to have one number for each of 3 channels as .*sums, got 1",
        ),
        ("parts.0.ids", "?", r"to have base64 as parts\[0\].ids, got: "),
        ("parts.0.ids", "AAAA", "to have different keys of 8 bytes each .*, got 1 of 3 bytes"),
        ("parts.0", {}, r"to have a list as parts\[0\].counts, got none"),
        ("parts.0", 5, r"to have an object or null as parts\[0\], got 5"),
    ],
)
def test_damaged_files(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = tmp_path / "stats.json"
    statistics = ChannelStatistics("train")
    statistics.update(dataset(4), keys=names(4))
    statistics.save(file)
    content = json.loads(file.read_text())
    _change(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"ChannelStatistics.load: expected .*stats.json' {message}"
    ):
        ChannelStatistics.load(file)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(
            ("images", value, r"a whole number from 0 to \d+ as parts\[0\].images, got ")
            for value in (math.nan, math.inf, 6.5, True, None, -1, 2**70)
        ),
        ("images", 10**9, r"1 to (\d+) for \1 pixels as parts\[0\].images, got 1000000000"),
        ("images", 0, r"1 to (\d+) for \1 pixels as parts\[0\].images, got 0"),
        ("pixels", 4050.0, r"a whole number .* as parts\[0\].pixels, got 4050.0"),
        ("counts.0.0", 0.5, r"a whole number .* as parts\[0\].counts\[0\]\[0\], got 0.5"),
        ("counts.0.0", 2**70, r"a whole number .* as parts\[0\].counts\[0\]\[0\], got \d+"),
        (
            "image_std_sums.0",
            "-1e30",
            r"a string of .*digits as .*image_std_sums\[0\], got '-1e30'",
        ),
        ("image_std_sums.0", "-1", r"a string of .*digits as .*image_std_sums\[0\], got '-1'"),
        ("image_std_sums.0", 1, r"a string of .*digits as .*image_std_sums\[0\], got 1"),
        ("image_std_sums.1", "9" * 40, r"0 to \d+ for these counts as .*sums\[1\], got 9{40}"),
        ("image_std_sums", "123", r"a list as parts\[0\].image_std_sums, got '123'"),
        ("ids", 5, r"a string as parts\[0\].ids, got 5"),
    ],
)
def test_numbers_that_contradict(tmp_path: Path, path: str, value: Any, message: str) -> None:
    """Each by itself or beside the others: nothing of the kind was ever counted."""
    statistics = without_keys(dataset(4))
    content = statistics._to_dict()
    _change(content, f"parts.0.{path}", value)
    (tmp_path / "stats.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"load: expected .*stats.json' to have {message}"):
        ChannelStatistics.load(tmp_path / "stats.json")


def test_counts_that_overflow(tmp_path: Path) -> None:
    content = without_keys([torch.zeros(1, 1, 1, dtype=torch.uint8)])._to_dict()
    [part] = content["parts"]
    part |= {"images": 0, "pixels": 0, "counts": [[2**62] * 4 + [0] * 252]}
    (tmp_path / "stats.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"to have {2**64}, the sum of counts\[0\] as .*, got 0"):
        ChannelStatistics.load(tmp_path / "stats.json")
    part |= {"images": 1, "pixels": 2**62, "counts": [[2**62] + [0] * 255]}
    (tmp_path / "stats.json").write_text(json.dumps(content))
    half = ChannelStatistics.load(tmp_path / "stats.json")
    with pytest.raises(
        ValueError, match=rf"\+ of at most {2**63 - 1} pixels together, got {2**63}"
    ):
        half + half


def test_one_image_has_the_std_of_its_pixels(tmp_path: Path) -> None:
    content = without_keys([random_bytes(3, 4, 5)])._to_dict()
    sums = content["parts"][0]["image_std_sums"]
    sums[2] = str(int(sums[2]) - 1)
    (tmp_path / "stats.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"to have \d+ for these counts as .*sums\[2\]"):
        ChannelStatistics.load(tmp_path / "stats.json")


def test_a_part_that_is_there_twice(tmp_path: Path) -> None:
    statistics = ChannelStatistics(folds=2)
    statistics.update(random_bytes(4, 3, 5, 6), keys=names(4))
    content = statistics._to_dict()
    for parts in ([content["parts"][0]] * 2, content["parts"][::-1]):
        (tmp_path / "stats.json").write_text(json.dumps({**content, "parts": parts}))
        with pytest.raises(ValueError, match=r"the keys of the images of fold \d of 2 as parts"):
            ChannelStatistics.load(tmp_path / "stats.json")
    [plain] = without_keys(dataset(3))._to_dict()["parts"]
    (tmp_path / "stats.json").write_text(json.dumps({**content, "parts": [plain, plain]}))
    with pytest.raises(ValueError, match=r"images of fold 0 of 2 as parts\[0\].ids, got 0 keys"):
        ChannelStatistics.load(tmp_path / "stats.json")


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000):
        (tmp_path / "stats.json").write_text(text)
        with pytest.raises(ValueError, match=r"stats.json' to be JSON, got: "):
            ChannelStatistics.load(tmp_path / "stats.json")
    (tmp_path / "stats.json").write_text("[]")
    with pytest.raises(ValueError, match=r"to have schema .*, got None"):
        ChannelStatistics.load(tmp_path / "stats.json")
    with pytest.raises(FileNotFoundError):
        ChannelStatistics.load(tmp_path / "missing.json")


# --- several processes ---

PROCESS = """
import sys
import warnings
import torch
from tests.test_statistics import dataset, names
from pixfuse import ChannelStatistics

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
images = dataset(11)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world
)
statistics = ChannelStatistics("train", folds=2)
mine = range(rank, 11, world)
statistics.update([images[i] for i in mine], keys=[names(11)[i] for i in mine])
statistics.all_reduce()
statistics.save(f"{folder}/{world}-{rank}.json")

# Once more would count every image once more for each process: without keys, nothing would tell.
without_keys = ChannelStatistics("train")
without_keys.update([images[i] for i in mine])
without_keys.all_reduce()
one_is_enough = without_keys if rank == 0 else ChannelStatistics("train")
for again in (statistics, without_keys, one_is_enough, without_keys + without_keys):
    before = again.images
    try:
        again.all_reduce()
    except RuntimeError as error:
        assert "all_reduce: expected statistics of one process each, got" in str(error), error
    else:
        raise AssertionError("counted twice")
    assert again.images == before
torch.distributed.destroy_process_group()
"""


def test_processes_add_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = dataset(11)
    alone = ChannelStatistics("train", folds=2)
    alone.update(images, keys=names(11))
    alone.save(tmp_path / "alone.json")
    for world in (1, 2):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(rank), str(world), str(tmp_path)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 0, errors
            written = tmp_path / f"{world}-{rank}.json"
            assert written.read_bytes() == (tmp_path / "alone.json").read_bytes()


# --- errors ---


def counted(folds: int = 1) -> ChannelStatistics:
    result = ChannelStatistics("train", folds)
    result.update(random_bytes(2, 3, 4, 5), keys=["a", "b"])
    return result


EMPTY = ChannelStatistics()
SAME = [random_bytes(3, 4, 5), random_bytes(3, 4, 5)]


def other_keys(images: list[torch.Tensor]) -> ChannelStatistics:
    result = ChannelStatistics("train")
    result.update(images, keys=["x", "y"])
    return result


BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "split": (lambda: ChannelStatistics(3), TypeError, ": expected split to be a string, got int"),  # type: ignore[arg-type]
    "folds": (lambda: ChannelStatistics(folds=0), ValueError, ": expected folds to be 1 or more"),
    "channels": (
        lambda: counted().update(random_bytes(1, 1, 4, 5)),
        ValueError,
        r".update: expected images of 3 channels, as before, got 1",
    ),
    "too few keys": (
        lambda: EMPTY.update(random_bytes(2, 3, 4, 5), keys=["a"]),
        ValueError,
        r".update: expected one key for each of 2 images, got 1 keys",
    ),
    "one key": (
        lambda: EMPTY.update(random_bytes(2, 3, 4, 5), keys="ab"),
        ValueError,
        r".update: expected one key for each of 2 images, got 'ab'",
    ),
    "same key": (
        lambda: counted().update(random_bytes(1, 3, 4, 5), keys=["b"]),
        ValueError,
        r".update: expected keys that are new, got 'b' again",
    ),
    "same key in one batch": (
        lambda: EMPTY.update(random_bytes(2, 3, 4, 5), keys=["b", "b"]),
        ValueError,
        r".update: expected keys that are new, got 'b' again",
    ),
    "folds without keys": (
        lambda: ChannelStatistics(folds=2).update(random_bytes(2, 3, 4, 5)),
        ValueError,
        r".update: expected keys, as folds are kept apart by them, got none",
    ),
    "keys of other types": (
        lambda: EMPTY.update(random_bytes(2, 3, 4, 5), keys=["a", Path("b")]),  # type: ignore[list-item]
        TypeError,
        r".update: expected keys\[1\] to be a string, got PosixPath; pass str",
    ),
    "keys of numbers": (
        lambda: EMPTY.update(random_bytes(1, 3, 4, 5), keys=[7]),  # type: ignore[list-item]
        TypeError,
        r".update: expected keys\[0\] to be a string, got int",
    ),
    "keys that end": (
        lambda: EMPTY.update(random_bytes(1, 3, 4, 5), keys=(key for key in "a")),  # type: ignore[arg-type]
        TypeError,
        r".update: expected keys to be a list of strings, got generator; pass a list",
    ),
    "keys without an order": (
        lambda: EMPTY.update(random_bytes(2, 3, 4, 5), keys={"a", "b"}),  # type: ignore[arg-type]
        TypeError,
        r".update: expected keys to be a list of strings, got set; pass a list",
    ),
    "half a character": (
        lambda: EMPTY.update(random_bytes(1, 3, 4, 5), keys=["\ud800"]),
        ValueError,
        r".update: expected keys\[0\] to be text or the name of a file, got '\\ud800'",
    ),
    "no height": (
        lambda: EMPTY.update(torch.zeros(2, 3, 0, 5, dtype=torch.uint8)),
        ValueError,
        r".update: expected images to have pixels, got 0 x 5 of 3 channels",
    ),
    "no channels": (
        lambda: EMPTY.update(torch.zeros(2, 0, 4, 5, dtype=torch.uint8)),
        ValueError,
        r".update: expected images to have pixels, got 4 x 5 of 0 channels",
    ),
    "no width": (
        lambda: EMPTY.update(np.zeros((2, 4, 0, 3), np.uint8), "NHWC"),
        ValueError,
        r".update: expected images to have pixels, got 4 x 0 of 3 channels",
    ),
    "floats": (lambda: EMPTY.update(torch.zeros(2, 3, 4, 5)), TypeError, r".update: expected imag"),
    "floats in a list": (
        lambda: EMPTY.update([torch.zeros(3, 4, 5)]),
        TypeError,
        r".update: expected images",
    ),
    "no images": (lambda: EMPTY.update([]), ValueError, r".update: expected images to have at"),
    "a layout": (
        lambda: EMPTY.update(random_bytes(2, 3, 4, 5), "NCWH"),  # type: ignore[arg-type]
        ValueError,
        r".update: expected input_layout",
    ),
    "folds of half": (
        lambda: ChannelStatistics(folds=2.5),  # type: ignore[arg-type]
        TypeError,
        r": expected folds to be a whole number, got 2.5",
    ),
    "k of a float": (
        lambda: counted(4).folds(2.0),  # type: ignore[arg-type]
        TypeError,
        r".folds: expected k to be a whole number, got 2.0",
    ),
    "percentile of text": (
        lambda: counted().percentile("50"),  # type: ignore[arg-type]
        TypeError,
        r".percentile: expected q to be a number, got '50'",
    ),
    "percentile of several": (
        lambda: counted().percentile(torch.tensor([1.0, 2.0])),  # type: ignore[arg-type]
        TypeError,
        r".percentile: expected q to be a number, got tensor",
    ),
    "percentile of nan": (
        lambda: counted().percentile(math.nan),
        ValueError,
        r".percentile: expected q to be from 0 to 100, got nan",
    ),
    "nothing": (lambda: EMPTY.mean, ValueError, r".mean: expected at least 1 image .*update\(\)"),
    "percentile": (
        lambda: counted().percentile(101),
        ValueError,
        r".percentile: expected q to be from 0 to 100, got 101",
    ),
    "std": (
        lambda: counted().normalization(std="all"),  # type: ignore[arg-type]
        ValueError,
        r".normalization: expected std to be 'pixels' or 'images', got 'all'",
    ),
    "k": (lambda: counted(4).folds(3), ValueError, r".folds: expected k .* to divide 4.*got 3"),
    "k of 1": (lambda: counted(4).folds(1), ValueError, r".folds: expected k to be 2 or more"),
    "other folds": (
        lambda: counted(2) + counted(3),
        ValueError,
        r": expected \+ of statistics with as many folds, got 2 and 3",
    ),
    "less than nothing": (
        lambda: EMPTY - counted(),
        ValueError,
        r": expected - of a part of what was counted, got counts below 0",
    ),
    "not a part": (
        lambda: statistics_of(SAME) - other_keys(SAME),
        ValueError,
        r": expected - of a part of what was counted, got 2 images that were not",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=f"^ChannelStatistics{message}"):
        call()
    assert EMPTY.images == 0


def test_all_reduce_without_processes() -> None:
    with pytest.raises(RuntimeError, match=r"all_reduce: expected torch.distributed to be init"):
        ChannelStatistics().all_reduce()


def test_fold_of_errors() -> None:
    with pytest.raises(ValueError, match=r"^fold_of: expected folds to be 1 or more, got 0"):
        pixfuse.fold_of("a", 0)
    with pytest.raises(TypeError, match=r"^fold_of: expected folds to be a whole number, got 2.5"):
        pixfuse.fold_of("a", 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^fold_of: expected key to be a string, got bytes; pass"):
        pixfuse.fold_of(b"a", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^fold_of: expected key to be text or the name of a "):
        pixfuse.fold_of("\ud800", 2)


def test_other_operands() -> None:
    with pytest.raises(TypeError):
        counted() + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        counted() - 1  # type: ignore[operator]
    assert counted() != 1
    assert _id_of("a") != _id_of("b")
    assert "2 images, 40 pixels" in repr(counted())
