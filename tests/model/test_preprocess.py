"""Preprocessing against transformers' processor.

The processor itself needs torchvision, which has no build for every torch: the test that runs it is skipped where it
does not import. Two references always run, each written from the processor's source without looking at ours: the torch
operations that it ends in, image by image, to the bit; and Pillow's resize of float images, another implementation of
the same filter, to 1e-4 (its filter weights are float64, torch's float32; without antialiasing 0.45 would be usual).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers_models import BIT, SIGLIP

from dinov3_ray.config.files import PreprocessorFile
from dinov3_ray.config.preprocessing import Preprocessing, Resample
from dinov3_ray.config.transformers_model import _DEFAULTS, ImageProcessorFile
from dinov3_ray.errors import InputError
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import preprocess as preprocess_module
from dinov3_ray.model.preprocess import preprocess

CPU = torch.device("cpu")
STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"size": {"height": 224, "width": 224}}
FILES: dict[str, dict[str, Any]] = {
    "224": SQUARE,
    "518, which 16 does not divide": {"size": {"height": 518, "width": 518}},
    "an int": {"size": 112},
    "not square": {"size": {"height": 160, "width": 240}},
    "satellite statistics": {**SQUARE, "image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]},
    "another factor": {**SQUARE, "rescale_factor": 1 / 256},
    "shortest edge": {"size": {"shortest_edge": 231}},
    "shortest edge and crop": {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 223, "width": 224},
    },
    "resize and odd crop": {
        "size": {"height": 300, "width": 320},
        "do_center_crop": True,
        "crop_size": {"height": 229, "width": 224},
    },
    "crop alone, larger than some images": {
        **SQUARE,
        "do_resize": False,
        "do_center_crop": True,
        "crop_size": {"height": 451, "width": 600},
    },
    "neither resized nor normalized": {**SQUARE, "do_resize": False, "do_normalize": False},
}


# Those of other models, by the order in which transformers' general image processor has the steps.
OTHER_FILES: dict[str, dict[str, Any]] = {
    "DINOv2": BIT,
    "DINOv2 at 518": BIT | {"size": {"shortest_edge": 592}, "crop_size": {"height": 518, "width": 518}},
    "SigLIP2": SIGLIP,
    "SigLIP": SIGLIP | {"resample": 3},
    "not normalized": SIGLIP | {"do_normalize": False},
    "not rescaled": SIGLIP | {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
}


def rule_of(file: dict[str, Any]) -> Preprocessing:
    return PreprocessorFile.model_validate({**STATISTICS, **file}).preprocessing()


def run(images: Any, file: dict[str, Any]) -> Tensor:
    return preprocess(ImageBatch.of(images), rule_of(file), CPU)


def run_other(images: Any, file: dict[str, Any]) -> Tensor:
    values = file | {"image_processor_type": file["image_processor_type"].removesuffix("ImageProcessor")}
    return preprocess(ImageBatch.of(images), ImageProcessorFile.model_validate(values).preprocessing(), CPU)


def reference_size(file: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    size = file["size"]
    if not file.get("do_resize", True):
        return height, width
    if isinstance(size, int):
        return size, size
    if "height" in size:
        return size["height"], size["width"]
    short = size["shortest_edge"]
    return (int(short * height / width), short) if width <= height else (short, int(short * width / height))


def reference_crop(side: int, crop: int) -> tuple[Tensor, Tensor]:
    """Which rows (or columns) of an image a centre crop takes, and whether they lie inside it; outside is black."""
    # Where the crop is larger, transformers pads the odd pixel right and below.
    indices = torch.arange(crop) + (-((crop - side) // 2) if crop > side else (side - crop) // 2)
    return indices.clamp(0, side - 1), (indices >= 0) & (indices < side)


def reference(image: Tensor, file: dict[str, Any], *, resize: Any) -> Tensor:
    """rescale -> resize -> center crop -> normalize, of one image, with ``resize`` of a float image [3,H,W]."""
    settings = {**STATISTICS, "rescale_factor": 1 / 255, **file}
    pixels = image * settings["rescale_factor"] if image.dtype == torch.uint8 else image
    pixels = resize(pixels, reference_size(file, *image.shape[1:]))
    if file.get("do_center_crop"):
        height, width = file["crop_size"]["height"], file["crop_size"]["width"]
        rows, inside_rows = reference_crop(pixels.shape[1], height)
        columns, inside_columns = reference_crop(pixels.shape[2], width)
        pixels = pixels[:, rows][:, :, columns] * (inside_rows[:, None] & inside_columns)
    if file.get("do_normalize", True):
        mean, std = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    return pixels


def torch_resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


def pillow_resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    channels = [Image.fromarray(channel.numpy()).resize(size[::-1], Image.Resampling.BILINEAR) for channel in pixels]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_photographs_come_out_as_from_the_processors_operations_bit_for_bit(
    photographs: list[Tensor], file: dict[str, Any]
) -> None:
    for image in photographs:
        assert torch.equal(run(image, file)[0], reference(image, file, resize=torch_resize))


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_photographs_come_out_as_from_pillow(photographs: list[Tensor], file: dict[str, Any]) -> None:
    for image in photographs[:3]:
        torch.testing.assert_close(run(image, file)[0], reference(image, file, resize=pillow_resize), atol=1e-4, rtol=0)


def test_photographs_come_out_as_from_the_processor_itself(photographs: list[Tensor]) -> None:
    pytest.importorskip("torchvision", reason="transformers' DINOv3ViTImageProcessor needs torchvision")
    from transformers import DINOv3ViTImageProcessor  # its import fails without torchvision

    for file, image in product(FILES.values(), photographs):
        processor = DINOv3ViTImageProcessor(**{**STATISTICS, **file})
        floats = image.float() / 255
        assert torch.equal(run(image, file), processor(image, return_tensors="pt")["pixel_values"])
        assert torch.equal(run(floats, file), processor(floats, do_rescale=False, return_tensors="pt")["pixel_values"])


def other_reference(image: Tensor, file: dict[str, Any]) -> Tensor:
    """resize -> center crop -> rescale and normalize in one, of one image, as in transformers' TorchvisionBackend."""
    mode = {2: "bilinear", 3: "bicubic"}[file["resample"]]
    size = reference_size(file, *image.shape[1:])
    # On CPUs with AVX2, torchvision leaves uint8 images to the same operation: it rounds, and ends at 0 and 255.
    pixels = torch.nn.functional.interpolate(image[None], size, mode=mode, antialias=True)[0]
    if file.get("do_center_crop"):
        height, width = file["crop_size"]["height"], file["crop_size"]["width"]
        top, left = int((size[0] - height) / 2), int((size[1] - width) / 2)
        pixels = pixels[:, top : top + height, left : left + width]
    factor = file["rescale_factor"] if image.dtype == torch.uint8 and file["do_rescale"] else 1.0
    if not file["do_normalize"]:
        return pixels * factor
    mean, std = (torch.tensor(file[key])[:, None, None] * (1 / factor) for key in ("image_mean", "image_std"))
    return (pixels.float() - mean) / std


