"""Published recipes of distillation, by name: spec, teacher's image size, student's layer, projectors, losses, weights.

::

    recipe = recipes.get("rtdetrv4")
    distiller = recipe.for_student(student, teacher, images)

Each recipe is a function with options. What a source says, and where this package departs from it, stands there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinov3_ray.config.preprocessing import Size, ViewSize, followed_size
from dinov3_ray.errors import ConfigError, describe
from dinov3_ray.features import FeatureSpec
from dinov3_ray.teacher import Extractor
from dinov3_ray.training.distiller import Distiller
from dinov3_ray.training.layer_search import find_layer, run_student
from dinov3_ray.training.losses import LossKind, PhiS, Term, WeightedTerms, WeightSchedule
from dinov3_ray.training.losses.schedule import is_number
from dinov3_ray.training.recipe_term import RecipeTerm
from dinov3_ray.training.taps import FeatureTap, Select

__all__ = [
    "Recipe",
    "RecipeTerm",
    "am_radio",
    "get",
    "gram",
    "lightly",
    "names",
    "rtdetrv4",
    "ultralytics",
]

_GREY = 114
_GREY_SIDE = 224  # of the image by which a teacher's channels are found, where the student's is not a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A way to distil, before student and teacher are known. It can be pickled, and compared.

    Attributes:
        name: as :func:`get` takes it.
        source: the paper or repository.
        spec: what the teacher computes.
        image_size: the teacher's input; None if it does not matter.
        terms: the losses.
        stride: pixels per location of the student's map that is compared; None is its deepest map.
        prefers: parts of class names of layers that are taken before others.
        weight: of the sum of the terms; where ``share`` is given, that of the first step.
        share: the distillation's share of the gradient at the tapped tensor; None keeps ``weight``.
        schedule: of the weight; None is constant.
        standardise: whether the teachers' features are standardised (:class:`~dinov3_ray.training.losses.PhiS`).

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    name: str
    source: str
    spec: FeatureSpec
    image_size: ViewSize | None
    terms: tuple[RecipeTerm, ...]
    stride: int | None = None
    prefers: tuple[str, ...] = ()
    weight: float = 1.0
    share: float | None = None
    schedule: WeightSchedule | None = None
    standardise: bool = False

    def __post_init__(self) -> None:
        _require("weight", self.weight, "a number above 0", lambda weight: 0 < weight < math.inf)
        if self.share is not None:
            _require("share", self.share, "a share of the gradient, between 0 and 1", lambda share: 0 < share < 1)
        if not isinstance(self.schedule, WeightSchedule | None):
            raise ConfigError(
                f"schedule must be a WeightSchedule, such as WeightSchedule(warmup=500); got {self.schedule!r}"
            )

    def for_student(
        self,
        student: nn.Module,
        teacher: Extractor | int | Mapping[str, Extractor | int],
        images: Any,
        layers: str | Sequence[str] | Mapping[str, float] | None = None,
        select: Select | Mapping[str, Select] | None = None,
    ) -> Distiller:
        """The recipe for this student: its layer found, projectors of the right channels made on its device.

        The student runs once, in eval mode; its modes and torch's random numbers stay as they were.

        Args:
            student: any module.
            teacher: anything with ``extract(images, spec)``, which computes one grey image; or its channels D; or
                several by name, each of which the student gets projectors for.
            images: an example batch that the student takes: a float tensor [B, 3, H, W], a mapping of its keywords, or
                a list of images.
            layers: the student's layers, by name; or with the weight of each; None finds one (its name is
                ``distiller.tap.names``), and refuses one behind which most of a Vision Transformer stands.
            select: as in :class:`~dinov3_ray.training.taps.FeatureTap`.

        Raises:
            ConfigError: no layer fits, it gives no map, or nothing learns up to it.
        """
        if layers is None:
            layers = find_layer(student, images, stride=self.stride, prefers=self.prefers)
        weights = (
            dict(layers)
            if isinstance(layers, Mapping)
            else dict.fromkeys((layers,) if isinstance(layers, str) else layers, 1.0)
        )
        outputs = self._outputs(student, images, list(weights), select)
        channels = self._channels(teacher, images)
        terms = []
        statistics: dict[tuple[str | None, bool, int | None], PhiS] = {}
        for layer, output in outputs.items():
            for name, of_terms in channels.items():
                for term, width in zip(self.terms, of_terms, strict=True):
                    key = (name, term.on_cls, term.layer)
                    if self.standardise and key not in statistics:
                        statistics[key] = PhiS(width)
                    loss = term.loss(output, width, statistics.get(key))
                    terms.append(Term(layer, loss, weights[layer] * term.weight, name))
        distiller = Distiller(
            student,
            WeightedTerms(terms),
            self.spec,
            select=select,
            image_size=self.image_size,
            weight=self.weight,
            share=self.share,
            schedule=self.schedule,
        )
        return distiller.to(next(iter(outputs.values())).device)

    def misfit(self, teacher_size: object, view: Size, patch_size: int = 16) -> str | None:
        """What to say of a teacher whose input is not the recipe's; None if it fits, or nothing is known.

        Args:
            teacher_size: its ``image_size``.
            view: (H, W) of the images that it is given.
            patch_size: its own, of which the size that the recipe means is a multiple.
        """
        if self.image_size is None or teacher_size is None or teacher_size == self.image_size:
            return None
        meant = followed_size(self.image_size, view, patch_size)
        size: Any = teacher_size if isinstance(teacher_size, str) else tuple(teacher_size)  # type: ignore[arg-type]
        if size == meant or (size == view and self.image_size == "input"):  # a model cuts off the rest itself
            return None
        given = size if isinstance(size, str) else "{} x {} px".format(*size)
        return (
            f"the teacher computes views of {view[0]} x {view[1]} px at {given}, and recipe {self.name!r} means "
            f"{self.image_size!r}, which is {meant[0]} x {meant[1]} px here (DinoV3Config(root, "
            f"image_size={self.image_size!r}), or --image-size {self.image_size} of dinov3-ray up, gives it)"
        )

    def _outputs(self, student: nn.Module, images: Any, layers: list[str], select: Any) -> dict[str, Tensor]:
        with FeatureTap(student, layers, select=select) as tap:
            run_student(student, images)
            outputs = {name: tap[name] for name in tap.names}
        tap.clear()
        for name, output in outputs.items():
            if output.ndim != 4 and not (output.ndim == 2 and all(term.on_cls for term in self.terms)):
                raise ConfigError(
                    f"layers must name layers that give maps [B, C, h, w]; {name!r} gives {list(output.shape)} (where "
                    "outputs are tokens, give select, a function that makes a map of them)"
                )
            if not output.requires_grad:
                raise ConfigError(
                    f"layers must name layers up to which something learns; nothing does up to {name!r} (unfreeze the "
                    "student first, or name a later layer)"
                )
        return outputs

    def _channels(self, teacher: Any, images: Any) -> dict[str | None, list[int]]:
        """The channels of each teacher's target, of each term."""
        named = dict(teacher) if isinstance(teacher, Mapping) else {None: teacher}
        if not named:
            raise ConfigError("teacher must be a teacher or a dict of at least one; got an empty one")
        found: dict[str | None, list[int]] = {}
        for name, each in named.items():
            if isinstance(each, int) and not isinstance(each, bool):
                found[name] = [each] * len(self.terms)
            elif hasattr(each, "extract"):
                size = images.shape[-2:] if isinstance(images, Tensor) and images.ndim == 4 else (_GREY_SIDE,) * 2
                grey = torch.full((1, 3, *size), _GREY, dtype=torch.uint8)
                features = each.extract(grey, self.spec)
                found[name] = [term.target(features).shape[1] for term in self.terms]
            else:
                raise ConfigError(f"teacher must have extract(images, spec), or be its channels; got {describe(each)}")
        return found


