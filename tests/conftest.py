"""Where the tests run: every instruction set of this machine, and the GPU where there is one."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from pixfuse import _library

# The same examples in every run; `--hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("fixed")


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


@pytest.fixture(params=_library.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, in force while the test runs."""
    with _library.use_isa(request.param):
        yield request.param


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in _library.available_isas()), "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every place where a kernel runs: the CPU with each instruction set, and the GPU."""
    kind, _, isa = request.param.partition("-")
    if kind == "cuda":
        require_cuda()
        yield torch.device("cuda")
    else:
        with _library.use_isa(isa):
            yield torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
