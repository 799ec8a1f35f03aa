"""The command line: what it counts, what interrupts it, what it says, and what it draws."""

import contextlib
import io
import json
import os
import posixpath
import pty
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from pixfuse import _counting, _figures, _image_files, _quick_bench, cli
from pixfuse._counting import count_piece
from pixfuse._image_files import ArrayPart, Reading
from tests.processes import PATIENCE_SECONDS, python

# Their files are made once.
pytestmark = pytest.mark.xdist_group("cli")

READABLE = {
    "photos/cat/00.jpg": "RGB",
    "photos/cat/01.png": "L",
    "photos/cat/02.png": "RGBA",
    "photos/dog/animated.gif": "P",
    "photos/dog/print.jpg": "CMYK",
}
UNREADABLE = {
    "photos/broken link.jpg": "No such file or directory",
    "photos/deep.png": "mode I;16 has more than 8 bits per channel",
    "photos/empty.jpg": "an empty file",
    "photos/huge.png": "Image size (196000000 pixels) exceeds limit",
    "photos/pipe.jpg": "not a regular file",
    "photos/text.jpg": "not an image in a format that Pillow knows",
    "photos/truncated.jpg": "image file is truncated",
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.pixfuse, [str(a) for a in arguments], prog_name="pixfuse")


def stats(*arguments: object) -> dict[str, Any]:
    """What a successful run prints."""
    result = run("stats", *arguments, "--json", "--workers", 0)
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def start(*arguments: object, ranks: int = 1) -> subprocess.Popen[str]:
    """The command in a process of its own, which Ctrl-C can reach."""
    launcher = (
        # Standalone: at a port of its own, as another test may do the same at this moment.
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "pixfuse", *(str(a) for a in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of all kinds, and of everything else that stands in folders."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for folder in ("cat", "dog"):
        (root / folder).mkdir(parents=True)
    image = Image.fromarray(noise(40, 60, 0))
    image.save(root / "cat" / "00.jpg")
    image.convert("L").save(root / "cat" / "01.png")
    image.convert("RGBA").save(root / "cat" / "02.png")
    frames = [Image.fromarray(noise(30, 30, seed)).convert("P") for seed in (1, 2)]
    frames[0].save(root / "dog" / "animated.gif", save_all=True, append_images=frames[1:])
    image.convert("CMYK").save(root / "dog" / "print.jpg")

    (root / "broken link.jpg").symlink_to(root / "nowhere")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(root / "deep.png")
    (root / "empty.jpg").touch()
    Image.new("1", (14000, 14000)).save(root / "huge.png")
    os.mkfifo(root / "pipe.jpg")
    (root / "text.jpg").write_text("no image")
    (root / "truncated.jpg").write_bytes((root / "cat" / "00.jpg").read_bytes()[:2000])
    (root / "cat" / "loop").symlink_to(root)
    (root / "labels.csv").write_text("skipped")
    return root


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough work to be interrupted in: one photograph under many names."""
    root = tmp_path_factory.mktemp("many") / "many"
    write_many(root, 400)
    (root / "bad.png").write_text("no image")
    return root


def write_many(root: Path, count: int) -> None:
    root.mkdir()
    Image.fromarray(noise(400, 400, 0)).save(root / "0000.png")
    for n in range(1, count):
        (root / f"{n:04}.png").hardlink_to(root / "0000.png")


@pytest.fixture(scope="module")
def finished(many: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that counting ``many`` leaves when nothing happens."""
    output = tmp_path_factory.mktemp("finished") / "stats.json"
    assert stats(many, "--folds", 3, "--output", output)["images"] == 400
    return output.read_bytes()


# --- what is counted ---


def test_a_folder(photos: Path) -> None:
    expected = pixfuse.ChannelStatistics("train")
    arrays = []
    for key in READABLE:
        with Image.open(photos.parent / key) as file:
            image = file.convert("RGB")
        arrays.append(np.asarray(image).reshape(-1, 3) / 255)
        expected.update([image], keys=[key])
    content = stats(photos, "--split", "train")
    assert content["images"] == len(READABLE)
    assert content["fingerprint"] == expected.fingerprint
    assert content["skipped_files"] == 1
    assert content["complete"]
    for name in ("mean", "std", "image_std", "min", "max"):
        assert tuple(content[name]) == getattr(expected, name), name
    pixels = np.concatenate(arrays)
    np.testing.assert_allclose(content["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(content["std"], pixels.std(0), rtol=1e-12)
    assert tuple(content["percentiles"]["50"]) == expected.percentile(50)


def test_unreadable_files_are_listed(photos: Path) -> None:
    found = {one["key"]: one["reason"] for one in stats(photos)["unreadable"]}
    assert found.keys() == UNREADABLE.keys()
    for key, reason in UNREADABLE.items():
        assert found[key].startswith(reason), key


def test_what_is_printed(photos: Path) -> None:
    result = run("stats", photos, "--workers", 0, "--folds", 2)
    assert result.exit_code == 0
    assert "5 images" in result.stdout
    assert "7 unreadable" in result.stdout
    assert "unreadable: photos/empty.jpg: an empty file" in result.stderr
    content = stats(photos, "--folds", 2)
    for line in content["paste"].values():
        assert line in result.stdout
    made = eval(content["paste"]["pixfuse"], {"pixfuse": pixfuse})
    assert made == pixfuse.Normalization(content["mean"], content["std"])
    assert content["paste"]["torchvision"].startswith("v2.Normalize(mean=[0.")
    assert sum(5 - fold["images"] for fold in content["folds"]) == 5
    assert result.stdout.count("train on") == sum(fold["images"] > 0 for fold in content["folds"])


def test_workers_change_nothing(many: Path, finished: bytes, tmp_path: Path) -> None:
    for workers in (1, 3):
        output = tmp_path / f"{workers}.json"
        options = ("--folds", 3, "--output", output, "--workers", workers)
        assert run("stats", many, *options).exit_code == 0
        assert output.read_bytes() == finished
    assert pixfuse.ChannelStatistics.load(output).images == 400


def test_resize_and_crop_are_those_of_torchvision() -> None:
    transforms = import_torchvision("torchvision.transforms")
    for height, width in ((40, 60), (61, 33), (50, 50), (7, 90)):
        image = Image.fromarray(noise(height, width, 3))
        for resize, crop in ((32, None), (None, 7), (45, 31), (50, 50)):
            expected = image
            if resize is not None:
                expected = transforms.Resize(resize)(expected)
            if crop is not None:
                expected = transforms.CenterCrop(crop)(expected)
            ours = _image_files.transform(image, Reading("RGB", resize, crop))
            assert np.array_equal(np.asarray(ours), np.asarray(expected))
    # Nothing is padded.
    assert _image_files.transform(image, Reading("RGB", None, 50)).size == (50, 7)


def test_resized_folder(photos: Path) -> None:
    content = stats(photos / "cat", "--resize", 20, "--crop", 16)
    assert content["pixels"] == 5 * 16 * 16  # the dogs too, through the link


def test_modes(photos: Path) -> None:
    assert len(stats(photos, "--mode", "L")["mean"]) == 1
    assert len(stats(photos, "--mode", "RGBA")["mean"]) == 4


# --- the ways to name images ---


def test_arrays_and_shards_are_the_same_images(tmp_path: Path) -> None:
    images = np.stack([noise(9, 11, seed) for seed in range(700)])
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tmp_path / "shard-000.tar", "w") as shard:
        for n, array in enumerate(images):
            path = folder / f"{n:04}.png"
            Image.fromarray(array).save(path)
            shard.add(path, path.name)
        shard.add(__file__, "0000.txt")
    np.save(tmp_path / "nhwc.npy", images)
    np.save(tmp_path / "nchw.npy", images.transpose(0, 3, 1, 2))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    labels = np.arange(len(images))
    np.savez(tmp_path / "stored.npz", x=images, y=labels)
    np.savez(tmp_path / "stored fortran.npz", x=np.asfortranarray(images), y=labels)
    np.savez_compressed(tmp_path / "packed.npz", x=images, y=labels)
    np.savez_compressed(tmp_path / "packed fortran.npz", x=np.asfortranarray(images), y=labels)
    expected = stats(folder)
    assert expected["images"] == 700
    for path in sorted(tmp_path.glob("*.*")):
        content = stats(path)
        for name in ("images", "pixels", "mean", "std", "image_std", "min", "max", "percentiles"):
            assert content[name] == expected[name], (path, name)
        assert content["skipped_files"] == (path.suffix in (".npz", ".tar"))
        resized = stats(path, "--resize", 8, "--crop", 5)
        assert resized["mean"] == stats(folder, "--resize", 8, "--crop", 5)["mean"]


def test_npy_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    images = np.stack([noise(9, 11, seed) for seed in range(3)])
    np.save(tmp_path / "a.npy", images)
    part = ArrayPart("a.npy", str(tmp_path / "a.npy"), "", "NHWC", 0, 3)
    [(_, batch)] = _image_files.read_array(part)
    assert isinstance(batch, np.memmap)
    assert np.array_equal(batch, images)


def test_large_arrays_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.stack([noise(9, 11, seed) for seed in range(7)])
    np.save(tmp_path / "a.npy", images)
    np.savez_compressed(tmp_path / "b.npz", x=images)
    np.savez_compressed(tmp_path / "one.npz", x=images[0])
    monkeypatch.setattr(_image_files, "_PIECE_BYTES", 2 * 9 * 11 * 3)
    for path, member in (("a.npy", ""), ("b.npz", "x.npy")):
        part = ArrayPart(path, str(tmp_path / path), member, "NHWC", 1, 6)
        found = list(_image_files.read_array(part))
        assert all(len(batch) <= 2 for _, batch in found)
        assert [key for keys, _ in found for key in keys] == [f"{path}[{n}]" for n in range(1, 6)]
        assert np.array_equal(np.concatenate([batch for _, batch in found]), images[1:6])
    part = ArrayPart("one", str(tmp_path / "one.npz"), "x.npy", "HWC", 0, 1)
    [(keys, batch)] = _image_files.read_array(part)
    assert keys == ["one[0]"]
    assert np.array_equal(batch, images[:1])


def test_gray_arrays(tmp_path: Path) -> None:
    images = np.concatenate([noise(20, 30, seed).transpose(2, 0, 1) for seed in (0, 1)])
    np.save(tmp_path / "gray.npy", images)
    assert stats(tmp_path / "gray.npy")["mean"] == [pytest.approx(images.mean() / 255, rel=1e-12)]
    assert stats(tmp_path / "gray.npy", "--crop", 4)["pixels"] == 6 * 16
    result = run("stats", tmp_path / "gray.npy", "--mode", "RGB", "--json")
    assert result.exit_code == cli.NOTHING
    reason = json.loads(result.stdout)["unreadable"][0]["reason"]
    assert reason == "expected 3 channels (RGB), got 1; pass --mode L"
    # One channel of one image and one gray image are the same.
    np.save(tmp_path / "one.npy", images[:1])
    assert stats(tmp_path / "one.npy")["images"] == 1


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "expected an array of dtype uint8, got float32"),
        (np.zeros(7, np.uint8), "expected an array of images (N, H, W, C), got shape (7,)"),
        (np.zeros((), np.uint8), "expected an array of images (N, H, W, C), got shape ()"),
        (np.zeros((0, 9, 11, 3), np.uint8), "expected at least 1 pixel, got shape (0, 9, 11, 3)"),
        (np.zeros((2, 3, 5, 4), np.uint8), "can be NHWC or NCHW; say which by --layout"),
        (np.zeros((5, 6, 3), np.uint8), "can be NHW or HWC; say which by --layout"),
        (np.zeros((3, 5, 6), np.uint8), "can be NHW or CHW; say which by --layout"),
        (np.zeros((4, 5, 1), np.uint8), "can be NHW or HWC or CHW; say which by --layout"),
        (np.array([None]), "expected an array of dtype uint8, got object"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, reason: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    result = run("stats", tmp_path / "a.npy", "--json")
    assert result.exit_code == cli.NOTHING
    assert reason in json.loads(result.stdout)["unreadable"][0]["reason"]


def test_layout_decides(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 5, 4), np.uint8))
    assert stats(tmp_path / "a.npy", "--layout", "NCHW")["pixels"] == 2 * 5 * 4
    assert stats(tmp_path / "a.npy", "--layout", "NHWC")["pixels"] == 2 * 3 * 5
    np.save(tmp_path / "b.npy", np.zeros((3, 5, 6), np.uint8))
    assert stats(tmp_path / "b.npy", "--layout", "CHW")["images"] == 1
    assert stats(tmp_path / "b.npy", "--layout", "NHW")["images"] == 3


def test_damaged_shards_and_archives(photos: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as shard:
        for name in ("00.jpg", "01.png"):
            shard.add(photos / "cat" / name, name)
    data = whole.read_bytes()
    with tarfile.open(whole) as shard:
        _, second = shard.getmembers()
    cuts = {"in a member": second.offset_data + 100, "between members": second.offset}
    for name, end in cuts.items():
        (tmp_path / f"{name}.tar").write_bytes(data[:end])
        content = stats(tmp_path / f"{name}.tar")
        assert content["images"] >= 1
        assert any(".tar" in one["key"] for one in content["unreadable"]), name
    np.savez_compressed(tmp_path / "a.npz", x=noise(300, 300, 0)[None])
    packed = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(packed[:-500])
    (tmp_path / "flipped.npz").write_bytes(packed[:9000] + b"\0" * 100 + packed[9100:])
    (tmp_path / "packed.tar.gz").write_bytes(b"")
    found = stats(photos / "cat" / "00.jpg", *sorted(tmp_path.glob("*.*z")))
    reasons = {Path(one["key"]).parts[-2:][-1]: one["reason"] for one in found["unreadable"]}
    assert reasons["cut.npz"] == "File is not a zip file"
    assert "unpack it to .tar" in reasons["packed.tar.gz"]
    assert "x" in reasons  # the flipped one


def listed(content: dict[str, Any]) -> dict[str, str]:
    """The names of what could not be read, without the folder, and why."""
    return {"/".join(Path(one["key"]).parts[1:]): one["reason"] for one in content["unreadable"]}


def counted_and_listed(*paths: Path) -> tuple[int, dict[str, str]]:
    """How many images count, and what is listed, where nothing may be all that counts."""
    result = run("stats", *paths, "--json", "--workers", 0)
    assert result.exit_code in (0, cli.NOTHING), result.output
    content = json.loads(result.stdout)
    return content["images"], listed(content)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A tar file of 10 images, each of more than a page."""
    path = tmp_path / "whole.tar"
    with tarfile.open(path, "w") as file:
        for n in range(10):
            image = tmp_path / f"{n}.png"
            Image.fromarray(noise(40, 50, n)).save(image)
            file.add(image, image.name)
    return path


@pytest.mark.parametrize("damage", ["flipped bit", "no header", "page of zeros"])
def test_a_damaged_header_does_not_end_a_shard_silently(
    shard: Path, tmp_path: Path, damage: str
) -> None:
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as file:
        header = file.getmembers()[5].offset
    if damage == "flipped bit":
        content[header + 148] ^= 1
    else:
        size = 512 if damage == "no header" else 4096
        content[header : header + size] = bytes(size)
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(content)
    assert stats(shard)["unreadable"] == []
    images, reasons = counted_and_listed(damaged)
    assert images == 5  # what stands before it
    assert f"expected only zeros from byte {header} on" in reasons["damaged.tar"]
    assert run("stats", damaged, "--strict").exit_code == cli.UNREADABLE


def test_a_second_tar_file_behind_the_first_is_not_lost_silently(
    shard: Path, tmp_path: Path
) -> None:
    joined = tmp_path / "joined.tar"
    joined.write_bytes(shard.read_bytes() * 2)
    images, reasons = counted_and_listed(joined)
    assert images == 10
    assert "a second tar file behind the first" in reasons["joined.tar"]


def test_links_in_shards_count_as_in_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "a.png").symlink_to("b/image.png")  # which comes behind it
    Image.fromarray(noise(8, 8, 0)).save(folder / "b" / "image.png")
    (folder / "b" / "hard.png").hardlink_to(folder / "b" / "image.png")
    (folder / "b" / "up.png").symlink_to("../a.png")  # a link to a link
    (folder / "c.txt").symlink_to("b/image.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        for path in sorted(folder.rglob("*")):
            file.add(path, path.relative_to(folder), recursive=False)
        assert sum(member.islnk() for member in file.getmembers()) == 1
    names = ("images", "pixels", "mean", "std", "skipped_files", "unreadable")
    by_folder, by_shard = stats(folder), stats(tmp_path / "shard.tar")
    assert by_folder["images"] == 4
    assert [by_shard[name] for name in names] == [by_folder[name] for name in names]
    # Named twice they count once.
    assert stats(tmp_path / "shard.tar", f"{tmp_path}/*.tar")["images"] == 4


def test_no_member_of_a_shard_vanishes(shard: Path) -> None:
    kinds = {
        "nowhere.png": (tarfile.SYMTYPE, "no/such.png"),
        "out.png": (tarfile.SYMTYPE, "../0.png"),
        "round.png": (tarfile.SYMTYPE, "round.png"),
        "lost.png": (tarfile.LNKTYPE, "lost too.png"),
        "pipe.png": (tarfile.FIFOTYPE, ""),
        "pipe.txt": (tarfile.FIFOTYPE, ""),
        "folder.png": (tarfile.DIRTYPE, ""),
        "holes.png": (tarfile.GNUTYPE_SPARSE, ""),
    }
    with tarfile.open(shard, "a") as file:
        for name, (kind, target) in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)
        file.add(shard.with_name("1.png"), "0.png")
        file.add(shard.with_name("2.png"), "./0.png")  # another name
    content = stats(shard)
    assert content["images"] == 11
    assert content["skipped_files"] == 1
    reasons = {posixpath.basename(name): reason for name, reason in listed(content).items()}
    assert reasons == {
        "nowhere.png": "no file in the tar file at 'no/such.png'",
        "out.png": "no file in the tar file at '../0.png'",
        "round.png": "no file in the tar file at 'round.png'",
        "lost.png": "no file in the tar file at 'lost too.png'",
        "pipe.png": "not a regular file",
        "holes.png": "a sparse file cannot be read in place; unpack it",
        "0.png": "another member of this name, not counted; the first is",
    }


def header_of(shape: tuple[int, ...]) -> bytes:
    """The beginning of an .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("count", [2, 4, 10_000_000, 1 << 61])
def test_npz_members_hold_what_they_claim(tmp_path: Path, kind: int, count: int) -> None:
    images = np.stack([noise(9, 11, seed) for seed in range(3)])
    with zipfile.ZipFile(tmp_path / "a.npz", "w", kind) as file:
        file.writestr("x.npy", header_of((count, 9, 11, 3)) + images.tobytes())
        file.writestr("y.npy", header_of((3, 9, 11, 3)) + images.tobytes())
    images_counted, reasons = counted_and_listed(tmp_path / "a.npz")
    assert images_counted == 3  # the other member
    assert reasons == {
        "a.npz/x": f"expected {count * 297} bytes for shape ({count}, 9, 11, 3), got 891"
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_of_a_damaged_npz_member_nothing_counts(tmp_path: Path, save: Any, order: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1200, 5, 6, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", x=np.asarray(images, order=order), y=images)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        x = file.getinfo("x.npy")
    # Late, and of a compressed one the checksum itself: where damage shows at the end only.
    at = x.header_offset + x.compress_size - 50
    if save is np.savez_compressed:
        at = content.index(b"PK\x01\x02") + 16
    content[at] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    images_counted, reasons = counted_and_listed(tmp_path / "a.npz")
    assert images_counted == 1200  # those of y
    assert reasons == {"a.npz/x": "Bad CRC-32 for file 'x.npy'"}


def test_the_checksum_of_a_member_is_compared_where_images_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_image_files, "_PIECE_IMAGES", 1)
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 90, 110, 3), np.uint8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"PK\x01\x02") - 1] ^= 1  # in the last image
    (tmp_path / "a.npz").write_bytes(content)
    part = ArrayPart("a", str(tmp_path / "a.npz"), "x.npy", "NHWC", 0, 1)
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        list(_image_files.read_array(part))


