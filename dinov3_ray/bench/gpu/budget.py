"""The parts of the run, and how its seconds are divided among them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PARTS", "TOTAL_SECONDS", "BenchPart", "TimeShare", "share_of", "wanted_parts"]

TOTAL_SECONDS = 500.0
"""Of all parts; a run ends within nine minutes with its start and its end."""

_PATIENCE = 60.0  # seconds in which a part may finish what it has begun, such as the start of a pool
_LAST_PATIENCE = 20.0  # the same, where no later part is left to pay for it


@dataclass(frozen=True, slots=True)
class BenchPart:
    """One part of the run.

    Attributes:
        name: on the command line and in the JSON.
        title: in the tables.
        seconds: its time if all parts take theirs.
    """

    name: str
    title: str
    seconds: float


# The first one gives the figures that matter most; the last one has the most to leave out, and takes the time that the
# others did not need.
PARTS = (
    BenchPart("large-teacher", "The large teacher", 95),
    BenchPart("pool", "A pool of one replica", 60),
    BenchPart("extraction", "Extraction of JPEG files", 65),
    BenchPart("training", "A training step", 75),
    BenchPart("sanitizer", "torch's CUDA sanitizer", 25),
    BenchPart("tests", "Tests that need a GPU", 55),
    BenchPart("other-teachers", "The other teachers", 125),
)


@dataclass(frozen=True, slots=True)
class TimeShare:
    """The time of one part.

    Attributes:
        begin: seconds after which it begins nothing new.
        end: seconds after which it is stopped.
    """

    begin: float
    end: float


def share_of(left: float, parts: Sequence[BenchPart]) -> TimeShare:
    """The share of the first of ``parts`` in the ``left`` seconds: what earlier parts saved or overran, all share."""
    left = max(0.0, left)
    share = left * parts[0].seconds / sum(part.seconds for part in parts)
    return TimeShare(share, min(share + _PATIENCE, left + _LAST_PATIENCE))


def wanted_parts(names: Sequence[str]) -> tuple[BenchPart, ...]:
    """The parts of these names, in the order of the run; all of them if no name is given."""
    return tuple(part for part in PARTS if not names or part.name in names)
