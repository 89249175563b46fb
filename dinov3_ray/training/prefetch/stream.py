"""Targets ahead of the training loop: while the student computes one batch, the teacher computes the next ones."""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, cast, overload

import numpy as np
import torch
from torch import Tensor

from dinov3_ray.errors import ConfigError, PoolError, SpecError, describe
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.model.device import as_device
from dinov3_ray.teacher import Extractor
from dinov3_ray.training.prefetch.depth import Depth
from dinov3_ray.training.prefetch.loader_reader import LoaderReader
from dinov3_ray.training.prefetch.pipeline import Pipeline, Submitter, as_source
from dinov3_ray.training.prefetch.routes import join_targets
from dinov3_ray.training.recipes import Recipe, get

__all__ = [
    "AnyTeacher",
    "OnReload",
    "Prefetch",
    "PrefetchOptions",
    "PrefetchStatistics",
    "Route",
    "find_images",
    "prefetch",
]


AnyTeacher = Submitter | Extractor
"""A pool's client, or a teacher of this process: local, stored, cached, fake, or the user's own with ``extract``."""

OnReload = Literal["warn", "raise"]

log = logging.getLogger("dinov3_ray")

Batch = TypeVar("Batch")
Targets = TypeVar("Targets")

Route = Callable[[Batch], Sequence[str] | Sequence[int] | np.ndarray | Tensor]
"""Gives, of the B images of a batch, each one's teacher: its name, or its place among the teachers."""

_WARN_SHARE = 0.05
_WARN_AFTER = 20  # steps
_DRAWS_WHEN_READY = 2  # batches to draw from the loader per step while the teacher is ahead: the pipeline fills gently
_DEPTH_TOGETHER = 4  # batches ahead where all ranks must draw in the same steps
_THE_ONE = ""  # the name of a teacher that is not one of several


class PrefetchOptions(TypedDict, Generic[Batch], total=False):
    """The options of :func:`prefetch`, as ``RemoteTeacher.prefetch`` takes them too.

    Attributes:
        images: returns the images of a batch, and must not change them later. They are the view that the student sees,
            exactly. uint8 has a quarter of float32's bytes on the network; images on the CPU are not fetched from a
            GPU. None is :func:`find_images`.
        depth: batches kept ahead of the loop; ``auto`` finds it (:class:`~dinov3_ray.training.prefetch.depth.Depth`).
        device: where targets must be; None leaves them where the teacher puts them (a pool's: the CPU).
        on_reload: what to do when a teacher's fingerprint changes, because a pool was reloaded: ``warn``, or ``raise``
            PoolError before the first batch of the new teacher is delivered.
        recipe: gives the spec, in its place: a name of :mod:`~dinov3_ray.training.recipes`, or a Recipe. Warns once if
            the teacher's image size is not the one that it means.
    """

    images: Callable[[Batch], Images] | None
    depth: int | Literal["auto"]
    device: torch.device | str | int | None
    on_reload: OnReload
    recipe: str | Recipe | None


