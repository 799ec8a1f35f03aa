"""Where the tests run: every instruction set of this machine, and the GPU where there is one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hypothesis
import pytest
import torch

from pixfuse import _library
from tests.build_cache import PROCESSES, digest
from tests.cuda_on_cpu.toolchain import ROOT, Toolchain, programs_of
from tests.isas import WITH_OWN_LOOPS

# The same examples in every run; `--hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("fixed")


def worker_group(item: pytest.Item) -> str | None:
    """What a test shares with others, if all of them should run in one process of several."""
    if item.path.name.startswith("test_native"):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return "-".join([item.path.stem, *(str(parameters.get(n)) for n in ("program", "name"))])
    programs = [digest(repr(program)) for program in programs_of(item)]
    return "-".join(programs) or None


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one compiled program stay together: no process waits for what another compiles.

    Where several processes run the tests, groups begin first: at the end, when one process has
    nothing left to do, the others have short tests only.
    """
    for item in items:
        group = worker_group(item)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
            # The first of them compiles, which takes minutes of a busy machine.
            item.add_marker(pytest.mark.timeout(1800))
    if PROCESSES > 1:
        items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest) -> Iterator[Toolchain]:
    """CUDA kernels for the CPU; compiled in the background, while the first tests run."""
    builds = Toolchain(ROOT / "build" / "cuda_on_cpu")
    builds.start(program for item in request.session.items for program in programs_of(item))
    yield builds
    builds.close()


def require_cuda() -> None:
    """Skips where there is no GPU; with PIXFUSE_REQUIRE_CUDA=1 that is a failure instead."""
    if torch.cuda.is_available():
        return
    if os.environ.get("PIXFUSE_REQUIRE_CUDA") == "1":
        pytest.fail("PIXFUSE_REQUIRE_CUDA=1, but torch sees no GPU")
    pytest.skip("torch sees no GPU")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests of what only it does."""
    require_cuda()
    return torch.device("cuda")


@pytest.fixture(params=WITH_OWN_LOOPS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, in force while the test runs."""
    with _library.use_isa(request.param):
        yield request.param


def places(isas: Sequence[str]) -> list[str]:
    """Where a kernel runs: the CPU with each instruction set, and the GPU."""
    return [*(f"cpu-{isa}" for isa in isas), "cuda"]


@contextmanager
def in_place(place: str) -> Iterator[torch.device]:
    """What runs here runs there, on tensors of this device."""
    kind, _, isa = place.partition("-")
    if kind == "cuda":
        require_cuda()
        yield torch.device("cuda")
    else:
        with _library.use_isa(isa):
            yield torch.device("cpu")


@pytest.fixture(params=places(WITH_OWN_LOOPS))
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every place where a kernel runs."""
    with in_place(request.param) as device:
        yield device


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What is compiled in a test is compiled anew, and is not there afterwards."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
