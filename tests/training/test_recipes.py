"""Each recipe against its paper's or repository's formula, written here anew; and what a recipe finds of a student."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_ray import Features
from dinov3_ray.errors import ConfigError, SpecError
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training import recipes
from dinov3_ray.training.distiller import Distiller
from dinov3_ray.training.layer_search import find_layer
from dinov3_ray.training.losses import WeightSchedule

D = 16  # channels of a FakeTeacher, for which a Hadamard matrix is known


class Backbone(nn.Module):
    """Maps of strides 4, 16 and 32, then a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 4, 4), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 20, 2, 2), nn.BatchNorm2d(20))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 3))

    def forward(self, images: Tensor) -> Tensor:
        vector: Tensor = self.head(self.deep(self.middle(self.stem(images))))
        return vector


def images(batch: int = 3, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def made(recipe: recipes.Recipe, teacher: Any = None) -> tuple[Distiller, Tensor, Features, float]:
    """A distiller for a student, the student's map and the targets of a batch, and the distiller's loss for them."""
    torch.manual_seed(1)
    student = Backbone()
    batch = images()
    teacher = teacher or FakeTeacher(hidden_size=D)
    distiller = recipe.for_student(student, teacher, batch)
    # A FakeTeacher's maps are smooth: noise makes every location count.
    targets = teacher.extract(batch, recipe.spec).map(lambda _, tensor: tensor + torch.randn(tensor.shape))
    for parameter in distiller.parameters():
        parameter.requires_grad_(False)  # the references compute with them
    with distiller.tap:
        student(batch)
        seen = distiller.tap["deep"].detach()
        with torch.no_grad():
            loss = float(distiller(targets))
    return distiller, seen, targets, loss


def at_each(projector: nn.Module, map_BChw: Tensor) -> Tensor:
    """A projector of 1 x 1 convolutions as matrices, on [B, N, C]."""
    rows_BNC = map_BChw.flatten(2).transpose(1, 2)
    layers = [projector] if isinstance(projector, nn.Conv2d) else list(projector)  # type: ignore[call-overload]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            rows_BNC = rows_BNC @ layer.weight[:, :, 0, 0].T + layer.bias
        else:
            rows_BNC = torch.where(rows_BNC > 0, rows_BNC, 0.0)
    return rows_BNC


def test_rtdetrv4_is_the_mean_cosine_of_the_projected_f5() -> None:
    # RT-DETRv4's loss_distillation: the teacher's map, bilinear where grids differ, 1 - cosine over channels, mean.
    # Its grids agree: half the view in patches of 16 are the strides of 32.
    recipe = recipes.rtdetrv4()
    teacher = FakeTeacher(hidden_size=D, patch_size=32)  # as a teacher of patch 16 is at half the view
    distiller, seen_BChw, targets, loss = made(recipe, teacher)
    student_BND = at_each(distiller.terms.losses[0].projector, seen_BChw)
    teacher_BND = targets.feature_map.flatten(2).transpose(1, 2)
    cosines = [
        (s @ t) / (s.norm() * t.norm())
        for s, t in zip(student_BND.flatten(0, 1), teacher_BND.flatten(0, 1), strict=True)
    ]
    assert loss == pytest.approx(5.0 * float(1 - torch.stack(cosines).mean()), rel=1e-5)
    assert (recipe.image_size, recipe.share, recipe.stride) == ("input/2", 0.11, 32)
    assert isinstance(distiller.terms.losses[0].projector, nn.Conv2d), "nn.Linear at each location"


def test_ultralytics_is_the_mean_cosine_behind_two_layers_with_relu() -> None:
    # distill_model of 8.4.190: 1 x 1 convolution, ReLU, 1 x 1 convolution; dis = 6. Cosine as for its DINOv3 teacher.
    recipe = recipes.ultralytics()
    distiller, seen_BChw, targets, loss = made(recipe, FakeTeacher(hidden_size=D, patch_size=32))
    projector = distiller.terms.losses[0].projector
    assert [type(layer) for layer in projector] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    student_BND = at_each(projector, seen_BChw)
    cosine = F.cosine_similarity(student_BND, targets.feature_map.flatten(2).transpose(1, 2), dim=-1)
    assert loss == pytest.approx(6.0 * float((1 - cosine).mean()), rel=1e-5)
    assert (recipe.image_size, recipe.share, recipe.stride) == ("input/2", None, 32)


def head_of(layers: nn.Sequential, rows: Tensor) -> Tensor:
    """fc2(gelu(norm(fc1(x)))): RADIO's MLP, on rows [..., C]."""
    first, norm, _, second = layers
    hidden = rows @ first.weight.T + first.bias
    centred = hidden - hidden.mean(-1, keepdim=True)
    hidden = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ second.weight.T + second.bias


def test_am_radio_is_cosine_of_cls_plus_nine_parts_cosine_and_one_smooth_l1_of_the_map() -> None:
    # AM-RADIO, 3.3: L_summary = 1 - cos; L_feature = 0.9 L_cos + 0.1 L_smooth-l1; a head for each.
    distiller, seen_BChw, targets, loss = made(recipes.am_radio(hidden=24), FakeTeacher(hidden_size=D, patch_size=32))
    of_cls, of_map = (each.projector for each in distiller.terms.losses)
    summary_BD = head_of(of_cls, seen_BChw.mean((2, 3)))
    map_BND = head_of(of_map.layers, seen_BChw.flatten(2).transpose(1, 2))
    teacher_BND = targets.feature_map.flatten(2).transpose(1, 2)
    distance = (map_BND - teacher_BND).abs()
    smooth = torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean()
    on_map = 0.9 * (1 - F.cosine_similarity(map_BND, teacher_BND, dim=-1)).mean() + 0.1 * smooth
    on_cls = (1 - F.cosine_similarity(summary_BD, targets.cls, dim=-1)).mean()
    assert loss == pytest.approx(float(on_cls + on_map), rel=1e-5)
    assert of_cls[0].out_features == 24


@pytest.mark.parametrize("per_image", [True, False])
def test_gram_is_the_mean_square_between_matrices_of_cosines(per_image: bool) -> None:
    # DINOv3, equation 2, with the mean of the official MSELoss: (X_S X_Sᵀ - X_G X_Gᵀ)², at twice the resolution and
    # reduced; weight 2.
    distiller, seen_BChw, targets, loss = made(recipes.gram(per_image=per_image))
    assert targets.feature_map.shape[2:] == (4, 6)
    assert seen_BChw.shape[2:] == (2, 3)
    reduced = targets.feature_map.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    rows = [F.normalize(each.flatten(2).transpose(1, 2), dim=-1) for each in (seen_BChw, reduced)]
    if not per_image:
        rows = [each.flatten(0, 1)[None] for each in rows]
    student, teacher = (torch.einsum("bnd,bmd->bnm", each, each) for each in rows)
    assert loss == pytest.approx(2.0 * float((student - teacher).pow(2).mean()), rel=1e-5)
    assert not list(distiller.parameters())


def test_lightly_3_is_kl_to_a_queue_plus_kl_within_the_image() -> None:
    # DistillationV3Loss: KLDivLoss(batchmean) at temperature 0.07 of unit vectors; the queue has the batch before it is
    # used, zeros where it is not filled; locations on the teacher's grid, bilinear behind the projector.
    distiller, seen_BChw, targets, _ = made(recipes.lightly(queue=5))
    of_queue, local = distiller.terms.losses
    distiller.tap._outputs.update(deep=seen_BChw.requires_grad_())
    of_queue.queue.rows.zero_()
    loss = float(distiller(targets))
    cls_BD = F.normalize(targets.cls, dim=-1)
    queue = torch.zeros(5, D)
    queue[:3] = cls_BD
    assert torch.allclose(of_queue.queue.rows, queue)
    student_BD = F.normalize(of_queue.projector(seen_BChw.mean((2, 3))), dim=-1)
    batchmean = nn.KLDivLoss(reduction="batchmean")
    on_cls = batchmean((student_BD @ queue.T / 0.07).log_softmax(-1), (cls_BD @ queue.T / 0.07).softmax(-1))
    projected = F.interpolate(local.projector(seen_BChw), (4, 6), mode="bilinear", align_corners=False)
    student_BND, teacher_BND = (
        F.normalize(each.flatten(2).transpose(1, 2), dim=-1) for each in (projected, targets.feature_map)
    )
    similar = [(each @ each.transpose(1, 2) / 0.07).flatten(0, 1) for each in (student_BND, teacher_BND)]
    on_map = batchmean(similar[0].log_softmax(-1), similar[1].softmax(-1))
    assert loss == pytest.approx(float(on_cls + on_map), rel=1e-4)
    distiller.tap._outputs.update(deep=seen_BChw)
    distiller(targets)
    assert torch.allclose(of_queue.queue.rows, torch.cat([cls_BD, cls_BD])[:5]), "the newest first, the oldest dropped"


def test_lightly_2_is_the_squared_error_to_two_blocks_in_a_row() -> None:
    # DistillationV2: MSELoss to the concatenation of the last two blocks, bilinear behind one linear projector.
    distiller, seen_BChw, targets, loss = made(recipes.lightly(version=2))
    both = torch.cat([targets.layers[-2], targets.layers[-1]], 1)
    projectors = [each.projector for each in distiller.terms.losses]
    one = nn.Conv2d(20, 2 * D, 1)
    one.weight.data = torch.cat([each.weight for each in projectors])
    one.bias.data = torch.cat([each.bias for each in projectors])
    resized = F.interpolate(one(seen_BChw), both.shape[2:], mode="bilinear", align_corners=False)
    assert loss == pytest.approx(float(F.mse_loss(resized, both)), rel=1e-5)
    assert all(0.01 < float(each.weight.std()) < 0.03 for each in projectors), "drawn with a deviation of 0.02"


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_found_by_its_name_and_trains_a_student(name: str) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipe.source
    assert recipe == getattr(recipes, name)()
    assert recipes.get(recipe) is recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    torch.manual_seed(0)
    student, batch = Backbone(), images(8)
    teacher = FakeTeacher(hidden_size=D)
    distiller = recipe.for_student(student, teacher, batch)
    assert distiller.spec == recipe.spec
    assert distiller.image_size == recipe.image_size
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=3e-3)
    targets = teacher.extract(batch, recipe.spec)
    losses = []
    with distiller.tap:
        for _ in range(15):
            student(batch)
            loss = distiller(targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss) / distiller.weight)
    assert losses[-1] < 0.9 * losses[0]


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'rtdetr4' \(did you mean 'rtdetrv4'\?\)"):
        recipes.get("rtdetr4")
    with pytest.raises(ConfigError, match="recipe must be one of am_radio, gram"):
        recipes.get(3)  # type: ignore[arg-type]


