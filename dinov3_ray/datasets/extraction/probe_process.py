"""Probes a run's teacher: in a task of Ray, or, while Ray starts, in a second process on this machine."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ray
from ray import cloudpickle

from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.datasets.extraction import teacher_probe
from dinov3_ray.datasets.extraction.decode_tasks import decode_pieces
from dinov3_ray.datasets.extraction.resources import Allocation
from dinov3_ray.datasets.extraction.teacher_choice import TeacherChoice
from dinov3_ray.datasets.extraction.teacher_probe import Probe, probe_teacher
from dinov3_ray.datasets.sources.piece import Piece
from dinov3_ray.errors import StoreError
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.interrupts import wait
from dinov3_ray.machine.cpus import usable_cpus

__all__ = ["EarlyProbe", "probe_on_ray"]

logger = logging.getLogger("dinov3_ray")

_PATIENCE_SECONDS, _LIMIT_SECONDS = 20.0, 1800.0  # without a teacher, until a warning, and until the run ends


def probe_on_ray(
    teacher: TeacherChoice, spec: FeatureSpec, pieces: Sequence[Piece], decoder: Decoder, allocation: Allocation
) -> Probe:
    """Probe the teacher in a process that has its resources, with the first readable image of ``pieces``.

    Raises:
        StoreError: there is no place for it.
        Exception: whatever the teacher raises.
    """
    task = ray.remote(num_cpus=allocation.num_cpus, num_gpus=allocation.num_gpus, max_retries=1)(probe_teacher)
    # By tasks, where a fault in a decoder does no harm.
    decode = partial(decode_pieces, pieces, decoder, cpus=allocation.decode_cpus, window=1, retries=0)
    pending = task.remote(partial(teacher.open, max_batch=1), spec, decode)
    try:
        _await(lambda seconds: bool(ray.wait([pending], timeout=seconds)[0]), lambda: _place_wanted(allocation))
    except StoreError:
        ray.cancel(pending, force=True)
        raise
    found: Probe = ray.get(pending)
    return found


class EarlyProbe:
    """A probe that begins now, on this machine's CPUs, in a process that :meth:`close` ends.

    What it finds only saves time. Where it fails, the run probes on Ray: only that probe distinguishes an
    image's fault from the teacher's, or from that of a process, and it fails with the error that the user sees.

    Args:
        teacher: a configuration, pickled.
        spec: what is asked of it.
        pieces: the source's first images.
        decoder: makes pixels of them.
        threads: CPU threads of the teacher; None for all that this process may use.
    """

    def __init__(
        self, teacher: bytes, spec: FeatureSpec, pieces: Sequence[Piece], decoder: Decoder, threads: int | None = None
    ) -> None:
        cpus = usable_cpus()
        question = cloudpickle.dumps((teacher, spec, list(pieces), decoder, min(threads or cpus, cpus)))
        # It imports what this process imports, and uses no GPU. Python skips entries that are not text.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path if isinstance(entry, str))
        self._process = subprocess.Popen(  # noqa: S603 - this package
            # -P: whatever lies in the working directory.
            [sys.executable, "-P", "-c", f"import {teacher_probe.__name__} as asked; asked.answer_early_probe()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="early-probe")
        self._answer = self._thread.submit(self._process.communicate, question)

    def result(self) -> Probe | None:
        """What it found, as soon as it has; None if it failed.

        Raises:
            StoreError: it takes too long.
        """

        def answered(seconds: float) -> bool:
            return bool(futures.wait([self._answer], seconds).done)

        _await(partial(wait, answered), lambda: "it takes long to load, or to compile")
        answer, _ = self._answer.result()
        try:
            found: Probe = pickle.loads(answer)  # noqa: S301 - by this run's own process
        except Exception as error:  # noqa: BLE001 - nothing, a part, or what another library printed
            ended = f"exit code {self._process.returncode}, {type(error).__name__}"
            logger.debug("the teacher is probed on Ray: the early probe failed (%s)", ended)
            return None
        return found

    def close(self) -> None:
        """End the process, if it runs."""
        self._process.kill()
        self._thread.shutdown()


def _await(ready: Callable[[float], bool], why: Callable[[], str]) -> None:
    """Wait until ``ready``, which waits for so many seconds at most; say ``why`` it may take long, if it does.

    Raises:
        StoreError: it is not, after half an hour.
    """
    if not ready(_PATIENCE_SECONDS):
        logger.warning("the first teacher is not ready after %g s: %s", _PATIENCE_SECONDS, why())
        if not ready(_LIMIT_SECONDS - _PATIENCE_SECONDS):
            raise StoreError(f"a teacher must be ready within {_LIMIT_SECONDS:g} s: {why()}")


def _place_wanted(allocation: Allocation) -> str:
    """What a teacher waits for, if it has no place yet."""
    have, free = ray.cluster_resources(), ray.available_resources()
    counts = ", ".join(f"{free.get(key, 0):g} of {have.get(key, 0):g} {key}" for key in ("GPU", "CPU"))
    return (
        f"it needs {allocation.num_gpus:g} GPU and {allocation.num_cpus:g} CPU in the cluster, and then time to load; "
        f"free are {counts}. If a pool has the GPUs, extract through it (pool=NAME, --pool NAME), or compute on CPUs "
        "(num_gpus=0, --num-gpus 0)"
    )
