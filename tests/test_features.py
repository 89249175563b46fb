"""What is asked for, what comes back, how it is narrowed: features.py, feature_spec.py and errors.py."""

from __future__ import annotations

import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_features import random_features

from dinov3_ray import errors
from dinov3_ray.errors import DinoV3Error, InputError, SpecError
from dinov3_ray.feature_spec import RESULT_DTYPES
from dinov3_ray.features import Features, FeatureSpec, channel_dim, decode, deliver, encode, resample_map
from dinov3_ray.images import ImageBatch

TREE = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, DinoV3Error)]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_with_its_message(kind: type[DinoV3Error]) -> None:
    message = "replicas must be >= 1; got 0"
    error = pickle.loads(pickle.dumps(kind(message)))
    assert type(error) is kind
    assert str(error) == message
    assert error.args == (message,)


def test_the_drawn_tree_names_every_error_and_its_standard_base() -> None:
    drawing = inspect.getdoc(errors) or ""
    for kind in TREE:
        line = next((line for line in drawing.splitlines() if f" {kind.__name__} " in f" {line} "), None)
        assert line is not None, f"{kind.__name__} is missing from the tree"
        for base in kind.__bases__:
            assert issubclass(base, DinoV3Error) or f"({base.__name__})" in line or base is Exception


# --- FeatureSpec ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cls": 1}, "FeatureSpec.cls must be True or False; got 1"),
        ({"norm": None}, "FeatureSpec.norm must be True or False; got None"),
        ({"layers": 3}, "FeatureSpec.layers must be a sequence of integers; got 3"),
        ({"layers": "12"}, "FeatureSpec.layers must be a sequence of integers; got '12'"),
        ({"layers": (1, 2.0)}, "FeatureSpec.layers must hold integers; got 2.0"),
        ({"layers": (1, True)}, "FeatureSpec.layers must hold integers; got True"),
        ({"layers": (1, 1)}, "FeatureSpec.layers must name each block once"),
        ({"map_size": (4, 4, 4)}, "FeatureSpec.map_size must be (h, w)"),
        ({"map_size": 0}, "FeatureSpec.map_size must be (h, w)"),
        ({"map_size": True}, "FeatureSpec.map_size must hold integers; got True"),
        ({"dtype": "fp16"}, "FeatureSpec.dtype must be one of native, float32"),
        ({"dtype": torch.float16}, "FeatureSpec.dtype must be one of native, float32"),
    ],
)
def test_a_malformed_spec_is_refused_by_field_rule_and_value(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        FeatureSpec(**options)  # type: ignore[arg-type]
    assert complaint in str(caught.value)


def test_a_spec_is_a_value() -> None:
    spec = FeatureSpec(cls=True, layers=[2, -1], map_size=7, dtype="int8")  # type: ignore[arg-type]
    assert spec == FeatureSpec(cls=True, layers=(2, -1), map_size=(7, 7), dtype="int8")
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    assert spec.native() == FeatureSpec(cls=True, layers=(2, -1), map_size=(7, 7))
    native = spec.native()
    assert native.native() is native


def test_blocks_count_from_either_end_and_stay_in_range() -> None:
    assert FeatureSpec(layers=(4, -1, 0, -12)[:3]).blocks(12) == (4, 11, 0)
    for layers, complaint in [((12,), "-12..11 for this model; got 12"), ((-13,), "got -13"), ((11, -1), "twice")]:
        with pytest.raises(SpecError, match=complaint):
            FeatureSpec(layers=layers).blocks(12)


def test_a_spec_that_asks_for_nothing_says_so() -> None:
    with pytest.raises(SpecError, match="at least one of cls, feature_map, registers or layers"):
        FeatureSpec(norm=False).require_outputs()
    FeatureSpec(layers=(0,)).require_outputs()


# --- Features -------------------------------------------------------------------------------------------------------


def test_features_cut_by_rows_rejoin_to_the_same_bits_and_order() -> None:
    whole = random_features(5)
    rejoined = Features.cat([whole.rows(0, 2), whole.rows(2, 3), whole.rows(3, 5)])
    assert [name for name, _ in rejoined.named()] == ["cls", "feature_map", "registers", "layers.5", "layers.-1"]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.named(), rejoined.named(), strict=True))
    assert len(rejoined) == 5
    assert rejoined.fingerprint == "weights"
    assert rejoined.nbytes == sum(tensor.nbytes for _, tensor in whole.named())


