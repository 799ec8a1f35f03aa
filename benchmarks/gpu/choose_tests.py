"""A plugin of pytest: the tests that need a GPU (``PIXFUSE_TESTS=gpu``), or those that do not.

A test needs one if it asks for the fixture ``cuda``, or runs with ``cuda`` as a parameter, as the
fixture ``device`` has it.
"""

from __future__ import annotations

import os

import pytest


def needs_gpu(item: pytest.Item) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    fixtures = getattr(item, "fixturenames", ())
    return "cuda" in fixtures or any(isinstance(p, str) and p == "cuda" for p in parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = os.environ["PIXFUSE_TESTS"] == "gpu"
    others = [item for item in items if needs_gpu(item) is not wanted]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if needs_gpu(item) is wanted]