def test_every_member_of_an_npz_file_is_counted_skipped_or_listed(tmp_path: Path) -> None:
    images = np.stack([noise(9, 11, seed) for seed in range(3)])
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("bad.npy", b"no array")
        file.writestr("readme", b"")
        file.writestr("labels.npy", header_of((3,)) + bytes(3))
        file.writestr("x.npy", header_of(images.shape) + images.tobytes())
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("x.npy", header_of(images.shape) + images.tobytes())
    content = stats(tmp_path / "a.npz")
    assert content["images"] == 3
    assert content["skipped_files"] == 2
    reasons = listed(content)
    assert "magic string" in reasons.pop("a.npz/bad")
    assert reasons == {"a.npz": "two members have one name; only the last of them is read"}


def test_npy_files_hold_one_array(tmp_path: Path) -> None:
    images = np.stack([noise(9, 11, seed) for seed in range(3)])
    with (tmp_path / "two.npy").open("wb") as file:
        np.save(file, images)
        np.save(file, images)
    np.save(tmp_path / "cut.npy", images)
    os.truncate(tmp_path / "cut.npy", 500)
    with (tmp_path / "zip.npy").open("wb") as file:
        np.savez(file, x=images)
    (tmp_path / "minus.npy").write_bytes(header_of((-3, -9, 11, 3)) + images.tobytes())
    images_counted, reasons = counted_and_listed(*sorted(tmp_path.glob("*.npy")))
    assert images_counted == 0
    assert "bytes for shape (3, 9, 11, 3), got 1910" in reasons["two.npy"]
    assert "bytes for shape (3, 9, 11, 3), got 372" in reasons["cut.npy"]
    assert "magic string" in reasons["zip.npy"]
    assert reasons["minus.npy"] == "expected at least 1 pixel, got shape (-3, -9, 11, 3)"


