"""A replica inside the process that uses it: what an extraction's actors host, without router and transport."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future

from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.pool.messages import Answer, Array, Outcome, RequestHeader, TeacherInfo
from dinov3_ray.pool.replica.device_pipeline import DevicePipeline, pipeline_for
from dinov3_ray.pool.replica.replica import Replica
from dinov3_ray.pool.spec import PoolOptions
from dinov3_ray.pool.transport.wire import pack_images, unpack_features
from dinov3_ray.teacher import Extractor

__all__ = ["HostedReplica"]

_CLIENT = "host"


class HostedReplica:
    """A replica of this process: it builds and proves its teacher as a pool's replicas do, and computes in their way.

    Each batch that is submitted is one forward pass, in the order of submission.

    Args:
        build: makes the teacher; called once, on the replica's device thread.
        max_batch: images in the largest batch, for which the teacher is warmed up.
        threads: CPU threads to compute with; None leaves torch's setting alone.
        pipeline: makes what runs the teacher's passes.
        on_device_lost: called with the reason once this process can no longer use the device; it ends the process.
            None lets each batch from then on fail with DeviceLostError.

    Raises:
        NumericsError: the teacher's fast path does not agree with plain float32.
        Exception: whatever ``build`` raises.
    """

    def __init__(
        self,
        build: Callable[[], Extractor],
        *,
        max_batch: int,
        threads: int | None = None,
        pipeline: Callable[[Extractor], DevicePipeline] = pipeline_for,
        on_device_lost: Callable[[str], None] | None = None,
    ) -> None:
        # Whoever hosts it bounds what it submits: the queue turns nothing away.
        options = PoolOptions(max_batch=max_batch, max_queued=2**31, max_queued_bytes=2**62)
        self._replica = Replica(
            "hosted", build, options, threads=threads, pipeline=pipeline, on_device_lost=on_device_lost
        )
        self._numbers = itertools.count()
        self._info = self._replica.start().result()

    @property
    def info(self) -> TeacherInfo:
        """What the teacher says of itself."""
        return self._info

    @property
    def fingerprint(self) -> str | None:
        return self._info.fingerprint

    @property
    def computed_in(self) -> str | None:
        return self._info.computed_in or self._info.dtype

    @property
    def preprocessing(self) -> Preprocessing | None:
        return self._info.preprocessing

    @property
    def patch_size(self) -> int:
        return self._info.patch_size

    def submit(self, images: Images, spec: FeatureSpec) -> Future[Features]:
        """Queue a batch and return at once; the images are read until the future is done, and must not change.

        A batch that does not fit the device's memory is computed in parts. The future raises what the teacher raised,
        InputError where the images hold values that are not finite, NumericsError where only the results do, and
        DeviceMemoryError where one image alone does not fit the device's memory.
        """
        batch = ImageBatch.of(images)
        layout, arrays = pack_images(batch)
        header = RequestHeader(str(next(self._numbers)), _CLIENT, spec, layout, len(batch))
        future: Future[Features] = Future()

        def answered(answer: Answer, results: list[Array]) -> None:
            if answer.outcome is Outcome.DONE:
                future.set_result(unpack_features(answer.layout, results, answer.fingerprint))
                return
            error = answer.error or RuntimeError(f"the replica answered {answer.outcome}")
            if answer.trace:
                error.add_note(answer.trace)
            future.set_exception(error)

        self._replica.offer(header, arrays, answered)
        return future

    def close(self) -> None:
        """Give up what is queued, and end the replica's threads."""
        self._replica.stop()
