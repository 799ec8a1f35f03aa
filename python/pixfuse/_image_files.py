"""Finds the images that paths name, in a fixed order, and decodes them: for the command line.

An image has a key, its path from the last part of what was named on: ``train/cat/1.jpg`` for the
folder ``/data/train``. Keys do not depend on where a dataset lies, nor on the order of arguments.
"""

from __future__ import annotations

import functools
import glob
import io
import math
import os
import posixpath
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

#: Modes whose pixels have more than 8 bits; conversion would clip them.
_WIDE_MODES = ("I", "F")
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
#: How much of an array is looked at in one piece, at most: what is read stays in the cache until it
#: is counted, and its memory is used again.
_PIECE_BYTES, _PIECE_IMAGES = 4 << 20, 512
_ARRAYS = (".npy", ".npz")
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class UsageProblemError(Exception):
    """What was asked for cannot be; the message says what to do."""


class Unreadable(NamedTuple):
    """A file that is not counted, and why."""

    key: str
    reason: str


class ImageFile(NamedTuple):
    """An encoded image: a file, or ``size`` bytes of one from ``offset`` on."""

    key: str
    path: str
    offset: int = 0
    size: int = -1
    header: int = 0  # where its own header lies in a tar file: links share the bytes of another


class ArrayPart(NamedTuple):
    """The images ``start`` to ``stop`` of an array in a file."""

    key: str
    path: str
    member: str  # of an .npz file, or empty
    layout: str  # NHWC or NCHW; without N for one image, without C for one channel
    start: int
    stop: int

    def key_of(self, n: int) -> str:
        """The key of an image."""
        return f"{self.key}[{n}]"


#: Folders that a walk has passed, whatever they are called.
_Folders = tuple[tuple[int, int], ...]
#: What a worker does at a time.
Work = list[ImageFile] | ArrayPart


@dataclass(frozen=True)
class Reading:
    """How images are read; two runs that read differently must not be added up."""

    mode: str = "RGB"
    resize: int | None = None
    crop: int | None = None
    layout: str | None = None  # of arrays, where it was said

    @property
    def channels(self) -> int:
        """How many channels every image has to have."""
        return _CHANNELS[self.mode]


@dataclass
class Found:
    """What the paths name."""

    files: list[ImageFile] = field(default_factory=list)
    arrays: list[tuple[ArrayPart, int]] = field(default_factory=list)  # with the channel count
    unreadable: list[Unreadable] = field(default_factory=list)
    skipped: int = 0  # files in folders and shards whose names are not those of images

    @property
    def images(self) -> int:
        """How many images there are, readable or not."""
        return len(self.files) + sum(part.stop - part.start for part, _ in self.arrays)


# ---- finding -------------------------------------------------------------------------------------


def find_images(paths: Iterable[str], layout: str | None = None) -> Found:
    """Find all images of folders, globs, lists, arrays and tar shards, sorted by key.

    Args:
        paths: folders (recursive), globs (``**`` included), text files (UTF-8) with a path in each
            line, ``.npy``, ``.npz``, ``.tar``, images. Symbolic links are followed but for loops.
        layout: of arrays; None to tell by their shape, if that is beyond doubt.

    Raises:
        UsageProblemError: a path does not exist, or a glob matches nothing.
    """
    Image.init()  # so that all its extensions are known
    finder = _Finder(layout)
    for path, key, above in _expand(paths):
        finder.add(path, key, named=True, above=above)
    found = finder.found
    found.files = _once(found.files, lambda file: file)
    found.arrays = _once(found.arrays, lambda array: array[0])
    found.unreadable = sorted(set(found.unreadable))
    return found


def _once(entries: list[Any], part_of: Any) -> list[Any]:
    """Sorted by key, and what two arguments name once."""
    places: set[tuple[Any, ...]] = set()
    unique: dict[str, Any] = {}
    folders: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: (len(part_of(entry).key), part_of(entry).key)):
        key, path, *inside = part_of(entry)
        # As os.path.abspath, which leaves links what they are; once for each folder.
        folder, slash, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = os.path.abspath(folder + slash)  # noqa: PTH100
        place = (folders[folder], name, *inside)
        if place in places:
            continue
        if key in unique:
            raise UsageProblemError(
                f"expected every image to have a name of its own, got {key!r} for "
                f"{part_of(unique[key]).path!r} and {path!r}"
            )
        places.add(place)
        unique[key] = entry
    return [unique[key] for key in sorted(unique)]


