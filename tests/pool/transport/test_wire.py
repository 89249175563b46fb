"""Images and features over the wire: the same bits on the other side, and no copy that is not needed."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_features import random_features
from torch import Tensor

from dinov3_ray.config.variants import IMAGENET, preprocessing_for
from dinov3_ray.feature_spec import RESULT_DTYPES
from dinov3_ray.features import Features, FeatureSpec, deliver
from dinov3_ray.images import ImageBatch
from dinov3_ray.pool.client.request import Handle, Request, ResultSizes
from dinov3_ray.pool.messages import Array, FeatureLayout, RequestHeader, TeacherInfo
from dinov3_ray.pool.transport.wire import alias, pack_features, pack_images, unpack_features, unpack_images

COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = (torch.contiguous_format, torch.channels_last)
EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(5, -1))


def through_the_store(arrays: list[Array]) -> list[Array]:
    """As Ray's object store hands them out: pickle 5, out of band, over read-only memory."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(arrays, protocol=5, buffer_callback=buffers.append)
    stored = [bytes(buffer.raw()) for buffer in buffers]
    assert len(stored) == len(arrays), "an array went in band: it was not contiguous"
    received = pickle.loads(stream, buffers=stored)
    assert not any(array.flags.writeable for array in received)
    assert isinstance(received, list)
    return received


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# --- Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stacked", [True, False])
def test_images_arrive_bit_for_bit(photographs: list[Tensor], dtype: torch.dtype, stacked: bool) -> None:
    images = [photograph if dtype is torch.uint8 else (photograph / 255).to(dtype) for photograph in photographs]
    batch = ImageBatch.of(torch.stack([image[:, :300, :400] for image in images[:3]]) if stacked else images)
    layout, arrays = pack_images(batch)
    received = unpack_images(layout, through_the_store(arrays))
    assert received.dtype == dtype
    assert (received.stacked is not None) == stacked
    assert [bits(image) for image in received.tensors] == [bits(image) for image in batch.tensors]


def test_contiguous_images_are_not_copied_and_others_once() -> None:
    images_B3HW = torch.rand(2, 3, 4, 5)
    _, (array,) = pack_images(ImageBatch.of(images_B3HW))
    assert array.ctypes.data == images_B3HW.data_ptr()
    _, (array,) = pack_images(ImageBatch.of(images_B3HW.to(memory_format=torch.channels_last)))
    assert array.flags.c_contiguous
    assert np.array_equal(array, images_B3HW.numpy())


# --- Features -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    compute=st.sampled_from(COMPUTE),
    wanted=st.sampled_from(RESULT_DTYPES),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**31),
)
def test_features_arrive_as_the_local_teacher_delivers_them(
    rows: int, compute: torch.dtype, wanted: str, order: torch.memory_format, seed: int
) -> None:
    spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(5, -1), dtype=wanted)  # type: ignore[arg-type]
    computed = random_features(rows, compute, seed, order)
    layout, arrays = pack_features(computed, spec)
    received = unpack_features(layout, through_the_store(arrays), "weights")
    local = dict(deliver(computed, spec).named())
    assert {name: (t.dtype, t.shape, t.stride()) for name, t in received.named()} == {
        n: (t.dtype, t.shape, t.stride()) for n, t in local.items()
    }
    assert {name: bits(tensor) for name, tensor in received.named()} == {name: bits(t) for name, t in local.items()}
    assert received.fingerprint == "weights"


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize("wanted", RESULT_DTYPES)
def test_the_wire_carries_the_narrower_dtype(compute: torch.dtype, wanted: str) -> None:
    spec = FeatureSpec(feature_map=True, dtype=wanted)  # type: ignore[arg-type]
    features = Features(feature_map=random_features(2, compute).feature_map)
    _, arrays = pack_features(features, spec)
    item = {"int8": 1, "float16": 2, "bfloat16": 2}.get(wanted, compute.itemsize)
    assert arrays[0].itemsize == min(item, compute.itemsize)
    assert [array.shape for array in arrays[1:]] == ([(2, 1, 4, 6)] if wanted == "int8" else [])


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 4, 6), (2, 1, 1), (1, 1, 1), (2, 1, 5), (2, 5, 1)], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("wanted", RESULT_DTYPES)
def test_maps_arrive_with_the_strides_that_they_had(
    shape: tuple[int, int, int], order: torch.memory_format, wanted: str
) -> None:
    rows, height, width = shape
    map_BDhw = torch.randn(rows, 8, height, width).clone(memory_format=order)
    spec = FeatureSpec(feature_map=True, dtype=wanted)  # type: ignore[arg-type]
    layout, arrays = pack_features(Features(feature_map=map_BDhw), spec)
    received = unpack_features(layout, through_the_store(arrays), None).feature_map
    local = deliver(Features(feature_map=map_BDhw), spec).feature_map
    assert received is not None
    assert local is not None
    assert received.stride() == local.stride() == map_BDhw.stride()
    assert torch.equal(received, local)
    assert received.view(rows, 8, -1).data_ptr() == received.data_ptr(), "a map is a view of its tokens"


