"""Results that are not finite are refused wherever a teacher computes, and never kept."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path

import pytest
import torch
from file_changes import change_weights

from dinov3_ray import DinoV3Config, DinoV3Teacher, Features, FeatureSpec, TeacherPool
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.config import ComputeDtype
from dinov3_ray.datasets import CachedTeacher
from dinov3_ray.datasets.cache_db import FeatureCache
from dinov3_ray.errors import InputError, NumericsError
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.teacher import Extractor
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.prefetch import prefetch
from dinov3_ray.watch import TeacherWatch, unwatched

CLS = FeatureSpec(cls=True)
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hot_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its activations exceed float16, and its outputs do not."""
    path = init_checkpoint("vit-test", tmp_path_factory.mktemp("hot") / "model", image_size=64)
    change_weights(path, lambda tensors: [tensors[name].fill_(6e4) for name in tensors if name.endswith("lambda1")])
    return path


class Own:
    """A teacher of the user's, with images of its own kind."""

    fingerprint = "own"

    def __init__(self, value: float) -> None:
        self.value = value

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return FakeTeacher().extract(images, spec).map(lambda _, tensor: torch.full_like(tensor, self.value))


Case = tuple[Extractor, FeatureSpec]
FLOAT16 = FeatureSpec(layers=(-1,), norm=False, dtype="float16")


@pytest.fixture(params=["computed in float16", "narrowed to float16", "own NaN", "own infinity"])
def case(request: pytest.FixtureRequest, hot_checkpoint: Path) -> Case:
    """A teacher, and what to ask it for, so that results are not finite."""
    match request.param:
        case "computed in float16":
            return DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="float16")), CLS
        case "narrowed to float16":
            return DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="bfloat16")), FLOAT16
        case "own NaN":
            return Own(float("nan")), CLS
        case _:
            return Own(float("-inf")), CLS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_is_right_in_wider_dtypes(hot_checkpoint: Path, dtype: ComputeDtype) -> None:
    features = DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype=dtype)).extract(IMAGES, CLS)
    assert features.cls is not None
    assert features.cls.isfinite().all()


@pytest.mark.parametrize("ask", ["extract", "extract_features", "extract_feature_map"])
def test_a_local_teacher_refuses_and_names_the_remedy(hot_checkpoint: Path, ask: str) -> None:
    teacher = DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="float16"))
    arguments = (IMAGES, CLS) if ask == "extract" else (IMAGES,)
    for _ in range(2):
        with pytest.raises(NumericsError, match=r"values that are not finite.*compute in bfloat16 or float32"):
            getattr(teacher, ask)(*arguments)


@pytest.mark.slow
def test_damaged_memory_shows(hot_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="bfloat16"))
    teacher.model.norm.bias.data[3] = float("nan")
    with pytest.raises(NumericsError, match="output cls has values that are not finite"):
        teacher.extract(IMAGES, CLS)


@pytest.mark.slow
def test_prefetch_refuses(case: Case) -> None:
    teacher, spec = case
    with pytest.raises(NumericsError, match="has values that are not finite"):
        next(iter(prefetch(teacher, [IMAGES] * 3, spec)))
    with pytest.raises(NumericsError, match="has values that are not finite"):
        next(iter(prefetch({"right": FakeTeacher(), "wrong": teacher}, [IMAGES] * 3, spec)))


@pytest.mark.slow
def test_a_cache_refuses_and_keeps_nothing(case: Case, tmp_path: Path) -> None:
    teacher, spec = case
    with CachedTeacher(teacher, tmp_path, 2**24) as cached:
        for _ in range(2):
            with pytest.raises(NumericsError, match="has values that are not finite"):
                cached.extract(IMAGES, spec)
        with pytest.raises(NumericsError, match="has values that are not finite"):
            next(iter(prefetch(cached, [IMAGES] * 3, spec)))
        assert cached.flush()
        assert cached.statistics().entries == 0


def test_a_cache_drops_what_it_sees_only_on_its_way_to_the_disk(tmp_path: Path) -> None:
    """As results on a GPU, which nobody has waited for."""
    right, wrong = (Features(cls=torch.full((1, 4), value)) for value in (1.0, float("nan")))
    cache = FeatureCache(tmp_path, 2**24)
    assert cache.put(b"wrong", wrong)
    assert cache.put(b"right", right)
    assert cache.flush()
    assert cache.get(b"wrong") is None
    assert cache.get(b"right") is not None
    now = cache.statistics()
    assert (now.written, now.dropped, now.entries) == (1, 1, 1)
    cache.close()


