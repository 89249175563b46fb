"""A pool declared in a YAML file: reading it, and how it differs from a pool that runs. Pure but for reading the file.

::

    name: dinov3                    # all keys but teacher.root may be left out
    namespace: dinov3_ray
    replicas: [2, 8]                # or 4, or auto (which leaves a running pool's number as it is)
    teacher:
      root: /models/dinov3-vitl16   # at the same path on every node
      dtype: bfloat16               # and image_size, compile, cuda_graphs, attention
    placement:
      num_gpus: 1                   # a fraction shares a GPU; left out: 1 where the cluster has GPUs, else 0
      num_cpus: 0
      accelerator: H200             # short for the label ray.io/accelerator-type
      labels: {zone: a}
    options:                        # those of PoolOptions
      batching: dynamic
      max_batch: 64


Makes the pool that a file declares: starts it, changes one that runs, or only says what would change.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray import cloudpickle

from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import ConfigError, PoolNotFoundError
from dinov3_ray.pool.cluster import NAMESPACE, Runtime, check_name
from dinov3_ray.pool.control.declaration import Declaration
from dinov3_ray.pool.control.remote_control import RayControl
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.pool.spec import CheckedSource, Placement, PoolOptions, ReplicaCount, parse_replicas
from dinov3_ray.pool.teacher_pool import TeacherPool, place

__all__ = ["Change", "Plan", "PoolFile", "PoolState", "differences", "plan_pool"]


_ACCELERATOR = "ray.io/accelerator-type"
_TEACHER_KEYS = ("root", "dtype", "image_size", "compile", "cuda_graphs", "attention")
_PLACEMENT_KEYS = ("num_gpus", "num_cpus", "accelerator", "labels")
_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class PoolFile:
    """What a file declares, checked; ``num_gpus`` and ``replicas`` may be left to the cluster (None, ``"auto"``)."""

    name: str
    namespace: str
    teacher: DinoV3Config
    replicas: ReplicaCount
    num_gpus: float | None
    num_cpus: float
    labels: Mapping[str, str]
    options: PoolOptions = field(default_factory=PoolOptions)

    @classmethod
    def read(cls, path: Path) -> PoolFile:
        """The declaration in ``path``.

        Raises:
            ConfigError: it cannot be read, is no such file, or a key or value is wrong.
        """
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the pool's file {path} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        try:
            return cls.of(content, folder=path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def of(cls, content: object, *, folder: Path) -> PoolFile:
        """The declaration that ``content`` holds; a relative ``teacher.root`` starts at ``folder``.

        Raises:
            ConfigError: names the key, the rule and the value.
        """
        top = _mapping(content, "", ("name", "namespace", "replicas", "teacher", "placement", "options"))
        teacher = _mapping(top.get("teacher"), "teacher", _TEACHER_KEYS)
        if not isinstance(teacher.get("root"), str):
            raise ConfigError(f"teacher.root must be the path of a model directory; got {teacher.get('root')!r}")
        placement = _mapping(top.get("placement"), "placement", _PLACEMENT_KEYS)
        labels = _labels(placement)
        num_gpus, num_cpus = placement.get("num_gpus"), placement.get("num_cpus", 0)
        Placement(num_gpus=0 if num_gpus is None else num_gpus, num_cpus=num_cpus)
        replicas = top.get("replicas", "auto")
        low_high = parse_replicas(replicas, auto=1)
        options = PoolOptions.of(_mapping(top.get("options"), "options", None))
        namespace = top.get("namespace", NAMESPACE)
        if not isinstance(namespace, str) or not namespace:
            raise ConfigError(f"namespace must be the name of a Ray namespace; got {namespace!r}")
        settings = {key: value for key, value in teacher.items() if key != "root"}
        return cls(
            name=check_name(top.get("name", "dinov3")),
            namespace=namespace,
            teacher=DinoV3Config(folder / Path(teacher["root"]).expanduser(), **settings),
            replicas=low_high if isinstance(replicas, list) else replicas,
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            labels=labels,
            options=options,
        )


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool is or shall be, in the terms of its file."""

    source: CheckedSource
    low: int
    high: int
    placement: Placement
    options: PoolOptions

    def entries(self) -> dict[str, str]:
        """Every key of the file that describes it, with its value as text."""
        found: dict[str, object] = {
            "replicas": self.low if self.low == self.high else f"[{self.low}, {self.high}]",
            "placement.num_gpus": f"{self.placement.num_gpus:g}",
            "placement.num_cpus": f"{self.placement.num_cpus:g}",
        }
        if isinstance(self.source, DinoV3Config):
            found |= {f"teacher.{key}": getattr(self.source, key) for key in _TEACHER_KEYS}
            found["teacher.image_size"] = list(self.source.image_size)
            # What the directory's files said when they were read: the same path may hold another model by now.
            found["teacher (config.json)"] = self.source.architecture
            found["teacher (preprocessor_config.json)"] = self.source.preprocessing
        else:
            found["teacher"] = f"a factory: {self.source!r}"
        found |= {f"placement.labels.{key}": value for key, value in self.placement.label_selector.items()}
        found |= {f"options.{key}": value for key, value in asdict(self.options).items()}
        return {key: str(value) for key, value in found.items()}