class Detector(nn.Module):
    """A backbone, and a neck whose maps become finer, and coarser again."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.top = nn.Conv2d(20, 10, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.down = nn.Conv2d(10, 10, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        deep = self.backbone.deep(self.backbone.middle(self.backbone.stem(images)))
        down: Tensor = self.down(self.up(self.top(deep)))
        return down


class AIFI(nn.Sequential):
    """Attention on the deepest map, by its class's name."""


def test_the_layer_is_the_deepest_map_before_maps_become_finer() -> None:
    assert find_layer(Backbone(), images()) == "deep"
    assert find_layer(Backbone(), images(), stride=16) == "middle"
    assert find_layer(Backbone(), images(1, 60, 100), stride=32) == "deep", "grids are rounded down"
    detector = Detector()
    assert find_layer(detector, images(), stride=32) == "top", "the last one that goes into the neck"
    detector.backbone.deep = AIFI(*detector.backbone.deep)
    assert find_layer(detector, images(), stride=32, prefers=("AIFI",)) == "backbone.deep"
    assert find_layer(nn.ModuleDict({"a": Backbone()})["a"], images()) == "deep"


def test_a_student_without_the_stride_is_told_those_that_it_has() -> None:
    with pytest.raises(ConfigError, match="a map of stride 64 for this recipe; it has 4, 16, 32 at 64 x 96"):
        find_layer(Backbone(), images(), stride=64)
    with pytest.raises(ConfigError, match=r"no layer of it gives a map .* give select"):
        find_layer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 96, 2)), images())
    with pytest.raises(ConfigError, match="images must hold a float tensor"):
        find_layer(Backbone(), ["a"])


