"""What a user says of the distillation to a trainer that takes plain arguments: :class:`Distillation`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from dinov3_ray.errors import ConfigError
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.integrations.levels import Levels, level_weights
from dinov3_ray.training.losses import LossKind
from dinov3_ray.training.prefetch import AnyTeacher
from dinov3_ray.training.recipes import Recipe, RecipeTerm, get

__all__ = ["Distillation"]

_CHANGED = "recipe_changed"  # whether a saved run's recipe had other options than the published ones
_OF_A_RECIPE = ("distill_kind", "distill_weight", "object_weight", "background_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """The trainers' arguments besides Ultralytics' own.

    Args:
        teacher: the name of a pool; or a teacher, which must be picklable for training on several GPUs.
        teacher_address: of the Ray that the pool runs in; None takes the one of this process, or RAY_ADDRESS.
        teacher_map_size: (h, w) to which the teacher resamples its maps, so that fewer bytes travel.
        distill_layer: the student's layers: ``"P4"`` or ``16`` or ``"model.16"``; several as ``"P3,P4,P5"`` or in a
            list; with weights as ``"P3:0.5,P4:1"`` or in a dict (:data:`~dinov3_ray.integrations.levels.Levels`). None
            takes the head's input whose stride is nearest to 16, or the layer that the recipe finds.
        recipe: a name of :mod:`~dinov3_ray.training.recipes`, or a Recipe, in place of the options that follow.
        distill_kind: ``cosine`` (None), ``mse``, ``smooth_l1`` or ``gram``.
        distill_weight: the weight of this loss, which is the weighted sum over the layers, in the sum with the
            detector's; None is 1.
        object_weight: of locations inside boxes; None is 1.
        background_weight: of the others; None is 0.25.
    """

    teacher: str | AnyTeacher
    teacher_address: str | None = None
    teacher_map_size: tuple[int, int] | None = None
    distill_layer: Levels | None = None
    recipe: str | Recipe | None = None
    distill_kind: LossKind | None = None
    distill_weight: float | None = None
    object_weight: float | None = None
    background_weight: float | None = None

    def __post_init__(self) -> None:
        if self.distill_layer is not None:
            object.__setattr__(self, "distill_layer", level_weights(self.distill_layer))
        given = [name for name in _OF_A_RECIPE if getattr(self, name) is not None]
        if self.recipe is not None and given:
            raise ConfigError(
                f"{', '.join(given)} must be left out where a recipe gives them; got recipe={get(self.recipe).name!r} "
                "(another weight is an option of the recipe: recipe=recipes.rtdetrv4(weight=2.0))"
            )

    def to_recipe(self) -> Recipe:
        """The recipe; or these options as one."""
        if self.recipe is not None:
            recipe = get(self.recipe)
        else:
            kind = self.distill_kind or "cosine"
            term = RecipeTerm(
                kind=kind,
                projector=None if kind == "gram" else "linear",
                object_weight=1.0 if self.object_weight is None else self.object_weight,
                background_weight=0.25 if self.background_weight is None else self.background_weight,
            )
            recipe = Recipe(
                name="options",
                source="",
                spec=FeatureSpec(feature_map=True),
                image_size=None,
                terms=(term,),
                weight=1.0 if self.distill_weight is None else self.distill_weight,
            )
        if self.teacher_map_size is None:
            return recipe
        return replace(recipe, spec=replace(recipe.spec, map_size=self.teacher_map_size))

    @classmethod
    def take_from(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take these arguments, as far as they are given, out of ``arguments``: Ultralytics refuses those of others.

        Raises:
            ConfigError: without ``teacher``.
        """
        own = {field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments}
        if own.get("teacher") is None:
            raise ConfigError("teacher must be given: model.train(..., teacher='dinov3'), the name of a running pool")
        return own

    def to_arguments(self) -> dict[str, Any]:
        """All arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_resume(self) -> dict[str, Any]:
        """What a resumed run takes over unless it is given: all but where the teacher is, and a recipe's options."""
        arguments = self.to_arguments()
        del arguments["teacher"], arguments["teacher_address"]
        if self.recipe is not None:
            recipe = get(self.recipe)
            arguments |= {"recipe": recipe.name, _CHANGED: recipe != get(recipe.name)}
        return arguments

    @classmethod
    def resumed(cls, saved: dict[str, Any], given: dict[str, Any]) -> Distillation:
        """The options of a run that continues, with ``given``, one that saved ``saved`` (empty: nothing).

        Raises:
            ConfigError: the two contradict one another.
        """
        saved = dict(saved)
        changed = saved.pop(_CHANGED, False)
        if saved and "recipe" in given:
            name = None if given["recipe"] is None else get(given["recipe"]).name
            if name != saved["recipe"]:
                raise ConfigError(
                    f"recipe must be that of the run which is resumed, {saved['recipe']!r}; got {name!r} (leave it "
                    "out; or delete distill.pt, and the distillation begins anew)"
                )
        elif changed:
            raise ConfigError(
                f"recipe must be given again where a run is resumed whose recipe had options: recipe=recipes."
                f"{saved['recipe']}(...)"
            )
        return cls(**{**saved, **given})