def test_links_to_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    folder.mkdir()
    for name in ("self.png", "self.txt"):
        (folder / name).symlink_to(name)
    Image.fromarray(noise(8, 8, 0)).save(folder / "0.png")
    content = stats(folder)
    assert content["images"] == 1
    assert content["skipped_files"] == 1
    assert listed(content) == {"self.png": "Too many levels of symbolic links"}


def test_lists_of_odd_names(tmp_path: Path) -> None:
    names = ["0.png", "line\u2028separator.png", "page\x0cfeed.png", "last.png"]
    for n, name in enumerate(names):
        Image.fromarray(noise(8, 8, n)).save(tmp_path / name)
    long = "n" * 300 + ".png"
    (tmp_path / "list.txt").write_bytes("\r\n".join([*names, long]).encode("utf-8-sig"))
    content = stats(tmp_path / "list.txt")
    assert content["images"] == len(names)
    assert content["unreadable"] == [{"key": long, "reason": "File name too long"}]
    named = run("stats", tmp_path / long, "--json")
    assert named.exit_code == cli.NOTHING
    assert json.loads(named.stdout)["unreadable"][0]["reason"] == "File name too long"


@contextlib.contextmanager
def closed(folder: Path, mode: int) -> Iterator[None]:
    """A folder that this process may not look into, nor root, which becomes nobody meanwhile."""
    before = os.geteuid()
    folder.chmod(mode)
    try:
        if before == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(before)
        folder.chmod(0o755)


