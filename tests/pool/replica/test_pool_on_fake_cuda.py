"""A replica on fake GPUs: streams in order, no wait on the device thread, and one GPU for all threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from planted import planted
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, Features, FeatureSpec, TeacherPool
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.model.upload import Pending, Upload, _staged
from dinov3_ray.pool import teacher_pool
from dinov3_ray.pool.local import LocalController
from dinov3_ray.pool.replica import device_pipeline
from dinov3_ray.pool.replica.device_pipeline import (
    CudaPipeline,
    DevicePass,
    _CudaPass,
    _Download,
    _waited_for_if_it_fails,
)
from dinov3_ray.pool.replica.hosted import HostedReplica
from dinov3_ray.pool.replica.replica import Replica
from dinov3_ray.pool.spec import builder
from dinov3_ray.pool.transport.wire import pack_features

ONE = torch.device("cuda:1")
SPECS = [
    FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, -1), map_size=(7, 9), dtype=dtype)
    for dtype in ("native", "float32", "float16", "int8")
]
IMAGES = [torch.full((4, 3, 300, 400), 100, dtype=torch.uint8), torch.full((4, 3, 48, 64), 0.5, dtype=torch.float64)]
RAGGED = [IMAGES[0][0], IMAGES[0][1], torch.full((3, 64, 80), 100, dtype=torch.uint8)]


class OnTheCurrentDevice:
    """A teacher of the user's, which goes where torch's ``cuda`` goes; warming up, it pins memory there."""

    def __init__(self, device: str = "cuda") -> None:
        with torch.cuda.device(torch.device(device)):
            self._weight = torch.ones(3, device=device)
        self.device = self._weight.device

    def warm_up_passes(self, rows: int) -> Iterator[tuple[Images, FeatureSpec]]:
        torch.empty(rows, pin_memory=True)
        yield IMAGES[0], FeatureSpec(cls=True)

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        assert isinstance(images, Tensor)
        images = images.float()
        return Features(cls=images.mean(dim=(2, 3)) * self._weight, feature_map=images * 2)


@pytest.fixture
def pipeline(tiny_checkpoint: Path, cuda: FakeCuda) -> CudaPipeline:
    """Of a teacher on the second GPU that has loaded and computed once: it may wait for that."""
    pipeline = device_pipeline.pipeline_for(DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16"), ONE))
    assert isinstance(pipeline, CudaPipeline)
    drive(pipeline, FeatureSpec(cls=True), [IMAGES[0]])
    cuda.forget()
    return pipeline


def drive(pipeline: CudaPipeline, spec: FeatureSpec, inputs: Sequence[Images]) -> list[str]:
    """Passes as a replica makes them, as many in flight as the pipeline takes; the names of what they gave."""
    flying: list[DevicePass] = []
    names = []
    for images in inputs:
        batch = ImageBatch.of(images)
        flying.append(pipeline.begin(batch, len(batch), spec))
        if len(flying) == pipeline.depth:
            names = [name for name, *_ in flying.pop(0).result().layout]
    while flying:
        flying.pop(0).result()
    return names


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.dtype)
def test_only_the_wait_for_results_waits(cuda: FakeCuda, pipeline: CudaPipeline, spec: FeatureSpec) -> None:
    inputs = [*IMAGES, RAGGED, IMAGES[0]]
    names = drive(pipeline, spec, inputs)
    assert names == ["cls", "feature_map", "registers", "layers.0", "layers.-1"]
    assert cuda.found() == ["wait: Event.synchronize in MainThread"]
    assert len(cuda.watch.waits) == len(inputs)
    assert cuda.contexts == {1}
    assert len({stream for _, stream, _ in cuda.watch.launches}) == 3, "in, through and out overlap"


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (7, 9)])
def test_what_leaves_the_gpu_is_narrow_and_in_the_order_of_its_tokens(
    pipeline: CudaPipeline, size: tuple[int, int] | None
) -> None:
    batch, (height, width) = ImageBatch.of(IMAGES[0]), size or (14, 14)
    whole, scales = (4, height, width, 128), (4, 1, height, width)
    for dtype, expected in (
        ("native", [(torch.bfloat16, whole)]),
        ("float16", [(torch.float16, whole)]),
        ("int8", [(torch.int8, whole), (torch.float32, scales)]),
    ):
        flying = pipeline.begin(batch, len(batch), FeatureSpec(feature_map=True, map_size=size, dtype=dtype))  # type: ignore[arg-type]
        assert isinstance(flying, _CudaPass)
        *left, _ = flying.held  # the last says whether all are finite
        assert isinstance(left[0], Tensor)
        assert [(tensor.dtype, tensor.shape, tensor.device) for tensor in left if isinstance(tensor, Tensor)] == [
            (*one, ONE) for one in expected
        ]
        if dtype == "native":
            feature_map = flying.features.feature_map
            assert feature_map is not None
            assert left[0].untyped_storage()._cdata == feature_map.untyped_storage()._cdata, "copied on its way"


# (function, text, fault, what is found)
FAULTS = {
    "int8 made on the host": (
        pack_features,
        "encode(tensor, spec.dtype",
        "encode(tensor.cpu(), spec.dtype",
        "wait: aten",
    ),
    "no wait in the upload": (Pending.receive, "stream.wait_event(self.ready)", "pass", "race"),
    "images not kept": (Pending.receive, "tensor.record_stream(stream)", "pass", "freed"),
    "the upload blocks": (Upload.begin, ", non_blocking=True)", ")", "wait: aten._to_copy"),
    "the upload is not pinned": (_staged, ", pin_memory=True", "", "unpinned"),
    "the upload in the stream that computes": (
        Upload.begin,
        "torch.cuda.stream(self._stream)",
        "torch.cuda.stream(torch.cuda.current_stream())",
        "streams: 2",
    ),
    "no wait in the download": (
        _Download.__call__,
        "self.stream.wait_stream(torch.cuda.current_stream())",
        "pass",
        "race",
    ),
    "downloads not held": (CudaPipeline.begin, "tuple(download.held)", "()", "freed"),
    "the download blocks": (_Download.__call__, ", non_blocking=True", "", "wait: aten.copy_"),
    "the host is not pinned": (_Download.__call__, ", pin_memory=True", "", "unpinned"),
    "results read before they have arrived": (_CudaPass.result, "self.event.synchronize()", "pass", "race"),
    "the event of another stream": (CudaPipeline.begin, "done.record(self._copy_out)", "done.record()", "race"),
    "results looked at at once": (
        CudaPipeline.begin,
        "finite = sums_are_finite(features)",
        "finite = sums_are_finite(features); bool(finite.all())",
        "wait: aten._local",
    ),
    "another current device": (
        CudaPipeline.begin,
        "torch.cuda.device(self._device)",
        "torch.cuda.device(0)",
        "device: 0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("function", "old", "new", "kind"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(cuda: FakeCuda, function: Any, old: str, new: str, kind: str) -> None:
    pipeline = device_pipeline.pipeline_for(OnTheCurrentDevice("cuda:1"))
    assert isinstance(pipeline, CudaPipeline)
    with planted(function, old, new):
        drive(pipeline, FeatureSpec(cls=True, feature_map=True, dtype="int8"), [IMAGES[0]] * 4)
    streams = {stream for _, stream, _ in cuda.watch.launches}
    found = [*cuda.found(), f"streams: {len(streams)}", *(f"device: {index}" for index in cuda.contexts - {1})]
    assert any(fault.startswith(kind) for fault in found), found


# Threads ------------------------------------------------------------------------------------------------------------


def submit_some(hosted: HostedReplica) -> list[Features]:
    futures = [hosted.submit(images, spec) for images in (*IMAGES, RAGGED) for spec in SPECS[::3]]
    return [future.result(60) for future in futures]


@pytest.mark.slow
def test_an_extraction_computes_on_one_gpu_and_waits_in_one_thread(tiny_checkpoint: Path, cuda: FakeCuda) -> None:
    config = DinoV3Config(tiny_checkpoint, dtype="bfloat16")
    hosted = HostedReplica(lambda: DinoV3Teacher(config, ONE), max_batch=4)
    cuda.forget()
    results = submit_some(hosted)
    hosted.close()
    assert results[0].feature_map.shape == (4, 128, 7, 9)  # type: ignore[union-attr]
    assert cuda.found() == ["wait: Event.synchronize in dinov3-hosted-results"]
    assert (cuda.contexts, cuda.astray_in_our_threads()) == ({1}, [])


THREADS = {
    "the device thread is not settled": (Replica._run, "settle_thread(self._device)", "pass"),
    "the results thread is not settled": (Replica._finish_passes, "settle_thread(self._device)", "pass"),
}


@pytest.mark.parametrize(("function", "old", "new"), [(None, "", ""), *THREADS.values()], ids=["as it is", *THREADS])
def test_each_thread_of_a_replica_is_settled(cuda: FakeCuda, function: Any, old: str, new: str) -> None:
    with planted(function, old, new) if function else nullcontext():
        hosted = HostedReplica(lambda: OnTheCurrentDevice("cuda:1"), max_batch=4)
        hosted.submit(IMAGES[0], FeatureSpec(cls=True)).result(60)
        hosted.close()
    assert ((cuda.contexts, cuda.astray_in_our_threads()) == ({1}, [])) is (function is None)


@pytest.mark.parametrize(
    ("environment", "current", "expected"),
    [
        ({}, 0, 0),
        ({}, 1, 1),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "1"}, 0, 1),  # torchrun, not set yet
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3", "RANK": "1"}, 2, 2),  # the caller has chosen
        ({"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8", "RANK": "5"}, 0, 0),  # sees its own GPU only
    ],
    ids=["one-process", "its-current-device", "rank", "rank-that-chose", "rank-with-its-own-gpus"],
)
def test_a_local_pool_computes_on_its_ranks_gpu(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], current: int, expected: int
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with FakeCuda(devices=3) as cuda:
        if current:
            torch.cuda.set_device(current)
        with TeacherPool.start(OnTheCurrentDevice, local_mode=True, replicas=2) as pool:
            assert pool.teacher().extract_features(IMAGES[0]).shape == (4, 3)
            pool.scale(3, wait=True)  # whoever starts it
        assert cuda.contexts == {expected}
        assert cuda.astray_in_our_threads() == []
        assert {device for device, _, _ in cuda.watch.launches} == {expected}


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        (builder, "settle_thread(torch.device(device))", "pass"),
        (LocalController._start, "self._device", "spec.placement.device"),
        (teacher_pool._own_device, 'str(as_device("cuda"))', '"cuda"'),
    ],
    ids=["the factory's thread is not settled", "the replica's thread gives the index", "nobody gives the index"],
)
def test_a_fault_of_a_local_pool_is_found(cuda: FakeCuda, function: Any, old: str, new: str) -> None:
    torch.cuda.set_device(1)
    with planted(function, old, new), TeacherPool.start(OnTheCurrentDevice, local_mode=True) as pool:
        pool.teacher().extract_features(IMAGES[0])
    assert cuda.contexts == {0, 1}


@pytest.mark.slow
def test_its_own_teachers_too(tiny_checkpoint: Path, cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    config = DinoV3Config(tiny_checkpoint, dtype="bfloat16")
    with TeacherPool.start(config, local_mode=True) as pool:
        pool.teacher().extract(IMAGES[0], SPECS[0])
        assert [replica.device for replica in pool.status().replicas] == ["cuda:1"]
    assert (cuda.contexts, cuda.astray_in_our_threads()) == ({1}, [])


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_pass_that_fails_half_way_is_waited_for(
    cuda: FakeCuda, pipeline: CudaPipeline, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    pack, calls = device_pipeline.pack_features, iter([True, False] * 3)

    def pack_or_fail(features: Features, spec: FeatureSpec, to_host: Any) -> Any:
        packed = pack(features, spec, to_host=to_host)
        if next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return packed

    monkeypatch.setattr(device_pipeline, "pack_features", pack_or_fail)
    with nullcontext() if guarded else planted(_waited_for_if_it_fails, "torch.cuda.synchronize(device)", "pass"):
        for _ in range(6):
            with suppress(torch.OutOfMemoryError):
                pipeline.begin(ImageBatch.of(IMAGES[0]), 4, SPECS[0]).result()
    assert any(fault.startswith("freed") for fault in cuda.found()) is not guarded
