"""The command ``dinov3-ray bench``: which measurements there are, and where."""

from __future__ import annotations

import click

from dinov3_ray.cli import Lazy, LazyGroup

__all__ = ["bench"]

_COMMANDS = {
    "pool": Lazy("dinov3_ray.bench.pool_command:pool", "A pool's throughput, beside ActorPool, Serve and Ray Data."),
    "teacher": Lazy("dinov3_ray.bench.teacher_command:teacher", "One teacher, beside transformers; sizes a pool."),
    "training": Lazy("dinov3_ray.bench.training_command:training", "A training step, beside one without a teacher."),
    "dataset": Lazy(
        "dinov3_ray.bench.dataset_command:dataset", "Extraction and reading of data sets, beside Ray Data."
    ),
    "scaling": Lazy("dinov3_ray.bench.scaling_command:scaling", "Costs as work grows, beside what a model predicts."),
    "transport": Lazy(
        "dinov3_ray.bench.transport_command:transport", "One result's way to the client, beside plain actors."
    ),
    "router": Lazy("dinov3_ray.bench.router_command:router", "The choice of a replica, in pools of 1 to 10,000."),
}


@click.group(cls=LazyGroup, lazy=_COMMANDS)
def bench() -> None:
    """Measure, beside peers that do the same work in the same run.

    Without --address, or RAY_ADDRESS, those that need a Ray start one of their own. Leave the machine to them.
    """