def test_finding_the_layer_leaves_the_student_as_it_was() -> None:
    student = Backbone()
    student.deep.eval()
    before, modes = copy.deepcopy(student.state_dict()), [each.training for each in student.modules()]
    chance = torch.random.get_rng_state()
    find_layer(student, images())
    assert torch.equal(torch.random.get_rng_state(), chance)
    assert [each.training for each in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(each._forward_hooks for each in student.modules())


def test_layers_may_be_named_each_with_its_weight() -> None:
    recipe = recipes.rtdetrv4(share=None)
    distiller = recipe.for_student(Backbone(), D, images(), layers={"middle": 0.5, "deep": 2.0})
    assert [(term.layer, term.weight) for term in distiller.terms.terms] == [("middle", 0.5), ("deep", 2.0)]
    assert [loss.projector.in_channels for loss in distiller.terms.losses] == [12, 20]
    assert distiller.tap.names == ("middle", "deep")


def test_what_cannot_be_compared_is_said_when_the_recipe_meets_the_student() -> None:
    recipe = recipes.rtdetrv4()
    frozen = Backbone().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"nothing does up to 'deep' \(unfreeze the student first"):
        recipe.for_student(frozen, D, images())
    with pytest.raises(ConfigError, match=r"'head' gives \[3, 3\] \(where outputs are tokens, give select"):
        recipe.for_student(Backbone(), D, images(), layers="head")
    with pytest.raises(ConfigError, match="teacher must be a teacher or a dict of at least one; got an empty one"):
        recipe.for_student(Backbone(), {}, images())
    with pytest.raises(ConfigError, match="teacher must have extract"):
        recipe.for_student(Backbone(), "dinov3", images())  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        recipes.lightly(version=2).for_student(Backbone(), FakeTeacher(depth=1), images())
    with pytest.raises(ConfigError, match="version must be 2 or 3"):
        recipes.lightly(version=1)  # type: ignore[arg-type]


