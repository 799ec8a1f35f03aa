"""The compiled files that tests share, while other test processes make and delete some."""

import os
import time
from pathlib import Path

import pytest

from tests.build_cache import KEEP_SECONDS, BuildCache

COPY = ["sh", "-c", 'cat > "$2"', "sh"]  # the source, to what `-o` names


def test_a_file_is_made_once(tmp_path: Path) -> None:
    made = BuildCache(tmp_path).make("a", COPY, "one")
    assert made.read_text() == "one"
    assert BuildCache(tmp_path).make("a", COPY, "another").read_text() == "one"


def test_a_command_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        BuildCache(tmp_path).make("a", ["sh", "-c", "echo no such thing >&2; exit 1"])
    assert BuildCache(tmp_path).make("a", COPY, "one").read_text() == "one"


def test_only_files_that_nobody_wanted_for_long_are_deleted(tmp_path: Path) -> None:
    files = BuildCache(tmp_path)
    old, wanted, new = (files.make(name, COPY) for name in ("old", "wanted", "new"))
    past = time.time() - KEEP_SECONDS - 60
    for path in (old, wanted):
        os.utime(path, (past, past))
    files.make("wanted", COPY)
    BuildCache(tmp_path)
    assert [path.exists() for path in (old, wanted, new)] == [False, True, True]


def test_a_file_that_goes_while_the_folder_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = BuildCache(tmp_path).make("a", COPY)
    listed = [tmp_path / "b.unfinished", kept]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))
    BuildCache(tmp_path)
    assert kept.exists()