def test_files_in_a_closed_folder_are_listed() -> None:
    Image.init()  # nobody might not be able to import what it needs
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # not in pytest's own folder, which nobody may enter
        folder = Path(place) / "closed"
        folder.mkdir()
        image = folder / "0.png"
        Image.fromarray(noise(8, 8, 0)).save(image)
        listing = Path(place) / "list.txt"
        listing.write_text("closed/0.png\n")
        # With names that can be read, so that a glob matches, but nothing behind them.
        with closed(folder, 0o744):
            for path in (image, listing, folder, f"{folder}/*.png"):
                found = _image_files.find_images([str(path)])
                piece = count_piece(found.files, Reading(), "", 1)
                assert piece.statistics.images == 0
                [(_, reason)] = [*found.unreadable, *piece.unreadable]
                assert reason == "Permission denied", path


def test_globs_lists_and_folders_agree(photos: Path, tmp_path: Path) -> None:
    by_folder = stats(photos / "cat")
    by_glob = stats(f"{photos}/cat/*.*g")
    assert by_folder["images"] == 3 + 2  # through the link to the dogs
    assert by_glob["images"] == 3
    listing = tmp_path / "list.txt"
    listing.write_text(f"# all cats\n\n{photos}/cat/00.jpg\n{photos}/cat/01.png\n")
    assert stats(listing)["images"] == 2
    # The same file under two arguments counts once.
    twice = stats(f"{photos}/cat/*.*g", photos / "cat" / "00.jpg", f"{photos}/*/00.jpg")
    assert twice["images"] == 3


def test_globs_end_at_loops_as_folders_do(tmp_path: Path) -> None:
    """Python's own globs go round forty times, and each image would count as often."""
    cats = tmp_path / "photos" / "cats"
    cats.mkdir(parents=True)
    Image.fromarray(noise(8, 8, 0)).save(cats / "0.png")
    Image.fromarray(noise(8, 8, 1)).save(cats.parent / "1.png")
    (cats / "loop").symlink_to(cats.parent)
    for top in (cats.parent, cats):  # from the cats through the link to the rest
        for suffix in ("", "/**/*.png", "/**"):
            assert stats(f"{top}{suffix}")["images"] == 2, suffix


