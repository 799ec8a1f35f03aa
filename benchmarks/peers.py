"""Everybody who turns uint8 images into normalized floats, each in the fastest way we found.

All get the same pixels, in the form that they take as input: a tensor, a list of arrays or a list
of Pillow images, made outside the clock. Whoever can write into a given buffer does so in the
"recycled" cases. Each docstring says what the clock sees.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

import pixfuse
from benchmarks.harness import BIT_EQUAL, Contestant, Tolerance
from benchmarks.torchvision_import import import_torchvision

# The one table of differences. Everybody who is not in it must equal `pixfuse.reference` bit for
# bit. ImageNet statistics spread the results to about [-2.2, 2.7], where one step of float32 is
# 2.4e-7, of float16 0.002 and of bfloat16 0.016.
TOLERANCES = {
    "torchvision v1, Pillow": Tolerance(1e-6, "divides by 255 instead of multiplying by 1/255"),
    "Kornia": Tolerance(1e-6, "divides by 255 instead of multiplying by 1/255"),
    "OpenCV": Tolerance(1e-6, "subtracts 255*mean, multiplies by 1/(255*std)"),
    "albumentations": Tolerance(1e-6, "subtracts 255*mean, multiplies by 1/(255*std)"),
    "DALI": Tolerance(1e-6, "subtracts 255*mean, multiplies by 1/(255*std)"),
    "DALI, float16": Tolerance(2e-3, "the same, and its float16 may be the neighbouring one"),
    "torchvision v2, float16": Tolerance(4e-3, "rounds to float16 after every step"),
    "torchvision v2, bfloat16": Tolerance(3.2e-2, "rounds to bfloat16 after every step"),
    # On the CPU it is equal.
    "torch.compile, cuda": Tolerance(1.5e-6, "fuses multiply and subtract, divides approximately"),
    "torch.compile, cuda, float16": Tolerance(2e-3, "the same, then the neighbouring float16"),
    "torch.compile, cuda, bfloat16": Tolerance(1.6e-2, "the same, then the neighbouring bfloat16"),
}

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
MEMORY_FORMAT_NAMES = {
    torch.contiguous_format: "contiguous",
    torch.channels_last: "channels_last",
}


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    batch: int
    height: int
    width: int
    input_layout: Literal["NCHW", "NHWC"] = "NHWC"
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    recycled: bool = True
    threads: int = 1
    device: str = "cpu"
    normalization: pixfuse.Normalization = pixfuse.IMAGENET

    @property
    def elements(self) -> int:
        return 3 * self.batch * self.height * self.width

    @property
    def traffic_bytes(self) -> int:
        """What has to move: each input byte read once, each output written once."""
        return self.elements * (1 + self.dtype.itemsize)

    def empty_output(self) -> torch.Tensor:
        shape = (self.batch, 3, self.height, self.width)
        return torch.empty(
            shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format
        )

    def described(self) -> dict[str, Any]:
        """The case for the JSON."""
        return {
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "input": self.input_layout,
            "output": MEMORY_FORMAT_NAMES[self.memory_format],
            "dtype": DTYPE_NAMES[self.dtype],
            **({"threads": self.threads} if self.device == "cpu" else {}),
            "memory": "recycled" if self.recycled else "fresh",
        }


class Batch:
    """The same images in every form that somebody takes."""

    def __init__(self, nhwc: torch.Tensor) -> None:
        self.nhwc = nhwc

    @cached_property
    def nchw(self) -> torch.Tensor:
        return self.nhwc.permute(0, 3, 1, 2).contiguous()

    @cached_property
    def arrays(self) -> list[np.ndarray[Any, Any]]:
        return list(self.nhwc.numpy())

    @cached_property
    def pillow_images(self) -> list[Any]:
        from PIL import Image

        return [Image.fromarray(array) for array in self.arrays]

    def images(self, input_layout: str) -> torch.Tensor:
        return self.nhwc if input_layout == "NHWC" else self.nchw

    def view(self, input_layout: str) -> torch.Tensor:
        """Shaped NCHW, whichever way it lies in memory."""
        return self.nhwc.permute(0, 3, 1, 2) if input_layout == "NHWC" else self.nchw


def random_batch(case: Case) -> Batch:
    """Random pixels of the case's shape, on its device."""
    # torch fills 8 bytes per number: quicker by far than a number per byte.
    words = torch.empty((case.elements + 7) // 8, dtype=torch.int64, device=case.device).random_()
    pixels = words.view(torch.uint8)[: case.elements]
    return Batch(pixels.view(case.batch, case.height, case.width, 3))


def expected_result(case: Case, batch: Batch) -> torch.Tensor:
    """What everybody's result is compared with."""
    return pixfuse.reference.normalize(
        batch.nhwc,
        case.normalization,
        input_layout="NHWC",
        dtype=case.dtype,
        memory_format=case.memory_format,
    )


class Peer:
    """One library, used in one way."""

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    input_layouts: ClassVar[tuple[str, ...]] = ("NHWC", "NCHW")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    memory_formats: ClassVar[tuple[torch.memory_format, ...]] = (torch.contiguous_format,)

    def unavailable(self) -> str | None:
        """Why this peer cannot run here, or None."""
        try:
            for module in self.modules:
                load(module)
        except ImportError as error:
            return f"{self.name}: {error}"
        return None

    def refusal(self, case: Case) -> str | None:
        """Why this case is none of this peer's, or None."""
        if case.input_layout not in self.input_layouts:
            return f"no {case.input_layout} input"
        if case.dtype not in self.dtypes:
            return f"no {DTYPE_NAMES[case.dtype]}"
        if case.memory_format not in self.memory_formats:
            return f"no {MEMORY_FORMAT_NAMES[case.memory_format]} output"
        return None

    def tolerance(self, case: Case) -> Tolerance:
        device, dtype = case.device, DTYPE_NAMES[case.dtype]
        for key in (f"{device}, {dtype}", device, dtype):
            if f"{self.name}, {key}" in TOLERANCES:
                return TOLERANCES[f"{self.name}, {key}"]
        return TOLERANCES.get(self.name, BIT_EQUAL)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        """Everything that need not be repeated for each batch happens here, outside the clock.

        ``out`` is the buffer to fill, None in the "fresh" cases.
        """
        raise NotImplementedError

    def _contestant(
        self,
        case: Case,
        call: Callable[[], Any],
        target: torch.Tensor | None = None,
        as_tensor: Callable[[Any], torch.Tensor] = lambda result: result,
    ) -> Contestant:
        return Contestant(
            self.name,
            call,
            output="fresh" if target is None else "recycled",
            target=target,
            tolerance=self.tolerance(case),
            as_tensor=as_tensor,
        )


class Pixfuse(Peer):
    """``pixfuse.normalize``, with ``out=`` in the recycled cases."""

    name = "pixfuse"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    memory_formats = (torch.contiguous_format, torch.channels_last)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        images = batch.images(case.input_layout)
        normalization, layout = case.normalization, case.input_layout
        dtype, memory_format = case.dtype, case.memory_format

        def call() -> torch.Tensor:
            return pixfuse.normalize(
                images,
                normalization,
                input_layout=layout,
                dtype=dtype,
                memory_format=memory_format,
                out=out,
            )

        return self._contestant(case, call, out)


class TorchvisionV2(Peer):
    """v2 ``ToDtype(scale=True)`` + ``Normalize(inplace=True)`` on the whole batch.

    Another layout is made first, while the pixels are still bytes: the cheapest moment. It has no
    ``out=``. For float16 and bfloat16 it computes in that type, as its users let it.
    """

    name = "torchvision v2"
    modules = ("torchvision.transforms.v2",)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    memory_formats = (torch.contiguous_format, torch.channels_last)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        v2 = load("torchvision.transforms.v2")
        view = batch.view(case.input_layout)
        memory_format = case.memory_format
        transform = v2.Compose(
            [
                v2.ToDtype(case.dtype, scale=True),
                v2.Normalize(*_statistics(case.normalization), inplace=True),
            ]
        )
        return self._contestant(
            case, lambda: transform(view.contiguous(memory_format=memory_format))
        )


class TorchEager(Peer):
    """``out.copy_(images.contiguous()).mul_(1/255).sub_(mean).div_(std)``.

    The quickest of the spellings tried. float16 and bfloat16 are computed in float32 and rounded
    once, as ours.
    """

    name = "torch eager"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    memory_formats = (torch.contiguous_format, torch.channels_last)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        view = batch.view(case.input_layout)
        mean, std = _statistics_tensors(case.normalization, view.device)
        memory_format, dtype = case.memory_format, case.dtype

        def empty() -> torch.Tensor:
            return torch.empty(
                view.shape, dtype=torch.float32, device=view.device, memory_format=memory_format
            )

        def fill(buffer: torch.Tensor) -> torch.Tensor:
            in_order = view.contiguous(memory_format=memory_format)
            return buffer.copy_(in_order).mul_(1 / 255).sub_(mean).div_(std)

        if out is None:
            return self._contestant(case, lambda: fill(empty()).to(dtype))
        if dtype == torch.float32:
            return self._contestant(case, lambda: fill(out), out)
        scratch = empty()
        return self._contestant(case, lambda: out.copy_(fill(scratch)), out)


class TorchCompile(Peer):
    """``torch.compile`` of the same formula, compiled for this very shape, type and thread count.

    In the recycled cases the compiled function ends in ``out.copy_(...)``, which it fuses.
    Compilation is not timed. Whoever runs many cases calls ``torch.compiler.reset()`` between
    them: each compiled function of a kind makes the call of the others slower.
    """

    name = "torch.compile"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    memory_formats = (torch.contiguous_format, torch.channels_last)

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._case: Case | None = None
        self._function: Callable[..., torch.Tensor] | None = None
        self._unavailable: str | None = None
        self._tried = False

    def unavailable(self) -> str | None:
        if not self._tried:
            self._tried = True
            try:
                torch.compile(lambda x: x + 1, fullgraph=True)(torch.ones(64, device=self._device))
            except Exception as error:  # a missing compiler shows up as one of many types
                first_line = str(error).strip().partition("\n")[0]
                self._unavailable = f"torch.compile: {type(error).__name__}: {first_line}"
        return self._unavailable

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        view = batch.view(case.input_layout)
        mean, std = _statistics_tensors(case.normalization, view.device)
        function = self._compiled(case)
        if out is None:
            return self._contestant(case, lambda: function(view, mean, std))
        return self._contestant(case, lambda: function(view, mean, std, out), out)

    def _compiled(self, case: Case) -> Callable[..., torch.Tensor]:
        if self._function is None or self._case != case:
            dtype, memory_format = case.dtype, case.memory_format

            def fresh(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
                result = ((x * (1 / 255) - mean) / std).to(dtype)
                return result.contiguous(memory_format=memory_format)

            def recycled(
                x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, out: torch.Tensor
            ) -> torch.Tensor:
                return out.copy_((x * (1 / 255) - mean) / std)

            self._function = torch.compile(
                recycled if case.recycled else fresh,
                fullgraph=True,
                dynamic=False,
                # Part of the key of inductor's cache, which does not look at the thread count.
                options={"cpp.threads": case.threads},
            )
            self._case = case
        return self._function


class TorchCompileInOrder(TorchCompile):
    """``torch.compile`` of the formula, called on ``images.contiguous()``.

    Where the layout changes, this is quicker on the CPU than to leave the change to the compiled
    function; but one has to know it.
    """

    name = "torch.compile, reordered"

    def refusal(self, case: Case) -> str | None:
        in_order = (case.input_layout == "NHWC") == (case.memory_format == torch.channels_last)
        return "the layout does not change" if in_order else super().refusal(case)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        view, memory_format = batch.view(case.input_layout), case.memory_format
        mean, std = _statistics_tensors(case.normalization, view.device)
        function = self._compiled(case)

        def in_order() -> torch.Tensor:
            return view.contiguous(memory_format=memory_format)

        if out is None:
            return self._contestant(case, lambda: function(in_order(), mean, std))
        return self._contestant(case, lambda: function(in_order(), mean, std, out), out)


class OpenCV(Peer):
    """``cv2.dnn.blobFromImagesWithParams`` on a list of arrays.

    The variant of ``blobFromImages`` that takes a scale per channel and a blob to fill.
    """

    name = "OpenCV"
    modules = ("cv2",)
    input_layouts = ("NHWC",)
    memory_formats = (torch.contiguous_format, torch.channels_last)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        cv2 = load("cv2")
        cv2.setNumThreads(case.threads)
        arrays = batch.arrays
        mean, std = _statistics(case.normalization)
        params = cv2.dnn.Image2BlobParams()
        params.scalefactor = (*(1 / (255 * s) for s in std), 1.0)
        params.mean = (*(255 * m for m in mean), 0.0)
        params.ddepth = cv2.CV_32F
        channels_last = case.memory_format == torch.channels_last
        params.datalayout = cv2.DNN_LAYOUT_NHWC if channels_last else cv2.DNN_LAYOUT_NCHW
        blob_from_images = cv2.dnn.blobFromImagesWithParams

        def as_tensor(blob: Any) -> torch.Tensor:
            tensor = torch.from_numpy(blob)
            return tensor.permute(0, 3, 1, 2) if channels_last else tensor

        if out is None:
            return self._contestant(
                case, lambda: blob_from_images(arrays, params), as_tensor=as_tensor
            )
        blob = (out.permute(0, 2, 3, 1) if channels_last else out).numpy()
        return self._contestant(
            case, lambda: blob_from_images(arrays, blob, params), out, as_tensor
        )


class Dali(Peer):
    """DALI's CPU ``crop_mirror_normalize``, run synchronously on a batch it holds without a copy.

    No decoding, no copy in, no prefetching beside the clock. DALI recycles its own outputs, so the
    same way of running it stands in the recycled and in the fresh cases.
    """

    name = "DALI"
    modules = ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types")
    dtypes = (torch.float32, torch.float16)
    memory_formats = (torch.contiguous_format, torch.channels_last)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        dali, fn, types = (load(module) for module in self.modules)
        mean, std = _statistics(case.normalization)
        layout = case.input_layout.removeprefix("N")
        channels_last = case.memory_format == torch.channels_last
        pipeline = dali.Pipeline(
            batch_size=case.batch,
            num_threads=case.threads,
            device_id=None,
            exec_pipelined=False,
            exec_async=False,
            prefetch_queue_depth=1,
        )
        with pipeline:
            images = fn.external_source(
                name="images", layout=layout, repeat_last=True, no_copy=True
            )
            pipeline.set_outputs(
                fn.crop_mirror_normalize(
                    images,
                    dtype=types.FLOAT if case.dtype == torch.float32 else types.FLOAT16,
                    output_layout="HWC" if channels_last else "CHW",
                    mean=[255 * m for m in mean],
                    std=[255 * s for s in std],
                )
            )
        pipeline.build()
        pixels = batch.images(case.input_layout).numpy()
        pipeline.feed_input("images", dali.tensors.TensorListCPU(pixels, layout=layout))

        def as_tensor(outputs: Any) -> torch.Tensor:
            tensor = torch.from_numpy(np.asarray(outputs[0].as_tensor()))
            return tensor.permute(0, 3, 1, 2) if channels_last else tensor

        return Contestant(
            self.name,
            pipeline.run,
            output="own pool",
            tolerance=self.tolerance(case),
            as_tensor=as_tensor,
        )


class Numpy(Peer):
    """``np.multiply``, then ``np.subtract`` and ``np.divide`` in place, on the transposed view."""

    name = "numpy"
    memory_formats = (torch.contiguous_format, torch.channels_last)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        view = batch.view(case.input_layout).numpy()
        n, c, h, w = view.shape
        mean, std = (
            np.array(values, np.float32).reshape(3, 1, 1)
            for values in _statistics(case.normalization)
        )
        scale = np.float32(1 / 255)
        channels_last = case.memory_format == torch.channels_last

        def empty() -> np.ndarray[Any, Any]:
            if channels_last:
                return np.empty((n, h, w, c), np.float32).transpose(0, 3, 1, 2)
            return np.empty((n, c, h, w), np.float32)

        def fill(buffer: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            np.multiply(view, scale, out=buffer)
            np.subtract(buffer, mean, out=buffer)
            np.divide(buffer, std, out=buffer)
            return buffer

        if out is None:
            return self._contestant(case, lambda: fill(empty()), as_tensor=torch.from_numpy)
        buffer = out.numpy()
        return self._contestant(case, lambda: fill(buffer), out, torch.from_numpy)


class Kornia(Peer):
    """``kornia.enhance.Normalize`` on ``images.float().div_(255)``: it takes only floats."""

    name = "Kornia"
    modules = ("kornia.enhance",)

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        mean, std = (torch.tensor(values) for values in _statistics(case.normalization))
        normalize = load("kornia.enhance").Normalize(mean=mean, std=std)
        view = batch.view(case.input_layout)
        return self._contestant(case, lambda: normalize(view.contiguous().float().div_(255)))


class _PerSample(Peer):
    """Transforms each image, then stacks (into the given buffer, in the recycled cases)."""

    input_layouts = ("NHWC",)

    def samples(self, batch: Batch) -> Sequence[Any]:
        return batch.pillow_images

    def transform(self, case: Case) -> Callable[[Any], torch.Tensor]:
        raise NotImplementedError

    def contestant(self, case: Case, batch: Batch, out: torch.Tensor | None) -> Contestant:
        samples, transform = self.samples(batch), self.transform(case)
        return self._contestant(
            case, lambda: torch.stack([transform(sample) for sample in samples], out=out), out
        )


class TorchvisionV1Pillow(_PerSample):
    """v1 ``ToTensor`` + ``Normalize`` for each Pillow image, then ``torch.stack``."""

    name = "torchvision v1, Pillow"
    modules = ("torchvision.transforms", "PIL.Image")

    def transform(self, case: Case) -> Callable[[Any], torch.Tensor]:
        v1 = load("torchvision.transforms")
        normalize = v1.Normalize(*_statistics(case.normalization), inplace=True)
        compose: Callable[[Any], torch.Tensor] = v1.Compose([v1.ToTensor(), normalize])
        return compose


class TorchvisionV2Pillow(_PerSample):
    """v2 ``ToImage`` + ``ToDtype`` + ``Normalize`` for each Pillow image, then ``torch.stack``."""

    name = "torchvision v2, Pillow"
    modules = ("torchvision.transforms.v2", "PIL.Image")

    def transform(self, case: Case) -> Callable[[Any], torch.Tensor]:
        v2 = load("torchvision.transforms.v2")
        compose: Callable[[Any], torch.Tensor] = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*_statistics(case.normalization), inplace=True),
            ]
        )
        return compose


