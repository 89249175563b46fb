"""What a pool is: its teacher, how many replicas serve it, where they may run, and how they serve."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field

from dinov3_ray.config import ModelConfig, open_config
from dinov3_ray.config.hub import carrying_access
from dinov3_ray.errors import ConfigError, describe
from dinov3_ray.teacher import Extractor
from dinov3_ray.validation import CheckedModel, check, rule

__all__ = [
    "GPU_RULE",
    "Batching",
    "CheckedTeacher",
    "Exist",
    "Lifetime",
    "Placement",
    "PoolOptions",
    "PoolSpec",
    "ReplicaCount",
    "ReplicaResources",
    "TeacherGiven",
    "builder",
    "check_teacher",
    "parse_leave_gpus",
    "parse_replicas",
    "pickle_teacher",
    "replicas_for",
    "unpickle_teacher",
]


Batching = Literal["exact", "dynamic", "deterministic"]
Exist = Literal["error", "connect"]
Lifetime = Literal["process", "detached"]
ReplicaCount = int | Literal["auto"] | tuple[int, int]

_Whole = Annotated[int, Field(strict=True, ge=1), rule("must be a whole number, at least 1")]
_Seconds = Annotated[
    float, Field(strict=True, gt=0, allow_inf_nan=False), rule("must be more than 0 seconds, and finite")
]
_SecondsOrZero = Annotated[
    float, Field(strict=True, ge=0, allow_inf_nan=False), rule("must be at least 0 seconds, and finite")
]


class PoolOptions(CheckedModel):
    """How a pool batches, bounds and watches. Each option is described here and nowhere else."""

    key_is: ClassVar[str] = "an option of a pool"
    keys_are: ClassVar[str] = "options"

    max_batch: _Whole = 32
    """Images per forward pass at most; the client cuts larger batches and rejoins the results."""
    batching: Annotated[Batching, rule(f"must be one of {', '.join(get_args(Batching))}")] = "exact"
    """exact runs each request as it was submitted, so remote results equal local ones bit for bit. dynamic runs small
    requests of several clients together. deterministic pads every forward pass to max_batch images, so that an image's
    result never depends on its neighbours; where so many do not fit the device's memory, to the number that fits."""
    max_wait: _SecondsOrZero = 0.005
    """Seconds that a request may wait for others under dynamic and deterministic batching."""
    max_queued: _Whole = 256
    """Requests that a replica holds before it refuses more; the client then sends them again later."""
    max_queued_bytes: _Whole = 2 * 2**30
    """Bytes of the images of these requests, as a second limit. They occupy the object store of the replica's node."""
    window: _Whole = 3
    """Requests that one client keeps at one replica: one is computed while the next ones are transferred."""
    threads: _Whole | None = None
    """CPU threads per replica. Left out: the cluster's CPUs are shared between the replicas."""
    health_interval: _Seconds = 1.0
    """Seconds between the controller's health checks of a replica."""
    health_timeout: _Seconds = 10.0
    """Seconds without an answer to a health check after which a replica is replaced."""
    hang_timeout: _Seconds = 60.0
    """Seconds that one forward pass may take before its replica is replaced."""
    startup_timeout: _Seconds = 300.0
    """Seconds that a replica may take to load and check its teacher, once Ray has placed it. The time in which a model
    of the hub is being downloaded does not count."""
    client_timeout: _Seconds = 30.0
    """Seconds without a sign of life after which a client's queued requests are dropped."""
    idle_seconds: _Seconds = 30.0
    """With a range of replicas: seconds without work after which the pool shrinks by one replica."""
    busy_seconds: _Seconds = 0.5
    """With a range of replicas: the wait in the queue above which the pool grows by one replica."""
    drain_timeout: _Seconds = 60.0
    """Seconds that a replica may take to finish its requests before it is removed."""

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """``options`` by name.

        Raises:
            ConfigError: names every option that is wrong or unknown, with its rule and value.
        """
        return check(cls, dict(options))


#: Of ``num_gpus``, in words.
GPU_RULE = "must be a number from 0 to 1, since a replica computes on one GPU at most (for more GPUs, more replicas)"

_Amount = Annotated[float, Field(strict=True, ge=0), rule("must be a number >= 0")]