def test_features_of_two_fingerprints_lose_theirs() -> None:
    part = random_features(1)
    other = Features.from_named(dict(part.named()), "other weights")
    assert Features.cat([part, other]).fingerprint is None
    assert Features.cat([part]) is part


def test_features_survive_pickling_and_say_what_they_hold() -> None:
    features = pickle.loads(pickle.dumps(random_features(2, torch.bfloat16)))
    assert repr(features).startswith("Features(cls=bfloat16[2, 8], feature_map=bfloat16[2, 8, 4, 6]")
    assert list(features.layers) == [5, -1]
    assert len(Features()) == 0


@pytest.mark.parametrize("name", ["cls", "feature_map", "registers", "layers.5"])
def test_channel_dim_is_where_d_is(name: str) -> None:
    assert dict(random_features().named())[name].shape[channel_dim(name)] == 8


# --- resampling -----------------------------------------------------------------------------------------------------


def test_maps_shrink_by_exact_area_means() -> None:
    map_BDhw = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    by_hand = map_BDhw.reshape(2, 3, 4, 2, 4, 3).mean(dim=(3, 5))
    torch.testing.assert_close(resample_map(map_BDhw, (4, 4)), by_hand)


def test_maps_grow_bilinearly_and_each_axis_goes_its_own_way() -> None:
    map_BDhw = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    grown = F.interpolate(map_BDhw, size=(9, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample_map(map_BDhw, (9, 8)), grown)
    both = F.interpolate(map_BDhw.reshape(1, 2, 4, 4, 2).mean(-1), size=(9, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample_map(map_BDhw, (9, 4)), both)
    assert resample_map(map_BDhw, (4, 8)) is map_BDhw


def test_bfloat16_maps_are_averaged_in_float32() -> None:
    # 1 + 1/128 is the least bfloat16 above 1: a running bfloat16 sum of 256 of them would be off by far more.
    map_BDhw = torch.full((1, 1, 16, 16), 1 + 1 / 128, dtype=torch.bfloat16)
    pooled = resample_map(map_BDhw, (1, 1))
    assert pooled.dtype == torch.bfloat16
    assert pooled.item() == 1 + 1 / 128


# --- precision ------------------------------------------------------------------------------------------------------

RANK = {torch.int8: 1, torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", RESULT_DTYPES)
def test_the_wire_never_carries_more_than_the_compute_dtype(dtype: str, compute: torch.dtype) -> None:
    tensor = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(1)).to(compute)
    encoded = encode(tensor, dtype, channel_dim=1)  # type: ignore[arg-type]
    assert RANK[encoded.values.dtype] <= RANK[compute]
    wanted = compute if dtype in ("native", "int8") else getattr(torch, dtype)
    decoded = decode(encoded)
    assert decoded.dtype == wanted
    if dtype != "int8":
        assert torch.equal(decoded, tensor.to(wanted))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-40, 38), rows=st.integers(1, 4), width=st.integers(1, 33))