class Albumentations(_PerSample):
    """``Normalize`` + ``ToTensorV2`` for each array, then ``torch.stack``."""

    name = "albumentations"
    modules = ("albumentations", "albumentations.pytorch")

    def samples(self, batch: Batch) -> Sequence[Any]:
        return batch.arrays

    def transform(self, case: Case) -> Callable[[Any], torch.Tensor]:
        mean, std = _statistics(case.normalization)
        compose = load("albumentations").Compose(
            [
                load("albumentations").Normalize(mean=mean, std=std),
                load("albumentations.pytorch").ToTensorV2(),
            ]
        )

        def transform(array: Any) -> torch.Tensor:
            image: torch.Tensor = compose(image=array)["image"]
            return image

        return transform


def load(module: str) -> ModuleType:
    """Import a peer's module."""
    if module.startswith("torchvision"):
        return import_torchvision(module)
    # albumentations asks the network for newer versions of itself, once per import.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    return importlib.import_module(module)


def _statistics(normalization: pixfuse.Normalization) -> tuple[list[float], list[float]]:
    """Mean and std, one per channel."""
    return _three(normalization.mean), _three(normalization.std)


def _three(values: Sequence[float]) -> list[float]:
    return [float(value) for value in (values if len(values) == 3 else (values[0],) * 3)]


def _statistics_tensors(
    normalization: pixfuse.Normalization, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
        for values in _statistics(normalization)
    )
    return mean, std
