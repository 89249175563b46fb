"""A teacher stays as it was loaded: whatever is called on the student that holds it, on itself, and on its model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.datasets import CachedTeacher
from dinov3_ray.errors import CheckpointError, ConfigError, FrozenError

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(2, 0, -2))
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Student(nn.Module):
    def __init__(self, teacher: DinoV3Teacher) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 128, 16, stride=16)
        self.teacher = teacher

    def forward(self, images: Tensor) -> Tensor:
        return F.mse_loss(self.head(images), self.teacher.extract_feature_map(images))


@pytest.fixture
def teacher(tiny_checkpoint: Path) -> DinoV3Teacher:
    return DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64))


@pytest.fixture
def student(teacher: DinoV3Teacher) -> Student:
    return Student(teacher)


def bits(teacher: DinoV3Teacher) -> list[Tensor]:
    return [tensor for _, tensor in teacher.extract(IMAGES, EVERYTHING).named()]


def train(student: Student) -> None:
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0, weight_decay=0.5)
    student.train()(IMAGES).backward()
    optimizer.step()


def initialise(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def loop_over_everything(student: Student) -> None:
    for module in student.modules():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data.zero_()
            tensor.requires_grad_(True)
        module.train()


def wrapped_in_ddp(student: Student) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        wrapped(IMAGES).backward()
    finally:
        dist.destroy_process_group()


def averaged(student: Student) -> None:
    average = torch.optim.swa_utils.AveragedModel(student)
    for _ in range(2):
        train(student)
        average.update_parameters(student)


ON_THE_STUDENT: dict[str, Callable[[Student], object]] = {
    "apply": lambda student: student.apply(initialise),
    "half": lambda student: student.half(),
    "to dtype": lambda student: student.to(torch.float64),
    "to empty": lambda student: student.to_empty(device="cpu"),
    "load_state_dict": lambda student: student.load_state_dict(Student(student.teacher).state_dict()),
    "requires_grad_": lambda student: student.requires_grad_(True),
    "train": lambda student: student.train(),
    "a step": train,
    "a loop": loop_over_everything,
    "DDP": wrapped_in_ddp,
    "EMA": averaged,
    "share_memory": lambda student: student.share_memory(),
}


@pytest.mark.parametrize("change", ON_THE_STUDENT.values(), ids=ON_THE_STUDENT)
def test_nothing_done_to_a_student_reaches_its_teacher(student: Student, change: Callable[[Student], object]) -> None:
    teacher, before, fingerprint = student.teacher, bits(student.teacher), student.teacher.fingerprint
    change(student)
    assert all(torch.equal(a, b) for a, b in zip(bits(teacher), before, strict=True))
    assert (teacher.fingerprint, teacher.computed_in) == (fingerprint, "float32")
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


@pytest.mark.slow
def test_a_compiled_student_gets_the_same_targets(student: Student) -> None:
    before, loss = bits(student.teacher), student(IMAGES)
    torch.compiler.reset()
    student.compile(backend="eager")
    torch.testing.assert_close(student(IMAGES), loss)
    assert all(torch.equal(a, b) for a, b in zip(bits(student.teacher), before, strict=True))


def test_a_student_has_no_part_of_its_teacher(student: Student) -> None:
    assert list(student.state_dict()) == ["head.weight", "head.bias"]
    assert [name for name, _ in student.named_modules()] == ["", "head"]
    assert len(list(student.parameters())) == 2
    with pytest.raises(TypeError, match="DinoV3Teacher is not a Module subclass"):
        nn.ModuleDict({"teacher": student.teacher})
    train(student)
    assert student.head.weight.grad is not None
    assert all(parameter.grad is None for parameter in student.teacher.parameters())


def test_the_teacher_stays_frozen_inside_a_training_student(tiny_checkpoint: Path) -> None:
    student = Student(DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))).train()
    student.teacher.train().requires_grad_(True)
    assert not any(module.training for module in student.teacher.modules())
    assert not any(parameter.requires_grad for parameter in student.teacher.parameters())
    student.requires_grad_(True)  # parameter by parameter, past the teacher's own method
    images = torch.rand(2, 3, 224, 224, requires_grad=True)
    features = student.teacher.extract(images, EVERYTHING)
    student_map = student.head(images)
    loss = F.mse_loss(student_map, features.feature_map) + F.smooth_l1_loss(student_map.mean((2, 3)), features.cls)
    loss.backward()
    assert student.head.weight.grad is not None
    assert student.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in student.teacher.parameters())
    assert not any(tensor.requires_grad for _, tensor in features.named())


def test_copies_and_pickles_of_a_student_have_the_same_teacher_without_its_weights(student: Student) -> None:
    before = bits(student.teacher)
    checkpoint = io.BytesIO()
    torch.save(student, checkpoint)
    heads = sum(parameter.nbytes for parameter in student.parameters())
    assert len(checkpoint.getvalue()) < heads + 30_000
    checkpoint.seek(0)
    again: list[Student] = [
        copy.deepcopy(student),  # an EMA
        pickle.loads(pickle.dumps(student)),
        torch.load(checkpoint, weights_only=False),
    ]
    for other in again:
        assert other.teacher is not student.teacher
        assert other.teacher.fingerprint == student.teacher.fingerprint
        assert all(torch.equal(a, b) for a, b in zip(bits(other.teacher), before, strict=True))


@pytest.mark.slow
def test_a_copy_computes_in_the_dtype_that_auto_chose(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(tiny_checkpoint)
    assert copy.deepcopy(teacher).config.dtype == teacher.computed_in
    narrow = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16"))
    assert repr(copy.deepcopy(narrow)) == repr(narrow)


def test_a_copy_whose_checkpoint_is_gone_says_so_when_it_is_used(tmp_path: Path) -> None:
    path = init_checkpoint("vit-test", tmp_path / "model", image_size=64)
    copied = copy.deepcopy(DinoV3Teacher(DinoV3Config(path, dtype="float32")))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        copied.extract_features(IMAGES)


# --- on the teacher itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["half", "double", "apply", "load_state_dict", "state_dict", "register_forward_hook", "share_memory"]
)
def test_what_a_module_has_and_a_teacher_has_not_is_refused_with_the_remedy(teacher: DinoV3Teacher, name: str) -> None:
    with pytest.raises(FrozenError, match=rf"no {name}\(\), and is not an nn.Module.*teacher.model is the module"):
        getattr(teacher, name)
    assert not hasattr(teacher, name)


@pytest.mark.slow
def test_another_dtype_is_loaded_and_never_widened(tiny_checkpoint: Path) -> None:
    narrow = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=64))
    wide = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64))
    assert narrow.to(torch.float32) is narrow
    assert narrow.computed_in == "float32"
    assert all(torch.equal(a, b) for a, b in zip(bits(narrow), bits(wide), strict=True))
    assert narrow.to("cpu").to(IMAGES).device == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"dtype must be one of auto, float32.*got 'float64'"):
        wide.to(torch.float64)
    with pytest.raises(ConfigError, match="device must be one that this process has"):
        wide.to("cuda:99")
    assert bits(wide)


# --- on its model ---------------------------------------------------------------------------------------------------


def an_optimizer(model: Any) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(IMAGES).sum().backward()
    optimizer.step()


def fill(model: Any) -> None:
    with torch.no_grad():
        model.norm.weight.fill_(1.5)


def replaced(model: Any) -> None:
    model.norm = nn.LayerNorm(128)


def another_parameter(model: Any) -> None:
    model.norm.weight = nn.Parameter(model.norm.weight + 1)


def another_memory(model: Any) -> None:
    model.norm.weight.data = torch.ones(128)


ON_THE_MODEL: dict[str, Callable[[Any], object]] = {
    "apply": lambda model: model.apply(initialise),
    "half": lambda model: model.half(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "an optimizer": an_optimizer,
    "in place": fill,
    "a buffer": lambda model: model.rope_embeddings.inv_freq.zero_(),
    "another module": replaced,
    "another parameter": another_parameter,
    "other memory": another_memory,
    "of a student": lambda model: nn.Sequential(model).to(torch.bfloat16),
}


@pytest.mark.parametrize("change", ON_THE_MODEL.values(), ids=ON_THE_MODEL)
def test_a_teacher_whose_weights_were_changed_computes_no_more(
    teacher: DinoV3Teacher, change: Callable[[Any], object], tmp_path: Path
) -> None:
    assert bits(teacher)
    with CachedTeacher(teacher, tmp_path, 2**24) as cached:
        change(teacher.model)
        for use in (
            lambda: teacher.extract(IMAGES, EVERYTHING),
            lambda: teacher.fingerprint,
            lambda: cached.extract(IMAGES, EVERYTHING),
            lambda: copy.deepcopy(teacher),
        ):
            with pytest.raises(CheckpointError, match=r"was changed since it was loaded \(make a new teacher"):
                use()
        assert cached.flush()
        assert cached.statistics().entries == 0


def test_its_model_is_put_back_in_eval_mode_and_gets_no_gradients(teacher: DinoV3Teacher) -> None:
    before = bits(teacher)
    teacher.model.train()
    teacher.model.requires_grad_(True)
    images = IMAGES.clone().requires_grad_()
    features = teacher.extract(images, EVERYTHING)
    assert all(torch.equal(a, b) for (_, a), b in zip(features.named(), before, strict=True))
    assert not any(tensor.requires_grad for _, tensor in features.named())
    assert not any(module.training for module in teacher.modules())
