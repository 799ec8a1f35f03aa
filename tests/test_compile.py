"""The operators under torch.compile, torch.export and opcheck: no graph breaks, the same bits."""

from typing import Any, Literal

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import pixfuse
from pixfuse._library import MEMORY_FORMAT_CODES
from tests.bits import assert_same_bits
from tests.images import LAYOUTS, random_bytes
from tests.normalizations import DTYPES, ROUNDINGS, made_up

FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function: Any, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The function in one graph, and a count of how often it was compiled.

    "aot_eager" takes every step of the compiler but the last, which makes C++ code.
    """
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


OPERANDS = {
    "batch": lambda: random_bytes(2, 3, 4, 5),
    "image": lambda: random_bytes(3, 4, 5),
    "channels_last": lambda: random_bytes(2, 4, 5, 3).permute(0, 3, 1, 2),
    "crop": lambda: random_bytes(2, 3, 8, 9)[:, :, 1:5, 2:7],
    "same image": lambda: random_bytes(1, 3, 4, 5).expand(2, 3, 4, 5),
    "empty": lambda: random_bytes(0, 3, 4, 5),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("operand", OPERANDS)
def test_opcheck(operand: str, memory_format: torch.memory_format) -> None:
    images = OPERANDS[operand]()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    for dtype, rounding in ((0, 0), (1, 4), (2, 1)):
        options = (rounding, 0, dtype, MEMORY_FORMAT_CODES[memory_format])
        torch.library.opcheck(
            torch.ops.pixfuse.normalize.default,
            (images, mean, std, *options),
        )
        out = torch.ops.pixfuse.normalize(images, mean, std, *options)
        torch.library.opcheck(
            torch.ops.pixfuse.normalize_out.default, (images, mean, std, rounding, 0, out)
        )


def test_opcheck_nhwc() -> None:
    args = (random_bytes(2, 4, 5, 3), [0.5], [0.5], 0, 1)
    torch.library.opcheck(torch.ops.pixfuse.normalize.default, (*args, 0, 1))
    torch.library.opcheck(torch.ops.pixfuse.normalize_out.default, (*args, torch.empty(2, 3, 4, 5)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_is_eager(device: torch.device, rounding: Any) -> None:
    normalization = made_up(3, rounding)

    def function(images: torch.Tensor) -> torch.Tensor:
        return pixfuse.normalize(images, normalization, dtype=torch.bfloat16)

    run, counter = compiled(function)
    images = random_bytes(2, 3, 8, 9).to(device)
    assert_same_bits(run(images), function(images))
    assert counter.frame_count == 1


@pytest.mark.parametrize("input_layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_every_option_compiles(
    input_layout: Literal["NCHW", "NHWC"], memory_format: torch.memory_format
) -> None:
    def function(images: torch.Tensor) -> list[torch.Tensor]:
        return [
            pixfuse.normalize(
                images,
                pixfuse.CLIP,
                input_layout=input_layout,
                dtype=dtype,
                memory_format=memory_format,
            )
            for dtype in DTYPES
        ]

    run, _ = compiled(function)
    for layout in ("nchw", "channels_last", "crop"):
        images = LAYOUTS[layout](2, 3, 6, 7)
        images = images if input_layout == "NCHW" else images.permute(0, 2, 3, 1)
        for ours, expected in zip(run(images), function(images), strict=True):
            assert_same_bits(ours, expected)


def test_several_normalizations_in_one_function() -> None:
    def function(images: torch.Tensor) -> torch.Tensor:
        unit = pixfuse.normalize(images)
        signed = pixfuse.normalize(images, pixfuse.SIGNED)
        standardized = pixfuse.normalize(images, pixfuse.IMAGENET)
        return torch.cat([unit * 2 - signed, standardized])

    run, counter = compiled(function)
    images = random_bytes(2, 3, 8, 9)
    assert_same_bits(run(images), function(images))
    assert counter.frame_count == 1


def test_normalization_as_an_argument() -> None:
    run, _ = compiled(pixfuse.normalize)
    images = random_bytes(2, 3, 8, 9)
    for normalization in (pixfuse.UNIT, pixfuse.IMAGENET, made_up(3, "nearest")):
        assert_same_bits(run(images, normalization), pixfuse.normalize(images, normalization))


def test_out_is_written() -> None:
    def function(images: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return pixfuse.normalize(images, pixfuse.IMAGENET, out=out) + 1

    run, counter = compiled(function)
    images, out = random_bytes(2, 3, 8, 9), torch.full((2, 3, 8, 9), 7.0)
    expected = pixfuse.normalize(images, pixfuse.IMAGENET)
    assert_same_bits(run(images, out), expected + 1)
    assert_same_bits(out, expected)
    assert counter.frame_count == 1


def test_out_is_handed_back() -> None:
    def function(images: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return pixfuse.normalize(images, pixfuse.SIGNED, out=out)

    run, _ = compiled(function)
    images, out = random_bytes(2, 3, 8, 9), torch.empty(2, 3, 8, 9)
    assert run(images, out) is out


def test_one_graph_serves_every_shape() -> None:
    def function(images: torch.Tensor) -> torch.Tensor:
        return pixfuse.normalize(images, pixfuse.IMAGENET) * 2

    run, counter = compiled(function, dynamic=True)
    run(random_bytes(5, 3, 9, 6))
    compilations = counter.frame_count  # tracing may start over once
    for shape in ((4, 3, 8, 9), (2, 3, 31, 17), (7, 3, 5, 64)):
        images = random_bytes(*shape)
        assert_same_bits(run(images), function(images))
    assert counter.frame_count == compilations


def test_errors_come_through() -> None:
    run, _ = compiled(pixfuse.normalize)
    with pytest.raises(Exception, match="normalize: expected images of dtype uint8"):
        run(torch.zeros(2, 3, 4, 5))


def test_inductor() -> None:
    """The whole compiler, with neighbours that it could fuse with."""

    def function(images: torch.Tensor) -> torch.Tensor:
        return torch.relu(pixfuse.normalize(images.flip(-1), pixfuse.IMAGENET) - 0.5)

    images = random_bytes(2, 3, 8, 9)
    assert_same_bits(torch.compile(function, fullgraph=True)(images), function(images))


class Stem(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return pixfuse.normalize(images, pixfuse.CIFAR10)


def test_export() -> None:
    images = random_bytes(4, 3, 8, 9)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Stem(), (images,), dynamic_shapes=({0: batch},))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        torch.ops.pixfuse.normalize.default
    ]
    for count in (4, 9):
        images = random_bytes(count, 3, 8, 9)
        assert_same_bits(program.module()(images), Stem()(images))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_are_like_real_ones(layout: str) -> None:
    for size in ((2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 1, 1), (0, 3, 4, 5), (2, 3, 4, 1)):
        batch = LAYOUTS[layout](*size)
        for real in (batch, *batch[:1]):
            for input_layout in ("NCHW", "NHWC"):
                images = real if input_layout == "NCHW" else real.movedim(-3, -1)
                for memory_format in FORMATS:
                    options: dict[str, Any] = {
                        "input_layout": input_layout,
                        "memory_format": memory_format,
                        "dtype": torch.float16,
                    }
                    expected = pixfuse.normalize(images, pixfuse.UNIT, **options)
                    with FakeTensorMode() as mode:
                        fake = pixfuse.normalize(mode.from_tensor(images), pixfuse.UNIT, **options)
                    assert fake.shape == expected.shape
                    assert fake.stride() == expected.stride()
                    assert fake.dtype == expected.dtype
                    assert fake.device == expected.device


# --- crop_mirror_normalize ---


CropArgs = tuple[list[torch.Tensor], torch.Tensor, int]


def crop_operands() -> dict[str, CropArgs]:
    placements = torch.tensor([[0, 1, 0, 0], [2, 0, 1, 0], [-3, -1, 0, 1], [30, 0, 1, 1]])
    return {
        "batch": ([random_bytes(4, 3, 6, 7)], placements, 3),
        "images": ([random_bytes(3, 5 + n, 9 - n) for n in range(4)], placements, 3),
        "both": ([random_bytes(1, 6, 7), random_bytes(3, 4, 6, 7)], placements, 4),
    }


@pytest.mark.parametrize("memory_format", FORMATS[:2])
@pytest.mark.parametrize("return_mask", [False, True])
@pytest.mark.parametrize("operand", crop_operands())
def test_opcheck_crop(operand: str, return_mask: bool, memory_format: torch.memory_format) -> None:
    images, placements, channels = crop_operands()[operand]
    for dtype, rounding in ((0, 0), (1, 4), (2, 1), (3, 0)):
        constants = ([0.1], [0.5], rounding, [7.0], False)
        options = (dtype, MEMORY_FORMAT_CODES[memory_format], return_mask)
        args = (images, placements, channels, 4, 5, *constants, *options)
        torch.library.opcheck(torch.ops.pixfuse.crop_mirror_normalize.default, args)
        out, mask = torch.ops.pixfuse.crop_mirror_normalize(*args)
        torch.library.opcheck(
            torch.ops.pixfuse.crop_mirror_normalize_out.default,
            (images, placements, channels, *constants, out, mask if return_mask else None),
        )


def test_opcheck_empty_output() -> None:
    for code in range(4):
        torch.library.opcheck(
            torch.ops.pixfuse.empty_output.default,
            ((4, 3, 5, 4), (60, 1, 12, 3), code),
            # Not the others, which compare what nobody has written yet.
            test_utils=("test_schema", "test_faketensor"),
        )


def test_random_crops_do_not_compile_again() -> None:
    def function(images: torch.Tensor, anchor: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
        return pixfuse.crop_mirror_normalize(  # type: ignore[no-any-return]
            images, (5, 4), pixfuse.IMAGENET, anchor=anchor, mirror=mirror
        )

    run, counter = compiled(function)
    images = random_bytes(4, 3, 9, 8)
    for _ in range(5):
        args = (images, torch.rand(4, 2), torch.rand(4) < 0.5)
        assert_same_bits(run(*args), function(*args))
    assert counter.frame_count == 1


CROPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "square": {"size": 4},
    "larger": {"size": (20, 30), "out_of_bounds": "pad", "fill": 3.5, "fill_space": "output"},
    "corner": {"size": (3, 5), "top": 1, "left": 2},
    "corners": {"size": (3, 5), "top": [1, 2], "left": torch.tensor([0, 1]), "flip": True},
    "anchors": {"size": (3, 5), "anchor": [(0.1, 0.9), (1, 0)], "mirror": [True, False]},
    "mask": {"size": 12, "return_mask": True, "out_of_bounds": "pad"},
    "bytes": {"size": 4, "dtype": torch.uint8, "memory_format": torch.channels_last},
}


@pytest.mark.parametrize("case", CROPS)
def test_every_option_of_a_crop_compiles(case: str) -> None:
    def function(images: Any) -> Any:
        return pixfuse.crop_mirror_normalize(images, normalization=pixfuse.CLIP, **CROPS[case])

    run, counter = compiled(function)
    batch = random_bytes(2, 3, 8, 9)
    for images in (batch, list(batch)):
        for ours, expected in zip(
            torch.utils._pytree.tree_leaves(run(images)),
            torch.utils._pytree.tree_leaves(function(images)),
            strict=True,
        ):
            assert_same_bits(ours, expected)
    assert counter.frame_count == 2


def test_a_crop_into_out() -> None:
    def function(images: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return pixfuse.crop_mirror_normalize(images, 4, out=out) + 1  # type: ignore[no-any-return]

    run, _ = compiled(function)
    images, out = random_bytes(2, 3, 8, 9), torch.full((2, 3, 4, 4), 7.0)
    expected = pixfuse.crop_mirror_normalize(images, 4)
    assert_same_bits(run(images, out), expected + 1)
    assert_same_bits(out, expected)


def test_one_graph_crops_every_shape() -> None:
    def function(images: torch.Tensor) -> torch.Tensor:
        return pixfuse.crop_mirror_normalize(images, 4, pixfuse.CLIP) * 2  # type: ignore[no-any-return]

    run, counter = compiled(function, dynamic=True)
    run(random_bytes(5, 3, 9, 6))
    compilations = counter.frame_count
    for shape in ((4, 3, 8, 9), (2, 3, 31, 17), (7, 3, 5, 64)):
        images = random_bytes(*shape)
        assert_same_bits(run(images), function(images))
    assert counter.frame_count == compilations


def test_a_compiled_crop_outside_is_an_error() -> None:
    """By the whole compiler, which puts the check into its code."""

    def function(images: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        return pixfuse.crop_mirror_normalize(  # type: ignore[no-any-return]
            images, 4, pixfuse.CLIP, top=top, left=top
        )

    run = torch.compile(function, fullgraph=True)
    images, top = random_bytes(4, 3, 8, 9), torch.arange(4)
    assert_same_bits(run(images, top), function(images, top))
    with pytest.raises(RuntimeError, match="expected every window inside its image"):
        run(images, top + 3)


# --- what records operators without compiling ---

LISTS: dict[str, Any] = {
    "crop_mirror_normalize": lambda images: pixfuse.crop_mirror_normalize(
        images, 5, pixfuse.CLIP, mirror=True
    ),
    "channel_histogram": pixfuse.channel_histogram,
    "image_moments": lambda images: pixfuse.image_moments(images)[1],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LISTS)
def test_a_trace_keeps_the_operator_of_a_list(name: str) -> None:
    """Not the pixels that it was traced with."""

    def function(batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = LISTS[name](list(batch))
        return result

    batch = random_bytes(2, 3, 8, 9)
    expected = function(255 - batch)
    traced = torch.jit.trace(function, (batch,), check_trace=False)
    assert torch.equal(traced(255 - batch), expected)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=mode)(batch)
        assert torch.equal(graph(255 - batch), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_keeps_the_operator_of_a_batch() -> None:
    batch = random_bytes(2, 3, 8, 9)
    traced = torch.jit.trace(lambda images: pixfuse.crop_mirror_normalize(images, 5), (batch,))
    expected = pixfuse.crop_mirror_normalize(255 - batch, 5)
    assert_same_bits(traced(255 - batch), expected)


def test_images_of_several_kinds_are_read_while_somebody_watches() -> None:
    images: list[Any] = [random_bytes(3, 6, 7), random_bytes(6, 7, 3).numpy()]
    expected = pixfuse.crop_mirror_normalize(images, 5)
    with FlopCounterMode(display=False):
        assert_same_bits(pixfuse.crop_mirror_normalize(images, 5), expected)


# --- modes of torch ---


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        torch.enable_grad,
        lambda: torch.autocast("cpu"),
        lambda: torch.device("meta"),  # the default for new tensors, not for results
    ],
    ids=["inference_mode", "no_grad", "enable_grad", "autocast", "default_device"],
)
def test_modes_change_nothing(mode: Any) -> None:
    images = random_bytes(2, 3, 8, 9)
    expected = pixfuse.normalize(images, pixfuse.CLIP)
    out = torch.empty_like(expected)
    with mode():
        ours = pixfuse.normalize(images, pixfuse.CLIP)
        pixfuse.normalize(images, pixfuse.CLIP, out=out)
    assert_same_bits(ours, expected)
    assert_same_bits(out, expected)
    assert not ours.requires_grad


@pytest.mark.parametrize("kind", ["list", "batch"])
@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")],
    ids=["inference_mode", "no_grad", "default_device"],
)
def test_modes_change_no_crop(mode: Any, kind: str) -> None:
    batch = random_bytes(2, 3, 8, 9)
    images: Any = batch if kind == "batch" else list(batch.numpy().transpose(0, 2, 3, 1))
    options: dict[str, Any] = {"size": 5, "mirror": [True, False], "return_mask": True}
    expected, mask = pixfuse.crop_mirror_normalize(images, **options)
    out = torch.empty_like(expected)
    with mode():
        ours, our_mask = pixfuse.crop_mirror_normalize(images, **options)
        pixfuse.crop_mirror_normalize(images, out=out, **options)
    assert_same_bits(ours, expected)
    assert_same_bits(our_mask, mask)
    assert_same_bits(out, expected)
    assert not ours.requires_grad


def test_the_default_dtype_changes_nothing() -> None:
    images = random_bytes(2, 3, 8, 9)
    expected = pixfuse.normalize(images, pixfuse.CLIP)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_bits(pixfuse.normalize(images, pixfuse.CLIP), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_results_feed_a_graph() -> None:
    """As the input of a model in training: gradients of later parameters are right."""
    images = random_bytes(2, 3, 8, 9)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (pixfuse.normalize(images, pixfuse.CLIP) * weight).sum().backward()
    assert weight.grad is not None
    expected = pixfuse.normalize(images, pixfuse.CLIP).sum((0, 2, 3)).view(3, 1, 1)
    torch.testing.assert_close(weight.grad, expected)


def test_out_counts_as_modified() -> None:
    """So autograd refuses to go back through what has been overwritten since."""
    out = torch.ones(2, 3, 8, 9)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    total = (weight * out).sum()
    pixfuse.normalize(random_bytes(2, 3, 8, 9), pixfuse.CLIP, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("operand", OPERANDS)
def test_fake_of_normalize_pinned(operand: str, memory_format: torch.memory_format) -> None:
    """A tensor on the GPU from one on the CPU, laid out as that of normalize; needs no GPU."""
    mean, std, code = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], MEMORY_FORMAT_CODES[memory_format]
    images = OPERANDS[operand]()
    expected = torch.ops.pixfuse.normalize(images, mean, std, 0, 0, 2, code)
    with FakeTensorMode() as mode:
        fake = torch.ops.pixfuse.normalize_pinned(
            mode.from_tensor(images), mean, std, 0, 0, 2, code, 1
        )
    assert fake.device == torch.device("cuda", 1)
    assert fake.dtype == expected.dtype
    assert fake.shape == expected.shape
    assert fake.stride() == expected.stride()