def test_a_slice_of_a_batch_and_a_transposed_map_cross_as_contiguous_arrays() -> None:
    tokens_BND = torch.randn(4, 24, 8)
    features = Features(feature_map=tokens_BND.transpose(1, 2).unflatten(2, (4, 6))).rows(1, 3)
    layout, arrays = pack_features(features, FeatureSpec(feature_map=True))
    received = unpack_features(layout, through_the_store(arrays), None)
    assert features.feature_map is not None
    assert received.feature_map is not None
    assert torch.equal(received.feature_map, features.feature_map)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_native_features_cross_without_a_copy_at_either_end(compute: torch.dtype, order: torch.memory_format) -> None:
    computed = random_features(2, compute, order=order)
    layout, arrays = pack_features(computed, EVERYTHING)
    assert [array.ctypes.data for array in arrays] == [tensor.data_ptr() for _, tensor in computed.named()]
    stored = through_the_store(arrays)
    received = unpack_features(layout, stored, None)
    assert [tensor.data_ptr() for _, tensor in received.named()] == [array.ctypes.data for array in stored]


def test_what_crosses_holds_no_tensor() -> None:
    layout, arrays = pack_features(random_features(1, torch.bfloat16), EVERYTHING)
    assert all(isinstance(array, np.ndarray) for array in arrays)
    kinds = {type(value) for entry in layout for value in entry}
    assert kinds == {str, bool}
    expected: FeatureLayout = (("cls", "bfloat16", "bfloat16", False, False),)
    assert layout[:1] == expected


# --- Read-only memory -----------------------------------------------------------------------------------------------


def test_results_are_ordinary_tensors_that_outlive_what_they_came_in() -> None:
    layout, arrays = pack_features(random_features(2, torch.float32), EVERYTHING)
    expected = {name: tensor.clone() for name, tensor in random_features(2, torch.float32).named()}
    stored = [np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for array in arrays]
    received = unpack_features(layout, stored, None)
    del stored, arrays
    for name, tensor in received.named():
        assert torch.equal(tensor, expected[name])
        assert not tensor.is_inference()
        parameter = torch.ones_like(tensor, requires_grad=True)
        (parameter * tensor).sum().backward()
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, tensor)


def test_an_alias_is_the_same_memory() -> None:
    memory = bytes(range(24))
    array = np.frombuffer(memory, np.uint8).reshape(2, 3, 4)
    view = alias(array)
    assert view.flags.writeable
    assert view.ctypes.data == array.ctypes.data
    assert np.array_equal(view, array)
    writable = np.zeros(3)
    assert alias(writable) is writable


# --- Sizes ----------------------------------------------------------------------------------------------------------


def request(spec: FeatureSpec, rows: int, view: tuple[int, int] = (64, 96)) -> Request:
    header = RequestHeader("one", "client", spec, ("uint8", True), rows)
    return Request(Handle(0, rows, lambda _: None), header, view, [], 0, 0, rows)


INFO = TeacherInfo(hidden_size=8, grid_size=(4, 6), num_register_tokens=2, dtype="torch.bfloat16")


@pytest.mark.parametrize("wanted", RESULT_DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_size_of_a_result_is_known_before_it_is_there(wanted: str, rows: int) -> None:
    sizes = ResultSizes()
    sizes.learn_teacher(INFO)
    spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(5, -1), dtype=wanted)  # type: ignore[arg-type]
    _, arrays = pack_features(random_features(rows, torch.bfloat16), spec)
    assert sizes.expect(request(spec, rows)) == sum(array.nbytes for array in arrays)


def test_sizes_are_learned_from_answers_and_forgotten_with_the_teacher() -> None:
    sizes = ResultSizes()
    assert sizes.expect(request(EVERYTHING, 2)) == 2 * 2**20  # nothing is known: a cautious guess
    sizes.learn(request(EVERYTHING, 4), 400)
    assert sizes.expect(request(EVERYTHING, 3)) == 300
    sizes.learn_teacher(INFO)
    resampled = FeatureSpec(feature_map=True, map_size=(2, 2))
    assert sizes.expect(request(resampled, 1)) == 2 * 2 * 8 * 2
    assert sizes.expect(request(EVERYTHING, 3)) != 300


def test_where_the_input_follows_the_images_sizes_do_so_too() -> None:
    rule = preprocessing_for(IMAGENET, 64, 16).following("input", 16)
    sizes = ResultSizes()
    sizes.learn_teacher(replace(INFO, preprocessing=rule, patch_size=16))
    spec = FeatureSpec(feature_map=True)
    assert sizes.expect(request(spec, 1, (70, 96))) == 4 * 6 * 8 * 2
    sizes.learn(request(spec, 2, (640, 640)), 1000)
    assert sizes.expect(request(spec, 1, (640, 655))) == 500, "the same input"
    assert sizes.expect(request(spec, 1, (70, 96))) == 4 * 6 * 8 * 2, "another size has told nothing of this one"
    for side in range(2000):  # a loop that never repeats a size
        sizes.learn(request(spec, 1, (16 * (side + 1), 16)), side)
    assert len(sizes._row_bytes) <= 1000