class ReplicaResources(CheckedModel):
    """What each replica reserves in Ray."""

    num_gpus: Annotated[float, Field(strict=True, ge=0, le=1), rule(GPU_RULE)] | None = None
    """GPUs per replica. 0.5 puts two replicas on one GPU, each with half of its memory. Left out: 1 where the cluster
    has GPUs, else 0."""
    num_cpus: _Amount = 0
    """CPUs that each replica reserves."""


class Placement(ReplicaResources):
    """What each replica reserves, and the labels that its node must have."""

    label_selector: dict[str, Annotated[str, Field(strict=True), rule("must be text")]] = Field(default={})

    def resolved(self, *, has_gpus: bool) -> Placement:
        """With a number of GPUs, where that is left to the cluster."""
        return self if self.num_gpus is not None else self.model_copy(update={"num_gpus": 1.0 if has_gpus else 0.0})

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    def actor_options(self) -> dict[str, object]:
        """As options of a Ray actor."""
        options: dict[str, object] = {"num_gpus": self.num_gpus or 0, "num_cpus": self.num_cpus}
        if self.label_selector:
            options["label_selector"] = dict(self.label_selector)
        return options


def parse_leave_gpus(leave_gpus: object) -> float:
    """``leave_gpus`` as a number.

    Raises:
        ConfigError: if it is not a number of GPUs.
    """
    number = isinstance(leave_gpus, (int, float)) and not isinstance(leave_gpus, bool)
    if not number or not 0 <= leave_gpus < math.inf:  # type: ignore[operator]
        raise ConfigError(f"leave_gpus must be a number of GPUs, at least 0; got {leave_gpus!r}")
    return float(leave_gpus)  # type: ignore[arg-type]


def replicas_for(*, total: float, free: float, each: float, leave: float) -> int:
    """How many replicas of ``each`` GPUs ``"auto"`` is, in a cluster of ``total`` GPUs of which some are ``free``: as
    many as the free ones hold, but at least one; and none on those that it must leave.

    Raises:
        ConfigError: it would leave the pool no room for one replica.
    """
    if not each:
        return 1
    if leave and total - leave < each:
        raise ConfigError(
            f"leave_gpus={leave:g} must leave the pool num_gpus={each:g} of the cluster's {total:g} GPUs at least; "
            "leave fewer, give replicas a share of a GPU (num_gpus=0.5), or compute on CPUs (num_gpus=0)"
        )
    return max(1, int(min(free, total - leave) / each))


def parse_replicas(replicas: object, *, auto: int) -> tuple[int, int]:
    """``replicas`` as (min, max); ``auto`` is what ``"auto"`` stands for here.

    Raises:
        ConfigError: if it is neither a positive whole number, ``"auto"``, nor (min, max) with 1 <= min <= max.
    """
    if replicas == "auto":
        return auto, auto
    if isinstance(replicas, int) and not isinstance(replicas, bool) and replicas >= 1:
        return replicas, replicas
    if isinstance(replicas, (tuple, list)) and len(replicas) == 2:
        low, high = replicas
        if type(low) is type(high) is int:  # a bool is not a count
            if 1 <= low <= high:
                return low, high
            if low >= 1:
                raise ConfigError(f"replicas=(min, max): max ({high}) must be >= min ({low})")
    raise ConfigError(f'replicas must be a whole number >= 1, "auto", or (min, max) with min >= 1; got {replicas!r}')


