"""FeatureTap on real modules: what it takes, what it leaves behind, and what wrappers and copies do to it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.training.taps import FeatureTap, layer_names


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2))
        self.neck = nn.Conv2d(6, 8, 1)
        self.head = nn.ModuleDict({"box": nn.Conv2d(8, 5, 1), "class": nn.Conv2d(8, 2, 1)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.neck(self.backbone(images))
        return {name: layer(features) for name, layer in self.head.items()}


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return Student()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 17, 21, generator=torch.Generator().manual_seed(1))


def hooks(module: nn.Module) -> list[list]:
    return [list(each._forward_hooks.items()) for each in module.modules()]


def test_takes_the_very_output_and_restores_the_module(student: Student, images: Tensor) -> None:
    student.neck.register_forward_hook(lambda _module, _args, output: output * 1.0)  # a hook of somebody else stays
    before, expected = hooks(student), student(images)
    with FeatureTap(student, "neck") as tap:
        predictions = student(images)
        assert repr(tap) == "FeatureTap(neck; attached, holds neck)"
        assert torch.equal(student.head["box"](tap["neck"]), predictions["box"])
    assert hooks(student) == before
    assert torch.equal(student(images)["box"], expected["box"])
    # Still readable here, and part of the student's graph.
    tap.take().sum().backward()
    assert student.backbone[0].weight.grad is not None
    assert student.head["box"].weight.grad is None
    assert repr(tap) == "FeatureTap(neck; not attached, holds nothing)"


def test_several_layers(student: Student, images: Tensor) -> None:
    with FeatureTap(student, ["head.box", "backbone.1"]) as tap:
        student(images)
        with pytest.raises(ConfigError, match="take_all"):
            tap.take()
        outputs = tap.take_all()
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "head.box": (2, 5, 3, 4),
        "backbone.1": (2, 4, 8, 10),
    }
    assert list(outputs) == list(tap.names) == ["head.box", "backbone.1"]


def test_an_output_cannot_be_taken_for_the_next_step_s(student: Student, images: Tensor) -> None:
    with FeatureTap(student, "neck") as tap:
        student(images)
        first = tap.take()
        with pytest.raises(InputError, match="'neck' must have run"):
            tap.take()
        student(images + 1)
        assert not torch.equal(tap.take(), first)


def test_restores_when_the_body_or_the_layer_raises(student: Student, images: Tensor) -> None:
    before = hooks(student)
    tap = FeatureTap(student, ["neck", "head.box"])
    with pytest.raises(ZeroDivisionError), tap:
        len(student(images)) / 0
    assert hooks(student) == before
    with pytest.raises(InputError, match="must have run"):
        tap["neck"]
    with pytest.raises(RuntimeError, match="channels"), tap:
        student(images[:, :2])
    assert hooks(student) == before
    with tap:  # and it can be used again
        student(images)
    assert set(tap.take_all()) == {"neck", "head.box"}


@pytest.mark.slow
def test_nothing_keeps_the_graph_alive_after_clear(student: Student, images: Tensor) -> None:
    with FeatureTap(student, ["backbone", "neck"]) as tap:
        student(images)
        output = weakref.ref(tap["neck"])
        gc.collect()
        assert output() is not None
        tap.clear()
        gc.collect()
        assert output() is None
        student(images)
        output = weakref.ref(tap["neck"])
        student(images)  # the next call replaces it
        gc.collect()
        assert output() is None


def test_attach_and_close_without_a_block(student: Student, images: Tensor) -> None:
    before = hooks(student)
    tap = FeatureTap(student, "neck").attach()
    with pytest.raises(ConfigError, match="attached once"):
        tap.attach()
    student(images)
    tap.close()
    tap.close()
    assert hooks(student) == before
    assert tap.take().shape == (2, 8, 3, 4)


@pytest.mark.parametrize(
    ("name", "near"),
    [("nekc", "neck"), ("head.boxes", "head.box"), ("backbone.3", "backbone.2"), ("", "backbone"), ("zzz", "backbone")],
)
def test_unknown_names_list_near_ones(student: Student, name: str, near: str) -> None:
    before = hooks(student)
    with pytest.raises(ConfigError, match=rf"has no '{name}'. Near it: .*\b{near}\b"):
        FeatureTap(student, ["neck", name])
    assert hooks(student) == before
    for empty in ([], ["neck", "neck"]):
        with pytest.raises(ConfigError, match="at least one layer, each once"):
            FeatureTap(student, empty)
    with FeatureTap(student, "neck") as tap, pytest.raises(ConfigError, match="one of the tap's"):
        tap["head"]


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x + 1, [x * 2, x * 3]


def test_select_from_tuples(images: Tensor) -> None:
    model = nn.Sequential(Split())
    for select, factor in ((lambda output: output[1][1], 3), (lambda output: output[1][0], 2)):
        with FeatureTap(model, "0", select=select) as tap:
            model(images)
            assert torch.equal(tap.take(), images * factor)
    with FeatureTap(model, "0", select=0) as tap:
        model(images)
        assert torch.equal(tap.take(), images + 1)
    for select, match in (
        (None, r"tuple of 2: Tensor\[2, .*\], list"),
        (1, r"list of 2: Tensor\[.*\], Tensor"),
        (5, "select=5 must be found"),
        ("x", "select='x' must be found"),
    ):
        with pytest.raises(InputError, match=match), FeatureTap(model, "0", select=select):
            model(images)
    assert hooks(model) == hooks(nn.Sequential(Split()))


def test_select_from_a_real_model_s_outputs(images: Tensor) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = nn.ModuleDict({"net": ResNetModel(config).eval()})
    names = ["net", "net.encoder", "net.encoder.stages.0"]
    with FeatureTap(model, names, select={"net": "pooler_output", "net.encoder": 0}) as tap:
        expected = model["net"](images)
        outputs = tap.take_all()
    assert outputs["net"] is expected.pooler_output
    assert torch.equal(outputs["net.encoder"], expected.last_hidden_state)
    assert outputs["net.encoder.stages.0"].shape[1] == 8
    with pytest.raises(InputError, match="with 'last_hidden_state', 'pooler_output'"), FeatureTap(model, "net"):
        model["net"](images)
    with pytest.raises(ConfigError, match="select must name layers of the tap"):
        FeatureTap(model, "net", select={"encoder": 0})


def test_copies_and_pickles_of_a_tapped_model_have_no_tap(student: Student, images: Tensor) -> None:
    with FeatureTap(student, "neck") as tap:
        expected = student(images)
        mine = tap["neck"]
        for copied in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):  # an EMA, a checkpoint
            assert torch.equal(copied(images)["box"], expected["box"])
            assert tap["neck"] is mine


def test_names_go_through_ddp(student: Student, images: Tensor, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        assert layer_names(wrapped) == layer_names(student)
        with FeatureTap(wrapped, "neck") as tap:
            predictions = wrapped(images)
            (predictions["box"].sum() + predictions["class"].sum() + tap.take().square().sum()).backward()
        assert student.neck.weight.grad is not None
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_names_go_through_compile(student: Student, images: Tensor) -> None:
    # The eager backend traces as the others do, without their compilers. One that was called before it was tapped runs
    # a graph that knows no hook; that is said, and nothing wrong is given.
    expected = student.neck(student.backbone(images))
    torch.compiler.reset()
    compiled = torch.compile(student, backend="eager")
    assert layer_names(compiled) == layer_names(student)
    with FeatureTap(compiled, "neck") as tap:
        for _ in range(2):
            compiled(images)
            torch.testing.assert_close(tap.take(), expected)
    compiled(images)
    with pytest.raises(InputError, match="before the first call of a compiled model"):
        tap.take()

    torch.compiler.reset()
    late = torch.compile(student, backend="eager")
    late(images)
    with FeatureTap(late, "neck") as tap:
        late(images)
        with pytest.raises(InputError, match="before the first call of a compiled model"):
            tap.take()


def test_a_compiled_layer_is_tapped_at_its_outside(student: Student, images: Tensor) -> None:
    expected = student.neck(student.backbone(images))
    torch.compiler.reset()
    student.neck = torch.compile(student.neck, backend="eager")
    student(images)
    assert "neck" in layer_names(student)
    assert not any("_orig_mod" in name for name in layer_names(student))
    with FeatureTap(student, "neck") as tap:
        student(images)
        torch.testing.assert_close(tap.take(), expected)
