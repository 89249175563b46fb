"""A pool declared in a YAML file: its keys, its JSON schema for editors, and how two pools differ key by key.

::

    name: dinov3                    # only teacher.root has no default
    namespace: dinov3_ray
    replicas: [2, 8]                # or 4, or auto
    leave_gpus: 0                   # with auto: GPUs of the cluster that are for others
    teacher:
      root: /models/dinov3-vitl16   # or a hub id, with its revision; and the options of DinoV3Config
      dtype: bfloat16
    placement:
      num_gpus: 1
      num_cpus: 0
      accelerator: H200             # short for the label ray.io/accelerator-type
      labels: {zone: a}
    options:                        # those of PoolOptions
      batching: dynamic
      max_batch: 64
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from dinov3_ray.config import ModelConfig, open_config
from dinov3_ray.config.config import ModelOptions
from dinov3_ray.config.files import PositiveInt
from dinov3_ray.config.hub import resolve
from dinov3_ray.errors import CheckpointError, ConfigError
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.cluster import check_name
from dinov3_ray.pool.spec import Placement, PoolOptions, PoolSpec, ReplicaResources, parse_leave_gpus, parse_replicas
from dinov3_ray.validation import CheckedModel, check, from_list, rule

__all__ = ["Change", "PoolFile", "changes_between", "pool_schema"]


_ACCELERATOR = "ray.io/accelerator-type"
_ABSENT = "-"
_MEMORY = r" at 0x[0-9a-f]+"  # where one process keeps an object that others have too
_KEY_IS = "a key of a pool's file"

# YAML reads `true`, `1` and `1e3` as other things than text.
_TEXT = rule("must be text (put it in quotes)")
_Label = Annotated[str, Field(strict=True, min_length=1), _TEXT]


class TeacherSection(ModelOptions):
    """The model that a pool serves, and how it computes."""

    key_is: ClassVar[str] = _KEY_IS

    root: Annotated[str, Field(strict=True), rule("must be the path of a model directory, or a hub id (owner/name)")]
    """The model directory, at the same path on every node; a relative path starts at this file's folder. Or the id of
    a model on the Hugging Face Hub, which each node downloads unless its cache has it."""
    revision: Annotated[str, Field(strict=True, min_length=1), _TEXT] | None = None
    """With a hub id: a branch, a tag or a commit; main if left out. All replicas serve the commit that it is when the
    pool is started or changed."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_root(cls, values: object) -> object:
        return {"root": None, **values} if isinstance(values, dict) else values


