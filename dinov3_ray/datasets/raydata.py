"""How Ray Data is told to run the extractors, whichever of its releases is installed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.debug import log_once

__all__ = ["actor_pool", "execution"]

_CALLS = 3  # an actor's at a time: one waits for pixels, one computes, one writes


def actor_pool(size: int) -> dict[str, Any]:
    """Arguments of ``map_batches`` for a pool of actors that take several calls at a time.

    The number of calls is an argument of the strategy in newer releases (2.60 has it, 2.54 has not), and an actor's own
    option in older ones, where newer ones deprecate it.
    """
    options: dict[str, Any] = {"size": size, "max_tasks_in_flight_per_actor": 2 * _CALLS}
    options["enable_true_multi_threading"] = True
    parameters = inspect.signature(ray.data.ActorPoolStrategy.__init__).parameters
    if "max_concurrent_calls_per_actor" in parameters:
        return {"compute": ray.data.ActorPoolStrategy(**options, max_concurrent_calls_per_actor=_CALLS)}
    return {"compute": ray.data.ActorPoolStrategy(**options), "max_concurrency": _CALLS}


@contextmanager
def execution(context: ray.data.DataContext, *, ordered: bool) -> Iterator[None]:
    """Without Ray Data's own bars, and with rows in their order where that matters.

    The context is that of the caller's own Dataset, too: it is left as it was.
    """
    options = context.execution_options
    before = context.enable_progress_bars, context.print_on_execution_start, options.preserve_order
    log_once("ray_data_progress_manager_disabled")  # marks as said, amid our own bar, that Ray Data's are off
    context.enable_progress_bars = context.print_on_execution_start = False
    options.preserve_order = ordered
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start, options.preserve_order = before
