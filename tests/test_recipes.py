"""The examples of README.md and docs/recipes.md run, with the real libraries, and are true."""

import re
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pixfuse
from benchmarks.torchvision_import import import_torchvision

# The libraries take long to import: once.
pytestmark = pytest.mark.xdist_group("recipes")

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
README = PAGE.parent.parent / "README.md"
DEAD_UNITS = PAGE.with_name("dead_units.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEIGHBOURS = (
    "accelerate",
    "datasets",
    "lightning",
    "timm",
    "torchvision",
    "transformers",
    "webdataset",
)


def sections(page: str) -> dict[str, list[str]]:
    """The blocks under each heading, with as many empty lines before each as the page has.

    So a traceback shows the lines of the page. What stands before the first heading is under "".
    """
    found: dict[str, list[str]] = {"": []}
    starts = [(match.start(), match[1]) for match in re.finditer(r"^## (.*)$", page, re.MULTILINE)]
    for block in BLOCK.finditer(page):
        heading = [name for start, name in starts if start < block.start()]
        lines_above = page[: block.start(1)].count("\n")
        found.setdefault(heading[-1] if heading else "", []).append("\n" * lines_above + block[1])
    return found


RECIPES = sections(PAGE.read_text())


def run(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "recipe"}
    for block in [*RECIPES[""], *blocks]:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes run: photos of many sizes in two classes, and a tar of them."""
    root = tmp_path_factory.mktemp("recipes")
    source = np.random.default_rng(0)
    with tarfile.open(root / "photos-000000.tar", "w") as shard:
        for number in range(8):
            name = ("cat", "dog")[number % 2]
            path = root / "photos" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (int(source.integers(230, 330)), int(source.integers(230, 330)))
            patches = source.integers(256, size=(12, 12, 3), dtype=np.uint8)
            Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(path)
            label = path.with_suffix(".cls")
            label.write_text(str(number % 2))
            shard.add(path, f"{number}.jpg")
            shard.add(label, f"{number}.cls")
            label.unlink()
    return root


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """In that folder, with the caches of the libraries there too, and without a network."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))  # read where they are imported first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    connect, refused = socket.socket.connect, []

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            refused.append(address)
            raise ConnectionRefusedError(f"recipes have no network, and none for {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    import_torchvision("torchvision.datasets")  # where torchvision was built for another torch
    yield refused
    assert not refused, "a recipe wants a network"


@pytest.mark.usefixtures("in_folder")
@pytest.mark.filterwarnings("ignore")  # the libraries warn of each other
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name])
def test_recipe(recipe: str) -> None:
    run(RECIPES[recipe])


@pytest.mark.usefixtures("in_folder")
def test_the_readme() -> None:
    """Its first examples, in order."""
    names: dict[str, Any] = {"__name__": "readme"}
    first, equivalent, lists = sections(README.read_text())["Use"]
    exec(compile(first, str(README), "exec"), names)
    assert names["x"].is_contiguous(memory_format=torch.channels_last)
    exec(compile(equivalent, str(README), "exec"), names)
    x = pixfuse.normalize(names["images"], pixfuse.IMAGENET, input_layout="NHWC")
    assert torch.equal(x, names["x"])
    exec(compile(lists, str(README), "exec"), names)
    expected = pixfuse.crop_mirror_normalize(names["photos"], 224, pixfuse.IMAGENET)
    assert torch.equal(names["x"], expected)  # of the DeviceLoader: one batch is all there is


