"""Teachers of transformers' models in real pools, beside a DINOv3, and in an extraction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from picturefiles import write_pictures
from transformers_models import KINDS, write_transformers

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.datasets import FeatureStore, StoredTeacher, extract
from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.errors import SpecError
from dinov3_ray.model import TransformersTeacher
from dinov3_ray.pool.poolfile import PoolFile
from dinov3_ray.training.prefetch import prefetch

SPECS = {
    "dinov3": FeatureSpec(cls=True, feature_map=True),
    "dinov2": FeatureSpec(cls=True, registers=True, feature_map=True, layers=(0, -1)),
    "siglip2": FeatureSpec(feature_map=True, layers=(1,)),
}


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers(tmp_path_factory.mktemp("models") / "siglip2", *KINDS["siglip2"])


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers(tmp_path_factory.mktemp("models") / "dinov2", *KINDS["dinov2_with_registers"])


def test_three_pools_give_what_their_teachers_give_here(
    ray_cluster: str, tiny_checkpoint: Path, dinov2: Path, siglip2: Path
) -> None:
    declared = PoolFile.of({"teacher": {"root": str(dinov2), "dtype": "float32"}}, folder=Path())
    given = {
        "dinov3": DinoV3Config(tiny_checkpoint, dtype="float32"),
        "dinov2": declared.spec.given,
        "siglip2": TransformersTeacher.factory(siglip2, dtype="float32"),
    }
    here = {
        "dinov3": DinoV3Teacher(given["dinov3"]),
        "dinov2": TransformersTeacher(dinov2, dtype="float32"),
        "siglip2": TransformersTeacher(siglip2, dtype="float32"),
    }
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 256, (3, 3, 70, 90), dtype=torch.uint8, generator=generator) for _ in range(4)]
    pools = [TeacherPool.start(teacher, name=name, replicas=1) for name, teacher in given.items()]
    try:
        remotes = {pool.name: pool.teacher() for pool in pools}
        for batch, targets in prefetch(remotes, batches, SPECS):
            for name, teacher in here.items():
                expected = dict(teacher.extract(batch, SPECS[name]).named())
                assert expected.keys() == dict(targets[name].named()).keys()
                assert all(torch.equal(tensor, expected[key]) for key, tensor in targets[name].named())
                assert targets[name].fingerprint == teacher.fingerprint
        assert remotes["dinov2"].preprocessing == here["dinov2"].preprocessing
        with pytest.raises(SpecError, match=r"FeatureSpec\.cls: this pool's teacher has no CLS token"):
            remotes["siglip2"].extract_features(batches[0])
    finally:
        for pool in pools:
            pool.shutdown()


def test_an_extraction_stores_what_the_teacher_gives_here(ray_cluster: str, siglip2: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 6)
    config = TransformersTeacher.factory(siglip2, dtype="float32")
    spec = FeatureSpec(feature_map=True, dtype="float32")
    with pytest.raises(SpecError, match=r"FeatureSpec\.cls must be False for this model: it has no CLS token"):
        extract(tmp_path / "images", tmp_path / "refused", config, progress=False)
    extract(tmp_path / "images", tmp_path / "out", config, spec, batch_size=1, progress=False)
    store, teacher = FeatureStore(tmp_path / "out"), TransformersTeacher(siglip2, dtype="float32")
    assert store.manifest["fingerprint"] == teacher.fingerprint
    assert store.manifest["preprocessing"]["rescales_first"] is False
    decode = Decoder()
    assert (len(store), store.manifest["errors"]) == (5, 1)  # one of the pictures is damaged
    for id_ in store.ids:
        image = torch.from_numpy(decode.read((tmp_path / "images" / id_).read_bytes(), id_))
        expected = teacher.extract(image, spec).feature_map
        assert torch.equal(store[id_].feature_map, expected)  # type: ignore[arg-type]
    stored = StoredTeacher(store)
    assert stored.fingerprint == teacher.fingerprint
    assert torch.equal(stored.extract(list(store.ids)[:1], spec).feature_map, store[store.ids[0]].feature_map)  # type: ignore[arg-type]