def test_names_do_not_depend_on_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "train").mkdir(parents=True)
        Image.fromarray(noise(8, 8, 0)).save(tmp_path / place / "train" / "0.png")
    one, other = (stats(tmp_path / place / "train")["fingerprint"] for place in ("a", "b"))
    assert one == other
    assert stats(f"{tmp_path}/a/train/*.png")["fingerprint"] == one
    monkeypatch.chdir(tmp_path / "a" / "train")
    assert stats(".")["fingerprint"] == one
    # Together they must be told apart.
    assert stats(tmp_path / "a" / "train", tmp_path / "b" / "train")["images"] == 2


def test_two_images_of_one_name(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "list.txt").write_text("0.png\n")
        Image.fromarray(noise(8, 8, 0)).save(tmp_path / place / "0.png")
    result = run("stats", tmp_path / "a" / "list.txt", tmp_path / "b" / "list.txt")
    assert result.exit_code == 2
    assert "expected every image to have a name of its own, got '0.png'" in result.stderr


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.png"
    Image.fromarray(noise(8, 8, 0)).save(os.fsdecode(path))
    assert stats(tmp_path)["images"] == 1


# --- interruptions ---


def test_ctrl_c_and_resume(many: Path, finished: bytes, tmp_path: Path) -> None:
    output = tmp_path / "stats.json"
    command = ("stats", many, "--folds", 3, "--output", output, "--save-every", 0, "--workers", 2)
    process = start(*command)
    wait_until(output.exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, errors
    assert "add --resume to go on" in errors
    assert "Traceback" not in errors
    partial = pixfuse.ChannelStatistics.load(output)
    assert 0 < partial.images < 400
    assert not json.loads(output.read_text())["run"]["complete"]

    refused = run(*command)
    assert refused.exit_code == 2
    assert "not to hold an unfinished run, got one; add --resume" in refused.stderr
    content = stats(many, "--folds", 3, "--output", output, "--resume")
    assert content["resumed_images"] == partial.images
    assert output.read_bytes() == finished
    # Once more: there is nothing left to do.
    again = stats(many, "--folds", 3, "--output", output, "--resume")
    assert again["resumed_images"] == again["images"] == 400
    assert output.read_bytes() == finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["early", "later"])
def test_signals_to_all_processes(
    number: signal.Signals, when: str, many: Path, finished: bytes, tmp_path: Path
) -> None:
    """As terminals and schedulers send them: the workers, and what forks them, must live on."""
    output = tmp_path / "stats.json"
    process = start("stats", many, "--folds", 3, "--output", output, "--save-every", 0,
                    "--workers", 2)  # fmt: skip
    if when == "early":
        # What forks the workers is importing torch for a while.
        wait_until(lambda: any("forkserver" in command_of(p) for p in descendants(process.pid)))
    else:
        wait_until(output.exists)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + number, errors
    assert "add --resume to go on" in errors
    assert "Traceback" not in errors
    partial = pixfuse.ChannelStatistics.load(output)
    assert partial.images < 400
    assert when == "early" or partial.images > 0
    content = stats(many, "--folds", 3, "--output", output, "--resume")
    assert content["resumed_images"] == partial.images
    assert output.read_bytes() == finished


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:  # it ended
        return ""


def test_ctrl_c_before_counting() -> None:
    """And in a command that has nothing to save."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    command = click.Command("waits", callback=interrupted)
    group = cli._Commands("pixfuse", commands={"waits": command})
    result = CliRunner().invoke(group, ["waits"])
    assert result.exit_code == 130
    assert result.stderr == "pixfuse: interrupted\n"


def test_killed_and_resumed(many: Path, finished: bytes, tmp_path: Path) -> None:
    output = tmp_path / "stats.json"
    images = [0]
    for seed in range(2):
        images.append(kill_after_progress(many, output, images[-1], random.Random(seed)))
    assert 0 < images[1] < images[-1] <= 400
    stats(many, "--folds", 3, "--output", output, "--resume")
    assert output.read_bytes() == finished


def kill_after_progress(many: Path, output: Path, before: int, chance: random.Random) -> int:
    """Kills a run at some time after it has saved more; how many images it leaves counted."""
    options = ("--folds", 3, "--output", output, "--save-every", 0, "--workers", 1, "--resume")
    process = start("stats", many, *options)

    def saved() -> int:
        return pixfuse.ChannelStatistics.load(output).images if output.exists() else 0

    wait_until(lambda: process.poll() is not None or saved() > before)
    time.sleep(chance.random() * 0.1)
    workers = descendants(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    return saved()


def descendants(process: int) -> list[int]:
    """The processes below one, grandchildren too."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = path.read_text().rpartition(")")
        except OSError:  # it ended
            continue
        if int(fields.split()[1]) == process:
            child = int(name.split()[0])
            found += [child, *descendants(child)]
    return found


def test_a_worker_that_dies(many: Path, finished: bytes, tmp_path: Path) -> None:
    output = tmp_path / "stats.json"
    process = start("stats", many, "--folds", 3, "--output", output, "--save-every", 0,
                    "--workers", 2)  # fmt: skip
    wait_until(output.exists)
    children = {child: descendants(child) for child in descendants(process.pid)}
    worker = next(below[0] for below in children.values() if below)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == cli.FAILED
    assert "expected the workers to live, got one that died" in errors
    stats(many, "--folds", 3, "--output", output, "--resume")
    assert output.read_bytes() == finished


class DiesWithinAMessage:
    """Work whose worker is gone when half of what it tells has been sent, as one out of memory."""

    def __iter__(self) -> Iterator[Any]:
        frame: Any = sys._getframe()
        while "result_queue" not in frame.f_locals:
            frame = frame.f_back
        results = frame.f_locals["result_queue"]
        results._wlock.acquire()
        os.write(results._writer.fileno(), struct.pack("!i", 1000) + b"half")
        os.kill(os.getpid(), signal.SIGKILL)
        yield  # never


