"""Imports torchvision beside a torch that it was not built for.

torchvision is installed with ``--no-deps``, because its own requirements ask for another build of
torch. Its compiled operators then do not load, and its import stops at two of them for which it
registers shape functions. Declaring those two is enough: no transform calls them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torch

# Lives as long as the process: the declarations vanish with it.
_declarations: torch.library.Library | None = None


def import_torchvision(name: str = "torchvision") -> ModuleType:
    """Import ``name`` (torchvision or one of its modules) whether or not its operators load.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    global _declarations  # noqa: PLW0603
    if _declarations is None and not _operators_load():
        _declarations = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _declarations.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    with warnings.catch_warnings():  # that its image and video decoders did not load
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _operators_load() -> bool:
    """Whether torchvision's own operators exist; loads them where they can be loaded."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            "torchvision is not installed; pip install --no-deps -r requirements/torchvision.txt",
            name="torchvision",
        )
    for folder in spec.submodule_search_locations:
        for library in Path(folder).glob("_C*.so"):
            with contextlib.suppress(OSError):  # built for another torch
                torch.ops.load_library(str(library))
    return hasattr(torch.ops.torchvision, "nms")
