"""The package as it is installed: what the libraries need, what is typed, what is documented."""

import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import pixfuse
from benchmarks.torchvision_import import import_torchvision
from pixfuse._library import available_isas
from tests.bits import assert_same_bits
from tests.images import random_bytes
from tests.isas import IN_PAIRS, WITH_OWN_LOOPS
from tests.processes import python

PACKAGE = Path(pixfuse.__file__).parent
# The last one is what `make cuda` leaves, also where torch has no CUDA.
BUILT = (
    PACKAGE / "_cpu.so",
    PACKAGE / "_cuda.so",
    Path(__file__).parent.parent / "build" / "cuda" / "_cuda.so",
)
LIBRARIES = [path for path in BUILT if path.exists()]

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="binutils not found"
)


# --- one build for every torch: nothing of torch's C++ ABI ---


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [line.split(maxsplit=1)[1] for line in listing.splitlines()]


def torch_cxx_symbols(library: Path) -> list[str]:
    return [s for s in undefined_symbols(library) if re.search(r"\b(at|c10|torch)::", s)]


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_no_undefined_cxx_symbol_of_torch(library: Path) -> None:
    assert torch_cxx_symbols(library) == []
    # Proof that the listing is one: the C functions of the stable ABI are in it.
    assert any(s.startswith("aoti_torch_") for s in undefined_symbols(library))


