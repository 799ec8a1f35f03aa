"""Calls that torch is asked to watch: then small images take the operator's way, as large ones."""

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class Watched(TorchFunctionMode):
    """Lists the names of the pixfuse operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(func)
        if name.startswith("pixfuse."):
            self.operators.append(name)
        return func(*args, **(kwargs or {}))