class PlacementSection(ReplicaResources):
    """What each replica reserves, and on which nodes."""

    key_is: ClassVar[str] = _KEY_IS

    accelerator: _Label | None = None
    """The accelerator that a node must have, such as H200: short for the label ray.io/accelerator-type."""
    labels: dict[Annotated[str, Field(strict=True), _TEXT], _Label] = Field(default={})
    """Labels that a replica's node must have."""

    @field_validator("labels")
    @classmethod
    def _name_the_accelerator_once(cls, labels: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if info.data.get("accelerator") is not None and _ACCELERATOR in labels:
            raise ValueError(f"placement.accelerator and the label {_ACCELERATOR} say the same: leave one out")
        return labels

    def placement(self) -> Placement:
        accelerator = {} if self.accelerator is None else {_ACCELERATOR: self.accelerator}
        return Placement(num_gpus=self.num_gpus, num_cpus=self.num_cpus, label_selector={**accelerator, **self.labels})


def _check_replicas(value: object) -> object:
    parse_replicas(value, auto=1)
    return value


class PoolKeys(CheckedModel):
    """A pool, for `dinov3-ray up --config pool.yaml`."""

    key_is: ClassVar[str] = _KEY_IS

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$"), BeforeValidator(check_name)] = "dinov3"
    """What clients call the pool."""
    namespace: Annotated[str, Field(strict=True, min_length=1), rule("must be the name of a Ray namespace")] = NAMESPACE
    """The Ray namespace of the pool's actors."""
    replicas: Annotated[
        PositiveInt | Literal["auto"] | Annotated[tuple[PositiveInt, PositiveInt], from_list],
        BeforeValidator(_check_replicas),
    ] = "auto"
    """The number of replicas, or [min, max], within which it moves with the load. auto: one for each free GPU, or one
    where there is none; it leaves the number of a running pool unchanged."""
    leave_gpus: Annotated[float, Field(ge=0), BeforeValidator(parse_leave_gpus)] = 0
    """With replicas auto: GPUs of the cluster that the pool leaves to others, such as trainers. It counts when the pool
    starts."""
    teacher: TeacherSection
    """What the pool serves."""
    placement: PlacementSection = PlacementSection()
    """What each replica needs of the cluster."""
    options: PoolOptions = PoolOptions()
    """How the pool batches, bounds and watches."""

    @model_validator(mode="before")
    @classmethod
    def _take_nothing_for_an_empty_section(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return values | {key: {} for key in ("teacher", "placement", "options") if values.get(key) is None}


def pool_schema() -> dict[str, Any]:
    """The JSON schema of a pool's file, which editors complete from.

    ``python -m dinov3_ray.pool.poolfile`` prints it.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **PoolKeys.model_json_schema()}


@dataclass(frozen=True, slots=True)
class PoolFile:
    """What a file declares. Its ``spec`` may leave replicas and GPUs to the cluster."""

    name: str
    namespace: str
    spec: PoolSpec

    @classmethod
    def read(cls, path: Path) -> PoolFile:
        """The declaration in ``path``.

        Raises:
            ConfigError: the file cannot be read, or keys or values are wrong; names them all.
            CheckpointError: config.json is incomplete, and the weights that could complete it are damaged; or the
                hub does not give the model.
        """
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the pool's file {path} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        return cls.of(content, folder=path.parent, path=path)

    @classmethod
    def of(cls, content: object, *, folder: Path, path: Path | None = None) -> PoolFile:
        """The declaration that ``content`` holds; a relative ``teacher.root`` starts at ``folder``.

        Raises:
            ConfigError: names ``path`` and each key, rule and value.
            CheckpointError: as in :meth:`read`.
        """
        keys = check(PoolKeys, {} if content is None else content, path=path)
        settings = keys.teacher.model_dump(exclude={"root", "revision"})
        try:
            place = resolve(keys.teacher.root, keys.teacher.revision, folder=folder)
            teacher = open_config(place, **settings)
        except (ConfigError, CheckpointError) as error:
            raise type(error)(f"{path}: {error}" if path else str(error)) from error
        return cls(
            keys.name,
            keys.namespace,
            PoolSpec(teacher, keys.replicas, keys.placement.placement(), keys.options, keys.leave_gpus),
        )


class _Loader(yaml.SafeLoader):
    """YAML without the habit of taking the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands here twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True, slots=True)
class Change:
    """One key that changes its value; ``rolling`` if that takes new replicas."""

    key: str
    before: str
    after: str

    @property
    def section(self) -> str:
        """The key of the file that it is, or is in; a file of the teacher is in ``teacher``."""
        return re.split(r"[. ]", self.key)[0]

    @property
    def rolling(self) -> bool:
        return self.section != "replicas"

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def changes_between(before: PoolSpec, after: PoolSpec) -> tuple[Change, ...]:
    """What would have to change for a pool that is ``before`` to be ``after``, by key; both resolved."""
    old, new = _entries(before), _entries(after)
    keys = dict.fromkeys([*old, *new])
    return tuple(
        Change(key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys if old.get(key) != new.get(key)
    )


def _entries(spec: PoolSpec) -> dict[str, str]:
    """Every key of the file that describes a pool, with its value as text; not ``leave_gpus``, which counts when a pool
    starts.
    """
    teacher, placement = spec.given, spec.placement
    found: dict[str, object] = {
        "replicas": spec.low if spec.low == spec.high else f"[{spec.low}, {spec.high}]",
        "placement.num_gpus": f"{placement.num_gpus:g}",
        "placement.num_cpus": f"{placement.num_cpus:g}",
    }
    if isinstance(teacher, ModelConfig):
        found |= {f"teacher.{key}": getattr(teacher, key) for key in TeacherSection.model_fields}
        found["teacher.root"] = teacher.hub_id or teacher.root  # the same id is in another folder on another machine
        found["teacher.image_size"] = teacher.preprocessing.follows or list(teacher.nominal_size)
        # What the directory's files said when they were read: the same path may hold another model by now.
        found["teacher (config.json)"] = teacher.architecture
        found["teacher (preprocessor_config.json)"] = teacher.preprocessing
    else:
        found["teacher"] = f"a factory: {re.sub(_MEMORY, '', repr(teacher))}"
    found |= {f"placement.labels.{key}": value for key, value in placement.label_selector.items()}
    found |= {f"options.{key}": value for key, value in spec.options.model_dump().items()}
    return {key: str(value) for key, value in found.items()}


if __name__ == "__main__":
    print(json.dumps(pool_schema(), indent=2))
