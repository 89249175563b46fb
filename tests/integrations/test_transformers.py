"""transformers' Trainer with a pool in this process, on detectors as transformers has them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_ray import TeacherPool
from dinov3_ray.errors import ConfigError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training import recipes
from dinov3_ray.training.losses import DistillationLoss

pytest.importorskip("accelerate")

from detectors import (
    CHANNELS,
    COUNT,
    SPEC,
    TAP,
    InTheLoop,
    Scenes,
    collate,
    d_fine,
    equal_weights,
    losses_of,
    options,
    rt_detr,
)
from transformers import RTDetrForObjectDetection, Trainer

from dinov3_ray.integrations.transformers import DistillingTrainer

pytestmark = pytest.mark.slow  # another trainer's loop, many times over

STEPS = 2 * 3  # optimizer steps of two epochs: see detectors.options


@pytest.mark.parametrize("detector", [rt_detr, d_fine])
def test_losses_steps_and_weights_are_those_of_a_local_teacher_in_the_loop(
    local_pool: TeacherPool, detector: Callable[[], nn.Module], tmp_path: Path
) -> None:
    distill = DistillationLoss("cosine", background_weight=0.25)
    with_evaluation = {"eval_strategy": "epoch"}
    loop = InTheLoop(
        teacher=FakeTeacher(), distill=distill, weight=0.5, **options(detector(), tmp_path, **with_evaluation)
    )
    loop.train()
    pooled = DistillingTrainer(
        teacher="local", taps=TAP, loss=distill, weight=0.5, **options(detector(), tmp_path, **with_evaluation)
    )
    pooled.train()
    assert losses_of(pooled) == losses_of(loop)
    assert len(losses_of(pooled)) == pooled.state.global_step == STEPS
    assert equal_weights(pooled.model, loop.model)
    evaluations = [[e["eval_loss"] for e in each.state.log_history if "eval_loss" in e] for each in (pooled, loop)]
    assert evaluations[0] == evaluations[1]
    assert len(evaluations[0]) == 2
    for entry in pooled.state.log_history:
        if "loss" in entry:
            assert 0 < entry["distillation_loss"] < entry["loss"]
            assert 0 <= entry["teacher/wait_share"] <= 1
        else:
            assert "distillation_loss" not in entry
    assert pooled.statistics().steps == 2 * 7
    assert not [module for module in pooled.model.modules() if module._forward_hooks], "left as it was found"


def distilling(folder: Path, model: nn.Module | None = None, **arguments: Any) -> DistillingTrainer:
    return DistillingTrainer(teacher="wide", taps=TAP, **options(model or rt_detr(), folder, **arguments))


@pytest.fixture
def wide_pool() -> Any:
    """A pool whose maps have more channels than the student's: it takes a projector."""
    with TeacherPool.start(FakeTeacher.factory(hidden_size=24), name="wide", replicas=1, local_mode=True) as pool:
        yield pool


SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was not stopped, and that left a checkpoint after each optimizer step."""
    folder = tmp_path_factory.mktemp("whole")
    with TeacherPool.start(FakeTeacher.factory(hidden_size=24), name="wide", replicas=1, local_mode=True):
        trainer = distilling(folder, **SAVES)
        trainer.train()
    return trainer, folder


@pytest.mark.parametrize("step", [2, 3, 4])  # within the first epoch, at its end, within the second
def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(
    whole: Any, wide_pool: TeacherPool, step: int, tmp_path: Path
) -> None:
    expected, folder = whole
    torch.manual_seed(step)
    resumed = distilling(tmp_path, RTDetrForObjectDetection(expected.model.config))  # with weights of its own
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert losses_of(resumed) == losses_of(expected)
    assert equal_weights(resumed.model, expected.model)
    assert equal_weights(resumed.distillation, expected.distillation)
    assert resumed.statistics().steps == 14 - {2: 6, 3: 7, 4: 10}[step], "what the checkpoint has seen is skipped"


def test_the_projector_learns_and_is_saved_beside_a_plain_checkpoint(whole: Any) -> None:
    trainer, folder = whole
    first, last = (torch.load(folder / f"checkpoint-{step}" / "distillation.pt") for step in (1, STEPS))
    assert first["losses"].keys() == last["losses"].keys()
    assert not any(torch.equal(first["losses"][name], last["losses"][name]) for name in first["losses"])
    model, report = RTDetrForObjectDetection.from_pretrained(folder / f"checkpoint-{STEPS}", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert equal_weights(model, trainer.model)


def test_other_taps_than_the_checkpoints_are_refused(whole: Any, wide_pool: TeacherPool, tmp_path: Path) -> None:
    other = DistillingTrainer(teacher="wide", taps="model.encoder.pan_blocks.1", **options(rt_detr(), tmp_path))
    with pytest.raises(ConfigError, match=r"taps must be that which .*checkpoint-2"):
        other.train(resume_from_checkpoint=str(whole[1] / "checkpoint-2"))


def test_a_distilled_run_resumes_without_a_teacher_and_a_plain_run_with_one(
    whole: Any, wide_pool: TeacherPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Trainer(**options(rt_detr(), tmp_path / "plain", **SAVES))
    plain.train(resume_from_checkpoint=str(whole[1] / "checkpoint-2"))
    assert plain.state.global_step == STEPS
    again = distilling(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    assert again.state.global_step == STEPS
    assert "begin untrained" in caplog.text


@pytest.mark.usefixtures("wide_pool")
def test_after_an_out_of_memory_error_that_trainer_catches_nothing_of_the_batch_is_kept(tmp_path: Path) -> None:
    failed: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Failing(DistillingTrainer):
        def get_train_dataloader(self) -> Any:
            if failed:  # before anything is made for the next attempt
                gc.collect()
                alive.extend(each() is not None for each in failed)
            return super().get_train_dataloader()

        def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
            if failed:
                return super().compute_loss(model, inputs, *arguments, **keywords)
            super().compute_loss(model, inputs, *arguments, **keywords)
            model(**{name: inputs[name] for name in ("pixel_values", "labels")})
            failed.extend([weakref.ref(self._losses.tap[TAP]), weakref.ref(inputs["teacher_targets"].feature_map)])
            raise RuntimeError("CUDA out of memory. Tried to allocate a test")

    arguments = options(
        rt_detr(), tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    trainer = Failing(teacher="wide", taps=TAP, **arguments)
    trainer.train()
    assert alive == [False, False]
    assert trainer.state.train_batch_size < 4
    assert trainer.state.epoch == 2


@pytest.mark.usefixtures("wide_pool")
def test_several_taps_have_a_weight_and_a_projector_each(tmp_path: Path) -> None:
    weights = {TAP: 0.5, "model.encoder.pan_blocks.1": 2.0}
    arguments = options(rt_detr(), tmp_path, max_steps=1, gradient_accumulation_steps=1, num_train_epochs=1)
    trainer = DistillingTrainer(teacher="wide", taps=tuple(weights), weight=weights, **arguments)
    trainer.train()
    losses = trainer.distillation
    assert losses is not None
    features = FakeTeacher(hidden_size=24).extract(torch.rand(2, 3, 64, 64), SPEC)
    outputs = {TAP: torch.rand(2, CHANNELS, 4, 4), "model.encoder.pan_blocks.1": torch.rand(2, CHANNELS, 2, 2)}
    first, second = losses.terms.losses
    assert not torch.equal(first.projector.weight, second.projector.weight)
    expected = 0.5 * first(outputs[TAP], features) + 2.0 * second(outputs["model.encoder.pan_blocks.1"], features)
    torch.testing.assert_close(losses.terms(outputs, features), expected)


@pytest.mark.usefixtures("wide_pool")
def test_a_recipe_finds_its_layer_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def with_recipe(folder: Path, model: nn.Module | None = None, **arguments: Any) -> DistillingTrainer:
        return DistillingTrainer(teacher="wide", recipe="rtdetrv4", **options(model or rt_detr(), folder, **arguments))

    whole = with_recipe(tmp_path / "whole", **SAVES)
    whole.train()
    assert whole.distillation is not None
    assert whole.distillation.tap.names == ("model.encoder.aifi.0",), "F5"
    logged = [entry["distillation_weight"] for entry in whole.state.log_history if "distillation_loss" in entry]
    assert len(set(logged)) == len(logged) == STEPS, "the weight follows the gradients"
    resumed = with_recipe(tmp_path / "resumed", RTDetrForObjectDetection(whole.model.config))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole)
    assert equal_weights(resumed.distillation, whole.distillation)
    assert equal_weights(resumed.model, whole.model)
    with pytest.raises(ConfigError, match=r"recipe must be that which .* 'rtdetrv4'; got None"):
        distilling(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_a_recipe_that_standardises_fits_its_statistics_on_the_first_batch(tmp_path: Path) -> None:
    trainer = DistillingTrainer(
        teacher=FakeTeacher(hidden_size=16),
        recipe=recipes.am_radio(standardise=True),
        **options(rt_detr(), tmp_path, num_train_epochs=1, max_steps=2, save_strategy="steps", save_steps=2),
    )
    trainer.train()
    assert all(0 < entry["distillation_loss"] < 10 for entry in trainer.state.log_history if "loss" in entry)
    saved = torch.load(tmp_path / "checkpoint-2" / "distillation.pt")["losses"]
    scales = [value for name, value in saved.items() if name.endswith("standardise.scale")]
    assert len(scales) == 2
    assert all(value > 0 for value in scales)


@pytest.mark.usefixtures("wide_pool")
def test_many_batches_per_step_are_all_ahead(tmp_path: Path) -> None:
    trainer = distilling(tmp_path, gradient_accumulation_steps=7)
    trainer.train()
    assert trainer.statistics().depth == 8
    assert trainer.state.global_step == 2


class Plain(nn.Module):
    """Any module that ``Trainer`` takes, none of transformers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = {"logits": self.head(self.stem(pixel_values).mean((2, 3)))}
        return outputs if labels is None else {"loss": F.cross_entropy(outputs["logits"], labels), **outputs}


