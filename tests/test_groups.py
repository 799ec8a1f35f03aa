"""Tests of one group run in one process; where that fails, nothing but the time would tell."""

import pytest


@pytest.mark.xdist_group("groups")
def test_groups_are_heeded(request: pytest.FixtureRequest) -> None:
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("needs pytest-xdist and --dist loadgroup")
    # pytest-xdist tells its scheduler of a group by a name behind the test's own.
    assert request.node.nodeid.endswith("@groups")