def _expand(paths: Iterable[str]) -> list[tuple[Path, str, _Folders]]:
    """The paths, with what globs match in their places, their keys, and the folders passed."""
    expanded: list[tuple[Path, Path, _Folders]] = []  # with what tells the keys apart
    for path in paths:
        if os.path.lexists(path):
            expanded.append((Path(path), Path(path), ()))
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  (also absolute ones)
            if not matches:
                raise UsageProblemError(f"expected {path!r} to match some files, got none")
            parts = Path(path).parts
            fixed = next(n for n, part in enumerate(parts) if glob.has_magic(part))
            folder = Path(*parts[:fixed])
            passed = functools.cache(functools.partial(_folders_from, folder))
            for match in map(Path, matches):
                above = passed(match.parent) if "**" in parts and match != folder else ()
                if len(set(above)) == len(above):  # else back through a link: a walk would end
                    expanded.append((match, folder, above))
        else:
            try:
                os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                raise UsageProblemError(f"expected {path!r} to exist, got nothing there") from None
            except OSError:
                pass  # it may well exist: whoever reads it says why it cannot be read
            expanded.append((Path(path), Path(path), ()))
    labels = _labels(root for _, root, _ in expanded)
    return [
        (
            path,
            labels[root] + printable("" if path == root else f"/{path.relative_to(root)}"),
            above,
        )
        for path, root, above in expanded
    ]


def _folders_from(top: Path, folder: Path) -> _Folders:
    """From ``top`` on, as a walk would have passed them."""
    names = folder.relative_to(top).parts
    return tuple(_identity(top.joinpath(*names[:n]).stat()) for n in range(len(names) + 1))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _labels(roots: Iterable[Path]) -> dict[Path, str]:
    """As much of the end of each path as tells it apart; of a file its folder too."""
    parts = {root: Path(os.path.abspath(root)).parts for root in roots}  # noqa: PTH100
    lengths = {root: 1 if _is_folder(root) else 2 for root in parts}
    while True:
        taken: dict[str, list[Path]] = {}
        for root, length in lengths.items():
            label = printable("/".join(parts[root][-length:]))
            taken.setdefault(label, []).append(root)
        longer = [
            root
            for group in taken.values()
            if len({parts[root] for root in group}) > 1
            for root in group
            if lengths[root] < len(parts[root])
        ]
        if not longer:
            return {root: label for label, group in taken.items() for root in group}
        for root in longer:
            lengths[root] += 1


def _is_folder(path: Path | os.DirEntry[str]) -> bool:
    """What cannot be looked at is none: whoever reads it says why it cannot be read."""
    try:
        return path.is_dir()
    except OSError:  # a link to itself, a folder that is closed to us, a name that is too long
        return False