def test_a_worker_that_dies_within_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for their turn to send, and the pool for the end of that message."""
    monkeypatch.setattr(_counting._Deaths, "patience_seconds", 0.5)
    work: list[Any] = [[], DiesWithinAMessage(), *([] for _ in range(20))]
    how = (Reading(), "train", 1)
    with _counting.Interruption() as interruption:
        pieces = _counting._in_workers(work, 2, interruption, *how)
        with pytest.raises(BrokenProcessPool):
            list(pieces)


def test_resume_refuses_another_run(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "stats.json"
    stats(photos, "--output", output)
    for options, name in (
        (("--crop", 8), "--crop"),
        (("--split", "val"), "--split"),
        (("--folds", 2), "--folds"),
        (("--mode", "L"), "--mode"),
    ):
        result = run("stats", photos, "--output", output, "--resume", *options)
        assert result.exit_code == 2
        assert f"to be from a run with the same {name}" in result.stderr
    result = run("stats", photos / "cat" / "00.jpg", "--output", output, "--resume")
    assert result.exit_code == 2
    assert "got 5 that are not" in result.stderr  # the one that is there has another name now
    pixfuse.ChannelStatistics().save(output)
    result = run("stats", photos, "--output", output, "--resume")
    assert result.exit_code == 2
    assert "to be from an earlier run of pixfuse stats" in result.stderr
    assert "got: no record of a run; choose another --output" in result.stderr


@pytest.mark.parametrize("record", [5, [], {"reading": 5}, {"reading": None}])
def test_resume_refuses_a_file_without_a_run(record: object, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "stats.json"
    stats(photos, "--output", output)
    content = json.loads(output.read_text())
    content["run"] = record
    output.write_text(json.dumps(content))
    result = run("stats", photos, "--output", output, "--resume")
    assert result.exit_code == 2
    assert "to be from an earlier run of pixfuse stats, got: no record of a run" in result.stderr


def test_resume_refuses_another_layout(tmp_path: Path) -> None:
    """The images that are left would be read otherwise than those that were counted."""
    output = tmp_path / "stats.json"
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 5, 4), np.uint8))
    stats(tmp_path / "a.npy", "--layout", "NCHW", "--output", output)
    command = ("stats", tmp_path / "a.npy", "--output", output, "--resume", "--mode", "RGB")
    result = run(*command, "--layout", "NHWC")
    assert result.exit_code == 2
    assert "the same --layout, got 'NCHW' there and 'NHWC' now" in result.stderr
    assert run(*command, "--layout", "NCHW").exit_code == 0


def test_a_dataset_that_grew(tmp_path: Path) -> None:
    folder, output = tmp_path / "data", tmp_path / "stats.json"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(noise(8, 8, n)).save(folder / f"{n}.png")
        assert stats(folder, "--output", output, "--resume")["resumed_images"] == n
    grown = output.read_bytes()
    stats(folder, "--output", output)
    assert output.read_bytes() == grown


# --- several processes ---


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_leave_the_same_file(many: Path, finished: bytes, tmp_path: Path, ranks: int) -> None:
    output = tmp_path / "stats.json"
    process = start("stats", many, "--folds", 3, "--output", output, "--workers", 0, "--json",
                    ranks=ranks)  # fmt: skip
    out, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert json.loads(out)["images"] == 400  # one rank speaks
    assert output.read_bytes() == finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.json"]


def test_interrupted_ranks(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    count = 2000  # without workers, files are counted for some time before the first are saved
    more = tmp_path_factory.mktemp("more") / "more"
    write_many(more, count)
    output = tmp_path / "stats.json"
    command = ("stats", more, "--folds", 3, "--output", output, "--workers", 0, "--save-every", 0)
    process = start(*command, ranks=2)
    files = [tmp_path / f"stats.json.rank{rank}" for rank in range(2)]
    wait_until(lambda: all(path.exists() for path in files))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    counted = [pixfuse.ChannelStatistics.load(path).images for path in files]
    assert 0 < sum(counted) < count
    refused = run(*command)
    assert refused.exit_code == 2
    # One process goes on from what two have left.
    content = stats(more, "--folds", 3, "--output", output, "--resume")
    assert content["resumed_images"] == sum(counted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.json"]
    resumed = output.read_bytes()
    stats(more, "--folds", 3, "--output", output)
    assert output.read_bytes() == resumed


# --- exit codes and messages ---


def test_strict(photos: Path, tmp_path: Path) -> None:
    result = run("stats", photos, "--strict", "--workers", 0, "--output", tmp_path / "s.json")
    assert result.exit_code == cli.UNREADABLE
    assert "pixfuse: cannot read photos/broken link.jpg: No such file" in result.stderr
    assert run("stats", photos / "cat" / "00.jpg", "--strict").exit_code == 0


def test_nothing_readable(photos: Path) -> None:
    result = run("stats", photos / "empty.jpg")
    assert result.exit_code == cli.NOTHING
    assert "expected at least 1 image that can be read, got none" in result.stderr


def test_a_single_value_has_no_normalization(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    assert stats(tmp_path)["paste"] is None
    assert "its std is 0" in run("stats", tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats"], "Missing argument 'PATHS...'"),
        (["stats", "/no/such"], "expected '/no/such' to exist, got nothing there"),
        (["stats", "/no/such/*.jpg"], "to match some files, got none"),
        (["stats", ".", "--resume"], "expected --output with --resume, to go on from, got none"),
        (["stats", ".", "--output", "/no/such/a"], "expected --output in a folder that exists"),
        (["stats", ".", "--plot", "/no/such/a"], "expected --plot in a folder that exists"),
        (["stats", ".", "--folds", "1"], "1 is not in the range 2<=x<=1000"),
        (["stats", ".", "--folds", "100000"], "100000 is not in the range 2<=x<=1000"),
        (["stats", ".", "--output", ""], "expected --output to be the name of a file, got ''"),
        (["stats", ".", "--plot", ""], "expected --plot to be the name of a file, got ''"),
        (["show", __file__, "--output", ""], "expected --output to be the name of a file, got ''"),
        (["show", __file__, "--output", "/no/such/a"], "expected --output in a folder that exists"),
        (["bench", "--plot", ""], "expected --plot to be the name of a file, got ''"),
        (["bench", "--plot", "/no/such/a"], "expected --plot in a folder that exists"),
        (["stats", ".", "--output", "/proc/a"], "expected --output to be a file that can be wr"),
        (["stats", ".", "--plot", "/proc/a"], "expected --plot to be a file that can be written"),
        (["show", __file__, "--output", "/proc/a"], "expected --output to be a file that can be"),
        (["bench", "--plot", "/proc/a"], "expected --plot to be a file that can be written"),
        (["stats", ".", "--plot", "a" * 250], "(File name too long); choose another"),
        (["stats", ".", "--output", "a", "--plot", "./a"], "expected --plot to be another file"),
        (["show", __file__, "--normalization", "imagnet"], "expected one of unit, signed"),
        (["show", __file__, "--normalization", "0/0"], "expected std to be above 0"),
        (["show", __file__, "--normalization", "0.1,0.2/1"], "expected mean and std of 1 or 3"),
        (["bench", "--rounds", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_library_is_missing() -> None:
    result = python("""
import sys
for name in ("click", "rich", "PIL", "matplotlib"):
    sys.modules[name] = None
