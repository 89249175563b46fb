"""Which teacher computes an extraction, and how a process opens it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.pool.cluster import naming_node
from dinov3_ray.pool.replica.actor import end_process
from dinov3_ray.pool.replica.gpu_memory import expand_segments, within_share
from dinov3_ray.pool.spec import builder, unpickle_teacher
from dinov3_ray.teacher import Extractor

if TYPE_CHECKING:
    from dinov3_ray.pool.client.remote import RemoteTeacher
    from dinov3_ray.pool.replica.device_pipeline import DevicePipeline
    from dinov3_ray.pool.replica.hosted import HostedReplica

__all__ = ["TeacherChoice"]


@dataclass(frozen=True, slots=True)
class TeacherChoice:
    """Which teacher computes, and how it is opened in the process that uses it.

    Attributes:
        teacher: a configuration or a factory, pickled, for a replica that is hosted here; None where a ``pool``
            computes.
        pool: the client of a pool.
        num_gpus: that its process has; 0 computes on CPUs.
        threads: CPU threads per forward pass; None leaves torch's setting as it is.
        passes: forward passes in flight; 1 unless the teacher is reentrant and computes on the CPU.
    """

    teacher: bytes | None
    pool: RemoteTeacher | None
    num_gpus: float
    threads: int | None
    passes: int

    def open(self, max_batch: int) -> HostedReplica | RemoteTeacher:
        """Connect to the pool, or build and prove the teacher of a replica in this process, on whose threads it runs.

        Raises:
            Exception: whatever the factory raises, or a pool that cannot be reached.
        """
        if self.teacher is None:
            assert self.pool is not None
            return self.pool
        # Here: the process that plans a run does without torch.
        from dinov3_ray.pool.replica.device_pipeline import ConcurrentPipeline, pipeline_for
        from dinov3_ray.pool.replica.hosted import HostedReplica

        # Ray sets one thread for each CPU that an actor reserves; decoding takes the cores only now and then.
        threads = None if self.threads is None else min(self.threads, usable_cpus())
        expand_segments(self.num_gpus, os.environ)
        build = within_share(builder(unpickle_teacher(self.teacher), "cuda" if self.num_gpus else "cpu"), self.num_gpus)
        if self.passes == 1:
            pipeline: Callable[[Extractor], DevicePipeline] = pipeline_for
        else:
            pipeline = partial(ConcurrentPipeline, passes=self.passes, threads=threads)
        with naming_node():
            # Ray Data starts another actor in the place of one that ends, and does the blocks again that it had.
            return HostedReplica(
                build, max_batch=max_batch, threads=threads, pipeline=pipeline, on_device_lost=end_process
            )