def test_int8_errs_by_at_most_a_254th_of_each_tokens_largest(seed: int, exponent: float, rows: int, width: int) -> None:
    tokens = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)).sub_(0.5).mul_(10.0**exponent)
    tokens[0] = 0  # a token of nothing but zeros has no scale of its own
    decoded = decode(encode(tokens, "int8", channel_dim=-1))
    bound = tokens.abs().amax(-1, keepdim=True) / 254
    assert torch.all((decoded - tokens).abs() <= bound * (1 + 1e-5) + torch.finfo(torch.float32).tiny)
    assert torch.all(decoded[0] == 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_int8_does_not_hide_values_that_are_not_finite(bad: float) -> None:
    tokens = torch.ones(2, 4)
    tokens[1, 2] = bad
    decoded = decode(encode(tokens, "int8", channel_dim=-1))
    assert torch.isfinite(decoded).all(-1).tolist() == [True, False]


def test_a_local_result_has_the_roundings_of_the_wire() -> None:
    features = random_features(2, torch.bfloat16)
    spec = FeatureSpec(cls=True, dtype="int8")
    delivered = dict(deliver(features, spec).named())
    for name, tensor in features.named():
        assert torch.equal(delivered[name], decode(encode(tensor, "int8", channel_dim=channel_dim(name))))
    assert deliver(features, FeatureSpec(cls=True)) is features


# --- images ---------------------------------------------------------------------------------------------------------

PLAIN = np.zeros((3, 20, 30), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (np.zeros((20, 30), np.uint8), r"got shape \[20, 30\]"),
        (np.zeros((2, 20, 30), np.uint8), r"3 channels \(RGB\) in dimension -3; got shape \[2, 20, 30\]"),
        (np.zeros((20, 30, 3), np.uint8), "channels last"),
        (np.zeros((0, 3, 20, 30), np.uint8), "at least one image; got an empty batch"),
        ([], "at least one image; got an empty sequence"),
        (
            np.zeros((3, 20, 15), np.uint8),
            r"at least 16 pixels high and wide \(one patch of the .*\); got shape \[3, 20, 15\]",
        ),
        (PLAIN.astype(np.int64), "got torch.int64"),
        (PLAIN.astype(bool), "got torch.bool"),
        (PLAIN.astype(np.complex64), "got NumPy dtype complex64"),
        (np.array(["a", "b"]), "got NumPy dtype <U1"),
        ([PLAIN, PLAIN.astype(np.float32)], r"images\[0\] is torch.uint8, images\[1\] is torch.float32"),
        ([PLAIN, PLAIN[None]], r"images\[1\] must be \[3,H,W\]"),
        ([PLAIN, PLAIN[:, :9]], r"images\[1\] must be at least 16 pixels"),
        ([[1, 2]], r"images\[0\] must be a torch tensor or a NumPy array; got list"),
        ("photo.jpg", "got str"),
        (None, "got NoneType"),
    ],
)
def test_bad_images_are_refused_by_rule_and_value(given: object, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ImageBatch.of(given, min_side=16)  # type: ignore[arg-type]


def test_images_are_taken_without_a_copy_wherever_torch_can_share_them() -> None:
    array = np.zeros((2, 3, 20, 30), dtype=np.uint8)
    batch = ImageBatch.of(array)
    array[1] = 7
    assert batch.stacked is not None
    assert int(batch.rows(1, 2).stacked.min()) == 7  # type: ignore[union-attr]
    assert ImageBatch.of(batch) is batch
    assert len(ImageBatch.of(PLAIN)) == 1
    assert batch.nbytes == array.nbytes


@pytest.mark.parametrize(
    "awkward",
    [
        pytest.param(lambda array: array[:, ::-1, ::-1], id="negative strides"),
        pytest.param(lambda array: array.astype(">f4"), id="foreign byte order"),
        pytest.param(lambda array: np.broadcast_to(array[:1], array.shape), id="read-only"),
    ],
)
def test_arrays_that_torch_cannot_share_are_copied(awkward: object) -> None:
    array = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5) % 9
    given = awkward(array)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (image,) = ImageBatch.of(given)
    np.testing.assert_array_equal(image.numpy(), given)


def test_a_sequence_keeps_its_sizes_and_order() -> None:
    batch = ImageBatch.of([torch.full((3, 20 + i, 30), i, dtype=torch.uint8) for i in range(4)])
    assert [int(image[0, 0, 0]) for image in batch.rows(1, 3)] == [1, 2]
    assert [image.shape[1] for image in batch] == [20, 21, 22, 23]
    assert (len(batch), batch.dtype) == (4, torch.uint8)
