"""The desired state of a pool, as its controller keeps it, and the changes that are requested of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dinov3_ray.pool.spec import Lifetime, Placement, PoolOptions, PoolSpec

__all__ = ["Declaration", "PoolChange"]


_REMEMBERED = 16  # changes: a request is repeated within a minute, if at all


@dataclass(frozen=True, slots=True)
class Declaration:
    """A pool as it was last asked for."""

    #: Resolved, with a pickled teacher.
    spec: PoolSpec
    #: Replicas wanted now, within the range of ``spec``.
    target: int
    #: Whether it ends with the processes that hold it.
    lifetime: Lifetime = "detached"
    generation: int = 0
    #: The highest generation so far; above ``generation`` after a reload that was given up.
    newest: int = 0
    #: The number of the next replica. Names are never used again, since clients remember dead replicas by name.
    serial: int = 0
    #: While a reload runs: what the pool goes back to if the new replicas do not start.
    former: Declaration | None = None
    #: The generation that each change began, by the change's token.
    taken: Mapping[str, int] = field(default_factory=dict)

    def changed(self, change: PoolChange, generation: int, *, settled: bool) -> Declaration:
        """This pool after ``change``, which begins ``generation``; ``settled`` if this one has served alone."""
        given = {name: getattr(change, name) for name in ("teacher", "placement", "options")}
        return replace(
            self,
            spec=replace(self.spec, **{name: value for name, value in given.items() if value is not None}),
            generation=generation,
            former=replace(self, former=None, taken={}) if settled else self.former,
            taken=dict([*self.taken.items(), (change.token, generation)][-_REMEMBERED:]),
        )

    def gone_back(self) -> Declaration:
        """This pool with the teacher, placement and options that it had before the reload that is given up."""
        assert self.former is not None
        spec = replace(self.former.spec, replicas=self.spec.replicas)
        return replace(self, spec=spec, generation=self.former.generation, former=None)


@dataclass(frozen=True, slots=True)
class PoolChange:
    """A change to a running pool. None leaves a field unchanged. A repeated request with the same token counts once."""

    token: str
    #: Pickled.
    teacher: bytes | None = None
    placement: Placement | None = None
    options: PoolOptions | None = None