@dataclass(frozen=True, slots=True)
class PrefetchStatistics:
    """Counts and times of the loop, over all passes so far.

    Attributes:
        steps: batches delivered.
        seconds: the student's time and its waits, from the first delivery of each pass. The time of the loader and of
            ``images`` is not in it.
        wait_seconds: the part of ``seconds`` in which the loop waited for the teacher.
        fill_seconds: the waits for the first batch of each pass, which cannot be prefetched; not in ``seconds``.
        depth: batches kept ahead of the loop now.
        resends: requests that the teachers' pools sent again since the first pass began; 0 without a pool.
    """

    steps: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    fill_seconds: float = 0.0
    depth: int = 0
    resends: int = 0

    @property
    def wait_share(self) -> float:
        """``wait_seconds`` over ``seconds``; 0 before the second batch."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0


class Prefetch(Generic[Batch, Targets]):
    """Iterates over ``(batch, targets)``, in the loader's order, with the teacher working ahead; see :func:`prefetch`.

    Each ``for`` begins a new pass over the loader. When a ``break``, an exception or Ctrl-C leaves the loop early, what
    is in flight is cancelled; ``close()`` of the iterator does the same. If the loader is an iterator, such as a
    generator, the next ``for`` continues behind the last batch delivered.

    It has the loader's attributes. ``state_dict()`` is the loader's state after the last batch delivered.
    """

    def __init__(
        self,
        teachers: AnyTeacher | Mapping[str, AnyTeacher],
        loader: Iterable[Batch],
        spec: FeatureSpec | Mapping[str, FeatureSpec] | None = None,
        *,
        images: Callable[[Batch], Images] | None = None,
        depth: int | Literal["auto"] = "auto",
        device: torch.device | str | int | None = None,
        on_reload: OnReload = "warn",
        route: Route[Batch] | None = None,
        recipe: str | Recipe | None = None,
    ) -> None:
        if images is not None and not callable(images):
            raise ConfigError(f"images must be a function of a batch, such as lambda batch: batch['img']; got {images}")
        if on_reload not in ("warn", "raise"):
            raise ConfigError(f"on_reload must be 'warn' or 'raise'; got {on_reload!r}")
        self._images = images or find_images
        self._several = isinstance(teachers, Mapping)
        self._teachers = dict(teachers) if isinstance(teachers, Mapping) else {_THE_ONE: teachers}
        if not self._teachers:
            raise ConfigError("teacher must be a teacher or a dict of at least one; got an empty one")
        self._sources = {name: as_source(teacher) for name, teacher in self._teachers.items()}
        self._recipe = None if recipe is None else get(recipe)  # until the first batch was compared with it
        self._specs = _by_teacher(_spec_of(spec, self._recipe), list(self._teachers))
        self._route = _checked_route(route, self._several, self._specs)
        self._reader = LoaderReader(loader, self._look)
        self._device = None if device is None else as_device(device)
        self._raise_on_reload = on_reload == "raise"
        self._depth = Depth(_DEPTH_TOGETHER if depth == "auto" and self._reader.draws_together else depth)
        if self._reader.has_state:  # set here and not in the class: trainers look whether a loader has them
            self.state_dict, self.load_state_dict = self._reader.state_dict, self._reader.load_state_dict
        self._steps = 0
        self._seconds = 0.0
        self._wait_seconds = 0.0
        self._fill_seconds = 0.0
        self._warned = False
        self._fingerprints: dict[str, str | None] = {}
        self._resends_before: int | None = None
        self._resends = 0

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        return self._pass()

    def __len__(self) -> int:
        """Batches of one pass, if the loader knows."""
        if not isinstance(self.loader, Sized):
            raise TypeError(f"the loader, a {type(self.loader).__name__}, has no length")
        return len(self.loader)

    @property
    def loader(self) -> Iterable[Batch]:
        """The loader, as it was given."""
        return self._reader.loader

    def __getattr__(self, name: str) -> Any:
        """The loader's attribute of that name, such as ``dataset``, ``batch_size`` or ``sampler``."""
        if name.startswith("__") or name == "_reader":  # an object that is being copied has no loader to ask yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def statistics(self) -> PrefetchStatistics:
        """A snapshot; it stays readable after the loop."""
        return PrefetchStatistics(
            self._steps, self._seconds, self._wait_seconds, self._fill_seconds, self._depth.batches, self._resends
        )

    def __repr__(self) -> str:
        so_far = self.statistics()
        return f"<Prefetch {so_far.steps} batches, depth {so_far.depth}, waited {so_far.wait_share:.1%} of the time>"

    # One pass -------------------------------------------------------------------------------------------------------

    def _pass(self) -> Generator[tuple[Batch, Targets], None, None]:
        # Clients connect here, in the caller's thread, where an error shows at once and Ctrl-C works.
        self._depth.begin(self._parallelism())
        if self._resends_before is None:
            self._resends_before = self._pool_resends()
        reader = self._reader
        reader.begin()
        pipeline = Pipeline(self._sources, self._specs, self._device)
        routes: deque[Sequence[str] | None] = deque()  # of the batches in the pipeline
        loop_began: float | None = None  # when the loop's body began, plus the loader's time since
        try:
            while True:
                drawn, waited = 0, 0.0
                while self._wants_more(pipeline, drawn):
                    began = time.perf_counter()
                    drawn_now = reader.draw()
                    loaded = time.perf_counter()
                    if loop_began is not None:
                        loop_began += loaded - began
                    if drawn_now is not None:
                        pipeline.put(*drawn_now)
                        routes.append(drawn_now[1])
                        drawn += 1
                    del drawn_now
                    waited += time.perf_counter() - loaded
                if not len(pipeline):
                    return
                began = time.perf_counter()
                features = pipeline.take()
                route = routes.popleft()
                now = time.perf_counter()
                waited += now - began
                self._check_fingerprints(features)
                self._steps += 1
                self._resends = self._pool_resends() - self._resends_before
                if loop_began is None:
                    self._fill_seconds += waited
                else:
                    self._count(waited, now - loop_began)
                loop_began = now
                batch = reader.deliver()
                yield batch, self._targets(features, route)
                del batch, features  # the caller's now: they must not stay in memory here while the next ones come
        finally:
            pipeline.close()
            reader.end()

    def _wants_more(self, pipeline: Pipeline, drawn: int) -> bool:
        """Whether to draw another batch before the next is delivered."""
        if len(pipeline) >= self._depth.batches or not self._reader.may_draw():
            return False
        if not len(pipeline) or drawn < _DRAWS_WHEN_READY or self._reader.draws_together:
            return True
        return not pipeline.ready()  # a slow loader must not delay a batch whose targets are ready

    def _look(self, batch: Batch) -> tuple[Images, Sequence[str] | None]:
        """The images of a batch and, of each, the name of its teacher."""
        images = self._images(batch)
        if self._recipe is not None:
            _say_misfit(self._recipe, self._teachers, images)
            self._recipe = None
        return images, None if self._route is None else _names(self._route(batch), [*self._teachers])

    def _targets(self, features: dict[str, Features], route: Sequence[str] | None) -> Targets:
        if route is not None:
            return cast(Targets, join_targets(features, route))
        return cast(Targets, features if self._several else features[_THE_ONE])

    def _parallelism(self) -> int:
        return max(source.parallelism for source in self._sources.values())

    def _pool_resends(self) -> int:
        total = 0
        for source in self._sources.values():
            statistics = getattr(source, "statistics", None)
            total += getattr(statistics(), "resends", 0) if callable(statistics) else 0
        return total

    def _check_fingerprints(self, features: dict[str, Features]) -> None:
        for name, each in features.items():
            before = self._fingerprints.setdefault(name, each.fingerprint)
            if each.fingerprint == before:
                continue
            which = f"teacher {name!r}" if name else "the teacher"
            message = (
                f"{which} changed from {before} to {each.fingerprint} after {self._steps} batches of this stream: "
                "targets before and after come from different models"
            )
            if self._raise_on_reload:
                raise PoolError(f"{message} (on_reload='warn' continues)")
            self._fingerprints[name] = each.fingerprint
            log.warning("%s (on_reload='raise' stops there)", message)

    def _count(self, waited: float, seconds: float) -> None:
        self._wait_seconds += waited
        self._seconds += seconds
        self._depth.learn(waited, seconds, self._parallelism())
        for source in self._sources.values():
            count_step = getattr(source, "count_step", None)
            if callable(count_step):
                count_step(waited, seconds)
        share = self.statistics().wait_share
        if not self._warned and self._steps > _WARN_AFTER and share > _WARN_SHARE:
            self._warned = True
            log.warning(
                "the student waits for its teacher %.0f%% of the time: more replicas (pool.scale), smaller maps "
                "(FeatureSpec.map_size) or narrower ones (dtype='int8') would help",
                100 * share,
            )


