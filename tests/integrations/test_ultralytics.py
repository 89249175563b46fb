"""The Ultralytics trainers, for real where Ultralytics imports (it needs torchvision), on tiny data sets.

Last run on 2026-11-26 with ultralytics 8.4.190, torch 2.13.0 (CPU), Python 3.11, and torchvision 0.28.0 with its
``nms`` in Python, since the wheel's needs CUDA. By hand, with the same, two ranks (gloo in place of NCCL, and
Ultralytics' final validation, which asks for CUDA, left out): both ended with the same model and projectors. No GPU
has seen them. When recipes came, on 2026-11-27, those of recipes, levels, ``freeze`` and one line for each task ran
again, with a stand-in for torchvision that has nothing but ``nms``.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.errors import ConfigError
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training import recipes
from dinov3_ray.training.boxes import Boxes

ultralytics = pytest.importorskip("ultralytics", exc_type=ImportError)
trainers = pytest.importorskip("dinov3_ray.integrations.ultralytics", exc_type=ImportError)

from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402 - there only if it was not skipped above
from yolo_training import MODELS, Steps, bars, options  # noqa: E402

SPEC = FeatureSpec(feature_map=True)
TRAINERS = {
    "detect": trainers.DetectionDistillationTrainer,
    "obb": trainers.OBBDistillationTrainer,
    "segment": trainers.SegmentationDistillationTrainer,
    "pose": trainers.PoseDistillationTrainer,
}


@pytest.fixture
def pool() -> Iterator[TeacherPool]:
    with TeacherPool.start(FakeTeacher.factory(), name="yolo", replicas=1, local_mode=True) as pool:
        yield pool


class EnoughError(Exception):
    """The end of a run that a test wants there."""


class InTheLoop(trainers.DetectionDistillationTrainer):  # type: ignore[misc]
    """The trainer with a local teacher in its step, and nothing ahead of it: what a pool must not change."""

    def get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return DetectionTrainer.get_dataloader(self, *args, **kwargs)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        targets = FakeTeacher().extract(batch["img"], SPEC)
        return super().preprocess_batch({**batch, "teacher": targets, "teacher_boxes": Boxes.from_ultralytics(batch)})


def detached(model: Any) -> bool:
    """Whether nothing of ours is on ``model``."""
    ours = type(model.criterion).__module__.startswith("dinov3_ray")
    return not ours and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("task", TRAINERS)
def test_one_line_distils_and_checkpoints_stay_plain(pool: TeacherPool, tmp_path: Path, task: str) -> None:
    model = ultralytics.YOLO(MODELS[task])
    steps = Steps(model)
    model.train(trainer=TRAINERS[task], **options(tmp_path, task))
    assert len(steps.losses) == 4
    assert all(math.isfinite(each["distill"]) and 0 < each["distill"] < 2 for each in steps.losses)
    assert steps.losses[0].keys() > {"distill", "box_loss", "cls_loss"}
    assert model.trainer.train_loader.stream.statistics().steps == 4
    assert detached(model.trainer.model)
    weights = model.trainer.wdir
    assert b"dinov3" not in (weights / "last.pt").read_bytes()
    assert (weights / "distill.pt").exists()
    header = (model.trainer.save_dir / "results.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert "train/distill" in header
    assert "val/distill" not in header  # validation has no targets


def test_several_levels_learn_each_with_its_weight(pool: TeacherPool, tmp_path: Path) -> None:
    compared: list[tuple[float, float]] = []

    class Levels(trainers.DetectionDistillationTrainer):  # type: ignore[misc]
        def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().build_optimizer(*args, **kwargs)
            each: list[float] = []
            for loss in self._loss.terms.losses:
                loss.register_forward_hook(lambda _, __, value: each.append(value.item()))

            def summed(_: Any, __: Any, value: Tensor) -> None:
                compared.append((3 * (0.5 * each[-3] + each[-2] + 2 * each[-1]), value.item()))

            self._loss.register_forward_hook(summed)
            return optimizer

    model = ultralytics.YOLO(MODELS["detect"])
    steps = Steps(model)
    more = {"distill_layer": "P3:0.5,P4,P5:2", "distill_weight": 3.0}
    model.train(trainer=Levels, **options(tmp_path, "detect", **more))
    assert len(compared) == 4
    assert all(math.isclose(*pair, rel_tol=1e-5) for pair in compared)
    assert [each["distill"] for each in steps.losses] == pytest.approx([got for _, got in compared])
    saved = torch.load(model.trainer.wdir / "distill.pt")
    assert saved["layers"] == ["model.16", "model.19", "model.22"]
    assert [saved["loss"][f"terms.losses.{index}.projector.weight"].shape[1] for index in range(3)] == [64, 128, 256]
    assert all(state["exp_avg"].any() for state in saved["optimizer"])


def test_targets_are_those_of_the_letterboxed_view(pool: TeacherPool, tmp_path: Path) -> None:
    trainer = trainers.OBBDistillationTrainer(overrides={**options(tmp_path), "model": MODELS["obb"]})
    compared: list[int] = []

    def compare(run: Any) -> None:
        for batch in run.train_loader:
            assert batch["img"].dtype == torch.uint8
            expected = FakeTeacher().extract(batch["img"], SPEC).feature_map
            assert torch.equal(batch["teacher"].feature_map, expected)
            compared.append(len(batch["img"]))
        raise EnoughError

    trainer.add_callback("on_train_start", compare)
    with pytest.raises(EnoughError):
        trainer.train()
    assert sum(compared) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"multi_scale": 0.5, "epochs": 3},
        {"rect": True, "multi_scale": 0.5},
        {"close_mosaic": 1, "mosaic": 1.0},
        {"freeze": 5},
        {"nbs": 4, "epochs": 3, "warmup_epochs": 0},
        {"amp": True},
        {"optimizer": "MuSGD", "distill_layer": "P3,P4:2"},
    ],
    ids=lambda more: "-".join(more) or "plain",
)
def test_the_steps_are_those_with_a_local_teacher_in_the_loop(
    pool: TeacherPool, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "amp" in more:  # Ultralytics leaves it off on a CPU
        half = partial(torch.autocast, "cpu", torch.bfloat16)
        monkeypatch.setattr("ultralytics.engine.trainer.autocast", lambda *_, **__: half())
    runs = []
    for trainer in (trainers.DetectionDistillationTrainer, InTheLoop):
        model = ultralytics.YOLO(MODELS["detect"])
        steps = Steps(model)
        model.train(trainer=trainer, **options(tmp_path, "detect", **{"batch": 1, **more}))
        assert (model.trainer.train_loader.__class__.__name__ == "_TrainLoader") == (trainer is not InTheLoop)
        runs.append(steps)
    assert len(runs[0].losses) == 4 * more.get("epochs", 2)
    assert runs[0].losses == runs[1].losses
    assert runs[0].rates == runs[1].rates


def keep(alive: list[weakref.ref[Any]], *tensors: Tensor) -> None:
    alive.extend(weakref.ref(tensor) for tensor in tensors)


class Failing(trainers.DetectionDistillationTrainer):  # type: ignore[misc]
    """Fails once, in the second step, at ``place``; keeps weak references to what that step made."""

    place = ""
    message = "CUDA out of memory"
    step = 0
    made: list[weakref.ref[Any]]

    def _setup_train(self) -> None:
        super()._setup_train()
        self.made = []
        for layer in (16, 19, 22):
            self.model.model[layer].register_forward_hook(lambda _, __, output: self._made(output))
        self.model.model[-1].register_forward_hook(lambda *_: self._fail("forward"))
        criterion = self.model.criterion._criterion
        if self.place == "criterion":
            self.model.criterion._criterion = lambda *given: (self._fail("criterion"), criterion(*given))[1]
        self._loss.register_forward_hook(lambda *_: self._fail("distillation"))

    def _made(self, output: Tensor) -> None:
        if self.step == 2:
            keep(self.made, output)
            output.register_hook(lambda _: self._fail("backward"))

    def _fail(self, place: str) -> None:
        if self.step == 2 and self.place == place:
            raise RuntimeError(self.message)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.step += 1
        if self.step == 2:
            keep(self.made, batch["teacher"].feature_map, batch["teacher_boxes"].corners)
        return super().preprocess_batch(batch)


@pytest.mark.parametrize("place", ["forward", "criterion", "distillation", "backward"])
def test_nothing_of_a_batch_that_was_out_of_memory_is_kept(tmp_path: Path, place: str) -> None:
    looked: list[tuple[int, int, int]] = []

    class Short(Failing):
        def get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            if self.step:
                # Here, before the retry, Ultralytics holds the exception still, with its frames and their tensors.
                looked.append((0, self._client.statistics().in_flight, 0))
            return super().get_dataloader(*args, **kwargs)

    Short.place = place

    def retried(trainer: Any) -> None:
        if trainer.step == 2:
            alive = sum(each() is not None for each in trainer.made)
            looked.append((alive, trainer._client.statistics().in_flight, len(trainer.made)))

    bars(tmp_path / "data", "detect", images=8)
    model = ultralytics.YOLO(MODELS["detect"])
    model.add_callback("on_train_epoch_start", retried)
    steps = Steps(model)
    more = {"batch": 2, "epochs": 1, "distill_layer": "P3,P4,P5"}
    slow = FakeTeacher.factory(delay=0.2)  # so that requests are in flight when the step fails
    gc.disable()  # what only the collector would find is kept as well
    try:
        with TeacherPool.start(slow, name="yolo", replicas=1, local_mode=True):
            model.train(trainer=Short, **options(tmp_path, "detect", **more))
    finally:
        gc.enable()
    assert looked == [(0, 0, 0), (0, 0, 0), (0, 0, 5)]
    assert model.trainer.batch_size == 1
    assert len(steps.losses) == 1 + 8
    assert all(0 < each["distill"] < 6 for each in steps.losses)


def test_an_error_leaves_the_model_as_it_was(pool: TeacherPool, tmp_path: Path) -> None:
    class Broken(Failing):
        place, message = "criterion", "broken"

    trainer = Broken(overrides={**options(tmp_path, "detect"), "model": MODELS["detect"]})
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert not type(trainer.model.criterion).__module__.startswith("dinov3_ray")
    assert trainer._criterion is None
    assert trainer._client is None
    trainer.made = [each for each in trainer.made if each() is not None]
    gc.collect()
    assert not [each for each in trainer.made if each() is not None]


def stop(trainer: Any) -> None:
    """A callback that ends a run behind its second epoch."""
    if trainer.epoch == 1:
        raise EnoughError


def interrupted(folder: Path, task: str, **more: Any) -> Path:
    """The last.pt of a run that ended behind its second epoch of three."""
    model = ultralytics.YOLO(MODELS[task])
    model.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(EnoughError):
        model.train(trainer=TRAINERS[task], **options(folder, task, epochs=3, **more))
    return Path(model.trainer.last)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["auto", "SGD", "MuSGD"])
def test_a_distilled_checkpoint_resumes_without_this_package(pool: TeacherPool, tmp_path: Path, optimizer: str) -> None:
    last = interrupted(tmp_path, "detect", optimizer=optimizer)
    model = ultralytics.YOLO(last)
    steps = Steps(model)
    model.train(resume=True)
    assert isinstance(model.trainer, DetectionTrainer)
    assert not isinstance(model.trainer, trainers.DetectionDistillationTrainer)
    assert model.trainer.start_epoch == 2
    assert len(steps.losses) == 2
    assert "distill" not in steps.losses[0]
    header, *rows = [line.split(",") for line in model.trainer.csv.read_text(encoding="utf-8").splitlines()]
    ours = ["train/distill", f"lr/pg{len(model.trainer.optimizer.param_groups)}"]
    assert header[-2:] == ours
    assert [len(row) for row in rows] == [len(header)] * 2 + [len(header) - 2]  # no value stands under another's name


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["auto", "SGD", "MuSGD"])
def test_a_distilled_checkpoint_resumes_with_projectors_and_options(
    pool: TeacherPool, tmp_path: Path, optimizer: str
) -> None:
    last = interrupted(tmp_path, "obb", optimizer=optimizer, distill_layer="P3:0.5,P5", background_weight=0.5)
    saved = torch.load(last.with_name("distill.pt"))
    bits = last.read_bytes(), last.with_name("distill.pt").read_bytes()
    sequences = []
    for teacher in ("yolo", FakeTeacher()):
        last.write_bytes(bits[0])
        last.with_name("distill.pt").write_bytes(bits[1])
        model = ultralytics.YOLO(last)
        steps = Steps(model)

        def look(trainer: Any) -> None:
            state = trainer._loss.state_dict()
            assert all(torch.equal(state[name], saved["loss"][name]) for name in saved["loss"])
            for own, other in zip(trainer._side.state(), saved["optimizer"], strict=True):
                assert other
                assert all(torch.equal(own[name], other[name]) for name in other)

        model.add_callback("on_train_start", look)
        model.train(resume=True, trainer=trainers.OBBDistillationTrainer, teacher=teacher)
        assert model.trainer.start_epoch == 2
        assert model.trainer.distillation.distill_layer == {"P3": 0.5, "P5": 1.0}
        assert model.trainer.distillation.background_weight == 0.5
        assert len(steps.losses) == 2
        assert all(0 < each["distill"] < 3 for each in steps.losses)
        sequences.append(steps.losses)
    assert sequences[0] == sequences[1]


def test_a_recipe_finds_its_layer_and_goes_on_with_its_weight(pool: TeacherPool, tmp_path: Path) -> None:
    last = interrupted(tmp_path, "detect", recipe="rtdetrv4")
    saved = torch.load(last.with_name("distill.pt"))
    assert saved["layers"] == ["model.10"], "the backbone's last map, of stride 32"
    assert saved["options"]["recipe"] == "rtdetrv4"
    weight = saved["loss"]["share.weight"]
    assert weight != 5, "it has followed the gradients"
    model = ultralytics.YOLO(last)
    begun: list[Tensor] = []
    model.add_callback("on_train_start", lambda trainer: begun.append(trainer._loss.share.weight.clone()))
    model.train(resume=True, trainer=trainers.DetectionDistillationTrainer, teacher="yolo")
    assert torch.equal(begun[0], weight)
    assert model.trainer._loss.share.weight != weight
    assert model.trainer._loss.get_extra_state().tolist() == [6, 2]
    with pytest.raises(ConfigError, match="recipe must be that of the run which is resumed, 'rtdetrv4'; got 'gram'"):
        trainers.Distillation.resumed(saved["options"], {"teacher": "yolo", "recipe": "gram"})


def test_a_recipe_and_options_that_it_gives_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="distill_kind, object_weight must be left out where a recipe gives them"):
        trainers.Distillation(teacher="yolo", recipe="gram", distill_kind="mse", object_weight=1.0)
    changed = trainers.Distillation(teacher="yolo", recipe=recipes.gram(weight=3.0))
    with pytest.raises(ConfigError, match=r"recipe must be given again .* recipe=recipes\.gram\(\.\.\.\)"):
        trainers.Distillation.resumed(changed.to_resume(), {"teacher": "yolo"})
    assert trainers.Distillation.resumed(changed.to_resume(), {**changed.to_arguments()}) == changed


def test_other_layers_than_those_of_the_run_are_refused(pool: TeacherPool, tmp_path: Path) -> None:
    last = interrupted(tmp_path, "detect")
    with pytest.raises(ConfigError, match=r"distill_layer must be that of the run which is resumed, model\.19"):
        ultralytics.YOLO(last).train(
            resume=True, trainer=trainers.DetectionDistillationTrainer, teacher="yolo", distill_layer="P3"
        )


def test_a_plain_checkpoint_resumes_with_new_projectors(
    pool: TeacherPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = ultralytics.YOLO(MODELS["detect"])
    plain.add_callback("on_fit_epoch_end", stop)
    arguments = options(tmp_path, "detect", epochs=3)
    del arguments["teacher"]
    with pytest.raises(EnoughError):
        plain.train(**arguments)
    model = ultralytics.YOLO(plain.trainer.last)
    steps = Steps(model)
    model.train(resume=True, trainer=trainers.DetectionDistillationTrainer, teacher="yolo")
    assert len(steps.losses) == 2
    assert all(0 < each["distill"] < 2 for each in steps.losses)
    assert "the projectors begin anew" in caplog.text
    lengths = {line.count(",") for line in model.trainer.csv.read_text(encoding="utf-8").splitlines()}
    assert len(lengths) == 1


def test_recovery_from_nan_goes_back_with_the_projectors(pool: TeacherPool, tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def spoil(trainer: Any) -> None:
        if trainer.epoch == 1 and not trainer.nan_recovery_attempts:
            trainer.loss = torch.tensor(math.nan)
            with torch.no_grad():
                for parameter in trainer._loss.parameters():
                    parameter.fill_(math.nan)

    def look(trainer: Any) -> None:
        if trainer.nan_recovery_attempts:
            saved = torch.load(trainer.wdir / "distill.pt")["loss"]
            assert all(torch.equal(saved[name], value) for name, value in trainer._loss.state_dict().items())
            seen.append(saved)

    model = ultralytics.YOLO(MODELS["detect"])
    model.add_callback("on_train_batch_end", spoil)
    model.add_callback("on_train_epoch_start", look)
    steps = Steps(model)
    model.train(trainer=trainers.DetectionDistillationTrainer, **options(tmp_path, "detect"))
    assert len(seen) == 1
    assert len(steps.losses) == 6
    assert all(math.isfinite(each["distill"]) for each in steps.losses[4:])
    assert b"dinov3" not in model.trainer.last.read_bytes()
    assert detached(model.trainer.ema.ema)


def test_layers_that_cannot_learn_are_refused(pool: TeacherPool, tmp_path: Path) -> None:
    more = {"freeze": 17, "distill_layer": ["P3", "P4"]}
    with pytest.raises(ConfigError, match=r"nothing does up to 'model\.16' .* freeze=17"):
        ultralytics.YOLO(MODELS["detect"]).train(
            trainer=trainers.DetectionDistillationTrainer, **options(tmp_path, "detect", **more)
        )


def test_a_rank_is_made_from_the_pickled_launch(pool: TeacherPool, tmp_path: Path) -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file
    from ultralytics.utils.patches import torch_load

    arguments = options(tmp_path, object_weight=3.0, distill_layer="P3:2,P4", epochs=1)
    launcher = trainers.OBBDistillationTrainer(overrides={**arguments, "model": MODELS["obb"]})
    launcher.args.__dict__.update(launcher.arguments_for_ranks())
    file = generate_ddp_file(launcher)
    try:
        state = torch_load(Path(file).with_suffix(".pt"), map_location="cpu")
    finally:
        ddp_cleanup(launcher, file)
    rank = state["trainer"](cfg={**DEFAULT_CFG_DICT, "save_dir": ""}, overrides=state["args"])
    assert rank.distillation == launcher.distillation
    assert rank.distillation.object_weight == 3.0
    assert rank.distillation.distill_layer == {"P3": 2.0, "P4": 1.0}
    rank.train()
    assert rank.train_loader.stream.statistics().steps == 2


def test_two_kinds_of_teachers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distill_model must be None .* got 'yolo26s\.pt'"):
        ultralytics.YOLO(MODELS["detect"]).train(
            trainer=trainers.DetectionDistillationTrainer, **options(tmp_path, "detect", distill_model="yolo26s.pt")
        )


def test_the_teacher_must_be_named(tmp_path: Path) -> None:
    arguments = options(tmp_path)
    del arguments["teacher"]
    with pytest.raises(ConfigError, match="teacher must be given"):
        ultralytics.YOLO(MODELS["obb"]).train(trainer=trainers.OBBDistillationTrainer, **arguments)
