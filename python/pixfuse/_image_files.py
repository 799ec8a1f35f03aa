"""Finds the images that paths name, in a fixed order, and decodes them: for the command line.

An image has a key, its path from the last part of what was named on: ``train/cat/1.jpg`` for the
folder ``/data/train``. Keys do not depend on where a dataset lies, nor on the order of arguments.
"""

from __future__ import annotations

import glob
import io
import os
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

#: Modes whose pixels have more than 8 bits; conversion would clip them.
_WIDE_MODES = ("I", "F")
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
#: How much of an array is looked at in one piece, at most.
_PIECE_BYTES, _PIECE_IMAGES = 64 << 20, 512
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


class ArrayPart(NamedTuple):
    """The images ``start`` to ``stop`` of an array in a file."""

    key: str
    path: str
    member: str  # of an .npz file, or empty
    layout: str  # a permutation of NHWC; without N for one image, without C for one channel
    start: int
    stop: int

    def keys(self) -> list[str]:
        """The keys of the images."""
        return [f"{self.key}[{n}]" for n in range(self.start, self.stop)]


#: What a worker does at a time.
Work = list[ImageFile] | ArrayPart


@dataclass(frozen=True)
class Reading:
    """How images are read; two runs that read differently must not be added up."""

    mode: str = "RGB"
    resize: int | None = None
    crop: int | None = None

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
        paths: folders (recursive, symbolic links are followed but for loops), globs (``**``
            included), text files with a path in each line, ``.npy``, ``.npz``, ``.tar``, images.
        layout: of arrays; None to tell by their shape.

    Raises:
        UsageProblemError: a path does not exist, or a glob matches nothing.
    """
    Image.init()  # so that all its extensions are known
    finder = _Finder(layout)
    for path, key in _expand(paths):
        finder.add(path, key, named=True)
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


def _expand(paths: Iterable[str]) -> list[tuple[Path, str]]:
    """The paths, with what globs match in their places, and what their keys begin with."""
    expanded: list[tuple[Path, Path]] = []  # with what tells the keys apart
    for path in paths:
        if os.path.lexists(path):
            expanded.append((Path(path), Path(path)))
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  (also absolute ones)
            if not matches:
                raise UsageProblemError(f"expected {path!r} to match some files, got none")
            parts = Path(path).parts
            fixed = next(n for n, part in enumerate(parts) if glob.has_magic(part))
            folder = Path(*parts[:fixed])
            expanded += [(Path(match), folder) for match in matches]
        else:
            raise UsageProblemError(f"expected {path!r} to exist, got nothing there")
    labels = _labels(root for _, root in expanded)
    return [
        (path, labels[root] + _printable("" if path == root else f"/{path.relative_to(root)}"))
        for path, root in expanded
    ]


def _labels(roots: Iterable[Path]) -> dict[Path, str]:
    """As much of the end of each path as tells it apart; of a file its folder too."""
    parts = {root: Path(os.path.abspath(root)).parts for root in roots}  # noqa: PTH100
    lengths = {root: 1 if root.is_dir() else 2 for root in parts}
    while True:
        taken: dict[str, list[Path]] = {}
        for root, length in lengths.items():
            label = _printable("/".join(parts[root][-length:]))
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


def _printable(name: str) -> str:
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

    def add(self, path: Path, key: str, named: bool = False) -> None:
        """Add a path; of what stands in folders only that which looks like images."""
        name = path.name.lower()
        if path.is_dir():
            self.add_folder(path, key, ())
        elif name.endswith(_ARRAYS):
            self.guarded(self.add_array_file, path, key)
        elif name.endswith(".tar"):
            self.guarded(self.add_shard, path, key)
        elif name.endswith(_PACKED_TARS):
            self.problem(key, "a compressed tar file cannot be read in place; unpack it to .tar")
        elif named and path.suffix.lower() in (".txt", ".lst", ".list"):
            self.add_list(path, key)
        elif named or path.suffix.lower() in self.images:
            self.found.files.append(ImageFile(key, str(path)))
        else:
            self.found.skipped += 1

    def guarded(self, add: Any, path: Path, key: str) -> None:
        try:
            _check_regular(path)
            add(path, key)
        except Exception as error:  # whatever a damaged file leads to
            self.problem(key, error)

    def add_folder(self, folder: Path, key: str, above: tuple[tuple[int, int], ...]) -> None:
        """Walk a folder; a link back to one that is being walked ends there."""
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                return
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.problem(key, error)
            return
        for entry in entries:
            entry_key = f"{key}/{_printable(entry.name)}"
            if entry.is_dir():
                self.add_folder(Path(entry.path), entry_key, (*above, here))
            elif os.path.splitext(entry.name)[1].lower() in self.images:  # noqa: PTH122  (quick)
                self.found.files.append(ImageFile(entry_key, entry.path))
            else:
                self.add(Path(entry.path), entry_key)

    def add_list(self, path: Path, key: str) -> None:
        """A text file of paths; relative ones start at its folder."""
        try:
            lines = path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise UsageProblemError(
                f"expected {str(path)!r} to be a list of paths: {error}"
            ) from None
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            entry = path.parent / text
            if entry.is_dir():
                raise UsageProblemError(
                    f"expected line {number} of {str(path)!r} to be a file, got the folder {text!r}"
                )
            entry_key = os.path.normpath(text).lstrip("/")
            if entry.name.lower().endswith((*_ARRAYS, ".tar")):
                self.add(entry, entry_key)
            else:
                self.found.files.append(ImageFile(entry_key, str(entry)))

    def add_shard(self, path: Path, key: str) -> None:
        """A tar file: its members are read in place later, wherever they lie."""
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                suffix = os.path.splitext(member.name)[1].lower()  # noqa: PTH122
                if suffix in self.images and not member.issparse():
                    place = (str(path), member.offset_data, member.size)
                    self.found.files.append(ImageFile(f"{key}/{_printable(member.name)}", *place))
                else:
                    self.found.skipped += 1
        _check_end_of_tar(path, shard.offset)

    def add_array_file(self, path: Path, key: str) -> None:
        if path.suffix.lower() == ".npy":
            self.add_array(path, key, "", np.load(path, mmap_mode="r", allow_pickle=False))
            return
        with zipfile.ZipFile(path) as file:
            members = [name for name in file.namelist() if name.endswith(".npy")]
        before = len(self.found.arrays)
        for member in members:
            shape, dtype = _header_in_zip(path, member)
            if dtype == np.uint8 and len(shape) >= 3:
                array = open_array(str(path), member)
                self.add_array(path, f"{key}/{member.removesuffix('.npy')}", member, array)
            else:
                self.found.skipped += 1  # labels, say
        if len(self.found.arrays) == before:
            raise ValueError("no uint8 array of images in it")

    def add_array(self, path: Path, key: str, member: str, array: np.ndarray) -> None:
        if array.dtype != np.uint8:
            raise TypeError(f"expected an array of dtype uint8, got {array.dtype}")
        layout = self.layout or _layout_of(array.shape)
        if len(layout) != array.ndim:
            raise ValueError(f"expected an array in the layout {layout}, got shape {array.shape}")
        count = array.shape[layout.index("N")] if "N" in layout else 1
        channels = array.shape[layout.index("C")] if "C" in layout else 1
        if array.size > 0:
            part = ArrayPart(key, str(path), member, layout, 0, count)
            self.found.arrays.append((part, channels))


def _check_regular(path: Path | str) -> None:
    """A pipe would wait for somebody to write."""
    _size_of_regular(path)


def _size_of_regular(path: Path | str) -> int:
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return status.st_size


def _check_end_of_tar(path: Path, end: int) -> None:
    """Python takes a tar file that is cut off between two members for a whole one."""
    with path.open("rb") as file:
        file.seek(end)
        if len(file.read(512)) < 512:
            raise ValueError("the tar file is cut off")


def _layout_of(shape: tuple[int, ...]) -> str:
    """What the dimensions of an array are, if that is beyond doubt."""
    few = (1, 3, 4)
    choices = {
        2: ["HW"],
        3: ["NHW"] if shape[-1] not in few else ["NHW", "HWC"],
        4: [
            layout
            for layout, axis in (("NHWC", -1), ("NCHW", 1))
            if len(shape) == 4 and shape[axis] in few
        ],
    }.get(len(shape), [])
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
    if _is_compressed(part):
        # Unpacked from its start each time: so once, unless a part of it was counted already.
        longest = part.stop
    else:
        longest = _PIECE_IMAGES
    start = None
    for n, key in zip(range(part.start, part.stop), part.keys(), strict=True):
        if done(key):
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
    """Keys and (N, H, W, C) views of the images of an array, some at a time."""
    keys = part.keys()
    for start, array in _open_pieces(part):
        layout = "".join(d for d in "NC" if d not in part.layout) + part.layout
        batch = array.reshape((1,) * (4 - array.ndim) + array.shape)  # a view: ones in front
        batch = batch.transpose([layout.index(d) for d in "NHWC"])
        first = start - part.start
        yield keys[first : first + len(batch)], batch


def _open_pieces(part: ArrayPart) -> Iterator[tuple[int, np.ndarray]]:
    """The images from ``part.start`` on, in pieces of bounded size, each with its first index."""
    array = open_array(part.path, part.member)
    if "N" not in part.layout:
        yield 0, array if not _is_compressed(part) else _unpack(part, array.shape)
        return
    axis = part.layout.index("N")
    bytes_each = max(array.nbytes // array.shape[axis], 1)
    images_each = max(min(_PIECE_BYTES // bytes_each, _PIECE_IMAGES), 1)
    if not _is_compressed(part):
        for start in range(part.start, part.stop, images_each):
            stop = min(start + images_each, part.stop)
            yield start, array[(slice(None),) * axis + (slice(start, stop),)]
        return
    if axis != 0:
        raise ValueError(f"expected a compressed array with N first, got {part.layout}")
    with zipfile.ZipFile(part.path) as file, file.open(part.member) as stream:
        _read_header(stream)
        for start in range(0, part.stop, images_each):
            count = min(images_each, part.stop - start)
            piece = np.frombuffer(stream.read(count * bytes_each), np.uint8)
            piece = piece.reshape(count, *array.shape[1:])
            skip = max(part.start - start, 0)
            if skip < count:
                yield start + skip, piece[skip:]


def _unpack(part: ArrayPart, shape: tuple[int, ...]) -> np.ndarray:
    with zipfile.ZipFile(part.path) as file, file.open(part.member) as stream:
        _read_header(stream)
        return np.frombuffer(stream.read(), np.uint8).reshape(shape)


def open_array(path: str, member: str) -> np.ndarray:
    """An .npy file, or an uncompressed member of an .npz file, mapped and not read."""
    if not member:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    with zipfile.ZipFile(path) as file:
        entry = file.getinfo(member)
        with file.open(entry) as stream:
            shape, fortran, dtype = _read_header(stream)
            header = stream.tell()
    if entry.compress_type != zipfile.ZIP_STORED:
        if fortran:
            raise ValueError("expected a compressed array in C order, got Fortran order")
        return np.broadcast_to(np.zeros((), dtype), shape)  # its shape; read piece by piece
    with Path(path).open("rb") as raw:
        raw.seek(entry.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(raw.read(4), "<u2").tolist()
    offset = entry.header_offset + 30 + name_bytes + extra_bytes + header
    order: Any = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", offset, shape, order)


def _is_compressed(part: ArrayPart) -> bool:
    if not part.member:
        return False
    with zipfile.ZipFile(part.path) as file:
        return file.getinfo(part.member).compress_type != zipfile.ZIP_STORED


def _header_in_zip(path: Path | str, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with zipfile.ZipFile(path) as file, file.open(member) as stream:
        shape, _, dtype = _read_header(stream)
    return shape, dtype


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