@dataclass(frozen=True, slots=True)
class Change:
    """One key whose value is to become another; ``rolling`` if that takes new replicas."""

    key: str
    before: str
    after: str

    @property
    def rolling(self) -> bool:
        return self.key != "replicas"

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def differences(before: PoolState, after: PoolState) -> tuple[Change, ...]:
    """What would have to change for a pool that is ``before`` to be ``after``, by key."""
    old, new = before.entries(), after.entries()
    keys = dict.fromkeys([*old, *new])
    return tuple(
        Change(key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys if old.get(key) != new.get(key)
    )


class _Loader(yaml.SafeLoader):
    """YAML without the habit of taking the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands here twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _mapping(value: object, name: str, known: Collection[str] | None) -> dict[str, Any]:
    """``value`` as a mapping with keys among ``known`` (None: somebody else judges them); nothing is an empty one."""
    what = name or "the file"
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{what} must hold `key: value` lines; got {value!r}")
    for key in value if known is not None else ():
        if known is not None and key not in known:
            raise ConfigError(_unknown(f"{name}.{key}" if name else key, key, known))
    return value


def _unknown(full: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f" (keys: {', '.join(known)})"
    return f"{full!r} is not a key of a pool's file{hint}"


def _labels(placement: Mapping[str, Any]) -> dict[str, str]:
    labels = _mapping(placement.get("labels"), "placement.labels", None)
    accelerator = placement.get("accelerator")
    if accelerator is not None:
        if _ACCELERATOR in labels:
            raise ConfigError(f"placement.accelerator and the label {_ACCELERATOR} say the same: leave one out")
        labels = {_ACCELERATOR: accelerator, **labels}
    for key, value in labels.items():
        if not isinstance(value, str) or not value:
            # YAML reads `true`, `1` and `1e3` as other things than text.
            raise ConfigError(f"the label {key} must be text (put it in quotes); got {value!r}")
    return labels


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done to make a pool what its file says.

    Attributes:
        changes: what differs from the pool that runs; None if none runs.
    """

    wanted: PoolFile
    changes: tuple[Change, ...] | None
    _target: PoolState | None
    _control: RayControl | None

    def carry_out(self, timeout: float, on_status: Callable[[PoolStatus], None] | None = None) -> PoolStatus:
        """Start the pool, or change it replica by replica while it serves; waits until it is as declared.

        Raises:
            ReplicaError, PoolTimeoutError: as in :meth:`TeacherPool.start` and :meth:`TeacherPool.reload`; a pool that
                ran before is left running.
        """
        wanted = self.wanted
        if self._control is None or self._target is None:
            pool = TeacherPool.start(
                wanted.teacher,
                name=wanted.name,
                namespace=wanted.namespace,
                replicas=wanted.replicas,
                num_gpus=wanted.num_gpus,
                num_cpus=wanted.num_cpus,
                label_selector=wanted.labels,
                timeout=timeout,
                on_status=on_status,
                **asdict(wanted.options),
            )
            return pool.status()
        generation = None
        # The number last: while replicas are replaced, there are to be as many as before.
        if any(change.rolling for change in self.changes or ()):
            target = self._target
            generation = self._control.redeclare(target.source, placement=target.placement, options=target.options)
        if any(not change.rolling for change in self.changes or ()):
            self._control.scale(self._target.low, self._target.high)
        pool = TeacherPool.connect(wanted.name, namespace=wanted.namespace)
        return pool.wait_ready(timeout, generation=generation, on_status=on_status)


def plan_pool(wanted: PoolFile, address: str) -> Plan:
    """Compare what is ``wanted`` with what runs in the Ray at ``address``, which this process is connected to."""
    try:
        control = RayControl.connect(wanted.name, wanted.namespace, Runtime(address, owned=False))
    except PoolNotFoundError:
        return Plan(wanted, None, None, None)
    declared = control.declaration()
    running = _state_of(declared)
    low, high = (running.low, running.high) if wanted.replicas == "auto" else parse_replicas(wanted.replicas, auto=1)
    placement = place(wanted.num_gpus, wanted.num_cpus, wanted.labels)
    target = PoolState(wanted.teacher, low, high, placement, wanted.options)
    return Plan(wanted, differences(running, target), target, control)


def _state_of(declared: Declaration) -> PoolState:
    # The pool's own source, from the cluster whose word this process takes already.
    try:
        source = cloudpickle.loads(declared.source)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the running pool serves a factory that this process cannot load ({error}), so a file cannot be compared "
            "with it: end that pool, or give the file another name"
        ) from error
    return PoolState(source, declared.low, declared.high, declared.placement, declared.options)
