"""What is copied to a GPU, and in which form; the files *_on_fake_cuda.py show that the copies are in order."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, Features, FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.model.upload import Upload

ONE = torch.device("cuda:1")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_elsewhere_images_stay_and_features_are_copied_plainly(device: str) -> None:
    upload = Upload(torch.device(device))
    batch = ImageBatch.of(torch.zeros(2, 3, 16, 16))
    assert upload(batch) is batch
    moved = upload.features(Features(cls=torch.ones(2, 4), fingerprint="f"))
    assert (moved.cls.device.type, moved.fingerprint) == (device, "f")  # type: ignore[union-attr]


def test_float64_images_are_narrowed_and_results_are_not() -> None:
    images = [torch.zeros(3, 16, 16, dtype=torch.float64), torch.zeros(3, 16, 32, dtype=torch.float64)]
    with FakeCuda():
        upload = Upload(ONE)
        assert upload(ImageBatch.of(torch.stack(images[:1]))).dtype == torch.float32
        ragged = upload(ImageBatch.of(images)).ragged
        assert [(image.dtype, image.device, tuple(image.shape)) for image in ragged] == [
            (torch.float32, ONE, (3, 16, 16)),
            (torch.float32, ONE, (3, 16, 32)),
        ]
        features = upload.features(Features(cls=images[0], layers={3: images[1]}, fingerprint="f"))
        assert [(name, tensor.dtype) for name, tensor in features.named()] == [
            ("cls", torch.float64),
            ("layers.3", torch.float64),
        ]
        assert features.fingerprint == "f"


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 16, 32, 3).permute(0, 3, 1, 2),
        torch.zeros(2, 3, 32, 64)[..., ::2, ::2],
        torch.zeros(3, 1, 1).expand(2, 3, 16, 32),
    ],
    ids=["channels-last", "strided", "expanded"],
)
def test_any_layout_crosses_in_one_piece(images: Tensor, cuda: FakeCuda) -> None:
    uploaded = Upload(ONE)(ImageBatch.of(images)).stacked
    assert uploaded is not None
    assert (uploaded.shape, uploaded.device) == (images.shape, ONE)
    assert cuda.found() == []
    assert [name for _, _, name in cuda.watch.launches] == ["aten._to_copy.default"]


def test_a_copy_of_it_has_a_stream_of_its_own(cuda: FakeCuda) -> None:
    upload = Upload(ONE)
    upload.features(Features(cls=torch.ones(2, 4)))
    for again in (copy.deepcopy(upload), pickle.loads(pickle.dumps(upload))):
        assert again.device == ONE
        assert again.__dict__.keys() == {"device"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [False, True])
def test_on_a_gpu_neither_waits_for_the_other_and_images_may_change(tiny_checkpoint: Path, pinned: bool) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16"), "cuda")
    images = torch.randint(0, 256, (4, 3, 300, 400), dtype=torch.uint8)
    inputs = [images, [images[0], images[1, :, :64, :80]]]
    expected = [teacher.extract(each, FeatureSpec(cls=True)).cls for each in inputs]
    images = images.pin_memory() if pinned else images
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # the student's queue: about a second
    busy = torch.cuda.current_stream().record_event()
    found = []
    for each in [images, [images[0], images[1, :, :64, :80]]]:
        found.append(teacher.extract(each, FeatureSpec(cls=True)).cls)
    images.zero_()
    assert not busy.query(), "the host has waited for the student"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