CheckedTeacher = ModelConfig | Callable[[], Extractor]
TeacherGiven = CheckedTeacher | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What a pool is, whether it was asked for in Python, in a file, or runs.

    Attributes:
        teacher: a configuration or a factory; pickled where it waits for the process that builds it. A controller
            never unpickles it: it has no torch, and perhaps not the factory's module.
        replicas: ``"auto"`` until :meth:`resolved`; then (min, max).
        leave_gpus: GPUs of the cluster that ``"auto"`` leaves to others, such as trainers, whoever has them now.
    """

    teacher: CheckedTeacher | bytes
    replicas: ReplicaCount = "auto"
    placement: Placement = field(default_factory=lambda: Placement())
    options: PoolOptions = field(default_factory=lambda: PoolOptions())
    leave_gpus: float = 0.0

    @property
    def low(self) -> int:
        return parse_replicas(self.replicas, auto=1)[0]

    @property
    def high(self) -> int:
        return parse_replicas(self.replicas, auto=1)[1]

    @property
    def given(self) -> CheckedTeacher:
        """The teacher, which must not be pickled."""
        assert not isinstance(self.teacher, bytes)
        return self.teacher

    def resolved(self, placement: Placement, *, auto: int) -> PoolSpec:
        """With what was left to the cluster: ``placement``, and ``auto`` replicas where it says ``"auto"``."""
        return replace(self, placement=placement, replicas=parse_replicas(self.replicas, auto=auto))

    def pickled(self) -> PoolSpec:
        """With the teacher as bytes, in which form it crosses to the controller.

        Raises:
            ConfigError: the teacher cannot be pickled.
        """
        return replace(self, teacher=pickle_teacher(self.given))

    def unpickled(self) -> PoolSpec:
        """With the teacher that was pickled.

        Raises:
            ImportError, AttributeError: the teacher is a factory that this process does not have.
        """
        assert isinstance(self.teacher, bytes)
        return replace(self, teacher=unpickle_teacher(self.teacher))


def check_teacher(teacher: TeacherGiven) -> CheckedTeacher:
    """``teacher`` as a configuration (read and validated here and now) or a factory.

    Raises:
        ConfigError: if it is neither; a teacher that is made already, too.
        CheckpointError: it is a model of the hub, which does not give it.
    """
    if isinstance(teacher, (ModelConfig, str, os.PathLike)):
        return open_config(teacher)
    config = getattr(teacher, "stands_for", None)
    if isinstance(config, ModelConfig):  # TransformersTeacher.factory(...): the pool chooses the device
        return config
    # A torch module, whose class is not imported here, and whose repr is long.
    is_module = callable(getattr(teacher, "forward", None)) and not isinstance(teacher, type)
    wanted = (
        "teacher must be a DinoV3Config, a model directory, a hub id, or a callable without arguments that "
        f"returns an object with .extract(images, spec); got {describe(teacher) if is_module else repr(teacher)}"
    )
    if is_module or (isinstance(teacher, Extractor) and not isinstance(teacher, type)):
        raise ConfigError(f"{wanted}, which is made already (pass what it is made of, such as teacher.config)")
    if not callable(teacher):
        raise ConfigError(wanted)
    try:
        inspect.signature(teacher).bind()
    except ValueError:  # a builtin does not say what it takes
        pass
    except TypeError as error:
        raise ConfigError(f"{wanted}, which needs arguments: {error} (use functools.partial)") from error
    return teacher


def pickle_teacher(teacher: CheckedTeacher) -> bytes:
    """``teacher`` for other processes; a model of the hub with this process's access to it.

    Raises:
        ConfigError: it cannot be pickled.
    """
    from ray import cloudpickle  # here, since a command's options need no Ray

    try:
        with carrying_access():
            return cloudpickle.dumps(teacher)  # type: ignore[no-any-return]
    except Exception as error:
        raise ConfigError(
            f"teacher must be picklable, since other processes make it; got {teacher!r}, and {type(error).__name__}: "
            f"{error} (a factory that opens its files, locks and models itself can be pickled)"
        ) from error


def unpickle_teacher(pickled: bytes) -> CheckedTeacher:
    """What :func:`pickle_teacher` pickled, in a process of the cluster that this one trusts already.

    Raises:
        ImportError, AttributeError: it is a factory that this process does not have.
    """
    from ray import cloudpickle

    return cloudpickle.loads(pickled)  # type: ignore[no-any-return]


def builder(source: CheckedTeacher, device: str) -> Callable[[], Extractor]:
    """What makes the teacher on ``device``. A factory chooses its device itself; it finds ``device`` as the current
    CUDA device."""

    def build() -> Extractor:
        if device.startswith("cuda:"):  # without a number it is the current device already
            # Only here: a controller does without torch.
            import torch

            from dinov3_ray.model.device import settle_thread

            settle_thread(torch.device(device))
        if isinstance(source, ModelConfig):
            # Only here: torch takes seconds to import, and neither a client nor a factory needs it.
            from dinov3_ray.model import open_teacher

            return open_teacher(source, device)
        teacher = source()
        if not isinstance(teacher, Extractor):
            raise ConfigError(f"the factory must return an object with .extract(images, spec); got {teacher!r}")
        return teacher

    return build