def printable(name: str) -> str:
    """The name, with bytes that are no UTF-8 written out."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


class _Finder:
    def __init__(self, layout: str | None) -> None:
        self.layout = layout
        self.found = Found()
        self.images = set(Image.registered_extensions())

    def problem(self, key: str, error: Exception | str) -> None:
        self.found.unreadable.append(
            Unreadable(key, error if isinstance(error, str) else reason_of(error))
        )

    def add(self, path: Path, key: str, named: bool = False, above: _Folders = ()) -> None:
        """Add a path; of what stands in folders only that which looks like images."""
        name = path.name.lower()
        if _is_folder(path):
            self.add_folder(path, key, above)
        elif name.endswith(".npy"):
            self.guarded(key, self.add_npy, path)
        elif name.endswith(".npz"):
            self.guarded(key, self.add_npz, path)
        elif name.endswith(".tar"):
            self.guarded(key, self.add_shard, path)
        elif name.endswith(_PACKED_TARS):
            self.problem(key, "a compressed tar file cannot be read in place; unpack it to .tar")
        elif named and path.suffix.lower() in (".txt", ".lst", ".list"):
            self.add_list(path, key)
        elif named or path.suffix.lower() in self.images:
            self.found.files.append(ImageFile(key, str(path)))
        else:
            self.found.skipped += 1

    def guarded(self, key: str, add: Callable[..., None], *what: Any) -> None:
        try:
            add(key, *what)
        except Exception as error:  # whatever a damaged file leads to
            self.problem(key, error)

    def add_folder(self, folder: Path, key: str, above: _Folders) -> None:
        """Walk a folder; a link back to one that is being walked ends there."""
        try:
            here = _identity(folder.stat())
            if here in above:
                return
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.problem(key, error)
            return
        for entry in entries:
            entry_key = f"{key}/{printable(entry.name)}"
            if _is_folder(entry):
                self.add_folder(Path(entry.path), entry_key, (*above, here))
            elif os.path.splitext(entry.name)[1].lower() in self.images:  # noqa: PTH122  (quick)
                self.found.files.append(ImageFile(entry_key, entry.path))
            else:
                self.add(Path(entry.path), entry_key)

    def add_list(self, path: Path, key: str) -> None:
        """A text file of paths; relative ones start at its folder."""
        try:
            # Some editors begin a file with a mark of its encoding. Not splitlines(): it ends lines
            # at characters that stand in names.
            lines = path.read_text("utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UsageProblemError(
                f"expected {str(path)!r} to be a list of paths: {error}"
            ) from None
        for number, line in enumerate(lines, 1):
            text = line.strip(" \t")
            if not text or text.startswith("#"):
                continue
            entry = path.parent / text
            if _is_folder(entry):
                raise UsageProblemError(
                    f"expected line {number} of {str(path)!r} to be a file, got the folder {text!r}"
                )
            entry_key = os.path.normpath(text).lstrip("/")
            if entry.name.lower().endswith((*_ARRAYS, ".tar")):
                self.add(entry, entry_key)
            else:
                self.found.files.append(ImageFile(entry_key, str(entry)))

    def add_shard(self, key: str, path: Path) -> None:
        """A tar file: its members are read in place later, wherever they lie."""
        _size_of_regular(path)
        members: list[tarfile.TarInfo] = []
        try:
            with tarfile.open(path, "r:") as shard:
                members.extend(shard)
            _check_end_of_tar(path, shard.offset)
        finally:  # what stands before a damage counts
            self.add_members(key, path, members)

    def add_members(self, key: str, path: Path, members: list[tarfile.TarInfo]) -> None:
        by_name: dict[str, tarfile.TarInfo] = {}
        for member in members:
            by_name.setdefault(posixpath.normpath(member.name), member)
        keys: set[str] = set()
        for member in members:
            if member.isdir():
                continue
            if posixpath.splitext(member.name)[1].lower() not in self.images:
                self.found.skipped += 1
                continue
            member_key = f"{key}/{printable(member.name)}"
            file = _follow(member, by_name)
            if member_key in keys:
                self.problem(member_key, "another member of this name, not counted; the first is")
            elif file is None:
                self.problem(member_key, f"no file in the tar file at {member.linkname!r}")
            elif not file.isfile():
                self.problem(member_key, "not a regular file")
            elif file.issparse():
                self.problem(member_key, "a sparse file cannot be read in place; unpack it")
            else:
                place = (str(path), file.offset_data, file.size, member.offset)
                self.found.files.append(ImageFile(member_key, *place))
            keys.add(member_key)

    def add_npy(self, key: str, path: Path) -> None:
        size = _size_of_regular(path)
        with path.open("rb") as file:
            self.add_array(key, path, "", _read_header(file), size - file.tell())

    def add_npz(self, key: str, path: Path) -> None:
        _size_of_regular(path)
        before = len(self.found.arrays) + len(self.found.unreadable)
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            for name in sorted(set(names)):
                if name.endswith(".npy"):
                    member_key = f"{key}/{printable(name.removesuffix('.npy'))}"
                    self.guarded(member_key, self.add_member, path, file, name)
                elif not name.endswith("/"):
                    self.found.skipped += 1
        if len(names) > len(set(names)):
            raise ValueError("two members have one name; only the last of them is read")
        if len(self.found.arrays) + len(self.found.unreadable) == before:
            raise ValueError("no uint8 array of images in it")

    def add_member(self, key: str, path: Path, file: zipfile.ZipFile, name: str) -> None:
        with file.open(name) as stream:
            header = _read_header(stream)
            size = file.getinfo(name).file_size - stream.tell()
        if header.dtype == np.uint8 and len(header.shape) >= 3:
            self.add_array(key, path, name, header, size)
        else:
            self.found.skipped += 1  # labels, say

    def add_array(self, key: str, path: Path, member: str, header: _Header, size: int) -> None:
        shape = header.shape
        if header.dtype != np.uint8:
            raise TypeError(f"expected an array of dtype uint8, got {header.dtype}")
        layout = self.layout or _layout_of(shape)
        if len(layout) != len(shape):
            raise ValueError(f"expected an array in the layout {layout}, got shape {shape}")
        if min(shape) < 1:
            raise ValueError(f"expected at least 1 pixel, got shape {shape}")
        if math.prod(shape) != size:
            raise ValueError(f"expected {math.prod(shape)} bytes for shape {shape}, got {size}")
        count = shape[layout.index("N")] if "N" in layout else 1
        channels = shape[layout.index("C")] if "C" in layout else 1
        self.found.arrays.append((ArrayPart(key, str(path), member, layout, 0, count), channels))


def _size_of_regular(path: Path | str) -> int:
    """A pipe would wait for somebody to write."""
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return status.st_size


def _follow(member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member that a link leads to; None if that is not in the tar file."""
    followed: set[int] = set()
    found: tarfile.TarInfo | None = member
    while found is not None and (found.islnk() or found.issym()):
        if found.offset in followed:
            return None
        followed.add(found.offset)
        # A symbolic link starts at its folder, a hard link at the top.
        folder = posixpath.dirname(found.name) if found.issym() else ""
        found = by_name.get(posixpath.normpath(posixpath.join(folder, found.linkname)))
    return found