def test_what_an_older_cache_holds_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = FakeTeacher(fingerprint="own")
    with CachedTeacher(teacher, tmp_path, 2**24) as cached, monkeypatch.context() as patch:
        patch.setattr("dinov3_ray.datasets.cache_db.has_only_finite", lambda features: True)
        key = cached._keys(ImageBatch.of(IMAGES[:1]), CLS, "own")[0]
        cached._cache.put(key, Features(cls=torch.full((1, 16), float("nan")), fingerprint="own"))
        assert cached.flush()
    with CachedTeacher(teacher, tmp_path, 2**24) as cached:
        assert torch.equal(cached.extract_features(IMAGES), teacher.extract_features(IMAGES))
        found = cached.extract(IMAGES[:1], CLS).cls
        assert found is not None
        assert found.isfinite().all()
        assert cached.statistics().torn == 1


def test_a_pool_refuses_results_that_overflow_what_was_asked_for() -> None:
    with TeacherPool.start(functools.partial(Own, 1e5), name="narrow", replicas=2, local_mode=True) as pool:
        remote = pool.teacher()
        for dtype in ("native", "float32", "bfloat16", "int8"):
            found = remote.extract(IMAGES, FeatureSpec(cls=True, dtype=dtype)).cls  # type: ignore[arg-type]
            assert found is not None
            assert found.isfinite().all()
        with pytest.raises(NumericsError, match=r"has values that are not finite.*FeatureSpec.dtype be one"):
            remote.extract(IMAGES, FeatureSpec(cls=True, dtype="float16"))
        assert remote.extract(IMAGES, CLS).cls is not None  # it goes on serving


def test_images_that_are_not_finite_are_the_callers_fault(hot_checkpoint: Path, tmp_path: Path) -> None:
    images = IMAGES.clone()
    images[1, 2, 3, 4] = float("nan")
    teacher = DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="float32"))
    with CachedTeacher(teacher, tmp_path, 2**24) as cached:
        for one in (teacher, cached, FakeTeacher()):
            with pytest.raises(InputError, match="images must be finite"):
                one.extract(images, CLS)
    with pytest.raises(InputError, match="images must be finite"):
        next(iter(prefetch(teacher, [images], CLS)))


def test_large_values_are_not_taken_for_infinite_ones() -> None:
    watch = TeacherWatch()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        watch.results(Features(cls=torch.full((2, 4096), torch.finfo(dtype).max, dtype=dtype)), IMAGES)


def test_a_caller_that_looks_itself_is_left_alone() -> None:
    watch, wrong = pickle.loads(pickle.dumps(TeacherWatch())), Features(cls=torch.tensor([[float("nan")]]))
    with unwatched():
        watch.results(wrong, IMAGES)
    with pytest.raises(NumericsError):
        watch.results(wrong, IMAGES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_it_is_said_in_a_later_call_and_nobody_waits(self, hot_checkpoint: Path) -> None:
        teacher = DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="float16"), "cuda:0")
        images = IMAGES.cuda()
        teacher.extract(images[:1], CLS)  # memory is had, kernels are loaded, and the one look at images has been
        torch.cuda.synchronize()
        with pytest.raises(NumericsError, match="output cls of an earlier batch has values that are not finite"):
            teacher.extract(images, CLS)
        teacher = DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="bfloat16"), "cuda:0")
        teacher.extract(images, CLS)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                teacher.extract(images, CLS)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_cache_keeps_nothing(self, hot_checkpoint: Path, tmp_path: Path) -> None:
        teacher = DinoV3Teacher(DinoV3Config(hot_checkpoint, dtype="float16"), "cuda:0")
        with CachedTeacher(teacher, tmp_path, 2**24) as cached:
            cached.extract(IMAGES, CLS)
            assert cached.flush()
            with pytest.raises(NumericsError, match="of an earlier batch"):
                cached.extract(IMAGES, CLS)
            assert cached.flush()
            assert cached.statistics().entries == 0