def test_keywords_and_tokens_of_a_student_are_taken_too() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 16, 16)
            self.block = nn.Linear(8, 8)

        def forward(self, pixel_values: Tensor) -> Tensor:
            tokens: Tensor = self.block(self.embed(pixel_values).flatten(2).mT)
            return tokens

    student = Tokens()
    with_map = recipes.rtdetrv4(share=0.1).for_student(
        student, D, {"pixel_values": images()}, layers="block", select=lambda tokens: tokens.mT.unflatten(2, (4, 6))
    )
    with with_map.tap:
        (student(images()).square().mean() + with_map(Features(feature_map=torch.randn(3, D, 4, 6)))).backward()
    assert with_map.share is not None
    assert with_map.share.counted == 1, "the task's gradient is seen behind the function of select"


@pytest.mark.slow
def test_several_teachers_have_heads_of_their_own_and_one_scale() -> None:
    student, batch = Backbone(), images()
    teachers = {"a": FakeTeacher(hidden_size=D), "b": FakeTeacher(hidden_size=D), "c": FakeTeacher(hidden_size=32)}
    distiller = recipes.am_radio(standardise=True).for_student(student, teachers, batch)
    draw = torch.Generator().manual_seed(0)
    mixes = {
        (name, output): (10.0**number * torch.randn(each.hidden_size, each.hidden_size, generator=draw), 5.0 * number)
        for number, (name, each) in enumerate(teachers.items(), 1)
        for output in ("cls", "feature_map")
    }  # channels that depend on one another, of another scale and mean for each teacher and output

    def drawn(name: str, output: str, *shape: int) -> Tensor:
        mix, mean = mixes[name, output]
        return (torch.randn(*shape, len(mix), generator=draw) @ mix + mean).movedim(-1, 1)

    seen = [
        {
            name: Features(cls=drawn(name, "cls", 3), feature_map=drawn(name, "feature_map", 3, 4, 6))
            for name in teachers
        }
        for _ in range(20)
    ]
    distiller.fit_statistics(seen)
    with distiller.tap:
        student(batch)
        distiller(seen[0]).backward()
    compared = {(term.teacher, term.loss.on_cls) for term in distiller.terms.terms}
    assert compared == {(name, on_cls) for name in teachers for on_cls in (False, True)}
    for term in distiller.terms.terms:
        targets = torch.cat([term.loss.target_of(each[term.teacher]) for each in seen])
        assert term.loss.standardise is not None
        found_ND, rows_ND = (
            each.double().movedim(1, -1).flatten(0, -2) for each in (term.loss.standardise(targets), targets)
        )
        # One scale for all channels, so that angles between features stay; each channel has the variance 1 after it.
        centred_ND = rows_ND - rows_ND.mean(0)
        scale = centred_ND.var(0).mean().sqrt()
        assert torch.allclose(found_ND @ found_ND.T, centred_ND @ centred_ND.T / scale**2, atol=1e-3)
        assert torch.allclose(found_ND.mean(0), torch.zeros_like(found_ND[0]), atol=1e-3)
        assert torch.allclose(found_ND.var(0), torch.ones_like(found_ND[0]), atol=1e-3)
    again = recipes.am_radio(standardise=True).for_student(student, teachers, batch)
    again.load_state_dict(distiller.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in distiller.state_dict().items())


