"""``run.sh``'s summary.json: how each step ended, with the end of its log if not well.

    python benchmarks/gpu/summary.py FOLDER FILE

``FOLDER/steps`` has a line for each step: name, result, status, limit and seconds, with tabs
between; ``FOLDER/NAME.log`` what it printed. Needs nothing but Python, so that it works where
nothing else does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEPT_CHARACTERS = 4000


def summary(folder: Path) -> dict[str, Any]:
    steps = []
    for line in (folder / "steps").read_text().splitlines():
        name, result, status, limit, seconds = line.split("\t")
        step: dict[str, Any] = {
            "step": name,
            "result": result,
            "status": int(status) if status else None,
            "limit_seconds": int(limit),
            "seconds": int(seconds),
        }
        log = folder / f"{name}.log"
        if log.exists():
            text = log.read_text(errors="replace")
            step["log_ends"] = text[-KEPT_CHARACTERS if result != "passed" else -300 :]
        steps.append(step)
    return {
        "failed": [step["step"] for step in steps if step["result"] != "passed"],
        "seconds": sum(step["seconds"] for step in steps),
        "steps": steps,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(summary(Path(sys.argv[1])), indent=1) + "\n")