import pixfuse  # needs none of them
from pixfuse.__main__ import main
for name in ("click", "rich", "PIL", "matplotlib"):
    try:
        sys.argv = ["pixfuse", "stats", ".", "--plot", "unwritten.png"]
        main()
    except SystemExit as error:
        print(error.code, file=sys.stderr)
    del sys.modules[name]
""")
    missing = [line for line in result.stderr.splitlines() if "pixfuse[cli]" in line]
    assert len(missing) == 4, result.stderr
    for line, name in zip(missing, ("click", "rich", "PIL", "matplotlib"), strict=True):
        assert f"pixfuse: expected {name}" in line
        assert line.endswith("got none; pip install 'pixfuse[cli]'")


def test_installed_command() -> None:
    package = Path(pixfuse.__file__).parent
    folders = (Path(sys.executable).parent, package.parent / "bin")  # that of pip --target
    command = next(path for folder in folders if (path := folder / "pixfuse").exists())
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert pixfuse.info()["pixfuse"] in version.stdout
    assert "..." not in run("--help").stdout.partition("Commands:")[2]  # nothing is cut off
    for name in ("stats", "info", "show", "bench"):
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout
        assert "Exit codes: 0 done" in result.stdout


def test_progress(many: Path) -> None:
    """On a terminal: how many of how many, the rate, the time left, what cannot be read."""
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pixfuse", "stats", many, "--workers", "0"],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(reader, 4096)
        except OSError:  # as a closed terminal reads on Linux
            break
        if not piece:
            break
        shown += piece
    os.close(reader)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"counting .* \d+/401 +\d+ images/s +0:00:\d\d", plain), plain[-500:]
    assert "1 unreadable" in plain


# --- info, show, bench ---


def test_info() -> None:
    content = json.loads(run("info", "--json").stdout)
    assert content["isa"] == pixfuse.info()["isa"]
    assert content["cuda"].keys() == pixfuse.info()["cuda"].keys()
    table = run("info").stdout
    assert f"isa {content['isa']}" in " ".join(table.split())


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 100


def test_show(photos: Path, tmp_path: Path) -> None:
    statistics, picture = tmp_path / "stats.json", tmp_path / "show.png"
    stats(photos, "--output", statistics)
    path = photos / "cat" / "00.jpg"
    options = ("--output", picture, "--stats", statistics, "--normalization", "clip")
    result = run("show", path, *options, "--normalization", "0.5/0.25", "--json")
    assert result.exit_code == 0, result.output
    modes = json.loads(result.stdout)["modes"]
    assert [mode["mode"] for mode in modes] == [
        "clip", "0.5/0.25", "stats.json", "per image", "per image and channel",
    ]  # fmt: skip
    with Image.open(path) as file:
        pixels = np.asarray(file).reshape(-1, 3) / 255
    np.testing.assert_allclose(modes[1]["mean"], (pixels.mean(0) - 0.5) / 0.25, atol=1e-6)
    np.testing.assert_allclose(modes[1]["std"], pixels.std(0) / 0.25, atol=1e-6)
    np.testing.assert_allclose(modes[4]["mean"], 0, atol=1e-6)
    np.testing.assert_allclose(modes[4]["std"], 1, atol=1e-6)
    assert is_png(picture)
    table = run("show", path, "--output", picture)
    assert table.exit_code == 0
    assert "imagenet" in table.stdout
    Image.new("RGB", (1, 1)).save(tmp_path / "black.png")
    flat = run("show", tmp_path / "black.png", "--output", picture, "--normalization", "unit")
    assert flat.exit_code == 0, flat.output


def test_a_flat_channel_is_drawn_where_its_value_is() -> None:
    density, edges = _figures._density(torch.full((2, 3), 146), torch.full((2, 3), 0.57), 0.01)
    (bin_,) = density.nonzero()[0]
    assert edges[bin_] <= 0.57 <= edges[bin_ + 1]
    assert density.sum() * (edges[1] - edges[0]) == pytest.approx(1)
    assert edges[1] - edges[0] == pytest.approx(0.04)


def test_presets_are_all_there() -> None:
    public = [getattr(pixfuse, name) for name in pixfuse.__all__]
    presets = [value for value in public if isinstance(value, pixfuse.Normalization)]
    assert len(presets) == len(cli.PRESETS) > 10
    assert all(value in cli.PRESETS.values() for value in presets)
    assert cli.parse_normalization("imagenet") == pixfuse.IMAGENET


def test_show_errors(photos: Path) -> None:
    result = run("show", photos / "empty.jpg")
    assert result.exit_code == cli.UNREADABLE
    assert "empty.jpg': an empty file" in result.stderr
    result = run("show", photos / "cat" / "00.jpg", "--stats", photos / "labels.csv")
    assert result.exit_code == 2
    assert "to be JSON" in result.stderr


def test_bench(tmp_path: Path) -> None:
    options = ("--batch", 2, "--size", 32, "--rounds", 3)
    threads = torch.get_num_threads()
    result = run("bench", *options, "--json", "--plot", tmp_path / "bench.png")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    jobs = {row["job"] for row in rows}
    assert jobs == {"normalize", "standardize_per_image", "denormalize", "channel_histogram"}
    for job in jobs:
        by = {row["by"]: row for row in rows if row["job"] == job}
        assert by["pixfuse"]["ratio"] == 1
        assert len(by) >= 2
        assert all(row["us_per_image"] > 0 for row in by.values())
    assert is_png(tmp_path / "bench.png")
    table = run("bench", *options).stdout.splitlines()
    assert any(line.startswith("channel_histogram") for line in table)
    # Of the usual terminal: there, longer lines would lose a part of the names.
    assert max(len(line.rstrip()) for line in table if " torch " in line) <= 80
    assert torch.get_num_threads() == threads


def test_bench_times_no_wrong_result() -> None:
    expected = torch.ones(4)
    for wrong in (torch.full((4,), 1.001), torch.ones(5), torch.ones(4).int()):
        contender = _quick_bench.Contender("wrong", wrong.clone)
        with pytest.raises(RuntimeError, match="bench: expected a job by wrong to give"):
            _quick_bench._difference("a job", contender, expected)
    almost = _quick_bench.Contender("almost", lambda: torch.full((4,), 1.000001))
    assert _quick_bench._difference("a job", almost, expected).startswith("up to")


def test_plot_of_statistics(photos: Path, tmp_path: Path) -> None:
    result = run("stats", photos, "--plot", tmp_path / "rgb.png")
    assert result.stdout.endswith(f"drawn to {tmp_path / 'rgb.png'}\n")
    stats(photos, "--mode", "L", "--plot", tmp_path / "gray.png")
    assert is_png(tmp_path / "rgb.png")
    assert is_png(tmp_path / "gray.png")


def test_pieces_of_arrays_leave_out_what_is_done() -> None:
    part = ArrayPart("a.npy", "a.npy", "", "NHWC", 0, 1200)
    done = {"a.npy[0]", "a.npy[600]", "a.npy[1199]"}
    pieces = list(_image_files._pieces(part, done.__contains__))
    assert [(piece.start, piece.stop) for piece in pieces] == [
        (1, 513), (513, 600), (601, 1113), (1113, 1199),
    ]  # fmt: skip


# --- what is written, and where ---


def test_outputs_replace_no_input(photos: Path, tmp_path: Path) -> None:
    image = tmp_path / "show.png"
    Image.fromarray(noise(20, 30, 0)).save(image)
    listing = tmp_path / "list.txt"
    listing.write_text("show.png\n")
    np.save(tmp_path / "a.npy", noise(20, 30, 0))
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(image, "show.png")
    statistics = tmp_path / "stats.json"
    stats(image, "--output", statistics)
    (tmp_path / "link.png").symlink_to(image)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in (
        ("stats", image, "--output", image),
        ("stats", tmp_path, "--output", image),
        ("stats", tmp_path, "--plot", image),
        ("stats", image, "--output", tmp_path / "link.png"),
        ("stats", listing, "--output", listing),
        ("stats", f"{tmp_path}/*.txt", "--output", listing),
        ("stats", tmp_path / "a.npy", "--output", tmp_path / "a.npy"),
        ("stats", tmp_path / "a.tar", "--output", tmp_path / "a.tar", "--resume"),
        ("show", image, "--output", image),
        ("show", image, "--stats", statistics, "--output", statistics),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert "to be none of the files that are read, got" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_outputs_replace_no_device(photos: Path, tmp_path: Path) -> None:
    """A pipe here: were it a device, a test that fails would replace it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for arguments in (
        ("stats", photos, "--output", pipe),
        ("stats", photos, "--plot", pipe),
        ("show", photos / "cat" / "00.jpg", "--output", pipe),
        ("bench", "--plot", pipe),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "to be a new or a regular file, got" in result.stderr
    with pytest.raises(OSError, match="not a regular file"):
        pixfuse.ChannelStatistics().save(pipe)
    assert pipe.is_fifo()


def test_a_check_changes_nothing(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "stats.json"
    output.write_text("before")
    assert run("stats", "/no/such", "--output", output, "--plot", tmp_path / "p").exit_code == 2
    assert output.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["stats.json"]


@contextlib.contextmanager
def no_space_left(size: int) -> Iterator[None]:
    """As on a full disk: no file gets larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_unfinished(photos: Path, tmp_path: Path) -> None:
    for arguments in (
        ("stats", photos, "--output", tmp_path / "a", "--workers", 0),
        ("stats", photos, "--plot", tmp_path / "a", "--workers", 0),
        ("show", photos / "cat" / "00.jpg", "--output", tmp_path / "a"),
        ("bench", "--batch", 2, "--size", 32, "--rounds", 1, "--plot", tmp_path / "a"),
    ):
        (tmp_path / "a").write_text("before")
        with no_space_left(500):
            result = run(*arguments)
        assert result.exit_code == cli.FAILED, result.output
        assert f"pixfuse: cannot write '{tmp_path}/a': File too large" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_text() == "before"
    counted = pixfuse.ChannelStatistics()
    counted.update(noise(8, 8, 0), "NHWC")
    with no_space_left(500), pytest.raises(OSError, match="File too large"):
        counted.save(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- names ---


def test_names_are_no_markup(photos: Path, tmp_path: Path) -> None:
    """Neither of rich, nor of matplotlib, which takes what is between dollars for a formula."""
    statistics = tmp_path / "s_[bold]x[red]$\\foo$.json"
    plot = tmp_path / "plot.png"
    result = run("stats", photos, "--split", r"$\foo$ [bold]", "--plot", plot, "--workers", 0,
                 "--output", statistics)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(r"$\foo$ [bold]: 5 images")
    assert is_png(plot)
    output = tmp_path / "out:100:.png"
    path = photos / "cat" / "00.jpg"
    result = run("show", path, "--stats", statistics, "--output", output)
    assert result.exit_code == 0, result.output
    assert statistics.name in result.stdout
    assert f"drawn to {output}" in result.stdout
    assert is_png(output)


def test_outputs_whose_names_are_not_utf8(photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff")
    path = photos / "cat" / "00.jpg"
    for command in (
        ("stats", path, "--split", name, "--output", tmp_path / name, "--plot", tmp_path / "a"),
        ("show", path, "--stats", tmp_path / name, "--output", tmp_path / (name + ".png")),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "pixfuse", *command],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "\\udcff" in result.stdout
    assert is_png(tmp_path / (name + ".png"))
    assert pixfuse.ChannelStatistics.load(tmp_path / name).split == name


# --- what torchrun sets ---


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE to be a whole number of 1 or more, got 'abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE to be a whole number of 1 or more, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE to be a whole number of 1 or more, got '0'"),
        ({"WORLD_SIZE": "2"}, "RANK to be a whole number from 0 to 1, got none"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK to be a whole number from 0 to 1, got '2'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE to be a whole number of 1 or more, got '0'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "environment variables of torchrun, got: "),
    ],
)
def test_wrong_variables(
    variables: dict[str, str], message: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run("stats", photos, "--json")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "start it with torchrun, or unset WORLD_SIZE" in " ".join(result.stderr.split())


def test_show_draws_three_channels(photos: Path, tmp_path: Path) -> None:
    path = photos / "cat" / "00.jpg"
    stats(path, "--mode", "RGBA", "--output", tmp_path / "4.json")
    two = pixfuse.ChannelStatistics()
    two.update(np.stack([noise(8, 8, 0)[..., :2]]), "NHWC")
    two.save(tmp_path / "2.json")
    for channels in (2, 4):
        options = ("--stats", tmp_path / f"{channels}.json", "--output", tmp_path / "a.png")
        result = run("show", path, *options)
        assert result.exit_code == 2, result.output
        message = (
            f"expected --stats of 1 or 3 channels, as pictures are drawn in RGB, got {channels}"
        )
        assert message in " ".join(result.stderr.split())


def test_many_folds_of_few_images(photos: Path) -> None:
    assert len(stats(photos, "--folds", cli.MOST_FOLDS)["folds"]) == cli.MOST_FOLDS