def _check_end_of_tar(path: Path, end: int) -> None:
    """Python takes a damaged header for the end of a tar file, and a cut between members too."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(512)
        if len(rest) < 512:
            raise ValueError("the tar file is cut off")
        while rest:
            if rest.strip(b"\0"):
                raise ValueError(
                    f"expected only zeros from byte {end} on, got a damaged header or a second tar "
                    "file behind the first; nothing from there on is counted"
                )
            rest = file.read(1 << 20)


def _layout_of(shape: tuple[int, ...]) -> str:
    """What the dimensions of an array are, if that is beyond doubt."""
    few = (1, 3, 4)
    choices: list[str] = []
    if len(shape) == 2:
        choices = ["HW"]
    elif len(shape) == 3:
        choices = ["NHW"]
        if shape[-1] in few:
            choices.append("HWC")
        if shape[0] in few[1:]:  # one channel of one image is one gray image
            choices.append("CHW")
    elif len(shape) == 4:
        choices = [name for name, axis in (("NHWC", -1), ("NCHW", 1)) if shape[axis] in few]
    if len(choices) == 1:
        return choices[0]
    if choices:
        raise ValueError(f"shape {shape} can be {' or '.join(choices)}; say which by --layout")
    raise ValueError(f"expected an array of images (N, H, W, C), got shape {shape}")


def plan_work(found: Found, reading: Reading, done: Any, files_each: int) -> list[Work]:
    """Cut what is not done yet into pieces for workers.

    Args:
        found: what there is. Arrays of other channel counts than ``reading`` asks for become
            unreadable here.
        reading: how the images will be read.
        done: a function that says of a key whether its image was counted already.
        files_each: how many files are decoded in one piece.
    """
    files = [file for file in found.files if not done(file.key)]
    work: list[Work] = [files[i : i + files_each] for i in range(0, len(files), files_each)]
    for part, channels in found.arrays:
        if channels != reading.channels:
            mode = next((name for name, count in _CHANNELS.items() if count == channels), None)
            hint = f"; pass --mode {mode}" if mode else ""
            reason = f"expected {reading.channels} channels ({reading.mode}), got {channels}{hint}"
            found.unreadable.append(Unreadable(part.key, reason))
            continue
        work += _pieces(part, done)
    found.unreadable.sort()
    return work


def _pieces(part: ArrayPart, done: Any) -> Iterator[ArrayPart]:
    """The images of an array that are not done, in runs of at most 512."""
    # Of an .npz file read from its start to its end each time: so once, unless a part of it was
    # counted already.
    longest = part.stop if part.member else _PIECE_IMAGES
    start = None
    for n in range(part.start, part.stop):
        if done(part.key_of(n)):
            if start is not None:
                yield part._replace(start=start, stop=n)
            start = None
        elif start is None:
            start = n
        elif n - start == longest:
            yield part._replace(start=start, stop=n)
            start = n
    if start is not None:
        yield part._replace(start=start)


# ---- reading -------------------------------------------------------------------------------------


def reason_of(error: Exception) -> str:
    """Why a file cannot be read: the same words wherever it lies."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().rstrip(".")
    return text or type(error).__name__