@pytest.mark.usefixtures("in_folder")
def test_the_readme_is_one_program_that_needs_nothing_but_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each name in it is one that it has given before."""
    import_torchvision("torchvision.models")
    (tmp_path / "photos").symlink_to(Path("photos").resolve())
    monkeypatch.chdir(tmp_path)
    page = README.read_text().replace("(64, 224, 224, 3)", "(4, 64, 64, 3)")
    names: dict[str, Any] = {"__name__": "readme"}
    blocks = [block for several in sections(page).values() for block in several]
    assert len(blocks) == README.read_text().count("```python")
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


def test_the_readme_on_statistics() -> None:
    images = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    names: dict[str, Any] = {"pixfuse": pixfuse, "images": images}
    block = sections(README.read_text())["Statistics, and back to pixels"][0]
    exec(compile(block, str(README), "exec"), names)
    assert torch.equal(names["pixels"], images)
    assert names["counts"].tolist() == [0, 0]
    assert len(names["training"]) == 5
    photos = [image.numpy() for image in torch.randint(256, (2, 230, 240, 3), dtype=torch.uint8)]
    windows = pixfuse.crop_mirror_normalize(photos, 224, dtype=torch.uint8)
    assert torch.equal(names["collate"](photos), pixfuse.standardize_per_image(windows, floor=1.0))


@pytest.mark.usefixtures("in_folder")
def test_the_readme_on_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    names: dict[str, Any] = {"pixfuse": pixfuse, "torch": torch, "images": images}
    block, monitored = sections(README.read_text())["Which units live"]
    # So that the first channel can never fire.
    assert "torch.zeros(64)" in block
    block = block.replace("torch.zeros(64)", "torch.tensor([-1e3] + [0.0] * 63)")
    exec(compile(block, str(README), "exec"), names)
    output, activity = names["output"], names["activity"]
    assert isinstance(output, torch.Tensor)
    assert isinstance(activity, pixfuse.UnitActivity)
    assert activity.dead_count == (output.amax((0, 2, 3)) == 0).sum() == 1
    import_torchvision("torchvision.models")
    (tmp_path / "photos").symlink_to(Path("photos").resolve())
    monkeypatch.chdir(tmp_path)
    names["dataset"] = import_torchvision("torchvision.datasets").ImageFolder("photos")
    names["collate"] = pixfuse.Collate(pixfuse.IMAGENET, size=64, crop="center")
    names["DataLoader"] = torch.utils.data.DataLoader
    monitored = monitored.replace("batch_size=64", "batch_size=3")
    exec(compile(monitored, str(README), "exec"), names)
    assert "over the last 3 of 3 steps" in capsys.readouterr().out
    assert (tmp_path / "units.png").exists()


def test_the_readme_on_models(capsys: pytest.CaptureFixture[str]) -> None:
    import_torchvision("torchvision.models")
    images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    names: dict[str, Any] = {"pixfuse": pixfuse, "torch": torch, "images": images}
    (block,) = sections(README.read_text())["In a model"]
    exec(compile(block, str(README), "exec"), names)
    assert capsys.readouterr().out.startswith("convolution")
    assert type(names["stem"]) is pixfuse.nn.PixelStem
    floats = pixfuse.normalize(images, pixfuse.IMAGENET, input_layout="NHWC")
    torch.testing.assert_close(names["scores"], names["model"](floats), rtol=1e-3, atol=1e-4)
    assert list(names["layer"].state_dict()) == ["weight", "bias"]
    dead = [
        pixfuse.certified_dead(names["weight"], names["bias"], normalization=n).sum()
        for n in (pixfuse.SIGNED, pixfuse.UNIT)
    ]
    assert dead[0] < dead[1]


@pytest.mark.usefixtures("in_folder")
def test_the_page_on_dead_units(capsys: pytest.CaptureFixture[str]) -> None:
    """One program, whose sections go on from each other."""
    names: dict[str, Any] = {"__name__": "dead_units"}
    page = sections(DEAD_UNITS.read_text())
    for heading in (name for name in page if page[name]):
        for block in page[heading]:
            assert re.search(r"^ *assert ", block, re.MULTILINE), heading
            exec(compile(block, str(DEAD_UNITS), "exec"), names)
    assert sum(len(blocks) for blocks in page.values()) == DEAD_UNITS.read_text().count("```") / 2
    assert "over the last 20 of 30 steps" in capsys.readouterr().out


def test_every_recipe_asserts_something() -> None:
    assert len(RECIPES) >= 12
    for recipe, blocks in RECIPES.items():
        assert blocks, recipe
        for block in blocks:
            assert not recipe or re.search(r"^ *assert ", block, re.MULTILINE), recipe


def test_every_block_of_the_page_is_a_recipe() -> None:
    page = PAGE.read_text()
    assert page.count("```") == 2 * sum(len(blocks) for blocks in RECIPES.values())


@pytest.mark.parametrize("library", NEIGHBOURS)
def test_every_neighbour_has_a_recipe(library: str) -> None:
    imports = re.compile(rf"^(import|from) {library}\b", re.MULTILINE)
    assert any(imports.search(block) for blocks in RECIPES.values() for block in blocks)


WRONG_ROUNDINGS = {
    "torchvision v2": ("Normalization(mean, std)", 'Normalization(mean, std, "torchvision_v1")'),
    "torchvision v2, the whole batch at once": (
        "Normalization(mean, std)",
        'Normalization(mean, std, "nearest")',
    ),
    "torchvision v1": ('rounding="torchvision_v1"', 'rounding="torchvision"'),
    "timm": ('rounding="timm"', 'rounding="torchvision"'),
    "Hugging Face image processors": ('rounding="transformers"', 'rounding="torchvision"'),
}


@pytest.mark.usefixtures("in_folder")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", WRONG_ROUNDINGS)
def test_another_rounding_is_noticed(recipe: str) -> None:
    right, wrong = WRONG_ROUNDINGS[recipe]
    blocks = [block.replace(right, wrong) for block in RECIPES[recipe]]
    assert blocks != RECIPES[recipe]
    with pytest.raises(AssertionError) as caught:
        run(blocks)
    failed = caught.traceback[-1]
    assert Path(failed.path) == PAGE
    assert "torch.equal(" in PAGE.read_text().splitlines()[failed.lineno]


def test_a_connection_is_noticed(in_folder: list[Any]) -> None:
    with socket.socket() as client, pytest.raises(ConnectionRefusedError, match="no network"):
        client.connect(("127.0.0.1", 9))
    assert in_folder.pop() == ("127.0.0.1", 9)


def test_links_of_the_page_lead_somewhere() -> None:
    page = PAGE.read_text()
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
    links = re.findall(r"\]\(#([^)]*)\)", page)
    assert links
    assert set(links) <= anchors