def rtdetrv4(*, weight: float = 5.0, share: float | None = 0.11, schedule: WeightSchedule | None = None) -> Recipe:
    """Cosine on the map of stride 32 that a detector's neck begins with (F5), a linear projector, a weight that adapts.

    The teacher sees the view at half its size, so that its patches of 16 px are the student's 32. The source halves it
    by the mean of 2 × 2 pixels (``AvgPool2d(2)``), and ``image_size="input/2"`` by an antialiased bilinear resize,
    whose filter goes over 4 × 4: the teacher's values differ a little, and its grid does not. The layer is the output
    of AIFI, the attention on the deepest map, where the student has a layer of that class (RT-DETR, D-FINE, DEIM); else
    its deepest map of stride 32.

    Args:
        weight: of the first step; the source begins with 5 for S and M, 15 for L and 20 for X.
        share: of the gradient; 0.11 is the source's for S (0.035 for M, 0.02 for L and X). It measures another one:
            see :class:`~dinov3_ray.training.losses.GradientShare`. None keeps the weight, as the source's ablation has
            it.
        schedule: of the weight.

    Source: RT-DETRv4 (arXiv 2510.25257) and its repository, RT-DETRs/RT-DETRv4: ``loss_distillation``,
    ``feature_projector``, the teacher's ``avgpool_2x2`` of the normalised view, and ``distill_adaptive_params``.
    """
    return Recipe(
        name="rtdetrv4",
        source="RT-DETRv4, arXiv 2510.25257",
        spec=FeatureSpec(feature_map=True),
        image_size="input/2",
        terms=(RecipeTerm(kind="cosine"),),
        stride=32,
        prefers=("AIFI",),
        weight=weight,
        share=share,
        schedule=schedule,
    )


