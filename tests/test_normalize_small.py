"""The short way of small images: the operator's bits, errors and effects, and when it is taken."""

import gc
import threading
from typing import Any, Literal

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pixfuse
from pixfuse import functional
from pixfuse._images import normalize_small
from tests.bits import assert_same_bits
from tests.images import LAYOUTS, random_bytes
from tests.normalizations import DTYPES, PRESETS, ROUNDINGS, made_up
from tests.watched import Watched

FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
MOST_ELEMENTS = 32768

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="this torch has no table of C functions for DLPack (2.11 or later has)",
)


def small(
    images: Any,
    normalization: Any = pixfuse.UNIT,
    input_layout: Any = "NCHW",
    dtype: Any = torch.float32,
    memory_format: Any = torch.contiguous_format,
    out: Any = None,
) -> torch.Tensor | None:
    return normalize_small(images, normalization, input_layout, dtype, memory_format, out)


def by_operator(*args: Any, **kwargs: Any) -> torch.Tensor:
    with Watched() as watched:
        result = pixfuse.normalize(*args, **kwargs)
    assert len(watched.operators) == 1
    return result


# --- the same bits ---


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_operator(
    dtype: torch.dtype, layout: Literal["NCHW", "NHWC"], memory_format: torch.memory_format
) -> None:
    for channels in range(1, 5):
        for shape in ((2, channels, 5, 7), (channels, 1, 33), (1, channels, 64, 64)):
            images = random_bytes(*shape)
            if layout == "NHWC":
                images = images.movedim(-3, -1).contiguous()
            for rounding in ROUNDINGS:
                options = {
                    "normalization": made_up(channels, rounding),
                    "input_layout": layout,
                    "dtype": dtype,
                    "memory_format": memory_format,
                }
                expected = by_operator(images, **options)
                ours = small(images, **options)
                assert ours is not None
                assert_same_bits(ours, expected)
                of_array = small(images.numpy(), **options)
                assert of_array is not None
                assert_same_bits(of_array, expected)
                out = torch.full_like(expected, 7.0)
                assert small(images, **options, out=out) is out
                assert_same_bits(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    images = LAYOUTS[layout](2, 3, 14, 17)
    for memory_format in FORMATS:
        ours = small(images, pixfuse.IMAGENET, memory_format=memory_format)
        assert ours is not None
        expected = pixfuse.reference.normalize(
            images, pixfuse.IMAGENET, memory_format=memory_format
        )
        assert_same_bits(ours, expected)
    read_only = images.numpy().view()
    read_only.flags.writeable = False
    of_array = small(read_only, pixfuse.IMAGENET, memory_format=torch.preserve_format)
    assert of_array is not None
    assert_same_bits(of_array, expected)


@hypothesis.given(
    st.lists(st.integers(1, 20), min_size=3, max_size=4),
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(DTYPES),
)
def test_any_shape(shape: list[int], preset: str, dtype: torch.dtype) -> None:
    shape[-3] = 3
    images = random_bytes(*shape)
    ours = pixfuse.normalize(images, PRESETS[preset], dtype=dtype)
    assert_same_bits(ours, pixfuse.reference.normalize(images, PRESETS[preset], dtype=dtype))


# --- the result is torch's ---


def test_an_ordinary_tensor() -> None:
    images = random_bytes(1, 3, 8, 8)
    result = pixfuse.normalize(images)
    assert type(result) is torch.Tensor
    assert not result.requires_grad
    assert result.is_contiguous()
    assert result.data_ptr() % 64 == 0
    result.requires_grad_()
    (result * 2).sum().backward()
    assert result.grad is not None
    assert bool((result.grad == 2).all())
    with torch.inference_mode():
        assert pixfuse.normalize(images).is_inference()


def test_memory_lives_as_long_as_the_tensor() -> None:
    images = random_bytes(3, 32, 32)
    expected = pixfuse.reference.normalize(images)
    kept = [pixfuse.normalize(images) for _ in range(100)]
    views = [tensor[1, 3:] for tensor in kept]
    del kept
    gc.collect()
    others = [pixfuse.normalize(random_bytes(3, 32, 32)) for _ in range(100)]
    assert all(torch.equal(view, expected[1, 3:]) for view in views)
    assert len({tensor.data_ptr() for tensor in others}) == 100


def test_nothing_leaks() -> None:
    resource = pytest.importorskip("resource")
    images = random_bytes(3, 96, 96)  # 108 KiB each time, 1 GiB in all
    out = torch.empty(3, 96, 96)
    for _ in range(100):
        pixfuse.normalize(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        pixfuse.normalize(images)
        pixfuse.normalize(images.numpy(), out=out)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000, f"{grown} KiB more"


def test_out_counts_as_written() -> None:
    out = torch.zeros(3, 8, 8)
    version = out._version
    assert pixfuse.normalize(random_bytes(3, 8, 8), out=out) is out
    assert out._version == version + 1
    weight = torch.ones(3, 8, 8, requires_grad=True)
    product = weight * out
    pixfuse.normalize(random_bytes(3, 8, 8), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        inference = torch.zeros(3, 8, 8)
        pixfuse.normalize(random_bytes(3, 8, 8), out=inference)


def test_only_outputs_above_the_limit_can_be_resized() -> None:
    """As the README's limits say."""
    with pytest.raises(RuntimeError, match="not resizable"):
        pixfuse.normalize(random_bytes(2, 128, 128)).resize_(2**16)  # 32,768 elements
    pixfuse.normalize(random_bytes(1, 181, 182)).resize_(2**16)


def test_many_threads() -> None:
    images = [random_bytes(3, 16, 16) for _ in range(8)]
    wanted = [pixfuse.reference.normalize(image, pixfuse.CLIP) for image in images]
    right = [0] * 8

    def work(i: int) -> None:
        for _ in range(500):
            right[i] += torch.equal(pixfuse.normalize(images[i], pixfuse.CLIP), wanted[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [500] * 8


# --- when it is taken ---


def test_normalize_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[torch.Tensor | None] = []

    def recorded(*args: Any) -> torch.Tensor | None:
        results.append(normalize_small(*args))
        return results[-1]

    monkeypatch.setattr(functional, "normalize_small", recorded)
    images, out = random_bytes(3, 8, 8), torch.empty(3, 8, 8)
    result = pixfuse.normalize(images, pixfuse.IMAGENET)
    assert results.pop() is result
    assert pixfuse.normalize(images, pixfuse.IMAGENET, out=out) is out
    assert results.pop() is out


def test_only_when_small() -> None:
    assert small(random_bytes(1, 1, 1, MOST_ELEMENTS)) is not None
    assert small(random_bytes(1, 1, 1, MOST_ELEMENTS + 1)) is None
    assert small(random_bytes(1, 5, 8, 8)) is None
    assert small(random_bytes(0, 3, 8, 8)) is None


class _Normalization(pixfuse.Normalization):
    pass


class _Image(torch.Tensor):
    pass


IMAGE = random_bytes(3, 4, 5)
# Each would be an error, or is for the operator to decide.
NOT_PLAIN: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no tensor": (([1, 2],), {}),
    "float images": ((IMAGE.float(),), {}),
    "int8 array": ((IMAGE.numpy().astype(np.int8),), {}),
    "bool array": ((IMAGE.numpy() > 7,), {}),
    "negative strides": ((IMAGE.numpy()[:, ::-1],), {}),
    "two dimensions": ((IMAGE[0],), {}),
    "five dimensions": ((IMAGE[None, None],), {}),
    "no dimensions": ((torch.tensor(3, dtype=torch.uint8),), {}),
    "subclass of tensors": ((IMAGE.as_subclass(_Image),), {}),
    "subclass of arrays": ((IMAGE.numpy().view(np.recarray),), {}),
    "sparse": ((IMAGE.to_sparse(),), {}),
    "meta": ((IMAGE.to("meta"),), {}),
    "no normalization": ((IMAGE, 3), {}),
    "subclass of normalizations": ((IMAGE, _Normalization(0.5, 0.5)), {}),
    "channels": ((IMAGE[:2], pixfuse.IMAGENET), {}),
    "layout": ((IMAGE,), {"input_layout": "CHW"}),
    "layout of no string": ((IMAGE,), {"input_layout": 3}),
    "dtype": ((IMAGE,), {"dtype": torch.float64}),
    "dtype of no dtype": ((IMAGE,), {"dtype": "float32"}),
    "memory format": ((IMAGE,), {"memory_format": torch.channels_last_3d}),
    "too large for float16": ((IMAGE, pixfuse.Normalization(0.5, 1e-6)), {"dtype": torch.float16}),
    "out of no tensor": ((IMAGE,), {"out": IMAGE.numpy()}),
    "out of another shape": ((IMAGE,), {"out": torch.zeros(3, 5, 4)}),
    "out of another rank": ((IMAGE,), {"out": torch.zeros(1, 3, 4, 5)}),
    "out of another dtype": ((IMAGE,), {"out": torch.zeros(3, 4, 5, dtype=torch.float16)}),
    "out of float64": ((IMAGE,), {"out": torch.zeros(3, 4, 5, dtype=torch.float64)}),
    "out with gaps": ((IMAGE,), {"out": torch.zeros(3, 4, 6)[..., :5]}),
    "out of another format": ((IMAGE,), {"out": torch.zeros(4, 5, 3).permute(2, 0, 1)}),
    "out on another device": ((IMAGE,), {"out": torch.zeros(3, 4, 5, device="meta")}),
    "out that requires a gradient": ((IMAGE,), {"out": torch.zeros(3, 4, 5, requires_grad=True)}),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_only_when_plain(case: str) -> None:
    args, kwargs = NOT_PLAIN[case]
    out = kwargs.get("out")
    assert small(*args, **kwargs) is None
    if isinstance(out, torch.Tensor) and not out.is_meta:
        assert not out.detach().any(), "out was written to"


def test_overlapping_out_is_left_to_the_operator() -> None:
    memory = torch.zeros(3 * 4 * 5 * 4, dtype=torch.uint8)
    out = memory.view(torch.float32).view(3, 4, 5)
    for images in (memory[:60].view(3, 4, 5), memory[-60:].view(3, 4, 5)):
        assert small(images, out=out) is None
        with pytest.raises(ValueError, match="share no memory"):
            pixfuse.normalize(images, out=out)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operator() -> None:
    with _Seen() as seen:
        pixfuse.normalize(IMAGE)
        pixfuse.normalize(IMAGE, out=torch.empty(3, 4, 5))
    assert [name for name in seen.names if "pixfuse" in name] == [
        "pixfuse.normalize.default",
        "pixfuse.normalize_out.default",
    ]
    with Watched() as watched:
        pixfuse.normalize(IMAGE)
    assert watched.operators == ["pixfuse.normalize.default"]


def test_the_profiler_sees_the_operator() -> None:
    with torch.profiler.profile() as profile:
        pixfuse.normalize(IMAGE)
    assert "pixfuse::normalize" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_function_keeps_the_operator() -> None:
    traced = torch.jit.trace(lambda images: pixfuse.normalize(images) + 0, (IMAGE,))
    assert "pixfuse::normalize" in str(traced.graph)
    other = 255 - IMAGE
    assert torch.equal(traced(other), pixfuse.reference.normalize(other))


def test_transformed_functions_keep_the_operator() -> None:
    images = random_bytes(2, 3, 4, 5)
    seen = []

    def normalize(image: torch.Tensor) -> torch.Tensor:
        seen.append(small(image))
        return image.float()

    torch.func.vmap(normalize)(images)  # whose images have no memory of their own
    assert seen == [None]
    whole = torch.func.functionalize(pixfuse.normalize)(images)
    assert_same_bits(whole, pixfuse.reference.normalize(images))