@overload
def prefetch(
    teacher: Mapping[str, AnyTeacher],
    loader: Iterable[Batch],
    spec: FeatureSpec | Mapping[str, FeatureSpec] | None = None,
    *,
    route: Route[Batch],
    **options: Unpack[PrefetchOptions[Batch]],
) -> Prefetch[Batch, Features]: ...
@overload
def prefetch(
    teacher: Mapping[str, AnyTeacher],
    loader: Iterable[Batch],
    spec: FeatureSpec | Mapping[str, FeatureSpec] | None = None,
    **options: Unpack[PrefetchOptions[Batch]],
) -> Prefetch[Batch, dict[str, Features]]: ...
@overload
def prefetch(
    teacher: AnyTeacher,
    loader: Iterable[Batch],
    spec: FeatureSpec | None = None,
    **options: Unpack[PrefetchOptions[Batch]],
) -> Prefetch[Batch, Features]: ...
def prefetch(teacher: Any, loader: Any, spec: Any = None, **options: Any) -> Prefetch[Any, Any]:
    """Iterate over ``(batch, targets)`` for each batch of ``loader``, in order; targets are computed ahead of the loop.

    ::

        for batch, targets in prefetch(teacher, loader, FeatureSpec(feature_map=True), device="cuda"):
            loss = detection_loss(student(batch), batch) + distill(tap.take(), targets)

    ``depth`` limits memory: that many batches with their targets, of which the targets of two are on the device.

    Errors reach the caller unchanged: the loader's when it raises, a teacher's when its batch would be delivered, the
    loop's own at once. Nothing is in flight after any of them.

    Args:
        teacher: a pool's ``RemoteTeacher``; a teacher of this process; or a dict of several by name, which all get each
            batch: ``targets`` is then a dict too. A teacher of this process computes in a second thread. If it is on
            the accelerator that the targets are for, it computes in the caller's thread, since a second thread gains
            nothing on a GPU shared with the student.
        loader: any iterable of batches, such as a DataLoader with workers. The caller's thread draws from it.
        spec: what to compute; with several teachers, one spec for all or a dict of one per teacher. Left out where
            ``recipe`` gives it.
        route: with several teachers, a function of a batch that gives each image's teacher, such as
            ``lambda batch: batch["domain"]``: its name, or its place in ``teacher``, as a list, an array or a tensor
            of integers. Each teacher then computes its own images only, and ``targets`` are the
            Features of the whole batch, in its order. So all teachers must give the same outputs, in one shape and
            dtype.
        options: see :class:`PrefetchOptions`.

    Raises:
        ConfigError, SpecError: an option is wrong; raised at once.
    """
    return Prefetch(teacher, loader, spec, **options)


