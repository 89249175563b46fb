"""The device pipeline: how a replica's batches pass through its device, and what must hold of their results.

The device thread begins a pass, and another thread waits for its results. Three implementations are driven in the same
way. On a CPU a pass is computed when it begins, and its results are checked and packed while the next one is computed.
A reentrant teacher can make several passes at once, each on fewer threads of the CPU. On a CUDA device a pass is only
enqueued when it begins: while one batch is computed, the next one is copied in and the one before is copied out, each
in its own stream. Waiting for a pass gives the device no work, except to look closer at results that are not finite.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dinov3_ray.errors import DinoV3Error
from dinov3_ray.features import Features, FeatureSpec, deliver
from dinov3_ray.images import ImageBatch
from dinov3_ray.model.device import Stopwatch, Stretch
from dinov3_ray.model.upload import Upload
from dinov3_ray.pool.messages import Array, FeatureLayout, TeacherInfo
from dinov3_ray.pool.replica.device_fault import DeviceFault, device_fault, drop_frames
from dinov3_ray.pool.transport.wire import pack_features
from dinov3_ray.teacher import Extractor
from dinov3_ray.watch import check_finite, sums_are_finite, unwatched

__all__ = [
    "ConcurrentPipeline",
    "DevicePass",
    "DevicePipeline",
    "Results",
    "forward",
    "inspect_teacher",
    "join_batches",
    "pad_batch",
    "pipeline_for",
]


_LEAST_PROVEN = 2  # images at once: a device that has no memory for them is of no use


@dataclass(frozen=True, slots=True)
class Results:
    """What a pass gave, packed, and the seconds of the stages that are known apart from the forward pass.

    Attributes:
        preprocess: 0 for teachers that do not report it.
        pack: 0 where the copy out overlaps other batches' work.
    """

    layout: FeatureLayout
    arrays: list[Array]
    fingerprint: str | None
    preprocess: float
    pack: float


class DevicePass(Protocol):
    """A batch on its way through the device."""

    def result(self) -> Results:
        """Wait for the results.

        Raises:
            InputError: the images hold values that are not finite.
            NumericsError: the images are finite, and the results are not.
            Exception: whatever the device raises.
        """
        ...


class DevicePipeline(Protocol):
    """Runs passes of one teacher, all begun on one thread; another asks for their results, in the order in which they
    began.
    """

    #: How many passes may be in flight at once.
    depth: int

    def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
        """Begin the pass of ``batch``, of which the results of the first ``rows`` images are wanted.

        Raises:
            Exception: as :meth:`DevicePass.result`, and whatever the teacher raises.
        """
        ...


def pipeline_for(teacher: Extractor) -> DevicePipeline:
    """The pipeline that fits the device that ``teacher`` says it computes on."""
    device = getattr(teacher, "device", None)
    if isinstance(device, torch.device) and device.type == "cuda":
        return CudaPipeline(teacher, device)
    return SynchronousPipeline(teacher)


class SynchronousPipeline:
    """Computes a pass when it begins; its results are looked at and packed when they are asked for."""

    #: One is computed while the results of the one before are packed.
    depth = 2

    def __init__(self, teacher: Extractor) -> None:
        self._teacher = teacher

    def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
        begun = time.monotonic()
        features = forward(self._teacher, batch, spec)
        # Read before the next pass begins.
        preprocess = min(getattr(self._teacher, "preprocess_seconds", 0.0), time.monotonic() - begun)
        return _Computed(batch, rows, spec, features, preprocess)


@dataclass(frozen=True, slots=True)
class _Computed:
    batch: ImageBatch
    rows: int
    spec: FeatureSpec
    features: Features
    preprocess: float

    def result(self) -> Results:
        begun = time.monotonic()
        check_finite(self.features, self.batch)
        layout, arrays = pack_features(self.features.rows(0, self.rows), self.spec)
        return Results(layout, arrays, self.features.fingerprint, self.preprocess, time.monotonic() - begun)


class ConcurrentPipeline:
    """Computes several passes of a reentrant teacher at once, on the CPU.

    Threads that share one pass wait for one another, the more so while decoding or writing holds up one of them.

    Args:
        teacher: whose ``extract`` may run on several threads at once.
        passes: how many.
        threads: CPU threads that each pass computes with; None leaves torch's setting alone.
    """

    def __init__(self, teacher: Extractor, *, passes: int, threads: int | None) -> None:
        self._teacher = teacher
        self.depth = 2 * passes  # a thread that has finished a pass finds the next one
        settle = None if threads is None else functools.partial(torch.set_num_threads, threads)
        self._threads = ThreadPoolExecutor(passes, thread_name_prefix="dinov3-pass", initializer=settle)

    def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
        return self._threads.submit(self._compute, batch, rows, spec)

    def _compute(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> Results:
        return _Computed(batch, rows, spec, forward(self._teacher, batch, spec), 0.0).result()


class CudaPipeline:
    """Enqueues passes: copies in and out overlap the computation, from and to pinned memory.

    Pinned memory is torch's own cache of it, which hands a block out again once the copies that use it are over.
    Device memory that is copied out is held by its pass until that has ended: only then may another use it.
    """

    #: One is copied in, one computed, one copied out.
    depth = 3

    def __init__(self, teacher: Extractor, device: torch.device) -> None:
        self._teacher = teacher
        self._device = device
        stream: Any = torch.cuda.Stream  # its annotations are partial
        self._upload, self._copy_out = Upload(device), stream(device)

    def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
        with torch.cuda.device(self._device), _waited_for_if_it_fails(self._device):
            features = forward(self._teacher, self._upload(batch), spec)
            preprocess = getattr(self._teacher, "preprocess_watch", Stopwatch()).last
            # Looked at when the pass has ended: a look now would wait for it.
            finite = sums_are_finite(features)
            download = _Download(self._copy_out)
            layout, arrays = pack_features(features.rows(0, rows), spec, to_host=download)
            finite_host = download(finite)
            event: Any = torch.cuda.Event  # its annotations are partial
            done = event(blocking=True)  # a wait that leaves the core to others
            done.record(self._copy_out)
        results = Results(layout, arrays, features.fingerprint, 0.0, 0.0)
        return _CudaPass(results, done, batch, features, finite_host, preprocess, tuple(download.held))


@contextlib.contextmanager
def _waited_for_if_it_fails(device: torch.device) -> Iterator[None]:
    """Within it, passes are enqueued. One that fails half-way lets go of memory that the device still uses."""
    try:
        yield
    except BaseException:
        torch.cuda.synchronize(device)  # the next pass, in other streams, would not wait for that use
        raise


@dataclass(slots=True)
class _Download:
    """Copies tensors to pinned memory in ``stream``, when what the current stream has been given is done."""

    stream: torch.cuda.Stream
    held: list[Tensor] = field(default_factory=list)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Memory that will hold ``tensor``."""
        if tensor.device.type == "cpu":
            return tensor
        tensor = tensor.contiguous()
        self.held.append(tensor)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return host.copy_(tensor, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _CudaPass:
    """Its ``results`` hold their values once ``event`` has been reached."""

    results: Results
    event: Any
    batch: ImageBatch
    features: Features
    finite: Tensor
    preprocess: Stretch
    held: tuple[object, ...]

    def result(self) -> Results:
        self.event.synchronize()
        if not self.finite.all():
            check_finite(self.features, self.batch)
        return replace(self.results, preprocess=self.preprocess.seconds)


def inspect_teacher(teacher: Extractor, max_batch: int) -> TeacherInfo:
    """What clients need to know of ``teacher``, as far as it says; proves it first if it can be proved.

    On a GPU, whose kernels depend on the batch, the largest one is proved too. A CPU would take long for it.

    Raises:
        NumericsError: the teacher's fast path does not agree with plain float32.
    """
    device = getattr(teacher, "device", None)
    cosine = _prove(teacher, _LEAST_PROVEN if getattr(device, "type", None) == "cpu" else max_batch)
    known: dict[str, Any] = {name: getattr(teacher, name, None) for name in TeacherInfo.__dataclass_fields__}
    known = {name: value for name, value in known.items() if value is not None}
    for name in ("dtype", "device"):
        if name in known:
            known[name] = str(known[name])
    return replace(TeacherInfo(**known), description=type(teacher).__name__, golden_cosine=cosine)


def _prove(teacher: Extractor, rows: int) -> float | None:
    """What the teacher's ``prove`` gives, for as many rows at once as fit; None if it has none."""
    prove = getattr(teacher, "prove", None)
    while callable(prove):
        try:
            cosine: float = prove(rows=rows)
        except Exception as error:
            if rows <= _LEAST_PROVEN or device_fault(error) is not DeviceFault.MEMORY:
                raise
            drop_frames(error)
            rows = max(rows // 2, _LEAST_PROVEN)
        else:
            return cosine
    return None


def join_batches(batches: list[ImageBatch]) -> ImageBatch:
    """Several requests' images as one batch; a single one is not copied."""
    if len(batches) == 1:
        return batches[0]
    if batches[0].stacked is None:
        return ImageBatch(stacked=None, ragged=tuple(image for batch in batches for image in batch.ragged))
    return ImageBatch(stacked=torch.cat([batch.tensors[0] for batch in batches]))


def pad_batch(batch: ImageBatch, size: int) -> ImageBatch:
    """``batch`` with its first image repeated up to ``size`` images."""
    missing = size - len(batch)
    if missing <= 0:
        return batch
    first = batch.rows(0, 1)
    return join_batches([batch, *[first] * missing])


def forward(teacher: Extractor, batch: ImageBatch, spec: FeatureSpec) -> Features:
    """One forward pass, in the compute dtype, or in float16 if that was asked for: results that overflow it must show.

    Raises:
        DinoV3Error: the teacher gave features of another number of images.
        Exception: whatever the teacher raises.
    """
    images = batch.tensors[0] if batch.stacked is not None else batch.ragged
    with unwatched():  # the client has looked at the images, and the pipeline looks at the results
        features = teacher.extract(images, spec.native())
    if len(features) != len(batch):
        raise DinoV3Error(f"the teacher gave features of {len(features)} images for a batch of {len(batch)}")
    return deliver(features, spec) if spec.dtype == "float16" else features