def by_items(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


@pytest.mark.usefixtures("wide_pool")
@pytest.mark.parametrize("loss", [None, by_items])
def test_accumulated_batches_count_as_one_large_batch(loss: Any, tmp_path: Path) -> None:
    # Trainer divides a model's loss by the number of batches, but not one that counts the items of all of them.
    samples = [{"pixel_values": Scenes()[index]["pixel_values"], "labels": index % 3} for index in range(12)]
    runs = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        arguments = options(
            Plain(),
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            num_train_epochs=1,
        )
        arguments |= {"train_dataset": samples, "data_collator": None, "compute_loss_func": loss}
        trainer = DistillingTrainer(teacher="wide", taps="stem", loss="mse", **arguments)
        trainer.train()
        trainer.train()  # goes on with the same model, projector and optimizer
        runs.append({**dict(trainer.model.named_parameters()), **dict(trainer.distillation.named_parameters())})
    for name, expected in runs[0].items():
        torch.testing.assert_close(runs[1][name], expected)
        torch.testing.assert_close(runs[2][name], expected)


@pytest.mark.usefixtures("wide_pool")
def test_the_projectors_gradients_are_clipped_too(tmp_path: Path) -> None:
    samples = [{"pixel_values": Scenes()[index]["pixel_values"], "labels": index % 3} for index in range(4)]
    arguments = options(Plain(), tmp_path, max_grad_norm=1e-3, learning_rate=1.0, optim="sgd", max_steps=1)
    arguments |= {"train_dataset": samples, "data_collator": None}
    loss = DistillationLoss("mse", projector=nn.Conv2d(8, 24, 1))
    trainer = DistillingTrainer(teacher="wide", taps="stem", loss=loss, weight=100, **arguments)
    trainer.train()
    before, after = (torch.cat([p.flatten() for p in each.parameters()]) for each in (loss, trainer.distillation))
    assert torch.linalg.vector_norm(after - before).item() == pytest.approx(1e-3, rel=0.01)


def test_the_teacher_sees_normalized_images_as_they_were(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(FakeTeacher):
        def extract(self, images: Any, spec: FeatureSpec) -> Any:
            seen.append(images)
            return super().extract(images, spec)

    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    def normalized(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(items)
        scale = [torch.tensor(each)[:, None, None] for each in (mean, deviation)]
        return {**batch, "pixel_values": (batch["pixel_values"] - scale[0]) / scale[1]}

    processor = SimpleNamespace(do_normalize=True, image_mean=mean, image_std=deviation)
    arguments = options(rt_detr(), tmp_path, max_steps=1)
    arguments |= {"data_collator": normalized, "processing_class": processor}
    DistillingTrainer(teacher=Watching(), taps=TAP, **arguments).train()
    batches = [images for images in seen if images.dtype != torch.uint8]  # a grey one finds the channels
    scenes = [Scenes()[index]["pixel_values"] for index in range(COUNT)]
    assert len(batches[0]) == 2
    for image in batches[0]:
        assert sum(torch.allclose(image, scene, atol=1e-5) for scene in scenes) == 1


def test_wrong_options_are_refused_at_once(tmp_path: Path) -> None:
    arguments = options(rt_detr(), tmp_path)
    with pytest.raises(ConfigError, match="pan_blocks"):
        DistillingTrainer(teacher=FakeTeacher(), taps="model.encoder.pan_block.0", **arguments)
    with pytest.raises(ConfigError, match="weight must have one entry per tap"):
        DistillingTrainer(teacher=FakeTeacher(), taps=TAP, weight={"other": 1.0}, **arguments)
    with pytest.raises(ConfigError, match="spec must ask for"):
        DistillingTrainer(teacher=FakeTeacher(), taps=TAP, spec=FeatureSpec(cls=True), **arguments)
    with pytest.raises(ConfigError, match="kind must be one of"):
        DistillingTrainer(teacher=FakeTeacher(), taps=TAP, loss="l2", **arguments)
    with pytest.raises(ConfigError, match="loss, weight must be left out where a recipe gives them"):
        DistillingTrainer(teacher=FakeTeacher(), recipe="gram", loss="mse", weight=2.0, **arguments)
    with pytest.raises(ConfigError, match="taps must name the student's layer"):
        DistillingTrainer(teacher=FakeTeacher(), **arguments)