def ultralytics(*, weight: float = 6.0, schedule: WeightSchedule | None = None) -> Recipe:
    """Cosine on the backbone's last map, of stride 32, with the teacher at half the view.

    Args:
        weight: Ultralytics' ``dis``, 6 by default.
        schedule: of the weight.

    Source: the repository ultralytics/ultralytics, whose trainer takes a DINOv3 teacher for detectors since commit
    08de290. The projector (two 1 × 1 convolutions with ReLU between them) and the weight are those of ``distill_model``
    in its release 8.4.190. That release distils from another YOLO only: it compares all inputs of the head by squared
    errors, which it weighs by the scores of the teacher's head, and a DINOv3 has no such scores.
    """
    return Recipe(
        name="ultralytics",
        source="ultralytics/ultralytics, distill_model",
        spec=FeatureSpec(feature_map=True),
        image_size="input/2",
        terms=(RecipeTerm(kind="cosine", projector="relu"),),
        stride=32,
        weight=weight,
        schedule=schedule,
    )


def am_radio(
    *,
    cosine: float = 0.9,
    smooth_l1: float = 0.1,
    hidden: int | None = None,
    standardise: bool = False,
    weight: float = 1.0,
    schedule: WeightSchedule | None = None,
) -> Recipe:
    """Cosine on CLS; 0.9 cosine + 0.1 smooth L1 on the map; for each a head of two layers with LayerNorm and GELU.

    A student without a CLS token has the mean of its deepest map in its place. Several teachers, by name, get heads of
    their own; ``standardise`` brings their maps and vectors to one scale, as its successor does (PHI-S, arXiv
    2410.01680), by the statistics of the first batch, or of what ``distiller.fit_statistics`` gets.

    Args:
        cosine, smooth_l1: the weights on the map, α and β; what has the weight 0 is left out.
        hidden: channels in the middle of a head; None takes the teacher's.
        standardise: whether the teachers' features are standardised.
        weight: of the sum.
        schedule: of the weight.

    Source: AM-RADIO (arXiv 2312.06709), and ``radio/adaptor_mlp.py`` of the repository NVlabs/RADIO. There, the student
    is a Vision Transformer; where grids differ, the smaller one is interpolated; here the teacher's is.
    """
    for name, value in (("cosine", cosine), ("smooth_l1", smooth_l1)):
        _require(name, value, "a number of at least 0", lambda weight: 0 <= weight < math.inf)
    if hidden is not None:
        _require("hidden", hidden, "an integer of at least 1", _is_count)
    head: dict[str, Any] = {"projector": "mlp", "hidden": hidden}
    weights: dict[LossKind, float] = {"cosine": cosine, "smooth_l1": smooth_l1}
    on_map = tuple((kind, value) for kind, value in weights.items() if value)
    return Recipe(
        name="am_radio",
        source="AM-RADIO, arXiv 2312.06709",
        spec=FeatureSpec(cls=True, feature_map=bool(on_map)),
        image_size="input",
        terms=(RecipeTerm(kind="cls_cosine", **head), *([RecipeTerm(kind=on_map, **head)] if on_map else [])),
        weight=weight,
        schedule=schedule,
        standardise=standardise,
    )


