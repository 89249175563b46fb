"""Each image's target from the teacher that was named for it, batches in the loader's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sample_images import images_of
from torch import Tensor

from dinov3_ray import Features, FeatureSpec, TeacherPool
from dinov3_ray.errors import ConfigError, InputError, PoolError, SpecError
from dinov3_ray.features import in_channels_last
from dinov3_ray.images import Images
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.prefetch import prefetch
from dinov3_ray.training.prefetch.routes import join_targets, split_images

SPEC = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(1,))
NAMES = ("a", "b", "c")


class Counting(FakeTeacher):
    """Notes how many images it gets at a time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sizes: list[int] = []

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        self.sizes.append(len(images))
        return super().extract(images, spec)


def by_row(targets: Features, row: int) -> Features:
    return targets.rows(row, row + 1)


def assert_same(found: Features, expected: Features) -> None:
    for (name, ours), (other, theirs) in zip(found.named(), expected.named(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name


def batches(count: int = 12, rows: int = 5) -> list[dict[str, Any]]:
    choose = np.random.default_rng(0).choice
    return [
        {"img": images_of(number, rows), "teacher": [str(name) for name in choose(NAMES, rows)]}
        for number in range(count)
    ]


@pytest.mark.parametrize("form", ["list", "tuple", "numpy", "places", "tensor"])
@pytest.mark.parametrize("depth", [1, 4, "auto"])
def test_each_image_has_the_target_of_its_own_teacher(local_pool: TeacherPool, form: str, depth: Any) -> None:
    others = {"b": Counting(fingerprint="b"), "c": Counting(fingerprint="c")}
    teachers = {"a": local_pool.teacher(), **others}
    expected_by = {"a": FakeTeacher(), "b": FakeTeacher(fingerprint="b"), "c": FakeTeacher(fingerprint="c")}
    loader = batches()
    convert: Callable[[list[str]], Any] = {
        "list": list,
        "tuple": tuple,
        "numpy": np.array,
        "places": lambda names: [NAMES.index(name) for name in names],
        "tensor": lambda names: torch.tensor([NAMES.index(name) for name in names]),
    }[form]

    def route(batch: dict[str, Any]) -> Any:
        return convert(batch["teacher"])

    seen = list(prefetch(teachers, loader, SPEC, route=route, depth=depth))
    assert [batch for batch, _ in seen] == loader
    for batch, targets in seen:
        assert len(targets) == 5
        for row, name in enumerate(batch["teacher"]):
            assert_same(by_row(targets, row), expected_by[name].extract(batch["img"][row : row + 1], SPEC))
    for name, teacher in others.items():
        asked = [batch["teacher"].count(name) for batch in loader]
        assert teacher.sizes == [number for number in asked if number], "it computes its own images and no others"


def test_images_of_several_sizes_and_one_teacher_for_all() -> None:
    images = [images_of(side, 1, (side, side))[0] for side in (32, 48, 32, 64)]
    teachers = {name: FakeTeacher(fingerprint=name, image_size=(32, 32)) for name in NAMES}
    whole: list[Images] = []
    original = teachers["c"].extract
    teachers["c"].extract = lambda given, spec: whole.append(given) or original(given, spec)  # type: ignore[method-assign,func-returns-value]
    routes = iter([["b", "a", "b", "a"], ["c"] * 4])
    stream = prefetch(teachers, [images, images], FeatureSpec(cls=True), route=lambda _: next(routes), depth=1)
    (_, mixed), (_, alone) = stream
    for row, name in enumerate("baba"):
        expected = FakeTeacher(fingerprint=name, image_size=(32, 32)).extract([images[row]], FeatureSpec(cls=True))
        assert_same(by_row(mixed, row), expected)
    assert (mixed.fingerprint, alone.fingerprint) == (None, "c")
    assert len(whole) == 1
    assert isinstance(whole[0], list), "the images of one teacher alone are handed on in the form that they have"


@pytest.mark.parametrize("channels_last", [True, False])
def test_maps_keep_their_memory_order(channels_last: bool) -> None:
    def features(rows: int, value: float) -> Features:
        maps = torch.full((rows, 6, 3, 4), value)
        return Features(feature_map=maps.contiguous(memory_format=torch.channels_last) if channels_last else maps)

    joined = join_targets({"a": features(2, 1.0), "b": features(3, 2.0)}, ["b", "a", "b", "b", "a"])
    assert joined.feature_map is not None
    assert joined.feature_map[:, 0, 0, 0].tolist() == [2, 1, 2, 2, 1]
    assert in_channels_last(joined.feature_map) is channels_last
    assert joined.feature_map.is_contiguous() is not channels_last


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (["a", "b"], "one teacher per image; got 2 names for 4 images"),
        (["a"] * 5, "one teacher per image; got 5 names for 4 images"),
        (["a", "a", "x", "a"], r"\(a, b; or 0 to 1, their places\); got 'x' for image 2"),
        ([0, 1, 2, 1], "got 2 for image 2"),
        ([0, -1, 0, 1], "got -1 for image 1"),
        ([True, False, True, False], "got True for image 0"),
        ("abab", "a list of teachers' names.*got"),
        (torch.zeros(4), "got 0.0 for image 0"),
        (torch.tensor(1), "a list of teachers' names.*got"),
        (None, "a list of teachers' names.*got"),
    ],
)
def test_a_wrong_route_is_an_error_that_names_it(route: Any, said: str) -> None:
    teachers = {"a": FakeTeacher(), "b": FakeTeacher()}
    with pytest.raises(ConfigError, match=said):
        list(prefetch(teachers, [images_of(0, 4)], SPEC, route=lambda _: route))


