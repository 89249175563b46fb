"""The one interface that local, stored, cached, fake and remote teachers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

from dinov3_ray.errors import ConfigError

if TYPE_CHECKING:  # an interface loads nothing
    from torch import Tensor

    from dinov3_ray.features import Features, FeatureSpec
    from dinov3_ray.images import Images

__all__ = ["Extractor", "Teacher", "TeacherMixin", "check_extractor", "computed_in", "least_side"]

Given = TypeVar("Given", contravariant=True)
"""What a teacher accepts as images."""


@runtime_checkable
class Extractor(Protocol):
    """The least that a pool can serve: what a factory passed to ``TeacherPool.start`` must return.

    It may also have a ``device``, a torch.device. If that is a CUDA device, a replica passes images that are on it
    already, and continues while the results are still being computed in the current stream.

    It may have a method ``warm_up_passes(rows)`` too, which yields (images, spec): what a replica computes before it
    takes work, in this order, so that batches of up to ``rows`` images find memory and compiled code in place.
    """

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        """All outputs that ``spec`` asks for, from one forward pass."""
        ...


@runtime_checkable
class Teacher(Extractor, Protocol):
    """A teacher as a training loop sees it, wherever it computes.

    An implementation may also have a ``fingerprint: str`` (what made its outputs), an ``origin: str`` (what it was
    loaded from), a ``license: str`` (of its weights, for who gets results), a ``dtype`` (a torch.dtype: that of native
    results), a ``computed_in: str`` (where that says more, as in float8), a ``preprocessing``
    (:class:`~dinov3_ray.config.preprocessing.Preprocessing`) and a ``patch_size: int`` (pixels per cell of its map);
    each is looked up by name and may be missing.
    """

    def extract_features(self, images: Images) -> Tensor:
        """CLS tokens, float32 [B, D]."""
        ...

    def extract_feature_map(self, images: Images) -> Tensor:
        """Patch tokens as a map, float32 [B, D, h, w]."""
        ...


class TeacherMixin(Generic[Given]):
    """The two methods that every :class:`Teacher` derives from its ``extract``."""

    if TYPE_CHECKING:

        def extract(self, images: Given, spec: FeatureSpec) -> Features: ...

    def extract_features(self, images: Given) -> Tensor:
        """CLS tokens, float32 [B, D] whatever the compute dtype; errors as in ``extract``."""
        from dinov3_ray.features import FeatureSpec  # here, since an interface loads no torch

        cls_BD = self.extract(images, FeatureSpec(cls=True, dtype="float32")).cls
        assert cls_BD is not None
        return cls_BD

    def extract_feature_map(self, images: Given) -> Tensor:
        """Patch tokens as a map, float32 [B, D, h, w] whatever the compute dtype; errors as in ``extract``."""
        from dinov3_ray.features import FeatureSpec

        map_BDhw = self.extract(images, FeatureSpec(feature_map=True, dtype="float32")).feature_map
        assert map_BDhw is not None
        return map_BDhw


def check_extractor(teacher: object) -> Extractor:
    """``teacher``, if it is one that is made already.

    Raises:
        ConfigError: it is not; such as a configuration, the name of a pool, or a class.
    """
    if isinstance(teacher, Extractor) and not isinstance(teacher, type):
        return teacher
    raise ConfigError(
        "teacher must be an object with .extract(images, spec), such as DinoV3Teacher(config) or "
        f"RemoteTeacher('dinov3'); got {teacher!r}"
    )


def computed_in(teacher: object) -> str | None:
    """The precision in which ``teacher`` computes, such as float32, bfloat16 or float8; None if it does not say.

    A fingerprint does not contain it, since the weights are the same. Stored results need both.
    """
    said = getattr(teacher, "computed_in", None) or getattr(teacher, "dtype", None)
    return None if said is None else str(said).removeprefix("torch.")


def least_side(teacher: object) -> int:
    """Pixels of the smallest side of an image that ``teacher`` takes: its patch, or, where it sees half of an image,
    two; 1 if it does not say."""
    rule = getattr(teacher, "preprocessing", None)
    return max(getattr(teacher, "patch_size", None) or 1, getattr(rule, "least_side", 1))