@needs_binutils
@pytest.mark.parametrize("namespace", ["at", "c10", "torch"])
def test_the_checker_sees_such_a_symbol(tmp_path: Path, namespace: str) -> None:
    source = tmp_path / "needy.cpp"
    source.write_text(
        f"namespace {namespace} {{ int missing(int); }}\n"
        f'extern "C" int call() {{ return {namespace}::missing(1); }}\n'
    )
    library = tmp_path / "needy.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert any(f"{namespace}::missing(int)" in s for s in torch_cxx_symbols(library))


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_torch_is_found_by_name_alone(library: Path) -> None:
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--wide", str(library)], check=True, capture_output=True, text=True
    ).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    allowed = {"libtorch_cpu.so", "libtorch_cuda.so", "libstdc++.so.6", "libgcc_s.so.1"}
    allowed |= {"libm.so.6", "libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
    allowed |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed <= allowed


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_nothing_of_ours_is_visible_to_other_libraries(library: Path) -> None:
    listing = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--demangle", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "pixfuse::" not in listing


@needs_binutils
def test_the_module_of_images_knows_no_torch() -> None:
    """It finds the CPU library beside it, and calls four C functions of it."""
    library = Path(pixfuse._images.__file__)
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--wide", str(library)], check=True, capture_output=True, text=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    assert "_cpu.so" in needed
    assert not any("torch" in name or "python" in name for name in needed)
    assert re.findall(r"R(?:UN)?PATH\).*\[(.*?)\]", dynamic) == ["$ORIGIN"]
    undefined = undefined_symbols(library)
    assert not any("torch" in symbol for symbol in undefined)
    ours = {symbol for symbol in undefined if "pixfuse" in symbol}
    assert ours == {
        "pixfuse_channel_histogram",
        "pixfuse_crop_mirror_normalize",
        "pixfuse_image_moments",
        "pixfuse_normalize",
    }


# --- info ---


def test_info() -> None:
    info = pixfuse.info()
    assert info["torch"] == torch.__version__
    assert info["isa"] in info["available_isas"]
    assert info["available_isas"][0] == "portable"
    assert info["threads"] == torch.get_num_threads()
    assert info["cuda"]["torch"] == torch.version.cuda
    built = (PACKAGE / "_cuda.so").exists()
    assert info["cuda"]["loaded"] is (built and torch.version.cuda is not None)
    assert set(info["output_buffer"]) == {
        "limit_bytes",
        "idle_bytes",
        "in_use_bytes",
        "allocated",
        "reused",
    }


def test_use_isa_changes_what_info_says(isa: str) -> None:
    assert pixfuse.info()["isa"] == isa


def test_use_isa_goes_back_after_an_error() -> None:
    before = pixfuse.info()["isa"]
    with pytest.raises(ZeroDivisionError), pixfuse._library.use_isa("portable"):
        raise ZeroDivisionError
    assert pixfuse.info()["isa"] == before


@pytest.mark.skipif(
    available_isas() == WITH_OWN_LOOPS, reason="this machine has no more than AVX-512"
)
def test_what_follows_avx512_runs_its_loops() -> None:
    """Or gets the same: but for the convolutions of `csrc/conv_bias_relu/digits.h`."""
    images = torch.randint(0, 256, (3, 3, 61, 67), dtype=torch.uint8)
    weight = torch.randn(8, 3, 3, 3)
    calls: list[Callable[[], Any]] = [
        lambda: pixfuse.normalize(images, pixfuse.IMAGENET),
        lambda: pixfuse.crop_mirror_normalize(images, 32, pixfuse.IMAGENET, mirror=True),
        lambda: pixfuse.channel_histogram(images),
        lambda: pixfuse.image_moments(images)[0],
        lambda: pixfuse.standardize_per_image(images),
        lambda: pixfuse.denormalize(images / 300 - 0.1, pixfuse.UNIT),
        lambda: pixfuse.conv_bias_relu(images, weight, normalization=pixfuse.IMAGENET)[0],
        lambda: pixfuse.conv_bias_relu(images / 255, weight.repeat(1, 1, 3, 3))[0],
    ]
    for call in calls:
        results = []
        for isa in ("avx512", *set(available_isas()) - set(WITH_OWN_LOOPS)):
            with pixfuse._library.use_isa(isa):
                results.append(call())
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif("gfni" not in available_isas(), reason="this machine turns no matrices of bits")
def test_gfni_multiplies_bytes_as_vnni() -> None:
    """But in pairs where vectors add beside multiplying."""
    images = torch.randint(0, 256, (3, 3, 61, 67), dtype=torch.uint8)
    weight = torch.randn(64, 3, 7, 7)
    results = []
    for isa in ("vnni", "gfni", "avx512"):
        with pixfuse._library.use_isa(isa):
            call = pixfuse.conv_bias_relu(images, weight, stride=4, normalization=pixfuse.IMAGENET)
            results.append(call[0])
    assert torch.equal(results[0], results[1]) is not bool(IN_PAIRS)
    assert not torch.equal(results[0], results[2])


# --- the package ---


def test_import_takes_no_compiler_along() -> None:
    """Importing Dynamo takes as long as importing torch: every worker would pay for it."""
    program = "import sys, pixfuse; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_the_installed_package_is_tested() -> None:
    """Not the source folder, which would hide a file that the wheel lacks."""
    spec = find_spec("pixfuse")
    assert spec is not None
    assert spec.origin is not None
    assert "site-packages" in spec.origin


def test_public_names() -> None:
    public = {name for name in vars(pixfuse) if not name.startswith("_")}
    # Their content is what is public.
    modules = {"activity", "collate", "convolution", "functional", "loader", "normalization"}
    modules |= {"certification", "cli", "monitor", "pixels", "statistics"}
    assert public - modules == set(pixfuse.__all__)


PUBLIC_FUNCTIONS: dict[str, Callable[..., object]] = {
    "ChannelStatistics": pixfuse.ChannelStatistics,
    "Collate": pixfuse.Collate,
    "DeadUnitMonitor": pixfuse.DeadUnitMonitor,
    "DeviceLoader": pixfuse.DeviceLoader,
    "channel_histogram": pixfuse.channel_histogram,
    "certified_dead": pixfuse.certified_dead,
    "fold_of": pixfuse.fold_of,
    "denormalize": pixfuse.denormalize,
    "image_moments": pixfuse.image_moments,
    "standardize_per_image": pixfuse.standardize_per_image,
    "crop_mirror_normalize": pixfuse.crop_mirror_normalize,
    "normalize": pixfuse.normalize,
    "Normalization": pixfuse.Normalization,
    "PerImageStandardization": pixfuse.PerImageStandardization,
    "UnitActivity": pixfuse.UnitActivity,
    "conv_bias_relu": pixfuse.conv_bias_relu,
    "empty_cache": pixfuse.empty_cache,
    "info": pixfuse.info,
    "nn.ConvBiasReLU2d": pixfuse.nn.ConvBiasReLU2d,
    "nn.PixelStem": pixfuse.nn.PixelStem,
    "nn.fuse": pixfuse.nn.fuse,
    "reference.certified_dead": pixfuse.reference.certified_dead,
    "reference.channel_histogram": pixfuse.reference.channel_histogram,
    "reference.denormalize": pixfuse.reference.denormalize,
    "reference.image_moments": pixfuse.reference.image_moments,
    "reference.standardize_per_image": pixfuse.reference.standardize_per_image,
    "reference.conv_bias_relu": pixfuse.reference.conv_bias_relu,
    "reference.crop_mirror_normalize": pixfuse.reference.crop_mirror_normalize,
    "reference.normalize": pixfuse.reference.normalize,
    "transforms.ToNormalized": pixfuse.transforms.ToNormalized,
}


def test_every_public_function_is_listed() -> None:
    public = {name: getattr(pixfuse, name) for name in pixfuse.__all__}
    callables = {name for name, value in public.items() if callable(value)}
    callables.remove("DeadUnitWarning")  # for a filter, not to be called
    assert callables == {name for name in PUBLIC_FUNCTIONS if "." not in name}


@pytest.mark.parametrize("name", ["reference", "transforms"])
def test_a_public_module_says_what_is_public(name: str) -> None:
    listed = {other for other in PUBLIC_FUNCTIONS if other.startswith(f"{name}.")}
    assert {f"{name}.{other}" for other in getattr(pixfuse, name).__all__} == listed


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_docstrings(name: str) -> None:
    function = PUBLIC_FUNCTIONS[name]
    text = inspect.getdoc(function)
    assert text
    assert re.match(r"[A-Z`].*[.]\n\n", text), "a first line that is a sentence of its own"
    signature = inspect.signature(function)
    if signature.parameters:
        arguments = text.split("Args:\n")[1].split("\n\n")[0]
        for parameter in signature.parameters:
            assert re.search(rf"^ +{parameter}: ", arguments, re.MULTILINE), parameter
    if signature.return_annotation not in (None, "None"):
        assert "Returns:\n" in text
    assert "Raises:\n" in text


def test_compiled_files_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """As ``pip install -e`` leaves them: Python is read where it is written."""
    for folder, pattern in (("python", "*.py"), ("compiled", "*.so")):
        (tmp_path / folder).mkdir()
        for file in PACKAGE.glob(pattern):
            (tmp_path / folder / file.name).symlink_to(file)
    folders = [str(tmp_path / "compiled"), str(tmp_path / "python")]
    result = python(f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "pixfuse", {folders[1]!r} + "/__init__.py", submodule_search_locations={folders!r}
)
sys.modules["pixfuse"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.__file__, module.info()["isa"])
""")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(folders[1])


def test_the_readme_says_what_the_build_needs() -> None:
    """For a build without isolation, where pip installs none of it."""
    root = Path(__file__).parent.parent
    settings = (root / "pyproject.toml").read_text()
    required = re.search(r"^requires = \[(.*)\]$", settings, re.MULTILINE)
    cmake = re.search(r'^cmake.version = "(.*)"$', settings, re.MULTILINE)
    assert required
    assert cmake
    needed = {*re.findall(r'"(.*?)"', required[1]), f"cmake{cmake[1]}", "ninja"}
    line = re.search(r"^pip install (.*?)  +#", (root / "README.md").read_text(), re.MULTILINE)
    assert line
    assert set(line[1].replace("'", "").split()) == needed


def test_every_preset_is_documented() -> None:
    source = (PACKAGE / "normalization.py").read_text()
    presets = [n for n, v in vars(pixfuse).items() if isinstance(v, pixfuse.Normalization)]
    assert len(presets) > 5
    for name in presets:
        assert re.search(rf"^#: .*\n{name}: Final = ", source, re.MULTILINE), name


def test_the_lines_that_normalize_says_it_equals() -> None:
    text = inspect.getdoc(pixfuse.normalize)
    assert text is not None
    lines = text.split("Equivalent to::\n")[1].split("\n\nSource")[0]
    images = random_bytes(2, 3, 4, 5)
    import_torchvision("torchvision.transforms.v2")
    names = {
        "torch": torch,
        "transforms": import_torchvision("torchvision.transforms"),
        "images": images,
        "mean": list(pixfuse.IMAGENET.mean),
        "std": list(pixfuse.IMAGENET.std),
    }
    equal = eval(f"({inspect.cleandoc(lines)})", names)
    assert_same_bits(pixfuse.normalize(images, pixfuse.IMAGENET), equal)