def read_image(file: ImageFile, reading: Reading) -> Image.Image:
    """Decode an image to the mode of ``reading``, resized and cropped.

    Of an animation the first frame. Alpha is dropped, and palettes and CMYK are converted, as
    ``torchvision.datasets.ImageFolder`` does by ``convert("RGB")``.
    """
    source: Any = file.path
    whole = _size_of_regular(file.path)
    if (whole if file.size < 0 else file.size) == 0:
        raise ValueError("an empty file")
    if file.size >= 0:
        with Path(file.path).open("rb") as shard:
            shard.seek(file.offset)
            source = io.BytesIO(shard.read(file.size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images and of transparent palettes
        with Image.open(source) as image:
            if image.mode.startswith(_WIDE_MODES):
                raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
            if image.mode == reading.mode:  # convert() would copy it
                image.load()
                return transform(image, reading)
            return transform(image.convert(reading.mode), reading)


def transform(image: Image.Image, reading: Reading) -> Image.Image:
    """Resize the shorter side and cut out the centre, as torchvision's ``Resize``, ``CenterCrop``.

    Nothing is padded, since a padding would be counted: a crop is never larger than the image.
    """
    width, height = image.size
    if reading.resize is not None and min(width, height) != reading.resize:
        side = reading.resize
        if width <= height:
            width, height = side, int(side * height / width)
        else:
            width, height = int(side * width / height), side
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if reading.crop is not None:
        crop_width, crop_height = min(reading.crop, width), min(reading.crop, height)
        left, top = round((width - crop_width) / 2.0), round((height - crop_height) / 2.0)
        image = image.crop((left, top, left + crop_width, top + crop_height))
    return image


def read_array(part: ArrayPart) -> Iterator[tuple[list[str], np.ndarray]]:
    """Keys and (N, H, W, C) views of the images of an array, some at a time.

    Damage to a member of an .npz file may show at its end only.
    """
    layout = part.layout if "N" in part.layout else f"N{part.layout}"
    layout = layout if "C" in layout else f"C{layout}"
    for start, array in _in_npz(part) if part.member else _mapped(part):
        batch = array.reshape((1,) * (4 - array.ndim) + array.shape)  # a view: ones in front
        batch = batch.transpose([layout.index(d) for d in "NHWC"])
        yield [part.key_of(start + n) for n in range(len(batch))], batch


def _mapped(part: ArrayPart) -> Iterator[tuple[int, np.ndarray]]:
    """The images of an .npy file, in pieces of bounded size, each with its first index."""
    yield from _cut(part, np.lib.format.open_memmap(part.path, mode="r"))


def _cut(part: ArrayPart, array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    if "N" not in part.layout:
        array = array[None]
    step = _images_each(array.shape)
    for start in range(part.start, part.stop, step):
        yield start, array[start : min(start + step, part.stop)]


def _in_npz(part: ArrayPart) -> Iterator[tuple[int, np.ndarray]]:
    """The same of a member of an .npz file, which is read to its end.

    There ``zipfile`` compares the checksum; it would not if the bytes were mapped.
    """
    with zipfile.ZipFile(part.path) as file, file.open(part.member) as stream:
        shape, fortran, _ = _read_header(stream)
        if fortran:  # the bytes of an image lie apart
            yield from _cut(part, np.frombuffer(stream.read(), np.uint8).reshape(shape, order="F"))
            return
        if "N" not in part.layout:
            shape = (1, *shape)
        step = _images_each(shape)
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            piece = np.frombuffer(stream.read(count * math.prod(shape[1:])), np.uint8)
            piece = piece.reshape(count, *shape[1:])
            first, stop = max(start, part.start), min(start + count, part.stop)
            if first < stop:
                yield first, piece[first - start : stop - start]


def _images_each(shape: tuple[int, ...]) -> int:
    return max(min(_PIECE_BYTES // math.prod(shape[1:]), _PIECE_IMAGES), 1)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def _read_header(stream: Any) -> _Header:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return _Header(*np.lib.format.read_array_header_1_0(stream))
    return _Header(*np.lib.format.read_array_header_2_0(stream))
