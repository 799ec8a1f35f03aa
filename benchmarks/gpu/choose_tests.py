"""A plugin of pytest: the tests that need a GPU (``PIXFUSE_TESTS=gpu``), or those that do not.

A test needs one if it asks for the fixture ``cuda``, or runs with ``cuda`` as a parameter, as the
fixture ``device`` has it.

The machine's packages are not those that the project pins: a test of one that is not there skips.
A failure is shown when it happens, since there may be no time for a summary.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

OURS = ("pixfuse", "benchmarks", "tests")


def needs_gpu(item: pytest.Item) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    fixtures = getattr(item, "fixturenames", ())
    return "cuda" in fixtures or any(isinstance(p, str) and p == "cuda" for p in parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = os.environ["PIXFUSE_TESTS"] == "gpu"
    others = [item for item in items if needs_gpu(item) is not wanted]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if needs_gpu(item) is wanted]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise
        pytest.skip(str(error))


class FailuresAtOnce:
    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.write_line(f"\n{report.nodeid} failed:\n{report.longreprtext}")


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    if terminal is not None:  # as it is in processes of pytest-xdist
        plugins.register(FailuresAtOnce(terminal))
