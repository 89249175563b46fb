"""Differences between runs that belong together, with the bounds of their mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dinov3_ray.errors import ConfigError

__all__ = ["MOST_PAIRS", "Bounds", "paired_bounds"]

# The 97.5% quantile of Student's t for 1, 2, ... degrees of freedom, as tables have it.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

MOST_PAIRS = len(_T) + 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """A mean, and the two-sided 95% bounds of it by Student's t."""

    mean: float
    low: float
    high: float


def paired_bounds(values: Sequence[float], others: Sequence[float]) -> Bounds:
    """The mean of ``values[i] - others[i]``, with its bounds.

    Raises:
        ConfigError: not as many of one as of the other, or not 2 to :data:`MOST_PAIRS` of them.
    """
    if len(values) != len(others) or not 2 <= len(values) <= MOST_PAIRS:
        raise ConfigError(
            f"values and others must be 2 to {MOST_PAIRS} numbers, as many of each; got {len(values)} and {len(others)}"
        )
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean = statistics.fmean(differences)
    reach = _T[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return Bounds(mean, mean - reach, mean + reach)