def test_wrong_options_are_errors_at_once() -> None:
    loader, teachers = [images_of(0, 4)], {"a": FakeTeacher(), "b": FakeTeacher()}

    def route(_: Tensor) -> Sequence[str]:
        return ["a"] * 4

    with pytest.raises(ConfigError, match=r"route must be a function of a batch.*got 'a'"):
        prefetch(teachers, loader, SPEC, route="a")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="route needs teachers by name"):
        prefetch(FakeTeacher(), loader, SPEC, route=route)  # type: ignore[call-overload]
    specs = {"a": FeatureSpec(cls=True), "b": FeatureSpec(feature_map=True)}
    with pytest.raises(SpecError, match="the same outputs"):
        prefetch(teachers, loader, specs, route=route)


@pytest.mark.parametrize(
    ("other", "spec", "said"),
    [
        (FakeTeacher(hidden_size=8), SPEC, r"'a' gives cls \[\d+\].*'b' gives cls \[8\]"),
        (
            FakeTeacher(),
            FeatureSpec(cls=True, feature_map=True, registers=True, layers=(1,), map_size=(2, 2)),
            "map_size",
        ),
        (
            FakeTeacher(),
            FeatureSpec(cls=True, feature_map=True, registers=True, layers=(1,), dtype="float16"),
            "float16",
        ),
    ],
)
def test_targets_that_no_tensor_holds_are_an_error(other: FakeTeacher, spec: FeatureSpec, said: str) -> None:
    stream = prefetch(
        {"a": FakeTeacher(), "b": other}, [images_of(0, 2)], {"a": SPEC, "b": spec}, route=lambda _: ["a", "b"]
    )
    with pytest.raises(SpecError, match=said):
        list(stream)


def test_bad_images_are_told_when_their_batch_is_due() -> None:
    loader = [images_of(0, 2), torch.zeros(2, 4, 32, 32), images_of(0, 2)]
    stream = iter(prefetch({"a": FakeTeacher(), "b": FakeTeacher()}, loader, SPEC, route=lambda _: ["a", "b"], depth=3))
    assert next(stream)[0] is loader[0]
    with pytest.raises(InputError, match="images must have 3 channels"):
        next(stream)


def test_each_teachers_reload_is_told_by_its_name() -> None:
    changing = FakeTeacher(fingerprint="one")
    routes = iter([["a", "b"], ["b", "b"], ["a", "a"]])

    def route(_: Tensor) -> Sequence[str]:
        names = next(routes)
        if names == ["a", "a"]:
            changing.fingerprint = "two"
        return names

    teachers = {"a": changing, "b": FakeTeacher(fingerprint="other")}
    loader = [images_of(0, 2)] * 3
    stream = iter(prefetch(teachers, loader, SPEC, route=route, depth=1, on_reload="raise"))
    assert next(stream)[1].fingerprint is None
    assert next(stream)[1].fingerprint == "other"
    with pytest.raises(PoolError, match="teacher 'a' changed from one to two"):
        next(stream)


def test_a_batch_whose_route_changes_in_place_is_not_confused() -> None:
    """A loader may fill the same list of names again for its next batch."""
    names: list[str] = []
    images = images_of(0, 2)

    def loader() -> Any:
        for number in range(6):
            names[:] = ["a", "b"] if number % 2 else ["b", "a"]
            yield {"img": images.clone(), "teacher": names}

    teachers = {name: FakeTeacher(fingerprint=name) for name in ("a", "b")}
    for number, (_, targets) in enumerate(
        prefetch(teachers, loader(), FeatureSpec(cls=True), route=lambda batch: batch["teacher"], depth=3)
    ):
        for row, name in enumerate("ab" if number % 2 else "ba"):
            expected = FakeTeacher(fingerprint=name).extract(images[row : row + 1], FeatureSpec(cls=True))
            assert_same(by_row(targets, row), expected)


def test_images_are_split_in_order() -> None:
    images = images_of(0, 5)
    parts = split_images(images, ["b", "a", "b", "b", "a"])
    assert list(parts) == ["b", "a"]
    assert torch.equal(parts["a"], images[[1, 4]])  # type: ignore[arg-type]
    assert torch.equal(parts["b"], images[[0, 2, 3]])  # type: ignore[arg-type]
