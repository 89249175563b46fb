"""What a pool is: the teacher, how many replicas of it, where they may run, and how they serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dinov3_ray.pool.spec import Placement, PoolOptions

__all__ = ["Declaration", "Redeclaration"]


_REMEMBERED = 16  # redeclarations: a call is sent again within a minute, if at all


@dataclass(frozen=True, slots=True)
class Declaration:
    """A pool as it was last declared; ``source`` is the pickled teacher, which its controller never unpickles."""

    source: bytes
    low: int
    high: int
    placement: Placement
    options: PoolOptions
    target: int
    generation: int = 0
    #: The highest generation that there has been; it is above ``generation`` after a reload that was given up.
    newest: int = 0
    #: The number of the next replica: names are never used again, since clients remember the dead by them.
    serial: int = 0
    #: While a reload is under way, what the pool goes back to if the new replicas do not start.
    former: Declaration | None = None
    #: Which redeclarations were taken, by their tokens, and the generation that each of them began.
    taken: Mapping[str, int] = field(default_factory=dict)

    def redeclared(self, change: Redeclaration, generation: int, *, settled: bool) -> Declaration:
        """This pool with ``change`` as its next ``generation``; ``settled`` if this one has served alone."""
        given = {name: getattr(change, name) for name in ("source", "placement", "options")}
        return replace(
            self,
            **{name: value for name, value in given.items() if value is not None},
            generation=generation,
            former=replace(self, former=None, taken={}) if settled else self.former,
            taken=dict([*self.taken.items(), (change.token, generation)][-_REMEMBERED:]),
        )

    def gone_back(self) -> Declaration:
        """This pool with the teacher, placement and options that it had before the reload that is given up."""
        former = self.former
        assert former is not None
        return replace(
            self,
            source=former.source,
            placement=former.placement,
            options=former.options,
            generation=former.generation,
            former=None,
        )


@dataclass(frozen=True, slots=True)
class Redeclaration:
    """What of a pool is to be another; None stays as it is. ``token`` makes one that is sent twice count once."""

    token: str
    source: bytes | None = None
    placement: Placement | None = None
    options: PoolOptions | None = None
