"""A backend of torch.compile that stands in for inductor, whose compilers take long.

torch traces, guards and looks up code for it as it does for inductor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch

from dinov3_ray.config import config

__all__ = ["Backend", "compile_on_cpus"]


def compile_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``compile="auto"`` treat a CPU as it treats a GPU."""
    monkeypatch.setattr(config, "_AUTO_COMPILES_ON", ("cpu",))


class Backend:
    """Runs graphs as they are, and counts them.

    Attributes:
        graphs: how many it was given.
        fails_at: the number of the first graph that it refuses.
        error: with what it refuses; as a machine without a compiler does, unless a test says otherwise.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.fails_at = 10**6
        self.error: Exception = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    @classmethod
    def in_place_of_inductor(cls, monkeypatch: pytest.MonkeyPatch) -> Self:
        """One that ``torch.compile`` uses from now on, with nothing compiled yet."""
        backend, compile = cls(), torch.compile
        torch.compiler.reset()

        @functools.wraps(compile)
        def compile_with_it(*args: Any, **options: Any) -> Any:
            return compile(*args, **options, backend=backend)

        monkeypatch.setattr(torch, "compile", compile_with_it)
        return backend

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.graphs += 1
        if self.graphs >= self.fails_at:
            raise self.error
        return graph.forward
