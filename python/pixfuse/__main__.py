"""The command line: ``pixfuse`` or ``python -m pixfuse``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; say what to install where that is missing."""
    try:
        from pixfuse.cli import pixfuse

        pixfuse(prog_name="pixfuse")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("click", "rich", "PIL"):
            raise
        sys.exit(
            f"pixfuse: expected {error.name} to be installed for the command line, got none; "
            "pip install 'pixfuse[cli]'"
        )


if __name__ == "__main__":
    main()