@pytest.mark.parametrize("name", recipes.names())
def test_a_student_in_double_precision_has_projectors_of_its_own(name: str) -> None:
    student, batch = Backbone().double(), images().double()
    teacher = FakeTeacher(hidden_size=D)
    distiller = recipes.get(name).for_student(student, teacher, batch)
    assert {parameter.dtype for parameter in distiller.parameters()} <= {torch.float64}
    with distiller.tap:
        (student(batch).square().mean() + distiller(teacher.extract(batch, distiller.spec))).backward()
    halves = recipes.get(name).for_student(Backbone().bfloat16(), teacher, images().bfloat16())
    assert {parameter.dtype for parameter in halves.parameters()} <= {torch.float32}


def test_a_schedule_warms_up_decays_and_ends_and_goes_on_after_a_pause() -> None:
    schedule = WeightSchedule(warmup=2, decay_from=4, until=6)
    distiller, seen, targets, _ = made(recipes.gram(weight=1.0, schedule=schedule))
    factors, distances = [], []
    for _ in range(8):
        factors.append(distiller.weight)
        distiller.tap._outputs.update(deep=seen.requires_grad_())
        distances.append(float(distiller(targets)))
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 0.5, 0, 0])
    whole = distances[2]
    assert distances == pytest.approx([whole * factor for factor in factors])
    again, *_ = made(recipes.gram(weight=1.0, schedule=schedule))
    again.load_state_dict(distiller.state_dict())
    assert again.get_extra_state().tolist() == [8, 0], "steps and epochs"
    epochs, *_ = made(recipes.gram(weight=1.0, schedule=WeightSchedule(unit="epoch", until=2)))
    epochs.set_epoch(1)
    assert epochs.weight == 1
    epochs.set_epoch(1.5)  # type: ignore[arg-type]
    assert epochs.get_extra_state().tolist() == [0, 1]
    epochs.set_epoch(2)
    assert epochs.weight == 0


def test_a_distiller_can_be_copied_with_its_student_while_it_is_in_use() -> None:
    student = Backbone()
    both = nn.ModuleDict({"student": student, "distiller": recipes.rtdetrv4().for_student(student, D, images())})
    with both["distiller"].tap:
        student(images())
        twin = copy.deepcopy(both)
    assert twin["distiller"].tap._module is twin["student"]
    assert not twin["distiller"].tap.attached
    assert pickle.loads(pickle.dumps(twin))["distiller"].tap.names == ("deep",)


class Distilled(nn.Module):
    """A student with the distiller of itself, as one module to train and to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Backbone()
        self.distiller = recipes.rtdetrv4().for_student(self, D, images())

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.net(images)
        return output


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_student_may_hold_its_distiller_and_be_copied(copied: Any) -> None:
    student = Distilled()
    targets = Features(feature_map=torch.randn(3, D, 2, 3))
    with student.distiller.tap:
        loss = student(images()).square().mean() + student.distiller(targets)
        student(images())  # a graph that is held
        twin = copied(student)
    assert twin.distiller.tap.names == student.distiller.tap.names == ("net.deep",)
    assert twin.distiller.tap._module is twin
    with twin.distiller.tap:
        again = twin(images()).square().mean() + twin.distiller(targets)
        again.backward()
    assert torch.isclose(again, loss)
    assert twin.net.stem.weight.grad is not None
    assert student.net.stem.weight.grad is None