@pytest.mark.parametrize("file", OTHER_FILES.values(), ids=OTHER_FILES)
def test_for_other_models_photographs_come_out_as_from_the_general_processors_operations_bit_for_bit(
    photographs: list[Tensor], file: dict[str, Any]
) -> None:
    for image in photographs:
        for given in (image, image.float() / 255):
            assert torch.equal(run_other(given, file)[0], other_reference(given, file))


@pytest.mark.parametrize("file", OTHER_FILES.values(), ids=OTHER_FILES)
def test_for_other_models_photographs_come_out_as_from_the_processor_itself(
    photographs: list[Tensor], file: dict[str, Any]
) -> None:
    pytest.importorskip("torchvision", reason="transformers' image processors need torchvision")
    import transformers

    processor = getattr(transformers, file["image_processor_type"])(**file)
    for image in photographs:
        floats = image.float() / 255
        assert torch.equal(run_other(image, file), processor(image, return_tensors="pt")["pixel_values"])
        assert torch.equal(
            run_other(floats, file), processor(floats, do_rescale=False, return_tensors="pt")["pixel_values"]
        )


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_uint8_images_are_resized_alike_where_torch_has_no_kernel_for_them(
    photographs: list[Tensor], mode: Resample, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: in float32, clamped and rounded. torch's integer kernel has coarser weights.
    by_integers = preprocess_module._resize(photographs[2][None], (224, 300), mode)
    monkeypatch.setattr(preprocess_module, "_resizes_uint8", lambda _: False)
    by_floats = preprocess_module._resize(photographs[2][None], (224, 300), mode)
    assert by_integers.dtype == by_floats.dtype == torch.uint8
    assert (by_integers.int() - by_floats.int()).abs().max() <= 1


def test_what_a_processors_file_leaves_out_is_as_transformers_has_it() -> None:
    import transformers

    for short, defaults in _DEFAULTS.items():
        known = getattr(transformers, f"{short}ImageProcessor")
        assert {name: int(getattr(known, name)) for name in defaults} == defaults


def test_a_ragged_batch_equals_its_images_one_by_one_in_order(photographs: list[Tensor]) -> None:
    order = [0, 1, 5, 2, 1, 3, 0]  # 0 and 5 share a size and are resized together
    pixels_B3HW = run([photographs[index] for index in order], SQUARE)
    for pixels, index in zip(pixels_B3HW, order, strict=True):
        assert torch.equal(pixels, run(photographs[index], SQUARE)[0])


def test_a_stacked_batch_equals_its_images_one_by_one(photographs: list[Tensor]) -> None:
    batch = torch.stack([photographs[0], photographs[5]])
    assert torch.equal(run(batch, SQUARE), torch.cat([run(photographs[0], SQUARE), run(photographs[5], SQUARE)]))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda image: image.numpy(), id="NumPy"),
        pytest.param(lambda image: image.permute(1, 2, 0).contiguous().numpy().transpose(2, 0, 1), id="channels last"),
        pytest.param(lambda image: image[None].expand(1, -1, -1, -1), id="batch of one"),
        pytest.param(lambda image: [image.numpy()], id="sequence"),
        pytest.param(lambda image: image.flip(-1).numpy()[..., ::-1], id="negative strides"),
    ],
)
def test_the_layout_of_the_memory_makes_no_difference(photographs: list[Tensor], layout: Any) -> None:
    assert torch.equal(run(layout(photographs[2]), SQUARE), run(photographs[2], SQUARE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_computed_in_float32(photographs: list[Tensor], dtype: torch.dtype) -> None:
    image = (photographs[2].double() / 255).to(dtype)
    pixels_B3HW = run(image, SQUARE)
    assert pixels_B3HW.dtype == torch.float32
    assert torch.equal(pixels_B3HW, run(image.float(), SQUARE))


def test_floats_are_taken_as_they_are_and_integers_are_rescaled(photographs: list[Tensor]) -> None:
    image = photographs[2]
    assert torch.equal(run(image * (1 / 255), SQUARE), run(image, SQUARE))


def test_the_callers_images_are_left_alone(photographs: list[Tensor]) -> None:
    image = torch.rand(3, 224, 224)  # already of the model's size: nothing is resized, and so nothing copied
    before = image.clone()
    run(image, {**SQUARE, "do_normalize": False})
    run(image, SQUARE)
    assert torch.equal(image, before)


def test_images_that_keep_their_aspect_must_share_it(photographs: list[Tensor]) -> None:
    file = FILES["shortest edge"]
    with pytest.raises(InputError, match=r"\(231, 346\), \(231, 347\).*image_size=\(h, w\)"):
        run([photographs[1], photographs[2]], file)
    assert run([photographs[0], photographs[5]], file).shape == (2, 3, 231, 231)
