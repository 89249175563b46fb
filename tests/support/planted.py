"""Plants a fault in a function of the package: one line of its source, replaced for the time of a test."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

__all__ = ["planted"]


@contextmanager
def planted(function: Any, old: str, new: str) -> Iterator[None]:
    """``function`` with ``new`` in place of ``old``, for all who have imported it.

    Raises:
        AssertionError: its source does not have ``old`` any more: the fault must be planted anew.
    """
    function = _plain(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, f"{function.__qualname__} has no {old!r} any more: plant this fault where it is now"
    tree = compile(source.replace(old, new), f"<{function.__qualname__} with a fault>", "exec", _flags())
    namespace: dict[str, Any] = {}
    exec(tree, function.__globals__, namespace)
    faulty = _plain(namespace[function.__name__])
    before, function.__code__ = function.__code__, faulty.__code__
    try:
        yield
    finally:
        function.__code__ = before


def _plain(function: Any) -> FunctionType:
    """The function within a method, a property or a decorator."""
    for name in ("__func__", "func", "fget"):
        function = getattr(function, name, function)
    function = inspect.unwrap(function)
    assert isinstance(function, FunctionType), f"{function!r} has no source of its own"
    return function


def _flags() -> int:
    import __future__

    return __future__.annotations.compiler_flag
