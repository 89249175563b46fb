"""CUDA graphs: what is recorded, and when, by a recorder that works anywhere; on a GPU, that results are the same."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, Features, FeatureSpec
from dinov3_ray.errors import ConfigError
from dinov3_ray.images import ImageBatch
from dinov3_ray.model.backbone import rope_of, run_backbone
from dinov3_ray.model.cuda_graphs import Constants, CudaGraphs, Forward, Shapes
from dinov3_ray.pool.replica.device_pipeline import pipeline_for
from dinov3_ray.pool.transport.wire import unpack_features

SPEC = FeatureSpec(cls=True)


class Recorded:
    """Keeps what a graph would, and computes when it is replayed."""

    scale = 1.0

    def __init__(self, pixels: Tensor, forward: Forward, constants: Constants) -> None:
        self.forward, self.constants = forward, constants
        self.replays = 0

    def replay(self, pixels: Tensor) -> Features:
        self.replays += 1
        return self.forward(pixels, self.constants).map(lambda _, tensor: tensor * self.scale)


class Pass:
    """A pass that says whether it was given constants."""

    def __init__(self) -> None:
        self.constants: list[Constants] = []

    def __call__(self, pixels: Tensor, constants: Constants) -> Features:
        self.constants.append(constants)
        return Features(cls=pixels.flatten(1)[:, :4] + 1)


def run(graphs: CudaGraphs, forward: Pass, pixels: Tensor, spec: FeatureSpec = SPEC) -> Tensor:
    cls = graphs.run(pixels, spec, forward, lambda: (torch.zeros(1),)).cls
    assert cls is not None
    assert torch.equal(cls, pixels.flatten(1)[:, :4] + 1)
    return cls


def test_a_shape_deserves_a_graph_once_and_only_so_many_do() -> None:
    shapes = Shapes(times=2, most=2)
    asked = ["a", "b", "a", "a", "c", "c", "b", "b", "c", "d", "d"]
    assert [shape for shape in asked if shapes.deserves(shape)] == ["a", "c"]


def test_shapes_that_never_come_again_are_forgotten() -> None:
    shapes = Shapes(times=2, most=2)
    assert not any(shapes.deserves(number) for number in range(10_000))
    assert len(shapes._seen) < 1000
    assert not shapes.deserves(0), "it was forgotten"
    assert shapes.deserves(0)


def test_what_comes_often_is_replayed_and_all_else_computed() -> None:
    graphs, forward = CudaGraphs(Shapes(2, 8), Recorded), Pass()
    torch.manual_seed(0)
    for _ in range(2):
        run(graphs, forward, torch.rand(2, 3, 4, 4))
    assert len(graphs) == 1
    before = len(forward.constants)
    for _ in range(3):
        run(graphs, forward, torch.rand(2, 3, 4, 4))
    run(graphs, forward, torch.rand(3, 3, 4, 4))
    run(graphs, forward, torch.rand(2, 3, 4, 4), FeatureSpec(cls=True, registers=True))
    given = [constants is not None for constants in forward.constants[before:]]
    assert given == [True, True, True, False, False]


def test_a_graph_that_computes_something_else_never_serves(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Recorded):
        def replay(self, pixels: Tensor) -> Features:
            return super().replay(pixels).map(lambda _, tensor: tensor.flip(1))

    graphs, forward = CudaGraphs(Shapes(1, 8), Wrong), Pass()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            run(graphs, forward, torch.rand(2, 3, 4, 4))
    assert len(graphs) == 0
    (message,) = caplog.messages
    assert "[2, 3, 4, 4] was not recorded" in message


def test_a_pass_that_cannot_be_recorded_runs_as_before(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = CudaGraphs(Shapes(1, 8), refuse)
    for _ in range(3):
        run(graphs, Pass(), torch.rand(2, 3, 4, 4))
    assert len(graphs) == 0
    assert len(caplog.messages) == 1


def test_a_copy_has_no_graphs() -> None:
    graphs = CudaGraphs(Shapes(1, 8), Recorded)
    run(graphs, Pass(), torch.rand(2, 3, 4, 4))
    assert (len(graphs), len(copy.deepcopy(graphs))) == (1, 0)


def test_the_option_is_checked_and_without_effect_on_a_cpu(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs must be True or False; got 'yes'"):
        DinoV3Config(tiny_checkpoint, cuda_graphs="yes")  # type: ignore[arg-type]
    images = torch.rand(1, 3, 32, 32)
    plain, graphs = (
        DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=32, cuda_graphs=on))
        for on in (False, True)
    )
    graphs.warm_up(2)
    for _ in range(CudaGraphs.TIMES + 1):
        assert torch.equal(plain.extract_feature_map(images), graphs.extract_feature_map(images))


def test_a_pass_is_the_same_with_constants_made_before(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16"))
    pixels, spec = torch.rand(1, 3, 48, 32), FeatureSpec(feature_map=True, layers=(0,))
    rope = rope_of(teacher.model, pixels)
    ours, theirs = (run_backbone(teacher.model, "vit", pixels, spec, rope=given) for given in (rope, None))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours.named(), theirs.named(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.fixture(scope="class")
    def teachers(self, tiny_checkpoint: Path) -> tuple[DinoV3Teacher, DinoV3Teacher]:
        """Without graphs, and with them."""
        plain, graphs = (
            DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=64, cuda_graphs=on), "cuda:0")
            for on in (False, True)
        )
        return plain, graphs

    def test_passes_in_flight_keep_their_own_results(self, teachers: tuple[DinoV3Teacher, DinoV3Teacher]) -> None:
        plain, graphs = teachers
        graphs.warm_up(4)
        recorded = len(graphs._graphs)
        assert recorded > 0
        pipeline = pipeline_for(graphs)
        spec = FeatureSpec(cls=True, feature_map=True)
        generator = torch.Generator().manual_seed(3)
        batches = [
            torch.randint(0, 256, (4 if number % 5 else 3, 3, 64, 64), dtype=torch.uint8, generator=generator)
            for number in range(24)
        ]
        under_way, found = [], []
        for batch in batches:
            under_way.append(pipeline.begin(ImageBatch.of(batch), len(batch), spec))
            if len(under_way) == pipeline.depth:
                found.append(under_way.pop(0).result())
        found += [one.result() for one in under_way]
        for batch, results in zip(batches, found, strict=True):
            ours = unpack_features(results.layout, results.arrays, results.fingerprint)
            theirs = plain.extract(batch, spec).to("cpu")
            for (name, a), (_, b) in zip(ours.named(), theirs.named(), strict=True):
                torch.testing.assert_close(a.float(), b.float(), atol=2e-2, rtol=2e-2, msg=name)
        assert len(graphs._graphs) == recorded + 1, "batches of 3 came often enough"

    def test_moved_weights_leave_no_graph_behind(self, teachers: tuple[DinoV3Teacher, DinoV3Teacher]) -> None:
        plain, graphs = teachers
        graphs.warm_up(2)
        assert len(graphs._graphs) > 0
        graphs.to("cpu").to("cuda:0")
        assert len(graphs._graphs) == 0
        images = torch.rand(2, 3, 64, 64)
        for _ in range(CudaGraphs.TIMES + 2):
            ours, theirs = graphs.extract_features(images), plain.extract_features(images)
            torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