def gram(*, weight: float = 2.0, per_image: bool = True, schedule: WeightSchedule | None = None) -> Recipe:
    """Gram anchoring: which locations resemble which, on the student's grid; there is no projector.

    The teacher sees the view at full size. Its grid of 16 px is then finer than the student's of 32, which it is
    reduced to, as DINOv3's Gram teacher works at twice the student's resolution. The paper reduces by bicubic
    interpolation, and this package by the mean over an area.

    Args:
        weight: the paper's.
        per_image: pairs of locations within an image, as the paper writes it; False adds those across the batch.
        schedule: of the weight. In the paper, the loss begins late, after a million steps.

    Source: DINOv3 (arXiv 2508.10104, section 4.2), and ``dinov3/loss/gram_loss.py`` of facebookresearch/dinov3, which
    takes the mean of the squares where the paper writes their sum.
    """
    return Recipe(
        name="gram",
        source="DINOv3, arXiv 2508.10104",
        spec=FeatureSpec(feature_map=True),
        image_size="input",
        terms=(RecipeTerm(kind="gram", projector=None, per_image=per_image),),
        weight=weight,
        schedule=schedule,
    )


def lightly(
    *,
    version: Literal[2, 3] = 3,
    local_weight: float = 1.0,
    temperature: float = 0.07,
    queue: int = 8192,
    weight: float = 1.0,
    schedule: WeightSchedule | None = None,
) -> Recipe:
    """LightlyTrain's distillation of a backbone: v3, global and dense, or v2, dense only.

    v3, which it advises for DINOv3: KL divergence between likenesses, of the image to a queue of the teacher's images,
    and of each location to the others of its image. v2: squared errors to the teacher's last two blocks. Both with
    linear projectors, on the teacher's grid. A student without a CLS token has the mean of its deepest map in its
    place. v2 projects, and resizes then; here, it is resized first, which is the same for a linear projector where maps
    grow (where they shrink, by the mean over an area, and LightlyTrain interpolates).

    Args:
        version: 3 or 2.
        local_weight: of v3's dense loss; 0 leaves it out.
        temperature: of v3.
        queue: rows of v3's queue; the source takes 8192 for data sets beyond 20,000 images, and about a quarter of
            smaller ones.
        weight: of the sum.
        schedule: of the weight.

    Source: the repository lightly-ai/lightly-train, ``_methods/distillationv2`` and ``_methods/distillationv3``. It
    mixes images up (mixup) before both models see them, which is the loader's part here.
    """
    if version not in (2, 3):
        raise ConfigError(f"version must be 2 or 3; got {version!r}")
    _require("local_weight", local_weight, "a number of at least 0", lambda weight: 0 <= weight < math.inf)
    _require("temperature", temperature, "a number above 0", lambda value: 0 < value < math.inf)
    _require("queue", queue, "an integer of at least 1", _is_count)
    linear: dict[str, Any] = {"projector": "linear", "deviation": 0.02}
    terms: tuple[RecipeTerm, ...]
    if version == 3:
        spec = FeatureSpec(cls=True, feature_map=local_weight > 0)
        terms = (RecipeTerm(kind="cls_queue", queue=queue, temperature=temperature, **linear),)
        if local_weight:
            local = RecipeTerm(kind="relation", weight=local_weight, align="teacher", temperature=temperature, **linear)
            terms = (*terms, local)
    else:  # the mean over the channels of two blocks in a row is that of two terms
        spec = FeatureSpec(layers=(-2, -1))
        terms = tuple(
            RecipeTerm(kind="mse", weight=0.5, align="teacher", layer=layer, **linear) for layer in spec.layers
        )
    return Recipe(
        name="lightly",
        source=f"lightly-ai/lightly-train, distillationv{version}",
        spec=spec,
        image_size="input",
        terms=terms,
        weight=weight,
        schedule=schedule,
    )


def _require(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    if not is_number(value) or not holds(value):
        raise ConfigError(f"{name} must be {rule}; got {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


_RECIPES: dict[str, Callable[[], Recipe]] = {
    "am_radio": am_radio,
    "gram": gram,
    "lightly": lightly,
    "rtdetrv4": rtdetrv4,
    "ultralytics": ultralytics,
}


def names() -> tuple[str, ...]:
    """The names of all recipes."""
    return tuple(_RECIPES)


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, with its published options; a :class:`Recipe` passes through.

    Raises:
        ConfigError: there is none of that name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in _RECIPES:
        near = difflib.get_close_matches(str(recipe), _RECIPES, n=1, cutoff=0.5)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"recipe must be one of {', '.join(_RECIPES)}, or a Recipe; got {recipe!r}{meant}")
    return _RECIPES[recipe]()