def _spec_of(spec: Any, recipe: Recipe | None) -> Any:
    if (spec is None) == (recipe is None):
        given = "neither" if spec is None else f"spec={spec!r} and recipe={recipe.name!r}"  # type: ignore[union-attr]
        raise ConfigError(f"spec or recipe must say what the teacher computes, one of the two; got {given}")
    return spec if recipe is None else recipe.spec


def _say_misfit(recipe: Recipe, teachers: Mapping[str, Any], images: Images) -> None:
    """Warn once of the teachers whose image size is not the recipe's, by the first batch."""
    view = ImageBatch.of(images).sizes[0]
    for name, teacher in teachers.items():
        patch_size = getattr(teacher, "patch_size", None) or 16
        problem = recipe.misfit(getattr(teacher, "image_size", None), view, patch_size)
        if problem:
            warnings.warn(f"{name}: {problem}" if name else problem, UserWarning, stacklevel=2)


def _by_teacher(spec: FeatureSpec | Mapping[str, FeatureSpec], names: list[str]) -> dict[str, FeatureSpec]:
    specs = dict(spec) if isinstance(spec, Mapping) else dict.fromkeys(names, spec)
    if set(specs) != set(names):
        raise ConfigError(f"spec must have one FeatureSpec per teacher ({', '.join(names)}); got {', '.join(specs)}")
    for each in specs.values():
        if not isinstance(each, FeatureSpec):
            raise ConfigError(f"spec must be a FeatureSpec; got {each!r}")
        each.require_outputs()
    return specs


def _checked_route(route: Any, several: bool, specs: Mapping[str, FeatureSpec]) -> Any:
    if route is None:
        return None
    if not callable(route):
        raise ConfigError(f"route must be a function of a batch, such as lambda batch: batch['teacher']; got {route!r}")
    if not several:
        raise ConfigError("route needs teachers by name, such as {'dinov3': ..., 'siglip2': ...}; got one teacher")
    outputs = {name: (spec.cls, spec.feature_map, spec.registers, spec.layers) for name, spec in specs.items()}
    if len(set(outputs.values())) > 1:
        raise SpecError(f"with route, all teachers must have the same outputs in their FeatureSpecs; got {dict(specs)}")
    return route


def _names(route: Any, names: Sequence[str]) -> list[str]:
    """What a route gave, as names: it gives a list, an array or a tensor of names, or of places in ``names``."""
    given = route.tolist() if isinstance(route, (np.ndarray, Tensor)) else route
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ConfigError(f"route must give a list of teachers' names, one per image; got {describe(route)}")
    return [_name(one, index, names) for index, one in enumerate(given)]


def _name(given: Any, index: int, names: Sequence[str]) -> str:
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool) and 0 <= given < len(names):
        return names[int(given)]
    if given not in names:
        places = f"{', '.join(names)}; or 0 to {len(names) - 1}, their places"
        raise ConfigError(f"route must name the teachers ({places}); got {given!r} for image {index}")
    return str(given)


_KEYS = ("img", "images", "pixel_values")


def find_images(batch: Any) -> Images:
    """The images of a batch:

    1. a tensor or array itself;
    2. in a dict (or another mapping), the value of ``img``, ``images`` or ``pixel_values``;
    3. a list or tuple of [3,H,W] tensors or arrays itself, as images of different sizes;
    4. in any other list or tuple, such as ``(images, labels)``, the images of its first item, by the same rules.

    Raises:
        ConfigError: the batch is none of these, or a dict with several of the names.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch
    if isinstance(batch, Mapping):
        names = [name for name in _KEYS if name in batch]
        if len(names) == 1:
            return find_images(batch[names[0]])
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch):
        if all(isinstance(item, (Tensor, np.ndarray)) and item.ndim == 3 and item.shape[0] == 3 for item in batch):
            return cast(Images, batch)
        if not isinstance(batch[0], (Tensor, np.ndarray)) or batch[0].ndim == 4:
            return find_images(batch[0])
    raise ConfigError(
        f"images must be given where a batch is not images, (images, ...) or a dict with one of {', '.join(_KEYS)}; "
        f"got {describe(batch)} (pass images=lambda batch: ..., which returns its images)"
    )
