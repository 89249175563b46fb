"""The local teacher on fake GPUs: it mixes no devices, races with nobody, waits for nothing, and stays on its GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from planted import planted
from transformers_models import KINDS, write_transformers

from dinov3_ray import DinoV3Config, DinoV3Teacher, Features, FeatureSpec
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.images import Images
from dinov3_ray.model import TransformersTeacher, backbone, preprocess
from dinov3_ray.model.device import Stopwatch
from dinov3_ray.model.float8 import Float8Linear
from dinov3_ray.model.upload import Pending, Upload, _staged
from dinov3_ray.watch import TeacherWatch, _Look

ONE = torch.device("cuda:1")
EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, -1), map_size=(7, 9))
FIRST_BLOCK = FeatureSpec(layers=(0,))  # whose passes are short
STACKED = torch.full((4, 3, 300, 400), 100, dtype=torch.uint8)
RAGGED = [STACKED[0], STACKED[1], STACKED[2, :, :64, :80]]


@pytest.fixture
def teacher(tiny_checkpoint: Path, cuda: FakeCuda) -> DinoV3Teacher:
    return ready(cuda, DinoV3Config(tiny_checkpoint, dtype="bfloat16"))


def ready(cuda: FakeCuda, config: DinoV3Config) -> DinoV3Teacher:
    """A teacher on the second GPU that has loaded and computed once: it may wait for that."""
    teacher = DinoV3Teacher(config, ONE)
    teacher.extract(STACKED, FeatureSpec(cls=True))
    cuda.forget()
    return teacher


IMAGES = (STACKED, RAGGED, STACKED.double() / 255, STACKED.permute(0, 1, 3, 2), STACKED[0].numpy())


def drive(teacher: DinoV3Teacher, spec: FeatureSpec = EVERYTHING, inputs: Sequence[Images] = IMAGES) -> list[Features]:
    """Passes of every kind of images, whose results a student reads."""
    results = []
    for images in inputs:
        features = teacher.extract(images, spec)
        with torch.cuda.device(teacher.device):
            results.append(features.map(lambda _, tensor: tensor * 2))
    return results


@pytest.mark.slow
def test_it_waits_for_nothing_and_touches_its_own_gpu_only(cuda: FakeCuda, teacher: DinoV3Teacher) -> None:
    spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, -1))
    results = drive(teacher, spec)
    for dtype in ("float32", "float16", "int8"):
        results += drive(teacher, replace(spec, dtype=dtype), [STACKED])
    assert {tensor.device for features in results for _, tensor in features.named()} == {ONE}
    assert results[0].feature_map.shape == (4, 128, 14, 14)  # type: ignore[union-attr]
    assert (cuda.found(), cuda.astray, cuda.contexts) == ([], [], {1})
    streams = {stream for _, stream, _ in cuda.watch.launches}
    assert len(streams) == 2, "copies have a stream of their own"


@pytest.mark.slow
def test_a_convnext_too(tmp_path: Path, cuda: FakeCuda) -> None:
    teacher = ready(cuda, DinoV3Config(init_checkpoint("convnext-test", tmp_path / "convnext"), dtype="float16"))
    drive(teacher, FeatureSpec(cls=True, feature_map=True, layers=(0, 3), map_size=(7, 9)), [STACKED, RAGGED])
    assert (cuda.found(), cuda.contexts) == ([], {1})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov2_with_registers", "siglip2"])
def test_other_models_of_transformers_too(tmp_path: Path, kind: str) -> None:
    teacher = TransformersTeacher(write_transformers(tmp_path / kind, *KINDS[kind]), dtype="bfloat16", image_size=112)
    has_cls = teacher.has_cls
    with FakeCuda() as cuda:
        teacher.to(ONE)  # made on the CPU, since it looks at values then
        spec = FeatureSpec(cls=has_cls, feature_map=True, registers=has_cls, layers=(0, -1), map_size=(7, 9))
        for images in (STACKED, STACKED / 255):  # each has a mean and a std of its own, which are copied once
            teacher.extract(images, spec)
        cuda.forget()
        for images in IMAGES:
            assert {tensor.device for _, tensor in teacher.extract(images, spec).named()} == {ONE}
        assert (cuda.found(), cuda.astray, cuda.contexts) == ([], [], {1})


@pytest.mark.slow
def test_float8_layers_too(tiny_checkpoint: Path, cuda: FakeCuda) -> None:
    teacher = ready(cuda, DinoV3Config(tiny_checkpoint, dtype="float8"))
    assert any(isinstance(module, Float8Linear) for module in teacher.modules())
    drive(teacher, EVERYTHING, [STACKED, RAGGED])
    assert (cuda.found(), cuda.contexts) == ([], {1})
    assert any("_scaled_mm" in name for _, _, name in cuda.watch.launches)


@pytest.mark.slow
def test_cut_and_resampled_input_too(tiny_checkpoint: Path, cuda: FakeCuda) -> None:
    teacher = ready(cuda, DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=(70, 90)))
    assert teacher.extract(STACKED, EVERYTHING).feature_map.shape == (4, 128, 7, 9)  # type: ignore[union-attr]
    assert (cuda.found(), cuda.contexts) == ([], {1})


@pytest.mark.slow
def test_images_on_its_gpu_stay_where_they_are(cuda: FakeCuda, teacher: DinoV3Teacher) -> None:
    images = STACKED.pin_memory().to(ONE, non_blocking=True)
    teacher.extract(images, EVERYTHING)  # the one look at images on a GPU waits
    cuda.forget()
    teacher.extract(images, EVERYTHING)
    teacher.extract(list(images), EVERYTHING)
    assert (cuda.found(), cuda.contexts) == ([], {0, 1})  # the test pinned them on the first
    assert len({stream for _, stream, _ in cuda.watch.launches}) == 1


@pytest.mark.slow
def test_images_on_another_gpu_or_on_both_reach_it(cuda: FakeCuda, teacher: DinoV3Teacher) -> None:
    elsewhere = STACKED.pin_memory().to("cuda:0", non_blocking=True)
    teacher.extract(elsewhere, EVERYTHING)
    cuda.forget()
    teacher.extract(elsewhere, EVERYTHING)
    teacher.extract([elsewhere[0], STACKED[0]], EVERYTHING)
    assert cuda.found() == []


@pytest.mark.slow
def test_a_teacher_that_is_moved_uploads_to_its_new_gpu(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16"))
    teacher.extract(STACKED, EVERYTHING)
    assert teacher.model.attention == "sdpa-cpu"
    with FakeCuda() as cuda:
        teacher.to("cuda:1").extract(STACKED, EVERYTHING)
        cuda.forget()
        drive(teacher)
        assert (cuda.found(), cuda.contexts) == ([], {1})
        assert teacher.model.attention == "sdpa-cudnn"


@pytest.mark.slow
def test_cuda_without_an_index_is_the_current_device_of_its_caller(tiny_checkpoint: Path, cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    teacher = DinoV3Teacher(tiny_checkpoint, "cuda")
    assert teacher.device == ONE
    thread = threading.Thread(target=drive, args=(teacher,), name="dinov3-test")
    thread.start()
    thread.join()
    assert cuda.contexts == {1}


# Faults that must be found ------------------------------------------------------------------------------------------

FAULTS = {
    "the stream does not wait for the copy": (Pending.receive, "stream.wait_event(self.ready)", "pass", "race"),
    "memory is not kept for the stream": (Pending.receive, "tensor.record_stream(stream)", "pass", "freed"),
    "the copy waits for the host": (Upload.begin, ", non_blocking=True)", ")", "wait"),
    "memory is not pinned": (_staged, ", pin_memory=True", "", "unpinned"),
    "no stream of its own": (
        Upload.__call__,
        "self.begin(tensors).receive()",
        "tuple(t.to(self.device) for t in tensors)",
        "wait",
    ),
    "a read in the backbone": (
        backbone._blocks_outputs,
        "hidden = model.step(block, hidden, given)",
        "hidden = model.step(block, hidden, given); hidden.sum().item()",
        "wait",
    ),
    "a mean on the CPU": (
        preprocess._transform,
        "_statistics(rule.mean, rule.std, scale, device)",
        "_statistics(rule.mean, rule.std, scale, torch.device('cpu'))",
        "error",
    ),
    "a mean copied for each batch": (
        preprocess._transform,
        "_statistics(rule.mean, rule.std, scale, device)",
        "_statistics.__wrapped__(rule.mean, rule.std, scale, device)",
        "wait",
    ),
    "indexing by a list": (
        preprocess.preprocess,
        "for index, pixels_3hw in zip(members, part, strict=True):",
        "for index, pixels_3hw in [(members, part)]:",
        "error",
    ),
    "the look at results waits": (_Look.begin, ", non_blocking=True", "", "wait"),
    "the look at results is not pinned": (_Look.begin, ", pin_memory=True", "", "unpinned"),
    "the look on another current device": (_Look.begin, "torch.cuda.device(device)", "torch.cuda.device(0)", "device"),
    "results are looked at at once": (
        TeacherWatch.results,
        "self._on_their_way.append(_Look.begin(features))",
        "check_finite(features, images)",
        "wait",
    ),
    "the stopwatch waits": (Stopwatch.measure, "end.record(stream)", "end.record(stream); end.synchronize()", "wait"),
}


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> tuple[FakeCuda, DinoV3Teacher]:
    """For all faults: loading takes longer than a pass."""
    with FakeCuda() as cuda:
        return cuda, ready(cuda, DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=64))


@pytest.mark.slow
@pytest.mark.parametrize(("function", "old", "new", "kind"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(loaded: tuple[FakeCuda, DinoV3Teacher], function: Any, old: str, new: str, kind: str) -> None:
    cuda, teacher = loaded
    with cuda:
        teacher.extract(STACKED, FIRST_BLOCK)
        cuda.forget()
        refused = pytest.raises((RuntimeError, NotImplementedError)) if kind == "error" else nullcontext()
        with planted(function, old, new), refused:
            drive(teacher, FIRST_BLOCK, [STACKED, RAGGED])
        found = cuda.found() + [f"device: {index}" for index in cuda.contexts - {1}]
        cuda.contexts.clear()
    assert kind == "error" or any(fault.startswith(f"{kind}:") for fault in found), found
